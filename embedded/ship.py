"""Puts what the recipe made into the project: the base as INIT_MODEL_PATH=tiny, and the demo's clips.

    python -m embedded.ship --scale small --folder WORK

Replaces finetuning/tiny_base/ (of WORK/base) and voices/demo_voice/ (of WORK/speech). Each appears whole or not at all;
both are then to be committed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from embedded.clips import read_rows
from embedded.stage import Work, parse
from embedded.talker import PROJECT
from finetuning.disk import bytes_of, check_is_whole, new_folder
from finetuning.errors import UserError, run_main
from finetuning.tiny_model import SPEAKING_BASE

VOICE_FOLDER = PROJECT / "voices" / "demo_voice"
NUM_TEST_CLIPS = 10
MAX_VOICE_BYTES = 6_000_000


def ship(work: Work) -> None:
    """Copies both; says how large they are.

    Raises:
        UserError: a stage is missing or damaged, or the clips are too large.
    """
    check_is_whole(work.folder / "base", "--folder")
    parts = {"train": read_rows(work.folder / "speech", "demo_train")}
    parts["test"] = read_rows(work.folder / "speech", "demo_test")[:NUM_TEST_CLIPS]
    with new_folder(VOICE_FOLDER) as folder:
        (folder / "clips").mkdir()
        for name, rows in parts.items():
            lines = [json.dumps(_shipped(row, folder, f"{name}-{number:02d}")) for number, row in enumerate(rows, 1)]
            (folder / f"{name}_raw.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if (size := bytes_of(folder)) > MAX_VOICE_BYTES:
            raise UserError(f"the demo's clips have {size:,} bytes, more than {MAX_VOICE_BYTES:,}; take fewer")
    with new_folder(SPEAKING_BASE) as folder:
        shutil.copytree(work.folder / "base", folder, dirs_exist_ok=True)
    print(f"{SPEAKING_BASE}: {bytes_of(SPEAKING_BASE) / 1e6:.1f} MB; {VOICE_FOLDER}: {size / 1e6:.1f} MB")


def _shipped(row: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """Copies a row's clip; the row as it is shipped."""
    shutil.copyfile(row["audio"], folder / "clips" / f"{name}.flac")
    return {"audio": f"clips/{name}.flac", "text": row["text"], "language": row["language"]}


if __name__ == "__main__":
    run_main(lambda: ship(parse(__doc__)))
