"""The row: every check, what happens to bad rows, the memory map, and held-out rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetuning.errors import UserError
from finetuning.manifest import (
    Manifest,
    Rejections,
    Row,
    RowError,
    RowFormat,
    build_manifest,
    check_codes,
    check_speaker_names,
    hold_out,
    parse_row,
    read_lines,
)

WriteJsonl = Callable[..., Path]


def codes(seed: int = 0, num_frames: int = 3) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 2048, (num_frames, 16)).tolist()


def row(seed: int = 0, **fields: Any) -> dict[str, Any]:
    """A good row with codes of its own."""
    return {"text": f"Sentence {seed}.", "audio_codes": codes(seed)} | fields


def parse(line: dict[str, Any] | str, folder: Path = Path("."), needs_codes: bool = False, **row_format: Any) -> Row:
    text = line if isinstance(line, str) else json.dumps(line)
    return parse_row(text, 7, folder, RowFormat(**row_format), needs_codes)


def refusal(line: dict[str, Any] | str, **arguments: Any) -> str:
    with pytest.raises(RowError) as error:
        parse(line, **arguments)
    return str(error.value)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A file that exists; the manifest does not look inside."""
    path = tmp_path / "clip.wav"
    path.write_bytes(b"RIFF")
    return path


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Manifest]:
    """build_manifest into tmp_path/output."""

    def build_from(jsonl: Path, max_rows: int | None = None, **row_format: Any) -> Manifest:
        arrow, rejected = tmp_path / "output" / "rows" / "train.arrow", tmp_path / "output" / "rejected.jsonl"
        return build_manifest(jsonl, arrow, RowFormat(**row_format), "TRAIN_JSONL", max_rows, rejected)

    return build_from


# ------------------------------------------------------------------------------------------------------- good rows


def test_row_with_everything(clip: Path) -> None:
    given = {
        "audio": str(clip), "text": "  Hello,\n  you. ", "audio_codes": codes(), "ref_audio": str(clip),
        "ref_text": "Well\tthen.", "language": "English", "speaker": "Ada", "instruct": " Softly. ", "mood": [1, None],
    }  # fmt: skip
    parsed = parse(given)
    assert (parsed.line, parsed.text, parsed.ref_text, parsed.instruct) == (7, "Hello, you.", "Well then.", "Softly.")
    assert (parsed.language, parsed.speaker, parsed.audio, parsed.ref_audio) == ("English", "Ada", clip, clip)
    assert parsed.codes is not None and parsed.codes.dtype == np.int16 and parsed.codes.tolist() == given["audio_codes"]
    assert parsed.raw == given


@pytest.mark.parametrize("absent", [{}, dict.fromkeys(("language", "speaker", "instruct", "ref_text", "ref_audio"))])
@pytest.mark.parametrize("blank", [False, True])
def test_defaults_of_absent_null_and_empty_keys(absent: dict[str, Any], blank: bool) -> None:
    parsed = parse(row() | (dict.fromkeys(absent, "") if blank else absent), default_speaker="Ada")
    assert (parsed.language, parsed.speaker) == ("Auto", "Ada")
    assert (parsed.instruct, parsed.ref_text, parsed.ref_audio, parsed.audio) == (None, None, None, None)


def test_raw_row_needs_no_codes(clip: Path) -> None:
    for given in ({"audio": str(clip), "text": "a"}, {"audio": str(clip), "text": "a", "audio_codes": None}):
        assert parse(given).codes is None


def test_audio_need_not_exist_once_there_are_codes() -> None:
    assert parse(row(audio="gone/clip.wav"), needs_codes=True).audio == Path("gone/clip.wav")


def test_speaker_that_is_a_number_is_taken_as_its_digits() -> None:
    assert parse(row(speaker=0)).speaker == "0"


def test_column_settings_choose_the_keys(clip: Path) -> None:
    given = {"path": str(clip), "sentence": "Hello.", "speaker_id": 12, "locale": "fr"}
    decoys = {"audio": 5, "text": None, "speaker": "decoy", "language": "decoy"}
    parsed = parse(
        given | decoys, audio_key="path", text_key="sentence", speaker_key="speaker_id", language_key="locale"
    )
    assert (parsed.audio, parsed.text, parsed.speaker, parsed.language) == (clip, "Hello.", "12", "fr")


