"""``--mode check`` and the look at the rows that training takes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import PROJECT, VOICE

from finetuning.audio import load_audio
from finetuning.base_model import load_speaker_encoder, resolve_base
from finetuning.check_rows import MAX_VOICE_REFERENCES, Mending, _VoiceSample, check_at_start, check_jsonl
from finetuning.checks import Finding
from finetuning.codec import Codec
from finetuning.errors import UserError
from finetuning.manifest import Row, RowFormat
from finetuning.row_index import open_rows
from finetuning.settings import load_settings
from finetuning.training_rows import TrainingRows

Check = Callable[..., str]


@pytest.fixture
def check(
    tmp_path: Path, make_settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Check:
    """Checks rows in the test's folder; returns what was said."""
    monkeypatch.chdir(tmp_path)

    def check(rows: list[dict[str, Any]] | Path, mending: Mending | None = None, **settings: Any) -> str:
        path = rows if isinstance(rows, Path) else write(tmp_path / "rows.jsonl", rows)
        try:
            check_jsonl(
                make_settings(**settings), path, Mending() if mending is None else mending, setting="--input_jsonl"
            )
        finally:
            said.append(capsys.readouterr().out)
        return said[-1]

    said: list[str] = []
    check.said = said
    return check


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def found(folder: Path = Path()) -> dict[str, str]:
    """Check -> severity of the report that was just written."""
    report = json.loads((folder / "data/report/report.json").read_text(encoding="utf-8"))
    return {finding["check"]: finding["severity"] for finding in report["findings"]}


