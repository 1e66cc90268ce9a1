"""The whole objective as one module: a padded batch in, summed losses and token counts out.

This is the only module that Accelerate wraps, so ``forward`` is everything that has parameters in it: a DDP or FSDP
wrapper sees one call, and nothing reaches for ``.talker`` behind its back.

Shapes: B rows, L positions, H talker width, F real frames in the batch, C = 16 codebooks. The batch is the dictionary
that ``finetuning.dataset.collate`` documents.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from finetuning.dataset import Batch
from finetuning.prompt import IGNORE, NO_CODEC


class TrainingObjective(nn.Module):
    """Talker and sub-talker losses of a batch, exactly as stock generation would meet them.

    Args:
        talker: ``Qwen3TTSTalkerForConditionalGeneration``.
        speaker_vectors: (num_speakers, H) float32, inserted as they are; no gradient reaches them.
    """

    def __init__(self, talker: nn.Module, speaker_vectors: torch.Tensor) -> None:
        super().__init__()
        self.talker = talker
        self.register_buffer("speaker_vectors", speaker_vectors.clone(), persistent=False)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums over the batch's real tokens, float32 scalars on the model's device:

        ``talker_loss`` over F + B labels, ``sub_talker_loss`` over 15 x F labels; in eval mode also
        ``talker_correct`` () and ``sub_talker_correct`` (15,), the numbers of right top-1 predictions.
        """
        hidden = self.hidden_states(self.input_embeddings(batch), batch["attention_mask"])
        labels = batch["labels"]
        has_label = labels != IGNORE
        talker_logits = self.talker_logits(hidden[has_label])
        sub_talker_logits = self.sub_talker_logits(hidden[before_frames(batch)], batch["codes"])
        talker_labels, sub_talker_labels = labels[has_label], batch["codes"][:, 1:]
        # Explicit cross-entropy: the models' own loss_function would shift the labels a second time.
        sums = {
            "talker_loss": F.cross_entropy(talker_logits.float(), talker_labels, reduction="sum"),
            "sub_talker_loss": F.cross_entropy(
                sub_talker_logits.float().flatten(0, 1), sub_talker_labels.flatten(), reduction="sum"
            ),
        }
        if not self.training:
            sums["talker_correct"] = (talker_logits.argmax(-1) == talker_labels).sum().float()
            sums["sub_talker_correct"] = (sub_talker_logits.argmax(-1) == sub_talker_labels).sum(0).float()
        return sums

    def input_embeddings(self, batch: Batch) -> torch.Tensor:
        """(B, L, H): both channels, added. Padding positions hold values that the attention mask hides."""
        model = self.talker.model
        text = self.talker.text_projection(model.text_embedding(batch["text_ids"]))
        codec_ids = batch["codec_ids"]
        codec = model.codec_embedding(codec_ids.clamp(min=0)) * (codec_ids != NO_CODEC).unsqueeze(-1)
        embeddings = text + codec
        rows = (batch["speaker_positions"] >= 0).nonzero().squeeze(1)
        positions = batch["speaker_positions"][rows]
        vectors = self.speaker_vectors[batch["speaker_index"][rows]].to(embeddings.dtype)
        embeddings = embeddings.index_put((rows, positions), vectors, accumulate=True)
        other_codebooks = self.code_embeddings(batch["codes"])[:, 1:].sum(1).to(embeddings.dtype)
        return embeddings.index_put(batch["frame_mask"].nonzero(as_tuple=True), other_codebooks, accumulate=True)

    def code_embeddings(self, codes: torch.Tensor) -> torch.Tensor:
        """(F, C) codes to (F, C, H): codebook 0 from the talker's table, the others from the sub-talker's."""
        tables = [self.talker.model.codec_embedding, *self.talker.code_predictor.model.codec_embedding]
        return torch.stack([table(codes[:, index]) for index, table in enumerate(tables)], dim=1)

    def hidden_states(self, embeddings: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, L, H) after the final norm: what generation hands to both heads (``past_hidden``)."""
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        output = self.talker.model(
            inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=positions, use_cache=False
        )
        return output.last_hidden_state

    def talker_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) to (N, codec table size)."""
        return self.talker.codec_head(hidden)

    def sub_talker_logits(self, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Logits of codebooks 1 … 15 of each frame, (F, 15, codebook size).

        Args:
            hidden: (F, H), the hidden state one position before each frame.
            codes: (F, C); the sub-talker reads ``[hidden, code 0, … code 14]`` and its output i predicts code i.
        """
        predictor = self.talker.code_predictor
        inputs = torch.cat([hidden.unsqueeze(1), self.code_embeddings(codes)[:, :-1].to(hidden.dtype)], dim=1)
        inputs = predictor.small_to_mtp_projection(inputs)
        outputs = predictor.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return torch.stack([head(outputs[:, index + 1]) for index, head in enumerate(predictor.lm_head)], dim=1)


def before_frames(batch: Batch) -> torch.Tensor:
    """(B, L) bool: positions whose next position is a frame. No row starts with a frame, so rolling is safe."""
    return batch["frame_mask"].roll(-1, dims=1)


def step_loss(
    sums: dict[str, torch.Tensor], num_talker_tokens: int, num_sub_talker_tokens: int, sub_talker_weight: float
) -> torch.Tensor:
    """This batch's share of the loss of a whole optimizer step.

    Both denominators count the step's tokens over all micro-batches and processes, so that adding up the shares gives
    the mean over tokens, not a mean of means.
    """
    talker = sums["talker_loss"] / max(num_talker_tokens, 1)
    return talker + sub_talker_weight * sums["sub_talker_loss"] / max(num_sub_talker_tokens, 1)
