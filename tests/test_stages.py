"""TRAIN_STAGES: what is out of a stage does not move at all, and what is kept of it waits for its turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import PROJECT
from reference import load_stock
from torch import nn
from training import FULL, build, make_trainer

from finetuning import starting, stepping
from finetuning.errors import UserError
from finetuning.objective import compile_layers
from finetuning.settings import STAGE_NAMES
from finetuning.stages import Stages, check_stages, names_of, trained_by_name

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {"replace_last_n_layers": 1, "add_new_layers": 1, "freeze_original_layers": True}
LORA = {"lora_rank": 2, "freeze_original_layers": True}
#: Name -> its steps in a run of nine.
PLAN = {"sub_talker": [1, 2, 3], "new_layers": [4, 5], "sub_talker+heads": [6], "all": [7, 8, 9]}
TRAIN_STAGES = "sub_talker:3,new_layers:2,sub_talker+heads:1,all"


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    """One step of two micro-batches an epoch, nine epochs; a high rate, so that everything that may move does."""

    def make(**fields: Any) -> Any:
        defaults = {
            "train_jsonl": write_jsonl(demo_rows[:2]), "validation_fraction": 0.0, "batch_size": 1,
            "gradient_accumulation_steps": 2, "num_epochs": 9, "logging_steps": 1, "save_steps": 99,
            "learning_rate": 1e-2, "warmup_steps": 0, "weight_decay": 0.5, "train_stages": TRAIN_STAGES,
            "layer_init": "copy",
        }  # fmt: skip
        return make_settings(**(LAYERS | defaults | fields))

    return make


class Seen:
    """Weights before and after each step of a run, what the optimizer kept, and which parameters had gradients."""

    def __init__(self, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainer, self.stepper = trainer, trainer.stepper
        self.moved: list[set[str]] = []
        self.kept_moved: list[set[str]] = []
        self.norms: list[float] = []
        self.asked: list[set[str]] = []
        self._take = self.stepper.take
        monkeypatch.setattr(self.stepper, "take", self.take)
        self.named = {name: p for name, p in self.stepper.module.named_parameters() if p.requires_grad}
        self.stepper.module.register_forward_pre_hook(self._before_forward)

    def take(self, *arguments: Any) -> Any:
        self.asked.append(set())
        weights, kept = self._weights(), self._kept()
        sums = self._take(*arguments)
        self.moved.append(self._differing(weights, self._weights()))
        self.kept_moved.append(self._differing(kept, self._kept()))
        self.norms.append(float(sums.gradient_norm))
        assert all(p.grad is None and p.requires_grad for p in self.named.values())
        return sums

    def _before_forward(self, *_: Any) -> None:
        self.asked[-1] |= {name for name, p in self.named.items() if p.requires_grad}

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.named.items()}

    def _kept(self) -> dict[str, torch.Tensor]:
        state = self.stepper.optimizer.state
        values = {name: state.get(p, {}) for name, p in self.named.items()}
        return {name: _joined(value) for name, value in values.items()}

    @staticmethod
    def _differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
        return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def _joined(kept: dict[str, Any]) -> torch.Tensor:
    """Everything that an optimizer keeps for a weight, in one row; a tensor in 8 bits by what it stands for."""
    values = [torch.as_tensor(value) for value in kept.values() if value is not None]
    values = [value.dequantize() if hasattr(value, "dequantize") and value.ndim else value for value in values]
    return torch.cat([value.detach().double().flatten() for value in values]) if values else torch.zeros(0)


def trained(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen(trainer, monkeypatch)
    trainer.run()
    return seen


def names_in(label: str, objective: Any) -> set[str]:
    """Of the parameters of a stage on the toy model with LAYERS, from their names alone."""
    new, sub_talker = ("talker.model.layers.3.", "talker.model.layers.4."), ("talker.code_predictor.",)
    starts = {
        "new_layers": new,
        "sub_talker": sub_talker,
        "sub_talker+heads": (*sub_talker, "talker.codec_head."),
        "all": ("",),
    }[label]
    return {name for name, p in objective.named_parameters() if p.requires_grad and name.startswith(starts)}


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adafactor": {"optimizer": "adafactor"},
    "8 bits": {"optimizer": "adamw_8bit"},
    "bf16": {"weights_precision": "bf16", "mixed_precision": "bf16"},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", ["adamw", "adafactor", "8 bits", "bf16", "checkpointed"])
def test_only_the_stage_moves(
    settings_for: Callable, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights and what the optimizer keeps for them, in every step; everything else stays bit for bit, though it
    has momentum from a stage before and a weight decay. What is out of the stage asks for no gradient."""
    if case in ("8 bits", "bf16"):
        pytest.importorskip("torchao")
    fields = OPTIMIZERS[case]
    run = build(settings_for(**fields))
    seen = trained(make_trainer(run), monkeypatch)
    for label, steps in PLAN.items():
        wanted = names_in(label, run.objective)
        assert wanted
        for step in steps:
            assert seen.asked[step - 1] == wanted, (label, step)
            assert seen.kept_moved[step - 1] <= wanted
            assert seen.moved[step - 1] <= wanted
            if case == "adamw":  # a weight in bf16 may stay where it is, and the last step has no rate left
                assert seen.kept_moved[step - 1] == wanted
                assert seen.moved[step - 1] == wanted
            else:
                assert seen.moved[step - 1]
    assert names_in("all", run.objective) == set(seen.named)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Stage ")]
    sizes = {label: sum(seen.named[name].numel() for name in names_in(label, run.objective)) for label in PLAN}
    assert said == [
        f"Stage {number} of 4, {label}: {sizes[label]:,} weights train, steps {steps[0]}-{steps[-1]}"
        for number, (label, steps) in enumerate(PLAN.items(), 1)
    ]


