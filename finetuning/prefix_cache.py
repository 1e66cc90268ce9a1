"""What the frozen layers compute for a row is the same in every epoch; here it is kept (PREFIX_CACHE).

An entry is the row's (L, H) input of the first layer that trains, in bfloat16 (float32 with MIXED_PRECISION=no), under
a key of all that it is made of: the row's ids and codes, its speaker's vector, and a hash of the frozen weights.

Each row is computed alone and used as it is kept, rounded. So on one kind of device it makes no difference to a run,
not even in the last bit, whether an entry was found or computed again: after a resume, in another process, or where it
found no room.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import psutil
import torch
import xxhash
from accelerate import Accelerator

from finetuning.console import say
from finetuning.dataset import Batch, split_batch, to_device
from finetuning.errors import UserError
from finetuning.objective import TrainingObjective
from finetuning.settings import Settings
from finetuning.sharding import asks_for_fsdp
from finetuning.steps import TrainingSteps

#: Rows whose length stands for that of all when the size is estimated.
NUM_SAMPLED_ROWS = 64
#: Of the memory that is free at the start.
MAX_MEMORY_SHARE = 0.5
#: Raise it when the same key would hold something else.
FORMAT = 1
#: Length of the digest in front of an entry on disk.
_DIGEST_BYTES = 16


class Store(Protocol):
    """Entries by key; one that finds no room is not kept."""

    def get(self, key: str) -> bytearray | None: ...

    def put(self, key: str, entry: bytes) -> None: ...


class PrefixCache:
    """Gives batches their ``prefix``.

    Args:
        objective: not wrapped; its frozen layers compute what is missing.
    """

    def __init__(
        self, objective: TrainingObjective, accelerator: Accelerator, dtype: torch.dtype, store: Store
    ) -> None:
        self.objective, self.accelerator, self.dtype, self.store = objective, accelerator, dtype, store
        self._width = objective.speaker_vectors.shape[1]
        self._vectors = objective.speaker_vectors.cpu()

    def attach(self, batch: Batch) -> Batch:
        """The batch, on the CPU, with ``prefix``: (N, H), see ``TrainingObjective.prefix``, rounded to the dtype."""
        keys = list(self._keys(batch))
        found = [self.store.get(key) for key in keys]
        rows = split_batch(batch, len(keys)) if None in found else [None] * len(keys)
        prefixes = [
            self._computed(key, row) if entry is None else self._read(entry)
            for key, entry, row in zip(keys, found, rows, strict=True)
        ]
        return batch | {"prefix": torch.cat(prefixes)}

    def _keys(self, batch: Batch) -> Iterator[str]:
        lengths, frames = batch["attention_mask"].sum(1).tolist(), batch["frame_mask"].sum(1).tolist()
        text_ids, codec_ids, codes = (batch[name].numpy() for name in ("text_ids", "codec_ids", "codes"))
        vectors = batch.get("row_vectors", self._vectors[batch["speaker_index"]]).numpy()
        first = 0
        for row, (length, num_frames) in enumerate(zip(lengths, frames, strict=True)):
            position = int(batch["speaker_positions"][row])
            digest = xxhash.xxh3_128(text_ids[row, :length].tobytes())
            digest.update(codec_ids[row, :length].tobytes())
            digest.update(codes[first : first + num_frames].tobytes())
            digest.update(vectors[row].tobytes() + str(position).encode())
            first += num_frames
            yield digest.hexdigest()

    def _computed(self, key: str, row: Batch) -> torch.Tensor:
        with self.accelerator.autocast():
            prefix = self.objective.prefix(to_device(row, self.accelerator.device))
        prefix = prefix.to(self.dtype).cpu()
        self.store.put(key, prefix.view(torch.uint8).numpy().tobytes())
        return prefix

    def _read(self, entry: bytearray) -> torch.Tensor:
        return torch.frombuffer(entry, dtype=self.dtype).view(-1, self._width)


# ---------------------------------------------------------------------------------------------------------- stores


class MemoryStore:
    """Entries in this process's memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self._num_bytes = max_bytes, 0
        self._entries: dict[str, bytearray] = {}

    def get(self, key: str) -> bytearray | None:
        return self._entries.get(key)

    def put(self, key: str, entry: bytes) -> None:
        if key not in self._entries and self._num_bytes + len(entry) <= self.max_bytes:
            self._entries[key] = bytearray(entry)
            self._num_bytes += len(entry)


