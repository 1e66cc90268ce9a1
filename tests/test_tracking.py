"""Logs, console and Weights & Biases: said offline without a key, never a reason to fail, never a secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT

from finetuning.dataset import SkippedRow
from finetuning.services import start_wandb
from finetuning.tracking import Tracker, cut_log, format_seconds, told_of_speakers

SECRET = "hf_trackingSecret"


class FakeWandb(types.ModuleType):
    def __init__(self, key: str | None, fails: bool = False) -> None:
        super().__init__("wandb")
        self.key = key
        self.calls: list[dict] = []
        self.fails = fails

    def init(self, **options: Any) -> Any:
        if self.fails:
            raise RuntimeError("no service")
        self.calls.append(options)
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None, id=options["id"] or "new")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, make_settings: Callable) -> Callable[..., tuple[Any, FakeWandb]]:
    def run(fake: FakeWandb, terminal: bool = False) -> tuple[Any, FakeWandb]:
        monkeypatch.setitem(sys.modules, "wandb", fake)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_API_KEY", fake.key or "")
        monkeypatch.setenv("NETRC", "/nonexistent")  # where `wandb login` would have left a key
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: terminal))
        return start_wandb(make_settings(wandb_project="voices", wandb_run_name="first", hf_token=SECRET)), fake

    return run


def test_offline_without_key_and_terminal(start: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    _, fake = start(FakeWandb(key=None))
    (options,) = fake.calls
    assert (options["mode"], options["project"], options["name"]) == ("offline", "voices", "first")
    assert "offline" in capsys.readouterr().out
    assert SECRET not in json.dumps(options["config"])


def test_no_standard_input_and_a_netrc_that_is_no_text(
    start: Callable, make_settings: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fake = start(FakeWandb(key=None))
    monkeypatch.setattr(sys, "stdin", None)  # as under some schedulers
    assert start_wandb(make_settings()) is not None and fake.calls[-1]["mode"] == "offline"
    monkeypatch.setattr("finetuning.services._has_wandb_key", lambda: b"\xff".decode())
    assert start_wandb(make_settings()) is None


@pytest.mark.parametrize(("key", "terminal"), [("k" * 40, False), (None, True)])
def test_online_with_a_key_or_somebody_to_ask(start: Callable, key: str | None, terminal: bool) -> None:
    _, fake = start(FakeWandb(key), terminal)
    assert fake.calls[0]["mode"] is None  # wandb's own default


def test_a_failing_service_costs_no_run(start: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = start(FakeWandb("k" * 40, fails=True))
    assert run is None
    assert "logging to files only" in capsys.readouterr().out


class FailingRun:
    """A W&B run whose service is gone."""

    id = "first"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def log(self, *_: Any, **__: Any) -> None:
        self.calls.append("log")
        raise RuntimeError("service gone")

    def finish(self) -> None:
        self.calls.append("finish")
        raise OSError("service gone")


@pytest.mark.parametrize(("num_lines", "calls"), [(2, ["log"]), (0, ["finish"])])
def test_a_service_that_fails_on_the_way_costs_no_run(
    make_settings: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_lines: int,
    calls: list[str],
) -> None:
    """It is said once; the files have all lines, and the state still knows the W&B run."""
    service = FailingRun()
    monkeypatch.setattr("finetuning.services.start_wandb", lambda *_: service)
    settings = make_settings(use_wandb=True, warmup_steps=0)
    settings.output_dir.mkdir()
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        for step in range(num_lines):
            tracker.log_training({"step": step, **RECORD})
    assert service.calls == calls
    assert capsys.readouterr().out.count("W&B failed (") == 1
    assert tracker.to_json()["wandb_run_id"] == "first"
    assert not num_lines or steps_in(settings, "training_log.jsonl") == [0, 1]


def test_skipped_rows_are_read_again(make_settings: Callable) -> None:
    settings = make_settings()
    settings.output_dir.mkdir()
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        assert tracker.skipped_rows() == []
        for step, line in ((1, 7), (4, 2)):
            tracker.log_skipped_row(step, SkippedRow(line, "damaged"))
        assert tracker.skipped_rows() == [(1, SkippedRow(7, "damaged")), (4, SkippedRow(2, "damaged"))]
        for text in ("[1]\n", "{}\n", "{"):
            (settings.output_dir / "skipped_rows.jsonl").write_text(text)
            assert tracker.skipped_rows() == []


def test_real_offline_run_keeps_the_token_out(tmp_path: Path, demo_rows: list, write_jsonl: Callable) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_"))}
    environment |= {
        "ENV_FILE": ".env.overfit", "USE_WANDB": "true", "HF_TOKEN": SECRET, "OUTPUT_DIR": str(tmp_path / "output"),
        "TRAIN_JSONL": str(write_jsonl(demo_rows[:4])), "MAX_STEPS": "2", "LOGGING_STEPS": "1", "HOME": str(tmp_path),
        "VALIDATION_JSONL": str(write_jsonl(demo_rows[4:6], "validation.jsonl")),
        "VERIFY_ROUNDTRIP": "0", "EVAL_TEXTS": "Yes.",
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
    }  # fmt: skip
    command = [sys.executable, "train.py"]
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "logged offline" in done.stdout
    runs = list((tmp_path / "output" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert b"talker_loss" in runs[0].read_bytes()
    assert len(list(runs[0].parent.rglob("samples/*.wav"))) == 1
    files = [file for file in (tmp_path / "output").rglob("*") if file.is_file()]
    assert len(files) > 20
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    assert SECRET not in done.stdout + done.stderr


def test_bar_on_a_terminal(
    make_settings: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings()
    settings.output_dir.mkdir()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    record = {"step": 1, "epoch": 0, "loss": 2.3456, "learning_rate": 1.8e-5, "frames_per_second": 812.0}
    with Tracker(settings, total_steps=2, is_main=True) as tracker:
        tracker.advance()
        tracker.log_training(record | {"seconds_left": 5})
    shown = capsys.readouterr()
    assert "loss=2.3456" in shown.err
    assert "frames/s=812" in shown.err
    assert "Epoch 0 | Step 1" not in shown.out


def test_other_processes_log_nothing(make_settings: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(make_settings(use_wandb=True), total_steps=2, is_main=False) as tracker:
        tracker.log_validation(1, 0, {"loss": 1.0, "accuracy": 0.5, "sub_talker_accuracy": 0.5})
        tracker.log_training({"step": 1, **RECORD})
        tracker.log_skipped_row(1, SkippedRow(7, "damaged"))
        tracker.log_result({"step": 1, "metrics": {}})
        tracker.flush()
    assert capsys.readouterr().out == ""
    assert not make_settings().output_dir.exists()


class NotingRun:
    """A W&B run that keeps what it is given."""

    id = "first"

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self.logged.append({"step": step, **numbers})

    def finish(self) -> None: ...


def with_noting_run(make_settings: Callable, monkeypatch: pytest.MonkeyPatch) -> tuple[NotingRun, Any]:
    """A W&B run that only notes, and settings that report to it."""
    service, settings = NotingRun(), make_settings(use_wandb=True, warmup_steps=0)
    monkeypatch.setattr("finetuning.services.start_wandb", lambda *_: service)
    settings.output_dir.mkdir()
    return service, settings


def test_figures_of_speakers_are_nested(
    make_settings: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the file as they are (NaN is no JSON), for W&B by paths, in the line in short."""
    service, settings = with_noting_run(make_settings, monkeypatch)
    speakers = {"Ada": {"loss": 1.25, "num_rows": 3}, "Bea": {"loss": float("nan"), "num_rows": 1}}
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        tracker.log_validation(3, 0, METRICS | {"speakers": speakers})
    (record,) = map(json.loads, (settings.output_dir / "validation_log.jsonl").read_text().splitlines())
    assert record["metrics"]["speakers"] == {"Ada": speakers["Ada"], "Bea": {"loss": None, "num_rows": 1}}
    (logged,) = service.logged
    assert logged.pop("validation/speakers/Bea/loss") != 0
    of_speakers = {"Ada/loss": 1.25, "Ada/num_rows": 3, "Bea/num_rows": 1}
    assert logged == {
        "step": 3,
        **{f"validation/{name}": value for name, value in METRICS.items()},
        **{f"validation/speakers/{name}": value for name, value in of_speakers.items()},
    }
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Validation" in line]
    assert line.endswith("(1-15) | speakers: Ada 1.2500, Bea nan")


