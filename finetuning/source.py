"""A split of a speech dataset as raw rows in a fixed order, its audio not decoded.

A dataset is a Hub id, a folder, or one table file. ``datasets`` finds the files (split patterns, README configurations,
Hub revisions); they are read here, because that library decodes audio through torchcodec, which is not needed:

- parquet and Arrow with pyarrow: a row group or a batch at a time, only the columns that are asked for;
- csv, tsv, jsonl, json, and the metadata files of an audiofolder as plain tables, their clips by path;
- anything else that ``datasets`` streams (webdataset) through that library with decoding off, from the first row only.

What a split holds in memory does not grow with its rows.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import os
import posixpath
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.console import say
from finetuning.errors import UserError
from finetuning.settings import Settings

if TYPE_CHECKING:
    import pyarrow

#: Guesses for columns that are not set, the likeliest first; two of one tier are ambiguous. Lower case.
TEXT_TIERS = (
    ("text",),
    ("sentence", "transcription", "transcript", "utterance"),
    ("normalized_text", "transcription_normalized", "raw_text", "raw_transcription", "caption", "txt"),
)
AUDIO_TIERS = (
    ("audio",),
    ("audio_path", "audio_file", "audio_filepath", "audio_filename", "audio_file_name", "wav", "wav_path"),
    ("file_name", "filename", "file", "path", "filepath", "file_path"),
)
LANGUAGE_TIERS = (("language",), ("lang",), ("locale",))
#: Only this name: a speaker_id is often no name to speak with, so SPEAKER_COLUMN must ask for it.
SPEAKER_TIERS = (("speaker",),)

#: Metadata of an audiofolder.
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
#: Files that hold rows beside loose audio; the first of these that occurs is taken.
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
#: What counts as loose audio.
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aif", ".aiff")
#: <owner>/<name> or <name>.
HUB_ID = r"\w[\w.-]*(/[\w.-]+)?"
METADATA_HELP = (
    "a metadata.csv beside the clips is needed, with the header file_name,text and a line such as "
    "wavs/001.wav,What is said in it."
)

#: Kinds of columns whose values are never copied into a row's ``other``.
BLOB_KINDS = ("audio", "bytes", "media")
#: Rows that are taken out of Arrow memory at once: few where clips are embedded, many otherwise.
ROWS_WITH_BLOBS, ROWS_WITHOUT_BLOBS = 16, 4096
#: A table's row offsets are kept for every so many rows.
ROWS_PER_OFFSET = 1024
#: How many rows of a table tell its columns and their kinds.
NUM_SAMPLE_ROWS = 100
#: Parallel requests to the Hub: footers of parquet files, and loose clips ahead of the reader.
NUM_HUB_THREADS = 16
#: On the Hub a row group of at most so many bytes is fetched whole (and the next one ahead) …
MAX_GROUP_BYTES = 64 << 20
#: … a larger one in requests of so many bytes.
HUB_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class ColumnNames:
    """What the user set; None = to be guessed."""

    text: str | None = None
    audio: str | None = None
    speaker: str | None = None
    language: str | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> ColumnNames:
        """The *_COLUMN settings, as far as the user set them."""
        names = {field.name: f"{field.name}_column" for field in fields(cls)}
        return cls(**{name: getattr(settings, key) for name, key in names.items() if settings.is_set(key)})


@dataclass(frozen=True)
class SourceRow:
    """One row as the dataset has it; nothing is checked.

    Attributes:
        index: position in the split, from 0.
        audio: a file on disk (it may be missing), or the encoded bytes (wav, flac, mp3, ogg); None: the row has none.
        audio_name: what the dataset calls the clip, for messages and for names of saved files.
        text, speaker, language: values of the chosen columns; None where there is no such column or value.
        other: all remaining columns, JSON-able; audio, images and other bytes are left out.
    """

    index: int
    audio: Path | bytes | None
    audio_name: str | None
    text: Any
    speaker: Any
    language: Any
    other: dict[str, Any]


class Split:
    """Rows in a fixed order; made by ``open_split``. May be pickled.

    Attributes:
        dataset_name, name: as they were given.
        columns: as resolved; text and audio are never None.
        num_rows: exact, or None when only a full pass could tell.
        fingerprint: changes when the data does: Hub commit and files, or paths, sizes and times of local files (of
            the table only where clips are loose files).
        can_seek: whether ``rows(start)`` is cheap.
    """

    def __init__(self, dataset_name: str, name: str, reader: _Reader, columns: ColumnNames, fingerprint: str) -> None:
        self.dataset_name = dataset_name
        self.name = name
        self.columns = columns
        self.fingerprint = fingerprint
        self._reader = reader
        chosen = {columns.text, columns.audio, columns.speaker, columns.language}
        self._other = [key for key, kind in reader.kinds.items() if key not in chosen and kind not in BLOB_KINDS]
        self._wanted = [key for key in reader.kinds if key in chosen] + self._other

    @property
    def num_rows(self) -> int | None:
        return self._reader.num_rows

    @property
    def can_seek(self) -> bool:
        return self._reader.can_seek

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[SourceRow]:
        """Rows ``start`` to ``stop`` (not included; default the end).

        Raises:
            UserError: a file cannot be read (any more).
        """
        if stop is not None and stop <= start:
            return iter(())
        records = self._reader.records(self._wanted, start, stop)
        rows = (self._row(index, folder, record) for index, (folder, record) in enumerate(records, start))
        if not self._reader.is_remote:
            return rows
        return _ahead((partial(_with_audio, row) for row in rows), NUM_HUB_THREADS, 2 * NUM_HUB_THREADS)

    def column(self, name: str) -> Iterator[Any]:
        """One column's values, without reading the others where the format allows that (parquet, Arrow)."""
        if name not in self._reader.kinds:
            raise UserError(f'{_where(self.dataset_name, self.name)} has no column "{name}"; {_listing(self._reader)}')
        for _, record in self._reader.records([name]):
            yield self._value(record, name)

    def _row(self, index: int, folder: str, record: dict[str, Any]) -> SourceRow:
        audio, audio_name = _audio(record.get(self.columns.audio), folder)
        text, speaker, language = (
            self._value(record, name) for name in (self.columns.text, self.columns.speaker, self.columns.language)
        )
        other = {name: _jsonable(self._value(record, name)) for name in self._other if name in record}
        return SourceRow(index, audio, audio_name, text, speaker, language, other)

    def _value(self, record: dict[str, Any], name: str | None) -> Any:
        """A value of a column; class labels are stored as numbers and become their names."""
        value = record.get(name) if name else None
        labels = self._reader.labels.get(name)
        if labels and isinstance(value, int):
            return labels[value] if 0 <= value < len(labels) else None
        return value


