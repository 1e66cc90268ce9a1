"""Kills a training process again and again, resumes it each time, and compares the end with a run that nobody touched.

    python benchmarks/kill.py --kills 50 --seed 1               # rows of a JSONL file
    python benchmarks/kill.py --kills 10 --mode direct          # rows streamed from a dataset
    python benchmarks/kill.py --kills 10 --workers 2 --keep DIR # with data workers; the runs stay in DIR

The runs are real ones of train.py on the embedded tiny model (CPU, fp32, one thread, 15 steps), in processes of their
own that are ended by SIGKILL from outside. The first one is started as ``python train.py``; the others are forked from
a process that has imported everything and calculated nothing, which saves seconds each. They tell over a pipe what they
are about to do, and can be held right before or after a chosen file operation, so that moments of microseconds are hit
as well. When a run has come to its end another one is begun, until there were as many kills as asked for.

What must hold after every kill is in ``Watch`` and ``check_folders``, at the end of every run in ``differences``.

Exit code 0 when all of it did, else 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import select
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

#: Before anything is imported that reads them: sums depend on the number of threads, and forking wants none.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
#: Logged lines and epochs (5 steps) reach over the saved steps, so that a state holds half of their sums.
SAVE_STEPS, LOGGING_STEPS, EVAL_STEPS, NUM_STEPS = 4, 3, 3, 15
SETTINGS = {
    "DEVICE": "cpu",
    "MIXED_PRECISION": "no",
    "INIT_MODEL_PATH": "tiny-random",
    "USE_WANDB": "false",
    "REPLACE_LAST_N_LAYERS": "0",
    "ADD_NEW_LAYERS": "0",
    "FREEZE_ORIGINAL_LAYERS": "false",
    "BATCH_SIZE": "2",
    "GRADIENT_ACCUMULATION_STEPS": "2",
    "NUM_EPOCHS": "3",
    "LEARNING_RATE": "1e-3",
    "WARMUP_STEPS": "1",
    "LOGGING_STEPS": str(LOGGING_STEPS),
    "SAVE_STEPS": str(SAVE_STEPS),
    "EVAL_STEPS": str(EVAL_STEPS),
    "SAMPLE_STEPS": "0",
    "SAVE_TOTAL_LIMIT": "1",
}
#: 5 steps an epoch, the last one of a micro-batch alone.
NUM_ROWS, NUM_VALIDATION_ROWS = 18, 2

#: Spans of time inside which a process is killed.
PHASES = ("starting", "training", "saving a checkpoint", "saving a state", "rotating", "validating")
#: Uniform in the time that the untouched run took.
ANY_TIME = "any time"
#: File operations of a run at which a process is held and killed; "removing" is each file and folder of a tree.
OPERATIONS = ("before a rename", "after a rename", "removing", "writing")
#: The first kill, of a process that was started as the user starts it.
PLAIN = "python train.py"
#: Moments are drawn from the first so many times of a phase in a process, and from such a part of the operations of a
#: whole run, because a resumed process has fewer.
MAX_NUMBER, PARTS_OF_A_RUN = 3, 3
#: A process that tells nothing for so long hangs.
MAX_SILENT_SECONDS = 120.0
#: Figures of a log line that depend on the clock.
CLOCK = ("timestamp", "frames_per_second", "seconds_left")
LOGS = ("training_log.jsonl", "validation_log.jsonl", "alarms.jsonl")
#: What run.json says of the starts of a run, which are others.
STARTS = ("timestamp", "begun_at_step", "resumed")
#: Tensors of a state; see ``hash_of_tensors``.
PYTHON_GENERATOR = re.compile(r"process\.\d+\.python(_gauss)?")
_CHECKPOINT = re.compile(r"best|last|(checkpoint|epoch)-\d+")


def main() -> None:
    """Makes the rows, the untouched run and the killed ones; prints a line for each kill and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--mode", choices=("jsonl", "direct"), default="jsonl", help="DATA_MODE (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="NUM_WORKERS (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this new folder and leave the runs there")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    import_all()
    print(f"{options.kills} kills, seed {options.seed}, DATA_MODE={options.mode}, NUM_WORKERS={options.workers}")
    with work_folder(options.keep) as folder:
        try:
            kill_and_compare(Runs(folder, options.mode, options.workers), options.kills, random.Random(options.seed))
        except Failed as failed:
            print(f"✗ {failed}", flush=True)
            sys.exit(1)


