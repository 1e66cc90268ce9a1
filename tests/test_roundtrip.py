"""The proof: what was trained comes back from stock qwen-tts, code for code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROJECT, SHAPES
from reference import captured_prompt, load_stock, stepwise_logits
from safetensors.torch import load_file
from training import train

from finetuning.dataset import collate
from finetuning.objective import TrainingObjective, before_frames
from finetuning.settings import load_settings

#: The first two transcripts begin alike.
CLIPS = (0, 1, 5, 10)
#: These begin with different letters: in the streaming layout the first frame follows from the first token alone.
CLIPS_TO_STREAM = (0, 2, 3, 10)
RECIPES = {
    "full": {"replace_last_n_layers": 0, "add_new_layers": 0, "freeze_original_layers": False},
    "layers": {"replace_last_n_layers": 2, "add_new_layers": 2, "freeze_original_layers": True},
    "lora": {"lora_rank": 32, "lora_alpha": 64.0, "lora_dropout": 0.0, "learning_rate": 1e-2},
}
#: Both layouts of every clip, from one model; twice the epochs, since each has half of them.
RECIPES_OF_TINY = {"both layouts": RECIPES["full"] | {"train_layout": "both", "num_epochs": 320}}
#: Everything that saves time or memory, switched on, but compiled layers: they need a compiler (see test_levers.py).
LEVERS = {
    "mixed_precision": "bf16", "max_frames_per_batch": 250, "sub_talker_frame_fraction": 0.5,
    "gradient_checkpointing": True,
}  # fmt: skip
RECIPES_WITH_LEVERS = {
    "full with levers": RECIPES["full"] | LEVERS | {"optimizer": "adamw_8bit", "weights_precision": "bf16"},
    "layers with levers": RECIPES["layers"] | LEVERS | {"prefix_cache": "ram"},
}
CASES = [(shape, recipe) for shape in SHAPES for recipe in RECIPES]
CASES += [("tiny-random", recipe) for recipe in (*RECIPES_OF_TINY, *RECIPES_WITH_LEVERS)]


@pytest.fixture(scope="session")
def runs(demo_rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """Four clips overfitted with each recipe on each shape, through the real command's code."""
    finished = {}
    for shape, recipe in CASES:
        rows = [demo_rows[index] for index in (CLIPS_TO_STREAM if recipe in RECIPES_OF_TINY else CLIPS)]
        folder = tmp_path_factory.mktemp(f"{shape}-{recipe}")
        jsonl = folder / "train.jsonl"
        jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        fields = {
            "device": "cpu",
            "init_model_path": shape,
            "output_dir": folder / "output",
            "train_jsonl": jsonl,
            "validation_fraction": 0.0,
            "speaker_name": "Anna_B",
            "num_epochs": 160,
            "gradient_accumulation_steps": 1,
            "learning_rate": 4e-3,
            "warmup_steps": 10,
            "weight_decay": 0.0,
            "sub_talker_loss_weight": 1.0,
            "logging_steps": 50,
            "save_steps": 1000,
            "use_wandb": False,
        }
        plain = {"mixed_precision": "no", "batch_size": 4}
        fields |= RECIPES_WITH_LEVERS.get(recipe) or plain | (RECIPES | RECIPES_OF_TINY)[recipe]
        run, _ = train(load_settings(fields, environment={}))
        finished[shape, recipe] = SimpleNamespace(run=run, base=run.base, last=folder / "output" / "last", rows=rows)
    return finished


