"""``README.md`` of a checkpoint: the model card that the Hub shows, and that says how to speak with the folder at hand.

It is made of what the run knows and of nothing else, so the same checkpoint has the same card. No path of the user's
machine stands in it: a base is named by its id on the Hub, or by the last part of its folder's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.console import listed_names
from finetuning.disk import CARD_FILE, read_json
from finetuning.history import is_number
from finetuning.metrics import METRICS
from finetuning.prompt import find_language
from finetuning.settings import Settings
from finetuning.tiny_model import NAMES as EMBEDDED_NAMES

if TYPE_CHECKING:
    from finetuning.base_model import Base
    from finetuning.speakers import Speakers

#: How the card names the folder that it lies in, and the words for it; an upload puts the repository in their place.
THIS_FOLDER, INSIDE = 'from_pretrained(".")', "inside this folder, or with its path in place of the dot"
#: The Hub's name of the library (huggingface.js, ``model-libraries.ts``); the package is called qwen-tts.
LIBRARY = "qwen3_tts"
#: Of the released models, and of what is embedded.
LICENSE = "apache-2.0"
#: Released models, by the name that a folder has into which one was downloaded by hand.
RELEASED = tuple(f"Qwen/Qwen3-TTS-12Hz-{size}-{kind}" for size in ("1.7B", "0.6B") for kind in ("Base", "CustomVoice"))
MODEL_URL = "https://github.com/QwenLM/Qwen3-TTS"
#: Settings that are always told, and those that are told where they are not their defaults.
ALWAYS_TOLD = ("learning_rate", "lr_scheduler", "num_epochs", "optimizer", "mixed_precision", "train_layout", "seed")
TOLD_IF_SET = (
    "max_steps", "weights_precision", "lr_scaling", "lr_min", "lr_num_cycles", "weight_decay", "max_grad_norm",
    "sub_talker_loss_weight", "sub_talker_frame_fraction", "layer_init", "train_stages", "train_text_embedding",
    "train_codec_embedding", "ema_decay", "speaker_balance", "curriculum", "augment_copies", "speaker_embedding",
    "speaker_embedding_trainable", "new_languages", "language_mix", "instruct_dropout", "icl_fraction",
    "reference_sampling",
)  # fmt: skip


def model_card(
    base: Base, speakers: Speakers, state: Mapping[str, Any], settings: Settings, about: Mapping[str, Any]
) -> str:
    """The whole text.

    Args:
        state: ``training_state.json``: ``step``, ``metrics`` by the names of ``METRICS``, or ``merged``.
        about: ``train`` and ``validation`` as ``run_record.data_summary`` has them, and the number of ``processes``;
            what is missing, the card leaves out.
    """
    parts = [
        _metadata(base, settings, about),
        f"# {_title(speakers)}\n\n{_made(base, settings, state)}",
        _use(settings, speakers),
        _data(about),
        _training(settings, about) if "merged" not in state else "",
        _measured(state, about),
        _limits(settings, state),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def for_repository(card: str, repository: str) -> str:
    """The card with the repository's id in place of the folder that it lies in."""
    there = card.replace(THIS_FOLDER, f'from_pretrained("{repository}")')
    return there.replace(INSIDE, "anywhere (a private repository needs your login, `hf auth login`)")


def how_to_speak(settings: Settings, speakers: Speakers) -> str:
    """The stock call in the form that was trained."""
    if settings.export_type == "custom_voice":
        layout = ", non_streaming_mode=False" if settings.train_layout == "streaming" else ""
        return f'model.generate_custom_voice(text="Hello.", speaker="{_quoted(speakers.names[0])}"{layout})'
    reference = 'ref_text="What I say there."' if settings.icl_fraction else "x_vector_only_mode=True"
    layout = ", non_streaming_mode=True" if settings.train_layout == "non_streaming" else ""
    return f'model.generate_voice_clone(text="Hello.", ref_audio="me.wav", {reference}{layout})'


# ----------------------------------------------------------------------------------------------------------- metadata


def _metadata(base: Base, settings: Settings, about: Mapping[str, Any]) -> str:
    """What the Hub reads, between its lines of dashes."""
    from huggingface_hub import ModelCardData

    known = hub_id(base)
    clones = settings.export_type == "base"
    data = ModelCardData(
        base_model=known,
        base_model_relation="finetune" if known else None,
        language=language_codes((about.get("train") or {}).get("languages") or {}) or None,
        library_name=LIBRARY,
        pipeline_tag="text-to-speech",
        tags=["qwen3-tts", "tts", "audio", "voice-cloning" if clones else "custom-voice"],
        **license_of(base),
    )
    return f"---\n{data.to_yaml()}\n---"


