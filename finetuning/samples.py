"""Samples: what the model says on its way, in OUTPUT_DIR/samples/step-N/.

===================  ==================================================================================================
``NN-<speaker>.wav``  24 kHz, decoded by the base's codec
``samples.json``      a list: file, text, speaker, language, in_context, seed, num_codec_frames, stopped, seconds
===================  ==================================================================================================

Every text is said by every speaker, each with a seed of its own, so that a sample depends neither on those beside it
nor on the number of processes, among which they are dealt out. The main process decodes: it has the codec on the CPU
(0.7 GB for the release's) and brings it to the GPU for that alone.

Nothing that goes wrong here ends a run: it is said once, and the sample is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from finetuning.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from finetuning.base_model import Base
from finetuning.checkpoint import SAMPLES_FOLDER
from finetuning.codec import FRAMES_PER_SECOND, Codec
from finetuning.console import say
from finetuning.dataset import Reference
from finetuning.disk import new_folder, write_json
from finetuning.errors import UserError
from finetuning.manifest import normalize_text
from finetuning.metrics import METRICS
from finetuning.prompt import find_language
from finetuning.recognition import judge_stamps
from finetuning.row_index import Manifest
from finetuning.settings import Settings
from finetuning.signals import Interrupted
from finetuning.speakers import Speakers
from finetuning.speaking import LiveModel, Request, Speech, leaving_no_cache, num_positions, undisturbed
from finetuning.steps import MappedSteps, TrainingSteps

#: Without EVAL_TEXTS: so many texts of rows, none longer than so many characters (about 13 s), of the first so many.
NUM_TEXTS, MAX_CHARACTERS, MAX_CANDIDATES = 3, 200, 50
#: Of EVAL_TEXTS, and of the speakers, only the first so many.
MAX_TEXTS, SAMPLE_SPEAKERS = 16, 4
#: Speech may take so many times what the training data's speech rate predicts, and two seconds more. A model that has
#: not learnt to stop would babble for minutes.
MAX_SLOWNESS, SPARE_FRAMES = 3.0, 25
#: Rows that the speech rate and the languages are taken from.
NUM_KNOWN_ROWS, NUM_STREAMED_ROWS = 2000, 16


@dataclass(frozen=True)
class Sample:
    """Something that the model said.

    Attributes:
        language: a name of the base's, or "Auto".
        codes: (T, 16) int16.
        waveform: (n,) float32 at 24 kHz.
        stopped: whether it came to its end by itself, before the bound.
        file: the wav.
        in_context: EXPORT_TYPE=base: whether the reference's text and codes stood in the prompt.
    """

    text: str
    speaker: str
    language: str
    codes: np.ndarray
    waveform: np.ndarray
    stopped: bool
    seed: int
    file: Path
    in_context: bool = False

    def to_json(self) -> dict[str, Any]:
        """What ``samples.json`` says of it."""
        return {
            "file": self.file.name,
            "text": self.text,
            "speaker": self.speaker,
            "language": self.language,
            "in_context": self.in_context,
            "seed": self.seed,
            "num_codec_frames": len(self.codes),
            "stopped": self.stopped,
            "seconds": len(self.waveform) / SAMPLE_RATE_HZ,
        }


class Sampled(NamedTuple):
    """What the samples of a step have shown; the same figures in every process, the samples in the main one alone.

    Attributes:
        figures: means over the samples, and under ``yardsticks`` those that can be compared: metric -> digest; see
            ``yardsticks_of``.
    """

    figures: dict[str, Any]
    samples: list[Sample]


class Judged(NamedTuple):
    """What judges find in the samples of a step.

    Attributes:
        figures: name -> mean over the samples that have it.
        whole: names of those that all samples have, as far as they can have them.
    """

    figures: dict[str, float]
    whole: frozenset[str]


# --------------------------------------------------------------------------------------------------- what is said


def check_eval_texts(settings: Settings, base: Base) -> None:
    """Raises UserError for an EVAL_TEXTS with a control token of the base's."""
    special = base.special_tokens()
    for number, text in enumerate(settings.texts_to_speak(), 1):
        if found := [token for token in special if token in text]:
            raise UserError(
                f"EVAL_TEXTS: text {number} contains the special token {found[0]}, which would end or break the "
                "prompt; take it out"
            )


