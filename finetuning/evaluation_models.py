"""What an evaluation compares: the checkpoints of a run and its base, under the settings that the run began with."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetuning.base_model import Base, read_base_config, resolve_base
from finetuning.checkpoint import NUMBERED_FOLDERS
from finetuning.codec import check_codec_folder, codec_fingerprint
from finetuning.console import say
from finetuning.disk import read_json
from finetuning.errors import UserError
from finetuning.kept_samples import Manner, fingerprint
from finetuning.manifest import RowFormat
from finetuning.settings import Settings
from finetuning.training_rows import TrainingRows, open_training_rows

_NUMBERED = re.compile(rf"(?:{'|'.join(NUMBERED_FOLDERS)})-(\d+)")
#: What a run began with says which of its rows are validation rows and what its checkpoints are, not today's `.env`; …
_OF_THE_RUN = (
    "seed", "validation_fraction", "max_eval_samples", "export_type", "speaker_name", "new_languages",
)  # fmt: skip
#: … and where its base and its reference lie, unless they are set: they may have been moved.
_UNLESS_SET = ("init_model_path", "tokenizer_path", "speaker_encoder_path", "ref_audio_path", "ref_text")


@dataclass(frozen=True)
class Options:
    """What the user asked for beside the settings; see ``evaluate.py --help``."""

    output: Path
    checkpoints: Sequence[str] = ()
    texts: Sequence[str] = ()
    references: Sequence[str] = ()
    reference_text: str | None = None
    num_seeds: int = 3
    language: str | None = None
    speakers: Sequence[str] = ()
    rank_by: str | None = None
    max_new_tokens: int | None = None
    with_base: bool = True


@dataclass(frozen=True)
class Model:
    """Something that stock loads.

    Attributes:
        name: "checkpoint-500", or "base".
        also: other names of the very same files, such as "best".
        step: optimizer steps that it was trained for; None where it does not say.
        samples: name of its folder of samples.
        manners: in which it speaks, each a line of the report.
        run: settings.json of the run that it lies in; {} where there is none.
        codec_folder: the speech tokenizer that it speaks with, where it is another than its own.
        setting: what names it, for messages.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    fingerprint: str
    samples: str
    manners: tuple[Manner, ...] = ("name",)
    also: tuple[str, ...] = ()
    step: int | None = None
    is_base: bool = False
    run: Mapping[str, Any] = field(default_factory=dict)
    codec_folder: Path | None = None
    setting: str = "--checkpoints"

    @property
    def clones(self) -> bool:
        return self.config["tts_model_type"] == "base"

    def line(self, manner: Manner) -> str:
        """The name of a line of the report."""
        names = " = ".join((self.name, *self.also))
        return names if manner == "name" else f"{names}, {MANNERS[manner]}"


#: Manners of cloning in words.
MANNERS: dict[Manner, str] = {"name": "by name", "voice": "voice only", "context": "in context"}


# ---------------------------------------------------------------------------------------------------------- the run


def settings_of_run(settings: Settings) -> Settings:
    """Today's settings, but for those that a run in OUTPUT_DIR cannot have changed since it began.

    Raises:
        UserError: they cannot be read.
    """
    file = settings.output_dir / "settings.json"
    saved = read_json(file) or {}
    fields = [*_OF_THE_RUN, *(field for field in _UNLESS_SET if not settings.is_set(field))]
    if settings.is_set("ref_audio_path"):  # the transcript is that of another reference
        fields = [field for field in fields if field != "ref_text"]
    wanted = {field: saved[field.upper()] for field in fields if field.upper() in saved}
    try:
        checked = Settings(**wanted)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0]).upper()
        raise UserError(f"OUTPUT_DIR: {file}: {name} has no value that can be used; mend or remove the file") from None
    return settings.model_copy(update={field: getattr(checked, field) for field in wanted})


def open_run_rows(settings: Settings) -> TrainingRows | None:
    """The rows of the run in OUTPUT_DIR as it opened them; None where they are gone, or were streamed."""
    try:
        return open_training_rows(settings, Path(), RowFormat.from_settings(settings), "cpu", build=False)
    except (UserError, OSError, ValueError, KeyError):
        return None


# ----------------------------------------------------------------------------------------------------- checkpoints


def find_checkpoints(output_dir: Path, names: Sequence[str], notes: list[str] | None = None) -> list[Model]:
    """The checkpoints of a run in the order of their steps, or those that are named; the same files once.

    Args:
        names: of folders in OUTPUT_DIR, or paths.
        notes: gets a line for each checkpoint that cannot be read, where none are named.

    Raises:
        UserError: there is none, a name is unknown, or one that is named cannot be read.
    """
    folders = _checkpoint_folders(output_dir)
    if not folders and not names:
        raise UserError(
            f"OUTPUT_DIR: {output_dir} holds no checkpoints (best, last, checkpoint-N, epoch-N); train first, set "
            "OUTPUT_DIR to the folder of a run, or name folders with --checkpoints"
        )
    chosen = [_named(name, output_dir, folders) for name in names] or folders
    problems: dict[Path, UserError] = {}
    models: dict[str, Model] = {}
    for folder in dict.fromkeys(chosen):
        try:
            model = _read_checkpoint(folder, output_dir)
        except UserError as error:
            problems[folder] = error
            continue
        same = models.get(model.fingerprint)
        models[model.fingerprint] = model if same is None else _joined(same, model)
    if problems and (names or not models):
        raise UserError("\n".join(map(str, problems.values())))
    _note_problems(problems, [] if notes is None else notes)
    return sorted(models.values(), key=lambda model: (model.step is None, model.step or 0))


