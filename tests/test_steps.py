"""Steps of an epoch, mapped or streamed: each row once over all processes, and no process waits for another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain, islice, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets_for_tests import Clip, write_parquet
from fakes import FakeCodec, fake_codes
from training import build

from finetuning.audio import load_audio
from finetuning.base_model import load_tokenizer, resolve_base
from finetuning.dataset import Batch, RowEncoder, SkippedRow, Step, StepDataset, step_loader
from finetuning.draws import Draws
from finetuning.encoding import ClipEncoder
from finetuning.manifest import MIN_CODEC_FRAMES, RowFormat
from finetuning.prepare import DatasetRows
from finetuning.progress import Progress, total_steps
from finetuning.prompt import LayoutIds
from finetuning.row_index import Manifest, open_rows
from finetuning.sampling import Geometry, Part, StepSampler
from finetuning.settings import load_settings
from finetuning.source import open_split
from finetuning.steps import MappedSteps, StreamedSteps
from finetuning.stream import SplitStream
from finetuning.validation import Validator

NUM_ROWS = 37
MakeSteps = Callable[..., StreamedSteps]

pytestmark = pytest.mark.usefixtures("fake")


def sentences(count: int) -> list[dict[str, Any]]:
    return [{"audio": Clip(number), "text": f"Sentence {number}."} for number in range(count)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("set"), sentences(NUM_ROWS))


@pytest.fixture(scope="module")
def bad_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows, but lines 4, 12 and 37 cannot be used."""
    rows = sentences(NUM_ROWS)
    rows[3]["audio"].content = b"nothing to hear"
    rows[11]["text"] = " "
    rows[36]["audio"].content = b""
    return write_parquet(tmp_path_factory.mktemp("bad"), rows)


@pytest.fixture(scope="module")
def encoder() -> RowEncoder:
    base = resolve_base(load_settings({"init_model_path": "tiny-random", "device": "cpu"}, environment={}))
    speakers = {"reference_speaker": 0}
    return RowEncoder(load_tokenizer(base.folder), LayoutIds.from_config(base.config), speakers, {})


@pytest.fixture
def make_steps(dataset: Path, codec_folder: Path, encoder: RowEncoder, monkeypatch: pytest.MonkeyPatch) -> MakeSteps:
    """Steps over a shuffled stream in chunks of four rows."""
    monkeypatch.setattr("finetuning.prepare.CHUNK_ROWS", 4)
    monkeypatch.setattr("finetuning.stream.CHUNK_ROWS", 4)

    def make(
        process: int = 0,
        num_processes: int = 1,
        batch_size: int = 2,
        accumulation: int = 2,
        folder: Path = dataset,
        max_rows: int | None = None,
        **stream_options: Any,
    ) -> StreamedSteps:
        rows = DatasetRows(open_split(str(folder), "train"), RowFormat(), "codec", max_rows)
        options = {"seed": 3, "buffer_rows": 6, "share": process, "num_shares": num_processes} | stream_options
        stream = SplitStream(rows, ClipEncoder(codec_folder), **options)
        return StreamedSteps(stream, encoder, RowFormat(), batch_size, accumulation)

    return make


def lines_of(batches: Sequence[Batch]) -> list[int]:
    """Lines of the batches that count."""
    return [line for batch in batches if batch["weight"] > 0 for line in batch["lines"].tolist()]


def all_lines(steps: Iterable[Step]) -> list[int]:
    return [line for step in steps for line in lines_of(step.batches)]


def assert_same(steps: Sequence[Step], others: Sequence[Step]) -> None:
    for step, other in zip(steps, others, strict=True):
        assert step.skipped == other.skipped
        for batch, other_batch in zip(step.batches, other.batches, strict=True):
            assert batch.keys() == other_batch.keys()
            assert all(torch.equal(batch[name], other_batch[name]) for name in batch)


