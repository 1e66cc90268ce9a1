"""Exports: checkpoints that stock qwen-tts loads, written to a temporary name and renamed.

An export is the base with three changes: trained weights in the base's dtypes, the speakers' vectors in their rows of
the codec table, and a configuration of type ``custom_voice`` that names them. The package builds no speaker encoder for
that type, so its weights are left out.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from finetuning.base_model import UNPATCHED_TRANSFORMERS_VERSION, Base, tokenizer_files
from finetuning.console import say
from finetuning.errors import UserError
from finetuning.settings import Settings
from finetuning.speakers import Speakers

CODEC_TABLE = "talker.model.codec_embedding.weight"
#: Weights are hard-linked where the file system allows and never written in place; other files, which people edit, are
#: copied.
LINKED_SUFFIX = ".safetensors"
#: Files of a run besides its checkpoints.
RUN_FILES = ("settings.json", "training_log.jsonl", "validation_log.jsonl")
_STEP_FOLDER = re.compile(r"(checkpoint|epoch)-(\d+)")


class Exporter:
    """Writes the model of a run into named folders of OUTPUT_DIR.

    Args:
        model: ``Qwen3TTSForConditionalGeneration`` whose parameters are being trained.
    """

    def __init__(self, settings: Settings, base: Base, model: Any, speakers: Speakers) -> None:
        self.output_dir = settings.output_dir
        self.base, self.model, self.speakers = base, model, speakers
        self._dtypes = base.weight_dtypes()
        self._save_total_limit = settings.save_total_limit
        self._said_files = False

    def save(self, names: Sequence[str], state: Mapping[str, Any]) -> None:
        """Writes one checkpoint under several names; the files are written once and hard-linked.

        Args:
            names: such as ``["last", "best", "checkpoint-500"]``.
            state: JSON values for training_state.json.

        Raises:
            UserError: the folder cannot be written (disk full); older checkpoints stay.
        """
        first, *others = names
        unfinished = self.output_dir / f".{first}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            self._write(unfinished, state)
            _replace_folder(unfinished, self.output_dir / first)
            for name in others:
                self._copy(self.output_dir / first, name)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"OUTPUT_DIR: {first}/ could not be saved ({error}); the checkpoints before it are whole. "
                "Free some space or choose another disk"
            ) from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._rotate()
        self._say_files(self.output_dir / first)

    def required_bytes(self) -> int:
        """Size of one checkpoint's weights; the unchanged files of the base are linked or small beside them."""
        return sum(tensor.numel() * self._dtype(name).itemsize for name, tensor in self._tensors())

    def _write(self, folder: Path, state: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True)
        for file in unchanged_files(self.base):
            target = folder / file.name
            link_or_copy(file, target)
        shutil.copytree(self.base.codec_folder, folder / "speech_tokenizer", copy_function=link_or_copy)
        save_file(self._weights(), folder / "model.safetensors", metadata={"format": "pt"})
        num_layers = len(self.model.talker.model.layers)
        write_json(folder / "config.json", export_config(self.base, self.speakers, num_layers))
        (folder / "speaker_encoder").mkdir()
        write_json(folder / "speaker_encoder" / "speaker_config.json", speaker_config(self.speakers))
        write_json(folder / "training_state.json", {**state, "base": self.base.name})
        (folder / "README.md").write_text(model_card(self.base, self.speakers, state), encoding="utf-8")

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [item for item in self.model.state_dict().items() if not item[0].startswith("speaker_encoder.")]

    def _dtype(self, name: str) -> torch.dtype:
        return self._dtypes.get(name, self._dtypes[CODEC_TABLE])  # new layers take the table's

    def _weights(self) -> dict[str, torch.Tensor]:
        """The state dict in the base's dtypes, on the CPU, with the speakers' vectors in place."""
        weights = {name: tensor.detach().to("cpu", self._dtype(name)).contiguous() for name, tensor in self._tensors()}
        table = weights[CODEC_TABLE].clone()
        table[list(self.speakers.codec_rows)] = self.speakers.vectors.to(table.dtype)
        return weights | {CODEC_TABLE: table}

    def _copy(self, source: Path, name: str) -> None:
        unfinished = self.output_dir / f".{name}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished, copy_function=link_or_copy)
        _replace_folder(unfinished, self.output_dir / name)

    def _rotate(self) -> None:
        """Keeps the newest SAVE_TOTAL_LIMIT of checkpoint-N/; best/, last/ and epoch-N/ are never rotated."""
        numbered = [(int(folder.name.split("-")[1]), folder) for folder in self.output_dir.glob("checkpoint-*")]
        for _, folder in sorted(numbered)[: -self._save_total_limit]:
            shutil.rmtree(folder)

    def _say_files(self, folder: Path) -> None:
        if self._said_files:
            return
        self._said_files = True
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        lines = [f"  {file.stat().st_size:>13,}  {file.relative_to(folder)}" for file in files]
        say("\n".join([f"files of {folder} (bytes):", *lines]))


# ------------------------------------------------------------------------------------------------ what is in a file


def export_config(base: Base, speakers: Speakers, num_layers: int) -> dict[str, Any]:
    """The base's config.json as a custom_voice checkpoint with our speakers.

    Edited as JSON: ``Qwen3TTSConfig.save_pretrained`` writes a speaker_encoder_config that the package cannot read.
    """
    config = copy.deepcopy(dict(base.config))
    talker = config["talker_config"]
    config["tts_model_type"] = "custom_voice"
    config["tts_model_size"] = base.model_size
    config["transformers_version"] = UNPATCHED_TRANSFORMERS_VERSION
    talker["num_hidden_layers"] = num_layers
    names = [name.lower() for name in speakers.names]  # stock looks up speaker.lower()
    talker["spk_id"] = {**(talker.get("spk_id") or {}), **dict(zip(names, speakers.codec_rows, strict=True))}
    known_dialects = talker.get("spk_is_dialect") or {}
    # Every speaker needs an entry, or stock raises KeyError.
    talker["spk_is_dialect"] = {name: known_dialects.get(name, False) for name in talker["spk_id"]}
    return config