@pytest.fixture(scope="session")
def judged(runs: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
    """All checkpoints judged by one process that has qwen-tts and cannot import the project."""
    folder = tmp_path_factory.mktemp("judge")
    judge = folder / "judge.py"
    judge.write_text((PROJECT / "finetuning" / "roundtrip.py").read_text(encoding="utf-8"), encoding="utf-8")
    specs = []
    for number, (case, finished) in enumerate(runs.items()):
        rows = [
            {"text": row["text"], "audio_codes": row["audio_codes"], "language": row["language"], "speaker": "ANNA_b"}
            | {"is_streaming": is_streaming}
            for is_streaming in ((False, True) if case[1] == "both layouts" else (False,))
            for row in finished.rows
        ]
        specs.append(folder / f"{number}.json")
        spec = {"checkpoint": str(finished.last), "rows": rows, "wav_folder": str(folder / f"wav-{number}")}
        specs[-1].write_text(json.dumps(spec), encoding="utf-8")
        assert case == CASES[number]
    command = [sys.executable, "-I", str(judge), *map(str, specs)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert (folder / "wav-0" / "clip-1.wav").is_file()
    return dict(zip(CASES, lines, strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_stock_gives_the_codes_back(judged: dict, case: tuple[str, str]) -> None:
    assert judged[case]["reproduced"] >= 0.99
    assert judged[case]["right_length"] == 1.0  # generation stopped by itself, at exactly frame T


def test_the_judge_notices_a_wrong_checkpoint(runs: dict) -> None:
    """Swapped transcripts must not be taken for reproduction."""
    from finetuning.roundtrip import judge

    finished = runs["tiny-random", "full"]
    rows = [
        {"text": text["text"], "audio_codes": codes["audio_codes"], "speaker": "anna_b", "language": "English"}
        for text, codes in zip(finished.rows, finished.rows[1:] + finished.rows[:1], strict=True)
    ]
    assert judge(str(finished.last), rows)["reproduced"] < 0.2


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_and_uncached_agree_after_layers_were_added(runs: dict, shape: str) -> None:
    """Stock's KV-cached decoding of the export against one teacher-forced pass without a cache.

    A wrong layer_idx of a new layer would break the cache only.
    """
    finished = runs[shape, "layers"]
    stock = load_stock(finished.last)
    assert len(stock.model.talker.model.layers) == 6
    row = finished.rows[1]
    with captured_prompt(stock) as prompt:
        stock.generate_custom_voice(row["text"], "anna_b", language=row["language"])
    codes = torch.tensor(row["audio_codes"])
    want_talker, want_sub_talker = stepwise_logits(stock, prompt, codes)

    run = finished.run
    objective = TrainingObjective(stock.model.talker, run.speakers.vectors).eval()
    batch = collate([run.train.encoder.encode(run.train.dataset.manifest[1])], [0])
    with torch.no_grad():
        hidden = objective.hidden_states(batch)
        talker = objective.talker_logits(hidden[batch["label_places"]])
        embedded = objective.code_embeddings(batch["codes"])[:, :-1]
        sub_talker = objective.sub_talker_logits(hidden[before_frames(batch)], embedded)
    # Logits of an overfitted model reach some tens, so the tolerance is relative to them.
    scale = want_talker.abs().max().item()
    torch.testing.assert_close(talker, want_talker, atol=1e-5 * scale, rtol=0)
    torch.testing.assert_close(sub_talker, want_sub_talker, atol=1e-5 * scale, rtol=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("shape", SHAPES)
def test_frozen_weights_are_untouched_and_new_ones_learn(runs: dict, shape: str) -> None:
    finished = runs[shape, "layers"]
    before, after = weights(finished.base.folder), weights(finished.last)
    table = "talker.model.codec_embedding.weight"
    trained = ("talker.model.norm.", "talker.codec_head.", "talker.code_predictor.model.layers.")
    trained += ("talker.code_predictor.model.norm.", "talker.code_predictor.lm_head.")
    trained += ("talker.code_predictor.small_to_mtp_projection.", "talker.model.layers.2.", "talker.model.layers.3.")
    for name, tensor in before.items():
        if name.startswith("speaker_encoder."):
            assert name not in after
        elif name == table:
            others = torch.arange(len(tensor)) != 3000
            assert torch.equal(after[name][others], tensor[others])
        else:
            assert torch.equal(after[name], tensor) != name.startswith(trained), name
    new = [name for name in after if name.startswith(("talker.model.layers.4.", "talker.model.layers.5."))]
    assert len(new) == 2 * 11
    zero_at_first = [after[name] for name in new if name.endswith(("o_proj.weight", "down_proj.weight"))]
    assert all(tensor.abs().max() > 0 for tensor in zero_at_first)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_training_leaves_the_text_table_and_unused_rows(runs: dict, shape: str) -> None:
    finished = runs[shape, "full"]
    before, after = weights(finished.base.folder), weights(finished.last)
    assert torch.equal(after["talker.model.text_embedding.weight"], before["talker.model.text_embedding.weight"])
    table = "talker.model.codec_embedding.weight"
    presets = [2861, 2864, 2873, 2875, 2878, 3010, 3061, 3065, 3066]  # of the CustomVoice release
    assert torch.equal(after[table][presets], before[table][presets])
    assert torch.equal(after[table][3000], finished.run.speakers.vectors[0])
    assert not torch.equal(after[table][:2048], before[table][:2048])


def test_a_run_leaves_what_it_promises(runs: dict) -> None:
    finished = runs["tiny-random", "full"]
    output = finished.last.parent
    files = {str(path.relative_to(finished.last)) for path in finished.last.rglob("*") if path.is_file()}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json", "vocab.json",
        "merges.txt", "preprocessor_config.json", "speech_tokenizer/config.json",
        "speech_tokenizer/model.safetensors", "speech_tokenizer/preprocessor_config.json",
        "speaker_encoder/speaker_config.json", "training_state.json", "checksums.json", "README.md",
    }  # fmt: skip
    assert (output / "best" / "model.safetensors").is_file()
    assert [entry.name for entry in output.glob(".*")] == [".lock"]
    log = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [50, 100, 150, 160]
    assert set(log[0]) >= {
        "step", "epoch", "loss", "learning_rate", "timestamp", "talker_loss", "sub_talker_loss", "grad_norm",
        "frames_per_second",
    }  # fmt: skip
    assert log[-1]["loss"] == pytest.approx(log[-1]["talker_loss"] + log[-1]["sub_talker_loss"])
    state = json.loads((finished.last / "training_state.json").read_text())
    assert state["step"] == 160
    assert state["best_by"] == "mean training loss of an epoch"
    speakers = json.loads((finished.last / "speaker_encoder" / "speaker_config.json").read_text())
    assert speakers["embedding_dim"] == 64
    assert speakers["speakers"]["Anna_B"]["codec_id"] == 3000