class DiskStore:
    """Entries as files ``folder/<name>/<key>``, which processes and later runs share.

    All names together take at most ``max_bytes``. When it is full, other names go, the longest unused first; of its own
    it then takes no more, since an epoch that comes round again would find just what had been thrown out.

    Args:
        name: hash of everything that all entries depend on.
        num_writers: processes that write beside each other, about as much each; those of other machines too, whose disk
            this may be. Where it is not, the room that they leave is found when it is counted anew.
    """

    def __init__(self, folder: Path, name: str, max_bytes: int, num_writers: int = 1) -> None:
        self.folder, self.max_bytes, self.num_writers = folder / name, max_bytes, num_writers
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)
        except OSError as error:
            raise UserError(f"PREFIX_CACHE_DIR: {folder} cannot be written ({error.strerror})") from None
        for unfinished in self.folder.glob(".*"):  # of a process that was killed; one at work writes it again
            unfinished.unlink(missing_ok=True)
        self._is_full = False
        self._count()

    def get(self, key: str) -> bytearray | None:
        """The entry, or None where it is missing or damaged."""
        try:
            content = (self.folder / key).read_bytes()
        except OSError:
            return None
        digest, entry = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return bytearray(entry) if digest == xxhash.xxh3_128_digest(entry) else None

    def put(self, key: str, entry: bytes) -> None:
        """Keeps the entry if there is room; a full disk only means that it is not kept."""
        unfinished = self.folder / f".{key}.{os.getpid()}"
        try:
            if self._makes_room(len(entry) + _DIGEST_BYTES):
                self.folder.mkdir(exist_ok=True)  # another run may have made room
                unfinished.write_bytes(xxhash.xxh3_128_digest(entry) + entry)
                unfinished.replace(self.folder / key)
                self._num_bytes_written += len(entry) + _DIGEST_BYTES
        except OSError:
            unfinished.unlink(missing_ok=True)

    def _makes_room(self, num_bytes: int) -> bool:
        if self._is_full or self._has_room(num_bytes):
            return not self._is_full
        for folder in sorted(self._others(), key=_last_used):
            self._count()  # anew each time: the other writers make room as well
            if self._has_room(num_bytes):
                return True
            _remove(folder)
        self._count()
        self._is_full = not self._has_room(num_bytes)
        return not self._is_full

    def _count(self) -> None:
        """What lies there now, by whomever."""
        self._num_bytes_before = sum(map(_bytes_in, [*self._others(), self.folder]))
        self._num_bytes_written = 0

    def _has_room(self, num_bytes: int) -> bool:
        written = (self._num_bytes_written + num_bytes) * self.num_writers  # since it was counted
        return self._num_bytes_before + written <= self.max_bytes

    def _others(self) -> list[Path]:
        """Folders of other names; what else lies there is somebody's own."""
        return [folder for folder in self.folder.parent.iterdir() if _is_name(folder) and folder != self.folder]


