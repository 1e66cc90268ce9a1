"""Compares the checkpoints of a run, and the base that clones the speaker untrained, on the same texts: generates what
is not there yet, measures it, ranks, and writes report.html and report.json.

One model is in memory at a time: each checkpoint in turn, then what measures. Every sample is kept when it is made (see
``kept_samples``), so the same command goes on where it was interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from finetuning.audio import load_audio
from finetuning.base_model import choose_device, load_speaker_encoder
from finetuning.checkpoint import CODEC_TABLE
from finetuning.console import say
from finetuning.disk import check_is_whole, checksum
from finetuning.errors import UserError
from finetuning.evaluation_plan import Job, Model, Options, Plan, Voice, make_plan
from finetuning.evaluation_report import write_report
from finetuning.kept_samples import Kept, Manner, Request, find, fingerprint, keep, note_measures, remove_outdated
from finetuning.settings import Settings
from finetuning.stock import import_qwen_tts, quiet_transformers

if TYPE_CHECKING:
    from finetuning.listening import Yardstick

#: References of a speaker whose mean vector its samples are compared with, and training rows that its pace is taken of.
MAX_REFERENCES = 20
#: Samples that are measured, and noted, at a time.
SAMPLES_AT_ONCE = 16
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def evaluate(settings: Settings, options: Options) -> Path:
    """The whole evaluation; gives the path of the page.

    Raises:
        UserError: something is missing, does not fit, or cannot be written.
    """
    plan = make_plan(settings, options)
    device = choose_device(settings)
    jobs = make_jobs(plan, settings, device)
    samples = options.output / "samples"
    with disk_errors(options.output):
        kept = generate(plan, jobs, samples, settings, device)
        kept = measure(plan, jobs, kept, settings, device)
        return write_report(plan, jobs, kept, options, settings)


@contextlib.contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turns what the disk refuses into a message.

    Raises:
        UserError
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(
            f"--output: {output} cannot be written ({error.strerror}); what was generated is kept: free some space or "
            "name another folder, and start the same command again"
        ) from None


# -------------------------------------------------------------------------------------------------------- generating


def precision_of(settings: Settings, device: str) -> torch.dtype:
    """On a GPU what MIXED_PRECISION says, elsewhere fp32."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
    return kinds[settings.mixed_precision] if device == "cuda" else torch.float32


def make_jobs(plan: Plan, settings: Settings, device: str) -> list[Job]:
    """Every sample of the report, a model's together."""
    precision = str(precision_of(settings, device)).removeprefix("torch.")
    return [
        Job(model, manner, voice, place, _request(plan, model, manner, voice, place, seed, settings, precision, device))
        for model in plan.models
        for manner in model.manners
        for voice in plan.voices
        for place in range(len(plan.texts))
        for seed in plan.seeds
    ]


def _request(
    plan: Plan, model: Model, manner: Manner, voice: Voice, place: int, seed: int, settings: Settings, precision: str,
    device: str,
) -> Request:  # fmt: skip
    text = plan.texts[place]
    clones = manner != "name"
    return Request(
        fingerprint=model.fingerprint,
        manner=manner,
        speaker=voice.speaker,
        language=plan.language(model, text),
        text=text.text,
        seed=seed,
        max_new_tokens=plan.max_frames[place],
        non_streaming=_is_non_streaming(model, manner, settings),
        precision=precision,
        device=device,
        reference=voice.checksum if clones else None,
        reference_text=voice.transcript if manner == "context" else None,
    )


def _is_non_streaming(model: Model, manner: Manner, settings: Settings) -> bool:
    """A checkpoint in the layout that it was trained in; both, and the base, in stock's default."""
    stock_default = manner == "name"
    if model.is_base or settings.train_layout == "both":
        return stock_default
    return settings.train_layout == "non_streaming"


