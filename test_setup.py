"""Preflight: checks everything that a run needs, before the GPU hour is spent. Exit code 2 when a check fails.

    python test_setup.py                                  # as .env says
    ENV_FILE=.env.demo python test_setup.py               # the demo, on CPU
    accelerate launch --num_processes=4 test_setup.py     # also: can the processes talk, are all of them ready?
    ./uv_train_4gpu.sh --check                            # the same

Nothing is written but to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.console import say
from finetuning.errors import UserError, run_main
from finetuning.settings import Settings, load_settings

if TYPE_CHECKING:
    from finetuning.base_model import Base

PROJECT = Path(__file__).parent


class Preflight:
    """Numbered checks; later ones use what earlier ones found and are skipped when that is missing.

    Every one of several processes makes them all, for they may run on different machines. Once they can talk, a check
    fails for all of them when it fails in one.
    """

    def __init__(self) -> None:
        self.num_failed = self._number = 0
        self._rank = int(os.environ.get("RANK") or 0)
        self._is_main = self._rank == 0
        self._unsaid: list[str] = []
        self.settings: Settings | None = None
        self.base = self.device = self.accelerator = self.resume = None
        self._references: set[Path] = set()

    def check(self, title: str, function: Callable[[], str], needs: object = True, together: bool = False) -> None:
        """Runs one check; ``function`` returns a line about what it found or raises UserError.

        Args:
            needs: None skips the check.
            together: the processes talk inside of it, so that none can go on when one fails: it fails at once.
        """
        self._number += 1
        found, problem = "", None
        try:
            found = "" if needs is None else function()
        except UserError as error:
            if together and self.accelerator.num_processes > 1:
                raise UserError(f"{title}: process {self._rank}: {error}") from None
            problem = str(error)
        if problem := self._of_any_process(problem):
            self.num_failed += 1
            say(f"{self._number:>2}. ✗ {title}: {problem}")
            self._unsaid += [] if self._is_main else [f"{title}: {problem}"]
        elif needs is None:
            say(f"{self._number:>2}. – {title}: skipped, an earlier check failed")
        else:
            say(f"{self._number:>2}. ✓ {title}: {found}")

    def _of_any_process(self, problem: str | None) -> str | None:
        """This process's problem, or that of the first process that has one where they can talk."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return problem
        from accelerate.utils import gather_object

        problems = {rank: found for rank, found in enumerate(gather_object([problem])) if found}
        if not problems:
            return None
        rank = min(problems)
        return problems[rank] if rank == 0 else f"process {rank}: {problems[rank]}"

    def summary(self) -> None:
        """
        Raises:
            UserError: a check failed.
        """
        if not self.num_failed:
            return
        if self._unsaid:  # the main process, which prints the lines, may know nothing of it
            raise UserError(f"process {self._rank}: {'; '.join(self._unsaid)}")
        raise UserError(f"{self.num_failed} check(s) failed; see the lines marked ✗")

    # ------------------------------------------------------------------------------------------------ the checks

    def python(self) -> str:
        if not (3, 10) <= sys.version_info[:2] <= (3, 12):
            raise UserError(f"Python {platform.python_version()}; 3.10 to 3.12 is needed")
        return f"{platform.python_version()} on {platform.system()} {platform.machine()}"

    def packages(self) -> str:
        wrong = []
        pins = re.findall(r'^  "([\w-]+)==([\w.]+)( ;[^"]*)?"', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
        main_packages = ("torch", "torchaudio", "qwen-tts", "transformers", "accelerate", "datasets", "safetensors")
        for name, wanted, _ in pins:
            if name in main_packages and (found := _installed_version(name)) != wanted:
                wrong.append(f"{name} is {found or 'missing'}, {wanted} is needed")
        if wrong:
            raise UserError("; ".join(wrong) + " (./uv_train.sh installs the right ones)")
        return ", ".join(f"{name} {_installed_version(name)}" for name in ("torch", "qwen-tts", "transformers"))

    def read_settings(self) -> str:
        self.settings = load_settings()
        return f"{len(self.settings.model_fields_set)} set by you ({os.environ.get('ENV_FILE') or '.env'})"

    def hardware(self) -> str:
        import torch

        from finetuning.base_model import choose_attention, choose_device
        from finetuning.starting import check_levers

        self.device = choose_device(self.settings)
        check_levers(self.settings, self.device)
        attention = choose_attention(self.settings, self.device)
        name = torch.cuda.get_device_name() if self.device == "cuda" else f"{os.cpu_count()} cores"
        return f"{self.device} ({name}), precision {self.settings.mixed_precision}, attention {attention}"

    def processes(self) -> str:
        from finetuning.processes import check_processes_talk
        from finetuning.starting import start

        accelerator = check_processes_talk(lambda: start(self.settings, self.device))
        count = accelerator.num_processes
        self.accelerator = accelerator
        return "one process" if count == 1 else f"{count} processes can talk ({accelerator.state.backend})"

    def model(self) -> str:
        from finetuning.base_model import load_tokenizer, resolve_base
        from finetuning.starting import check_measures

        self.base = resolve_base(self.settings)
        load_tokenizer(self.base.folder)
        check_measures(self.settings, self.base)
        talker = self.base.talker_config
        return (
            f"{self.base.name}, {talker['num_hidden_layers']} talker layers of width {talker['hidden_size']}, "
            f"type {self.base.config['tts_model_type']}"
        )

    def memory_profile(self) -> str:
        from finetuning.starting import apply_memory_profile

        asked = self.settings.memory_profile
        self.settings = apply_memory_profile(self.settings, self.base, self.accelerator)
        return f"MEMORY_PROFILE={asked}"

    def output_folder(self) -> str:
        from finetuning.checkpoint import check_output_folder
        from finetuning.starting import choose_start

        check_output_folder(self.settings, self.base)
        self.resume = choose_start(self.settings, self.base, self.accelerator)
        goes_on = f", goes on from {self.resume.folder}" if self.resume else ""
        return f"{self.settings.output_dir}{goes_on}"

    def data(self) -> str:
        from finetuning.augment import Augmentation
        from finetuning.console import say
        from finetuning.manifest import RowFormat, Tally, read_rows
        from finetuning.preparer import open_dataset_split
        from finetuning.training_rows import check_train_jsonl, comes_from_dataset

        settings = self.settings
        check_train_jsonl(settings)
        Augmentation.from_settings(settings)  # looks at AUGMENT_NOISE_DIR
        if comes_from_dataset(settings):
            split = open_dataset_split(settings, settings.train_split)
            return f"{split.num_rows or 'an unknown number of'} rows in {split.dataset_name}, split {split.name}"
        row_format = RowFormat.from_settings(settings, self.base.special_tokens())
        files = [("TRAIN_JSONL", settings.train_jsonl)]
        if settings.is_set("validation_jsonl") or settings.validation_jsonl.is_file():
            files.append(("VALIDATION_JSONL", settings.validation_jsonl))
        found = []
        for setting, file in files:
            tally, needs_codes = Tally(), settings.data_mode == "none"
            who = Who()
            for row in read_rows(file, setting, row_format, tally, needs_codes=needs_codes):
                self._references |= {row.ref_audio} - {None}
                who.add(row)
            if setting == "TRAIN_JSONL":
                who.check(settings, self.base)
            tally.check_share()
            if tally.num_bad:
                say(f"skipped {tally.summary()}")
            found.append(f"{tally.num_good} rows in {file}")
        return ", ".join(found)

    def hub(self) -> str:
        from finetuning.hub import check_access

        if not self._is_main:  # which alone sends anything
            return ""
        return "; ".join(check_access(self.settings.repositories(), self.settings.hub_private))

    def references(self) -> str:
        from finetuning.audio import AudioError, load_audio

        path = self.settings.ref_audio_path
        if path is not None and not path.is_file():
            raise UserError(f"REF_AUDIO_PATH: {path} does not exist")
        distinct = self._references | ({path} - {None})
        for reference in sorted(distinct)[:20]:
            try:
                load_audio(reference)
            except AudioError as error:
                raise UserError(f"reference {reference}: {error}") from None
        return f"{len(distinct)} named" if distinct else "none named; a clip of each speaker will be chosen"

    def memory(self) -> str:
        """What a step needs, from the base's headers, before anything is loaded.

        Weights, gradients and optimizer states must fit. What comes on top depends on the clips, and a step that does
        not fit is repeated in smaller parts; so that much is only said.
        """
        from finetuning.base_model import free_memory_bytes
        from finetuning.memory import ROW_SECONDS, Needs
        from finetuning.starting import bytes_beside

        beside = bytes_beside(self.settings, self.base)
        needs = Needs.of(self.base, self.settings, int(os.environ.get("WORLD_SIZE") or 1), beside)
        # The processes of a machine without GPUs share its memory.
        num_sharing = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if self.device == "cpu" else 1
        least, needed = num_sharing * needs.least_bytes, num_sharing * needs.peak_bytes()
        free = free_memory_bytes(self.device)
        line = f"a step takes about {needed / 1e9:.2f} GB with clips of {ROW_SECONDS} s (computed, not measured)"
        advice = "MEMORY_PROFILE picks settings that need less; or train fewer layers, or use a larger card"
        if least > free:
            raise UserError(
                f"{line}, {least / 1e9:.2f} GB of it whatever the clips; only {free / 1e9:.2f} GB are free. {advice}"
            )
        if needed > free:
            return f"{line}, and only {free / 1e9:.2f} GB are free: longer clips may not fit. {advice}"
        return f"{line}; {free / 1e9:.1f} GB are free"

    def disk(self) -> str:
        """One checkpoint and one state against the free space of OUTPUT_DIR's disk."""
        from finetuning.checkpoint import check_disk_space
        from finetuning.claiming import spare_bytes
        from finetuning.memory import parameter_counts
        from finetuning.saving import state_bytes_per_weight

        trained, frozen = parameter_counts(self.base, self.settings)
        dtype = self.base.weight_dtypes()["talker.model.codec_embedding.weight"]
        checkpoint = (trained + frozen) * dtype.itemsize
        if self.settings.export_type == "base":
            checkpoint += sum(tensor.nbytes for tensor in self.base.encoder_weights().values())
        state = trained * state_bytes_per_weight(self.settings.ema_decay)
        output_dir = self.settings.output_dir
        check_disk_space(output_dir, checkpoint + state - spare_bytes(self.resume, output_dir))
        return f"a checkpoint of {checkpoint / 1e9:.2f} GB and a state of {state / 1e9:.2f} GB fit"

    def one_step(self) -> str:
        """Forward and backward on two rows, with the real settings."""
        import torch
        from accelerate.utils import broadcast_object_list

        from finetuning import building, starting
        from finetuning.dataset import to_device
        from finetuning.objective import step_loss

        with tempfile.TemporaryDirectory() as own_folder:
            (folder,) = broadcast_object_list([own_folder])  # all processes read what the main one indexes
            settings = _two_row_settings(self.settings, self.base, Path(folder), self._is_main)
            self.accelerator.wait_for_everyone()
            rows = starting.open_rows(settings, self.base, self.accelerator)
            run = building.build_run(settings, self.base, rows, self.accelerator, verbose=False)
            batch = to_device(next(iter(run.train.steps(0))).batches[0], self.accelerator.device)
            try:
                with self.accelerator.autocast():
                    sums = run.objective.train()(batch)
                step_loss(sums, 1, 1, settings.sub_talker_loss_weight).backward()
            except torch.OutOfMemoryError:
                raise UserError(
                    "two rows do not fit into the GPU's memory; train fewer layers or shorter clips"
                ) from None
            self.accelerator.wait_for_everyone()
        return f"{run.train.num_rows} rows, forward and backward"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()  # no arguments: it checks what the settings say
    preflight = Preflight()
    check = preflight.check
    check("Python", preflight.python)
    check("packages", preflight.packages)
    check("settings", preflight.read_settings)
    check("hardware", preflight.hardware, needs=preflight.settings)
    check("processes", preflight.processes, needs=preflight.device)
    check("model", preflight.model, needs=preflight.device)
    if preflight.num_failed == 0 and preflight.settings.memory_profile:
        check("memory profile", preflight.memory_profile, together=True)
    check("output folder", preflight.output_folder, needs=preflight.base)
    if preflight.settings is not None and preflight.settings.repositories():
        check("upload to the Hub", preflight.hub)
    check("data", preflight.data, needs=preflight.base)
    check("references", preflight.references, needs=preflight.settings)
    check("memory", preflight.memory, needs=preflight.base)
    check("disk", preflight.disk, needs=preflight.base)
    ready = preflight.accelerator if preflight.num_failed == 0 else None
    check("one training step", preflight.one_step, needs=ready, together=True)
    preflight.summary()
    say("Everything is ready: python train.py")


class Who:
    """Speakers and languages of some rows, and what clips there are of each speaker."""

    def __init__(self) -> None:
        self.languages: set[str] = set()
        self.clips: dict[str, set[Path]] = {}
        self.num_rows = self.num_with_audio = 0

    def add(self, row: Any) -> None:
        self.languages.add(row.language)
        clips = self.clips.setdefault(row.speaker, set())
        self.num_rows += 1
        if row.audio is not None and row.audio.is_file():
            self.num_with_audio += 1
            if len(clips) < 2:
                clips.add(row.audio)

    def check(self, settings: Settings, base: Base) -> None:
        """
        Raises:
            UserError: training would refuse them.
        """
        from finetuning.reference_choice import check_pool
        from finetuning.starting import check_names

        check_names(list(self.clips), sorted(self.languages), base, settings)
        if settings.reference_sampling == "same_speaker":
            for speaker, clips in self.clips.items():
                check_pool(speaker, len(clips))
        if settings.augment_copies and self.num_rows and not self.num_with_audio:
            raise UserError("AUGMENT_COPIES: copies are made of audio files, and no row has one; set it to 0")


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _two_row_settings(settings: Settings, base: Base, folder: Path, write: bool) -> Settings:
    """The settings with the first two rows that load, in a folder of their own, so that no real file is touched."""
    jsonl = folder / "two_rows.jsonl"
    if write:
        from finetuning.training_rows import comes_from_dataset

        find = _dataset_rows_that_load if comes_from_dataset(settings) else _rows_that_load
        lines = [json.dumps(row) for row in find(settings, base, folder)]
        jsonl.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    changes = {"train_jsonl": jsonl, "validation_jsonl": jsonl, "output_dir": folder / "output", "batch_size": 2}
    changes["augment_copies"] = 0  # they would cost time and show nothing
    # Two rows may be of two speakers, and another one may name the reference, or say what it says.
    changes |= {"reference_sampling": "fixed", "icl_fraction": 0.0}
    data_mode = "none" if settings.data_mode == "none" else "jsonl"
    return settings.model_copy(update={**changes, "gradient_accumulation_steps": 1, "data_mode": data_mode})


def _dataset_rows_that_load(settings: Settings, base: Base, folder: Path) -> Iterator[dict]:
    """The first two rows of the dataset whose audio loads, saved in ``folder``."""
    import soundfile

    from finetuning.audio import SAMPLE_RATE_HZ, AudioError, load_audio
    from finetuning.manifest import RowFormat
    from finetuning.prepare import DatasetRows
    from finetuning.preparer import open_dataset_split

    row_format, found = RowFormat.from_settings(settings, base.special_tokens()), 0
    rows = DatasetRows(open_dataset_split(settings, settings.train_split), row_format, "")
    for row in rows.split.rows():
        audio = folder / f"{row.index}.wav"
        try:
            if rows.check(row):
                continue
            soundfile.write(audio, load_audio(row.audio), SAMPLE_RATE_HZ)
        except AudioError:
            continue  # training lists and skips it
        said = {row_format.speaker_key: row.speaker, row_format.language_key: row.language}
        named = {key: value for key, value in said.items() if value is not None}
        yield {row_format.audio_key: str(audio), row_format.text_key: row.text, **named}
        found += 1
        if found == 2:
            return


def _rows_that_load(settings: Settings, base: Base, _: Path) -> Iterator[dict]:
    from finetuning.audio import AudioError, load_audio
    from finetuning.manifest import RowFormat, Tally, read_rows

    row_format, found = RowFormat.from_settings(settings, base.special_tokens()), 0
    needs_codes = settings.data_mode == "none"
    for row in read_rows(settings.train_jsonl, "TRAIN_JSONL", row_format, Tally(), needs_codes=needs_codes):
        try:
            if row.codes is None:
                load_audio(row.audio)
        except AudioError:
            continue  # training lists and skips it
        paths = {settings.audio_column: row.audio, "ref_audio": row.ref_audio}
        yield row.raw | {key: str(path.resolve()) for key, path in paths.items() if path}
        found += 1
        if found == 2:
            return


if __name__ == "__main__":
    run_main(main)
