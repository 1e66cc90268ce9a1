"""Validation figures of each speaker: summed over its rows alone, and without moving the figures of all rows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training import FULL, build, flat, make_trainer

from finetuning.dataset import StepDataset
from finetuning.errors import UserError
from finetuning.validation import Validator, measured_speakers

pytestmark = pytest.mark.usefixtures("one_thread")

#: Of the validation rows; Cleo is in the training as well.
SPEAKERS = ["Ada", "Bea", "Ada", "Ada", "Bea", "Ada"]


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    def make(
        speakers: list[str] = SPEAKERS, of_training: tuple[str, ...] = ("Ada", "Bea", "Cleo"), **fields: Any
    ) -> Any:
        train = [row | {"speaker": of_training[n % len(of_training)]} for n, row in enumerate(demo_rows[:6])]
        valid = [row | {"speaker": name} for name, row in zip(speakers, demo_rows[-len(speakers) :], strict=True)]
        files = {"train_jsonl": write_jsonl(train), "validation_jsonl": write_jsonl(valid, "valid.jsonl")}
        return make_settings(**FULL | {"num_epochs": 1} | files | fields)

    return make


def alone(run: Any, speakers: list[str], name: str) -> dict[str, float]:
    """Figures of one speaker's rows, in one batch."""
    batch = run.validation.batch([row for row, speaker in enumerate(speakers) if speaker == name])
    objective, num_frames, num_rows = run.objective.eval(), len(batch["codes"]), len(batch["lines"])
    with torch.no_grad():
        sums = objective(batch)
    talker = sums["talker_loss"].item() / (num_frames + num_rows)
    sub_talker = sums["sub_talker_loss"].item() / (15 * num_frames)
    return {
        "loss": talker + run.settings.sub_talker_loss_weight * sub_talker,
        "talker_loss": talker,
        "sub_talker_loss": sub_talker,
        "accuracy": sums["talker_correct"].item() / (num_frames + num_rows),
        "num_rows": num_rows,
    }


def teach_favourites(objective: Any, dataset: StepDataset) -> None:
    """Makes the random heads guess the most frequent code of each codebook at about every other place, so that some
    guesses are right."""
    codes = torch.cat([dataset.batch([row])["codes"] for row in range(len(dataset))])
    favourites = codes.mode(dim=0).values.tolist()
    talker = objective.talker
    with torch.no_grad():
        for favourite, head in zip(favourites, [talker.codec_head, *talker.code_predictor.lm_head], strict=True):
            head.weight[favourite] *= 20.0


def evaluated_as_one_speaker(run: Any) -> dict[str, Any]:
    """The figures of all rows by the plan of a run with one speaker."""
    validator = Validator(run.settings, run.accelerator, run.validation)
    validator._speakers = validator._labels = None
    return validator.evaluate(run.objective)


@pytest.mark.parametrize("fields", [{"batch_size": 3}, {"max_frames_per_batch": 60}], ids=["rows", "frames"])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_figures_of_a_speaker_are_those_of_its_rows_alone(
    settings_for: Callable, fields: dict[str, Any], num_parts: int
) -> None:
    run = build(settings_for(**fields))
    found = Validator(run.settings, run.accelerator, run.validation).evaluate(run.objective, num_parts)
    speakers = found.pop("speakers")
    assert list(speakers) == ["Ada", "Bea"]
    for name, figures in speakers.items():
        assert figures == pytest.approx(alone(run, SPEAKERS, name), rel=1e-5)
    assert flat(found) == pytest.approx(flat(evaluated_as_one_speaker(run)), rel=1e-6)


@pytest.mark.parametrize("equal", [False, True])
def test_processes_sum_up_to_the_same(settings_for: Callable, monkeypatch: pytest.MonkeyPatch, equal: bool) -> None:
    """Two of them, one after the other, also with batches that only keep them in step."""
    run = build(settings_for())
    wanted = Validator(run.settings, run.accelerator, run.validation).evaluate(run.objective)
    monkeypatch.setattr("finetuning.validation.is_sharded", lambda _: equal)
    totals, numbers = [], []
    for process in range(2):
        accelerator = SimpleNamespace(
            process_index=process,
            num_processes=2,
            device=torch.device("cpu"),
            autocast=contextlib.nullcontext,
            reduce=lambda tensor, reduction: sum(totals),
        )
        validator = Validator(run.settings, accelerator, run.validation)
        numbers.append(len(list(validator._steps(equal))))
        totals.append(validator._totals(run.objective.eval(), 1, lambda: False))
    assert numbers == ([2, 2] if equal else [2, 1])
    found = validator._means(totals[-1])
    assert found.pop("speakers") == {name: pytest.approx(of) for name, of in wanted.pop("speakers").items()}
    assert flat(found) == pytest.approx(flat(wanted))
    assert found["codebook_accuracy"] == wanted["codebook_accuracy"]  # sums of whole numbers


