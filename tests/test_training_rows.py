"""The rows of a run: encoded where codes are missing or stale, opened again without reading anything twice, split."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeCodec
from raw_clips import expected_codes, read_rows, write_clip, write_rows

from finetuning import row_index, training_rows
from finetuning.audio import load_audio
from finetuning.base_model import Base, resolve_base
from finetuning.codec import Codec, codec_fingerprints
from finetuning.encode_rows import encoded_path
from finetuning.errors import UserError
from finetuning.manifest import RowFormat
from finetuning.training_rows import check_train_jsonl, open_training_rows

MakeSettings = Callable[..., Any]
MakeRaw = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base() -> Base:
    from finetuning.settings import load_settings

    return resolve_base(load_settings({"init_model_path": "tiny-random"}, environment={}))


def names_in(folder: Path) -> set[str]:
    """Files of a folder, those in folders of its own left out."""
    return {path.name for path in folder.iterdir() if path.is_file()}


# ------------------------------------------------------------------------------------------------- rows of one run


def run_settings(make_settings: MakeSettings, train: Path, validation: Path | None = None, **fields: Any) -> Any:
    """Without a validation file VALIDATION_JSONL stays unset; its default is not there."""
    given = {"train_jsonl": train} | ({"validation_jsonl": validation} if validation else {})
    return make_settings(**given, **fields)


def open_rows(settings: Any, base: Base, build: bool = True) -> Any:
    """``open_training_rows`` as a session calls it."""
    row_format = RowFormat.from_settings(settings, base.special_tokens())
    return open_training_rows(settings, base.codec_folder, row_format, "cpu", build=build)


@pytest.fixture(autouse=True)
def away_from_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default VALIDATION_JSONL is relative; a developer's own data must not be found."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def test_raw_rows_are_encoded_beside_the_file_and_opened(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(6)
    rows = open_rows(run_settings(make_settings, raw), base)
    assert [rows.train[index]["codes"].tolist() for index in range(6)] == expected_codes(raw)
    assert rows.validation is None
    assert encoded_path(raw).is_file()
    open_rows(run_settings(make_settings, raw), base)
    assert (fake.num_built, fake.take_num_clips()) == (1, 6)


def test_real_codec_end_to_end(make_raw: MakeRaw, make_settings: MakeSettings, base: Base, codec: Codec) -> None:
    raw = make_raw(2)
    rows = open_rows(run_settings(make_settings, raw), base)
    clips = [load_audio(raw.parent / row["audio"]) for row in read_rows(raw)]
    for index, expected in enumerate(codec.encode(clips)):
        assert np.array_equal(rows.train[index]["codes"], expected)


def test_rows_with_codes_are_opened_without_a_codec(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(4)
    write_rows(raw, [row | {"audio_codes": [[n] * 16] * 3} for n, row in enumerate(read_rows(raw))])
    for mode in ("jsonl", "none"):
        rows = open_rows(run_settings(make_settings, raw, data_mode=mode), base)
        assert [rows.train[n]["codes"].tolist() for n in range(4)] == [[[n] * 16] * 3 for n in range(4)]
    assert fake.num_built == 0 and names_in(raw.parent) == {"train.jsonl"}


def test_none_mode_never_encodes(fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base) -> None:
    raw = make_raw(4)
    settings = run_settings(make_settings, raw, data_mode="none")
    with pytest.raises(UserError, match="4 of 4 rows cannot be used") as error:
        open_rows(settings, base)
    assert f"{raw} line 1: no audio_codes" in str(error.value)
    assert fake.num_built == 0 and names_in(raw.parent) == {"train.jsonl"}
    assert not settings.output_dir.exists()


def test_other_processes_open_what_the_main_one_built(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    settings = run_settings(make_settings, make_raw(20))
    built = open_rows(settings, base)
    settings.train_jsonl.unlink()  # they need not even see it
    opened = open_rows(settings, base, build=False)
    assert opened.train.column("line").tolist() == built.train.column("line").tolist()
    assert opened.validation is not None and built.validation is not None
    assert opened.validation.column("line").tolist() == built.validation.column("line").tolist()
    assert fake.num_built == 1


def test_other_processes_split_as_the_main_one_whatever_became_of_the_validation_file(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, tmp_path: Path
) -> None:
    settings = run_settings(make_settings, make_raw(20))
    data = make_raw(3, "validation.jsonl").parent
    data.rename(tmp_path / "cwd" / "data")  # where VALIDATION_JSONL is by default
    settings = settings.model_copy(update={"train_jsonl": tmp_path / "cwd" / "data" / "train.jsonl"})
    built = open_rows(settings, base)
    kept = settings.validation_jsonl.rename(tmp_path / "kept.jsonl")
    opened = open_rows(settings, base, build=False)
    assert [len(rows) for rows in (built.train, built.validation, opened.train, opened.validation)] == [20, 3, 20, 3]
    held_out = open_rows(settings, base)  # another run
    kept.rename(settings.validation_jsonl)
    opened = open_rows(settings, base, build=False)
    assert opened.validation.column("line").tolist() == held_out.validation.column("line").tolist()
    assert len(opened.train) < 20


def test_validation_fraction_holds_rows_out_where_there_is_no_file(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    settings = run_settings(make_settings, make_raw(20), validation_fraction=0.2)
    rows = open_rows(settings, base)
    assert rows.validation is not None and (len(rows.train), len(rows.validation)) == (16, 4)
    held = rows.validation.column("line").tolist()
    assert sorted(held + rows.train.column("line").tolist()) == list(range(1, 21))
    none = open_rows(run_settings(make_settings, settings.train_jsonl, validation_fraction=0), base)
    assert none.validation is None and len(none.train) == 20


def test_validation_file_comes_before_the_fraction(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    train, validation = make_raw(20), make_raw(3, "validation.jsonl")
    rows = open_rows(run_settings(make_settings, train, validation, validation_fraction=0.2), base)
    assert rows.validation is not None and (len(rows.train), len(rows.validation)) == (20, 3)
    assert [rows.validation[index]["codes"].tolist() for index in range(3)] == expected_codes(validation)


def test_default_validation_file_is_used_when_it_is_there(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, tmp_path: Path
) -> None:
    make_raw(3, "validation.jsonl").parent.rename(tmp_path / "cwd" / "data")
    rows = open_rows(run_settings(make_settings, make_raw(20)), base)
    assert rows.validation is not None and (len(rows.train), len(rows.validation)) == (20, 3)


def test_the_null_device_stands_for_no_validation_file(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, tmp_path: Path
) -> None:
    make_raw(3, "validation.jsonl").parent.rename(tmp_path / "cwd" / "data")
    settings = run_settings(make_settings, make_raw(20), Path(os.devnull))
    for build in (True, False):
        rows = open_rows(settings, base, build)
        assert rows.validation is not None and (len(rows.train), len(rows.validation)) == (19, 1)


def test_named_validation_file_that_is_missing_is_an_error_before_anything_is_encoded(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, tmp_path: Path
) -> None:
    settings = run_settings(make_settings, make_raw(20), tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"^VALIDATION_JSONL: .*nowhere\.jsonl does not exist"):
        open_rows(settings, base)
    assert fake.num_built == 0


def test_sample_limits(fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base) -> None:
    train, validation = make_raw(8), make_raw(6, "validation.jsonl")
    open_rows(run_settings(make_settings, train, validation), base)
    full = encoded_path(train).read_bytes()
    fake.take_num_clips()
    limited = run_settings(make_settings, train, validation, max_train_samples=3, max_eval_samples=2)
    rows = open_rows(limited, base)
    assert rows.train.column("text").tolist() == ["Sentence 0.", "Sentence 1.", "Sentence 2."]
    assert rows.validation is not None and rows.validation.column("text").tolist() == ["Sentence 0.", "Sentence 1."]
    assert encoded_path(train).read_bytes() == full and fake.take_num_clips() == 0


def test_sample_limit_encodes_no_more_than_it_needs(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(8)
    open_rows(run_settings(make_settings, raw, max_train_samples=3), base)
    assert fake.take_num_clips() == 3


def test_eval_limit_holds_for_held_out_rows(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    settings = run_settings(make_settings, make_raw(20), validation_fraction=0.5, max_eval_samples=4)
    rows = open_rows(settings, base)
    assert rows.validation is not None and (len(rows.train), len(rows.validation)) == (10, 4)


def test_validation_rows_of_unknown_speakers_are_left_out(
    fake: FakeCodec,
    make_raw: MakeRaw,
    make_settings: MakeSettings,
    base: Base,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, validation = make_raw(4, speaker="Ada"), make_raw(4, "validation.jsonl")
    names = ("ADA", "Bea", "ADA", "Cid")  # case does not count
    write_rows(validation, [row | {"speaker": name} for row, name in zip(read_rows(validation), names, strict=True)])
    rows = open_rows(run_settings(make_settings, train, validation), base)
    assert rows.validation is not None
    assert rows.validation.column("text").tolist() == ["Sentence 0.", "Sentence 2."]
    assert "2 validation rows are left out" in capsys.readouterr().out
    write_rows(validation, [row | {"speaker": "Bea"} for row in read_rows(validation)])
    assert open_rows(run_settings(make_settings, train, validation), base).validation is None


def test_column_settings_reach_every_step(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(3)
    renamed = [{"path": row["audio"], "sentence": row["text"], "who": 5, "locale": "fr"} for row in read_rows(raw)]
    write_rows(raw, renamed)
    columns = {"text_column": "sentence", "audio_column": "path", "speaker_column": "who", "language_column": "locale"}
    rows = open_rows(run_settings(make_settings, raw, **columns), base)
    first = rows.train[0]
    assert (first["text"], first["speaker"], first["language"]) == ("Sentence 0.", "5", "fr")


def test_special_tokens_of_the_base_are_refused(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(2)
    write_rows(raw, [row | {"text": "Hello <tts_pad>"} for row in read_rows(raw)])
    with pytest.raises(UserError, match="special token <tts_pad>"):
        open_rows(run_settings(make_settings, raw), base)


def test_missing_train_jsonl_names_itself_and_the_dataset_that_was_set(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    missing = tmp_path / "nowhere.jsonl"
    with pytest.raises(UserError, match=r"TRAIN_JSONL: .*nowhere\.jsonl does not exist") as error:
        check_train_jsonl(make_settings(train_jsonl=missing))
    assert '"audio"' in str(error.value)
    with pytest.raises(UserError, match=r"TRAIN_JSONL: .*nowhere\.jsonl .*DATASET_NAME me/speech"):
        check_train_jsonl(make_settings(train_jsonl=missing, dataset_name="me/speech", data_mode="none"))


def test_missing_train_jsonl_stops_a_run(fake: FakeCodec, make_settings: MakeSettings, base: Base) -> None:
    settings = run_settings(make_settings, Path("nowhere.jsonl"))
    with pytest.raises(UserError, match=r"TRAIN_JSONL: nowhere\.jsonl does not exist"):
        open_rows(settings, base)
    assert not settings.output_dir.exists()


# ----------------------------------------------------------------------------------------------------- opened again


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read line by line or encoded: ("index" | "encode") and the file's name."""
    done: list[str] = []
    index, encode = row_index.read_rows, training_rows.encode_jsonl
    monkeypatch.setattr(
        row_index,
        "read_rows",
        lambda jsonl, *rest, **more: done.append(f"index {jsonl.name}") or index(jsonl, *rest, **more),
    )
    monkeypatch.setattr(
        training_rows,
        "encode_jsonl",
        lambda jsonl, *rest, **more: done.append(f"encode {jsonl.name}") or encode(jsonl, *rest, **more),
    )
    return done


