"""A dataset's split to a JSONL with codes: resumable, shared by processes, the same bytes however it was made.

The rows of the split, with the keys that training reads, the other columns beside them, and for every speaker that has
no reference one that is picked from the data: the cleanest clip of 5-10 s, saved under ``voices/<speaker>/``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.audio import Audio, audio_suffix
from finetuning.codec import codec_fingerprint
from finetuning.console import say
from finetuning.encode_rows import recorded_sources
from finetuning.encoding import CHUNK_ROWS, ClipEncoder, EncodedChunk, EncodedClip, Progress, clip_has_changed
from finetuning.errors import UserError
from finetuning.manifest import RowError, RowFormat, Tally, check_fields, check_speaker_names
from finetuning.processes import Processes
from finetuning.quality import BEST_REFERENCE_SECONDS, REFERENCE_SECONDS, reference_score
from finetuning.source import SourceRow, Split
from finetuning.workspace import Digest, Workspace, disk_errors, read_stamp, unfinished

#: Saved clips get this time (2000-01-01), so that a file is the same whenever it was made; an edited clip has another.
SAVED_AUDIO_TIME_NS = 946_684_800 * 10**9
#: Keys that a prepared row gets; a column of that name gives way.
RESERVED_KEYS = ("audio_codes", "codes_source", "measures", "dataset_index", "augmentation")


@dataclass(frozen=True)
class Reference:
    """A speaker's reference clip and what is said in it."""

    audio: Path
    text: str | None


@dataclass(frozen=True)
class PrepareOptions:
    """How a split is prepared.

    Attributes:
        max_rows: only the first so many rows of the split.
        save_audio: keep the clips that the dataset embeds, as they are, in a folder beside the JSONL.
        voices_folder: where chosen references go.
        reference: given for all rows; None = one is chosen for every speaker.
        chooses_references: False leaves rows without a reference as they are.
        force: make again what is there.
    """

    device: str = "cpu"
    max_rows: int | None = None
    max_clips_per_batch: int = 32
    num_workers: int = 0
    save_audio: bool = False
    voices_folder: Path = Path("voices")
    reference: Reference | None = None
    chooses_references: bool = True
    force: bool = False
    processes: Processes = field(default_factory=Processes)


def prepare_split(
    split: Split,
    output_jsonl: Path,
    codec_folder: Path,
    row_format: RowFormat,
    options: PrepareOptions,
    references: dict[str, Reference] | None = None,
) -> Path:
    """Writes ``output_jsonl`` with the rows of a split in their order.

    Args:
        references: speaker -> reference, of splits that were prepared before; those of this one are added.

    Raises:
        UserError: too many bad rows, an output that is not ours or cannot be written, unreadable data.
    """
    references = {} if references is None else references
    processes = options.processes
    codec_id = codec_fingerprint(codec_folder)
    audio_folder = output_jsonl.with_name(f"{output_jsonl.stem}_audio") if options.save_audio else None
    rows = DatasetRows(split, row_format, codec_id, options.max_rows, audio_folder)
    digests = [Digest(rows.digest(), rows.num_rows_in([number])).hex() for number in range(rows.num_chunks)]
    made_of = [options.reference, sorted(references.items()), options.chooses_references]
    is_part = split.num_rows is None or rows.num_rows < split.num_rows
    workspace = Workspace(output_jsonl, digests, options.max_rows if is_part else None, made_of)
    if options.force:
        workspace.discard(processes)
    elif workspace.is_current() and _still_holds(output_jsonl):
        say(f"{output_jsonl} is up to date")
        references |= _references_of(output_jsonl)
        return output_jsonl
    else:
        workspace.check_is_ours("--mode prepare")
        if output_jsonl.is_file():
            say(f"{output_jsonl} was made from other data or settings; it is made again")
    encoder = ClipEncoder(codec_folder, options.device, options.num_workers, options.max_clips_per_batch)
    with workspace.opened():
        _encode_missing(rows, workspace, encoder, processes)
        processes.wait()
        if processes.is_main:
            finisher = _Finisher(rows, output_jsonl, options, references)
            finisher.choose(workspace.chunks())
            note = {name: [str(known.audio), known.text] for name, known in finisher.references.items()}
            workspace.assemble(finisher.finish, {"references": note, "dataset": split.dataset_name})
        processes.wait()
    references |= _references_of(output_jsonl)
    return output_jsonl


