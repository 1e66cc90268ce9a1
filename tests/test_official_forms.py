"""The command-line forms and the class that are known from the official scripts, on this engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState
from conftest import PROJECT, SHAPES, VOICE
from raw_clips import read_rows, write_raw
from reference import load_stock
from torch.nn import functional as F
from torch.utils.data import DataLoader

from finetuning import prepare_data, sft_12hz
from finetuning.base_model import load_tokenizer
from finetuning.dataset import RowEncoder, TTSDataset, make_step
from finetuning.errors import UserError
from finetuning.objective import TrainingObjective
from finetuning.official import FULL_FINE_TUNING, TRAINING_OPTIONS, explain, training_parser, training_settings
from finetuning.prompt import LayoutIds
from finetuning.settings import canonical_names
from finetuning.tiny_model import embedded_model_folder

ROOMS = PROJECT / "finetuning"


def settings_of(*arguments: str) -> Any:
    """What sft_12hz.py makes of a command line."""
    parser = training_parser(None)
    parser.parse_args = lambda: type(parser).parse_args(parser, list(arguments))
    return training_settings(parser.parse())


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The script's ``main`` in this process."""

    def run(script: Any, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        AcceleratorState._reset_state(reset_partial_state=True)  # this script's precision is bf16
        script.main()

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


# --------------------------------------------------------------------------------------------- the guide's commands


def guide(command: str, cwd: Path, **environment: str) -> str:
    """A command of the official guide in a process of its own; what it prints."""
    words = command.replace("python ", f"{sys.executable} ", 1).split()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "WANDB_"))}
    done = subprocess.run(
        words, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The guide from the inside of finetuning/, then again from the root with one more epoch; all paths relative.

    Settings in the environment, which the official scripts do not know, would break each of these commands.
    """
    folder = tmp_path_factory.mktemp("guide")
    rows = [json.loads(line) for line in (VOICE / "train_raw.jsonl").read_text(encoding="utf-8").splitlines()]
    with (folder / "train_raw.jsonl").open("w", encoding="utf-8") as stream:
        for row in rows[:6]:
            paths = {key: str(VOICE / row[key]) for key in ("audio", "ref_audio")}
            stream.write(json.dumps({"audio": paths["audio"], "text": row["text"], "ref_audio": paths["ref_audio"]}))
            stream.write("\n")
    leaks = {"LR": "none", "DEVICE": "cuda:0", "BATCH_SIZE": "0", "ENV_FILE": "nowhere.env", "USE_WANDB": "true"}
    out = {}
    for name, cwd, script, num_epochs in (("inside", ROOMS, "", 2), ("root", PROJECT, "finetuning/", 3)):
        here = os.path.relpath(folder, cwd)
        prepare = (
            f"python {script}prepare_data.py --device cuda:0 --tokenizer_model_path tiny-random "
            f"--input_jsonl {here}/train_raw.jsonl --output_jsonl {here}/train_with_codes.jsonl"
        )
        train = (
            f"python {script}sft_12hz.py --init_model_path tiny-random --output_model_path {here}/output "
            f"--train_jsonl {here}/train_with_codes.jsonl --batch_size 32 --lr 2e-6 --num_epochs {num_epochs} "
            f"--speaker_name speaker_test"
        )
        out[name] = [guide(command, cwd, OMP_NUM_THREADS="1", **leaks) for command in (prepare, train)]
    return SimpleNamespace(folder=folder, output=folder / "output", **out)


def test_the_guides_commands_leave_a_checkpoint_after_each_epoch(guided: Any) -> None:
    names = sorted(entry.name for entry in guided.output.glob("checkpoint*"))
    assert names == ["checkpoint-epoch-0", "checkpoint-epoch-1", "checkpoint-epoch-2"]
    states = [json.loads((guided.output / name / "training_state.json").read_text()) for name in names]
    assert [(state["epoch"], state["step"]) for state in states] == [(0, 1), (1, 2), (2, 3)]
    assert not (guided.output / "wandb").exists() and not (guided.output / "tensorboard").exists()
    assert "6 training rows" in guided.inside[1] and "0 validation rows" in guided.inside[1]


def test_the_guides_commands_say_what_trains_and_what_the_official_script_would(guided: Any) -> None:
    for said in (guided.inside[1], guided.root[1]):
        assert "What trains: 2 new layers in place of the last 2 and 4 on top of all; the final norm, codec" in said
        assert f"but for the text embedding table (no option trains it), would be: {FULL_FINE_TUNING}\n" in said


def test_the_guides_commands_say_what_the_names_of_settings_mean(guided: Any) -> None:
    for said in (guided.inside[1], guided.root[1]):
        names = said.splitlines()[0]
        assert "OUTPUT_DIR is --output_model_path, LEARNING_RATE is --lr, and every other option has its own" in names
        assert "RESUME=never with OVERWRITE_OUTPUT=true is --overwrite_output True" in names
    assert all(field in (option, "output_dir", "learning_rate") for option, field in TRAINING_OPTIONS.items())


def test_hints_work_where_they_are_printed(guided: Any) -> None:
    for cwd, said in ((ROOMS, guided.inside[1]), (PROJECT, guided.root[1])):
        script, checkpoint = re.search(r"Listen: python (\S+) --checkpoint (\S+) ", said).groups()
        assert (cwd / script).samefile(PROJECT / "synthesize.py")
        assert (cwd / checkpoint).samefile(guided.output / "best")


def test_the_same_command_goes_on(guided: Any) -> None:
    assert "Resuming" not in guided.inside[1]
    assert re.search(r"Resuming .*output/state/step-2 after step 2", guided.root[1])
    assert "encoded 6 clips" in guided.inside[0] and "encoded" not in guided.root[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="--device cuda:0 is there")
def test_a_missing_gpu_is_said(guided: Any) -> None:
    assert "--device: this machine has no cuda:0, so the CPU encodes" in guided.inside[0]


def test_codes_of_prepare_data_are_those_of_the_codec(guided: Any, demo_rows: list[dict[str, Any]]) -> None:
    rows = read_rows(guided.folder / "train_with_codes.jsonl")
    assert [row["audio_codes"] for row in rows] == [row["audio_codes"] for row in demo_rows[:6]]
    assert [row["text"] for row in rows] == [row["text"] for row in demo_rows[:6]]


def test_stock_speaks_with_a_checkpoint_of_the_guide(guided: Any) -> None:
    tts = load_stock(guided.output / "checkpoint-epoch-1")
    waveforms, rate = tts.generate_custom_voice(
        text="She said she would be here by noon.", speaker="speaker_test", max_new_tokens=8
    )
    assert rate == 24_000 and len(waveforms[0]) > 0


def test_official_rows_train_in_full(
    call: Callable[..., None], demo_rows: list, write_jsonl: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Rows as the official prepare_data.py writes them, with paths from the folder of the call, beside a file that
    train.py would validate on."""
    clips = ("audio", "text", "ref_audio", "audio_codes")
    rows = [{key: row[key] for key in clips} for row in demo_rows[:4]]
    rows[3]["speaker"] = "anna"  # the official script reads no such key
    (tmp_path / "ref.flac").symlink_to(rows[0]["audio"])
    jsonl = write_jsonl([row | {"ref_audio": "./ref.flac"} for row in rows], "train_with_codes.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "validation.jsonl").write_text("no rows at all")
    monkeypatch.chdir(tmp_path)
    full = FULL_FINE_TUNING.split()
    call(sft_12hz, "--train_jsonl", jsonl.name, "--init_model_path", "tiny-random", "--num_epochs", "1", *full)
    assert not (tmp_path / "train_with_codes.encoded.jsonl").exists()
    saved = json.loads((tmp_path / "output" / "settings.json").read_text())
    assert saved["VALIDATION_JSONL"] == os.devnull
    assert (saved["SPEAKER_NAME"], saved["LR_SCHEDULER"], saved["WARMUP_STEPS"]) == ("speaker_test", "constant", 0)
    (logged,) = read_rows(tmp_path / "output" / "training_log.jsonl")
    assert logged["step"] == 1 and logged["learning_rate"] == 2e-5
    checkpoint = tmp_path / "output" / "checkpoint-epoch-0"
    speakers = json.loads((checkpoint / "speaker_encoder" / "speaker_config.json").read_text())["speakers"]
    assert list(speakers) == ["speaker_test", "anna"] and len(speakers["speaker_test"]["references"]) == 1
    said = (
        'SPEAKER_NAME "speaker_test" is for rows that name no speaker themselves. Speakers that are trained: speaker_'
    )
    assert f"{said}test, anna\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ options to settings


def test_defaults_of_the_options() -> None:
    settings = settings_of("--train_jsonl", "rows.jsonl")
    assert settings.init_model_path == "Qwen/Qwen3-TTS-12Hz-1.7B-Base"
    assert (settings.batch_size, settings.gradient_accumulation_steps) == (2, 4)
    assert (settings.learning_rate, settings.num_epochs, settings.speaker_name) == (2e-5, 3, "speaker_test")
    layers = settings.replace_last_n_layers, settings.add_new_layers, settings.freeze_original_layers
    assert layers == (2, 4, True) and settings.freeze_speaker_encoder and settings.attn_implementation == "auto"
    assert settings.output_dir == Path("output") and settings.train_jsonl == Path("rows.jsonl")
    assert settings.save_minutes == 15 and settings.save_steps > 10**6, "checkpoint-N/ besides the epochs"
    assert settings.trackers() == () and settings.steps_between_samples == 0 and settings.resume == "auto"


def test_every_option_reaches_its_setting() -> None:
    settings = settings_of(
        "--init_model_path", "base", "--output_model_path", "here", "--train_jsonl", "a.jsonl", "--batch_size", "3",
        "--lr", "2e-6", "--num_epochs", "10", "--speaker_name", "Anna", "--replace_last_n_layers", "0",
        "--add_new_layers", "1", "--freeze_original_layers", "False", "--freeze_speaker_encoder", "no",
        "--gradient_accumulation_steps", "5", "--attn_implementation", "eager", "--mixed_precision", "no",
        "--overwrite_output", "True",
    )  # fmt: skip
    expected = {
        "init_model_path": "base", "output_dir": Path("here"), "train_jsonl": Path("a.jsonl"), "batch_size": 3,
        "learning_rate": 2e-6, "num_epochs": 10, "speaker_name": "Anna", "replace_last_n_layers": 0,
        "add_new_layers": 1, "freeze_original_layers": False, "freeze_speaker_encoder": False,
        "gradient_accumulation_steps": 5, "attn_implementation": "eager", "mixed_precision": "no",
        "overwrite_output": True, "resume": "never",
    }  # fmt: skip
    assert {field: getattr(settings, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("word", "value"),
    [(word, True) for word in ("True", "true", "1", "yes")] + [(word, False) for word in ("False", "false", "0", "no")],
)
def test_words_for_true_and_false(word: str, value: bool) -> None:
    assert settings_of("--train_jsonl", "a", "--freeze_original_layers", word).freeze_original_layers is value


def test_neither_the_environment_nor_a_settings_file_changes_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--train_jsonl", "a.jsonl", "--lr", "1e-4")
    alone = settings_of(*command)
    (tmp_path / ".env").write_text("SEED=7\nHF_ENDPOINT=http://of.the.file\nno such line\n")
    monkeypatch.setattr("finetuning.settings.DEFAULT_ENV_FILE", str(tmp_path / ".env"))
    monkeypatch.setenv("ENV_FILE", str(tmp_path / ".env"))
    monkeypatch.setenv("HF_ENDPOINT", "http://of.the.environment")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    for name in canonical_names():
        monkeypatch.setenv(name, "1")
    assert settings_of(*command) == alone
    assert settings_of(*command).model_fields_set == alone.model_fields_set
    assert (os.environ["HF_ENDPOINT"], os.environ["NCCL_DEBUG"]) == ("http://of.the.environment", "INFO")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --train_jsonl"),
        (["--train_jsonl"], "--train_jsonl: expected one argument"),
        (["--train_jsonl", "a", "--lr", "--batch_size", "2"], "--lr: expected one argument"),
        (["--train_jsonl", "a", "--epochs", "2"], "unrecognized arguments: --epochs 2"),
        (["--train_jsonl", "a", "--batch", "2"], "unrecognized arguments: --batch 2"),
        (["--train_jsonl", "a", "--output_model_path", ""], "--output_model_path: is empty"),
        (["--train_jsonl", "nowhere.jsonl"], "--train_jsonl: nowhere.jsonl does not exist"),
        (
            ["--train_jsonl", "a", "--freeze_original_layers", "maybe"],
            "FREEZE_ORIGINAL_LAYERS: must be a valid boolean, unable to interpret input",
        ),
        (
            ["--train_jsonl", "a", "--lr", "fast"],
            "LEARNING_RATE: must be a valid number, unable to parse string as a number (LEARNING_RATE is --lr)",
        ),
        (
            ["--train_jsonl", "a", "--batch_size", "0"],
            "BATCH_SIZE: must be greater than or equal to 1 (BATCH_SIZE is --batch_size)",
        ),
        (["--train_jsonl", "a", "--attn_implementation", "flash"], "ATTN_IMPLEMENTATION: must be 'auto', 'flash_"),
        (["--train_jsonl", "a", "--speaker_name", " x"], "SPEAKER_NAME: a speaker name must be printable"),
        (["--train_jsonl", "a", "--output_model_path", __file__], f"OUTPUT_DIR: {__file__} is a file"),
    ],
)
def test_bad_options_name_themselves(call: Callable[..., None], arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        call(sft_12hz, *arguments)
    option = next((word for word in arguments[2:] if word.startswith("--")), "--train_jsonl")
    assert option in str(refused.value)
    assert "a setting of train.py" not in str(refused.value)


def test_all_bad_options_are_told_at_once() -> None:
    with pytest.raises(UserError) as refused:
        settings_of("--train_jsonl", "a", "--lr", "x", "--num_epochs", "0")
    assert str(refused.value).startswith("2 problems in the settings:\n")
    assert str(refused.value).endswith(" (NUM_EPOCHS is --num_epochs, LEARNING_RATE is --lr)")


def test_a_bad_row_names_the_option_and_its_line(
    call: Callable[..., None], demo_rows: list, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    jsonl = write_jsonl([*demo_rows[:2], demo_rows[2] | {"text": ""}])
    options = ("--init_model_path", "tiny-random", "--output_model_path", tmp_path / "output")
    with pytest.raises(
        UserError, match=rf"1 of 3 rows [^$]*{jsonl} line 3: text is empty \({jsonl} is --train_jsonl\)"
    ):
        call(sft_12hz, "--train_jsonl", jsonl, *options)
    assert not (tmp_path / "output").exists()


def test_checkpoints_of_the_official_script_are_not_written_over(
    call: Callable[..., None], demo_rows: list, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    theirs = tmp_path / "output" / "checkpoint-epoch-0" / "model.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("weights")
    options = ("--init_model_path", "tiny-random", "--output_model_path", tmp_path / "output")
    with pytest.raises(UserError) as refused:
        call(sft_12hz, "--train_jsonl", write_jsonl(demo_rows[:2]), *options)
    assert str(refused.value) == (
        f"OUTPUT_DIR: {tmp_path}/output already holds a run (checkpoint-epoch-0); choose another folder, or set "
        "OVERWRITE_OUTPUT=true to replace it (OUTPUT_DIR is --output_model_path, OVERWRITE_OUTPUT is "
        "--overwrite_output)"
    )
    assert theirs.read_text() == "weights"


def test_messages_say_what_their_settings_are_here() -> None:
    fields, files = (
        {"lr": "learning_rate", "overwrite_output": "overwrite_output"},
        {"--train_jsonl": Path("a/b.jsonl")},
    )
    notes = {
        "LEARNING_RATE was 1, or set LEARNING_RATE=2": "LEARNING_RATE is --lr",
        "RESUME=never and OVERWRITE_OUTPUT=true": (
            "RESUME is never with --overwrite_output True, OVERWRITE_OUTPUT is --overwrite_output"
        ),
        "a/b.jsonl line 7: no text": "a/b.jsonl is --train_jsonl",
        "set SEED=3": "SEED is a setting of train.py",
        "set HF_TOKEN for a gated one; NCCL_DEBUG": "",
    }
    expected = {message: f"{message} ({note})" if note else message for message, note in notes.items()}
    assert {message: explain(message, fields, files) for message in notes} == expected


# ------------------------------------------------------------------------------------------------------ prepare_data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --output_jsonl"),
        (["--output_jsonl"], "--output_jsonl: expected one argument"),
        (["--output_jsonl", "b", "--input_jsonl", "a"], "--input_jsonl: a does not exist"),
        (["--output_jsonl", "b", "--device", "gpu"], "--device: must be cuda:N, cuda, cpu, mps or auto, not gpu"),
        (["--output_jsonl", "b", "--tokenizer_model_path", "x"], "--tokenizer_model_path: x is not a folder"),
        (["--output_jsonl", "b", "--batch_size", "3"], "unrecognized arguments: --batch_size 3"),
    ],
)
def test_bad_options_of_prepare_data(call: Callable[..., None], arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        call(prepare_data, "--input_jsonl", VOICE / "train_raw.jsonl", *arguments)


def test_prepare_data_keeps_a_file_that_it_did_not_make(call: Callable[..., None], fake: Any, tmp_path: Path) -> None:
    raw, output = write_raw(tmp_path, num_clips=2), tmp_path / "codes.jsonl"
    output.write_text("theirs")
    arguments = ("--input_jsonl", raw, "--output_jsonl", output, "--tokenizer_model_path", "tiny-random")
    with pytest.raises(UserError, match=r"was not made by --mode encode or prepare_data\.py"):
        call(prepare_data, *arguments)
    assert output.read_text() == "theirs"
    call(prepare_data, *arguments, "--force")
    assert [len(row["audio_codes"][0]) for row in read_rows(output)] == [16, 16]


@pytest.mark.parametrize(
    ("name", "num_gpus", "launched", "device"),
    [
        ("cuda:0", 0, "1", "cpu"),
        ("cuda", 0, "1", "cpu"),
        ("auto", 0, "1", "cpu"),
        ("cpu", 2, "1", "cpu"),
        ("cuda:1", 2, "1", "cuda:1"),
        ("cuda:0", 2, "2", "cuda:1"),  # each process its own
        ("auto", 2, "2", "cuda:1"),
    ],
)
def test_the_device_of_prepare_data(
    name: str, num_gpus: int, launched: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", launched)
    monkeypatch.setenv("LOCAL_RANK", "1" if launched == "2" else "0")
    assert prepare_data.choose_device(name) == device


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=re.escape("--device: there is no cuda:2; this machine shows 2 GPU(s)")):
        prepare_data.choose_device("cuda:2")


# -------------------------------------------------------------------------------------------------------- TTSDataset

NUM_ROWS = 3


@pytest.fixture(scope="module", params=SHAPES)
def tts(request: pytest.FixtureRequest) -> SimpleNamespace:
    """Rows, their batch by TTSDataset, and this project's own batch and objective of the same rows."""
    folder = embedded_model_folder(request.param)
    stock = load_stock(folder)
    generator = np.random.default_rng(0)
    codes = [generator.integers(0, 2048, (3 + 4 * number, 16)) for number in range(NUM_ROWS)]
    texts = [f"Sentence {number}" + " and so on" * (2 - number) + "." for number in range(NUM_ROWS)]
    rows = [
        {"text": text, "audio_codes": code.tolist(), "ref_audio": str(VOICE / "english_voice.wav"), "audio": "gone.wav"}
        for text, code in zip(texts, codes, strict=True)
    ]
    dataset = TTSDataset(rows, stock.processor, stock.model.config)
    ids = LayoutIds.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    encoder = RowEncoder(load_tokenizer(folder), ids, {"anna": 0}, {})
    own = [
        {"text": text, "codes": code, "language": "Auto", "speaker": "anna", "instruct": None, "line": 1}
        for text, code in zip(texts, codes, strict=True)
    ]
    step = make_step([own], encoder)
    assert step.skipped == []
    vector = torch.randn(1, stock.model.config.talker_config.hidden_size, generator=torch.Generator().manual_seed(1))
    batch = next(iter(DataLoader(dataset, batch_size=NUM_ROWS, collate_fn=dataset.collate_fn)))
    hidden = hidden_of_official_loop(stock.model.talker, batch, vector)  # before the objective packs the attention
    objective = TrainingObjective(stock.model.talker, vector).eval()
    return SimpleNamespace(
        stock=stock, rows=rows, dataset=dataset, batch=batch, own=step.batches[0], objective=objective, hidden=hidden,
        vector=vector,
    )  # fmt: skip


def inputs_of_official_loop(talker: Any, batch: dict[str, torch.Tensor], vector: torch.Tensor) -> torch.Tensor:
    """(B, L, H): what a loop over such batches adds up."""
    text = talker.text_projection(talker.model.text_embedding(batch["input_ids"][..., 0]))
    codec = talker.model.codec_embedding(batch["input_ids"][..., 1]) * batch["codec_embedding_mask"]
    codec[:, 6] = vector
    inputs = text * batch["text_embedding_mask"] + codec
    for book, table in enumerate(talker.code_predictor.get_input_embeddings(), 1):
        inputs = inputs + table(batch["codec_ids"][..., book]) * batch["codec_mask"].unsqueeze(-1)
    return inputs


@torch.no_grad()
def hidden_of_official_loop(talker: Any, batch: dict[str, torch.Tensor], vector: torch.Tensor) -> torch.Tensor:
    """(B, L - 1, H) after the final norm."""
    inputs = inputs_of_official_loop(talker, batch, vector)[:, :-1]
    return talker.model(inputs_embeds=inputs, attention_mask=batch["attention_mask"][:, :-1]).last_hidden_state


def real_of_own(tts: Any) -> torch.Tensor:
    """(B, L - 1) bool: the positions of this project's batch."""
    return tts.own["attention_mask"].bool()


def test_embeddings_are_those_of_the_objective(tts: Any) -> None:
    with torch.no_grad():
        theirs = inputs_of_official_loop(tts.objective.talker, tts.batch, tts.vector)
        own = tts.objective.input_embeddings(tts.own)
    torch.testing.assert_close(theirs[:, :-1][real_of_own(tts)], own, rtol=1e-5, atol=1e-5)


def test_labels_stand_in_their_own_place(tts: Any) -> None:
    assert torch.equal(tts.batch["codec_0_labels"][:, 1:], tts.own["labels"])
    assert (tts.batch["codec_0_labels"][:, 0] == -100).all()
    assert torch.equal(tts.batch["codec_mask"][:, :-1], tts.own["frame_mask"])
    assert torch.equal(tts.batch["codec_ids"][tts.batch["codec_mask"]], tts.own["codes"])
    ends = tts.batch["attention_mask"].sum(1) - 1
    last = tts.batch["input_ids"][torch.arange(NUM_ROWS), ends]
    config = tts.stock.model.config
    eos, pad = config.talker_config.codec_eos_token_id, config.tts_pad_token_id
    assert last.tolist() == [[pad, eos]] * NUM_ROWS
    assert torch.equal(tts.batch["attention_mask"].sum(1), tts.own["attention_mask"].sum(1) + 1)
    assert (tts.batch["input_ids"][tts.batch["attention_mask"] == 0] == 0).all()


def test_a_loop_that_shifts_once_gets_the_losses_of_the_objective(tts: Any) -> None:
    """As the class says: plain cross-entropy over labels[:, 1:], and the hidden states before the frames."""
    talker, batch = tts.objective.talker, tts.batch
    with torch.no_grad():
        own = tts.objective(tts.own)
        logits = talker.codec_head(tts.hidden).flatten(0, 1)
        talker_loss = F.cross_entropy(logits, batch["codec_0_labels"][:, 1:].flatten(), reduction="sum")
        codes = batch["codec_ids"][batch["codec_mask"]]
        sub_logits, _ = talker.forward_sub_talker_finetune(codes, tts.hidden[batch["codec_mask"][:, 1:]])
        sub_talker_loss = F.cross_entropy(sub_logits.flatten(0, 1), codes[:, 1:].flatten(), reduction="sum")
    assert float(talker_loss) == pytest.approx(float(own["talker_loss"]), rel=1e-4)
    assert float(sub_talker_loss) == pytest.approx(float(own["sub_talker_loss"]), rel=1e-4)


def test_references_give_stocks_vector(tts: Any, tmp_path: Path) -> None:
    """At another sampling rate too, and as a waveform."""
    model, path = tts.stock.model, VOICE / "english_voice.wav"
    waveform, rate = soundfile.read(path, dtype="float32")
    expected = model.extract_speaker_embedding(waveform, rate)
    with torch.no_grad():
        assert torch.equal(model.speaker_encoder(tts.batch["ref_mels"][:1])[0], expected)
    soundfile.write(tmp_path / "48k.wav", np.repeat(waveform, 2), 48_000)
    rows = [tts.rows[0] | {"ref_audio": reference} for reference in ([str(path)], (waveform, rate))]
    rows.append(tts.rows[0] | {"ref_audio": str(tmp_path / "48k.wav")})
    mels = [TTSDataset(rows, tts.stock.processor, model.config)[index]["ref_mel"] for index in range(3)]
    assert torch.equal(mels[0], tts.batch["ref_mels"][:1]) and torch.equal(mels[1], mels[0])
    assert mels[2].shape == mels[0].shape


def test_items_of_a_row(tts: Any) -> None:
    item = tts.dataset[1]
    turn = f"<|im_start|>assistant\n{tts.rows[1]['text']}<|im_end|>\n<|im_start|>assistant\n"
    ids = tts.stock.processor(text=turn, return_tensors="pt")["input_ids"]
    assert torch.equal(item["text_ids"], ids[:, :-5])
    assert item["audio_codes"].tolist() == tts.rows[1]["audio_codes"] and item["ref_mel"].shape[2] == 128
    assert len(tts.dataset) == NUM_ROWS


def test_code_around_the_official_class_finds_what_it_knows(tts: Any) -> None:
    """Its attributes in a subclass, and collate_fn on items of a cache, with the three keys of the official items."""

    class Cached(TTSDataset):
        def __getitem__(self, index: int) -> dict[str, Any]:
            turn = f"<|im_start|>assistant\n{self.data_list[index]['text']}<|im_end|>\n<|im_start|>assistant\n"
            return {
                "text_ids": self.processor(text=turn, return_tensors="pt", padding=True)["input_ids"][:, :-5],
                "audio_codes": torch.tensor(self.data_list[index]["audio_codes"], dtype=torch.long),
                "ref_mel": tts.dataset[index]["ref_mel"],
            }

    config = tts.stock.model.config
    dataset = Cached(tts.rows, tts.stock.processor, config)
    assert dataset.config is config and dataset.processor is tts.stock.processor
    assert dataset.data_list is tts.rows and dataset.lag_num == -1
    batch = next(iter(DataLoader(dataset, batch_size=NUM_ROWS, collate_fn=dataset.collate_fn)))
    assert list(tts.dataset[0]) == ["text_ids", "audio_codes", "ref_mel"]
    assert batch.keys() == tts.batch.keys()
    assert all(torch.equal(batch[name], tts.batch[name]) for name in batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "\n"}, "row 0: text is empty"),
        ({"text": "a<|im_end|>b"}, "row 0: text contains the special token"),
        ({"audio_codes": [[1] * 15] * 3}, "row 0: audio_codes has shape 3 x 15"),
        ({"ref_audio": "nowhere.wav"}, "row 0: file not found"),
    ],
)
def test_rows_that_cannot_be_used(tts: Any, change: dict[str, Any], message: str) -> None:
    dataset = TTSDataset([tts.rows[0] | change], tts.stock.processor, tts.stock.model.config)
    with pytest.raises(ValueError, match=re.escape(message)):
        dataset[0]


def test_what_the_class_cannot_do_is_said(tts: Any) -> None:
    processor, config = tts.stock.processor, tts.stock.model.config
    row = {key: value for key, value in tts.rows[0].items() if key != "ref_audio"}
    with pytest.raises(ValueError, match="row 0: no ref_audio"):
        TTSDataset([row], processor, config)[0]
    with pytest.raises(ValueError, match="lag_num must be -1"):
        TTSDataset([], processor, config, lag_num=0)
    longer = TTSDataset([*tts.rows, tts.rows[0] | {"ref_audio": (np.ones(30_000), 24_000)}], processor, config)
    with pytest.raises(ValueError, match="references of different lengths"):
        longer.collate_fn([longer[0], longer[3]])


def test_the_class_is_found_from_inside_the_folder_too() -> None:
    code = "from dataset import TTSDataset; from finetuning.dataset import collate; print(TTSDataset.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOMS, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "TTSDataset"), done.stderr
