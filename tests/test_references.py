"""The reference of every row: which it is, what stands in its context, how it is computed and kept; and its batches."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import VOICE
from raw_clips import write_clip
from reference import load_stock, naive_losses

from finetuning.audio import load_audio
from finetuning.base_model import load_model, load_tokenizer, resolve_base
from finetuning.dataset import (
    Batch,
    FrameShare,
    Reference,
    RowEncoder,
    StepDataset,
    count_tokens,
    make_step,
    split_batch,
    step_loader,
)
from finetuning.draws import Draws
from finetuning.errors import UserError
from finetuning.manifest import RowFormat
from finetuning.objective import TrainingObjective
from finetuning.prompt import IGNORE, LayoutIds, assistant_turn, reference_turn
from finetuning.references import References, load_references, prepare_references, speakers_of
from finetuning.row_index import Manifest, open_rows
from finetuning.speakers import speaker_vector
from finetuning.tiny_model import embedded_model_folder

pytestmark = pytest.mark.usefixtures("one_thread")

#: Of a short clip.
SHORT = (np.arange(64).reshape(4, 16) + 1).tolist()
#: No multiple of 1920 samples, either of them.
LONG, LONGER = (str(VOICE / "clips" / f"train_{number}.flac") for number in (17, 16))


@pytest.fixture(scope="module")
def loaded() -> SimpleNamespace:
    from finetuning.settings import load_settings

    base = resolve_base(load_settings({"init_model_path": "tiny-random"}, environment={}))
    encoder = RowEncoder(
        load_tokenizer(base.folder), LayoutIds.from_config(base.config), {"anna": 0, "ben": 1}, {}, draws=Draws(seed=42)
    )
    return SimpleNamespace(base=base, model=load_model(base, "sdpa"), encoder=encoder)


@pytest.fixture(scope="module")
def stock() -> Any:
    return load_stock(embedded_model_folder("tiny-random"))


def clip(folder: Path, number: int) -> str:
    """Noise of 0.4 s and more, each clip another length."""
    path = folder / f"clip{number}.wav"
    if not path.is_file():
        write_clip(path, number, 0.4 + 0.11 * number)
    return str(path)


def rows_of(folder: Path, *speakers: str) -> list[dict[str, Any]]:
    """A row with a clip of its own for each name."""
    return [
        {"audio": clip(folder, number), "text": f"Clip {number}.", "speaker": name}
        for number, name in enumerate(speakers)
    ]


@dataclass
class Prepared:
    """What a run would have."""

    train: Manifest
    validation: Manifest | None
    references: References
    held_out: References | None
    settings: Any
    encoder: RowEncoder

    def of(self, index: int, epoch: int = 0, seed: int = 42) -> Reference:
        return self.references.of(index, self.train[index], Draws(icl_fraction=1.0, seed=seed, epoch=epoch))

    def number_of(self, index: int, epoch: int = 0, seed: int = 42) -> int:
        """Of the clip that is a row's reference."""
        return int(Path(self.of(index, epoch, seed).file).stem.removeprefix("clip"))

    def dataset(self, share: FrameShare | None = None) -> StepDataset:
        return StepDataset(self.train, self.encoder, share, self.references)

    @property
    def folder(self) -> Path:
        (found,) = self.settings.output_dir.glob("rows/references-*")
        return found


@pytest.fixture
def prepare(
    loaded: Any, write_jsonl: Callable[..., Path], make_settings: Callable[..., Any]
) -> Callable[..., Prepared]:
    """Rows (codes are made up where there are none) to their references, all in context where nothing else is said."""

    def opened(rows: list[dict], name: str) -> Manifest:
        codes = [np.random.default_rng(n).integers(0, 2048, (5 + 2 * n, 16)).tolist() for n in range(len(rows))]
        full = [{"text": f"Row {n}.", "audio_codes": codes[n]} | row for n, row in enumerate(rows)]
        return open_rows(write_jsonl(full, name), RowFormat(default_speaker="anna"), "TRAIN_JSONL")

    def make(rows: list[dict], validation: list[dict] | None = None, **fields: Any) -> Prepared:
        train = opened(rows, "train.jsonl")
        held_out = opened(validation, "validation.jsonl") if validation else None
        settings = make_settings(export_type="base", **({"icl_fraction": 1.0, "train_jsonl": "my.jsonl"} | fields))
        found = load_references(prepare_references(train, held_out, loaded.model, loaded.base, settings, "cpu"))
        encoder = replace(loaded.encoder, draws=Draws.from_settings(settings))
        return Prepared(train, held_out, *found, settings, encoder)

    return make


