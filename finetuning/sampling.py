"""The order in which an epoch visits its rows, and how they are dealt to steps, micro-batches and processes.

A position inside an epoch is a tuple of ``Part``: so many steps were taken with that geometry, then so many with the
next. It says which rows are left, and in which order they come.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from finetuning.balance import SpeakerBalance, rows_by_label

#: A row that a micro-batch would hold twice goes to one that is at most so far away.
MAX_EXCHANGE_DISTANCE = 64
#: One process's micro-batches of one optimizer step, as row indices; an empty one keeps the process in step.
StepPlan = list[list[int]]

# ------------------------------------------------------------------------------------------------------- positions


@dataclass(frozen=True)
class Geometry:
    """How the rows of a step are dealt: to micro-batches, and to processes.

    Attributes:
        batch_size: rows of one process's micro-batch; 0 where frames decide.
        accumulation: micro-batches of a step.
        max_frames: codec frames of one process's micro-batch, at most; None where rows decide.
    """

    batch_size: int
    accumulation: int
    num_processes: int
    max_frames: int | None = None

    def __post_init__(self) -> None:
        assert bool(self.batch_size) != bool(self.max_frames), "rows or frames"

    @property
    def rows_per_batch(self) -> int:
        """Of a micro-batch over all processes, where rows decide."""
        assert self.max_frames is None, "it varies"
        return self.batch_size * self.num_processes

    @property
    def rows_per_step(self) -> int:
        """Over all processes, where rows decide."""
        return self.rows_per_batch * self.accumulation

    def to_json(self) -> dict[str, int | None]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, int | None]) -> Geometry:
        return cls(**value)


@dataclass(frozen=True)
class Part:
    """So many steps of an epoch that were taken with one geometry."""

    geometry: Geometry
    num_steps: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Part:
        return cls(Geometry.from_json(value["geometry"]), value["num_steps"])


def merged(done: Iterable[Part]) -> list[Part]:
    """The same position without empty parts, and with one part for neighbours of the same geometry."""
    parts: list[Part] = []
    for part in done:
        if parts and parts[-1].geometry == part.geometry:
            parts[-1] = Part(part.geometry, parts[-1].num_steps + part.num_steps)
        elif part.num_steps:
            parts.append(part)
    return parts


def split_position(done: Iterable[Part], geometry: Geometry) -> tuple[list[Part], int]:
    """(parts of other geometries, whose rows are gone, and how many steps of the plan of what they left are done)."""
    parts = merged(done)
    if parts and parts[-1].geometry == geometry:
        return parts[:-1], parts[-1].num_steps
    return parts, 0


# -------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class StepSampler:
    """The plan of every epoch: a pure function of its fields, the epoch's number, and the position inside it.

    Rows are shuffled, then grouped by length inside windows of many steps, so that a micro-batch pads little and the
    order stays random; each row is visited once an epoch, unless speakers are balanced. A micro-batch is cut from such
    rows for all processes together and then dealt to them: ``batch_size x processes`` rows, or as many as keep every
    process within ``max_frames``. A step takes the next ``accumulation`` of them, the last one what is left. One
    process with batch size 2b and two with b see the same rows in the same steps.

    Attributes:
        lengths: (num_rows,) int, codec frames of every row.
        batch_size, max_frames: see ``Geometry``.
        balance: which rows an epoch visits, as many as there are; None for each once.
        curriculum_epochs: so many epochs visit their rows in the order of their lengths, shortest first.
        own_lengths: (num_rows,) what that order goes by, where ``lengths`` counts more than the clips.
    """

    lengths: np.ndarray
    batch_size: int
    accumulation: int = 1
    num_processes: int = 1
    seed: int = 0
    window_steps: int = 32
    max_frames: int | None = None
    balance: SpeakerBalance | None = None
    curriculum_epochs: int = 0
    own_lengths: np.ndarray | None = None

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.batch_size, self.accumulation, self.num_processes, self.max_frames)

    @property
    def rows_per_step(self) -> int:
        """Over all processes; where frames decide, on average."""
        if self.max_frames is None:
            return self.geometry.rows_per_step
        return round(len(self.lengths) / max(1, self.steps_per_epoch))

    @property
    def steps_per_epoch(self) -> int:
        """Where frames decide, epochs differ a little; that of the first."""
        return self.num_steps(0)

    def num_steps(self, epoch: int, done: Iterable[Part] = ()) -> int:
        """Steps that are left in an epoch of which ``done`` is over. Where frames decide, the epoch must be planned."""
        parts = merged(done)
        if any(geometry.max_frames for geometry in (self.geometry, *(part.geometry for part in parts))):
            return len(self.epoch_plan(epoch, done=parts))
        num_rows = len(self.lengths)
        for part in parts:
            num_rows -= min(num_rows, part.num_steps * part.geometry.rows_per_step)
        return -(-num_rows // self.rows_per_step)

    def epoch_plan(self, epoch: int, process: int = 0, done: Iterable[Part] = ()) -> StepPlans:
        """The steps of one epoch that are left for one process; all processes get as many micro-batches in each step.

        Args:
            done: what is over. After steps of this geometry the plan goes on as if it had never stopped; the rows that
                another geometry left are planned anew.
        """
        gone, num_steps = split_position(done, self.geometry)
        rows = self.balance.rows(epoch) if self.balance else np.arange(len(self.lengths), dtype=np.int32)
        for stage, part in enumerate(gone):
            order, bounds = self._order(rows, part.geometry, epoch, stage)
            num_batches = min(part.num_steps * part.geometry.accumulation, len(bounds) - 1)
            rows = np.sort(order[bounds[num_batches] :])
        order, bounds = self._order(rows, self.geometry, epoch, len(gone))
        return StepPlans(order, bounds, self.accumulation, process, self.num_processes)[num_steps:]

    def _order(self, rows: np.ndarray, geometry: Geometry, epoch: int, stage: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows in the order in which a plan visits them, and the bounds of its micro-batches; see ``StepPlans``.

        Args:
            rows: sorted; a row may stand there more than once.
            stage: how often the geometry has changed inside this epoch.
        """
        generator = np.random.default_rng([self.seed, epoch, stage])
        order = rows[generator.permutation(len(rows))] if self.balance is None else spread_repeats(rows, generator)
        if epoch < self.curriculum_epochs:
            lengths = self.lengths if self.own_lengths is None else self.own_lengths
            order = order[np.argsort(lengths[order], kind="stable")]
            return self._without_repeats(order, self._cut(order, geometry)[0], geometry)
        window, sizes = self._rows_per_window(geometry), [np.zeros(0, dtype=np.int32)]
        for start in range(0, len(order), window):
            part = order[start : start + window]
            # By length; of a row that comes several times each use among others.
            uses = 0 * part if self.balance is None else number_of_use(part)
            part = part[np.lexsort((self.lengths[part], uses))]
            order[start : start + window], sizes_of_part = shuffled_batches(part, *self._cut(part, geometry), generator)
            sizes.append(sizes_of_part)
        return self._without_repeats(order, _bounds_of(np.concatenate(sizes)), geometry)

    def _without_repeats(
        self, order: np.ndarray, bounds: np.ndarray, geometry: Geometry
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same micro-batches, each without a row that stands in it twice, as far as that goes; where rows decide,
        the same of steps."""
        if self.balance is None:
            return order, bounds
        if geometry.max_frames is None:
            steps = np.unique(np.append(bounds[:: geometry.accumulation], bounds[-1]))
            return exchange_repeats(order, steps, self.lengths), bounds

        def fits(batch: np.ndarray) -> bool:
            tuples = np.arange(0, len(batch), geometry.num_processes)
            longest = np.maximum.reduceat(self.lengths[batch], tuples)
            return len(longest) == 1 or int(longest.sum()) <= geometry.max_frames

        return exchange_repeats(order, bounds, self.lengths, fits), bounds

    def _cut(self, rows: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, int]:
        """The bounds of the micro-batches of length-sorted rows, and how many of them are full."""
        if geometry.max_frames is None:
            return bounds_by_rows(len(rows), geometry.rows_per_batch), len(rows) // geometry.rows_per_batch
        bounds = bounds_by_frames(self.lengths[rows], geometry.max_frames, geometry.num_processes)
        return bounds, len(bounds) - 1

    def _rows_per_window(self, geometry: Geometry) -> int:
        """Rows of about ``window_steps`` steps, as many for each process."""
        if geometry.max_frames is None:
            return geometry.rows_per_step * self.window_steps
        rows_per_batch = max(1, geometry.max_frames * len(self.lengths) // max(1, int(self.lengths.sum())))
        return rows_per_batch * geometry.num_processes * geometry.accumulation * self.window_steps


def spread_repeats(rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The rows in random order, where the uses of a row that stands there k times lie k-ths of the whole apart.

    Args:
        rows: sorted.
    """
    distinct, counts = np.unique(rows, return_counts=True)
    starts = np.repeat(generator.random(len(distinct)), counts)
    return rows[np.argsort((number_of_use(rows) + starts) / np.repeat(counts, counts), kind="stable")]


def number_of_use(rows: np.ndarray) -> np.ndarray:
    """(num_rows,) which use of its row each one is, from 0."""
    order = np.argsort(rows, kind="stable")
    _, first, counts = np.unique(rows[order], return_index=True, return_counts=True)
    numbers = np.empty(len(rows), dtype=np.int64)
    numbers[order] = np.arange(len(rows)) - np.repeat(first, counts)
    return numbers


def exchange_repeats(
    order: np.ndarray,
    bounds: np.ndarray,
    lengths: np.ndarray,
    fits: Callable[[np.ndarray], bool] = lambda _: True,
) -> np.ndarray:
    """The order with rows exchanged between near batches, for ones of similar length, so that none holds a row twice
    where that can be.

    Args:
        bounds: of the batches; see ``StepPlans``.
        lengths: (num_rows,) codec frames of every row.
        fits: whether a batch may be like this.
    """
    batches = np.split(order, bounds[1:-1])
    held = [Counter(batch.tolist()) for batch in batches]
    for number, batch in enumerate(batches):
        if len(held[number]) < len(batch):
            _exchange(number, batches, held, lengths, fits)
    return np.concatenate(batches)


def _exchange(
    number: int,
    batches: list[np.ndarray],
    held: list[Counter[int]],
    lengths: np.ndarray,
    fits: Callable[[np.ndarray], bool],
) -> None:
    """Gives a batch's repeats to the nearest ones that do not hold these rows, else to some that hold them less often,
    for rows that it does not hold."""
    _, first = np.unique(batches[number], return_index=True)
    for place in np.setdiff1d(np.arange(len(batches[number])), first).tolist():
        row = int(batches[number][place])
        near = list(_nearest(number, len(batches)))
        without = [other for other in near if not held[other][row]]
        fewer = sorted(near, key=lambda other, row=row: held[other][row])
        fewer = [other for other in fewer if 0 < held[other][row] <= held[number][row] - 2]
        for other in (*without, *fewer):
            if _swap(number, place, other, batches, held, lengths, fits):
                break


def _swap(
    number: int,
    place: int,
    other: int,
    batches: list[np.ndarray],
    held: list[Counter[int]],
    lengths: np.ndarray,
    fits: Callable[[np.ndarray], bool],
) -> bool:
    """Exchanges a row of one batch with the one of another that is most alike in length and new to the first."""
    row, theirs = batches[number][place], batches[other].copy()
    new = np.array([at for at, one in enumerate(theirs.tolist()) if one not in held[number]], dtype=np.int64)
    if not len(new):
        return False
    at = new[np.argmin(np.abs(lengths[theirs[new]] - lengths[row]))]
    mine = batches[number].copy()
    mine[place], theirs[at] = theirs[at], row
    if not (fits(mine) and fits(theirs)):
        return False
    batches[number], batches[other] = mine, theirs
    held[number], held[other] = Counter(mine.tolist()), Counter(theirs.tolist())
    return True


def _nearest(number: int, count: int) -> Iterator[int]:
    """The numbers around one, nearest first, at most MAX_EXCHANGE_DISTANCE away."""
    for distance in range(1, MAX_EXCHANGE_DISTANCE + 1):
        if number + distance < count:
            yield number + distance
        if number >= distance:
            yield number - distance


def shuffled_batches(
    rows: np.ndarray, bounds: np.ndarray, num_full: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows with their micro-batches (over all processes) in random order, and the sizes of these in that order.

    Args:
        bounds: of the micro-batches; see ``StepPlans``.
        num_full: so many are shuffled; what is behind them stays last.
    """
    batches = np.concatenate([generator.permutation(num_full), np.arange(num_full, len(bounds) - 1)])
    sizes = np.diff(bounds)[batches]
    shifts = bounds[batches] - _bounds_of(sizes)[:-1]  # of each micro-batch: where it was minus where it goes
    return rows[np.arange(len(rows)) + np.repeat(shifts, sizes)], sizes


def bounds_by_rows(num_rows: int, size: int) -> np.ndarray:
    """(num_batches + 1,) int32, the bounds of micro-batches of so many rows, the last one what is left."""
    return np.append(np.arange(0, num_rows, size, dtype=np.int32), np.int32(num_rows))


def bounds_by_frames(lengths: np.ndarray, max_frames: int, num_processes: int = 1) -> np.ndarray:
    """(num_batches + 1,) int32, the bounds of micro-batches that are as large as they may be.

    A micro-batch grows by tuples of rows, one for each process, that count as the longest of them: so no process gets
    more than ``max_frames``, unless it gets a single row that is longer.

    Args:
        lengths: (num_rows,) codec frames, in the order in which the rows are dealt.
    """
    tuples = np.arange(0, len(lengths), num_processes)
    longest = np.maximum.reduceat(lengths, tuples) if len(tuples) else np.zeros(0)
    frames = np.cumsum(longest, dtype=np.int64).tolist()  # up to the end of each tuple
    stops, taken = [0], 0
    while stops[-1] < len(frames):
        stop = bisect_right(frames, taken + max_frames, lo=stops[-1])
        stops.append(max(stop, stops[-1] + 1))
        taken = frames[stops[-1] - 1]
    return np.minimum(np.array(stops, dtype=np.int32) * num_processes, len(lengths)).astype(np.int32)


def _bounds_of(sizes: np.ndarray) -> np.ndarray:
    """(num_batches + 1,) int32, the bounds of micro-batches of these sizes."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


@dataclass(frozen=True, eq=False)
class StepPlans(Sequence[StepPlan]):
    """The steps of an epoch for one process, each made when it is asked for: lists of all rows would take 100 B a row.

    Attributes:
        order: (num_rows,) row indices, micro-batch after micro-batch, each over all processes.
        bounds: (num_batches + 1,) where in ``order`` each micro-batch begins, and where the last one ends.
        accumulation: micro-batches of a step.
        least_steps: as many there are at least; those behind the last row hold one empty micro-batch.
    """

    order: np.ndarray
    bounds: np.ndarray
    accumulation: int = 1
    process: int = 0
    num_processes: int = 1
    least_steps: int = 0

    def __len__(self) -> int:
        num_batches = max(len(self.bounds) - 1, 0)
        return max(-(-num_batches // self.accumulation), self.least_steps)

    def __getitem__(self, index: int | slice) -> Any:
        """A step's plan, or the plans of consecutive steps."""
        steps = range(len(self))[index]
        if isinstance(index, slice):
            if steps.step != 1:
                raise ValueError("steps in another order")
            return replace(self, bounds=self._bounds(steps.start, steps.stop), least_steps=len(steps))
        bounds = self._bounds(steps, steps + 1).tolist()
        batches = [self.order[start:stop] for start, stop in pairwise(bounds)] or [self.order[:0]]
        return [batch[self.process :: self.num_processes].tolist() for batch in batches]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def _bounds(self, start: int, stop: int) -> np.ndarray:
        """The bounds of some steps' micro-batches."""
        return self.bounds[start * self.accumulation : stop * self.accumulation + 1]


def sequential_plan(
    num_rows: int,
    batch_size: int,
    process: int = 0,
    num_processes: int = 1,
    equal: bool = False,
    groups: np.ndarray | None = None,
) -> StepPlans:
    """Every row once, one micro-batch of so many rows a step, for validation.

    Args:
        equal: all processes get as many steps, the last of some without a row; else their numbers may differ.
        groups: (num_rows,) int; no micro-batch has rows of two groups, and group follows group. None for one group.
            Within a group rows come in file order.
    """
    parts = _groups_of(num_rows, groups)
    bounds = [bounds_by_rows(len(rows), batch_size) for rows in parts]
    return _dealt_in_turn(parts, bounds, process, num_processes, equal)


def sequential_plan_by_frames(
    lengths: np.ndarray,
    max_frames: int,
    process: int = 0,
    num_processes: int = 1,
    equal: bool = False,
    groups: np.ndarray | None = None,
) -> StepPlans:
    """The same with micro-batches of at most so many codec frames, or a single row.

    Args:
        lengths: (num_rows,) codec frames of every row.
    """
    parts = _groups_of(len(lengths), groups)
    bounds = [bounds_by_frames(lengths[rows], max_frames) for rows in parts]
    return _dealt_in_turn(parts, bounds, process, num_processes, equal)


def _groups_of(num_rows: int, groups: np.ndarray | None) -> list[np.ndarray]:
    """The rows of each group, sorted."""
    return [np.arange(num_rows, dtype=np.int32)] if groups is None else rows_by_label(groups)


def _dealt_in_turn(
    parts: Sequence[np.ndarray], bounds: Sequence[np.ndarray], process: int, num_processes: int, equal: bool
) -> StepPlans:
    """Micro-batch after micro-batch to one process after the other.

    Args:
        parts, bounds: rows, and the bounds of the micro-batches that each part of them is cut into.
    """
    sizes = np.concatenate([np.zeros(0, dtype=np.int32), *map(np.diff, bounds)])
    rows = np.concatenate([np.zeros(0, dtype=np.int32), *parts])
    rows = rows[np.repeat(np.arange(len(sizes)) % num_processes == process, sizes)]
    least_steps = -(-len(sizes) // num_processes) if equal else 0
    return StepPlans(rows, _bounds_of(sizes[process::num_processes]), least_steps=least_steps)
