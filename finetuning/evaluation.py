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
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from finetuning.base_model import choose_device, load_speaker_encoder
from finetuning.checkpoint import CODEC_TABLE
from finetuning.console import say
from finetuning.disk import check_is_whole, checksum
from finetuning.errors import UserError
from finetuning.evaluation_models import Model, Options, fingerprint_of, fingerprints_of_run
from finetuning.evaluation_plan import Job, Plan, make_plan
from finetuning.evaluation_report import write_report
from finetuning.evaluation_voices import Voice, hear
from finetuning.kept_samples import (
    Kept,
    Manner,
    Request,
    find_anywhere,
    fingerprint,
    keep,
    note_measures,
    remove_outdated,
)
from finetuning.recognition import judge_stamps, load_opinion, load_recognizer, try_judges
from finetuning.settings import Settings
from finetuning.stock import import_qwen_tts, quiet_transformers

if TYPE_CHECKING:
    from finetuning.listening import Yardstick

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def evaluate(settings: Settings, options: Options) -> Path:
    """The whole evaluation; gives the path of the page.

    Raises:
        UserError: something is missing, does not fit, or cannot be written.
    """
    plan = make_plan(settings, options)
    try_judges(settings)
    device = choose_device(settings)
    jobs = make_jobs(plan, settings, device)
    with disk_errors(options.output):
        found, failed = generate(plan, jobs, options.output / "samples", settings, device)
        plan = plan.without(failed)
        jobs = [job for job in jobs if job.model.name not in failed]
        kept, notes = measure(plan, jobs, [found[job.request.key()] for job in jobs], settings, device)
        return write_report(replace(plan, notes=[*plan.notes, *notes]), jobs, kept, options, settings)


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
    """A checkpoint in the layout that its run trained it in; both, and the base, in stock's default."""
    layout = model.run.get("TRAIN_LAYOUT", settings.train_layout)
    if model.is_base or layout == "both":
        return manner == "name"
    return layout == "non_streaming"


def generate(
    plan: Plan, jobs: Sequence[Job], folder: Path, settings: Settings, device: str
) -> tuple[dict[str, Kept], dict[str, str]]:
    """Generates what is not there yet, model by model.

    Returns:
        the samples by the keys of their requests; and name of each model that could not say all of its own -> why.

    Raises:
        OSError: the disk refused to write.
    """
    kept = {job.request.key(): find_anywhere(folder, job.model.samples, job.request) for job in jobs}
    missing = [job for job in jobs if kept[job.request.key()] is None]
    say(f"{len(jobs)} samples, {len(jobs) - len(missing)} of them are there already")
    failed: dict[str, str] = {}
    with tqdm(total=len(missing), desc="generating", disable=not missing) as bar:
        for model in plan.models:
            if due := [job for job in missing if job.model is model]:
                bar.set_description(model.name)
                num_before = bar.n
                try:
                    kept |= _speak_all(model, due, folder / model.samples, settings, device, bar.update)
                except ModelError as error:
                    failed[model.name] = str(error)
                    say(f"{model.name} is left out: {error}")
                    bar.update(num_before + len(due) - bar.n)
                _free_memory()
    fingerprints = fingerprints_of_run(settings.output_dir) | {model.fingerprint for model in plan.models}
    for model in plan.models:
        is_new = model.name not in failed
        if is_new and (num_removed := remove_outdated(folder / model.samples, model.folder, fingerprints)):
            say(f"{model.name} has changed: {num_removed} samples of what it was before are removed")
    return {key: sample for key, sample in kept.items() if sample is not None}, failed


class ModelError(UserError):
    """A model cannot be loaded or cannot speak; the others can."""


def _speak_all(
    model: Model, jobs: Sequence[Job], folder: Path, settings: Settings, device: str, tick: Callable[[], Any]
) -> dict[str, Kept]:
    """Loads a model, generates its samples and lets go of it; gives them by the keys of their requests.

    Raises:
        ModelError
    """
    prompts: dict[tuple[str, Manner], Any] = {}
    made = {}
    with _failures(model):
        check_is_whole(model.folder, model.setting)
        stock = _load(model, settings, device)
        _check_is_the_same(model)
        with quiet_transformers():
            for job in jobs:
                waveform = _speak(stock, job, prompts)
                made[job.request.key()] = keep(folder, job.request, waveform, model.folder)
                tick()
    return made