# -------------------------------------------------------------------------------------------- which reference it is


def test_a_rows_own_reference_comes_before_the_default(prepare: Callable, tmp_path: Path) -> None:
    clip(tmp_path, 1)
    rows = [
        {"ref_audio": LONG, "ref_text": "Of its own."},
        {"ref_audio": "clip1.wav", "ref_text": "Beside the file."},
        {},
        {"ref_audio": LONG, "ref_text": "Of its own."},
    ]
    made = prepare(rows, ref_audio_path=clip(tmp_path, 2), ref_text="The default.")
    found = [made.of(index) for index in range(4)]
    assert [row.file for row in found] == [LONG, clip(tmp_path, 1), clip(tmp_path, 2), LONG]
    assert [row.text for row in found] == ["Of its own.", "Beside the file.", "The default.", "Of its own."]
    assert all(row.vector.dtype == np.float32 and row.codes.shape[1] == 16 for row in found)
    assert not made.references.depends_on_epoch
    (speaker,) = speakers_of(["anna"], made.references).references
    assert speaker == [LONG, clip(tmp_path, 1), clip(tmp_path, 2)]


def test_a_clip_of_the_speaker_is_chosen_where_nothing_else_is_named(prepare: Callable, tmp_path: Path) -> None:
    rows = [*rows_of(tmp_path, "anna", "Ben", "anna", "Ben"), {"speaker": "Ben"}]
    made = prepare(rows)  # of short clips the longest
    assert [made.number_of(index) if index < 4 else made.of(index).text for index in range(5)] == [
        2, 3, 2, 3, "Clip 3.",
    ]  # fmt: skip
    assert made.of(0).codes is not None and made.of(2).codes is None  # that is its own


def test_what_a_row_of_the_speaker_names_comes_before_a_chosen_clip(prepare: Callable, tmp_path: Path) -> None:
    """Also for validation rows: prepared ones name none."""
    rows = [{}, {"ref_audio": LONG, "ref_text": "Yes."}, {"ref_audio": LONGER, "ref_text": "No."}]
    made = prepare([*rows_of(tmp_path, "anna"), *rows], [{}])
    assert [made.of(index).file for index in (0, 1)] == [LONG, LONG]
    assert made.held_out.of(0, made.validation[0], Draws(icl_fraction=1.0)).file == LONG


def test_a_copy_of_a_clip_is_known_by_its_text(prepare: Callable, tmp_path: Path) -> None:
    """Prepared data sets name a copy of one clip as the reference of all."""
    shutil.copy(clip(tmp_path, 0), tmp_path / "reference.wav")
    named = {"ref_audio": str(tmp_path / "reference.wav"), "ref_text": "Clip 0."}
    made = prepare([row | named for row in rows_of(tmp_path, "anna", "anna")])
    assert made.of(0).codes is None and made.of(1).codes is not None


def test_the_text_of_a_clip_of_the_rows_is_known(prepare: Callable, tmp_path: Path) -> None:
    """But a row's own ref_text goes first."""
    rows = rows_of(tmp_path, "anna", "anna", "anna")
    rows[0] |= {"ref_audio": clip(tmp_path, 1)}
    rows[1] |= {"ref_audio": clip(tmp_path, 2), "ref_text": "As the row says."}
    rows[2] |= {"ref_audio": clip(tmp_path, 0)}
    assert [prepare(rows).of(index).text for index in range(3)] == ["Clip 1.", "As the row says.", "Clip 0."]


def test_a_clip_never_stands_in_its_own_context(prepare: Callable, tmp_path: Path) -> None:
    """By whatever path; its vector it has."""
    rows = rows_of(tmp_path, "anna", "anna", "anna")
    (tmp_path / "link.wav").symlink_to(clip(tmp_path, 0))
    rows[0] |= {"ref_audio": str(tmp_path / "link.wav")}
    rows[1] |= {"ref_audio": "clip0.wav"}
    rows.append({"audio": "link.wav", "ref_audio": clip(tmp_path, 0), "audio_codes": SHORT})
    made = prepare(rows)
    for index, is_in_context in enumerate([False, True, True, False]):  # row 2: what the first one names
        row = made.dataset().read(index)
        assert (row["reference"].codes is not None) == is_in_context == (row["reference"].text is not None)
        assert (made.encoder.reference_of(row) is not None) == is_in_context
        assert (made.encoder.encode(row).num_reference_frames > 0) == is_in_context
    assert np.array_equal(made.of(0).vector, made.of(1).vector)


