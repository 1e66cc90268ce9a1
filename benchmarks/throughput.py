"""How fast this project trains, against the plain loop: same rows, recipe, precision and batch size, in one process.

python benchmarks/throughput.py --size small --device cpu --all              # what a CPU must reach; 45 minutes
python benchmarks/throughput.py --size small --device cpu --all --steps 4 --rounds 2   # the same with few rows; ten
python benchmarks/throughput.py --size 1.7b --all                            # what a GPU must reach, in one command
python benchmarks/throughput.py --recipe layers --set SUB_TALKER_FRAME_FRACTION=0.25 PREFIX_CACHE=ram
python benchmarks/throughput.py --size small --device cpu --levers           # each lever off, some others on
python benchmarks/throughput.py --size tiny --device cpu --steps 2 --all     # the script itself

Both take turns: first one untimed pass over the rows each, then ``--rounds`` timed ones. A ratio is the median of the
rounds' own ratios. The rows are random, of realistic lengths (log-normal, 6 s on average, 1-20 s); what a step costs
does not depend on what they hold. The time is that from rows in memory to changed weights: sampling, collation, copies,
forward, backward, clipping, optimizer. Reading and tokenizing rows is in neither. On a CPU the ratio of the processor's
own time is printed as well: where other programs run beside, it means more than the clock.

**The plain loop** (``plain_loop.py``): batches of rows in random order, padded to the longest; the speaker encoder in
every step; 15 embedding tables read over padding; all hidden states and all logits kept; plain ``torch.optim.AdamW``.
It trains what a script trains that does not ask: in ``full`` everything, with gradients and moments for the text table
too; in ``layers`` the same replaced and added layers, the base's other layers with ``requires_grad`` off and everything
else trained, so that back-propagation goes through the frozen layers down to the embeddings; in ``lora`` the adapters
alone. With ``--precision bf16-weights`` its whole model is bf16.

**Ours** is the sampler, the loader, the objective and the stepper of a run, with settings as a run has them.
``lora`` puts adapters of rank 8 on every projection of talker and sub-talker through peft and freezes the rest. Under
bf16 autocast frozen matrices are bf16, as a run keeps those of the release.

**Model FLOPs utilisation** = operations that the recipe needs / seconds / what the device can do. A row of L positions
and F frames, of which the sub-talker trains on F' = F x SUB_TALKER_FRAME_FRACTION, needs forward::

    2 x (weights of the talker's layers + text_projection) x L  +  2 x L^2 x heads x head_dim x layers    (causal)
    + 2 x weights of codec_head x (F + 1)
    + 2 x (weights of the sub-talker's layers + small_to_mtp_projection) x 16 x F' + 2 x weights of its 15 heads x F'
    + 2 x 16^2 x heads x head_dim x layers x F'

then the same for gradients of inputs (only above what trains), and again for gradients of the weights that train: in
``full`` 3 x all that. Padding, repeated passes and kept prefixes count nothing; see ``flops.py``. What a device can do
is the maker's figure for dense bf16, or (a CPU, fp32, an unknown GPU) the speed of a matrix product measured here.

Memory is ``torch.cuda.max_memory_allocated`` while one of them trains, without what the other one holds. On a CPU it is
not measured: the high-water mark of a process cannot be told apart by round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench import Bench, CheckFailed, Report, Skipped, free_unused_memory
from benchmarks.flops import peak_flops
from benchmarks.loops import PRECISIONS, OurWay, PlainWay, Variant, Way
from benchmarks.plain_parts import AllLogitsAtOnce, ManyLookups, PaddedRows
from benchmarks.random_base import CLIP_MEAN_SECONDS, SIZES, clip_seconds
from finetuning.codec import FRAMES_PER_SECOND
from finetuning.errors import UserError, run_main
from finetuning.settings import canonical_names

RECIPE_NAMES = ("full", "layers", "lora")
FRACTION = {"sub_talker_frame_fraction": 0.25}
CACHE = {"prefix_cache": "ram"}
#: Steps of a memory goal: enough for the optimizer's states and the largest batches.
NUM_MEMORY_BATCHES = 3


def main() -> None:
    arguments = parse_arguments()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 in convolutions too, as it does in matrix products
    report = Report()
    bench = Bench(arguments, clip_seconds(arguments.steps * arguments.batch_size))
    print(f"{bench}\n{arguments.rounds} timed rounds after one untimed", flush=True)
    if arguments.all:
        for goal in GOALS[bench.device.type if arguments.all == "own" else arguments.all]:
            report.run(goal.title, partial(goal.check, arguments, bench))
    elif arguments.levers:
        for variant in levers(arguments.recipe, bench.is_cuda):
            report.run(variant.name, partial(measure_lever, arguments, bench, variant))
    else:
        variant = Variant(fields=arguments.set)
        report.run(arguments.recipe, partial(against_plain, arguments, bench, arguments.recipe, variant))
    print(report.summary())
    if arguments.judge and report.num_failed:
        sys.exit(2)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.7b")
    parser.add_argument("--recipe", choices=RECIPE_NAMES, help="default full")
    parser.add_argument("--precision", choices=PRECISIONS, help="default fp32 on a CPU, bf16 (autocast) on a GPU")
    parser.add_argument("--batch-size", type=int, help="rows of a step; default 8 on a CPU, 32 on a GPU")
    parser.add_argument("--max-frames", type=int, help="ours: MAX_FRAMES_PER_BATCH instead of the batch size")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument(
        "--steps", type=int, default=16, help="steps of a round; with the batch size, the number of rows"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="ours: other settings")
    parser.add_argument("--levers", action="store_true", help="ours against ours with one lever moved, one by one")
    parser.add_argument("--all", nargs="?", const="own", choices=("own", *GOALS), help="all that must be reached")
    parser.add_argument("--judge", action="store_true", help="exit code 2 where something was not reached")
    parser.add_argument("--rebuild", action="store_true", help="one model in memory at a time (smaller GPUs; slower)")
    parser.add_argument("--peak-tflops", type=float, help="what the device can do, in 10^12 operations a second")
    arguments = parser.parse_args(given)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device: no CUDA GPU here; `--size small --device cpu` measures on the CPU")
    own_to_goals = [name for name in ("recipe", "precision", "max_frames", "set") if getattr(arguments, name)]
    if arguments.all and own_to_goals:
        parser.error(f"--all has its own recipes and settings; leave out {', '.join(own_to_goals)}")
    is_cpu = arguments.device == "cpu"
    arguments.recipe = arguments.recipe or "full"
    arguments.precision = arguments.precision or ("fp32" if is_cpu else "bf16")
    arguments.batch_size = arguments.batch_size or (8 if is_cpu else 32)
    if min(arguments.batch_size, arguments.steps, arguments.rounds) < 1:
        parser.error("--batch-size, --steps and --rounds start at 1")
    arguments.set = dict(map(parse_setting, arguments.set))
    if arguments.max_frames:
        arguments.set["max_frames_per_batch"] = arguments.max_frames
    return arguments


def parse_setting(text: str) -> tuple[str, str]:
    """NAME=VALUE as (field, value)."""
    name, _, value = text.partition("=")
    if name not in canonical_names():
        raise UserError(f"--set: {name} is no setting")
    return canonical_names()[name], value


# ----------------------------------------------------------------------------------------------------------- rounds


@dataclass(frozen=True)
class Round:
    """One timed pass over the rows.

    Attributes:
        cpu_seconds: of the processor, over all threads.
    """

    seconds: float
    cpu_seconds: float
    padding: float
    peak_bytes: int | None


@dataclass
class Contestant:
    """A way, its name, and the rounds that it has taken; it is built when its first turn comes."""

    name: str
    bench: Bench
    build: Callable[[], Way]
    rounds: list[Round] = field(default_factory=list)
    flops: float = 0.0
    way: Way | None = None
    held_bytes: int = 0

    def take_turn(self, keep: bool) -> None:
        """A timed round; before a model's first one an untimed one, in which caches fill and kernels are chosen."""
        if self.way is None:
            before = self._allocated()
            self.way = self.build()
            self.flops = self.way.flops
            self.way.epoch(0)
            self.held_bytes = self._allocated() - before
        self.rounds.append(self._timed(len(self.rounds) + 1))
        if not keep:
            self.leave()

    def leave(self) -> None:
        """Frees the model."""
        self.way = None
        free_unused_memory()

    def _timed(self, epoch: int) -> Round:
        of_others = self._allocated() - self.held_bytes
        if self.bench.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.bench.device)
        self.bench.synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        padding = self.way.epoch(epoch)
        self.bench.synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        peak = torch.cuda.max_memory_allocated(self.bench.device) - of_others if self.bench.is_cuda else None
        return Round(seconds, cpu_seconds, padding.share, peak)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.bench.device) if self.bench.is_cuda else 0

    def line(self, peak: float) -> str:
        """The table's line."""
        seconds = statistics.median(one.seconds for one in self.rounds)
        rate = sum(len(row.codes) for row in self.bench.rows) / seconds
        padding = statistics.mean(one.padding for one in self.rounds)
        memory = max(one.peak_bytes or 0 for one in self.rounds) / 1e9
        figures = [
            f"{rate:>8,.0f} frames/s",
            f"{rate / FRAMES_PER_SECOND:>8,.1f} s of speech/s",
            f"{padding:>4.0%} padding",
            f"{self.utilisation(peak):>6.1%} MFU",
        ] + [f"{memory:>6.1f} GB"] * self.bench.is_cuda
        return f"      {self.name:<52} {', '.join(figures)}"

    def utilisation(self, peak: float) -> float:
        return self.flops / statistics.median(one.seconds for one in self.rounds) / peak


