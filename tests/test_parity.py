"""Training equals inference: prompts, token ids and step-by-step logits against stock qwen-tts."""

from __future__ import annotations

import itertools
import json
import unicodedata
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPES
from reference import as_base, as_custom_voice, captured_prompt, clone_item, load_stock, stepwise_logits

from finetuning.base_model import load_tokenizer
from finetuning.dataset import collate
from finetuning.objective import TrainingObjective, before_frames
from finetuning.prompt import (
    IGNORE,
    AlignedIds,
    InContext,
    LayoutIds,
    append_frames,
    assistant_turn,
    build_prompt,
    instruct_turn,
    language_codec_id,
    reference_turn,
)
from finetuning.tiny_model import embedded_model_folder

TEXTS = ("Hello there.", "A rather longer sentence, so that rows differ in length by a good deal.", "No")
INSTRUCT = "Speak slowly, please."


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A stock model with one speaker, and our objective over the very same talker."""
    folder = embedded_model_folder(request.param)
    stock = load_stock(folder)
    vector = torch.randn(1, stock.model.config.talker_config.hidden_size, generator=torch.Generator().manual_seed(1))
    as_custom_voice(stock, vector[0])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return SimpleNamespace(
        name=request.param,
        stock=stock,
        ids=LayoutIds.from_config(config),
        objective=TrainingObjective(stock.model.talker, vector).eval(),
        tokenizer=load_tokenizer(folder),
    )


def our_prompt(
    case: Any,
    text: str,
    language: str | None,
    speaker: str | None,
    instruct: str | None,
    is_streaming: bool = False,
    reference: tuple[str, torch.Tensor] | None = None,
) -> AlignedIds:
    tokenize = lambda turn: np.asarray(case.tokenizer(turn)["input_ids"])  # noqa: E731
    return build_prompt(
        tokenize(assistant_turn(text)),
        case.ids,
        instruct_ids=tokenize(instruct_turn(instruct)) if instruct else None,
        language_id=language_codec_id(language, case.ids),
        has_speaker=speaker is not None,
        is_streaming=is_streaming,
        reference=InContext(tokenize(reference_turn(reference[0])), reference[1].numpy()) if reference else None,
    )


def stock_prompt(
    case: Any, texts: Any, language: str | None, speaker: str | None, instruct: str | None, is_streaming: bool = False
) -> dict:
    """Through generate_custom_voice where it takes the combination, else through generate."""
    stock, count = case.stock, len(texts)
    # Stock drops instructions in generate_custom_voice of a 0.6B model, so there generate() is asked itself.
    direct = speaker is None or (instruct is not None and stock.model.tts_model_size == "0b6")
    with captured_prompt(stock) as seen:
        if not direct:
            stock.generate_custom_voice(
                list(texts), speaker, language=language or "Auto", instruct=instruct,
                non_streaming_mode=not is_streaming,
            )  # fmt: skip
        stock.model.generate(
            input_ids=stock._tokenize_texts([stock._build_assistant_text(text) for text in texts]),
            instruct_ids=stock._tokenize_texts([stock._build_instruct_text(instruct)] * count) if instruct else None,
            languages=[language or "Auto"] * count,
            speakers=[speaker] * count,
            non_streaming_mode=not is_streaming,
        )
    return seen


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(
    ("language", "speaker", "instruct"),
    list(itertools.product([None, "english"], ["ANNA", None], [None, INSTRUCT])),
)
@pytest.mark.parametrize("is_streaming", [False, True], ids=["whole text", "streaming"])
def test_prompt_embeddings_equal_stock(
    case: Any, language: str | None, speaker: str | None, instruct: str | None, padding_side: str, is_streaming: bool
) -> None:
    want = stock_prompt(case, TEXTS, language, speaker, instruct, is_streaming)
    prompts = [our_prompt(case, text, language, speaker, instruct, is_streaming) for text in TEXTS]
    empty = np.zeros((0, 16), dtype=np.int64)
    prompts = [AlignedIds(p.text, p.codec, p.speaker_position, empty, p.labels) for p in prompts]
    batch = collate(prompts, [0] * len(TEXTS), padding_side=padding_side)
    with torch.no_grad():
        got = case.objective.input_embeddings(batch)
    assert_prompts_equal(got, prompts, batch, want, atol=1e-6)
    if padding_side == "left":
        assert torch.equal(batch["attention_mask"], want["attention_mask"])


def assert_prompts_equal(got: torch.Tensor, prompts: list[AlignedIds], batch: dict, want: dict, atol: float) -> None:
    """Our embeddings of some prompts, one behind the other, against stock's, which are padded on the left."""
    for index, prompt in enumerate(prompts):
        length = int(want["attention_mask"][index].sum())
        assert length == len(prompt.text)
        ours = got[batch["row_starts"][index] : batch["row_starts"][index + 1]]
        torch.testing.assert_close(ours, want["inputs_embeds"][index, -length:], atol=atol, rtol=0)


