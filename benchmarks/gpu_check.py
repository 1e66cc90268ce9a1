"""Checks and measures at the true size, on a GPU, what tests on a CPU cannot; random weights, nothing is downloaded.

python benchmarks/gpu_check.py                                        # the 1.7B on one GPU, both recipes
python benchmarks/gpu_check.py --size 0.6b --recipe layers            # a smaller GPU
python benchmarks/gpu_check.py --part recovery --folder /data         # out of memory, NaN, states, several GPUs only
python benchmarks/gpu_check.py --size tiny --device cpu --steps 3     # the script itself: seconds, no GPU

Prints a numbered list, ✓ passed, ✗ failed, – skipped, with the figures of this run. Exit code 2 when a check failed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    RECIPES,
    SUB_TALKER_WEIGHT,
    WEIGHT_DECAY,
    Bench,
    CheckFailed,
    Report,
    Skipped,
    relative,
    set_attention,
    why_no_flash_attention,
    within_limits,
)
from benchmarks.plain_loop import PlainLoop
from benchmarks.random_base import SIZES, to_batch
from benchmarks.resume_check import check_launches, check_recovery
from finetuning.attention import pack_attention
from finetuning.dataset import count_tokens
from finetuning.errors import UserError, run_main
from finetuning.layer_utils import optimizer_groups
from finetuning.objective import Batch, TrainingObjective, before_frames, step_loss
from finetuning.validation import to_device

#: Largest relative differences. With random weights the loss hardly depends on the hidden states (on the tiny model it
#: moves by 4e-4 when the sub-talker gets those of other frames), so the logits are compared as well: ‖a - b‖ / ‖b‖,
#: which is 0.65 then.
PLAIN_LOSS = 1e-5
SAME_LOSS, SAME_LOGITS = 1e-4, 1e-3
BF16_LOSS, BF16_LOGITS = 2e-2, 5e-2
ATTENTION_LOSS, ATTENTION_LOGITS = 1e-2, 5e-2

#: A new fp16 scaler starts at 65536 and halves until nothing overflows.
MAX_FP16_STEPS = 12


def main() -> None:
    arguments = parse_arguments()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 in convolutions too, as it does in matrix products
    bench = Bench(arguments)
    report = Report()
    print(bench, flush=True)
    recipes = RECIPES if arguments.recipe == "both" else [arguments.recipe]
    if arguments.part in ("all", "training"):
        check_numbers(report, bench)
        plain = measure_plain_loop(report, bench)
        for recipe in recipes:
            check_recipe(report, bench, recipe, plain)
    if arguments.part in ("all", "recovery"):
        for recipe in recipes:
            check_recovery(report, bench, recipe, arguments.folder)
        check_launches(report, bench, arguments.folder)
    print(report.summary())
    if report.num_failed:
        sys.exit(2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.7b")
    parser.add_argument("--recipe", choices=("both", *RECIPES), default="both")
    parser.add_argument("--part", choices=("all", "training", "recovery"), default="all", help="which checks")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step; 2-12 s each")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after as many untimed ones")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument(
        "--folder", type=Path, help="where to save; full training of the 1.7B takes about 25 GB (default: the system's)"
    )
    arguments = parser.parse_args()
    if arguments.folder and not arguments.folder.is_dir():
        raise UserError(f"--folder: {arguments.folder} is no folder; make it first")
    if min(arguments.batch_size, arguments.steps) < 1:
        parser.error("--batch-size and --steps start at 1")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device: no CUDA GPU here; `--size tiny --device cpu` runs the script itself")
    return arguments


# -------------------------------------------------------------------------------------------- numbers that must agree


@dataclass(frozen=True)
class Prediction:
    """What a model says about some rows: the mean loss, and all logits of both heads in the order of the rows."""

    loss: float
    logits: torch.Tensor


def check_numbers(report: Report, bench: Bench) -> None:
    """Builds the model and compares forward passes; no weight changes."""
    built = report.run(f"builds the {bench.size} model on {bench.device.type}", partial(BuiltModel.make, bench))
    if built is None:
        return
    model = built.model
    objective = bench.objective(model)
    report.run("fp32: the objective and the plain loop give one loss", partial(check_plain_loss, bench, model))
    report.run("fp32: rows alone give the padded batch's loss", partial(check_rows_alone, bench, objective))
    report.run("fp32: left padding gives the same loss", partial(check_left_padding, bench, objective))
    report.run("bf16 autocast gives the fp32 loss", partial(check_bf16, bench, objective))
    for attention in ("eager", "flash_attention_2"):
        check = partial(check_attention, bench, model, objective, attention)
        report.run(f"bf16: {attention} gives sdpa's loss", check)


@dataclass(frozen=True)
class BuiltModel:
    """A model and how long it took."""

    model: Any
    seconds: float

    @classmethod
    def make(cls, bench: Bench) -> BuiltModel:
        start = time.perf_counter()
        model = bench.model()
        bench.synchronize()
        return cls(model, time.perf_counter() - start)

    def __str__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        layers = sum(parameter.numel() for parameter in self.model.talker.model.layers.parameters())
        return f"{count / 1e6:,.1f} M weights, {layers / 1e6:,.1f} M in the talker's layers, {self.seconds:.1f} s"


def check_plain_loss(bench: Bench, model: Any) -> str:
    """Two implementations of one objective: only the model and the batch are the same."""
    batch = to_batch(bench.compared_rows)
    ours = predict(bench, bench.objective(model), [batch], torch.float32).loss
    with torch.no_grad():
        plain = PlainLoop(model, bench.reference_mel, SUB_TALKER_WEIGHT)(to_device(batch, bench.device)).item()
    return within_limits(loss=(relative(ours, plain), PLAIN_LOSS))


def check_rows_alone(bench: Bench, objective: TrainingObjective) -> str:
    padded = predict(bench, objective, [to_batch(bench.compared_rows)], torch.float32)
    alone = predict(bench, objective, [to_batch([row]) for row in bench.compared_rows], torch.float32)
    return compare(padded, alone, SAME_LOSS, SAME_LOGITS)


def check_left_padding(bench: Bench, objective: TrainingObjective) -> str:
    batches = [to_batch(bench.compared_rows, padding_side) for padding_side in ("left", "right")]
    left, right = (predict(bench, objective, [batch], torch.float32) for batch in batches)
    return compare(left, right, SAME_LOSS, SAME_LOGITS)


def check_bf16(bench: Bench, objective: TrainingObjective) -> str:
    batch = to_batch(bench.compared_rows)
    bf16, fp32 = (predict(bench, objective, [batch], dtype) for dtype in (torch.bfloat16, torch.float32))
    return compare(bf16, fp32, BF16_LOSS, BF16_LOGITS)


def check_attention(bench: Bench, model: Any, objective: TrainingObjective, attention: str) -> str:
    if attention == "flash_attention_2" and (reason := why_no_flash_attention(bench.device)):
        raise Skipped(reason)
    batch, predictions = to_batch(bench.compared_rows), {}
    try:
        for name in ("sdpa", attention):
            set_attention(model, name)
            pack_attention(model.talker.model.layers)
            predictions[name] = predict(bench, objective, [batch], torch.bfloat16)
    finally:
        set_attention(model, bench.attention)
        pack_attention(model.talker.model.layers)
    return compare(predictions[attention], predictions["sdpa"], ATTENTION_LOSS, ATTENTION_LOGITS)


@torch.no_grad()
def predict(bench: Bench, objective: TrainingObjective, batches: list[Batch], dtype: torch.dtype) -> Prediction:
    """The mean loss over all tokens of the batches, as training computes it, and the logits behind it."""
    loss, talker_logits, sub_talker_logits = 0.0, [], []
    for batch in (to_device(batch, bench.device) for batch in batches):
        with bench.autocast(dtype):
            loss += step_loss(objective(batch), *count_tokens(batches), SUB_TALKER_WEIGHT).item()
            hidden, embedded = objective.hidden_states(batch), objective.code_embeddings(batch["codes"])[:, :-1]
            talker_logits.append(objective.talker_logits(hidden[batch["label_places"]]))
            sub_talker_logits.append(objective.sub_talker_logits(hidden[before_frames(batch)], embedded))
    logits = torch.cat([part.float().flatten() for part in (*talker_logits, *sub_talker_logits)])
    return Prediction(loss, logits)


def compare(got: Prediction, expected: Prediction, loss_limit: float, logits_limit: float) -> str:
    logits = ((got.logits - expected.logits).norm() / expected.logits.norm()).item()
    return within_limits(loss=(relative(got.loss, expected.loss), loss_limit), logits=(logits, logits_limit))


# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Stepper:
    """Something that trains: a loss (with its weights) and an optimizer over what trains."""

    bench: Bench
    module: nn.Module
    loss_of: Callable[[Batch], torch.Tensor]
    optimizer: torch.optim.Optimizer

    def loss(self, batch: Batch, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        batch = to_device(batch, self.bench.device)
        with self.bench.autocast(dtype):
            return self.loss_of(batch)

    def step(self, batch: Batch) -> float:
        """One whole optimizer step in bf16 with fp32 masters; the loss before it."""
        loss = self.loss(batch)
        loss.backward()
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def fp16_step(self, batch: Batch, scaler: torch.amp.GradScaler) -> float:
        """The same in fp16; the scaler leaves out the optimizer where a gradient overflowed."""
        loss = self.loss(batch, torch.float16)
        scaler.scale(loss).backward()
        scaler.unscale_(self.optimizer)
        self._clip()
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()
        return loss.item()

    def _clip(self) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), MAX_GRAD_NORM)

    def __str__(self) -> str:
        total = sum(parameter.numel() for parameter in self.module.parameters())
        return f"{sum(p.numel() for p in self.trainable()) / 1e6:,.1f} M of {total / 1e6:,.1f} M weights train"

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


def recipe_stepper(bench: Bench, recipe: str) -> Stepper:
    """The project's training step, as finetuning.trainer takes it on one process."""
    _, objective = bench.recipe(recipe)
    optimizer = torch.optim.AdamW(optimizer_groups(objective, WEIGHT_DECAY), lr=LEARNING_RATE, fused=True)

    def loss_of(batch: Batch) -> torch.Tensor:
        return step_loss(objective(batch), *count_tokens([batch]), SUB_TALKER_WEIGHT)

    return Stepper(bench, objective, loss_of, optimizer)


