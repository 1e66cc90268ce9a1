"""AdamW in little memory: moments in 8 bits, weights in bf16 that are rounded stochastically (torchao's).

Imported only by runs that ask for it: torchao is an optional package, and takes seconds to load.

A weight in bf16 has 8 bits; a step of a usual learning rate moves it by less than half of the last one, and rounding to
the nearest would leave it where it is. Rounding up or down at random, with the probabilities that make the mean right,
moves it as far as an fp32 weight on average.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torchao.optim import AdamW8bit


class SmallAdamW(AdamW8bit):
    """AdamW that computes in fp32 whatever the weights and the moments are kept in.

    Weights in bf16 are rounded stochastically. Moments that are not in 8 bits are fp32: in bf16 the second moment,
    which loses a thousandth a step, would never shrink.

    Args:
        groups: as of every optimizer.
        in_8_bits: parameters whose moments are kept in 8 bits, unless they have less than 4,096 values.
        seed: the rounding of a step is a function of this and of the updates so far, so it is the same in all processes
            and after a resume, and no other random number depends on it.
    """

    def __init__(
        self, groups: list[dict[str, Any]], learning_rate: float, in_8_bits: Iterable[nn.Parameter], seed: int
    ) -> None:
        super().__init__(groups, lr=learning_rate, bf16_stochastic_round=True)
        self.in_8_bits, self.seed = set(in_8_bits), seed
        for group in self.param_groups:  # torchao makes tensors of them; schedules, logs and states expect numbers
            group["lr"] = float(learning_rate)

    @property
    def num_updates(self) -> int:
        """Of all parameters together, so that it grows with every step, whichever of them have gradients (see
        ``stages``); step counts lie on the host."""
        return sum(int(state["step"]) for state in self.state.values())

    def new_moment(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        """An empty ``exp_avg`` or ``exp_avg_sq``, as the first step makes it."""
        return self._new_buffer(parameter, signed=key == "exp_avg")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        device = self.param_groups[0]["params"][0].device
        rounding_seed = int(np.random.default_rng([self.seed, self.num_updates]).integers(2**63))
        # Compiled for each shape in the first step, one kernel reads and writes each number once; eagerly it is slower.
        stance = "default" if device.type == "cuda" and _has_c_compiler() else "force_eager"
        with torch.compiler.set_stance(stance), random_numbers(rounding_seed, device), self._rates_as_tensors():
            return super().step(closure)

    def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
        buffer = super()._new_buffer(p, signed) if p in self.in_8_bits else torch.zeros_like(p, dtype=torch.float32)
        return buffer.float() if type(buffer) is torch.Tensor else buffer

    @contextlib.contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """As torchao's step wants them: a number would be compiled in, and every new one would compile anew."""
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.tensor(rate, dtype=torch.float32)
            yield
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


@contextlib.contextmanager
def random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the device's random numbers follow from the seed; afterwards they go on as if none had been drawn."""
    is_cpu = device.type == "cpu"
    module = torch.random if is_cpu else torch.get_device_module(device)
    # torch.manual_seed would seed every device.
    begin = torch.default_generator.manual_seed if is_cpu else module.manual_seed
    before = module.get_rng_state()
    begin(seed)
    try:
        yield
    finally:
        module.set_rng_state(before)


def _has_c_compiler() -> bool:
    """Whether Triton can build what it launches kernels with."""
    return any(map(shutil.which, ("gcc", "clang")))
