"""The order in which an epoch visits its rows, and how they are dealt to steps, micro-batches and processes.

A position inside an epoch is a tuple of ``Part``: so many steps were taken with that geometry, then so many with the
next. It says which rows are left, and in which order they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

#: One process's micro-batches of one optimizer step, as row indices; an empty one keeps the process in step.
StepPlan = list[list[int]]

# ------------------------------------------------------------------------------------------------------- positions


@dataclass(frozen=True)
class Geometry:
    """How the rows of a step are dealt: rows of a micro-batch, micro-batches of a step, processes."""

    batch_size: int
    accumulation: int
    num_processes: int

    @property
    def rows_per_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.accumulation * self.num_processes

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, int]) -> Geometry:
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
    order stays random; each row is visited once an epoch. The steps hold ``batch_size x accumulation x processes``
    rows, the last one what is left. One process with batch size 2b and two with b see the same rows in the same steps.

    Attributes:
        lengths: (num_rows,) int, codec frames of every row.
    """

    lengths: np.ndarray
    batch_size: int
    accumulation: int = 1
    num_processes: int = 1
    seed: int = 0
    window_steps: int = 32

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.batch_size, self.accumulation, self.num_processes)

    @property
    def rows_per_step(self) -> int:
        return self.geometry.rows_per_step

    @property
    def steps_per_epoch(self) -> int:
        return self.num_steps()

    def num_steps(self, done: Iterable[Part] = ()) -> int:
        """Steps that are left in an epoch of which ``done`` is over."""
        num_rows = len(self.lengths)
        for part in merged(done):
            num_rows -= min(num_rows, part.num_steps * part.geometry.rows_per_step)
        return -(-num_rows // self.rows_per_step)

    def epoch_plan(self, epoch: int, process: int = 0, done: Iterable[Part] = ()) -> StepPlans:
        """The steps of one epoch that are left for one process; all processes get as many micro-batches in each step.

        Args:
            done: what is over. After steps of this geometry the plan goes on as if it had never stopped; the rows that
                another geometry left are planned anew.
        """
        gone, num_steps = split_position(done, self.geometry)
        rows = np.arange(len(self.lengths), dtype=np.int32)
        for stage, part in enumerate(gone):
            order = self._order(rows, part.geometry, epoch, stage)
            rows = np.sort(order[part.num_steps * part.geometry.rows_per_step :])
        order = self._order(rows, self.geometry, epoch, len(gone))
        plans = StepPlans(order, self.batch_size * self.num_processes, self.accumulation, process, self.num_processes)
        return plans[num_steps:]

    def _order(self, rows: np.ndarray, geometry: Geometry, epoch: int, stage: int) -> np.ndarray:
        """(num_rows,) the rows in the order in which a plan visits them.

        Args:
            rows: sorted.
            stage: how often the geometry has changed inside this epoch.
        """
        generator = np.random.default_rng([self.seed, epoch, stage])
        order = rows[generator.permutation(len(rows))]
        window, size = geometry.rows_per_step * self.window_steps, geometry.batch_size * geometry.num_processes
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            order[start : start + window] = shuffled_batches(part, size, generator)
        return order


def shuffled_batches(rows: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Length-sorted rows with their micro-batches (over all processes) in random order, an incomplete one last."""
    num_full = len(rows) // size
    batches = rows[: num_full * size].reshape(num_full, size)[generator.permutation(num_full)]
    return np.concatenate([batches.reshape(-1), rows[num_full * size :]])


@dataclass(frozen=True, eq=False)
class StepPlans(Sequence[StepPlan]):
    """The steps of an epoch for one process, each made when it is asked for: lists of all rows would take 100 B a row.

    Attributes:
        order: (num_rows,) row indices, micro-batch after micro-batch, each over all processes.
        batch_size: rows of a micro-batch over all processes.
        accumulation: micro-batches of a step.
        least_steps: as many there are at least; those behind the last row hold one empty micro-batch.
    """

    order: np.ndarray
    batch_size: int
    accumulation: int = 1
    process: int = 0
    num_processes: int = 1
    least_steps: int = 0

    def __len__(self) -> int:
        return max(-(-len(self.order) // self._rows_per_step), self.least_steps)

    def __getitem__(self, index: int | slice) -> Any:
        """A step's plan, or the plans of consecutive steps."""
        steps = range(len(self))[index]
        if isinstance(index, slice):
            if steps.step != 1:
                raise ValueError("steps in another order")
            order = self.order[steps.start * self._rows_per_step : steps.stop * self._rows_per_step]
            return replace(self, order=order, least_steps=len(steps))
        rows = self.order[steps * self._rows_per_step : (steps + 1) * self._rows_per_step]
        batches = [rows[at : at + self.batch_size] for at in range(0, max(len(rows), 1), self.batch_size)]
        return [batch[self.process :: self.num_processes].tolist() for batch in batches]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    @property
    def _rows_per_step(self) -> int:
        return self.batch_size * self.accumulation


def sequential_plan(
    num_rows: int, batch_size: int, process: int = 0, num_processes: int = 1, equal: bool = False
) -> StepPlans:
    """Every row once, in file order, one micro-batch a step, for validation.

    Args:
        equal: all processes get as many steps, the last of some without a row; else their numbers may differ.
    """
    rows = np.arange(num_rows, dtype=np.int32)
    least_steps = -(-num_rows // (batch_size * num_processes)) if equal else 0
    return StepPlans(rows[rows // batch_size % num_processes == process], batch_size, least_steps=least_steps)
