"""Launching several processes: configuration files, the scripts, one message, exit codes, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PROJECT

from finetuning import errors

CONFIGS = PROJECT / "configs"
ALL_CONFIGS = ("single_machine.yaml", "several_machines.yaml", "fsdp.yaml")
#: A command like ours, whose second process fails in the way that the argument says while the first waits for it.
WORKER = """
import os, signal, sys, time
from finetuning.errors import UserError, another_process_failed, run_main

def main():
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    rank, how, number = dist.get_rank(), sys.argv[1], torch.ones(1)
    if how == "killed":  # the launcher sends SIGTERM to the survivor
        def note(number, _):
            print("survivor ends", another_process_failed(), flush=True)
            raise SystemExit(128 + number)
        signal.signal(signal.SIGTERM, note)
    dist.all_reduce(number)
    if how == "waits":
        open(f"{sys.argv[2]}/{rank}", "w").close()
        time.sleep(60)
    if rank == 1:
        if how == "user error":
            raise UserError("the second has no space")
        if how == "bug":
            raise KeyError("the second is wrong")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    if how == "killed":
        time.sleep(60)
    if how != "well":
        dist.all_reduce(number)
    print(f"process {rank} counted {number.item():g}")

run_main(main)
"""


def environment(**variables: str) -> dict[str, str]:
    """This process's environment on CPU, without the variables of hubs and launchers."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "WANDB_", "NUM_", "MA"))}
    path = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"
    return kept | {"PATH": path, "PYTHONPATH": str(PROJECT), "DEVICE": "cpu", "OMP_NUM_THREADS": "1"} | variables


def start(command: list[str], **variables: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        command, cwd=PROJECT, env=environment(**variables), text=True, preexec_fn=hear_ctrl_c, **pipes
    )


def hear_ctrl_c() -> None:
    """A shell starts what runs in the background with SIGINT ignored, and that is passed on to children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen, timeout: int = 300) -> SimpleNamespace:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGQUIT)  # the launcher of torch ends its processes
        raise
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def error_lines(done: SimpleNamespace) -> list[str]:
    return [line for line in (done.out + done.err).splitlines() if line.startswith("error:")]


@pytest.fixture
def worker(tmp_path: Path) -> str:
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    return str(tmp_path / "worker.py")


@pytest.fixture
def launch_worker(worker: str) -> Callable[..., subprocess.Popen]:
    """Starts the worker as two processes, as the shell scripts do."""
    config = str(CONFIGS / "single_machine.yaml")
    command = [sys.executable, "scripts/launch.py", "--config_file", config, "--num_processes=2", worker]
    return lambda *arguments: start([*command, *arguments])


# --------------------------------------------------------------------------------------------- configuration files


def launch_environment(config: str, *arguments: str) -> tuple[Any, dict[str, str]]:
    """What `accelerate launch` makes of a configuration file: its arguments, and the environment of the processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    command = ["--config_file", str(CONFIGS / config), "--num_processes=4", "--main_process_port=0", *arguments]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args([*command, "train.py"]))
    return parsed, prepare_multi_gpu_env(parsed)


@pytest.mark.parametrize("config", ALL_CONFIGS)
def test_accelerate_takes_the_configurations(config: str, caplog: pytest.LogCaptureFixture) -> None:
    parsed, variables = launch_environment(config)
    assert parsed.use_fsdp or parsed.multi_gpu
    assert not parsed.use_cpu
    assert parsed.nproc_per_node == ("2" if config == "several_machines.yaml" else "4")
    assert variables["ACCELERATE_MIXED_PRECISION"] == "no"
    assert (variables.get("ACCELERATE_USE_FSDP") == "true") is (config == "fsdp.yaml")
    assert not caplog.records


def test_several_machines_are_overridden() -> None:
    places = ["--num_machines=4", "--machine_rank=3", "--main_process_ip=10.1.2.3", "--main_process_port=1234"]
    parsed, _ = launch_environment("several_machines.yaml", *places)
    assert (parsed.nproc_per_node, parsed.nnodes, parsed.node_rank) == ("1", "4", 3)
    assert parsed.rdzv_endpoint == "10.1.2.3:1234"


def test_fsdp_configuration_selects_version_2_without_warnings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate import FullyShardedDataParallelPlugin, PartialState

    _, variables = launch_environment("fsdp.yaml")
    for name, value in variables.items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    PartialState(cpu=True)  # accelerate's logger wants it
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert "SHARDED" in str(plugin.state_dict_type)
    assert plugin.cpu_ram_efficient_loading is False
    assert not caplog.records


# ---------------------------------------------------------------------------------------------------- the scripts


