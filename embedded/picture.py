"""The spectrograms of one sentence before, after and as recorded, from a run with COMPARE_JSONL.

python -m embedded.picture output_demo/comparison 1 docs/demo.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import soundfile

from finetuning.closeness import log_mel
from finetuning.errors import UserError, run_main

TITLES = {
    "before": "before: the base clones from one clip",
    "after": "after the fine-tuning",
    "recording": "the recording (espeak-ng)",
}


def draw(comparison: Path, number: int, output: Path) -> None:
    """Writes a picture of row ``number`` (from 1).

    Raises:
        UserError: there is no such comparison.
    """
    from matplotlib.figure import Figure

    files = {way: comparison / f"{number:02d}-{way}.wav" for way in TITLES}
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        raise UserError(f"{missing[0]} does not exist; a run with COMPARE_JSONL writes it")
    mels = {way: log_mel(soundfile.read(file, dtype="float32")[0]) for way, file in files.items()}
    longest = max(mel.shape[1] for mel in mels.values())
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    for axes, (way, mel) in zip(figure.subplots(3, 1, sharex=True), mels.items(), strict=True):
        padded = np.pad(mel, ((0, 0), (0, longest - mel.shape[1])), constant_values=np.log(1e-3))
        axes.imshow(padded, origin="lower", aspect="auto", extent=(0, longest / 100, 0, len(mel)), vmin=-6, vmax=2)
        axes.set_title(TITLES[way], fontsize=10, loc="left")
        axes.set_ylabel("mel band")
    axes.set_xlabel("seconds")
    figure.savefig(output, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="OUTPUT_DIR/comparison")
    parser.add_argument("number", type=int, help="of the row, from 1")
    parser.add_argument("output", type=Path, help="the PNG to write")
    arguments = parser.parse_args()
    draw(arguments.comparison, arguments.number, arguments.output)


if __name__ == "__main__":
    run_main(main)
