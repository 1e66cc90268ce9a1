"""The model card: valid metadata, what the run knows and nothing more, and an example that runs as it stands."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROJECT, VOICE
from hub_server import metadata_problems
from huggingface_hub import ModelCard
from training import FULL, train

from finetuning.base_model import Base
from finetuning.disk import damage
from finetuning.metrics import METRICS
from finetuning.model_card import (
    adapter_name,
    for_repository,
    hub_id,
    language_codes,
    license_of,
    model_card,
    origin,
)
from finetuning.settings import Settings, load_settings
from finetuning.speakers import Speakers

#: Names of people and of what they speak that Markdown, YAML and Python have signs for.
SPEAKER = 'Anna "la_Bella" #1'


def trained(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> SimpleNamespace:
    """A run of two steps, each evaluated."""
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    defaults = {
        "device": "cpu", "mixed_precision": "no", "init_model_path": "tiny-random", "use_wandb": False,
        "resume": "never", "sample_steps": 0, "train_jsonl": file, "validation_jsonl": file.with_name("held_out.jsonl"),
        "output_dir": folder / "output", "batch_size": 2, "gradient_accumulation_steps": 1, "eval_steps": 1,
        "max_steps": 2, "save_steps": 1, "save_epochs": True, "learning_rate": 1e-3, **FULL,
    }  # fmt: skip
    shutil.copy(file, file.with_name("held_out.jsonl"))
    settings = load_settings(defaults | fields, environment={})
    train(settings)
    return SimpleNamespace(settings=settings, output=settings.output_dir, best=settings.output_dir / "best")


@pytest.fixture(scope="module")
def by_name(tmp_path_factory: pytest.TempPathFactory, demo_rows: list[dict]) -> SimpleNamespace:
    rows = [row | {"speaker": SPEAKER, "language": "Hausa"} for row in demo_rows[:4]]
    return trained(
        tmp_path_factory.mktemp("by_name"), rows, new_languages="hausa", lora_rank=2, freeze_original_layers=True
    )


@pytest.fixture(scope="module")
def cloning(tmp_path_factory: pytest.TempPathFactory, demo_rows: list[dict]) -> SimpleNamespace:
    rows = [row | {"ref_text": "He reads."} for row in demo_rows[:4]]
    return trained(tmp_path_factory.mktemp("cloning"), rows, export_type="base", icl_fraction=1.0, train_layout="both")


def card_of(checkpoint: Path) -> ModelCard:
    return ModelCard.load(checkpoint / "README.md")


def table(card: ModelCard, heading: str) -> dict[str, str]:
    """First column -> second, of the table below a heading."""
    section = card.text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("|")][2:]
    return {row[0].strip(): row[1].strip() for row in rows}


@pytest.fixture
def run_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Runs the card's only Python block, as it stands, inside of a copy of the checkpoint that soon falls silent."""

    def run(checkpoint: Path) -> str:
        folder = shutil.copytree(checkpoint, tmp_path / "voice")
        shutil.copy(next(VOICE.glob("*.wav")), folder / "me.wav")
        config = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps(config | {"max_new_tokens": 4}))
        monkeypatch.chdir(folder)
        (block,) = re.findall(r"```python\n(.*?)```", card_of(folder).text, re.DOTALL)
        assert len(block.splitlines()) == 3
        names: dict[str, Any] = {}
        exec(block, names)
        assert names["sample_rate"] == 24000
        assert [len(waveform) > 0 for waveform in names["waveforms"]] == [True]
        return block

    return run


def test_metadata_is_valid_and_says_what_the_hub_sorts_by(by_name: Any, cloning: Any) -> None:
    for checkpoint in (*by_name.output.glob("*/README.md"), *cloning.output.glob("*/README.md")):
        assert metadata_problems(checkpoint.read_text(encoding="utf-8")) == []
    assert {file.parent.name for file in by_name.output.glob("*/README.md")} == {
        "best", "last", "checkpoint-1", "checkpoint-2", "epoch-0",
    }  # fmt: skip
    data = card_of(by_name.best).data
    assert (data.pipeline_tag, data.library_name, data.license) == ("text-to-speech", "qwen3_tts", "apache-2.0")
    assert data.language == ["ha"] and "custom-voice" in data.tags
    assert data.base_model is None  # an embedded model is none of the Hub's
    assert "voice-cloning" in card_of(cloning.best).data.tags


