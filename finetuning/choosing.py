"""Which evaluation ``best/`` is chosen from, and when waiting for a better one has taken too long.

An evaluation that lacks BEST_METRIC (samples are not spoken at each of them), or has it of some of the samples only,
chooses nothing and is not counted. A tie is no improvement, and a figure that is not finite is never the better one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from finetuning.metrics import METRICS
from finetuning.progress import Best, Progress
from finetuning.settings import Settings


class Chooser:
    """Compares evaluations by BEST_METRIC.

    Args:
        has_validation: whether there are validation rows. Without them the mean training loss of an epoch stands for
            all their figures; figures of samples need none.
        yardsticks: of the metrics of samples; see ``samples.yardsticks_of``.

    Attributes:
        metric: the key of METRICS that is compared.
        follows_training: whether its value is that mean training loss.
    """

    def __init__(
        self, settings: Settings, has_validation: bool, yardsticks: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.settings, self.yardsticks = settings, yardsticks
        self.follows_training = not (has_validation or METRICS[settings.best_metric].is_of_samples)
        self.metric = "loss" if self.follows_training else settings.best_metric

    @property
    def text(self) -> str:
        """What is compared, in words."""
        if self.follows_training:
            return "mean training loss of an epoch"
        return "validation loss" if self.metric == "loss" else self.metric

    @property
    def best_text(self) -> str:
        """ "lowest validation loss", say."""
        return f"{METRICS[self.metric].superlative} {self.text}"

    def begin(self, progress: Progress) -> str | None:
        """Makes BEST_METRIC, as it is measured now, what a run that was begun by another one is compared by, and tells
        what follows.

        ``best/`` stays as long as nothing is better than it; where what it has of the metric is not known, or was
        measured by another yardstick, the next evaluation that has it takes the place. Waiting begins anew.
        """
        before, now = progress.best_metric, self.settings.best_metric
        best = progress.best
        if before == now and (best is None or self._can_be_compared(best.yardsticks)):
            return None
        progress.best_metric, progress.num_not_better = now, 0
        if best is None:
            return None
        change = f"BEST_METRIC was {before}, is {now}"
        if before == now:
            change = f"BEST_METRIC={now} is measured otherwise than before (texts, LORA_EXPORT_SCALE, or the judge)"
        value = best.figures.get(self.metric) if self._can_be_compared(best.yardsticks) else None
        progress.best = None if value is None else replace(best, value=value)
        if value is None:
            return f"{change}: the next evaluation that has it chooses best/ anew; copy best/ now to keep it"
        return f"{change}, of which best/ has {value:.4f}"

    def _can_be_compared(self, yardsticks: Mapping[str, str]) -> bool:
        """Whether the metric was measured as it is now, and of all samples; see ``samples.yardsticks_of``."""
        return yardsticks.get(self.metric) == self.yardsticks.get(self.metric)

    def consider(self, progress: Progress, figures: Mapping[str, Any] | None) -> Best | None:
        """The evaluation of this step where it is the best so far, else None; counts those that are not.

        Args:
            figures: by name, as in ``METRICS``; any may be missing or None. Under ``yardsticks`` those of samples that
                can be compared. What else stands there is ignored.
        """
        figures = figures or {}
        value, yardsticks = figures.get(self.metric), figures.get("yardsticks") or {}
        if value is None or not self._can_be_compared(yardsticks):
            return None
        if not math.isfinite(value) or (progress.best and not self._is_better(value, progress.best.value)):
            progress.num_not_better += 1
            return None
        progress.num_not_better = 0
        known = {name: float(figures[name]) for name in METRICS if isinstance(figures.get(name), (int, float))}
        return Best(float(value), progress.step, known, dict(yardsticks))

    def _is_better(self, value: float, than: float) -> bool:
        cost = METRICS[self.metric].cost
        return cost(value) < cost(than)

    def say_best(self, best: Best) -> str:
        """ "lowest validation loss 2.3456, step 300"."""
        step = "" if best.step is None else f", step {best.step}"
        return f"{self.best_text} {best.value:.4f}{step}"

    def say_stop(self, progress: Progress) -> str:
        """Why the run ends before its last step."""
        so_far = f"the best is the {self.say_best(progress.best)}" if progress.best else "none was finite"
        return (
            f"Early stopping at step {progress.step}: {progress.num_not_better} evaluations in a row without a better "
            f"{self.text} ({so_far}), and EARLY_STOPPING_PATIENCE={self.settings.early_stopping_patience}. A larger "
            "one, or 0, goes on from here"
        )
