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

#: Share of the pieces that are played faster or slower.
STRETCHED_SHARE = 0.3


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


def twin_of(path: Path) -> Path:
    """Where the neutral twin of a clip lies."""
    return path.with_name(f"{path.stem}.neutral.flac")


class ClipBank:
    """Clips in memory, and batches of pieces of them: drawn by step, so that a training that goes on sees the same.

    Args:
        rows: of ``read_rows``; an hour takes 170 MB, with the twins 340.
        with_twins: read the clips' neutral twins too.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], with_twins: bool = False) -> None:
        self.clips = [_read_int16(row["audio"]) for row in rows]
        self.twins = [_read_int16(twin_of(Path(row["audio"]))) for row in rows] if with_twins else []
        self.f0_hz = [row["f0_hz"] for row in rows]
        lengths = np.array([len(clip) for clip in self.clips], dtype=np.float64)
        self._shares = lengths / lengths.sum()

    def pieces_with_twins(self, step: int, num: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(num, length) float32 of clips and of twins, and the (num,) pitches in Hz; some are played faster or slower,
        for voices in between.

        A clip that is too short has silence behind it.
        """
        draw = np.random.default_rng([1, step])
        made, f0_hz = np.zeros((2, num, length), dtype=np.float32), np.zeros(num, dtype=np.float32)
        for place, number in enumerate(draw.choice(len(self.clips), num, p=self._shares)):
            speed = draw.uniform(0.85, 1.2) if draw.random() < STRETCHED_SHARE else 1.0
            taken, f0_hz[place] = int(length * speed), self.f0_hz[number] * speed
            start = draw.integers(0, max(1, len(self.clips[number]) - taken))
            for which, waveforms in enumerate((self.clips, self.twins)):
                piece = _played(waveforms[number][start : start + taken], speed)[:length]
                made[which, place, : len(piece)] = piece
        return torch.from_numpy(made[0]), torch.from_numpy(made[1]), torch.from_numpy(f0_hz)

    def places(self, step: int, num: int, num_frames: int, samples_per_frame: int) -> list[tuple[int, int]]:
        """The clip and the first frame of each of ``num`` pieces; clips that are too short are left out."""
        draw = np.random.default_rng([2, step])
        chosen: list[tuple[int, int]] = []
        while len(chosen) < num:
            number = int(draw.choice(len(self.clips), p=self._shares))
            spare = len(self.clips[number]) // samples_per_frame - num_frames
            if spare >= 0:
                chosen.append((number, int(draw.integers(0, spare + 1))))
        return chosen


def _read_int16(path: str | Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0]


def _played(piece: np.ndarray, speed: float) -> np.ndarray:
    """int16 to float32, at another speed."""
    source = piece.astype(np.float32) / 32768
    return source if speed == 1 else np.interp(np.arange(0, len(source) - 1, speed), np.arange(len(source)), source)
