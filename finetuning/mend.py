"""Mending what can be mended in clips: silence at the edges, loudness. Always into new files, never in place.

The mended rows have no codes: they are encoded again, so that codes and audio belong together.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.audio import AudioError, check_waveform, to_model_rate
from finetuning.errors import UserError
from finetuning.manifest import Row, RowFormat
from finetuning.quality import loudness_lufs, silent_edges_seconds

#: Left of the silence at each edge: room for breath, for soft onsets and for what decays.
SILENCE_MARGIN_SECONDS = 0.15
#: Less than this is not worth another file.
MIN_TRIM_SECONDS, MIN_GAIN_DB = 0.05, 0.1
#: No sample may become louder than this.
MAX_PEAK_DB = -1.0
#: What can be asked for; speech at the upper end is already squeezed.
LOUDNESS_RANGE_LUFS = (-50.0, -8.0)
#: Rows that could not be mended and are named one by one.
MAX_PROBLEMS = 5
#: Keys that speak of the audio as it was.
_STALE_KEYS = ("audio_codes", "codes_source", "measures")


@dataclass
class MendSummary:
    """What was done.

    Attributes:
        num_rows: rows read; num_dropped of them were left out.
        num_changed: rows with a new clip; num_trimmed and num_scaled say why (both may be true of one).
        seconds_removed: silence, over all clips.
        num_limited: clips that stayed quieter than asked for, because they would have clipped.
        num_unmended: rows without a readable audio file, kept as they are.
        problems: (line, reason) of the first of those.
    """

    num_rows: int = 0
    num_dropped: int = 0
    num_changed: int = 0
    num_trimmed: int = 0
    num_scaled: int = 0
    num_limited: int = 0
    num_unmended: int = 0
    seconds_removed: float = 0.0
    problems: list[tuple[int, str]] = field(default_factory=list)

    def __str__(self) -> str:
        done = [
            f"{self.num_trimmed} trimmed ({self.seconds_removed:.1f} s of silence)",
            f"{self.num_scaled} brought to the loudness",
            f"{self.num_limited} of them kept quieter, because they would clip" if self.num_limited else "",
            f"{self.num_dropped} left out" if self.num_dropped else "",
            f"{self.num_unmended} without readable audio kept as they are" if self.num_unmended else "",
        ]
        lines = [f"{self.num_rows} rows: {', '.join(part for part in done if part)}"]
        return "\n".join([*lines, *(f"  line {line}: {reason}" for line, reason in self.problems)])


def mend(
    rows: Iterable[Row],
    output_jsonl: Path,
    row_format: RowFormat,
    *,
    trim_silence: bool = False,
    target_loudness_lufs: float | None = None,
    drop_lines: set[int] | frozenset[int] = frozenset(),
) -> MendSummary:
    """Writes ``output_jsonl`` and, beside it, ``<stem>_audio/`` with a clip for each row whose audio changed.

    Rows keep their order and their keys; unchanged audio keeps its file. Clips are FLAC of 24 bits at the rate and with
    the channels of the original. Both outputs appear when everything is done.

    Args:
        trim_silence: cut silence at the edges down to SILENCE_MARGIN_SECONDS.
        target_loudness_lufs: bring every clip to this integrated loudness, as far as its peak allows.
        drop_lines: line numbers of rows to leave out.

    Raises:
        UserError: an output exists, cannot be written or would have no rows; or the loudness is out of range.
    """
    check_mending(output_jsonl, target_loudness_lufs)
    audio_folder = _audio_folder(output_jsonl)
    unfinished_jsonl = output_jsonl.with_name(output_jsonl.name + ".tmp")
    unfinished_audio = audio_folder.with_name(audio_folder.name + ".tmp")
    summary = MendSummary()
    try:
        shutil.rmtree(unfinished_audio, ignore_errors=True)  # of a run that was killed
        output_jsonl.parent.mkdir(parents=True, exist_ok=True)
        with unfinished_jsonl.open("w", encoding="utf-8") as stream:
            for row in _kept(rows, drop_lines, summary):
                new_audio = None
                if clip := _mended_clip(row, trim_silence, target_loudness_lufs, summary):
                    name = f"{row.line:06d}.flac"
                    new_audio = f"{audio_folder.name}/{name}"
                    unfinished_audio.mkdir(exist_ok=True)
                    _write_clip(unfinished_audio / name, *clip)
                record = _record(row, row_format, output_jsonl.parent, new_audio)
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        if summary.num_rows == summary.num_dropped:
            raise UserError(f"{output_jsonl} would have no rows: all {summary.num_rows} are to be left out")
        if unfinished_audio.exists():
            unfinished_audio.rename(audio_folder)
        unfinished_jsonl.rename(output_jsonl)
    except OSError as error:
        raise UserError(f"cannot write {output_jsonl}: {error.strerror or error}; name another output") from None
    finally:
        with contextlib.suppress(OSError):  # of a folder that could not be made
            unfinished_jsonl.unlink(missing_ok=True)
        shutil.rmtree(unfinished_audio, ignore_errors=True)
    return summary


def check_mending(output_jsonl: Path, target_loudness_lufs: float | None = None) -> None:
    """Whether ``mend`` can begin; asked before hours of reading.

    Raises:
        UserError: an output exists, or the loudness is out of range.
    """
    low, high = LOUDNESS_RANGE_LUFS
    if target_loudness_lufs is not None and not low <= target_loudness_lufs <= high:
        raise UserError(
            f"a loudness of {target_loudness_lufs:g} LUFS is not speech; choose one from {low:g} to {high:g}"
        )
    for path in (output_jsonl, _audio_folder(output_jsonl)):
        if path.exists():
            raise UserError(f"{path} exists; mended data goes to new files only: choose another name or remove it")


def _audio_folder(output_jsonl: Path) -> Path:
    return output_jsonl.with_name(f"{output_jsonl.stem}_audio")


def _kept(rows: Iterable[Row], drop_lines: set[int] | frozenset[int], summary: MendSummary) -> Iterator[Row]:
    for row in rows:
        summary.num_rows += 1
        if row.line in drop_lines:
            summary.num_dropped += 1
        else:
            yield row


# ----------------------------------------------------------------------------------------------------------- a clip


def _mended_clip(
    row: Row, trim_silence: bool, target_lufs: float | None, summary: MendSummary
) -> tuple[np.ndarray, int] | None:
    """((num_samples, num_channels) float32, rate in Hz), or None where the audio stays as it is."""
    if not trim_silence and target_lufs is None:
        return None
    try:
        samples, rate_hz = _read(row.audio)
    except AudioError as error:
        summary.num_unmended += 1
        if len(summary.problems) < MAX_PROBLEMS:
            summary.problems.append((row.line, str(error)))
        return None
    num_before = len(samples)
    if trim_silence:
        samples = _trimmed(samples, rate_hz)
    gain_db, limited = _gain_db(samples, rate_hz, target_lufs)
    trimmed, scaled = len(samples) < num_before, abs(gain_db) >= MIN_GAIN_DB
    summary.num_limited += limited
    if not trimmed and not scaled:
        return None
    summary.num_changed += 1
    summary.num_trimmed += trimmed
    summary.num_scaled += scaled
    summary.seconds_removed += (num_before - len(samples)) / rate_hz
    samples = samples * np.float32(10 ** (gain_db / 20)) if scaled else samples
    # A file of floats may go beyond full scale, FLAC cannot.
    return samples / max(1.0, float(np.abs(samples).max())), rate_hz


def _read(path: Path | None) -> tuple[np.ndarray, int]:
    import soundfile

    if path is None:
        raise AudioError("no audio file")
    if not path.is_file():
        raise AudioError(f"{path} not found")
    try:
        samples, rate_hz = soundfile.read(str(path), dtype="float32", always_2d=True)
        check_waveform(to_model_rate(samples.mean(axis=1), rate_hz))
    except (soundfile.LibsndfileError, OSError, RuntimeError):
        raise AudioError(f"{path} is not a readable audio file") from None
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from None
    return samples, rate_hz


def _trimmed(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    edges = silent_edges_seconds(to_model_rate(samples.mean(axis=1), rate_hz))
    leading, trailing = (max(0.0, seconds - SILENCE_MARGIN_SECONDS) for seconds in edges)
    if leading + trailing < MIN_TRIM_SECONDS:
        return samples
    return samples[int(leading * rate_hz) : len(samples) - int(trailing * rate_hz)]


def _gain_db(samples: np.ndarray, rate_hz: int, target_lufs: float | None) -> tuple[float, bool]:
    """(gain, whether the peak kept it below what the target asks for)."""
    loudness = None if target_lufs is None else loudness_lufs(to_model_rate(samples.mean(axis=1), rate_hz))
    if loudness is None:  # not asked for, or too short to have one
        return 0.0, False
    allowed = MAX_PEAK_DB - 20 * math.log10(float(np.abs(samples).max()))
    return min(target_lufs - loudness, allowed), target_lufs - loudness > allowed


def _write_clip(path: Path, samples: np.ndarray, rate_hz: int) -> None:
    import soundfile

    try:
        soundfile.write(str(path), samples, rate_hz, format="FLAC", subtype="PCM_24")
    except soundfile.LibsndfileError as error:
        raise UserError(f"cannot write {path.name}: {error.error_string}; is the disk full?") from None


# ------------------------------------------------------------------------------------------------------------ a row


def _record(row: Row, row_format: RowFormat, folder: Path, new_audio: str | None) -> dict[str, Any]:
    """The row's object; a path that would not be found from the output's folder becomes absolute."""
    record = dict(row.raw)
    for key, path in ((row_format.audio_key, row.audio), ("ref_audio", row.ref_audio)):
        if path is not None and path.exists() and (folder / record[key]).resolve() != path.resolve():
            record[key] = str(path.resolve())
    if new_audio is not None:
        record = {key: value for key, value in record.items() if key not in _STALE_KEYS}
        record[row_format.audio_key] = new_audio
    return record
