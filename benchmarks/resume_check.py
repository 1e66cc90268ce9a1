"""The part of gpu_check.py that asks whether a run survives: memory that does not suffice, gradients that are not
finite, a stop between two steps, several GPUs.

All of it goes through the project's own step (finetuning.stepping), saving (finetuning.saving) and launching.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState

from benchmarks.bench import (
    Bench,
    CheckFailed,
    Report,
    Skipped,
    free_unused_memory,
    own_settings,
    relative,
    within_limits,
)
from benchmarks.kill import write_rows
from finetuning.base_model import Base
from finetuning.checkpoint import CODEC_TABLE, Exporter
from finetuning.dataset import Batch, count_tokens
from finetuning.disk import bytes_of, damage, free_bytes
from finetuning.saving import Saver, state_bytes
from finetuning.settings import canonical_names
from finetuning.speakers import Speakers
from finetuning.state import State, state_folder, training_tensors
from finetuning.stepping import Stepper, Sums
from finetuning.trainer import Trainer, make_accelerator

PROJECT = Path(__file__).resolve().parent.parent

#: Largest relative differences of losses and gradient norms: of one step cut in other parts, in bf16; of steps after
#: restoring, on a GPU, where not every sum is made in the same order twice; of runs on one and several processes, fp32.
HALVED, RESTORED, SEVERAL = 1e-3, 1e-3, 1e-3
#: A step at this rate leaves the weights as good as they were, so that several steps can be compared.
NO_LEARNING_RATE = 1e-12
#: Steps that the schedules are made for: the rate differs from step to step.
NUM_SCHEDULED_STEPS = 20
#: Steps before and after a state is saved.
STEPS_BEFORE, STEPS_AFTER = 2, 3
#: An fp16 scale at which gradients overflow surely, and steps within which the scaler has halved it far enough.
FIRST_SCALE, MAX_SEARCH_STEPS = 2.0**40, 48
#: Host memory that saving may take beside one copy of what it writes at a time.
SPARE_BYTES = 2**30
#: A state is copied to the host in groups of about this size.
STATE_GROUP_BYTES = 2**30
#: The runs on several processes.
NUM_ROWS, NUM_STEPS, ROWS_OF_A_MICRO_BATCH = 24, 6, 4
#: A launch that takes longer hangs.
MAX_LAUNCH_SECONDS = 180.0
#: What is compared of their logs.
LOGGED = ("loss", "talker_loss", "sub_talker_loss", "grad_norm")


def check_recovery(report: Report, bench: Bench, recipe: str, parent: Path | None) -> None:
    """All that one process must survive.

    Args:
        parent: an existing folder on the disk to save on; None for the system's temporary one.
    """
    memory = GpuMemory(bench.device) if bench.is_cuda else None
    report.run(f"{recipe}: a step out of memory is halved", partial(check_out_of_memory, bench, recipe, memory))
    report.run(f"{recipe}: a step with NaN gradients changes nothing", partial(check_bad_gradients, bench, recipe))
    report.run(f"{recipe}: the host waits for no update", partial(check_waits, bench, recipe))
    report.run(f"{recipe}: fp16: the scaler's search is no skipped step", partial(check_scaler_search, bench, recipe))
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=parent) as name:
        saved = report.run(f"{recipe}: saves a checkpoint and a state", partial(save, bench, recipe, Path(name)))
        if saved is not None:
            report.run(f"{recipe}: goes on from the state", partial(check_restored, bench, recipe, saved))


# ------------------------------------------------------------------------------------------------------------- steps


def make_stepper(bench: Bench, recipe: str, **fields: Any) -> tuple[Any, Stepper]:
    """A new model and what trains it."""
    settings = own_settings(bench, **fields)
    # Accelerate keeps its precision for the life of a process.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(settings, bench.device.type)
    model, objective = bench.recipe(recipe)
    return model, Stepper(settings, accelerator, objective, NUM_SCHEDULED_STEPS)


def take(stepper: Stepper, *batches: Batch) -> Sums:
    """One step of these micro-batches."""
    return stepper.take(batches, *count_tokens(batches))


class StepFigures(NamedTuple):
    """What a step did: mean losses, and the gradient norm before clipping."""

    talker_loss: float
    sub_talker_loss: float
    gradient_norm: float

    @classmethod
    def of(cls, sums: Sums) -> StepFigures:
        talker, sub_talker, num_talker, num_sub_talker = sums.totals.tolist()
        return cls(talker / max(num_talker, 1), sub_talker / max(num_sub_talker, 1), float(sums.gradient_norm))

    def __str__(self) -> str:
        return f"losses {self.talker_loss:.4f} and {self.sub_talker_loss:.4f}, gradient norm {self.gradient_norm:.3f}"


def largest_difference(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Relative; NaN when one of them is."""
    differences = [relative(*pair) for pair in zip(found, wanted, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def content_of(stepper: Stepper) -> dict[str, str]:
    """A hash of every weight that trains and of what the optimizer keeps for it, by name."""
    import xxhash

    tensors = training_tensors(stepper.module, stepper.optimizer)
    content = ((name, tensor.detach().cpu().contiguous()) for name, tensor in tensors)
    return {name: xxhash.xxh3_128_hexdigest(tensor.reshape(-1).numpy().data) for name, tensor in content}


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names that are not the same bit for bit, or only in one of them."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


# ----------------------------------------------------------------------------------------------------- out of memory


class Peak(NamedTuple):
    """Bytes on the GPU: of tensors, and of the segments that hold them."""

    allocated: int
    reserved: int


class GpuMemory:
    """Measures and limits this process's memory on the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def peak_of(self, work: Callable[[], Any]) -> Peak:
        free_unused_memory()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return Peak(torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device))

    @contextlib.contextmanager
    def limited(self, num_bytes: int) -> Iterator[None]:
        """No more than that for this process inside."""
        free_unused_memory()
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(num_bytes / total, 1.0), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


def check_out_of_memory(bench: Bench, recipe: str, memory: GpuMemory | None) -> str:
    """A limit between the peaks of whole and of halved micro-batches: the step comes out as without it.

    There are two micro-batches, so that gradients lie in memory beside activations either way.
    """
    if memory is None:
        raise Skipped("needs CUDA")
    if bench.batch_size < 2:
        raise Skipped("needs --batch-size 2 or more")
    _, stepper = make_stepper(bench, recipe, learning_rate=NO_LEARNING_RATE, gradient_accumulation_steps=2)
    batches = (bench.batches[0], bench.batches[-1])
    peaks = {}
    for stepper.num_parts in (1, 2):
        take(stepper, *batches)  # afterwards Adam's moments are there, and libraries have their workspaces
        peaks[stepper.num_parts] = memory.peak_of(lambda: take(stepper, *batches))
    stepper.num_parts = 1
    wanted = StepFigures.of(take(stepper, *batches))
    halves, whole = peaks[2].reserved, peaks[1].allocated
    sizes = f"{whole / 2**30:.2f} GiB whole, {halves / 2**30:.2f} GiB in halves"
    if halves >= whole:
        raise Skipped(f"halves do not save enough memory here ({sizes}); take a larger --batch-size")
    limit = (halves + whole) // 2
    with memory.limited(limit):
        found = StepFigures.of(take(stepper, *batches))
    figures = f"{sizes}, limit {limit / 2**30:.2f} GiB; {stepper.num_parts} parts, {found}"
    if stepper.num_parts == 1:
        raise CheckFailed(f"the step fitted, {figures}")
    losses = largest_difference(found[:2], wanted[:2])
    norm = relative(found.gradient_norm, wanted.gradient_norm)
    return f"{figures}; {within_limits(losses=(losses, HALVED), norm=(norm, HALVED))}"


# ------------------------------------------------------------------------------------------------ non-finite gradients


@contextlib.contextmanager
def poisoned(stepper: Stepper) -> Iterator[None]:
    """The gradient of one weight is NaN inside."""
    weight = next(weight for weight in stepper.module.parameters() if weight.requires_grad)
    hook = weight.register_hook(lambda gradient: gradient * math.nan)
    try:
        yield
    finally:
        hook.remove()


def check_bad_gradients(bench: Bench, recipe: str) -> str:
    """Weights, moments and step counts stay bit for bit, the step is counted, and the next one learns."""
    _, stepper = make_stepper(bench, recipe)
    batch = bench.batches[0]
    for _ in range(2):
        take(stepper, batch)
    before = content_of(stepper)
    with poisoned(stepper):
        sums = take(stepper, batch)
    after, counted, norm = content_of(stepper), stepper.skips.read()[0], float(sums.gradient_norm)
    next_one = StepFigures.of(take(stepper, batch))
    num_moved = len(changed(after, content_of(stepper)))
    figures = f"gradient norm {norm}, {counted} step counted, {num_moved} of {len(before)} tensors moved by the next"
    problems = {
        f"{len(changed(before, after))} tensors changed": changed(before, after),
        "the gradient was not poisoned": math.isfinite(norm),
        "the step was not counted once": counted != 1,
        "its losses were added up": sums.totals.any().item(),
        "the next step did not learn": num_moved == 0 or not math.isfinite(next_one.gradient_norm),
    }
    if any(problems.values()):
        raise CheckFailed("; ".join([*(text for text, is_so in problems.items() if is_so), figures]))
    return f"{figures}, {next_one}"


@contextlib.contextmanager
def noted_waits() -> Iterator[list[list[traceback.FrameSummary]]]:
    """The Python stacks, outermost frame first, of operations in which the host waits for the GPU."""
    stacks: list[list[traceback.FrameSummary]] = []

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            stacks.append(list(traceback.extract_stack()))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield stacks
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_waits(bench: Bench, recipe: str) -> str:
    """From the last backward on, a step queues its work without asking the GPU, a skipped one as well.

    Micro-batches are copied and rows of frames picked in the forward, which do wait; that is said and no failure.
    """
    if not bench.is_cuda:
        raise Skipped("needs CUDA")
    _, stepper = make_stepper(bench, recipe)
    return waits_of(stepper, bench.batches[0])


def waits_of(stepper: Stepper, batch: Batch) -> str:
    """That nothing waits in a poisoned step; CheckFailed with the lines of this project that do."""
    for _ in range(2):
        take(stepper, batch)
    with poisoned(stepper), noted_waits() as stacks:
        take(stepper, batch)
    if stacks:
        raise CheckFailed(f"waits: {place_names(stacks)}")
    return "none, from the copies to the update"


def place_names(stacks: Sequence[list[traceback.FrameSummary]]) -> str:
    """Where in this project the stacks end, with how many of them."""
    ours = str(PROJECT / "finetuning")
    ends = [[frame for frame in stack if frame.filename.startswith(ours)][-1:] for stack in stacks]
    counts = Counter(f"{Path(f.filename).name}:{f.lineno} ({f.name})" for end in ends for f in end)
    return ", ".join(f"{count} x {place}" for place, count in counts.most_common())


def check_scaler_search(bench: Bench, recipe: str) -> str:
    """From a scale at which everything overflows, fp16 finds its own, counts no step as skipped, and learns."""
    if not bench.is_cuda:
        raise Skipped("needs CUDA")
    _, stepper = make_stepper(bench, recipe, mixed_precision="fp16")
    return search_of(stepper, bench.batches[0], FIRST_SCALE)


def search_of(stepper: Stepper, batch: Batch, first_scale: float) -> str:
    """Steps from that scale on until two were taken."""
    scaler = stepper.accelerator.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": first_scale})
    num_halved = num_taken = 0
    before = content_of(stepper)
    while num_halved + num_taken < MAX_SEARCH_STEPS and num_taken < 2:
        scale = scaler.get_scale()
        sums = take(stepper, batch)
        is_taken = scaler.get_scale() >= scale
        num_taken, num_halved = num_taken + is_taken, num_halved + (not is_taken)
    counted, scheduled = stepper.skips.read()[0], stepper.scheduler.last_epoch
    num_moved = len(changed(before, content_of(stepper)))
    figures = (
        f"scale {first_scale:g} halved {num_halved} times to {scaler.get_scale():g}, {num_taken} steps taken, "
        f"{scheduled} on the schedule, {counted} counted as skipped, {StepFigures.of(sums)}"
    )
    is_right = num_halved > 0 and num_taken == 2 == scheduled and counted == 0 and num_moved > 0
    if not is_right or not math.isfinite(float(sums.gradient_norm)):
        raise CheckFailed(figures)
    return figures


# ------------------------------------------------------------------------------------------------ saving and restoring


@dataclass(frozen=True)
class RandomBase(Base):
    """A base without weights on disk; an export of it is bf16 all over."""

    def weight_dtypes(self) -> dict[str, torch.dtype]:
        return {CODEC_TABLE: torch.bfloat16}

    @classmethod
    def make(cls, bench: Bench, folder: Path) -> RandomBase:
        (folder / "codec").mkdir(parents=True)
        (folder / "codec" / "config.json").write_text("{}\n", encoding="utf-8")
        (folder / "generation_config.json").write_text("{}\n", encoding="utf-8")
        return cls(f"random {bench.size}", folder, bench.config, folder / "codec")


class Bare:
    """A trainer with what saves it, on the bench's rows; it has no data and no logs."""

    def __init__(self, bench: Bench, recipe: str, folder: Path, name: str) -> None:
        self.bench, self.output = bench, folder / "output"
        model, self.stepper = make_stepper(bench, recipe, output_dir=self.output)
        speakers = Speakers(["reference"], bench.speaker_vectors(model).float().cpu(), [3000], [[]])
        base = RandomBase.make(bench, folder / f"base of {name}")
        self.exporter = Exporter(
            self.stepper.settings, base, model, self.stepper.module, speakers, self.stepper.accelerator
        )
        self.saver = Saver(self.stepper.settings, self.exporter, {}, speakers.vectors)
        no_logs = SimpleNamespace(flush=lambda: None, to_json=dict, figures_at=lambda _: {})
        no_rows = SimpleNamespace(num_rows=1)
        self.trainer = Trainer(
            self.stepper.settings, self.stepper, no_rows, None, self.saver, no_logs, NUM_SCHEDULED_STEPS
        )

    def take_steps(self, number: int) -> list[tuple[float, ...]]:
        """(talker loss, sub-talker loss, gradient norm, learning rate) of each."""
        figures = []
        for _ in range(number):
            step = self.trainer.progress.step
            sums = take(self.stepper, self.bench.batches[step % len(self.bench.batches)])
            figures.append((*StepFigures.of(sums), self.stepper.learning_rate))
            self.trainer.progress.step += 1
        return figures


@dataclass(frozen=True)
class Written:
    """What it took to write a folder.

    Attributes:
        host_bytes: private memory at most, over what it was before.
    """

    name: str
    num_bytes: int
    seconds: float
    host_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.name} of {self.num_bytes / 1e9:.3f} GB in {self.seconds:.1f} s = "
            f"{self.num_bytes / 1e9 / self.seconds:.2f} GB/s with {self.host_bytes / 1e9:.2f} GB of host memory"
        )


