"""A run that is built trains: its logs, checkpoints and samples, and at the end the round trip."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import torch

from finetuning.briefing import describe_complete, how_to_listen
from finetuning.building import Run
from finetuning.checkpoint import step_of_best
from finetuning.comparison import Comparison, compare, is_compared, rows_to_compare, table
from finetuning.console import command_of, say
from finetuning.dataset import RowEncoder
from finetuning.errors import part_from_the_others
from finetuning.prefix_cache import make_prefix_cache
from finetuning.resume import (
    fingerprint_of_base,
    say_what_differs,
)
from finetuning.roundtrip import judge
from finetuning.run_record import environment, record_run
from finetuning.samples import Sampler, yardsticks_of
from finetuning.saving import Saver
from finetuning.settings import Settings
from finetuning.sharding import is_sharded
from finetuning.speaking import LiveModel, generation_defaults
from finetuning.starting import device_name
from finetuning.stepping import Stepper
from finetuning.tracking import Tracker
from finetuning.trainer import Trainer
from finetuning.uploads import Uploader
from finetuning.validation import Validator


def walk_once(run: Run) -> None:
    """PREPARE_ONLY: one epoch through the loader, printing the shapes that the model would see."""
    for number, step in enumerate(run.train.steps(0), 1):
        shapes = [f"{tuple(batch['text_ids'].shape)} with {len(batch['codes'])} frames" for batch in step.batches]
        say(f"step {number}: {'; '.join(shapes)}")
    say("PREPARE_ONLY: the data is ready, nothing was trained")


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
    try:
        record = record_run(run.settings.output_dir, run.settings.public(), run.data, now, run.progress.step)
    except OSError as error:
        say(f"warning: run.json cannot be written ({error}); the run goes on without it")
        return {**now, "data": run.data}
    return {key: value for key, value in record.items() if key != "settings"}


def make_saver(run: Run, uploader: Uploader | None = None) -> Saver:
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
    more = {"tell_saved": uploader.offer, "make_room": uploader.make_room} if uploader else {}
    return Saver(run.settings, run.exporter, facts, speakers.vectors, **more)


def make_trainer(run: Run, tracker: Tracker, uploader: Uploader | None = None) -> Trainer:
    """The loop, with what it saves, evaluates and logs by, at the point where the run begins."""
    settings = run.settings
    validator = Validator(settings, run.accelerator, run.validation) if run.validation else None
    stepper = Stepper(settings, run.accelerator, run.objective, run.num_steps)
    stepper.prefixes = make_prefix_cache(settings, run.objective, run.accelerator, run.train)
    saver = make_saver(run, uploader)
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
    settings, accelerator, requests = run.settings, run.accelerator, run.requests
    live = LiveModel(settings, run.exporter, run.train.encoder, accelerator)
    yardsticks = yardsticks_of(settings, requests, generation_defaults(run.exporter))
    return Sampler(settings, accelerator, live, requests, run.base.codec_folder, yardsticks, run.judge)


def train(run: Run) -> None:
    """Trains, verifies the round trip and sends the checkpoints to the Hub, where the settings ask for it."""
    with Uploader(run.settings) if run.is_main else contextlib.nullcontext() as uploader:
        train_and_verify(run, uploader)
        if run.settings.repositories():
            part_from_the_others()  # who need not wait for hours of uploading
        if uploader:
            uploader.finish()


def train_and_verify(run: Run, uploader: Uploader | None) -> None:
    """Trains, with what belongs to it, where anything is left of it."""
    settings = run.settings
    with contextlib.nullcontext() if run.is_over and not owes_roundtrip(run) else make_tracker(run) as tracker:
        if run.is_over:
            say(describe_complete(run))
        else:
            train_on(run, tracker, uploader)
        if tracker and settings.verify_roundtrip and run.is_main:
            verify_roundtrip(run, tracker)
    if settings.compare_jsonl and run.is_main:
        compare_with_recordings(run)


def train_on(run: Run, tracker: Tracker, uploader: Uploader | None) -> None:
    """Trains from where the run stands to its end."""
    trainer = make_trainer(run, tracker, uploader)
    trainer.run()
    if trainer.progress.num_skipped_rows:
        say(f"{trainer.progress.num_skipped_rows} rows could not be read; they are listed in skipped_rows.jsonl")
    best, last = run.settings.output_dir / "best", run.settings.output_dir / "last"
    say(f"Done: {last} (the end of training). {describe_best(run.settings, trainer)}")
    best = best if best.is_dir() else last
    say(f'Listen: {command_of("synthesize.py")} --checkpoint {best} {how_to_listen(run)}--text "…"')


def describe_best(settings: Settings, trainer: Trainer) -> str:
    """What ``best/`` holds at the end, or why there is none."""
    best, found, chooser = settings.output_dir / "best", trainer.progress.best, trainer.chooser
    step = step_of_best(settings.output_dir)
    if not best.is_dir():
        return f"There is no {best}: no evaluation had a {chooser.text} to choose it by"
    if found is None:
        return f"{best} (step {step}) is from before BEST_METRIC={settings.best_metric}: no evaluation had that figure"
    if found.step not in (None, step):
        return (
            f"{best} is of step {step}, from before the run was set back: no evaluation since was better than the "
            f"{chooser.say_best(found)}, whose checkpoint it had replaced"
        )
    return f"{best} is the best one ({chooser.say_best(found)})"


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
    make_room(run)
    wav_folder = settings.output_dir / "roundtrip"
    result = judge(str(settings.output_dir / "last"), spec, str(wav_folder), device)
    say(
        f"Round trip: stock qwen-tts gave back {result['reproduced']:.1%} of the codes of {count} training clips; "
        f"{result['right_length']:.0%} stopped at the right frame. Their speech is in {wav_folder}"
    )
    state = json.loads((settings.output_dir / "last" / "training_state.json").read_text(encoding="utf-8"))
    metrics = {"roundtrip_reproduced": result["reproduced"], "roundtrip_right_length": result["right_length"]}
    record = {"step": state["step"], "epoch": state["epoch"], "loss": None, "metrics": metrics}
    tracker.log_result(record)


def compare_with_recordings(run: Run) -> None:
    """COMPARE_JSONL: sentences before and after the training beside their recordings; prints the table."""
    output = run.settings.output_dir
    names = zip(run.speakers.names, run.speakers.references, strict=True)
    references = {name.lower(): files[0] for name, files in names if files}
    checkpoint = output / "best" if (output / "best").is_dir() else output / "last"
    comparison = Comparison(run.settings, run.base, checkpoint, references, device_name(run.accelerator))
    if is_compared(comparison):
        return
    make_room(run)
    rows = rows_to_compare(run.settings, run.base)
    figures = compare(comparison, rows)
    say(
        f"{len(rows)} sentences that were never trained on, against their recordings (docs/results.md says what each "
        f"figure means); before is the base, which clones, after is {checkpoint}:\n{table(figures)}\n"
        f"Listen: {comparison.folder}"
    )


def make_room(run: Run) -> None:
    """Takes the trained model off the GPU, where another copy is to speak."""
    if not is_sharded(run.objective):
        run.model.to("cpu")
    if run.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


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
