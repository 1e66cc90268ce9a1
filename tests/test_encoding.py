"""Clips to codes: batches, chunk files, workers, progress."""

from __future__ import annotations

import io
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import VOICE
from fakes import FakeCodec, fake_codes

from finetuning.audio import load_audio
from finetuning.encoding import (
    BATCHES_AHEAD,
    MAX_SECONDS_PER_BATCH,
    ClipEncoder,
    EncodedChunk,
    Progress,
    plan_batches,
)
from finetuning.quality import measure_clip

CLIPS = [VOICE / "clips" / f"train_{number:02}.flac" for number in range(1, 9)]


@pytest.mark.parametrize("seed", range(5))
def test_batches_hold_every_clip_once_and_keep_their_bounds(seed: int) -> None:
    generator = np.random.default_rng(seed)
    seconds = [0.0, *generator.lognormal(1.5, 0.8, 300).tolist(), 400.0]
    batches = plan_batches(seconds, max_clips=32)
    assert sorted(chain(*batches)) == list(range(len(seconds)))
    for batch in batches:
        lengths = [seconds[position] for position in batch]
        assert len(batch) <= 32 and (len(batch) == 1 or max(lengths) * len(batch) <= MAX_SECONDS_PER_BATCH)
        assert max(lengths) - min(lengths) <= max(1.0, 0.25 * min(lengths))
    padded = sum(len(batch) * max(seconds[position] for position in batch) for batch in batches)
    assert sum(seconds) / padded > 0.85


def test_no_clips_no_batches() -> None:
    assert plan_batches([], 32) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_chunks_come_back_in_order_whoever_decodes(
    fake: FakeCodec, codec_folder: Path, tmp_path: Path, num_workers: int
) -> None:
    """Files and bytes, an empty chunk and a bad clip among them."""
    (tmp_path / "bad.wav").write_bytes(b"nothing to hear")
    chunks = [
        ("first", [CLIPS[0], CLIPS[1].read_bytes(), tmp_path / "bad.wav", CLIPS[2]]),
        ("empty", []),
        ("missing", [tmp_path / "nowhere.wav"]),
        ("last", CLIPS[3:]),
    ]
    encoded = dict(ClipEncoder(codec_folder, num_workers=num_workers, max_clips_per_batch=2).encode(chunks))
    assert list(encoded) == ["first", "empty", "missing", "last"]
    for name, clips in chunks:
        for audio, clip in zip(clips, encoded[name], strict=True):
            if clip.problem is None:
                waveform = load_audio(audio)
                assert np.array_equal(clip.codes, fake_codes(waveform)) and clip.measures == measure_clip(waveform)
    assert [clip.problem is None for clip in encoded["first"]] == [True, True, False, True]
    assert "not a readable audio file" in encoded["first"][2].problem
    assert encoded["missing"][0].problem == "file not found" and fake.num_built == 1


def test_workers_do_not_run_away(fake: FakeCodec, codec_folder: Path) -> None:
    """Back-pressure: what is read ahead of the codec is bounded, however long the input is."""
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield read, [CLIPS[0]]

    results = ClipEncoder(codec_folder, num_workers=2).encode(endless())
    for taken, _ in zip(range(1, 8), results, strict=False):
        assert read <= taken + 2 * BATCHES_AHEAD + 1
    results.close()


def test_a_batch_that_does_not_fit_is_halved(fake: FakeCodec, codec_folder: Path, monkeypatch) -> None:
    import torch

    encode = fake.encode

    def small_card(waveforms: list[np.ndarray]) -> list[np.ndarray]:
        if len(waveforms) > 2:
            raise torch.cuda.OutOfMemoryError("too much")
        return encode(waveforms)

    monkeypatch.setattr(fake, "encode", small_card)
    ((_, clips),) = ClipEncoder(codec_folder).encode([("one", CLIPS)])
    assert [clip.codes.tolist() for clip in clips] == [fake_codes(load_audio(clip)).tolist() for clip in CLIPS]


def test_chunk_files_keep_what_was_put_in(tmp_path: Path) -> None:
    codes = [np.arange(32, dtype=np.int16).reshape(2, 16), np.full((1, 16), 2047, np.int16)]
    chunk = EncodedChunk([{"text": "Yorùbá \U0001f600", "n": 1}, {"text": "b"}], codes, [{"line": 3, "reason": "bad"}])
    chunk.save(tmp_path / "deep" / "chunk.safetensors")
    loaded = EncodedChunk.load(tmp_path / "deep" / "chunk.safetensors")
    assert (loaded.records, loaded.rejected) == (chunk.records, chunk.rejected)
    assert [clip.tolist() for clip in loaded.codes] == [clip.tolist() for clip in codes]
    assert {clip.dtype for clip in loaded.codes} == {np.dtype(np.int16)}
    EncodedChunk([], [], []).save(tmp_path / "empty.safetensors")
    assert EncodedChunk.load(tmp_path / "empty.safetensors") == EncodedChunk([], [], [])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["chunk.safetensors"]


def test_progress_counts_clips_hours_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("finetuning.encoding.time.monotonic", lambda: now[0])
    with Progress(1000, "prepare train") as progress:
        now[0] += 40.0
        progress.advance(200, 1800.0)
    expected = "prepare train: 200 of 1000 clips, 5.0 clips/s, 0.50 h of audio, 3 min left"
    assert progress.line() == expected
    assert expected in capsys.readouterr().out  # without a terminal: a line after half a minute


def test_mp3_in_memory_is_decoded_like_the_file(fake: FakeCodec, codec_folder: Path, tmp_path: Path) -> None:
    stream = io.BytesIO()
    soundfile.write(stream, load_audio(CLIPS[0]), 24_000, format="MP3")
    (tmp_path / "clip.mp3").write_bytes(stream.getvalue())
    ((_, clips),) = ClipEncoder(codec_folder).encode([("one", [stream.getvalue(), tmp_path / "clip.mp3"])])
    assert np.array_equal(clips[0].codes, clips[1].codes)
