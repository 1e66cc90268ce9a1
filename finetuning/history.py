"""A run's logs as they are read again: for alarms, plots and the table of evaluations.

A record is a line of ``training_log.jsonl`` or ``validation_log.jsonl``. Any figure may be missing, or null, in any of
them: samples are not spoken at every evaluation, and a run may be older than a figure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of a log; [] where there is none. Lines that are no record (cut off by a crash) are left out."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [record for line in lines if (record := _parsed(line)) is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and is_number(record.get("step")) else None


def is_number(value: Any) -> bool:
    """Whether a figure is there and finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def figures_of(record: Record) -> dict[str, Any]:
    """The figures of an evaluation by name; its loss stands beside the others in the log."""
    metrics = record.get("metrics")
    return {"loss": record.get("loss"), **(metrics if isinstance(metrics, Mapping) else {})}


def series(records: Iterable[Record], name: str) -> list[tuple[int, float]]:
    """(step, value) wherever a training record, or an evaluation, has that figure."""
    found = ((record["step"], figures_of(record).get(name, record.get(name))) for record in records)
    return [(step, value) for step, value in found if is_number(value)]


def by_step(records: Iterable[Record]) -> list[tuple[int, dict[str, Any]]]:
    """(step, figures) of evaluations in their order; what two records say of one step is put together."""
    merged: dict[int, dict[str, Any]] = {}
    for record in records:
        known = {name: value for name, value in figures_of(record).items() if value is not None}
        merged.setdefault(record["step"], {}).update(known)
    return list(merged.items())


def vectors(records: Iterable[Record], name: str, length: int) -> list[tuple[int, Sequence[float]]]:
    """(step, values) wherever an evaluation has a list of so many numbers under that name."""
    found = ((record["step"], figures_of(record).get(name)) for record in records)
    return [
        (step, values)
        for step, values in found
        if isinstance(values, Sequence) and len(values) == length and all(map(is_number, values))
    ]
