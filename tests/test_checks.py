"""Every check fires on data made to show it, and stays quiet on good data."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VOICE

from finetuning.audio import audio_duration_seconds, load_audio
from finetuning.checks import (
    SEVERITIES,
    Finding,
    ReferenceVoice,
    faulty_lines,
    find_problems,
    similarity_findings,
)
from finetuning.figures import MAX_EXAMPLES, collect
from finetuning.quality import measure_clip

GOOD_MEASURES = {
    "seconds": 5.0,
    "peak_db": -3.0,
    "loudness_lufs": -22.0,
    "clipped_share": 0.0,
    "dc_offset": 0.0005,
    "leading_silence_seconds": 0.1,
    "trailing_silence_seconds": 0.2,
    "noise_floor_db": -65.0,
    "snr_db": 40.0,
    "bandwidth_hz": 12_000,
    "audio_hash": "",
}
NUM_ROWS = 150  # of 5 s on average: 12.5 minutes


def good_rows(num_rows: int = NUM_ROWS, language: str = "English", letters: str = "abcdefghij") -> list[dict[str, Any]]:
    """Rows as a good recording has them: varied lengths, about 13 letters a second."""
    random = np.random.default_rng(0)
    rows = []
    for line in range(1, num_rows + 1):
        seconds = float(random.uniform(2, 8))
        text = "".join(random.choice(list(letters), round((seconds - 0.3) * random.normal(13, 1))))
        codes = random.integers(0, 2048, (round(seconds * 12.5), 16)).astype(np.int16)
        measures = GOOD_MEASURES | {"seconds": seconds, "audio_hash": f"{line:016x}"}
        measures["loudness_lufs"] += float(random.normal(0, 1.5))
        row = {"line": line, "text": text, "language": language, "speaker": "anna", "ref_audio": "anna.wav"}
        rows.append(row | {"num_codec_frames": len(codes), "codes": codes, "measures": measures})
    return rows


def found(rows: list[dict[str, Any]], reference_seconds: float | None = 6.0) -> dict[str, Finding]:
    findings = find_problems(collect(iter(rows), reference_seconds=lambda path: reference_seconds))
    assert all(finding.severity in SEVERITIES and finding.advice for finding in findings)
    assert len({finding.check for finding in findings}) == len(findings)
    return {finding.check: finding for finding in findings}


def test_good_rows_have_no_findings() -> None:
    assert found(good_rows()) == {}


# ----------------------------------------------------------------------------------------------------------- demo


@pytest.fixture(scope="module")
def demo(demo_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The demo's rows as the check reads them, measured."""
    rows = []
    for line, row in enumerate(demo_rows, 1):
        codes = np.asarray(row["audio_codes"], np.int16)
        known = {"line": line, "speaker": "english_voice", "codes": codes, "num_codec_frames": len(codes)}
        rows.append(row | known | {"measures": measure_clip(load_audio(row["audio"]))})
    return rows


def test_the_demo_clips_are_only_too_few(demo: list[dict[str, Any]]) -> None:
    findings = find_problems(collect(demo, reference_seconds=audio_duration_seconds))
    assert [finding.check for finding in findings if finding.severity != "info"] == ["speaker_minutes"]
    assert {finding.check for finding in findings} == {"speaker_minutes", "full_scale"}


def damaged_clip(name: str) -> Callable[[np.ndarray], np.ndarray]:
    from scipy.signal import resample_poly

    return {
        "clipping": lambda clip: np.clip(4 * clip, -1, 1),
        "dc_offset": lambda clip: 0.5 * clip + 0.04,
        "leading_silence": lambda clip: np.pad(clip, (20_000, 0)),
        "trailing_silence": lambda clip: np.pad(clip, (0, 40_000)),
        "low_snr": lambda clip: clip + 0.04 * np.random.default_rng(0).standard_normal(len(clip)),
        "noise_floor": lambda clip: clip + 0.04 * np.random.default_rng(0).standard_normal(len(clip)),
        "band_limited": lambda clip: resample_poly(resample_poly(clip, 1, 3), 3, 1),
        "quiet_clips": lambda clip: 0.05 * clip,
        "short_clips": lambda clip: clip[:20_000],
        "long_clips": lambda clip: np.tile(clip, 50),
    }[name]


