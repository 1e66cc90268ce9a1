"""Computed memory: the formula against tensors counted one by one, and what MEMORY_PROFILE picks with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from training import FULL, build

from benchmarks.bench import RECIPES
from benchmarks.loops import LORA
from benchmarks.peak_memory import BaseOnPaper, Case, case_settings, count_peak
from benchmarks.random_base import base_config, random_rows
from finetuning.errors import UserError
from finetuning.memory import BYTES_OF_LISTENING, PROFILES, Needs, pick_for_memory, usable_bytes

LAYERS = {"replace_last_n_layers": 2, "add_new_layers": 4, "freeze_original_layers": True}
FIELDS = {"full": FULL, "layers": LAYERS, "lora": LORA}
CHECKPOINTING = {"gradient_checkpointing": True}
ALL_SMALL = {"optimizer": "adamw_8bit", "weights_precision": "bf16", **CHECKPOINTING}


@pytest.fixture(scope="module")
def bases() -> dict[str, BaseOnPaper]:
    return {size: BaseOnPaper(base_config(size)) for size in ("1.7b", "0.6b")}


def shallow_config() -> dict[str, Any]:
    """The 1.7B's widths with few layers and a small text table, so that activations and tables count as much."""
    config = base_config("1.7b")
    config["talker_config"] |= {"num_hidden_layers": 4, "text_vocab_size": 4096}
    predictor = config["talker_config"]["code_predictor_config"]
    predictor |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    config |= {"im_start_token_id": 4000, "im_end_token_id": 4001, "assistant_token_id": 4002}
    config |= {"tts_bos_token_id": 4003, "tts_eos_token_id": 4004, "tts_pad_token_id": 4005}
    return config


@pytest.mark.parametrize(
    ("recipe", "fields", "micro_batches"),
    [
        ("full", {}, 1),
        ("full", CHECKPOINTING, 2),
        ("full", ALL_SMALL, 1),
        ("layers", {}, 2),
        ("lora", CHECKPOINTING, 1),
        ("lora", {"lora_targets": "attention,sub_talker"}, 1),
    ],
)
def test_formula_against_the_tensors_that_are_alive(recipe: str, fields: dict, micro_batches: int) -> None:
    """All 1.7B widths, on tensors without content."""
    if "adamw_8bit" in fields.values():
        pytest.importorskip("torchao")
    config, seconds = shallow_config(), (7.0,) * 6
    settings = case_settings(**FIELDS[recipe], **fields)
    counted = count_peak(Case(config, recipe, settings, seconds, micro_batches)).peak.total()
    rows = random_rows(config, len(seconds), seconds=seconds)
    positions, frames = sum(len(row.text) for row in rows), sum(len(row.codes) for row in rows)
    needs = Needs.of(BaseOnPaper(config), settings)
    assert needs.bytes_for(frames, positions, micro_batches) == pytest.approx(counted, rel=0.05)


def test_judges_count_where_they_need_more_than_a_step(bases: dict) -> None:
    """They come when a step's activations and gradients are gone; under DDP its buckets stay."""
    settings = case_settings(**LORA)
    alone = Needs.of(bases["1.7b"], settings)
    assert alone.bytes_between_steps == 0
    small, large = (Needs.of(bases["1.7b"], settings, beside=size) for size in (1e6, 50e9))
    assert small.peak_bytes() == alone.peak_bytes() > small.bytes_between_steps
    assert large.peak_bytes() == alone.standing_bytes + 50e9 + BYTES_OF_LISTENING
    two = Needs.of(bases["1.7b"], settings, num_processes=2, beside=50e9)
    assert two.peak_bytes() == large.peak_bytes() + alone.gradient_bytes
    picked = [pick_for_memory(case_settings(memory_profile="80gb", **FULL), bases["1.7b"], beside=s) for s in (0, 55e9)]
    assert picked[0].settings.optimizer != picked[1].settings.optimizer == "adamw_8bit"


def test_fake_tensors_are_counted_as_real_ones_are() -> None:
    case = Case(base_config("tiny"), "layers", case_settings(**LAYERS), (0.6, 0.4), micro_batches=2)
    fake, real = count_peak(case), count_peak(case, is_real=True)
    assert fake.peak == real.peak
    assert min(real.peak[kind] for kind in ("weights", "gradients", "optimizer", "other")) > 0


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("recipe", FIELDS)
@pytest.mark.parametrize("size", ["1.7b", "0.6b"])
def test_profiles_fit_and_keep_the_rows_of_a_step(size: str, recipe: str, profile: str, bases: dict) -> None:
    pytest.importorskip("torchao")
    settings = case_settings(memory_profile=profile, **FIELDS[recipe])
    picks = pick_for_memory(settings, bases[size])
    assert Needs.of(bases[size], picks.settings).peak_bytes() == picks.peak_bytes
    assert picks.peak_bytes <= usable_bytes(PROFILES[profile]) < PROFILES[profile] - 2e9
    assert picks.settings.rows_per_step(1) == settings.rows_per_step(1) == 8
    assert picks.settings.mixed_precision == "bf16"
    assert f"BATCH_SIZE={picks.settings.batch_size} " in picks.message and profile in picks.message


