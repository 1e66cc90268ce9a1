"""From settings to a run that is ready to train: the steps that train.py, the preflight and other scripts share."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from finetuning.base_model import (
    Base,
    choose_attention,
    choose_device,
    load_model,
    load_tokenizer,
    resolve_base,
)
from finetuning.checkpoint import (
    Exporter,
    check_disk_space,
    check_output_folder,
    clear_output_folder,
    reclaimable_bytes,
)
from finetuning.codec import FRAMES_PER_SECOND
from finetuning.console import say
from finetuning.dataset import RowEncoder, StepDataset, StepSampler, step_loader, unknown_languages
from finetuning.layer_utils import check_layer_count, replace_and_add_layers
from finetuning.manifest import Manifest, RowFormat, remove_empty_folders
from finetuning.objective import TrainingObjective
from finetuning.prompt import LayoutIds, resolve_language
from finetuning.roundtrip import judge
from finetuning.settings import Settings
from finetuning.speakers import Speakers, prepare_speakers
from finetuning.tracking import Tracker
from finetuning.trainer import Trainer, make_accelerator, make_sampler, total_steps
from finetuning.training_rows import TrainingRows, open_training_rows
from finetuning.validation import Validator


@dataclass
class Run:
    """Everything that a run is made of; built by ``build_run``."""

    settings: Settings
    base: Base
    accelerator: Accelerator
    model: Any
    speakers: Speakers
    objective: TrainingObjective
    train: StepDataset
    validation: StepDataset | None
    exporter: Exporter

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def sampler(self) -> StepSampler:
        return make_sampler(self.settings, self.train, self.accelerator.num_processes)

    @property
    def num_steps(self) -> int:
        return total_steps(self.settings, self.sampler)


def check_inputs(settings: Settings) -> tuple[Base, str]:
    """What can be checked in seconds: hardware, base, output folder. Returns the base and the device."""
    device = choose_device(settings)
    base = resolve_base(settings)
    if not settings.prepare_only:
        check_output_folder(settings, base)
    check_layer_count(settings.replace_last_n_layers, base.talker_config["num_hidden_layers"])
    return base, device


def start(settings: Settings, device: str) -> Accelerator:
    """The process's Accelerator, with all random generators seeded."""
    accelerator = make_accelerator(settings, device)
    set_seed(settings.seed)
    if not settings.freeze_speaker_encoder and accelerator.is_main_process:
        say("FREEZE_SPEAKER_ENCODER=false: the encoder is read before training and never trained by this tool")
    return accelerator


def device_name(accelerator: Accelerator) -> str:
    """This process's device; the CPU without its index, which safetensors takes for a GPU's."""
    return "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)


def open_rows(settings: Settings, base: Base, accelerator: Accelerator) -> TrainingRows:
    """The rows with codes; one process encodes and indexes, the others read its result."""
    with accelerator.main_process_first():
        row_format = RowFormat.from_settings(settings, base.special_tokens())
        device = device_name(accelerator)
        return open_training_rows(settings, base.codec_folder, row_format, device, build=accelerator.is_main_process)


def build_run(
    settings: Settings, base: Base, rows: TrainingRows, accelerator: Accelerator, verbose: bool = True
) -> Run:
    """Loads the model, computes speaker vectors, changes layers, and (verbose) says what is about to happen."""
    verbose = verbose and accelerator.is_main_process
    attention = choose_attention(settings, accelerator.device.type)
    model = load_model(base, attention, device=device_name(accelerator))
    speakers = prepare_speakers(rows.train, model, base, settings)
    replace_and_add_layers(
        model,
        settings.replace_last_n_layers,
        settings.add_new_layers,
        settings.freeze_original_layers,
        verbose=verbose,
        layer_init=settings.layer_init,
    )
    encoder = make_row_encoder(base, speakers)
    objective = TrainingObjective(model.talker, speakers.vectors).to(accelerator.device)
    train = StepDataset(rows.train, encoder)
    validation = StepDataset(rows.validation, encoder) if rows.validation else None
    exporter = Exporter(settings, base, model, speakers)
    run = Run(settings, base, accelerator, model, speakers, objective, train, validation, exporter)
    if verbose:
        say_row_notes(rows.train, base)
        say(describe_run(run, attention))
    return run


def make_row_encoder(base: Base, speakers: Speakers) -> RowEncoder:
    """Row to ids for this base and these speakers."""
    dialects = base.talker_config.get("spk_is_dialect") or {}
    return RowEncoder(
        tokenizer=load_tokenizer(base.folder),
        ids=LayoutIds.from_config(base.config),
        speaker_index=speakers.index,
        dialects={name: dialect for name, dialect in dialects.items() if dialect},
        uses_instruct=base.model_size != "0b6",
    )


