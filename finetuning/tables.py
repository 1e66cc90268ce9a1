"""Plain tables: csv, tsv, jsonl and json files as rows of column -> value, any part of them.

One pass counts the rows and keeps an offset every ROWS_PER_OFFSET rows, so that a late row is found without reading
all rows before it. Only a JSON list is read whole.
"""

from __future__ import annotations

import contextlib
import csv
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from finetuning.dataset_files import AUDIO_SUFFIXES, is_remote, path_in_repository, reading, repository
from finetuning.errors import UserError

#: Row offsets are kept for every so many rows.
ROWS_PER_OFFSET = 1024


def open_table(address: str, delimiter: str | None = None) -> Table:
    """A table of any of these formats.

    Args:
        address: a path, or an hf:// address with the commit.
        delimiter: of a csv; None: the likeliest in its first line.

    Raises:
        UserError: it cannot be read, is not UTF-8, a row has more fields than the header, or a quote is not closed.
    """
    with reading(address):
        path = _local_copy(address)
        suffix = path.suffix.lower()
        if suffix in (".csv", ".tsv"):
            return _CsvTable(path, address, "\t" if suffix == ".tsv" else delimiter)
        with path.open("rb") as stream:
            is_list = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        return (_JsonTable if is_list else _JsonLinesTable)(path, address)


def _local_copy(address: str) -> Path:
    """A table's path; one on the Hub goes to the hub's cache first (it holds no audio, so it is small)."""
    if not is_remote([address]):
        return Path(address)
    from huggingface_hub import hf_hub_download

    name, _, revision = repository(address).removeprefix("hf://datasets/").partition("@")
    return Path(hf_hub_download(name, path_in_repository(address), repo_type="dataset", revision=revision))


class Table:
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
        with reading(self.address), _Lines(self.path, *self.offsets[start // ROWS_PER_OFFSET]) as lines:
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


class _CsvTable(Table):
    """Values are strings; empty ones are None. A metadata.csv of LJSpeech (id|text|normalised, no header) is known.

    Where "|" separates fields, quotes are part of the text, unless the header is quoted too.
    """

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
            self.delimiter = "|"
            self.header = ["file_name", "text", "normalized_text"][: len(parts)]
            self._header_end = (0, 0)
        self.header = [name.strip() for name in self.header]
        is_plain = self.delimiter == "|" and (self.is_ljspeech or not first.startswith('"'))
        self.quoting = csv.QUOTE_NONE if is_plain else csv.QUOTE_MINIMAL
        super().__init__(path, address)

    def _after_header(self) -> tuple[int, int]:
        return self._header_end

    def _raw_rows(self, lines: _Lines) -> Iterator[list[str]]:
        taken: list[str] = []  # the lines of one row
        try:
            for row in csv.reader(_noted(lines, taken), delimiter=self.delimiter, quoting=self.quoting):
                if len(taken) > 1 and self._swallows_rows(row, taken):
                    raise self._open_quote(lines.number - len(taken) + 1)
                if len(row) > len(self.header):
                    raise self._too_many_fields(row, lines.number)
                taken.clear()
                if any(row):
                    yield row
        except csv.Error:
            if len(taken) < 2:
                raise
            raise self._open_quote(lines.number - len(taken) + 1) from None  # a field that is too long

    def _swallows_rows(self, row: Sequence[str], lines: Sequence[str]) -> bool:
        """Whether a row of several lines has an open quote and not just line breaks in its text.

        It is wrong by the strict rules, or a line within a field looks like a row: with a tab, or with a clip's name.
        """
        try:
            list(csv.reader(lines, delimiter=self.delimiter, strict=True))
        except csv.Error:
            return True
        inside = [line.split(self.delimiter) for value in row if "\n" in value for line in value.split("\n")]
        return any(len(cells) > 1 and (self.delimiter == "\t" or any(map(_is_clip, cells))) for cells in inside)

    def _open_quote(self, line: int) -> UserError:
        return UserError(
            f"DATASET_NAME: {self.address} line {line} opens a double quote that is not closed before the next row; "
            "close it, or put the whole field in double quotes and write each quote inside it twice"
        )

    def _too_many_fields(self, row: Sequence[str], line: int) -> UserError:
        is_plain = self.quoting == csv.QUOTE_NONE
        advice = "take the" if is_plain else "put a text that contains"
        return UserError(
            f"DATASET_NAME: {self.address} line {line} has {len(row)} fields, the header has {len(self.header)}; "
            f'{advice} "{self.delimiter}" {"out of the text" if is_plain else "in double quotes"}'
        )

    def _record(self, raw: list[str], line: int) -> dict[str, Any]:
        record = {name: value or None for name, value in zip_longest(self.header, raw)}
        if self.is_ljspeech:
            record["file_name"] = f"wavs/{raw[0]}.wav"
        return record


def _noted(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _is_clip(cell: str) -> bool:
    return cell.strip().lower().endswith(AUDIO_SUFFIXES)


class _JsonLinesTable(Table):
    """One JSON object a line."""

    def _raw_rows(self, lines: _Lines) -> Iterator[str]:
        return (line for line in lines if line.strip())

    def _record(self, raw: str, line: int) -> dict[str, Any]:
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(record := json.loads(raw), dict):
                return record
        raise UserError(f"DATASET_NAME: {self.address} line {line} is not a JSON object (one object a line is needed)")


class _JsonTable(Table):
    """A JSON list of objects; the one format that is read whole, each time."""

    def _scan(self) -> None:
        self.num_rows = len(self._load())

    def _load(self) -> list[dict[str, Any]]:
        with reading(self.address):
            rows = json.loads(self.path.read_text(encoding="utf-8-sig"))
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(f"DATASET_NAME: {self.address}: item {index + 1} of the list is not a JSON object")
        return rows

    def records(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        yield from self._load()[start:stop]
