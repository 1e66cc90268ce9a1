"""The structure that the README promises: data flows one way, and the layout has one home."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

#: A room imports only from rooms before it.
ORDER = (
    "errors", "console", "signals", "disk", "processes", "metrics", "history", "alarms", "evaluations", "plots",
    "settings", "stock", "tiny_model", "audio", "codec", "quality", "manifest", "row_index", "dataset_files",
    "tables", "readers", "source", "augment", "encoding", "workspace", "encode_rows", "prepare", "stream",
    "training_rows", "voice", "prompt", "draws", "balance", "sampling", "dataset", "steps", "progress", "choosing",
    "codec_rows", "languages", "base_model", "speakers", "reference_choice", "references", "layer_utils", "adapters",
    "preparer", "direct", "figures", "checks", "report", "mend", "check_rows", "attention", "chunked", "objective",
    "sharding", "prefix_cache", "small_adamw", "optimizers", "memory", "stages", "averaging", "stepping", "trainer",
    "model_card", "checkpoint", "state", "resume", "recognition", "listening", "validation", "speaking", "samples",
    "judging", "run_record", "services", "tracking", "saving", "hub", "uploads", "roundtrip", "closeness",
    "comparison", "lora", "starting", "building", "claiming", "briefing", "session", "library", "intervals",
    "evaluation_media", "report_html", "kept_samples", "evaluation_models", "evaluation_voices", "evaluation_plan",
    "evaluation_report", "evaluation", "official", "prepare_data", "sft_12hz",
)  # fmt: skip
ROOMS = sorted(file for file in (PROJECT / "finetuning").glob("*.py") if file.stem != "__init__")


def imports(file: Path) -> set[str]:
    """Rooms that a file imports at run time, also inside functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    for_types = {id(node) for block in blocks for node in ast.walk(block)}
    modules = [
        node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in for_types
    ]
    return {module.split(".")[1] for module in modules if module.startswith("finetuning.")}


def test_every_room_has_its_place() -> None:
    assert {room.stem for room in ROOMS} == set(ORDER)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.stem)
def test_rooms_import_only_from_rooms_before_them(room: Path) -> None:
    before = set(ORDER[: ORDER.index(room.stem)])
    assert imports(room) <= before


def test_only_the_prompt_room_knows_the_special_positions() -> None:
    """The names of the layout's ids appear in no other room but the tiny model's configuration."""
    for room in ROOMS:
        if room.stem not in ("prompt", "tiny_model"):
            text = room.read_text(encoding="utf-8")
            assert not [name for name in ("codec_bos_id", "codec_think", "tts_pad_token", "tts_bos") if name in text]


def test_settings_import_nothing_heavy() -> None:
    """So a mistake in .env is reported at once."""
    code = "import finetuning.settings, sys; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
