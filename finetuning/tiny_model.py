"""The embedded base models: the package's real classes at toy width, for tests, demos and dry runs.

They have every part of a real base (talker, sub-talker, speaker encoder, BPE text tokenizer, 12 Hz codec) and its real
codec-channel ids, so every line of the pipeline runs on them. ``tiny`` is trained (``embedded/`` says how, and ships it
in tiny_base/): it says simple English sentences in synthetic voices. The weights of the others are random: they prove
the mathematics of training, they do not speak.

The folder of a random one is built once, deterministically, into the user's cache and reused::

    python -m finetuning.tiny_model tiny-random          # prints the folder
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.disk import damage, write_json
from finetuning.errors import UserError
from finetuning.stock import import_qwen_tts

SAMPLE_RATE_HZ = 24_000
NUM_CODEBOOKS = 16
CODEBOOK_SIZE = 2048
CODEC_TABLE_SIZE = 3072

#: Words that become one token each. The first two must: stock qwen-tts cuts the role off as exactly three tokens.
#: "iPhone", "McDonald" and a Yorùbá word with a mark that has no precomposed letter are split differently by the regex
#: that transformers 4.57.3 swaps in for local folders with a large vocabulary, so they show whether training and
#: inference use the same one.
WHOLE_WORDS = (
    "assistant", "user", "iPhone", "McDonald", "k\u1ecd\u0301",
    "the", "and", "ing", "tion", "er", "re", "on", "at", "en", "ed", "or", "es", "is", "it", "an", "in", "ou", "th",
    " the", " and", " of", " to", " a", " in", " is", " it", " you", " that", " he", " was", " for", " on", " are",
    " with", " they", " be", " at", " one", " have", " this", " from",
)  # fmt: skip

#: Order of the added tokens behind the byte-level vocabulary; the same order as in the real release.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<tts_pad>",
    "<tts_text_bos>",
    "<tts_text_eod>",
    "<tts_text_bos_single>",
    "<|audio_pad|>",
)


@dataclass(frozen=True)
class TinyShape:
    """Widths of one embedded model.

    Attributes:
        talker_width: hidden size of the talker, H.
        text_width: width of the text embedding table; ``text_projection`` maps it to H.
        sub_talker_width: hidden size of the code predictor; when it differs from H, ``small_to_mtp_projection`` is a
            real linear layer, else the identity.
        model_size: ``tts_model_size`` in the configuration ("1b7" or "0b6").
        min_vocabulary: filler entries raise the text vocabulary to at least this size.
    """

    talker_width: int = 64
    text_width: int = 64
    sub_talker_width: int = 64
    num_talker_layers: int = 4
    num_sub_talker_layers: int = 2
    model_size: str = "1b7"
    min_vocabulary: int = 0


SHAPES = {
    "tiny-random": TinyShape(),
    "tiny-random-0.6b": TinyShape(talker_width=80, text_width=96, sub_talker_width=64, model_size="0b6"),
    "tiny-random-large-vocabulary": TinyShape(text_width=8, min_vocabulary=100_352),
}
#: The trained one, as it ships.
SPEAKING, SPEAKING_BASE = "tiny", Path(__file__).parent / "tiny_base"
NAMES = (SPEAKING, *SHAPES)


def embedded_model_folder(name: str, dtype: str = "float32", cache_folder: Path | None = None) -> Path:
    """Returns the folder of an embedded model, building a random one on first use (about 5 s).

    Args:
        name: one of ``NAMES``.
        dtype: dtype of a random one's saved weights, "float32" or "bfloat16"; ``tiny`` is fp16.
        cache_folder: where built models live; default ``$XDG_CACHE_HOME/qwen3-tts-finetuning``.

    Raises:
        UserError: ``tiny`` is incomplete, as after a clone that was cut off.

    The folder's name carries a hash of this file and of the torch and qwen-tts versions: a stale build is never used.
    """
    from importlib.metadata import version

    if name == SPEAKING:
        if problems := damage(SPEAKING_BASE):
            raise UserError(
                f"{SPEAKING_BASE}, the embedded model {SPEAKING}, is damaged: {'; '.join(problems)}. Bring it back: "
                "git checkout -- finetuning/tiny_base"
            )
        return SPEAKING_BASE
    cache = cache_folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3-tts-finetuning"
    recipe = Path(__file__).read_bytes() + f"{version('torch')} {version('qwen-tts')}".encode()
    folder = cache / f"{name}-{dtype}-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        build_tiny_model(unfinished, SHAPES[name], dtype)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process may have been faster; then its folder is as good
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def build_tiny_model(folder: Path, shape: TinyShape, dtype: str = "float32", seed: int = 0) -> None:
    """Writes a complete base checkpoint into ``folder``; the same bytes for the same arguments."""
    import torch

    import_qwen_tts()
    special_ids = write_text_tokenizer(folder, shape.min_vocabulary)
    config = model_config(shape, special_ids)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR_CONFIG)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _write_talker_weights(folder, config, getattr(torch, dtype))
        _write_codec(folder / "speech_tokenizer")


PREPROCESSOR_CONFIG = {"padding_side": "left", "processor_class": "Qwen3TTSProcessor"}
GENERATION_CONFIG = {
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 0.9,
    "top_p": 1.0,
    "top_k": 50,
    "subtalker_dosample": True,
    "subtalker_temperature": 0.9,
    "subtalker_top_p": 1.0,
    "subtalker_top_k": 50,
    "max_new_tokens": 8192,
}


# ------------------------------------------------------------------------------------------------- text tokenizer


def byte_to_unicode() -> dict[int, str]:
    """The printable stand-in of every byte in byte-level BPE files (GPT-2's table, which Qwen2 uses)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + index) for index, byte in enumerate(others)}


def write_text_tokenizer(folder: Path, min_vocabulary: int = 0) -> dict[str, int]:
    """Writes vocab.json, merges.txt and tokenizer_config.json; returns the ids of the special tokens.

    Merges are spelt left to right for every word of WHOLE_WORDS, earlier words first, so the result needs no training.
    """
    stand_in = byte_to_unicode()
    vocabulary = dict.fromkeys(stand_in.values())
    merges: dict[tuple[str, str], None] = {}
    for word in WHOLE_WORDS:
        symbols = [stand_in[byte] for byte in word.encode()]
        prefix = symbols[0]
        for symbol in symbols[1:]:
            merges[(prefix, symbol)] = None
            prefix += symbol
            vocabulary[prefix] = None
    for index in range(len(vocabulary), min_vocabulary):
        vocabulary[f"<filler {index}>"] = None
    special_ids = {token: len(vocabulary) + index for index, token in enumerate(SPECIAL_TOKENS)}
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(vocabulary)})
    (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", _tokenizer_config(special_ids))
    return special_ids


def _tokenizer_config(special_ids: dict[str, int]) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): {"content": token, **flags} for token, index in special_ids.items()},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "fix_mistral_regex": True,  # as in the real release
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen3TTSProcessor",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


