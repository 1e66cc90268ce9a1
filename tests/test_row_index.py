"""The index: what happens to bad rows, when it is built again, the memory map, and held-out rows."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import PROJECT

from finetuning import row_index
from finetuning.errors import UserError
from finetuning.manifest import RowFormat
from finetuning.row_index import Manifest, RowStop, find_index, hold_out, open_rows

WriteJsonl = Callable[..., Path]
Build = Callable[..., Manifest]


def codes(seed: int = 0, num_frames: int = 3) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 2048, (num_frames, 16)).tolist()


def row(seed: int = 0, **fields: Any) -> dict[str, Any]:
    """A good row with codes of its own."""
    return {"text": f"Sentence {seed}.", "audio_codes": codes(seed)} | fields


def indexes(folder: Path) -> list[Path]:
    """What lies in the folder of indexes."""
    return sorted((folder / ".rows").iterdir()) if (folder / ".rows").exists() else []


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A file that exists; the index does not look inside."""
    path = tmp_path / "clip.wav"
    path.write_bytes(b"RIFF")
    return path


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """open_rows with the list of bad rows in tmp_path/output."""

    def build_from(jsonl: Path, max_rows: int | None = None, **row_format: Any) -> Manifest:
        rejected = tmp_path / "output" / "rejected.jsonl"
        return open_rows(jsonl, RowFormat(**row_format), "TRAIN_JSONL", max_rows=max_rows, rejected_file=rejected)

    return build_from


# -------------------------------------------------------------------------------------------------- what is in them


def varied_rows(count: int) -> list[dict[str, Any]]:
    """Texts, languages, speakers and codes of many kinds; most without an instruction."""
    return [
        row(
            number,
            text="ä" * (number % 7 + 1) + f" {number}",
            audio_codes=codes(number, 2 + number % 5),
            speaker=f"speaker {number % 3}",
            **({"instruct": "Be glad."} if number % 4 == 0 else {}),
        )
        for number in range(count)
    ]


@pytest.fixture
def hash_of(tmp_path: Path) -> Callable[[list[dict[str, Any]]], str]:
    """The content hash of rows in a file of their own."""
    numbers = iter(range(1000))

    def content_hash(rows: list[dict[str, Any]]) -> str:
        jsonl = tmp_path / str(next(numbers)) / "rows.jsonl"
        jsonl.parent.mkdir()
        jsonl.write_text("".join(json.dumps(fields) + "\n" for fields in rows), encoding="utf-8")
        return open_rows(jsonl, RowFormat(), "TRAIN_JSONL").content_hash()

    return content_hash


def test_selected_rows_hash_as_in_a_file_of_their_own(
    build: Build, write_jsonl: WriteJsonl, hash_of: Callable[[list[dict[str, Any]]], str]
) -> None:
    """Whole batches, parts of them, and rows in any order: only what the rows hold counts."""
    rows = varied_rows(3 * row_index.ROWS_PER_BATCH + 50)
    manifest, everything = build(write_jsonl(rows)), np.arange(len(rows))
    middle = np.arange(row_index.ROWS_PER_BATCH, 2 * row_index.ROWS_PER_BATCH)
    for positions in (
        everything,
        everything[everything % 50 != 7],
        middle,
        middle[::-1],
        everything[300:301],
        np.random.default_rng(0).permutation(len(rows))[:40],
    ):
        expected = hash_of([rows[position] for position in positions])
        assert manifest.select(positions).content_hash() == expected
    assert manifest.content_hash() == hash_of(rows)
    assert manifest.select(everything[:0]).content_hash() == manifest.select(everything[5:5]).content_hash()


def test_the_hash_sees_every_change_that_training_would_see(hash_of: Callable[[list[dict[str, Any]]], str]) -> None:
    rows = varied_rows(9)
    changes: list[dict[str, Any]] = [
        {"text": rows[5]["text"] + "."},
        {"language": "English"},
        {"speaker": "other"},
        {"instruct": "Be sad."},
        {"audio_codes": [[*frame[:-1], (frame[-1] + 1) % 2048] for frame in rows[5]["audio_codes"]]},
        {"audio_codes": rows[5]["audio_codes"] + rows[5]["audio_codes"][:1]},
    ]
    variants = [[*rows[:5], rows[5] | change, *rows[6:]] for change in changes]
    # The same letters and frames in a row, but other rows around them.
    moved = [rows[0] | {"text": "ab"}, rows[1] | {"text": "c"}], [rows[0] | {"text": "a"}, rows[1] | {"text": "bc"}]
    longer, shorter = rows[3]["audio_codes"] + rows[4]["audio_codes"][:1], rows[4]["audio_codes"][1:]
    variants += [*moved, [*rows[:3], rows[3] | {"audio_codes": longer}, rows[4] | {"audio_codes": shorter}, *rows[5:]]]
    variants += [rows, rows[:-1], rows[::-1], [rows[0] | {"instruct": None}, *rows[1:]]]
    assert len({hash_of(variant) for variant in variants}) == len(variants)


