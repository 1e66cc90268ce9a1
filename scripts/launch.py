"""`accelerate launch` that passes signals on and leaves with the exit code of what it launched.

    python scripts/launch.py --config_file configs/single_machine.yaml --num_processes 4 train.py

Takes the arguments of `accelerate launch`, uses its configuration files and starts its processes. What differs:

- SIGTERM, SIGINT and SIGHUP go to the processes, which finish the step and save, however long that takes. The launcher
  of torch passes them on as well, but kills the processes 30 s later; and to their data workers, which die of it.
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetuning.errors import REPORT_VARIABLE, UserError, read_report, run_main
from finetuning.settings import load_settings

#: What to say of a process that a signal ended.
DEATHS = {
    signal.SIGKILL: "SIGKILL, usually because the machine ran out of memory: lower NUM_WORKERS or NUM_PROCESSES",
    signal.SIGBUS: "SIGBUS, usually because /dev/shm is full: NUM_WORKERS=0, or more shared memory for the container",
}
#: The launcher of torch kills survivors that do not end in 30 s; deaths so long after the first are its doing.
SECONDS_OF_FIRST_DEATHS = 20


def main() -> None:
    settings_device = load_settings().device  # a mistake in the settings is told before anything starts
    arguments = parse_arguments()
    if settings_device != "cpu":
        check_gpus(arguments)
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        report_file = Path(folder) / "report.json"
        os.environ[REPORT_VARIABLE] = str(report_file)
        signals = pass_signals_on()
        problem = launch(arguments)
        report = read_report(report_file)
    if signals and (report is None or report["exit_code"] in (130, 143)):
        sys.exit(128 + signals[0])
    if report is not None:
        if problem and report["exit_code"] == 1:
            print(f"error: {problem}", file=sys.stderr)  # the traceback may be of one that missed it
        sys.exit(report["exit_code"])
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)


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


def launch(arguments: argparse.Namespace) -> str | None:
    """Launches and waits. What is wrong where the processes cannot say it themselves: one was killed.

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
    except ChildFailedError as error:
        return death_of(error)
    except (ConnectionError, DistError) as error:
        raise UserError(
            f"the machines did not find each other at MAIN_PROCESS_IP={arguments.main_process_ip} "
            f"MAIN_PROCESS_PORT={arguments.main_process_port}: {_first_line(error)}. Is the address that of the first "
            "machine (MACHINE_RANK=0), the port free and open, and was the command started on every machine?"
        ) from None
    return None


def death_of(error: Any) -> str | None:
    """What killed a process, from torch's ChildFailedError; None where all ended by themselves."""
    first = min(failure.timestamp for failure in error.failures.values())
    for rank, failure in sorted(error.failures.items()):
        number = -failure.exitcode
        if number > 0 and number != signal.SIGTERM and failure.timestamp - first < SECONDS_OF_FIRST_DEATHS:
            name = signal.Signals(number)
            return f"process {rank} was killed by {DEATHS.get(name, name.name)}"
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


if __name__ == "__main__":
    run_main(main)
