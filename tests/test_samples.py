"""Samples: the model on its way says what stock says from its checkpoint, and training does not notice."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from reference import load_stock
from safetensors.torch import load_file
from training import FULL, build, make_trainer, train

from finetuning import samples, starting
from finetuning.audio import SAMPLE_RATE_HZ
from finetuning.base_model import resolve_base
from finetuning.briefing import describe_samples
from finetuning.checkpoint import clear_output_folder, run_entries
from finetuning.errors import Stopped, UserError
from finetuning.metrics import METRICS
from finetuning.samples import (
    SAMPLE_SPEAKERS,
    Judged,
    Sample,
    figures_of,
    plan_samples,
    samples_bytes,
    yardsticks_of,
)
from finetuning.settings import load_settings
from finetuning.speakers import Speakers
from finetuning.speaking import LiveModel, Request
from finetuning.state import State, find_states
from finetuning.tracking import Tracker

pytestmark = pytest.mark.usefixtures("one_thread")

#: Figures of a log line that depend on the clock.
CLOCK = ("timestamp", "frames_per_second", "seconds_left")
OF_SAMPLES = ("eos_rate", "sample_seconds", "num_samples", "yardsticks")
TEXTS = "Yes.|No, I am late."
LAYERS = {"replace_last_n_layers": 1, "add_new_layers": 1, "freeze_original_layers": True}
#: Four steps each, in two epochs.
FIELDS = {
    "device": "cpu", "mixed_precision": "no", "init_model_path": "tiny-random", "use_wandb": False,
    "batch_size": 2, "gradient_accumulation_steps": 1, "num_epochs": 2, "logging_steps": 1, "save_steps": 99,
    "learning_rate": 1e-3, "warmup_steps": 0, "eval_steps": 3, "eval_texts": TEXTS, "resume": "auto",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "vectors": FULL | {"new_languages": "hausa", "speaker_embedding_trainable": True},
    "average": LAYERS | {"ema_decay": 0.5, "train_layout": "streaming"},
    "adapters": {"lora_rank": 4, "lora_dropout": 0.3, "lora_export_scale": 0.5, "replace_last_n_layers": 1},
    "cloning": FULL | {"export_type": "base", "icl_fraction": 0.5},
}


@pytest.fixture(scope="module")
def rows(demo_rows: list[dict]) -> list[dict]:
    """Short ones in a language that the base does not know, the references with their texts."""
    own = {"language": "Hausa", "ref_text": "What the reference says."}
    short = sorted(demo_rows, key=lambda row: len(row["audio_codes"]))
    return [row | own | {"audio_codes": row["audio_codes"][:20]} for row in short[:6]]


@pytest.fixture(scope="module", autouse=True)
def short_speech() -> Any:
    """A model that has learnt nothing does not stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "SPARE_FRAMES", 4)
        yield


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> Callable[..., Any]:
    """Settings of a run in a folder of its own."""
    data = tmp_path_factory.mktemp("data")
    for name, some in (("train", rows[:4]), ("validation", rows[4:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")

    def settings(**fields: Any) -> Any:
        files = {f"{name}_jsonl": str(data / f"{name}.jsonl") for name in ("train", "validation")}
        own = {"output_dir": str(tmp_path_factory.mktemp("output")), "data_check": "off"}
        return load_settings(FIELDS | files | own | fields, environment={})

    return settings


def judge(found: list[Sample], _: Callable) -> Judged:
    """Draws from every generator, as a recogniser might."""
    assert all(sample.file.is_file() for sample in found)
    draws = random.random(), np.random.rand(), torch.rand(())
    return Judged({"wer": 0.25 + 0 * sum(float(draw) for draw in draws)}, frozenset({"wer"}))


def trained(settings: Any) -> Any:
    trainer = make_trainer(build(settings))
    if trainer.sampler:
        trainer.sampler.judge = judge
    trainer.run()
    return trainer


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, make: Callable) -> SimpleNamespace:
    """The same run without samples and with them, after every other step."""
    silent, speaking = (trained(make(sample_steps=every, **CASES[request.param])) for every in (0, 2))
    return SimpleNamespace(case=request.param, silent=silent, speaking=speaking)


def log_of(trainer: Any, name: str) -> list[dict]:
    return [json.loads(line) for line in (trainer.settings.output_dir / name).read_text().splitlines()]


def without(record: dict, *names: str) -> dict:
    return {key: value for key, value in record.items() if key not in names}


def listed(trainer: Any, step: int) -> list[dict]:
    return json.loads((trainer.settings.output_dir / "samples" / f"step-{step}" / "samples.json").read_text())


# ---------------------------------------------------------------------------------------- what training notices of it


METRICS_OF_SAMPLES = [name for name, metric in METRICS.items() if metric.is_of_samples]


def test_training_is_bit_for_bit_the_same(pair: SimpleNamespace) -> None:
    """Weights, average, optimizer, sums and random states; checkpoints; logs but for the samples' own figures."""
    silent, speaking = pair.silent, pair.speaking
    states = [State(find_states(trainer.settings.output_dir)[0]) for trainer in (silent, speaking)]
    assert states[0].names("") == states[1].names("") and len(states[0].names("process.0.")) > 8
    assert not [name for name in states[0].names("") if not same_bits(states[0][name], states[1][name])]
    for name in ("last", "best"):
        weights = [load_file(one.settings.output_dir / name / "model.safetensors") for one in (silent, speaking)]
        assert not [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])]
    logs = [[without(record, *CLOCK) for record in log_of(one, "training_log.jsonl")] for one in (silent, speaking)]
    assert logs[0] == logs[1]
    validation = [log_of(one, "validation_log.jsonl") for one in (silent, speaking)]
    for record in (record for log in validation for record in log):
        record.pop("timestamp")
        record["metrics"] = without(record["metrics"], *OF_SAMPLES, "wer")
    assert validation[0] == validation[1]
    progress = [without(state.record["progress"], "sampled_at") for state in states]
    for one in progress:  # what best/ had, of samples too
        figures = without(one["best"]["figures"], *METRICS_OF_SAMPLES)
        one["best"] = one["best"] | {"figures": figures, "yardsticks": {}}
    assert progress[0] == progress[1]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


