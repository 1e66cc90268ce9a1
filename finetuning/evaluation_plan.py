"""What an evaluation compares: checkpoints of a run and its base, texts, speakers and their references; all checked
before anything is generated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.audio import AudioError, audio_duration_seconds, load_audio
from finetuning.base_model import Base, load_tokenizer, read_base_config, resolve_base
from finetuning.checkpoint import NUMBERED_FOLDERS
from finetuning.codec import FRAMES_PER_SECOND, check_codec_folder
from finetuning.disk import checksum, read_json
from finetuning.errors import UserError
from finetuning.kept_samples import Manner, Request, fingerprint
from finetuning.manifest import RowFormat, normalize_text
from finetuning.prompt import assistant_turn, resolve_language
from finetuning.row_index import Manifest
from finetuning.settings import Settings
from finetuning.speakers import choose_reference
from finetuning.training_rows import TrainingRows, open_training_rows

#: Said where neither texts are given nor the run has validation rows.
BUILT_IN_TEXTS = (
    "The weather was better than we had hoped, so we walked along the river until it got dark.",
    "Could you tell me when the next train leaves, and whether I have to change on the way?",
    "I never said that it would be easy; I only said that it would be worth it.",
    "On the third of May, twenty-seven people signed the letter.",
)
#: So many validation texts and speakers are taken by default.
NUM_TEXTS, NUM_SPEAKERS = 5, 3
#: Frames after which a sample is cut off, by the text's tokens: several times as long as anybody would take.
SPARE_FRAMES, FRAMES_PER_TOKEN = 125, 15
#: Nobody speaks faster than this: a text with more tokens than fit into the model's longest speech is refused.
LEAST_FRAMES_PER_TOKEN = 1.5
#: Positions of a prompt beside its text and reference.
_SPARE_POSITIONS = 16
_NUMBERED = re.compile(rf"(?:{'|'.join(NUMBERED_FOLDERS)})-(\d+)")


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

    @property
    def clones(self) -> bool:
        return self.config["tts_model_type"] == "base"

    def line(self, manner: Manner) -> str:
        """The name of a line of the report."""
        names = " = ".join((self.name, *self.also))
        return names if manner == "name" else f"{names}, {MANNERS[manner]}"


#: Manners of cloning in words.
MANNERS: dict[Manner, str] = {"name": "by name", "voice": "voice only", "context": "in context"}


@dataclass(frozen=True)
class Text:
    """A text to say; ``language`` as a user or a row names it."""

    text: str
    language: str = "Auto"


@dataclass(frozen=True)
class Voice:
    """A speaker.

    Attributes:
        files: all references that are known and there.
        reference: the one that clones hear, its checksum and its transcript; None where it is not known.
    """

    speaker: str
    files: Sequence[Path] = ()
    reference: Path | None = None
    checksum: str | None = None
    transcript: str | None = None


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
    checkpoints = find_checkpoints(settings.output_dir, options.checkpoints)
    texts = read_texts(options.texts) if options.texts else _texts_of_settings(settings)
    rows = open_run_rows(settings)
    base = _find_base(settings, options, notes)
    is_given = bool(texts)
    texts = _with_language(texts or _default_texts(rows, notes), is_given, options, rows, checkpoints)
    _check_texts(texts, base)
    speakers = choose_speakers(checkpoints, options.speakers)
    voices = _voices(settings, options, speakers, checkpoints, rows)
    models = _with_manners(checkpoints, _base_model(settings, options, base, voices, notes), voices, notes)
    for model in models:
        check_codec_folder(model.folder / "speech_tokenizer")
    max_frames = _max_frames(models, voices, texts, options)
    _note_languages(models, texts, notes)
    seeds = range(1, options.num_seeds + 1)
    return Plan(models, voices, texts, max_frames, seeds, base, rows, notes)


# ----------------------------------------------------------------------------------------------------- checkpoints


def find_checkpoints(output_dir: Path, names: Sequence[str]) -> list[Model]:
    """The checkpoints of a run in the order of their steps, or those that are named; the same files once.

    Args:
        names: of folders in OUTPUT_DIR, or paths.

    Raises:
        UserError: there is none, or a name is unknown.
    """
    folders = _checkpoint_folders(output_dir)
    if not folders and not names:
        raise UserError(
            f"OUTPUT_DIR: {output_dir} holds no checkpoints (best, last, checkpoint-N, epoch-N); train first, set "
            "OUTPUT_DIR to the folder of a run, or name folders with --checkpoints"
        )
    chosen = [_named(name, output_dir, folders) for name in names] or folders
    models: dict[str, Model] = {}
    for folder in dict.fromkeys(chosen):
        model = _read_checkpoint(folder, output_dir)
        same = models.get(model.fingerprint)
        models[model.fingerprint] = model if same is None else _joined(same, model)
    return sorted(models.values(), key=lambda model: (model.step is None, model.step or 0))


def _checkpoint_folders(output_dir: Path) -> list[Path]:
    """Those whose names stay come first: they name what best and last are the same as."""
    if not output_dir.is_dir():
        return []
    numbered = [
        (int(match[1]), folder) for folder in output_dir.iterdir() if (match := _NUMBERED.fullmatch(folder.name))
    ]
    named = [output_dir / name for name in ("best", "last")]
    return [folder for folder in [*(folder for _, folder in sorted(numbered)), *named] if folder.is_dir()]


def _named(name: str, output_dir: Path, folders: Sequence[Path]) -> Path:
    for folder in (output_dir / name, Path(name).expanduser()):
        if folder.is_dir():
            return folder
    there = ", ".join(folder.name for folder in folders) or "no checkpoints"
    raise UserError(f"--checkpoints: there is no {name} in {output_dir}, nor a folder of that name; it has {there}")


def _read_checkpoint(folder: Path, output_dir: Path) -> Model:
    config = read_base_config(folder, "--checkpoints")
    is_of_run = folder.parent.resolve() == output_dir.resolve()
    name = folder.name if is_of_run else str(folder)
    print_of_folder = fingerprint(folder)
    samples = folder.name if is_of_run else f"{folder.name}-{print_of_folder[:8]}"
    step = (read_json(folder / "training_state.json") or {}).get("step")
    return Model(name, folder, config, print_of_folder, samples, step=step if isinstance(step, int) else None)


def _joined(first: Model, second: Model) -> Model:
    return replace(first, also=(*first.also, second.name))


def known_languages(model: Model) -> Mapping[str, int]:
    """Name -> id of the languages that a model has."""
    return model.config["talker_config"].get("codec_language_id") or {}


# ------------------------------------------------------------------------------------------------------------ base


def _find_base(settings: Settings, options: Options, notes: list[str]) -> Base | None:
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


def _base_model(
    settings: Settings, options: Options, base: Base | None, voices: Sequence[Voice], notes: list[str]
) -> Model | None:
    """What clones each speaker without training, or a base that knows all of them by name; None where there is none."""
    if not options.with_base or base is None:
        return None
    source = base.encoder_source or base
    config = read_base_config(source.folder)  # without the languages that the run adds
    presets = config["talker_config"].get("spk_id") or {}
    if base.encoder_source is None and any(voice.speaker.lower() not in presets for voice in voices):
        notes.append(f"there is no line of the base: {base.name} has no speaker encoder to clone with")
        return None
    return Model("base", source.folder, config, fingerprint(source.folder), "base", is_base=True)


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
    presets = model.config["talker_config"].get("spk_id") or {}
    if missing := [voice.speaker for voice in voices if voice.speaker.lower() not in presets]:
        raise UserError(
            f"--speakers: {model.name} has no speaker {', '.join(missing)}; it has: {', '.join(presets) or 'none'}"
        )


# -------------------------------------------------------------------------------------------------------- the rows


def open_run_rows(settings: Settings) -> TrainingRows | None:
    """The rows of the run in OUTPUT_DIR as it opened them; None where they are gone, or were streamed."""
    try:
        return open_training_rows(settings, Path(), RowFormat.from_settings(settings), "cpu", build=False)
    except (UserError, OSError, ValueError, KeyError):
        return None


def transcript_of(rows: Manifest, file: Path) -> str | None:
    """What a reference says, by the rows that name it or whose clip it is."""
    for column, text_column in (("ref_audio", "ref_text"), ("audio", "text")):
        names, places = rows.labels(column)
        same = [place for place, name in enumerate(names) if name.endswith(file.name) and _is_same(name, file)]
        found = np.flatnonzero(np.isin(places, same) & rows.has(text_column))
        if same and len(found):
            return rows[int(found[0])][text_column] or None
    return None


def _is_same(name: str, file: Path) -> bool:
    return Path(name).resolve() == file.resolve()


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
    if not _is_file(item):
        if item.endswith(".txt") and not any(map(str.isspace, item)):
            raise UserError(f"--texts: {item} does not exist")
        return [item]
    try:
        return Path(item).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--texts: {item} cannot be read ({type(error).__name__}); give a UTF-8 text file") from None


def _is_file(item: str) -> bool:
    try:
        return Path(item).is_file()
    except (OSError, ValueError):  # a text that is too long for a file's name
        return False


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
    is_given: bool,
    options: Options,
    rows: TrainingRows | None,
    checkpoints: Sequence[Model],
) -> list[Text]:
    """Texts in --language, else in that of their row, else in the run's where all rows are in one.

    Args:
        is_given: whether they were given, so that no row says their language.

    Raises:
        UserError: a checkpoint has no such language.
    """
    if options.language:
        for model in checkpoints:
            _check_language(model, options.language)
        return [replace(text, language=options.language) for text in texts]
    if not is_given or rows is None:
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


def _check_texts(texts: Sequence[Text], base: Base | None) -> None:
    tokens = base.special_tokens() if base else RowFormat().special_tokens
    for text in texts:
        if found := [token for token in tokens if token in text.text]:
            raise UserError(f'--texts: "{text.text[:60]}" contains the special token {found[0]}, which ends the prompt')


def _max_frames(models: Sequence[Model], voices: Sequence[Voice], texts: Sequence[Text], options: Options) -> list[int]:
    """Frames after which each text is cut off.

    Raises:
        UserError: a text, or what it would take, is longer than a model allows.
    """
    tokenizer = load_tokenizer(models[0].folder)  # all of a run have the same
    context = _context_positions(models, voices, tokenizer)
    longest = min(_longest_speech(model) for model in models)
    positions = min(model.config["talker_config"].get("max_position_embeddings", 32_768) for model in models)
    return [
        _frames_of(
            text.text, len(tokenizer(assistant_turn(text.text))["input_ids"]), context, longest, positions, options
        )
        for text in texts
    ]


def _frames_of(text: str, num_tokens: int, context: int, longest: int, positions: int, options: Options) -> int:
    shown = f'--texts: "{text[:40]}…" has {num_tokens:,} tokens'
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


# -------------------------------------------------------------------------------------------------------- speakers


def choose_speakers(checkpoints: Sequence[Model], wanted: Sequence[str]) -> list[str]:
    """The speakers that are named, else the run's first few.

    Raises:
        UserError: the run has no such speaker.
    """
    known = list(dict.fromkeys(name for model in checkpoints for name in _speakers_of(model)))
    if not known:
        raise UserError(
            "--checkpoints: none of them says which speakers it was trained for; name a checkpoint of a run as well"
        )
    if not wanted:
        return known[:NUM_SPEAKERS]
    by_key = {name.lower(): name for name in known}
    if unknown := [name for name in wanted if name.lower() not in by_key]:
        raise UserError(f"--speakers: the run has no speaker {', '.join(unknown)}; it has: {', '.join(known)}")
    return [by_key[name.lower()] for name in wanted]


def _speakers_of(model: Model) -> list[str]:
    """The names that the run trained, as its rows spell them; of another checkpoint all that it knows."""
    return list(_speaker_entries(model)) or list(model.config["talker_config"].get("spk_id") or {})


def _speaker_entries(model: Model) -> Mapping[str, Any]:
    entries = (read_json(model.folder / "speaker_encoder" / "speaker_config.json") or {}).get("speakers")
    return entries if isinstance(entries, dict) else {}


def _voices(
    settings: Settings,
    options: Options,
    speakers: Sequence[str],
    checkpoints: Sequence[Model],
    rows: TrainingRows | None,
) -> list[Voice]:
    given = given_references(options.references, speakers)
    if options.reference_text and len(speakers) > 1:
        raise UserError(f"--reference_text is for one speaker, not for {', '.join(speakers)}; choose with --speakers")
    return [_voice(settings, options, speaker, given.get(speaker), checkpoints, rows) for speaker in speakers]


def given_references(items: Iterable[str], speakers: Sequence[str]) -> dict[str, Path]:
    """--reference: a file, of the only speaker, or speaker=file of each.

    Raises:
        UserError: a file is not there, or whose voice it is is not said.
    """
    found = {}
    names = {name.lower(): name for name in speakers}
    for item in items:
        name, sign, file = item.partition("=")
        if _is_file(item) or not sign:
            name, file = speakers[0], item
            if len(speakers) > 1:
                raise UserError(f"--reference: whose voice is {item}? say {speakers[0]}={item}")
        if name.lower() not in names:
            raise UserError(f"--reference: {name} is none of the speakers {', '.join(speakers)}")
        if not _is_file(file):
            raise UserError(f"--reference: {file} does not exist")
        found[names[name.lower()]] = Path(file)
    return found


def _voice(
    settings: Settings,
    options: Options,
    speaker: str,
    given: Path | None,
    checkpoints: Sequence[Model],
    rows: TrainingRows | None,
) -> Voice:
    entries = [entry for model in checkpoints if isinstance(entry := _speaker_entries(model).get(speaker), dict)]
    saved = [Path(file) for entry in entries for file in entry.get("references") or ()]
    files = [file for file in dict.fromkeys(saved) if file.is_file()]
    reference = given or next(iter(files), None) or _other_reference(settings, speaker, rows)
    if reference is None:
        return Voice(speaker, files)
    try:
        load_audio(reference)
    except AudioError as error:
        raise UserError(f"--reference: {reference}: {error}") from None
    transcript = options.reference_text or _transcript(settings, reference, rows)
    transcript = normalize_text(transcript) if transcript else None
    return Voice(speaker, files or [reference], reference, checksum(reference), transcript)


def _other_reference(settings: Settings, speaker: str, rows: TrainingRows | None) -> Path | None:
    """REF_AUDIO_PATH of SPEAKER_NAME, else a clip of the training rows."""
    file = settings.ref_audio_path
    if file is not None and file.is_file() and speaker.lower() == settings.speaker_name.lower():
        return file
    if rows is None or speaker not in rows.train.distinct("speaker"):
        return None
    try:
        return Path(choose_reference(rows.train, speaker))
    except UserError:
        return None


def _transcript(settings: Settings, reference: Path, rows: TrainingRows | None) -> str | None:
    is_of_settings = settings.ref_audio_path is not None and _is_same(str(settings.ref_audio_path), reference)
    if is_of_settings and settings.ref_text:
        return settings.ref_text
    return transcript_of(rows.train, reference) if rows is not None else None
