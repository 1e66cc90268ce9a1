"""The optional judges of speech: a speech recogniser (ASR_MODEL) and a predictor of opinion scores (MOS_MODEL).

Both are other people's models, loaded when they are asked for, and neither changes anything that training computes: no
random number is drawn from its generators.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetuning.audio import SAMPLE_RATE_HZ, resample
from finetuning.base_model import resolve_folder
from finetuning.console import say
from finetuning.disk import files_of
from finetuning.errors import UserError
from finetuning.settings import MOS_MODELS, Settings
from finetuning.stock import quiet_transformers

#: What is fetched of a recogniser on the Hub: not the same weights once more for other frameworks, or in fp32.
ASR_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "normalizer.json", "*.model",
    "feature_extractor*", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
)  # fmt: skip
#: The pipeline's default is five beams, which takes several times as long.
GREEDY = {"num_beams": 1}
#: All predictors of opinion scores listen at this rate.
MOS_RATE_HZ = 16_000
#: Where the package utmos-pytorch has its weights.
_UTMOS_WEIGHTS = ("Blinorot/UTMOS-PyTorch", "utmos_state_dict.pt")
#: Predictor -> (module to import, package to install).
_MOS_PACKAGES = {
    "distillmos": ("distillmos", "distillmos"),
    "dnsmos": ("speechmos.dnsmos", "speechmos"),
    "utmos": ("utmos_pytorch", "utmos-pytorch"),
}

#: Weights of a predictor on the GPU: UTMOS is wav2vec 2.0 base, in fp32.
_MOS_BYTES = {"distillmos": 20_000_000, "utmos": 400_000_000}

Recognize = Callable[[Sequence[np.ndarray]], list[str]]
Opinion = Callable[[np.ndarray], float]


# ---------------------------------------------------------------------------------------------- speech recognition


@dataclass(frozen=True)
class _Recognizer:
    """Calls transformers' pipeline clip by clip: clips of a batch would be padded, and understood otherwise.

    Attributes:
        pipeline: ``AutomaticSpeechRecognitionPipeline``.
        options: of ``generate``; none for CTC, which does not generate.
    """

    pipeline: Any
    options: dict[str, Any]

    def to(self, device: str) -> None:
        """Moves the model: away from the device that it was loaded for, and back before it is asked again."""
        self.pipeline.model.to(device)

    def __call__(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        """(num_samples,) float32 at 24 kHz each -> what was understood."""
        with quiet_transformers(), _apart_from_training():
            return [self._one(waveform) for waveform in waveforms]

    def _one(self, waveform: np.ndarray) -> str:
        extractor = self.pipeline.feature_extractor
        clip = resample(waveform, SAMPLE_RATE_HZ, extractor.sampling_rate)
        options: dict[str, Any] = {"generate_kwargs": self.options} if self.options else {}
        # Whisper hears 30 s at once. Its own way through longer clips goes on by the times that it predicts, and never
        # ends where it predicts none; so it gets them in equal pieces.
        num_pieces = 1
        if self.pipeline.type == "seq2seq_whisper":
            num_pieces = max(1, math.ceil(len(clip) / extractor.n_samples))
        pieces = [
            self.pipeline({"raw": piece, "sampling_rate": extractor.sampling_rate}, **options)["text"].strip()
            for piece in np.array_split(clip, num_pieces)
        ]
        return " ".join(pieces)


def check_judges(settings: Settings) -> None:
    """Looks for what ASR_MODEL and MOS_MODEL name, before anything is prepared or removed.

    Raises:
        UserError: it is not there, cannot be loaded, or is something else.
    """
    if settings.asr_model:
        folder = resolve_folder(settings.asr_model, "ASR_MODEL", settings.data_mode != "none", ASR_FILES)
        _recognizer_class(settings.asr_model, folder)
    if settings.mos_model in MOS_MODELS:
        _import_predictor(settings.mos_model)
    elif settings.mos_model:
        _scripted(Path(settings.mos_model).expanduser(), "cpu")


def try_judges(settings: Settings) -> None:
    """Loads what ASR_MODEL and MOS_MODEL name, on the CPU, and lets go of it.

    Raises:
        UserError: one of them is not there, or cannot be loaded.
    """
    may_download = settings.data_mode != "none"
    if settings.asr_model:
        load_recognizer(settings.asr_model, "cpu", None, may_download)
    if settings.mos_model:
        load_opinion(settings.mos_model, "cpu", may_download)


def judge_bytes(settings: Settings) -> int:
    """What the judges of ASR_MODEL and MOS_MODEL take on a GPU at most: a recogniser that is stored in fp32 takes half.

    Raises:
        UserError: see ``check_judges``.
    """
    files: list[Path] = []
    if settings.asr_model:
        folder = resolve_folder(settings.asr_model, "ASR_MODEL", settings.data_mode != "none", ASR_FILES)
        files += folder.glob("model*.safetensors")
    if settings.mos_model and settings.mos_model not in MOS_MODELS:
        files.append(Path(settings.mos_model).expanduser())
    return sum(file.stat().st_size for file in files) + _MOS_BYTES.get(settings.mos_model or "", 0)


def judge_stamps(settings: Settings) -> list[Any]:
    """JSON values that are others as soon as ASR_MODEL or MOS_MODEL judges otherwise: the names, of a local folder or
    file sizes and times, of a package its version. Models of the Hub count as what they are called."""
    return [_stamp(name) for name in (settings.asr_model, settings.mos_model)]


def _stamp(name: str | None) -> list[Any]:
    if name in _MOS_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            return [name, version(_MOS_PACKAGES[name][1])]
    path = Path(name or "").expanduser()
    files = [path] if path.is_file() else files_of(path) if name and path.is_dir() else []
    stats = [(file, file.stat()) for file in files]
    return [name, *([str(file), status.st_size, status.st_mtime_ns] for file, status in stats)]


def load_recognizer(name: str, device: str, language: str | None = None, may_download: bool = True) -> Recognize:
    """The speech recogniser that ASR_MODEL names; on a GPU in half precision.

    Args:
        name: Hub id or local folder of a transformers model for CTC or sequence-to-sequence speech recognition.
        language: that is spoken, by English name or code, where it is known; "Auto" counts as None. Only multilingual
            Whisper models are told; where they do not know it, or it is None, they guess.
        may_download: False where DATA_MODE=none; then it must be in a folder or in the local cache.

    Returns:
        waveforms ((num_samples,) float32 at 24 kHz) -> texts as the model writes them.

    Raises:
        UserError: it is not there, cannot be loaded, or recognises no speech.
    """
    folder = resolve_folder(name, "ASR_MODEL", may_download, ASR_FILES)
    model_class = _recognizer_class(name, folder)
    from transformers import AutoFeatureExtractor, AutomaticSpeechRecognitionPipeline, AutoTokenizer

    try:
        with quiet_transformers(), _apart_from_training():
            extractor = AutoFeatureExtractor.from_pretrained(str(folder))
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
            model = model_class.from_pretrained(str(folder), dtype=_precision(device), use_safetensors=True)
            pipeline = AutomaticSpeechRecognitionPipeline(
                model=model.to(device).eval(), tokenizer=tokenizer, feature_extractor=extractor, device=device
            )
    except Exception as error:  # whatever another model's files make transformers say
        raise UserError(
            f"ASR_MODEL: {name} cannot be loaded ({_first_line(error)}); it needs config.json, model.safetensors, "
            "preprocessor_config.json and the files of its tokenizer; name another one, or unset ASR_MODEL"
        ) from None
    return _Recognizer(pipeline, {} if pipeline.type == "ctc" else GREEDY | _told(name, model, language))


def _recognizer_class(name: str, folder: Path) -> Any:
    """The auto class for the architecture that config.json names.

    Not for its model type: wav2vec2 weights without a head for CTC would be given a random one.
    """
    from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CTC_MAPPING_NAMES,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )

    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, architectures = config.get("model_type"), config.get("architectures") or []
    except (OSError, ValueError, AttributeError):
        raise UserError(f"ASR_MODEL: {folder} holds no model (no readable config.json); name another one") from None
    kinds = (
        (MODEL_FOR_CTC_MAPPING_NAMES, AutoModelForCTC),
        (MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, AutoModelForSpeechSeq2Seq),
    )
    for names, model_class in kinds:
        if names.get(kind) in architectures:
            return model_class
    what = ", ".join(map(str, architectures)) or kind
    raise UserError(
        f"ASR_MODEL: {name} is no speech recogniser ({what}); name a model for CTC or sequence-to-sequence speech "
        "recognition, such as openai/whisper-large-v3-turbo"
    )


def _told(name: str, model: Any, language: str | None) -> dict[str, str]:
    """What a multilingual Whisper model is told; nothing else takes a language."""
    config = getattr(model, "generation_config", None)
    if model.config.model_type != "whisper" or not getattr(config, "is_multilingual", False):
        return {}
    if language is None or language.lower() == "auto":
        return {"task": "transcribe"}
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    if f"<|{code}|>" not in getattr(config, "lang_to_id", {}):
        say(f"ASR_MODEL: {name} does not know {language}; it guesses the language of each sample")
        return {"task": "transcribe"}
    return {"task": "transcribe", "language": code}


def _precision(device: str) -> torch.dtype:
    return torch.float16 if device.startswith("cuda") else torch.float32


# ------------------------------------------------------------------------------------------------- opinion scores


def load_opinion(name: str, device: str, may_download: bool = True) -> Opinion:
    """The predictor of opinion scores that MOS_MODEL names.

    Args:
        name: ``distillmos`` (Distill-MOS, Stahl and Gamper 2025), ``dnsmos`` (DNSMOS P.835's overall score, Reddy et
            al. 2022; always on the CPU) or ``utmos`` (UTMOS22 strong, Saeki et al. 2022), each from the package of
            that name; or a TorchScript file that takes (1, num_samples) float32 at 16 kHz and gives one number.
        may_download: utmos has its weights on the Hub; False takes them from the local cache only.

    Returns:
        (num_samples,) float32 at 24 kHz -> score, 1 (bad) to 5 (excellent).

    Raises:
        UserError: the package or the weights are missing, or the file is no TorchScript.
    """
    if name not in MOS_MODELS:
        return _Scorer(_scripted(Path(name).expanduser(), device), device)
    module = _import_predictor(name)
    with contextlib.redirect_stdout(io.StringIO()), _apart_from_training():  # it tells where its weights lie
        if name == "dnsmos":
            # The package refuses samples beyond full scale, which resampling can make of loud ones.
            return lambda waveform: float(module.run(np.clip(_heard(waveform), -1.0, 1.0), sr=MOS_RATE_HZ)["ovrl_mos"])
        if name == "distillmos":
            return _Scorer(module.ConvTransformerSQAModel().eval().to(device), device)
        weights = _utmos_weights(may_download)
        return _Scorer(module.UTMOSScoreTorch(ckpt_path=weights, device=device).eval(), device)


def _heard(waveform: np.ndarray) -> np.ndarray:
    return resample(waveform, SAMPLE_RATE_HZ, MOS_RATE_HZ)


@dataclass(frozen=True)
class _Scorer:
    """A predictor of opinion scores at its sampling rate.

    Attributes:
        device: on which it is asked.
    """

    model: Any
    device: str

    def to(self, device: str) -> None:
        """Moves the model: away from the device that it is asked on, and back before that."""
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, waveform: np.ndarray) -> float:
        return float(self.model(torch.from_numpy(_heard(waveform)).unsqueeze(0).to(self.device)))


def _import_predictor(name: str) -> Any:
    module, package = _MOS_PACKAGES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"MOS_MODEL: {name} needs the package {package}, which cannot be imported ({_first_line(error)}): "
            "uv sync --inexact --extra mos (./uv_train.sh does so by itself), or unset MOS_MODEL"
        ) from None


def _utmos_weights(may_download: bool) -> str:
    from huggingface_hub import hf_hub_download

    repository, file = _UTMOS_WEIGHTS
    try:
        return hf_hub_download(repository, file, local_files_only=not may_download)
    except Exception as error:  # the hub's errors, and those of the network below it
        reason = _first_line(error) if may_download else "DATA_MODE=none downloads nothing"
        raise UserError(
            f"MOS_MODEL: the weights of utmos ({repository}) are not in the local cache and cannot be fetched "
            f"({reason}); MOS_MODEL=distillmos brings its own"
        ) from None


def _scripted(file: Path, device: str) -> Any:
    if not file.is_file():
        raise UserError(f"MOS_MODEL: {file} is neither a file nor one of {', '.join(MOS_MODELS)}")
    try:
        return torch.jit.load(str(file), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"MOS_MODEL: {file} is no TorchScript file ({_first_line(error)}); write one with torch.jit.save, or take "
            f"one of {', '.join(MOS_MODELS)}"
        ) from None


# ----------------------------------------------------------------------------------------------------------- common


def _apart_from_training() -> contextlib.AbstractContextManager[None]:
    """The run's random numbers stay what they are: models that are built draw weights, which loading replaces, and
    transformers' pipeline a seed for workers that it does not have, in every call."""
    return torch.random.fork_rng(devices=[])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