def samples_bytes(settings: Settings, requests: Sequence[Request], num_steps: int) -> int:
    """About what the samples of so many steps take on the disk: 16-bit speech as fast as the training rows', and in
    each tracker a copy of it."""
    if not requests:
        return 0
    num_frames = sum((request.max_frames - SPARE_FRAMES) / MAX_SLOWNESS for request in requests)
    num_times = num_steps // settings.steps_between_samples + 1  # at the end, too
    return round(num_times * num_frames * SAMPLES_PER_FRAME * 2 * (1 + len(settings.trackers())))


class _Row(NamedTuple):
    """What is read of a row."""

    text: str
    speaker: str
    language: str
    num_frames: int


def plan_samples(
    settings: Settings,
    base: Base,
    train: TrainingSteps,
    validation: Manifest | None,
    speakers: Speakers,
) -> list[Request]:
    """Everything that is said each time.

    A text of EVAL_TEXTS is said in the language of most of the speaker's rows, that of a row in its own. With
    EXPORT_TYPE=base a speaker is cloned from the first reference of its rows: from its vector, in context where
    ICL_FRACTION is 1, and both ways between. (Streamed rows have one vector for each speaker, which is taken.)

    Raises:
        UserError: the model has no positions for a text.
    """
    known = base.talker_config.get("codec_language_id") or {}
    rows = _rows_of(train, validation)
    lines: list[tuple[str, str | None]] = [(normalize_text(text), None) for text in settings.texts_to_speak()]
    lines = lines or _lines_of(_rows_of_manifest(validation) if validation else []) or _lines_of(rows)
    lines = _first(lines, MAX_TEXTS, "texts of EVAL_TEXTS")
    names = _first(list(speakers.names), SAMPLE_SPEAKERS, "speakers")
    requests: list[Request] = []
    for (text, language), (number, name) in product(lines, enumerate(names)):
        wanted = language or _usual_language(rows, name)
        # Scripts differ in how much is said by a character.
        rate = frames_per_character([row for row in rows if row.language == wanted] or rows)
        bound = math.ceil(MAX_SLOWNESS * rate * len(text)) + SPARE_FRAMES
        spoken_in = _language(wanted, known)
        for voice in _voices(settings, train, speakers, number):
            place = len(requests)
            requests.append(Request(place, text, name, spoken_in, settings.seed + place, bound, *voice))
    _check_lengths(requests, base, train.encoder.tokenizer)
    return requests


def _check_lengths(requests: Iterable[Request], base: Base, tokenizer: Any) -> None:
    limit = base.talker_config["max_position_embeddings"]
    for request in requests:
        if (needed := num_positions(request, tokenizer)) > limit:
            raise UserError(
                f'EVAL_TEXTS: "{request.text[:40]}…" has {len(request.text)} characters; with up to '
                f"{request.max_frames / FRAMES_PER_SECOND:.0f} s of speech that is {needed} positions, and the model "
                f"has {limit}. Cut it in several texts"
            )


def frames_per_character(rows: Sequence[_Row]) -> float:
    """The median over the rows; without any, that of English read aloud (15 characters a second)."""
    rates = [row.num_frames / len(row.text) for row in rows if row.text and row.num_frames]
    return float(np.median(rates)) if rates else FRAMES_PER_SECOND / 15


def _first(items: list[Any], limit: int, what: str) -> list[Any]:
    if len(items) > limit:
        say(f"SAMPLE_STEPS: of {len(items)} {what} the first {limit} are used")
    return items[:limit]


def _rows_of(train: TrainingSteps, validation: Manifest | None) -> list[_Row]:
    """Some of the training rows, evenly spread; of a stream, which would have to be encoded for it, the held-out rows,
    and a few where none are held out."""
    manifest = train.dataset.manifest if isinstance(train, MappedSteps) else validation
    if manifest is not None:
        return _rows_of_manifest(manifest, NUM_KNOWN_ROWS)
    found = train.rows(NUM_STREAMED_ROWS)
    return [_Row(row["text"], row["speaker"], row["language"], len(row["codes"])) for row in found]


def _rows_of_manifest(manifest: Manifest, limit: int | None = None) -> list[_Row]:
    """So many rows, evenly spread; without a limit the first ones."""
    places = np.arange(min(len(manifest), MAX_CANDIDATES))
    if limit is not None:
        places = np.linspace(0, len(manifest) - 1, min(len(manifest), limit)).astype(int)
    some = manifest.select(places)
    columns = [some.column(name).tolist() for name in ("text", "speaker", "language", "num_codec_frames")]
    return [_Row(*values) for values in zip(*columns, strict=True)]


