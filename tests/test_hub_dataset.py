"""Datasets on a Hub: the real library code in a process of its own, against a loopback server."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import PROJECT
from hub import TOKEN, Hub, running_hub
from test_source import (
    CLIPS,
    NUM_CLIPS,
    TEXTS,
    embedded_table,
    make_audiofolder,
    make_csv_beside_wavs,
    make_webdataset,
)

#: Rows of random bytes, so that the files cannot shrink.
NUM_LARGE_ROWS, LARGE_CLIP_BYTES = 200, 20_000

READ = """
import hashlib, json, sys, time
time.sleep = lambda seconds: None  # the library's pauses between attempts
from finetuning.errors import UserError
from finetuning.source import open_split, split_names

def read(name, split="train", start=0, column=None):
    data = open_split(name, split)
    result = {"splits": split_names(name), "num_rows": data.num_rows, "fingerprint": data.fingerprint}
    if column:
        return result | {"values": list(data.column(column))}
    rows = list(data.rows(start))
    result |= {key: [getattr(row, key) for row in rows] for key in ("index", "text", "language")}
    return result | {"audio": [digest(row.audio) for row in rows]}

def digest(audio):
    return hashlib.sha256(audio).hexdigest() if isinstance(audio, bytes) else str(audio)

for request in json.loads(sys.argv[1]):
    try:
        result = read(**request)
    except UserError as error:
        result = {"error": str(error)}
    print(json.dumps(result | {"torchcodec": "torchcodec" in sys.modules}))
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
    repositories = {
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


@pytest.fixture
def read(hub: Hub, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Reads datasets on the loopback Hub in one process with caches of its own; one result for each request."""

    def read_(*requests: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
        hub.requests.clear()
        hub.bytes_sent.clear()
        done = subprocess.run(
            [sys.executable, "-c", READ, json.dumps(requests)],
            cwd=PROJECT, env=hub.environment(tmp_path / "hf", **environment), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Traceback" not in done.stderr
        results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert not any(result["torchcodec"] for result in results)
        return results

    return read_


def digests(clips: list[bytes]) -> list[str]:
    return [hashlib.sha256(clip).hexdigest() for clip in clips]


def large_clips(hub: Hub) -> list[bytes]:
    files = sorted((hub.repositories["me/large"] / "data").glob("train-*"))
    return [clip["bytes"] for file in files for clip in pq.read_table(file).column("audio").to_pylist()]


def test_parquet_rows(read: Callable, hub: Hub) -> None:
    [found] = read({"name": "me/large"})
    assert found["text"] == [f"text {index}" for index in range(NUM_LARGE_ROWS)]
    assert found["language"][:3] == ["English", "Hausa", "English"]
    assert found["audio"] == digests(large_clips(hub))
    assert (found["splits"], found["num_rows"]) == (["train", "test"], NUM_LARGE_ROWS)
    shard = [path for method, path in hub.requests if path.endswith("train-00001-of-00002.parquet")]
    assert len(shard) < 10 + 6  # one request a row group, whatever its columns; the rest is the footer


def test_a_late_start_and_a_single_column_fetch_little(read: Callable, hub: Hub) -> None:
    shards = [f"data/train-0000{shard}-of-00002.parquet" for shard in (0, 1)]
    sizes = [(hub.repositories["me/large"] / shard).stat().st_size for shard in shards]
    [found] = read({"name": "me/large", "start": 185})
    assert found["index"] == list(range(185, 200))
    assert found["audio"] == digests(large_clips(hub)[185:])
    skipped, last = (hub.bytes_sent[shard] for shard in shards)
    assert skipped < 0.1 * sizes[0]  # the footer
    assert last < 0.35 * sizes[1]  # … and two of ten row groups
    [texts] = read({"name": "me/large", "column": "text"})
    assert texts["values"] == [f"text {index}" for index in range(NUM_LARGE_ROWS)]
    assert texts["fingerprint"] == found["fingerprint"]
    assert sum(hub.bytes_sent[shard] for shard in shards) < 0.1 * sum(sizes)
    assert {path for _, path in hub.requests if "test-0" in path} == set()


def test_other_formats(read: Callable) -> None:
    names = ("me/audiofolder", "me/csv", "me/tars")
    found = read(*({"name": name, "start": start} for name in names for start in (0, 5)))
    for name, whole, part in zip(names, found[::2], found[1::2], strict=True):
        clips = digests(CLIPS)
        if name == "me/audiofolder":
            clips[2] = "wavs/2.wav"  # a clip that the repository lacks is for the reader of audio to report
        assert (whole["audio"], whole["text"]) == (clips, TEXTS), name
        assert (part["index"], part["audio"], part["text"]) == ([5, 6], clips[5:], TEXTS[5:]), name


def test_a_token_opens_a_gated_dataset(read: Callable) -> None:
    [found] = read({"name": "me/gated", "split": "test"}, HF_TOKEN=TOKEN)
    assert found["text"] == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize(
    ("environment", "messages"),
    [
        (
            {},
            {
                ("me/gated", "train"): "me/gated is gated; accept its terms",
                ("me/missing", "train"): "me/missing is neither a folder here (seen from",
                ("missing", "train"): "missing is neither a folder here (seen from",
                ("me/large", "dev"): 'me/large has no split "dev"; it has: train, test',
                ("me/script", "train"): "me/script is made by a script of its own",
            },
        ),
        ({"HF_TOKEN": "hf_wrongButSecret"}, {("me/gated", "train"): "me/gated is gated"}),
        ({"HF_HUB_OFFLINE": "1"}, {("me/large", "train"): "the Hub cannot be reached"}),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {("me/large", "train"): "the Hub cannot be reached"}),
    ],
    ids=["", "wrong token", "offline", "unreachable"],
)
def test_out_of_reach(read: Callable, environment: dict[str, str], messages: dict[tuple, str]) -> None:
    found = read(*({"name": name, "split": split} for name, split in messages), **environment)
    for result, message in zip(found, messages.values(), strict=True):
        assert message in result["error"]
        assert "\n" not in result["error"] and "Secret" not in result["error"]


def test_a_hub_that_goes_away_while_rows_are_read(hub: Hub, tmp_path: Path) -> None:
    """The file is named; a shard that cannot be fetched ends the pass instead of being left out."""
    code = (
        "import sys, time\ntime.sleep = lambda seconds: None\nfrom finetuning.source import open_split\n"
        "rows = open_split('me/large', 'train').rows()\nnext(rows)\nprint('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "try:\n    print(len(list(rows)))\nexcept ValueError as error:\n    print(error)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT, env=hub.environment(tmp_path / "hf"), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    shard = hub.repositories["me/large"] / "data" / "train-00001-of-00002.parquet"
    content = shard.read_bytes()
    shard.unlink()
    try:
        output, _ = process.communicate("\n", timeout=60)
    finally:
        shard.write_bytes(content)
    assert "train-00001-of-00002.parquet cannot be read" in output
