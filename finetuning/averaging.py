"""EMA_DECAY: a running average of the weights, which is validated and exported in their place.

After every optimizer step that was applied, ``average = d x average + (1 - d) x weight``, in float32 whatever the
weights are kept in, on their device; it starts as the weights that the run starts from. With a fixed d these would
still weigh ``d ** n`` after n steps, most of the average in a short run. So d grows with the steps, as TensorFlow's
ExponentialMovingAverage has it: ``min(EMA_DECAY, (1 + n) / (10 + n))`` for n averaged steps before this one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from finetuning.sharding import local_part

if TYPE_CHECKING:  # a room behind this one
    from finetuning.state import State

#: In front of the names of its tensors in a state.
PREFIX = "ema."
_COUNT = f"{PREFIX}num_updates"


class Average:
    """The average of everything of a module that trains, each process's part of it where they hold parts.

    Args:
        module: placed and sharded for good; the average starts as its weights.
        decay: EMA_DECAY.

    Attributes:
        tensors: name of a parameter -> its average, float32, sharded as it is. Inside of ``in_place`` they may hold the
            weights.
        num_updates: () int64 on the device, the steps that were averaged.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self.tensors = {name: one.detach().to(torch.float32, copy=True) for name, one in self._parameters.items()}
        device = next(iter(self._parameters.values())).device
        self.num_updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, is_bad: torch.Tensor) -> None:
        """Takes the weights after a step into the average.

        Args:
            is_bad: () bool on the device: the step was left out, and so it is here. The host need not know.
        """
        decay = ((1 + self.num_updates) / (10 + self.num_updates)).clamp(max=self.decay)
        share = torch.where(is_bad, torch.zeros_like(decay), 1 - decay)
        for weight, average in self._pairs():
            average.lerp_(weight.float(), share)
        self.num_updates += ~is_bad

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module's parameters hold the average, rounded to what they are kept in; then their own again,
        bit for bit, however the inside ends.

        Where both are float32 they change places, so that no more than one tensor of room is needed.
        """
        swapped: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        try:
            for weight, average in self._pairs():
                swapped.append((weight, average, _put_in(weight, average)))
            yield
        finally:
            for weight, average, own in swapped:
                _put_back(weight, average, own)

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) for a state."""
        yield _COUNT, self.num_updates
        for name, tensor in self.tensors.items():
            yield f"{PREFIX}{name}", tensor

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Puts back what ``named_tensors`` gave; it may be sharded otherwise than before."""
        self.num_updates.copy_(state[_COUNT])
        for name, tensor in self.tensors.items():
            tensor.copy_(local_part(state[f"{PREFIX}{name}"], tensor))

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(weight, average) of each parameter: what this process holds of them."""
        for name, parameter in self._parameters.items():
            yield _local(parameter.detach()), _local(self.tensors[name])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _put_in(weight: torch.Tensor, average: torch.Tensor) -> torch.Tensor | None:
    """Puts the average where the weight was; gives the weight where it did not find room in the average's place."""
    own = weight.clone()
    weight.copy_(average)
    if own.dtype != average.dtype:
        return own
    average.copy_(own)
    return None


@torch.no_grad()
def _put_back(weight: torch.Tensor, average: torch.Tensor, own: torch.Tensor | None) -> None:
    if own is not None:
        weight.copy_(own)
        return
    kept = weight.clone()
    weight.copy_(average)
    average.copy_(kept)
