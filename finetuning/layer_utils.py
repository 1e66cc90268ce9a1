"""Replaced and added talker layers, freezing, and the table that shows what trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from finetuning.console import say
from finetuning.errors import UserError

#: Attribute of a talker layer that this project made; the summary and the freezing read it.
NEW_LAYER_FLAG = "is_new_layer"


def replace_and_add_layers(
    model: Any,
    replace_last_n: int = 2,
    add_new_layers: int = 4,
    freeze_original_layers: bool = True,
    verbose: bool = True,
    layer_init: str = "preserve",
    train_text_embedding: bool = False,
    train_codec_embedding: bool = False,
    with_adapters: bool = False,
) -> Any:
    """Replaces the talker's last N layers, adds M on top, and sets what trains; returns the same model.

    Args:
        model: ``Qwen3TTSForConditionalGeneration``; changed in place, its configuration too.
        freeze_original_layers: see ``set_trainable``.
        verbose: print the summary.
        layer_init: "preserve" (the model computes what it did before: replaced layers keep the weights that they
            replace, added layers have Xavier weights and zero output projections), "copy" (each of them has the weights
            of the layer before it in the stack; the lowest layer, before which there is none, keeps its own) or
            "xavier" (all of them Xavier).
        train_text_embedding, train_codec_embedding, with_adapters: see ``set_trainable``.

    Raises:
        UserError: more layers to replace than there are.
    """
    layers = model.talker.model.layers
    check_layer_count(replace_last_n, len(layers))
    for index in range(len(layers) - replace_last_n, len(layers)):
        like = layers[max(index - 1, 0)] if layer_init == "copy" else layers[index]
        layers[index] = _new_layer(model, index, like=like, layer_init=layer_init, replaces=True)
    for _ in range(add_new_layers):
        layers.append(_new_layer(model, len(layers), like=layers[-1], layer_init=layer_init, replaces=False))
    model.talker.config.num_hidden_layers = len(layers)
    model.talker.model.config.num_hidden_layers = len(layers)
    set_trainable(model, freeze_original_layers, train_text_embedding, train_codec_embedding, with_adapters)
    if verbose:
        print_model_summary(model)
    return model


def check_layer_count(replace_last_n: int, num_layers: int) -> None:
    """Raises UserError when there are fewer layers than are to be replaced."""
    if not 0 <= replace_last_n <= num_layers:
        raise UserError(f"REPLACE_LAST_N_LAYERS: {replace_last_n} is more than the base's {num_layers} talker layers")


def _new_layer(model: Any, index: int, like: nn.Module, layer_init: str, replaces: bool) -> nn.Module:
    """An fp32 layer (it trains) of the same class, device and mode as ``like``, for place ``index`` of the stack.

    Args:
        like: whose weights it has where it is to have another's.
    """
    with like.mlp.down_proj.weight.device:
        layer = type(like)(model.talker.model.config, layer_idx=index).train(like.training)
    initialize_decoder_layer(layer)
    if layer_init == "copy" or (layer_init == "preserve" and replaces):
        layer.load_state_dict(like.state_dict())
    elif layer_init == "preserve":
        # Both branches add to the residual stream; with zero outputs the layer is the identity.
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    setattr(layer, NEW_LAYER_FLAG, True)
    return layer


def initialize_decoder_layer(layer: nn.Module) -> None:
    """Xavier-uniform matrices, zero biases, unit norms."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif "Norm" in type(module).__name__:
            nn.init.ones_(module.weight)


