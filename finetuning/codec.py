"""Waveforms to codes and back, through the package's own 12 Hz speech tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from finetuning.audio import SAMPLE_RATE_HZ, pad_to_whole_frames
from finetuning.errors import UserError
from finetuning.stock import import_qwen_tts

NUM_CODEBOOKS = 16
CODEBOOK_SIZE = 2048
FRAMES_PER_SECOND = 12.5


class Codec:
    """The speech tokenizer of one base.

    Args:
        folder: a ``speech_tokenizer`` folder (config.json, model.safetensors, preprocessor_config.json).
        device: where to run it; always in fp32, so that codes do not depend on the precision of training.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        check_codec_folder(folder)
        import torch

        self.folder = folder
        self._tokenizer = import_qwen_tts().Qwen3TTSTokenizer.from_pretrained(
            str(folder), dtype=torch.float32, device_map=device
        )

    def move(self, device: str) -> None:
        """To another device, where it works from then on."""
        self._tokenizer.model.to(device)
        self._tokenizer.device = self._tokenizer.model.device

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(num_samples,) float32 clips at 24 kHz to their codes, each (T, 16) int16 with T = ceil(samples / 1920).

        Each clip's codes are independent of its neighbours in the batch (see ``pad_to_whole_frames``), but for ties:
        two codewords may be equally near to within fp32's rounding, which depends on the batch's shape.
        """
        return self._encode([pad_to_whole_frames(waveform) for waveform in waveforms])

    def encode_reference(self, waveform: np.ndarray) -> np.ndarray:
        """A reference's (R, 16) int16 codes as ``create_voice_clone_prompt`` has them: alone, and not padded, which
        makes a difference to its last frame."""
        return self._encode([waveform])[0]

    def _encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        import torch

        cudnn = torch.backends.cudnn
        kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
        with cudnn.flags(**kept, allow_tf32=False):  # a GPU's convolutions would round to 10 bits by default
            codes = self._tokenizer.encode(waveforms, sr=SAMPLE_RATE_HZ).audio_codes
        return [clip.cpu().numpy().astype(np.int16) for clip in codes]

    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(T, 16) codes to (T * 1920,) float32 waveforms at 24 kHz."""
        waveforms, _ = self._tokenizer.decode([{"audio_codes": np.asarray(clip, dtype=np.int64)} for clip in codes])
        return waveforms


def codec_fingerprint(folder: Path) -> str:
    """A short hash of the codec's weights. Its config.json differs from copy to copy (``transformers_version``, say),
    and the codes do not."""
    return codec_fingerprints(folder)[0]


def codec_fingerprints(folder: Path) -> tuple[str, str]:
    """``codec_fingerprint``, and the one that rows have whose codes were made when config.json counted, too."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    of_weights = digest.hexdigest()[:16]
    digest.update((folder / "config.json").read_bytes())
    return of_weights, digest.hexdigest()[:16]


def check_codec_folder(folder: Path) -> None:
    """Raises UserError when the folder is not a 12 Hz speech tokenizer."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"no speech tokenizer in {folder} (config.json is missing); check TOKENIZER_PATH or the base")
    try:
        kind = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        raise UserError(f"{config_file} is not a JSON object; check TOKENIZER_PATH or the base") from None
    if kind != "qwen3_tts_tokenizer_12hz":
        raise UserError(f"{folder} is {kind!r}, not the 12 Hz speech tokenizer (qwen3_tts_tokenizer_12hz)")
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"no weights in the speech tokenizer {folder} (model.safetensors is missing)")
    for file in files:
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError):
            raise UserError(f"{file} cannot be read; a Git LFS pointer instead of the file? Fetch it again") from None