def import_all() -> None:
    """What training imports, once for all processes that are forked; starts no thread that calculates."""
    import matplotlib.backends.backend_agg  # noqa: F401
    import qwen_tts  # noqa: F401

    import train  # noqa: F401
    from finetuning import claiming, session  # noqa: F401


@contextmanager
def work_folder(keep: Path | None) -> Iterator[Path]:
    """The folder of all runs, and the working directory of their processes."""
    if keep:
        keep.mkdir(parents=True)
        yield keep.resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="kill-", ignore_cleanup_errors=True) as name:
            yield Path(name).resolve()


class Failed(Exception):
    """Something that must hold does not."""


def kill_and_compare(runs: Runs, num_kills: int, generator: random.Random) -> None:
    """Raises Failed with the first thing that does not hold."""
    runs.make_rows()
    known = Known()
    untouched = Watch(runs, "untouched", known)
    child = untouched.train(None)
    untouched.check_end()
    figures = Figures(child)
    print(f"untouched: {NUM_STEPS} steps in {child.seconds:.1f} s; {figures.describe()}", flush=True)
    moments = draw_moments(figures, generator)
    met: Counter[str] = Counter()
    moment = next(moments)
    number = 0
    while met.total() < num_kills:
        number += 1
        watch = Watch(runs, f"run {number}", known)
        moment = kill_until_it_ends(watch, moment, moments, met, num_kills)
        watch.check_end()
        if problems := differences(watch, untouched):
            raise Failed(f"{watch.name} did not end like the untouched one: " + "; ".join(problems[:8]))
        print(f"{watch.name} ended like the untouched one", flush=True)
    counted = ", ".join(f"{count} {phase}" for phase, count in met.items())
    print(f"✓ {met.total()} kills in {number} runs ({counted}): every run ended bit for bit like the untouched one")


def kill_until_it_ends(
    watch: Watch, moment: Moment, moments: Iterator[Moment], met: Counter[str], num_kills: int
) -> Moment:
    """One run. A kill beside its moment does not count; a moment that did not come is left for the next run."""
    while (child := watch.train(moment if met.total() < num_kills else None)).was_killed:
        if was_met := moment.was_met(child):
            met[moment.phase] += 1
        number = f"kill {met.total():3d}" if was_met else "kill   –"
        what = moment.phase if was_met else f"{moment.phase} (missed)"
        print(f"{number}  {watch.name}  step {child.step:2d}  {what:29s}  {watch.describe()}", flush=True)
        moment = next(moments) if was_met else moment.earlier()
    return moment.earlier()


