"""A loopback Hub that takes uploads of models: the API as ``huggingface_hub`` 0.36 uses it, LFS storage, and faults.

Speaks: whoami-v2, repos/create, validate-yaml, preupload, the LFS batch with single and multipart PUTs (whose sha256 is
checked), commit (NDJSON), model info, tree, resolve.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from loopback import Answering, serving

TOKEN, READER, NARROW, OTHER = "hf_writerSecret", "hf_readerSecret", "hf_narrowSecret", "hf_otherSecret"
#: Files of these endings, and larger ones, are stored apart, as the Hub's .gitattributes says.
LFS_SUFFIXES, LFS_BYTES = (".safetensors", ".bin", ".wav"), 10 * 2**20
LICENSES = ("apache-2.0", "mit", "other", "cc-by-4.0")


@dataclass
class Repository:
    """One model: its files, what was said of each commit, and its id where it has moved."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=lambda: ["initial commit"])
    id: str | None = None

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches.

    Attributes:
        times: how often.
        answer: a status, "drop" (the connection breaks in the middle of the body) or a function that is called first.
    """

    pattern: str
    answer: int | str | Callable[[], None]
    times: int = 1_000_000


@dataclass
class HubServer:
    """A running server.

    Attributes:
        repositories: by id.
        blobs: sha256 -> content of what is stored apart.
        is_xet: whether it asks for Xet, whose server is not spoken here, instead of LFS.
        part_bytes: size of a part; larger files are sent in several. None: in one piece.
        faults: may be changed while it runs.
        requests: "METHOD /path" of each.
        puts: sha256 (and number of the part) of each body that arrived whole.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    is_xet: bool = False
    part_bytes: int | None = None
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    puts: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """For a subprocess that talks to this Hub and to no other; ``home`` holds its caches."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        given = {"HF_TOKEN": token} if token else {}
        return kept | given | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def save(self, repository: str, folder: Path) -> Path:
        """The repository's files in a folder."""
        for name, content in self.repositories[repository].files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    def count(self, pattern: str) -> int:
        """Requests that match."""
        with self.lock:
            return sum(bool(re.search(pattern, request)) for request in self.requests)


