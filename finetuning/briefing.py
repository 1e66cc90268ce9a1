"""What a run says of itself before it trains, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetuning.balance import describe_shares
from finetuning.base_model import (
    Base,
)
from finetuning.building import Run
from finetuning.checkpoint import SAMPLES_FOLDER
from finetuning.choosing import Chooser
from finetuning.claiming import bytes_of_samples
from finetuning.console import listed_names, say
from finetuning.dataset import StepDataset, unknown_languages
from finetuning.direct import DirectRows
from finetuning.languages import MAX_COVERAGE_TEXTS, coverage
from finetuning.prompt import find_language
from finetuning.row_index import Manifest
from finetuning.settings import Settings
from finetuning.training_rows import TrainingRows


def brief(run: Run, rows: TrainingRows | DirectRows) -> None:
    """Says what is about to happen, on the main process."""
    if not run.is_main:
        return
    say_speaker_name(run.settings, run.speakers.names)
    if isinstance(rows, TrainingRows):
        say_row_notes(rows.train, run.base, run.settings)
        say_coverage(rows.train, run.base, run.train.encoder.tokenizer)
        say_long_rows(run.train.dataset, run.settings)
        say_order(rows.train, run.settings)
    say(describe_run(run))


def say_speaker_name(settings: Settings, names: Sequence[str]) -> None:
    """Says, where somebody chose SPEAKER_NAME, that rows have names of their own."""
    if settings.is_set("speaker_name") and list(names) != [settings.speaker_name]:
        say(
            f'SPEAKER_NAME "{settings.speaker_name}" is for rows that name no speaker themselves. Speakers that are '
            f"trained: {listed_names(names)}"
        )


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


def describe_run(run: Run) -> str:
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
            f"attention {run.attention}",
            f"Steps: {run.num_steps} ({run.train.steps_per_epoch} an epoch, "
            f"{'about ' * in_frames}{run.train.rows_per_step} rows each)",
            describe_batch(settings, accelerator.num_processes),
        ]
        + ([f"Resuming {run.state.folder} after step {run.state.step}"] if run.state else [])
        + describe_choice(settings, run.validation is not None)
        + describe_samples(run)
    )


def describe_samples(run: Run) -> list[str]:
    """How often samples come and what they take, or which settings are for nothing without them."""
    settings, size = run.settings, bytes_of_samples(run)
    if size:
        copies = " with the trackers' copies" if settings.trackers() else ""
        return [
            f"Samples: {len(run.requests)} every {settings.steps_between_samples} steps and at the end, in all about "
            f"{max(size, 1e5) / 1e6:,.1f} MB{copies}; they stay in {settings.output_dir / SAMPLES_FOLDER}"
        ]
    unused = [name for name in ("EVAL_TEXTS", "ASR_MODEL", "MOS_MODEL") if getattr(settings, name.lower()) is not None]
    if settings.steps_between_samples or not unused:
        return []
    return [f"SAMPLE_STEPS=0: nothing is said while the run trains, so {', '.join(unused)} only matter to evaluate.py"]


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


def how_to_listen(run: Run) -> str:
    """Options of synthesize.py for the form that was trained."""
    settings = run.settings
    layout = "--streaming_layout " if settings.train_layout == "streaming" else ""
    if settings.export_type == "base":
        context = '--ref_text "What I say there." ' if settings.icl_fraction else "--x_vector_only "
        return f"--ref_audio me.wav {context}{layout}"
    num_speakers = len({name.lower() for name in run.speakers.names} | set(run.base.talker_config.get("spk_id") or {}))
    return layout if num_speakers == 1 else f'--speaker "{run.speakers.names[0]}" {layout}'
