"""A base that is fetched from a Hub: the real download code against a loopback server that speaks the Hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROJECT

from finetuning.tiny_model import embedded_model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopbackSecret"


class _Hub(BaseHTTPRequestHandler):
    """Serves one public repository, me/tiny, and one that needs a token, me/gated."""

    def do_HEAD(self) -> None:
        self.do_GET(with_body=False)

    def do_GET(self, with_body: bool = True) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        path = self.path.split("?")[0]
        for name in ("me/tiny", "me/gated"):
            if path.startswith((f"/api/models/{name}", f"/{name}/resolve/")):
                break
        else:
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
        if name == "me/gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, b"", {"X-Error-Code": "GatedRepo"}, with_body)
        if path.startswith("/api/"):
            files = [str(file.relative_to(self.server.folder)) for file in self.server.files]
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            return self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, with_body)
        body = (self.server.folder / path.split(f"/resolve/{COMMIT}/")[1]).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._answer(200, body, headers, with_body)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[SimpleNamespace]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.folder = embedded_model_folder("tiny-random")
    server.files = [file for file in server.folder.rglob("*") if file.is_file()]
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", seen=server.seen, files=server.files)
    server.shutdown()


@pytest.fixture
def train_from_hub(
    hub: SimpleNamespace, tmp_path: Path, write_jsonl: Callable, demo_rows: list
) -> Callable[..., subprocess.CompletedProcess]:
    """train.py with the endpoint in its settings file, a cache of its own, and a single step."""

    def train(base: str, **settings: str) -> subprocess.CompletedProcess:
        file = {
            "HF_ENDPOINT": hub.url, "INIT_MODEL_PATH": base, "TRAIN_JSONL": write_jsonl(demo_rows[:4]),
            "OUTPUT_DIR": tmp_path / "output", "DEVICE": "cpu", "MIXED_PRECISION": "no", "USE_WANDB": "false",
            "MAX_STEPS": "1", "SAMPLE_STEPS": "0", "OVERWRITE_OUTPUT": "true",
        }  # fmt: skip
        lines = [f"{name}={value}\n" for name, value in (file | settings).items()]
        (tmp_path / "hub.env").write_text("".join(lines), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"ENV_FILE": str(tmp_path / "hub.env"), "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, str(PROJECT / "train.py")]
        return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120)

    return train


def test_base_from_the_hub(train_from_hub: Callable, hub: SimpleNamespace, tmp_path: Path) -> None:
    """HF_ENDPOINT in the settings file reaches the hub's library; the export is whole and free of links."""
    done = train_from_hub("me/tiny")
    assert done.returncode == 0, done.stderr[-3000:]
    snapshot = tmp_path / "hf" / "hub" / "models--me--tiny" / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").is_symlink()
    last = tmp_path / "output" / "last"
    assert not any(file.is_symlink() for file in last.rglob("*"))
    same = "speech_tokenizer/model.safetensors"
    assert (last / same).read_bytes() == (snapshot / same).read_bytes()
    assert json.loads((last / "training_state.json").read_text())["base"] == "me/tiny"

    # The second time nothing is fetched again, and DATA_MODE=none works from the cache without the network.
    hub.seen.clear()
    done = train_from_hub("me/tiny", DATA_MODE="none")
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.seen == []


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        ("me/missing", {}, "INIT_MODEL_PATH: me/missing cannot be fetched"),
        ("me/gated", {"HF_TOKEN": "hf_wrongButSecret"}, "INIT_MODEL_PATH: me/gated cannot be fetched"),
    ],
)
def test_out_of_reach_is_one_message(
    train_from_hub: Callable, base: str, settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = train_from_hub(base, **settings)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "hf_wrongButSecret" not in done.stdout + done.stderr
    assert not (tmp_path / "output").exists()


def test_the_token_of_the_settings_file_opens_a_gated_base(
    train_from_hub: Callable, hub: SimpleNamespace, tmp_path: Path
) -> None:
    done = train_from_hub("me/gated", HF_TOKEN=TOKEN, PREPARE_ONLY="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("/api/models/me/gated/revision/main", f"Bearer {TOKEN}") in hub.seen
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN in file.read_text(errors="ignore") for file in tmp_path.glob("output/**/*.json*"))
