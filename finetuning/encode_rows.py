"""Raw rows to rows with codes: resumable, shared by processes, the same bytes however it was made.

Codes are reused as long as they belong to the same audio file (size, modification time) and the same codec; each row
says so under ``codes_source``. What was measured of the clip stands under ``measures`` (see ``quality``).
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.audio import audio_duration_seconds
from finetuning.codec import FRAMES_PER_SECOND, codec_fingerprint
from finetuning.console import say
from finetuning.encoding import CHUNK_ROWS, ClipEncoder, EncodedChunk, EncodedClip, Progress
from finetuning.errors import UserError
from finetuning.manifest import (
    Row,
    RowError,
    RowFormat,
    Tally,
    check_speaker_names,
    parse_row,
    read_lines,
    read_rows,
)
from finetuning.processes import Processes
from finetuning.workspace import Digest, Workspace, was_forced

#: A place in a file (byte of a JSONL, row of a chunk) and the file's number share one integer.
_PLACES_PER_FILE = 1 << 44


def encoded_path(raw_jsonl: Path, max_rows: int | None = None) -> Path:
    """Where the rows with codes of a raw file are kept: beside it. A part of the file has a name of its own."""
    part = f".first-{max_rows}" if max_rows else ""
    return raw_jsonl.with_name(f"{raw_jsonl.stem}{part}.encoded.jsonl")


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
    num_workers: int = 0,
    force: bool = False,
    processes: Processes | None = None,
) -> Path:
    """Writes ``output_jsonl``: the rows of ``input_jsonl`` in their order, each with ``audio_codes``.

    Args:
        max_rows: only the first so many usable rows.
        num_workers: processes that decode audio for this one.
        force: start over, and encode again what has codes from an earlier run.
        processes: those that share the work; all of them call this and return when the file is there.

    Raises:
        UserError: no rows, too many bad rows, clashing speakers, or an output that cannot be written.
    """
    if output_jsonl.resolve() == input_jsonl.resolve():
        raise UserError(f"{output_jsonl} is the input; name another --output_jsonl")
    processes = processes or Processes()
    starts_over, force = force, force or was_forced(output_jsonl)
    job = _EncodeJob(input_jsonl, output_jsonl, codec_fingerprint(codec_folder), row_format, setting, max_rows, force)
    workspace = Workspace(output_jsonl, job.scan(), max_rows)
    if starts_over:
        workspace.discard(processes)
    elif not force and workspace.is_current():
        return output_jsonl
    elif output_jsonl != encoded_path(input_jsonl, max_rows):  # that name is nobody else's
        workspace.check_is_ours("--mode encode")
    encoder = ClipEncoder(codec_folder, device, num_workers, max_clips_per_batch)
    with workspace.opened():
        job.encode_missing(workspace, encoder, processes)
        processes.wait()
        if processes.is_main:
            workspace.assemble()
        processes.wait()
    return output_jsonl


@dataclass(frozen=True)
class _LineChunk:
    """CHUNK_ROWS consecutive lines: the usable rows among them, and the others as they will be listed."""

    number: int
    rows: list[Row]
    rejected: list[dict[str, Any]]


@dataclass
class _EncodeJob:
    input_jsonl: Path
    output_jsonl: Path
    codec_id: str
    row_format: RowFormat
    setting: str
    max_rows: int | None
    force: bool
    rows_of_chunks: list[int] = field(default_factory=list)  # usable ones
    num_lines: int = 0

    def scan(self) -> list[str]:
        """Checks all rows before hours are spent on encoding some; returns each chunk's digest."""
        tally, speakers, digests = Tally(), {}, []
        for chunk in self.chunks():
            digests.append(self._digest(chunk))
            self.rows_of_chunks.append(len(chunk.rows))
            tally.add(len(chunk.rows), chunk.rejected)
            for row in chunk.rows:
                speakers.setdefault(row.speaker, (self.input_jsonl, row.line))
        tally.check_share()
        check_speaker_names(speakers)
        self.num_lines = tally.num_good + tally.num_bad
        return digests

    def chunks(self) -> Iterator[_LineChunk]:
        """The file, chunk by chunk, up to ``max_rows`` usable rows."""
        number, num_usable = 0, 0
        rows: list[Row] = []
        rejected: list[dict[str, Any]] = []
        for line_number, line in read_lines(self.input_jsonl, self.setting):
            if num_usable == self.max_rows:
                break
            if len(rows) + len(rejected) == CHUNK_ROWS:
                yield _LineChunk(number, rows, rejected)
                number, rows, rejected = number + 1, [], []
            try:
                rows.append(parse_row(line, line_number, self.input_jsonl.parent, self.row_format, needs_codes=False))
                num_usable += 1
            except RowError as error:
                rejected.append(self._rejected(line_number, str(error), line.rstrip("\n")))
        yield _LineChunk(number, rows, rejected)

    def encode_missing(self, workspace: Workspace, encoder: ClipEncoder, processes: Processes) -> None:
        """Encodes this process's chunks that have no file yet."""
        mine = workspace.missing(range(processes.index, len(workspace.digests), processes.count))
        if not mine:
            return
        files = [encoded_path(self.input_jsonl), self.output_jsonl, *workspace.leftovers()]
        earlier = EarlierCodes([] if self.force else files)
        num_encoded = num_stale = 0
        tally = Tally()

        def wanted() -> Iterator[tuple[_LineChunk, list[Path]]]:
            remaining = set(mine)
            for chunk in self.chunks():
                if chunk.number in remaining:
                    yield chunk, [row.audio for row in chunk.rows if self._is_wanted(row, earlier)]

        total = sum(self.rows_of_chunks[number] for number in mine)
        with Progress(total, is_shown=processes.is_main) as progress:
            for chunk, clips in encoder.encode(wanted(), progress):
                todo = [row for row in chunk.rows if self._is_wanted(row, earlier)]
                results = {row.line: clip for row, clip in zip(todo, clips, strict=True)}
                num_stale += sum(row.codes is not None or earlier.knows_path(row.audio) for row in todo)
                num_encoded += sum(clip.problem is None for clip in clips)
                finished = self._finish(chunk, results, earlier)
                workspace.save(chunk.number, finished)
                progress.advance(len(chunk.rows) - len(todo), 0.0)
                tally.add(len(finished.records), finished.rejected)
                tally.check_share(self.num_lines)  # does not wait for the rest where no rest could help
        if num_stale and not self.force:
            say(f"{num_stale} clips or their codec changed since they were encoded; they were encoded again")
        if num_encoded:
            say(f"encoded {num_encoded} clips")

    def _is_wanted(self, row: Row, earlier: EarlierCodes) -> bool:
        return must_encode(row, self.codec_id, self.force) and not earlier.knows(source_of(row, self.codec_id))

    def _finish(self, chunk: _LineChunk, results: dict[int, EncodedClip], earlier: EarlierCodes) -> EncodedChunk:
        records, codes, rejected = [], [], list(chunk.rejected)
        for row in chunk.rows:
            record = {key: value for key, value in row.raw.items() if key != "audio_codes"}
            record = self._with_paths(record, row)
            clip = results.get(row.line)
            if clip is not None and clip.problem:
                line = json.dumps(row.raw, ensure_ascii=False)
                rejected.append(self._rejected(row.line, f"{row.audio}: {clip.problem}", line))
                continue
            if clip is not None:
                source = dataclasses.asdict(source_of(row, self.codec_id))
                record |= {"measures": clip.measures, "codes_source": source}
                row_codes = clip.codes
            elif must_encode(row, self.codec_id, self.force):
                row_codes, kept = earlier.find(source_of(row, self.codec_id))
                record |= kept
            else:
                row_codes = row.codes
            records.append(record)
            codes.append(row_codes)
        return EncodedChunk(records, codes, sorted(rejected, key=lambda bad: bad["line"]))

    def _with_paths(self, record: dict[str, Any], row: Row) -> dict[str, Any]:
        """A path that would not be found from the output's folder becomes absolute."""
        for key, path in ((self.row_format.audio_key, row.audio), ("ref_audio", row.ref_audio)):
            if path is not None and path.exists() and not _same_file(self.output_jsonl.parent / record[key], path):
                record[key] = str(path.resolve())
        return record

    def _rejected(self, line: int, reason: str, text: str) -> dict[str, Any]:
        return {"file": str(self.input_jsonl), "line": line, "reason": reason, "row": text}

    def _digest(self, chunk: _LineChunk) -> str:
        parts = [self.codec_id, self.row_format, self.force, self.input_jsonl, self.output_jsonl.parent.resolve()]
        digest = Digest(*parts)
        for row in chunk.rows:
            raw = {key: value for key, value in row.raw.items() if key != "audio_codes"}
            digest.add(row.line, raw, b"" if row.codes is None else row.codes.tobytes(), row.ref_audio)
            if must_encode(row, self.codec_id, self.force):
                digest.add(source_of(row, self.codec_id))
        digest.add(chunk.rejected)
        return digest.hex()