@dataclass(frozen=True)
class Result:
    """A comparison that took place."""

    reference: Contestant
    contestant: Contestant
    peak: float

    def ratios(self, seconds: str = "seconds") -> list[float]:
        """Of each round, by one of its figures."""
        pairs = zip(self.reference.rounds, self.contestant.rounds, strict=True)
        return [getattr(reference, seconds) / getattr(own, seconds) for reference, own in pairs]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios())

    @property
    def utilisation(self) -> float:
        return self.contestant.utilisation(self.peak)

    def __str__(self) -> str:
        of_rounds = ", ".join(f"{ratio:.2f}" for ratio in self.ratios())
        if not self.reference.bench.is_cuda:
            of_rounds += f"; by CPU time {statistics.median(self.ratios('cpu_seconds')):.2f}"
        lines = [one.line(self.peak) for one in (self.reference, self.contestant)]
        return "\n".join([f"{self.ratio:.2f} x as fast (rounds: {of_rounds})", *lines])


def compare(arguments: argparse.Namespace, reference: Contestant, contestant: Contestant) -> Result:
    """Both take turns."""
    for _ in range(arguments.rounds):
        for one in (reference, contestant):
            one.take_turn(keep=not arguments.rebuild)
    for one in (reference, contestant):
        one.leave()
    return Result(reference, contestant, peak_of(arguments, reference.bench))


