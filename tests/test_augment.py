"""Altered copies: what is done to a waveform, measured; what is drawn; and the rows with copies from file to run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import VOICE
from datasets_for_tests import Clip, write_parquet
from fakes import FakeCodec, fake_codes
from raw_clips import expected_codes, read_rows, write_clip, write_raw, write_rows

from finetuning.audio import AudioError, load_audio
from finetuning.augment import (
    MAX_PEAK,
    Augmentation,
    AugmentedClip,
    NoiseFile,
    Recipe,
    add_noise,
    change_gain,
    change_speed,
    find_noise,
    shift_pitch,
)
from finetuning.base_model import Base, resolve_base
from finetuning.check_rows import Mending, check_at_start, check_jsonl
from finetuning.codec import Codec
from finetuning.encode_rows import dataset_info, encode_jsonl, encoded_path, format_info
from finetuning.errors import UserError
from finetuning.manifest import RowFormat
from finetuning.processes import Processes
from finetuning.resume import differing_settings
from finetuning.row_index import hold_out, open_rows
from finetuning.settings import load_settings
from finetuning.speakers import choose_reference
from finetuning.training_rows import check_files, open_training_rows

MakeSettings = Callable[..., Any]
MakeRaw = Callable[..., Path]
RATE = 24_000
TWO_COPIES = Augmentation(copies=2, speed=0.1, pitch_semitones=2, gain_db=6, seed=42)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return load_audio(VOICE / "clips" / "train_16.flac")


@pytest.fixture(scope="module")
def base() -> Base:
    return resolve_base(load_settings({"init_model_path": "tiny-random"}, environment={}))


def sine(hertz: float, seconds: float = 2.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def loudest_hertz(waveform: np.ndarray) -> float:
    """The peak of the spectrum, to a fraction of a bin; both ends, where a vocoder settles, are left out."""
    middle = waveform[2400:-2400] * np.hanning(len(waveform) - 4800)
    spectrum = np.log(np.abs(np.fft.rfft(middle)) + 1e-12)
    top = int(spectrum.argmax())
    left, centre, right = spectrum[top - 1 : top + 2]
    return (top + 0.5 * (left - right) / (left - 2 * centre + right)) * RATE / len(middle)


def rms(waveform: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))


# ------------------------------------------------------------------------------------------------------- waveforms


@pytest.mark.parametrize("speed", [0.9, 0.97, 1.1])
def test_speed_changes_the_length_and_not_the_pitch(speech: np.ndarray, speed: float) -> None:
    assert len(change_speed(speech, speed)) == round(len(speech) / speed)
    changed = change_speed(sine(220), speed)
    assert loudest_hertz(changed) == pytest.approx(220, rel=0.003)
    assert rms(change_speed(speech, speed)) == pytest.approx(rms(speech), rel=1e-3)


@pytest.mark.parametrize("semitones", [-2.0, 0.5, 2.0])
def test_pitch_changes_and_the_length_does_not(speech: np.ndarray, semitones: float) -> None:
    assert len(shift_pitch(speech, semitones)) == len(speech)
    changed = shift_pitch(sine(220), semitones)
    assert loudest_hertz(changed) == pytest.approx(220 * 2 ** (semitones / 12), rel=0.003)


@pytest.mark.parametrize("speed, semitones", [(1.08, -1.5), (0.92, 2.0), (2 ** (1 / 12), 1.0)])
def test_speed_and_pitch_together(speed: float, semitones: float) -> None:
    """In the last case the two cancel out in the vocoder."""
    changed, done = Recipe(speed, semitones).apply(sine(330))
    assert len(changed) == round(2 * RATE / speed) and changed.dtype == np.float32
    assert loudest_hertz(changed) == pytest.approx(330 * 2 ** (semitones / 12), rel=0.003)
    assert done == {"speed": speed, "pitch_semitones": semitones, "gain_db": 0.0}


def test_pitch_of_real_speech(speech: np.ndarray) -> None:
    """By librosa's tracker of voices, which knows nothing of how it was changed."""
    import librosa

    def median_hertz(waveform: np.ndarray) -> float:
        return float(np.median(librosa.yin(waveform[: 2 * RATE], fmin=70, fmax=400, sr=RATE)))

    assert median_hertz(shift_pitch(speech, 2)) / median_hertz(speech) == pytest.approx(2 ** (2 / 12), rel=0.03)
    assert median_hertz(change_speed(speech[: 2 * RATE], 1.1)) / median_hertz(speech) == pytest.approx(1, rel=0.03)


