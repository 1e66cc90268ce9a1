"""Where a run stands, and how far it is to its end."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from finetuning.sampling import Part
from finetuning.settings import Settings
from finetuning.steps import TrainingSteps


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps taken.
        epoch, done: the position in the rows; see ``sampling.Part``.
        num_fetched: steps that were fetched, with those that turned out to hold no row.
        best_loss: of ``best/``.
        evaluated_at: the last step that was evaluated.
        sampled_at: the last step that samples were taken of.
        is_settled: whether logging, evaluation and saving after the last step are over.
        ended_at: the last step at which an epoch, or the run, was brought to its end.
        num_skipped_rows: rows that could not be read while training.
    """

    step: int = 0
    epoch: int = 0
    done: tuple[Part, ...] = ()
    num_fetched: int = 0
    best_loss: float = math.inf
    train_loss: float | None = None
    evaluated_at: int | None = None
    is_settled: bool = True
    ended_at: int | None = None
    num_skipped_rows: int = 0
    sampled_at: int | None = None

    def is_over(self, settings: Settings, num_steps: int) -> bool:
        """Whether nothing is left to train of so many steps."""
        return (self.step >= num_steps and self.ended_at == self.step) or self.epoch >= settings.num_epochs

    def to_json(self) -> dict[str, Any]:
        best_loss = None if math.isinf(self.best_loss) else self.best_loss
        return asdict(self) | {"done": [part.to_json() for part in self.done], "best_loss": best_loss}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Progress:
        best_loss = math.inf if record["best_loss"] is None else record["best_loss"]
        done = tuple(Part.from_json(part) for part in record["done"])
        return cls(**record | {"done": done, "best_loss": best_loss})


def total_steps(settings: Settings, train: TrainingSteps, progress: Progress | None = None) -> int:
    """Optimizer steps of the whole run, with those that are behind."""
    progress = progress or Progress()
    num_steps, done = progress.num_fetched, progress.done
    for epoch in range(progress.epoch, settings.num_epochs):
        if settings.max_steps and num_steps >= settings.max_steps:
            break
        num_steps += train.num_steps(epoch, done)
        done = ()
    return min(num_steps, settings.max_steps) if settings.max_steps else num_steps
