"""Clips to codes: the plain loop against ours, on the same clips and codec, alternately in one process.

    python benchmarks/encode.py --codec tiny --clips 96            # the script itself, on CPU, about a minute
    python benchmarks/encode.py --codec real --clips 64            # true size, random weights; minutes on two cores
    python benchmarks/encode.py --codec real --clips 2000 --device cuda --workers 8

The plain loop is the official script's: 32 files in file order to the tokenizer's ``encode``, which reads, resamples
and pads them to the longest. Ours is ``ClipEncoder``: clips are decoded in ``--workers`` processes while the codec
works, grouped by length inside chunks of 256, and measured for the quality report, which the plain loop does not do.

Clips are made of the demo's speech: 2-15 s, wav, flac, ogg and mp3 of 16, 22.05, 44.1 and 48 kHz, mono and stereo.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from finetuning.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, load_audio
from finetuning.codec import Codec
from finetuning.encoding import CHUNK_ROWS, ClipEncoder, plan_batches
from finetuning.processes import get_num_workers_for_dataloader
from finetuning.stock import import_qwen_tts
from finetuning.tiny_model import embedded_model_folder

PLAIN_BATCH = 32
CLIP_SECONDS = (2.0, 15.0)
FORMATS = (("wav", 16_000, 1), ("flac", 44_100, 1), ("ogg", 48_000, 2), ("mp3", 22_050, 1), ("flac", 48_000, 2))
VOICE = Path(__file__).parent.parent / "voices" / "english_voice"
CONFIGS = Path(__file__).parent / "configs" / "speech_tokenizer"


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(Path(folder) / "clips", arguments.clips)
        codec_folder = find_codec(arguments.codec, Path(folder) / "codec")
        compare(clips, codec_folder, arguments)


def compare(clips: list[Path], codec_folder: Path, arguments: argparse.Namespace) -> None:
    import torch

    workers = get_num_workers_for_dataloader() if arguments.workers is None else arguments.workers
    seconds = [len(load_audio(clip)) / SAMPLE_RATE_HZ for clip in clips]
    plain_codec, encoder = Codec(codec_folder, arguments.device), ClipEncoder(codec_folder, arguments.device, workers)
    runs = {"plain loop": lambda: plain_loop(clips, plain_codec), "ours": lambda: ours(clips, encoder)}
    print(
        f"{len(clips)} clips, {sum(seconds) / 60:.1f} minutes; codec {arguments.codec} on {arguments.device}, ", end=""
    )
    print(f"{torch.get_num_threads()} threads, {workers} decoding workers; {arguments.rounds} rounds after one untimed")
    codes = {name: run() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    batches = [list(range(at, min(at + PLAIN_BATCH, len(clips)))) for at in range(0, len(clips), PLAIN_BATCH)]
    padding = {"plain loop": padding_share(seconds, batches), "ours": padding_share(seconds, our_batches(seconds))}
    for name, measured in times.items():
        wall = statistics.median(measured)
        rate = f"{len(clips) / wall:.1f} clips/s, {sum(seconds) / wall:.1f} s of audio a second"
        print(f"{name:<11} {wall:7.2f} s   {rate}, {padding[name]:.0%} padding")
    ratios = [plain / mine for plain, mine in zip(times["plain loop"], times["ours"], strict=True)]
    print(f"ours is {statistics.median(ratios):.2f} times as fast (rounds: {', '.join(f'{r:.2f}' for r in ratios)})")
    different = sum(not np.array_equal(*pair) for pair in zip(codes["plain loop"], codes["ours"], strict=True))
    print(f"{different} clips have other codes in the plain loop: there they depend on the neighbours in the batch")


def plain_loop(clips: list[Path], codec: Codec) -> list[np.ndarray]:
    """32 files in file order, decode then encode."""
    codes = []
    for at in range(0, len(clips), PLAIN_BATCH):
        paths = [str(clip) for clip in clips[at : at + PLAIN_BATCH]]
        codes += [clip.cpu().numpy() for clip in codec._tokenizer.encode(paths).audio_codes]
    return codes


def ours(clips: list[Path], encoder: ClipEncoder) -> list[np.ndarray]:
    chunks = ((at, clips[at : at + CHUNK_ROWS]) for at in range(0, len(clips), CHUNK_ROWS))
    return [clip.codes for _, encoded in encoder.encode(chunks) for clip in encoded]


def our_batches(seconds: list[float]) -> Iterator[list[int]]:
    for at in range(0, len(seconds), CHUNK_ROWS):
        for batch in plan_batches(seconds[at : at + CHUNK_ROWS], PLAIN_BATCH):
            yield [at + position for position in batch]


def padding_share(seconds: list[float], batches: Any) -> float:
    """Share of the samples that go through the codec and are no audio."""
    frames = [-(-round(length * SAMPLE_RATE_HZ) // SAMPLES_PER_FRAME) for length in seconds]
    padded = sum(len(batch) * max(frames[index] for index in batch) for batch in batches)
    return 1 - sum(seconds) * SAMPLE_RATE_HZ / SAMPLES_PER_FRAME / padded


def make_clips(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Files of random lengths, formats and rates, cut from the demo's clips in a row."""
    import soundfile
    import soxr

    folder.mkdir(parents=True)
    speech = np.concatenate([load_audio(file) for file in sorted(VOICE.rglob("*.flac"))])
    generator = np.random.default_rng(seed)
    clips = []
    for number in range(count):
        suffix, rate, channels = FORMATS[number % len(FORMATS)]
        length = round(generator.uniform(*CLIP_SECONDS) * SAMPLE_RATE_HZ)
        start = generator.integers(0, len(speech) - length)
        samples = soxr.resample(speech[start : start + length], SAMPLE_RATE_HZ, rate)
        clips.append(folder / f"{number:06d}.{suffix}")
        soundfile.write(clips[-1], np.stack([samples] * channels, axis=1), rate)
    return clips


def find_codec(name: str, folder: Path) -> Path:
    """The embedded model's codec, the release's configuration with random weights, or a folder."""
    if name == "tiny":
        return embedded_model_folder("tiny-random") / "speech_tokenizer"
    if name != "real":
        return Path(name)
    import torch

    import_qwen_tts()
    from qwen_tts.core import Qwen3TTSTokenizerV2Config, Qwen3TTSTokenizerV2Model

    torch.manual_seed(0)
    model = Qwen3TTSTokenizerV2Model(Qwen3TTSTokenizerV2Config.from_pretrained(CONFIGS))
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):  # codebooks; zeros would make every distance a tie
            buffer.normal_()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes((CONFIGS / "preprocessor_config.json").read_bytes())
    (folder / "config.json").write_bytes((CONFIGS / "config.json").read_bytes())
    return folder


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="tiny", help="tiny, real (random weights), or a speech_tokenizer folder")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, help="default two a GPU, none without one")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
