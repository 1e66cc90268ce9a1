"""What several processes run for test_two_processes.py and test_sharding.py, under ``torch.distributed.run``:

    two_processes.py train SETTINGS.json FOLDER    the real training of the settings (fields, as JSON)
    two_processes.py parts FOLDER                  a toy module, sharded; see ``toy_steps``

What they saw goes to FOLDER, for the tests to compare.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from finetuning.sharding import clip_gradients, full_tensor, gradient_sync, local_part, own_rows

Tensors = dict[str, torch.Tensor]
PROJECT = Path(__file__).parent.parent
#: Processes that wait for one that will not come are ended after so long.
MAX_SECONDS = 180


def launch(arguments: list[str], **environment: str) -> None:
    """Runs this file in two processes.

    Args:
        arguments: of its command line.
        environment: variables, besides those of this process.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    variables = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"} | environment
    started = subprocess.Popen(
        [*command, *arguments], cwd=PROJECT, env=variables,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _, errors = started.communicate(timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired:
        launcher = psutil.Process(started.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.kill()
        _, errors = started.communicate()
    assert started.returncode == 0, errors[-6000:]


def main() -> None:
    mode, *arguments = sys.argv[1:]
    if mode == "train":
        settings, folder = map(Path, arguments)
        train_here(json.loads(settings.read_text()), folder)
    else:
        dist.init_process_group("gloo")
        save_file(toy_steps(), Path(arguments[0]) / f"parts-{dist.get_rank()}.safetensors")
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------- the real training


def train_here(fields: dict[str, Any], folder: Path) -> None:
    """Trains, and writes what ``record`` gives: the tensors of the first process, the rest of each."""
    from finetuning.settings import load_settings

    rank = int(os.environ["RANK"])
    seen = record(load_settings(fields, environment={}), spoil=rank > 0)
    gradients, weights = seen.pop("gradients"), seen.pop("weights")
    (folder / f"process-{rank}.json").write_text(json.dumps(seen))
    if rank == 0:
        save_file(gradients, folder / "gradients.safetensors")
        save_file(weights, folder / "weights.safetensors")


def record(settings: Any, spoil: bool = False) -> dict[str, Any]:
    """Trains by the settings in this process, among however many were launched.

    Args:
        spoil: changes the loaded weights first, which the first process's must replace.

    Returns:
        gradients: of the first step as the optimizer gets them, averaged, clipped and whole, by name.
        weights: the model's state at the end, whole.
        shards: name -> [class, placements, whole shape, local shape] of every parameter of the objective.
        num_empty_batches: micro-batches of the training that had no rows.
    """
    from training import build, make_trainer

    run = build(settings)
    if spoil:
        with torch.no_grad():
            for tensor in (*run.objective.parameters(), run.objective.speaker_vectors):
                tensor.add_(0.1)
    trainer = make_trainer(run)
    gradients: Tensors = {}
    batch_weights: list[float] = []

    def note_weight(module: nn.Module, arguments: Any) -> None:
        if module.training:
            batch_weights.append(float(arguments[0]["weight"]))

    def keep_first(*_: Any) -> None:
        named = [(name, p.grad) for name, p in run.objective.named_parameters() if p.requires_grad]
        gradients.update({} if gradients else {name: full_tensor(grad).clone() for name, grad in named})

    run.objective.register_forward_pre_hook(note_weight)
    hook = register_optimizer_step_pre_hook(keep_first)
    try:
        trainer.run()
    finally:
        hook.remove()
    return {
        "gradients": gradients,
        "weights": {name: full_tensor(tensor).clone() for name, tensor in run.model.state_dict().items()},
        "shards": {name: describe_shards(parameter) for name, parameter in run.objective.named_parameters()},
        "num_empty_batches": batch_weights.count(0.0),
    }


def describe_shards(parameter: nn.Parameter) -> list[Any]:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    placements = str(getattr(parameter, "placements", None))
    return [type(parameter.data).__name__, placements, list(parameter.shape), list(local.shape)]


# --------------------------------------------------------------------------------------------------- the toy module


def toy() -> nn.Module:
    """Tensors of 3, 1 and 5 rows: two processes get uneven parts, and one of them none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Linear(1, 5))


def toy_loss(module: nn.Module, process: int, micro_batch: int) -> torch.Tensor:
    rows = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(1))[process, micro_batch]
    return module(rows).square().sum()


def toy_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)


def toy_steps() -> Tensors:
    """One good step of two micro-batches, one with a NaN in one process, one with a scaler and an infinity there."""
    from types import SimpleNamespace

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, module = dist.get_rank(), toy()
    whole = {name: p.detach().clone() for name, p in module.named_parameters()}
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = toy_optimizer(module)
    parameters = dict(module.named_parameters())
    seen: Tensors = {}

    def keep(prefix: str, tensors: dict[str, torch.Tensor]) -> None:
        seen.update({f"{prefix}/{name}": full_tensor(tensor).detach().clone() for name, tensor in tensors.items()})

    for name, parameter in parameters.items():
        seen[f"shard/{name}"] = parameter.to_local().detach().clone()
        part = local_part(whole[name].double(), parameter)
        seen[f"part/{name}"] = part.to_local().clone()
        seen[f"storage/{name}"] = torch.tensor(part.to_local().untyped_storage().nbytes())
        seen[f"rows/{name}"] = torch.tensor(own_rows(parameter))
        keep("regathered", {name: part})
    keep("weights", parameters)

    copies = nn.parallel.DistributedDataParallel(toy())
    for micro_batch in range(2):
        for prepared in (module, copies):
            with gradient_sync(prepared, enabled=micro_batch == 1):
                toy_loss(prepared, rank, micro_batch).backward()
        seen[f"num_sharded_gradients/{micro_batch}"] = torch.tensor(
            sum(p.grad is not None for p in parameters.values())
        )
        keep(f"copied_gradients/{micro_batch}", {name: p.grad for name, p in copies.module.named_parameters()})
    keep("gradients", {name: p.grad for name, p in parameters.items()})
    no_scaler = SimpleNamespace(unscale_gradients=lambda: None)
    seen["norm"] = clip_gradients(no_scaler, module.parameters(), 0.5)
    keep("clipped", {name: p.grad for name, p in parameters.items()})
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    keep("after_good", parameters)

    optimizer.zero_grad()
    (toy_loss(module, rank, 0) * (torch.nan if rank == 1 else 1.0)).backward()
    seen["bad_norm"] = clip_gradients(no_scaler, module.parameters(), 0.5)
    optimizer.found_inf = (~torch.isfinite(seen["bad_norm"])).float()
    optimizer.step()
    keep("after_bad", parameters)
    keep("momentum_after_bad", {name: optimizer.state[p]["exp_avg"] for name, p in parameters.items()})
    seen["num_steps"] = optimizer.state[parameters["0.weight"]]["step"].clone()

    optimizer.zero_grad()
    del optimizer.found_inf
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(toy_loss(module, rank, 0) * (torch.inf if rank == 1 else 1.0)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    keep("after_scaler", parameters)
    seen["scale"] = torch.tensor(scaler.get_scale())
    return seen


if __name__ == "__main__":
    main()