def generate(plan: Plan, jobs: Sequence[Job], folder: Path, settings: Settings, device: str) -> list[Kept]:
    """The samples of all jobs, in their order; those that are not there yet are generated, model by model.

    Raises:
        UserError: a checkpoint is damaged, or gone.
        OSError: the disk refused to write.
    """
    for model in plan.models:
        if num_removed := remove_outdated(folder / model.samples, model.fingerprint):
            say(f"{model.name} has changed: {num_removed} samples of what it was before are removed")
    kept = {job.request.key(): find(folder / job.model.samples, job.request) for job in jobs}
    missing = [job for job in jobs if kept[job.request.key()] is None]
    say(f"{len(jobs)} samples, {len(jobs) - len(missing)} of them are there already")
    with tqdm(total=len(missing), desc="generating", disable=not missing) as bar:
        for model in plan.models:
            due = [job for job in missing if job.model is model]
            if due:
                bar.set_description(model.name)
                made = _speak_all(model, due, folder / model.samples, settings, device, bar.update)
                kept |= dict(zip((job.request.key() for job in due), made, strict=True))
    return [kept[job.request.key()] for job in jobs]


def _speak_all(
    model: Model, jobs: Sequence[Job], folder: Path, settings: Settings, device: str, tick: Callable[[], Any]
) -> list[Kept]:
    """Loads a model, generates its samples and lets go of it."""
    check_is_whole(model.folder, "--checkpoints")
    stock = _load(model, settings, device)
    _check_is_the_same(model)
    prompts: dict[tuple[str, Manner], Any] = {}
    made = []
    with quiet_transformers(), _failures(model):
        for job in jobs:
            made.append(keep(folder, job.request, _speak(stock, job, prompts)))
            tick()
    del stock, prompts
    _free_memory()
    return made


def _check_is_the_same(model: Model) -> None:
    """Raises UserError where a run that goes on has replaced the folder since it was read: samples would be kept under
    the name of another model."""
    try:
        is_same = fingerprint(model.folder) == model.fingerprint
    except OSError:
        is_same = False
    if not is_same:
        raise UserError(
            f"--checkpoints: {model.name} has been replaced meanwhile (is its run still training?); start the same "
            "command again"
        )


