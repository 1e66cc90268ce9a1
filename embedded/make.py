"""The embedded model that speaks, from nothing but espeak-ng to a base checkpoint and its figures.

    python -m embedded.make --scale small --folder WORK     # CPU, hours
    python -m embedded.make --scale full --folder WORK --device cuda
    python -m embedded.make --scale smoke --folder WORK     # minutes: noise, to see that everything runs

Killed at any moment, the same command goes on. Needs espeak-ng and the dependency group `embedded`.
"""

from __future__ import annotations

from collections.abc import Callable

from embedded.codec import make_codec
from embedded.demo import make_demo
from embedded.encoder import make_encoder
from embedded.pack import pack_base, pack_start
from embedded.report import write_report
from embedded.speech import make_speech
from embedded.stage import Figures, Work, parse, run_stage
from embedded.talker import train_talker
from finetuning.errors import run_main

#: In the order in which they need each other.
STAGES: dict[str, Callable[[Work], Figures]] = {
    "speech": make_speech,
    "codec": make_codec,
    "encoder": make_encoder,
    "start": pack_start,
    "talker": train_talker,
    "pack": pack_base,
    "demo": make_demo,
}


def make_everything(work: Work) -> None:
    """Runs the stages that are not done, and reports."""
    for stage, make in STAGES.items():
        run_stage(stage, make, work)
    write_report(work)


if __name__ == "__main__":
    run_main(lambda: make_everything(parse(__doc__)))
