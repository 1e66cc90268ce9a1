"""Rows to padded batches, and the order in which an epoch visits them.

The batch (all tensors on the CPU; B rows, L positions, F real frames, 16 codebooks):

==================  ==================  =================================================================
``text_ids``        (B, L) int64        ids of the text table; 0 on padding
``codec_ids``       (B, L) int64        ids of the talker's codec table, or NO_CODEC (-1)
``attention_mask``  (B, L) int64        1 on real positions
``labels``          (B, L) int64        next codec id, or IGNORE (-100)
``frame_mask``      (B, L) bool         the F frames
``codes``           (F, 16) int64       the frames' codes, in the order of ``frame_mask.nonzero()``
``speaker_positions``  (B,) int64       where the speaker vector stands, or -1
``speaker_index``   (B,) int64          row of the objective's speaker vectors; 0 where there is none
``lines``           (B,) int64          line numbers in the JSONL, for messages
``weight``          () float32          0 for a batch that only keeps a process in step, else 1
==================  ==================  =================================================================

A position inside an epoch is a tuple of ``Part``: so many steps were taken with that geometry, then so many with the
next. It says which rows are left, and in which order they come.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from finetuning.codec import NUM_CODEBOOKS
from finetuning.manifest import MIN_CODEC_FRAMES, check_codes
from finetuning.prompt import (
    IGNORE,
    NO_CODEC,
    AlignedIds,
    LayoutIds,
    append_frames,
    assistant_turn,
    build_prompt,
    instruct_turn,
    language_codec_id,
    resolve_language,
)
from finetuning.row_index import Manifest

#: See the module's table.
Batch = dict[str, torch.Tensor]
#: One process's micro-batches of one optimizer step, as row indices; an empty one keeps the process in step.
StepPlan = list[list[int]]
#: What reading or encoding a damaged row raises; pyarrow's errors are among them.
ROW_ERRORS = (ValueError, LookupError, OSError)
#: So much of a reason is kept.
MAX_REASON_LETTERS = 200


class SkippedRow(NamedTuple):
    """A row that could not be trained on; ``line`` is 0 where not even that can be read."""

    line: int
    reason: str


class Step(NamedTuple):
    """One process's micro-batches of one optimizer step, and the rows that had to be left out of them."""

    batches: list[Batch]
    skipped: list[SkippedRow]


@dataclass(frozen=True)
class RowEncoder:
    """Row to aligned ids, for one base.

    Attributes:
        tokenizer: the base's text tokenizer (see ``base_model.load_tokenizer``).
        speaker_index: speaker's lower-case name -> row of the objective's speaker vectors.
        dialects: lower-case name -> dialect, for preset speakers that have one.
        uses_instruct: False for a 0.6B base, whose stock inference drops instructions.
    """

    tokenizer: Any
    ids: LayoutIds
    speaker_index: Mapping[str, int]
    dialects: Mapping[str, str]
    uses_instruct: bool = True

    def encode(self, row: Mapping[str, Any]) -> AlignedIds:
        """The whole row: prompt, frames and labels.

        Raises:
            ValueError: no text, or codes of a wrong shape or out of range.
        """
        if not (row["text"] or "").strip():
            raise ValueError("text is empty")
        codes = check_codes(row["codes"])  # on a GPU one out of range would end the process without naming the row
        assistant_ids = self._tokenize(assistant_turn(row["text"]))
        instruct = row["instruct"] if self.uses_instruct else None
        try:
            language = resolve_language(row["language"], self.ids.languages)
        except KeyError:
            language = None  # trained as Auto; `unknown_languages` tells the user
        prompt = build_prompt(
            assistant_ids,
            self.ids,
            instruct_ids=self._tokenize(instruct_turn(instruct)) if instruct else None,
            language_id=language_codec_id(language, self.ids, self.dialects.get(row["speaker"].lower())),
        )
        return append_frames(prompt, codes, self.ids)

    def speaker_row(self, speaker: str | None) -> int:
        """The speaker's row of the objective's speaker vectors.

        Raises:
            ValueError: there is none.
        """
        row = self.speaker_index.get((speaker or "").lower())
        if row is None:
            raise ValueError(f'speaker "{speaker or ""}" has no vector')
        return row

    def _tokenize(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text)["input_ids"], dtype=np.int64)