def _same_file(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


# --------------------------------------------------------------------------------------------- what codes belong to


@dataclass(frozen=True)
class Source:
    """What a clip's codes were made of."""

    audio: str
    num_bytes: int
    modified_ns: int
    codec: str


def source_of(row: Row, codec_id: str) -> Source:
    """The row's audio file as it is now."""
    status = row.audio.stat()
    return Source(str(row.audio.resolve()), status.st_size, status.st_mtime_ns, codec_id)


def must_encode(row: Row, codec_id: str, force: bool = False) -> bool:
    """Codes that came with a row are taken as they are, unless they say what they were made of and that has changed."""
    if row.codes is None:
        return True
    if row.audio is None or not row.audio.is_file():
        return False
    return force or _is_stale(row, codec_id)


def _is_stale(row: Row, codec_id: str) -> bool:
    recorded, now = row.raw.get("codes_source"), dataclasses.asdict(source_of(row, codec_id))
    # The path may differ: a folder that was moved with its times is the same.
    return isinstance(recorded, dict) and any(recorded.get(key) != now[key] for key in now if key != "audio")


class EarlierCodes:
    """Codes of earlier runs by what they were made of; 24 bytes a clip are in memory, the codes stay in their files.

    Args:
        files: results (JSONL) and chunk files; those that are missing are passed over.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = [file for file in dict.fromkeys(files) if file.is_file()]
        keys, places, paths = array("q"), array("q"), array("q")
        for number, file in enumerate(self._files):
            for position, source in recorded_sources(file):
                keys.append(hash(source))
                places.append(number * _PLACES_PER_FILE + position)
                paths.append(hash(source.audio))
        order = np.argsort(keys, kind="stable")
        self._keys, self._places = np.asarray(keys, np.int64)[order], np.asarray(places, np.int64)[order]
        self._paths = np.unique(np.asarray(paths, np.int64))

    def knows_path(self, audio: Path) -> bool:
        """Whether this file was encoded before, as it was then."""
        return _is_in(hash(str(audio.resolve())), self._paths)

    def knows(self, source: Source) -> bool:
        """Whether there are codes of exactly this."""
        return _is_in(hash(source), self._keys)

    def find(self, source: Source) -> tuple[np.ndarray, dict[str, Any]]:
        """(codes, the row's keys that describe them) of a source that is known."""
        place = int(self._places[np.searchsorted(self._keys, hash(source))])
        number, position = divmod(place, _PLACES_PER_FILE)
        record, codes = _read_row(self._files[number], position)
        assert _recorded_source(record) == source
        return codes, {key: record[key] for key in ("measures", "codes_source") if key in record}


def _is_in(key: int, sorted_keys: np.ndarray) -> bool:
    at = np.searchsorted(sorted_keys, key)
    return bool(at < len(sorted_keys) and sorted_keys[at] == key)


def recorded_sources(file: Path) -> Iterator[tuple[int, Source]]:
    """(place, source) of every row of a result or a chunk file that says its source."""
    if file.suffix == ".safetensors":
        for position, record in enumerate(EncodedChunk.load(file).records):
            if source := _recorded_source(record):
                yield position, source
        return
    with file.open("rb") as stream:
        offset = 0
        for line in stream:
            if source := _source_in(line):
                yield offset, source
            offset += len(line)


def _source_in(line: bytes) -> Source | None:
    """The source that a line records; the codes, which are its larger part and stand last, are not parsed."""
    head, codes, _ = line.rpartition(b', "audio_codes": [[')
    try:
        return _recorded_source(json.loads(head + b"}" if codes else line))
    except ValueError:
        return None


def _read_row(file: Path, position: int) -> tuple[dict[str, Any], np.ndarray]:
    if file.suffix == ".safetensors":
        chunk = EncodedChunk.load(file)
        return chunk.records[position], chunk.codes[position]
    with file.open("rb") as stream:
        stream.seek(position)
        record = json.loads(stream.readline())
    return record, np.asarray(record["audio_codes"], dtype=np.int16)


def _recorded_source(record: Any) -> Source | None:
    try:
        return Source(**record["codes_source"])
    except (TypeError, KeyError):
        return None


# ------------------------------------------------------------------------------------------------------------- info


def dataset_info(jsonl: Path, row_format: RowFormat) -> dict[str, Any]:
    """What a JSONL holds: num_samples, num_with_codes, num_bad, hours, seconds (min, median, max), languages, speakers.

    ``languages`` and ``speakers`` map names to numbers of rows; lengths come from codes, else from the audio's header.
    """
    tally = Tally()
    languages: Counter[str] = Counter()
    speakers: Counter[str] = Counter()
    seconds, num_with_codes = [], 0
    for row in read_rows(jsonl, "--input_jsonl", row_format, tally, needs_codes=False):
        num_with_codes += row.codes is not None
        languages[row.language] += 1
        speakers[row.speaker] += 1
        length = audio_duration_seconds(row.audio) if row.codes is None else len(row.codes) / FRAMES_PER_SECOND
        seconds.append(length or 0.0)
    lengths = {"min": min(seconds), "median": float(np.median(seconds)), "max": max(seconds)} if seconds else {}
    first_bad = [f"line {bad['line']}: {bad['reason']}" for bad in tally.first[:1]]
    return {
        "file": str(jsonl),
        "num_samples": tally.num_good,
        "num_with_codes": num_with_codes,
        "num_bad": tally.num_bad,
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
