"""Two processes train what one with the doubled batch trains, as copies (DDP) and in shards (FSDP)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOICE
from reference import load_stock
from safetensors.torch import load_file
from training import FULL
from two_processes import launch, record

pytestmark = pytest.mark.usefixtures("one_thread")

#: Codec frames of the training rows. A step takes eight of them: the second has a micro-batch of four and one of a
#: single row, so that the second process has nothing in it.
TRAIN_FRAMES = [2, 40, 5, 23, 3, 31, 12, 7, 18, 2, 48, 11, 4]
#: Three validation batches of two, unevenly shared.
VALIDATION_FRAMES = [9, 3, 26, 2, 14]


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
        "verify_roundtrip": 0,
        "data_check": "off",
    }


@pytest.fixture(scope="module")
def one(fields: dict, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What one process saw."""
    from finetuning.settings import load_settings

    output = tmp_path_factory.mktemp("one") / "output"
    seen = record(load_settings(fields | {"output_dir": str(output)}, environment={}))
    return SimpleNamespace(output=output, **seen)


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two(request: pytest.FixtureRequest, fields: dict, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What two processes with half the batch each saw."""
    folder = tmp_path_factory.mktemp(request.param)
    output = folder / "output"
    settings = folder / "settings.json"
    settings.write_text(json.dumps(fields | {"output_dir": str(output), "batch_size": fields["batch_size"] // 2}))
    launch(["train", str(settings), str(folder)], ACCELERATE_USE_FSDP=str(request.param == "fsdp").lower())
    return SimpleNamespace(
        mode=request.param,
        output=output,
        gradients=load_file(folder / "gradients.safetensors"),
        weights=load_file(folder / "weights.safetensors"),
        processes=[json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(2)],
    )


def read_log(output: Path, name: str = "training_log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output / name).read_text(encoding="utf-8").splitlines()]


def distances(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each tensor is from the wanted one, relative to that one's norm."""
    assert got.keys() == want.keys()
    return {name: float((got[name] - want[name]).norm() / want[name].norm().clamp(min=1e-12)) for name in want}


def test_gradients_of_the_first_step(one: Any, two: Any) -> None:
    assert len(one.gradients) > 100
    far = {name: far for name, far in distances(two.gradients, one.gradients).items() if far > 1e-5}
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
    assert [process["num_empty_batches"] for process in two.processes] == [0, 5]


def test_weights_after_ten_steps(one: Any, two: Any) -> None:
    far = {name: far for name, far in distances(two.weights, one.weights).items() if far > 1e-4}
    assert not far
    assert max((two.weights[name] - tensor).abs().max() for name, tensor in one.weights.items()) < 1e-4


def test_validation_is_summed_over_both(one: Any, two: Any) -> None:
    got, want = (read_log(seen.output, "validation_log.jsonl") for seen in (two, one))
    assert [line["step"] for line in got] == [line["step"] for line in want] == [2, 4, 6, 8, 10]
    for name in ("loss", "talker_loss", "sub_talker_loss"):
        figures = [[({**line, **line["metrics"]})[name] for line in lines] for lines in (got, want)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4)


def test_parameters_are_sharded_only_under_fsdp(one: Any, two: Any) -> None:
    """Every one of them, frozen ones too, in parts along its first dimension that are together the whole."""
    assert {kind for kind, *_ in one.shards.values()} == {"Tensor"}
    first, second = (process["shards"] for process in two.processes)
    for name, (kind, placements, shape, local) in first.items():
        other = second[name][3]
        if two.mode == "ddp":
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
