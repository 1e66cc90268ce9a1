"""A run that was stopped and resumed ends bit for bit as one that was not; what does not belong is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, VOICE
from safetensors.torch import load_file
from training import FULL, before_each_step, build, make_trainer

from finetuning import building, session, starting
from finetuning.base_model import resolve_base
from finetuning.disk import CHECKSUMS_FILE, damage
from finetuning.errors import Stopped, UserError
from finetuning.resume import (
    COMPARED_BY_CONTENT,
    MAY_CHANGE,
    MICRO_BATCHES,
    Resume,
    find_resume,
    may_begin_again,
    say_what_differs,
)
from finetuning.settings import Settings
from finetuning.state import State, find_states
from finetuning.tiny_model import embedded_model_folder

pytestmark = pytest.mark.usefixtures("one_thread")

#: Figures of a log line that depend on the clock.
CLOCK = ("timestamp", "frames_per_second", "seconds_left")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    """5 steps an epoch (the last one short), 2 micro-batches a step, 3 epochs; evaluation inside the epochs, too."""
    said = {"language": "Hausa", "instruct": "Slowly, please."}
    rows = [row | said if number % 3 else row for number, row in enumerate(demo_rows[:18])]

    def make(**fields: Any) -> Any:
        defaults = {
            "train_jsonl": write_jsonl(rows), "validation_jsonl": write_jsonl(demo_rows[-2:], "valid.jsonl"),
            "batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 3, "learning_rate": 1e-3,
            "warmup_steps": 1, "logging_steps": 2, "eval_steps": 3, "save_steps": 4, "resume": "auto",
        }  # fmt: skip
        given = FULL | defaults | fields
        return make_settings(**{name: value for name, value in given.items() if value is not None})

    return make


def run_to_the_end(settings: Any) -> Any:
    trainer = make_trainer(build(settings))
    trainer.run()
    return trainer


def run_until(settings: Any, step: int, stop: str) -> None:
    """Stops inside of a step: by SIGTERM (saves) or as if by SIGKILL (does not)."""
    stop_at(make_trainer(build(settings)), step, stop)


def stop_at(trainer: Any, step: int, stop: str) -> None:

    def interrupt(now: int) -> None:
        if now == step and stop == "killed":
            raise Killed
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    before_each_step(trainer, interrupt)
    with pytest.raises(Killed if stop == "killed" else Stopped):
        trainer.run()


def steps_of_states(output: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in find_states(output)]


def result(output: Path) -> dict[str, Any]:
    """Weights of every checkpoint, all log lines without clocks, what the checkpoints say of themselves."""
    folders = {"best", "last", *(folder.name for folder in output.glob("checkpoint-*"))}
    logs = [output / "training_log.jsonl", output / "validation_log.jsonl", output / "alarms.jsonl"]
    lines = [[json.loads(line) for line in log.read_text().splitlines()] if log.exists() else None for log in logs]
    return {
        "weights": {name: load_file(output / name / "model.safetensors") for name in sorted(folders)},
        "states": [json.loads((output / name / "training_state.json").read_text()) for name in sorted(folders)],
        "logs": [
            log and [{key: value for key, value in record.items() if key not in CLOCK} for record in log]
            for log in lines
        ],
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["logs"] == wanted["logs"]
    assert found["states"] == wanted["states"]
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weights in wanted["weights"].items():
        different = [key for key in weights if not torch.equal(weights[key], found["weights"][name][key])]
        assert not different, (name, different)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished and stopped runs that several tests look at or copy, by name."""
    return {"folder": tmp_path_factory.mktemp("shared")}


@pytest.fixture
def untouched(shared: dict[str, Path], settings_for: Callable) -> Path:
    """OUTPUT_DIR of the run that nothing stopped; trained once."""
    if "untouched" not in shared:
        run_to_the_end(settings_for(output_dir=shared["folder"] / "untouched"))
        shared["untouched"] = shared["folder"] / "untouched"
    return shared["untouched"]


@pytest.fixture
def wanted(untouched: Path) -> dict[str, Any]:
    """What it left."""
    return result(untouched)


