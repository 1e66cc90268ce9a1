"""The base checkpoint: finding its folder, checking what it is, choosing device and attention, loading it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from finetuning.codec import check_codec_folder
from finetuning.console import say
from finetuning.disk import check_is_whole
from finetuning.errors import UserError
from finetuning.languages import NewLanguage, new_languages, with_languages
from finetuning.prompt import NUM_CLOSING_TOKENS, NUM_ROLE_TOKENS, LayoutIds, assistant_turn
from finetuning.settings import Settings
from finetuning.stock import import_qwen_tts
from finetuning.tiny_model import NAMES as EMBEDDED_NAMES
from finetuning.tiny_model import embedded_model_folder
from finetuning.voice import voice_vector

#: What transformers 4.57.3 must read in a config.json to leave Qwen's regex alone when it loads from a path. It swaps
#: the tokenizer's regex for local folders of 4.57.3 or without a version (``_patch_mistral_regex``).
UNPATCHED_TRANSFORMERS_VERSION = "4.57.2"

TOKENIZER_FILES = ("tokenizer_config.json", "vocab.json", "merges.txt")
#: Files of the text processor that stock reads where they are there.
OPTIONAL_TOKENIZER_FILES = (
    "preprocessor_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A base checkpoint on disk.

    Attributes:
        name: as the user named it.
        folder: resolved local folder.
        config: config.json, with the languages that NEW_LANGUAGES adds.
        codec_folder: its speech tokenizer, or the one that TOKENIZER_PATH names.
        new_languages: what NEW_LANGUAGES adds.
        encoder_base: what SPEAKER_ENCODER_PATH names, where the base has no speaker encoder itself.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    codec_folder: Path
    new_languages: tuple[NewLanguage, ...] = ()
    encoder_base: Base | None = None

    @property
    def talker_config(self) -> Mapping[str, Any]:
        return self.config["talker_config"]

    @property
    def encoder_source(self) -> Base | None:
        """The checkpoint whose speaker encoder is used; None where there is none."""
        return self if self.config["tts_model_type"] == "base" else self.encoder_base

    @property
    def has_speaker_encoder(self) -> bool:
        return self.encoder_source is not None

    @property
    def is_custom_voice(self) -> bool:
        """Whether its speakers are rows of its codec table."""
        return self.config["tts_model_type"] == "custom_voice"

    @property
    def model_size(self) -> str:
        """Either "1b7" or "0b6"; stock treats an empty string as 0.6B and fails without one."""
        size = self.config.get("tts_model_size")
        return size if size in ("1b7", "0b6") else ("0b6" if self.talker_config["hidden_size"] <= 1024 else "1b7")

    def weight_files(self) -> list[Path]:
        return sorted(self.folder.glob("model*.safetensors"))

    def weight_dtypes(self) -> dict[str, torch.dtype]:
        """Name -> dtype of every saved tensor, from the files' headers."""
        return {name: _SAFETENSORS_DTYPES[header.get_dtype()] for name, header in self.stored_weights()}

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every saved tensor, from the files' headers."""
        return {name: tuple(header.get_shape()) for name, header in self.stored_weights()}

    def stored_weights(self) -> Iterator[tuple[str, Any]]:
        """(name, slice) of every tensor; ``slice[:]`` reads it."""
        for file in self.weight_files():
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - safe_open is no dict
                    yield name, weights.get_slice(name)

    def encoder_weights(self) -> dict[str, torch.Tensor]:
        """The tensors of the speaker encoder that is used, as they are stored, by their names in the files."""
        stored = self.encoder_source.stored_weights()
        return {name: part[:] for name, part in stored if name.startswith(ENCODER_PREFIX)}

    def special_tokens(self) -> tuple[str, ...]:
        """Every added token of the text tokenizer; none may stand in a transcript."""
        config = json.loads((self.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return tuple(token["content"] for token in config.get("added_tokens_decoder", {}).values())


#: What the names of the speaker encoder's weights begin with.
ENCODER_PREFIX = "speaker_encoder."
_SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


# --------------------------------------------------------------------------------------------------------- finding


def resolve_base(settings: Settings) -> Base:
    """Finds the base and its codec (downloading a Hub snapshot where DATA_MODE allows) and checks both.

    Raises:
        UserError: out of reach, or no 12 Hz Qwen3-TTS base.
    """
    may_download = settings.data_mode != "none"
    folder = resolve_folder(settings.init_model_path, "INIT_MODEL_PATH", may_download)
    config = read_base_config(folder)
    codec_folder = folder / "speech_tokenizer"
    if settings.tokenizer_path:
        codec_folder = resolve_folder(settings.tokenizer_path, "TOKENIZER_PATH", may_download)
    check_codec_folder(codec_folder)
    check_is_whole(folder, "INIT_MODEL_PATH")
    added = tuple(new_languages(config, settings))
    config = with_languages(config, {language.name: language.codec_id for language in added})
    base = Base(settings.init_model_path, folder, config, codec_folder, added)
    check_weights(base)
    return replace(base, encoder_base=_resolve_encoder(settings, base, may_download))


def _resolve_encoder(settings: Settings, base: Base, may_download: bool) -> Base | None:
    """What SPEAKER_ENCODER_PATH names, where the base needs it.

    Raises:
        UserError: it has no speaker encoder, or one of another width; or EXPORT_TYPE=base would have none.
    """
    name = settings.speaker_encoder_path
    if base.has_speaker_encoder:
        if name:
            say(f"SPEAKER_ENCODER_PATH is not read: {base.name} has a speaker encoder itself")
        return None
    if name is None:
        if settings.export_type == "base":
            raise UserError(
                f"EXPORT_TYPE: base needs a speaker encoder, and {base.name} has none; set SPEAKER_ENCODER_PATH to the "
                "Base model of the same size"
            )
        return None
    folder = resolve_folder(name, "SPEAKER_ENCODER_PATH", may_download)
    encoder = Base(name, folder, read_base_config(folder, "SPEAKER_ENCODER_PATH"), base.codec_folder)
    if encoder.is_custom_voice:
        raise UserError(f"SPEAKER_ENCODER_PATH: {name} has no speaker encoder; name a Base model")
    check_weights(encoder, "SPEAKER_ENCODER_PATH")
    width = (encoder.config.get("speaker_encoder_config") or {}).get("enc_dim")
    if width != base.talker_config["hidden_size"]:
        raise UserError(
            f"SPEAKER_ENCODER_PATH: the vectors of {name} have {width} numbers, {base.name} needs "
            f"{base.talker_config['hidden_size']}; name the Base model of the same size"
        )
    return encoder


def resolve_folder(name: str, setting: str, may_download: bool = True, files: Sequence[str] | None = None) -> Path:
    """A local folder for an embedded model's name, a path, or a Hub id.

    Always a folder: stock loading by Hub id asks the network even for what is cached, and tokenizes differently.

    Args:
        files: patterns of the files that are needed of a Hub id; default all.
    """
    if name in EMBEDDED_NAMES:
        return embedded_model_folder(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    looks_like_path = path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        raise UserError(f"{setting}: {name} is not a folder (nor a Hub id of the form owner/name)")
    return _download_snapshot(name, setting, may_download, files)


def _download_snapshot(repository: str, setting: str, may_download: bool, files: Sequence[str] | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    advice = "check the name and the network, set HF_TOKEN for a gated one, or give a local folder"
    try:
        return Path(snapshot_download(repository, local_files_only=not may_download, allow_patterns=files))
    except LocalEntryNotFoundError:
        reason = "the Hub cannot be reached" if may_download else "DATA_MODE=none downloads nothing"
        raise UserError(f"{setting}: {repository} is not in the local cache and {reason}; {advice}") from None
    except HFValidationError:
        raise UserError(f"{setting}: {repository} is not a valid Hub id; {advice}") from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{setting}: {repository} cannot be fetched from the Hub ({reason}); {advice}") from None


def read_base_config(folder: Path, setting: str = "INIT_MODEL_PATH") -> dict[str, Any]:
    """config.json of a folder that holds a Qwen3-TTS 12 Hz base or custom_voice checkpoint.

    Raises:
        UserError: anything else, with what it is.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{setting}: {folder} holds no model (config.json is missing)")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{setting}: {file} is not valid JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"{setting}: {file} is not a JSON object")
    if config.get("model_type") != "qwen3_tts":
        raise UserError(f"{setting}: {folder} is no Qwen3-TTS model (model_type {config.get('model_type')!r})")
    if config.get("tokenizer_type") != "qwen3_tts_tokenizer_12hz":
        raise UserError(
            f"{setting}: {folder} works at another frame rate ({config.get('tokenizer_type')!r}); "
            "qwen-tts 0.1.1 has a talker for the 12 Hz models only"
        )
    if config.get("tts_model_type") not in ("base", "custom_voice"):
        raise UserError(
            f"{setting}: {folder} is a {config.get('tts_model_type')!r} model; start from a Base or a CustomVoice model"
        )
    try:
        LayoutIds.from_config(config)
        config["talker_config"]["num_hidden_layers"], config["talker_config"]["code_predictor_config"]["hidden_size"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{setting}: {file} lacks {error}") from None
    missing = [name for name in ("generation_config.json", *TOKENIZER_FILES) if not (folder / name).is_file()]
    if not list(folder.glob("model*.safetensors")):
        missing.append("model.safetensors")
    if missing:
        raise UserError(f"{setting}: {folder} is incomplete: no {', '.join(missing)}")
    return config


def check_weights(base: Base, setting: str = "INIT_MODEL_PATH") -> None:
    """Raises UserError for weights that cannot be read or are not all there."""
    index = base.folder / "model.safetensors.index.json"
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
        missing = sorted(name for name in shards if not (base.folder / name).is_file())
        names = base.weight_dtypes()
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{setting}: the weights in {base.folder} cannot be read ({type(error).__name__}); a Git LFS pointer "
            "instead of the file? Fetch them again"
        ) from None
    if "talker.model.codec_embedding.weight" not in names:
        missing.append("talker.model.codec_embedding.weight")
    if not base.is_custom_voice and not any(name.startswith(ENCODER_PREFIX) for name in names):
        missing.append(f"{ENCODER_PREFIX}*")
    if missing:
        raise UserError(f"{setting}: the weights in {base.folder} are not whole: no {', '.join(missing)}")


# --------------------------------------------------------------------------------------------------------- loading


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a base's text tokenizer and processor."""
    return [folder / name for name in (*TOKENIZER_FILES, *OPTIONAL_TOKENIZER_FILES) if (folder / name).is_file()]


def load_tokenizer(folder: Path) -> Any:
    """The text tokenizer exactly as stock qwen-tts will load it from our export.

    Loads through the same call as ``Qwen3TTSModel.from_pretrained``, from a folder that has an export's
    ``transformers_version``: the unpatched Qwen regex, whatever the base's config.json says.
    """
    import_qwen_tts()
    from qwen_tts.core.models import Qwen3TTSConfig, Qwen3TTSProcessor
    from transformers import AutoConfig, AutoProcessor

    AutoConfig.register("qwen3_tts", Qwen3TTSConfig, exist_ok=True)
    AutoProcessor.register(Qwen3TTSConfig, Qwen3TTSProcessor, exist_ok=True)
    with tempfile.TemporaryDirectory() as export_like:
        for file in tokenizer_files(folder):
            shutil.copy(file, export_like)
        config = {"model_type": "qwen3_tts", "transformers_version": UNPATCHED_TRANSFORMERS_VERSION}
        (Path(export_like) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        processor = AutoProcessor.from_pretrained(export_like, fix_mistral_regex=True)
    role_and_closing = len(processor.tokenizer(assistant_turn(""))["input_ids"])
    if role_and_closing != NUM_ROLE_TOKENS + NUM_CLOSING_TOKENS:
        raise UserError(
            f"INIT_MODEL_PATH: the text tokenizer of {folder} splits the role into {role_and_closing} tokens instead "
            "of 8; its vocab.json or merges.txt does not belong to Qwen3-TTS"
        )
    return processor.tokenizer


def load_model(base: Base, attention: str, device: str = "cpu", keep_bf16: bool = False) -> Any:
    """The model without its codec; fp32 weights, the masters of training.

    Args:
        keep_bf16: leave the talker as it is stored, where all of it is stored in bf16; see ``set_precision``.
    """
    import_qwen_tts()
    from qwen_tts.core.models import Qwen3TTSConfig, Qwen3TTSForConditionalGeneration
    from transformers import AutoConfig, PreTrainedModel

    AutoConfig.register("qwen3_tts", Qwen3TTSConfig, exist_ok=True)
    # The class's own from_pretrained would load the codec as well, which training does not need.
    load = PreTrainedModel.from_pretrained.__func__
    is_bf16 = set(base.weight_dtypes().values()) == {torch.bfloat16}
    model = load(
        Qwen3TTSForConditionalGeneration,
        str(base.folder),
        dtype=torch.bfloat16 if keep_bf16 and is_bf16 else torch.float32,
        attn_implementation=attention,
        device_map=device,
    )
    if model.speaker_encoder is not None:
        model.speaker_encoder.float()
    return model


def set_precision(model: Any, base: Base, train_in_bf16: bool = False) -> None:
    """In place, for training under bf16 autocast: matrices that do not train stay as the base stores them, in bf16 or
    fp32; all else of the talker becomes fp32. Nothing is rounded.

    Autocast would round those matrices to bf16 in every step, to the same values. Norms and biases would give products
    of another dtype, so they are fp32.

    Args:
        train_in_bf16: WEIGHTS_PRECISION=bf16; matrices that train stay as they are stored, too.
    """
    stored = base.weight_dtypes()
    matrices = {id(part.weight) for part in model.talker.modules() if isinstance(part, (nn.Linear, nn.Embedding))}
    for name, parameter in model.named_parameters():
        stays = id(parameter) in matrices and (train_in_bf16 or not parameter.requires_grad)
        is_bf16 = stays and stored.get(name) == torch.bfloat16  # new layers are not stored
        parameter.data = parameter.data.to(torch.bfloat16 if is_bf16 else torch.float32)


def load_speaker_encoder(base: Base, device: str = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """The base's speaker encoder: (num_samples,) float32 at 24 kHz -> (H,) float32.

    The same figures as ``extract_speaker_embedding`` of the whole model, which need not be loaded for it.
    """
    encoder = load_encoder_module(base, device)
    return lambda waveform: voice_vector(encoder, waveform).numpy()


def voice_encoder(model: Any, base: Base) -> nn.Module | None:
    """The speaker encoder of a loaded base, or what SPEAKER_ENCODER_PATH names; None where there is neither."""
    if model.speaker_encoder is not None or base.encoder_base is None:
        return model.speaker_encoder
    return load_encoder_module(base, str(model.talker.codec_head.weight.device))


def load_encoder_module(base: Base, device: str = "cpu") -> nn.Module:
    """The speaker encoder alone, in fp32."""
    import_qwen_tts()
    from qwen_tts.core.models import Qwen3TTSConfig
    from qwen_tts.core.models.modeling_qwen3_tts import Qwen3TTSSpeakerEncoder

    source = base.encoder_source
    encoder = Qwen3TTSSpeakerEncoder(Qwen3TTSConfig.from_pretrained(str(source.folder)).speaker_encoder_config)
    encoder.load_state_dict(
        {name.removeprefix(ENCODER_PREFIX): weight for name, weight in base.encoder_weights().items()}
    )
    return encoder.float().eval().to(device)


# -------------------------------------------------------------------------------------------------------- hardware


def choose_device(settings: Settings) -> str:
    """The device type that DEVICE asks for.

    Raises:
        UserError: it is not there, or MIXED_PRECISION does not work on it.
    """
    mps = torch.backends.mps.is_available()
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("DEVICE: cuda is not available on this machine; set DEVICE=cpu or auto, or install a driver")
    if device == "mps" and not mps:
        raise UserError("DEVICE: mps is not available on this machine; set DEVICE=cpu or auto")
    # Emulated bf16 (before Ampere) counts as none: it is slower than fp32.
    has_bf16 = device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.mixed_precision == "bf16" and not has_bf16:
        raise UserError("MIXED_PRECISION: this GPU has no bf16; set MIXED_PRECISION=fp16 or no")
    if settings.mixed_precision == "fp16" and device != "cuda":
        raise UserError(f"MIXED_PRECISION: fp16 needs a CUDA GPU, not {device}; set MIXED_PRECISION=bf16 or no")
    return device


def choose_attention(settings: Settings, device: str) -> str:
    """The attention implementation, resolved from ATTN_IMPLEMENTATION.

    Raises:
        UserError: FlashAttention 2 was asked for and cannot run.
    """
    from transformers.utils import is_flash_attn_2_available

    works = (
        device == "cuda"
        and settings.mixed_precision != "no"
        and torch.cuda.get_device_capability()[0] >= 8
        and is_flash_attn_2_available()
    )
    wanted = settings.attn_implementation
    if wanted == "flash_attention_2" and not works:
        raise UserError(
            "ATTN_IMPLEMENTATION: flash_attention_2 needs the package flash-attn, an Ampere or newer GPU and "
            "MIXED_PRECISION=bf16 or fp16; set auto or sdpa"
        )
    if wanted != "auto":
        return wanted
    return "flash_attention_2" if works else "sdpa"


def free_memory_bytes(device: str) -> int:
    """Free memory of the device that trains: of the GPU, else of the machine."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available
