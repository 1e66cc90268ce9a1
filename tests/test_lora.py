"""Adapters: what they are put on, that a checkpoint holds what was trained, and how they are merged into a base."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import load_stock
from safetensors.torch import load_file, save_file
from training import build, make_trainer, train

from finetuning import lora
from finetuning.adapters import is_adapter, linear_names, target_modules
from finetuning.base_model import load_model, resolve_base
from finetuning.checkpoint import CODEC_TABLE
from finetuning.dataset import collate
from finetuning.disk import damage
from finetuning.errors import UserError
from finetuning.layer_utils import model_summary
from finetuning.memory import parameter_counts
from finetuning.objective import TrainingObjective
from finetuning.speakers import Speakers
from finetuning.starting import check_inputs
from finetuning.tiny_model import embedded_model_folder

pytestmark = pytest.mark.usefixtures("one_thread")

#: A rate at which a few steps move the adapters well away from zero.
LORA = {"lora_rank": 4, "lora_dropout": 0.0, "learning_rate": 2e-2, "warmup_steps": 0, "batch_size": 2}
LORA |= {"gradient_accumulation_steps": 1, "num_epochs": 2, "validation_fraction": 0.0, "mixed_precision": "no"}


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict], tmp_path: Path) -> Callable:
    def make(name: str = "run", **fields: Any) -> Any:
        return make_settings(
            **(LORA | {"train_jsonl": write_jsonl(demo_rows[:4]), "output_dir": tmp_path / name} | fields)
        )

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, demo_rows: list[dict]) -> SimpleNamespace:
    """A run with adapters on everything, exported at three quarters of what it learnt; several tests look at it."""
    from finetuning.settings import load_settings

    folder = tmp_path_factory.mktemp("lora")
    jsonl = folder / "train.jsonl"
    jsonl.write_text("".join(json.dumps(row | {"speaker": "Anna"}) + "\n" for row in demo_rows[:4]), encoding="utf-8")
    own = {"device": "cpu", "init_model_path": "tiny-random", "use_wandb": False, "lora_export_scale": 0.75}
    own |= {"train_jsonl": jsonl, "output_dir": folder / "output"}
    run, _ = train(load_settings(LORA | own, environment={}))
    return SimpleNamespace(run=run, base=run.base, last=folder / "output" / "last", rows=demo_rows[:4])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("targets", "count", "example"),
    [
        ("attention", 16, "talker.model.layers.3.self_attn.o_proj"),
        ("mlp", 12, "talker.model.layers.0.mlp.down_proj"),
        ("sub_talker", None, "talker.code_predictor.model.layers.0.mlp.up_proj"),
        ("all", None, "talker.model.layers.1.self_attn.q_proj"),
        ("mlp, attention", 28, "talker.model.layers.3.self_attn.k_proj"),
        ("codec_head", 1, "talker.codec_head"),
        ("lm_head", 15, "talker.code_predictor.lm_head.14"),
        ("model.layers.2.mlp.up_proj", 1, "talker.model.layers.2.mlp.up_proj"),
    ],
)
def test_targets_are_found_by_word_or_name(targets: str, count: int | None, example: str, settings_for: Any) -> None:
    settings = settings_for(lora_targets=targets)
    shapes = resolve_base(settings).weight_shapes()
    found = target_modules(linear_names(shapes, shapes), settings)
    if (
        targets == "model.layers.2.mlp.up_proj"
    ):  # the sub-talker has no such layer in this shape, or it is found as well
        found = [name for name in found if "code_predictor" not in name]
    assert example in found and len(set(found)) == len(found)
    assert count is None or len(found) == count
    num_sub_talker = 7 * resolve_base(settings).talker_config["code_predictor_config"]["num_hidden_layers"]
    if targets in ("sub_talker", "all"):
        assert len(found) == num_sub_talker + 28 * (targets == "all")
        assert sum("code_predictor" in name for name in found) == num_sub_talker


def test_a_word_that_matches_nothing_lists_what_there_is(settings_for: Any) -> None:
    with pytest.raises(UserError, match=r'LORA_TARGETS: "qproj" matches nothing.*attention.*down_proj.*q_proj'):
        check_inputs(settings_for(lora_targets="mlp,qproj"))
    with pytest.raises(UserError, match='"codec_head" matches nothing'):  # it trains as a whole
        check_inputs(settings_for(lora_targets="codec_head", add_new_layers=1))
    with pytest.raises(UserError, match="LORA_TARGETS names nothing"):
        settings_for(lora_targets=" , ")


def test_new_layers_and_adapters(settings_for: Any) -> None:
    """LORA_RANK alone makes no new layers; with them each trains in its own way, and never both."""
    alone = settings_for()
    assert (alone.replace_last_n_layers, alone.add_new_layers) == (0, 0) and not alone.is_set("add_new_layers")
    run = build(alone)
    assert all(is_adapter(name) for name, parameter in run.model.named_parameters() if parameter.requires_grad)
    run.lock.close()
    tables = {"train_text_embedding": True, "train_codec_embedding": True}
    both = settings_for("both", add_new_layers=1, replace_last_n_layers=1, **tables)
    run = build(both)
    training = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    adapted = {name.partition(".lora_")[0] for name in training if is_adapter(name)}
    full = {name.removesuffix(".weight") for name in training if not is_adapter(name)}
    assert {"talker.codec_head", "talker.model.norm", "talker.model.text_embedding"} <= full
    assert sum("codec_embedding" in name for name in full) == 16
    assert {name.split(".")[3] for name in full if name.startswith("talker.model.layers.")} == {"3", "4"}
    assert {name.split(".")[3] for name in adapted if name.startswith("talker.model.layers.")} == {"0", "1", "2"}
    assert any("code_predictor" in name for name in adapted) and {
        name.split(".")[2] for name in full if "code_predictor" in name
    } == {"model"}
    assert adapted.isdisjoint(full)
    assert f"trainable {parameter_counts(run.base, both)[0]:,} of" in model_summary(run.model)
    run.lock.close()


def test_what_does_not_go_together_is_refused(settings_for: Any) -> None:
    with pytest.raises(UserError, match=r"LORA_RANK.*adapters stand beside frozen weights"):
        settings_for(freeze_original_layers=False)
    with pytest.raises(UserError, match=r"PREFIX_CACHE.*adapters train in the lowest layer"):
        settings_for(prefix_cache="ram")
    settings_for(prefix_cache="ram", lora_targets="sub_talker")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lora_targets": "attention", "add_new_layers": 2, "train_codec_embedding": True},
        {"lora_targets": "lm_head.0"},
    ],
)
def test_the_count_from_the_headers_is_that_of_the_model(settings_for: Any, fields: dict) -> None:
    settings = settings_for(**fields)
    run = build(settings)
    sizes = [(p.numel(), p.requires_grad) for p in run.model.talker.parameters()]
    counted = tuple(sum(size for size, trains in sizes if trains is kind) for kind in (True, False))
    assert parameter_counts(run.base, settings) == counted
    run.lock.close()


# -------------------------------------------------------------------------------------------------------- training


def logits(model: Any, batch: Any, vectors: torch.Tensor) -> torch.Tensor:
    objective = TrainingObjective(model.talker, vectors).eval()
    with torch.no_grad():
        return objective.talker_logits(objective.hidden_states(batch))


def test_training_starts_from_the_base(settings_for: Any) -> None:
    run = build(settings_for())
    batch = run.train.dataset.batch([0, 1])
    base = load_model(run.base, "sdpa")
    assert torch.equal(logits(run.model, batch, run.speakers.vectors), logits(base, batch, run.speakers.vectors))
    run.lock.close()


def test_the_checkpoint_computes_what_was_trained(settings_for: Any) -> None:
    """Stock's model of last/, all of what was learnt in it, against the model with its adapters."""
    run, _ = train(settings_for())
    batch = collate([run.train.encoder.encode(row) for row in run.train.rows(2)], [0, 0])
    stock = load_stock(run.settings.output_dir / "last").model
    before = logits(load_model(run.base, "sdpa"), batch, run.speakers.vectors)
    with_adapters, merged = (logits(model, batch, run.speakers.vectors) for model in (run.model, stock))
    torch.testing.assert_close(merged, with_adapters, rtol=1e-4, atol=1e-4)
    assert (with_adapters - before).abs().max() > 0.1


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_targets": "sub_talker"},
        {"lora_targets": "sub_talker", "prefix_cache": "ram"},
        {"lora_targets": "codec_head"},
    ],
    ids=["sub-talker", "sub-talker, prefix kept", "codec head"],
)
def test_a_part_alone_learns(settings_for: Any, fields: dict) -> None:
    """Where nothing trains below one of the two losses, it has no gradient at all."""
    run, trainer = train(settings_for(**fields, num_epochs=4, logging_steps=1))
    log = [json.loads(line) for line in (run.settings.output_dir / "training_log.jsonl").read_text().splitlines()]
    name = "talker_loss" if fields["lora_targets"] == "codec_head" else "sub_talker_loss"
    assert log[-1][name] < log[0][name] - 0.01
    if "prefix_cache" in fields:
        assert run.objective.num_frozen_layers() == 4 and len(trainer.stepper.prefixes.store._entries) == 4


