"""The demo's figures: the base learns a voice that it never heard, and says sentences that are in no training set.

    python -m embedded.demo --scale small --folder WORK

train.py fine-tunes WORK/base on the demo's clips (WORK/demo/output). Then stock qwen-tts says the held-out sentences
three ways, into WORK/demo/spoken: truth (espeak-ng), before (the base clones from one clip), after (the checkpoint). A
fourth, codec, is the truth encoded and decoded: no talker can do better than that.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import soundfile
import torch

from embedded.clips import read_clip, read_rows
from embedded.encoder import load_encoder
from embedded.measures import averages, log_mel, pitch
from embedded.recognise import sentence_picker
from embedded.stage import Work, main_of
from embedded.talker import run_training, shared_settings
from finetuning.audio import SAMPLE_RATE_HZ
from finetuning.codec import Codec
from finetuning.disk import checksum, read_json, write_json
from finetuning.listening import cosine
from finetuning.stock import import_qwen_tts
from finetuning.voice import voice_vector

#: 12 s; held-out sentences last 2 to 5.
MAX_FRAMES = 150
SPEAKER = "demo"
#: Steps of a coarse log-mel that are aligned in time.
_ALIGNED_STRIDE = 3

Speak = Callable[[dict[str, Any]], np.ndarray]


def demo_settings(work: Work) -> dict[str, object]:
    """Name -> value of the settings of the demo's fine-tuning."""
    speech, epochs = work.folder / "speech", 1 if work.scale_name == "smoke" else 15
    return shared_settings(work) | {
        "INIT_MODEL_PATH": work.folder / "base",
        "OUTPUT_DIR": work.folder / "demo" / "output",
        "TRAIN_JSONL": speech / "demo_train.jsonl",
        "OVERWRITE_OUTPUT": "true",  # of a run that began from another base
        "SPEAKER_NAME": SPEAKER,
        "BATCH_SIZE": 4,
        "LEARNING_RATE": 5e-4,
        "NUM_EPOCHS": epochs,
        "WARMUP_STEPS": 20,
        "LOGGING_STEPS": 20,
        "SAVE_STEPS": 100_000,
    }


def make_demo(work: Work) -> dict[str, Any]:
    """Fine-tunes, speaks, measures; the stage's figures."""
    run_training(demo_settings(work), work.folder / "demo" / "settings.env", work.num_threads)
    torch.set_num_threads(work.num_threads)
    rows, folder = read_rows(work.folder / "speech", "demo_test"), work.folder / "demo" / "spoken"
    _forget_other_speech(folder, [work.folder / "base", work.folder / "demo" / "output" / "best"])
    ways = {
        "codec": coder(work.folder / "base" / "speech_tokenizer"),
        "before": cloner(work.folder / "base", rows[0]["ref_audio"]),
        "after": speaker(work.folder / "demo" / "output" / "best"),
    }
    encoder = load_encoder(work.folder / "encoder" / "encoder.safetensors")
    figures: dict[str, Any] = {}
    for way, speak in ways.items():
        spoken = [_speak_once(folder, way, number, row, speak) for number, row in enumerate(rows)]
        figures |= {f"{way}_{name}": value for name, value in measure_speech(rows, spoken, encoder).items()}
    return figures


def coder(folder: Path) -> Speak:
    """Gives a row's own clip, encoded and decoded."""
    codec = Codec(folder)
    return lambda row: codec.decode(codec.encode([read_clip(row["audio"])]))[0]


def cloner(folder: Path, reference: str) -> Speak:
    """Says a row's text as stock's ``generate_voice_clone`` does with the vector of a reference alone."""
    model = import_qwen_tts().Qwen3TTSModel.from_pretrained(str(folder), dtype=torch.float32)
    options = {"x_vector_only_mode": True, "non_streaming_mode": True, "max_new_tokens": MAX_FRAMES}
    return lambda row: model.generate_voice_clone(row["text"], language="English", ref_audio=reference, **options)[0][0]


def speaker(folder: Path) -> Speak:
    """Says a row's text as stock's ``generate_custom_voice`` does."""
    model = import_qwen_tts().Qwen3TTSModel.from_pretrained(str(folder), dtype=torch.float32)
    options = {"speaker": SPEAKER, "language": "English", "max_new_tokens": MAX_FRAMES}
    return lambda row: model.generate_custom_voice(row["text"], **options)[0][0]


