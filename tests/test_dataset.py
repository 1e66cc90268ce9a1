"""Rows to batches: damaged rows, parts of a batch, the loader. Their order is in test_sampling.py."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from finetuning.sampling import StepSampler
from finetuning.tiny_model import embedded_model_folder

LENGTHS = np.random.default_rng(0).integers(10, 300, 1003)


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
