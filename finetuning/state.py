"""The state that a run resumes from: everything that the next step depends on. Safetensors and JSON, nothing pickled.

``output/state/step-N/``:

===============================  ======================================================================================
``state.json``                   the record: progress, schedule, scaler, settings, fingerprints of data and base
``process-I-of-N.part-K.…``      safetensors: ``weights.*`` (all that trains, as it is kept), ``optimizer.<key>.*`` (of
                                 a tensor in 8 bits its parts: ``optimizer.<key>:<part>.*``), ``speakers.vectors``,
                                 ``process.<I>.*`` (random states and sums of that process)
``checksums.json``               see ``disk``
===============================  ======================================================================================

What several processes hold in parts (FSDP) each of them writes; the parts of a tensor follow one another along its
first dimension. What all hold whole the main process writes. So a state can be read by any number of processes.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from finetuning.checkpoint import attempt
from finetuning.disk import begin_folder, damage, finish_folder, library_errors, remove_folder, write_json
from finetuning.sharding import local_part

#: Raise it when a state of before cannot be read any more.
STATE_FORMAT = 1
#: States that are kept.
NUM_STATES = 2
RECORD_FILE = "state.json"
#: Tensors of one file, so that no more than this is copied to host memory at a time.
_MAX_FILE_BYTES = 2**30
_STATE_NAME = re.compile(r"step-(\d+)")


def state_folder(output_dir: Path, step: int) -> Path:
    """Where the state after so many optimizer steps lies."""
    return output_dir / "state" / f"step-{step}"


def step_of(folder: Path) -> int:
    """The number of steps in a state's name."""
    return int(folder.name.removeprefix("step-"))


def find_states(output_dir: Path) -> list[Path]:
    """The states of a run, newest first, whole or not."""
    folders = [entry for entry in (output_dir / "state").glob("step-*") if _STATE_NAME.fullmatch(entry.name)]
    return sorted(folders, key=step_of, reverse=True)


def rotate_states(output_dir: Path, keep: int = NUM_STATES) -> None:
    """Removes all but the newest so many."""
    for folder in find_states(output_dir)[keep:]:
        remove_folder(folder)


# --------------------------------------------------------------------------------------------------------- writing


def save_state(
    folder: Path, record: Mapping[str, Any], tensors: Iterable[tuple[str, torch.Tensor]], accelerator: Accelerator
) -> None:
    """Writes a state; all processes call it, each writes its part, and the folder appears when all of it is there.

    Args:
        record: JSON values.
        tensors: (name, tensor); a sharded one is written in parts, another one by the main process, those called
            ``process.…`` by the process that gives them.

    Raises:
        OSError: in all processes, when one of them could not write; nothing is left of the attempt.
    """
    unfinished = folder.with_name(f".{folder.name}.tmp")
    is_main = accelerator.is_main_process

    written: list[str] = []

    def write_part() -> None:
        prefix = f"process-{accelerator.process_index:05d}-of-{accelerator.num_processes:05d}"
        for number, group in enumerate(_grouped(_owned(tensors, is_main))):
            written.append(f"{prefix}.part-{number:05d}.safetensors")
            with library_errors():
                save_file(group, unfinished / written[-1])

    def finish() -> None:
        if unseen := [name for name in parts if not (unfinished / name).is_file()]:  # a network file system's cache
            raise OSError(f"{', '.join(unseen)} cannot be seen by the main process")
        write_json(unfinished / RECORD_FILE, {"format": STATE_FORMAT, **record})
        finish_folder(unfinished, folder)

    try:
        attempt(accelerator, lambda: begin_folder(folder) if is_main else None)
        attempt(accelerator, write_part)
        parts = gather_object(written) if accelerator.num_processes > 1 else written
        attempt(accelerator, lambda: finish() if is_main else None)
    finally:
        if is_main and unfinished.exists():
            remove_folder(unfinished)


