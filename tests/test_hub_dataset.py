"""Datasets on a Hub: the real library code in a process of its own, against a loopback server."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import PROJECT
from hub import TOKEN, Hub, running_hub
from test_source import (
    CLIPS,
    FORMATS,
    NUM_CLIPS,
    TEXTS,
    embedded_table,
    make_audiofolder,
    make_csv_beside_wavs,
    make_webdataset,
    metadata_rows,
    write_csv,
)

#: Rows of random bytes, so that the files cannot shrink.
NUM_LARGE_ROWS, LARGE_CLIP_BYTES = 200, 20_000

#: One request a line, one result a line.
READ = """
import hashlib, json, os, sys, time
time.sleep = lambda seconds: None  # the library's pauses between attempts
from itertools import chain
from huggingface_hub import HfFileSystem
from finetuning.errors import UserError
from finetuning.source import open_split, split_names

def read(name, split="train", start=0, column=None, pauses=False):
    data = open_split(name, split)
    result = {"splits": split_names(name), "num_rows": data.num_rows, "fingerprint": data.fingerprint}
    if column:
        return result | {"values": list(data.column(column))}
    rows = data.rows(start)
    if pauses:
        rows = chain([next(rows)], rows)
        print(json.dumps({"paused": True}), flush=True)
        sys.stdin.readline()
    rows = list(rows)
    result |= {key: [getattr(row, key) for row in rows] for key in ("index", "text", "language", "other")}
    return result | {"audio": [digest(row.audio) for row in rows]}

def digest(audio):
    return hashlib.sha256(audio).hexdigest() if isinstance(audio, bytes) else str(audio)

