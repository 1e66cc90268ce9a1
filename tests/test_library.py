"""The Python interface: items and batches of a stream, its position, and every row to exactly one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import PROJECT, VOICE
from datasets_for_tests import Clip, demo_texts, write_audiofolder, write_csv_dataset, write_parquet
from fakes import FakeCodec, fake_codes
from torch.utils.data import DataLoader

import data_processing
from finetuning import library, processes
from finetuning.audio import load_audio
from finetuning.codec import Codec
from finetuning.dataset import collate
from finetuning.errors import UserError
from finetuning.library import (
    HFDirectDataLoader,
    StreamLoader,
    create_dataloader,
    get_dataloader,
    get_dataset_info,
    load_jsonl_dataset,
    prepare_dataset,
)

NUM_ROWS = 23
MakeStream = Callable[..., HFDirectDataLoader]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that a caller of the library would have in the environment."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "DEVICE": "cpu", "MIXED_PRECISION": "no", "INIT_MODEL_PATH": "tiny-random", "CODES_CACHE_DIR": "cache",
        "SHUFFLE_BUFFER_ROWS": "6",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.prepare.CHUNK_ROWS", 4)
    monkeypatch.setattr("finetuning.stream.CHUNK_ROWS", 4)


def sentences(count: int) -> list[dict[str, Any]]:
    return [{"audio": Clip(number), "text": f"Sentence {number}."} for number in range(count)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_parquet(tmp_path_factory.mktemp("set"), sentences(NUM_ROWS)))


@pytest.fixture
def make_stream(dataset: str, fake: FakeCodec, small_chunks: None) -> MakeStream:
    """A shuffled stream of 23 rows, with codes that cost nothing."""

    def make(name: str = dataset, **options: Any) -> HFDirectDataLoader:
        return HFDirectDataLoader(name, "train", **({"shuffle": True} | options))

    return make


def rows_of(stream: Any) -> list[int]:
    return [item["index"] for item in stream]


# ------------------------------------------------------------------------------------------------------------ items


@pytest.mark.parametrize("write", [write_parquet, write_audiofolder, write_csv_dataset])
def test_items_are_what_prepare_makes_and_the_clips(tmp_path: Path, codec: Codec, write: Callable) -> None:
    """The real (tiny) codec in three formats: all that the table of names promises."""
    rows = demo_texts(4)
    name = str(write(tmp_path / "set", rows))
    prepared = [json.loads(line) for line in prepare_dataset(name, "train", "rows.jsonl").read_text().splitlines()]
    items = list(HFDirectDataLoader(name, "train", codec.folder))
    assert len(items) == 4
    for number, (item, row) in enumerate(zip(items, prepared, strict=True)):
        assert item.keys() == {
            "audio", "text", "audio_codes", "sr", "language", "speaker", "ref_audio", "ref_text", "index",
        }  # fmt: skip
        assert item["audio"].dtype == np.float32 and item["audio"].ndim == 1 and item["sr"] == 24_000
        assert np.array_equal(item["audio"], load_audio(rows[number]["audio"]))
        assert item["audio_codes"].dtype == np.int64 and item["audio_codes"].tolist() == row["audio_codes"]
        assert (item["text"], item["index"]) == (rows[number]["text"], number)
        assert (item["language"], item["speaker"]) == ("Auto", "reference_speaker")
        assert item["ref_audio"] is None and item["ref_text"] is None


def test_items_have_the_reference_of_the_settings_or_of_their_row(
    tmp_path: Path, fake: FakeCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = VOICE / "clips" / "train_05.flac"
    monkeypatch.setenv("REF_AUDIO_PATH", str(given))
    monkeypatch.setenv("REF_TEXT", "Given.")
    own = [str(VOICE / "clips" / "train_06.flac"), None]
    folder = write_parquet(
        tmp_path / "set", sentences(2), ref_audio=own, ref_text=["Own.", None], language=["en", "de"]
    )
    items = list(HFDirectDataLoader(str(folder), "train"))
    assert [(item["ref_audio"], item["ref_text"]) for item in items] == [(own[0], "Own."), (str(given), "Given.")]
    assert [item["language"] for item in items] == ["en", "de"]


def test_the_order_of_the_split_and_max_samples(make_stream: MakeStream, dataset: str) -> None:
    assert rows_of(make_stream(shuffle=False)) == list(range(NUM_ROWS))
    assert rows_of(make_stream(shuffle=False, max_samples=9)) == list(range(9))
    assert len(make_stream(max_samples=9)) == 9 and len(make_stream()) == NUM_ROWS
    with pytest.raises(UserError, match='no split "dev"; it has: train'):
        HFDirectDataLoader(dataset, "dev")


def test_rows_that_cannot_be_used_are_left_out(tmp_path: Path, make_stream: MakeStream) -> None:
    rows = sentences(12)
    rows[5]["audio"].content = b"nothing to hear"
    name = str(write_parquet(tmp_path / "bad", rows))
    assert rows_of(make_stream(name, shuffle=False)) == [n for n in range(12) if n != 5]


def test_a_split_of_unknown_length(make_stream: MakeStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone has to say how many rows to use; more than there are is no harm."""
    monkeypatch.setattr("finetuning.source.Split.num_rows", None)
    with pytest.raises(UserError, match="--max_samples; in training MAX_TRAIN_SAMPLES"):
        make_stream()
    assert sorted(rows_of(make_stream(max_samples=9))) == list(range(9))
    stream = make_stream(max_samples=40)
    for _ in range(2):
        assert sorted(rows_of(stream)) == list(range(NUM_ROWS))


