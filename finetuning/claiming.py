"""The output folder becomes this run's: locked, checked for space, taken over or cleared."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetuning.building import Run
from finetuning.checkpoint import (
    LOCK_FILE,
    check_disk_space,
    clean_up_leftovers,
    clear_output_folder,
    lock_output_folder,
    reclaimable_bytes,
    run_entries,
)
from finetuning.disk import bytes_of
from finetuning.errors import UserError
from finetuning.manifest import remove_empty_folders
from finetuning.resume import (
    Resume,
    take_over,
)
from finetuning.samples import samples_bytes
from finetuning.saving import state_bytes
from finetuning.settings import Settings
from finetuning.sharding import asks_for_fsdp
from finetuning.state import damage_of_state, find_states, step_of


def claim_output_folder(run: Run) -> None:
    """Locks the folder, checks the disk, takes it over or removes the run that is given up, and saves the settings.

    Raises:
        UserError: no space, another run in the folder, or not all processes see it.
    """
    output_dir = run.settings.output_dir
    if run.is_main:
        try:
            _claim_output_folder(run)
        except OSError as error:
            raise UserError(f"OUTPUT_DIR: {output_dir} cannot be written: {error}") from None
    run.accelerator.wait_for_everyone()
    if not (output_dir / "settings.json").is_file():
        raise UserError(
            f"OUTPUT_DIR: {output_dir} must lie on a disk that all machines share; this one does not see it"
        )


def _claim_output_folder(run: Run) -> None:
    settings, output_dir = run.settings, run.settings.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    run.lock = lock_output_folder(output_dir)
    clean_up_leftovers(output_dir)
    if run.resume and not run.resume.folder.is_dir():
        raise UserError(f"RESUME: {run.resume.folder} has been removed meanwhile, by another run; start again")
    if run.resume and run.resume.is_in(output_dir):
        newest = next(iter(find_states(output_dir)), run.resume.folder)
        if settings.resume == "auto" and step_of(newest) > run.state.step and not damage_of_state(newest):
            raise UserError(
                f"OUTPUT_DIR: {newest} was saved meanwhile, by another run; start again to go on from there"
            )
    required = run.exporter.required_bytes() + state_bytes(run.model, settings.ema_decay)
    if not run.is_over:
        samples = bytes_of_samples(run)
        what = f"one checkpoint and one state{', and the samples of the run,' if samples else ''}"
        check_disk_space(output_dir, required + samples - spare_bytes(run.resume, output_dir), what)
    if not (run.resume and run.resume.is_in(output_dir)):
        clear_output_folder(settings)
    # First of all: a start that is cut off from here on leaves a folder that the next one knows as its own.
    settings.save(output_dir / "settings.json")
    if run.resume:
        take_over(run.resume, settings)


def bytes_of_samples(run: Run) -> int:
    """About what the run is still going to say, on the disk, where it stays; under FSDP it says nothing."""
    return 0 if asks_for_fsdp() else samples_bytes(run.settings, run.requests, run.num_steps - run.progress.step)


def spare_bytes(resume: Resume | None, output_dir: Path) -> int:
    """What the run will remove: older states of its own, or the run that it replaces."""
    if resume and resume.is_in(output_dir):
        return sum(map(bytes_of, find_states(output_dir)[1:]))
    return reclaimable_bytes(output_dir)


def discard_rows(settings: Settings) -> None:
    """Removes what ``open_rows`` left, for a run that was refused after it, where there was none before."""
    if run_entries(settings.output_dir):
        return
    (settings.output_dir / LOCK_FILE).unlink(missing_ok=True)
    shutil.rmtree(settings.output_dir / "rows", ignore_errors=True)
    for listed in settings.output_dir.glob("rejected.*.jsonl"):
        listed.unlink(missing_ok=True)  # each process removes them
    remove_empty_folders(settings.output_dir)
