"""What the stages share: their working folder, their reports, and saving a training so that it can go on.

A stage that is done has its report, WORK/reports/<stage>.json: its figures, and the plan that they belong to. It is
written last, so a stage without one goes on, and one whose plan has changed is made again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedded.plan import SCALES, Scale
from finetuning.disk import read_json, write_json
from finetuning.errors import run_main, whole_number

Figures = dict[str, Any]

#: What of a scale a stage depends on, through the stages before it as well: no other change makes it anew.
_SPEECH = ("num_variants", "voices_per_variant", "clips_per_voice")
_MODELS = (*_SPEECH, "codec_steps", "encoder_steps")
DEPENDS_ON = {
    "speech": _SPEECH,
    "codec": (*_SPEECH, "codec_steps"),
    "encoder": _MODELS,
    "start": _MODELS,
    "talker": (*_MODELS, "talker_steps"),
    "pack": (*_MODELS, "talker_steps"),
    "demo": (*_MODELS, "talker_steps"),
}


@dataclass(frozen=True)
class Work:
    """Where and how large.

    Attributes:
        folder: everything of this recipe lies below it.
        scale_name: key of ``SCALES``.
        num_threads: CPU cores that a stage uses.
        device: "cpu" or "cuda".
        is_compiled: compile the codec's decoder (needs a C++ compiler; 90 s, then 1.7 times as fast).
        codec_steps: in place of the scale's.
    """

    folder: Path
    scale_name: str
    num_threads: int = 1
    device: str = "cpu"
    is_compiled: bool = False
    codec_steps: tuple[int, int, int] | None = None

    @property
    def scale(self) -> Scale:
        return SCALES[self.scale_name]

    def plan(self, stage: str) -> dict[str, Any]:
        """What a stage makes, as JSON has it."""
        scale = asdict(self.scale) | ({"codec_steps": self.codec_steps} if self.codec_steps else {})
        return json.loads(json.dumps({"scale": self.scale_name} | {name: scale[name] for name in DEPENDS_ON[stage]}))

    def report(self, stage: str) -> Path:
        return self.folder / "reports" / f"{stage}.json"


def run_stage(stage: str, make: Callable[[Work], Figures], work: Work) -> Figures:
    """Runs a stage unless its report says that it is done; its figures."""
    plan = work.plan(stage)
    done = read_json(work.report(stage)) or {}
    if done.get("plan") == plan:
        print(f"{stage}: done before")
        return done["figures"]
    start = time.monotonic()
    figures = make(work)
    work.report(stage).parent.mkdir(parents=True, exist_ok=True)
    seconds = round(time.monotonic() - start, 1)  # of this run: an interrupted one before it is not in the sum
    write_json(work.report(stage), {"stage": stage, "plan": plan, "seconds": seconds, "figures": figures})
    print(table(stage, figures))
    return figures


def table(stage: str, figures: Mapping[str, Any]) -> str:
    """The figures of a stage, one a line."""
    width = max((len(name) for name in figures), default=0)
    return "\n".join([f"{stage}:", *(f"  {name:<{width}}  {value}" for name, value in figures.items())])


def main_of(stage: str, make: Callable[[Work], Figures], description: str | None) -> None:
    """The command line of one stage."""
    run_main(lambda: _run(stage, make, parse(description)))


def _run(stage: str, make: Callable[[Work], Figures], work: Work) -> None:
    run_stage(stage, make, work)


def parse(description: str | None) -> Work:
    """The command line that all stages share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small", help="full wants a GPU")
    parser.add_argument("--folder", type=Path, required=True, help="working folder; give the same to go on")
    parser.add_argument("--threads", type=whole_number, default=os.cpu_count() or 1, help="CPU cores to use")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="compile the codec's decoder; needs a C++ compiler")
    parser.add_argument("--codec_steps", type=int, nargs=3, help="steps of the codec's phases, in place of the scale's")
    arguments = parser.parse_args()
    steps = tuple(arguments.codec_steps) if arguments.codec_steps else None
    return Work(arguments.folder, arguments.scale, arguments.threads, arguments.device, arguments.compile, steps)


# ------------------------------------------------------------------------------------------- a training's state


def save_state(path: Path, tensors: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Tensors and JSON in one file that is there whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    copies = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, unfinished, {"info": json.dumps(info)})
    os.replace(unfinished, path)


def load_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What ``save_state`` wrote; None where there is nothing, or nothing readable."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, json.loads(file.metadata()["info"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def optimizer_tensors(optimizer: Any, prefix: str) -> dict[str, Any]:
    """The tensors of an optimizer's state, named by parameter number; for ``save_state``."""
    states = optimizer.state_dict()["state"]
    return {f"{prefix}.{number}.{key}": value for number, state in states.items() for key, value in state.items()}


def restore_optimizer(optimizer: Any, prefix: str, tensors: Mapping[str, Any]) -> None:
    """Puts ``optimizer_tensors`` back; parameters that had no state yet get none."""
    states: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith(f"{prefix}."):
            number, key = name[len(prefix) + 1 :].split(".", 1)
            states.setdefault(int(number), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
