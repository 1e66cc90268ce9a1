"""What the GPU checks and the speed comparison share: report, settings, model, and the rows that they work on."""

from __future__ import annotations

import argparse
import gc
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks.random_base import base_config, build_model, random_reference_mel, random_rows, to_batch
from finetuning.codec import FRAMES_PER_SECOND
from finetuning.layer_utils import replace_and_add_layers
from finetuning.objective import TrainingObjective
from finetuning.settings import Settings, load_settings

#: Recipe -> (REPLACE_LAST_N_LAYERS, ADD_NEW_LAYERS, FREEZE_ORIGINAL_LAYERS).
RECIPES = {"full": (0, 0, False), "layers": (2, 4, True)}

#: The defaults of finetuning.settings.
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM, SUB_TALKER_WEIGHT = 2e-5, 0.01, 1.0, 0.3

#: Rows of different lengths that the numbers are compared on.
NUM_COMPARED_ROWS = 4

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------- the report


class CheckFailed(Exception):
    """A figure is out of its limits; the message holds the figures."""


class Skipped(Exception):
    """This machine cannot run the check; the message says why."""


class Report:
    """Runs checks one by one and prints a numbered line for each; a check that breaks does not stop the others."""

    def __init__(self) -> None:
        self.num_passed = self.num_failed = self.num_skipped = 0

    def run(self, title: str, check: Callable[[], T]) -> T | None:
        """The check's result, whose text is its figures; None when it failed or was skipped."""
        result = None
        try:
            result = check()
            self.num_passed += 1
            line = f"✓ {title}: {result}"
        except Skipped as reason:
            self.num_skipped += 1
            line = f"– skipped: {reason} ({title})"
        except CheckFailed as figures:
            self.num_failed += 1
            line = f"✗ {title}: {figures}"
        except torch.OutOfMemoryError:
            self.num_failed += 1
            line = f"✗ {title}: out of memory; try a smaller --batch-size, --recipe layers or --size 0.6b"
        except Exception as error:  # a broken check is a finding too, and the GPU hour goes on
            self.num_failed += 1
            traceback.print_exc()
            line = f"✗ {title}: {type(error).__name__}: {error}"
        print(f"{self.num_passed + self.num_failed + self.num_skipped:>2}. {line}", flush=True)
        free_unused_memory()
        return result

    def summary(self) -> str:
        return f"{self.num_passed} passed, {self.num_failed} failed, {self.num_skipped} skipped"


def free_unused_memory() -> None:
    """Gives back what a finished check held, so that the next one starts from the same memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------- what is worked on


class Bench:
    """The size, the device and the rows that all checks share.

    Args:
        seconds: the lengths of the rows; default uniform, see ``random_rows``.
    """

    def __init__(self, arguments: argparse.Namespace, seconds: Sequence[float] | None = None) -> None:
        self.size, self.batch_size = arguments.size, arguments.batch_size
        self.device = torch.device(arguments.device)
        self.config = base_config(self.size)
        self.rows = random_rows(self.config, arguments.steps * self.batch_size, seconds=seconds)
        if self.is_cuda and self.device.index is not None:
            torch.cuda.set_device(self.device)  # where Accelerate trains
        starts = range(0, len(self.rows), self.batch_size)
        self.batches = [to_batch(self.rows[at : at + self.batch_size]) for at in starts]
        self.compared_rows = random_rows(self.config, NUM_COMPARED_ROWS, seed=1)
        self.reference_mel = random_reference_mel(self.device)
        self.attention = "sdpa" if why_no_flash_attention(self.device) else "flash_attention_2"

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.is_cuda else f"CPU, {torch.get_num_threads()} threads"
        seconds = sum(len(row.codes) for row in self.rows) / FRAMES_PER_SECOND / len(self.rows)
        return (
            f"Qwen3-TTS {self.size}, random weights, on {name}; torch {torch.__version__}; attention {self.attention}\n"
            f"{len(self.batches)} timed steps of {self.batch_size} rows, {seconds:.1f} s of speech a row on average"
        )

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def model(self) -> Any:
        """A new model with the bench's attention; always the same weights."""
        model = build_model(self.config, self.device)
        set_attention(model, self.attention)
        return model

    def objective(self, model: Any) -> TrainingObjective:
        """The project's objective, with the reference's vector as its one speaker."""
        return TrainingObjective(model.talker, self.speaker_vectors(model)).train()

    @torch.no_grad()
    def speaker_vectors(self, model: Any) -> torch.Tensor:
        """(1, H), of the reference."""
        return model.speaker_encoder(self.reference_mel)

    def recipe(self, name: str) -> tuple[Any, TrainingObjective]:
        """A new model with its layers changed, and its objective."""
        model = self.model()
        objective = self.objective(model)
        replaced, added, frozen = RECIPES[name]
        replace_and_add_layers(model, replaced, added, frozen, verbose=False)
        return model, objective

    def autocast(self, dtype: torch.dtype) -> torch.autocast:
        """Autocast to bf16 or fp16; float32 switches it off."""
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


def own_settings(bench: Bench, **fields: Any) -> Settings:
    """Settings of a step on the bench's rows; nothing of the user's own."""
    own = {
        "device": bench.device.type,
        "mixed_precision": "bf16",
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 0,
    }
    if "max_frames_per_batch" not in fields:
        own["batch_size"] = bench.batch_size
    with tempfile.NamedTemporaryFile(suffix=".env") as empty:
        return load_settings(own | fields, environment={"ENV_FILE": empty.name})


def set_attention(model: Any, name: str) -> None:
    """Talker and sub-talker; on the whole model transformers' own call trips over the speaker encoder's config."""
    model.talker.set_attn_implementation(name)
    assert {name} == {module.config._attn_implementation for module in model.talker.modules() if is_attention(module)}


def is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def why_no_flash_attention(device: torch.device) -> str | None:
    """Why FlashAttention 2 cannot run here; None where it can."""
    from transformers.utils import is_flash_attn_2_available

    if device.type != "cuda":
        return "needs CUDA"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "needs an Ampere or newer GPU"
    return None if is_flash_attn_2_available() else "flash-attn is not installed"


# ---------------------------------------------------------------------------------------------------------- limits


def relative(got: float, expected: float) -> float:
    return abs(got - expected) / abs(expected)


def within_limits(**differences: tuple[float, float]) -> str:
    """Figures as text, from name = (relative difference, limit); NaN is out of every limit."""
    figures = ", ".join(f"{name} off by {value:.1e} (limit {at:.0e})" for name, (value, at) in differences.items())
    if not all(value <= limit for value, limit in differences.values()):
        raise CheckFailed(figures)
    return figures