def plain_stepper(bench: Bench) -> Stepper:
    loop = PlainLoop(bench.model(), bench.reference_mel, SUB_TALKER_WEIGHT)
    optimizer = torch.optim.AdamW(loop.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return Stepper(bench, loop, loop, optimizer)


def check_recipe(report: Report, bench: Bench, recipe: str, plain: Speed | None) -> None:
    """All that concerns one recipe, on one model; speed and memory last, on what the checks have warmed up."""
    stepper = report.run(f"{recipe}: builds", partial(recipe_stepper, bench, recipe))
    if stepper is None:
        return
    batch = bench.batches[0]
    report.run(f"{recipe}: bf16 backward with fp32 masters", partial(check_gradients, stepper, batch))
    report.run(f"{recipe}: fused AdamW steps", partial(check_fused_steps, stepper, batch))
    report.run(f"{recipe}: fp16 steps with GradScaler", partial(check_fp16_steps, stepper, batch))
    speed = report.run(f"{recipe}: speed", partial(measure, stepper, compare_with=plain))
    if speed is not None:
        report.run(f"{recipe}: peak memory", speed.memory)


def check_gradients(stepper: Stepper, batch: Batch) -> str:
    """Weights and gradients are fp32; every trainable weight gets a finite gradient, frozen ones get none."""
    loss = stepper.loss(batch)
    loss.backward()
    gradients = [parameter.grad for parameter in stepper.trainable()]
    frozen = [parameter for parameter in stepper.module.parameters() if not parameter.requires_grad]
    problems = {
        "weights not in fp32": sum(p.dtype != torch.float32 for p in stepper.module.parameters()),
        "trainable without a gradient": sum(gradient is None for gradient in gradients),
        "gradients not in fp32": sum(g is not None and g.dtype != torch.float32 for g in gradients),
        "gradients not finite": sum(g is not None and not g.isfinite().all().item() for g in gradients),
        "frozen with a gradient": sum(parameter.grad is not None for parameter in frozen),
    }
    norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]).item()
    stepper.optimizer.zero_grad()
    if any(problems.values()):
        raise CheckFailed(", ".join(f"{count} tensors: {name}" for name, count in problems.items() if count))
    counts = f"{len(gradients)} trainable and {len(frozen)} frozen tensors"
    return f"loss {loss.item():.4f}, gradient norm {norm:.3f}, {counts}"


