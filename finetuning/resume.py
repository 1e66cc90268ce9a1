"""Whether a run goes on, and from where: what RESUME finds, and whether it belongs to the same settings and data."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetuning.base_model import Base
from finetuning.checkpoint import LOG_FILES, check_holds_no_run, run_entries, sample_folders
from finetuning.console import say
from finetuning.disk import (
    CHECKSUMS_FILE,
    checksum,
    damage,
    link_or_copy,
    new_folder,
    read_json,
    remove_folder,
    write_json,
)
from finetuning.errors import UserError
from finetuning.settings import Settings
from finetuning.state import RECORD_FILE, State, damage_of_state, find_states, rotate_states, state_folder, step_of

#: Settings that change nothing that has been learnt so far; every other difference is refused.
MAY_CHANGE = frozenset({
    "OUTPUT_DIR", "OVERWRITE_OUTPUT", "RESUME", "NUM_EPOCHS", "MAX_STEPS", "LOGGING_STEPS", "SAVE_STEPS",
    "EPOCH_FOLDER",
    "SAVE_MINUTES", "EVAL_STEPS", "SAVE_TOTAL_LIMIT", "SAVE_EPOCHS", "VERIFY_ROUNDTRIP", "NUM_WORKERS", "DEVICE",
    "ATTN_IMPLEMENTATION", "DATA_CHECK", "SAVE_AUDIO", "CODES_CACHE_DIR", "CODES_CACHE_GB", "PREPARE_ONLY", "USE_WANDB",
    "WANDB_PROJECT", "WANDB_RUN_NAME", "WANDB_ENTITY", "UPLOAD_TO_HUB", "HUB_MODEL_ID_BEST", "HUB_MODEL_ID_LAST",
    "HUB_PRIVATE", "HUB_EVERY",
    "EFFECTIVE_BATCH_SIZE", "GRADIENT_CHECKPOINTING", "COMPILE", "PREFIX_CACHE", "PREFIX_CACHE_GB", "PREFIX_CACHE_DIR",
    "MEMORY_PROFILE", "LORA_EXPORT_SCALE", "ASR_MODEL", "MOS_MODEL", "SAMPLE_STEPS", "EVAL_TEXTS", "BEST_METRIC",
    "EARLY_STOPPING_PATIENCE", "REPORT_TO", "COMPARE_JSONL",
})  # fmt: skip
#: Settings that name what is compared by its content instead: files may move.
COMPARED_BY_CONTENT = frozenset({
    "INIT_MODEL_PATH", "TRAIN_JSONL", "VALIDATION_JSONL", "DATASET_NAME", "AUGMENT_NOISE_DIR",
})  # fmt: skip
#: Settings that may not change and that MEMORY_PROFILE picks.
PICKED_FOR_MEMORY = ("OPTIMIZER", "WEIGHTS_PRECISION")
#: Settings that may change as long as what a step holds, over all processes, stays.
MICRO_BATCHES = ("BATCH_SIZE", "MAX_FRAMES_PER_BATCH", "GRADIENT_ACCUMULATION_STEPS")
#: Bytes of each weight file, evenly spread, that stand for all of it in a fingerprint.
_SAMPLES, _SAMPLE_BYTES = 64, 65536


@dataclass(frozen=True)
class Resume:
    """A state to go on from.

    Attributes:
        run_dir: the OUTPUT_DIR of the run that saved it.
        origin: what RESUME names, to be known again; see ``origin_of``. None where the run just goes on.
    """

    folder: Path
    run_dir: Path
    origin: dict[str, str] | None = None

    def state(self) -> State:
        return State(self.folder)

    def is_in(self, output_dir: Path) -> bool:
        """Whether the run goes on in the folder in which it was."""
        return self.run_dir.resolve() == output_dir.resolve()


# --------------------------------------------------------------------------------------------------------- finding


def begin_or_resume(settings: Settings, base: Base, num_processes: int) -> Resume | None:
    """Where the run begins: at a state, or None for the beginning.

    ==================  =======================================================================================
    RESUME              goes on from
    ==================  =======================================================================================
    never               nothing
    auto                the newest whole state in OUTPUT_DIR
    a folder            the state there; once OUTPUT_DIR has gone on from it, the newest whole state in OUTPUT_DIR
    ==================  =======================================================================================

    Another run in OUTPUT_DIR is refused, or replaced where OVERWRITE_OUTPUT says so. Every byte of a state is read, to
    be sure of it; its rows are compared later, once they are open.

    Raises:
        UserError: there is no state where one is asked for, it is damaged, it belongs to other settings or another
            base, or OUTPUT_DIR holds another run.
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
    """The state that RESUME asks for, whole and of these settings; None where there is none to find."""
    if settings.resume == "never":
        return None
    if settings.resume == "auto":
        return _find_own(settings, base, num_processes)
    named = Path(settings.resume).expanduser()
    origin = origin_of(named)
    if _has_gone_on_from(origin, settings.output_dir):
        say(f"{settings.output_dir} has gone on from {named} already; it goes on from its own newest state")
        return _find_own(settings, base, num_processes)
    resume = _find_named(named, origin)
    if differences := differences_of(resume.state(), settings, base, num_processes):
        raise UserError(f"RESUME: {resume.folder} belongs to other settings: {_listed(differences)}")
    return resume


