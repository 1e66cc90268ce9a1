"""Where the optimizer steps of an epoch come from: rows that are memory-mapped, or rows that are streamed.

Both give every process the same number of micro-batches in each step, and the same steps for the same epoch each time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from finetuning.codec import FRAMES_PER_SECOND, NUM_CODEBOOKS
from finetuning.dataset import Batch, RowEncoder, StepDataset, StepSampler, collate, step_loader
from finetuning.manifest import MIN_CODEC_FRAMES, RowFormat, check_fields
from finetuning.stream import SplitStream, StreamedRow, prefetched

#: Streamed rows are grouped by length inside so many steps.
WINDOW_STEPS = 8
#: Steps that are made ahead while the model trains.
STEPS_AHEAD = 2


class TrainingSteps(Protocol):
    """One process's steps, epoch by epoch.

    Attributes:
        encoder: rows to ids.
        num_rows: rows of an epoch, over all processes.
        rows_per_step: over all processes.
    """

    encoder: RowEncoder
    num_rows: int
    rows_per_step: int

    @property
    def steps_per_epoch(self) -> int: ...

    def steps(self, epoch: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step."""

    def rows(self, count: int) -> list[dict[str, Any]]:
        """Some rows as ``row_index.Manifest`` gives them."""

    def texts(self, lines: Iterable[int]) -> dict[int, str]:
        """Line -> text of rows that were just trained on."""

    def describe(self) -> str:
        """The rows in a few words."""


@dataclass(frozen=True)
class MappedSteps:
    """Steps over memory-mapped rows; see ``TrainingSteps``."""

    dataset: StepDataset
    sampler: StepSampler
    process: int = 0
    num_workers: int = 0

    @property
    def encoder(self) -> RowEncoder:
        return self.dataset.encoder

    @property
    def num_rows(self) -> int:
        return len(self.dataset)

    @property
    def rows_per_step(self) -> int:
        return self.sampler.rows_per_step

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def steps(self, epoch: int) -> Iterator[list[Batch]]:
        return iter(step_loader(self.dataset, self.sampler.epoch_plan(epoch, self.process), self.num_workers))

    def rows(self, count: int) -> list[dict[str, Any]]:
        return [self.dataset.manifest[index] for index in range(min(count, len(self.dataset)))]

    def texts(self, lines: Iterable[int]) -> dict[int, str]:
        manifest = self.dataset.manifest
        found = manifest.select(np.flatnonzero(np.isin(manifest.column("line"), list(lines))))
        return dict(zip(found.column("line").tolist(), found.column("text").tolist(), strict=True))

    def describe(self) -> str:
        minutes = self.dataset.manifest.column("num_codec_frames").sum() / FRAMES_PER_SECOND / 60
        return f"{self.num_rows} training rows ({minutes:.1f} min)"


@dataclass
class StreamedSteps:
    """Steps over this process's share of a stream; see ``TrainingSteps``.

    A step takes ``batch_size x accumulation`` positions of the share's order; rows that turn out to be unusable leave
    their places empty, and a process that has no more rows gets micro-batches of weight 0.
    """

    stream: SplitStream
    encoder: RowEncoder
    row_format: RowFormat
    batch_size: int
    accumulation: int = 1
    _recent: deque[dict[int, str]] = field(default_factory=lambda: deque(maxlen=2 + STEPS_AHEAD))

    @property
    def num_rows(self) -> int:
        return self.stream.rows.num_rows - len(self.stream.left_out)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.stream.num_shares

    @property
    def _largest_share(self) -> int:
        return max(self.stream.num_rows_of(share) for share in range(self.stream.num_shares))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._largest_share // (self.batch_size * self.accumulation))

    def steps(self, epoch: int) -> Iterator[list[Batch]]:
        return prefetched(self._steps(epoch), STEPS_AHEAD)

    def rows(self, count: int) -> list[dict[str, Any]]:
        found = []
        for row in self.stream.iterate(0):
            if len(found) == count:
                break
            found += self._usable([row]) if row is not None else []
        return found

    def texts(self, lines: Iterable[int]) -> dict[int, str]:
        known = {line: text for window in list(self._recent) for line, text in window.items()}
        return {line: known[line] for line in lines if line in known}

    def describe(self) -> str:
        split = self.stream.rows.split
        return f"{self.num_rows} training rows, streamed from {split.dataset_name} ({split.name})"

    def _steps(self, epoch: int) -> Iterator[list[Batch]]:
        num_batches = -(-self._largest_share // self.batch_size)
        batches_per_window = WINDOW_STEPS * self.accumulation
        positions = self.stream.iterate(epoch)
        for number, first in enumerate(range(0, num_batches, batches_per_window)):
            size = min(batches_per_window, num_batches - first)
            taken = [row for _, row in zip(range(size * self.batch_size), positions, strict=False) if row is not None]
            generator = np.random.default_rng([self.stream.seed, epoch, number])
            batches = self._window(self._usable(taken), size, generator)
            for at in range(0, size, self.accumulation):
                yield [self._batch(rows) for rows in batches[at : at + self.accumulation]]

    def _window(
        self, rows: list[dict[str, Any]], num_batches: int, generator: np.random.Generator
    ) -> list[list[dict[str, Any]]]:
        """Rows to micro-batches of similar length, in random order."""
        self._recent.append({row["line"]: row["text"] for row in rows})
        rows = sorted(rows, key=lambda row: len(row["codes"]))
        parts = [part.tolist() for part in np.array_split(np.arange(len(rows)), num_batches)]
        return [[rows[index] for index in parts[part]] for part in generator.permutation(num_batches)]

    def _batch(self, rows: Sequence[dict[str, Any]]) -> Batch:
        chosen = rows or [self._dummy()]
        speakers = [self.encoder.speaker_index[row["speaker"].lower()] for row in chosen]
        batch = collate([self.encoder.encode(row) for row in chosen], speakers, [row["line"] for row in chosen])
        batch["weight"] = torch.tensor(1.0 if rows else 0.0)
        return batch

    def _dummy(self) -> dict[str, Any]:
        speaker = next(iter(self.encoder.speaker_index))
        codes = np.zeros((MIN_CODEC_FRAMES, NUM_CODEBOOKS), dtype=np.int16)
        return {"text": "-", "language": "Auto", "speaker": speaker, "instruct": None, "codes": codes, "line": 0}

    def _usable(self, rows: list[StreamedRow]) -> list[dict[str, Any]]:
        """Rows of speakers that have a vector."""
        mapped = [self._as_mapped(row) for row in rows]
        return [row for row in mapped if row["speaker"].lower() in self.encoder.speaker_index]

    def _as_mapped(self, row: StreamedRow) -> dict[str, Any]:
        fields = check_fields(row.record, self.row_format)
        return fields | {"codes": row.codes, "line": row.index + 1, "audio": None, "ref_audio": None}