def test_the_model_is_left_as_it_was(pair: SimpleNamespace) -> None:
    silent, speaking = (trainer.saver.exporter.model for trainer in (pair.silent, pair.speaking))
    for (name, one), (_, other) in zip(silent.talker.named_modules(), speaking.talker.named_modules(), strict=True):
        assert one.training == other.training, name
        assert not other._forward_hooks and getattr(one, "scaling", None) == getattr(other, "scaling", None)
    configs = [model.config.talker_config for model in (silent, speaking)]
    for key in ("spk_id", "spk_is_dialect", "codec_language_id"):
        assert getattr(configs[0], key) == getattr(configs[1], key)
    assert speaking.talker.rope_deltas is None
    gradients = [[p.requires_grad for p in model.parameters()] for model in (silent, speaking)]
    assert gradients[0] == gradients[1]


# -------------------------------------------------------------------------------------------------- what is said


def test_stock_says_the_same_from_the_checkpoint(pair: SimpleNamespace) -> None:
    """Codes and speech, with the same seed and otherwise its defaults."""
    trainer = pair.speaking
    requests, found = trainer.sampler.requests, listed(trainer, 4)
    stock, seen = load_stock(trainer.settings.output_dir / "last"), []
    generate = stock.model.generate

    def noted(**options: Any) -> Any:
        options["max_new_tokens"] = wanted.max_frames + 2
        seen.append(generate(**options))
        return seen[-1]

    stock.model.generate = noted
    assert len(found) == len(requests) == (4 if pair.case == "cloning" else 2)
    for wanted, sample in zip(requests, found, strict=True):
        torch.manual_seed(sample["seed"])
        (waveform,), rate = say_with(stock, wanted, sample)
        codes = seen[-1][0][0].numpy()
        assert (len(codes), rate) == (sample["num_codec_frames"], SAMPLE_RATE_HZ)
        assert sample["stopped"] == (len(codes) <= wanted.max_frames)
        spoken, _ = soundfile.read(trainer.settings.output_dir / "samples" / "step-4" / sample["file"])
        assert len(spoken) == len(waveform)
        # Other codes would give another wave; a wav has 16 bits.
        np.testing.assert_allclose(spoken, np.clip(waveform, -1, 1), atol=1e-4)


