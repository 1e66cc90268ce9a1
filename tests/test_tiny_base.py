"""The embedded model that speaks, as it ships: it loads, it is understood, and it learns a voice; nothing is made here
that is not measured against espeak-ng's own clips of the same sentences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT

from embedded.demo import nearest
from embedded.measures import averages, compare
from finetuning import tiny_model
from finetuning.audio import load_audio
from finetuning.closeness import closeness
from finetuning.disk import bytes_of, check_is_whole
from finetuning.errors import UserError

VOICE = PROJECT / "voices" / "demo_voice"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Sentences that neither the base nor the demo was trained on, with ``waveform``."""
    lines = (VOICE / "test_raw.jsonl").read_text(encoding="utf-8").splitlines()
    return [row | {"waveform": load_audio(VOICE / row["audio"])} for row in map(json.loads, lines)]


def test_what_ships_is_small_and_whole() -> None:
    assert bytes_of(tiny_model.SPEAKING_BASE) <= 40_000_000
    assert bytes_of(VOICE / "clips") <= 6_000_000  # beside them a run leaves their codes
    assert tiny_model.embedded_model_folder("tiny") == tiny_model.SPEAKING_BASE
    check_is_whole(VOICE, "voices")
    clips = len((VOICE / "train_raw.jsonl").read_text(encoding="utf-8").splitlines())
    assert 60 <= clips <= 100 and clips == len(list((VOICE / "clips").glob("train-*.flac")))


@pytest.mark.parametrize("damage", ["missing", "cut", "unsealed"])
def test_a_half_written_base_is_recognised(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(tiny_model.SPEAKING_BASE, tmp_path / "base")
    weights = folder / "speech_tokenizer" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        {"missing": weights, "unsealed": folder / "checksums.json"}[damage].unlink()
    monkeypatch.setattr(tiny_model, "SPEAKING_BASE", folder)
    with pytest.raises(UserError, match=r"the embedded model tiny, is damaged: .*git checkout"):
        tiny_model.embedded_model_folder("tiny")


def test_the_codec_keeps_words_voice_and_pitch_of_a_voice_it_never_heard(rows: list[dict[str, Any]]) -> None:
    from finetuning.codec import Codec

    codec = Codec(tiny_model.SPEAKING_BASE / "speech_tokenizer")
    waveforms = [row["waveform"] for row in rows]
    codes = codec.encode(waveforms)
    figures = averages([compare(*pair) for pair in zip(waveforms, codec.decode(codes), strict=True)])
    assert figures["stoi"] > 0.7 and figures["voicing_kept"] > 0.7 and figures["f0_error"] < 0.05
    assert not np.concatenate(codes)[:, 6:].any()  # the levels that carry nothing


def test_the_base_says_what_it_is_told(rows: list[dict[str, Any]]) -> None:
    from finetuning.stock import import_qwen_tts

    stock = import_qwen_tts().Qwen3TTSModel.from_pretrained(str(tiny_model.SPEAKING_BASE), dtype=torch.float32)
    prompt = stock.create_voice_clone_prompt(str(VOICE / "clips" / "train-01.flac"), None, x_vector_only_mode=True)
    options = {"language": "English", "voice_clone_prompt": prompt, "max_new_tokens": 100}
    recordings, right = [row["waveform"] for row in rows], 0
    for number, row in enumerate(rows):
        torch.manual_seed(number)
        spoken = stock.generate_voice_clone(row["text"], non_streaming_mode=False, **options)[0][0]
        assert len(spoken) < 99 * 1920  # it stops by itself
        right += nearest(spoken, recordings) == number
    assert right >= 0.5 * len(rows)  # 7 to 8 of 10 were measured; by chance it is 1


def test_a_short_demo_comes_nearer_to_the_voice(
    rows: list[dict[str, Any]], tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    import train
    from finetuning.settings import load_settings

    absolute = [{"audio": str(VOICE / row["audio"]), "text": row["text"]} for row in rows[:3]]
    environment = {"ENV_FILE": str(PROJECT / ".env.demo"), "NUM_EPOCHS": "3", "OUTPUT_DIR": str(tmp_path / "out")}
    environment |= {"COMPARE_JSONL": str(write_jsonl(absolute)), "SAMPLE_STEPS": "0"}
    train.train(load_settings(environment=environment))
    folder = tmp_path / "out" / "comparison"
    figures = json.loads((folder / "comparison.json").read_text())["figures"]
    assert figures["after"]["similarity_to_coded"] > figures["before"]["similarity_to_coded"]
    for name in ("timbre_distance_db", "timbre_distance_to_coded_db"):
        assert figures["after"][name] < figures["before"][name]
    assert figures["after"]["f0_error"] < 0.05
    own = closeness(load_audio(folder / "01-recording.wav"), load_audio(folder / "01-after.wav"))
    assert own["spectral_distance"] < 1.5
