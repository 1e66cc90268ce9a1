"""Row order: every row once, short padding, the same plan every time."""

from __future__ import annotations

import numpy as np
import pytest

from finetuning.dataset import StepSampler, sequential_plan

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