def peak_of(arguments: argparse.Namespace, bench: Bench) -> float:
    if arguments.peak_tflops:
        return arguments.peak_tflops * 1e12
    return peak_flops(bench.device, torch.float32 if arguments.precision == "fp32" else torch.bfloat16)


def against_plain(arguments: argparse.Namespace, bench: Bench, recipe: str, variant: Variant) -> Result:
    plain = Contestant("plain loop", bench, partial(PlainWay, bench, recipe, arguments.precision))
    ours = Contestant(describe(variant), bench, partial(OurWay, bench, recipe, arguments.precision, variant))
    return compare(arguments, plain, ours)


def describe(variant: Variant) -> str:
    return " ".join([variant.name, *(f"{name.upper()}={value}" for name, value in variant.fields.items())])


# ----------------------------------------------------------------------------------------------------------- levers


def levers(recipe: str, is_cuda: bool) -> list[Variant]:
    """Each alone, off where it is on by itself, and on where it is off; a CPU compiles for minutes, so not there."""
    variants = [
        Variant("rows of any length together", window_steps=1),
        Variant("padded rows", objective_class=PaddedRows),
        Variant("padded rows of any length", window_steps=1, objective_class=PaddedRows),
        Variant("all logits at once", objective_class=AllLogitsAtOnce),
        Variant("a lookup for each codebook", objective_class=ManyLookups),
        Variant("sub-talker on a quarter of the frames", FRACTION),
        Variant("checkpointing", {"gradient_checkpointing": True}),
        Variant("8-bit moments", {"optimizer": "adamw_8bit"}),
        Variant("Adafactor", {"optimizer": "adafactor"}),
        Variant("two data workers", {"num_workers": 2}),
    ]
    if is_cuda:
        variants.append(Variant("compiled layers", {"compile": True}))
    if recipe == "full":
        variants.append(Variant("text table trains", {"train_text_embedding": True}))
    if recipe == "layers":
        variants += [
            Variant("text table trains, nothing below is frozen", {"train_text_embedding": True}),
            Variant("prefix kept", CACHE),
            Variant("prefix kept, sub-talker on a quarter", CACHE | FRACTION),
        ]
    return variants


