"""Each optimizer against an independent calculation; rounding that is right on average; runs that fail and resume."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT
from test_resume import assert_same, result, stop_at
from torch import nn
from torchao.optim.subclass_8bit import OptimState8bit
from training import FULL, before_each_step, build, make_trainer
from transformers.optimization import Adafactor

from finetuning import starting
from finetuning.errors import UserError
from finetuning.optimizers import check_optimizer, keep_matrices_in_bf16, make_optimizer
from finetuning.small_adamw import SmallAdamW
from finetuning.state import training_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, DECAY = 0.01, 0.1
IN_BF16 = {"weights_precision": "bf16", "mixed_precision": "bf16"}
#: What is not the plain AdamW.
UNUSUAL: dict[str, dict[str, str]] = {
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "adamw, bf16 weights": IN_BF16,
    "adamw_8bit, bf16 weights": {"optimizer": "adamw_8bit", **IN_BF16},
}


class Net(nn.Module):
    """A matrix that is large enough for 8 bits, a vector, an embedding, and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.table, self.frozen = nn.Linear(64, 96), nn.Embedding(16, 256), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)


def trained_in(net: Net) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def gradients(net: Net, num_steps: int) -> list[dict[str, torch.Tensor]]:
    """Of each step; sizes differ between weights by factors of a hundred, as real ones do."""
    generator = torch.Generator().manual_seed(1)

    def one(parameter: nn.Parameter) -> torch.Tensor:
        sizes = 10 ** (0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        return sizes * (0.5 + torch.randn(parameter.shape, generator=generator))

    return [{name: one(parameter) for name, parameter in trained_in(net).items()} for _ in range(num_steps)]


def take_steps(net: Net, optimizer: torch.optim.Optimizer, steps: list[dict[str, torch.Tensor]]) -> None:
    for step in steps:
        for name, parameter in trained_in(net).items():
            parameter.grad = step[name].to(parameter.dtype)
        optimizer.step()


def decay_of(name: str) -> float:
    return DECAY if name == "linear.weight" else 0.0


# ------------------------------------------------------------------------------------------------------- the updates


def adamw(weight: torch.Tensor, steps: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Algorithm 2 of arXiv 1711.05101, in float64."""
    weight = weight.double()
    first = second = torch.zeros_like(weight)
    for number, gradient in enumerate(map(torch.Tensor.double, steps), 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9**number) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
        weight = weight - RATE * (update + decay * weight)
    return weight


def adafactor(weight: torch.Tensor, steps: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Algorithms 4 and 5 of arXiv 1804.04235 with a fixed rate, no relative step and no momentum, in float64."""
    weight, second = weight.double(), None
    for number, gradient in enumerate(map(torch.Tensor.double, steps), 1):
        squares, keep = gradient**2 + 1e-30, 1 - number**-0.8
        if weight.ndim == 2:  # the rows' and the columns' sums stand for all of it
            sums = [keep * old + (1 - keep) * squares.sum(1 - axis) for axis, old in enumerate(second or (0.0, 0.0))]
            second, estimate = sums, torch.outer(*sums) / sums[0].sum()
        else:
            second = estimate = squares if second is None else keep * second + (1 - keep) * squares
        update = gradient / estimate.sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        weight = weight - RATE * (update + decay * weight)
    return weight


@pytest.mark.parametrize(
    ("optimizer", "formula", "limits"),
    [
        ("adamw", adamw, {"linear.weight": 1e-5, "linear.bias": 1e-5, "table.weight": 1e-5}),
        ("adafactor", adafactor, {"linear.weight": 1e-5, "linear.bias": 1e-5, "table.weight": 1e-5}),
        # Codes lie up to a tenth apart; without the right moments it would be off by more than 1.
        ("adamw_8bit", adamw, {"linear.weight": 0.1, "linear.bias": 1e-5, "table.weight": 1e-5}),
    ],
)
def test_updates_are_those_of_the_papers(
    make_settings: Callable, optimizer: str, formula: Callable, limits: dict[str, float]
) -> None:
    """How far the weights moved; LEARNING_RATE means the same for all. Only matrices decay."""
    net = Net()
    before = {name: parameter.detach().clone() for name, parameter in trained_in(net).items()}
    steps = gradients(net, 5)
    take_steps(net, make_optimizer(make_settings(optimizer=optimizer, weight_decay=DECAY), net, RATE), steps)
    for name, parameter in trained_in(net).items():
        wanted = formula(before[name], [step[name] for step in steps], decay_of(name)) - before[name]
        assert (parameter - before[name] - wanted).norm() / wanted.norm() < limits[name], name
        assert RATE < wanted.square().mean().sqrt() <= 5.01 * RATE, name


def test_bf16_weights_are_updated_as_fp32_ones_before_they_are_rounded(make_settings: Callable) -> None:
    """torchao's AdamW without 8 bits: what stays fp32 is updated exactly, matrices in bf16 to within a rounding."""
    net = Net()
    keep_matrices_in_bf16(net)
    before = {name: parameter.detach().clone() for name, parameter in trained_in(net).items()}
    step = {name: gradient.bfloat16().float() for name, gradient in gradients(net, 1)[0].items()}
    take_steps(net, make_optimizer(make_settings(weight_decay=DECAY, **IN_BF16), net, RATE), [step])
    for name, parameter in trained_in(net).items():
        wanted = adamw(before[name], [step[name]], decay_of(name))
        limit = 2.0**-7 if parameter.dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(parameter.double(), wanted, rtol=limit, atol=1e-6)


def test_moments_in_8_bits_take_a_quarter(make_settings: Callable) -> None:
    net = Net()
    optimizer = make_optimizer(make_settings(optimizer="adamw_8bit"), net, RATE)
    take_steps(net, optimizer, gradients(net, 1))
    for key in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[net.linear.weight][key]
        assert isinstance(moment, OptimState8bit)
        assert moment.codes.nbytes + moment.scale.nbytes < 1.02 * net.linear.weight.numel()
        for parameter in (net.linear.bias, net.table.weight):
            assert type(optimizer.state[parameter][key]) is torch.Tensor


def test_the_usual_optimizer_is_the_fused_one(make_settings: Callable) -> None:
    optimizer = make_optimizer(make_settings(), Net(), RATE)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]


@pytest.mark.parametrize("fields", UNUSUAL.values(), ids=UNUSUAL)
def test_rates_stay_numbers(make_settings: Callable, fields: dict[str, str]) -> None:
    """As schedules, logs and states expect them; a changed one counts."""
    net = Net()
    optimizer = make_optimizer(make_settings(**fields), net, RATE)
    assert [group["lr"] for group in optimizer.param_groups] == [RATE, RATE]
    before = net.linear.weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take_steps(net, optimizer, gradients(net, 1))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert torch.equal(net.linear.weight, before)


# ------------------------------------------------------------------------------------------------- weights in bf16


def test_matrices_that_train_become_bf16(make_settings: Callable) -> None:
    net = Net()
    wanted = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    keep_matrices_in_bf16(net)
    for name, parameter in net.named_parameters():
        dtype = torch.bfloat16 if name in ("linear.weight", "table.weight") else torch.float32
        assert parameter.dtype is dtype and torch.equal(parameter, wanted[name].to(dtype)), name


def constant_weights(value: float, seed: int = 0, in_8_bits: bool = False) -> tuple[nn.Parameter, SmallAdamW]:
    weight = nn.Parameter(torch.full((256, 256), value, dtype=torch.bfloat16))
    return weight, small_adamw(weight, 1e-4, in_8_bits, seed)


def small_adamw(weight: nn.Parameter, rate: float, in_8_bits: bool, seed: int = 0) -> SmallAdamW:
    return SmallAdamW([{"params": [weight], "weight_decay": 0.0}], rate, [weight] if in_8_bits else [], seed)


def test_rounding_is_another_one_in_every_step_of_a_stage() -> None:
    """While other weights, which have had more steps, have no gradients: they stand still, and the seed does not."""
    weight, other = nn.Parameter(torch.ones(256, 256).bfloat16()), nn.Parameter(torch.ones(64, 64))
    optimizer = SmallAdamW([{"params": [weight, other], "weight_decay": 0.0}], 1e-4, [], seed=0)
    for _ in range(5):
        other.grad = torch.ones_like(other)
        optimizer.step()
    other.grad, before, moved = None, other.detach().clone(), []
    for _ in range(3):
        earlier = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved.append(weight != earlier)
    assert torch.equal(other, before) and optimizer.state[other]["step"] == 5
    assert all(one.any() and not one.all() for one in moved)
    assert not torch.equal(moved[0], moved[1]) and not torch.equal(moved[1], moved[2])


@pytest.mark.parametrize("value", [1.0, -1.0, 0.3])
@pytest.mark.parametrize("in_8_bits", [False, True])
def test_rounding_is_right_on_average(value: float, in_8_bits: bool) -> None:
    """Steps of a fortieth of the last bit. To the nearest none would move a weight; now the mean moves as in fp32."""
    weight, optimizer = constant_weights(value, in_8_bits=in_8_bits)
    exact = weight.detach().double()
    nearest = weight.detach().clone()
    for number in range(1, 21):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        nearest = (nearest.float() - 1e-4).bfloat16()
        error = (weight.double().mean() - (exact.mean() - number * 1e-4)).abs()
        assert error < 1e-4 / 2, number  # standard deviation of the mean: 1e-5 at most
    assert torch.equal(nearest.double(), exact)
    assert 0.05 < (weight.double() != exact).double().mean() < 0.95


def test_the_second_moment_of_bf16_weights_shrinks() -> None:
    """By a thousandth a step, which is less than bf16 can tell."""
    weight, optimizer = constant_weights(1.0)
    for number in range(10):
        weight.grad = torch.full_like(weight, float(number == 0))
        optimizer.step()
    moment = optimizer.state[weight]["exp_avg_sq"]
    torch.testing.assert_close(moment, torch.full_like(moment, 0.001 * 0.999**9), rtol=1e-5, atol=0)


def test_rounding_depends_on_seed_and_step_alone() -> None:
    """So it is the same in all processes; and the random numbers of everything else go on as if there were none."""

    def weights_after(num_steps: int, seed: int) -> torch.Tensor:
        weight, optimizer = constant_weights(1.0, seed)
        for _ in range(num_steps):
            weight.grad = torch.ones_like(weight)
            state = torch.get_rng_state()
            optimizer.step()
            assert torch.equal(torch.get_rng_state(), state)
        return weight.detach()

    torch.manual_seed(1)
    one, three, other_seed = weights_after(1, 0), weights_after(3, 0), weights_after(1, 2**32 - 1)
    torch.manual_seed(2)
    assert torch.equal(weights_after(1, 0), one) and torch.equal(weights_after(3, 0), three)
    assert not torch.equal(one, other_seed)
    moved, in_next = one != 1.0, three != one
    assert moved.any() and in_next.any() and not torch.equal(moved, in_next)


@pytest.mark.parametrize("in_8_bits", [False, True])
def test_rows_without_a_gradient_stay_bit_for_bit(in_8_bits: bool) -> None:
    """Of an embedding: those of presets."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 64).bfloat16())
    before = weight.detach().clone()
    optimizer = small_adamw(weight, 1e-2, in_8_bits)
    for _ in range(3):
        weight.grad = torch.randn(64, 64).bfloat16()
        weight.grad[10:20] = 0.0
        optimizer.step()
    unchanged = (weight == before).all(1)
    assert unchanged[10:20].all() and unchanged.sum() == 10


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    """Two steps an epoch of two micro-batches each, two epochs."""

    def make(**fields: Any) -> Any:
        defaults = {
            "train_jsonl": write_jsonl(demo_rows[:8]), "validation_fraction": 0.0, "batch_size": 2,
            "gradient_accumulation_steps": 2, "num_epochs": 2, "learning_rate": 3e-3, "warmup_steps": 0,
            "logging_steps": 1, "save_steps": 100, "resume": "auto",
        }  # fmt: skip
        return make_settings(**(FULL | defaults | fields))

    return make


def kept(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights and of what the optimizer keeps for them."""
    tensors = training_tensors(trainer.stepper.module, trainer.stepper.optimizer)
    return {name: tensor.clone() for name, tensor in tensors}


def trainer_with_bad_step(settings: Any, bad_step: int = 2) -> tuple[Any, dict[int, dict[str, torch.Tensor]]]:
    """A trainer, and what will have been kept before each step; one weight's gradient in the bad step is NaN."""
    trainer = make_trainer(build(settings))
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (torch.nan if max(seen) == bad_step else 1.0)

    before_each_step(trainer, lambda step: seen.update({step: kept(trainer)}))
    trainer.stepper.module.talker.model.norm.weight.register_hook(spoil)
    return trainer, seen


def different(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> list[str]:
    assert some.keys() == others.keys()
    return [name for name, tensor in some.items() if not torch.equal(tensor, others[name])]


@pytest.mark.parametrize("name", ["adafactor", "adamw, bf16 weights", "adamw_8bit, bf16 weights"])
def test_bad_steps_change_nothing_and_resumed_runs_equal_untouched_ones(
    settings_for: Callable, tmp_path: Path, name: str
) -> None:
    """The loss falls, too. Weights, moments and step counts of the resumed run are the untouched one's bit for bit."""
    fields = UNUSUAL[name]
    untouched = settings_for(output_dir=tmp_path / "untouched", **fields)
    trainer, seen = trainer_with_bad_step(untouched)
    trainer.run()
    at_the_end = kept(trainer)
    log = [json.loads(line) for line in (tmp_path / "untouched" / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert sum(record.get("skipped_steps", 0) for record in log) == 1
    assert not different(seen[2], seen[3])
    assert len(different(seen[3], seen[4])) > 0.5 * len(seen[3])
    in_bf16 = {name for name, tensor in seen[4].items() if tensor.dtype is torch.bfloat16}
    assert bool(in_bf16) == ("weights_precision" in fields) and all(name.startswith("weights.") for name in in_bf16)

    settings = settings_for(**fields)
    trainer, _ = trainer_with_bad_step(settings)
    stop_at(trainer, 3, "SIGTERM")
    trainer, seen_again = trainer_with_bad_step(settings)
    assert trainer.progress.step == 3
    trainer.run()
    assert not different(seen_again[4], seen[4]) and not different(kept(trainer), at_the_end)
    assert_same(result(settings.output_dir), result(tmp_path / "untouched"))


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("fields", [UNUSUAL["adamw_8bit"], IN_BF16], ids=["adamw_8bit", "bf16"])
def test_missing_torchao_is_said_before_anything_is_loaded(
    make_settings: Callable, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str]
) -> None:
    monkeypatch.setattr("finetuning.optimizers.find_spec", lambda _: None)
    settings = make_settings(init_model_path="no/such-model", **fields)
    with pytest.raises(UserError, match=r"^(OPTIMIZER=adamw_8bit|WEIGHTS_PRECISION=bf16) needs the package torchao"):
        starting.check_inputs(settings)
    check_optimizer(make_settings())
    check_optimizer(make_settings(optimizer="adafactor"))


@pytest.mark.parametrize("fields", UNUSUAL.values(), ids=UNUSUAL)
def test_fsdp_is_for_the_usual_optimizer(
    make_settings: Callable, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str]
) -> None:
    check_optimizer(make_settings(**fields))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_optimizer(make_settings())
    with pytest.raises(UserError, match=r"does not work with FSDP\. Set OPTIMIZER=adamw and WEIGHTS_PRECISION=fp32"):
        starting.check_inputs(make_settings(init_model_path="no/such-model", **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights_precision": "bf16"}, "WEIGHTS_PRECISION: bf16 is for MIXED_PRECISION=bf16 only"),
        ({"optimizer": "adafactor", **IN_BF16}, "WEIGHTS_PRECISION: bf16 is not for OPTIMIZER=adafactor"),
    ],
)
def test_settings_that_do_not_go_together(make_settings: Callable, fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_settings(**fields)


@pytest.mark.parametrize(
    ("line", "is_installed"),
    [
        ("OPTIMIZER=adamw_8bit", True),
        ("export OPTIMIZER = 'adamw_8bit'", True),
        ("OPTIMIZER=adamw # not adamw_8bit", False),
        ("# OPTIMIZER=adamw_8bit", False),
        ('WEIGHTS_PRECISION="bf16"', True),
        ("WEIGHTS_PRECISION=fp32", False),
        ("MIXED_PRECISION=bf16", False),
        ("MEMORY_PROFILE=auto", True),
        ("MEMORY_PROFILE=", False),
    ],
)
def test_the_command_installs_torchao_where_it_is_asked_for(tmp_path: Path, line: str, is_installed: bool) -> None:
    """In the settings file, or in the environment."""
    (tmp_path / "my.env").write_text(f"NAME=value\n{line}\nOTHER=\n")
    name, _, value = line.removeprefix("export ").partition("=")
    for environment in (
        {"ENV_FILE": str(tmp_path / "my.env")},
        {"ENV_FILE": "/dev/null", name.strip(): value.strip(" '\"")},
    ):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "source scripts/install.sh; extras_for_settings"],
            cwd=PROJECT, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == (["--extra", "8bit"] if is_installed else [])


def test_adafactor_is_the_librarys(make_settings: Callable) -> None:
    optimizer = make_optimizer(make_settings(optimizer="adafactor"), Net(), RATE)
    assert type(optimizer) is Adafactor
    assert not any(optimizer.defaults[name] for name in ("scale_parameter", "relative_step", "warmup_init"))
