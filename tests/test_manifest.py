"""The row: every check, and the list of bad ones."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetuning import manifest
from finetuning.errors import UserError
from finetuning.manifest import (
    Row,
    RowError,
    RowFormat,
    Tally,
    check_codes,
    check_speaker_names,
    parse_row,
    read_lines,
    read_rows,
    rejected_record,
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


@pytest.mark.parametrize("quick", [False, True])
def test_of_a_list_of_references_the_first_counts(clip: Path, quick: bool) -> None:
    line = json.dumps(row(ref_audio=[str(clip), "gone.wav"]))
    parsed = parse_row(line, 1, Path("."), RowFormat(), needs_codes=True, quick=quick)
    assert parsed.ref_audio == clip and parsed.raw["ref_audio"] == str(clip)
    assert parse(row(ref_audio=[])).ref_audio is None


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
        (row(ref_audio=["nowhere/ref.wav", "b"]), True, "ref_audio file not found: nowhere/ref.wav"),
        (row(ref_audio=[["a"]]), True, "ref_audio must be a path"),
        (
            {"audio": "https://a.b/c.wav", "text": "a"},
            False,
            "audio file not found: https://a.b/c.wav (a URL; files are read)",
        ),
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


# ----------------------------------------------------------------------------------------------------------- quick


def quickly(line: str) -> tuple[Any, ...]:
    """What ``_load_quickly`` gives of a line, as plain values; () where it leaves the line to the JSON parser."""
    loaded = manifest._load_quickly(line)
    return () if loaded is None else (loaded[0], loaded[1].tolist())


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":"), (", ", ":"), (",", ": ")])
@pytest.mark.parametrize("first", [True, False])
def test_quick_reading_gives_what_the_json_parser_gives(separators: tuple[str, str], first: bool) -> None:
    rest = {"text": 'He said "audio_codes": [[1]] \\"audio_codes\\": [[2]]\u00e9', "extra": {"list": [[1, 2], [3]]}}
    given = codes(1, 40)
    whole = {"audio_codes": given} | rest if first else rest | {"audio_codes": given}
    line = json.dumps(whole, separators=separators)
    taken = quickly(line)
    assert taken == (rest, given) or (taken == () and not first)  # the text holds the key's look-alike
    slow, quick = (parse_row(line, 1, Path("."), RowFormat(), True, quick) for quick in (False, True))
    assert np.array_equal(slow.codes, quick.codes) and quick.codes.dtype == np.int16
    assert (slow.text, slow.speaker) == (quick.text, quick.speaker)


def test_ordinary_lines_are_read_quickly() -> None:
    """Else nothing would be gained, and no other test here would tell."""
    for line in (
        json.dumps(row(3)),
        json.dumps(row(3), ensure_ascii=False) + "\n",
        json.dumps(row(3), separators=(",", ":")),
    ):
        assert quickly(line) == ({"text": "Sentence 3."}, codes(3))


@pytest.mark.parametrize(
    "codes_text",
    [
        json.dumps(codes(0, 1)), json.dumps(np.array(codes()).T.tolist()), json.dumps([[1] * 15] * 3),
        json.dumps([[1] * 17] * 3), json.dumps([[2048] * 16] * 3), json.dumps([[-1] * 16] * 3),
        json.dumps([[1.0] * 16] * 3), json.dumps([[1] * 16, [1] * 15 + [[1]]]), json.dumps([[10**30] * 16] * 3),
        json.dumps([["1"] * 16] * 3), json.dumps([[True] * 16] * 3), json.dumps([[1] * 16, [1] * 15]),
        json.dumps([[1] * 15, [1] * 17]), json.dumps([[1] * 16] * 2).replace("1]]", "1 1]]"),
        "[[]]", "[[], []]", "[[1, 2", "[[1 2]]",
        json.dumps([[1] * 16] * 2).replace("1, 1", "1 1", 1), json.dumps([[1] * 16] * 2).replace("1, 1", "1,, 1", 1),
        json.dumps([[1] * 16] * 2).replace("1, 1", ", 1", 1), json.dumps([[1] * 16] * 2).replace("[1", "[", 1),
    ],
)  # fmt: skip
def test_quick_reading_leaves_what_is_wrong_to_the_checks(codes_text: str) -> None:
    line = f'{{"text": "a", "audio_codes": {codes_text}}}'
    assert quickly(line) == ()
    reasons = []
    for quick in (False, True):
        with pytest.raises(RowError) as error:
            parse_row(line, 1, Path("."), RowFormat(), True, quick)
        reasons.append(str(error.value))
    assert reasons[0] == reasons[1]


@pytest.mark.parametrize(
    "line",
    [
        f'{{"text": "a", "inner": {{"audio_codes": {codes()}}}}}',
        f'{{"text": "a", "inner": {{"audio_codes": {codes()}}}, "audio_codes": {codes(1)}}}',
        f'{{"text": "a", "audio_codes": {codes()}, "audio_codes": {codes(1)}}}',
        f'{{"text": "a", "audio_codes": {codes()}, "audio_codes": null}}',
        f'{{"text": "a", "x\\"audio_codes": {codes()}, "audio_codes": {codes(1)}}}',
        f'{{"text": "a", "x\\\\"audio_codes": {codes()}}}',
        f'{{"text": "a", "audio_codes": {codes()}',
        f'{{"text": "a", "audio_codes": {codes()}}} {{}}',
        f'["audio_codes": {codes()}]',
        f'{{"text": "\\ud800", "audio_codes": {codes()}}}',
        f'{{"text": "a", "audio_codes": {{"audio_codes": {codes()}}}}}',
    ],
)
def test_quick_reading_is_not_fooled(line: str) -> None:
    """Codes that are not the row's own, twice there, or in a line that is no object."""
    results = []
    for quick in (False, True):
        try:
            results.append(parse_row(line, 1, Path("."), RowFormat(), True, quick).codes.tolist())
        except RowError as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_quick_rows_lack_their_codes_in_raw() -> None:
    line = json.dumps(row(2, mood=5))
    assert parse_row(line, 1, Path("."), RowFormat(), True, quick=True).raw == {"text": "Sentence 2.", "mood": 5}


