"""``output/plots/*.png``, drawn from the logs alone.

python -m finetuning.plots output    # draws them again
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetuning.console import say
from finetuning.errors import UserError, run_main
from finetuning.history import Record, read_records, series, vectors
from finetuning.metrics import METRICS

NUM_CODEBOOKS = 16
#: Inches of a plot (100 pixels each), and plots in a row of a picture that has several.
WIDTH, HEIGHT, COLUMNS = 7.0, 4.0, 2
#: A line of more points than this has no dots; one of a single point would be nothing without.
MAX_DOTS = 50
PARTS = ("loss", "talker_loss", "sub_talker_loss")


def draw_plots(output_dir: Path) -> list[Path]:
    """Draws what the logs have figures for.

    Returns:
        The pictures that were written.

    Raises:
        OSError: a picture cannot be written. (And whatever matplotlib raises.)
    """
    training, validation = (read_records(output_dir / f"{name}_log.jsonl") for name in ("training", "validation"))
    folder = output_dir / "plots"
    drawn = []
    for name, draw in _PLOTS.items():
        figure = draw(training, validation)
        if figure is not None:
            folder.mkdir(exist_ok=True)
            drawn.append(_save(figure, folder / f"{name}.png"))
    return drawn


def _save(figure: Any, file: Path) -> Path:
    """Whoever looks at it meanwhile sees the one before."""
    unfinished = file.with_name(f".{file.name}.tmp")
    try:
        figure.savefig(unfinished, format="png", dpi=100)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    return file


def _new_figure(num_plots: int = 1) -> tuple[Any, list[Any]]:
    """A figure with so many plots, outside of pyplot: no window, and nothing that stays in memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(num_plots, COLUMNS)
    rows = -(-num_plots // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(num_plots)]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_xlabel("optimizer step")
    return figure, axes


def _line(axis: Any, points: Sequence[tuple[int, float]], **style: Any) -> None:
    steps, values = zip(*points, strict=True)
    axis.plot(steps, values, **{"marker": "." if len(points) <= MAX_DOTS else ""} | style)


def _draw_loss(training: Sequence[Record], validation: Sequence[Record]) -> Any:
    """Training as lines, validation with dots, in the same colour for the same part."""
    found = {
        (place, part): points
        for place, records in (("training", training), ("validation", validation))
        for part in PARTS
        if (points := series(records, part))
    }
    if not found:
        return None
    figure, (axis,) = _new_figure()
    for (place, part), points in found.items():
        style = {} if place == "training" else {"linestyle": "--", "marker": "o", "markersize": 4}
        _line(axis, points, color=f"C{PARTS.index(part)}", label=f"{place} {part}", **style)
    axis.set_title("Loss by part")
    axis.legend(fontsize="small")
    return figure


def _draw_one(name: str, title: str, scale: str) -> Callable[[Sequence[Record], Sequence[Record]], Any]:
    def draw(training: Sequence[Record], _: Sequence[Record]) -> Any:
        points = series(training, name)
        if not points:
            return None
        figure, (axis,) = _new_figure()
        _line(axis, points)
        axis.set_title(title)
        if scale == "log" and min(value for _, value in points) > 0:
            axis.set_yscale(scale)
        return figure

    return draw


def _draw_metrics(is_of_samples: bool) -> Callable[[Sequence[Record], Sequence[Record]], Any]:
    def draw(_: Sequence[Record], validation: Sequence[Record]) -> Any:
        names = [name for name, metric in METRICS.items() if metric.is_of_samples == is_of_samples]
        found = {name: points for name in names if name not in PARTS and (points := series(validation, name))}
        if not found:
            return None
        figure, axes = _new_figure(len(found))
        for axis, (name, points) in zip(axes, found.items(), strict=True):
            _line(axis, points, marker="o", markersize=4)
            axis.set_title(f"{name} ({METRICS[name].better} is better)")
        return figure

    return draw


def _draw_codebooks(_: Sequence[Record], validation: Sequence[Record]) -> Any:
    """One line a codebook, from dark (the coarse content) to bright."""
    found = vectors(validation, "codebook_accuracy", NUM_CODEBOOKS)
    if not found:
        return None
    from matplotlib import colormaps

    figure, (axis,) = _new_figure()
    for number in range(NUM_CODEBOOKS):
        color = colormaps["viridis"](number / NUM_CODEBOOKS)
        points = [(step, values[number]) for step, values in found]
        _line(axis, points, color=color, label=str(number))
    axis.set_title("Accuracy of each codebook (validation)")
    axis.legend(fontsize="x-small", ncols=4, title="codebook")
    return figure


_PLOTS: dict[str, Callable[[Sequence[Record], Sequence[Record]], Any]] = {
    "loss": _draw_loss,
    "learning_rate": _draw_one("learning_rate", "Learning rate", "linear"),
    "gradient_norm": _draw_one("grad_norm", "Gradient norm before clipping", "log"),
    "validation": _draw_metrics(is_of_samples=False),
    "codebook_accuracy": _draw_codebooks,
    "samples": _draw_metrics(is_of_samples=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of a run")
    output_dir = parser.parse_args().output_dir
    if not output_dir.is_dir():
        raise UserError(f"{output_dir} is no folder; name the OUTPUT_DIR of a run")
    try:
        drawn = draw_plots(output_dir)
    except OSError as error:
        raise UserError(f"{output_dir}/plots cannot be written: {error}; free some space, or copy the logs") from None
    if not drawn:
        raise UserError(
            f"{output_dir} has no training_log.jsonl or validation_log.jsonl with figures; name another run"
        )
    say("\n".join(map(str, drawn)))


if __name__ == "__main__":
    run_main(main)