def who(token: str | None) -> dict[str, Any] | None:
    """What whoami-v2 tells of a token; None of one that is not known."""
    scope = {"entity": {"type": "model", "name": "me/other"}, "permissions": ["repo.content.read", "repo.write"]}
    access = {
        TOKEN: {"role": "write"},
        READER: {"role": "read"},
        NARROW: {"role": "fineGrained", "fineGrained": {"global": [], "scoped": [scope]}},
        OTHER: {"role": "write"},
    }.get(token)
    if access is None:
        return None
    name, orgs = (
        ("stranger", []) if token == OTHER else ("me", [{"name": "ours"}, {"name": "club", "roleInOrg": "read"}])
    )
    return {"type": "user", "name": name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": access}}


@contextmanager
def running_hub() -> Iterator[HubServer]:
    with serving(_Handler, HubServer) as hub:
        yield hub


class _Handler(Answering):
    def _serve(self) -> None:
        hub: HubServer = self.server.hub
        path = urllib.parse.unquote(self.path.split("?")[0])
        request = f"{self.command} {path}"
        with hub.lock:
            hub.requests.append(request)
            fault = next((one for one in hub.faults if one.times and re.search(one.pattern, request)), None)
            if fault:
                fault.times -= 1
        length = int(self.headers.get("Content-Length") or 0)
        if fault and callable(fault.answer):
            fault.answer()
        elif fault and fault.answer == "drop":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        if fault and isinstance(fault.answer, int):
            return self._answer(fault.answer, b'{"error": "injected"}')
        self.query = dict(urllib.parse.parse_qsl(self.path.partition("?")[2]))
        for pattern, handle in self._routes().items():
            if match := re.fullmatch(pattern, request):
                return handle(body, *match.groups())
        return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _routes(self) -> dict[str, Callable[..., None]]:
        repository = r"([^/]+/[^/]+)"
        return {
            r"GET /api/whoami-v2": self._whoami,
            r"POST /api/repos/create": self._create,
            r"POST /api/validate-yaml": self._validate,
            rf"GET /api/models/{repository}(?:/revision/.+)?": self._info,
            rf"GET /api/models/{repository}/tree/main": self._tree,
            rf"POST /api/models/{repository}/preupload/main": self._preupload,
            rf"POST /api/models/{repository}/commit/main": self._commit,
            rf"GET /api/models/{repository}/xet-write-token/main": self._xet_token,
            rf"POST /{repository}\.git/info/lfs/objects/batch": self._batch,
            r"PUT /storage/(\w+)(?:/(\d+))?": self._put,
            r"POST /storage/(\w+)/complete": self._complete,
            r"POST /storage/(\w+)/verify": self._verify,
            rf"(?:GET|HEAD) /{repository}/resolve/[^/]+/(.+)": self._resolve,
        }

    # ------------------------------------------------------------------------------------------------------- who may

    def _user(self) -> dict[str, Any] | None:
        return who((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _may_write(self, name: str) -> bool:
        user = self._user()
        names = [user["name"], *(one["name"] for one in user["orgs"])] if user else []
        role = user and user["auth"]["accessToken"]["role"]
        return role == "write" and name.split("/")[0] in names

    def _find(self, name: str, to_write: bool = False) -> Repository | None:
        """The repository; else answers as the Hub does to whom it is closed, or who may not write."""
        found = self.server.hub.repositories.get(name)
        owner = name.split("/")[0]
        user = self._user()
        sees = found and (not found.private or (user and owner in [user["name"], *(o["name"] for o in user["orgs"])]))
        if not sees:
            self._answer(401 if user is None else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif to_write and not self._may_write(name):
            self._answer(403, b'{"error": "You do not have the rights to write here"}')
        else:
            return found
        return None

    # --------------------------------------------------------------------------------------------------- repositories

    def _whoami(self, _: bytes) -> None:
        user = self._user()
        self._json(user) if user else self._answer(401, b'{"error": "Invalid credentials"}')

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if self._user() is None:
            return self._answer(401, b'{"error": "Invalid credentials"}')
        if not self._may_write(name):
            return self._answer(403, b'{"error": "You do not have the rights to create a model there"}')
        with self.server.hub.lock:
            if name in self.server.hub.repositories:
                problem = {"error": "You already created this model repo", "url": f"{self.server.hub.url}/{name}"}
                return self._answer(409, json.dumps(problem).encode())
            self.server.hub.repositories[name] = Repository(asked.get("private", False))
        return self._json({"url": f"{self.server.hub.url}/{name}", "name": name})

    def _validate(self, body: bytes) -> None:
        problems = [{"message": one} for one in metadata_problems(json.loads(body)["content"])]
        self._answer(400 if problems else 200, json.dumps({"errors": problems, "warnings": []}).encode())

    def _info(self, _: bytes, name: str) -> None:
        if found := self._find(name):
            siblings = [{"rfilename": path} for path in sorted(found.files)]
            self._json({"id": found.id or name, "sha": found.sha, "private": found.private, "siblings": siblings})

    def _tree(self, _: bytes, name: str) -> None:
        if found := self._find(name):
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
                for path, content in sorted(found.files.items())
            ]
            self._json(entries)

    def _resolve(self, _: bytes, name: str, path: str) -> None:
        if (found := self._find(name)) is None:
            return None
        if path not in found.files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = found.files[path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": found.sha}
        return self._answer(200, content, headers)

    # --------------------------------------------------------------------------------------------------------- uploads

    def _preupload(self, body: bytes, name: str) -> None:
        if (found := self._find(name, to_write=True)) is None:
            return
        answers = []
        for one in json.loads(body)["files"]:
            apart = one["path"].endswith(LFS_SUFFIXES) or one["size"] > LFS_BYTES
            content = found.files.get(one["path"])
            oid = content if content is None else hashlib.sha256(content).hexdigest() if apart else git_hash(content)
            mode = "lfs" if apart else "regular"
            answers.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def _batch(self, body: bytes, name: str) -> None:
        if self._find(name, to_write=True) is None:
            return
        hub, objects = self.server.hub, []
        for one in json.loads(body)["objects"]:
            oid, size, answer = one["oid"], one["size"], dict(one)
            if oid not in hub.blobs:
                upload: dict[str, Any] = {"href": f"{hub.url}/storage/{oid}?X-Amz-Signature=signedSecret"}
                if hub.part_bytes and size > hub.part_bytes:
                    numbers = range(1, -(-size // hub.part_bytes) + 1)
                    parts = {str(number): f"{hub.url}/storage/{oid}/{number}" for number in numbers}
                    upload = {
                        "href": f"{hub.url}/storage/{oid}/complete",
                        "header": {"chunk_size": str(hub.part_bytes), **parts},
                    }
                answer["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/storage/{oid}/verify"}}
            objects.append(answer)
        if hub.is_xet:
            objects = [{"oid": one["oid"], "size": one["size"]} for one in objects]
        self._json({"transfer": "xet" if hub.is_xet else "basic", "objects": objects})

    def _xet_token(self, _: bytes, name: str) -> None:
        if self._find(name, to_write=True):
            url = f"{self.server.hub.url}/xet"
            headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xetSecret", "X-Xet-Token-Expiration": "9999999999"}
            self._answer(200, b"{}", headers)

    def _put(self, body: bytes, oid: str, part: str | None) -> None:
        hub = self.server.hub
        with hub.lock:
            hub.puts.append(oid if part is None else f"{oid}/{part}")
            if part is not None:
                hub.parts.setdefault(oid, {})[int(part)] = body
            elif hashlib.sha256(body).hexdigest() == oid:
                hub.blobs[oid] = body
            else:
                return self._answer(400, b"another sha256")
        return self._answer(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def _complete(self, body: bytes, oid: str) -> None:
        hub, told = self.server.hub, json.loads(body)["parts"]
        parts = hub.parts.get(oid, {})
        content = b"".join(parts[number] for number in sorted(parts))
        tags = [f'"{hashlib.md5(parts[one["partNumber"]]).hexdigest()}"' for one in told]
        if [one["etag"] for one in told] != tags or hashlib.sha256(content).hexdigest() != oid:
            return self._answer(400, b"another sha256")
        hub.blobs[oid] = content
        return self._json({})

    def _verify(self, body: bytes, oid: str) -> None:
        is_there = len(self.server.hub.blobs.get(oid, b"")) == json.loads(body)["size"]
        self._answer(200 if is_there else 404, b"{}")

    def _commit(self, body: bytes, name: str) -> None:
        if (found := self._find(name, to_write=True)) is None:
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        (summary,) = [line["value"]["summary"] for line in lines if line["key"] == "header"]
        files = dict(found.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.hub.blobs:
                    return self._answer(400, b'{"error": "a file is missing"}')
                files[value["path"]] = self.server.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        with self.server.hub.lock:
            found.files = files  # all of them at once
            found.commits.append(summary)
        url = f"{self.server.hub.url}/{name}/commit/{found.sha}"
        return self._json({"success": True, "commitOid": found.sha, "commitUrl": url, "hookOutput": ""})

    # ---------------------------------------------------------------------------------------------------------- answers


def git_hash(content: bytes) -> str:
    """As git names a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def metadata_problems(card: str) -> list[str]:
    """What the Hub would say of a card's metadata, by the rules that our cards can break."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if match is None:
        return ["no metadata"]
    data = yaml.safe_load(match[1])
    problems = []
    if "base_model" in data and not re.fullmatch(r"[\w.-]+/[\w.-]+", data["base_model"]):
        problems.append('"base_model" must be a model id')
    if data.get("base_model_relation", "finetune") not in ("adapter", "merge", "quantized", "finetune"):
        problems.append('"base_model_relation" must be one of adapter, merge, quantized, finetune')
    if data.get("license", "other") not in LICENSES:
        problems.append('"license" must be one of the list')
    if not all(re.fullmatch(r"[a-z]{2,3}", one) for one in data.get("language", [])):
        problems.append('"language" must be ISO 639 codes')
    if data.get("pipeline_tag") != "text-to-speech" or not all(isinstance(one, str) for one in data["tags"]):
        problems.append('"pipeline_tag" or "tags"')
    return problems


def slow(seconds: float) -> Callable[[], None]:
    """For ``Fault.answer``: the request takes so much longer."""
    return lambda: time.sleep(seconds)