def check_fused_steps(stepper: Stepper, batch: Batch) -> str:
    """Two steps move every trainable tensor. One is not enough: behind a zero output projection nothing moves yet."""
    before = [parameter.detach().cpu().clone() for parameter in stepper.trainable()]
    losses = [stepper.step(batch), stepper.step(batch), stepper.loss(batch).item()]
    pairs = list(zip(before, stepper.trainable(), strict=True))
    moved = sum(not torch.equal(old, new.detach().cpu()) for old, new in pairs)
    finite = all(new.isfinite().all().item() for _, new in pairs)
    figures = f"{moved} of {len(pairs)} tensors moved, loss {' → '.join(f'{loss:.4f}' for loss in losses)}"
    if moved < len(pairs) or not finite or not losses[-1] < losses[0]:
        raise CheckFailed(figures if finite else f"weights are not finite, {figures}")
    return figures


def check_fp16_steps(stepper: Stepper, batch: Batch) -> str:
    """The scaler finds a scale within a few steps, and two steps are taken at it."""
    if not stepper.bench.is_cuda:
        raise Skipped("needs CUDA")
    scaler = torch.amp.GradScaler(stepper.bench.device.type)
    taken = 0
    for _ in range(MAX_FP16_STEPS):
        scale = scaler.get_scale()
        loss = stepper.fp16_step(batch, scaler)
        taken += scaler.get_scale() >= scale
        if taken == 2:
            break
    finite = all(parameter.isfinite().all().item() for parameter in stepper.trainable())
    figures = f"{taken} steps taken at scale {scaler.get_scale():g}, loss {loss:.4f}"
    if taken < 2 or not finite or math.isnan(loss):
        raise CheckFailed(figures if finite else f"weights are not finite, {figures}")
    return figures


