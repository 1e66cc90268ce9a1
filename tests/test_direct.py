"""DATA_MODE=direct: what is known before the first step, and a run over the stream."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import VOICE
from datasets_for_tests import Clip, write_audiofolder, write_parquet
from fakes import FakeCodec, fake_codes
from training import FULL, build, make_trainer

from finetuning.audio import load_audio
from finetuning.direct import (
    DirectData,
    DirectRows,
    first_rows_of_speakers,
    held_out_rows,
    rows_at,
)
from finetuning.errors import UserError
from finetuning.manifest import RowFormat
from finetuning.prepare import DatasetRows
from finetuning.processes import Processes
from finetuning.source import ColumnNames, open_split

MakeData = Callable[..., DirectData]


@pytest.fixture(autouse=True)
def own_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen references go to ./voices."""
    monkeypatch.chdir(tmp_path)


class LongClip(Clip):
    """Noise of a given length; quiet stretches make it cleaner."""

    def __init__(self, seed: int, seconds: float, pauses: bool = True) -> None:
        samples = np.random.default_rng(seed).normal(0, 0.1, round(seconds * 24_000))
        if pauses:
            samples *= np.where(np.arange(len(samples)) // 6_000 % 2, 1.0, 0.001)
        stream = io.BytesIO()
        soundfile.write(stream, samples, 24_000, format="WAV")
        self.content, self.name = stream.getvalue(), f"{seed}.wav"


def sentences(count: int) -> list[dict[str, Any]]:
    return [{"audio": Clip(number), "text": f"Sentence {number}."} for number in range(count)]


def write_dataset(folder: Path, num_rows: int = 25, **splits: int) -> Path:
    """A train split of ``num_rows`` and further splits; their clips and texts are distinct."""
    first = 0
    for split, count in {"train": num_rows, **splits}.items():
        rows = [{"audio": Clip(first + n), "text": f"{split} {n}."} for n in range(count)]
        write_parquet(folder, rows, split)
        first += count
    return folder


@pytest.fixture
def make_data(make_settings: Callable, codec_folder: Path, fake: FakeCodec, tmp_path: Path) -> MakeData:
    def make(folder: Path, **fields: Any) -> DirectData:
        row_format = RowFormat(speaker_key=fields.get("speaker_column", "speaker"))
        settings = make_settings(
            **({"ref_audio_path": VOICE / "clips" / "train_05.flac"} | direct_fields(folder, **fields))
        )
        return DirectData(settings, codec_folder, row_format, "cpu", Processes())

    return make


def direct_fields(folder: Path, **fields: Any) -> dict[str, Any]:
    return {"data_mode": "direct", "dataset_name": str(folder), "codes_cache_dir": Path("cache")} | fields


def opened(data: DirectData) -> DirectRows:
    return data.open(data.prepare())


def streamed(rows: DirectRows, epoch: int = 0) -> list[int]:
    return sorted(row.index for row in rows.stream.iterate(epoch) if row is not None)


# ------------------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("num_rows", [20, 21, 100, 641, 1000, 12_345, 600_000])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3])
def test_held_out_rows(num_rows: int, fraction: float) -> None:
    rows = held_out_rows(num_rows, fraction, 1000, 7)
    assert len(rows) == min(max(1, round(fraction * num_rows)), 1000)
    assert np.array_equal(rows, np.unique(rows)) and rows[0] >= 0 and rows[-1] < num_rows
    assert np.array_equal(rows, held_out_rows(num_rows, fraction, 1000, 7))
    if num_rows > 100:
        assert not np.array_equal(rows, held_out_rows(num_rows, fraction, 1000, 8))


def test_held_out_rows_of_a_large_split_lie_together_and_everywhere() -> None:
    rows = held_out_rows(600_000, 0.05, 1000, 0)
    assert len(set((rows // 32).tolist())) <= 1000 // 32 + 1
    assert rows.min() < 100_000 and rows.max() > 500_000


def test_none_are_held_out_where_there_are_few_or_none_are_wanted() -> None:
    assert len(held_out_rows(19, 0.5, 1000, 0)) == len(held_out_rows(500, 0.0, 1000, 0)) == 0
    assert len(held_out_rows(500, 0.1, 3, 0)) == 3


# ------------------------------------------------------------------------------------------------ rows of speakers


def dataset_rows(folder: Path, speaker: str | None = None, max_rows: int | None = None) -> DatasetRows:
    names = ColumnNames(speaker=speaker)
    row_format = RowFormat(speaker_key=speaker or "speaker", default_speaker="nobody")
    return DatasetRows(open_split(str(folder), "train", names), row_format, "codec", max_rows)


def test_first_rows_of_speakers(tmp_path: Path) -> None:
    speakers = ["Bea", "Ada", None, "Bea", "a|b", "Bea", "Ada", "Bea"]
    folder = write_parquet(tmp_path / "set", sentences(8), who=speakers)
    first = first_rows_of_speakers(dataset_rows(folder, "who"), 3)
    expected = {"Bea": [0, 3, 5], "Ada": [1, 6], "nobody": [2]}
    assert {name: first[name] for name in expected} == expected
    assert list(first)[:3] == list(expected)
    assert first_rows_of_speakers(dataset_rows(folder, "who", 2), 3) == {"Bea": [0], "Ada": [1]}
    assert first_rows_of_speakers(dataset_rows(folder), 3) == {"nobody": [0, 1, 2]}
    assert first_rows_of_speakers(dataset_rows(folder, max_rows=2), 3) == {"nobody": [0, 1]}


def test_speakers_that_are_numbers(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set", sentences(3), who=[7, 9, 7])
    assert first_rows_of_speakers(dataset_rows(folder, "who"), 3) == {"7": [0, 2], "9": [1]}


def test_speakers_that_differ_in_case_only(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set", sentences(3), who=["Ada", "Bea", "ada"])
    with pytest.raises(UserError, match=r'"Ada" .* line 1\) and "ada" .* line 3'):
        first_rows_of_speakers(dataset_rows(folder, "who"), 3)


def test_rows_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.direct.CHUNK_ROWS", 4)
    split = open_split(str(write_parquet(tmp_path / "set", sentences(25))), "train")
    for indices in ([], [0], [24], [3, 4, 7, 8, 20, 24], [8, 3]):
        rows = list(rows_at(split, indices))
        assert [row.index for row in rows] == sorted(indices)
        assert [row.text for row in rows] == [f"Sentence {index}." for index in sorted(indices)]


# ------------------------------------------------------------------------------------------------------- validation


def test_a_validation_split_is_encoded_and_none_is_held_out(make_data: MakeData, tmp_path: Path) -> None:
    rows = opened(make_data(write_dataset(tmp_path / "set", 25, validation=4)))
    assert [row["text"] for row in rows.validation] == [f"validation {n}." for n in range(4)]
    expected = fake_codes(load_audio(Clip(26).content))
    assert np.array_equal(rows.validation[1]["codes"], expected)
    assert streamed(rows) == list(range(25))


def test_the_validation_split_may_have_another_name(make_data: MakeData, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "set", 25, dev=3, validation=2)
    rows = opened(make_data(folder, validation_split="dev", max_eval_samples=2))
    assert [row["text"] for row in rows.validation] == ["dev 0.", "dev 1."]
    with pytest.raises(UserError, match='no split "exam"; it has: train, '):
        opened(make_data(folder, validation_split="exam"))


def test_rows_are_held_out_where_there_is_no_validation_split(
    make_data: MakeData, tmp_path: Path, fake: FakeCodec
) -> None:
    folder = write_dataset(tmp_path / "set", 40)
    data = make_data(folder, validation_fraction=0.1)
    rows = opened(data)
    held_out = [row["text"] for row in rows.validation]
    expected = held_out_rows(40, 0.1, 1000, data.settings.seed).tolist()
    assert held_out == [f"train {index}." for index in expected] and len(expected) == 4
    for epoch in (0, 1):
        assert streamed(rows, epoch) == sorted(set(range(40)) - set(expected))
    fake.take_num_clips()
    again = opened(make_data(folder, validation_fraction=0.1))
    assert fake.take_num_clips() == 0
    assert [row["text"] for row in again.validation] == held_out


def test_held_out_rows_of_other_settings_are_others(make_data: MakeData, tmp_path: Path) -> None:
    """A list from an earlier run must not be taken for this one's."""
    folder = write_dataset(tmp_path / "set", 40)
    for fields in ({"seed": 1}, {"seed": 2}, {"validation_fraction": 0.2}, {"max_eval_samples": 1}):
        rows = opened(make_data(folder, **fields))
        validation = {int(row["text"].split()[1][:-1]) for row in rows.validation}
        assert not validation & set(streamed(rows))
        assert len(validation) + len(streamed(rows)) == 40
    assert opened(make_data(folder, seed=1, validation_fraction=0.0)).validation is None


@pytest.mark.parametrize("fields, num_rows", [({"validation_fraction": 0.0}, 40), ({}, 19)])
def test_no_validation_rows(make_data: MakeData, tmp_path: Path, fields: dict, num_rows: int) -> None:
    rows = opened(make_data(write_dataset(tmp_path / "set", num_rows), **fields))
    assert rows.validation is None
    assert streamed(rows) == list(range(num_rows))


def test_a_held_out_row_that_cannot_be_used(make_data: MakeData, tmp_path: Path) -> None:
    """One bad row in twenty is few; that it is the held-out one must not stop the run."""
    probe = make_data(write_dataset(tmp_path / "good", 20))
    (held_out,) = probe._held_out().tolist()
    bad = sentences(20)
    bad[held_out]["audio"].content = b"nothing to hear"
    rows = opened(make_data(write_parquet(tmp_path / "bad", bad)))
    assert rows.validation is None
    assert len(streamed(rows)) == 19


def test_validation_rows_of_unknown_speakers_are_left_out(make_data: MakeData, tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set", sentences(6), who=["Ada"] * 3 + ["Bea"] * 3)
    write_parquet(folder, sentences(3), "validation", who=["Bea", "Cyd", "ADA"])
    rows = opened(make_data(folder, speaker_column="who"))
    assert [row["speaker"] for row in rows.validation] == ["Bea", "ADA"]


def test_max_train_samples(make_data: MakeData, tmp_path: Path) -> None:
    rows = opened(make_data(write_dataset(tmp_path / "set", 40), max_train_samples=25))
    validation = [int(row["text"].split()[1][:-1]) for row in rows.validation]
    assert sorted(streamed(rows) + validation) == list(range(25)) and validation


def test_a_split_of_unknown_length(make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MAX_TRAIN_SAMPLES says how many; rows that turn out not to be there are neither trained on nor held out."""
    folder = write_dataset(tmp_path / "set", 40)
    monkeypatch.setattr("finetuning.source.Split.num_rows", None)
    with pytest.raises(UserError, match="MAX_TRAIN_SAMPLES"):
        opened(make_data(folder))
    rows = opened(make_data(folder, max_train_samples=60, validation_fraction=0.5))
    validation = [int(row["text"].split()[1][:-1]) for row in rows.validation]
    assert sorted(streamed(rows) + validation) == list(range(40))


# ------------------------------------------------------------------------------------------------------- references


def test_the_given_reference_is_every_speaker_s(make_data: MakeData, tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set", sentences(4), who=["Ada", "Bea", "Ada", "Bea"])
    given = str((VOICE / "clips" / "train_05.flac").resolve())
    assert opened(make_data(folder, speaker_column="who")).references == {"Ada": [given], "Bea": [given]}
    with pytest.raises(UserError, match=r"REF_AUDIO_PATH: .*gone\.wav does not exist"):
        opened(make_data(folder, ref_audio_path=tmp_path / "gone.wav"))


@pytest.mark.parametrize("write", [write_parquet, write_audiofolder], ids=["embedded", "files"])
def test_references_are_chosen_from_the_clips(make_data: MakeData, tmp_path: Path, write: Callable) -> None:
    """Ada: the one clean clip of 5 to 10 s (row 2); Bea has short clips only: her longest one."""
    clips = [Clip(0), LongClip(1, 6.0, pauses=False), LongClip(2, 6.0), LongClip(3, 12.0), Clip(4), LongClip(5, 1.5)]
    for number, clip in enumerate(clips):
        clip.name = f"{number}.wav"
    rows = [{"audio": clip, "text": f"Sentence {number}."} for number, clip in enumerate(clips)]
    speakers = ["Ada", "Ada", "Ada", "Ada", "Bea", "Bea"]
    if write is write_parquet:
        folder = write_parquet(tmp_path / "set", rows, who=speakers)
    else:
        folder = write_audiofolder(tmp_path / "set", rows)
        metadata = folder / "train" / "metadata.csv"
        lines = metadata.read_text().splitlines()
        metadata.write_text("\n".join(f"{line},{who}" for line, who in zip(lines, ["who", *speakers], strict=True)))
    references = opened(make_data(folder, ref_audio_path=None, speaker_column="who")).references
    for speaker, row in (("Ada", 2), ("Bea", 5)):
        (reference,) = map(Path, references[speaker])
        assert reference.read_bytes() == clips[row].content
        assert reference.parent == tmp_path / "voices" / speaker
        assert reference.with_suffix(".txt").read_text() == f"Sentence {row}.\n"


def test_a_speaker_without_a_usable_clip_is_left_out(
    make_data: MakeData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sentences(30)
    for number in (4, 5):
        rows[number]["audio"].content = b"nothing to hear"
    speakers = ["Bea" if number in (4, 5) else "Ada" for number in range(30)]
    folder = write_parquet(tmp_path / "set", rows, who=speakers)
    rows = opened(make_data(folder, ref_audio_path=None, speaker_column="who"))
    assert list(rows.references) == ["Ada"]
    assert "1 speakers are left out" in capsys.readouterr().out


def test_no_usable_clip_at_all(make_data: MakeData, tmp_path: Path) -> None:
    rows = sentences(3)
    for row in rows:
        row["audio"].content = b"nothing to hear"
    with pytest.raises(UserError, match="can be used as a reference; set REF_AUDIO_PATH"):
        opened(make_data(write_parquet(tmp_path / "set", rows), ref_audio_path=None))
    assert not Path("voices").exists()


def test_rows_that_name_references_keep_them(make_data: MakeData, tmp_path: Path) -> None:
    clips = [VOICE / "clips" / f"train_{number:02}.flac" for number in (1, 2)]
    named = [str(clips[0]), str(clips[1]), str(clips[0])]
    folder = write_parquet(tmp_path / "set", sentences(3), ref_audio=named)
    assert opened(make_data(folder, ref_audio_path=None)).references == {"reference_speaker": [str(c) for c in clips]}
    assert not Path("voices").exists()


def test_no_reference_is_looked_for_where_the_base_needs_none(make_data: MakeData, tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set", sentences(3), who=["Ada", "Bea", "Ada"])
    data = make_data(folder, ref_audio_path=None, speaker_column="who")
    assert data.prepare(needs_references=False) == {"Ada": [], "Bea": []}
    assert not Path("voices").exists()


def test_shares_of_several_processes_hold_each_row_once(
    make_settings: Callable, codec_folder: Path, fake: FakeCodec, tmp_path: Path
) -> None:
    settings = make_settings(**direct_fields(write_dataset(tmp_path / "set", 41), validation_fraction=0.1))
    parts = [DirectData(settings, codec_folder, RowFormat(), "cpu", Processes(index, 3)) for index in range(3)]
    references = parts[0].prepare()
    rows = [part.open(references) for part in parts]
    held_out = {int(row["text"].split()[1][:-1]) for row in rows[2].validation}
    seen = [index for part in rows for index in streamed(part)]
    assert sorted([*seen, *held_out]) == list(range(41)) and len(held_out) == 4


# ------------------------------------------------------------------------------------------------------------- runs


def read_log(settings: Any, name: str = "training_log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (settings.output_dir / name).read_text().splitlines()]


@pytest.fixture
def run_settings(make_settings: Callable, tmp_path: Path) -> Callable[..., Any]:
    """A full fine-tuning of two epochs over 24 rows, of which two are held out."""

    def make(num_rows: int = 24, **fields: Any) -> Any:
        defaults = {
            "batch_size": 4, "gradient_accumulation_steps": 2, "num_epochs": 2, "logging_steps": 1,
            "validation_fraction": 0.1, "ref_audio_path": VOICE / "clips" / "train_05.flac",
        }  # fmt: skip
        return make_settings(**(FULL | defaults | direct_fields(write_dataset(tmp_path / "set", num_rows), **fields)))

    return make


def test_a_direct_run_trains_every_row_but_the_held_out_ones(
    run_settings: Callable, fake: FakeCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs: each clip is encoded once, each training row is trained on twice, a held-out row never."""
    settings = run_settings()
    run = build(settings)
    trained: list[list[int]] = []
    steps = type(run.train).steps

    def noted(self: Any, epoch: int, done: Any = ()) -> Any:
        trained.append([])
        for step in steps(self, epoch, done):
            trained[-1] += [line for batch in step.batches if batch["weight"] > 0 for line in batch["lines"].tolist()]
            yield step

    monkeypatch.setattr(type(run.train), "steps", noted)
    make_trainer(run).run()
    validation = {int(row["text"].split()[1][:-1]) + 1 for row in run.validation.manifest}
    assert len(validation) == 2
    assert [sorted(epoch) for epoch in trained] == [sorted(set(range(1, 25)) - validation)] * 2
    assert fake.take_num_clips() == 24
    records = read_log(settings)
    assert [record["step"] for record in records] == list(range(1, 7)) and run.num_steps == 6
    assert all(math.isfinite(record["loss"]) and record["loss"] > 0 for record in records)
    assert all(math.isfinite(record["loss"]) for record in read_log(settings, "validation_log.jsonl"))
    for name in ("best", "last"):
        assert (settings.output_dir / name / "model.safetensors").is_file()


def test_a_direct_run_speaks(run_settings: Callable, fake: FakeCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the speech rate of the held-out rows, so that no clip is encoded for it; cloned from the speaker's vector."""
    monkeypatch.setattr("finetuning.samples.SPARE_FRAMES", 4)
    settings = run_settings(num_epochs=1, sample_steps=99, eval_texts="Yes.", export_type="base")
    run = build(settings)
    make_trainer(run).run()
    assert fake.take_num_clips() == 24
    (record,) = read_log(settings, "validation_log.jsonl")
    assert record["metrics"]["num_samples"] == 1
    assert np.array_equal(run.requests[0].reference.vector, run.speakers.vectors[0])
    assert (settings.output_dir / "samples" / "step-3" / "samples.json").is_file()


def test_max_train_samples_sets_the_steps_of_a_direct_run(run_settings: Callable, fake: FakeCodec) -> None:
    settings = run_settings(max_train_samples=9, num_epochs=1, validation_fraction=0.0)
    run = build(settings)
    make_trainer(run).run()
    assert [record["step"] for record in read_log(settings)] == [1, 2]
    assert fake.take_num_clips() == 9


def test_a_step_whose_rows_are_all_bad(run_settings: Callable, fake: FakeCodec, tmp_path: Path) -> None:
    """Without a shuffle the 33rd row stands alone in the last step; when it cannot be used, no step is taken."""
    settings = run_settings(gradient_accumulation_steps=1, num_epochs=1, validation_fraction=0.0, shuffle_buffer_rows=0)
    rows = sentences(33)
    rows[32]["audio"].content = b"nothing to hear"
    write_parquet(tmp_path / "set", rows)
    run = build(settings)
    make_trainer(run).run()
    assert all(bool(weight.isfinite().all()) for weight in run.objective.parameters())
    records = read_log(settings)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert all(math.isfinite(record["loss"]) for record in records)
