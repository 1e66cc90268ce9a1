"""The speakers of an evaluation: the references that are cloned, and what voices are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.audio import AudioError, load_audio
from finetuning.base_model import Base
from finetuning.disk import checksum, read_json
from finetuning.errors import UserError
from finetuning.evaluation_models import Model, Options, preset_rows
from finetuning.manifest import normalize_text
from finetuning.row_index import Manifest
from finetuning.settings import Settings
from finetuning.speakers import choose_reference
from finetuning.training_rows import TrainingRows

#: So many speakers are taken by default.
NUM_SPEAKERS = 3


@dataclass(frozen=True)
class Voice:
    """A speaker.

    Attributes:
        files: all references that are known and there.
        reference: the one that clones hear, its checksum and its transcript; None where it is not known.
        stored: (checkpoint's folder, row of its codec table) where the vector of the voice is stored in one, as it was
            before training; else it is that of the files.
    """

    speaker: str
    files: Sequence[Path] = ()
    reference: Path | None = None
    checksum: str | None = None
    transcript: str | None = None
    stored: tuple[Path, int] | None = None


def choose_speakers(checkpoints: Sequence[Model], wanted: Sequence[str]) -> list[str]:
    """The speakers that are named, else the run's first few; each once, as the run spells it.

    Raises:
        UserError: the run has no such speaker.
    """
    known: dict[str, str] = {}
    for name in (name for model in checkpoints for name in _speakers_of(model)):
        known.setdefault(speaker_key(name), name)
    if not known:
        raise UserError(
            "--checkpoints: none of them says which speakers it was trained for; name a checkpoint of a run as well"
        )
    if not wanted:
        return list(known.values())[:NUM_SPEAKERS]
    if unknown := [name for name in wanted if speaker_key(name) not in known]:
        raise UserError(f"--speakers: the run has no speaker {', '.join(unknown)}; it has: {', '.join(known.values())}")
    return [known[key] for key in dict.fromkeys(map(speaker_key, wanted))]


def speaker_key(name: str) -> str:
    """The same for all spellings of a speaker that differ in case and white space only."""
    return " ".join(name.lower().split())


def _speakers_of(model: Model) -> list[str]:
    """The names that the run trained, as its rows spell them; of another checkpoint all that it knows."""
    return list(_speaker_entries(model)) or list(preset_rows(model.config))


def _speaker_entries(model: Model) -> Mapping[str, Any]:
    entries = (read_json(model.folder / "speaker_encoder" / "speaker_config.json") or {}).get("speakers")
    return entries if isinstance(entries, dict) else {}


def find_voices(
    settings: Settings,
    options: Options,
    speakers: Sequence[str],
    checkpoints: Sequence[Model],
    base: Base | None,
    rows: TrainingRows | None,
    notes: list[str],
) -> list[Voice]:
    """The speakers with what is known of their voices.

    Raises:
        UserError: a reference cannot be used, or whose it is is not said.
    """
    given = given_references(options.references, speakers)
    if options.reference_text and len(speakers) > 1:
        raise UserError(f"--reference_text is for one speaker, not for {', '.join(speakers)}; choose with --speakers")
    voices = []
    for speaker in speakers:
        saved = _saved_references(speaker, checkpoints, notes)
        reference = given.get(speaker) or next(iter(saved), None) or _other_reference(settings, speaker, rows)
        files = saved or ([reference] if reference else [])
        if speaker in given:
            hear(given[speaker], "--reference")
        for file in files:
            hear(file, f"reference of {speaker}")
        stored = _stored_row(settings, speaker, base, [] if saved else checkpoints)
        voice = Voice(speaker, files, stored=stored)
        voices.append(_with_reference(voice, reference, settings, options, rows) if reference else voice)
    return voices


def given_references(items: Iterable[str], speakers: Sequence[str]) -> dict[str, Path]:
    """--reference: a file, of the only speaker, or speaker=file of each.

    Raises:
        UserError: a file is not there, or whose voice it is is not said.
    """
    found = {}
    names = {speaker_key(name): name for name in speakers}
    for item in items:
        name, sign, file = item.partition("=")
        if is_file(item) or not sign:
            name, file = speakers[0], item
            if len(speakers) > 1:
                raise UserError(f"--reference: whose voice is {item}? say {speakers[0]}={item}")
        if speaker_key(name) not in names:
            raise UserError(f"--reference: {name} is none of the speakers {', '.join(speakers)}")
        if not is_file(file):
            raise UserError(f"--reference: {file} does not exist")
        found[names[speaker_key(name)]] = Path(file)
    return found


def _saved_references(speaker: str, checkpoints: Sequence[Model], notes: list[str]) -> list[Path]:
    """The files that checkpoints were given the speaker's vector by, as far as they are still there."""
    key = speaker_key(speaker)
    entries = [
        entry for model in checkpoints for name, entry in _speaker_entries(model).items() if speaker_key(name) == key
    ]
    saved = [Path(file) for entry in entries if isinstance(entry, dict) for file in entry.get("references") or ()]
    saved = list(dict.fromkeys(saved))
    files = [file for file in saved if file.is_file()]
    if 0 < len(files) < len(saved):
        notes.append(
            f"{len(saved) - len(files)} of the {len(saved)} references of {speaker} are gone; voices are compared with "
            "the mean of the others"
        )
    return files


def hear(file: Path, what: str) -> np.ndarray:
    """(num_samples,) float32 at 24 kHz of a reference.

    Args:
        what: it is, for the message.

    Raises:
        UserError: it cannot be used.
    """
    try:
        return load_audio(file)
    except AudioError as error:
        way_out = "name another file" if what == "--reference" else "bring it back, or remove it to go without it"
        raise UserError(f"{what}: {file}: {error}; {way_out}") from None


def _stored_row(
    settings: Settings, speaker: str, base: Base | None, checkpoints: Sequence[Model]
) -> tuple[Path, int] | None:
    """Where the vector of a voice is stored: in a base that knows the speaker, as in training; else in a checkpoint
    whose run did not train it, since a row that trains would move with what it is to judge."""
    key = speaker.lower()
    if base is not None and base.is_custom_voice and settings.export_type != "base" and key in preset_rows(base.config):
        return base.folder, preset_rows(base.config)[key]
    for model in checkpoints:
        if key in preset_rows(model.config) and model.run.get("SPEAKER_EMBEDDING_TRAINABLE") is False:
            return model.folder, preset_rows(model.config)[key]
    return None


def _with_reference(
    voice: Voice, reference: Path, settings: Settings, options: Options, rows: TrainingRows | None
) -> Voice:
    transcript = options.reference_text or _transcript(settings, reference, rows)
    transcript = normalize_text(transcript) if transcript else None
    return replace(voice, reference=reference, checksum=checksum(reference), transcript=transcript)


def _other_reference(settings: Settings, speaker: str, rows: TrainingRows | None) -> Path | None:
    """REF_AUDIO_PATH of SPEAKER_NAME, else a clip of the training rows."""
    file, key = settings.ref_audio_path, speaker_key(speaker)
    if file is not None and file.is_file() and key == speaker_key(settings.speaker_name):
        return file
    if rows is None:
        return None
    spelled = {speaker_key(name): name for name in rows.train.distinct("speaker")}
    try:
        return Path(choose_reference(rows.train, spelled[key])) if key in spelled else None
    except UserError:
        return None


def _transcript(settings: Settings, reference: Path, rows: TrainingRows | None) -> str | None:
    is_of_settings = settings.ref_audio_path is not None and _is_same(str(settings.ref_audio_path), reference)
    if is_of_settings and settings.ref_text:
        return settings.ref_text
    return transcript_of(rows.train, reference) if rows is not None else None


def transcript_of(rows: Manifest, file: Path) -> str | None:
    """What a reference says, by the rows that name it or whose clip it is."""
    for column, text_column in (("ref_audio", "ref_text"), ("audio", "text")):
        names, places = rows.labels(column)
        same = [place for place, name in enumerate(names) if name.endswith(file.name) and _is_same(name, file)]
        found = np.flatnonzero(np.isin(places, same) & rows.has(text_column))
        if same and len(found):
            return rows[int(found[0])][text_column] or None
    return None


def _is_same(name: str, file: Path) -> bool:
    return Path(name).resolve() == file.resolve()


def is_file(item: str) -> bool:
    """Whether what was typed names a file that is there."""
    try:
        return Path(item).is_file()
    except (OSError, ValueError):  # a text that is too long for a file's name
        return False
