"""Bases stored in bf16: what stays so in memory, and that nothing is computed, trained or exported otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOICE
from safetensors.torch import load_file, save_file
from training import build, make_trainer

from finetuning.base_model import load_model, resolve_base, set_precision
from finetuning.building import keeps_bf16
from finetuning.layer_utils import replace_and_add_layers
from finetuning.objective import TrainingObjective, step_loss
from finetuning.sharding import FSDP_VARIABLE
from finetuning.speakers import speaker_vector
from finetuning.tiny_model import embedded_model_folder

pytestmark = pytest.mark.usefixtures("one_thread")
CODEC_TABLE = "talker.model.codec_embedding.weight"
TEXT_TABLE = "talker.model.text_embedding.weight"


@pytest.fixture(scope="module")
def bf16_folder() -> Path:
    return embedded_model_folder("tiny-random", "bfloat16")


@pytest.fixture
def settings(bf16_folder: Path, make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Any:
    """Two layers replaced, two added, the rest frozen; one step."""
    return make_settings(
        init_model_path=str(bf16_folder), mixed_precision="bf16", train_jsonl=write_jsonl(demo_rows[:4]), batch_size=4,
        replace_last_n_layers=2, add_new_layers=2, max_steps=1, learning_rate=1e-2, warmup_steps=0,
        validation_fraction=0.0,
    )  # fmt: skip


@pytest.fixture
def base(bf16_folder: Path, make_settings: Callable) -> Any:
    return resolve_base(make_settings(init_model_path=str(bf16_folder)))


def dtypes(model: Any) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def frozen_matrices(model: Any) -> set[str]:
    talker = [item for item in model.named_parameters() if item[0].startswith("talker.")]
    return {name for name, parameter in talker if parameter.ndim == 2 and not parameter.requires_grad}


def losses_and_gradients(objective: TrainingObjective, batch: dict) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        sums = objective.train()(batch)
    step_loss(sums, 10, 10, 0.3).backward()
    return sums | {name: item.grad for name, item in objective.named_parameters() if item.requires_grad}


def test_frozen_matrices_in_bf16_change_no_loss_and_no_gradient(settings: Any, base: Any) -> None:
    run = build(settings)
    plain = load_model(base, "sdpa")
    replace_and_add_layers(plain, 2, 2, verbose=False)
    # The added layers are random. All else must have been loaded as the plain model's is.
    for name, tensor in run.model.state_dict().items():
        if name.startswith(("talker.model.layers.4.", "talker.model.layers.5.")):
            plain.get_parameter(name).data.copy_(tensor)
        assert torch.equal(plain.state_dict()[name], tensor.float())
    for (name, ours), theirs in zip(run.model.named_buffers(), plain.buffers(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    batch = next(iter(run.train.steps(0))).batches[0]
    got = losses_and_gradients(run.objective, batch)
    want = losses_and_gradients(TrainingObjective(plain.talker, run.speakers.vectors), batch)
    assert got.keys() == want.keys()
    assert [name for name in got if not torch.equal(got[name], want[name])] == []
    assert all(tensor.dtype == torch.float32 for tensor in got.values())


def test_what_stays_in_bf16(settings: Any) -> None:
    model = build(settings).model
    assert {TEXT_TABLE, CODEC_TABLE, "talker.model.layers.0.mlp.up_proj.weight"} <= frozen_matrices(model)
    assert {name for name, dtype in dtypes(model).items() if dtype == torch.bfloat16} == frozen_matrices(model)
    assert set(dtypes(model).values()) == {torch.bfloat16, torch.float32}


def test_the_speaker_encoder_hears_in_fp32(base: Any) -> None:
    clip = VOICE / "english_voice.wav"
    kept, plain = (load_model(base, "sdpa", keep_bf16=keep) for keep in (True, False))
    assert dtypes(kept)[CODEC_TABLE] == torch.bfloat16
    assert torch.equal(speaker_vector(kept, clip), speaker_vector(plain, clip))


def test_an_export_keeps_what_is_frozen_bit_for_bit(settings: Any, bf16_folder: Path) -> None:
    run = build(settings)
    make_trainer(run).run()
    before, after = (load_file(folder / "model.safetensors") for folder in (bf16_folder, settings.output_dir / "last"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert torch.equal(after[CODEC_TABLE][3000].float(), run.speakers.vectors[0])
    assert not torch.equal(after[CODEC_TABLE][3000], before[CODEC_TABLE][3000])
    after[CODEC_TABLE][3000] = before[CODEC_TABLE][3000]
    for name, parameter in run.model.named_parameters():
        if name in after and name in before and not (parameter.requires_grad and parameter.ndim == 1):
            # A norm near 1 may not move by as much as bf16 shows.
            assert torch.equal(after[name], before[name]) is not parameter.requires_grad, name


def test_fp32_where_bf16_would_round_or_not_work(
    settings: Any, make_settings: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert keeps_bf16(settings)
    assert not keeps_bf16(make_settings(mixed_precision="no"))
    monkeypatch.setenv(FSDP_VARIABLE, "true")
    assert not keeps_bf16(settings)


@pytest.mark.parametrize("in_fp32", [{TEXT_TABLE}, None], ids=["a base of two precisions", "a base in fp32"])
def test_what_is_stored_in_fp32_is_not_rounded(
    in_fp32: set[str] | None, bf16_folder: Path, make_settings: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bf16_folder, folder)
    weights = load_file(folder / "model.safetensors")
    # A third has more digits than bf16 holds.
    precise = {name: tensor.float() / 3 for name, tensor in weights.items() if in_fp32 is None or name in in_fp32}
    save_file(weights | precise, folder / "model.safetensors", metadata={"format": "pt"})
    base = resolve_base(make_settings(init_model_path=str(folder)))
    model = load_model(base, "sdpa", keep_bf16=True)
    replace_and_add_layers(model, 1, 0, verbose=False)
    set_precision(model, base)
    frozen = frozen_matrices(model)
    assert {name for name, dtype in dtypes(model).items() if dtype == torch.bfloat16} == frozen - precise.keys()
    assert all(torch.equal(model.state_dict()[name].float(), tensor.float()) for name, tensor in precise.items())


def test_weights_that_train_in_bf16_are_not_copied_to_fp32(base: Any) -> None:
    model = load_model(base, "sdpa", keep_bf16=True)
    replace_and_add_layers(model, 0, 0, freeze_original_layers=False, verbose=False)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    set_precision(model, base, train_in_bf16=True)
    for name, parameter in model.named_parameters():
        stays = name.startswith("talker.") and parameter.ndim == 2
        assert parameter.dtype == (torch.bfloat16 if stays else torch.float32), name
        assert not stays or parameter.data_ptr() == pointers[name]
