"""How much GPU memory a training step takes at its peak, at the true size, computed on a machine without a GPU.

    python benchmarks/peak_memory.py                                             # full, 8,000 frames a micro-batch
    python benchmarks/peak_memory.py --recipe layers --frames 2000 --micro-batches 4
    python benchmarks/peak_memory.py --optimizer adamw_8bit --weights bf16 --checkpointing --frames 2000
    python benchmarks/peak_memory.py --size tiny --real                          # fake and real tensors, side by side
    python benchmarks/peak_memory.py --table                                     # the README's, minutes

The project's own objective, its backward pass, clipping and the optimizer's step run on tensors that have shapes and
dtypes but no content (torch's FakeTensorMode). Every operation reports what it allocates, and the sum over all that is
alive is followed through two steps; the peak is that of the second, when the optimizer's states are there.

What it leaves out: the CUDA context (about 0.5 GB), the allocator's rounding and fragmentation, cuBLAS workspaces, and
what a kernel allocates for itself. What differs from a GPU: the sequence of operations is the CPU's (bf16 autocast
treats the same matrix products there; PyTorch's attention keeps the same tensors for the backward pass), and
the optimizer of ``--optimizer adamw_8bit``, which a GPU compiles, holds some matrices in fp32 for a moment here.

``--table`` computes frames/s as well, for a usual card of each size that would use UTILISATION of the matrix products
in its maker's data sheet, from the operations that ``flops.py`` counts and those that checkpointing repeats. Nobody has
measured that share either; the rate is proportional to it.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.bench import RECIPES, set_attention
from benchmarks.flops import epoch_flops, repeated_flops
from benchmarks.loops import LORA, keep_frozen_matrices_in_bf16
from benchmarks.random_base import SIZES, base_config, build_model, random_rows, to_batch
from finetuning.adapters import add_adapters
from finetuning.codec import FRAMES_PER_SECOND
from finetuning.dataset import Batch, count_tokens
from finetuning.layer_utils import replace_and_add_layers
from finetuning.memory import PROFILES, ROW_SECONDS, pick_for_memory
from finetuning.objective import TrainingObjective, step_loss
from finetuning.optimizers import keep_matrices_in_bf16, make_optimizer, needs_torchao
from finetuning.settings import Settings, load_settings

KINDS = ("weights", "gradients", "optimizer", "other")
OTHER = KINDS[-1]
LAYER_SETTINGS = ("replace_last_n_layers", "add_new_layers", "freeze_original_layers")
CPU = torch.device("cpu")
#: A usual card of each profile's size, its dense bf16 matrix products in 10^12 operations a second (data sheets), and
#: the share of them that is assumed.
CARDS = {"16gb": ("RTX 4080", 97), "24gb": ("RTX 4090", 165), "40gb": ("A100", 312), "80gb": ("H100", 989)}
UTILISATION = 0.4


# -------------------------------------------------------------------------------------------------------- counting


class LiveBytes(TorchDispatchMode):
    """Follows how many bytes of tensors are alive; tensors from before it are counted once they are given a kind.

    Attributes:
        bytes: kind -> alive now.
        peak: kind -> alive when the sum was highest.
        largest: the tensors alive then, as (bytes, text), if ``lists_largest``; that makes it many times slower.
    """

    def __init__(self, lists_largest: bool = False) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.largest: list[tuple[int, str]] = []
        self._lists_largest = lists_largest
        self._kinds: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._see(value, OTHER)
        return result

    def label(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Says what these tensors are."""
        for tensor in tensors:
            for part in inner_tensors(tensor):
                self._see(part, OTHER)
                key = id(part.untyped_storage())
                self.bytes[self._kinds[key]] -= self._sizes[key]
                self.bytes[kind] += self._sizes[key]
                self._kinds[key] = kind

    def begin(self) -> None:
        """Forgets the peak so far."""
        self.peak, self.largest = Counter(self.bytes), []

    def _see(self, tensor: torch.Tensor, kind: str) -> None:
        if type(tensor) is not torch.Tensor and hasattr(tensor, "__tensor_flatten__"):
            return  # a tensor made of tensors, which were seen themselves
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key], self._kinds[key] = storage.nbytes(), kind
        if self._lists_largest:
            self._names[key] = f"{tuple(tensor.shape)} {tensor.dtype}"
        self.bytes[kind] += storage.nbytes()
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        if self.bytes.total() > self.peak.total():
            self.peak = Counter(self.bytes)
            if self._lists_largest:
                self.largest = [(size, f"{self._names[at]} {self._kinds[at]}") for at, size in self._sizes.items()]

    def _forget(self, key: int) -> None:
        self.bytes[self._kinds.pop(key)] -= self._sizes.pop(key)
        del self._references[key]
        self._names.pop(key, None)


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor with 8-bit values is made of, or the tensor itself."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in inner_tensors(getattr(tensor, name))]


