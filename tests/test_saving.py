"""A disk that is full, or refuses otherwise, costs a checkpoint and not the run; what was saved before stays whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import subprocess
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training import FULL, build, make_trainer, signal_in_step

from finetuning import checkpoint, saving
from finetuning.checkpoint import rotate_checkpoints
from finetuning.disk import bytes_of, damage
from finetuning.errors import UserError, run_main
from finetuning.progress import Best
from finetuning.saving import Saved, Saver, state_bytes
from finetuning.state import State, find_states, state_folder, step_of
from finetuning.tracking import Tracker

pytestmark = pytest.mark.usefixtures("one_thread")

#: Smaller than the weights of a checkpoint, and larger than any other file that is written.
NO_WEIGHTS = 5 * 2**20


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    """One step an epoch; a checkpoint and a state after each second step, ``last/`` after each."""

    def make(**fields: Any) -> Any:
        defaults = {
            "train_jsonl": write_jsonl(demo_rows[:2]), "validation_fraction": 0.0, "batch_size": 2,
            "gradient_accumulation_steps": 1, "num_epochs": 4, "logging_steps": 1, "save_steps": 2,
            "replace_last_n_layers": 1, "add_new_layers": 0, "resume": "auto",
        }  # fmt: skip
        return make_settings(**(defaults | fields))

    return make


@contextlib.contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Files of this process cannot grow beyond it, as on a disk that is full in the middle of one. Python ignores the
    signal that would end the process, so writing fails with an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def spy_on_saves(trainer: Any, limits: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Saved]]:
    """Limits files to so many bytes in the saves of those numbers (from 1); gives (step, what worked) of each save."""
    save, seen = trainer.saver.save, []

    def limited(*arguments: Any) -> Saved:
        with file_size_limit(limits.get(len(seen) + 1, resource.RLIM_INFINITY)):
            seen.append((trainer.progress.step, Saved(False, False)))
            seen[-1] = (trainer.progress.step, save(*arguments))
        assert_whole(trainer.settings.output_dir)
        return seen[-1][1]

    monkeypatch.setattr(trainer.saver, "save", limited)
    return seen


def assert_whole(output: Path) -> None:
    """Every checkpoint and state is whole, and nothing lies beside them."""
    states = find_states(output)
    folders = [entry for entry in output.iterdir() if entry.is_dir() and entry.name not in ("state", "rows")]
    assert {str(folder): damage(folder) for folder in [*folders, *states]} == {str(f): [] for f in [*folders, *states]}
    hidden = [*output.glob(".*"), *(output / "state").glob(".*")]
    assert [entry.name for entry in hidden] == [".lock"]


def step_in(folder: Path) -> int:
    return json.loads((folder / "training_state.json").read_text())["step"]


def state_steps(settings: Any) -> list[int]:
    return [step_of(folder) for folder in find_states(settings.output_dir)]


# --------------------------------------------------------------------------------------------------------- full disk


def test_failed_saves_cost_nothing_but_themselves(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saves: 1 last/ (step 1), 2 checkpoint-2, 3 last/ (step 2), 4 last/, 5 checkpoint-4 … Two fail, one works, two
    fail, and so on: never three in a row."""
    settings = settings_for(num_epochs=6)
    trainer = make_trainer(build(settings))
    seen = spy_on_saves(trainer, {number: NO_WEIGHTS for number in (4, 5, 7, 8)}, monkeypatch)
    trainer.run()
    assert [step for step, _ in seen] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert [number for number, (_, saved) in enumerate(seen, 1) if not saved.checkpoints] == [4, 5, 7, 8]
    said = capsys.readouterr().out
    warnings = re.findall(
        r"warning: (.*) could not be saved: .*File too large.* is whole; training goes on \(failure (.) of 3\)", said
    )
    with_best = "last/ and best/"  # the mean training loss falls in each epoch
    assert warnings == [(with_best, "1"), ("checkpoint-4/", "2"), (with_best, "1"), ("checkpoint-6/", "2")]
    output = settings.output_dir
    assert sorted(folder.name for folder in output.glob("checkpoint-*")) == ["checkpoint-2"]
    assert (step_in(output / "last"), state_steps(settings)) == (6, [6, 2])
    assert len((output / "training_log.jsonl").read_text().splitlines()) == 6


