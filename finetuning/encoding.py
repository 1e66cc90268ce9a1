"""Clips to codes: decoded in worker processes, batched by length, encoded on the device, a chunk of rows at a time.

The chunk of CHUNK_ROWS consecutive rows is the unit of everything. Batches are made inside it, so a clip's neighbours,
and with them its codes to the last bit, depend neither on where a run was interrupted, nor on how many processes share
it, nor on whether rows are prepared ahead or streamed. A chunk is done when its file exists.

Nothing queues up: a worker holds at most two batches that are not yet encoded.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from tqdm import tqdm

from finetuning.audio import Audio, AudioError, audio_duration_seconds, load_audio
from finetuning.augment import AugmentedClip
from finetuning.codec import FRAMES_PER_SECOND, NUM_CODEBOOKS, Codec
from finetuning.console import say
from finetuning.manifest import MAX_CODEC_FRAMES, is_copy
from finetuning.quality import measure_clip

#: Rows of a chunk: enough for batches of similar length, few enough to lose little to a kill.
CHUNK_ROWS = 256
#: Seconds of audio in one batch of the codec; on a GPU of 16 GB this stays far below its memory.
MAX_SECONDS_PER_BATCH = 120.0
#: The longest clip of a batch is at most so much longer than the shortest: a second, or this share of it. The codec's
#: time is that of the padded audio.
MAX_EXTRA_SECONDS, MAX_EXTRA_SHARE = 1.0, 0.25
#: Batches that each worker decodes ahead.
BATCHES_AHEAD = 2
#: Without a terminal, progress is a line every so many seconds.
SECONDS_BETWEEN_LINES = 30.0

Key = TypeVar("Key")
#: What can be encoded.
Clip = Audio | AugmentedClip


@dataclass(frozen=True)
class EncodedClip:
    """What became of one clip.

    Attributes:
        codes: (T, 16) int16, or None for a clip that cannot be used.
        measures: see ``quality.measure_clip``; None where codes are.
        problem: why it cannot be used.
        augmentation: what was done to it; None for a clip as it is.
    """

    codes: np.ndarray | None = None
    measures: dict[str, Any] | None = None
    problem: str | None = None
    augmentation: dict[str, Any] | None = None


class ClipEncoder:
    """Encodes clips through the codec of ``codec_folder``, which is loaded when the first clip needs it.

    Args:
        device: where the codec runs.
        num_workers: processes that decode and resample; 0 = this one.
        max_clips_per_batch: clips in one batch of the codec, and at most MAX_SECONDS_PER_BATCH of padded audio.
    """

    def __init__(
        self, codec_folder: Path, device: str = "cpu", num_workers: int = 0, max_clips_per_batch: int = 32
    ) -> None:
        self.codec_folder, self.device = codec_folder, device
        self.num_workers, self.max_clips_per_batch = num_workers, max_clips_per_batch
        self._codec: Codec | None = None

    def encode(
        self, chunks: Iterable[tuple[Key, Sequence[Clip]]], progress: Progress | None = None
    ) -> Iterator[tuple[Key, list[EncodedClip]]]:
        """Each chunk's clips in their order.

        Args:
            chunks: (anything that names the chunk, its clips); read ahead by a few batches. A chunk may be empty.
            progress: is told of every batch.
        """
        import torch
        from torch.utils.data import DataLoader

        waiting: deque[tuple[Key, int]] = deque()
        loader = DataLoader(
            _Decoder(),
            sampler=self._batches(chunks, waiting),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=BATCHES_AHEAD if self.num_workers else None,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the global one belongs to training
        )
        encoded: dict[int, EncodedClip] = {}
        for batch in loader:
            done = self._encode_batch(batch.clips)
            encoded |= done
            if progress:
                frames = sum(len(clip.codes) for clip in done.values() if clip.codes is not None)
                progress.advance(len(done), frames / FRAMES_PER_SECOND)
            if batch.is_last:
                key, num_clips = waiting.popleft()
                yield key, [encoded[position] for position in range(num_clips)]
                encoded = {}

    def _batches(
        self, chunks: Iterable[tuple[Key, Sequence[Clip]]], waiting: deque[tuple[Key, int]]
    ) -> Iterator[_Batch]:
        for key, clips in chunks:
            waiting.append((key, len(clips)))
            batches = plan_batches([_duration_seconds(clip) for clip in clips], self.max_clips_per_batch)
            for number, positions in enumerate(batches, 1):
                chosen = {position: clips[position] for position in positions}
                yield _Batch(chosen, is_last=number == len(batches))
            if not batches:
                yield _Batch({}, is_last=True)

    def _encode_batch(self, decoded: dict[int, _Decoded]) -> dict[int, EncodedClip]:
        usable = [position for position, clip in decoded.items() if clip.problem is None]
        codes = self._encode([decoded[position].waveform for position in usable])
        failed = {position: EncodedClip(problem=clip.problem) for position, clip in decoded.items() if clip.problem}
        return failed | {
            position: EncodedClip(clip_codes, decoded[position].measures, augmentation=decoded[position].augmentation)
            for position, clip_codes in zip(usable, codes, strict=True)
        }

    def _encode(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        if not waveforms:
            return []
        import torch

        if self._codec is None:
            self._codec = Codec(self.codec_folder, self.device)
        try:
            return self._codec.encode(waveforms)
        except torch.cuda.OutOfMemoryError:
            if len(waveforms) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(waveforms) // 2
        return self._encode(waveforms[:half]) + self._encode(waveforms[half:])


def plan_batches(seconds: Sequence[float], max_clips: int) -> list[list[int]]:
    """Positions of clips in batches of similar length.

    Args:
        seconds: length of every clip.
        max_clips: in one batch, which also holds at most MAX_SECONDS_PER_BATCH, padding included, or one clip, and no
            clips of very different lengths.
    """
    batches: list[list[int]] = []
    for position in np.argsort(np.asarray(seconds), kind="stable").tolist():
        # Sorted, so this clip would be the longest of its batch.
        if not batches or _is_full(batches[-1], seconds, seconds[position], max_clips):
            batches.append([])
        batches[-1].append(position)
    return batches


def _is_full(batch: list[int], seconds: Sequence[float], longest: float, max_clips: int) -> bool:
    shortest = seconds[batch[0]]
    return (
        len(batch) == max_clips
        or longest * (len(batch) + 1) > MAX_SECONDS_PER_BATCH
        or longest - shortest > max(MAX_EXTRA_SECONDS, MAX_EXTRA_SHARE * shortest)
    )


@dataclass(frozen=True)
class _Decoded:
    waveform: np.ndarray | None = None
    measures: dict[str, Any] | None = None
    problem: str | None = None
    augmentation: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Batch:
    """Position in the chunk -> clip, before or after decoding; ``is_last`` of its chunk."""

    clips: dict[int, Any]
    is_last: bool


class _Decoder:
    """The worker's side, as a map-style dataset that is indexed by batches."""

    def __getitem__(self, batch: _Batch) -> _Batch:
        return _Batch({position: _decode(clip) for position, clip in batch.clips.items()}, batch.is_last)

    def __len__(self) -> int:
        raise TypeError("the number of batches is not known ahead")