def say_with(stock: Any, wanted: Any, sample: dict) -> Any:
    named = {"language": sample["language"]}
    if wanted.reference is None:
        streams = {"non_streaming_mode": False} if stock.model.config.talker_config.num_hidden_layers == 5 else {}
        return stock.generate_custom_voice(sample["text"], sample["speaker"], **named, **streams)
    kind = {"ref_text": wanted.reference.text} if sample["in_context"] else {"x_vector_only_mode": True}
    layout = {"non_streaming_mode": True}  # in which it was trained
    return stock.generate_voice_clone(sample["text"], ref_audio=wanted.reference.file, **named, **kind, **layout)


def test_what_is_kept(pair: SimpleNamespace) -> None:
    trainer = pair.speaking
    folder = trainer.settings.output_dir / "samples"
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-2", "step-4"]
    first = listed(trainer, 2)[0]
    assert first["file"] == "01-reference_speaker.wav" and first["text"] == "Yes." and first["seed"] == 42
    assert first["language"] == ("hausa" if pair.case == "vectors" else "Auto")
    assert first["seconds"] == pytest.approx(first["num_codec_frames"] / 12.5, abs=0.05)
    assert [one["in_context"] for one in listed(trainer, 2)] == (
        [False, True] * 2 if pair.case == "cloning" else [False] * 2
    )
    records = {record["step"]: record["metrics"] for record in log_of(trainer, "validation_log.jsonl")}
    assert list(records) == [2, 3, 4] and "eos_rate" not in records[3]  # with the evaluations of both epochs' ends
    for step in (2, 4):
        assert records[step]["num_samples"] == len(listed(trainer, step)) and records[step]["wer"] == 0.25
        known = {name: trainer.chooser.yardsticks[name] for name in ("eos_rate", "wer")}
        assert records[step]["yardsticks"] == known
        assert records[step]["accuracy"] >= 0


def test_the_adapters_speak_scaled(make: Callable) -> None:
    """By LORA_EXPORT_SCALE, inside alone."""
    trainer = make_trainer(build(make(sample_steps=9, **CASES["adapters"])))
    parts = [part for part in trainer.stepper.module.modules() if hasattr(part, "lora_A")]
    with trainer.sampler.live.ready():
        assert {part.scaling["default"] for part in parts} == {0.5 * 16 / 4}
    assert {part.scaling["default"] for part in parts} == {16 / 4}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_same_seed_gives_the_same_speech(make: Callable, precision: str) -> None:
    """And another place among the requests makes no difference, nor does what was drawn before."""
    trainer = make_trainer(build(make(sample_steps=9, mixed_precision=precision, **LAYERS)))
    live, first = trainer.sampler.live, trainer.sampler.requests[0]
    with live.ready():
        torch.rand(3)
        found = [live.say(one).codes for one in (first, trainer.sampler.requests[1], first)]
    assert np.array_equal(found[0], found[2]) and not np.array_equal(found[0][:5], found[1][:5])


# ------------------------------------------------------------------------------------------------ when it goes wrong


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_in_a_sample(trainer: Any) -> Callable[[], None]:
    """Before its second frame; gives a check of what came after."""
    model, frames = trainer.sampler.live.model, []

    def hook(*_: Any) -> None:
        frames.append(trainer.progress.step)
        if len(frames) == 2:
            ask_to_stop()

    model.talker.codec_head.register_forward_hook(hook)
    return lambda: len(frames) == 2 or pytest.fail(f"{len(frames)} frames")


def stop_in_a_judgement(trainer: Any) -> Callable[[], None]:
    asked = []

    def judges(_: Any, check: Callable) -> None:
        asked.append(trainer.progress.step)
        torch.rand(3)
        ask_to_stop()
        check()

    trainer.sampler.judge = judges
    return lambda: len(asked) == 1 or pytest.fail("went on")