@pytest.mark.parametrize(
    "check",
    [
        "clipping",
        "dc_offset",
        "leading_silence",
        "trailing_silence",
        "low_snr",
        "noise_floor",
        "band_limited",
        "quiet_clips",
        "short_clips",
        "long_clips",
    ],
)
def test_damaged_audio_is_found_from_the_samples_on(demo: list[dict[str, Any]], check: str) -> None:
    """Half of the demo's clips are damaged; exactly those are found."""
    damage = damaged_clip(check)
    rows = [dict(row) for row in demo[:8]]
    for row in rows[::2]:
        row["measures"] = measure_clip(damage(load_audio(row["audio"])).astype(np.float32))
    finding = found(rows)[check]
    assert finding.severity == "warning" and finding.num_rows == 4
    assert {line for line, _ in finding.examples} == {1, 3, 5, 7}


# ---------------------------------------------------------------------------------------------- figures of the clips


@pytest.mark.parametrize(
    "check, figure, value, just_right",
    [
        ("short_clips", "seconds", 0.9, 1.0),
        ("long_clips", "seconds", 31.0, 29.9),
        ("clipping", "clipped_share", 0.002, 0.0003),
        ("dc_offset", "dc_offset", -0.02, -0.009),
        ("leading_silence", "leading_silence_seconds", 0.7, 0.5),
        ("trailing_silence", "trailing_silence_seconds", 1.2, 0.9),
        ("noise_floor", "noise_floor_db", -35.0, -41.0),
        ("low_snr", "snr_db", 15.0, 20.5),
        ("band_limited", "bandwidth_hz", 4000, 10_900),
        ("half_band", "bandwidth_hz", 7900, 9000),
        ("quiet_clips", "peak_db", -24.0, -19.0),
        ("full_scale", "peak_db", 0.0, -0.2),
    ],
)
def test_limits(check: str, figure: str, value: float, just_right: float) -> None:
    def with_figure(figure_value: float, share: float) -> dict[str, Finding]:
        rows = good_rows()
        for row in rows[: round(share * len(rows))]:
            row["measures"] |= {figure: figure_value}
        return found(rows)

    only_info = check in ("half_band", "full_scale")
    assert with_figure(value, 0.2)[check].severity == ("info" if only_info else "warning")
    assert check not in with_figure(just_right, 0.2)
    few = with_figure(value, 0.007)  # one row
    assert check == "half_band" or (few[check].severity, few[check].num_rows) == ("info", 1)


def test_examples_are_the_worst_rows_with_their_figures() -> None:
    rows = good_rows()
    for row, share in zip(rows, np.linspace(0.01, 0.08, 8), strict=False):
        row["measures"] |= {"clipped_share": float(share)}
    finding = found(rows)["clipping"]
    assert (
        finding.examples == [(line, f"{line:.2f}%") for line in (8, 7, 6, 5, 4)]
        and len(finding.examples) == MAX_EXAMPLES
    )
    assert "8 of 150 clips (5.3 %)" in finding.message and "8.00%" in finding.message


def test_the_worst_are_the_lowest_where_low_is_bad() -> None:
    rows = good_rows()
    for row, snr_db in zip(rows, (12.0, 8.0, 16.0), strict=False):
        row["measures"] |= {"snr_db": snr_db}
    assert found(rows)["low_snr"].examples == [(2, "8 dB"), (1, "12 dB"), (3, "16 dB")]


