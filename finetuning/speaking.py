"""The model that trains speaks, through stock's own ``generate``, as its checkpoint of this moment would.

There is no second copy of it. What a checkpoint has and the model in training does not is put in its place only
meanwhile, and taken out again bit for bit: the vectors of speakers and of new languages in their rows of the codec
table, their names in the configuration, LORA_EXPORT_SCALE. Dropout, compiled layers and gradients are off; gradient
checkpointing is the objective's, which has no part in it. Trained matrices are kept in more bits than a checkpoint
has, so its speech may differ in a rounding, as its loss does; adapters are not merged, for the same reason.

On top of what training keeps it needs the cache of one utterance (at 1.7B about 0.5 MB a frame, with the hidden states
that stock collects) and, under autocast, the trained matrices once more in the lower precision, which are gone when it
is over: less than the gradients and activations of a step, which are not there then.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from finetuning.checkpoint import Exporter
from finetuning.dataset import Reference, RowEncoder
from finetuning.prompt import assistant_turn, reference_turn
from finetuning.settings import Settings
from finetuning.state import random_tensors, restore_random
from finetuning.stock import import_qwen_tts, quiet_transformers

#: Names of a checkpoint's configuration that stock's ``generate`` looks speakers and languages up by.
_LOOKED_UP = ("spk_id", "spk_is_dialect", "codec_language_id")


@dataclass(frozen=True)
class Request:
    """One utterance.

    Attributes:
        number: from 0; its place among all of them.
        language: a name of the base's, or "Auto".
        max_frames: speech that is longer is cut off.
        reference: whose voice it is, where the checkpoint clones (EXPORT_TYPE=base).
        in_context: whether the reference's text and codes stand in the prompt, else its vector alone.
    """

    number: int
    text: str
    speaker: str
    language: str
    seed: int
    max_frames: int
    reference: Reference | None = None
    in_context: bool = False


@dataclass(frozen=True)
class Speech:
    """What became of a request.

    Attributes:
        codes: (T, 16) int16.
        stopped: whether it came to its end by itself.
    """

    number: int
    codes: np.ndarray
    stopped: bool


class LiveModel:
    """The model of a run, for speaking.

    Args:
        encoder: whose tokenizer is used.
        exporter: knows the model and what a checkpoint of it has.
    """

    def __init__(self, settings: Settings, exporter: Exporter, encoder: RowEncoder, accelerator: Accelerator) -> None:
        self.settings, self.exporter, self.accelerator = settings, exporter, accelerator
        self.model, self._tokenizer = exporter.model, encoder.tokenizer
        self._defaults = generation_defaults(exporter)
        self._is_streaming = {"streaming": True, "non_streaming": False}.get(
            settings.train_layout,
            settings.export_type == "base",  # both were trained: what stock's call does by default
        )

    @contextlib.contextmanager
    def ready(self, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Inside ``say`` may be called; afterwards the model and all random generators are what they were.

        Args:
            check: called before every frame; may raise Interrupted.
        """
        model = self.model
        with (
            leaving_no_cache(self.accelerator.device),
            _forgetting_positions(model.talker),
            undisturbed(self.accelerator.device),
            torch.no_grad(),
            _evaluating(model.talker),
            _uncompiled(model.talker),
            _in_rows(model.talker.model.codec_embedding.weight, *self.exporter.rows_now()),
            _configured(model.config.talker_config, self.exporter.config_now()["talker_config"]),
            _adapters_scaled(model.talker, self.settings.lora_export_scale),
            _asking(model.talker, check),
            _checking_logits(model.talker),
            quiet_transformers(),
            self.accelerator.autocast(),
        ):
            yield

    def say(self, request: Request) -> Speech:
        """Speaks.

        Raises:
            FloatingPointError: a logit is NaN or infinite.
            Interrupted: see ``ready``.
            Exception: whatever else generation raises, the want of memory say.
        """
        options = self._options(request.max_frames)
        torch.manual_seed(request.seed)
        codes, _ = self.model.generate(
            input_ids=[self._tokens(assistant_turn(request.text))],
            languages=[request.language],
            non_streaming_mode=not self._is_streaming,
            **self._voice(request),
            **options,
        )
        codes = codes[0].cpu().numpy().astype(np.int16)
        # Of N tokens without an end the last is a frame whose other codes were never generated.
        return Speech(request.number, codes, stopped=len(codes) < options["max_new_tokens"] - 1)

    def _options(self, max_frames: int) -> dict[str, Any]:
        """The base's own sampling, as stock reads it from generation_config.json, and a bound."""
        stock = import_qwen_tts().Qwen3TTSModel(self.model, None, self._defaults)
        options = stock._merge_generate_kwargs()
        # One more token for the end, and one to tell an end there from none.
        return options | {"max_new_tokens": min(max_frames + 2, options["max_new_tokens"])}

    def _voice(self, request: Request) -> dict[str, Any]:
        """What ``generate_custom_voice`` or ``generate_voice_clone`` pass on."""
        reference = request.reference
        if reference is None:
            return {"speakers": [request.speaker]}
        has_codes = request.in_context
        prompt = {
            "ref_code": [torch.from_numpy(reference.codes.astype(np.int64)) if has_codes else None],
            "ref_spk_embedding": [torch.from_numpy(reference.vector)],
            "x_vector_only_mode": [not has_codes],
            "icl_mode": [has_codes],
        }
        ref_ids = self._tokens(reference_turn(reference.text)) if has_codes else None
        return {"voice_clone_prompt": prompt, "ref_ids": [ref_ids]}

    def _tokens(self, text: str) -> torch.Tensor:
        """(1, n) int64."""
        return torch.tensor([self._tokenizer(text)["input_ids"]], device=self.accelerator.device)


