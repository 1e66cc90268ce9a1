"""Settings: defaults, sources, aliases, checks, secrets, and the three lists that must agree."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from finetuning.errors import UserError
from finetuning.settings import (
    Settings,
    Stage,
    canonical_names,
    export_variables_of_file,
    load_settings,
    repository_problem,
    speaker_name_problem,
)

PROJECT = Path(__file__).parent.parent
SECRET = "hf_Zq8secretvalue"

Load = Callable[..., Settings]
Problems = Callable[..., list[str]]

#: Section 3 of the design, written out a second time. None: no default of its own.
DESIGN_DEFAULTS: dict[str, Any] = {
    "DEVICE": "auto",
    "MIXED_PRECISION": "bf16",
    "ATTN_IMPLEMENTATION": "auto",
    "INIT_MODEL_PATH": "Qwen/Qwen3-TTS-12Hz-1.7B-Base",
    "TOKENIZER_PATH": None,
    "OUTPUT_DIR": Path("./output"),
    "DATA_MODE": "jsonl",
    "DATASET_NAME": "vaghawan/hausa-tts-22k",
    "DATASET_CONFIG": None,
    "TRAIN_SPLIT": "train",
    "VALIDATION_SPLIT": "validation",
    "AUGMENT_COPIES": 0,
    "AUGMENT_SPEED": 0.1,
    "AUGMENT_PITCH_SEMITONES": 2,
    "AUGMENT_GAIN_DB": 6,
    "AUGMENT_NOISE_DIR": None,
    "AUGMENT_NOISE_SNR_DB": 20,
    "TEXT_COLUMN": "text",
    "AUDIO_COLUMN": "audio",
    "SPEAKER_COLUMN": None,
    "LANGUAGE_COLUMN": None,
    "TRAIN_JSONL": Path("./data/train.jsonl"),
    "VALIDATION_JSONL": Path("./data/validation.jsonl"),
    "VALIDATION_FRACTION": 0.05,
    "MAX_TRAIN_SAMPLES": None,
    "MAX_EVAL_SAMPLES": None,
    "SPEAKER_BALANCE": 0,
    "CURRICULUM": "none",
    "CURRICULUM_EPOCHS": 1,
    "REF_AUDIO_PATH": None,
    "REF_TEXT": None,
    "SPEAKER_NAME": "reference_speaker",
    "BATCH_SIZE": 2,
    "GRADIENT_ACCUMULATION_STEPS": 4,
    "EFFECTIVE_BATCH_SIZE": None,
    "LEARNING_RATE": 0.00002,
    "NUM_EPOCHS": 3,
    "WEIGHT_DECAY": 0.01,
    "WARMUP_STEPS": 100,
    "MAX_GRAD_NORM": 1.0,
    "LR_SCHEDULER": "cosine",
    "LR_MIN": 0,
    "LR_NUM_CYCLES": None,
    "MAX_STEPS": None,
    "SUB_TALKER_LOSS_WEIGHT": 0.3,
    "TRAIN_LAYOUT": "non_streaming",
    "REPLACE_LAST_N_LAYERS": 2,
    "ADD_NEW_LAYERS": 4,
    "FREEZE_ORIGINAL_LAYERS": True,
    "TRAIN_CODEC_EMBEDDING": False,
    "LORA_RANK": 0,
    "LORA_ALPHA": 16,
    "LORA_DROPOUT": 0.05,
    "LORA_TARGETS": "all",
    "LORA_EXPORT_SCALE": 1,
    "LAYER_INIT": "preserve",
    "TRAIN_STAGES": None,
    "EMA_DECAY": 0,
    "FREEZE_SPEAKER_ENCODER": True,
    "NUM_WORKERS": 0,
    "LOGGING_STEPS": 10,
    "SAVE_STEPS": 500,
    "EVAL_STEPS": 500,
    "SAMPLE_STEPS": None,
    "EVAL_TEXTS": None,
    "SAVE_TOTAL_LIMIT": 3,
    "SAVE_EPOCHS": False,
    "EPOCH_FOLDER": "epoch",
    "OVERWRITE_OUTPUT": False,
    "SEED": 42,
    "ASR_MODEL": None,
    "MOS_MODEL": None,
    "BEST_METRIC": "loss",
    "EARLY_STOPPING_PATIENCE": 0,
    "REPORT_TO": None,
    "USE_WANDB": True,
    "WANDB_PROJECT": "qwen3-tts-hausa",
    "WANDB_RUN_NAME": None,
    "WANDB_ENTITY": None,
    "UPLOAD_TO_HUB": False,
    "HUB_MODEL_ID_BEST": None,
    "HUB_MODEL_ID_LAST": None,
    "HUB_PRIVATE": True,
    "HUB_EVERY": "end",
    "HF_TOKEN": None,
    "PREPARE_ONLY": False,
}
DESIGN_ALIASES = {
    "MODEL_PATH": "INIT_MODEL_PATH",
    "OUTPUT_MODEL_PATH": "OUTPUT_DIR",
    "LR": "LEARNING_RATE",
    "UPLOAD_TO_HF": "UPLOAD_TO_HUB",
    "HF_BEST_MODEL_REPO": "HUB_MODEL_ID_BEST",
    "HF_LAST_MODEL_REPO": "HUB_MODEL_ID_LAST",
}
_DIRECT = {"DATA_MODE": "direct", "DATASET_NAME": "owner/name"}
#: A value that differs from the default, for every alias.
ALIAS_VALUES = {
    "MODEL_PATH": "my/model",
    "OUTPUT_MODEL_PATH": "somewhere",
    "LR": "0.5",
    "UPLOAD_TO_HF": "false",
    "HF_BEST_MODEL_REPO": "me/best",
    "HF_LAST_MODEL_REPO": "me/last",
}


NAMES_OF_CHANGES = ("COPIES", "SPEED", "PITCH_SEMITONES", "GAIN_DB")


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    """load_settings exports variables of other tools; they must not outlive the test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Settings from the text of an env file and from environment variables (keywords)."""

    def load_from(text: str | bytes = "", **environment: str) -> Settings:
        file = tmp_path / "my.env"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_settings(environment={"ENV_FILE": str(file), **environment})

    return load_from


@pytest.fixture
def problems(load: Load) -> Problems:
    """The problems that are reported, one string each; the same arguments as ``load``."""

    def refused(text: str | bytes = "", **environment: str) -> list[str]:
        with pytest.raises(UserError) as error:
            load(text, **environment)
        heading, *items = str(error.value).split("\n  - ")
        assert "in the settings" in heading
        return items

    return refused


# ------------------------------------------------------------------------------------------------ defaults, sources


@pytest.mark.parametrize("name", DESIGN_DEFAULTS)
def test_default_is_the_designs(name: str) -> None:
    assert getattr(load_settings(environment={}), name.lower()) == DESIGN_DEFAULTS[name]


def test_aliases_are_the_designs() -> None:
    fields = set(Settings.model_fields)
    assert {name: field.upper() for name, field in canonical_names().items() if name.lower() not in fields} == (
        DESIGN_ALIASES
    )


@pytest.mark.parametrize("alias", DESIGN_ALIASES)
@pytest.mark.parametrize("source", ["file", "environment"])
def test_alias_sets_its_setting(load: Load, alias: str, source: str) -> None:
    value = ALIAS_VALUES[alias]
    settings = load(f"{alias}={value}\n") if source == "file" else load(**{alias: value})
    field = DESIGN_ALIASES[alias].lower()
    assert settings.is_set(field)
    assert str(getattr(settings, field)).lower() == value


@pytest.mark.parametrize("alias", DESIGN_ALIASES)
@pytest.mark.parametrize("source", ["file", "environment"])
def test_both_spellings_with_different_values_are_refused(problems: Problems, alias: str, source: str) -> None:
    given = {alias: ALIAS_VALUES[alias], DESIGN_ALIASES[alias]: "true" if alias == "UPLOAD_TO_HF" else "0.25"}
    text = "".join(f"{name}={value}\n" for name, value in given.items())
    message = problems(text)[0] if source == "file" else problems(**given)[0]
    assert alias in message and DESIGN_ALIASES[alias] in message and "different values" in message


def test_both_spellings_with_the_same_value_are_fine(load: Load) -> None:
    assert load("LR=1e-4\nLEARNING_RATE=1e-4\n").learning_rate == 0.0001
    assert load(MODEL_PATH="tiny", INIT_MODEL_PATH="tiny").init_model_path == "tiny"
    sent = "HUB_MODEL_ID_BEST=me/voice\n"
    for one, other in [("true", "1"), ("True", "true"), ("yes", "on")]:
        assert load(f"{sent}UPLOAD_TO_HUB={one}\nUPLOAD_TO_HF={other}\n").upload_to_hub


@pytest.mark.parametrize("token", ["hf_…Secret", "hf_a Secret", "hf_a\tSecret"])
def test_a_token_that_no_request_can_carry(problems: Problems, token: str) -> None:
    (message,) = problems(f'HF_TOKEN="{token}"\n')
    assert "HF_TOKEN" in message and "is no token" in message and "Secret" not in message


def test_environment_beats_file(load: Load) -> None:
    settings = load("BATCH_SIZE=7\nSEED=7\n", BATCH_SIZE="9")
    assert (settings.batch_size, settings.seed) == (9, 7)


@pytest.mark.parametrize("in_file, in_environment", [("LR", "LEARNING_RATE"), ("LEARNING_RATE", "LR")])
def test_environment_beats_file_in_the_other_spelling(load: Load, in_file: str, in_environment: str) -> None:
    assert load(f"{in_file}=0.5\n", **{in_environment: "0.25"}).learning_rate == 0.25


def test_overrides_beat_the_environment() -> None:
    assert load_settings({"batch_size": 3}, environment={"BATCH_SIZE": "9"}).batch_size == 3


def test_empty_value_means_unset(load: Load) -> None:
    settings = load("BATCH_SIZE=\nSEED=\nREF_TEXT=''\nNUM_EPOCHS=5\n", SEED="", NUM_EPOCHS="")
    assert (settings.batch_size, settings.seed, settings.ref_text, settings.num_epochs) == (2, 42, None, 5)
    assert settings.is_set("num_epochs") and not settings.is_set("batch_size") and not settings.is_set("seed")


@pytest.mark.parametrize("text", ["LR=\nLEARNING_RATE=0.5\n", "LR=0.5\nLEARNING_RATE=\n"])
def test_empty_spelling_does_not_clash_with_a_filled_one(load: Load, text: str) -> None:
    assert load(text).learning_rate == 0.5


def test_file_syntax(load: Load) -> None:
    settings = load(
        "# a comment\n\nexport BATCH_SIZE=5\n"
        "SPEAKER_NAME='Ada Lovelace'  # trailing comment\n"
        'REF_AUDIO_PATH=x.wav\nREF_TEXT="a # b"\nSEED = 7\nOVERWRITE_OUTPUT=True\n'
    )
    assert (settings.batch_size, settings.speaker_name, settings.ref_text) == (5, "Ada Lovelace", "a # b")
    assert (settings.seed, settings.overwrite_output) == (7, True)


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfBATCH_SIZE=5\n", b"# x\r\nBATCH_SIZE=5\r\n"], ids=["BOM", "CRLF"])
def test_files_of_windows_editors_are_read(load: Load, text: bytes) -> None:
    assert load(text).batch_size == 5


@pytest.mark.parametrize("value, expected", [("all", None), ("ALL", None), ("12", 12)])
def test_sample_limits_take_all(load: Load, value: str, expected: int | None) -> None:
    settings = load(f"MAX_TRAIN_SAMPLES={value}\nMAX_EVAL_SAMPLES={value}\n")
    assert settings.max_train_samples == expected and settings.max_eval_samples == expected


def test_settings_are_frozen(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().batch_size = 3


def test_the_null_device_is_no_settings_file_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.settings.DEFAULT_ENV_FILE", str(tmp_path / ".env"))
    (tmp_path / ".env").write_text("BATCH_SIZE=7\n")
    assert load_settings(environment={}).batch_size == 7
    assert load_settings(environment={"ENV_FILE": os.devnull}).batch_size == 2


def test_missing_env_file_is_an_error_only_when_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings(environment={}).batch_size == 2
    with pytest.raises(UserError, match=r"ENV_FILE: .*nowhere\.env does not exist"):
        load_settings(environment={"ENV_FILE": "nowhere.env"})


def test_env_file_that_is_not_text(problems: Problems) -> None:
    (message,) = problems(b"BATCH_SIZE=\xff\xfe\n")
    assert message.startswith("ENV_FILE: ") and "UTF-8" in message


# ------------------------------------------------------------------------------------------------- names and lines


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("BATCH_SIZ", "BATCH_SIZE"),
        ("LEARNING_RATES", "LEARNING_RATE"),
        ("OUTPUT_DIRECTORY", "OUTPUT_DIR"),
        ("batch_size", "BATCH_SIZE"),
        ("WANDB_PROJCT", "WANDB_PROJECT"),
        ("HF_BEST_MODEL_REPOS", "HF_BEST_MODEL_REPO"),
    ],
)
def test_unknown_name_gives_line_and_nearest(problems: Problems, tmp_path: Path, name: str, nearest: str) -> None:
    (message,) = problems(f"# a comment\nSEED=1\n{name}=4\n")
    assert message.startswith(f"{tmp_path / 'my.env'} line 3:")
    assert name in message and message.endswith(f"did you mean {nearest}?")


def test_unknown_name_without_a_near_one(problems: Problems) -> None:
    (message,) = problems("ZZYZX=4\n")
    assert "ZZYZX" in message and "did you mean" not in message


@pytest.mark.parametrize("before", ["\n\n\n", "  \n\t\n \n", "# a\n\n# b\n", "A_LONG='1\n2'\n\n", "\r\n \r\n\r\n"])
def test_line_numbers_count_every_kind_of_line(problems: Problems, before: str) -> None:
    message = problems(before + "BATCH_SIZ=4\n")[-1]
    assert " line 4: unknown setting BATCH_SIZ;" in message


def test_name_twice_in_the_file(problems: Problems) -> None:
    (message,) = problems("SEED=1\nBATCH_SIZE=3\nSEED=1\n")
    assert "line 3: SEED stands twice" in message and "line 1" in message


@pytest.mark.parametrize("line", ["BATCH_SIZE 4", "BATCH_SIZE: 4", "=4", "BATCH_SIZE='4", "BATCH_SIZE"])
def test_malformed_line(problems: Problems, line: str) -> None:
    (message,) = problems(f"SEED=1\n{line}\n")
    assert "line 2: not of the form NAME=value" in message


def test_all_problems_are_reported_at_once(problems: Problems) -> None:
    messages = problems(
        "BATCH_SIZ=4\nNUM_EPOCHS=many\nUPLOAD_TO_HUB=true\nLR=1\nLEARNING_RATE=0.5\nno assignment\nSEED=1\nSEED=1\n",
        DEVICE="tpu",
        TRAIN_JSONL="same.jsonl",
        VALIDATION_JSONL="same.jsonl",
        WEIGHT_DECAY="-1",
    )
    expected = (
        "BATCH_SIZ;", "NUM_EPOCHS (", "UPLOAD_TO_HUB (", "LEARNING_RATE", "line 6: not of the form",
        "SEED stands twice", "DEVICE (environment)", "TRAIN_JSONL (environment)", "WEIGHT_DECAY (environment)",
    )  # fmt: skip
    for part in expected:
        assert sum(part in message for message in messages) == 1, part
    assert len(messages) == len(expected)


def test_field_problem_names_spelling_and_place(problems: Problems, tmp_path: Path) -> None:
    (message,) = problems("\nLR=fast\n")
    assert message.startswith(f"LR ({tmp_path / 'my.env'} line 2): ")
    assert "fast" not in message


# --------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "text",
    [
        f"HF_TOKNE={SECRET}\n",
        f"HF_TOKEN_={SECRET}\n",
        f"HFTOKEN={SECRET}\n",
        f"hf_token={SECRET}\n",
        f"MY_TOKEN='{SECRET}'\n",
        f"HF_TOKEN {SECRET}\n",
        f"HF_TOKEN: {SECRET}\n",
        f"HF_TOKEN='{SECRET}\n",
        f"HF_TOKEN=\n{SECRET}\n",
        f"HF_TOKEN={SECRET}\nHF_TOKEN={SECRET}2\n",
        f"BATCH_SIZE={SECRET}\n",
        f"DEVICE={SECRET}\n",
        f"UPLOAD_TO_HUB={SECRET}\n",
        f"LR_SCHEDULER={SECRET}\n",
        f"LR={SECRET}\nLEARNING_RATE={SECRET}2\n",
    ],
    ids=lambda text: text.replace(SECRET, "…").strip().replace("\n", ","),
)
def test_misplaced_secret_is_refused_and_never_shown(problems: Problems, text: str) -> None:
    assert SECRET.lower() not in "".join(problems(text)).lower()


def test_token_is_kept_and_never_shown(load: Load, tmp_path: Path) -> None:
    settings = load(f"HF_TOKEN={SECRET}\nSEED=7\n")
    assert settings.hf_token is not None and settings.hf_token.get_secret_value() == SECRET
    settings.save(tmp_path / "settings.json")
    saved = (tmp_path / "settings.json").read_text(encoding="utf-8")
    for shown in (settings.describe(), repr(settings), str(settings), saved, json.dumps(settings.public())):
        assert SECRET not in shown
        assert "7" in shown  # and the rest is there
    assert "HF_TOKEN" not in json.loads(saved)


def test_saved_settings_hold_every_other_setting(load: Load, tmp_path: Path) -> None:
    load("OUTPUT_DIR=somewhere\nSPEAKER_NAME=Àdùké\nLR=1e-4\n").save(tmp_path / "settings.json")
    saved = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    assert saved.keys() == {name.upper() for name in Settings.model_fields} - {"HF_TOKEN"}
    assert (saved["OUTPUT_DIR"], saved["SPEAKER_NAME"], saved["LEARNING_RATE"]) == ("somewhere", "Àdùké", 0.0001)


def test_describe_marks_what_the_user_set(load: Load) -> None:
    lines = {line.split()[-2]: line for line in load("SEED=7\n", LR="0.5").describe().splitlines()[1:]}
    assert {name for name, line in lines.items() if "*" in line} == {"SEED", "LEARNING_RATE"}
    assert lines["SEED"].endswith(" 7") and lines["REF_TEXT"].endswith(" -") and lines["USE_WANDB"].endswith(" true")


# ------------------------------------------------------------------------------------------ variables of other tools

OTHER_TOOLS = (
    "WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_RUN_GROUP", "HF_ENDPOINT",
    "HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_TOKEN_PATH", "NCCL_DEBUG", "NCCL_P2P_DISABLE",
    "CUDA_VISIBLE_DEVICES", "TORCH_HOME", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE", "ACCELERATE_MIXED_PRECISION", "XDG_CACHE_HOME",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_variables_of_other_tools_are_exported(load: Load, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(name, raising=False)
    load(f"{name}=from-file\n")
    assert os.environ[name] == "from-file"


def test_export_never_overrides_the_environment(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mine")
    monkeypatch.setenv("HF_TOKEN", "mine")
    load("HF_ENDPOINT=https://file\nHF_TOKEN=file\n")
    assert (os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"]) == ("https://mine", "mine")


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "HF_TOKEN"])
def test_empty_environment_variable_gives_way_to_the_file(
    load: Load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "")
    load(f"{name}=from-file\n")
    assert os.environ[name] == "from-file"


def test_token_of_the_file_reaches_the_hub(load: Load) -> None:
    load(f"HF_TOKEN={SECRET}\n")
    assert os.environ["HF_TOKEN"] == SECRET


def test_our_own_settings_are_not_exported(load: Load) -> None:
    load("WANDB_PROJECT=x\nHF_BEST_MODEL_REPO=me/best\nSEED=1\n")
    assert not {"WANDB_PROJECT", "HF_BEST_MODEL_REPO", "SEED"} & set(os.environ)


def test_nothing_is_exported_from_a_refused_file(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    with pytest.raises(UserError):
        load("NCCL_DEBUG=INFO\nSEED=x\n")
    assert "NCCL_DEBUG" not in os.environ


# ---------------------------------------------------------------------------------------------------- value checks


@pytest.mark.parametrize(
    "name, value",
    [
        *[(name, value) for name in ("LEARNING_RATE", "MAX_GRAD_NORM") for value in ("0", "-1", "nan", "inf", "1e400")],
        *[(name, value) for name in ("WEIGHT_DECAY", "LR_MIN") for value in ("-0.1", "nan", "inf", "2")],
        *[("SUB_TALKER_LOSS_WEIGHT", value) for value in ("-0.1", "nan", "-inf")],
        *[("VALIDATION_FRACTION", value) for value in ("-0.1", "0.9", "nan")],
        *[(name, value) for name in ("BATCH_SIZE", "NUM_EPOCHS") for value in ("0", "-1", "1.5", "nan", "two")],
        *[(name, "0") for name in ("GRADIENT_ACCUMULATION_STEPS", "EFFECTIVE_BATCH_SIZE", "MAX_STEPS")],
        *[(name, "0") for name in ("LOGGING_STEPS", "SAVE_STEPS", "EVAL_STEPS", "SAVE_TOTAL_LIMIT", "LR_NUM_CYCLES")],
        *[(name, "0") for name in ("MAX_TRAIN_SAMPLES", "MAX_EVAL_SAMPLES")],
        *[(name, "-1") for name in ("WARMUP_STEPS", "NUM_WORKERS", "REPLACE_LAST_N_LAYERS", "ADD_NEW_LAYERS", "SEED")],
        ("VERIFY_ROUNDTRIP", "-1"),
        *[("LORA_RANK", value) for value in ("-1", "2.5", "2000")],
        *[(name, value) for name in ("LORA_ALPHA", "LORA_EXPORT_SCALE") for value in ("0", "-1", "nan")],
        *[("LORA_DROPOUT", value) for value in ("-0.1", "1", "nan")],
        *[("AUGMENT_COPIES", value) for value in ("-1", "1.5", "21", "some")],
        *[("AUGMENT_SPEED", value) for value in ("-0.1", "0.6", "nan")],
        *[(f"AUGMENT_{name}", value) for name in ("PITCH_SEMITONES", "GAIN_DB") for value in ("-1", "50", "nan")],
        *[("AUGMENT_NOISE_SNR_DB", value) for value in ("-11", "inf")],
        ("SEED", str(2**32)),
        ("LEARNING_RATE", "100"),
        ("BATCH_SIZE", "9" * 5000),
        ("DEVICE", "gpu"),
        ("MIXED_PRECISION", "fp8"),
        ("ATTN_IMPLEMENTATION", "flash"),
        ("DATA_MODE", "json"),
        ("LAYER_INIT", "zeros"),
        *[("EMA_DECAY", value) for value in ("-0.1", "1", "nan", "on")],
        ("TRAIN_LAYOUT", "stream"),
        *[("SPEAKER_BALANCE", value) for value in ("-0.1", "1.1", "nan", "full")],
        ("CURRICULUM", "long_first"),
        *[("CURRICULUM_EPOCHS", value) for value in ("0", "-1", "1.5")],
        ("USE_WANDB", "maybe"),
        *[("BEST_METRIC", value) for value in ("lose", "roundtrip_reproduced", "loss,accuracy")],
        *[("EARLY_STOPPING_PATIENCE", value) for value in ("-1", "1.5", "on")],
        *[("REPORT_TO", value) for value in ("wand", "wandb tensorboard", "none,wandb", "wandb,", ",", "all")],
    ],
)
def test_absurd_value_is_refused(problems: Problems, name: str, value: str) -> None:
    (message,) = problems(**{name: value})
    assert message.startswith(f"{name} (environment): ")


@pytest.mark.parametrize(
    "text, stages",
    [
        ("all", [Stage(("all",))]),
        (
            "embeddings:200,new_layers:500,all",
            [*map(Stage, (("embeddings",), ("new_layers",), ("all",)), (200, 500, None))],
        ),
        (" heads + adapters : 20 , talker:1, ", None),
        (" heads + adapters : 20 , talker:1 ", [Stage(("heads", "adapters"), 20), Stage(("talker",), 1)]),
    ],
)
def test_stages(load: Load, problems: Problems, text: str, stages: list[Stage] | None) -> None:
    if stages is None:
        assert '"" is no stage' in problems(TRAIN_STAGES=text)[0]
        return
    settings = load(TRAIN_STAGES=text)
    assert settings.stages() == stages and " " not in settings.public()["TRAIN_STAGES"]
    assert load().stages() == []


@pytest.mark.parametrize(
    "text, part",
    [
        ("embedding:200,all", '"embedding" is no stage; the names are embeddings, new_layers, talker, sub_talker,'),
        ("embeddings+:200,all", '"" is no stage'),
        (",", '"" is no stage'),
        ("embeddings,all", '"embeddings" has no steps, which only the last stage may go without: embeddings:200'),
        *[(f"talker:{steps},all", f'"talker:{steps}": the steps of a stage are a whole number') for steps in (
            "", "0", "-5", "2.5", "1e3", "many", "²",
        )],
    ],
)  # fmt: skip
def test_stages_that_are_refused(problems: Problems, text: str, part: str) -> None:
    (message,) = problems(TRAIN_STAGES=text)
    assert message.startswith("TRAIN_STAGES (environment): ") and part in message


@pytest.mark.parametrize("world_size, product", [("", 12), ("1", 12), ("4", 48)])
def test_effective_batch_size(load: Load, world_size: str, product: int) -> None:
    text = "BATCH_SIZE=3\nGRADIENT_ACCUMULATION_STEPS=4\n"
    assert load(text, EFFECTIVE_BATCH_SIZE=str(product), WORLD_SIZE=world_size).effective_batch_size == product


@pytest.mark.parametrize("world_size, product", [("", "12"), ("4", "48")])
def test_wrong_effective_batch_size_shows_the_product(problems: Problems, world_size: str, product: str) -> None:
    text = "BATCH_SIZE=3\nGRADIENT_ACCUMULATION_STEPS=4\nEFFECTIVE_BATCH_SIZE=24\n"
    (message,) = problems(text, WORLD_SIZE=world_size)
    assert message.startswith("EFFECTIVE_BATCH_SIZE (") and "line 3" in message
    numbers = re.findall(r"\b\d+\b", message.split("): ", 1)[1])
    assert numbers == ["24", "3", "4", world_size or "1", product]


@pytest.mark.parametrize(
    "given, blamed, part",
    [
        ({"LR_SCHEDULER": "cosin"}, "LR_SCHEDULER", "cosine_with_restarts"),
        ({"LR_SCHEDULER": "reduce_lr_on_plateau"}, "LR_SCHEDULER", "must be one of"),
        ({"LR_MIN": "1e-6", "LR_SCHEDULER": "linear"}, "LR_MIN", "cosine"),
        ({"LR_MIN": "1e-3", "LEARNING_RATE": "1e-4"}, "LR_MIN", "below LEARNING_RATE"),
        ({"LR_MIN": "1e-4", "LR": "1e-4"}, "LR_MIN", "below LEARNING_RATE"),
        ({"LR_NUM_CYCLES": "2", "LR_SCHEDULER": "linear"}, "LR_NUM_CYCLES", "cosine"),
        ({"LR_NUM_CYCLES": "2", "LR_MIN": "1e-6"}, "LR_NUM_CYCLES", "LR_MIN"),
        ({"TRAIN_JSONL": "a.jsonl", "VALIDATION_JSONL": "./x/../a.jsonl"}, "TRAIN_JSONL", "VALIDATION_JSONL"),
        ({"SPEAKER_NAME": " Ada"}, "SPEAKER_NAME", "white space"),
        ({"UPLOAD_TO_HF": "true"}, "UPLOAD_TO_HF", "needs a repository"),
        ({"HUB_MODEL_ID_BEST": "voice"}, "HUB_MODEL_ID_BEST", "owner/name"),
        ({"HF_LAST_MODEL_REPO": "me/my voice"}, "HF_LAST_MODEL_REPO", "letters, digits"),
        ({"HUB_MODEL_ID_LAST": "me/voice.git"}, "HUB_MODEL_ID_LAST", "nor .git"),
        ({"HUB_MODEL_ID_BEST": "me/Voice", "HUB_MODEL_ID_LAST": "me/voice"}, "HUB_MODEL_ID_LAST", "replace the other"),
        ({"HUB_EVERY": "epoch"}, "HUB_EVERY", "'end' or 'save'"),
        ({"DATA_MODE": "direct"}, "DATA_MODE", "name it in DATASET_NAME"),
        ({"SPEAKER_BALANCE": "0.5", **_DIRECT}, "SPEAKER_BALANCE", "which DATA_MODE=direct does not"),
        ({"CURRICULUM": "short_first", **_DIRECT}, "CURRICULUM", "which DATA_MODE=direct does not know"),
        (
            {"AUGMENT_COPIES": "1", "DATA_MODE": "direct", "DATASET_NAME": "me/speech"},
            "AUGMENT_COPIES",
            "DATA_MODE=direct streams",
        ),
        ({"AUGMENT_COPIES": "1", "DATA_MODE": "none"}, "AUGMENT_COPIES", "DATA_MODE=none encodes nothing"),
        ({"NEW_LANGUAGES": ", "}, "NEW_LANGUAGES", "names no language"),
        ({"NEW_LANGUAGES": "hausa", "LANGUAGE_MIX": "1"}, "LANGUAGE_MIX", "and NEW_LANGUAGES nothing"),
        ({"REF_TEXT": "Hello."}, "REF_TEXT", "REF_AUDIO_PATH, which is not set"),
        ({"NEW_LANGUAGES": "hausa,auto"}, "NEW_LANGUAGES", '"auto" cannot be the name of a language'),
        ({"NEW_LANGUAGES": "kano_dialect"}, "NEW_LANGUAGES", "cannot be the name"),
        ({"NEW_LANGUAGES": ":english"}, "NEW_LANGUAGES", "cannot be the name"),
        ({"NEW_LANGUAGES": "hausa,Hausa:english"}, "NEW_LANGUAGES", "names hausa twice"),
        ({"NEW_LANGUAGES": "hausa", "PREFIX_CACHE": "ram"}, "PREFIX_CACHE", "what NEW_LANGUAGES trains"),
        ({"SPEAKER_EMBEDDING_TRAINABLE": "true", "PREFIX_CACHE": "ram"}, "PREFIX_CACHE", "nothing to keep"),
        ({"SPEAKER_EMBEDDING_TRAINABLE": "true", "EXPORT_TYPE": "base"}, "EXPORT_TYPE", "from its speaker encoder"),
        ({"ICL_FRACTION": "0.5"}, "ICL_FRACTION", "is for EXPORT_TYPE=base"),
        ({"REFERENCE_SAMPLING": "same_speaker"}, "REFERENCE_SAMPLING", "is for EXPORT_TYPE=base"),
        ({"ICL_FRACTION": "1", "EXPORT_TYPE": "base", **_DIRECT}, "ICL_FRACTION", "needs all rows ahead"),
        (
            {"ICL_FRACTION": "0.5", "EXPORT_TYPE": "base", "PREFIX_CACHE": "ram"},
            "EXPORT_TYPE",
            "other references in every epoch",
        ),
        (
            {f"AUGMENT_{name}": value for name, value in zip(NAMES_OF_CHANGES, "1000", strict=True)},
            "AUGMENT_COPIES",
            "would be the clips themselves",
        ),
        ({"AUGMENT_COPIES": "1", "AUGMENT_NOISE_DIR": "no/where"}, "AUGMENT_NOISE_DIR", "no/where is no folder"),
        ({"TRAIN_STAGES": "all", "PREFIX_CACHE": "ram"}, "TRAIN_STAGES", "PREFIX_CACHE=off"),
        ({"MOS_MODEL": "umtos"}, "MOS_MODEL", "neither a file nor one of distillmos, dnsmos, utmos"),
        ({"BEST_METRIC": "similarity"}, "BEST_METRIC", "set one of loss, talker_loss,"),
        ({"BEST_METRIC": "acuracy"}, "BEST_METRIC", "did you mean accuracy?"),
        ({"REPORT_TO": "tensorboard", "USE_WANDB": "true"}, "REPORT_TO", "without wandb, but USE_WANDB is true"),
        ({"REPORT_TO": "none", "USE_WANDB": "true"}, "REPORT_TO", "without wandb, but USE_WANDB is true"),
        ({"REPORT_TO": "wandb,tensorboard", "USE_WANDB": "false"}, "REPORT_TO", "with wandb, but USE_WANDB is false"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_cross_check(problems: Problems, given: dict[str, str], blamed: str, part: str) -> None:
    (message,) = problems(**given)
    assert message.startswith(f"{blamed} (environment): ") and part in message


@pytest.mark.parametrize(
    "given",
    [
        {"LR_MIN": "1e-6"},
        {"LR_MIN": "1e-6", "LR_SCHEDULER": "cosine_with_min_lr"},
        {"LR_NUM_CYCLES": "2"},
        {"LR_NUM_CYCLES": "2", "LR_SCHEDULER": "cosine_with_restarts"},
        {"LR_MIN": "0", "LR_SCHEDULER": "linear"},
        {"MOS_MODEL": "utmos", "ASR_MODEL": "openai/whisper-tiny"},
        {"SPEAKER_BALANCE": "0", "CURRICULUM": "none", "CURRICULUM_EPOCHS": "2", **_DIRECT},
        {"SPEAKER_BALANCE": "1", "CURRICULUM": "short_first", "DATA_MODE": "none"},
        {"AUGMENT_COPIES": "2"},
        {"NEW_LANGUAGES": "Hausa, yoruba:English"},
        {"EXPORT_TYPE": "base", "ICL_FRACTION": "1", "PREFIX_CACHE": "ram"},
        {"EXPORT_TYPE": "base", **_DIRECT},
        {"AUGMENT_COPIES": "2", "AUGMENT_NOISE_DIR": "."},
        {f"AUGMENT_{name}": value for name, value in zip(NAMES_OF_CHANGES, "1004", strict=True)},
        {"AUGMENT_SPEED": "0", "AUGMENT_NOISE_DIR": "no/where", "DATA_MODE": "none"},
        {"BEST_METRIC": " WER ", "EARLY_STOPPING_PATIENCE": "3"},
        {"REPORT_TO": "none", "USE_WANDB": "false"},
        {"REPORT_TO": "wandb", "USE_WANDB": "true"},
    ],
    ids=lambda given: "-".join(given),
)
def test_cross_check_lets_good_settings_pass(load: Load, given: dict[str, str]) -> None:
    load(**given)


@pytest.mark.parametrize(
    ("given", "trackers"),
    [
        ({}, ("wandb",)),
        ({"USE_WANDB": "false"}, ()),
        ({"REPORT_TO": "none"}, ()),
        ({"REPORT_TO": "tensorboard"}, ("tensorboard",)),
        ({"REPORT_TO": "tensorboard", "USE_WANDB": "false"}, ("tensorboard",)),
        ({"REPORT_TO": "TensorBoard , wandb"}, ("wandb", "tensorboard")),
        ({"REPORT_TO": "wandb,wandb"}, ("wandb",)),
    ],
)
def test_trackers(load: Load, given: dict[str, str], trackers: tuple[str, ...]) -> None:
    """USE_WANDB is shown as it was meant, and counts as set only where somebody did."""
    settings = load(**given)
    assert settings.trackers() == trackers
    assert settings.public()["USE_WANDB"] == ("wandb" in trackers)
    assert settings.is_set("use_wandb") == ("USE_WANDB" in given)


def test_every_allowed_scheduler_is_known_to_transformers() -> None:
    import torch
    from transformers import get_scheduler

    from finetuning.settings import LR_SCHEDULERS

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for name in LR_SCHEDULERS:
        extra = {"cosine_with_min_lr": {"min_lr": 0.01}, "warmup_stable_decay": {"num_decay_steps": 5}}.get(name)
        get_scheduler(name, optimizer, 2, 10, scheduler_specific_kwargs=extra)


def test_output_that_is_a_file(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    (message,) = problems(OUTPUT_DIR=str(tmp_path / "taken"))
    assert message.startswith("OUTPUT_DIR (environment): ") and "is a file" in message


def test_what_is_uploaded_where(load: Load) -> None:
    both = {"HUB_MODEL_ID_BEST": "me/best", "HF_LAST_MODEL_REPO": "me/last"}
    assert load(**both).repositories() == {}
    assert load(UPLOAD_TO_HF="true", **both).repositories() == {"best": "me/best", "last": "me/last"}
    assert load(UPLOAD_TO_HUB="true", HUB_MODEL_ID_LAST="me/last").repositories() == {"last": "me/last"}


def test_a_repository_is_what_the_hub_takes_for_one() -> None:
    """Beside the owner, which the Hub lets out, and letters of other alphabets, which it refuses later."""
    random = Random(0)
    for _ in range(20_000):
        name = "/".join("".join(random.choices("aZ0-._ ", k=random.randint(0, 5))) for _ in range(2))
        try:
            validate_repo_id(name)
        except HFValidationError:
            assert repository_problem(name), name
        else:
            assert repository_problem(name) is None, name
    for name in ("voice", "a/b/c", "", "/", "me/", "/voice", "ü/voice", "me/" + "x" * 97, "hf_aSecretToken"):
        problem = repository_problem(name)
        assert problem and "Secret" not in problem


def test_commands_without_settings_export_what_the_hub_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else stands in the file."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_BEST_MODEL_REPO"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")
    (tmp_path / "a.env").write_text(
        f"HF_TOKEN={SECRET}\nHF_ENDPOINT=http://mirror\nHF_BEST_MODEL_REPO=me/x\nEFFECTIVE_BATCH_SIZE=7\nOOPS\n"
    )
    export_variables_of_file({"ENV_FILE": str(tmp_path / "a.env")})
    assert (os.environ["HF_TOKEN"], os.environ["HF_ENDPOINT"]) == (SECRET, "http://mirror")
    assert not os.environ["HF_BEST_MODEL_REPO"]


def test_cross_check_is_skipped_where_its_field_is_bad_itself(problems: Problems) -> None:
    (message,) = problems(EFFECTIVE_BATCH_SIZE="24", BATCH_SIZE="many")
    assert message.startswith("BATCH_SIZE (environment): ")


@pytest.mark.parametrize("name", ["", "  ", " Ada", "Ada\n", "a\tb", "x" * 101, "a\u0000b"])
def test_unusable_speaker_name(name: str) -> None:
    assert speaker_name_problem(name)


@pytest.mark.parametrize("name", ["ada", "Ada Lovelace", "Àdùké", "नमस्ते", "x" * 100, "0"])
def test_usable_speaker_name(name: str) -> None:
    assert speaker_name_problem(name) is None


# ------------------------------------------------------------------------------------------------- the three lists

_EXAMPLE_LINE = re.compile(r"^#? ?([A-Z][A-Z0-9_]*)=")
_README_ROW = re.compile(r"^\| `?([A-Z_0-9]+)`?(?: \(([A-Z_0-9, `]+)\))? \| ")
#: How a table says that there is no default, or that everything is taken.
_NO_DEFAULT = ("–", "—", "-", "", "all", "none")


def _same_as_default(field: str, shown: str) -> bool:
    default = Settings().model_dump()[field]
    if default is None:  # a phrase such as "the base's own" is fine, a value is not
        return shown.lower() in _NO_DEFAULT or " " in shown
    return Settings(**{field: shown}).model_dump()[field] == default


def _example_lines() -> list[str]:
    return (PROJECT / ".env.training.example").read_text(encoding="utf-8").splitlines()


def _readme_rows() -> dict[str, tuple[list[str], str]]:
    """Name -> (aliases, default) of the README's settings table."""
    rows = {}
    for line in (PROJECT / "README.md").read_text(encoding="utf-8").splitlines():
        if match := _README_ROW.match(line):
            aliases = re.findall(r"[A-Z_0-9]+", match[2] or "")
            rows[match[1]] = (aliases, line.split("|")[2].strip().strip("`").strip())
    return rows


