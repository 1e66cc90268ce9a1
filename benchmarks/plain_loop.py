"""The loop that speed is compared with: a correct fine-tuning step written without any care for time or memory.

It differs from ``finetuning.objective`` in what a first version usually does: the speaker encoder runs in every step,
all weights train (the text table too), the 15 other codebooks are looked up at every position and masked, the talker
runs through its public ``forward`` with a KV cache and all hidden states kept, logits are computed at every position,
and the sub-talker goes through ``forward_sub_talker_finetune``, which also computes a loss that nobody uses.
The loss is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from finetuning.dataset import Batch
from finetuning.layer_utils import is_new_layer
from finetuning.prompt import IGNORE, NO_CODEC


class PlainLoop(nn.Module):
    """A batch in, its mean loss out.

    Args:
        model: ``Qwen3TTSForConditionalGeneration`` of type base; all of it trains.
        reference_mel: (1, frames, bands), the reference of every row.
    """

    def __init__(self, model: Any, reference_mel: torch.Tensor, sub_talker_weight: float) -> None:
        super().__init__()
        self.model = model.requires_grad_(True)
        self.sub_talker_weight = sub_talker_weight
        self.register_buffer("reference_mel", reference_mel)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The batch's mean loss: talker + weight x sub-talker."""
        talker = self.model.talker
        output = talker(
            inputs_embeds=self.input_embeddings(batch),
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
        )
        labels, codes = batch["labels"], batch["codes"]
        talker_loss = F.cross_entropy(output.logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        last_hidden = output.hidden_states[0][-1]
        before_frames = batch["frame_mask"].roll(-1, dims=1)  # no row starts with a frame
        logits, _ = talker.forward_sub_talker_finetune(codes, last_hidden[before_frames])
        sub_talker_loss = F.cross_entropy(logits.float().flatten(0, 1), codes[:, 1:].flatten())
        return talker_loss + self.sub_talker_weight * sub_talker_loss

    def input_embeddings(self, batch: Batch) -> torch.Tensor:
        """(B, L, H): both channels, added; zeros on padding."""
        talker, codec_ids, frame_mask = self.model.talker, batch["codec_ids"], batch["frame_mask"]
        num_rows = len(codec_ids)
        speaker = self.speaker(num_rows)
        codec = talker.model.codec_embedding(codec_ids.clamp(min=0)) * (codec_ids != NO_CODEC).unsqueeze(-1)
        codec[torch.arange(num_rows), batch["speaker_positions"]] = speaker.to(codec.dtype)
        codes = batch["codes"].new_zeros(*frame_mask.shape, batch["codes"].shape[1])
        codes[frame_mask] = batch["codes"]
        for index, table in enumerate(talker.code_predictor.get_input_embeddings(), 1):
            codec = codec + table(codes[..., index]) * frame_mask.unsqueeze(-1)
        return self.text(batch["text_ids"]) * batch["attention_mask"].unsqueeze(-1) + codec

    def speaker(self, num_rows: int) -> torch.Tensor:
        """(num_rows, H): the encoder's vectors of the reference."""
        return self.model.speaker_encoder(self.reference_mel.expand(num_rows, -1, -1)).detach()

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, L) text ids to (B, L, H)."""
        return self.model.talker.text_projection(self.model.talker.model.text_embedding(ids))


def freeze_original_layers(model: Any) -> None:
    """Freezing as scripts do it: the weights of the base's own talker layers no longer train, everything else does.

    Since the embeddings below them still train, back-propagation goes through the frozen layers.
    """
    for layer in model.talker.model.layers:
        layer.requires_grad_(is_new_layer(layer))