def test_the_hash_does_not_see_where_a_row_came_from(
    hash_of: Callable[[list[dict[str, Any]]], str], clip: Path
) -> None:
    rows = varied_rows(5)
    elsewhere = [fields | {"audio": str(clip), "ref_audio": str(clip), "measures": {"seconds": 1}} for fields in rows]
    assert hash_of(rows) == hash_of(elsewhere)


# ----------------------------------------------------------------------------------------------------- whole files


@pytest.mark.parametrize(
    "content, part",
    [(None, "does not exist"), (b"", "is empty"), (b"\n \n", "is empty"), (b'{"text": "\xff"}\n', "is not UTF-8 text")],
    ids=["missing", "empty", "blank", "latin-1"],
)
def test_unusable_file_names_setting_and_path(build: Build, tmp_path: Path, content: bytes | None, part: str) -> None:
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=part) as error:
        build(file)
    assert str(error.value).startswith(f"TRAIN_JSONL: {file} ")
    assert not (tmp_path / "output").exists()


def test_utf_16_file_is_refused_as_a_whole(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row()), encoding="utf-16")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        build(file)


def test_file_with_bom_and_blank_lines_is_built(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row(seed)) for seed in range(3)), encoding="utf-8-sig")
    assert build(file).column("line").tolist() == [1, 3, 5]


