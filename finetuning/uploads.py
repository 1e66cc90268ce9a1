"""UPLOAD_TO_HUB: best/ and last/ of a run on their way to the Hub, beside the training and at its end.

Each upload is a process of its own, ``python -m finetuning.hub upload …``. In a thread it would take turns with the
training for Python's interpreter, and a transfer that hangs, or a Ctrl-C, would have to wait for it; a process can be
ended at any time. A thread of this one only waits for it. Nothing that happens here ends the run: what could not be
sent is said at the end, with the command that sends it.

The process copies the folder as it is when it begins (hard links, see ``hub``), so the run may replace it meanwhile. Of
several saves of one folder that come while another is being sent, the newest goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from typing import IO, Any, NoReturn

from finetuning.console import PROJECT, say
from finetuning.errors import REPORT_VARIABLE, Stopped
from finetuning.hub import WAITS_SECONDS, remove_copies, scrubbed, upload_command
from finetuning.settings import Settings

#: While the end of the run waits, it says so often how far it is.
NEWS_SECONDS = 30.0
#: An upload of which so long nothing more was sent is given up.
STALL_SECONDS = 600.0
#: So often its process is looked at.
POLL_SECONDS = 0.2
#: A process that was killed ends sooner.
END_SECONDS = 10.0
#: Variables of a launch; the process of an upload is none of its processes.
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: A line of tqdm's: what, and how much of it, in per cent and by its amount.
_BAR = re.compile(r"([^\r\n\x1b|]+?):\s+(\d+)%\|[^|]*\|\s*([^\s/]+)")


class Uploader:
    """Sends what a run saves; made on its main process.

    Attributes:
        failed: name -> why its newest save could not be sent.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.output_dir = settings, settings.output_dir
        self.repositories = settings.repositories()
        self.failed: dict[str, str] = {}
        self._owed = set(self.repositories)  # whose folder, as it is, is neither on the Hub nor on its way there
        self._mine: set[str] = set()  # what this process saved, or was to send
        self._waiting: list[str] = []
        self._current: str | None = None
        self._process: subprocess.Popen | None = None
        self._why_ended: str | None = None  # the job under way
        self._progress = ""
        self._is_out_of_reach = False
        self._is_closed = False
        self._handlers: dict[int, Any] = {}
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="uploads", daemon=True)

    def __enter__(self) -> Uploader:
        if self.repositories:
            self._worker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._is_closed = True
        self.make_room("the run has ended")
        if self.repositories:
            self._worker.join(END_SECONDS)
        if kind is not None:
            words = "is not on the Hub. The same run, started again, sends it at its end; now, this does:"
            self._tell_how(self._mine, words)
        self._restore_signals()

    def offer(self, names: Iterable[str]) -> None:
        """Takes note of checkpoints that were saved; with HUB_EVERY=save they are sent."""
        saved = [name for name in self.repositories if name in names]
        with self._changed:
            self._owed.update(saved)
            self._mine.update(saved)
        if self.settings.hub_every == "save":
            self._queue(saved)

    def make_room(self, why: str = "it made room on the disk for a save") -> None:
        """Ends what is under way, whose copy may be all that keeps an older checkpoint on the disk. It stays owed."""
        with self._changed:
            self._waiting.clear()
            self._why_ended = why
            if self._process is not None:
                self._process.kill()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._current is None or not self._worker.is_alive(), END_SECONDS)

    def finish(self) -> None:
        """Sends what has not been sent yet, and waits for it.

        Raises:
            Stopped: by a signal meanwhile; the run itself is saved.
        """
        self._stop_by_signals()
        names = {name for name in self.repositories if (self.output_dir / name).is_dir()}
        self._is_out_of_reach = False
        self._mine |= names
        self._queue([name for name in self.repositories if name in names & self._owed])
        self._wait()
        self._restore_signals()
        self._tell_how(names, "could not be sent to the Hub. Everything is saved here, and this command goes on:")

    # ------------------------------------------------------------------------------------------------------- the queue

    def _queue(self, names: Iterable[str]) -> None:
        with self._changed:
            self._waiting += [name for name in names if name not in self._waiting]
            self._changed.notify_all()

    def _wait(self) -> None:
        """Until nothing is left to send, with news of it."""
        told_at = time.monotonic()
        while self._worker.is_alive():
            with self._changed:
                if not (self._waiting or self._current):
                    return
                self._changed.wait(POLL_SECONDS)
                name = self._current
            if name and time.monotonic() - told_at >= NEWS_SECONDS:
                told_at = time.monotonic()
                say(f"waiting for the upload of {name}/ to {self.repositories[name]} {self._progress}".rstrip())

    def _tell_how(self, names: Iterable[str], words: str) -> None:
        """How to send those of them that are not on the Hub."""
        for name in (one for one in self.repositories if one in names and one in {*self._owed, self._current}):
            folder, reason = self.output_dir / name, self.failed.get(name)
            because = f" ({reason})" if reason else ""
            command = upload_command(folder, self.repositories[name], self.settings.hub_private)
            say(f"warning: {folder} {words}{because}\n  {command}")

    # --------------------------------------------------------------------------------------------------------- signals

    def _stop_by_signals(self) -> None:
        """SIGINT and SIGTERM raise Stopped; further ones, a launcher's echo say, are ignored from then on."""

        def stop(number: int, _: Any) -> NoReturn:
            for one in self._handlers:
                signal.signal(one, signal.SIG_IGN)
            raise Stopped(number)

        self._handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def _restore_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    # ------------------------------------------------------------------------------------------------------ the worker

    def _work(self) -> None:
        while name := self._next():
            try:
                problem = self._send(name)
            except Exception as error:  # whoever waits for this job must hear of it
                problem = scrubbed(f"{type(error).__name__}: {error}")
            with self._changed:
                self._current = None
                self._owed |= {name} if problem else set()
                self.failed |= {name: problem} if problem and not self._is_closed else {}
                self._changed.notify_all()
            if problem and not self._is_closed:
                with contextlib.suppress(OSError):  # nobody reads what is said any more
                    say(f"warning: {name}/ could not be sent to {self.repositories[name]}: {problem}")

    def _next(self) -> str | None:
        """The name that is to be sent; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return None
            self._current = name = self._waiting.pop(0)
            self._owed.discard(name)
            self.failed.pop(name, None)
            self._why_ended, self._progress = None, ""
            return name

    def _send(self, name: str) -> str | None:
        """Why it could not be sent; None when it was."""
        with tempfile.TemporaryFile() as output, self._running(name, output) as process:
            answer = self._follow(name, process, output) if process else {}
        error = answer.get("error") or self._why_ended
        self._is_out_of_reach = answer.get("is_out_of_reach", False)
        if "url" not in answer:
            return error or f"its process ended with code {process.returncode}"
        say(f"{name}/ {'is on the Hub' if answer['is_news'] else 'was on the Hub already'}: {answer['url']}")
        if answer["is_public"] and self.settings.hub_private:
            say(f"{self.repositories[name]} is public, as it was")
        return None

    @contextlib.contextmanager
    def _running(self, name: str, output: IO[bytes]) -> Iterator[subprocess.Popen | None]:
        """The process of an upload, which ends with the block; None where it was called off before."""
        how = "--private" if self.settings.hub_private else "--public"
        num_attempts = 1 if self._is_out_of_reach else 1 + len(WAITS_SECONDS)
        command = [sys.executable, "-m", "finetuning.hub", "upload", str(self.output_dir / name), how]
        command += ["--repo", self.repositories[name], "--for-run", str(num_attempts)]
        with self._changed:
            if self._why_ended is None:  # a file, not pipes: a data worker may hold their ends open
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=_environment(),
                    start_new_session=True,
                )  # fmt: skip
        try:
            yield self._process
        finally:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                self._process.stdin.close()
            self._process = None
            remove_copies(self.output_dir / name)

    def _follow(self, name: str, process: subprocess.Popen, output: IO[bytes]) -> dict[str, Any]:
        """What an upload answers at its end, or ``error`` alone."""
        amounts, moved_at, last = set(), time.monotonic(), ""
        for line in _lines(process, output):
            if bar := _BAR.search(line):
                self._progress = f"({bar[1].strip()} {bar[2]} %)"
                if bar.groups() not in amounts:
                    moved_at = time.monotonic()
                amounts.add(bar.groups())
            elif line.startswith("{"):
                return json.loads(line)
            elif line.startswith(f"{self.repositories[name]}: "):  # an attempt that failed
                say(f"upload of {name}/: {line}")
            last = line if line and not bar and "\x1b" not in line else last
            if time.monotonic() - moved_at > STALL_SECONDS:
                why = f"nothing more was sent for {STALL_SECONDS / 60:g} minutes ({scrubbed(last)})"
                return {"error": why, "is_out_of_reach": True}
        return {} if process.returncode < 0 else {"error": scrubbed(last)}


def _lines(process: subprocess.Popen, output: IO[bytes]) -> Iterator[str]:
    """What a process writes into a file, progress bars included; "" where it is silent for a moment."""
    offset, rest, is_over = 0, b"", False
    while not is_over:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
        is_over = process.returncode is not None
        chunk = os.pread(output.fileno(), 2**24, offset)  # not read(): the process writes where the file stands
        offset += len(chunk)
        *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
        yield from ["", *(line.decode(errors="replace").strip() for line in lines)]


def _environment() -> dict[str, str]:
    """Of the process of an upload: the token comes to it here, and never by its command line."""
    left_out = (*LAUNCH_VARIABLES, REPORT_VARIABLE)
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    path = os.pathsep.join(filter(None, [str(PROJECT), kept.get("PYTHONPATH")]))
    return kept | {
        "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "2", "HF_HUB_DISABLE_PROGRESS_BARS": "0",
    }  # fmt: skip
