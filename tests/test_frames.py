"""MAX_FRAMES_PER_BATCH in whole runs: what they say, that they resume exactly, and what memory makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_resume import assert_same, found, result, run_to_the_end, run_until, stop_at
from test_stepping import limit_memory
from training import FULL, build, flat, make_trainer

from finetuning.briefing import describe_batch, describe_run, say_long_rows
from finetuning.errors import UserError
from finetuning.sampling import Geometry, StepSampler
from finetuning.validation import Validator

pytestmark = pytest.mark.usefixtures("one_thread")


#: Frames of a micro-batch; rows 16 and 17 have more.
BUDGET = 50


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of many rows: which ones meet in a window, and so the number of steps, differs from epoch to epoch."""
    monkeypatch.setattr(StepSampler, "_rows_per_window", lambda *_: 4)


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    """18 rows of 14 to 60 frames, two of them over the budget; two micro-batches a step, three epochs."""

    def make(**fields: Any) -> Any:
        defaults = {
            "train_jsonl": write_jsonl(demo_rows[:18]), "validation_jsonl": write_jsonl(demo_rows[-5:], "valid.jsonl"),
            "max_frames_per_batch": BUDGET, "gradient_accumulation_steps": 2, "num_epochs": 3, "learning_rate": 1e-3,
            "warmup_steps": 1, "logging_steps": 2, "eval_steps": 3, "save_steps": 4, "resume": "auto",
        }  # fmt: skip
        given = FULL | defaults | fields
        return make_settings(**{name: value for name, value in given.items() if value is not None})

    return make


def note_rows(trainer: Any) -> list[list[list[int]]]:
    """Lines of the rows of every micro-batch of every step that the trainer is going to take."""
    take, steps = trainer.stepper.take, []

    def noted(batches: Any, *arguments: Any) -> Any:
        steps.append([batch["lines"].tolist() for batch in batches])
        return take(batches, *arguments)

    trainer.stepper.take = noted
    return steps


@pytest.fixture
def run_of_all_steps(settings_for: Callable, tmp_path: Path) -> tuple[Path, list[list[list[int]]], list[int]]:
    """OUTPUT_DIR of a run that nothing stopped, what it trained on, and the steps of its epochs."""
    run = build(settings_for(output_dir=tmp_path / "untouched"))
    trainer = make_trainer(run)
    steps = note_rows(trainer)
    trainer.run()
    return tmp_path / "untouched", steps, [run.train.num_steps(epoch) for epoch in range(3)]


def test_a_run_takes_every_row_once_an_epoch_and_resumes_exactly(
    settings_for: Callable, run_of_all_steps: Any, demo_rows: list[dict]
) -> None:
    """Stopped inside the first epoch, and killed inside the second one."""
    untouched, steps, sizes = run_of_all_steps
    assert len(set(sizes)) > 1 and len(steps) == sum(sizes)
    frames = {number: len(row["audio_codes"]) for number, row in enumerate(demo_rows[:18], 1)}
    for epoch in range(3):
        batches = [batch for step in steps[sum(sizes[:epoch]) : sum(sizes[: epoch + 1])] for batch in step]
        assert sorted(line for batch in batches for line in batch) == sorted(frames)
        assert sorted(batch for batch in batches if sum(map(frames.get, batch)) > BUDGET) == [[16], [17]]
    settings = settings_for()
    run_until(settings, 2, "SIGTERM")
    run_until(settings, sizes[0] + 3, "killed")
    assert run_to_the_end(settings).progress.step == sum(sizes)
    assert_same(result(settings.output_dir), result(untouched))


