"""The stream: each row once, the same order each time, resumed without decoding, the codes of ``prepare``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from datasets_for_tests import Clip, demo_texts, write_audiofolder, write_parquet
from fakes import FakeCodec, fake_codes

from finetuning.audio import load_audio
from finetuning.codec import Codec
from finetuning.encoding import ClipEncoder
from finetuning.errors import UserError
from finetuning.manifest import RowFormat
from finetuning.prepare import DatasetRows, PrepareOptions, prepare_split
from finetuning.source import open_split
from finetuning.stream import CodesCache, SplitStream, buffered_shuffle, prefetched

NUM_ROWS = 37
MakeStream = Callable[..., SplitStream]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"audio": Clip(seed), "text": f"Sentence {seed}."} for seed in range(NUM_ROWS)]
    return write_parquet(tmp_path_factory.mktemp("set"), rows)


@pytest.fixture
def make_stream(dataset: Path, codec_folder: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStream:
    monkeypatch.setattr("finetuning.prepare.CHUNK_ROWS", 4)
    monkeypatch.setattr("finetuning.stream.CHUNK_ROWS", 4)
    monkeypatch.setattr("finetuning.stream.BLOCK_CHUNKS", 2)

    def make(folder: Path = dataset, codec: Path = codec_folder, max_rows: int | None = None, **options: Any) -> Any:
        rows = DatasetRows(open_split(str(folder), "train"), RowFormat(), "codec", max_rows)
        return SplitStream(rows, ClipEncoder(codec), **options)

    return make


def indices(stream: SplitStream, epoch: int = 0, start: int = 0) -> list[int | None]:
    return [None if row is None else row.index for row in stream.iterate(epoch, start)]


# ------------------------------------------------------------------------------------------------------------ order


def test_the_buffer_gives_every_row_once_and_only_near_its_place() -> None:
    """Independent simulation: a row can leave only after it came in, at most ``buffer_rows`` wait."""
    incoming = np.arange(500)
    shuffled = buffered_shuffle(incoming, 20, np.random.default_rng(0))
    assert sorted(shuffled.tolist()) == incoming.tolist()
    assert all(value <= position + 20 for position, value in enumerate(shuffled))
    assert np.abs(shuffled - incoming).mean() > 10
    assert buffered_shuffle(incoming[:5], 20, np.random.default_rng(0)).tolist() != incoming[:5].tolist()


def test_an_epoch_s_order_is_its_own_and_repeatable(make_stream: MakeStream, fake: FakeCodec) -> None:
    stream = make_stream(buffer_rows=6, seed=3)
    first, second = stream.order(0).tolist(), stream.order(1).tolist()
    assert sorted(first) == sorted(second) == list(range(NUM_ROWS)) and first != second
    assert make_stream(buffer_rows=6, seed=3).order(0).tolist() == first
    assert make_stream(buffer_rows=6, seed=4).order(0).tolist() != first
    assert indices(stream, 0) == first and indices(stream, 1) == second
    assert indices(make_stream()) == list(range(NUM_ROWS))


@pytest.mark.parametrize("num_shares", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("min_chunks", [1, 100])
@pytest.mark.parametrize("buffer_rows", [0, 7])
def test_shares_hold_each_row_once(
    make_stream: MakeStream,
    fake: FakeCodec,
    monkeypatch: pytest.MonkeyPatch,
    num_shares: int,
    min_chunks: int,
    buffer_rows: int,
) -> None:
    """Whether chunks or rows are shared, and though 10 chunks do not divide."""
    monkeypatch.setattr("finetuning.stream.MIN_CHUNKS_PER_SHARE", min_chunks)
    streams = [make_stream(buffer_rows=buffer_rows, share=share, num_shares=num_shares) for share in range(num_shares)]
    seen = [indices(stream) for stream in streams]
    assert sorted(chain(*seen)) == list(range(NUM_ROWS))
    assert [stream.num_rows_of(share) for share, stream in enumerate(streams)] == [len(rows) for rows in seen]
    assert [streams[0].num_rows_of(share) for share in range(num_shares)] == [len(rows) for rows in seen]


def test_rows_that_are_left_out_are_never_seen(make_stream: MakeStream, fake: FakeCodec) -> None:
    left_out = np.array([0, 5, 6, 7, 36])
    for share in (0, 1):
        stream = make_stream(buffer_rows=5, left_out=left_out, share=share, num_shares=2)
        assert not set(indices(stream)) & set(left_out.tolist())
    both = [indices(make_stream(left_out=left_out, share=share, num_shares=2)) for share in (0, 1)]
    assert len(list(chain(*both))) == NUM_ROWS - 5


@pytest.mark.parametrize("num_shares", [2, 3, 5])
@pytest.mark.parametrize("min_chunks", [1, 100])
def test_shares_are_equal_whatever_is_left_out(
    make_stream: MakeStream, monkeypatch: pytest.MonkeyPatch, num_shares: int, min_chunks: int
) -> None:
    """Though whole chunks are gone, and most rows of the first ones."""
    monkeypatch.setattr("finetuning.stream.MIN_CHUNKS_PER_SHARE", min_chunks)
    left_out = np.array([*range(8), 20, 9, 12, 14, 18, 8])
    streams = [make_stream(share=share, num_shares=num_shares, left_out=left_out) for share in range(num_shares)]
    orders = [stream.order(1).tolist() for stream in streams]
    assert sorted(chain(*orders)) == sorted(set(range(NUM_ROWS)) - set(left_out.tolist()))
    sizes = [len(order) for order in orders]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    assert sizes == [streams[0].num_rows_of(share) for share in range(num_shares)]


def test_max_rows(make_stream: MakeStream, fake: FakeCodec) -> None:
    assert sorted(indices(make_stream(max_rows=10, buffer_rows=4))) == list(range(10))


# ----------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("start", [0, 1, 4, 17, 36, 37])
def test_a_resumed_stream_gives_exactly_the_rows_of_the_untouched_one(
    make_stream: MakeStream, fake: FakeCodec, start: int
) -> None:
    stream = make_stream(buffer_rows=6, seed=1)
    untouched = list(stream.iterate(2))
    resumed = list(make_stream(buffer_rows=6, seed=1).iterate(2, start))
    assert [row.index for row in resumed] == [row.index for row in untouched[start:]]
    for row, expected in zip(resumed, untouched[start:], strict=True):
        assert np.array_equal(row.codes, expected.codes) and row.record == expected.record


def test_what_was_consumed_is_not_decoded_again(
    make_stream: MakeStream, fake: FakeCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a shuffle 30 of 37 rows lie in seven whole chunks; the eighth holds two of them and two to come."""
    decoded: list[int] = []
    load = "finetuning.encoding.load_audio"
    from finetuning.audio import load_audio

    monkeypatch.setattr(load, lambda clip: decoded.append(1) or load_audio(clip))
    assert indices(make_stream(), start=30) == list(range(30, 37))
    assert len(decoded) == 37 - 28


