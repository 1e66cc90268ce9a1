"""One optimizer step: micro-batches in, changed weights out, with all that may go wrong on the way.

The losses are means over all tokens of the step, so both denominators must be known before its first backward. The
gradients of several processes are synchronised in the last micro-batch only.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from finetuning.averaging import Average
from finetuning.codec import NUM_CODEBOOKS
from finetuning.console import say
from finetuning.dataset import Batch, count_tokens, split_batch, to_device
from finetuning.errors import UserError
from finetuning.objective import TrainingObjective, step_loss
from finetuning.optimizers import leaves_out_bad_steps, make_optimizer
from finetuning.prefix_cache import PrefixCache
from finetuning.settings import Settings
from finetuning.sharding import HostSums, accumulating, averaging, clip_gradients, is_sharded, prepare
from finetuning.stages import Stages

#: So often the micro-batch is halved when the GPU's memory does not suffice.
MAX_HALVINGS = 3
#: So many steps in a row without a usable gradient end the run.
MAX_SKIPPED_IN_A_ROW = 10


def make_scheduler(settings: Settings, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    """transformers' schedule of that name, with LR_MIN, LR_NUM_CYCLES, and a warm-up of at most a tenth of the run."""
    from transformers import get_scheduler

    warmup = min(settings.warmup_steps, num_steps // 10)
    if warmup < settings.warmup_steps:
        say(f"warm-up cut from {settings.warmup_steps} to {warmup} steps, a tenth of the run")
    name, extra = settings.lr_scheduler, {}
    if settings.lr_num_cycles:
        name, extra = "cosine_with_restarts", {"num_cycles": settings.lr_num_cycles}
    elif settings.lr_min or name == "cosine_with_min_lr":
        name, extra = "cosine_with_min_lr", {"min_lr": settings.lr_min}
    elif name == "warmup_stable_decay":
        extra = {"num_decay_steps": max(1, num_steps // 10)}
    return get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps, scheduler_specific_kwargs=extra
    )


class Stepper:
    """Takes optimizer steps on an objective.

    Args:
        objective: not yet prepared for several processes, on any device.
        num_steps: of the whole run, for the schedule.

    Attributes:
        objective, optimizer, scheduler: as they are used; the optimizer is torch's own.
        stages: what trains now.
        average: of the weights; None where EMA_DECAY is 0.
        prefixes: gives the batches what the frozen layers compute.
        num_parts: every micro-batch is cut in so many, because the GPU's memory did not suffice.
        host_sums: what the processes agree by.
        skips: steps whose gradients were not finite.
        learning_rate: of the last step.
    """

    def __init__(
        self, settings: Settings, accelerator: Accelerator, objective: TrainingObjective, num_steps: int
    ) -> None:
        self.settings, self.accelerator = settings, accelerator
        self.objective, self._prepared_optimizer = prepare(accelerator, objective, self._make_optimizer)
        self.optimizer = self._prepared_optimizer.optimizer
        self.scheduler = make_scheduler(settings, self.optimizer, num_steps)
        is_wrapped = is_sharded(self.objective) or self.objective is not self.module
        self.stages = Stages(settings, self.module, num_steps, freezes=not is_wrapped)
        self.average = Average(self.module, settings.ema_decay) if settings.ema_decay else None
        if self.average:
            say(f"EMA_DECAY={settings.ema_decay:g}: validation and all checkpoints take the average of the weights")
        self.prefixes: PrefixCache | None = None
        self.num_parts = 1
        self.learning_rate = 0.0
        self.skips = Skips(accelerator.device)
        self.host_sums = HostSums()
        self._scale: float | None = None  # of the fp16 scaler after the last step; reading it makes the host wait

    @property
    def module(self) -> TrainingObjective:
        """The objective without the wrapper that several processes need."""
        return self.accelerator.unwrap_model(self.objective)

    def _make_optimizer(self, objective: torch.nn.Module) -> torch.optim.Optimizer:
        rate = self.settings.scaled_learning_rate(self.accelerator.num_processes)
        return make_optimizer(self.settings, objective, rate)

    def take(self, batches: Sequence[Batch], num_talker: int, num_sub_talker: int) -> Sums:
        """One step: forward and backward of all micro-batches, clipping, update.

        Args:
            batches: this process's micro-batches; as many in every process.
            num_talker, num_sub_talker: labels of the step over all processes.

        Raises:
            UserError: the GPU's memory does not suffice for the smallest micro-batches either.
        """
        with self.stages.freezing():
            while (losses := self._try(batches, num_talker, num_sub_talker)) is None:
                self.halve("the step")
        self.stages.drop_gradients()
        gradient_norm = clip_gradients(self.accelerator, self.objective.parameters(), self.settings.max_grad_norm)
        is_bad = ~torch.isfinite(gradient_norm)
        self.learning_rate = self.scheduler.get_last_lr()[0]
        if self._update(is_bad):
            self.scheduler.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(is_bad)
        self.skips.note(is_bad & self._counts_as_bad(), lines_of(batches))
        counts = [losses.new_full((1,), count) for count in count_tokens(batches)]  # a copy would make the host wait
        sums = torch.cat([losses, *counts])
        return Sums(torch.where(is_bad, torch.zeros_like(sums), sums), gradient_norm)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the weights are their average, where there is one."""
        return self.average.in_place() if self.average else contextlib.nullcontext()

    def any_process(self, is_so: bool) -> bool:
        """Whether it is so in one of the processes; all of them must ask."""
        return bool(self.host_sums.of([is_so])[0])

    # ------------------------------------------------------------------------------------------ forward and backward

    def _try(self, batches: Sequence[Batch], num_talker: int, num_sub_talker: int) -> torch.Tensor | None:
        """(2,) summed losses of this process, its gradients accumulated; None where the memory did not suffice.

        All processes learn of it before the last backward, in which they synchronise; there it is too late.
        """
        *others, last = [part for batch in batches for part in split_batch(batch, self.num_parts)]
        shares = _Shares(self, num_talker, num_sub_talker)
        loss, is_out_of_memory = None, False
        try:
            with accumulating(self.objective):
                for batch in others:
                    self.accelerator.backward(shares.loss(batch))
                loss = shares.loss(last)
        except torch.OutOfMemoryError:
            is_out_of_memory = True
            self._check_can_agree()
        if self.any_process(is_out_of_memory):
            return None
        try:
            with averaging(self.objective):
                self.accelerator.backward(loss)
        except torch.OutOfMemoryError:
            if self.accelerator.num_processes > 1:
                raise self.out_of_memory() from None
            return None
        return torch.stack(shares.losses).sum(0)

    def halve(self, what: str) -> None:
        """Cuts every micro-batch in twice as many parts from now on.

        Args:
            what: is going to be repeated, for the message.

        Raises:
            UserError: that was done as often as it may be.
        """
        self.optimizer.zero_grad()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        in_frames = self.settings.max_frames_per_batch is not None  # of how many rows, only the batches know
        if self.num_parts == 2**MAX_HALVINGS or (not in_frames and self.settings.batch_size <= self.num_parts):
            raise self.out_of_memory()
        self.num_parts *= 2
        size, micro_batches = self._micro_batches()
        limit, name, alike = f"at most {size} rows", "BATCH_SIZE", "the same"
        if in_frames:
            limit, name, alike = f"about {size} frames", "MAX_FRAMES_PER_BATCH", "about the same"
        say(
            f"out of GPU memory: {what} is repeated with {limit} at a time, and the next steps are taken in "
            f"{micro_batches} micro-batches. {name}={size} GRADIENT_ACCUMULATION_STEPS={micro_batches} gives {alike}"
        )

    def _micro_batches(self) -> tuple[int, int]:
        """Rows of a micro-batch, or its frames where MAX_FRAMES_PER_BATCH decides, and micro-batches of a step."""
        size = self.settings.max_frames_per_batch or self.settings.batch_size
        return math.ceil(size / self.num_parts), self.settings.gradient_accumulation_steps * self.num_parts

    def _check_can_agree(self) -> None:
        if is_sharded(self.objective):  # the others are waiting for this one inside their forward
            raise self.out_of_memory()

    def out_of_memory(self) -> UserError:
        """What to say, and what can be set, when nothing helps."""
        size, micro_batches = self._micro_batches()
        if self.settings.max_frames_per_batch:
            unit, half = "frames", math.ceil(size / 2)
            smaller = f"MAX_FRAMES_PER_BATCH={half} with GRADIENT_ACCUMULATION_STEPS={2 * micro_batches}; "
        else:
            unit = "rows"
            smaller = "" if size == 1 else f"BATCH_SIZE=1 with GRADIENT_ACCUMULATION_STEPS={micro_batches * size}; "
        return UserError(
            f"the GPU's memory does not suffice for micro-batches of {size} {unit} ({micro_batches} a step). Set "
            f"{smaller}MEMORY_PROFILE=auto, or GRADIENT_CHECKPOINTING=true; MIXED_PRECISION=bf16; new layers instead "
            "of full fine-tuning (REPLACE_LAST_N_LAYERS=2 ADD_NEW_LAYERS=4 FREEZE_ORIGINAL_LAYERS=true); adapters "
            "(LORA_RANK=8); leave out the longest clips; or take a larger GPU, or several with FSDP"
        )

    # ---------------------------------------------------------------------------------------------------- the update

    def _update(self, is_bad: torch.Tensor) -> bool:
        """Whether the schedule goes on. A step with a bad gradient changes nothing.

        Where the optimizer can, the device decides that by itself; else the host waits for the flag in every step.
        """
        scaler = self.accelerator.scaler
        if scaler is None:
            if leaves_out_bad_steps(self.optimizer):
                self.optimizer.grad_scale, self.optimizer.found_inf = None, is_bad.float()
                self._step_optimizer()
            elif not is_bad.item():
                self._step_optimizer()
            return True
        before = scaler.get_scale() if self._scale is None else self._scale
        self._step_optimizer()  # which takes the scaler's step and updates it
        self._scale = scaler.get_scale()
        return self._scale >= before

    def _step_optimizer(self) -> None:
        try:
            self._prepared_optimizer.step()
        except torch.OutOfMemoryError:  # Adam's states are made in the first step
            raise self.out_of_memory() from None

    def _counts_as_bad(self) -> bool:
        """An fp16 scaler that is still finding its scale meets infinities by design; at a scale of 1 it is not that."""
        return self._scale is None or self._scale <= 1.0


class _Shares:
    """The micro-batches' shares of a step's loss, and their summed losses for the log."""

    def __init__(self, stepper: Stepper, num_talker: int, num_sub_talker: int) -> None:
        self.stepper, self.counts = stepper, (num_talker, num_sub_talker)
        self.losses: list[torch.Tensor] = []  # (2,) talker and sub-talker loss of each micro-batch

    def loss(self, batch: Batch) -> torch.Tensor:
        accelerator, weight = self.stepper.accelerator, self.stepper.settings.sub_talker_loss_weight
        if self.stepper.prefixes:
            batch = self.stepper.prefixes.attach(batch)
        batch = to_device(batch, accelerator.device)
        sums = self.stepper.objective(batch)
        losses = torch.stack([sums["talker_loss"], sums["sub_talker_loss"]]).detach() * batch["weight"]
        self.losses.append(losses.to(sum_dtype(accelerator.device)))
        # Gradients are averaged over processes; the loss is already a share of the whole step's mean.
        return step_loss(sums, *self.counts, weight) * batch["weight"] * accelerator.num_processes


def sum_dtype(device: torch.device) -> torch.dtype:
    """In which sums over many steps or batches are kept: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def lines_of(batches: Sequence[Batch]) -> list[int]:
    """The line numbers of the rows in some micro-batches."""
    return sorted({line for batch in batches if batch["weight"] > 0 for line in batch["lines"].tolist()})


# --------------------------------------------------------------------------------------------------------- figures


class Skips:
    """Steps that changed nothing because their gradients were not finite: counted on the device, read when logging.

    Asking the device after every step would make the host wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        #: (3,) int64: since it was last read; in a row until now; the most in a row since it was last read.
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._recent: deque[tuple[torch.Tensor, list[int]]] = deque(maxlen=MAX_SKIPPED_IN_A_ROW)

    def note(self, is_bad: torch.Tensor, lines: list[int]) -> None:
        number, in_a_row, most = self.counts
        in_a_row = torch.where(is_bad, in_a_row + 1, torch.zeros_like(in_a_row))
        self.counts = torch.stack([number + is_bad, in_a_row, torch.maximum(most, in_a_row)])
        self._recent.append((is_bad, lines))

    def read(self) -> tuple[int, int]:
        """(number, most in a row) since the last call."""
        number, in_a_row, most = self.counts.tolist()
        self.counts = torch.tensor([0, in_a_row, in_a_row], device=self.counts.device)
        return number, most

    def recent_lines(self) -> list[int]:
        """Lines of the rows of this process in the last skipped steps."""
        return sorted({line for is_bad, lines in self._recent if is_bad for line in lines})


class Sums(NamedTuple):
    """What a step adds to a ``Window``; the tensors stay on the device.

    Attributes:
        totals: (4,) talker loss, sub-talker loss, talker labels, sub-talker labels of this process; 0 if skipped.
        gradient_norm: () over all processes, before clipping.
    """

    totals: torch.Tensor
    gradient_norm: torch.Tensor


class Window:
    """Sums over some steps: of an epoch, or since the last logged line. They stay on the device until read."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.totals = torch.zeros(4, dtype=sum_dtype(accelerator.device), device=accelerator.device)
        self.gradient_norm = torch.tensor(math.nan, device=accelerator.device)
        self._num_steps, self._start, self._paused = 0, time.perf_counter(), 0.0
        self._labels_before = self.totals[3]  # sub-talker labels from before the clock was started

    def resume_from(self, totals: torch.Tensor, gradient_norm: torch.Tensor | None = None) -> None:
        """Goes on with the sums of a stopped run; the clock counts from here, and so do frames_per_second.

        Args:
            totals: (4,) of this process, see ``Sums``.
            gradient_norm: (), see ``Sums``.
        """
        self.totals = totals.to(self.totals)
        if gradient_norm is not None:
            self.gradient_norm = gradient_norm.to(self.totals.device)
        self._num_steps, self._start, self._paused = 0, time.perf_counter(), 0.0
        self._labels_before = self.totals[3]

    def add(self, sums: Sums) -> None:
        self.totals = self.totals + sums.totals
        self.gradient_norm = sums.gradient_norm
        self._num_steps += 1

    def pause(self, seconds: float) -> None:
        """Time that was not spent on stepping."""
        self._paused += seconds

    @property
    def seconds_per_step(self) -> float:
        return self._seconds / self._num_steps if self._num_steps else math.nan

    @property
    def _seconds(self) -> float:
        return max(time.perf_counter() - self._start - self._paused, 1e-9)

    def figures(self, sub_talker_weight: float) -> dict[str, float]:
        """Over all processes: loss, talker_loss, sub_talker_loss, grad_norm (of the last step, before clipping),
        frames_per_second (since the clock was started; NaN before a step). All processes must ask."""
        sums = torch.cat([self.totals, (self.totals[3] - self._labels_before)[None]])
        sums = self._accelerator.reduce(sums, reduction="sum").tolist()
        talker, sub_talker, num_talker, num_sub_talker, num_clocked = sums
        talker, sub_talker = talker / max(num_talker, 1), sub_talker / max(num_sub_talker, 1)
        return {
            "loss": talker + sub_talker_weight * sub_talker if num_talker else math.nan,
            "talker_loss": talker if num_talker else math.nan,
            "sub_talker_loss": sub_talker if num_talker else math.nan,
            "grad_norm": float(self.gradient_norm),
            "frames_per_second": num_clocked / (NUM_CODEBOOKS - 1) / self._seconds if self._num_steps else math.nan,
        }
