"""Trainings on the tiny model in two processes, for test_two_processes.py and test_sharding.py.

    two_processes.py FOLDER

imports everything once, and then forks two processes for each life that FOLDER/lives.json lists, one life after the
other; see ``Life``. They talk over gloo. What they saw goes to FOLDER/<name of the life>, for the tests to compare.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import xxhash
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from finetuning.errors import Stopped, UserError, run_main
from finetuning.sharding import accumulating, averaging, clip_gradients, full_tensor, local_part, own_rows

Tensors = dict[str, torch.Tensor]
PROJECT = Path(__file__).parent.parent
NUM_PROCESSES = 2
#: Processes of one life that wait for one that will not come are ended after so long; all lives of a launch.
MAX_SECONDS, MAX_SECONDS_OF_ALL = 200, 900
#: How the tensors that a life leaves begin.
TENSORS = ("gradients", "restored", "weights", "final")


@dataclass(frozen=True)
class Life:
    """One training from its start to its end, or to a fault.

    Attributes:
        fields: settings; none for the toy of ``toy_steps``.
        sharded: FSDP, else DDP.
        tricks: what happens on the way; see ``Witness``.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False
    tricks: dict[str, Any] = field(default_factory=dict)


class Enough(BaseException):
    """Ends a life after a step, in all processes, without saving."""


# ------------------------------------------------------------------------------------------------ launching, reading