def test_a_stop_while_it_speaks_and_one_while_it_is_judged(make: Callable) -> None:
    """It is broken off, the run saves; the next start speaks again, and everything is as if nothing had been."""
    fields = {"sample_steps": 2, "save_steps": 2, **FULL}
    untouched = trained(make(**fields))
    settings = make(**fields)
    for stop in (stop_in_a_sample, stop_in_a_judgement):
        trainer = make_trainer(build(settings))
        check_the_rest = stop(trainer)
        with pytest.raises(Stopped):
            trainer.run()
        check_the_rest()
        assert trainer.progress.step == 2 and not (settings.output_dir / "validation_log.jsonl").exists()
        assert trainer.sampler.live.model.talker.rope_deltas is None
    (settings.output_dir / "samples" / "step-3").mkdir(parents=True)  # of a future that is given up
    resumed = trained(settings)
    assert sorted(entry.name for entry in (settings.output_dir / "samples").iterdir()) == ["step-2", "step-4"]
    for name in ("training_log.jsonl", "validation_log.jsonl"):
        logs = [[without(record, *CLOCK) for record in log_of(one, name)] for one in (untouched, resumed)]
        assert logs[0] == logs[1]
    for step in (2, 4):
        assert listed(untouched, step) == listed(resumed, step)
    states = [State(find_states(one.settings.output_dir)[0]) for one in (untouched, resumed)]
    assert not [name for name in states[0].names("") if not same_bits(states[0][name], states[1][name])]
    assert states[0].record["progress"] == states[1].record["progress"]


def test_errors_are_said_once_and_end_no_run(
    make: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make(sample_steps=1, eval_steps=1, best_metric="eos_rate", **FULL)
    trainer = make_trainer(build(settings))
    live, write, step = trainer.sampler.live, samples.write_samples, trainer.progress
    say = live.say

    def fails(request: Any) -> Any:
        if step.step == 3 or request.number == 0:
            raise torch.OutOfMemoryError("no more")
        return say(request)

    def full(folder: Path, found: Any) -> None:
        if step.step == 2:
            raise OSError(28, "No space left on device")
        write(folder, found)

    monkeypatch.setattr(live, "say", fails)
    monkeypatch.setattr(samples, "write_samples", full)
    trainer.sampler.judge = lambda *_: {}["not there"]
    trainer.run()
    assert trainer.is_over
    metrics = [record["metrics"] for record in log_of(trainer, "validation_log.jsonl")]
    assert [found.get("num_samples") for found in metrics] == [1, None, None, 1]
    assert metrics[0]["yardsticks"] == {}  # one of two samples: what it shows is compared with nothing
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("SAMPLE_STEPS: ")]
    assert [line.partition("(")[2].partition(":")[0] for line in lines] == ["OutOfMemoryError", "KeyError", "OSError"]
    assert all(line.endswith("training goes on") for line in lines)
    assert said.count("BEST_METRIC: eos_rate of step 1 is not known of all 2 samples") == 1
    assert not (settings.output_dir / "best").exists()


