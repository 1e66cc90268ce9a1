"""The loop: what it logs, saves, evaluates and refuses."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import naive_losses
from safetensors.torch import load_file
from training import FULL, build, make_trainer, signal_in_step, train

from finetuning import session, stepping
from finetuning.dataset import SkippedRow
from finetuning.errors import Stopped, UserError
from finetuning.progress import Progress
from finetuning.signals import StopRequest
from finetuning.stepping import make_scheduler
from finetuning.trainer import Trainer, UnreadableRows


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    """Settings over the first rows of the demo, full fine-tuning, two rows a step."""

    def make(num_rows: int = 6, num_validation: int = 0, **fields: Any) -> Any:
        files = {"train_jsonl": write_jsonl(demo_rows[:num_rows])}
        if num_validation:
            files["validation_jsonl"] = write_jsonl(demo_rows[-num_validation:], "validation.jsonl")
        defaults = {"batch_size": 2, "gradient_accumulation_steps": 1, "num_epochs": 1, "validation_fraction": 0.0}
        return make_settings(**(FULL | defaults | files | fields))

    return make


def read_log(settings: Any, name: str = "training_log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (settings.output_dir / name).read_text().splitlines()]


def folders(settings: Any) -> set[str]:
    return {entry.name for entry in settings.output_dir.iterdir() if entry.is_dir()} - {"rows"}


def test_first_logged_loss_equals_the_naive_calculation(settings_for: Callable) -> None:
    """From JSONL to log line: rows, languages, references, accumulation and weighting all stand in one figure."""
    settings = settings_for(
        num_rows=5, batch_size=2, gradient_accumulation_steps=3, logging_steps=1, sub_talker_loss_weight=0.7
    )
    run = build(settings)
    tokenizer, model = run.train.encoder.tokenizer, run.model
    talker = sub_talker = num_frames = 0.0
    english = model.config.talker_config.codec_language_id["english"]
    for row in map(json.loads, settings.train_jsonl.read_text().splitlines()):
        turn = f"<|im_start|>assistant\n{row['text']}<|im_end|>\n<|im_start|>assistant\n"
        codes = torch.tensor(row["audio_codes"])
        with torch.no_grad():
            tokens = torch.tensor(tokenizer(turn)["input_ids"])
            losses = naive_losses(model, tokens, english, run.speakers.vectors[0], codes)
        talker, sub_talker = talker + losses["talker_loss"], sub_talker + losses["sub_talker_loss"]
        num_frames += len(codes)
    make_trainer(run).run()
    logged = read_log(settings)[0]
    assert logged["talker_loss"] == pytest.approx(float(talker / (num_frames + 5)), rel=1e-5)
    assert logged["sub_talker_loss"] == pytest.approx(float(sub_talker / (15 * num_frames)), rel=1e-5)
    assert logged["loss"] == pytest.approx(logged["talker_loss"] + 0.7 * logged["sub_talker_loss"], rel=1e-6)


def test_accumulation_gives_the_same_step(settings_for: Callable) -> None:
    """The same eight rows in one optimizer step, however they are cut: loss and gradient norm agree."""
    figures = []
    for batch_size, accumulation in ((8, 1), (4, 2), (3, 3), (2, 4)):
        settings = settings_for(
            num_rows=8, batch_size=batch_size, gradient_accumulation_steps=accumulation, overwrite_output=True
        )
        train(settings)
        (record,) = read_log(settings)
        figures.append((record["loss"], record["grad_norm"]))
    assert all(figure == pytest.approx(figures[0], rel=1e-5) for figure in figures[1:])


def test_steps_epochs_and_folders(settings_for: Callable) -> None:
    """Evaluation and last/ at every epoch's end, checkpoint-N rotated, epoch-N kept."""
    settings = settings_for(
        num_rows=6, num_validation=2, num_epochs=3, save_steps=2, save_total_limit=2, save_epochs=True, logging_steps=2
    )
    _, trainer = train(settings)
    assert trainer.progress.step == 9
    assert folders(settings) == {
        "best",
        "last",
        "checkpoint-6",
        "checkpoint-8",
        "epoch-0",
        "epoch-1",
        "epoch-2",
        "state",
    }
    assert [record["step"] for record in read_log(settings)] == [2, 4, 6, 8, 9]
    validation = read_log(settings, "validation_log.jsonl")
    assert [(record["epoch"], record["step"]) for record in validation] == [(0, 3), (1, 6), (2, 9)]
    assert set(validation[0]) == {"step", "epoch", "loss", "metrics", "timestamp"}
    metrics = validation[0]["metrics"]
    assert set(metrics) == {
        "talker_loss", "sub_talker_loss", "perplexity", "accuracy", "sub_talker_accuracy", "codebook_accuracy",
    }  # fmt: skip
    assert len(metrics["codebook_accuracy"]) == 16
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["talker_loss"]))
    best = json.loads((settings.output_dir / "best" / "training_state.json").read_text())
    assert best["best_by"] == "validation loss"
    assert best["best_loss"] == min(record["loss"] for record in validation)
    assert best["step"] == min(validation, key=lambda record: record["loss"])["step"]


