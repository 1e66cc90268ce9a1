"""Datasets on this machine, as rows: every format, column choice, order, positions, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import PROJECT

from finetuning.errors import UserError
from finetuning.source import ColumnNames, Split, open_split, split_names

NUM_CLIPS = 7
TEXTS = [f"clip {index}, with a comma" for index in range(NUM_CLIPS)]
AUDIO_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
#: What ``Dataset.to_parquet`` writes beside the columns.
FEATURES = {
    "audio": {"sampling_rate": 16000, "_type": "Audio"},
    "text": {"dtype": "string", "_type": "Value"},
    "language": {"names": ["English", "Hausa"], "_type": "ClassLabel"},
}


def wav(index: int) -> bytes:
    """A clip that differs from all others."""
    stream = io.BytesIO()
    samples = np.random.default_rng(index).uniform(-0.5, 0.5, 800).astype(np.float32)
    soundfile.write(stream, samples, 16000, format="WAV", subtype="PCM_16")
    return stream.getvalue()


CLIPS = [wav(index) for index in range(NUM_CLIPS)]


def embedded_table(indices: Sequence[int] = range(NUM_CLIPS), features: dict | None = FEATURES) -> pa.Table:
    columns = {
        "audio": pa.array([{"bytes": CLIPS[i], "path": f"{i}.wav"} for i in indices], AUDIO_TYPE),
        "text": pa.array([TEXTS[i] for i in indices]),
        "language": pa.array([i % 2 for i in indices], pa.int64()),
        "speaker": pa.array([f"speaker {i % 3}" for i in indices]),
        "score": pa.array([i / 2 if i else float("nan") for i in indices]),
        "words": pa.array([TEXTS[i].split() for i in indices]),
    }
    table = pa.table(columns)
    if features is None:
        return table
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_clips(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, clip in enumerate(CLIPS):
        (folder / f"{index}.wav").write_bytes(clip)


# One dataset per format: each builder fills a folder (with a split "train") and returns what to open.


def make_parquet(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    for shard, indices in enumerate(([0, 1, 2, 3], [], [4, 5, 6])):
        pq.write_table(
            embedded_table(indices), folder / "data" / f"train-0000{shard}-of-00003.parquet", row_group_size=2
        )
    return folder


def make_parquet_with_paths(folder: Path) -> Path:
    write_clips(folder / "wavs")
    table = embedded_table().set_column(0, "audio", pa.array([f"wavs/{i}.wav" for i in range(NUM_CLIPS)]))
    pq.write_table(table, folder / "train.parquet")
    return folder


def make_parquet_with_plain_bytes(folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(embedded_table().set_column(0, "audio", pa.array(CLIPS)), folder / "train.parquet")
    return folder / "train.parquet"


def make_arrow(folder: Path) -> Path:
    folder.mkdir()
    table = embedded_table()
    with pa.ipc.new_stream(str(folder / "mine-train.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return folder


def make_arrow_file(folder: Path) -> Path:
    """The random-access form."""
    folder.mkdir()
    table = embedded_table()
    with pa.ipc.new_file(str(folder / "mine.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return folder / "mine.arrow"


def make_saved(folder: Path) -> Path:
    """``DatasetDict.save_to_disk``."""
    from datasets import Dataset, DatasetDict

    dataset = Dataset(embedded_table())
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(folder))
    return folder


def metadata_rows() -> list[dict[str, Any]]:
    return [
        {"file_name": f"wavs/{i}.wav", "text": TEXTS[i], "language": "EH"[i % 2], "speaker": f"speaker {i % 3}"}
        for i in range(NUM_CLIPS)
    ]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    import csv

    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_audiofolder(folder: Path) -> Path:
    write_clips(folder / "wavs")
    write_csv(folder / "metadata.csv", metadata_rows())
    return folder


def make_audiofolder_jsonl_in_splits(folder: Path) -> Path:
    for split in ("train", "dev"):
        write_clips(folder / split / "wavs")
        write_jsonl(folder / split / "metadata.jsonl", metadata_rows())
    return folder


def make_audiofolder_parquet(folder: Path) -> Path:
    write_clips(folder / "wavs")
    pq.write_table(pa.Table.from_pylist(metadata_rows()), folder / "metadata.parquet")
    return folder


def make_csv_beside_wavs(folder: Path) -> Path:
    """Not named train: the library takes such a folder for an audiofolder and drops the table."""
    write_clips(folder / "wavs")
    rows = [{"audio": row.pop("file_name"), **row} for row in metadata_rows()]
    write_csv(folder / "recordings.csv", rows)
    return folder


def make_tsv(folder: Path) -> Path:
    write_clips(folder / "wavs")
    rows = [{"path": row.pop("file_name"), "sentence": row.pop("text"), **row} for row in metadata_rows()]
    write_csv(folder / "train.tsv", rows, "\t")
    return folder / "train.tsv"


def make_jsonl(folder: Path) -> Path:
    write_clips(folder)
    rows = [{**row, "audio": f" {folder}/{i}.wav "} for i, row in enumerate(metadata_rows())]
    for row in rows:
        del row["file_name"]
    (folder / "tables").mkdir()
    write_jsonl(folder / "tables" / "train.jsonl", rows)
    return folder / "tables"


def make_json(folder: Path) -> Path:
    write_clips(folder / "wavs")
    (folder / "train.json").write_text(json.dumps(metadata_rows(), indent=1))
    return folder / "train.json"


def make_ljspeech(folder: Path) -> Path:
    write_clips(folder / "wavs")
    lines = [f'{i}|{text}|with "one quote and {text}\n' for i, text in enumerate(TEXTS)]
    (folder / "metadata.csv").write_text("".join(lines))
    return folder


def make_webdataset(folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for index, row in enumerate(metadata_rows()):
            del row["file_name"]
            for suffix, content in (("wav", CLIPS[index]), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{index}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def make_zip(folder: Path) -> Path:
    """An audiofolder in one archive."""
    folder.mkdir()
    lines = [json.dumps({**row, "file_name": f"{i}.wav"}) + "\n" for i, row in enumerate(metadata_rows())]
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        archive.writestr("metadata.jsonl", "".join(lines))
        for index, clip in enumerate(CLIPS):
            archive.writestr(f"{index}.wav", clip)
    return folder


FORMATS = [value for name, value in list(globals().items()) if name.startswith("make_")]


@pytest.fixture(scope="module", params=FORMATS, ids=lambda make: make.__name__.removeprefix("make_"))
def any_format(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset that tests only read; its folder is called as its format."""
    return str(request.param(tmp_path_factory.mktemp("any_format") / request.param.__name__))


