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