@pytest.fixture
def coded(fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base) -> Path:
    """A file whose 6 rows say what their codes were made of, its clips beside it."""
    raw = make_raw(6)
    open_rows(run_settings(make_settings, raw), base)
    encoded_path(raw).rename(raw.with_name("coded.jsonl"))
    fake.take_num_clips()
    return raw.with_name("coded.jsonl")


def test_rows_with_codes_are_read_once(
    coded: Path, fake: FakeCodec, make_settings: MakeSettings, base: Base, work: list[str], tmp_path: Path
) -> None:
    for run in range(3):
        rows = open_rows(run_settings(make_settings, coded, output_dir=tmp_path / f"run-{run}"), base)
        assert [rows.train[n]["codes"].tolist() for n in range(6)] == expected_codes(coded)
    assert work == ["index coded.jsonl"] and fake.take_num_clips() == 0


def test_raw_rows_are_looked_at_again_only_when_something_changed(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, work: list[str]
) -> None:
    raw = make_raw(6)
    settings = run_settings(make_settings, raw)
    first, again = ["index train.jsonl", "encode train.jsonl", "index train.encoded.jsonl"], []
    for expected, change in (
        (first, None),
        (again, None),
        (first[:2], lambda: os.utime(raw)),  # the encoder finds that nothing is to do
        (again, None),
        (first, lambda: write_rows(raw, [row | {"text": "New."} for row in read_rows(raw)])),
        (again, None),
        (first, lambda: write_clip(raw.parent / "train_clips/03.wav", 99, 0.7)),
        (again, None),
        (first, lambda: encoded_path(raw).unlink()),
    ):
        if change:
            change()
        work.clear()
        rows = open_rows(settings, base)
        assert work == expected
        assert [rows.train[n]["codes"].tolist() for n in range(6)] == expected_codes(raw)
    assert rows.train[0]["text"] == "New."


