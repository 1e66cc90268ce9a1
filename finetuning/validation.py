"""Validation loss and accuracies, of all rows and of each speaker's, summed exactly over all rows and processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from finetuning.codec import NUM_CODEBOOKS
from finetuning.console import say
from finetuning.dataset import Batch, SkippedRow, Step, StepDataset, count_tokens, split_batch, step_loader, to_device
from finetuning.errors import UserError
from finetuning.objective import TrainingObjective
from finetuning.sampling import sequential_plan, sequential_plan_by_frames
from finetuning.settings import Settings
from finetuning.sharding import is_sharded
from finetuning.stepping import sum_dtype

#: More speakers than this are not measured one by one: each costs a batch that is not full, and a line in the logs.
MAX_MEASURED_SPEAKERS = 50

#: What ``Validator._sums`` adds up, in this order; behind them come the right predictions of codebooks 1 … 15.
_SUMS = (
    "talker_loss", "sub_talker_loss", "talker_correct", "sub_talker_correct", "num_talker", "num_sub_talker",
    "num_rows",
)  # fmt: skip
_NUM_SUMS = len(_SUMS) + NUM_CODEBOOKS - 1


class Validator:
    """Evaluates the objective on all validation rows; every process takes its share.

    Where the training has several speakers, no batch holds rows of two, so that its sums are those of one speaker; of
    very many the ones with the most rows are measured, and the others share their batches.
    """

    def __init__(self, settings: Settings, accelerator: Any, dataset: StepDataset) -> None:
        self.settings, self.accelerator, self.dataset = settings, accelerator, dataset
        self._said: set[SkippedRow] = set()
        # None and no labels where there is one speaker: its figures are those of all rows.
        self._speakers: list[str] | None = None
        self._labels: np.ndarray | None = None
        if len(dataset.encoder.speaker_index) > 1:
            self._speakers, self._labels = measured_speakers(*dataset.manifest.labels("speaker"))

    @torch.no_grad()
    def evaluate(
        self, objective: TrainingObjective, num_parts: int = 1, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """Means over the tokens of all batches of all processes.

        Args:
            objective: the unwrapped module; its mode is restored.
            num_parts: every batch is cut in so many, where training found that the memory does not suffice.
            should_stop: asked before every batch. Of several processes it must say no, or the others wait in vain.

        Returns:
            ``loss`` (talker + weight x sub-talker), ``talker_loss``, ``sub_talker_loss``, ``perplexity`` and
            ``accuracy`` of codebook 0, ``sub_talker_accuracy`` (mean over codebooks 1-15), ``codebook_accuracy`` (list
            of 16, codebook 0 first). Where the training has several speakers also ``speakers``: name -> ``loss``,
            ``talker_loss``, ``sub_talker_loss``, ``accuracy`` and ``num_rows`` of that speaker's rows. None when it was
            stopped.
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
        """(num_speakers, _NUM_SUMS) float64, of this process; see ``_sums``. None when it was stopped."""
        totals = torch.zeros(len(self._speakers or []) + 1, _NUM_SUMS, dtype=torch.float64)
        steps = self._steps(is_sharded(objective))
        for (rows,), step in zip(steps.sampler, steps, strict=True):  # its plan, and what the loader makes of it
            self._say_skipped(step)
            speaker = self._labels[rows[0]] if rows and self._labels is not None else 0
            for batch in split_batch(*step.batches, num_parts):
                if should_stop():
                    return None
                totals[speaker] += batch["weight"] * self._sums(objective, batch)
        return totals

    def _say_skipped(self, step: Step) -> None:
        for row in set(step.skipped) - self._said:
            self._said.add(row)
            say(f"skipped line {row.line} of the validation rows: {row.reason}")

    def _steps(self, equal: bool) -> Any:
        """Sharded processes gather parameters in every forward, so they need equal numbers of batches."""
        shares = (self.accelerator.process_index, self.accelerator.num_processes, equal, self._labels)
        if max_frames := self.settings.max_frames_per_batch:
            lengths = self.dataset.lengths()
            plan = sequential_plan_by_frames(lengths, max_frames, *shares)
        else:
            plan = sequential_plan(len(self.dataset), self.settings.batch_size, *shares)
        return step_loader(self.dataset, plan, self.settings.num_workers)

    def _sums(self, objective: TrainingObjective, batch: Batch) -> torch.Tensor:
        """(_NUM_SUMS,) float64: losses, right predictions and labels of talker and sub-talker, the number of rows, and
        the right predictions of each codebook from 1 on."""
        with self.accelerator.autocast():
            sums = objective(to_device(batch, self.accelerator.device))
        values = [sums[name].sum().item() for name in _SUMS[:4]]
        numbers = [*count_tokens([batch]), len(batch["lines"])]
        return torch.tensor([*values, *numbers, *sums["sub_talker_correct"].tolist()], dtype=torch.float64)

    def _means(self, totals: torch.Tensor) -> dict[str, Any]:
        """What ``evaluate`` gives, from the sums of this process."""
        device = self.accelerator.device
        totals = self.accelerator.reduce(totals.to(device, sum_dtype(device)), reduction="sum").cpu().double()
        of_all = totals.sum(0)
        figures = self._figures(of_all)
        if figures is None:
            raise UserError("none of the validation rows can be read; prepare them again, or set VALIDATION_FRACTION=0")
        figures["codebook_accuracy"] = [figures["accuracy"], *_codebook_accuracies(of_all)]
        if self._speakers is not None:
            figures["speakers"] = self._figures_of_speakers(totals)
        return figures

    def _figures_of_speakers(self, totals: torch.Tensor) -> dict[str, dict[str, float]]:
        """Of all that have a row that could be read."""
        shown = ("loss", "talker_loss", "sub_talker_loss", "accuracy")
        found = {}
        for name, sums in zip(self._speakers, totals, strict=False):  # behind them all others
            if figures := self._figures(sums):
                found[name] = {key: figures[key] for key in shown} | {"num_rows": int(sums[_SUMS.index("num_rows")])}
        return found

    def _figures(self, sums: torch.Tensor) -> dict[str, float] | None:
        """Means over the tokens, from (_NUM_SUMS,); None where there are none."""
        talker, sub_talker, right, sub_right, num_talker, num_sub_talker, _ = sums[: len(_SUMS)].tolist()
        if not num_talker:
            return None
        talker, sub_talker = talker / num_talker, sub_talker / num_sub_talker
        return {
            "loss": talker + self.settings.sub_talker_loss_weight * sub_talker,
            "talker_loss": talker,
            "sub_talker_loss": sub_talker,
            "perplexity": math.exp(min(talker, 700.0)),
            "accuracy": right / num_talker,
            "sub_talker_accuracy": sub_right / num_sub_talker,
        }


def measured_speakers(names: list[str], labels: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The speakers that are measured, and (num_rows,) each row's place among them; all others have the next one.

    Args:
        labels: (num_rows,) each row's place among ``names``.
    """
    if len(names) <= MAX_MEASURED_SPEAKERS:
        return names, labels
    most = np.sort(np.argsort(-np.bincount(labels, minlength=len(names)), kind="stable")[:MAX_MEASURED_SPEAKERS])
    places = np.full(len(names), len(most), dtype=labels.dtype)
    places[most] = np.arange(len(most))
    return [names[place] for place in most], places[labels]


def _codebook_accuracies(sums: torch.Tensor) -> list[float]:
    """Of codebooks 1 … 15, from (_NUM_SUMS,); each has the same number of labels: one a frame."""
    num_frames = sums[_SUMS.index("num_sub_talker")].item() / (NUM_CODEBOOKS - 1)
    return [right / num_frames for right in sums[len(_SUMS) :].tolist()]
