"""States: what goes in comes out bit for bit, in files of limited size, and nothing is ever unpickled."""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import PROJECT
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.optimization import Adafactor

from finetuning import state as state_room
from finetuning.disk import CHECKSUMS_FILE, damage
from finetuning.settings import LR_SCHEDULERS
from finetuning.small_adamw import SmallAdamW
from finetuning.state import (
    STATE_FORMAT,
    State,
    damage_of_state,
    find_states,
    random_tensors,
    restore_random,
    restore_training,
    rotate_states,
    save_state,
    set_schedule,
    state_folder,
    step_of,
    training_tensors,
)
from finetuning.stepping import make_scheduler

CPU = torch.device("cpu")


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


class Net(nn.Module):
    """Two trained layers of different precision needs, a frozen one, a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.frozen, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2, bias=False)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.frozen.requires_grad_(False)
        self.register_buffer("vectors", torch.ones(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(self.first(inputs).tanh()))


def make_optimizer(net: Net, fused: bool = True) -> torch.optim.Optimizer:
    groups = [
        {"params": net.first.parameters(), "weight_decay": 0.1},
        {"params": net.last.parameters(), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.1, fused=fused)


def take_steps(net: Net, optimizer: torch.optim.Optimizer, num_steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        optimizer.zero_grad()
        net(torch.randn(5, 4, generator=generator)).square().sum().backward()
        optimizer.step()


def saved(folder: Path, accelerator: Accelerator, tensors: Any, **record: Any) -> State:
    save_state(folder, {"progress": {"step": 3}, "processes": 1, **record}, tensors, accelerator)
    return State(folder)


# -------------------------------------------------------------------------------------------- weights and optimizer


@pytest.mark.parametrize("fused", [True, False])
def test_weights_and_moments_come_back_bit_for_bit(tmp_path: Path, accelerator: Accelerator, fused: bool) -> None:
    """Another network trains on from the state exactly as the first one does."""
    net = Net(0)
    optimizer = make_optimizer(net, fused)
    take_steps(net, optimizer, 3, seed=1)
    state = saved(tmp_path / "step-3", accelerator, training_tensors(net, optimizer))
    other = Net(0)
    other.load_state_dict({name: tensor + 1 for name, tensor in net.state_dict().items()})
    other.frozen.load_state_dict(net.frozen.state_dict())  # what is frozen comes from the base, not from the state
    other_optimizer = make_optimizer(other, fused)
    restore_training(state, other, other_optimizer)
    for net_, optimizer_ in ((net, optimizer), (other, other_optimizer)):
        take_steps(net_, optimizer_, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    for mine, others in zip(net.parameters(), other.parameters(), strict=True):
        assert all(
            torch.equal(value, other_optimizer.state[others][key]) for key, value in optimizer.state[mine].items()
        )


def make_small(net: nn.Module) -> SmallAdamW:
    return SmallAdamW([{"params": [*net.parameters()]}], 0.1, net.parameters(), seed=0)


def make_adafactor(net: nn.Module) -> Adafactor:
    return Adafactor(net.parameters(), lr=0.1, scale_parameter=False, relative_step=False)


@pytest.mark.parametrize("make", [make_small, make_adafactor])
def test_what_other_optimizers_keep_comes_back_bit_for_bit(
    tmp_path: Path, accelerator: Accelerator, make: Callable
) -> None:
    """Moments in 8 bits part by part, numbers as numbers; weights in the precision in which they are kept."""

    def linear(value: float) -> nn.Linear:
        net = nn.Linear(64, 64)
        for parameter in net.parameters():
            nn.init.constant_(parameter, value)
        net.weight.data = net.weight.data.bfloat16() if make is make_small else net.weight.data
        return net

    def step(net: nn.Linear, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    net, other = linear(1.0), linear(2.0)
    optimizer, other_optimizer = make(net), make(other)
    for seed in range(3):
        step(net, optimizer, seed)
    state = saved(tmp_path / "step-3", accelerator, training_tensors(net, optimizer))
    assert state["weights.weight"].dtype is net.weight.dtype
    restore_training(state, other, other_optimizer)
    for seed in (3, 4):
        step(net, optimizer, seed)
        step(other, other_optimizer, seed)
    found = dict(training_tensors(other, other_optimizer))
    for name, tensor in training_tensors(net, optimizer):
        assert torch.equal(found.pop(name), tensor), name
    assert not found
    for mine, others in zip(net.parameters(), other.parameters(), strict=True):
        kept, restored = optimizer.state[mine], other_optimizer.state[others]
        assert [(key, type(value)) for key, value in sorted(kept.items())] == [
            (key, type(value)) for key, value in sorted(restored.items())
        ]


def test_the_parts_of_a_moment_in_8_bits_are_plain_tensors(tmp_path: Path, accelerator: Accelerator) -> None:
    net = nn.Linear(64, 64)
    optimizer = make_small(net)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = saved(tmp_path / "step-3", accelerator, training_tensors(net, optimizer))
    parts = [
        f"optimizer.{key}:{part}.weight" for key in ("exp_avg", "exp_avg_sq") for part in ("codes", "qmap", "scale")
    ]
    assert sorted(state.names("optimizer.exp")) == sorted(
        [*parts, "optimizer.exp_avg.bias", "optimizer.exp_avg_sq.bias"]
    )
    assert state[parts[0]].dtype is torch.uint8 and state[parts[0]].nbytes == net.weight.numel()


def test_saving_leaves_the_optimizer_alone() -> None:
    """Before the first step, too: an empty entry would pass for one that is filled."""
    net = Net(0)
    optimizer = make_optimizer(net)
    assert len(list(training_tensors(net, optimizer))) == 3 and not optimizer.state


def test_what_does_not_train_is_not_in_a_state(tmp_path: Path, accelerator: Accelerator) -> None:
    net = Net(0)
    optimizer = make_optimizer(net)
    take_steps(net, optimizer, 1, seed=1)
    state = saved(tmp_path / "step-3", accelerator, training_tensors(net, optimizer))
    names = {"first.weight", "first.bias", "last.weight"}
    assert set(state.names("")) == {f"weights.{name}" for name in names} | {
        f"optimizer.{key}.{name}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_before_the_first_step_there_are_no_moments(tmp_path: Path, accelerator: Accelerator) -> None:
    net, other = Net(0), Net(5)
    state = saved(tmp_path / "step-0", accelerator, training_tensors(net, make_optimizer(net)))
    optimizer = make_optimizer(other)
    restore_training(state, other, optimizer)
    assert torch.equal(other.first.weight, net.first.weight) and not optimizer.state


@pytest.mark.parametrize("name", [*LR_SCHEDULERS, "with LR_MIN", "with LR_NUM_CYCLES"])
@pytest.mark.parametrize("num_taken", [0, 1, 7, 39, 40])
def test_a_schedule_is_set_to_where_stepping_brings_it(make_settings: Callable, name: str, num_taken: int) -> None:
    extra = {"with LR_MIN": {"lr_min": 0.01}, "with LR_NUM_CYCLES": {"lr_num_cycles": 3}}
    settings = make_settings(learning_rate=0.5, warmup_steps=3, **extra.get(name, {"lr_scheduler": name}))

    def schedule() -> Any:
        groups = [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.25}]
        return make_scheduler(settings, torch.optim.SGD(groups, lr=0.5), 40)

    stepped, fresh = schedule(), schedule()
    for _ in range(num_taken):
        stepped.optimizer.step()
        stepped.step()
    set_schedule(fresh, num_taken)
    for _ in range(3):
        assert fresh.get_last_lr() == stepped.get_last_lr()
        assert [group["lr"] for group in fresh.optimizer.param_groups] == stepped.get_last_lr()
        for scheduler in (stepped, fresh):
            scheduler.optimizer.step()
            scheduler.step()


# --------------------------------------------------------------------------------------------------- random states


def numbers() -> list[Any]:
    """The next ones of each generator; an odd count of normal numbers, of which one is kept back."""
    return [
        torch.rand(3).tolist(), torch.randn(3).tolist(),
        np.random.rand(3).tolist(), np.random.standard_normal(3).tolist(),
        [random.random() for _ in range(3)], [random.gauss(0, 1) for _ in range(3)],
    ]  # fmt: skip


@pytest.mark.parametrize("num_drawn", [0, 1, 2, 3])
def test_random_states_give_the_same_numbers(tmp_path: Path, accelerator: Accelerator, num_drawn: int) -> None:
    """Through a file, after normal numbers of which the generators keep every second one for later."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(11)
    for _ in range(num_drawn):
        numbers()
    tensors = [(f"process.0.{name}", tensor) for name, tensor in random_tensors(CPU).items()]
    state = saved(tmp_path / "step-3", accelerator, tensors)
    wanted = numbers()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(12)
    assert numbers() != wanted
    restore_random({name.removeprefix("process.0."): state[name] for name in state.names("process.0.")}, CPU)
    assert numbers() == wanted


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_the_devices_own_generator_goes_with_them(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    module, kept = getattr(torch, device), []
    monkeypatch.setattr(module, "get_rng_state", lambda *_: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(module, "set_rng_state", lambda state, *_: kept.append(state.item()))
    states = random_tensors(torch.device(device))
    restore_random(states, torch.device(device))
    assert kept == [7]
    restore_random(states, CPU)  # a run that goes on without that device
    restore_random({name: state for name, state in states.items() if name != device}, torch.device(device))
    assert kept == [7]


# ----------------------------------------------------------------------------------------------------------- files


def test_a_state_is_safetensors_and_json(tmp_path: Path, accelerator: Accelerator) -> None:
    state = saved(tmp_path / "step-3", accelerator, [("weights.a", torch.ones(2))], loss=None, names=["Zoë"])
    names = {"state.json", CHECKSUMS_FILE, "process-00000-of-00001.part-00000.safetensors"}
    assert {file.name for file in state.folder.iterdir()} == names
    record = {"format": STATE_FORMAT, "progress": {"step": 3}, "processes": 1, "loss": None, "names": ["Zoë"]}
    assert json.loads((state.folder / "state.json").read_text(encoding="utf-8")) == record == state.record
    assert (state.step, state.num_processes) == (3, 1)
    assert damage(state.folder) == damage_of_state(state.folder) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-3"]


def test_files_are_of_limited_size_and_tensors_are_whole(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_room, "_MAX_FILE_BYTES", 1000)
    sizes = [400, 400, 400, 4000, 100, 1000, 8]
    tensors = {f"weights.{number}": torch.randn(size // 4) for number, size in enumerate(sizes)}
    state = saved(tmp_path / "step-3", accelerator, iter(tensors.items()))
    files = sorted(state.folder.glob("*.safetensors"))
    found = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
    assert found == [[400, 400], [400], [4000], [100], [1000], [8]]
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_no_more_than_a_file_is_held_at_a_time(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are made when they are asked for, so a group that was written can be forgotten."""
    monkeypatch.setattr(state_room, "_MAX_FILE_BYTES", 1000)
    num_asked = 0

    def tensors() -> Any:
        nonlocal num_asked
        for number in range(40):
            num_asked += 1
            yield f"weights.{number}", torch.zeros(100)

    for number, group in enumerate(state_room._grouped(tensors()), 1):
        assert sum(tensor.nbytes for tensor in group.values()) <= 1000
        assert num_asked <= 2 * number + 1
    assert (number, num_asked) == (20, 40)


def test_the_limit_is_a_gibibyte() -> None:
    assert state_room._MAX_FILE_BYTES == 2**30


def test_parts_of_several_processes_become_one_tensor(tmp_path: Path) -> None:
    """As FSDP leaves them: each process has its rows of a tensor, the last one may have none."""
    whole = torch.arange(10.0).reshape(5, 2)
    for index, rows in enumerate((whole[:3], whole[3:], whole[:0])):
        file = tmp_path / f"process-{index:05d}-of-00003.part-00000.safetensors"
        save_file({"weights.a": rows.contiguous(), f"process.{index}.torch": torch.tensor([index])}, file)
    (tmp_path / "state.json").write_text('{"processes": 3}')
    state = State(tmp_path)
    assert torch.equal(state["weights.a"], whole)
    assert [state[f"process.{index}.torch"].item() for index in range(3)] == [0, 1, 2]
    assert "weights.a" in state and "weights.b" not in state and state.names("process.2.") == ["process.2.torch"]


def test_a_failed_state_leaves_nothing(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "step-3", accelerator, [("weights.a", torch.ones(2))])
    monkeypatch.setattr(state_room, "_MAX_FILE_BYTES", 1000)

    def tensors() -> Any:
        yield "weights.a", torch.zeros(250)
        yield "weights.b", torch.zeros(250)
        raise OSError(28, "No space left on device")

    for step in (3, 4):
        with pytest.raises(OSError, match="No space left"):
            save_state(tmp_path / f"step-{step}", {"processes": 1}, tensors(), accelerator)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-3"]
    assert damage_of_state(tmp_path / "step-3") == []


def test_states_are_found_newest_first_and_rotated(tmp_path: Path, accelerator: Accelerator) -> None:
    assert find_states(tmp_path) == []
    for step in (8, 12, 100):
        saved(state_folder(tmp_path, step), accelerator, [("weights.a", torch.ones(2))])
    for name in (".step-200.tmp", "step-x", "step-7.bak"):
        (tmp_path / "state" / name).mkdir()
    assert [step_of(folder) for folder in find_states(tmp_path)] == [100, 12, 8]
    rotate_states(tmp_path)
    assert [step_of(folder) for folder in find_states(tmp_path)] == [100, 12]
    rotate_states(tmp_path, keep=1)
    assert [step_of(folder) for folder in find_states(tmp_path)] == [100]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"format": 99}', "it has format 99, this version reads format 1"),
        ("{}", "state.json is not readable"),
        ("[1]", "state.json is not readable"),
        ("{", "state.json is not readable"),
    ],
)
def test_a_record_that_cannot_be_used(tmp_path: Path, accelerator: Accelerator, text: str, problem: str) -> None:
    from finetuning.disk import seal

    state = saved(tmp_path / "step-3", accelerator, [("weights.a", torch.ones(2))])
    (state.folder / "state.json").write_text(text)
    assert damage_of_state(state.folder)[0].startswith("state.json has ")  # first of all it is not what was saved
    seal(state.folder)
    assert damage_of_state(state.folder) == [problem]


# ------------------------------------------------------------------------------------------------ nothing unpickled

SOURCES = sorted([*(PROJECT / "finetuning").glob("*.py"), *PROJECT.glob("*.py")])
#: Modules that unpickle, and calls that do.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "torch.load", "accelerator.load_state", "accelerator.save_state", "self.accelerator.load_state",
    "self.accelerator.save_state", "torch.save", "np.load", "numpy.load", "pd.read_pickle",
}  # fmt: skip


def unpickling(source: str) -> list[str]:
    """What of a source text would unpickle, or write for it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += [node.module] if (node.module or "").split(".")[0] in FORBIDDEN_MODULES else []
            found += sorted(names & FORBIDDEN_CALLS)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            is_array = name in ("np.load", "numpy.load") and not any(k.arg == "allow_pickle" for k in node.keywords)
            found += [name] if name in FORBIDDEN_CALLS and not is_array else []
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_nothing_is_unpickled(file: Path) -> None:
    assert unpickling(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load('x')", "import pickle", "from pickle import loads", "from torch import load", "import joblib.numpy",
        "np.load('x', allow_pickle=True)", "self.accelerator.load_state('x')",
    ],
)  # fmt: skip
def test_the_check_itself_finds_it(source: str) -> None:
    assert unpickling(source)
