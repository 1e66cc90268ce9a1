"""Exports: checkpoints that stock qwen-tts loads, each whole or not there (see ``disk``).

An export is the base with three changes: trained weights in the base's dtypes, the vectors of speakers (and of new
languages) in their rows of the codec table, and a configuration of type ``custom_voice`` that names them. The package
builds no speaker encoder for that type, so its weights are left out. With EXPORT_TYPE=base the type is ``base``, the
speaker encoder stays, and no speaker has a row.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn

from finetuning.adapters import ADAPTER_FOLDER, Learnt, is_adapter, merged, save_adapter, without_adapter
from finetuning.base_model import ENCODER_PREFIX, UNPATCHED_TRANSFORMERS_VERSION, Base, tokenizer_files
from finetuning.console import say
from finetuning.disk import (
    CARD_FILE,
    clean_up,
    files_of,
    free_bytes,
    link_or_copy,
    nearest_existing,
    new_folder,
    read_json,
    remove_folder,
    write_json,
)
from finetuning.errors import UserError
from finetuning.languages import Languages
from finetuning.model_card import model_card, origin
from finetuning.objective import TrainingObjective
from finetuning.settings import Settings
from finetuning.sharding import full_tensor
from finetuning.speakers import Speakers

CODEC_TABLE = "talker.model.codec_embedding.weight"
#: Files of a run besides its checkpoints.
LOG_FILES = ("training_log.jsonl", "validation_log.jsonl", "skipped_rows.jsonl", "alarms.jsonl")
RUN_FILES = (*LOG_FILES, "run.json", "settings.json")  # by its settings a half-removed run is known to the end
#: What the names of checkpoints with a number begin with: by step, and by epoch (EPOCH_FOLDER).
NUMBERED_FOLDERS = ("checkpoint", "epoch", "checkpoint-epoch")
#: Kept open by the process that trains in the folder.
LOCK_FILE = ".lock"
_TALKER_LAYER = re.compile(r"talker\.model\.layers\.(\d+)\.")
#: What the model said on its way, in ``step-N/``; see ``samples``.
SAMPLES_FOLDER = "samples"


class Exporter:
    """Writes the model of a run into named folders of OUTPUT_DIR.

    Args:
        model: ``Qwen3TTSForConditionalGeneration`` whose parameters are being trained.
        objective: around it, with the vectors that train; not wrapped.
        languages: that the run adds.
        data: of the rows, for the model card; see ``run_record.data_summary``.
    """

    def __init__(
        self,
        settings: Settings,
        base: Base,
        model: Any,
        objective: TrainingObjective,
        speakers: Speakers,
        accelerator: Accelerator,
        languages: Languages | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings, self.output_dir = settings, settings.output_dir
        self.base, self.model, self.objective, self.accelerator = base, model, objective, accelerator
        self.speakers, self.languages = speakers, languages
        self._about = {**(data or {}), "processes": accelerator.num_processes}
        self._dtypes = base.weight_dtypes()
        # Read now: its files may be gone when the run ends.
        self._encoder = base.encoder_weights() if settings.export_type == "base" else {}
        self._said_files = False

    def save(self, names: Sequence[str], state: Mapping[str, Any]) -> None:
        """Writes one checkpoint under several names; the files are written once and hard-linked. All processes call it.

        Args:
            names: such as ``["last", "best", "checkpoint-500"]``.
            state: JSON values for training_state.json.

        Raises:
            OSError: the disk refused (full, say), in all processes; older checkpoints stay.
        """
        # All processes take part.
        weights, speakers, languages = self._weights(), self.speakers_now(), self.languages_now()
        write = partial(self._write, names, state, weights, speakers, languages)
        attempt(self.accelerator, write if self.accelerator.is_main_process else lambda: None)

    def required_bytes(self) -> int:
        """Size of one checkpoint's weights, with its adapter; the unchanged files of the base are linked or small."""
        sizes = {name: tensor.numel() * self._dtype(name).itemsize for name, tensor in self._tensors()}
        # What trains beside adapters is in both.
        twice = [sizes[name] for name in self._trained() if not is_adapter(name)] if self.settings.lora_rank else []
        return sum(sizes.values()) + sum(twice) + sum(tensor.nbytes for tensor in self._encoder.values())

    def _write(
        self,
        names: Sequence[str],
        state: Mapping[str, Any],
        weights: dict[str, torch.Tensor],
        speakers: Speakers,
        languages: Languages | None,
    ) -> None:
        first, *others = names
        with new_folder(self.output_dir / first) as folder:
            self._fill(folder, state, weights, speakers, languages)
        for name in others:
            with new_folder(self.output_dir / name, is_sealed=True) as folder:
                shutil.copytree(self.output_dir / first, folder, copy_function=link_or_copy, dirs_exist_ok=True)
        self._say_files(self.output_dir / first)

    def _fill(
        self,
        folder: Path,
        state: Mapping[str, Any],
        weights: dict[str, torch.Tensor],
        speakers: Speakers,
        languages: Languages | None,
    ) -> None:
        settings = self.settings
        if settings.lora_rank:
            learnt = Learnt(origin(self.base), speakers, languages, weights, self._trained())
            save_adapter(folder / ADAPTER_FOLDER, settings, learnt)
            weights = merged(weights, settings.lora_export_scale * settings.lora_alpha / settings.lora_rank)
        insert_speakers(weights, speakers)
        if languages is not None:
            insert_rows(weights, languages.rows.values(), languages.vectors)
        write_checkpoint(folder, self.base, speakers, weights | self._encoder, state, settings, self._about)

    def config_now(self) -> dict[str, Any]:
        """config.json of a checkpoint."""
        return export_config(self.base, self.speakers, len(self.model.talker.model.layers), self.settings.export_type)

    def rows_now(self) -> tuple[list[int], torch.Tensor]:
        """The rows of the codec table that a checkpoint gets beside what trains of it, (n,), and what stands there,
        (n, H) in the checkpoint's dtype: the vectors of its speakers and of new languages."""
        speakers, languages = self.speakers_now(), self.languages_now()
        rows, vectors = [], [speakers.vectors[:0]]
        if None not in speakers.codec_rows:
            rows, vectors = list(speakers.codec_rows), [speakers.vectors]
        if languages is not None:
            rows, vectors = [*rows, *languages.rows.values()], [*vectors, languages.vectors]
        return rows, torch.cat(vectors).to(self._dtypes[CODEC_TABLE])

    def speakers_now(self) -> Speakers:
        """With their vectors as they are now."""
        if isinstance(self.objective.speaker_vectors, nn.Parameter):
            return replace(self.speakers, vectors=_on_host(self.objective.speaker_vectors))
        return self.speakers

    def languages_now(self) -> Languages | None:
        """With their vectors as they are now."""
        if self.languages is None:
            return None
        return replace(self.languages, vectors=_on_host(self.objective.language_vectors))

    def _trained(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [item for item in self.model.state_dict().items() if not item[0].startswith("speaker_encoder.")]

    def _dtype(self, name: str) -> torch.dtype:
        if is_adapter(name):
            return torch.float32
        return self._dtypes.get(without_adapter(name), self._dtypes[CODEC_TABLE])  # new layers take the table's

    def _weights(self) -> dict[str, torch.Tensor]:
        """The state dict in the base's dtypes, on the CPU; {} beside the main process. What several processes hold in
        parts is gathered tensor by tensor."""
        weights = {}
        for name, tensor in self._tensors():
            whole = full_tensor(tensor)  # all processes take part
            if self.accelerator.is_main_process:
                weights[name] = whole.detach().to("cpu", self._dtype(name)).contiguous()
        return weights

    def _say_files(self, folder: Path) -> None:
        if self._said_files:
            return
        self._said_files = True
        lines = [f"  {file.stat().st_size:>13,}  {file.relative_to(folder)}" for file in files_of(folder)]
        say("\n".join([f"files of {folder} (bytes):", *lines]))


def _on_host(parameter: nn.Parameter) -> torch.Tensor:
    """(n, H) float32, whole."""
    return full_tensor(parameter).detach().float().cpu().clone()


def attempt(accelerator: Accelerator, work: Callable[[], Any]) -> None:
    """Does some work in every process; an OSError of one becomes an OSError of all, so that none waits for it."""
    problem = None
    try:
        work()
    except OSError as error:
        problem = str(error)
    problems = gather_object([problem]) if accelerator.num_processes > 1 else [problem]
    if failed := next((problem for problem in problems if problem), None):
        raise OSError(failed)


def rotate_checkpoints(output_dir: Path, limit: int, step: int) -> None:
    """Keeps the newest ``limit`` of checkpoint-N/; best/, last/ and epoch-N/ are never rotated.

    Args:
        step: of now; numbers beyond it belong to a future that a resumed run has given up, and go first.
    """
    numbered = [(int(folder.name.split("-")[1]), folder) for folder in _step_folders(output_dir, "checkpoint")]
    oldest_first = sorted(numbered, key=lambda item: (item[0] <= step, item[0]))
    for _, folder in oldest_first[:-limit]:
        remove_folder(folder)


def step_of_best(output_dir: Path) -> int | None:
    """The step that ``best/`` was written after, whichever run wrote it; None where it does not say."""
    step = (read_json(output_dir / "best" / "training_state.json") or {}).get("step")
    return step if isinstance(step, int) else None


def sample_folders(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all samples."""
    return [(int(folder.name.split("-")[1]), folder) for folder in _step_folders(output_dir / SAMPLES_FOLDER, "step")]


def _step_folders(output_dir: Path, kind: str) -> list[Path]:
    found = [folder for folder in output_dir.glob(f"{kind}-*") if re.fullmatch(rf"{kind}-\d+", folder.name)]
    return [folder for folder in found if folder.is_dir()]


# ------------------------------------------------------------------------------------------------ what is in a file


def write_checkpoint(
    folder: Path,
    base: Base,
    speakers: Speakers,
    weights: dict[str, torch.Tensor],
    state: Mapping[str, Any],
    settings: Settings,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Fills a folder with what stock qwen-tts loads.

    Args:
        weights: by the names of the base, in the dtypes of the export, on the CPU; with EXPORT_TYPE=base those of the
            speaker encoder, too.
        state: JSON values for training_state.json.
        settings: of the run.
        about: see ``model_card.model_card``.
    """
    export_type = settings.export_type
    assert export_type != "base" or any(name.startswith(ENCODER_PREFIX) for name in weights)
    for file in unchanged_files(base):
        link_or_copy(file, folder / file.name)
    shutil.copytree(base.codec_folder, folder / "speech_tokenizer", copy_function=link_or_copy)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    num_layers = 1 + max(int(match[1]) for match in map(_TALKER_LAYER.match, weights) if match)
    write_json(folder / "config.json", export_config(base, speakers, num_layers, export_type))
    (folder / "speaker_encoder").mkdir()
    write_json(folder / "speaker_encoder" / "speaker_config.json", speaker_config(speakers))
    write_json(folder / "training_state.json", {**state, "base": origin(base)})
    card = model_card(base, speakers, state, settings, about or {})
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def insert_speakers(weights: dict[str, torch.Tensor], speakers: Speakers) -> None:
    """Puts the speakers' vectors into their rows of the codec table, in place; a base export has no such rows."""
    if None not in speakers.codec_rows:
        insert_rows(weights, speakers.codec_rows, speakers.vectors)


def insert_rows(weights: dict[str, torch.Tensor], rows: Iterable[int], vectors: torch.Tensor) -> None:
    """Puts (n, H) vectors into n rows of the codec table, in place."""
    table = weights[CODEC_TABLE].clone()
    table[list(rows)] = vectors.to(table.dtype)
    weights[CODEC_TABLE] = table


def export_config(base: Base, speakers: Speakers, num_layers: int, export_type: str = "custom_voice") -> dict[str, Any]:
    """The base's config.json as a checkpoint of ``export_type``, a custom_voice one with our speakers.

    Edited as JSON: ``Qwen3TTSConfig.save_pretrained`` writes a speaker_encoder_config that the package cannot read.
    """
    config = copy.deepcopy(dict(base.config))
    talker = config["talker_config"]
    config["tts_model_type"] = export_type
    config["tts_model_size"] = base.model_size
    config["transformers_version"] = UNPATCHED_TRANSFORMERS_VERSION
    talker["num_hidden_layers"] = num_layers
    if export_type == "base":
        config["speaker_encoder_config"] = base.encoder_source.config["speaker_encoder_config"]
        talker |= {"spk_id": {}, "spk_is_dialect": {}}  # stock asks a base for no speaker
        return config
    names = [name.lower() for name in speakers.names]  # stock looks up speaker.lower()
    talker["spk_id"] = {**(talker.get("spk_id") or {}), **dict(zip(names, speakers.codec_rows, strict=True))}
    known_dialects = talker.get("spk_is_dialect") or {}
    # Every speaker needs an entry, or stock raises KeyError.
    talker["spk_is_dialect"] = {name: known_dialects.get(name, False) for name in talker["spk_id"]}
    return config


def speaker_config(speakers: Speakers) -> dict[str, Any]:
    """speaker_encoder/speaker_config.json: names, rows, width, references."""
    entries = {
        name: {**({} if row is None else {"codec_id": row}), "references": list(references)}
        for name, row, references in zip(speakers.names, speakers.codec_rows, speakers.references, strict=True)
    }
    return {"embedding_dim": speakers.vectors.shape[1], "speakers": entries}


def unchanged_files(base: Base) -> list[Path]:
    """Files of the base that an export carries as they are (the codec's folder besides)."""
    return [base.folder / "generation_config.json", *tokenizer_files(base.folder)]


# ------------------------------------------------------------------------------------------------------ the folder


def check_output_folder(settings: Settings, base: Base) -> None:
    """Refuses an OUTPUT_DIR that holds the base or is read-only.

    Raises:
        UserError
    """
    output = settings.output_dir.resolve()
    named = [("INIT_MODEL_PATH", base.folder), ("TOKENIZER_PATH", base.codec_folder)]
    named += [("SPEAKER_ENCODER_PATH", base.encoder_base.folder)] if base.encoder_base else []
    for setting, folder in named:
        if output == folder.resolve() or output in folder.resolve().parents:
            raise UserError(
                f"OUTPUT_DIR: {settings.output_dir} holds what {setting} names ({folder}); choose another folder, "
                "so that the base is never overwritten"
            )
    parent = nearest_existing(settings.output_dir)
    if not os.access(parent, os.W_OK):
        raise UserError(f"OUTPUT_DIR: {settings.output_dir} cannot be written ({parent} is read-only)")


def check_holds_no_run(settings: Settings) -> None:
    """Raises UserError for an OUTPUT_DIR with a run, unless OVERWRITE_OUTPUT is set."""
    entries = run_entries(settings.output_dir)
    if entries and not settings.overwrite_output:
        going_on = ", or RESUME=auto to go on with it where it has a state" if settings.resume == "never" else ""
        raise UserError(
            f"OUTPUT_DIR: {settings.output_dir} already holds a run "
            f"({', '.join(entry.name for entry in entries[:4])}); choose another folder, or set OVERWRITE_OUTPUT=true "
            f"to replace it{going_on}"
        )


def lock_output_folder(output_dir: Path) -> IO[str]:
    """Claims the folder for this process until the file that it gives is closed, or the process is gone.

    Raises:
        UserError: another process trains there: one that was requeued too early, say.
    """
    lock = (output_dir / LOCK_FILE).open("a", encoding="utf-8")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"OUTPUT_DIR: another run is writing to {output_dir}; wait for its end, or stop it"
            ) from None
        say(f"{output_dir} lies on a disk without locks: see to it that no second run writes there")
    return lock


def run_entries(output_dir: Path) -> list[Path]:
    """What a run leaves in OUTPUT_DIR: its states, checkpoints and logs."""
    if not output_dir.is_dir():
        return []
    names = ("state", "best", "last", SAMPLES_FOLDER, "roundtrip", "comparison", "plots", "tensorboard")
    folders = [output_dir / name for name in names if (output_dir / name).is_dir()]
    numbered = [folder for kind in NUMBERED_FOLDERS for folder in _step_folders(output_dir, kind)]
    return [*folders, *sorted(numbered), *(output_dir / name for name in RUN_FILES if (output_dir / name).is_file())]


def clear_output_folder(settings: Settings) -> None:
    """Removes the run that OVERWRITE_OUTPUT gives up, its states first, and leftovers of saves that were cut off."""
    clean_up_leftovers(settings.output_dir)  # first: it may put a folder back
    for entry in run_entries(settings.output_dir):
        remove_folder(entry) if entry.is_dir() else entry.unlink()


def clean_up_leftovers(output_dir: Path) -> None:
    """What saves that were cut off have left; see ``disk.clean_up``."""
    for folder in (output_dir, output_dir / "state", output_dir / SAMPLES_FOLDER):
        clean_up(folder)


def reclaimable_bytes(output_dir: Path) -> int:
    """What removing the run in OUTPUT_DIR frees: files whose every hard link lies in it, each counted once."""
    files = [file for entry in run_entries(output_dir) for file in [entry, *entry.rglob("*")] if file.is_file()]
    links: dict[tuple[int, int], list[os.stat_result]] = {}
    for status in map(os.stat, files):
        links.setdefault((status.st_dev, status.st_ino), []).append(status)
    return sum(found[0].st_size for found in links.values() if len(found) == found[0].st_nlink)


def check_disk_space(output_dir: Path, required_bytes: int, what: str = "one checkpoint and one state") -> None:
    """Raises UserError when the first checkpoint and state, and what else the run writes, do not fit."""
    free = free_bytes(output_dir)
    if free < required_bytes:
        raise UserError(
            f"OUTPUT_DIR: {output_dir} has {free / 1e9:.1f} GB free, {what} need "
            f"{required_bytes / 1e9:.1f} GB; free some space or choose another disk"
        )
