"""Small speech datasets in the formats that people have, made of the demo's clips."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from conftest import VOICE


class Clip:
    """A short clip of noise as ``write_parquet`` embeds it: each seed its own length and sound."""

    def __init__(self, seed: int) -> None:
        stream = io.BytesIO()
        soundfile.write(stream, np.random.default_rng(seed).normal(0, 0.1, 9_600 + 200 * seed), 24_000, format="WAV")
        self.content, self.name = stream.getvalue(), f"{seed}.wav"

    def read_bytes(self) -> bytes:
        return self.content


def demo_texts(count: int) -> list[dict[str, Any]]:
    """The first rows of the demo: ``audio`` as a path, ``text``."""
    lines = (VOICE / "train_raw.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    return [{"audio": VOICE / row["audio"], "text": row["text"]} for row in rows]


def write_parquet(folder: Path, rows: list[dict[str, Any]], split: str = "train", **columns: list[Any]) -> Path:
    """``folder/data/<split>-….parquet`` with embedded audio (struct of bytes and path), text, and more columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    audio = [{"bytes": row["audio"].read_bytes(), "path": row["audio"].name} for row in rows]
    table = pa.table({"audio": audio, "text": [row["text"] for row in rows], **columns})
    file = folder / "data" / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=5)
    return folder


def write_audiofolder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """``folder/train/metadata.csv`` with the clips beside it."""
    train = folder / "train"
    train.mkdir(parents=True, exist_ok=True)
    for row in rows:
        (train / row["audio"].name).write_bytes(row["audio"].read_bytes())
    return _write_csv(train / "metadata.csv", ["file_name", "text"], [[row["audio"].name, row["text"]] for row in rows])


def write_csv_dataset(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """``folder/train.csv`` with paths of wav files under ``folder/wavs``."""
    (folder / "wavs").mkdir(parents=True, exist_ok=True)
    for row in rows:
        samples, rate = soundfile.read(row["audio"], dtype="int16")
        soundfile.write(folder / "wavs" / f"{row['audio'].stem}.wav", samples, rate, subtype="PCM_16")
    table = [[f"wavs/{row['audio'].stem}.wav", row["text"]] for row in rows]
    _write_csv(folder / "train.csv", ["audio", "text"], table)
    return folder


def _write_csv(file: Path, header: list[str], rows: list[list[str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return file.parent.parent
