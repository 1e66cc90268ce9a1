"""The spoken clips as the trainings read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from finetuning.errors import UserError


def read_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a split; ``audio`` and ``ref_audio`` with the folder before them.

    Raises:
        UserError: the speech has not been made.
    """
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"--folder: {path} does not exist; make the speech first (python -m embedded.speech)")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row | {key: str(folder / row[key]) for key in ("audio", "ref_audio")} for row in rows]


def read_clip(path: str | Path) -> np.ndarray:
    """(num_samples,) float32; clips of this recipe are at 24 kHz."""
    return soundfile.read(path, dtype="float32")[0]


class ClipBank:
    """Clips in memory, and batches of pieces of them: drawn by step, so that a training that goes on sees the same.

    Args:
        rows: of ``read_rows``; an hour takes 170 MB.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.clips = [soundfile.read(row["audio"], dtype="int16")[0] for row in rows]
        lengths = np.array([len(clip) for clip in self.clips], dtype=np.float64)
        self._shares = lengths / lengths.sum()

    def pieces(self, step: int, num: int, length: int, stretched_share: float = 0.3) -> torch.Tensor:
        """(num, length) float32 at various loudness; some are played faster or slower, for voices in between.

        A clip that is too short has silence behind it.
        """
        draw = np.random.default_rng([1, step])
        made = np.zeros((num, length), dtype=np.float32)
        for piece in made:
            clip = self.clips[draw.choice(len(self.clips), p=self._shares)]
            speed = draw.uniform(0.85, 1.2) if draw.random() < stretched_share else 1.0
            taken = int(length * speed)
            start = draw.integers(0, max(1, len(clip) - taken))
            source = clip[start : start + taken].astype(np.float32) / 32768
            if speed != 1:
                source = np.interp(np.arange(0, len(source) - 1, speed), np.arange(len(source)), source)
            piece[: len(source)] = source[:length] * 10 ** (draw.uniform(-4, 2) / 20)
        return torch.from_numpy(made.clip(-1, 1))
