"""Row order: every row once, little padding, the same plan every time, from any step on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from finetuning.balance import SpeakerBalance
from finetuning.errors import UserError
from finetuning.sampling import (
    Geometry,
    Part,
    StepPlans,
    StepSampler,
    bounds_by_frames,
    merged,
    sequential_plan,
    sequential_plan_by_frames,
)
from finetuning.settings import load_settings

LENGTHS = np.random.default_rng(0).integers(10, 300, 1003)


def rows_of(plans: list) -> list[int]:
    return [row for step in plans for batch in step for row in batch]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 1003])
def test_every_row_reaches_exactly_one_process(num_processes: int, num_rows: int) -> None:
    sampler = StepSampler(LENGTHS[:num_rows], batch_size=4, accumulation=2, num_processes=num_processes, seed=5)
    plans = [sampler.epoch_plan(0, process) for process in range(num_processes)]
    assert sorted(row for plan in plans for row in rows_of(plan)) == list(range(num_rows))
    assert {len(plan) for plan in plans} == {sampler.steps_per_epoch}
    for steps in zip(*plans, strict=True):  # no process waits for another's micro-batch
        assert len({len(step) for step in steps}) == 1


def test_steps_are_full_but_for_the_last() -> None:
    sampler = StepSampler(LENGTHS, batch_size=4, accumulation=2, num_processes=1, seed=5)
    sizes = [sum(len(batch) for batch in step) for step in sampler.epoch_plan(0)]
    assert set(sizes[:-1]) == {8}
    assert sizes[-1] == 1003 % 8


def test_rows_of_a_step_do_not_depend_on_the_number_of_processes() -> None:
    one = StepSampler(LENGTHS, batch_size=6, accumulation=2, num_processes=1, seed=5).epoch_plan(0)
    three = StepSampler(LENGTHS, batch_size=2, accumulation=2, num_processes=3, seed=5)
    parts = [three.epoch_plan(0, process) for process in range(3)]
    for step, *shares in zip(one, *parts, strict=True):
        for index, batch in enumerate(step):
            assert sorted(batch) == sorted(row for share in shares for row in share[index])


def test_plans_repeat_and_epochs_differ() -> None:
    sampler = StepSampler(LENGTHS, batch_size=4, seed=5)
    assert sampler.epoch_plan(3) == sampler.epoch_plan(3)
    assert sampler.epoch_plan(3) != sampler.epoch_plan(4)
    assert sampler.epoch_plan(3) != StepSampler(LENGTHS, batch_size=4, seed=6).epoch_plan(3)


def test_grouping_by_length_pads_little_and_mixes_lengths() -> None:
    sampler = StepSampler(LENGTHS, batch_size=8, seed=1)
    plan = sampler.epoch_plan(0)
    padded = sum(len(batch) * LENGTHS[batch].max() for step in plan for batch in step)
    shuffled = np.random.default_rng(1).permutation(len(LENGTHS))
    random_batches = [shuffled[at : at + 8] for at in range(0, len(shuffled), 8)]
    padded_at_random = sum(len(batch) * LENGTHS[batch].max() for batch in random_batches)
    assert padded < 1.1 * LENGTHS.sum() < padded_at_random
    means = [LENGTHS[step[0]].mean() for step in plan]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3  # no drift from short to long


def test_sequential_plan_shares_rows() -> None:
    parts = [sequential_plan(11, 2, process, 3) for process in range(3)]
    assert sorted(row for part in parts for row in rows_of(part)) == list(range(11))
    assert rows_of(sequential_plan(5, 2)) == [0, 1, 2, 3, 4]


def plan_of_lists(sampler: StepSampler, epoch: int, process: int) -> list[list[list[int]]]:
    """The same plan made the plain way, as lists of all rows: orders of old runs must not move."""
    generator = np.random.default_rng([sampler.seed, epoch])
    order = generator.permutation(len(sampler.lengths))
    size = sampler.batch_size * sampler.num_processes
    window = size * sampler.accumulation * sampler.window_steps
    steps: list[list[list[int]]] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(sampler.lengths[rows], kind="stable")]
        batches = [rows[at : at + size].tolist() for at in range(0, len(rows), size)]
        incomplete = [batches.pop()] if start + window >= len(order) and len(batches[-1]) < size else []
        batches = [batches[index] for index in generator.permutation(len(batches))] + incomplete
        steps += [batches[at : at + sampler.accumulation] for at in range(0, len(batches), sampler.accumulation)]
    return [[batch[process :: sampler.num_processes] for batch in step] for step in steps]


@pytest.mark.parametrize("num_processes, accumulation", [(1, 1), (1, 3), (2, 2), (3, 1)])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 96, 384, 1003])
def test_plans_are_those_of_plain_lists(num_rows: int, num_processes: int, accumulation: int) -> None:
    sampler = StepSampler(
        LENGTHS[:num_rows],
        batch_size=2,
        accumulation=accumulation,
        num_processes=num_processes,
        seed=5,
        window_steps=16,
    )
    for epoch in (0, 3):
        for process in range(num_processes):
            plan, expected = sampler.epoch_plan(epoch, process), plan_of_lists(sampler, epoch, process)
            assert list(plan) == expected and plan == expected and len(plan) == sampler.steps_per_epoch
            assert [type(row) for row in rows_of(expected)] == [type(row) for row in rows_of(plan)]


def test_plans_can_be_cut() -> None:
    plan = StepSampler(LENGTHS, batch_size=4, accumulation=2, num_processes=2, seed=5).epoch_plan(0, 1)
    steps = list(plan)
    for cut in (
        slice(10, None),
        slice(None, 3),
        slice(5, 9),
        slice(60, None),
        slice(62, 70),
        slice(70, 80),
        slice(-2, None),
    ):
        assert isinstance(plan[cut], StepPlans) and list(plan[cut]) == steps[cut]
    assert plan[-1] == steps[-1]
    with pytest.raises(IndexError):
        plan[len(steps)]
    with pytest.raises(ValueError):
        plan[::2]


def test_a_plan_holds_four_bytes_a_row_and_a_micro_batch() -> None:
    lengths = np.full(100_000, 10)
    for plan in (
        StepSampler(lengths, 2).epoch_plan(0),
        StepSampler(lengths, 0, max_frames=29).epoch_plan(0),
        sequential_plan(100_000, 2),
        sequential_plan_by_frames(lengths, 29),
    ):
        assert (plan.order.nbytes, plan.bounds.nbytes) == (400_000, 200_004)


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 11])
def test_sequential_plans_are_those_of_plain_lists(num_rows: int, num_processes: int) -> None:
    batches = [list(range(at, min(at + 2, num_rows))) for at in range(0, num_rows, 2)]
    for process in range(num_processes):
        assert sequential_plan(num_rows, 2, process, num_processes) == [[b] for b in batches[process::num_processes]]


@pytest.mark.parametrize("num_processes", [1, 3, 4])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 6, 11])
def test_equal_sequential_plans_end_with_steps_without_rows(num_rows: int, num_processes: int) -> None:
    plans = [sequential_plan(num_rows, 2, process, num_processes, equal=True) for process in range(num_processes)]
    assert {len(plan) for plan in plans} == {-(-num_rows // (2 * num_processes))}
    for process, plan in enumerate(plans):
        unequal = list(sequential_plan(num_rows, 2, process, num_processes))
        assert list(plan) == unequal + [[[]]] * (len(plan) - len(unequal))
        assert list(plan[1:]) == list(plan)[1:] and list(plan[:1]) == list(plan)[:1]


# ------------------------------------------------------------------------------------------- from inside an epoch

BY_FRAMES = [Geometry(0, 3, 1, 700), Geometry(0, 1, 2, 250), Geometry(0, 2, 3, 600)]
GEOMETRIES = [Geometry(2, 3, 1), Geometry(3, 1, 2), Geometry(2, 2, 3), Geometry(50, 1, 1), *BY_FRAMES]


def sampler_of(geometry: Geometry, lengths: np.ndarray = LENGTHS[:203]) -> StepSampler:
    options = (geometry.batch_size, geometry.accumulation, geometry.num_processes)
    return StepSampler(lengths, *options, seed=5, window_steps=4, max_frames=geometry.max_frames)


def visited(geometry: Geometry, num_steps: int, done: Sequence[Part], epoch: int = 1) -> list[int]:
    """Rows of the next steps, over all processes."""
    sampler = sampler_of(geometry)
    plans = [sampler.epoch_plan(epoch, process, done) for process in range(geometry.num_processes)]
    assert {len(plan) for plan in plans} == {sampler.num_steps(epoch, done)}
    return [row for plan in plans for row in rows_of(list(plan)[:num_steps])]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_an_epoch_goes_on_with_exactly_the_steps_that_are_left(geometry: Geometry) -> None:
    sampler = sampler_of(geometry)
    for process in range(geometry.num_processes):
        untouched = list(sampler.epoch_plan(1, process))
        for num_steps in range(len(untouched) + 1):
            halves = (num_steps // 2, num_steps - num_steps // 2)
            for done in ((Part(geometry, num_steps),), tuple(Part(geometry, half) for half in halves)):
                assert list(sampler.epoch_plan(1, process, done)) == untouched[num_steps:]
                assert sampler.num_steps(1, done) == len(untouched) - num_steps


@pytest.mark.parametrize("second", GEOMETRIES)
@pytest.mark.parametrize("first", GEOMETRIES)
def test_no_row_twice_and_none_lost_when_the_geometry_changes(first: Geometry, second: Geometry) -> None:
    """Each part is what a run of that geometry would do from there; the last one goes to the end."""
    done: list[Part] = []
    rows: list[int] = []
    for geometry, num_steps in ((first, 3), (second, 2), (first, 1), (first, 1), (second, 1000)):
        rows += visited(geometry, num_steps, done)
        done.append(Part(geometry, num_steps))
    assert sorted(rows) == list(range(203))
    assert all(sampler_of(geometry).num_steps(1, done) == 0 for geometry in GEOMETRIES)


def test_a_plan_that_was_made_anew_is_kept() -> None:
    """Stopped and resumed again with the same number of processes, nothing is regrouped."""
    second, first = GEOMETRIES[:2]
    anew = list(sampler_of(second).epoch_plan(1, 0, (Part(first, 5),)))
    for parts in ([4], [1, 3], [0, 4], [4, 0]):
        done = (Part(first, 5), *[Part(second, part) for part in parts])
        assert list(sampler_of(second).epoch_plan(1, 0, done)) == anew[4:]
    sizes = [[len(batch) for batch in step] for step in anew]
    assert sizes[:-1] == [[2, 2, 2]] * (len(anew) - 1)
    padded = sum(len(batch) * LENGTHS[batch].max() for step in anew for batch in step)
    assert padded < 1.25 * LENGTHS[rows_of(anew)].sum()  # by the same rules: of similar length


def test_parts_without_steps_change_nothing() -> None:
    first, second = GEOMETRIES[:2]
    done = (Part(second, 0), Part(first, 2), Part(second, 0), Part(first, 1))
    assert merged(done) == [Part(first, 3)] and merged([Part(first, 0)]) == []
    assert sampler_of(first).epoch_plan(0, 0, done) == list(sampler_of(first).epoch_plan(0))[3:]


def test_positions_are_kept_as_json() -> None:
    part = Part(Geometry(4, 2, 3), 17)
    assert Part.from_json(json.loads(json.dumps(part.to_json()))) == part
    assert Geometry.from_json(json.loads(json.dumps(part.geometry.to_json()))) == part.geometry
    assert part.geometry.rows_per_step == 24 == StepSampler(LENGTHS, 4, 2, 3).rows_per_step
    assert StepSampler(LENGTHS, 4, 2, 3).geometry == part.geometry
    by_frames = Part(Geometry(0, 2, 3, 4000), 17)
    assert Part.from_json(json.loads(json.dumps(by_frames.to_json()))) == by_frames
    old = {"geometry": {"batch_size": 4, "accumulation": 2, "num_processes": 3}, "num_steps": 17}
    assert Part.from_json(old) == part  # of states from before frames could decide


# ------------------------------------------------------------------------------------------------------- by frames


def random_case(seed: int) -> tuple[Geometry, np.ndarray]:
    """Few and many rows, short and long ones, some of them over the budget, for one and several processes."""
    generator = np.random.default_rng(seed)
    num_rows = int(generator.choice([1, 2, 3, 17, 120, 400]))
    lengths = generator.integers(2, generator.choice([3, 60, 400]), num_rows, dtype=np.int32)
    max_frames = int(generator.choice([1, 40, 300, 1000, 10_000]))
    return Geometry(0, int(generator.integers(1, 5)), int(generator.integers(1, 5)), max_frames), lengths


@pytest.mark.parametrize("seed", range(150))
def test_every_row_once_and_no_process_over_its_frames(seed: int) -> None:
    geometry, lengths = random_case(seed)
    sampler = sampler_of(geometry, lengths)
    for epoch in (0, 5):
        plans = [sampler.epoch_plan(epoch, process) for process in range(geometry.num_processes)]
        assert sorted(row for plan in plans for row in rows_of(plan)) == list(range(len(lengths)))
        assert {len(plan) for plan in plans} == {sampler.num_steps(epoch)}
        for steps in zip(*plans, strict=True):
            assert len({len(step) for step in steps}) == 1
        for step in list(plans[0])[:-1]:
            assert len(step) == geometry.accumulation
        for plan in plans:
            batches = [batch for step in plan for batch in step]
            assert all(len(batch) <= 1 or lengths[batch].sum() <= geometry.max_frames for batch in batches)


def plain_bounds(lengths: list[int], max_frames: int, num_processes: int) -> list[int]:
    """The same cuts, row tuple by row tuple."""
    bounds, frames = [0], 0
    for start in range(0, len(lengths), num_processes):
        longest = max(lengths[start : start + num_processes])
        if start > bounds[-1] and frames + longest > max_frames:
            bounds.append(start)
            frames = 0
        frames += longest
    return bounds + [len(lengths)] * bool(lengths)


@pytest.mark.parametrize("seed", range(60))
def test_micro_batches_are_as_large_as_they_may_be(seed: int) -> None:
    geometry, lengths = random_case(seed)
    arguments = (geometry.max_frames, geometry.num_processes)
    assert bounds_by_frames(lengths, *arguments).tolist() == plain_bounds(lengths.tolist(), *arguments)
    assert bounds_by_frames(lengths[:0], *arguments).tolist() == [0]


def test_frames_fill_the_micro_batches_with_rows_of_similar_length() -> None:
    sampler = StepSampler(LENGTHS, 0, 2, 2, seed=1, max_frames=2000)
    plans = [sampler.epoch_plan(0, process) for process in (0, 1)]
    batches = [batch for plan in plans for step in plan for batch in step if batch]
    assert LENGTHS.sum() > 0.9 * 2000 * len(batches)
    spread = [LENGTHS[batch].max() - LENGTHS[batch].min() for batch in batches]
    assert np.mean(spread) < 0.2 * (LENGTHS.max() - LENGTHS.min())
    means = [LENGTHS[batch].mean() for batch in batches[: len(batches) // 2]]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.4  # no drift from short to long
    assert abs(sampler.rows_per_step * sampler.steps_per_epoch - len(LENGTHS)) <= sampler.steps_per_epoch


def test_plans_by_frames_repeat_and_epochs_differ() -> None:
    sampler = sampler_of(BY_FRAMES[0])
    assert sampler.epoch_plan(3) == sampler.epoch_plan(3)
    assert sampler.epoch_plan(3) != sampler.epoch_plan(4)
    assert len({sampler.num_steps(epoch) for epoch in range(50)}) > 1  # why a number of steps needs its epoch


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 40])
def test_sequential_plans_by_frames(num_rows: int, num_processes: int, equal: bool) -> None:
    """Micro-batches in file order, dealt to the processes in turn; every process within its frames."""
    lengths = LENGTHS[:num_rows]
    plans = [sequential_plan_by_frames(lengths, 280, process, num_processes, equal) for process in range(num_processes)]
    cuts = plain_bounds(lengths.tolist(), 280, 1)
    batches = [list(range(*pair)) for pair in pairwise(cuts)]
    most = -(-len(batches) // num_processes)
    for process, plan in enumerate(plans):
        own = [[batch] for batch in batches[process::num_processes]]
        assert list(plan) == own + [[[]]] * (most - len(own) if equal else 0)


@pytest.mark.parametrize("by_frames", [False, True])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("num_processes", [1, 3, 4])
def test_sequential_plans_keep_groups_apart(num_processes: int, equal: bool, by_frames: bool) -> None:
    """Group after group, each cut as it would be alone, and dealt on from where the group before it ended."""
    groups = np.random.default_rng(2).integers(0, 4, 50) * 3
    batches = []
    for group in (0, 3, 6, 9):
        rows = np.flatnonzero(groups == group)
        cuts = plain_bounds(LENGTHS[rows].tolist(), 400, 1) if by_frames else [*range(0, len(rows), 3), len(rows)]
        batches += [rows[start:stop].tolist() for start, stop in pairwise(cuts)]
    for process in range(num_processes):
        arguments = (process, num_processes, equal, groups)
        if by_frames:
            plan = sequential_plan_by_frames(LENGTHS[:50], 400, *arguments)
        else:
            plan = sequential_plan(50, 3, *arguments)
        own = [[batch] for batch in batches[process::num_processes]]
        most = -(-len(batches) // num_processes)
        assert list(plan) == own + [[[]]] * (most - len(own) if equal else 0)


# ------------------------------------------------------------------------------------------------------ short first


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_first_epochs_take_the_shortest_rows_first(geometry: Geometry) -> None:
    """Each row once, micro-batch after micro-batch no shorter than the one before; also after another geometry."""
    plain, sampler = sampler_of(geometry), replace(sampler_of(geometry), curriculum_epochs=2)
    for epoch in (0, 1):
        for done in ((), (Part(geometry, 2),), (Part(GEOMETRIES[2], 2), Part(geometry, 1))):
            plans = [sampler.epoch_plan(epoch, process, done) for process in range(geometry.num_processes)]
            assert {len(plan) for plan in plans} == {sampler.num_steps(epoch, done)}
            together = [
                [row for batches in zip(*steps, strict=True) for batch in batches for row in batch]
                for steps in zip(*plans, strict=True)
            ]
            steps = [LENGTHS[rows] for rows in together]
            assert all(before.max() <= after.min() for before, after in pairwise(steps))
            taken = sum(len(rows) for rows in together)
            assert len({row for rows in together for row in rows}) == taken and (done or taken == 203)
    for process in range(geometry.num_processes):
        assert list(sampler.epoch_plan(2, process)) == list(plain.epoch_plan(2, process))


def test_rows_of_the_same_length_are_shuffled_in_every_epoch() -> None:
    sampler = StepSampler(np.array([5, 3, 5, 3] * 20), 4, seed=1, curriculum_epochs=3)
    orders = [rows_of(sampler.epoch_plan(epoch)) for epoch in range(3)]
    assert rows_of(sampler.epoch_plan(1)) == orders[1] and len(set(map(tuple, orders))) == 3
    assert all(set(order[:40]) == {row for row in range(80) if row % 2} for order in orders)


def test_one_of_rows_and_frames_decides() -> None:
    for batch_size, max_frames in ((0, None), (2, 100)):
        with pytest.raises(AssertionError):
            Geometry(batch_size, 1, 1, max_frames)
    with pytest.raises(AssertionError):
        BY_FRAMES[0].rows_per_step  # noqa: B018 - it varies


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 2}, "takes the place of BATCH_SIZE; unset one of them"),
        ({"effective_batch_size": 8}, "leaves the number of rows of a step open, and EFFECTIVE_BATCH_SIZE needs it"),
        ({"lr_scaling": "sqrt"}, "leaves the number of rows of a step open, and LR_SCALING needs it"),
        ({"data_mode": "direct", "dataset_name": "a/b"}, "needs the lengths of all rows ahead"),
    ],
)
def test_settings_that_do_not_go_with_frames_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_settings({"max_frames_per_batch": 4000, **fields}, environment={})
    (line,) = str(refused.value).splitlines()[1:]
    assert line.startswith(f"  - MAX_FRAMES_PER_BATCH: {message}")
    assert load_settings({"max_frames_per_batch": 4000}, environment={}).max_frames_per_batch == 4000
    assert load_settings(fields | {"effective_batch_size": None}, environment={}).max_frames_per_batch is None


# ------------------------------------------------------------------------------------------------- rows that repeat


@pytest.mark.parametrize("curriculum", [0, 1], ids=["shuffled", "shortest first"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 4), (8, 1), (16, 1)])
def test_no_step_holds_a_clip_twice_where_that_can_be(curriculum: int, batch_size: int, accumulation: int) -> None:
    """A thousand clips of one speaker and twenty of another, as much of each: every one of the twenty 25 times."""
    speakers = np.repeat([0, 1], [1000, 20])
    lengths = np.random.default_rng(0).integers(10, 200, len(speakers))
    balance = SpeakerBalance(speakers, 1.0, 1)
    sampler = StepSampler(lengths, batch_size, accumulation, seed=1, balance=balance, curriculum_epochs=curriculum)
    steps = [[row for batch in step for row in batch] for step in sampler.epoch_plan(0)]
    assert all(len(step) == len(set(step)) for step in steps)
    assert sorted(row for step in steps for row in step) == balance.rows(0).tolist()
    halves = [[row for step in half for row in step] for half in (steps[: len(steps) // 2], steps[len(steps) // 2 :])]
    if not curriculum:  # and its uses lie all over the epoch
        assert all(abs(half.count(1010) - 12.5) < 4 for half in halves)


def test_what_must_repeat_is_spread() -> None:
    """Half of all rows are one clip: no batch of eight can do without, and none has many more than its share."""
    sampler = StepSampler(np.full(100, 9), 8, seed=1, balance=SpeakerBalance(np.repeat([0, 1], [99, 1]), 1.0))
    most = [batch.count(99) for (batch,) in sampler.epoch_plan(0)]
    assert sum(most) == 50 and max(most) <= 5


def test_frames_hold_when_repeats_are_exchanged() -> None:
    speakers = np.repeat([0, 1], [1000, 20])
    lengths = np.random.default_rng(0).integers(10, 200, len(speakers))
    sampler = StepSampler(lengths, 0, 2, seed=1, balance=SpeakerBalance(speakers, 1.0, 1), max_frames=2000)
    batches = [batch for step in sampler.epoch_plan(0) for batch in step]
    assert all(lengths[batch].sum() <= 2000 and len(set(batch)) == len(batch) for batch in batches)


def test_the_curriculum_goes_by_the_clips_own_lengths() -> None:
    own, whole = np.array([5, 1, 3, 2, 4]), np.array([5, 100, 3, 2, 4])
    sampler = StepSampler(whole, 1, seed=1, curriculum_epochs=1, own_lengths=own)
    assert [row for step in sampler.epoch_plan(0) for batch in step for row in batch] == [1, 3, 2, 4, 0]
