"""Where a run stands, and how far it is to its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from finetuning.sampling import Part
from finetuning.settings import Settings
from finetuning.steps import TrainingSteps


@dataclass(frozen=True)
class Best:
    """The evaluation that ``best/`` was written after.

    Attributes:
        value: of the metric that it was chosen by; see ``choosing``.
        figures: all that it had of ``METRICS``.
        yardsticks: what those of samples were measured by, where all samples had them; see ``samples.yardsticks_of``.
    """

    value: float
    step: int | None = None  # unknown in states of before
    figures: Mapping[str, float] = field(default_factory=dict)
    yardsticks: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps taken.
        epoch, done: the position in the rows; see ``sampling.Part``.
        num_fetched: steps that were fetched, with those that turned out to hold no row.
        best: of ``best/``; None while there is none.
        best_metric: BEST_METRIC, by which it was chosen.
        num_not_better: evaluations in a row, to the last one, that were not better than it.
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
    best: Best | None = None
    best_metric: str = "loss"
    num_not_better: int = 0
    train_loss: float | None = None
    evaluated_at: int | None = None
    is_settled: bool = True
    ended_at: int | None = None
    num_skipped_rows: int = 0
    sampled_at: int | None = None

    def is_out_of_patience(self, settings: Settings) -> bool:
        """Whether EARLY_STOPPING_PATIENCE ends the run here."""
        patience = settings.early_stopping_patience
        return 0 < patience <= self.num_not_better and self.best_metric == settings.best_metric

    def has_no_step_left(self, settings: Settings, num_steps: int) -> bool:
        """Whether no step is to follow; what belongs to the end of the run may still be left."""
        return self.step >= num_steps or self.is_out_of_patience(settings)

    def is_over(self, settings: Settings, num_steps: int) -> bool:
        """Whether nothing is left to do of so many steps."""
        is_ended = self.has_no_step_left(settings, num_steps) and self.ended_at == self.step
        return is_ended or self.epoch >= settings.num_epochs

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"done": [part.to_json() for part in self.done]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Progress:
        fields = dict(record)
        if "best_loss" in fields:  # states from before BEST_METRIC
            loss = fields.pop("best_loss")
            fields["best"] = None if loss is None else {"value": loss, "figures": {"loss": loss}}
        best = fields["best"] and Best(**fields["best"])
        return cls(**fields | {"best": best, "done": tuple(Part.from_json(part) for part in record["done"])})


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
