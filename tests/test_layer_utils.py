"""Replaced and added layers: what they are made of, what trains, and that `preserve` changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import SHAPES

from finetuning.errors import UserError
from finetuning.layer_utils import (
    initialize_decoder_layer,
    model_summary,
    optimizer_groups,
    print_model_summary,
    replace_and_add_layers,
)
from finetuning.tiny_model import SHAPES as WIDTHS


@pytest.fixture(scope="module", params=SHAPES)
def base(request: pytest.FixtureRequest) -> Any:
    from finetuning.base_model import resolve_base
    from finetuning.settings import load_settings

    return resolve_base(load_settings({"init_model_path": request.param}, environment={}))


@pytest.fixture
def model(base: Any) -> Any:
    from finetuning.base_model import load_model

    return load_model(base, "sdpa").eval()


def talker_logits(model: Any) -> torch.Tensor:
    width = model.config.talker_config.hidden_size
    inputs = torch.randn(2, 30, width, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    with torch.no_grad():
        return model.talker(inputs_embeds=inputs, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize("replace", range(5))
@pytest.mark.parametrize("add", range(5))
def test_preserve_computes_what_the_base_did(model: Any, replace: int, add: int) -> None:
    want = talker_logits(model)
    replace_and_add_layers(model, replace, add, verbose=False)
    assert len(model.talker.model.layers) == 4 + add
    torch.testing.assert_close(talker_logits(model), want, atol=1e-6, rtol=0)


def test_preserved_layers_are_new_objects_with_the_old_weights(model: Any) -> None:
    old = model.talker.model.layers[3]
    replace_and_add_layers(model, 1, 0, verbose=False)
    new = model.talker.model.layers[3]
    assert new is not old
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), old.parameters(), strict=True))


def test_xavier_starts_all_new_layers_from_random_weights(model: Any) -> None:
    want = talker_logits(model)
    old = copy.deepcopy(model.talker.model.layers[3])
    replace_and_add_layers(model, 1, 1, verbose=False, layer_init="xavier")
    assert not torch.equal(model.talker.model.layers[3].mlp.up_proj.weight, old.mlp.up_proj.weight)
    added = model.talker.model.layers[4]
    assert added.self_attn.o_proj.weight.abs().max() > 0
    assert not torch.allclose(talker_logits(model), want, atol=1e-2)


@pytest.mark.parametrize("replace, add", [(0, 2), (2, 0), (2, 3), (4, 1)])
def test_copy_starts_each_new_layer_as_the_layer_before_it(model: Any, replace: int, add: int) -> None:
    """In the stack as it then is; the lowest layer has none before it."""
    kept = copy.deepcopy(model.talker.model.layers[: 4 - replace] or model.talker.model.layers[:1])
    replace_and_add_layers(model, replace, add, verbose=False, layer_init="copy")
    layers = model.talker.model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(4 + add))
    for index, layer in enumerate(layers):
        weights, wanted = layer.state_dict(), kept[min(index, len(kept) - 1)].state_dict()
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in wanted.items()), index
    places = [parameter.data_ptr() for parameter in layers.parameters()]
    assert len(set(places)) == len(places), "each has weights of its own"


def test_initialisation_is_xavier_with_unit_norms_and_zero_biases(model: Any) -> None:
    config = copy.deepcopy(model.talker.config)
    config.attention_bias = True
    layer = type(model.talker.model.layers[0])(config, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    initialize_decoder_layer(layer)
    bound = (6 / sum(layer.mlp.up_proj.weight.shape)) ** 0.5  # Glorot and Bengio 2010, uniform
    assert 0.9 * bound < layer.mlp.up_proj.weight.abs().max() <= bound
    assert layer.self_attn.q_proj.bias.abs().max() == 0
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn.q_norm, layer.self_attn.k_norm):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))


def test_indices_dtype_and_configuration(model: Any) -> None:
    model.to(torch.bfloat16)
    old = [layer.state_dict() for layer in model.talker.model.layers[2:]]
    returned = replace_and_add_layers(model, 2, 3, verbose=False)
    assert returned is model
    layers = model.talker.model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(7))
    assert {parameter.dtype for parameter in layers[:2].parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in layers[2:].parameters()} == {torch.float32}
    for layer, weights in zip(layers[2:4], old, strict=True):
        assert all(torch.equal(tensor, weights[name].float()) for name, tensor in layer.state_dict().items())
    assert model.config.talker_config.num_hidden_layers == 7
    assert model.talker.model.config.num_hidden_layers == 7


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_trains_with_frozen_layers(model: Any) -> None:
    replace_and_add_layers(model, 1, 2, freeze_original_layers=True, verbose=False)
    allowed = (
        "talker.model.layers.3.", "talker.model.layers.4.", "talker.model.layers.5.", "talker.model.norm.",
        "talker.codec_head.", "talker.code_predictor.model.layers.", "talker.code_predictor.model.norm.",
        "talker.code_predictor.lm_head.", "talker.code_predictor.small_to_mtp_projection.",
    )  # fmt: skip
    every = {name for name, _ in model.named_parameters()}
    assert trained(model) == {name for name in every if name.startswith(allowed)}


def test_what_trains_in_full(model: Any) -> None:
    replace_and_add_layers(model, 0, 0, freeze_original_layers=False, verbose=False)
    every = {name for name, _ in model.named_parameters()}
    frozen = {name for name in every if name.startswith(("speaker_encoder.", "talker.model.text_embedding."))}
    assert trained(model) == every - frozen


def test_too_many_layers_to_replace(model: Any) -> None:
    with pytest.raises(UserError, match=r"REPLACE_LAST_N_LAYERS: 5 .* 4 talker layers"):
        replace_and_add_layers(model, 5, 0, verbose=False)
    assert len(model.talker.model.layers) == 4


def test_summary_names_states_and_counts(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    replace_and_add_layers(model, 1, 1, verbose=True)
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    states = {line[0]: line[1] for line in lines if len(line) == 4 and line[0].isdigit()}
    assert states == {"0": "frozen", "1": "frozen", "2": "frozen", "3": "new", "4": "new"}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert f"trainable {trainable:,} of {total:,} ({trainable / total:.1%})" in shown
    width = model.config.talker_config.hidden_size
    assert width in {shape.talker_width for shape in WIDTHS.values()}
    assert f"hidden {width}, intermediate {3 * width}, 4 heads" in shown
    print_model_summary(model)
    assert capsys.readouterr().out.strip() == model_summary(model).strip()


def test_no_weight_decay_on_embeddings_norms_and_biases(model: Any) -> None:
    replace_and_add_layers(model, 0, 0, freeze_original_layers=False, verbose=False)
    decays, stays = optimizer_groups(model, 0.1)
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in decays["params"]}
    kept = {names[id(parameter)] for parameter in stays["params"]}
    assert decayed | kept == trained(model)
    assert all("embedding" in name or "norm" in name or name.endswith("bias") for name in kept)
    assert not any("embedding" in name or "norm" in name or name.endswith("bias") for name in decayed)