def test_adams_state_is_kept_over_a_pause(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that paused goes on with its moments and its own number of steps."""
    run = build(settings_for())
    trainer = make_trainer(run)
    trained(trainer, monkeypatch)
    state = trainer.stepper.optimizer.state
    counts = {
        name: int(state[parameter]["step"])
        for name, parameter in run.objective.named_parameters()
        if parameter in state
    }
    new, sub_talker = names_in("new_layers", run.objective), names_in("sub_talker", run.objective)
    assert {counts[name] for name in sub_talker} == {3 + 1 + 3}
    assert {counts[name] for name in new} == {2 + 3}
    assert {counts["talker.codec_head.weight"]} == {1 + 3}
    assert counts["talker.model.norm.weight"] == 3


def test_the_first_step_after_a_pause_by_hand(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's formula (Loshchilov and Hutter 2019) from the moments of before the pause."""
    run = build(
        settings_for(train_stages="sub_talker:2,new_layers:2,sub_talker", num_epochs=5, lr_scheduler="constant")
    )
    trainer = make_trainer(run)
    name, seen = "talker.code_predictor.lm_head.3.weight", []
    (weight,) = [parameter for found, parameter in run.objective.named_parameters() if found == name]
    update = trainer.stepper._step_optimizer

    def noted() -> None:
        kept = trainer.stepper.optimizer.state.get(weight, {})
        before = {key: value.detach().clone().double() for key, value in kept.items()}
        gradient, start = (
            None if weight.grad is None else weight.grad.clone().double(),
            weight.detach().clone().double(),
        )
        update()
        seen.append((before, gradient, start, weight.detach().clone().double()))

    monkeypatch.setattr(trainer.stepper, "_step_optimizer", noted)
    trainer.run()
    assert [gradient is None for _, gradient, *_ in seen] == [False, False, True, True, False]
    before, gradient, start, after = seen[4]
    assert before["step"] == 2 and torch.equal(start, seen[1][3])
    first, second = 0.9 * before["exp_avg"] + 0.1 * gradient, 0.999 * before["exp_avg_sq"] + 0.001 * gradient**2
    direction = (first / (1 - 0.9**3)) / ((second / (1 - 0.999**3)).sqrt() + 1e-8)
    wanted = start * (1 - 1e-2 * 0.5) - 1e-2 * direction
    torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-7)


