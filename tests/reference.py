"""What stock qwen-tts does, and independent calculations: the yardsticks of the parity tests.

Nothing here uses the project's prompt, dataset or objective.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

SPEAKER_ROW = 3000


def load_stock(folder: Path | str) -> Any:
    """Stock Qwen3TTSModel in fp32."""
    from qwen_tts import Qwen3TTSModel

    return Qwen3TTSModel.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="sdpa")


def as_custom_voice(stock: Any, vector: torch.Tensor, name: str = "anna") -> None:
    """Makes a loaded base answer generate_custom_voice for one speaker with the given vector."""
    talker_config = stock.model.config.talker_config
    talker_config.spk_id = {name: SPEAKER_ROW}
    talker_config.spk_is_dialect = {name: False}
    stock.model.supported_speakers = talker_config.spk_id.keys()
    stock.model.tts_model_type = "custom_voice"
    with torch.no_grad():
        stock.model.talker.model.codec_embedding.weight[SPEAKER_ROW] = vector


@contextmanager
def as_base(stock: Any) -> Iterator[None]:
    """Lets a model of ``as_custom_voice`` clone inside."""
    stock.model.tts_model_type = "base"
    try:
        yield
    finally:
        stock.model.tts_model_type = "custom_voice"


def clone_item(vector: torch.Tensor, text: str | None, codes: torch.Tensor | None) -> Any:
    """What ``create_voice_clone_prompt`` makes of a reference; without a text the vector alone is used.

    Args:
        vector: (H,) float32.
        codes: (R, 16).
    """
    from qwen_tts.inference.qwen3_tts_model import VoiceClonePromptItem

    is_in_context = text is not None
    return VoiceClonePromptItem(codes if is_in_context else None, vector, not is_in_context, is_in_context, text)


class _Captured(Exception):
    pass


@contextmanager
def captured_prompt(stock: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Collects what the stock call inside hands to ``talker.generate``, and ends the call there."""
    seen: dict[str, torch.Tensor] = {}
    original = stock.model.talker.generate

    def capture(**kwargs: Any) -> None:
        seen.update(kwargs)
        raise _Captured

    stock.model.talker.generate = capture
    try:
        yield seen
    except _Captured:
        pass
    finally:
        stock.model.talker.generate = original


class _ForceAndRecord(LogitsProcessor):
    """Records the raw scores of every step and leaves only the forced token."""

    def __init__(self, forced: Sequence[int]) -> None:
        self.forced, self.scores = list(forced), []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores.append(scores[0].clone())
        out = torch.full_like(scores, -torch.inf)
        out[:, self.forced[len(self.scores) - 1]] = 0.0
        return out


@torch.no_grad()
def stepwise_logits(stock: Any, prompt: dict[str, torch.Tensor], codes: torch.Tensor) -> tuple[Any, Any]:
    """Logits of stock's own decoding (KV caches in both models), forced along the given frames.

    Args:
        prompt: what ``captured_prompt`` collected, for one row.
        codes: (T, 16).

    Returns:
        (T + 1, codec table size) for codebook 0 and codec_eos, and (T, 15, codebook size).
    """
    model, talker = stock.model, stock.model.talker
    eos = model.config.talker_config.codec_eos_token_id
    sub_scores: list[torch.Tensor] = []
    original = talker.code_predictor.generate

    def forced_generate(**kwargs: Any) -> Any:
        frame = codes[len(sub_scores)]
        recorder = _ForceAndRecord(frame[1:].tolist())
        out = original(**kwargs, logits_processor=LogitsProcessorList([recorder]))
        sub_scores.append(torch.stack(recorder.scores))
        return out

    recorder = _ForceAndRecord([*codes[:, 0].tolist(), eos])
    talker.code_predictor.generate = forced_generate
    try:
        talker.generate(
            inputs_embeds=prompt["inputs_embeds"],
            attention_mask=prompt["attention_mask"],
            trailing_text_hidden=prompt["trailing_text_hidden"],
            tts_pad_embed=prompt["tts_pad_embed"],
            max_new_tokens=len(codes) + 1,
            do_sample=False,
            subtalker_dosample=False,
            eos_token_id=eos,
            output_hidden_states=True,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([recorder]),
        )
    finally:
        talker.code_predictor.generate = original
    return torch.stack(recorder.scores), torch.stack(sub_scores)


def naive_losses(
    model: Any,
    assistant_ids: torch.Tensor,
    language_id: int | None,
    vector: torch.Tensor,
    codes: torch.Tensor,
    reference: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Summed losses of one row, written out position by position from DESIGN.md section 2, without any batching.

    Args:
        assistant_ids: (n + 8,), the tokenized assistant turn.
        codes: (T, 16).
        reference: in context: (m + 5,), the tokenized turn of its text, and its (R, 16) codes.
    """
    reference_ids, reference_codes = reference or (torch.zeros(5, dtype=torch.int64), codes[:0])
    talker, config = model.talker, model.config
    codec = config.talker_config

    def text(token: int) -> torch.Tensor:
        return talker.text_projection(talker.model.text_embedding(torch.tensor(token)))

    def code(token: int) -> torch.Tensor:
        return talker.model.codec_embedding(torch.tensor(token))

    pad = text(config.tts_pad_token_id)
    rows = [text(int(token)) for token in assistant_ids[:3]]
    if language_id is None:
        tag = [codec.codec_nothink_id, codec.codec_think_bos_id, codec.codec_think_eos_id]
    else:
        tag = [codec.codec_think_id, codec.codec_think_bos_id, language_id, codec.codec_think_eos_id]
    rows += [pad + code(token) for token in tag]
    rows.append(pad + vector)
    rows.append(text(config.tts_bos_token_id) + code(codec.codec_pad_id))
    spoken = [*reference_ids[3:-2], *assistant_ids[3:-5]]
    rows += [text(int(token)) + code(codec.codec_pad_id) for token in spoken]
    rows.append(text(config.tts_eos_token_id) + code(codec.codec_pad_id))
    rows.append(pad + code(codec.codec_bos_id))
    first_label = len(rows) - 1 + len(reference_codes)
    tables = [talker.model.codec_embedding, *talker.code_predictor.model.codec_embedding]
    for frame in (*reference_codes, *codes):
        rows.append(pad + sum(table(value) for table, value in zip(tables, frame, strict=True)))
    hidden = talker.model(inputs_embeds=torch.stack(rows)[None]).last_hidden_state[0]
    talker_loss = sub_talker_loss = torch.tensor(0.0)
    for index, frame in enumerate(codes):
        at = hidden[first_label + index]
        talker_loss = talker_loss - F.log_softmax(talker.codec_head(at), -1)[frame[0]]
        # Stock's own fine-tuning forward of the sub-talker, for its logits only.
        logits, _ = talker.forward_sub_talker_finetune(frame[None], at[None])
        for book in range(1, len(frame)):
            sub_talker_loss = sub_talker_loss - F.log_softmax(logits[0, book - 1], -1)[frame[book]]
    last = F.log_softmax(talker.codec_head(hidden[-1]), -1)
    return {"talker_loss": talker_loss - last[codec.codec_eos_token_id], "sub_talker_loss": sub_talker_loss}
