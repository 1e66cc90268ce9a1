"""An evaluation before anything is generated: models, voices and texts, all checked, and what each text may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.audio import audio_duration_seconds
from finetuning.base_model import Base, load_tokenizer
from finetuning.codec import FRAMES_PER_SECOND
from finetuning.disk import read_json
from finetuning.errors import UserError
from finetuning.evaluation_models import (
    Model,
    Options,
    find_base,
    find_checkpoints,
    known_languages,
    make_base_model,
    open_run_rows,
    preset_rows,
    settings_of_run,
)
from finetuning.evaluation_voices import Voice, choose_speakers, find_voices, is_file
from finetuning.kept_samples import Manner, Request
from finetuning.manifest import RowFormat, normalize_text
from finetuning.prompt import assistant_turn, resolve_language
from finetuning.settings import Settings
from finetuning.training_rows import TrainingRows

#: Said where neither texts are given nor the run has validation rows.
BUILT_IN_TEXTS = (
    "The weather was better than we had hoped, so we walked along the river until it got dark.",
    "Could you tell me when the next train leaves, and whether I have to change on the way?",
    "I never said that it would be easy; I only said that it would be worth it.",
    "On the third of May, twenty-seven people signed the letter.",
)
#: So many validation texts are taken by default.
NUM_TEXTS = 5
#: Frames after which a sample is cut off, by the text's tokens: several times as long as anybody would take.
SPARE_FRAMES, FRAMES_PER_TOKEN = 125, 15
#: Nobody speaks faster than this: a text with more tokens than fit into the model's longest speech is refused.
LEAST_FRAMES_PER_TOKEN = 1.5
#: Where texts come from when nobody gives any, for messages.
_DEFAULT_TEXTS = "--texts names none, and a validation text of the run cannot be said"
#: Positions of a prompt beside its text and reference.
_SPARE_POSITIONS = 16


@dataclass(frozen=True)
class Text:
    """A text to say; ``language`` as a user or a row names it."""

    text: str
    language: str = "Auto"


@dataclass(frozen=True)
class Plan:
    """All that is compared; ``max_frames`` of each text; ``rows`` of the run, where they can be opened."""

    models: Sequence[Model]
    voices: Sequence[Voice]
    texts: Sequence[Text]
    max_frames: Sequence[int]
    seeds: Sequence[int]
    base: Base | None
    rows: TrainingRows | None
    notes: list[str] = field(default_factory=list)

    def without(self, failed: Mapping[str, str]) -> Plan:
        """The plan for the other models.

        Args:
            failed: name of a model -> why it is left out, which becomes a note.

        Raises:
            UserError: no checkpoint is left.
        """
        models = [model for model in self.models if model.name not in failed]
        if all(model.is_base for model in models):
            raise UserError("\n".join(why for name, why in failed.items()))
        notes = [*self.notes, *(f"{name} is left out: {why}" for name, why in failed.items())]
        return replace(self, models=models, notes=notes)

    def language(self, model: Model, text: Text) -> str:
        """The model's name of a text's language; Auto where it has none."""
        try:
            return resolve_language(text.language, known_languages(model)) or "Auto"
        except KeyError:
            return "Auto"


@dataclass(frozen=True)
class Job:
    """A sample that the report needs; ``place`` is the number of its text."""

    model: Model
    manner: Manner
    voice: Voice
    place: int
    request: Request


def make_plan(settings: Settings, options: Options) -> Plan:
    """Finds and checks everything.

    Raises:
        UserError: what is missing or does not fit.
    """
    notes: list[str] = []
    settings = settings_of_run(settings)
    checkpoints = find_checkpoints(settings.output_dir, options.checkpoints, notes)
    rows = open_run_rows(settings)
    base = find_base(settings, options, notes)
    texts, origin = _texts(settings, options, rows, notes)
    texts = _with_language(texts, origin, options, rows, checkpoints)
    _check_texts(texts, origin, base)
    speakers = choose_speakers(checkpoints, options.speakers)
    voices = find_voices(settings, options, speakers, checkpoints, base, rows, notes)
    base_model = make_base_model(settings, options, base, speakers, notes)
    models = _with_manners(checkpoints, base_model, voices, notes)
    max_frames = _max_frames(models, voices, texts, origin, options)
    _note_languages(models, texts, notes)
    seeds = range(1, options.num_seeds + 1)
    return Plan(models, voices, texts, max_frames, seeds, base, rows, notes)


def _with_manners(
    checkpoints: Sequence[Model], base: Model | None, voices: Sequence[Voice], notes: list[str]
) -> list[Model]:
    """The models with the manners in which each speaks.

    Raises:
        UserError: one has to clone a speaker that has no reference, or does not know a speaker.
    """
    models = [*checkpoints, *([base] if base else [])]
    for model in models:
        _check_voices(model, voices)
    unknown = [voice.speaker for voice in voices if voice.transcript is None]
    cloning: tuple[Manner, ...] = ("voice",) if unknown else ("voice", "context")
    if unknown and any(model.clones for model in models):
        notes.append(
            f"cloning in context is left out: what the reference of {', '.join(unknown)} says is not known; give "
            "--reference_text, or set REF_TEXT"
        )
    return [replace(model, manners=cloning if model.clones else ("name",)) for model in models]


def _check_voices(model: Model, voices: Sequence[Voice]) -> None:
    if model.clones:
        if missing := [voice.speaker for voice in voices if voice.reference is None]:
            what = "the base clones" if model.is_base else f"{model.name} clones"
            way_out = ", or leave the base out with --no_base" if model.is_base else ""
            raise UserError(
                f"--reference: {what} a reference, and none of {', '.join(missing)} is known or still there; give an "
                f"audio file of 5 - 10 s{way_out}"
            )
        return
    presets = preset_rows(model.config)
    if missing := [voice.speaker for voice in voices if voice.speaker.lower() not in presets]:
        raise UserError(
            f"--speakers: {model.name} has no speaker {', '.join(missing)}; it has: {', '.join(presets) or 'none'}"
        )


# ----------------------------------------------------------------------------------------------------------- texts


def read_texts(given: Sequence[str]) -> list[Text]:
    """Texts from the command line, each a text or a file with one a line.

    Raises:
        UserError: a file cannot be read, or there is no text.
    """
    lines = [line for item in given for line in _lines(item)]
    texts = [Text(text) for text in dict.fromkeys(map(normalize_text, lines)) if text]
    if not texts:
        raise UserError("--texts: no text to say; give texts, or a file with at least one line that is not empty")
    return texts


def _lines(item: str) -> list[str]:
    if not is_file(item):
        if item.endswith(".txt") and not any(map(str.isspace, item)):
            raise UserError(f"--texts: {item} does not exist")
        return [item]
    try:
        return Path(item).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--texts: {item} cannot be read ({type(error).__name__}); give a UTF-8 text file") from None


def _texts(settings: Settings, options: Options, rows: TrainingRows | None, notes: list[str]) -> tuple[list[Text], str]:
    """The texts, and what gave them, for messages."""
    if options.texts:
        return read_texts(options.texts), "--texts"
    if texts := _texts_of_settings(settings):
        return texts, "EVAL_TEXTS"
    return _default_texts(rows, notes), _DEFAULT_TEXTS


def _default_texts(rows: TrainingRows | None, notes: list[str]) -> list[Text]:
    """Some validation texts of the run, which it has not learnt, else a few built-in ones."""
    if rows is not None and rows.validation is not None and len(rows.validation):
        names, places = rows.validation.labels("text")
        chosen = np.unique(np.linspace(0, len(names) - 1, min(NUM_TEXTS, len(names))).round().astype(int))
        first_rows = [int(np.flatnonzero(places == place)[0]) for place in chosen]
        return [
            Text(names[place], rows.validation[row]["language"] or "Auto")
            for place, row in zip(chosen, first_rows, strict=True)
        ]
    notes.append(
        "the run has no validation rows that can be opened, so built-in English sentences are said; give --texts for "
        "what the voice is to say"
    )
    return [Text(text) for text in BUILT_IN_TEXTS]


def _texts_of_settings(settings: Settings) -> list[Text]:
    """Those of EVAL_TEXTS, each once."""
    return [Text(text) for text in dict.fromkeys(map(normalize_text, settings.texts_to_speak()))]


def _with_language(
    texts: Sequence[Text],
    origin: str,
    options: Options,
    rows: TrainingRows | None,
    checkpoints: Sequence[Model],
) -> list[Text]:
    """Texts in --language, else in that of their row, else in the run's where all rows are in one.

    Args:
        origin: what gave them; where it is no row, none says their language.

    Raises:
        UserError: a checkpoint has no such language.
    """
    if options.language:
        for model in checkpoints:
            _check_language(model, options.language)
        return [replace(text, language=options.language) for text in texts]
    if origin == _DEFAULT_TEXTS or rows is None:
        return list(texts)
    languages = rows.train.distinct("language")
    return [replace(text, language=languages[0]) for text in texts] if len(languages) == 1 else list(texts)


def _check_language(model: Model, language: str) -> None:
    known = known_languages(model)
    try:
        resolve_language(language, known)
    except KeyError:
        raise UserError(
            f"--language: {model.name} has no {language}; it has Auto, {', '.join(sorted(known))}"
        ) from None


def _note_languages(models: Sequence[Model], texts: Sequence[Text], notes: list[str]) -> None:
    """Where a model says a text as Auto because it lacks the language (the base, of one that was added)."""
    for language in dict.fromkeys(text.language for text in texts):
        lacking = [model.name for model in models if not _has_language(model, language)]
        if lacking:
            notes.append(f"{', '.join(lacking)} has no {language} and says its texts as Auto")


def _has_language(model: Model, language: str) -> bool:
    try:
        resolve_language(language, known_languages(model))
    except KeyError:
        return False
    return True


def _check_texts(texts: Sequence[Text], origin: str, base: Base | None) -> None:
    tokens = base.special_tokens() if base else RowFormat().special_tokens
    for text in texts:
        if found := [token for token in tokens if token in text.text]:
            raise UserError(
                f'{origin}: "{text.text[:60]}" contains the special token {found[0]}, which ends the prompt'
            )


def _max_frames(
    models: Sequence[Model], voices: Sequence[Voice], texts: Sequence[Text], origin: str, options: Options
) -> list[int]:
    """Frames after which each text is cut off.

    Raises:
        UserError: a text, or what it would take, is longer than a model allows.
    """
    tokenizer = load_tokenizer(models[0].folder)  # all of a run have the same
    context = _context_positions(models, voices, tokenizer)
    longest = min(_longest_speech(model) for model in models)
    positions = min(model.config["talker_config"].get("max_position_embeddings", 32_768) for model in models)
    return [_frames_of(text.text, origin, tokenizer, context, longest, positions, options) for text in texts]


def _frames_of(
    text: str, origin: str, tokenizer: Any, context: int, longest: int, positions: int, options: Options
) -> int:
    num_tokens = len(tokenizer(assistant_turn(text))["input_ids"])
    shown = f'{origin}: "{text[:40]}…" has {num_tokens:,} tokens'
    if num_tokens * LEAST_FRAMES_PER_TOKEN > longest:
        raise UserError(
            f"{shown}, more than the model says at a time: its longest speech is {longest:,} frames "
            f"({longest / FRAMES_PER_SECOND:.0f} s); split it"
        )
    frames = options.max_new_tokens or min(longest, SPARE_FRAMES + FRAMES_PER_TOKEN * num_tokens)
    if (needed := num_tokens + context + _SPARE_POSITIONS + frames) > positions:
        raise UserError(
            f"{shown} and may take {frames:,} frames: {needed:,} positions with its reference, but the model has "
            f"{positions:,}; shorten the text, or lower --max_new_tokens"
        )
    return frames


def _longest_speech(model: Model) -> int:
    value = (read_json(model.folder / "generation_config.json") or {}).get("max_new_tokens")
    return value if isinstance(value, int) else 2048  # stock's own default


def _context_positions(models: Sequence[Model], voices: Sequence[Voice], tokenizer: Any) -> int:
    """Positions of the longest reference with its transcript, where any model has one in context."""
    if not any("context" in model.manners for model in models):
        return 0
    lengths = [
        round((audio_duration_seconds(voice.reference) or 0) * FRAMES_PER_SECOND)
        + len(tokenizer(voice.transcript)["input_ids"])
        for voice in voices
    ]
    return max(lengths)
