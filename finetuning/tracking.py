"""What a run tells: JSONL logs, a progress bar or plain lines, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetuning.console import say
from finetuning.settings import Settings


class Tracker:
    """Logs of one run; on processes other than the main one it does nothing."""

    def __init__(self, settings: Settings, total_steps: int, is_main: bool) -> None:
        self.output_dir, self.is_main = settings.output_dir, is_main
        self.uses_bar = is_main and sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, unit="step", disable=not self.uses_bar)
        self._wandb = start_wandb(settings) if is_main and settings.use_wandb else None

    def advance(self) -> None:
        """One optimizer step is done."""
        self._bar.update(1)

    def log_training(self, record: dict[str, Any]) -> None:
        """Appends to training_log.jsonl; needs step, epoch, loss, learning_rate, frames_per_second, seconds_left."""
        self._append("training_log.jsonl", record)
        figures = {"loss": f"{record['loss']:.4f}", "lr": f"{record['learning_rate']:.2g}"}
        self._bar.set_postfix(figures | {"frames/s": f"{record['frames_per_second']:.0f}"})
        if self.is_main and not self.uses_bar:
            say(
                f"Epoch {record['epoch']} | Step {record['step']} | Loss: {record['loss']:.4f} | "
                f"LR: {record['learning_rate']:.1e} | {record['frames_per_second']:.0f} frames/s | "
                f"{format_seconds(record['seconds_left'])} left"
            )
        self._log_wandb("train", record)

    def log_validation(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Appends to validation_log.jsonl and says the main figures."""
        figures = {name: value for name, value in metrics.items() if name != "loss"}
        self._append(
            "validation_log.jsonl", {"step": step, "epoch": epoch, "loss": metrics["loss"], "metrics": figures}
        )
        if self.is_main:
            say(
                f"Epoch {epoch} | Step {step} | Validation loss: {metrics['loss']:.4f} | "
                f"accuracy: {metrics['accuracy']:.1%} (codebook 0), {metrics['sub_talker_accuracy']:.1%} (1-15)"
            )
        self._log_wandb("validation", {"step": step, **metrics})

    def log_result(self, name: str, record: dict[str, Any]) -> None:
        """A figure of the finished run, as one more line of validation_log.jsonl under ``metrics``."""
        self._append("validation_log.jsonl", record)
        self._log_wandb(name, {"step": record["step"], **record["metrics"]})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, file: str, record: dict[str, Any]) -> None:
        if not self.is_main:
            return
        record = {key: _json_value(value) for key, value in record.items()}  # NaN and inf are no JSON
        record = {**record, "timestamp": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
        with (self.output_dir / file).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def _log_wandb(self, group: str, record: dict[str, Any]) -> None:
        if self._wandb is not None:
            numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
            self._wandb.log({f"{group}/{key}": value for key, value in numbers.items()}, step=record["step"])


def start_wandb(settings: Settings) -> Any:
    """A W&B run, offline where nobody could type a key; None with a word when the package is missing or fails."""
    try:
        import wandb
    except ImportError:
        say("W&B is not installed; logging to files only (USE_WANDB=false silences this)")
        return None
    mode = os.environ.get("WANDB_MODE")
    if mode is None and not _has_wandb_key() and not sys.stdin.isatty():
        mode = "offline"
        say("W&B: no key and no terminal, so this run is logged offline (upload it with `wandb sync`)")
    try:
        return wandb.init(
            project=settings.wandb_project,
            name=settings.wandb_run_name,
            entity=settings.wandb_entity,
            config=settings.public(),
            dir=str(Path(settings.output_dir).resolve()),
            mode=mode,
        )
    except Exception as error:  # a tracking service must never cost a run
        say(f"W&B could not start ({type(error).__name__}); logging to files only")
        return None


def _has_wandb_key() -> bool:
    """Whether `wandb login` or WANDB_API_KEY has left a key."""
    from requests.utils import get_netrc_auth

    host = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(host))


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_seconds(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