def _references_of(output_jsonl: Path) -> dict[str, Reference]:
    """Those that the rows of a finished file were given; every process reads them here."""
    noted = (read_stamp(output_jsonl) or {}).get("references", {})
    return {name: Reference(Path(audio), text) for name, (audio, text) in noted.items()}


def _still_holds(output_jsonl: Path) -> bool:
    """Whether the references and the clips that a finished file was made of are there and the same."""
    if not all(reference.audio.is_file() for reference in _references_of(output_jsonl).values()):
        return False
    sources = (dataclasses.asdict(source) for _, source in recorded_sources(output_jsonl))
    # Clips that a dataset embeds have no file, and one row tells it for all.
    from_files = takewhile(lambda source: source["audio"] is not None, sources)
    return not any(map(clip_has_changed, from_files))


def _encode_missing(rows: DatasetRows, workspace: Workspace, encoder: ClipEncoder, processes: Processes) -> None:
    """Encodes those of this process's chunks that have no file yet; they are neighbours, so it reads only its part."""
    mine = np.array_split(np.arange(rows.num_chunks), processes.count)[processes.index].tolist()
    missing = workspace.missing(mine)
    if len(missing) < len(mine):
        say(f"going on: {len(mine) - len(missing)} of {len(mine)} chunks of {CHUNK_ROWS} rows are done already")
    tally, speakers = Tally(), {}
    with Progress(rows.num_rows_in(missing), f"prepare {rows.split.name}", processes.is_main) as progress:
        for number, chunk, _ in encode_chunks(rows, missing, encoder, progress=progress):
            workspace.save(number, chunk)
            tally.add(len(chunk.records), chunk.rejected)
            tally.check_share(rows.num_rows)  # does not wait for the rest where no rest could help
            for record in chunk.records:
                speakers.setdefault(rows.speaker(record), (Path(rows.split.dataset_name), record["dataset_index"] + 1))
            check_speaker_names(speakers)


# ------------------------------------------------------------------------------------------- a dataset's rows as ours


