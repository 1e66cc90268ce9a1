"""Rows to padded batches, and the loader that makes them.

The batch (all tensors on the CPU; B rows, L positions, N real ones among the B x L, F frames, 16 codebooks):

==================  ==================  =================================================================
``text_ids``        (B, L) int64        ids of the text table; 0 on padding
``codec_ids``       (B, L) int64        ids of the talker's codec table, or NO_CODEC (-1)
``attention_mask``  (B, L) int64        1 on real positions
``labels``          (B, L) int64        next codec id, or IGNORE (-100)
``frame_mask``      (B, L) bool         the F frames, those of references in context among them
``codes``           (F, 16) int64       the frames' codes, in the order of ``frame_mask.nonzero()``
``speaker_positions``  (B,) int64       where the speaker vector stands, or -1
``speaker_index``   (B,) int64          row of the objective's speaker vectors; 0 where there is none
``row_vectors``     (B, H) float32      only where rows bring vectors of their own, instead of ``speaker_index``
``lines``           (B,) int64          line numbers in the JSONL, for messages
``weight``          () float32          0 for a batch that only keeps a process in step, else 1
==================  ==================  =================================================================

The model reads the N real positions alone, one row behind the other, and must not ask the device where they are; so the
batch says it as well ("among N": counted over the real positions):

=======================  ==============  =================================================================
``real``                 (N,) int64      the real positions among the B x L, row after row
``row_starts``           (B + 1,) int32  where each row begins among N, and N
``positions``            (N,) int64      the position inside its row
``distinct_text_ids``    (U,) int64      every id of the text channel once
``text_places``          (N,) int64      where among U the id of a position stands
``frame_places``         (F,) int64      the frames among N
``label_places``         (F + B,) int64  the positions with a label among N
``speaker_places``       (B,) int64      the speaker vectors among N, or -1
``sub_talker_frames``    (M,) int64      the frames that the sub-talker trains on, where it is not all F
``sub_talker_weights``   (M,) float32    with SUB_TALKER_FRAME_FRACTION what each counts, so that they stand for all
=======================  ==============  =================================================================
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

if __name__ == "dataset":  # `from dataset import TTSDataset` in this folder, as code for the official scripts has it
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from finetuning.audio import load_audio, to_model_rate
from finetuning.codec import NUM_CODEBOOKS
from finetuning.draws import Draws
from finetuning.manifest import MIN_CODEC_FRAMES, RowFormat, check_codes, check_fields
from finetuning.prompt import (
    IGNORE,
    NO_CODEC,
    NUM_CLOSING_TOKENS,
    AlignedIds,
    InContext,
    LayoutIds,
    append_frames,
    assistant_turn,
    build_prompt,
    find_language,
    instruct_turn,
    language_codec_id,
    reference_turn,
    resolve_language,
)
from finetuning.row_index import Manifest
from finetuning.sampling import StepPlan
from finetuning.voice import voice_mels

#: See the module's table.
Batch = dict[str, torch.Tensor]
#: Entries of a batch with one item for each row.
OF_ROWS = (
    "text_ids", "codec_ids", "attention_mask", "labels", "frame_mask", "speaker_positions", "speaker_index", "lines",
)  # fmt: skip
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
class Reference:
    """Whose voice a row is said in, where every row has a reference of its own.

    Attributes:
        vector: (H,) float32.
        file: that it was computed from.
        text, codes: what it says and its (R, 16) frames; None where it cannot stand in the row's context.
    """

    vector: np.ndarray
    file: str
    text: str | None = None
    codes: np.ndarray | None = None


class ReferenceSource(Protocol):
    """The references of a manifest's rows."""

    content: str  # a hash of all that rows may get
    depends_on_epoch: bool

    def of(self, index: int, row: Mapping[str, Any], draws: Draws) -> Reference: ...

    def context_frames(self) -> np.ndarray: ...


