"""Runs on the tiny model for tests: the same calls that train.py makes, with every part within reach."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState

from finetuning import session
from finetuning.settings import Settings
from finetuning.trainer import Trainer

FULL = {"replace_last_n_layers": 0, "add_new_layers": 0, "freeze_original_layers": False}


def build(settings: Settings) -> Any:
    """The run, ready to train, with its output folder claimed."""
    # Accelerate keeps its precision for the life of a process; a test may want another one.
    AcceleratorState._reset_state(reset_partial_state=True)
    base, device = session.check_inputs(settings)
    accelerator = session.start(settings, device)
    resume = session.choose_start(settings, base, accelerator)
    rows = session.open_rows(settings, base, accelerator)
    run = session.build_run(settings, base, rows, accelerator, resume, verbose=False)
    session.claim_output_folder(run)
    return run


def make_trainer(run: Any) -> Trainer:
    return session.make_trainer(run, session.make_tracker(run))


def train(settings: Settings) -> tuple[Any, Trainer]:
    """Builds and trains; returns both for inspection."""
    run = build(settings)
    trainer = make_trainer(run)
    trainer.run()
    return run, trainer
