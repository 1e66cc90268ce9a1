"""Figures of speech against a recording of the same words, on waveforms whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from finetuning import closeness


def voiced(f0_hz: float, seconds: float = 1.5) -> np.ndarray:
    """Harmonics that get weaker, swelling four times a second like syllables."""
    time = np.arange(int(24_000 * seconds)) / 24_000
    waves = sum(np.sin(2 * np.pi * f0_hz * k * time) / k for k in range(1, 20))
    return (0.05 * waves * (1.1 + np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def test_pitch_of_a_known_tone() -> None:
    found = closeness.pitch(voiced(150))
    assert np.nanmedian(found) == pytest.approx(150, rel=0.01)
    assert np.isfinite(found).mean() > 0.9
    noise = np.random.default_rng(0).normal(size=24_000).astype(np.float32) * 0.1
    assert np.isfinite(closeness.pitch(noise)).mean() < 0.2


def test_time_alignment_forgives_speed_but_not_other_words() -> None:
    def say(pitches: list[int], seconds: float) -> np.ndarray:
        return np.concatenate([voiced(pitch, seconds) for pitch in pitches])

    true, other = say([120, 300, 180], 0.25), say([300, 150, 400], 0.25)
    slower = say([120, 300, 180], 0.35)
    assert closeness.aligned_distance(true, true) == 0
    assert closeness.aligned_distance(true, slower) < 0.7 * closeness.aligned_distance(true, other)


def test_a_recording_is_nearest_to_itself_and_each_figure_sees_its_own_difference() -> None:
    clip, silence = voiced(150, 1.0), np.zeros(12_000, np.float32)
    same = closeness.closeness(clip, np.concatenate([silence, clip, silence]))
    assert same["rate_ratio"] == pytest.approx(1, abs=0.05) and same["f0_error"] < 0.01
    assert same["timbre_distance_db"] < 0.5
    higher, faster = (closeness.closeness(clip, other) for other in (voiced(180, 1.0), voiced(150, 0.5)))
    assert higher["f0_error"] == pytest.approx(0.2, abs=0.01)
    assert faster["rate_ratio"] == pytest.approx(2, rel=0.1)
    duller = np.convolve(clip, np.ones(8) / 8, mode="same").astype(np.float32)
    assert closeness.closeness(clip, duller)["timbre_distance_db"] > 2
    assert np.isnan(closeness.closeness(clip, silence)["f0_error"])