@pytest.fixture
def stopped(shared: dict[str, Path], settings_for: Callable, tmp_path: Path) -> Path:
    """An OUTPUT_DIR of the test's own with a run that was stopped after step 9; its states are step-9 and step-8.

    Its JSONL files lay elsewhere. Large files are linked: replace them, never write into them.
    """
    if "stopped" not in shared:
        run_until(settings_for(output_dir=shared["folder"] / "stopped"), 9, "SIGTERM")
        shared["stopped"] = shared["folder"] / "stopped"
    return copy_of(shared["stopped"], tmp_path / "output")


def copy_of(run: Path, folder: Path) -> Path:
    def link(source: str, target: str) -> None:
        os.link(source, target) if source.endswith(".safetensors") else shutil.copy(source, target)

    return Path(shutil.copytree(run, folder, copy_function=link))


def found(settings: Any, num_processes: int = 1) -> Resume | None:
    return find_resume(settings, resolve_base(settings), num_processes)


# ------------------------------------------------------------------------------------------------------ bit for bit


@pytest.mark.parametrize(
    ("step", "stop"),
    [(1, "SIGTERM"), (5, "SIGTERM"), (6, "SIGTERM"), (15, "SIGTERM"), (1, "killed"), (4, "killed"), (9, "killed")],
)
def test_resumed_run_equals_the_untouched_one(
    settings_for: Callable, wanted: dict[str, Any], step: int, stop: str
) -> None:
    settings = settings_for()
    run_until(settings, step, stop)
    trainer = run_to_the_end(settings)
    assert trainer.progress.step == 15
    assert_same(result(settings.output_dir), wanted)


def test_with_data_workers_and_stopped_again_and_again(settings_for: Callable, wanted: dict[str, Any]) -> None:
    """Workers are ahead of the loop; what they fetched and it did not train on is fetched again."""
    settings = settings_for(num_workers=2)
    for step, stop in ((3, "SIGTERM"), (7, "killed"), (12, "SIGTERM")):
        run_until(settings, step, stop)
    run_to_the_end(settings)
    assert_same(result(settings.output_dir), wanted)