def test_row_format_from_settings(make_settings: Callable[..., Any]) -> None:
    plain = RowFormat.from_settings(make_settings())
    assert plain == RowFormat("text", "audio", "speaker", "language", "reference_speaker", plain.special_tokens)
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(plain.special_tokens)
    columns = {"text_column": "t", "audio_column": "a", "speaker_column": "s", "language_column": "l"}
    chosen = RowFormat.from_settings(make_settings(**columns, speaker_name="Ada"), ["<x>"])
    assert chosen == RowFormat("t", "a", "s", "l", "Ada", ("<x>",))


def test_paths_are_taken_from_the_working_directory_then_from_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, folder = tmp_path / "here", tmp_path / "data"
    for file in (here / "both.wav", folder / "both.wav", folder / "beside.wav"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
    monkeypatch.chdir(here)

    def found(name: str) -> Path | None:
        return parse({"audio": name, "text": "a"}, folder).audio

    assert found("both.wav") == Path("both.wav")
    assert found("beside.wav") == folder / "beside.wav"
    assert found(str(folder / "both.wav")) == folder / "both.wav"
    assert parse({"audio": "both.wav", "ref_audio": "beside.wav", "text": "a"}, folder).ref_audio == (
        folder / "beside.wav"
    )
    assert "not found" in refusal({"audio": "nowhere.wav", "text": "a"}, folder=folder)


def test_home_folder_in_paths(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(clip.parent))
    assert parse({"audio": "~/clip.wav", "text": "a"}).audio == clip


# -------------------------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize("line", ["[1]", "3", '"text"', "null"])
def test_line_that_is_no_object(line: str) -> None:
    assert refusal(line) == "not a JSON object"


def test_line_that_was_cut_off_names_the_column() -> None:
    message = refusal('{"text": "Hello", "aud')
    assert message.startswith("not a JSON object (column 19:") and message.endswith("is the line cut off?")


def test_two_objects_in_one_line() -> None:
    assert refusal('{"text": "a"} {"text": "b"}').startswith("not a JSON object (column 15: Extra data)")


@pytest.mark.parametrize(
    "given, needs_codes, expected",
    [
        ({"audio": "clip.wav", "text": "a"}, True, "no audio_codes; data_processing.py --mode encode adds them"),
        ({"text": "a"}, False, "neither audio nor audio_codes"),
        ({"audio": "", "text": "a"}, False, "neither audio nor audio_codes"),
        ({"audio": "nowhere/clip.wav", "text": "a"}, False, "audio file not found: nowhere/clip.wav"),
        ({"audio": 5, "text": "a"}, False, "audio must be a path"),
        ({"audio": {"bytes": ""}, "text": "a"}, False, "audio must be a path"),
        (row(ref_audio="nowhere/ref.wav"), True, "ref_audio file not found: nowhere/ref.wav"),
        (row(ref_audio=["a"]), True, "ref_audio must be a path"),
        (row(text=None), True, "no text"),
        ({"audio_codes": codes()}, True, "no text"),
        (row(text=""), True, "text is empty"),
        (row(text=" \n\t "), True, "text is empty"),
        (row(text=5), True, "text must be a string"),
        (row(instruct=["a"]), True, "instruct must be a string"),
        (row(ref_text=1), True, "ref_text must be a string"),
        (row(language=True), True, "language must be a string"),
        (row(speaker={"id": 1}), True, "speaker must be a string"),
        (row(speaker=1.5), True, "speaker must be a string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reason_of_a_bad_row(given: dict[str, Any], needs_codes: bool, expected: str) -> None:
    assert refusal(given, needs_codes=needs_codes) == expected


@pytest.mark.parametrize("key", ["text", "instruct", "ref_text"])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_special_token_in_a_text(key: str, token: str) -> None:
    assert refusal(row(**{key: f"Hello{token}you"})).startswith(f"{key} contains the special token {token}")


def test_special_tokens_are_those_of_the_base() -> None:
    assert parse(row(text="<|im_end|>"), special_tokens=("<x>",)).text == "<|im_end|>"
    assert "special token <x>" in refusal(row(text="a <x>"), special_tokens=("<x>",))


def test_reason_names_the_key_that_was_chosen() -> None:
    given = {"audio_codes": codes(), "text": "a", "audio": "b"}
    assert refusal(given, text_key="sentence") == "no sentence"
    assert refusal({"text": "a"}, audio_key="path") == "neither path nor audio_codes"
    assert refusal({"text": "a", "path": "x.wav"}, audio_key="path") == "path file not found: x.wav"
    assert refusal(given | {"who": []}, speaker_key="who") == "who must be a string"


@pytest.mark.parametrize("name", [" Ada", "Ada ", "Ada\nLovelace", "a\u0000b", "   ", "x" * 101])
def test_unusable_speaker_name(name: str) -> None:
    assert refusal(row(speaker=name)).startswith("a speaker name must")


@pytest.mark.parametrize("path", ["x" * 300, "~no_such_user_here/clip.wav"], ids=["too long", "unknown home"])
def test_path_that_the_system_cannot_even_look_up(path: str) -> None:
    """A transcript in the audio column, say: a bad row and not the end of the run."""
    assert "not found" in refusal({"audio": path, "text": "a"})
    assert "not found" in refusal(row(ref_audio=path))


@pytest.mark.parametrize("key", ["text", "speaker", "language", "instruct", "mood"])
def test_half_of_a_surrogate_pair_is_a_bad_row(key: str) -> None:
    """JSON can escape it (a cut emoji), UTF-8 cannot hold it: the row could not be written."""
    assert refusal(json.dumps(row(**{key: "smile \ud83d"})))
    assert parse(json.dumps(row(**{key: "smile \U0001f600"}))).raw[key] == "smile \U0001f600"


# ----------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize(
    "value, expected",
    [
        ([[1] * 3] * 16, "audio_codes has shape 16 x 3; it must be T x 16 (transpose it)"),
        ([[1] * 15] * 3, "audio_codes has shape 3 x 15; it must be T x 16"),
        ([[1] * 17] * 3, "audio_codes has shape 3 x 17; it must be T x 16"),
        ([1] * 16, "audio_codes has shape 16; it must be T x 16"),
        ([[[1] * 16] * 3], "audio_codes has shape 1 x 3 x 16; it must be T x 16"),
        ([[1] * 16], "audio_codes has 1 frame(s), at least 2 are needed"),
        ([[1] * 16, [1] * 15], "audio_codes: frames of different lengths; T lists of 16 integers are needed"),
        ([[1.0] * 16] * 3, "audio_codes must be T lists of 16 integers"),
        ([["1"] * 16] * 3, "audio_codes must be T lists of 16 integers"),
        ([[True] * 16] * 3, "audio_codes must be T lists of 16 integers"),
        ([[None] * 16] * 3, "audio_codes must be T lists of 16 integers"),
        ([[2**70] * 16] * 3, "audio_codes must be T lists of 16 integers"),
        ([], "audio_codes must be T lists of 16 integers"),
        ("1 2 3", "audio_codes must be T lists of 16 integers"),
        ({"0": [1] * 16}, "audio_codes must be T lists of 16 integers"),
        ([[0] * 15 + [2048]] * 3, "audio_codes out of range: 0 to 2048, allowed 0 to 2047"),
        ([[5] * 15 + [-1]] * 3, "audio_codes out of range: -1 to 5, allowed 0 to 2047"),
        ([[0] * 15 + [65536]] * 3, "audio_codes out of range: 0 to 65536, allowed 0 to 2047"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_codes_that_are_refused(value: Any, expected: str) -> None:
    assert refusal({"text": "a", "audio_codes": value}) == expected


def test_codes_longer_than_generation_can_be() -> None:
    assert len(check_codes([[7] * 16] * 8192)) == 8192
    with pytest.raises(RowError, match="audio_codes has 8193 frames, more than the 8192"):
        check_codes([[7] * 16] * 8193)


@pytest.mark.parametrize("num_frames", [2, 15, 16, 17])
def test_codes_that_are_taken(num_frames: int) -> None:
    """16 frames are square: nothing tells them from a transposed row, so they are taken as they stand."""
    given = codes(1, num_frames)
    given[0][:2] = [0, 2047]
    assert check_codes(given).tolist() == given


# ----------------------------------------------------------------------------------------------------- whole files


def test_lines_are_numbered_with_the_blank_ones(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('\ufeff{}\r\n\n  \n{"text": "Yorùbá\u2028"}'.encode())
    assert [(number, json.loads(line)) for number, line in read_lines(file, "TRAIN_JSONL")] == [
        (1, {}),
        (4, {"text": "Yorùbá\u2028"}),
    ]


@pytest.mark.parametrize(
    "content, part",
    [(None, "does not exist"), (b"", "is empty"), (b"\n \n", "is empty"), (b'{"text": "\xff"}\n', "is not UTF-8 text")],
    ids=["missing", "empty", "blank", "latin-1"],
)
def test_unusable_file_names_setting_and_path(
    build: Callable[..., Manifest], tmp_path: Path, content: bytes | None, part: str
) -> None:
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=part) as error:
        build(file)
    assert str(error.value).startswith(f"TRAIN_JSONL: {file} ")
    assert not (tmp_path / "output").exists()


def test_utf_16_file_is_refused_as_a_whole(build: Callable[..., Manifest], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row()), encoding="utf-16")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        build(file)


def test_file_with_bom_and_blank_lines_is_built(build: Callable[..., Manifest], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row(seed)) for seed in range(3)), encoding="utf-8-sig")
    assert build(file).column("line").tolist() == [1, 3, 5]


def test_few_bad_rows_are_skipped_and_listed(
    build: Callable[..., Manifest], write_jsonl: WriteJsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_list_of_bad_rows_goes_when_they_were_mended(
    build: Callable[..., Manifest], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    build(write_jsonl([*(row(seed) for seed in range(19)), row(19, text="")]))
    assert (tmp_path / "output/rejected.jsonl").exists()
    build(write_jsonl([row(seed) for seed in range(20)]))
    assert not (tmp_path / "output/rejected.jsonl").exists()


@pytest.mark.parametrize("num_bad, refused", [(1, False), (2, True)])
def test_a_tenth_is_the_limit(
    build: Callable[..., Manifest], write_jsonl: WriteJsonl, num_bad: int, refused: bool
) -> None:
    jsonl = write_jsonl([row(seed) for seed in range(10 - num_bad)] + [row(text="")] * num_bad)
    if not refused:
        assert len(build(jsonl)) == 9
        return
    with pytest.raises(UserError):
        build(jsonl)


def test_many_bad_rows_stop_everything_and_leave_nothing(
    build: Callable[..., Manifest], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    jsonl = write_jsonl([row(seed) for seed in range(20)] + [row(text="")] * 7)
    with pytest.raises(UserError) as error:
        build(jsonl)
    message = str(error.value)
    assert message.startswith("7 of 27 rows cannot be used")
    assert all(f"{jsonl} line {number}: text is empty" in message for number in range(21, 26))
    assert "line 26" not in message and "2 more" in message
    assert list(tmp_path.iterdir()) == [jsonl]


def test_file_of_one_bad_row(build: Callable[..., Manifest], write_jsonl: WriteJsonl) -> None:
    with pytest.raises(UserError, match=r"1 of 1 rows cannot be used:\n.* line 1: no text"):
        build(write_jsonl([{"audio_codes": codes()}]))


def test_rows_that_all_have_the_same_codes(
    build: Callable[..., Manifest], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    jsonl = write_jsonl([row(0, text=f"Sentence {number}.") for number in range(3)])
    with pytest.raises(UserError, match=r"all 3 rows .* have the same codes"):
        build(jsonl)
    assert list(tmp_path.iterdir()) == [jsonl]


def test_one_row_alone_and_two_equal_ones_among_others_are_fine(
    build: Callable[..., Manifest], write_jsonl: WriteJsonl
) -> None:
    assert len(build(write_jsonl([row()]))) == 1
    assert len(build(write_jsonl([row(), row(), row(1)]))) == 3


def test_speaker_names_that_differ_in_case_only(
    build: Callable[..., Manifest], write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    jsonl = write_jsonl([row(0, speaker="Ada"), row(1, speaker="Bea"), row(2, speaker="Ada"), row(3, speaker="ADA")])
    with pytest.raises(UserError) as error:
        build(jsonl)
    message = str(error.value)
    assert f'"Ada" ({jsonl} line 1)' in message and f'"ADA" ({jsonl} line 4)' in message
    assert list(tmp_path.iterdir()) == [jsonl]


def test_speaker_name_clashes_with_the_default(build: Callable[..., Manifest], write_jsonl: WriteJsonl) -> None:
    with pytest.raises(UserError, match="clash"):
        build(write_jsonl([row(0), row(1, speaker="ada")]), default_speaker="Ada")


def test_speaker_names_across_files() -> None:
    first, second = (Path("a.jsonl"), 1), (Path("b.jsonl"), 9)
    check_speaker_names({"Ada": first, "Bea": second})
    with pytest.raises(UserError, match=r"a\.jsonl line 1.*b\.jsonl line 9"):
        check_speaker_names({"Ada": first, "ada": second})


@pytest.mark.parametrize("last", [row(9, speaker="ADA"), None], ids=["clash", "same codes"])
def test_refused_build_leaves_no_list_of_bad_rows_behind(
    build: Callable[..., Manifest], write_jsonl: WriteJsonl, tmp_path: Path, last: dict[str, Any] | None
) -> None:
    good = [row(seed if last else 0, speaker="Ada") for seed in range(12)]
    jsonl = write_jsonl([*good, row(text=""), *([last] if last else [])])
    with pytest.raises(UserError):
        build(jsonl)
    assert list(tmp_path.iterdir()) == [jsonl]


def test_refused_build_keeps_what_was_there(build: Callable[..., Manifest], write_jsonl: WriteJsonl) -> None:
    before = build(write_jsonl([row(seed) for seed in range(3)], "good.jsonl"))
    content = before.arrow_file.read_bytes()
    with pytest.raises(UserError):
        build(write_jsonl([row(text="")]))
    assert before.arrow_file.read_bytes() == content
    assert [path.name for path in before.arrow_file.parent.iterdir()] == ["train.arrow"]


@pytest.mark.parametrize("max_rows, last_line", [(1, 1), (10, 11), (11, 12), (50, 12)])
def test_max_rows_counts_good_rows(
    build: Callable[..., Manifest], write_jsonl: WriteJsonl, max_rows: int, last_line: int
) -> None:
    rows = [row(seed) for seed in range(12)]
    rows[1] = row(1, text="")
    built = build(write_jsonl(rows), max_rows)
    assert built.column("line").tolist() == [number for number in range(1, last_line + 1) if number != 2]


def test_several_speaker_ids_trained_as_one_are_said_once(
    build: Callable[..., Manifest], write_jsonl: WriteJsonl, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl = write_jsonl([row(seed, speaker_id=seed % 3) for seed in range(6)])
    build(jsonl)
    assert capsys.readouterr().out.count("SPEAKER_COLUMN=speaker_id") == 1
    assert set(build(jsonl, speaker_key="speaker_id").column("speaker")) == {"0", "1", "2"}
    assert "SPEAKER_COLUMN" not in capsys.readouterr().out
    build(write_jsonl([row(seed, speaker_id=5) for seed in range(6)]))
    build(write_jsonl([row(seed) for seed in range(6)]))
    assert "SPEAKER_COLUMN" not in capsys.readouterr().out


def test_rejections_list_in_a_new_folder(tmp_path: Path) -> None:
    rejections = Rejections(tmp_path / "rows.jsonl", num_good=100)
    rejections.check(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()
    rejections.add(3, "why", '{"text": "ß"}\n')
    rejections.check(tmp_path / "new" / "list.jsonl")
    (listed,) = [json.loads(line) for line in (tmp_path / "new" / "list.jsonl").read_text("utf-8").splitlines()]
    assert listed == {"file": str(tmp_path / "rows.jsonl"), "line": 3, "reason": "why", "row": '{"text": "ß"}'}


# ------------------------------------------------------------------------------------------------------ memory map


@pytest.fixture
def three(build: Callable[..., Manifest], write_jsonl: WriteJsonl, clip: Path) -> Manifest:
    """Rows with all, some and no optional fields, of 2, 40 and 3 frames."""
    full = {
        "audio": str(clip), "ref_audio": str(clip), "ref_text": "R.", "language": "English", "speaker": "Ada",
        "instruct": "Softly.",
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
        "audio": audio, "ref_audio": audio, "ref_text": "R.", "num_codec_frames": 2,
    }  # fmt: skip
    nothing = {"instruct": None, "audio": None, "ref_audio": None, "ref_text": None}
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


def test_rows_across_write_batches(build: Callable[..., Manifest], write_jsonl: WriteJsonl) -> None:
    """More rows than one Arrow record batch holds."""
    many = build(write_jsonl([row(seed, audio_codes=codes(seed, 2 + seed % 3)) for seed in range(600)]))
    assert len(many) == 600
    for index in (0, 255, 256, 511, 512, 599):
        assert many[index]["line"] == index + 1
        assert many[index]["codes"].tolist() == codes(index, 2 + index % 3)


# -------------------------------------------------------------------------------------------------------- held out


@pytest.fixture
def speakers(build: Callable[..., Manifest], write_jsonl: WriteJsonl) -> Manifest:
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
def test_no_row_is_held_out_of_few(build: Callable[..., Manifest], write_jsonl: WriteJsonl, num_rows: int) -> None:
    manifest = build(write_jsonl([row(seed) for seed in range(num_rows)]))
    train, validation = hold_out(manifest, 0.5, seed=1)
    assert validation is None and len(train) == num_rows


def test_zero_holds_nothing_out(speakers: Manifest) -> None:
    train, validation = hold_out(speakers, 0.0, seed=1)
    assert validation is None and lines(train) == lines(speakers)
