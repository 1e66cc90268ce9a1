"""Which of the launched processes this one is, and what of the machine belongs to it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from finetuning.errors import UserError, leave

if TYPE_CHECKING:
    from accelerate import Accelerator

#: The others wait while one process encodes or writes, which can take hours; a launcher's default is ten minutes.
MAX_WAIT = timedelta(hours=24)
#: The preflight does not wait that long: forming the group and a first collective take seconds, on many machines more.
MAX_WAIT_OF_CHECK_SECONDS = 180.0
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


def check_processes_talk(
    make_accelerator: Callable[[], Accelerator], max_seconds: float = MAX_WAIT_OF_CHECK_SECONDS
) -> Accelerator:
    """Makes the Accelerator and sums a number over all processes, as every training step does.

    Args:
        make_accelerator: forms the group of the launched processes; by itself it would wait for MAX_WAIT.

    Raises:
        UserError: they cannot talk. Where they wait for each other in vain the process ends with that message, since
            nothing can wake it.
    """
    import torch

    count, index = int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("RANK") or 0)
    advice = 'see "When NCCL hangs" in docs/machines.md; NCCL_DEBUG=INFO says what it tries'
    problem = f"process {index} of {count} has waited {max_seconds:.0f} s for the others in vain; {advice}"
    with _ends_after(max_seconds, problem) if count > 1 else contextlib.nullcontext():
        try:
            accelerator = make_accelerator()
            numbers = torch.tensor([1.0, float(index)], device=accelerator.device)
            started, indices = accelerator.reduce(numbers, reduction="sum").tolist()
        except RuntimeError as error:
            if count == 1:
                raise
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"process {index} of {count} cannot talk to the others: {reason}; {advice}") from None
    if (started, indices) != (count, count * (count - 1) / 2):
        raise UserError(f"{count} processes were started, but {started:g} answered; {advice}")
    return accelerator


@contextlib.contextmanager
def _ends_after(max_seconds: float, problem: str) -> Iterator[None]:
    """Ends this process with exit code 2 when the block takes longer."""
    timer = threading.Timer(max_seconds, leave, (2, f"error: {problem}"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def get_device_for_current_process() -> str:
    """This process's device: its own GPU (by LOCAL_RANK), Apple's, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def get_num_workers_for_dataloader() -> int:
    """Data workers for this process: two where it has a GPU, none without one."""
    return WORKERS_PER_GPU if get_device_for_current_process().startswith("cuda") else 0
