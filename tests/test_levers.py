"""Every lever of speed and memory against the plain path: the same losses and the same gradients."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference import load_stock
from torch.nn import functional as F

from finetuning import objective as objective_module
from finetuning.attention import PREFIX
from finetuning.base_model import load_tokenizer
from finetuning.dataset import FrameShare, collate, count_tokens, split_batch
from finetuning.layer_utils import replace_and_add_layers
from finetuning.objective import TrainingObjective, compile_layers, step_loss
from finetuning.prompt import IGNORE, NO_CODEC, LayoutIds, append_frames, assistant_turn, build_prompt
from finetuning.tiny_model import embedded_model_folder

#: (text, number of frames), of very different lengths.
ROWS = [("Yes.", 4), ("A sentence of middling length.", 21), ("Hm?", 2), ("This is the longest of them all.", 40)]
WEIGHT = 0.3
#: As many as ``compile_layers`` promises.
MAX_GRAPHS = 12


def make_rows(folder: Path) -> list[Any]:
    ids = LayoutIds.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    tokenizer, generator = load_tokenizer(folder), np.random.default_rng(0)
    prompts = [build_prompt(np.asarray(tokenizer(assistant_turn(text))["input_ids"]), ids) for text, _ in ROWS]
    codes = [generator.integers(0, 2048, (frames, 16)) for _, frames in ROWS]
    return [append_frames(prompt, code, ids) for prompt, code in zip(prompts, codes, strict=True)]


@pytest.fixture(scope="module", params=["full", "layers"])
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A model whose weights all, or new layers only, train; what the plain path gives for all rows in one batch."""
    folder = embedded_model_folder("tiny-random")
    model = load_stock(folder).model
    torch.manual_seed(0)
    numbers = (0, 0, False) if request.param == "full" else (1, 1, True)
    replace_and_add_layers(model, *numbers, verbose=False, layer_init="xavier")
    vectors = torch.randn(2, model.config.talker_config.hidden_size)
    rows, speakers = make_rows(folder), [0, 1, 0, 1]
    batch = collate(rows, speakers, range(1, 5))
    plain = plain_sums(model.talker, vectors, batch)
    gradients = gradients_of(model.talker, plain, batch)
    return SimpleNamespace(
        recipe=request.param, talker=model.talker, vectors=vectors, rows=rows, speakers=speakers, batch=batch,
        plain={name: value.detach() for name, value in plain.items()}, gradients=gradients,
    )  # fmt: skip