def test_evaluation_steps_inside_an_epoch(settings_for: Callable) -> None:
    settings = settings_for(num_rows=8, num_validation=2, eval_steps=2)
    train(settings)
    # Step 4 is the epoch's end as well: evaluated once.
    assert [record["step"] for record in read_log(settings, "validation_log.jsonl")] == [2, 4]


def test_validation_figures_equal_the_mean_over_tokens(settings_for: Callable) -> None:
    """Batches of 2 and 1 against one batch of 3, with weights that the training step has already changed."""
    settings = settings_for(num_rows=4, num_validation=3, batch_size=2)
    run, _ = train(settings)
    logged = read_log(settings, "validation_log.jsonl")[-1]
    batch = run.validation.batch([0, 1, 2])
    objective = run.objective.eval()
    with torch.no_grad():
        sums = objective(batch)
    frames = len(batch["codes"])
    assert logged["metrics"]["talker_loss"] == pytest.approx(sums["talker_loss"].item() / (frames + 3), rel=1e-5)
    assert logged["metrics"]["accuracy"] == pytest.approx(sums["talker_correct"].item() / (frames + 3))
    want = sums["sub_talker_correct"].sum().item() / (15 * frames)
    assert logged["metrics"]["sub_talker_accuracy"] == pytest.approx(want)


def test_max_steps_ends_the_run_properly(settings_for: Callable) -> None:
    settings = settings_for(num_rows=6, num_validation=2, num_epochs=5, max_steps=4)
    _, trainer = train(settings)
    assert trainer.progress.step == 4
    assert read_log(settings)[-1]["step"] == 4
    assert read_log(settings, "validation_log.jsonl")[-1]["step"] == 4
    assert json.loads((settings.output_dir / "last" / "training_state.json").read_text())["step"] == 4


def test_without_validation_best_follows_the_training_loss(settings_for: Callable) -> None:
    settings = settings_for(num_rows=4, num_epochs=2, learning_rate=1e-3, warmup_steps=0)
    train(settings)
    state = json.loads((settings.output_dir / "best" / "training_state.json").read_text())
    assert (state["epoch"], state["best_by"]) == (1, "mean training loss of an epoch")
    assert not (settings.output_dir / "validation_log.jsonl").exists()


# ------------------------------------------------------------------------------------------- best/ and early stopping


