"""What the user is told: by one process, and without tearing a progress bar."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from tqdm import tqdm


def say(message: str) -> None:
    """Prints a line on the main process only (RANK is set by every launcher of several)."""
    if int(os.environ.get("RANK") or 0) == 0:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def command_of(script: str) -> str:
    """How a script at the top of the project is called from the working directory."""
    path = Path(__file__).resolve().parent.parent / script
    return f"python {shlex.quote(min(str(path), os.path.relpath(path), key=len))}"
