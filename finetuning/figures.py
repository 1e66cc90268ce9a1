"""Figures of a data set, collected in one pass over its rows: about a hundred bytes of each are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from finetuning.codec import CODEBOOK_SIZE, FRAMES_PER_SECOND, NUM_CODEBOOKS
from finetuning.quality import TEXT_DEFECTS, inspect_text

#: So many rows stand as examples under a finding, the worst first.
MAX_EXAMPLES = 5
#: One row of what is kept, 110 bytes. Missing figures are NaN, missing hashes 0.
ROW_TYPE = np.dtype(
    [
        ("line", np.int64),
        ("speaker", np.int32),
        ("language", np.int16),
        ("num_codec_frames", np.int32),
        ("num_characters", np.int32),
        ("speech_units", np.float32),
        ("text_flags", np.uint16),
        ("text_hash", np.uint64),
        ("codes_hash", np.uint64),
        ("audio_hash", np.uint64),
        ("reference_hash", np.uint64),
        ("reference_seconds", np.float32),
        ("still_share", np.float32),
        ("has_codes", np.bool_),
        ("has_measures", np.bool_),
        ("seconds", np.float32),
        ("peak_db", np.float32),
        ("loudness_lufs", np.float32),
        ("clipped_share", np.float32),
        ("dc_offset", np.float32),
        ("leading_silence_seconds", np.float32),
        ("trailing_silence_seconds", np.float32),
        ("noise_floor_db", np.float32),
        ("snr_db", np.float32),
        ("bandwidth_hz", np.float32),
    ]
)
#: Figures that come from ``measures``, under the same names.
_MEASURES = ROW_TYPE.names[ROW_TYPE.names.index("seconds") :]
#: Rows by which the columns grow (6.6 MB), and frames that are counted at once.
_GROWTH_ROWS, _COUNTED_FRAMES = 65_536, 8192


@dataclass(frozen=True)
class DataFigures:
    """What was collected.

    Attributes:
        columns: (num_rows,) of ROW_TYPE.
        speakers, languages: names by the numbers in the columns.
        code_counts: (16, 2048) int64, how often each entry of each codebook occurs.
        text_examples: defect -> (line, note) of its first rows.
    """

    columns: np.ndarray
    speakers: Sequence[str]
    languages: Sequence[str]
    code_counts: np.ndarray
    text_examples: Mapping[str, list[tuple[int, str]]]

    @property
    def num_rows(self) -> int:
        return len(self.columns)

    def column(self, name: str) -> np.ndarray:
        """(num_rows,); floating-point columns as float64 with NaN where a figure is missing."""
        values = self.columns[name]
        return values.astype(np.float64) if values.dtype.kind == "f" else values

    @property
    def total_seconds(self) -> float:
        return float(np.nansum(self.column("seconds")))

    @property
    def speech_seconds(self) -> np.ndarray:
        """(num_rows,): length without the silence at the edges, where that is known."""
        silence = self.column("leading_silence_seconds") + self.column("trailing_silence_seconds")
        return np.maximum(self.column("seconds") - np.nan_to_num(silence), 0.1)

    @property
    def characters_per_second(self) -> np.ndarray:
        """(num_rows,): letters and digits a second of speech; NaN for texts without any."""
        characters = self.columns["num_characters"]
        return np.where(characters > 0, characters / self.speech_seconds, np.nan)

    def minutes_of_speakers(self) -> np.ndarray:
        """(num_speakers,) in the order of ``speakers``."""
        seconds = np.nan_to_num(self.column("seconds"))
        return np.bincount(self.columns["speaker"], seconds, minlength=len(self.speakers)) / 60

    def minutes_per_speaker(self) -> dict[str, float]:
        """Speaker -> minutes, most first."""
        minutes = self.minutes_of_speakers()
        return {self.speakers[number]: float(minutes[number]) for number in np.argsort(-minutes, kind="stable")}

    def entries_used(self) -> np.ndarray:
        """(16,): entries of each codebook that occur at all."""
        return (self.code_counts > 0).sum(axis=1)

    def entries_effective(self) -> np.ndarray:
        """(16,) float: how many equally frequent entries would be as varied (2 to the power of the entropy)."""
        shares = self.code_counts / np.maximum(self.code_counts.sum(axis=1, keepdims=True), 1)
        logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        return np.exp(-(shares * logs).sum(axis=1))


def collect(
    rows: Iterable[Mapping[str, Any]], *, reference_seconds: Callable[[str], float | None] | None = None
) -> DataFigures:
    """Reads every row once.

    Args:
        rows: mappings with line, text, language, speaker, num_codec_frames, codes ((T, 16) int16 or None), measures
            (of ``quality.measure_clip``, or None) and ref_audio (path or None); what is missing is not checked.
        reference_seconds: length of a reference by its path, such as ``audio.audio_duration_seconds``; asked once for
            each of them. Without it the references' lengths are not checked.
    """
    collector = _Collector(reference_seconds)
    for row in rows:
        collector.add(row)
    return collector.figures()


class _Collector:
    def __init__(self, reference_seconds: Callable[[str], float | None] | None) -> None:
        self._columns = np.zeros(0, ROW_TYPE)
        self._num_rows = 0
        self._speakers: dict[str, int] = {}
        self._languages: dict[str, int] = {}
        self._code_counts = np.zeros(NUM_CODEBOOKS * CODEBOOK_SIZE, np.int64)
        self._uncounted: list[np.ndarray] = []
        self._num_uncounted = 0
        self._text_examples: dict[str, list[tuple[int, str]]] = {}
        self._reference_seconds = lru_cache(maxsize=65_536)(reference_seconds or (lambda path: None))

    def add(self, row: Mapping[str, Any]) -> None:
        if self._num_rows == len(self._columns):
            # Grows in place where the system can: no second copy of the columns.
            self._columns.resize(self._num_rows + _GROWTH_ROWS, refcheck=False)
        record = {"line": row["line"], **self._text_figures(row), **_measured(row.get("measures"))}
        record |= self._code_figures(row.get("codes"), row.get("num_codec_frames") or 0)
        if np.isnan(record["seconds"]) and record["num_codec_frames"]:
            record["seconds"] = record["num_codec_frames"] / FRAMES_PER_SECOND
        reference = row.get("ref_audio")
        seconds = self._reference_seconds(str(reference)) if reference else None
        record["reference_seconds"] = np.nan if seconds is None else seconds
        record["reference_hash"] = _hash(str(reference)) if reference else 0
        self._columns[self._num_rows] = tuple(record[name] for name in ROW_TYPE.names)
        self._num_rows += 1

    def _text_figures(self, row: Mapping[str, Any]) -> dict[str, Any]:
        text, speaker, language = row["text"], row["speaker"], row.get("language") or "Auto"
        num_characters, units, defects = inspect_text(text, language)
        for kind, note in defects.items():
            examples = self._text_examples.setdefault(kind, [])
            if len(examples) < MAX_EXAMPLES:
                examples.append((row["line"], note))
        return {
            "speaker": self._speakers.setdefault(speaker, len(self._speakers)),
            "language": self._languages.setdefault(language, len(self._languages)),
            "num_characters": num_characters,
            "speech_units": units,
            "text_flags": sum(1 << bit for bit, kind in enumerate(TEXT_DEFECTS) if kind in defects),
            "text_hash": _hash(" ".join(text.casefold().split())),
        }

    def _code_figures(self, codes: np.ndarray | None, num_codec_frames: int) -> dict[str, Any]:
        if codes is None:
            figures = {"codes_hash": 0, "still_share": np.nan, "has_codes": False}
            return figures | {"num_codec_frames": num_codec_frames}
        still = (codes[1:] == codes[:-1]).all(axis=1)
        self._uncounted.append(codes)
        self._num_uncounted += len(codes)
        if self._num_uncounted >= _COUNTED_FRAMES:
            self._count_codes()
        return {
            "codes_hash": _hash(np.ascontiguousarray(codes, np.int16).tobytes()),
            "still_share": still.mean() if len(still) else 0.0,
            "has_codes": True,
            "num_codec_frames": len(codes),
        }

    def _count_codes(self) -> None:
        if self._uncounted:
            entries = np.concatenate(self._uncounted) + np.arange(NUM_CODEBOOKS) * CODEBOOK_SIZE
            self._code_counts += np.bincount(entries.ravel(), minlength=self._code_counts.size)
        self._uncounted, self._num_uncounted = [], 0

    def figures(self) -> DataFigures:
        self._count_codes()
        self._columns.resize(self._num_rows, refcheck=False)
        counts = self._code_counts.reshape(NUM_CODEBOOKS, CODEBOOK_SIZE)
        return DataFigures(self._columns, list(self._speakers), list(self._languages), counts, self._text_examples)


def _hash(value: str | bytes) -> int:
    return hash(value) & 0xFFFF_FFFF_FFFF_FFFF or 1


def _measured(measures: Any) -> dict[str, Any]:
    """The figures of one clip; a foreign ``measures`` column gives none."""
    if not isinstance(measures, Mapping):
        measures = {}
    figures = {name: _number(measures.get(name)) for name in _MEASURES}
    try:
        audio_hash = int(measures["audio_hash"], 16) & 0xFFFF_FFFF_FFFF_FFFF
    except (KeyError, TypeError, ValueError):
        audio_hash = 0
    return figures | {"audio_hash": audio_hash, "has_measures": not np.isnan(figures["snr_db"])}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else np.nan