def test_of_many_speakers_only_the_worst_are_told() -> None:
    losses = [2.0, 1.0, 5.0, float("nan"), 4.0, 3.0]
    figures = {f"s{number}": {"loss": loss} for number, loss in enumerate(losses)}
    assert told_of_speakers(figures) == " | highest of 6 speakers: s3 nan, s2 5.0000, s4 4.0000"
    assert told_of_speakers({"Ada": {"loss": 1.0}}) == told_of_speakers({}) == ""


def test_an_evaluation_without_some_figures_is_told(
    make_settings: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples where nothing was validated; one of their figures could not be measured."""
    settings = make_settings(warmup_steps=0)
    settings.output_dir.mkdir()
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        tracker.log_validation(3, 1, {"eos_rate": 1.0, "wer": None, "mos": float("nan")}, "highest eos_rate")
    assert "Epoch 1 | Step 3 | samples: eos_rate 1.00 | highest eos_rate so far\n" in capsys.readouterr().out
    (record,) = map(json.loads, (settings.output_dir / "validation_log.jsonl").read_text().splitlines())
    assert (record["loss"], record["metrics"]) == (None, {"eos_rate": 1.0, "wer": None, "mos": None})


def test_table_on_a_terminal(
    make_settings: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The evaluations before a resume stand in it, too; the best one is marked."""
    settings = make_settings(warmup_steps=0)
    settings.output_dir.mkdir()
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        tracker.log_validation(3, 0, METRICS, "lowest validation loss")
        logs = tracker.to_json()
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Tracker(settings, total_steps=9, is_main=True, resumed=logs, step=3, best_step=3) as tracker:
        tracker.log_validation(6, 0, METRICS | {"eos_rate": 0.5, "speakers": {"Ada": {"loss": 1}, "Bea": {"loss": 2}}})
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 0 | Step 6 | Validation | speakers: Ada 1.0000, Bea 2.0000",
        "step    loss  accuracy  sub-acc     eos",
        "  *3  1.0000    0.5000   0.5000       -",
        "   6  1.0000    0.5000   0.5000  0.5000",
    ]


