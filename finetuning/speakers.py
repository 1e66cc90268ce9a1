"""One fp32 vector per speaker, computed before training and exported bit for bit.

Each distinct reference goes through the speaker encoder once and alone: references of different lengths cannot be
batched, and padding would change the vector. A speaker's vector is the mean over its distinct references (or that of
one of them, SPEAKER_EMBEDDING), rounded to the dtype that the export stores, so that what training inserts is what
inference looks up. Speakers that a custom_voice base knows already keep their rows.

A checkpoint of EXPORT_TYPE=base has no rows for speakers: there every row of the data has the vector of its own
reference (see ``references``), and the mean stands for the speaker where rows have none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from finetuning.audio import AudioError, audio_duration_seconds, load_audio
from finetuning.balance import rows_by_label
from finetuning.base_model import Base, voice_encoder
from finetuning.codec import FRAMES_PER_SECOND
from finetuning.codec_rows import allocate_codec_rows
from finetuning.console import say
from finetuning.errors import UserError
from finetuning.quality import BEST_REFERENCE_SECONDS, REFERENCE_SECONDS, cleanliness_db
from finetuning.row_index import Manifest
from finetuning.settings import Settings
from finetuning.voice import reference_vector

#: At most so many candidates are read, those nearest to 7.5 s first.
MAX_REFERENCE_CANDIDATES = 32
#: So many distinct references of a speaker are read at most; the mean over more would be the same voice.
MAX_REFERENCES = 1000
#: Paths that are looked up at a time.
_PATHS_AT_ONCE = 1000


@dataclass(frozen=True)
class Speakers:
    """The speakers of a run.

    Attributes:
        names: as the rows spell them; keys of the export are the lower-case forms.
        vectors: (num_speakers, H) float32, already rounded to the export's dtype.
        codec_rows: each speaker's row of the codec table; None where checkpoints have no speakers (EXPORT_TYPE=base).
        references: the distinct reference files that each vector was computed from; none for a speaker of the base.
    """

    names: Sequence[str]
    vectors: torch.Tensor
    codec_rows: Sequence[int | None]
    references: Sequence[Sequence[str]]

    @property
    def index(self) -> dict[str, int]:
        """Lower-case name -> row of ``vectors``."""
        return {name.lower(): index for index, name in enumerate(self.names)}


def prepare_speakers(manifest: Manifest, model: Any, base: Base, settings: Settings) -> Speakers:
    """Finds every speaker's references, computes the vectors and gives out rows of the codec table.

    Raises:
        UserError: no reference can be had, a name is a preset's, or the table is full.
    """
    names = manifest.distinct("speaker")
    return make_speakers(
        names, lambda wanted: find_references(manifest, wanted, settings), model, base, settings=settings
    )


def make_speakers(
    names: list[str],
    references_of: Callable[[list[str]], Mapping[str, Sequence[str]]],
    model: Any,
    base: Base,
    settings: Settings,
) -> Speakers:
    """``prepare_speakers`` for names and references that come from elsewhere.

    Args:
        references_of: gives the reference files of some names; asked for new speakers only.
    """
    stored = _stored_rows(names, base, settings)
    new = [name for name in names if name not in stored]
    rows = stored | dict(zip(new, _new_rows(new, base, settings), strict=True))
    references = _chosen(references_of(new), settings.speaker_embedding) if new else {}
    encoder = voice_encoder(model, base) if new else None
    table = model.talker.model.codec_embedding.weight.detach()
    vectors = [
        table[stored[name]].float().cpu() if name in stored else _mean_vector(encoder, references[name])
        for name in tqdm(names, desc="speakers", disable=len(names) < 4)
    ]
    dtype = base.weight_dtypes()["talker.model.codec_embedding.weight"]
    return Speakers(
        names,
        torch.stack(vectors).to(dtype).float(),
        [rows[name] for name in names],
        [list(references.get(name, ())) for name in names],
    )


def _stored_rows(names: Sequence[str], base: Base, settings: Settings) -> dict[str, int]:
    """Rows of the speakers that a custom_voice base has; they are trained further as they are.

    Raises:
        UserError: others are named, and nothing can give them a vector; or a Base model has a preset of that name.
    """
    if settings.export_type == "base":
        return {}
    presets = base.talker_config.get("spk_id") or {}
    stored = {name: presets[name.lower()] for name in names if name.lower() in presets}
    if stored and not base.is_custom_voice:
        raise UserError(f'speaker "{next(iter(stored))}" is a preset of the base; use another name, so that it stays')
    unknown = [name for name in names if name not in stored]
    if unknown and not base.has_speaker_encoder:
        raise UserError(
            f"INIT_MODEL_PATH: {base.name} is a custom_voice checkpoint without a speaker encoder, so speaker "
            f'"{unknown[0]}" cannot get a vector; name the Base model of its size in SPEAKER_ENCODER_PATH, or one of '
            "its own speakers (SPEAKER_NAME or the rows' speaker): "
            f"{', '.join(sorted(presets)) or 'it has none'}"
        )
    return stored


def _new_rows(names: Sequence[str], base: Base, settings: Settings) -> list[int | None]:
    if settings.export_type == "base":
        return [None] * len(names)
    return [*allocate_codec_rows(base.config, len(names))]


def _chosen(references: Mapping[str, Sequence[str]], which: str) -> dict[str, list[str]]:
    """What SPEAKER_EMBEDDING takes of each speaker's references."""
    choose = {"mean": list, "first": lambda files: list(files[:1]), "longest": _longest}[which]
    return {name: choose(files) for name, files in references.items()}


