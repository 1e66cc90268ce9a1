"""Speaker vectors: the encoder's own, one a reference, averaged, rounded as exported; rows and references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import VOICE
from reference import load_stock

from finetuning.audio import load_audio
from finetuning.base_model import Base, load_model, resolve_base
from finetuning.codec_rows import allocate_codec_rows
from finetuning.errors import UserError
from finetuning.manifest import RowFormat
from finetuning.row_index import Manifest, open_rows
from finetuning.speakers import (
    choose_reference,
    find_references,
    prepare_speakers,
    speaker_vector,
)
from finetuning.tiny_model import embedded_model_folder

REFERENCE = VOICE / "english_voice.wav"
CODES = np.arange(6 * 16).reshape(6, 16) % 2048
SIX_SECONDS = [[1] * 16] * 75


@pytest.fixture(scope="module")
def loaded() -> SimpleNamespace:
    from finetuning.settings import load_settings

    base = resolve_base(load_settings({"init_model_path": "tiny-random"}, environment={}))
    return SimpleNamespace(base=base, model=load_model(base, "sdpa"))


@pytest.fixture
def manifest_of(write_jsonl: Callable[..., Path]) -> Callable[[list[dict]], Manifest]:
    def build(rows: list[dict]) -> Manifest:
        full = [
            {"text": f"Row {index}.", "audio_codes": (CODES + index).tolist(), **row} for index, row in enumerate(rows)
        ]
        return open_rows(write_jsonl(full), RowFormat(default_speaker="anna"), "TRAIN_JSONL")

    return build


def tone(path: Path, seconds: float, noise: float = 0.0, hertz: float = 200.0) -> str:
    """A syllable-like tone with pauses, and noise under all of it."""
    time = np.arange(int(24_000 * seconds)) / 24_000
    wave = 0.3 * np.sin(2 * np.pi * hertz * time) * (np.sin(2 * np.pi * 1.5 * time) > 0)
    wave += noise * np.random.default_rng(0).standard_normal(len(time))
    soundfile.write(path, wave, 24_000)
    return str(path)


def test_vector_equals_stock(loaded: Any) -> None:
    stock = load_stock(embedded_model_folder("tiny-random"))
    want = stock.model.extract_speaker_embedding(load_audio(REFERENCE), 24_000)
    assert torch.equal(speaker_vector(loaded.model, REFERENCE), want)


def test_different_voices_give_different_vectors(loaded: Any, tmp_path: Path) -> None:
    other = speaker_vector(loaded.model, tone(tmp_path / "tone.wav", 4))
    mine = speaker_vector(loaded.model, REFERENCE)
    assert (mine - other).norm() > 0.1 * mine.norm()


def test_mean_over_distinct_references_each_read_once(
    loaded: Any, manifest_of: Callable, make_settings: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tone(tmp_path / "tone.wav", 4)
    rows = [
        {"ref_audio": str(REFERENCE)},
        {"ref_audio": "tone.wav"},  # beside the JSONL
        {"ref_audio": str(tmp_path / "tone.wav")},
        {"ref_audio": str(REFERENCE), "speaker": "Ben"},
    ]
    read = []
    monkeypatch.setattr("finetuning.voice.load_audio", lambda path: read.append(str(path)) or load_audio(path))
    speakers = prepare_speakers(manifest_of(rows), loaded.model, loaded.base, make_settings())
    assert sorted(read) == sorted([str(REFERENCE), str(tmp_path / "tone.wav"), str(REFERENCE)])
    first, second = speaker_vector(loaded.model, REFERENCE), speaker_vector(loaded.model, tmp_path / "tone.wav")
    assert speakers.names == ["anna", "Ben"]
    assert speakers.codec_rows == [3000, 3001]
    assert speakers.vectors.dtype == torch.float32
    torch.testing.assert_close(speakers.vectors[0], (first + second) / 2)
    assert torch.equal(speakers.vectors[1], first)
    assert speakers.references[0] == [str(REFERENCE), str(tmp_path / "tone.wav")]


def test_ref_audio_path_serves_rows_that_name_none(
    loaded: Any, manifest_of: Callable, make_settings: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifest_of([{}, {}])
    settings = make_settings(ref_audio_path=str(REFERENCE))
    speakers = prepare_speakers(manifest, loaded.model, loaded.base, settings)
    assert torch.equal(speakers.vectors[0], speaker_vector(loaded.model, REFERENCE))
    assert capsys.readouterr().out == ""


def clips(tmp_path: Path, lengths_and_noise: list[tuple[float, float]]) -> list[dict]:
    rows = []
    for number, (seconds, noise) in enumerate(lengths_and_noise):
        codes = np.random.default_rng(number).integers(0, 2048, (round(seconds * 12.5), 16))
        rows.append(
            {"audio": tone(tmp_path / f"clip{number}.wav", seconds, noise), "audio_codes": codes.tolist()},
        )
    return rows


@pytest.mark.parametrize(
    ("made", "chosen"),
    [
        ([(6, 0.05), (7, 0.001), (9, 0.02), (20, 0.0), (2, 0.0)], 1),  # the cleanest of 5-10 s
        ([(2, 0.0), (12, 0.02), (15, 0.001), (40, 0.0)], 2),  # none there: the cleanest of 3-30 s
        ([(1, 0.0), (2.5, 0.01), (2, 0.0)], 1),  # none there either: the longest
    ],
)
def test_choice_of_a_reference(
    made: list, chosen: int, manifest_of: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifest_of(clips(tmp_path, made))
    assert choose_reference(manifest, "anna") == str(tmp_path / f"clip{chosen}.wav")
    assert f"clip{chosen}.wav" in capsys.readouterr().out


def test_a_reference_is_chosen_among_the_speakers_own_clips(manifest_of: Callable, tmp_path: Path) -> None:
    made = clips(tmp_path, [(7, 0.0), (6, 0.05), (6, 0.001), (7.5, 0.0)])
    made[0]["speaker"] = "Ben"
    made[3]["audio"] = "gone.wav"
    made.insert(0, {"speaker": "Ben"})
    manifest = manifest_of(made)
    assert choose_reference(manifest, "anna") == str(tmp_path / "clip2.wav")
    assert choose_reference(manifest.select(np.array([2, 1, 0])), "anna") == str(tmp_path / "clip1.wav")


def test_few_of_many_clips_are_looked_at(
    manifest_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3,000 clips of 6 s, of which the first 990 are gone, no more than these and 32 are looked for."""
    (made,) = clips(tmp_path, [(6, 0.001)])
    rows = [
        made | {"audio": made["audio"] if index >= 990 else "gone.wav", "audio_codes": SIX_SECONDS}
        for index in range(3000)
    ]
    rows[-1] = rows[-1] | {"audio_codes": SIX_SECONDS[1:]}  # all the same codes would be refused
    looked, read = [], []
    monkeypatch.setattr("finetuning.speakers.os.path.isfile", lambda path: looked.append(path) or Path(path).is_file())
    monkeypatch.setattr("finetuning.speakers.load_audio", lambda path: read.append(path) or load_audio(path))
    assert choose_reference(manifest_of(rows), "anna") == made["audio"]
    assert looked.count("gone.wav") == 990 and len(read) == 32
    assert len(looked) < 1100


