"""Audio files to 24 kHz mono float32, and the checks that an unusable file fails."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

#: An audio file, or its content (wav, flac, mp3, ogg, …) as a dataset embeds it.
Audio = Path | bytes

#: What the speaker encoder and the 12 Hz codec take.
SAMPLE_RATE_HZ = 24_000
#: Samples of one codec frame: 24,000 / 12.5.
SAMPLES_PER_FRAME = 1920
#: Shorter clips hold no word; the codec would make fewer than four frames of them.
MIN_AUDIO_SECONDS = 0.3
#: A clip whose loudest sample is below this (-60 dB of full scale) is silence.
SILENCE_PEAK = 1e-3


class AudioError(ValueError):
    """A clip that cannot be used; the message says why, without the path."""


def load_audio(audio: str | Audio) -> np.ndarray:
    """Reads any audio that libsndfile reads, as (num_samples,) float32 at 24 kHz, channels averaged.

    Raises:
        AudioError: missing, unreadable, empty, shorter than MIN_AUDIO_SECONDS, silent, or not finite.
    """
    import soundfile

    if not isinstance(audio, bytes) and not Path(audio).is_file():
        raise AudioError("file not found")
    try:
        samples, rate = soundfile.read(_readable(audio), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError) as error:
        raise AudioError(f"not a readable audio file ({_short(error, audio)})") from None
    waveform = to_model_rate(samples.mean(axis=1), rate)
    check_waveform(waveform)
    return waveform


def to_model_rate(waveform: np.ndarray, rate_hz: int) -> np.ndarray:
    """Resamples (num_samples,) float32 to 24 kHz."""
    return resample(waveform, rate_hz, SAMPLE_RATE_HZ)


def resample(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """(num_samples,) float32 at another rate, by soxr's high-quality filter (librosa's default)."""
    if from_hz == to_hz or len(waveform) == 0:
        return np.ascontiguousarray(waveform, dtype=np.float32)
    import soxr

    return soxr.resample(waveform, from_hz, to_hz, quality="HQ").astype(np.float32)


def check_waveform(waveform: np.ndarray) -> None:
    """Raises AudioError for a waveform that has nothing to learn from."""
    seconds = len(waveform) / SAMPLE_RATE_HZ
    if len(waveform) == 0:
        raise AudioError("no audio in the file")
    if not np.isfinite(waveform).all():
        raise AudioError("samples that are not numbers (NaN or infinite)")
    if seconds < MIN_AUDIO_SECONDS:
        raise AudioError(f"only {seconds:.2f} s long, at least {MIN_AUDIO_SECONDS} s are needed")
    if np.abs(waveform).max() < SILENCE_PEAK:
        raise AudioError("silence only (no sample above -60 dB)")


def audio_duration_seconds(audio: str | Audio) -> float | None:
    """Duration from the header, or None when it cannot be read."""
    import soundfile

    try:
        info = soundfile.info(_readable(audio))
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError):
        return None
    return info.frames / info.samplerate if info.samplerate else None


def audio_suffix(audio: Audio) -> str:
    """The file name's ending for a clip: that of its file, or of the format that its content is in."""
    if not isinstance(audio, bytes):
        return audio.suffix
    import soundfile

    return f".{soundfile.info(_readable(audio)).format.lower()}"


def pad_to_whole_frames(waveform: np.ndarray) -> np.ndarray:
    """Zero-pads (num_samples,) to a multiple of 1920 samples.

    Without this the last frame's codes depend on the clips that share its batch: the codec sees whatever padding the
    longest neighbour asks for.
    """
    return np.pad(waveform, (0, -len(waveform) % SAMPLES_PER_FRAME))


def _readable(audio: str | Audio) -> Any:
    return io.BytesIO(audio) if isinstance(audio, bytes) else str(audio)


def _short(error: Exception, audio: str | Audio) -> str:
    message = str(error).partition("\n")[0].removeprefix("Error opening ")
    # "<_io.BytesIO object at 0x…>: Format not recognised.", or the path in its place
    message = message.rpartition(">: ")[2] if isinstance(audio, bytes) else message.removeprefix(f"{str(audio)!r}: ")
    return message[:120] or type(error).__name__
