"""The reference of every row, where a checkpoint clones (EXPORT_TYPE=base): a vector, and what may stand in context.

REFERENCE_SAMPLING says which: a row's own ``ref_audio``, else that of its speaker (fixed); or some other clip of its
speaker, drawn anew in every epoch (same_speaker). See ``reference_choice``.

The main process chooses, computes vectors and codes as ``create_voice_clone_prompt`` does, and keeps all of it in
``OUTPUT_DIR/rows/references-<key>/``; every process reads it from there, memory-mapped:

===========================  ==========================================================================================
``vectors.npy``              (num_references, H) float32
``codes.npy``, ``ends.npy``  (R_0 + R_1 + …, 16) int16 frames, and where those of each end; none without rows in context
``computed.json``            a hash of these three
``rows-0.npz``, ``rows-1``   what the training and the validation rows have, see ``reference_choice.Assigned``
``references.json``          files, texts, and ``content``, a hash of everything
===========================  ==========================================================================================

A clip never stands in its own context, nor in that of a row with its text: the model would learn to copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from finetuning.audio import AudioError, load_audio
from finetuning.base_model import Base, voice_encoder
from finetuning.codec import NUM_CODEBOOKS, Codec
from finetuning.console import say
from finetuning.dataset import Reference
from finetuning.disk import new_folder, remove_folder, write_json
from finetuning.draws import Draws
from finetuning.errors import UserError
from finetuning.reference_choice import POOL_CLIPS, Assigned, Chosen, drawn_choice, fixed_choice
from finetuning.row_index import Manifest
from finetuning.settings import Settings
from finetuning.speakers import Speakers
from finetuning.voice import voice_vector

#: So many references are computed between two saves of a start that may be cut off.
CHUNK_REFERENCES = 1000
#: Raise it when the same key would hold something else.
_FORMAT = 2


@dataclass(frozen=True)
class Clips:
    """The references of a run, each once; see the module's table."""

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
        content: a hash of all that rows may get.
    """

    clips: Clips
    rows: Assigned
    content: str

    @property
    def in_context(self) -> bool:
        """Whether rows may stand in context of their reference."""
        return len(self.clips.ends) > 0

    @property
    def depends_on_epoch(self) -> bool:
        return bool((self.rows.fixed < 0).any())

    def of(self, index: int, row: Mapping[str, Any], draws: Draws) -> Reference:
        """The reference of the row at ``index``."""
        itself, number = int(self.rows.itself[index]), int(self.rows.fixed[index])
        if number < 0:
            number = self._drawn(self._choices(int(self.rows.speakers[index])), itself, row, draws)
        is_another = number != itself and self.clips.texts[number] != row["text"]
        return self.clips.reference(number, self.in_context and is_another)

    def context_frames(self) -> np.ndarray:
        """(num_rows,) frames that stand in a row's context at most."""
        fixed, speakers = self.rows.fixed, self.rows.speakers
        if not self.in_context:
            return np.zeros(len(fixed), dtype=np.int64)
        frames = self.clips.num_frames()
        choices = map(self._choices, range(len(self.rows.ends)))
        longest = np.array([frames[some].max(initial=0) for some in choices], dtype=np.int64)
        return np.where(fixed >= 0, frames[np.maximum(fixed, 0)], longest[speakers])

    def num_without_context(self) -> int:
        """Rows that never stand in context, because their reference is their own clip."""
        return int(((self.rows.fixed >= 0) & (self.rows.fixed == self.rows.itself)).sum())

    def of_speakers(self) -> list[np.ndarray]:
        """The references of each speaker's rows."""
        choices = [self._choices(number) for number in range(len(self.rows.ends))]
        pairs = np.unique(np.stack([self.rows.speakers, self.rows.fixed]), axis=1)
        return [some if len(some) else pairs[1, pairs[0] == number] for number, some in enumerate(choices)]

    def _choices(self, speaker: int) -> np.ndarray:
        start = int(self.rows.ends[speaker - 1]) if speaker else 0
        return self.rows.members[start : int(self.rows.ends[speaker])]

    def _drawn(self, choices: np.ndarray, itself: int, row: Mapping[str, Any], draws: Draws) -> int:
        others = choices[choices != itself]
        if not len(others):
            return int(choices[0])
        return int(others[draws.one_of(row, len(others))])


def speakers_of(names: list[str], references: References) -> Speakers:
    """Each speaker with the mean over its references, for where a row has none of its own; no rows of the table.

    Args:
        names: in the order of the speakers' first use.
    """
    numbers = references.of_speakers()
    vectors = [torch.from_numpy(references.clips.vectors[some[:POOL_CLIPS]].mean(0)) for some in numbers]
    files = [[references.clips.files[number] for number in some[:POOL_CLIPS]] for some in numbers]
    return Speakers(names, torch.stack(vectors), [None] * len(names), files)


