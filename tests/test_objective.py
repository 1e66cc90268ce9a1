"""The objective against an independent calculation, and the proof that these tests can fail."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPES
from reference import load_stock, naive_losses

from finetuning import objective as objective_module
from finetuning.base_model import load_tokenizer
from finetuning.dataset import collate, count_tokens
from finetuning.objective import TrainingObjective, step_loss
from finetuning.prompt import AlignedIds, LayoutIds, append_frames, assistant_turn, build_prompt
from finetuning.tiny_model import embedded_model_folder

#: (text, language, number of frames): eight rows of very different lengths.
ROWS = [
    ("Yes.", None, 4),
    ("A sentence of middling length.", "english", 21),
    ("Short one.", None, 9),
    ("This is by far the longest of all the sentences that stand in this small list of rows.", "german", 60),
    ("No, no.", "english", 6),
    ("Seven words are what this one has.", None, 33),
    ("Hm?", None, 2),
    ("Almost the last of them.", "french", 17),
]
SPEAKERS = [0, 1, 0, 1, 1, 0, 0, 1]
WEIGHT = 0.3


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    folder = embedded_model_folder(request.param)
    model = load_stock(folder).model
    ids = LayoutIds.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    tokenizer = load_tokenizer(folder)
    generator = np.random.default_rng(0)
    assistant = [np.asarray(tokenizer(assistant_turn(text))["input_ids"]) for text, _, _ in ROWS]
    languages = [ids.languages[name] if name else None for _, name, _ in ROWS]
    codes = [generator.integers(0, 2048, (frames, 16)) for _, _, frames in ROWS]
    prompts = [build_prompt(tokens, ids, language_id=code) for tokens, code in zip(assistant, languages, strict=True)]
    vectors = torch.randn(2, model.config.talker_config.hidden_size, generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(
        model=model,
        objective=TrainingObjective(model.talker, vectors),
        rows=[append_frames(prompt, code, ids) for prompt, code in zip(prompts, codes, strict=True)],
        naive_inputs=[
            (torch.tensor(tokens), language, vectors[speaker], torch.tensor(code))
            for tokens, language, speaker, code in zip(assistant, languages, SPEAKERS, codes, strict=True)
        ],
    )


def sums_of(case: Any, indices: list[int], **collate_options: Any) -> dict[str, torch.Tensor]:
    rows: list[AlignedIds] = [case.rows[index] for index in indices]
    batch = collate(rows, [SPEAKERS[index] for index in indices], **collate_options)
    return case.objective(batch)


def check_against_naive(case: Any) -> None:
    """Summed losses of all rows in one padded batch, against the position-by-position calculation."""
    with torch.no_grad():
        got = sums_of(case, list(range(len(ROWS))))
        rows = [naive_losses(case.model, *inputs) for inputs in case.naive_inputs]
    for name in ("talker_loss", "sub_talker_loss"):
        want = sum(row[name] for row in rows)
        torch.testing.assert_close(got[name], want, rtol=2e-6, atol=0)


def test_equals_the_naive_calculation(case: Any) -> None:
    check_against_naive(case)


def shifted_labels(monkeypatch: pytest.MonkeyPatch, case: Any) -> None:
    rows = [
        AlignedIds(r.text, r.codec, r.speaker_position, r.codes, np.concatenate([r.labels[1:], r.labels[:1]]))
        for r in case.rows
    ]
    monkeypatch.setattr(case, "rows", rows)


def shifted_sub_talker_labels(monkeypatch: pytest.MonkeyPatch, case: Any) -> None:
    """Head i predicts code i+1, as ForCausalLMLoss would have it."""
    original = TrainingObjective.sub_talker_logits
    monkeypatch.setattr(
        TrainingObjective, "sub_talker_logits", lambda self, hidden, codes: original(self, hidden, codes).roll(1, 1)
    )


def own_frame_hidden(monkeypatch: pytest.MonkeyPatch, case: Any) -> None:
    monkeypatch.setattr(objective_module, "before_frames", lambda batch: batch["frame_places"])


def no_text_projection(monkeypatch: pytest.MonkeyPatch, case: Any) -> None:
    """Text embeddings go in as they are (cut or padded with zeros to the talker's width)."""
    width = case.model.config.talker_config.hidden_size
    original = TrainingObjective.input_embeddings

    def without(self: Any, batch: Any, embedded: Any = None) -> torch.Tensor:
        plain = self.talker.model.text_embedding(batch["text_ids"].flatten()[batch["real"]])
        projected = self.talker.text_projection(plain)
        plain = torch.nn.functional.pad(plain, (0, max(0, width - plain.shape[-1])))[..., :width]
        return original(self, batch, embedded) - projected + plain

    monkeypatch.setattr(TrainingObjective, "input_embeddings", without)


@pytest.mark.parametrize("sabotage", [shifted_labels, shifted_sub_talker_labels, own_frame_hidden, no_text_projection])
def test_sabotage_is_caught(case: Any, sabotage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the mistakes that published fine-tuners make fails the comparison above."""
    sabotage(monkeypatch, case)
    with pytest.raises(AssertionError):
        check_against_naive(case)


# ----------------------------------------------------------------------------- what must not change the losses


def total(case: Any, groups: list[list[int]], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        parts = [sums_of(case, group, **options) for group in groups]
    return torch.stack([sum(part[name] for part in parts) for name in ("talker_loss", "sub_talker_loss")])


def test_order_padding_and_batch_size_change_nothing(case: Any) -> None:
    everything = list(range(len(ROWS)))
    want = total(case, [everything])
    for groups, options in (
        ([everything[::-1]], {}),
        ([[3, 0, 6, 1, 7, 2, 5, 4]], {}),
        ([everything], {"padding_side": "left"}),
        ([[index] for index in everything], {}),
        ([[0, 3], [1, 2, 4], [5, 6, 7]], {}),
    ):
        torch.testing.assert_close(total(case, groups, **options), want, rtol=1e-6, atol=0)


def test_accumulation_gives_the_same_gradients(case: Any) -> None:
    """1 x 8, 2 x 4 and 4 x 2: the mean over the step's tokens, not a mean of means."""

    def gradients(batch_size: int) -> torch.Tensor:
        groups = [list(range(at, at + batch_size)) for at in range(0, len(ROWS), batch_size)]
        batches = [collate([case.rows[i] for i in group], [SPEAKERS[i] for i in group]) for group in groups]
        counts = count_tokens(batches)
        case.objective.zero_grad()
        for batch in batches:
            step_loss(case.objective(batch), *counts, WEIGHT).backward()
        grads = [p.grad.flatten() for p in case.objective.parameters() if p.grad is not None]
        return torch.cat(grads)

    want = gradients(8)
    for batch_size in (4, 2):
        difference = (gradients(batch_size) - want).norm() / want.norm()
        assert difference < 1e-5
    case.objective.zero_grad()


def test_a_mean_of_means_would_differ(case: Any) -> None:
    """The rows are unequal enough for the test above to notice the usual mistake."""
    per_row = [total(case, [[index]]) for index in range(len(ROWS))]
    counts = [torch.tensor(count_tokens([collate([row], [0])]), dtype=torch.float) for row in case.rows]
    mean_of_means = torch.stack([loss / count for loss, count in zip(per_row, counts, strict=True)]).mean(0)
    mean = sum(per_row) / sum(counts)
    assert ((mean_of_means - mean).abs() / mean).max() > 1e-4


def test_eval_counts_top1_predictions(case: Any) -> None:
    """Against an argmax per row, one at a time."""
    case.objective.eval()
    together = sums_of(case, list(range(len(ROWS))))
    one_by_one = [sums_of(case, [index]) for index in range(len(ROWS))]
    case.objective.train()
    assert together["sub_talker_correct"].shape == (15,)
    for name in ("talker_correct", "sub_talker_correct"):
        assert torch.equal(together[name], sum(part[name] for part in one_by_one))
    assert "talker_correct" not in sums_of(case, [0])


def test_no_gradient_below_the_first_new_layer(case: Any) -> None:
    """With frozen layers and embeddings the input embeddings need no graph."""
    flags = [parameter.requires_grad for parameter in case.model.parameters()]
    case.model.requires_grad_(False)
    try:
        embeddings = case.objective.input_embeddings(collate(case.rows[:2], SPEAKERS[:2]))
        assert not embeddings.requires_grad
    finally:
        for parameter, flag in zip(case.model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


def test_every_trained_parameter_gets_a_gradient(case: Any) -> None:
    """Nothing that set_trainable trains is left out of the graph (DDP would wait for it)."""
    from finetuning.layer_utils import set_trainable

    set_trainable(case.model, freeze_original_layers=False)
    batch = collate(case.rows, SPEAKERS)
    step_loss(case.objective(batch), *count_tokens([batch]), WEIGHT).backward()
    missing = [name for name, p in case.objective.named_parameters() if p.requires_grad and p.grad is None]
    case.objective.zero_grad()
    case.model.requires_grad_(True)
    # The last codebook's code is predicted and never read by the sub-talker, but the talker reads all sixteen.
    assert missing == []


def test_labels_count_frames_and_one_end_a_row(case: Any) -> None:
    frames = [row for _, _, row in ROWS]
    counted = count_tokens([collate(case.rows, SPEAKERS)])
    assert counted == (sum(frames) + len(frames), 15 * sum(frames))
    assert list(itertools.accumulate(frames))[-1] == sum(len(row.codes) for row in case.rows)