def split_names(dataset_name: str, config: str | None = None) -> list[str]:
    """The splits of a dataset, train first.

    Raises:
        UserError: as ``open_split``.
    """
    return list(_find_splits(dataset_name, config))


def open_split(dataset_name: str, split: str, names: ColumnNames = ColumnNames(), config: str | None = None) -> Split:
    """Opens a split of a Hub dataset, a local folder or a single table file.

    Args:
        names: columns that the user set; the others are guessed, and a guess is said.
        config: the dataset's configuration (DATASET_CONFIG).

    Raises:
        UserError: no such dataset, configuration, split or column; the Hub is out of reach; no audio; a text column
            that holds no text; an empty split; a file that cannot be read.
    """
    splits = _find_splits(dataset_name, config)
    if split not in splits:
        raise UserError(
            f'DATASET_NAME: {dataset_name} has no split "{split}"; it has: {", ".join(splits)} '
            "(choose with --split or TRAIN_SPLIT)"
        )
    reader = splits[split].open()
    where = _where(dataset_name, split)
    if reader.num_rows == 0:
        raise UserError(f"DATASET_NAME: {where} is empty; choose another split or add rows")
    columns = _resolve_columns(names, reader, where, splits[split].is_folder)
    return Split(dataset_name, split, reader, columns, _fingerprint(splits[split].files))


def _where(dataset_name: str, split: str) -> str:
    return f'{dataset_name} (split "{split}")'


# -------------------------------------------------------------------------------------------------------- columns


def _resolve_columns(names: ColumnNames, reader: _Reader, where: str, is_folder: bool) -> ColumnNames:
    """Checks the columns that were set, guesses the others, and says guesses that are not the usual name."""
    kinds = reader.kinds
    if is_folder and names.audio == "audio" and "audio" not in kinds and "file_name" in kinds:
        names = replace(names, audio="file_name")  # datasets shows an audiofolder's file_name as audio
    for field in fields(names):
        name = getattr(names, field.name)
        if name is not None and name not in kinds:
            raise UserError(f'{field.name.upper()}_COLUMN: {where} has no column "{name}"; {_listing(reader)}')
    audio = names.audio or _guess_audio(reader, where)
    if kinds[audio] not in ("audio", "bytes", "text"):
        raise UserError(
            f'AUDIO_COLUMN: column "{audio}" of {where} holds {kinds[audio]}, not audio or paths; {_listing(reader)}'
        )
    is_text = {name: kind for name, kind in kinds.items() if kind == "text" and name != audio}
    text = names.text or _guess_text(reader, is_text, where)
    if kinds[text] != "text":
        raise UserError(f'TEXT_COLUMN: column "{text}" of {where} holds {kinds[text]}, not text; {_listing(reader)}')
    free = [name for name, kind in kinds.items() if kind not in BLOB_KINDS and name not in (audio, text)]
    speaker = names.speaker or next(iter(_best_tier(free, SPEAKER_TIERS)), None)
    language = names.language or next(iter(_best_tier(free, LANGUAGE_TIERS)), None)
    columns = ColumnNames(text, audio, speaker, language)
    _say_guesses(names, columns, where, usual={"file_name"} if is_folder else set())
    return columns


def _guess_audio(reader: _Reader, where: str) -> str:
    embedded = [name for name, kind in reader.kinds.items() if kind == "audio"]
    usable = [name for name, kind in reader.kinds.items() if kind in ("bytes", "text")]
    fitting = ["audio"] if "audio" in embedded else embedded or _best_tier(usable, AUDIO_TIERS)
    fitting = fitting or [name for name in usable if name.lower().endswith("_file_name")]
    if not fitting:
        raise UserError(
            f"AUDIO_COLUMN: {where} seems to have no audio; {_listing(reader)}; set AUDIO_COLUMN if one of them holds "
            "audio files or their paths"
        )
    return _only(fitting, "AUDIO_COLUMN", "audio", where, reader)


def _guess_text(reader: _Reader, is_text: Mapping[str, str], where: str) -> str:
    if reader.kinds.get("text") not in (None, *BLOB_KINDS):
        return "text"  # where it holds no text, that is the message
    fitting = _best_tier(is_text, TEXT_TIERS)
    if not fitting:
        raise UserError(
            f"TEXT_COLUMN: {where} has no column that is known to hold transcripts; {_listing(reader)}; set TEXT_COLUMN"
        )
    return _only(fitting, "TEXT_COLUMN", "transcripts", where, reader)


def _best_tier(names: Iterable[str], tiers: Sequence[Sequence[str]]) -> list[str]:
    """Those names that stand in the first tier with any, in the tier's order."""
    names = list(names)
    for tier in tiers:
        found = [name for known in tier for name in names if name.lower() == known]
        if found:
            return found
    return []


def _only(fitting: Sequence[str], setting: str, what: str, where: str, reader: _Reader) -> str:
    if len(fitting) > 1:
        raise UserError(
            f"{setting}: several columns of {where} may hold {what} ({', '.join(fitting)}); {_listing(reader)}; "
            f"set {setting} to one of them"
        )
    return fitting[0]