def test_stock_drops_instructions_of_small_models_and_so_do_we(case: Any) -> None:
    """RowEncoder.uses_instruct follows what generate_custom_voice does for each size."""
    with captured_prompt(case.stock) as seen:
        case.stock.generate_custom_voice(TEXTS[0], "anna", instruct=INSTRUCT)
    uses_instruct = case.stock.model.tts_model_size != "0b6"
    prompt = our_prompt(case, TEXTS[0], None, "anna", INSTRUCT if uses_instruct else None)
    assert seen["inputs_embeds"].shape[1] == len(prompt.text)


#: What references say, and their frames: fewer than, and more than the tokens of all texts.
REFERENCES = (("Yes, of course.", 3), ("I said that, once.", 150), ("Oh", 9))


def references(case: Any, is_in_context: bool = True) -> list[tuple[torch.Tensor, tuple[str, torch.Tensor] | None]]:
    """Random vectors, and what stands in context."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for text, num_frames in REFERENCES:
        vector = torch.randn(case.stock.model.config.talker_config.hidden_size, generator=generator)
        codes = torch.randint(0, 2048, (num_frames, 16), generator=generator)
        found.append((vector, (text, codes) if is_in_context else None))
    return found


def cloning_prompt(
    case: Any, texts: Any, voices: Any, language: str | None, instruct: str | None, is_streaming: bool
) -> dict:
    """What generate_voice_clone hands on; it passes instructions through as ids."""
    stock = case.stock
    items = [clone_item(vector, *(context or (None, None))) for vector, context in voices]
    turns = [stock._build_instruct_text(instruct)] * len(texts)
    instructed = {"instruct_ids": stock._tokenize_texts(turns)} if instruct else {}
    with as_base(stock), captured_prompt(stock) as seen:
        stock.generate_voice_clone(
            list(texts), language=language or "Auto", voice_clone_prompt=items, non_streaming_mode=not is_streaming,
            **instructed,
        )  # fmt: skip
    return seen


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(("language", "instruct"), list(itertools.product([None, "english"], [None, INSTRUCT])))
@pytest.mark.parametrize("is_streaming", [False, True], ids=["whole text", "streaming"])
@pytest.mark.parametrize("is_in_context", [False, True], ids=["vector only", "in context"])
def test_cloning_prompts_equal_stock(
    case: Any, language: str | None, instruct: str | None, is_streaming: bool, is_in_context: bool, padding_side: str
) -> None:
    """Each row with a reference of its own, in context or by its vector alone."""
    voices = references(case, is_in_context)
    want = cloning_prompt(case, TEXTS, voices, language, instruct, is_streaming)
    prompts = [
        our_prompt(case, text, language, "its own", instruct, is_streaming, context)
        for text, (_, context) in zip(TEXTS, voices, strict=True)
    ]
    no_codes = np.zeros((0, 16), dtype=np.int64)
    prompts = [replace(prompt, codes=prompt.codes if is_in_context else no_codes) for prompt in prompts]
    batch = collate(prompts, [0] * len(TEXTS), padding_side=padding_side)
    batch["row_vectors"] = torch.stack([vector for vector, _ in voices])
    with torch.no_grad():
        got = case.objective.input_embeddings(batch)
    assert_prompts_equal(got, prompts, batch, want, atol=1e-5)  # frames are sums of 17 embeddings, in another order
    for index, prompt in enumerate(prompts):
        # Beside the frames to come: the rest of the text, then tts_pad.
        trailing = want["trailing_text_hidden"][index]
        text = case.stock.model.talker.text_projection(
            case.stock.model.talker.model.text_embedding(torch.tensor([*prompt.trailing, case.ids.tts_pad]))
        )
        torch.testing.assert_close(trailing[: len(text)], text[: len(trailing)], atol=1e-6, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("language", "instruct"), list(itertools.product([None, "german"], [None, INSTRUCT])))
@pytest.mark.parametrize("is_streaming", [False, True], ids=["whole text", "streaming"])
@pytest.mark.parametrize(
    ("number", "is_in_context"),
    [(0, False), (0, True), (1, True)],
    ids=["vector only", "in context", "in context, more frames than text"],
)
def test_logits_of_clones_equal_stepwise_decoding(
    case: Any,
    language: str | None,
    instruct: str | None,
    is_streaming: bool,
    number: int,
    is_in_context: bool,
    padded: bool,
) -> None:
    """A whole row with a reference of its own, alone and beside one out of context, against KV-cached decoding."""
    vector, context = references(case, is_in_context)[number]
    prompt = cloning_prompt(case, TEXTS[:1], [(vector, context)], language, instruct, is_streaming)
    ours = our_prompt(case, TEXTS[0], language, "its own", instruct, is_streaming, context)
    assert_logits_equal(case, prompt, ours, padded, {"row_vectors": vector.expand(1 + padded, -1)})


def test_a_language_that_trains_stands_in_its_row(case: Any) -> None:
    """The objective reads it from a vector of its own; stock, after the export, from the table."""
    row, config, model = 2200, case.stock.model.config.talker_config, case.stock.model
    vector = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(2))
    ids = replace(case.ids, languages={**case.ids.languages, "hausa": row})
    objective = TrainingObjective(
        model.talker, case.objective.speaker_vectors, language_ids=torch.tensor([row]), language_vectors=vector
    )
    prompt = our_prompt(SimpleNamespace(ids=ids, tokenizer=case.tokenizer), TEXTS[0], "hausa", "anna", None)
    prompt = append_frames(prompt, np.zeros((2, 16)), ids)
    with torch.no_grad():
        got = objective.input_embeddings(collate([prompt], [0]))
        before = model.talker.model.codec_embedding.weight[row].clone()
        model.talker.model.codec_embedding.weight[row] = vector[0]
    config.codec_language_id["hausa"] = row
    model.supported_languages = [*model.supported_languages, "hausa"]
    want = stock_prompt(case, TEXTS[:1], "Hausa", "anna", None)["inputs_embeds"][0]
    torch.testing.assert_close(got[: len(want)], want, atol=1e-6, rtol=0)
    assert not torch.equal(before, vector[0])
    with torch.no_grad():
        model.talker.model.codec_embedding.weight[row] = before
    del config.codec_language_id["hausa"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("language", "speaker", "instruct"), list(itertools.product([None, "german"], ["anna", None], [None, INSTRUCT]))
)
@pytest.mark.parametrize(
    ("text", "is_streaming"),
    [(TEXTS[0], False), (TEXTS[0], True), (TEXTS[1], True)],
    ids=["whole text", "streaming", "streaming, more text than frames"],
)
def test_logits_equal_stepwise_decoding(
    case: Any,
    language: str | None,
    speaker: str | None,
    instruct: str | None,
    padded: bool,
    text: str,
    is_streaming: bool,
) -> None:
    """Teacher-forced logits of a whole row, alone and padded beside longer rows, against KV-cached decoding."""
    prompt = stock_prompt(case, [text], language, speaker, instruct, is_streaming)
    ours = our_prompt(case, text, language, speaker, instruct, is_streaming)
    assert_logits_equal(case, prompt, ours, padded)


def assert_logits_equal(
    case: Any, prompt: dict, ours: AlignedIds, padded: bool, added: dict[str, torch.Tensor] | None = None
) -> None:
    """Stock's logits along some frames, step by step, against ours of the whole row at once.

    Args:
        prompt: what stock hands to its talker.
        padded: a longer row lies beside it.
        added: to the batch.
    """
    codes = torch.randint(0, 2048, (13, 16), generator=torch.Generator().manual_seed(3))
    want_talker, want_sub_talker = stepwise_logits(case.stock, prompt, codes)
    row = append_frames(ours, codes.numpy(), case.ids)
    assert (row.labels != IGNORE).sum() == len(codes) + 1  # a reference's frames are no labels
    others = [append_frames(our_prompt(case, TEXTS[1], None, "anna", None), np.zeros((40, 16)), case.ids)] * padded
    batch = collate([row, *others], [0] * (1 + len(others))) | (added or {})
    with torch.no_grad():
        objective = case.objective
        hidden = objective.hidden_states(batch)
        talker = objective.talker_logits(hidden[batch["label_places"]])[: len(codes) + 1]
        embedded = objective.code_embeddings(batch["codes"])[:, :-1]
        sub_talker = objective.sub_talker_logits(hidden[before_frames(batch)], embedded)
    own = slice(ours.num_reference_frames, ours.num_reference_frames + len(codes))
    torch.testing.assert_close(talker, want_talker, atol=1e-4, rtol=0)
    torch.testing.assert_close(sub_talker[own], want_sub_talker, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------ text tokens

TRICKY_TEXTS = (
    "My iPhone called McDonald.",
    unicodedata.normalize("NFD", "Ẹ káàárọ̀, mo ń kọ́ Yorùbá."),
    "नमस्ते, आप कैसे हैं?",
    "HTTPServer getURL naïveté 12345",
    "  spaces   inside ",
)


@pytest.mark.parametrize("name", ["tiny-random", "tiny-random-large-vocabulary"])
def test_token_ids_equal_those_of_stock_on_our_export(name: str, make_settings: Any, tmp_path: Any) -> None:
    """The ids that we train with against stock's from the export loaded by path."""
    from finetuning.base_model import resolve_base
    from finetuning.checkpoint import export_config, unchanged_files
    from finetuning.speakers import Speakers

    base_folder = embedded_model_folder(name)
    base = resolve_base(make_settings(init_model_path=str(base_folder)))
    export = tmp_path / "export"
    export.mkdir()
    for file in unchanged_files(base):
        (export / file.name).write_bytes(file.read_bytes())
    config = export_config(base, Speakers(["anna"], torch.zeros(1, 64), [3000], [[]]), 4)
    (export / "config.json").write_text(json.dumps(config), encoding="utf-8")

    ours = load_tokenizer(base_folder)
    stock = stock_processor(export)
    turns = [assistant_turn(text) for text in TRICKY_TEXTS]
    assert [ours(turn)["input_ids"] for turn in turns] == [stock(turn)["input_ids"] for turn in turns]


def test_the_swapped_regex_would_be_noticed() -> None:
    """The base itself, loaded by path as stock does, splits these texts differently: the trap is real."""
    folder = embedded_model_folder("tiny-random-large-vocabulary")
    ours, patched = load_tokenizer(folder), stock_processor(folder)
    differs = [ours(text)["input_ids"] != patched(text)["input_ids"] for text in TRICKY_TEXTS]
    assert differs[0] and differs[1]


def stock_processor(folder: Any) -> Any:
    """The tokenizer as Qwen3TTSModel.from_pretrained loads it."""
    from qwen_tts.core.models import Qwen3TTSConfig, Qwen3TTSProcessor
    from transformers import AutoConfig, AutoProcessor

    AutoConfig.register("qwen3_tts", Qwen3TTSConfig, exist_ok=True)
    AutoProcessor.register(Qwen3TTSConfig, Qwen3TTSProcessor, exist_ok=True)
    return AutoProcessor.from_pretrained(str(folder), fix_mistral_regex=True).tokenizer
