"""A loopback Hub for datasets: enough of the Hub's API for ``datasets`` and ``huggingface_hub`` to read files."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopback import Answering, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopbackSecret"


@dataclass
class Hub:
    """A running server.

    Attributes:
        url: what HF_ENDPOINT must be.
        repositories: dataset id -> folder that it serves; may be changed while it runs.
        gated: ids that need TOKEN.
        is_down: while true, every connection is dropped without an answer.
        requests: (method, path) of every request.
        bytes_sent: bytes of file contents, by path in the repository.
    """

    repositories: Mapping[str, Path]
    gated: set[str] = field(default_factory=set)
    url: str = ""
    is_down: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)
    bytes_sent: dict[str, int] = field(default_factory=dict)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a subprocess that talks to this Hub and to no other; ``home`` holds its caches."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return kept | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | more


@contextmanager
def running_hub(repositories: Mapping[str, Path], gated: set[str] = frozenset()) -> Iterator[Hub]:
    with serving(_Handler, lambda url: Hub(repositories, set(gated), url)) as hub:
        yield hub


class _Handler(Answering):
    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if self.server.hub.is_down:
            self.close_connection = True
            return
        path = urllib.parse.unquote(self.path.split("?")[0])
        self.server.hub.requests.append((self.command, path))
        match = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)(/.*)?", path)
        name = match[1] if match else ""
        if name not in self.server.hub.repositories:
            return self._answer(401 if "/api/" not in path else 404, b"", {"X-Error-Code": "RepoNotFound"})
        folder = self.server.hub.repositories[name]
        if name in self.server.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, b"", {"X-Error-Code": "GatedRepo"})
        parts = (match[2] or "/revision/main").strip("/").split("/", 2)
        action, inside = parts[0], parts[2] if len(parts) > 2 else ""
        if action == "resolve":
            return self._file(folder, inside)
        if action == "revision":
            siblings = [{"rfilename": file.relative_to(folder).as_posix()} for file in _files(folder)]
            return self._json({"id": name, "sha": COMMIT, "siblings": siblings})
        if action == "tree":
            return self._tree(folder, inside, "recursive=true" in self.path.lower())
        if action == "paths-info":
            wanted = urllib.parse.parse_qs(body).get("paths", [])
            return self._json([_entry(folder, folder / one) for one in wanted if (folder / one).exists()])
        return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _tree(self, folder: Path, inside: str, recursive: bool) -> None:
        top = folder / inside
        if not top.is_dir():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        found = sorted(top.rglob("*") if recursive else top.iterdir())
        self._json([_entry(folder, path) for path in found])

    def _file(self, folder: Path, inside: str) -> None:
        file = folder / inside
        if not file.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        if self.command == "GET":
            sent = self.server.hub.bytes_sent
            sent[inside] = sent.get(inside, 0) + len(content)
        self._answer(status, content, headers)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    entry = {"path": path.relative_to(folder).as_posix(), "oid": hashlib.sha1(str(path).encode()).hexdigest()}
    if path.is_dir():
        return entry | {"type": "directory", "size": 0}
    return entry | {"type": "file", "size": path.stat().st_size}