@dataclass(frozen=True)
class DatasetRows:
    """The rows of a split as they stand in a JSONL of ours.

    Attributes:
        codec_id: fingerprint of the codec.
        max_rows: only the first so many.
        audio_folder: where embedded clips are saved; None = they are not.
    """

    split: Split
    row_format: RowFormat
    codec_id: str
    max_rows: int | None = None
    audio_folder: Path | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the split, up to ``max_rows``; where the split does not say, ``max_rows`` is an upper bound."""
        known = self.split.num_rows
        if known is None and self.max_rows is None:
            raise UserError(
                f"{self.split.dataset_name}: the number of rows of split {self.split.name} is not recorded anywhere; "
                "say how many to use (--max_samples; in training MAX_TRAIN_SAMPLES)"
            )
        return min(known if known is not None else self.max_rows, self.max_rows or known)

    @property
    def num_chunks(self) -> int:
        return -(-self.num_rows // CHUNK_ROWS)

    def num_rows_in(self, chunks: Sequence[int]) -> int:
        return sum(min(CHUNK_ROWS, self.num_rows - number * CHUNK_ROWS) for number in chunks)

    def digest(self) -> str:
        """Changes when the prepared rows would."""
        split = self.split
        parts = [split.dataset_name, split.name, split.fingerprint, split.columns, self.row_format, self.codec_id]
        return Digest(*parts, self.audio_folder, CHUNK_ROWS).hex()

    def check(self, row: SourceRow) -> str | None:
        """Why a row cannot be used, as far as that is known before its audio is decoded; None = it can."""
        if row.audio is None:
            return "no audio"
        try:
            check_fields(self._fields(row), self.row_format)
        except RowError as error:
            return str(error)
        return None

    def speaker(self, record: dict[str, Any]) -> str:
        """The speaker of a prepared row."""
        return check_fields(record, self.row_format)["speaker"]

    def record(self, row: SourceRow, clip: EncodedClip) -> dict[str, Any]:
        """A usable row as it will stand in the JSONL, without its codes; saves its audio where that is asked for."""
        audio = self._audio_file(row)
        record = {} if audio is None else {self.row_format.audio_key: audio}
        source: dict[str, Any] = dict.fromkeys(("audio", "num_bytes", "modified_ns"))
        if audio is not None:
            path = row.audio if isinstance(row.audio, Path) else self.audio_folder.parent / audio
            status = path.stat()
            source |= {"audio": str(path.resolve()), "num_bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        record |= self._fields(row)
        described = {"measures": clip.measures, "codes_source": source | {"codec": self.codec_id}}
        return record | {"dataset_index": row.index} | described

    def rejected(self, row: SourceRow, reason: str) -> dict[str, Any]:
        """A row that is left out, as it is listed."""
        place = f"{self.split.dataset_name}, split {self.split.name},"
        return {"file": place, "line": row.index + 1, "reason": reason, "row": self._fields(row)}

    def _fields(self, row: SourceRow) -> dict[str, Any]:
        names = self.row_format
        fields = {names.text_key: row.text, names.language_key: row.language, names.speaker_key: row.speaker}
        kept = {key: value for key, value in fields.items() if value is not None}
        taken = {*fields, names.audio_key, *RESERVED_KEYS}
        return kept | {key: value for key, value in row.other.items() if key not in taken}

    def _audio_file(self, row: SourceRow) -> str | None:
        """The path of the row's clip, from the JSONL's folder where it was saved there; None when there is no file."""
        if isinstance(row.audio, Path):
            return str(row.audio.resolve())
        if self.audio_folder is None:
            return None
        path = self.audio_folder / f"{row.index:08d}{audio_suffix(row.audio)}"
        with disk_errors(path):
            if not path.is_file() or path.read_bytes() != row.audio:
                _write_bytes(path, row.audio)
            os.utime(path, ns=(SAVED_AUDIO_TIME_NS, SAVED_AUDIO_TIME_NS))
        return str(path.relative_to(self.audio_folder.parent))


class _ChunkReader:
    """Reads chunks of a split; neighbouring ones share one pass through it."""

    def __init__(self, rows: DatasetRows) -> None:
        self._rows = rows
        self._reader: Iterator[SourceRow] = iter(())
        self._position = -1

    def read(self, number: int) -> list[SourceRow]:
        start = number * CHUNK_ROWS
        if start != self._position:
            self._reader = self._rows.split.rows(start, self._rows.num_rows)
        self._position = start + CHUNK_ROWS
        return list(islice(self._reader, CHUNK_ROWS))


def encode_chunks(
    rows: DatasetRows,
    numbers: Iterable[int],
    encoder: ClipEncoder,
    known: Callable[[int], EncodedChunk | None] = lambda number: None,
    keep_source: bool = False,
    progress: Progress | None = None,
) -> Iterator[tuple[int, EncodedChunk, list[SourceRow]]]:
    """Reads, decodes and encodes chunks of a split, in the given order: (chunk number, chunk, its source rows).

    Args:
        known: gives a chunk that need not be encoded.
        keep_source: give the source rows as well; otherwise the list is empty, and a known chunk is not even read.
    """

    reader = _ChunkReader(rows)

    def wanted() -> Iterator[tuple[_Work, list[Audio]]]:
        for number in numbers:
            chunk = known(number)
            source = reader.read(number) if chunk is None or keep_source else []
            clips = [row.audio for row in source if rows.check(row) is None] if chunk is None else []
            yield _Work(number, chunk, source), clips

    for work, clips in encoder.encode(wanted(), progress):
        chunk = work.chunk or _finish_chunk(rows, work.source, clips)
        yield work.number, chunk, work.source if keep_source else []


@dataclass(frozen=True)
class _Work:
    """A chunk on its way through the encoder; ``chunk`` where it was encoded before."""

    number: int
    chunk: EncodedChunk | None
    source: list[SourceRow]


def _finish_chunk(rows: DatasetRows, source_rows: list[SourceRow], clips: list[EncodedClip]) -> EncodedChunk:
    records, codes, rejected = [], [], []
    remaining = iter(clips)
    for row in source_rows:
        problem = rows.check(row)
        clip = None if problem else next(remaining)
        if problem or clip.problem:
            name = f"{row.audio_name}: " if row.audio_name and clip else ""
            rejected.append(rows.rejected(row, problem or name + clip.problem))
            continue
        records.append(rows.record(row, clip))
        codes.append(clip.codes)
    return EncodedChunk(records, codes, rejected)


# ------------------------------------------------------------------------------------------------------ references


@dataclass(order=True, frozen=True)
class Candidate:
    """A clip that may stand for its speaker; the greatest is the best."""

    fits: int  # 2: of the best length, 1: of a usable one, 0: neither
    score: float
    order: int  # the earlier row wins a tie
    index: int = field(compare=False)
    text: str = field(compare=False)

    @classmethod
    def of(cls, measures: dict[str, Any], index: int, text: str) -> Candidate:
        """Of a row of the split."""
        seconds = measures["seconds"]
        fits = sum(low <= seconds <= high for low, high in (REFERENCE_SECONDS, BEST_REFERENCE_SECONDS))
        score = reference_score(measures) if fits else seconds
        return cls(fits, score, -index, index, text)


class _Finisher:
    """Gives every row its reference, and each speaker without one a clip of the split."""

    def __init__(
        self, rows: DatasetRows, output_jsonl: Path, options: PrepareOptions, references: dict[str, Reference]
    ) -> None:
        self.rows, self.folder, self.options = rows, output_jsonl.parent, options
        self.references = dict(references)

    def choose(self, chunks: Iterable[EncodedChunk]) -> None:
        """Picks and saves a clip for each speaker that has rows without a reference."""
        if self.options.reference is not None or not self.options.chooses_references:
            return
        best: dict[str, Candidate] = {}
        for record in (record for chunk in chunks for record in chunk.records):
            speaker = self.rows.speaker(record)
            if record.get("ref_audio") or speaker in self.references:
                continue
            text = record[self.rows.row_format.text_key]
            candidate = Candidate.of(record["measures"], record["dataset_index"], text)
            best[speaker] = max(best.get(speaker, candidate), candidate)
        self.references |= save_references(self.rows.split, best, self.options.voices_folder)

    def finish(self, record: dict[str, Any]) -> dict[str, Any]:
        """A row with its reference."""
        if record.get("ref_audio"):
            return record
        reference = self.options.reference or self.references.get(self.rows.speaker(record))
        if reference is None:
            return record
        text = {"ref_text": reference.text} if reference.text else {}
        return record | {"ref_audio": _path_from(self.folder, reference.audio)} | text


def save_references(split: Split, chosen: dict[str, Candidate], voices_folder: Path) -> dict[str, Reference]:
    """Saves each speaker's chosen clip as it is, with its transcript beside it, and says so."""
    saved = {}
    for speaker, candidate in sorted(chosen.items(), key=lambda item: item[1].index):
        row = next(split.rows(candidate.index, candidate.index + 1))
        name = f"{folder_name(Path(split.dataset_name).name)}-{folder_name(split.name)}-{candidate.index}"
        path = voices_folder / folder_name(speaker) / f"{name}{audio_suffix(row.audio)}"
        with disk_errors(path):
            _write_bytes(path, row.audio if isinstance(row.audio, bytes) else row.audio.read_bytes())
            _write_bytes(path.with_suffix(".txt"), f"{candidate.text}\n".encode())
        saved[speaker] = Reference(path, candidate.text)
        remark = "" if candidate.fits == 2 else "; a clean one of 5-10 s would be better (REF_AUDIO_PATH)"
        say(f'reference of speaker "{speaker}": {path} (row {candidate.index + 1} of {split.name}){remark}')
    return saved


def folder_name(name: str) -> str:
    """A name of letters, digits, ``-``, ``_`` and ``.`` for a folder; another name never gives the same one."""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).strip(".")
    if plain == name:
        return name
    return f"{plain[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _path_from(folder: Path, path: Path) -> str:
    """As found from the JSONL's folder where both lie in the project, else absolute."""
    project = Path.cwd()
    inside = all(project in [one, *one.parents] for one in (folder.resolve(), path.resolve()))
    return os.path.relpath(path.resolve(), folder.resolve()) if inside else str(path.resolve())


def _write_bytes(path: Path, content: bytes) -> None:
    with unfinished(path) as file:
        file.write_bytes(content)
        file.rename(path)
