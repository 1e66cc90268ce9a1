"""Killed at random moments and at every file operation, stopped twice, saved by the clock: nothing is lost.

``benchmarks/kill.py`` kills whole runs; here it does so a dozen times. What it can only draw from, the file operations
of one save, rotation or clean-up, is gone through one by one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file
from training import FULL, before_each_step, build, make_trainer

from finetuning import disk, signals, state, trainer
from finetuning.checkpoint import clear_output_folder, rotate_checkpoints, run_entries
from finetuning.disk import CHECKSUMS_FILE, clean_up, damage, new_folder, remove_folder, write_json
from finetuning.errors import Stopped, run_main
from finetuning.resume import may_begin_again
from finetuning.state import find_states, rotate_states, step_of

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "python train.py", "starting", "training", "saving a checkpoint", "saving a state", "rotating", "validating",
    "any time", "before a rename", "after a rename", "removing", "writing",
}  # fmt: skip
#: train.py whose third step takes as long as nobody waits.
SLOW_TRAIN = """
import time
import train
from finetuning import stepping
from finetuning.errors import run_main

take, taken = stepping.Stepper.take, []

def slow(*arguments):
    taken.append(1)
    if len(taken) == 3:
        print("in the third step", flush=True)
        while True:  # one long sleep would leave a signal unheard that came right before it
            time.sleep(0.01)
    return take(*arguments)

stepping.Stepper.take = slow
run_main(train.main)
"""


# ------------------------------------------------------------------------------------------------ real runs, killed


def start(*command: str, folder: Path = PROJECT, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-u", *command], cwd=folder, env=environment, text=True, **pipes)


@pytest.fixture(scope="module")
def killers() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The script in both modes, side by side, since much of its time is waiting."""
    script = "benchmarks/kill.py"
    started = {
        "jsonl": start(script, "--kills", str(len(KINDS)), "--seed", "3", "--workers", "2"),
        "direct": start(script, "--kills", "2", "--seed", "5", "--mode", "direct"),
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("mode", "num_kills"), [("direct", 2), ("jsonl", len(KINDS))])
def test_killed_runs_end_like_the_untouched_one(
    killers: dict[str, subprocess.Popen[str]], mode: str, num_kills: int
) -> None:
    printed, _ = killers[mode].communicate(timeout=400)
    assert killers[mode].returncode == 0, printed
    counted = re.search(r"✓ (\d+) kills in \d+ runs \((.*)\): every run ended bit for bit", printed)
    assert counted and int(counted[1]) == num_kills, printed
    kinds = {kind.split(" ", 1)[1] for kind in counted[2].split(", ")}
    assert mode == "direct" or kinds == KINDS, printed


# ------------------------------------------------------------------------------- one kill at every file operation


def killed_at(number: int, work: Callable[[], Any]) -> bool:
    """Does the work in a process of its own, killed right before its file operation of that number (from 1).

    Returns:
        Whether there were so many operations.
    """
    process = os.fork()
    if not process:
        left = [number]

        def hear(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hear)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert exit_code in (0, -signal.SIGKILL)
    return exit_code != 0


def fill(target: Path, content: str) -> None:
    with new_folder(target) as folder:
        (folder / "nested").mkdir()
        (folder / "weights.bin").write_text(content)
        write_json(folder / "nested" / "state.json", {"content": content})


def content_of(target: Path) -> str:
    """Of a whole folder; fails for any other."""
    assert damage(target) == []
    assert sorted(file.relative_to(target).as_posix() for file in disk.files_of(target)) == sorted(
        [CHECKSUMS_FILE, "nested/state.json", "weights.bin"]
    )
    return (target / "weights.bin").read_text()


def snapshots(tmp_path: Path, before: Callable[[Path], Any], work: Callable[[Path], Any]) -> list[Path]:
    """Folders as the work leaves them when it is killed before its first, second, … operation."""
    left: list[Path] = []
    was_killed = True
    while was_killed:
        folder = tmp_path / f"killed-{len(left) + 1}"
        folder.mkdir()
        before(folder)
        was_killed = killed_at(len(left) + 1, partial(work, folder))
        left.append(folder)
    assert len(left) > 3
    return left


@pytest.mark.parametrize("has_old", [False, True])
def test_a_kill_while_a_folder_is_replaced(tmp_path: Path, has_old: bool) -> None:
    found = []
    for folder in snapshots(
        tmp_path, lambda at: has_old and fill(at / "best", "old"), lambda at: fill(at / "best", "new")
    ):
        assert not (folder / "best").exists() or content_of(folder / "best") in ("old", "new")
        clean_up(folder)
        assert [entry.name for entry in folder.iterdir()] == ["best"] * (folder / "best").exists()
        found.append(content_of(folder / "best") if (folder / "best").exists() else "none")
    before = "old" if has_old else "none"
    assert found == sorted(found, key=[before, "new"].index) and set(found) == {before, "new"}