@pytest.mark.parametrize("head", ["codec_head", "code_predictor.lm_head.3"])
def test_logits_that_are_not_finite(make: Callable, head: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is drawn from them: on a GPU that would be the end of the process. Compiled layers are left alone."""
    trainer = make_trainer(build(make(sample_steps=9, **FULL)))
    talker = trainer.saver.exporter.model.talker.train()
    with torch.no_grad():
        talker.get_submodule(head).weight[5] = torch.nan
    talker.model.layers[0].compile(backend=lambda *_: pytest.fail("compiled"))
    compiled = talker.model.layers[0]._compiled_call_impl
    assert trainer.sampler.speak(trainer.stepper.averaged, lambda: None) == []
    assert "FloatingPointError: the model's logits are not finite" in capsys.readouterr().out
    assert talker.model.layers[0]._compiled_call_impl is compiled and not talker.codec_head._forward_hooks
    assert talker.training and trainer.sampler.keep(1, [], lambda: None) == ({}, [])


def test_weights_come_back_when_generation_is_broken_off(make: Callable) -> None:
    """By the second Ctrl-C, say: rows of the codec table and the average's swap are undone."""
    trainer = make_trainer(build(make(sample_steps=9, ema_decay=0.5, **CASES["vectors"])))
    before = {name: tensor.clone() for name, tensor in trainer.stepper.module.state_dict().items()}
    drawn = torch.get_rng_state()

    def broken(_: Any) -> Any:
        rows, vectors = trainer.saver.exporter.rows_now()
        table = trainer.saver.exporter.model.talker.model.codec_embedding.weight
        assert len(rows) == 2 and torch.equal(table[rows], vectors)
        torch.rand(1)
        raise KeyboardInterrupt

    trainer.sampler.live.say = broken
    with pytest.raises(KeyboardInterrupt):
        trainer.sampler.speak(trainer.stepper.averaged, lambda: None)
    after = trainer.stepper.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(drawn, torch.get_rng_state())


# ----------------------------------------------------------------------------------------------------- the records


def fake_sampler(trainer: Any, every: int) -> list[int]:
    """Speaks at once; gives the steps in which it did."""
    steps: list[int] = []

    def keep(step: int, *_: Any) -> Any:
        steps.append(step)
        return samples.Sampled({"eos_rate": 1.0}, [])

    trainer.sampler = SimpleNamespace(is_due=lambda step: step % every == 0, speak=lambda *_: [], keep=keep)
    return steps


@pytest.mark.parametrize(
    ("every", "eval_steps", "with_validation", "wanted"),
    [
        (1, 99, True, [(1, False, True), (2, True, True), (3, False, True), (4, True, True)]),
        (3, 2, True, [(2, True, False), (3, False, True), (4, True, True)]),
        (3, 4, True, [(2, True, False), (3, False, True), (4, True, True)]),
        (99, 99, True, [(2, True, False), (4, True, True)]),
        (3, 99, False, [(3, False, True), (4, False, True)]),
    ],
)
def test_one_record_a_step(
    make: Callable, every: int, eval_steps: int, with_validation: bool, wanted: list[tuple[int, bool, bool]]
) -> None:
    """(step, whether it has a loss, whether it has figures of samples); the end of the run always has them."""
    trainer = make_trainer(build(make(eval_steps=eval_steps, **FULL)))
    trainer.validator = trainer.validator if with_validation else None
    steps = fake_sampler(trainer, every)
    trainer.run()
    log = log_of(trainer, "validation_log.jsonl")
    seen = [(record["step"], record["loss"] is not None, "eos_rate" in record["metrics"]) for record in log]
    assert seen == wanted and steps == [step for step, _, has_samples in wanted if has_samples]


def test_a_yardstick_is_all_that_a_figure_depends_on(make: Callable) -> None:
    """What is said and how, and the metric's own judge; not that of another one."""
    run = build(make(sample_steps=9, lora_rank=2))
    requests, settings = run.requests, run.settings

    def of(requests: Any = requests, sampling: dict | None = None, **fields: Any) -> dict[str, str]:
        return yardsticks_of(settings.model_copy(update=fields), requests, sampling or {"top_k": 50})

    first = of()
    assert first.keys() == set(METRICS_OF_SAMPLES) and of(list(requests), learning_rate=9.0) == first
    for other in (
        of(requests[:1]), of([replace(requests[0], seed=7), *requests[1:]]), of(sampling={"top_k": 5}),
        of(lora_export_scale=0.5), of([replace(requests[0], text="Yes!"), *requests[1:]]),
    ):  # fmt: skip
        assert all(other[name] != first[name] for name in first)
    judged = of(asr_model="another")
    assert [name for name in first if judged[name] != first[name]] == ["wer", "cer"]
    assert [name for name in first if of(mos_model="x")[name] != first[name]] == ["mos"]


def test_what_they_take_is_known_at_the_start(make: Callable) -> None:
    """A third of what is cut off is as long as the training rows say; each tracker has a copy."""
    requests = [Request(at, "Yes.", "anna", "Auto", 42, samples.SPARE_FRAMES + 300, None) for at in range(2)]
    eight_seconds = 8 * SAMPLE_RATE_HZ * 2
    for num_steps, report_to, times in ((99, "none", 1), (100, "none", 2), (250, "wandb,tensorboard", 9)):
        settings = make(sample_steps=100, report_to=report_to, use_wandb="wandb" in report_to)
        assert samples_bytes(settings, requests, num_steps) == times * 2 * eight_seconds
    run = build(make(sample_steps=3))
    (line,) = describe_samples(run)
    assert line.startswith("Samples: 2 every 3 steps and at the end, in all about 0.1 MB; they stay in ")
    run.settings, run.requests = make(sample_steps=0, mos_model="distillmos"), []
    wanted = "nothing is said while the run trains, so EVAL_TEXTS, MOS_MODEL only matter to evaluate.py"
    assert describe_samples(run) == [f"SAMPLE_STEPS=0: {wanted}"]
    run.settings = make(sample_steps=0, eval_texts=None)
    assert describe_samples(run) == []


def test_figures() -> None:
    short = [Sample("", "", "", np.zeros((2, 16)), np.zeros(size), stopped, 0, Path()) for size, stopped in SIZES]
    assert figures_of(short) == {"eos_rate": 0.75, "sample_seconds": 1.5, "num_samples": 4}


SIZES = ((SAMPLE_RATE_HZ, True), (2 * SAMPLE_RATE_HZ, False), (0, True), (3 * SAMPLE_RATE_HZ, True))


def test_wandb_gets_the_audio(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict] = []
    service = SimpleNamespace(id="x", log=lambda found, step: logged.append(found), finish=lambda: None)
    monkeypatch.setattr("finetuning.services.start_wandb", lambda *_: service)
    settings = make(use_wandb=True)
    file = settings.output_dir / "samples" / "step-1" / "01-anna.wav"
    sample = Sample("Yes.", "anna", "Auto", np.zeros((3, 16)), np.zeros(5760, np.float32), True, 42, file)
    samples.write_samples(file.parent, [sample])
    with Tracker(settings, total_steps=1, is_main=True) as tracker:
        tracker.log_samples(1, samples.Sampled(figures_of([sample]), [sample]))
    (found,) = logged
    assert found["samples/01-anna"]._caption == "Yes. (Auto)"


def test_the_folder_belongs_to_the_run(make: Callable) -> None:
    settings = make()
    (settings.output_dir / "samples" / "step-4").mkdir(parents=True)
    assert [entry.name for entry in run_entries(settings.output_dir)] == ["samples"]
    clear_output_folder(settings)
    assert not (settings.output_dir / "samples").exists()


# ---------------------------------------------------------------------------------------------------------- the plan


def planned(run: Any, **fields: Any) -> list[Any]:
    settings = run.settings.model_copy(update=fields)
    validation = run.validation.manifest if run.validation else None
    return plan_samples(settings, run.base, run.train, validation, run.speakers)


def test_without_eval_texts_rows_are_said(make: Callable, rows: list[dict], tmp_path: Path) -> None:
    """Of validation before training; in their languages, if they are not too long."""
    long = rows[4] | {"text": "so " * 100, "language": "Auto"}
    file = tmp_path / "validation.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (long, rows[4] | {"language": "en"}, *rows[4:])))
    run = build(make(validation_jsonl=str(file), eval_texts=None))
    found = planned(run)
    assert [(one.text, one.language) for one in found] == [
        (rows[4]["text"], "english"), (rows[5]["text"], "Auto"),  # Hausa is not known to this base
    ]  # fmt: skip
    assert [(one.number, one.seed) for one in found] == [(0, 42), (1, 43)]
    rate = float(np.median([len(row["audio_codes"]) / len(row["text"]) for row in rows[:4]]))
    assert samples.frames_per_character(samples._rows_of(run.train, None)) == pytest.approx(rate)
    assert [one.max_frames for one in found] == [int(np.ceil(3 * rate * len(one.text))) + 4 for one in found]
    run.validation = None
    assert [one.text for one in planned(run)] == [row["text"] for row in rows[:3]]
    assert samples._lines_of([samples._Row("b" * 999, "", "Auto", 1), samples._Row("c" * 500, "", "Auto", 1)]) == [
        ("c" * 500, "Auto"), ("b" * 999, "Auto"),
    ]  # fmt: skip


def test_a_judge_that_cannot_be_loaded_costs_no_run(make: Callable, tmp_path: Path) -> None:
    """It is loaded before the run that is to be replaced goes."""
    broken = tmp_path / "asr"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]}')
    run, _ = train(make(max_steps=1, sample_steps=0))
    best = run.settings.output_dir / "last" / "config.json"
    assert best.is_file()
    with pytest.raises(UserError, match=r"ASR_MODEL: .* cannot be loaded"):
        build(make(asr_model=str(broken), overwrite_output=True, resume="never", sample_steps=1))
    assert best.is_file()