# ------------------------------------------------------------------------------------------------------- preparing


def prepare_references(
    train: Manifest,
    validation: Manifest | None,
    model: Any,
    base: Base,
    settings: Settings,
    device: str,
    wanted: str | None = None,
) -> Path:
    """The folder with the references of the training and the validation rows; for the main process.

    Args:
        device: for the codec, where references have to be encoded.
        wanted: the ``content`` of a state that is resumed: where it is kept, nothing is chosen anew, and files may be
            gone.

    Raises:
        UserError: a speaker has no usable reference; or, for rows in context, no transcript of it is known.
    """
    parent = settings.output_dir / "rows"
    if wanted and (kept := _find_kept(parent, wanted)):
        return kept
    if settings.reference_sampling == "same_speaker":
        chosen, assigned = drawn_choice(train, validation)
    else:
        chosen, assigned = fixed_choice(train, validation, settings)
    if settings.icl_fraction:
        chosen.check_texts()
    folder = parent / f"references-{_key(chosen, train, base, settings)}"
    if not folder.is_dir():
        _compute(folder, chosen, train, model, base, settings, device)
    _describe(folder, chosen, assigned)
    return folder


def load_references(folder: Path) -> tuple[References, References | None]:
    """Those of the training and of the validation rows.

    Raises:
        UserError: this process does not see the folder.
    """
    if not folder.is_dir():
        raise UserError(f"OUTPUT_DIR: {folder} is not there; all processes must see OUTPUT_DIR")
    about = json.loads((folder / "references.json").read_text(encoding="utf-8"))
    arrays = [_mapped(folder / f"{name}.npy") for name in ("vectors", "codes", "ends")]
    clips = Clips(about["files"], about["texts"], *arrays)
    found = []
    for file in sorted(folder.glob("rows-*.npz")):
        with np.load(file) as kept:
            found.append(References(clips, Assigned(**kept), about["content"]))
    train, validation = (*found, None)[:2]
    return train, validation


