"""The rows of a run: encoded where codes are missing, indexed, and split into training and validation."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.augment import Augmentation
from finetuning.codec import codec_fingerprints
from finetuning.console import say
from finetuning.disk import read_json, write_json
from finetuning.encode_rows import encode_jsonl, encoded_path
from finetuning.errors import UserError
from finetuning.manifest import Row, RowFormat
from finetuning.row_index import Manifest, RowStop, codes_source, file_stamp, find_index, hold_out, open_rows
from finetuning.settings import Settings
from finetuning.workspace import read_stamp, rejected_path

#: Rows whose audio files are looked up at a time.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a run; ``validation`` is None where there are none."""

    train: Manifest
    validation: Manifest | None


def open_training_rows(
    settings: Settings, codec_folder: Path, row_format: RowFormat, device: str, build: bool = True
) -> TrainingRows:
    """Training and validation rows as the settings name them, encoded first where codes are missing, the training rows
    with their copies (AUGMENT_COPIES).

    Args:
        build: encode and index (the main process); else open what the main process has opened.

    Raises:
        UserError: see ``encode_jsonl`` and ``open_rows``.
    """
    if build:
        has_validation_file = settings.validation_jsonl.is_file() or settings.demands_validation_file()
    else:
        has_validation_file = _pointer(settings, "VALIDATION_JSONL").is_file()
    names = ["TRAIN_JSONL"] + ["VALIDATION_JSONL"] * has_validation_file
    if build:
        check_files(settings)
        copies = {"TRAIN_JSONL": Augmentation.from_settings(settings)}
        opened = [_File(settings, name, codec_folder, row_format, device, copies.get(name)).open() for name in names]
        _pointer(settings, "VALIDATION_JSONL").unlink(missing_ok=True)  # another run's
        for name, rows in zip(names, opened, strict=True):
            _write_pointer(settings, name, rows)
    else:
        opened = [_follow_pointer(settings, name) for name in names]
    if has_validation_file:
        train, validation = opened[0], _of_known_speakers(_without_copies(opened[1]), opened[0])
    else:
        train, validation = hold_out(opened[0], settings.validation_fraction, settings.seed)
    if validation is not None and settings.max_eval_samples:
        validation = validation.select(np.arange(min(len(validation), settings.max_eval_samples)))
    return TrainingRows(train, validation)


def must_prepare(settings: Settings) -> bool:
    """Whether TRAIN_JSONL is to be made from DATASET_NAME: it is missing, or was made from fewer rows than asked for.

    Only where the user set DATASET_NAME: a mistyped path must not start a download.
    """
    if settings.data_mode != "jsonl" or not settings.is_set("dataset_name"):
        return False
    if not settings.train_jsonl.is_file():
        return True
    stamp = read_stamp(settings.train_jsonl) or {}
    made_of = stamp.get("dataset", settings.dataset_name)
    if made_of != settings.dataset_name:
        raise UserError(
            f"TRAIN_JSONL: {settings.train_jsonl} was prepared from {made_of}, but DATASET_NAME is "
            f"{settings.dataset_name}; unset DATASET_NAME to train on it, or name another TRAIN_JSONL"
        )
    made_with = stamp.get("max_rows")
    return made_with is not None and (settings.max_train_samples or math.inf) > made_with


def comes_from_dataset(settings: Settings) -> bool:
    """Whether the run reads DATASET_NAME: it streams it, or prepares it first."""
    return settings.data_mode == "direct" or must_prepare(settings)


def check_train_jsonl(settings: Settings) -> None:
    """Raises UserError when TRAIN_JSONL is missing and is not going to be made."""
    if settings.train_jsonl.is_file() or comes_from_dataset(settings):
        return
    if settings.is_set("dataset_name"):
        raise UserError(
            f"TRAIN_JSONL: {settings.train_jsonl} does not exist, and DATA_MODE=none prepares nothing; "
            f"DATA_MODE=jsonl prepares it from DATASET_NAME {settings.dataset_name}"
        )
    raise UserError(
        f"TRAIN_JSONL: {settings.train_jsonl} does not exist; write one JSON object a line, such as "
        '{"audio": "clips/1.wav", "text": "What is said."}, or set DATASET_NAME to have it prepared from a dataset'
    )