@contextlib.contextmanager
def _failures(model: Model) -> Iterator[None]:
    """Names the model where generation fails for a reason that the user can do something about.

    Raises:
        UserError: its weights give no finite figures, or it does not fit into the GPU's memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"DEVICE: the GPU's memory does not suffice for {model.name}; free some, or set DEVICE=cpu (--device cpu)"
        ) from None
    except RuntimeError as error:
        if not any(words in str(error) for words in ("probability tensor", "device-side assert")):
            raise
        raise UserError(
            f"--checkpoints: {model.name} gives probabilities that are not finite, so its training has diverged; leave "
            "it out by naming the others"
        ) from None


def _load(model: Model, settings: Settings, device: str) -> Any:
    qwen_tts = import_qwen_tts()
    try:
        return qwen_tts.Qwen3TTSModel.from_pretrained(
            str(model.folder), dtype=precision_of(settings, device), device_map=device, attn_implementation="sdpa"
        )
    except FileNotFoundError as error:
        raise UserError(
            f"--checkpoints: {model.name} cannot be loaded ({error}); is a run that is training removing it?"
        ) from None


def _speak(stock: Any, job: Job, prompts: dict[tuple[str, Manner], Any]) -> np.ndarray:
    """(num_samples,) float32 of one sample; its draws hang on its seed alone, not on what was generated before."""
    request = job.request
    options = {
        "language": request.language,
        "non_streaming_mode": request.non_streaming,
        "max_new_tokens": request.max_new_tokens,
    }
    if request.manner == "name":
        torch.manual_seed(request.seed)
        waveforms, _ = stock.generate_custom_voice(request.text, request.speaker, **options)
        return waveforms[0]
    which = (request.speaker, request.manner)
    if which not in prompts:
        in_context = request.manner == "context"
        prompts[which] = stock.create_voice_clone_prompt(
            str(job.voice.reference), request.reference_text, x_vector_only_mode=not in_context
        )
    torch.manual_seed(request.seed)
    waveforms, _ = stock.generate_voice_clone(request.text, voice_clone_prompt=prompts[which], **options)
    return waveforms[0]


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------------- measuring


def measure(plan: Plan, jobs: Sequence[Job], kept: Sequence[Kept], settings: Settings, device: str) -> list[Kept]:
    """The samples with their figures; what was measured before with the same yardstick is not measured again."""
    from finetuning.listening import Spoken, measure_each

    digest = yardstick_digest(plan, settings)
    done = list(kept)
    due = [number for number, sample in enumerate(kept) if sample.yardstick != digest]
    if not due:
        return done
    yardstick = build_yardstick(plan, settings, device)
    with tqdm(total=len(due), desc="measuring") as bar:
        for start in range(0, len(due), SAMPLES_AT_ONCE):
            numbers = due[start : start + SAMPLES_AT_ONCE]
            spoken = [_spoken(Spoken, jobs[number], kept[number]) for number in numbers]
            for number, measures in zip(numbers, measure_each(spoken, yardstick), strict=True):
                finite = {name: float(value) for name, value in measures.items() if np.isfinite(value)}
                done[number] = note_measures(kept[number], finite, digest)
            bar.update(len(numbers))
    _free_memory()
    return done


def _spoken(kind: Callable[..., Any], job: Job, sample: Kept) -> Any:
    return kind(
        text=job.request.text,
        speaker=job.voice.speaker,
        waveform=sample.waveform(),
        num_codec_frames=sample.num_codec_frames,
        stopped=sample.stopped,
    )


def build_yardstick(plan: Plan, settings: Settings, device: str) -> Yardstick:
    """What the samples are measured with, as far as it can be had: the base's speaker encoder, each speaker's vector
    and pace in the training rows, and what ASR_MODEL and MOS_MODEL name."""
    from finetuning.listening import Yardstick
    from finetuning.recognition import load_opinion, load_recognizer

    encode, may_download = (
        load_speaker_encoder(plan.base, device) if _can_encode(plan) else None,
        settings.data_mode != "none",
    )
    recognize = opinion = None
    if settings.asr_model:
        recognize = load_recognizer(settings.asr_model, device, _spoken_language(plan), may_download)
    if settings.mos_model:
        opinion = load_opinion(settings.mos_model, device, may_download)
    vectors = {name.lower(): vector for name, vector in _vectors(plan, encode).items()}
    return Yardstick(encode, vectors, _paces(plan), recognize, opinion)


def yardstick_digest(plan: Plan, settings: Settings) -> str:
    """What the figures of a sample depend on, beside the sample."""
    from finetuning import listening, recognition

    content = {
        "code": [checksum(Path(room.__file__)) for room in (listening, recognition)],
        "encoder": fingerprint(plan.base.encoder_source.folder) if _can_encode(plan) else None,
        "references": {voice.speaker: [checksum(file) for file in _references(voice)] for voice in plan.voices},
        "paces": _paces(plan),
        "models": [settings.asr_model, settings.mos_model, _spoken_language(plan)],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _spoken_language(plan: Plan) -> str | None:
    """Of all texts, where it is one."""
    languages = {text.language for text in plan.texts}
    return languages.pop() if len(languages) == 1 else None


def _can_encode(plan: Plan) -> bool:
    return plan.base is not None and plan.base.has_speaker_encoder


def _references(voice: Voice) -> list[Path]:
    return list(voice.files)[:MAX_REFERENCES]


def _vectors(plan: Plan, encode: Callable[[np.ndarray], np.ndarray] | None) -> dict[str, np.ndarray]:
    """Speaker -> (H,) float32: the mean over its references, else its row of a checkpoint's codec table.

    The real voice comes first: a row that trains would move with what it is to judge.
    """
    if encode is None:
        return {}
    found = {}
    for voice in plan.voices:
        if files := _references(voice):
            found[voice.speaker] = np.mean([encode(load_audio(file)) for file in files], axis=0)
        elif (row := _stored_vector(plan, voice)) is not None:
            found[voice.speaker] = row
    return found


def _stored_vector(plan: Plan, voice: Voice) -> np.ndarray | None:
    """A speaker's row in the first checkpoint that has one."""
    for model in plan.models:
        row = (model.config["talker_config"].get("spk_id") or {}).get(voice.speaker.lower())
        for file in sorted(model.folder.glob("model*.safetensors")) if row is not None else ():
            with safe_open(file, framework="pt") as weights:
                if CODEC_TABLE in weights.keys():  # noqa: SIM118 - safe_open is no dict
                    return weights.get_slice(CODEC_TABLE)[row : row + 1].float().numpy()[0]
    return None


def _paces(plan: Plan) -> dict[str, float]:
    """Lower-case name of a speaker -> its pace in the training rows; those without rows are missing."""
    from finetuning.listening import characters_per_second

    return {} if plan.rows is None else characters_per_second(plan.rows.train)
