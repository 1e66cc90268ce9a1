"""A dataset to a JSONL with codes: every format, every interruption and any number of processes give the same bytes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import PROJECT, VOICE
from datasets_for_tests import demo_texts, write_audiofolder, write_csv_dataset, write_parquet
from fakes import FakeCodec, fake_codes

from finetuning.audio import load_audio
from finetuning.codec import Codec
from finetuning.encode_rows import must_encode
from finetuning.errors import UserError
from finetuning.manifest import RowFormat, read_lines
from finetuning.manifest import parse_row as parse
from finetuning.prepare import PrepareOptions, Reference, prepare_split
from finetuning.processes import Processes
from finetuning.source import ColumnNames, open_split

Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, codec_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Prepares the train split of a folder into data/<name>.jsonl of the test's working directory."""
    monkeypatch.chdir(tmp_path)

    def run(dataset: Path, name: str = "train", codec: Path = codec_folder, **options: Any) -> Path:
        columns, row_format = options.pop("columns", ColumnNames()), options.pop("row_format", RowFormat())
        split = open_split(str(dataset), options.pop("split", "train"), columns)
        return prepare_split(split, Path("data") / f"{name}.jsonl", codec, row_format, PrepareOptions(**options))

    return run


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.prepare.CHUNK_ROWS", 4)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bytes_of(samples: np.ndarray, rate: int, file_format: str) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=file_format)
    return stream.getvalue()


def noise(seconds: float, level: float = 0.1, seed: int = 0, rate: int = 24_000) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, level, round(seconds * rate)).astype(np.float32)


class Clip:
    """A row of ``write_parquet`` with any content."""

    def __init__(self, content: bytes, name: str) -> None:
        self.content, self.name = content, name

    def read_bytes(self) -> bytes:
        return self.content


def clips(contents: list[bytes]) -> list[dict[str, Any]]:
    return [{"audio": Clip(content, f"{n}.wav"), "text": f"Sentence {n}."} for n, content in enumerate(contents)]


# --------------------------------------------------------------------------------------------------------- formats


def test_every_format_gives_the_codes_of_the_clips(tmp_path: Path, run: Run, codec: Codec) -> None:
    """Parquet with embedded bytes, an audiofolder, and csv + wav, against the codec on the files themselves."""
    rows = demo_texts(5)
    expected = codec.encode([load_audio(row["audio"]) for row in rows])
    formats = {"parquet": write_parquet, "audiofolder": write_audiofolder, "csv": write_csv_dataset}
    for name, write in formats.items():
        prepared = read(run(write(tmp_path / name, rows), name, codec.folder, max_clips_per_batch=2))
        assert [row["text"] for row in prepared] == [row["text"] for row in rows], name
        for row, codes in zip(prepared, expected, strict=True):
            assert np.array_equal(np.asarray(row["audio_codes"]), codes), name
        assert ("audio" in prepared[0]) == (name != "parquet")


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "MP3", "OGG"])
def test_embedded_audio_of_any_rate_and_format(
    tmp_path: Path, run: Run, fake: FakeCodec, rate: int, file_format: str
) -> None:
    stereo = np.stack([noise(1.0, seed=1, rate=rate), noise(1.0, seed=2, rate=rate)], axis=1)
    content = bytes_of(stereo, rate, file_format)
    (tmp_path / f"clip.{file_format.lower()}").write_bytes(content)
    (row,) = read(run(write_parquet(tmp_path / "set", clips([content]))))
    expected = load_audio(tmp_path / f"clip.{file_format.lower()}")
    assert row["audio_codes"] == fake_codes(expected).tolist()
    assert row["measures"]["seconds"] == pytest.approx(len(expected) / 24_000, abs=1e-3)


def test_columns_become_keys_and_the_others_are_kept(tmp_path: Path, run: Run, fake: FakeCodec) -> None:
    rows = clips([bytes_of(noise(1.0, seed=n), 24_000, "WAV") for n in range(3)])
    dataset = write_parquet(
        tmp_path / "set", rows, who=["a", "b", "a"], locale=["en", "de", "en"], age=[30, 40, 30],
        audio_codes=[[1], [2], [3]],
    )  # fmt: skip
    prepared = read(run(dataset, columns=ColumnNames(speaker="who"), row_format=RowFormat(speaker_key="who")))
    assert [row["who"] for row in prepared] == ["a", "b", "a"]
    assert [row["language"] for row in prepared] == ["en", "de", "en"]
    assert [row["age"] for row in prepared] == [30, 40, 30]
    assert [row["dataset_index"] for row in prepared] == [0, 1, 2]
    assert all(len(row["audio_codes"][0]) == 16 for row in prepared)