@dataclass(frozen=True)
class Saved:
    """A saved run and what it did next.

    Attributes:
        content: see ``content_of``; when it was saved, and after the steps that followed.
        steps: see ``Bare.take_steps``; those that followed.
    """

    folder: Path
    output: Path
    written: Sequence[Written]
    content: dict[str, str]
    content_after: dict[str, str]
    steps: list[tuple[float, ...]]

    def __str__(self) -> str:
        return "; ".join(map(str, self.written))


def save(bench: Bench, recipe: str, folder: Path) -> Saved:
    """Takes some steps, writes a checkpoint and a state, and takes some more.

    Raises:
        Skipped: there is no room on the disk.
        CheckFailed: something could not be written, is damaged, or took too much host memory.
    """
    run = Bare(bench, recipe, folder, "the run that is saved")
    needed = run.exporter.required_bytes() + state_bytes(run.exporter.model)
    if free_bytes(folder) < 1.1 * needed:
        raise Skipped(f"needs {1.1 * needed / 1e9:.0f} GB on the disk, see --folder")
    run.take_steps(STEPS_BEFORE)
    written = [
        measured_save(run, ["last"], run.output / "last"),
        measured_save(run, [], state_folder(run.output, STEPS_BEFORE)),
    ]
    allowed = (written[0].num_bytes + SPARE_BYTES, STATE_GROUP_BYTES + SPARE_BYTES)
    if any(one.host_bytes > limit for one, limit in zip(written, allowed, strict=True)):
        limits = " and ".join(f"{limit / 1e9:.2f}" for limit in allowed)
        raise CheckFailed(f"{'; '.join(map(str, written))}; at most {limits} GB of host memory were expected")
    content = content_of(run.stepper)
    steps = run.take_steps(STEPS_AFTER)
    return Saved(folder, run.output, written, content, content_of(run.stepper), steps)


