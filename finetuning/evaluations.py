"""The last evaluations as a small table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from finetuning.history import Record, by_step, is_number
from finetuning.metrics import METRICS

#: Evaluations that are shown, and what does not get a column: it follows from another figure.
NUM_ROWS, LEFT_OUT = 5, ("perplexity",)
#: Shorter headings than the names.
_HEADINGS = {
    "talker_loss": "talker", "sub_talker_loss": "sub-talker", "sub_talker_accuracy": "sub-acc",
    "speaker_embedding_similarity": "similarity", "speech_rate_ratio": "rate", "eos_rate": "eos",
}  # fmt: skip
_GAP = "  "


def evaluations_table(records: Iterable[Record], best_step: int | None = None, num_rows: int = NUM_ROWS) -> str:
    """Aligned lines: a heading and the last evaluations, those figures of ``METRICS`` that any of them has.

    Args:
        records: of the validation log, oldest first.
        best_step: the evaluation that gets a ``*``.
    """
    evaluations = [(step, figures) for step, figures in by_step(records) if any(name in METRICS for name in figures)]
    shown = evaluations[-num_rows:]
    names = [
        name for name in METRICS if name not in LEFT_OUT and any(is_number(figures.get(name)) for _, figures in shown)
    ]
    rows = [["step", *(_HEADINGS.get(name, name) for name in names)]]
    for step, figures in shown:
        mark = "*" if step == best_step else ""
        rows.append([f"{mark}{step}", *(_cell(figures.get(name)) for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(_GAP.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cell(value: object) -> str:
    return f"{value:.4f}" if is_number(value) else "-"
