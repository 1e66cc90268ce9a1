"""The data side as a Python interface: what ``data_processing`` offers to other programs.

Everything reads the settings (columns, base, codec, cache) from the environment and ``.env``, as the commands do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from finetuning.audio import SAMPLE_RATE_HZ, load_audio
from finetuning.base_model import load_tokenizer, resolve_base
from finetuning.codec import NUM_CODEBOOKS, codec_fingerprint
from finetuning.dataset import RowEncoder, StepDataset
from finetuning.encode_rows import dataset_info
from finetuning.encoding import ClipEncoder
from finetuning.manifest import RowFormat, check_fields
from finetuning.prepare import DatasetRows
from finetuning.preparer import (
    JSONLDataPreparer,
    decoding_workers,
    device_of_this_process,
    find_codec,
    given_reference,
    open_dataset_split,
)
from finetuning.prompt import LayoutIds
from finetuning.row_index import Manifest, open_rows
from finetuning.settings import Settings, load_settings
from finetuning.stream import SplitStream, StreamedRow, prefetched, settings_cache

#: Batches that the streaming loader makes while the consumer is busy.
BATCHES_AHEAD = 2


def prepare_dataset(
    dataset_name: str,
    split: str,
    output_jsonl: str | Path,
    model_path: str | Path | None = None,
    max_samples: int | None = None,
) -> Path:
    """One split of a dataset to a JSONL with codes.

    Args:
        model_path: a base (its codec is taken) or a codec; default TOKENIZER_PATH or that of INIT_MODEL_PATH.

    Raises:
        UserError
    """
    preparer = JSONLDataPreparer(dataset_name, Path(output_jsonl).parent, model_path)
    return preparer.prepare_split(split, max_samples, output_jsonl)


def load_jsonl_dataset(path: str | Path) -> Manifest:
    """The rows of a JSONL, with or without codes, memory-mapped: ``len``, ``rows[i]`` (a dict), ``column(name)``.

    Raises:
        UserError
    """
    return open_rows(Path(path), RowFormat.from_settings(load_settings()), "path", needs_codes=False)


def get_dataset_info(path: str | Path) -> dict[str, Any]:
    """num_samples, hours, seconds, languages, speakers, … of a JSONL; see ``encode_rows.dataset_info``."""
    return dataset_info(Path(path), RowFormat.from_settings(load_settings()))


def create_dataloader(path: str | Path, batch_size: int, shuffle: bool = True) -> DataLoader:
    """Training batches (see ``dataset.Batch``) of a JSONL with codes, tokenized for INIT_MODEL_PATH.

    ``speaker_index`` counts the speakers in the order of their first row. May be handed to ``accelerator.prepare``.

    Raises:
        UserError
    """
    settings = load_settings()
    base = resolve_base(settings)
    rows = open_rows(Path(path), RowFormat.from_settings(settings, base.special_tokens()), "path")
    speakers = {name.lower(): index for index, name in enumerate(rows.distinct("speaker"))}
    encoder = RowEncoder(
        load_tokenizer(base.folder), LayoutIds.from_config(base.config), speakers, {}, base.model_size != "0b6"
    )
    dataset = StepDataset(rows, encoder)
    return DataLoader(
        _Indices(len(rows)), batch_size=batch_size, shuffle=shuffle, num_workers=settings.num_workers,
        collate_fn=dataset.batch,
    )  # fmt: skip


class _Indices:
    """Row numbers, so that a DataLoader (and Accelerate's sharding of it) deals out rows, and a batch reads them."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> int:
        return index


# ---------------------------------------------------------------------------------------------------------- streaming


@dataclass(frozen=True)
class Position:
    """Where a pass through a stream stands: ``rows_consumed`` of this process's rows of the epoch."""

    epoch: int = 0
    rows_consumed: int = 0


class HFDirectDataLoader(IterableDataset):
    """A split of a dataset, row by row with codes, nothing written but a bounded cache of codes.

    Items: ``audio`` (num_samples,) float32 at 24 kHz, ``sr`` 24000, ``text``, ``audio_codes`` (T, 16) int64,
    ``language``, ``speaker``, ``ref_audio``, ``ref_text`` (None where there is none), ``index``.

    Each row goes to exactly one process of a launch and to one data worker. A pass that reaches its end moves on to the
    next epoch. A position (``state_dict``) is right in the process that iterates: with data workers of a DataLoader
    around this call ``set_epoch`` yourself, and use ``get_dataloader`` to resume.

    Args:
        tokenizer_path: folder or Hub id of the codec or of a base; default TOKENIZER_PATH or that of INIT_MODEL_PATH.
        max_samples: only the first so many rows.
        shuffle: by blocks of rows and a buffer of SHUFFLE_BUFFER_ROWS, seeded by (SEED, epoch).
        shard: share the rows among the launched processes. Set it to False for a DataLoader of your own that goes
            through ``accelerator.prepare``, which shares batches itself.
    """

    def __init__(
        self,
        dataset_name: str,
        split: str,
        tokenizer_path: str | Path | None = None,
        max_samples: int | None = None,
        *,
        shuffle: bool = False,
        shard: bool = True,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or load_settings()
        codec_folder, row_format = find_codec(self.settings, tokenizer_path)
        rows = DatasetRows(
            open_dataset_split(self.settings, split, dataset_name), row_format, codec_fingerprint(codec_folder),
            max_samples,
        )  # fmt: skip
        rows.num_rows  # noqa: B018 - asks for max_samples now where nobody knows
        self._row_format, self._reference = row_format, given_reference(self.settings)
        process, num_processes = _process() if shard else (0, 1)
        self._stream = SplitStream(
            rows,
            ClipEncoder(codec_folder, device_of_this_process(self.settings), decoding_workers(self.settings)),
            settings_cache(self.settings, rows),
            self.settings.seed,
            self.settings.shuffle_buffer_rows if shuffle else 0,
            process,
            num_processes,
            with_audio=True,
        )
        self._start = self._position = Position()

    def __len__(self) -> int:
        """Rows of this process, those included that turn out to be unusable."""
        return self._stream.num_rows_of(self._stream.share)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that epoch's: from its first row, or from where ``load_state_dict`` put it."""
        if epoch != self._start.epoch:
            self._start = Position(epoch)
        self._position = self._start

    def state_dict(self) -> dict[str, int]:
        """The position: epoch, and rows of this process that were consumed in it."""
        return asdict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next pass goes on from there; skipped rows are not decoded."""
        self._start = self._position = Position(**state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for position, item in self.positions(_for_worker(self._stream)):
            self._position = position
            if item is not None:
                yield item
        self.finish_epoch()

    def positions(self, stream: SplitStream | None = None) -> Iterator[tuple[Position, dict[str, Any] | None]]:
        """(position behind the row, item or None for a row that cannot be used), from the start of the next pass."""
        epoch, consumed = self._start.epoch, self._start.rows_consumed
        for number, row in enumerate((stream or self._stream).iterate(epoch, consumed), consumed + 1):
            yield Position(epoch, number), None if row is None else self._item(row)

    def finish_epoch(self) -> None:
        """The next pass is the next epoch's."""
        self._start = self._position = Position(self._start.epoch + 1)

    def _item(self, row: StreamedRow) -> dict[str, Any]:
        fields = check_fields(row.record, self._row_format)
        given = self._reference
        return {
            "audio": load_audio(row.audio),
            "sr": SAMPLE_RATE_HZ,
            "text": fields["text"],
            "audio_codes": row.codes.astype(np.int64),
            "language": fields["language"],
            "speaker": fields["speaker"],
            "ref_audio": row.record.get("ref_audio") or (str(given.audio) if given else None),
            "ref_text": fields["ref_text"] or (given.text if given else None),
            "index": row.index,
        }


def get_dataloader(
    dataset_name: str, split: str, batch_size: int, max_samples: int | None = None, *, shuffle: bool = False
) -> StreamLoader:
    """Batches of a dataset that is streamed; see ``StreamLoader``."""
    return StreamLoader(HFDirectDataLoader(dataset_name, split, max_samples=max_samples, shuffle=shuffle), batch_size)


class StreamLoader:
    """Batches of an ``HFDirectDataLoader``, made ahead by a thread while the consumer works.

    It is shared among the launched processes by itself and is no torch DataLoader, so ``accelerator.prepare`` hands it
    back as it is: either way every row reaches exactly one process.

    A batch: lists ``text``, ``language``, ``speaker``, ``ref_audio``, ``ref_text``, ``index``; ``audio`` (B, S) float32
    and ``audio_codes`` (B, T, 16) int64, padded with zeros on the right; ``num_samples``, ``num_codec_frames`` (B,)
    int64; ``sr``. All tensors are on the CPU.
    """

    def __init__(self, dataset: HFDirectDataLoader, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that epoch's; see ``HFDirectDataLoader.set_epoch``."""
        self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """The position behind the last batch that was taken, not the last that was made."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.dataset.load_state_dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for position, items in prefetched(self._batches(), BATCHES_AHEAD):
            self.dataset._position = position
            yield collate_items(items)
        self.dataset.finish_epoch()

    def _batches(self) -> Iterator[tuple[Position, list[dict[str, Any]]]]:
        items: list[dict[str, Any]] = []
        position = Position()
        for position, item in self.dataset.positions():
            items += [item] if item is not None else []
            if len(items) == self.batch_size:
                yield position, items
                items = []
        if items:
            yield position, items


def collate_items(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of ``HFDirectDataLoader`` to the batch of ``StreamLoader``."""
    audio = [torch.from_numpy(item["audio"]) for item in items]
    codes = [torch.from_numpy(item["audio_codes"]) for item in items]
    pad = torch.nn.utils.rnn.pad_sequence
    lists = ("text", "language", "speaker", "ref_audio", "ref_text", "index")
    return {
        **{name: [item[name] for item in items] for name in lists},
        "audio": pad(audio, batch_first=True),
        "audio_codes": pad(codes, batch_first=True).reshape(len(items), -1, NUM_CODEBOOKS),
        "num_samples": torch.tensor([len(clip) for clip in audio]),
        "num_codec_frames": torch.tensor([len(clip) for clip in codes]),
        "sr": SAMPLE_RATE_HZ,
    }


def _process() -> tuple[int, int]:
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def _for_worker(stream: SplitStream) -> SplitStream:
    """This data worker's part of the process's part; a worker decodes by itself and encodes on the CPU."""
    worker = get_worker_info()
    if worker is None:
        return stream
    share = stream.share * worker.num_workers + worker.id
    encoder = ClipEncoder(stream.encoder.codec_folder, "cpu")
    return replace(stream, share=share, num_shares=stream.num_shares * worker.num_workers, encoder=encoder)