# -------------------------------------------------------------------------------------------------- speed and memory


@dataclass(frozen=True)
class Speed:
    """Figures of some timed steps.

    Attributes:
        frames_per_second: of each step; codec frames that were trained on, without padding.
        seconds: of each step.
        peak_bytes: allocated on the GPU at most; None on a CPU.
        plain: the plain loop on the same batches, to be compared with.
    """

    frames_per_second: list[float]
    seconds: list[float]
    peak_bytes: int | None
    plain: Speed | None

    def __str__(self) -> str:
        figures = f"{statistics.median(self.frames_per_second):,.0f} frames/s"
        if self.plain:
            pairs = zip(self.frames_per_second, self.plain.frames_per_second, strict=True)
            figures += f" = {statistics.median(ours / plain for ours, plain in pairs):.2f} x the plain loop"
        return f"{figures}, {statistics.median(self.seconds):.3f} s a step (medians of {len(self.seconds)} steps)"

    def memory(self) -> str:
        if self.peak_bytes is None:
            raise Skipped("needs CUDA")
        figures = f"{self.peak_bytes / 2**30:.2f} GiB"
        if self.plain and self.plain.peak_bytes:
            figures += f" = {self.peak_bytes / self.plain.peak_bytes:.2f} x the plain loop"
        return figures


def measure_plain_loop(report: Report, bench: Bench) -> Speed | None:
    speed = report.run("plain loop: speed", partial(measure_if_it_fits, bench))
    if speed is not None:
        report.run("plain loop: peak memory", speed.memory)
    return speed


def measure_if_it_fits(bench: Bench) -> Speed:
    """A GPU on which the plain loop does not fit is no failure of this project."""
    try:
        return measure(plain_stepper(bench))
    except torch.OutOfMemoryError:
        raise Skipped("the plain loop does not fit into this GPU's memory") from None


def measure(stepper: Stepper, compare_with: Speed | None = None) -> Speed:
    """Every batch once untimed, then every batch once timed, copying to the device included."""
    bench = stepper.bench
    for batch in bench.batches:
        stepper.step(batch)
    if bench.is_cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    seconds = [timed_step(stepper, batch) for batch in bench.batches]
    frames = [len(batch["codes"]) for batch in bench.batches]
    rates = [count / time_taken for count, time_taken in zip(frames, seconds, strict=True)]
    peak_bytes = torch.cuda.max_memory_allocated(bench.device) if bench.is_cuda else None
    return Speed(rates, seconds, peak_bytes, compare_with)


def timed_step(stepper: Stepper, batch: Batch) -> float:
    """Seconds of one step, from an idle device to an idle device."""
    stepper.bench.synchronize()
    start = time.perf_counter()
    loss = stepper.step(batch)
    stepper.bench.synchronize()
    if math.isnan(loss):
        raise CheckFailed("the loss became NaN")
    return time.perf_counter() - start


if __name__ == "__main__":
    run_main(main)
