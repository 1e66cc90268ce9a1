"""The rows of a run: encoded where codes are missing, indexed, and split into training and validation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetuning.console import say
from finetuning.errors import UserError
from finetuning.manifest import Manifest, RowFormat, build_manifest, hold_out
from finetuning.prepare import encode_jsonl, encoded_path, needs_encoding
from finetuning.settings import Settings


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a run; ``validation`` is None where there are none."""

    train: Manifest
    validation: Manifest | None


def open_training_rows(
    settings: Settings, codec_folder: Path, row_format: RowFormat, device: str, build: bool = True
) -> TrainingRows:
    """Training and validation rows as the settings name them, encoded first where codes are missing.

    Args:
        build: encode and index (the main process); else open what the main process has indexed.

    Raises:
        UserError: see ``encode_jsonl`` and ``build_manifest``.
    """
    has_validation_file = settings.validation_jsonl.is_file() or settings.is_set("validation_jsonl")
    if build:
        check_files(settings)
        for setting in ["TRAIN_JSONL"] + ["VALIDATION_JSONL"] * has_validation_file:
            _index_rows(settings, codec_folder, row_format, device, setting)
    train = Manifest(_arrow_file(settings, "TRAIN_JSONL"))
    if has_validation_file:
        validation = _of_known_speakers(Manifest(_arrow_file(settings, "VALIDATION_JSONL")), train)
    else:
        train, validation = hold_out(train, settings.validation_fraction, settings.seed)
    if validation is not None and settings.max_eval_samples:
        validation = validation.select(np.arange(min(len(validation), settings.max_eval_samples)))
    return TrainingRows(train, validation)


def check_train_jsonl(settings: Settings) -> None:
    """Raises UserError when TRAIN_JSONL is missing; where the user set DATASET_NAME the message names both."""
    if settings.train_jsonl.is_file():
        return
    if settings.is_set("dataset_name"):
        raise UserError(
            f"TRAIN_JSONL: {settings.train_jsonl} does not exist, and DATASET_NAME {settings.dataset_name} cannot be "
            "prepared by this version; write the rows to a JSONL (audio and text a line) and name it in TRAIN_JSONL"
        )
    raise UserError(
        f"TRAIN_JSONL: {settings.train_jsonl} does not exist; "
        'write one JSON object a line, such as {"audio": "clips/1.wav", "text": "What is said."}'
    )


def check_files(settings: Settings) -> None:
    """Raises UserError for a named file that is missing; cheap enough to come before any heavy import."""
    check_train_jsonl(settings)
    for field in ("validation_jsonl", "ref_audio_path"):
        path = getattr(settings, field)
        if path is not None and settings.is_set(field) and not path.is_file():
            raise UserError(f"{field.upper()}: {path} does not exist")


def _index_rows(settings: Settings, codec_folder: Path, row_format: RowFormat, device: str, setting: str) -> None:
    """Encodes one file where needed, and writes its Arrow file."""
    is_train = setting == "TRAIN_JSONL"
    jsonl = settings.train_jsonl if is_train else settings.validation_jsonl
    max_rows = settings.max_train_samples if is_train else settings.max_eval_samples
    if settings.data_mode != "none" and needs_encoding(jsonl, setting, codec_folder, row_format):
        output = encoded_path(jsonl, max_rows)
        jsonl = encode_jsonl(jsonl, output, codec_folder, row_format, device=device, setting=setting, max_rows=max_rows)
        say(f"codes of {setting} are kept in {jsonl}")
    arrow_file = _arrow_file(settings, setting)
    rejected = settings.output_dir / f"rejected.{arrow_file.stem}.jsonl"
    build_manifest(jsonl, arrow_file, row_format, setting, max_rows, rejected)


def _arrow_file(settings: Settings, setting: str) -> Path:
    return settings.output_dir / "rows" / ("train.arrow" if setting == "TRAIN_JSONL" else "validation.arrow")


def _of_known_speakers(validation: Manifest, train: Manifest) -> Manifest | None:
    """Validation rows whose speaker is trained; a voice that nothing is learnt of would only blur the figure."""
    known = {speaker.lower() for speaker in train.column("speaker")}
    keep = np.array([speaker.lower() in known for speaker in validation.column("speaker")])
    if not keep.all():
        say(f"{(~keep).sum()} validation rows are left out: their speakers have no training rows")
    return validation.select(np.flatnonzero(keep)) if keep.any() else None