for line in sys.stdin:
    request = json.loads(line)
    HfFileSystem.clear_instance_cache()
    os.environ["HF_TOKEN"] = request.pop("token", "")
    try:
        result = read(**request)
    except UserError as error:
        result = {"error": str(error)}
    print(json.dumps(result | {"torchcodec": "torchcodec" in sys.modules}), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("repositories")
    make_large_parquet(folder / "large")
    broken = make_audiofolder(folder / "audiofolder")
    (broken / "wavs" / "2.wav").unlink()
    script = folder / "script"
    script.mkdir()
    (script / "script.py").write_text("print('must not run')\n")
    (script / "README.md").write_text("# A dataset with a script\n")
    references = make_audiofolder(folder / "references")
    rows = [row | {"ref_audio": "wavs/0.wav", "ref_text": "x", "note": "n"} for row in metadata_rows()]
    write_csv(references / "metadata.csv", rows)
    repositories = {
        "me/references": references,
        "me/large": folder / "large",
        "me/gated": folder / "large",
        "me/audiofolder": folder / "audiofolder",
        "me/csv": make_csv_beside_wavs(folder / "csv"),
        "me/tars": make_webdataset(folder / "tars"),
        "me/script": script,
    }
    with running_hub(repositories, gated={"me/gated"}) as server:
        yield server


def make_large_parquet(folder: Path) -> None:
    """Two shards of ten row groups, and a README that names the splits."""
    (folder / "data").mkdir(parents=True)
    clips = [os.urandom(LARGE_CLIP_BYTES) for _ in range(NUM_LARGE_ROWS)]
    table = embedded_table([index % NUM_CLIPS for index in range(NUM_LARGE_ROWS)])
    audio = [{"bytes": clip, "path": f"{index}.wav"} for index, clip in enumerate(clips)]
    table = table.set_column(0, table.schema.field("audio"), [audio])
    table = table.set_column(1, "text", [[f"text {index}" for index in range(NUM_LARGE_ROWS)]])
    for shard, start in enumerate((0, 100)):
        file = folder / "data" / f"train-0000{shard}-of-00002.parquet"
        pq.write_table(table.slice(start, 100), file, row_group_size=10, use_dictionary=False)
    pq.write_table(table.slice(0, 3), folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "  - split: test\n    path: data/test-*\n---\n"
    )


class Reader:
    """Reads datasets on the loopback Hub in one process with caches of its own, as long as the tests of this file."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        (folder / "torchcodec").mkdir()
        (folder / "torchcodec" / "__init__.py").write_text("raise AssertionError('torchcodec was imported')\n")
        self.hub = hub
        self.messages = (folder / "stderr.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", READ], cwd=PROJECT, env=hub.environment(folder / "hf", PYTHONPATH=str(folder)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.messages, text=True,
        )  # fmt: skip

    def __call__(self, **request: Any) -> dict[str, Any]:
        """The result of one request; the Hub counts from zero."""
        self.hub.requests.clear()
        self.hub.bytes_sent.clear()
        self.write(json.dumps(request))
        result = self.result()
        assert not result.get("torchcodec")
        return result

    def write(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """The next one; lines that are not JSON objects are messages to the user."""
        watchdog = threading.Timer(120, self.process.kill)
        watchdog.start()
        line = next((line for line in self.process.stdout if line.startswith("{")), None)
        watchdog.cancel()
        assert line, self.close()[-3000:]
        return json.loads(line)

    def close(self) -> str:
        """Ends the process; what it wrote to stderr."""
        self.process.communicate(timeout=60)
        self.messages.seek(0)
        return self.messages.read()


@pytest.fixture(scope="module")
def read(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader(hub, tmp_path_factory.mktemp("reader"))
    yield reader
    assert "Traceback" not in reader.close()


def digests(clips: list[bytes]) -> list[str]:
    return [hashlib.sha256(clip).hexdigest() for clip in clips]


def large_clips(hub: Hub) -> list[bytes]:
    files = sorted((hub.repositories["me/large"] / "data").glob("train-*"))
    return [clip["bytes"] for file in files for clip in pq.read_table(file).column("audio").to_pylist()]


def test_parquet_rows(read: Reader, hub: Hub) -> None:
    found = read(name="me/large")
    assert found["text"] == [f"text {index}" for index in range(NUM_LARGE_ROWS)]
    assert found["language"][:3] == ["English", "Hausa", "English"]
    assert found["audio"] == digests(large_clips(hub))
    assert (found["splits"], found["num_rows"]) == (["train", "test"], NUM_LARGE_ROWS)
    shard = [path for method, path in hub.requests if path.endswith("train-00001-of-00002.parquet")]
    assert len(shard) < 10 + 6  # one request a row group, whatever its columns; the rest is the footer


def test_a_late_start_and_a_single_column_fetch_little(read: Reader, hub: Hub) -> None:
    shards = [f"data/train-0000{shard}-of-00002.parquet" for shard in (0, 1)]
    sizes = [(hub.repositories["me/large"] / shard).stat().st_size for shard in shards]
    found = read(name="me/large", start=185)
    assert found["index"] == list(range(185, 200))
    assert found["audio"] == digests(large_clips(hub)[185:])
    skipped, last = (hub.bytes_sent[shard] for shard in shards)
    assert skipped < 0.1 * sizes[0]  # the footer
    assert last < 0.35 * sizes[1]  # … and two of ten row groups
    texts = read(name="me/large", column="text")
    assert texts["values"] == [f"text {index}" for index in range(NUM_LARGE_ROWS)]
    assert texts["fingerprint"] == found["fingerprint"]
    assert 0 < sum(hub.bytes_sent[shard] for shard in shards) < 0.1 * sum(sizes)
    assert {path for _, path in hub.requests if "test-0" in path} == set()


@pytest.mark.parametrize("name", ["me/audiofolder", "me/csv", "me/tars"])
def test_other_formats(name: str, read: Reader) -> None:
    clips = digests(CLIPS)
    if name == "me/audiofolder":
        clips[2] = "wavs/2.wav"  # a clip that the repository lacks is for the reader of audio to report
    whole, part = read(name=name), read(name=name, start=5)
    assert (whole["audio"], whole["text"]) == (clips, TEXTS)
    assert (part["index"], part["audio"], part["text"]) == ([5, 6], clips[5:], TEXTS[5:])


def test_a_reference_in_the_repository_is_left_out(read: Reader) -> None:
    found = read(name="me/references")
    assert found["audio"] == digests(CLIPS)
    assert found["other"] == [{"note": "n"}] * NUM_CLIPS


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_torchcodec_is_never_imported(make: Callable[[Path], Path], read: Reader, tmp_path: Path) -> None:
    """Nor where it is installed but cannot load, as the reading process's: that one fails when it is imported."""
    assert read(name=str(make(tmp_path / "dataset")))["text"] == TEXTS


def test_a_token_opens_a_gated_dataset(read: Reader) -> None:
    assert read(name="me/gated", split="test", token=TOKEN)["text"] == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"name": "me/gated"}, "me/gated is gated; accept its terms"),
        ({"name": "me/gated", "token": "hf_wrongButSecret"}, "me/gated is gated"),
        ({"name": "me/missing"}, "me/missing is neither a folder here (seen from"),
        ({"name": "missing"}, "missing is neither a folder here (seen from"),
        ({"name": "me/large", "split": "dev"}, 'me/large has no split "dev"; it has: train, test'),
        ({"name": "me/script"}, "me/script is made by a script of its own"),
    ],
    ids=["gated", "wrong token", "missing", "missing and no owner", "no split", "script"],
)
def test_out_of_reach(request_: dict[str, str], message: str, read: Reader) -> None:
    error = read(**request_)["error"]
    assert message in error
    assert "\n" not in error and "Secret" not in error


def test_a_hub_that_cannot_be_reached(read: Reader, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_down", True)
    error = read(name="me/large")["error"]
    assert "the Hub cannot be reached" in error and "\n" not in error


def test_a_shard_that_goes_away_while_rows_are_read(read: Reader, hub: Hub, tmp_path: Path) -> None:
    """The file is named; a shard that cannot be fetched ends the pass instead of being left out."""
    assert read(name="me/large", pauses=True) == {"paused": True}
    shard = hub.repositories["me/large"] / "data" / "train-00001-of-00002.parquet"
    shard.rename(tmp_path / shard.name)
    try:
        read.write("go on")
        assert "train-00001-of-00002.parquet cannot be read" in read.result()["error"]
    finally:
        (tmp_path / shard.name).rename(shard)