def test_a_state_that_fails_is_named_and_its_checkpoint_stays(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of a state are larger than those of a checkpoint when all weights train."""
    settings = settings_for(**FULL)
    run = build(settings)
    trainer = make_trainer(run)
    limit = round(1.5 * run.exporter.required_bytes())
    seen = spy_on_saves(trainer, {5: limit}, monkeypatch)
    trainer.run()
    assert [saved for _, saved in seen][3:5] == [Saved(True, True), Saved(True, False)]
    assert "warning: the state could not be saved: " in capsys.readouterr().out
    assert step_in(settings.output_dir / "checkpoint-4") == 4
    assert state_steps(settings) == [4, 2]  # that of the end


def test_the_third_failure_in_a_row_ends_the_run(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for()
    trainer = make_trainer(build(settings))
    spy_on_saves(trainer, {number: NO_WEIGHTS for number in (3, 4, 5)}, monkeypatch)
    with pytest.raises(SystemExit) as left:
        run_main(trainer.run)
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out.count("warning: ") == 2
    assert said.err.startswith(f"error: OUTPUT_DIR: saving in {settings.output_dir} failed 3 times in a row, last ")
    assert "checkpoint-4/: " in said.err and "Traceback" not in said.err and said.err.count("\n") == 1
    output = settings.output_dir
    assert_whole(output)
    assert (step_in(output / "last"), step_in(output / "checkpoint-2"), state_steps(settings)) == (1, 2, [2])
    trainer = make_trainer(build(settings))  # the disk has space again
    trainer.run()
    assert trainer.progress.step == step_in(output / "last") == 4


@pytest.mark.parametrize("what", ["checkpoint", "state"])
def test_the_end_of_a_run_must_be_saved(settings_for: Callable, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(num_epochs=1, save_steps=1, **FULL)
    run = build(settings)
    trainer = make_trainer(run)
    limit = NO_WEIGHTS if what == "checkpoint" else round(1.5 * run.exporter.required_bytes())
    seen = spy_on_saves(trainer, {2: limit}, monkeypatch)
    if what == "checkpoint":
        with pytest.raises(UserError, match=r"OUTPUT_DIR: the end of the run could not be saved in .* start it again"):
            trainer.run()
    else:  # what was trained is there; only going on with it has to wait for space
        trainer.run()
    assert seen == [(1, Saved(True, True)), (1, Saved(what == "state", False))]
    trainer = make_trainer(build(settings))
    trainer.run()
    assert state_steps(settings) == [1] and step_in(settings.output_dir / "last") == 1


def test_a_stop_whose_save_fails_is_no_success(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(build(settings_for()))
    signal_in_step(trainer, 3)
    spy_on_saves(trainer, {4: NO_WEIGHTS}, monkeypatch)  # 1 last/, 2 checkpoint-2, 3 last/, 4 the stop
    with pytest.raises(UserError, match=r"stopped by signal 15, but .* could not be written"):
        trainer.run()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("told", [True, False], ids=["known to be full", "found to be full"])
def test_a_disk_that_is_really_full(
    settings_for: Callable,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: bool,
) -> None:
    """Somebody else fills it after step 2 and makes room after step 3. Some file systems do not tell beforehand."""
    settings = settings_for(output_dir=small_disk / "output", num_epochs=5)
    trainer = make_trainer(build(settings))
    if not told:
        monkeypatch.setattr(saving, "free_bytes", lambda _: 10**15)
    take, filler = trainer.stepper.take, small_disk / "filler"

    def observed(*arguments: Any) -> Any:
        if trainer.progress.step == 2:
            free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
            filler.write_bytes(b"\0" * (free - 8 * 2**20))
        if trainer.progress.step == 3:
            assert_whole(settings.output_dir)
            assert step_in(settings.output_dir / "last") == 2
            filler.unlink()
        return take(*arguments)

    monkeypatch.setattr(trainer.stepper, "take", observed)
    trainer.run()
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "warning: last/ and best/ could not be saved: " in said
    assert ("GB are needed, 0.01 GB are free" if told else "No space left on device") in said
    assert_whole(settings.output_dir)
    assert (step_in(settings.output_dir / "last"), state_steps(settings)) == (5, [5, 4])


# ---------------------------------------------------------------------------------------------------------- by time


def test_saving_by_time(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAVE_MINUTES: last/ and a state after the step in which the time was up; any other state begins it anew."""
    trainer = make_trainer(build(settings_for(save_steps=6, save_minutes=10.0, num_epochs=8)))
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr("finetuning.trainer.time", clock)
    trainer._saved_at = 0.0
    save, take, seen = trainer.saver.save, trainer.stepper.take, []

    def noted(_: Any, names: list[str], with_state: bool, epoch: int) -> Saved:
        if with_state:
            seen.append((trainer.progress.step, names))
        return save(trainer, names, with_state, epoch)

    def timed(*arguments: Any) -> Any:
        now[0] += 60 * 4.0
        return take(*arguments)

    monkeypatch.setattr(trainer.saver, "save", noted)
    monkeypatch.setattr(trainer.stepper, "take", timed)
    trainer.run()
    assert seen == [(4, ["last"]), (6, ["checkpoint-6"]), (8, ["last", "best"])]


# -------------------------------------------------------------------------------------------------------- the space


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, demo_rows: list[dict]) -> Any:
    """A trainer that has taken no step; for saves by hand."""
    from finetuning.settings import load_settings

    folder = tmp_path_factory.mktemp("quiet")
    jsonl = folder / "train.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in demo_rows[:2]), encoding="utf-8")
    fields = {
        "device": "cpu", "mixed_precision": "no", "init_model_path": "tiny-random", "train_jsonl": jsonl,
        "output_dir": folder / "output", "use_wandb": False, "validation_fraction": 0.0, "resume": "never",
    }  # fmt: skip
    return make_trainer(build(load_settings(fields, environment={})))


