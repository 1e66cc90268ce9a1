"""Errors that the user can mend, and the exit codes of every command.

0 done · 1 a bug (with traceback) · 2 the user must change something (one message, no traceback) ·
130/143 stopped by SIGINT/SIGTERM after saving.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


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
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(str(stopped), file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
