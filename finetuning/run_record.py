"""``output/run.json``: what a run was made of, so that its figures can be told apart, and made again, later.

Settings, git revision, packages, Python, devices and a summary of the data as they were when it began; each time that
it was resumed adds a line to ``resumed`` with what may have changed by then.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from finetuning.codec import FRAMES_PER_SECOND
from finetuning.disk import write_json
from finetuning.row_index import Manifest

RUN_RECORD_FILE = "run.json"
PROJECT = Path(__file__).resolve().parent.parent
#: Packages that calculate, read or write; those that are not installed are left out.
PACKAGES = (
    "torch", "torchaudio", "qwen-tts", "transformers", "accelerate", "datasets", "peft", "safetensors", "numpy",
    "librosa", "soundfile", "huggingface-hub", "torchao", "flash-attn", "wandb", "tensorboard",
)  # fmt: skip
#: Speakers and languages that are listed one by one, those with the most rows.
MAX_NAMES = 100
#: git answers at once, but for a disk that hangs.
_GIT_SECONDS = 10


def git_revision(folder: Path = PROJECT) -> dict[str, Any] | None:
    """``{"revision", "is_dirty"}`` of a checkout; None where the folder is none, or there is no git.

    A folder inside of somebody else's repository is no checkout of ours. Files that git does not track do not count.
    """
    try:
        if Path(_git(folder, "rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
        return {"revision": _git(folder, "rev-parse", "HEAD"), "is_dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
        timeout=_GIT_SECONDS, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
    )  # fmt: skip
    return done.stdout.strip()


def package_versions() -> dict[str, str]:
    """Name -> version of ``PACKAGES``."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def device_names(accelerator: Accelerator) -> list[str]:
    """What each process computes on. All processes must ask."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    names = [f"{device.type}: {name}"]
    return gather_object(names) if accelerator.num_processes > 1 else names


def data_summary(rows: Manifest | None) -> dict[str, Any] | None:
    """rows, hours, and rows by speaker and by language, most first; None without rows."""
    if rows is None:
        return None
    hours = float(rows.column("num_codec_frames").sum()) / FRAMES_PER_SECOND / 3600
    counts = {f"{name}s": _counts(rows, name) for name in ("speaker", "language")}
    return {"rows": len(rows), "hours": round(hours, 4), **counts}


def _counts(rows: Manifest, column: str) -> dict[str, int]:
    names, places = rows.labels(column)
    counts = np.bincount(places[places >= 0], minlength=len(names)).tolist()
    most_first = sorted(zip(names, counts, strict=True), key=lambda item: -item[1])
    return dict(most_first[:MAX_NAMES])


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What may differ from one start to the next. All processes must ask."""
    return {
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": git_revision() if accelerator.is_main_process else None,
        "python": platform.python_version(),
        "packages": package_versions(),
        "devices": device_names(accelerator),
    }


def record_run(
    output_dir: Path, settings: Mapping[str, Any], data: Mapping[str, Any], now: Mapping[str, Any], step: int
) -> dict[str, Any]:
    """Writes ``run.json``, and gives its content.

    Args:
        settings: as they are saved, without secrets.
        now: see ``environment``.
        step: at which the run begins or goes on; what a run that goes on recorded at its beginning stays.

    Raises:
        OSError: it cannot be written.
    """
    file = output_dir / RUN_RECORD_FILE
    record = _read(file) if step else None
    if record is None:
        record = {**now, "begun_at_step": step, "settings": dict(settings), "data": dict(data), "resumed": []}
    else:
        record["resumed"].append({"step": step, **now, "settings": _changed(record["settings"], settings)})
    write_json(file, record)
    return record


def _read(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return record if isinstance(record["settings"], dict) and isinstance(record["resumed"], list) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not those of the beginning."""
    return {name: value for name, value in now.items() if before.get(name, ...) != value}