# --------------------------------------------------------------------------------------------------------- streamed


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size, accumulation", [(1, 1), (2, 3), (4, 2), (50, 1)])
@pytest.mark.parametrize("shares_chunks", [True, False])
def test_every_row_once_in_steps_of_equal_shape(
    make_steps: MakeSteps,
    monkeypatch: pytest.MonkeyPatch,
    num_processes: int,
    batch_size: int,
    accumulation: int,
    shares_chunks: bool,
) -> None:
    """37 rows divide by nothing; a window holds two steps, so there are several and a short last one."""
    monkeypatch.setattr("finetuning.steps.WINDOW_STEPS", 2)
    monkeypatch.setattr("finetuning.stream.MIN_CHUNKS_PER_SHARE", 1 if shares_chunks else 1000)
    runs = [make_steps(process, num_processes, batch_size, accumulation) for process in range(num_processes)]
    steps = [list(run.steps(0)) for run in runs]
    assert sorted(chain(*[lines_of(step.batches) for part in steps for step in part])) == list(range(1, NUM_ROWS + 1))
    assert {len(part) for part in steps} == {run.steps_per_epoch for run in runs} == {len(steps[0])}
    for together in zip(*steps, strict=True):
        assert len({len(step.batches) for step in together}) == 1
    sizes = [len(step.batches) for step in steps[0]]
    assert set(sizes[:-1]) <= {accumulation} and 0 < sizes[-1] <= accumulation
    assert all(len(batch["lines"]) <= batch_size for part in steps for step in part for batch in step.batches)
    assert {run.num_rows for run in runs} == {NUM_ROWS}
    assert runs[0].rows_per_step == batch_size * accumulation * num_processes


def test_weight_zero_only_where_rows_ran_out(make_steps: MakeSteps) -> None:
    """One row a batch: a share of 18 rows beside one of 19 has one dummy, and it is a sound batch."""
    parts = [[batch for step in make_steps(process, 2, 1, 1).steps(0) for batch in step.batches] for process in (0, 1)]
    weights = [[float(batch["weight"]) for batch in part] for part in parts]
    assert weights[0] == [1.0] * 19
    assert sorted(weights[1]) == [0.0] + [1.0] * 18
    dummy = parts[1][weights[1].index(0.0)]
    real = parts[0][0]
    assert dummy.keys() == real.keys() and {name: dummy[name].dtype for name in dummy} == {
        name: real[name].dtype for name in real
    }
    assert dummy["codes"].shape == (MIN_CODEC_FRAMES, 16) and dummy["frame_mask"].sum() == MIN_CODEC_FRAMES


def test_a_process_without_any_row_keeps_in_step(make_steps: MakeSteps) -> None:
    steps = [list(make_steps(process, 3, 2, 2, max_rows=1).steps(0)) for process in range(3)]
    assert [len(part) for part in steps] == [1, 1, 1]
    assert [lines_of(part[0].batches) for part in steps] == [[1], [], []]
    assert [float(batch["weight"]) for batch in steps[2][0].batches] == [0.0] * len(steps[0][0].batches)