def test_lines_are_the_rows_to_leave_out() -> None:
    """All of them, not only the examples; without them the finding is gone."""
    rows = good_rows()
    bad = [*range(1, 13)]
    for row in rows[:12]:
        row["measures"] |= {"clipped_share": 0.01}
        row["text"] += " 🎉"
    findings = found(rows)
    assert findings["clipping"].lines.tolist() == findings["unusual_characters"].lines.tolist() == bad
    assert found([row for row in rows if row["line"] not in findings["clipping"].lines]) == {}


def test_faulty_lines_are_defects_of_rows_and_whatever_is_warned_of() -> None:
    rows = good_rows()
    defects = {"clipped_share": 0.01, "noise_floor_db": -20.0, "trailing_silence_seconds": 3.0, "dc_offset": 0.1}
    for row, (figure, value) in zip(rows, defects.items(), strict=False):
        row["measures"] |= {figure: value}
    rows[2]["measures"]["seconds"] += 3.0
    rows[4]["text"] += " \N{PARTY POPPER}"
    rows[5]["text"] = "абвгдежзий" * 5
    rows[6]["codes"] = np.repeat(rows[6]["codes"][:1], len(rows[6]["codes"]), axis=0)
    rows[8]["measures"] |= {"audio_hash": rows[7]["measures"]["audio_hash"]}
    rows[9]["measures"] |= {"peak_db": 0.0}
    rows[10]["measures"] |= {"seconds": 0.9}
    rows[10]["text"] = "abcdefghij"
    rows[11]["text"] += " 21"
    rows[13]["codes"] = rows[12]["codes"]
    findings = find_problems(collect(rows))
    assert {"digits", "full_scale", "short_clips"} <= {finding.check for finding in findings}
    expected = {1, 2, 3, 4, 5, 6, 7, 9, 13, 14}
    assert faulty_lines(findings) == expected
    assert faulty_lines(findings, {"trailing_silence"}) == expected - {3}
    for row in rows[20:60]:
        row["measures"] |= {"seconds": 0.9}
        row["text"] = f"abcdefg {chr(97 + row['line'] % 20)}"
    found_now = find_problems(collect(rows))
    assert next(finding for finding in found_now if finding.check == "short_clips").severity == "warning"
    assert {*range(21, 61), 11} <= faulty_lines(found_now)


def test_findings_about_the_set_name_no_lines() -> None:
    rows = good_rows(40)
    for row in rows:
        row["codes"] = rows[0]["codes"]
    findings = found(rows)
    assert set(findings) == {"duplicate_codes", "speaker_minutes"}
    assert not any(len(finding.lines) for finding in findings.values())


def test_loudness_may_differ_between_speakers_but_not_within() -> None:
    rows = good_rows(200)
    for row in rows[::2]:
        row["measures"] |= {"loudness_lufs": row["measures"]["loudness_lufs"] - 15}
    assert found(rows)["loudness_spread"].severity == "warning"
    for row in rows[::2]:
        row["speaker"] = "bert"
    assert "loudness_spread" not in found(rows)


def test_minutes_per_speaker() -> None:
    assert found(good_rows(40))["speaker_minutes"].severity == "warning"  # 3 minutes
    assert found(good_rows(90))["speaker_minutes"].severity == "info"  # 7 minutes
    rows = good_rows(160)
    for row in rows[150:]:
        row["speaker"] = "bert"
    finding = found(rows)["speaker_minutes"]
    assert finding.num_rows == 10 and '"bert"' in finding.message and finding.examples[0][0] == 151
    minutes = collect(rows).minutes_per_speaker()
    assert list(minutes) == ["anna", "bert"]
    assert minutes["bert"] == pytest.approx(sum(row["measures"]["seconds"] for row in rows[150:]) / 60, rel=1e-5)


@pytest.mark.parametrize("seconds, fires", [(2.0, True), (3.5, False), (10.0, False), (14.0, True), (None, False)])
def test_reference_length(seconds: float | None, fires: bool) -> None:
    assert ("reference_length" in found(good_rows(), seconds)) is fires