def num_positions(request: Request, tokenizer: Any) -> int:
    """How many positions a request may take: of its texts, its reference and its speech."""
    texts, frames = [assistant_turn(request.text)], request.max_frames
    if request.in_context:
        texts, frames = [*texts, reference_turn(request.reference.text)], frames + len(request.reference.codes)
    return sum(len(tokenizer(text)["input_ids"]) for text in texts) + frames


def generation_defaults(exporter: Exporter) -> dict[str, Any]:
    """generation_config.json, which every checkpoint carries as the base has it."""
    return json.loads((exporter.base.folder / "generation_config.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------ only for the time being


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the random generators of this process go on as if it had not been."""
    states = random_tensors(device)
    try:
        yield
    finally:
        restore_random(states, device)


@contextlib.contextmanager
def leaving_no_cache(device: torch.device) -> Iterator[None]:
    """Blocks that were made for an utterance would only lie about among those of the steps."""
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _forgetting_positions(talker: nn.Module) -> Iterator[None]:
    """Which generation leaves there, and begins with anew."""
    try:
        yield
    finally:
        talker.rope_deltas = None


@contextlib.contextmanager
def _asking(talker: nn.Module, check: Callable[[], None]) -> Iterator[None]:
    """Before every frame: of an utterance of minutes the next checkpoint must not wait for the end."""
    hook = talker.codec_head.register_forward_pre_hook(lambda *_: check())
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def _uncompiled(module: nn.Module) -> Iterator[None]:
    """A cache that grows with every frame would have the layers compiled again and again."""
    compiled = [(part, part._compiled_call_impl) for part in module.modules() if part._compiled_call_impl is not None]
    for part, _ in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call


@contextlib.contextmanager
def _in_rows(table: nn.Parameter, rows: list[int], vectors: torch.Tensor) -> Iterator[None]:
    """(n, H) vectors stand in n rows of the table."""
    kept = table.detach()[rows].clone()
    table.detach()[rows] = vectors.to(table)
    try:
        yield
    finally:
        table.detach()[rows] = kept


@contextlib.contextmanager
def _configured(config: Any, wanted: dict[str, Any]) -> Iterator[None]:
    kept = {name: getattr(config, name) for name in _LOOKED_UP}
    for name in _LOOKED_UP:
        setattr(config, name, wanted.get(name) or {})
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


@contextlib.contextmanager
def _adapters_scaled(module: nn.Module, factor: float) -> Iterator[None]:
    """LORA_EXPORT_SCALE, where there are adapters."""
    scalings = [part.scaling for part in module.modules() if hasattr(part, "lora_A")]
    kept = [dict(scaling) for scaling in scalings]
    for scaling in scalings:
        scaling.update({name: value * factor for name, value in scaling.items()})
    try:
        yield
    finally:
        for scaling, values in zip(scalings, kept, strict=True):
            scaling.update(values)


@contextlib.contextmanager
def _checking_logits(talker: nn.Module) -> Iterator[None]:
    """Raises FloatingPointError for logits that are not finite: a GPU that is to draw from them gives up for good."""

    def check(_: nn.Module, __: Any, logits: torch.Tensor) -> None:
        if not torch.isfinite(logits).all():
            raise FloatingPointError("the model's logits are not finite")

    heads = (talker.codec_head, *talker.code_predictor.lm_head)
    hooks = [head.register_forward_hook(check) for head in heads]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
