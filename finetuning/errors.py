"""Errors that the user can mend, and the exit codes of every command.

0 done · 1 a bug (with traceback) · 2 the user must change something (one message, no traceback) ·
130/143 stopped by SIGINT/SIGTERM after saving.

Processes that were launched together fail together, with one message on each machine: the first that fails writes the
report of the launch and says what is wrong; the others, whose next collective fails because it is gone, end silently
with the same exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

#: Names the report's file; scripts/launch.py sets it. Other launchers' processes derive one in the temporary folder.
REPORT_VARIABLE = "LAUNCH_REPORT"
#: Reports in the temporary folder are removed when they are older than this.
MAX_REPORT_AGE_SECONDS = 24 * 3600
#: So long the other processes leave the word to the main one, which usually fails of the same.
MAIN_FIRST_SECONDS = 1.0
#: An unexpected error may only be the echo of a process that died; its report or the launcher's SIGTERM comes first.
ECHO_SECONDS = 3.0


class UserError(ValueError):
    """Something that only the user can change: a setting, a file, disk space. The message says what and how."""


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number


def run_main(main: Callable[[], None]) -> None:
    """Runs a command's ``main`` and leaves the process with the exit codes above."""
    try:
        main()
        part_from_the_others()
    except UserError as error:
        sys.stdout.flush()
        leave(2, f"error: {error}")
    except Stopped as stopped:
        leave(stopped.exit_code, str(stopped))
    except KeyboardInterrupt:
        leave(130, "interrupted")
    except SystemExit as left:
        if _is_alone() or not left.code:
            raise
        if another_process_failed():  # it, or the launcher, reports
            _flush()
            os._exit(1)
        leave(*((left.code, "") if isinstance(left.code, int) else (1, str(left.code))))
    except Exception:
        if _is_alone():
            raise
        leave(1, traceback.format_exc(), ECHO_SECONDS)


def part_from_the_others() -> None:
    """Ends the process group, whose threads may abort a process that leaves without it; no collective may follow."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave(exit_code: int, message: str, patience_seconds: float = 0.0) -> NoReturn:
    """Ends the process, and by its report all that were launched with it; only the first to fail prints its message.

    Args:
        patience_seconds: how long another process may be the first to fail; those beside the main one are always
            patient for MAIN_FIRST_SECONDS.
    """
    if _is_alone():
        print(message, file=sys.stderr)
        sys.exit(exit_code)
    if _rank():
        patience_seconds += MAIN_FIRST_SECONDS
    report = _wait_for_report(patience_seconds) or _file_report(exit_code, message)
    if report is None and message:
        sys.stdout.flush()
        print(message.rstrip(), file=sys.stderr)
    _flush()
    # Not sys.exit: the destructors of a process group wait for processes that are gone.
    os._exit(exit_code if report is None else report["exit_code"])


def another_process_failed() -> bool:
    """Whether a process of this launch, on this machine, has failed or died: no collective can finish any more.

    For signal handlers: the launcher ends the survivors by SIGTERM, which asks them for no last step. Meaningful while
    all processes are at work (one that is done counts as dead).
    """
    if _is_alone():
        return False
    report = read_report(report_path())
    return _processes_missing() if report is None else report["rank"] != _rank()


# ------------------------------------------------------------------------------------------------------ the report


def report_path() -> Path:
    """Where this launch's report lies; the same for all its processes on this machine, and for no other launch."""
    if named := os.environ.get(REPORT_VARIABLE):
        return Path(named)
    launcher = os.getppid()
    names = ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    marks = [os.getuid(), launcher, _start_ticks(launcher), *(os.environ.get(name) or 0 for name in names)]
    return Path(tempfile.gettempdir()) / f"launch-{'-'.join(map(str, marks))}.json"


def read_report(path: Path) -> dict[str, Any] | None:
    """The report {exit_code, rank, message}; None while nobody has failed."""
    try:
        if path.stat().st_uid != os.getuid():  # the temporary folder belongs to everybody
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _file_report(exit_code: int, message: str) -> dict[str, Any] | None:
    """Writes the report; the one that another process was quicker to write, or None.

    A hard link makes it complete from its first moment, and only one process succeeds. Where nothing can be written,
    every process says what it has to say.
    """
    path = report_path()
    report = {"exit_code": exit_code, "rank": _rank(), "message": message}
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        if REPORT_VARIABLE not in os.environ:
            _remove_old_reports(path.parent)
        draft.write_text(json.dumps(report), encoding="utf-8")
        os.link(draft, path)
    except FileExistsError:
        return read_report(path)
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
    return None


def _wait_for_report(max_seconds: float) -> dict[str, Any] | None:
    path, end = report_path(), time.monotonic() + max_seconds
    while (report := read_report(path)) is None and time.monotonic() < end:
        time.sleep(0.05)
    return report


def _remove_old_reports(folder: Path) -> None:
    for file in folder.glob(f"launch-{os.getuid()}-*.json"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > MAX_REPORT_AGE_SECONDS:
                file.unlink()


# --------------------------------------------------------------------------------------------------- the processes


def _is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE") or 1) == 1


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)


def _start_ticks(process: int) -> str:
    """When a process was started, in clock ticks since the machine was: process numbers are used again."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return "0"  # not Linux


def _processes_missing() -> bool:
    """Whether torchrun's agent, our parent, has fewer of our kind than it started (it reaps the dead)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    import psutil

    num_alive = 0
    for process in psutil.Process(os.getppid()).children():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and "LOCAL_RANK" in process.environ():
                num_alive += 1
    return num_alive < int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def whole_number(text: str) -> int:
    """An option's number, for argparse.

    Raises:
        ValueError, ArgumentTypeError: it is none, or below 1.
    """
    number = int(text)
    if number < 1:
        raise ArgumentTypeError("must be at least 1")
    return number
