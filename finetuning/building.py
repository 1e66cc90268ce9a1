"""The run as a whole: model, speakers, objective, steps and exporter, built of settings, base and rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from finetuning.adapters import add_adapters
from finetuning.balance import SpeakerBalance
from finetuning.base_model import (
    Base,
    choose_attention,
    load_model,
    load_tokenizer,
    set_precision,
    voice_encoder,
)
from finetuning.checkpoint import (
    Exporter,
)
from finetuning.comparison import check_speakers as check_compared_speakers
from finetuning.dataset import RowEncoder, StepDataset
from finetuning.direct import DirectRows
from finetuning.draws import Draws
from finetuning.errors import UserError
from finetuning.judging import Judge
from finetuning.languages import Languages, initial_languages
from finetuning.layer_utils import print_model_summary, replace_and_add_layers
from finetuning.listening import characters_per_second
from finetuning.objective import TrainingObjective, compile_layers
from finetuning.optimizers import keep_matrices_in_bf16
from finetuning.progress import Progress, total_steps
from finetuning.prompt import LayoutIds
from finetuning.recognition import load_opinion, load_recognizer
from finetuning.references import References, load_references, prepare_references, say_contexts, speakers_of
from finetuning.resume import (
    Resume,
    check_same_rows,
)
from finetuning.row_index import Manifest
from finetuning.run_record import data_summary
from finetuning.samples import plan_samples
from finetuning.sampling import StepSampler
from finetuning.settings import Settings
from finetuning.sharding import asks_for_fsdp
from finetuning.speakers import Speakers, make_speakers, prepare_speakers
from finetuning.speaking import Request, leaving_no_cache
from finetuning.stages import check_stages
from finetuning.starting import device_name
from finetuning.state import State
from finetuning.steps import MappedSteps, StreamedSteps, TrainingSteps
from finetuning.training_rows import TrainingRows


@dataclass
class Run:
    """Everything that a run is made of; built by ``build_run``.

    Attributes:
        requests: what the model says on its way; [] with SAMPLE_STEPS=0.
        data: what the rows are; see ``describe_data``.
        judge: of what it says.
        state: that it goes on from; None when it begins at the beginning.
        lock: see ``lock_output_folder``.
    """

    settings: Settings
    base: Base
    accelerator: Accelerator
    model: Any
    attention: str
    speakers: Speakers
    objective: TrainingObjective
    train: TrainingSteps
    validation: StepDataset | None
    exporter: Exporter
    requests: list[Request]
    data: dict[str, Any]
    judge: Judge | None = None
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


def build_run(
    settings: Settings,
    base: Base,
    rows: TrainingRows | DirectRows,
    accelerator: Accelerator,
    resume: Resume | None = None,
    verbose: bool = True,
) -> Run:
    """Loads the model, computes speaker vectors, changes layers, and (verbose) says what trains.

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
    check_compared_speakers(settings, base, speakers.names)
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
    data = describe_data(train, validation, speakers) if accelerator.is_main_process else {}
    exporter = Exporter(settings, base, model, objective, speakers, accelerator, languages, data)
    requests = requests_of(settings, base, train, rows.validation, speakers, accelerator)
    parts = (model, attention, speakers, objective, train, validation, exporter, requests, data)
    run = Run(settings, base, accelerator, *parts, resume=resume, state=state)
    if state:
        check_same_rows(state, run.fingerprints)
    run.judge = find_judge(run)
    return run


def describe_data(train: TrainingSteps, validation: StepDataset | None, speakers: Speakers) -> dict[str, Any]:
    """``train`` and ``validation`` as ``run_record.data_summary`` has them; of a stream, whose rows are known one by
    one as they come, their number and the speakers."""
    rows = train.dataset.manifest if isinstance(train, MappedSteps) else None
    summary = data_summary(rows) or {"rows": train.num_rows, "speakers": list(speakers.names)}
    return {"train": summary, "validation": data_summary(validation.manifest if validation else None)}


def find_judge(run: Run) -> Judge | None:
    """What measures the samples, on the main process; None where nothing is going to be said.

    Raises:
        UserError: in all processes: what ASR_MODEL or MOS_MODEL names cannot be loaded.
    """
    if run.is_over or not run.requests or asks_for_fsdp():
        return None
    judge, problem = None, None
    if run.is_main:
        try:
            judge = _load_judge(run)
        except UserError as error:
            problem = str(error)
    if problem := broadcast_object_list([problem])[0]:
        raise UserError(problem)
    return judge


def _load_judge(run: Run) -> Judge:
    """What measures the samples."""
    settings, device, may_download = run.settings, device_name(run.accelerator), run.settings.data_mode != "none"
    recognize, opinion, rates = None, None, {}
    if settings.asr_model:
        recognize = load_recognizer(settings.asr_model, device, spoken_language(run), may_download)
    if settings.mos_model:
        opinion = load_opinion(settings.mos_model, device, may_download)
    if isinstance(run.train, MappedSteps):
        rates = characters_per_second(run.train.dataset.manifest)
    named = zip(run.speakers.names, run.speakers.vectors, strict=True)
    vectors = {name.lower(): vector.numpy() for name, vector in named}
    with leaving_no_cache(run.accelerator.device):
        return Judge(device, voice_encoder(run.model, run.base), vectors, rates, recognize, opinion)


def spoken_language(run: Run) -> str | None:
    """Of all that the model says, where it is one."""
    languages = {request.language for request in run.requests}
    return languages.pop() if len(languages) == 1 else None


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