# --------------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Runs:
    """What all runs share.

    Attributes:
        folder: working directory; each run has its OUTPUT_DIR there.
    """

    folder: Path
    mode: str
    num_workers: int

    def output(self, name: str) -> Path:
        return self.folder / name / "output"

    def settings(self, name: str) -> dict[str, str]:
        """Environment variables of one run."""
        own = {"OUTPUT_DIR": str(self.output(name)), "NUM_WORKERS": str(self.num_workers)}
        if self.mode == "jsonl":
            data = {"TRAIN_JSONL": "train.jsonl", "VALIDATION_JSONL": "validation.jsonl"}
        else:
            data = {
                "DATA_MODE": "direct",
                "DATASET_NAME": str(self.folder / "dataset"),
                "REF_AUDIO_PATH": str(PROJECT / "voices" / "english_voice" / "clips" / "train_05.flac"),
                "CODES_CACHE_DIR": str(self.folder / name / "codes"),  # so that kills fall into encoding, too
                "VALIDATION_FRACTION": str(NUM_VALIDATION_ROWS / (NUM_ROWS + NUM_VALIDATION_ROWS)),
            }
        return SETTINGS | own | data

    def make_rows(self) -> None:
        """Writes the rows that the mode reads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.mode == "jsonl":
            write_rows(self.folder / "train.jsonl", NUM_ROWS, seed=1)
            write_rows(self.folder / "validation.jsonl", NUM_VALIDATION_ROWS, seed=2)
        else:
            write_dataset(self.folder / "dataset", NUM_ROWS + NUM_VALIDATION_ROWS)


def demo_rows(count: int) -> list[dict[str, Any]]:
    """Rows of the demo voice, with absolute paths."""
    voice = PROJECT / "voices" / "english_voice"
    lines = (voice / "train_raw.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:count]]
    return [row | {key: str(voice / row[key]) for key in ("audio", "ref_audio")} for row in rows]


def write_rows(file: Path, count: int, seed: int) -> None:
    """Demo rows with random codes of random lengths."""
    generator = random.Random(seed)
    with file.open("w", encoding="utf-8") as stream:
        for row in demo_rows(count):
            num_frames = generator.randint(8, 40)
            codes = [[generator.randrange(2048) for _ in range(16)] for _ in range(num_frames)]
            stream.write(json.dumps(row | {"audio_codes": codes}) + "\n")


def write_dataset(folder: Path, count: int) -> None:
    """train.csv and short clips of noise beside it."""
    import numpy as np
    import soundfile

    (folder / "clips").mkdir(parents=True, exist_ok=True)
    lines = ["audio,text"]
    for number in range(count):
        samples = np.random.default_rng(number).normal(0, 0.1, 12_000 + 800 * number)
        soundfile.write(folder / "clips" / f"{number}.wav", samples, 24_000)
        lines.append(f"clips/{number}.wav,Sentence number {number}.")
    (folder / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass
class Known:
    """What was found so far; the same must be found again in every run.

    Attributes:
        checkpoints: step -> hash of the weights and the configuration of every checkpoint of that step.
        states: progress as JSON -> hash of the tensors of every state of that progress.
    """

    checkpoints: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)


class Watch:
    """One run from its first process to its last, and what must hold on the way.

    Attributes:
        rows: step -> line numbers of the rows of its micro-batches.
    """

    def __init__(self, runs: Runs, name: str, known: Known) -> None:
        self.runs, self.name, self.known, self.output = runs, name, known, runs.output(name)
        self.rows: dict[int, list[list[int]]] = {}
        self._num_processes = 0
        self._begun_after: list[int] = []
        self._last_begin, self._left = "?", ""  # of the last process

    def train(self, moment: Moment | None) -> Child:
        """One process, up to its end or the moment at which it is killed; checks what it leaves."""
        self._num_processes += 1
        log = self.output.parent / f"process-{self._num_processes:03d}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        child = start_child(self.runs.settings(self.name), self.runs.folder, log, moment)
        child.run_until(moment, self.output)
        if child.exit_code not in (0, -signal.SIGKILL):
            tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise Failed(f"{self.name}: process {self._num_processes} ended with exit code {child.exit_code}:\n{tail}")
        self._check_begin(child)
        self._check_rows(child)
        self._check_folders()
        return child

    def describe(self) -> str:
        return f"begun after {self._last_begin:>2}, left {self._left}"

    def _check_begin(self, child: Child) -> None:
        """At most SAVE_STEPS steps are lost."""
        furthest, self._last_begin = max(self.rows, default=0), "–"
        for event in child.events:
            if event["what"] == "begin":
                self._begun_after.append(event["step"])
                self._last_begin = str(event["step"])
                if event["step"] < furthest - SAVE_STEPS:
                    raise Failed(f"{self.name}: began after step {event['step']}, though step {furthest} was under way")

    def _check_rows(self, child: Child) -> None:
        """A step sees the same rows each time."""
        for event in child.events:
            if (lines := event.get("lines")) and self.rows.setdefault(event["step"], lines) != lines:
                raise Failed(f"{self.name}: step {event['step']} saw {lines}, before {self.rows[event['step']]}")

    def _check_folders(self) -> None:
        known = set(self.known.checkpoints.values())
        found = in_fork(lambda: check_folders(self.output, known))
        problems = found["problems"]
        for kind, before in (("checkpoints", self.known.checkpoints), ("states", self.known.states)):
            for name, (key, content) in found[kind].items():
                if before.setdefault(key, content) != content:
                    problems.append(f"{name}/ has another content than any run had at that point ({key})")
        if problems:
            raise Failed(f"{self.name}: process {self._num_processes} left: " + "; ".join(problems))
        self._left = ", ".join([*found["checkpoints"], *found["states"]]) or "nothing"

    def check_end(self) -> None:
        """All steps were taken; what the first process of a run took is known only where it told."""
        first = self._begun_after[0] if self._begun_after else NUM_STEPS
        wanted = list(range(first + 1, NUM_STEPS + 1))
        if sorted(self.rows) != wanted:
            raise Failed(f"{self.name}: the steps were {sorted(self.rows)}, not {wanted}")


# ----------------------------------------------------------------------------------------------------- what was left


def check_folders(output: Path, known: set[str]) -> dict[str, Any]:
    """Whether every checkpoint and state under its name is whole and loads.

    Args:
        known: hashes of checkpoints that were loaded before.

    Returns:
        ``problems``, ``checkpoints`` (name -> step, hash) and ``states`` (name -> progress, hash).
    """
    found: dict[str, Any] = {"problems": [], "checkpoints": {}, "states": {}}
    checkpoints = [folder for folder in sorted(output.glob("*")) if _CHECKPOINT.fullmatch(folder.name)]
    for folder in checkpoints:
        with _noted(found["problems"], folder):
            found["checkpoints"][folder.name] = checked_checkpoint(folder, known)
    for folder in sorted((output / "state").glob("step-*")):
        with _noted(found["problems"], folder):
            found["states"][folder.name] = checked_state(folder)
    return found


@contextmanager
def _noted(problems: list[str], folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        problems.append(f"{folder.name}/ is not whole: {type(error).__name__}: {error}")


def checked_checkpoint(folder: Path, known: set[str]) -> tuple[str, str]:
    """Its step and the hash of its weights and configuration; raises for one that stock qwen-tts does not load."""
    import torch
    from qwen_tts import Qwen3TTSModel

    from finetuning.disk import damage

    if problems := damage(folder):
        raise ValueError("; ".join(problems))
    step = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))["step"]
    content = hash_of(folder / "model.safetensors", folder / "config.json")
    if content not in known:
        Qwen3TTSModel.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="sdpa")
        known.add(content)
    return f"step {step}", content


def checked_state(folder: Path) -> tuple[str, str]:
    """Its progress and the hash of its tensors; raises for one that cannot be read."""
    from finetuning.state import State, damage_of_state

    if problems := damage_of_state(folder):
        raise ValueError("; ".join(problems))
    tensors = [hash_of_tensors(file) for file in sorted(folder.glob("*.safetensors"))]
    return json.dumps(State(folder).record["progress"]), " ".join(tensors)


def differences(found: Watch, wanted: Watch) -> list[str]:
    """What the end of a run has in another way than the untouched one."""
    problems = [f"step {step} saw {rows}" for step, rows in found.rows.items() if rows != wanted.rows[step]]
    files, wanted_files = files_below(found.output), files_below(wanted.output)
    problems += [f"{name} is there" for name in sorted(files - wanted_files)]
    problems += [f"{name} is not there" for name in sorted(wanted_files - files)]
    for name in sorted(files & wanted_files):
        if content_of(found.output / name) != content_of(wanted.output / name):
            problems.append(f"{name} is another one")
    return problems


def files_below(folder: Path) -> set[str]:
    """Relative paths of all files and folders."""
    return {entry.relative_to(folder).as_posix() for entry in folder.rglob("*")}


def content_of(path: Path) -> Any:
    """What must be the same in two runs: all of a file but clocks and the names of the runs' folders."""
    if path.is_dir():
        return None
    if path.name in LOGS:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{key: value for key, value in record.items() if key not in CLOCK} for record in records]
    if path.name == "settings.json":
        return without_folders(json.loads(path.read_text(encoding="utf-8")))
    if path.name == "run.json":
        record = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in record.items() if key not in STARTS}
        return kept | {"settings": without_folders(record["settings"])}
    if path.name == "state.json":
        record = json.loads(path.read_text(encoding="utf-8"))
        return record | {"settings": without_folders(record["settings"])}
    if path.name == "checksums.json" and path.parent.name.startswith("step-"):
        return None  # it has the hash of state.json
    return hash_of_tensors(path) if path.parent.name.startswith("step-") else hash_of(path)