@dataclass(frozen=True)
class RowEncoder:
    """Row to aligned ids, for one base.

    Attributes:
        tokenizer: the base's text tokenizer (see ``base_model.load_tokenizer``).
        speaker_index: speaker's lower-case name -> row of the objective's speaker vectors.
        dialects: lower-case name -> dialect, for preset speakers that have one.
        uses_instruct: False for a 0.6B base, whose stock inference drops instructions.
        draws: what is drawn for each row.
    """

    tokenizer: Any
    ids: LayoutIds
    speaker_index: Mapping[str, int]
    dialects: Mapping[str, str]
    uses_instruct: bool = True
    draws: Draws = field(default_factory=Draws)

    def at_epoch(self, epoch: int) -> RowEncoder:
        """The one for the rows of an epoch."""
        return replace(self, draws=replace(self.draws, epoch=epoch)) if self.draws.depend_on_epoch else self

    def encode(self, row: Mapping[str, Any]) -> AlignedIds:
        """The whole row: prompt, frames and labels.

        Raises:
            ValueError: no text, or codes of a wrong shape or out of range.
        """
        if not (row["text"] or "").strip():
            raise ValueError("text is empty")
        codes = check_codes(row["codes"])  # on a GPU one out of range would end the process without naming the row
        assistant_ids = self._tokenize(assistant_turn(row["text"]))
        instruct = self.instruct_of(row)
        prompt = build_prompt(
            assistant_ids,
            self.ids,
            instruct_ids=self._tokenize(instruct_turn(instruct)) if instruct else None,
            language_id=self._language_id(row),
            is_streaming=self.draws.is_streaming(row),
            reference=self._in_context(row),
        )
        return append_frames(prompt, codes, self.ids)

    def language_of(self, row: Mapping[str, Any]) -> str | None:
        """The base's name of the language that a row is laid out in; None for Auto."""
        language = find_language(row["language"], self.ids.languages)  # `unknown_languages` tells of unknown ones
        return language if language and self.draws.has_language(row) else None

    def instruct_of(self, row: Mapping[str, Any]) -> str | None:
        """The instruction that a row is laid out with."""
        instruct = row["instruct"] if self.uses_instruct else None
        return instruct if instruct and self.draws.has_instruct(row) else None

    def reference_of(self, row: Mapping[str, Any]) -> Reference | None:
        """What stands in a row's context."""
        reference: Reference | None = row.get("reference")
        if reference is None or reference.codes is None or not self.draws.is_in_context(row):
            return None
        return reference

    def _language_id(self, row: Mapping[str, Any]) -> int | None:
        return language_codec_id(self.language_of(row), self.ids, self.dialects.get(row["speaker"].lower()))

    def _in_context(self, row: Mapping[str, Any]) -> InContext | None:
        reference = self.reference_of(row)
        if reference is None:
            return None
        return InContext(self._tokenize(reference_turn(reference.text)), check_codes(reference.codes))

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
    """Indexed by a ``StepPlan``: gives the ``Step``, its micro-batches collated; see ``make_step`` for ``share``.

    Args:
        references: of the rows, where each has one of its own.
    """

    def __init__(
        self,
        manifest: Manifest,
        encoder: RowEncoder,
        share: FrameShare | None = None,
        references: ReferenceSource | None = None,
    ) -> None:
        self.manifest, self.encoder, self.share, self.references = manifest, encoder, share, references
        self._epoch = 0

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, plan: StepPlan) -> Step:
        return make_step([[self.read(index) for index in indices] for indices in plan], self.encoder, self.share)

    def at_epoch(self, epoch: int, share: FrameShare | None) -> StepDataset:
        """The same rows, with the sub-talker's frames and the layouts of an epoch."""
        encoder = self.encoder.at_epoch(epoch)
        is_same_voice = self.references is None or not self.references.depends_on_epoch
        if encoder is self.encoder and share == self.share and is_same_voice:
            return self
        dataset = StepDataset(self.manifest, encoder, share, self.references)
        dataset._epoch = epoch
        return dataset

    def lengths(self) -> np.ndarray:
        """(num_rows,) frames of each row, with those that stand in its context at most."""
        frames = self.manifest.column("num_codec_frames")
        return frames if self.references is None else frames + self.references.context_frames()

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
        """A row, with its ``reference`` where it has one of its own; or why it cannot be read."""
        try:
            row = self.manifest[index]
            if self.references is not None:
                row["reference"] = self.references.of(index, row, replace(self.encoder.draws, epoch=self._epoch))
            return row
        except ROW_ERRORS as error:
            return SkippedRow(self._line(index), reason_of(error))

    def _line(self, index: int) -> int:
        """The line of a row that cannot be read as a whole."""
        try:
            return int(self.manifest.select(np.array([index])).column("line")[0])
        except ROW_ERRORS:
            return 0


