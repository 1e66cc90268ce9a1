"""Attention over rows that lie one behind the other: no padding anywhere else, and no row sees another.

The talker's layers get one sequence of all N real positions of a batch, (1, N, H). Only the attention itself needs to
know where a row begins. FlashAttention 2 is told (its variable-length form); for PyTorch's own attention the queries,
keys and values of the rows are put side by side, (B, heads, L, D), attended causally, and taken apart again. What pads
a row stands behind it, where a causal query never looks, so no mask is needed and the fastest kernels apply.

transformers looks an attention function up by the name in the configuration. The two that are registered here do what
``sdpa`` and ``eager`` do wherever they are not given rows, so the model still generates with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

PREFIX = "packed_"


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch lie among its N real positions; B rows, the longest of L positions.

    Attributes:
        starts: (B + 1,) int32, where each row begins, and N.
        positions: (N,) int64, the position inside its own row.
        places: (N,) int64, ``row x L + position``.
        num_rows, max_length: B and L; L may be larger than the longest row.
    """

    starts: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    num_rows: int
    max_length: int

    @property
    def are_equally_long(self) -> bool:
        return len(self.positions) == self.num_rows * self.max_length

    def side_by_side(self, states: torch.Tensor) -> torch.Tensor:
        """(1, heads, N, D) to (B, heads, L, D), with zeros behind shorter rows."""
        states = states[0].transpose(0, 1)  # (N, heads, D)
        if not self.are_equally_long:
            padded = states.new_zeros(self.num_rows * self.max_length, *states.shape[1:])
            states = padded.index_copy(0, self.places, states)
        return states.unflatten(0, (self.num_rows, self.max_length)).transpose(1, 2)

    def one_behind_the_other(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L, heads, D) to (1, N, heads, D)."""
        states = states.flatten(0, 1)
        return (states if self.are_equally_long else states.index_select(0, self.places)).unsqueeze(0)


def pack_attention(layers: nn.ModuleList) -> None:
    """Makes the attention of these decoder layers understand ``rows_for``; FlashAttention 2 already does."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = layers[0].self_attn.config
    name = config._attn_implementation
    functions = {"sdpa": packed_sdpa, "eager": packed_eager}
    if name not in functions:
        return
    ALL_ATTENTION_FUNCTIONS.register(PREFIX + name, functions[name])
    ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    config._attn_implementation = PREFIX + name


def rows_for(layers: nn.ModuleList, rows: Rows) -> dict[str, Any]:
    """Keyword arguments by which a layer's attention learns where the rows begin."""
    if layers[0].self_attn.config._attn_implementation.startswith(PREFIX):
        return {"rows": rows}
    return {
        "cu_seq_lens_q": rows.starts,
        "cu_seq_lens_k": rows.starts,
        "max_length_q": rows.max_length,
        "max_length_k": rows.max_length,
    }


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    rows: Rows | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """PyTorch's attention, an attention function as transformers calls it; with ``rows``, (1, heads, N, D) in."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    query, key, value = (rows.side_by_side(states) for states in (query, key, value))
    shares_keys = has_kernel_for_shared_keys(query)
    if not shares_keys:
        key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    attended = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=shares_keys
    )
    return rows.one_behind_the_other(attended.transpose(1, 2)), None


def has_kernel_for_shared_keys(query: torch.Tensor) -> bool:
    """Whether PyTorch has a fast kernel in which several heads read one key.

    On a GPU its memory-efficient one, which fp32 (and fp16 before Ampere) gets, is none: PyTorch would silently compute
    all (B, heads, L, L) scores instead.
    """
    return not query.is_cuda or query.dtype == torch.bfloat16


def packed_eager(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    rows: Rows | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's own attention in plain operations; see ``packed_sdpa``."""
    from qwen_tts.core.models.modeling_qwen3_tts import eager_attention_forward

    if rows is None:
        return eager_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value = (rows.side_by_side(states) for states in (query, key, value))
    hidden_from = torch.ones(rows.max_length, rows.max_length, dtype=torch.bool, device=query.device).triu(1)
    mask = torch.zeros_like(hidden_from, dtype=query.dtype).masked_fill(hidden_from, torch.finfo(query.dtype).min)
    attended, _ = eager_attention_forward(module, query, key, value, mask[None, None], **options)
    return rows.one_behind_the_other(attended), None
