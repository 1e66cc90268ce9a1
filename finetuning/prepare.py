"""Raw rows to rows with codes: one engine for ``data_processing.py --mode encode`` and for ``train.py``.

Codes are reused as long as they belong to the same audio file (path, size, modification time) and the same codec; each
encoded row says so under ``codes_source``. Work in progress is journalled, so an interrupted run goes on where it
stopped, and the finished file appears under its name in one step.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from finetuning.audio import SAMPLE_RATE_HZ, AudioError, audio_duration_seconds, load_audio
from finetuning.codec import FRAMES_PER_SECOND, Codec
from finetuning.console import say
from finetuning.errors import UserError
from finetuning.manifest import (
    MAX_CODEC_FRAMES,
    Rejections,
    Row,
    RowFormat,
    check_speaker_names,
    read_rows,
)

#: Seconds of audio in one batch of the codec; on a GPU of 16 GB this stays far below its memory.
MAX_SECONDS_PER_BATCH = 120.0


def encoded_path(raw_jsonl: Path, max_rows: int | None = None) -> Path:
    """Where the rows with codes of a raw file are kept: beside it. A part of the file has a name of its own."""
    part = f".first-{max_rows}" if max_rows else ""
    return raw_jsonl.with_name(f"{raw_jsonl.stem}{part}.encoded.jsonl")


def rejected_path(output_jsonl: Path) -> Path:
    """Where the rows that could not be encoded are listed."""
    return output_jsonl.with_name(f"{output_jsonl.stem}.rejected.jsonl")


def needs_encoding(jsonl: Path, setting: str, codec_folder: Path, row_format: RowFormat) -> bool:
    """Whether any usable row of the file lacks codes or has codes of another clip or codec."""
    codec_id, rejections = None, Rejections(jsonl)
    for row in read_rows(jsonl, setting, row_format, rejections, needs_codes=False):
        if row.codes is None:
            return True
        recorded = row.raw.get("codes_source")
        if not isinstance(recorded, dict):
            continue
        codec_id = codec_id or codec_fingerprint(codec_folder)
        if _must_encode(row, codec_id):
            return True
        if recorded.get("codec") != codec_id:
            raise UserError(
                f"{setting}: {jsonl} line {row.line}: its codes were made by another codec and its audio is gone; "
                "name that codec in TOKENIZER_PATH, or bring the audio back"
            )
    # A raw row that cannot be used is for the encoder to report: it knows more than "no codes".
    return any(_is_raw(line) for _, _, line in rejections.rows)


def _is_raw(line: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.get("audio_codes") is None


def _must_encode(row: Row, codec_id: str, force: bool = False) -> bool:
    """Codes that came with a row are taken as they are, unless they say what they were made of and that has changed."""
    if row.codes is None:
        return True
    if row.audio is None or not row.audio.is_file():
        return False
    return force or _is_stale(row, codec_id)


def _is_stale(row: Row, codec_id: str) -> bool:
    recorded, now = row.raw.get("codes_source"), vars(_source(row, codec_id))
    # The path may differ: a folder that was moved with its times is the same.
    return isinstance(recorded, dict) and any(recorded.get(key) != now[key] for key in now if key != "audio")


def encode_jsonl(
    input_jsonl: Path,
    output_jsonl: Path,
    codec_folder: Path,
    row_format: RowFormat,
    *,
    device: str = "cpu",
    setting: str = "TRAIN_JSONL",
    max_rows: int | None = None,
    max_clips_per_batch: int = 32,
    force: bool = False,
) -> Path:
    """Writes ``output_jsonl``: the rows of ``input_jsonl`` in their order, each with ``audio_codes``.

    Args:
        force: encode again what has codes from an earlier run.

    Raises:
        UserError: no rows, too many bad rows, clashing speakers, or an output that cannot be written.
    """
    codec_id = codec_fingerprint(codec_folder)
    journal = output_jsonl.with_name(output_jsonl.name + ".partial")
    rejections = Rejections(input_jsonl)
    read = {"needs_codes": False, "max_rows": max_rows}
    # Only rows to encode are kept; the others are read a second time when the result is written.
    wanted, had_codes, speakers = [], set(), {}
    for row in read_rows(input_jsonl, setting, row_format, rejections, **read):
        speakers.setdefault(row.speaker, (input_jsonl, row.line))
        if _must_encode(row, codec_id, force):
            had_codes |= {row.line} if row.codes is not None else set()
            wanted.append(replace(row, codes=None, raw={**row.raw, "audio_codes": None}))
    rejections.check_share()  # before hours are spent on encoding the rest
    check_speaker_names(speakers)
    if force:
        journal.unlink(missing_ok=True)
    known = {} if force else _known_codes((encoded_path(input_jsonl), output_jsonl, journal), codec_id)
    missing = [row for row in wanted if _source(row, codec_id).key not in known]
    before = {record["codes_source"]["audio"] for record in _records((output_jsonl,))}
    num_stale = sum(row.line in had_codes or str(row.audio.resolve()) in before for row in missing)
    if num_stale and not force:
        say(f"{num_stale} clips or their codec changed since they were encoded; they are encoded again")
    codec = Codec(codec_folder, device) if missing else None
    try:
        if codec:
            known |= _encode_missing(missing, journal, codec, codec_id, rejections, max_clips_per_batch)
        rejections.num_good -= sum(_source(row, codec_id).key not in known for row in wanted)
        rejections.check(rejected_path(output_jsonl))
        rows = read_rows(input_jsonl, setting, row_format, Rejections(input_jsonl), **read)
        encoded = {row.line: _source(row, codec_id) for row in wanted}
        _write_rows(rows, encoded, known, output_jsonl, row_format)
    except OSError as error:
        raise UserError(
            f"cannot write {output_jsonl}: {error.strerror}; use another --output_jsonl or folder"
        ) from None
    journal.unlink(missing_ok=True)
    return output_jsonl


# --------------------------------------------------------------------------------------------- what codes belong to


@dataclass(frozen=True)
class Source:
    """What a clip's codes were made of."""

    audio: str
    num_bytes: int
    modified_ns: int
    codec: str

    @property
    def key(self) -> tuple:
        return (self.audio, self.num_bytes, self.modified_ns, self.codec)


