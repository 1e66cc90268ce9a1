"""DATA_MODE=direct: the rows of a run are streamed from DATASET_NAME; only codes, references and validation rows stay.

Speakers and their references have to be known before the first step, so the speaker column alone is read once, and a
few clips of each speaker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.audio import AudioError, load_audio
from finetuning.codec import codec_fingerprint
from finetuning.console import say
from finetuning.encoding import CHUNK_ROWS, ClipEncoder, EncodedChunk
from finetuning.errors import UserError
from finetuning.manifest import RowError, RowFormat, check_fields, check_speaker_names
from finetuning.prepare import Candidate, DatasetRows, PrepareOptions, prepare_split, save_references
from finetuning.preparer import decoding_workers, given_reference, open_dataset_split
from finetuning.processes import Processes
from finetuning.quality import measure_clip
from finetuning.row_index import Manifest, open_rows
from finetuning.settings import Settings
from finetuning.source import SourceRow, Split, split_names
from finetuning.stream import SplitStream, settings_cache
from finetuning.workspace import Digest, Workspace

#: Clips of each speaker among which its reference is chosen.
NUM_CANDIDATES = 32
#: Rows held out of the stream for validation, unless MAX_EVAL_SAMPLES says otherwise.
MAX_HELD_OUT_ROWS = 1000
#: A split with fewer rows holds none out.
MIN_ROWS_TO_HOLD_OUT = 20
#: Held-out rows are taken in runs of neighbours, so that few parts of a large dataset are fetched for them.
HELD_OUT_RUN = 32


@dataclass(frozen=True)
class DirectRows:
    """What a run streams.

    Attributes:
        stream: this process's share of the training split.
        row_format: how its records are read.
        references: speaker -> reference files, in the order of first use.
        validation: encoded ahead; None where there are none.
    """

    stream: SplitStream
    row_format: RowFormat
    references: dict[str, list[str]]
    validation: Manifest | None

    def languages(self) -> list[str]:
        """The distinct languages of the split; reads that column alone."""
        split, column = self.stream.rows.split, self.stream.rows.split.columns.language
        if column is None:
            return ["Auto"]
        return sorted({str(value) for value in split.column(column) if value is not None})


class DirectData:
    """Opens the dataset of a run; ``prepare`` belongs to the main process, ``open`` to all of them after it.

    Args:
        device: of this process, for the codec.
        processes: this one and those that share the stream with it.
    """

    def __init__(
        self, settings: Settings, codec_folder: Path, row_format: RowFormat, device: str, processes: Processes
    ) -> None:
        self.settings, self.row_format = settings, row_format
        self.codec_folder, self.codec_id = codec_folder, codec_fingerprint(codec_folder)
        self.processes = processes
        self.encoder = ClipEncoder(codec_folder, device, decoding_workers(settings))
        split = open_dataset_split(settings, settings.train_split)
        self.rows = DatasetRows(split, row_format, self.codec_id, settings.max_train_samples)
        self._validation_split = _validation_split(settings)

    def prepare(self, needs_references: bool = True) -> dict[str, list[str]]:
        """Encodes the validation rows and gives every speaker a reference; returns speaker -> references.

        Args:
            needs_references: False for a base that knows its speakers without one.
        """
        if self._validation_split is not None:
            self._prepare_validation_split()
        elif len(self._held_out()):
            self._encode_held_out()
        candidates = first_rows_of_speakers(self.rows, NUM_CANDIDATES)
        return self._references(candidates) if needs_references else {name: [] for name in candidates}

    def open(self, references: dict[str, list[str]]) -> DirectRows:
        """The stream and the validation rows."""
        stream = SplitStream(
            self.rows,
            self.encoder,
            settings_cache(self.settings, self.rows),
            self.settings.seed,
            self.settings.shuffle_buffer_rows,
            self.processes.index,
            self.processes.count,
            self._held_out() if self._validation_split is None else np.empty(0, dtype=np.int64),
        )
        return DirectRows(stream, self.row_format, references, self._open_validation(references))

    # --------------------------------------------------------------------------------------------------- speakers

    def _references(self, candidates: dict[str, list[int]]) -> dict[str, list[str]]:
        if (given := given_reference(self.settings)) is not None:
            return {name: [str(given.audio.resolve())] for name in candidates}
        references, best = {}, {}
        for name, indices in candidates.items():
            rows = list(rows_at(self.rows.split, indices))
            # As in a JSONL: the rows' own references first, and one that is chosen for those that have none.
            own = dict.fromkeys(row.other["ref_audio"] for row in rows if row.other.get("ref_audio"))
            references[name] = [str(Path(path).resolve()) for path in own]
            without = [row for row in rows if not row.other.get("ref_audio")]
            if without and (chosen := self._best_clip(without)):
                best[name] = chosen
        saved = save_references(self.rows.split, best, PrepareOptions.voices_folder)
        for name, reference in saved.items():
            references[name].append(str(reference.audio.resolve()))
        return self._with_a_voice(references)

    def _best_clip(self, rows: list[SourceRow]) -> Candidate | None:
        found = []
        for row in rows:
            with contextlib.suppress(AudioError):
                if self.rows.check(row) is None:
                    found.append(Candidate.of(measure_clip(load_audio(row.audio)), row.index, row.text))
        return max(found, default=None)

    def _with_a_voice(self, references: dict[str, list[str]]) -> dict[str, list[str]]:
        """Speakers that have a reference; rows of the others are left out of the stream."""
        silent = [name for name, files in references.items() if not files]
        if len(silent) == len(references):
            raise UserError(
                f"{self.rows.split.dataset_name}: none of the first {NUM_CANDIDATES} clips can be used as a reference; "
                "set REF_AUDIO_PATH, or check the audio column"
            )
        if silent:
            names = ", ".join(silent[:5]) + (", …" if len(silent) > 5 else "")
            say(f"{len(silent)} speakers are left out, because none of their first clips can be used: {names}")
        return {name: files for name, files in references.items() if files}

    # ------------------------------------------------------------------------------------------------- validation

    def _held_out(self) -> np.ndarray:
        limit = self.settings.max_eval_samples or MAX_HELD_OUT_ROWS
        return held_out_rows(self.rows.num_rows, self.settings.validation_fraction, limit, self.settings.seed)

    @property
    def _validation_file(self) -> Path:
        return self.settings.codes_cache_dir / self._validation_name / "validation.jsonl"

    @property
    def _validation_name(self) -> str:
        settings = self.settings
        what = self._validation_split or [settings.validation_fraction, settings.seed]
        return "validation-" + Digest(self.rows.digest(), self.rows.num_rows, what, settings.max_eval_samples).hex()

    def _prepare_validation_split(self) -> None:
        options = PrepareOptions(
            device=self.encoder.device,
            max_rows=self.settings.max_eval_samples,
            num_workers=self.encoder.num_workers,
            chooses_references=False,
        )
        split = open_dataset_split(self.settings, self._validation_split)
        prepare_split(split, self._validation_file, self.codec_folder, self.row_format, options)

    def _encode_held_out(self) -> None:
        held_out = self._held_out()
        workspace = Workspace(self._validation_file, [Digest(held_out.tolist(), self.rows.digest()).hex()], None)
        if workspace.is_current():
            return
        say(f"encoding {len(held_out)} rows that are held out for validation")
        others = np.setdiff1d(np.arange(self.rows.num_rows), held_out)
        stream = SplitStream(self.rows, self.encoder, settings_cache(self.settings, self.rows), left_out=others)
        found = [row for row in stream.iterate(0) if row is not None]
        with workspace.opened():
            workspace.save(0, EncodedChunk([row.record for row in found], [row.codes for row in found], []))
            workspace.assemble()

    def _open_validation(self, references: dict[str, list[str]]) -> Manifest | None:
        if not self._validation_file.is_file() or not self._validation_file.stat().st_size:
            return None
        rows = open_rows(self._validation_file, self.row_format, "VALIDATION_SPLIT")
        known = {name.lower() for name in references}
        names, speakers = rows.labels("speaker")
        keep = np.array([name.lower() in known for name in names])[speakers]
        return rows.select(np.flatnonzero(keep)) if keep.any() else None


def _validation_split(settings: Settings) -> str | None:
    """VALIDATION_SPLIT, unless it is only the default and the dataset has none of that name."""
    if settings.is_set("validation_split"):
        return settings.validation_split
    names = split_names(settings.dataset_name, settings.dataset_config)
    return settings.validation_split if settings.validation_split in names else None


def held_out_rows(num_rows: int, fraction: float, max_rows: int, seed: int) -> np.ndarray:
    """Sorted indices of the rows that are held out: seeded, in runs of neighbours where the split is large."""
    if num_rows < MIN_ROWS_TO_HOLD_OUT or fraction == 0:
        return np.empty(0, dtype=np.int64)
    count = min(max(1, round(fraction * num_rows)), max_rows)
    run = int(np.clip(num_rows // (MIN_ROWS_TO_HOLD_OUT * HELD_OUT_RUN), 1, HELD_OUT_RUN))
    starts = np.random.default_rng([seed, num_rows]).permutation(num_rows // run)[: -(-count // run)] * run
    return np.sort((starts[:, None] + np.arange(run)).reshape(-1)[:count])


def first_rows_of_speakers(rows: DatasetRows, count: int) -> dict[str, list[int]]:
    """Speaker -> indices of its first so many rows, in the order of first use; reads the speaker column alone."""
    column = rows.split.columns.speaker
    if column is None:
        return {rows.row_format.default_speaker: list(range(min(count, rows.num_rows)))}
    first: dict[str, list[int]] = {}
    for index, value in zip(range(rows.num_rows), rows.split.column(column), strict=False):
        name = _speaker_name(value, rows.row_format)
        if name is not None and len(first.setdefault(name, [])) < count:
            first[name].append(index)
    places = {name: (Path(rows.split.dataset_name), indices[0] + 1) for name, indices in first.items()}
    check_speaker_names(places)
    return first


def _speaker_name(value: Any, row_format: RowFormat) -> str | None:
    """As a row of that speaker would be read, or None where it would be refused."""
    try:
        return check_fields({row_format.text_key: "-", row_format.speaker_key: value}, row_format)["speaker"]
    except RowError:
        return None


def rows_at(split: Split, indices: list[int]) -> Iterator[SourceRow]:
    """Some rows of a split, by sorted index; neighbours share one pass."""
    wanted, position = sorted(indices), 0
    while position < len(wanted):
        start = wanted[position]
        part = {index for index in wanted[position:] if index < start + CHUNK_ROWS}
        yield from (row for row in split.rows(start, max(part) + 1) if row.index in part)
        position += len(part)