def without_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that two runs share."""
    return {name: value for name, value in settings.items() if name not in ("OUTPUT_DIR", "CODES_CACHE_DIR")}


def hash_of(*files: Path) -> str:
    """Of the files' contents; not the checksum that the project itself uses."""
    content = hashlib.blake2b(digest_size=16)
    for file in files:
        content.update(file.read_bytes())
    return content.hexdigest()


def hash_of_tensors(file: Path) -> str:
    """Of a state's tensors, without the state of Python's own generator.

    Training never draws from that one, but libraries do when they are imported (rich, a number for its styles), and the
    forked processes imported them before the seed was set.
    """
    from safetensors.numpy import load_file

    content = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(load_file(file).items()):
        if not PYTHON_GENERATOR.fullmatch(name):
            content.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return content.hexdigest()


# ------------------------------------------------------------------------------------------------------- the moments


class Figures:
    """How long the untouched run was in each phase, and how often; so that a moment falls inside."""

    def __init__(self, child: Child) -> None:
        self.seconds = child.seconds
        self.spans: dict[str, list[float]] = {}
        entered: dict[str, float] = {}
        for event in child.events:
            if event["what"] == "enter":
                entered[event["phase"]] = event["at"]
            elif event["what"] == "leave":
                self.spans.setdefault(event["phase"], []).append(event["at"] - entered[event["phase"]])
        self.operations: dict[str, int] = child.events[-1]["operations"]

    def describe(self) -> str:
        spans = [f"{phase} {1000 * statistics.median(spans):.0f} ms" for phase, spans in self.spans.items()]
        operations = [f"{count} x {kind}" for kind, count in self.operations.items()]
        return ", ".join([*spans, *operations])