def test_micro_batches_may_be_cut_otherwise_when_a_run_goes_on(settings_for: Callable) -> None:
    """Half the frames and twice the micro-batches: the rows that are left of the epoch come once, and all after it."""
    trainer = make_trainer(build(settings_for(num_epochs=2)))
    before = note_rows(trainer)
    stop_at(trainer, 4, "SIGTERM")
    run = build(settings_for(num_epochs=2, max_frames_per_batch=BUDGET // 2, gradient_accumulation_steps=4))
    assert run.train.geometry == Geometry(0, 4, 1, BUDGET // 2)
    trainer = make_trainer(run)
    after = note_rows(trainer)
    trainer.run()
    assert trainer.progress.step == run.num_steps == len(after) + 4
    lines = [line for step in before + after for batch in step for line in batch]
    assert sorted(lines[:18]) == list(range(1, 19)) == sorted(lines[18:])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "run"


@pytest.fixture
def saved(settings_for: Callable, shared: Path) -> Path:
    """OUTPUT_DIR of a run that was stopped early; several tests look at it."""
    if not shared.exists():
        run_until(settings_for(output_dir=shared), 2, "SIGTERM")
    return shared


@pytest.mark.parametrize(
    ("fields", "num_processes", "message"),
    [
        (
            {"max_frames_per_batch": 100},
            1,
            r"MAX_FRAMES_PER_BATCH x GRADIENT_ACCUMULATION_STEPS x processes was 100, is 200 \(frames of a step\)",
        ),
        ({"max_frames_per_batch": None}, 1, "MAX_FRAMES_PER_BATCH was 50, is unset"),
        ({"max_frames_per_batch": 100, "gradient_accumulation_steps": 1}, 1, None),
        ({"gradient_accumulation_steps": 1}, 2, None),
    ],
)
def test_what_a_step_holds_must_stay(
    settings_for: Callable, saved: Path, fields: dict[str, Any], num_processes: int, message: str | None
) -> None:
    settings = settings_for(**fields, resume=str(saved))
    if message is None:
        assert found(settings, num_processes).folder.parent.parent == saved
    else:
        with pytest.raises(UserError, match=message):
            found(settings, num_processes)


def test_what_is_said_at_the_start(settings_for: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(gradient_accumulation_steps=4)
    run = build(settings)
    shown = describe_run(run)
    sizes = [run.train.num_steps(epoch) for epoch in range(3)]
    assert f"Steps: {sum(sizes)} ({sizes[0]} an epoch, about {round(18 / sizes[0])} rows each)" in shown
    assert "Batch: up to 200 frames a step = 50 x 4 micro-batches x 1 process(es); learning rate 0.001" in shown
    assert describe_batch(settings, 3).startswith("Batch: up to 600 frames a step = 50 x 4 micro-batches x 3 process")
    say_long_rows(run.train.dataset, settings)
    said = "2 training rows are longer than MAX_FRAMES_PER_BATCH=50 (the longest has 60 frames): each is a micro-batch"
    assert said in capsys.readouterr().out
    say_long_rows(run.train.dataset, settings_for(max_frames_per_batch=60))
    assert capsys.readouterr().out == ""


def test_validation_keeps_to_the_frames_and_gives_the_same_figures(
    settings_for: Callable, demo_rows: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for()
    run = build(settings)
    by_frames = Validator(settings, run.accelerator, run.validation)
    by_rows = Validator(settings_for(max_frames_per_batch=None, batch_size=5), run.accelerator, run.validation)
    lengths = [len(row["audio_codes"]) for row in demo_rows[-5:]]
    sizes = [len(batch["codes"]) for step in by_frames._steps(equal=False) for batch in step.batches]
    assert sum(sizes) == sum(lengths) and max(sizes) <= BUDGET < sizes[0] + lengths[-1] + BUDGET
    assert 1 < len(sizes) < 5
    assert flat(by_frames.evaluate(run.objective)) == pytest.approx(flat(by_rows.evaluate(run.objective)), rel=1e-5)


def test_out_of_memory_is_said_in_frames(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row at a time fits; then nothing does."""
    settings = settings_for(num_epochs=1)
    trainer = make_trainer(run := build(settings))
    tried = limit_memory(run, monkeypatch, 1)
    trainer.run()
    assert max(tried) > 1 and trainer.stepper.num_parts in (2, 4)
    said = capsys.readouterr().out
    assert (
        "the step is repeated with about 25 frames at a time, and the next steps are taken in 4 micro-batches. " in said
    )
    assert "MAX_FRAMES_PER_BATCH=25 GRADIENT_ACCUMULATION_STEPS=4 gives about the same" in said
    trainer = make_trainer(run := build(settings_for(num_epochs=2)))
    limit_memory(run, monkeypatch, 0)
    with pytest.raises(UserError) as refused:
        trainer.run()
    assert str(refused.value).startswith(
        "the GPU's memory does not suffice for micro-batches of 7 frames (16 a step). "
        "Set MAX_FRAMES_PER_BATCH=4 with GRADIENT_ACCUMULATION_STEPS=32; "
    )
