"""espeak-ng with voice files of our own: every voice at one unchanging pitch, and its neutral twin.

espeak-ng's own variants waver (``flutter``), follow a melody and echo. A toy codec of 12.5 frames a second that knows
nothing of the phase at which the last frame ended cannot follow that. So each voice here speaks in a monotone, at a
pitch of which a whole number of periods fits into a frame (a multiple of 12.5 Hz): every frame can then begin where
the one before it ended. What makes a voice its own otherwise (formants, tone, voicing) stays as it is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile

from embedded.plan import Voice
from finetuning.disk import new_folder, read_json, write_json
from finetuning.errors import UserError

EXECUTABLE = "espeak-ng"
INSTALL_LINE = "apt-get install -y espeak-ng   (macOS: brew install espeak-ng)"
#: Words of a variant's file that move pitch or time, or add a room.
_UNSTEADY = ("pitch", "flutter", "roughness", "echo", "intonation", "speed", "stressLength")
#: Words that the neutral twin keeps: its name, and the rhythm, so that both say every sound at the same time.
_RHYTHM = ("language", "name", "stressAdd")
#: What espeak-ng takes off the pitch of a voice file to get Hz (at its default ``-p``).
_PITCH_OFFSET_HZ = 9
NEUTRAL_F0_HZ = 100


class Espeak:
    """espeak-ng with the voices of a plan.

    Args:
        folder: for its voice files (everything else in it links to the installed data).
        voices: that it shall have, with their twins; they are made anew when they change.

    Raises:
        UserError: espeak-ng is missing, or lacks a variant.
    """

    def __init__(self, folder: Path, voices: list[Voice]) -> None:
        check_espeak()
        self.folder = folder
        plan = [asdict(voice) for voice in voices]
        if (read_json(folder / "voices.json") or {}).get("voices") != plan:
            with new_folder(folder) as unfinished:
                _write_data(unfinished / "espeak-ng-data", installed_data(), voices)
                write_json(unfinished / "voices.json", {"voices": plan})

    def say(self, voice: Voice, text: str, is_neutral: bool = False) -> tuple[np.ndarray, int]:
        """What the voice, or its neutral twin, says: (num_samples,) float32, and the samples a second.

        Raises:
            UserError: espeak-ng failed or said nothing; the message has its words.
        """
        variant = voice.name + (_TWIN if is_neutral else "")
        options = ["-v", f"{voice.language}+{variant}", "-s", str(voice.rate), "--stdout"]
        command = [EXECUTABLE, f"--path={self.folder.resolve()}", *options]
        done = subprocess.run([*command, "--", text], capture_output=True, check=False)
        if done.returncode or len(done.stdout) < 100:
            raise UserError(f"{' '.join(command)} failed: {done.stderr.decode(errors='replace').strip() or 'no sound'}")
        return soundfile.read(BytesIO(_with_length(done.stdout)), dtype="float32")


_TWIN = "-neutral"


def check_espeak() -> None:
    """Raises UserError with the install line when espeak-ng is not on the PATH."""
    if shutil.which(EXECUTABLE) is None:
        raise UserError(f"{EXECUTABLE} is missing; install it: {INSTALL_LINE}")


def installed_data() -> Path:
    """The folder of the installed espeak-ng's data.

    Raises:
        UserError: it does not say where that is.
    """
    said = subprocess.run([EXECUTABLE, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"Data at: *(.+)", said)
    if not found or not (folder := Path(found[1].strip())).is_dir():
        raise UserError(f"{EXECUTABLE} --version names no folder of data; install it again: {INSTALL_LINE}")
    return folder


def _write_data(folder: Path, installed: Path, voices: list[Voice]) -> None:
    """A folder of data with these voices in place of the installed variants, and links to everything else."""
    own = folder / "voices" / "!v"
    own.mkdir(parents=True)
    for parent, skipped in ((installed, "voices"), (installed / "voices", "!v")):
        for source in sorted(parent.iterdir()):
            if source.name != skipped:
                (folder / source.relative_to(installed)).symlink_to(source.resolve())
    for voice in voices:
        source = installed / "voices" / "!v" / voice.variant
        if not source.is_file():
            raise UserError(f"{EXECUTABLE} has no variant {voice.variant} ({source}); install 1.51 or a newer one")
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
        (own / voice.name).write_text(steady(lines, voice.name, voice.f0_hz), encoding="utf-8")
        (own / f"{voice.name}{_TWIN}").write_text(neutral(lines, f"{voice.name}{_TWIN}"), encoding="utf-8")


def steady(lines: list[str], name: str, f0_hz: int) -> str:
    """A variant's file that speaks in a monotone.

    Args:
        f0_hz: above 60; espeak-ng is exact to the Hz, so a whole number.
    """
    kept = [line for line in lines if _word(line) not in (*_UNSTEADY, "name")]
    pitch = f0_hz + _PITCH_OFFSET_HZ
    return "\n".join([*kept, f"name {name}", "flutter 0", "roughness 0", f"pitch {pitch} {pitch}", ""])


def neutral(lines: list[str], name: str) -> str:
    """The same rhythm in espeak-ng's plain voice: what is said, without who says it."""
    return steady([line for line in lines if _word(line) in _RHYTHM], name, NEUTRAL_F0_HZ)


def _word(line: str) -> str:
    return line.split()[0] if line.split() else ""


def _with_length(wav: bytes) -> bytes:
    """The file with its true lengths: to a pipe espeak-ng writes them before it knows them."""
    body = wav.index(b"data") + 8
    size = (len(wav) - body).to_bytes(4, "little")
    return wav[:4] + (len(wav) - 8).to_bytes(4, "little") + wav[8 : body - 4] + size + wav[body:]
