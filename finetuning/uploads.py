"""UPLOAD_TO_HUB: best/ and last/ of a run on their way to the Hub, beside the training and at its end.

Each upload is a process of its own, ``python -m finetuning.hub upload …``. In a thread it would take turns with the
training for Python's interpreter, and a transfer that hangs, or a Ctrl-C, would have to wait for it; a process can be
ended at any time. A thread of this one only waits for it. Nothing that happens here ends the run: what could not be
sent is said at the end, with the command that sends it.

A save is staged at once (hard links, see ``hub``), so the run may replace the folder meanwhile. Of several saves of one
folder that wait only the newest is kept.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from finetuning.console import say
from finetuning.errors import REPORT_VARIABLE, Stopped
from finetuning.hub import stage, upload_command
from finetuning.settings import Settings

PROJECT = Path(__file__).resolve().parent.parent
#: While the end of the run waits, it says so often how far it is.
NEWS_SECONDS = 30.0
#: Variables of a launch; the process of an upload is none of its processes.
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: A line of tqdm's: what, and how much of it.
_BAR = re.compile(r"([^\r\n\x1b|]+?):\s+(\d+)%\|")


@dataclass
class Job:
    """A save that is to be sent.

    Attributes:
        name: "best" or "last".
        version: counts the saves of that name.
        folder: where it is staged.
    """

    name: str
    version: int
    folder: Path


class Uploader:
    """Sends what a run saves; made on its main process.

    Attributes:
        failed: name -> why its newest save could not be sent.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.output_dir = settings, settings.output_dir
        self.repositories = settings.repositories()
        self.failed: dict[str, str] = {}
        self._versions = dict.fromkeys(self.repositories, 0)  # of the newest saves
        self._arrived: dict[str, int] = {}  # versions on the Hub
        self._waiting: dict[str, Job] = {}
        self._current: Job | None = None
        self._process: subprocess.Popen | None = None
        self._progress = ""
        self._number = 0
        self._is_closed = False
        self._handlers: dict[int, Any] = {}
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="uploads", daemon=True)

    def __enter__(self) -> Uploader:
        if self.repositories:
            self._worker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        owed = [name for name in self.repositories if not self._has_arrived(name) and (self.output_dir / name).is_dir()]
        self._stop()
        if kind is not None and owed:
            self._tell_how(owed, "is not on the Hub. The same run, started again, sends it at its end; now, this does:")
        self._restore_signals()

    def offer(self, names: Sequence[str]) -> None:
        """Takes note of checkpoints that were saved; with HUB_EVERY=save they are sent."""
        for name in (one for one in self.repositories if one in names):
            with self._changed:
                self._versions[name] += 1
            if self.settings.hub_every == "save":
                self._add(name)

    def finish(self) -> None:
        """Sends what has not been sent yet, and waits for it.

        Raises:
            Stopped: by a signal meanwhile; the run itself is saved.
        """
        self._stop_by_signals()
        names = [name for name in self.repositories if (self.output_dir / name).is_dir()]
        for name in names:
            if not self._is_underway(name):
                self._add(name)
        self._wait()
        self._restore_signals()
        if lost := [name for name in names if not self._has_arrived(name)]:
            self._tell_how(lost, "could not be sent to the Hub. Everything is saved here, and this command goes on:")

    # ------------------------------------------------------------------------------------------------------- the queue

    def _has_arrived(self, name: str) -> bool:
        return self._arrived.get(name) == self._versions[name]

    def _is_underway(self, name: str) -> bool:
        """Whether its newest save has arrived, or is about to."""
        with self._changed:
            jobs = [self._waiting.get(name), self._current]
            newest = (name, self._versions[name])
            return self._has_arrived(name) or newest in [(job.name, job.version) for job in jobs if job]

    def _add(self, name: str) -> None:
        """Stages the folder as it is now, in the place of an older save that still waits."""
        self._number += 1
        target = self.output_dir / f".{name}.upload-{self._number}.tmp"
        try:
            stage(self.output_dir / name, target, self.repositories[name])
        except Exception as error:  # an upload must never cost a run
            shutil.rmtree(target, ignore_errors=True)
            self.failed[name] = f"it could not be staged: {error}"
            say(f"warning: {self.output_dir / name} could not be staged for its upload: {error}")
            return
        with self._changed:
            older = self._waiting.pop(name, None)
            self._waiting[name] = Job(name, self._versions[name], target)
            self._changed.notify_all()
        if older:
            shutil.rmtree(older.folder, ignore_errors=True)

    def _wait(self) -> None:
        """Until nothing is left to send, with news of it."""
        told_at = time.monotonic()
        while True:
            with self._changed:
                if not (self._waiting or self._current):
                    return
                self._changed.wait(0.2)
                name = self._current.name if self._current else None
            if name and time.monotonic() - told_at >= NEWS_SECONDS:
                told_at = time.monotonic()
                say(f"waiting for the upload of {name}/ to {self.repositories[name]} {self._progress}".rstrip())

    def _stop(self) -> None:
        """Ends what is under way, at once."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            process = self._process
            self._changed.notify_all()
        if process is not None:
            process.kill()
        if self._worker.is_alive():
            self._worker.join(10)
        for leftover in self.output_dir.glob(".*.upload-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

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
        while True:
            with self._changed:
                while not (self._waiting or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    return
                name = next(iter(self._waiting))
                self._current = job = self._waiting.pop(name)
            try:
                problem = self._send(job)
            except Exception as error:  # whoever waits for this job must hear of it
                problem = f"{type(error).__name__}: {error}"
            finally:
                shutil.rmtree(job.folder, ignore_errors=True)
            self._settle(job, problem)

    def _settle(self, job: Job, problem: str | None) -> None:
        with self._changed:
            if problem is None:
                self._arrived[job.name] = job.version
                self.failed.pop(job.name, None)
            self._current = None
            if not self._is_closed and problem:
                self.failed[job.name] = problem
                say(f"warning: {job.name}/ could not be sent to {self.repositories[job.name]}: {problem}")
            self._changed.notify_all()

    def _send(self, job: Job) -> str | None:
        """Why it could not be sent; None when it was."""
        repository, private = self.repositories[job.name], self.settings.hub_private
        how = ["--private" if private else "--public", "--staged"]
        command = [sys.executable, "-m", "finetuning.hub", "upload", str(job.folder.resolve()), "--repo", repository]
        with self._changed:
            if self._is_closed:
                return "the run has ended"
            self._progress = ""
            pipes: dict[str, Any] = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
            self._process = process = subprocess.Popen(
                [*command, *how], **pipes, cwd=PROJECT, env=_environment(), start_new_session=True
            )
        said: list[str] = []
        reader = threading.Thread(target=self._read_progress, args=(process.stderr, said.append), daemon=True)
        reader.start()
        for line in process.stdout:
            self._tell(job, line.decode(errors="replace").strip())
        reader.join()
        code = process.wait()
        process.stdin.close()
        with self._changed:
            self._process = None
        if code == 0:
            return None
        last = said[-1] if said else ""
        return last.removeprefix("error: ") or f"its process ended with code {code}"

    def _tell(self, job: Job, line: str) -> None:
        """What the process says, without its first line and where it is staged."""
        repository = self.repositories[job.name]
        if line.startswith(("Done: ", "Nothing was new: ")):
            word, _, url = line.partition(": ")
            say(f"{job.name}/ {'is on the Hub' if word == 'Done' else 'was on the Hub already'}: {url}")
        elif line.startswith(repository):  # an attempt that failed, or a remark
            say(f"upload of {job.name}/: {line}")

    def _read_progress(self, stream: IO[bytes], keep: Callable[[str], Any]) -> None:
        """Progress bars to ``_progress``, the other lines to ``keep``."""
        text = ""
        while chunk := os.read(stream.fileno(), 4096):
            *lines, text = re.split(r"[\r\n]", text + chunk.decode(errors="replace"))
            for line in lines:
                if bar := _BAR.search(line):
                    self._progress = f"({bar[1].strip()} {bar[2]} %)"
                elif line.strip() and "\x1b" not in line:
                    keep(line.strip())
        if text.strip() and not _BAR.search(text):
            keep(text.strip())

    def _tell_how(self, names: Sequence[str], words: str) -> None:
        for name in names:
            folder, reason = self.output_dir / name, self.failed.get(name)
            because = f" ({reason})" if reason else ""
            command = upload_command(folder, self.repositories[name], self.settings.hub_private)
            say(f"warning: {folder} {words}{because}\n  {command}")


def _environment() -> dict[str, str]:
    """Of the process of an upload: the token comes to it here, and never by its command line."""
    left_out = (*LAUNCH_VARIABLES, REPORT_VARIABLE)
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"TQDM_MININTERVAL": "2", "PYTHONUNBUFFERED": "1"}