# ------------------------------------------------------------------------------------------------------- the steps


@dataclass(frozen=True)
class Case:
    """What is trained on what.

    Attributes:
        recipe: full, layers or lora; the frozen matrices of the last two are bf16, as the release stores them.
        settings: of the run; what matters here are precision, optimizer, checkpointing and the loss's weight.
        seconds: the rows of a micro-batch.
        micro_batches: of a step.
    """

    config: Mapping[str, Any]
    recipe: str
    settings: Settings
    seconds: tuple[float, ...]
    micro_batches: int = 1

    def batch(self) -> Batch:
        return to_batch(random_rows(self.config, len(self.seconds), seconds=self.seconds))


def count_peak(case: Case, is_real: bool = False, lists_largest: bool = False) -> LiveBytes:
    """The counter after two optimizer steps, its peak being that of the second.

    Args:
        is_real: compute with real tensors.
    """
    batch = case.batch()
    num_talker, num_sub_talker = (case.micro_batches * count for count in count_tokens([batch]))
    mode = nullcontext() if is_real else FakeTensorMode(allow_non_fake_inputs=True)
    with no_host_values(case.settings), dropout_as_on_a_gpu(), mode, LiveBytes(lists_largest) as live:
        objective = make_objective(case)
        live.label(objective.parameters(), "weights")
        label_gradients(objective, live)
        optimizer = make_optimizer(case.settings, objective, case.settings.learning_rate)
        batch = {name: tensor.clone() for name, tensor in batch.items()}
        for _ in range(2):
            live.begin()
            for _ in range(case.micro_batches):
                with autocast(case.settings):
                    sums = objective(batch)
                step_loss(sums, num_talker, num_sub_talker, case.settings.sub_talker_loss_weight).backward()
                del sums
            torch.nn.utils.clip_grad_norm_(objective.parameters(), case.settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            live.label(tensors_of(optimizer), "optimizer")
    return live


def make_objective(case: Case) -> TrainingObjective:
    """As ``building.build_run`` makes it of a base that is stored in bf16."""
    model, settings = changed_model(case.config, case.recipe, CPU), case.settings
    if settings.mixed_precision == "bf16":
        keep_frozen_matrices_in_bf16(model)
    if settings.weights_precision == "bf16":
        keep_matrices_in_bf16(model)
    put_adapters(case.recipe, model, settings)
    vectors = torch.zeros(1, case.config["talker_config"]["hidden_size"])
    return TrainingObjective(model.talker, vectors, settings.gradient_checkpointing).train()


def changed_model(config: Mapping[str, Any], recipe: str, device: torch.device) -> Any:
    """A new model whose ``requires_grad`` says what the recipe trains; ``put_adapters`` does the rest."""
    model = build_model(config, device)
    set_attention(model, "sdpa")
    layers = RECIPES.get(recipe, (0, 0, True))
    return replace_and_add_layers(model, *layers, verbose=False, with_adapters=recipe == "lora")


def put_adapters(recipe: str, model: Any, settings: Settings) -> None:
    """Of the recipe ``lora``, in place."""
    # They are made where they belong; a module of tensors without content cannot be moved.
    with patch.object(nn.Module, "to", lambda module, *_, **__: module):
        if recipe == "lora":
            add_adapters(model, settings)


def label_gradients(objective: nn.Module, live: LiveBytes) -> None:
    """Has every gradient counted as such as soon as it is there."""
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda one: live.label([one.grad], "gradients"))


def tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """All tensors that the optimizer keeps."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def autocast(settings: Settings) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=settings.mixed_precision == "bf16")


@contextmanager
def no_host_values(settings: Settings) -> Iterator[None]:
    """Inside, torchao's optimizer reads no number from a tensor, for there may be none in it."""
    if not needs_torchao(settings):
        yield
        return
    from torchao.optim.subclass_8bit import OptimState8bit

    from finetuning import small_adamw

    for signed in (True, False):  # it keeps the values of its 8 bits once it has computed them
        OptimState8bit.zeros((256,), signed, 256, "cpu")
    with patch.object(small_adamw.SmallAdamW, "num_updates", 1):
        yield


