"""A dataset's splits to JSONL files: what ``data_processing.py --mode prepare`` and ``train.py`` do, as a class."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from finetuning.base_model import choose_device, resolve_base, resolve_folder
from finetuning.codec import check_codec_folder
from finetuning.console import say
from finetuning.errors import UserError
from finetuning.manifest import RowFormat
from finetuning.prepare import PrepareOptions, Reference, prepare_split
from finetuning.processes import (
    Processes,
    get_device_for_current_process,
    get_num_workers_for_dataloader,
    launched_processes,
)
from finetuning.settings import Settings, load_settings
from finetuning.source import ColumnNames, Split, open_split, split_names
from finetuning.training_rows import must_prepare
from finetuning.workspace import read_stamp


class JSONLDataPreparer:
    """Writes ``<output_dir>/<split>.jsonl`` for the splits of a dataset.

    Args:
        dataset_name: Hub id, folder or table file; default DATASET_NAME.
        output_dir: where the JSONL files go.
        tokenizer_path: folder or Hub id of the 12 Hz codec, or of a base that contains it; default TOKENIZER_PATH, else
            the base's own.
        device: of the codec; default this process's.
        settings: columns, speaker name, reference and the like; default those of the environment and ``.env``.
        row_format: default that of the settings.
        processes: those that share the work, which all make the same calls; default those of this launch.
        max_clips_per_batch: clips in one batch of the codec.
        force: make again what is there.
    """

    def __init__(
        self,
        dataset_name: str | None = None,
        output_dir: str | Path = "./data",
        tokenizer_path: str | Path | None = None,
        device: str | None = None,
        *,
        settings: Settings | None = None,
        row_format: RowFormat | None = None,
        processes: Processes | None = None,
        max_clips_per_batch: int = 32,
        force: bool = False,
    ) -> None:
        self.settings = settings or load_settings()
        self.dataset_name = dataset_name or self.settings.dataset_name
        self.output_dir = Path(output_dir)
        self.codec_folder, default_format = find_codec(self.settings, tokenizer_path)
        self.row_format = row_format or default_format
        device = device or device_of_this_process(self.settings)
        self.options = PrepareOptions(
            device=device,
            max_clips_per_batch=max_clips_per_batch,
            num_workers=decoding_workers(self.settings),
            save_audio=self.settings.save_audio,
            reference=given_reference(self.settings),
            force=force,
            processes=processes or launched_processes(device),
        )
        self._references: dict[str, Reference] = {}

    @property
    def is_main(self) -> bool:
        return self.options.processes.is_main

    def prepare_all_splits(self, max_samples: int | None = None) -> dict[str, Path]:
        """All splits, the training split first; split -> its JSONL."""
        names = split_names(self.dataset_name, self.settings.dataset_config)
        ordered = sorted(names, key=lambda name: name != self.settings.train_split)
        return {name: self.prepare_split(name, max_samples) for name in ordered}

    def prepare_split(self, split: str, max_samples: int | None = None, output_jsonl: str | Path | None = None) -> Path:
        """One split.

        Args:
            max_samples: only its first so many rows.
            output_jsonl: default ``<output_dir>/<split>.jsonl``.

        Raises:
            UserError: see ``source.open_split`` and ``prepare.prepare_split``.
        """
        output = Path(output_jsonl or self.output_dir / f"{split}.jsonl")
        # Copies are made of audio files when the prepared rows are opened for training, and references are read.
        needs_audio = self.settings.augment_copies > 0 or self.settings.reference_sampling == "same_speaker"
        keeps_audio = self.options.save_audio or (needs_audio and split == self.settings.train_split)
        options = replace(self.options, max_rows=max_samples, save_audio=keeps_audio)
        opened = open_dataset_split(self.settings, split, self.dataset_name)
        return prepare_split(opened, output, self.codec_folder, self.row_format, options, self._references)

    def prepare_validation(self) -> None:
        """VALIDATION_SPLIT to VALIDATION_JSONL, without references: validation needs none."""
        settings = self.settings
        split, names = settings.validation_split, split_names(self.dataset_name, settings.dataset_config)
        if split not in names and not settings.is_set("validation_split"):
            say(f"{self.dataset_name} has no split {split}; VALIDATION_FRACTION holds rows out")
            return
        options = replace(self.options, max_rows=settings.max_eval_samples, chooses_references=False)
        opened = open_dataset_split(settings, split, self.dataset_name)
        prepare_split(opened, settings.validation_jsonl, self.codec_folder, self.row_format, options)


def find_codec(settings: Settings, tokenizer_path: str | Path | None = None) -> tuple[Path, RowFormat]:
    """The codec's folder, and the format of rows (with the base's control tokens where the base is at hand)."""
    if tokenizer_path is None:
        base = resolve_base(settings)
        return base.codec_folder, RowFormat.from_settings(settings, base.special_tokens())
    return find_codec_folder(str(tokenizer_path), "tokenizer_path"), RowFormat.from_settings(settings)


def find_codec_folder(name: str, setting: str) -> Path:
    """The 12 Hz codec that a Hub id or a folder names: it, or that of a base.

    Raises:
        UserError: there is none; the message names the setting.
    """
    folder = resolve_folder(name, setting)
    if (folder / "speech_tokenizer").is_dir():
        folder = folder / "speech_tokenizer"
    check_codec_folder(folder)
    return folder


def open_dataset_split(settings: Settings, split: str, dataset_name: str | None = None) -> Split:
    """A split of the settings' dataset with the settings' columns."""
    names = ColumnNames.from_settings(settings)
    return open_split(dataset_name or settings.dataset_name, split, names, settings.dataset_config)


def given_reference(settings: Settings) -> Reference | None:
    """REF_AUDIO_PATH and REF_TEXT."""
    if settings.ref_audio_path is None:
        return None
    if not settings.ref_audio_path.is_file():
        raise UserError(f"REF_AUDIO_PATH: {settings.ref_audio_path} does not exist")
    return Reference(settings.ref_audio_path, settings.ref_text)


def device_of_this_process(settings: Settings) -> str:
    """DEVICE, with this process's own GPU where there are several."""
    device = choose_device(settings)
    return get_device_for_current_process() if device == "cuda" else device


def decoding_workers(settings: Settings) -> int:
    """NUM_WORKERS where the user set it, else two a GPU and none without one."""
    return settings.num_workers if settings.is_set("num_workers") else get_num_workers_for_dataloader()


def prepare_missing_rows(
    settings: Settings, row_format: RowFormat, codec_folder: Path, device: str, processes: Processes
) -> None:
    """Prepares DATASET_NAME where TRAIN_JSONL is missing and the user set DATASET_NAME, and its validation split too.

    A TRAIN_JSONL that was prepared from fewer rows than are asked for now is made again.
    """
    if not must_prepare(settings):
        return
    say(f"TRAIN_JSONL {settings.train_jsonl} is prepared from DATASET_NAME {settings.dataset_name}")
    preparer = JSONLDataPreparer(
        tokenizer_path=codec_folder, device=device, settings=settings, row_format=row_format, processes=processes
    )
    has_own_validation = settings.validation_jsonl.is_file() and read_stamp(settings.validation_jsonl) is None
    if not has_own_validation and settings.validation_jsonl != Path(os.devnull):
        preparer.prepare_validation()
    # Last, so that a run that was interrupted before is noticed by the missing TRAIN_JSONL.
    preparer.prepare_split(settings.train_split, settings.max_train_samples, settings.train_jsonl)