# ------------------------------------------------------------------------------------------- talker, speaker encoder


def model_config(shape: TinyShape, special_ids: dict[str, int]) -> dict:
    """config.json of an embedded model: toy widths, the real release's ids and table sizes of the codec channel."""
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": False}
    common = {"hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000}
    talker = {
        **attention,
        **common,
        "hidden_size": shape.talker_width,
        "intermediate_size": 3 * shape.talker_width,
        "num_hidden_layers": shape.num_talker_layers,
        "text_hidden_size": shape.text_width,
        "text_vocab_size": max(special_ids.values()) + 1,
        "vocab_size": CODEC_TABLE_SIZE,
        "num_code_groups": NUM_CODEBOOKS,
        "max_position_embeddings": 32768,
        "rope_scaling": {"interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default", "type": "default"},
        "sliding_window": None,
        "codec_pad_id": 2148,
        "codec_bos_id": 2149,
        "codec_eos_token_id": 2150,
        "codec_think_id": 2154,
        "codec_nothink_id": 2155,
        "codec_think_bos_id": 2156,
        "codec_think_eos_id": 2157,
        "codec_language_id": {
            "chinese": 2055,
            "english": 2050,
            "german": 2053,
            "italian": 2070,
            "portuguese": 2071,
            "spanish": 2054,
            "japanese": 2058,
            "korean": 2064,
            "french": 2061,
            "russian": 2069,
        },
        "spk_id": {},
        "spk_is_dialect": {},
        "code_predictor_config": {
            **attention,
            **common,
            "hidden_size": shape.sub_talker_width,
            "intermediate_size": 3 * shape.sub_talker_width,
            "num_hidden_layers": shape.num_sub_talker_layers,
            "layer_types": ["full_attention"] * shape.num_sub_talker_layers,
            "num_code_groups": NUM_CODEBOOKS,
            "vocab_size": CODEBOOK_SIZE,
            "max_position_embeddings": 65536,
            "model_type": "qwen3_tts_talker_code_predictor",
        },
        "model_type": "qwen3_tts_talker",
    }
    return {
        "architectures": ["Qwen3TTSForConditionalGeneration"],
        "model_type": "qwen3_tts",
        "tokenizer_type": "qwen3_tts_tokenizer_12hz",
        "tts_model_size": shape.model_size,
        "tts_model_type": "base",
        "im_start_token_id": special_ids["<|im_start|>"],
        "im_end_token_id": special_ids["<|im_end|>"],
        "tts_pad_token_id": special_ids["<tts_pad>"],
        "tts_bos_token_id": special_ids["<tts_text_bos>"],
        "tts_eos_token_id": special_ids["<tts_text_eod>"],
        "speaker_encoder_config": {
            "enc_dim": shape.talker_width,
            "enc_channels": [32, 32, 32, 32, 96],
            "enc_attention_channels": 16,
            "enc_se_channels": 16,
            "enc_res2net_scale": 4,
            "sample_rate": SAMPLE_RATE_HZ,
        },
        "talker_config": talker,
        "transformers_version": "4.57.3",
    }


def random_model(config: dict) -> Any:
    """``Qwen3TTSForConditionalGeneration`` of a config.json with random weights that suit a toy width.

    Args:
        config: as ``model_config`` gives it.
    """
    from qwen_tts.core.models import Qwen3TTSConfig, Qwen3TTSForConditionalGeneration
    from torch import nn

    settings = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    model = Qwen3TTSForConditionalGeneration(Qwen3TTSConfig(**settings))
    # The package's own initialisation (std 0.02) is for wide models; at toy width signals would vanish.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        if isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_channels * module.kernel_size[0]))
    return model


def _write_talker_weights(folder: Path, config: dict, dtype) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor.to(dtype).contiguous() for name, tensor in random_model(config).state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ----------------------------------------------------------------------------------------------------------- codec


def _codec_config() -> dict:
    width, code_width = 48, 32
    return {
        "architectures": ["Qwen3TTSTokenizerV2Model"],
        "model_type": "qwen3_tts_tokenizer_12hz",
        "encoder_valid_num_quantizers": NUM_CODEBOOKS,
        "input_sample_rate": SAMPLE_RATE_HZ,
        "output_sample_rate": SAMPLE_RATE_HZ,
        "decode_upsample_rate": 1920,
        "encode_downsample_rate": 1920,
        "encoder_config": {
            "_frame_rate": 12.5,
            "sampling_rate": SAMPLE_RATE_HZ,
            "hidden_size": width,
            "num_filters": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": width // 4,
            "intermediate_size": 2 * width,
            "codebook_size": CODEBOOK_SIZE,
            "codebook_dim": code_width,
            "vector_quantization_hidden_dimension": code_width,
            "num_quantizers": NUM_CODEBOOKS,
            "num_semantic_quantizers": 1,
            "upsampling_ratios": [8, 6, 5, 4],
            "upsample_groups": width,
            "use_causal_conv": True,
            "pad_mode": "constant",
            "sliding_window": 24,
            "use_cache": False,
        },
        "decoder_config": {
            "latent_dim": width,
            "codebook_dim": 2 * code_width,
            "codebook_size": CODEBOOK_SIZE,
            "decoder_dim": 64,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": width // 4,
            "num_hidden_layers": 1,
            "num_quantizers": NUM_CODEBOOKS,
            "num_semantic_quantizers": 1,
            "sliding_window": 24,
            "upsample_rates": [8, 5, 4, 3],
            "upsampling_ratios": [2, 2],
        },
        "transformers_version": "4.57.3",
    }


def _write_codec(folder: Path) -> None:
    from qwen_tts.core import Qwen3TTSTokenizerV2Config, Qwen3TTSTokenizerV2Model
    from safetensors.torch import save_file
    from torch import nn

    folder.mkdir()
    config = _codec_config()
    settings = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    codec = Qwen3TTSTokenizerV2Model(Qwen3TTSTokenizerV2Config(**settings)).eval()
    # Unit-scale activations keep the ELUs of the encoder non-linear; otherwise all clips look alike to the quantizer.
    for module in codec.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            fan_in = module.in_channels // module.groups * module.kernel_size[0]
            nn.init.normal_(module.weight, std=1.2 / math.sqrt(fan_in))
    nn.init.normal_(codec.encoder.encoder.layers[0].conv.weight, std=4.0)
    _fit_codebooks(codec)
    weights = {name: tensor.contiguous() for name, tensor in codec.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(
        folder / "preprocessor_config.json",
        {
            "feature_extractor_type": "EncodecFeatureExtractor",
            "feature_size": 1,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
            "sampling_rate": SAMPLE_RATE_HZ,
        },
    )


def _fit_codebooks(codec) -> None:
    """Draws every codebook from a normal distribution fitted to what the level before it leaves over.

    So the random codec uses its codebooks broadly on speech-like input, and codes differ from clip to clip.
    """
    import torch

    encoder, decoder = codec.encoder, codec.decoder
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of several threads differ in their last bits
    with torch.no_grad():
        hidden = encoder.encoder(_speech_like_noise(num_clips=12, seconds=4)[:, None])
        hidden = encoder.encoder_transformer(hidden.transpose(1, 2), return_dict=True)[0].transpose(1, 2)
        hidden = encoder.downsample(hidden)
        branches = (
            (encoder.quantizer.semantic_residual_vector_quantizer, decoder.quantizer.rvq_first.vq),
            (encoder.quantizer.acoustic_residual_vector_quantizer, decoder.quantizer.rvq_rest.vq),
        )
        for encoder_branch, decoder_branch in branches:
            residual = encoder_branch.input_proj(hidden).transpose(1, 2).flatten(0, 1)  # (frames, code_width)
            for encoder_level, decoder_level in zip(encoder_branch.layers, decoder_branch.layers, strict=True):
                mean, std = residual.mean(0).round(decimals=3), residual.std(0).round(decimals=3)
                codebook = mean + std * torch.randn(CODEBOOK_SIZE, residual.shape[1])
                encoder_level.codebook.embed_sum.copy_(codebook)
                encoder_level.codebook.cluster_usage.fill_(1.0)
                encoder_level.codebook._embed = None  # a cached quotient of the two
                decoder_level._codebook.embedding_sum.copy_(codebook)
                decoder_level._codebook.cluster_usage.fill_(1.0)
                residual = residual - codebook[torch.cdist(residual, codebook).argmin(1)]
    torch.set_num_threads(num_threads)


def _speech_like_noise(num_clips: int, seconds: int):
    """(num_clips, samples) float32: gliding harmonics under a syllable-rate envelope, plus noise."""
    import torch

    time = torch.arange(seconds * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    clips = []
    for _ in range(num_clips):
        pitch = 80 + 180 * torch.rand(1) + 30 * torch.sin(2 * math.pi * (0.3 + torch.rand(1)) * time)
        phase = 2 * math.pi * torch.cumsum(pitch, 0) / SAMPLE_RATE_HZ
        voice = sum(torch.rand(1) / order * torch.sin(order * phase) for order in range(1, 16))
        envelope = 0.5 + 0.5 * torch.sin(2 * math.pi * (2 + 3 * torch.rand(1)) * time)
        clips.append(0.15 * envelope * voice + 0.01 * torch.randn(len(time)))
    return torch.stack(clips)


if __name__ == "__main__":
    for model_name in sys.argv[1:] or ["tiny-random"]:
        print(embedded_model_folder(model_name))
