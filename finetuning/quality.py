"""What can be measured on one clip and its text. What the figures mean for a data set is checks.py's.

``measure_clip`` runs in the workers that decode, once a clip, and its result is stored in the encoded row under
``measures``; so it takes a few milliseconds, and gives the same figures for the same samples everywhere.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from finetuning.audio import SAMPLE_RATE_HZ

#: What stands for the level of digital silence; below the rounding of 16 bits.
QUIETEST_DB = -120.0
#: From here on a sample counts as clipped (a little under full scale: resampling rounds flat tops off) …
CLIPPING_LEVEL = 0.99
#: … and so do this many equal samples in a row that are this near to the clip's peak (clipped first, then turned down).
FLAT_TOP_SAMPLES, FLAT_TOP_SHARE = 4, 0.9

#: Edges are searched in blocks of 10 ms.
EDGE_BLOCK = SAMPLE_RATE_HZ // 100
#: A block counts as silent when it is this far below the speech, …
SILENCE_BELOW_SPEECH_DB = 40.0
#: … or, in noisy clips, not further than this above the noise floor …
SILENCE_ABOVE_NOISE_DB = 6.0
#: … but never when it is nearer to the speech than this: soft consonants are.
SOFT_SPEECH_DB = 25.0

#: Short-time spectra: 21 ms windows, 10.7 ms apart, bins of 47 Hz.
FFT_SIZE, FFT_HOP = 512, 256
#: At most so many spectra a clip, evenly spread, so that a long clip costs little more than a short one.
MAX_SPECTRA = 400
#: Bins that are added to one band (188 Hz): less scatter, and still narrow enough to hear between words.
BINS_PER_BAND = 4
#: The quantile over time that is taken for noise, band by band. It lies some 5 dB under the mean of steady noise, which
#: makes up for words that leave no moment of silence in short clips.
NOISE_QUANTILE = 0.05
#: A band's level in loud moments: the quantile over time. High, because hissing sounds are short.
LOUD_QUANTILE = 0.95
#: A band limit is a cliff: the spectrum drops by this within CLIFF_HZ and does not come back. Voices fade more slowly.
CLIFF_DB, CLIFF_HZ = 22.0, 700.0
#: No recording ends lower than this; a hummed clip does.
LOWEST_LIMIT_HZ = 2500.0
#: No limit was found: half the sampling rate.
FULL_BAND_HZ = SAMPLE_RATE_HZ / 2

#: BS.1770-4: blocks of 400 ms that overlap by three quarters; the absolute and the relative gate.
LOUDNESS_STEP_SECONDS, LOUDNESS_STEPS_PER_BLOCK = 0.1, 4
LOUDNESS_GATE_LUFS, LOUDNESS_RELATIVE_GATE_LU = -70.0, -10.0

#: A reference is chosen among clips of this length …
REFERENCE_SECONDS = (3.0, 30.0)
#: … and among these, if there are any.
BEST_REFERENCE_SECONDS = (5.0, 10.0)
#: Further signal-to-noise than this is not heard, so it does not make a better reference.
MAX_USEFUL_SNR_DB = 50.0
#: What a reference loses, in dB: for a thousandth of clipped samples (up to this), …
CLIPPING_PENALTY_DB = 60.0
#: … for each second of silence at its edges beyond the first half, …
SILENCE_PENALTY_DB = 10.0
#: … for each kHz of missing band below 10 kHz, and for each hundredth of DC offset.
BAND_PENALTY_DB, GOOD_BAND_HZ, DC_PENALTY_DB = 4.0, 10_000.0, 5.0

#: What a character counts for, in letters of an alphabet: how long it takes to say.
UNITS = {"CJK": 3.0, "HANGUL": 2.5, "HIRAGANA": 2.0, "KATAKANA": 2.0, "ETHIOPIC": 2.0, "digit": 4.0}
#: A text fits its language when at least this share of it (in units) is in the language's script.
MIN_SCRIPT_SHARE = 0.3
#: The scripts of languages, by English name and code; what is not listed is not judged.
SCRIPTS_OF_LANGUAGES = {
    "english en german de french fr italian it spanish es portuguese pt dutch nl polish pl turkish tr swedish sv "
    "danish da norwegian no finnish fi czech cs hungarian hu romanian ro indonesian id vietnamese vi hausa ha "
    "swahili sw yoruba yo igbo ig zulu zu": ("LATIN",),
    "russian ru ukrainian uk bulgarian bg belarusian be": ("CYRILLIC",),
    "chinese zh mandarin cantonese yue beijing sichuan": ("CJK", "BOPOMOFO"),
    "japanese ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "korean ko": ("HANGUL",),
    "arabic ar persian fa urdu ur": ("ARABIC",),
    "hindi hi marathi mr nepali ne": ("DEVANAGARI",),
    "bengali bn": ("BENGALI",),
    "tamil ta": ("TAMIL",),
    "telugu te": ("TELUGU",),
    "greek el": ("GREEK",),
    "hebrew he": ("HEBREW",),
    "thai th": ("THAI",),
    "amharic am": ("ETHIOPIC",),
}
_SCRIPTS = {name: scripts for names, scripts in SCRIPTS_OF_LANGUAGES.items() for name in names.split()}
_KNOWN_SCRIPTS = sorted({script for scripts in _SCRIPTS.values() for script in scripts})

#: Defects of transcripts and how they are called; a row may have several.
TEXT_DEFECTS = {
    "digits": "digits",
    "markup": "HTML tags or entities",
    "url": "web addresses",
    "control": "control characters",
    "invisible": "invisible characters",
    "private": "private-use or unassigned characters",
    "replacement": "replacement characters (lost in a conversion)",
    "mojibake": "wrongly decoded UTF-8",
    "emoji": "emoji or pictographs",
    "nothing": "no letter at all",
    "script": "a script that does not fit the language",
}
_PATTERNS = {
    "digits": re.compile(r"\d+"),
    "markup": re.compile(r"</?[A-Za-z][^<>]{0,80}>|&(?:[A-Za-z]{2,8}|#\d{1,7}|#x[0-9A-Fa-f]{1,6});"),
    "url": re.compile(r"https?://\S+|www\.\w\S*", re.IGNORECASE),
    "mojibake": re.compile("[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac.?"),
}
#: Joiners that Persian, Hindi and others are written with.
_JOINERS = "\u200c\u200d"
_EXAMPLE_CHARACTERS = 60


def measure_clip(waveform: np.ndarray) -> dict[str, float | str | None]:
    """Figures of one clip, ready for JSON.

    Args:
        waveform: (num_samples,) float32 at 24 kHz, full scale 1.

    Returns:
        seconds
        peak_db: loudest sample, dB of full scale
        loudness_lufs: integrated loudness (BS.1770-4); None for clips under 0.4 s or below -70 LUFS
        clipped_share: share of samples in flat tops or at full scale, 0 to 1
        dc_offset: mean of the samples, -1 to 1
        leading_silence_seconds, trailing_silence_seconds
        noise_floor_db: level of what is always there, dB of full scale
        snr_db: level of the speech over that of the noise
        bandwidth_hz: where the spectrum breaks off; 12000 when it does not
        audio_hash: 16 hex digits; equal for equal 16-bit samples, whatever the file's format
    """
    waveform = np.ascontiguousarray(waveform, dtype=np.float32)
    if len(waveform) == 0:
        raise ValueError("a clip without samples has no figures")
    peak = float(np.abs(waveform).max())
    noise_floor_db, snr_db, bandwidth_hz = _spectral_figures(waveform)
    leading, trailing = silent_edges_seconds(waveform)
    loudness = loudness_lufs(waveform)
    return {
        "seconds": round(len(waveform) / SAMPLE_RATE_HZ, 3),
        "peak_db": round(_db(peak**2), 2),
        "loudness_lufs": None if loudness is None else round(loudness, 2),
        "clipped_share": round(_clipped_share(waveform, peak), 6),
        "dc_offset": round(float(waveform.mean(dtype=np.float64)), 5),
        "leading_silence_seconds": round(leading, 2),
        "trailing_silence_seconds": round(trailing, 2),
        "noise_floor_db": round(noise_floor_db, 1),
        "snr_db": round(snr_db, 1),
        "bandwidth_hz": round(bandwidth_hz),
        "audio_hash": audio_hash(waveform),
    }


def audio_hash(waveform: np.ndarray) -> str:
    """16 hex digits over (num_samples,) float32, rounded to 16 bits."""
    samples = np.clip(np.rint(waveform * 32768), -32768, 32767).astype("<i2")
    return hashlib.blake2b(samples.tobytes(), digest_size=8).hexdigest()


def reference_score(measures: Mapping[str, Any]) -> float:
    """The figure that a reference is chosen by, in dB: the higher the cleaner. Length is the caller's to judge.

    Args:
        measures: of ``measure_clip``.
    """
    silence = measures["leading_silence_seconds"] + measures["trailing_silence_seconds"]
    missing_khz = max(0.0, GOOD_BAND_HZ - measures["bandwidth_hz"]) / 1000
    return (
        min(measures["snr_db"], MAX_USEFUL_SNR_DB)
        - CLIPPING_PENALTY_DB * min(1.0, measures["clipped_share"] * 1000)
        - SILENCE_PENALTY_DB * max(0.0, silence - 0.5)
        - BAND_PENALTY_DB * missing_khz
        - DC_PENALTY_DB * abs(measures["dc_offset"]) * 100
    )


def cleanliness_db(waveform: np.ndarray) -> float:
    """``reference_score`` of a clip that was not measured before."""
    return reference_score(measure_clip(waveform))


def _db(power: float) -> float:
    return max(QUIETEST_DB, 10 * math.log10(power)) if power > 0 else QUIETEST_DB


# -------------------------------------------------------------------------------------------------------- waveform


def _clipped_share(waveform: np.ndarray, peak: float) -> float:
    at_full_scale = np.abs(waveform) >= CLIPPING_LEVEL
    near_peak = np.flatnonzero(np.abs(waveform) >= max(FLAT_TOP_SHARE * peak, 1e-3))
    in_flat_top = np.zeros(len(waveform), dtype=bool)
    # Runs of equal samples: positions that follow each other and hold the same value.
    same = (np.diff(near_peak) == 1) & (np.diff(waveform[near_peak]) == 0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop - start + 1 >= FLAT_TOP_SAMPLES:
            in_flat_top[near_peak[start] : near_peak[stop] + 1] = True
    return float((at_full_scale | in_flat_top).mean())


def silent_edges_seconds(waveform: np.ndarray) -> tuple[float, float]:
    """Seconds of silence (or of nothing but noise) before and after the speech; in doubt it counts as speech.

    Args:
        waveform: (num_samples,) float32 at 24 kHz.
    """
    loud = loud_blocks(waveform)
    # One loud block alone is a click or the scatter of noise; speech lasts.
    lasting = np.flatnonzero(loud[:-1] & loud[1:]) if len(loud) > 1 else np.flatnonzero(loud)
    if len(lasting) == 0:
        return 0.0, 0.0
    end_of_speech = (lasting[-1] + 2) * EDGE_BLOCK
    trailing = max(0, len(waveform) - int(end_of_speech)) / SAMPLE_RATE_HZ
    return float(lasting[0] * EDGE_BLOCK / SAMPLE_RATE_HZ), trailing


def loud_blocks(waveform: np.ndarray) -> np.ndarray:
    """(num_blocks,) bool: which whole blocks of 10 ms are louder than silence or noise; in doubt they are.

    Where all is equally loud, digital silence as well, all of it is.

    Args:
        waveform: (num_samples,) float32 at 24 kHz.
    """
    num_blocks = len(waveform) // EDGE_BLOCK
    if num_blocks == 0:
        return np.zeros(0, dtype=bool)
    blocks = waveform[: num_blocks * EDGE_BLOCK].reshape(num_blocks, EDGE_BLOCK)
    centred = blocks - waveform.mean(dtype=np.float64).astype(np.float32)
    levels = 10 * np.log10(np.einsum("ij,ij->i", centred, centred) / EDGE_BLOCK + 1e-12)
    speech = np.percentile(levels, 95)
    noise = np.percentile(levels[levels > QUIETEST_DB + 20], 10) if (levels > QUIETEST_DB + 20).any() else speech
    threshold = max(speech - SILENCE_BELOW_SPEECH_DB, min(noise + SILENCE_ABOVE_NOISE_DB, speech - SOFT_SPEECH_DB))
    return levels > threshold


# -------------------------------------------------------------------------------------------------------- loudness


def loudness_lufs(waveform: np.ndarray) -> float | None:
    """Integrated loudness of (num_samples,) float32 at 24 kHz by BS.1770-4, or None (too short, or gated away)."""
    from scipy.signal import sosfilt

    step = round(LOUDNESS_STEP_SECONDS * SAMPLE_RATE_HZ)
    num_steps = len(waveform) // step
    if num_steps < LOUDNESS_STEPS_PER_BLOCK:
        return None
    weighted = sosfilt(k_weighting(SAMPLE_RATE_HZ), waveform[: num_steps * step].astype(np.float64))
    powers = (weighted.reshape(num_steps, step) ** 2).mean(axis=1)
    powers = np.convolve(powers, np.full(LOUDNESS_STEPS_PER_BLOCK, 1 / LOUDNESS_STEPS_PER_BLOCK), mode="valid")
    powers = powers[_lufs(powers) > LOUDNESS_GATE_LUFS]
    if len(powers) == 0:
        return None
    powers = powers[_lufs(powers) > _lufs(powers.mean()) + LOUDNESS_RELATIVE_GATE_LU]
    return float(_lufs(powers.mean()))


def _lufs(power: np.ndarray | float) -> np.ndarray:
    return -0.691 + 10 * np.log10(np.maximum(power, 1e-20))


@lru_cache(maxsize=4)
def k_weighting(rate_hz: int) -> np.ndarray:
    """(2, 6) second-order sections: BS.1770's shelf and high-pass.

    The standard lists coefficients for 48 kHz only; these are its analogue filters at any rate, and at 48 kHz the same.
    """
    shelf_gain, shelf_q, high_pass_q = 10 ** (3.999843853973347 / 20), 0.7071752369554196, 0.5003270373238773
    shelf_mid = shelf_gain**0.4996667741545416
    k = math.tan(math.pi * 1681.974450955533 / rate_hz)
    norm = 1 + k / shelf_q + k * k
    shelf = [
        (shelf_gain + shelf_mid * k / shelf_q + k * k) / norm,
        2 * (k * k - shelf_gain) / norm,
        (shelf_gain - shelf_mid * k / shelf_q + k * k) / norm,
        1.0,
        2 * (k * k - 1) / norm,
        (1 - k / shelf_q + k * k) / norm,
    ]
    k = math.tan(math.pi * 38.13547087602444 / rate_hz)
    norm = 1 + k / high_pass_q + k * k
    high_pass = [1.0, -2.0, 1.0, 1.0, 2 * (k * k - 1) / norm, (1 - k / high_pass_q + k * k) / norm]
    return np.array([shelf, high_pass])


# -------------------------------------------------------------------------------------------------------- spectrum


def _spectral_figures(waveform: np.ndarray) -> tuple[float, float, float]:
    """(noise floor in dB of full scale, signal-to-noise in dB, bandwidth in Hz)."""
    bands = _band_powers(waveform)
    # Digital silence between words (a gate, or padding) says nothing about the noise under the speech.
    bands = bands[bands.sum(axis=1) > 10 ** (QUIETEST_DB / 10)]
    if len(bands) == 0:
        return QUIETEST_DB, 0.0, FULL_BAND_HZ
    floor, loud = np.quantile(bands, (NOISE_QUANTILE, LOUD_QUANTILE), axis=0)
    powers = bands.sum(axis=1)
    speech_power = float(powers[powers >= np.quantile(powers, 0.6)].mean())
    noise_power = min(max(float(floor.sum()), 10 ** (QUIETEST_DB / 10)), speech_power)
    snr_db = _db(max(speech_power / noise_power - 1, 1e-2))
    return _db(noise_power), snr_db, _bandwidth_hz(loud)


def _band_powers(waveform: np.ndarray) -> np.ndarray:
    """(num_spectra, num_bands): a row's sum is the mean square of its window's samples."""
    padded = np.pad(waveform, (0, max(0, FFT_SIZE - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT_SIZE)[::FFT_HOP]
    frames = frames[:: math.ceil(len(frames) / MAX_SPECTRA)]
    window = np.hanning(FFT_SIZE + 1)[:-1].astype(np.float32)
    powers = np.abs(np.fft.rfft(frames * window, axis=1)[:, 1:]) ** 2  # without the DC offset
    scale = 2 / (FFT_SIZE * float((window**2).sum()))
    return scale * powers.reshape(len(frames), -1, BINS_PER_BAND).sum(axis=2, dtype=np.float64)


def _bandwidth_hz(loud: np.ndarray) -> float:
    """Where the speech's spectrum breaks off, or FULL_BAND_HZ.

    The lowest band above which everything is CLIFF_DB weaker than what lies just below. Noise may lie above a limit
    (added later, or of the rounding to 16 bits), and images of a poor resampler; a voice that fades has no cliff.

    Args:
        loud: (num_bands,) powers, the LOUD_QUANTILE over time.
    """
    levels = 10 * np.log10(loud + 1e-20)
    band_hz = FULL_BAND_HZ / len(levels)
    reach, first = round(CLIFF_HZ / band_hz), round(LOWEST_LIMIT_HZ / band_hz)
    for edge in range(first, len(levels) - reach):
        # The next band may hold the slope of the filter: the limit is in there.
        if levels[edge - reach : edge + 1].max() - levels[edge + 2 :].max() >= CLIFF_DB:
            return float((edge + 2) * band_hz)
    return FULL_BAND_HZ


# ------------------------------------------------------------------------------------------------------------ text


def inspect_text(text: str, language: str) -> tuple[int, float, dict[str, str]]:
    """What a transcript is made of.

    Returns:
        number of letters and digits; how much there is to say, in letters of an alphabet; defect -> note.
    """
    defects = {kind: _note(found.group()) for kind, regex in _PATTERNS.items() if (found := regex.search(text))}
    num_characters, units, units_of_scripts = 0, 0.0, Counter()
    for character, count in Counter(text).items():
        kind, weight = _character(character)
        if weight:
            num_characters += count
            units += weight * count
        if kind in TEXT_DEFECTS:
            defects.setdefault(kind, f"U+{ord(character):04X} {unicodedata.name(character, 'without a name')}")
        elif kind:
            units_of_scripts[kind] += weight * count
    if not num_characters:
        defects["nothing"] = _note(text)
    if problem := _script_problem(units_of_scripts, language):
        defects["script"] = f"{problem}: {_note(text)}"
    return num_characters, units, defects


def _note(text: str) -> str:
    shown = text if len(text) <= _EXAMPLE_CHARACTERS else text[:_EXAMPLE_CHARACTERS] + "…"
    return f'"{shown}"'


@lru_cache(maxsize=65_536)
def _character(character: str) -> tuple[str, float]:
    """(script of a letter, or defect, or ""; units)."""
    category = unicodedata.category(character)
    if category.startswith("L"):
        name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
        script = next((script for script in _KNOWN_SCRIPTS if name.startswith(script)), "other")
        return script, UNITS.get(script, 1.0)
    if category == "Nd":
        return "", UNITS["digit"]
    if character == "\ufffd":
        return "replacement", 0.0
    if category == "Cc" and not character.isspace():
        return "control", 0.0
    if category == "Cf" and character not in _JOINERS:
        return "invisible", 0.0
    if category in ("Co", "Cn", "Cs"):
        return "private", 0.0
    # Pictographs, and the older symbols that phones draw as emoji.
    if category == "So" and (ord(character) >= 0x1F000 or 0x2600 <= ord(character) <= 0x27BF):
        return "emoji", 0.0
    return "", 0.0


def _script_problem(units_of_scripts: Mapping[str, float], language: str) -> str:
    scripts = _SCRIPTS.get(re.split(r"[-_ ]", language.casefold())[0])
    total = sum(units_of_scripts.values())
    if not scripts or not total:
        return ""
    if sum(units_of_scripts.get(script, 0.0) for script in scripts) >= MIN_SCRIPT_SHARE * total:
        return ""
    main = max(units_of_scripts, key=units_of_scripts.get)
    return f"{'other' if main == 'other' else main.title()} letters for {language}"