def content(audio: Path | bytes | None) -> bytes | None:
    return audio.read_bytes() if isinstance(audio, Path) else audio


def test_rows_of_every_format(any_format: str) -> None:
    split = open_split(any_format, "train")
    rows = list(split.rows())
    assert [row.index for row in rows] == list(range(NUM_CLIPS))
    assert [content(row.audio) for row in rows] == CLIPS
    assert [row.text for row in rows] == TEXTS
    if not any_format.endswith("make_ljspeech"):
        assert [row.speaker for row in rows] == [f"speaker {i % 3}" for i in range(NUM_CLIPS)]
        assert {row.language for row in rows} in ({"E", "H"}, {"English", "Hausa"})
    assert split.num_rows in (NUM_CLIPS, None)
    assert split.can_seek == (split.num_rows is not None)
    assert "train" in split_names(any_format)
    json.dumps([row.other for row in rows], allow_nan=False)
    assert all(split.columns.audio not in row.other and "bytes" not in str(row.other) for row in rows)


def test_any_part_equals_that_part_of_the_full_pass(any_format: str) -> None:
    split = open_split(any_format, "train")
    rows = list(split.rows())
    assert list(split.rows()) == rows
    for start in range(NUM_CLIPS + 2):
        for stop in (None, 0, 1, 3, 4, 5, NUM_CLIPS, NUM_CLIPS + 5):
            assert list(split.rows(start, stop)) == rows[start:stop]


def test_a_column_equals_its_values_in_the_rows(any_format: str) -> None:
    split = open_split(any_format, "train")
    assert list(split.column(split.columns.text)) == TEXTS
    with pytest.raises(UserError, match="no column"):
        next(split.column("nothing"))


def test_a_split_can_be_pickled_and_opened_again(any_format: str) -> None:
    split, again = open_split(any_format, "train"), open_split(any_format, "train")
    assert split.fingerprint == again.fingerprint
    assert list(pickle.loads(pickle.dumps(split)).rows(2)) == list(again.rows(2))


