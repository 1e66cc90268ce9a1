"""A waveform to the speaker encoder's vector, exactly as stock qwen-tts computes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from finetuning.audio import SAMPLE_RATE_HZ, AudioError, load_audio
from finetuning.errors import UserError
from finetuning.stock import import_qwen_tts


@torch.no_grad()
def voice_mels(waveform: np.ndarray) -> torch.Tensor:
    """(num_samples,) float32 at 24 kHz -> (1, F, 128) float32: what stock hands to the speaker encoder."""
    return _extract(lambda mels: [mels], waveform, torch.device("cpu"), torch.float32)


@torch.no_grad()
def voice_vector(encoder: nn.Module, waveform: np.ndarray) -> torch.Tensor:
    """(num_samples,) float32 at 24 kHz -> (H,) float32 on the CPU: stock's ``extract_speaker_embedding`` in the
    encoder's own precision, whatever the talker's is."""
    weight = next(encoder.parameters())
    return _extract(encoder, waveform, weight.device, weight.dtype).float().cpu().clone()


def _extract(encoder: Callable, waveform: np.ndarray, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Stock's ``extract_speaker_embedding`` with another encoder."""
    import_qwen_tts()
    from qwen_tts.core.models import Qwen3TTSForConditionalGeneration

    model = SimpleNamespace(speaker_encoder=encoder, device=device, dtype=dtype)
    return Qwen3TTSForConditionalGeneration.extract_speaker_embedding(model, waveform, SAMPLE_RATE_HZ)


def reference_vector(encoder: nn.Module, reference: str | Path) -> torch.Tensor:
    """``voice_vector`` of a file.

    Raises:
        UserError: the reference cannot be used.
    """
    try:
        waveform = load_audio(reference)
    except AudioError as error:
        raise UserError(f"reference {reference}: {error}") from None
    return voice_vector(encoder, waveform)