#: Runs of ten steps.
RECIPES: dict[str, dict[str, Any]] = {
    "new layers": {"replace_last_n_layers": 1, "add_new_layers": 1, "freeze_original_layers": True},
    "adapters with dropout": {
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "freeze_original_layers": True,
        "train_layout": "both",
    },
    "vectors of languages and speakers": {
        "new_languages": "hausa",
        "language_mix": 0.5,
        "instruct_dropout": 0.5,
        "speaker_embedding_trainable": True,
    },
    "cloning": {
        "export_type": "base",
        "reference_sampling": "same_speaker",
        "icl_fraction": 0.5,
        "train_layout": "both",
    },
    # Its first stop is exactly between two stages, its second in the middle of one.
    "stages": {
        "replace_last_n_layers": 1, "freeze_original_layers": True, "train_stages": "sub_talker:3,new_layers:5,all",
    },
    "average over stages": {
        "lora_rank": 4, "lora_dropout": 0.1, "freeze_original_layers": True, "ema_decay": 0.5, "layer_init": "copy",
        "replace_last_n_layers": 1, "train_stages": "adapters:3,new_layers+heads:5,all",
    },
    "no validation rows": {"validation_jsonl": None, "validation_fraction": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_other_runs_equal_the_untouched_ones(settings_for: Callable, tmp_path: Path, recipe: str) -> None:
    """Without validation rows best/ follows the mean training loss of an epoch, the part before the stop included.

    The states at their ends, too: weights, what the optimizer keeps, averages, random numbers.
    """
    fields = RECIPES[recipe] | {"num_epochs": 2}
    run_to_the_end(settings_for(output_dir=tmp_path / "untouched", **fields))
    settings = settings_for(**fields)
    run_until(settings, 3, "SIGTERM")
    run_until(settings, 7, "killed")
    run_to_the_end(settings)
    assert_same(result(settings.output_dir), result(tmp_path / "untouched"))
    states = [State(output / "state" / "step-10") for output in (settings.output_dir, tmp_path / "untouched")]
    names = states[1].names("")
    assert sorted(states[0].names("")) == sorted(names)
    assert [name for name in names if bits(states[0][name]) != bits(states[1][name])] == []
    assert any(name.startswith("ema.talker.") for name in names) == ("average" in recipe)


def test_an_early_stop_comes_where_it_came_to_the_untouched_run(settings_for: Callable, tmp_path: Path) -> None:
    """Evaluations at 2, 4, 5, 6 and 8, all ties as next to nothing is learnt: the fourth after the first is the last.

    The last time it is killed between that evaluation and the end of the run. The alarm of a warm-up that is too long
    comes once, at the beginning.
    """
    fields = {"learning_rate": 1e-30, "eval_steps": 2, "early_stopping_patience": 4, "warmup_steps": 100}
    run_to_the_end(settings_for(output_dir=tmp_path / "untouched", **fields))
    settings = settings_for(**fields)
    run_until(settings, 3, "SIGTERM")
    run_until(settings, 7, "killed")
    trainer = make_trainer(build(settings))
    end_epoch = trainer._end_epoch
    trainer._end_epoch = lambda: raise_killed() if trainer.progress.step == 8 else end_epoch()
    with pytest.raises(Killed):
        trainer.run()
    assert steps_of_states(settings.output_dir) == [8, 4]
    trainer = run_to_the_end(settings)
    assert (trainer.progress.step, trainer.progress.num_not_better, trainer.progress.best.step) == (8, 4, 2)
    assert_same(result(settings.output_dir), result(tmp_path / "untouched"))
    alarms = [json.loads(line) for line in (settings.output_dir / "alarms.jsonl").read_text().splitlines()]
    assert [(alarm["step"], alarm["kind"]) for alarm in alarms] == [(0, "warm_up_too_long")]


@pytest.mark.parametrize("steps", [(3,), (11,), (14, 16)], ids=["in a window", "second window", "second epoch, twice"])
def test_streamed_runs_equal_the_untouched_one(
    shared: dict[str, Path],
    make_settings: Callable,
    fake: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: tuple[int, ...],
) -> None:
    """DATA_MODE=direct: 11 steps an epoch, in windows of 8 and 3; two epochs. The cache of codes is not needed."""
    from test_direct import direct_fields, write_dataset

    monkeypatch.chdir(tmp_path)

    def settings_for(output: Path) -> Any:
        defaults = {
            "batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 2, "logging_steps": 3, "save_steps": 4,
            "eval_steps": 5, "validation_fraction": 0.05, "ref_audio_path": VOICE / "clips" / "train_05.flac",
            "learning_rate": 1e-3, "warmup_steps": 1, "replace_last_n_layers": 1, "add_new_layers": 0, "resume": "auto",
            "output_dir": output, "codes_cache_dir": tmp_path / f"cache of {output.name}",
        }  # fmt: skip
        return make_settings(**(direct_fields(shared["folder"] / "set") | defaults))

    if "streamed" not in shared:
        write_dataset(shared["folder"] / "set", 45)
        run_to_the_end(settings_for(shared["folder"] / "streamed"))
        shared["streamed"] = shared["folder"] / "streamed"
    settings = settings_for(tmp_path / "output")
    for step, stop in zip(steps, ("killed", "SIGTERM"), strict=False):
        run_until(settings, step, stop)
        shutil.rmtree(settings.codes_cache_dir)
    trainer = run_to_the_end(settings)
    assert trainer.progress.step == 22
    assert_same(result(settings.output_dir), result(shared["streamed"]))


def test_a_run_that_has_ended_goes_on_where_there_is_more_to_do(
    settings_for: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a constant rate its steps are those of a run that had all its epochs from the start."""
    constant = {"lr_scheduler": "constant", "warmup_steps": 0}
    run_to_the_end(settings_for(output_dir=tmp_path / "untouched", num_epochs=3, **constant))
    for fields in ({"num_epochs": 1}, {"num_epochs": 2, "max_steps": 7}, {"num_epochs": 3, "max_steps": 12}):
        trainer = run_to_the_end(settings_for(**(fields | constant)))
        assert trainer.progress.step == fields.get("max_steps", 5)
        assert json.loads((trainer.settings.output_dir / "last" / "training_state.json").read_text())["complete"]
    settings = settings_for(num_epochs=3, **constant)
    assert run_to_the_end(settings).progress.step == 15
    weights = [
        load_file(folder / "last" / "model.safetensors") for folder in (tmp_path / "untouched", tmp_path / "output")
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    log = (settings.output_dir / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [2, 4, 5, 6, 7, 8, 10, 12, 14, 15]
    assert "differ" not in capsys.readouterr().out


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (1, 4)])
def test_micro_batches_may_be_cut_otherwise(
    settings_for: Callable, stopped: Path, batch_size: int, accumulation: int
) -> None:
    """Stopped after 4 of the 5 steps of the second epoch: the rest of its rows come once, and all rows after it."""
    rows = {line for step in lines_of_epoch(settings_for(), 1) for line in step}
    before = {line for step in lines_of_epoch(settings_for(), 1)[:4] for line in step}
    trainer = make_trainer(
        build(settings_for(batch_size=batch_size, gradient_accumulation_steps=accumulation, output_dir=stopped))
    )
    take, seen = trainer.stepper.take, []

    def noted(batches: Any, *arguments: Any) -> Any:
        seen.append(sorted(line for batch in batches for line in batch["lines"].tolist()))
        return take(batches, *arguments)

    trainer.stepper.take = noted
    trainer.run()
    assert trainer.progress.step == 15
    assert len(rows) == 18 and set(seen[0]) == rows - before and len(seen[0]) == 2
    assert sorted(line for step in seen[1:] for line in step) == sorted(rows)


def lines_of_epoch(settings: Any, epoch: int) -> list[list[int]]:
    """The lines of the rows of each step, by the plan of a run that nothing stopped."""
    base, device = starting.check_inputs(settings)
    accelerator = starting.start(settings, device)
    rows = starting.open_rows(settings, base, accelerator)
    steps = building.make_steps(settings, rows, None, accelerator)
    lines = rows.train.column("line")
    return [[int(lines[row]) for batch in plan for row in batch] for plan in steps.sampler.epoch_plan(epoch)]


# ------------------------------------------------------------------------------------------------ what is not needed


def test_speakers_come_from_the_state(
    settings_for: Callable, write_jsonl: Callable, demo_rows: list, tmp_path: Path
) -> None:
    """The clips that their vectors were made of may be gone."""
    clip = shutil.copy(demo_rows[9]["audio"], tmp_path / "clip.flac")
    rows = [
        row | {"ref_audio": str(clip), "speaker": "Ada" if number % 2 else "Bea"}
        for number, row in enumerate(demo_rows[:4])
    ]
    settings = settings_for(train_jsonl=write_jsonl(rows, "speakers.jsonl"), num_epochs=2, replace_last_n_layers=1)
    run = build(settings)
    stop_at(make_trainer(run), 2, "SIGTERM")
    Path(clip).unlink()
    resumed = build(settings)
    assert torch.equal(resumed.speakers.vectors, run.speakers.vectors)
    assert (resumed.speakers.names, resumed.speakers.codec_rows, resumed.speakers.references) == (
        run.speakers.names, run.speakers.codec_rows, run.speakers.references,
    )  # fmt: skip
    resumed.lock.close()
    import train

    train.train(settings)  # with DATA_CHECK
    assert steps_of_states(settings.output_dir) == [2]


def test_a_jsonl_may_move(settings_for: Callable, stopped: Path, tmp_path: Path) -> None:
    """Its rows are what counts."""
    settings = settings_for()
    moved = tmp_path / "elsewhere" / "rows.jsonl"
    moved.parent.mkdir()
    moved.write_text(settings.train_jsonl.read_text().replace("{", "{ ", 1))
    run = build(settings_for(train_jsonl=moved))
    assert run.state.step == 9


@pytest.mark.parametrize("name", ["train_jsonl", "validation_jsonl"])
def test_other_rows_are_refused(settings_for: Callable, stopped: Path, name: str) -> None:
    settings = settings_for()
    file = getattr(settings, name)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], lines[-1].replace('"text": "', '"text": "Well, ')]) + "\n")
    before = sorted(stopped.rglob("*"))
    with pytest.raises(UserError, match=rf"^{name.upper()} \(.*\): the rows are not those of the state in .*/step-9"):
        build(settings)
    assert sorted(stopped.rglob("*")) == before


# ------------------------------------------------------------------------------------------------------- differences


def test_the_lists_name_settings() -> None:
    names = {name.upper() for name in Settings.model_fields}
    assert (MAY_CHANGE | COMPARED_BY_CONTENT | set(MICRO_BATCHES)) <= names


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"learning_rate": 2e-3}, "LEARNING_RATE was 0.001, is 0.002"),
    "seed": ({"seed": 7}, "SEED was 42, is 7"),
    "layers": ({"add_new_layers": 1}, "ADD_NEW_LAYERS was 0, is 1"),
    "speaker": ({"speaker_name": "Ada"}, "SPEAKER_NAME was reference_speaker, is Ada"),
    "precision": ({"mixed_precision": "bf16"}, "MIXED_PRECISION was no, is bf16"),
    "limit": ({"max_train_samples": 5}, "MAX_TRAIN_SAMPLES was unset, is 5"),
    "frozen": ({"freeze_original_layers": True}, "FREEZE_ORIGINAL_LAYERS was false, is true"),
    "balance": ({"speaker_balance": 0.5}, "SPEAKER_BALANCE was 0.0, is 0.5"),
    "curriculum": ({"curriculum": "short_first"}, "CURRICULUM was none, is short_first"),
    "stages": ({"train_stages": "talker:5, all"}, "TRAIN_STAGES was unset, is talker:5,all"),
    "average": ({"ema_decay": 0.9}, "EMA_DECAY was 0.0, is 0.9"),
    "rows": ({"batch_size": 4}, r"BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS x processes was 4, is 8 (rows of a step)"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_differences_are_refused_by_name(settings_for: Callable, stopped: Path, case: str) -> None:
    fields, message = DIFFERENT[case]
    settings = settings_for(**fields)
    with pytest.raises(UserError) as refused:
        found(settings)
    text = (
        f"OUTPUT_DIR: {stopped} holds a run that was begun with other settings, so it cannot be resumed: {message}. Put"
    )
    assert str(refused.value).startswith(text)
    with pytest.raises(UserError) as refused:
        found(settings_for(**fields, resume=str(stopped)))
    assert str(refused.value).startswith(f"RESUME: {stopped}/state/step-9 belongs to other settings: {message}. Put")


def test_all_differences_are_listed(settings_for: Callable, stopped: Path) -> None:
    with pytest.raises(UserError, match=r"LEARNING_RATE was 0\.001, is 0\.1; SEED was 42, is 7\. Put them back"):
        found(settings_for(learning_rate=0.1, seed=7))


def test_another_base_is_refused_and_a_moved_one_is_not(settings_for: Callable, stopped: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(embedded_model_folder("tiny-random"), moved)
    settings = settings_for(init_model_path=str(moved))
    assert found(settings).folder == stopped / "state" / "step-9"
    with (moved / "model.safetensors").open("rb+") as stream:
        stream.seek(-3, os.SEEK_END)
        stream.write(b"\xff")
    with pytest.raises(UserError, match=rf"INIT_MODEL_PATH: {moved} has other weights than the base of that run"):
        found(settings)


ALLOWED: dict[str, dict[str, Any]] = {
    "length": {"num_epochs": 9, "max_steps": 30},
    "shorter": {"num_epochs": 2},
    "intervals": {"logging_steps": 1, "save_steps": 9, "eval_steps": 9, "save_minutes": 5.0, "save_total_limit": 1},
    "keeping": {"save_epochs": True, "verify_roundtrip": 1, "overwrite_output": True},
    "named otherwise": {"save_epochs": True, "epoch_folder": "checkpoint-epoch"},
    "machine": {"num_workers": 3, "attn_implementation": "eager", "data_check": "off"},
    "logging": {"wandb_project": "mine", "wandb_run_name": "second", "report_to": "tensorboard"},
    "best": {"best_metric": "accuracy", "early_stopping_patience": 3},
    "cut otherwise": {"batch_size": 1, "gradient_accumulation_steps": 4, "effective_batch_size": 4},
}


@pytest.mark.parametrize("case", ALLOWED)
def test_some_settings_may_change(settings_for: Callable, stopped: Path, case: str) -> None:
    assert found(settings_for(**ALLOWED[case])).folder == stopped / "state" / "step-9"


def test_the_number_of_processes_may_change_and_is_said(
    settings_for: Callable, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = found(settings_for(batch_size=1), num_processes=2).state()
    say_what_differs(state, 2)
    assert "saved by 1 processes, now 2: the order of the rows may differ" in capsys.readouterr().out


def test_another_number_of_threads_is_said(
    settings_for: Callable, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = found(settings_for()).state()
    say_what_differs(state, 1)
    assert capsys.readouterr().out == ""
    torch.set_num_threads(2)
    try:
        say_what_differs(state, 1)
    finally:
        torch.set_num_threads(1)
    assert "saved with 1 threads, now 2" in capsys.readouterr().out
    state.record["versions"]["torch"] = "1.0"
    say_what_differs(state, 1)
    assert f"saved with torch 1.0, now {torch.__version__}" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- where it goes on


def test_never_refuses_a_folder_with_a_run(settings_for: Callable, stopped: Path) -> None:
    before = sorted(stopped.rglob("*"))
    with pytest.raises(UserError, match=rf"OUTPUT_DIR: {stopped} already holds a run \(state, .*RESUME=auto to go on"):
        build(settings_for(resume="never"))
    assert sorted(stopped.rglob("*")) == before


def test_overwrite_replaces_a_run_with_other_settings(
    settings_for: Callable, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it comes back, not even a folder that a crash had left on its way out of its place."""
    shutil.copytree(stopped / "best", stopped / ".best.old.tmp")
    (stopped / "last").rename(stopped / ".last.old.tmp")
    run = build(settings_for(seed=7, overwrite_output=True))
    assert run.state is None
    assert sorted(entry.name for entry in stopped.iterdir()) == [".lock", "rows", "settings.json"]
    assert "had other settings and is replaced: SEED was 42, is 7" in capsys.readouterr().out


def test_overwrite_does_not_replace_a_run_that_can_go_on(settings_for: Callable, stopped: Path) -> None:
    assert build(settings_for(overwrite_output=True)).state.step == 9


@pytest.mark.parametrize("named", ["", "state", "state/step-9", "state/step-8"])
def test_a_state_may_be_named(settings_for: Callable, stopped: Path, named: str, tmp_path: Path) -> None:
    settings = settings_for(resume=str(stopped / named), output_dir=tmp_path / "other")
    step = 8 if named.endswith("8") else 9
    resume = found(settings)
    assert (resume.folder, resume.run_dir) == (stopped / "state" / f"step-{step}", stopped)


def test_a_named_state_goes_on_in_another_folder(
    settings_for: Callable, stopped: Path, wanted: dict[str, Any], tmp_path: Path
) -> None:
    """best/ and the logs come along; what lies in the run's own folder stays as it is."""
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    settings = settings_for(resume=str(stopped / "state" / "step-8"), output_dir=tmp_path / "other")
    run = build(settings)
    assert damage(settings.output_dir / "best") == []
    for name in ("training_log.jsonl", "validation_log.jsonl"):
        assert (settings.output_dir / name).read_bytes() == (stopped / name).read_bytes()
    make_trainer(run).run()
    for name in ("checkpoint-4", "checkpoint-8"):
        shutil.copytree(stopped / name, settings.output_dir / name)
    assert_same(result(settings.output_dir), wanted)
    assert {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()} == before
    assert build(settings).state.step == 15  # what is started again by the same command goes on where it was


def test_a_named_state_that_was_taken_over_by_half_is_taken_over_again(
    settings_for: Callable, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the copies of logs and best/ and the first state of its own."""
    settings = settings_for(resume=str(stopped), output_dir=tmp_path / "other")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("finetuning.resume.damage", raise_killed)  # after the logs, before best/
        build(settings)
    assert (settings.output_dir / "training_log.jsonl").exists()
    run = build(settings)
    assert run.state.step == 9 and damage(settings.output_dir / "best") == []


def raise_killed(*_: Any) -> None:
    raise Killed


def test_an_older_state_of_the_same_folder_gives_up_the_newer_ones(settings_for: Callable, stopped: Path) -> None:
    run = build(settings_for(resume=str(stopped / "state" / "step-8")))
    assert run.state.step == 8 and steps_of_states(stopped) == [8]
    moved = (stopped / "state" / "step-8").rename(stopped / "state" / "my favourite")
    assert build(settings_for(resume=str(moved))).state.step == 8


def test_a_name_that_stays_in_the_settings_goes_back_only_once(
    settings_for: Callable, stopped: Path, wanted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A requeued job has the same settings; the named state may have been rotated away by then."""
    named = stopped / "state" / "step-8"
    settings = settings_for(resume=str(named), save_steps=2)
    run_until(settings, 13, "killed")
    assert steps_of_states(stopped) == [12, 10]
    assert build(settings_for(resume=str(named), save_steps=2)).state.step == 12
    assert f"has gone on from {named} already" in capsys.readouterr().out
    with pytest.raises(UserError, match="is no folder"):
        settings_for(resume=str(named), output_dir=stopped.parent / "elsewhere")


def test_a_named_state_replaces_another_run_only_on_request(
    settings_for: Callable, stopped: Path, tmp_path: Path
) -> None:
    """Also one with the same settings, which did not go on from there."""
    named = copy_of(stopped, tmp_path / "named") / "state" / "step-8"
    with pytest.raises(UserError, match="already holds a run"):
        build(settings_for(resume=str(named)))
    assert steps_of_states(stopped) == [9, 8]
    run = build(settings_for(resume=str(named), overwrite_output=True))
    assert run.state.step == 8 and steps_of_states(stopped) == [8]


def test_checkpoints_whose_states_are_gone_are_not_removed(settings_for: Callable, stopped: Path) -> None:
    """They may be all that somebody has kept; only what comes before the first state comes again as it is."""
    shutil.rmtree(stopped / "state")
    settings_for().save(stopped / "settings.json")
    with pytest.raises(UserError, match="already holds a run"):
        build(settings_for())
    assert (stopped / "best").is_dir()
    run = build(settings_for(save_steps=20))
    assert run.state is None and not (stopped / "best").exists()


def test_a_lost_best_is_written_again(settings_for: Callable, stopped: Path) -> None:
    shutil.rmtree(stopped / "best")
    trainer = make_trainer(build(settings_for()))
    assert trainer.progress.best is None
    trainer.run()
    assert damage(stopped / "best") == []


def test_a_name_without_a_state_is_refused(settings_for: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"RESUME: .*/empty holds no whole state to resume from \(state/step-N"):
        found(settings_for(resume=str(tmp_path / "empty")))
    with pytest.raises(UserError, match=r"RESUME: .*/nowhere is no folder; set auto, never, or"):
        settings_for(resume=str(tmp_path / "nowhere"))


# ----------------------------------------------------------------------------------------------------------- damage


def truncate(state: Path) -> str:
    file = next(state.glob("*.safetensors"))
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1])
    return f"{file.name} has {len(content) - 1:,} bytes instead of {len(content):,}"


def flip(state: Path) -> str:
    file = next(state.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)
    return f"{file.name} has other content than was saved"


def remove(state: Path) -> str:
    file = next(state.glob("*.safetensors"))
    file.unlink()
    return f"{file.name} is missing"


def remove_checksums(state: Path) -> str:
    (state / CHECKSUMS_FILE).unlink()
    return f"{CHECKSUMS_FILE} is missing"


def empty_record(state: Path) -> str:
    size = (state / "state.json").stat().st_size
    (state / "state.json").write_text("")
    return f"state.json has 0 bytes instead of {size:,}"


@pytest.mark.parametrize("harm", [truncate, flip, remove, remove_checksums, empty_record])
def test_a_damaged_state_is_named_and_the_one_before_is_used(
    settings_for: Callable, stopped: Path, harm: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    newest = stopped / "state" / "step-9"
    problem = harm(newest)
    assert found(settings_for()).folder == stopped / "state" / "step-8"
    assert f"{newest} is damaged ({problem}); going back to the state before it" in capsys.readouterr().out
    assert found(settings_for(resume=str(stopped))).folder == stopped / "state" / "step-8"
    if harm is not empty_record:
        with pytest.raises(UserError) as refused:
            found(settings_for(resume=str(newest)))
        assert str(refused.value).startswith(f"RESUME: {newest} is damaged: {problem}. RESUME=auto takes")
    harm(stopped / "state" / "step-8")
    with pytest.raises(UserError, match=rf"OUTPUT_DIR: no state in {stopped}/state is whole"):
        found(settings_for())
    assert found(settings_for(overwrite_output=True)) is None


def test_the_run_that_goes_back_to_the_state_before_equals_the_untouched_one(
    settings_for: Callable, stopped: Path, wanted: dict[str, Any]
) -> None:
    flip(stopped / "state" / "step-9")
    run = build(settings_for())
    assert steps_of_states(stopped) == [8]
    make_trainer(run).run()
    assert_same(result(stopped), wanted)


# ------------------------------------------------------------------------------------------- the beginning and the end


def test_a_run_without_a_state_begins_again_only_as_what_it_was(
    settings_for: Callable, write_jsonl: Callable, demo_rows: list, tmp_path: Path
) -> None:
    """Killed before its first state. With other settings or files it is another run, whose best/ would be lost."""
    settings = settings_for()
    output = settings.output_dir
    (output / "best").mkdir(parents=True)
    settings.save(output / "settings.json")
    assert may_begin_again(settings)
    others = [
        settings_for(seed=7),
        settings_for(resume="never"),
        settings_for(train_jsonl=write_jsonl(demo_rows[:2], "other.jsonl")),
        settings_for(init_model_path="tiny"),
    ]
    assert not [other for other in others if may_begin_again(other)]
    (output / "settings.json").write_text("{")
    assert not may_begin_again(settings)
    (output / "settings.json").unlink()
    assert not may_begin_again(settings)
    with pytest.raises(UserError, match="already holds a run"):
        build(settings)


def test_a_finished_run_without_its_state_does_not_begin_again(
    settings_for: Callable, untouched: Path, tmp_path: Path
) -> None:
    output = copy_of(untouched, tmp_path / "output")
    shutil.rmtree(output / "state")
    settings_for().save(output / "settings.json")
    with pytest.raises(UserError, match=r"already holds a run \(best, last, "):
        build(settings_for())


def test_a_complete_run_says_so_and_changes_nothing(
    settings_for: Callable, untouched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = copy_of(untouched, tmp_path / "output")
    with (output / "validation_log.jsonl").open("a") as stream:
        stream.write('{"step": 15, "metrics": {"roundtrip_reproduced": 1.0}}\n')  # comes after the state
    settings = settings_for()
    settings.save(output / "settings.json")
    shutil.rmtree(output / "rows")  # says where the JSONL lies
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    session.train(build(settings))
    assert (
        f"This run is complete: {output} holds 15 steps, and nothing is left of its NUM_EPOCHS"
        in capsys.readouterr().out
    )
    shutil.rmtree(output / "rows")
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before


# ------------------------------------------------------------------------------------------------------------- lock


def test_a_second_run_in_the_same_folder_is_refused(settings_for: Callable, stopped: Path) -> None:
    """Locks are per process, so another one holds it; it goes with the process, however that ends."""
    code = (
        "import sys; from pathlib import Path; from finetuning.checkpoint import lock_output_folder as lock\n"
        "held = lock(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(stopped)]
    before = sorted(stopped.rglob("*"))
    other = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"OUTPUT_DIR: another run is writing to {stopped}"):
            build(settings_for())
        assert sorted(stopped.rglob("*")) == before
    finally:
        other.kill()
        other.wait()
    run = build(settings_for())
    assert run.state.step == 9 and not run.lock.closed