def _check_is_the_same(model: Model) -> None:
    """Raises UserError where a run that goes on has replaced the folder since it was read: samples would be kept under
    the name of another model."""
    try:
        is_same = fingerprint_of(model.folder, model.codec_folder) == model.fingerprint
    except OSError:
        is_same = False
    if not is_same:
        raise UserError(
            f"{model.setting}: {model.name} has been replaced meanwhile (is its run still training?); start the same "
            "command again"
        )


@contextlib.contextmanager
def _failures(model: Model) -> Iterator[None]:
    """Names the model where loading or generating fails for a reason that lies in it.

    Raises:
        ModelError: what a UserError says; or it does not fit into the memory, or its probabilities are not finite.
        UserError: they are not on a GPU, which is of no use to this process from then on.
    """
    diverged = f"{model.setting}: {model.name} gives probabilities that are not finite, so its training has diverged"
    try:
        yield
    except UserError as error:
        raise ModelError(str(error)) from None
    except RuntimeError as error:
        if _is_out_of_memory(error):
            raise ModelError(
                f"DEVICE: the memory does not suffice for {model.name}; free some, or set DEVICE=cpu (--device cpu)"
            ) from None
        if "device-side assert" in str(error):
            raise UserError(f"{diverged}; leave it out by naming the others") from None
        if "probability tensor" not in str(error):
            raise
        raise ModelError(diverged) from None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)  # MPS has no class for it


def _load(model: Model, settings: Settings, device: str) -> Any:
    """Stock's model.

    Raises:
        UserError: it is incomplete, or holds what is no number.
        RuntimeError: the memory does not suffice.
    """
    qwen_tts = import_qwen_tts()
    try:
        with _as_stock_loads(model) as folder:
            stock = qwen_tts.Qwen3TTSModel.from_pretrained(
                str(folder), dtype=precision_of(settings, device), device_map=device, attn_implementation="sdpa"
            )
    except Exception as error:  # whatever files make transformers say
        if _is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"{model.setting}: {model.name} cannot be loaded ({type(error).__name__}: {reason}); is a run that is "
            "training removing it?"
        ) from None
    if not all(bool(weight.isfinite().all()) for weight in stock.model.parameters()):
        raise UserError(f"{model.setting}: {model.name} has weights that are not finite: its training has diverged")
    return stock


@contextlib.contextmanager
def _as_stock_loads(model: Model) -> Iterator[Path]:
    """The model's folder, with the codec that it is to speak with: stock looks for that in there."""
    if model.codec_folder is None:
        yield model.folder
        return
    with tempfile.TemporaryDirectory() as name:
        for file in model.folder.iterdir():
            if file.name != "speech_tokenizer":
                (Path(name) / file.name).symlink_to(file.resolve())
        (Path(name) / "speech_tokenizer").symlink_to(model.codec_folder.resolve())
        yield Path(name)


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


def measure(
    plan: Plan, jobs: Sequence[Job], kept: Sequence[Kept], settings: Settings, device: str
) -> tuple[list[Kept], list[str]]:
    """The samples with their figures, and notes on what judges failed on.

    What was measured before with the same yardstick is not measured again, unless a judge failed.
    """
    from finetuning.listening import Spoken, measure_each

    paces = _paces(plan)
    of_speaker = {voice.speaker: yardstick_digest(plan, voice, settings, paces) for voice in plan.voices}
    digests = [of_speaker[job.request.speaker] for job in jobs]
    done = list(kept)
    due = [number for number, sample in enumerate(kept) if sample.yardstick != digests[number]]
    if not due:
        return done, []
    yardstick = build_yardstick(plan, settings, device, paces)
    for number in tqdm(due, desc="measuring"):
        num_failures = yardstick.num_failures
        [measures] = measure_each([_spoken(Spoken, jobs[number], kept[number])], yardstick)
        finite = {name: float(value) for name, value in measures.items() if np.isfinite(value)}
        is_whole = yardstick.num_failures == num_failures
        done[number] = note_measures(kept[number], finite, digests[number] if is_whole else None)
    notes = [
        f"{what} could not be measured of {len(reasons)} samples ({reasons[0]}); the same command tries them again"
        for what, reasons in yardstick.failures.items()
    ]
    del yardstick
    _free_memory()
    return done, notes


