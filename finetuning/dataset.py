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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

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
        """The whole row: prompt, frames and labels."""
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
        return append_frames(prompt, row["codes"], self.ids)

    def _tokenize(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text)["input_ids"], dtype=np.int64)


class StepDataset(Dataset):
    """Indexed by a ``StepPlan``: gives the collated micro-batches of one optimizer step."""

    def __init__(self, manifest: Manifest, encoder: RowEncoder) -> None:
        self.manifest, self.encoder = manifest, encoder

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, plan: StepPlan) -> list[Batch]:
        return [self.batch(indices) for indices in plan]

    def batch(self, indices: Sequence[int]) -> Batch:
        """One micro-batch; for no rows, row 0 with weight 0."""
        rows = [self.manifest[index] for index in (indices or [0])]
        speakers = [self.encoder.speaker_index[row["speaker"].lower()] for row in rows]
        batch = collate([self.encoder.encode(row) for row in rows], speakers, [row["line"] for row in rows])
        batch["weight"] = torch.tensor(1.0 if indices else 0.0)
        return batch


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


# -------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class StepSampler:
    """The plan of every epoch: a pure function of its fields and the epoch's number.

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
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.rows_per_step)

    def epoch_plan(self, epoch: int, process: int = 0) -> StepPlans:
        """The steps of one epoch for one process; all processes get as many micro-batches in each step."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths)).astype(np.int32)
        window = self.rows_per_step * self.window_steps
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            order[start : start + window] = self._shuffled_batches(rows, generator)
        size = self.batch_size * self.num_processes
        return StepPlans(order, size, self.accumulation, process, self.num_processes)

    def _shuffled_batches(self, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Length-sorted rows with their micro-batches (over all processes) in random order, an incomplete one last."""
        size = self.batch_size * self.num_processes
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
    """

    order: np.ndarray
    batch_size: int
    accumulation: int = 1
    process: int = 0
    num_processes: int = 1

    def __len__(self) -> int:
        return -(-len(self.order) // self._rows_per_step)

    def __getitem__(self, index: int | slice) -> Any:
        """A step's plan, or the plans of consecutive steps."""
        steps = range(len(self))[index]
        if isinstance(index, slice):
            if steps.step != 1:
                raise ValueError("steps in another order")
            return replace(self, order=self.order[steps.start * self._rows_per_step : steps.stop * self._rows_per_step])
        rows = self.order[steps * self._rows_per_step : (steps + 1) * self._rows_per_step]
        batches = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        return [batch[self.process :: self.num_processes].tolist() for batch in batches]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    @property
    def _rows_per_step(self) -> int:
        return self.batch_size * self.accumulation


def step_loader(dataset: StepDataset, plans: Sequence[StepPlan], num_workers: int = 0) -> DataLoader:
    """Iterates over the steps of one epoch; each item is the step's list of micro-batches."""
    return DataLoader(dataset, sampler=plans, batch_size=None, num_workers=num_workers)


def sequential_plan(num_rows: int, batch_size: int, process: int = 0, num_processes: int = 1) -> StepPlans:
    """Every row once, in file order, one micro-batch a step, for validation; processes may get unequal numbers."""
    rows = np.arange(num_rows, dtype=np.int32)
    return StepPlans(rows[rows // batch_size % num_processes == process], batch_size)