def test_no_change_is_the_clip_itself(speech: np.ndarray) -> None:
    quiet = speech * np.float32(0.5)
    assert np.array_equal(Recipe().apply(quiet)[0], quiet)


@pytest.mark.parametrize("gain_db", [-6.0, 3.0])
def test_gain(gain_db: float) -> None:
    changed, applied = change_gain(sine(220), gain_db)
    assert applied == gain_db
    assert 20 * np.log10(rms(changed) / rms(sine(220))) == pytest.approx(gain_db, abs=1e-3)


@pytest.mark.parametrize("peak", [0.7, 1.0, 1.4])
def test_gain_never_clips_and_says_what_it_was(speech: np.ndarray, peak: float) -> None:
    loud = speech * np.float32(peak / np.abs(speech).max())
    changed, applied = change_gain(loud, 6.0)
    assert np.abs(changed).max() == pytest.approx(MAX_PEAK, abs=1e-6) and MAX_PEAK < 1
    assert 20 * np.log10(rms(changed) / rms(loud)) == pytest.approx(applied, abs=1e-3)
    assert applied < 6 and Recipe(gain_db=6.0).apply(loud)[1]["gain_db"] == pytest.approx(applied, abs=1e-4)


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 20.0])
@pytest.mark.parametrize("noise_seconds", [0.5, 30.0])
def test_noise_lies_so_far_below_the_clip(speech: np.ndarray, snr_db: float, noise_seconds: float) -> None:
    noise = np.random.default_rng(0).normal(0, 0.2, int(noise_seconds * RATE)).astype(np.float32)
    noisy = add_noise(speech, noise, 0.3, snr_db)
    assert 20 * np.log10(rms(speech) / rms(noisy - speech)) == pytest.approx(snr_db, abs=0.01)


def test_long_noise_is_cut_and_short_noise_goes_round() -> None:
    clip, ramp = np.full(4, 1, np.float32), np.arange(1, 11, dtype=np.float32)

    def cut(noise: np.ndarray, start: float) -> list[float]:
        added = add_noise(clip, noise, start, 0.0) - clip
        return (added / added.min()).tolist()

    assert cut(ramp, 0.0) == pytest.approx([1, 2, 3, 4])
    assert cut(ramp, 0.9999) == pytest.approx([1, 8 / 7, 9 / 7, 10 / 7])
    assert cut(ramp[:3], 0.34) == pytest.approx([2, 3, 1, 2])


def test_silent_part_of_noise_gives_way_to_a_loud_one(speech: np.ndarray) -> None:
    noise = np.zeros(3 * len(speech), np.float32)
    noise[-2000:] = np.random.default_rng(0).normal(0, 0.2, 2000)
    noisy = add_noise(speech, noise, 0.0, 10.0)
    assert 20 * np.log10(rms(speech) / rms(noisy - speech)) == pytest.approx(10, abs=0.01)
    with pytest.raises(AudioError, match="silence"):
        add_noise(speech, np.zeros(RATE, np.float32), 0.0, 10.0)


# --------------------------------------------------------------------------------------------------- what is drawn


def test_draws_hang_on_seed_clip_and_copy_alone() -> None:
    recipes = TWO_COPIES.recipes("a.wav", 1000)
    assert recipes == TWO_COPIES.recipes("a.wav", 1000) and recipes[0] != recipes[1]
    assert dataclasses.replace(TWO_COPIES, copies=5).recipes("a.wav", 1000)[:2] == recipes
    others = [
        TWO_COPIES.recipes("b.wav", 1000),
        TWO_COPIES.recipes("a.wav", 1001),
        dataclasses.replace(TWO_COPIES, seed=43).recipes("a.wav", 1000),
    ]
    assert len({recipe.key() for some in [recipes, *others] for recipe in some}) == 8


