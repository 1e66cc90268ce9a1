"""Readers of the formats that splits are stored in: rows as column -> value, any part of them, audio not decoded.

- parquet and Arrow with pyarrow: a row group or a batch at a time, only the columns that are asked for;
- csv, tsv, jsonl and json as plain tables (the room ``tables``);
- anything else that ``datasets`` streams (webdataset) through that library with decoding off, from the first row only.

What a reader holds in memory does not grow with its rows (but a JSON list is read whole).
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

from finetuning.dataset_files import SplitFiles, first_line, hub_files, is_remote, reading
from finetuning.errors import UserError
from finetuning.tables import open_table

if TYPE_CHECKING:
    import pyarrow

#: Kinds of columns whose values may be large.
BLOB_KINDS = ("audio", "bytes", "media")
#: Features of ``datasets`` that are stored like audio, but are none.
MEDIA_FEATURES = ("Image", "Video", "Pdf", "Mesh")
#: Rows that are taken out of Arrow memory at once: few where clips are embedded, many otherwise.
ROWS_WITH_BLOBS, ROWS_WITHOUT_BLOBS = 16, 4096
#: How many rows tell the columns and their kinds: of a table, and of a stream, where they may hold clips.
NUM_TABLE_SAMPLES, NUM_STREAM_SAMPLES = 100, 5
#: Parallel requests to the Hub: footers of parquet files, and loose clips ahead of the reader.
NUM_HUB_THREADS = 16
#: On the Hub a row group of at most so many bytes is fetched whole (and the next one ahead) …
MAX_GROUP_BYTES = 64 << 20
#: … a larger one in requests of so many bytes.
HUB_READ_BYTES = 8 << 20

#: The folder that a row's relative paths start from, and its columns' values.
Record = tuple[str, dict[str, Any]]


class Reader:
    """What the formats have in common.

    Attributes:
        kinds: column -> audio (struct of bytes and path), bytes, media (images, video), text, or another word that
            says in a message what the column holds.
        labels: column -> names of its class labels.
        num_rows: exact, or None.
        can_seek: whether a late start is cheap.
        is_remote: clips may have to be fetched one by one.
    """

    can_seek = True
    is_remote = False
    kinds: dict[str, str]
    labels: dict[str, list[str]]
    num_rows: int | None

    def records(self, columns: Sequence[str], start: int = 0, stop: int = sys.maxsize) -> Iterator[Record]:
        """These columns of rows start to stop; a table's rows lack those that their file does not have.

        Raises:
            UserError: a file cannot be read (any more).
        """
        raise NotImplementedError

    def _rows_at_once(self, columns: Sequence[str]) -> int:
        has_blobs = any(self.kinds[name] in BLOB_KINDS for name in columns)
        return ROWS_WITH_BLOBS if has_blobs else ROWS_WITHOUT_BLOBS


def open_reader(files: SplitFiles) -> Reader:
    """The reader of a split's format.

    Raises:
        UserError: a file cannot be read.
    """
    readers = {"parquet": _ParquetReader, "arrow": _ArrowReader, "table": _TableReader, "stream": _StreamReader}
    return readers[files.format](files.files, files.features, **files.options)


def ahead(tasks: Iterable[Callable[[], Any]], num_threads: int, num_ahead: int) -> Iterator[Any]:
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


def _feature_types(features: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Column -> Audio, Value, ClassLabel, … for those of the columns whose feature is known."""
    known = {name: features[name] for name in names if isinstance(features.get(name), Mapping)}
    return {name: str(feature.get("_type", "")) for name, feature in known.items()}


def _class_labels(features: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, list[str]]:
    return {name: list(features[name].get("names") or ()) for name, kind in types.items() if kind == "ClassLabel"}


# ----------------------------------------------------------------------------------------------- parquet and Arrow


def _records_of(
    batches: Iterable[pyarrow.RecordBatch], folder: str, index: int, start: int, stop: int, rows_at_once: int
) -> Iterator[Record]:
    """Rows start to stop of the split, as far as they lie in the batches, the first of which starts at row index."""
    for batch in batches:
        first, last = max(start - index, 0), min(stop - index, batch.num_rows)
        index += batch.num_rows
        for at in range(first, last, rows_at_once):
            for record in batch.slice(at, min(rows_at_once, last - at)).to_pylist():
                yield folder, record