def test_each_reference_is_asked_for_once_and_counted_once() -> None:
    rows, asked = good_rows(), []
    for row in rows[:10]:
        row["ref_audio"] = Path("short.wav")
    for row in rows[10:20]:
        row["ref_audio"] = None

    def seconds_of(path: str) -> float:
        asked.append(path)
        return {"short.wav": 1.5, "anna.wav": 6.0}[path]

    (finding,) = find_problems(collect(rows, reference_seconds=seconds_of))
    assert asked == ["short.wav", "anna.wav"]
    assert "1 of 2 reference clips" in finding.message and finding.num_rows == 10 and len(finding.examples) == 1


# ---------------------------------------------------------------------------------------------- texts against audio


def test_a_row_at_an_impossible_rate_is_found() -> None:
    rows = good_rows()
    rows[3]["text"] = "abcdefghij" * 40
    rows[7]["text"] = "ab"
    rows[7]["measures"] |= {"seconds": 6.0}
    finding = found(rows)["impossible_rate"]
    assert finding.severity == "warning" and {line for line, _ in finding.examples} == {4, 8}


def test_many_impossible_rates_are_an_error() -> None:
    rows = good_rows()
    for row in rows[:40]:
        row["text"] = "abcdefghij" * 40
    finding = found(rows)["impossible_rate"]
    assert finding.severity == "error" and "do not belong" in finding.message
    assert finding.num_rows == 40 and finding.lines.tolist() == list(range(1, 41))


