"""Runs on the tiny model for tests: the same calls that train.py makes, with every part within reach."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState

from finetuning import building, claiming, session, starting
from finetuning.settings import Settings
from finetuning.trainer import Trainer

FULL = {"replace_last_n_layers": 0, "add_new_layers": 0, "freeze_original_layers": False}


def build(settings: Settings) -> Any:
    """The run, ready to train, with its output folder claimed. It speaks only where the test sets SAMPLE_STEPS."""
    if not settings.is_set("sample_steps"):
        settings = settings.model_copy(update={"sample_steps": 0})
    # Accelerate keeps its precision for the life of a process; a test may want another one.
    AcceleratorState._reset_state(reset_partial_state=True)
    base, device = starting.check_inputs(settings)
    accelerator = starting.start(settings, device)
    settings = starting.apply_memory_profile(settings, base, accelerator)
    resume = starting.choose_start(settings, base, accelerator)
    rows = starting.open_rows(settings, base, accelerator)
    run = building.build_run(settings, base, rows, accelerator, resume, verbose=False)
    claiming.claim_output_folder(run)
    return run


def make_trainer(run: Any) -> Trainer:
    return session.make_trainer(run, session.make_tracker(run))


def flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Validation figures with an entry for each codebook, as pytest.approx can compare them."""
    accuracies = figures["codebook_accuracy"]
    assert len(accuracies) == 16
    numbers = {f"codebook_accuracy/{codebook}": accuracy for codebook, accuracy in enumerate(accuracies)}
    return {name: value for name, value in figures.items() if name != "codebook_accuracy"} | numbers


def before_each_step(trainer: Trainer, act: Callable[[int], Any]) -> None:
    """Calls ``act`` with the number of each step (from 1) while it is under way."""
    take = trainer.stepper.take

    def taken(*arguments: Any) -> Any:
        act(trainer.progress.step + 1)
        return take(*arguments)

    trainer.stepper.take = taken


def signal_in_step(trainer: Trainer, step: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal while that step is under way."""
    before_each_step(trainer, lambda now: os.kill(os.getpid(), number) if now == step else None)


def train(settings: Settings) -> tuple[Any, Trainer]:
    """Builds and trains; returns both for inspection."""
    run = build(settings)
    trainer = make_trainer(run)
    trainer.run()
    return run, trainer
