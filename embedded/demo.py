"""The demo's figures: the base learns a voice that it never heard, and says sentences that are in no training set.

    python -m embedded.demo --scale small --folder WORK

train.py fine-tunes WORK/base on the demo's clips (WORK/demo/output), and by COMPARE_JSONL says the held-out sentences
before and after, beside espeak-ng's own and those through the codec (WORK/demo/output/comparison). Here they are also
recognised: which of the sentences is it?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from embedded.clips import read_clip, read_rows
from embedded.recognise import sentence_picker
from embedded.stage import Work, main_of
from embedded.talker import run_training, shared_settings
from finetuning.closeness import aligned_distance
from finetuning.disk import read_json

SPEAKER = "demo"
WAYS = ("coded", "before", "after")


def demo_settings(work: Work) -> dict[str, object]:
    """Name -> value of the settings of the demo's fine-tuning; the same as in .env.demo."""
    speech, epochs = work.folder / "speech", 1 if work.scale_name == "smoke" else 8
    return shared_settings(work) | {
        "INIT_MODEL_PATH": work.folder / "base",
        "OUTPUT_DIR": work.folder / "demo" / "output",
        "TRAIN_JSONL": speech / "demo_train.jsonl",
        "COMPARE_JSONL": speech / "demo_test.jsonl",
        "OVERWRITE_OUTPUT": "true",  # of a run that began from another base
        "SPEAKER_NAME": SPEAKER,
        "BATCH_SIZE": 4,
        "LEARNING_RATE": 1e-4,
        "FREEZE_ORIGINAL_LAYERS": "true",  # the talker knows the words; the voice is in the sub-talker
        "NUM_EPOCHS": epochs,
        "WARMUP_STEPS": 20,
        "LOGGING_STEPS": 20,
        "SAVE_STEPS": 100_000,
        "BEST_METRIC": "sub_talker_accuracy",
    }


def make_demo(work: Work) -> dict[str, Any]:
    """Fine-tunes, speaks, measures; the stage's figures."""
    run_training(demo_settings(work), work.folder / "demo" / "settings.env", work.num_threads)
    rows, folder = read_rows(work.folder / "speech", "demo_test"), work.folder / "demo" / "output" / "comparison"
    compared = read_json(folder / "comparison.json")["figures"]
    figures = {f"{way}_{name}": round(value, 3) for way in WAYS for name, value in compared[way].items()}
    true = [read_clip(row["audio"]) for row in rows]
    for way in WAYS:
        spoken = [read_clip(folder / f"{number:02d}-{way}.wav") for number in range(1, len(rows) + 1)]
        figures |= {f"{way}_{name}": value for name, value in recognised(rows, true, spoken).items()}
    return figures


def recognised(
    rows: Sequence[dict[str, Any]], true: Sequence[np.ndarray], spoken: Sequence[np.ndarray]
) -> dict[str, float]:
    """How many of the sentences are taken for themselves.

    Returns:
        aligned_right: share of sentences that are nearer to their own true clip than to that of any other sentence;
        picked: share that the recogniser picks, and of the true clips, which says how far it can be trusted (only
        where pocketsphinx is installed).
    """
    figures = {"aligned_right": _share([nearest(clip, true) == number for number, clip in enumerate(spoken)])}
    pick = sentence_picker([row["text"] for row in rows])
    if pick is None:
        return figures
    return figures | {
        "picked": _share([pick(clip) == number for number, clip in enumerate(spoken)]),
        "picked_of_truth": _share([pick(clip) == number for number, clip in enumerate(true)]),
    }


def nearest(waveform: np.ndarray, true: Sequence[np.ndarray]) -> int:
    """The number of the true clip that is nearest after time alignment: a recogniser that needs no package."""
    return int(np.argmin([aligned_distance(clip, waveform) for clip in true]))


def _share(is_right: Sequence[bool]) -> float:
    return round(float(np.mean(is_right)), 3)


if __name__ == "__main__":
    main_of("demo", make_demo, __doc__)