def test_a_drawn_reference_is_another_clip_of_the_speaker(prepare: Callable, tmp_path: Path) -> None:
    """And over some epochs every one of them."""
    names = ["anna", "Ben", "anna", "Ben", "anna", "anna"]
    rows = [*rows_of(tmp_path, *names), {"speaker": "Ben"}, {"audio": "gone.wav", "speaker": "anna"}]
    made = prepare(rows, reference_sampling="same_speaker")
    assert made.references.depends_on_epoch
    clips = {"anna": {0, 2, 4, 5}, "Ben": {1, 3}}
    for index, row in enumerate(rows):
        drawn = [made.of(index, epoch) for epoch in range(30)]
        numbers = {int(Path(one.file).stem.removeprefix("clip")) for one in drawn}
        assert numbers == clips[row["speaker"]] - {index}
        assert all(one.text == f"Clip {Path(one.file).stem.removeprefix('clip')}." for one in drawn)
        assert all(one.codes is not None for one in drawn)


def test_references_are_drawn_anew_in_every_epoch(prepare: Callable, tmp_path: Path) -> None:
    """The same for the same seed and epoch, whatever was read before."""
    made = prepare(rows_of(tmp_path, *["anna"] * 8), reference_sampling="same_speaker")

    def drawn(epoch: int, seed: int = 42) -> list[int]:
        return [made.number_of(index, epoch, seed) for index in range(8)]

    first, second = drawn(0), drawn(1)
    assert first != second and drawn(0, seed=7) not in (first, second)
    assert [made.number_of(index, 1) for index in reversed(range(8))] == second[::-1] and drawn(0) == first
    datasets = [made.dataset().at_epoch(epoch, None) for epoch in (1, 0, 1)]
    read = [[Path(dataset.read(index)["reference"].file) for index in range(8)] for dataset in datasets]
    assert read[0] == read[2] == [tmp_path / f"clip{number}.wav" for number in second]
    assert read[1] == [tmp_path / f"clip{number}.wav" for number in first]


def test_workers_and_other_processes_have_the_same(prepare: Callable, tmp_path: Path) -> None:
    fields = {"reference_sampling": "same_speaker", "icl_fraction": 0.5, "train_layout": "both"}
    rows = rows_of(tmp_path, *["anna"] * 5)
    made, other = prepare(rows, **fields), prepare(rows, **fields)
    plans = [[[0, 1], [2]], [[4, 3], []]]
    steps = list(step_loader(made.dataset().at_epoch(2, None), plans))
    assert any("sub_talker_frames" in batch for step in steps for batch in step.batches)
    for again in (
        step_loader(made.dataset().at_epoch(2, None), plans, num_workers=2),
        step_loader(other.dataset().at_epoch(2, None), plans),
    ):
        for step, expected in zip(again, steps, strict=True):
            assert not step.skipped
            for batch, expected_batch in zip(step.batches, expected.batches, strict=True):
                assert batch.keys() == expected_batch.keys()
                assert all(torch.equal(batch[name], expected_batch[name]) for name in batch)


def test_long_and_very_short_clips_are_drawn_only_where_there_are_no_others(prepare: Callable, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "anna", "anna", "anna", "anna")
    for row, num_frames in zip(rows, (30, 40, 100, 400), strict=True):  # 2.4, 3.2, 8 and 32 s
        row["audio_codes"] = np.random.default_rng(num_frames).integers(0, 2048, (num_frames, 16)).tolist()
    made = prepare(rows, reference_sampling="same_speaker")
    assert {made.number_of(0, epoch) for epoch in range(30)} == {1, 2}
    assert {made.number_of(1, epoch) for epoch in range(30)} == {2}


