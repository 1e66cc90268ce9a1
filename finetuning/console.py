"""What the user is told: by one process, and without tearing a progress bar."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm


def say(message: str) -> None:
    """Prints a line on the main process only (RANK is set by every launcher of several)."""
    if int(os.environ.get("RANK") or 0) == 0:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()