def launch(folder: Path, lives: list[Life]) -> None:
    """Runs these lives in two processes, one after the other."""
    (folder / "lives.json").write_text(json.dumps([asdict(life) for life in lives], default=str))
    started = subprocess.run(
        [sys.executable, __file__, str(folder)], cwd=PROJECT, timeout=MAX_SECONDS_OF_ALL, text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr[-6000:]


def live_alone(folder: Path, life: Life) -> SimpleNamespace:
    """The same in this process alone; gives what ``read_life`` gives."""
    (folder / life.name).mkdir(parents=True)
    with contextlib.suppress(Stopped, UserError, Enough):
        train(life, folder / life.name)
    return read_life(folder, life.name)


def read_life(folder: Path, name: str) -> SimpleNamespace:
    """What the processes of a life saw.

    Returns:
        exit_codes: of each process; [] for one that lived in the test's own.
        processes: what ``Witness.seen`` lists of each process that trained.
        printed: everything that each launched process wrote.
        gradients, restored, weights, final: see ``Witness``; whole tensors by name.
    """
    place = folder / name
    codes = place / "exit_codes.json"
    seen = [json.loads(file.read_text()) for file in sorted(place.glob("process-*.json"))]
    tensors = {kind: load_file(file) if (file := place / f"{kind}.safetensors").exists() else {} for kind in TENSORS}
    return SimpleNamespace(
        folder=place,
        output=Path(seen[0]["output"]) if seen else None,
        exit_codes=json.loads(codes.read_text()) if codes.exists() else [],
        processes=[SimpleNamespace(**process) for process in seen],
        printed=[file.read_text() for file in sorted(place.glob("printed-*.txt"))],
        **tensors,
    )


# --------------------------------------------------------------------------------------------------------- the forks


def main() -> None:
    folder = Path(sys.argv[1])
    lives = [Life(**life) for life in json.loads((folder / "lives.json").read_text())]
    torch.set_num_threads(1)
    if any(life.fields for life in lives):
        _import_everything()
    for life in lives:
        place = folder / life.name
        place.mkdir()
        forked = [_fork(life, place, rank) for rank in range(NUM_PROCESSES)]
        (place / "exit_codes.json").write_text(json.dumps(_wait(forked)))


def _import_everything() -> None:
    """What each fork would take ten seconds for."""
    import training  # noqa: F401

    from finetuning import plots
    from finetuning.stock import import_qwen_tts

    import_qwen_tts()
    plots.draw_plots = lambda _: []  # as in the tests' own process


def _fork(life: Life, place: Path, rank: int) -> int:
    """The number of a new process, which goes through the life and leaves by ``run_main`` as every command does."""
    sys.stdout.flush()
    if number := os.fork():
        return number
    try:
        printed = os.open(place / f"printed-{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_PROCESSES),
            "LOCAL_WORLD_SIZE": str(NUM_PROCESSES), "ACCELERATE_USE_FSDP": str(life.sharded).lower(),
            "LAUNCH_REPORT": str(place / "report.json"),
        }  # fmt: skip
        meeting = f"file://{place / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=NUM_PROCESSES)
        run_main(lambda: _live(life, place, rank))
        _leave(0)
    except BaseException:
        traceback.print_exc()
        _leave(1)


def _live(life: Life, place: Path, rank: int) -> None:
    if not life.fields:
        save_file(toy_steps(), place / f"parts-{rank}.safetensors")
        return
    with contextlib.suppress(Enough):
        train(life, place)


def _leave(exit_code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _wait(forked: list[int]) -> list[int]:
    """Exit codes of these processes, which are killed when they take too long."""
    end, codes = time.monotonic() + MAX_SECONDS, {}
    while len(codes) < len(forked):
        for number in set(forked) - codes.keys():
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                codes[number] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[number] for number in forked]


# ------------------------------------------------------------------------------------------------- the real training


def train(life: Life, place: Path) -> None:
    """The training of a life, in this process among however many there are, with a witness who keeps what it saw.

    Raises:
        Stopped, UserError, Enough: as it ended.
    """
    from finetuning.settings import load_settings

    settings = load_settings(life.fields, environment={})
    printed = io.StringIO()
    witness = Witness(settings, life.tricks, place)
    try:
        with contextlib.redirect_stdout(printed):
            witness.train()
    finally:
        witness.seen["said"] = printed.getvalue()
        (place / f"process-{witness.rank}.json").write_text(json.dumps(witness.seen))


class Witness:
    """Trains, plays the tricks, and keeps what is seen.

    Tricks:
        ``spoil``: the loaded weights are other ones beside the first process, whose must replace them.
        ``validate``: evaluates the first so many validation rows before training, for each of these numbers.
        ``gradients_of``: steps whose gradients are kept.
        ``signal_in``: (step, process): SIGTERM reaches that process in that step.
        ``signal_while_speaking``: SIGTERM reaches that process in the second frame of its first sample.
        ``notes_moves``: see ``moved``.
        ``end_after``: the step after which the life ends.
        ``no_memory``: (process, forward, rows): from that forward on, no more than so many rows have room.
        ``no_memory_in_backward``: (process, backward): there is no room at the end of that backward.
        ``failing_saves``: for each save "" or what fails of it: "state" (in the second process), "export" or "log".
        ``damaged``: lines of training rows that cannot be read.
        ``own_figures``: beside the first process each evaluation has a lower loss than the one before.

    Attributes:
        seen: lists and figures:
            ``rows``: [epoch, lines] of every step, of this process;
            ``num_empty_batches``: micro-batches without rows;
            ``num_parts``, ``step``, ``num_skipped_rows``: at the end;
            ``shards``: name -> [class, placements, whole shape, local shape];
            ``fingerprint``: of the weights of this process at the end, bit for bit; ``average``: of their average;
            ``moved``: names of the parameters that moved in each step, where ``notes_moves`` asks for it;
            ``validations``: number of rows -> figures;
            ``saves``: see ``_note_save``;
            ``said``: see ``say``.

    Tensors, whole, written by the first process: ``gradients`` ("<step>.<name>", averaged and clipped), ``restored``
    and ``final`` (weights, moments and averages before the first step and at the end), ``weights`` (the model's, at the
    end).
    """

    def __init__(self, settings: Any, tricks: dict[str, Any], place: Path) -> None:
        self.settings, self.tricks, self.place = settings, tricks, place
        self.rank = int(os.environ.get("RANK") or 0)
        self.gradients: Tensors = {}
        self.seen: dict[str, Any] = {
            "output": str(settings.output_dir), "rows": [], "num_empty_batches": 0, "saves": [], "validations": {},
            "moved": [],
        }  # fmt: skip
        self._num_forwards = self._num_backwards = 0

    def train(self) -> None:
        from training import build, make_trainer

        run = build(self.settings)
        if self.tricks.get("spoil") and self.rank > 0:
            with torch.no_grad():
                for tensor in (*run.objective.parameters(), run.objective.speaker_vectors):
                    tensor.add_(0.1)
        self.trainer = make_trainer(run)
        self.run, self.stepper = run, self.trainer.stepper
        if self.tricks.get("own_figures") and self.rank > 0:
            evaluate, losses = self.trainer.validator.evaluate, iter(range(0, -1000, -1))
            self.trainer.validator.evaluate = lambda *given: evaluate(*given) | {"loss": float(next(losses))}
        if run.state:
            self._keep("restored", self._training_tensors())
        for num_rows in self.tricks.get("validate", ()):
            self.seen["validations"][str(num_rows)] = self._validate(num_rows)
        with self._watching():
            try:
                self.trainer.run()
            except (UserError, OSError, RuntimeError):
                self._describe()
                raise
            except (Stopped, Enough):
                self._end()
                raise
            self._end()

    def _end(self) -> None:
        """All processes come here together."""
        self._describe()
        self._keep("weights", self.run.model.state_dict())
        self._keep("final", self._training_tensors())
        self._keep("gradients", self.gradients)

    def _describe(self) -> None:
        named = self.run.objective.named_parameters()
        self.seen |= {
            "num_parts": self.stepper.num_parts,
            "step": self.trainer.progress.step,
            "num_skipped_rows": self.trainer.progress.num_skipped_rows,
            "shards": {name: describe_shards(parameter) for name, parameter in named},
            "fingerprint": fingerprint_of(self.run.objective.parameters()),
        }
        if average := self.stepper.average:
            self.seen["average"] = fingerprint_of(average.tensors.values())

    def _training_tensors(self) -> Tensors:
        from finetuning.state import training_tensors

        tensors = dict(training_tensors(self.stepper.module, self.stepper.optimizer))
        return tensors | dict(self.stepper.average.named_tensors() if self.stepper.average else {})

    def _keep(self, kind: str, tensors: Tensors) -> None:
        whole = {}
        for name, tensor in tensors.items():
            whole[name] = full_tensor(tensor).clone().contiguous()
            if dist.is_initialized():
                dist.barrier()  # nobody gathers ahead: a process once died in gloo's thread here
        if self.rank == 0 and whole:
            save_file(whole, self.place / f"{kind}.safetensors")

    def _validate(self, num_rows: int) -> dict[str, float]:
        import numpy as np

        from finetuning.dataset import StepDataset
        from finetuning.validation import Validator

        everything = self.run.validation
        some = StepDataset(everything.manifest.select(np.arange(num_rows)), everything.encoder)
        return Validator(self.settings, self.run.accelerator, some).evaluate(self.stepper.module)

    # ------------------------------------------------------------------------------------------------------ tricks

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        take, save = self.stepper.take, self.trainer.saver.save
        dataset = self.run.train.dataset
        dataset.read = self._damaging(dataset.read)
        self.stepper.take = lambda *arguments: self._take(take, *arguments)
        self.trainer.saver.save = lambda *arguments: self._save(save, *arguments)
        module = self.run.objective
        module.register_forward_pre_hook(self._before_forward)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if "no_memory_in_backward" in self.tricks:
            trained[0].register_hook(self._in_backward)
        if self.tricks.get("signal_while_speaking") == self.rank:
            self.trainer.sampler.live.say = self._saying(self.trainer.sampler.live.say)
        hook = register_optimizer_step_pre_hook(self._before_update)
        try:
            yield
        finally:
            hook.remove()

    def _take(self, take: Callable[..., Any], batches: Any, *counts: int) -> Any:
        from finetuning.stepping import lines_of

        progress = self.trainer.progress
        if self.tricks.get("signal_in") == [progress.step + 1, self.rank]:
            os.kill(os.getpid(), signal.SIGTERM)
        notes_moves = self.tricks.get("notes_moves")
        before = self._prints() if notes_moves else {}
        sums = take(batches, *counts)
        if notes_moves:
            after = self._prints()
            self.seen["moved"].append([name for name, seen in before.items() if after[name] != seen])
        self.seen["rows"].append([progress.epoch, lines_of(batches)])
        if progress.step + 1 == self.tricks.get("end_after"):
            raise Enough
        return sums

    def _prints(self) -> dict[str, str]:
        """Fingerprint of each parameter's part of this process that is not empty."""
        named = self.run.objective.named_parameters()
        return {name: fingerprint_of([one]) for name, one in named if local_of(one).numel()}

    def _damaging(self, read: Callable[[int], Any]) -> Callable[[int], Any]:
        from finetuning.dataset import SkippedRow

        def read_some(index: int) -> Any:
            row = read(index)
            is_damaged = row["line"] in self.tricks.get("damaged", ())
            return SkippedRow(row["line"], "damaged, says the test") if is_damaged else row

        return read_some

    def _before_forward(self, module: nn.Module, arguments: Any) -> None:
        if not module.training:
            return
        (batch,) = arguments
        self._num_forwards += 1
        self.seen["num_empty_batches"] += int(batch["weight"] == 0)
        process, forward, num_rows = self.tricks.get("no_memory", (None, 0, 0))
        if process == self.rank and self._num_forwards >= forward and len(batch["attention_mask"]) > num_rows:
            raise torch.OutOfMemoryError("no memory, says the test")

    def _saying(self, say: Callable[..., Any]) -> Callable[..., Any]:
        frames: list[int] = []

        def in_frame(*_: Any) -> None:
            frames.append(1)
            if len(frames) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        def interrupted(request: Any) -> Any:
            self.run.model.talker.codec_head.register_forward_hook(in_frame)
            return say(request)

        return interrupted

    def _in_backward(self, _: torch.Tensor) -> None:
        self._num_backwards += 1
        if [self.rank, self._num_backwards] == self.tricks["no_memory_in_backward"]:
            raise torch.OutOfMemoryError("no memory, says the test")

    def _before_update(self, *_: Any) -> None:
        step = self.trainer.progress.step + 1
        if step in self.tricks.get("gradients_of", ()):
            named = self.run.objective.named_parameters()
            self.gradients |= {f"{step}.{name}": full_tensor(p.grad).clone() for name, p in named if p.requires_grad}

    def _save(self, save: Callable[..., Any], trainer: Any, names: list[str], with_state: bool, epoch: int) -> Any:
        plan = self.tricks.get("failing_saves", [])
        what = plan[len(self.seen["saves"])] if len(self.seen["saves"]) < len(plan) else ""
        note = {"step": trainer.progress.step, "names": names, "with_state": with_state}
        self.seen["saves"].append(note)
        try:
            with _failing(what, trainer, self.rank):
                saved = save(trainer, names, with_state, epoch)
        finally:
            self._note_save(note)
        note |= saved._asdict()
        return saved

    def _note_save(self, note: dict[str, Any]) -> None:
        """What there is after a save; only the first process, which wrote the last of it, can tell.

        Adds ``failures`` (in a row), ``leftovers``, ``whole`` and ``damaged`` (folders of checkpoints and states).
        """
        from finetuning.disk import CHECKSUMS_FILE, damage

        note["failures"] = self.trainer.saver._num_failures
        if self.rank == 0:
            output = self.settings.output_dir
            folders = [*output.iterdir(), *output.glob("state/*")]
            note["leftovers"] = [folder.name for folder in folders if folder.name.endswith(".tmp")]
            saved = [folder for folder in folders if (folder / CHECKSUMS_FILE).exists() or folder.parent != output]
            note["whole"] = sorted(folder.name for folder in saved if not damage(folder))
            note["damaged"] = sorted(folder.name for folder in saved if damage(folder))


@contextlib.contextmanager
def _failing(what: str, trainer: Any, rank: int) -> Iterator[None]:
    """The disk is full for the second process's part of a state, for the first one's export, or for its logs."""
    import finetuning.checkpoint
    import finetuning.state

    places = {
        "state": (1, finetuning.state, "save_file"),
        "export": (0, finetuning.checkpoint, "save_file"),
        "log": (0, trainer.tracker, "flush"),
    }
    failing_rank, place, name = places.get(what, (None, None, ""))
    if rank != failing_rank:
        yield
        return
    real = getattr(place, name)

    def fail(_: Any = None, file: Path | None = None, **__: Any) -> None:
        if file is not None:
            Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    setattr(place, name, fail)
    try:
        yield
    finally:
        setattr(place, name, real)


def fingerprint_of(tensors: Iterable[torch.Tensor]) -> str:
    """Of the bits that this process holds."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(local_of(tensor).detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def describe_shards(parameter: nn.Parameter) -> list[Any]:
    local = local_of(parameter)
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
            with accumulating(prepared):
                if micro_batch == 1:
                    toy_loss(prepared, rank, 0)  # given up
                loss = toy_loss(prepared, rank, micro_batch)
                if micro_batch == 0:
                    loss.backward()
            if micro_batch == 1:
                with averaging(prepared):
                    loss.backward()
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
