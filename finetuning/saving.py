"""What a run leaves on disk on its way: checkpoints to speak with and a state to resume from.

A disk that is full, or refuses otherwise, costs a checkpoint and not the run, unless it happens again and again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from finetuning.checkpoint import Exporter, attempt, rotate_checkpoints, step_of_best
from finetuning.console import say
from finetuning.disk import bytes_of, damage, free_bytes
from finetuning.errors import UserError
from finetuning.memory import BYTES_OF_AVERAGE
from finetuning.progress import Progress
from finetuning.resume import versions
from finetuning.settings import Settings
from finetuning.sharding import is_sharded
from finetuning.state import (
    State,
    find_states,
    random_tensors,
    restore_random,
    restore_training,
    rotate_states,
    save_state,
    set_schedule,
    state_folder,
    training_tensors,
)
from finetuning.trainer import Trainer

#: So many failures in a row end the run.
MAX_FAILURES = 3
#: A trained weight is kept with Adam's two moments, all in fp32.
STATE_BYTES_PER_WEIGHT = 12


class Saved(NamedTuple):
    """What worked: all True when everything did that was asked for."""

    checkpoints: bool
    state: bool


class Saver:
    """Saves a run, and puts a saved one back.

    Args:
        facts: JSON values of the state's record that do not change: settings, base, data, speakers.
        vectors: (num_speakers, H) float32, the speakers' vectors.
        tell_saved: is called with the names of checkpoints that were saved.
        make_room: is called before a save gives up for want of space.
    """

    def __init__(
        self,
        settings: Settings,
        exporter: Exporter,
        facts: Mapping[str, Any],
        vectors: torch.Tensor,
        tell_saved: Callable[[Sequence[str]], None] = lambda _: None,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings, self.exporter, self.facts, self.vectors = settings, exporter, facts, vectors
        self._tell_saved, self._make_room = tell_saved, make_room
        self.accelerator = exporter.accelerator
        self._num_failures = 0

    # ---------------------------------------------------------------------------------------------------- saving

    def save(self, trainer: Trainer, names: Sequence[str], with_state: bool, epoch: int) -> Saved:
        """Writes checkpoints first, then the state: a state never knows of a checkpoint that is not there.

        Where only ``last/`` is written on the way, which the end of the run writes again, the state comes first: a
        machine that is about to vanish may not wait for both.

        Args:
            names: of checkpoints; see ``Exporter.save``.
            epoch: that the checkpoints belong to.

        Raises:
            UserError: the third failure in a row.
        """
        saved = Saved(checkpoints=not names, state=not with_state)
        state_first = list(names) == ["last"] and not trainer.is_over
        try:
            if state_first and with_state:
                self._save_state(trainer)
                saved = saved._replace(state=True)
            self._check_space(not saved.state, bool(names))
            if names:
                with trainer.stepper.averaged():
                    self.exporter.save(names, self._describe(trainer, epoch))
                saved = saved._replace(checkpoints=True)
                self._tell_saved(names)
            if not saved.state:
                self._save_state(trainer)
                saved = saved._replace(state=True)
            self._rotate(trainer.progress.step)
        except OSError as error:
            self._note_failure([] if saved.checkpoints else names, error)
        else:
            self._num_failures = 0
        return saved

    def _save_state(self, trainer: Trainer) -> None:
        self._check_space(True, False)
        attempt(self.accelerator, trainer.tracker.flush)
        folder = state_folder(self.settings.output_dir, trainer.progress.step)
        save_state(folder, self._record(trainer), self._tensors(trainer), self.accelerator)

    def _rotate(self, step: int) -> None:
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError):  # the next save tries it again
                rotate_states(self.settings.output_dir)
                rotate_checkpoints(self.settings.output_dir, self.settings.save_total_limit, step)
        self.accelerator.wait_for_everyone()

    def _check_space(self, with_state: bool, with_checkpoint: bool) -> None:
        """Raises OSError before anything is written that does not fit; an older state makes room if need be."""

        def check() -> None:
            output_dir = self.settings.output_dir
            required = with_checkpoint * self.exporter.required_bytes() + with_state * state_bytes(
                self.exporter.model, self.settings.ema_decay
            )
            older = sum(bytes_of(folder) for folder in find_states(output_dir)[1:]) if with_state else 0
            if free_bytes(output_dir) + older < required:
                self._make_room()
            if free_bytes(output_dir) < required <= free_bytes(output_dir) + older:
                rotate_states(output_dir, keep=1)
            if (free := free_bytes(output_dir)) < required:
                raise OSError(f"{required / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")

        attempt(self.accelerator, lambda: check() if self.accelerator.is_main_process else None)

    def _note_failure(self, names: Sequence[str], error: OSError) -> None:
        self._num_failures += 1
        what = " and ".join([f"{name}/" for name in names] or ["the state"])
        if self._num_failures == MAX_FAILURES:
            raise UserError(
                f"OUTPUT_DIR: saving in {self.settings.output_dir} failed {MAX_FAILURES} times in a row, last {what}: "
                f"{error}. What was saved before is whole: free some space and start again: it goes on from "
                "the newest state, or from the beginning where there is none yet"
            )
        say(
            f"warning: {what} could not be saved: {error}. What was saved before is whole; training goes on "
            f"(failure {self._num_failures} of {MAX_FAILURES})"
        )

    def _describe(self, trainer: Trainer, epoch: int) -> dict[str, Any]:
        """training_state.json of a checkpoint."""
        progress, chooser = trainer.progress, trainer.chooser
        best = progress.best
        return {
            "step": progress.step,
            "epoch": epoch,
            "best_by": chooser.text,
            "best_metric": chooser.metric,
            "best_value": best.value if best else None,
            "best_step": best.step if best else None,
            "best_loss": best.figures.get("loss") if best else None,
            "train_loss": progress.train_loss,
            "metrics": trainer.tracker.figures_at(progress.step),
            "complete": trainer.is_over,
        } | ({"ema_decay": self.settings.ema_decay} if self.settings.ema_decay else {})

    def _record(self, trainer: Trainer) -> dict[str, Any]:
        stepper, scaler = trainer.stepper, self.accelerator.scaler
        return {
            **self.facts,
            "progress": trainer.progress.to_json(),
            "complete": trainer.is_over,
            "schedule": stepper.scheduler.last_epoch,
            "scaler": scaler.state_dict() if scaler else None,
            "learning_rate": stepper.learning_rate,
            "num_parts": stepper.num_parts,
            "logs": trainer.tracker.to_json(),
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def _tensors(self, trainer: Trainer) -> Iterator[tuple[str, torch.Tensor]]:
        yield from training_tensors(trainer.stepper.module, trainer.stepper.optimizer)
        if trainer.stepper.average:
            yield from trainer.stepper.average.named_tensors()
        yield "speakers.vectors", self.vectors
        own = random_tensors(self.accelerator.device) | {
            "log_window": trainer.log_window.totals,
            "gradient_norm": trainer.log_window.gradient_norm,
            "epoch_window": trainer.epoch_window.totals,
            "skips": trainer.stepper.skips.counts,
        }
        for name, tensor in own.items():
            yield f"process.{self.accelerator.process_index}.{name}", tensor

    # ------------------------------------------------------------------------------------------------- restoring

    def restore(self, trainer: Trainer, state: State) -> None:
        """Brings a trainer that was built anew to where the state was saved. See ``resume`` for what must agree."""
        record, stepper, index = state.record, trainer.stepper, self.accelerator.process_index
        restore_training(state, stepper.module, stepper.optimizer)
        if stepper.average:
            stepper.average.restore(state)
        set_schedule(stepper.scheduler, record["schedule"])
        if self.accelerator.scaler and record["scaler"]:
            self.accelerator.scaler.load_state_dict(record["scaler"])
        stepper.learning_rate = record["learning_rate"]
        if not is_sharded(stepper.objective):  # else the processes would have unequal numbers of forwards
            stepper.num_parts = record["num_parts"]
        trainer.progress = Progress.from_json(record["progress"])
        if self._has_lost_best(trainer):
            trainer.progress.best = None
            say("best/ is missing or damaged: the next evaluation writes it again")
        if changed := trainer.chooser.begin(trainer.progress):
            say(changed)
        self._say_future_of_best(trainer)
        same_processes = state.num_processes == self.accelerator.num_processes
        if same_processes:
            own = {name: state[f"process.{index}.{name}"] for name in _names_of_process(state, index)}
            restore_random(own, self.accelerator.device)
        totals = [self._sums(state, name, same_processes) for name in ("log_window", "epoch_window")]
        # The gradient norm and the skips are the same in all processes.
        trainer.log_window.resume_from(totals[0], state["process.0.gradient_norm"])
        trainer.epoch_window.resume_from(totals[1])
        stepper.skips.counts = state["process.0.skips"].to(stepper.skips.counts)

    def _say_future_of_best(self, trainer: Trainer) -> None:
        """The run may have gone further than its state, and written a better best/ there. That counts for nothing, or
        what is going to be chosen would differ from what an undisturbed run chooses; but it is a whole checkpoint, so
        it stays as long as nothing takes its place."""
        progress = trainer.progress
        if (step := step_of_best(self.settings.output_dir)) is None or step <= progress.step:
            return
        until = "the next evaluation"
        if progress.best:
            until = f"an evaluation is better than the {trainer.chooser.say_best(progress.best)}"
        say(
            f"best/ is of step {step}, which this run, going on after step {progress.step}, has given up. It stays "
            f"until {until}; copy it now to keep it"
        )

    def _has_lost_best(self, trainer: Trainer) -> bool:
        best = self.settings.output_dir / "best"
        is_lost = self.accelerator.is_main_process and trainer.progress.best is not None and bool(damage(best))
        return trainer.stepper.any_process(is_lost)

    def _sums(self, state: State, name: str, same_processes: bool) -> torch.Tensor:
        """This process's sums; of another number of processes, the first takes all of them."""
        if same_processes:
            return state[f"process.{self.accelerator.process_index}.{name}"]
        total = sum(state[f"process.{index}.{name}"] for index in range(state.num_processes))
        return total if self.accelerator.is_main_process else torch.zeros_like(total)


def state_bytes(model: nn.Module, ema_decay: float = 0.0) -> int:
    """Size of a state, over all processes."""
    return state_bytes_per_weight(ema_decay) * sum(
        weight.numel() for weight in model.parameters() if weight.requires_grad
    )


def state_bytes_per_weight(ema_decay: float) -> int:
    """Of each weight that trains."""
    return STATE_BYTES_PER_WEIGHT + (BYTES_OF_AVERAGE if ema_decay else 0)


def _names_of_process(state: State, index: int) -> list[str]:
    prefix = f"process.{index}."
    return [name.removeprefix(prefix) for name in state.names(prefix)]
