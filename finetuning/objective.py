"""The whole objective as one module: a batch in, summed losses and token counts out.

This is the only module that Accelerate wraps, so ``forward`` is everything that has parameters in it: a DDP or FSDP
wrapper sees one call, and nothing reaches for ``.talker`` behind its back.

Shapes: N real positions of the B rows, one row behind the other, H talker width, F frames, of which the sub-talker
trains on M, C = 16 codebooks. The batch is the dictionary that ``finetuning.dataset`` documents. No operation asks the
device for a value, so the host is never kept waiting.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import takewhile

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from finetuning.attention import Rows, pack_attention, rows_for
from finetuning.chunked import pieces, sum_over_chunks
from finetuning.dataset import Batch
from finetuning.errors import UserError
from finetuning.prompt import NO_CODEC

#: Times that a kind of layer may be compiled.
MAX_COMPILED = 32
#: Positions whose talker logits, and frames whose sub-talker activations and logits, are in memory at a time.
TALKER_CHUNK_POSITIONS, SUB_TALKER_CHUNK_FRAMES = 8192, 512


class TrainingObjective(nn.Module):
    """Talker and sub-talker losses of a batch, exactly as stock generation would meet them.

    Args:
        talker: ``Qwen3TTSTalkerForConditionalGeneration``; its attention is made to take rows (see ``attention``).
        speaker_vectors: (num_speakers, H) float32, inserted as they are.
        gradient_checkpointing: keep only the inputs of the talker's layers for the backward pass.
        train_speakers: the speaker vectors train as well; else no gradient reaches them.
        language_ids: (K,) int64, rows of the talker's codec table that are not read from it: languages that train
            whether the table does or not.
        language_vectors: (K, H) float32, what stands in these rows at first.
    """

    language_ids: torch.Tensor | None
    language_vectors: nn.Parameter | None

    def __init__(
        self,
        talker: nn.Module,
        speaker_vectors: torch.Tensor,
        gradient_checkpointing: bool = False,
        train_speakers: bool = False,
        language_ids: torch.Tensor | None = None,
        language_vectors: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        assert talker.config.sliding_window is None, "the rows' attention is causal, without a window"
        self.talker = talker
        self.gradient_checkpointing = gradient_checkpointing
        if train_speakers:
            self.speaker_vectors = nn.Parameter(speaker_vectors.clone())
        else:
            self.register_buffer("speaker_vectors", speaker_vectors.clone(), persistent=False)
        self.register_buffer("language_ids", language_ids, persistent=False)
        self.register_parameter("language_vectors", _parameter(language_vectors))
        tables = [talker.model.codec_embedding, *talker.code_predictor.model.codec_embedding]
        sizes = torch.tensor([0, *(table.num_embeddings for table in tables[:-1])], device=speaker_vectors.device)
        self.register_buffer("first_rows", sizes.cumsum(0), persistent=False)
        pack_attention(talker.model.layers)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums over the batch's real tokens, float32 scalars on the model's device:

        ``talker_loss`` over the rows' own frames and their B ends, ``sub_talker_loss`` over 15 labels of each of these
        frames (of M frames, weighted to stand for all of them, where the batch says so); in eval mode also
        ``talker_correct`` () and ``sub_talker_correct`` (15,), the numbers of right top-1 predictions.
        """
        embedded = None if "prefix" in batch else self.code_embeddings(batch["codes"])
        hidden = self.hidden_states(batch, embedded)
        return self.talker_sums(hidden, batch) | self.sub_talker_sums(hidden, batch, embedded)

    # --------------------------------------------------------------------------------------------------- the talker

    def hidden_states(self, batch: Batch, embedded: torch.Tensor | None = None) -> torch.Tensor:
        """(N, H) after the final norm: what generation hands to both heads (``past_hidden``)."""
        layers, num_frozen = self.talker.model.layers, self.num_frozen_layers()
        states = batch["prefix"].float() if "prefix" in batch else self._prefix(batch, embedded)
        return self.talker.model.norm(self._through(layers[num_frozen:], states, batch))

    @torch.no_grad()
    def prefix(self, batch: Batch) -> torch.Tensor:
        """(N, H) float32, what goes into the first layer that trains: the same for a row in every epoch."""
        return self._prefix(batch, None)

    def _prefix(self, batch: Batch, embedded: torch.Tensor | None) -> torch.Tensor:
        frozen = self.talker.model.layers[: self.num_frozen_layers()]
        return self._through(frozen, self.input_embeddings(batch, embedded), batch)

    def num_frozen_layers(self) -> int:
        """So many layers from the bottom are frozen, with all that they read; 0 where an embedding trains."""
        talker, predictor = self.talker, self.talker.code_predictor.model
        tables = (talker.model.text_embedding, talker.model.codec_embedding, predictor.codec_embedding)
        if trains((*tables, talker.text_projection)) or self.trains_own_vectors:
            return 0
        return sum(1 for _ in takewhile(lambda layer: not trains([layer]), talker.model.layers))

    @property
    def trains_own_vectors(self) -> bool:
        """Whether speaker vectors or languages train: what goes into the lowest layer."""
        return any(parameter.requires_grad for parameter in self.parameters(recurse=False))

    def _through(self, layers: nn.ModuleList, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(N, H) in and out."""
        if not len(layers):
            return states
        rows, states = rows_of(batch), states.unsqueeze(0)
        rotary = self.talker.model.rotary_emb(states, rows.positions.expand(3, 1, -1))
        options = {"position_embeddings": rotary, "attention_mask": None, **rows_for(layers, rows)}
        for layer in layers:
            has_graph = torch.is_grad_enabled() and (states.requires_grad or trains([layer]))
            if self.gradient_checkpointing and has_graph:
                states = checkpoint(layer, states, use_reentrant=False, **options)[0]
            else:
                states = layer(states, **options)[0]
        return states.squeeze(0)

    def input_embeddings(self, batch: Batch, embedded: torch.Tensor | None = None) -> torch.Tensor:
        """(N, H) float32: both channels, added.

        Args:
            embedded: ``code_embeddings`` of the batch's frames, where they are there already.
        """
        model = self.talker.model
        embedded = self.code_embeddings(batch["codes"]) if embedded is None else embedded
        distinct = self.talker.text_projection(model.text_embedding(batch["distinct_text_ids"]).float())
        text = F.embedding(batch["text_places"], distinct).float()
        codec_ids = batch["codec_ids"].flatten().index_select(0, batch["real"])
        codec = self.codec_embedding(codec_ids.clamp(min=0)).float() * (codec_ids != NO_CODEC).unsqueeze(-1)
        places = batch["speaker_places"]
        vectors = batch["row_vectors"] if "row_vectors" in batch else self.speaker_vectors[batch["speaker_index"]]
        vectors = vectors * (places >= 0).unsqueeze(-1)
        embeddings = (text + codec).index_add(0, places.clamp(min=0), vectors)
        return embeddings.index_add(0, batch["frame_places"], embedded[:, 1:].sum(1))

    def codec_embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """(N,) ids to (N, H): the talker's codec table, with the new languages in their rows."""
        if self.language_vectors is None:
            return self.talker.model.codec_embedding(ids)
        table = self.talker.model.codec_embedding.weight.float()
        return F.embedding(ids, table.index_copy(0, self.language_ids, self.language_vectors))

    def code_embeddings(self, codes: torch.Tensor) -> torch.Tensor:
        """(F, C) codes to (F, C, H) float32, in one lookup: codebook 0 from the talker's table, the others from the
        sub-talker's."""
        tables = [self.talker.model.codec_embedding, *self.talker.code_predictor.model.codec_embedding]
        return F.embedding(codes + self.first_rows, torch.cat([table.weight for table in tables])).float()

    def talker_sums(self, hidden: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """``talker_loss`` and, in eval mode, ``talker_correct``."""
        labels = batch["labels"].flatten().index_select(0, batch["real"]).index_select(0, batch["label_places"])
        inputs = [hidden.index_select(0, batch["label_places"])]
        sums = _Sums(self, self.talker_logits, [self.talker.codec_head], TALKER_CHUNK_POSITIONS)
        return {f"talker_{name}": value for name, value in sums(inputs, labels).items()}

    def talker_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) to (N, codec table size)."""
        return self.talker.codec_head(hidden)

    # ----------------------------------------------------------------------------------------------- the sub-talker

    def sub_talker_sums(
        self, hidden: torch.Tensor, batch: Batch, embedded: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """``sub_talker_loss`` and, in eval mode, ``sub_talker_correct``.

        Args:
            embedded: ``code_embeddings`` of all frames, where they are there already.
        """
        codes, places, weights = batch["codes"], before_frames(batch), batch.get("sub_talker_weights")
        if (chosen := batch.get("sub_talker_frames")) is not None:
            codes, places = codes.index_select(0, chosen), places.index_select(0, chosen)
            embedded = None if embedded is None else embedded.index_select(0, chosen)
        embedded = self.code_embeddings(codes) if embedded is None else embedded
        inputs = [hidden.index_select(0, places), embedded[:, :-1]]
        predictor = self.talker.code_predictor
        parts = [predictor.small_to_mtp_projection, predictor.model.layers, predictor.model.norm, predictor.lm_head]
        sums = _Sums(self, self.sub_talker_logits, parts, SUB_TALKER_CHUNK_FRAMES)
        return {f"sub_talker_{name}": value for name, value in sums(inputs, codes[:, 1:], weights).items()}

    def sub_talker_logits(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Logits of codebooks 1 … 15 of some frames, (M, 15, codebook size).

        Args:
            hidden: (M, H), the hidden state one position before each frame.
            embedded: (M, 15, H), the embeddings of codes 0 … 14; the sub-talker reads ``[hidden, code 0, … code 14]``
                and its output i predicts code i.
        """
        predictor = self.talker.code_predictor
        inputs = predictor.small_to_mtp_projection(torch.cat([hidden.unsqueeze(1), embedded], dim=1))
        outputs = predictor.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return torch.stack([head(outputs[:, index + 1]) for index, head in enumerate(predictor.lm_head)], dim=1)


class _Sums:
    """Summed losses of logits that never stand in memory all at once.

    Args:
        logits_of: pieces of the inputs in, (n, …, V) logits out.
        parts: the modules with all weights that it reads.
        chunk_size: length of a piece.
    """

    def __init__(
        self,
        objective: TrainingObjective,
        logits_of: Callable[..., torch.Tensor],
        parts: Iterable[nn.Module],
        chunk_size: int,
    ) -> None:
        self.objective, self.logits_of, self.chunk_size = objective, logits_of, chunk_size
        self.parameters = [parameter for part in parts for parameter in part.parameters()]
        if isinstance(objective, FSDPModule):
            # Sharded layers gather their weights in every call, and all processes must make as many calls.
            self.chunk_size = sys.maxsize

    def __call__(
        self, inputs: list[torch.Tensor], labels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """``loss`` () float32 and, in eval mode, ``correct`` (…) float32, the numbers of right top-1 predictions.

        Args:
            labels: (n, …) int64.
            weights: (n,) float32, what each position counts; None for 1.
        """
        tensors = [*inputs, labels, *([] if weights is None else [weights])]
        if self.objective.training:
            return {"loss": self._loss(tensors, len(inputs))}
        losses, correct = [], []
        for *piece, piece_labels in pieces([*inputs, labels], self.chunk_size):
            logits = self.logits_of(*piece)
            losses.append(summed_loss(logits, piece_labels))
            correct.append((logits.argmax(-1) == piece_labels).sum(0).float())
        return {"loss": torch.stack(losses).sum(), "correct": torch.stack(correct).sum(0)}

    def _loss(self, tensors: list[torch.Tensor], num_inputs: int) -> torch.Tensor:
        def compute(*piece: torch.Tensor) -> torch.Tensor:
            return summed_loss(self.logits_of(*piece[:num_inputs]), *piece[num_inputs:])

        learns = any(tensor.requires_grad for tensor in (*tensors, *self.parameters))
        if not (learns and torch.is_grad_enabled()):  # as the talker's loss where only the sub-talker has adapters
            return torch.stack([compute(*piece) for piece in pieces(tensors, self.chunk_size)]).sum()
        if self._takes_gradients_early():
            return sum_over_chunks(compute, tensors, self.parameters, self.chunk_size)
        # In fp16 always, so that there, too, one chunk is in memory at a time; FSDP has one chunk only.
        is_kept = isinstance(self.objective, FSDPModule) and not self.objective.gradient_checkpointing
        if not is_kept:
            compute = partial(checkpoint, compute, use_reentrant=False)
        return torch.stack([compute(*piece) for piece in pieces(tensors, self.chunk_size)]).sum()

    def _takes_gradients_early(self) -> bool:
        """Not where FSDP collects them, nor in fp16, whose scale they would be taken without."""
        device = self.objective.speaker_vectors.device.type
        is_fp16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        return not is_fp16 and not isinstance(self.objective, FSDPModule)


def _parameter(values: torch.Tensor | None) -> nn.Parameter | None:
    return None if values is None else nn.Parameter(values.clone())


def summed_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """() float32, in float32 whatever the logits' precision.

    Explicit cross-entropy: the models' own loss_function would shift the labels a second time.

    Args:
        logits: (n, …, V).
        labels: (n, …).
        weights: (n,), what each position counts; None for 1.
    """
    logits = logits.float().flatten(0, -2)
    if weights is None:
        return F.cross_entropy(logits, labels.flatten(), reduction="sum")
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels)
    return (losses.flatten(1).sum(1) * weights).sum()


def check_compiler(device: str) -> None:
    """Raises UserError where torch.compile would find no compiler: for C on a GPU, for C++ on a CPU."""
    names = ("gcc", "clang", "cc") if device == "cuda" else ("g++", "clang++", "c++")
    if not any(map(shutil.which, names)):
        raise UserError(f"COMPILE: none of {', '.join(names)} is installed; install one, or set COMPILE=false")


def compile_layers(objective: TrainingObjective, backend: str = "inductor") -> None:
    """Compiles each decoder layer of both models when it is first called, for any number of positions.

    All layers of a model share what is compiled. They are compiled again for other conditions than lengths (with and
    without gradients, frozen or not, rows of one length, a single row), a dozen in all; ``MAX_COMPILED`` bounds it.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED)
    talker = objective.talker
    for layer in (*talker.model.layers, *talker.code_predictor.model.layers):
        layer.compile(backend=backend, dynamic=True)


def rows_of(batch: Batch) -> Rows:
    """Where the batch's rows lie among its real positions."""
    num_rows, max_length = batch["text_ids"].shape
    places = batch["real"] // max_length * max_length + batch["positions"]
    return Rows(batch["row_starts"], batch["positions"], places, num_rows, max_length)


def before_frames(batch: Batch) -> torch.Tensor:
    """(F,) places among the real positions whose next position is a frame. No row starts with a frame."""
    return batch["frame_places"] - 1


def trains(modules: Iterable[nn.Module]) -> bool:
    """Whether any weight of these modules trains."""
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def step_loss(
    sums: dict[str, torch.Tensor], num_talker_tokens: int, num_sub_talker_tokens: int, sub_talker_weight: float
) -> torch.Tensor:
    """This batch's share of the loss of a whole optimizer step.

    Both denominators count the step's tokens over all micro-batches and processes, so that adding up the shares gives
    the mean over tokens, not a mean of means.
    """
    talker = sums["talker_loss"] / max(num_talker_tokens, 1)
    return talker + sub_talker_weight * sums["sub_talker_loss"] / max(num_sub_talker_tokens, 1)