def hub_id(base: Base) -> str | None:
    """The id of the base on the Hub, as far as it is known: of a folder, by what it was trained from or its name."""
    if not is_local(base):
        return base.name
    name = (read_json(base.folder / "training_state.json") or {}).get("base")  # a checkpoint of this tool
    if isinstance(name, str) and (known := id_of_origin(name)):
        return known
    if match := re.search(r"/models--([^/]+)--([^/]+)/snapshots/[^/]+$", base.folder.as_posix()):  # the Hub's cache
        return f"{match[1]}/{match[2]}"
    return next((released for released in RELEASED if released.endswith(f"/{base.folder.name}")), None)


def is_local(base: Base) -> bool:
    """Whether the base was named by a folder, or is an embedded model, and not by an id on the Hub."""
    return not _looks_like_id(base.name) or Path(base.name).expanduser().resolve() == base.folder


def origin(base: Base) -> str:
    """What a checkpoint says of its base: an id on the Hub, an embedded model's name, or an absolute path."""
    return str(base.folder) if is_local(base) and base.name not in EMBEDDED_NAMES else base.name


def id_of_origin(name: str) -> str | None:
    """The id on the Hub in an ``origin``. Older checkpoints have the folder as it was named, maybe "models/base"."""
    return name if _looks_like_id(name) and not Path(name).is_dir() else None


def _looks_like_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def shown_base(base: Base) -> str:
    """The base by its id, or by the last part of its name."""
    return hub_id(base) or Path(base.name).name


def license_of(base: Base) -> dict[str, str]:
    """What the base's own card says of its licence, else that of the released models where it is one of them."""
    from huggingface_hub.repocard import metadata_load

    try:
        said = metadata_load(base.folder / CARD_FILE) or {}
    except Exception:  # none, or one that is no card
        said = {}
    names = ("license", "license_name", "license_link")
    given = {name: said.get(name) for name in names}
    firsts = {name: value[0] if isinstance(value, list) and value else value for name, value in given.items()}
    found = {name: value for name, value in firsts.items() if isinstance(value, str)}
    if "license" in found:
        return found
    return {"license": LICENSE} if base.name in EMBEDDED_NAMES or hub_id(base) in RELEASED else {}


def language_codes(names: Sequence[str] | Mapping[str, int]) -> list[str]:
    """ISO codes of languages as rows name them ("English", "en"); Auto, and what has no code, is left out."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    codes = {name.lower(): code for name, code in TO_LANGUAGE_CODE.items()}
    known = dict.fromkeys(codes, 0)
    found = []
    for name in names:
        lower = name.strip().lower()
        full = lower if lower in codes.values() else codes.get(find_language(name, known) or lower)
        found += [full] if full and full not in found else []
    return found


# --------------------------------------------------------------------------------------------------------------- text


def _title(speakers: Speakers) -> str:
    few = len(speakers.names) <= 3
    return f"Qwen3-TTS, fine-tuned: {', '.join(map(_plain, speakers.names))}" if few else "Qwen3-TTS, fine-tuned"


def _made(base: Base, settings: Settings, state: Mapping[str, Any]) -> str:
    name = f"`{shown_base(base)}`"
    if merged := state.get("merged"):
        shares = ", ".join(f"{one['share']:g} of `{adapter_name(one['adapter'])}`" for one in merged)
        return f"{name} with adapters merged into it: {shares}."
    kind = "It clones voices" if settings.export_type == "base" else "It speaks by name"
    return f"Trained from {name} for {state.get('step', 0)} optimizer steps. {kind}, through the package qwen-tts."


def adapter_name(folder: str) -> str:
    """The run's and the checkpoint's name of an ``adapter/``, without the way there."""
    parts = [part for part in Path(folder).parts if part not in ("adapter", "/", ".", "..")]
    return "/".join(parts[-2:])


def _use(settings: Settings, speakers: Speakers) -> str:
    if settings.export_type == "base":
        spoken = " and `ref_text` what is said there" if settings.icl_fraction else ""
        says = f"`me.wav` is a recording of the voice to clone, 3 to 30 seconds{spoken}."
    else:
        says = f"Speakers: {listed_names([f'`{name}`' for name in speakers.names])}."
    return f"""## Use