def test_saved_audio_is_the_original_and_belongs_to_the_codes(
    tmp_path: Path, run: Run, fake: FakeCodec, codec_folder: Path
) -> None:
    contents = [bytes_of(noise(1.0, seed=n), 24_000, kind) for n, kind in enumerate(("WAV", "FLAC", "OGG"))]
    output = run(write_parquet(tmp_path / "set", clips(contents)), save_audio=True)
    paths = [output.parent / row["audio"] for row in read(output)]
    assert [path.read_bytes() for path in paths] == contents
    assert [path.suffix for path in paths] == [".wav", ".flac", ".ogg"]
    codec_id = read(output)[0]["codes_source"]["codec"]
    for number, line in read_lines(output, "x"):
        row = parse(line, number, output.parent, RowFormat(), needs_codes=True)
        assert not must_encode(row, (codec_id,))
        assert must_encode(row, ("another codec",))


# ------------------------------------------------------------------------------------------------------ references


def test_a_clean_clip_of_5_to_10_seconds_becomes_the_reference_of_its_speaker(
    tmp_path: Path, run: Run, fake: FakeCodec
) -> None:
    speech = np.concatenate([load_audio(row["audio"]) for row in demo_texts(8)])
    clean, noisy = speech[: 6 * 24_000], speech[: 7 * 24_000] + noise(7.0, 0.05)
    contents = [speech[: 2 * 24_000], noisy, clean, speech[: 12 * 24_000], speech[24_000 : 5 * 24_000]]
    rows = clips([bytes_of(samples, 24_000, "FLAC") for samples in contents])
    dataset = write_parquet(tmp_path / "set", rows, speaker=["Ada", "Ada", "Ada", "Ada", "Bea/1"])
    prepared = read(run(dataset))
    references = [(Path("data") / row["ref_audio"]).resolve() for row in prepared]
    assert len(set(references[:4])) == 1 and references[4] != references[0]
    assert references[0].parent == tmp_path / "voices" / "Ada"
    assert references[0].read_bytes() == rows[2]["audio"].content
    assert references[0].with_suffix(".txt").read_text() == "Sentence 2.\n"
    assert references[4].parent.parent == tmp_path / "voices"
    assert [row["ref_text"] for row in prepared] == ["Sentence 2."] * 4 + ["Sentence 4."]


def test_a_given_reference_is_every_row_s(tmp_path: Path, run: Run, fake: FakeCodec) -> None:
    dataset = write_parquet(tmp_path / "set", clips([bytes_of(noise(1.0, seed=n), 24_000, "WAV") for n in range(2)]))
    given = Reference(VOICE / "english_voice.wav", "What is said.")
    prepared = read(run(dataset, reference=given))
    assert {(row["ref_audio"], row["ref_text"]) for row in prepared} == {(str(given.audio), "What is said.")}
    assert not Path("voices").exists()


# ------------------------------------------------------------------------------------- interruption and processes


@pytest.fixture
def ten_clips(tmp_path: Path) -> Path:
    contents = [bytes_of(noise(0.4 + 0.1 * (n * 7 % 5), seed=n), 24_000, "WAV") for n in range(10)]
    return write_parquet(tmp_path / "set", clips(contents))


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(run: Run, fake: FakeCodec, ten_clips: Path) -> None:
    fake.batches_left = 2
    with pytest.raises(KeyboardInterrupt):
        run(ten_clips)
    assert fake.take_num_clips() == 8 and not Path("data/train.jsonl").exists()
    fake.batches_left = 100
    output = run(ten_clips)
    assert fake.take_num_clips() == 2
    assert output.read_bytes() == run(ten_clips, "again").read_bytes()
    assert sorted(path.name for path in Path("data").iterdir() if not path.name.startswith(".")) == [
        "again.jsonl", "train.jsonl",
    ]  # fmt: skip


@pytest.mark.usefixtures("small_chunks")
def test_the_shares_of_several_processes_make_the_same_file(run: Run, fake: FakeCodec, ten_clips: Path) -> None:
    """Each process's part, one after the other; ``wait`` of the first fails until the others are done."""

    class NotYet(Exception):
        pass

    def not_yet() -> None:
        raise NotYet

    done = []
    for index in (1, 2):
        with pytest.raises(NotYet):
            run(ten_clips, processes=Processes(index, 3, not_yet))
        done.append(fake.take_num_clips())
    output = run(ten_clips, processes=Processes(0, 3))
    assert [fake.take_num_clips(), *done] == [4, 4, 2]
    assert output.read_bytes() == run(ten_clips, "alone").read_bytes()