def test_a_clip_that_was_left_out_is_looked_at_again(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_raw(12)
    (raw.parent / "train_clips/05.wav").write_bytes(b"broken")
    settings = run_settings(make_settings, raw)
    for _ in range(2):
        assert len(open_rows(settings, base).train) == 11
    write_clip(raw.parent / "train_clips/05.wav", 99, 0.7)
    rows = open_rows(settings, base).train
    assert [rows[n]["codes"].tolist() for n in range(12)] == expected_codes(raw)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("change", ["content", "time", "codec", "source", "codes"])
def test_stale_codes_are_noticed_with_and_without_an_index(
    coded: Path, fake: FakeCodec, make_settings: MakeSettings, base: Base, indexed: bool, change: str,
    monkeypatch: pytest.MonkeyPatch, work: list[str],
) -> None:  # fmt: skip
    settings = run_settings(make_settings, coded)
    rows, expected_clips = read_rows(coded), 1
    if change == "source":
        del rows[4]["codes_source"]["num_bytes"]
    elif change == "codes":
        del rows[4]["audio_codes"]
    write_rows(coded, rows)
    if indexed and change not in ("source", "codes"):
        open_rows(settings, base)
    if change == "content":
        write_clip(coded.parent / "train_clips/04.wav", 99, 0.9)
    elif change == "time":
        os.utime(coded.parent / "train_clips/04.wav", ns=(1, 1))
    elif change == "codec":
        for room in ("training_rows", "encode_rows"):
            monkeypatch.setattr(f"finetuning.{room}.codec_fingerprints", lambda folder: ("another", "other"))
        expected_clips = 6
    work.clear()
    opened = open_rows(settings, base)
    assert "encode coded.jsonl" in work and fake.take_num_clips() == expected_clips
    assert [opened.train[n]["codes"].tolist() for n in range(6)] == expected_codes(coded)
    work.clear()
    open_rows(settings, base)
    assert work == []


def test_stale_codes_among_more_rows_than_are_looked_up_at_a_time(
    coded: Path, make_settings: MakeSettings, base: Base, monkeypatch: pytest.MonkeyPatch, work: list[str]
) -> None:
    monkeypatch.setattr(training_rows, "_ROWS_AT_ONCE", 2)
    settings = run_settings(make_settings, coded)
    open_rows(settings, base)
    os.utime(coded.parent / "train_clips/05.wav", ns=(1, 1))
    open_rows(settings, base)
    assert "encode coded.jsonl" in work


def test_rows_beyond_the_limit_are_not_looked_at(
    coded: Path, fake: FakeCodec, make_settings: MakeSettings, base: Base
) -> None:
    rows = read_rows(coded)
    del rows[5]["audio_codes"]
    write_rows(coded, rows)
    assert len(open_rows(run_settings(make_settings, coded, max_train_samples=5), base).train) == 5
    assert fake.take_num_clips() == 0


def test_codec_is_not_read_for_codes_of_unknown_origin(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_raw(4)
    write_rows(raw, [row | {"audio_codes": [[n] * 16] * 3} for n, row in enumerate(read_rows(raw))])
    monkeypatch.setattr(training_rows, "codec_fingerprints", None)
    for _ in range(2):
        open_rows(run_settings(make_settings, raw), base)


def test_other_codec_without_audio_is_refused_with_an_index_too(
    coded: Path, make_settings: MakeSettings, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(coded, [row | {"audio": "gone.wav"} for row in read_rows(coded)])
    settings = run_settings(make_settings, coded)
    open_rows(settings, base)
    monkeypatch.setattr(training_rows, "codec_fingerprints", lambda folder: ("another", "other"))
    with pytest.raises(UserError, match=r"TRAIN_JSONL: .*coded\.jsonl line 1: its codes were made by another codec"):
        open_rows(settings, base)


def test_codes_from_when_the_config_counted_are_not_stale(
    coded: Path, fake: FakeCodec, make_settings: MakeSettings, base: Base, work: list[str]
) -> None:
    today, earlier = codec_fingerprints(base.codec_folder)
    coded.write_text(coded.read_text().replace(today, earlier))
    assert earlier in coded.read_text()
    for _ in range(2):
        open_rows(run_settings(make_settings, coded), base)
    assert "encode coded.jsonl" not in work and fake.take_num_clips() == 0


def test_skipped_rows_are_said_and_listed_at_every_start(
    coded: Path, make_settings: MakeSettings, base: Base, capsys: pytest.CaptureFixture[str], work: list[str]
) -> None:
    rows = read_rows(coded)
    write_rows(coded, [*rows, *(row | {"text": f"{n}"} for n, row in enumerate(rows)), rows[0] | {"text": ""}])
    settings = run_settings(make_settings, coded)
    for _ in range(2):
        capsys.readouterr()
        open_rows(settings, base)
        listed = settings.output_dir / "rejected.train.jsonl"
        assert (
            f"skipped 1 of 13 rows:\n  {coded} line 13: text is empty\n  listed in {listed}" in capsys.readouterr().out
        )
        assert [row["line"] for row in read_rows(listed)] == [13]
        listed.unlink()
    assert work == ["index coded.jsonl"]


def test_data_that_cannot_be_written_is_indexed_in_the_output_folder(
    coded: Path, make_settings: MakeSettings, base: Base, work: list[str]
) -> None:
    shutil.rmtree(coded.parent / ".rows")
    (coded.parent / ".rows").write_text("in the way, as a read-only disk would be")
    settings = run_settings(make_settings, coded)
    for _ in range(2):
        assert open_rows(settings, base).train.arrow_file.is_relative_to(settings.output_dir / "rows")
    assert work == ["index coded.jsonl"]
    assert len(open_rows(settings, base, build=False).train) == 6
    os.utime(coded.parent / "train_clips/04.wav", ns=(1, 1))
    open_rows(settings, base)
    assert "encode coded.jsonl" in work


def test_refused_validation_rows_leave_no_output(
    coded: Path, make_settings: MakeSettings, base: Base, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "output")
    write_rows(coded.with_name("validation.jsonl"), [row | {"text": ""} for row in read_rows(coded)])
    settings = run_settings(make_settings, coded, coded.with_name("validation.jsonl"))
    with pytest.raises(UserError, match="6 of 6 rows cannot be used"):
        open_rows(settings, base)
    assert not settings.output_dir.exists()


def test_a_process_that_sees_no_output_folder_says_so(make_settings: MakeSettings, base: Base) -> None:
    with pytest.raises(UserError, match="all processes must see OUTPUT_DIR"):
        open_rows(run_settings(make_settings, Path("train.jsonl")), base, build=False)


# -------------------------------------------------------------------------------- codes that came with the input file


def test_codes_of_another_codec_without_audio_are_refused(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(3)
    open_rows(run_settings(make_settings, raw), base)
    rows = read_rows(encoded_path(raw))
    for row in rows:
        row["codes_source"]["codec"] = "another"
    moved = raw.with_name("moved.jsonl")
    write_rows(moved, [row | {"audio": "gone.wav"} for row in rows])
    with pytest.raises(UserError, match=r"moved\.jsonl line 1: its codes were made by another codec"):
        open_rows(run_settings(make_settings, moved, output_dir=raw.parent / "out"), base)


def test_an_encoded_file_that_was_moved_with_its_clips_is_taken_as_it_is(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(3)
    open_rows(run_settings(make_settings, raw), base)
    built = fake.num_built
    new = raw.parent.with_name("moved")
    raw.parent.rename(new)
    rows = read_rows(new / encoded_path(raw).name)
    write_rows(new / "rows.jsonl", [row | {"audio": row["audio"].replace("/data/", "/moved/")} for row in rows])
    open_rows(run_settings(make_settings, new / "rows.jsonl", output_dir=new / "out"), base)
    assert fake.num_built == built
