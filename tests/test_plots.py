"""Pictures from the logs alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from PIL import Image

from finetuning.plots import draw_plots

TRAINING = [
    {"step": at, "epoch": 0, "loss": 3.0 / at, "talker_loss": 2.0 / at, "sub_talker_loss": 1.0, "grad_norm": 1.0 * at,
     "learning_rate": 1e-5 * at}
    for at in range(1, 6)
]  # fmt: skip
VALIDATION = [
    {"step": at, "loss": 3.0, "metrics": {"talker_loss": 2.0, "accuracy": 0.1 * at, "codebook_accuracy": [0.1] * 16}}
    for at in (2, 4)
]
SAMPLES = [{"step": 5, "loss": None, "metrics": {"wer": 0.5, "eos_rate": 1.0, "speakers": {"Ada": {}}}}]
ALL = {"loss", "learning_rate", "gradient_norm", "validation", "codebook_accuracy", "samples"}


def write(output: Path, training: list[Any], validation: list[Any]) -> None:
    for name, records in (("training", training), ("validation", validation)):
        (output / f"{name}_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("training", "validation", "drawn"),
    [
        (TRAINING, VALIDATION + SAMPLES, ALL),
        (TRAINING, VALIDATION, ALL - {"samples"}),
        (TRAINING, [], {"loss", "learning_rate", "gradient_norm"}),
        ([], VALIDATION[:1], {"loss", "validation", "codebook_accuracy"}),
        ([], SAMPLES, {"samples"}),
        ([{"step": 1, "loss": None, "grad_norm": 0.0}], [{"step": 1, "loss": None, "metrics": {}}], {"gradient_norm"}),
        ([], [], set()),
    ],
    ids=["all", "no samples", "no validation", "one evaluation", "samples alone", "nulls", "empty"],
)
def test_what_there_are_figures_for_is_drawn(tmp_path: Path, training: list, validation: list, drawn: set[str]) -> None:
    write(tmp_path, training, validation)
    files = draw_plots(tmp_path)
    assert {file.stem for file in files} == drawn
    assert sorted((tmp_path / "plots").glob("*")) == sorted(files)  # no leftovers
    for file in files:
        with Image.open(file) as image:
            assert image.format == "PNG" and min(image.size) >= 400
            assert len(set(image.convert("L").tobytes())) > 20  # something stands in it


def test_without_logs_there_is_nothing(tmp_path: Path) -> None:
    assert draw_plots(tmp_path) == [] and list(tmp_path.iterdir()) == []


def test_a_refused_picture_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, TRAINING, [])
    draw_plots(tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "plots").iterdir()}

    def refused(self: Any, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", refused)
    with pytest.raises(OSError, match="disk full"):
        draw_plots(tmp_path)
    assert {file.name: file.read_bytes() for file in (tmp_path / "plots").iterdir()} == before


def plots_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetuning.plots", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)


def test_the_command_draws_them_again(tmp_path: Path) -> None:
    write(tmp_path, TRAINING, VALIDATION)
    done = plots_command(str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/plots/loss.png" in done.stdout.splitlines()


def test_mistakes_are_told_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "nowhere", "is no folder"), (tmp_path, "has no training_log.jsonl or")):
        done = plots_command(str(folder))
        assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (2, True, False)
    code = "import finetuning.plots, sys; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
