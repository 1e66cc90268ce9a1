"""The training loop: epochs of steps, and what happens between them.

A step is fetched whole before its first backward (see ``stepping``). Accelerate accumulates nothing itself
(accumulation 1, gradients synchronised at the last micro-batch), and the learning-rate scheduler is not prepared by it.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from finetuning.choosing import Chooser
from finetuning.console import say
from finetuning.dataset import SkippedRow, Step, count_tokens
from finetuning.errors import Stopped, UserError
from finetuning.manifest import MAX_BAD_SHARE
from finetuning.processes import MAX_WAIT
from finetuning.progress import Best, Progress
from finetuning.sampling import Part, merged
from finetuning.settings import Settings
from finetuning.signals import StopRequest
from finetuning.stepping import MAX_SKIPPED_IN_A_ROW, Stepper, Window
from finetuning.steps import TrainingSteps

if TYPE_CHECKING:  # rooms behind this one; the loop only calls what it is handed
    from finetuning.samples import Sampled, Sampler
    from finetuning.saving import Saved, Saver
    from finetuning.tracking import Tracker
    from finetuning.validation import Validator

#: So many unreadable rows of an epoch are left out without a question, whatever share of it they are, but never all.
MAX_UNREADABLE_ROWS = 10


def make_accelerator(settings: Settings, device: str) -> Accelerator:
    """One process's Accelerator; see the module's docstring for what it must not do."""
    # The main process may encode or save for hours before the others have anything to do.
    patience = InitProcessGroupKwargs(timeout=MAX_WAIT)
    # Gradients lie in the buffers in which they travel, not beside them; the only buffers never change.
    leanness = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    return Accelerator(
        mixed_precision=settings.mixed_precision,
        cpu=device == "cpu",
        gradient_accumulation_steps=1,
        kwargs_handlers=[patience, leanness],
    )


class Trainer:
    """Trains an objective and leaves checkpoints and logs in OUTPUT_DIR.

    Args:
        train: this process's steps.
        validator: None where no row was held out.
        num_steps: of the whole run; see ``total_steps``.
        sampler: None where the model does not speak on its way.

    Attributes:
        chooser: says which evaluation is the best.
        progress, log_window, epoch_window: where the run stands; ``Saver.restore`` puts saved ones in their place.
    """

    def __init__(
        self,
        settings: Settings,
        stepper: Stepper,
        train: TrainingSteps,
        validator: Validator | None,
        saver: Saver,
        tracker: Tracker,
        num_steps: int,
        sampler: Sampler | None = None,
    ) -> None:
        self.settings, self.stepper, self.train_steps = settings, stepper, train
        self.validator, self.saver, self.tracker, self.num_steps = validator, saver, tracker, num_steps
        self.sampler = sampler
        self.accelerator = stepper.accelerator
        self.chooser = Chooser(settings, validator is not None, sampler.yardsticks if sampler else {})
        self.progress = Progress(best_metric=settings.best_metric)
        self.log_window, self.epoch_window = Window(self.accelerator), Window(self.accelerator)
        self._stop_request = StopRequest()
        self._saved_at = time.monotonic()
        self._is_save_due = False
        self._unreadable = UnreadableRows(train.num_rows)

    # -------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Trains to the end.

        Raises:
            UserError: the gradients stay NaN or infinite, memory or disk do not suffice, too many rows are unreadable.
            Stopped: SIGINT or SIGTERM arrived; ``last/`` and the state were saved.
        """
        self.stepper.objective.train()
        self._recall_skipped_rows()
        with self._stop_request.listening():
            self._settle()  # what a stopped run still had to do
            while not self.is_over:
                self._train_epoch()

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to train."""
        return self.progress.is_over(self.settings, self.num_steps)

    @property
    def has_no_step_left(self) -> bool:
        return self.progress.has_no_step_left(self.settings, self.num_steps)

    def _train_epoch(self) -> None:
        progress = self.progress
        if not self.has_no_step_left:  # else only the end of the run is left
            for fetched in self.train_steps.steps(progress.epoch, progress.done):
                if self._take_step(fetched):
                    self._settle()
                if self.has_no_step_left:
                    break
        self._end_epoch()

    def _take_step(self, fetched: Step) -> bool:
        """False where there is no row: a stream has such steps when it is shorter than MAX_TRAIN_SAMPLES says."""
        num_talker, num_sub_talker, num_skipped = self._agree(fetched)
        progress = self.progress
        progress.done = tuple(merged([*progress.done, Part(self.train_steps.geometry, 1)]))
        progress.num_fetched += 1
        if num_skipped:
            self._tell_skipped_rows(fetched)
        if not num_talker:
            return False
        self.stepper.stages.enter(progress.step + 1)
        sums = self.stepper.take(fetched.batches, num_talker, num_sub_talker)
        progress.step += 1
        progress.is_settled = False
        self.tracker.advance()
        self.log_window.add(sums)
        self.epoch_window.add(sums)
        return True

    def _agree(self, fetched: Step) -> tuple[int, int, int]:
        """Labels (of both kinds) and skipped rows of the step over all processes.

        Here they agree to stop or to save, too, before the step begins.
        """
        is_late = bool(self.settings.save_minutes) and (
            time.monotonic() - self._saved_at >= 60 * self.settings.save_minutes
        )
        is_save_due = is_late and self.accelerator.is_main_process
        counts = [*count_tokens(fetched.batches), len(fetched.skipped)]
        values = self.stepper.host_sums.of([*counts, self._stop_request.is_made, is_save_due])
        num_talker, num_sub_talker, num_skipped, num_stopped, self._is_save_due = values
        if num_stopped:
            self._save_and_stop()
        return num_talker, num_sub_talker, num_skipped

    # ---------------------------------------------------------------------------------------- between the steps

    def _settle(self) -> None:
        """Logging, samples, evaluation, saving after a step. A stop comes first; then they wait for the next start."""
        progress, settings = self.progress, self.settings
        if progress.is_settled:
            return
        logs = progress.step % settings.logging_steps == 0 or self.has_no_step_left
        saves, evaluates = progress.step % settings.save_steps == 0, progress.step % settings.eval_steps == 0
        samples = self._samples_in_step(evaluates)
        # Several processes ask each other only where there is something to wait for.
        if logs or saves or evaluates or samples or self._is_save_due or self.accelerator.num_processes == 1:
            self._stop_if_asked()
        # First, as a stop may cut them off: then nothing must have been logged that the next start would log again.
        sampled = self._sample() if samples else None
        figures = self._agreed(self._evaluate() if evaluates else None, sampled) if evaluates or samples else None
        best = self.chooser.consider(progress, figures)
        if logs or self.has_no_step_left:
            self._log_training()
        self._log_validation(figures, best, sampled)
        progress.is_settled = True
        names = [f"checkpoint-{progress.step}"] * saves + ["last"] * bool(self._is_save_due) + ["best"] * bool(best)
        if names:
            self._save(names, with_state=saves or bool(self._is_save_due), best=best)

    def _end_epoch(self) -> None:
        """Evaluation and ``last/``, at the end of every epoch and so of the run, whose state is kept as well."""
        self._stop_if_asked()
        progress = self.progress
        mean_loss = self.epoch_window.figures(self.settings.sub_talker_loss_weight)["loss"]
        sampled = self._sample() if self._samples_at_end_of_epoch() else None
        metrics = self._agreed(self._evaluate(), sampled)
        figures = (metrics or {}) | {"loss": mean_loss} if self.chooser.follows_training else metrics
        was_last_step = self.has_no_step_left
        best = self.chooser.consider(progress, figures)
        if self.has_no_step_left and not was_last_step and progress.step % self.settings.logging_steps:
            self._log_training()
        self._log_validation(metrics, best, sampled)
        of_epoch = [f"{self.settings.epoch_folder}-{progress.epoch}"] * self.settings.save_epochs
        names = ["last", *of_epoch] + ["best"] * bool(best)
        epoch, progress.ended_at = progress.epoch, progress.step
        if progress.is_out_of_patience(self.settings) and progress.step < self.num_steps:
            say(self.chooser.say_stop(progress))
        if not self.train_steps.num_steps(epoch, progress.done):
            progress.epoch, progress.done = epoch + 1, ()
            self.epoch_window = Window(self.accelerator)
            self._unreadable.begin_epoch()
        if self.is_over:  # before the state that says so: whoever is killed in between draws them again
            with self._unclocked():
                self.tracker.draw_plots()
        saved = self._save(names, with_state=self.is_over, best=best, epoch=epoch)
        # With last/ but without its state the run is complete all the same; only prolonging it begins further back.
        if self.is_over and not saved.checkpoints:
            raise UserError(
                f"OUTPUT_DIR: the end of the run could not be saved in {self.settings.output_dir}; free some space and "
                "start it again: it goes on from the newest state"
            )

    def _evaluate(self) -> dict[str, Any] | None:
        """The validation figures; None where there are none or this step has had them.

        A stop cuts it off, and the next start evaluates again; several processes finish it first, since they could
        not agree between its batches.

        Raises:
            Stopped: see ``run``.
        """
        progress = self.progress
        if self.validator is None or progress.evaluated_at == progress.step:
            return None
        with self._unclocked():
            metrics = self._validate()
        if metrics is None:
            self._save_and_stop()
        progress.evaluated_at = progress.step
        return metrics

    def _validate(self) -> dict[str, Any] | None:
        """In smaller batches where the memory does not suffice, like the steps; None when it is to stop."""
        is_alone = self.accelerator.num_processes == 1
        while True:
            try:
                with self.stepper.averaged():
                    return self.validator.evaluate(
                        self.stepper.module, self.stepper.num_parts, lambda: is_alone and self._stop_request.is_made
                    )
            except torch.OutOfMemoryError:
                if self.accelerator.num_processes > 1:  # the others are waiting for this one's figures
                    raise self.stepper.out_of_memory() from None
            self.stepper.halve("the validation")

    def _samples_in_step(self, evaluates: bool) -> bool:
        """Whether the model speaks now, before the epoch may end. Its figures stand in the record of an evaluation of
        the same step, which may be that of the epoch's end."""
        progress = self.progress
        if self.sampler is None or not (self.sampler.is_due(progress.step) or progress.step == self.num_steps):
            return False
        return evaluates or self.validator is None or not self._is_epoch_over

    def _samples_at_end_of_epoch(self) -> bool:
        progress = self.progress
        if self.sampler is None or progress.sampled_at == progress.step:
            return False
        is_last = self._is_epoch_over and progress.epoch + 1 >= self.settings.num_epochs
        return self.sampler.is_due(progress.step) or self.has_no_step_left or is_last

    @property
    def _is_epoch_over(self) -> bool:
        progress = self.progress
        return progress.step == self.num_steps or not self.train_steps.num_steps(progress.epoch, progress.done)

    def _sample(self) -> Sampled:
        """What the model says, and the figures of it. A stop cuts it off, and the next start begins it again.

        Raises:
            Stopped: see ``run``.
        """
        check = self._stop_request.check
        with self._unclocked():
            spoken = self.sampler.speak(self.stepper.averaged, check)
        if self.stepper.any_process(spoken is None):
            self._save_and_stop()
        with self._unclocked():
            sampled = self.sampler.keep(self.progress.step, spoken, check)
        if sampled is None:
            self._save_and_stop()
        return sampled

    def _agreed(self, metrics: dict[str, Any] | None, sampled: Sampled | None) -> dict[str, Any] | None:
        """The figures of ``_evaluate`` and of ``_sample``; those of the main process, by which all of them choose."""
        if sampled is not None:  # no stop follows: what was said is going to be logged
            self.progress.sampled_at = self.progress.step
        figures = (metrics or {}) | (sampled.figures if sampled else {}) or None
        if self.accelerator.num_processes == 1:
            return figures
        return broadcast_object_list([figures])[0]

    def _log_validation(self, metrics: dict[str, Any] | None, best: Best | None, sampled: Sampled | None) -> None:
        """Logs the figures of ``_evaluate`` and of ``_sample`` in one record."""
        with self._unclocked():
            if metrics:
                told = self.chooser.best_text if best else None
                self.tracker.log_validation(self.progress.step, self.progress.epoch, metrics, told)
            if sampled and sampled.samples:
                self.tracker.log_samples(self.progress.step, sampled)

    def _save(self, names: list[str], with_state: bool, best: Best | None = None, epoch: int | None = None) -> Saved:
        """What worked of it; a full disk does not end the run.

        Args:
            names: of checkpoints, in the order in which they are written; best/ last, so that it is the one before
                wherever not all of them could be written.
            best: of best/, where it is among them.
        """
        progress = self.progress
        best_before = progress.best
        if "best" in names:
            progress.best = best
        with self._unclocked():
            saved = self.saver.save(self, names, with_state, progress.epoch if epoch is None else epoch)
        if not saved.checkpoints:
            progress.best = best_before  # that of the best/ which is still there
        if with_state:
            self._saved_at = time.monotonic()
        return saved

    def _log_training(self) -> None:
        figures = self.log_window.figures(self.settings.sub_talker_loss_weight)
        num_skipped, in_a_row = self.stepper.skips.read()
        self.progress.train_loss = figures["loss"] if math.isfinite(figures["loss"]) else None
        record = {"step": self.progress.step, "epoch": self.progress.epoch, **figures}
        record |= {"learning_rate": self.stepper.learning_rate, "skipped_steps": num_skipped}
        seconds_left = self.log_window.seconds_per_step * (self.num_steps - self.progress.step)
        self.tracker.log_training({**record, "seconds_left": seconds_left})
        self.log_window = Window(self.accelerator)
        if in_a_row >= min(MAX_SKIPPED_IN_A_ROW, self.num_steps):
            raise self._bad_gradients(in_a_row)
        if num_skipped:
            say(f"{num_skipped} steps were skipped: their gradients were not finite")

    def _bad_gradients(self, in_a_row: int) -> UserError:
        lines = self.stepper.skips.recent_lines()
        text_of = self.train_steps.texts(lines)
        shown = [f'line {line} "{text_of.get(line, "")[:40]}"' for line in lines[:8]]
        return UserError(
            f"the gradients of {in_a_row} steps in a row, up to step {self.progress.step}, were not finite; nothing "
            f"was learnt from them. Rows of the last of them: {', '.join(shown) or 'those of another process'}. Lower "
            "LEARNING_RATE, or set MIXED_PRECISION=bf16 or no; if it happens from the first step on, check these rows "
            "and the base's weights"
        )

    def _tell_skipped_rows(self, fetched: Step) -> None:
        """Of all processes; the main one lists them."""
        skipped = gather_object(fetched.skipped) if self.accelerator.num_processes > 1 else fetched.skipped
        progress = self.progress
        for row in self._unreadable.add(skipped):
            self.tracker.log_skipped_row(progress.step + 1, row)
        progress.num_skipped_rows = max(progress.num_skipped_rows, self._unreadable.count)
        self._unreadable.check(self.settings, progress.epoch)

    def _recall_skipped_rows(self) -> None:
        """Those of the run that is resumed, from its log."""
        if not self.progress.num_skipped_rows:
            return
        listed = [self.tracker.skipped_rows() if self.accelerator.is_main_process else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(listed)
        epoch_begins = self.progress.ended_at or 0
        self._unreadable.add([row for step, row in listed[0] if step <= epoch_begins])
        self._unreadable.begin_epoch()
        self._unreadable.add([row for step, row in listed[0] if step > epoch_begins])

    @contextlib.contextmanager
    def _unclocked(self) -> Iterator[None]:
        """Time that is not spent on stepping does not count in frames a second."""
        start = time.perf_counter()
        yield
        self.log_window.pause(time.perf_counter() - start)

    # -------------------------------------------------------------------------------------------------- signals

    def _stop_if_asked(self) -> None:
        if self.stepper.any_process(self._stop_request.is_made):
            self._save_and_stop()

    def _save_and_stop(self) -> NoReturn:
        number = self._stop_request.number or signal.SIGTERM  # it may have reached another process only
        if not all(self._save(["last"], with_state=True)):
            raise UserError(
                f"OUTPUT_DIR: stopped by signal {int(number)}, but {self.settings.output_dir} could not be written; "
                "the checkpoints before it are whole"
            )
        raise Stopped(number)


class UnreadableRows:
    """Rows that could not be read while training, of all processes; too many of an epoch end the run.

    Args:
        num_rows: of an epoch.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._lines: set[int] = set()
        self._of_epoch: list[SkippedRow] = []

    @property
    def count(self) -> int:
        """Rows so far, each once; of those whose line is not known, the ones of this epoch."""
        return len(self._lines) + sum(row.line == 0 for row in self._of_epoch)

    def begin_epoch(self) -> None:
        self._of_epoch = []

    def add(self, rows: Sequence[SkippedRow]) -> list[SkippedRow]:
        """Those that are new in this epoch: a clip may come more than once (SPEAKER_BALANCE)."""
        known = {row.line for row in self._of_epoch if row.line}
        new = []
        for row in rows:
            if row.line not in known:
                new.append(row)
                known |= {row.line} - {0}
        self._of_epoch += new
        self._lines |= known
        return new

    def check(self, settings: Settings, epoch: int) -> None:
        """
        Raises:
            UserError: more than a tenth of the epoch's rows, and more than a few, cannot be read.
        """
        num_rows, count = self._num_rows, len(self._of_epoch)
        if count <= max(MAX_BAD_SHARE * num_rows, min(MAX_UNREADABLE_ROWS, num_rows - 1)):
            return
        first = self._of_epoch[0]
        raise UserError(
            f"{count} of the {num_rows} training rows could not be read in epoch {epoch}, the first of them line "
            f"{first.line}: {first.reason}. All are listed in {settings.output_dir}/skipped_rows.jsonl; mend the rows "
            "or the disk that they lie on, and start again: it goes on from the newest state"
        )