def test_many_texts_and_speakers_are_cut_and_said(make: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    run = build(make())
    names = [f"s{number}" for number in range(SAMPLE_SPEAKERS + 2)]
    run.speakers = Speakers(names, torch.zeros(len(names), 64), list(range(3000, 3000 + len(names))), [[]] * len(names))
    found = planned(run, eval_texts="|".join(f"Text {number}." for number in range(20)))
    assert [one.speaker for one in found[:5]] == [*names[:4], "s0"] and len(found) == 16 * 4
    assert found[5].text == "Text 1." and found[63].seed == 42 + 63
    said = capsys.readouterr().out
    assert "of 20 texts of EVAL_TEXTS the first 16 are used" in said and "of 6 speakers the first 4 are used" in said


def test_texts_come_from_a_file_or_from_between_bars(tmp_path: Path, make: Callable) -> None:
    file = tmp_path / "my texts"
    file.write_text("One | two.\n\n  Three. \n", encoding="utf-8-sig")
    assert make(eval_texts=str(file)).texts_to_speak() == ["One | two.", "  Three. "]
    assert make(eval_texts=" One. | Two.|").texts_to_speak() == [" One. ", " Two."]
    assert make(eval_texts="A single text, as long as " + "it " * 3000).texts_to_speak()
    assert [one.text for one in planned(build(make(eval_texts=str(file))))] == ["One | two.", "Three."]


@pytest.mark.parametrize("case", ["missing", "empty", "binary", "bars alone"])
def test_eval_texts_that_cannot_be_read(case: str, tmp_path: Path, make: Callable) -> None:
    file = tmp_path / "texts.txt"
    if case != "missing":
        file.write_bytes({"empty": b" \n\n", "binary": b"\xff\xfe\x00"}.get(case, b""))
    value, wanted = str(file), {"missing": "does not exist", "binary": "cannot be read as UTF-8"}.get(case, "no text")
    with pytest.raises(UserError, match=f"EVAL_TEXTS: .*{wanted}"):
        make(eval_texts=" | " if case == "bars alone" else value)


def test_a_text_that_the_model_has_no_room_for(make: Callable) -> None:
    """Before anything is trained, or a run in OUTPUT_DIR removed."""
    settings = make(sample_steps=5, eval_texts="Yes. " * 9000)
    (settings.output_dir / "last").mkdir()
    with pytest.raises(UserError, match=r"EVAL_TEXTS: .* positions, and the model has 32768"):
        build(settings.model_copy(update={"overwrite_output": True}))
    assert [entry.name for entry in run_entries(settings.output_dir)] == ["last"]


def test_special_tokens_are_refused_before_anything_is_loaded(make: Callable, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("Good.\nStop <|im_end|> here.\n")
    with pytest.raises(UserError, match=r"EVAL_TEXTS: text 2 contains the special token <\|im_end\|>"):
        starting.check_inputs(make(eval_texts=str(file)))


def test_the_bases_own_sampling_is_used(make: Callable) -> None:
    trainer = make_trainer(build(make(sample_steps=5)))
    options = LiveModel._options(trainer.sampler.live, 50)
    assert options["max_new_tokens"] == 52 and options["do_sample"] and options["subtalker_top_k"] == 50
    assert LiveModel._options(trainer.sampler.live, 99_999)["max_new_tokens"] == 8192


# ----------------------------------------------------------------------------------------------- what is not measured


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"best_metric": "eos_rate", "sample_steps": 0}, r"BEST_METRIC: eos_rate .* SAMPLE_STEPS=0 turns them off"),
        ({"best_metric": "wer"}, r"BEST_METRIC: wer needs ASR_MODEL, which is not set"),
        ({"best_metric": "mos"}, r"BEST_METRIC: mos needs MOS_MODEL"),
        ({"best_metric": "wer", "asr_model": "./no-such-folder/x"}, r"ASR_MODEL: \./no-such-folder/x is not a folder"),
        ({"mos_model": "__file__"}, r"MOS_MODEL: .*test_samples.py is no TorchScript file"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(make: Callable, fields: dict, message: str) -> None:
    fields = {name: __file__ if value == "__file__" else value for name, value in fields.items()}
    settings = make(**({"sample_steps": 1} | fields))
    with pytest.raises(UserError, match=message):
        starting.check_measures(settings, resolve_base(settings))


def test_what_is_measured_passes(make: Callable) -> None:
    for name in ("loss", "eos_rate", "speaker_embedding_similarity", "speech_rate_ratio"):
        settings = make(best_metric=name, sample_steps=1)
        starting.check_measures(settings, resolve_base(settings))


def test_a_long_name_fits_into_a_file_s() -> None:
    assert len((samples._file_name("न" * 100) + "00-.wav").encode()) < 255