def test_a_kill_while_a_folder_is_removed(tmp_path: Path) -> None:
    found = []
    for folder in snapshots(tmp_path, lambda at: fill(at / "best", "old"), lambda at: remove_folder(at / "best")):
        found.append((folder / "best").exists())
        assert not found[-1] or content_of(folder / "best") == "old"
        clean_up(folder)
        assert (folder / "best").exists() == found[-1]
        assert not list(folder.glob(".*"))
    assert found == sorted(found, reverse=True) and set(found) == {True, False}


def test_a_kill_while_leftovers_of_a_kill_are_cleaned_up(tmp_path: Path) -> None:
    """At every operation of the clean-up after a kill at every operation of a save."""
    left = snapshots(tmp_path, lambda at: fill(at / "best", "old"), lambda at: fill(at / "best", "new"))
    for number, folder in enumerate(left, 1):
        operation, was_killed = 1, True
        while was_killed:
            again = tmp_path / f"again-{number}-{operation}"
            shutil.copytree(folder, again)
            was_killed = killed_at(operation, partial(clean_up, again))
            clean_up(again)
            assert content_of(again / "best") in ("old", "new")
            assert [entry.name for entry in again.iterdir()] == ["best"]
            operation += 1


@pytest.mark.parametrize("kind", ["states", "checkpoints"])
def test_a_kill_while_rotating(tmp_path: Path, kind: str) -> None:
    def rotate(at: Path) -> None:
        rotate_states(at, keep=2) if kind == "states" else rotate_checkpoints(at, 2, 16)

    names = [f"state/step-{step}" if kind == "states" else f"checkpoint-{step}" for step in (4, 8, 12, 16)]
    for folder in snapshots(tmp_path, lambda at: [fill(at / name, name) for name in names], rotate):
        whole = [name for name in names if (folder / name).exists()]
        assert whole[-2:] == names[-2:] and all(content_of(folder / name) == name for name in whole)
        rotate(folder)
        clean_up(folder)
        clean_up(folder / "state")
        assert [name for name in names if (folder / name).exists()] == names[-2:]
        assert not [entry for entry in folder.rglob(".*")]


def test_the_next_start_removes_the_state_that_a_kill_left_too_many(settings_for: Callable) -> None:
    """Also where the run had come to its end, and nothing is saved any more."""
    settings = settings_for(save_steps=4)
    make_trainer(build(settings)).run()
    folder = settings.output_dir / "state"
    shutil.copytree(folder / "step-8", folder / "step-4")
    build(settings)
    assert [step_of(found) for found in find_states(settings.output_dir)] == [10, 8]


def test_a_kill_while_a_run_without_a_state_is_cleared_to_begin_again(tmp_path: Path, make_settings: Callable) -> None:
    """The same command must go on, however often it is killed before the first state."""
    settings = make_settings(resume="auto", output_dir=tmp_path / "unused")

    def stopped_early(at: Path) -> None:
        for name in ("best", "last", "epoch-0"):
            fill(at / name, name)
        shutil.copytree(at / "last", at / ".last.old.tmp")
        (at / ".last.old.tmp" / "weights.bin").unlink()
        for name in ("training_log.jsonl", "validation_log.jsonl"):
            (at / name).write_text("{}\n")
        settings.save(at / "settings.json")

    def clear(at: Path) -> None:
        clear_output_folder(settings.model_copy(update={"output_dir": at}))

    for folder in snapshots(tmp_path, stopped_early, clear):
        for name in ("best", "last", "epoch-0"):
            assert not (folder / name).exists() or content_of(folder / name) == name
        left = [entry.name for entry in run_entries(folder)]
        assert not left or may_begin_again(settings.model_copy(update={"output_dir": folder})), left
        clear(folder)
        assert not list(folder.iterdir())


# ------------------------------------------------------------------------------------------------ signals, the clock


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    """10 steps."""

    def make(**fields: Any) -> Any:
        defaults = {
            "train_jsonl": write_jsonl(demo_rows[:10]), "validation_fraction": 0.0, "batch_size": 2,
            "gradient_accumulation_steps": 1, "num_epochs": 2, "logging_steps": 1, "save_steps": 1000,
            "learning_rate": 1e-3, "resume": "auto",
        }  # fmt: skip
        return make_settings(**(FULL | defaults | fields))

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """That of the training loop and of its signals; it stands still unless a test moves it."""
    clock = SimpleNamespace(now=1000.0, perf_counter=time.perf_counter, monotonic=lambda: clock.now)
    for room in (trainer, signals):
        monkeypatch.setattr(room, "time", clock)
    return clock


