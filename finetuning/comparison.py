"""COMPARE_JSONL: sentences that were never trained on, said before and after, beside their recordings.

After the training stock qwen-tts says the text of each row twice: with the base, which clones the speaker's reference,
and with the checkpoint. OUTPUT_DIR/comparison/ then has, for row NN::

    NN-recording.wav    the row's own audio
    NN-coded.wav        the same through the codec: all that a checkpoint with this codec can be taught
    NN-before.wav       the base (where it can clone)
    NN-after.wav        the checkpoint
    comparison.json     the mean figures of each, and what was compared

It appears whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, AudioError, load_audio
from finetuning.base_model import Base, load_speaker_encoder
from finetuning.closeness import closeness, timbre_distance_db
from finetuning.codec import FRAMES_PER_SECOND, Codec
from finetuning.console import listed_names
from finetuning.disk import checksum, new_folder, read_json, write_json
from finetuning.errors import UserError
from finetuning.listening import cosine, error_rates
from finetuning.manifest import Row, RowFormat, Tally, read_rows
from finetuning.prompt import find_language
from finetuning.recognition import Recognize, load_recognizer
from finetuning.settings import Settings
from finetuning.stock import import_qwen_tts, quiet_transformers

SETTING = "COMPARE_JSONL"
MAX_ROWS = 30
#: Speech may last so many times the recording, and a second more.
MAX_SLOWNESS = 2.0
#: Of the table, in this order: figure -> its heading.
HEADINGS = {
    "similarity": "similarity",
    "similarity_to_coded": "to coded",
    "spectral_distance": "sounds off by",
    "timbre_distance_db": "timbre off by, dB",
    "timbre_distance_to_coded_db": "off coded, dB",
    "f0_error": "pitch off by",
    "rate_ratio": "rate",
    "stopped": "ended",
    "wer": "word errors",
}


@dataclass(frozen=True)
class Sentence:
    """A row, and its recording: (num_samples,) float32 at 24 kHz."""

    row: Row
    recording: np.ndarray

    @property
    def max_frames(self) -> int:
        """After which speech is cut off."""
        return math.ceil(MAX_SLOWNESS * len(self.recording) / SAMPLES_PER_FRAME + FRAMES_PER_SECOND)


Say = Callable[[Sentence], np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        checkpoint: best/, or last/ where there is none.
        references: lower-case speaker -> the recording that the base clones, and a base checkpoint too.
    """

    settings: Settings
    base: Base
    checkpoint: Path
    references: Mapping[str, str]
    device: str

    @property
    def folder(self) -> Path:
        return self.settings.output_dir / "comparison"

    @property
    def record(self) -> dict[str, Any]:
        """By which a finished comparison is known again."""
        sums = self.checkpoint / "checksums.json"
        return {
            "checkpoint": self.checkpoint.name,
            "checksum": checksum(sums) if sums.is_file() else None,
            "rows": str(self.settings.compare_jsonl),
        }


def rows_to_compare(settings: Settings, base: Base) -> list[Row]:
    """The first MAX_ROWS rows of COMPARE_JSONL.

    Raises:
        UserError: the file is missing, or a row is unusable or has no recording.
    """
    path, tally = settings.compare_jsonl, Tally()
    row_format = RowFormat.from_settings(settings, base.special_tokens())
    rows = list(read_rows(path, SETTING, row_format, tally, needs_codes=False, max_rows=MAX_ROWS))
    if tally.num_bad:
        raise UserError(f"{SETTING}: {tally.summary('cannot be used')}")
    for row in rows:
        if row.audio is None or not row.audio.is_file():
            raise UserError(
                f"{SETTING}: {path}, line {row.line}: a comparison needs the recording ({row_format.audio_key})"
            )
    return rows


def check_speakers(settings: Settings, base: Base, names: Sequence[str]) -> None:
    """Raises UserError for a row of COMPARE_JSONL whose speaker the training does not have."""
    if settings.compare_jsonl is None:
        return
    known = {name.lower() for name in names}
    for row in rows_to_compare(settings, base):
        if row.speaker.lower() not in known:
            raise UserError(
                f'{SETTING}: {settings.compare_jsonl}, line {row.line}: the training has no speaker "{row.speaker}"; '
                f"it has {listed_names(names)}"
            )