def test_references_in_the_order_of_first_use(
    manifest_of: Callable, make_settings: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in "abcdefg":
        (tmp_path / f"{name}.wav").write_bytes(b"RIFF")
    used = ["d", "b", "d", "a", None, "c", "b", "g", "f"]
    rows = [{"ref_audio": f"{name}.wav"} if name else {} for name in used] + [{"ref_audio": "e.wav", "speaker": "Ben"}]
    manifest, settings = manifest_of(rows), make_settings(ref_audio_path=REFERENCE)
    found = find_references(manifest, ["anna", "Ben"], settings)
    assert found["anna"] == [str(tmp_path / f"{name}.wav") for name in "dbacgf"] + [str(REFERENCE)]
    assert found["Ben"] == [str(tmp_path / "e.wav")] and "references" not in capsys.readouterr().out
    turned = manifest.select(np.arange(len(manifest))[::-1])
    assert find_references(turned, ["anna"], settings)["anna"][:-1] == [str(tmp_path / f"{n}.wav") for n in "fgbcad"]
    monkeypatch.setattr("finetuning.speakers.MAX_REFERENCES", 3)
    found = find_references(manifest, ["anna", "Ben"], settings)
    assert found["anna"] == [str(tmp_path / f"{name}.wav") for name in "daf"] + [str(REFERENCE)]
    assert 'speaker "anna" has 6 references; its vector is the mean over 3 of them' in capsys.readouterr().out


def test_no_reference_to_be_had(manifest_of: Callable) -> None:
    with pytest.raises(UserError, match="REF_AUDIO_PATH"):
        choose_reference(manifest_of([{"audio": "gone.wav"}, {}]), "anna")


def test_unusable_reference_is_named(loaded: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"no audio")
    with pytest.raises(UserError, match=r"bad\.wav"):
        speaker_vector(loaded.model, bad)


def config_with(base: Base, **talker: Any) -> dict:
    return {**base.config, "talker_config": {**base.talker_config, **talker}}


def test_rows_avoid_every_id_of_the_configuration(loaded: Any) -> None:
    taken = {"a": 3010, "b": 3061, "c": 3001, "d": 2861}
    config = config_with(loaded.base, spk_id=taken, codec_language_id={"hausa": 3003, "english": 2050})
    rows = allocate_codec_rows(config, 12)
    assert rows[:3] == [3000, 3002, 3004]
    assert not {3001, 3003, 3010} & set(rows)
    with pytest.raises(UserError, match=r"69 speakers, but .* 68 free rows"):
        allocate_codec_rows(config, 69)


def with_config(base: Base, config: dict) -> Base:
    return Base(base.name, base.folder, config, base.codec_folder)


def test_a_presets_name_is_refused(loaded: Any, manifest_of: Callable, make_settings: Callable) -> None:
    base = with_config(loaded.base, config_with(loaded.base, spk_id={"vivian": 3065}))
    with pytest.raises(UserError, match="Vivian"):
        prepare_speakers(manifest_of([{"speaker": "Vivian"}, {}]), loaded.model, base, make_settings())


def test_custom_voice_base(loaded: Any, manifest_of: Callable, make_settings: Callable) -> None:
    """Its own speakers go on with their stored vectors; others cannot get one, and the message says what to do."""
    config = config_with(loaded.base, spk_id={"vivian": 3065}) | {"tts_model_type": "custom_voice"}
    base = with_config(loaded.base, config)
    speakers = prepare_speakers(
        manifest_of([{"speaker": "Vivian"}, {"speaker": "Vivian"}]), loaded.model, base, make_settings()
    )
    assert speakers.codec_rows == [3065]
    assert torch.equal(speakers.vectors[0], loaded.model.talker.model.codec_embedding.weight[3065])
    with pytest.raises(UserError, match=r'speaker "anna" .* Base model.* vivian'):
        prepare_speakers(manifest_of([{}, {}]), loaded.model, base, make_settings())
