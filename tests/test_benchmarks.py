"""The benchmarks' own small forms run; their figures are for people."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT
from torch.nn import functional as F

from finetuning import stepping


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # the toy layers are too small to share
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gpu_check_runs_at_toy_size_on_cpu() -> None:
    printed = run("benchmarks/gpu_check.py", "--size", "tiny", "--device", "cpu", "--steps", "1")
    passed, skipped = re.search(r"(\d+) passed, 0 failed, (\d+) skipped", printed).groups()
    assert int(passed) >= 18
    assert int(skipped) == printed.count("skipped: needs CUDA")
    for recipe in ("full", "layers"):
        assert f"✓ {recipe}: a step with NaN gradients changes nothing" in printed
        assert re.search(rf"✓ {recipe}: goes on from the state: .* are bit-identical", printed)


# ------------------------------------------------------------------------------- the checks of gpu_check.py can fail


@pytest.fixture(scope="module")
def bench() -> Any:
    """The toy on CPU: two batches of four rows."""
    from benchmarks.bench import Bench

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Bench(argparse.Namespace(size="tiny", device="cpu", batch_size=4, steps=2))
    torch.set_num_threads(threads)


class FakeMemory:
    """A GPU on which four rows take 400 bytes and two 200; a limit lets so many rows through."""

    def __init__(self, is_limiting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_limiting, self.monkeypatch = is_limiting, monkeypatch
        self.peaks = [(400, 420), (190, 200)]  # whole micro-batches, then halves
        self.limits: list[int] = []

    def peak_of(self, work: Callable[[], Any]) -> Any:
        from benchmarks.resume_check import Peak

        work()
        return Peak(*self.peaks.pop(0))

    @contextlib.contextmanager
    def limited(self, num_bytes: int) -> Iterator[None]:
        self.limits.append(num_bytes)
        to_device = stepping.to_device

        def limited(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
            if 100 * len(batch["attention_mask"]) > num_bytes:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return to_device(batch, device)

        with self.monkeypatch.context() as patched:
            if self.is_limiting:
                patched.setattr(stepping, "to_device", limited)
            yield


def test_gpu_check_of_memory(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.bench import CheckFailed
    from benchmarks.resume_check import check_out_of_memory

    memory = FakeMemory(True, monkeypatch)
    assert "2 parts" in check_out_of_memory(bench, "layers", memory)
    assert memory.limits == [300]
    with pytest.raises(CheckFailed, match="the step fitted"):
        check_out_of_memory(bench, "layers", FakeMemory(False, monkeypatch))
    split = stepping.split_batch
    monkeypatch.setattr(stepping, "split_batch", lambda batch, parts: split(batch, parts)[:1])
    with pytest.raises(CheckFailed, match="norm off by"):
        check_out_of_memory(bench, "layers", FakeMemory(True, monkeypatch))


def test_gpu_check_of_bad_gradients(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.bench import CheckFailed
    from benchmarks.resume_check import check_bad_gradients

    monkeypatch.setattr(stepping.Stepper, "_update", lambda stepper, _: stepper._step_optimizer() or True)
    with pytest.raises(CheckFailed, match=r"\d+ tensors changed"):
        check_bad_gradients(bench, "layers")


def test_gpu_check_of_waits(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.bench import CheckFailed
    from benchmarks.resume_check import make_stepper, waits_of

    def waiting(function: Callable) -> Callable:
        def wait(*arguments: Any) -> Any:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            return function(*arguments)

        return wait

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)
    _, stepper = make_stepper(bench, "layers")
    assert waits_of(stepper, bench.batches[0]) == "none, from the copies to the update"
    monkeypatch.setattr(stepping, "to_device", waiting(stepping.to_device))
    monkeypatch.setattr(stepping, "lines_of", waiting(stepping.lines_of))
    with pytest.raises(CheckFailed, match=r"waits: 1 x stepping.py:\d+ \(loss\), 1 x stepping.py:\d+ \(take\)"):
        waits_of(stepper, bench.batches[0])


def test_gpu_check_of_the_scaler(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 on CPU, with a weight whose gradient overflows at scales above 2^20."""
    from benchmarks.bench import CheckFailed
    from benchmarks.resume_check import make_accelerator, make_stepper, search_of

    def with_scaler(*arguments: Any) -> Any:
        accelerator = make_accelerator(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    def overflowing_stepper() -> stepping.Stepper:
        _, stepper = make_stepper(bench, "layers", mixed_precision="no")
        accelerator = stepper.accelerator
        accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(stepper.optimizer)
        weight = next(weight for weight in stepper.module.parameters() if weight.requires_grad)
        weight.register_hook(lambda gradient: gradient * (torch.inf if accelerator.scaler.get_scale() > 2**20 else 1))
        return stepper

    monkeypatch.setattr("benchmarks.resume_check.make_accelerator", with_scaler)
    found = search_of(overflowing_stepper(), bench.batches[0], 2.0**24)
    assert re.search(r"halved 4 times .* 2 steps taken, 2 on the schedule, 0 counted", found)
    monkeypatch.setattr(stepping.Stepper, "_counts_as_bad", lambda _: True)
    with pytest.raises(CheckFailed, match=r"[1-9]\d* counted as skipped"):
        search_of(overflowing_stepper(), bench.batches[0], 2.0**24)


def test_gpu_check_of_states(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.bench import CheckFailed
    from benchmarks.resume_check import check_restored, save

    def saved(name: str) -> Any:
        (tmp_path / name).mkdir()
        return save(bench, "layers", tmp_path / name)

    with monkeypatch.context() as patched:
        patched.setattr("finetuning.saving.set_schedule", lambda *_: None)
        with pytest.raises(CheckFailed, match="not bit-identical"):
            check_restored(bench, "layers", saved("another rate"))
    with monkeypatch.context() as patched:
        patched.setattr("finetuning.saving.restore_training", lambda *_: None)
        with pytest.raises(CheckFailed, match="tensors are not those of the state"):
            check_restored(bench, "layers", saved("other weights"))
    with monkeypatch.context() as patched:
        patched.setattr("finetuning.saving.free_bytes", lambda _: 0)
        with pytest.raises(CheckFailed, match=r"last/ was not saved: .*GB are needed"):
            saved("a full disk")


# --------------------------------------------------------------------------------------------------- throughput.py


@pytest.fixture(scope="module")
def two_batches(bench: Any) -> Any:
    """The toy on CPU: clips of realistic lengths, the most different ones beside each other."""
    from benchmarks.bench import Bench

    return Bench(argparse.Namespace(size="tiny", device="cpu", batch_size=2, steps=2), [3.0, 1.0, 2.9, 1.1])


def test_throughput_runs_at_toy_size_on_cpu() -> None:
    small = ("--size", "tiny", "--device", "cpu", "--steps", "1", "--batch-size", "2", "--rounds", "1")
    printed = run("benchmarks/throughput.py", *small, "--recipe", "layers", "--set", "SUB_TALKER_FRAME_FRACTION=0.5")
    assert re.search(r"layers: \d+\.\d\d x as fast", printed)
    assert len(re.findall(r"frames/s, .* s of speech/s, .*% padding, .*% MFU", printed)) == 2


def test_all_that_a_gpu_must_reach_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The goals themselves and one lever, at toy size: nothing breaks; what is reached there says nothing."""
    from benchmarks.bench import Bench, CheckFailed, Skipped
    from benchmarks.random_base import clip_seconds
    from benchmarks.throughput import GOALS, MemoryGoal, levers, measure_lever, parse_arguments

    small = ["--size", "tiny", "--device", "cpu", "--steps", "1", "--batch-size", "2", "--rounds", "1"]
    arguments = parse_arguments([*small, "--peak-tflops", "1"])
    bench = Bench(arguments, clip_seconds(2))
    for goal in GOALS["cuda"]:
        toy = replace(goal, num_frames=40) if isinstance(goal, MemoryGoal) else goal
        with contextlib.suppress(CheckFailed, Skipped):  # anything else that is raised is a mistake of the script
            toy.check(arguments, bench)
    moved = levers("layers", is_cuda=True)
    assert len({variant.name for variant in moved}) == len(moved) > 10
    assert "x as fast" in str(measure_lever(arguments, bench, moved[1]))
    with pytest.raises(SystemExit):
        parse_arguments([*small, "--all", "--recipe", "lora"])
    assert "leave out recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362), ("NVIDIA L40", None),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA GeForce RTX 4090", 165), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_what_a_device_can_do_is_looked_up_by_whole_names(name: str, tflops: float | None) -> None:
    from benchmarks.flops import known_tflops

    assert known_tflops(name) == tflops


@pytest.mark.parametrize("recipe", ["full", "layers", "lora"])
def test_both_ways_train_the_same_loss(two_batches: Any, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the same rows; the plain loop's mean against the sums of ours, before any step and without dropout."""
    from benchmarks import loops
    from benchmarks.bench import SUB_TALKER_WEIGHT
    from benchmarks.loops import OurWay, PlainWay, Variant
    from benchmarks.random_base import to_batch
    from finetuning.dataset import count_tokens
    from finetuning.objective import step_loss

    monkeypatch.setitem(loops.LORA, "lora_dropout", 0.0)
    batch = to_batch(two_batches.rows)
    plain, ours = PlainWay(two_batches, recipe, "fp32"), OurWay(two_batches, recipe, "fp32", Variant())
    sums = ours.stepper.module(batch)
    loss = step_loss(sums, *count_tokens([batch]), SUB_TALKER_WEIGHT)
    torch.testing.assert_close(loss, plain.loop(batch), rtol=1e-5, atol=0)
    assert plain.epoch(0).num_real == ours.epoch(0).num_real
    assert plain.flops == ours.flops > 0


def test_mistakes_differ_from_the_right_loss(two_batches: Any) -> None:
    from benchmarks.bench import SUB_TALKER_WEIGHT
    from benchmarks.loops import recipe_model
    from benchmarks.mistakes import MISTAKES, MistakenLoop
    from benchmarks.random_base import to_batch
    from finetuning.dataset import count_tokens
    from finetuning.objective import TrainingObjective, step_loss

    model, batch = recipe_model(two_batches, "full"), to_batch(two_batches.rows)
    vectors = two_batches.speaker_vectors(model)
    right = step_loss(TrainingObjective(model.talker, vectors)(batch), *count_tokens([batch]), SUB_TALKER_WEIGHT)
    losses = {name: MistakenLoop(model, vectors, SUB_TALKER_WEIGHT, frozenset([name]))(batch) for name in MISTAKES}
    torch.testing.assert_close(MistakenLoop(model, vectors, SUB_TALKER_WEIGHT, frozenset())(batch), right)
    for name, loss in losses.items():
        assert abs(loss - right) > 1e-4 * right, name


def test_all_mistakes_together_are_the_official_script(two_batches: Any) -> None:
    """Its own steps (QwenLM/Qwen3-TTS, revision 022e286) over the same rows: labels that stock's forward shifts again,
    the hidden states of ``codec_mask[:, :-1]``, stock's sub-talker loss, and no text_projection."""
    from benchmarks.bench import SUB_TALKER_WEIGHT
    from benchmarks.loops import recipe_model
    from benchmarks.mistakes import MISTAKES, MistakenLoop
    from benchmarks.random_base import to_batch

    model, batch = recipe_model(two_batches, "full"), to_batch(two_batches.rows)
    vectors = two_batches.speaker_vectors(model)
    mistaken = MistakenLoop(model, vectors, SUB_TALKER_WEIGHT, frozenset(MISTAKES))(batch)
    official = official_loss(model.talker, official_batch(batch, two_batches.rows), vectors[:1], SUB_TALKER_WEIGHT)
    torch.testing.assert_close(mistaken, official, rtol=1e-6, atol=0)


def official_batch(batch: dict[str, torch.Tensor], rows: Any) -> dict[str, torch.Tensor]:
    """What the official collate_fn makes of these rows: with the end of each row, and labels in their own place."""
    num_rows, length = batch["text_ids"].shape
    official = {
        "text_ids": torch.zeros(num_rows, length + 1, dtype=torch.int64),
        "codec_ids": torch.zeros(num_rows, length + 1, dtype=torch.int64),
        "attention_mask": torch.zeros(num_rows, length + 1, dtype=torch.int64),
        "codec_mask": torch.zeros(num_rows, length + 1, dtype=torch.bool),
        "codes": torch.zeros(num_rows, length + 1, 16, dtype=torch.int64),
        "labels": torch.full((num_rows, length + 1), -100),
    }
    for number, row in enumerate(rows):
        end, num_frames = len(row.text), len(row.codes)
        frames, eos = slice(end - num_frames, end), int(row.labels[-1])
        official["text_ids"][number, :end] = torch.from_numpy(row.text)
        official["text_ids"][number, end] = int(row.text[-1])  # tts_pad, as beside the frames
        official["codec_ids"][number, :end] = torch.from_numpy(row.codec)
        official["codec_ids"][number, end] = eos
        official["attention_mask"][number, : end + 1] = 1
        official["codec_mask"][number, frames] = True
        official["codes"][number, frames] = torch.from_numpy(row.codes)
        official["labels"][number, frames] = torch.from_numpy(row.codes[:, 0])
        official["labels"][number, end] = eos
    return official


def official_loss(talker: Any, batch: dict[str, torch.Tensor], vector: torch.Tensor, weight: float) -> torch.Tensor:
    """As the official loop computes it, whose text table is as wide as its talker."""
    has_codec = (batch["codec_ids"] >= 0) & (batch["attention_mask"] == 1)
    width = talker.config.hidden_size
    text = talker.model.text_embedding(batch["text_ids"])[..., :width]
    text = F.pad(text, (0, width - text.shape[-1])) * batch["attention_mask"].unsqueeze(-1)
    codec = talker.model.codec_embedding(batch["codec_ids"].clamp(min=0)) * has_codec.unsqueeze(-1)
    codec[:, 6] = vector
    inputs = text + codec
    for book in range(1, 16):
        table = talker.code_predictor.get_input_embeddings()[book - 1]
        inputs = inputs + table(batch["codes"][..., book]) * batch["codec_mask"].unsqueeze(-1)
    outputs = talker(
        inputs_embeds=inputs[:, :-1],
        attention_mask=batch["attention_mask"][:, :-1],
        labels=batch["labels"][:, 1:],
        output_hidden_states=True,
    )
    hidden = outputs.hidden_states[0][-1][batch["codec_mask"][:, :-1]]
    _, sub_talker_loss = talker.forward_sub_talker_finetune(batch["codes"][batch["codec_mask"]], hidden)
    return outputs.loss + weight * sub_talker_loss


@pytest.mark.parametrize("name", ["PaddedRows", "AllLogitsAtOnce", "ManyLookups"])
def test_plain_parts_change_no_loss(two_batches: Any, name: str) -> None:
    from benchmarks import plain_parts
    from benchmarks.loops import recipe_model
    from benchmarks.random_base import to_batch
    from finetuning.objective import TrainingObjective

    model, batch = recipe_model(two_batches, "full"), to_batch(two_batches.rows)
    vectors = two_batches.speaker_vectors(model)
    sums, others = (
        make(model.talker, vectors).train()(batch) for make in (TrainingObjective, getattr(plain_parts, name))
    )
    for loss in ("talker_loss", "sub_talker_loss"):
        torch.testing.assert_close(others[loss], sums[loss], rtol=1e-5, atol=0)


def test_operations_of_an_epoch(two_batches: Any) -> None:
    """Against PyTorch's own count of the matrix products, which leaves out attention and counts each text id once."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.flops import epoch_flops
    from benchmarks.loops import recipe_model
    from benchmarks.plain_parts import AllLogitsAtOnce
    from benchmarks.random_base import to_batch

    for recipe in ("full", "layers"):
        model = recipe_model(two_batches, recipe)
        objective = AllLogitsAtOnce(model.talker, two_batches.speaker_vectors(model)).train()
        with FlopCounterMode(display=False) as counter:
            sum(objective(to_batch(two_batches.rows)).values()).backward()
        products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
        assert 1 < epoch_flops(model.talker, two_batches.rows) / products < 1.04, recipe


# -------------------------------------------------------------------------------------------------- other benchmarks


def test_encode_compares_the_two_ways() -> None:
    printed = run("benchmarks/encode.py", "--codec", "tiny", "--clips", "10", "--rounds", "1")
    assert re.search(r"ours is \d+\.\d\d times as fast", printed)
    padding = [int(share) for share in re.findall(r"(\d+)% padding", printed)]
    assert padding[1] <= padding[0]


def test_memory_measures_a_small_set() -> None:
    small = ("--rows", "2000", "--validation_rows", "100", "--workers", "0")
    printed = run("benchmarks/memory.py", *small, "--max_seconds", "300")  # how long it takes is no test's business
    assert "2,000" in printed and "limit 300" in printed and "✓ 0 workers" in printed