def test_draws_fill_their_ranges() -> None:
    recipes = [recipe for number in range(300) for recipe in TWO_COPIES.recipes(f"{number}.wav", 5)]
    for name, low, high in (("speed", 0.9, 1.1), ("pitch_semitones", -2, 2), ("gain_db", -6, 6)):
        drawn = np.array([getattr(recipe, name) for recipe in recipes])
        assert low <= drawn.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 0.05 * (high - low)


def test_what_is_switched_off_does_not_change_the_rest() -> None:
    off = dataclasses.replace(TWO_COPIES, pitch_semitones=0.0).recipes("a.wav", 1)
    assert off == [dataclasses.replace(recipe, pitch_semitones=0.0) for recipe in TWO_COPIES.recipes("a.wav", 1)]


@pytest.fixture
def noise_folder(tmp_path: Path) -> Path:
    """Three files at several rates, one of them in a folder of its own, and something that is no audio."""
    folder = tmp_path / "noise"
    (folder / "street").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, rate, seconds in (("cafe.wav", 16_000, 0.5), ("fan.flac", 24_000, 3), ("street/cars.ogg", 48_000, 2)):
        soundfile.write(folder / name, generator.normal(0, 0.1, (int(rate * seconds), 2)), rate)
    (folder / "README.txt").write_text("where they are from")
    (folder / "._fan.flac").write_bytes(b"what a Mac leaves")
    return folder


def test_noise_files_are_found_and_all_used(noise_folder: Path, speech: np.ndarray) -> None:
    files = find_noise(noise_folder)
    assert [file.name for file in files] == ["cafe.wav", "fan.flac", "street/cars.ogg"]
    augmentation = Augmentation(copies=1, noise=files, snr_db=12)
    recipes = [augmentation.recipes(f"{number}.wav", 7)[0] for number in range(60)]
    assert min(Counter(recipe.noise.name for recipe in recipes).values()) > 8
    for recipe in recipes[:6]:
        noisy, done = recipe.apply(speech * np.float32(0.3))
        assert (done["noise"], done["snr_db"]) == (recipe.noise.name, 12)
        clean = speech * np.float32(0.3)
        assert 20 * np.log10(rms(clean) / rms(noisy - clean)) == pytest.approx(12, abs=0.5)


def test_key_of_a_recipe_knows_the_noise_by_its_content_not_its_place(noise_folder: Path, tmp_path: Path) -> None:
    def keys(folder: Path) -> list[str]:
        augmentation = Augmentation(copies=1, noise=find_noise(folder))
        return [augmentation.recipes(f"{number}.wav", 7)[0].key() for number in range(20)]

    before = keys(noise_folder)
    shutil.copytree(noise_folder, tmp_path / "moved")  # with the times
    assert keys(tmp_path / "moved") == before
    os.utime(noise_folder / "fan.flac", (1, 1))
    changed = [old != new for old, new in zip(before, keys(noise_folder), strict=True)]
    assert any(changed) and not all(changed)


