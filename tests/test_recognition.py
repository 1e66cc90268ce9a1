"""The judges from outside: models of a few weights, saved to folders as real ones are, for the plumbing alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, VOICE
from fakes import means_of
from torch import nn

from finetuning.audio import load_audio
from finetuning.errors import UserError
from finetuning.listening import Spoken, Yardstick
from finetuning.recognition import judge_stamps, load_opinion, load_recognizer

pytestmark = pytest.mark.usefixtures("one_thread")

LANGUAGES = ("en", "ha")


@pytest.fixture(scope="module")
def waveform() -> np.ndarray:
    return load_audio(VOICE / "clips" / "train_01.flac")


@pytest.fixture(scope="module")
def ctc_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wav2Vec2 recogniser that always understands "a"."""
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    folder = tmp_path_factory.mktemp("ctc")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5, "b": 6}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    config = Wav2Vec2Config(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_kernel=(20, 16), conv_stride=(20, 16), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, pad_token_id=0,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.eye(7)[5])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multilingual Whisper of random weights, which hears at most 1 s at once."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    folder = tmp_path_factory.mktemp("whisper")
    vocabulary = {character: number for number, character in enumerate(bytes_to_unicode().values())}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    languages = [f"<|{language}|>" for language in LANGUAGES]
    specials = ["<|startoftranscript|>", *languages, "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(51)], special_tokens=False)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in [*specials, "<|endoftext|>"]}
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    start, end = ids["<|startoftranscript|>"], ids["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_source_positions=50, max_target_positions=24, decoder_start_token_id=start, bos_token_id=end,
        eos_token_id=end, pad_token_id=end, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # with some weights it finds each clip to end where it began, and listens to it for ever
        model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        is_multilingual=True,
        lang_to_id={language: ids[language] for language in languages},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        max_initial_timestamp_index=50,
        max_length=16,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------- speech recognition


def test_word_errors_end_to_end(ctc_folder: Path, waveform: np.ndarray) -> None:
    recognize = load_recognizer(str(ctc_folder), "cpu")
    assert recognize([waveform, waveform[:12_000]]) == ["a", "a"]
    yardstick = Yardstick(None, {}, {}, recognize, None)
    figures = means_of([Spoken("A!", "x", waveform, 26, True), Spoken("Bab a", "x", waveform, 26, True)], yardstick)
    assert figures["wer"] == pytest.approx((0 + 1 / 2) / 2)
    assert figures["cer"] == pytest.approx((0 + 3 / 4) / 2)


def test_clips_reach_the_model_alone_and_at_its_rate(ctc_folder: Path, waveform: np.ndarray, tmp_path: Path) -> None:
    heard: list[tuple[int, ...]] = []
    recognize = load_recognizer(str(ctc_folder), "cpu")
    recognize.pipeline.model.register_forward_pre_hook(
        lambda module, arguments, options: heard.append(tuple(options["input_values"].shape)), with_kwargs=True
    )
    recognize([waveform, waveform[:12_000]])
    assert heard == [(1, round(len(waveform) * 16 / 24)), (1, 8000)]


def test_whisper_understands_long_and_short_clips(whisper_folder: Path, waveform: np.ndarray) -> None:
    """Random words, but the same ones each time, and nothing is drawn from training's generators."""
    state = torch.random.get_rng_state()
    recognize = load_recognizer(str(whisper_folder), "cpu", "English")
    texts = recognize([waveform[:20_000], waveform])
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    assert not any(token in text for text in texts for token in ("<|en|>", "<|transcribe|>"))
    assert texts == recognize([waveform[:20_000], waveform])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("language", "options", "said"),
    [
        (None, {"task": "transcribe"}, ""),
        ("Auto", {"task": "transcribe"}, ""),
        ("English", {"task": "transcribe", "language": "en"}, ""),
        ("ha", {"task": "transcribe", "language": "ha"}, ""),
        ("Klingon", {"task": "transcribe"}, "does not know Klingon"),
        ("Yoruba", {"task": "transcribe"}, "does not know Yoruba"),  # Whisper does, this model does not
    ],
)
def test_whisper_is_told_the_language(
    whisper_folder: Path, language: str | None, options: dict, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recognize = load_recognizer(str(whisper_folder), "cpu", language)
    assert recognize.options == options | {"num_beams": 1}
    assert said in capsys.readouterr().out


def test_language_reaches_generate(whisper_folder: Path, waveform: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    recognize = load_recognizer(str(whisper_folder), "cpu", "Hausa")
    asked: list[dict[str, Any]] = []
    generate = recognize.pipeline.model.generate
    monkeypatch.setattr(
        recognize.pipeline.model, "generate", lambda **options: (asked.append(options), generate(**options))[1]
    )
    recognize([waveform[:20_000], waveform])
    pieces = math.ceil(len(waveform) * 16 / 24 / recognize.pipeline.feature_extractor.n_samples)
    assert pieces > 1
    assert [(of["language"], of["task"]) for of in asked] == [("ha", "transcribe")] * (1 + pieces)


def test_other_models_are_told_no_language(ctc_folder: Path) -> None:
    assert load_recognizer(str(ctc_folder), "cpu", "English").options == {}


def rewrite(folder: Path, target: Path, leave_out: str = "", **changes: Any) -> str:
    """A copy of a model's folder with another config.json, or without a file."""
    target.mkdir()
    for file in folder.iterdir():
        if file.name != leave_out:
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"architectures": ["Wav2Vec2ForPreTraining"]}, "no speech recogniser (Wav2Vec2ForPreTraining)"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "no speech recogniser (BertForMaskedLM)"),
        ({"architectures": None, "model_type": "unheard-of"}, "no speech recogniser (unheard-of)"),
        ({"leave_out": "preprocessor_config.json"}, "cannot be loaded"),
        ({"leave_out": "model.safetensors"}, "cannot be loaded"),
        ({"leave_out": "vocab.json"}, "cannot be loaded"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_model_that_recognises_nothing(ctc_folder: Path, tmp_path: Path, changes: dict, what: str) -> None:
    with pytest.raises(UserError) as error:
        load_recognizer(rewrite(ctc_folder, tmp_path / "model", **changes), "cpu")
    assert str(error.value).startswith("ASR_MODEL: ") and what in str(error.value)
    assert "name another one" in str(error.value) or "name a model" in str(error.value)


def test_folder_without_a_model_and_names_of_nothing(tmp_path: Path) -> None:
    for name, what in (
        (str(tmp_path), "holds no model"),
        (str(tmp_path / "none"), "is not a folder"),
        ("whisper", "is not a folder"),
        ("tiny-random", "no speech recogniser"),
    ):
        with pytest.raises(UserError, match=r"^ASR_MODEL: ") as error:
            load_recognizer(name, "cpu")
        assert what in str(error.value)


def test_nothing_is_downloaded_without_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"ASR_MODEL: owner/model .* DATA_MODE=none downloads nothing"):
        load_recognizer("owner/model", "cpu", may_download=False)
    fake_package(monkeypatch, "utmos_pytorch")
    with pytest.raises(UserError, match=r"weights of utmos .*DATA_MODE=none downloads nothing"):
        load_opinion("utmos", "cpu", may_download=False)


def test_only_what_is_needed_is_fetched(
    ctc_folder: Path, waveform: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recognisers on the Hub often hold their weights four times."""
    from huggingface_hub.utils import filter_repo_objects

    patterns: list[str] = []

    def snapshot_download(repository: str, local_files_only: bool, allow_patterns: Any) -> str:
        patterns.extend(allow_patterns)
        return str(ctc_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_recognizer("owner/model", "cpu")([waveform]) == ["a"]
    unneeded = ["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "model.fp32-00001-of-00002.safetensors"]
    needed = [file.name for file in ctc_folder.iterdir()] + ["model-00001-of-00002.safetensors", "normalizer.json"]
    assert list(filter_repo_objects([*needed, *unneeded, "README.md"], allow_patterns=patterns)) == needed


# ------------------------------------------------------------------------------------------------- opinion scores


class Level(nn.Module):
    """Stands for a predictor: the number of samples that it hears, in seconds at 16 kHz, plus the loudest."""

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        return waveforms.shape[1] / 16_000 + waveforms.abs().amax(dim=1)


def fake_package(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
    for parent in name.split(".")[:-1]:
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)


def test_scores_of_a_torchscript_file(tmp_path: Path, waveform: np.ndarray) -> None:
    torch.jit.save(torch.jit.script(Level()), str(tmp_path / "level.pt"))
    wanted = len(waveform) / 24_000 + np.abs(waveform).max()
    assert load_opinion(str(tmp_path / "level.pt"), "cpu")(waveform) == pytest.approx(wanted, abs=0.02)


def test_scores_of_the_packages(monkeypatch: pytest.MonkeyPatch, waveform: np.ndarray) -> None:
    """As their documentation calls them (the packages themselves were tried by hand)."""

    class Utmos(Level):
        def __init__(self, ckpt_path: str, device: str) -> None:
            super().__init__()
            assert (ckpt_path, device) == ("weights.pt", "cpu")

    def run(sample: np.ndarray, sr: int) -> dict[str, np.float64]:
        assert sr == 16_000 and np.abs(sample).max() <= 1.0
        return {"ovrl_mos": np.float64(len(sample) / sr + np.abs(sample).max()), "p808_mos": np.float32(0)}

    fake_package(monkeypatch, "distillmos", ConvTransformerSQAModel=Level)
    fake_package(monkeypatch, "utmos_pytorch", UTMOSScoreTorch=Utmos)
    fake_package(monkeypatch, "speechmos.dnsmos", run=run)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: "weights.pt")
    wanted = len(waveform) / 24_000 + np.abs(waveform).max()
    for name in ("distillmos", "dnsmos", "utmos"):
        score = load_opinion(name, "cpu")(waveform)
        assert type(score) is float and score == pytest.approx(wanted, abs=0.02)
    assert load_opinion("dnsmos", "cpu")(waveform * 100) <= len(waveform) / 24_000 + 1.001


@pytest.mark.parametrize(
    ("name", "package"), [("distillmos", "distillmos"), ("dnsmos", "speechmos"), ("utmos", "utmos-pytorch")]
)
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    for module in ("distillmos", "speechmos", "speechmos.dnsmos", "utmos_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"MOS_MODEL: {name} needs the package {package}, .*--extra mos"):
        load_opinion(name, "cpu")


def test_file_that_is_no_predictor(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UserError, match=r"MOS_MODEL: .*notes\.txt is no TorchScript file"):
        load_opinion(str(tmp_path / "notes.txt"), "cpu")
    with pytest.raises(UserError, match=r"MOS_MODEL: .*none is neither a file nor one of distillmos, dnsmos, utmos"):
        load_opinion(str(tmp_path / "none"), "cpu")


def test_loading_draws_nothing_from_trainings_generators(monkeypatch: pytest.MonkeyPatch, ctc_folder: Path) -> None:
    fake_package(monkeypatch, "distillmos", ConvTransformerSQAModel=lambda: nn.Linear(4, 4))
    state = torch.random.get_rng_state()
    load_opinion("distillmos", "cpu")
    load_recognizer(str(ctc_folder), "cpu")([np.zeros(24_000, np.float32)])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_settings_name_the_predictors_that_are_there(make_settings: Callable) -> None:
    from finetuning.recognition import _MOS_PACKAGES
    from finetuning.settings import MOS_MODELS

    assert set(_MOS_PACKAGES) == set(MOS_MODELS)
    assert make_settings(mos_model="distillmos").mos_model == "distillmos"


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("MOS_MODEL=distillmos", "--extra mos"),
        ("export MOS_MODEL = 'utmos'", "--extra mos"),
        ("MOS_MODEL=dnsmos\nOPTIMIZER=adamw_8bit", "--extra 8bit --extra mos"),
        ("MOS_MODEL=", ""),
        ("MOS_MODEL=predictor.pt", ""),
        ("# MOS_MODEL=utmos", ""),
    ],
)
def test_the_command_installs_the_predictors_where_one_is_asked_for(tmp_path: Path, line: str, options: str) -> None:
    (tmp_path / "my.env").write_text(f"NAME=value\n{line}\nOTHER=\n")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "source scripts/install.sh; extras_for_settings"],
        cwd=PROJECT, env={"PATH": "/usr/bin:/bin", "ENV_FILE": str(tmp_path / "my.env")}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == options.split()


def test_stamps_of_judges_change_with_their_files(tmp_path: Path, make_settings: Any) -> None:
    folder, script = tmp_path / "asr", tmp_path / "mos.pt"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    script.write_bytes(b"one")
    settings = make_settings(asr_model=str(folder), mos_model=str(script))
    before = judge_stamps(settings)
    assert before == judge_stamps(settings) == json.loads(json.dumps(before))
    (folder / "config.json").write_text("{ }")
    assert (after := judge_stamps(settings))[0] != before[0] and after[1] == before[1]
    script.write_bytes(b"another")
    assert judge_stamps(settings)[1] != before[1]
    named = make_settings(asr_model="owner/model", mos_model="distillmos")
    assert judge_stamps(named)[0] == ["owner/model"] and judge_stamps(named)[1][0] == "distillmos"
    assert judge_stamps(make_settings()) == [[None], [None]]