def _owned(tensors: Iterable[tuple[str, torch.Tensor]], is_main: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """What this process writes of the tensors, on their devices."""
    for name, tensor in tensors:
        if isinstance(tensor, DTensor):
            yield name, tensor.detach().to_local()
        elif is_main or name.startswith("process."):
            yield name, tensor.detach()


def _grouped(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors on the CPU in groups of limited size; a larger tensor has a group of its own."""
    group: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if group and num_bytes + tensor.nbytes > _MAX_FILE_BYTES:
            yield group
            group, num_bytes = {}, 0
        group[name] = tensor.cpu().contiguous()
        num_bytes += tensor.nbytes
    if group:
        yield group


# --------------------------------------------------------------------------------------------------------- reading


class State:
    """A state on disk. Nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: dict[str, Any] = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        self._files: dict[str, list[Path]] = {}
        for file in sorted(folder.glob("process-*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                    self._files.setdefault(name, []).append(file)

    @property
    def step(self) -> int:
        return self.record["progress"]["step"]

    @property
    def num_processes(self) -> int:
        return self.record["processes"]

    def names(self, prefix: str) -> list[str]:
        """Names of tensors that start with a prefix."""
        return [name for name in self._files if name.startswith(prefix)]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        """A whole tensor, on the CPU."""
        parts = []
        for file in self._files[name]:
            with safe_open(file, framework="pt") as tensors:
                parts.append(tensors.get_tensor(name))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def damage_of_state(folder: Path) -> list[str]:
    """What is wrong with a state; [] for one that can be read."""
    if problems := damage(folder):
        return problems
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        if record["format"] != STATE_FORMAT:
            return [f"it has format {record['format']}, this version reads format {STATE_FORMAT}"]
        parts = [list(folder.glob(f"process-{index:05d}-of-*")) for index in range(record["processes"])]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{RECORD_FILE} is not readable"]
    return [] if all(parts) else [f"the part of process {parts.index([])} is missing"]


# ---------------------------------------------------------------------------------------- weights and the optimizer


def training_tensors(objective: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything that trains, and of what the optimizer keeps for it."""
    for name, parameter in _trainable(objective):
        yield f"weights.{name}", parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            for suffix, tensor in _plain_tensors(value):
                yield f"optimizer.{key}{suffix}.{name}", tensor


def _plain_tensors(value: torch.Tensor | int) -> Iterator[tuple[str, torch.Tensor]]:
    """(suffix of its key, tensor) of what an optimizer keeps: a number, a tensor, or one that is made of several."""
    if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
        yield from ((f":{part}", getattr(value, part)) for part in value.__tensor_flatten__()[0])
    else:
        assert not isinstance(value, float), "it would lose bits"
        yield "", torch.as_tensor(value)


@torch.no_grad()
def restore_training(state: State, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts back what ``training_tensors`` gave; parameters and optimizer may be sharded otherwise than before."""
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    keys = sorted({name.split(".")[1] for name in state.names("optimizer.")})
    for name, parameter in _trainable(objective):
        parameter.copy_(local_part(state[f"weights.{name}"].to(parameter.dtype), parameter))
        for key in [key for key in keys if f"optimizer.{key}.{name}" in state]:
            value = state[f"optimizer.{key}.{name}"]
            whole, _, part = key.partition(":")
            kept = optimizer.state[parameter]
            if part:
                if whole not in kept:
                    kept[whole] = optimizer.new_moment(parameter, whole)
                getattr(kept[whole], part).copy_(value)
            else:
                kept[key] = _placed(value, parameter, groups[parameter])


def _placed(value: torch.Tensor, parameter: nn.Parameter, group: Mapping[str, Any]) -> torch.Tensor | int:
    """What an optimizer kept for a parameter, as and where it keeps it."""
    if value.ndim:
        return (local_part(value, parameter) if value.shape == parameter.shape else value).to(parameter.device)
    if not value.is_floating_point():
        return value.item()
    # A fused or capturable optimizer keeps its step counts beside the parameters, another one on the host.
    return value.to(parameter.device) if group.get("fused") or group.get("capturable") else value


def _trainable(objective: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad]


def set_schedule(scheduler: Any, num_steps_taken: int) -> None:
    """Brings a fresh schedule to where it was after so many steps.

    Every schedule of ``make_scheduler`` is a LambdaLR: its rate is a function of the number of steps alone.
    """
    scheduler.last_epoch, scheduler._step_count = num_steps_taken, num_steps_taken + 1
    rates = zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)
    scheduler._last_lr = [base * factor(num_steps_taken) for factor, base in rates]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


# --------------------------------------------------------------------------------------------------- random states


def random_tensors(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of this process's random generators: torch's, its device's, numpy's, Python's."""
    numpy_state = np.random.get_state()
    version, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy_state[1].astype(np.int64)),
        "numpy_rest": torch.tensor([numpy_state[2], numpy_state[3], numpy_state[4]], dtype=torch.float64),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Puts back what ``random_tensors`` gave."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, cached = states["numpy_rest"].tolist()
    words = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, int(position), int(has_gauss), cached))
    version, *rest = states["python"].tolist()
    gauss = states["python_gauss"].item()
    random.setstate((version, tuple(rest), None if math.isnan(gauss) else gauss))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
