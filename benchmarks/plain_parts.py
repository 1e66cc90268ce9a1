"""The objective with one part done the plain way, to see what that part brings; the losses stay the same."""

from __future__ import annotations

import torch
from torch import nn

from finetuning.dataset import Batch
from finetuning.objective import TrainingObjective, before_frames, rows_of, summed_loss


class PaddedRows(TrainingObjective):
    """Rows side by side, padded to the longest, through every layer; no checkpointing."""

    def _through(self, layers: nn.ModuleList, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        shape, places = batch["text_ids"].shape, rows_of(batch).places
        padded = states.new_zeros(shape.numel(), states.shape[1]).index_copy(0, places, states).unflatten(0, shape)
        positions = torch.arange(shape[1], device=states.device)
        rotary = self.talker.model.rotary_emb(padded, positions.expand(3, 1, -1))
        for layer in layers:  # padding stands behind its row, where a causal query never looks: no mask
            padded = layer(padded, position_embeddings=rotary, attention_mask=None)[0]
        return padded.flatten(0, 1).index_select(0, places)


class AllLogitsAtOnce(TrainingObjective):
    """Logits and activations of all frames in memory until the backward pass."""

    def talker_sums(self, hidden: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        labels = batch["labels"].flatten()[batch["real"]][batch["label_places"]]
        return {"talker_loss": summed_loss(self.talker_logits(hidden[batch["label_places"]]), labels)}

    def sub_talker_sums(
        self, hidden: torch.Tensor, batch: Batch, embedded: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        embedded = self.code_embeddings(batch["codes"]) if embedded is None else embedded
        chosen = batch.get("sub_talker_frames", slice(None))
        places, codes = before_frames(batch)[chosen], batch["codes"][chosen]
        logits = self.sub_talker_logits(hidden[places], embedded[chosen][:, :-1])
        return {"sub_talker_loss": summed_loss(logits, codes[:, 1:], batch.get("sub_talker_weights"))}


class ManyLookups(TrainingObjective):
    """One lookup for each codebook."""

    def code_embeddings(self, codes: torch.Tensor) -> torch.Tensor:
        tables = [self.talker.model.codec_embedding, *self.talker.code_predictor.model.codec_embedding]
        return torch.stack([table(codes[:, index]) for index, table in enumerate(tables)], dim=1).float()
