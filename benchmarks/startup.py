"""Seconds from `python train.py` to the first optimizer step, and what they go into, in fresh processes.

    python benchmarks/startup.py                              # the embedded tiny model and the demo's clips, on CPU
    python benchmarks/startup.py --against ../before          # another checkout of the project, in turns with this one
    INIT_MODEL_PATH=/models/base MIXED_PRECISION=bf16 DEVICE=cuda python benchmarks/startup.py    # a real base
    git archive v1.0 | tar -x -C ../before                    # one way to get another checkout

Every process runs that checkout's own ``train`` from `train.py`, is timed from the moment at which it was started, and
is ended after its first step. Settings come from the environment and `.env.overfit` (full training of an embedded
model on 24 clips), with a new OUTPUT_DIR each time. A first process for each checkout encodes the rows, fills the page
cache and is not counted. "Model ready" includes the stock package's import, the speakers' vectors and the layers,
"first step" includes the optimizer. Figures are medians; CPU seconds, of all threads of the process, depend less on
what else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
VOICE = PROJECT / "voices" / "english_voice"
MARKS = ("settings read", "imports", "rows open", "model ready", "first step")


def main() -> None:
    """Times the checkouts in turns and prints the medians; or, with --child, is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed processes of each checkout (default: %(default)s)")
    parser.add_argument("--against", type=Path, help="folder of another checkout of the project")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)  # the time at which it was started
    options = parser.parse_args()
    if options.child:
        return be_started(options.child)
    checkouts = {"this checkout": PROJECT} | ({"the other": options.against.resolve()} if options.against else {})
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: copy_rows(Path(folder) / name) for name in checkouts}
        for name, checkout in checkouts.items():
            start(checkout, rows[name])
        runs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in checkouts}
        for _ in range(options.rounds):
            for name, checkout in checkouts.items():
                runs[name].append(start(checkout, rows[name]))
    print_table(runs)


def copy_rows(folder: Path) -> dict[str, str]:
    """The settings that name the demo's rows: copies with absolute paths, beside which their codes are kept."""
    folder.mkdir()
    for name in ("train", "validation"):
        lines = (VOICE / f"{name}_raw.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row | {key: str(VOICE / row[key]) for key in ("audio", "ref_audio")} for row in map(json.loads, lines)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {f"{name.upper()}_JSONL": str(folder / f"{name}.jsonl") for name in ("train", "validation")}


def start(checkout: Path, rows: dict[str, str]) -> dict[str, list[float]]:
    """Seconds and CPU seconds to each of MARKS of one process."""
    defaults = {"ENV_FILE": str(PROJECT / ".env.overfit"), **rows}
    with tempfile.TemporaryDirectory() as output_dir:
        fixed = {"OUTPUT_DIR": output_dir, "PYTHONPATH": str(checkout)}
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(time.time())],
            cwd=checkout,
            env=defaults | os.environ | fixed,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def print_table(runs: dict[str, list[dict[str, list[float]]]]) -> None:
    """Medians of the seconds and CPU seconds to each mark."""
    count = len(next(iter(runs.values())))
    print(f"seconds (CPU seconds) from the start of the process; medians of {count} processes each")
    print(f"{'':<16}" + "".join(f"{name:>20}" for name in runs))
    for mark in MARKS:
        line = f"{mark:<16}"
        for found in runs.values():
            wall, cpu = (statistics.median(run[mark][part] for run in found) for part in (0, 1))
            line += f"{f'{wall:.2f} ({cpu:.2f})':>20}"
        print(line)


# --------------------------------------------------------------------------------------------- in the started process


def be_started(started: float) -> None:
    """Trains as the checkout does and prints the (seconds, CPU seconds) to each mark, in JSON, after the first step.

    Args:
        started: Unix time at which this process was started.
    """
    seconds: dict[str, tuple[float, float]] = {}

    def mark(name: str) -> None:
        seconds[name] = (time.time() - started, time.process_time())

    train = import_train()
    settings = train.load_settings()
    mark("settings read")
    with getattr(train, "quick_imports", contextlib.nullcontext)():  # older checkouts have none
        try:
            from finetuning import building, starting
        except ImportError:  # in older checkouts one room is both
            from finetuning import session as building
            from finetuning import session as starting
        from finetuning.stepping import Stepper
    mark("imports")

    def taken(*arguments: Any) -> None:
        _take(*arguments).gradient_norm.item()  # waits for the device
        mark("first step")
        print(json.dumps(seconds), flush=True)
        os._exit(0)

    starting.open_rows = then(starting.open_rows, lambda: mark("rows open"))
    building.build_run = then(building.build_run, lambda: mark("model ready"))
    _take, Stepper.take = Stepper.take, taken
    train.train(settings)


def import_train() -> Any:
    """`train.py` of the checkout: PYTHONPATH names it, and the working directory is it."""
    import train

    assert Path(train.__file__).parent == Path.cwd(), train.__file__
    return train


def then(function: Callable, act: Callable[[], None]) -> Callable:
    """The function, and ``act`` after it."""

    def both(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        act()
        return result

    return both


if __name__ == "__main__":
    main()
