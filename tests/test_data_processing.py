"""data_processing.py as a command: its modes, what it prints, and what bad input meets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PROJECT, VOICE
from datasets_for_tests import Clip, demo_texts, write_csv_dataset, write_parquet
from fakes import FakeCodec, fake_codes

import data_processing
from finetuning.audio import load_audio
from finetuning.codec import Codec
from finetuning.errors import run_main

Command = Callable[..., SimpleNamespace]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project folder of the test's own, with settings that need no GPU and no Hub."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"DEVICE": "cpu", "MIXED_PRECISION": "no", "INIT_MODEL_PATH": "tiny-random"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process: exit code, what it printed, and what it complained of."""

    def command(*arguments: Any, **settings: Any) -> SimpleNamespace:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["data_processing.py", *map(str, arguments)])
        with monkeypatch.context() as context:
            for name, value in settings.items():
                context.setenv(name, str(value))
            try:
                run_main(data_processing.main)
                code = 0
            except SystemExit as stopped:
                code = stopped.code
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return command


def write_dataset(folder: Path, **counts: int) -> Path:
    for number, (split, count) in enumerate(counts.items()):
        rows = [{"audio": Clip(100 * number + n), "text": f"{split} {n}."} for n in range(count)]
        write_parquet(folder, rows, split)
    return folder