@pytest.fixture
def slow_run(tmp_path: Path, write_jsonl: Callable, demo_rows: list[dict]) -> Iterator[subprocess.Popen[str]]:
    """A real run, with a data worker, that never comes out of its third step."""
    process = start(
        "-c", SLOW_TRAIN, folder=tmp_path, PYTHONPATH=str(PROJECT), DEVICE="cpu", MIXED_PRECISION="no",
        USE_WANDB="false", INIT_MODEL_PATH="tiny-random", TRAIN_JSONL=str(write_jsonl(demo_rows[:10])),
        OUTPUT_DIR="output", NUM_WORKERS="1", BATCH_SIZE="2", GRADIENT_ACCUMULATION_STEPS="1",
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def test_a_second_signal_ends_a_real_process_at_once(slow_run: subprocess.Popen[str], tmp_path: Path) -> None:
    wait_for(slow_run, "in the third step")
    slow_run.send_signal(signal.SIGTERM)
    wait_for(slow_run, "signal 15")
    time.sleep(1.1)
    slow_run.send_signal(signal.SIGTERM)
    printed, _ = slow_run.communicate(timeout=150)
    assert slow_run.returncode == 143, printed
    assert "Traceback" not in printed
    assert (tmp_path / "output").exists() and not (tmp_path / "output" / "last").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_after_a_second_acts_at_once(
    settings_for: Callable, clock: SimpleNamespace, number: int, code: int
) -> None:
    settings, reached = settings_for(), []
    run_trainer = make_trainer(build(settings))

    def act(step: int) -> None:
        reached.append(step)
        if step == 3:
            os.kill(os.getpid(), number)
            clock.now += 1.1
            os.kill(os.getpid(), number)
            reached.append("the rest of the step")

    before_each_step(run_trainer, act)
    with pytest.raises(SystemExit) as caught:
        run_main(run_trainer.run)
    assert caught.value.code == code
    assert reached == [1, 2, 3]
    assert not (settings.output_dir / "last").exists() and not find_states(settings.output_dir)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Reads what the process prints up to the line that has the text."""
    printed = []
    killer = threading.Timer(180.0, process.kill)  # then its output ends, and this fails instead of waiting for ever
    killer.start()
    for line in process.stdout:
        printed.append(line)
        if text in line:
            return killer.cancel()
    killer.cancel()
    raise AssertionError("".join(printed))


def test_the_same_signal_twice_within_a_second_counts_once(
    settings_for: Callable, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers pass the terminal's Ctrl-C on to processes that have it already."""
    monkeypatch.setattr("finetuning.signals._echo_seconds", lambda: 1.0)  # as under a launcher
    settings = settings_for()
    run_trainer = make_trainer(build(settings))

    def act(step: int) -> None:
        if step == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                clock.now += 0.9

    before_each_step(run_trainer, act)
    with pytest.raises(Stopped) as caught:
        run_trainer.run()
    assert caught.value.exit_code == 143
    assert [step_of(folder) for folder in find_states(settings.output_dir)] == [3]


def test_saving_by_the_clock(settings_for: Callable, clock: SimpleNamespace) -> None:
    """A minute a step and SAVE_MINUTES=3: after the steps 4, 7 and 10 at the latest, last/ and a state are there."""
    settings, found = settings_for(save_minutes=3), {}
    run_trainer = make_trainer(build(settings))

    def act(step: int) -> None:
        found[step] = [step_of(folder) for folder in find_states(settings.output_dir)]
        clock.now += 60.0

    before_each_step(run_trainer, act)
    run_trainer.run()
    assert found == {step: [4] if 4 < step <= 8 else [8, 4] if step > 8 else [] for step in range(1, 11)}
    assert [step_of(folder) for folder in find_states(settings.output_dir)] == [10, 8]


def test_nothing_is_saved_by_the_clock_unless_asked_for(settings_for: Callable, clock: SimpleNamespace) -> None:
    settings = settings_for()
    run_trainer = make_trainer(build(settings))

    def act(_: int) -> None:
        clock.now += 36_000.0
        assert not find_states(settings.output_dir)

    before_each_step(run_trainer, act)
    run_trainer.run()
    assert [step_of(folder) for folder in find_states(settings.output_dir)] == [10]


def test_a_run_goes_on_from_what_the_clock_saved(
    settings_for: Callable, clock: SimpleNamespace, tmp_path: Path
) -> None:
    make_trainer(build(settings_for(output_dir=tmp_path / "untouched"))).run()

    class Killed(BaseException):
        pass

    def act(step: int) -> None:
        clock.now += 60.0
        if step == 7:
            raise Killed

    stopped = make_trainer(build(settings_for(save_minutes=2)))
    before_each_step(stopped, act)
    with pytest.raises(Killed):
        stopped.run()
    resumed = make_trainer(build(settings_for(save_minutes=2)))
    assert resumed.progress.step == 6
    resumed.run()
    found = load_file(tmp_path / "output" / "last" / "model.safetensors")
    wanted = load_file(tmp_path / "untouched" / "last" / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not [entry for entry in (tmp_path / "output").rglob("*.tmp")]
    assert not state.damage_of_state(find_states(tmp_path / "output")[0])
