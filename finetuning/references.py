"""The reference of every row, where a checkpoint clones (EXPORT_TYPE=base): a vector, and what may stand in context.

REFERENCE_SAMPLING says which: a row's own ``ref_audio``, else REF_AUDIO_PATH, else one clip of its speaker (fixed); or
some other clip of its speaker, drawn anew in every epoch (same_speaker). Vectors and codes are computed once, as
``create_voice_clone_prompt`` computes them, and kept in ``OUTPUT_DIR/rows/references-<key>/``, from where all processes
read them, memory-mapped.

A clip never stands in its own context: it would learn to copy.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from finetuning.audio import load_audio
from finetuning.base_model import Base, voice_encoder
from finetuning.codec import FRAMES_PER_SECOND, NUM_CODEBOOKS, Codec
from finetuning.dataset import Reference
from finetuning.disk import new_folder, remove_folder
from finetuning.draws import Draws
from finetuning.errors import UserError
from finetuning.quality import REFERENCE_SECONDS
from finetuning.row_index import Manifest
from finetuning.settings import Settings
from finetuning.speakers import Speakers, choose_reference
from finetuning.voice import reference_vector

#: REFERENCE_SAMPLING=same_speaker draws among so many clips of a speaker, evenly spread over its rows.
POOL_CLIPS = 100
#: Raise it when the same key would hold something else.
_FORMAT = 1


@dataclass(frozen=True)
class Clips:
    """The references of a run, each once.

    Attributes:
        files: absolute paths.
        texts: what each says; None where nobody knows.
        vectors: (num_references, H) float32.
        codes: (R_0 + R_1 + …, 16) int16, the frames of all of them; none where no row stands in context.
        ends: (num_references,) where the frames of each end.
    """

    files: Sequence[str]
    texts: Sequence[str | None]
    vectors: np.ndarray
    codes: np.ndarray
    ends: np.ndarray

    def reference(self, number: int, has_context: bool) -> Reference:
        """One of them, with what stands in context where it may."""
        vector, file = np.array(self.vectors[number]), self.files[number]
        if not has_context:
            return Reference(vector, file)
        start = int(self.ends[number - 1]) if number else 0
        codes = np.array(self.codes[start : int(self.ends[number])])
        return Reference(vector, file, self.texts[number], codes)

    def num_frames(self) -> np.ndarray:
        """(num_references,) R of each."""
        return np.diff(self.ends, prepend=0)


@dataclass(frozen=True)
class References:
    """The references of a manifest's rows; see ``dataset.ReferenceSource``.

    Attributes:
        choices: speaker's number -> the clips (numbers in ``clips``) that its rows may have.
        speakers: (num_rows,) each row's speaker.
        fixed: (num_rows,) the clip that each row has, or -1 where it is drawn.
        itself: (num_rows,) the number that the row's own clip has among the references, or -1.
        in_context: whether rows may stand in context of their reference.
    """

    clips: Clips
    choices: Sequence[np.ndarray]
    speakers: np.ndarray
    fixed: np.ndarray
    itself: np.ndarray
    in_context: bool

    @property
    def depends_on_epoch(self) -> bool:
        return bool((self.fixed < 0).any())

    def of(self, index: int, row: Mapping[str, Any], draws: Draws) -> Reference:
        """The reference of the row at ``index``."""
        itself, number = int(self.itself[index]), int(self.fixed[index])
        if number < 0:
            number = self._drawn(self.choices[self.speakers[index]], itself, row, draws)
        return self.clips.reference(number, self.in_context and number != itself)

    def context_frames(self) -> np.ndarray:
        """(num_rows,) frames that stand in a row's context at most."""
        if not self.in_context:
            return np.zeros(len(self.fixed), dtype=np.int64)
        frames = self.clips.num_frames()
        longest = np.array([frames[choices].max(initial=0) for choices in self.choices], dtype=np.int64)
        return np.where(self.fixed >= 0, frames[np.maximum(self.fixed, 0)], longest[self.speakers])

    def of_speaker(self, number: int) -> np.ndarray:
        """The references of a speaker's rows, in the order of first use."""
        if len(self.choices[number]):
            return self.choices[number]
        used, first = np.unique(self.fixed[self.speakers == number], return_index=True)
        return used[np.argsort(first)]

    def _drawn(self, choices: np.ndarray, itself: int, row: Mapping[str, Any], draws: Draws) -> int:
        others = choices[choices != itself]
        if not len(others):
            return int(choices[0])
        return int(others[draws.one_of(row, len(others))])