def say_row_notes(rows: Manifest, base: Base) -> None:
    """Says once what inference would not do with these rows as they stand."""
    unknown = unknown_languages(rows, base.talker_config.get("codec_language_id") or {})
    if unknown:
        known = ", ".join(sorted(base.talker_config.get("codec_language_id") or {}))
        say(f"languages unknown to the base are trained as Auto: {', '.join(unknown)} (it knows {known})")
    if base.model_size == "0b6" and any(rows.column("instruct")):
        say("instructions are ignored: stock qwen-tts drops them for 0.6B models")


def describe_run(run: Run, attention: str) -> str:
    """Rows, speakers, steps and hardware in a few lines."""
    accelerator, settings, sampler = run.accelerator, run.settings, run.sampler
    minutes = run.train.manifest.column("num_codec_frames").sum() / FRAMES_PER_SECOND / 60
    num_validation = len(run.validation) if run.validation else 0
    speakers = ", ".join(
        f"{name} (codec row {row})" for name, row in zip(run.speakers.names, run.speakers.codec_rows, strict=True)
    )
    return "\n".join(
        [
            f"Data: {len(run.train)} training rows ({minutes:.1f} min), {num_validation} validation rows",
            f"Speakers: {speakers}",
            f"Device: {accelerator.device} x {accelerator.num_processes}, precision {settings.mixed_precision}, "
            f"attention {attention}",
            f"Steps: {run.num_steps} ({sampler.steps_per_epoch} an epoch, {sampler.rows_per_step} rows each)",
        ]
        + ([] if run.validation else ["No validation rows: best/ follows the mean training loss of an epoch"])
    )


def walk_once(run: Run) -> None:
    """PREPARE_ONLY: one epoch through the loader, printing the shapes that the model would see."""
    plans = run.sampler.epoch_plan(0, run.accelerator.process_index)
    for number, step in enumerate(step_loader(run.train, plans, run.settings.num_workers), 1):
        shapes = [f"{tuple(batch['text_ids'].shape)} with {len(batch['codes'])} frames" for batch in step]
        say(f"step {number}: {'; '.join(shapes)}")
    say("PREPARE_ONLY: the data is ready, nothing was trained")


def claim_output_folder(run: Run) -> None:
    """Checks the disk, removes the run that OVERWRITE_OUTPUT gives up, and saves the settings."""
    if run.is_main:
        output_dir = run.settings.output_dir
        check_disk_space(output_dir, run.exporter.required_bytes() - reclaimable_bytes(output_dir))
        clear_output_folder(run.settings)
        output_dir.mkdir(parents=True, exist_ok=True)
        run.settings.save(output_dir / "settings.json")
    run.accelerator.wait_for_everyone()


def discard_rows(settings: Settings) -> None:
    """Removes what ``open_rows`` left, for a run that was refused after it."""
    shutil.rmtree(settings.output_dir / "rows", ignore_errors=True)
    for listed in settings.output_dir.glob("rejected.*.jsonl"):
        listed.unlink()
    remove_empty_folders(settings.output_dir)


def make_trainer(run: Run, tracker: Tracker) -> Trainer:
    """The loop, with what it saves, evaluates and logs by."""
    validator = Validator(run.settings, run.accelerator, run.validation) if run.validation else None
    return Trainer(run.settings, run.accelerator, run.objective, run.train, validator, run.exporter, tracker)


def train(run: Run) -> None:
    """Trains, and verifies the round trip where the settings ask for it."""
    with Tracker(run.settings, run.num_steps, run.is_main) as tracker:
        trainer = make_trainer(run, tracker)
        trainer.run()
        best, last = run.settings.output_dir / "best", run.settings.output_dir / "last"
        say(f"Done: {best} (lowest {trainer.best_by}) and {last} (the end of training)")
        say(f'Listen: python synthesize.py --checkpoint {best} --text "…"')
        if run.settings.verify_roundtrip and run.is_main:
            verify_roundtrip(run, tracker)


def verify_roundtrip(run: Run, tracker: Tracker) -> None:
    """VERIFY_ROUNDTRIP: stock qwen-tts loads ``last/`` and generates training clips; prints and logs the share."""
    settings = run.settings
    count = min(settings.verify_roundtrip, len(run.train))
    spec = [roundtrip_row(run, index) for index in range(count)]
    device = device_name(run.accelerator)
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


def roundtrip_row(run: Run, index: int) -> dict[str, Any]:
    """One training row as ``roundtrip.judge`` takes it: what the row was trained as."""
    row = run.train.manifest[index]
    languages = run.base.talker_config.get("codec_language_id") or {}
    try:
        language = resolve_language(row["language"], languages) or "Auto"
    except KeyError:
        language = "Auto"
    instruct = row["instruct"] if run.train.encoder.uses_instruct else None
    codes = row["codes"].tolist()
    return {
        "text": row["text"],
        "audio_codes": codes,
        "speaker": row["speaker"],
        "language": language,
        "instruct": instruct,
    }
