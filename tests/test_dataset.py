"""Row order: every row once, short padding, the same plan every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset

from finetuning.dataset import StepPlans, StepSampler, sequential_plan, step_loader, unknown_languages
from finetuning.manifest import RowFormat
from finetuning.row_index import open_rows

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


def test_a_plan_holds_four_bytes_a_row() -> None:
    plan = StepSampler(np.zeros(100_000, np.int32), batch_size=2, seed=5).epoch_plan(0)
    assert plan.order.nbytes == 400_000
    assert sequential_plan(100_000, 2).order.nbytes == 400_000


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 11])
def test_sequential_plans_are_those_of_plain_lists(num_rows: int, num_processes: int) -> None:
    batches = [list(range(at, min(at + 2, num_rows))) for at in range(0, num_rows, 2)]
    for process in range(num_processes):
        assert sequential_plan(num_rows, 2, process, num_processes) == [[b] for b in batches[process::num_processes]]


class Echo(Dataset):
    """Gives back what it is asked for."""

    def __getitem__(self, plan: Any) -> Any:
        return plan


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_takes_plans_and_lists(num_workers: int) -> None:
    plan = StepSampler(LENGTHS, batch_size=16, accumulation=2, seed=5).epoch_plan(0)
    for plans in (plan, list(plan), plan[3:]):
        assert list(step_loader(Echo(), plans, num_workers)) == list(plans)


def test_unknown_languages(write_jsonl: Callable[..., Path]) -> None:
    languages = ["Klingon", "English", "Auto", "Elvish", "Klingon"]
    rows = [{"text": "a", "audio_codes": [[n] * 16] * 2, "language": name} for n, name in enumerate(languages)]
    manifest = open_rows(write_jsonl(rows), RowFormat(), "TRAIN_JSONL")
    assert unknown_languages(manifest, {"english": 2050}) == ["Klingon", "Elvish"]
