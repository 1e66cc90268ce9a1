"""Training of the talker with this project's own train.py, from a base whose talker is random.

    python -m embedded.talker --scale small --folder WORK

Many voices, EXPORT_TYPE=base, and another reference clip of the voice for every row in every epoch: so the vector of
the speaker encoder comes to mean how the row sounds. The settings lie in WORK/talker/settings.env; the run in
WORK/talker/output goes on by itself (RESUME=auto).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from embedded.stage import Work, main_of
from finetuning.errors import Stopped, UserError
from finetuning.settings import canonical_names

PROJECT = Path(__file__).parent.parent
#: Text runs beside the frames, about a token a frame, so a model this small need not learn to find its place in it.
LAYOUT = "streaming"


def talker_settings(work: Work) -> dict[str, object]:
    """Name -> value of the settings of the talker's training."""
    speech = work.folder / "speech"
    return shared_settings(work) | {
        "INIT_MODEL_PATH": work.folder / "start",
        "OUTPUT_DIR": work.folder / "talker" / "output",
        "TRAIN_JSONL": speech / "train.jsonl",
        "VALIDATION_JSONL": speech / "held_out_sentences.jsonl",
        "EXPORT_TYPE": "base",
        "REFERENCE_SAMPLING": "same_speaker",
        "LANGUAGE_MIX": 0.2,
        "TRAIN_TEXT_EMBEDDING": "true",  # the table is random, unlike a real base's
        "BATCH_SIZE": 8,
        "SUB_TALKER_FRAME_FRACTION": 0.3,  # the sub-talker would take most of the time, and learns sooner
        "LEARNING_RATE": 1.5e-3,
        "LR_MIN": 1e-4,
        "WARMUP_STEPS": 200,
        "MAX_STEPS": work.scale.talker_steps,
        "NUM_EPOCHS": 100_000,
        "LOGGING_STEPS": 20,
        "SAVE_STEPS": 500,
        "SAVE_MINUTES": 5,
        "EVAL_STEPS": 100_000,  # besides every epoch's end
    }


def shared_settings(work: Work) -> dict[str, object]:
    """What every training of this recipe has in common: everything trains, nothing is uploaded."""
    return {
        "DEVICE": work.device,
        "MIXED_PRECISION": "no" if work.device == "cpu" else "bf16",
        "REPLACE_LAST_N_LAYERS": 0,
        "ADD_NEW_LAYERS": 0,
        "TRAIN_LAYOUT": LAYOUT,
        "FREEZE_ORIGINAL_LAYERS": "false",
        "GRADIENT_ACCUMULATION_STEPS": 1,
        "SUB_TALKER_LOSS_WEIGHT": 1.0,
        "SAMPLE_STEPS": 0,
        "SAVE_TOTAL_LIMIT": 1,
        "DATA_CHECK": "warn",  # synthetic speech has no background noise, which the check finds odd
        "USE_WANDB": "false",
        "RESUME": "auto",
    }


def run_training(settings: dict[str, object], file: Path, num_threads: int) -> None:
    """Writes a settings file and runs train.py on it.

    Raises:
        UserError: train.py ended with exit code 2, and has said why.
        Stopped: a signal ended it, after saving.
        CalledProcessError: it failed otherwise.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{name}={value.resolve() if isinstance(value, Path) else value}" for name, value in settings.items()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    others = {name: value for name, value in os.environ.items() if name not in canonical_names()}
    environment = others | {"ENV_FILE": str(file.resolve()), "OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run([sys.executable, "train.py"], cwd=PROJECT, env=environment, check=False)
    if done.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Stopped(done.returncode - 128)
    if done.returncode == 2:
        raise UserError(f"train.py refused {file}; its message is above")
    done.check_returncode()


def last_figures(output: Path) -> dict[str, Any]:
    """The newest line of a run's validation log, and its last training loss."""
    validation = _last_line(output / "validation_log.jsonl")
    training = _last_line(output / "training_log.jsonl")
    metrics = validation.get("metrics") or {}
    names = ("talker_loss", "sub_talker_loss", "accuracy", "sub_talker_accuracy")
    figures = {f"validation_{name}": round(metrics[name], 3) for name in names if name in metrics}
    return {"steps": training.get("step"), "training_loss": training.get("loss")} | figures


def _last_line(path: Path) -> dict[str, Any]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else {}


def train_talker(work: Work) -> dict[str, Any]:
    """Trains to the end; the stage's figures."""
    run_training(talker_settings(work), work.folder / "talker" / "settings.env", work.num_threads)
    return last_figures(work.folder / "talker" / "output")


if __name__ == "__main__":
    main_of("talker", train_talker, __doc__)