def _mapped(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r")


def _find_kept(parent: Path, content: str) -> Path | None:
    for folder in parent.glob("references-*"):
        file = folder / "references.json"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["content"] == content:
            return folder
    return None


def _key(chosen: Chosen, train: Manifest, base: Base, settings: Settings) -> str:
    """A hash of all that is computed from."""
    is_encoded, keeps_codes = settings.icl_fraction > 0, settings.data_mode == "none"
    models = [*base.encoder_source.weight_files(), *sorted(base.codec_folder.glob("*.safetensors"))]
    digest = hashlib.sha256(repr((_FORMAT, is_encoded, keeps_codes)).encode())
    for file in (*models, *chosen.files):
        status = os.stat(file) if os.path.isfile(file) else None
        digest.update(repr((str(file), status and (status.st_size, status.st_mtime_ns))).encode())
    if is_encoded and keeps_codes:
        for row in chosen.rows:
            digest.update(train[row]["codes"].tobytes() if row >= 0 else b"")
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- computing


def _compute(
    folder: Path,
    chosen: Chosen,
    train: Manifest,
    model: Any,
    base: Base,
    settings: Settings,
    device: str,
) -> None:
    """Writes the folder, and removes those of other references. What a start that was cut off has computed is kept in
    ``<folder>.partial/``."""
    partial = folder.with_name(f"{folder.name}.partial")
    for other in folder.parent.glob("references-*"):
        if other != partial:
            remove_folder(other)
    reader = _Reader(chosen, train, base, settings, voice_encoder(model, base), device)
    partial.mkdir(parents=True, exist_ok=True)
    chunks = [partial / f"{start}.npz" for start in range(0, len(chosen.files), CHUNK_REFERENCES)]
    with tqdm(total=len(chosen.files), desc="references", disable=None) as bar:
        for chunk, numbers in zip(chunks, _chunks(len(chosen.files)), strict=True):
            if not chunk.is_file():
                _write_chunk(chunk, [reader.read(number) for number in numbers])
            bar.update(len(numbers))
    with new_folder(folder) as unfinished:
        _assemble(unfinished, chunks, len(chosen.files))
    shutil.rmtree(partial)


def _chunks(count: int) -> Iterator[range]:
    return (range(start, min(start + CHUNK_REFERENCES, count)) for start in range(0, count, CHUNK_REFERENCES))


class _Reader:
    """Reads references: (H,) float32 vectors and (R, 16) int16 codes, none where no row stands in context."""

    def __init__(
        self, chosen: Chosen, train: Manifest, base: Base, settings: Settings, encoder: nn.Module, device: str
    ) -> None:
        self.chosen, self.train, self.settings, self.encoder = chosen, train, settings, encoder
        encodes = settings.icl_fraction > 0 and settings.data_mode != "none"
        self.codec = Codec(base.codec_folder, device) if encodes else None

    def read(self, number: int) -> tuple[torch.Tensor, np.ndarray]:
        file = self.chosen.files[number]
        try:
            waveform = load_audio(file)
        except AudioError as error:
            raise UserError(f"reference {file}: {error}") from None
        return voice_vector(self.encoder, waveform), self._codes(number, waveform)

    def _codes(self, number: int, waveform: np.ndarray) -> np.ndarray:
        if not self.settings.icl_fraction:
            return np.empty((0, NUM_CODEBOOKS), np.int16)
        if self.codec is not None:
            return self.codec.encode_reference(waveform)
        # Those of the rows were padded to whole frames, so that the last frame is not quite inference's.
        if (row := self.chosen.rows[number]) >= 0:
            return self.train[row]["codes"]
        raise UserError(
            f"ICL_FRACTION: the reference {self.chosen.files[number]} is no clip of the rows and would have to be "
            "encoded, which DATA_MODE=none never does; set DATA_MODE=jsonl"
        )


def _write_chunk(file: Path, found: Sequence[tuple[torch.Tensor, np.ndarray]]) -> None:
    """Whole or not there."""
    vectors, codes = zip(*found, strict=True)
    unfinished = file.with_name(f".{file.name}")
    with unfinished.open("wb") as stream:
        np.savez(
            stream,
            vectors=torch.stack(vectors).numpy(),
            codes=np.concatenate(codes),
            lengths=np.array([len(clip) for clip in codes]),
        )
    unfinished.replace(file)


def _assemble(folder: Path, chunks: Sequence[Path], num_references: int) -> None:
    """Fills the folder, a chunk in memory at a time."""
    digest = hashlib.sha256()
    lengths, vectors, position = [], None, 0
    with (folder / "codes.raw").open("wb") as stream:
        for chunk in chunks:
            with np.load(chunk) as part:
                if vectors is None:
                    shape = (num_references, part["vectors"].shape[1])
                    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, shape)
                vectors[position : position + len(part["vectors"])] = part["vectors"]
                position += len(part["vectors"])
                stream.write(part["codes"].tobytes())
                lengths.append(part["lengths"])
                digest.update(part["vectors"].tobytes() + part["codes"].tobytes() + part["lengths"].tobytes())
    assert vectors is not None, "every row has a reference"
    vectors.flush()
    _finish_codes(folder, np.concatenate(lengths))
    write_json(folder / "computed.json", {"content": digest.hexdigest()[:32]})


def _describe(folder: Path, chosen: Chosen, assigned: Sequence[Assigned]) -> None:
    """Writes what rows have of what was computed, which costs nothing to do anew."""
    computed = json.loads((folder / "computed.json").read_text(encoding="utf-8"))["content"]
    digest = hashlib.sha256(json.dumps([computed, chosen.texts], ensure_ascii=False).encode())
    for old in folder.glob("rows-*.npz"):
        old.unlink()
    for number, rows in enumerate(assigned):
        arrays = {field.name: getattr(rows, field.name) for field in fields(rows)}
        np.savez(folder / f"rows-{number}.npz", **arrays)
        for array in arrays.values():
            digest.update(np.ascontiguousarray(array).tobytes())
    about = {"content": digest.hexdigest()[:32], "files": chosen.files, "texts": chosen.texts}
    write_json(folder / "references.json", about)


def _finish_codes(folder: Path, lengths: np.ndarray) -> None:
    raw = folder / "codes.raw"
    codes = np.fromfile(raw, dtype=np.int16).reshape(-1, NUM_CODEBOOKS)
    np.save(folder / "codes.npy", codes)
    np.save(folder / "ends.npy", np.cumsum(lengths, dtype=np.int64) if len(codes) else np.empty(0, np.int64))
    raw.unlink()


def say_contexts(references: References, settings: Settings) -> None:
    """What keeps rows out of their reference's context.

    Raises:
        UserError: it keeps all rows out.
    """
    if not settings.icl_fraction:
        return
    num_rows, num_without = len(references.rows.fixed), references.num_without_context()
    if num_without == num_rows:
        raise UserError(
            "ICL_FRACTION: the reference of every row is its own clip, in whose context it never stands; set "
            "REFERENCE_SAMPLING=same_speaker, or name other clips in ref_audio"
        )
    if num_without:
        say(f"{num_without} of {num_rows} rows never stand in context: their reference is their own clip")