# ------------------------------------------------------------------------------------------------------- preparing


def speakers_of(names: list[str], references: References) -> Speakers:
    """Each speaker with the mean over its references, for where a row has none of its own; no rows of the table.

    Args:
        names: in the order of ``references.speakers``.
    """
    numbers = [references.of_speaker(number) for number in range(len(names))]
    vectors = [torch.from_numpy(references.clips.vectors[some].mean(0)) for some in numbers]
    files = [[references.clips.files[number] for number in some[:POOL_CLIPS]] for some in numbers]
    return Speakers(names, torch.stack(vectors), [None] * len(names), files)


def prepare_references(
    train: Manifest,
    validation: Manifest | None,
    model: Any,
    base: Base,
    settings: Settings,
    device: str,
    is_main: bool = True,
) -> tuple[References, References | None]:
    """The references of the training and the validation rows. The main process computes what others read.

    Args:
        device: for the codec, where references have to be encoded.

    Raises:
        UserError: a speaker has no usable reference; or, for rows in context, no transcript of it is known.
    """
    plan = _Plan.drawn(train, settings) if settings.reference_sampling == "same_speaker" else None
    plan = plan or _Plan.of_rows([rows for rows in (train, validation) if rows is not None], train, settings)
    if settings.icl_fraction:
        plan.check_texts()
    folder = settings.output_dir / "rows" / f"references-{plan.key(train, base, settings)}"
    if is_main and not folder.is_dir():
        _compute(folder, plan, train, model, base, settings, device)
    clips = _load(folder, plan)
    held_out = plan.references(clips, validation, settings) if validation else None
    return plan.references(clips, train, settings), held_out