@pytest.fixture
def demo_run(tmp_path: Path, demo_rows: list, write_jsonl: Callable) -> dict[str, str]:
    """Variables of a short run of the demo from rows that have codes."""
    return {
        "ENV_FILE": ".env.overfit", "OUTPUT_DIR": str(tmp_path / "out"), "TRAIN_JSONL": str(write_jsonl(demo_rows[:4])),
        "VALIDATION_JSONL": str(write_jsonl(demo_rows[4:6], "validation.jsonl")), "BATCH_SIZE": "1",
        "LOGGING_STEPS": "1", "VERIFY_ROUNDTRIP": "0", "SAMPLE_STEPS": "0", "NUM_PROCESSES": "2",
    }  # fmt: skip


def test_launch_4gpu_trains_with_two_processes(demo_run: dict, tmp_path: Path) -> None:
    done = finish(start(["./launch_4gpu.sh"], **demo_run, MAX_STEPS="2", EFFECTIVE_BATCH_SIZE="2"))
    assert done.code == 0, done.err[-3000:]
    logged = (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2]
    assert "2 rows each" in done.out  # BATCH_SIZE=1 on two processes
    assert (tmp_path / "out" / "last" / "model.safetensors").is_file()


def test_sigterm_to_the_script_saves_and_leaves_with_143(demo_run: dict, tmp_path: Path) -> None:
    process = start(["./launch_4gpu.sh"], **demo_run, NUM_EPOCHS="100000")
    log, end = tmp_path / "out" / "training_log.jsonl", time.monotonic() + 240
    while not (log.is_file() and log.read_text()) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    process.terminate()
    done = finish(process)
    assert done.code == 143, done.err[-3000:]
    assert done.err.count("stopped by signal 15") == 1
    assert "Traceback" not in done.err
    assert (tmp_path / "out" / "last" / "model.safetensors").is_file()


def test_an_error_of_all_processes_is_told_once(demo_run: dict, tmp_path: Path) -> None:
    demo_run["TRAIN_JSONL"] = str(tmp_path / "gone.jsonl")
    done = finish(start(["./launch_4gpu.sh"], **demo_run))
    assert done.code == 2, done.err
    assert len(error_lines(done)) == 1
    assert error_lines(done)[0].startswith("error: TRAIN_JSONL:")
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NUM_PROCESSES": "two"}, 'NUM_PROCESSES: "two" is not a whole number'),
        ({"NUM_MACHINES": "2"}, "NUM_MACHINES=2 needs MAIN_PROCESS_IP"),
        ({"NUM_MACHINES": "2", "MAIN_PROCESS_IP": "127.0.0.1", "MACHINE_RANK": "2"}, 'MACHINE_RANK: "2" must be 0'),
        ({"ACCELERATE_CONFIG": "gone.yaml"}, "ACCELERATE_CONFIG: gone.yaml cannot be used"),
        ({"DEVICE": "auto", "CUDA_VISIBLE_DEVICES": ""}, "4 processes need 4 GPUs on this machine, and 0 are visible"),
        ({"BATCH_SIZE": "many"}, "BATCH_SIZE"),
        ({"EFFECTIVE_BATCH_SIZE": "4"}, "BATCH_SIZE 4 x GRADIENT_ACCUMULATION_STEPS 1 x 4 process(es) = 16"),
    ],
)
def test_what_cannot_be_launched_is_refused_at_once(variables: dict, message: str) -> None:
    done = finish(start(["./launch_4gpu.sh"], **({"ENV_FILE": ".env.overfit"} | variables)))
    assert done.code == 2, done.err
    assert len(error_lines(done)) == 1
    assert message in done.err
    assert "Traceback" not in done.err


