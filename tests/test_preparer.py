"""A dataset's splits to JSONL files, as a class and as what train.py does when TRAIN_JSONL is missing."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import VOICE
from datasets_for_tests import Clip, demo_texts, write_parquet
from fakes import FakeCodec

from finetuning import preparer
from finetuning.base_model import resolve_base
from finetuning.codec import Codec
from finetuning.errors import UserError
from finetuning.manifest import RowFormat
from finetuning.preparer import JSONLDataPreparer, decoding_workers, find_codec, prepare_missing_rows
from finetuning.processes import Processes
from finetuning.training_rows import check_files, must_prepare, open_training_rows

MakeSettings = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_dataset(folder: Path, **counts: int) -> Path:
    """Splits of short clips; all texts differ."""
    for number, (split, count) in enumerate(counts.items()):
        rows = [{"audio": Clip(100 * number + n), "text": f"{split} {n}."} for n in range(count)]
        write_parquet(folder, rows, split)
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(path: Path) -> list[str]:
    return [row["text"] for row in read(path)]


# -------------------------------------------------------------------------------------------------------- the class


def test_all_splits(tmp_path: Path, make_settings: MakeSettings, fake: FakeCodec, codec: Codec) -> None:
    """Names, paths, and one reference: the training split's, for all splits, though "dev" comes before "train"."""
    folder = write_dataset(tmp_path / "set", dev=3, train=6, validation=4)
    made = JSONLDataPreparer(str(folder), "rows", codec.folder, "cpu", settings=make_settings()).prepare_all_splits()
    assert made == {name: Path("rows") / f"{name}.jsonl" for name in ("train", "validation", "dev")}
    assert next(iter(made)) == "train"
    for name, count in (("train", 6), ("validation", 4), ("dev", 3)):
        assert texts(made[name]) == [f"{name} {n}." for n in range(count)]
    references = {(row["ref_audio"], row["ref_text"]) for path in made.values() for row in read(path)}
    ((audio, text),) = references
    assert text.startswith("train ") and (Path("rows") / audio).is_file()
    assert fake.take_num_clips() == 13
    assert len(list(Path("voices").glob("*/*.wav"))) == 1


def test_another_training_split_comes_first(
    tmp_path: Path, make_settings: MakeSettings, fake: FakeCodec, codec: Codec
) -> None:
    folder = write_dataset(tmp_path / "set", train=3, clean=3)
    settings = make_settings(train_split="clean")
    made = JSONLDataPreparer(str(folder), "rows", codec.folder, "cpu", settings=settings).prepare_all_splits(2)
    assert list(made) == ["clean", "train"]
    assert [len(read(path)) for path in made.values()] == [2, 2]
    assert {row["ref_text"].split()[0] for path in made.values() for row in read(path)} == {"clean"}


