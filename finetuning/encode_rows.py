"""Raw rows to rows with codes: resumable, shared by processes, the same bytes however it was made.

Codes are reused as long as they belong to the same audio file (size, modification time) and the same codec; each row
says so under ``codes_source``. What was measured of the clip stands under ``measures`` (see ``quality``).

Altered copies (see ``augment``) stand behind the row of their clip, with ``augmentation``; their codes are reused as
long as they belong to the same file, codec and recipe.
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
from finetuning.augment import Augmentation, AugmentedClip, Recipe
from finetuning.codec import FRAMES_PER_SECOND, codec_fingerprints
from finetuning.console import say
from finetuning.encoding import CHUNK_ROWS, Clip, ClipEncoder, EncodedChunk, EncodedClip, Progress
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


def encoded_path(raw_jsonl: Path, max_rows: int | None = None, *, is_augmented: bool = False) -> Path:
    """Where the rows with codes of a raw file are kept: beside it. A part of the file has a name of its own, and so
    have rows with altered copies."""
    part = f".first-{max_rows}" if max_rows else ""
    kind = "augmented" if is_augmented else "encoded"
    return raw_jsonl.with_name(f"{raw_jsonl.stem}{part}.{kind}.jsonl")


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
    augmentation: Augmentation | None = None,
) -> Path:
    """Writes ``output_jsonl``: the rows of ``input_jsonl`` in their order, each with ``audio_codes``.

    Args:
        max_rows: only the first so many usable rows; copies do not count.
        num_workers: processes that decode audio for this one.
        force: start over, and encode again what has codes from an earlier run.
        processes: those that share the work; all of them call this and return when the file is there.
        augmentation: makes copies of all rows that have an audio file; those that stand in ``input_jsonl`` give way.
            Without it the latter stay, as long as their codes are not stale: they cannot be made again.

    Raises:
        UserError: no rows, too many bad rows, clashing speakers, no row to make a copy of, or an output that cannot be
            written.
    """
    if output_jsonl.resolve() == input_jsonl.resolve():
        raise UserError(f"{output_jsonl} is the input; name another --output_jsonl")
    processes = processes or Processes()
    starts_over, force = force, force or was_forced(output_jsonl)
    codec_ids = codec_fingerprints(codec_folder)
    job = _EncodeJob(input_jsonl, output_jsonl, codec_ids, row_format, setting, max_rows, force, augmentation)
    workspace = Workspace(output_jsonl, job.scan(), max_rows)
    job.check_copies(is_shown=processes.is_main)
    if starts_over:
        workspace.discard(processes)
    elif not force and workspace.is_current():
        return output_jsonl
    elif output_jsonl != job.own_output or augmentation is not None:  # else that name is nobody else's
        workspace.check_is_ours("--mode encode or prepare_data.py")
    encoder = ClipEncoder(codec_folder, device, num_workers, max_clips_per_batch)
    with workspace.opened():
        job.encode_missing(workspace, encoder, processes)
        processes.wait()
        if processes.is_main:
            workspace.assemble()
        processes.wait()
    return output_jsonl


@dataclass
class _LineChunk:
    """CHUNK_ROWS consecutive lines: the usable rows among them, and the others as they will be listed. Copies of the
    input that are left out do not count."""

    number: int
    rows: list[Row] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    num_copies_left_out: int = 0


@dataclass(frozen=True)
class _Part:
    """A row of the result whose codes are made or found: a clip (number 0, no recipe) or an altered copy (from 1)."""

    line: int
    audio: Path
    source: Source
    number: int = 0
    recipe: Recipe | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.line, self.number

    @property
    def clip(self) -> Clip:
        return self.audio if self.recipe is None else AugmentedClip(self.audio, self.recipe)


@dataclass
class _EncodeJob:
    input_jsonl: Path
    output_jsonl: Path
    codec_ids: tuple[str, str]  # see codec_fingerprints
    row_format: RowFormat
    setting: str
    max_rows: int | None
    force: bool
    augmentation: Augmentation | None = None
    parts_of_chunks: list[int] = field(default_factory=list)  # rows of the result, as far as they turn out usable
    num_lines: int = 0
    num_without_audio: int = 0  # so without copies
    num_copies_left_out: int = 0  # of those in the input

    @property
    def codec_id(self) -> str:
        return self.codec_ids[0]

    @property
    def own_output(self) -> Path:
        """The name of the result that belongs to nobody else."""
        return encoded_path(self.input_jsonl, self.max_rows, is_augmented=self.augmentation is not None)

    def scan(self) -> list[str]:
        """Checks all rows before hours are spent on encoding some; returns each chunk's digest."""
        tally, speakers, digests = Tally(), {}, []
        for chunk in self.chunks():
            digests.append(self._digest(chunk))
            nums_copies = [len(self._copies(row)) for row in chunk.rows]
            self.parts_of_chunks.append(len(chunk.rows) + sum(nums_copies))
            self.num_without_audio += nums_copies.count(0)
            self.num_copies_left_out += chunk.num_copies_left_out
            tally.add(len(chunk.rows), chunk.rejected)
            for row in chunk.rows:
                speakers.setdefault(row.speaker, (self.input_jsonl, row.line))
        tally.check_share()
        check_speaker_names(speakers)
        self.num_lines = tally.num_good + tally.num_bad
        return digests

    def check_copies(self, is_shown: bool) -> None:
        """Says which copies there are not.

        Raises:
            UserError: there can be none at all.
        """
        left_out = f"{self.num_copies_left_out} augmented copies that stand in {self.input_jsonl} are left out"
        if self.num_copies_left_out and is_shown:
            reason = "they are made anew" if self.augmentation else "their clips or codec changed since"
            say(f"{left_out}: {reason}")
        if self.augmentation is None or self.num_without_audio == 0:
            return
        if self.num_without_audio == sum(self.parts_of_chunks):
            raise UserError(
                f"AUGMENT_COPIES: copies are made of audio files, and no row of {self.input_jsonl} has one. Rows of a "
                "dataset that embeds its clips get files with SAVE_AUDIO=true (data_processing.py --mode prepare); "
                "AUGMENT_COPIES=0 takes the rows as they are"
            )
        if is_shown:
            say(f"AUGMENT_COPIES: {self.num_without_audio} rows have no audio file, so there are no copies of them")

    def chunks(self) -> Iterator[_LineChunk]:
        """The file, chunk by chunk, up to ``max_rows`` usable rows."""
        number, num_usable = 0, 0
        chunk = _LineChunk(number)
        for line_number, line in read_lines(self.input_jsonl, self.setting):
            if num_usable == self.max_rows:
                break
            if len(chunk.rows) + len(chunk.rejected) == CHUNK_ROWS:
                yield chunk
                number += 1
                chunk = _LineChunk(number)
            try:
                row = parse_row(line, line_number, self.input_jsonl.parent, self.row_format, needs_codes=False)
            except RowError as error:
                chunk.rejected.append(self._rejected(line_number, str(error), line.rstrip("\n")))
                continue
            if row.is_copy and not self._may_stay(row):
                chunk.num_copies_left_out += 1
                continue
            chunk.rows.append(row)
            num_usable += 1
        yield chunk

    def _may_stay(self, copy: Row) -> bool:
        """Whether a copy of the input is a row of the result: its file is the original's, so it is never encoded."""
        return self.augmentation is None and not must_encode(copy, self.codec_ids)

    def encode_missing(self, workspace: Workspace, encoder: ClipEncoder, processes: Processes) -> None:
        """Encodes this process's chunks that have no file yet."""
        mine = workspace.missing(range(processes.index, len(workspace.digests), processes.count))
        if not mine:
            return
        earlier = EarlierCodes([] if self.force else self._files_with_codes(workspace), self.codec_ids)
        num_encoded = num_copies = num_stale = 0
        unmade: list[str] = []
        tally = Tally()

        def wanted() -> Iterator[tuple[tuple[_LineChunk, list[_Part]], list[Clip]]]:
            remaining = set(mine)
            for chunk in self.chunks():
                if chunk.number in remaining:
                    todo = self._to_encode(chunk, earlier)
                    yield (chunk, todo), [part.clip for part in todo]

        total = sum(self.parts_of_chunks[number] for number in mine)
        with Progress(total, is_shown=processes.is_main) as progress:
            for (chunk, todo), clips in encoder.encode(wanted(), progress):
                results = {part.key: clip for part, clip in zip(todo, clips, strict=True)}
                had_codes = {row.line for row in chunk.rows if row.codes is not None}
                originals = [part for part in todo if part.recipe is None]
                num_stale += sum(part.line in had_codes or earlier.knows_path(part.audio) for part in originals)
                num_encoded += sum(clip.problem is None for clip in clips)
                num_copies += sum(clip.augmentation is not None for clip in clips)
                finished = self._finish(chunk, results, earlier, unmade)
                workspace.save(chunk.number, finished)
                progress.advance(self.parts_of_chunks[chunk.number] - len(todo), 0.0)
                tally.add(finished.num_originals, finished.rejected)
                tally.check_share(self.num_lines)  # does not wait for the rest where no rest could help
        if num_stale and not self.force:
            say(f"{num_stale} clips or their codec changed since they were encoded; they were encoded again")
        if num_encoded:
            say(f"encoded {num_encoded} clips" + (f", {num_copies} of them augmented copies" if num_copies else ""))
        if unmade:
            say(f"{len(unmade)} augmented copies could not be made, the first: {unmade[0]}")

    def _files_with_codes(self, workspace: Workspace) -> list[Path]:
        """Where codes of earlier runs may be found."""
        results = [encoded_path(self.input_jsonl), encoded_path(self.input_jsonl, is_augmented=True), self.output_jsonl]
        with_copies = [self.input_jsonl] if self.num_copies_left_out else []
        return [*results, *with_copies, *workspace.leftovers()]

    def _parts(self, row: Row) -> list[_Part]:
        """What of a row (itself, its copies) gets codes that it did not come with."""
        if not must_encode(row, self.codec_ids, self.force):
            return self._copies(row)
        return [_Part(row.line, row.audio, source_of(row, self.codec_id)), *self._copies(row)]

    def _copies(self, row: Row) -> list[_Part]:
        if self.augmentation is None or row.audio is None or not row.audio.is_file():
            return []
        source = source_of(row, self.codec_id)
        recipes = self.augmentation.recipes(row.audio.name, source.num_bytes)
        return [
            _Part(row.line, row.audio, dataclasses.replace(source, augmentation=recipe.key()), number, recipe)
            for number, recipe in enumerate(recipes, 1)
        ]

    def _to_encode(self, chunk: _LineChunk, earlier: EarlierCodes) -> list[_Part]:
        return [part for row in chunk.rows for part in self._parts(row) if not earlier.knows(part.source)]

    def _finish(
        self,
        chunk: _LineChunk,
        results: dict[tuple[int, int], EncodedClip],
        earlier: EarlierCodes,
        unmade: list[str],
    ) -> EncodedChunk:
        """The chunk as it will be kept; copies that cannot be made are left out, and why is added to ``unmade``."""
        records, codes, rejected = [], [], list(chunk.rejected)
        for row in chunk.rows:
            record = {key: value for key, value in row.raw.items() if key != "audio_codes"}
            record = self._with_paths(record, row)
            parts = self._parts(row)
            if not parts or parts[0].recipe is not None:  # the codes that it came with
                records.append(record)
                codes.append(row.codes)
            for part in parts:
                clip = results.get(part.key)
                if clip is None:
                    part_codes, described = earlier.find(part.source)
                elif clip.problem is None:
                    part_codes, described = clip.codes, _description(part, clip)
                elif part.recipe is None:
                    line = json.dumps(row.raw, ensure_ascii=False)
                    rejected.append(self._rejected(row.line, f"{row.audio}: {clip.problem}", line))
                    break
                else:
                    unmade.append(f"{row.audio}: {clip.problem}")
                    continue
                records.append(record | described)
                codes.append(part_codes)
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
            if must_encode(row, self.codec_ids, self.force):
                digest.add(source_of(row, self.codec_id))
            for copy in self._copies(row):
                digest.add(copy.source, copy.source.augmentation)
        digest.add(chunk.rejected)
        return digest.hex()