def test_two_machines_work_together(worker: str) -> None:
    """Both on this one, with one process each."""
    port = free_port()
    script = 'source scripts/install.sh; source scripts/launch.sh; start python "$0" well'
    machines = [
        start(
            ["bash", "-c", script, worker], NUM_PROCESSES="1", NUM_MACHINES="2", MACHINE_RANK=str(rank),
            MAIN_PROCESS_IP="127.0.0.1", MAIN_PROCESS_PORT=port,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank, done in enumerate(map(finish, machines)):
        assert done.code == 0, done.err
        assert f"process {rank} counted 2" in done.out


# --------------------------------------------------------------------------------------- one process fails, all end


def test_a_user_error_of_one_process_ends_all(launch_worker: Callable) -> None:
    done = finish(launch_worker("user error"), timeout=150)
    assert done.code == 2
    assert error_lines(done) == ["error: the second has no space"]
    assert "Traceback" not in done.err


def test_a_bug_of_one_process_is_traced_once(launch_worker: Callable) -> None:
    done = finish(launch_worker("bug"), timeout=150)
    assert done.code == 1
    assert done.err.count("Traceback") == 1
    assert done.err.rstrip().endswith("KeyError: 'the second is wrong'")


def test_a_killed_process_is_told_and_its_survivors_know(launch_worker: Callable) -> None:
    done = finish(launch_worker("killed"), timeout=150)
    assert done.code == 1
    assert error_lines(done)[0].startswith("error: process 1 was killed by SIGKILL, usually because")
    assert "Traceback" not in done.err
    assert "survivor ends True" in done.out


def test_ctrl_c_reaches_the_processes(launch_worker: Callable, tmp_path: Path) -> None:
    """They run in sessions of their own, so that the terminal sends it to the launcher alone."""
    process, end = launch_worker("waits", str(tmp_path)), time.monotonic() + 240
    ready = [tmp_path / "0", tmp_path / "1"]
    while not all(map(Path.exists, ready)) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    done = finish(process, timeout=150)
    assert done.code == 130
    assert done.err.strip() == "interrupted"


def test_one_message_under_torchrun_too(worker: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker]
    done = finish(start([*command, "user error"], TMPDIR=str(tmp_path)), timeout=150)
    assert done.code == 1  # its own code for every failure
    assert error_lines(done) == ["error: the second has no space"]
    assert "RuntimeError" not in done.err
    (report,) = tmp_path.glob("launch-*.json")
    assert json.loads(report.read_text())["exit_code"] == 2


# -------------------------------------------------------------------------------------------------------- the report


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This process as the second of two; returns where the report of their launch lies."""
    report = tmp_path / "report.json"
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", errors.REPORT_VARIABLE: str(report)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return report


def test_only_the_first_report_counts(launched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not errors.another_process_failed()
    assert errors._file_report(2, "first") is None
    assert not errors.another_process_failed()  # it was this one
    monkeypatch.setenv("RANK", "0")
    assert errors.another_process_failed()
    assert errors._file_report(1, "second") == {"exit_code": 2, "rank": 1, "message": "first"}
    assert [file.name for file in launched.parent.iterdir()] == [launched.name]


def test_a_process_that_cannot_report_speaks(launched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(errors.REPORT_VARIABLE, str(launched.parent / "gone" / "report.json"))
    assert errors._file_report(2, "no folder") is None


def test_processes_of_a_launch_derive_the_same_report(launched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(errors.REPORT_VARIABLE)
    code = "from finetuning.errors import report_path; print(report_path())"

    def derived(port: str) -> str:
        environment = os.environ | {"MASTER_PORT": port}
        return subprocess.run(
            [sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert derived("1") == derived("1")
    assert derived("1") != derived("2")
    assert derived("1") != str(errors.report_path())  # another parent


def test_one_process_alone_reports_nothing(launched: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")

    def main() -> None:
        raise errors.UserError("no space")

    with pytest.raises(SystemExit) as left:
        errors.run_main(main)
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: no space\n"
    assert not launched.exists()


# ------------------------------------------------------------------------------------------------------- preflight


def test_preflight_of_two_processes(demo_run: dict) -> None:
    script = "source scripts/install.sh; source scripts/launch.sh; start python test_setup.py"
    done = finish(start(["bash", "-c", script], **demo_run))
    assert done.code == 0, done.out + done.err
    assert " 5. ✓ processes: 2 processes can talk (gloo)" in done.out
    assert done.out.count("✓ one training step") == 1


def test_a_check_fails_for_all_when_it_fails_in_one(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from test_setup import Preflight

    preflight = Preflight()
    preflight.accelerator = SimpleNamespace(num_processes=2)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda problems: [*problems, "disk is full"])
    preflight.check("disk", lambda: "fits")
    assert "✗ disk: process 1: disk is full" in capsys.readouterr().out
    with pytest.raises(errors.UserError, match="1 check"):
        preflight.summary()


def test_processes_that_cannot_talk_are_told() -> None:
    """The second of two, whose first was never started."""
    code = (
        "from accelerate import Accelerator; from finetuning.errors import run_main; "
        "from finetuning.processes import check_processes_talk; "
        "run_main(lambda: check_processes_talk(lambda: Accelerator(cpu=True), max_seconds=1))"
    )
    variables = {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    done = finish(start([sys.executable, "-c", code], **variables), timeout=150)
    assert done.code == 2
    assert error_lines(done)[0].startswith("error: process 1 of 2 has waited 1 s for the others in vain")
