"""Figures of one clip, against independent calculations and against clips that were damaged on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import VOICE

from finetuning.audio import load_audio, to_model_rate
from finetuning.quality import (
    cleanliness_db,
    inspect_text,
    k_weighting,
    loudness_lufs,
    measure_clip,
    reference_score,
    silent_edges_seconds,
)

RATE_HZ = 24_000


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return load_audio(VOICE / "english_voice.wav")


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [load_audio(path) for path in sorted((VOICE / "clips").glob("*.flac"))]


def noise(num_samples: int, power: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(num_samples) * power**0.5).astype(np.float32)


def with_noise(waveform: np.ndarray, snr_db: float) -> np.ndarray:
    return waveform + noise(len(waveform), float((waveform**2).mean()) / 10 ** (snr_db / 10))


def through(waveform: np.ndarray, rate_hz: int) -> np.ndarray:
    """As recorded at another rate and brought back."""
    import soxr

    return to_model_rate(soxr.resample(waveform, RATE_HZ, rate_hz).astype(np.float32), rate_hz)


def sixteen_bits(waveform: np.ndarray) -> np.ndarray:
    return (np.rint(np.clip(waveform, -1, 1) * 32767) / 32767).astype(np.float32)


def test_figures_are_plain_json_and_the_same_every_time(speech: np.ndarray) -> None:
    measures = measure_clip(speech)
    assert json.loads(json.dumps(measures)) == measures == measure_clip(speech.copy())
    assert {type(value) for value in measures.values()} <= {float, int, str}
    assert measures["seconds"] == pytest.approx(len(speech) / RATE_HZ, abs=1e-3)


@pytest.mark.parametrize("num_samples", [1, 100, 511, 7200, 9599])
def test_short_and_silent_clips_have_figures_too(num_samples: int) -> None:
    for waveform in (np.zeros(num_samples, np.float32), noise(num_samples, 1e-3)):
        measures = measure_clip(waveform)
        json.dumps(measures, allow_nan=False)
        assert measures["loudness_lufs"] is None
        reference_score(measures)


# -------------------------------------------------------------------------------------------------------- loudness


def test_filters_at_48_khz_are_those_of_the_standard() -> None:
    """BS.1770-4, tables 1 and 2."""
    shelf, high_pass = k_weighting(48_000)
    expected = [1.53512485958697, -2.69169618940638, 1.19839281085285, 1, -1.69065929318241, 0.73248077421585]
    assert shelf == pytest.approx(expected, abs=1e-10)
    assert high_pass == pytest.approx([1, -2, 1, 1, -1.99004745483398, 0.99007225036621], abs=1e-10)


def test_loudness_agrees_with_torchaudio(clips: list[np.ndarray]) -> None:
    import torch
    import torchaudio

    quiet_end = np.concatenate([clips[16], np.zeros(3 * RATE_HZ, np.float32), 0.03 * clips[16]])  # for the gates
    for waveform in [*clips[:6], quiet_end, noise(5 * RATE_HZ, 1e-3)]:
        expected = float(torchaudio.functional.loudness(torch.from_numpy(waveform)[None], RATE_HZ))
        assert loudness_lufs(waveform) == pytest.approx(expected, abs=0.25)  # its filters are approximations


def test_loudness_follows_the_gain_and_ignores_pauses(speech: np.ndarray) -> None:
    loudness = loudness_lufs(speech)
    assert loudness_lufs(speech / 2) == pytest.approx(loudness - 6.02, abs=0.1)
    pause = np.zeros(10 * RATE_HZ, np.float32)
    assert loudness_lufs(np.concatenate([speech, pause])) == pytest.approx(loudness, abs=0.3)
    assert loudness_lufs(np.full(RATE_HZ, 1e-6, np.float32)) is None


# -------------------------------------------------------------------------------------------------------- waveform


def test_peak_and_dc_offset(speech: np.ndarray) -> None:
    measures = measure_clip(0.25 * speech / np.abs(speech).max())
    assert measures["peak_db"] == pytest.approx(-12.04, abs=0.01)
    shifted = measure_clip(0.5 * speech - 0.05)
    assert shifted["dc_offset"] == pytest.approx(-0.05 + 0.5 * speech.mean(dtype=np.float64), abs=1e-4)


@pytest.mark.parametrize("ceiling", [1.0, 0.4], ids=["at full scale", "turned down afterwards"])
def test_clipping_is_counted(speech: np.ndarray, ceiling: float) -> None:
    loud = 4 * speech
    clipped = ceiling * np.clip(loud, -1, 1)
    measured = measure_clip(clipped)["clipped_share"]
    assert measured == pytest.approx(float((np.abs(loud) >= 1).mean()), rel=0.35)


def test_unclipped_speech_has_next_to_no_clipping(clips: list[np.ndarray]) -> None:
    assert max(measure_clip(clip)["clipped_share"] for clip in clips) < 2e-4


@pytest.mark.parametrize("noise_power", [0.0, 1e-8, 1e-6, 1e-5])
@pytest.mark.parametrize("leading, trailing", [(0.0, 0.0), (0.8, 0.0), (0.3, 1.5)])
def test_silence_at_the_edges(clips: list[np.ndarray], leading: float, trailing: float, noise_power: float) -> None:
    for clip in clips[:6]:
        own = silent_edges_seconds(clip)
        padded = np.pad(clip, (round(leading * RATE_HZ), round(trailing * RATE_HZ)))
        measured = silent_edges_seconds(padded + noise(len(padded), noise_power))
        assert measured[0] == pytest.approx(leading + own[0], abs=0.1)
        assert measured[1] == pytest.approx(trailing + own[1], abs=0.1)


def test_tight_clips_have_no_silence(clips: list[np.ndarray]) -> None:
    """Those of espeak-ng start and end within a tenth of a second."""
    assert max(max(silent_edges_seconds(clip)) for clip in clips) < 0.1


def test_a_soft_beginning_is_speech() -> None:
    """Though it is the quietest part of a clip without pauses, so that it looks like the noise floor."""
    tone = 0.5 * np.sin(2 * np.pi * 200 / RATE_HZ * np.arange(2 * RATE_HZ)).astype(np.float32)
    tone[: RATE_HZ // 3] *= 0.1
    assert silent_edges_seconds(tone) == (0.0, 0.0)


def test_a_click_before_the_speech_is_not_speech(speech: np.ndarray) -> None:
    padded = np.pad(speech, (RATE_HZ, 0))
    padded[1000:1100] = 0.5
    assert silent_edges_seconds(padded)[0] == pytest.approx(1.0, abs=0.1)


def test_audio_hash_is_of_the_sound_not_of_the_file(tmp_path: Path, speech: np.ndarray) -> None:
    samples = np.rint(32_000 * speech).astype(np.int16)
    hashes = []
    for name in ("a.wav", "b.flac"):
        soundfile.write(tmp_path / name, samples, RATE_HZ, subtype="PCM_16")
        hashes.append(measure_clip(load_audio(tmp_path / name))["audio_hash"])
    assert hashes[0] == hashes[1] and len(hashes[0]) == 16
    samples[5000] += 1
    assert measure_clip(samples / np.float32(32_768))["audio_hash"] != hashes[0]


# -------------------------------------------------------------------------------------------------------- spectrum


def test_signal_to_noise_falls_with_the_noise(clips: list[np.ndarray]) -> None:
    for clip in clips[:8]:
        estimates = [measure_clip(with_noise(clip, snr))["snr_db"] for snr in (30, 20, 10, 0)]
        assert estimates == sorted(estimates, reverse=True)
        # Of the speech alone, without its pauses, the ratio is some dB above that of the whole clip.
        assert estimates[1:] == pytest.approx([27, 18, 10], abs=4)


def test_noise_floor_is_the_level_of_the_noise(speech: np.ndarray) -> None:
    for floor_db in (-60, -50, -40):
        noisy = speech + noise(len(speech), 10 ** (floor_db / 10))
        assert measure_clip(noisy)["noise_floor_db"] == pytest.approx(floor_db - 5, abs=3)
        padded = np.pad(noisy, RATE_HZ)  # digital silence hides no noise
        assert measure_clip(padded)["noise_floor_db"] == pytest.approx(floor_db - 5, abs=3)


def test_clean_speech_without_pauses_is_not_called_noisy(clips: list[np.ndarray]) -> None:
    assert min(measure_clip(clip)["snr_db"] for clip in clips) > 24


@pytest.mark.parametrize("rate_hz", [8000, 11_025, 16_000])
def test_upsampled_audio_ends_at_half_its_rate(clips: list[np.ndarray], rate_hz: int) -> None:
    for clip in clips[:8]:
        for waveform in (through(clip, rate_hz), sixteen_bits(0.1 * through(clip, rate_hz))):
            assert measure_clip(waveform)["bandwidth_hz"] == pytest.approx(rate_hz / 2, rel=0.09)


def test_noise_above_a_telephone_band_does_not_hide_it(clips: list[np.ndarray]) -> None:
    found = [measure_clip(with_noise(through(clip, 8000), 35))["bandwidth_hz"] for clip in clips[:8]]
    assert max(found) < 4400


def test_full_band_speech_is_full_band(clips: list[np.ndarray]) -> None:
    """espeak-ng makes 22.05 kHz, so there is a limit at 11 kHz, and none that could be seen in noise."""
    for clip in clips[:8]:
        assert measure_clip(clip)["bandwidth_hz"] > 10_000
        assert measure_clip(with_noise(clip, 10))["bandwidth_hz"] == 12_000


def test_a_dark_voice_is_not_band_limited(clips: list[np.ndarray]) -> None:
    from scipy.signal import butter, sosfilt

    dark = butter(1, 1500, fs=RATE_HZ, output="sos")  # 6 dB less an octave
    assert min(measure_clip(sosfilt(dark, clip).astype(np.float32))["bandwidth_hz"] for clip in clips[:8]) > 8500


# ------------------------------------------------------------------------------------------------------- reference


def test_every_damage_makes_a_worse_reference(speech: np.ndarray) -> None:
    damaged = {
        "noise": with_noise(speech, 25),
        "clipping": np.clip(3 * speech, -1, 1),
        "silence": np.pad(speech, (2 * RATE_HZ, RATE_HZ)),
        "telephone": through(speech, 8000),
        "offset": 0.9 * speech + 0.03,
    }
    clean = cleanliness_db(0.9 * speech)
    scores = {name: clean - cleanliness_db(waveform) for name, waveform in damaged.items()}
    assert {name: loss > 5 for name, loss in scores.items()} == dict.fromkeys(damaged, True), scores


# ------------------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    "text, language, defects",
    [
        ("Good morning, everyone. It's fine – “really”; 5… no: five!", "English", {"digits"}),
        ("Grüße aus Łódź, ça va?", "German", set()),
        ("A tag <br/> here", "English", {"markup"}),
        ("Salt &amp; pepper", "English", {"markup"}),
        ("If a < b and c > d, say so", "English", set()),
        ("See https://example.org now", "English", {"url"}),
        ("A bell \x07 rings", "English", {"control"}),
        ("zero\u200bwidth", "English", {"invisible"}),
        ("می\u200cخواهم", "Persian", set()),
        ("private \ue000 use", "English", {"private"}),
        ("lost \ufffd character", "English", {"replacement"}),
        ("cafÃ© au lait", "French", {"mojibake"}),
        ("party 🎉 time", "English", {"emoji"}),
        ("… !", "English", {"nothing"}),
        ("ni hao shi jie", "Chinese", {"script"}),
        ("打开 iPhone 看看", "zh-CN", set()),
        ("今日は天気がいいですね", "Japanese", set()),
        ("konnichiwa sekai", "Japanese", {"script"}),
        ("안녕하세요 여러분", "Korean", set()),
        ("你好世界", "Korean", {"script"}),
        ("Привет, мир", "Russian", set()),
        ("Privet, mir", "ru", {"script"}),
        ("Привет, мир", "English", {"script"}),
        ("Привет, мир", "Auto", set()),
        ("Sannu da zuwa, ƙasa", "Hausa", set()),
        ("Привет, мир", "Klingon", set()),
    ],
)
def test_defects_of_texts(text: str, language: str, defects: set[str]) -> None:
    assert set(inspect_text(text, language)[2]) == defects


def test_notes_show_the_defect() -> None:
    notes = inspect_text("zero\u200bwidth <b>", "English")[2]
    assert notes == {"invisible": "U+200B ZERO WIDTH SPACE", "markup": '"<b>"'}


def test_a_syllable_counts_the_same_in_any_script() -> None:
    """Rates are compared with absolute limits, so what is said matters, not how many signs it is written with."""
    same = {
        "Chinese": "早上好今天天气很好",
        "English": "Good morning, fine weather today",
        "Korean": "좋은 아침입니다 오늘 날씨가",
    }
    units = {language: inspect_text(text, language)[1] for language, text in same.items()}
    assert max(units.values()) < 1.5 * min(units.values()), units
    assert inspect_text("a b, 12!", "English")[:2] == (4, 10.0)