def compare(comparison: Comparison, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Speaks, measures and writes; the mean figures of each way."""
    sentences = [Sentence(row, _recording(row, comparison.settings.compare_jsonl)) for row in rows]
    recordings = [sentence.recording for sentence in sentences]
    codec, encode = Codec(comparison.base.codec_folder), _encoder(comparison.base)
    recognize = _recognizer(comparison.settings)
    figures: dict[str, dict[str, float]] = {}
    with new_folder(comparison.folder) as folder:
        for number, recording in enumerate(recordings, 1):
            _write(folder / f"{number:02d}-recording.wav", recording)
        spoken: dict[str, list[np.ndarray]] = {"coded": codec.decode(codec.encode(recordings))}
        with quiet_transformers():
            for way, say in _ways(comparison).items():
                spoken[way] = _all_said(say(), sentences, comparison.settings.seed)
        for way, waveforms in spoken.items():
            triples = zip(sentences, spoken["coded"], waveforms, strict=True)
            each = [_figures(*triple, encode, recognize) for triple in triples]
            figures[way] = {name: _mean([one[name] for one in each]) for name in each[0]}
            for number, waveform in enumerate(waveforms, 1):
                _write(folder / f"{number:02d}-{way}.wav", waveform)
        write_json(folder / "comparison.json", comparison.record | {"num_rows": len(rows), "figures": figures})
    return figures


def is_compared(comparison: Comparison) -> bool:
    """Whether this very comparison is there."""
    found = read_json(comparison.folder / "comparison.json") or {}
    return all(found.get(name) == value for name, value in comparison.record.items())


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each way, a column for each figure."""
    names = [name for name in HEADINGS if any(name in values for values in figures.values())]
    lines = [["", *(HEADINGS[name] for name in names)]]
    for way, values in figures.items():
        lines.append([way, *(_shown(name, values.get(name, math.nan)) for name in names)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(names) + 1)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _shown(name: str, value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.0%}" if name in ("stopped", "f0_error", "wer") else f"{value:.2f}"


# ------------------------------------------------------------------------------------------------------- speaking


def _ways(comparison: Comparison) -> dict[str, Callable[[], Say]]:
    """Name -> what loads a model and gives its voice: one model is in memory at a time."""
    ways = {
        "after": lambda: _speaker(comparison) if _has_names(comparison) else _cloner(comparison, comparison.checkpoint)
    }
    if not (comparison.base.folder / "speech_tokenizer").is_dir() or comparison.base.is_custom_voice:
        return ways
    return {"before": lambda: _cloner(comparison, comparison.base.folder)} | ways


def _has_names(comparison: Comparison) -> bool:
    return comparison.settings.export_type == "custom_voice"


def _load(folder: Path, device: str) -> Any:
    import torch

    package = import_qwen_tts()
    return package.Qwen3TTSModel.from_pretrained(
        str(folder), dtype=torch.float32, device_map=device, attn_implementation="sdpa"
    )


def _options(comparison: Comparison, sentence: Sentence, stock: Any) -> dict[str, Any]:
    """A language that a model does not have is Auto to it."""
    known = dict.fromkeys(stock.model.get_supported_languages() or (), 0)
    return {
        "language": find_language(sentence.row.language, known) or "Auto",
        "non_streaming_mode": comparison.settings.train_layout != "streaming",
        "max_new_tokens": sentence.max_frames,
    }


def _speaker(comparison: Comparison) -> Say:
    stock = _load(comparison.checkpoint, comparison.device)

    def say(sentence: Sentence) -> np.ndarray:
        row = sentence.row
        return stock.generate_custom_voice(row.text, row.speaker, **_options(comparison, sentence, stock))[0][0]

    return say


def _cloner(comparison: Comparison, folder: Path) -> Say:
    """Clones by the vector alone, as checkpoints learn speakers."""
    stock, prompts = _load(folder, comparison.device), {}

    def say(sentence: Sentence) -> np.ndarray:
        reference = comparison.references[sentence.row.speaker.lower()]
        if reference not in prompts:
            prompts[reference] = stock.create_voice_clone_prompt(reference, None, x_vector_only_mode=True)
        options = _options(comparison, sentence, stock) | {"voice_clone_prompt": prompts[reference]}
        return stock.generate_voice_clone(sentence.row.text, **options)[0][0]

    return say


def _all_said(say: Say, sentences: Sequence[Sentence], seed: int) -> list[np.ndarray]:
    import torch

    waveforms = []
    for number, sentence in enumerate(sentences):
        torch.manual_seed(seed + number)
        waveforms.append(np.asarray(say(sentence), np.float32))
    return waveforms


# ------------------------------------------------------------------------------------------------------ measuring


def _recording(row: Row, path: Path | None) -> np.ndarray:
    try:
        return load_audio(row.audio)
    except AudioError as error:
        raise UserError(f"{SETTING}: {path}, line {row.line}: {row.audio}: {error}") from None


def _encoder(base: Base) -> Callable[[np.ndarray], np.ndarray] | None:
    return load_speaker_encoder(base) if base.has_speaker_encoder else None


def _recognizer(settings: Settings) -> Recognize | None:
    """That of ASR_MODEL, on the CPU beside whoever speaks."""
    return load_recognizer(settings.asr_model, "cpu") if settings.asr_model else None


def _figures(
    sentence: Sentence, coded: np.ndarray, spoken: np.ndarray, encode: Any, recognize: Recognize | None
) -> dict[str, float]:
    """Against the recording, and in what belongs to the voice also against the recording as the codec gives it."""
    figures = closeness(sentence.recording, spoken)
    figures["timbre_distance_to_coded_db"] = timbre_distance_db(coded, spoken)
    if encode is not None:
        of_spoken = encode(spoken)
        figures["similarity"] = cosine(encode(sentence.recording), of_spoken)
        figures["similarity_to_coded"] = cosine(encode(coded), of_spoken)
    if recognize is not None:
        figures["wer"] = error_rates(sentence.row.text, recognize([spoken])[0]).get("wer", math.nan)
    return figures | {"stopped": float(len(spoken) / SAMPLES_PER_FRAME < sentence.max_frames - 1)}


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _write(path: Path, waveform: np.ndarray) -> None:
    import soundfile

    soundfile.write(path, waveform, SAMPLE_RATE_HZ, subtype="PCM_16")
