"""Several processes: what is prepared for one process, for DDP and for FSDP, and what the loop asks of it.

Under FSDP each process holds a part of every parameter (of its rows, in the order of the processes), its gradient and
its optimizer state. Accelerate gives plain DDP when FSDP is asked for on a CPU, and torch's ``fully_shard`` works over
gloo as it does over NCCL; so the objective is sharded here, the same way on both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from finetuning.objective import TrainingObjective
from finetuning.processes import MAX_WAIT

#: ``accelerate launch`` sets it from a configuration file whose distributed_type is FSDP.
FSDP_VARIABLE = "ACCELERATE_USE_FSDP"


def asks_for_fsdp() -> bool:
    """Whether the launch asks for sharded training."""
    return os.environ.get(FSDP_VARIABLE, "").lower() in ("true", "1", "yes", "on")


def is_sharded(module: nn.Module) -> bool:
    """Whether ``shard`` was called on the module."""
    return isinstance(module, FSDPModule)


# ------------------------------------------------------------------------------------------------------- preparing


def prepare(
    accelerator: Accelerator,
    objective: TrainingObjective,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
) -> tuple[nn.Module, Any]:
    """The objective for this launch (one process, DDP or FSDP) and its optimizer; both compute as one process would.

    Args:
        objective: on any device; under FSDP it is sharded in place.
        make_optimizer: called with the objective once its parameters are those that will be trained.

    Returns:
        What stands in for the objective, and Accelerate's optimizer (the one that was made is its ``optimizer``).
    """
    if asks_for_fsdp() and dist.is_initialized():
        prepared = objective.to(accelerator.device)
        shard(prepared, accelerator.device.type)
        _autocast_forward(prepared, accelerator)
        if accelerator.scaler is not None:
            # The plain scaler looks for infinities in every shard; Accelerate's FSDP 1 scaler knows no DTensor.
            accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
    else:
        prepared = accelerator.prepare_model(objective)
        if dist.is_initialized():
            _take_from_first(objective.buffers())  # DDP does so with parameters, and here leaves buffers alone
    return prepared, accelerator.prepare_optimizer(make_optimizer(objective))


def shard(objective: TrainingObjective, device_type: str) -> None:
    """Shards every parameter, frozen ones too, over all processes, in place; buffers stay whole.

    All processes get the weights of the first, as under DDP. Between two calls of the objective every parameter is a
    DTensor in dim-0 parts, so that weights can be read at any time.

    Args:
        device_type: "cuda" or "cpu", where the objective lies.
    """
    _take_from_first((*objective.parameters(), *objective.buffers()))
    # Gathered in fp32 and cast by autocast, so that FSDP computes what DDP does. param_dtype=bfloat16 would halve the
    # bytes of every all-gather, but norms and the residual stream, which autocast keeps in fp32, would become bf16.
    options = {
        "mesh": init_device_mesh(device_type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(),
        "reshard_after_forward": True,
    }
    talker = objective.talker
    # The text table is a fifth of the weights and idle after the first line of forward; by itself it is freed there.
    for module in (*talker.model.layers, *talker.code_predictor.model.layers, talker.model.text_embedding):
        fully_shard(module, **options)
    fully_shard(objective, **options)


def _take_from_first(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces them in all processes by those of the first."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)


def _autocast_forward(objective: nn.Module, accelerator: Accelerator) -> None:
    """What ``Accelerator.prepare_model`` does to a module's forward, in the accelerator's precision."""
    forward = objective.forward

    def autocast_forward(*args: Any) -> Any:
        with accelerator.autocast():
            return forward(*args)

    objective.forward = autocast_forward


# --------------------------------------------------------------------------------------------------- in every step


class HostSums:
    """Sums over the processes of numbers that their hosts know. They travel over gloo, so no GPU is waited for."""

    def __init__(self) -> None:
        is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._group = None if is_alone else dist.new_group(backend="gloo", timeout=MAX_WAIT)

    def of(self, values: Sequence[int]) -> list[int]:
        """All processes must ask."""
        if self._group is None:
            return list(values)
        summed = torch.tensor(values)
        dist.all_reduce(summed, group=self._group)
        return summed.tolist()


@contextlib.contextmanager
def accumulating(prepared: nn.Module) -> Iterator[None]:
    """Forwards and backwards inside share nothing: gradients add up where they are.

    Under FSDP that is a whole gradient on every process until ``averaging``. A forward may be given up, with the
    backward that it was for.
    """
    if is_sharded(prepared):
        prepared.set_requires_gradient_sync(False)
    with prepared.no_sync() if isinstance(prepared, DistributedDataParallel) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def averaging(prepared: nn.Module) -> Iterator[None]:
    """The backward inside, of a forward made under ``accumulating``, averages the gradients over the processes.

    After a forward outside of DDP's ``no_sync`` the next backward synchronises, whichever it is, so a process that
    gave that forward up would not be in step with the others any more.
    """
    if is_sharded(prepared):
        prepared.set_requires_gradient_sync(True)
    with Accelerator.trigger_sync_in_backward(prepared):
        yield


def clip_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clips the gradient of the whole job; its () norm before that, the same on every process, on the device."""
    accelerator.unscale_gradients()
    return full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm))


# -------------------------------------------------------------------------------------------------- parts of tensors


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered whole, which all processes must ask for together; another one as it is."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, sharded as ``like`` is, without communication.

    Args:
        full: the same on every process, on any device; its dtype is kept.
        like: of the same shape; when it is not sharded, ``full`` comes back as it is.
    """
    if not isinstance(like, DTensor):
        return full
    start, stop = own_rows(like)
    local = full[start:stop].to(like.device, copy=True)  # a view would keep the whole tensor alive
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def own_rows(sharded: DTensor) -> tuple[int, int]:
    """First and last + 1 row of a tensor that this process holds; equal where it holds none."""
    rows = -(-len(sharded) // sharded.device_mesh.size())
    start = min(sharded.device_mesh.get_local_rank() * rows, len(sharded))
    return start, min(start + rows, len(sharded))
