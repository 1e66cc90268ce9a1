"""Steps that fail: memory that does not suffice, a scaler that looks for its scale, rows that cannot be read."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from training import FULL, build, flat, make_trainer, signal_in_step

from finetuning.briefing import describe_batch
from finetuning.errors import UserError
from finetuning.row_index import Manifest
from finetuning.state import State, find_states
from finetuning.stepping import MAX_HALVINGS, Skips, Stepper, Sums, Window

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    """Two micro-batches of four rows a step; one step an epoch."""

    def make(num_rows: int = 8, **fields: Any) -> Any:
        defaults = {
            "train_jsonl": write_jsonl(demo_rows[:num_rows]), "validation_fraction": 0.0, "batch_size": 4,
            "gradient_accumulation_steps": 2, "num_epochs": 3, "logging_steps": 1, "learning_rate": 1e-3,
            "warmup_steps": 0, "max_grad_norm": 1e9, "resume": "auto",
        }  # fmt: skip
        return make_settings(**(FULL | defaults | fields))

    return make


def read_log(settings: Any, name: str = "training_log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (settings.output_dir / name).read_text().splitlines()]


def limit_memory(run: Any, monkeypatch: pytest.MonkeyPatch, max_rows: int, in_backward: bool = False) -> list[int]:
    """More rows at once than that are out of memory; gives the numbers of rows that were tried."""
    forward, tried = run.objective.forward, []

    def limited(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tried.append(len(batch["attention_mask"]))
        if tried[-1] > max_rows and not in_backward:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sums = forward(batch)
        if tried[-1] > max_rows and sums["talker_loss"].requires_grad:
            sums["talker_loss"] = FailsInBackward.apply(sums["talker_loss"])
        return sums

    monkeypatch.setattr(run.objective, "forward", limited)
    return tried


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(_: Any, __: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def keep_gradients(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The gradients of every step, as the optimizer meets them."""
    seen: list[dict[str, torch.Tensor]] = []
    step = trainer.stepper._step_optimizer

    def noted() -> None:
        named = trainer.stepper.module.named_parameters()
        seen.append({name: tensor.grad.clone() for name, tensor in named if tensor.grad is not None})
        step()

    monkeypatch.setattr(trainer.stepper, "_step_optimizer", noted)
    return seen