def test_other_columns_are_kept_and_can_be_written_as_json(tmp_path: Path) -> None:
    split = open_split(str(make_parquet(tmp_path / "dataset")), "train", ColumnNames(speaker="score"))
    row = next(split.rows(3))
    assert row.audio_name == "3.wav"
    assert row.speaker == 1.5
    assert row.other == {"speaker": "speaker 0", "words": TEXTS[3].split()}
    assert next(open_split(split.dataset_name, "train").rows()).other["score"] is None  # NaN is no JSON


def test_splits(tmp_path: Path) -> None:
    assert split_names(str(make_audiofolder_jsonl_in_splits(tmp_path / "a"))) == ["train", "validation"]
    assert split_names(str(make_saved(tmp_path / "b"))) == ["train", "test"]
    assert split_names(str(make_ljspeech(tmp_path / "c"))) == ["train"]
    write_clips(tmp_path / "d" / "wavs")
    for name in ("test", "train", "notes"):
        write_csv(tmp_path / "d" / f"{name}.csv", [{"audio": "wavs/0.wav", "text": name}])
    assert split_names(str(tmp_path / "d")) == ["train", "test"]
    assert next(open_split(str(tmp_path / "d"), "test").rows()).text == "test"


def make_tables(folder: Path, *names: str) -> str:
    """Tables of one row, whose text is the table's name, beside a clip."""
    for name in names:
        table = folder / name
        write_clips(table.parent)
        rows = [{"file_name": "0.wav", "text": name}]
        (write_jsonl if table.suffix in (".jsonl", ".json") else write_csv)(table, rows)
    return str(folder)


