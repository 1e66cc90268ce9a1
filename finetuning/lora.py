"""Merges adapters that LORA_RANK trained into a base: a checkpoint that stock qwen-tts loads.

    python -m finetuning.lora merge --base Qwen/Qwen3-TTS-12Hz-1.7B-Base --adapter output/best/adapter --output merged
    python -m finetuning.lora merge --base tiny --adapter output/best/adapter --scale 0.5 --output halfway
    python -m finetuning.lora merge --base … --adapter anna/adapter --adapter bert/adapter --weights 0.7 0.3 --output …

``--scale`` says how much of what adapters learnt is added (1 = all of it; LORA_EXPORT_SCALE says it for a run's own
checkpoints), ``--weights`` how much of each; what else was trained, new layers say, comes along whole. The result has
the speakers of all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetuning.adapters import (
    CONFIG_FILE,
    FILE_PREFIX,
    LANGUAGE_VECTORS_FILE,
    LANGUAGES_FILE,
    MATRICES_FILE,
    OTHERS_FILE,
    SPEAKERS_FILE,
    VECTORS_FILE,
    add_product,
    pairs,
)
from finetuning.base_model import ENCODER_PREFIX, Base, resolve_base
from finetuning.checkpoint import CODEC_TABLE, insert_rows, insert_speakers, write_checkpoint
from finetuning.codec_rows import allocate_codec_rows
from finetuning.console import command_of, say
from finetuning.disk import new_folder
from finetuning.errors import UserError, run_main
from finetuning.languages import Languages, with_languages
from finetuning.model_card import origin
from finetuning.settings import Settings
from finetuning.speakers import Speakers


@dataclass(frozen=True)
class Adapter:
    """What a run with LORA_RANK learnt.

    Attributes:
        base_name: of the base that it was trained on.
        matrices: path of each adapted linear map -> (A, B), float32.
        factor: ``alpha / rank``.
        others: what else was trained, by the names of a checkpoint.
    """

    folder: Path
    base_name: str
    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]
    factor: float
    others: dict[str, torch.Tensor]
    speakers: Speakers
    languages: Languages | None = None

    @property
    def export_type(self) -> str:
        """EXPORT_TYPE of the run."""
        return "base" if None in self.speakers.codec_rows else "custom_voice"

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """
        Raises:
            UserError: it is no such folder, or it is damaged.
        """
        try:
            return cls._load(folder)
        except FileNotFoundError as error:
            raise UserError(
                f"--adapter: {folder} is no adapter of this tool: {Path(error.filename).name} is missing "
                "(give the folder adapter/ inside a checkpoint)"
            ) from None
        except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError, SafetensorError) as error:
            raise UserError(f"--adapter: {folder} cannot be read: {error}") from None

    @classmethod
    def _load(cls, folder: Path) -> Adapter:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / MATRICES_FILE)
        listed = json.loads((folder / SPEAKERS_FILE).read_text(encoding="utf-8"))
        vectors = load_file(folder / VECTORS_FILE)["vectors"]
        others = load_file(folder / OTHERS_FILE) if (folder / OTHERS_FILE).is_file() else {}
        names, rows, references = zip(
            *((entry["name"], entry["codec_id"], entry["references"]) for entry in listed), strict=True
        )
        matrices = pairs({name.removeprefix(FILE_PREFIX): tensor for name, tensor in tensors.items()})
        speakers, languages = Speakers(names, vectors, rows, references), None
        if (folder / LANGUAGES_FILE).is_file():
            ids = json.loads((folder / LANGUAGES_FILE).read_text(encoding="utf-8"))
            languages = Languages(ids, load_file(folder / LANGUAGE_VECTORS_FILE)["vectors"])
        base_name, factor = config["base_model_name_or_path"], config["lora_alpha"] / config["r"]
        return cls(folder, base_name, matrices, factor, others, speakers, languages)


def merge(base: Base, adapters: Sequence[Adapter], shares: Sequence[float], output: Path) -> None:
    """Writes the base with so much of each adapter as a checkpoint.

    Args:
        shares: of each adapter; 1 adds all that it learnt.
        output: a folder that is not there yet.

    Raises:
        UserError: the adapters belong to another base, or do not go together.
    """
    check_fit(base, adapters)
    languages = next((adapter.languages for adapter in adapters if adapter.languages), None)
    base = replace(base, config=with_languages(base.config, languages.rows if languages else {}))
    export_type = adapters[0].export_type
    speakers = adapters[0].speakers if export_type == "base" else speakers_of_all(base, adapters)
    dtypes, weights = base.weight_dtypes(), {}
    others = next((adapter.others for adapter in adapters if adapter.others), {})
    for name, part in base.stored_weights():
        if name.startswith(ENCODER_PREFIX):
            continue
        weight, path = others.get(name, part[:]), name.removesuffix(".weight")
        for adapter, share in zip(adapters, shares, strict=True):
            if path in adapter.matrices:
                weight = add_product(weight, *adapter.matrices[path], share * adapter.factor)
        weights[name] = weight.to(dtypes[name]).contiguous()
    weights |= {name: tensor for name, tensor in others.items() if name not in weights}  # new layers
    insert_speakers(weights, speakers)
    if languages:
        insert_rows(weights, languages.rows.values(), languages.vectors)
    if export_type == "base":
        weights |= base.encoder_weights()
    state = {
        "merged": [{"adapter": str(one.folder), "share": share} for one, share in zip(adapters, shares, strict=True)]
    }
    try:
        with new_folder(output) as folder:
            write_checkpoint(folder, base, speakers, weights, state, Settings(export_type=export_type))
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written: {error}") from None


def check_fit(base: Base, adapters: Sequence[Adapter]) -> None:
    """Raises UserError where an adapter does not belong to the base, or not beside another."""
    shapes = base.weight_shapes()
    for adapter in adapters:
        for path, (first, second) in adapter.matrices.items():
            if tuple(shapes.get(f"{path}.weight", ())) != (len(second), first.shape[1]):
                raise UserError(f"--adapter: {adapter.folder} belongs to another base than {base.name}: {path} differs")
        if adapter.speakers.vectors.shape[1] != shapes[CODEC_TABLE][1]:
            raise UserError(f"--adapter: {adapter.folder} belongs to a base of another width than {base.name}")
        _check_languages(base, adapter)
    full = [str(adapter.folder) for adapter in adapters if adapter.others or adapter.languages]
    if len(adapters) > 1 and full:
        raise UserError(
            f"--adapter: {', '.join(full)} trained more than adapters (new layers, embeddings or languages), which "
            "cannot be mixed with others; merge it by itself"
        )
    kinds = {adapter.export_type for adapter in adapters}
    if len(kinds) > 1:
        raise UserError("--adapter: EXPORT_TYPE of these runs differs; checkpoints that clone and that speak by name")
    if kinds == {"base"} and not base.has_speaker_encoder:
        raise UserError(
            f"--base: {base.name} has no speaker encoder, which a checkpoint of EXPORT_TYPE=base needs; name the Base "
            "model of its size in --speaker_encoder"
        )


def _check_languages(base: Base, adapter: Adapter) -> None:
    """Raises UserError where a language that was added has no place in the base."""
    known = base.talker_config.get("codec_language_id") or {}
    names = {row: name for name, row in {**known, **(base.talker_config.get("spk_id") or {})}.items()}
    for name, row in (adapter.languages.rows if adapter.languages else {}).items():
        if name in known or row in names:
            other = name if name in known else names[row]
            raise UserError(f"--adapter: {adapter.folder} adds {name} (row {row}), but {base.name} has {other} already")


def speakers_of_all(base: Base, adapters: Sequence[Adapter]) -> Speakers:
    """The speakers of all adapters; one whose row of the codec table is another's, or the base's, gets a free one.

    Raises:
        UserError: a name is one of the base's, two of one name have different vectors, or the table is full.
    """
    presets = base.talker_config.get("spk_id") or {}
    found: dict[str, tuple[str, torch.Tensor, int, Sequence[str]]] = {}
    for adapter in adapters:
        one = adapter.speakers
        for name, vector, row, references in zip(one.names, one.vectors, one.codec_rows, one.references, strict=True):
            if name.lower() in presets and presets[name.lower()] != row:
                raise UserError(f'--adapter: speaker "{name}" of {adapter.folder} is a speaker of {base.name} as well')
            known = found.setdefault(name.lower(), (name, vector, row, references))
            if not torch.equal(known[1], vector):
                raise UserError(f'--adapter: speaker "{name}" stands in two adapters with different vectors')
    names, vectors, rows, references = zip(*found.values(), strict=True)
    return Speakers(names, torch.stack(vectors), _distinct(names, rows, base), references)


def _distinct(names: Sequence[str], rows: Sequence[int], base: Base) -> list[int]:
    """The rows, with free ones for those that are another speaker's."""
    taken = {row: name for name, row in (base.talker_config.get("spk_id") or {}).items()}
    distinct: list[int] = []
    for name, row in zip(names, rows, strict=True):
        if taken.setdefault(row, name.lower()) != name.lower():
            row = next(free for free in _free_rows(base) if free not in {*taken, *rows})
            taken[row] = name.lower()
        distinct.append(row)
    return distinct