def test_few_bad_rows_are_skipped_and_listed(
    build: Build, write_jsonl: WriteJsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = [row(seed) for seed in range(20)]
    rows[3], rows[11] = row(3, text=" "), '{"text": "Ü'
    jsonl = write_jsonl(rows)
    built = build(jsonl)
    assert built.column("line").tolist() == [n for n in range(1, 21) if n not in (4, 12)]
    listed = [json.loads(line) for line in (tmp_path / "output/rejected.jsonl").read_text("utf-8").splitlines()]
    assert [(item["file"], item["line"]) for item in listed] == [(str(jsonl), 4), (str(jsonl), 12)]
    assert listed[0]["reason"] == "text is empty" and json.loads(listed[0]["row"]) == rows[3]
    assert "cut off" in listed[1]["reason"] and listed[1]["row"] == rows[11]
    said = capsys.readouterr().out
    assert "2 of 20" in said and f"{jsonl} line 4: text is empty" in said and "rejected.jsonl" in said


def test_list_of_bad_rows_goes_when_they_were_mended(build: Build, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    build(write_jsonl([*(row(seed) for seed in range(19)), row(19, text="")]))
    assert (tmp_path / "output/rejected.jsonl").exists()
    build(write_jsonl([row(seed) for seed in range(20)]))
    assert not (tmp_path / "output/rejected.jsonl").exists()


@pytest.mark.parametrize("num_bad, refused", [(1, False), (2, True)])
def test_a_tenth_is_the_limit(build: Build, write_jsonl: WriteJsonl, num_bad: int, refused: bool) -> None:
    jsonl = write_jsonl([row(seed) for seed in range(10 - num_bad)] + [row(text="")] * num_bad)
    if not refused:
        assert len(build(jsonl)) == 9
        return
    with pytest.raises(UserError):
        build(jsonl)


def test_many_bad_rows_stop_everything_and_leave_nothing(build: Build, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    jsonl = write_jsonl([row(seed) for seed in range(20)] + [row(text="")] * 7)
    with pytest.raises(UserError) as error:
        build(jsonl)
    message = str(error.value)
    assert message.startswith("7 of 27 rows cannot be used")
    assert all(f"{jsonl} line {number}: text is empty" in message for number in range(21, 26))
    assert "line 26" not in message and "2 more" in message
    assert list(tmp_path.iterdir()) == [jsonl]


def test_file_of_one_bad_row(build: Build, write_jsonl: WriteJsonl) -> None:
    with pytest.raises(UserError, match=r"1 of 1 rows cannot be used:\n.* line 1: no text"):
        build(write_jsonl([{"audio_codes": codes()}]))


def test_rows_that_all_have_the_same_codes(build: Build, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    jsonl = write_jsonl([row(0, text=f"Sentence {number}.") for number in range(3)])
    with pytest.raises(UserError, match=r"all 3 rows .* have the same codes"):
        build(jsonl)
    assert list(tmp_path.iterdir()) == [jsonl]


def test_one_row_alone_and_two_equal_ones_among_others_are_fine(build: Build, write_jsonl: WriteJsonl) -> None:
    assert len(build(write_jsonl([row()]))) == 1
    assert len(build(write_jsonl([row(), row(), row(1)]))) == 3


def test_speaker_names_that_differ_in_case_only(build: Build, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    jsonl = write_jsonl([row(0, speaker="Ada"), row(1, speaker="Bea"), row(2, speaker="Ada"), row(3, speaker="ADA")])
    with pytest.raises(UserError) as error:
        build(jsonl)
    message = str(error.value)
    assert f'"Ada" ({jsonl} line 1)' in message and f'"ADA" ({jsonl} line 4)' in message
    assert list(tmp_path.iterdir()) == [jsonl]


def test_speaker_name_clashes_with_the_default(build: Build, write_jsonl: WriteJsonl) -> None:
    with pytest.raises(UserError, match="clash"):
        build(write_jsonl([row(0), row(1, speaker="ada")]), default_speaker="Ada")


@pytest.mark.parametrize("last", [row(9, speaker="ADA"), None], ids=["clash", "same codes"])
def test_refused_build_leaves_no_list_of_bad_rows_behind(
    build: Build, write_jsonl: WriteJsonl, tmp_path: Path, last: dict[str, Any] | None
) -> None:
    good = [row(seed if last else 0, speaker="Ada") for seed in range(12)]
    jsonl = write_jsonl([*good, row(text=""), *([last] if last else [])])
    with pytest.raises(UserError):
        build(jsonl)
    assert list(tmp_path.iterdir()) == [jsonl]


def test_refused_build_keeps_what_was_there(build: Build, write_jsonl: WriteJsonl) -> None:
    before = build(write_jsonl([row(seed) for seed in range(3)], "good.jsonl"))
    content = before.arrow_file.read_bytes()
    with pytest.raises(UserError):
        build(write_jsonl([row(text="")]))
    assert before.arrow_file.read_bytes() == content
    assert indexes(before.arrow_file.parent.parent.parent) == [before.arrow_file.parent]


@pytest.mark.parametrize("max_rows, last_line", [(1, 1), (10, 11), (11, 12), (50, 12)])
def test_max_rows_counts_good_rows(build: Build, write_jsonl: WriteJsonl, max_rows: int, last_line: int) -> None:
    rows = [row(seed) for seed in range(12)]
    rows[1] = row(1, text="")
    built = build(write_jsonl(rows), max_rows)
    assert built.column("line").tolist() == [number for number in range(1, last_line + 1) if number != 2]


def test_several_speaker_ids_trained_as_one_are_said_once(
    build: Build, write_jsonl: WriteJsonl, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl = write_jsonl([row(seed, speaker_id=seed % 3) for seed in range(6)])
    build(jsonl)
    assert capsys.readouterr().out.count("SPEAKER_COLUMN=speaker_id") == 1
    assert set(build(jsonl, speaker_key="speaker_id").column("speaker")) == {"0", "1", "2"}
    assert "SPEAKER_COLUMN" not in capsys.readouterr().out
    build(write_jsonl([row(seed, speaker_id=5) for seed in range(6)]))
    build(write_jsonl([row(seed) for seed in range(6)]))
    assert "SPEAKER_COLUMN" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- life of an index


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were read line by line."""
    read: list[Path] = []
    real = row_index.read_rows
    monkeypatch.setattr(
        row_index, "read_rows", lambda jsonl, *rest, **more: read.append(jsonl) or real(jsonl, *rest, **more)
    )
    return read


def test_a_file_is_read_once(build: Build, write_jsonl: WriteJsonl, num_read: list[Path]) -> None:
    jsonl = write_jsonl([row(seed) for seed in range(5)])
    first = build(jsonl)
    assert find_index(jsonl, RowFormat()).arrow_file == first.arrow_file == build(jsonl).arrow_file
    assert num_read == [jsonl]
    assert [path.name for path in sorted(first.arrow_file.parent.iterdir())] == [
        "rejected.jsonl", "rows.arrow", "summary.json"
    ]  # fmt: skip


def test_a_changed_file_is_read_again_and_its_old_index_goes(
    build: Build, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    other = build(write_jsonl([row(9)], "train.jsonl-2.jsonl")).arrow_file.parent
    old = build(write_jsonl([row(seed) for seed in range(5)]))
    jsonl = write_jsonl([row(seed) for seed in range(7)])
    assert find_index(jsonl, RowFormat()) is None
    new = build(jsonl)
    assert len(new) == 7 and indexes(tmp_path) == sorted([new.arrow_file.parent, other])
    assert old[4]["text"] == "Sentence 4."  # who has it open goes on


@pytest.mark.parametrize(
    "change",
    [
        {"max_rows": 3},
        {"needs_codes": False},
        {"row_format": RowFormat(default_speaker="Ada")},
        {"working_directory": "."},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_result_has_an_index_of_its_own(
    write_jsonl: WriteJsonl, tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl = write_jsonl([row(seed) for seed in range(5)])
    first = open_rows(jsonl, RowFormat(), "TRAIN_JSONL")
    if change.pop("working_directory", None):
        monkeypatch.chdir(tmp_path)
    given = {"row_format": RowFormat()} | change
    assert find_index(jsonl, **given) is None
    second = open_rows(jsonl, setting="TRAIN_JSONL", **given)
    assert indexes(tmp_path) == sorted([first.arrow_file.parent, second.arrow_file.parent])
    assert find_index(jsonl, RowFormat()) is not None or change == {}


def test_what_was_said_is_said_again(
    build: Build, write_jsonl: WriteJsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(seed, speaker_id=seed % 3) for seed in range(30)] + [row(30, text="")]
    jsonl = write_jsonl(rows)
    build(jsonl)
    first, listed = capsys.readouterr().out, (tmp_path / "output/rejected.jsonl").read_text()
    assert "1 of 31 rows" in first and "3 different speaker_id" in first
    (tmp_path / "output/rejected.jsonl").unlink()
    build(jsonl)
    assert capsys.readouterr().out == first and (tmp_path / "output/rejected.jsonl").read_text() == listed
    open_rows(jsonl, RowFormat(), "TRAIN_JSONL")
    assert f"listed in {indexes(tmp_path)[0] / 'rejected.jsonl'}" in capsys.readouterr().out


def test_bad_rows_are_not_kept_in_memory(
    build: Build, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of nothing but bad rows is listed line by line, not held."""
    held = []
    check = row_index._Facts.check
    monkeypatch.setattr(
        row_index._Facts,
        "check",
        lambda self, tally, *rest: held.append(len(tally.first)) or check(self, tally, *rest),
    )
    with pytest.raises(UserError, match=r"400 of 400 rows cannot be used(.|\n)*line 5: (.|\n)*and 395 more"):
        build(write_jsonl([row(seed, text="") for seed in range(400)]))
    assert held == [5]


@pytest.mark.parametrize("what", ["rows.arrow", "rejected.jsonl", "summary.json", "cut"])
def test_an_index_that_is_not_whole_is_built_again(
    build: Build, write_jsonl: WriteJsonl, tmp_path: Path, what: str
) -> None:
    jsonl = write_jsonl([row(seed) for seed in range(5)])
    built = build(jsonl).arrow_file
    if what == "cut":
        built.write_bytes(built.read_bytes()[:-10])
    else:
        (built.parent / what).unlink()
    assert find_index(jsonl, RowFormat()) is None
    assert build(jsonl)[4]["codes"].tolist() == codes(4)
    assert indexes(tmp_path) == [built.parent]


def test_rows_are_read_again_when_missing_files_are_there(
    build: Build, write_jsonl: WriteJsonl, clip: Path, tmp_path: Path, num_read: list[Path]
) -> None:
    rows = [row(seed) for seed in range(20)]
    rows[3] |= {"ref_audio": "voice.wav"}
    rows[4] |= {"audio": "clips/4.wav"}
    jsonl = write_jsonl(rows)
    assert len(build(jsonl)) == 19 and len(build(jsonl)) == 19 and len(num_read) == 1
    (tmp_path / "voice.wav").write_bytes(b"RIFF")
    assert build(jsonl)[3]["ref_audio"] == str(tmp_path / "voice.wav") and len(num_read) == 2
    assert build(jsonl)[4]["audio"] == "clips/4.wav" and len(num_read) == 2
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/4.wav").write_bytes(b"RIFF")
    assert build(jsonl)[4]["audio"] == str(tmp_path / "clips/4.wav") and len(num_read) == 3
    assert build(jsonl)[4]["audio"] == str(tmp_path / "clips/4.wav") and len(num_read) == 3
    assert len(indexes(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_has_its_index_elsewhere(
    write_jsonl: WriteJsonl, tmp_path: Path, num_read: list[Path]
) -> None:
    (tmp_path / ".rows").write_text("in the way, as a read-only disk would be")
    jsonl, spare = write_jsonl([row(seed) for seed in range(5)]), tmp_path / "output" / "rows"
    with pytest.raises(
        UserError, match=r"TRAIN_JSONL: .*train\.jsonl can be written neither to .*\.rows \(File exists"
    ):
        open_rows(jsonl, RowFormat(), "TRAIN_JSONL")
    for _ in range(2):
        opened = open_rows(jsonl, RowFormat(), "TRAIN_JSONL", spare_folder=spare)
        assert opened.arrow_file.parent.parent == spare
    assert len(num_read) == 1 and find_index(jsonl, RowFormat(), spare_folder=spare) is not None
    # Another folder's file of that name keeps out of the way.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".rows").write_text("")
    (tmp_path / "b" / "train.jsonl").write_text(json.dumps(row(0)))
    open_rows(tmp_path / "b" / "train.jsonl", RowFormat(), "TRAIN_JSONL", spare_folder=spare)
    assert len(list(spare.iterdir())) == 2


def test_a_refused_file_leaves_no_spare_folder(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    (tmp_path / ".rows").write_text("")
    with pytest.raises(UserError, match="text is empty"):
        open_rows(write_jsonl([row(text="")]), RowFormat(), "TRAIN_JSONL", spare_folder=tmp_path / "output" / "rows")
    assert not (tmp_path / "output").exists()


KILLED = """
import os, sys
from pathlib import Path
from finetuning import row_index
from finetuning.manifest import RowFormat
count = 0
def slow(rows, *rest):
    global count
    for row in noted(rows, *rest):
        count += 1
        if count == 700:
            os.kill(os.getpid(), 9)
        yield row
noted, row_index._noted = row_index._noted, slow
row_index.open_rows(Path(sys.argv[1]), RowFormat(), "TRAIN_JSONL")
"""


def test_a_build_that_was_killed_leaves_nothing_that_counts(
    build: Build, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    jsonl = write_jsonl([row(seed) for seed in range(1000)])
    done = subprocess.run([sys.executable, "-c", KILLED, str(jsonl)], cwd=PROJECT)
    assert done.returncode == -9
    (left,) = indexes(tmp_path)
    assert left.name.startswith(".building-") and find_index(jsonl, RowFormat()) is None
    here = f".building-{socket.gethostname()}"
    running = left.with_name(f"{here}-1-0123abcd")  # process 1 is always there
    other_thread = left.with_name(f"{here}-{os.getpid()}-0123abcd")
    last_container = left.with_name(f"{here}-{os.getpid()}-4567cdef")
    elsewhere, forgotten = (
        left.with_name(".building-other-1-7-01234567"),
        left.with_name(".building-other-2-7-01234567"),
    )
    for folder in (running, other_thread, last_container, elsewhere, forgotten):
        folder.mkdir()
    os.utime(forgotten, (0, 0))
    began = psutil.Process().create_time()
    os.utime(last_container, (began - 1000, began - 1000))
    built = build(jsonl)
    kept = [built.arrow_file.parent, running, other_thread, elsewhere]
    assert len(built) == 1000 and indexes(tmp_path) == sorted(kept)


AT_ONCE = """
import multiprocessing, os, shutil, sys
from pathlib import Path
from finetuning import row_index
from finetuning.errors import UserError
from finetuning.manifest import RowFormat

def build_often(jsonl, refused, barrier, number):
    for attempt in range(40):
        index = next((jsonl.parent / ".rows").glob("train.jsonl-*"), None)
        barrier.wait()
        if index and number == 0 and attempt % 3 == 1:
            shutil.rmtree(jsonl.parent / ".rows")
        elif index and number == 0 and attempt % 3 == 2:
            (index / "summary.json").unlink()
        barrier.wait()
        try:
            row_index.open_rows(refused, RowFormat(), "TRAIN_JSONL")
        except UserError as error:
            assert "cannot be used" in str(error), error
        rows = row_index.open_rows(jsonl, RowFormat(), "TRAIN_JSONL", rejected_file=jsonl.parent / "rejected.jsonl")
        assert len(rows) == 20 and rows[19]["text"] == "Sentence 19."
        assert len((jsonl.parent / "rejected.jsonl").read_text().splitlines()) == 1
        barrier.wait()

fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(2, timeout=30)
paths = Path(sys.argv[1]), Path(sys.argv[2])
builders = [fork.Process(target=build_often, args=(*paths, barrier, number)) for number in range(2)]
for builder in builders:
    builder.start()
for builder in builders:
    builder.join()
sys.exit(max(abs(builder.exitcode) for builder in builders))
"""


def test_processes_that_build_the_same_index_at_once(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    """None, a broken one or a good one is there; a refused build beside it removes empty folders."""
    jsonl = write_jsonl([*(row(seed) for seed in range(20)), row(20, text="")])
    refused = write_jsonl([row(text="")], "refused.jsonl")
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE, str(jsonl), str(refused)], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (index,) = indexes(tmp_path)
    assert index.name.startswith("train.jsonl-") and sorted(path.name for path in tmp_path.iterdir()) == [
        ".rows", "refused.jsonl", "rejected.jsonl", "train.jsonl"
    ]  # fmt: skip


def test_an_index_that_is_replaced_while_it_is_opened(
    build: Build, write_jsonl: WriteJsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl, real, opened = write_jsonl([row(seed) for seed in range(5)]), row_index._tell, []

    def tell(folder: Path, rejected_file: Path | None) -> None:
        opened.append(folder)
        if len(opened) == 1:
            shutil.rmtree(folder)
        real(folder, rejected_file)

    monkeypatch.setattr(row_index, "_tell", tell)
    assert build(jsonl)[4]["text"] == "Sentence 4." and len(opened) == 2


def test_the_faster_process_wins(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    """Its index stays, and the slower one's is thrown away."""
    jsonl, other = write_jsonl([row(seed) for seed in range(5)]), []

    def build_the_same(_: Any) -> bool:
        if not other:
            other.append(open_rows(jsonl, RowFormat(), "TRAIN_JSONL").arrow_file)
            other.append(other[0].stat().st_ino)
        return False

    slow = open_rows(jsonl, RowFormat(), "TRAIN_JSONL", stop_at=build_the_same)
    assert slow.arrow_file == other[0] and slow.arrow_file.stat().st_ino == other[1]
    assert indexes(tmp_path) == [slow.arrow_file.parent]


def test_interrupted_build_is_cleaned_up(build: Build, write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    jsonl = write_jsonl([row(seed) for seed in range(5)])

    def interrupt(_: Any) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_rows(jsonl, RowFormat(), "TRAIN_JSONL", stop_at=interrupt)
    assert list(tmp_path.iterdir()) == [jsonl]


def test_a_file_that_changes_while_it_is_read(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    jsonl = write_jsonl([row(seed) for seed in range(5)])

    def append(_: Any) -> bool:
        with jsonl.open("a") as stream:
            stream.write("\n")
        return False

    with pytest.raises(UserError, match="was changed while it was read"):
        open_rows(jsonl, RowFormat(), "TRAIN_JSONL", stop_at=append)
    assert list(tmp_path.iterdir()) == [jsonl]


def test_a_full_disk_is_said(
    build: Build, write_jsonl: WriteJsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    jsonl = write_jsonl([row()])
    monkeypatch.setattr(row_index, "_record_batch", full)
    with pytest.raises(UserError, match=r"TRAIN_JSONL: cannot write the index .*\.rows: No space left"):
        build(jsonl)
    assert list(tmp_path.iterdir()) == [jsonl]


# ------------------------------------------------------------------------------------------------------- raw rows


def test_raw_rows_are_indexed_where_codes_are_not_needed(write_jsonl: WriteJsonl, clip: Path) -> None:
    jsonl = write_jsonl([{"text": "A.", "audio": str(clip)}, row(1), {"text": "B.", "audio": str(clip)}])
    rows = open_rows(jsonl, RowFormat(), "TRAIN_JSONL", needs_codes=False)
    assert rows.column("num_codec_frames").tolist() == [0, 3, 0]
    assert rows[0]["codes"].shape == (0, 16) and rows[1]["codes"].tolist() == codes(1)
    with pytest.raises(UserError, match="no audio_codes"):
        open_rows(jsonl, RowFormat(), "TRAIN_JSONL")


@pytest.mark.parametrize("raw", [{"text": "A."}, {"text": "", "audio": "gone.wav"}], ids=["good", "bad"])
def test_stop_at_a_row_without_codes(write_jsonl: WriteJsonl, clip: Path, tmp_path: Path, raw: dict[str, Any]) -> None:
    jsonl = write_jsonl([*(row(seed) for seed in range(20)), {"audio": str(clip)} | raw])
    with pytest.raises(RowStop):
        open_rows(jsonl, RowFormat(), "TRAIN_JSONL", stop_at=lambda row: False)
    assert indexes(tmp_path) == []
    jsonl = write_jsonl([*(row(seed) for seed in range(20)), row(text=""), "{"])
    assert len(open_rows(jsonl, RowFormat(), "TRAIN_JSONL", stop_at=lambda row: False)) == 20


def test_stop_at_a_row_of_choice(write_jsonl: WriteJsonl) -> None:
    jsonl = write_jsonl([row(seed) for seed in range(5)])
    with pytest.raises(RowStop):
        open_rows(jsonl, RowFormat(), "TRAIN_JSONL", stop_at=lambda row: row.line == 5)
    assert len(open_rows(jsonl, RowFormat(), "TRAIN_JSONL")) == 5
    assert len(open_rows(jsonl, RowFormat(), "TRAIN_JSONL", stop_at=lambda row: True)) == 5  # it is there


@pytest.mark.parametrize(
    "source, expected",
    [
        (None, (None, None, None)), ("x", (None, None, None)), ({}, (-1, -1, "")),
        ({"num_bytes": 1, "modified_ns": 2, "codec": "c"}, (1, 2, "c")),
        ({"num_bytes": "1", "modified_ns": 1 << 64, "codec": 5}, (-1, -1, "")),
    ],
)  # fmt: skip
def test_codes_source(source: Any, expected: tuple) -> None:
    assert row_index.codes_source({"codes_source": source}) == expected


# ------------------------------------------------------------------------------------------------------ memory map


@pytest.fixture
def three(build: Build, write_jsonl: WriteJsonl, clip: Path) -> Manifest:
    """Rows with all, some and no optional fields, of 2, 40 and 3 frames."""
    full = {
        "audio": str(clip), "ref_audio": str(clip), "ref_text": "R.", "language": "English", "speaker": "Ada",
        "instruct": "Softly.",
        "codes_source": {"num_bytes": 5, "modified_ns": 1 << 60, "codec": "abc", "augmentation": "k"},
        "measures": {"peak_db": -1.5, "ü": None}, "augmentation": {"speed": 1.1},
    }  # fmt: skip
    rows = [
        row(0, audio_codes=codes(0, 2), **full),
        row(1, audio_codes=codes(1, 40), audio="gone.wav"),
        row(2, text="नमस्ते"),
    ]
    return build(write_jsonl(rows))


def test_rows_come_back_exactly(three: Manifest, clip: Path) -> None:
    assert len(three) == 3
    rows = [three[index] for index in range(3)]
    assert [item.pop("codes").tolist() for item in rows] == [codes(0, 2), codes(1, 40), codes(2, 3)]
    audio = str(clip)
    assert rows[0] == {
        "line": 1, "text": "Sentence 0.", "language": "English", "speaker": "Ada", "instruct": "Softly.",
        "audio": audio, "ref_audio": audio, "ref_text": "R.", "num_codec_frames": 2, "audio_bytes": 5,
        "audio_modified_ns": 1 << 60, "codes_codec": "abc", "measures": '{"peak_db": -1.5, "ü": null}',
        "augmentation": '{"speed": 1.1}',
    }  # fmt: skip
    names = (
        "instruct",
        "audio",
        "ref_audio",
        "ref_text",
        "audio_bytes",
        "audio_modified_ns",
        "codes_codec",
        "measures",
        "augmentation",
    )
    nothing = dict.fromkeys(names)
    default = {"language": "Auto", "speaker": "reference_speaker"}
    assert rows[1] == nothing | default | {"line": 2, "text": "Sentence 1.", "audio": "gone.wav"} | {
        "num_codec_frames": 40
    }
    assert rows[2] == nothing | default | {"line": 3, "text": "नमस्ते", "num_codec_frames": 3}


def test_codes_are_int16_frames(three: Manifest) -> None:
    assert three[1]["codes"].dtype == np.int16 and three[1]["codes"].shape == (40, 16)


def test_columns(three: Manifest) -> None:
    assert three.column("num_codec_frames").tolist() == [2, 40, 3]
    assert three.column("instruct").tolist() == ["Softly.", None, None]
    assert three.column("num_codec_frames").dtype == np.int32
    assert three.column("audio_modified_ns").tolist() == [1 << 60, -1, -1]  # not by way of a float
    assert three.has("audio").tolist() == [True, True, False]


def test_select_keeps_the_given_order_and_selects_again(three: Manifest) -> None:
    part = three.select(np.array([2, 0]))
    assert len(part) == 2 and [part[index]["line"] for index in range(2)] == [3, 1]
    assert part.column("line").tolist() == [3, 1]
    assert part[0]["codes"].tolist() == codes(2, 3)
    assert part.select(np.array([1])).column("line").tolist() == [1]
    with pytest.raises(IndexError):
        part[2]


def test_manifest_opens_again_from_its_file(three: Manifest) -> None:
    again = Manifest(three.arrow_file)
    assert again[1]["codes"].tolist() == codes(1, 40) and again.column("line").tolist() == [1, 2, 3]


def test_labels_and_distinct_against_plain_python(build: Build, write_jsonl: WriteJsonl) -> None:
    """More rows than one Arrow batch holds, some without a value, whole and as selections in any order."""
    generator = np.random.default_rng(0)
    names = [None, "Ada", "Bea", "Cid"]
    instructs = [names[number] for number in generator.integers(0, 4, 700)]
    rows = [row(seed) | ({"instruct": text} if text else {}) for seed, text in enumerate(instructs)]
    whole = build(write_jsonl(rows))
    for positions in (np.arange(700), generator.permutation(700)[:300], np.array([5, 5, 1]), np.empty(0, int)):
        part, expected = whole.select(positions), [instructs[position] for position in positions]
        values, places = part.labels("instruct")
        assert values == [name for name in dict.fromkeys(expected) if name] == part.distinct("instruct")
        assert [values[place] if place >= 0 else None for place in places] == expected and places.dtype == np.int32
        assert part.column("instruct").tolist() == expected
        assert part.has("instruct").tolist() == [text is not None for text in expected]
        numbers = part.label_numbers("instruct")
        assert [[a == b for b in numbers[:40]] for a in numbers[:40]] == [
            [a == b for b in expected[:40]] for a in expected[:40]
        ]
        assert part.column("line").tolist() == (positions + 1).tolist()


def test_a_manifest_costs_little_to_send_to_a_worker(build: Build, write_jsonl: WriteJsonl) -> None:
    whole = build(write_jsonl([row(seed) for seed in range(600)]))
    assert len(pickle.dumps(whole)) < 1000
    part = whole.select(np.arange(10, 510))
    content = pickle.dumps(part)
    assert len(content) < 4 * 500 + 1000
    again = pickle.loads(content)
    assert len(again) == 500 and again[499]["text"] == part[499]["text"] == "Sentence 509."
    assert len(pickle.loads(pickle.dumps(whole))) == 600


def test_select_does_not_open_the_file_again(three: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_index, "_open_arrow", None)
    assert three.select(np.array([1])).select(np.array([0]))[0]["line"] == 2


def test_rows_across_write_batches(build: Build, write_jsonl: WriteJsonl) -> None:
    """More rows than one Arrow record batch holds."""
    many = build(write_jsonl([row(seed, audio_codes=codes(seed, 2 + seed % 3)) for seed in range(600)]))
    assert len(many) == 600
    for index in (0, 255, 256, 511, 512, 599):
        assert many[index]["line"] == index + 1
        assert many[index]["codes"].tolist() == codes(index, 2 + index % 3)


# -------------------------------------------------------------------------------------------------------- held out


@pytest.fixture
def speakers(build: Build, write_jsonl: WriteJsonl) -> Manifest:
    """100 rows of Ada, 40 of Bea, 20 of Cid, 19 of Dan; interleaved."""
    names = ["Ada"] * 100 + ["Bea"] * 40 + ["Cid"] * 20 + ["Dan"] * 19
    order = np.random.default_rng(0).permutation(len(names))
    return build(write_jsonl([row(seed, speaker=names[index]) for seed, index in enumerate(order)]))


def lines(manifest: Manifest | None) -> list[int]:
    assert manifest is not None
    return manifest.column("line").tolist()


def test_held_out_share_of_each_speaker(speakers: Manifest) -> None:
    train, validation = hold_out(speakers, 0.1, seed=1)
    assert validation is not None
    assert Counter(validation.column("speaker")) == {"Ada": 10, "Bea": 4, "Cid": 2}
    assert sorted(lines(train) + lines(validation)) == list(range(1, 180))
    assert lines(train) == sorted(lines(train))


def test_small_share_still_holds_one_row_out(speakers: Manifest) -> None:
    _, validation = hold_out(speakers, 0.001, seed=1)
    assert validation is not None and Counter(validation.column("speaker")) == {"Ada": 1, "Bea": 1, "Cid": 1}


def test_held_out_rows_hang_on_the_seed_alone(speakers: Manifest) -> None:
    first, again, other = (lines(hold_out(speakers, 0.1, seed)[1]) for seed in (1, 1, 2))
    assert first == again and first != other


@pytest.mark.parametrize("num_rows", [5, 19])
def test_no_row_is_held_out_of_few(build: Build, write_jsonl: WriteJsonl, num_rows: int) -> None:
    manifest = build(write_jsonl([row(seed) for seed in range(num_rows)]))
    train, validation = hold_out(manifest, 0.5, seed=1)
    assert validation is None and len(train) == num_rows


def test_held_out_rows_are_those_of_a_plain_calculation(speakers: Manifest) -> None:
    """The same rows as a version that looked at each speaker's name row by row; a run's split must not move."""
    names, generator, held = speakers.column("speaker"), np.random.default_rng(7), []
    for name in dict.fromkeys(names):
        rows = np.flatnonzero(names == name)
        if len(rows) >= 20:
            held += generator.permutation(rows)[: max(1, round(0.1 * len(rows)))].tolist()
    assert lines(hold_out(speakers, 0.1, seed=7)[1]) == [position + 1 for position in sorted(held)]


def test_zero_holds_nothing_out(speakers: Manifest) -> None:
    train, validation = hold_out(speakers, 0.0, seed=1)
    assert validation is None and lines(train) == lines(speakers)