def test_rate_outliers_are_within_the_language() -> None:
    """Chinese, slow at that, has few characters a second; they are no outliers among themselves, nor absurd."""
    chinese = good_rows(60, "Chinese", "早上好今天天气很不错")
    for row in chinese:
        row["text"] = row["text"][: len(row["text"]) // 10]
        row["line"] += 1000
        row["measures"] |= {"audio_hash": f"{row['line']:016x}"}
        row["codes"] = (row["codes"] + 1) % 2048
    rows = good_rows() + chinese
    assert found(rows) == {}
    slow = replace_text(rows, 5, lambda text: text[: len(text) // 3])
    assert [line for line, _ in found(slow)["speaking_rate"].examples] == [6]


def replace_text(rows: list[dict], index: int, change: Callable[[str], str]) -> list[dict]:
    return [*rows[:index], rows[index] | {"text": change(rows[index]["text"])}, *rows[index + 1 :]]


def test_shifted_transcripts_are_an_error() -> None:
    """Every rate is plausible, but long texts no longer have long clips."""
    rows = good_rows()
    texts = [row["text"] for row in rows]
    shifted = [row | {"text": text} for row, text in zip(rows, texts[1:] + texts[:1], strict=True)]
    assert found(shifted)["text_and_audio_lengths"].severity == "error"
    assert "text_and_audio_lengths" not in found(rows)


def test_clips_of_one_length_are_not_called_shifted() -> None:
    rows = good_rows()
    for row in rows:
        row["measures"] |= {"seconds": 5.0}
        row["text"] = row["text"][:60]
    assert "text_and_audio_lengths" not in found(rows)


# ------------------------------------------------------------------------------------------------------ duplicates


def test_duplicate_audio() -> None:
    rows = good_rows()
    rows[9]["measures"] |= {"audio_hash": rows[4]["measures"]["audio_hash"]}
    rows[20]["measures"] |= {"audio_hash": rows[4]["measures"]["audio_hash"]}
    finding = found(rows)["duplicate_audio"]
    assert (finding.severity, finding.num_rows) == ("warning", 2)
    assert finding.examples == [(10, "same audio as line 5"), (21, "same audio as line 5")]
    assert "2 of them with another text" in finding.message
    for row in rows:
        row["measures"] |= {"audio_hash": "00000000000000aa"}
    assert found(rows)["duplicate_audio"].severity == "error"


def test_duplicate_text() -> None:
    rows = good_rows()
    rows[9]["text"] = f"  {rows[4]['text'].upper()} "
    finding = found(rows)["duplicate_text"]
    assert (finding.severity, finding.num_rows, finding.examples) == ("info", 1, [(10, "same text as line 5")])
    for row in rows[:40]:
        row["text"] = rows[0]["text"]
    assert found(rows)["duplicate_text"].severity == "warning"
    for row in rows[:90]:
        row["text"] = rows[0]["text"]
    finding = found(rows)["duplicate_text"]
    assert (finding.severity, finding.num_rows) == ("error", 90)


def test_several_speakers_may_read_the_same_sentences() -> None:
    rows = good_rows(300)
    for first, second in zip(rows[:150], rows[150:], strict=True):
        second |= {"text": first["text"], "speaker": "bert"}
        second["measures"] |= {"seconds": first["measures"]["seconds"]}
    assert found(rows) == {}


def test_the_set_with_984_rows_of_the_same_codes_is_refused() -> None:
    rows = good_rows(984)
    for row in rows:
        row["codes"] = rows[0]["codes"]
    finding = found(rows)["duplicate_codes"]
    assert finding.severity == "error" and finding.message == "all 984 rows have the same codes"


@pytest.mark.parametrize("share, severity", [(0.02, "warning"), (0.6, "error")])
@pytest.mark.parametrize("measured", [True, False])
def test_codes_shared_by_different_clips(share: float, severity: str, measured: bool) -> None:
    rows = good_rows()
    for row in rows[: round(share * NUM_ROWS)]:
        row["codes"] = rows[0]["codes"]
    rows = rows if measured else [row | {"measures": None} for row in rows]
    finding = found(rows)["duplicate_codes"]
    assert (finding.severity, finding.num_rows) == (severity, round(share * NUM_ROWS))
    assert finding.examples[0] == (2, "same codes as line 1")


def test_equal_audio_may_have_equal_codes() -> None:
    rows = good_rows()
    rows[9] |= {"codes": rows[4]["codes"], "text": rows[4]["text"], "measures": rows[4]["measures"]}
    assert {"duplicate_audio", "duplicate_text"} <= set(found(rows)) and "duplicate_codes" not in found(rows)


# ----------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("share, severity", [(0.007, "info"), (0.1, "warning"), (0.7, "error")])
def test_frozen_codes(share: float, severity: str) -> None:
    rows = good_rows()
    for row in rows[: round(share * NUM_ROWS)]:
        row["codes"] = np.repeat(row["codes"][::4], 4, axis=0)[: len(row["codes"])]  # three of four frames stand still
    assert found(rows)["frozen_codes"].severity == severity


def test_dead_and_narrow_codebooks() -> None:
    rows = good_rows()
    for row in rows:
        row["codes"][:, 15] = 7
        row["codes"][:, 3] %= 20
    findings = found(rows)
    assert findings["dead_codebooks"].severity == "error" and findings["dead_codebooks"].message.endswith(": 15")
    assert (
        findings["narrow_codebooks"].severity == "warning"
        and ": 3 (the least 20)" in findings["narrow_codebooks"].message
    )


def test_code_counts_are_those_of_all_rows() -> None:
    rows = good_rows()
    figures = collect(rows)
    frames = np.concatenate([row["codes"] for row in rows])
    assert figures.code_counts[5].tolist() == np.bincount(frames[:, 5], minlength=2048).tolist()
    assert figures.code_counts.sum(axis=1).tolist() == [len(frames)] * 16
    rows[0]["codes"][:] = rows[0]["codes"][0]
    one = collect(rows[:1])
    assert one.entries_effective() == pytest.approx(np.ones(16)) and one.entries_used().tolist() == [1] * 16


# ----------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    "addition, language, check, severity",
    [
        (" 1984", "English", "digits", "info"),
        (" <b>", "English", "unusual_characters", "warning"),
        (" 🎉", "English", "unusual_characters", "warning"),
        ("\ufffd", "English", "unusual_characters", "warning"),
        ("", "Russian", "script", "warning"),
    ],
)
def test_texts(addition: str, language: str, check: str, severity: str) -> None:
    rows = good_rows()
    for row in rows[3:6]:
        row |= {"text": row["text"] + addition, "language": language}
    findings = found(rows)
    assert set(findings) == {check}
    assert (findings[check].severity, findings[check].num_rows) == (severity, 3)
    assert [line for line, _ in findings[check].examples] == [4, 5, 6]


def test_a_row_with_two_defects_counts_once_and_examples_show_both_kinds() -> None:
    rows = good_rows()
    for row in rows[:6]:
        row["text"] += " <b>"
    rows[5]["text"] += " 🎉"
    finding = found(rows)["unusual_characters"]
    assert finding.num_rows == 6 and "(6)" in finding.message and "emoji or pictographs (1)" in finding.message
    assert (6, "U+1F389 PARTY POPPER") in finding.examples


# ------------------------------------------------------------------------------------------------------ not measured


def test_what_cannot_be_computed_is_said_once_and_not_judged() -> None:
    rows = [row | {"measures": None, "codes": None} for row in good_rows()]
    findings = found(rows)
    assert set(findings) == {"not_measured"}
    assert "150 have no audio figures and 150 have no codes" in findings["not_measured"].message
    raw = [row | {"num_codec_frames": None} for row in rows]
    assert set(found(raw)) == {"not_measured"}


def test_foreign_measures_are_no_measures() -> None:
    rows = good_rows()
    for row, foreign in zip(
        rows, ["yes", 5, [], {"snr_db": "high", "audio_hash": 12}, {"seconds": True}], strict=False
    ):
        row["measures"] = foreign
    assert "5 have no audio figures" in found(rows)["not_measured"].message


def test_no_rows_at_all() -> None:
    assert find_problems(collect([])) == []


def test_order_is_by_severity_then_rows() -> None:
    rows = good_rows()
    for row in rows:
        row["codes"][:, 15] = 7
    for row in rows[:30]:
        row["measures"] |= {"clipped_share": 0.1, "peak_db": 0.0}
    for row in rows[:20]:
        row["measures"] |= {"dc_offset": 0.1}
    assert list(found(rows)) == ["dead_codebooks", "clipping", "dc_offset", "full_scale"]


def test_memory_is_about_a_hundred_bytes_a_row() -> None:
    def many(num_rows: int) -> Iterator[dict[str, Any]]:
        template = good_rows(1)[0]
        for line in range(num_rows):
            yield template | {"line": line, "text": f"sentence {line}", "codes": template["codes"].copy()}

    collect(many(10))
    tracemalloc.start()
    try:
        figures = collect(many(20_000))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 20_000 * 150 and figures.num_rows == 20_000
    assert figures.columns["line"].tolist() == list(range(20_000))


# ---------------------------------------------------------------------------------------------------------- voices


def voices(num_clips: int, spread: float, seed: int = 0, width: int = 64) -> np.ndarray:
    """Vectors of one voice; ``seed`` chooses the voice."""
    random = np.random.default_rng(seed)
    return (random.standard_normal(width) + spread * random.standard_normal((num_clips, width))).astype(np.float32)


def by_line(vectors: np.ndarray, first: int = 1) -> dict[int, np.ndarray]:
    return dict(enumerate(vectors, first))


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.5])
def test_a_clip_of_somebody_else_is_found(spread: float) -> None:
    vectors = by_line(voices(100, spread))
    speakers = dict.fromkeys(range(1, 102), "anna")
    assert similarity_findings(vectors, speakers, []) == []
    (finding,) = similarity_findings(vectors | {101: voices(1, 0.0, seed=5)[0]}, speakers, [])
    assert (finding.check, finding.num_rows) == ("speaker_outliers", 1)
    others, outlier = np.stack(list(vectors.values())).astype(float), voices(1, 0.0, seed=5)[0].astype(float)
    mean = (others / np.linalg.norm(others, axis=1, keepdims=True)).sum(axis=0)  # without the outlier itself
    cosine = mean @ outlier / np.linalg.norm(mean) / np.linalg.norm(outlier)
    assert finding.examples[0][0] == 101 and finding.examples[0][1].startswith(f"cosine {cosine:.3f}, usually ")