def test_a_prepared_set_is_up_to_date(
    tmp_path: Path, make_settings: MakeSettings, fake: FakeCodec, codec: Codec, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the splits whose reference came from the training split."""
    folder = write_dataset(tmp_path / "set", train=4, validation=3)
    for expected in (7, 0):
        JSONLDataPreparer(str(folder), "rows", codec.folder, "cpu", settings=make_settings()).prepare_all_splits()
        assert fake.take_num_clips() == expected
    said = capsys.readouterr().out
    assert "rows/train.jsonl is up to date" in said and "rows/validation.jsonl is up to date" in said


def test_an_interruption_in_a_later_split_changes_nothing(
    tmp_path: Path, make_settings: MakeSettings, fake: FakeCodec, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the validation split and started again: the bytes of an untouched run."""
    monkeypatch.setattr("finetuning.prepare.CHUNK_ROWS", 4)
    folder = write_dataset(tmp_path / "set", train=4, validation=8)

    def prepare(output: str) -> dict[str, Path]:
        splits = JSONLDataPreparer(str(folder), output, codec.folder, "cpu", settings=make_settings())
        return splits.prepare_all_splits()

    fake.batches_left = 2
    with pytest.raises(KeyboardInterrupt):
        prepare("rows")
    fake.batches_left = 100
    fake.take_num_clips()
    resumed = prepare("rows")
    assert fake.take_num_clips() == 4
    untouched = prepare("others")
    assert all(resumed[name].read_bytes() == untouched[name].read_bytes() for name in ("train", "validation"))


def test_all_splits_by_two_processes(
    tmp_path: Path, make_settings: MakeSettings, fake: FakeCodec, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads stand for the processes: each encodes its chunks of both splits; run twice, as people do."""
    monkeypatch.setattr("finetuning.prepare.CHUNK_ROWS", 4)
    folder = write_dataset(tmp_path / "set", train=8, validation=8)
    barrier = threading.Barrier(2, timeout=20)

    def prepare(index: int, output: str = "two", processes: int = 2) -> dict[str, Path]:
        shared = Processes(index, processes, barrier.wait) if processes > 1 else Processes()
        splits = JSONLDataPreparer(str(folder), output, codec.folder, "cpu", settings=make_settings(), processes=shared)
        try:
            return splits.prepare_all_splits()
        except BaseException:
            barrier.abort()  # the other must not wait
            raise

    for _ in range(2):
        with ThreadPoolExecutor(2) as pool:
            made = [future.result() for future in [pool.submit(prepare, index) for index in (0, 1)]]
        assert made[0] == made[1]
    assert fake.take_num_clips() == 16
    alone = prepare(0, "alone", 1)
    assert all(made[0][name].read_bytes() == alone[name].read_bytes() for name in ("train", "validation"))


def test_one_split(tmp_path: Path, make_settings: MakeSettings, fake: FakeCodec, codec: Codec) -> None:
    folder = write_dataset(tmp_path / "set", train=4, validation=3)
    settings = make_settings(ref_audio_path=VOICE / "clips" / "train_05.flac", ref_text="What is said.")
    splits = JSONLDataPreparer(str(folder), "rows", codec.folder, "cpu", settings=settings)
    assert splits.is_main
    assert splits.prepare_split("validation", max_samples=2) == Path("rows/validation.jsonl")
    assert texts(Path("rows/validation.jsonl")) == ["validation 0.", "validation 1."]
    assert splits.prepare_split("train", output_jsonl="elsewhere.jsonl") == Path("elsewhere.jsonl")
    assert {(row["ref_audio"], row["ref_text"]) for row in read(Path("elsewhere.jsonl"))} == {
        (str(VOICE / "clips" / "train_05.flac"), "What is said.")
    }
    with pytest.raises(UserError, match=r'no split "exam"; it has: train, validation'):
        splits.prepare_split("exam")


def test_the_settings_name_what_is_not_given(
    tmp_path: Path, make_settings: MakeSettings, fake: FakeCodec, codec: Codec
) -> None:
    rows = [{"audio": Clip(n), "text": "-"} for n in range(3)]
    folder = write_parquet(tmp_path / "set", rows, said=["One.", "Two.", "Three."], who=["a", "b", "a"])
    settings = make_settings(
        dataset_name=str(folder), text_column="said", speaker_column="who", save_audio=True, num_workers=1
    )
    splits = JSONLDataPreparer(settings=settings, processes=Processes())
    assert splits.codec_folder == codec.folder and splits.options.device == "cpu" and splits.options.num_workers == 1
    made = splits.prepare_split("train")
    assert made == Path("data/train.jsonl")
    prepared = read(made)
    assert [row["said"] for row in prepared] == ["One.", "Two.", "Three."]
    assert [row["who"] for row in prepared] == ["a", "b", "a"]
    assert all((Path("data") / row["audio"]).is_file() for row in prepared)


def test_the_codec_may_be_named_by_its_folder_or_by_a_base(
    make_settings: MakeSettings, codec: Codec, tmp_path: Path
) -> None:
    settings = make_settings(text_column="said")
    for name in (codec.folder, str(codec.folder.parent), None):
        folder, row_format = find_codec(settings, name)
        assert folder == codec.folder and row_format.text_key == "said"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        find_codec(settings, tmp_path / "empty")


def test_decoding_workers(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoding_workers(make_settings()) == 0
    monkeypatch.setattr(preparer, "get_num_workers_for_dataloader", lambda: 2)
    assert decoding_workers(make_settings()) == 2
    assert decoding_workers(make_settings(num_workers=0)) == 0
    assert decoding_workers(make_settings(num_workers=5)) == 5


# ---------------------------------------------------------------------------------------------- missing TRAIN_JSONL


@pytest.fixture
def prepare(codec: Codec, fake: FakeCodec) -> Callable[[Any], None]:
    """What ``starting.open_rows`` does before it opens the rows."""

    def prepare(settings: Any) -> None:
        check_files(settings)
        prepare_missing_rows(settings, RowFormat.from_settings(settings), codec.folder, "cpu", Processes())

    return prepare


def test_missing_rows_are_prepared(
    tmp_path: Path, make_settings: MakeSettings, prepare: Callable, fake: FakeCodec, codec: Codec
) -> None:
    settings = make_settings(dataset_name=str(write_dataset(tmp_path / "set", train=5, validation=3)))
    assert must_prepare(settings)
    prepare(settings)
    assert texts(Path("data/train.jsonl")) == [f"train {n}." for n in range(5)]
    assert texts(Path("data/validation.jsonl")) == [f"validation {n}." for n in range(3)]
    assert not [row for row in read(Path("data/validation.jsonl")) if "ref_audio" in row]  # it needs none
    assert {row["ref_text"].split()[0] for row in read(Path("data/train.jsonl"))} == {"train"}
    assert not must_prepare(settings) and fake.take_num_clips() == 8
    prepare(settings)
    rows = open_training_rows(settings, codec.folder, RowFormat(), "cpu")
    assert (len(rows.train), len(rows.validation)) == (5, 3)
    assert fake.take_num_clips() == 0


def test_a_dataset_without_a_validation_split(
    tmp_path: Path, make_settings: MakeSettings, prepare: Callable, codec: Codec, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(dataset_name=str(write_dataset(tmp_path / "set", train=20)))
    prepare(settings)
    assert "has no split validation; VALIDATION_FRACTION holds rows out" in capsys.readouterr().out
    assert not Path("data/validation.jsonl").exists()
    rows = open_training_rows(settings, codec.folder, RowFormat(), "cpu")
    assert (len(rows.train), len(rows.validation)) == (19, 1)


def test_a_named_validation_split_that_is_missing_is_said_before_anything_is_encoded(
    tmp_path: Path, make_settings: MakeSettings, prepare: Callable, fake: FakeCodec
) -> None:
    folder = write_dataset(tmp_path / "set", train=5)
    with pytest.raises(UserError, match=r'no split "dev"; it has: train'):
        prepare(make_settings(dataset_name=str(folder), validation_split="dev"))
    assert fake.take_num_clips() == 0


def test_the_user_s_own_validation_file_stays(
    tmp_path: Path, make_settings: MakeSettings, prepare: Callable, write_jsonl: Callable[..., Path]
) -> None:
    """VALIDATION_JSONL names a file of the user's; only TRAIN_JSONL is missing."""
    codes = [[1] * 16] * 4
    own = write_jsonl([{"text": "Mine.", "audio_codes": codes}], "own.jsonl")
    folder = write_dataset(tmp_path / "set", train=5, validation=3)
    prepare(make_settings(dataset_name=str(folder), validation_jsonl=own))
    assert len(read(Path("data/train.jsonl"))) == 5
    assert texts(own) == ["Mine."]


def test_no_validation_rows_are_prepared_for_the_null_device(
    tmp_path: Path, make_settings: MakeSettings, prepare: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetuning.preparer.os.devnull", str(tmp_path / "null"))  # nobody's machine is at stake
    folder = write_dataset(tmp_path / "set", train=5, validation=3)
    prepare(make_settings(dataset_name=str(folder), validation_jsonl=tmp_path / "null"))
    assert len(read(Path("data/train.jsonl"))) == 5
    assert not list(tmp_path.glob("*null*"))


def test_an_interruption_between_the_splits_loses_neither(
    tmp_path: Path, make_settings: MakeSettings, prepare: Callable, fake: FakeCodec
) -> None:
    settings = make_settings(dataset_name=str(write_dataset(tmp_path / "set", train=5, validation=3)))
    fake.batches_left = 1
    with pytest.raises(KeyboardInterrupt):
        prepare(settings)
    assert Path("data/validation.jsonl").is_file() and not Path("data/train.jsonl").exists()
    fake.batches_left = 100
    prepare(settings)
    assert [len(read(Path(f"data/{name}.jsonl"))) for name in ("train", "validation")] == [5, 3]


def test_fewer_rows_than_asked_for_are_made_again(
    tmp_path: Path, make_settings: MakeSettings, prepare: Callable, codec: Codec
) -> None:
    dataset = {"dataset_name": str(write_dataset(tmp_path / "set", train=6))}
    for limit, made in ((2, 2), (1, 2), (4, 4), (None, 6), (3, 6)):
        settings = make_settings(**dataset, max_train_samples=limit)
        prepare(settings)
        assert len(read(Path("data/train.jsonl"))) == made
        rows = open_training_rows(settings, codec.folder, RowFormat(), "cpu")
        assert len(rows.train) == (limit or 6)


def test_rows_of_another_dataset_are_not_trained_without_a_word(
    tmp_path: Path, make_settings: MakeSettings, prepare: Callable, fake: FakeCodec
) -> None:
    prepare(make_settings(dataset_name=str(write_dataset(tmp_path / "one", train=3))))
    other = make_settings(dataset_name=str(write_dataset(tmp_path / "two", train=3)))
    with pytest.raises(UserError, match=r"was prepared from .*/one, but DATASET_NAME is .*/two"):
        prepare(other)


def test_a_limit_beyond_the_rows_is_no_limit(
    tmp_path: Path, make_settings: MakeSettings, prepare: Callable, fake: FakeCodec
) -> None:
    """Else every start would ask the dataset again, and fail where it is out of reach."""
    folder = write_dataset(tmp_path / "set", train=3)
    prepare(make_settings(dataset_name=str(folder), max_train_samples=50))
    assert not must_prepare(make_settings(dataset_name=str(folder)))


def test_a_file_of_the_user_s_is_never_made_again(
    tmp_path: Path, make_settings: MakeSettings, prepare: Callable, fake: FakeCodec
) -> None:
    dataset = {"dataset_name": str(write_dataset(tmp_path / "set", train=6))}
    prepare(make_settings(**dataset, max_train_samples=2))
    jsonl = Path("data/train.jsonl")
    jsonl.write_text(jsonl.read_text().replace("train 1.", "mended."), encoding="utf-8")
    os.utime(jsonl, ns=(1, 1))
    settings = make_settings(**dataset)
    assert not must_prepare(settings)
    fake.take_num_clips()
    prepare(settings)
    assert texts(jsonl) == ["train 0.", "mended."] and fake.take_num_clips() == 0


def test_nothing_is_prepared_without_a_dataset_name(
    make_settings: MakeSettings, prepare: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped TRAIN_JSONL names itself and what could be set, and nobody asks the Hub."""
    monkeypatch.setattr(preparer, "open_split", _never)
    monkeypatch.setattr(preparer, "split_names", _never)
    settings = make_settings(train_jsonl=Path("data/trian.jsonl"))
    assert not must_prepare(settings)
    with pytest.raises(UserError, match=r"TRAIN_JSONL: data/trian\.jsonl does not exist.*set DATASET_NAME"):
        prepare(settings)
    prepare_missing_rows(settings, RowFormat(), Path("codec"), "cpu", Processes())


def test_data_mode_none_prepares_nothing(
    tmp_path: Path, make_settings: MakeSettings, prepare: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparer, "open_split", _never)
    settings = make_settings(dataset_name=str(write_dataset(tmp_path / "set", train=3)), data_mode="none")
    with pytest.raises(UserError, match=r"TRAIN_JSONL: data/train\.jsonl .*DATA_MODE=none.*DATA_MODE=jsonl"):
        prepare(settings)
    prepare_missing_rows(settings, RowFormat(), Path("codec"), "cpu", Processes())
    assert not Path("data").exists()


def _never(*_: object, **__: object) -> Any:
    raise AssertionError("the dataset was opened")


def test_a_run_on_a_dataset_trains_its_rows(
    tmp_path: Path, make_settings: MakeSettings, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From DATASET_NAME to the rows of a run, with the real (tiny) codec: the codes are those of the clips."""
    from accelerate.state import AcceleratorState

    from finetuning import starting
    from finetuning.audio import load_audio

    AcceleratorState._reset_state(reset_partial_state=True)  # a test before may have run in another precision
    rows = demo_texts(4)
    settings = make_settings(dataset_name=str(write_parquet(tmp_path / "set", rows)), validation_fraction=0.0)
    base = resolve_base(settings)
    opened = starting.open_rows(settings, base, starting.start(settings, "cpu"))
    expected = codec.encode([load_audio(row["audio"]) for row in rows])
    assert [row["text"] for row in opened.train] == [row["text"] for row in rows]
    assert all((row["codes"] == codes).all() for row, codes in zip(opened.train, expected, strict=True))
    assert Path(opened.train[0]["ref_audio"]).is_file()