class StepDataset(Dataset):
    """Indexed by a ``StepPlan``: gives the ``Step``, its micro-batches collated."""

    def __init__(self, manifest: Manifest, encoder: RowEncoder) -> None:
        self.manifest, self.encoder = manifest, encoder

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, plan: StepPlan) -> Step:
        return make_step([[self.read(index) for index in indices] for indices in plan], self.encoder)

    def batch(self, indices: Sequence[int]) -> Batch:
        """One micro-batch.

        Raises:
            ValueError: a row is damaged.
        """
        (batch,), skipped = self[[list(indices)]]
        if skipped:
            raise ValueError(f"line {skipped[0].line}: {skipped[0].reason}")
        return batch

    def read(self, index: int) -> dict[str, Any] | SkippedRow:
        """A row, or why it cannot be read."""
        try:
            return self.manifest[index]
        except ROW_ERRORS as error:
            return SkippedRow(self._line(index), reason_of(error))

    def _line(self, index: int) -> int:
        """The line of a row that cannot be read as a whole."""
        try:
            return int(self.manifest.select(np.array([index])).column("line")[0])
        except ROW_ERRORS:
            return 0


def make_step(micro_batches: Iterable[Sequence[Mapping[str, Any] | SkippedRow]], encoder: RowEncoder) -> Step:
    """Rows, as ``Manifest`` gives them, to collated micro-batches.

    A row that cannot be encoded is left out and listed; a micro-batch without any row becomes a dummy of weight 0.
    """
    skipped: list[SkippedRow] = []
    return Step([_make_batch(rows, encoder, skipped) for rows in micro_batches], skipped)


def _make_batch(
    rows: Sequence[Mapping[str, Any] | SkippedRow], encoder: RowEncoder, skipped: list[SkippedRow]
) -> Batch:
    encoded = []
    for row in rows:
        if isinstance(row, SkippedRow):
            skipped.append(row)
            continue
        try:
            speaker = encoder.speaker_row(row["speaker"])
            encoded.append((encoder.encode(row), speaker, row["line"]))
        except ROW_ERRORS as error:
            skipped.append(SkippedRow(row["line"], reason_of(error)))
    weight = 1.0 if encoded else 0.0
    batch = collate(*zip(*(encoded or [_encoded_dummy(encoder)]), strict=True))
    batch["weight"] = torch.tensor(weight)
    return batch


def _encoded_dummy(encoder: RowEncoder) -> tuple[AlignedIds, int, int]:
    """A row that stands in no file: ids, speaker's row, line 0."""
    speaker = next(iter(encoder.speaker_index))
    codes = np.zeros((MIN_CODEC_FRAMES, NUM_CODEBOOKS), dtype=np.int16)
    row = {"text": "-", "language": "Auto", "speaker": speaker, "instruct": None, "codes": codes}
    return encoder.encode(row), encoder.speaker_row(speaker), 0


def reason_of(error: Exception) -> str:
    """An error in one line."""
    message = repr(error) if isinstance(error, LookupError) else str(error)
    return " ".join(message.split())[:MAX_REASON_LETTERS]