def test_bad_noise_folders_name_the_setting(noise_folder: Path, make_settings: MakeSettings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    settings = make_settings(augment_copies=1, augment_noise_dir=tmp_path / "empty")
    with pytest.raises(UserError, match=r"^AUGMENT_NOISE_DIR: .*empty holds no audio files \(\.wav"):
        Augmentation.from_settings(settings)
    (noise_folder / "broken.wav").write_bytes(b"RIFF")
    write_clip(noise_folder / "click.wav", 1, seconds=0.1)
    settings = make_settings(augment_copies=1, augment_noise_dir=noise_folder, train_jsonl=write_raw(tmp_path / "d", 1))
    with pytest.raises(UserError, match=r"^AUGMENT_NOISE_DIR: 2 of the 5 audio files .* the first: broken\.wav"):
        check_files(settings)


def test_settings_make_the_augmentation(noise_folder: Path, make_settings: MakeSettings) -> None:
    assert Augmentation.from_settings(make_settings()) is None
    assert Augmentation.from_settings(make_settings(augment_copies=2)) == TWO_COPIES
    given = {"augment_speed": 0, "augment_noise_dir": noise_folder, "augment_noise_snr_db": 5, "seed": 7}
    augmentation = Augmentation.from_settings(make_settings(augment_copies=1, **given))
    assert augmentation == Augmentation(1, 0.0, 2.0, 6.0, find_noise(noise_folder), 5.0, 7)


# -------------------------------------------------------------------------------------------------- rows with copies


def encode(raw: Path, codec_folder: Path, augmentation: Augmentation | None = TWO_COPIES, **arguments: Any) -> Path:
    output = arguments.pop("output", encoded_path(raw, is_augmented=augmentation is not None))
    return encode_jsonl(raw, output, codec_folder, RowFormat(), augmentation=augmentation, **arguments)


def expected_with_copies(raw: Path, augmentation: Augmentation = TWO_COPIES) -> list[list[list[int]]]:
    """Fake codes of clips and of copies that are made here one by one."""
    expected = []
    for row in read_rows(raw):
        audio = raw.parent / row["audio"]
        expected.append(fake_codes(load_audio(audio)).tolist())
        for recipe in augmentation.recipes(audio.name, audio.stat().st_size):
            expected.append(fake_codes(recipe.apply(load_audio(audio))[0]).tolist())
    return expected


def codes_of(output: Path) -> list[list[list[int]]]:
    return [row["audio_codes"] for row in read_rows(output)]


def test_copies_stand_behind_their_clips(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(4, ref_audio="train_clips/00.wav", language="English", instruct="Calmly.")
    output = encode(raw, codec_folder)
    rows = read_rows(output)
    assert output.name == "train.augmented.jsonl" and len(rows) == 12 and fake.take_num_clips() == 12
    assert codes_of(output) == expected_with_copies(raw)
    own = ("audio_codes", "measures", "codes_source", "augmentation")
    for number, row in enumerate(rows):
        assert {key: value for key, value in row.items() if key not in own} == read_rows(raw)[number // 3]
        assert ("augmentation" in row) == (number % 3 > 0)
        seconds = len(load_audio(raw.parent / row["audio"])) / RATE / row.get("augmentation", {"speed": 1})["speed"]
        assert row["measures"]["seconds"] == pytest.approx(seconds, abs=2e-3)
    assert len({row["measures"]["audio_hash"] for row in rows}) == 12
    assert rows[1]["augmentation"].keys() == {"speed", "pitch_semitones", "gain_db"}


def test_off_is_the_same_file_as_ever(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(3)
    before = encode(raw, codec_folder, None).read_bytes()
    encode(raw, codec_folder)
    assert encode(raw, codec_folder, None).read_bytes() == before and b"augment" not in before
    assert fake.take_num_clips() == 3 + 6  # the clips themselves were not encoded again


def test_real_codec_makes_the_codes_of_the_altered_waveform(codec: Codec, tmp_path: Path, noise_folder: Path) -> None:
    clip = VOICE / "clips" / "train_16.flac"
    raw = tmp_path / "raw.jsonl"
    write_rows(raw, [{"audio": str(clip), "text": "Said."}])
    augmentation = dataclasses.replace(TWO_COPIES, noise=find_noise(noise_folder))
    rows = read_rows(encode(raw, codec.folder, augmentation, num_workers=1))
    copies = [AugmentedClip(clip, recipe) for recipe in augmentation.recipes(clip.name, clip.stat().st_size)]
    waveforms = [load_audio(clip), *(copy.load()[0] for copy in copies)]
    assert [row["audio_codes"] for row in rows] == [codes.tolist() for codes in codec.encode(waveforms)]
    assert [row.get("augmentation") for row in rows] == [None, *(copy.load()[1] for copy in copies)]
    assert len(rows[1]["audio_codes"]) == -(-len(waveforms[1]) // 1920) != len(rows[2]["audio_codes"])


def test_unchanged_settings_encode_nothing_again(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(4)
    before = encode(raw, codec_folder).read_bytes()
    fake.take_num_clips()
    assert encode(raw, codec_folder).read_bytes() == before and fake.take_num_clips() == 0
    write_rows(raw, [row | {"text": "Corrected."} for row in reversed(read_rows(raw))])
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 0 and codes_of(encoded_path(raw, is_augmented=True)) == expected_with_copies(raw)


@pytest.mark.parametrize(
    "change, num_clips",
    [({"speed": 0.3}, 8), ({"gain_db": 0.0}, 8), ({"seed": 1}, 8), ({"copies": 3}, 4), ({"copies": 1}, 0)],
    ids=str,
)
def test_other_settings_make_other_copies_of_the_same_clips(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, change: dict[str, Any], num_clips: int
) -> None:
    raw = make_raw(4)
    encode(raw, codec_folder)
    fake.take_num_clips()
    changed = dataclasses.replace(TWO_COPIES, **change)
    assert codes_of(encode(raw, codec_folder, changed)) == expected_with_copies(raw, changed)
    assert fake.take_num_clips() == num_clips


def test_touched_clip_and_other_codec_remake_the_copies_too(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path
) -> None:
    raw = make_raw(4)
    encode(raw, codec_folder)
    fake.take_num_clips()
    os.utime(raw.parent / "train_clips/02.wav", (1, 1))
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 3
    (codec_folder / "model.safetensors").write_bytes(b"others!")
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 12


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.encode_rows.CHUNK_ROWS", 2)


@pytest.mark.usefixtures("small_chunks")
def test_interrupted_run_goes_on_where_it_stopped(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(7)
    fake.batches_left = 2  # a chunk's six clips are one batch
    with pytest.raises(KeyboardInterrupt):
        encode(raw, codec_folder)
    fake.batches_left = 1_000_000
    assert fake.take_num_clips() == 12
    output = encode(raw, codec_folder)
    assert fake.take_num_clips() == 9
    at_one_go = encode(raw, codec_folder, output=raw.with_name("again.jsonl"), force=True)
    assert output.read_bytes() == at_one_go.read_bytes() and fake.take_num_clips() == 21


@pytest.mark.usefixtures("small_chunks")
def test_several_processes_make_the_same_file(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(5)
    shared = raw.with_name("shared.jsonl")

    def not_yet() -> None:
        raise InterruptedError  # where it would wait for the others

    with pytest.raises(InterruptedError):
        encode(raw, codec_folder, output=shared, processes=Processes(1, 2, not_yet))
    assert fake.take_num_clips() == 6
    encode(raw, codec_folder, output=shared, processes=Processes(0, 2))
    assert fake.take_num_clips() == 9
    assert shared.read_bytes() == encode(raw, codec_folder).read_bytes()


def test_limit_counts_clips(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(5)
    output = encoded_path(raw, 2, is_augmented=True)
    rows = read_rows(encode(raw, codec_folder, output=output, max_rows=2))
    assert [row["text"] for row in rows] == ["Sentence 0."] * 3 + ["Sentence 1."] * 3


def test_rows_with_codes_get_copies_where_there_is_audio(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_raw(3)
    own = [[[number] * 16] * 5 for number in range(3)]
    write_rows(raw, [row | {"audio_codes": codes} for row, codes in zip(read_rows(raw), own, strict=True)])
    (raw.parent / "train_clips/01.wav").unlink()
    rows = read_rows(encode(raw, codec_folder))
    assert [row["mood"]["number"] for row in rows] == [0, 0, 0, 1, 2, 2, 2]
    assert [row["audio_codes"] for row in rows if "augmentation" not in row] == own
    assert fake.take_num_clips() == 4
    assert capsys.readouterr().out.count("1 rows have no audio file, so there are no copies of them") == 1


def test_no_audio_at_all_is_an_error(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(3)
    write_rows(raw, [{"text": row["text"], "audio_codes": [[5] * 16] * 4} for row in read_rows(raw)])
    with pytest.raises(UserError, match=r"^AUGMENT_COPIES: .* no row of .*train\.jsonl has one.*SAVE_AUDIO=true"):
        encode(raw, codec_folder)
    assert not encoded_path(raw, is_augmented=True).exists()


def test_bad_clips_are_judged_without_the_copies_of_the_good_ones(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_raw(10)
    soundfile.write(raw.parent / "train_clips/03.wav", np.zeros(RATE), RATE)
    assert len(read_rows(encode(raw, codec_folder))) == 27
    assert "skipped 1 of 10 rows" in capsys.readouterr().out
    soundfile.write(raw.parent / "train_clips/07.wav", np.zeros(RATE), RATE)
    with pytest.raises(UserError, match="2 of 10 rows cannot be used"):
        encode(raw, codec_folder)


def test_copy_that_cannot_be_made_is_left_out_and_said(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "still.wav", np.zeros(RATE), RATE)
    still = NoiseFile("still.wav", tmp_path / "still.wav", 1, 1)
    rows = read_rows(encode(make_raw(3), codec_folder, Augmentation(copies=1, noise=(still,))))
    assert len(rows) == 3 and not any("augmentation" in row for row in rows)
    said = capsys.readouterr().out
    assert "3 augmented copies could not be made, the first: " in said
    assert f"AUGMENT_NOISE_DIR: {tmp_path / 'still.wav'}: silence only" in said


def test_short_clip_may_become_shorter_than_a_clip_must_be(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path
) -> None:
    raw = make_raw(1)
    write_clip(raw.parent / "train_clips/00.wav", 1, seconds=0.31)
    assert len(read_rows(encode(raw, codec_folder, dataclasses.replace(TWO_COPIES, speed=0.5, copies=5)))) == 6


# ------------------------------------------------------------------------------------------- copies in the input file


def test_copies_of_the_input_are_made_anew_and_found(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_raw(3)
    finished = encode(raw, codec_folder)
    finished.rename(finished := raw.with_name("finished.jsonl"))
    fake.take_num_clips()
    again = encode(finished, codec_folder)
    assert fake.take_num_clips() == 0 and codes_of(again) == expected_with_copies(raw)
    assert "6 augmented copies that stand in" in capsys.readouterr().out
    one = dataclasses.replace(TWO_COPIES, copies=1, speed=0.05)
    assert codes_of(encode(finished, codec_folder, one)) == expected_with_copies(raw, one)


def test_copies_of_the_input_stay_without_augmentation_unless_they_are_stale(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their audio is the original's: encoded again they would be no copies any more."""
    finished = encode(make_raw(3), codec_folder)
    fake.take_num_clips()
    before = read_rows(finished)
    assert read_rows(encode(finished, codec_folder, None)) == before
    os.utime(finished.parent / "train_clips/01.wav", (1, 1))
    after = read_rows(encode(finished, codec_folder, None))
    assert [row["mood"]["number"] for row in after] == [0, 0, 0, 1, 2, 2, 2] and fake.take_num_clips() == 1
    assert "2 augmented copies that stand in" in capsys.readouterr().out
    lost = [{key: value for key, value in row.items() if key != "audio_codes"} for row in before]
    write_rows(finished, lost)
    assert codes_of(encode(finished, codec_folder, None)) == expected_codes(make_raw(3))
    for path in (finished.parent / "train_clips").iterdir():
        path.unlink()
    write_rows(finished, before)
    assert read_rows(encode(finished, codec_folder, None, force=True)) == before  # nothing to make them of


def test_info_counts_copies(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    info = dataset_info(encode(make_raw(3), codec_folder), RowFormat())
    assert (info["num_samples"], info["num_copies"]) == (9, 6)
    assert "9 rows (9 with codes, 6 of them augmented copies)" in format_info(info)


# ------------------------------------------------------------------------------------------------- the rows of a run


def run_settings(make_settings: MakeSettings, train: Path, **fields: Any) -> Any:
    return make_settings(**({"train_jsonl": train, "augment_copies": 2} | fields))


def open_run(settings: Any, base: Base) -> Any:
    row_format = RowFormat.from_settings(settings, base.special_tokens())
    return open_training_rows(settings, base.codec_folder, row_format, "cpu")


def test_held_out_clips_have_no_copies_in_either_part(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(30)
    plain = open_run(run_settings(make_settings, raw, augment_copies=0, validation_fraction=0.2), base)
    rows = open_run(run_settings(make_settings, raw, validation_fraction=0.2), base)
    held = rows.validation.column("audio").tolist()
    assert held == plain.validation.column("audio").tolist() and len(held) == 6  # figures can be compared
    assert not rows.validation.has("augmentation").any()
    assert Counter(rows.train.column("audio")) == dict.fromkeys(plain.train.column("audio").tolist(), 3)
    assert set(rows.train.column("audio")).isdisjoint(held)
    assert rows.train.has("augmentation").sum() == 48


def test_few_clips_hold_nothing_out_however_many_copies(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    rows = open_run(run_settings(make_settings, make_raw(19)), base)
    assert rows.validation is None and len(rows.train) == 57


def test_copy_without_a_file_is_trained_only_where_nothing_is_held_out(write_jsonl: Callable[..., Path]) -> None:
    generator = np.random.default_rng(0)
    rows = [{"text": f"{n}.", "audio_codes": generator.integers(0, 2048, (3, 16)).tolist()} for n in range(21)]
    manifest = open_rows(write_jsonl([*rows[:20], rows[20] | {"augmentation": {"speed": 1.1}}]), RowFormat(), "X")
    assert len(hold_out(manifest, 0.0, 1)[0]) == 21
    train, validation = hold_out(manifest, 0.1, 1)
    assert (len(train), len(validation)) == (18, 2) and not train.has("augmentation").any()


def test_validation_files_get_and_keep_no_copies(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    train, validation = make_raw(4), make_raw(3, "validation.jsonl")
    rows = open_run(run_settings(make_settings, train, validation_jsonl=validation), base)
    assert (len(rows.train), len(rows.validation)) == (12, 3) and fake.take_num_clips() == 15
    with_copies = encode(validation, base.codec_folder)
    rows = open_run(run_settings(make_settings, train, validation_jsonl=with_copies), base)
    assert len(rows.validation) == 3 and not rows.validation.has("augmentation").any()
    assert "6 rows of VALIDATION_JSONL are augmented copies and are left out" in capsys.readouterr().out


@pytest.mark.parametrize("has_codes", [False, True])
def test_settings_and_noise_are_noticed_and_nothing_else_is_done_again(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, noise_folder: Path, has_codes: bool
) -> None:
    raw = make_raw(4)
    if has_codes:
        write_rows(raw, read_rows(encode(raw, base.codec_folder, None)))
    fake.take_num_clips()
    noise = {"augment_noise_dir": noise_folder}
    for fields, num_copies, num_clips in (
        ({}, 8, 8 if has_codes else 12),
        ({}, 8, 0),
        ({"augment_speed": 0.3}, 8, 8),
        ({"augment_copies": 0}, 0, 0),
        ({"augment_speed": 0.3}, 8, 0),
        (noise, 8, 8),
        (noise, 8, 0),
    ):
        settings = run_settings(make_settings, raw, **fields)
        rows = open_run(settings, base).train
        assert (rows.has("augmentation").sum(), fake.take_num_clips()) == (num_copies, num_clips), fields
        augmentation = Augmentation.from_settings(settings)
        expected = expected_with_copies(raw, augmentation) if augmentation else expected_codes(raw)
        assert [rows[number]["codes"].tolist() for number in range(len(rows))] == expected
    for file in find_noise(noise_folder):
        os.utime(file.path, (1, 1))
    open_run(run_settings(make_settings, raw, **noise), base)
    assert fake.take_num_clips() == 8


def test_a_second_start_does_not_even_read_the_rows(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_settings(make_settings, make_raw(4), max_train_samples=3)
    first = open_run(settings, base).train
    assert len(first) == 9 and first.column("text").tolist()[::3] == [f"Sentence {n}." for n in range(3)]
    monkeypatch.setattr("finetuning.training_rows.encode_jsonl", None)
    monkeypatch.setattr("finetuning.row_index.read_rows", None)
    assert open_run(settings, base).train.content_hash() == first.content_hash()


def test_audio_that_comes_back_gets_its_copies(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(3)
    write_rows(raw, [row | {"audio_codes": [[n] * 16] * 4} for n, row in enumerate(read_rows(raw))])
    clip = raw.parent / "train_clips/01.wav"
    clip.rename(clip.with_suffix(".away"))
    settings = run_settings(make_settings, raw)
    assert len(open_run(settings, base).train) == 7
    clip.with_suffix(".away").rename(clip)
    assert len(open_run(settings, base).train) == 9


def test_rows_of_a_dataset_keep_their_clips_for_the_copies(
    fake: FakeCodec, make_settings: MakeSettings, base: Base, tmp_path: Path
) -> None:
    from finetuning.preparer import prepare_missing_rows

    for number, split in enumerate(("train", "validation")):
        clips = [{"audio": Clip(10 * number + n), "text": f"{split} {n}."} for n in range(3)]
        write_parquet(tmp_path / "set", clips, split)
    paths = {"train_jsonl": tmp_path / "d" / "train.jsonl", "validation_jsonl": tmp_path / "d" / "validation.jsonl"}
    settings = make_settings(dataset_name=str(tmp_path / "set"), augment_copies=2, **paths)
    row_format = RowFormat.from_settings(settings, base.special_tokens())
    prepare_missing_rows(settings, row_format, base.codec_folder, "cpu", Processes())
    assert "audio" not in read_rows(paths["validation_jsonl"])[0]
    rows = open_training_rows(settings, base.codec_folder, row_format, "cpu")
    assert (len(rows.train), len(rows.validation)) == (9, 3)
    assert codes_of(encoded_path(paths["train_jsonl"], is_augmented=True)) == expected_with_copies(paths["train_jsonl"])


def test_encode_as_a_command(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What training needs is made ahead; the validation file gets no copies."""
    import data_processing

    train, validation = make_raw(3), make_raw(2, "validation.jsonl")
    for name, value in {
        "INIT_MODEL_PATH": "tiny-random", "DEVICE": "cpu", "MIXED_PRECISION": "no", "AUGMENT_COPIES": "2",
        "TRAIN_JSONL": str(train), "VALIDATION_JSONL": str(validation),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for arguments in ([], ["--input_jsonl", str(validation)]):
        monkeypatch.setattr("sys.argv", ["data_processing.py", "--mode", "encode", *arguments])
        data_processing.main()
    assert len(read_rows(encoded_path(validation))) == 2 and fake.take_num_clips() == 11
    rows = open_run(run_settings(make_settings, train, validation_jsonl=validation), base)
    assert len(rows.train) == 9 and fake.take_num_clips() == 0


# ---------------------------------------------------------------------------------------------- checks and references


def test_checks_do_not_take_copies_for_duplicates(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_raw(6)
    said = []
    for copies in (0, 3):
        settings = run_settings(make_settings, raw, augment_copies=copies, data_check="warn")
        rows = open_run(settings, base)
        capsys.readouterr()
        check_at_start(rows, settings)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "same" not in said[1]


def test_full_check_and_mending_leave_copies_out(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_raw(5)
    finished = encode(raw, base.codec_folder)
    mended = raw.with_name("mended.jsonl")
    check_jsonl(make_settings(), finished, Mending(mended, target_loudness_lufs=-30))
    said = capsys.readouterr().out
    assert "10 augmented copies are not looked at" in said and "as an earlier row" not in said
    report = json.loads(Path("data/report/report.json").read_text(encoding="utf-8"))
    assert "duplicate" not in json.dumps(report["findings"])
    assert [row["mood"]["number"] for row in read_rows(mended)] == list(range(5))
    assert not any("augmentation" in row for row in read_rows(mended))


def test_reference_is_chosen_among_clips_as_they_are(
    fake: FakeCodec, make_settings: MakeSettings, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_raw(tmp_path / "data", 6)
    for number in range(6):
        write_clip(raw.parent / f"train_clips/{number:02}.wav", number, seconds=6 + 0.1 * number)
    monkeypatch.setattr("finetuning.speakers.MAX_REFERENCE_CANDIDATES", 3)
    heard: list[str] = []
    listen = load_audio
    monkeypatch.setattr("finetuning.speakers.load_audio", lambda path: heard.append(path) or listen(path))
    chosen = []
    for copies in (0, 1):
        rows = open_run(run_settings(make_settings, raw, augment_copies=copies, augment_pitch_semitones=0), base)
        chosen.append(choose_reference(rows.train, "reference_speaker"))
    assert chosen[0] == chosen[1] and len(heard) == 6 and heard[:3] == heard[3:]


def test_resume_tells_other_copies_but_not_another_place_of_the_noise(
    make_settings: MakeSettings, noise_folder: Path, tmp_path: Path
) -> None:
    saved = make_settings(augment_copies=1, augment_noise_dir=noise_folder).public()
    shutil.copytree(noise_folder, tmp_path / "moved")
    moved = make_settings(augment_copies=1, augment_noise_dir=tmp_path / "moved")
    assert differing_settings(saved, moved) == []
    other = make_settings(augment_copies=2, augment_noise_dir=noise_folder)
    assert differing_settings(saved, other) == ["AUGMENT_COPIES was 1, is 2"]