def _lines_of(rows: Sequence[_Row]) -> list[tuple[str, str | None]]:
    """(text, language) of the first few rows that are not too long, each text once; of the shortest where all are."""
    languages = {row.text: row.language for row in reversed(rows)}
    texts = list(dict.fromkeys(row.text for row in rows))
    short = [text for text in texts if len(text) <= MAX_CHARACTERS] or sorted(texts, key=len)
    return [(text, languages[text]) for text in short[:NUM_TEXTS]]


def _usual_language(rows: Sequence[_Row], speaker: str) -> str:
    """That of most rows of a speaker, else of all rows."""
    own = [row.language for row in rows if row.speaker.lower() == speaker.lower()] or [row.language for row in rows]
    return max(own, key=own.count, default="Auto")


def _language(name: str, known: dict[str, int]) -> str:
    """As stock takes it."""
    return find_language(name, known) or "Auto"


def _voices(
    settings: Settings, train: TrainingSteps, speakers: Speakers, number: int
) -> list[tuple[Reference | None, bool]]:
    """(reference, whether in context) of each way in which a speaker speaks."""
    if settings.export_type != "base":
        return [(None, False)]
    references = train.dataset.references if isinstance(train, MappedSteps) else None
    if references is None:
        return [(Reference(speakers.vectors[number].numpy(), speakers.references[number][0]), False)]
    reference = references.clips.reference(int(references.of_speakers()[number][0]), settings.icl_fraction > 0)
    ways = {0: [False], 1: [True]}.get(settings.icl_fraction, [False, True])
    return [(reference, in_context) for in_context in ways]


def yardsticks_of(settings: Settings, requests: Sequence[Request], sampling: Mapping[str, Any]) -> dict[str, str]:
    """Metric of samples -> a short digest of what it is measured by: what is said and how, and who judges it.

    Two values can be compared where these are the same.

    Args:
        sampling: see ``generation_defaults``.
    """
    said = [
        (one.text, one.speaker, one.language, one.seed, one.max_frames, one.in_context, _content(one.reference))
        for one in requests
    ]
    recognizer, predictor = judge_stamps(settings)
    judges = {"wer": recognizer, "cer": recognizer, "mos": predictor}
    names = [name for name, metric in METRICS.items() if metric.is_of_samples]
    common = [said, dict(sampling), settings.lora_export_scale]
    content = {name: json.dumps([common, judges.get(name)], sort_keys=True) for name in names}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in content.items()}


def _content(reference: Reference | None) -> list[Any] | None:
    """What is heard of it; its file may move."""
    if reference is None:
        return None
    codes = None if reference.codes is None else reference.codes.tolist()
    return [reference.vector.tolist(), reference.text, codes]


# ------------------------------------------------------------------------------------------------------- saying it