def _description(part: _Part, clip: EncodedClip) -> dict[str, Any]:
    """The keys of a row that say what its codes are."""
    described = {"measures": clip.measures, "codes_source": part.source.record()}
    return described | ({} if part.recipe is None else {"augmentation": clip.augmentation})


def _same_file(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


# --------------------------------------------------------------------------------------------- what codes belong to


@dataclass(frozen=True)
class Source:
    """What a clip's codes were made of; ``augmentation`` is the key of a copy's recipe, see ``augment``."""

    audio: str
    num_bytes: int
    modified_ns: int
    codec: str
    augmentation: str | None = field(default=None, repr=False)

    def record(self) -> dict[str, Any]:
        """As it stands in a row."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def source_of(row: Row, codec_id: str) -> Source:
    """The row's audio file as it is now."""
    status = row.audio.stat()
    return Source(str(row.audio.resolve()), status.st_size, status.st_mtime_ns, codec_id)


def must_encode(row: Row, codec_ids: tuple[str, ...], force: bool = False) -> bool:
    """Codes that came with a row are taken as they are, unless they say what they were made of and that has changed.

    Args:
        codec_ids: under which rows may know the codec; see ``codec_fingerprints``.
    """
    if row.codes is None:
        return True
    if row.audio is None or not row.audio.is_file():
        return False
    return force or _is_stale(row, codec_ids)


def _is_stale(row: Row, codec_ids: tuple[str, ...]) -> bool:
    recorded = row.raw.get("codes_source")
    if not isinstance(recorded, dict):
        return False
    # The path may differ: a folder that was moved with its times is the same.
    now = source_of(row, codec_ids[0])
    is_same_clip = (recorded.get("num_bytes"), recorded.get("modified_ns")) == (now.num_bytes, now.modified_ns)
    return not is_same_clip or recorded.get("codec") not in codec_ids


class EarlierCodes:
    """Codes of earlier runs by what they were made of; 24 bytes a clip are in memory, the codes stay in their files.

    Args:
        files: results (JSONL) and chunk files; those that are missing are passed over.
        codec_ids: of the codec, its present one first; see ``codec_fingerprints``.
    """

    def __init__(self, files: Iterable[Path], codec_ids: tuple[str, ...]) -> None:
        self._codec_ids = codec_ids
        self._files = [file for file in dict.fromkeys(files) if file.is_file()]
        keys, places, paths = array("q"), array("q"), array("q")
        for number, file in enumerate(self._files):
            for position, recorded in recorded_sources(file):
                source = self._today(recorded)
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
        assert self._today(_recorded_source(record)) == source
        described = {key: record[key] for key in ("measures", "codes_source", "augmentation") if key in record}
        return codes, described | {"codes_source": source.record()}

    def _today(self, source: Source) -> Source:
        """The same with the codec's present fingerprint."""
        return dataclasses.replace(source, codec=self._codec_ids[0]) if source.codec in self._codec_ids else source


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
    """What a JSONL holds: num_samples, num_with_codes, num_copies (augmented), num_bad, hours, seconds (min, median,
    max), languages, speakers.

    ``languages`` and ``speakers`` map names to numbers of rows; lengths come from codes, else from the audio's header.
    """
    tally = Tally()
    languages: Counter[str] = Counter()
    speakers: Counter[str] = Counter()
    seconds, num_with_codes, num_copies = [], 0, 0
    for row in read_rows(jsonl, "--input_jsonl", row_format, tally, needs_codes=False):
        num_with_codes += row.codes is not None
        num_copies += row.is_copy
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
        "num_copies": num_copies,
        "num_bad": tally.num_bad,
        **({"first_bad": first_bad[0]} if first_bad else {}),
        "hours": sum(seconds) / 3600,
        "seconds": lengths,
        "languages": dict(languages.most_common()),
        "speakers": dict(speakers.most_common()),
    }


def format_info(info: dict[str, Any]) -> str:
    """``dataset_info`` as lines for a terminal."""
    copies = f", {info['num_copies']} of them augmented copies" if info["num_copies"] else ""
    lines = [
        f"{info['file']}: {info['num_samples']} rows ({info['num_with_codes']} with codes{copies}), "
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