def test_a_bad_row_keeps_its_place_and_too_many_stop_the_stream(
    tmp_path: Path, make_stream: MakeStream, fake: FakeCodec, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"audio": Clip(seed), "text": f"Sentence {seed}."} for seed in range(12)]
    rows[2]["audio"].content = b"nothing to hear"
    stream = make_stream(write_parquet(tmp_path / "bad", rows))
    assert indices(stream) == [0, 1, None, *range(3, 12)]
    assert "skipped 1 of 12 rows of the stream" in capsys.readouterr().out
    assert indices(stream, start=3) == list(range(3, 12))
    # The last rows of an epoch are judged as a part of it: here one of three is bad.
    assert indices(replace(stream, left_out=np.arange(3, 12))) == [0, 1, None]
    rows[5]["text"] = ""
    with pytest.raises(UserError, match="rows cannot be used"):
        indices(make_stream(write_parquet(tmp_path / "worse", rows)))


# ------------------------------------------------------------------------------------------------- codes and cache


@pytest.mark.parametrize("write", [write_parquet, write_audiofolder], ids=["parquet", "audiofolder"])
def test_codes_and_records_are_those_of_prepare(
    tmp_path: Path, make_stream: MakeStream, codec: Codec, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "demo", demo_texts(10))
    stream = make_stream(folder, codec.folder, buffer_rows=5)
    stream = replace(stream, rows=replace(stream.rows, codec_id=_fingerprint(codec)))
    options = PrepareOptions(chooses_references=False)
    prepared = prepare_split(open_split(str(folder), "train"), Path("rows.jsonl"), codec.folder, RowFormat(), options)
    import json

    expected = {row["dataset_index"]: row for row in map(json.loads, prepared.read_text().splitlines())}
    streamed = {row.index: row for row in stream.iterate(0)}
    assert streamed.keys() == expected.keys() == set(range(10))
    for index, row in streamed.items():
        assert row.codes.tolist() == expected[index]["audio_codes"]
        assert row.record == {key: value for key, value in expected[index].items() if key != "audio_codes"}