def test_norm_and_clipping_count_the_stage_alone(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """And throwing gradients away, as several processes do, is the same as never asking for them."""
    results = {}
    for freezes in (True, False):
        settings = settings_for(output_dir=settings_for().output_dir / str(freezes), max_grad_norm=0.1, num_epochs=7)
        trainer = make_trainer(build(settings))
        trainer.stepper.stages._freezes = freezes
        norms: list[float] = []
        clip = stepping.clip_gradients

        def noted(accelerator: Any, parameters: Any, max_norm: float, clip: Any = clip, norms: list = norms) -> Any:
            parameters = list(parameters)
            squares = [float(p.grad.double().square().sum()) for p in parameters if p.grad is not None]
            norms.append(sum(squares) ** 0.5)
            norm = clip(accelerator, parameters, max_norm)
            clipped = [float(p.grad.double().square().sum()) for p in parameters if p.grad is not None]
            assert sum(clipped) ** 0.5 == pytest.approx(0.1, rel=1e-4)
            return norm

        with monkeypatch.context() as patched:
            patched.setattr(stepping, "clip_gradients", noted)
            seen = trained(trainer, patched)
        assert seen.norms == pytest.approx(norms, rel=1e-4)
        assert (seen.asked[0] == set(seen.named)) == (not freezes)
        log = [json.loads(line) for line in (settings.output_dir / "training_log.jsonl").read_text().splitlines()]
        results[freezes] = [[line["loss"], line["grad_norm"]] for line in log]
        assert seen.moved[0] == names_in("sub_talker", trainer.stepper.module)
    assert len(results[True]) == 7
    for one, other in zip(results[True], results[False], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_step_that_is_not_finite_changes_nothing(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a stage too; it counts as one of its steps."""
    settings = settings_for()
    trainer = make_trainer(build(settings))
    seen = Seen(trainer, monkeypatch)
    weight = next(p for name, p in seen.named.items() if name.startswith("talker.code_predictor."))
    clip = stepping.clip_gradients

    def poisoned(accelerator: Any, parameters: Any, max_norm: float) -> Any:
        if len(seen.moved) == 1:
            weight.grad.fill_(torch.nan)
        return clip(accelerator, parameters, max_norm)

    monkeypatch.setattr(stepping, "clip_gradients", poisoned)
    trainer.run()
    assert seen.moved[1] == set() and seen.moved[2] == names_in("sub_talker", trainer.stepper.module)
    assert seen.moved[3] == names_in("new_layers", trainer.stepper.module)


def test_compiled_layers_train_in_stages(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(settings_for(num_epochs=4, train_stages="sub_talker:1,new_layers:1,all"))
    compile_layers(run.objective, backend="eager")
    seen = trained(make_trainer(run), monkeypatch)
    assert seen.moved[:3] == [names_in(label, run.objective) for label in ("sub_talker", "new_layers", "all")]


def test_copied_layers_that_were_trained_load_in_stock(settings_for: Callable) -> None:
    """Each in its place, in the cache as well: step by step stock computes what it does at once."""
    settings = settings_for(num_epochs=2, train_stages="new_layers", add_new_layers=2)
    run = build(settings)
    make_trainer(run).run()
    talker = load_stock(settings.output_dir / "last").model.talker.model
    assert len(talker.layers) == 6
    for found, trained_layer in zip(talker.layers, run.model.talker.model.layers, strict=True):
        weights = trained_layer.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in found.state_dict().items())
    inputs = torch.randn(1, 6, run.speakers.vectors.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = talker(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1:]
        first = talker(inputs_embeds=inputs[:, :5], use_cache=True)
        last = talker(inputs_embeds=inputs[:, 5:], use_cache=True, past_key_values=first.past_key_values)
    torch.testing.assert_close(last.last_hidden_state, whole, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ the names


def test_full_fine_tuning_and_adapters_by_name(settings_for: Callable) -> None:
    objective = build(settings_for(**FULL | {"train_text_embedding": True}, train_stages=None)).objective
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    found = {part: {names[id(p)] for p in parameters} for part, parameters in trained_by_name(objective).items()}
    assert found.keys() == {"embeddings", "talker", "sub_talker", "heads", "all"}
    assert found["embeddings"] == {name for name in names.values() if "_embedding." in name}
    assert len(found["embeddings"]) == 1 + 1 + 15 and len(found["heads"]) == 1 + 15
    assert "talker.text_projection.linear_fc1.weight" in found["talker"] >= {"talker.model.norm.weight"}
    assert found["talker"] | found["sub_talker"] | found["embeddings"] == found["all"] == set(names.values())
    assert not found["talker"] & found["sub_talker"] and found["heads"] <= found["talker"] | found["sub_talker"]


def test_adapters_by_name(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(
        **LORA | {"add_new_layers": 1, "replace_last_n_layers": 0}, num_epochs=3, train_stages="adapters:2,new_layers"
    )
    run = build(settings)
    seen = trained(make_trainer(run), monkeypatch)
    adapters = {name for name in seen.named if ".lora_" in name}
    assert seen.moved[0] <= seen.asked[0] == adapters and seen.moved[1] == adapters  # A waits for B's first step
    assert seen.moved[2] == {name for name in seen.named if name.startswith("talker.model.layers.4.")}


def test_vectors_on_the_objective_are_embeddings(settings_for: Callable) -> None:
    """Trained vectors of speakers and languages are parameters of the objective itself."""
    settings = settings_for(train_stages="embeddings:5,all")
    objective = build(settings_for(train_stages=None)).objective
    with pytest.raises(UserError, match="nothing of embeddings trains"):
        check_stages(settings, objective)
    objective.language_vectors = nn.Parameter(torch.zeros(2, 3))
    check_stages(settings, objective)
    assert trained_by_name(objective)["embeddings"] == [objective.language_vectors]
    assert names_of("speaker_vectors") == {"all", "embeddings"}


EMPTY: dict[str, tuple[dict[str, Any], str]] = {
    "embeddings": ({}, "SPEAKER_EMBEDDING_TRAINABLE=true, or NEW_LANGUAGES"),
    "new_layers": (FULL, "REPLACE_LAST_N_LAYERS or ADD_NEW_LAYERS above 0"),
    "adapters": ({}, "LORA_RANK=8"),
    "talker": (
        LORA | {"replace_last_n_layers": 0, "add_new_layers": 0, "lora_targets": "sub_talker"},
        "LORA_TARGETS=all",
    ),
    "sub_talker": (LORA | {"lora_targets": "attention"}, "LORA_TARGETS=all"),
    "heads": (LORA | {"replace_last_n_layers": 0, "add_new_layers": 0}, "LORA_TARGETS=codec_head,lm_head"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_stage_that_trains_nothing_is_refused(settings_for: Callable, name: str) -> None:
    """Before the model is loaded."""
    fields, cure = EMPTY[name]
    settings = settings_for(**fields, train_stages=f"all:2,all+{name}:5,all")
    with pytest.raises(UserError) as refused:
        starting.check_inputs(settings)
    text = str(refused.value)
    assert text.startswith(f"TRAIN_STAGES: nothing of {name} trains with these settings") and cure in text
    assert not settings.output_dir.exists() or not list(settings.output_dir.glob("*.json"))


@pytest.mark.parametrize(
    "fields",
    [
        LAYERS, FULL, LORA | LAYERS, LAYERS | {"train_codec_embedding": True},
        LAYERS | {"speaker_embedding_trainable": True}, LORA | {"new_languages": "hausa"},
    ],
)  # fmt: skip
def test_headers_and_the_model_agree(settings_for: Callable, fields: dict[str, Any]) -> None:
    """What is refused before the model is loaded is what would be refused after it."""
    found = trained_by_name(build(settings_for(**fields, train_stages=None)).objective)
    for name in STAGE_NAMES:
        settings = settings_for(**fields, train_stages=name)
        if name in found:
            starting.check_inputs(settings)
        else:
            with pytest.raises(UserError, match=f"nothing of {name} trains"):
                starting.check_inputs(settings)


# ------------------------------------------------------------------------------------------------------ the steps


class Tiny(nn.Module):
    """Just enough of an objective."""

    def __init__(self) -> None:
        super().__init__()
        self.talker = nn.Module()
        self.talker.model = nn.Module()
        self.talker.model.layers = nn.ModuleList([nn.Linear(2, 2, bias=False)])
        self.talker.codec_head = nn.Linear(3, 1, bias=False)


@pytest.mark.parametrize(
    "text, num_steps, lines",
    [
        ("heads:2,all:3,talker", 9, ["1-2", "3-5", "6-9"]),
        ("heads:2,all:3,talker:4", 9, ["1-2", "3-5", "6-9"]),
        (
            "heads:2,all:3",
            9,
            ["1-2", "3-9", "TRAIN_STAGES names 5 steps and the run has 9: its last stage, all, goes on"],
        ),
        ("heads:2,all:3,talker", 4, ["1-2", "3-4", "the run ends after step 4, before talker would begin"]),
        ("heads:2,all,", None, []),
        ("heads:5,all", 5, ["1-5", "the run ends after step 5, before all would begin"]),
        ("heads", 5, ["1-5", "4 weights that the settings would train are in none of its stages"]),
    ],
)
def test_steps_of_the_stages(
    make_settings: Callable, text: str, num_steps: int | None, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if num_steps is None:
        with pytest.raises(UserError, match='"" is no stage'):
            make_settings(train_stages=text)
        return
    stages = Stages(make_settings(train_stages=text), Tiny(), num_steps, freezes=True)
    for step in range(1, num_steps + 1):
        stages.enter(step)
    said = capsys.readouterr().out.splitlines()
    ranges = [line.rpartition(" ")[2] for line in said if line.startswith("Stage ")]
    notes = [line for line in said if not line.startswith("Stage ")]
    assert ranges == [line for line in lines if line[0].isdigit() and "weights" not in line]
    wanted = [line for line in lines if line not in ranges]
    assert len(notes) == len(wanted) and all(want in note for want, note in zip(wanted, notes, strict=True))


def test_a_resumed_run_says_its_stage(make_settings: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages(make_settings(train_stages="heads:2,talker:3,all"), Tiny(), 9, freezes=True)
    stages.enter(4)
    stages.enter(5)
    assert capsys.readouterr().out == "Stage 2 of 3, talker: 7 weights train, steps 3-5\n"


def test_requires_grad_comes_back_after_an_error(make_settings: Callable) -> None:
    objective = Tiny()
    stages = Stages(make_settings(train_stages="heads:2,all"), objective, 9, freezes=True)
    stages.enter(1)
    layer = objective.talker.model.layers[0].weight
    with pytest.raises(KeyboardInterrupt), stages.freezing():
        assert not layer.requires_grad and objective.talker.codec_head.weight.requires_grad
        raise KeyboardInterrupt
    assert layer.requires_grad


def test_the_guide_names_all_stages() -> None:
    text = (PROJECT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in STAGE_NAMES)