@dataclass(frozen=True)
class _Plan:
    """Which references there are, before anything is computed.

    Attributes:
        files, texts: as in ``Clips``.
        rows: the training row whose clip each is, or -1.
        places: (JSONL, line) where each reference is named first, for messages; None for one that no row names.
        of_file: path as the rows have it -> number; {} where references are drawn.
        default: speaker's lower-case name -> number of the reference of rows that name none.
        pools: speaker's lower-case name -> numbers to draw from; {} where references are fixed.
        number_of: file -> its number.
    """

    files: list[str] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    places: list[tuple[Path, int] | None] = field(default_factory=list)
    of_file: dict[str, int] = field(default_factory=dict)
    default: dict[str, int] = field(default_factory=dict)
    pools: dict[str, list[int]] = field(default_factory=dict)
    number_of: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_rows(cls, manifests: Sequence[Manifest], train: Manifest, settings: Settings) -> _Plan:
        """The references that rows name, and one for each speaker with rows that name none."""
        plan, audio_rows = cls(), _rows_by_file(train)
        spelling = {name.lower(): name for name in train.distinct("speaker")}
        for manifest in manifests:
            # Rows that are held out stand in the file of the others.
            jsonl = settings.train_jsonl if manifest.arrow_file == train.arrow_file else settings.validation_jsonl
            numbers = manifest.label_numbers("ref_audio")
            for rows in (numbers >= 0, (numbers >= 0) & manifest.has("ref_text")):  # the text may stand in a later row
                firsts = _first_rows(manifest, numbers, rows)
                for path, text, line in zip(
                    *(firsts.column(name) for name in ("ref_audio", "ref_text", "line")), strict=True
                ):
                    plan.of_file[path] = plan._add(path, text, (jsonl, int(line)), audio_rows, train)
            names, speakers = manifest.labels("speaker")
            for place in sorted(set(speakers[numbers < 0].tolist())):
                if (name := names[place].lower()) not in plan.default:
                    plan.default[name] = plan._default_of(spelling[name], settings, audio_rows, train)
        return plan

    @classmethod
    def drawn(cls, train: Manifest, settings: Settings) -> _Plan:
        """A pool of clips for every speaker."""
        plan, audio_rows = cls(), {}
        names, speakers = train.labels("speaker")
        seconds = train.column("num_codec_frames") / FRAMES_PER_SECOND
        is_clip = train.has("audio") & ~train.has("augmentation")
        for place, name in enumerate(names):
            rows = np.flatnonzero((speakers == place) & is_clip)
            fitting = rows[(seconds[rows] >= REFERENCE_SECONDS[0]) & (seconds[rows] <= REFERENCE_SECONDS[1])]
            clips = _spread(train, fitting)
            clips = clips if len(clips) > 1 else _spread(train, rows)
            if len(clips) < 2:
                raise UserError(
                    f'REFERENCE_SAMPLING: speaker "{name}" has {len(clips)} clip(s) whose audio file is there, two are '
                    "needed to draw another one; set it to fixed, or leave the speaker out"
                )
            for row, path, text in clips:
                audio_rows[_resolved(path)] = row
                plan.pools.setdefault(name.lower(), []).append(plan._add(path, text, None, audio_rows, train))
        return plan

    def _add(
        self,
        path: str,
        text: str | None,
        place: tuple[Path, int] | None,
        audio_rows: Mapping[str, int],
        train: Manifest,
    ) -> int:
        """The number of a file, new or known."""
        file = _resolved(path)
        if (number := self.number_of.get(file)) is not None:
            self.texts[number] = self.texts[number] or text
            return number
        row = audio_rows.get(file, -1)
        self.number_of[file] = len(self.files)
        self.files.append(file)
        self.rows.append(row)
        self.texts.append(text or (train[row]["text"] if row >= 0 else None))
        self.places.append(place)
        return len(self.files) - 1

    def _default_of(self, speaker: str, settings: Settings, audio_rows: Mapping[str, int], train: Manifest) -> int:
        path, text = settings.ref_audio_path, settings.ref_text
        if path is None:
            path, text = choose_reference(train, speaker), None
        return self._add(str(path), text, None, audio_rows, train)

    def check_texts(self) -> None:
        """Raises UserError where rows in context would have nothing to read."""
        silent = [number for number, text in enumerate(self.texts) if not text]
        if silent:
            place = self.places[silent[0]]
            where = f"{place[0]} line {place[1]}" if place else "REF_AUDIO_PATH"
            raise UserError(
                f"ICL_FRACTION: {len(silent)} of {len(self.files)} references have no transcript, the first of them "
                f"{self.files[silent[0]]} ({where}); give the rows a ref_text (or set REF_TEXT), or set "
                "REFERENCE_SAMPLING=same_speaker, which takes clips of the rows"
            )

    def key(self, train: Manifest, base: Base, settings: Settings) -> str:
        """A hash of all that is computed from."""
        is_encoded, keeps_codes = settings.icl_fraction > 0, settings.data_mode == "none"
        models = [*base.encoder_source.weight_files(), *sorted(base.codec_folder.glob("*.safetensors"))]
        digest = hashlib.sha256(repr((_FORMAT, is_encoded, keeps_codes)).encode())
        for file in (*models, *self.files):
            status = os.stat(file) if os.path.isfile(file) else None
            digest.update(repr((str(file), status and (status.st_size, status.st_mtime_ns))).encode())
        if is_encoded and keeps_codes:
            for row in self.rows:
                digest.update(train[row]["codes"].tobytes() if row >= 0 else b"")
        return digest.hexdigest()[:16]

    def references(self, clips: Clips, manifest: Manifest, settings: Settings) -> References:
        """Each row's."""
        names, speakers = manifest.labels("speaker")
        files, places = manifest.labels("audio")
        numbers = [self.number_of.get(file, -1) for file in _resolve_all(files)]
        itself = np.array([*numbers, -1], dtype=np.int32)[places]
        choices = [np.array(self.pools.get(name.lower(), ()), dtype=np.int32) for name in names]
        fixed = np.full(len(manifest), -1, dtype=np.int32)
        if not self.pools:
            files, places = manifest.labels("ref_audio")
            numbers = np.array([self.of_file[file] for file in files] + [-1], dtype=np.int32)[places]
            defaults = np.array([self.default.get(name.lower(), -1) for name in names], dtype=np.int32)[speakers]
            fixed = np.where(numbers >= 0, numbers, defaults)
        return References(clips, choices, speakers, fixed, itself, settings.icl_fraction > 0)