@dataclass(frozen=True)
class FrameShare:
    """Which frames the sub-talker trains on in an epoch: of each row a random share, drawn from what identifies it.

    So neither the rows beside it, nor the number of processes, nor a stop and a resume make a difference.
    """

    fraction: float
    seed: int
    epoch: int

    def choose(self, lines: Sequence[int], nums_frames: Sequence[int]) -> Batch:
        """``sub_talker_frames`` and ``sub_talker_weights`` of some rows.

        Every frame of a row is as likely as any other to be among its k of T, and counts T / k: the expectation of the
        weighted sum is the sum over all frames.
        """
        chosen, weights, first = [], [], 0
        for line, num_frames in zip(lines, nums_frames, strict=True):
            generator = np.random.default_rng([self.seed, self.epoch, line])
            num_chosen = max(1, round(self.fraction * num_frames))
            chosen.append(first + np.sort(generator.permutation(num_frames)[:num_chosen]))
            weights.append(np.full(num_chosen, num_frames / num_chosen, dtype=np.float32))
            first += num_frames
        return {
            "sub_talker_frames": torch.from_numpy(np.concatenate(chosen)),
            "sub_talker_weights": torch.from_numpy(np.concatenate(weights)),
        }


def make_step(
    micro_batches: Iterable[Sequence[Mapping[str, Any] | SkippedRow]],
    encoder: RowEncoder,
    share: FrameShare | None = None,
) -> Step:
    """Rows, as ``Manifest`` gives them, to collated micro-batches.

    A row that cannot be encoded is left out and listed; a micro-batch without any row becomes a dummy of weight 0.

    Args:
        share: the sub-talker trains on these frames only; None for all.
    """
    skipped: list[SkippedRow] = []
    return Step([_make_batch(rows, encoder, skipped, share) for rows in micro_batches], skipped)


def _make_batch(
    rows: Sequence[Mapping[str, Any] | SkippedRow],
    encoder: RowEncoder,
    skipped: list[SkippedRow],
    share: FrameShare | None,
) -> Batch:
    encoded = []
    for row in rows:
        if isinstance(row, SkippedRow):
            skipped.append(row)
            continue
        try:
            speaker = encoder.speaker_row(row["speaker"])
            encoded.append((encoder.encode(row), speaker, row["line"], row.get("reference")))
        except ROW_ERRORS as error:
            skipped.append(SkippedRow(row["line"], reason_of(error)))
    weight = 1.0 if encoded else 0.0
    aligned, speakers, lines, references = zip(*(encoded or [_encoded_dummy(encoder)]), strict=True)
    batch = collate(aligned, speakers, lines) | {"weight": torch.tensor(weight)}
    if None not in references:
        batch["row_vectors"] = torch.from_numpy(np.stack([reference.vector for reference in references]))
    return batch | _sub_talker_frames(aligned, lines, share)


def _sub_talker_frames(aligned: Sequence[AlignedIds], lines: Sequence[int], share: FrameShare | None) -> Batch:
    """What the sub-talker trains on: of each row's own frames all, or a share; {} where that is all of the batch."""
    if share is None and not any(row.num_reference_frames for row in aligned):
        return {}
    ends = np.cumsum([len(row.codes) for row in aligned])
    counts = [len(row.codes) - row.num_reference_frames for row in aligned]
    own = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    if share is None:
        return {"sub_talker_frames": torch.from_numpy(own)}
    chosen = share.choose(lines, counts)
    return chosen | {"sub_talker_frames": torch.from_numpy(own)[chosen["sub_talker_frames"]]}


