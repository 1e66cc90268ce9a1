"""A run that was stopped and resumed ends bit for bit as one that was not; what does not belong is refused by name."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import FULL, build, make_trainer

from finetuning.errors import Stopped

pytestmark = pytest.mark.usefixtures("one_thread")

#: Figures of a log line that depend on the clock.
CLOCK = ("timestamp", "frames_per_second", "seconds_left")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    """5 steps an epoch (the last one short), 2 micro-batches a step, 3 epochs; evaluation inside the epochs, too."""

    def make(**fields: Any) -> Any:
        defaults = {
            "train_jsonl": write_jsonl(demo_rows[:18]), "validation_jsonl": write_jsonl(demo_rows[-2:], "valid.jsonl"),
            "batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 3, "learning_rate": 1e-3, "warmup_steps": 1,
            "logging_steps": 2, "eval_steps": 3, "save_steps": 4, "resume": "auto",
        }  # fmt: skip
        return make_settings(**(FULL | defaults | fields))

    return make


def run_to_the_end(settings: Any) -> Any:
    trainer = make_trainer(build(settings))
    trainer.run()
    return trainer


def run_until(settings: Any, step: int, stop: str) -> None:
    """Stops inside of a step: by SIGTERM (saves) or as if by SIGKILL (does not)."""
    trainer = make_trainer(build(settings))
    take = trainer.stepper.take

    def interrupted(*arguments: Any) -> Any:
        if trainer.progress.step == step - 1:
            if stop == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*arguments)

    trainer.stepper.take = interrupted
    with pytest.raises(Killed if stop == "killed" else Stopped):
        trainer.run()


def result(output: Path) -> dict[str, Any]:
    """Weights of every checkpoint, all log lines without clocks, what the checkpoints say of themselves."""
    folders = {"best", "last", *(folder.name for folder in output.glob("checkpoint-*"))}
    logs = [output / "training_log.jsonl", output / "validation_log.jsonl"]
    lines = [[json.loads(line) for line in log.read_text().splitlines()] if log.exists() else None for log in logs]
    return {
        "weights": {name: load_file(output / name / "model.safetensors") for name in sorted(folders)},
        "states": [json.loads((output / name / "training_state.json").read_text()) for name in sorted(folders)],
        "logs": [
            log and [{key: value for key, value in record.items() if key not in CLOCK} for record in log]
            for log in lines
        ],
    }


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["logs"] == wanted["logs"]
    assert found["states"] == wanted["states"]
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weights in wanted["weights"].items():
        different = [key for key in weights if not torch.equal(weights[key], found["weights"][name][key])]
        assert not different, (name, different)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"output": tmp_path_factory.mktemp("untouched")}


@pytest.fixture
def wanted(untouched: dict[str, Any], settings_for: Callable) -> dict[str, Any]:
    """The result of the run that nothing stopped; trained once."""
    if "result" not in untouched:
        run_to_the_end(settings_for(output_dir=untouched["output"] / "output"))
        untouched["result"] = result(untouched["output"] / "output")
    return untouched["result"]


@pytest.mark.parametrize("stop", ["SIGTERM", "killed"])
@pytest.mark.parametrize("step", [1, 4, 5, 6, 9, 15])
def test_resumed_run_equals_the_untouched_one(
    settings_for: Callable, wanted: dict[str, Any], step: int, stop: str
) -> None:
    settings = settings_for()
    run_until(settings, step, stop)
    trainer = run_to_the_end(settings)
    assert trainer.progress.step == 15
    assert_same(result(settings.output_dir), wanted)
