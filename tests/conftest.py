"""Shared fixtures. Importing qwen_tts and building the tiny models take seconds, so both happen once a session."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}

PROJECT = Path(__file__).parent.parent
VOICE = PROJECT / "voices" / "english_voice"
SHAPES = ("tiny-random", "tiny-random-0.6b")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: at the end one worker would wait for the other."""
    items.sort(key=lambda item: item.path.stem not in ("test_roundtrip", "test_two_processes"))


@pytest.fixture(scope="module", autouse=True)
def no_accelerator_of_another_file() -> None:
    """Accelerate keeps its precision for the life of a process, which runs several files."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Settings of the developer's shell or .env must not reach a test."""
    from finetuning.settings import canonical_names

    for name in (*canonical_names(), "ENV_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("finetuning.settings.DEFAULT_ENV_FILE", "no-such-file.env")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite writes tens of gigabytes that are removed again at once; test_disk.py looks at what is flushed."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite ends hundreds of runs, each of which would draw for a second; test_plots.py looks at the pictures."""
    monkeypatch.setattr("finetuning.plots.draw_plots", lambda _: [])


@pytest.fixture(scope="session")
def demo_rows(codec: Any) -> list[dict[str, Any]]:
    """The demo's training rows with absolute paths and codes (of the tiny codec)."""
    from finetuning.audio import load_audio

    rows = [json.loads(line) for line in (VOICE / "train_raw.jsonl").read_text(encoding="utf-8").splitlines()]
    waveforms = [load_audio(VOICE / row["audio"]) for row in rows]
    paths = [{"audio": str(VOICE / row["audio"]), "ref_audio": str(VOICE / row["ref_audio"])} for row in rows]
    codes = codec.encode(waveforms)
    return [row | path | {"audio_codes": code.tolist()} for row, path, code in zip(rows, paths, codes, strict=True)]


@pytest.fixture(scope="session")
def codec() -> Any:
    """The tiny models' codec (the same in all of them)."""
    from finetuning.codec import Codec
    from finetuning.tiny_model import embedded_model_folder

    return Codec(embedded_model_folder("tiny-random") / "speech_tokenizer")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects, or strings as they are) to a JSONL file."""

    def write(rows: list[dict[str, Any] | str], name: str = "train.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Any]:
    """Settings for a run on the tiny model, on CPU in fp32, in a folder of the test; keywords are fields."""
    from finetuning.settings import load_settings

    def make(**fields: Any) -> Any:
        defaults = {
            "device": "cpu",
            "mixed_precision": "no",
            "init_model_path": "tiny-random",
            "output_dir": tmp_path / "output",
            "use_wandb": False,
            "resume": "never",
            "sample_steps": 0,
        }
        return load_settings(defaults | fields, environment={})

    return make


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for the codec wherever clips are encoded."""
    from fakes import FakeCodec

    fake_codec = FakeCodec()
    monkeypatch.setattr("finetuning.encoding.Codec", fake_codec.build)
    return fake_codec


@pytest.fixture
def codec_folder(tmp_path: Path) -> Path:
    """What a fingerprint is taken of."""
    folder = tmp_path / "codec"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def make_raw(tmp_path: Path) -> Callable[..., Path]:
    """``raw_clips.write_raw`` in tmp_path/data."""
    from raw_clips import write_raw

    return partial(write_raw, tmp_path / "data")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The toy layers are too small to share; on a busy machine a second thread makes them many times slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