def measured_save(run: Bare, names: Sequence[str], target: Path) -> Written:
    """Writes the checkpoints of these names, or without names the state."""
    run.bench.synchronize()
    with HostMemory() as memory, contextlib.redirect_stdout(io.StringIO()) as said:
        start = time.perf_counter()
        run.saver.save(run.trainer, names, with_state=not names, epoch=0)
        seconds = time.perf_counter() - start
    if problems := damage(target):
        raise CheckFailed(f"{target.name}/ was not saved: {'; '.join(problems)}. {said.getvalue().strip()}")
    return Written("a checkpoint" if names else "a state", bytes_of(target), seconds, memory.highest - memory.before)


def check_restored(bench: Bench, recipe: str, saved: Saved) -> str:
    """A new run takes up the state bit for bit, and its next steps are those of the run that was saved."""
    run = Bare(bench, recipe, saved.folder, "the run that goes on")
    run.bench.synchronize()
    start = time.perf_counter()
    run.saver.restore(run.trainer, State(state_folder(saved.output, STEPS_BEFORE)))
    run.bench.synchronize()
    seconds = time.perf_counter() - start
    if different := changed(saved.content, content_of(run.stepper)):
        raise CheckFailed(f"{len(different)} tensors are not those of the state, such as {different[0]}")
    steps = run.take_steps(STEPS_AFTER)
    same_bits = steps == saved.steps and not changed(saved.content_after, content_of(run.stepper))
    restored = f"restored in {seconds:.1f} s; the next {STEPS_AFTER} steps are "
    if same_bits:
        return restored + "bit-identical in losses, gradient norms, rates and weights"
    if not bench.is_cuda:
        raise CheckFailed(f"{restored}not bit-identical, though a CPU computes the same twice: {steps}, {saved.steps}")
    off = max(largest_difference(found, wanted) for found, wanted in zip(steps, saved.steps, strict=True))
    return f"{restored}not bit-identical: {within_limits(figures=(off, RESTORED))}"