def test_a_cache_of_nothing_is_refused(settings_for: Any) -> None:
    for targets in ("sub_talker,linear_fc1", "q_proj"):
        run = build(settings_for(prefix_cache="ram", lora_targets=targets, overwrite_output=True))
        with pytest.raises(UserError, match="PREFIX_CACHE: there is nothing to keep"):
            make_trainer(run)
        run.lock.close()


def test_in_bf16_as_people_train(settings_for: Any, tmp_path: Path) -> None:
    """A base in bf16 under autocast, with dropout and checkpointing: it stays bf16, adapters are fp32."""
    base = embedded_model_folder("tiny-random", "bfloat16")
    fields = {"mixed_precision": "bf16", "lora_dropout": 0.1, "gradient_checkpointing": True, "num_epochs": 4}
    run, _ = train(settings_for(init_model_path=str(base), weights_precision="bf16", logging_steps=1, **fields))
    dtypes = {(is_adapter(name), p.dtype) for name, p in run.model.talker.named_parameters() if p.ndim == 2}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    log = [json.loads(line) for line in (run.settings.output_dir / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - 0.05
    last = run.settings.output_dir / "last"
    assert {tensor.dtype for tensor in weights(last).values()} == {torch.bfloat16}
    got, want = weights(run_merge(str(base), last / "adapter", output=tmp_path / "merged")), weights(last)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_the_space_that_a_checkpoint_needs(settings_for: Any) -> None:
    run, _ = train(settings_for(add_new_layers=1, train_codec_embedding=True))
    last = run.settings.output_dir / "last"
    files = [last / "model.safetensors", *(last / "adapter").glob("*.safetensors")]
    written = sum(file.stat().st_size for file in files)
    assert (
        run.exporter.required_bytes() == pytest.approx(written, rel=0.01)
        and written * 0.98 < run.exporter.required_bytes()
    )


def test_only_what_is_adapted_changes(trained: Any) -> None:
    before, after = load_file(trained.base.folder / "model.safetensors"), weights(trained.last)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    layers = {f"talker.model.layers.{index}." for index in range(4)} | {"talker.code_predictor.model.layers."}
    assert CODEC_TABLE in changed  # the speaker's row
    assert all(name.startswith(tuple(layers)) and name.endswith("_proj.weight") for name in changed - {CODEC_TABLE})
    assert len(changed) == 1 + sum(name.endswith("_proj.weight") and name.startswith(tuple(layers)) for name in after)
    rows = (after[CODEC_TABLE] != before[CODEC_TABLE]).any(1).nonzero().flatten().tolist()
    assert rows == [3000]
    assert not damage(trained.last)


def test_a_share_of_what_was_learnt_is_exported(trained: Any) -> None:
    """LORA_EXPORT_SCALE, against the product by hand."""
    matrices = load_file(trained.last / "adapter" / "adapter_model.safetensors")
    name = "talker.model.layers.1.mlp.up_proj"
    first, second = (matrices[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
    before = load_file(trained.base.folder / "model.safetensors")[f"{name}.weight"]
    want = before.double() + 0.75 * 16 / 4 * second @ first
    got = weights(trained.last)[f"{name}.weight"]
    assert got.dtype == before.dtype
    torch.testing.assert_close(got.double(), want, rtol=2**-8 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_peft_loads_the_adapter(trained: Any) -> None:
    """Into stock's model of the base; with all of what was learnt, as the training model has it."""
    from peft import PeftModel

    stock = load_stock(trained.base.folder).model
    batch = collate([trained.run.train.encoder.encode(row) for row in trained.run.train.rows(2)], [0, 0])
    want = logits(trained.run.model, batch, trained.run.speakers.vectors)
    PeftModel.from_pretrained(stock, str(trained.last / "adapter"))
    torch.testing.assert_close(logits(stock, batch, trained.run.speakers.vectors), want, rtol=1e-5, atol=1e-5)
    vectors = load_file(trained.last / "adapter" / "speakers.safetensors")["vectors"]
    assert torch.equal(vectors, trained.run.speakers.vectors)


# --------------------------------------------------------------------------------------------------------- merging


def test_a_merge_heeds_no_settings_file(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a run in the working directory, say."""
    (tmp_path / "own.env").write_text("EFFECTIVE_BATCH_SIZE=77\nNOT_KNOWN=1\n")
    monkeypatch.setattr("finetuning.settings.DEFAULT_ENV_FILE", str(tmp_path / "own.env"))
    output = run_merge("tiny-random", trained.last / "adapter", output=tmp_path / "merged", scale=0.5)
    card = (output / "README.md").read_text()
    assert "with adapters merged into it: 0.5 of" in card and "optimizer steps" not in card


def run_merge(base: str, *adapters: Path, output: Path, **options: Any) -> Path:
    arguments = ["merge", "--base", base, "--output", str(output)]
    for adapter in adapters:
        arguments += ["--adapter", str(adapter)]
    for name, value in options.items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    parsed = lora.parse_arguments(arguments)
    lora.run_merge(parsed)
    return output


def test_merging_gives_the_checkpoint_again(trained: Any, tmp_path: Path) -> None:
    """Bit for bit, and stock speaks with it."""
    output = run_merge("tiny-random", trained.last / "adapter", output=tmp_path / "merged", scale=0.75)
    got, want = weights(output), weights(trained.last)
    assert got.keys() == want.keys()
    assert not [name for name in want if not torch.equal(got[name], want[name])]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (output, trained.last)]
    assert configs[0] == configs[1]
    assert not damage(output)
    waveforms, rate = load_stock(output).generate_custom_voice("Hello.", "anna", max_new_tokens=3)
    assert rate == 24_000 and len(waveforms[0]) > 0


def test_halves_of_two_adapters(trained: Any, settings_for: Any, tmp_path: Path) -> None:
    """Two voices: half of each one's change, and both speakers, the second in a row of its own."""
    other, _ = train(settings_for("other", speaker_name="Bert", seed=7))
    second = other.settings.output_dir / "last" / "adapter"
    output = run_merge("tiny-random", trained.last / "adapter", second, output=tmp_path / "both", weights=[0.5, 0.25])
    config = json.loads((output / "config.json").read_text())["talker_config"]
    assert {name: config["spk_id"][name] for name in ("anna", "bert")} == {"anna": 3000, "bert": 3001}
    name = "talker.code_predictor.model.layers.0.self_attn.q_proj.weight"
    before = load_file(trained.base.folder / "model.safetensors")
    changes = [
        (lora.Adapter.load(folder).matrices[name.removesuffix(".weight")])
        for folder in (trained.last / "adapter", second)
    ]
    (a1, b1), (a2, b2) = changes
    want = before[name].float() + 4 * (0.5 * b1 @ a1 + 0.25 * b2 @ a2)
    got = weights(output)
    torch.testing.assert_close(got[name].float(), want, rtol=1e-2, atol=1e-3)
    rows = got[CODEC_TABLE][[3000, 3001]].float()
    assert torch.equal(rows, torch.stack([trained.run.speakers.vectors[0], other.speakers.vectors[0]]))


@pytest.mark.parametrize("export_type", ["custom_voice", "base"])
def test_a_merge_brings_languages_vectors_and_the_encoder(
    settings_for: Any, demo_rows: list, write_jsonl: Callable, tmp_path: Path, export_type: str
) -> None:
    """What a run with a new language learnt, as one that speaks by name or that clones: bit for bit its own."""
    rows = [row | {"language": "Hausa", "speaker": "Anna"} for row in demo_rows[:4]]
    own = {"custom_voice": {"speaker_embedding_trainable": True}, "base": {"icl_fraction": 0.0}}[export_type]
    fields = {"train_jsonl": write_jsonl(rows, "hausa.jsonl"), "new_languages": "hausa", "export_type": export_type}
    run, _ = train(settings_for("hausa", **fields, **own))
    last = run.settings.output_dir / "last"
    output = run_merge("tiny-random", last / "adapter", output=tmp_path / "merged")
    got, want = weights(output), weights(last)
    assert got.keys() == want.keys() and any(name.startswith("speaker_encoder.") for name in got) == (
        export_type == "base"
    )
    assert not [name for name in want if not torch.equal(got[name], want[name])]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (output, last)]
    assert configs[0] == configs[1] and configs[0]["talker_config"]["codec_language_id"]["hausa"] == 2200
    learnt = run.objective.language_vectors.detach()[0].to(want[CODEC_TABLE].dtype)
    assert torch.equal(got[CODEC_TABLE][2200], learnt)
    with pytest.raises(UserError, match=r"adds hausa \(row 2200\), but .* has hausa already"):
        run_merge(str(last), last / "adapter", output=tmp_path / "twice")
    with pytest.raises(UserError, match=r"more than adapters .* languages"):
        run_merge("tiny-random", last / "adapter", last / "adapter", output=tmp_path / "two")


def test_speakers_of_the_base_keep_their_rows(trained: Any, settings_for: Any, tmp_path: Path) -> None:
    """Into a checkpoint that has Bert in the row that Anna was given beside another base."""
    bert, _ = train(settings_for("bert", speaker_name="Bert"))
    base = bert.settings.output_dir / "last"
    output = run_merge(str(base), trained.last / "adapter", output=tmp_path / "both")
    config = json.loads((output / "config.json").read_text())["talker_config"]
    assert {name: config["spk_id"][name] for name in ("anna", "bert")} == {"anna": 3001, "bert": 3000}
    rows = weights(output)[CODEC_TABLE][[3000, 3001]].float()
    assert torch.equal(rows, torch.stack([bert.speakers.vectors[0], trained.run.speakers.vectors[0]]))
    again, _ = train(settings_for("again", speaker_name="Anna"))
    base, config = again.settings.output_dir / "last", json.loads((base / "config.json").read_text())
    config["talker_config"]["spk_id"] = {"anna": 3005}
    (base / "config.json").write_text(json.dumps(config))
    (base / "checksums.json").unlink()
    with pytest.raises(UserError, match=r'speaker "Anna" of .* is a speaker of'):
        run_merge(str(base), trained.last / "adapter", output=tmp_path / "refused")


def test_as_many_speakers_as_there_are_rows(trained: Any, tmp_path: Path) -> None:
    adapter = lora.Adapter.load(trained.last / "adapter")
    free = lora.allocate_codec_rows(trained.base.config, 60)
    names = [f"speaker {number}" for number in range(60)]
    vectors = adapter.speakers.vectors.repeat(60, 1)
    many = replace(adapter, speakers=Speakers(names, vectors, free, [[]] * 60))
    assert lora.speakers_of_all(trained.base, [many]).codec_rows == free
    other = replace(many, speakers=Speakers(["other"], vectors[:1], free[:1], [[]]))
    assert lora.speakers_of_all(trained.base, [many, other]).codec_rows[-1] not in free
    rest = [f"more {number}" for number in range(60)]
    with pytest.raises(UserError, match="the codec table has only"):
        lora.speakers_of_all(trained.base, [many, replace(many, speakers=Speakers(rest, vectors, free, [[]] * 60))])


def test_new_layers_and_tables_come_along(settings_for: Any, tmp_path: Path) -> None:
    run, _ = train(settings_for(add_new_layers=1, lora_targets="attention", train_codec_embedding=True))
    last = run.settings.output_dir / "last"
    output = run_merge("tiny-random", last / "adapter", output=tmp_path / "merged")
    got, want = weights(output), weights(last)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert json.loads((output / "config.json").read_text())["talker_config"]["num_hidden_layers"] == 5
    with pytest.raises(UserError, match="trained more than adapters"):
        run_merge("tiny-random", last / "adapter", last / "adapter", output=tmp_path / "twice")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no adapter", r"is no adapter of this tool: adapter_config\.json is missing"),
        ("damaged", r"cannot be read"),
        ("damaged list", r"cannot be read"),
        ("no number", r"finite numbers are needed"),
        ("other base", r"belongs to another base than tiny-random-0\.6b"),
        ("one weight for two", r"--weights: 1 for 2 adapters"),
        ("there already", r"--output: .* is there already"),
        ("another vector", r'speaker "Anna" stands in two adapters with different vectors'),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_left(trained: Any, tmp_path: Path, case: str, message: str) -> None:
    import shutil

    adapter, output = tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(trained.last / "adapter", adapter)
    adapters, base, options = [adapter], "tiny-random", {}
    if case == "no adapter":
        adapters = [trained.last]
    if case == "damaged":
        (adapter / "adapter_model.safetensors").write_bytes(b"x" * 100)
    if case == "damaged list":
        (adapter / "speakers.json").write_text('{"name": 3}')
    if case == "no number":
        options = {"scale": "nan"}
    if case == "other base":
        base = "tiny-random-0.6b"
    if case == "one weight for two":
        adapters, options = [adapter, adapter], {"weights": [1.0]}
    if case == "there already":
        output.mkdir()
    if case == "another vector":
        adapters = [adapter, trained.last / "adapter"]
        vectors = load_file(adapter / "speakers.safetensors")["vectors"]
        save_file({"vectors": vectors + 1}, adapter / "speakers.safetensors")
    with pytest.raises(UserError, match=message):
        run_merge(base, *adapters, output=output, **options)
    assert not output.exists() or not list(output.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"adapter"} | ({"merged"} if output.exists() else set())
    )


def test_a_gradient_is_that_of_the_merged_weight(settings_for: Any) -> None:
    """dL/dB of an adapter is (alpha / rank) (dL/dW) A^T, with dL/dW from a model without adapters."""
    run = build(settings_for(lora_targets="attention"))
    batch = run.train.dataset.batch([0, 1])
    base = load_model(run.base, "sdpa")
    plain = TrainingObjective(base.talker, run.speakers.vectors)
    for objective in (run.objective, plain):
        sums = objective(batch)
        (sums["talker_loss"] + sums["sub_talker_loss"]).backward()
    trained = dict(run.model.named_parameters())
    path = "talker.model.layers.2.self_attn.v_proj"
    first, second = (trained[f"{path}.lora_{letter}.default.weight"] for letter in "AB")
    want = 16 / 4 * base.get_submodule(path).weight.grad @ first.detach().T
    assert second.grad.norm() > 0 and math.isfinite(second.grad.norm())
    torch.testing.assert_close(second.grad, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    run.lock.close()


def test_the_optimizer_holds_the_adapters_alone(settings_for: Any) -> None:
    run = build(settings_for())
    trainer = make_trainer(run)
    held = sum(p.numel() for group in trainer.stepper.optimizer.param_groups for p in group["params"])
    assert held == parameter_counts(run.base, run.settings)[0]
    run.lock.close()
