"""The services that REPORT_TO names, with the same calls: ``log`` and ``finish``.

Each of them may fail, be missing or be out of reach; none of that costs a run (see ``tracking``).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from finetuning.audio import SAMPLE_RATE_HZ
from finetuning.checkpoint import sample_folders
from finetuning.console import say
from finetuning.history import Record, figures_of, read_records, series
from finetuning.settings import Settings

if TYPE_CHECKING:  # a room behind this one
    from finetuning.samples import Sample

#: Names of the services as people write them.
TITLES = {"wandb": "W&B", "tensorboard": "TensorBoard"}
TENSORBOARD_FOLDER = "tensorboard"
#: Seconds after which TensorBoard's figures are on the disk at the latest.
_FLUSH_SECONDS = 30


class Service(Protocol):
    """What a run reports to. ``id`` is by what the same run is known again; None where nothing needs that."""

    id: str | None

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


def start_services(settings: Settings, run_id: str | None, facts: Mapping[str, Any]) -> dict[str, Service]:
    """Those of REPORT_TO that could be started, by name.

    Args:
        run_id: of the W&B run that is resumed.
        facts: JSON values that describe the run; see ``run_record``.
    """
    starts = {
        "wandb": lambda: start_wandb(settings, run_id, facts),
        "tensorboard": lambda: start_tensorboard(settings, facts),
    }
    started = {name: starts[name]() for name in settings.trackers()}
    return {name: service for name, service in started.items() if service is not None}


def flattened(record: Mapping[str, Any], path: str) -> dict[str, int | float]:
    """The numbers of a record under their paths: ``validation/loss``, ``validation/speakers/anna/loss``,
    ``validation/codebook_accuracy/0``."""
    numbers: dict[str, int | float] = {}
    for key, value in record.items():
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            numbers |= flattened(value, f"{path}/{key}")
        elif isinstance(value, (int, float)):
            numbers[f"{path}/{key}"] = value
    return numbers


def log_audio(service: Service, samples: Sequence[Sample], step: int) -> None:
    """Puts samples where they can be heard."""
    if isinstance(service, TensorBoard):
        for one in samples:
            service.log_audio(one.file.stem, one.waveform, step)
        return
    from wandb import Audio

    shown = {
        f"samples/{one.file.stem}": Audio(str(one.file), caption=f"{one.text} ({one.language})") for one in samples
    }
    service.log(shown, step=step)


# -------------------------------------------------------------------------------------------------- Weights & Biases


def start_wandb(settings: Settings, run_id: str | None = None, facts: Mapping[str, Any] | None = None) -> Any:
    """A W&B run, offline where nobody could type a key; None with a word when the package is missing or fails.

    Args:
        run_id: of the run that is resumed.
        facts: stand under ``run`` in its configuration.
    """
    try:
        import wandb
    except Exception as error:  # missing, or broken by another package's version
        say(f"W&B cannot be imported ({type(error).__name__}); logging to files only (USE_WANDB=false silences this)")
        return None
    try:
        mode = os.environ.get("WANDB_MODE")
        if mode is None and not _has_wandb_key() and not (sys.stdin and sys.stdin.isatty()):
            mode = "offline"
            say("W&B: no key and no terminal, so this run is logged offline (upload it with `wandb sync`)")
        return wandb.init(
            project=settings.wandb_project,
            name=settings.wandb_run_name,
            entity=settings.wandb_entity,
            config={**settings.public(), **({"run": dict(facts)} if facts else {})},
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


# -------------------------------------------------------------------------------------------------------- TensorBoard


class TensorBoard:
    """Event files in ``output/tensorboard/``.

    They are written anew at every start from what the run has kept, its logs and samples, so they always say what these
    say: a run that is resumed has no step twice, and one that is tracked from its middle on has its beginning.
    """

    id = None

    def __init__(self, output_dir: Path, facts: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = output_dir / TENSORBOARD_FOLDER
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        # purge_step: a TensorBoard that is open already forgets what the files before had.
        self._writer = SummaryWriter(str(folder), purge_step=0, flush_secs=_FLUSH_SECONDS)
        self._writer.add_text("run", f"```json\n{json.dumps(facts, indent=2)}\n```")
        for log, numbers_of in _NUMBERS_OF.items():
            for record in read_records(output_dir / log):
                self.log(numbers_of(record), record["step"], _time_of(record))
        logged = {step for step, _ in series(read_records(output_dir / "validation_log.jsonl"), "num_samples")}
        for step, samples in sample_folders(output_dir):
            if step in logged:  # else the run, stopped there, is about to say them again
                self._replay_audio(samples, step)

    def log(self, numbers: Mapping[str, float], step: int, time: float | None = None) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step, walltime=time)

    def log_audio(self, name: str, waveform: np.ndarray, step: int, time: float | None = None) -> None:
        """
        Args:
            waveform: (n,) float32 at 24 kHz.
        """
        self._writer.add_audio(f"samples/{name}", waveform[None], step, sample_rate=SAMPLE_RATE_HZ, walltime=time)

    def finish(self) -> None:
        self._writer.close()

    def _replay_audio(self, folder: Path, step: int) -> None:
        """The samples of a step; one that cannot be read is left out."""
        import soundfile

        for file in sorted(folder.glob("*.wav")):
            with contextlib.suppress(OSError, RuntimeError):  # soundfile's error is a RuntimeError
                self.log_audio(file.stem, soundfile.read(file, dtype="float32")[0], step, file.stat().st_mtime)


def _time_of(record: Record) -> float | None:
    """Seconds since 1970 of a log line."""
    try:
        return datetime.fromisoformat(record["timestamp"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def numbers_of_training(record: Record) -> dict[str, int | float]:
    """What the services get of a line of training_log.jsonl."""
    left_out = ("step", "timestamp")
    return flattened({key: value for key, value in record.items() if key not in left_out}, "train")


def numbers_of_evaluation(figures: Mapping[str, Any]) -> dict[str, int | float]:
    """What the services get of an evaluation, or of the round trip at the end."""
    path = "roundtrip" if "roundtrip_reproduced" in figures else "validation"
    return flattened({key: value for key, value in figures.items() if key != "step"}, path)


def numbers_of_alarm(record: Record) -> dict[str, int | float]:
    """What the services get of a line of alarms.jsonl."""
    return flattened({str(record.get("kind")): record.get("size")}, "alarms")


#: Log -> what the services get of a line of it.
_NUMBERS_OF: Mapping[str, Callable[[Record], dict[str, int | float]]] = {
    "training_log.jsonl": numbers_of_training,
    "validation_log.jsonl": lambda record: numbers_of_evaluation(figures_of(record)),
    "alarms.jsonl": numbers_of_alarm,
}


def start_tensorboard(settings: Settings, facts: Mapping[str, Any]) -> TensorBoard | None:
    """None with a word when the package is missing or fails."""
    try:
        return TensorBoard(settings.output_dir, facts)
    except Exception as error:  # a tracking service must never cost a run
        say(f"TensorBoard could not start ({type(error).__name__}: {error}); REPORT_TO=none silences this")
        return None