def _encoded_dummy(encoder: RowEncoder) -> tuple[AlignedIds, int, int, None]:
    """A row that stands in no file: ids, speaker's row, line 0, and no reference."""
    speaker = next(iter(encoder.speaker_index))
    codes = np.zeros((MIN_CODEC_FRAMES, NUM_CODEBOOKS), dtype=np.int16)
    row = {"text": "-", "language": "Auto", "speaker": speaker, "instruct": None, "codes": codes, "line": 0}
    return encoder.encode(row), encoder.speaker_row(speaker), 0, None


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
    batch = {
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
    return batch | places_of(batch)


def places_of(batch: Batch) -> Batch:
    """The second table of the module, from the first."""
    is_real = batch["attention_mask"].bool()
    length = is_real.shape[1]
    real = is_real.flatten().nonzero().squeeze(1)
    row_starts = torch.cat([torch.zeros(1, dtype=torch.int64), is_real.sum(1).cumsum(0)])
    num_padded_before = is_real.int().argmax(1)
    distinct, text_places = batch["text_ids"].flatten()[real].unique(return_inverse=True)
    speaker_positions = batch["speaker_positions"]
    speaker_places = row_starts[:-1] + speaker_positions - num_padded_before
    return {
        "real": real,
        "row_starts": row_starts.int(),
        "positions": torch.arange(len(real)) - row_starts[real // length],
        "distinct_text_ids": distinct,
        "text_places": text_places,
        "frame_places": batch["frame_mask"].flatten()[real].nonzero().squeeze(1),
        "label_places": (batch["labels"].flatten()[real] != IGNORE).nonzero().squeeze(1),
        "speaker_places": torch.where(speaker_positions < 0, -1, speaker_places),
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
        part = {name: batch[name][start:stop] for name in OF_ROWS}
        length = max(lengths[start:stop])
        part |= {name: tensor[:, :length] for name, tensor in part.items() if tensor.ndim == 2}
        first, last = first_frames[start], first_frames[stop]
        part |= {"codes": batch["codes"][first:last], "weight": batch["weight"]}
        if "row_vectors" in batch:
            part["row_vectors"] = batch["row_vectors"][start:stop]
        parts.append(part | places_of(part) | _chosen_between(batch, int(first), int(last)))
    return parts


def _chosen_between(batch: Batch, first: int, last: int) -> Batch:
    """What the sub-talker trains on of the frames from ``first`` to ``last``; {} where it trains on all."""
    if "sub_talker_frames" not in batch:
        return {}
    frames = batch["sub_talker_frames"]
    is_inside = (frames >= first) & (frames < last)
    part = {"sub_talker_frames": frames[is_inside] - first}
    if "sub_talker_weights" in batch:
        part["sub_talker_weights"] = batch["sub_talker_weights"][is_inside]
    return part


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, without ``lines``, which are for messages. The host does not wait for the copies."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
        return tensor.to(device, non_blocking=True)

    return {name: moved(tensor) for name, tensor in batch.items() if name != "lines"}


def count_tokens(batches: Sequence[Batch]) -> tuple[int, int]:
    """(talker labels, sub-talker labels) of some micro-batches; dummy batches count nothing."""
    real = [batch for batch in batches if batch["weight"] > 0]
    num_talker = sum(int((batch["labels"] != IGNORE).sum()) for batch in real)
    num_frames = num_talker - sum(len(batch["labels"]) for batch in real)  # each row's own, and codec_eos
    return num_talker, num_frames * (NUM_CODEBOOKS - 1)


def unknown_languages(manifest: Manifest, languages: Mapping[str, int]) -> list[str]:
    """Languages of the rows that the base does not know; such rows are trained as Auto."""
    unknown = []
    for name in manifest.distinct("language"):
        try:
            resolve_language(name, languages)
        except KeyError:
            unknown.append(name)
    return unknown


# --------------------------------------------------------------------------------------------------------- loading


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


# ------------------------------------------------------------------------------------------- the official interface


class TTSDataset(Dataset):
    """Rows as the training loop of the official scripts takes them, in the layout of ``prompt``.

    ::

        dataset = TTSDataset(rows, qwen3tts.processor, config)
        loader = DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=dataset.collate_fn)

    A batch (B rows, L positions, one more than the longest row has, as codec_eos stands in it, too):

    ========================  ==================  =============================================================
    ``input_ids``             (B, L, 2) int64     text and codec channel; 0 where a channel has nothing
    ``text_embedding_mask``   (B, L, 1) bool      where the text channel counts
    ``codec_embedding_mask``  (B, L, 1) bool      where the codec channel counts; not at the speaker, position 6
    ``attention_mask``        (B, L) int64        1 on real positions
    ``codec_ids``             (B, L, 16) int64    the frames' codes
    ``codec_mask``            (B, L) bool         the frames
    ``codec_0_labels``        (B, L) int64        the ids of frames and codec_eos **in their own place**, or -100
    ``ref_mels``              (B, F, 128) f32     of the references, which must be equally long
    ========================  ==================  =============================================================

    All rows are laid out as ``language="Auto"`` and without an instruction, since such loops put the speaker's vector
    at position 6. The batch is the official one but for texts (white space is normalised, control tokens are refused,
    where they would merge into the role's tokens or end the turn) and references (any sampling rate).

    The batch is right; what a loop makes of it may not be. ``inputs_embeds[:, :-1]`` and ``codec_0_labels[:, 1:]`` are
    aligned already, so their loss is a plain cross-entropy: ``labels=`` would shift them once more. What predicts the
    frames is one position before them: ``hidden[codec_mask[:, 1:]]``. The text goes through ``text_projection``.

    Args:
        data_list: objects with ``text``, ``audio_codes`` (T lists of 16) and ``ref_audio``: a file, or a waveform with
            its sampling rate; of a list the first.
        processor: of ``Qwen3TTSModel``, or its tokenizer.
        config: ``Qwen3TTSConfig``, or the dictionary of its config.json.
        lag_num: always -1.

    Raises:
        ValueError: a row that cannot be used, with its place in ``data_list``.
    """

    def __init__(self, data_list: Sequence[Mapping[str, Any]], processor: Any, config: Any, lag_num: int = -1) -> None:
        if lag_num != -1:
            raise ValueError("lag_num must be -1: codec 0 and the other codes of a frame stand in one position")
        self.data_list, self.processor, self.config, self.lag_num = data_list, processor, config, lag_num
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.ids = LayoutIds.from_config(config if isinstance(config, Mapping) else config.to_dict())

    def __len__(self) -> int:
        return len(self.data_list)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``text_ids`` (1, n) int64, with the role; ``audio_codes`` (T, 16) int64; ``ref_mel`` (1, F, 128) float32."""
        row = self.data_list[index]
        try:
            text = check_fields(dict(row), RowFormat())["text"]
            codes, mel = check_codes(row["audio_codes"]), voice_mels(_waveform(row["ref_audio"]))
        except KeyError as error:
            raise ValueError(f"row {index}: no {error.args[0]}") from None
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from None
        text_ids = np.asarray(self.tokenizer(assistant_turn(text))["input_ids"], dtype=np.int64)
        return {
            "text_ids": torch.from_numpy(text_ids[:-NUM_CLOSING_TOKENS])[None],
            "audio_codes": torch.from_numpy(codes.astype(np.int64)),
            "ref_mel": mel,
        }

    def collate_fn(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """See the table of the class. The items may come from elsewhere, such as a cache; their three keys suffice."""
        mels = [item["ref_mel"] for item in items]
        if len({mel.shape for mel in mels}) > 1:
            raise ValueError(
                "references of different lengths do not fit into one batch, and padding would change their vectors; "
                "give all rows the same ref_audio, or use batch_size 1"
            )
        batch = collate([self._aligned(item) for item in items], [0] * len(items))
        text, codec, attention = (F.pad(batch[name], (0, 1)) for name in ("text_ids", "codec_ids", "attention_mask"))
        rows, ends = torch.arange(len(items)), batch["attention_mask"].sum(1)
        text[rows, ends], codec[rows, ends], attention[rows, ends] = self.ids.tts_pad, self.ids.codec_eos, 1
        codec[attention == 0] = NO_CODEC
        frame_mask = F.pad(batch["frame_mask"], (0, 1))
        codes = torch.zeros(*frame_mask.shape, NUM_CODEBOOKS, dtype=torch.int64)
        codes[frame_mask] = batch["codes"]
        return {
            "input_ids": torch.stack([text, codec.clamp(min=0)], dim=-1),
            "ref_mels": torch.cat(mels),
            "attention_mask": attention,
            "text_embedding_mask": attention.bool().unsqueeze(-1),
            "codec_embedding_mask": (codec != NO_CODEC).unsqueeze(-1),
            "codec_0_labels": F.pad(batch["labels"], (1, 0), value=IGNORE),  # from the position before to their own
            "codec_ids": codes,
            "codec_mask": frame_mask,
        }

    def _aligned(self, item: Mapping[str, Any]) -> AlignedIds:
        """The item as ``prompt`` lays it out."""
        text_ids = F.pad(item["text_ids"][0], (0, NUM_CLOSING_TOKENS))  # which it cuts off, whatever they are
        return append_frames(build_prompt(text_ids.numpy(), self.ids), item["audio_codes"].numpy(), self.ids)


def _waveform(reference: Any) -> np.ndarray:
    """(num_samples,) float32 at 24 kHz of a ``ref_audio``."""
    reference = reference[0] if isinstance(reference, list) else reference
    if isinstance(reference, tuple):
        waveform, rate = reference
        return to_model_rate(np.asarray(waveform, dtype=np.float32), int(rate))
    return load_audio(reference)