def _spoken(kind: Callable[..., Any], job: Job, sample: Kept) -> Any:
    return kind(
        text=job.request.text,
        speaker=job.voice.speaker,
        waveform=sample.waveform(),
        num_codec_frames=sample.num_codec_frames,
        stopped=sample.stopped,
    )


def build_yardstick(plan: Plan, settings: Settings, device: str, paces: Mapping[str, float]) -> Yardstick:
    """What the samples are measured with, as far as it can be had: the base's speaker encoder, each speaker's vector
    and pace in the training rows, and what ASR_MODEL and MOS_MODEL name."""
    from finetuning.listening import Yardstick

    encode, may_download = (
        load_speaker_encoder(plan.base, device) if _can_encode(plan) else None,
        settings.data_mode != "none",
    )
    recognize = opinion = None
    if settings.asr_model:
        recognize = load_recognizer(settings.asr_model, device, _spoken_language(plan), may_download)
    if settings.mos_model:
        opinion = load_opinion(settings.mos_model, device, may_download)
    return Yardstick(encode, _vectors(plan, encode), paces, recognize, opinion)


def yardstick_digest(plan: Plan, whose: Voice, settings: Settings, paces: Mapping[str, float]) -> str:
    """What the figures of a voice's samples depend on, beside the samples."""
    from finetuning import audio, listening, quality, recognition, voice

    content = {
        "code": [checksum(Path(room.__file__)) for room in (audio, listening, quality, recognition, voice)],
        "encoder": fingerprint(plan.base.encoder_source.folder) if _can_encode(plan) else None,
        "vector": _source_of_vector(whose) if _can_encode(plan) else None,
        "pace": paces.get(whose.speaker.lower()),
        "judges": judge_stamps(settings),
        "language": _spoken_language(plan),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _spoken_language(plan: Plan) -> str | None:
    """Of all texts, where it is one."""
    languages = {text.language for text in plan.texts}
    return languages.pop() if len(languages) == 1 else None


def _can_encode(plan: Plan) -> bool:
    return plan.base is not None and plan.base.has_speaker_encoder


def _vectors(plan: Plan, encode: Callable[[np.ndarray], np.ndarray] | None) -> dict[str, np.ndarray]:
    """Lower-case name of a speaker -> (H,) float32: the row that it has before training, else the mean over all of its
    references, as in training (which also rounds it to the export's dtype: that moves no cosine by a millionth)."""
    if encode is None:
        return {}
    found = {}
    for voice in plan.voices:
        if voice.stored is not None:
            found[voice.speaker.lower()] = _stored_vector(voice)
        elif voice.files:
            vectors = [encode(hear(file, f"reference of {voice.speaker}")) for file in voice.files]
            found[voice.speaker.lower()] = np.mean(vectors, axis=0)
    return found


def _source_of_vector(voice: Voice) -> str | list[str]:
    """What the speaker's vector is made of, as checksums."""
    if voice.stored is not None:
        return hashlib.sha256(_stored_vector(voice).tobytes()).hexdigest()
    return [checksum(file) for file in voice.files]


def _stored_vector(voice: Voice) -> np.ndarray:
    """(H,) float32."""
    folder, row = voice.stored
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            if CODEC_TABLE in weights.keys():  # noqa: SIM118 - safe_open is no dict
                return weights.get_slice(CODEC_TABLE)[row : row + 1].float().numpy()[0]
    raise AssertionError(f"{folder} has no codec table")


def _paces(plan: Plan) -> dict[str, float]:
    """Lower-case name of a speaker -> its pace in the training rows; those without rows are missing."""
    from finetuning.listening import characters_per_second

    return {} if plan.rows is None else characters_per_second(plan.rows.train)