def read(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_prepare_and_info_as_people_run_them(tmp_path: Path, codec: Codec) -> None:
    """In processes of their own, with the real (tiny) codec and a folder of wav files."""
    rows = demo_texts(3)
    dataset = write_csv_dataset(tmp_path / "recordings", rows)
    (tmp_path / ".env").write_text(f"DATASET_NAME={dataset}\nINIT_MODEL_PATH=tiny-random\nDEVICE=cpu\n")
    environment = {key: value for key, value in os.environ.items() if key not in ("INIT_MODEL_PATH", "DEVICE")}
    done = []
    for arguments in (["--mode", "prepare"], ["--mode", "info"]):
        line = [sys.executable, str(PROJECT / "data_processing.py"), *arguments]
        done.append(
            subprocess.run(
                line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
        )
        assert done[-1].returncode == 0, done[-1].stderr[-3000:]
    prepared = read("data/train.jsonl")
    expected = codec.encode([load_audio(row["audio"]) for row in rows])
    assert [row["audio_codes"] for row in prepared] == [codes.tolist() for codes in expected]
    minutes = sum(map(len, expected)) / 12.5 / 60
    described = f"data/train.jsonl: 3 rows (3 with codes), {minutes:.1f} minutes"
    assert described in done[0].stdout and described in done[1].stdout
    assert "speakers: reference_speaker (3)" in done[1].stdout


def test_prepare_all_splits(tmp_path: Path, fake: FakeCodec, command: Command) -> None:
    dataset = write_dataset(tmp_path / "set", train=5, validation=2)
    done = command("--mode", "prepare", DATASET_NAME=dataset)
    assert done.code == 0, done.err
    for split, count in (("train", 5), ("validation", 2)):
        assert [row["text"] for row in read(f"data/{split}.jsonl")] == [f"{split} {n}." for n in range(count)]
        assert f"data/{split}.jsonl: {count} rows ({count} with codes)" in done.out
    assert (fake.take_num_clips(), command("--mode", "prepare", DATASET_NAME=dataset).code) == (7, 0)
    assert fake.take_num_clips() == 0
    assert command("--mode", "prepare", "--force", DATASET_NAME=dataset).code == 0
    assert fake.take_num_clips() == 7


def test_prepare_one_split(tmp_path: Path, fake: FakeCodec, command: Command) -> None:
    dataset = write_dataset(tmp_path / "set", train=5, validation=4)
    arguments = ("--mode", "prepare", "--split", "validation", "--max_samples", 3, "--batch_size", 2)
    done = command(*arguments, "--output_jsonl", "elsewhere/rows.jsonl", DATASET_NAME=dataset)
    assert done.code == 0, done.err
    assert [row["text"] for row in read("elsewhere/rows.jsonl")] == [f"validation {n}." for n in range(3)]
    assert fake.batch_sizes == [2, 1] and not Path("data").exists()
    done = command("--mode", "prepare", "--output_jsonl", "rows.jsonl", DATASET_NAME=dataset)
    assert (done.code, done.err.count("\n")) == (2, 1) and "--split" in done.err


def test_encode(tmp_path: Path, fake: FakeCodec, command: Command, write_jsonl: Callable[..., Path]) -> None:
    rows = [{"audio": str(row["audio"]), "text": row["text"]} for row in demo_texts(3)]
    raw = write_jsonl(rows, "raw.jsonl")
    done = command("--mode", "encode", "--input_jsonl", raw, "--output_jsonl", "coded.jsonl")
    assert done.code == 0, done.err
    assert "rows with codes: coded.jsonl" in done.out and "coded.jsonl: 3 rows (3 with codes)" in done.out
    for row, coded in zip(rows, read("coded.jsonl"), strict=True):
        assert coded["audio_codes"] == fake_codes(load_audio(row["audio"])).tolist()
    assert command("--mode", "encode", "--max_samples", 2, TRAIN_JSONL=raw).code == 0
    assert len(read("raw.first-2.encoded.jsonl")) == 2
    done = command("--mode", "encode", "--input_jsonl", "gone.jsonl")
    assert done.code == 2 and done.err == "error: --input_jsonl: gone.jsonl does not exist\n"


def test_direct_shows_rows_and_figures(tmp_path: Path, fake: FakeCodec, command: Command) -> None:
    dataset = write_dataset(tmp_path / "set", train=8, validation=2)
    done = command("--mode", "direct", "--max_samples", 7, DATASET_NAME=dataset)
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("row ")]
    frames = [len(fake_codes(load_audio(Clip(n).content))) for n in range(5)]
    assert lines == [f'row {n + 1}: reference_speaker, Auto, {frames[n]} frames, "train {n}."' for n in range(5)]
    assert re.search(r"^7 rows, [\d.]+ minutes of audio in [\d.]+ s: [\d.]+ rows/s$", done.out, re.MULTILINE)
    assert not list(Path("data").glob("*.jsonl")) and fake.take_num_clips() == 7
    assert '"validation 1."' in command("--mode", "direct", "--split", "validation", DATASET_NAME=dataset).out


def test_info(command: Command, write_jsonl: Callable[..., Path], demo_rows: list[dict]) -> None:
    rows = [row | {"speaker": name} for row, name in zip(demo_rows, ("Ada", "Bea", "Ada"), strict=False)]
    jsonl = write_jsonl([*rows, {"text": "no codes, no audio"}])
    done = command("--mode", "info", "--input_jsonl", jsonl)
    assert done.code == 0, done.err
    assert f"{jsonl}: 3 rows (3 with codes)" in done.out
    assert "speakers: Ada (2), Bea (1)" in done.out and "1 bad rows, the first in line 4" in done.out
    done = command("--mode", "info", "--input_jsonl", "gone.jsonl")
    assert done.code == 2 and done.err == "error: --input_jsonl: gone.jsonl does not exist\n"


# -------------------------------------------------------------------------------------------------------- bad input


def no_dataset(folder: Path) -> dict[str, Any]:
    return {"DATASET_NAME": folder / "nowhere"}


def no_split(folder: Path) -> dict[str, Any]:
    return {"DATASET_NAME": write_dataset(folder, train=2, test=1), "arguments": ["--split", "exam"]}


def no_column(folder: Path) -> dict[str, Any]:
    return {"DATASET_NAME": write_dataset(folder, train=2), "TEXT_COLUMN": "sentence"}


def table(folder: Path, lines: str) -> dict[str, Any]:
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text(lines, encoding="utf-8")
    return {"DATASET_NAME": folder}


def no_audio(folder: Path) -> dict[str, Any]:
    return table(folder, "text,mood\nOne.,good\n")


def text_of_numbers(folder: Path) -> dict[str, Any]:
    return table(folder, f"audio,text\n{VOICE}/clips/train_01.flac,17\n{VOICE}/clips/train_02.flac,18\n")


def empty_split(folder: Path) -> dict[str, Any]:
    return {"DATASET_NAME": write_dataset(folder, train=0)}


def file_instead_of_folder(folder: Path) -> dict[str, Any]:
    Path("data").write_text("a file")
    Path("cache").write_text("a file")
    return {"DATASET_NAME": write_dataset(folder, train=2)}


def hub_out_of_reach(folder: Path) -> dict[str, Any]:
    return {"DATASET_NAME": "somebody/speech", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("mode", ["prepare", "direct"])
@pytest.mark.parametrize(
    "make, message",
    [
        (no_dataset, r"DATASET_NAME: there is no file or folder .*nowhere"),
        (no_split, r'DATASET_NAME: .* has no split "exam"; it has: train, test '),
        (no_column, r'TEXT_COLUMN: .* has no column "sentence"; its columns are: audio, text'),
        (no_audio, r"AUDIO_COLUMN: .* no audio; its columns are: text, mood"),
        (text_of_numbers, r'TEXT_COLUMN: column "text" of .* holds numbers, not text'),
        (empty_split, r'DATASET_NAME: .*split "train"\) is empty'),
        (file_instead_of_folder, r"cannot write data/train\.jsonl: .*another folder"),
        (hub_out_of_reach, r"DATASET_NAME: somebody/speech .* cannot be reached .*HF_HUB_OFFLINE"),
    ],
)
def test_bad_input(
    tmp_path: Path, fake: FakeCodec, command: Command, mode: str, make: Callable[[Path], dict], message: str
) -> None:
    """Exit code 2 and one sentence; nothing is encoded, nothing is left behind."""
    if (mode, make) == ("direct", file_instead_of_folder):
        pytest.skip("a stream writes nothing that it needs")
    settings = make(tmp_path / "set")
    before = sorted(tmp_path.iterdir())
    done = command("--mode", mode, *settings.pop("arguments", []), **settings)
    assert done.code == 2
    complaint = [line for line in done.err.splitlines() if line]
    assert len(complaint) == 1 and re.match(f"error: {message}", complaint[0]), done.err
    assert fake.take_num_clips() == 0
    assert sorted(tmp_path.iterdir()) == before


def test_a_cache_that_cannot_be_written_only_means_that_codes_are_not_kept(
    tmp_path: Path, fake: FakeCodec, command: Command
) -> None:
    settings = file_instead_of_folder(tmp_path / "set")
    done = command("--mode", "direct", **settings, CODES_CACHE_DIR="cache")
    assert done.code == 0 and "2 rows" in done.out


def test_bad_arguments(command: Command) -> None:
    for arguments in (["--mode", "dance"], [], ["--mode", "prepare", "--max_samples", "0"], ["--mode", "info", "--x"]):
        done = command(*arguments)
        assert done.code == 2 and "usage:" in done.err and "Traceback" not in done.err
    assert "--max_samples" in command("--help").out