def _fingerprint(codec: Codec) -> str:
    from finetuning.codec import codec_fingerprint

    return codec_fingerprint(codec.folder)


def test_the_second_epoch_neither_reads_nor_encodes(
    tmp_path: Path, make_stream: MakeStream, fake: FakeCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make_stream(cache=CodesCache(tmp_path / "cache", "set", 10_000_000), buffer_rows=6)
    first = {row.index: row for row in stream.iterate(0)}
    assert fake.take_num_clips() == NUM_ROWS
    monkeypatch.setattr(type(stream.rows.split), "rows", _never)
    second = {row.index: row for row in stream.iterate(1)}
    assert fake.take_num_clips() == 0
    assert all(np.array_equal(first[index].codes, row.codes) for index, row in second.items())
    assert all(first[index].record == row.record for index, row in second.items())


def _never(*_: object) -> Iterator[Any]:
    raise AssertionError("the source was read")


def test_the_cache_keeps_within_its_bound_and_prefers_its_own_data(
    tmp_path: Path, make_stream: MakeStream, fake: FakeCodec
) -> None:
    folder = tmp_path / "cache"
    old = make_stream(cache=CodesCache(folder, "old", 10_000_000))
    list(old.iterate(0))
    chunk_bytes = max(file.stat().st_size for file in folder.glob("*/*"))
    bound = 4 * chunk_bytes
    stream = make_stream(cache=CodesCache(folder, "new", bound))
    list(stream.iterate(0))
    assert sum(file.stat().st_size for file in folder.glob("*/*")) <= bound
    assert not list(folder.glob("old/*.safetensors"))
    kept = [int(file.stem) for file in folder.glob("new/*.safetensors")]
    assert len(kept) >= 4
    fake.take_num_clips()
    list(stream.iterate(1))
    assert fake.take_num_clips() == sum(min(4, NUM_ROWS - 4 * chunk) for chunk in range(10) if chunk not in kept)


def test_a_clip_that_was_replaced_is_not_taken_from_the_cache(
    tmp_path: Path, make_stream: MakeStream, fake: FakeCodec
) -> None:
    folder = write_audiofolder(tmp_path / "loose", demo_texts(5))
    stream = make_stream(folder, cache=CodesCache(tmp_path / "cache", "set", 10_000_000))
    list(stream.iterate(0))
    fake.take_num_clips()
    victim = folder / "train" / "train_01.flac"
    soundfile.write(victim, np.random.default_rng(0).normal(0, 0.1, 48_000), 24_000)
    rows = list(stream.iterate(1))
    assert fake.take_num_clips() == 4  # its chunk
    assert rows[0].codes.tolist() == fake_codes(load_audio(victim)).tolist()


def test_fewer_rows_than_announced_are_said(
    tmp_path: Path, make_stream: MakeStream, fake: FakeCodec, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stream = make_stream()
    monkeypatch.setattr(type(stream.rows), "num_rows", 60)
    assert indices(stream) == [*range(NUM_ROWS), *[None] * (60 - NUM_ROWS)]
    assert f"only {NUM_ROWS} of 60 rows are there" in capsys.readouterr().out


def test_a_cut_chunk_of_the_cache_is_encoded_again(tmp_path: Path, make_stream: MakeStream, fake: FakeCodec) -> None:
    stream = make_stream(cache=CodesCache(tmp_path / "cache", "set", 10_000_000))
    expected = [row.codes.tolist() for row in stream.iterate(0)]
    fake.take_num_clips()
    victim = sorted((tmp_path / "cache" / "set").iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:100])
    assert [row.codes.tolist() for row in stream.iterate(0)] == expected
    assert fake.take_num_clips() == 4


# --------------------------------------------------------------------------------------------------------- prefetch


def test_prefetch_keeps_order_and_stays_a_few_items_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    taken = []
    for item in prefetched(items(), 2):
        time.sleep(0.001)
        taken.append(item)
        assert len(made) <= len(taken) + 4
    assert taken == list(range(50))


def test_an_error_arrives_where_the_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken row")

    stream = prefetched(items(), 4)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="broken row"):
        next(stream)


def test_a_stream_that_is_left_stops_its_thread() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1_000_000)
        finally:
            closed.set()

    stream = prefetched(items(), 2)
    assert next(stream) == 0
    stream.close()
    assert closed.wait(5.0)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch" and thread.is_alive()]
