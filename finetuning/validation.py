"""Validation loss and accuracies, summed exactly over all rows and processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from finetuning.console import say
from finetuning.dataset import Batch, SkippedRow, Step, StepDataset, count_tokens, split_batch, step_loader, to_device
from finetuning.errors import UserError
from finetuning.objective import TrainingObjective
from finetuning.sampling import sequential_plan, sequential_plan_by_frames
from finetuning.settings import Settings
from finetuning.sharding import is_sharded
from finetuning.stepping import sum_dtype


class Validator:
    """Evaluates the objective on all validation rows; every process takes its share."""

    def __init__(self, settings: Settings, accelerator: Any, dataset: StepDataset) -> None:
        self.settings, self.accelerator, self.dataset = settings, accelerator, dataset
        self._said: set[SkippedRow] = set()

    @torch.no_grad()
    def evaluate(
        self, objective: TrainingObjective, num_parts: int = 1, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Means over the tokens of all batches of all processes.

        Args:
            objective: the unwrapped module; its mode is restored.
            num_parts: every batch is cut in so many, where training found that the memory does not suffice.
            should_stop: asked before every batch. Of several processes it must say no, or the others wait in vain.

        Returns:
            ``loss`` (talker + weight x sub-talker), ``talker_loss``, ``sub_talker_loss``, ``perplexity`` and
            ``accuracy`` of codebook 0, ``sub_talker_accuracy`` (mean over codebooks 1-15). None when it was stopped.
        """
        was_training = objective.training
        objective.eval()
        try:
            totals = self._totals(objective, num_parts, should_stop)
            return None if totals is None else self._means(totals)
        finally:
            objective.train(was_training)

    def _totals(
        self, objective: TrainingObjective, num_parts: int, should_stop: Callable[[], bool]
    ) -> torch.Tensor | None:
        """(6,) float64, of this process; see ``_sums``. None when it was stopped."""
        totals = torch.zeros(6, dtype=torch.float64)
        for step in self._steps(is_sharded(objective)):
            self._say_skipped(step)
            for batch in split_batch(*step.batches, num_parts):
                if should_stop():
                    return None
                totals += batch["weight"] * self._sums(objective, batch)
        return totals

    def _say_skipped(self, step: Step) -> None:
        for row in set(step.skipped) - self._said:
            self._said.add(row)
            say(f"skipped line {row.line} of the validation rows: {row.reason}")

    def _steps(self, equal: bool) -> Any:
        """Sharded processes gather parameters in every forward, so they need equal numbers of batches."""
        shares = (self.accelerator.process_index, self.accelerator.num_processes, equal)
        if max_frames := self.settings.max_frames_per_batch:
            lengths = self.dataset.manifest.column("num_codec_frames")
            plan = sequential_plan_by_frames(lengths, max_frames, *shares)
        else:
            plan = sequential_plan(len(self.dataset), self.settings.batch_size, *shares)
        return step_loader(self.dataset, plan, self.settings.num_workers)

    def _sums(self, objective: TrainingObjective, batch: Batch) -> torch.Tensor:
        """(6,) float64: both losses, both numbers of right predictions, both numbers of labels."""
        with self.accelerator.autocast():
            sums = objective(to_device(batch, self.accelerator.device))
        names = ("talker_loss", "sub_talker_loss", "talker_correct", "sub_talker_correct")
        return torch.tensor([*(sums[name].sum().item() for name in names), *count_tokens([batch])], dtype=torch.float64)

    def _means(self, totals: torch.Tensor) -> dict[str, float]:
        device = self.accelerator.device
        totals = totals.to(device, sum_dtype(device))
        totals = self.accelerator.reduce(totals, reduction="sum").tolist()
        talker, sub_talker, right, sub_right, num_talker, num_sub_talker = totals
        if not num_talker:
            raise UserError("none of the validation rows can be read; prepare them again, or set VALIDATION_FRACTION=0")
        talker, sub_talker = talker / num_talker, sub_talker / num_sub_talker
        return {
            "loss": talker + self.settings.sub_talker_loss_weight * sub_talker,
            "talker_loss": talker,
            "sub_talker_loss": sub_talker,
            "perplexity": math.exp(min(talker, 700.0)),
            "accuracy": right / num_talker,
            "sub_talker_accuracy": sub_right / num_sub_talker,
        }
