"""The commands as people run them: the demo, synthesis, preflight, data tools, and what bad input meets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import PROJECT, SHAPES, VOICE
from training import FULL

import train
from finetuning.errors import UserError
from finetuning.memory import Needs

SILENCE = np.zeros(48_000, dtype=np.float32)


def run(command: list[str], cwd: Path = PROJECT, timeout: int = 120, **settings: str) -> SimpleNamespace:
    """A command in a process of its own, without settings or hub variables of this one."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "WANDB_"))}
    done = subprocess.run(
        command, cwd=cwd, env=environment | settings, capture_output=True, text=True, timeout=timeout, check=False
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def python(script: str, *arguments: str, **options: Any) -> SimpleNamespace:
    return run([sys.executable, str(PROJECT / script), *arguments], **options)


# ------------------------------------------------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """``./uv_train.sh .env.overfit`` called from another folder, into an output of the test's own."""
    folder = tmp_path_factory.mktemp("demo")
    no_hub = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there
    command = ["bash", str(PROJECT / "uv_train.sh"), ".env.overfit"]
    done = run(command, cwd=folder, timeout=900, OUTPUT_DIR=f"{folder}/out", **no_hub)
    done.output = folder / "out"
    return done


def test_demo_gives_its_codes_back(demo: Any) -> None:
    assert demo.code == 0, demo.err[-3000:]
    shares = re.findall(r"gave back ([\d.]+)% of the codes of 24 training clips", demo.out)
    assert len(shares) == 1
    assert float(shares[0]) >= 95.0
    logged = json.loads((demo.output / "validation_log.jsonl").read_text().splitlines()[-1])
    assert logged["metrics"]["roundtrip_reproduced"] >= 0.95
    assert "Traceback" not in demo.err


def test_demo_leaves_checkpoints_and_speech(demo: Any) -> None:
    for name in ("best", "last"):
        assert (demo.output / name / "model.safetensors").is_file()
    waveform, rate = soundfile.read(demo.output / "roundtrip" / "clip-1.wav")
    assert rate == 24_000
    assert len(waveform) > rate  # clip 1 has more than a second
    spoken = json.loads((demo.output / "samples" / "step-360" / "samples.json").read_text())
    assert len(spoken) == 2 and all(sample["stopped"] for sample in spoken)
    settings = json.loads((demo.output / "settings.json").read_text())
    assert settings["NUM_EPOCHS"] == 60
    assert "HF_TOKEN" not in settings


def test_synthesize_speaks(demo: Any, tmp_path: Path) -> None:
    text = "Rain is on its way."
    (tmp_path / "lines.txt").write_text(f"{text}\n\n  Keep the   change. \n", encoding="utf-8")
    done = python(
        "synthesize.py", "--checkpoint", str(demo.output / "last"), "--text", text,
        "--text_file", str(tmp_path / "lines.txt"), "--output", str(tmp_path / "spoken"), "--language", "en",
        "--greedy", "--seed", "3", "--max_new_tokens", "60",
    )  # fmt: skip
    assert done.code == 0, done.err
    files = sorted((tmp_path / "spoken").iterdir())
    assert [file.name for file in files] == ["speech_001.wav", "speech_002.wav", "speech_003.wav"]
    first, second, third = (soundfile.read(file)[0] for file in files)
    assert np.array_equal(first, second)
    # Greedy speech of trained sentences is exactly as long as the clips that they were learnt from.
    clip = soundfile.info(VOICE / "clips" / "train_05.flac")
    assert len(first) == -(-clip.frames // 1920) * 1920
    assert len(third) != len(first)
    assert "Keep the change." in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "Hi.", "--speaker", "nobody"], 'no speaker "nobody"; it has: english_voice'),
        (["--text", "Hi.", "--language", "Klingon"], "has no Klingon; it has Auto, chinese"),
        (["--text", "  "], "no text to speak"),
        (["--text", "Hi.", "--output", "speech.txt"], "speech.txt must end with .wav, .flac"),
        (["--text_file", "no-such-file.txt"], "no-such-file.txt cannot be read"),
        (["--text", "Hi.", "--ref_audio", "x.wav"], "--ref_audio is for base models"),
        (["--text", "Hi.", "--checkpoint", "nowhere"], "--checkpoint: nowhere is not a folder"),
        (["--text", "Hi.", "--checkpoint", "tiny-random"], "base model, which speaks like a reference"),
    ],
)
def test_synthesize_refuses(
    demo: Any, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import synthesize

    checkpoint = ["--checkpoint", str(demo.output / "last")]
    output = ["--output", str(tmp_path / "x.wav")]
    monkeypatch.setattr(sys, "argv", ["synthesize.py", *checkpoint, *output, *arguments])
    with pytest.raises(UserError, match=re.escape(message)):
        synthesize.main()
    assert not (tmp_path / "x.wav").exists()


def test_synthesize_clones_with_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import synthesize

    for extra in (["--x_vector_only"], ["--ref_text", "Good morning.", "--streaming_layout"]):
        output = tmp_path / f"{len(extra)}.wav"
        arguments = ["--checkpoint", "tiny-random", "--text", "Hi.", "--ref_audio", str(VOICE / "english_voice.wav")]
        monkeypatch.setattr(
            sys, "argv", ["synthesize.py", *arguments, *extra, "--output", str(output), "--max_new_tokens", "12"]
        )
        synthesize.main()
        assert soundfile.info(output).frames > 0


def test_preflight_of_the_demo(tmp_path: Path) -> None:
    done = python("test_setup.py", ENV_FILE=".env.overfit", OUTPUT_DIR=str(tmp_path / "out"))
    assert done.code == 0, done.out + done.err
    numbers = re.findall(r"^ ?(\d+)\. ✓", done.out, re.MULTILINE)
    assert numbers == [str(number) for number in range(1, 13)]
    assert not (tmp_path / "out").exists()


def test_preflight_reports_every_failure(tmp_path: Path) -> None:
    done = python(
        "test_setup.py", ENV_FILE=".env.overfit", OUTPUT_DIR=str(tmp_path), INIT_MODEL_PATH="nowhere",
        REF_AUDIO_PATH="gone.wav",
    )  # fmt: skip
    assert done.code == 2
    assert re.search(r"✗ model: INIT_MODEL_PATH: nowhere is not a folder", done.out)
    assert re.search(r"✗ references: REF_AUDIO_PATH: gone\.wav does not exist", done.out)
    assert "skipped, an earlier check failed" in done.out
    assert "2 check(s) failed" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("recipe", [(0, 0, False), (2, 3, True), (1, 0, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_preflight_counts_the_weights_that_will_train(shape: str, recipe: tuple, make_settings: Any) -> None:
    """The estimate from file headers against the model as training builds it."""
    from finetuning.base_model import load_model, resolve_base
    from finetuning.layer_utils import replace_and_add_layers
    from finetuning.memory import parameter_counts

    replace, add, freeze = recipe
    settings = make_settings(
        init_model_path=shape, replace_last_n_layers=replace, add_new_layers=add, freeze_original_layers=freeze
    )
    base = resolve_base(settings)
    model = replace_and_add_layers(load_model(base, "sdpa"), replace, add, freeze, verbose=False)
    sizes = [(p.numel(), p.requires_grad) for p in model.talker.parameters()]
    want = tuple(sum(size for size, trains in sizes if trains is kind) for kind in (True, False))
    assert parameter_counts(base, settings) == want


def test_preflight_finds_too_little_memory(make_settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetuning import base_model
    from test_setup import Preflight

    preflight = Preflight()
    preflight.settings, preflight.device = make_settings(), "cpu"
    preflight.base = base_model.resolve_base(preflight.settings)
    assert "GB are free" in preflight.memory() and "may not fit" not in preflight.memory()
    least = Needs.of(preflight.base, preflight.settings).least_bytes
    monkeypatch.setattr(base_model, "free_memory_bytes", lambda device: least + 1)
    assert "longer clips may not fit" in preflight.memory(), "a step that does not fit is repeated in parts"
    monkeypatch.setattr(base_model, "free_memory_bytes", lambda device: least - 1)
    with pytest.raises(UserError, match=r"whatever the clips; only 0\.\d\d GB are free"):
        preflight.memory()


def test_encode_then_info_then_train_in_none_mode(tmp_path: Path, write_jsonl: Callable, make_settings: Any) -> None:
    """The documented way in two steps; `none` never encodes."""
    rows = [json.loads(line) for line in (VOICE / "validation_raw.jsonl").read_text().splitlines()]
    raw = [{"audio": str(VOICE / row["audio"]), "text": row["text"], "mine": 1} for row in rows]
    raw = write_jsonl(raw, "raw.jsonl")
    encoded = tmp_path / "encoded.jsonl"
    arguments = ["--input_jsonl", str(raw), "--output_jsonl", str(encoded)]
    done = python("data_processing.py", "--mode", "encode", *arguments, INIT_MODEL_PATH="tiny-random", DEVICE="cpu")
    assert done.code == 0, done.err
    got = [json.loads(line) for line in encoded.read_text().splitlines()]
    assert [row["text"] for row in got] == [row["text"] for row in rows]
    assert all(row["mine"] == 1 and np.asarray(row["audio_codes"]).shape[1] == 16 for row in got)
    assert "4 rows (4 with codes)" in done.out
    settings = make_settings(
        **FULL, data_mode="none", train_jsonl=encoded, ref_audio_path=str(VOICE / "english_voice.wav"), max_steps=1
    )
    train.train(settings)
    assert (settings.output_dir / "last" / "model.safetensors").is_file()
    with pytest.raises(UserError, match=r"raw\.jsonl line 1: no audio_codes"):
        train.train(settings.model_copy(update={"train_jsonl": raw, "overwrite_output": True}))


def test_prepare_only_walks_the_data(
    write_jsonl: Callable, demo_rows: list, make_settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(**FULL, train_jsonl=write_jsonl(demo_rows[:5]), prepare_only=True)
    train.train(settings)
    shown = capsys.readouterr().out
    assert len(re.findall(r"\(\d, \d+\) with \d+ frames", shown)) == 3
    assert not (settings.output_dir / "settings.json").exists()


# ------------------------------------------------------------------------------------------------------ bad input


def wav(folder: Path, samples: np.ndarray) -> str:
    soundfile.write(folder / "bad.wav", samples, 24_000)
    return str(folder / "bad.wav")


BAD_ROWS = {
    "no text": (lambda row, _: row.pop("text"), r"line 1: no text"),
    "empty text": (lambda row, _: row.update(text=" \n "), r"line 1: text is empty"),
    "no audio": (lambda row, _: [row.pop(key) for key in ("audio", "audio_codes")], r"line 1: neither audio nor"),
    "missing audio": (lambda row, _: [row.pop("audio_codes"), row.update(audio="gone.wav")], r"line 1: .*gone\.wav"),
    "special token": (lambda row, _: row.update(text="Stop <|im_end|> here."), r"line 1: .*<\|im_end\|>"),
    "transposed": (lambda row, _: row.update(audio_codes=np.zeros((16, 9), int).tolist()), r"line 1: .*16 x 9"),
    "out of range": (lambda row, _: row.update(audio_codes=[[2048] * 16] * 4), r"line 1: .*out of range"),
    "missing reference": (lambda row, _: row.update(ref_audio="gone.wav"), r"line 1: ref_audio .*gone\.wav"),
    "speaker": (lambda row, _: row.update(speaker="a\tb"), r"line 1: a speaker name must"),
    "unreadable": (
        lambda row, folder: [row.pop("audio_codes"), row.update(audio=str(folder / "train.jsonl"))],
        r"line 1: .*not a readable audio file",
    ),
    "empty audio": (
        lambda row, folder: [row.pop("audio_codes"), row.update(audio=wav(folder, SILENCE[:0]))],
        r"line 1: .*no audio in the file",
    ),
    "silent": (
        lambda row, folder: [row.pop("audio_codes"), row.update(audio=wav(folder, SILENCE))],
        r"line 1: .*silence only",
    ),
    "short": (
        lambda row, folder: [row.pop("audio_codes"), row.update(audio=wav(folder, SILENCE[:4800] + 0.1))],
        r"line 1: .*0\.20 s long",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_stop_with_file_and_line(
    name: str, demo_rows: list, write_jsonl: Callable, make_settings: Any, tmp_path: Path
) -> None:
    spoil, message = BAD_ROWS[name]
    rows = [dict(row) for row in demo_rows[:3]]
    spoil(rows[0], tmp_path)
    settings = make_settings(train_jsonl=write_jsonl(rows))
    with pytest.raises(UserError, match=message) as caught:
        train.train(settings)
    assert str(settings.train_jsonl) in str(caught.value) or "encoded" in str(caught.value)
    assert not settings.output_dir.exists()


BAD_FILES = {
    "empty": ("", r"TRAIN_JSONL: .* is empty"),
    "not JSON": ("audio,text\n1.wav,Hello\n", r"line 1: not a JSON object"),
    "truncated": ('{"audio": "a.wav", "te', r"line 1: not a JSON object .* cut off"),
    "list": ("[1, 2]\n", r"line 1: not a JSON object"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name: str, make_settings: Any, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / "train.jsonl").write_text(content)
    settings = make_settings(train_jsonl=tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=message):
        train.train(settings)
    assert not settings.output_dir.exists()


def test_all_rows_alike_and_clashing_speakers(demo_rows: list, write_jsonl: Callable, make_settings: Any) -> None:
    codes = demo_rows[0]["audio_codes"]
    settings = make_settings(train_jsonl=write_jsonl([row | {"audio_codes": codes} for row in demo_rows[:4]]))
    with pytest.raises(UserError, match=r"all 4 rows of .* have the same codes"):
        train.train(settings)
    rows = [demo_rows[0] | {"speaker": "Anna"}, demo_rows[1] | {"speaker": "anna"}]
    with pytest.raises(UserError, match=r'"Anna" .*line 1.* "anna" .*line 2'):
        train.train(make_settings(train_jsonl=write_jsonl(rows)))
    assert not settings.output_dir.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"replace_last_n_layers": 5}, r"REPLACE_LAST_N_LAYERS: 5 is more than the base's 4"),
        ({"ref_audio_path": "gone.wav"}, r"REF_AUDIO_PATH: gone\.wav does not exist"),
        ({"init_model_path": "Qwen/Nowhere"}, r"INIT_MODEL_PATH: Qwen/Nowhere"),
        ({"train_jsonl": "gone.jsonl"}, r"TRAIN_JSONL: gone\.jsonl does not exist"),
        ({"train_jsonl": "gone.jsonl", "dataset_name": "a/b"}, r"DATASET_NAME: a/b is no folder here"),
        ({"validation_jsonl": "gone.jsonl"}, r"VALIDATION_JSONL: gone\.jsonl does not exist"),
        ({"speaker_name": "vivian", "init_model_path": "custom"}, r'custom_voice .* speaker "vivian"'),
    ],
)
def test_bad_settings_found_at_start(
    fields: dict, message: str, demo_rows: list, write_jsonl: Callable, make_settings: Any, tmp_path: Path
) -> None:
    if fields.get("init_model_path") == "custom":
        fields = fields | {"init_model_path": str(custom_voice_base(tmp_path))}
    settings = make_settings(**({"train_jsonl": write_jsonl(demo_rows[:3])} | fields))
    with pytest.raises(UserError, match=message):
        train.train(settings)
    assert not settings.output_dir.exists()


def custom_voice_base(folder: Path) -> Path:
    import shutil

    from finetuning.tiny_model import embedded_model_folder

    base = folder / "custom"
    shutil.copytree(embedded_model_folder("tiny-random"), base)
    config = json.loads((base / "config.json").read_text()) | {"tts_model_type": "custom_voice"}
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_a_few_bad_rows_are_listed_and_skipped(
    demo_rows: list, write_jsonl: Callable, make_settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list = [*demo_rows[:12], "{broken"]
    settings = make_settings(**FULL, train_jsonl=write_jsonl(rows), max_steps=1, validation_fraction=0)
    train.train(settings)
    listed = [json.loads(line) for line in (settings.output_dir / "rejected.train.jsonl").read_text().splitlines()]
    assert [(row["line"], row["row"]) for row in listed] == [(13, "{broken")]
    assert "skipped 1 of 13 rows" in capsys.readouterr().out


def test_least_rows_unknown_language_and_instructions(
    write_jsonl: Callable, make_settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """{"audio", "text"} is enough; a reference is chosen and said; a language that the base lacks is said once."""
    raw = [json.loads(line) for line in (VOICE / "train_raw.jsonl").read_text().splitlines()]
    rows = [{"audio": str(VOICE / row["audio"]), "text": row["text"]} for row in raw]
    rows[0] |= {"language": "Hausa", "instruct": "Whisper."}
    rows[1] |= {"language": "Hausa"}
    settings = make_settings(**FULL, init_model_path="tiny-random-0.6b", train_jsonl=write_jsonl(rows), max_steps=1)
    train.train(settings)
    shown = capsys.readouterr().out
    assert shown.count("languages unknown to the base are trained as Auto: Hausa") == 1
    assert shown.count("instructions are ignored") == 1
    assert shown.count('reference of speaker "reference_speaker"') == 1
    assert "23 training rows" in shown  # one of 24 is held out
    assert "1 validation rows" in shown


def test_files_are_checked_before_heavy_imports() -> None:
    code = (
        "import finetuning.prepare, sys; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert run([sys.executable, "-c", code]).out.strip() == "[]"


def test_exit_code_and_single_message(tmp_path: Path) -> None:
    done = python("train.py", TRAIN_JSONL=str(tmp_path / "none.jsonl"), DEVICE="cpu", USE_WANDB="false")
    assert done.code == 2
    assert done.err.strip().splitlines()[-1].startswith("error: TRAIN_JSONL:")
    assert "Traceback" not in done.err


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path: Path, demo_rows: list, write_jsonl: Any) -> None:
    """Over gloo, with a last step that does not divide: the same losses and gradient norms."""
    jsonl = write_jsonl(demo_rows[:9])
    logs = []
    for processes in (1, 2):
        output = tmp_path / f"out{processes}"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        done = run(
            [*command, "--standalone", "train.py"], ENV_FILE=".env.overfit", TRAIN_JSONL=str(jsonl), LOGGING_STEPS="1",
            OUTPUT_DIR=str(output), NUM_EPOCHS="2", BATCH_SIZE=str(4 // processes), GRADIENT_ACCUMULATION_STEPS="2",
            VERIFY_ROUNDTRIP="0", SAMPLE_STEPS="0", OMP_NUM_THREADS="1",
        )  # fmt: skip
        assert done.code == 0, done.err[-3000:]
        lines = (output / "training_log.jsonl").read_text().splitlines()
        logs.append([(record["loss"], record["grad_norm"]) for record in map(json.loads, lines)])
    assert len(logs[0]) == 4
    assert np.asarray(logs[1]) == pytest.approx(np.asarray(logs[0]), rel=1e-4)


# -------------------------------------------------------------------------------------------------------- scripts


def test_uv_train_says_what_is_missing(tmp_path: Path) -> None:
    done = run(["bash", str(PROJECT / "uv_train.sh"), "no-such.env"], cwd=tmp_path)
    assert done.code == 2
    assert "settings file no-such.env does not exist" in done.err


def test_launch_gpu_says_what_is_missing(tmp_path: Path) -> None:
    done = run(["bash", str(PROJECT / "launch_gpu.sh")], cwd=tmp_path, PATH="/usr/bin:/bin")
    assert done.code == 2
    assert "accelerate is not installed" in done.err


def test_launch_gpu_trains(tmp_path: Path, demo_rows: list, write_jsonl: Callable) -> None:
    jsonl = write_jsonl(demo_rows[:4])
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = run(
        ["bash", str(PROJECT / "launch_gpu.sh")], cwd=tmp_path, PATH=path, ENV_FILE=str(PROJECT / ".env.overfit"),
        TRAIN_JSONL=str(jsonl), OUTPUT_DIR=str(tmp_path / "out"), MAX_STEPS="1", VERIFY_ROUNDTRIP="0",
    )  # fmt: skip
    assert done.code == 0, done.err[-3000:]
    assert (tmp_path / "out" / "last" / "model.safetensors").is_file()
