"""Training of the speaker encoder: the package's own class, taught to tell the training voices apart.

    python -m embedded.encoder --scale small --folder WORK

A voice is what the plan says: a variant of espeak-ng at one pitch and one rate. Each training voice is heard at three
speeds, which count as three voices, since speed moves pitch and formants: so there are three times as many to tell
apart, and the vector learns what differs between voices in general. The loss is AAM-softmax: the angle to a clip's own
voice must be smaller than that to any other by a margin.

Then the encoder hears clips that went through the codec as well, and learns to give them the vectors of the clips
themselves: all that a talker says has gone through the codec, and an encoder that had never heard it found all of it
alike.

WORK/encoder/encoder.safetensors is the result (fp32); WORK/encoder/state.safetensors goes on.
"""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from embedded.base_config import encoder_settings
from embedded.clips import read_clip, read_rows
from embedded.measures import equal_error_rate
from embedded.stage import Work, load_state, main_of, optimizer_tensors, restore_optimizer, save_state
from finetuning.audio import resample
from finetuning.codec import Codec
from finetuning.stock import import_qwen_tts
from finetuning.voice import voice_mels, voice_vector

SPEEDS = (1.0, 0.87, 1.15)
#: Every n-th training clip, so that some this many are heard: more say nothing new, and each takes 50 KB of mels.
MAX_CLIPS = 1800
BATCH_SIZE = 32
#: Mel steps of a piece (93.75 a second).
PIECE_STEPS = (90, 180)
PEAK_LEARNING_RATE = 2e-3
MARGIN, SCALE = 0.2, 20.0
#: Root mean square of the exported vectors: about that of the talker's embeddings beside them.
VECTOR_RMS = 0.5
SAVE_STEPS = LOG_STEPS = 50
#: Of learning to hear through the codec: clips, at most, and steps, as a share of those before.
MAX_CODED_CLIPS, CODED_SHARE = 600, 0.6
CODED_LEARNING_RATE = 5e-4


def build_encoder(seed: int = 0) -> nn.Module:
    """``Qwen3TTSSpeakerEncoder`` with random weights."""
    import_qwen_tts()
    from qwen_tts.core.models.configuration_qwen3_tts import Qwen3TTSSpeakerEncoderConfig
    from qwen_tts.core.models.modeling_qwen3_tts import Qwen3TTSSpeakerEncoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3TTSSpeakerEncoder(Qwen3TTSSpeakerEncoderConfig(**encoder_settings()))


