"""Two ways through the same rows, for ``throughput.py``: the plain loop, and this project's own parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.state import AcceleratorState

from benchmarks.bench import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    RECIPES,
    SUB_TALKER_WEIGHT,
    WEIGHT_DECAY,
    Bench,
    own_settings,
)
from benchmarks.flops import epoch_flops
from benchmarks.plain_loop import PlainLoop, freeze_original_layers
from benchmarks.random_base import to_batch
from finetuning.adapters import add_adapters
from finetuning.dataset import Batch, StepDataset, count_tokens, to_device
from finetuning.layer_utils import replace_and_add_layers
from finetuning.objective import TrainingObjective, compile_layers
from finetuning.optimizers import keep_matrices_in_bf16
from finetuning.prefix_cache import make_prefix_cache
from finetuning.prompt import AlignedIds
from finetuning.sampling import StepSampler
from finetuning.settings import Settings
from finetuning.stepping import Stepper
from finetuning.steps import MappedSteps
from finetuning.trainer import make_accelerator

#: What --precision means: (MIXED_PRECISION, WEIGHTS_PRECISION).
PRECISIONS = {"fp32": ("no", "fp32"), "bf16": ("bf16", "fp32"), "bf16-weights": ("bf16", "bf16")}
#: Settings of the recipe ``lora``.
LORA = {"lora_rank": 8}
#: Steps that the schedule is made for: more than are taken.
NUM_SCHEDULED_STEPS = 10_000


class Way(Protocol):
    """A model in training.

    Attributes:
        flops: that one pass over the rows needs.
    """

    flops: float

    def epoch(self, number: int) -> Padding:
        """Trains on every row once."""


@dataclass
class Padding:
    """Positions of some batches, and how many of them are real."""

    num_real: int = 0
    num_positions: int = 0

    def count(self, batch: Batch) -> None:
        self.num_real += int(batch["attention_mask"].sum())
        self.num_positions += batch["attention_mask"].numel()

    @property
    def share(self) -> float:
        return 1 - self.num_real / self.num_positions


def recipe_model(bench: Bench, recipe: str) -> Any:
    """A new model whose ``requires_grad`` says what the recipe trains; ``put_adapters`` does the rest."""
    layers = RECIPES.get(recipe, (0, 0, True))
    return replace_and_add_layers(bench.model(), *layers, verbose=False, with_adapters=recipe == "lora")


def put_adapters(bench: Bench, recipe: str, model: Any) -> None:
    """Of the recipe ``lora``, in place; as in a run, after the other weights have their precision."""
    if recipe == "lora":
        add_adapters(model, own_settings(bench, **LORA))


class PlainWay:
    """The plain loop over batches in random order; see ``plain_loop`` and the docstring of ``throughput``."""

    def __init__(self, bench: Bench, recipe: str, precision: str) -> None:
        self.bench, self.is_autocast = bench, precision == "bf16"
        model = recipe_model(bench, recipe)
        put_adapters(bench, recipe, model)
        self.flops = epoch_flops(model.talker, bench.rows)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.loop = PlainLoop(model, bench.reference_mel, SUB_TALKER_WEIGHT).train()  # from here on all weights train
        if recipe == "layers":
            freeze_original_layers(model)
        if recipe == "lora":
            model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
        if precision == "bf16-weights":
            self.loop.to(torch.bfloat16)
        self.trained = [parameter for parameter in self.loop.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def epoch(self, number: int) -> Padding:
        padding = Padding()
        for batch in self._batches(number):
            padding.count(batch)
            self._step(to_device(batch, self.bench.device))
        return padding

    def _batches(self, epoch: int) -> Iterator[Batch]:
        rows, size = self.bench.rows, self.bench.batch_size
        order = np.random.default_rng(epoch).permutation(len(rows))
        for start in range(0, len(order), size):
            yield to_batch([rows[index] for index in order[start : start + size]])

    def _step(self, batch: Batch) -> None:
        with self.bench.autocast(torch.bfloat16 if self.is_autocast else torch.float32):
            loss = self.loop(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Variant:
    """A form of our own way.

    Attributes:
        fields: settings that differ from the defaults.
        window_steps: of the sampler; 1 puts rows of any length together.
        objective_class: the objective, or one with a part done the plain way.
    """

    name: str = "ours"
    fields: dict[str, Any] = field(default_factory=dict)
    window_steps: int = StepSampler.window_steps
    objective_class: type[TrainingObjective] = TrainingObjective


class OurWay:
    """Sampler, loader, collation, objective and steps of a run, on rows that need no files; see ``build_run``."""

    def __init__(self, bench: Bench, recipe: str, precision: str, variant: Variant) -> None:
        mixed_precision, weights_precision = PRECISIONS[precision]
        precisions = {"mixed_precision": mixed_precision, "weights_precision": weights_precision}
        settings = own_settings(bench, **(precisions | variant.fields))
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps its precision for the life of a process
        accelerator = make_accelerator(settings, bench.device.type)
        model = recipe_model(bench, recipe)
        model.talker.model.text_embedding.requires_grad_(settings.train_text_embedding)
        vectors = bench.speaker_vectors(model)
        if mixed_precision == "bf16":
            keep_frozen_matrices_in_bf16(model)
        if weights_precision == "bf16":
            keep_matrices_in_bf16(model)
        put_adapters(bench, recipe, model)
        objective = variant.objective_class(model.talker, vectors, settings.gradient_checkpointing)
        if settings.compile:
            compile_layers(objective)
        self.steps = make_steps(bench.rows, settings, variant.window_steps)
        self.stepper = Stepper(settings, accelerator, objective, NUM_SCHEDULED_STEPS)
        self.stepper.objective.train()
        self.stepper.prefixes = make_prefix_cache(settings, objective, accelerator, self.steps)
        is_cached = settings.prefix_cache != "off"
        self.flops = epoch_flops(model.talker, bench.rows, settings.sub_talker_frame_fraction, is_cached)

    def epoch(self, number: int) -> Padding:
        padding = Padding()
        for step in self.steps.steps(number):
            for batch in step.batches:
                padding.count(batch)
            self.stepper.take(step.batches, *count_tokens(step.batches))
        return padding


def make_steps(rows: Sequence[AlignedIds], settings: Settings, window_steps: int) -> MappedSteps:
    """The steps of a run; see ``building.make_steps``."""
    lengths, max_frames = np.array([len(row.codes) for row in rows]), settings.max_frames_per_batch
    sampler = StepSampler(
        lengths,
        0 if max_frames else settings.batch_size,
        settings.gradient_accumulation_steps,
        seed=settings.seed,
        window_steps=window_steps,
        max_frames=max_frames,
    )
    encoded = EncodedRows(rows)
    fraction = settings.sub_talker_frame_fraction
    return MappedSteps(StepDataset(encoded, encoded), sampler, 0, settings.num_workers, fraction)


class EncodedRows:
    """Stands for a ``Manifest`` and its ``RowEncoder``: rows that need no reading and no tokenizer."""

    def __init__(self, rows: Sequence[AlignedIds]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"line": index, "speaker": None}

    def has(self, _: str) -> np.ndarray:
        return np.zeros(len(self), dtype=bool)

    def encode(self, row: dict[str, Any]) -> AlignedIds:
        return self._rows[row["line"]]

    def speaker_row(self, _: str | None) -> int:
        return 0

    def at_epoch(self, _: int) -> EncodedRows:
        return self


def keep_frozen_matrices_in_bf16(model: Any) -> None:
    """In place, as ``base_model.set_precision`` leaves those of a release, which stores all weights in bf16."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.ndim >= 2:
            parameter.data = parameter.data.bfloat16()
