"""The proof for what a prompt can say: speakers, languages, instructions and references each select the codes that were
trained with them, in stock qwen-tts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import PROJECT, VOICE
from training import FULL, train

from finetuning.settings import load_settings

TABLE = "talker.model.codec_embedding.weight"
FIELDS = FULL | {
    "device": "cpu", "mixed_precision": "no", "init_model_path": "tiny-random", "validation_fraction": 0.0,
    "gradient_accumulation_steps": 1, "learning_rate": 4e-3, "warmup_steps": 10, "weight_decay": 0.0,
    "sub_talker_loss_weight": 1.0, "logging_steps": 50, "save_steps": 10_000, "use_wandb": False,
}  # fmt: skip
#: The same sentence, said in so many ways.
TEXT = "We met in the old library."
SPEAKERS = ("Anna", "bert", "Cleo")


def clip(number: int) -> str:
    return str(VOICE / "clips" / f"train_{number:02d}.flac")


@pytest.fixture(scope="module")
def codes(demo_rows: list[dict]) -> list[list[list[int]]]:
    """Of short clips."""
    return sorted((row["audio_codes"] for row in demo_rows), key=len)[:16]


@pytest.fixture(scope="module")
def conditions(codes: list) -> list[dict[str, Any]]:
    """Rows that only their speaker, their language or their instruction tells apart."""
    by_speaker = [{"text": TEXT, "speaker": name} for name in SPEAKERS]
    own = [{"text": text, "speaker": name} for name, text in zip(SPEAKERS, ("One.", "Two, too.", "Three"), strict=True)]
    spoken = "Is there any tea left?"
    by_language = [{"text": spoken, "speaker": "Anna", "language": name} for name in ("Hausa", "English", "yoruba")]
    said = "Bring me the blue notebook."
    instructions = (None, "Whisper it.", "Say it aloud, in anger.")
    by_instruct = [{"text": said, "speaker": "bert", "instruct": instruct} for instruct in instructions]
    rows = [*by_speaker, *own, *by_language, *by_instruct]
    references = dict(zip(SPEAKERS, (clip(16), clip(17), str(VOICE / "english_voice.wav")), strict=True))
    return [
        row | {"audio_codes": some, "ref_audio": references[row["speaker"]]}
        for row, some in zip(rows, codes, strict=False)
    ]


def trained(folder: Path, rows: list[dict], **fields: Any) -> SimpleNamespace:
    jsonl = folder / "train.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = FIELDS | {"train_jsonl": jsonl, "output_dir": folder / "output", "batch_size": len(rows)} | fields
    run, _ = train(load_settings(fields, environment={}))
    return SimpleNamespace(run=run, last=folder / "output" / "last")


def judged(folder: Path, checkpoint: Path, rows: list[dict]) -> dict:
    """By a process that has qwen-tts and cannot import the project."""
    judge, spec = folder / "judge.py", folder / "spec.json"
    judge.write_text((PROJECT / "finetuning" / "roundtrip.py").read_text(encoding="utf-8"), encoding="utf-8")
    spec.write_text(json.dumps({"checkpoint": str(checkpoint), "rows": rows}), encoding="utf-8")
    command = [sys.executable, "-I", str(judge), str(spec)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def voices(conditions: list, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One model of all conditions, and what stock made of the rows, and of rows with one thing changed."""
    folder = tmp_path_factory.mktemp("conditions")
    made = trained(folder, conditions, num_epochs=240, new_languages="hausa,yoruba:english")
    wrong_names = dict(zip(SPEAKERS, SPEAKERS[1:] + SPEAKERS[:1], strict=True))
    changed = [row | {"speaker": wrong_names[row["speaker"]]} for row in conditions[:3]]
    changed += [row | {"language": "English" if row["language"] != "English" else "Hausa"} for row in conditions[6:9]]
    changed += [row | {"instruct": None if row["instruct"] else "Whisper it."} for row in conditions[9:12]]
    result = judged(folder, made.last, conditions + changed)
    count = len(conditions)
    made.right, made.wrong = result["rows"][:count], result["rows"][count:]
    return made


def test_every_condition_gives_its_own_codes(voices: Any) -> None:
    assert sum(voices.right) / len(voices.right) >= 0.99


def test_another_speaker_language_or_instruction_does_not(voices: Any) -> None:
    assert max(voices.wrong) < 0.2


# ------------------------------------------------------------------------------------------------------- cloning


@pytest.fixture(scope="module")
def cloned(codes: list, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base checkpoint, trained in and out of context and in both layouts, and what stock made of its rows."""
    folder = tmp_path_factory.mktemp("cloned")
    # To a random speaker encoder all speech is nearly the same voice.
    hum = 0.4 * np.sin(2 * np.pi * 220 * np.arange(30_000) / 24_000)
    soundfile.write(folder / "hum.wav", hum, 24_000)
    references = ((clip(3), "Please open the window."), (str(folder / "hum.wav"), "Hum, hum, hum."))
    texts = (TEXT, TEXT, "Turn left at the church.", "Keep the change.")
    rows = [
        {"text": text, "audio_codes": some, "language": "English", "speaker": "anna"}
        | dict(zip(("ref_audio", "ref_text"), references[number % 2], strict=True))
        for number, (text, some) in enumerate(zip(texts, codes, strict=False))
    ]
    made = trained(folder, rows, num_epochs=320, export_type="base", icl_fraction=0.5, train_layout="both")
    variants = [{"is_streaming": layout} | context for layout in (False, True) for context in ({}, {"ref_text": None})]
    spec = [
        {name: value for name, value in (row | variant).items() if name != "speaker"}
        for variant in variants
        for row in rows
    ]
    others = [row | dict(zip(("ref_audio", "ref_text"), references[1], strict=True)) for row in spec[:1]]
    result = judged(folder, made.last, spec + others)
    made.rows, made.right, made.wrong = rows, result["rows"][: len(spec)], result["rows"][len(spec) :]
    return made


def test_a_base_export_clones_in_and_out_of_context(cloned: Any) -> None:
    assert sum(cloned.right) / len(cloned.right) >= 0.99
    assert max(cloned.wrong) < 0.2  # the other reference: the other row of that sentence
