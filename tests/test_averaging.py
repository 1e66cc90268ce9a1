"""EMA_DECAY: the average by hand, in the weights' place only while they are validated and exported."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import load_stock
from safetensors.torch import load_file
from torch import nn
from training import FULL, build, make_trainer

from benchmarks.peak_memory import BaseOnPaper
from benchmarks.random_base import base_config
from finetuning import stepping
from finetuning.averaging import Average
from finetuning.checkpoint import CODEC_TABLE
from finetuning.errors import Stopped
from finetuning.memory import Needs
from finetuning.saving import state_bytes
from finetuning.state import State, find_states

pytestmark = pytest.mark.usefixtures("one_thread")

DECAY = 0.6
LAYERS = {"replace_last_n_layers": 1, "add_new_layers": 0, "freeze_original_layers": True}
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    """One step an epoch, six epochs; every one is validated and saved as ``last/``."""

    def make(**fields: Any) -> Any:
        defaults = {
            "train_jsonl": write_jsonl(demo_rows[:2]), "validation_jsonl": write_jsonl(demo_rows[-2:], "valid.jsonl"),
            "batch_size": 2, "gradient_accumulation_steps": 1, "num_epochs": 6, "logging_steps": 1, "save_steps": 99,
            "learning_rate": 1e-3, "warmup_steps": 0, "ema_decay": DECAY, "resume": "auto",
        }  # fmt: skip
        return make_settings(**(LAYERS | defaults | fields))

    return make


def copies(tensors: Any) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors}


def weights_of(module: nn.Module) -> Tensors:
    return copies((name, one) for name, one in module.named_parameters() if one.requires_grad)


def by_hand(history: list[Tensors], decay: float) -> Tensors:
    """From the weights of the start and after each step, in float64."""
    averages = {name: weight.double() for name, weight in history[0].items()}
    for number, weights in enumerate(history[1:]):
        share = min(decay, (1 + number) / (10 + number))
        averages = {name: share * average + (1 - share) * weights[name].double() for name, average in averages.items()}
    return averages


def train_and_note(trainer: Any) -> list[Tensors]:
    """The weights at the start and after each step."""
    history, take = [weights_of(trainer.stepper.module)], trainer.stepper.take

    def noted(*arguments: Any) -> Any:
        sums = take(*arguments)
        history.append(weights_of(trainer.stepper.module))
        return sums

    trainer.stepper.take = noted
    trainer.run()
    return history


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adafactor": {"optimizer": "adafactor"},  # the host waits to know whether a step is good
    "full, bf16 weights": FULL | {"weights_precision": "bf16", "mixed_precision": "bf16"},
    "adapters": {"lora_rank": 4, "replace_last_n_layers": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_the_average_by_hand(settings_for: Callable, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In float32, of everything that trains; what never moved is in it bit for bit."""
    if "bf16" in case:
        pytest.importorskip("torchao")
    trainer = make_trainer(build(settings_for(**CASES[case])))
    history = train_and_note(trainer)
    average, wanted = trainer.stepper.average, by_hand(history, DECAY)
    assert len(history) == 7 and average.num_updates == 6
    assert average.tensors.keys() == wanted.keys() == history[0].keys()
    for name, tensor in average.tensors.items():
        assert tensor.dtype is torch.float32
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-7)
        still = torch.stack([weights[name] == history[0][name] for weights in history]).all(0)
        assert torch.equal(tensor[still], history[0][name].float()[still])
    moved = [name for name, weight in history[-1].items() if not torch.equal(weight.float(), average.tensors[name])]
    assert len(moved) > len(wanted) / 2
    assert "EMA_DECAY=0.6: validation and all checkpoints take the average of the weights" in capsys.readouterr().out


def test_training_itself_is_not_changed(settings_for: Callable) -> None:
    results = []
    for decay in (0.0, DECAY):
        trainer = make_trainer(build(settings_for(ema_decay=decay, output_dir=settings_for().output_dir / str(decay))))
        history = train_and_note(trainer)
        log = (trainer.settings.output_dir / "training_log.jsonl").read_text().splitlines()
        results.append((history[-1], [json.loads(line)["loss"] for line in log]))
        assert (trainer.stepper.average is None) == (decay == 0)
    assert results[0][1] == results[1][1]
    assert all(torch.equal(tensor, results[1][0][name]) for name, tensor in results[0][0].items())


@pytest.mark.parametrize("case", ["adamw", "adafactor"])
def test_a_step_that_was_skipped_is_not_averaged(
    settings_for: Callable, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(build(settings_for(**CASES[case])))
    clip, seen = stepping.clip_gradients, []

    def poisoned(accelerator: Any, parameters: Any, max_norm: float) -> Any:
        parameters = list(parameters)
        if len(seen) in (0, 3):
            next(one for one in parameters if one.grad is not None).grad.fill_(torch.nan)
        seen.append(copies(trainer.stepper.average.tensors.items()))
        return clip(accelerator, parameters, max_norm)

    monkeypatch.setattr(stepping, "clip_gradients", poisoned)
    history = train_and_note(trainer)
    assert trainer.stepper.average.num_updates == 4
    for number in (0, 3):
        assert all(torch.equal(tensor, seen[number][name]) for name, tensor in seen[number + 1].items())
    wanted = by_hand([history[number] for number in (0, 2, 3, 5, 6)], DECAY)
    for name, tensor in trainer.stepper.average.tensors.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------- in their place


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.small, self.frozen = nn.Linear(8, 5), nn.Linear(5, 3).bfloat16(), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


def moved_net() -> tuple[Net, Average]:
    net = Net()
    average = Average(net, 0.5)
    for _ in range(3):
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape))
        average.update(torch.tensor(False))
    return net, average


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError])
def test_weights_and_average_come_back_bit_for_bit(error: type[BaseException] | None) -> None:
    net, average = moved_net()
    places = {name: one.data_ptr() for name, one in net.named_parameters()}
    frozen, weights, averages = copies(net.frozen.named_parameters()), weights_of(net), copies(average.tensors.items())
    try:
        with average.in_place():
            inside = weights_of(net)
            if error:
                raise error("no more")
    except BaseException as raised:
        assert type(raised) is error
    for name, tensor in averages.items():
        assert torch.equal(inside[name], tensor.to(inside[name].dtype)), "bf16 weights show it rounded"
        assert not torch.equal(inside[name], weights[name])
        assert torch.equal(average.tensors[name], tensor)
    after = weights_of(net)
    assert {after[name].dtype for name in after} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    assert places == {name: one.data_ptr() for name, one in net.named_parameters()}, "an optimizer knows them"
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in net.frozen.named_parameters())


