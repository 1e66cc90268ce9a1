"""What a mistake in the objective costs: the demo's clips trained with it, judged by stock generation.

    python benchmarks/mistakes.py                       # the right objective, each mistake alone, all of them; minutes
    python benchmarks/mistakes.py --epochs 5            # the script itself

Every line starts from the same weights and takes the same batches, optimizer and schedule, those of ``.env.overfit``.
What differs is how the loss is computed from the model's outputs. The mistakes are those of the official
``finetuning/sft_12hz.py`` (QwenLM/Qwen3-TTS, revision 022e286):

- labels shifted twice: they are aligned with the positions that predict them, and the model's own loss shifts them
  once more;
- sub-talker labels shifted: the same inside ``forward_sub_talker_finetune``;
- the frame's own hidden state: the sub-talker gets that of the frame that it predicts, which knows the frame's codes
  and which inference does not have, instead of the one before it;
- no text_projection: text embeddings go in as they are (cut to the talker's width where they are wider).

Checkpoints are written by the project's exporter and judged by ``finetuning/roundtrip.py``: the share of the training
codes that stock greedy generation gives back, and the share of the clips that stop at the right frame.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import get_scheduler

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.plain_loop import PlainLoop
from finetuning import building, claiming, starting
from finetuning.dataset import Batch
from finetuning.errors import run_main
from finetuning.prompt import IGNORE
from finetuning.roundtrip import judge
from finetuning.session import roundtrip_row
from finetuning.settings import Settings, load_settings

PROJECT = Path(__file__).parent.parent
LABELS = "labels shifted twice"
SUB_TALKER_LABELS = "sub-talker labels shifted"
OWN_FRAME = "the frame's own hidden state"
NO_PROJECTION = "no text_projection"
MISTAKES = (LABELS, SUB_TALKER_LABELS, OWN_FRAME, NO_PROJECTION)
#: Batches over which the first and the last loss are means.
LOSS_WINDOW = 6


class Line(NamedTuple):
    """What came out of one training."""

    first_loss: float
    last_loss: float
    reproduced: float
    right_length: float


class MistakenLoop(PlainLoop):
    """The plain loop with some of MISTAKES; without any it is right."""

    def __init__(self, model: Any, vectors: torch.Tensor, sub_talker_weight: float, mistakes: frozenset[str]) -> None:
        super().__init__(model, torch.empty(0), sub_talker_weight)
        self.mistakes = mistakes
        self.register_buffer("vector", vectors[:1])

    def forward(self, batch: Batch) -> torch.Tensor:
        talker, mistakes = self.model.talker, self.mistakes
        output = talker(
            inputs_embeds=self.input_embeddings(batch),
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
        )
        labels = F.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:] if LABELS in mistakes else batch["labels"]
        talker_loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        places = batch["frame_mask"] if OWN_FRAME in mistakes else batch["frame_mask"].roll(-1, dims=1)
        codes = batch["codes"]
        logits, stock_loss = talker.forward_sub_talker_finetune(codes, output.hidden_states[0][-1][places])
        right_loss = F.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten())
        sub_talker_loss = stock_loss if SUB_TALKER_LABELS in mistakes else right_loss
        return talker_loss + self.sub_talker_weight * sub_talker_loss

    def speaker(self, num_rows: int) -> torch.Tensor:
        return self.vector.expand(num_rows, -1)

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        if NO_PROJECTION not in self.mistakes:
            return super().text(ids)
        embedded = self.model.talker.model.text_embedding(ids)
        width = self.model.config.talker_config.hidden_size
        return F.pad(embedded, (0, max(0, width - embedded.shape[-1])))[..., :width]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="passes over the clips (default: those of the demo)")
    epochs = parser.parse_args().epochs
    torch.set_num_threads(1)
    variants = {"right": frozenset()} | {name: frozenset([name]) for name in MISTAKES}
    print(f"{'objective':<32}{'loss':>18}{'codes given back':>20}{'right length':>16}", flush=True)
    for name, mistakes in (variants | {"all four": frozenset(MISTAKES)}).items():
        with contextlib.redirect_stdout(io.StringIO()):  # what a run says of itself
            line = train_and_judge(mistakes, epochs)
        losses = f"{line.first_loss:.2f} -> {line.last_loss:.3f}"
        print(f"{name:<32}{losses:>18}{line.reproduced:>20.1%}{line.right_length:>16.0%}", flush=True)


def train_and_judge(mistakes: frozenset[str], epochs: int) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "output", epochs)
        losses = train(run, mistakes)
        run.exporter.save(["last"], {"step": len(losses), "epoch": epochs - 1, "loss": losses[-1], "metrics": {}})
        spec = [roundtrip_row(run, row) for row in run.train.rows(run.train.num_rows)]
        found = judge(str(Path(folder) / "output" / "last"), spec)
    first, last = losses[:LOSS_WINDOW], losses[-LOSS_WINDOW:]
    return Line(sum(first) / len(first), sum(last) / len(last), found["reproduced"], found["right_length"])


def make_run(output_dir: Path, epochs: int) -> building.Run:
    """The demo's run, ready to train."""
    changed = {"OUTPUT_DIR": str(output_dir), "NUM_EPOCHS": str(epochs), "SAMPLE_STEPS": "0", "DATA_CHECK": "off"}
    settings: Settings = load_settings(environment={"ENV_FILE": str(PROJECT / ".env.overfit")} | changed)
    base, device = starting.check_inputs(settings)
    accelerator = starting.start(settings, device)
    rows = starting.open_rows(settings, base, accelerator)
    run = building.build_run(settings, base, rows, accelerator, verbose=False)
    claiming.claim_output_folder(run)
    return run


def train(run: building.Run, mistakes: frozenset[str]) -> list[float]:
    """The loss of every step."""
    settings = run.settings
    loop = MistakenLoop(run.model, run.speakers.vectors, settings.sub_talker_loss_weight, mistakes).train()
    optimizer = torch.optim.AdamW(loop.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    warmup_steps = min(settings.warmup_steps, run.num_steps // 10)
    schedule = get_scheduler(settings.lr_scheduler, optimizer, warmup_steps, run.num_steps)
    losses = []
    for batch in batches(run):
        loss = loop(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(loop.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batches(run: building.Run) -> Iterator[Any]:
    for epoch in range(run.settings.num_epochs):
        for step in run.train.steps(epoch):
            yield from step.batches


if __name__ == "__main__":
    run_main(main)