def _is_name(path: Path) -> bool:
    """Whether it is called as only a store's folders and entries are, unfinished ones too."""
    return re.fullmatch(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.\d+", path.name) is not None


def _last_used(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return folder.stat().st_mtime_ns
    return 0


def _entries(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [file for file in folder.iterdir() if _is_name(file) and not file.is_dir()]
    return []


def _bytes_in(folder: Path) -> int:
    num_bytes = 0
    for file in _entries(folder):
        with contextlib.suppress(OSError):
            num_bytes += file.stat().st_size
    return num_bytes


def _remove(folder: Path) -> None:
    """Removes a folder of entries. Another process may be at it as well."""
    for file in _entries(folder):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


# ---------------------------------------------------------------------------------------------------- for a run


def make_prefix_cache(
    settings: Settings, objective: TrainingObjective, accelerator: Accelerator, train: TrainingSteps
) -> PrefixCache | None:
    """The cache that PREFIX_CACHE asks for, with a line about its size; None for off.

    Args:
        objective: where its weights will stay, but not wrapped.

    Raises:
        UserError: nothing is frozen at the bottom, or PREFIX_CACHE_DIR cannot be written.
    """
    if settings.prefix_cache == "off":
        return None
    if not objective.num_frozen_layers():
        raise UserError(
            "PREFIX_CACHE: there is nothing to keep, since the lowest layer or something below it trains; set it to off"
        )
    dtype = torch.float32 if settings.mixed_precision == "no" else torch.bfloat16
    max_bytes = int(settings.prefix_cache_gb * 1e9)
    if settings.prefix_cache == "disk":
        how = (FORMAT, dtype, accelerator.mixed_precision, settings.compile, torch.__version__)
        name = hash_of_frozen(objective, " ".join(map(str, how)))
        store: Store = DiskStore(settings.prefix_cache_dir, name, max_bytes, accelerator.num_processes)
    else:
        max_bytes = min(max_bytes, int(MAX_MEMORY_SHARE * psutil.virtual_memory().available))
        store = MemoryStore(max_bytes)
    if accelerator.is_main_process:
        say(describe(settings, train, objective.speaker_vectors.shape[1] * dtype.itemsize, max_bytes))
    return PrefixCache(objective, accelerator, dtype, store)


def check_prefix_cache(settings: Settings) -> None:
    """What PREFIX_CACHE needs of the launch.

    Raises:
        UserError: it asks for FSDP, whose processes gather a layer's weights together, or for several processes that
            would each keep rows which the next epoch gives to another.
    """
    if settings.prefix_cache == "off":
        return
    if asks_for_fsdp():  # they would not all miss the same rows
        raise UserError("PREFIX_CACHE: does not work with FSDP; set PREFIX_CACHE=off, or launch without FSDP")
    if settings.prefix_cache == "ram" and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError(
            "PREFIX_CACHE: ram is for one process; several share PREFIX_CACHE=disk, which may lie in memory as well "
            "(PREFIX_CACHE_DIR=/dev/shm/prefix_cache)"
        )


def hash_of_frozen(objective: TrainingObjective, about: str) -> str:
    """A hash of all weights that a prefix is computed with, and of how."""
    talker = objective.talker
    frozen = talker.model.layers[: objective.num_frozen_layers()]
    tables = (talker.model.text_embedding, talker.model.codec_embedding, talker.code_predictor.model.codec_embedding)
    about += f" {_device_name(objective.speaker_vectors.device)} {len(frozen)} {talker.config._attn_implementation}"
    digest = xxhash.xxh3_128(f"{about} {talker.config.to_json_string()}".encode())
    for module in (*tables, talker.text_projection, *frozen):
        for parameter in module.parameters():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _device_name(device: torch.device) -> str:
    """What sums depend on in their last bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def describe(settings: Settings, train: TrainingSteps, bytes_per_position: int, max_bytes: int) -> str:
    """A line about what the entries take, and whether they find room."""
    needed = estimated_positions(train) * bytes_per_position
    where = f"in {settings.prefix_cache_dir}" if settings.prefix_cache == "disk" else "in memory"
    line = f"Prefix cache: about {needed / 1e9:.2f} GB {where}, at most {max_bytes / 1e9:.2f} GB"
    if needed > max_bytes:
        line += "; rows that find no room are computed in every epoch"
    return line


def estimated_positions(train: TrainingSteps) -> int:
    """Of all rows, from the lengths of some."""
    lengths = [len(train.encoder.encode(row).text) for row in train.rows(NUM_SAMPLED_ROWS)]
    return round(sum(lengths) / max(len(lengths), 1) * train.num_rows)