def check_files(settings: Settings) -> None:
    """Raises UserError for a named file that is missing; cheap enough to come before any heavy import."""
    check_train_jsonl(settings)
    Augmentation.from_settings(settings)
    needs_validation = settings.demands_validation_file() and not comes_from_dataset(settings)
    for field in ["ref_audio_path"] * settings.is_set("ref_audio_path") + ["validation_jsonl"] * needs_validation:
        path = getattr(settings, field)
        if path is not None and not path.is_file():
            raise UserError(f"{field.upper()}: {path} does not exist")


# ------------------------------------------------------------------------------------------------------- one file


@dataclass(frozen=True)
class _File:
    """TRAIN_JSONL or VALIDATION_JSONL on its way to rows with codes; ``augmentation`` adds copies."""

    settings: Settings
    setting: str
    codec_folder: Path
    row_format: RowFormat
    device: str
    augmentation: Augmentation | None = None

    def open(self) -> Manifest:
        """The rows as they stand where all have codes that are not stale, else the rows of the encoded file."""
        if self.settings.data_mode == "none":
            return self._open(self.jsonl)
        if not self._is_encoded():
            codes = CodesCheck(self.jsonl, self.setting, self.codec_folder)
            if self.augmentation is None and ((rows := self._find(self.jsonl)) is None or not codes.any_stale(rows)):
                try:
                    return self._open(self.jsonl, stop_at=codes.is_stale)
                except RowStop:
                    pass
            self._encode()
        say(f"codes of {self.setting} are kept in {self.encoded}")
        rows = self._open(self.encoded)
        self._note_origin(rows)
        return rows

    @property
    def is_train(self) -> bool:
        return self.setting == "TRAIN_JSONL"

    @property
    def jsonl(self) -> Path:
        return self.settings.train_jsonl if self.is_train else self.settings.validation_jsonl

    @property
    def max_rows(self) -> int | None:
        return self.settings.max_train_samples if self.is_train else self.settings.max_eval_samples

    @property
    def encoded(self) -> Path:
        return encoded_path(self.jsonl, self.max_rows, is_augmented=self.augmentation is not None)

    def _limit(self, jsonl: Path) -> int | None:
        """How many rows of a file are wanted: with copies, which do not count, the encoded file has no others."""
        return None if self.augmentation and jsonl == self.encoded else self.max_rows

    def _find(self, jsonl: Path) -> Manifest | None:
        spare_folder = _rows_folder(self.settings)
        return find_index(jsonl, self.row_format, max_rows=self._limit(jsonl), spare_folder=spare_folder)

    def _open(self, jsonl: Path, stop_at: Any = None) -> Manifest:
        return open_rows(
            jsonl,
            self.row_format,
            self.setting,
            max_rows=self._limit(jsonl),
            rejected_file=self.settings.output_dir / f"rejected.{_name(self.setting)}.jsonl",
            spare_folder=_rows_folder(self.settings),
            stop_at=stop_at,
        )

    def _encode(self) -> None:
        encode_jsonl(
            self.jsonl,
            self.encoded,
            self.codec_folder,
            self.row_format,
            device=self.device,
            setting=self.setting,
            max_rows=self.max_rows,
            augmentation=self.augmentation,
        )

    def _is_encoded(self) -> bool:
        """Whether the encoded file's index was made of this very file, so that neither has to be read again."""
        rows = self._find(self.encoded)
        if rows is None or read_json(_origin_file(rows)) != self._origin():
            return False
        return not CodesCheck(self.encoded, self.setting, self.codec_folder).any_stale(rows)

    def _note_origin(self, rows: Manifest) -> None:
        # A clip or a copy that was left out may be mended without a trace in this file: then the encoder has to look.
        if not rejected_path(self.encoded).exists() and self._has_all_copies(rows):
            with contextlib.suppress(OSError):  # somebody else's index: it only takes longer
                write_json(_origin_file(rows), self._origin())

    def _has_all_copies(self, rows: Manifest) -> bool:
        if self.augmentation is None:
            return True
        num_copies = int(rows.has("augmentation").sum())
        return num_copies == self.augmentation.copies * (len(rows) - num_copies)

    def _origin(self) -> dict[str, str]:
        made_of = {"augmentation": self.augmentation.digest()} if self.augmentation else {}
        return {"jsonl": os.path.abspath(self.jsonl), "stamp": file_stamp(self.jsonl)} | made_of