def test_a_tight_cluster_does_not_fire_on_noise() -> None:
    vectors = voices(50, 1e-4)
    vectors[7] += 30 * (voices(1, 1e-4)[0] - vectors[7])
    assert similarity_findings(by_line(vectors), dict.fromkeys(range(1, 51), "anna"), []) == []


def reference(
    speaker: str, vector: np.ndarray, path: str = "a.wav", line: int = 1, num_rows: int = 30
) -> ReferenceVoice:
    return ReferenceVoice(speaker, path, line, num_rows, vector)


def test_few_clips_are_not_judged_which_is_said() -> None:
    vectors = np.concatenate([voices(6, 0.1), voices(1, 0.1, seed=5)])
    speakers = dict.fromkeys(range(1, 8), "anna")
    (finding,) = similarity_findings(by_line(vectors), speakers, [reference("anna", vectors[-1])])
    assert (finding.check, finding.severity, finding.num_rows) == ("voices_not_judged", "info", 7)
    assert finding.message == 'voices of "anna" were not judged: fewer than 8 clips'
    many = {line: f"s{line}" for line in range(1, 8)}
    (finding,) = similarity_findings(by_line(vectors[:-1]), many, [])  # nothing of s7 could be heard
    assert 'voices of "s1", "s2", "s3", "s4", "s5" and 2 others were' in finding.message