def test_what_learns_best_is_given_up_last(bases: dict) -> None:
    """Full fine-tuning of the 1.7B: everything on a large card, everything small on the smallest."""
    pytest.importorskip("torchao")
    picked = [pick_for_memory(case_settings(memory_profile=name, **FULL), bases["1.7b"]).settings for name in PROFILES]
    small, medium, large, largest = ((one.weights_precision, one.optimizer) for one in picked)
    assert (small, medium, large, largest) == (
        ("bf16", "adamw_8bit"),
        ("fp32", "adamw_8bit"),
        ("fp32", "adamw"),
        ("fp32", "adamw"),
    )
    assert not picked[-1].gradient_checkpointing and picked[-1].batch_size == 8
    assert picked[0].gradient_accumulation_steps == 1, "gradients in bf16 are not added up where it can be avoided"


def test_what_the_user_set_stays(bases: dict) -> None:
    fields = {"batch_size": 1, "gradient_checkpointing": False, "optimizer": "adamw", **LAYERS}
    picks = pick_for_memory(case_settings(memory_profile="24gb", **fields), bases["1.7b"])
    assert {name: getattr(picks.settings, name) for name in fields} == fields
    assert picks.settings.gradient_accumulation_steps == 4, "another number would change the rows of a step"
    assert "set by you: BATCH_SIZE=1" in picks.message and "OPTIMIZER=adamw" in picks.message


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_the_rows_that_the_user_asks_for_are_divided(bases: dict, num_processes: int) -> None:
    fields = {"effective_batch_size": 64, **LAYERS}
    environment = {"WORLD_SIZE": str(num_processes)}
    settings = case_settings(environment, memory_profile="24gb", **fields)
    picked = pick_for_memory(settings, bases["1.7b"], num_processes=num_processes).settings
    assert picked.rows_per_step(num_processes) == 64
    with pytest.raises(UserError, match=r"EFFECTIVE_BATCH_SIZE: MEMORY_PROFILE=auto divides .* where there is a GPU"):
        pick_for_memory(case_settings(environment, memory_profile="auto", **fields), bases["1.7b"], None, num_processes)
    with pytest.raises(UserError, match=r"EFFECTIVE_BATCH_SIZE.* is 33, which 2 processes cannot share equally"):
        case_settings({"WORLD_SIZE": "2"}, memory_profile="24gb", effective_batch_size=33)
    with pytest.raises(UserError, match=r"EFFECTIVE_BATCH_SIZE.* is 32, but BATCH_SIZE 4"):
        case_settings(memory_profile="24gb", effective_batch_size=32, batch_size=4)


def test_several_gpus_hold_a_whole_gradient_all_the_time(bases: dict) -> None:
    """DDP's buckets; what fits one GPU alone may not fit each of several."""
    settings = case_settings(gradient_accumulation_steps=1, batch_size=8, **FULL)
    alone, beside = (Needs.of(bases["1.7b"], settings, num_processes=count) for count in (1, 4))
    assert beside.peak_bytes() == pytest.approx(alone.peak_bytes() + alone.gradient_bytes)
    profile = case_settings(memory_profile="40gb", **FULL)
    picks = [pick_for_memory(profile, bases["1.7b"], num_processes=count) for count in (1, 4)]
    assert picks[0].settings.gradient_accumulation_steps == 1 and not picks[0].settings.gradient_checkpointing
    assert picks[1].settings.gradient_accumulation_steps > 1 or picks[1].settings.gradient_checkpointing
    assert max(pick.peak_bytes for pick in picks) <= usable_bytes(PROFILES["40gb"])


