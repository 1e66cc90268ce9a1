"""A dataset as a stream of rows with codes, for data that is too large to prepare or not worth keeping.

The order of an epoch is a pure function of (seed, epoch), and a position is (epoch, rows consumed): a stream that is
resumed computes the same order, skips what was consumed without decoding it, and goes on with the same rows. Rows are
encoded in the chunks that ``prepare`` makes, so their codes are the same; codes once computed are kept in a bounded
folder, so the second epoch encodes nothing.

Processes and data workers each take their own part: neighbouring rows where there are many chunks, else every n-th.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from finetuning.audio import Audio
from finetuning.console import say
from finetuning.encoding import CHUNK_ROWS, ClipEncoder, EncodedChunk
from finetuning.manifest import Tally
from finetuning.prepare import DatasetRows, encode_chunks
from finetuning.settings import Settings
from finetuning.workspace import Digest

#: So many neighbouring chunks stay together when an epoch is shuffled, so that a file's parts are read once.
BLOCK_CHUNKS = 16
#: With fewer chunks than this for each share, every share takes rows of all chunks.
MIN_CHUNKS_PER_SHARE = 16

Item = TypeVar("Item")


@dataclass(frozen=True)
class StreamedRow:
    """A row of the stream.

    Attributes:
        index: position in the split, from 0.
        record: as ``prepare`` would write it, without codes.
        codes: (T, 16) int16.
        audio: the clip, where the stream was asked for it.
    """

    index: int
    record: dict[str, Any]
    codes: np.ndarray
    audio: Audio | None = None


@dataclass(frozen=True)
class SplitStream:
    """The rows of a split that belong to one share, in the order of any epoch.

    Attributes:
        rows: the split.
        encoder: for chunks that ``cache`` does not hold.
        buffer_rows: rows of the shuffle buffer; 0 = the order of the split.
        share, num_shares: this part of how many; each row belongs to exactly one.
        left_out: indices that are no part of it (held out for validation, or given already), each once.
        with_audio: give the clips as well.
    """

    rows: DatasetRows
    encoder: ClipEncoder
    cache: CodesCache | None = None
    seed: int = 0
    buffer_rows: int = 0
    share: int = 0
    num_shares: int = 1
    left_out: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    with_audio: bool = False

    def order(self, epoch: int) -> np.ndarray:
        """(rows of this share,) int64: indices in the order of the epoch."""
        own = self._own_rows(self.share)
        chunks = np.array(self._chunks(epoch), dtype=np.int64)
        bounds = zip(*np.searchsorted(own, (chunks * CHUNK_ROWS, (chunks + 1) * CHUNK_ROWS)), strict=True)
        indices = np.concatenate([np.empty(0, dtype=np.int64), *[own[start:stop] for start, stop in bounds]])
        if not self.buffer_rows:
            return indices
        return buffered_shuffle(indices, self.buffer_rows, np.random.default_rng([self.seed, epoch, self.share, 1]))

    def num_rows_of(self, share: int) -> int:
        """How many rows another share has."""
        return len(self._own_rows(share))

    def iterate(self, epoch: int, start: int = 0) -> Iterator[StreamedRow | None]:
        """One item for each position of the epoch's order, from ``start`` on; None for a row that cannot be used.

        Raises:
            UserError: too many rows cannot be used.
        """
        order, tally = self.order(epoch)[start:], Tally()
        is_needed = np.zeros(self.rows.num_rows, dtype=bool)
        is_needed[order] = True
        chunks = [number for number in self._chunks(epoch) if is_needed[_rows_of(number, len(is_needed))].any()]
        loaded = self._load(chunks, tally)
        # Of a whole epoch, whatever is left of this one: a few last rows would be no fair sample.
        num_rows_of_share = self.rows.num_rows // (self.num_shares if self._shares_chunks else 1)
        num_rows_of_share = max(num_rows_of_share, self.rows.num_rows_in(chunks))
        buffer: dict[int, StreamedRow] = {}
        done: set[int] = set()
        for index in order.tolist():
            while index // CHUNK_ROWS not in done:
                number, chunk_rows = next(loaded)
                done.add(number)
                buffer |= {row.index: row for row in chunk_rows if is_needed[row.index]}
                tally.check_share(num_rows_of_share)  # does not wait for the rest where no rest could help
            yield buffer.pop(index, None)
        if epoch == 0:
            self._say_what_was_missing(tally, self.rows.num_rows_in(chunks))

    def _say_what_was_missing(self, tally: Tally, announced: int) -> None:
        if tally.num_bad:
            say(f"skipped {tally.summary('of the stream')}")
        if (found := tally.num_good + tally.num_bad) < announced:
            split = self.rows.split
            say(f"{split.dataset_name}, split {split.name}: only {found} of {announced} rows are there")

    def _load(self, chunks: list[int], tally: Tally) -> Iterator[tuple[int, list[StreamedRow]]]:
        cached: set[int] = set()

        def from_cache(number: int) -> EncodedChunk | None:
            chunk = self.cache.get(number) if self.cache else None
            cached.update([number] if chunk else [])
            return chunk

        for number, chunk, source in encode_chunks(self.rows, chunks, self.encoder, from_cache, self.with_audio):
            if self.cache and number not in cached:
                self.cache.put(number, chunk)
            tally.add(len(chunk.records), chunk.rejected)
            audio = {row.index: row.audio for row in source}
            records = zip(chunk.records, chunk.codes, strict=True)
            indexed = [(record["dataset_index"], record, codes) for record, codes in records]
            yield number, [StreamedRow(index, record, codes, audio.get(index)) for index, record, codes in indexed]

    # ------------------------------------------------------------------------------------------ which rows, in order

    def _chunks(self, epoch: int) -> list[int]:
        """The chunks of this share's rows in the order in which the epoch reads them."""
        chunks = np.unique(self._own_rows(self.share) // CHUNK_ROWS).tolist()
        if not self.buffer_rows or not self.rows.split.can_seek:
            return chunks
        blocks = [chunks[at : at + BLOCK_CHUNKS] for at in range(0, len(chunks), BLOCK_CHUNKS)]
        order = np.random.default_rng([self.seed, epoch, self.share, 0]).permutation(len(blocks))
        return [number for block in order for number in blocks[block]]

    @property
    def _shares_chunks(self) -> bool:
        return self.rows.num_chunks >= MIN_CHUNKS_PER_SHARE * self.num_shares

    def _own_rows(self, share: int) -> np.ndarray:
        """(rows of a share,) int64, sorted; the shares are equal to within one row."""
        is_left = np.ones(self.rows.num_rows, dtype=bool)
        is_left[self.left_out] = False
        rows = np.flatnonzero(is_left)
        return np.array_split(rows, self.num_shares)[share] if self._shares_chunks else rows[share :: self.num_shares]


def _rows_of(chunk: int, num_rows: int) -> slice:
    return slice(chunk * CHUNK_ROWS, min((chunk + 1) * CHUNK_ROWS, num_rows))


def buffered_shuffle(indices: np.ndarray, buffer_rows: int, generator: np.random.Generator) -> np.ndarray:
    """The order in which a shuffle buffer of ``buffer_rows`` gives back ``indices`` that go through it.

    A full buffer gives one row at random and takes the next; at the end it is emptied in random order.
    """
    buffer = indices[:buffer_rows].copy()
    if len(indices) <= buffer_rows:
        return generator.permutation(buffer)
    shuffled = np.empty_like(indices)
    incoming = indices[buffer_rows:]
    for at, slot in enumerate(generator.integers(0, buffer_rows, len(incoming))):
        shuffled[at], buffer[slot] = buffer[slot], incoming[at]
    shuffled[len(incoming) :] = generator.permutation(buffer)
    return shuffled


# ------------------------------------------------------------------------------------------------------------ cache


@dataclass(frozen=True)
class CodesCache:
    """Encoded chunks on disk: ``folder/<name>/<number>.safetensors``, all names together at most ``max_bytes``.

    When it is full, chunks of other names go, the oldest first; of its own it then takes no more, since an epoch that
    comes round again would find just what had been thrown out.

    Attributes:
        name: digest of all that the chunks are made of.
    """

    folder: Path
    name: str
    max_bytes: int

    def get(self, number: int) -> EncodedChunk | None:
        """The chunk, or None where it is missing, damaged, or its clips were replaced."""
        file = self._file(number)
        chunk = EncodedChunk.load_valid(file)
        if chunk is not None:
            with contextlib.suppress(OSError):
                os.utime(file)
        return chunk

    def put(self, number: int, chunk: EncodedChunk) -> None:
        """Keeps the chunk if there is room; a full disk only means that it is not kept."""
        file = self._file(number)
        with contextlib.suppress(OSError):
            chunk.save(file)
            self._make_room(file)

    def _file(self, number: int) -> Path:
        return self.folder / self.name / f"{number:06d}.safetensors"

    def _make_room(self, newest: Path) -> None:
        files = [(file, file.stat()) for file in self.folder.glob("*/*.safetensors")]
        excess = sum(status.st_size for _, status in files) - self.max_bytes
        others = sorted((status.st_mtime_ns, file) for file, status in files if file.parent.name != self.name)
        for _, file in others:
            if excess <= 0:
                return
            excess -= file.stat().st_size
            file.unlink(missing_ok=True)
        if excess > 0:
            newest.unlink(missing_ok=True)


def settings_cache(settings: Settings, rows: DatasetRows) -> CodesCache | None:
    """The cache for these rows in CODES_CACHE_DIR; None where CODES_CACHE_GB is 0."""
    max_bytes = int(settings.codes_cache_gb * 1e9)
    name = Digest(rows.digest(), rows.num_rows).hex()
    return CodesCache(settings.codes_cache_dir, name, max_bytes) if max_bytes else None


# --------------------------------------------------------------------------------------------------------- prefetch


def prefetched(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The items, made ahead by a thread of its own, at most ``depth`` at a time; an error arrives in its place."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((kind, value), timeout=0.1)
                return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            put("error", error)
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join(timeout=10.0)
