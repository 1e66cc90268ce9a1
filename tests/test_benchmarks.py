"""The benchmarks' own small forms run; their figures are for people."""

from __future__ import annotations

import re
import subprocess
import sys

from conftest import PROJECT


def test_gpu_check_runs_at_toy_size_on_cpu() -> None:
    command = [sys.executable, "benchmarks/gpu_check.py", "--size", "tiny", "--device", "cpu", "--steps", "1"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    passed, skipped = re.search(r"(\d+) passed, 0 failed, (\d+) skipped", done.stdout).groups()
    assert int(passed) >= 12
    assert int(skipped) == done.stdout.count("skipped: needs CUDA")


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_encode_compares_the_two_ways() -> None:
    printed = run("benchmarks/encode.py", "--codec", "tiny", "--clips", "10", "--rounds", "1")
    assert re.search(r"ours is \d+\.\d\d times as fast", printed)
    padding = [int(share) for share in re.findall(r"(\d+)% padding", printed)]
    assert padding[1] <= padding[0]


def test_memory_measures_a_small_set() -> None:
    small = ("--rows", "2000", "--validation_rows", "100", "--workers", "0")
    printed = run("benchmarks/memory.py", *small, "--max_seconds", "300")  # how long it takes is no test's business
    assert "2,000" in printed and "limit 300" in printed and "✓ 0 workers" in printed
