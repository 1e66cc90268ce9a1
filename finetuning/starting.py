"""What settings, machine, base and rows must be for a run to begin; the preflight asks the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed

from finetuning.base_model import (
    Base,
    choose_device,
    resolve_base,
)
from finetuning.check_rows import check_at_start
from finetuning.checkpoint import (
    check_output_folder,
)
from finetuning.codec_rows import allocate_codec_rows
from finetuning.comparison import rows_to_compare
from finetuning.console import say
from finetuning.direct import DirectData, DirectRows
from finetuning.errors import UserError
from finetuning.hub import OutOfReach, check_access
from finetuning.layer_utils import check_layer_count
from finetuning.manifest import RowFormat
from finetuning.memory import pick_for_memory, weights_of
from finetuning.metrics import METRICS
from finetuning.objective import check_compiler
from finetuning.optimizers import check_optimizer
from finetuning.prefix_cache import check_prefix_cache
from finetuning.preparer import prepare_missing_rows
from finetuning.processes import Processes
from finetuning.prompt import find_language
from finetuning.recognition import check_judges, judge_bytes
from finetuning.resume import (
    Resume,
    begin_or_resume,
)
from finetuning.samples import check_eval_texts
from finetuning.settings import Settings
from finetuning.sharding import asks_for_fsdp
from finetuning.stages import check_stages_of_base
from finetuning.trainer import make_accelerator
from finetuning.training_rows import TrainingRows, open_training_rows


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
    if settings.compare_jsonl:
        rows_to_compare(settings, base)
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


def check_upload(settings: Settings) -> None:
    """UPLOAD_TO_HUB: whether the Hub is going to take the checkpoints. One that cannot be reached now may be at the
    end of the run, so that is only said.

    Raises:
        UserError: no token, or one that may not write there.
    """
    repositories = settings.repositories()
    if not repositories:
        if settings.hub_model_id_best or settings.hub_model_id_last:
            say(
                "UPLOAD_TO_HUB is false: nothing is sent to the repositories of HUB_MODEL_ID_BEST and HUB_MODEL_ID_LAST"
            )
        return
    try:
        say(f"Hub: {'; '.join(check_access(repositories, settings.hub_private))}")
    except OutOfReach as error:
        say(f"warning: UPLOAD_TO_HUB: {error}. The run begins all the same, and tries it when it has something to send")


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
    beside = bytes_beside(settings, base) if settings.memory_profile else 0
    picks = pick_for_memory(settings, base, gpu_bytes, accelerator.num_processes, beside)
    if accelerator.is_main_process and settings.memory_profile:
        say(picks.message if picks else f"MEMORY_PROFILE=auto picks nothing on {device.type}: it is for GPUs")
    return picks.settings if picks else settings


def bytes_beside(settings: Settings, base: Base) -> int:
    """Of what comes to the GPU between the steps, for samples: the codec, and after it the judges."""
    if not settings.steps_between_samples or asks_for_fsdp():
        return 0
    codec = sum(file.stat().st_size for file in base.codec_folder.glob("*.safetensors"))
    return max(codec, judge_bytes(settings))


def device_name(accelerator: Accelerator) -> str:
    """This process's device; the CPU without its index, which safetensors takes for a GPU's."""
    return "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)


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