class EncoderTraining:
    """The encoder, one direction per voice, and the mels of every clip.

    Args:
        rows: training rows; every speaker at every speed is a voice of its own.
        plan: of the stage; a state of another one is not taken.
    """

    def __init__(self, rows: list[dict[str, Any]], plan: dict[str, Any], device: str) -> None:
        voices = [(name, speed) for speed in SPEEDS for name in sorted({row["speaker"] for row in rows})]
        index = {voice: number for number, voice in enumerate(voices)}
        self.device, self.plan, self.num_steps, self.step = device, plan, plan["encoder_steps"], 0
        self.mels: list[torch.Tensor] = []
        self.labels: list[int] = []
        for row, speed in itertools.product(rows, SPEEDS):
            self.mels.append(voice_mels(at_speed(read_clip(row["audio"]), speed))[0].half())
            self.labels.append(index[row["speaker"], speed])
        self.encoder = build_encoder().to(device)
        draw = torch.Generator().manual_seed(0)
        directions = torch.randn(len(voices), encoder_settings()["enc_dim"], generator=draw)
        self.directions = nn.Parameter(directions.to(device))
        self.optimizer = torch.optim.AdamW([*self.encoder.parameters(), self.directions], PEAK_LEARNING_RATE)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(BATCH_SIZE, steps, 128) mels and their voices, drawn by step."""
        draw = np.random.default_rng([2, self.step])
        length = int(draw.integers(*PIECE_STEPS))
        chosen = draw.choice(len(self.mels), BATCH_SIZE)
        pieces = [_piece(self.mels[number], length, draw) for number in chosen]
        labels = torch.tensor([self.labels[number] for number in chosen])
        return torch.stack(pieces).to(self.device), labels.to(self.device)

    def train_step(self) -> dict[str, float]:
        """One optimizer step; the loss, and the share of clips whose own voice is the nearest."""
        share = self.step / max(1, self.num_steps)
        for group in self.optimizer.param_groups:
            rise = min(1.0, (self.step + 1) / 50)
            group["lr"] = PEAK_LEARNING_RATE * rise * (0.5 * (1 + math.cos(math.pi * share)) * 0.98 + 0.02)
        mels, labels = self.batch()
        cosines = F.normalize(self.encoder(mels)) @ F.normalize(self.directions).t()
        loss = F.cross_entropy(with_margin(cosines, labels), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return {"loss": float(loss.detach()), "right": float((cosines.argmax(1) == labels).float().mean())}

    def save(self, path: Path) -> None:
        """Everything that going on needs."""
        tensors = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        tensors |= {"directions": self.directions, **optimizer_tensors(self.optimizer, "optimizer")}
        save_state(path, tensors, {"step": self.step, "plan": self.plan})

    def restore(self, path: Path) -> bool:
        """Goes on from a saved state; False where there is none, or one of another plan."""
        found = load_state(path)
        if found is None or found[1].get("plan") != self.plan:
            return False
        tensors, info = found
        weights = {key.removeprefix("encoder."): value for key, value in tensors.items() if key.startswith("encoder.")}
        self.encoder.load_state_dict(weights)
        self.directions.data.copy_(tensors["directions"])
        restore_optimizer(self.optimizer, "optimizer", tensors)
        self.step = info["step"]
        return True


def with_margin(cosines: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """AAM-softmax's logits: cos(angle + MARGIN) for the right voice, cos(angle) for the others, times SCALE."""
    right = cosines.gather(1, labels[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
    return SCALE * cosines.scatter(1, labels[:, None], torch.cos(torch.acos(right) + MARGIN))


def at_speed(waveform: np.ndarray, speed: float) -> np.ndarray:
    """Played faster (above 1) or slower: pitch, formants and rate move together."""
    return waveform if speed == 1 else resample(waveform, 24_000, round(24_000 / speed))


def _piece(mels: torch.Tensor, length: int, draw: np.random.Generator) -> torch.Tensor:
    """(length, 128) of (steps, 128), repeated where it is too short, at another loudness."""
    repeated = mels.repeat(-(-length // len(mels)), 1)
    start = int(draw.integers(0, len(repeated) - length + 1))
    return repeated[start : start + length].float() + float(draw.uniform(-0.6, 0.3))


# ------------------------------------------------------------------------------------------------ coded clips


def coded_clips(codec: Codec, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    """The rows' clips, encoded and decoded."""
    return [codec.decode(codec.encode([read_clip(row["audio"])]))[0] for row in rows]


def hear_through_codec(encoder: nn.Module, rows: list[dict[str, Any]], codec: Codec, num_steps: int) -> None:
    """Trains the encoder to give clips and coded clips the vectors that it gives clips now."""
    rows = rows[:: -(-len(rows) // MAX_CODED_CLIPS)]
    clips = [read_clip(row["audio"]) for row in rows]
    targets = torch.stack([voice_vector(encoder, clip) for clip in clips]).repeat(2, 1)
    mels = [voice_mels(clip)[0] for clip in [*clips, *coded_clips(codec, rows)]]
    optimizer = torch.optim.AdamW(encoder.parameters(), CODED_LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, CODED_LEARNING_RATE / 50)
    encoder.train()
    for step in range(num_steps):
        draw = np.random.default_rng([3, step])
        length = int(draw.integers(*PIECE_STEPS))
        chosen = draw.choice(len(mels), BATCH_SIZE)
        vectors = encoder(torch.stack([_piece(mels[number], length, draw) for number in chosen]))
        wanted = targets[torch.from_numpy(chosen)]
        loss = F.mse_loss(vectors, wanted) / VECTOR_RMS**2 + (1 - F.cosine_similarity(vectors, wanted)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % LOG_STEPS == 0:
            print(f"encoder: through the codec, step {step + 1}, loss {float(loss.detach()):.3f}", flush=True)
    encoder.eval()


# ----------------------------------------------------------------------------------------------------- the stage


def make_encoder(work: Work) -> dict[str, Any]:
    """Trains to the end, writes the encoder, measures; the stage's figures."""
    torch.set_num_threads(work.num_threads)
    folder, rows = work.folder / "encoder", read_rows(work.folder / "speech", "train")
    rows = rows[:: -(-len(rows) // MAX_CLIPS)]
    training = EncoderTraining(rows, work.plan("encoder"), work.device)
    if training.restore(folder / "state.safetensors"):
        print(f"encoder: goes on at step {training.step} of {training.num_steps}")
    since = []
    while training.step < training.num_steps:
        since.append(training.train_step())
        if training.step % LOG_STEPS == 0:
            means = {name: round(float(np.mean([one[name] for one in since])), 3) for name in since[0]}
            print(f"encoder: step {training.step} {means}", flush=True)
            since = []
        if training.step % SAVE_STEPS == 0 or training.step == training.num_steps:
            training.save(folder / "state.safetensors")
    encoder = training.encoder.eval().cpu()
    _scale_vectors(encoder, rows)
    codec = Codec(work.folder / "codec" / "codec")
    hear_through_codec(encoder, rows, codec, round(CODED_SHARE * training.num_steps))
    _write(encoder, folder / "encoder.safetensors")
    return measure_encoder(encoder, work.folder / "speech", codec)


@torch.no_grad()
def _scale_vectors(encoder: nn.Module, rows: list[dict[str, Any]]) -> None:
    """Multiplies the last layer so that vectors have VECTOR_RMS; angles stay."""
    vectors = torch.stack([voice_vector(encoder, read_clip(row["audio"])) for row in rows[:: 1 + len(rows) // 100]])
    factor = VECTOR_RMS / float(vectors.pow(2).mean().sqrt())
    for parameter in encoder.fc.parameters():
        parameter.mul_(factor)


def _write(encoder: nn.Module, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    save_file({name: value.contiguous() for name, value in encoder.state_dict().items()}, unfinished)
    os.replace(unfinished, path)


def load_encoder(path: Path) -> nn.Module:
    """The encoder that ``make_encoder`` wrote."""
    encoder = build_encoder()
    encoder.load_state_dict(load_file(path))
    return encoder.eval()


def measure_encoder(encoder: nn.Module, speech_folder: Path, codec: Codec) -> dict[str, Any]:
    """Equal-error rate over all pairs of clips, for voices that were never heard and for held-out sentences of the
    training voices; and of pairs of a clip and a coded one, for voices that were never heard."""
    figures: dict[str, Any] = {}
    vectors, names = {}, {}
    for split in ("held_out_voices", "held_out_sentences"):
        rows = read_rows(speech_folder, split)
        names[split] = [row["speaker"] for row in rows]
        vectors[split] = _unit_vectors(encoder, [read_clip(row["audio"]) for row in rows])
        figures |= _errors(split, *pairs(vectors[split], vectors[split], names[split]))
    split = "held_out_voices"
    coded = _unit_vectors(encoder, coded_clips(codec, read_rows(speech_folder, split)))
    return figures | _errors("coded", *pairs(vectors[split], coded, names[split]))


def _unit_vectors(encoder: nn.Module, clips: list[np.ndarray]) -> np.ndarray:
    return F.normalize(torch.stack([voice_vector(encoder, clip) for clip in clips])).numpy()


def _errors(name: str, same: np.ndarray, different: np.ndarray) -> dict[str, Any]:
    return {
        f"{name}_equal_error_rate": round(equal_error_rate(same, different), 4),
        f"{name}_pairs": f"{len(same)} of one voice, {len(different)} of two",
        f"{name}_similarity": f"{same.mean():.2f} of one voice, {different.mean():.2f} of two",
    }


def pairs(vectors: np.ndarray, others: np.ndarray, voices: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of all pairs of a clip and another one, (N, width) unit vectors each: of one voice, and of two."""
    similarities, names = vectors @ others.T, np.array(voices)
    one, other = np.triu_indices(len(names), 1)
    is_same = names[one] == names[other]
    return similarities[one, other][is_same], similarities[one, other][~is_same]


if __name__ == "__main__":
    main_of("encoder", make_encoder, __doc__)
