"""What a run tells: JSONL logs, a progress bar or plain lines, alarms, plots, the services of REPORT_TO."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from finetuning.alarms import NUM_RECENT, Alarm, History, find_alarms, news
from finetuning.checkpoint import LOG_FILES
from finetuning.console import say
from finetuning.dataset import SkippedRow
from finetuning.evaluations import evaluations_table
from finetuning.history import by_step, is_number, read_records
from finetuning.metrics import METRICS
from finetuning.services import (
    TITLES,
    log_audio,
    numbers_of_alarm,
    numbers_of_evaluation,
    numbers_of_training,
    start_services,
)
from finetuning.settings import Settings

if TYPE_CHECKING:  # a room behind this one
    from finetuning.samples import Sampled

#: Logs that alarms are found in, and where they are listed.
WATCHED = ("training_log.jsonl", "validation_log.jsonl", "alarms.jsonl")
#: More speakers than this are not told one by one, only those with the highest validation losses.
MAX_SPEAKERS_TOLD, NUM_WORST_TOLD = 4, 3
#: Plots are drawn at an evaluation unless the last drawing is nearer than so many times the seconds that it took;
#: those of the first are guessed.
PLOT_PATIENCE, PLOT_SECONDS = 20, 2.0


class Tracker:
    """Logs of one run; on processes other than the main one it does nothing.

    Args:
        resumed: ``to_json()`` of the run that is resumed; what its logs say beyond that is cut off.
        step: optimizer steps that are behind.
        facts: JSON values that describe the run, for the services; see ``run_record``.
        best_step: the evaluation that ``best/`` was written after.
    """

    def __init__(
        self,
        settings: Settings,
        total_steps: int,
        is_main: bool,
        resumed: Mapping[str, Any] | None = None,
        step: int = 0,
        facts: Mapping[str, Any] | None = None,
        best_step: int | None = None,
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
        self._services = start_services(settings, resumed["wandb_run_id"], facts or {}) if is_main else {}
        # Kept when W&B fails on the way: the run that is resumed goes on with it.
        self._wandb_run_id = getattr(self._services.get("wandb"), "id", None) or resumed["wandb_run_id"]
        self._best_step = best_step
        self._plots = Plots(settings.output_dir) if is_main else None
        self._training, self._evaluations, told = (
            read_records(self.output_dir / file) if is_main else [] for file in WATCHED
        )
        warmup_steps = 0 if settings.lr_scheduler == "constant" else settings.warmup_steps
        self._limits = {
            "num_steps": total_steps, "warmup_steps": warmup_steps, "max_grad_norm": settings.max_grad_norm,
        }  # fmt: skip
        self._told = {str(alarm.get("kind")): alarm["size"] for alarm in told if is_number(alarm.get("size"))}
        self._cannot_watch = False
        self._watch(step)

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
        if not self.is_main:
            return
        self._training.append(self._append("training_log.jsonl", record))
        figures = {"loss": f"{record['loss']:.4f}", "lr": f"{record['learning_rate']:.2g}"}
        self._bar.set_postfix(figures | {"frames/s": f"{record['frames_per_second']:.0f}"})
        if not self.uses_bar:
            say(
                f"Epoch {record['epoch']} | Step {record['step']} | Loss: {record['loss']:.4f} | "
                f"LR: {record['learning_rate']:.1e} | {record['frames_per_second']:.0f} frames/s | "
                f"{format_seconds(record['seconds_left'])} left"
            )
        self._report(numbers_of_training(record), record["step"])
        self._watch(record["step"])

    def log_skipped_row(self, step: int, row: SkippedRow) -> None:
        """Lists a row that could not be read in skipped_rows.jsonl, and says so."""
        if self.is_main:
            self._append("skipped_rows.jsonl", {"step": step, "line": row.line, "reason": row.reason})
            say(f"skipped line {row.line} of the training rows: {row.reason}")

    def skipped_rows(self) -> list[tuple[int, SkippedRow]]:
        """(step, row) of all that skipped_rows.jsonl lists; nothing where it cannot be read."""
        try:
            lines = (self.output_dir / "skipped_rows.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
            return [(record["step"], SkippedRow(record["line"], record["reason"])) for record in records]
        except (OSError, ValueError, LookupError, TypeError):
            return []

    def log_validation(self, step: int, epoch: int, metrics: dict[str, Any], best_by: str | None = None) -> None:
        """Appends to validation_log.jsonl and says the main figures: in a line, or on a terminal in a table with those
        before. Then come alarms and plots.

        Args:
            metrics: see ``Validator.evaluate``; of ``METRICS`` any may be missing, ``loss`` too.
            best_by: what this evaluation is the best so far of, in words; None where it is not.
        """
        if not self.is_main:
            return
        figures = {name: value for name, value in metrics.items() if name != "loss"}
        record = {"step": step, "epoch": epoch, "loss": metrics.get("loss"), "metrics": figures}
        self._evaluations.append(self._append("validation_log.jsonl", record))
        if best_by:
            self._best_step = step
        speakers = told_of_speakers(metrics.get("speakers", {}))
        best = f" | {best_by} so far" if best_by else ""
        if self.uses_bar:
            say(f"Epoch {epoch} | Step {step} | Validation{speakers}{best}")
            say(evaluations_table(self._evaluations, self._best_step))
        else:
            say(f"Epoch {epoch} | Step {step}{told_of_figures(metrics)}{speakers}{best}")
        self._report(numbers_of_evaluation(metrics), step)
        self._watch(step)
        self._plots.refresh()

    def log_samples(self, step: int, sampled: Sampled) -> None:
        """Says where the samples of a step are, and shows them in W&B."""
        figures, samples = sampled
        if self.is_main:
            say(
                f"Step {step} | {len(samples)} samples, {figures['eos_rate']:.0%} stopped by themselves, "
                f"{figures['sample_seconds']:.1f} s on average: {samples[0].file.parent}"
            )
        for name, service in list(self._services.items()):
            self._try(name, log_audio, service, samples, step)

    def figures_at(self, step: int) -> dict[str, float]:
        """What was measured at a step, of ``METRICS``."""
        found = dict(by_step(self._evaluations)).get(step, {})
        return {name: found[name] for name in METRICS if is_number(found.get(name))}

    def draw_plots(self) -> None:
        """Draws the plots of a run that has come to its end."""
        if self.is_main:
            self._plots.draw()

    def log_result(self, record: dict[str, Any]) -> None:
        """Figures of the finished run, as one more line of validation_log.jsonl under ``metrics``."""
        if self.is_main:
            self._append("validation_log.jsonl", record)
            self._report(numbers_of_evaluation(record["metrics"]), record["step"])

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for name, service in list(self._services.items()):
            self._try(name, service.finish)

    def _watch(self, step: int) -> None:
        """Says what has begun to go wrong, and logs it."""
        if not self.is_main:
            return
        del self._training[:-NUM_RECENT]
        for alarm in self._new_alarms():
            self._told[alarm.kind] = alarm.size
            say(f"ALARM {alarm.kind}: {alarm.text}")
            record = {"step": step, "kind": alarm.kind, "size": alarm.size, "text": alarm.text}
            self._report(numbers_of_alarm(self._append("alarms.jsonl", record)), step)

    def _new_alarms(self) -> list[Alarm]:
        """None where looking for them fails (logs that somebody has edited, say): that must never cost a run."""
        try:
            return news(find_alarms(History(self._training, self._evaluations, **self._limits)), self._told)
        except Exception as error:
            if not self._cannot_watch:
                say(f"warning: no alarms, they cannot be looked for ({type(error).__name__}: {error})")
            self._cannot_watch = True
            return []

    def _append(self, file: str, record: dict[str, Any]) -> dict[str, Any]:
        """Gives the record as it will be read again."""
        record = {**_json_value(record), "timestamp": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
        self._pending.setdefault(file, []).append(json.dumps(record) + "\n")
        self._num_lines[file] = self._num_lines.get(file, 0) + 1
        try:
            self._write(file)
        except OSError as error:
            if len(self._pending[file]) == 1:
                say(f"warning: {file} cannot be written ({error}); its lines are kept and written later")
        return record

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

    def _report(self, numbers: Mapping[str, float], step: int) -> None:
        for name, service in list(self._services.items()):
            self._try(name, service.log, numbers, step=step)

    def _try(self, name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            call(*arguments, **options)
        except Exception as error:  # a tracking service must never cost a run
            del self._services[name]
            rest = ", ".join(["files", *(TITLES[other] for other in self._services)])
            say(f"{TITLES[name]} failed ({type(error).__name__}); logging to {rest} only")


class Plots:
    """The pictures of a run while it goes on. One that cannot be drawn is said once, and ends nothing."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._seconds, self._drawn_at = PLOT_SECONDS, time.monotonic()
        self._has_failed = False

    def refresh(self) -> None:
        """Draws them, unless evaluations follow one another so fast that drawing would take long beside them."""
        if time.monotonic() - self._drawn_at >= PLOT_PATIENCE * self._seconds:
            self.draw()

    def draw(self) -> None:
        from finetuning.plots import draw_plots

        start = time.monotonic()
        try:
            draw_plots(self._output_dir)
        except Exception as error:  # a picture must never cost a run
            if not self._has_failed:
                say(
                    f"warning: plots could not be drawn ({type(error).__name__}: {error}); the run goes on without them"
                )
            self._has_failed = True
        self._drawn_at = time.monotonic()
        self._seconds = self._drawn_at - start


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


def told_of_figures(metrics: Mapping[str, Any]) -> str:
    """The main figures of an evaluation for a line, those that are there."""
    parts = []
    if metrics.get("loss") is not None:
        parts.append(f"Validation loss: {metrics['loss']:.4f}")
    accuracies = {"codebook 0": metrics.get("accuracy"), "1-15": metrics.get("sub_talker_accuracy")}
    if known := [f"{value:.1%} ({codebooks})" for codebooks, value in accuracies.items() if value is not None]:
        parts.append(f"accuracy: {', '.join(known)}")
    of_samples = [name for name, metric in METRICS.items() if metric.is_of_samples and is_number(metrics.get(name))]
    if of_samples:
        parts.append("samples: " + ", ".join(f"{name} {metrics[name]:.2f}" for name in of_samples))
    return "".join(f" | {part}" for part in parts)


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


def _json_value(value: Any) -> Any:
    """With None for NaN and infinite numbers, which are no JSON."""
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_seconds(seconds: float) -> str:
    """1:02:03 or 2:03; ? for NaN."""
    if math.isnan(seconds):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
