"""The rows of a JSONL, checked once and served from a memory map.

An index is a folder ``.rows/<file name>-<stamp>-<format>/`` beside the JSONL with ``rows.arrow``, ``rejected.jsonl``
(the bad rows) and ``summary.json``. The stamp stands for the JSONL's content, the format for all else that the result
hangs on.
It appears under its name in one step, so a build that was killed leaves nothing that is ever opened.

Whatever is done with the rows of a run reads columns as arrays: a Python object for each of 600,000 rows would cost
more than all else, once in every process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from finetuning.codec import NUM_CODEBOOKS
from finetuning.console import say
from finetuning.errors import UserError
from finetuning.manifest import (
    NUM_SHOWN,
    Row,
    RowError,
    RowFormat,
    Tally,
    check_is_file,
    check_speaker_names,
    parse_row,
    read_rows,
    remove_empty_folders,
    resolve_path,
)

#: Part of an index's format: raise it when the columns or the checks of a row change.
INDEX_VERSION = 3
#: Rows of one Arrow batch, the last one excepted; a row's batch follows from its number.
ROWS_PER_BATCH = 256
#: A build that another machine began is given up when nothing was written for so long.
ABANDONED_SECONDS = 24 * 3600.0
#: So far may the clocks of a disk and of this machine lie apart.
CLOCK_SKEW_SECONDS = 60.0
#: Other processes may build or remove the same index at any moment; what they get in the way of is tried so often.
MAX_TRIES = 10
#: So many different speaker_id values are counted; more are "more than".
MAX_SPEAKER_IDS = 1000

_TEXT_COLUMNS = (
    "text", "language", "speaker", "instruct", "audio", "ref_audio", "ref_text", "codes_codec", "measures",
    "augmentation",
)  # fmt: skip
_INT64_COLUMNS = ("line", "audio_bytes", "audio_modified_ns")
_TRAINED_COLUMNS = ["text", "language", "speaker", "instruct", "codes"]
_TEMPORARY = re.compile(r"\.building-(?P<host>.+)-(?P<process>\d+)-[0-9a-f]{8}")


class RowStop(Exception):
    """The row that ``open_rows`` was asked to stop at; nothing was built."""


# ------------------------------------------------------------------------------------------------------------ rows


class Manifest:
    """Rows in an Arrow file, memory-mapped; only those that are asked for come into memory. Cheap to fork and pickle.

    Columns: ``line``, ``text``, ``language``, ``speaker``, ``instruct``, ``audio``, ``ref_audio``, ``ref_text``,
    ``num_codec_frames`` (0 without codes), ``codes`` (T*16 int16), ``measures`` (JSON or None), and what the codes were
    made of: ``audio_bytes``, ``audio_modified_ns``, ``codes_codec`` (None where the row does not say). Of an altered
    copy ``augmentation`` says what was done to it (JSON); None for all others.
    """

    def __init__(self, arrow_file: Path, indices: np.ndarray | None = None, reader: Any = None) -> None:
        self.arrow_file = arrow_file
        self._reader = reader or _open_arrow(arrow_file)
        self.indices: range | np.ndarray = range(_count_rows(self._reader)) if indices is None else indices

    @property
    def file_name(self) -> str:
        """Of the JSONL whose lines the rows are."""
        return self.arrow_file.parent.name.rsplit("-", 2)[0]

    def __reduce__(self) -> tuple:
        return Manifest, (self.arrow_file, None if isinstance(self.indices, range) else self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The columns of one row; ``codes`` as (T, 16) int16."""
        batch, row = divmod(int(self.indices[index]), ROWS_PER_BATCH)
        record = self._reader.get_batch(batch)
        columns = dict(zip(record.schema.names, record.columns, strict=True))
        codes = columns.pop("codes")[row].values.to_numpy().reshape(-1, NUM_CODEBOOKS)
        return {name: column[row].as_py() for name, column in columns.items()} | {"codes": codes}

    def select(self, positions: np.ndarray) -> Manifest:
        """A view of some rows, in the given order."""
        return Manifest(self.arrow_file, self._positions()[positions], self._reader)

    def column(self, name: str) -> np.ndarray:
        """(num_rows,) one column, any but codes; numbers with -1 for None.

        Texts become Python objects: only for few rows. See ``labels`` and ``distinct``.
        """
        import pyarrow as pa

        type, positions = self._reader.schema.field(name).type, self._positions()
        is_number = pa.types.is_integer(type)
        values = np.empty(len(positions), dtype=type.to_pandas_dtype() if is_number else object)
        for batch, group in _groups(positions // ROWS_PER_BATCH):
            part = self._reader.get_batch(batch).column(name)
            part = part.fill_null(-1) if is_number else part
            values[group] = part.to_numpy(zero_copy_only=False)[positions[group] % ROWS_PER_BATCH]
        return values

    def computed(self, name: str, compute: Callable[[Any], Any]) -> np.ndarray:
        """(num_rows,) what an Arrow function makes of a column of texts: numbers, NaN for None.

        No text becomes a Python object.

        Args:
            compute: a batch's Arrow array -> an Arrow array of numbers, as long.
        """
        import pyarrow as pa

        batches = map(self._reader.get_batch, range(self._reader.num_record_batches))
        parts = [compute(batch.column(name)).cast(pa.float64()).to_numpy(zero_copy_only=False) for batch in batches]
        return np.concatenate([np.empty(0, np.float64), *parts])[self._positions()]

    def label_numbers(self, name: str) -> np.ndarray:
        """(num_rows,) int32: equal texts have equal numbers, none has -1. No text becomes a Python object."""
        encoded = self._whole_column(name).dictionary_encode()
        parts = [chunk.indices.fill_null(-1).to_numpy() for chunk in encoded.chunks]
        return np.concatenate([np.empty(0, np.int32), *parts])[self._positions()]

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        """The distinct texts of a column in the order of their first use, and (num_rows,) int32: each row's place.

        Rows without a text have -1.
        """
        numbers, first, places = np.unique(self.label_numbers(name), return_index=True, return_inverse=True)
        is_text = numbers >= 0
        order = np.argsort(first[is_text])
        place_of = np.full(len(numbers), -1, dtype=np.int32)
        place_of[np.flatnonzero(is_text)[order]] = np.arange(len(order), dtype=np.int32)
        return self.select(first[is_text][order]).column(name).tolist(), place_of[places]

    def distinct(self, name: str) -> list[str]:
        """The distinct texts of a column in the order of their first use."""
        return self.labels(name)[0]

    def has(self, name: str) -> np.ndarray:
        """(num_rows,) bool: which rows have a value in a column."""
        chunks = self._whole_column(name).chunks
        parts = [chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in chunks]
        return np.concatenate([np.empty(0, bool), *parts])[self._positions()]

    def content_hash(self) -> str:
        """A short hash of what is trained on: the texts, languages, speakers, instructions and codes of all rows, in
        order. Neither paths nor the layout of the file have a part in it. Reads the whole file once.
        """
        import xxhash

        hashes = {name: (xxhash.xxh3_128(), xxhash.xxh3_128()) for name in _TRAINED_COLUMNS}
        positions = self._positions()
        ends = np.flatnonzero(np.diff(positions // ROWS_PER_BATCH)) + 1
        for part in np.split(positions, ends) if len(positions) else []:
            batch, rows = self._reader.get_batch(int(part[0]) // ROWS_PER_BATCH), part % ROWS_PER_BATCH
            neighbours = [(run[0], run[-1] + 1) for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)]
            for name, (of_lengths, of_values) in hashes.items():
                offsets, values = _buffers(batch.column(name))
                of_lengths.update(np.diff(offsets)[rows])
                for first, end in neighbours:
                    of_values.update(values[offsets[first] : offsets[end]])
        return _hash(len(self), {name: [part.hexdigest() for part in parts] for name, parts in hashes.items()})

    def _whole_column(self, name: str) -> Any:
        """A column of all rows of the file, still in its pages."""
        import pyarrow as pa

        batches = map(self._reader.get_batch, range(self._reader.num_record_batches))
        return pa.chunked_array([batch.column(name) for batch in batches], self._reader.schema.field(name).type)

    def _positions(self) -> np.ndarray:
        """(num_rows,) int32, numbers of the rows in the file."""
        return np.arange(len(self), dtype=np.int32) if isinstance(self.indices, range) else self.indices


def _open_arrow(file: Path) -> Any:
    """A reader of the file's batches; nothing is read yet but the table of contents.

    All columns are in its batches: if only some are asked for, Arrow copies the pages into memory of its own.
    """
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(file)), options=pa.ipc.IpcReadOptions(use_threads=False))


def _buffers(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of a column of texts (None is "") or lists: (num_rows + 1,) int32 offsets, and all values."""
    import pyarrow as pa

    if not pa.types.is_string(column.type):
        return column.offsets.to_numpy(), column.values.to_numpy()
    column = column.fill_null("") if column.null_count else column
    _, offsets, values = column.buffers()
    offsets = np.frombuffer(offsets, dtype=np.int32)[column.offset : column.offset + len(column) + 1]
    return offsets, np.frombuffer(values or b"", dtype=np.uint8)


def _count_rows(reader: Any) -> int:
    last = reader.num_record_batches - 1
    return last * ROWS_PER_BATCH + reader.get_batch(last).num_rows if last >= 0 else 0


def _groups(numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each distinct number and the positions where it stands."""
    if len(numbers) == 0:
        return
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    for group in np.split(order, starts[1:]):
        yield int(numbers[group[0]]), group


def hold_out(manifest: Manifest, fraction: float, seed: int, min_rows: int = 20) -> tuple[Manifest, Manifest | None]:
    """Splits rows into (training, validation): the fraction of each speaker's rows, seeded.

    Speakers with fewer than ``min_rows`` rows hold none out; without any held-out row the second part is None. Altered
    copies are never held out and change nothing about which rows are; those of a held-out clip are in neither part.
    """
    names, speakers = manifest.labels("speaker")
    is_copy = manifest.has("augmentation")
    generator = np.random.default_rng(seed)
    is_held = np.zeros(len(manifest), dtype=bool)
    for speaker in range(len(names)):
        rows = np.flatnonzero((speakers == speaker) & ~is_copy)
        if fraction > 0 and len(rows) >= min_rows:
            is_held[generator.permutation(rows)[: max(1, round(fraction * len(rows)))]] = True
    if not is_held.any():
        return manifest, None
    is_trained = ~is_held
    if is_copy.any():
        clips = manifest.label_numbers("audio")
        # Of a copy without a file nobody knows whose it is.
        is_trained &= ~(is_copy & ((clips < 0) | np.isin(clips, clips[is_held])))
    return manifest.select(np.flatnonzero(is_trained)), manifest.select(np.flatnonzero(is_held))


# --------------------------------------------------------------------------------------------------- finding indexes


@dataclass(frozen=True)
class _Request:
    """What ``open_rows`` was asked for."""

    jsonl: Path
    row_format: RowFormat
    max_rows: int | None
    needs_codes: bool
    spare_folder: Path | None

    @property
    def folders(self) -> list[Path]:
        """Where the index may lie, best first."""
        name = f"{self.jsonl.name}-{file_stamp(self.jsonl)}-{self._format()}"
        folders = [self.jsonl.parent / ".rows" / name]
        if self.spare_folder is not None:  # it may serve files of one name from several folders
            folders.append(self.spare_folder / f"{_hash(_absolute(self.jsonl.parent))}-{name}")
        return folders

    def _format(self) -> str:
        # Paths in the rows are found from the working directory or from the JSONL's folder.
        places = (os.getcwd(), _absolute(self.jsonl.parent))
        return _hash(INDEX_VERSION, ROWS_PER_BATCH, asdict(self.row_format), self.max_rows, self.needs_codes, *places)


def file_stamp(file: Path) -> str:
    """Changes with the file's size and modification time."""
    status = file.stat()
    return _hash(status.st_size, status.st_mtime_ns)


def find_index(
    jsonl: Path,
    row_format: RowFormat,
    *,
    max_rows: int | None = None,
    needs_codes: bool = True,
    spare_folder: Path | None = None,
) -> Manifest | None:
    """The rows of a JSONL that is indexed as it stands, else None. See ``open_rows``."""
    if not jsonl.is_file():
        return None
    request = _Request(jsonl, row_format, max_rows, needs_codes, spare_folder)
    found = _find(request)
    return Manifest(found / "rows.arrow") if found else None


def open_rows(
    jsonl: Path,
    row_format: RowFormat,
    setting: str,
    *,
    max_rows: int | None = None,
    needs_codes: bool = True,
    rejected_file: Path | None = None,
    spare_folder: Path | None = None,
    stop_at: Callable[[Row], bool] | None = None,
) -> Manifest:
    """The rows of a JSONL; it is read and indexed first where that was not done before.

    Args:
        max_rows: only the first so many good rows.
        needs_codes: whether a row without codes is bad; if not, it must name an audio file.
        rejected_file: where the list of bad rows is put; removed when there are none. Default: within the index.
        spare_folder: where the index goes when the JSONL's folder cannot be written.
        stop_at: gives the index up at a row for which it is true, and at any row without codes, good or bad. Not asked
            when the index is there.

    Raises:
        UserError: too many bad rows, clashing speaker names, all rows with the same codes, or no place for the index.
        RowStop: see ``stop_at``.
    """
    check_is_file(jsonl, setting)
    request = _Request(jsonl, row_format, max_rows, needs_codes, spare_folder)
    for tries_left in reversed(range(MAX_TRIES)):
        found = _find(request) or _build(request, setting, stop_at)
        try:
            manifest = Manifest(found / "rows.arrow")
            _tell(found, rejected_file)
            break
        except FileNotFoundError:  # another process has just put its own in this one's place
            if not tries_left:
                raise
    return manifest


def _find(request: _Request) -> Path | None:
    return next((folder for folder in request.folders if _is_current(folder, request)), None)


def _is_current(folder: Path, request: _Request) -> bool:
    try:
        return _is_whole(folder) and not _is_mended(folder, request)
    except (OSError, ValueError, KeyError):
        return False


def _is_whole(folder: Path) -> bool:
    """False for an index that somebody took files from or cut off."""
    num_bytes = _read_summary(folder)["arrow_bytes"]
    return num_bytes == (folder / "rows.arrow").stat().st_size and (folder / "rejected.jsonl").is_file()


def _is_mended(folder: Path, request: _Request) -> bool:
    """Whether files that were missing when the index was built are there now: the rows would come out otherwise."""
    summary, jsonl = _read_summary(folder), request.jsonl
    if any(resolve_path(path, jsonl.parent).is_file() for path in summary["missing_audio"]):
        return True
    with (folder / "rejected.jsonl").open(encoding="utf-8") as stream:
        for record in map(json.loads, stream):
            if "file not found" in record["reason"] and _is_good(record["row"], request):
                return True
    return False


def _is_good(line: str, request: _Request) -> bool:
    try:
        parse_row(line, 0, request.jsonl.parent, request.row_format, request.needs_codes, quick=True)
    except RowError:
        return False
    return True


def _tell(folder: Path, rejected_file: Path | None) -> None:
    """Says what was noticed when the index was built, and puts the list of bad rows where it is wanted."""
    summary, listed = _read_summary(folder), folder / "rejected.jsonl"
    if rejected_file is not None and not summary["skipped"]:
        rejected_file.unlink(missing_ok=True)  # of an earlier run
    elif rejected_file is not None:
        rejected_file.parent.mkdir(parents=True, exist_ok=True)
        copy = rejected_file.with_name(f".{rejected_file.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            shutil.copyfile(listed, copy)
            listed = copy.replace(rejected_file)
        finally:
            copy.unlink(missing_ok=True)
    for note in summary["notes"]:
        say(note)
    if summary["skipped"]:
        say(f"skipped {summary['skipped']}\n  listed in {listed}")


def _read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------- building indexes


class _ListedTally(Tally):
    """Bad rows go to a list on disk as they come."""

    def __init__(self, list_file: Path, stops: bool) -> None:
        super().__init__()
        self._stream = list_file.open("w", encoding="utf-8")
        self._stops = stops

    def add(self, num_good: int, rejected: Sequence[dict[str, Any]]) -> None:
        if self._stops and any(_lacks_codes(bad["row"]) for bad in rejected):
            raise RowStop
        self._stream.writelines(json.dumps(bad, ensure_ascii=False) + "\n" for bad in rejected)
        super().add(num_good, rejected)

    def close(self) -> None:
        self._stream.close()


def _lacks_codes(line: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.get("audio_codes") is None


@dataclass
class _Facts:
    """What is noticed about the rows on the way."""

    speakers: dict[str, tuple[Path, int]] = field(default_factory=dict)
    speaker_ids: set[str] = field(default_factory=set)
    missing_audio: list[str] = field(default_factory=list)
    first_codes: bytes | None = None
    same_codes: bool = True

    def note(self, row: Row, jsonl: Path) -> None:
        if row.speaker not in self.speakers:
            self.speakers[row.speaker] = (jsonl, row.line)
        if len(self.speaker_ids) <= MAX_SPEAKER_IDS:
            self.speaker_ids.add(str(row.raw.get("speaker_id", "")))
        if self.same_codes:  # until two differ
            codes = None if row.codes is None else row.codes.tobytes()
            self.first_codes = self.first_codes or codes
            self.same_codes = codes is not None and codes == self.first_codes
        if row.audio is not None and len(self.missing_audio) < NUM_SHOWN and not row.audio.exists():
            self.missing_audio.append(str(row.audio))

    def check(self, tally: Tally, jsonl: Path, setting: str) -> None:
        """Raises UserError for rows that are not worth training on."""
        tally.check_share()
        check_speaker_names(self.speakers)
        if tally.num_good > 1 and self.same_codes:
            raise UserError(
                f"{setting}: all {tally.num_good} rows of {jsonl} have the same codes, so there is "
                "nothing to learn; encode the audio again (data_processing.py --mode encode --force)"
            )

    def notes(self, jsonl: Path) -> list[str]:
        if len(self.speaker_ids) < 2 or len(self.speakers) != 1:
            return []
        number = len(self.speaker_ids) if len(self.speaker_ids) <= MAX_SPEAKER_IDS else f"more than {MAX_SPEAKER_IDS}"
        return [
            f"{jsonl}: rows carry {number} different speaker_id values but are trained as one speaker "
            f"({next(iter(self.speakers))}); set SPEAKER_COLUMN=speaker_id to keep them apart"
        ]


def _build(request: _Request, setting: str, stop_at: Callable[[Row], bool] | None) -> Path:
    """Builds the index under a temporary name and gives it its own; returns its folder."""
    jsonl, stamp = request.jsonl, file_stamp(request.jsonl)
    folder, unfinished = _make_folder(request, setting)
    try:
        _write_index(request, setting, stop_at, unfinished)
        if file_stamp(jsonl) != stamp:
            raise UserError(f"{setting}: {jsonl} was changed while it was read; start again when it is complete")
        _put_in_place(unfinished, folder, request)
        _remove_outdated(folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{setting}: cannot write the index of {jsonl} to {folder.parent}: {reason}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        remove_empty_folders(folder.parent, folder.parent.parent)
    return folder


def _put_in_place(unfinished: Path, folder: Path, request: _Request) -> None:
    """Gives a finished index its name, unless another process was faster and its index is there.

    Raises:
        OSError
    """
    for tries_left in reversed(range(MAX_TRIES)):
        try:
            unfinished.rename(folder)
            return
        except OSError:  # a folder is there, or the disk refuses
            if _is_current(folder, request):
                return
            if not tries_left:
                raise
        replaced = _temporary_name(folder)
        with contextlib.suppress(FileNotFoundError):  # another process has just moved it away
            folder.rename(replaced)
        shutil.rmtree(replaced, ignore_errors=True)


def _temporary_name(folder: Path) -> Path:
    """A name beside the index that no other build has, and that says whose it is."""
    return folder.with_name(f".building-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


def _make_folder(request: _Request, setting: str) -> tuple[Path, Path]:
    """The index's folder-to-be, and an empty one beside it with a temporary name."""
    problems = []
    for folder in request.folders:
        try:
            return folder, _make_temporary(folder)
        except OSError as error:
            problems.append(f"{folder.parent} ({error.strerror})")
    raise UserError(f"{setting}: the index of {request.jsonl} can be written neither to {' nor to '.join(problems)}")


def _make_temporary(folder: Path) -> Path:
    unfinished = _temporary_name(folder)
    for tries_left in reversed(range(MAX_TRIES)):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder.parent)
            unfinished.mkdir()
            break
        except (FileNotFoundError, FileExistsError):  # a build that was refused removes the empty folder behind it
            if not tries_left:
                raise
    return unfinished


def _remove_abandoned(folder: Path) -> None:
    """Removes what builds that were killed left behind."""
    for entry in folder.iterdir():
        if (match := _TEMPORARY.fullmatch(entry.name)) and _is_abandoned(entry, match["host"], int(match["process"])):
            shutil.rmtree(entry, ignore_errors=True)


def _is_abandoned(entry: Path, host: str, process: int) -> bool:
    import psutil

    try:
        last_write = max(file.stat().st_mtime for file in [entry, *entry.iterdir()])
    except OSError:  # it was just finished
        return False
    if host == socket.gethostname():
        try:
            # A container's processes get the same numbers at every start: the builder may be one from before.
            if last_write < psutil.Process(process).create_time() - CLOCK_SKEW_SECONDS:
                return True
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            pass
    return time.time() - last_write > ABANDONED_SECONDS


def _remove_outdated(folder: Path) -> None:
    """Removes indexes of the same file as it was before; programs that read them keep what they have open."""
    name, stamp, _ = folder.name.rsplit("-", 2)
    for other in folder.parent.iterdir():
        match = re.fullmatch(rf"{re.escape(name)}-([0-9a-f]{{12}})-[0-9a-f]{{12}}", other.name)
        if match and match[1] != stamp:
            shutil.rmtree(other, ignore_errors=True)


def _write_index(request: _Request, setting: str, stop_at: Callable[[Row], bool] | None, folder: Path) -> None:
    """Writes the three files.

    Raises:
        UserError, RowStop: see ``open_rows``.
    """
    jsonl, facts = request.jsonl, _Facts()
    # With stop_at a row without codes must be told from a bad one, so it is not refused for that.
    needs_codes = request.needs_codes and stop_at is None
    with contextlib.closing(_ListedTally(folder / "rejected.jsonl", stop_at is not None)) as tally:
        read = {"needs_codes": needs_codes, "max_rows": request.max_rows, "quick": True}
        rows = read_rows(jsonl, setting, request.row_format, tally, **read)
        rows = tqdm(rows, desc=f"index {jsonl.name}", unit="row", disable=None)  # off where there is no terminal
        _write_rows(_noted(rows, facts, jsonl, stop_at), folder / "rows.arrow")
    facts.check(tally, jsonl, setting)
    summary = {
        "skipped": tally.summary() if tally.num_bad else "",
        "notes": facts.notes(jsonl),
        "missing_audio": facts.missing_audio,
        "arrow_bytes": (folder / "rows.arrow").stat().st_size,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")


def _noted(rows: Iterable[Row], facts: _Facts, jsonl: Path, stop_at: Callable[[Row], bool] | None) -> Iterator[Row]:
    for row in rows:
        if stop_at is not None and (row.codes is None or stop_at(row)):
            raise RowStop
        facts.note(row, jsonl)
        yield row


def _write_rows(rows: Iterable[Row], file: Path) -> None:
    """The Arrow file, in batches of ROWS_PER_BATCH, column by column."""
    import pyarrow as pa

    batch: list[Row] = []
    with pa.ipc.new_file(str(file), _schema()) as writer:
        for row in rows:
            batch.append(row)
            if len(batch) == ROWS_PER_BATCH:
                writer.write_batch(_record_batch(batch))
                batch = []
        if batch:
            writer.write_batch(_record_batch(batch))


def _schema() -> Any:
    import pyarrow as pa

    columns = [(name, pa.string()) for name in _TEXT_COLUMNS] + [(name, pa.int64()) for name in _INT64_COLUMNS]
    return pa.schema([*columns, ("num_codec_frames", pa.int32()), ("codes", pa.list_(pa.int16()))])


def _record_batch(rows: list[Row]) -> Any:
    import pyarrow as pa

    schema, records = _schema(), [_columns(row) for row in rows]
    arrays = [pa.array([record[field.name] for record in records], field.type) for field in list(schema)[:-1]]
    codes = [np.empty(0, np.int16) if row.codes is None else row.codes.reshape(-1) for row in rows]
    offsets = np.cumsum([0, *map(len, codes)], dtype=np.int32)
    arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(codes))))
    return pa.record_batch(arrays, schema=schema)


def _columns(row: Row) -> dict[str, Any]:
    """All columns of a row but its codes."""
    num_bytes, modified_ns, codec = codes_source(row.raw)
    measures = row.raw.get("measures")
    return {
        "line": row.line,
        "text": row.text,
        "language": row.language,
        "speaker": row.speaker,
        "instruct": row.instruct,
        "audio": None if row.audio is None else str(row.audio),
        "ref_audio": None if row.ref_audio is None else str(row.ref_audio),
        "ref_text": row.ref_text,
        "num_codec_frames": 0 if row.codes is None else len(row.codes),
        "audio_bytes": num_bytes,
        "audio_modified_ns": modified_ns,
        "codes_codec": codec,
        "measures": json.dumps(measures, ensure_ascii=False) if isinstance(measures, dict) else None,
        "augmentation": json.dumps(row.raw["augmentation"], ensure_ascii=False) if row.is_copy else None,
    }


def codes_source(raw: dict[str, Any]) -> tuple[int, int, str] | tuple[None, None, None]:
    """(bytes, modification time in ns, codec) that a row's codes were made of; Nones where it does not say.

    A source that leaves one out has -1 or "" there, so that it equals no file and no codec.
    """
    source = raw.get("codes_source")
    if not isinstance(source, dict):
        return None, None, None
    numbers = [source.get(key) for key in ("num_bytes", "modified_ns")]
    num_bytes, modified_ns = (n if isinstance(n, int) and abs(n) < 1 << 63 else -1 for n in numbers)
    codec = source.get("codec")
    return num_bytes, modified_ns, codec if isinstance(codec, str) else ""


def _hash(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _absolute(path: Path) -> str:
    return os.path.abspath(path)