# --------------------------------------------------------------------------------------------------------- position


def test_passes_move_through_the_epochs(make_stream: MakeStream, fake: FakeCodec) -> None:
    stream = make_stream()
    first, second = rows_of(stream), rows_of(stream)
    assert sorted(first) == sorted(second) == list(range(NUM_ROWS)) and first != second
    assert fake.take_num_clips() == NUM_ROWS
    assert stream.state_dict() == {"epoch": 2, "rows_consumed": 0}
    again = make_stream()
    again.set_epoch(1)
    assert rows_of(again) == second


@pytest.mark.parametrize("taken", [0, 1, 4, 22, 23])
def test_a_position_gives_exactly_the_rest(make_stream: MakeStream, taken: int) -> None:
    """State from the middle, also through JSON: nothing twice, nothing lost, then the next epoch."""
    untouched = make_stream()
    expected = rows_of(untouched) + rows_of(untouched)
    stopped = make_stream()
    seen = rows_of(islice(iter(stopped), taken))
    resumed = make_stream()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert seen + rows_of(resumed) + rows_of(resumed) == expected


def test_a_stream_may_be_resumed_again_and_again(make_stream: MakeStream) -> None:
    untouched = make_stream()
    expected = rows_of(untouched) + rows_of(untouched)
    for batch_size in (None, 2):
        seen, state = [], {"epoch": 0, "rows_consumed": 0}
        while len(seen) < 2 * NUM_ROWS:
            stream = make_stream()
            stream.load_state_dict(state)
            if batch_size is None:
                seen += rows_of(islice(iter(stream), 7))
                state = stream.state_dict()
                continue
            loader = StreamLoader(stream, batch_size)
            batches = iter(loader)
            seen += chain(*[batch["index"] for batch in islice(batches, 3)])
            state = loader.state_dict()
            batches.close()
        assert seen[: 2 * NUM_ROWS] == expected


def test_a_bad_row_counts_in_the_position(tmp_path: Path, make_stream: MakeStream) -> None:
    rows = sentences(12)
    rows[5]["audio"].content = b"nothing to hear"
    name = str(write_parquet(tmp_path / "bad", rows))
    stopped = make_stream(name, shuffle=False)
    assert rows_of(islice(iter(stopped), 6)) == [0, 1, 2, 3, 4, 6]
    assert stopped.state_dict()["rows_consumed"] == 7
    resumed = make_stream(name, shuffle=False)
    resumed.load_state_dict(stopped.state_dict())
    assert rows_of(resumed) == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_data_workers_share_the_rows(make_stream: MakeStream, num_workers: int) -> None:
    loader = DataLoader(make_stream(), batch_size=None, num_workers=num_workers)
    assert sorted(rows_of(loader)) == list(range(NUM_ROWS))


