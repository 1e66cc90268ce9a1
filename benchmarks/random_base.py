"""A base of the true size, or a smaller one, with random weights, and random rows of realistic lengths; nothing is read
or written but the configurations beside this file.

Random weights cost the same time and memory as trained ones and obey the same mathematics; they do not speak.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from finetuning.codec import CODEBOOK_SIZE, FRAMES_PER_SECOND, NUM_CODEBOOKS
from finetuning.dataset import collate
from finetuning.objective import Batch
from finetuning.prompt import (
    NUM_CLOSING_TOKENS,
    NUM_ROLE_TOKENS,
    AlignedIds,
    LayoutIds,
    append_frames,
    build_prompt,
)
from finetuning.stock import import_qwen_tts
from finetuning.tiny_model import SHAPES, SPECIAL_TOKENS, model_config

#: ``small`` is the 1.7B with every width divided by 6.4 (all 28 and 5 layers, a smaller text table), for CPUs: its
#: parts cost the same shares of a step.
SIZES = ("1.7b", "0.6b", "small", "tiny")
CONFIGS = Path(__file__).parent / "configs"
CONFIG_FILE = CONFIGS / "qwen3-tts-12hz-1.7b.json"
SMALL_CONFIG_FILE = CONFIGS / "small.json"

#: Range of utterance lengths in seconds, and how much text goes with a second of speech.
UTTERANCE_SECONDS = (2.0, 12.0)
TEXT_TOKENS_PER_SECOND = 3.5
#: Clips of speech datasets: log-normal with this mean and spread, cut off at the range.
CLIP_MEAN_SECONDS, CLIP_SIGMA, CLIP_RANGE_SECONDS = 6.0, 0.6, (1.0, 20.0)
#: The reference that the speaker encoder hears: 5 s of log-mel frames (24 kHz, hop 256).
REFERENCE_MEL_FRAMES, MEL_BANDS = 5 * 24_000 // 256, 128

# ----------------------------------------------------------------------------------------------------------- model


def base_config(size: str) -> dict[str, Any]:
    """The config.json of a base of that size."""
    if size == "tiny":
        special_ids = {token: 1000 + index for index, token in enumerate(SPECIAL_TOKENS)}
        return model_config(SHAPES["tiny-random"], special_ids)
    if size == "small":
        return json.loads(SMALL_CONFIG_FILE.read_text(encoding="utf-8"))
    config = json.loads(CONFIG_FILE.read_text(encoding="utf-8"))
    if size == "0.6b":  # the text table stays 2048 wide
        config["tts_model_size"] = "0b6"
        config["talker_config"] |= {"hidden_size": 1024, "intermediate_size": 3072}
        config["speaker_encoder_config"]["enc_dim"] = 1024
    return config


def build_model(config: Mapping[str, Any], device: torch.device, seed: int = 0) -> Any:
    """``Qwen3TTSForConditionalGeneration`` with random fp32 weights, made on the device; the same for the same seed."""
    import_qwen_tts()
    from qwen_tts.core.models import Qwen3TTSConfig, Qwen3TTSForConditionalGeneration
    from transformers.modeling_utils import no_init_weights

    settings = {key: value for key, value in config.items() if key != "model_type"}
    with device, no_init_weights():
        model = Qwen3TTSForConditionalGeneration(Qwen3TTSConfig(**settings))
    torch.manual_seed(seed)
    for module in model.modules():
        _initialize(module)
    return model


def _initialize(module: nn.Module) -> None:
    """Normal weights that keep activations near unit scale at any width; norms are ones already."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
    elif isinstance(module, (nn.Linear, nn.Conv1d)):
        nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def random_reference_mel(device: torch.device, seed: int = 0) -> torch.Tensor:
    """(1, frames, MEL_BANDS) float32, what the speaker encoder takes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, REFERENCE_MEL_FRAMES, MEL_BANDS, generator=generator).to(device)


# ------------------------------------------------------------------------------------------------------------ rows


def random_rows(
    config: Mapping[str, Any], num_rows: int, seed: int = 0, seconds: Sequence[float] | None = None
) -> list[AlignedIds]:
    """Rows laid out as in training (language Auto, one speaker), with random text tokens and codes.

    Args:
        seconds: the length of each; default uniform in UTTERANCE_SECONDS.
    """
    generator = np.random.default_rng(seed)
    ids = LayoutIds.from_config(config)
    lengths = generator.uniform(*UTTERANCE_SECONDS, num_rows) if seconds is None else seconds
    return [_random_row(generator, ids, config["im_start_token_id"], length) for length in lengths]


def clip_seconds(num_rows: int, seed: int = 0) -> np.ndarray:
    """(num_rows,) lengths as speech datasets have them: many short ones, few long ones."""
    mean_of_log = math.log(CLIP_MEAN_SECONDS) - CLIP_SIGMA**2 / 2
    seconds = np.random.default_rng(seed).lognormal(mean_of_log, CLIP_SIGMA, num_rows)
    return seconds.clip(*CLIP_RANGE_SECONDS)


def _random_row(generator: np.random.Generator, ids: LayoutIds, num_text_ids: int, seconds: float) -> AlignedIds:
    """``num_text_ids``: ordinary text ids are below it."""
    num_text_tokens = round(TEXT_TOKENS_PER_SECOND * seconds)
    # There is no tokenizer, so the role is random too; to random weights any ids are as good.
    turn = generator.integers(num_text_ids, size=NUM_ROLE_TOKENS + num_text_tokens + NUM_CLOSING_TOKENS)
    codes = generator.integers(CODEBOOK_SIZE, size=(round(FRAMES_PER_SECOND * seconds), NUM_CODEBOOKS))
    return append_frames(build_prompt(turn, ids), codes, ids)


def to_batch(rows: Sequence[AlignedIds], padding_side: str = "right") -> Batch:
    """The collated rows, all of speaker 0."""
    return collate(rows, speaker_index=[0] * len(rows), padding_side=padding_side)
