"""Speech of espeak-ng for every clip of the plan, as FLAC files and the project's rows.

    python -m embedded.speech --scale small --folder WORK

Writes WORK/speech/<voice>/*.flac (24 kHz, mono, 16 bit, all equally loud), for training clips with the neutral twin of
each (*.neutral.flac), and WORK/speech/<split>.jsonl. A voice's folder appears when it is whole, so the same command
goes on where it was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from embedded.clips import twin_of
from embedded.espeak import EXECUTABLE, Espeak, check_espeak
from embedded.plan import SPLITS, Clip, Voice, all_clips
from embedded.stage import Work, main_of
from finetuning.audio import SAMPLE_RATE_HZ, resample
from finetuning.disk import free_bytes, new_folder, read_json, write_json
from finetuning.errors import UserError

#: The loudness of every clip: root mean square, full scale 1.
RMS = 0.08
#: Below this a sample is silence; so much of it stays before and behind the words.
SILENCE = 1e-3
#: Before: three frames, in which text that runs beside the frames gets ahead of them.
SILENCE_BEFORE_SECONDS, SILENCE_BEHIND_SECONDS = 0.24, 0.16
#: Longer than nearly every clip; FLAC takes about 60 % of 16-bit PCM.
_SECONDS_PER_CLIP, _BYTES_PER_SECOND = 2 * 4.0, SAMPLE_RATE_HZ * 2
#: A reference should last so long; the first of a voice's training clips that does is the reference of its rows.
MIN_REFERENCE_SECONDS = 3.0


def make_speech(work: Work) -> dict[str, Any]:
    """Speaks what is missing and writes the row files; the stage's figures.

    Raises:
        UserError: espeak-ng is missing or fails, or the disk has too little space; then nothing is written.
    """
    clips = all_clips(work.scale)
    folder = work.folder / "speech"
    voices = {clip.voice.name: clip.voice for clip in clips}
    clips_of = {name: [clip for clip in clips if clip.voice.name == name] for name in voices}
    missing = [name for name in voices if not _is_whole(folder / name, clips_of[name])]
    if missing:
        check_espeak()
        check_space(folder, sum(len(clips_of[name]) for name in missing))
        espeak = Espeak(folder / "espeak", list(voices.values()))
        with ThreadPoolExecutor(work.num_threads) as pool:
            list(pool.map(lambda name: _speak_voice(folder / name, clips_of[name], espeak), missing))
    rows = [row for name in voices for row in read_json(folder / name / "rows.json")["rows"]]
    for split in SPLITS:
        _write_rows(folder / f"{split}.jsonl", [row for row in rows if row["split"] == split])
    return _figures(rows)


def check_space(folder: Path, num_clips: int) -> None:
    """Raises UserError when the disk cannot hold that many clips."""
    needed, free = int(num_clips * _SECONDS_PER_CLIP * _BYTES_PER_SECOND), free_bytes(folder)
    if free < needed:
        raise UserError(
            f"--folder: the speech needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB; "
            "choose a folder on a larger disk, or --scale small"
        )


def speak(espeak: Espeak, voice: Voice, text: str) -> tuple[np.ndarray, np.ndarray]:
    """A clip and its neutral twin: (num_samples,) float32 each at 24 kHz, silence cut to a little, equally loud.

    Raises:
        UserError: espeak-ng failed or said nothing.
    """
    waveform, twin = (_at_24_khz(*espeak.say(voice, text, is_neutral)) for is_neutral in (False, True))
    loud = np.flatnonzero(np.abs(waveform) > SILENCE)
    if not len(loud):
        raise UserError(f"{EXECUTABLE} said nothing as {voice.name}: {text}")
    first = loud[0] - int(SILENCE_BEFORE_SECONDS * SAMPLE_RATE_HZ)
    length = loud[-1] + int(SILENCE_BEHIND_SECONDS * SAMPLE_RATE_HZ) - first
    return _cut(waveform, first, length), _cut(twin, first, length)


def _at_24_khz(waveform: np.ndarray, rate_hz: int) -> np.ndarray:
    return resample(waveform, rate_hz, SAMPLE_RATE_HZ)


def _cut(waveform: np.ndarray, first: int, length: int) -> np.ndarray:
    """(length,) from sample ``first`` on, which may lie before its beginning, at the loudness of all clips."""
    cut = np.zeros(length, np.float32)
    source = waveform[max(0, first) : max(0, first + length)]
    cut[max(0, -first) : max(0, -first) + len(source)] = source
    return np.clip(cut * (RMS / np.sqrt(np.mean(source**2))), -0.99, 0.99)


# ------------------------------------------------------------------------------------------------------ a voice


def _clip_plan(clips: Sequence[Clip]) -> list[dict[str, Any]]:
    return [{"voice": asdict(clip.voice), "text": clip.text, "split": clip.split} for clip in clips]


def _is_whole(folder: Path, clips: Sequence[Clip]) -> bool:
    """Whether the folder holds these very clips."""
    return (read_json(folder / "rows.json") or {}).get("plan") == _clip_plan(clips)


def _speak_voice(folder: Path, clips: Sequence[Clip], espeak: Espeak) -> None:
    with new_folder(folder) as unfinished:
        seconds = []
        for number, clip in enumerate(clips):
            waveform, twin = speak(espeak, clip.voice, clip.text)
            path = unfinished / f"{number:04d}.flac"
            soundfile.write(path, waveform, SAMPLE_RATE_HZ, subtype="PCM_16")
            if clip.split == "train":
                soundfile.write(twin_of(path), twin, SAMPLE_RATE_HZ, subtype="PCM_16")
            seconds.append(len(waveform) / SAMPLE_RATE_HZ)
        write_json(unfinished / "rows.json", {"plan": _clip_plan(clips), "rows": _rows(folder.name, clips, seconds)})


def _rows(voice: str, clips: Sequence[Clip], seconds: Sequence[float]) -> list[dict[str, Any]]:
    """The voice's rows, paths from the folder of all voices; held-out rows take a training clip as reference where
    the voice has one."""
    numbers = [n for n, clip in enumerate(clips) if clip.split in ("train", "demo_train")] or list(range(len(clips)))
    long_enough = [number for number in numbers if seconds[number] >= MIN_REFERENCE_SECONDS]
    reference = long_enough[0] if long_enough else max(numbers, key=lambda number: seconds[number])
    shared = {
        "speaker": voice,
        "language": "English",
        "ref_audio": f"{voice}/{reference:04d}.flac",
        "ref_text": clips[reference].text,
    }
    return [
        {"audio": f"{voice}/{number:04d}.flac", "text": clip.text}
        | shared
        | {"split": clip.split, "seconds": length, "f0_hz": clip.voice.f0_hz}
        for number, (clip, length) in enumerate(zip(clips, seconds, strict=True))
    ]


# ---------------------------------------------------------------------------------------------------- all voices


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(unfinished, path)


def _figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    hours = sum(row["seconds"] for row in rows) / 3600
    figures: dict[str, Any] = {"voices": len({row["speaker"] for row in rows}), "hours": round(hours, 2)}
    for split in SPLITS:
        chosen = [row for row in rows if row["split"] == split]
        hours = sum(row["seconds"] for row in chosen) / 3600
        figures |= {f"{split}_clips": len(chosen), f"{split}_hours": round(hours, 3)}
    return figures


if __name__ == "__main__":
    main_of("speech", make_speech, __doc__)