def test_it_says_what_was_trained_on_and_how(by_name: Any) -> None:
    card = card_of(by_name.best)
    record = json.loads((by_name.output / "run.json").read_text())
    data = table(card, "Training data")
    assert data["clips"] == "4"
    assert data["minutes"] == f"{60 * record['data']['train']['hours']:.1f}"
    assert data["languages"] == "Hausa (4 clips)"
    assert data["speakers"] == r'Anna "la\_Bella" \#1 (4 clips)'
    settings = table(card, "Training")
    assert settings["`LEARNING_RATE`"] == "0.001"
    assert settings["`BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS x processes`"] == "2 x 1 x 1"
    assert (settings["`LORA_RANK`"], settings["`NEW_LANGUAGES`"]) == ("2", "hausa")
    assert "for 2 optimizer steps" in card_of(by_name.output / "last").text


def test_figures_are_those_of_the_same_step(by_name: Any) -> None:
    log = [json.loads(line) for line in (by_name.output / "validation_log.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in log}
    assert losses[1] != losses[2]
    for step in (1, 2):
        measured = table(card_of(by_name.output / f"checkpoint-{step}"), "Measured")
        assert measured["loss"] == f"{losses[step]:.4f}"
        assert measured.keys() == {name for name, metric in METRICS.items() if not metric.is_of_samples}


def test_no_path_and_no_secret_stands_in_it(by_name: Any, cloning: Any, tmp_path: Path) -> None:
    for run in (by_name, cloning):
        text = (run.best / "README.md").read_text(encoding="utf-8")
        for part in (str(run.output), str(PROJECT), str(VOICE), str(Path.home()), "/tmp", ".jsonl", ".wav,"):
            assert part not in text


def test_the_example_of_a_custom_voice_runs_as_it_stands(by_name: Any, run_example: Callable) -> None:
    assert r'speaker="Anna \"la_Bella\" #1"' in run_example(by_name.best)


def test_the_example_of_a_base_export_runs_as_it_stands(cloning: Any, run_example: Callable) -> None:
    """With a recording by the name that it gives."""
    block = run_example(cloning.best)
    assert "ref_text" in block and "non_streaming_mode" not in block


def test_an_edited_card_is_no_damage(by_name: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(by_name.best, tmp_path / "voice")
    (folder / "README.md").write_text("mine")
    assert damage(folder) == []


# ------------------------------------------------------------------------------------------------------- what is known


def base_of(name: str, folder: Path) -> Base:
    folder.mkdir(parents=True, exist_ok=True)
    return Base(name, folder, {"talker_config": {}, "tts_model_type": "base"}, folder)


SPEAKERS = Speakers(["Ada"], torch.zeros(1, 4), [3000], [["/home/me/ada.wav"]])


def test_a_base_of_the_hub_is_named(tmp_path: Path) -> None:
    base = base_of("Qwen/Qwen3-TTS-12Hz-0.6B-Base", tmp_path / "snapshot")
    card = ModelCard(model_card(base, SPEAKERS, {"step": 3}, Settings(), {}))
    assert card.data.base_model == "Qwen/Qwen3-TTS-12Hz-0.6B-Base"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert metadata_problems(str(card)) == []
    assert "## Training data" not in card.text and "## Measured" not in card.text  # nothing is known of either
    assert str(card) == str(ModelCard(model_card(base, SPEAKERS, {"step": 3}, Settings(), {})))


def test_a_local_base_is_named_as_far_as_its_id_is_known(tmp_path: Path) -> None:
    local = base_of(str(tmp_path / "mine"), tmp_path / "mine")
    assert hub_id(local) is None
    card = model_card(local, SPEAKERS, {"step": 3}, Settings(), {})
    assert "base_model" not in card and str(tmp_path) not in card and "`mine`" in card
    (local.folder / "training_state.json").write_text('{"base": "Qwen/Qwen3-TTS-12Hz-1.7B-Base"}')
    assert hub_id(local) == "Qwen/Qwen3-TTS-12Hz-1.7B-Base"  # of a checkpoint of this tool: what it came from
    (local.folder / "training_state.json").write_text('{"base": "/home/me/other"}')
    assert hub_id(local) is None
    by_hand = tmp_path / "models" / "Qwen3-TTS-12Hz-0.6B-CustomVoice"
    assert hub_id(base_of(str(by_hand), by_hand)) == "Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice"
    cached = tmp_path / "models--you--voice" / "snapshots" / "abc"
    assert hub_id(base_of(str(cached), cached)) == "you/voice"


def test_a_relative_folder_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in its own run nor in the next generation, wherever that is trained."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models" / "voice"
    local, remote = base_of("models/voice", folder), base_of("models/voice", tmp_path / "cache")
    assert (hub_id(local), hub_id(remote)) == (None, "models/voice")
    child = base_of(str(tmp_path / "run" / "best"), tmp_path / "run" / "best")
    for base, known, stored in ((local, None, str(folder)), (remote, "models/voice", "models/voice")):
        (child.folder / "training_state.json").write_text(json.dumps({"base": origin(base)}))
        assert origin(base) == stored
        with monkeypatch.context() as patch:
            patch.chdir(child.folder)
            assert hub_id(child) == known
    (child.folder / "training_state.json").write_text('{"base": "models/voice"}')  # as older checkpoints have a folder
    assert hub_id(child) is None
    assert origin(base_of("tiny-random", tmp_path / "embedded")) == "tiny-random"


def test_the_licence_is_that_of_the_base(tmp_path: Path) -> None:
    base = base_of("you/voice", tmp_path)
    assert license_of(base) == {}  # nobody has said
    assert license_of(base_of("tiny-random", tmp_path)) == {"license": "apache-2.0"}
    assert license_of(base_of("Qwen/Qwen3-TTS-12Hz-0.6B-Base", tmp_path)) == {"license": "apache-2.0"}
    (tmp_path / "README.md").write_text("---\nlicense: [cc-by-nc-4.0, mit]\n---\n")
    assert license_of(base) == {"license": "cc-by-nc-4.0"}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [a]\n---\n# Base\n")
    assert license_of(base) == {"license": "other", "license_name": "mine"}
    card = model_card(base, SPEAKERS, {}, Settings(), {})
    assert ModelCard(card).data.license == "other" and "# Base" not in card
    for broken in ("no card", "---\n: [\n---\n", "---\nlicense: 3\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert license_of(base) == {}


def test_languages_have_codes_as_far_as_they_are_known() -> None:
    assert language_codes(["English", "Auto", "hausa", "en", "YORUBA", "Klingon", "chinese"]) == [
        "en",
        "ha",
        "yo",
        "zh",
    ]


def test_merged_adapters(tmp_path: Path) -> None:
    base = base_of("you/voice", tmp_path)
    state = {"merged": [{"adapter": "/home/me/run/best/adapter", "share": 0.5}]}
    card = model_card(base, SPEAKERS, state, Settings(), {})
    assert "0.5 of `run/best`" in card and "/home" not in card and "## Training" not in card
    assert adapter_name("best/adapter") == "best" and adapter_name("./adapter") == ""


def test_a_repository_takes_the_place_of_the_folder(tmp_path: Path) -> None:
    card = for_repository(model_card(base_of("you/voice", tmp_path), SPEAKERS, {}, Settings(), {}), "me/ada")
    assert 'from_pretrained("me/ada")' in card and 'from_pretrained(".")' not in card and "folder" not in card
    streaming = replace(SPEAKERS, names=["a\\b"])
    card = model_card(base_of("you/voice", tmp_path), streaming, {}, Settings(train_layout="streaming"), {})
    assert r'speaker="a\\b", non_streaming_mode=False' in card