# ------------------------------------------------------------------------------------------------------ alarms, plots


def test_alarms_are_said_logged_and_not_repeated_after_a_resume(
    make_settings: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three evaluations that are worse than the first; the fifth is no news, the sixth is clearly worse."""
    service, settings = with_noting_run(make_settings, monkeypatch)
    logs, said = None, []
    for step, loss in enumerate([2.0, 2.1, 2.1, 2.1, 2.15, 2.4], 1):
        with Tracker(settings, total_steps=9, is_main=True, resumed=logs, step=step - 1) as tracker:
            tracker.log_validation(step, 0, METRICS | {"loss": loss})
            logs = json.loads(json.dumps(tracker.to_json()))
        said += [step] * capsys.readouterr().out.count("ALARM validation_rising: the validation loss rises: ")
    assert said == steps_in(settings, "alarms.jsonl") == [4, 6]
    record = json.loads((settings.output_dir / "alarms.jsonl").read_text().splitlines()[0])
    assert record.keys() == {"step", "kind", "size", "text", "timestamp"}
    assert (record["kind"], record["size"]) == ("validation_rising", pytest.approx(0.05))
    reported = [logged for logged in service.logged if "alarms/validation_rising" in logged]
    assert [logged["step"] for logged in reported] == [4, 6]


def test_alarms_that_cannot_be_looked_for_are_said_once(
    make_settings: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And an alarm that somebody wrote into the log by hand is no matter."""
    monkeypatch.setattr("finetuning.tracking.find_alarms", lambda _: {}["no such record"])
    settings = make_settings(warmup_steps=0)
    settings.output_dir.mkdir()
    (settings.output_dir / "alarms.jsonl").write_text('{"step": 1, "kind": ["odd"], "size": 2}\n')
    logs = {"lines": {"alarms.jsonl": 1}, "wandb_run_id": None}
    with Tracker(settings, total_steps=9, is_main=True, resumed=logs) as tracker:
        for step in (1, 2):
            tracker.log_training({"step": step, **RECORD})
    assert capsys.readouterr().out.count("no alarms, they cannot be looked for (KeyError: 'no such record')") == 1
    assert steps_in(settings, "training_log.jsonl") == [1, 2]


def test_alarms_of_the_training(make_settings: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    settings = make_settings(warmup_steps=9)
    settings.output_dir.mkdir()
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        for step in range(1, 13):
            tracker.log_training({**RECORD, "step": step, "loss": 0.05, "grad_norm": 50.0 if step == 12 else 1.5})
    kinds = [json.loads(line)["kind"] for line in (settings.output_dir / "alarms.jsonl").read_text().splitlines()]
    assert kinds == ["warm_up_too_long", "loss_near_zero", "gradient_norm_exploding"]
    said = capsys.readouterr().out
    assert [said.count(f"ALARM {kind}: ") for kind in kinds] == [1, 1, 1]


def test_plots_are_drawn_at_the_end_and_at_evaluations_that_are_not_too_near(
    make_settings: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, now = [], [0.0]

    def draw(output_dir: Path) -> None:
        drawn.append(len(steps_in(settings, "validation_log.jsonl")))
        now[0] += 3.0

    monkeypatch.setattr("finetuning.plots.draw_plots", draw)
    monkeypatch.setattr("finetuning.tracking.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    settings = make_settings(warmup_steps=0)
    settings.output_dir.mkdir()
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        for seconds in (39.0, 1.0, 59.0, 1.0, 1000.0):
            now[0] += seconds
            tracker.log_validation(1, 0, METRICS)
        tracker.draw_plots()
    assert drawn == [2, 4, 5, 5]
    Tracker(settings, total_steps=9, is_main=False).draw_plots()
    assert len(drawn) == 4


def test_plots_that_cannot_be_drawn_are_said_once(
    make_settings: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(_: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("finetuning.plots.draw_plots", refused)
    monkeypatch.setattr("finetuning.tracking.PLOT_PATIENCE", 0)
    settings = make_settings(warmup_steps=0)
    settings.output_dir.mkdir()
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        for step in (1, 2):
            tracker.log_validation(step, 0, METRICS)
    assert capsys.readouterr().out.count("plots could not be drawn (OSError: disk full); the run goes on") == 1


def test_times_are_readable() -> None:
    assert [format_seconds(value) for value in (5, 65, 3723.9)] == ["0:05", "1:05", "1:02:03"]


# ---------------------------------------------------------------------------------------------------------- resuming

RECORD = {"epoch": 0, "loss": 2.0, "learning_rate": 1e-5, "frames_per_second": 1.0, "seconds_left": 1.0}
METRICS = {"loss": 1.0, "accuracy": 0.5, "sub_talker_accuracy": 0.5}


def steps_in(settings: Any, name: str) -> list[int]:
    return [json.loads(line)["step"] for line in (settings.output_dir / name).read_text().splitlines()]


def test_logs_are_cut_back_to_the_state(make_settings: Callable) -> None:
    """Lines that came after it are logged again, also the one that a crash cut off."""
    settings = make_settings()
    settings.output_dir.mkdir()
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        for step in (1, 2, 3):
            tracker.log_training({"step": step, **RECORD})
        tracker.log_validation(3, 0, METRICS)
        logs = json.loads(json.dumps(tracker.to_json()))
        tracker.log_training({"step": 4, **RECORD})
        tracker.log_skipped_row(5, types.SimpleNamespace(line=7, reason="damaged"))
    with (settings.output_dir / "training_log.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    for _ in range(2):  # a run that is resumed twice
        with Tracker(settings, total_steps=9, is_main=True, resumed=logs, step=3) as tracker:
            assert steps_in(settings, "training_log.jsonl") == [1, 2, 3]
            assert steps_in(settings, "validation_log.jsonl") == [3]
            assert not (settings.output_dir / "skipped_rows.jsonl").exists()
            tracker.log_training({"step": 4, **RECORD})
            assert tracker.to_json()["lines"]["training_log.jsonl"] == 4
    assert steps_in(settings, "training_log.jsonl") == [1, 2, 3, 4]


def test_a_new_run_begins_with_empty_logs(make_settings: Callable) -> None:
    settings = make_settings()
    settings.output_dir.mkdir()
    (settings.output_dir / "training_log.jsonl").write_text("of another run\n")
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        tracker.log_training({"step": 1, **RECORD})
    assert steps_in(settings, "training_log.jsonl") == [1]


def test_a_log_that_lost_lines_goes_on_and_is_cut_right_the_next_time(
    make_settings: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody took lines away: the state that comes then must not count them."""
    settings = make_settings()
    settings.output_dir.mkdir()
    log = settings.output_dir / "training_log.jsonl"
    log.write_text('{"step": 1}\n')
    lines = {"lines": {"training_log.jsonl": 3}, "wandb_run_id": None}
    with Tracker(settings, total_steps=9, is_main=True, resumed=lines, step=3) as tracker:
        assert "has 1 of the 3 lines" in capsys.readouterr().out
        tracker.log_training({"step": 4, **RECORD})
        resumed = tracker.to_json()
        tracker.log_training({"step": 5, **RECORD})
    with Tracker(settings, total_steps=9, is_main=True, resumed=resumed, step=4):
        assert steps_in(settings, "training_log.jsonl") == [1, 4]


@pytest.mark.parametrize(
    ("text", "num_lines", "kept"),
    [
        ("a\nb\nc\n", 2, "a\nb\n"),
        ("a\nb\nc", 3, "a\nb\n"),
        ("a\nb", 1, "a\n"),
        ("a\n", 0, None),
        ("", 0, None),
        ("ä\n\n", 2, "ä\n\n"),
    ],
)
def test_cut_log(tmp_path: Path, text: str, num_lines: int, kept: str | None) -> None:
    (tmp_path / "log").write_text(text, encoding="utf-8")
    assert cut_log(tmp_path / "log", num_lines) == (kept or "").count("\n")
    assert (tmp_path / "log").exists() == (kept is not None)
    if kept is not None:
        assert (tmp_path / "log").read_text(encoding="utf-8") == kept
    assert cut_log(tmp_path / "nowhere", 0) == 0


def test_the_same_wandb_run_goes_on(make_settings: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb("k" * 40)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = make_settings(use_wandb=True, warmup_steps=0)
    settings.output_dir.mkdir()
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        logs = tracker.to_json()
    assert logs["wandb_run_id"] == "new"
    with Tracker(settings, total_steps=9, is_main=True, resumed={**logs, "wandb_run_id": "first"}):
        pass
    assert [(call["id"], call["resume"]) for call in fake.calls] == [(None, None), ("first", "allow")]