def collate(
    rows: Sequence[AlignedIds], speaker_index: Sequence[int], lines: Sequence[int] = (), padding_side: str = "right"
) -> Batch:
    """Pads aligned rows to the longest; see the module's table. Padding on either side gives the same losses."""
    length = max(len(row.text) for row in rows)

    def padded(values: Sequence[np.ndarray], fill: int) -> torch.Tensor:
        out = np.full((len(values), length), fill, dtype=np.int64)
        for index, value in enumerate(values):
            start = length - len(value) if padding_side == "left" else 0
            out[index, start : start + len(value)] = value
        return torch.from_numpy(out)

    frames = [np.arange(len(row.text)) >= row.first_frame for row in rows]
    offsets = [length - len(row.text) if padding_side == "left" else 0 for row in rows]
    positions = [
        row.speaker_position + offset if row.speaker_position >= 0 else -1
        for row, offset in zip(rows, offsets, strict=True)
    ]
    return {
        "text_ids": padded([row.text for row in rows], 0),
        "codec_ids": padded([row.codec for row in rows], NO_CODEC),
        "attention_mask": padded([np.ones_like(row.text) for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORE),
        "frame_mask": padded(frames, 0).bool(),
        "codes": torch.from_numpy(np.concatenate([row.codes for row in rows])),
        "speaker_positions": torch.tensor(positions),
        "speaker_index": torch.tensor(list(speaker_index)),
        "lines": torch.tensor(list(lines)),
        "weight": torch.tensor(1.0),
    }


def split_batch(batch: Batch, num_parts: int) -> list[Batch]:
    """The rows of a micro-batch in up to ``num_parts`` consecutive groups, as equal as they can be.

    Each has no more padding than its own rows need, and the summed losses of the parts add up to those of the whole.

    Args:
        batch: padded on the right.
    """
    num_rows = len(batch["attention_mask"])
    lengths = batch["attention_mask"].sum(1).tolist()
    first_frames = np.cumsum([0, *batch["frame_mask"].sum(1).tolist()])
    parts = []
    for rows in np.array_split(np.arange(num_rows), min(num_parts, num_rows)):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        part = {name: tensor[start:stop] for name, tensor in batch.items() if name not in ("codes", "weight")}
        length = max(lengths[start:stop])
        part |= {name: tensor[:, :length] for name, tensor in part.items() if tensor.ndim == 2}
        codes = batch["codes"][first_frames[start] : first_frames[stop]]
        parts.append(part | {"codes": codes, "weight": batch["weight"]})
    return parts


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; ``lines`` stay, they are for messages only."""
    return {name: tensor if name == "lines" else tensor.to(device) for name, tensor in batch.items()}


def count_tokens(batches: Sequence[Batch]) -> tuple[int, int]:
    """(talker labels, sub-talker labels) of some micro-batches; dummy batches count nothing."""
    real = [batch for batch in batches if batch["weight"] > 0]
    num_talker = sum(int((batch["labels"] != IGNORE).sum()) for batch in real)
    num_sub_talker = sum(batch["codes"].shape[0] * (batch["codes"].shape[1] - 1) for batch in real)
    return num_talker, num_sub_talker


def unknown_languages(manifest: Manifest, languages: Mapping[str, int]) -> list[str]:
    """Languages of the rows that the base does not know; such rows are trained as Auto."""
    unknown = []
    for name in manifest.distinct("language"):
        try:
            resolve_language(name, languages)
        except KeyError:
            unknown.append(name)
    return unknown


# ------------------------------------------------------------------------------------------------------- positions


@dataclass(frozen=True)
class Geometry:
    """How the rows of a step are dealt: rows of a micro-batch, micro-batches of a step, processes."""

    batch_size: int
    accumulation: int
    num_processes: int

    @property
    def rows_per_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.accumulation * self.num_processes

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, int]) -> Geometry:
        return cls(**value)


@dataclass(frozen=True)
class Part:
    """So many steps of an epoch that were taken with one geometry."""

    geometry: Geometry
    num_steps: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Part:
        return cls(Geometry.from_json(value["geometry"]), value["num_steps"])


def merged(done: Iterable[Part]) -> list[Part]:
    """The same position without empty parts, and with one part for neighbours of the same geometry."""
    parts: list[Part] = []
    for part in done:
        if parts and parts[-1].geometry == part.geometry:
            parts[-1] = Part(part.geometry, parts[-1].num_steps + part.num_steps)
        elif part.num_steps:
            parts.append(part)
    return parts


def split_position(done: Iterable[Part], geometry: Geometry) -> tuple[list[Part], int]:
    """(parts of other geometries, whose rows are gone, and how many steps of the plan of what they left are done)."""
    parts = merged(done)
    if parts and parts[-1].geometry == geometry:
        return parts[:-1], parts[-1].num_steps
    return parts, 0


# -------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class StepSampler:
    """The plan of every epoch: a pure function of its fields, the epoch's number, and the position inside it.

    Rows are shuffled, then grouped by length inside windows of many steps, so that a micro-batch pads little and the
    order stays random; each row is visited once an epoch. The steps hold ``batch_size x accumulation x processes``
    rows, the last one what is left. One process with batch size 2b and two with b see the same rows in the same steps.

    Attributes:
        lengths: (num_rows,) int, codec frames of every row.
    """

    lengths: np.ndarray
    batch_size: int
    accumulation: int = 1
    num_processes: int = 1
    seed: int = 0
    window_steps: int = 32

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.batch_size, self.accumulation, self.num_processes)

    @property
    def rows_per_step(self) -> int:
        return self.geometry.rows_per_step

    @property
    def steps_per_epoch(self) -> int:
        return self.num_steps()

    def num_steps(self, done: Iterable[Part] = ()) -> int:
        """Steps that are left in an epoch of which ``done`` is over."""
        num_rows = len(self.lengths)
        for part in merged(done):
            num_rows -= min(num_rows, part.num_steps * part.geometry.rows_per_step)
        return -(-num_rows // self.rows_per_step)

    def epoch_plan(self, epoch: int, process: int = 0, done: Iterable[Part] = ()) -> StepPlans:
        """The steps of one epoch that are left for one process; all processes get as many micro-batches in each step.

        Args:
            done: what is over. After steps of this geometry the plan goes on as if it had never stopped; the rows that
                another geometry left are planned anew.
        """
        gone, num_steps = split_position(done, self.geometry)
        rows = np.arange(len(self.lengths), dtype=np.int32)
        for stage, part in enumerate(gone):
            order = self._order(rows, part.geometry, epoch, stage)
            rows = np.sort(order[part.num_steps * part.geometry.rows_per_step :])
        order = self._order(rows, self.geometry, epoch, len(gone))
        plans = StepPlans(order, self.batch_size * self.num_processes, self.accumulation, process, self.num_processes)
        return plans[num_steps:]

    def _order(self, rows: np.ndarray, geometry: Geometry, epoch: int, stage: int) -> np.ndarray:
        """(num_rows,) the rows in the order in which a plan visits them.

        Args:
            rows: sorted.
            stage: how often the geometry has changed inside this epoch.
        """
        generator = np.random.default_rng([self.seed, epoch, stage])
        order = rows[generator.permutation(len(rows))]
        window, size = geometry.rows_per_step * self.window_steps, geometry.batch_size * geometry.num_processes
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            order[start : start + window] = shuffled_batches(part, size, generator)
        return order


def shuffled_batches(rows: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Length-sorted rows with their micro-batches (over all processes) in random order, an incomplete one last."""
    num_full = len(rows) // size
    batches = rows[: num_full * size].reshape(num_full, size)[generator.permutation(num_full)]
    return np.concatenate([batches.reshape(-1), rows[num_full * size :]])


@dataclass(frozen=True, eq=False)
class StepPlans(Sequence[StepPlan]):
    """The steps of an epoch for one process, each made when it is asked for: lists of all rows would take 100 B a row.

    Attributes:
        order: (num_rows,) row indices, micro-batch after micro-batch, each over all processes.
        batch_size: rows of a micro-batch over all processes.
        accumulation: micro-batches of a step.
        least_steps: as many there are at least; those behind the last row hold one empty micro-batch.
    """

    order: np.ndarray
    batch_size: int
    accumulation: int = 1
    process: int = 0
    num_processes: int = 1
    least_steps: int = 0

    def __len__(self) -> int:
        return max(-(-len(self.order) // self._rows_per_step), self.least_steps)

    def __getitem__(self, index: int | slice) -> Any:
        """A step's plan, or the plans of consecutive steps."""
        steps = range(len(self))[index]
        if isinstance(index, slice):
            if steps.step != 1:
                raise ValueError("steps in another order")
            order = self.order[steps.start * self._rows_per_step : steps.stop * self._rows_per_step]
            return replace(self, order=order, least_steps=len(steps))
        rows = self.order[steps * self._rows_per_step : (steps + 1) * self._rows_per_step]
        batches = [rows[at : at + self.batch_size] for at in range(0, max(len(rows), 1), self.batch_size)]
        return [batch[self.process :: self.num_processes].tolist() for batch in batches]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    @property
    def _rows_per_step(self) -> int:
        return self.batch_size * self.accumulation


def step_loader(dataset: StepDataset, plans: Sequence[StepPlan], num_workers: int = 0) -> DataLoader:
    """Iterates over the steps of ``plans``; each item is a ``Step``."""
    # A generator of its own: an iterator draws a seed, which would move the random state that training goes on with.
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        dataset,
        sampler=plans,
        batch_size=None,
        num_workers=num_workers,
        generator=generator,
        worker_init_fn=leave_signals_to_main,
    )


def leave_signals_to_main(_: int) -> None:
    """Ctrl-C and a batch system's SIGTERM reach the data workers as well; a step that is to be finished needs them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def sequential_plan(
    num_rows: int, batch_size: int, process: int = 0, num_processes: int = 1, equal: bool = False
) -> StepPlans:
    """Every row once, in file order, one micro-batch a step, for validation.

    Args:
        equal: all processes get as many steps, the last of some without a row; else their numbers may differ.
    """
    rows = np.arange(num_rows, dtype=np.int32)
    least_steps = -(-num_rows // (batch_size * num_processes)) if equal else 0
    return StepPlans(rows[rows // batch_size % num_processes == process], batch_size, least_steps=least_steps)