def dropout_as_on_a_gpu() -> Any:
    """Inside, dropout keeps a mask of one byte a value, as its kernel on a GPU does; on a CPU it would be four."""

    def forward(module: nn.Dropout, values: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(values, module.p, module.training)[0]

    return patch.object(nn.Dropout, "forward", forward)


class BaseOnPaper:
    """What ``finetuning.memory`` reads of a base, from a configuration alone: all weights stored in bf16."""

    new_languages = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.talker_config = config["talker_config"]
        model = build_model(config, torch.device("meta"))
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def weight_dtypes(self) -> dict[str, torch.dtype]:
        return dict.fromkeys(self._shapes, torch.bfloat16)


def case_settings(environment: Mapping[str, str] | None = None, /, **fields: Any) -> Settings:
    """Settings with these fields; nothing of the user's own.

    Args:
        environment: what a launcher sets.
    """
    return load_settings({"use_wandb": False} | fields, environment=dict(environment or {}))


# ------------------------------------------------------------------------------------------------------ the script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.7b")
    parser.add_argument("--recipe", choices=(*RECIPES, "lora"), default="full")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="MIXED_PRECISION")
    parser.add_argument("--weights", choices=("fp32", "bf16"), default="fp32", help="WEIGHTS_PRECISION")
    parser.add_argument("--optimizer", choices=("adamw", "adamw_8bit", "adafactor"), default="adamw")
    parser.add_argument("--checkpointing", action="store_true", help="GRADIENT_CHECKPOINTING")
    parser.add_argument("--frames", type=int, default=8000, help="codec frames of a micro-batch")
    parser.add_argument("--rows", type=int, help="rows that they are shared out to; default rows of 6 s")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--real", action="store_true", help="count real tensors as well, on this CPU")
    parser.add_argument("--table", action="store_true", help="what MEMORY_PROFILE picks for all recipes and cards")
    parser.add_argument("--largest", type=int, default=0, help="list so many of the largest tensors at the peak")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.table:
        print_table(base_config(arguments.size))
        return
    num_rows = arguments.rows or max(1, round(arguments.frames / (6 * FRAMES_PER_SECOND)))
    seconds = (arguments.frames / num_rows / FRAMES_PER_SECOND,) * num_rows
    settings = case_settings(
        **(LORA if arguments.recipe == "lora" else {}),
        mixed_precision=arguments.precision,
        weights_precision=arguments.weights,
        optimizer=arguments.optimizer,
        gradient_checkpointing=arguments.checkpointing,
    )
    case = Case(base_config(arguments.size), arguments.recipe, settings, seconds, arguments.micro_batches)
    for is_real in (False, True)[: 1 + arguments.real]:
        live = count_peak(case, is_real, lists_largest=arguments.largest > 0)
        print(f"{'real' if is_real else 'fake'}: {describe(live)}", flush=True)
        for size, name in sorted(live.largest, reverse=True)[: arguments.largest]:
            print(f"  {size / 1e6:10.1f} MB  {name}")


def print_table(config: Mapping[str, Any]) -> None:
    """Markdown: a line for each recipe and card, with the peak of the formula and that of the count."""
    base, counted = BaseOnPaper(config), {}
    print(
        "| recipe | card | micro-batch x accumulation | weights | moments | checkpointing | formula | counted | rate |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for recipe in (*RECIPES, "lora"):
        fields = LORA if recipe == "lora" else dict(zip(LAYER_SETTINGS, RECIPES[recipe], strict=True))
        for profile in PROFILES:
            picks = pick_for_memory(case_settings(memory_profile=profile, **fields), base)
            own = picks.settings
            size, accumulation = own.batch_size, own.gradient_accumulation_steps
            cells = (
                recipe,
                f"{size} x {accumulation}",
                own.weights_precision,
                own.optimizer,
                own.gradient_checkpointing,
            )
            if cells not in counted:
                # Gradients are there from the second micro-batch on; more of them add nothing.
                case = Case(config, recipe, own, (ROW_SECONDS,) * size, min(accumulation, 2))
                counted[cells] = count_peak(case).peak.total()
            figures = (f"{number / 1e9:.1f} GB" for number in (picks.peak_bytes, counted[cells]))
            rate = frames_per_second(config, recipe, own.gradient_checkpointing, 1e12 * CARDS[profile][1] * UTILISATION)
            shown = map(str, (recipe, profile, *cells[1:], *figures, f"{rate:,.0f} ({CARDS[profile][0]})"))
            print(f"| {' | '.join(shown)} |", flush=True)


def frames_per_second(config: Mapping[str, Any], recipe: str, is_checkpointed: bool, operations: float) -> float:
    """Of rows of ROW_SECONDS at so many operations a second."""
    model = changed_model(config, recipe, torch.device("meta"))
    put_adapters(recipe, model, case_settings(**LORA))
    rows = random_rows(config, 1, seconds=[ROW_SECONDS])
    needed = epoch_flops(model.talker, rows)
    if is_checkpointed:
        layers = [layer for layer in model.talker.model.layers if any(map(is_trained, layer.parameters()))]
        needed += repeated_flops(layers, rows)
    return len(rows[0].codes) * operations / needed


def is_trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def describe(live: LiveBytes) -> str:
    """The peak in GB, and its parts."""
    parts = ", ".join(f"{kind} {live.peak[kind] / 1e9:.3f}" for kind in KINDS)
    return f"{live.peak.total() / 1e9:.3f} GB at the peak ({parts})"


if __name__ == "__main__":
    main()
