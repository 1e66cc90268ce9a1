"""What a run tells: JSONL logs, a progress bar or plain lines, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from finetuning.checkpoint import LOG_FILES
from finetuning.console import say
from finetuning.dataset import SkippedRow
from finetuning.settings import Settings

if TYPE_CHECKING:  # a room behind this one
    from finetuning.samples import Sample, Sampled

#: More speakers than this are not told one by one, only those with the highest validation losses.
MAX_SPEAKERS_TOLD, NUM_WORST_TOLD = 4, 3


class Tracker:
    """Logs of one run; on processes other than the main one it does nothing.

    Args:
        resumed: ``to_json()`` of the run that is resumed; what its logs say beyond that is cut off.
        step: optimizer steps that are behind.
    """

    def __init__(
        self,
        settings: Settings,
        total_steps: int,
        is_main: bool,
        resumed: Mapping[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        self.output_dir, self.is_main = settings.output_dir, is_main
        self.uses_bar = is_main and sys.stderr.isatty()
        resumed = resumed or {"lines": {}, "wandb_run_id": None}
        self._num_lines: dict[str, int] = dict(resumed["lines"])
        self._pending: dict[str, list[str]] = {}  # lines that the disk refused
        if is_main:
            for file in LOG_FILES:
                num_lines = self._num_lines.get(file, 0)
                self._num_lines[file] = cut_log(self.output_dir / file, num_lines)
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=not self.uses_bar)
        self._wandb = start_wandb(settings, resumed["wandb_run_id"]) if is_main and settings.use_wandb else None
        # Kept when W&B fails on the way: the run that is resumed goes on with it.
        self._wandb_run_id = getattr(self._wandb, "id", None) or resumed["wandb_run_id"]

    def to_json(self) -> dict[str, Any]:
        """How far the logs have come: lines of each file, the W&B run's id."""
        return {"lines": dict(self._num_lines), "wandb_run_id": self._wandb_run_id}

    def flush(self) -> None:
        """Brings the logs to the disk, so that a state never knows of lines that are lost.

        Raises:
            OSError: the disk refuses (it is full, say).
        """
        for file in self._num_lines if self.is_main else ():
            self._write(file)
            with contextlib.suppress(FileNotFoundError), (self.output_dir / file).open("rb") as stream:
                os.fsync(stream.fileno())

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

    def log_skipped_row(self, step: int, row: SkippedRow) -> None:
        """Lists a row that could not be read in skipped_rows.jsonl, and says so."""
        self._append("skipped_rows.jsonl", {"step": step, "line": row.line, "reason": row.reason})
        if self.is_main:
            say(f"skipped line {row.line} of the training rows: {row.reason}")

    def skipped_rows(self) -> list[tuple[int, SkippedRow]]:
        """(step, row) of all that skipped_rows.jsonl lists; nothing where it cannot be read."""
        try:
            lines = (self.output_dir / "skipped_rows.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
            return [(record["step"], SkippedRow(record["line"], record["reason"])) for record in records]
        except (OSError, ValueError, LookupError, TypeError):
            return []

    def log_validation(self, step: int, epoch: int, metrics: dict[str, Any]) -> None:
        """Appends to validation_log.jsonl and says the main figures.

        Args:
            metrics: see ``Validator.evaluate``, with figures of samples; without a ``loss`` the figures are of samples
                alone.
        """
        figures = {name: value for name, value in metrics.items() if name != "loss"}
        self._append(
            "validation_log.jsonl", {"step": step, "epoch": epoch, "loss": metrics.get("loss"), "metrics": figures}
        )
        if self.is_main and "loss" in metrics:
            say(
                f"Epoch {epoch} | Step {step} | Validation loss: {metrics['loss']:.4f} | "
                f"accuracy: {metrics['accuracy']:.1%} (codebook 0), {metrics['sub_talker_accuracy']:.1%} (1-15)"
                f"{told_of_speakers(metrics.get('speakers', {}))}"
            )
        self._log_wandb("validation", {"step": step, **metrics})

    def log_samples(self, step: int, sampled: Sampled) -> None:
        """Says where the samples of a step are, and shows them in W&B."""
        figures, samples = sampled
        if self.is_main:
            say(
                f"Step {step} | {len(samples)} samples, {figures['eos_rate']:.0%} stopped by themselves, "
                f"{figures['sample_seconds']:.1f} s on average: {samples[0].file.parent}"
            )
        if self._wandb is not None:
            self._try_wandb(self._log_audio, step, samples)

    def _log_audio(self, step: int, samples: Sequence[Sample]) -> None:
        from wandb import Audio

        shown = {
            f"samples/{one.file.stem}": Audio(str(one.file), caption=f"{one.text} ({one.language})") for one in samples
        }
        self._wandb.log(shown, step=step)

    def log_result(self, name: str, record: dict[str, Any]) -> None:
        """A figure of the finished run, as one more line of validation_log.jsonl under ``metrics``."""
        self._append("validation_log.jsonl", record)
        self._log_wandb(name, {"step": record["step"], **record["metrics"]})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._wandb is not None:
            self._try_wandb(self._wandb.finish)

    def _append(self, file: str, record: dict[str, Any]) -> None:
        if not self.is_main:
            return
        record = {**_json_value(record), "timestamp": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
        self._pending.setdefault(file, []).append(json.dumps(record) + "\n")
        self._num_lines[file] = self._num_lines.get(file, 0) + 1
        try:
            self._write(file)
        except OSError as error:
            if len(self._pending[file]) == 1:
                say(f"warning: {file} cannot be written ({error}); its lines are kept and written later")

    def _write(self, file: str) -> None:
        """Appends what is pending, all of it or nothing."""
        if not (lines := self._pending.get(file)):
            return
        path = self.output_dir / file
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as stream:
                stream.writelines(lines)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise
        self._pending[file] = []

    def _log_wandb(self, group: str, record: dict[str, Any]) -> None:
        if self._wandb is not None:
            named = flattened({key: value for key, value in record.items() if key != "step"}, group)
            self._try_wandb(self._wandb.log, named, step=record["step"])

    def _try_wandb(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            call(*arguments, **options)
        except Exception as error:  # a tracking service must never cost a run
            self._wandb = None
            say(f"W&B failed ({type(error).__name__}); logging to files only")


def cut_log(file: Path, num_lines: int) -> int:
    """Keeps the first so many lines, whose number it gives: what came after them is going to be logged again."""
    if not file.exists():
        return 0
    found = size = 0
    with file.open("rb+") as stream:
        while found < num_lines and stream.readline().endswith(b"\n"):
            found += 1
            size = stream.tell()
        stream.truncate(size)
    if not size:
        file.unlink()
    if found < num_lines:
        say(f"{file} has {found} of the {num_lines} lines that were logged; it goes on after them")
    return found


def start_wandb(settings: Settings, run_id: str | None = None) -> Any:
    """A W&B run, offline where nobody could type a key; None with a word when the package is missing or fails.

    Args:
        run_id: of the run that is resumed.
    """
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
            id=run_id,
            resume="allow" if run_id else None,
        )
    except Exception as error:  # a tracking service must never cost a run
        say(f"W&B could not start ({type(error).__name__}); logging to files only")
        return None


def _has_wandb_key() -> bool:
    """Whether `wandb login` or WANDB_API_KEY has left a key."""
    from requests.utils import get_netrc_auth

    host = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(host))


def told_of_speakers(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The validation losses of the speakers for the end of a line; of many only the highest. Nothing for one speaker.

    Args:
        figures: name -> figures; see ``Validator.evaluate``.
    """
    losses = {name: of_speaker["loss"] for name, of_speaker in figures.items()}
    if len(losses) < 2:
        return ""
    heading = "speakers"
    if len(losses) > MAX_SPEAKERS_TOLD:
        heading = f"highest of {len(losses)} speakers"
        worst = sorted(losses, key=lambda name: math.inf if math.isnan(losses[name]) else losses[name], reverse=True)
        losses = {name: losses[name] for name in worst[:NUM_WORST_TOLD]}
    return f" | {heading}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


def flattened(record: Mapping[str, Any], path: str) -> dict[str, int | float]:
    """The numbers of a record under their paths: ``validation/loss``, ``validation/speakers/anna/loss``."""
    numbers: dict[str, int | float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            numbers |= flattened(value, f"{path}/{key}")
        elif isinstance(value, (int, float)):
            numbers[f"{path}/{key}"] = value
    return numbers


def _json_value(value: Any) -> Any:
    """With None for NaN and infinite numbers, which are no JSON."""
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_seconds(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