def evaluating(trainer: Trainer, evaluations: list[dict], monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """The validator gives these figures, one evaluation after the other."""
    given = iter(evaluations)
    monkeypatch.setattr(trainer.validator, "evaluate", lambda *_: dict(next(given)))
    return trainer


def state_of(settings: Any, name: str) -> dict[str, Any]:
    return json.loads((settings.output_dir / name / "training_state.json").read_text())


def with_losses(*losses: float) -> list[dict]:
    return [{"loss": loss, "accuracy": 0.5, "sub_talker_accuracy": 0.5} for loss in losses]


def test_best_metric_chooses(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples are spoken at two of four steps; at the others nothing is chosen, however low the loss is."""
    settings = settings_for(num_rows=8, num_validation=2, eval_steps=1, best_metric="speech_rate_ratio")
    evaluations = with_losses(4.0, 3.0, 2.0, 1.0)
    evaluations[1]["speech_rate_ratio"], evaluations[2]["speech_rate_ratio"] = 1.5, 0.8
    trainer = evaluating(make_trainer(build(settings)), evaluations, monkeypatch)
    trainer.run()
    best = state_of(settings, "best")
    assert (best["step"], best["best_step"], best["best_value"], best["best_loss"]) == (3, 3, 0.8, 2.0)
    assert best["best_by"] == best["best_metric"] == "speech_rate_ratio"
    assert state_of(settings, "last")["best_step"] == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if "Validation loss" in line]
    assert ["nearest to 1 speech_rate_ratio so far" in line for line in lines] == [False, True, True, False]
    assert "samples: speech_rate_ratio 0.80 | nearest to 1" in lines[2]


def test_early_stopping(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two evaluations that are no better than that of step 2, the second a tie: the run is complete after step 4."""
    settings = settings_for(
        num_rows=6, num_validation=2, num_epochs=3, eval_steps=1, logging_steps=3, early_stopping_patience=2
    )
    trainer = evaluating(make_trainer(build(settings)), with_losses(5.0, 3.0, 4.0, 3.0), monkeypatch)
    trainer.run()
    assert (trainer.progress.step, trainer.is_over) == (4, True)
    assert [(name, state_of(settings, name)["step"]) for name in ("best", "last")] == [("best", 2), ("last", 4)]
    assert state_of(settings, "last")["complete"] and (settings.output_dir / "state" / "step-4").is_dir()
    assert [record["step"] for record in read_log(settings)] == [3, 4]
    said = capsys.readouterr().out
    assert said.count("Early stopping at step 4: 2 evaluations in a row without a better validation loss") == 1


def test_early_stopping_at_the_end_of_an_epoch(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps since the last logged line are logged, too."""
    settings = settings_for(num_rows=4, num_validation=2, num_epochs=5, early_stopping_patience=1, logging_steps=3)
    trainer = evaluating(make_trainer(build(settings)), with_losses(3.0, 3.5), monkeypatch)
    trainer.run()
    assert (trainer.progress.step, trainer.progress.epoch, trainer.is_over) == (4, 2, True)
    assert [record["step"] for record in read_log(settings)] == [3, 4]
    assert (settings.output_dir / "state" / "step-4").is_dir()


def test_without_validation_rows_epochs_are_waited_for(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their mean training loss stands for the accuracy, which there is none of."""
    settings = settings_for(num_rows=4, num_epochs=6, best_metric="accuracy", early_stopping_patience=2)
    trainer = make_trainer(build(settings))
    losses, figures = iter([3.0, 2.0, 2.0, 2.5]), type(trainer.epoch_window).figures

    def told(window: Any, weight: float) -> dict[str, float]:
        found = figures(window, weight)
        return found if window is trainer.log_window else found | {"loss": next(losses)}

    monkeypatch.setattr(type(trainer.epoch_window), "figures", told)
    trainer.run()
    best = state_of(settings, "best")
    assert (best["step"], best["best_by"], best["best_metric"]) == (4, "mean training loss of an epoch", "loss")
    assert trainer.progress.step == 8 and trainer.is_over


def test_a_run_without_a_figure_to_choose_by(settings_for: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody speaks samples: no best/, and nothing to be patient about."""
    settings = settings_for(num_rows=4, num_validation=2, best_metric="mos", early_stopping_patience=1, eval_steps=1)
    session.train(build(settings))
    assert folders(settings) == {"last", "state"}
    said = capsys.readouterr().out
    assert f"There is no {settings.output_dir / 'best'}: no evaluation had a mos" in said
    assert f"--checkpoint {settings.output_dir / 'last'} " in said


def test_an_early_stop_is_complete_until_there_is_more_patience(
    settings_for: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a rate of next to nothing all evaluations are ties."""
    fields = {
        "num_rows": 8, "num_validation": 2, "eval_steps": 1, "learning_rate": 1e-30, "warmup_steps": 0,
        "resume": "auto", "num_epochs": 2, "lr_scheduler": "constant",
    }  # fmt: skip

    def go(**others: Any) -> tuple[str, Any]:
        run = build(settings_for(**fields | others))
        session.train(run)
        run.lock.close()
        return capsys.readouterr().out, run

    said, run = go(early_stopping_patience=2)
    assert "Early stopping at step 3: 2 evaluations" in said and "(lowest validation loss " in said
    for others in ({}, {"num_epochs": 5}, {"max_steps": 20, "num_epochs": 5}):
        said, run = go(early_stopping_patience=2, **others)
        assert "is complete" in said and "holds 3 steps. It was stopped early, after 2 evaluations" in said
        assert "a larger EARLY_STOPPING_PATIENCE, or 0, trains on" in said and run.is_over
    said, _ = go(early_stopping_patience=3)
    assert "Early stopping at step 4: 3 evaluations" in said
    said, _ = go(early_stopping_patience=3, best_metric="accuracy")  # waiting begins anew
    assert "BEST_METRIC was loss, is accuracy, of which best/ has" in said and "Early stopping at step 7: 3" in said
    said, run = go(best_metric="accuracy")
    assert "Early stopping" not in said and state_of(run.settings, "last")["step"] == 8
    assert state_of(run.settings, "best")["step"] == 1
    assert [record["step"] for record in read_log(run.settings, "validation_log.jsonl")] == [1, 2, 3, 4, 5, 6, 7, 8]
    said, _ = go(best_metric="accuracy", early_stopping_patience=2)
    assert "nothing is left of its NUM_EPOCHS" in said  # its last step was its last step anyway


def test_plots_are_drawn_before_the_state_that_ends_the_run(settings_for: Callable) -> None:
    """Whoever is killed in between comes to the end again, and draws them."""
    settings = settings_for(num_rows=4, num_epochs=2)
    trainer, seen = make_trainer(build(settings)), []
    trainer.tracker.draw_plots = lambda: seen.append((trainer.progress.step, (settings.output_dir / "state").exists()))
    trainer.run()
    assert seen == [(4, False)] and (settings.output_dir / "state" / "step-4").is_dir()


def poison(run: Any, monkeypatch: pytest.MonkeyPatch, steps: set[int], loss: str = "talker_loss") -> list[list[int]]:
    """Makes the loss of some steps NaN (a step is one micro-batch); gives the lines of the rows of each step so far."""
    forward, to_device, lines = run.objective.forward, stepping.to_device, []

    def noted(batch: dict, device: torch.device) -> dict:
        lines.append(batch["lines"].tolist())  # which do not go to the device
        return to_device(batch, device)

    def poisoned(batch: dict) -> dict:
        sums = forward(batch)
        return sums | {loss: sums[loss] * torch.nan} if len(lines) in steps else sums

    monkeypatch.setattr(stepping, "to_device", noted)
    monkeypatch.setattr(run.objective, "forward", poisoned)
    return lines


@pytest.mark.parametrize("loss", ["talker_loss", "sub_talker_loss"])
def test_a_step_without_finite_gradients_changes_nothing(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Weights, moments and Adam's own step count stay; it is counted, and its loss is in no figure."""
    settings = settings_for(num_rows=6, logging_steps=3, learning_rate=1e-3, warmup_steps=0)
    run = build(settings)
    poison(run, monkeypatch, {2}, loss)
    trainer = make_trainer(run)
    take, snapshots = trainer.stepper.take, []

    def observed(*arguments: Any) -> Any:
        sums = take(*arguments)
        weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        moments = [value.clone() for state in trainer.stepper.optimizer.state.values() for value in state.values()]
        snapshots.append((weights, moments, sums))
        return sums

    monkeypatch.setattr(trainer.stepper, "take", observed)
    trainer.run()
    (weights_1, moments_1, sums_1), (weights_2, moments_2, sums_2), (weights_3, _, sums_3) = snapshots
    assert all(torch.equal(weights_2[name], weights_1[name]) for name in weights_1)
    assert all(map(torch.equal, moments_2, moments_1))
    assert not torch.equal(weights_3["talker.codec_head.weight"], weights_2["talker.codec_head.weight"])
    assert not sums_2.totals.any()
    (record,) = read_log(settings)
    talker, _, num_talker, _ = (sums_1.totals + sums_3.totals).tolist()
    assert record["talker_loss"] == pytest.approx(talker / num_talker)
    assert record["skipped_steps"] == 1
    assert trainer.progress.step == 3


def test_ten_bad_steps_in_a_row_end_the_run(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(num_rows=6, num_epochs=6, logging_steps=1)
    run = build(settings)
    lines = poison(run, monkeypatch, {3, *range(5, 20)})
    with pytest.raises(UserError, match=r"gradients of 10 steps in a row, up to step 14, were not finite") as caught:
        make_trainer(run).run()
    bad = sorted({line for step in lines[4:14] for line in step})
    text = json.loads(settings.train_jsonl.read_text().splitlines()[bad[0] - 1])["text"]
    assert f'line {bad[0]} "{text[:40]}"' in str(caught.value)
    assert [record["skipped_steps"] for record in read_log(settings)] == [0, 0, 1, 0, *[1] * 10]


def test_bad_steps_are_noticed_between_two_log_lines(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten in a row that ended before the line is written."""
    run = build(settings_for(num_rows=4, num_epochs=10, logging_steps=15))
    poison(run, monkeypatch, set(range(3, 13)))
    with pytest.raises(UserError, match="gradients of 10 steps in a row, up to step 15"):
        make_trainer(run).run()


def test_a_run_that_learns_nothing_at_all_is_no_success(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(settings_for(num_rows=4))
    poison(run, monkeypatch, {1, 2})
    with pytest.raises(UserError, match="gradients of 2 steps in a row"):
        make_trainer(run).run()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(
    settings_for: Callable, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(num_rows=8, num_epochs=10)
    trainer = make_trainer(build(settings))
    signal_in_step(trainer, 3, number)
    handler = signal.getsignal(number)
    with pytest.raises(Stopped) as caught:
        trainer.run()
    assert caught.value.exit_code == code
    assert json.loads((settings.output_dir / "last" / "training_state.json").read_text())["step"] == 3
    assert signal.getsignal(number) == handler


@pytest.mark.parametrize("at", ["inside an epoch", "at an epoch's end"])
def test_a_stop_is_heard_in_the_validation(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str
) -> None:
    """The step that is logged is evaluated as well, by three batches; the signal arrives in the second of them."""
    fields = {
        "num_rows": 8, "num_validation": 5, "num_epochs": 2, "logging_steps": 2, "learning_rate": 1e-3,
        "warmup_steps": 0, "eval_steps": 2 if at == "inside an epoch" else 100, "resume": "auto",
    }  # fmt: skip
    untouched = settings_for(**fields, output_dir=tmp_path / "untouched")
    train(untouched)
    settings = settings_for(**fields)
    trainer = make_trainer(build(settings))
    sums, num_batches = trainer.validator._sums, []

    def interrupted(*arguments: Any) -> Any:
        num_batches.append(1)
        if len(num_batches) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return sums(*arguments)

    monkeypatch.setattr(trainer.validator, "_sums", interrupted)
    with pytest.raises(Stopped):
        trainer.run()
    assert len(num_batches) == 2
    assert trainer.progress.step == (2 if at == "inside an epoch" else 4) and trainer.progress.evaluated_at is None
    assert trainer.progress.is_settled == (at != "inside an epoch") and trainer.progress.epoch == 0
    assert not (settings.output_dir / "validation_log.jsonl").exists() and trainer.stepper.module.training
    train(settings)
    clocks = ("timestamp", "frames_per_second", "seconds_left")
    for name in ("training_log.jsonl", "validation_log.jsonl"):
        logs = [read_log(each, name) for each in (settings, untouched)]
        found, wanted = ([{key: line[key] for key in line if key not in clocks} for line in log] for log in logs)
        assert found == wanted
    for name in ("best", "last"):
        found, wanted = (load_file(each.output_dir / name / "model.safetensors") for each in (settings, untouched))
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(("world_size", "raised"), [("1", [SystemExit]), ("2", []), ("", [SystemExit])])
def test_only_a_launcher_echoes_signals(monkeypatch: pytest.MonkeyPatch, world_size: str, raised: list) -> None:
    """Alone the second signal acts at once, however soon it comes."""
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr("finetuning.signals.another_process_failed", lambda: False)
    request, seen = StopRequest(), []
    request._note(signal.SIGTERM, None)
    try:
        request._note(signal.SIGTERM, None)
    except SystemExit:
        seen.append(SystemExit)
    assert seen == raised and request.number == signal.SIGTERM


# --------------------------------------------------------------------------------------------------- unreadable rows


def damage_lines(run: Any, monkeypatch: pytest.MonkeyPatch, lines: Callable[[], Any]) -> None:
    dataset = run.train.dataset
    read = dataset.read

    def damaged(index: int) -> Any:
        row = read(index)
        return SkippedRow(row["line"], f"damaged {row['line']}") if row["line"] in lines() else row

    monkeypatch.setattr(type(dataset), "read", lambda self, index: damaged(index) if self is dataset else read(index))


def test_a_row_that_stays_unreadable_counts_once(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all epochs, and over a stop; rows of later epochs are added."""
    fields = {"num_rows": 12, "resume": "auto", "lr_scheduler": "constant"}
    run = build(settings_for(num_epochs=2, **fields))
    trainer = make_trainer(run)
    damage_lines(run, monkeypatch, lambda: (2, 5) if trainer.progress.epoch == 0 else (2, 5, 7))
    trainer.run()
    assert trainer.progress.num_skipped_rows == 3
    monkeypatch.undo()
    run.lock.close()
    run = build(settings_for(num_epochs=3, **fields))
    damage_lines(run, monkeypatch, lambda: (5, 9))
    trainer = make_trainer(run)
    trainer.run()
    assert trainer.progress.num_skipped_rows == 4
    assert sorted(row["line"] for row in read_log(run.settings, "skipped_rows.jsonl")) == [2, 2, 5, 5, 5, 7, 9]


def test_a_run_whose_rows_cannot_be_read_ends(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven of 24 are too many; the steps before are not lost."""
    settings = settings_for(num_rows=24, save_steps=1)
    run = build(settings)
    damage_lines(run, monkeypatch, lambda: range(1, 12))
    with pytest.raises(
        UserError, match=r"11 of the 24 training rows could not be read in epoch 0, .* damaged \d"
    ) as caught:
        make_trainer(run).run()
    listed = read_log(settings, "skipped_rows.jsonl")
    assert len(listed) == 11 and f"line {listed[0]['line']}: damaged" in str(caught.value)
    assert f"{settings.output_dir}/skipped_rows.jsonl" in str(caught.value)


def test_the_rows_of_an_epoch_are_known_after_a_stop() -> None:
    """Those that were listed since the last epoch ended; the others count, but not towards the limit."""
    listed = [(step, SkippedRow(line, "damaged")) for step, line in ((3, 1), (4, 2), (5, 3), (6, 1))]
    trainer = SimpleNamespace(
        progress=Progress(step=6, epoch=1, ended_at=4, num_skipped_rows=3),
        tracker=SimpleNamespace(skipped_rows=lambda: listed),
        accelerator=SimpleNamespace(is_main_process=True, num_processes=1),
        _unreadable=UnreadableRows(100),
    )
    Trainer._recall_skipped_rows(trainer)
    assert trainer._unreadable.count == 3
    assert [row.line for row in trainer._unreadable._of_epoch] == [3, 1]


@pytest.mark.parametrize(
    ("num_rows", "num_bad", "is_refused"),
    [(24, 10, False), (24, 11, True), (8, 7, False), (8, 8, True), (1, 1, True), (1000, 100, False), (1000, 101, True)],
)
def test_how_many_rows_may_be_unreadable(
    make_settings: Callable, num_rows: int, num_bad: int, is_refused: bool
) -> None:
    rows = UnreadableRows(num_rows)
    rows.add([SkippedRow(line, "damaged") for line in range(1, num_bad + 1)])
    with pytest.raises(UserError) if is_refused else contextlib.nullcontext():
        rows.check(make_settings(), 0)
    rows.begin_epoch()
    rows.add([SkippedRow(1, "damaged"), SkippedRow(0, "worse"), SkippedRow(0, "worse")][: num_rows - 1])
    rows.check(make_settings(), 1)
    assert rows.count == num_bad + 2 * (num_rows > 1)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_master_weights_are_fp32_and_move(settings_for: Callable, precision: str) -> None:
    """At the default rate nearly every trained weight moves in a step, which bf16 weights would not (rounding)."""
    settings = settings_for(
        num_rows=4, batch_size=4, mixed_precision=precision, learning_rate=2e-6, lr_scheduler="constant"
    )
    run = build(settings)
    before = {name: tensor.clone() for name, tensor in run.model.named_parameters()}
    make_trainer(run).run()
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    layer = "talker.model.layers.0.mlp.up_proj.weight"
    moved = (dict(run.model.named_parameters())[layer] != before[layer]).float().mean()
    assert moved > 0.99


def test_bf16_autocast_is_close_to_fp32(settings_for: Callable) -> None:
    figures = []
    for precision in ("no", "bf16"):
        settings = settings_for(num_rows=4, mixed_precision=precision, max_steps=1, overwrite_output=True)
        train(settings)
        figures.append(read_log(settings)[0]["loss"])
    assert figures[1] == pytest.approx(figures[0], rel=2e-2)
    assert figures[1] != figures[0]


def test_workers_give_the_same_run(settings_for: Callable) -> None:
    logs = []
    for workers in (0, 2):
        settings = settings_for(num_rows=6, num_workers=workers, logging_steps=1, overwrite_output=True)
        train(settings)
        logs.append([(record["loss"], record["grad_norm"]) for record in read_log(settings)])
    assert logs[0] == logs[1]


# -------------------------------------------------------------------------------------------------- learning rate


def rates(settings: Any, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    scheduler = make_scheduler(settings, optimizer, num_steps)
    seen = []
    for _ in range(num_steps):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return [*seen, scheduler.get_last_lr()[0]]


def test_cosine_with_warm_up(make_settings: Callable) -> None:
    seen = rates(make_settings(learning_rate=1.0, warmup_steps=10), 110)
    assert seen[:11] == pytest.approx([step / 10 for step in range(11)])
    assert seen[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(101)])


def test_long_warm_up_is_cut_and_said(make_settings: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    seen = rates(make_settings(learning_rate=1.0, warmup_steps=100), 50)
    assert seen[5] == 1.0
    assert "cut from 100 to 5" in capsys.readouterr().out


def test_final_rate_and_restarts(make_settings: Callable) -> None:
    seen = rates(make_settings(learning_rate=1.0, warmup_steps=0, lr_min=0.25), 40)
    assert (seen[0], seen[-1]) == pytest.approx((1.0, 0.25))
    seen = rates(make_settings(learning_rate=1.0, warmup_steps=0, lr_num_cycles=2), 40)
    assert seen[20] == pytest.approx(1.0)
    assert seen[19] < 0.05


@pytest.mark.parametrize("name", ["linear", "constant", "polynomial", "inverse_sqrt", "warmup_stable_decay"])
def test_other_schedules_run(make_settings: Callable, name: str) -> None:
    seen = rates(make_settings(learning_rate=1.0, warmup_steps=2, lr_scheduler=name), 40)
    assert max(seen) == pytest.approx(1.0)
    assert seen[-1] <= seen[20] <= 1.0


def test_plain_lines_without_a_terminal(settings_for: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(num_rows=4, logging_steps=1)
    train(settings)
    lines = capsys.readouterr().out.splitlines()
    record = read_log(settings)[0]
    assert any(line.startswith(f"Epoch 0 | Step 1 | Loss: {record['loss']:.4f} | LR: ") for line in lines)
    assert Path(settings.output_dir / "settings.json").is_file()
