"""Which of the launched processes this one is, and what of the machine belongs to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

#: The others wait while one process encodes or writes, which can take hours; a launcher's default is ten minutes.
MAX_WAIT = timedelta(hours=24)
#: Data workers for each GPU; without a GPU the codec itself keeps the cores busy.
WORKERS_PER_GPU = 2


def _alone() -> None:
    """One process waits for nobody."""


@dataclass(frozen=True)
class Processes:
    """One process among those that share a piece of work.

    Attributes:
        index, count: this process, from 0, of how many.
        wait: returns when all of them have called it.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = _alone

    @property
    def is_main(self) -> bool:
        return self.index == 0


def launched_processes(device: str) -> Processes:
    """The processes of this launch: one, or those that ``accelerate launch`` or ``torchrun`` started together.

    Args:
        device: "cpu" makes them talk over gloo.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=MAX_WAIT)
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone)


def get_device_for_current_process() -> str:
    """This process's device: its own GPU (by LOCAL_RANK), Apple's, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def get_num_workers_for_dataloader() -> int:
    """Data workers for this process: two where it has a GPU, none without one."""
    return WORKERS_PER_GPU if get_device_for_current_process().startswith("cuda") else 0