def _longest(files: Sequence[str]) -> list[str]:
    return [max(files, key=_seconds)] if len(files) > 1 else list(files)


def _seconds(file: str) -> float:
    return audio_duration_seconds(file) or 0.0  # reading it says what is wrong, if it is chosen


# ------------------------------------------------------------------------------------------------------ references


def find_references(manifest: Manifest, names: Sequence[str], settings: Settings) -> dict[str, list[str]]:
    """Each speaker's distinct reference files, in the order of first use.

    A row's own ``ref_audio`` comes first, then REF_AUDIO_PATH, then one clip of the speaker, which is said.

    Raises:
        UserError: REF_AUDIO_PATH does not exist, or a speaker has neither a reference nor a clip to choose.
    """
    if settings.ref_audio_path and not settings.ref_audio_path.is_file():
        raise UserError(f"REF_AUDIO_PATH: {settings.ref_audio_path} does not exist")
    rows_of, references = rows_by_speaker(manifest), manifest.label_numbers("ref_audio")
    found: dict[str, list[str]] = {}
    for name in names:
        rows = rows_of[name]
        own = manifest.select(_first_uses(rows, references[rows], name)).column("ref_audio")
        distinct = dict.fromkeys(str(Path(path).resolve()) for path in own)
        if (references[rows] < 0).any():
            default = settings.ref_audio_path or choose_reference(manifest, name, rows)
            distinct[str(Path(default).resolve())] = None
        found[name] = list(distinct)
    return found


def _first_uses(rows: np.ndarray, references: np.ndarray, name: str) -> np.ndarray:
    """The rows that use a reference for the first time, in their order; evenly thinned where they are too many."""
    distinct, first = np.unique(references, return_index=True)
    uses = rows[np.sort(first[distinct >= 0])]
    if len(uses) <= MAX_REFERENCES:
        return uses
    say(f'speaker "{name}" has {len(uses)} references; its vector is the mean over {MAX_REFERENCES} of them')
    return uses[np.linspace(0, len(uses) - 1, MAX_REFERENCES).astype(int)]


def rows_by_speaker(manifest: Manifest) -> dict[str, np.ndarray]:
    """Each speaker's rows, sorted, in the order of the speakers' first use."""
    names, speakers = manifest.labels("speaker")
    return dict(zip(names, rows_by_label(speakers), strict=True))


def choose_reference(manifest: Manifest, speaker: str, rows: np.ndarray | None = None) -> str:
    """The cleanest clip of a speaker: of 5–10 s if there is one, else of 3–30 s, else the longest.

    Args:
        rows: of the speaker, where they are known.
    """
    own = manifest.select(rows_by_speaker(manifest)[speaker] if rows is None else rows)
    # Copies name the original's file: it would count once for each of them.
    clips = own.select(np.flatnonzero(own.has("audio") & ~own.has("augmentation")))
    seconds = clips.column("num_codec_frames") / FRAMES_PER_SECOND
    for shortest, longest in (BEST_REFERENCE_SECONDS, REFERENCE_SECONDS):
        fitting = np.flatnonzero((shortest <= seconds) & (seconds <= longest))
        by_distance = np.argsort(np.abs(seconds[fitting] - sum(BEST_REFERENCE_SECONDS) / 2), kind="stable")
        if chosen := _cleanest(_existing_files(clips.select(fitting[by_distance]), MAX_REFERENCE_CANDIDATES)):
            say(f'reference of speaker "{speaker}": {chosen} (chosen among {len(fitting)} clips)')
            return chosen
    longest_first = np.argsort(-seconds, kind="stable")
    chosen = next(iter(_existing_files(clips.select(longest_first), 1)), None)
    if chosen is None:
        raise UserError(
            f'speaker "{speaker}": its rows name no ref_audio and have no audio file to choose from; '
            "set REF_AUDIO_PATH or give the rows a ref_audio"
        )
    say(
        f'reference of speaker "{speaker}": {chosen}, the longest clip, because none is between '
        f"{REFERENCE_SECONDS[0]:g} and {REFERENCE_SECONDS[1]:g} s; a clean 5-10 s REF_AUDIO_PATH would be better",
    )
    return chosen


def _existing_files(clips: Manifest, count: int) -> list[str]:
    """Paths of the first so many clips whose audio file is there."""
    files: list[str] = []
    for start in range(0, len(clips), _PATHS_AT_ONCE):
        positions = np.arange(start, min(start + _PATHS_AT_ONCE, len(clips)))
        paths = clips.select(positions).column("audio")
        files += islice(filter(os.path.isfile, paths), count - len(files))
        if len(files) == count:
            break
    return files


def _cleanest(candidates: Sequence[str]) -> str | None:
    scored = []
    for path in candidates:
        try:
            scored.append((cleanliness_db(load_audio(path)), path))
        except AudioError:
            continue
    return max(scored)[1] if scored else None


# --------------------------------------------------------------------------------------------------------- vectors


def _mean_vector(encoder: nn.Module, references: Sequence[str]) -> torch.Tensor:
    return torch.stack([reference_vector(encoder, path) for path in references]).mean(0)


def speaker_vector(model: Any, reference: str | Path) -> torch.Tensor:
    """(H,) float32 on the CPU: the base's speaker encoder on one reference, as stock's extract_speaker_embedding.

    Raises:
        UserError: the reference cannot be used.
    """
    return reference_vector(model.speaker_encoder, reference)