def test_the_demo_is_fine_but_short(check: Check, demo_rows: list[dict[str, Any]]) -> None:
    said = check(demo_rows)
    assert {name for name, severity in found().items() if severity != "info"} == {"speaker_minutes"}
    assert "0 errors, 1 warning" in said and "not_measured" not in found()
    page = Path("data/report/report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_clips_are_read_where_nothing_was_measured_and_not_where_it_was(
    check: Check, demo_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = []
    for number, row in enumerate(demo_rows[:10]):
        clipped = tmp_path / f"{number}.wav"
        soundfile.write(clipped, np.clip(20 * load_audio(row["audio"]), -1, 1), 24_000)
        rows.append(row | {"audio": str(clipped)})
    check(rows)
    assert found()["clipping"] == "warning"
    check([row | {"measures": {"seconds": 2.0, "clipped_share": 0.0}} for row in rows])
    assert "clipping" not in found()


def test_the_same_codes_everywhere_are_refused(check: Check, demo_rows: list[dict[str, Any]]) -> None:
    """A known set had 984 rows with the same codes, and cost days."""
    codes = demo_rows[0]["audio_codes"]
    with pytest.raises(UserError, match="do not train on this data"):
        check([row | {"audio_codes": codes} for row in demo_rows])
    assert found()["duplicate_codes"] == "error"


def test_another_voice_among_the_clips_is_heard(check: Check, demo_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """The speaker encoder has random weights, so the stranger is a strange one: ring-modulated and an octave up."""
    waveform = load_audio(demo_rows[3]["audio"])
    stranger = waveform[::2] * np.sign(np.sin(np.arange(len(waveform[::2])) * 0.3))
    soundfile.write(tmp_path / "stranger.wav", stranger, 24_000)
    rows = [dict(row) for row in demo_rows]
    rows[3]["audio"] = str(tmp_path / "stranger.wav")
    check(rows)
    report = json.loads(Path("data/report/report.json").read_text(encoding="utf-8"))
    (finding,) = [finding for finding in report["findings"] if finding["check"] == "speaker_outliers"]
    assert [example["line"] for example in finding["examples"]] == [4]


def test_a_foreign_reference_is_heard(check: Check, demo_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 6 * 24_000)
    soundfile.write(tmp_path / "noise.wav", noise, 24_000)
    check([row | {"ref_audio": str(tmp_path / "noise.wav")} for row in demo_rows])
    assert "reference_voice" in found()


def test_every_distinct_reference_is_heard(
    check: Check, demo_rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is right, a later one is not; the finding names the row and counts those that it stands for."""
    noise = np.random.default_rng(0).normal(0, 0.1, 6 * 24_000)
    soundfile.write(tmp_path / "noise.wav", noise, 24_000)
    own = str(VOICE / "english_voice.wav")
    rows = [row | {"ref_audio": str(tmp_path / "noise.wav") if n in (6, 9) else own} for n, row in enumerate(demo_rows)]
    check(rows)
    report = json.loads(Path("data/report/report.json").read_text(encoding="utf-8"))
    (finding,) = [finding for finding in report["findings"] if finding["check"] == "reference_voice"]
    assert finding["num_rows"] == 2 and [example["line"] for example in finding["examples"]] == [7]


def test_of_many_references_some_are_heard(make_settings: Callable[..., Any]) -> None:
    """Each is as likely as any other, in whatever order they come, and its rows are counted from the first on."""
    rows = [
        Row(line, "a", "en", "anna", None, None, Path(f"{line % 97}.wav"), None, None, {}) for line in range(1, 971)
    ]
    drawn = []
    for order in (rows, rows[::-1]):
        sample = _VoiceSample(make_settings())
        for row in order:
            sample.offer(row)
        drawn.append(sample.references["anna"])
    assert len(drawn[0]) == MAX_VOICE_REFERENCES and set(drawn[0]) == set(drawn[1])
    assert {reference.num_rows for reference in drawn[0].values()} == {10}
    assert all(reference.line % 97 == int(path.removesuffix(".wav")) for path, reference in drawn[0].items())
    assert all(reference.line <= 97 for reference in drawn[0].values())


def test_voices_are_compared_by_codes_where_the_audio_is_gone(
    check: Check, demo_rows: list[dict[str, Any]], codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: dict[int, np.ndarray] = {}

    def listen(vectors: dict[int, np.ndarray], speakers: dict[int, str], references: list[Any]) -> list[Finding]:
        heard.update(vectors)
        return []

    monkeypatch.setattr("finetuning.check_rows.similarity_findings", listen)
    check([{key: row[key] for key in ("text", "audio_codes")} for row in demo_rows])
    encode = load_speaker_encoder(resolve_base(load_settings({"init_model_path": "tiny-random"}, environment={})))
    expected = encode(codec.decode([np.asarray(demo_rows[4]["audio_codes"])])[0])
    assert len(heard) == len(demo_rows)
    np.testing.assert_allclose(heard[5], expected, rtol=1e-4, atol=1e-5)


def test_unusable_rows_are_a_finding(check: Check, demo_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"nothing to hear")
    broken = {"audio": str(tmp_path / "broken.wav"), "text": "Broken."}
    said = check([*demo_rows, broken])
    assert found()["unusable_rows"] == "warning" and "not a readable audio file" in said
    with pytest.raises(UserError, match="1 error"):
        check([*demo_rows, *[broken] * 4])
    assert found()["unusable_rows"] == "error"


def test_mending_writes_new_files_only(check: Check, tmp_path: Path) -> None:
    waveform = load_audio(VOICE / "clips" / "train_01.flac")
    silence = np.zeros(48_000, dtype=np.float32)
    soundfile.write(tmp_path / "padded.wav", 0.3 * np.concatenate([silence, waveform, silence]), 24_000)
    rows = [{"audio": str(VOICE / "clips" / f"train_{n:02}.flac"), "text": f"Sentence {n}."} for n in range(1, 6)]
    source = write(tmp_path / "source.jsonl", [{"audio": "padded.wav", "text": "Padded."}, *rows])
    before = {path: path.read_bytes() for path in (source, tmp_path / "padded.wav")}
    mending = Mending(tmp_path / "mended.jsonl", trim_silence=True, target_loudness_lufs=-24.0)
    said = check(source, mending)
    mended = [json.loads(line) for line in (tmp_path / "mended.jsonl").read_text(encoding="utf-8").splitlines()]
    shorter = load_audio(tmp_path / mended[0]["audio"])
    assert len(shorter) < len(waveform) + 0.5 * 24_000
    assert "mended rows" in said and len(mended) == 6
    assert {path: path.read_bytes() for path in before} == before
    dropped = Mending(tmp_path / "dropped.jsonl", drop_flagged=True)
    check(source, dropped)
    texts = [json.loads(line)["text"] for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert "Padded." not in texts and len(texts) == 5


def test_single_faulty_rows_are_left_out_too(check: Check, demo_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """One in 110 is only info; what the same run mends stays."""
    rows = [demo_rows[n % len(demo_rows)] | {"text": f"Sentence number {'abcdefghij'[n % 10]}."} for n in range(110)]
    good = {"seconds": 2.0, "leading_silence_seconds": 0.0, "trailing_silence_seconds": 0.0, "clipped_share": 0.0}
    rows = [row | {"measures": good | {"audio_hash": f"{n + 1:x}"}} for n, row in enumerate(rows)]
    rows = [{key: value for key, value in row.items() if key != "audio_codes"} for row in rows]
    rows[3]["measures"] |= {"clipped_share": 0.1}
    rows[5]["measures"] |= {"leading_silence_seconds": 0.9, "seconds": 2.9}
    rows[7]["text"] += " 7"
    check(rows, Mending(tmp_path / "a.jsonl", drop_flagged=True))
    assert found()["clipping"] == found()["leading_silence"] == found()["digits"] == "info"
    left = [json.loads(line)["measures"]["audio_hash"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {f"{n + 1:x}" for n in range(110)} - set(left) == {"4", "6"}
    check(rows, Mending(tmp_path / "b.jsonl", trim_silence=True, drop_flagged=True))
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 109


@pytest.mark.parametrize("loudness, part", [(5.0, "5 LUFS is not speech"), (-23.0, "exists; mended data")])
def test_mending_that_cannot_be_done_is_refused_before_the_check(
    check: Check, demo_rows: list[dict[str, Any]], tmp_path: Path, loudness: float, part: str
) -> None:
    if loudness < 0:
        (tmp_path / "new_audio").mkdir()
    with pytest.raises(UserError, match=part):
        check(demo_rows, Mending(tmp_path / "new.jsonl", target_loudness_lufs=loudness))
    assert not Path("data/report").exists()


def test_mending_needs_a_place_and_a_task(check: Check, demo_rows: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="--output_jsonl"):
        check(demo_rows, Mending(trim_silence=True))
    with pytest.raises(UserError, match="--trim_silence"):
        check(demo_rows, Mending(Path("new.jsonl")))


# --------------------------------------------------------------------------------------------------------- at start


@pytest.fixture
def bad_rows(tmp_path: Path, demo_rows: list[dict[str, Any]]) -> TrainingRows:
    """Most rows with the codes of one clip."""
    codes = demo_rows[0]["audio_codes"]
    rows = [row | ({"audio_codes": codes} if index > 2 else {}) for index, row in enumerate(demo_rows)]
    return TrainingRows(open_rows(write(tmp_path / "bad.jsonl", rows), RowFormat(), "TRAIN_JSONL"), None)


def test_errors_stop_a_run_unless_it_is_told_otherwise(
    bad_rows: TrainingRows, make_settings: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(UserError, match="DATA_CHECK=warn trains nevertheless"):
        check_at_start(bad_rows, make_settings())
    capsys.readouterr()
    check_at_start(bad_rows, make_settings(data_check="warn"))
    assert "error:" in capsys.readouterr().out
    monkeypatch.chdir(VOICE)
    jsonl = tmp_path / "bad rows.jsonl"
    check_at_start(bad_rows, make_settings(data_check="warn", train_jsonl=jsonl))
    (hint,) = re.findall(r"; (.*) says where and what to do", capsys.readouterr().out)
    python, script, *options = shlex.split(hint)
    assert python == "python" and Path(script).samefile(PROJECT / "data_processing.py")
    assert options == ["--mode", "check", "--input_jsonl", str(jsonl)]
    check_at_start(bad_rows, make_settings(data_check="off"))
    assert capsys.readouterr().out == ""


def test_a_part_of_a_large_set_is_not_judged_by_its_minutes(
    bad_rows: TrainingRows,
    make_settings: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_at_start(bad_rows, make_settings(data_check="warn"))
    assert "minutes" in capsys.readouterr().out
    monkeypatch.setattr("finetuning.check_rows.MAX_ROWS_AT_START", 10)
    check_at_start(bad_rows, make_settings(data_check="warn"))
    said = capsys.readouterr().out
    assert "10 of the training rows" in said and "minutes" not in said