def _forget_other_speech(folder: Path, checkpoints: Sequence[Path]) -> None:
    """Removes what other checkpoints than these have spoken."""
    files = [file for checkpoint in checkpoints for file in sorted(checkpoint.rglob("*.safetensors"))]
    by = {"spoken_by": [checksum(file) for file in files]}
    if read_json(folder / "spoken_by.json") != by:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / "spoken_by.json", by)


def _speak_once(folder: Path, way: str, number: int, row: dict[str, Any], speak: Speak) -> np.ndarray:
    """Speaks and keeps the wav beside the true one; what was spoken before is read."""
    path = folder / f"{number:02d}_{way}.wav"
    if not path.is_file():
        torch.manual_seed(number)
        soundfile.write(folder / f"{number:02d}_truth.wav", read_clip(row["audio"]), SAMPLE_RATE_HZ)
        unfinished = path.with_suffix(".tmp")
        soundfile.write(unfinished, speak(row), SAMPLE_RATE_HZ, format="WAV", subtype="FLOAT")
        unfinished.replace(path)
    return read_clip(path)


# --------------------------------------------------------------------------------------------------- the figures


def measure_speech(rows: Sequence[dict[str, Any]], spoken: Sequence[np.ndarray], encoder: Any) -> dict[str, float]:
    """Means over all sentences against the truth.

    Returns:
        stopped: share that ended by itself; rate_ratio: median of true over spoken length; similarity: cosine of the
        speaker encoder's vectors; f0_error: of the median f0; formant_distance: of the mean log spectra, dB;
        aligned_log_mel_l1: after time alignment; aligned_right: share of sentences that are nearer to their own true
        clip than to that of any other sentence; picked: share of sentences that the recogniser picks, and of the true
        clips, which says how far it can be trusted (only where pocketsphinx is installed).
    """
    true = [read_clip(row["audio"]) for row in rows]
    each = [_compare_voices(one, other, encoder) for one, other in zip(true, spoken, strict=True)]
    limit = (MAX_FRAMES - 1) * 1920
    ratios = [len(one) / len(other) for one, other in zip(true, spoken, strict=True)]
    figures = averages(each) | {
        "stopped": _share([len(clip) < limit for clip in spoken]),
        "rate_ratio": round(float(np.median(ratios)), 3),
        "aligned_right": _share([nearest(clip, true) == number for number, clip in enumerate(spoken)]),
    }
    pick = sentence_picker([row["text"] for row in rows])
    if pick is None:
        return figures
    return figures | {
        "picked": _share([pick(clip) == number for number, clip in enumerate(spoken)]),
        "picked_of_truth": _share([pick(clip) == number for number, clip in enumerate(true)]),
    }


def _share(is_right: Sequence[bool]) -> float:
    return round(float(np.mean(is_right)), 3)


def _compare_voices(true: np.ndarray, other: np.ndarray, encoder: Any) -> dict[str, float]:
    f0_true, f0_other = (np.nanmedian(f0) if np.isfinite(f0).any() else np.nan for f0 in (pitch(true), pitch(other)))
    return {
        "similarity": cosine(voice_vector(encoder, true).numpy(), voice_vector(encoder, other).numpy()),
        "f0_error": float(abs(f0_other / f0_true - 1)),
        "formant_distance": float(np.abs(envelope_db(true) - envelope_db(other)).mean()),
        "aligned_log_mel_l1": aligned_distance(true, other),
    }


def envelope_db(waveform: np.ndarray) -> np.ndarray:
    """(80,) mean spectrum of the loud steps in dB, its own mean taken off: where the formants lie, on average."""
    mel = log_mel(waveform)
    loudness = mel.mean(0)
    mean = mel[:, loudness >= np.median(loudness)].mean(1) * (20 / np.log(10))
    return mean - mean.mean()


def nearest(waveform: np.ndarray, true: Sequence[np.ndarray]) -> int:
    """The number of the true clip that is nearest after time alignment: a recogniser that needs no package."""
    return int(np.argmin([aligned_distance(clip, waveform) for clip in true]))


def aligned_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean L1 of log-mels along the cheapest path (dynamic time warping)."""
    first, second = (log_mel(waveform)[:, ::_ALIGNED_STRIDE] for waveform in (one, other))
    costs = np.abs(first[:, :, None] - second[:, None, :]).mean(0)
    _, path = librosa.sequence.dtw(C=costs)
    return float(costs[path[:, 0], path[:, 1]].mean())


if __name__ == "__main__":
    main_of("demo", make_demo, __doc__)
