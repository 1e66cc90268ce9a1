"""Validation loss and accuracies, summed exactly over all rows and processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from finetuning.dataset import count_tokens
from finetuning.objective import Batch, TrainingObjective


@torch.no_grad()
def evaluate(
    objective: TrainingObjective, batches: Iterable[Batch], accelerator: Any, sub_talker_weight: float
) -> dict[str, float]:
    """Means over the tokens of all batches of all processes.

    Args:
        objective: the unwrapped module; its mode is restored.
        batches: this process's share.

    Returns:
        ``loss`` (talker + weight x sub-talker), ``talker_loss``, ``sub_talker_loss``, ``perplexity`` and ``accuracy``
        of codebook 0, ``sub_talker_accuracy`` (mean over codebooks 1-15).
    """
    was_training = objective.training
    objective.eval()
    totals = torch.zeros(6, dtype=torch.float64)
    for batch in batches:
        num_talker, num_sub_talker = count_tokens([batch])
        with accelerator.autocast():
            sums = objective(to_device(batch, accelerator.device))
        totals += torch.tensor(
            [
                sums["talker_loss"].item(),
                sums["sub_talker_loss"].item(),
                sums["talker_correct"].item(),
                sums["sub_talker_correct"].sum().item(),
                num_talker,
                num_sub_talker,
            ],
            dtype=torch.float64,
        )
    objective.train(was_training)
    device = accelerator.device
    totals = totals.to(device, torch.float32 if device.type == "mps" else torch.float64)
    totals = accelerator.reduce(totals, reduction="sum").tolist()
    talker, sub_talker, right, sub_right, num_talker, num_sub_talker = totals
    talker, sub_talker = talker / num_talker, sub_talker / num_sub_talker
    return {
        "loss": talker + sub_talker_weight * sub_talker,
        "talker_loss": talker,
        "sub_talker_loss": sub_talker,
        "perplexity": math.exp(min(talker, 700.0)),
        "accuracy": right / num_talker,
        "sub_talker_accuracy": sub_right / num_sub_talker,
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; ``lines`` stay, they are for messages only."""
    return {name: tensor if name == "lines" else tensor.to(device) for name, tensor in batch.items()}