def plain_sums(talker: Any, vectors: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
    """Padded through the stock talker, every table looked up by itself, all logits at once, in plain autograd."""
    model, predictor, mask = talker.model, talker.code_predictor, batch["frame_mask"]
    codec_ids, codes = batch["codec_ids"], batch["codes"]
    embeddings = talker.text_projection(model.text_embedding(batch["text_ids"]))
    embeddings = embeddings + model.codec_embedding(codec_ids.clamp(min=0)) * (codec_ids != NO_CODEC)[..., None]
    speakers = (torch.arange(len(codec_ids)), batch["speaker_positions"])
    embeddings = embeddings.index_put(speakers, vectors[batch["speaker_index"]], accumulate=True)
    others = sum(table(codes[:, index]) for index, table in enumerate(predictor.model.codec_embedding, 1))
    embeddings = embeddings.index_put(mask.nonzero(as_tuple=True), others, accumulate=True)
    hidden = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).last_hidden_state
    talker_loss = F.cross_entropy(
        talker.codec_head(hidden).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    tables = [model.codec_embedding, *predictor.model.codec_embedding[:-1]]
    inputs = [hidden[mask.roll(-1, 1)], *(table(codes[:, index]) for index, table in enumerate(tables))]
    outputs = predictor.model(inputs_embeds=predictor.small_to_mtp_projection(torch.stack(inputs, 1)), use_cache=False)
    logits = [head(outputs.last_hidden_state[:, index]) for index, head in enumerate(predictor.lm_head, 1)]
    frame_losses = sum(
        F.cross_entropy(logit, codes[:, index], reduction="none") for index, logit in enumerate(logits, 1)
    )
    return {"talker_loss": talker_loss, "sub_talker_loss": frame_losses.sum()}


def gradients_of(talker: Any, sums: dict[str, torch.Tensor], *batches: Any) -> dict[str, torch.Tensor]:
    talker.zero_grad()
    step_loss(sums, *count_tokens(batches), WEIGHT).backward()
    return {name: parameter.grad.clone() for name, parameter in talker.named_parameters() if parameter.grad is not None}


def check_equal(case: Any, sums: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
    for name, want in case.plain.items():
        torch.testing.assert_close(sums[name].detach(), want, rtol=1e-5, atol=0)
    trained = {name for name, parameter in case.talker.named_parameters() if parameter.requires_grad}
    assert set(gradients) == set(case.gradients) == trained
    for name, want in case.gradients.items():
        difference = (gradients[name] - want).norm() / want.norm().clamp(min=1e-12)
        assert difference < 1e-5, f"{name}: {difference}"


def test_the_objective_equals_the_plain_path(case: Any) -> None:
    """Packed rows, one lookup, chunked heads, gradients taken early: all at once."""
    objective = TrainingObjective(case.talker, case.vectors)
    sums = objective(case.batch)
    check_equal(case, sums, gradients_of(case.talker, sums, case.batch))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointed"])
@pytest.mark.parametrize("early", [False, True], ids=["gradients at the end", "gradients early"])
def test_any_chunks_give_the_same(case: Any, checkpointing: bool, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of odd sizes, by either way of taking their gradients, with and without checkpointing."""
    monkeypatch.setattr(objective_module, "TALKER_CHUNK_POSITIONS", 13)
    monkeypatch.setattr(objective_module, "SUB_TALKER_CHUNK_FRAMES", 9)
    monkeypatch.setattr(objective_module._Sums, "_takes_gradients_early", lambda self: early)
    objective = TrainingObjective(case.talker, case.vectors, gradient_checkpointing=checkpointing)
    sums = objective(case.batch)
    check_equal(case, sums, gradients_of(case.talker, sums, case.batch))


@pytest.mark.parametrize("case", ["full"], indirect=True)
@pytest.mark.parametrize(("dtype", "early"), [(torch.bfloat16, True), (torch.float16, False)])
def test_gradients_wait_for_the_scale_of_fp16(case: Any, dtype: torch.dtype, early: bool) -> None:
    """Taken early they would lack it, and be lost below what fp16 can tell from 0."""
    objective, called = TrainingObjective(case.talker, case.vectors), []
    objective.talker.codec_head.register_full_backward_hook(lambda *_: called.append(True))
    try:
        with torch.autocast("cpu", dtype):
            objective(case.batch)
    finally:
        objective.talker.codec_head._backward_hooks.clear()
    assert bool(called) == early


@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_eval_counts_do_not_depend_on_the_chunks(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = TrainingObjective(case.talker, case.vectors).eval()
    with torch.no_grad():
        at_once = objective(case.batch)
        monkeypatch.setattr(objective_module, "TALKER_CHUNK_POSITIONS", 7)
        monkeypatch.setattr(objective_module, "SUB_TALKER_CHUNK_FRAMES", 5)
        in_chunks = objective(case.batch)
    objective.train()
    for name in ("talker_correct", "sub_talker_correct"):
        assert torch.equal(at_once[name], in_chunks[name])
    torch.testing.assert_close(at_once["sub_talker_loss"], in_chunks["sub_talker_loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_no_row_sees_another(case: Any) -> None:
    """Other neighbours in the batch leave a row's hidden states as they are."""
    objective = TrainingObjective(case.talker, case.vectors)
    with torch.no_grad():
        alone = objective.hidden_states(collate(case.rows[1:2], [1]))
        first = objective.hidden_states(collate(case.rows[:2], [0, 1]))[-len(alone) :]
        last = objective.hidden_states(collate([case.rows[1], case.rows[3]], [1, 0]))[: len(alone)]
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, alone, rtol=1e-5, atol=1e-5)


@pytest.fixture
def eager(case: Any) -> Iterator[None]:
    config = case.talker.model.layers[0].self_attn.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    yield
    config._attn_implementation = before


@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_eager_attention_is_packed_too(case: Any, eager: None) -> None:
    objective = TrainingObjective(case.talker, case.vectors)
    assert case.talker.model.layers[0].self_attn.config._attn_implementation == f"{PREFIX}eager"
    sums = objective(case.batch)
    check_equal(case, sums, gradients_of(case.talker, sums, case.batch))


def test_keys_are_repeated_where_no_kernel_shares_them(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU in fp32."""
    monkeypatch.setattr("finetuning.attention.has_kernel_for_shared_keys", lambda query: False)
    objective = TrainingObjective(case.talker, case.vectors)
    sums = objective(case.batch)
    check_equal(case, sums, gradients_of(case.talker, sums, case.batch))


@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_parts_of_a_batch_add_up(case: Any) -> None:
    objective = TrainingObjective(case.talker, case.vectors)
    sums = [objective(part) for part in split_batch(case.batch, 3)]
    total = {name: sum(part[name] for part in sums) for name in case.plain}
    check_equal(case, total, gradients_of(case.talker, total, case.batch))


# ---------------------------------------------------------------------------------------------- layers that are kept


def count_calls(layers: Any) -> list[int]:
    """Counts forwards of each layer from here on."""
    counts = [0] * len(layers)

    def hook(index: int) -> Any:
        def count(*_: Any) -> None:
            counts[index] += 1

        return count

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(hook(index))
    return counts


def test_checkpointing_computes_the_trained_layers_again_and_no_other(case: Any) -> None:
    layers = case.talker.model.layers
    objective = TrainingObjective(case.talker, case.vectors, gradient_checkpointing=True)
    counts = count_calls(layers)
    try:
        gradients_of(case.talker, objective(case.batch), case.batch)
    finally:
        for layer in layers:
            layer._forward_pre_hooks.clear()
    assert counts == [1] * objective.num_frozen_layers() + [2] * (len(layers) - objective.num_frozen_layers())


def saved_bytes(objective: TrainingObjective, batch: Any) -> int:
    """Of all that the forward pass keeps for the backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Kept:
        kept.add(one := Kept(tensor))
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
        loss = step_loss(objective(batch), *count_tokens([batch]), WEIGHT)
    storages = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage().nbytes() for one in kept}
    assert loss.requires_grad  # so the graph, with all that it keeps, is still there
    return sum(num_bytes for pointer, num_bytes in storages.items() if pointer not in weights)


class Kept:
    """A saved tensor, for as long as the graph wants it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_checkpointing_keeps_less(case: Any) -> None:
    everything = saved_bytes(TrainingObjective(case.talker, case.vectors), case.batch)
    little = saved_bytes(TrainingObjective(case.talker, case.vectors, gradient_checkpointing=True), case.batch)
    assert little < 0.7 * everything


def test_frozen_layers_build_no_graph(case: Any) -> None:
    objective = TrainingObjective(case.talker, case.vectors)
    num_frozen = objective.num_frozen_layers()
    assert num_frozen == {"full": 0, "layers": 3}[case.recipe]
    prefix = objective._prefix(case.batch, None)
    assert prefix.requires_grad == (case.recipe == "full")


@pytest.mark.parametrize("case", ["layers"], indirect=True)
def test_training_starts_from_a_kept_prefix_as_well(case: Any) -> None:
    objective = TrainingObjective(case.talker, case.vectors)
    counts = count_calls(case.talker.model.layers)
    batch = case.batch | {"prefix": objective.prefix(case.batch)}
    counts[:] = [0] * len(counts)
    try:
        sums = objective(batch)
    finally:
        for layer in case.talker.model.layers:
            layer._forward_pre_hooks.clear()
    assert counts[: objective.num_frozen_layers()] == [0] * objective.num_frozen_layers()
    check_equal(case, sums, gradients_of(case.talker, sums, case.batch))


# ------------------------------------------------------------------------------------------------- compiled layers


@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_compiled_layers_give_the_same_and_are_compiled_a_few_times(case: Any) -> None:
    """Traced and differentiated as for a GPU, but run operation by operation: this machine may lack a compiler."""
    from torch._dynamo.utils import counters

    counters.clear()
    objective = TrainingObjective(case.talker, case.vectors)
    layers = [*case.talker.model.layers, *case.talker.code_predictor.model.layers]
    torch.compiler.reset()
    try:
        compile_layers(objective, backend="aot_eager")
        sums = objective(case.batch)
        check_equal(case, sums, gradients_of(case.talker, sums, case.batch))
        num_graphs = counters["stats"]["unique_graphs"]
        for rows in ([0, 1, 2], [1, 2], [2, 0, 1]):  # fewer, and shorter ones: no reason to compile again
            other = collate([case.rows[row] for row in rows], [case.speakers[row] for row in rows])
            gradients_of(case.talker, objective(other), other)
        assert 0 < num_graphs == counters["stats"]["unique_graphs"]
        with torch.no_grad():
            objective.eval()(case.batch)
        objective.train()
        assert counters["stats"]["unique_graphs"] <= MAX_GRAPHS
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        torch.compiler.reset()


# --------------------------------------------------------------------------------------------- a share of the frames


def with_share(case: Any, fraction: float, epoch: int) -> Any:
    frames = [len(row.codes) for row in case.rows]
    return case.batch | FrameShare(fraction, seed=7, epoch=epoch).choose(range(1, 5), frames)


@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_all_frames_as_a_share_are_all_frames(case: Any) -> None:
    objective = TrainingObjective(case.talker, case.vectors)
    sums = objective(with_share(case, 1.0, epoch=0))
    check_equal(case, sums, gradients_of(case.talker, sums, case.batch))


@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_every_frame_is_as_likely_and_stands_for_its_share(case: Any) -> None:
    """Over many epochs each frame's expected weight is 1; the loss is linear in the weights, so it is unbiased."""
    num_epochs, num_frames = 4000, len(case.batch["codes"])
    total = torch.zeros(num_frames)
    for epoch in range(num_epochs):
        chosen = with_share(case, 0.25, epoch)
        total.index_add_(0, chosen["sub_talker_frames"], chosen["sub_talker_weights"])
    # The variance of a frame's weight is T / k - 1, at most 4 here: 5 standard errors of the mean.
    assert (total / num_epochs - 1).abs().max() < 5 * 2 / num_epochs**0.5


@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_the_weighted_losses_are_those_of_the_chosen_frames(case: Any) -> None:
    """Against the loss of every frame by itself."""
    objective = TrainingObjective(case.talker, case.vectors)
    with torch.no_grad():
        of_frame = [
            objective(case.batch | {"sub_talker_frames": torch.tensor([index]), "sub_talker_weights": torch.ones(1)})
            for index in range(len(case.batch["codes"]))
        ]
        losses = torch.stack([sums["sub_talker_loss"] for sums in of_frame])
        torch.testing.assert_close(losses.sum(), case.plain["sub_talker_loss"], rtol=1e-5, atol=0)
        for epoch in range(3):
            batch = with_share(case, 0.3, epoch)
            want = (losses[batch["sub_talker_frames"]] * batch["sub_talker_weights"]).sum()
            torch.testing.assert_close(objective(batch)["sub_talker_loss"], want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", ["full"], indirect=True)
def test_a_share_is_drawn_for_each_row_by_itself(case: Any) -> None:
    """Neither neighbours nor the cutting of a batch change it; another epoch does."""
    frames = [len(row.codes) for row in case.rows]
    together = FrameShare(0.5, 7, 0).choose([1, 2], frames[:2])["sub_talker_frames"]
    alone = FrameShare(0.5, 7, 0).choose([2], frames[1:2])["sub_talker_frames"]
    assert torch.equal(together[together >= frames[0]] - frames[0], alone)
    assert not torch.equal(alone, FrameShare(0.5, 7, 1).choose([2], frames[1:2])["sub_talker_frames"])
    objective = TrainingObjective(case.talker, case.vectors)
    batch = with_share(case, 0.5, epoch=0)
    with torch.no_grad():
        parts = sum(objective(part)["sub_talker_loss"] for part in split_batch(batch, 4))
        torch.testing.assert_close(objective(batch)["sub_talker_loss"], parts, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------- nobody is asked


def test_a_step_asks_the_device_for_nothing(case: Any) -> None:
    """No operation of forward and backward gives the host a value, or a shape that depends on values."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(function)
            by_mask = "index" in name and any(
                isinstance(index, torch.Tensor) and index.dtype == torch.bool
                for value in args[1:2] if isinstance(value, (list, tuple)) for index in value
            )  # fmt: skip
            if by_mask or any(word in name for word in ("_local_scalar", "nonzero", "masked_select", "unique")):
                self.asked.append(name)
            return function(*args, **(kwargs or {}))

    objective = TrainingObjective(case.talker, case.vectors)
    counts = count_tokens([case.batch])
    with Recorder() as recorder:
        step_loss(objective(case.batch), *counts, WEIGHT).backward()
    assert recorder.asked == []
