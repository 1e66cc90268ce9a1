"""Which references the rows of a run have, where each row has its own (EXPORT_TYPE=base); see ``references``.

``fixed_choice`` takes what the rows name, ``drawn_choice`` a pool of clips for each speaker. Nothing is read here but
the rows: vectors and codes come later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from finetuning.codec import FRAMES_PER_SECOND
from finetuning.errors import UserError
from finetuning.manifest import normalize_text
from finetuning.quality import REFERENCE_SECONDS
from finetuning.row_index import Manifest
from finetuning.settings import Settings
from finetuning.speakers import choose_reference, rows_by_speaker

#: REFERENCE_SAMPLING=same_speaker draws among so many clips of a speaker, evenly spread over its rows.
POOL_CLIPS = 100


@dataclass(frozen=True)
class Chosen:
    """The references of a run, each file once.

    Attributes:
        files: absolute paths.
        texts: what each says; None where nobody knows.
        rows: the training row whose clip each is, or -1.
        places: "FILE line N" where each is named first, for messages; None for one that no row names.
        number_of: file -> its number.
    """

    files: list[str] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    places: list[str | None] = field(default_factory=list)
    number_of: dict[str, int] = field(default_factory=dict)

    def add(self, path: str, text: str | None, place: str | None = None, row: int = -1) -> int:
        """The number of a file, new or known."""
        file = os.path.realpath(path)
        if (number := self.number_of.get(file)) is not None:
            self.texts[number] = self.texts[number] or text
            return number
        self.number_of[file] = len(self.files)
        self.files.append(file)
        self.texts.append(text)
        self.places.append(place)
        self.rows.append(row)
        return len(self.files) - 1

    def find_rows(self, train: Manifest) -> None:
        """Which of them are clips of training rows, which then know their text; altered copies have other codes."""
        clips = np.flatnonzero(train.has("audio") & ~train.has("augmentation"))
        files, places = train.select(clips).labels("audio")
        _, first = np.unique(places, return_index=True)
        for file, row in zip(resolve_all(files), clips[first].tolist(), strict=True):
            if (number := self.number_of.get(file)) is not None and self.rows[number] < 0:
                self.rows[number] = row
                self.texts[number] = self.texts[number] or train[row]["text"]

    def check_texts(self) -> None:
        """Raises UserError where rows in context would have nothing to read."""
        silent = [number for number, text in enumerate(self.texts) if not text]
        if silent:
            place = self.places[silent[0]]
            advice = "give the rows a ref_text" if place else "set REF_TEXT"
            raise UserError(
                f"ICL_FRACTION: {len(silent)} of {len(self.files)} references have no transcript, the first of them "
                f"{self.files[silent[0]]} ({place or 'REF_AUDIO_PATH'}); {advice}, or set "
                "REFERENCE_SAMPLING=same_speaker, which takes clips of the rows"
            )


@dataclass(frozen=True)
class Assigned:
    """What the rows of one manifest have.

    Attributes:
        speakers: (num_rows,) int32, each row's speaker, in the order of first use.
        fixed: (num_rows,) int32, the reference that each row has, or -1 where it is drawn.
        itself: (num_rows,) int32, the number that the row's own clip has among the references, or -1.
        members: the references that rows are drawn from, speaker after speaker.
        ends: (num_speakers,) int64, where those of each speaker end.
    """

    speakers: np.ndarray
    fixed: np.ndarray
    itself: np.ndarray
    members: np.ndarray
    ends: np.ndarray


# ----------------------------------------------------------------------------------------------------------- fixed


def fixed_choice(train: Manifest, validation: Manifest | None, settings: Settings) -> tuple[Chosen, list[Assigned]]:
    """What rows name; for others REF_AUDIO_PATH, what a training row of the speaker names, or one clip of it.

    Raises:
        UserError: a speaker has none of these.
    """
    chosen = Chosen()
    manifests = [rows for rows in (train, validation) if rows is not None]
    named = [_add_named(chosen, manifest) for manifest in manifests]
    defaults = _defaults(chosen, manifests, named[0], settings)
    chosen.find_rows(train)
    return chosen, [
        _assigned(chosen, manifest, np.where(numbers >= 0, numbers, defaults[number]), {})
        for number, (manifest, numbers) in enumerate(zip(manifests, named, strict=True))
    ]


def _add_named(chosen: Chosen, manifest: Manifest) -> np.ndarray:
    """(num_rows,) int32, the reference that each row names, or -1."""
    labels = manifest.label_numbers("ref_audio")
    number_of_label = np.full(int(labels.max(initial=-1)) + 2, -1, dtype=np.int32)
    for is_one in (labels >= 0, (labels >= 0) & manifest.has("ref_text")):  # the text may stand in a later row
        rows = np.flatnonzero(is_one)
        _, first = np.unique(labels[rows], return_index=True)
        rows = rows[np.sort(first)]
        some = manifest.select(rows)
        columns = (some.column(name) for name in ("ref_audio", "ref_text", "line"))
        for label, path, text, line in zip(labels[rows], *columns, strict=True):
            number_of_label[label] = chosen.add(path, text, f"{manifest.file_name} line {line}")
    return number_of_label[labels]


def _defaults(chosen: Chosen, manifests: Sequence[Manifest], named: np.ndarray, settings: Settings) -> list[np.ndarray]:
    """For each manifest (num_rows,) int32, the reference of a row that names none; -1 where no row of its speaker needs
    one."""
    train = manifests[0]
    spelling = {name.lower(): (name, rows) for name, rows in rows_by_speaker(train).items()}
    numbers: dict[str, int] = {}
    found = []
    for manifest in manifests:
        without = manifest.label_numbers("ref_audio") < 0
        names, speakers = manifest.labels("speaker")
        for place in np.unique(speakers[without]).tolist():
            if (key := names[place].lower()) not in numbers:
                numbers[key] = _default_of(chosen, *spelling[key], train, named, settings)
        found.append(np.array([numbers.get(name.lower(), -1) for name in names], dtype=np.int32)[speakers])
    return found


def _default_of(
    chosen: Chosen, speaker: str, rows: np.ndarray, train: Manifest, named: np.ndarray, settings: Settings
) -> int:
    if settings.ref_audio_path is not None:
        return chosen.add(str(settings.ref_audio_path), normalize_text(settings.ref_text or "") or None)
    if len(own := rows[named[rows] >= 0]):
        return int(named[own[0]])
    return chosen.add(choose_reference(train, speaker, rows), None)


# ----------------------------------------------------------------------------------------------------------- drawn


def drawn_choice(train: Manifest, validation: Manifest | None) -> tuple[Chosen, list[Assigned]]:
    """A pool of clips for every speaker.

    Raises:
        UserError: a speaker has less than two.
    """
    chosen, pools = Chosen(), {}
    seconds = train.column("num_codec_frames") / FRAMES_PER_SECOND
    is_clip, labels = train.has("audio") & ~train.has("augmentation"), train.label_numbers("audio")
    for name, rows in rows_by_speaker(train).items():
        rows = rows[is_clip[rows]]
        fitting = rows[(seconds[rows] >= REFERENCE_SECONDS[0]) & (seconds[rows] <= REFERENCE_SECONDS[1])]
        clips = _spread(train, fitting, labels)
        clips = clips if len(clips) > 1 else _spread(train, rows, labels)
        check_pool(name, len(clips))
        pools[name.lower()] = [chosen.add(path, text, None, row) for row, path, text in clips]
    manifests = [rows for rows in (train, validation) if rows is not None]
    drawn = [np.full(len(manifest), -1, dtype=np.int32) for manifest in manifests]
    return chosen, [_assigned(chosen, *each, pools) for each in zip(manifests, drawn, strict=True)]


def check_pool(speaker: str, num_clips: int) -> None:
    """Raises UserError where a speaker has too few clips to draw another one."""
    if num_clips < 2:
        raise UserError(
            f'REFERENCE_SAMPLING: speaker "{speaker}" has {num_clips} clip(s) whose audio file is there, two are '
            "needed to draw another one; set it to fixed, or leave the speaker out. Rows of a dataset that embeds its "
            "clips get files with SAVE_AUDIO=true"
        )


def _spread(train: Manifest, rows: np.ndarray, labels: np.ndarray) -> list[tuple[int, str, str]]:
    """(row, audio, text) of POOL_CLIPS clips at most, evenly spread, whose audio file is there; each clip once.

    Args:
        labels: (num_rows,) equal for equal audio.
    """
    _, first = np.unique(labels[rows], return_index=True)
    rows = rows[np.sort(first)]
    even = np.linspace(0, len(rows) - 1, min(len(rows), POOL_CLIPS)).astype(int)
    others = np.setdiff1d(np.arange(len(rows)), even)  # asked only where files of the even ones are gone
    found: dict[str, tuple[int, str, str]] = {}
    for some in np.split(np.concatenate([even, others]), range(POOL_CLIPS, len(rows), POOL_CLIPS)):
        part = train.select(rows[some])
        for row, path, text in zip(rows[some].tolist(), part.column("audio"), part.column("text"), strict=True):
            if os.path.isfile(path) and len(found) < POOL_CLIPS:
                found.setdefault(os.path.realpath(path), (row, path, text))
        if len(found) == POOL_CLIPS:
            break
    return sorted(found.values())


# ------------------------------------------------------------------------------------------------------------ both


def _assigned(chosen: Chosen, manifest: Manifest, fixed: np.ndarray, pools: Mapping[str, Sequence[int]]) -> Assigned:
    names, speakers = manifest.labels("speaker")
    files, places = manifest.labels("audio")
    numbers = [chosen.number_of.get(file, -1) for file in resolve_all(files)]
    members = [np.array(pools.get(name.lower(), ()), dtype=np.int32) for name in names]
    return Assigned(
        speakers,
        fixed.astype(np.int32),
        np.array([*numbers, -1], dtype=np.int32)[places],
        np.concatenate([np.empty(0, np.int32), *members]),
        np.cumsum([len(some) for some in members], dtype=np.int64),
    )


def resolve_all(paths: Sequence[str]) -> list[str]:
    """``os.path.realpath`` of many; each folder is looked up once."""
    folders: dict[str, str] = {}
    resolved = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        full = os.path.join(folders[folder], name)
        resolved.append(os.path.realpath(full) if os.path.islink(full) else full)
    return resolved