`pip install qwen-tts`, then, {INSIDE}:

```python
from qwen_tts import Qwen3TTSModel
model = Qwen3TTSModel.{THIS_FOLDER}
waveforms, sample_rate = {how_to_speak(settings, speakers)}
```

{says} `waveforms[0]` is an array of floats: `soundfile.write("hello.wav", waveforms[0], sample_rate)` saves it. On a \
GPU, give `from_pretrained` also `device_map="cuda:0", dtype=torch.bfloat16`."""


def _data(about: Mapping[str, Any]) -> str:
    train, validation = about.get("train"), about.get("validation")
    if not train:
        return ""
    rows = [("clips", train.get("rows")), ("minutes", _minutes(train))]
    rows += [(f"{kind}s", _counted(train.get(f"{kind}s"))) for kind in ("speaker", "language")]
    if validation:
        rows.append(("held out for validation", f"{validation['rows']} clips, {_minutes(validation)} minutes"))
    return "## Training data\n\n" + _table(("", ""), [row for row in rows if row[1] not in (None, "")])


def _minutes(summary: Mapping[str, Any]) -> str | None:
    return f"{60 * summary['hours']:.1f}" if is_number(summary.get("hours")) else None


def _counted(names: Mapping[str, int] | Sequence[str] | None) -> str:
    if isinstance(names, Mapping):
        return listed_names([f"{_plain(name)} ({count} clips)" for name, count in names.items()])
    return listed_names([_plain(name) for name in names or ()])


def _training(settings: Settings, about: Mapping[str, Any]) -> str:
    values, defaults = settings.public(), Settings().public()
    told = {name.upper(): values[name.upper()] for name in ALWAYS_TOLD}
    if processes := about.get("processes"):
        frames = settings.max_frames_per_batch
        size = f"up to {frames} frames" if frames else str(settings.batch_size)
        told["BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS x processes"] = (
            f"{size} x {settings.gradient_accumulation_steps} x {processes}"
        )
    if settings.lora_rank:
        told |= {name: values[name] for name in ("LORA_RANK", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGETS")}
        told["LORA_EXPORT_SCALE"] = values["LORA_EXPORT_SCALE"]
    told |= {name: values[name] for name in ("REPLACE_LAST_N_LAYERS", "ADD_NEW_LAYERS", "FREEZE_ORIGINAL_LAYERS")}
    told |= {name: values[name] for name in map(str.upper, TOLD_IF_SET) if values[name] != defaults[name]}
    rows = [(f"`{name}`", str(value).lower() if isinstance(value, bool) else value) for name, value in told.items()]
    return "## Training\n\n" + _table(("setting", "value"), rows)


def _measured(state: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """What was measured at this very step."""
    figures = state.get("metrics") or {}
    rows = [
        (name, f"{figures[name]:.4f}", f"{metric.meaning} ({_better(metric.better)})")
        for name, metric in METRICS.items()
        if is_number(figures.get(name))
    ]
    if not rows:
        return ""
    on = "the clips held out, or samples" if about.get("validation") else "samples"
    return f"## Measured\n\nAt this step, on {on}:\n\n" + _table(("figure", "value", "meaning"), rows)


def _better(which: str) -> str:
    return f"{which} is better"


def _limits(settings: Settings, state: Mapping[str, Any]) -> str:
    layout = {
        "non_streaming": "Trained with the whole text ahead (`non_streaming_mode=True`); the other layout may be "
        "worse. ",
        "streaming": "Trained for text that comes bit by bit (`non_streaming_mode=False`); the other layout may be "
        "worse. ",
        "both": "",
    }[settings.train_layout]
    layout = "" if "merged" in state else layout
    return f"""## Limits

{layout}It says what it learnt to say: other languages, styles or recording conditions than those of the data, long \
texts, numbers and rare names may come out wrong, and a text now and then does not end by itself. No figure says \
how it sounds: listen before you use it.

## Consent

A voice belongs to the person who speaks: use it, or clone one, only with the consent of that person, not to deceive, \
and say that the speech is synthetic.

## How it was made

By qwen3-tts-finetuning, which trains [Qwen3-TTS]({MODEL_URL}) on the layout that it speaks by and exports what the \
package qwen-tts loads as it is."""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _plain(name: str) -> str:
    """A name of the user's in Markdown: its own signs, no table's."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", name)


def _quoted(name: str) -> str:
    """A name inside of Python's double quotes."""
    return name.replace("\\", "\\\\").replace('"', '\\"')
