"""A waveform to the speaker encoder's vector, exactly as stock qwen-tts computes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from finetuning.audio import SAMPLE_RATE_HZ, AudioError, load_audio
from finetuning.errors import UserError
from finetuning.stock import import_qwen_tts


@torch.no_grad()
def voice_vector(encoder: nn.Module, waveform: np.ndarray) -> torch.Tensor:
    """(num_samples,) float32 at 24 kHz -> (H,) float32 on the CPU: stock's ``extract_speaker_embedding`` in the
    encoder's own precision, whatever the talker's is."""
    import_qwen_tts()
    from qwen_tts.core.models import Qwen3TTSForConditionalGeneration

    weight = next(encoder.parameters())
    model = SimpleNamespace(speaker_encoder=encoder, device=weight.device, dtype=weight.dtype)
    vector = Qwen3TTSForConditionalGeneration.extract_speaker_embedding(model, waveform, SAMPLE_RATE_HZ)
    return vector.float().cpu().clone()


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
