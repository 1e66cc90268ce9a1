"""Each file in examples/: it is read, it fits the card that it names, and one step is trained with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from datasets_for_tests import demo_texts, write_audiofolder
from training import train

from benchmarks.peak_memory import BaseOnPaper
from benchmarks.random_base import base_config
from finetuning.languages import new_languages
from finetuning.memory import PROFILES, Needs, pick_for_memory, usable_bytes
from finetuning.settings import Settings, load_settings

EXAMPLES = {file.stem: file for file in sorted((PROJECT / "examples").glob("*.env"))}
#: GB of memory of each GPU, where the name does not say it.
CARDS = {"four_gpus": 80, "new_language": 24, "several_speakers": 24}
#: What a machine without a GPU, a network and four processes has instead.
HERE = {
    "DEVICE": "cpu",
    "INIT_MODEL_PATH": "tiny-random",
    "NUM_WORKERS": "0",
    "MAX_STEPS": "1",
    "SAMPLE_STEPS": "0",
    "UPLOAD_TO_HUB": "false",
    "USE_WANDB": "false",
    "DATA_CHECK": "off",
}


def read(name: str, **environment: str) -> Settings:
    return load_settings(environment={"ENV_FILE": str(EXAMPLES[name]), **environment})


def rows_for(name: str, demo_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Twelve clips as the example wants them; the file gives what rows leave out."""
    rows = [{key: value for key, value in row.items() if key != "speaker"} for row in demo_rows[:12]]
    if name in ("new_language", "several_speakers"):
        rows = [row | {"speaker": f"person {number % 3}"} for number, row in enumerate(rows)]
    if name == "new_language":
        rows = [row | {"language": "Hausa"} for row in rows]
    return rows


def test_all_are_listed() -> None:
    listed = re.findall(r"^\| \[(\w+)\.env\]", (PROJECT / "examples" / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(EXAMPLES)


@pytest.fixture(scope="module")
def base_on_paper() -> BaseOnPaper:
    return BaseOnPaper(base_config("1.7b"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_fits_its_card(name: str, base_on_paper: BaseOnPaper, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    num_processes = 4 if name == "four_gpus" else 1
    settings = read(name, WORLD_SIZE=str(num_processes), UPLOAD_TO_HUB="false")
    monkeypatch.setattr(base_on_paper, "new_languages", new_languages(base_config("1.7b"), settings))
    picks = pick_for_memory(settings, base_on_paper, num_processes=num_processes)
    chosen = picks.settings if picks else settings
    card = CARDS.get(name) or int(name.rpartition("_")[2].removesuffix("gb"))
    assert Needs.of(base_on_paper, chosen, num_processes).peak_bytes() <= usable_bytes(PROFILES[f"{card}gb"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_step(name: str, demo_rows: list[dict[str, Any]], write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    file = write_jsonl(rows_for(name, demo_rows))
    here = HERE | {"OUTPUT_DIR": str(tmp_path / "output"), "REF_AUDIO_PATH": demo_rows[0]["ref_audio"]}
    if name == "four_gpus":
        write_audiofolder(tmp_path / "dataset", demo_texts(6))
        here |= {"DATASET_NAME": str(tmp_path / "dataset"), "TRAIN_JSONL": str(tmp_path / "prepared.jsonl")}
        here |= {"EFFECTIVE_BATCH_SIZE": "8"}
    else:
        here |= {"TRAIN_JSONL": str(file)}
    run, trainer = train(read(name, **here))
    assert trainer.progress.step == 1
    assert (run.settings.output_dir / "last" / "model.safetensors").is_file()