def test_clips_are_drawn_among_so_many(prepare: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.reference_choice.POOL_CLIPS", 3)
    made = prepare(rows_of(tmp_path, *["anna"] * 7), reference_sampling="same_speaker")
    assert {made.number_of(1, epoch) for epoch in range(30)} == {0, 3, 6}
    assert {made.number_of(3, epoch) for epoch in range(30)} == {0, 6}
    assert len(made.references.clips.files) == 3


@pytest.mark.parametrize(
    "second",
    [{}, {"audio": "gone.wav"}, {"audio": "clip2.wav"}, {"audio": "link.wav"}],
    ids=["none", "gone", "same", "link"],
)
def test_a_speaker_with_one_clip_has_no_other(prepare: Callable, tmp_path: Path, second: dict) -> None:
    """Be it that the same clip stands in two rows."""
    rows = [*rows_of(tmp_path, "anna", "anna", "Ben"), {"speaker": "Ben", "audio_codes": SHORT} | second]
    (tmp_path / "link.wav").symlink_to(clip(tmp_path, 2))
    with pytest.raises(UserError, match=r'REFERENCE_SAMPLING: speaker "Ben" has 1 clip\(s\).* set it to fixed'):
        prepare(rows, reference_sampling="same_speaker")
    assert prepare(rows).number_of(2) == 2


def test_a_clip_in_two_rows_is_one_of_the_clips(prepare: Callable, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "anna", "anna", "anna")
    made = prepare([*rows, rows[0] | {"text": "Once more."}], reference_sampling="same_speaker")
    assert made.references.of_speakers()[0].tolist() == [0, 1, 2]
    for index, others in enumerate([{1, 2}, {0, 2}, {0, 1}, {1, 2}]):
        assert {made.number_of(index, epoch) for epoch in range(30)} == others


@pytest.mark.parametrize("sampling", ["fixed", "same_speaker"])
def test_altered_copies_are_never_references(prepare: Callable, tmp_path: Path, sampling: str) -> None:
    """Neither are they in the context of their original, nor it in theirs."""
    rows = rows_of(tmp_path, "anna", "anna", "anna")
    copies = [row | {"augmentation": {"speed": 1.1}, "text": f"Copy of {row['text']}"} for row in rows]
    made = prepare([copies[2], *rows, *copies[:2]], reference_sampling=sampling)
    assert {made.references.clips.texts[number] for number in range(len(made.references.clips.files))} <= {
        "Clip 0.", "Clip 1.", "Clip 2.",
    }  # fmt: skip
    for index, own in enumerate([2, 0, 1, 2, 0, 1]):
        drawn = [made.of(index, epoch) for epoch in range(20)]
        in_context = {int(Path(one.file).stem.removeprefix("clip")) for one in drawn if one.codes is not None}
        assert in_context == ({0, 1, 2} if sampling == "same_speaker" else {2}) - {own}


# --------------------------------------------------------------------------------------------- what stock would have


def test_vectors_and_codes_equal_stock(prepare: Callable, loaded: Any, stock: Any, codec: Any, tmp_path: Path) -> None:
    """Bit for bit, of clips that do not end with a frame; codes of padded clips would differ."""
    assert all(soundfile.info(file).frames % 1920 for file in (LONG, LONGER, clip(tmp_path, 3)))
    files, rows = [LONG, LONGER, clip(tmp_path, 3)], rows_of(tmp_path, "anna", "anna", "anna")
    made = prepare([row | {"ref_audio": file, "ref_text": "Yes."} for row, file in zip(rows, files, strict=True)])
    padded = codec.encode([load_audio(file) for file in files])
    for index, file in enumerate(files):
        (item,) = stock.create_voice_clone_prompt(file, "Yes.")
        mine = made.of(index)
        assert torch.equal(torch.from_numpy(mine.vector), item.ref_spk_embedding)
        assert np.array_equal(mine.codes, item.ref_code.numpy())
        assert torch.equal(torch.from_numpy(mine.vector), speaker_vector(loaded.model, file))
    assert any(not np.array_equal(made.of(index).codes, padded[index]) for index in range(3))


def test_a_speaker_is_the_mean_of_its_references(prepare: Callable, loaded: Any, tmp_path: Path) -> None:
    rows = [*rows_of(tmp_path, "anna", "Ben"), {"ref_audio": LONG, "ref_text": "No."}]
    rows[0] |= {"ref_audio": clip(tmp_path, 0)}
    speakers = speakers_of(["anna", "Ben"], prepare(rows).references)
    vectors = [speaker_vector(loaded.model, file) for file in (clip(tmp_path, 0), LONG, clip(tmp_path, 1))]
    torch.testing.assert_close(speakers.vectors, torch.stack([(vectors[0] + vectors[1]) / 2, vectors[2]]))
    assert speakers.codec_rows == [None, None]
    assert speakers.references == [[clip(tmp_path, 0), LONG], [clip(tmp_path, 1)]]


# ------------------------------------------------------------------------------------------------------ how it is kept


def refuse_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("computed again")

    for name in ("voice_vector", "Codec", "voice_encoder"):
        monkeypatch.setattr(f"finetuning.references.{name}", refused)


def test_what_was_computed_is_read_again(prepare: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(tmp_path, "anna", "anna", "anna")
    made = prepare(rows, reference_sampling="same_speaker")
    refuse_to_compute(monkeypatch)
    again = prepare(rows, reference_sampling="same_speaker")
    assert again.folder == made.folder
    for index in range(3):
        before, now = made.of(index), again.of(index)
        assert before.file == now.file and np.array_equal(before.codes, now.codes)
        assert np.array_equal(before.vector, now.vector)
    prepare([row | {"text": "Another text."} for row in rows], reference_sampling="same_speaker")
    with pytest.raises(AssertionError, match="computed again"):
        prepare(rows)  # other references


@pytest.mark.parametrize("change", ["content", "time", "context", "encoder", "codec"])
def test_what_was_computed_of_something_else_is_replaced(
    prepare: Callable, loaded: Any, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(tmp_path, "anna", "anna")
    if change in ("encoder", "codec"):  # another model in the same place
        folder = tmp_path / "base"
        shutil.copytree(loaded.base.folder, folder)
        moved = replace(loaded.base, folder=folder, codec_folder=folder / "speech_tokenizer")
        monkeypatch.setattr(loaded, "base", moved)
    first = prepare(rows)
    old, old_vector = first.folder, first.of(0).vector
    file, fields = Path(clip(tmp_path, 1)), {}
    if change == "content":
        write_clip(file, 77, 0.8)
    elif change == "time":
        os.utime(file, ns=(1, 1))
    elif change == "context":
        fields["icl_fraction"] = 0.0
    else:
        changed = folder if change == "encoder" else folder / "speech_tokenizer"
        os.utime(changed / "model.safetensors", ns=(1, 1))
    made = prepare(rows, **fields)
    assert made.folder != old and not old.exists()
    assert np.array_equal(made.of(0).vector, old_vector) == (change != "content")
    assert (made.of(0).codes is None) == (change == "context")


def test_a_process_without_the_folder_says_so(prepare: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"OUTPUT_DIR: .*all processes must see"):
        load_references(tmp_path / "references-0")


def test_a_start_that_was_cut_off_goes_on(prepare: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed before is read again, chunk by chunk, and the result is that of one go."""
    monkeypatch.setattr("finetuning.references.CHUNK_REFERENCES", 2)
    rows = [row | {"ref_audio": row["audio"]} for row in rows_of(tmp_path, *["anna"] * 5)]
    from finetuning import references

    read, seen = references._Reader.read, []

    def noted(reader: Any, number: int) -> Any:
        seen.append(number)
        if seen == [0, 1, 2]:
            raise KeyboardInterrupt
        return read(reader, number)

    monkeypatch.setattr(references._Reader, "read", noted)
    with pytest.raises(KeyboardInterrupt):
        prepare(rows)
    made = prepare(rows)
    assert seen == [0, 1, 2, 2, 3, 4]
    assert not list(made.settings.output_dir.glob("rows/*.partial"))
    vectors, content = np.array(made.references.clips.vectors), made.references.content
    shutil.rmtree(made.folder)
    again = prepare(rows)
    assert np.array_equal(again.references.clips.vectors, vectors) and again.references.content == content


def test_a_resumed_run_reads_what_it_had(prepare: Callable, loaded: Any, tmp_path: Path) -> None:
    """Files may be gone; and what rows have now would be something else."""
    rows = rows_of(tmp_path, "anna", "anna", "anna")
    made = prepare(rows, reference_sampling="same_speaker")
    Path(clip(tmp_path, 2)).unlink()
    arguments = (made.train, None, loaded.model, loaded.base, made.settings, "cpu")
    assert prepare_references(*arguments, wanted=made.references.content) == made.folder
    changed = load_references(prepare_references(*arguments))[0]
    assert changed.content != made.references.content


def test_without_context_nothing_is_encoded(prepare: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("finetuning.references.Codec")
    made = prepare([{"ref_audio": LONG}, {"ref_audio": clip(tmp_path, 1)}], icl_fraction=0.0)  # no texts either
    assert made.of(0).codes is None and made.of(0).text is None and made.of(1).file == clip(tmp_path, 1)
    assert made.references.context_frames().tolist() == [0, 0]
    assert len(np.load(made.folder / "codes.npy")) == 0


# ------------------------------------------------------------------------------------ transcripts, validation, modes


def test_a_missing_transcript_is_named_with_its_line(prepare: Callable, tmp_path: Path) -> None:
    rows = [*rows_of(tmp_path, "anna"), {"ref_audio": LONG}, {"ref_audio": LONGER, "ref_text": ""}]
    with pytest.raises(UserError, match=rf"ICL_FRACTION: 2 of 2 references .*{LONG} \(train.jsonl line 2\)"):
        prepare(rows)
    validation = [{"ref_audio": LONG}]
    with pytest.raises(UserError, match=r"ICL_FRACTION: 1 of 2 references .* \(validation.jsonl line 1\)"):
        prepare(rows[:1], validation, validation_jsonl="held.jsonl")
    with pytest.raises(UserError, match=r"ICL_FRACTION: 1 of 1 references .*\(REF_AUDIO_PATH\).* REF_TEXT"):
        prepare(rows[:1], ref_audio_path=LONG)
    assert prepare(rows, icl_fraction=0.0).of(1).file == LONG
    assert not list(tmp_path.glob("output/rows/.*"))


def test_a_transcript_in_a_later_row_serves_all(prepare: Callable) -> None:
    rows = [{"ref_audio": LONG}, {"ref_audio": LONG, "ref_text": "Here it is."}, {"ref_audio": LONG}]
    assert {prepare(rows).of(index).text for index in range(3)} == {"Here it is."}


@pytest.mark.parametrize("sampling", ["fixed", "same_speaker"])
def test_validation_rows_have_theirs(prepare: Callable, tmp_path: Path, sampling: str) -> None:
    rows = rows_of(tmp_path, "anna", "Ben", "anna", "Ben")
    validation = [
        {"audio": clip(tmp_path, 6), "speaker": "BEN"},
        {"audio": clip(tmp_path, 7), "speaker": "anna", "ref_audio": LONG, "ref_text": "Its own."},
        rows[3] | {"speaker": "BEN"},
    ]
    made = prepare(rows, validation, reference_sampling=sampling)
    clips = {0: {1, 3}, 1: {0, 2}, 2: {1}}
    for index, row in enumerate(map(made.validation.__getitem__, range(3))):
        found = [made.held_out.of(index, row, Draws(seed=42, epoch=epoch)) for epoch in range(20)]
        if sampling == "same_speaker":  # of training clips
            assert {int(Path(one.file).stem.removeprefix("clip")) for one in found} == clips[index]
        else:
            assert {one.file for one in found} == {LONG if index == 1 else clip(tmp_path, 3)}
        is_own = sampling == "fixed" and index == 2
        assert {one.text is None for one in found} == {one.codes is None for one in found} == {is_own}
    dataset = StepDataset(made.validation, made.encoder, references=made.held_out)
    (batch,), skipped = dataset[[[0, 1, 2]]]
    assert not skipped and len(batch["row_vectors"]) == 3
    assert prepare(rows).held_out is None


def test_data_mode_none_takes_the_codes_of_the_rows(
    prepare: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("finetuning.references.Codec")
    rows = rows_of(tmp_path, "anna", "anna", "anna")
    copy = rows[2] | {"augmentation": {"speed": 1.1}}
    made = prepare([copy, *rows], data_mode="none", reference_sampling="same_speaker")
    for index in range(4):
        assert np.array_equal(made.of(index).codes, made.train[1 + made.number_of(index)]["codes"])
    rows = [row | {"ref_audio": clip(tmp_path, 2)} for row in rows]
    copy["ref_audio"] = clip(tmp_path, 2)
    before = prepare([copy, *rows], data_mode="none")
    assert np.array_equal(before.of(1).codes, before.train[3]["codes"]) and before.of(3).codes is None
    again = prepare([copy, *rows[:2], rows[2] | {"audio_codes": SHORT}], data_mode="none")
    assert again.of(1).codes.tolist() == SHORT  # and not those that were kept
    with pytest.raises(UserError, match=rf"ICL_FRACTION: .*{LONG} is no clip of the rows .* DATA_MODE=jsonl"):
        prepare([*rows, {"ref_audio": LONG, "ref_text": "No clip."}], data_mode="none")
    assert prepare([*rows, {"ref_audio": LONG}], data_mode="none", icl_fraction=0.0).of(3).file == LONG


# ----------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("sampling", ["fixed", "same_speaker"])
def test_lengths_are_a_bound_of_what_stands_in_context(prepare: Callable, tmp_path: Path, sampling: str) -> None:
    """And one that is reached, but by the row whose own clip it is."""
    rows = [*rows_of(tmp_path, "anna", "Ben", "anna", "Ben", "anna", "Ben"), {"speaker": "Ben"}]
    rows[1]["ref_audio"] = clip(tmp_path, 3)
    made = prepare(rows, reference_sampling=sampling, icl_fraction=0.8)
    bound, frames = made.references.context_frames(), made.train.column("num_codec_frames")
    assert (made.dataset().lengths() == bound + frames).all() and len(set(bound.tolist())) > 1
    most = np.zeros(7, dtype=int)
    for epoch in range(30):
        dataset = made.dataset().at_epoch(epoch, None)
        encoded = [dataset.encoder.encode(dataset.read(index)) for index in range(7)]
        assert [len(row.codes) - row.num_reference_frames for row in encoded] == frames.tolist()
        most = np.maximum(most, [row.num_reference_frames for row in encoded])
    assert (most <= bound).all()
    own = {"fixed": (3, 4), "same_speaker": (4, 5)}[sampling]
    assert (most == bound).tolist() == [index not in own for index in range(7)]


def mixed(made: Prepared, epoch: int = 0, share: FrameShare | None = None) -> StepDataset:
    return made.dataset().at_epoch(epoch, share)


@pytest.fixture
def half_in_context(prepare: Callable, tmp_path: Path) -> Prepared:
    """Eight rows, of which some stand in context and some do not, in either layout."""
    rows = rows_of(tmp_path, "anna", "anna", "Ben", "Ben", "anna", "Ben", "anna", "Ben")
    for row, language in zip(rows, ("English", "Auto", "German", "Auto") * 2, strict=True):
        row["language"] = language
    fields = {"reference_sampling": "same_speaker", "icl_fraction": 0.5, "train_layout": "both"}
    made = prepare(rows, **fields)
    draws = [made.encoder.draws.is_in_context(made.train[index]) for index in range(8)]
    assert 2 <= sum(draws) <= 6
    return made


def own_frames(made: Prepared, dataset: StepDataset, order: list[int]) -> tuple[list[int], list[int], list[int]]:
    """The numbers of the rows' own frames among all of a batch, and each row's R and T, counted by hand."""
    own, context, lengths, first = [], [], [], 0
    for index in order:
        row = dataset.read(index)
        has_context = dataset.encoder.draws.is_in_context(row) and row["reference"].codes is not None
        context.append(len(row["reference"].codes) if has_context else 0)
        lengths.append(len(row["codes"]))
        first += context[-1]
        own += range(first, first + lengths[-1])
        first += lengths[-1]
    return own, context, lengths


def test_a_batch_of_rows_in_and_out_of_context(half_in_context: Prepared) -> None:
    made, order = half_in_context, [5, 0, 7, 3, 1, 2, 6, 4]
    dataset = mixed(made)
    batch = dataset.batch(order)
    own, context, lengths = own_frames(made, dataset, order)
    assert any(context) and not all(context)
    rows = [dataset.read(index) for index in order]
    frames = [
        np.concatenate([row["reference"].codes, row["codes"]]) if num_context else row["codes"]
        for row, num_context in zip(rows, context, strict=True)
    ]
    assert torch.equal(batch["codes"], torch.from_numpy(np.concatenate(frames)).long())
    assert batch["frame_mask"].sum(1).tolist() == [len(row) for row in frames]
    assert batch["sub_talker_frames"].tolist() == own and "sub_talker_weights" not in batch
    vectors = np.stack([row["reference"].vector for row in rows])
    assert batch["row_vectors"].dtype == torch.float32 and np.array_equal(batch["row_vectors"].numpy(), vectors)
    # Labels: of each row its own frames' first codes and codec_eos, and nothing of the reference.
    eos = dataset.encoder.ids.codec_eos
    for labels, row in zip(batch["labels"], rows, strict=True):
        assert labels[labels != IGNORE].tolist() == [*row["codes"][:, 0].tolist(), eos]
    assert count_tokens([batch]) == (sum(lengths) + 8, 15 * sum(lengths))
    assert batch["lines"].tolist() == [index + 1 for index in order]


def test_a_batch_without_any_context_needs_no_choice(half_in_context: Prepared) -> None:
    dataset = mixed(half_in_context)
    outside = [i for i in range(8) if not dataset.encoder.draws.is_in_context(half_in_context.train[i])]
    batch = dataset.batch(outside)
    assert "sub_talker_frames" not in batch and len(batch["row_vectors"]) == len(outside)
    (dummy,) = dataset[[[]]].batches
    assert dummy["weight"] == 0 and "row_vectors" not in dummy and count_tokens([dummy]) == (0, 0)


def test_a_share_is_taken_of_the_rows_own_frames(half_in_context: Prepared) -> None:
    order, share = [5, 0, 7, 3, 1, 2, 6, 4], FrameShare(0.4, seed=42, epoch=3)
    dataset = mixed(half_in_context, 3, share)
    batch = dataset.batch(order)
    own, context, lengths = own_frames(half_in_context, dataset, order)
    assert any(context) and set(batch["sub_talker_frames"].tolist()) < set(own)
    first = 0
    for num_context, length, line in zip(context, lengths, batch["lines"].tolist(), strict=True):
        inside = (batch["sub_talker_frames"] >= first) & (batch["sub_talker_frames"] < first + num_context + length)
        chosen = batch["sub_talker_frames"][inside] - first - num_context
        expected = share.choose([line], [length])  # as without a context
        assert torch.equal(chosen, expected["sub_talker_frames"]) and len(chosen) == round(0.4 * length)
        assert torch.equal(batch["sub_talker_weights"][inside], expected["sub_talker_weights"])
        torch.testing.assert_close(batch["sub_talker_weights"][inside].sum(), torch.tensor(float(length)))
        first += num_context + length
    assert count_tokens([batch]) == (sum(lengths) + 8, 15 * sum(lengths))  # the weights stand for all


@pytest.fixture(scope="module")
def objective(stock: Any) -> TrainingObjective:
    return TrainingObjective(stock.model.talker, torch.zeros(2, stock.model.config.talker_config.hidden_size))


def summed(objective: TrainingObjective, batches: list[Batch]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        losses = [objective.train()(batch) for batch in batches]
    return {name: sum(one[name] for one in losses) for name in ("talker_loss", "sub_talker_loss")}


@pytest.mark.parametrize("fraction", [None, 0.4])
def test_parts_of_a_batch_have_the_same_losses(
    half_in_context: Prepared, objective: TrainingObjective, fraction: float | None
) -> None:
    share = fraction and FrameShare(fraction, seed=42, epoch=1)
    whole = mixed(half_in_context, 1, share).batch([5, 0, 7, 3, 1, 2, 6, 4])
    want = summed(objective, [whole])
    for num_parts in (2, 3, 8):
        parts = split_batch(whole, num_parts)
        assert len(parts) == num_parts and count_tokens(parts) == count_tokens([whole])
        got = summed(objective, parts)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=2e-6, atol=0)


def test_losses_equal_the_naive_calculation(
    half_in_context: Prepared, loaded: Any, stock: Any, objective: TrainingObjective
) -> None:
    """In the layout of whole texts, for which that is written."""
    made = half_in_context
    encoder = replace(made.encoder, draws=replace(made.encoder.draws, layout="non_streaming"))
    dataset = StepDataset(made.train, encoder, references=made.references)
    rows = [dataset.read(index) for index in range(8)]
    got = summed(objective, [dataset.batch(range(8))])

    def tokens(turn: str) -> torch.Tensor:
        return torch.tensor(encoder.tokenizer(turn)["input_ids"])

    want: dict[str, Any] = {"talker_loss": 0.0, "sub_talker_loss": 0.0}
    for row in rows:
        language = {"Auto": None, "English": 2050, "German": 2053}[row["language"]]
        reference = row["reference"]
        context = (tokens(reference_turn(reference.text)), torch.tensor(reference.codes).long())
        losses = naive_losses(
            stock.model, tokens(assistant_turn(row["text"])), language, torch.tensor(reference.vector),
            torch.tensor(row["codes"]).long(), context if encoder.draws.is_in_context(row) else None,
        )  # fmt: skip
        want = {name: value + losses[name].detach() for name, value in want.items()}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=2e-6, atol=0)


def test_a_row_with_a_damaged_reference_is_left_out(half_in_context: Prepared) -> None:
    encoder = replace(half_in_context.encoder, draws=Draws(icl_fraction=1.0))
    good = mixed(half_in_context).read(0)
    broken = replace(good["reference"], codes=np.full((4, 16), 2048, np.int16))
    (batch,), skipped = make_step([[good | {"reference": broken, "line": 3}, good]], encoder)
    assert [row.line for row in skipped] == [3] and "2048" in skipped[0].reason
    assert batch["lines"].tolist() == [1] and len(batch["row_vectors"]) == 1


def test_a_run_trains_with_them(
    make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict], tmp_path: Path
) -> None:
    """From the settings to the steps of a run: rows in context, of other clips; and the folder stays with the run."""
    from training import build

    rows = [row | {"ref_audio": None} for row in demo_rows[:4]]
    run = build(
        make_settings(
            train_jsonl=write_jsonl(rows), validation_fraction=0.0, export_type="base", icl_fraction=1.0,
            reference_sampling="same_speaker", batch_size=4, gradient_accumulation_steps=1,
        )
    )  # fmt: skip
    files = {row["audio"] for row in rows}
    for epoch in range(2):
        ((batch,),) = [step.batches for step in run.train.steps(epoch)]
        own = [len(row["audio_codes"]) for row in rows]
        assert len(batch["codes"]) > sum(own) == len(batch["sub_talker_frames"])
    read = run.train.rows(4)
    assert all(row["reference"].file in files - {row["audio"]} for row in read)
    assert list((tmp_path / "output" / "rows").glob("references-*"))
    assert json.loads((tmp_path / "output" / "settings.json").read_text())["ICL_FRACTION"] == 1.0
