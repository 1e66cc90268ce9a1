"""The command-line forms of the official scripts: their options as settings, and what settings in messages mean there.

The official scripts know neither ``.env`` nor settings in the environment, so here a command means the same wherever it
is typed. Variables of other tools (HF_*, NCCL_*, CUDA_*, …) reach them as always.
"""

from __future__ import annotations

import contextlib
import os
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from finetuning.console import say
from finetuning.errors import UserError
from finetuning.settings import Settings, load_settings

#: Option of sft_12hz.py -> setting; the first seven are the official script's.
TRAINING_OPTIONS = {
    "init_model_path": "init_model_path",
    "output_model_path": "output_dir",
    "train_jsonl": "train_jsonl",
    "batch_size": "batch_size",
    "lr": "learning_rate",
    "num_epochs": "num_epochs",
    "speaker_name": "speaker_name",
    "replace_last_n_layers": "replace_last_n_layers",
    "add_new_layers": "add_new_layers",
    "freeze_original_layers": "freeze_original_layers",
    "freeze_speaker_encoder": "freeze_speaker_encoder",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "attn_implementation": "attn_implementation",
    "mixed_precision": "mixed_precision",
    "overwrite_output": "overwrite_output",
}
LAYER_OPTIONS = ("replace_last_n_layers", "add_new_layers", "freeze_original_layers")
#: Every weight but the text embedding table and the speaker encoder.
FULL_FINE_TUNING = "--replace_last_n_layers 0 --add_new_layers 0 --freeze_original_layers False"
#: What differs from the defaults of train.py, for the same learning rate in every step and the same checkpoints as the
#: official script has, and for nothing that it does not do. The options come on top.
TRAINING_DEFAULTS: dict[str, Any] = {
    "output_dir": "output",
    "speaker_name": "speaker_test",
    "lr_scheduler": "constant",
    "warmup_steps": 0,
    "save_epochs": True,
    "epoch_folder": "checkpoint-epoch",
    # Between the epochs a state to resume from now and then, beside last/ instead of a checkpoint-N/.
    "save_steps": 10**9,
    "save_minutes": 15,
    "validation_jsonl": os.devnull,
    "validation_fraction": 0,
    "sample_steps": 0,
    "report_to": "none",
    "data_check": "warn",
}
_OVERWRITE_HELP = "True starts over and replaces the run in the output folder; the default goes on with it"


class OptionParser(ArgumentParser):
    """Options that are never guessed from their first letters; a mistake is one message without the usage."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the options)")

    def parse(self) -> dict[str, Any]:
        """Name -> value of the options that were given or have a default.

        Raises:
            UserError: an option that is unknown, lacks its value, or is empty, as a variable of a shell may be.
        """
        options = {name: value for name, value in vars(self.parse_args()).items() if value is not None}
        if empty := [name for name, value in options.items() if isinstance(value, str) and not value.strip()]:
            raise UserError(f"--{empty[0]}: is empty; give it a value, or leave it out")
        return options


def training_parser(description: str | None) -> OptionParser:
    """The options of sft_12hz.py. Values stay strings: settings check them, all at once."""
    parser = OptionParser(description)
    for option, field in TRAINING_OPTIONS.items():
        info = Settings.model_fields[field]
        default = TRAINING_DEFAULTS.get(field, info.default)
        is_required = option == "train_jsonl"
        meaning = _OVERWRITE_HELP if option == "overwrite_output" else info.description
        help_text = f"{meaning} ({'required' if is_required else f'default {default}'})".replace("%", "%%")
        parser.add_argument(f"--{option}", metavar="VALUE", required=is_required, help=help_text)
    return parser


def training_settings(options: Mapping[str, str]) -> Settings:
    """The settings that the options stand for.

    Raises:
        UserError: with all problems, and the option of each.
    """
    given = {TRAINING_OPTIONS[option]: value for option, value in options.items()}
    with options_named(TRAINING_OPTIONS):
        settings = load_settings(TRAINING_DEFAULTS | given, _environment())
    return settings.model_copy(update={"resume": "never"}) if settings.overwrite_output else settings


def _environment() -> dict[str, str]:
    """For ``load_settings``: no settings file, and nothing but the number of processes."""
    return {"ENV_FILE": os.devnull, "WORLD_SIZE": os.environ.get("WORLD_SIZE", "")}


def say_names() -> None:
    """What the names of settings mean that a run prints."""
    others = [f"{field.upper()} is --{option}" for option, field in TRAINING_OPTIONS.items() if option != field]
    say(
        f"In what follows {', '.join(others)}, and every other option has its own name in capitals (NUM_EPOCHS is "
        "--num_epochs); RESUME=never with OVERWRITE_OUTPUT=true is --overwrite_output True. Settings that are no "
        "option belong to train.py"
    )


def say_what_trains(settings: Settings, options: Mapping[str, str]) -> None:
    """What the layer options mean and, where none was given, those of the official script's full fine-tuning."""
    replaced, added = settings.replace_last_n_layers, settings.add_new_layers
    new_layers = f"{replaced} new layers in place of the last {replaced} and {added} on top of all"
    new_layers = new_layers if settings.has_new_layers else "no new layers"
    if settings.freeze_original_layers:
        say(f"What trains: {new_layers}; the final norm, codec_head and the sub-talker; all else stays as it is")
    else:
        say(f"What trains: everything but the text embedding table and the speaker encoder; {new_layers}")
    if not any(option in options for option in LAYER_OPTIONS):
        say(
            "The official script's full fine-tuning, but for the text embedding table (no option trains it), would be: "
            f"{FULL_FINE_TUNING}"
        )


# ------------------------------------------------------------------------------------------------------- messages


@contextlib.contextmanager
def options_named(fields: Mapping[str, str], files: Mapping[str, Path] | None = None) -> Iterator[None]:
    """A UserError from inside says which options the settings are that it speaks of.

    Args:
        fields: option -> the setting that it stands for, in any case.
        files: option -> the file that it names; a message about its lines names the option, too.
    """
    try:
        yield
    except UserError as error:
        raise UserError(explain(str(error), fields, files or {})) from None


def explain(message: str, fields: Mapping[str, str], files: Mapping[str, Path]) -> str:
    """See ``options_named``."""
    meanings = dict.fromkeys((field.upper() for field in Settings.model_fields), "a setting of train.py")
    del meanings["HF_TOKEN"]  # the environment variable of this name is read
    meanings["RESUME"] = "never with --overwrite_output True"
    meanings |= {field.upper(): f"--{option}" for option, field in fields.items()}
    named = dict.fromkeys(name for name in re.findall(r"\b[A-Z][A-Z_]+\b", message) if name in meanings)
    notes = [f"{name} is {meanings[name]}" for name in named]
    notes += [f"{file} is {option}" for option, file in files.items() if f"{file} line " in message]
    return f"{message} ({', '.join(notes)})" if notes else message
