"""Widths of the base that speaks: the whole checkpoint, codec included, is to stay below 40 MB in fp16.

The tables of the sub-talker (15 codebooks of 2048) are two thirds of it, and grow with the talker's width.
"""

from __future__ import annotations

from typing import Any

from finetuning.tiny_model import TinyShape, model_config

SHAPE = TinyShape(talker_width=160, text_width=160, sub_talker_width=96, num_talker_layers=5, num_sub_talker_layers=2)
HEAD_WIDTH = 32
ENCODER_CHANNELS = (64, 64, 64, 64, 192)


def base_config(special_ids: dict[str, int]) -> dict[str, Any]:
    """config.json: the embedded random models' with wider attention and a larger speaker encoder.

    Args:
        special_ids: token -> id, from ``write_text_tokenizer``.
    """
    config = model_config(SHAPE, special_ids)
    talker = config["talker_config"]
    talker |= _attention(SHAPE.talker_width)
    talker["rope_scaling"] = talker["rope_scaling"] | {"mrope_section": [8, 4, 4]}
    talker["code_predictor_config"] |= _attention(SHAPE.sub_talker_width)
    config["speaker_encoder_config"] |= encoder_settings()
    return config


def _attention(width: int) -> dict[str, int]:
    num_heads = width // HEAD_WIDTH
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_heads, "head_dim": HEAD_WIDTH}


def encoder_settings() -> dict[str, Any]:
    """Settings of ``Qwen3TTSSpeakerEncoderConfig``."""
    return {
        "enc_dim": SHAPE.talker_width,
        "enc_channels": list(ENCODER_CHANNELS),
        "enc_attention_channels": 32,
        "enc_se_channels": 32,
        "enc_res2net_scale": 4,
        "sample_rate": 24_000,
    }