def _rows_by_file(train: Manifest) -> dict[str, int]:
    """Audio file -> the training row whose clip it is; copies of a clip have other codes."""
    clips = np.flatnonzero(train.has("audio") & ~train.has("augmentation"))
    files, places = train.select(clips).labels("audio")
    _, first = np.unique(places, return_index=True)
    return dict(zip(_resolve_all(files), clips[first].tolist(), strict=True))


def _first_rows(manifest: Manifest, numbers: np.ndarray, is_one: np.ndarray) -> Manifest:
    """Of each number the first of these rows, in their order."""
    rows = np.flatnonzero(is_one)
    _, first = np.unique(numbers[rows], return_index=True)
    return manifest.select(rows[np.sort(first)])


def _spread(train: Manifest, rows: np.ndarray) -> list[tuple[int, str, str]]:
    """(row, audio, text) of POOL_CLIPS clips at most, evenly spread, whose audio file is there; each clip once."""
    _, first = np.unique(train.label_numbers("audio")[rows], return_index=True)
    rows = rows[np.sort(first)]
    even = np.linspace(0, len(rows) - 1, min(len(rows), POOL_CLIPS)).astype(int)
    others = np.setdiff1d(np.arange(len(rows)), even)  # asked only where files of the even ones are gone
    found: dict[str, tuple[int, str, str]] = {}
    for some in np.split(np.concatenate([even, others]), range(POOL_CLIPS, len(rows), POOL_CLIPS)):
        part = train.select(rows[some])
        for row, path, text in zip(rows[some].tolist(), part.column("audio"), part.column("text"), strict=True):
            if os.path.isfile(path) and len(found) < POOL_CLIPS:
                found.setdefault(_resolved(path), (row, path, text))
        if len(found) == POOL_CLIPS:
            break
    return sorted(found.values())


def _resolved(path: str) -> str:
    return os.path.realpath(path)


def _resolve_all(paths: Sequence[str]) -> list[str]:
    """``_resolved`` of many: each folder is looked up once."""
    folders: dict[str, str] = {}
    resolved = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        full = os.path.join(folders[folder], name)
        resolved.append(os.path.realpath(full) if os.path.islink(full) else full)
    return resolved


# ------------------------------------------------------------------------------------------------------- on disk


def _compute(
    folder: Path, plan: _Plan, train: Manifest, model: Any, base: Base, settings: Settings, device: str
) -> None:
    """Writes the folder, and removes those of other references."""
    encoder = voice_encoder(model, base)
    vectors = [reference_vector(encoder, file) for file in tqdm(plan.files, desc="references", disable=None)]
    codes = _codes_of(plan, train, base, settings, device) if settings.icl_fraction else []
    for other in folder.parent.glob("references-*"):
        remove_folder(other)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as unfinished:
        np.save(unfinished / "vectors.npy", torch.stack(vectors).numpy())
        np.save(unfinished / "codes.npy", np.concatenate([np.empty((0, NUM_CODEBOOKS), np.int16), *codes]))
        np.save(unfinished / "ends.npy", np.cumsum([len(clip) for clip in codes], dtype=np.int64))


def _codes_of(plan: _Plan, train: Manifest, base: Base, settings: Settings, device: str) -> list[np.ndarray]:
    if settings.data_mode == "none":
        return [_kept_codes(plan, train, number) for number in range(len(plan.files))]
    codec = Codec(base.codec_folder, device)
    bar = tqdm(plan.files, desc="codes of references", disable=None)
    return [codec.encode_reference(load_audio(file)) for file in bar]


def _kept_codes(plan: _Plan, train: Manifest, number: int) -> np.ndarray:
    """Those of the rows, which were padded to whole frames, so that the last frame is not quite inference's."""
    if plan.rows[number] < 0:
        raise UserError(
            f"ICL_FRACTION: the reference {plan.files[number]} is no clip of the rows and would have to be encoded, "
            "which DATA_MODE=none never does; set DATA_MODE=jsonl"
        )
    return train[plan.rows[number]]["codes"]


def _load(folder: Path, plan: _Plan) -> Clips:
    if not folder.is_dir():
        raise UserError(f"OUTPUT_DIR: {folder} is not there; all processes must see OUTPUT_DIR")
    arrays = [
        np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("vectors", "codes", "ends")
    ]
    return Clips(plan.files, plan.texts, *arrays)
