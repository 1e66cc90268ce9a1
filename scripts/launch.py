"""`accelerate launch` that passes signals on and leaves with the exit code of what it launched.

    python scripts/launch.py --config_file configs/single_machine.yaml --num_processes 4 train.py

Takes the arguments of `accelerate launch`, uses its configuration files and starts its processes. What differs:

- SIGTERM, SIGINT and SIGHUP go to the processes, which finish the step and save, however long that takes. The launcher
  of torch passes them on as well, but kills the processes 30 s later.
- It leaves with the exit code of train.py (0, 1, 2, 130, 143) where the launcher of torch leaves with 1.
- A failure is told once, by the process that failed first; a process that was killed is told here.
- More processes than GPUs are refused before anything starts, except on DEVICE=cpu.

The shell scripts call it when NUM_PROCESSES x NUM_MACHINES is more than one.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetuning.errors import REPORT_VARIABLE, UserError, read_report, run_main
from finetuning.settings import load_settings

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

#: What to say of a process that a signal ended.
DEATHS = {
    signal.SIGKILL: "SIGKILL, usually because the machine ran out of memory: lower NUM_WORKERS or NUM_PROCESSES",
    signal.SIGBUS: "SIGBUS, usually because /dev/shm is full: NUM_WORKERS=0, or more shared memory for the container",
}
#: The launcher of torch kills survivors that do not end in 30 s; deaths so long after the first are its doing.
SECONDS_OF_FIRST_DEATHS = 20


def main() -> None:
    arguments = parse_arguments()
    # A mistake in the settings is told before anything starts; EFFECTIVE_BATCH_SIZE counts the processes to come.
    settings = load_settings(environment={**os.environ, "WORLD_SIZE": str(arguments.num_processes)})
    if settings.device != "cpu":
        check_gpus(arguments)
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        report_file = Path(folder) / "report.json"
        os.environ[REPORT_VARIABLE] = str(report_file)
        signals = pass_signals_on()
        failure = launch(arguments)
        report = read_report(report_file)
    if failure is not None:
        sys.exit(exit_code(failure, report, signals))


def exit_code(failure: ChildFailedError, report: dict[str, Any] | None, signals: list[int]) -> int:
    """That of the process that failed first; says what no process could say itself."""
    reported = report["exit_code"] if report else None
    death = death_of(failure)
    if reported is None and death is None and not signals:
        rank, first = failure.get_first_failure()
        death = f"process {rank} ended with exit code {first.exitcode}"
    if death and reported != 2:
        print(f"error: {death}", file=sys.stderr)
        return 1
    if signals and reported in (None, 130, 143):
        return 128 + signals[0]
    return reported


def parse_arguments() -> argparse.Namespace:
    """The arguments of `accelerate launch`, completed from the configuration file as it does.

    Raises:
        UserError: the file is missing, or Accelerate does not know what stands in it.
    """
    from accelerate.commands.launch import launch_command_parser
    from yaml import YAMLError

    arguments = launch_command_parser().parse_args()
    # The launcher of torch takes only SIGQUIT, so that the handlers below stay in force.
    arguments.signals_to_handle = "SIGQUIT"
    try:
        _load_configuration(arguments)
    except (OSError, ValueError, YAMLError, AttributeError, AssertionError) as error:
        raise UserError(f"ACCELERATE_CONFIG: {arguments.config_file} cannot be used: {error}") from None
    return arguments


def _load_configuration(arguments: argparse.Namespace) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    if arguments.config_file:
        defaults = load_config_from_file(arguments.config_file)
        for name in ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"):
            if getattr(arguments, name) is None:
                setattr(arguments, name, getattr(defaults, name))
    arguments.num_machines = arguments.num_machines or 1
    if not arguments.num_processes or arguments.num_processes < 1:
        raise ValueError("the number of processes is missing (NUM_PROCESSES, or --num_processes)")
    if arguments.num_processes % arguments.num_machines:
        raise ValueError(f"{arguments.num_processes} processes cannot be shared by {arguments.num_machines} machines")


def check_gpus(arguments: argparse.Namespace) -> None:
    """
    Raises:
        UserError: this machine shows fewer GPUs than it is to run processes.
    """
    import torch

    wanted, found = arguments.num_processes // arguments.num_machines, torch.cuda.device_count()
    if found < wanted:
        raise UserError(
            f"{wanted} processes need {wanted} GPUs on this machine, and {found} are visible (nvidia-smi, "
            "CUDA_VISIBLE_DEVICES); set NUM_PROCESSES to the number of GPUs, or DEVICE=cpu"
        )


def pass_signals_on() -> list[int]:
    """Sends SIGTERM, SIGINT and SIGHUP (as SIGTERM) to the launched processes, but not to what they started.

    Returns:
        The signals so far, as they were passed on; it grows.
    """
    passed_on: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        import psutil

        number = signal.SIGTERM if number == signal.SIGHUP else number
        passed_on.append(number)
        processes = psutil.Process().children()
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        if not processes:  # not launched yet, or over
            raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, pass_on)
    return passed_on


def launch(arguments: argparse.Namespace) -> ChildFailedError | None:
    """Launches and waits; returns what torch's launcher says of the processes that failed.

    Raises:
        UserError: they could not be launched.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # It lists each process that it ends; the processes say what is wrong themselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(arguments)
    except ChildFailedError as failure:
        return failure
    except (ConnectionError, DistError) as error:
        raise UserError(
            f"the machines did not find each other at MAIN_PROCESS_IP={arguments.main_process_ip} "
            f"MAIN_PROCESS_PORT={arguments.main_process_port}: {_first_line(error)}. Is the address that of the first "
            "machine (MACHINE_RANK=0), the port free and open, and was the command started on every machine?"
        ) from None
    return None


def death_of(failure: ChildFailedError) -> str | None:
    """The process that a signal killed; None where all ended by themselves."""
    first = min(process.timestamp for process in failure.failures.values())
    for rank, process in sorted(failure.failures.items()):
        number = -process.exitcode
        if number > 0 and number != signal.SIGTERM and process.timestamp - first < SECONDS_OF_FIRST_DEATHS:
            return f"process {rank} was killed by {DEATHS.get(number, signal.Signals(number).name)}"
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


if __name__ == "__main__":
    run_main(main)