def codec_fingerprint(folder: Path) -> str:
    """A short hash of the codec's configuration and weights."""
    digest = hashlib.sha256()
    for file in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def _source(row: Row, codec_id: str) -> Source:
    status = row.audio.stat()
    return Source(str(row.audio.resolve()), status.st_size, status.st_mtime_ns, codec_id)


def _known_codes(files: tuple[Path, ...], codec_id: str) -> dict[tuple, np.ndarray]:
    """Codes of earlier runs by source. A line cut off by a kill is skipped: its clip is encoded again."""
    known = {}
    for record in _records(files):
        source = Source(**record["codes_source"])
        if source.codec == codec_id:
            known[source.key] = np.asarray(record["audio_codes"], dtype=np.int16)
    return known


def _records(files: tuple[Path, ...]) -> Iterator[dict]:
    for file in files:
        if not file.is_file():
            continue
        with file.open(encoding="utf-8") as stream:
            for line in stream:
                try:
                    record = json.loads(line)
                    Source(**record["codes_source"])
                except (ValueError, TypeError, KeyError):
                    continue
                yield record


# --------------------------------------------------------------------------------------------------------- encoding


def _encode_missing(
    rows: list[Row], journal: Path, codec: Codec, codec_id: str, rejections: Rejections, max_clips: int
) -> dict[tuple, np.ndarray]:
    """Encodes rows in batches of similar length, journalling each batch; unusable clips become rejections."""
    rows = sorted(rows, key=lambda row: audio_duration_seconds(row.audio) or 0.0)
    encoded: dict[tuple, np.ndarray] = {}
    journal.parent.mkdir(parents=True, exist_ok=True)
    progress = tqdm(total=len(rows), desc="encode", unit="clip", disable=None)  # off where there is no terminal
    with journal.open("a", encoding="utf-8") as stream, progress:
        stream.write("\n")  # closes a line that a kill may have cut off
        for batch, waveforms in _batches(rows, rejections, progress, max_clips):
            sources = [_source(row, codec_id) for row in batch]
            for source, codes in zip(sources, codec.encode(waveforms), strict=True):
                encoded[source.key] = codes
                record = {"audio_codes": codes.tolist(), "codes_source": vars(source)}
                stream.write(json.dumps(record) + "\n")
            stream.flush()
            progress.update(len(batch))
    say(f"encoded {len(encoded)} clips")
    return encoded