def test_codebook_accuracies_are_exact_over_all_rows(settings_for: Callable) -> None:
    """Against a count over the rows one by one, with labels that differ in number from batch to batch."""
    run = build(settings_for(batch_size=3))
    teach_favourites(run.objective, run.validation)
    found = Validator(run.settings, run.accelerator, run.validation).evaluate(run.objective)
    right, num_frames, num_talker = torch.zeros(16), 0, 0
    for row in range(len(SPEAKERS)):
        batch = run.validation.batch([row])
        with torch.no_grad():
            sums = run.objective.eval()(batch)
        right += torch.stack([sums["talker_correct"], *sums["sub_talker_correct"]])
        num_frames += len(batch["codes"])
        num_talker += len(batch["codes"]) + 1
    wanted = [right[0].item() / num_talker, *(right[1:] / num_frames).tolist()]
    assert found["codebook_accuracy"] == pytest.approx(wanted, rel=1e-6)
    assert len(set(found["codebook_accuracy"])) > 2  # they do differ
    assert found["accuracy"] == found["codebook_accuracy"][0]
    assert found["sub_talker_accuracy"] == pytest.approx(sum(found["codebook_accuracy"][1:]) / 15)
    assert not any("codebook_accuracy" in figures for figures in found["speakers"].values())


def test_no_batch_holds_rows_of_two_speakers(settings_for: Callable) -> None:
    run = build(settings_for(batch_size=3))
    steps = Validator(run.settings, run.accelerator, run.validation)._steps(equal=False)
    lines = [batch["lines"].tolist() for step in steps for batch in step.batches if batch["weight"] > 0]
    assert lines == [[1, 3, 4], [6], [2, 5]]


def test_one_speaker_has_the_plan_and_the_figures_as_before(settings_for: Callable) -> None:
    run = build(settings_for(["Ada"] * 5, ("Ada",)))
    validator = Validator(run.settings, run.accelerator, run.validation)
    plan = validator._steps(equal=False).sampler
    assert [rows for step in plan for rows in step] == [[0, 1], [2, 3], [4]]
    assert "speakers" not in validator.evaluate(run.objective)


def test_rows_that_cannot_be_read_count_nowhere(settings_for: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """A speaker without any other row is not listed; without any row at all the run ends with a message."""
    run = build(settings_for())
    manifest, encoder = run.validation.manifest, run.validation.encoder
    index = {name: row for name, row in encoder.speaker_index.items() if name != "bea"}
    without_bea = StepDataset(manifest, replace(encoder, speaker_index=index))
    found = Validator(run.settings, run.accelerator, without_bea).evaluate(run.objective)
    assert found["speakers"] == {"Ada": pytest.approx(alone(run, SPEAKERS, "Ada"), rel=1e-5)}
    assert found["loss"] == found["speakers"]["Ada"]["loss"]
    assert capsys.readouterr().out.count('speaker "Bea" has no vector') == 2
    nobody = StepDataset(manifest, replace(encoder, speaker_index={"x": 0, "y": 1}))
    with pytest.raises(UserError, match="none of the validation rows can be read"):
        Validator(run.settings, run.accelerator, nobody).evaluate(run.objective)


def test_the_log_has_every_speaker_and_the_line_their_losses(
    settings_for: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(["Ada", "Bea", "Cleo", "Bea"])
    run = build(settings)
    make_trainer(run).run()
    said = capsys.readouterr().out
    logged = json.loads((settings.output_dir / "validation_log.jsonl").read_text().splitlines()[-1])
    speakers = logged["metrics"]["speakers"]
    assert {name: figures["num_rows"] for name, figures in speakers.items()} == {"Ada": 1, "Bea": 2, "Cleo": 1}
    for name, figures in speakers.items():
        assert figures == pytest.approx(alone(run, ["Ada", "Bea", "Cleo", "Bea"], name), rel=1e-5)
    losses = ", ".join(f"{name} {figures['loss']:.4f}" for name, figures in speakers.items())
    assert f"(1-15) | speakers: {losses} | lowest validation loss so far\n" in said


def test_of_very_many_speakers_those_with_the_most_rows_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.validation.MAX_MEASURED_SPEAKERS", 2)
    labels = np.array([0, 1, 2, 1, 3, 3, 3], dtype=np.int32)
    names, places = measured_speakers(["a", "b", "c", "d"], labels)
    assert names == ["b", "d"] and places.tolist() == [2, 0, 2, 0, 1, 1, 1]
    assert measured_speakers(["a"], labels[:1])[0] == ["a"]
