"""Training of the toy codec, in three phases that go on where they were interrupted.

    python -m embedded.codec --scale small --folder WORK

1. The encoder alone, on continuous latents: heads predict from them what is said (the clip's neutral twin) and how it
   sounds (the clip).
2. Codes: codebooks from k-means, then by moving averages, gradients straight through. The codes are final when this
   phase ends: the stages behind may start.
3. The decoder alone, from the codes of all clips.

So the costly half, the decoder, is never trained on codes that still change. WORK/codec/codec is the export of the last
save; WORK/codec/state.safetensors goes on.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from embedded.clips import ClipBank, read_clip, read_rows
from embedded.codec_losses import IntelligibilityLoss, LatentTargets, SpectralLoss
from embedded.codec_model import SAMPLES_PER_FRAME, TrainableCodec, build_codec
from embedded.measures import averages, compare
from embedded.stage import Work, load_state, main_of, optimizer_tensors, restore_optimizer, save_state
from finetuning.codec import Codec

#: Pieces a step, and the frames of each: of the encoder and of the decoder.
ENCODER_BATCH, ENCODER_FRAMES = 8, 24
DECODER_BATCH, DECODER_FRAMES = 6, 15
#: Frames at a piece's beginning that lack those before them, and are not judged.
CONTEXT_FRAMES = 2
PEAK_LEARNING_RATE = 1.2e-3
MOMENTUM = 0.998
#: Root mean square of a frame that is loud, mostly a voiced one; whole clips have 0.08.
LOUD_RMS = 0.05
SAVE_STEPS = 100
LOG_STEPS = 20
#: Pieces whose latents the codebooks are fitted to: batches of so many, of so many frames.
FITTED_PIECES, FITTED_FRAMES = 16, 60
#: Clips of each split that are measured: every n-th, so that all voices are among them.
NUM_MEASURED = 48


class CodecTraining:
    """Everything of the training that lasts from step to step."""

    def __init__(self, work: Work, bank: ClipBank) -> None:
        self.plan = work.plan("codec")
        self.steps = tuple(self.plan["codec_steps"])
        self.device, self.bank = work.device, bank
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.codec = TrainableCodec(build_codec()).to(self.device)
        self.loss, self.targets = SpectralLoss().to(self.device), LatentTargets().to(self.device)
        self.intelligibility = IntelligibilityLoss().to(self.device)
        decoder = list(self.codec.decoder_parameters())
        self.parameters = {1: self.codec.encoder_parameters(), 2: self.codec.encoder_parameters(), 3: decoder}
        self.optimizers = {1: _optimizer(self.parameters[1]), 3: _optimizer(decoder)}
        self.decode = torch.compile(self.codec.decode) if work.is_compiled else self.codec.decode
        self.codes: list[torch.Tensor] = []
        self.step, self.phase = 0, 1

    @property
    def num_steps(self) -> int:
        return sum(self.steps)

    def phase_at(self, step: int) -> int:
        """1, 2 or 3."""
        first, second, _ = self.steps
        return 1 if step < first else 2 if step < first + second else 3

    def learning_rate(self) -> float:
        """Of the encoder and of the decoder each: warm-up, a plateau, and a cosine to 3 %."""
        first, second, third = self.steps
        done, steps = (self.step, first + second) if self.phase < 3 else (self.step - first - second, third)
        fall = 0.5 * (1 + math.cos(math.pi * max(0.0, done / max(1, steps) - 0.25) / 0.75))
        return PEAK_LEARNING_RATE * min(1.0, (done + 1) / 100) * (0.97 * fall + 0.03)

    # ------------------------------------------------------------------------------------------------- one step

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the batch of this step; the parts of the loss."""
        if (phase := self.phase_at(self.step)) != self.phase:
            self._begin_phase(phase)
        torch.manual_seed(self.step)
        optimizer = self.optimizers[3 if self.phase == 3 else 1]
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate()
        parts = self._decoder_parts() if self.phase == 3 else self._encoder_parts()
        optimizer.zero_grad()
        sum(parts.values()).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters[self.phase], 3.0)
        optimizer.step()
        self.step += 1
        return {name: float(part.detach()) for name, part in parts.items()} | {"norm": float(norm)}

    def _encoder_parts(self) -> dict[str, torch.Tensor]:
        """How far the heads are off, and what keeps latents small or near their codewords."""
        codec, length = self.codec, ENCODER_FRAMES * SAMPLES_PER_FRAME
        pieces = self.bank.pieces_with_twins(self.step, ENCODER_BATCH, length)
        clips, twins, f0_hz = (part.to(self.device) for part in pieces)
        semantic, acoustic = codec.latents(clips)
        if self.phase == 2:
            semantic, lost_semantic = codec.semantic(semantic, MOMENTUM)
            acoustic, lost_acoustic = codec.acoustic(acoustic, MOMENTUM)
            price = 0.25 * (lost_semantic + lost_acoustic)
        else:
            price = 1e-3 * (semantic.pow(2).mean() + acoustic.pow(2).mean())
            semantic, acoustic = _noisy(semantic), _noisy(acoustic)
        with torch.no_grad():
            twin, (fine, harmonic) = self.targets.of_twin(twins), self.targets.of_clip(clips)
        both = torch.cat([semantic.detach(), acoustic], dim=-1)
        return {
            "twin": F.l1_loss(codec.twin_head(semantic), twin),
            "fine": 2 * F.l1_loss(codec.fine_head(both), fine),
            "harmonics": F.l1_loss(codec.harmonic_head(both), harmonic),
            "pitch": _pitch_loss(codec.pitch_head(both)[..., 0], f0_hz, clips),
            "price": price,
        }

    def _decoder_parts(self) -> dict[str, torch.Tensor]:
        """How far decoded pieces are from the true ones, without their first frames."""
        places = self.bank.places(self.step, DECODER_BATCH, DECODER_FRAMES, SAMPLES_PER_FRAME)
        true = torch.from_numpy(np.stack([self._samples(*place) for place in places])).to(self.device)
        codes = torch.stack([self.codes[clip][start : start + DECODER_FRAMES] for clip, start in places])
        made = self.decode(*self.codec.quantized(codes.to(self.device).long()))
        judged = slice(CONTEXT_FRAMES * SAMPLES_PER_FRAME, None)
        made, true = made[:, judged], true[:, judged]
        parts = self.loss(made, true)
        parts |= {name: 2 * parts[name] for name in ("mel", "harmonic")}
        return parts | {"words": 3 * self.intelligibility(made, true)}

    def _samples(self, clip: int, start: int) -> np.ndarray:
        first = start * SAMPLES_PER_FRAME
        samples = self.bank.clips[clip][first : first + DECODER_FRAMES * SAMPLES_PER_FRAME]
        return samples.astype(np.float32) / 32768

    # ------------------------------------------------------------------------------------------------ the phases

    def _begin_phase(self, phase: int) -> None:
        self.phase = phase
        if phase == 2:
            draw = torch.Generator().manual_seed(phase)
            semantic, acoustic = self._some_latents()
            left = self.codec.semantic.fit(semantic, 8, draw), self.codec.acoustic.fit(acoustic, 8, draw)
            print(f"codec: variance that the codes miss: {left[0]:.3f} {left[1]:.4f}", flush=True)
        if phase == 3:
            self.codes = self._all_codes()

    @torch.no_grad()
    def _some_latents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, CODE_WIDTH) of both branches over pieces of all clips, at most 38,400 frames."""
        length, found = FITTED_FRAMES * SAMPLES_PER_FRAME, []
        for number in range(min(40, 1 + len(self.bank.clips) // 8)):
            pieces, _, _ = self.bank.pieces_with_twins(10**9 + number, FITTED_PIECES, length)
            found.append([part.reshape(-1, part.shape[-1]) for part in self.codec.latents(pieces.to(self.device))])
        semantic, acoustic = (torch.cat(branch) for branch in zip(*found, strict=True))
        return semantic, acoustic

    @torch.no_grad()
    def _all_codes(self) -> list[torch.Tensor]:
        """(frames, NUM_LEVELS) int16 of every clip."""
        found = []
        for clip in self.bank.clips:
            whole = clip[: len(clip) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME].astype(np.float32) / 32768
            found.append(self.codec.codes(torch.from_numpy(whole)[None].to(self.device))[0].short().cpu())
        return found

    # -------------------------------------------------------------------------------------------------- its state

    def save(self, path: Path) -> None:
        """Everything that going on needs."""
        tensors = {f"codec.{name}": value for name, value in self.codec.state_dict().items()}
        for number, optimizer in self.optimizers.items():
            tensors |= optimizer_tensors(optimizer, f"optimizer_{number}")
        if self.codes:
            tensors |= {"codes": torch.cat(self.codes), "num_frames": torch.tensor([len(one) for one in self.codes])}
        save_state(path, tensors, {"step": self.step, "phase": self.phase, "plan": self.plan})

    def restore(self, path: Path) -> bool:
        """Goes on from a saved state; False where there is none, or one of another plan."""
        found = load_state(path)
        if found is None or found[1].get("plan") != self.plan:
            return False
        tensors, info = found
        self.codec.load_state_dict(_below(tensors, "codec"))
        for number, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, f"optimizer_{number}", tensors)
        if "codes" in tensors:
            self.codes = list(tensors["codes"].split(tensors["num_frames"].tolist()))
        self.step, self.phase = info["step"], info["phase"]
        return True


def _optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, PEAK_LEARNING_RATE, betas=(0.8, 0.99), weight_decay=1e-3)


def _pitch_loss(predicted: torch.Tensor, f0_hz: torch.Tensor, clips: torch.Tensor) -> torch.Tensor:
    """Mean error in octaves over the loud frames, (batch, frames) of a voice that never changes its pitch."""
    loudness = clips.view(*predicted.shape, SAMPLES_PER_FRAME).pow(2).mean(-1).sqrt()
    error = (predicted - torch.log2(f0_hz / 150)[:, None]).abs()
    return (error * (loudness > LOUD_RMS)).sum() / (loudness > LOUD_RMS).sum().clamp(min=1)


def _noisy(latents: torch.Tensor) -> torch.Tensor:
    """As if quantized a little."""
    return latents + torch.randn_like(latents) * latents.detach().std() * 0.05


def _below(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


# ----------------------------------------------------------------------------------------------------- the stage


def make_codec(work: Work) -> dict[str, Any]:
    """Trains to the end, exports, measures; the stage's figures."""
    torch.set_num_threads(work.num_threads)
    folder = work.folder / "codec"
    training = CodecTraining(work, ClipBank(read_rows(work.folder / "speech", "train"), with_twins=True))
    if training.restore(folder / "state.safetensors"):
        print(f"codec: goes on at step {training.step} of {training.num_steps}")
    start, since = time.monotonic(), []
    while training.step < training.num_steps:
        since.append(training.train_step())
        if training.step % LOG_STEPS == 0:
            means = {name: round(float(np.mean([one[name] for one in since if name in one])), 3) for name in since[-1]}
            seconds = round(time.monotonic() - start)
            print(f"codec: step {training.step} phase {training.phase} {seconds} s {means}", flush=True)
            since = []
        if training.step % SAVE_STEPS == 0 or training.step == training.num_steps:
            training.save(folder / "state.safetensors")
            training.codec.export(folder / "codec")
    return measure_codec(folder / "codec", work.folder / "speech", NUM_MEASURED)


def measure_codec(codec_folder: Path, speech_folder: Path, num_clips: int) -> dict[str, Any]:
    """Figures of encoding and decoding with stock qwen-tts, for held-out sentences of the training voices and for
    voices that were never heard."""
    codec = Codec(codec_folder)
    figures: dict[str, Any] = {}
    for split in ("held_out_sentences", "held_out_voices"):
        rows = read_rows(speech_folder, split)
        rows = rows[:: max(1, len(rows) // num_clips)]
        clips = [read_clip(row["audio"]) for row in rows]
        each = [compare(clip, codec.decode(codec.encode([clip]))[0]) for clip in clips]
        figures |= {f"{split}_{name}": value for name, value in averages(each).items()}
    return figures


if __name__ == "__main__":
    main_of("codec", make_codec, __doc__)
