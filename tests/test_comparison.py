"""COMPARE_JSONL: sentences before and after, beside their recordings, with stock qwen-tts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from finetuning import comparison
from finetuning.audio import load_audio
from finetuning.comparison import SETTING, _mean, check_speakers, rows_to_compare, table
from finetuning.errors import UserError


@pytest.fixture(scope="module")
def base() -> Any:
    from finetuning.base_model import resolve_base
    from finetuning.settings import load_settings

    return resolve_base(load_settings({"init_model_path": "tiny-random", "device": "cpu"}, environment={}))


def test_a_run_ends_with_the_comparison_and_a_complete_one_does_not_make_it_again(
    demo_rows: list[dict[str, Any]],
    write_jsonl: Callable[..., Path],
    make_settings: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import train

    held_out = [{key: row[key] for key in ("audio", "text")} for row in demo_rows[:2]]
    fields = {
        "train_jsonl": write_jsonl(demo_rows[2:6]), "compare_jsonl": write_jsonl(held_out, "compare.jsonl"),
        "max_steps": 1, "validation_fraction": 0, "resume": "auto",
    }  # fmt: skip
    heard: list[int] = []
    monkeypatch.setattr(
        comparison, "load_recognizer", lambda name, device: lambda clips: [heard.append(len(clips)) or ""]
    )
    settings = make_settings(**fields, asr_model=str(tmp_path))
    train.train(settings)
    folder = settings.output_dir / "comparison"
    record = json.loads((folder / "comparison.json").read_text())
    assert record["num_rows"] == 2 and list(record["figures"]) == ["coded", "before", "after"]
    for number, row in enumerate(held_out, 1):
        files = {way: folder / f"{number:02d}-{way}.wav" for way in ("recording", "coded", "before", "after")}
        assert all(soundfile.info(file).samplerate == 24_000 for file in files.values())
        assert np.allclose(load_audio(files["recording"]), load_audio(row["audio"]), atol=1e-4)
    coded = record["figures"]["coded"]
    assert coded["rate_ratio"] == pytest.approx(1, abs=0.25) and -1 <= coded["similarity"] <= 1
    assert coded["similarity_to_coded"] == pytest.approx(1) and coded["timbre_distance_to_coded_db"] == 0
    assert coded["wer"] == 1 and heard == [1] * 6  # nothing of what was said is understood
    printed = capsys.readouterr().out
    assert "2 sentences that were never trained on" in printed and "sounds off by" in printed
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    train.train(make_settings(**fields, asr_model=str(tmp_path)))
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == times


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Nobody heard the bell."}, "line 1: neither audio nor audio_codes"),
        ({"audio": "none.wav", "text": "Nobody heard the bell."}, "line 1: .*none.wav"),
        ({"audio_codes": [[1] * 16] * 2, "text": "Nobody heard the bell."}, "line 1: a comparison needs the recording"),
    ],
)
def test_a_row_that_cannot_be_compared_is_refused_with_its_line(
    row: dict[str, Any], message: str, base: Any, write_jsonl: Callable[..., Path], make_settings: Callable[..., Any]
) -> None:
    with pytest.raises(UserError, match=f"{SETTING}: (.|\\n)*{message}"):
        rows_to_compare(make_settings(compare_jsonl=write_jsonl([row], "compare.jsonl")), base)


def test_a_speaker_that_the_training_does_not_have_is_refused(
    base: Any, demo_rows: list[dict[str, Any]], write_jsonl: Callable[..., Path], make_settings: Callable[..., Any]
) -> None:
    rows = [
        {"audio": row["audio"], "text": row["text"], "speaker": name}
        for row, name in zip(demo_rows, "aB", strict=False)
    ]
    settings = make_settings(compare_jsonl=write_jsonl(rows, "compare.jsonl"))
    check_speakers(settings, base, ["A", "b"])
    with pytest.raises(UserError, match=rf'{SETTING}: .*line 2: the training has no speaker "B"; it has a'):
        check_speakers(settings, base, ["a"])


def test_a_missing_file_is_refused(base: Any, make_settings: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{SETTING}: .*none\.jsonl does not exist"):
        rows_to_compare(make_settings(compare_jsonl=tmp_path / "none.jsonl"), base)


def test_the_table_has_a_line_for_each_way_and_no_numbers_that_are_none() -> None:
    figures = {"before": {"similarity": 0.251, "f0_error": math.nan}, "after": {"similarity": 0.5, "f0_error": 0.031}}
    lines = table(figures).splitlines()
    assert [line.split() for line in lines[1:]] == [["before", "0.25", "–"], ["after", "0.50", "3%"]]
    assert _mean([1.0, math.nan, 2.0]) == 1.5 and math.isnan(_mean([math.nan]))
