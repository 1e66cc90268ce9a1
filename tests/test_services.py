"""TensorBoard, several services at once, and what of a record they get. (W&B: test_tracking.py.)"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PROJECT

from finetuning.samples import Sample, Sampled, figures_of, write_samples
from finetuning.services import flattened, start_services
from finetuning.tracking import Tracker

RECORD = {"epoch": 0, "loss": 2.0, "learning_rate": 1e-5, "frames_per_second": 1.0, "seconds_left": 1.0}
METRICS = {"loss": 1.0, "accuracy": 0.5, "sub_talker_accuracy": 0.5, "codebook_accuracy": [0.25] * 16}


@pytest.fixture
def settings(make_settings: Callable) -> Any:
    made = make_settings(report_to="tensorboard", warmup_steps=0)
    made.output_dir.mkdir()
    return made


def scalars(output: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of all events of all files, purged or not."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((output / "tensorboard").glob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                content = make_ndarray(value.tensor)
                if content.dtype.kind == "f":
                    found.setdefault(value.tag, []).append((event.step, round(float(content), 4)))
    return found


def test_flattened() -> None:
    record = {"loss": 1.0, "speakers": {"Ada": {"loss": 2, "name": "x"}}, "codes": [0.5, None], "text": "x", "no": None}
    assert flattened(record, "a") == {"a/loss": 1.0, "a/speakers/Ada/loss": 2, "a/codes/0": 0.5}


def test_tensorboard_goes_on_without_a_step_twice(settings: Any) -> None:
    """Killed after steps that the state does not know; W&B is not asked for."""
    facts = {"packages": {"torch": "2"}}
    with Tracker(settings, total_steps=9, is_main=True, facts=facts) as tracker:
        for step in (1, 2):
            tracker.log_training({"step": step, **RECORD})
        tracker.log_validation(2, 0, METRICS)
        logs = json.loads(json.dumps(tracker.to_json()))
        tracker.log_training({"step": 3, **RECORD, "loss": 9.0})
        tracker.log_validation(2, 0, METRICS)
    assert logs["wandb_run_id"] is None and scalars(settings.output_dir)["train/loss"] == [(1, 2.0), (2, 2.0), (3, 9.0)]
    with Tracker(settings, total_steps=9, is_main=True, resumed=logs, step=2) as tracker:
        tracker.log_training({"step": 3, **RECORD})
    found = scalars(settings.output_dir)
    assert found["train/loss"] == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert found["validation/loss"] == [(2, 1.0)] and found["validation/codebook_accuracy/15"] == [(2, 0.25)]
    assert set(found) == {
        *(f"train/{name}" for name in RECORD),
        *(f"validation/{name}" for name in METRICS if name != "codebook_accuracy"),
        *(f"validation/codebook_accuracy/{number}" for number in range(16)),
    }
    assert len(list((settings.output_dir / "tensorboard").iterdir())) == 1


def audio_events(output: Path) -> list[tuple[str, int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (output / "tensorboard").iterdir()
    events = EventAccumulator(str(file), size_guidance={"audio": 0}).Reload()
    return sorted((tag, event.step) for tag in events.Tags()["audio"] for event in events.Audio(tag))


def test_tensorboard_keeps_audio_alarms_and_the_round_trip(settings: Any) -> None:
    """Those of before a restart, as they were logged; a damaged wav is left out, and so is
    what the run is going to say again."""
    folder = settings.output_dir / "samples" / "step-2"
    file, nothing = folder / "01-a.wav", np.zeros(5760, np.float32)
    sample = Sample("Yes.", "anna", "Auto", np.zeros((3, 16)), nothing, True, 42, file)
    roundtrip = {"roundtrip_reproduced": 0.5, "roundtrip_right_length": 1.0}
    seen = []
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        for step, loss in ((1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)):
            tracker.log_validation(step, 0, METRICS | {"loss": loss} | ({"num_samples": 1} if step == 2 else {}))
        write_samples(folder, [sample])
        tracker.log_samples(2, Sampled(figures_of([sample]), [sample]))
        tracker.log_result({"step": 4, "epoch": 0, "loss": None, "metrics": roundtrip})
        logs = json.loads(json.dumps(tracker.to_json()))
    seen.append((scalars(settings.output_dir), audio_events(settings.output_dir)))
    (folder / "02-b.wav").write_text("damaged")
    write_samples(folder.with_name("step-4"), [sample])  # stopped before they were logged
    with Tracker(settings, total_steps=9, is_main=True, resumed=logs, step=4):
        pass
    seen.append((scalars(settings.output_dir), audio_events(settings.output_dir)))
    assert seen[0] == seen[1]
    found, audio = seen[1]
    assert found["alarms/validation_rising"] == [(4, 1.0)] and audio == [("samples/01-a", 2)]
    assert found["roundtrip/roundtrip_reproduced"] == [(4, 0.5)] and "validation/roundtrip_reproduced" not in found


def test_times_of_before_stay(settings: Any) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    line = {"step": 1, **RECORD, "timestamp": "2020-01-01T00:00:00.000+00:00"}
    (settings.output_dir / "training_log.jsonl").write_text(json.dumps(line) + "\n")
    resumed = {"lines": {"training_log.jsonl": 1}, "wandb_run_id": None}
    with Tracker(settings, total_steps=9, is_main=True, resumed=resumed, step=1):
        pass
    (file,) = (settings.output_dir / "tensorboard").iterdir()
    times = [event.wall_time for event in EventFileLoader(str(file)).Load() if event.step == 1 and event.summary.value]
    assert times == [1577836800.0] * len(RECORD)


def test_tensorboard_that_fails_costs_no_run(
    settings: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (settings.output_dir / "tensorboard").write_text("no folder")
    assert start_services(settings, None, {}) == {}
    assert "TensorBoard could not start (" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert start_services(settings, None, {}) == {}


def test_both_services_and_one_of_them_fails(
    make_settings: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("service gone")

    service = types.SimpleNamespace(id="first", log=refuse, finish=refuse)
    monkeypatch.setattr("finetuning.services.start_wandb", lambda *_: service)
    settings = make_settings(report_to="tensorboard,wandb", use_wandb=True, warmup_steps=0)
    settings.output_dir.mkdir()
    with Tracker(settings, total_steps=9, is_main=True) as tracker:
        for step in (1, 2):
            tracker.log_training({"step": step, **RECORD})
    assert capsys.readouterr().out.count("W&B failed (RuntimeError); logging to files, TensorBoard only") == 1
    assert scalars(settings.output_dir)["train/loss"] == [(1, 2.0), (2, 2.0)]
    assert tracker.to_json()["wandb_run_id"] == "first"


def test_none_imports_neither(make_settings: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert start_services(make_settings(report_to="none"), None, {}) == {}


def test_no_service_is_imported_with_the_rooms() -> None:
    """They take seconds to import."""
    code = (
        "import finetuning.session, sys; print([m for m in ('wandb', 'tensorboard', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
