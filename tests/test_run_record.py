"""What a run records of itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training import FULL, build, signal_in_step

from finetuning import session
from finetuning.errors import Stopped
from finetuning.plots import draw_plots
from finetuning.run_record import _counts, data_summary, git_revision, package_versions, record_run

SECRET = "hf_runRecordSecret"


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_git_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout, clean and changed; files that git does not know change nothing."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    assert git_revision(checkout) is None
    git(checkout, "init", "-q")
    assert git_revision(checkout) is None  # nothing is committed yet
    (checkout / "file").write_text("1")
    git(checkout, "add", "file")
    git(checkout, "commit", "-q", "-m", "first")
    found = git_revision(checkout)
    assert (len(found["revision"]), found["is_dirty"]) == (40, False)
    (checkout / "other").write_text("1")
    assert git_revision(checkout) == found
    (checkout / "file").write_text("2")
    assert git_revision(checkout) == found | {"is_dirty": True}
    (checkout / "inside").mkdir()
    assert git_revision(checkout / "inside") is None  # a folder in somebody else's repository
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_revision(checkout) is None


def test_package_versions() -> None:
    versions = package_versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"transformers", "accelerate", "qwen-tts"} <= versions.keys() and "no such" not in versions


def test_counts_of_speakers_most_first() -> None:
    """Rows that name none count nowhere; of very many the first hundred are listed."""
    rows = SimpleNamespace(labels=lambda _: (["Ada", "Bea"], np.array([0, 1, 1, -1], dtype=np.int32)))
    assert list(_counts(rows, "speaker").items()) == [("Bea", 2), ("Ada", 1)]
    many = SimpleNamespace(labels=lambda _: ([str(n) for n in range(300)], np.arange(300, dtype=np.int32)))
    assert len(_counts(many, "speaker")) == 100
    assert data_summary(None) is None


def test_the_record_of_the_beginning_stays(tmp_path: Path) -> None:
    record_run(tmp_path, {"SEED": 1, "NUM_EPOCHS": 3}, {"train": 5}, {"git": "a"}, 0)
    for step in (4, 8):
        record_run(tmp_path, {"SEED": 1, "NUM_EPOCHS": 9}, {"train": 5}, {"git": "b"}, step)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["git"], record["begun_at_step"], record["settings"]) == ("a", 0, {"SEED": 1, "NUM_EPOCHS": 3})
    assert record["resumed"] == [{"step": step, "git": "b", "settings": {"NUM_EPOCHS": 9}} for step in (4, 8)]
    record_run(tmp_path, {"SEED": 2}, {}, {"git": "c"}, 0)
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == {"SEED": 2}
    (tmp_path / "run.json").write_text("[")
    assert record_run(tmp_path, {}, {}, {}, 7)["begun_at_step"] == 7


def test_a_run_records_itself(
    make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun, stopped and resumed; the services get the same without the settings, which they have already."""
    rows = [row | {"speaker": "Ada" if number else "Bea"} for number, row in enumerate(demo_rows[:5])]

    def settings_for(**fields: Any) -> Any:
        files = {"train_jsonl": write_jsonl(rows), "validation_jsonl": write_jsonl(demo_rows[-1:], "valid.jsonl")}
        own = {"resume": "auto", "hf_token": SECRET, "speaker_name": "Ada", "batch_size": 1, "num_epochs": 1}
        return make_settings(**FULL | files | own | fields)

    monkeypatch.setattr("finetuning.plots.draw_plots", draw_plots)
    given: list[dict] = []
    monkeypatch.setattr("finetuning.tracking.start_services", lambda *arguments: given.append(arguments[2]) or {})
    run = build(settings_for())
    trainer = session.make_trainer(run, session.make_tracker(run))
    signal_in_step(trainer, 1)
    with pytest.raises(Stopped):
        trainer.run()
    run.lock.close()
    output = run.settings.output_dir
    record = json.loads((output / "run.json").read_text())
    assert SECRET not in (output / "run.json").read_text()
    assert record["settings"] == run.settings.public()
    frames = sum(len(row["audio_codes"]) for row in rows)
    assert record["data"]["train"] == {
        "rows": 5, "hours": round(frames / 12.5 / 3600, 4), "speakers": {"Ada": 4, "Bea": 1},
        "languages": {rows[0]["language"]: 5},
    }  # fmt: skip
    assert record["data"]["validation"]["rows"] == 1
    assert record["devices"] and record["devices"][0].startswith("cpu: ") and record["packages"]["torch"]
    assert given[0] == {key: value for key, value in record.items() if key != "settings"}
    session.train(build(settings_for(logging_steps=3)))
    record = json.loads((output / "run.json").read_text())
    assert [(entry["step"], entry["settings"]) for entry in record["resumed"]] == [(1, {"LOGGING_STEPS": 3})]
    assert {file.name for file in (output / "plots").iterdir()} >= {"loss.png", "learning_rate.png", "validation.png"}
