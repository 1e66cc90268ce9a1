"""Generated samples on disk, each as a wav file and a JSON file whose name stands for everything that it depends on.

``samples/<checkpoint>/<speaker>-seed<seed>-<key>.wav`` and ``….json``. What is there and whole is not made again; what
was cut off (no JSON, or one that does not fit the wav) is. The JSON also keeps what was measured of the sample.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finetuning.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from finetuning.disk import CHECKSUMS_FILE, checksum, files_of, write_json
from finetuning.evaluation_media import wav

#: How a model speaks: by the name of a speaker, or as a reference sounds: by its vector alone, or with it in context.
Manner = Literal["name", "voice", "context"]
#: Raise it when the same request would give another sample.
_FORMAT = 1
#: Of a checkpoint, what its speech does not depend on.
_SILENT = ("README.md", "training_state.json", CHECKSUMS_FILE)
_SILENT_FOLDERS = ("adapter", "speaker_encoder")


@dataclass(frozen=True)
class Request:
    """Everything that a sample depends on.

    Attributes:
        fingerprint: of the checkpoint's files.
        speaker: its name; of a clone only whose voice it is.
        language: as stock takes it.
        text: normalised.
        max_new_tokens: after so many codec frames it is cut off.
        non_streaming: stock's non_streaming_mode.
        precision, device: of the computation; the draws differ with them.
        reference, reference_text: of a clone, the file's checksum and what stands in context.
    """

    fingerprint: str
    manner: Manner
    speaker: str
    language: str
    text: str
    seed: int
    max_new_tokens: int
    non_streaming: bool
    precision: str
    device: str
    reference: str | None = None
    reference_text: str | None = None

    def key(self) -> str:
        """32 hexadecimal digits."""
        content = asdict(self) | {"format": _FORMAT, "qwen_tts": version("qwen-tts")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def file_name(self) -> str:
        speaker = re.sub(r"[^a-z0-9]+", "-", self.speaker.lower()).strip("-")[:24] or "speaker"
        return f"{speaker}-seed{self.seed}-{self.key()}"


@dataclass(frozen=True)
class Kept:
    """A sample on disk.

    Attributes:
        wav: its file; the JSON lies beside it.
        num_codec_frames: generated.
        stopped: whether the model stopped by itself.
        measures: what ``yardstick`` (a digest) gave; {} before it is measured.
    """

    wav: Path
    num_codec_frames: int
    stopped: bool
    measures: Mapping[str, float]
    yardstick: str | None = None

    @property
    def seconds(self) -> float:
        return self.num_codec_frames * SAMPLES_PER_FRAME / SAMPLE_RATE_HZ

    def waveform(self) -> np.ndarray:
        """(num_samples,) float32 at 24 kHz."""
        import soundfile

        return soundfile.read(self.wav, dtype="float32")[0]


def find(folder: Path, request: Request) -> Kept | None:
    """The sample of a request; None where it is not there, or not whole."""
    sound = folder / f"{request.file_name()}.wav"
    record = _read(sound.with_suffix(".json"))
    try:
        if record["key"] != request.key() or record["checksum"] != checksum(sound):
            return None
        kept = Kept(sound, int(record["num_codec_frames"]), bool(record["stopped"]), dict(record["measures"]))
        return replace(kept, yardstick=record["yardstick"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def find_anywhere(samples: Path, own: str, request: Request) -> Kept | None:
    """The sample of a request, wherever it was kept: the same files had another name, or were moved.

    Args:
        samples: the folder of all checkpoints' folders.
        own: name of the folder that is looked into first.
    """
    others = sorted({file.parent for file in samples.glob(f"*/{request.file_name()}.json")} - {samples / own})
    return next((kept for folder in (samples / own, *others) if (kept := find(folder, request))), None)


def keep(folder: Path, request: Request, waveform: np.ndarray, checkpoint: Path) -> Kept:
    """Writes a sample, the JSON last.

    Args:
        waveform: (num_codec_frames * 1920,) at 24 kHz.
        checkpoint: that said it.

    Raises:
        OSError: the disk refused it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sound = folder / f"{request.file_name()}.wav"
    unfinished = sound.with_name(f".{sound.name}.tmp")
    unfinished.write_bytes(wav(waveform))
    unfinished.replace(sound)
    num_frames = round(len(waveform) / SAMPLES_PER_FRAME)
    # Of max_new_tokens the last is never spoken, whether it is a frame or the end: so a sample that stopped by itself
    # at the very last one cannot be told from one that was cut off, and counts as cut off.
    kept = Kept(sound, num_frames, num_frames < request.max_new_tokens - 1, {})
    content = {"key": request.key(), "checksum": checksum(sound), "request": asdict(request)}
    _write(kept, content | {"checkpoint": str(checkpoint.resolve())})
    return kept


def note_measures(kept: Kept, measures: Mapping[str, float], yardstick: str | None) -> Kept:
    """Writes what was measured beside a sample.

    Args:
        yardstick: None where it was not measured as a whole, so that it is measured again.
    """
    kept = replace(kept, measures=dict(measures), yardstick=yardstick)
    _write(kept, _read(kept.wav.with_suffix(".json")))
    return kept


def remove_outdated(folder: Path, checkpoint: Path, fingerprints: Collection[str]) -> int:
    """Removes samples of what a checkpoint was before; gives their number. Those of another folder of that name, of
    another run, stay.

    Args:
        fingerprints: of all checkpoints that are compared or in the run now: one may have another name than before.
    """
    num_removed = 0
    for record_file in folder.glob("*.json"):
        record = _read(record_file)
        is_of_checkpoint = record.get("checkpoint") == str(checkpoint.resolve())
        if is_of_checkpoint and (record.get("request") or {}).get("fingerprint") not in fingerprints:
            record_file.with_suffix(".wav").unlink(missing_ok=True)
            record_file.unlink()  # last: without it nobody knows whose the sound is
            num_removed += 1
    return num_removed


def fingerprint(folder: Path) -> str:
    """Of the files of a checkpoint that its speech depends on: 32 hexadecimal digits.

    The checksums that were saved with it are taken at their word, unless a file is newer than they are or has another
    size; a folder without them is read as a whole.
    """
    entries, written = _saved_checksums(folder)
    found = {}
    for file in files_of(folder):
        name = file.relative_to(folder).as_posix()
        if name in _SILENT or name.partition("/")[0] in _SILENT_FOLDERS:
            continue
        status, entry = file.stat(), entries.get(name) or {}
        is_as_saved = entry.get("bytes") == status.st_size and status.st_mtime_ns <= written
        found[name] = entry["xxh3_128"] if is_as_saved else checksum(file)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:32]


def _saved_checksums(folder: Path) -> tuple[dict[str, Any], int]:
    """(entries, when they were written)."""
    try:
        file = folder / CHECKSUMS_FILE
        return json.loads(file.read_text(encoding="utf-8"))["files"], file.stat().st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError):
        return {}, 0


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none, or only half of one."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write(kept: Kept, record: Mapping[str, Any]) -> None:
    figures = {"num_codec_frames": kept.num_codec_frames, "stopped": kept.stopped}
    measured = {"measures": dict(kept.measures), "yardstick": kept.yardstick}
    write_json(kept.wav.with_suffix(".json"), {**record, **figures, **measured})