def trained(run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    trainer = make_trainer(run)
    gradients = keep_gradients(trainer, monkeypatch)
    trainer.run()
    return trainer, gradients


# ---------------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
def test_a_step_out_of_memory_is_repeated_in_smaller_parts(
    settings_for: Callable,
    tmp_path: Any,
    in_backward: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One row at a time fits, of micro-batches of 4: gradients, losses and weights are those of the untouched run."""
    untouched = settings_for(output_dir=tmp_path / "untouched")
    _, wanted = trained(build(untouched), monkeypatch)
    capsys.readouterr()
    settings = settings_for()
    run = build(settings)
    tried = limit_memory(run, monkeypatch, 1, in_backward)
    trainer, gradients = trained(run, monkeypatch)
    # A backward follows its forward, but for the last micro-batch's, so each try ends with its first micro-batch.
    assert tried == [4, 2, *[1] * 8, *[1] * 16]
    assert trainer.stepper.num_parts == 4
    assert len(gradients) == len(wanted) == 3
    for found, want in zip(gradients, wanted, strict=True):
        assert found.keys() == want.keys()
        norm = torch.stack([tensor.norm() for tensor in want.values()]).norm()
        error = torch.stack([(found[name] - tensor).norm() for name, tensor in want.items()]).norm()
        assert error / norm < (1e-6 if found is gradients[0] else 1e-5)
    for found, want in zip(read_log(settings), read_log(untouched), strict=True):
        for name in ("loss", "talker_loss", "sub_talker_loss", "grad_norm"):
            assert found[name] == pytest.approx(want[name], rel=1e-5 if found["step"] > 1 else 1e-6)
    said = capsys.readouterr().out
    assert "the step is repeated with at most 2 rows at a time, and the next steps are taken in 4 micro-b" in said
    assert "BATCH_SIZE=1 GRADIENT_ACCUMULATION_STEPS=8 gives the same" in said
    assert said.count("out of GPU memory") == 2


def test_only_the_last_backward_out_of_memory(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where several processes would synchronise; alone the step is repeated, without what was added up before."""
    settings = settings_for(num_epochs=1)
    run = build(settings)
    forward, tried = run.objective.forward, []

    def limited(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tried.append(len(batch["attention_mask"]))
        sums = forward(batch)
        if len(tried) == 2:
            sums["talker_loss"] = FailsInBackward.apply(sums["talker_loss"])
        return sums

    with monkeypatch.context() as patched:
        patched.setattr(run.objective, "forward", limited)
        trainer, (gradients,) = trained(run, patched)
    assert tried == [4, 4, 2, 2, 2, 2] and trainer.stepper.num_parts == 2
    _, (wanted,) = trained(build(settings_for(num_epochs=1, resume="never", overwrite_output=True)), monkeypatch)
    for name, tensor in wanted.items():
        torch.testing.assert_close(gradients[name], tensor, rtol=1e-3, atol=1e-6)


def test_the_cut_is_kept_in_validation_and_in_the_state(
    settings_for: Callable, write_jsonl: Callable, demo_rows: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run begins with the parts that were found to fit."""
    validation = write_jsonl(demo_rows[-4:], "valid.jsonl")
    settings = settings_for(num_epochs=1, validation_jsonl=validation)
    run = build(settings)
    tried = limit_memory(run, monkeypatch, 2)
    make_trainer(run).run()
    assert tried == [4, *[2] * 4, *[2] * 2]  # the last two are the validation rows
    (state,) = map(State, find_states(settings.output_dir))
    assert state.record["num_parts"] == 2
    run = build(settings_for(num_epochs=2, validation_jsonl=validation))
    tried = limit_memory(run, monkeypatch, 2)
    make_trainer(run).run()
    assert tried == [*[2] * 4, *[2] * 2]


def test_validation_out_of_memory_is_repeated_in_smaller_parts(
    settings_for: Callable,
    write_jsonl: Callable,
    demo_rows: list,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where only a validation batch is too large: the same figures, and training goes on in its mode."""
    settings = settings_for(num_epochs=1, validation_jsonl=write_jsonl(demo_rows[-4:], "valid.jsonl"))
    trainer = make_trainer(build(settings))
    wanted = trainer.validator.evaluate(trainer.stepper.module)
    tried = limit_memory(trainer.stepper, monkeypatch, 2)
    found = trainer._validate()
    assert tried == [4, 2, 2] and trainer.stepper.num_parts == 2
    assert flat(found) == pytest.approx(flat(wanted), rel=1e-6)
    assert trainer.stepper.module.training
    said = capsys.readouterr().out
    assert "the validation is repeated with at most 2 rows at a time" in said and "the step is" not in said


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "num_tries", "advice"),
    [
        (1, 2, 1, "micro-batches of 1 rows (2 a step). Set MEMORY_PROFILE=auto, "),
        (3, 2, 3, "micro-batches of 1 rows (8 a step). Set MEMORY_PROFILE=auto, "),
        (16, 1, 4, "micro-batches of 2 rows (8 a step). Set BATCH_SIZE=1 with GRADIENT_ACCUMULATION_STEPS=16; "),
    ],
)
def test_where_nothing_helps_the_settings_are_named(
    settings_for: Callable,
    batch_size: int,
    accumulation: int,
    num_tries: int,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = build(settings_for(num_rows=16, batch_size=batch_size, gradient_accumulation_steps=accumulation))
    tried = limit_memory(run, monkeypatch, 0)
    with pytest.raises(UserError) as stopped:
        make_trainer(run).run()
    assert len(tried) == num_tries <= MAX_HALVINGS + 1
    assert str(stopped.value).startswith(f"the GPU's memory does not suffice for {advice}")
    assert "REPLACE_LAST_N_LAYERS=2 ADD_NEW_LAYERS=4 FREEZE_ORIGINAL_LAYERS=true" in str(stopped.value)
    assert all(parameter.grad is None for parameter in run.objective.parameters())


def test_no_room_for_the_moments(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(build(settings_for()))

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.stepper._prepared_optimizer, "step", full)
    with pytest.raises(UserError, match="the GPU's memory does not suffice for micro-batches of 4 rows"):
        trainer.run()


def test_the_gpu_cache_is_not_touched_on_a_cpu(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    stepper = types.SimpleNamespace(
        optimizer=types.SimpleNamespace(zero_grad=lambda: None),
        accelerator=types.SimpleNamespace(device=torch.device("cpu")),
        num_parts=1,
        settings=settings_for(),
        _micro_batches=lambda: (2, 4),
    )
    Stepper.halve(stepper, "the step")
    assert (stepper.num_parts, emptied) == (2, [])
    stepper.accelerator.device = torch.device("cuda")
    Stepper.halve(stepper, "the step")
    assert (stepper.num_parts, emptied) == (4, [1])


# ------------------------------------------------------------------------------------------------------- the scaler


class FakeScaler:
    """Of fp16: halves its scale when a step had infinities, doubles it now and then."""

    def __init__(self, scale: float, after: float) -> None:
        self.scale, self.after, self.num_read = scale, after, 0

    def get_scale(self) -> float:
        self.num_read += 1
        return self.scale


def stepper_with(scaler: FakeScaler | None, is_fused: bool = True) -> Any:
    """What ``_update`` and ``_counts_as_bad`` need of a stepper."""
    stepper = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(scaler=scaler), num_steps=0, _scale=None,
        optimizer=types.SimpleNamespace(_step_supports_amp_scaling=is_fused),
    )  # fmt: skip

    def step() -> None:
        stepper.num_steps += 1
        if scaler:
            scaler.scale = scaler.after

    stepper._step_optimizer = step
    return stepper


@pytest.mark.parametrize(
    ("before", "after", "goes_on", "counts"),
    [
        (65536.0, 65536.0, True, False),
        (65536.0, 131072.0, True, False),
        (65536.0, 32768.0, False, False),  # it is still finding its scale: no fault of the rows
        (2.0, 1.0, False, True),
        (1.0, 0.5, False, True),  # no scale helps
    ],
)
def test_a_scaler_that_finds_its_scale(before: float, after: float, goes_on: bool, counts: bool) -> None:
    """The schedule waits while steps are left out for the scale."""
    stepper = stepper_with(FakeScaler(before, after))
    assert Stepper._update(stepper, torch.tensor(not goes_on)) == goes_on
    assert Stepper._counts_as_bad(stepper) == counts
    assert stepper.num_steps == 1 and not hasattr(stepper.optimizer, "found_inf")


def test_the_scale_is_read_once_a_step() -> None:
    """Each time the host waits for the device; the scale before the first step must be read as well."""
    scaler = FakeScaler(4.0, 2.0)
    stepper = stepper_with(scaler)
    goes_on = []
    for scaler.after in (2.0, 2.0, 4.0, 1.0):
        goes_on.append(Stepper._update(stepper, torch.tensor(False)))
        Stepper._counts_as_bad(stepper)
    assert goes_on == [False, True, True, False]
    assert scaler.num_read == 1 + 4


@pytest.mark.parametrize("is_bad", [False, True])
def test_without_a_scaler_the_optimizer_is_told(is_bad: bool) -> None:
    stepper = stepper_with(None)
    assert Stepper._update(stepper, torch.tensor(is_bad)) is True
    assert (stepper.optimizer.grad_scale, stepper.optimizer.found_inf.item()) == (None, float(is_bad))
    assert stepper.num_steps == 1 and Stepper._counts_as_bad(stepper)


@pytest.mark.parametrize("is_bad", [False, True])
def test_an_optimizer_that_cannot_be_told_is_left_alone(is_bad: bool) -> None:
    """The schedule goes on all the same, as it does with the one that can."""
    stepper = stepper_with(None, is_fused=False)
    assert Stepper._update(stepper, torch.tensor(is_bad)) is True
    assert stepper.num_steps == (0 if is_bad else 1) and not hasattr(stepper.optimizer, "found_inf")


def test_skips_count_in_a_row_over_several_readings() -> None:
    skips = Skips(torch.device("cpu"))
    for line, is_bad in enumerate([1, 1, 0, 1, 1, 1]):
        skips.note(torch.tensor(bool(is_bad)), [line])
    assert skips.read() == (5, 3)
    assert skips.recent_lines() == [0, 1, 3, 4, 5]
    for line in (6, 7):
        skips.note(torch.tensor(True), [line])
    assert skips.read() == (2, 5)
    skips.note(torch.tensor(False), [8])
    assert skips.read() == (0, 5)
    assert skips.read() == (0, 0)


# ----------------------------------------------------------------------------------------------------------- window


def test_frames_of_before_the_stop_are_in_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are means over all steps of the window, frames_per_second count from the start of the clock."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr("finetuning.stepping.time.perf_counter", lambda: clock.now)
    accelerator = types.SimpleNamespace(device=torch.device("cpu"), reduce=lambda tensor, reduction: tensor)
    window = Window(accelerator)
    clock.now = 200.0
    window.resume_from(torch.tensor([60.0, 900.0, 30.0, 15 * 300.0]), torch.tensor(7.0))
    assert math.isnan(window.figures(1.0)["frames_per_second"]), "no step yet"
    assert math.isnan(window.seconds_per_step) and window.figures(1.0)["grad_norm"] == 7.0
    window.add(Sums(torch.tensor([20.0, 600.0, 10.0, 15 * 40.0], dtype=torch.float64), torch.tensor(3.0)))
    clock.now = 202.0
    figures = window.figures(0.5)
    assert figures["frames_per_second"] == pytest.approx(40 / 2)
    assert (figures["talker_loss"], figures["sub_talker_loss"]) == pytest.approx((80 / 40, 1500 / (15 * 340)))
    assert figures["grad_norm"] == 3.0 and window.seconds_per_step == pytest.approx(2.0)
    assert window.totals.tolist() == [80.0, 1500.0, 40.0, 15 * 340.0]


# --------------------------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize(
    ("scaling", "rate", "text"),
    [
        ("none", 1e-3, "learning rate 0.001"),
        ("linear", 4e-3, "learning rate 0.004 (0.001 for 2, linear scaling)"),
        ("sqrt", 2e-3, "learning rate 0.002 (0.001 for 2, sqrt scaling)"),
    ],
)
def test_the_rate_grows_with_the_rows_of_a_step(settings_for: Callable, scaling: str, rate: float, text: str) -> None:
    """Eight rows a step where the rate was chosen for two."""
    settings = settings_for(lr_scaling=scaling, lr_scaling_base_batch_size=2, num_epochs=1)
    assert describe_batch(settings, 1) == f"Batch: 8 rows a step = 4 x 2 micro-batches x 1 process(es); {text}"
    trainer = make_trainer(build(settings))
    assert [group["lr"] for group in trainer.stepper.optimizer.param_groups] == pytest.approx([rate] * 2)
    trainer.run()
    assert read_log(settings)[0]["learning_rate"] == pytest.approx(rate)


def test_the_rate_of_several_processes(settings_for: Callable) -> None:
    settings = settings_for(lr_scaling="linear", lr_scaling_base_batch_size=8)
    assert describe_batch(settings, 4) == (
        "Batch: 32 rows a step = 4 x 2 micro-batches x 4 process(es); learning rate 0.004 (0.001 for 8, linear scaling)"
    )


# ------------------------------------------------------------------------------------------------------ damaged rows


def test_a_row_that_cannot_be_read_is_left_out_and_listed(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of the step is the mean over the other rows."""
    read = Manifest.__getitem__

    def damaged(self: Manifest, index: int) -> dict[str, Any]:
        row = read(self, index)
        if row["line"] == 3:
            raise OSError("Invalid IPC\nmessage")
        return row

    settings = settings_for(num_epochs=1)
    run = build(settings)
    monkeypatch.setattr(Manifest, "__getitem__", damaged)
    trainer = make_trainer(run)
    trainer.run()
    monkeypatch.undo()
    assert trainer.progress.num_skipped_rows == 1
    (skipped,) = read_log(settings, "skipped_rows.jsonl")
    assert {key: skipped[key] for key in ("step", "line", "reason")} == {
        "step": 1, "line": 3, "reason": "Invalid IPC message",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("skipped line 3 of the training rows: Invalid IPC message") == 1
    (record,) = read_log(settings)
    rows = [index for index in range(8) if run.train.dataset.manifest[index]["line"] != 3]
    fresh = build(settings_for(num_epochs=1, resume="never", overwrite_output=True))
    batch = fresh.train.dataset.batch(rows)
    with torch.no_grad():
        sums = fresh.objective(batch)
    frames = len(batch["codes"])
    assert record["talker_loss"] == pytest.approx(sums["talker_loss"].item() / (frames + len(rows)), rel=1e-5)
    assert record["sub_talker_loss"] == pytest.approx(sums["sub_talker_loss"].item() / (15 * frames), rel=1e-5)


def test_a_resumed_run_lists_a_row_once(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data workers had read it, and died, before its step was taken; the numbers come out of the state."""

    from finetuning.errors import Stopped

    read = Manifest.__getitem__

    def damaged(self: Manifest, index: int) -> dict[str, Any]:
        row = read(self, index)
        if row["line"] in (2, 5, 8, 11):
            raise OSError("damaged")
        return row

    monkeypatch.setattr(Manifest, "__getitem__", damaged)
    settings = settings_for(num_rows=12, batch_size=2, gradient_accumulation_steps=1, num_epochs=1, num_workers=2)
    trainer = make_trainer(build(settings))
    signal_in_step(trainer, 3)
    with pytest.raises(Stopped):
        trainer.run()
    trainer = make_trainer(build(settings))
    trainer.run()
    assert sorted(record["line"] for record in read_log(settings, "skipped_rows.jsonl")) == [2, 5, 8, 11]
    assert trainer.progress.num_skipped_rows == 4
