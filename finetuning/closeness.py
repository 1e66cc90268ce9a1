"""How near speech is to a recording of the same words, where there is one: sounds, pace, pitch and timbre.

Word errors and similarity (``listening``) need no recording; these do, and say more with fewer samples.
"""

from __future__ import annotations

import numpy as np

from finetuning.audio import SAMPLE_RATE_HZ
from finetuning.quality import silent_edges_seconds

#: Where pitch is looked for; the longest period needs two of them in a window.
PITCH_RANGE_HZ = (60.0, 500.0)
_PITCH_HOP, _PITCH_WINDOW = 480, 2048
#: Steps of the log-mel spectrum (100 a second) that time alignment takes as one.
_ALIGNED_STRIDE = 3


def closeness(true: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Figures of speech against the recording of the same words, both (num_samples,) float32 at 24 kHz.

    Returns:
        spectral_distance: mean difference of log-mel magnitudes (natural log) after time alignment; 0 is the same.
        rate_ratio: length of the recording over that of the speech, silence at the edges left out; above 1 is faster.
        f0_error: relative difference of the median pitch; NaN where either has none.
        timbre_distance_db: mean difference of the mean spectra of the louder half, where the formants lie.
    """
    f0_true, f0_other = median_f0_hz(true), median_f0_hz(other)
    return {
        "spectral_distance": aligned_distance(true, other),
        "rate_ratio": spoken_seconds(true) / max(spoken_seconds(other), 0.05),
        "f0_error": abs(f0_other / f0_true - 1),
        "timbre_distance_db": timbre_distance_db(true, other),
    }


def timbre_distance_db(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference of the mean spectra of the louder half."""
    return float(np.abs(mean_spectrum_db(one) - mean_spectrum_db(other)).mean())


def log_mel(waveform: np.ndarray) -> np.ndarray:
    """(80, steps) natural log of mel magnitudes, 100 steps a second."""
    import librosa

    mel = librosa.feature.melspectrogram(y=waveform, sr=SAMPLE_RATE_HZ, n_fft=1024, hop_length=240, n_mels=80, power=1)
    return np.log(mel + 1e-3)


def pitch(waveform: np.ndarray) -> np.ndarray:
    """f0 in Hz, 50 values a second; NaN where there is no voice (librosa's pYIN)."""
    import librosa

    low, high = PITCH_RANGE_HZ
    f0, _, _ = librosa.pyin(
        waveform, fmin=low, fmax=high, sr=SAMPLE_RATE_HZ, frame_length=_PITCH_WINDOW, hop_length=_PITCH_HOP
    )
    return f0


def median_f0_hz(waveform: np.ndarray) -> float:
    """Over the voiced steps; NaN where there are none."""
    f0 = pitch(waveform)
    return float(np.median(f0[~np.isnan(f0)])) if np.isfinite(f0).any() else float("nan")


def spoken_seconds(waveform: np.ndarray) -> float:
    """Length without the silence at its edges."""
    return len(waveform) / SAMPLE_RATE_HZ - sum(silent_edges_seconds(waveform))


def mean_spectrum_db(waveform: np.ndarray) -> np.ndarray:
    """(80,) mean of the louder half of the steps, silence at the edges left out; its own mean taken off."""
    leading, trailing = (round(seconds * SAMPLE_RATE_HZ) for seconds in silent_edges_seconds(waveform))
    mel = log_mel(waveform[leading : max(leading + 1, len(waveform) - trailing)])
    loudness = mel.mean(0)
    mean = mel[:, loudness >= np.median(loudness)].mean(1) * (20 / np.log(10))
    return mean - mean.mean()


def aligned_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean L1 of log-mels along the cheapest path (dynamic time warping)."""
    import librosa

    first, second = (log_mel(waveform)[:, ::_ALIGNED_STRIDE] for waveform in (one, other))
    costs = np.abs(first[:, :, None] - second[:, None, :]).mean(0)
    _, path = librosa.sequence.dtw(C=costs)
    return float(costs[path[:, 0], path[:, 1]].mean())