def _say_guesses(names: ColumnNames, columns: ColumnNames, where: str, usual: set[str]) -> None:
    guesses = []
    for field in fields(columns):
        name = getattr(columns, field.name)
        if name and getattr(names, field.name) is None and name != field.name and name not in usual:
            guesses.append(f'{field.name.upper()}_COLUMN="{name}"')
    if guesses:
        say(f"{where}: columns guessed: {', '.join(guesses)}; set them if that is wrong")


def _listing(reader: _Reader) -> str:
    return f"its columns are: {', '.join(reader.kinds)}"


# ----------------------------------------------------------------------------------------------------- row values


def _audio(value: Any, folder: str) -> tuple[Path | bytes | _Url | None, str | None]:
    """(where the clip is, its name in the dataset) of an audio column's value."""
    if isinstance(value, Mapping):
        name = value.get("path") or None
        if value.get("bytes"):
            return bytes(value["bytes"]), name
        value = name
    if isinstance(value, (bytes, bytearray)):
        return bytes(value) or None, None
    name = str(value or "").strip()
    return (_locate(name, folder), name) if name else (None, None)


class _Url(str):
    """A clip that must be fetched; never leaves this room."""


def _locate(name: str, folder: str) -> Path | _Url:
    """Relative names: beside the file that names them, then from the working directory."""
    if "::" in name or name.startswith("hf://"):  # a member of an archive, or a Hub file, as datasets writes them
        return _Url(name)
    if folder.startswith("hf://"):
        inside = posixpath.normpath(posixpath.join(_path_in_repository(folder), name))
        leaves = inside.startswith(("..", "/"))
        return Path(name) if leaves else _Url(f"{_repository(folder)}/{inside}")
    try:
        given = Path(name).expanduser()
        beside = Path(folder) / given
        return beside if given.is_absolute() or beside.exists() or not given.exists() else given
    except (OSError, RuntimeError, ValueError):  # too long, the home folder of nobody, a zero byte
        return Path(name.replace("\0", "?"))


def _with_audio(row: SourceRow) -> SourceRow:
    """Fetches a loose clip of the Hub or of an archive; one that does not exist stays a (missing) path."""
    if not isinstance(row.audio, _Url):
        return row
    audio = _fetch(row.audio)
    return replace(row, audio=Path(row.audio_name) if audio is None else audio)


def _fetch(url: _Url) -> bytes | None:
    import fsspec
    from huggingface_hub.errors import EntryNotFoundError

    options = {"block_size": 0} if url.startswith("hf://") else {}  # 0: one request for the whole file
    with _reading(url):
        try:
            with fsspec.open(url, "rb", **options) as stream:
                return stream.read()
        except (FileNotFoundError, EntryNotFoundError, KeyError):  # KeyError: no such member of an archive
            return None


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return None
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


# ------------------------------------------------------------------------------------------------- finding splits


@dataclass(frozen=True)
class _Files:
    """What a split consists of.

    Attributes:
        format: parquet, arrow, table or stream.
        files: paths, or hf:// addresses with the commit, in order.
        features: the README's (or dataset_info.json's) features as JSON.
        options: of the format (see the readers).
        is_folder: these are metadata files of an audiofolder.
    """

    format: str
    files: Sequence[str]
    features: Mapping[str, Any]
    options: Mapping[str, Any]
    is_folder: bool = False

    def open(self) -> _Reader:
        readers = {"parquet": _ParquetReader, "arrow": _ArrowReader, "table": _TableReader, "stream": _StreamReader}
        return readers[self.format](self.files, self.features, **self.options)


def _find_splits(dataset_name: str, config: str | None) -> dict[str, _Files]:
    path = Path(dataset_name).expanduser()
    if path.is_file():
        return _single_file(path)
    if not path.is_dir():
        return _from_library(dataset_name, config)
    for find in (_saved_by_datasets, _tables_beside_audio):
        if splits := find(path, dataset_name, config):
            return splits
    return _from_library(dataset_name, config, path)


def _single_file(path: Path) -> dict[str, _Files]:
    if path.suffix.lower() not in (*TABLE_SUFFIXES, ".arrow"):
        raise UserError(
            f"DATASET_NAME: {path} is a file of an unknown kind; give a folder, a Hub id, or a "
            "parquet, arrow, csv, tsv, jsonl or json file"
        )
    return {"train": _files([str(path.resolve())])}


def _files(files: Sequence[str], features: Mapping[str, Any] | None = None, **options: Any) -> _Files:
    """Files of one format, by their suffix."""
    suffix = posixpath.splitext(files[0])[1].lower()
    kind = {".parquet": "parquet", ".arrow": "arrow"}.get(suffix, "table")
    is_folder = posixpath.basename(files[0]) in METADATA_NAMES
    return _Files(kind, files, features or {}, options if kind == "table" else {}, is_folder)


def _saved_by_datasets(folder: Path, dataset_name: str, config: str | None) -> dict[str, _Files]:
    """Folders of ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk``."""
    if (folder / "dataset_dict.json").is_file():
        names = _read_json(folder / "dataset_dict.json")["splits"]
        return {name: _saved_split(folder / name) for name in names}
    if (folder / "state.json").is_file():
        return {_read_json(folder / "state.json").get("_split") or "train": _saved_split(folder)}
    return {}


def _saved_split(folder: Path) -> _Files:
    files = [str((folder / item["filename"]).resolve()) for item in _read_json(folder / "state.json")["_data_files"]]
    info = folder / "dataset_info.json"
    return _Files("arrow", files, (_read_json(info).get("features") if info.is_file() else None) or {}, {})


def _read_json(path: Path) -> Any:
    with _reading(str(path)):
        return json.loads(path.read_text(encoding="utf-8"))


def _tables_beside_audio(folder: Path, dataset_name: str, config: str | None) -> dict[str, _Files]:
    """Local audiofolders, and tables beside loose clips.

    Not left to the library: it lists every clip several times (600,000 of them would fill the memory), and takes a
    folder for an audiofolder whatever its tables are called.
    """
    if _has_configs(folder):
        return {}
    tables, has_audio = _walk(folder)
    if not has_audio or any(re.search(r"-\d{5}-of-\d{5}", table) for table in tables):  # shards, and some sample
        return {}
    if config not in (None, "default"):
        raise UserError(f'DATASET_CONFIG: {dataset_name} has no configuration "{config}"; unset DATASET_CONFIG')
    return _group_tables(tables, str(folder.resolve()), dataset_name)