def _duration_seconds(clip: Clip) -> float:
    seconds = clip.duration_seconds() if isinstance(clip, AugmentedClip) else audio_duration_seconds(clip)
    return seconds or 0.0


def _decode(clip: Clip) -> _Decoded:
    try:
        seconds = _duration_seconds(clip)
        if seconds * FRAMES_PER_SECOND > MAX_CODEC_FRAMES:
            raise AudioError(
                f"{seconds:.0f} s long, more than the {MAX_CODEC_FRAMES} frames that can be generated; cut it"
            )
        waveform, augmentation = clip.load() if isinstance(clip, AugmentedClip) else (load_audio(clip), None)
    except AudioError as error:
        return _Decoded(problem=str(error))
    return _Decoded(waveform, measure_clip(waveform), augmentation=augmentation)


def _as_it_is(batch: _Batch) -> _Batch:
    return batch


# ------------------------------------------------------------------------------------------------------ chunk files


@dataclass(frozen=True)
class EncodedChunk:
    """The rows of a chunk as they will stand in the result.

    Attributes:
        records: JSON objects without ``audio_codes``.
        codes: (T, 16) int16 of each record.
        rejected: JSON objects of the rows that were left out, with their ``reason``.
    """

    records: list[dict[str, Any]]
    codes: list[np.ndarray]
    rejected: list[dict[str, Any]]

    @property
    def num_originals(self) -> int:
        """Records that are no altered copies."""
        return sum(not is_copy(record) for record in self.records)

    def save(self, path: Path) -> None:
        """Writes the file under a temporary name and renames it: it is there whole or not at all."""
        from safetensors.numpy import save

        text = json.dumps({"records": self.records, "rejected": self.rejected}, ensure_ascii=False).encode()
        arrays = {
            "codes": np.concatenate([np.empty((0, NUM_CODEBOOKS), np.int16), *self.codes]),
            "num_codec_frames": np.array([len(codes) for codes in self.codes], dtype=np.int32),
            "text": np.frombuffer(text, dtype=np.uint8),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write the same chunk
        try:
            with unfinished.open("wb") as stream:
                stream.write(save(arrays))
                stream.flush()
                os.fsync(stream.fileno())
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load_valid(cls, path: Path) -> EncodedChunk | None:
        """Reads a chunk that may be missing, damaged, or made of clips that were replaced since; then None."""
        try:
            chunk = cls.load(path)
        except (OSError, ValueError, KeyError, SafetensorError):
            return None
        return None if any(clip_has_changed(record.get("codes_source")) for record in chunk.records) else chunk

    @classmethod
    def load(cls, path: Path) -> EncodedChunk:
        """Reads what ``save`` wrote."""
        from safetensors.numpy import load_file

        arrays = load_file(str(path))
        text = json.loads(arrays["text"].tobytes())
        ends = np.cumsum(arrays["num_codec_frames"])
        codes = np.split(arrays["codes"], ends[:-1]) if len(ends) else []
        return cls(text["records"], codes, text["rejected"])


def clip_has_changed(source: Any) -> bool:
    """Whether a row's ``codes_source`` names a clip that is there and is another one now."""
    if not isinstance(source, dict) or not source.get("audio"):
        return False
    try:
        status = os.stat(source["audio"])
    except OSError:
        return False  # codes outlive their audio
    return (status.st_size, status.st_mtime_ns) != (source.get("num_bytes"), source.get("modified_ns"))


# --------------------------------------------------------------------------------------------------------- progress


class Progress:
    """Clips, clips a second, hours of audio and the time left: a bar, or a line now and then without a terminal.

    Args:
        total: clips to do, or None when nobody knows.
        is_shown: False on the processes that are not the main one.
    """

    def __init__(self, total: int | None, description: str = "encode", is_shown: bool = True) -> None:
        self._bar = tqdm(total=total, desc=description, unit="clip", disable=None if is_shown else True)
        self._description, self._total = description, total
        self._num_clips, self._audio_seconds = 0, 0.0
        self._start = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, num_clips: int, audio_seconds: float) -> None:
        self._num_clips += num_clips
        self._audio_seconds += audio_seconds
        self._bar.set_postfix_str(f"{self._audio_seconds / 3600:.2f} h of audio", refresh=False)
        self._bar.update(num_clips)
        if self._bar.disable and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            say(self.line())

    def line(self) -> str:
        """The figures so far."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self._num_clips / seconds
        of_all, left = "", ""
        if self._total:
            of_all = f" of {self._total}"
            remaining = (self._total - self._num_clips) / max(rate, 1e-9)
            left = f", {remaining / 60:.0f} min left"
        audio = f"{self._audio_seconds / 3600:.2f} h of audio"
        return f"{self._description}: {self._num_clips}{of_all} clips, {rate:.1f} clips/s, {audio}{left}"
