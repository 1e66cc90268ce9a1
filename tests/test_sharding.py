"""Preparing for one process, the parts that FSDP gives each process, and that no parameter is ever left unused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import SHAPES
from reference import load_stock
from safetensors.torch import load_file
from two_processes import Life, launch, toy, toy_loss, toy_optimizer

from finetuning.base_model import load_tokenizer
from finetuning.dataset import RowEncoder, collate, count_tokens
from finetuning.layer_utils import replace_and_add_layers
from finetuning.objective import TrainingObjective, step_loss
from finetuning.prompt import LayoutIds
from finetuning.sharding import (
    accumulating,
    asks_for_fsdp,
    averaging,
    clip_gradients,
    full_tensor,
    is_sharded,
    local_part,
    prepare,
)
from finetuning.tiny_model import embedded_model_folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


# ---------------------------------------------------------------------------------------- no parameter without gradient


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest) -> Path:
    return embedded_model_folder(request.param)


@pytest.fixture(params=[(0, 0, False), (2, 4, True), (0, 1, True), (1, 0, True), (2, 4, False)], ids=str)
def objective(request: pytest.FixtureRequest, folder: Path) -> TrainingObjective:
    """Full fine-tuning and new layers."""
    model = load_stock(folder).model
    replace_and_add_layers(model, *request.param, verbose=False)
    vectors = torch.randn(1, model.config.talker_config.hidden_size, generator=torch.Generator().manual_seed(1))
    return TrainingObjective(model.talker, vectors)


@pytest.fixture(scope="module")
def batch(folder: Path) -> dict[str, torch.Tensor]:
    """A micro-batch of the smallest kind: one row of two frames, without language or instruction."""
    ids = LayoutIds.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    encoder = RowEncoder(load_tokenizer(folder), ids, {"anna": 0}, {})
    codes = np.random.default_rng(0).integers(0, 2048, (2, 16))
    row = {"text": "Yes.", "language": "Auto", "speaker": "anna", "instruct": None, "codes": codes}
    return collate([encoder.encode(row)], [0], [1])


def test_every_trained_parameter_gets_a_gradient(objective: TrainingObjective, batch: dict) -> None:
    """In every micro-batch, so that no process waits for a gradient that will not come: also with
    SUB_TALKER_LOSS_WEIGHT=0, and in the weight-0 batch of a process without rows, whose gradient is all zeros."""
    counts = count_tokens([batch])
    for sub_talker_weight, batch_weight in ((0.3, 1.0), (0.0, 1.0), (0.3, 0.0), (0.0, 0.0)):
        objective.zero_grad()
        (step_loss(objective(batch), *counts, sub_talker_weight) * batch_weight).backward()
        trained = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
        assert not [name for name, gradient in trained.items() if gradient is None]
        assert all(not gradient.any() for gradient in trained.values()) == (batch_weight == 0)
        assert not [name for name, p in objective.named_parameters() if not p.requires_grad and p.grad is not None]


# ---------------------------------------------------------------------------------------------------------- one process


def test_only_a_launch_with_fsdp_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert not asks_for_fsdp()
    for value, asks in (("true", True), ("True", True), ("1", True), ("false", False), ("", False)):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
        assert asks_for_fsdp() == asks


def test_one_process_shards_nothing(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when it asks: there is nobody to share with."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    module = toy()
    prepared, optimizer = prepare(accelerator, module, toy_optimizer)
    assert prepared is module and not is_sharded(prepared)
    assert isinstance(optimizer.optimizer, torch.optim.AdamW)
    weight = module[0].weight
    assert full_tensor(weight) is weight
    assert local_part(weight, like=weight) is weight


def test_a_step_with_a_bad_gradient_changes_nothing(accelerator: Accelerator) -> None:
    """Neither the weights nor Adam's state, on the word of a tensor that may lie on a device."""
    module, optimizer = prepare(accelerator, toy(), toy_optimizer)
    states = []
    for factor in (1.0, torch.nan, torch.inf, 1.0):
        (toy_loss(module, 0, 0) * factor).backward()
        norm = clip_gradients(accelerator, module.parameters(), 0.5)
        optimizer.optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad()
        adam = [value for state in optimizer.optimizer.state.values() for value in state.values()]
        states.append(torch.cat([tensor.detach().flatten() for tensor in (*module.parameters(), *adam)]))
    assert torch.equal(states[1], states[0]) and torch.equal(states[2], states[0])
    assert not torch.equal(states[3], states[0])