@dataclass(frozen=True)
class _Piece:
    """Row groups of one parquet file: ``groups``, the first of which starts at row ``index`` of the split."""

    path: str
    groups: Sequence[int]
    index: int


class _ParquetReader(Reader):
    """Parquet files, local or on the Hub; files and row groups outside the rows that are asked for are not read."""

    def __init__(self, files: Sequence[str], features: Mapping[str, Any]) -> None:
        self.files = list(files)
        self.is_remote = is_remote(files)
        hub = hub_files() if self.is_remote else None
        for folder in {posixpath.dirname(file) for file in files} if hub else ():
            with reading(folder):
                hub.ls(folder)  # the sizes of all files in one request
        tasks = (partial(_row_group_sizes, file, hub) for file in self.files)
        self.group_rows = list(ahead(tasks, NUM_HUB_THREADS, 2 * NUM_HUB_THREADS))
        self.num_rows = sum(map(sum, self.group_rows))
        with reading(self.files[0]), _parquet(self.files[0], hub) as file:
            schema = file.schema_arrow
        self.kinds, self.labels = _describe_schema(schema, features)

    def records(self, columns: Sequence[str], start: int = 0, stop: int = sys.maxsize) -> Iterator[Record]:
        rows_at_once = self._rows_at_once(columns)
        for piece, batches in self._opened(self._pieces(start, stop), columns):
            folder = posixpath.dirname(piece.path)
            with reading(piece.path):
                yield from _records_of(batches, folder, piece.index, start, stop, rows_at_once)

    def _pieces(self, start: int, stop: int) -> list[_Piece]:
        pieces, index = [], 0
        for path, sizes in zip(self.files, self.group_rows, strict=True):
            starts = list(accumulate(sizes, initial=index))[:-1]
            groups = [group for group, at in enumerate(starts) if at < stop and start < at + sizes[group]]
            if groups:
                pieces.append(_Piece(path, groups, starts[groups[0]]))
            index += sum(sizes)
        return pieces

    def _opened(
        self, pieces: Sequence[_Piece], columns: Sequence[str]
    ) -> Iterator[tuple[_Piece, Iterable[pyarrow.RecordBatch]]]:
        """Each piece with its record batches."""
        hub = hub_files() if self.is_remote else None
        rows_at_once = self._rows_at_once(columns)
        if hub and rows_at_once == ROWS_WITHOUT_BLOBS:  # small, and many requests: several files at once
            tasks = (partial(_read_groups, piece, columns, hub) for piece in pieces)
            yield from zip(pieces, ahead(tasks, NUM_HUB_THREADS, NUM_HUB_THREADS), strict=True)
            return
        for piece in pieces:
            with reading(piece.path), _parquet(piece.path, hub) as file:
                if hub and _largest_group_bytes(file, piece.groups, columns) <= MAX_GROUP_BYTES:
                    yield piece, _groups_ahead(piece, columns, hub, file.metadata)
                else:
                    options = {"columns": list(columns), "use_threads": False}
                    yield piece, file.iter_batches(rows_at_once, row_groups=piece.groups, **options)


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
        for table in ahead(tasks, 1, 1):
            yield from table.to_batches()


def _read_groups(piece: _Piece, columns: Sequence[str], hub: Any) -> list[pyarrow.RecordBatch]:
    with reading(piece.path), _parquet(piece.path, hub) as file:
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
    with reading(path), _parquet(path, hub) as file:
        return [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]


