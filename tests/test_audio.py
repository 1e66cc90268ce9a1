"""Audio files to 24 kHz mono float32, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from finetuning.audio import AudioError, audio_duration_seconds, load_audio, pad_to_whole_frames, to_model_rate

TONE_HZ = 440.0
SECONDS = 1.25
#: Samples at 24 kHz of SECONDS, and how many a format may add or drop.
EXPECTED_SAMPLES, TOLERANCE_SAMPLES = 30_000, 2


def tone(rate_hz: int, frequency_hz: float = TONE_HZ, seconds: float = SECONDS, peak: float = 0.5) -> np.ndarray:
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    return (peak * np.sin(2 * np.pi * frequency_hz * time)).astype(np.float32)


def loudness_at(waveform: np.ndarray, frequency_hz: float) -> float:
    """Amplitude of the sine of that frequency in a 24 kHz waveform."""
    time = np.arange(len(waveform)) / 24_000
    return float(2 * abs(np.mean(waveform * np.exp(-2j * np.pi * frequency_hz * time))))


def loudest_frequency(waveform: np.ndarray) -> float:
    return float(np.fft.rfftfreq(len(waveform), 1 / 24_000)[np.abs(np.fft.rfft(waveform)).argmax()])


@pytest.mark.parametrize("rate_hz", [8000, 16_000, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_every_format_and_rate_becomes_24_khz_mono_float32(tmp_path: Path, kind: str, rate_hz: int) -> None:
    soundfile.write(tmp_path / f"clip.{kind}", tone(rate_hz), rate_hz)
    waveform = load_audio(tmp_path / f"clip.{kind}")
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - EXPECTED_SAMPLES) <= TOLERANCE_SAMPLES
    assert abs(loudest_frequency(waveform) - TONE_HZ) < 1
    assert loudness_at(waveform, TONE_HZ) == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("rate_hz", [24_000, 44_100])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_stereo_is_averaged(tmp_path: Path, kind: str, rate_hz: int) -> None:
    stereo = np.stack([tone(rate_hz, 440.0, peak=0.4), tone(rate_hz, 1000.0, peak=0.2)], axis=1)
    soundfile.write(tmp_path / f"clip.{kind}", stereo, rate_hz)
    waveform = load_audio(str(tmp_path / f"clip.{kind}"))
    assert abs(len(waveform) - EXPECTED_SAMPLES) <= TOLERANCE_SAMPLES
    assert loudness_at(waveform, 440.0) == pytest.approx(0.2, rel=0.05)
    assert loudness_at(waveform, 1000.0) == pytest.approx(0.1, rel=0.05)


def test_samples_at_the_model_rate_are_untouched(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 24_000).astype(np.float32)
    soundfile.write(tmp_path / "clip.wav", samples, 24_000, subtype="FLOAT")
    assert np.array_equal(load_audio(tmp_path / "clip.wav"), samples)


def test_resampling_does_not_fold_high_tones_down() -> None:
    """15 kHz is above what 24 kHz can hold; without a filter it would come back at 9 kHz."""
    waveform = to_model_rate(tone(48_000) + tone(48_000, 15_000.0), 48_000)
    assert loudness_at(waveform, 9000.0) < 0.5e-3
    assert loudness_at(waveform, TONE_HZ) == pytest.approx(0.5, rel=0.01)


# ---------------------------------------------------------------------------------------------------------- errors


def write(path: Path, samples: np.ndarray, rate_hz: int = 24_000) -> Path:
    soundfile.write(path, samples, rate_hz, subtype="FLOAT")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(AudioError) as error:
        load_audio(path)
    return str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere.wav") == "file not found"
    assert refusal(tmp_path) == "file not found"


@pytest.mark.parametrize(
    "content", [b"", b"no audio " * 100, b"RIFF\x24\x00\x00\x00WAVE"], ids=["empty", "text", "cut"]
)
def test_unreadable_file_is_named_by_its_kind_of_error_not_by_its_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad_clip.wav").write_bytes(content)
    message = refusal(tmp_path / "bad_clip.wav")
    assert message.startswith("not a readable audio file (")
    assert "bad_clip" not in message and "\n" not in message


def test_file_without_samples(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "clip.wav", np.zeros(0, np.float32))) == "no audio in the file"


@pytest.mark.parametrize("rate_hz", [16_000, 24_000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(tmp_path: Path, bad: float, rate_hz: int) -> None:
    samples = tone(rate_hz)
    samples[len(samples) // 2] = bad
    assert "not numbers" in refusal(write(tmp_path / "clip.wav", samples, rate_hz))


def test_short_clip_is_refused_with_its_length(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "short.wav", tone(24_000, seconds=0.25)))
    assert "0.25 s" in message and "0.3 s" in message
    assert len(load_audio(write(tmp_path / "enough.wav", tone(24_000, seconds=0.3)))) == 7200


def test_length_is_measured_in_seconds_not_in_samples(tmp_path: Path) -> None:
    load_audio(write(tmp_path / "clip.wav", tone(8000, seconds=0.31), 8000))
    assert "s long" in refusal(write(tmp_path / "clip48.wav", tone(48_000, seconds=0.29), 48_000))


def test_silence_is_refused_and_a_whisper_is_not(tmp_path: Path) -> None:
    assert "silence" in refusal(write(tmp_path / "zeros.wav", np.zeros(24_000, np.float32)))
    assert "silence" in refusal(write(tmp_path / "hiss.wav", tone(24_000, peak=0.0008)))
    load_audio(write(tmp_path / "whisper.wav", tone(24_000, peak=0.002)))


@pytest.mark.parametrize("rate_hz", [8000, 44_100])
def test_duration_from_the_header(tmp_path: Path, rate_hz: int) -> None:
    soundfile.write(tmp_path / "clip.flac", tone(rate_hz), rate_hz)
    assert audio_duration_seconds(tmp_path / "clip.flac") == pytest.approx(SECONDS, abs=1e-3)


def test_duration_of_an_unreadable_file_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    assert audio_duration_seconds(tmp_path / "bad.wav") is None
    assert audio_duration_seconds(tmp_path / "nowhere.wav") is None


# --------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("length, padded", [(0, 0), (1, 1920), (1919, 1920), (1920, 1920), (1921, 3840), (7200, 7680)])
def test_padding_adds_zeros_behind_up_to_a_whole_frame(length: int, padded: int) -> None:
    waveform = np.random.default_rng(0).uniform(0.1, 1, length).astype(np.float32)
    result = pad_to_whole_frames(waveform)
    assert result.dtype == np.float32 and len(result) == padded
    assert np.array_equal(result[:length], waveform) and not result[length:].any()
