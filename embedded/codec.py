"""Training of the toy codec, in three phases that go on where they were interrupted.

    python -m embedded.codec --scale small --folder WORK

1. Continuous latents: encoder and decoder learn together, quantizing left out.
2. Codes: codebooks from k-means, then by moving averages, gradients straight through.
3. The decoder alone on codes that no longer change: k-means once more, and in its last quarter a small discriminator,
   which makes voiced speech sound voiced. The codes are final when this phase begins: the stages behind may start.

WORK/codec/codec is the export of the last save; WORK/codec/state.safetensors goes on.
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
from embedded.codec_losses import Discriminators, LatentTargets, SpectralLoss
from embedded.codec_model import SAMPLES_PER_FRAME, TrainableCodec, build_codec
from embedded.measures import averages, compare
from embedded.stage import Work, load_state, main_of, optimizer_tensors, restore_optimizer, save_state
from finetuning.codec import Codec

BATCH_SIZE = 6
FRAMES_PER_PIECE = 15
PEAK_LEARNING_RATE = 1.2e-3
#: Of a training that starts from an exported codec, which a higher one would spoil: log-mel L1 rose from 0.47 to 0.55
#: in 100 steps, and stayed at 0.46 with this one.
PEAK_LEARNING_RATE_AFTER_START = 3e-4
MOMENTUM = 0.998
SAVE_STEPS = 50
LOG_STEPS = 10
#: From this share of phase 3 on the discriminator takes part.
DISCRIMINATOR_FROM = 0.75
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
            self.judges = Discriminators().to(self.device)
        self.loss, self.targets = SpectralLoss().to(self.device), LatentTargets().to(self.device)
        self.parameters = self.codec.parameters_that_train()
        self.optimizer = torch.optim.AdamW(self.parameters, PEAK_LEARNING_RATE, betas=(0.8, 0.99), weight_decay=1e-3)
        self.judges_optimizer = torch.optim.AdamW(self.judges.parameters(), 4e-4, betas=(0.8, 0.99))
        self.step, self.phase, self.peak_rate = 0, 1, PEAK_LEARNING_RATE

    @property
    def num_steps(self) -> int:
        return sum(self.steps)

    def phase_at(self, step: int) -> int:
        """1, 2 or 3."""
        first, second, _ = self.steps
        return 1 if step < first else 2 if step < first + second else 3

    def learning_rate(self) -> float:
        """Warm-up, a plateau, and a cosine to 3 %."""
        share = self.step / max(1, self.num_steps)
        fall = 0.5 * (1 + math.cos(math.pi * max(0.0, share - 0.25) / 0.75))
        return self.peak_rate * min(1.0, (self.step + 1) / 100) * (0.97 * fall + 0.03)

    def judges_take_part(self) -> bool:
        first, second, third = self.steps
        return self.step >= first + second + DISCRIMINATOR_FROM * third

    # ------------------------------------------------------------------------------------------------- one step

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the batch of this step; the parts of the loss."""
        if (phase := self.phase_at(self.step)) != self.phase:
            self._begin_phase(phase)
        torch.manual_seed(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        pieces = self.bank.pieces(self.step, BATCH_SIZE, FRAMES_PER_PIECE * SAMPLES_PER_FRAME).to(self.device)
        made, extra = self._through(pieces)
        parts = self.loss(made, pieces)
        total = 2 * parts["mel"] + parts["linear"] + parts["relative"] + 2 * parts["harmonic"] + extra
        if self.judges_take_part():
            total = total + self._judge(made, pieces)
        self.optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 3.0)
        self.optimizer.step()
        self.step += 1
        figures = {name: float(part.detach()) for name, part in parts.items()}
        return figures | {"extra": float(extra.detach()), "norm": float(norm)}

    def _through(self, pieces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pieces there and back as the phase wants it, and what it asks of the latents."""
        codec = self.codec
        if self.phase == 3:
            with torch.no_grad():
                semantic, acoustic = codec.latents(pieces)
                semantic, acoustic = codec.semantic(semantic, 0.0)[0], codec.acoustic(acoustic, 0.0)[0]
            return codec.decode(semantic, acoustic), pieces.new_zeros(())
        semantic, acoustic = codec.latents(pieces)
        if self.phase == 2:
            semantic, lost_semantic = codec.semantic(semantic, MOMENTUM)
            acoustic, lost_acoustic = codec.acoustic(acoustic, MOMENTUM)
            made, price = codec.decode(semantic, acoustic), 0.25 * (lost_semantic + lost_acoustic)
        else:
            made = codec.decode(_noisy(semantic), _noisy(acoustic))
            price = 1e-3 * (semantic.pow(2).mean() + acoustic.pow(2).mean())
        return made, price + 0.5 * self._heads_loss(pieces, semantic, acoustic)

    def _heads_loss(self, pieces: torch.Tensor, semantic: torch.Tensor, acoustic: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            targets = self.targets(pieces)
        loss = F.l1_loss(self.codec.coarse_head(semantic), targets["coarse"])
        loss = loss + 2 * F.l1_loss(self.codec.fine_head(acoustic), targets["fine"])
        return loss + 2 * F.l1_loss(self.codec.harmonic_head(acoustic), targets["harmonic"])

    def _judge(self, made: torch.Tensor, pieces: torch.Tensor) -> torch.Tensor:
        """Trains the discriminators on a part of the batch; what they tell the decoder."""
        made, pieces = made[:, -SAMPLES_PER_FRAME * 6 :], pieces[:, -SAMPLES_PER_FRAME * 6 :]
        loss = self.judges.own_loss(made, pieces)
        self.judges_optimizer.zero_grad()
        loss.backward()
        self.judges_optimizer.step()
        return self.judges.decoder_loss(made, pieces)

    # ------------------------------------------------------------------------------------------------ the phases

    def _begin_phase(self, phase: int) -> None:
        draw = torch.Generator().manual_seed(phase)
        semantic, acoustic = self._all_latents()
        left = self.codec.semantic.fit(semantic, 8, draw), self.codec.acoustic.fit(acoustic, 8, draw)
        print(f"codec: phase {phase} at step {self.step}; variance that the codes miss: {left[0]:.3f} {left[1]:.4f}")
        self.phase = phase
        self._freeze_what_the_phase_leaves()

    def _freeze_what_the_phase_leaves(self) -> None:
        if self.phase == 3:
            for name, parameter in self.codec.named_parameters():
                parameter.requires_grad_(name.startswith("model.decoder"))

    @torch.no_grad()
    def _all_latents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, CODE_WIDTH) of both branches over pieces of all clips, at most 38,400 frames."""
        self.codec.eval()
        found = []
        for number in range(min(40, 1 + len(self.bank.clips) // 8)):
            pieces = self.bank.pieces(10**9 + number, FITTED_PIECES, FITTED_FRAMES * SAMPLES_PER_FRAME).to(self.device)
            found.append([branch.reshape(-1, branch.shape[-1]) for branch in self.codec.latents(pieces)])
        self.codec.train()
        semantic, acoustic = (torch.cat(branch) for branch in zip(*found, strict=True))
        return semantic, acoustic

    # -------------------------------------------------------------------------------------------------- its state

    def save(self, path: Path) -> None:
        """Everything that going on needs."""
        tensors = {f"codec.{name}": value for name, value in self.codec.state_dict().items()}
        tensors |= {f"judges.{name}": value for name, value in self.judges.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer, "optimizer")
        tensors |= optimizer_tensors(self.judges_optimizer, "judges_optimizer")
        info = {"step": self.step, "phase": self.phase, "peak_rate": self.peak_rate, "plan": self.plan}
        save_state(path, tensors, info)

    def restore(self, path: Path) -> bool:
        """Goes on from a saved state; False where there is none, or one of another plan."""
        found = load_state(path)
        if found is None or found[1].get("plan") != self.plan:
            return False
        tensors, info = found
        for name, module in (("codec", self.codec), ("judges", self.judges)):
            module.load_state_dict(_below(tensors, name))
        restore_optimizer(self.optimizer, "optimizer", tensors)
        restore_optimizer(self.judges_optimizer, "judges_optimizer", tensors)
        self.step, self.phase, self.peak_rate = info["step"], info["phase"], info["peak_rate"]
        self._freeze_what_the_phase_leaves()
        return True

    def start_from(self, folder: Path) -> None:
        """Takes the weights of an exported codec of the same widths, all but its codebooks."""
        from qwen_tts.core import Qwen3TTSTokenizerV2Model

        model = Qwen3TTSTokenizerV2Model.from_pretrained(folder, dtype=torch.float32)
        self.codec.model.load_state_dict(model.state_dict())
        self.peak_rate = PEAK_LEARNING_RATE_AFTER_START


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
    training = CodecTraining(work, ClipBank(read_rows(work.folder / "speech", "train")))
    if training.restore(folder / "state.safetensors"):
        print(f"codec: goes on at step {training.step} of {training.num_steps}")
    elif work.start_codec:
        training.start_from(work.start_codec)
    start, since = time.monotonic(), []
    while training.step < training.num_steps:
        since.append(training.train_step())
        if training.step % LOG_STEPS == 0:
            means = {name: round(float(np.mean([one[name] for one in since])), 3) for name in since[0]}
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