class _ArrowReader(Reader):
    """Local Arrow files (streams as ``datasets`` writes them, or random access), memory-mapped."""

    def __init__(self, files: Sequence[str], features: Mapping[str, Any]) -> None:
        self.files = list(files)
        self.file_rows: list[int] = []
        for path in self.files:
            with reading(path), _arrow_batches(path) as (schema, batches):
                if not self.file_rows:
                    self.kinds, self.labels = _describe_schema(schema, features)
                self.file_rows.append(sum(batch.num_rows for batch in batches))
        self.num_rows = sum(self.file_rows)

    def records(self, columns: Sequence[str], start: int = 0, stop: int = sys.maxsize) -> Iterator[Record]:
        rows_at_once, index = self._rows_at_once(columns), 0
        for path, num_rows in zip(self.files, self.file_rows, strict=True):
            if index < stop and start < index + num_rows:
                with reading(path), _arrow_batches(path) as (schema, batches):
                    present = [name for name in columns if name in schema.names]
                    wanted = (batch.select(present) for batch in batches)
                    yield from _records_of(wanted, posixpath.dirname(path), index, start, stop, rows_at_once)
            index += num_rows


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
    types = _feature_types(features, schema.names)
    kinds = {field.name: _kind_of_type(field.type, types.get(field.name, "")) for field in schema}
    return kinds, _class_labels(features, types)


def _kind_of_type(arrow_type: pyarrow.DataType, feature: str) -> str:
    import pyarrow.types as types

    if types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    if feature in MEDIA_FEATURES:
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


# ---------------------------------------------------------------------------------------------- tables and streams


class _TableReader(Reader):
    """csv, tsv, jsonl and json files. Row offsets are kept for every thousandth row, so that rows can be sought."""

    def __init__(self, files: Sequence[str], features: Mapping[str, Any], delimiter: str | None = None) -> None:
        self.is_remote = is_remote(files)
        self.tables = [open_table(file, delimiter) for file in files]
        self.num_rows = sum(table.num_rows for table in self.tables)
        sample = [record for _, record in islice(self._all_records(0, sys.maxsize), NUM_TABLE_SAMPLES)]
        names = dict.fromkeys(name for table in self.tables for name in table.header)
        names |= dict.fromkeys(name for record in sample for name in record)
        types = _feature_types(features, names)
        self.kinds = {name: _kind_of_values([record.get(name) for record in sample]) for name in names}
        for name, kind in types.items():
            if kind == "Value" and self.kinds[name] == "nothing":
                self.kinds[name] = "text"
        self.labels = _class_labels(features, types)

    def records(self, columns: Sequence[str], start: int = 0, stop: int = sys.maxsize) -> Iterator[Record]:
        for folder, record in self._all_records(start, stop):
            yield folder, {name: record[name] for name in columns if name in record}

    def _all_records(self, start: int, stop: int) -> Iterator[Record]:
        first = 0
        for table in self.tables:
            if first < stop and start < first + table.num_rows:
                for record in table.records(max(start - first, 0), stop - first):
                    yield table.folder, record
            first += table.num_rows


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


class _StreamReader(Reader):
    """Whatever else ``datasets`` can stream, with decoding off; read from the first row each time."""

    can_seek = False
    is_remote = True  # or members of an archive

    def __init__(self, files: Sequence[str], features: Mapping[str, Any], builder: Any, split: str) -> None:
        self.builder = builder
        self.split = split
        self.folder = posixpath.dirname(files[0])
        sample = list(islice(self._examples(), NUM_STREAM_SAMPLES))
        info = (builder.info.splits or {}).get(split)
        self.num_rows = (info.num_examples or None) if info else None
        if not sample:
            self.num_rows = 0
        names = dict.fromkeys(name for example in sample for name in example)
        known = builder.info.features.to_dict() if builder.info.features else features
        types = _feature_types(known, names)
        self.kinds = {name: _kind_of_values([example.get(name) for example in sample]) for name in names}
        self.kinds |= {name: "audio" for name, kind in types.items() if kind == "Audio"}
        self.kinds |= {name: "media" for name, kind in types.items() if kind in MEDIA_FEATURES}
        self.labels = _class_labels(known, types)

    def records(self, columns: Sequence[str], start: int = 0, stop: int = sys.maxsize) -> Iterator[Record]:
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
                f"({first_line(error)}); {advice}"
            ) from error


def _flattened(example: dict[str, Any]) -> dict[str, Any]:
    """A webdataset keeps a row's fields in one JSON member; its keys become columns."""
    inner = example.get("json")
    fields_inside = inner if isinstance(inner, Mapping) else {}
    return {**fields_inside, **{key: value for key, value in example.items() if key not in ("__url__", "json")}}
