"""Private memory and waiting time at 1,000 and at 600,000 rows; what the rows cost is the difference.

    python benchmarks/memory.py --rows 20000 --validation_rows 1000 --workers 0   # the script itself, under a minute
    python benchmarks/memory.py                                                   # 600,000 + 30,000 rows, 4 GB of disk
    python benchmarks/memory.py --folder /scratch --workers 0,4,8                 # elsewhere, with other workers

For each number of rows the files are made, indexed in a process of their own, and opened by fresh processes the way
train.py opens them: ``open_training_rows``, the embedded base's tokenizer, ``step_loader``. Such a process takes some
training steps and, with its training workers still there, some validation steps. Private memory is RssAnon, summed over
the process and its workers, the highest of all moments looked at; pages of the mapped file are not in it.

Exit code 2 when the rows cost more than the limits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from finetuning.settings import Settings, load_settings

#: What all rows may cost beyond SMALL_ROWS, over all processes.
MAX_MEBIBYTES = 300.0
#: From the first look at the settings to the first batch, once there is an index.
MAX_FIRST_BATCH_SECONDS = 10.0
#: What the full size is compared with.
SMALL_ROWS = 1000
#: Different clips and frames that the rows are put together from.
NUM_CLIPS, NUM_FRAMES = 16, 5000
#: Rows written at a time.
ROWS_AT_ONCE = 1000

SPEAKER = "reference_speaker"
WORDS = ("the", "light", "water", "morning", "seven", "house", "river", "quiet", "under", "again", "green", "table")
MEASURES = {"seconds": 4.8, "peak_db": -3.1, "loudness_lufs": -23.4, "snr_db": 41.2, "audio_hash": "0123456789abcdef"}


def main() -> None:
    """Measures both sizes; exit code 2 over the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600_000, help="training rows (default: %(default)s)")
    parser.add_argument("--validation_rows", type=int, default=30_000, help="default: %(default)s")
    parser.add_argument("--frames", type=int, default=60, help="codec frames of a row (default: %(default)s)")
    parser.add_argument("--workers", default="0,4", help="numbers of data workers to try (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="training steps that are taken (default: %(default)s)")
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=MAX_FIRST_BATCH_SECONDS,
        help="limit of the wait for the first batch (default: %(default)s)",
    )
    parser.add_argument("--folder", type=Path, help="where the files are made, and removed (default: a temporary one)")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return run_part(*options.part)
    workers = [int(number) for number in options.workers.split(",")]
    small_validation = max(1, min(options.validation_rows, SMALL_ROWS * options.validation_rows // options.rows))
    small = measure(SMALL_ROWS, small_validation, workers, options)
    full = measure(options.rows, options.validation_rows, workers, options)
    sys.exit(0 if judge(small, full, options) else 2)


def judge(small: dict[int, Any], full: dict[int, Any], options: argparse.Namespace) -> bool:
    """Prints the differences; whether all are within the limits."""
    is_good = True
    for workers in full:
        cost = full[workers]["mebibytes"] - small[workers]["mebibytes"]
        seconds = full[workers]["first_batch_seconds"]
        within = cost <= MAX_MEBIBYTES and seconds <= options.max_seconds
        is_good &= within
        mark = "✓" if within else "✗"
        print(
            f"{mark} {workers} workers: {options.rows:,} rows take {cost:+.0f} MiB of private memory over "
            f"{SMALL_ROWS:,} rows (limit {MAX_MEBIBYTES:.0f}), "
            f"first batch after {seconds:.1f} s (limit {options.max_seconds:.0f})"
        )
    return is_good


def measure(num_rows: int, num_validation_rows: int, workers: list[int], options: argparse.Namespace) -> dict[int, Any]:
    """Makes, indexes and reads files of that size; number of workers -> figures of ``read``."""
    print(f"{num_rows:,} + {num_validation_rows:,} rows of {options.frames} frames")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="rows-") as name:
        folder = Path(name)
        start = time.perf_counter()
        alone("make_files", folder, num_rows, num_validation_rows, options.frames)
        mebibytes = sum(file.stat().st_size for file in folder.glob("*.jsonl")) / 2**20
        print(f"  made in {time.perf_counter() - start:.1f} s: {mebibytes:,.0f} MiB of JSONL")
        figures = alone("index", folder)
        per_row = 1e6 * figures["seconds"] / (num_rows + num_validation_rows)
        print(
            f"  indexed in {figures['seconds']:.1f} s ({per_row:.0f} µs a row), at most {figures['mebibytes']:.0f} MiB "
            f"of private memory; the index takes {figures['index_mebibytes']:,.0f} MiB of disk"
        )
        found = {}
        for number in workers:
            found[number] = figures = alone("read", folder, number, options.steps)
            print(
                f"  {number} workers: first batch after {figures['first_batch_seconds']:.1f} s "
                f"({figures['process_seconds']:.1f} s with Python's start and imports), "
                f"{figures['mebibytes']:.0f} MiB of private memory in {figures['num_processes']} processes",
                flush=True,
            )
    return found


def alone(function: str, folder: Path, *arguments: int) -> Any:
    """What the function of this file returns in a fresh Python, so that nothing is left over from before."""
    command = [sys.executable, "-W", "ignore", __file__, "--part", function, str(folder), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_part(function: str, folder: str, *arguments: str) -> None:
    """The other end of ``alone``."""
    print(json.dumps(globals()[function](Path(folder), *map(int, arguments))))


# ------------------------------------------------------------------------------------------------------------ files


def make_files(folder: Path, num_rows: int, num_validation_rows: int, num_frames: int) -> None:
    """Writes train.jsonl and validation.jsonl: rows whose codes were made of a few clips that are there."""
    from finetuning.base_model import resolve_base
    from finetuning.codec import codec_fingerprint

    codec_id = codec_fingerprint(resolve_base(run_settings(folder)).codec_folder)
    heads = []
    for number in range(NUM_CLIPS):
        clip = folder / f"{number}.wav"
        clip.write_bytes(b"RIFF" + bytes(number))  # only looked up, never read
        status = clip.stat()
        source = {
            "audio": str(clip), "num_bytes": status.st_size, "modified_ns": status.st_mtime_ns, "codec": codec_id
        }  # fmt: skip
        head = {"audio": clip.name, "ref_audio": "0.wav", "language": "English", "speaker": SPEAKER}
        heads.append(json.dumps(head | {"measures": MEASURES, "codes_source": source})[:-1])
    generator = np.random.default_rng(0)
    frames = np.array([str(frame) for frame in generator.integers(0, 2048, (NUM_FRAMES, 16)).tolist()], dtype=object)
    for name, count in (("train", num_rows), ("validation", num_validation_rows)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for start in range(0, count, ROWS_AT_ONCE):
                rows = range(start, min(start + ROWS_AT_ONCE, count))
                chosen = frames[generator.integers(0, NUM_FRAMES, (len(rows), num_frames))]
                words = generator.choice(WORDS, (len(rows), 10))
                stream.writelines(
                    f'{heads[row % NUM_CLIPS]}, "text": "{" ".join(texts)} {row}.", '
                    f'"audio_codes": [{", ".join(codes)}]}}\n'
                    for row, texts, codes in zip(rows, words, chosen, strict=True)
                )


def run_settings(folder: Path) -> Settings:
    """Those of a run on the files."""
    return load_settings(
        {
            "device": "cpu",
            "init_model_path": "tiny-random",
            "train_jsonl": folder / "train.jsonl",
            "validation_jsonl": folder / "validation.jsonl",
            "output_dir": folder / "output",
        },
        environment={},
    )


# ---------------------------------------------------------------------------------------------------------- measuring


def index(folder: Path) -> dict[str, float]:
    """seconds, mebibytes (the highest), index_mebibytes (on disk)."""
    start = time.perf_counter()
    with watched_memory() as highest:
        open_rows(folder)
        seconds = time.perf_counter() - start
    disk = sum(file.stat().st_size for file in (folder / ".rows").rglob("*")) / 2**20
    return {"seconds": seconds, "mebibytes": highest[0], "index_mebibytes": disk}


def read(folder: Path, num_workers: int, num_steps: int) -> dict[str, float]:
    """first_batch_seconds, process_seconds (the same from the process's start), mebibytes, num_processes."""
    from finetuning.base_model import load_tokenizer
    from finetuning.dataset import RowEncoder, StepDataset, step_loader
    from finetuning.prompt import LayoutIds
    from finetuning.sampling import StepSampler, sequential_plan

    start = time.perf_counter()
    base, rows = open_rows(folder)
    encoder = RowEncoder(load_tokenizer(base.folder), LayoutIds.from_config(base.config), {SPEAKER: 0}, dialects={})
    train, validation = StepDataset(rows.train, encoder), StepDataset(rows.validation, encoder)
    sampler = StepSampler(rows.train.column("num_codec_frames"), batch_size=4, accumulation=2)
    steps = iter(step_loader(train, sampler.epoch_plan(0), num_workers))
    next(steps)
    first_batch_seconds = time.perf_counter() - start
    process_seconds = time.time() - psutil.Process().create_time()
    highest = private_mebibytes()
    for number, _ in zip(range(num_steps), steps, strict=False):
        highest = max(highest, private_mebibytes() if number % 5 == 0 else 0.0)
    validation_steps = iter(step_loader(validation, sequential_plan(len(validation), 4), num_workers))
    num_processes = 0
    for _ in zip(range(num_steps // 5), validation_steps, strict=False):
        highest = max(highest, private_mebibytes())
        num_processes = max(num_processes, 1 + len(psutil.Process().children(recursive=True)))
    return {
        "first_batch_seconds": first_batch_seconds,
        "process_seconds": process_seconds,
        "mebibytes": highest,
        "num_processes": num_processes,
    }


def open_rows(folder: Path) -> tuple[Any, Any]:
    """The base and the rows of a run, opened as train.py does."""
    from finetuning.base_model import resolve_base
    from finetuning.manifest import RowFormat
    from finetuning.training_rows import open_training_rows

    settings = run_settings(folder)
    base = resolve_base(settings)
    row_format = RowFormat.from_settings(settings, base.special_tokens())
    return base, open_training_rows(settings, base.codec_folder, row_format, "cpu")


def private_mebibytes() -> float:
    """RssAnon of this process and all that it started."""
    this = psutil.Process()
    total = 0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(OSError):  # it may just have ended
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                total += int(line.split()[1]) if line.startswith("RssAnon:") else 0
    return total / 1024


@contextlib.contextmanager
def watched_memory() -> Iterator[list[float]]:
    """A list whose one item is the highest private memory so far."""
    highest, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            highest[0] = max(highest[0], private_mebibytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield highest
    finally:
        stop.set()
        watcher.join()


if __name__ == "__main__":
    main()