def _free_rows(base: Base) -> Iterator[int]:
    """Rows for new speakers; UserError when there are no more."""
    for count in itertools.count(1):
        yield allocate_codec_rows(base.config, count)[-1]


def parse_arguments(given: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m finetuning.lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = parser.add_subparsers(dest="command", required=True).add_parser("merge", help="adapters into a base")
    command.add_argument("--base", required=True, help="Hub id, folder, or the name of an embedded model")
    command.add_argument("--adapter", required=True, action="append", type=Path, help="adapter/ of a checkpoint")
    command.add_argument("--weights", nargs="+", type=float, help="one for each adapter; default 1 for each")
    command.add_argument("--scale", type=float, default=1.0, help="of all that adapters add; default 1")
    command.add_argument(
        "--speaker_encoder", help="Base model whose speaker encoder goes into a checkpoint that clones"
    )
    command.add_argument("--output", required=True, type=Path, help="a folder that is not there yet")
    arguments = parser.parse_args(None if given is None else list(given))
    arguments.weights = arguments.weights or [1.0] * len(arguments.adapter)
    if len(arguments.weights) != len(arguments.adapter):
        raise UserError(f"--weights: {len(arguments.weights)} for {len(arguments.adapter)} adapters; give one for each")
    if not all(map(math.isfinite, (arguments.scale, *arguments.weights))):
        raise UserError("--scale, --weights: finite numbers are needed")
    if arguments.output.exists():
        raise UserError(f"--output: {arguments.output} is there already; name a new folder")
    return arguments


def main() -> None:
    run_merge(parse_arguments())


def run_merge(arguments: argparse.Namespace) -> None:
    base = resolve_base(Settings(init_model_path=arguments.base, speaker_encoder_path=arguments.speaker_encoder))
    adapters = [Adapter.load(folder) for folder in arguments.adapter]
    for adapter in adapters:
        if adapter.base_name not in (base.name, origin(base)):
            say(f"{adapter.folder} was trained on {adapter.base_name}; {base.name} should hold the same weights")
    merge(base, adapters, [arguments.scale * weight for weight in arguments.weights], arguments.output)
    how = f"--speaker {adapters[0].speakers.names[0]}"
    if adapters[0].export_type == "base":
        how = "--ref_audio … --ref_text …"
    say(f"Listen: {command_of('synthesize.py')} --checkpoint {arguments.output} {how} --text …")


if __name__ == "__main__":
    run_main(main)
