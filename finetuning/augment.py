"""Altered copies of clips: speed, pitch, gain and background noise, on the waveform before it is encoded.

What is done to a copy is drawn from SEED, the clip (its file's name and size) and the copy's number alone: neither the
place of a row nor the number of processes nor an interruption changes it. Waveforms are (num_samples,) float32 at
24 kHz.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.audio import (
    MIN_AUDIO_SECONDS,
    SAMPLE_RATE_HZ,
    SILENCE_PEAK,
    AudioError,
    audio_duration_seconds,
    load_audio,
)
from finetuning.dataset_files import AUDIO_SUFFIXES
from finetuning.errors import UserError
from finetuning.settings import Settings

#: Part of what a copy's codes belong to: raise it when the same recipe gives other samples.
AUGMENT_VERSION = 1
#: No sample of a copy is louder.
MAX_PEAK = 0.99
#: Drawn figures are rounded to so many digits before they are used: what a row says is exactly what was done.
DIGITS = 4
#: Window and hop of the phase vocoder, 21 and 5 ms. With librosa's default of 85 ms speech sounds as in a bath room: at
#: 0.92 and 1.08 times the speed, log-mel figures of the demo's voice moved by 1.22 instead of 0.64 on average.
VOCODER_WINDOW, VOCODER_HOP = 512, 128


# ------------------------------------------------------------------------------------------------------- waveforms


def change_speed(waveform: np.ndarray, speed: float) -> np.ndarray:
    """Faster (above 1) or slower speech at the same pitch; round(num_samples / speed) samples."""
    return _stretch(waveform, speed, 0.0)


def shift_pitch(waveform: np.ndarray, semitones: float) -> np.ndarray:
    """Higher or lower speech of the same length; the formants move with it, as if the speaker were another."""
    return _stretch(waveform, 1.0, semitones)


def change_gain(waveform: np.ndarray, gain_db: float) -> tuple[np.ndarray, float]:
    """(louder or softer waveform, the gain in dB), where the gain is as much less as keeps the peak at MAX_PEAK."""
    peak = float(np.abs(waveform).max())
    allowed_db = 20 * float(np.log10(MAX_PEAK / peak)) if peak > 0 else gain_db
    gain_db = min(gain_db, allowed_db)
    return np.clip(waveform * np.float32(10 ** (gain_db / 20)), -MAX_PEAK, MAX_PEAK), gain_db


def add_noise(waveform: np.ndarray, noise: np.ndarray, start: float, snr_db: float) -> np.ndarray:
    """Background noise behind a clip.

    Args:
        noise: of any length; a shorter one is repeated.
        start: in [0, 1), where in the noise the clip begins. A part that is silent gives way to the loudest.
        snr_db: mean power of the whole clip over that of the noise behind it.

    Raises:
        AudioError: the noise is silent.
    """
    part = _part_of(noise, start, len(waveform))
    noise_power = _power(part)
    if noise_power == 0:
        raise AudioError("silence only")
    scale = np.sqrt(_power(waveform) / noise_power / 10 ** (snr_db / 10))
    return waveform + part * np.float32(scale)


def _stretch(waveform: np.ndarray, speed: float, semitones: float) -> np.ndarray:
    """Both at once, at the same level: a phase vocoder changes the length, and reading what it gives faster or slower
    changes the pitch."""
    pitch = 2 ** (semitones / 12)
    if speed == 1 and pitch == 1:
        return waveform
    import librosa  # takes seconds

    stretched = waveform
    if speed != pitch:
        window = {"n_fft": VOCODER_WINDOW, "hop_length": VOCODER_HOP}
        stretched = librosa.effects.time_stretch(stretched, rate=speed / pitch, **window)
    if pitch != 1:
        stretched = librosa.resample(stretched, orig_sr=SAMPLE_RATE_HZ * pitch, target_sr=SAMPLE_RATE_HZ)
    stretched = librosa.util.fix_length(stretched, size=round(len(waveform) / speed))
    # The vocoder lets the phases of neighbouring frequencies drift apart, which costs speech 3 dB.
    level = np.sqrt(_power(waveform) / max(_power(stretched), 1e-20))
    return np.ascontiguousarray(stretched * np.float32(level), dtype=np.float32)


def _part_of(noise: np.ndarray, start: float, num_samples: int) -> np.ndarray:
    """(num_samples,) of the noise, from a place on or, where it is shorter, round and round."""
    if len(noise) <= num_samples:
        return np.resize(np.roll(noise, -int(start * len(noise))), num_samples)
    last = len(noise) - num_samples
    first = int(start * (last + 1))
    if np.abs(noise[first : first + num_samples]).max() < SILENCE_PEAK:
        first = int(np.clip(np.abs(noise).argmax() - num_samples // 2, 0, last))
    return noise[first : first + num_samples]


def _power(waveform: np.ndarray) -> float:
    return float(np.mean(np.square(waveform, dtype=np.float64)))


# --------------------------------------------------------------------------------------------------------- one copy


@dataclass(frozen=True)
class NoiseFile:
    """A file of AUGMENT_NOISE_DIR; ``name`` is its path within that folder."""

    name: str
    path: Path
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Recipe:
    """What is done to one copy.

    Attributes:
        gain_db: asked for; peaks may leave less.
        noise_start: in [0, 1), see ``add_noise``.
    """

    speed: float = 1.0
    pitch_semitones: float = 0.0
    gain_db: float = 0.0
    noise: NoiseFile | None = None
    noise_start: float = 0.0
    snr_db: float = 0.0

    def key(self) -> str:
        """16 hex digits that stand for the samples that it makes of a clip, wherever the noise folder lies."""
        noise = self.noise and (self.noise.name, self.noise.num_bytes, self.noise.modified_ns)
        parts = (AUGMENT_VERSION, self.speed, self.pitch_semitones, self.gain_db, noise, self.noise_start, self.snr_db)
        return _hash(*parts)[:16]

    def apply(self, waveform: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """(the copy, what was done to it as its row says it).

        Raises:
            AudioError: the noise cannot be used.
        """
        altered = _stretch(waveform, self.speed, self.pitch_semitones)
        record: dict[str, Any] = {"speed": self.speed, "pitch_semitones": self.pitch_semitones}
        noise = {}
        if self.noise is not None:
            try:
                altered = add_noise(altered, load_audio(self.noise.path), self.noise_start, self.snr_db)
            except AudioError as error:
                raise AudioError(f"AUGMENT_NOISE_DIR: {self.noise.path}: {error}") from None
            noise = {"noise": self.noise.name, "noise_start": self.noise_start, "snr_db": self.snr_db}
        altered, gain_db = change_gain(altered, self.gain_db)
        return altered, record | {"gain_db": round(gain_db, DIGITS)} | noise


@dataclass(frozen=True)
class AugmentedClip:
    """An audio file and what is to be done to it."""

    audio: Path
    recipe: Recipe

    def duration_seconds(self) -> float | None:
        """Of the copy, from the file's header; None when it cannot be read."""
        seconds = audio_duration_seconds(self.audio)
        return None if seconds is None else seconds / self.recipe.speed

    def load(self) -> tuple[np.ndarray, dict[str, Any]]:
        """See ``Recipe.apply``.

        Raises:
            AudioError: the clip or the noise cannot be used.
        """
        return self.recipe.apply(load_audio(self.audio))


