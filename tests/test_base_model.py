"""Finding and checking the base, and choosing the hardware."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPES, VOICE

from finetuning.audio import load_audio
from finetuning.base_model import (
    choose_attention,
    choose_device,
    load_model,
    load_speaker_encoder,
    load_tokenizer,
    resolve_base,
)
from finetuning.errors import UserError
from finetuning.settings import load_settings
from finetuning.tiny_model import SHAPES as WIDTHS
from finetuning.tiny_model import embedded_model_folder


@pytest.fixture
def edited_base(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny base without weights, with an edited config.json."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(embedded_model_folder("tiny-random"), folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make


@pytest.mark.parametrize("shape", SHAPES)
def test_loads_fp32_without_a_codec(shape: str, make_settings: Callable) -> None:
    base = resolve_base(make_settings(init_model_path=shape))
    model = load_model(base, "sdpa")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.speech_tokenizer is None
    assert base.has_speaker_encoder
    assert base.model_size == ("0b6" if shape.endswith("0.6b") else "1b7")


def test_shapes_of_the_embedded_models(make_settings: Callable) -> None:
    first, small = (resolve_base(make_settings(init_model_path=name)).talker_config for name in SHAPES)
    assert first["text_hidden_size"] == first["hidden_size"]
    assert small["text_hidden_size"] != small["hidden_size"]
    assert small["code_predictor_config"]["hidden_size"] != small["hidden_size"]


def test_role_words_are_single_tokens() -> None:
    tokenizer = load_tokenizer(embedded_model_folder("tiny-random"))
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in ("assistant", "user", "\n"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "no Qwen3-TTS model"),
        ({"tokenizer_type": "qwen3_tts_tokenizer_25hz"}, "25hz.*12 Hz models only"),
        ({"tts_model_type": "voice_design"}, "voice_design"),
    ],
)
def test_other_models_are_refused(changes: dict, message: str, edited_base: Callable, make_settings: Callable) -> None:
    with pytest.raises(UserError, match=message):
        resolve_base(make_settings(init_model_path=str(edited_base(**changes))))


def test_incomplete_folder_is_refused(edited_base: Callable, make_settings: Callable) -> None:
    folder = edited_base()
    (folder / "merges.txt").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"incomplete: no merges\.txt, model\.safetensors"):
        resolve_base(make_settings(init_model_path=str(folder)))


def test_a_base_without_optional_files_is_whole(edited_base: Callable, make_settings: Callable) -> None:
    """Stock needs no preprocessor_config.json; the tokenizer is the same without it."""
    folder = edited_base()
    (folder / "preprocessor_config.json").unlink()
    base = resolve_base(make_settings(init_model_path=str(folder)))
    text = "My iPhone, please."
    with_file = load_tokenizer(embedded_model_folder("tiny-random"))
    assert load_tokenizer(base.folder)(text)["input_ids"] == with_file(text)["input_ids"]


def lfs_pointer(folder: Path) -> None:
    """What `git clone` leaves without Git LFS."""
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def codec_pointer(folder: Path) -> None:
    (folder / "speech_tokenizer" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def config_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_talker(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["talker_config"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lfs_pointer, r"weights in .* cannot be read .*Git LFS pointer"),
        (missing_shard, r"not whole: no model-00002-of-00002\.safetensors"),
        (codec_pointer, r"speech_tokenizer/model\.safetensors cannot be read"),
        (config_list, r"config\.json is not a JSON object"),
        (no_talker, r"config\.json lacks 'talker_config'"),
    ],
)
def test_damaged_bases_are_one_message(
    damage: Callable, message: str, edited_base: Callable, make_settings: Callable
) -> None:
    folder = edited_base()
    damage(folder)
    with pytest.raises(UserError, match=message):
        resolve_base(make_settings(init_model_path=str(folder)))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "nowhere"])
def test_missing_folder(name: str, make_settings: Callable) -> None:
    with pytest.raises(UserError, match=r"INIT_MODEL_PATH: .* is not a folder"):
        resolve_base(make_settings(init_model_path=name))


def test_hub_out_of_reach(make_settings: Callable) -> None:
    with pytest.raises(UserError, match=r"INIT_MODEL_PATH: Qwen/Missing .* local folder"):
        resolve_base(make_settings(init_model_path="Qwen/Missing"))
    with pytest.raises(UserError, match=r"DATA_MODE=none downloads nothing"):
        resolve_base(make_settings(init_model_path="Qwen/Missing", data_mode="none"))


def test_tokenizer_path(make_settings: Callable, tmp_path: Path) -> None:
    codec = embedded_model_folder("tiny-random-0.6b") / "speech_tokenizer"
    assert resolve_base(make_settings(tokenizer_path=str(codec))).codec_folder == codec
    with pytest.raises(UserError, match="no speech tokenizer"):
        resolve_base(make_settings(tokenizer_path=str(tmp_path)))


def test_hardware_that_is_not_there(make_settings: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="DEVICE: cuda"):
        choose_device(make_settings(device="cuda"))
    with pytest.raises(UserError, match="MIXED_PRECISION: fp16 needs a CUDA GPU"):
        choose_device(make_settings(device="cpu", mixed_precision="fp16"))
    with pytest.raises(UserError, match="ATTN_IMPLEMENTATION: flash_attention_2"):
        choose_attention(make_settings(attn_implementation="flash_attention_2"), "cpu")
    assert choose_attention(make_settings(), "cpu") == "sdpa"
    assert choose_attention(make_settings(attn_implementation="eager"), "cpu") == "eager"


def test_a_gpu_without_bf16(make_settings: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match=r"MIXED_PRECISION: .*fp16 or no"):
        choose_device(make_settings(device="cuda", mixed_precision="bf16"))


def test_embedded_models_are_small_and_deterministic(tmp_path: Path) -> None:
    for name in WIDTHS:
        built, again = (embedded_model_folder(name, cache_folder=tmp_path / part) for part in ("first", "second"))
        files = [path.relative_to(built) for path in built.rglob("*") if path.is_file()]
        assert sum((built / file).stat().st_size for file in files) < 40e6
        assert all((built / file).read_bytes() == (again / file).read_bytes() for file in files)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_speaker_encoder_alone_hears_what_the_whole_model_hears(shape: str) -> None:
    base = resolve_base(load_settings({"init_model_path": shape}, environment={}))
    waveform = load_audio(VOICE / "clips" / "train_01.flac")
    expected = load_model(base, "eager").extract_speaker_embedding(waveform, 24_000).numpy()
    np.testing.assert_allclose(load_speaker_encoder(base)(waveform), expected, rtol=1e-5, atol=1e-6)