class HostMemory:
    """Watches this process's private memory (RssAnon), in bytes: before and at its highest."""

    def __enter__(self) -> HostMemory:
        self.before = self.highest = private_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.highest = max(self.highest, private_bytes())


def private_bytes() -> int:
    """RssAnon of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


# --------------------------------------------------------------------------------------------------- several processes


def check_launches(report: Report, bench: Bench, parent: Path | None) -> None:
    """Runs of train.py on the tiny model, one process a GPU, against one process with the whole batch."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=parent) as name:
        launches = Launches(Path(name), bench.device.type)
        for title, config, number in (
            ("FSDP over one process", "fsdp.yaml", 1),
            ("DDP over two processes", "single_machine.yaml", 2),
            ("FSDP over two processes", "fsdp.yaml", 2),
        ):
            report.run(f"{title} trains as one without", partial(check_launch, launches, config, number))


def check_launch(launches: Launches, config: str, num_processes: int) -> str:
    if launches.device != "cuda":
        raise Skipped("needs CUDA")
    if torch.cuda.device_count() < num_processes:
        raise Skipped(f"needs {num_processes} GPUs")
    return launches.compare(config, num_processes)


class Launches:
    """Runs of the same rows and steps, each in a folder of its own."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        (folder / "no.env").touch()
        write_rows(folder / "train.jsonl", NUM_ROWS, seed=0)

    def compare(self, config: str, num_processes: int) -> str:
        """Largest differences of the logged figures to those of one process.

        Raises:
            CheckFailed: a run ended badly, or a figure is out of its limit.
        """
        options = ["--config_file", str(PROJECT / "configs" / config), "--num_processes", str(num_processes)]
        launcher = [sys.executable, "scripts/launch.py", *options, "train.py"]
        start = time.perf_counter()
        found = self._log_of(f"{num_processes} x {config}", launcher, num_processes)
        seconds = time.perf_counter() - start
        wanted = self._alone
        if len(found) != len(wanted):
            raise CheckFailed(f"{len(found)} steps were logged instead of {len(wanted)}")
        differences = {
            name: (largest_difference([line[name] for line in found], [line[name] for line in wanted]), SEVERAL)
            for name in LOGGED
        }
        return f"{len(found)} steps in {seconds:.0f} s with the start; {within_limits(**differences)}"

    @cached_property
    def _alone(self) -> list[dict[str, Any]]:
        return self._log_of("alone", [sys.executable, "train.py"], 1)

    def _log_of(self, name: str, command: list[str], num_processes: int) -> list[dict[str, Any]]:
        """The training log of a run."""
        output = self.folder / name / "output"
        own = {
            "ENV_FILE": str(self.folder / "no.env"),
            "DEVICE": self.device,
            "MIXED_PRECISION": "no",
            "ATTN_IMPLEMENTATION": "sdpa",
            "INIT_MODEL_PATH": "tiny-random",
            "TRAIN_JSONL": str(self.folder / "train.jsonl"),
            "VALIDATION_FRACTION": "0",
            "OUTPUT_DIR": str(output),
            "BATCH_SIZE": str(ROWS_OF_A_MICRO_BATCH // num_processes),
            "GRADIENT_ACCUMULATION_STEPS": "2",
            "NUM_EPOCHS": "10",
            "MAX_STEPS": str(NUM_STEPS),
            "LEARNING_RATE": "1e-4",
            "WARMUP_STEPS": "0",
            "LOGGING_STEPS": "1",
            "SAMPLE_STEPS": "0",
            "DATA_CHECK": "off",
            "USE_WANDB": "false",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        kept = {name: value for name, value in os.environ.items() if name not in canonical_names()}
        problem, printed = run_and_read(command, kept | own)
        if problem:
            raise CheckFailed(f"{name}: {problem}: {printed[-1500:]}")
        return [json.loads(line) for line in (output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]


def run_and_read(command: list[str], environment: dict[str, str]) -> tuple[str, str]:
    """What went wrong ("" for nothing) and what was printed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, text=True, **pipes)
    try:
        printed, _ = process.communicate(timeout=MAX_LAUNCH_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGQUIT)  # at which the launcher of torch ends its processes
        printed, _ = process.communicate()
        return f"ran for more than {MAX_LAUNCH_SECONDS:.0f} s", printed
    return f"exit code {process.returncode}" if process.returncode else "", printed
