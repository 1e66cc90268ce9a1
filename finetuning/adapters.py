"""Adapters (LoRA, through peft): small matrices beside frozen ones, and how they are saved, merged and taken over.

An adapted matrix W of a linear map computes ``W x + (alpha / rank) B A x``; A is (rank, in) and random at first, B is
(out, rank) and zero, so training starts from the base. Stock qwen-tts knows no adapters: a checkpoint holds
``W + scale x (alpha / rank) B A`` in W's place. Beside it, ``adapter/`` holds what was learnt alone:

==============================  =======================================================================================
``adapter_config.json``         peft's, as is the next: ``PeftModel.from_pretrained(model, "best/adapter")`` takes both
``adapter_model.safetensors``   A and B of every adapted matrix, float32
``speakers.safetensors``        (num_speakers, H) float32, the speakers' vectors
``speakers.json``               their names, rows of the codec table (none with EXPORT_TYPE=base) and references
``languages.safetensors``       (num_languages, H) float32, the languages of NEW_LANGUAGES, where there are any
``languages.json``              their names and rows of the codec table
``trained.safetensors``         what else was trained (new layers, embeddings), where anything was
==============================  =======================================================================================

``lora.py`` reads such folders and merges them into a base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from finetuning.disk import library_errors, write_json
from finetuning.errors import UserError
from finetuning.languages import Languages
from finetuning.settings import Settings
from finetuning.speakers import Speakers

#: Words of LORA_TARGETS and the matrices that they stand for.
_LAYER_MATRICES = r"layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
TARGETS = {
    "attention": r"talker\.model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    "mlp": r"talker\.model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    "sub_talker": rf"talker\.code_predictor\.model\.{_LAYER_MATRICES}",
    "all": rf"talker\.(code_predictor\.)?model\.{_LAYER_MATRICES}",
}
#: The folder inside a checkpoint, and its files.
ADAPTER_FOLDER = "adapter"
CONFIG_FILE, MATRICES_FILE = "adapter_config.json", "adapter_model.safetensors"
SPEAKERS_FILE, VECTORS_FILE, OTHERS_FILE = "speakers.json", "speakers.safetensors", "trained.safetensors"
LANGUAGES_FILE, LANGUAGE_VECTORS_FILE = "languages.json", "languages.safetensors"
#: What peft puts before the names in its file.
FILE_PREFIX = "base_model.model."


# --------------------------------------------------------------------------------------------------------- targets


def target_modules(names: Iterable[str], settings: Settings) -> list[str]:
    """The linear maps that LORA_TARGETS names, by their paths in the model.

    Each of its words, separated by commas, is one of ``TARGETS`` or the end of a path at a dot, with or without a
    number behind it ("q_proj", "layers.3.mlp.up_proj", "codec_head", "lm_head").

    Args:
        names: paths of all linear maps of the talker that may be adapted.

    Raises:
        UserError: a word matches nothing; the words that would are listed.
    """
    names = list(names)
    words = settings.lora_words()
    matching = {word: [name for name in names if _matches(name, word)] for word in words}
    if unknown := [word for word in words if not matching[word]]:
        known = sorted({_without_number(name).rpartition(".")[2] for name in names})
        raise UserError(
            f'LORA_TARGETS: "{unknown[0]}" matches nothing. Give {", ".join(TARGETS)}, or names of linear maps: '
            f"{', '.join(known)} (a longer end of a path, as layers.0.mlp.up_proj, narrows it down)"
        )
    return [name for name in names if any(name in found for found in matching.values())]


def _matches(name: str, word: str) -> bool:
    if word in TARGETS:
        return re.fullmatch(TARGETS[word], name) is not None
    return any(f".{one}".endswith(f".{word}") for one in (name, _without_number(name)))


def _without_number(name: str) -> str:
    return re.sub(r"\.\d+$", "", name)


def linear_names(weight_names: Iterable[str], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Paths of the talker's linear maps among the weights of a base, from their names and shapes alone."""
    return [
        name.removesuffix(".weight")
        for name in weight_names
        if name.startswith("talker.")
        and name.endswith(".weight")
        and "embedding" not in name
        and len(shapes[name]) == 2
    ]


