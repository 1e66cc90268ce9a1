"""Raw JSONL files with short clips of noise beside them, and what the fake codec makes of them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from fakes import fake_codes

from finetuning.audio import load_audio


def write_clip(path: Path, seed: int, seconds: float = 0.5) -> None:
    noise = np.random.default_rng(seed).normal(0, 0.1, round(seconds * 24_000))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise, 24_000)


def write_raw(folder: Path, num_clips: int = 6, name: str = "train.jsonl", **fields: Any) -> Path:
    """A raw JSONL with so many clips beside it, long and short ones mixed."""
    rows = []
    for index in range(num_clips):
        audio = f"{Path(name).stem}_clips/{index:02}.wav"
        write_clip(folder / audio, zlib.crc32(name.encode()) + index, seconds=0.4 + 0.1 * (index * 5 % 7))
        rows.append({"audio": audio, "text": f"Sentence {index}.", "mood": {"number": index}} | fields)
    write_rows(folder / name, rows)
    return folder / name


def write_rows(path: Path, rows: list[Any]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected_codes(raw: Path) -> list[list[list[int]]]:
    return [fake_codes(load_audio(raw.parent / row["audio"])).tolist() for row in read_rows(raw)]
