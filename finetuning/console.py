"""What the user is told: by one process, and without tearing a progress bar."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

PROJECT = Path(__file__).resolve().parent.parent
#: So many names are listed in a line.
MAX_LISTED_NAMES = 30


def say(message: str) -> None:
    """Prints a line on the main process only (RANK is set by every launcher of several)."""
    if int(os.environ.get("RANK") or 0) == 0:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def listed_names(names: Sequence[str]) -> str:
    """The first few of many."""
    more = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return ", ".join(names[:MAX_LISTED_NAMES]) + more


def command_of(script: str) -> str:
    """How a script at the top of the project is called from the working directory."""
    return f"python {shlex.quote(short_path(PROJECT / script))}"


def short_path(path: Path | str) -> str:
    """The whole path, or the one from the working directory where that is shorter."""
    return min(os.path.abspath(path), os.path.relpath(path), key=len)
