"""Row order: every row once, little padding, the same plan every time, from any step on; batches and damaged rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import load_stock
from torch.utils.data import Dataset

from finetuning.base_model import load_tokenizer
from finetuning.dataset import (
    Batch,
    RowEncoder,
    SkippedRow,
    StepDataset,
    count_tokens,
    make_step,
    split_batch,
    step_loader,
    unknown_languages,
)
from finetuning.manifest import MIN_CODEC_FRAMES, RowFormat
from finetuning.objective import TrainingObjective, step_loss
from finetuning.prompt import LayoutIds
from finetuning.row_index import Manifest, open_rows
from finetuning.sampling import Geometry, Part, StepPlans, StepSampler, merged, sequential_plan
from finetuning.tiny_model import embedded_model_folder

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

GEOMETRIES = [Geometry(2, 3, 1), Geometry(3, 1, 2), Geometry(2, 2, 3), Geometry(50, 1, 1)]


def sampler_of(geometry: Geometry, num_rows: int = 203) -> StepSampler:
    options = (geometry.batch_size, geometry.accumulation, geometry.num_processes)
    return StepSampler(LENGTHS[:num_rows], *options, seed=5, window_steps=4)


def visited(geometry: Geometry, num_steps: int, done: Sequence[Part], epoch: int = 1) -> list[int]:
    """Rows of the next steps, over all processes."""
    sampler = sampler_of(geometry)
    plans = [sampler.epoch_plan(epoch, process, done) for process in range(geometry.num_processes)]
    assert {len(plan) for plan in plans} == {sampler.num_steps(done)}
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
                assert sampler.num_steps(done) == len(untouched) - num_steps


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
    assert all(sampler_of(geometry).num_steps(done) == 0 for geometry in GEOMETRIES)


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


# ----------------------------------------------------------------------------------------------------------- loader


class Echo(Dataset):
    """Gives back what it is asked for."""

    def __getitem__(self, plan: Any) -> Any:
        return plan


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_takes_plans_and_lists(num_workers: int) -> None:
    plan = StepSampler(LENGTHS, batch_size=16, accumulation=2, seed=5).epoch_plan(0)
    for plans in (plan, list(plan), plan[3:]):
        assert list(step_loader(Echo(), plans, num_workers)) == list(plans)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_walk_leaves_the_random_state_alone(num_workers: int) -> None:
    """Training that goes on has made fewer loaders than training that was never stopped."""
    plan = StepSampler(LENGTHS, batch_size=64, seed=5).epoch_plan(0)
    before = torch.random.get_rng_state()
    assert len(list(step_loader(Echo(), plan, num_workers))) == len(plan)
    assert torch.equal(torch.random.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------- batches

NUM_GOOD, NUM_ROWS = 7, 10


@pytest.fixture(scope="module")
def encoder() -> RowEncoder:
    folder = embedded_model_folder("tiny-random")
    ids = LayoutIds.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return RowEncoder(load_tokenizer(folder), ids, {"reference_speaker": 0, "other": 1}, {})


@pytest.fixture
def rows(write_jsonl: Callable[..., Path]) -> Manifest:
    """Ten rows of very different lengths, blank lines between them, so that row n stands in line 2n + 1."""
    generator = np.random.default_rng(0)
    codes = [generator.integers(0, 2048, (2 + number * 7 % 23, 16)).tolist() for number in range(NUM_ROWS)]
    rows = [
        {"text": f"Sentence {number}" + " and so on" * (number * 5 % 7) + ".", "audio_codes": codes[number]}
        for number in range(NUM_ROWS)
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    return open_rows(write_jsonl(lines), RowFormat(), "TRAIN_JSONL")


def assert_equal(batch: Batch, other: Batch) -> None:
    assert batch.keys() == other.keys()
    for name in batch:
        assert torch.equal(batch[name], other[name]) and batch[name].dtype == other[name].dtype, name


def damaged(manifest: Manifest, old: bytes, new: bytes) -> Manifest:
    """The same file with other bytes in one place."""
    content = manifest.arrow_file.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    damaged_file = manifest.arrow_file.with_name("damaged.arrow")
    damaged_file.write_bytes(content.replace(old, new))
    return Manifest(damaged_file)


def three_damaged_rows(manifest: Manifest) -> Manifest:
    """Row 2 has no UTF-8 text, row 5 a code that no table has, row 8 an empty text."""
    codes = manifest[5]["codes"]
    wrong = codes.copy()
    wrong[-1, 3] = 2048
    manifest = damaged(manifest, b"Sentence 2", b"Sentence \xff")
    manifest = damaged(manifest, codes.tobytes(), wrong.tobytes())
    text = manifest[8]["text"].encode()
    return damaged(manifest, text, b" " * len(text))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_rows_are_left_out_and_listed(rows: Manifest, encoder: RowEncoder, num_workers: int) -> None:
    """What is left of each micro-batch is what the good rows alone give; one of them loses all."""
    plans = [[[0, 2, 1], [5, 2]], [[3, 8, 4]], [[], [9]]]
    good = [[[0, 1], []], [[3, 4]], [[], [9]]]
    steps = list(step_loader(StepDataset(three_damaged_rows(rows), encoder), plans, num_workers))
    expected = list(step_loader(StepDataset(rows, encoder), good, num_workers))
    for step, other in zip(steps, expected, strict=True):
        for batch, other_batch in zip(step.batches, other.batches, strict=True):
            assert_equal(batch, other_batch)
        assert other.skipped == []
    assert [[row.line for row in step.skipped] for step in steps] == [[5, 11, 5], [17], []]
    reasons = {row.line: row.reason for step in steps for row in step.skipped}
    assert "can't decode byte 0xff" in reasons[5] and reasons[17] == "text is empty"
    assert reasons[11].startswith("audio_codes out of range") and "2048" in reasons[11]
    assert [float(batch["weight"]) for step in steps for batch in step.batches] == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_a_dummy_counts_nothing_and_is_a_sound_batch(rows: Manifest, encoder: RowEncoder) -> None:
    dataset = StepDataset(rows, encoder)
    dummy, real = dataset[[[]]].batches[0], dataset.batch([0, 1])
    assert {name: tensor.dtype for name, tensor in dummy.items()} == {name: real[name].dtype for name in real}
    assert dummy["codes"].shape == (MIN_CODEC_FRAMES, 16) and dummy["lines"].tolist() == [0]
    assert count_tokens([dummy]) == (0, 0) and count_tokens([dummy, real]) == count_tokens([real])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"codes": np.zeros((4, 15), np.int16)}, "shape 4 x 15"),
        ({"codes": np.zeros((1, 16), np.int16)}, "1 frame(s)"),
        ({"codes": np.full((4, 16), -1, np.int16)}, "out of range: -1"),
        ({"codes": np.full((4, 16), 2048, np.int16)}, "out of range: 2048"),
        ({"text": ""}, "text is empty"),
        ({"text": None}, "text is empty"),
        ({"speaker": "Nobody"}, 'speaker "Nobody" has no vector'),
        ({"speaker": None}, 'speaker "" has no vector'),
    ],
)
def test_what_cannot_be_encoded_names_its_reason(
    rows: Manifest, encoder: RowEncoder, change: dict[str, Any], reason: str
) -> None:
    good = rows[1]
    (batch,), skipped = make_step([[good | change, good | {"line": 5}, SkippedRow(9, "lost")]], encoder)
    assert [row.line for row in skipped] == [3, 9] and reason in skipped[0].reason and "\n" not in skipped[0].reason
    assert batch["lines"].tolist() == [5] and batch["weight"] == 1


def test_a_row_that_cannot_be_read_at_all(rows: Manifest, encoder: RowEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise OSError("Message metadata\ntoo long")

    monkeypatch.setattr(Manifest, "__getitem__", broken)
    assert StepDataset(rows, encoder).read(3) == SkippedRow(7, "Message metadata too long")
    monkeypatch.setattr(Manifest, "column", broken)
    assert StepDataset(rows, encoder)[[[3]]].skipped == [SkippedRow(0, "Message metadata too long")]


def test_a_batch_of_the_library_does_not_hide_a_damaged_row(rows: Manifest, encoder: RowEncoder) -> None:
    dataset = StepDataset(three_damaged_rows(rows), encoder)
    assert dataset.batch([0, 1])["lines"].tolist() == [1, 3]
    with pytest.raises(ValueError, match="line 11: audio_codes out of range"):
        dataset.batch([0, 5])


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8, 10, 99])
def test_parts_of_a_batch_are_what_their_rows_alone_give(rows: Manifest, encoder: RowEncoder, num_parts: int) -> None:
    dataset, order = StepDataset(rows, encoder), [3, 9, 0, 7, 1, 5, 2, 8, 6, 4]
    batch = dataset.batch(order)
    batch["weight"] = torch.tensor(0.5)
    parts = split_batch(batch, num_parts)
    groups = np.array_split(order, min(num_parts, len(order)))
    assert len(parts) == len(groups)
    for part, group in zip(parts, groups, strict=True):
        assert part["weight"] == 0.5
        assert_equal(part | {"weight": torch.tensor(1.0)}, dataset.batch(group.tolist()))


def test_losses_and_gradients_of_the_parts_add_up(rows: Manifest, encoder: RowEncoder, one_thread: None) -> None:
    model = load_stock(embedded_model_folder("tiny-random")).model
    vectors = torch.randn(2, model.config.talker_config.hidden_size, generator=torch.Generator().manual_seed(1))
    objective = TrainingObjective(model.talker, vectors).train()
    whole = StepDataset(rows, encoder).batch(range(NUM_ROWS))
    counts = count_tokens([whole])

    def summed(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        objective.zero_grad()
        losses = []
        for batch in batches:
            loss = step_loss(objective(batch), *counts, 0.3)
            loss.backward()
            losses.append(loss.detach())
        gradients = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
        return torch.stack(losses).sum(), torch.cat(gradients)

    loss, gradient = summed([whole])
    for num_parts in (2, 4, 8):
        parts = split_batch(whole, num_parts)
        assert count_tokens(parts) == counts
        loss_of_parts, gradient_of_parts = summed(parts)
        torch.testing.assert_close(loss_of_parts, loss, rtol=1e-6, atol=0)
        assert (gradient_of_parts - gradient).norm() < 1e-6 * gradient.norm()


def test_unknown_languages(write_jsonl: Callable[..., Path]) -> None:
    languages = ["Klingon", "English", "Auto", "Elvish", "Klingon"]
    rows = [{"text": "a", "audio_codes": [[n] * 16] * 2, "language": name} for n, name in enumerate(languages)]
    manifest = open_rows(write_jsonl(rows), RowFormat(), "TRAIN_JSONL")
    assert unknown_languages(manifest, {"english": 2050}) == ["Klingon", "Elvish"]
