"""Where the optimizer steps of an epoch come from: rows that are memory-mapped, or rows that are streamed.

Both give every process the same number of micro-batches in each step, and the same steps for the same epoch each time.
A position inside an epoch (``done``, see ``sampling.Part``) counts the steps of the plan, also those without any row.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np

from finetuning.codec import FRAMES_PER_SECOND
from finetuning.dataset import FrameShare, RowEncoder, SkippedRow, Step, StepDataset, make_step, reason_of, step_loader
from finetuning.manifest import RowError, RowFormat, check_fields
from finetuning.sampling import Geometry, Part, StepSampler, bounds_by_rows, merged, shuffled_batches, split_position
from finetuning.stream import SplitStream, StreamedRow, prefetched
from finetuning.workspace import Digest

#: Streamed rows are grouped by length inside so many steps.
WINDOW_STEPS = 8
#: Steps that are made ahead while the model trains.
STEPS_AHEAD = 2


class TrainingSteps(Protocol):
    """One process's steps, epoch by epoch.

    Attributes:
        encoder: rows to ids.
        num_rows: rows of an epoch, over all processes.
        rows_per_step: over all processes; where frames decide, on average.
        steps_per_epoch: of the first; where frames decide, epochs differ a little.
    """

    encoder: RowEncoder
    num_rows: int
    rows_per_step: int

    @property
    def geometry(self) -> Geometry: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def num_steps(self, epoch: int, done: Iterable[Part] = ()) -> int:
        """Steps that are left in an epoch of which ``done`` is over."""

    def steps(self, epoch: int, done: Iterable[Part] = ()) -> Iterator[Step]:
        """Those steps: after steps of this geometry exactly the ones that the untouched epoch goes on with."""

    def fingerprint(self) -> str:
        """A short hash of the rows, whatever their places on disk and the way they are dealt."""

    def references_content(self) -> str | None:
        """A short hash of the references that rows have of their own; None where they have none."""

    def rows(self, count: int) -> list[dict[str, Any]]:
        """Some rows as ``row_index.Manifest`` gives them, no altered copies."""

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
    sub_talker_frame_fraction: float = 1.0

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
    def geometry(self) -> Geometry:
        return self.sampler.geometry

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def num_steps(self, epoch: int, done: Iterable[Part] = ()) -> int:
        return self.sampler.num_steps(epoch, done)

    def steps(self, epoch: int, done: Iterable[Part] = ()) -> Iterator[Step]:
        plan = self.sampler.epoch_plan(epoch, self.process, done)
        share = frame_share(self.sub_talker_frame_fraction, self.sampler.seed, epoch)
        steps = step_loader(self.dataset.at_epoch(epoch, share), plan, self.num_workers)
        return iter(steps) if self.num_workers else prefetched(steps, STEPS_AHEAD)

    def fingerprint(self) -> str:
        return self.dataset.manifest.content_hash()

    def references_content(self) -> str | None:
        return None if self.dataset.references is None else self.dataset.references.content

    def rows(self, count: int) -> list[dict[str, Any]]:
        clips = np.flatnonzero(~self.dataset.manifest.has("augmentation"))
        return list(islice(self._readable(clips.tolist()), count))

    def texts(self, lines: Iterable[int]) -> dict[int, str]:
        places = np.flatnonzero(np.isin(self.dataset.manifest.column("line"), list(lines)))
        return {row["line"]: row["text"] for row in self._readable(places)}

    def _readable(self, places: Iterable[int]) -> Iterator[dict[str, Any]]:
        read = map(self.dataset.read, places)
        return (row for row in read if not isinstance(row, SkippedRow))

    def describe(self) -> str:
        minutes = self.dataset.manifest.column("num_codec_frames").sum() / FRAMES_PER_SECOND / 60
        return f"{self.num_rows} training rows ({minutes:.1f} min)"


@dataclass
class StreamedSteps:
    """Steps over this process's share of a stream; see ``TrainingSteps``.

    A step takes ``batch_size x accumulation`` positions of the share's order, grouped by length among some steps. Rows
    that turn out to be unusable leave their places empty, and a process that has no more rows gets micro-batches of
    weight 0.
    """

    stream: SplitStream
    encoder: RowEncoder
    row_format: RowFormat
    batch_size: int
    accumulation: int = 1
    sub_talker_frame_fraction: float = 1.0
    _recent: deque[dict[int, str]] = field(default_factory=lambda: deque(maxlen=2 + STEPS_AHEAD))

    @property
    def num_rows(self) -> int:
        return self.stream.rows.num_rows - len(self.stream.left_out)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.stream.num_shares

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.batch_size, self.accumulation, self.stream.num_shares)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_steps(0)

    def num_steps(self, epoch: int, done: Iterable[Part] = ()) -> int:
        num_rows = self.num_rows
        for part in merged(done):  # the shares are always equal to within a row
            num_taken = part.num_steps * _places_per_step(part.geometry)
            sizes = _share_sizes(num_rows, part.geometry.num_processes)
            num_rows = sum(max(0, size - num_taken) for size in sizes)
        largest_share = _share_sizes(num_rows, self.stream.num_shares)[0]
        return -(-largest_share // _places_per_step(self.geometry))

    def steps(self, epoch: int, done: Iterable[Part] = ()) -> Iterator[Step]:
        return prefetched(self._steps(epoch, done), STEPS_AHEAD)

    def fingerprint(self) -> str:
        rows, left_out = self.stream.rows, np.asarray(self.stream.left_out, dtype=np.int64)
        return Digest(rows.digest(), rows.num_rows, left_out.tobytes()).hex()

    def references_content(self) -> str | None:
        return None

    def rows(self, count: int) -> list[dict[str, Any]]:
        found = []
        for row in self.stream.iterate(0):
            if len(found) == count:
                break
            usable = self._usable([row]) if row is not None else []
            found += [row for row in usable if not isinstance(row, SkippedRow)]
        return found

    def texts(self, lines: Iterable[int]) -> dict[int, str]:
        known = {line: text for window in list(self._recent) for line, text in window.items()}
        return {line: known[line] for line in lines if line in known}

    def describe(self) -> str:
        split = self.stream.rows.split
        return f"{self.num_rows} training rows, streamed from {split.dataset_name} ({split.name})"

    def _steps(self, epoch: int, done: Iterable[Part]) -> Iterator[Step]:
        share = frame_share(self.sub_talker_frame_fraction, self.stream.seed, epoch)
        encoder = self.encoder.at_epoch(epoch)
        gone, num_steps = split_position(done, self.geometry)
        first_window, num_skipped = divmod(num_steps, WINDOW_STEPS)
        for batches in _windows(self._after(gone, epoch), self.geometry, epoch, first_window):
            usable = [self._usable([row for _, row in batch if row is not None]) for batch in batches]
            rows = [row for batch in usable for row in batch if not isinstance(row, SkippedRow)]
            self._recent.append({row["line"]: row["text"] for row in rows})
            for at in range(num_skipped * self.accumulation, len(usable), self.accumulation):
                yield make_step(usable[at : at + self.accumulation], encoder, share)
            num_skipped = 0

    def _after(self, gone: Iterable[Part], epoch: int) -> SplitStream:
        """The rows that are left of an epoch when steps of other geometries have taken theirs."""
        stream = self.stream
        for part in gone:
            num_shares = part.geometry.num_processes
            shares = [replace(stream, share=share, num_shares=num_shares) for share in range(num_shares)]
            taken = [_taken(share, part, epoch) for share in shares]
            stream = replace(stream, left_out=np.concatenate([stream.left_out, *taken]))
        return stream

    def _usable(self, rows: Iterable[StreamedRow]) -> list[dict[str, Any] | SkippedRow]:
        """Rows of speakers that have a vector, and damaged rows."""
        mapped = map(self._as_mapped, rows)
        known = self.encoder.speaker_index
        return [row for row in mapped if isinstance(row, SkippedRow) or row["speaker"].lower() in known]

    def _as_mapped(self, row: StreamedRow) -> dict[str, Any] | SkippedRow:
        try:
            fields = check_fields(row.record, self.row_format)
        except RowError as error:
            return SkippedRow(row.index + 1, reason_of(error))
        return fields | {"codes": row.codes, "line": row.index + 1, "audio": None, "ref_audio": None}


def frame_share(fraction: float, seed: int, epoch: int) -> FrameShare | None:
    """What SUB_TALKER_FRAME_FRACTION says of an epoch; None for all frames."""
    return FrameShare(fraction, seed, epoch) if fraction < 1 else None


#: A position of a share's order: the row's index in the split, and the row where it can be used.
_Place = tuple[int, StreamedRow | None]


def _windows(
    stream: SplitStream, geometry: Geometry, epoch: int, first_window: int = 0
) -> Iterator[list[list[_Place]]]:
    """The micro-batches of a share, so many steps at a time."""
    num_batches = -(-stream.num_rows_of(0) // geometry.batch_size)  # no share is larger than the first
    batches_per_window = WINDOW_STEPS * geometry.accumulation
    start = first_window * batches_per_window * geometry.batch_size
    places = zip(stream.order(epoch)[start:].tolist(), stream.iterate(epoch, start), strict=True)
    for number in range(first_window, -(-num_batches // batches_per_window)):
        size = min(batches_per_window, num_batches - number * batches_per_window)
        taken = list(islice(places, size * geometry.batch_size))
        generator = np.random.default_rng([stream.seed, epoch, number])
        yield _grouped(taken, geometry.batch_size, size, generator)


def _grouped(
    places: list[_Place], batch_size: int, num_batches: int, generator: np.random.Generator
) -> list[list[_Place]]:
    """Micro-batches of similar length: full ones in random order, then what is left.

    Places without a row count as well, so that how many places some steps take does not depend on what is in them.
    """
    lengths = [0]
    for _, row in places:
        lengths.append(lengths[-1] if row is None else len(row.codes))
    order = np.argsort(lengths[1:], kind="stable")
    bounds = bounds_by_rows(len(places), batch_size)
    order, _ = shuffled_batches(order, bounds, len(places) // batch_size, generator)
    starts = range(0, num_batches * batch_size, batch_size)
    return [[places[index] for index in order[at : at + batch_size]] for at in starts]


def _taken(stream: SplitStream, part: Part, epoch: int) -> np.ndarray:
    """Indices of the rows that these steps took from a share. Inside a window only the rows' lengths tell."""
    num_windows, num_steps = divmod(part.num_steps, WINDOW_STEPS)
    order = stream.order(epoch)
    taken = order[: num_windows * WINDOW_STEPS * _places_per_step(part.geometry)]
    if not num_steps or len(taken) == len(order):
        return taken
    with contextlib.closing(_windows(stream, part.geometry, epoch, num_windows)) as windows:
        batches = next(windows)[: num_steps * part.geometry.accumulation]
    return np.concatenate([taken, np.array([index for batch in batches for index, _ in batch], dtype=np.int64)])


def _places_per_step(geometry: Geometry) -> int:
    """How many positions of each share's order a step takes."""
    return geometry.batch_size * geometry.accumulation


def _share_sizes(num_rows: int, num_shares: int) -> list[int]:
    """Rows of every share, as ``SplitStream`` deals them."""
    return [(num_rows + num_shares - 1 - share) // num_shares for share in range(num_shares)]
