"""Which optimizer trains, what it needs, and in which precision the trained weights are kept.

Every optimizer gets the same groups and takes LEARNING_RATE for the same thing: the size of a step of a single weight.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from finetuning.errors import UserError
from finetuning.layer_utils import embeddings_of, optimizer_groups
from finetuning.settings import Settings
from finetuning.sharding import asks_for_fsdp


def check_optimizer(settings: Settings) -> None:
    """What can be known before anything is loaded.

    Raises:
        UserError: torchao is missing, or the launch asks for FSDP, under which only plain AdamW works.
    """
    if not (unusual := _unusual_settings(settings)):
        return
    if asks_for_fsdp():
        raise UserError(
            f"{unusual[0]} does not work with FSDP. Set OPTIMIZER=adamw and WEIGHTS_PRECISION=fp32, whose memory FSDP "
            "shares among the GPUs, or launch without FSDP"
        )
    if needs_torchao(settings) and not find_spec("torchao"):
        raise UserError(
            f"{unusual[0]} needs the package torchao, which is not installed: uv sync --inexact --extra 8bit "
            "(./uv_train.sh does so by itself)"
        )


def needs_torchao(settings: Settings) -> bool:
    """Whether the optimizer is torchao's."""
    return settings.optimizer == "adamw_8bit" or settings.weights_precision == "bf16"


def _unusual_settings(settings: Settings) -> list[str]:
    values = {"OPTIMIZER": settings.optimizer, "WEIGHTS_PRECISION": settings.weights_precision}
    return [f"{name}={value}" for name, value in values.items() if value not in ("adamw", "fp32")]


def make_optimizer(settings: Settings, module: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of OPTIMIZER over all of the module that trains.

    Only the fused AdamW leaves a step with bad gradients out by itself; see ``leaves_out_bad_steps``.
    """
    groups = optimizer_groups(module, settings.weight_decay)
    if settings.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        fixed_rate = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return Adafactor(groups, lr=learning_rate, **fixed_rate)
    if needs_torchao(settings):
        from finetuning.small_adamw import SmallAdamW

        in_8_bits = _matrices(module) if settings.optimizer == "adamw_8bit" else ()
        return SmallAdamW(groups, learning_rate, in_8_bits, settings.seed)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def _matrices(module: nn.Module) -> set[nn.Parameter]:
    """What trains and may have moments in 8 bits.

    Not embeddings. Most steps give a row no gradient; then a second moment that is 0 in 8 bits, as it is for values
    that are a thousandth of the largest beside them, would leave what is left of the first one undivided.
    """
    return {parameter for parameter in module.parameters() if parameter.requires_grad} - embeddings_of(module)


def leaves_out_bad_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its kernel reads ``found_inf`` on the device, so that the host need not wait to know."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)  # what torch's GradScaler goes by


def keep_matrices_in_bf16(module: nn.Module) -> None:
    """WEIGHTS_PRECISION=bf16, in place: matrices and embeddings that train become bf16.

    Norms and biases stay fp32: they are a few thousandths of the weights.
    """
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.ndim >= 2:
            parameter.data = parameter.data.bfloat16()