@dataclass
class Sampler:
    """Lets the model speak, keeps what it says, and gives the figures of it. All processes take part.

    Args:
        yardsticks: see ``yardsticks_of``.
        judge: of all samples of a step, on the main process: what they show beside the figures that are always there.
            It calls what it is handed now and then, which may raise Interrupted.
    """

    settings: Settings
    accelerator: Accelerator
    live: LiveModel
    requests: Sequence[Request]
    codec_folder: Path
    yardsticks: Mapping[str, str]
    judge: Callable[[Sequence[Sample], Callable[[], None]], Judged] | None = None
    _codec: Codec | None = None
    _said: set[str] = field(default_factory=set)

    def is_due(self, step: int) -> bool:
        """Whether this step is one of SAMPLE_STEPS."""
        return step % self.settings.steps_between_samples == 0

    def speak(
        self, averaged: Callable[[], contextlib.AbstractContextManager[None]], check: Callable[[], None]
    ) -> list[Speech] | None:
        """This process's share of the requests; None where it was interrupted. What fails is left out.

        Args:
            averaged: inside of what it gives, the weights are those that are exported.
            check: called before every frame; raises Interrupted to break it off.
        """
        share = self.requests[self.accelerator.process_index :: self.accelerator.num_processes]
        found: list[Speech] = []
        try:
            # What goes wrong in putting back what these change is no sample's matter.
            with averaged(), self.live.ready(check):
                for request in share:
                    check()
                    with self._going_on("a sample is left out"):
                        found.append(self.live.say(request))
        except Interrupted:
            return None
        return found

    def keep(self, step: int, spoken: list[Speech], check: Callable[[], None]) -> Sampled | None:
        """Decodes, writes and judges what all processes have said; None, in all of them, where that was interrupted.

        Args:
            spoken: by this process.
            check: called between samples and between judges; raises Interrupted to break it off.
        """
        is_alone = self.accelerator.num_processes == 1
        everything = spoken if is_alone else gather_object(spoken)
        sampled: Sampled | None = Sampled({}, [])
        if self.accelerator.is_main_process and everything:
            device = self.accelerator.device
            try:
                with self._going_on("the samples are left out"), leaving_no_cache(device), undisturbed(device):
                    sampled = self._keep(step, sorted(everything, key=lambda speech: speech.number), check)
            except Interrupted:
                sampled = None
        if is_alone:
            return sampled
        (figures,) = broadcast_object_list([None if sampled is None else sampled.figures])
        return None if figures is None else Sampled(figures, sampled.samples)

    def _keep(self, step: int, spoken: Sequence[Speech], check: Callable[[], None]) -> Sampled:
        folder = self.settings.output_dir / SAMPLES_FOLDER / f"step-{step}"
        samples = [self._sample(speech, waveform, folder) for speech, waveform in self._decoded(spoken, check)]
        write_samples(folder, samples)
        figures, whole = figures_of(samples), {"eos_rate"}
        if self.judge is not None:
            with self._going_on("what is measured of the samples is left out"):
                judged = self.judge(samples, check)
                figures, whole = figures | judged.figures, whole | judged.whole
        if len(samples) < len(self.requests):
            whole = set()
        figures["yardsticks"] = {name: self.yardsticks[name] for name in METRICS if name in whole & figures.keys()}
        self._say_incomparable(step, figures)
        return Sampled(figures, samples)

    def _say_incomparable(self, step: int, figures: Mapping[str, Any]) -> None:
        name = self.settings.best_metric
        if METRICS[name].is_of_samples and name not in figures["yardsticks"] and name not in self._said:
            self._said.add(name)
            say(
                f"BEST_METRIC: {name} of step {step} is not known of all {len(self.requests)} samples, so it cannot be "
                "compared: such an evaluation chooses no best/ (said once)"
            )

    def _sample(self, speech: Speech, waveform: np.ndarray, folder: Path) -> Sample:
        request = self.requests[speech.number]
        file = folder / f"{speech.number + 1:02d}-{_file_name(request.speaker)}.wav"
        asked = (request.text, request.speaker, request.language)
        return Sample(*asked, speech.codes, waveform, speech.stopped, request.seed, file, request.in_context)

    def _decoded(self, spoken: Sequence[Speech], check: Callable[[], None]) -> list[tuple[Speech, np.ndarray]]:
        """With (n,) float32 waveforms."""
        if self._codec is None:
            self._codec = Codec(self.codec_folder)
        device = str(self.accelerator.device)
        try:
            self._codec.move(device)
            decoded = []
            for speech in spoken:
                check()
                decoded.append((speech, self._waveform(speech)))
            return decoded
        finally:
            self._codec.move("cpu")

    def _waveform(self, speech: Speech) -> np.ndarray:
        """In context as stock decodes it: behind the reference, which is cut off again."""
        request = self.requests[speech.number]
        if not request.in_context:
            return self._codec.decode([speech.codes])[0]
        codes = np.concatenate([request.reference.codes, speech.codes])
        waveform = self._codec.decode([codes])[0]
        return waveform[int(len(request.reference.codes) / len(codes) * len(waveform)) :]

    @contextlib.contextmanager
    def _going_on(self, consequence: str) -> Iterator[None]:
        """An error inside is said once, with what it means, and passed over."""
        try:
            yield
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and self.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if (kind := f"{consequence} {type(error).__name__}") not in self._said:
                self._said.add(kind)
                say(f"SAMPLE_STEPS: {consequence} ({reason}); training goes on")


def figures_of(samples: Sequence[Sample]) -> dict[str, float]:
    """``eos_rate`` (share that stopped by themselves), ``sample_seconds`` (mean), ``num_samples``."""
    return {
        "eos_rate": sum(sample.stopped for sample in samples) / len(samples),
        "sample_seconds": sum(len(sample.waveform) for sample in samples) / SAMPLE_RATE_HZ / len(samples),
        "num_samples": len(samples),
    }


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """The folder of a step, whole or not there.

    Raises:
        OSError: the disk refused.
    """
    import soundfile

    with new_folder(folder) as unfinished:
        for sample in samples:
            soundfile.write(str(unfinished / sample.file.name), sample.waveform, SAMPLE_RATE_HZ)
        write_json(unfinished / "samples.json", [sample.to_json() for sample in samples])


def _file_name(speaker: str) -> str:
    """A speaker's name as part of a file's."""
    return re.sub(r"[^\w-]+", "_", speaker).encode()[:100].decode(errors="ignore")  # a name has room for 255 bytes