@pytest.fixture
def saver(quiet: Any) -> Saver:
    quiet.saver._num_failures = 0
    quiet.progress.step = 0
    return quiet.saver


def write_states(output: Path, sizes: dict[int, int]) -> None:
    """Folders that stand for states."""
    for step, size in sizes.items():
        state_folder(output, step).mkdir(parents=True)
        (state_folder(output, step) / "state.json").write_bytes(b" " * size)


def remove_states(output: Path) -> None:
    for folder in find_states(output):
        checkpoint.remove_folder(folder)


def test_nothing_is_written_that_does_not_fit(quiet: Any, saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    required = saver.exporter.required_bytes() + state_bytes(saver.exporter.model)
    monkeypatch.setattr(saving, "free_bytes", lambda _: required - 1)
    output = quiet.settings.output_dir
    before = sorted(output.rglob("*"))
    written: list[Any] = []
    monkeypatch.setattr(saver.exporter, "save", lambda *arguments: written.append(arguments))
    monkeypatch.setattr(saving, "save_state", lambda *arguments: written.append(arguments))
    assert saver.save(quiet, ["checkpoint-3"], True, 0) == Saved(False, False)
    assert written == [] and sorted(output.rglob("*")) == before
    monkeypatch.setattr(saving, "free_bytes", lambda _: required)
    assert saver.save(quiet, ["checkpoint-3"], True, 0) == Saved(True, True)
    assert len(written) == 2
    monkeypatch.setattr(saving, "free_bytes", lambda _: saver.exporter.required_bytes())
    assert saver.save(quiet, ["last"], False, 0) == Saved(True, True)
    assert saver.save(quiet, [], True, 0).state == (
        saver.exporter.required_bytes() >= state_bytes(saver.exporter.model)
    )


@pytest.mark.parametrize(("missing", "wanted"), [(0, [8, 4]), (1, [8]), (1000, [8]), (1001, [8, 4])])
def test_the_older_state_makes_room_where_that_helps(
    quiet: Any, saver: Saver, missing: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older state takes 1000 bytes; the newer one is never given up."""
    output = quiet.settings.output_dir
    write_states(output, {4: 1000, 8: 3000})
    total = bytes_of(output / "state")
    required = state_bytes(saver.exporter.model)
    monkeypatch.setattr(
        saving, "free_bytes", lambda _: required - missing + total - sum(map(bytes_of, find_states(output)))
    )
    monkeypatch.setattr(saving, "save_state", lambda *_: None)
    saved = saver.save(quiet, [], True, 0)
    kept = [step_of(folder) for folder in find_states(output)]
    remove_states(output)
    assert (kept, saved.state) == (wanted, missing <= 1000)


def test_an_upload_makes_room_for_a_save(quiet: Any, saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only where there is none, and the older state would not do."""
    required, freed = saver.exporter.required_bytes(), []
    monkeypatch.setattr(saver, "_make_room", lambda: freed.append(1))
    monkeypatch.setattr(saver.exporter, "save", lambda *_: None)
    monkeypatch.setattr(saving, "free_bytes", lambda _: required - (not freed))
    assert saver.save(quiet, ["last"], False, 0) == saver.save(quiet, ["last"], False, 0) == Saved(True, True)
    assert freed == [1]


def test_what_is_said_to_be_needed_is_what_is_written(quiet: Any, saver: Saver) -> None:
    """New layers only: a state holds what trains, three times."""
    quiet.stepper.take(*one_step(quiet))
    saver.save(quiet, ["last"], True, 0)
    output = quiet.settings.output_dir
    state = State(state_folder(output, 0))
    tensors = [name for name in state.names("") if name.startswith(("weights.", "optimizer.exp_avg"))]
    num_bytes = sum(state[name].nbytes for name in tensors)
    checkpoint.remove_folder(output / "last")
    remove_states(output)
    assert state_bytes(saver.exporter.model) == num_bytes


def one_step(trainer: Any) -> tuple[Any, int, int]:
    from finetuning.dataset import count_tokens

    batches = next(iter(trainer.train_steps.steps(0))).batches
    return (batches, *count_tokens(batches))


# ------------------------------------------------------------------------------------------------------------ best/


def test_best_loss_is_that_of_the_best_on_the_disk(
    settings_for: Callable, write_jsonl: Callable, demo_rows: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 would have been the best but could not be saved, so step 3 is, though it is worse than step 2."""
    settings = settings_for(
        validation_jsonl=write_jsonl(demo_rows[-1:], "valid.jsonl"), save_steps=100, num_epochs=5, eval_steps=1
    )
    trainer = make_trainer(build(settings))
    losses = iter([5.0, 3.0, 4.0, 4.5, 2.0])
    figures = dict.fromkeys(("accuracy", "sub_talker_accuracy"), 0.5)
    monkeypatch.setattr(trainer.validator, "evaluate", lambda *_: {"loss": next(losses), **figures})
    save, seen = trainer.saver.save, []

    def limited(_: Any, names: list[str], *arguments: Any) -> Saved:
        with file_size_limit(NO_WEIGHTS if trainer.progress.step == 2 else resource.RLIM_INFINITY):
            saved = save(trainer, names, *arguments)
        if "best" in names:
            best = json.loads((settings.output_dir / "best" / "training_state.json").read_text())
            seen.append((trainer.progress.step, best["step"], best["best_loss"]))
        return saved

    monkeypatch.setattr(trainer.saver, "save", limited)
    trainer.run()
    assert seen == [(1, 1, 5.0), (2, 1, 5.0), (3, 3, 4.0), (5, 5, 2.0)]
    assert trainer.progress.best == Best(2.0, 5, {"loss": 2.0, **figures})


@pytest.mark.parametrize("fails", ["checkpoint-2", "best"])
def test_best_loss_where_only_some_names_could_be_written(
    settings_for: Callable, write_jsonl: Callable, demo_rows: list, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the names of one save fails, best/ and best_loss belong together."""
    settings = settings_for(validation_jsonl=write_jsonl(demo_rows[-1:], "valid.jsonl"), num_epochs=2, eval_steps=1)
    trainer = make_trainer(build(settings))
    losses = iter([5.0, 3.0])
    figures = dict.fromkeys(("accuracy", "sub_talker_accuracy"), 0.5)
    monkeypatch.setattr(trainer.validator, "evaluate", lambda *_: {"loss": next(losses), **figures})
    new_folder, failed = checkpoint.new_folder, []

    def refused(target: Path, **options: Any) -> Any:
        if trainer.progress.step == 2 and target.name == fails and not failed:
            failed.append(target.name)
            raise OSError(errno.ENOSPC, "No space left on device")
        return new_folder(target, **options)

    monkeypatch.setattr(checkpoint, "new_folder", refused)
    trainer.run()
    best = json.loads((settings.output_dir / "best" / "training_state.json").read_text())
    assert failed == [fails]
    assert (best["step"], best["best_loss"]) == (1, 5.0)
    assert trainer.progress.best == Best(5.0, 1, {"loss": 5.0, **figures})


def test_a_stop_saves_the_state_first(quiet: Any, saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is about to vanish may not wait for both; where only the state fits, it is there."""
    written: list[str] = []
    monkeypatch.setattr(saver.exporter, "save", lambda *_: written.append("checkpoint"))
    monkeypatch.setattr(saving, "save_state", lambda *_: written.append("state"))
    assert saver.save(quiet, ["last"], True, 0) == Saved(True, True)
    monkeypatch.setattr(saving, "free_bytes", lambda _: state_bytes(saver.exporter.model))
    monkeypatch.setattr(saver.exporter, "required_bytes", lambda: 2 * state_bytes(saver.exporter.model))
    assert saver.save(quiet, ["last"], True, 0) == Saved(False, True)
    assert written == ["state", "checkpoint", "state"]


# --------------------------------------------------------------------------------------------------------- rotation


@pytest.mark.parametrize(
    ("limit", "step", "kept"),
    [
        (3, 12, [4, 8, 12]),
        (1, 12, [12]),
        (9, 12, [2, 4, 8, 12]),
        (2, 8, [4, 8]),  # 12 belongs to a future that was given up
        (1, 4, [4]),
        (3, 4, [2, 4, 12]),  # and goes only as far as it must
    ],
)
def test_rotation(tmp_path: Path, limit: int, step: int, kept: list[int]) -> None:
    others = ["best", "last", "epoch-1", "checkpoint-epoch-9", "state", "checkpoint-x", "checkpoint-3.bak"]
    for name in [*others, *(f"checkpoint-{number}" for number in (2, 4, 8, 12))]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    (tmp_path / "checkpoint-1").write_text("a file of somebody")
    rotate_checkpoints(tmp_path, limit, step)
    wanted = [*others, "checkpoint-1", *(f"checkpoint-{number}" for number in kept)]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(wanted)


def test_one_checkpoint_and_best_in_a_run(
    settings_for: Callable, write_jsonl: Callable, demo_rows: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAVE_TOTAL_LIMIT=1: the newest stays, and best/ stays where it is though its checkpoint-N is gone."""
    keeping = {"save_total_limit": 1, "save_steps": 1, "save_epochs": True, "epoch_folder": "checkpoint-epoch"}
    settings = settings_for(validation_jsonl=write_jsonl(demo_rows[-1:], "valid.jsonl"), **keeping)
    trainer = make_trainer(build(settings))
    losses = iter([3.0, 4.0, 5.0, 6.0])
    figures = dict.fromkeys(("accuracy", "sub_talker_accuracy"), 0.5)
    monkeypatch.setattr(trainer.validator, "evaluate", lambda *_: {"loss": next(losses), **figures})
    trainer.run()
    names = {"best", "last", "checkpoint-4", *(f"checkpoint-epoch-{number}" for number in range(4)), "state"}
    assert {entry.name for entry in settings.output_dir.iterdir() if entry.is_dir()} - {"rows"} == names
    assert step_in(settings.output_dir / "best") == 1
    assert state_steps(settings) == [4, 3]
    assert_whole(settings.output_dir)


# ------------------------------------------------------------------------------------------------------------- logs

RECORD = {"epoch": 0, "loss": 2.0, "learning_rate": 1e-5, "frames_per_second": 1.0, "seconds_left": 1.0}


def logged_steps(settings: Any) -> list[int]:
    lines = (settings.output_dir / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_line_that_cannot_be_written_is_written_later_and_never_half(
    make_settings: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings()
    settings.output_dir.mkdir()
    log = settings.output_dir / "training_log.jsonl"
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        tracker.log_training({"step": 1, **RECORD})
        before = log.read_bytes()
        for step, room in ((2, 0), (3, 20), (4, len(before) + 20)):  # nothing, a part of a line, more than a line
            with file_size_limit(len(before) + room):
                tracker.log_training({"step": step, **RECORD})
            assert log.read_bytes() == before
        with file_size_limit(len(before)), pytest.raises(OSError, match="File too large"):
            tracker.flush()
        assert tracker.to_json()["lines"]["training_log.jsonl"] == 4
        tracker.log_training({"step": 5, **RECORD})
        assert logged_steps(settings) == [1, 2, 3, 4, 5]
        with file_size_limit(1):
            tracker.log_training({"step": 6, **RECORD})
        tracker.flush()
        assert logged_steps(settings) == [1, 2, 3, 4, 5, 6]
    said = capsys.readouterr().out
    assert said.count("warning: training_log.jsonl cannot be written") == 2  # once for each time that it began


def test_a_state_never_knows_of_lines_that_are_not_there(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the log cannot be written, no state is; a log that somebody has moved away is no such case."""
    settings = settings_for(save_steps=1)
    trainer = make_trainer(build(settings))
    write = trainer.tracker._write

    def refused(file: str) -> None:
        if trainer.progress.step in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file)

    monkeypatch.setattr(trainer.tracker, "_write", refused)
    take, seen = trainer.stepper.take, []

    def observed(*arguments: Any) -> Any:
        seen.append(state_steps(settings))
        if trainer.progress.step == 1:
            (settings.output_dir / "training_log.jsonl").unlink()
        return take(*arguments)

    monkeypatch.setattr(trainer.stepper, "take", observed)
    trainer.run()
    assert seen == [[], [1], [1], [1]]
    assert state_steps(settings) == [4, 1]
    assert logged_steps(settings) == [2, 3, 4]