@dataclass(frozen=True)
class Moment:
    """When a process is killed: so many seconds into the phase, the n-th time that it comes; or at the n-th operation.

    Attributes:
        number: n, from 1.
    """

    phase: str
    number: int = 1
    delay_seconds: float = 0.0

    @property
    def is_operation(self) -> bool:
        return self.phase in OPERATIONS

    def starts_at(self, child: Child, output: Path) -> float | None:
        """The time from which the delay counts; None while it has not come."""
        if self.phase == ANY_TIME:
            return child.started_at
        if self.phase == PLAIN:
            return time.monotonic() if (output / LOGS[0]).exists() else None
        if self.is_operation:
            return next((event["at"] for event in child.events if event["what"] == "held"), None)
        entered = [event["at"] for event in child.events if (event["what"], event["phase"]) == ("enter", self.phase)]
        return entered[self.number - 1] if len(entered) >= self.number else None

    def was_met(self, child: Child) -> bool:
        """Whether the process was still in the phase when it was killed."""
        if self.phase not in PHASES or self.phase == ANY_TIME:
            return True
        kinds = Counter(event["what"] for event in child.events if event["phase"] == self.phase)
        return kinds["enter"] > kinds["leave"]

    def earlier(self) -> Moment:
        """The same kind sooner, for one that came too late."""
        return replace(self, number=1 + self.number // 2, delay_seconds=self.delay_seconds / 3)


def draw_moments(figures: Figures, generator: random.Random) -> Iterator[Moment]:
    """One of each kind in random order, again and again; the very first is of a process that was started alone."""
    yield Moment(PLAIN, delay_seconds=generator.uniform(0, 1))
    while True:
        kinds = [phase for phase in PHASES if phase in figures.spans] + [ANY_TIME, *OPERATIONS]
        generator.shuffle(kinds)
        for kind in kinds:
            yield draw_moment(kind, figures, generator)


def draw_moment(kind: str, figures: Figures, generator: random.Random) -> Moment:
    """A moment of that kind, uniform in its span of time or among its operations."""
    if kind == ANY_TIME:
        return Moment(kind, delay_seconds=generator.uniform(0, figures.seconds))
    if kind in OPERATIONS:
        return Moment(kind, generator.randint(1, max(1, figures.operations[kind] // PARTS_OF_A_RUN)))
    spans = figures.spans[kind]
    number = generator.randint(1, min(len(spans), MAX_NUMBER))
    return Moment(kind, number, generator.uniform(0, 0.9) * statistics.median(spans))


# ------------------------------------------------------------------------------------- the processes, from outside


class Child:
    """A process that trains, and what it tells.

    Attributes:
        events: dicts with ``what`` (begin, enter, leave, held, end), ``phase``, ``step``, ``at`` (seconds, monotonic).
        exit_code: negative for a signal; None while it runs.
    """

    def __init__(self, process: int, pipe: int) -> None:
        self.process, self.pipe = process, pipe
        self.started_at = self._heard_at = time.monotonic()
        self.seconds = 0.0
        self.events: list[dict[str, Any]] = []
        self.exit_code: int | None = None
        self._rest = b""

    @property
    def was_killed(self) -> bool:
        return self.exit_code == -signal.SIGKILL

    @property
    def step(self) -> int:
        """The last step that it told of; 0 where it told nothing."""
        return self.events[-1]["step"] if self.events else 0

    def run_until(self, moment: Moment | None, output: Path) -> None:
        """Waits for the end of the process, or for the moment to kill it."""
        kill_at = None
        while self.exit_code is None:
            if moment and kill_at is None and (start := moment.starts_at(self, output)) is not None:
                kill_at = start + moment.delay_seconds
            if kill_at is not None and time.monotonic() >= kill_at:
                os.kill(self.process, signal.SIGKILL)
                self._end(os.waitpid(self.process, 0)[1])
            elif time.monotonic() - self._heard_at > MAX_SILENT_SECONDS:
                os.kill(self.process, signal.SIGKILL)
                self._end(os.waitpid(self.process, 0)[1])
                raise Failed(f"a process told nothing for {MAX_SILENT_SECONDS:.0f} s")
            else:
                self._listen(0.02 if kill_at is None else min(0.02, max(0.0, kill_at - time.monotonic())))
                process, status = os.waitpid(self.process, os.WNOHANG)
                if process:
                    self._end(status)

    def _end(self, status: int) -> None:
        self.seconds = time.monotonic() - self.started_at
        self._listen(0.0)
        os.close(self.pipe)
        self.exit_code = os.waitstatus_to_exitcode(status)

    def _listen(self, max_seconds: float) -> None:
        """Takes what comes in that time, and all that is there."""
        while select.select([self.pipe], [], [], max_seconds)[0] and (content := os.read(self.pipe, 65536)):
            *lines, self._rest = (self._rest + content).split(b"\n")
            self.events += [json.loads(line) for line in lines]
            self._heard_at, max_seconds = time.monotonic(), 0.0


def start_child(settings: dict[str, str], folder: Path, log: Path, moment: Moment | None) -> Child:
    """Starts training in a process of its own, forked from this one unless the moment asks for a plain one."""
    readable, writable = os.pipe()
    if process := os.fork():
        os.close(writable)
        return Child(process, readable)
    exit_code = 1
    try:
        os.close(readable)
        os.chdir(folder)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if moment and moment.phase == PLAIN:
            os.execve(sys.executable, [sys.executable, str(PROJECT / "train.py")], clean_environment() | settings)
        exit_code = train_and_tell(settings, Teller(writable, log.parent, moment))
    except BaseException:
        traceback.print_exc()
    finally:  # nothing of the parent's is to be cleaned up here
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


def clean_environment() -> dict[str, str]:
    """This process's environment without settings."""
    from finetuning.settings import canonical_names

    names = {*canonical_names(), "ENV_FILE"}
    return {name: value for name, value in os.environ.items() if name not in names}


def in_fork(function: Callable[[], Any]) -> Any:
    """The JSON value that the function gives in a process of its own, so that this one stays fit for forking."""
    readable, writable = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.close(readable)
            with open(writable, "w", encoding="utf-8") as stream:
                json.dump(function(), stream)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable, encoding="utf-8") as stream:
        content = stream.read()
    os.waitpid(process, 0)
    return json.loads(content)


# -------------------------------------------------------------------------------------- the processes, from inside


class Teller:
    """The child's end: tells the parent where training is, and holds it at the operation that was asked for.

    Args:
        folder: whose files are watched.
    """

    def __init__(self, pipe: int, folder: Path, moment: Moment | None) -> None:
        self.pipe, self.folder = pipe, str(folder)
        self.hold_at = (moment.phase, moment.number) if moment and moment.is_operation else None
        self.operations = dict.fromkeys(OPERATIONS, 0)
        self.trainer: Any = None
        self._has_renamed = False

    def tell(self, what: str, phase: str = "", **more: Any) -> None:
        step = self.trainer.progress.step if self.trainer else 0
        event = {"what": what, "phase": phase, "step": step, "at": time.monotonic()} | more
        os.write(self.pipe, (json.dumps(event) + "\n").encode())

    def wrap(self, owner: Any, name: str, phase: str, note: Callable[..., dict[str, Any]] | None = None) -> None:
        """Has a function or method tell when it is entered and left; nothing else of it changes."""
        original = getattr(owner, name)

        def told(*arguments: Any, **named: Any) -> Any:
            self.tell("enter", phase, **(note(*arguments) if note else {}))
            try:
                return original(*arguments, **named)
            finally:
                self.tell("leave", phase)

        setattr(owner, name, told)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: Python calls it before every file operation."""
        if self._has_renamed:
            self._has_renamed = False
            self._count("after a rename", "")
        if event in ("os.rename", "os.remove", "os.rmdir"):
            kind, path, descriptor = "removing", arguments[0], arguments[2 if event == "os.rename" else 1]
            if event == "os.rename":
                kind = "before a rename"
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            kind, path, descriptor = "writing", arguments[0], -1
        else:
            return
        if isinstance(path, (str, os.PathLike)) and (name := self._watched(os.fspath(path), descriptor)):
            self._count(kind, name)
            self._has_renamed = kind == "before a rename"

    def _watched(self, path: str, descriptor: int) -> str:
        """The path if it lies in the run's folder, else ""."""
        folder = os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else os.getcwd()
        whole = os.path.join(folder, path)
        return whole if whole.startswith(self.folder) else ""

    def _count(self, kind: str, name: str) -> None:
        self.operations[kind] += 1
        if (kind, self.operations[kind]) == self.hold_at:
            self.tell("held", kind, file=name)
            time.sleep(MAX_SILENT_SECONDS)


def train_and_tell(settings: dict[str, str], teller: Teller) -> int:
    """``train.train`` with the settings, telling the teller; the exit code."""
    import torch

    import train
    from finetuning import checkpoint, claiming, saving, state, stepping, trainer, validation
    from finetuning.settings import load_settings

    torch.set_num_threads(1)

    def begins(this: Any) -> dict[str, Any]:
        teller.trainer = this
        teller.tell("begin")
        return {}

    def sees(_: Any, batches: Any, *__: Any) -> dict[str, Any]:
        return {"step": teller.trainer.progress.step + 1, "lines": [batch["lines"].tolist() for batch in batches]}

    teller.wrap(claiming, "claim_output_folder", "starting")
    teller.wrap(trainer.Trainer, "run", "running", begins)
    teller.wrap(stepping.Stepper, "take", "training", sees)
    teller.wrap(checkpoint.Exporter, "save", "saving a checkpoint")
    teller.wrap(saving, "save_state", "saving a state")
    teller.wrap(state, "remove_folder", "rotating")
    teller.wrap(checkpoint, "remove_folder", "rotating")
    teller.wrap(validation.Validator, "evaluate", "validating")
    sys.addaudithook(teller.hear)
    train.train(load_settings(environment=settings))
    teller.tell("end", operations=teller.operations)
    return 0


if __name__ == "__main__":
    main()
