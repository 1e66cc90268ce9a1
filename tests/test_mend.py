"""Mending writes new clips and new rows, and touches nothing that was there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import VOICE

from finetuning.audio import load_audio
from finetuning.errors import UserError
from finetuning.manifest import Row, RowFormat, Tally, read_rows
from finetuning.mend import MendSummary, mend
from finetuning.quality import loudness_lufs, silent_edges_seconds

CODES = [[1] * 16] * 20


@pytest.fixture
def clip() -> np.ndarray:
    return 0.5 * load_audio(VOICE / "clips" / "train_16.flac")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Writes clips and their rows."""

    def write(*clips: np.ndarray, rate_hz: int = 24_000, kind: str = "wav", subtype: str = "PCM_16") -> list[dict]:
        rows = []
        for number, samples in enumerate(clips, 1):
            soundfile.write(tmp_path / f"clip{number}.{kind}", samples, rate_hz, subtype=subtype)
            known = {"audio_codes": CODES, "codes_source": {"codec": "x"}, "measures": {"snr_db": 3}}
            rows.append({"audio": f"clip{number}.{kind}", "text": f"Text {number}.", "mood": "calm"} | known)
        return rows

    return write


@pytest.fixture
def run(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Callable[..., tuple[MendSummary, list[dict[str, Any]]]]:
    def mended(rows: list[dict], output: str = "mended.jsonl", **options: Any) -> tuple[MendSummary, list[dict]]:
        summary = mend(read(write_jsonl(rows)), tmp_path / output, RowFormat(), **options)
        return summary, [json.loads(line) for line in (tmp_path / output).read_text("utf-8").splitlines()]

    return mended


def read(jsonl: Path) -> Iterator[Row]:
    return read_rows(jsonl, "TRAIN_JSONL", RowFormat(), Tally(), needs_codes=False)


def silence(seconds: float, rate_hz: int = 24_000) -> np.ndarray:
    return np.zeros(round(seconds * rate_hz), np.float32)


# ----------------------------------------------------------------------------------------------------------- rows


def test_nothing_asked_for_changes_nothing(make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path) -> None:
    rows = make(clip, clip)
    summary, mended = run(rows)
    assert mended == rows and summary.num_changed == 0
    assert not (tmp_path / "mended_audio").exists()


def test_changed_rows_lose_what_was_known_of_their_audio(make: Callable, run: Callable, clip: np.ndarray) -> None:
    rows = make(clip, np.concatenate([silence(1), clip]))
    summary, mended = run(rows, trim_silence=True)
    assert mended[0] == rows[0]
    assert mended[1] == {"audio": "mended_audio/000002.flac", "text": "Text 2.", "mood": "calm"}
    assert (summary.num_rows, summary.num_changed, summary.num_trimmed, summary.num_scaled) == (2, 1, 1, 0)
    assert summary.seconds_removed == pytest.approx(0.85, abs=0.05)


def test_the_result_can_be_read_and_trained_on(make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path) -> None:
    run(make(clip, np.concatenate([silence(1), clip])), trim_silence=True)
    rows = list(read(tmp_path / "mended.jsonl"))
    assert [row.audio.name for row in rows] == ["clip1.wav", "000002.flac"]
    assert rows[1].codes is None


def test_dropped_rows_are_left_out_in_order(make: Callable, run: Callable, clip: np.ndarray) -> None:
    summary, mended = run(make(*[clip] * 4), drop_lines={2, 3})
    assert [row["text"] for row in mended] == ["Text 1.", "Text 4."]
    assert (summary.num_rows, summary.num_dropped) == (4, 2)


def test_paths_stay_right_from_another_folder(make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path) -> None:
    rows = make(clip, np.concatenate([silence(1), clip]))
    rows[1]["ref_audio"] = "clip1.wav"
    _, mended = run(rows, output="elsewhere/new.jsonl", trim_silence=True)
    assert mended[0]["audio"] == mended[1]["ref_audio"] == str(tmp_path / "clip1.wav")
    assert (tmp_path / "elsewhere" / mended[1]["audio"]).is_file()


# ---------------------------------------------------------------------------------------------------------- audio


@pytest.mark.parametrize("rate_hz", [16_000, 24_000, 44_100])
@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_trimming_keeps_the_speech_the_rate_and_a_margin(
    make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path, kind: str, rate_hz: int
) -> None:
    """The same samples, a stretch of them: the speech is in it whole."""
    original = np.concatenate([silence(1.2, rate_hz), clip, silence(2, rate_hz)])
    _, mended = run(make(original, rate_hz=rate_hz, kind=kind), trim_silence=True)
    before, _ = soundfile.read(tmp_path / f"clip1.{kind}")
    after, rate = soundfile.read(tmp_path / mended[0]["audio"])
    assert rate == rate_hz
    speech_start, speech_stop = 1.2 * rate_hz, 1.2 * rate_hz + len(clip)
    start = next(
        shift
        for shift in range(int(speech_start) - rate_hz // 2, int(speech_start))
        if np.array_equal(before[shift:][: len(after)], after)
    )
    assert start < speech_start and start + len(after) > speech_stop
    assert (speech_start - start) / rate_hz == pytest.approx(0.15, abs=0.06)
    assert (start + len(after) - speech_stop) / rate_hz == pytest.approx(0.15, abs=0.12)


def test_no_speech_is_cut_from_noisy_clips(make: Callable, run: Callable, tmp_path: Path) -> None:
    """Whatever is cut away holds noise alone."""
    random = np.random.default_rng(0)
    speech = [load_audio(path) for path in sorted((VOICE / "clips").glob("*.flac"))[:10]]
    noisy = [np.pad(clip, 24_000) + 0.003 * random.standard_normal(len(clip) + 48_000) for clip in speech]
    summary, mended = run(make(*noisy), trim_silence=True)
    assert summary.num_trimmed == 10
    for clip, row in zip(speech, mended, strict=True):
        seconds = soundfile.info(tmp_path / row["audio"]).duration
        assert seconds == pytest.approx(len(clip) / 24_000 + 0.3, abs=0.25)
        assert min(silent_edges_seconds(load_audio(tmp_path / row["audio"]))) >= 0.1


@pytest.mark.parametrize("target", [-30.0, -23.0])
def test_loudness_is_reached(make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path, target: float) -> None:
    summary, mended = run(make(0.3 * clip, 0.9 * clip), target_loudness_lufs=target)
    assert (summary.num_scaled, summary.num_limited) == (2, 0)
    for row in mended:
        assert loudness_lufs(load_audio(tmp_path / row["audio"])) == pytest.approx(target, abs=0.02)


def test_the_peak_limits_the_loudness(make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path) -> None:
    summary, mended = run(make(clip), target_loudness_lufs=-10)
    assert (summary.num_scaled, summary.num_limited) == (1, 1)
    samples, _ = soundfile.read(tmp_path / mended[0]["audio"])
    assert 20 * np.log10(np.abs(samples).max()) == pytest.approx(-1.0, abs=0.01)


def test_stereo_and_depth_are_kept(make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path) -> None:
    stereo = np.stack([clip, 0.2 * clip], axis=1)
    _, mended = run(make(stereo, rate_hz=48_000, subtype="PCM_24"), target_loudness_lufs=-30)
    before, _ = soundfile.read(tmp_path / "clip1.wav")
    after, rate = soundfile.read(tmp_path / mended[0]["audio"])
    assert (after.shape, rate) == (before.shape, 48_000)
    gain = np.abs(after).max() / np.abs(before).max()
    assert np.abs(after - gain * before).max() < 4 / 2**23


def test_floats_beyond_full_scale_are_not_cut_off(
    make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path
) -> None:
    loud = np.concatenate([silence(1), 4 * clip])
    _, mended = run(make(loud, subtype="FLOAT"), trim_silence=True)
    samples, _ = soundfile.read(tmp_path / mended[0]["audio"])
    assert np.abs(samples).max() == pytest.approx(1.0, abs=1e-4) and (np.abs(samples) > 0.999).sum() < 5


def test_clip_at_the_target_keeps_its_file(make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path) -> None:
    _, mended = run(make(clip), target_loudness_lufs=-30)
    (tmp_path / "again").mkdir()
    summary = mend(read(tmp_path / "mended.jsonl"), tmp_path / "again.jsonl", RowFormat(), target_loudness_lufs=-30)
    assert summary.num_changed == 0
    assert json.loads((tmp_path / "again.jsonl").read_text())["audio"] == mended[0]["audio"]


def test_rows_without_readable_audio_are_kept_and_reported(
    make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path
) -> None:
    rows = make(clip, clip, clip, clip)
    (tmp_path / "clip2.wav").write_bytes(b"no audio")
    del rows[2]["audio"]
    rows[3]["audio"] = "gone.wav"
    summary, mended = run(rows, target_loudness_lufs=-30)
    assert mended[1:] == rows[1:] and summary.num_changed == 1
    assert [line for line, _ in summary.problems] == [2, 3, 4] and summary.num_unmended == 3
    assert "line 4" in str(summary) and "3 without readable audio" in str(summary)


# --------------------------------------------------------------------------------------------------------- safety


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_originals_are_never_touched(make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path) -> None:
    rows = make(np.concatenate([silence(1), clip]))
    before = snapshot(tmp_path)
    run(rows, trim_silence=True, target_loudness_lufs=-30)
    after = snapshot(tmp_path)
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"train.jsonl", "mended.jsonl", "mended_audio/000001.flac"}


@pytest.mark.parametrize("existing", ["train.jsonl", "train_audio/000001.flac"])
def test_its_own_input_and_other_files_are_not_overwritten(
    make: Callable, write_jsonl: Callable[..., Path], clip: np.ndarray, tmp_path: Path, existing: str
) -> None:
    source = write_jsonl(make(clip), "train.jsonl" if existing == "train.jsonl" else "source.jsonl")
    (tmp_path / existing).parent.mkdir(exist_ok=True)
    (tmp_path / existing).touch()
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="exists; mended data goes to new files only"):
        mend(read(source), tmp_path / "train.jsonl", RowFormat(), target_loudness_lufs=-30)
    assert snapshot(tmp_path) == before