def test_processes_and_their_workers_share_the_rows(make_stream: MakeStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen, lengths = [], 0
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        stream = make_stream()
        lengths += len(stream)
        seen += rows_of(DataLoader(stream, batch_size=None, num_workers=2))
    assert sorted(seen) == list(range(NUM_ROWS)) and lengths == NUM_ROWS
    assert sorted(rows_of(make_stream(shard=False))) == list(range(NUM_ROWS))


# ---------------------------------------------------------------------------------------------------------- batches


def test_batches_are_padded_with_zeros(dataset: str, fake: FakeCodec) -> None:
    loader = get_dataloader(dataset, "train", batch_size=4, max_samples=10)
    batches = list(loader)
    assert [len(batch["index"]) for batch in batches] == [4, 4, 2] and len(loader) == 3
    for batch in batches:
        size = len(batch["index"])
        assert batch["audio"].dtype == torch.float32 and batch["audio"].shape == (size, max(batch["num_samples"]))
        assert batch["audio_codes"].shape == (size, max(batch["num_codec_frames"]), 16)
        assert batch["audio_codes"].dtype == batch["num_samples"].dtype == torch.int64 and batch["sr"] == 24_000
        for position, index in enumerate(batch["index"]):
            waveform = load_audio(Clip(index).content)
            codes = fake_codes(waveform)
            samples, frames = batch["num_samples"][position], batch["num_codec_frames"][position]
            assert (samples, frames) == (len(waveform), len(codes))
            assert np.array_equal(batch["audio"][position, :samples].numpy(), waveform)
            assert np.array_equal(batch["audio_codes"][position, :frames].numpy(), codes)
            assert not batch["audio"][position, samples:].any() and not batch["audio_codes"][position, frames:].any()
            assert batch["text"][position] == f"Sentence {index}."
    assert list(chain(*[batch["index"] for batch in batches])) == list(range(10))


@pytest.mark.parametrize("taken", [0, 1, 3, 5, 6])
def test_a_loader_resumes_behind_the_last_batch_that_was_taken(make_stream: MakeStream, taken: int) -> None:
    """Not behind those that were made ahead; six batches of four make an epoch of 23 rows."""

    def indices(batches: Any) -> list[list[int]]:
        return [batch["index"] for batch in batches]

    untouched = StreamLoader(make_stream(), 4)
    expected = indices(untouched) + indices(untouched)
    assert len(expected) == 12 and sorted(chain(*expected[:6])) == list(range(NUM_ROWS))
    stopped = StreamLoader(make_stream(), 4)
    batches = iter(stopped)
    seen = indices(islice(batches, taken))
    time.sleep(0.05)  # the thread goes on meanwhile
    state = json.loads(json.dumps(stopped.state_dict()))
    batches.close()
    resumed = StreamLoader(make_stream(), 4)
    resumed.load_state_dict(state)
    assert seen + indices(resumed) + indices(resumed) == expected


def test_a_bad_row_does_not_tear_a_batch(tmp_path: Path, make_stream: MakeStream) -> None:
    rows = sentences(21)
    rows[20]["audio"].content = rows[1]["audio"].content = b"nothing to hear"
    loader = StreamLoader(make_stream(str(write_parquet(tmp_path / "bad", rows)), shuffle=False), 5)
    assert [batch["index"] for batch in loader] == [
        [0, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15], [16, 17, 18, 19],
    ]  # fmt: skip
    assert loader.state_dict() == {"epoch": 1, "rows_consumed": 0}


def test_an_error_while_batches_are_made_reaches_the_consumer(tmp_path: Path, make_stream: MakeStream) -> None:
    name = write_parquet(tmp_path / "cut", sentences(12))
    loader = StreamLoader(make_stream(str(name)), 2)
    (file,) = name.glob("data/*")
    file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read"):
        list(loader)


def test_accelerate_gives_the_loader_back_as_it_is(dataset: str, fake: FakeCodec) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    loader = get_dataloader(dataset, "train", 4)
    assert Accelerator(cpu=True).prepare(loader) is loader


SCRIPT = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
import finetuning.prepare, finetuning.stream
finetuning.prepare.CHUNK_ROWS = finetuning.stream.CHUNK_ROWS = 4
from data_processing import HFDirectDataLoader, create_dataloader, get_dataloader, prepare_dataset
from torch.utils.data import DataLoader

dataset, jsonl = sys.argv[1:]
accelerator = Accelerator(cpu=True)

def batches(loader):
    return [batch["index"] for batch in loader]

loader = get_dataloader(dataset, "train", 3, shuffle=True)
prepared = accelerator.prepare(get_dataloader(dataset, "train", 3))
direct = HFDirectDataLoader(dataset, "train")
rows = accelerator.prepare(create_dataloader(jsonl, 2, shuffle=False))
seen = {
    "as it is": batches(loader), "next epoch": batches(loader), "prepared": batches(prepared),
    "items": [[item["index"]] for item in direct],
    "jsonl": [batch["lines"].tolist() for batch in rows],
}
Path(f"{accelerator.process_index}.json").write_text(json.dumps(seen))
"""


def test_every_row_reaches_exactly_one_of_two_processes(
    tmp_path: Path, write_jsonl: Callable[..., Path], demo_rows: list[dict]
) -> None:
    """Two gloo processes, the real (tiny) codec: as it is, in a second epoch, through ``accelerator.prepare``."""
    dataset = write_parquet(tmp_path / "set", demo_texts(11))
    jsonl = write_jsonl(demo_rows[:8])
    (tmp_path / "script.py").write_text(SCRIPT)
    # Not ``accelerate launch --cpu``: without mpirun it starts one process, whatever --num_processes says.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["script.py", str(dataset), str(jsonl)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "ENV_FILE": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for way in ("as it is", "next epoch", "prepared", "items"):
        parts = [list(chain(*process[way])) for process in seen]
        assert sorted(chain(*parts)) == list(range(11)), way
        assert min(map(len, parts)) == 5, way
    assert seen[0]["as it is"] != seen[0]["next epoch"]
    assert sorted(chain(*seen[0]["jsonl"], *seen[1]["jsonl"])) == list(range(1, 9))


# ----------------------------------------------------------------------------------------------------- JSONL files


def test_batches_of_training(write_jsonl: Callable[..., Path], demo_rows: list[dict]) -> None:
    rows = [row | {"speaker": name} for row, name in zip(demo_rows, ("Bea", "Ada", "Bea", "Ada", "Bea"), strict=False)]
    loader = create_dataloader(write_jsonl(rows), 2, shuffle=False)
    batches = list(loader)
    assert [batch["lines"].tolist() for batch in batches] == [[1, 2], [3, 4], [5]] and len(loader) == 3
    assert [batch["speaker_index"].tolist() for batch in batches] == [[0, 1], [0, 1], [0]]
    assert all(batch.keys() == collate_keys() for batch in batches)
    expected = [np.asarray(row["audio_codes"]) for row in rows]
    assert np.array_equal(np.concatenate([batch["codes"].numpy() for batch in batches]), np.concatenate(expected))
    orders = {tuple(chain(*[batch["lines"].tolist() for batch in create_dataloader(write_jsonl(rows), 2)]))}
    for _ in range(4):
        orders.add(tuple(chain(*[batch["lines"].tolist() for batch in create_dataloader(write_jsonl(rows), 2)])))
    assert len(orders) > 1 and all(sorted(order) == [1, 2, 3, 4, 5] for order in orders)


def collate_keys() -> set[str]:
    """The keys of the table in ``dataset``."""
    from finetuning.prompt import AlignedIds

    ids = np.zeros(4, dtype=np.int64)
    row = AlignedIds(ids, ids, -1, np.zeros((2, 16), dtype=np.int16), ids)
    return set(collate([row], [0]))


def test_raw_rows_have_no_batches(write_jsonl: Callable[..., Path], demo_rows: list[dict]) -> None:
    raw = [{key: value for key, value in row.items() if key != "audio_codes"} for row in demo_rows[:3]]
    with pytest.raises(UserError, match="--mode encode"):
        create_dataloader(write_jsonl(raw), 2)


def test_rows_of_a_jsonl_with_and_without_codes(
    tmp_path: Path, write_jsonl: Callable[..., Path], demo_rows: list[dict]
) -> None:
    raw = [{key: value for key, value in row.items() if key != "audio_codes"} for row in demo_rows[:4]]
    coded, uncoded = load_jsonl_dataset(write_jsonl(demo_rows[:4])), load_jsonl_dataset(write_jsonl(raw, "raw.jsonl"))
    assert len(coded) == len(uncoded) == 4
    for rows in (coded, uncoded):
        assert [row["text"] for row in rows] == [row["text"] for row in demo_rows[:4]]
        assert rows.column("text").tolist() == [row["text"] for row in demo_rows[:4]]
        assert [Path(row["audio"]) for row in rows] == [Path(row["audio"]) for row in demo_rows[:4]]
    assert coded[3]["codes"].tolist() == demo_rows[3]["audio_codes"] and coded[3]["codes"].dtype == np.int16
    assert not len(uncoded[0]["codes"])
    with pytest.raises(UserError, match=r"gone\.jsonl does not exist"):
        load_jsonl_dataset(tmp_path / "gone.jsonl")


def test_dataset_info(write_jsonl: Callable[..., Path], demo_rows: list[dict]) -> None:
    rows = [row | {"speaker": "Ada" if number % 2 else "Bea"} for number, row in enumerate(demo_rows[:5])]
    info = get_dataset_info(write_jsonl(rows))
    frames = [len(row["audio_codes"]) for row in rows]
    assert (info["num_samples"], info["num_with_codes"], info["num_bad"]) == (5, 5, 0)
    assert info["hours"] == pytest.approx(sum(frames) / 12.5 / 3600)
    assert info["seconds"]["max"] == max(frames) / 12.5 and info["speakers"] == {"Bea": 3, "Ada": 2}
    assert sum(info["languages"].values()) == 5


def test_one_split_in_one_call(tmp_path: Path, fake: FakeCodec, dataset: str, codec: Codec) -> None:
    for number, model in enumerate((None, codec.folder, codec.folder.parent)):
        output = prepare_dataset(dataset, "train", tmp_path / f"{number}.jsonl", model_path=model, max_samples=3)
        assert output == tmp_path / f"{number}.jsonl"
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["text"] for row in rows] == [f"Sentence {n}." for n in range(3)]
        assert rows[1]["audio_codes"] == fake_codes(load_audio(Clip(1).content)).tolist()


# ---------------------------------------------------------------------------------------------------------- machine


def test_device_and_workers_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.get_device_for_current_process() == "cpu"
    assert processes.get_num_workers_for_dataloader() == 0
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert processes.get_device_for_current_process() == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for rank, device in ((None, "cuda:0"), ("3", "cuda:3"), ("5", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
        assert processes.get_device_for_current_process() == device
    assert processes.get_num_workers_for_dataloader() == 2


def test_the_interface_is_offered_by_data_processing() -> None:
    names = {
        "JSONLDataPreparer", "prepare_dataset", "HFDirectDataLoader", "get_dataloader", "load_jsonl_dataset",
        "create_dataloader", "get_dataset_info", "get_device_for_current_process", "get_num_workers_for_dataloader",
    }  # fmt: skip
    assert names <= set(data_processing.INTERFACE)
    for name in names:
        assert callable(getattr(data_processing, name))
    assert data_processing.get_dataloader is library.get_dataloader
    with pytest.raises(AttributeError, match="no_such_name"):
        data_processing.no_such_name  # noqa: B018


def test_importing_data_processing_is_cheap() -> None:
    code = (
        "import data_processing, sys; print([m for m in ('torch', 'numpy', 'datasets') if m in sys.modules]);"
        "from data_processing import get_num_workers_for_dataloader; print(callable(get_num_workers_for_dataloader))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True"]