def test_bad_rows_leave_their_places_empty(
    make_steps: MakeSteps, bad_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one step a window, each step holds what it holds without bad rows, less those."""
    monkeypatch.setattr("finetuning.steps.WINDOW_STEPS", 1)
    bad = {4, 12, 37}
    for process in (0, 1):
        expected = [set(lines_of(step.batches)) for step in make_steps(process, 2).steps(0)]
        assert bad & set(chain(*expected))
        steps = list(make_steps(process, 2, folder=bad_dataset).steps(0))
        assert [set(lines_of(step.batches)) for step in steps] == [lines - bad for lines in expected]
        untouched = make_steps(process, 2).steps(0)
        assert [len(step.batches) for step in steps] == [len(step.batches) for step in untouched]


def test_an_epoch_repeats_and_the_next_differs(make_steps: MakeSteps) -> None:
    steps = make_steps(1, 2)
    first, again, of_another_run = list(steps.steps(0)), list(steps.steps(0)), list(make_steps(1, 2).steps(0))
    assert_same(first, again)
    assert_same(first, of_another_run)
    second = list(steps.steps(1))
    assert sorted(all_lines(first)) == sorted(all_lines(second))
    assert [lines_of(step.batches) for step in first] != [lines_of(step.batches) for step in second]


def test_a_step_holds_the_rows_that_it_names(make_steps: MakeSteps, encoder: RowEncoder) -> None:
    """Codes and text ids of every row against the clip itself."""
    for batch in chain(*[step.batches for step in make_steps(batch_size=3).steps(0)]):
        taken = 0
        for position, line in enumerate(batch["lines"].tolist()):
            clip = Clip(line - 1)
            codes = fake_codes(load_audio(clip.content))
            row = {"text": f"Sentence {line - 1}.", "language": "Auto", "speaker": "reference_speaker"}
            ids = encoder.encode(row | {"instruct": None, "codes": codes})
            length = int(batch["attention_mask"][position].sum())
            assert batch["text_ids"][position, :length].tolist() == ids.text.tolist()
            assert batch["labels"][position, :length].tolist() == ids.labels.tolist()
            assert np.array_equal(batch["codes"][taken : taken + len(codes)].numpy(), codes)
            taken += len(codes)
        assert taken == len(batch["codes"])


def test_rows_are_grouped_by_length_inside_a_window(make_steps: MakeSteps) -> None:
    """All 37 rows fit into one window, so the micro-batches are runs of the sorted lengths, in another order."""
    steps = make_steps(batch_size=4, accumulation=2).steps(0)
    batches = list(chain(*[step.batches for step in steps]))
    frames = [sorted(batch["frame_mask"].sum(1).tolist()) for batch in batches]
    assert sorted(chain(*frames)) == list(chain(*sorted(frames)))
    assert frames != sorted(frames)


def test_texts_and_rows_for_messages(make_steps: MakeSteps, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one step a window, and time for the steps that are made ahead."""
    monkeypatch.setattr("finetuning.steps.WINDOW_STEPS", 1)
    steps = make_steps(batch_size=1, accumulation=1)
    for step in steps.steps(0):
        time.sleep(0.01)
        (line,) = lines_of(step.batches)
        assert steps.texts([line, 9999]) == {line: f"Sentence {line - 1}."}
    rows = make_steps(buffer_rows=0).rows(3)
    assert [row["text"] for row in rows] == ["Sentence 0.", "Sentence 1.", "Sentence 2."]
    assert all(row["codes"].shape[1] == 16 and row["instruct"] is None for row in rows)
    assert "37 training rows" in steps.describe() and "(train)" in steps.describe()


def test_rows_for_the_round_trip_skip_bad_ones(make_steps: MakeSteps, bad_dataset: Path) -> None:
    rows = make_steps(folder=bad_dataset, buffer_rows=0).rows(4)
    assert [row["line"] for row in rows] == [1, 2, 3, 5]


def test_held_out_rows_are_in_no_step(make_steps: MakeSteps) -> None:
    left_out = np.array([0, 9, 36])
    parts = [make_steps(process, 2, left_out=left_out) for process in (0, 1)]
    seen = [line for part in parts for line in all_lines(part.steps(0))]
    assert sorted(seen) == sorted(set(range(1, NUM_ROWS + 1)) - {1, 10, 37})
    assert {part.num_rows for part in parts} == {NUM_ROWS - 3}


# ---------------------------------------------------------------------------------- streamed, from inside an epoch


@pytest.mark.parametrize("shares_chunks", [True, False])
@pytest.mark.parametrize("num_processes, accumulation", [(1, 2), (2, 1)])
def test_an_epoch_goes_on_with_exactly_the_steps_that_are_left(
    make_steps: MakeSteps,
    bad_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_processes: int,
    accumulation: int,
    shares_chunks: bool,
) -> None:
    """At a window's end, inside one, and at the epoch's end, with rows that cannot be used."""
    monkeypatch.setattr("finetuning.manifest.MAX_BAD_SHARE", 0.5)
    monkeypatch.setattr("finetuning.steps.WINDOW_STEPS", 3)
    monkeypatch.setattr("finetuning.stream.MIN_CHUNKS_PER_SHARE", 1 if shares_chunks else 1000)
    for process in range(num_processes):
        steps = make_steps(process, num_processes, 2, accumulation, bad_dataset)
        untouched = list(steps.steps(1))
        assert len(untouched) == steps.steps_per_epoch == steps.num_steps(1)
        for num_steps in (1, 3, 4, len(untouched) - 1, len(untouched)):
            done = (Part(steps.geometry, 1), Part(steps.geometry, num_steps - 1))
            assert_same(list(steps.steps(1, done)), untouched[num_steps:])
            assert steps.num_steps(1, done) == len(untouched) - num_steps


GEOMETRIES = [Geometry(1, 2, 1), Geometry(2, 1, 2), Geometry(1, 1, 3)]


@pytest.mark.parametrize("shares_chunks, window_steps", [(True, 3), (False, 2)])
@pytest.mark.parametrize("first, second", permutations(GEOMETRIES, 2))
def test_no_row_twice_and_none_lost_when_the_geometry_changes(
    make_steps: MakeSteps,
    bad_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: Geometry,
    second: Geometry,
    shares_chunks: bool,
    window_steps: int,
) -> None:
    """Each part is what a run of that geometry would do from there, and ends inside a window or at its end."""
    monkeypatch.setattr("finetuning.manifest.MAX_BAD_SHARE", 0.5)
    monkeypatch.setattr("finetuning.steps.WINDOW_STEPS", window_steps)
    monkeypatch.setattr("finetuning.stream.MIN_CHUNKS_PER_SHARE", 1 if shares_chunks else 1000)
    done: list[Part] = []
    lines: list[int] = []
    for geometry, num_steps in ((first, 2), (second, 1), (first, 1), (first, 1), (second, 1000)):
        shape = (geometry.num_processes, geometry.batch_size, geometry.accumulation)
        runs = [make_steps(process, *shape, bad_dataset, 22) for process in range(geometry.num_processes)]
        steps = [list(islice(run.steps(1, done), num_steps)) for run in runs]
        assert {len(part) for part in steps} == {min(num_steps, run.num_steps(1, done)) for run in runs}
        lines += [line for part in steps for line in all_lines(part)]
        done.append(Part(geometry, num_steps))
    assert sorted(lines) == sorted(set(range(1, 23)) - {4, 12})


def test_only_what_the_current_window_needs_is_encoded(
    make_steps: MakeSteps, fake: FakeCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the split's order, windows of two steps of four rows: step 7 begins in row 24, so 13 of 37 rows are left."""
    monkeypatch.setattr("finetuning.steps.WINDOW_STEPS", 2)
    steps = make_steps(buffer_rows=0)
    untouched = list(steps.steps(0))
    assert fake.take_num_clips() == NUM_ROWS
    assert_same(list(steps.steps(0, (Part(steps.geometry, 7),))), untouched[7:])
    assert fake.take_num_clips() == NUM_ROWS - 24


def test_the_fingerprint_is_that_of_the_rows(make_steps: MakeSteps, bad_dataset: Path) -> None:
    fingerprint = make_steps().fingerprint()
    assert make_steps(1, 3, 4, 1, buffer_rows=0).fingerprint() == fingerprint
    others = [make_steps(max_rows=36), make_steps(left_out=np.array([3])), make_steps(folder=bad_dataset)]
    assert len({fingerprint, *[other.fingerprint() for other in others]}) == 4


def test_damaged_rows_of_a_stream_are_left_out_and_listed(
    make_steps: MakeSteps, fake: FakeCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line 4 has a code that no table has, line 9 a speaker that is none: as from a damaged cache."""
    steps = make_steps(batch_size=2, accumulation=2)
    untouched = list(steps.steps(0))
    iterate = SplitStream.iterate

    def damaging(*args: Any) -> Any:
        for row in iterate(*args):
            if row.index == 3:
                row.codes[1, 2] = 3000
            yield replace(row, record=row.record | {"speaker": 1.5}) if row.index == 8 else row

    monkeypatch.setattr(SplitStream, "iterate", damaging)
    found = list(steps.steps(0))
    assert sorted(row.line for step in found for row in step.skipped) == [4, 9]
    reasons = {row.line: row.reason for step in found for row in step.skipped}
    assert "out of range: " in reasons[4] and reasons[9] == "speaker must be a string"
    assert sorted(all_lines(found)) == sorted(set(all_lines(untouched)) - {4, 9})
    assert [len(step.batches) for step in found] == [len(step.batches) for step in untouched]
    assert [row["line"] for row in make_steps(buffer_rows=0).rows(9)] == [1, 2, 3, 4, 5, 6, 7, 8, 10]


def test_steps_are_not_all_made_ahead(make_steps: MakeSteps, fake: FakeCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-pressure: who takes one step has not had the whole epoch encoded."""
    monkeypatch.setattr("finetuning.steps.WINDOW_STEPS", 1)
    steps = make_steps(batch_size=1, accumulation=1, buffer_rows=0).steps(0)
    next(steps)
    steps.close()
    assert fake.take_num_clips() < NUM_ROWS / 2


# ----------------------------------------------------------------------------------------------------------- mapped


@pytest.mark.parametrize("num_workers", [0, 1])
def test_mapped_steps_are_those_of_sampler_and_loader(
    encoder: RowEncoder, write_jsonl: Callable[..., Path], num_workers: int
) -> None:
    generator = np.random.default_rng(0)
    codes = [generator.integers(0, 2048, (4 + number * 5 % 13, 16)).tolist() for number in range(11)]
    jsonl = write_jsonl([{"text": f"Sentence {number}.", "audio_codes": rows} for number, rows in enumerate(codes)])
    manifest = open_rows(jsonl, RowFormat(), "TRAIN_JSONL")
    dataset = StepDataset(manifest, encoder)
    sampler = StepSampler(manifest.column("num_codec_frames"), 2, 2, 2, seed=5)
    for process in (0, 1):
        steps = MappedSteps(dataset, sampler, process, num_workers)
        for epoch in (0, 1):
            expected = list(step_loader(dataset, sampler.epoch_plan(epoch, process)))
            assert_same(list(steps.steps(epoch)), expected)
        assert steps.steps_per_epoch == sampler.steps_per_epoch == 2 and steps.rows_per_step == 8
    assert steps.num_rows == 11 and "11 training rows" in steps.describe()
    assert [row["text"] for row in steps.rows(2)] == ["Sentence 0.", "Sentence 1."] and len(steps.rows(50)) == 11
    assert steps.texts([3, 11, 99]) == {3: "Sentence 2.", 11: "Sentence 10."}
    assert steps.geometry == sampler.geometry == Geometry(2, 2, 2)
    assert steps.fingerprint() == manifest.content_hash()
    done = (Part(steps.geometry, 1),)
    assert_same(list(steps.steps(1, done)), list(steps.steps(1))[1:])
    assert steps.num_steps(1, done) == 1


def test_mapped_steps_by_frames(encoder: RowEncoder, write_jsonl: Callable[..., Path]) -> None:
    """Two processes; the rows have 4 to 16 frames, 110 altogether."""
    codes = [[[number] * 16] * (4 + number * 5 % 13) for number in range(11)]
    jsonl = write_jsonl([{"text": f"Sentence {number}.", "audio_codes": rows} for number, rows in enumerate(codes)])
    manifest = open_rows(jsonl, RowFormat(), "TRAIN_JSONL")
    sampler = StepSampler(manifest.column("num_codec_frames"), 0, 2, 2, seed=5, max_frames=20)
    parts = [MappedSteps(StepDataset(manifest, encoder), sampler, process) for process in (0, 1)]
    assert parts[0].geometry == Geometry(0, 2, 2, 20)
    for epoch in (0, 1):
        steps = [list(part.steps(epoch)) for part in parts]
        assert {len(part) for part in steps} == {part.num_steps(epoch) for part in parts}
        assert sorted(line for part in steps for line in all_lines(part)) == list(range(1, 12))
        assert all(len(batch["codes"]) <= 20 for part in steps for step in part for batch in step.batches)
        done = (Part(parts[0].geometry, 1),)
        assert_same(list(parts[1].steps(epoch, done)), steps[1][1:])
        assert parts[1].num_steps(epoch, done) == len(steps[1]) - 1
    assert parts[0].steps_per_epoch == parts[0].num_steps(0)
    assert parts[0].rows_per_step == round(11 / parts[0].steps_per_epoch)


def test_messages_pass_over_damaged_rows(encoder: RowEncoder, write_jsonl: Callable[..., Path]) -> None:
    """Also beside a row whose text cannot be read."""
    generator = np.random.default_rng(0)
    codes = [generator.integers(0, 2048, (3, 16)).tolist() for _ in range(3)]
    jsonl = write_jsonl([{"text": f"Sentence {number}.", "audio_codes": rows} for number, rows in enumerate(codes)])
    file = open_rows(jsonl, RowFormat(), "TRAIN_JSONL").arrow_file
    damaged = file.with_name("damaged.arrow")
    damaged.write_bytes(file.read_bytes().replace(b"Sentence 1", b"Sentence \xff"))
    steps = MappedSteps(StepDataset(Manifest(damaged), encoder), StepSampler(np.full(3, 3), 3))
    assert steps.texts([1, 2]) == {1: "Sentence 0."}
    assert [row["line"] for row in steps.rows(2)] == [1, 3]
    (step,) = steps.steps(0)
    assert sorted(lines_of(step.batches)) == [1, 3] and isinstance(step.skipped[0], SkippedRow)


# --------------------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize("max_frames", [None, 600])
def test_total_steps_are_those_that_the_epochs_take(make_settings: Callable, max_frames: int | None) -> None:
    """From the beginning and from any position, also where the epochs have different numbers of steps."""
    lengths = np.random.default_rng(0).integers(10, 300, 97)
    sampler = StepSampler(lengths, 0 if max_frames else 3, 2, window_steps=2, max_frames=max_frames)
    settings = make_settings(num_epochs=6)
    sizes = [len(list(sampler.epoch_plan(epoch))) for epoch in range(6)]
    assert total_steps(settings, sampler) == sum(sizes)
    assert (len(set(sizes)) > 1) == bool(max_frames)
    for epoch, num_steps in ((0, 3), (2, 0), (4, sizes[4]), (5, 1)):
        done = (Part(sampler.geometry, num_steps),)
        progress = Progress(epoch=epoch, done=done, num_fetched=sum(sizes[:epoch]) + num_steps)
        assert total_steps(settings, sampler, progress) == sum(sizes)
        assert total_steps(make_settings(num_epochs=6, max_steps=5), sampler, progress) == 5
    assert total_steps(settings, sampler, Progress(epoch=6, num_fetched=70)) == 70


def test_epochs_that_are_never_reached_are_not_planned(make_settings: Callable) -> None:
    planned = []

    class Noted(StepSampler):
        def num_steps(self, epoch: int, done: Iterable[Part] = ()) -> int:
            planned.append(epoch)
            return super().num_steps(epoch, done)

    sampler = Noted(np.full(10, 50), 0, max_frames=100)
    assert total_steps(make_settings(num_epochs=100_000, max_steps=12), sampler) == 12
    assert planned == [0, 1, 2]


# ------------------------------------------------------------------------------------------ a share of the frames


def chosen_frames(steps: Iterable[Step]) -> dict[int, list[int]]:
    """Line -> which of its frames the sub-talker trains on."""
    chosen: dict[int, list[int]] = {}
    for batch in (batch for step in steps for batch in step.batches if batch["weight"] > 0):
        first = 0
        for line, num_frames in zip(batch["lines"].tolist(), batch["frame_mask"].sum(1).tolist(), strict=True):
            frames = batch["sub_talker_frames"] - first
            chosen[line] = frames[(frames >= 0) & (frames < num_frames)].tolist()
            first += num_frames
    return chosen


def test_a_stream_deals_the_same_share_of_a_row_to_whoever_has_it(make_steps: MakeSteps) -> None:
    """Another one in each epoch, the same for any number of processes and after a stop; none without the setting."""

    def share_of(*sharing: StreamedSteps, epoch: int = 0, **position: Any) -> dict[int, list[int]]:
        steps = [replace(one, sub_talker_frame_fraction=0.5).steps(epoch, **position) for one in sharing]
        return chosen_frames(step for of_process in steps for step in of_process)

    first = share_of(make_steps())
    assert sorted(first) == list(range(1, NUM_ROWS + 1))
    assert share_of(make_steps(0, 2), make_steps(1, 2)) == first != share_of(make_steps(), epoch=1)
    left = share_of(make_steps(), done=[Part(make_steps().geometry, 3)])
    assert 0 < len(left) < len(first) and left.items() <= first.items()
    assert not any("sub_talker_frames" in batch for step in make_steps().steps(0) for batch in step.batches)


def test_rows_of_a_file_have_their_share_but_not_those_of_the_validation(
    make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]
) -> None:
    fields = {"batch_size": 2, "gradient_accumulation_steps": 1, "sub_talker_frame_fraction": 0.25}
    files = {"train_jsonl": write_jsonl(demo_rows[:7]), "validation_jsonl": write_jsonl(demo_rows[-3:], "valid.jsonl")}
    run = build(make_settings(**fields, **files))
    train, validator = run.train, Validator(run.settings, run.accelerator, run.validation)
    first = chosen_frames(train.steps(0))
    for line, row in enumerate(demo_rows[:7], 1):
        assert len(first[line]) == round(len(row["audio_codes"]) / 4)
    lengths = train.dataset.manifest.column("num_codec_frames")
    sampler = StepSampler(lengths, 2, 1, num_processes=2, seed=run.settings.seed)
    shares = [replace(train, sampler=sampler, process=process).steps(0) for process in range(2)]
    assert chosen_frames(step for steps in shares for step in steps) == first != chosen_frames(train.steps(1))
    left = chosen_frames(train.steps(0, [Part(train.geometry, 2)]))
    assert len(left) == 3 and left.items() <= first.items()
    assert not any("sub_talker_frames" in batch for step in validator._steps(False) for batch in step.batches)


def layouts(steps: Iterable[Step], ids: LayoutIds) -> dict[int, bool]:
    """Line -> whether the row is laid out for streaming: then tts_eos, the end of its text, is beside the frames."""
    found: dict[int, bool] = {}
    for batch in (batch for step in steps for batch in step.batches if batch["weight"] > 0):
        for row, line in enumerate(batch["lines"].tolist()):
            before_frames = batch["text_ids"][row][: int(batch["frame_mask"][row].int().argmax())]
            found[line] = ids.tts_eos not in before_frames.tolist()
    return found


def test_layouts_of_a_stream_are_drawn_for_each_row_and_epoch(make_steps: MakeSteps, encoder: RowEncoder) -> None:
    def of(*sharing: StreamedSteps, epoch: int = 0, layout: str = "both") -> dict[int, bool]:
        own = [replace(steps, encoder=replace(encoder, draws=Draws(layout, seed=5))) for steps in sharing]
        return layouts((step for steps in own for step in steps.steps(epoch)), encoder.ids)

    first = of(make_steps())
    assert len(first) == NUM_ROWS and 8 < sum(first.values()) < NUM_ROWS - 8
    assert of(make_steps(0, 2), make_steps(1, 2)) == first != of(make_steps(), epoch=1)
    assert set(of(make_steps(), layout="streaming").values()) == {True}
    assert set(of(make_steps(), layout="non_streaming").values()) == {False}


def test_layouts_of_a_file_are_drawn_for_each_row_and_epoch(
    make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]
) -> None:
    files = {"train_jsonl": write_jsonl(demo_rows[:20]), "validation_jsonl": write_jsonl(demo_rows[-3:], "valid.jsonl")}
    run = build(make_settings(batch_size=2, train_layout="both", **files))
    train, ids = run.train, run.train.encoder.ids
    epochs = [layouts(train.steps(epoch), ids) for epoch in range(4)]
    assert layouts(train.steps(2), ids) == epochs[2] and len({tuple(sorted(one.items())) for one in epochs}) == 4
    assert all(len(one) == 20 for one in epochs)
    shares = [sum(one.values()) / len(one) for one in epochs]
    assert 0.3 < sum(shares) / 4 < 0.7
    validator = Validator(run.settings, run.accelerator, run.validation)
    assert layouts(validator._steps(False), ids) == layouts(validator._steps(False), ids)
    run.lock.close()