# ----------------------------------------------------------------------------------------------------- all the copies


@dataclass(frozen=True)
class Augmentation:
    """How copies are made.

    Attributes:
        copies: of each clip.
        speed, pitch_semitones, gain_db: the largest change in either direction; 0 = none.
        noise: files, one of which lies behind each copy; empty = none.
        snr_db: how far below the clip the noise lies.
    """

    copies: int
    speed: float = 0.0
    pitch_semitones: float = 0.0
    gain_db: float = 0.0
    noise: tuple[NoiseFile, ...] = ()
    snr_db: float = 20.0
    seed: int = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> Augmentation | None:
        """As AUGMENT_COPIES and its like say; None where they are off.

        Raises:
            UserError: AUGMENT_NOISE_DIR holds no audio, or some that cannot be read.
        """
        if settings.augment_copies == 0:
            return None
        return cls(
            copies=settings.augment_copies,
            speed=settings.augment_speed,
            pitch_semitones=settings.augment_pitch_semitones,
            gain_db=settings.augment_gain_db,
            noise=find_noise(settings.augment_noise_dir) if settings.augment_noise_dir else (),
            snr_db=settings.augment_noise_snr_db,
            seed=settings.seed,
        )

    def recipes(self, name: str, num_bytes: int) -> list[Recipe]:
        """Of the copies of a clip.

        Args:
            name, num_bytes: of its file, which stay when it moves.
        """
        return [self._draw(name, num_bytes, number) for number in range(self.copies)]

    def digest(self) -> str:
        """Changes when any copy would."""
        return _hash(AUGMENT_VERSION, self)[:16]

    def _draw(self, *identity: Any) -> Recipe:
        generator = np.random.default_rng(int(_hash(self.seed, *identity), 16))
        # Always all of them, in this order: what is switched off does not change what the others are.
        speed, pitch, gain = generator.uniform(-1, 1, 3).tolist()
        choice, start = generator.random(2).tolist()
        noise = self.noise[int(choice * len(self.noise))] if self.noise else None
        return Recipe(
            speed=round(1 + speed * self.speed, DIGITS),
            pitch_semitones=round(pitch * self.pitch_semitones, DIGITS),
            gain_db=round(gain * self.gain_db, DIGITS),
            noise=noise,
            noise_start=round(start, DIGITS) % 1 if noise else 0.0,
            snr_db=self.snr_db if noise else 0.0,
        )


def find_noise(folder: Path) -> tuple[NoiseFile, ...]:
    """The audio files of a folder and those below it, by name.

    Raises:
        UserError: there are none, or one cannot be read or is too short; only headers are read.
    """
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if _is_audio(path)}
    if not names:
        raise UserError(f"AUGMENT_NOISE_DIR: {folder} holds no audio files ({', '.join(AUDIO_SUFFIXES)})")
    unusable = [name for name, path in sorted(names.items()) if not _is_usable(path)]
    if unusable:
        raise UserError(
            f"AUGMENT_NOISE_DIR: {len(unusable)} of the {len(names)} audio files in {folder} cannot be read or are "
            f"shorter than {MIN_AUDIO_SECONDS} s, the first: {unusable[0]}; remove or convert them"
        )
    return tuple(_noise_file(name, path) for name, path in sorted(names.items()))


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _is_usable(path: Path) -> bool:
    return (audio_duration_seconds(path) or 0.0) >= MIN_AUDIO_SECONDS


def _noise_file(name: str, path: Path) -> NoiseFile:
    status = os.stat(path)
    return NoiseFile(name, path, status.st_size, status.st_mtime_ns)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()