def test_a_failure_leaves_nothing_behind(
    make: Callable, write_jsonl: Callable[..., Path], clip: np.ndarray, tmp_path: Path
) -> None:
    source = write_jsonl(make(clip, clip))

    def breaking() -> Iterator[Row]:
        yield from read(source)
        raise KeyboardInterrupt

    before = snapshot(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        mend(breaking(), tmp_path / "mended.jsonl", RowFormat(), target_loudness_lufs=-30)
    assert snapshot(tmp_path) == before and not list(tmp_path.glob("mended*"))


def test_leftovers_of_a_killed_run_are_not_mixed_in(
    make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "mended_audio.tmp").mkdir()
    (tmp_path / "mended_audio.tmp" / "000099.flac").touch()
    run(make(clip), target_loudness_lufs=-30)
    assert [path.name for path in (tmp_path / "mended_audio").iterdir()] == ["000001.flac"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"drop_lines": {1, 2}}, "would have no rows"),
        ({"target_loudness_lufs": 3.0}, "3 LUFS is not speech; choose one from -50 to -8"),
    ],
)
def test_requests_that_make_no_sense(
    make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(make(clip, clip), **options)
    assert not list(tmp_path.glob("mended*"))


def test_output_that_cannot_be_written(make: Callable, run: Callable, clip: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*mended\.jsonl"):
        run(make(clip), output="file/mended.jsonl", trim_silence=True)