@pytest.mark.parametrize(
    ("tables", "splits"),
    [
        ("anna/metadata.csv dev-tom/metadata.csv", {"train": [0, 1]}),
        ("anna/metadata.csv dev/metadata.csv", {"train": [0], "validation": [1]}),
        ("dev-tom/metadata.csv test-anna/metadata.csv", {"train": [0, 1]}),
        ("train/anna/metadata.csv train/dev-tom/metadata.csv", {"train": [0, 1]}),
        (
            "dev_1/metadata.csv test-01-of-03/metadata.csv training/x/metadata.csv",
            {"train": [2], "validation": [0], "test": [1]},
        ),
        (
            "dev/metadata.csv test-clean/metadata.csv train-clean-100/metadata.csv",
            {"train": [2], "validation": [0], "test": [1]},
        ),
        (
            "evaluation/metadata.csv train2/metadata.csv valid/metadata.csv",
            {"train": [1], "validation": [2], "test": [0]},
        ),
        ("anna/metadata.csv dev-x/metadata.csv train-tom/metadata.csv", {"train": [0, 1, 2]}),
        ("dataset_info.json test.json", {"test": [1]}),
        ("anna.csv hausa_val.csv tom.csv", {"train": [0, 2], "validation": [1]}),
        ("other.csv test.csv train.csv validated.csv", {"train": [2], "test": [1]}),
        ("config.json test.json train.json", {"train": [2], "test": [1]}),
    ],
)
def test_tables_and_the_splits_that_their_places_name(
    tables: str, splits: dict[str, list[int]], tmp_path: Path
) -> None:
    names = tables.split()
    dataset = make_tables(tmp_path, *names)
    found = {split: [row.text for row in open_split(dataset, split).rows()] for split in split_names(dataset)}
    assert found == {split: [names[index] for index in indices] for split, indices in splits.items()}
    assert list(found) == list(splits)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ("anna/metadata.csv dev-tom/metadata.csv", "dev-tom/metadata.csv taken for train"),
        ("other.csv train.csv validated.csv", "other.csv and 1 more left out, because train.csv"),
        ("anna/metadata.csv tom/metadata.csv", ""),
        ("train/metadata.csv dev/metadata.csv", ""),
    ],
)
def test_tables_in_doubt_are_said(tables: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    split_names(make_tables(tmp_path, *tables.split()))
    output = capsys.readouterr().out
    assert (said in output and output.count("\n") == 1) if said else output == ""


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            "anna/metadata.csv train/metadata.csv",
            r"train \(train/metadata.csv\).* split of anna/metadata.csv; move it with",
        ),
        ("dev-tom/metadata.csv train/metadata.csv", "nothing tells the split of dev-tom/metadata.csv"),
        ("metadata.csv train/metadata.csv", "nothing tells the split of metadata.csv; move it"),
        ("a/x.csv b/x.csv train.csv", "split of a/x.csv and 1 more; rename it to a/train_x.csv"),
        ("anna/metadata.csv tom/metadata.jsonl", r"different kinds \(anna/metadata.csv, tom/metadata.jsonl\)"),
    ],
)
def test_tables_that_may_belong_to_train_are_refused(tables: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^DATASET_NAME: .*{message}") as caught:
        split_names(make_tables(tmp_path, *tables.split()))
    assert "\n" not in str(caught.value)


def test_a_readme_names_the_files(tmp_path: Path) -> None:
    folder = make_audiofolder_jsonl_in_splits(tmp_path / "dataset")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: mine\n    path: dev/**\n"
        "- config_name: large\n  data_files: train/**\n---\n"
    )
    assert split_names(str(folder), "small") == ["mine"]
    assert [row.text for row in open_split(str(folder), "mine", config="small").rows()] == TEXTS
    with pytest.raises(UserError, match=r"DATASET_CONFIG: .* has several configurations.*small, large"):
        split_names(str(folder))
    with pytest.raises(UserError, match=r'DATASET_CONFIG: .* no configuration "tiny".*small, large'):
        split_names(str(folder), "tiny")


def test_a_single_saved_dataset(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset(embedded_table()).save_to_disk(str(tmp_path / "one"))
    split = open_split(str(tmp_path / "one"), "train")
    assert [row.language for row in split.rows()][:2] == ["English", "Hausa"]


def test_relative_paths_start_at_the_table_then_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "both.wav").write_bytes(folder.encode())
    (tmp_path / "here" / "only_here.wav").write_bytes(b"here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["both.wav", "only_here.wav", "nowhere.wav", "~/here/both.wav", "", "nobody\0.wav"]
    write_jsonl(tmp_path / "data" / "t.jsonl", [{"audio": name, "text": "a"} for name in names])
    rows = list(open_split(str(tmp_path / "data" / "t.jsonl"), "train").rows())
    assert [row.audio for row in rows[:5]] == [
        tmp_path / "data" / "both.wav", Path("only_here.wav"), tmp_path / "data" / "nowhere.wav",
        tmp_path / "here" / "both.wav", None,
    ]  # fmt: skip
    assert not rows[5].audio.exists()
    assert [row.audio_name for row in rows[3:5]] == ["~/here/both.wav", None]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_ref_audio_is_found_as_the_audio_is(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Absolute, else beside the table, else in the working directory; what is no file goes, with its words."""
    for name in ("data/both.wav", "here/both.wav", "here/mine.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path / "here")
    given = [
        "both.wav",
        " mine.wav ",
        str(tmp_path / "here" / "both.wav"),
        None,
        "gone.wav",
        "",
        "..",
        "x" * 5000,
        "gone.wav",
    ]
    expected = [str(tmp_path / name) for name in ("data/both.wav", "here/mine.wav", "here/both.wav")]
    rows = [{"audio": "both.wav", "text": "a", "ref_audio": name, "ref_text": "b", "id": "c"} for name in given]
    if suffix == "jsonl":
        write_jsonl(tmp_path / "data" / "t.jsonl", rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "t.parquet")
    split = open_split(str(tmp_path / "data" / f"t.{suffix}"), "train")
    found = [row.other for row in split.rows()]
    kept = [{"ref_audio": path, "ref_text": "b", "id": "c"} for path in expected]
    assert found == [*kept, {"ref_audio": None, "ref_text": "b", "id": "c"}, *[{"id": "c"}] * 5]
    assert [row.other for row in pickle.loads(pickle.dumps(split)).rows()] == found
    output = capsys.readouterr().out
    assert "ref_audio of row 5 (gone.wav) is no file" in output and output.count("\n") == 1


def test_csv_with_quotes_line_breaks_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    write_clips(tmp_path / "wavs")
    text = '\ufeffaudio,text,note\r\n\r\na.wav,"two\r\nlines, ""quoted""",\r\n\r\nb.wav,é,x\r\n'
    (tmp_path / "train.csv").write_bytes(text.encode())
    rows = list(open_split(str(tmp_path), "train").rows())
    assert [(row.audio_name, row.text, row.other) for row in rows] == [
        ("a.wav", 'two\r\nlines, "quoted"', {"note": None}), ("b.wav", "é", {"note": "x"}),
    ]  # fmt: skip


def read_texts(path: Path, lines: Sequence[str]) -> list[str]:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [row.text for row in open_split(str(path), "train").rows()]


def test_quotes_in_a_table_with_bars_are_text(tmp_path: Path) -> None:
    texts = ['"Hello there', 'b "c"', '"whole"', "d, e"]
    lines = ["file_name|text", *(f"{index}.wav|{text}" for index, text in enumerate(texts))]
    assert read_texts(tmp_path / "bars.csv", lines) == texts
    quoted = ['"file_name"|"text"', '"0.wav"|"a | ""b"""', '"1.wav"|"c"']
    assert read_texts(tmp_path / "quoted.csv", quoted) == ['a | "b"', "c"]
    with pytest.raises(UserError, match=r'line 3 has 3 fields, the header has 2; take the "\|" out of the text'):
        read_texts(tmp_path / "bars.csv", [*lines[:2], "1.wav|a | b"])


@pytest.mark.parametrize(
    ("suffix", "lines", "number"),
    [
        ("csv", ['0.wav,"Hello there', "1.wav,b", "2.wav,c", "3.wav,d"], 2),
        ("csv", ["0.wav,a", '1.wav,"Hello', "2.wav,he said", '3.wav,"Bye, you"'], 3),
        ("csv", ["0.wav,a", '1.wav,"Hello', '2.wav,5 feet 7"', "3.wav,d"], 3),
        ("csv", ["", "0.wav,a", '1.wav,"Hello', '"2.wav",x"', '3.wav,d"'], 4),
        ("tsv", ["0\ta", '1\t"Hello', '2\t5 feet 7"', "3\td"], 3),
        ("tsv", ["0\ta", '1\t"Hello', *("2\tlong" for _ in range(50_000))], 3),
    ],
    ids=["to the end", "to the next field", "to another inch", "quoted name", "tab", "too long for a field"],
)
def test_a_quote_that_is_not_closed_is_refused(suffix: str, lines: list[str], number: int, tmp_path: Path) -> None:
    header = {"tsv": "file_name\ttext", "csv": "file_name,text"}[suffix]
    with pytest.raises(UserError, match=f"t.{suffix} line {number} opens a double quote that is not closed") as caught:
        read_texts(tmp_path / f"t.{suffix}", [header, *lines])
    assert "\n" not in str(caught.value)


def test_a_quote_that_is_not_closed_before_the_name_is_refused(tmp_path: Path) -> None:
    lines = ["text,file_name\r", '"Hello,0.wav\r', '5 feet 7",1.wav\r']
    with pytest.raises(UserError, match=r"t.csv line 2 opens a double quote"):
        read_texts(tmp_path / "t.csv", lines)


def test_line_breaks_and_commas_within_quotes_are_text(tmp_path: Path) -> None:
    rows = ['0.wav,"one, two,', "three, four", '"', '1.wav,"a ""quoted"", word"', '2.wav,"Yes," she said.']
    texts = ["one, two,\nthree, four\n", 'a "quoted", word', "Yes, she said."]
    assert read_texts(tmp_path / "t.csv", ["file_name,text", *rows]) == texts
    assert read_texts(tmp_path / "t.tsv", ["file_name\ttext", '0.wav\t"one,', 'two"', "1.wav\tb"]) == ["one,\ntwo", "b"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_rows_of_a_long_table_are_sought(suffix: str, tmp_path: Path) -> None:
    rows = [{"audio": f"{i}.wav", "text": f"line\n{i} é" * (i % 7 + 1)} for i in range(5000)]
    (write_csv if suffix == "csv" else write_jsonl)(tmp_path / f"t.{suffix}", rows)
    split = open_split(str(tmp_path / f"t.{suffix}"), "train")
    texts = [row["text"] for row in rows]
    assert split.num_rows == 5000
    for start in (0, 1, 1023, 1024, 1025, 4096, 4999):
        assert [row.text for row in split.rows(start, start + 1030)] == texts[start : start + 1030]
    lines = CountingLines.install(split)
    next(split.rows(4500))
    assert lines.count < 2 * 1024 * 10


class CountingLines:
    """Counts lines that a table reads."""

    def __init__(self) -> None:
        self.count = 0

    @classmethod
    def install(cls, split: Split) -> CountingLines:
        counter, table = cls(), split._reader.tables[0]
        raw_rows = table._raw_rows

        def counted(lines: Any) -> Any:
            for raw in raw_rows(lines):
                counter.count += 1
                yield raw

        table._raw_rows = counted
        return counter


def test_fingerprint_follows_the_data(tmp_path: Path) -> None:
    folder = make_audiofolder(tmp_path / "dataset")
    first = open_split(str(folder), "train").fingerprint
    (folder / "wavs" / "0.wav").write_bytes(CLIPS[1])  # of path columns only the table counts
    assert open_split(str(folder), "train").fingerprint == first
    with (folder / "metadata.csv").open("a") as stream:
        stream.write("wavs/0.wav,more,E,speaker 0\n")
    second = open_split(str(folder), "train").fingerprint
    os.utime(folder / "metadata.csv", (1, 1))
    third = open_split(str(folder), "train").fingerprint
    assert len({first, second, third}) == 3
    assert make_audiofolder(tmp_path / "other") and open_split(str(tmp_path / "other"), "train").fingerprint != first


# -------------------------------------------------------------------------------------------------------- columns


@pytest.fixture
def open_columns(tmp_path: Path) -> Callable[..., Split]:
    """Opens a one-row parquet file with these columns."""

    def open_(values: dict[str, Any], **names: str) -> Split:
        columns = {name: pa.array([value]) for name, value in values.items()}
        pq.write_table(pa.table(columns), tmp_path / "train.parquet")
        return open_split(str(tmp_path / "train.parquet"), "train", ColumnNames(**names))

    return open_


CLIP = {"bytes": b"RIFF", "path": "a.wav"}


@pytest.mark.parametrize(
    ("values", "chosen", "said"),
    [
        ({"audio": CLIP, "text": "a", "speaker": "x", "language": "en"}, "text audio speaker language", ""),
        ({"audio": CLIP, "text": "a", "speaker_id": 3}, "text audio - -", ""),
        ({"file": "a.wav", "audio": CLIP, "normalized_text": "a", "text": "b"}, "text audio - -", ""),
        ({"recording": CLIP, "path": "a.wav", "text": "a"}, "text recording - -", 'AUDIO_COLUMN="recording"'),
        ({"wav": b"RIFF", "text": "a", "path": "a"}, "text wav - -", 'AUDIO_COLUMN="wav"'),
        ({"my_file_name": "a.wav", "text": "a"}, "text my_file_name - -", 'AUDIO_COLUMN="my_file_name"'),
        ({"audio": CLIP, "Sentence": "a", "raw_text": "a"}, "Sentence audio - -", 'TEXT_COLUMN="Sentence"'),
        ({"audio": CLIP, "text": "a", "locale": "ha"}, "text audio - locale", 'LANGUAGE_COLUMN="locale"'),
    ],
)
def test_columns_are_guessed_and_said(
    open_columns: Callable, values: dict, chosen: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    columns = open_columns(values).columns
    found = [columns.text, columns.audio, columns.speaker, columns.language]
    assert found == [None if name == "-" else name for name in chosen.split()]
    output = capsys.readouterr().out
    assert (said in output and output.count("\n") == 1) if said else output == ""


def test_columns_that_are_set_win_and_are_not_said(open_columns: Callable, capsys: pytest.CaptureFixture) -> None:
    values = {"audio": CLIP, "clip": CLIP, "text": "a", "wylie": "b", "speaker_id": 3, "dialect": "c"}
    names = {"audio": "clip", "text": "wylie", "speaker": "speaker_id", "language": "dialect"}
    row = next(open_columns(values, **names).rows())
    assert (row.text, row.speaker, row.language, row.other) == ("b", 3, "c", {"text": "a"})
    assert capsys.readouterr().out == ""


def test_column_names_from_settings(make_settings: Callable) -> None:
    assert ColumnNames.from_settings(make_settings()) == ColumnNames()
    settings = make_settings(text_column="text", speaker_column="who")
    assert ColumnNames.from_settings(settings) == ColumnNames(text="text", speaker="who")


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ({"audio": CLIP, "text": "a"}, {"text": "words"}, 'TEXT_COLUMN: .* no column "words".*: audio, text'),
        ({"audio": CLIP, "text": "a"}, {"audio": "wav"}, 'AUDIO_COLUMN: .* no column "wav"'),
        ({"audio": CLIP, "text": "a"}, {"speaker": "who"}, 'SPEAKER_COLUMN: .* no column "who"'),
        ({"audio": CLIP, "text": "a"}, {"language": "x"}, 'LANGUAGE_COLUMN: .* no column "x"'),
        ({"audio": CLIP, "text": 3}, {}, 'TEXT_COLUMN: column "text" .* holds numbers'),
        ({"audio": CLIP, "text": ["a"]}, {}, 'TEXT_COLUMN: column "text" .* holds list'),
        ({"audio": CLIP, "n": 3, "text": "a"}, {"text": "n"}, 'TEXT_COLUMN: column "n" .* holds numbers'),
        ({"audio": CLIP, "gloss": "a"}, {}, "TEXT_COLUMN: .* no column that is known to hold transcripts"),
        ({"audio": CLIP, "sentence": "a", "transcript": "b"}, {}, r"TEXT_COLUMN: several.*\(sentence, transcript\)"),
        ({"text": "a", "id": 3}, {}, "AUDIO_COLUMN: .* no audio; its columns are: text, id"),
        ({"one": CLIP, "two": CLIP, "text": "a"}, {}, r"AUDIO_COLUMN: several columns .*\(one, two\)"),
        ({"audio": CLIP, "text": "a", "n": 3}, {"audio": "n"}, 'AUDIO_COLUMN: column "n" .* holds numbers'),
    ],
)
def test_columns_that_do_not_fit(open_columns: Callable, values: dict, names: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_columns(values, **names)
    assert "\n" not in str(caught.value)


def test_a_text_column_of_numbers_in_a_csv(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [{"audio": "a.wav", "text": "12"}, {"audio": "b.wav", "text": "13.5"}])
    with pytest.raises(UserError, match=r'TEXT_COLUMN: column "text" .* holds numbers'):
        open_split(str(tmp_path / "t.csv"), "train")


def test_the_column_of_an_audiofolder_may_be_called_audio(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = str(make_audiofolder(tmp_path / "dataset"))
    for names in (ColumnNames(), ColumnNames(audio="audio"), ColumnNames(audio="file_name")):
        assert open_split(folder, "train", names).columns.audio == "file_name"
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------------------------- errors


def broken(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def only_clips(folder: Path) -> None:
    write_clips(folder / "wavs")


def no_rows(folder: Path) -> None:
    pq.write_table(embedded_table([]), folder / "train.parquet")


def cut_parquet(folder: Path) -> None:
    pq.write_table(embedded_table(), folder / "train.parquet")
    whole = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "holds no data files"),
        (only_clips, "holds audio but no transcripts; a metadata.csv .*file_name,text"),
        (no_rows, r'\(split "train"\) is empty'),
        (cut_parquet, "train.parquet cannot be read"),
        (broken("train.arrow", b"no arrow at all"), "train.arrow cannot be read"),
        (broken("train.csv", b"audio,text\na.wav,caf\xe9\n"), "train.csv is not UTF-8"),
        (broken("train.csv", b"audio,text\na.wav,hello, you\n"), "train.csv line 2 has 3 fields, the header has 2"),
        (broken("train.csv", b""), "train.csv|is empty|no data files"),
        (broken("train.csv", b"audio,text\n"), "is empty"),
        (broken("train.jsonl", b'{"audio": "a.wav", "text": "a"}\n{"audio": \n'), "train.jsonl line 2 is not a JSON"),
        (broken("train.json", b'[{"audio": "a.wav"}, 3]'), "train.json: item 2 of the list is not"),
        (broken("train.json", b'[{"audio": "a.wav"'), "train.json cannot be read"),
        (broken("train.tar", b"no tar"), "cannot be streamed .*convert the dataset to parquet"),
        (broken("dataset_dict.json", b"{"), "dataset_dict.json cannot be read"),
        (broken("dataset.py", b"print()"), "made by a script of its own"),
    ],
)
def test_folders_that_cannot_be_used(make: Callable, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=message) as caught:
        list(open_split(str(folder), "train").rows())
    assert "\n" not in str(caught.value)


def test_names_that_are_no_dataset(tmp_path: Path) -> None:
    for name in ("./no_folder", str(tmp_path / "no_folder"), "a/b/c", "~/no_such_folder_here", "not an id"):
        with pytest.raises(UserError, match="there is no file or folder"):
            split_names(name)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="a file of an unknown kind"):
        split_names(str(tmp_path / "notes.txt"))


def test_offline() -> None:
    """The test process itself has HF_HUB_OFFLINE=1."""
    with pytest.raises(UserError, match=r"DATASET_NAME: me/speech .* cannot be reached .*HF_HUB_OFFLINE.*its folder"):
        open_split("me/speech", "train")


def test_no_such_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'no split "dev"; it has: train, test .*--split or TRAIN_SPLIT'):
        open_split(str(make_saved(tmp_path / "dataset")), "dev")


def test_a_file_that_breaks_later_is_named(tmp_path: Path) -> None:
    folder = make_parquet(tmp_path / "dataset")
    split = open_split(str(folder), "train")
    (folder / "data" / "train-00002-of-00003.parquet").write_bytes(b"PAR1" * 100)
    rows = split.rows()
    assert len(list(islice(rows, 4))) == 4
    with pytest.raises(UserError, match=r"train-00002-of-00003.parquet cannot be read"):
        next(rows)


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    """The footer is whole, so only reading shows it."""
    folder = make_parquet(tmp_path / "dataset")
    file = folder / "data" / "train-00000-of-00003.parquet"
    content = bytearray(file.read_bytes())
    content[8:2000] = b"\xff" * 1992
    file.write_bytes(content)
    split = open_split(str(folder), "train")
    with pytest.raises(UserError, match=r"train-00000-of-00003.parquet cannot be read"):
        list(split.rows())


def test_shards_beside_a_sample_clip(tmp_path: Path) -> None:
    """A copy of a Hub repository: its own names of splits, and files that are no rows."""
    folder = make_parquet(tmp_path / "dataset")
    for file in (folder / "data").iterdir():
        file.rename(file.with_name(file.name.replace("train", "clean")))
    (folder / "sample.wav").write_bytes(CLIPS[0])
    (folder / "speakers.csv").write_text("id,name\n1,x\n")
    assert split_names(str(folder)) == ["clean"]
    assert [row.text for row in open_split(str(folder), "clean").rows()] == TEXTS


# --------------------------------------------------------------------------------------------------------- memory


MEMORY = """
import json, sys
def anonymous_mb():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
import pyarrow.parquet
from finetuning.source import open_split
split = open_split(sys.argv[1], "train")
next(split.rows()), next(split.column("text"))
before, peak, count, last = anonymous_mb(), 0, 0, None
for count, last in enumerate(split.column("text"), 1):
    if count % 20_000 == 0:
        peak = max(peak, anonymous_mb())
rows = []
for row in split.rows(599_000):
    rows.append((row.index, row.text, len(row.audio)))
    peak = max(peak, anonymous_mb())
for row in split.rows(300_000, 301_000):
    peak = max(peak, anonymous_mb())
print(json.dumps({"growth_mb": peak - before, "count": count, "last": last, "row": rows[-1], "rows": len(rows)}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")
def test_600_000_rows_need_little_memory(tmp_path: Path) -> None:
    """Clips of 600 bytes in row groups of 120 MB: one that is held whole shows."""
    clips = [os.urandom(600) for _ in range(1000)]
    audio = pa.concat_arrays([pa.array([{"bytes": clip, "path": None} for clip in clips], AUDIO_TYPE)] * 200)
    schema = pa.schema([("audio", AUDIO_TYPE), ("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "train.parquet", schema, compression="none", use_dictionary=False) as writer:
        for first in range(0, 600_000, 200_000):
            text = pa.array([f"text {first + i}" for i in range(200_000)])
            writer.write_table(pa.table({"audio": audio, "text": text}, schema))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "train.parquet")],
        cwd=PROJECT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["count"], found["last"], found["rows"]) == (600_000, "text 599999", 1000)
    assert found["row"] == [599_999, "text 599999", 600]
    assert found["growth_mb"] < 80  # 30 here; with a whole row group 270


def test_what_is_not_asked_for_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged audio column does not matter to a pass over the texts, nor a damaged file to rows after it."""
    split = open_split(str(make_parquet(tmp_path / "dataset")), "train")
    (tmp_path / "dataset" / "data" / "train-00000-of-00003.parquet").write_bytes(b"gone")
    assert [row.text for row in split.rows(4)] == TEXTS[4:]
    asked = []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, *args, **options: asked.append(options["columns"]) or original(self, *args, **options),
    )
    next(open_split(str(make_parquet(tmp_path / "again")), "train").column("text"))
    assert asked == [["text"]]
