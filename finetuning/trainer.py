"""The training loop.

An optimizer step is fetched whole before its first backward, because the loss is the mean over all tokens of the
step: over its micro-batches and over all processes. Accelerate therefore accumulates nothing itself (accumulation 1,
gradients synchronised at the last micro-batch), and the learning-rate scheduler is not prepared by it.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from finetuning.codec import NUM_CODEBOOKS
from finetuning.console import say
from finetuning.dataset import Batch, count_tokens, to_device
from finetuning.errors import Stopped, UserError
from finetuning.layer_utils import optimizer_groups
from finetuning.objective import TrainingObjective, step_loss
from finetuning.processes import MAX_WAIT
from finetuning.settings import Settings
from finetuning.steps import TrainingSteps

if TYPE_CHECKING:  # rooms behind this one; the loop only calls what it is handed
    from finetuning.checkpoint import Exporter
    from finetuning.tracking import Tracker
    from finetuning.validation import Validator


def make_accelerator(settings: Settings, device: str) -> Accelerator:
    """One process's Accelerator; see the module's docstring for what it must not do."""
    # The main process may encode for hours before the others have anything to do.
    patience = InitProcessGroupKwargs(timeout=MAX_WAIT)
    return Accelerator(
        mixed_precision=settings.mixed_precision,
        cpu=device == "cpu",
        gradient_accumulation_steps=1,
        kwargs_handlers=[patience],
    )


def total_steps(settings: Settings, train: TrainingSteps) -> int:
    """Optimizer steps of the run."""
    steps = settings.num_epochs * train.steps_per_epoch
    return min(steps, settings.max_steps) if settings.max_steps else steps


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


class Trainer:
    """Trains an objective and leaves checkpoints and logs in OUTPUT_DIR.

    Args:
        objective: not yet prepared by Accelerate, on any device.
        train: this process's steps.
        validator: None where no row was held out; then ``best/`` follows the mean training loss of an epoch.
    """

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        objective: TrainingObjective,
        train: TrainingSteps,
        validator: Validator | None,
        exporter: Exporter,
        tracker: Tracker,
    ) -> None:
        self.settings, self.accelerator, self.exporter, self.tracker = settings, accelerator, exporter, tracker
        self.train_steps, self.validator = train, validator
        self.num_steps = total_steps(settings, train)
        optimizer = torch.optim.AdamW(
            optimizer_groups(objective, settings.weight_decay),
            lr=settings.learning_rate,
            fused=accelerator.device.type == "cuda",
        )
        self.scheduler = make_scheduler(settings, optimizer, self.num_steps)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.step = self.epoch = 0
        self.best_loss = math.inf
        self._learning_rate = 0.0  # of the last step
        self._evaluated_at = self._stop_signal = self._agreed_stop = None
        self._last_train_loss: float | None = None
        self._window = _Window()

    # -------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Trains to the end.

        Raises:
            UserError: the loss became NaN or infinite.
            Stopped: SIGINT or SIGTERM arrived; ``last/`` was saved.
        """
        self.objective.train()
        with self._signals_noted():
            for number in range(self.settings.num_epochs):
                self.epoch, epoch = number, _Window()
                for batches in self.train_steps.steps(self.epoch):
                    if self._optimizer_step(batches, epoch):
                        self._after_step()
                    if self.step == self.num_steps:
                        break
                self._after_epoch(epoch.mean_loss(self.settings.sub_talker_loss_weight))
                if self.step == self.num_steps:
                    break

    @property
    def best_by(self) -> str:
        """What ``best/`` is the lowest of."""
        return "validation loss" if self.validator else "mean training loss of an epoch"

    def _optimizer_step(self, batches: list[Batch], epoch: _Window) -> bool:
        """Forward and backward of all micro-batches, then one clipped optimizer step; False where there is no row.

        A stream has steps without rows when the dataset is smaller than MAX_TRAIN_SAMPLES says.
        """
        num_talker, num_sub_talker = self._count_over_processes(batches)
        if not num_talker:
            return False
        weight = self.settings.sub_talker_loss_weight
        parts = []  # (2,) talker and sub-talker loss of each micro-batch
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.objective):
                batch = to_device(batch, self.accelerator.device)
                sums = self.objective(batch)
                loss = step_loss(sums, num_talker, num_sub_talker, weight) * batch["weight"]
                # DDP averages gradients over processes; the loss is already a share of the whole step's mean.
                self.accelerator.backward(loss * self.accelerator.num_processes)
                parts.append(torch.stack([sums["talker_loss"], sums["sub_talker_loss"]]).detach() * batch["weight"])
        totals = self._sum_over_processes(torch.stack(parts).sum(0))
        if not torch.isfinite(totals).all():
            self._stop_at_bad_loss(batches, parts)
        gradient_norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.settings.max_grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(gradient_norm):
            self._stop_at_bad_gradient(batches)
        self._learning_rate = self.scheduler.get_last_lr()[0]
        if self._step_optimizer():
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        for window in (self._window, epoch):
            window.add(totals, num_talker, num_sub_talker, gradient_norm)
        return True

    def _step_optimizer(self) -> bool:
        """Whether the step was taken: an fp16 scaler that is still finding its scale skips some, then lowers it.

        (``step_was_skipped`` of Accelerate's optimizer does not notice it with the fused AdamW.)
        """
        scaler = self.accelerator.scaler
        before = scaler.get_scale() if scaler else 0.0
        self.optimizer.step()
        return scaler is None or scaler.get_scale() >= before

    def _sum_over_processes(self, losses: torch.Tensor) -> torch.Tensor:
        """(2,) losses summed. Here the processes agree to stop, too: a signal may reach them at different steps."""
        noted = self._stop_signal
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([float(noted is not None)], device=losses.device)
            summed = self.accelerator.reduce(torch.cat([losses, flag]), reduction="sum")
            losses, any_noted = summed[:2], bool(summed[2] > 0)
            noted = (noted or signal.SIGTERM) if any_noted else None
        self._agreed_stop = noted
        return losses

    def _count_over_processes(self, batches: list[Batch]) -> tuple[int, int]:
        counts = count_tokens(batches)
        if self.accelerator.num_processes == 1:
            return counts
        counts = torch.tensor(counts, device=self.accelerator.device)
        return tuple(self.accelerator.reduce(counts, reduction="sum").tolist())

    def _stop_at_bad_loss(self, batches: list[Batch], parts: list[torch.Tensor]) -> None:
        bad = [batch for batch, part in zip(batches, parts, strict=True) if not torch.isfinite(part).all()]
        raise UserError(
            f"the loss of step {self.step + 1} is not a finite number; nothing was learnt from it. Its rows: "
            f"{self._describe_rows(bad)}. Lower LEARNING_RATE, or set MIXED_PRECISION=bf16 or no; if it happens at the "
            "first step, check these rows and the base's weights"
        )

    def _stop_at_bad_gradient(self, batches: list[Batch]) -> None:
        raise UserError(
            f"the gradient of step {self.step + 1} is not finite though its loss is; nothing was learnt from it. Its "
            f"rows: {self._describe_rows(batches)}. Lower LEARNING_RATE, or set MIXED_PRECISION=no"
        )

    def _describe_rows(self, batches: list[Batch]) -> str:
        """Line numbers and the beginnings of the texts, since a line of an encoded file says little by itself."""
        lines = sorted({line for batch in batches if batch["weight"] > 0 for line in batch["lines"].tolist()})
        if not lines:
            return "those of another process"
        text_of = self.train_steps.texts(lines)
        return ", ".join(f'line {line} "{text_of.get(line, "")[:40]}"' for line in lines)

    # ---------------------------------------------------------------------------------------- between the steps

    def _after_step(self) -> None:
        self.tracker.advance()
        settings = self.settings
        if self.step % settings.logging_steps == 0 or self.step == self.num_steps:
            self._log_training()
        names = [f"checkpoint-{self.step}"] if self.step % settings.save_steps == 0 else []
        if self.step % settings.eval_steps == 0 and self._evaluate():
            names.append("best")
        if self._agreed_stop is not None:
            self._save([*names, "last"])
            raise Stopped(self._agreed_stop)
        self._save(names)

    def _after_epoch(self, mean_loss: float) -> None:
        """Evaluation and ``last/``, at the end of every epoch and so of the run."""
        if self.validator is None:
            is_best = mean_loss < self.best_loss
            self.best_loss = min(mean_loss, self.best_loss)
        else:
            is_best = self._evaluate()
        names = ["last"] + (["best"] if is_best else [])
        self._save(names + ([f"epoch-{self.epoch}"] if self.settings.save_epochs else []))

    def _evaluate(self) -> bool:
        """Logs the validation figures; whether they are the best so far. Not twice at the same step."""
        if self.validator is None or self._evaluated_at == self.step:
            return False
        self._evaluated_at = self.step
        start = time.perf_counter()
        metrics = self.validator.evaluate(self.accelerator.unwrap_model(self.objective))
        self.tracker.log_validation(self.step, self.epoch, metrics)
        self._window.pause(time.perf_counter() - start)
        is_best = metrics["loss"] < self.best_loss
        self.best_loss = min(metrics["loss"], self.best_loss)
        return is_best

    def _save(self, names: list[str]) -> None:
        if not names:
            return
        start = time.perf_counter()
        if self.accelerator.is_main_process:
            best = None if math.isinf(self.best_loss) else self.best_loss
            state = {"step": self.step, "epoch": self.epoch, "best_loss": best, "train_loss": self._last_train_loss}
            state["best_by"] = self.best_by
            self.exporter.save(names, state)
        self.accelerator.wait_for_everyone()
        self._window.pause(time.perf_counter() - start)

    def _log_training(self) -> None:
        window, weight = self._window, self.settings.sub_talker_loss_weight
        figures = window.figures(weight)
        self._last_train_loss = figures["loss"]
        seconds_left = window.seconds_per_step() * (self.num_steps - self.step)
        record = {"step": self.step, "epoch": self.epoch, **figures, "learning_rate": self._learning_rate}
        self.tracker.log_training({**record, "seconds_left": seconds_left})
        self._window = _Window()

    @contextlib.contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM lets the step finish and saves; the second acts at once."""

        noted_at = 0.0

        def note(number: int, _: Any) -> None:
            nonlocal noted_at
            if self._stop_signal is None:
                self._stop_signal, noted_at = number, time.monotonic()
                say(f"signal {number}: finishing the step and saving last/; once more stops at once")
            elif time.monotonic() - noted_at > 1.0:  # launchers pass the terminal's Ctrl-C on a second time
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Window:
    """Sums over some steps: of an epoch, or since the last logged line. Losses stay on the device until read."""

    def __init__(self) -> None:
        self._totals: torch.Tensor | float = 0.0
        self._gradient_norm: torch.Tensor | float = 0.0
        self._num_talker = self._num_sub_talker = self._num_steps = 0
        self._start, self._paused = time.perf_counter(), 0.0

    def add(self, totals: torch.Tensor, num_talker: int, num_sub_talker: int, gradient_norm: Any) -> None:
        self._totals = self._totals + totals
        self._gradient_norm = gradient_norm
        self._num_talker += num_talker
        self._num_sub_talker += num_sub_talker
        self._num_steps += 1

    def pause(self, seconds: float) -> None:
        """Time that was not spent on stepping."""
        self._paused += seconds

    def _seconds(self) -> float:
        return max(time.perf_counter() - self._start - self._paused, 1e-9)

    def seconds_per_step(self) -> float:
        return self._seconds() / max(self._num_steps, 1)

    def _losses(self) -> tuple[float, float]:
        talker, sub_talker = self._totals.tolist()
        return talker / max(self._num_talker, 1), sub_talker / max(self._num_sub_talker, 1)

    def mean_loss(self, sub_talker_weight: float) -> float:
        talker, sub_talker = self._losses()
        return talker + sub_talker_weight * sub_talker

    def figures(self, sub_talker_weight: float) -> dict[str, float]:
        """loss, talker_loss, sub_talker_loss, grad_norm (of the last step, before clipping), frames_per_second."""
        talker, sub_talker = self._losses()
        return {
            "loss": talker + sub_talker_weight * sub_talker,
            "talker_loss": talker,
            "sub_talker_loss": sub_talker,
            "grad_norm": float(self._gradient_norm),
            "frames_per_second": self._num_sub_talker / (NUM_CODEBOOKS - 1) / self._seconds(),
        }