# ----------------------------------------------------------------------------------------------- a toy in two processes


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What each of two processes saw in ``two_processes.toy_steps``."""
    folder = tmp_path_factory.mktemp("parts")
    launch(folder, [Life("toy")])
    return [load_file(folder / "toy" / f"parts-{rank}.safetensors") for rank in range(2)]


def under(seen: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in seen.items() if name.startswith(f"{prefix}/")}


def test_shards_are_rows_in_the_order_of_the_processes(parts: list) -> None:
    """So a resume state may put them together along dimension 0; uneven and empty ones too."""
    whole = dict(toy().named_parameters())
    shards = [under(seen, "shard") for seen in parts]
    for name, parameter in whole.items():
        assert torch.equal(torch.cat([shard[name] for shard in shards]), parameter)
    assert [[len(shard[name]) for shard in shards] for name in ("0.weight", "2.weight", "3.bias")] == [
        [2, 1], [1, 0], [3, 2],
    ]  # fmt: skip


def test_a_local_part_is_what_the_process_holds(parts: list) -> None:
    for seen in parts:
        for name, shard in under(seen, "shard").items():
            assert torch.equal(seen[f"part/{name}"], shard.double())
            assert torch.equal(seen[f"regathered/{name}"], seen[f"weights/{name}"].double())
            assert seen[f"storage/{name}"] == shard.numel() * 8  # and not the whole tensor behind a view
            start, stop = seen[f"rows/{name}"]
            assert stop - start == len(shard)


def test_sharded_gradients_are_means_over_the_processes(parts: list) -> None:
    """Accumulated over two micro-batches, synchronised in the second; clipped by the norm of the whole."""
    module = toy()
    sum(toy_loss(module, process, micro_batch) / 2 for process in range(2) for micro_batch in range(2)).backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    clipped = {name: p.grad.clone() for name, p in module.named_parameters()}
    toy_optimizer(module).step()
    assert norm > 1
    for seen in parts:
        torch.testing.assert_close(under(seen, "gradients"), gradients)
        torch.testing.assert_close(seen["norm"], norm)
        torch.testing.assert_close(under(seen, "clipped"), clipped)
        torch.testing.assert_close(under(seen, "after_good"), dict(module.named_parameters()), check_stride=False)


def test_a_bad_gradient_of_one_process_skips_the_step_of_all(parts: list) -> None:
    momentum = under(parts[0], "momentum_after_bad")
    for seen in parts:
        assert not torch.isfinite(seen["bad_norm"])
        assert seen["num_steps"] == 1
        for name, weight in under(seen, "after_good").items():
            assert torch.equal(seen[f"after_bad/{name}"], weight)
            torch.testing.assert_close(momentum[name], 0.1 * seen[f"clipped/{name}"])  # of the good step alone


def test_the_scaler_of_fp16_sees_an_infinity_in_any_shard(parts: list) -> None:
    for seen in parts:
        assert seen["scale"] == 4.0  # halved from 8
        for name, weight in under(seen, "after_bad").items():
            assert torch.equal(seen[f"after_scaler/{name}"], weight)


def test_processes_synchronise_in_the_last_micro_batch_only(parts: list) -> None:
    """Before it a DDP process has the gradient of its own rows, and a sharded one none that is shared yet."""
    for process, seen in enumerate(parts):
        module = toy()
        toy_loss(module, process, 0).backward()
        own = {name: p.grad for name, p in module.named_parameters()}
        torch.testing.assert_close(under(seen, "copied_gradients/0"), own)
        torch.testing.assert_close(under(seen, "copied_gradients/1"), under(seen, "gradients"))
        assert [int(seen[f"num_sharded_gradients/{number}"]) for number in range(2)] == [0, len(own)]


def test_one_process_accumulates_without_a_wrapper() -> None:
    module = toy()
    with accumulating(module):
        toy_loss(module, 0, 0).backward()
        loss = toy_loss(module, 0, 1)
    with averaging(module):
        loss.backward()
    want = toy()
    (toy_loss(want, 0, 0) + toy_loss(want, 0, 1)).backward()
    torch.testing.assert_close(module[0].weight.grad, want[0].weight.grad)