def _batches(
    rows: list[Row], rejections: Rejections, progress: tqdm, max_clips: int
) -> Iterator[tuple[list[Row], list[np.ndarray]]]:
    batch: list[Row] = []
    waveforms: list[np.ndarray] = []
    for row in rows:
        try:
            waveform = _load_clip(row.audio)
        except AudioError as error:
            rejections.add(row.line, f"{row.audio}: {error}", json.dumps(row.raw, ensure_ascii=False))
            progress.update(1)
            continue
        longest = max([len(waveform), *map(len, waveforms)]) / SAMPLE_RATE_HZ
        if len(batch) == max_clips or (batch and longest * (len(batch) + 1) > MAX_SECONDS_PER_BATCH):
            yield batch, waveforms
            batch, waveforms = [], []
        batch.append(row)
        waveforms.append(waveform)
    if batch:
        yield batch, waveforms


def _load_clip(path: Path) -> np.ndarray:
    seconds = audio_duration_seconds(path) or 0.0
    if seconds * FRAMES_PER_SECOND > MAX_CODEC_FRAMES:
        raise AudioError(f"{seconds:.0f} s long, more than the {MAX_CODEC_FRAMES} frames that can be generated; cut it")
    return load_audio(path)


def _write_rows(
    rows: Iterable[Row], encoded: dict[int, Source], known: dict, output_jsonl: Path, row_format: RowFormat
) -> None:
    """Rows in their order; a path that would not be found from the output's folder becomes absolute.

    Args:
        encoded: line -> source of the rows whose codes come from ``known``; those without codes there are left out.
    """
    output_jsonl.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output_jsonl.with_name(output_jsonl.name + ".tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as stream:
            for row in rows:
                record, source = dict(row.raw), encoded.get(row.line)
                if source is not None and source.key not in known:
                    continue
                for key, path in ((row_format.audio_key, row.audio), ("ref_audio", row.ref_audio)):
                    if path is not None and path.exists() and not _same_file(output_jsonl.parent / record[key], path):
                        record[key] = str(path.resolve())
                if source is not None:
                    record |= {"audio_codes": known[source.key].tolist(), "codes_source": vars(source)}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        unfinished.rename(output_jsonl)
    finally:
        unfinished.unlink(missing_ok=True)


def _same_file(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


# ------------------------------------------------------------------------------------------------------------- info


def dataset_info(jsonl: Path, row_format: RowFormat) -> dict[str, Any]:
    """What a JSONL holds: num_samples, num_with_codes, num_bad, hours, seconds (min, median, max), languages, speakers.

    ``languages`` and ``speakers`` map names to numbers of rows; lengths come from codes, else from the audio's header.
    """
    rejections = Rejections(jsonl)
    languages: Counter[str] = Counter()
    speakers: Counter[str] = Counter()
    seconds, num_with_codes = [], 0
    for row in read_rows(jsonl, "--input_jsonl", row_format, rejections, needs_codes=False):
        num_with_codes += row.codes is not None
        languages[row.language] += 1
        speakers[row.speaker] += 1
        length = audio_duration_seconds(row.audio) if row.codes is None else len(row.codes) / FRAMES_PER_SECOND
        seconds.append(length or 0.0)
    lengths = {"min": min(seconds), "median": float(np.median(seconds)), "max": max(seconds)} if seconds else {}
    first_bad = [f"line {number}: {reason}" for number, reason, _ in rejections.rows[:1]]
    return {
        "file": str(jsonl),
        "num_samples": rejections.num_good,
        "num_with_codes": num_with_codes,
        "num_bad": len(rejections.rows),
        **({"first_bad": first_bad[0]} if first_bad else {}),
        "hours": sum(seconds) / 3600,
        "seconds": lengths,
        "languages": dict(languages.most_common()),
        "speakers": dict(speakers.most_common()),
    }


def format_info(info: dict[str, Any]) -> str:
    """``dataset_info`` as lines for a terminal."""
    lines = [
        f"{info['file']}: {info['num_samples']} rows ({info['num_with_codes']} with codes), "
        f"{info['hours'] * 60:.1f} minutes"
    ]
    if info["seconds"]:
        lengths = info["seconds"]
        lines.append(
            f"  length: {lengths['min']:.1f} to {lengths['max']:.1f} s, half of them under {lengths['median']:.1f} s"
        )
    for name in ("speakers", "languages"):
        shown = [f"{key} ({count})" for key, count in list(info[name].items())[:10]]
        more = ", …" if len(info[name]) > 10 else ""
        lines.append(f"  {name}: {', '.join(shown)}{more}")
    if info["num_bad"]:
        lines.append(f"  {info['num_bad']} bad rows, the first in {info['first_bad']}")
    return "\n".join(lines)
