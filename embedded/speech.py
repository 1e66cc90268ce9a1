"""Speech of espeak-ng for every clip of the plan, as FLAC files and the project's rows.

    python -m embedded.speech --scale small --folder WORK

Writes WORK/speech/<voice>/*.flac (24 kHz, mono, 16 bit, all equally loud) and WORK/speech/<split>.jsonl. A voice's
folder appears when it is whole, so the same command goes on where it was interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from embedded.plan import SPLITS, Clip, Voice, all_clips
from embedded.stage import Work, main_of
from finetuning.audio import SAMPLE_RATE_HZ, resample
from finetuning.disk import free_bytes, new_folder, read_json, write_json
from finetuning.errors import UserError

EXECUTABLE = "espeak-ng"
INSTALL_LINE = "apt-get install -y espeak-ng   (macOS: brew install espeak-ng)"
#: The loudness of every clip: root mean square, full scale 1.
RMS = 0.08
#: Below this a sample is silence; so much of it stays before and behind the words.
SILENCE = 1e-3
SILENCE_BEFORE_SECONDS, SILENCE_BEHIND_SECONDS = 0.05, 0.15
#: Longer than nearly every clip; FLAC takes about 60 % of 16-bit PCM.
_SECONDS_PER_CLIP, _BYTES_PER_SECOND = 4.0, SAMPLE_RATE_HZ * 2
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
    with ThreadPoolExecutor(work.num_threads) as pool:
        list(pool.map(lambda name: _speak_voice(folder / name, clips_of[name]), missing))
    rows = [row for name in voices for row in read_json(folder / name / "rows.json")["rows"]]
    for split in SPLITS:
        _write_rows(folder / f"{split}.jsonl", [row for row in rows if row["split"] == split])
    return _figures(rows)


def check_espeak() -> None:
    """Raises UserError with the install line when espeak-ng is not on the PATH."""
    if shutil.which(EXECUTABLE) is None:
        raise UserError(f"{EXECUTABLE} is missing; install it: {INSTALL_LINE}")


def check_space(folder: Path, num_clips: int) -> None:
    """Raises UserError when the disk cannot hold that many clips."""
    needed, free = int(num_clips * _SECONDS_PER_CLIP * _BYTES_PER_SECOND), free_bytes(folder)
    if free < needed:
        raise UserError(
            f"--folder: the speech needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB; "
            "choose a folder on a larger disk, or --scale small"
        )


def speak(voice: Voice, text: str) -> np.ndarray:
    """What espeak-ng says: (num_samples,) float32 at 24 kHz, silence cut to a little, all clips equally loud.

    Raises:
        UserError: espeak-ng failed or said nothing; the message has its words.
    """
    command = [EXECUTABLE, "-v", f"{voice.language}+{voice.variant}", "-s", str(voice.rate), "-p", str(voice.pitch)]
    done = subprocess.run([*command, "--stdout", "--", text], capture_output=True, check=False)
    if done.returncode or len(done.stdout) < 100:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.decode(errors='replace').strip() or 'no sound'}")
    waveform, rate_hz = soundfile.read(BytesIO(_with_length(done.stdout)), dtype="float32")
    return _trimmed(resample(waveform, rate_hz, SAMPLE_RATE_HZ), " ".join(command))


def _with_length(wav: bytes) -> bytes:
    """The file with its true lengths: to a pipe espeak-ng writes them before it knows them."""
    body = wav.index(b"data") + 8
    size = (len(wav) - body).to_bytes(4, "little")
    return wav[:4] + (len(wav) - 8).to_bytes(4, "little") + wav[8 : body - 4] + size + wav[body:]


def _trimmed(waveform: np.ndarray, command: str) -> np.ndarray:
    loud = np.flatnonzero(np.abs(waveform) > SILENCE)
    if not len(loud):
        raise UserError(f"{command} said nothing; is this variant installed?")
    first = max(0, loud[0] - int(SILENCE_BEFORE_SECONDS * SAMPLE_RATE_HZ))
    waveform = waveform[first : loud[-1] + int(SILENCE_BEHIND_SECONDS * SAMPLE_RATE_HZ)]
    return np.clip(waveform * (RMS / np.sqrt(np.mean(waveform**2))), -0.99, 0.99).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ a voice


def _clip_plan(clips: Sequence[Clip]) -> list[dict[str, Any]]:
    return [{"voice": asdict(clip.voice), "text": clip.text, "split": clip.split} for clip in clips]


def _is_whole(folder: Path, clips: Sequence[Clip]) -> bool:
    """Whether the folder holds these very clips."""
    return (read_json(folder / "rows.json") or {}).get("plan") == _clip_plan(clips)


def _speak_voice(folder: Path, clips: Sequence[Clip]) -> None:
    with new_folder(folder) as unfinished:
        seconds = []
        for number, clip in enumerate(clips):
            waveform = speak(clip.voice, clip.text)
            soundfile.write(unfinished / f"{number:04d}.flac", waveform, SAMPLE_RATE_HZ, subtype="PCM_16")
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
        {"audio": f"{voice}/{number:04d}.flac", "text": clip.text} | shared | {"split": clip.split, "seconds": length}
        for number, (clip, length) in enumerate(zip(clips, seconds, strict=True))
    ]


# ---------------------------------------------------------------------------------------------------- all voices


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(unfinished, path)


def _figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {"voices": len({row["speaker"] for row in rows})}
    for split in SPLITS:
        chosen = [row for row in rows if row["split"] == split]
        hours = sum(row["seconds"] for row in chosen) / 3600
        figures |= {f"{split}_clips": len(chosen), f"{split}_hours": round(hours, 3)}
    return figures


if __name__ == "__main__":
    main_of("speech", make_speech, __doc__)