def test_shares_of_a_model_need_less(bases: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP, against a sum by hand: a quarter of what stands there, all gradients while they accumulate, one chunk."""
    base, settings = bases["1.7b"], case_settings(batch_size=1, gradient_accumulation_steps=4, **FULL)
    alone = Needs.of(base, settings)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    two, four = (Needs.of(base, settings, num_processes=count) for count in (2, 4))
    trained = sum(math.prod(base.weight_shapes()[weight.name]) for weight in four.weights if weight.trains)
    num_weights = sum(weight.size for weight in four.weights)
    assert 4 * four.standing_bytes == pytest.approx(4 * num_weights + 8 * trained)
    assert four.gradient_bytes == alone.gradient_bytes == 4 * trained
    assert four.least_bytes > four.standing_bytes + four.gradient_bytes
    assert four.peak_bytes() < two.peak_bytes() < alone.peak_bytes()
    large = case_settings(batch_size=8, gradient_accumulation_steps=4, **FULL)
    grown = Needs.of(base, large, num_processes=4).peak_bytes() - four.peak_bytes()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert grown > Needs.of(base, large).peak_bytes() - alone.peak_bytes(), "the sub-talker is one chunk"


def test_a_profile_beyond_the_gpu_says_so(bases: dict) -> None:
    settings = case_settings(memory_profile="24gb", **LAYERS)
    assert "This GPU has 16.0 GB only" in pick_for_memory(settings, bases["1.7b"], 16 * 10**9).message
    assert "only" not in pick_for_memory(settings, bases["1.7b"], int(23.8e9)).message


def test_micro_batches_in_frames_are_halved(bases: dict) -> None:
    fields = {"max_frames_per_batch": 8000, "memory_profile": "40gb", **FULL}
    picked = pick_for_memory(case_settings(**fields), bases["1.7b"]).settings
    assert picked.max_frames_per_batch < 8000
    assert picked.max_frames_per_batch * picked.gradient_accumulation_steps == 8000 * 4
    kept = pick_for_memory(case_settings(**fields, gradient_accumulation_steps=4), bases["0.6b"]).settings
    assert kept.max_frames_per_batch == 8000, "both were set"


def test_what_fits_nowhere_is_an_error_that_says_what_would(bases: dict) -> None:
    settings = case_settings(memory_profile="16gb", weights_precision="fp32", optimizer="adamw", **FULL)
    odd = case_settings(memory_profile="16gb", max_frames_per_batch=8001, weights_precision="fp32", **FULL)
    with pytest.raises(UserError, match="an even MAX_FRAMES_PER_BATCH"):
        pick_for_memory(odd, bases["1.7b"])
    with pytest.raises(
        UserError, match=r"unset OPTIMIZER, WEIGHTS_PRECISION|unset WEIGHTS_PRECISION, OPTIMIZER"
    ) as error:
        pick_for_memory(settings, bases["1.7b"])
    assert "new layers instead of the whole model" in str(error.value) and "0.6B" in str(error.value)


def test_a_pick_that_needs_torchao_says_so(bases: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.optimizers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="OPTIMIZER=adamw_8bit needs the package torchao"):
        pick_for_memory(case_settings(memory_profile="24gb", **FULL), bases["1.7b"])


def test_fsdp_is_refused(bases: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"MEMORY_PROFILE.*FSDP"):
        pick_for_memory(case_settings(memory_profile="24gb"), bases["1.7b"])


def test_auto_takes_the_largest_profile_of_the_gpu(bases: dict) -> None:
    settings = case_settings(memory_profile="auto")
    for gpu_bytes, profile in ((23.8e9, "24gb"), (42.3e9, "40gb"), (150e9, "80gb")):
        assert f"profile {profile}:" in pick_for_memory(settings, bases["0.6b"], int(gpu_bytes)).message
    with pytest.raises(UserError, match=r"a GPU of 11\.0 GB"):
        pick_for_memory(settings, bases["0.6b"], int(11e9))
    assert pick_for_memory(settings, bases["0.6b"], None) is None, "there is no GPU"
    assert pick_for_memory(case_settings(), bases["0.6b"], int(80e9)) is None, "nobody asked"


def test_a_run_is_resumed_with_the_same_picks(
    make_settings: Any, write_jsonl: Any, demo_rows: list, capsys: pytest.CaptureFixture
) -> None:
    """And auto on a CPU picks nothing, which it says."""
    from training import make_trainer

    fields = {"train_jsonl": write_jsonl(demo_rows), "data_mode": "none", "max_steps": 1, "resume": "auto"}
    first = build(make_settings(memory_profile="16gb", **fields))
    make_trainer(first).run()
    assert "Memory profile 16gb: BATCH_SIZE=8 GRADIENT_ACCUMULATION_STEPS=1" in capsys.readouterr().out
    first.lock.close()
    again = build(make_settings(memory_profile="16gb", **fields | {"max_steps": 2}))
    assert again.state.step == 1
    assert again.settings.batch_size == first.settings.batch_size == again.state.record["settings"]["BATCH_SIZE"] == 8
    again.lock.close()
    unpicked = build(make_settings(memory_profile="auto", **fields | {"max_steps": 2}))
    assert unpicked.settings.batch_size == 2 and unpicked.state.step == 1, "a step has the same rows"
    assert "picks nothing on cpu" in capsys.readouterr().out
    differing = make_settings(memory_profile="16gb", optimizer="adafactor", **fields | {"max_steps": 2})
    with pytest.raises(
        UserError, match=r"OPTIMIZER was adamw, is adafactor \(MEMORY_PROFILE picks it; set OPTIMIZER=adamw\)"
    ):
        build(differing)


def test_recipes_are_those_of_the_benchmarks() -> None:
    assert {name: tuple(FIELDS[name].values()) for name in RECIPES} == RECIPES