def test_example_lists_every_setting_once() -> None:
    names = [match[1] for line in _example_lines() if (match := _EXAMPLE_LINE.match(line))]
    assert sorted(names) == sorted(name.upper() for name in Settings.model_fields)


def test_example_explains_every_setting() -> None:
    lines = _example_lines()
    unexplained = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if _EXAMPLE_LINE.match(line)
        and (not re.match(r"# *\w+.{5}", before) or before.startswith("# --") or _EXAMPLE_LINE.match(before))
    ]
    assert not unexplained


def test_example_shows_the_defaults() -> None:
    matches = [(line, match) for line in _example_lines() if (match := _EXAMPLE_LINE.match(line))]
    wrong = [line for line, match in matches if not _same_as_default(match[1].lower(), line[match.end() :].strip())]
    assert not wrong


def test_example_can_be_used_as_it_stands(load: Load) -> None:
    used = load("\n".join(_example_lines()))
    assert used.model_dump() == Settings().model_dump()


def test_demo_file_can_be_read() -> None:
    settings = load_settings(environment={"ENV_FILE": str(PROJECT / ".env.demo")})
    assert (settings.init_model_path, settings.device) == ("tiny", "cpu")


def test_readme_table_lists_every_setting_with_its_aliases() -> None:
    aliases = {name.upper(): info.json_schema_extra["aliases"] for name, info in Settings.model_fields.items()}
    rows = {name: sorted(row[0]) for name, row in _readme_rows().items()}
    assert rows == {name: sorted(names) for name, names in aliases.items()}


def test_readme_table_shows_the_defaults() -> None:
    rows = _readme_rows()
    assert rows
    assert not [name for name, (_, shown) in rows.items() if not _same_as_default(name.lower(), shown)]


# ---------------------------------------------------------------------------------------------------- from outside


def test_mistake_in_env_is_reported_at_once_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"HF_TOKNE={SECRET}\nBATCH_SIZ=4\nNUM_EPOCHS=many\n")
    environment = {name: value for name, value in os.environ.items() if name not in canonical_names()}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(PROJECT / "train.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    # At once: before anything that takes seconds to import.
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "pydantic_settings" in imported
    assert imported.isdisjoint({"torch", "numpy", "transformers", "datasets", "accelerate", "qwen_tts"})
    done.stderr = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    assert done.returncode == 2
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: 3 problems in the settings:") and done.stderr.count("error:") == 1
    assert all(part in done.stderr for part in (".env line 1", "HF_TOKEN?", "BATCH_SIZE?", "NUM_EPOCHS (.env line 3)"))
    assert SECRET not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / ".env"]
