"""A split of a speech dataset as raw rows in a fixed order, its audio not decoded.

A dataset is a Hub id, a folder, or one table file. ``datasets`` finds the files that the room ``dataset_files`` cannot;
all but the rarest formats are read by the room ``readers``, because that library decodes audio through torchcodec,
which is not needed. Loose clips stay paths, those on the Hub become bytes.

What a split holds in memory does not grow with its rows.
"""

from __future__ import annotations

import contextlib
import math
import posixpath
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from finetuning.console import say
from finetuning.dataset_files import find_splits, path_in_repository, reading, repository
from finetuning.errors import UserError
from finetuning.readers import BLOB_KINDS, NUM_HUB_THREADS, Reader, ahead, open_reader
from finetuning.settings import Settings

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
#: A path column beside the audio, and the words of its clip.
REFERENCE, REFERENCE_TEXT = "ref_audio", "ref_text"


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
        other: all remaining columns, JSON-able; audio, images and other bytes are left out. ``ref_audio`` is the
            absolute path of an existing file, or absent with its ``ref_text``; None stays None.
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

    def __init__(self, dataset_name: str, name: str, reader: Reader, columns: ColumnNames, fingerprint: str) -> None:
        self.dataset_name = dataset_name
        self.name = name
        self.columns = columns
        self.fingerprint = fingerprint
        self._reader = reader
        chosen = {columns.text, columns.audio, columns.speaker, columns.language}
        self._other = [key for key, kind in reader.kinds.items() if key not in chosen and kind not in BLOB_KINDS]
        self._wanted = [key for key in reader.kinds if key in chosen] + self._other
        self._has_said_reference = False

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
        records = self._reader.records(self._wanted, start, sys.maxsize if stop is None else stop)
        rows = (self._row(index, folder, record) for index, (folder, record) in enumerate(records, start))
        if not self._reader.is_remote:
            return rows
        return ahead((partial(_with_audio, row) for row in rows), NUM_HUB_THREADS, 2 * NUM_HUB_THREADS)

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
        return SourceRow(index, audio, audio_name, text, speaker, language, self._with_reference(other, index, folder))

    def _with_reference(self, other: dict[str, Any], index: int, folder: str) -> dict[str, Any]:
        """The row's ``ref_audio`` resolved as its audio is; one that is no file here goes, with its ``ref_text``."""
        value = other.get(REFERENCE)
        if value is None:
            return other
        if (path := _local_file(value, folder)) is not None:
            return other | {REFERENCE: path}
        if not self._has_said_reference:
            self._has_said_reference = True
            say(
                f"{_where(self.dataset_name, self.name)}: {REFERENCE} of row {index + 1} ({str(value)[:100]}) is no "
                "file on this machine; it and others like it are left out, as if the column were empty there"
            )
        return {key: kept for key, kept in other.items() if key not in (REFERENCE, REFERENCE_TEXT)}

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
    return list(find_splits(dataset_name, config))


def open_split(dataset_name: str, split: str, names: ColumnNames = ColumnNames(), config: str | None = None) -> Split:
    """Opens a split of a Hub dataset, a local folder or a single table file.

    Args:
        names: columns that the user set; the others are guessed, and a guess is said.
        config: the dataset's configuration (DATASET_CONFIG).

    Raises:
        UserError: no such dataset, configuration, split or column; the Hub is out of reach; no audio; a text column
            that holds no text; an empty split; a file that cannot be read.
    """
    splits = find_splits(dataset_name, config)
    if split not in splits:
        raise UserError(
            f'DATASET_NAME: {dataset_name} has no split "{split}"; it has: {", ".join(splits)} '
            "(choose with --split or TRAIN_SPLIT)"
        )
    files = splits[split]
    reader, where = open_reader(files), _where(dataset_name, split)
    if reader.num_rows == 0:
        raise UserError(f"DATASET_NAME: {where} is empty; choose another split or add rows")
    columns = _resolve_columns(names, reader, where, files.is_folder)
    return Split(dataset_name, split, reader, columns, files.fingerprint())


def _where(dataset_name: str, split: str) -> str:
    return f'{dataset_name} (split "{split}")'


# -------------------------------------------------------------------------------------------------------- columns


def _resolve_columns(names: ColumnNames, reader: Reader, where: str, is_folder: bool) -> ColumnNames:
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
    text = names.text or _guess_text(reader, audio, where)
    if kinds[text] != "text":
        raise UserError(f'TEXT_COLUMN: column "{text}" of {where} holds {kinds[text]}, not text; {_listing(reader)}')
    free = [name for name, kind in kinds.items() if kind not in BLOB_KINDS and name not in (audio, text)]
    speaker = names.speaker or next(iter(_best_tier(free, SPEAKER_TIERS)), None)
    language = names.language or next(iter(_best_tier(free, LANGUAGE_TIERS)), None)
    columns = ColumnNames(text, audio, speaker, language)
    _say_guesses(names, columns, where, usual={"file_name"} if is_folder else set())
    return columns


def _guess_audio(reader: Reader, where: str) -> str:
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


def _guess_text(reader: Reader, audio: str, where: str) -> str:
    if reader.kinds.get("text") not in (None, *BLOB_KINDS):
        return "text"  # where it holds no text, that is the message
    texts = [name for name, kind in reader.kinds.items() if kind == "text" and name != audio]
    fitting = _best_tier(texts, TEXT_TIERS)
    if not fitting:
        raise UserError(
            f"TEXT_COLUMN: {where} has no column that is known to hold transcripts; {_listing(reader)}; set TEXT_COLUMN"
        )
    return _only(fitting, "TEXT_COLUMN", "transcripts", where, reader)


def _best_tier(names: Sequence[str], tiers: Sequence[Sequence[str]]) -> list[str]:
    """Those names that stand in the first tier with any, in the tier's order."""
    for tier in tiers:
        found = [name for known in tier for name in names if name.lower() == known]
        if found:
            return found
    return []


def _only(fitting: Sequence[str], setting: str, what: str, where: str, reader: Reader) -> str:
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


def _listing(reader: Reader) -> str:
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
        inside = posixpath.normpath(posixpath.join(path_in_repository(folder), name))
        leaves = inside.startswith(("..", "/"))
        return Path(name) if leaves else _Url(f"{repository(folder)}/{inside}")
    try:
        given = Path(name).expanduser()
        beside = Path(folder) / given
        return beside if given.is_absolute() or beside.exists() or not given.exists() else given
    except (OSError, RuntimeError, ValueError):  # too long, the home folder of nobody, a zero byte
        return Path(name.replace("\0", "?"))


def _local_file(value: Any, folder: str) -> str | None:
    """The absolute path of the existing file that a value names."""
    name = value.strip() if isinstance(value, str) else ""
    if not name or isinstance(path := _locate(name, folder), _Url):
        return None
    with contextlib.suppress(OSError):  # too long
        return str(path.absolute()) if path.is_file() else None
    return None


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
    with reading(url):
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