def _find_own(settings: Settings, base: Base, num_processes: int) -> Resume | None:
    """The newest whole state in OUTPUT_DIR; None where there is none, or where OVERWRITE_OUTPUT replaces its run."""
    output_dir = settings.output_dir
    states = find_states(output_dir)
    newest = _newest_whole(states)
    if newest is None and states and not settings.overwrite_output:
        raise UserError(
            f"OUTPUT_DIR: no state in {output_dir / 'state'} is whole, so the run cannot be resumed; "
            "RESUME=never with OVERWRITE_OUTPUT=true starts over, another OUTPUT_DIR keeps its checkpoints"
        )
    if newest is None:
        return None
    resume = Resume(newest, output_dir)
    differences = differences_of(resume.state(), settings, base, num_processes)
    if differences and not settings.overwrite_output:
        raise UserError(
            f"OUTPUT_DIR: {output_dir} holds a run that was begun with other settings, so it cannot be "
            f"resumed: {_listed(differences)}"
        )
    if differences:
        say(f"the run in {output_dir} had other settings and is replaced: {'; '.join(differences)}")
    return None if differences else resume


def _newest_whole(states: list[Path]) -> Path | None:
    for folder in states:
        if not (problems := damage_of_state(folder)):
            return folder
        say(f"{folder} is damaged ({'; '.join(problems)}); going back to the state before it")
    return None


def _find_named(named: Path, origin: dict[str, str]) -> Resume:
    """The state in a folder: of a state, of a run, or a run's state/; of several the newest that is whole."""
    if (named / RECORD_FILE).is_file():
        if problems := damage_of_state(named):
            raise UserError(
                f"RESUME: {named} is damaged: {'; '.join(problems)}. RESUME=auto takes the newest whole one"
            )
        return Resume(named, named.resolve().parent.parent, origin)
    run_dir = named.parent if named.name == "state" else named
    if newest := _newest_whole(find_states(run_dir)):
        return Resume(newest, run_dir, origin)
    raise UserError(f"RESUME: {named} holds no whole state to resume from (state/step-N with {RECORD_FILE})")


def origin_of(named: Path) -> dict[str, str]:
    """What RESUME names, to be known again: the place and, for a single state, its content."""
    checksums = named / CHECKSUMS_FILE
    return {"path": str(named.resolve()), "content": checksum(checksums) if checksums.is_file() else ""}


def _has_gone_on_from(origin: dict[str, str], output_dir: Path) -> bool:
    """Whether the states in OUTPUT_DIR descend from what RESUME names, so that a restart must not go back to it.

    The named state itself may have been rotated away since.
    """
    known = read_json(_origin_file(output_dir))
    if known is None or not find_states(output_dir):
        return False
    return known["path"] == origin["path"] and origin["content"] in ("", known["content"])


def _origin_file(output_dir: Path) -> Path:
    return output_dir / "state" / "origin.json"


def may_begin_again(settings: Settings) -> bool:
    """Whether OUTPUT_DIR holds just what this very run leaves when it is stopped before its first state.

    Then its checkpoints come again as they are. A run that has finished says so in ``last/``, and one that was longer
    under way had a state, so it is no leftover: its checkpoints may be all that somebody has kept of it.
    """
    output_dir = settings.output_dir
    if settings.resume == "never" or find_states(output_dir):
        return False
    saved = read_json(output_dir / "settings.json")
    if saved is None:
        return False
    checkpoints = {file.parent.name: read_json(file) or {} for file in output_dir.glob("*/training_state.json")}
    if settings.resume != "auto" and saved.get("RESUME") == settings.resume:
        checkpoints.pop("best", None)  # copied from what RESUME names
    if any(found.get("complete") or found.get("step", 0) > settings.save_steps for found in checkpoints.values()):
        return False
    # Without a state nothing tells whether files that have another name now hold the same rows.
    moved = any(saved.get(name) != value for name, value in settings.public().items() if name in COMPARED_BY_CONTENT)
    return not moved and not differing_settings(saved, settings)


