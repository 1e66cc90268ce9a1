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

from finetuning.tracking import Tracker, format_seconds, start_wandb

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
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)


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


@pytest.mark.parametrize(("key", "terminal"), [("k" * 40, False), (None, True)])
def test_online_with_a_key_or_somebody_to_ask(start: Callable, key: str | None, terminal: bool) -> None:
    _, fake = start(FakeWandb(key), terminal)
    assert fake.calls[0]["mode"] is None  # wandb's own default


def test_a_failing_service_costs_no_run(start: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = start(FakeWandb("k" * 40, fails=True))
    assert run is None
    assert "logging to files only" in capsys.readouterr().out


def test_real_offline_run_keeps_the_token_out(tmp_path: Path, demo_rows: list, write_jsonl: Callable) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_"))}
    environment |= {
        "ENV_FILE": ".env.demo", "USE_WANDB": "true", "HF_TOKEN": SECRET, "OUTPUT_DIR": str(tmp_path / "output"),
        "TRAIN_JSONL": str(write_jsonl(demo_rows[:4])), "MAX_STEPS": "2", "LOGGING_STEPS": "1", "HOME": str(tmp_path),
        "VERIFY_ROUNDTRIP": "0", "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
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
    assert capsys.readouterr().out == ""
    assert not make_settings().output_dir.exists()


def test_times_are_readable() -> None:
    assert [format_seconds(value) for value in (5, 65, 3723.9)] == ["0:05", "1:05", "1:02:03"]
