"""From settings to a run that is ready to train: the steps that train.py, the preflight and other scripts share."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed

from finetuning.adapters import add_adapters
from finetuning.balance import SpeakerBalance, describe_shares
from finetuning.base_model import (
    Base,
    choose_attention,
    choose_device,
    load_model,
    load_tokenizer,
    resolve_base,
    set_precision,
    voice_encoder,
)
from finetuning.check_rows import check_at_start
from finetuning.checkpoint import (
    LOCK_FILE,
    Exporter,
    check_disk_space,
    check_output_folder,
    clean_up_leftovers,
    clear_output_folder,
    listed_names,
    lock_output_folder,
    reclaimable_bytes,
    run_entries,
)
from finetuning.choosing import Chooser
from finetuning.codec_rows import allocate_codec_rows
from finetuning.console import say
from finetuning.dataset import RowEncoder, StepDataset, unknown_languages
from finetuning.direct import DirectData, DirectRows
from finetuning.disk import bytes_of
from finetuning.draws import Draws
from finetuning.errors import UserError
from finetuning.languages import MAX_COVERAGE_TEXTS, Languages, coverage, initial_languages
from finetuning.layer_utils import check_layer_count, print_model_summary, replace_and_add_layers
from finetuning.listening import Spoken, Yardstick, characters_per_second, measure
from finetuning.manifest import RowFormat, remove_empty_folders
from finetuning.memory import pick_for_memory, weights_of
from finetuning.metrics import METRICS
from finetuning.objective import TrainingObjective, check_compiler, compile_layers
from finetuning.optimizers import check_optimizer, keep_matrices_in_bf16
from finetuning.prefix_cache import check_prefix_cache, make_prefix_cache
from finetuning.preparer import prepare_missing_rows
from finetuning.processes import Processes
from finetuning.progress import Progress, total_steps
from finetuning.prompt import LayoutIds, find_language
from finetuning.recognition import check_judges, load_opinion, load_recognizer
from finetuning.references import References, load_references, prepare_references, say_contexts, speakers_of
from finetuning.resume import (
    Resume,
    begin_or_resume,
    check_same_rows,
    fingerprint_of_base,
    say_what_differs,
    take_over,
)
from finetuning.roundtrip import judge
from finetuning.row_index import Manifest
from finetuning.run_record import data_summary, environment, record_run
from finetuning.samples import Sample, Sampler, check_eval_texts, plan_samples
from finetuning.sampling import StepSampler
from finetuning.saving import Saver, state_bytes
from finetuning.settings import Settings
from finetuning.sharding import asks_for_fsdp, is_sharded
from finetuning.speakers import Speakers, make_speakers, prepare_speakers
from finetuning.speaking import LiveModel, Request
from finetuning.stages import check_stages, check_stages_of_base
from finetuning.state import State, damage_of_state, find_states, step_of
from finetuning.stepping import Stepper
from finetuning.steps import MappedSteps, StreamedSteps, TrainingSteps
from finetuning.tracking import Tracker
from finetuning.trainer import Trainer, make_accelerator
from finetuning.training_rows import TrainingRows, open_training_rows
from finetuning.validation import Validator
from finetuning.voice import voice_vector


@dataclass
class Run:
    """Everything that a run is made of; built by ``build_run``.

    Attributes:
        requests: what the model says on its way; [] with SAMPLE_STEPS=0.
        state: that it goes on from; None when it begins at the beginning.
        lock: see ``lock_output_folder``.
    """

    settings: Settings
    base: Base
    accelerator: Accelerator
    model: Any
    speakers: Speakers
    objective: TrainingObjective
    train: TrainingSteps
    validation: StepDataset | None
    exporter: Exporter
    requests: list[Request]
    resume: Resume | None = None
    state: State | None = None
    lock: IO[str] | None = None

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @cached_property
    def num_steps(self) -> int:
        """Of the whole run; where frames decide, every epoch must be planned for it."""
        return total_steps(self.settings, self.train, self.progress)

    @property
    def progress(self) -> Progress:
        """Where it begins."""
        return Progress.from_json(self.state.record["progress"]) if self.state else Progress()

    @property
    def is_over(self) -> bool:
        """Whether the state is that of a complete run."""
        return self.state is not None and self.progress.is_over(self.settings, self.num_steps)

    @cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """Of the rows, to know them again."""
        return {
            "train": self.train.fingerprint(),
            "validation": self.validation.manifest.content_hash() if self.validation else None,
            "references": self.train.references_content(),
        }


def check_inputs(settings: Settings) -> tuple[Base, str]:
    """What can be checked in seconds: hardware, base, output folder. Returns the base and the device."""
    device = choose_device(settings)
    check_levers(settings, device)
    base = resolve_base(settings)
    if not settings.prepare_only:
        check_output_folder(settings, base)
    check_layer_count(settings.replace_last_n_layers, base.talker_config["num_hidden_layers"])
    weights_of(base, settings)  # says which words of LORA_TARGETS match nothing
    check_stages_of_base(settings, base)
    check_eval_texts(settings, base)
    return base, device


def check_measures(settings: Settings, base: Base) -> None:
    """What measures the samples, and whether BEST_METRIC is going to be measured.

    Raises:
        UserError
    """
    if settings.steps_between_samples:
        check_judges(settings)
    name = settings.best_metric
    if METRICS[name].is_of_samples and (problem := _why_not_measured(name, settings, base)):
        raise UserError(f"BEST_METRIC: {name} {problem}; set another one, such as loss")


def _why_not_measured(name: str, settings: Settings, base: Base) -> str | None:
    needed = {"wer": "asr_model", "cer": "asr_model", "mos": "mos_model"}.get(name)
    if not settings.steps_between_samples:
        return "is measured on samples, and SAMPLE_STEPS=0 turns them off"
    if asks_for_fsdp():
        return "is measured on samples, and there are none under FSDP"
    if needed and getattr(settings, needed) is None:
        return f"needs {needed.upper()}, which is not set"
    if name == "speech_rate_ratio" and settings.data_mode == "direct":
        return "needs the training rows ahead, which DATA_MODE=direct does not have"
    if name == "speaker_embedding_similarity" and not base.has_speaker_encoder:
        return "needs a speaker encoder, which the base lacks (SPEAKER_ENCODER_PATH)"
    return None


def check_levers(settings: Settings, device: str) -> None:
    """What settings that save time or memory need of the machine and of the launch.

    Raises:
        UserError
    """
    check_optimizer(settings)
    check_prefix_cache(settings)
    if settings.compile:
        check_compiler(device)
        if asks_for_fsdp():
            raise UserError("COMPILE: was never tried with FSDP; set COMPILE=false, or launch without FSDP")


def start(settings: Settings, device: str) -> Accelerator:
    """The process's Accelerator, with all random generators seeded."""
    accelerator = make_accelerator(settings, device)
    set_seed(settings.seed)
    if not settings.freeze_speaker_encoder and accelerator.is_main_process:
        say("FREEZE_SPEAKER_ENCODER=false: the encoder is read before training and never trained by this tool")
    return accelerator