SCRIPT = """
import sys
import finetuning.prepare, finetuning.preparer
from finetuning.errors import run_main
from finetuning.processes import launched_processes

def main():
    finetuning.prepare.CHUNK_ROWS = 4
    processes = launched_processes("cpu")
    print(f"process {processes.index} of {processes.count}")
    dataset, output_dir = sys.argv[1:]
    preparer = finetuning.preparer.JSONLDataPreparer(dataset, output_dir, "tiny-random", "cpu", processes=processes)
    preparer.prepare_split("train")

run_main(main)
"""


def test_a_killed_process_and_two_processes_give_the_bytes_of_an_untouched_one(tmp_path: Path) -> None:
    """Real processes and the real (tiny) codec: SIGKILL in the middle, and two that share the work over gloo."""
    dataset = write_parquet(tmp_path / "set", demo_texts(16))
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "ENV_FILE": "", "OMP_NUM_THREADS": "1"}
    common = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

    def command(output: str) -> list[str]:
        return [sys.executable, "script.py", str(dataset), output]

    process = subprocess.Popen(command("killed"), **common)
    first_chunk = tmp_path / "killed" / "train.jsonl.partial"
    deadline = time.monotonic() + 120
    while not list(first_chunk.glob("*.safetensors")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stdout.read()
    assert not (tmp_path / "killed" / "train.jsonl").exists()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, whole in (("killed", command("killed")), ("two", launch + command("two")[1:])):
        done = subprocess.run(whole, **common, timeout=300)
        assert done.returncode == 0, f"{name}: {done.stdout}"
        assert ("process 1 of 2" in done.stdout) == (name == "two")
    untouched = subprocess.run(command("one"), **common, timeout=300)
    assert untouched.returncode == 0, untouched.stdout
    expected = (tmp_path / "one" / "train.jsonl").read_bytes()
    assert len(expected.splitlines()) == 16
    assert (tmp_path / "killed" / "train.jsonl").read_bytes() == expected
    assert (tmp_path / "two" / "train.jsonl").read_bytes() == expected


# ------------------------------------------------------------------------------------------------------- bad input


def test_few_bad_rows_are_left_out_and_listed(
    tmp_path: Path, run: Run, fake: FakeCodec, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = clips([bytes_of(noise(0.5, seed=n), 24_000, "WAV") for n in range(30)])
    rows[3]["audio"].content = b"no audio at all"
    rows[7]["text"] = "  "
    rows[9]["text"] = "ends the turn<|im_end|>"
    output = run(write_parquet(tmp_path / "set", rows))
    assert [row["dataset_index"] for row in read(output)] == [n for n in range(30) if n not in (3, 7, 9)]
    listed = {item["line"]: item["reason"] for item in read(output.with_name("train.rejected.jsonl"))}
    assert listed.keys() == {4, 8, 10}
    assert "not a readable audio file" in listed[4] and "3.wav" in listed[4]
    assert "empty" in listed[8] and "<|im_end|>" in listed[10]
    assert "skipped 3 of 30 rows" in capsys.readouterr().out


def test_many_bad_rows_stop_before_the_rest_is_encoded(
    tmp_path: Path, run: Run, fake: FakeCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetuning.prepare.CHUNK_ROWS", 4)
    rows = clips([bytes_of(noise(0.5, seed=n), 24_000, "WAV") for n in range(20)])
    for row in rows[:3]:
        row["text"] = ""
    with pytest.raises(UserError, match=r"set, split train, line 1: text is empty") as error:
        run(write_parquet(tmp_path / "set", rows))
    assert "3 of 4 rows cannot be used" in str(error.value)
    assert fake.take_num_clips() <= 4 and not Path("data/train.jsonl").exists()


def test_somebody_else_s_file_is_not_replaced(run: Run, fake: FakeCodec, ten_clips: Path) -> None:
    Path("data").mkdir()
    Path("data/train.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="was not made by --mode prepare"):
        run(ten_clips)
    assert Path("data/train.jsonl").read_text() == "mine\n" and fake.take_num_clips() == 0
    assert len(read(run(ten_clips, force=True))) == 10


def test_an_unchanged_dataset_is_not_prepared_again(
    run: Run, fake: FakeCodec, ten_clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(ten_clips).read_bytes()
    assert fake.take_num_clips() == 10
    assert run(ten_clips).read_bytes() == first and fake.take_num_clips() == 0
    assert "up to date" in capsys.readouterr().out
    assert len(read(run(ten_clips, max_rows=3))) == 3
    assert "is made again" in capsys.readouterr().out
    run(ten_clips, force=True)
    assert fake.take_num_clips() == 3 + 10


def test_a_clip_that_was_replaced_is_noticed(tmp_path: Path, run: Run, fake: FakeCodec) -> None:
    """The table of a dataset with loose clips does not change with them."""
    dataset = write_csv_dataset(tmp_path / "set", demo_texts(3))
    before = read(run(dataset))
    fake.take_num_clips()
    soundfile.write(tmp_path / "set" / "wavs" / "train_02.wav", noise(2.0), 24_000)
    after = read(run(dataset))
    assert fake.take_num_clips() == 3
    assert after[1]["audio_codes"] == fake_codes(load_audio(tmp_path / "set" / "wavs" / "train_02.wav")).tolist()
    assert after[0]["audio_codes"] == before[0]["audio_codes"]


def test_a_reference_that_was_deleted_is_made_again(run: Run, fake: FakeCodec, ten_clips: Path) -> None:
    (audio,) = {row["ref_audio"] for row in read(run(ten_clips))}
    (Path("data") / audio).unlink()
    run(ten_clips)
    assert (Path("data") / audio).is_file()


@pytest.mark.usefixtures("small_chunks")
def test_killed_between_the_file_and_its_stamp(
    run: Run, fake: FakeCodec, ten_clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("finetuning.workspace.Workspace._write_stamp", killed)
        run(ten_clips)
    assert Path("data/train.jsonl").is_file() and fake.take_num_clips() == 10
    assert len(read(run(ten_clips))) == 10 and fake.take_num_clips() == 0


def test_saved_clips_follow_the_data_and_carry_no_time_of_their_own(tmp_path: Path, run: Run, fake: FakeCodec) -> None:
    quiet = [bytes_of(noise(1.0, seed=n, level=0.05), 24_000, "WAV") for n in range(2)]
    loud = [bytes_of(noise(1.0, seed=n, level=0.1), 24_000, "WAV") for n in range(2)]
    dataset = write_parquet(tmp_path / "set", clips(loud))
    first = run(dataset, save_audio=True).read_bytes()
    shutil.rmtree("data")
    time.sleep(0.01)
    assert run(dataset, save_audio=True).read_bytes() == first
    output = run(write_parquet(tmp_path / "set", clips(quiet)), save_audio=True)
    assert [(output.parent / row["audio"]).read_bytes() for row in read(output)] == quiet


def test_speakers_that_differ_in_case_stop_at_once(tmp_path: Path, run: Run, fake: FakeCodec) -> None:
    rows = clips([bytes_of(noise(0.5, seed=n), 24_000, "WAV") for n in range(3)])
    with pytest.raises(UserError, match="differ in case only"):
        run(write_parquet(tmp_path / "set", rows, speaker=["Ada", "Bea", "ada"]))


def test_a_place_that_cannot_be_written(run: Run, fake: FakeCodec, ten_clips: Path) -> None:
    Path("data").write_text("a file where a folder is needed")
    with pytest.raises(UserError, match=r"cannot write data/train\.jsonl"):
        run(ten_clips)
    assert fake.num_built == 0


@pytest.mark.usefixtures("small_chunks")
def test_later_splits_take_the_references_of_earlier_ones_in_every_process_and_every_run(
    tmp_path: Path, codec_folder: Path, fake: FakeCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process never chooses; a second run finds the first split up to date."""
    monkeypatch.chdir(tmp_path)
    rows = clips([bytes_of(noise(0.5, seed=n), 24_000, "WAV") for n in range(6)])
    folder = write_parquet(write_parquet(tmp_path / "set", rows), rows[::-1], split="validation")

    def prepare(names: tuple[str, ...], *processes: Processes) -> None:
        known: list[dict[str, Reference]] = [{} for _ in processes]
        for name in names:
            split, output = open_split(str(folder), name), Path("data") / f"{name}.jsonl"
            for index in reversed(range(len(processes))):  # the main one last, as if the others had waited
                options = PrepareOptions(processes=processes[index])
                with contextlib.suppress(InterruptedError):
                    prepare_split(split, output, codec_folder, RowFormat(), options, known[index])
            for references in known[1:]:
                references |= known[0]

    def leave() -> None:
        raise InterruptedError

    prepare(("train", "validation"), Processes(0, 2), Processes(1, 2, leave))
    chosen = {row["ref_audio"] for name in ("train", "validation") for row in read(Path(f"data/{name}.jsonl"))}
    assert len(chosen) == 1
    before = Path("data/validation.jsonl").read_bytes()
    Path("data/validation.jsonl").unlink()
    prepare(("train", "validation"), Processes())
    assert Path("data/validation.jsonl").read_bytes() == before
