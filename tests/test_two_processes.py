"""Two processes train what one with the doubled batch trains, as copies (DDP) and in shards (FSDP): to the end, stopped
and resumed by as many or others, without memory, with a disk that is full for one of them.

All of it is one launch; see ``two_processes``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import VOICE
from reference import load_stock
from safetensors import safe_open
from safetensors.torch import load_file
from training import FULL, flat
from two_processes import Life, launch, live_alone, read_life

from finetuning.checkpoint import CODEC_TABLE as TABLE
from finetuning.disk import damage
from finetuning.tiny_model import embedded_model_folder

pytestmark = pytest.mark.usefixtures("one_thread")

#: Codec frames of the training rows. A step takes eight of them: the second has a micro-batch of four and one of a
#: single row, so that the second process has nothing in it.
TRAIN_FRAMES = [2, 40, 5, 23, 3, 31, 12, 7, 18, 2, 48, 11, 4]
#: Three validation batches of two, unevenly shared.
VALIDATION_FRAMES = [9, 3, 26, 2, 14]
#: Runs are stopped in this step, the first of the second epoch.
STOP = 3
MODES = ("ddp", "fsdp")
#: Figures of a log line that depend on the clock.
CLOCK = ("timestamp", "frames_per_second", "seconds_left")
#: What fails of each save; see ``test_a_full_disk_of_one_process``.
FAILING = ["", "state", "export", "", "log", "export", "state"]
#: Lines that cannot be read in the same lives.
DAMAGED = [2, 5, 9]
#: New layers, with what saves time: each process trains on a share of its rows' frames, and finds what the other kept.
LAYERS = {"replace_last_n_layers": 1, "add_new_layers": 1, "freeze_original_layers": True, "num_epochs": 3}
LEVERS = {"sub_talker_frame_fraction": 0.5, "gradient_checkpointing": True, "prefix_cache": "disk"}
#: What the objective holds itself and trains; and rows with references of their own.
VECTORS = {"new_languages": "hausa", "speaker_embedding_trainable": True, "num_epochs": 3}
#: Said at the end of these lives: two texts by the first process, one by the second.
SAMPLES = {"sample_steps": 99, "eval_texts": "Yes.|No, thank you.|Rain."}
CLONING = {"export_type": "base", "icl_fraction": 0.5, "reference_sampling": "same_speaker", "num_epochs": 3}
#: Adapters, whose matrices and frozen weights are shared out like all others.
LORA = {"lora_rank": 4, "lora_dropout": 0.0, "freeze_original_layers": True, "num_epochs": 3}
#: Six steps: the sub-talker, then the new layers, then all; and the average of the weights.
STAGES = LAYERS | {"layer_init": "copy", "train_stages": "sub_talker:2,new_layers:2,all", "ema_decay": 0.5}
#: All weights in bf16, rounded at random, and rows by their frames.
SMALL = {"weights_precision": "bf16", "mixed_precision": "bf16", "max_frames_per_batch": 60, "batch_size": None}


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of one process."""
    data = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    raw = [json.loads(line) for line in (VOICE / "train_raw.jsonl").read_text(encoding="utf-8").splitlines()]

    def write(name: str, rows: list[dict], frames: list[int]) -> str:
        for row, count in zip(rows, frames, strict=True):
            row |= {key: str(VOICE / row[key]) for key in ("audio", "ref_audio")}
            row["audio_codes"] = generator.integers(0, 2048, (count, 16)).tolist()
            row["language"] = "Hausa" if count % 2 else "English"
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(data / name)

    num_train = len(TRAIN_FRAMES)
    return FULL | {
        "device": "cpu",
        "mixed_precision": "no",
        "init_model_path": "tiny-random",
        "use_wandb": False,
        "train_jsonl": write("train.jsonl", raw[:num_train], TRAIN_FRAMES),
        "validation_jsonl": write("validation.jsonl", raw[-len(VALIDATION_FRAMES) :], VALIDATION_FRAMES),
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_epochs": 5,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 4,
        "verify_roundtrip": 0,
        "data_check": "off",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all lives."""
    return tmp_path_factory.mktemp("lives")


@pytest.fixture(scope="module")
def life_of(fields: dict, folder: Path) -> Callable[..., Life]:
    """A life of the fields above and others, in an OUTPUT_DIR of its own."""

    def make(name: str, sharded: bool = False, alone: bool = False, tricks: dict | None = None, **others: Any) -> Life:
        batch_size = fields["batch_size"] if alone else fields["batch_size"] // 2
        own = {"output_dir": str(folder / name / "output"), "batch_size": batch_size}
        own |= {"prefix_cache_dir": str(folder / "prefix_cache")}
        given = {name: value for name, value in (fields | own | others).items() if value is not None}
        return Life(name, given, sharded, tricks or {})

    return make


@pytest.fixture(scope="module")
def one(life_of: Callable, folder: Path) -> SimpleNamespace:
    """What one process saw."""
    return live_alone(folder, life_of("one", alone=True, tricks={"gradients_of": [1], "validate": [1, 3, 5]}))


@pytest.fixture(scope="module")
def one_stopped(life_of: Callable, folder: Path) -> SimpleNamespace:
    """Stopped; there was no memory for all four rows of a micro-batch."""
    tricks = {"signal_in": [STOP, 0], "no_memory": [0, 1, 2]}
    return live_alone(folder, life_of("one-stopped", alone=True, tricks=tricks))


@pytest.fixture(scope="module")
def lives(life_of: Callable, folder: Path, one_stopped: SimpleNamespace) -> Callable[[str], SimpleNamespace]:
    """What two processes with half the batch each saw, by the name of their life."""

    def state(stopped: str) -> str:
        return str(folder / stopped / "output" / "state" / f"step-{STOP}")

    whole = {"spoil": True, "gradients_of": [1, STOP], "validate": [1, 3, 5]}
    stop, go_on = {"signal_in": [STOP, 1]}, {"end_after": 5}
    faults = {"failing_saves": FAILING, "damaged": DAMAGED}
    listed = [
        life_of("ddp", tricks=whole),
        life_of("fsdp", sharded=True, tricks=whole),
        life_of("ddp-stopped", tricks=stop),
        life_of("fsdp-stopped", sharded=True, tricks=stop),
        life_of("ddp-resumed", output_dir=str(folder / "ddp-stopped" / "output")),
        life_of("fsdp-resumed", sharded=True, resume=state("fsdp-stopped")),
        life_of("fsdp-to-ddp", resume=state("fsdp-stopped"), tricks=go_on),
        life_of("one-to-fsdp", sharded=True, resume=state("one-stopped"), tricks=go_on),
        life_of("stopped-between", tricks={"signal_in": [1, 1]}, logging_steps=9, eval_steps=9, save_steps=9),
        *(life_of(f"disk-{mode}", mode == "fsdp", tricks=faults, save_steps=1, eval_steps=9) for mode in MODES),
        life_of("memory-first", tricks={"no_memory": [1, 1, 1], "gradients_of": [1], "end_after": 1}),
        life_of("memory-last", tricks={"no_memory": [1, 6, 1], "gradients_of": [STOP], "end_after": STOP}),
        life_of("memory-none", tricks={"no_memory": [1, 1, 0]}),
        life_of("memory-backward", tricks={"no_memory_in_backward": [1, 2]}),
        life_of("memory-sharded", sharded=True, tricks={"no_memory": [1, 1, 1]}),
        life_of("ddp-levers", **LAYERS | LEVERS),
        life_of("ddp-small", **SMALL, num_epochs=2),
        *(life_of(f"{mode}-lora", mode == "fsdp", **LORA) for mode in MODES),
        *(life_of(f"{mode}-vectors", mode == "fsdp", **VECTORS, **SAMPLES) for mode in MODES),
        life_of("ddp-speaking-stopped", tricks={"signal_while_speaking": 1}, **VECTORS, **SAMPLES),
        life_of(
            "ddp-speaking-resumed", **VECTORS, **SAMPLES, output_dir=str(folder / "ddp-speaking-stopped" / "output")
        ),
        life_of("ddp-cloning", **CLONING),
        *(life_of(f"{mode}-stages", mode == "fsdp", tricks={"notes_moves": True}, **STAGES) for mode in MODES),
        life_of("fsdp-stages-stopped", sharded=True, tricks=stop, **STAGES),
        life_of(
            "fsdp-stages-resumed", sharded=True, **STAGES | {"output_dir": folder / "fsdp-stages-stopped" / "output"}
        ),
        life_of(
            "ddp-patience", tricks={"own_figures": True}, learning_rate=1e-30, eval_steps=1, early_stopping_patience=2
        ),
        life_of("fsdp-checkpointed", True, tricks={"gradients_of": [1], "end_after": 3}, gradient_checkpointing=True),
    ]
    launch(folder, listed)
    return lambda name: read_life(folder, name)


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def two(mode: str, lives: Callable) -> SimpleNamespace:
    """The life that nothing disturbed."""
    seen = lives(mode)
    assert seen.exit_codes == [0, 0], seen.printed
    return seen


@pytest.fixture(scope="module")
def one_resumed(lives: Callable, life_of: Callable, folder: Path) -> SimpleNamespace:
    """One process that goes on with the state of two sharded ones."""
    state = folder / "fsdp-stopped" / "output" / "state" / f"step-{STOP}"
    return live_alone(folder, life_of("fsdp-to-one", alone=True, resume=str(state), tricks={"end_after": 5}))


def read_log(output: Path, name: str = "training_log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output / name).read_text(encoding="utf-8").splitlines()]


def gradients_of(seen: SimpleNamespace, step: int) -> dict[str, torch.Tensor]:
    return {name: gradient for name, gradient in seen.gradients.items() if name.startswith(f"{step}.")}


def distances(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each tensor is from the wanted one, relative to that one's norm."""
    assert got.keys() == want.keys()
    return {name: float((got[name] - want[name]).norm() / want[name].norm().clamp(min=1e-12)) for name in want}


def test_gradients_of_the_first_step(one: Any, two: Any) -> None:
    assert len(one.gradients) > 100
    far = {name: far for name, far in distances(gradients_of(two, 1), one.gradients).items() if far > 1e-5}
    assert not far


def test_gradient_norm_and_losses_of_every_step(one: Any, two: Any) -> None:
    names = ("grad_norm", "loss", "talker_loss", "sub_talker_loss", "learning_rate")
    figures = [[[line[name] for name in names] for line in read_log(seen.output)] for seen in (one, two)]
    assert len(figures[0]) == 10
    assert np.asarray(figures[1]) == pytest.approx(np.asarray(figures[0]), rel=1e-4)


def test_clipping_took_part(one: Any) -> None:
    """Or the gradients above would not show that the norm is the whole job's."""
    assert all(line["grad_norm"] > 1.01 for line in read_log(one.output))


def test_one_process_had_micro_batches_without_rows(two: Any) -> None:
    """One at the end of each of the five epochs."""
    assert [process.num_empty_batches for process in two.processes] == [0, 5]


def test_weights_after_ten_steps(one: Any, two: Any) -> None:
    far = {name: far for name, far in distances(two.weights, one.weights).items() if far > 1e-4}
    assert not far
    assert max((two.weights[name] - tensor).abs().max() for name, tensor in one.weights.items()) < 1e-4


def test_validation_is_summed_over_both(one: Any, two: Any) -> None:
    got, want = (read_log(seen.output, "validation_log.jsonl") for seen in (two, one))
    assert [line["step"] for line in got] == [line["step"] for line in want] == [2, 3, 4, 6, 8, 9, 10]
    for name in ("loss", "talker_loss", "sub_talker_loss"):
        figures = [[({**line, **line["metrics"]})[name] for line in lines] for lines in (got, want)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4)


@pytest.mark.parametrize("num_rows", [1, 3, 5])
def test_validation_rows_that_do_not_divide(one: Any, two: Any, num_rows: int) -> None:
    """Fewer than the processes, and batches that are fewer or no multiple: each process has the figures of one."""
    want = flat(one.processes[0].validations[str(num_rows)])
    for process in two.processes:
        assert flat(process.validations[str(num_rows)]) == pytest.approx(want, rel=1e-6)


def test_parameters_are_sharded_only_under_fsdp(one: Any, two: Any, mode: str) -> None:
    """Every one of them, frozen ones too, in parts along its first dimension that are together the whole."""
    assert {kind for kind, *_ in one.processes[0].shards.values()} == {"Tensor"}
    first, second = (process.shards for process in two.processes)
    for name, (kind, placements, shape, local) in first.items():
        other = second[name][3]
        if mode == "ddp":
            assert (kind, local, other) == ("Tensor", shape, shape)
        else:
            assert (kind, placements) == ("DTensor", "(Shard(dim=0),)")
            assert local[0] < shape[0]
            assert [local[0] + other[0], *local[1:]] == shape


def test_the_export_loads_in_stock(two: Any) -> None:
    """With the weights of the end of training, the speaker's vector in its row, and speech from them."""
    for name in ("last", "best"):
        stock = load_stock(two.output / name)
        weights = stock.model.state_dict()
        rows = stock.model.config.talker_config.spk_id.values()
        for key, trained in two.weights.items():
            if name == "last" and key in weights:
                want = trained.to(torch.bfloat16).float() if is_bf16(two.output / name) else trained.clone()
                if key == "talker.model.codec_embedding.weight":
                    want[list(rows)] = weights[key][list(rows)]
                    assert not torch.equal(weights[key][list(rows)], trained[list(rows)])
                assert torch.equal(weights[key], want), key
    (speaker,) = stock.model.config.talker_config.spk_id
    waveforms, rate = stock.generate_custom_voice(text="Yes.", speaker=speaker, max_new_tokens=8)
    assert rate == 24_000 and len(waveforms[0]) > 0


def is_bf16(checkpoint: Path) -> bool:
    return load_file(checkpoint / "model.safetensors")["talker.model.codec_embedding.weight"].dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ stopped and resumed


def differing(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not bit for bit the same."""
    assert got.keys() == want.keys() and len(want) > 100
    return [name for name, tensor in want.items() if not torch.equal(got[name], tensor)]


def timeless(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def state_of(stopped: SimpleNamespace) -> Path:
    return stopped.output / "state" / f"step-{STOP}"


def test_a_signal_for_one_process_stops_both(mode: str, lives: Callable) -> None:
    """At the same step, after one save, with the exit code of the signal."""
    stopped = lives(f"{mode}-stopped")
    assert stopped.exit_codes == [143, 143], stopped.printed
    for process in stopped.processes:
        # The end of the first epoch, and the stop; step 3 is to be logged and evaluated at the next start.
        found = [(save["step"], save["names"], save["with_state"]) for save in process.saves]
        assert found == [(2, ["last", "best"], False), (STOP, ["last"], True)]
        assert process.step == STOP


def test_a_signal_between_logged_steps_stops_before_the_next(lives: Callable) -> None:
    """Several processes ask each other only now and then; where not before, they do as they fetch the next step."""
    stopped = lives("stopped-between")
    assert stopped.exit_codes == [143, 143], stopped.printed
    for process in stopped.processes:
        assert [(save["step"], save["with_state"], save["whole"]) for save in process.saves if "whole" in save] == (
            [(1, True, ["last", "step-1"])] if process is stopped.processes[0] else []
        )
        assert (process.step, len(process.rows)) == (1, 1)


def test_a_resumed_run_is_bit_for_bit_the_untouched_one(mode: str, lives: Callable, two: Any) -> None:
    """Weights and Adam's moments, checkpoints, logs but for the clock."""
    stopped, resumed = lives(f"{mode}-stopped"), lives(f"{mode}-resumed")
    assert resumed.exit_codes == [0, 0], resumed.printed
    assert differing(resumed.restored, stopped.final) == []
    assert differing(resumed.final, two.final) == []
    for name in ("last", "best", "checkpoint-4", "checkpoint-8"):
        weights = [load_file(seen.output / name / "model.safetensors") for seen in (resumed, two)]
        assert differing(*weights) == []
        records = [json.loads((seen.output / name / "training_state.json").read_text()) for seen in (resumed, two)]
        assert records[0] == records[1]
    for log in ("training_log.jsonl", "validation_log.jsonl"):
        got, want = (timeless(read_log(seen.output, log)) for seen in (resumed, two))
        assert got == want and len(want) > 6
    for first, then, untouched in zip(stopped.processes, resumed.processes, two.processes, strict=True):
        assert first.rows + then.rows == untouched.rows


def test_both_lose_their_patience_at_the_same_step(lives: Callable) -> None:
    """Evaluations at 1, 2 and 3 are ties, as next to nothing is learnt; the third ends the run in the second epoch.

    The first process's figures count: those of the second would never have it stop.
    """
    seen = lives("ddp-patience")
    assert seen.exit_codes == [0, 0], seen.printed
    assert [process.step for process in seen.processes] == [3, 3]
    state = json.loads((seen.output / "last" / "training_state.json").read_text())
    assert (state["step"], state["complete"], state["best_step"]) == (3, True, 1)
    assert seen.processes[0].said.count("Early stopping at step 3: 2 evaluations in a row") == 1


def test_sharded_processes_write_the_state_in_parts(lives: Callable) -> None:
    """Each its rows of every tensor, and neither a whole one; together they are what the processes held."""
    stopped = lives("fsdp-stopped")
    parts = {}
    for rank in range(2):
        (file,) = state_of(stopped).glob(f"process-{rank:05d}-of-00002.part-*.safetensors")
        parts[rank] = load_file(file)
    sharded = [name for name, tensor in stopped.final.items() if tensor.ndim]
    assert len(sharded) > 300  # weights and two moments
    for name in sharded:
        assert all(len(parts[rank][name]) < len(stopped.final[name]) for rank in range(2)), name
        assert torch.equal(torch.cat([parts[rank][name] for rank in range(2)]), stopped.final[name]), name


def test_copies_are_written_once(lives: Callable) -> None:
    """Under DDP the second process writes only what is its own."""
    (file,) = state_of(lives("ddp-stopped")).parent.glob("step-10/process-00001-of-00002.part-*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        assert {name.rpartition(".")[0] for name in tensors.keys()} == {"process.1"}  # noqa: SIM118 - no dict


@pytest.mark.parametrize("way", ["fsdp-to-one", "fsdp-to-ddp", "one-to-fsdp"])
def test_other_processes_go_on_with_a_state(way: str, lives: Callable, one_stopped: Any, one_resumed: Any) -> None:
    """One with that of two in shards, copies with that of shards, shards with that of one: from exactly the weights and
    moments of the state, with every row of the epoch once over both lives."""
    stopped = one_stopped if way == "one-to-fsdp" else lives("fsdp-stopped")
    resumed = one_resumed if way == "fsdp-to-one" else lives(way)
    assert resumed.exit_codes in ([], [0, 0]), resumed.printed
    assert differing(resumed.restored, stopped.final) == []
    taken = [rows for seen in (stopped, resumed) for process in seen.processes for rows in process.rows]
    lines = sorted(line for epoch, found in taken for line in found if epoch == 1)
    assert lines == list(range(1, len(TRAIN_FRAMES) + 1))
    numbers = len(stopped.processes), len(resumed.processes)
    said = f"saved by {numbers[0]} processes, now {numbers[1]}: the order of the rows may differ"
    assert (said in resumed.processes[0].said) == (numbers[0] != numbers[1])
    assert {process.step for process in resumed.processes} == {4}  # the fifth was ended inside
    if numbers[0] == numbers[1]:
        assert [process.rows[0] for process in resumed.processes] == [
            process.rows[STOP] for process in lives("ddp").processes
        ]


@pytest.mark.parametrize("way", ["fsdp-to-one", "fsdp-to-ddp", "one-to-fsdp"])
def test_other_processes_log_what_was_stopped(way: str, lives: Callable, one: Any, one_resumed: Any) -> None:
    """The step before the stop, whose sums came with the state, and its validation; then they train what the others
    would have, as far as the rows are the same."""
    resumed = one_resumed if way == "fsdp-to-one" else lives(way)
    (line,) = [line for line in read_log(resumed.output) if line["step"] == STOP]
    (want,) = [line for line in read_log(one.output) if line["step"] == STOP]
    assert {name: line[name] for name in want if name not in CLOCK} == pytest.approx(
        {name: want[name] for name in want if name not in CLOCK}, rel=1e-4
    )
    steps = [line["step"] for line in read_log(resumed.output, "validation_log.jsonl")]
    assert steps == [2, 3, 4]
    assert [line["step"] for line in read_log(resumed.output)] == [1, 2, 3, 4]


def test_shards_do_not_halve_micro_batches(lives: Callable, one_stopped: Any) -> None:
    """Not even after a state of halved ones: the processes would have unequal numbers of them."""
    assert one_stopped.processes[0].num_parts == 2
    assert [process.num_parts for process in lives("one-to-fsdp").processes] == [1, 1]


# ------------------------------------------------------------------------------------------------- faults of one of two


def test_a_full_disk_of_one_process(mode: str, lives: Callable) -> None:
    """Every step saves a checkpoint and a state, the end of an epoch last/ and best/. Both processes go on, and nothing
    of the attempt is left; what was whole stays so. The third failure in a row ends both."""
    seen = lives(f"disk-{mode}")
    assert seen.exit_codes == [2, 2], seen.printed
    first, second = (process.saves for process in seen.processes)
    assert [[save["failures"] for save in saves] for saves in (first, second)] == [[0, 1, 2, 0, 1, 2, 3]] * 2
    for saves in (first, second):
        outcomes = [(save["step"], save.get("checkpoints"), save.get("state")) for save in saves]
        assert outcomes == [
            (1, True, True),
            (2, True, False),  # the second process's part of the state
            (2, False, True),  # the first one's export; no state was asked for
            (3, True, True),
            (4, True, False),  # its logs, which come before the state
            (4, False, True),
            (5, None, None),  # UserError
        ]
    assert [save["leftovers"] for save in first] == [[]] * len(FAILING)
    assert [save["damaged"] for save in first] == [[]] * len(FAILING)
    assert [save["whole"] for save in first] == [
        ["checkpoint-1", "step-1"],
        *[["checkpoint-1", "checkpoint-2", "step-1"]] * 2,
        ["checkpoint-1", "checkpoint-2", "checkpoint-3", "step-1", "step-3"],
        *[["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4", "step-1", "step-3"]] * 2,
        ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5", "step-1", "step-3"],
    ]
    errors = [line for text in seen.printed for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "failed 3 times in a row" in errors[0] and "No space left on device" in errors[0]
    assert not damage(seen.output / "state" / "step-3")


def test_damaged_rows_of_both_are_listed(mode: str, lives: Callable) -> None:
    """In the two epochs that were trained to their end; all processes know their number."""
    seen = lives(f"disk-{mode}")
    listed = [row for row in read_log(seen.output, "skipped_rows.jsonl") if row["step"] <= 4]
    assert sorted(row["line"] for row in listed) == sorted(DAMAGED * 2)
    numbers = {process.num_skipped_rows for process in seen.processes}
    assert len(numbers) == 1 and numbers.pop() == len(DAMAGED)
    assert not {line for process in seen.processes for _, lines in process.rows for line in lines} & set(DAMAGED)


@pytest.mark.parametrize(("life", "step"), [("memory-first", 1), ("memory-last", STOP)])
def test_no_memory_in_one_process_halves_both(life: str, step: int, lives: Callable) -> None:
    """In the first forward of all, and in a last one, which the other process has behind it: the gradients of that step
    are those of the step that nothing disturbed."""
    seen, undisturbed = lives(life), lives("ddp")
    assert seen.exit_codes == [0, 0], seen.printed
    assert [process.num_parts for process in seen.processes] == [2, 2]
    want = gradients_of(undisturbed, step)
    assert len(want) > 100
    assert not {name: far for name, far in distances(seen.gradients, want).items() if far > 1e-6}
    assert seen.processes[0].said.count("out of GPU memory: the step is repeated with at most 1 rows") == 1


@pytest.mark.parametrize("life", ["memory-none", "memory-backward", "memory-sharded"])
def test_no_memory_where_nothing_helps(life: str, lives: Callable) -> None:
    """For single rows; in the backward in which the processes synchronise; in shards, where the others wait inside of
    their forward. Both processes end, with one message."""
    seen = lives(life)
    assert seen.exit_codes == [2, 2], seen.printed
    errors = [line for text in seen.printed for line in text.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    rows = 1 if life == "memory-none" else 2
    assert errors[0].startswith(f"error: the GPU's memory does not suffice for micro-batches of {rows} rows")


# ---------------------------------------------------------------------------------------------------------- levers


def test_two_with_levers_learn_what_one_does(lives: Callable, life_of: Callable, folder: Path) -> None:
    """The same random frames, and a prefix wherever it was computed; here one process computes it in every step."""
    two = lives("ddp-levers")
    assert two.exit_codes == [0, 0], two.printed
    one = live_alone(folder, life_of("one-levers", alone=True, **LAYERS | LEVERS | {"prefix_cache": "off"}))
    names = ("grad_norm", "loss", "talker_loss", "sub_talker_loss")
    figures = [[[line[name] for name in names] for line in read_log(seen.output)] for seen in (one, two)]
    assert len(figures[0]) == 6
    assert np.asarray(figures[1]) == pytest.approx(np.asarray(figures[0]), rel=1e-4)
    (kept,) = (folder / "prefix_cache").iterdir()
    assert len(list(kept.iterdir())) == len(TRAIN_FRAMES) + 1, (
        "each row once, and the one of micro-batches without rows"
    )


@pytest.fixture(scope="module")
def one_with_adapters(life_of: Callable, folder: Path) -> SimpleNamespace:
    return live_alone(folder, life_of("one-lora", alone=True, **LORA))


def test_two_train_adapters_as_one_does(mode: str, lives: Callable, one_with_adapters: Any) -> None:
    two, one = lives(f"{mode}-lora"), one_with_adapters
    assert two.exit_codes == [0, 0], two.printed
    assert_same_figures(one, two)
    merged = [load_file(seen.output / "last" / "model.safetensors") for seen in (one, two)]
    assert not {name: far for name, far in distances(merged[1], merged[0]).items() if far > 1e-3}
    adapters = [load_file(seen.output / "last" / "adapter" / "adapter_model.safetensors") for seen in (one, two)]
    assert adapters[0].keys() == adapters[1].keys() and len(adapters[0]) > 50


def test_two_processes_share_the_samples(lives: Callable) -> None:
    """Copies deal them out, and each is what stock says from the checkpoint; shards do not speak, and say so."""
    two = lives("ddp-vectors")
    folder = two.output / "samples" / "step-6"
    found = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    assert [one["text"] for one in found] == ["Yes.", "No, thank you.", "Rain."]
    stock = load_stock(two.output / "last")
    decode, seen = stock.model.speech_tokenizer.decode, []
    stock.model.speech_tokenizer.decode = lambda codes: seen.append(codes[0]["audio_codes"]) or decode(codes)
    for one in found:
        torch.manual_seed(one["seed"])
        bound = one["num_codec_frames"] + 1
        (waveform,), _ = stock.generate_custom_voice(one["text"], one["speaker"], one["language"], max_new_tokens=bound)
        assert len(seen[-1]) == one["num_codec_frames"]
        np.testing.assert_allclose(soundfile.read(folder / one["file"])[0], np.clip(waveform, -1, 1), atol=1e-4)
    last = read_log(two.output, "validation_log.jsonl")[-1]
    assert last["metrics"]["num_samples"] == 3 and last["loss"] is not None
    sharded = lives("fsdp-vectors")
    assert "SAMPLE_STEPS: no samples under FSDP" in sharded.processes[0].said
    assert not (sharded.output / "samples").exists()


def test_a_signal_for_one_process_that_speaks_stops_both(lives: Callable) -> None:
    """Between two frames; at the next start they speak again, and all is as if nothing had been."""
    stopped, resumed, two = (lives(f"ddp-{name}") for name in ("speaking-stopped", "speaking-resumed", "vectors"))
    assert stopped.exit_codes == [143, 143], stopped.printed
    assert resumed.exit_codes == [0, 0], resumed.printed
    for process in stopped.processes:
        assert (process.step, process.saves[-1]["names"], process.saves[-1]["with_state"]) == (6, ["last"], True)
    assert differing(resumed.final, two.final) == []
    samples = [json.loads((seen.output / "samples" / "step-6" / "samples.json").read_text()) for seen in (resumed, two)]
    assert samples[0] == samples[1]
    logs = [timeless(read_log(seen.output, "validation_log.jsonl")) for seen in (resumed, two)]
    assert logs[0] == logs[1] and logs[0][-1]["metrics"]["num_samples"] == 3


@pytest.fixture(scope="module")
def one_with_vectors(life_of: Callable, folder: Path) -> SimpleNamespace:
    return live_alone(folder, life_of("one-vectors", alone=True, **VECTORS))


def test_two_train_vectors_as_one_does(mode: str, lives: Callable, one_with_vectors: Any) -> None:
    """Of a speaker and of a language, which are sharded under FSDP; whole in the export."""
    two, one = lives(f"{mode}-vectors"), one_with_vectors
    assert two.exit_codes == [0, 0], two.printed
    assert_same_figures(one, two)
    base = load_file(embedded_model_folder("tiny-random") / "model.safetensors")[TABLE]
    rows = [load_file(seen.output / "last" / "model.safetensors")[TABLE][[3000, 2200]] for seen in (one, two)]
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-3, atol=1e-4)
    assert (rows[0] - base[[3000, 2200]]).abs().max() > 1e-3
    assert "language_vectors" in two.processes[0].shards and "speaker_vectors" in two.processes[0].shards


@pytest.fixture(scope="module")
def one_that_clones(life_of: Callable, folder: Path) -> SimpleNamespace:
    return live_alone(folder, life_of("one-cloning", alone=True, **CLONING))


def test_two_clone_as_one_does(lives: Callable, one_that_clones: Any) -> None:
    """The first process computes the references, both read them, and each row draws its own whoever trains it."""
    two = lives("ddp-cloning")
    assert two.exit_codes == [0, 0], two.printed
    assert_same_figures(one_that_clones, two)


def assert_same_figures(one: Any, two: Any) -> None:
    names = ("grad_norm", "loss", "talker_loss", "sub_talker_loss")
    figures = [[[line[name] for name in names] for line in read_log(seen.output)] for seen in (one, two)]
    assert len(figures[0]) == 6
    assert np.asarray(figures[1]) == pytest.approx(np.asarray(figures[0]), rel=1e-4)


def test_random_rounding_is_the_same_in_both(lives: Callable) -> None:
    pytest.importorskip("torchao")
    seen = lives("ddp-small")
    assert seen.exit_codes == [0, 0], seen.printed
    first, second = seen.processes
    assert first.fingerprint == second.fingerprint
    losses = [line["loss"] for line in read_log(seen.output)]
    assert losses[-1] < losses[0]
    for epoch in range(2):
        lines = [line for process in seen.processes for at, lines in process.rows if at == epoch for line in lines]
        assert sorted(lines) == list(range(1, 1 + len(TRAIN_FRAMES)))


def test_shards_compute_checkpointed_layers_again(one: Any, lives: Callable) -> None:
    seen = lives("fsdp-checkpointed")
    assert seen.exit_codes == [0, 0], seen.printed
    assert not {name: far for name, far in distances(seen.gradients, one.gradients).items() if far > 1e-5}
    norms = [[line["grad_norm"] for line in read_log(life.output)[:2]] for life in (one, seen)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and len(norms[1]) == 2


# ------------------------------------------------------------------------------------------- stages and the average


@pytest.fixture(scope="module")
def one_in_stages(life_of: Callable, folder: Path) -> SimpleNamespace:
    return live_alone(folder, life_of("one-stages", alone=True, tricks={"notes_moves": True}, **STAGES))


def test_two_train_in_stages_as_one_does(mode: str, lives: Callable, one_in_stages: Any) -> None:
    """One asks for no gradients out of the stage, two throw them away: the norm, what moves, weights and averages."""
    two, one = lives(f"{mode}-stages"), one_in_stages
    assert two.exit_codes == [0, 0], two.printed
    names = ("grad_norm", "loss", "talker_loss", "sub_talker_loss")
    figures = [[[line[name] for name in names] for line in read_log(seen.output)] for seen in (one, two)]
    assert len(figures[0]) == 6
    assert np.asarray(figures[1]) == pytest.approx(np.asarray(figures[0]), rel=1e-4)
    (moved,) = (process.moved for process in one.processes)
    assert [{name.split(".")[1] for name in step} for step in moved[:2]] == [{"code_predictor"}] * 2
    assert all(name.startswith(("talker.model.layers.3.", "talker.model.layers.4.")) for name in moved[2] + moved[3])
    for number, wanted in enumerate(moved):
        assert len(wanted) > 20
        assert set().union(*(process.moved[number] for process in two.processes)) == set(wanted)
    assert "Stage 2 of 3, new_layers: " in two.processes[0].said and "steps 3-4" in two.processes[0].said
    far = distances(without_counts(two.final), without_counts(one.final))
    assert sum(name.startswith("ema.") for name in far) > 50
    assert not {name: far for name, far in far.items() if far > 1e-3}


def without_counts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.ndim}


def test_the_average_is_the_same_in_both_copies(lives: Callable) -> None:
    first, second = lives("ddp-stages").processes
    assert first.average == second.average != first.fingerprint


def test_the_average_is_exported_and_validated_in_both_modes(mode: str, lives: Callable, one_in_stages: Any) -> None:
    two = lives(f"{mode}-stages")
    exported, num_seen = load_file(two.output / "last" / "model.safetensors"), 0
    for name, tensor in two.final.items():
        if name.startswith("ema.talker."):
            found = exported[name.removeprefix("ema.")]
            assert torch.equal(found, tensor.to(found.dtype)), name
            num_seen += not torch.equal(tensor, two.final[name.replace("ema.", "weights.", 1)])
    assert num_seen > 50
    losses = [[line["loss"] for line in read_log(seen.output, "validation_log.jsonl")] for seen in (one_in_stages, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_sharded_run_in_stages_is_resumed_bit_for_bit(lives: Callable) -> None:
    """Stopped in the first step of the second stage; each process has its part of the averages in the state."""
    stopped, resumed, two = (lives(f"fsdp-stages{end}") for end in ("-stopped", "-resumed", ""))
    assert (stopped.exit_codes, resumed.exit_codes) == ([143, 143], [0, 0]), resumed.printed
    assert differing(resumed.restored, stopped.final) == []
    assert differing(resumed.final, two.final) == []
    assert any(name.startswith("ema.talker.") for name in resumed.final)
    weights = [load_file(seen.output / "last" / "model.safetensors") for seen in (resumed, two)]
    assert differing(*weights) == []
    for rank in range(2):
        (file,) = two.output.glob(f"state/step-6/process-{rank:05d}-of-00002.part-*.safetensors")
        parts = load_file(file)
        for name, tensor in two.final.items():
            assert not (name.startswith("ema.") and tensor.ndim) or len(parts[name]) < len(tensor)
    assert "Stage 2 of 3" in resumed.processes[0].said and "Stage 1 of 3" not in resumed.processes[0].said
