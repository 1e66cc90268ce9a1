"""How many operations a recipe needs, and how many this device could do: together the model FLOPs utilisation.

Counted is what the mathematics needs, not what a program does: padding, a repeated forward pass (checkpointing), frozen
layers that are computed again although they could be kept, and weights that nobody asked to train count nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from finetuning.codec import NUM_CODEBOOKS
from finetuning.prompt import AlignedIds

#: Dense bf16 matrix products (sums in fp32) in 10^12 operations a second, from the makers' data sheets; the first name
#: whose words stand in the device's decides.
PEAK_TFLOPS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A10G": 70,
    "L40S": 362, "L4": 121, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71, "A6000": 155,
}  # fmt: skip
#: Side of the matrices, and repetitions, by which an unknown device is measured.
MATRIX_SIZE, MATRIX_ROUNDS = 1536, 8


def epoch_flops(talker: Any, rows: Sequence[AlignedIds], frame_fraction: float = 1.0, is_cached: bool = False) -> float:
    """Floating-point operations of one pass over the rows, as the talker's ``requires_grad`` says what trains.

    A matrix of W weights that M positions go through costs 2 x W x M forward, the same for the gradient of its input
    (where something below it trains), and the same for its own gradient (where it trains). Causal attention over a row
    of L positions costs 2 x L^2 x heads x head_dim a layer forward, twice that backward. The talker's matrices see
    every position of a row, ``codec_head`` the labels, the sub-talker's layers 16 positions a frame, and each of its 15
    heads one.

    Args:
        frame_fraction: share of the frames that the sub-talker trains on.
        is_cached: what the frozen layers below the first trainable weight compute is there already.
    """
    lengths = [len(row.text) for row in rows]
    num_frames = sum(len(row.codes) for row in rows)
    num_sub_talker_frames = frame_fraction * num_frames
    is_below_trained = any(parameter.requires_grad for parameter in _inputs_of(talker))
    total = 0.0
    if is_below_trained or not is_cached:
        total += _matrices([talker.text_projection], sum(lengths), is_below_trained)
    for layer in talker.model.layers:
        needs_gradient = is_below_trained or _trains(layer)
        if needs_gradient or not is_cached:
            attention = sum(_attention(layer, length) for length in lengths) * (3 if needs_gradient else 1)
            total += attention + _matrices([layer], sum(lengths), is_below_trained)
        is_below_trained = needs_gradient
    total += _matrices([talker.codec_head], num_frames + len(rows), is_below_trained)
    predictor = talker.code_predictor
    is_below_trained = is_below_trained or any(map(_trains, (predictor.model.codec_embedding, talker.model)))
    layers = predictor.model.layers
    positions = NUM_CODEBOOKS * num_sub_talker_frames
    total += _matrices([predictor.small_to_mtp_projection, *layers], positions, is_below_trained)
    total += 3 * num_sub_talker_frames * sum(_attention(layer, NUM_CODEBOOKS) for layer in layers)
    return total + _matrices(predictor.lm_head, num_sub_talker_frames, is_below_trained)


def repeated_flops(layers: Iterable[nn.Module], rows: Sequence[AlignedIds]) -> float:
    """What checkpointing adds: another forward pass of these talker layers."""
    lengths = [len(row.text) for row in rows]
    return sum(
        sum(_attention(layer, length) for length in lengths)
        + 2.0 * sum(lengths) * sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)
        for layer in layers
    )


def _inputs_of(talker: Any) -> Iterable[nn.Parameter]:
    """Everything that trains below the first layer."""
    tables = (talker.model.text_embedding, talker.model.codec_embedding, talker.code_predictor.model.codec_embedding)
    for module in (*tables, talker.text_projection):
        yield from module.parameters()


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _matrices(modules: Iterable[nn.Module], num_positions: float, is_below_trained: bool) -> float:
    """The matrix products of some modules that the same positions go through."""
    passes = sum(
        parameter.numel() * (1 + is_below_trained + parameter.requires_grad)
        for module in modules
        for parameter in module.parameters()
        if parameter.ndim == 2
    )
    return 2.0 * passes * num_positions


def _attention(layer: nn.Module, length: int) -> float:
    """Scores and weighted sums of one row forward; half of the square is hidden by causality."""
    config = layer.self_attn.config
    return 2.0 * length**2 * config.num_attention_heads * config.head_dim


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second: the data sheet's for bf16 on a known GPU, else measured by a matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if known := known_tflops(name):
            return known * 1e12
    size = MATRIX_SIZE * (8 if device.type == "cuda" else 1)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    matrix @ matrix
    return max(2.0 * size**3 / _seconds_of_product(matrix) for _ in range(MATRIX_ROUNDS))


def known_tflops(device_name: str) -> float | None:
    """From ``PEAK_TFLOPS``; None for a device that is not listed. An L40 is no L4."""
    words = f" {device_name} "
    return next((tflops for name, tflops in PEAK_TFLOPS.items() if f" {name} " in words.replace("-", " ")), None)


def _seconds_of_product(matrix: torch.Tensor) -> float:
    synchronize(matrix.device)
    start = time.perf_counter()
    matrix @ matrix
    synchronize(matrix.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
