"""Balanced speakers: the shares that were asked for, every clip in turn, the same rows however the run is cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_resume import assert_same, result, run_to_the_end, run_until
from training import FULL, build

from finetuning.balance import PERIOD, SpeakerBalance, describe_shares, rows_by_label
from finetuning.briefing import say_order
from finetuning.sampling import Geometry, Part, StepSampler

STRENGTHS = [0.0, 0.25, 0.5, 0.9, 1.0]
SIZES = [(100, 30, 7, 1), (50, 50), (5, 200), (1, 1, 2), (1, 2) * 15, (3,)]


def labels_of(sizes: tuple[int, ...]) -> np.ndarray:
    """Rows of the speakers in mixed order."""
    return np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))


def uses_in(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """How often each row is there."""
    counted = Counter(rows.tolist())
    return np.array([counted[row] for row in range(num_rows)])


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_epoch_has_the_shares_and_every_clip_its_turn(sizes: tuple[int, ...], strength: float) -> None:
    """Rows of each speaker, counted: its share to within one row in every epoch, in the long run exactly; and after
    every epoch the uses of its clips differ by at most one."""
    labels = labels_of(sizes)
    balance = SpeakerBalance(labels, strength, seed=3)
    wanted = [sum(sizes) * size ** (1 - strength) / sum(other ** (1 - strength) for other in sizes) for size in sizes]
    uses = np.zeros(len(labels), dtype=int)
    for epoch in range(2 * PERIOD):
        rows = balance.rows(epoch)
        assert len(rows) == len(labels) and (np.diff(rows) >= 0).all()
        of_epoch = uses_in(rows, len(labels))
        uses += of_epoch
        for speaker, share in enumerate(wanted):
            assert floor(share - 1e-6) <= of_epoch[labels == speaker].sum() <= ceil(share + 1e-6)
            of_clips = uses[labels == speaker]
            assert of_clips.max() - of_clips.min() <= 1
        assert np.array_equal(balance.uses_before(epoch + 1), uses)
    of_speakers = np.bincount(labels, weights=uses)
    assert of_speakers == pytest.approx(np.array(wanted) * 2 * PERIOD, abs=2.01)


def test_at_full_strength_all_speakers_have_as_much() -> None:
    balance = SpeakerBalance(labels_of((60, 20, 10, 30)), 1.0)
    for epoch in range(10):
        assert np.bincount(labels_of((60, 20, 10, 30))[balance.rows(epoch)]).tolist() == [30] * 4


@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0])
def test_one_speaker_or_no_strength_changes_nothing(strength: float) -> None:
    for balance in (SpeakerBalance(np.zeros(17, int), strength), SpeakerBalance(labels_of((9, 5, 1)), 0.0)):
        for epoch in (0, 1, 7, 1000):
            assert balance.rows(epoch).tolist() == list(range(len(balance.speakers)))


def test_clips_follow_each_other_in_permutations() -> None:
    """Speakers of 2 and of 20 clips, 11 rows of each an epoch: what an epoch leaves of a round opens the next one."""
    labels = labels_of((2, 20))
    balance = SpeakerBalance(labels, 1.0, seed=5)
    epochs = [balance.rows(epoch) for epoch in range(20)]
    small, large = ([rows[labels[rows] == speaker].tolist() for rows in epochs] for speaker in (0, 1))
    assert {len(rows) for rows in small + large} == {11}
    assert sorted(Counter(small[0]).values()) == [5, 6] and Counter(small[0] + small[1]) == dict.fromkeys(small[0], 11)
    assert len(set(large[0])) == 11 and set(np.flatnonzero(labels == 1)) - set(large[0]) <= set(large[1])
    assert set(Counter(chain(*large)).values()) == {11}  # 20 epochs are 11 whole rounds
    assert len(set(map(tuple, large))) == 20


def test_epochs_are_a_function_of_the_seed_and_their_number() -> None:
    labels = labels_of((40, 9, 3))
    epochs = [SpeakerBalance(labels, 0.8, 5).rows(epoch).tolist() for epoch in range(6)]
    again = SpeakerBalance(labels * 7 + 2, 0.8, 5)  # what the speakers' numbers are does not matter
    assert [again.rows(epoch).tolist() for epoch in (5, 0, 3)] == [epochs[5], epochs[0], epochs[3]]
    assert SpeakerBalance(labels, 0.8, 6).rows(0).tolist() != epochs[0] != epochs[1]
    far = SpeakerBalance(labels, 0.8, 5)
    assert len(far.rows(99_999)) == 52


def test_rows_by_label() -> None:
    parts = rows_by_label(np.array([5, -1, 5, 0, -1]))
    assert [part.tolist() for part in parts] == [[1, 4], [3], [0, 2]]
    assert rows_by_label(np.zeros(0, int)) == []


# ------------------------------------------------------------------------------------------------------- in a sampler

LABELS = labels_of((150, 40, 13))
LENGTHS = np.random.default_rng(0).integers(10, 300, len(LABELS))
GEOMETRIES = [Geometry(6, 2, 1), Geometry(2, 2, 3), Geometry(3, 1, 2), Geometry(0, 3, 1, 700), Geometry(0, 2, 3, 600)]
ORDERS = {"balanced": 0, "balanced, short first": 2}


def sampler_of(geometry: Geometry, curriculum_epochs: int = 0, strength: float = 0.6) -> StepSampler:
    return StepSampler(
        LENGTHS,
        geometry.batch_size,
        geometry.accumulation,
        geometry.num_processes,
        seed=5,
        window_steps=4,
        max_frames=geometry.max_frames,
        balance=SpeakerBalance(LABELS, strength, 5),
        curriculum_epochs=curriculum_epochs,
    )


def steps_of(sampler: StepSampler, epoch: int, done: tuple[Part, ...] = ()) -> list[list[int]]:
    """Rows of every step that is left, of all processes."""
    plans = [sampler.epoch_plan(epoch, process, done) for process in range(sampler.num_processes)]
    assert {len(plan) for plan in plans} == {sampler.num_steps(epoch, done)}
    together = [list(chain(*steps)) for steps in zip(*plans, strict=True)]
    return [sorted(chain(*batches)) for batches in together]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_an_epoch_of_any_geometry_has_the_same_rows_and_goes_on_anywhere(geometry: Geometry, order: str) -> None:
    sampler = sampler_of(geometry, ORDERS[order])
    for epoch in (0, 3):
        steps = steps_of(sampler, epoch)
        assert sorted(chain(*steps)) == sampler.balance.rows(epoch).tolist()
        for num_steps in range(len(steps) + 1):
            assert steps_of(sampler, epoch, (Part(geometry, num_steps),)) == steps[num_steps:]


@pytest.mark.parametrize("order", ORDERS)
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_processes(order: str) -> None:
    """Nor do those that are left in the middle of an epoch, whoever took the steps before."""
    one, three = (sampler_of(geometry, ORDERS[order]) for geometry in GEOMETRIES[:2])
    for epoch in (0, 3):
        steps = steps_of(one, epoch)
        assert steps == steps_of(three, epoch)
        for num_steps in (1, 5, len(steps) - 1):
            assert steps_of(three, epoch, (Part(three.geometry, num_steps),)) == steps[num_steps:]
            (left_by_one, left_by_three) = (
                sorted(chain(*steps_of(to, epoch, (Part(by.geometry, num_steps),))))
                for by, to in ((one, three), (three, one))
            )
            assert left_by_one == left_by_three == sorted(chain(*steps[num_steps:]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("second", GEOMETRIES)
@pytest.mark.parametrize("first", GEOMETRIES)
def test_nothing_is_lost_when_the_geometry_changes(first: Geometry, second: Geometry, order: str) -> None:
    done: tuple[Part, ...] = ()
    rows: list[int] = []
    for geometry, num_steps in ((first, 3), (second, 2), (first, 1), (second, 1000)):
        sampler = sampler_of(geometry, ORDERS[order])
        rows += chain(*steps_of(sampler, 1, done)[:num_steps])
        done += (Part(geometry, num_steps),)
    assert sorted(rows) == sampler.balance.rows(1).tolist()


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    """13 rows of Ada, 5 of Bea; 5 steps an epoch, the last one short."""

    def make(**fields: Any) -> Any:
        rows = [row | {"speaker": "Bea" if number % 4 == 3 else "Ada"} for number, row in enumerate(demo_rows[:18])]
        valid = [row | {"speaker": name} for name, row in zip(("Ada", "Bea"), demo_rows[-2:], strict=True)]
        rows[1]["speaker"] = "Bea"
        defaults = {
            "train_jsonl": write_jsonl(rows), "validation_jsonl": write_jsonl(valid, "valid.jsonl"),
            "batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 2, "learning_rate": 1e-3,
            "warmup_steps": 1, "logging_steps": 2, "eval_steps": 3, "save_steps": 4, "resume": "auto",
        }  # fmt: skip
        return make_settings(**FULL | defaults | fields)

    return make


def test_the_settings_reach_the_sampler(settings_for: Callable, tmp_path: Path) -> None:
    run = build(settings_for(speaker_balance=1, curriculum="short_first", curriculum_epochs=2))
    manifest, sampler = run.train.dataset.manifest, run.train.sampler
    speakers = manifest.column("speaker")
    assert sampler.curriculum_epochs == 2 and sampler.seed == sampler.balance.seed == 42
    for epoch in (0, 1):
        lines = [line for step in run.train.steps(epoch) for batch in step.batches for line in batch["lines"].tolist()]
        assert Counter(speakers[line - 1] for line in lines) == {"Ada": 9, "Bea": 9}
    run.lock.close()
    plain = build(settings_for(curriculum_epochs=2, output_dir=tmp_path / "plain")).train.sampler
    assert plain.balance is None and plain.curriculum_epochs == 0


def test_a_stopped_run_goes_on_exactly(
    settings_for: Callable, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped inside the first epoch, which is short first, and killed inside the second."""
    fields = {"speaker_balance": 0.8, "curriculum": "short_first"}
    run_to_the_end(settings_for(output_dir=tmp_path / "untouched", **fields))
    run_until(settings_for(**fields), 3, "SIGTERM")
    run_until(settings_for(**fields), 9, "killed")
    assert run_to_the_end(settings_for(**fields)).progress.step == 10
    assert_same(result(tmp_path / "output"), result(tmp_path / "untouched"))


