"""SIGINT and SIGTERM as a request to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from finetuning.console import say
from finetuning.errors import another_process_failed

#: A launcher passes the terminal's Ctrl-C on, so that it arrives twice; a second request comes later than this.
ECHO_SECONDS = 1.0


class Interrupted(BaseException):
    """Something long is broken off, as a stop was asked for. No error: whoever passes over errors lets it through."""


class StopRequest:
    """The first signal is noted, so that the step can be finished and saved; the second acts at once.

    Attributes:
        number: of the signal; None while there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._made_at = 0.0

    @property
    def is_made(self) -> bool:
        return self.number is not None

    def check(self) -> None:
        """Raises Interrupted once the request is made."""
        if self.is_made:
            raise Interrupted

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes both signals; whoever had them before has them again afterwards."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if another_process_failed():  # the launcher ends the others; their next step could never finish
            raise SystemExit(128 + number)
        if not self.is_made:
            self.number, self._made_at = number, time.monotonic()
            say(f"signal {number}: finishing the step and saving last/; once more stops at once")
        elif time.monotonic() - self._made_at > _echo_seconds():
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _echo_seconds() -> float:
    """How long a second signal may be the echo of the first; without a launcher there is none."""
    return ECHO_SECONDS if int(os.environ.get("WORLD_SIZE") or 1) > 1 else -1.0