def _note_problems(problems: Mapping[Path, UserError], notes: list[str]) -> None:
    for folder, error in problems.items():
        notes.append(f"{folder.name} is left out: {error}")
        say(notes[-1])


def _checkpoint_folders(output_dir: Path) -> list[Path]:
    """Those whose names stay come first: they name what best and last are the same as."""
    if not output_dir.is_dir():
        return []
    numbered = [
        (int(match[1]), folder) for folder in output_dir.iterdir() if (match := _NUMBERED.fullmatch(folder.name))
    ]
    named = [output_dir / name for name in ("best", "last")]
    return [folder for folder in [*(folder for _, folder in sorted(numbered)), *named] if folder.is_dir()]


def fingerprints_of_run(output_dir: Path) -> set[str]:
    """Of all checkpoints of a run that can be read."""
    found = set()
    for folder in _checkpoint_folders(output_dir):
        with contextlib.suppress(OSError, UserError):
            found.add(fingerprint(folder))
    return found


def _named(name: str, output_dir: Path, folders: Sequence[Path]) -> Path:
    for folder in (output_dir / name, Path(name).expanduser()):
        if folder.is_dir():
            return folder
    there = ", ".join(folder.name for folder in folders) or "no checkpoints"
    raise UserError(f"--checkpoints: there is no {name} in {output_dir}, nor a folder of that name; it has {there}")


def _read_checkpoint(folder: Path, output_dir: Path) -> Model:
    config = read_base_config(folder, "--checkpoints")
    check_codec_folder(folder / "speech_tokenizer")
    is_of_run = folder.parent.resolve() == output_dir.resolve()
    name = folder.name if is_of_run else str(folder)
    try:
        print_of_folder = fingerprint(folder)
    except OSError as error:
        raise UserError(f"--checkpoints: {folder} cannot be read ({error}); is a run removing it?") from None
    samples = folder.name if is_of_run else f"{folder.name}-{print_of_folder[:8]}"
    step = (read_json(folder / "training_state.json") or {}).get("step")
    return Model(
        name,
        folder,
        config,
        print_of_folder,
        samples,
        step=step if isinstance(step, int) else None,
        run=read_json(folder.parent / "settings.json") or {},
    )


def _joined(first: Model, second: Model) -> Model:
    return replace(first, also=(*first.also, second.name))


def fingerprint_of(folder: Path, codec_folder: Path | None) -> str:
    """``kept_samples.fingerprint`` of what speaks with another codec than its own, or with its own (None)."""
    own = fingerprint(folder)
    if codec_folder is None:
        return own
    return hashlib.sha256(f"{own} {codec_fingerprint(codec_folder)}".encode()).hexdigest()[:32]


def known_languages(model: Model) -> Mapping[str, int]:
    """Name -> id of the languages that a model has."""
    return model.config["talker_config"].get("codec_language_id") or {}


# ------------------------------------------------------------------------------------------------------------ base


def find_base(settings: Settings, options: Options, notes: list[str]) -> Base | None:
    """The run's base, whose speaker encoder measures voices as well; without a base line it may be out of reach."""
    saved = (read_json(settings.output_dir / "settings.json") or {}).get("INIT_MODEL_PATH")
    if saved not in (None, settings.init_model_path):
        notes.append(f"the run was trained from {saved}, but INIT_MODEL_PATH is {settings.init_model_path}")
    try:
        return resolve_base(settings)
    except UserError as error:
        if options.with_base:
            raise
        notes.append(f"voice similarity is not measured, since the base cannot be read: {error}")
        return None


def make_base_model(
    settings: Settings, options: Options, base: Base | None, speakers: Sequence[str], notes: list[str]
) -> Model | None:
    """The line to beat: a base that clones; a custom_voice base that knows all speakers by name, which it speaks as;
    else what clones in the place of one that cannot: the model of SPEAKER_ENCODER_PATH. None where there is none."""
    if not options.with_base or base is None:
        return None
    known = {} if settings.export_type == "base" else preset_rows(base.config)  # there, names are labels
    unknown = [speaker for speaker in speakers if speaker.lower() not in known]
    source = base if base.is_custom_voice and not unknown else base.encoder_source
    if source is None:
        notes.append(
            f"there is no line of the base: {base.name} does not know {', '.join(unknown)}, and has no speaker encoder "
            "to clone with (SPEAKER_ENCODER_PATH names a model that has)"
        )
        return None
    if source is not base:
        notes.append(
            f"the line of the base is {source.name} (SPEAKER_ENCODER_PATH), which clones: {base.name} does not know "
            f"{', '.join(unknown)}, and cannot clone"
        )
    config = read_base_config(source.folder)  # without the languages that the run adds
    has_own_codec = source.codec_folder == source.folder / "speech_tokenizer"
    codec_folder = None if has_own_codec else source.codec_folder
    return Model(
        "base",
        source.folder,
        config,
        fingerprint_of(source.folder, codec_folder),
        "base",
        is_base=True,
        codec_folder=codec_folder,
        setting="INIT_MODEL_PATH" if source is base else "SPEAKER_ENCODER_PATH",
    )


def preset_rows(config: Mapping[str, Any]) -> Mapping[str, int]:
    """Lower-case name of each speaker that a checkpoint knows -> its row of the codec table."""
    return config["talker_config"].get("spk_id") or {}