class CodesCheck:
    """Whether a file's codes belong to its audio files as they are now, and to this codec."""

    def __init__(self, jsonl: Path, setting: str, codec_folder: Path) -> None:
        self.jsonl, self.setting, self.codec_folder = jsonl, setting, codec_folder
        self._codec_ids: tuple[str, ...] = ()  # hashing a codec takes a second; most files do not need it

    def is_stale(self, row: Row) -> bool:
        """Whether a row says what its codes were made of, and that has changed.

        Raises:
            UserError: the codec has changed and the audio is gone.
        """
        num_bytes, modified_ns, codec = codes_source(row.raw)
        audio = None if row.audio is None else str(row.audio)
        return codec is not None and self._has_changed(row.line, audio, num_bytes, modified_ns, codec)

    def any_stale(self, rows: Manifest) -> bool:
        """``is_stale`` for all rows of an index, a few at a time."""
        says = np.flatnonzero(rows.has("codes_codec"))
        for start in range(0, len(says), _ROWS_AT_ONCE):
            part = rows.select(says[start : start + _ROWS_AT_ONCE])
            columns = ("line", "audio", "audio_bytes", "audio_modified_ns", "codes_codec")
            if any(map(self._has_changed, *(part.column(name).tolist() for name in columns))):
                return True
        return False

    def _has_changed(self, line: int, audio: str | None, num_bytes: int, modified_ns: int, codec: str) -> bool:
        self._codec_ids = self._codec_ids or codec_fingerprints(self.codec_folder)
        is_same_codec, status = codec in self._codec_ids, _file_status(audio)
        if status is not None:
            return not is_same_codec or (num_bytes, modified_ns) != (status.st_size, status.st_mtime_ns)
        if not is_same_codec:
            raise UserError(
                f"{self.setting}: {self.jsonl} line {line}: its codes were made by another codec and its audio is "
                "gone; name that codec in TOKENIZER_PATH, bring the audio back, or prepare the dataset again (--force)"
            )
        return False


def _file_status(path: str | None) -> os.stat_result | None:
    try:
        status = None if path is None else os.stat(path)
    except (OSError, ValueError):
        return None
    return status if status and stat.S_ISREG(status.st_mode) else None


# --------------------------------------------------------------------------------------------------- several processes


def _rows_folder(settings: Settings) -> Path:
    return settings.output_dir / "rows"


def _name(setting: str) -> str:
    return "train" if setting == "TRAIN_JSONL" else "validation"


def _pointer(settings: Settings, setting: str) -> Path:
    """Names the Arrow file for the other processes, which need not see the JSONL."""
    return _rows_folder(settings) / f"{_name(setting)}.json"


def _write_pointer(settings: Settings, setting: str, rows: Manifest) -> None:
    _rows_folder(settings).mkdir(parents=True, exist_ok=True)
    write_json(_pointer(settings, setting), {"rows": os.path.abspath(rows.arrow_file)})


def _follow_pointer(settings: Settings, setting: str) -> Manifest:
    pointer = read_json(_pointer(settings, setting))
    if pointer is None:
        raise UserError(f"OUTPUT_DIR: {_pointer(settings, setting)} is not there; all processes must see OUTPUT_DIR")
    return Manifest(Path(pointer["rows"]))


def _origin_file(rows: Manifest) -> Path:
    return rows.arrow_file.with_name("origin.json")


# -------------------------------------------------------------------------------------------------- validation rows


def _without_copies(validation: Manifest) -> Manifest:
    """Validation is on clips as they are."""
    is_copy = validation.has("augmentation")
    if is_copy.any():
        say(f"{is_copy.sum()} rows of VALIDATION_JSONL are augmented copies and are left out")
    return validation.select(np.flatnonzero(~is_copy)) if is_copy.any() else validation


def _of_known_speakers(validation: Manifest, train: Manifest) -> Manifest | None:
    """Validation rows whose speaker is trained; a voice that nothing is learnt of would only blur the figure."""
    known = {speaker.lower() for speaker in train.distinct("speaker")}
    names, speakers = validation.labels("speaker")
    keep = np.array([name.lower() in known for name in names])[speakers]
    if not keep.all():
        say(f"{(~keep).sum()} validation rows are left out: their speakers have no training rows")
    return validation.select(np.flatnonzero(keep)) if keep.any() else None
