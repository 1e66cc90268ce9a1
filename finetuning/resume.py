"""Whether a run goes on, and from where: what RESUME finds, and whether it belongs to the same settings and data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetuning.base_model import Base
from finetuning.checkpoint import LOG_FILES, check_holds_no_run, link_or_copy, run_entries
from finetuning.console import say
from finetuning.disk import damage, new_folder, remove_folder
from finetuning.errors import UserError
from finetuning.settings import Settings
from finetuning.state import RECORD_FILE, State, damage_of_state, find_states, step_of

#: Settings that change nothing that has been learnt so far; every other difference is refused.
MAY_CHANGE = frozenset({
    "OUTPUT_DIR", "OVERWRITE_OUTPUT", "RESUME", "NUM_EPOCHS", "MAX_STEPS", "LOGGING_STEPS", "SAVE_STEPS",
    "SAVE_MINUTES", "EVAL_STEPS", "SAVE_TOTAL_LIMIT", "SAVE_EPOCHS", "VERIFY_ROUNDTRIP", "NUM_WORKERS", "DEVICE",
    "ATTN_IMPLEMENTATION", "DATA_CHECK", "SAVE_AUDIO", "CODES_CACHE_DIR", "CODES_CACHE_GB", "PREPARE_ONLY", "USE_WANDB",
    "WANDB_PROJECT", "WANDB_RUN_NAME", "WANDB_ENTITY", "UPLOAD_TO_HUB", "HUB_MODEL_ID_BEST", "HUB_MODEL_ID_LAST",
    "EFFECTIVE_BATCH_SIZE",
})  # fmt: skip
#: Settings that name what is compared by its content instead: files may move.
COMPARED_BY_CONTENT = frozenset({"INIT_MODEL_PATH", "TRAIN_JSONL", "VALIDATION_JSONL", "DATASET_NAME"})
#: Settings that may change as long as their product with the number of processes stays.
MICRO_BATCHES = ("BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS")
#: Bytes of each weight file, evenly spread, that stand for all of it in a fingerprint.
_SAMPLES, _SAMPLE_BYTES = 64, 65536


@dataclass(frozen=True)
class Resume:
    """A state to go on from.

    Attributes:
        run_dir: the OUTPUT_DIR of the run that saved it.
    """

    folder: Path
    run_dir: Path

    def state(self) -> State:
        return State(self.folder)

    def is_in(self, output_dir: Path) -> bool:
        """Whether the run goes on in the folder in which it was."""
        return self.run_dir.resolve() == output_dir.resolve()


# --------------------------------------------------------------------------------------------------------- finding


def begin_or_resume(settings: Settings, base: Base, num_processes: int) -> Resume | None:
    """Where the run begins: at the state that RESUME asks for, or None for the beginning.

    Reads every byte of a state, to be sure of it; its rows are compared later, once they are open.

    Raises:
        UserError: there is no state where one is asked for, it is damaged, it belongs to other settings or another
            base, or OUTPUT_DIR holds a run that it does not belong to (unless OVERWRITE_OUTPUT replaces that).
    """
    resume = find_resume(settings, base, num_processes)
    if resume is not None and resume.is_in(settings.output_dir):
        return resume
    if run_entries(settings.output_dir) and may_begin_again(settings):
        say(f"{settings.output_dir} holds this run, stopped before its first state: it begins again")
    else:
        check_holds_no_run(settings)
    return resume


def find_resume(settings: Settings, base: Base, num_processes: int) -> Resume | None:
    """The state that RESUME asks for; None where there is none to find. Raises UserError as ``begin_or_resume``."""
    if settings.resume == "never":
        return None
    if settings.resume == "auto":
        return _find_newest(settings, base, num_processes)
    named = Path(settings.resume).expanduser()
    found = _state_at(named)
    if found is None:
        raise UserError(f"RESUME: {named} holds no state to resume from (state/step-N with {RECORD_FILE})")
    if problems := damage_of_state(found):
        raise UserError(f"RESUME: {found} is damaged: {'; '.join(problems)}. RESUME=auto takes the newest whole one")
    resume = Resume(found, found.parent.parent)
    if not resume.is_in(settings.output_dir) and find_states(settings.output_dir):
        say(f"{settings.output_dir} has gone on from {found} already; it goes on from its own newest state")
        return _find_newest(settings, base, num_processes)
    if differences := differences_of(resume.state(), settings, base, num_processes):
        raise UserError(f"RESUME: {found} belongs to other settings: {_listed(differences)}")
    return resume


def _find_newest(settings: Settings, base: Base, num_processes: int) -> Resume | None:
    states = find_states(settings.output_dir)
    for folder in states:
        if problems := damage_of_state(folder):
            say(f"{folder} is damaged ({'; '.join(problems)}); going back to the state before it")
            continue
        resume = Resume(folder, settings.output_dir)
        differences = differences_of(resume.state(), settings, base, num_processes)
        if not differences:
            return resume
        if settings.overwrite_output:
            say(f"the run in {settings.output_dir} had other settings and is replaced: {'; '.join(differences)}")
            return None
        raise UserError(
            f"OUTPUT_DIR: {settings.output_dir} holds a run that was begun with other settings, so it cannot be "
            f"resumed: {_listed(differences)}"
        )
    if states and not settings.overwrite_output:
        raise UserError(
            f"OUTPUT_DIR: no state in {settings.output_dir / 'state'} is whole, so the run cannot be resumed; "
            "RESUME=never with OVERWRITE_OUTPUT=true starts over, another OUTPUT_DIR keeps its checkpoints"
        )
    return None


def _state_at(folder: Path) -> Path | None:
    """A state's folder, or the newest whole state of a run's folder or of its state/ folder."""
    if (folder / RECORD_FILE).is_file():
        return folder
    states = find_states(folder.parent if folder.name == "state" else folder)
    return next((state for state in states if not damage_of_state(state)), states[0] if states else None)


def may_begin_again(settings: Settings) -> bool:
    """Whether the run in OUTPUT_DIR was this one, killed before its first state: nothing would be lost.

    A run that has finished says so in ``last/``; without its state it is no leftover.
    """
    if settings.resume == "never" or find_states(settings.output_dir):
        return False
    saved = _read_json(settings.output_dir / "settings.json")
    last = _read_json(settings.output_dir / "last" / "training_state.json")
    if saved is None or (last or {}).get("complete", False):
        return False
    # Without a state nothing tells whether files that have another name now hold the same rows.
    moved = any(saved.get(name) != value for name, value in settings.public().items() if name in COMPARED_BY_CONTENT)
    return not moved and not differing_settings(saved, settings)


# ------------------------------------------------------------------------------------------------------- comparing


def differences_of(state: State, settings: Settings, base: Base, num_processes: int) -> list[str]:
    """What keeps a state from being resumed, each by name; the rows are compared later, once they are open."""
    record = state.record
    differences = differing_settings(record["settings"], settings)
    micro_batches = {name: record["settings"].get(name) for name in MICRO_BATCHES}
    if tuple(micro_batches.values()) != (settings.batch_size, settings.gradient_accumulation_steps):
        before = record["processes"] * micro_batches["BATCH_SIZE"] * micro_batches["GRADIENT_ACCUMULATION_STEPS"]
        now = settings.rows_per_step(num_processes)
        if before != now:
            differences.append(
                f"BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS x processes was {before}, is {now} (rows of a step)"
            )
    if record["base"] != fingerprint_of_base(base):
        differences.append(f"INIT_MODEL_PATH: {base.name} has other weights than the base of that run")
    return differences


def differing_settings(saved: Mapping[str, Any], settings: Settings) -> list[str]:
    """Settings that may not change and did, as "NAME was …, is …"."""
    defaults = type(settings).model_construct().public()
    now = settings.public()
    ignored = MAY_CHANGE | COMPARED_BY_CONTENT | set(MICRO_BATCHES)
    return [
        f"{name} was {_shown(before)}, is {_shown(value)}"
        for name, value in now.items()
        if name not in ignored and (before := saved.get(name, defaults[name])) != value
    ]


def check_same_rows(state: State, fingerprints: Mapping[str, str | None]) -> None:
    """Raises UserError where the rows of the run have changed since the state was saved.

    Args:
        fingerprints: of the training and the validation rows, as ``state.record["data"]``.
    """
    settings_of = {"train": "TRAIN_JSONL (or DATASET_NAME)", "validation": "VALIDATION_JSONL (or the held-out rows)"}
    changed = [settings_of[name] for name, found in fingerprints.items() if found != state.record["data"].get(name)]
    if changed:
        raise UserError(
            f"{' and '.join(changed)}: the rows are not those of the state in {state.folder}, so the run cannot be "
            "resumed; bring them back, or begin again with RESUME=never and another OUTPUT_DIR"
        )


def say_what_differs(state: State, num_processes: int) -> None:
    """Differences that are allowed and may show in the figures."""
    record = state.record
    if record["processes"] != num_processes:
        say(f"saved by {record['processes']} processes, now {num_processes}: the order of the rows may differ")
    elif record["threads"] != torch.get_num_threads():
        say(
            f"saved with {record['threads']} threads, now {torch.get_num_threads()}: sums may differ in their last "
            f"bits (OMP_NUM_THREADS={record['threads']} for an exact continuation)"
        )
    for name, version in record["versions"].items():
        if version != versions().get(name):
            say(f"saved with {name} {version}, now {versions().get(name)}: figures may differ in their last bits")


def versions() -> dict[str, str]:
    """Of the packages that calculate."""
    return {"torch": torch.__version__}


def fingerprint_of_base(base: Base) -> str:
    """A short hash of the base's weights (evenly spread samples of them) and configuration, wherever they lie."""
    import xxhash

    content = xxhash.xxh3_128()
    for file in (*base.weight_files(), base.folder / "config.json"):
        size = file.stat().st_size
        content.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for number in range(_SAMPLES):
                stream.seek(number * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                content.update(stream.read(_SAMPLE_BYTES))
    return content.hexdigest()


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _listed(differences: list[str]) -> str:
    return (
        f"{'; '.join(differences)}. Put them back to resume it, choose another OUTPUT_DIR, or replace it with "
        "RESUME=never and OVERWRITE_OUTPUT=true"
    )


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# --------------------------------------------------------------------------------------------- where it goes on


def take_over(resume: Resume, settings: Settings) -> None:
    """Makes OUTPUT_DIR the folder of the run: states of a future that is given up go; elsewhere, best/ and logs come.

    Raises:
        OSError: they cannot be copied.
    """
    output_dir = settings.output_dir
    if resume.is_in(output_dir):
        for folder in find_states(output_dir):
            if step_of(folder) > resume.state().step:
                remove_folder(folder)
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in LOG_FILES:
        if (resume.run_dir / name).is_file():
            shutil.copyfile(resume.run_dir / name, output_dir / name)
    best = resume.run_dir / "best"
    if best.is_dir() and not damage(best):
        with new_folder(output_dir / "best") as folder:
            shutil.copytree(best, folder, copy_function=link_or_copy, dirs_exist_ok=True)
