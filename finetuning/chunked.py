"""A sum over many positions, of which only some are in memory at a time.

The losses of both heads are sums over positions, and nothing is computed from them but the step's loss. So the gradient
of a chunk can be taken as soon as its sum is there, and all that its graph holds (logits, and the sub-talker's
activations over 16 positions a frame) is freed before the next chunk begins. It costs no operation more than taking all
gradients at the end. Liger's fused linear cross-entropy works by the same idea, for one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

#: Pieces of the tensors in, () float32 out.
Compute = Callable[..., torch.Tensor]


def pieces(tensors: Sequence[torch.Tensor], chunk_size: int) -> Iterator[list[torch.Tensor]]:
    """The tensors cut alike along their first dimension."""
    for start in range(0, len(tensors[0]), chunk_size):
        yield [tensor[start : start + chunk_size] for tensor in tensors]


def sum_over_chunks(
    compute: Compute, tensors: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], chunk_size: int
) -> torch.Tensor:
    """The sum of ``compute(*piece)`` over all pieces, () float32, whose gradients are taken piece by piece.

    Args:
        tensors: all of the same length; those that need a gradient are floating.
        parameters: everything else that ``compute`` reads and that may need a gradient.
        chunk_size: length of a piece.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return _SumOverChunks.apply(compute, chunk_size, len(tensors), *tensors, *trained)


class _SumOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, chunk_size: int, num_tensors: int, *inputs: torch.Tensor) -> torch.Tensor:
        tensors, parameters = inputs[:num_tensors], inputs[num_tensors:]
        needs_gradient = ctx.needs_input_grad[3 : 3 + num_tensors]
        of_pieces: list[list[torch.Tensor]] = []
        of_parameters: list[torch.Tensor] = []
        total = torch.zeros((), device=tensors[0].device)
        for cut in pieces(tensors, chunk_size):
            cut = [piece.detach().requires_grad_(needs) for piece, needs in zip(cut, needs_gradient, strict=True)]
            with torch.enable_grad():
                part = compute(*cut)
            wanted = [piece for piece in cut if piece.requires_grad]
            with torch.autocast(total.device.type, enabled=False):  # as in every backward pass
                gradients = torch.autograd.grad(part, [*wanted, *parameters])
            of_pieces.append(list(gradients[: len(wanted)]))
            of_parameters = _added(of_parameters, list(gradients[len(wanted) :]))
            total += part.detach()
        joined = iter([_joined(gradients) for gradients in zip(*of_pieces, strict=True)])
        of_tensors = [next(joined) if needs else None for needs in needs_gradient]
        ctx.gradients = [*of_tensors, *of_parameters]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        for one in gradients:
            if one is not None:
                one.mul_(gradient)
        return (None, None, None, *gradients)


def _joined(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    return gradients[0] if len(gradients) == 1 else torch.cat(gradients)


def _added(sums: list[torch.Tensor], more: list[torch.Tensor]) -> list[torch.Tensor]:
    """Adds in place, where there is something already."""
    if not sums:
        return more
    torch._foreach_add_(sums, more)
    return sums