def set_trainable(
    model: Any,
    freeze_original_layers: bool,
    train_text_embedding: bool = False,
    train_codec_embedding: bool = False,
    with_adapters: bool = False,
) -> None:
    """Sets ``requires_grad`` of every parameter.

    Not frozen: everything but the text embedding table and the speaker encoder. Frozen: the new layers, the final norm,
    ``codec_head``, and the sub-talker's layers, norm, heads and ``small_to_mtp_projection``. Then all embeddings and
    ``text_projection`` are frozen too, so nothing below the first new layer needs a gradient.

    Args:
        train_text_embedding: the text embedding table as well, in either case.
        train_codec_embedding: the talker's and the sub-talker's codec tables as well.
        with_adapters: adapters are put on what is frozen later; so the sub-talker is, and without new layers all is.
    """
    talker, predictor = model.talker, model.talker.code_predictor
    model.requires_grad_(False)
    if not freeze_original_layers:
        talker.requires_grad_(True)
        talker.model.text_embedding.requires_grad_(train_text_embedding)
        return
    new_layers = [layer for layer in talker.model.layers if is_new_layer(layer)]
    talker.model.text_embedding.requires_grad_(train_text_embedding)
    for tables in (talker.model.codec_embedding, predictor.model.codec_embedding):
        tables.requires_grad_(train_codec_embedding)
    if with_adapters:
        for module in (*new_layers, talker.model.norm, talker.codec_head) if new_layers else ():
            module.requires_grad_(True)
        return
    sub_talker = [predictor.model.layers, predictor.model.norm, predictor.lm_head, predictor.small_to_mtp_projection]
    for module in (*new_layers, talker.model.norm, talker.codec_head, *sub_talker):
        module.requires_grad_(True)


def is_new_layer(layer: nn.Module) -> bool:
    """Whether this project made the layer."""
    return getattr(layer, NEW_LAYER_FLAG, False)


def print_model_summary(model: Any) -> None:
    """Prints every talker layer as kept, frozen or new, the widths, and the trainable share of each part."""
    say(model_summary(model))


def model_summary(model: Any) -> str:
    """The text of ``print_model_summary``."""
    config = model.talker.config
    lines = [
        f"Talker: {len(model.talker.model.layers)} layers, hidden {config.hidden_size}, "
        f"intermediate {config.intermediate_size}, {config.num_attention_heads} heads "
        f"({config.num_key_value_heads} key/value)",
        "  layer  state    parameters   trainable",
    ]
    for index, layer in enumerate(model.talker.model.layers):
        trainable, total = _count(layer)
        state = "new" if is_new_layer(layer) else "kept" if trainable else "frozen"
        lines.append(f"  {index:>5}  {state:<7} {total:>11,} {trainable:>11,}")
    lines.append("  part                      parameters   trainable")
    for name, module in _parts(model).items():
        trainable, total = _count(module)
        lines.append(f"  {name:<23} {total:>12,} {trainable:>11,}")
    trainable, total = _count(model)
    frozen = total - trainable
    lines.append(
        f"  trainable {trainable:,} of {total:,} ({trainable / total:.1%}), frozen {frozen:,} ({frozen / total:.1%})"
    )
    return "\n".join(lines)


def _parts(model: Any) -> dict[str, nn.Module]:
    talker = model.talker
    parts = {
        "talker layers": talker.model.layers,
        "final norm": talker.model.norm,
        "codec_head": talker.codec_head,
        "codec_embedding": talker.model.codec_embedding,
        "text_embedding": talker.model.text_embedding,
        "text_projection": talker.text_projection,
        "sub-talker": talker.code_predictor,
    }
    return parts | ({"speaker_encoder": model.speaker_encoder} if model.speaker_encoder is not None else {})


def _count(module: nn.Module) -> tuple[int, int]:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def embeddings_of(module: nn.Module) -> set[nn.Parameter]:
    """Tables, and what the module holds itself: the objective's vectors of speakers and languages."""
    tables = {part.weight for part in module.modules() if isinstance(part, nn.Embedding)}
    return tables | set(module.parameters(recurse=False))


def optimizer_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; embeddings, norms and biases do not."""
    embeddings = embeddings_of(module)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decays = [p for p in trainable if p.ndim >= 2 and p not in embeddings]
    stays = [p for p in trainable if p.ndim < 2 or p in embeddings]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": stays, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