# ------------------------------------------------------------------------------------------------------- bad rows


def test_speaker_names_across_files() -> None:
    first, second = (Path("a.jsonl"), 1), (Path("b.jsonl"), 9)
    check_speaker_names({"Ada": first, "Bea": second})
    with pytest.raises(UserError, match=r"a\.jsonl line 1.*b\.jsonl line 9"):
        check_speaker_names({"Ada": first, "ada": second})


def test_tally_counts_and_remembers_the_first_few(tmp_path: Path) -> None:
    tally = Tally()
    tally.add(90, [rejected_record(Path("a.jsonl"), 3, "why", '{"text": "ß"}\n')])
    tally.check_share()
    assert tally.summary() == "1 of 91 rows:\n  a.jsonl line 3: why"
    tally.add(0, [rejected_record(Path("b.jsonl"), number, "so", "x" * 1000) for number in range(1, 10)])
    tally.check_share()  # exactly a tenth
    tally.add(0, [rejected_record(Path("b.jsonl"), 10, "so", "")])
    assert "x" not in str(tally.first) and len(tally.first) == 5 and (tally.num_good, tally.num_bad) == (90, 11)
    with pytest.raises(UserError, match=r"11 of 101 rows cannot be used:\n.*line 3: why(.|\n)*… and 6 more$"):
        tally.check_share()
    tally.check_share(total=110)


def test_bad_rows_of_a_file_are_not_held(write_jsonl: Callable[..., Path]) -> None:
    tally, many = Tally(), [{"text": "", "note": "x" * 10_000} for _ in range(500)]
    jsonl = write_jsonl(many)
    tracemalloc.start()
    try:
        assert list(read_rows(jsonl, "TRAIN_JSONL", RowFormat(), tally, needs_codes=True)) == []
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tally.num_bad == 500 and [bad["line"] for bad in tally.first] == [1, 2, 3, 4, 5] and kept < 500_000