def test_what_is_said_at_the_start(settings_for: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(speaker_balance=1, curriculum="short_first")
    manifest = build(settings).train.dataset.manifest
    capsys.readouterr()
    say_order(manifest, settings)
    said = capsys.readouterr().out
    assert "Shares of an epoch (SPEAKER_BALANCE=1): Ada 13 clips (50.0%, each 0.69 times), Bea 5 clips" in said
    assert "CURRICULUM: 1 epoch(s) with the shortest clips first" in said
    of_one = manifest.select(np.flatnonzero(manifest.column("speaker") == "Ada"))
    say_order(of_one, settings_for(speaker_balance=1))
    assert capsys.readouterr().out == ""


def test_shares_in_words() -> None:
    assert describe_shares(["Ada", "Bea"], [300, 100], 0) == (
        "Shares of an epoch (SPEAKER_BALANCE=0): Ada 300 clips (75.0%), Bea 100 clips (25.0%)"
    )
    assert describe_shares(["Ada", "Bea"], [400, 100], 0.5) == (
        "Shares of an epoch (SPEAKER_BALANCE=0.5): Ada 400 clips (66.7%, each 0.83 times), "
        "Bea 100 clips (33.3%, each 1.7 times)"
    )
    names = [f"s{number}" for number in range(50)]
    assert describe_shares(names, [*range(10, 60)], 1) == (
        "Shares of an epoch (SPEAKER_BALANCE=1): 50 speakers, from s49 59 clips (2.0%, each 0.58 times) to "
        "s0 10 clips (2.0%, each 3.5 times)"
    )