# ------------------------------------------------------------------------------------------------------- comparing


def differences_of(state: State, settings: Settings, base: Base, num_processes: int) -> list[str]:
    """What keeps a state from being resumed, each by name; the rows are compared later, once they are open."""
    record = state.record
    differences = differing_settings(record["settings"], settings)
    if difference := _difference_of_steps(record, settings, num_processes):
        differences.append(difference)
    if record["base"] != fingerprint_of_base(base):
        differences.append(f"INIT_MODEL_PATH: {base.name} has other weights than the base of that run")
    return differences


def _difference_of_steps(record: Mapping[str, Any], settings: Settings, num_processes: int) -> str | None:
    """How a step of the state and one of these settings differ in what they hold. Other processes alone are allowed."""
    public = settings.public()
    saved, now = ({name: values.get(name) for name in MICRO_BATCHES} for values in (record["settings"], public))
    if saved == now:
        return None
    budgets = saved["MAX_FRAMES_PER_BATCH"], now["MAX_FRAMES_PER_BATCH"]
    if (budgets[0] is None) != (budgets[1] is None):
        return f"MAX_FRAMES_PER_BATCH was {_shown(budgets[0])}, is {_shown(budgets[1])}"
    name, unit = ("BATCH_SIZE", "rows") if budgets[1] is None else ("MAX_FRAMES_PER_BATCH", "frames")
    before = record["processes"] * saved[name] * saved["GRADIENT_ACCUMULATION_STEPS"]
    after = num_processes * now[name] * now["GRADIENT_ACCUMULATION_STEPS"]
    if before == after:
        return None
    return f"{name} x GRADIENT_ACCUMULATION_STEPS x processes was {before}, is {after} ({unit} of a step)"


def differing_settings(saved: Mapping[str, Any], settings: Settings) -> list[str]:
    """Settings that may not change and did, as "NAME was …, is …"."""
    defaults = type(settings).model_construct().public()
    now = settings.public()
    ignored = MAY_CHANGE | COMPARED_BY_CONTENT | set(MICRO_BATCHES)
    has_profile = bool(settings.memory_profile or saved.get("MEMORY_PROFILE"))
    return [
        f"{name} was {_shown(before)}, is {_shown(value)}{_advice(name, before) if has_profile else ''}"
        for name, value in now.items()
        if name not in ignored and (before := saved.get(name, defaults[name])) != value
    ]


def _advice(name: str, before: Any) -> str:
    """What to do about a setting that MEMORY_PROFILE picks for another GPU or another number of processes."""
    return f" (MEMORY_PROFILE picks it; set {name}={before})" if name in PICKED_FOR_MEMORY else ""


def check_same_rows(state: State, fingerprints: Mapping[str, str | None]) -> None:
    """Raises UserError where the rows of the run have changed since the state was saved.

    Args:
        fingerprints: of the training and the validation rows, as ``state.record["data"]``.
    """
    settings_of = {
        "train": "TRAIN_JSONL (or DATASET_NAME)",
        "validation": "VALIDATION_JSONL (or the held-out rows)",
        "references": "ref_audio and ref_text (or the clips that REFERENCE_SAMPLING draws)",
    }
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


# --------------------------------------------------------------------------------------------- where it goes on


def take_over(resume: Resume, settings: Settings) -> None:
    """Makes OUTPUT_DIR the folder of the run: states and samples of a future that is given up go; from elsewhere, logs,
    best/ and the state come (weights as hard links where the disk allows), the state last.

    Raises:
        OSError: they cannot be copied.
    """
    output_dir = settings.output_dir
    if resume.is_in(output_dir):
        for folder in find_states(output_dir):
            if step_of(folder) > resume.state().step:
                remove_folder(folder)
        for step, folder in sample_folders(output_dir):
            if step > resume.state().step:
                remove_folder(folder)
        rotate_states(output_dir)  # a save that was cut off may not have come to it
    if resume.origin is None:
        return
    (output_dir / "state").mkdir(parents=True, exist_ok=True)
    write_json(_origin_file(output_dir), resume.origin)
    if resume.is_in(output_dir):
        return
    for name in LOG_FILES:
        if (resume.run_dir / name).is_file():
            shutil.copyfile(resume.run_dir / name, output_dir / name)
    best = resume.run_dir / "best"
    if best.is_dir() and not damage(best):
        _copy_folder(best, output_dir / "best")
    _copy_folder(resume.folder, state_folder(output_dir, resume.state().step))


def _copy_folder(source: Path, target: Path) -> None:
    with new_folder(target, is_sealed=True) as folder:
        shutil.copytree(source, folder, copy_function=link_or_copy, dirs_exist_ok=True)