# -------------------------------------------------------------------------------------------------------- training


def add_adapters(model: Any, settings: Settings) -> None:
    """Puts adapters on the frozen linear maps that LORA_TARGETS names, in place; they train, in float32.

    Args:
        model: ``Qwen3TTSForConditionalGeneration`` whose ``requires_grad`` and dtypes are final.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = {
        f"talker.{name}": module for name, module in model.talker.named_modules() if isinstance(module, nn.Linear)
    }
    frozen = [name for name, module in linear.items() if not module.weight.requires_grad]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=target_modules(frozen, settings),
    )
    inject_adapter_in_model(config, model)  # which freezes everything else
    parameters = dict(model.named_parameters())
    for name in trained:
        parameters[name].requires_grad_(True)
    for name, parameter in parameters.items():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is a matrix of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def without_adapter(name: str) -> str:
    """The name that a weight has where there are no adapters."""
    return name.replace(".base_layer.", ".")


def merged(tensors: Mapping[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """Weights by the names of a model without adapters; to adapted ones ``factor x B A`` is added, in float32.

    Args:
        tensors: a model's with adapters, on the CPU; each weight keeps its dtype.
        factor: ``scale x alpha / rank``.
    """
    weights = {without_adapter(name): tensor for name, tensor in tensors.items() if not is_adapter(name)}
    for path, (first, second) in pairs(tensors).items():
        weight = weights[f"{path}.weight"]
        weights[f"{path}.weight"] = add_product(weight, first, second, factor).to(weight.dtype)
    return weights


def pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Path of each adapted linear map -> (A, B), from the tensors of a model with adapters."""
    return {
        name.partition(".lora_A.")[0]: (tensor, tensors[name.replace(".lora_A.", ".lora_B.")])
        for name, tensor in tensors.items()
        if ".lora_A." in name
    }


def add_product(weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor, factor: float) -> torch.Tensor:
    """``weight + factor x second @ first`` in float32."""
    return weight.float() + factor * (second.float() @ first.float())


# ---------------------------------------------------------------------------------------------------------- saving


@dataclass(frozen=True)
class Learnt:
    """What a run has learnt so far.

    Attributes:
        tensors: a model's with adapters, on the CPU, by their names.
        trained: names of all that trains of it.
    """

    base_name: str
    speakers: Speakers
    languages: Languages | None
    tensors: Mapping[str, torch.Tensor]
    trained: Sequence[str]


def save_adapter(folder: Path, settings: Settings, learnt: Learnt) -> None:
    """Writes ``adapter/``; see the module's table.

    Args:
        folder: to be made.

    Raises:
        OSError: the disk refused.
    """
    folder.mkdir()
    tensors, speakers, languages = learnt.tensors, learnt.speakers, learnt.languages
    adapted = pairs(tensors)
    matrices = {}
    for path, (first, second) in adapted.items():
        matrices[f"{FILE_PREFIX}{path}.lora_A.weight"] = first.float().contiguous()
        matrices[f"{FILE_PREFIX}{path}.lora_B.weight"] = second.float().contiguous()
    others = {without_adapter(name): tensors[name].contiguous() for name in learnt.trained if not is_adapter(name)}
    with library_errors():
        save_file(matrices, folder / MATRICES_FILE, metadata={"format": "pt"})
        save_file({"vectors": speakers.vectors.contiguous()}, folder / VECTORS_FILE)
        if languages is not None:
            save_file({"vectors": languages.vectors.contiguous()}, folder / LANGUAGE_VECTORS_FILE)
            write_json(folder / LANGUAGES_FILE, dict(languages.rows))
        if others:
            save_file(others, folder / OTHERS_FILE)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": learnt.base_name,
        "r": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": sorted(adapted),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    write_json(folder / CONFIG_FILE, config)
    entries = zip(speakers.names, speakers.codec_rows, speakers.references, strict=True)
    listed = [{"name": name, "codec_id": row, "references": list(files)} for name, row, files in entries]
    write_json(folder / SPEAKERS_FILE, listed)