def speaker_config(speakers: Speakers) -> dict[str, Any]:
    """speaker_encoder/speaker_config.json: names, rows, width, references."""
    entries = {
        name: {"codec_id": row, "references": list(references)}
        for name, row, references in zip(speakers.names, speakers.codec_rows, speakers.references, strict=True)
    }
    return {"embedding_dim": speakers.vectors.shape[1], "speakers": entries}


def model_card(base: Base, speakers: Speakers, state: Mapping[str, Any]) -> str:
    """README.md of a checkpoint: what it is and how to speak with it."""
    return f"""---
base_model: {base.name}
library_name: qwen-tts
pipeline_tag: text-to-speech
---
# Qwen3-TTS, fine-tuned

Trained from `{base.name}` for {state.get("step", 0)} optimizer steps.
Speakers: {", ".join(f"`{name}`" for name in speakers.names)}.

```python
from qwen_tts import Qwen3TTSModel

model = Qwen3TTSModel.from_pretrained("path/to/this/folder")
waveforms, sample_rate = model.generate_custom_voice(text="Hello.", speaker="{speakers.names[0]}")
```

Use a voice only with the consent of the person it belongs to.
"""


def unchanged_files(base: Base) -> list[Path]:
    """Files of the base that an export carries as they are (the codec's folder besides)."""
    return [base.folder / "generation_config.json", *tokenizer_files(base.folder)]


# ------------------------------------------------------------------------------------------------------ the folder


def check_output_folder(settings: Settings, base: Base) -> None:
    """Refuses an OUTPUT_DIR that holds the base or another run (unless OVERWRITE_OUTPUT is set), or is read-only.

    Raises:
        UserError
    """
    output = settings.output_dir.resolve()
    for setting, folder in (("INIT_MODEL_PATH", base.folder), ("TOKENIZER_PATH", base.codec_folder)):
        if output == folder.resolve() or output in folder.resolve().parents:
            raise UserError(
                f"OUTPUT_DIR: {settings.output_dir} holds what {setting} names ({folder}); choose another folder, "
                "so that the base is never overwritten"
            )
    entries = run_entries(settings.output_dir)
    if entries and not settings.overwrite_output:
        raise UserError(
            f"OUTPUT_DIR: {settings.output_dir} already holds a run "
            f"({', '.join(entry.name for entry in entries[:4])}); choose another folder, or set "
            "OVERWRITE_OUTPUT=true to replace it (going on with a run, RESUME, is not built yet)"
        )
    parent = nearest_existing(settings.output_dir)
    if not os.access(parent, os.W_OK):
        raise UserError(f"OUTPUT_DIR: {settings.output_dir} cannot be written ({parent} is read-only)")


def run_entries(output_dir: Path) -> list[Path]:
    """What a run leaves in OUTPUT_DIR: checkpoints and logs."""
    if not output_dir.is_dir():
        return []
    folders = [entry for entry in output_dir.iterdir() if entry.is_dir()]
    checkpoints = [f for f in folders if f.name in ("best", "last", "roundtrip") or _STEP_FOLDER.fullmatch(f.name)]
    return sorted(checkpoints) + [output_dir / name for name in RUN_FILES if (output_dir / name).is_file()]


def clear_output_folder(settings: Settings) -> None:
    """Removes the run that OVERWRITE_OUTPUT gives up, and leftovers of saves that were cut off."""
    for entry in [*run_entries(settings.output_dir), *settings.output_dir.glob(".*.tmp")]:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def reclaimable_bytes(output_dir: Path) -> int:
    """What removing the run in OUTPUT_DIR frees: files whose every hard link lies in it, each counted once."""
    files = [file for entry in run_entries(output_dir) for file in [entry, *entry.rglob("*")] if file.is_file()]
    links: dict[tuple[int, int], list[os.stat_result]] = {}
    for status in map(os.stat, files):
        links.setdefault((status.st_dev, status.st_ino), []).append(status)
    return sum(found[0].st_size for found in links.values() if len(found) == found[0].st_nlink)


def check_disk_space(output_dir: Path, required_bytes: int) -> None:
    """Raises UserError when one checkpoint does not fit."""
    free = shutil.disk_usage(nearest_existing(output_dir)).free
    if free < required_bytes:
        raise UserError(
            f"OUTPUT_DIR: {output_dir} has {free / 1e9:.1f} GB free, one checkpoint needs "
            f"{required_bytes / 1e9:.1f} GB; free some space or choose another disk"
        )


def nearest_existing(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    path = path.resolve()
    return path if path.exists() else nearest_existing(path.parent)


def link_or_copy(source: str | Path, target: str | Path) -> str:
    """Hard-links weights (through symbolic links, as Hub caches have them), copies everything else."""
    real = Path(source).resolve()
    if Path(source).suffix == LINKED_SUFFIX:
        try:
            os.link(real, target)
            return str(target)
        except OSError:
            pass  # another file system
    return shutil.copyfile(real, target)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace_folder(finished: Path, target: Path) -> None:
    """Puts a finished folder in another's place; for a moment the old one has another name, never half its files."""
    old = target.with_name(f".{target.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    finished.rename(target)
    shutil.rmtree(old, ignore_errors=True)