def measure_lever(arguments: argparse.Namespace, bench: Bench, variant: Variant) -> Result:
    """Ours, and ours with the lever moved."""
    usual = Variant(fields=arguments.set)
    moved = replace(variant, fields=arguments.set | variant.fields)
    contestants = [
        Contestant(one.name, bench, partial(OurWay, bench, arguments.recipe, arguments.precision, one))
        for one in (usual, moved)
    ]
    return compare(arguments, *contestants)


# ------------------------------------------------------------------------------------------------ what must be reached


def as_settings(fields: dict[str, Any]) -> str:
    """Fields as they are typed, each behind a space."""
    return "".join(f" {name.upper()}={value}" for name, value in fields.items())


@dataclass(frozen=True)
class RatioGoal:
    """So many times as fast as the plain loop, and so much of what the device can do."""

    recipe: str
    precision: str
    fields: dict[str, Any]
    least_ratio: float
    least_utilisation: float = 0.0

    @property
    def title(self) -> str:
        used = f", {self.least_utilisation:.0%} MFU" * bool(self.least_utilisation)
        what = f"{self.recipe}, {self.precision}{as_settings(self.fields)}"
        return f"{what}: at least {self.least_ratio} x the plain loop{used}"

    def check(self, arguments: argparse.Namespace, bench: Bench) -> Result:
        arguments = argparse.Namespace(**(vars(arguments) | {"precision": self.precision}))
        result = against_plain(arguments, bench, self.recipe, Variant(fields=self.fields))
        if result.ratio < self.least_ratio or result.utilisation < self.least_utilisation:
            raise CheckFailed(str(result))
        return result


@dataclass(frozen=True)
class MemoryGoal:
    """Batches of so many frames in less than so many GB (10^9 bytes) of GPU memory."""

    recipe: str
    precision: str
    fields: dict[str, Any]
    num_frames: int
    most_gb: float

    @property
    def title(self) -> str:
        what = f"{self.recipe}, {self.precision}{as_settings(self.fields)}"
        return f"{what}, {self.num_frames:,} frames a batch: under {self.most_gb} GB"

    def check(self, arguments: argparse.Namespace, bench: Bench) -> str:
        num_rows = round(NUM_MEMORY_BATCHES * self.num_frames / FRAMES_PER_SECOND / CLIP_MEAN_SECONDS)
        own = argparse.Namespace(**(vars(arguments) | {"batch_size": 1, "steps": num_rows}))
        bench = Bench(own, clip_seconds(num_rows))
        variant = Variant(fields=self.fields | {"max_frames_per_batch": self.num_frames})
        ours = Contestant(describe(variant), bench, partial(OurWay, bench, self.recipe, self.precision, variant))
        ours.take_turn(keep=False)
        if not bench.is_cuda:
            raise Skipped("needs CUDA; the steps were taken")
        gigabytes = (ours.rounds[0].peak_bytes or 0) / 1e9
        line = f"{gigabytes:.1f} GB\n{ours.line(peak_of(arguments, bench))}"
        if gigabytes >= self.most_gb:
            raise CheckFailed(line)
        return line


SMALLEST = {"gradient_checkpointing": True, "optimizer": "adamw_8bit"}
GOALS: dict[str, list[RatioGoal | MemoryGoal]] = {
    "cpu": [
        RatioGoal("full", "fp32", {}, 1.4),
        RatioGoal("full", "fp32", FRACTION, 2.1),
        RatioGoal("layers", "fp32", {}, 1.6),
        RatioGoal("layers", "fp32", FRACTION | CACHE, 4.0),
    ],
    "cuda": [
        RatioGoal("full", "bf16", {}, 1.8, least_utilisation=0.4),
        RatioGoal("layers", "bf16", FRACTION | CACHE, 4.0),
        MemoryGoal("full", "bf16", {"gradient_checkpointing": True}, 8000, 45),
        MemoryGoal("full", "bf16-weights", SMALLEST, 2000, 16),
        MemoryGoal("lora", "bf16-weights", {"gradient_checkpointing": True}, 2000, 10),
    ],
}


if __name__ == "__main__":
    run_main(main)