def test_no_room_in_the_middle_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetuning import averaging

    net, average = moved_net()
    weights, averages, put_in, calls = weights_of(net), copies(average.tensors.items()), averaging._put_in, []

    def fails(*tensors: torch.Tensor) -> Any:
        calls.append(tensors)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return put_in(*tensors)

    monkeypatch.setattr(averaging, "_put_in", fails)
    with pytest.raises(torch.OutOfMemoryError), average.in_place():
        raise AssertionError("never reached")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(net).items())
    assert all(torch.equal(tensor, averages[name]) for name, tensor in average.tensors.items())


# ------------------------------------------------------------------------------------------------- in a run


def test_checkpoints_and_validation_are_of_the_average(settings_for: Callable) -> None:
    """``last/`` and ``checkpoint-N/`` hold it, stock loads it, the figures are of it; the state holds the weights."""
    settings = settings_for(save_steps=6, **FULL)
    run = build(settings)
    trainer = make_trainer(run)
    history = train_and_note(trainer)
    averages = trainer.stepper.average.tensors
    rows = list(run.speakers.codec_rows)
    for folder in ("last", "checkpoint-6"):
        exported = load_file(settings.output_dir / folder / "model.safetensors")
        assert load_stock(settings.output_dir / folder)
        for name, average in averages.items():
            want = average.clone()
            if name == CODEC_TABLE:
                want[rows] = exported[name][rows]
            assert torch.equal(exported[name], want.to(exported[name].dtype)), name
        record = json.loads((settings.output_dir / folder / "training_state.json").read_text())
        assert record["ema_decay"] == DECAY
    state = State(find_states(settings.output_dir)[0])
    assert state.step == 6
    for name, weight in history[-1].items():
        assert torch.equal(state[f"weights.{name}"], weight) and torch.equal(state[f"ema.{name}"], averages[name])
    log = [json.loads(line) for line in (settings.output_dir / "validation_log.jsonl").read_text().splitlines()]
    own = trainer.validator.evaluate(run.objective)["loss"]
    with torch.no_grad():
        for name, parameter in run.objective.named_parameters():
            if name in averages:
                parameter.copy_(averages[name])
    assert log[-1]["loss"] == trainer.validator.evaluate(run.objective)["loss"] != own


def test_the_adapter_alone_is_averaged_too(settings_for: Callable) -> None:
    settings = settings_for(lora_rank=4, lora_dropout=0.0, replace_last_n_layers=1)
    trainer = make_trainer(build(settings))
    trainer.run()
    averages, folder = trainer.stepper.average.tensors, settings.output_dir / "last" / "adapter"
    matrices, others = load_file(folder / "adapter_model.safetensors"), load_file(folder / "trained.safetensors")
    for name, average in averages.items():
        in_file = f"base_model.model.{name.replace('.default', '')}"
        found = matrices[in_file] if ".lora_" in name else others[name]
        assert torch.equal(found, average.to(found.dtype)), name


def test_a_validation_that_is_cut_off_gives_the_weights_back(settings_for: Callable) -> None:
    """By a signal inside of it: what is saved then goes on as if nothing had been."""
    settings = settings_for()
    trainer = make_trainer(build(settings))
    evaluate, results = trainer.validator.evaluate, []

    def cut_off(objective: Any, num_parts: int, should_stop: Callable[[], bool]) -> Any:
        if trainer.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        results.append(evaluate(objective, num_parts, should_stop))
        return results[-1]

    trainer.validator.evaluate = cut_off
    with pytest.raises(Stopped):
        trainer.run()
    assert [result is None for result in results] == [False, True]
    state = State(find_states(settings.output_dir)[0])
    for name, weight in weights_of(trainer.stepper.module).items():
        assert torch.equal(state[f"weights.{name}"], weight)
        assert not torch.equal(state[f"ema.{name}"], weight)


def test_what_it_takes(settings_for: Callable) -> None:
    """On disk as much as is said; in memory four bytes a weight that trains."""
    settings = settings_for(num_epochs=1, save_steps=1)
    trainer = make_trainer(build(settings))
    trainer.run()
    state = State(find_states(settings.output_dir)[0])
    names = [name for name in state.names("") if name.startswith(("weights.", "optimizer.exp_avg", "ema.talker."))]
    model = trainer.saver.exporter.model
    assert state_bytes(model, settings.ema_decay) == sum(state[name].nbytes for name in names) > state_bytes(model)
    base = BaseOnPaper(base_config("1.7b"))
    plain, averaged = (Needs.of(base, settings_for(ema_decay=decay)) for decay in (0.0, 0.999))
    num_trained = sum(weight.size for weight in plain.weights if weight.trains)
    assert averaged.standing_bytes - plain.standing_bytes == 4 * num_trained
    assert averaged.peak_bytes() - plain.peak_bytes() == pytest.approx(4 * num_trained)