def test_a_reference_of_another_voice_is_found() -> None:
    vectors = by_line(voices(30, 0.3)) | by_line(voices(30, 0.3, seed=5), first=31)
    speakers = {line: "anna" if line <= 30 else "bert" for line in range(1, 61)}
    anna, bert = voices(31, 0.3)[30], voices(31, 0.3, seed=5)[30]
    right = [reference("anna", anna), reference("bert", bert, "b.wav", 31, 20)]
    assert similarity_findings(vectors, speakers, right) == []
    wrong = reference("bert", anna, "second.wav", 40, 10)
    (finding,) = similarity_findings(vectors, speakers, [*right, wrong])
    assert (finding.check, finding.severity, finding.num_rows) == ("reference_voice", "warning", 10)
    assert 'second.wav of "bert"' in finding.message and [line for line, _ in finding.examples] == [40]
    (finding,) = similarity_findings(vectors, speakers, [*right, wrong, reference("anna", bert, num_rows=3)])
    assert finding.message.startswith("2 references do not sound like") and finding.num_rows == 13


def test_voices_of_the_demo_with_the_random_encoder(demo: list[dict[str, Any]]) -> None:
    """Its cosines are all near 1, so only relative distances can tell; noise is told even so."""
    import torch

    from finetuning.stock import import_qwen_tts
    from finetuning.tiny_model import embedded_model_folder

    folder = str(embedded_model_folder("tiny-random"))
    model = import_qwen_tts().Qwen3TTSModel.from_pretrained(folder, dtype=torch.float32, device_map="cpu").model

    def vector(waveform: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model.extract_speaker_embedding(waveform, 24_000).float().numpy()

    vectors = {row["line"]: vector(load_audio(row["audio"])) for row in demo}
    speakers = dict.fromkeys([*vectors, 99], "english_voice")
    voice = reference("english_voice", vector(load_audio(VOICE / "english_voice.wav")))
    assert similarity_findings(vectors, speakers, [voice]) == []
    hiss = vector((0.1 * np.random.default_rng(0).standard_normal(48_000)).astype(np.float32))
    findings = similarity_findings(vectors | {99: hiss}, speakers, [reference("english_voice", hiss)])
    assert {finding.check for finding in findings} == {"speaker_outliers", "reference_voice"}