def apply_memory_profile(settings: Settings, base: Base, accelerator: Accelerator) -> Settings:
    """The settings with what MEMORY_PROFILE picks, alike in all processes; unchanged where nothing is picked.

    Raises:
        UserError: nothing fits.
    """
    device, gpu_bytes = accelerator.device, None
    if device.type == "cuda":
        gpu_bytes = min(gather_object([torch.cuda.get_device_properties(device).total_memory]))
    picks = pick_for_memory(settings, base, gpu_bytes, accelerator.num_processes)
    if accelerator.is_main_process and settings.memory_profile:
        say(picks.message if picks else f"MEMORY_PROFILE=auto picks nothing on {device.type}: it is for GPUs")
    return picks.settings if picks else settings


def device_name(accelerator: Accelerator) -> str:
    """This process's device; the CPU without its index, which safetensors takes for a GPU's."""
    return "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)


def open_rows(settings: Settings, base: Base, accelerator: Accelerator) -> TrainingRows | DirectRows:
    """The rows with codes, memory-mapped or streamed. What is made ahead is made by one process and read by all.

    A dataset that has to be prepared first is shared by all processes.
    """
    row_format, device = RowFormat.from_settings(settings, base.special_tokens()), device_name(accelerator)
    processes = Processes(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    if settings.data_mode == "direct":
        data = DirectData(settings, base.codec_folder, row_format, device, processes)
        references = [data.prepare(base.has_speaker_encoder) if processes.is_main else None]
        return data.open(broadcast_object_list(references)[0])
    prepare_missing_rows(settings, row_format, base.codec_folder, device, processes)
    with accelerator.main_process_first():
        return open_training_rows(settings, base.codec_folder, row_format, device, build=processes.is_main)


def check_rows(settings: Settings, base: Base, rows: TrainingRows | DirectRows, accelerator: Accelerator) -> None:
    """DATA_CHECK and the rows' languages, on the main process; what it finds stops all of them.

    Raises:
        UserError
    """
    problem = None
    if accelerator.is_main_process:
        try:
            check_names(*names_of(rows, base), base, settings)
            check_at_start(rows, settings)
        except UserError as error:
            problem = str(error)
    if problem := broadcast_object_list([problem])[0]:
        raise UserError(problem)


def choose_start(settings: Settings, base: Base, accelerator: Accelerator) -> Resume | None:
    """Where RESUME lets the run begin: at a state, or None for the beginning. The main process decides for all.

    Raises:
        UserError: in all processes.
    """
    found: list[Any] = [None, None]
    if accelerator.is_main_process and not settings.prepare_only:
        try:
            found[0] = begin_or_resume(settings, base, accelerator.num_processes)
        except UserError as error:
            found[1] = str(error)
    resume, problem = broadcast_object_list(found)
    if problem:
        raise UserError(problem)
    return resume


def build_run(
    settings: Settings,
    base: Base,
    rows: TrainingRows | DirectRows,
    accelerator: Accelerator,
    resume: Resume | None = None,
    verbose: bool = True,
) -> Run:
    """Loads the model, computes speaker vectors, changes layers, and (verbose) says what is about to happen.

    Raises:
        UserError: among others, when the rows are not those of the state that is resumed.
    """
    verbose = verbose and accelerator.is_main_process
    state = resume.state() if resume else None
    attention = choose_attention(settings, accelerator.device.type)
    model = load_model(base, attention, device_name(accelerator), keeps_bf16(settings))
    languages = initial_languages(model.talker.model.codec_embedding.weight, base.new_languages)
    references, held_out = find_references_of_rows(settings, base, rows, model, accelerator, state)
    speakers = find_speakers(settings, base, rows, model, state, references)
    replace_and_add_layers(
        model,
        settings.replace_last_n_layers,
        settings.add_new_layers,
        settings.freeze_original_layers,
        verbose=verbose and not settings.lora_rank,
        layer_init=settings.layer_init,
        train_text_embedding=settings.train_text_embedding,
        train_codec_embedding=settings.train_codec_embedding,
        with_adapters=settings.lora_rank > 0,
    )
    if keeps_bf16(settings):
        set_precision(model, base, train_in_bf16=settings.weights_precision == "bf16")
    if settings.weights_precision == "bf16":
        keep_matrices_in_bf16(model)
    if settings.lora_rank:
        add_adapters(model, settings)
        if verbose:
            print_model_summary(model)
    encoder = make_row_encoder(settings, base, speakers)
    objective = make_objective(settings, model, speakers, languages)
    objective.to(accelerator.device)
    check_stages(settings, objective)
    if settings.compile:
        compile_layers(objective)
    train = make_steps(settings, rows, encoder, accelerator, references)
    validation = StepDataset(rows.validation, encoder, references=held_out) if rows.validation else None
    exporter = Exporter(settings, base, model, objective, speakers, accelerator, languages)
    requests = requests_of(settings, base, train, rows.validation, speakers, accelerator)
    parts = (model, speakers, objective, train, validation, exporter, requests)
    run = Run(settings, base, accelerator, *parts, resume=resume, state=state)
    if state:
        check_same_rows(state, run.fingerprints)
    if verbose:
        if isinstance(rows, TrainingRows):
            say_row_notes(rows.train, base, settings)
            say_coverage(rows.train, base, encoder.tokenizer)
            say_long_rows(train.dataset, settings)
            say_order(rows.train, settings)
        say(describe_run(run, attention))
    return run


def keeps_bf16(settings: Settings) -> bool:
    """Whether frozen matrices that are stored in bf16 stay so; FSDP gathers the weights of a layer in one dtype."""
    return settings.mixed_precision == "bf16" and not asks_for_fsdp()


def find_references_of_rows(
    settings: Settings,
    base: Base,
    rows: TrainingRows | DirectRows,
    model: Any,
    accelerator: Accelerator,
    state: State | None,
) -> tuple[References | None, References | None]:
    """The references of the training and the validation rows, where each row has its own (EXPORT_TYPE=base); the main
    process computes what all read.

    Raises:
        UserError: in all processes.
    """
    if settings.export_type != "base" or isinstance(rows, DirectRows):
        return None, None
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        wanted = state.record["data"].get("references") if state else None
        try:
            args = (rows.train, rows.validation, model, base, settings, device_name(accelerator), wanted)
            found[0] = prepare_references(*args)
            say_contexts(load_references(found[0])[0], settings)
        except UserError as error:
            found[1] = str(error)
    folder, problem = broadcast_object_list(found)
    if problem:
        raise UserError(problem)
    return load_references(folder)


def find_speakers(
    settings: Settings,
    base: Base,
    rows: TrainingRows | DirectRows,
    model: Any,
    state: State | None,
    references: References | None,
) -> Speakers:
    """The speakers with their vectors: those of the state, bit for bit, or from their references."""
    if state:
        return Speakers(vectors=state["speakers.vectors"], **state.record["speakers"])
    if isinstance(rows, DirectRows):
        return make_speakers(list(rows.references), lambda _: rows.references, model, base, settings)
    if references is not None:
        return speakers_of(rows.train.distinct("speaker"), references)
    return prepare_speakers(rows.train, model, base, settings)


def make_objective(
    settings: Settings, model: Any, speakers: Speakers, languages: Languages | None
) -> TrainingObjective:
    """The objective over the model's talker, with the vectors that are its own."""
    of_languages = {}
    if languages is not None:
        ids = torch.tensor(list(languages.rows.values()))
        of_languages = {"language_ids": ids, "language_vectors": languages.vectors}
    return TrainingObjective(
        model.talker,
        speakers.vectors,
        settings.gradient_checkpointing,
        train_speakers=settings.speaker_embedding_trainable,
        **of_languages,
    )


def make_steps(
    settings: Settings,
    rows: TrainingRows | DirectRows,
    encoder: RowEncoder,
    accelerator: Accelerator,
    references: References | None = None,
) -> TrainingSteps:
    """This process's steps over the rows."""
    accumulation, max_frames = settings.gradient_accumulation_steps, settings.max_frames_per_batch
    fraction = settings.sub_talker_frame_fraction
    if isinstance(rows, DirectRows):
        return StreamedSteps(rows.stream, encoder, rows.row_format, settings.batch_size, accumulation, fraction)
    dataset = StepDataset(rows.train, encoder, references=references)
    lengths, batch_size = dataset.lengths(), 0 if max_frames else settings.batch_size
    processes, seed = accelerator.num_processes, settings.seed
    order = {
        "balance": make_balance(rows.train, settings),
        "curriculum_epochs": settings.curriculum_epochs if settings.curriculum == "short_first" else 0,
        "own_lengths": rows.train.column("num_codec_frames") if references is not None else None,
    }
    sampler = StepSampler(lengths, batch_size, accumulation, processes, seed, max_frames=max_frames, **order)
    return MappedSteps(dataset, sampler, accelerator.process_index, settings.num_workers, fraction)


def make_balance(rows: Manifest, settings: Settings) -> SpeakerBalance | None:
    """What SPEAKER_BALANCE makes of an epoch; None where it takes every row once."""
    if not settings.speaker_balance:
        return None
    return SpeakerBalance(rows.labels("speaker")[1], settings.speaker_balance, settings.seed)


def make_row_encoder(settings: Settings, base: Base, speakers: Speakers) -> RowEncoder:
    """Row to ids for this base and these speakers."""
    # Stock knows no speakers where it clones.
    dialects = {} if settings.export_type == "base" else base.talker_config.get("spk_is_dialect") or {}
    return RowEncoder(
        tokenizer=load_tokenizer(base.folder),
        ids=LayoutIds.from_config(base.config),
        speaker_index=speakers.index,
        dialects={name: dialect for name, dialect in dialects.items() if dialect},
        uses_instruct=base.model_size != "0b6",
        draws=Draws.from_settings(settings),
    )


def requests_of(
    settings: Settings,
    base: Base,
    train: TrainingSteps,
    validation: Manifest | None,
    speakers: Speakers,
    accelerator: Accelerator,
) -> list[Request]:
    """What the model says every SAMPLE_STEPS; the main process decides for all, as streamed rows are shared out.

    Raises:
        UserError: in all processes.
    """
    found: list[Any] = [[], None]
    if settings.steps_between_samples and accelerator.is_main_process:
        try:
            found[0] = plan_samples(settings, base, train, validation, speakers)
        except UserError as error:
            found[1] = str(error)
        except ValueError as error:  # the file has changed since the start
            found[1] = f"EVAL_TEXTS: {error}"
    requests, problem = broadcast_object_list(found)
    if problem:
        raise UserError(problem)
    return requests


def say_row_notes(rows: Manifest, base: Base, settings: Settings) -> None:
    """Says once what inference would not do with these rows as they stand."""
    unknown = unknown_languages(rows, base.talker_config.get("codec_language_id") or {})
    if unknown:
        known = ", ".join(sorted(base.talker_config.get("codec_language_id") or {}))
        say(f"languages unknown to the base are trained as Auto: {', '.join(unknown)} (it knows {known})")
    if base.model_size == "0b6" and rows.has("instruct").any():
        say("instructions are ignored: stock qwen-tts drops them for 0.6B models")
    elif settings.export_type == "base" and rows.has("instruct").any():
        say("instructions are trained, but generate_voice_clone has no argument for one; it passes on instruct_ids")


def names_of(rows: TrainingRows | DirectRows, base: Base) -> tuple[list[str], list[str]]:
    """Speakers and languages of the training rows; of streamed rows languages only where they are needed."""
    if isinstance(rows, TrainingRows):
        return rows.train.distinct("speaker"), rows.train.distinct("language")
    return list(rows.references), rows.languages() if base.new_languages else []


def check_names(speakers: Sequence[str], languages: Sequence[str], base: Base, settings: Settings) -> None:
    """
    Raises:
        UserError: more new speakers than the codec table has rows, or a language of NEW_LANGUAGES that no row is in: it
            would learn nothing.
    """
    if settings.export_type == "custom_voice":
        known = base.talker_config.get("spk_id") or {}
        allocate_codec_rows(base.config, sum(name.lower() not in known for name in speakers))
    named, known = list(languages), base.talker_config.get("codec_language_id") or {}
    found = {find_language(name, known) for name in named}
    missing = [language.name for language in base.new_languages if language.name not in found]
    if missing:
        raise UserError(
            f"NEW_LANGUAGES: no row is in {missing[0]}; the rows' languages are {', '.join(sorted(named))}. Name it as "
            "the rows do, or name the column of the language in LANGUAGE_COLUMN"
        )


def say_coverage(rows: Manifest, base: Base, tokenizer: Any) -> None:
    """How well the text tokenizer suits each new language."""
    names, languages = rows.labels("language")
    known = base.talker_config.get("codec_language_id") or {}
    for language in base.new_languages:
        places = [place for place, name in enumerate(names) if find_language(name, known) == language.name]
        some = np.flatnonzero(np.isin(languages, places))
        some = some[np.linspace(0, len(some) - 1, min(len(some), MAX_COVERAGE_TEXTS)).astype(int)]
        texts = rows.select(some).column("text")
        say(f"New language {language.name} (id {language.codec_id}): {coverage(tokenizer, texts).describe()}")


def say_long_rows(rows: StepDataset, settings: Settings) -> None:
    """Says how many rows do not fit into MAX_FRAMES_PER_BATCH."""
    max_frames = settings.max_frames_per_batch
    lengths = rows.lengths()
    if max_frames and (num_long := int((lengths > max_frames).sum())):
        say(
            f"{num_long} training rows are longer than MAX_FRAMES_PER_BATCH={max_frames} (the longest has "
            f"{lengths.max()} frames): each is a micro-batch alone"
        )


def say_order(rows: Manifest, settings: Settings) -> None:
    """Says, of several speakers, how many clips each has and how much of an epoch; and what CURRICULUM does."""
    names, speakers = rows.labels("speaker")
    if len(names) > 1:
        say(describe_shares(names, np.bincount(speakers).tolist(), settings.speaker_balance))
    if settings.curriculum == "short_first":
        say(f"CURRICULUM: {settings.curriculum_epochs} epoch(s) with the shortest clips first, then shuffled ones")


def describe_run(run: Run, attention: str) -> str:
    """Rows, speakers, steps and hardware in a few lines."""
    accelerator, settings = run.accelerator, run.settings
    num_validation = len(run.validation) if run.validation else 0
    in_frames = settings.max_frames_per_batch is not None
    speakers = listed_names(
        [
            name if row is None else f"{name} (codec row {row})"
            for name, row in zip(run.speakers.names, run.speakers.codec_rows, strict=True)
        ]
    )
    return "\n".join(
        [
            f"Data: {run.train.describe()}, {num_validation} validation rows",
            f"Speakers: {speakers}",
            f"Device: {accelerator.device} x {accelerator.num_processes}, precision {settings.mixed_precision}, "
            f"attention {attention}",
            f"Steps: {run.num_steps} ({run.train.steps_per_epoch} an epoch, "
            f"{'about ' * in_frames}{run.train.rows_per_step} rows each)",
            describe_batch(settings, accelerator.num_processes),
        ]
        + ([f"Resuming {run.state.folder} after step {run.state.step}"] if run.state else [])
        + describe_choice(settings, run.validation is not None)
    )


def describe_choice(settings: Settings, has_validation: bool) -> list[str]:
    """What ``best/`` follows and when the run may end early, where that is not what everybody expects."""
    chooser = Chooser(settings, has_validation)
    lines = []
    if chooser.follows_training or settings.best_metric != "loss":
        why = "No validation rows: " if chooser.follows_training else ""
        lines.append(f"{why}best/ follows {'the ' * chooser.follows_training}{chooser.text}")
    if patience := settings.early_stopping_patience:
        lines.append(f"Early stopping: after {patience} evaluations in a row without a better {chooser.text}")
    return lines


def describe_batch(settings: Settings, num_processes: int) -> str:
    """The rows or frames of a step and the learning rate, for the whole job."""
    rate, micro_batches = settings.scaled_learning_rate(num_processes), settings.gradient_accumulation_steps
    total, size = f"{settings.rows_per_step(num_processes)} rows", settings.batch_size
    if max_frames := settings.max_frames_per_batch:
        total, size = f"up to {max_frames * micro_batches * num_processes} frames", max_frames
    text = (
        f"Batch: {total} a step = {size} x {micro_batches} micro-batches x {num_processes} process(es); "
        f"learning rate {rate:g}"
    )
    if settings.lr_scaling == "none":
        return text
    return (
        f"{text} ({settings.learning_rate:g} for {settings.lr_scaling_base_batch_size}, {settings.lr_scaling} scaling)"
    )


def walk_once(run: Run) -> None:
    """PREPARE_ONLY: one epoch through the loader, printing the shapes that the model would see."""
    for number, step in enumerate(run.train.steps(0), 1):
        shapes = [f"{tuple(batch['text_ids'].shape)} with {len(batch['codes'])} frames" for batch in step.batches]
        say(f"step {number}: {'; '.join(shapes)}")
    say("PREPARE_ONLY: the data is ready, nothing was trained")


def claim_output_folder(run: Run) -> None:
    """Locks the folder, checks the disk, takes it over or removes the run that is given up, and saves the settings.

    Raises:
        UserError: no space, another run in the folder, or not all processes see it.
    """
    output_dir = run.settings.output_dir
    if run.is_main:
        try:
            _claim_output_folder(run)
        except OSError as error:
            raise UserError(f"OUTPUT_DIR: {output_dir} cannot be written: {error}") from None
    run.accelerator.wait_for_everyone()
    if not (output_dir / "settings.json").is_file():
        raise UserError(
            f"OUTPUT_DIR: {output_dir} must lie on a disk that all machines share; this one does not see it"
        )


def _claim_output_folder(run: Run) -> None:
    settings, output_dir = run.settings, run.settings.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    run.lock = lock_output_folder(output_dir)
    clean_up_leftovers(output_dir)
    if run.resume and not run.resume.folder.is_dir():
        raise UserError(f"RESUME: {run.resume.folder} has been removed meanwhile, by another run; start again")
    if run.resume and run.resume.is_in(output_dir):
        newest = next(iter(find_states(output_dir)), run.resume.folder)
        if settings.resume == "auto" and step_of(newest) > run.state.step and not damage_of_state(newest):
            raise UserError(
                f"OUTPUT_DIR: {newest} was saved meanwhile, by another run; start again to go on from there"
            )
    required = run.exporter.required_bytes() + state_bytes(run.model, settings.ema_decay)
    if not run.is_over:
        check_disk_space(output_dir, required - spare_bytes(run.resume, output_dir))
    if not (run.resume and run.resume.is_in(output_dir)):
        clear_output_folder(settings)
    # First of all: a start that is cut off from here on leaves a folder that the next one knows as its own.
    settings.save(output_dir / "settings.json")
    if run.resume:
        take_over(run.resume, settings)


def spare_bytes(resume: Resume | None, output_dir: Path) -> int:
    """What the run will remove: older states of its own, or the run that it replaces."""
    if resume and resume.is_in(output_dir):
        return sum(map(bytes_of, find_states(output_dir)[1:]))
    return reclaimable_bytes(output_dir)


def discard_rows(settings: Settings) -> None:
    """Removes what ``open_rows`` left, for a run that was refused after it, where there was none before."""
    if run_entries(settings.output_dir):
        return
    (settings.output_dir / LOCK_FILE).unlink(missing_ok=True)
    shutil.rmtree(settings.output_dir / "rows", ignore_errors=True)
    for listed in settings.output_dir.glob("rejected.*.jsonl"):
        listed.unlink()
    remove_empty_folders(settings.output_dir)


def make_tracker(run: Run) -> Tracker:
    """The logs; those of a resumed run are cut back to its state. All processes must call it."""
    logs, progress = run.state.record["logs"] if run.state else None, run.progress
    best_step = progress.best.step if progress.best else None
    facts = describe_for_record(run)
    return Tracker(run.settings, run.num_steps, run.is_main, logs, progress.step, facts, best_step)


def describe_for_record(run: Run) -> dict[str, Any]:
    """What ``run.json`` and the tracking services are told of the run. All processes must call it."""
    now = environment(run.accelerator)
    if not run.is_main:
        return {}
    rows = run.train.dataset.manifest if isinstance(run.train, MappedSteps) else None
    validation = run.validation.manifest if run.validation else None
    # A stream's rows are known one by one as they come.
    train_summary = data_summary(rows) or {"rows": run.train.num_rows, "speakers": list(run.speakers.names)}
    data = {"train": train_summary, "validation": data_summary(validation)}
    try:
        record = record_run(run.settings.output_dir, run.settings.public(), data, now, run.progress.step)
    except OSError as error:
        say(f"warning: run.json cannot be written ({error}); the run goes on without it")
        return {**now, "data": data}
    return {key: value for key, value in record.items() if key != "settings"}


def make_saver(run: Run) -> Saver:
    """Checkpoints and states of this run."""
    speakers = run.speakers
    facts = {
        "settings": run.settings.public(),
        "base": fingerprint_of_base(run.base),
        "data": run.fingerprints,
        "speakers": {
            "names": list(speakers.names),
            "codec_rows": list(speakers.codec_rows),
            "references": [list(references) for references in speakers.references],
        },
    }
    return Saver(run.settings, run.exporter, facts, speakers.vectors)


def make_trainer(run: Run, tracker: Tracker) -> Trainer:
    """The loop, with what it saves, evaluates and logs by, at the point where the run begins."""
    settings = run.settings
    validator = Validator(settings, run.accelerator, run.validation) if run.validation else None
    stepper = Stepper(settings, run.accelerator, run.objective, run.num_steps)
    stepper.prefixes = make_prefix_cache(settings, run.objective, run.accelerator, run.train)
    saver = make_saver(run)
    sampler = make_sampler(run)
    trainer = Trainer(settings, stepper, run.train, validator, saver, tracker, run.num_steps, sampler)
    if run.state:
        say_what_differs(run.state, run.accelerator.num_processes)
        saver.restore(trainer, run.state)
    return trainer


def make_sampler(run: Run) -> Sampler | None:
    """What lets the model speak on its way; None with SAMPLE_STEPS=0, and under FSDP."""
    if not run.requests:
        return None
    if is_sharded(run.objective):
        say(
            "SAMPLE_STEPS: no samples under FSDP: for each of the 16 codes of a frame all processes would gather the "
            "weights of every layer. Listen to checkpoints with synthesize.py; SAMPLE_STEPS=0 silences this"
        )
        return None
    live = LiveModel(run.settings, run.exporter, run.train.encoder, run.accelerator)
    return Sampler(run.settings, run.accelerator, live, run.requests, run.base.codec_folder, make_judge(run))


def make_judge(run: Run) -> Callable[[Sequence[Sample]], dict[str, float]] | None:
    """What measures the samples, on the main process: the base's speaker encoder, what ASR_MODEL and MOS_MODEL name.

    Raises:
        UserError: one of these cannot be loaded.
    """
    if not run.is_main or not run.requests:
        return None
    settings, device, may_download = run.settings, device_name(run.accelerator), run.settings.data_mode != "none"
    encoder, recognize, opinion, rates = voice_encoder(run.model, run.base), None, None, {}
    if settings.asr_model:
        recognize = load_recognizer(settings.asr_model, device, spoken_language(run), may_download)
    if settings.mos_model:
        opinion = load_opinion(settings.mos_model, device, may_download)
    if isinstance(run.train, MappedSteps):
        rates = characters_per_second(run.train.dataset.manifest)
    named = zip(run.speakers.names, run.speakers.vectors, strict=True)
    vectors = {name.lower(): vector.numpy() for name, vector in named}
    encode = None if encoder is None else lambda waveform: voice_vector(encoder, waveform).numpy()
    yardstick = Yardstick(encode, vectors, rates, recognize, opinion)
    return lambda samples: measure([spoken(sample) for sample in samples], yardstick)


def spoken_language(run: Run) -> str | None:
    """Of all that the model says, where it is one."""
    languages = {request.language for request in run.requests}
    return languages.pop() if len(languages) == 1 else None


def spoken(sample: Sample) -> Spoken:
    """A sample as it is measured."""
    return Spoken(sample.text, sample.speaker, sample.waveform, len(sample.codes), sample.stopped)


def train(run: Run) -> None:
    """Trains, and verifies the round trip where the settings ask for it."""
    settings = run.settings
    with contextlib.nullcontext() if run.is_over and not owes_roundtrip(run) else make_tracker(run) as tracker:
        if run.is_over:
            say(describe_complete(run))
        else:
            train_on(run, tracker)
        if tracker and settings.verify_roundtrip and run.is_main:
            verify_roundtrip(run, tracker)


def describe_complete(run: Run) -> str:
    """That nothing is left to train, and what would train on."""
    settings, progress = run.settings, run.progress
    heading = f"This run is complete: {settings.output_dir} holds {run.state.step} steps"
    if progress.is_out_of_patience(settings) and progress.step < run.num_steps:
        return (
            f"{heading}. It was stopped early, after {progress.num_not_better} evaluations in a row without a better "
            f"{Chooser(settings, run.validation is not None).text}; a larger EARLY_STOPPING_PATIENCE, or 0, trains on "
            "(NUM_EPOCHS and MAX_STEPS alone do not); RESUME=never with OVERWRITE_OUTPUT=true starts over"
        )
    return (
        f"{heading}, and nothing is left of its NUM_EPOCHS and MAX_STEPS. More of them train on; RESUME=never with "
        "OVERWRITE_OUTPUT=true starts over"
    )


def train_on(run: Run, tracker: Tracker) -> None:
    """Trains from where the run stands to its end."""
    trainer = make_trainer(run, tracker)
    trainer.run()
    if trainer.progress.num_skipped_rows:
        say(f"{trainer.progress.num_skipped_rows} rows could not be read; they are listed in skipped_rows.jsonl")
    best, last = run.settings.output_dir / "best", run.settings.output_dir / "last"
    if found := trainer.progress.best:
        say(f"Done: {best} ({trainer.chooser.say_best(found)}) and {last} (the end of training)")
    elif best.is_dir():
        say(
            f"Done: {last}. {best} is from before BEST_METRIC={run.settings.best_metric}: no evaluation had that figure"
        )
    else:
        say(f"Done: {last}. There is no {best}: no evaluation had a {trainer.chooser.text} to choose it by")
        best = last
    say(f'Listen: python synthesize.py --checkpoint {best} {how_to_listen(run)}--text "…"')


def how_to_listen(run: Run) -> str:
    """Options of synthesize.py for the form that was trained."""
    settings = run.settings
    layout = "--streaming_layout " if settings.train_layout == "streaming" else ""
    if settings.export_type == "base":
        context = '--ref_text "What I say there." ' if settings.icl_fraction else "--x_vector_only "
        return f"--ref_audio me.wav {context}{layout}"
    num_speakers = len({name.lower() for name in run.speakers.names} | set(run.base.talker_config.get("spk_id") or {}))
    return layout if num_speakers == 1 else f'--speaker "{run.speakers.names[0]}" {layout}'


def owes_roundtrip(run: Run) -> bool:
    """Whether the settings ask for the round trip of a complete run that has none yet."""
    log = run.settings.output_dir / "validation_log.jsonl"
    is_done = log.is_file() and "roundtrip_reproduced" in log.read_text(encoding="utf-8")
    return bool(run.settings.verify_roundtrip) and not is_done


def verify_roundtrip(run: Run, tracker: Tracker) -> None:
    """VERIFY_ROUNDTRIP: stock qwen-tts loads ``last/`` and generates training clips; prints and logs the share."""
    settings = run.settings
    spec = [roundtrip_row(run, row) for row in run.train.rows(settings.verify_roundtrip)]
    count = len(spec)
    device = device_name(run.accelerator)
    if not is_sharded(run.objective):
        run.model.to("cpu")  # makes room on a GPU for the second copy
    if run.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    wav_folder = settings.output_dir / "roundtrip"
    result = judge(str(settings.output_dir / "last"), spec, str(wav_folder), device)
    say(
        f"Round trip: stock qwen-tts gave back {result['reproduced']:.1%} of the codes of {count} training clips; "
        f"{result['right_length']:.0%} stopped at the right frame. Their speech is in {wav_folder}"
    )
    state = json.loads((settings.output_dir / "last" / "training_state.json").read_text(encoding="utf-8"))
    metrics = {"roundtrip_reproduced": result["reproduced"], "roundtrip_right_length": result["right_length"]}
    record = {"step": state["step"], "epoch": state["epoch"], "loss": None, "metrics": metrics}
    tracker.log_result("roundtrip", record)


def roundtrip_row(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    """One training row as ``roundtrip.judge`` takes it: what the row was trained as."""
    encoder: RowEncoder = run.train.encoder
    spec = {
        "text": row["text"],
        "audio_codes": row["codes"].tolist(),
        "language": encoder.language_of(row) or "Auto",
        "instruct": encoder.instruct_of(row),
        "is_streaming": encoder.draws.is_streaming(row),
    }
    if run.settings.export_type == "custom_voice":
        return spec | {"speaker": row["speaker"]}
    if "reference" not in row:  # streamed: one vector stands for the speaker
        return spec | {"ref_audio": run.speakers.references[run.speakers.index[row["speaker"].lower()]][0]}
    context = encoder.reference_of(row)
    return spec | {"ref_audio": row["reference"].file, "ref_text": context.text if context else None}