def _has_configs(folder: Path) -> bool:
    """Whether README.md or .huggingface.yaml names the files of the splits."""
    for name in ("README.md", ".huggingface.yaml"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.search(r"^configs:", (folder / name).read_text(encoding="utf-8"), re.MULTILINE):
                return True
    return False


def _walk(folder: Path) -> tuple[list[str], bool]:
    """(sorted tables below a folder, relative and with slashes; whether there is audio)."""
    tables, has_audio = [], False
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        relative = Path(parent).relative_to(folder)
        tables += [(relative / name).as_posix() for name in names if _is_table(name)]
        has_audio = has_audio or any(name.lower().endswith(AUDIO_SUFFIXES) for name in names)
    return sorted(tables), has_audio


def _is_table(name: str) -> bool:
    return name.lower().endswith(TABLE_SUFFIXES) and not name.startswith(".")


def _group_tables(tables: Sequence[str], root: str, dataset_name: str) -> dict[str, _Files]:
    """Splits of tables that stand beside loose audio, by the names of their folders or of themselves.

    Args:
        tables: paths relative to ``root`` (a folder, or an hf:// address).
    """
    metadata = [table for table in tables if posixpath.basename(table) in METADATA_NAMES]
    chosen = metadata or tables
    for suffix in TABLE_SUFFIXES:
        if same := [table for table in chosen if table.lower().endswith(suffix)]:
            break
    else:
        raise UserError(f"DATASET_NAME: {dataset_name} holds audio but no transcripts; {METADATA_HELP}")
    by_split: dict[str, list[str]] = {}
    for table in same:
        by_split.setdefault(_split_of(table), []).append(f"{root}/{table}")
    unnamed = by_split.pop("", None)
    if not by_split:
        by_split = {"train": unnamed}
    order = {"train": 0, "validation": 1, "test": 2}
    return {split: _files(by_split[split]) for split in sorted(by_split, key=order.get)}


def _split_of(table: str) -> str:
    """train, validation or test from a path's folders, then from its own name; "" where nothing tells."""
    from datasets.data_files import SPLIT_KEYWORDS

    *folders, name = table.split("/")
    for part in (*reversed(folders), posixpath.splitext(name)[0]):
        for split, keywords in SPLIT_KEYWORDS.items():
            if any(re.search(rf"(^|[-._ 0-9]){word}([-._ 0-9]|$)", part) for word in keywords):
                return str(split)
    return ""


# ------------------------------------------------------------------------------------------- finding, the library


def _from_library(dataset_name: str, config: str | None, folder: Path | None = None) -> dict[str, _Files]:
    """Splits as ``datasets`` finds them: any folder, or a dataset on the Hub."""
    builder = _builder(dataset_name, config, folder)
    features = builder.info.features.to_dict() if builder.info.features else {}
    if builder.name == "cache":  # the Hub is out of reach, but an earlier load_dataset has left Arrow files
        names = list(builder.info.splits or {})
        return {name: _Files("arrow", _cached_files(builder, name), features, {}) for name in names}
    data_files = {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
    if builder.name == "audiofolder":
        return _audiofolder(builder, data_files, dataset_name)
    return {split: _library_split(builder, split, files, features) for split, files in data_files.items()}


def _library_split(builder: Any, split: str, files: Sequence[str], features: Mapping[str, Any]) -> _Files:
    plain = {"csv": (".csv", ".tsv"), "json": (".json", ".jsonl", ".ndjson")}.get(builder.name, ())
    if builder.name == "parquet":
        return _Files("parquet", files, features, {})
    if builder.name == "arrow" and not _is_remote(files):
        return _Files("arrow", files, features, {})
    if plain and all(file.lower().endswith(plain) for file in files) and not getattr(builder.config, "field", None):
        delimiter = getattr(builder.config, "delimiter", None) or getattr(builder.config, "sep", None)
        return _Files("table", files, features, {"delimiter": delimiter} if delimiter not in (None, ",") else {})
    return _Files("stream", files, features, {"builder": builder, "split": split})


def _cached_files(builder: Any, split: str) -> list[str]:
    return [item["filename"] for item in builder.as_dataset(split=split).cache_files]


def _audiofolder(builder: Any, data_files: Mapping[str, Sequence[str]], dataset_name: str) -> dict[str, _Files]:
    """Metadata files that the library attached to the splits, else tables in the repository's root."""
    metadata = {
        split: [file for file in files if posixpath.basename(file) in METADATA_NAMES]
        for split, files in data_files.items()
    }
    if any(metadata.values()):
        return {split: _files(files) for split, files in metadata.items() if files}
    if any(file.lower().endswith(".zip") for files in data_files.values() for file in files):
        return {
            split: _Files("stream", files, {}, {"builder": builder, "split": split})
            for split, files in data_files.items()
        }
    files = [file for files in data_files.values() for file in files]
    if not _is_remote(files):
        raise UserError(f"DATASET_NAME: {dataset_name} holds audio but no transcripts; {METADATA_HELP}")
    root = _repository(files[0])
    with _reading(root):
        names = [posixpath.basename(name) for name in _hub().ls(root, detail=False)]
    return _group_tables(sorted(name for name in names if _is_table(name)), root, dataset_name)


def _builder(dataset_name: str, config: str | None, folder: Path | None) -> Any:
    """``datasets.load_dataset_builder`` with its errors turned into one sentence each."""
    from datasets import load_dataset_builder
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from requests.exceptions import ConnectionError as RequestsConnectionError
    from requests.exceptions import Timeout

    name = dataset_name.rstrip("/")
    if folder is None and not re.fullmatch(HUB_ID, name):
        raise UserError(f"DATASET_NAME: there is no file or folder {dataset_name} (nor is it a Hub id, owner/name)")
    unknown = (
        f"DATASET_NAME: {dataset_name} is neither a folder here (seen from {Path.cwd()}) nor a dataset on the Hub that "
        "can be read; check the spelling, or set HF_TOKEN if it is private"
    )
    unreachable = (
        f"DATASET_NAME: {dataset_name} is no folder here, and the Hub cannot be reached or is switched off "
        "(HF_HUB_OFFLINE); check the network or HF_ENDPOINT, or download the dataset elsewhere and name its folder"
    )
    try:
        return load_dataset_builder(name if folder is None else str(folder), config)
    except (EmptyDatasetError, DataFilesNotFoundError):
        raise UserError(
            f"DATASET_NAME: {dataset_name} holds no data files that can be read "
            "(parquet, arrow, csv, tsv, jsonl, json, or audio with a metadata.csv)"
        ) from None
    except DatasetNotFoundError as error:
        if "gated" not in str(error):
            raise UserError(unknown) from None
        raise UserError(
            f"DATASET_NAME: {dataset_name} is gated; accept its terms on its page and set HF_TOKEN to a token of "
            "that account"
        ) from None
    except (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled, RequestsConnectionError, Timeout):
        raise UserError(unreachable) from None
    except (HFValidationError, FileNotFoundError):
        raise UserError(unknown) from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"DATASET_NAME: {dataset_name} is made by a script of its own, which datasets no longer runs; take a copy "
            "of it in parquet (the Hub keeps one of many datasets on the branch refs/convert/parquet)"
        ) from None
    except ValueError as error:
        available = re.search(r"\[(.*?)\]", str(error), re.DOTALL)
        if available and "onfig" in str(error):
            wanted = f'has no configuration "{config}"' if config else "has several configurations"
            choices = available[1].replace("'", "")
            raise UserError(
                f"DATASET_CONFIG: {dataset_name} {wanted}; set DATASET_CONFIG to one of: {choices}"
            ) from None
        raise UserError(f"DATASET_NAME: {dataset_name} cannot be read ({_first_line(error)})") from None
    except OSError as error:
        raise UserError(f"DATASET_NAME: {dataset_name} cannot be read ({_first_line(error)})") from None


def _fingerprint(files: Sequence[str]) -> str:
    """16 hex digits of the files' addresses (which hold the commit), or of paths, sizes and times."""
    parts = []
    for file in files:
        state = None if file.startswith("hf://") else os.stat(file)
        parts.append([file] if state is None else [file, state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _is_remote(files: Sequence[str]) -> bool:
    return any(file.startswith("hf://") for file in files)


def _repository(address: str) -> str:
    """hf://datasets/<owner>/<name>@<commit> of an address in it."""
    return re.match(r"hf://datasets/[^@]+@[^/]+", address)[0]


def _path_in_repository(address: str) -> str:
    return address[len(_repository(address)) :].strip("/")


def _hub() -> Any:
    from datasets import config
    from huggingface_hub import HfFileSystem

    return HfFileSystem(endpoint=config.HF_ENDPOINT)


def _ahead(tasks: Iterable[Callable[[], Any]], num_threads: int, num_ahead: int) -> Iterator[Any]:
    """The tasks' results in order; threads work on so many tasks ahead of the one that is waited for."""
    from concurrent.futures import ThreadPoolExecutor

    pool, pending = ThreadPoolExecutor(num_threads), deque()
    try:
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _reading(file: str) -> Iterator[None]:
    """Errors of reading a file become one sentence that names it."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError:
        raise UserError(f"DATASET_NAME: {file} is not UTF-8 text") from None
    except (OSError, pyarrow.ArrowException, csv.Error, json.JSONDecodeError) as error:
        advice = (
            "check the network and HF_TOKEN and run it again"
            if file.startswith("hf://")
            else "it is damaged, cut off or of another kind; fetch it again or take it away"
        )
        raise UserError(f"DATASET_NAME: {file} cannot be read ({_first_line(error)}); {advice}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# -------------------------------------------------------------------------------------------------------- readers


class _Reader:
    """What the formats have in common.

    Attributes:
        kinds: column -> audio (struct of bytes and path), bytes, media (images, video), text, or another word that
            says in a message what the column holds.
        labels: column -> names of its class labels.
        num_rows: exact, or None.
        is_remote: clips may have to be fetched one by one.
    """

    can_seek = True
    is_remote = False
    kinds: dict[str, str]
    labels: dict[str, list[str]]
    num_rows: int | None

    def records(
        self, columns: Sequence[str], start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(folder that relative paths start from, column -> value) of each row."""
        raise NotImplementedError

    def _rows_at_once(self, columns: Sequence[str]) -> int:
        has_blobs = any(self.kinds[name] in BLOB_KINDS for name in columns)
        return ROWS_WITH_BLOBS if has_blobs else ROWS_WITHOUT_BLOBS


@dataclass(frozen=True)
class _Piece:
    """Row groups of one parquet file: ``groups``, the first of which starts at row ``index`` of the split."""

    path: str
    groups: Sequence[int]
    index: int


class _ParquetReader(_Reader):
    """Parquet files, local or on the Hub; files and row groups outside the rows that are asked for are not read."""

    def __init__(self, files: Sequence[str], features: Mapping[str, Any]) -> None:
        self.files = list(files)
        self.is_remote = _is_remote(files)
        hub = _hub() if self.is_remote else None
        for folder in {posixpath.dirname(file) for file in files} if hub else ():
            with _reading(folder):
                hub.ls(folder)  # the sizes of all files in one request
        tasks = (partial(_row_group_sizes, file, hub) for file in self.files)
        self.group_rows = list(_ahead(tasks, NUM_HUB_THREADS, 2 * NUM_HUB_THREADS))
        self.num_rows = sum(map(sum, self.group_rows))
        with _reading(self.files[0]), _parquet(self.files[0], hub) as file:
            schema = file.schema_arrow
        self.kinds, self.labels = _describe_schema(schema, features)

    def records(
        self, columns: Sequence[str], start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        stop = self.num_rows if stop is None else min(stop, self.num_rows)
        size = self._rows_at_once(columns)
        for piece, batches in self._opened(self._pieces(start, stop), columns):
            with _reading(piece.path):
                yield from self._records_of(piece, batches, start, stop, size)

    def _records_of(
        self, piece: _Piece, batches: Iterable[pyarrow.RecordBatch], start: int, stop: int, size: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows start to stop of the split, as far as they lie in the batches."""
        index, folder = piece.index, posixpath.dirname(piece.path)
        for batch in batches:
            first, last = max(start - index, 0), min(stop - index, batch.num_rows)
            index += batch.num_rows
            for at in range(first, last, size):
                for record in batch.slice(at, min(size, last - at)).to_pylist():
                    yield folder, record

    def _pieces(self, start: int, stop: int) -> list[_Piece]:
        pieces, index = [], 0
        for path, sizes in zip(self.files, self.group_rows, strict=True):
            starts = [index + sum(sizes[:group]) for group in range(len(sizes))]
            groups = [group for group, at in enumerate(starts) if at < stop and start < at + sizes[group]]
            if groups:
                pieces.append(_Piece(path, groups, starts[groups[0]]))
            index += sum(sizes)
        return pieces

    def _opened(
        self, pieces: Sequence[_Piece], columns: Sequence[str]
    ) -> Iterator[tuple[_Piece, Iterable[pyarrow.RecordBatch]]]:
        """Each piece with its record batches."""
        hub = _hub() if self.is_remote else None
        size = self._rows_at_once(columns)
        if hub and size == ROWS_WITHOUT_BLOBS:  # small, and many requests: several files at once
            tasks = (partial(_read_groups, piece, columns, hub) for piece in pieces)
            yield from zip(pieces, _ahead(tasks, NUM_HUB_THREADS, NUM_HUB_THREADS), strict=True)
            return
        for piece in pieces:
            with _reading(piece.path), _parquet(piece.path, hub) as file:
                if hub and _largest_group_bytes(file, piece.groups, columns) <= MAX_GROUP_BYTES:
                    yield piece, _groups_ahead(piece, columns, hub, file.metadata)
                else:
                    yield (
                        piece,
                        file.iter_batches(size, row_groups=piece.groups, columns=list(columns), use_threads=False),
                    )


@contextlib.contextmanager
def _parquet(path: str, hub: Any) -> Iterator[Any]:
    """A parquet file, whose columns are read a piece at a time."""
    import pyarrow.parquet as pq

    if hub is None:
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False, buffer_size=1 << 20) as file:
            yield file
        return
    with hub.open(path, "rb", cache_type="none") as stream:
        yield pq.ParquetFile(stream, pre_buffer=False, buffer_size=HUB_READ_BYTES)


def _groups_ahead(piece: _Piece, columns: Sequence[str], hub: Any, metadata: Any) -> Iterator[pyarrow.RecordBatch]:
    """Whole row groups, each in one or a few requests, the next one while the last is used."""
    import pyarrow.parquet as pq

    with hub.open(piece.path, "rb", cache_type="none") as stream:
        file = pq.ParquetFile(stream, metadata=metadata, pre_buffer=True)
        tasks = (partial(file.read_row_group, group, list(columns), use_threads=False) for group in piece.groups)
        for table in _ahead(tasks, 1, 1):
            yield from table.to_batches()


def _read_groups(piece: _Piece, columns: Sequence[str], hub: Any) -> list[pyarrow.RecordBatch]:
    with _reading(piece.path), _parquet(piece.path, hub) as file:
        return file.read_row_groups(piece.groups, list(columns), use_threads=False).to_batches()


def _largest_group_bytes(file: Any, groups: Sequence[int], columns: Sequence[str]) -> int:
    """Compressed bytes of the largest row group, of these columns."""
    sizes = []
    for group in groups:
        chunks = [file.metadata.row_group(group).column(index) for index in range(file.metadata.num_columns)]
        wanted = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
        sizes.append(sum(chunk.total_compressed_size for chunk in wanted))
    return max(sizes)


def _row_group_sizes(path: str, hub: Any) -> list[int]:
    with _reading(path), _parquet(path, hub) as file:
        return [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]


class _ArrowReader(_Reader):
    """Local Arrow files (streams as ``datasets`` writes them, or random access), memory-mapped."""

    def __init__(self, files: Sequence[str], features: Mapping[str, Any]) -> None:
        self.files = list(files)
        self.kinds, self.labels, self.num_rows = {}, {}, 0
        self.file_rows = []
        for path in self.files:
            with _reading(path), _arrow_batches(path) as (schema, batches):
                if not self.kinds:
                    self.kinds, self.labels = _describe_schema(schema, features)
                self.file_rows.append(sum(batch.num_rows for batch in batches))
        self.num_rows = sum(self.file_rows)

    def records(
        self, columns: Sequence[str], start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        stop = self.num_rows if stop is None else min(stop, self.num_rows)
        size = self._rows_at_once(columns)
        index = 0
        for path, num_rows in zip(self.files, self.file_rows, strict=True):
            if index >= stop or index + num_rows <= start:
                index += num_rows
                continue
            folder = posixpath.dirname(path)
            with _reading(path), _arrow_batches(path) as (schema, batches):
                present = [name for name in columns if name in schema.names]
                for batch in batches:
                    first, last = max(start - index, 0), min(stop - index, batch.num_rows)
                    index += batch.num_rows
                    for at in range(first, last, size):
                        for record in batch.select(present).slice(at, min(size, last - at)).to_pylist():
                            yield folder, record


@contextlib.contextmanager
def _arrow_batches(path: str) -> Iterator[tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]]:
    """(schema, record batches); pages of the map come into memory only where values are touched."""
    import pyarrow as pa

    with pa.memory_map(path) as mapped:
        try:
            stream = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(mapped)
            yield file.schema, (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            yield stream.schema, iter(stream)


def _describe_schema(
    schema: pyarrow.Schema, features: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """(kinds, labels) of an Arrow schema; features of the file itself win over the README's."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
    features = {**features, **stored}
    types = {
        name: str((features.get(name) or {}).get("_type", "")) for name in schema.names if _is_feature(features, name)
    }
    kinds = {field.name: _kind_of_type(field.type, types.get(field.name, "")) for field in schema}
    labels = {name: features[name]["names"] for name, kind in types.items() if kind == "ClassLabel"}
    return kinds, {name: list(names) for name, names in labels.items() if names}


def _is_feature(features: Mapping[str, Any], name: str) -> bool:
    return isinstance(features.get(name), Mapping)


def _kind_of_type(arrow_type: pyarrow.DataType, feature: str) -> str:
    import pyarrow.types as types

    if types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    if feature in ("Image", "Video", "Pdf", "Mesh"):
        return "media"
    if feature == "ClassLabel":
        return "class labels"
    if types.is_struct(arrow_type):
        names = {arrow_type.field(index).name for index in range(arrow_type.num_fields)}
        return "audio" if feature == "Audio" or {"bytes", "path"} <= names else "structures"
    is_binary = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    if any(check(arrow_type) for check in is_binary):
        return "audio" if feature == "Audio" else "bytes"
    if types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type):
        return "audio" if feature == "Audio" else "text"
    if types.is_null(arrow_type):
        return "nothing"
    is_number = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean)
    return "numbers" if any(check(arrow_type) for check in is_number) else str(arrow_type)


# --------------------------------------------------------------------------------------------------------- tables


class _TableReader(_Reader):
    """csv, tsv, jsonl and json files. Row offsets are kept for every thousandth row, so that rows can be sought."""

    def __init__(self, files: Sequence[str], features: Mapping[str, Any], delimiter: str | None = None) -> None:
        self.is_remote = _is_remote(files)
        self.tables = [_open_table(file, delimiter) for file in files]
        self.num_rows = sum(table.num_rows for table in self.tables)
        sample = [record for _, record in islice(self._all_records(0, None), NUM_SAMPLE_ROWS)]
        names = dict.fromkeys(name for table in self.tables for name in table.header)
        names |= dict.fromkeys(name for record in sample for name in record)
        self.kinds = {name: _kind_of_values([record.get(name) for record in sample]) for name in names}
        types = {name: features[name].get("_type") for name in names if _is_feature(features, name)}
        self.kinds |= {
            name: "text" for name, kind in types.items() if kind == "Value" and self.kinds[name] == "nothing"
        }
        self.labels = {name: features[name]["names"] for name, kind in types.items() if kind == "ClassLabel"}

    def records(
        self, columns: Sequence[str], start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for folder, record in self._all_records(start, stop):
            yield folder, {name: record[name] for name in columns if name in record}

    def _all_records(self, start: int, stop: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
        stop = self.num_rows if stop is None else min(stop, self.num_rows)
        first = 0
        for table in self.tables:
            if first < stop and start < first + table.num_rows:
                for record in table.records(max(start - first, 0), stop - first):
                    yield table.folder, record
            first += table.num_rows


def _open_table(address: str, delimiter: str | None) -> _Table:
    path = _local_copy(address)
    with _reading(address):
        suffix = path.suffix.lower()
        if suffix in (".csv", ".tsv"):
            return _CsvTable(path, address, "\t" if suffix == ".tsv" else delimiter)
        with path.open("rb") as stream:
            is_list = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        return (_JsonTable if is_list else _JsonLinesTable)(path, address)


def _local_copy(address: str) -> Path:
    """A table's path; one on the Hub goes to the hub's cache first (it holds no audio, so it is small)."""
    if not address.startswith("hf://"):
        return Path(address)
    from huggingface_hub import hf_hub_download

    repository, _, revision = _repository(address).removeprefix("hf://datasets/").partition("@")
    with _reading(address):
        return Path(hf_hub_download(repository, _path_in_repository(address), repo_type="dataset", revision=revision))


class _Table:
    """One table file.

    Attributes:
        address: as named in messages; its folder is where relative paths start.
        header: the columns, where the file names them before its rows.
        num_rows: rows that are not blank.
    """

    header: Sequence[str] = ()
    num_rows: int

    def __init__(self, path: Path, address: str) -> None:
        self.path = path
        self.address = address
        self.folder = posixpath.dirname(address)
        #: (byte offset, line number before it) of rows 0, ROWS_PER_OFFSET, …
        self.offsets: list[tuple[int, int]] = []
        self._scan()

    def _scan(self) -> None:
        """Counts the rows and notes offsets in one pass."""
        self.num_rows = 0
        with _Lines(self.path, *self._after_header()) as lines:
            place = lines.place
            for _ in self._raw_rows(lines):
                if self.num_rows % ROWS_PER_OFFSET == 0:
                    self.offsets.append(place)
                self.num_rows += 1
                place = lines.place

    def _after_header(self) -> tuple[int, int]:
        return 0, 0

    def _raw_rows(self, lines: _Lines) -> Iterator[Any]:
        raise NotImplementedError

    def _record(self, raw: Any, line: int) -> dict[str, Any]:
        raise NotImplementedError

    def records(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Rows start to min(stop, num_rows); start lies inside."""
        with _reading(self.address), _Lines(self.path, *self.offsets[start // ROWS_PER_OFFSET]) as lines:
            skipped = start % ROWS_PER_OFFSET
            for raw in islice(self._raw_rows(lines), skipped, skipped + stop - start):
                yield self._record(raw, lines.number)


class _Lines:
    """Decoded lines of a file from an offset, which knows its place."""

    def __init__(self, path: Path, offset: int, number: int) -> None:
        self._stream = path.open("rb")
        self._stream.seek(offset)
        self.offset = offset
        self.number = number

    @property
    def place(self) -> tuple[int, int]:
        return self.offset, self.number

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline()
        if not line:
            raise StopIteration
        text = line.decode("utf-8-sig" if self.offset == 0 else "utf-8")
        self.offset += len(line)
        self.number += 1
        return text

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


class _CsvTable(_Table):
    """Values are strings; empty ones are None. A metadata.csv of LJSpeech (id|text|normalised, no header) is known."""

    def __init__(self, path: Path, address: str, delimiter: str | None) -> None:
        self.is_ljspeech = False
        with _Lines(path, 0, 0) as lines:
            first = next(lines, "")
            self.delimiter = delimiter or next((mark for mark in ",|;\t" if mark in first), ",")
            self.header = next(csv.reader([first], delimiter=self.delimiter), [])
            self._header_end = lines.place
        parts = first.strip().split("|")
        if Path(address).name == "metadata.csv" and len(parts) in (2, 3) and "file_name" not in self.header:
            self.is_ljspeech = parts[0] != "" and (Path(address).parent / "wavs" / f"{parts[0]}.wav").exists()
        if self.is_ljspeech:
            self.header = ["file_name", "text", "normalized_text"][: len(parts)]
            self._header_end = (0, 0)
        self.header = [name.strip() for name in self.header]
        super().__init__(path, address)

    def _after_header(self) -> tuple[int, int]:
        return self._header_end

    def _raw_rows(self, lines: _Lines) -> Iterator[list[str]]:
        if self.is_ljspeech:
            rows = csv.reader(lines, delimiter="|", quoting=csv.QUOTE_NONE)
        else:
            rows = csv.reader(lines, delimiter=self.delimiter)
        for row in rows:
            if len(row) > len(self.header):
                raise UserError(
                    f"DATASET_NAME: {self.address} line {lines.number} has {len(row)} fields, the header has "
                    f'{len(self.header)}; put a text that contains "{self.delimiter}" in double quotes'
                )
            if any(row):
                yield row

    def _record(self, raw: list[str], line: int) -> dict[str, Any]:
        record = dict.fromkeys(self.header) | {
            name: value or None for name, value in zip(self.header, raw, strict=False)
        }
        if self.is_ljspeech:
            record["file_name"] = f"wavs/{raw[0]}.wav"
        return record


class _JsonLinesTable(_Table):
    """One JSON object a line."""

    def _raw_rows(self, lines: _Lines) -> Iterator[str]:
        return (line for line in lines if line.strip())

    def _record(self, raw: str, line: int) -> dict[str, Any]:
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(record := json.loads(raw), dict):
                return record
        raise UserError(f"DATASET_NAME: {self.address} line {line} is not a JSON object (one object a line is needed)")


class _JsonTable(_Table):
    """A JSON list of objects; the one format that is read whole, each time."""

    def _scan(self) -> None:
        self.num_rows = len(self._load())

    def _load(self) -> list[dict[str, Any]]:
        with _reading(self.address):
            rows = json.loads(self.path.read_text(encoding="utf-8-sig"))
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(f"DATASET_NAME: {self.address}: item {index + 1} of the list is not a JSON object")
        return rows

    def records(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        yield from self._load()[start:stop]


def _kind_of_values(values: Sequence[Any]) -> str:
    """A column's kind from values of its first rows."""
    present = [value for value in values if value is not None]
    if not present:
        return "nothing"
    if all(isinstance(value, str) for value in present):
        return "numbers" if all(map(_is_number, present)) else "text"
    if all(isinstance(value, (bytes, bytearray)) for value in present):
        return "bytes"
    if all(isinstance(value, (int, float)) for value in present):
        return "numbers"
    if all(isinstance(value, Mapping) for value in present):
        return "audio" if all(value.keys() <= {"bytes", "path"} for value in present) else "structures"
    return "lists" if all(isinstance(value, list) for value in present) else "values of several kinds"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --------------------------------------------------------------------------------------------------------- stream


class _StreamReader(_Reader):
    """Whatever else ``datasets`` can stream, with decoding off; read from the first row each time."""

    can_seek = False
    is_remote = True  # or members of an archive

    def __init__(self, files: Sequence[str], features: Mapping[str, Any], builder: Any, split: str) -> None:
        self.builder = builder
        self.split = split
        self.folder = posixpath.dirname(files[0])
        info = (builder.info.splits or {}).get(split)
        self.num_rows = (info.num_examples or None) if info else None
        sample = list(islice(self._examples(), 5))
        if not sample:
            self.num_rows = 0
        names = dict.fromkeys(name for example in sample for name in example)
        self.kinds = {name: _kind_of_values([example.get(name) for example in sample]) for name in names}
        known = builder.info.features.to_dict() if builder.info.features else dict(features)
        for name in names:
            kind = known[name].get("_type") if _is_feature(known, name) else None
            self.kinds[name] = {"Audio": "audio", "Image": "media", "Video": "media"}.get(kind, self.kinds[name])
        self.labels = {
            name: known[name]["names"]
            for name in names
            if _is_feature(known, name) and known[name].get("_type") == "ClassLabel"
        }

    def records(
        self, columns: Sequence[str], start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for example in islice(self._examples(), start, stop):
            yield self.folder, {name: example[name] for name in columns if name in example}

    def _examples(self) -> Iterator[dict[str, Any]]:
        advice = "convert the dataset to parquet with the audio embedded, or unpack it to files with a metadata.csv"
        try:
            # The raw examples: the public iterator encodes audio once more, which asks for torchcodec.
            for _, example in self.builder.as_streaming_dataset(self.split)._ex_iterable:
                yield _flattened(example)
        except UserError:
            raise
        except Exception as error:  # readers of a dozen formats raise what they like
            raise UserError(
                f"DATASET_NAME: {self.folder} (format {self.builder.name}) cannot be streamed "
                f"({_first_line(error)}); {advice}"
            ) from error


def _flattened(example: dict[str, Any]) -> dict[str, Any]:
    """A webdataset keeps a row's fields in one JSON member; its keys become columns."""
    inner = example.get("json")
    fields_inside = inner if isinstance(inner, Mapping) else {}
    return {**fields_inside, **{key: value for key, value in example.items() if key not in ("__url__", "json")}}
