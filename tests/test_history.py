"""The logs as they are read again."""

from __future__ import annotations

from pathlib import Path

from finetuning.evaluations import evaluations_table
from finetuning.history import by_step, read_records, series, vectors


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert read_records(log) == []
    log.write_bytes(b'{"step": 1}\n[2]\n{"loss": 3}\n{"step": "4"}\n\xff\n\n{"step": 5}\n{"step": 6, "lo')
    assert read_records(log) == [{"step": 1}, {"step": 5}]


def test_series_of_both_logs() -> None:
    nan = float("nan")
    training = [{"step": 1, "loss": 2.0, "grad_norm": None}, {"step": 2, "loss": nan}, {"step": 3, "grad_norm": 1}]
    assert series(training, "loss") == [(1, 2.0)]
    assert series(training, "grad_norm") == [(3, 1)]
    validation = [
        {"step": 1, "loss": 2.0, "metrics": {"accuracy": 0.5}},
        {"step": 2, "loss": None, "metrics": {"wer": 0.1}},
        {"step": 3, "loss": 1.0},
    ]
    assert series(validation, "loss") == [(1, 2.0), (3, 1.0)]
    assert series(validation, "accuracy") == [(1, 0.5)]
    assert series(validation, "wer") == [(2, 0.1)]


def test_two_records_of_a_step_are_put_together() -> None:
    """Samples may be a record of their own."""
    records = [
        {"step": 4, "loss": 2.0, "metrics": {"accuracy": 0.5}},
        {"step": 4, "loss": None, "metrics": {"wer": 0.1}},
        {"step": 8, "loss": None, "metrics": {}},
    ]
    assert by_step(records) == [(4, {"loss": 2.0, "accuracy": 0.5, "wer": 0.1}), (8, {})]


def test_vectors_need_their_length() -> None:
    good = [0.5] * 16
    records = [{"step": at, "metrics": {"codebook_accuracy": value}} for at, value in enumerate([good, good[1:], 0.5])]
    records += [{"step": 9, "metrics": {"codebook_accuracy": [None, *good[1:]]}}, {"step": 10, "metrics": {}}]
    assert vectors(records, "codebook_accuracy", 16) == [(0, good)]


def test_the_table_of_the_last_evaluations() -> None:
    """Aligned; a column where any of the shown ones has the figure, the best one marked."""
    records = [{"step": 1, "loss": 9.0, "metrics": {"wer": 0.5}}]
    records += [{"step": at, "loss": 12.0 - at, "metrics": {"accuracy": 0.1, "perplexity": 3.0}} for at in (5, 10)]
    records += [{"step": 10, "loss": None, "metrics": {"eos_rate": 1.0, "speaker_embedding_similarity": 0.71}}]
    records += [{"step": 10, "loss": None, "metrics": {"roundtrip_reproduced": 1.0}}]
    assert evaluations_table(records, best_step=10, num_rows=2).splitlines() == [
        "step    loss  accuracy  similarity     eos",
        "   5  7.0000    0.1000           -       -",
        " *10  2.0000    0.1000      0.7100  1.0000",
    ]
    assert "wer" in evaluations_table(records, num_rows=3)
    assert evaluations_table([]) == "step"
