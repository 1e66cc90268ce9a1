"""Uploads, against a loopback server that speaks the Hub's API, with what may go wrong on the way."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import PROJECT
from hub_server import (
    NARROW,
    OTHER,
    READER,
    TOKEN,
    Fault,
    HubServer,
    Repository,
    metadata_problems,
    running_hub,
    slow,
    who,
)
from huggingface_hub import HfApi
from safetensors.numpy import save_file
from training import FULL, build, signal_in_step

from finetuning import hub as hub_room
from finetuning import session, starting, uploads
from finetuning.checkpoint import clean_up_leftovers
from finetuning.choosing import Chooser
from finetuning.disk import damage, in_use, link_or_copy, seal
from finetuning.errors import Stopped, UserError
from finetuning.hub import OutOfReach, Sent, access_problem, check_access, commit_message, send, stage, upload_command
from finetuning.settings import Settings
from finetuning.uploads import Uploader

CARD = """---
license: apache-2.0
pipeline_tag: text-to-speech
tags: [tts]
---
```python
model = Qwen3TTSModel.from_pretrained(".")
```
"""
#: A path of somebody's machine, which nobody else is to read.
PRIVATE_PATH = "/home/ada/secret project"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture
def talk_to(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., HfApi]:
    """Makes the loopback server the Hub of this process and of those that it starts."""

    def talk(token: str | None = TOKEN) -> HfApi:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token or ""}.items():
            monkeypatch.setenv(name, value)
        return HfApi(endpoint=hub.url)

    return talk


def write_checkpoint(folder: Path, step: int = 7, size: int = 50_000, with_adapter: bool = False) -> Path:
    """What an upload is told apart by, with random weights of so many floats."""
    (folder / "speech_tokenizer").mkdir(parents=True)
    (folder / "speaker_encoder").mkdir()
    random = np.random.default_rng(step)
    save_file({"weight": random.standard_normal(size).astype(np.float32)}, folder / "model.safetensors")
    save_file({"codec": np.arange(20_000, dtype=np.float32)}, folder / "speech_tokenizer" / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen3_tts"}')
    (folder / "README.md").write_text(CARD)
    state = {"step": step, "best_by": "validation loss", "best_metric": "loss", "best_value": 2.25, "best_step": step}
    state |= {"metrics": {"loss": 2.5}, "train_loss": 2.75, "base": f"{PRIVATE_PATH}/Qwen3-TTS"}
    (folder / "training_state.json").write_text(json.dumps(state))
    speakers = {"ada": {"codec_id": 3000, "references": [f"{PRIVATE_PATH}/ada.wav"]}}
    (folder / "speaker_encoder" / "speaker_config.json").write_text(json.dumps({"speakers": speakers}))
    if with_adapter:
        (folder / "adapter").mkdir()
        save_file({"a": np.zeros(3, np.float32)}, folder / "adapter" / "adapter_model.safetensors")
        config = {"base_model_name_or_path": f"{PRIVATE_PATH}/Qwen3-TTS"}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        listed = [{"name": "ada", "codec_id": 3000, "references": [f"{PRIVATE_PATH}/ada.wav"]}]
        (folder / "adapter" / "speakers.json").write_text(json.dumps(listed))
    seal(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "output" / "best")


@pytest.fixture
def ready(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint, staged for me/voice."""
    stage(checkpoint, tmp_path / "staged", "me/voice")
    return tmp_path / "staged"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def received(hub: HubServer, repository: str = "me/voice") -> dict[str, bytes]:
    files = dict(hub.repositories[repository].files)
    assert files.pop(".gitattributes")
    return files


def weights_hash(folder: Path) -> str:
    """By which the storage knows the weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- staging


def test_staging_links_weights_and_leaves_paths_behind(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "best", with_adapter=True)
    (folder / ".hidden").write_text("x")
    before = contents(folder)
    stage(folder, tmp_path / "staged", "me/voice")
    staged = tmp_path / "staged"
    assert contents(folder) == before
    for name in ("model.safetensors", "speech_tokenizer/model.safetensors"):
        assert (staged / name).samefile(folder / name)
    after = contents(staged)
    assert after.keys() == before.keys() - {".hidden"}
    assert not any(b"/home" in content for content in after.values())
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {
        "README.md", "training_state.json", "speaker_encoder/speaker_config.json", "adapter/adapter_config.json",
        "adapter/speakers.json", "checksums.json",
    }  # fmt: skip
    assert damage(staged) == []
    assert b'from_pretrained("me/voice")' in after["README.md"]
    assert json.loads(after["training_state.json"])["base"] == "Qwen3-TTS"
    assert json.loads(after["adapter/speakers.json"])[0]["references"] == ["ada.wav"]


def test_a_folder_that_is_replaced_meanwhile_is_staged_whole(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, older = write_checkpoint(tmp_path / "newer", step=8), tmp_path / "older"

    def copy(source: str, target: str) -> str:
        done = link_or_copy(source, target)
        parts = [checkpoint / name for name in ("model.safetensors", "training_state.json", "checksums.json")]
        if Path(source) in parts and not older.exists():  # the first of them: the others are going to be newer
            checkpoint.rename(older)
            newer.rename(checkpoint)
        return done

    monkeypatch.setattr(hub_room, "link_or_copy", copy)
    stage(checkpoint, tmp_path / "staged", "me/voice")
    assert damage(tmp_path / "staged") == []
    assert (tmp_path / "staged" / "model.safetensors").samefile(checkpoint / "model.safetensors")
    assert json.loads((tmp_path / "staged" / "training_state.json").read_text())["step"] == 8
    assert damage(checkpoint) == damage(older) == []


def test_what_is_staged_does_not_change_with_the_folder(checkpoint: Path, ready: Path) -> None:
    before = contents(ready)
    shutil.rmtree(checkpoint)
    write_checkpoint(checkpoint, step=8)
    assert contents(ready) == before


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "Step 7, validation loss 2.2500"),
        ({"best_step": 3}, "Step 7, validation loss 2.5000"),
        ({"best_step": 3, "metrics": {}}, "Step 7, training loss 2.7500"),
        ({"best_step": 3, "metrics": {}, "train_loss": None}, "Step 7"),
        ({"merged": []}, "Merged adapters"),
        ({"step": None}, "Checkpoint"),
    ],
)
def test_commit_message(checkpoint: Path, state: dict[str, Any], message: str) -> None:
    known = json.loads((checkpoint / "training_state.json").read_text())
    (checkpoint / "training_state.json").write_text(json.dumps(known | state))
    assert commit_message(checkpoint) == message


# ------------------------------------------------------------------------------------------------------------- sending


def test_an_upload_arrives_whole_in_one_commit(hub: HubServer, talk_to: Callable, ready: Path) -> None:
    sent = send(ready, "me/voice", private=True, api=talk_to())
    assert received(hub) == contents(ready)
    repository = hub.repositories["me/voice"]
    assert repository.private and repository.commits == ["initial commit", "Step 7, validation loss 2.2500"]
    assert sent == Sent(f"{hub.url}/me/voice/commit/{repository.sha}", is_news=True, is_public=False)
    assert hub.count("GET .*/resolve/") == 0  # nothing is fetched

    again = send(ready, "me/voice", private=True, api=talk_to())
    assert not again.is_news and len(repository.commits) == 2 and len(hub.puts) == 2


def test_large_files_go_in_parts(hub: HubServer, talk_to: Callable, ready: Path) -> None:
    hub.part_bytes = 64_000
    send(ready, "me/voice", private=False, api=talk_to())
    assert received(hub) == contents(ready)
    assert not hub.repositories["me/voice"].private
    assert sum(put.startswith(weights_hash(ready)) for put in hub.puts) == -(-200_080 // 64_000)


def test_xet_is_handed_the_files(
    hub: HubServer, talk_to: Callable, ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own server is not spoken here, so the library that talks to it is stood in for."""
    hub.is_xet, calls = True, []

    def upload_files(paths: list[str], endpoint: str, token: tuple[str, int], *_: Any) -> None:
        calls.append((endpoint, token[0]))
        for content in (Path(path).read_bytes() for path in paths):
            hub.blobs[hashlib.sha256(content).hexdigest()] = content

    monkeypatch.setattr("hf_xet.upload_files", upload_files)
    send(ready, "me/voice", private=True, api=talk_to())
    assert received(hub) == contents(ready)
    assert calls == [(f"{hub.url}/xet", "xetSecret")] and hub.puts == []

    def broken(*_: Any) -> None:
        calls.append("broken")
        raise RuntimeError(f"Network error: {hub.url}/xet?signature=secret")

    monkeypatch.setattr("hf_xet.upload_files", broken)
    hub.repositories.clear()
    with pytest.raises(OutOfReach, match="Network error: …") as refused:
        send(ready, "me/voice", private=True, api=talk_to(), waits_seconds=(0,))
    assert calls[1:] == ["broken", "broken"] and "secret" not in str(refused.value)


def test_a_later_upload_replaces_what_would_be_loaded_with_it(
    hub: HubServer, talk_to: Callable, ready: Path, tmp_path: Path
) -> None:
    stage(write_checkpoint(tmp_path / "lora", with_adapter=True), tmp_path / "with_adapter", "me/voice")
    api = talk_to()
    send(tmp_path / "with_adapter", "me/voice", private=True, api=api)
    mine = {"tokenizer.json": b"{}", "samples/hello.wav": b"RIFF", "notes.json": b"{}"}
    hub.repositories["me/voice"].files |= mine
    send(ready, "me/voice", private=True, api=api)
    kept = {name: mine[name] for name in ("samples/hello.wav", "notes.json")}
    assert received(hub) == contents(ready) | kept


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST /api/repos/create", 500, times=2),
        Fault("preupload", 503, times=1),
        Fault("PUT", 500, times=2),
        Fault("PUT", 403, times=1),  # of the storage: a signature that has expired
        Fault("PUT", "drop", times=1),
        Fault("PUT", "drop", times=7),  # more than the library's own attempts
        Fault("commit", "drop", times=1),
        Fault("commit", 429, times=1),
        Fault("commit", 412, times=1),  # another commit came first
        Fault("PUT", slow(0.5)),
    ],
    ids=lambda fault: f"{fault.pattern}-{getattr(fault.answer, '__name__', fault.answer)}-{fault.times}",
)
def test_what_passes_is_tried_again(hub: HubServer, talk_to: Callable, ready: Path, fault: Fault) -> None:
    hub.faults.append(fault)
    send(ready, "me/voice", private=True, api=talk_to(), waits_seconds=(0, 0, 0))
    assert received(hub) == contents(ready)
    assert len(hub.repositories["me/voice"].commits) == 2


def test_after_a_break_only_what_is_missing_is_sent(hub: HubServer, talk_to: Callable, ready: Path) -> None:
    weights = weights_hash(ready)
    fault = Fault(f"PUT /storage/{weights}", "drop")
    hub.faults.append(fault)
    with pytest.raises(OutOfReach, match="connection"):
        send(ready, "me/voice", private=True, api=talk_to(), waits_seconds=())
    assert hub.repositories["me/voice"].commits == ["initial commit"]  # nobody loads half of it
    assert len(hub.puts) == 1 and weights not in hub.puts  # the codec has arrived
    hub.faults.clear()
    send(ready, "me/voice", private=True, api=talk_to(), waits_seconds=())
    assert hub.puts[1:] == [weights]
    assert received(hub) == contents(ready)


@pytest.mark.parametrize(
    ("token", "fault", "message"),
    [
        ("hf_unknownSecret", None, "the Hub refuses me/voice: 401 Invalid credentials. If it is about the token"),
        (READER, None, "the Hub refuses me/voice: 403 You do not have the rights"),
        (OTHER, None, "the Hub refuses me/voice: 403 You do not have the rights"),
        (TOKEN, Fault("preupload", 403), "the Hub refuses me/voice: 403 injected. If it is about the token (HF_TOKEN)"),
        (TOKEN, Fault("batch", 401), "the Hub refuses me/voice: 401 injected"),
        (TOKEN, Fault("commit", 413), "the Hub refuses me/voice: 413"),
    ],
)
def test_a_refusal_is_final(
    hub: HubServer, talk_to: Callable, ready: Path, token: str, fault: Fault | None, message: str
) -> None:
    hub.faults += [fault] if fault else []
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        send(ready, "me/voice", private=True, api=talk_to(token), waits_seconds=(60,))
    assert "Secret" not in str(refused.value) and not isinstance(refused.value, OutOfReach)


def test_a_card_that_the_hub_refuses(hub: HubServer, talk_to: Callable, ready: Path) -> None:
    (ready / "README.md").write_text(CARD.replace("apache-2.0", "of my own"))
    with pytest.raises(UserError, match='the Hub refuses me/voice: 400 "license" must be one of'):
        send(ready, "me/voice", private=True, api=talk_to(), waits_seconds=(60,))


def test_a_bug_is_no_network(ready: Path, talk_to: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("bug")

    api = talk_to()
    monkeypatch.setattr(api, "create_repo", broken)
    with pytest.raises(KeyError):
        send(ready, "me/voice", private=True, api=api)


# -------------------------------------------------------------------------------------------------------------- asking


@pytest.mark.parametrize(
    ("token", "repository", "is_there", "problem"),
    [
        (TOKEN, "me/voice", False, None),
        (TOKEN, "ME/voice", False, None),
        (TOKEN, "ours/voice", False, None),
        (TOKEN, "theirs/voice", False, "theirs is neither me, whose token this is, nor an organisation of me"),
        (TOKEN, "theirs/voice", True, "theirs is neither me"),
        (TOKEN, "club/voice", False, "me may only read in club"),
        (TOKEN, "club/voice", True, None),  # said, and the upload will tell
        (READER, "me/voice", True, "may only read"),
        (NARROW, "me/voice", True, "the fine-grained token of me may not write to me/voice"),
        (NARROW, "me/other", True, None),
        (NARROW, "me/other", False, "may not make me/other"),
    ],
)
def test_who_may_write(token: str, repository: str, is_there: bool, problem: str | None) -> None:
    found = access_problem(who(token), repository, is_there)
    assert found is None if problem is None else problem in found


def test_a_fine_grained_token_of_the_owner_may_write() -> None:
    scope = {"entity": {"type": "user", "name": "Me"}, "permissions": ["repo.write"]}
    user = {"name": "Me", "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}}}
    assert access_problem(user, "me/voice", is_there=False) is None
    scope["entity"]["type"] = "space"
    assert access_problem(user, "me/voice", is_there=False)
    scope |= {"entity": {"type": "org", "name": "me"}, "permissions": ["repo.content.read"]}
    assert access_problem(user, "me/voice", is_there=False)
    assert access_problem({"name": "me"}, "me/voice", is_there=False) is None  # an answer of another form


def test_the_start_asks_and_changes_nothing(hub: HubServer, talk_to: Callable) -> None:
    talk_to()
    hub.repositories["me/open"] = Repository(private=False)
    found = check_access({"best": "me/open", "last": "me/new"}, private=True)
    assert found == [
        "best/ to me/open (there, public (HUB_PRIVATE is for repositories that are made, this one stays public))",
        "last/ to me/new (to be made, private)",
    ]
    assert list(hub.repositories) == ["me/open"] and hub.count("POST") == 0


@pytest.fixture
def uploading(make_settings: Callable) -> Callable[..., Settings]:
    """Settings that send best/ to me/voice and last/ to me/last."""

    def make(**fields: Any) -> Settings:
        repositories = {"hub_model_id_best": "me/voice", "hub_model_id_last": "me/last"}
        return make_settings(**({"upload_to_hub": True} | repositories | fields))

    return make


def test_the_start_refuses_what_cannot_be_sent(hub: HubServer, talk_to: Callable, uploading: Callable) -> None:
    for token, message in [
        (None, "HF_TOKEN: an upload needs a token"),
        ("hf_…Secret", "HF_TOKEN: is no token"),
        ("hf_unknownSecret", "the Hub refuses me/voice, me/last: 401"),
        (READER, "HUB_MODEL_ID_BEST: the token of me may only read"),
        (OTHER, "HUB_MODEL_ID_BEST: me is neither stranger"),
    ]:
        talk_to(token)
        with pytest.raises(UserError, match=re.escape(message)) as refused:
            starting.check_upload(uploading())
        assert "Secret" not in str(refused.value)


def test_the_start_goes_on_where_the_hub_does_not_answer(
    hub: HubServer, talk_to: Callable, uploading: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    talk_to()
    hub.faults.append(Fault("whoami", "drop", times=1))
    starting.check_upload(uploading())
    assert "warning: UPLOAD_TO_HUB: the Hub cannot be reached: the connection failed" in capsys.readouterr().out
    hub.faults.append(Fault("whoami", 503, times=1))
    starting.check_upload(uploading())
    assert "cannot be reached: 503" in capsys.readouterr().out
    starting.check_upload(uploading())
    assert "Hub: best/ to me/voice (to be made, private); last/ to me/last" in capsys.readouterr().out


def test_the_start_does_not_wait_for_a_hub_that_is_silent(
    hub: HubServer, talk_to: Callable, uploading: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_room, "ASKING_SECONDS", 0.2)
    hub.faults.append(Fault("whoami", slow(1)))
    with pytest.raises(OutOfReach, match=re.escape("did not answer within 0.2 s")):
        check_access(uploading().repositories(), private=True, api=talk_to())


def test_who_may_write_where_a_repository_is_now(hub: HubServer, talk_to: Callable) -> None:
    """It may have moved to another owner; and a role that may not do is said."""
    api = talk_to()
    hub.repositories |= {"me/voice": Repository(private=False), "club/voice": Repository(private=False)}
    assert "your role in that organisation is read" in check_access({"best": "club/voice"}, True, api)[0]
    hub.repositories["me/voice"].id = "theirs/voice"
    with pytest.raises(UserError, match="HUB_MODEL_ID_BEST: theirs is neither me"):
        check_access({"best": "me/voice"}, True, api)


def test_the_token_is_in_no_message(talk_to: Callable) -> None:
    talk_to("api_org_Secret")
    assert hub_room.scrubbed("no api_org_Secret, no hf_Other, no http://host/?signature=x\nmore") == "no …, no …, no …"


def test_a_repository_alone_sends_nothing(uploading: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    starting.check_upload(uploading(upload_to_hub=False))
    assert "UPLOAD_TO_HUB is false: nothing is sent" in capsys.readouterr().out


def test_the_preflight_asks_too(hub: HubServer, talk_to: Callable, uploading: Callable) -> None:
    """There a Hub that does not answer is a failure."""
    from test_setup import Preflight

    preflight = Preflight()
    preflight.settings = uploading()
    talk_to()
    assert preflight.hub() == "best/ to me/voice (to be made, private); last/ to me/last (to be made, private)"
    hub.faults.append(Fault("whoami", "drop"))
    preflight.check("upload to the Hub", preflight.hub)
    assert preflight.num_failed == 1


def test_offline_by_the_settings(talk_to: Callable, uploading: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    talk_to()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        starting.check_upload(uploading())


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_that_is_told_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.delenv("ENV_FILE", raising=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    told = upload_command(Path("my runs/best"), "me/voice", private=False)
    assert told == "python -m finetuning.hub upload 'my runs/best' --repo me/voice --public"
    assert hub_room.parse_arguments(shlex.split(told)[3:]).folder == Path("my runs/best")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENV_FILE", "my own.env")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", str(PROJECT / ".venv" / "bin" / "python"))
    told = upload_command(tmp_path / "best", "me/voice", private=True)
    python = PROJECT / ".venv" / "bin" / "python"
    shorter = min(str(python), os.path.relpath(python), key=len)
    command = f"{shorter} -m finetuning.hub upload best --repo me/voice"
    assert told == f"ENV_FILE='my own.env' PYTHONPATH={shlex.quote(str(PROJECT))} {command}"


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "finetuning.hub", "upload", *map(str, arguments)],
        cwd=PROJECT, env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_command_reads_the_token_of_the_settings_file(
    hub: HubServer, talk_to: Callable, checkpoint: Path, tmp_path: Path
) -> None:
    """And the Hub's address; what else is wrong there does not matter."""
    talk_to(None)
    file = tmp_path / "my.env"
    file.write_text(f"HF_TOKEN={TOKEN}\nHF_ENDPOINT={hub.url}\nEFFECTIVE_BATCH_SIZE=3\n")
    for name in (".best.upload-dead.tmp", ".best.upload-used.tmp"):
        checkpoint.with_name(name).mkdir()
    with in_use(checkpoint.with_name(".best.upload-used.tmp")):  # by another upload
        done = command(checkpoint, "--repo", "me/voice", "--public", ENV_FILE=str(file), HF_ENDPOINT="")
    assert done.returncode == 0, done.stderr
    assert f"Done: {hub.url}/me/voice/commit/" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert not hub.repositories["me/voice"].private
    assert damage(hub.save("me/voice", tmp_path / "received")) == []
    assert {path.name for path in checkpoint.parent.iterdir()} == {"best", ".best.upload-used.tmp"}
    clean_up_leftovers(checkpoint.parent)  # as a run does
    assert [path.name for path in checkpoint.parent.iterdir()] == ["best"]


def test_exit_codes_of_the_command(hub: HubServer, talk_to: Callable, checkpoint: Path) -> None:
    talk_to(READER)
    refused = command(checkpoint, "--repo", "me/voice")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith("error: the Hub refuses me/voice: 403 You do not have the rights")
    assert READER not in refused.stdout + refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upload", "{best}", "--repo", "voice"], "--repo: names no repository; write it as owner/name"),
        (["upload", "{output}", "--repo", "me/voice"], "is no checkpoint (best/ and last/ inside of it are)"),
        (["upload", "{output}/none", "--repo", "me/voice"], "is no checkpoint: config.json or model.safetensors"),
        (["upload", "{damaged}", "--repo", "me/voice"], "is damaged: model.safetensors has"),
    ],
)
def test_what_the_command_refuses(
    checkpoint: Path, talk_to: Callable, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk_to()
    output = checkpoint.parent
    shutil.copytree(checkpoint, output / "last")
    with (output / "last" / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    places = {"best": checkpoint, "output": output, "damaged": output / "last"}
    monkeypatch.setattr(sys, "argv", ["hub", *(one.format(**places) for one in arguments)])
    with pytest.raises(UserError, match=re.escape(message)):
        hub_room.main()


def start_upload(*arguments: str | Path, **options: Any) -> subprocess.Popen:
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen(
        [sys.executable, "-m", "finetuning.hub", "upload", *map(str, arguments)], cwd=PROJECT, **pipes, **options
    )


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def blocked(hub: HubServer) -> Iterator[threading.Event]:
    """The storage takes nothing until the event is set."""
    event = threading.Event()
    hub.faults.append(Fault("PUT", lambda: event.wait(60)))
    yield event
    event.set()


def test_ctrl_c_ends_the_command_at_once(
    hub: HubServer, talk_to: Callable, checkpoint: Path, blocked: threading.Event
) -> None:
    """Though threads are sending; nothing stays behind, and the same command goes on."""
    talk_to()
    process = start_upload(checkpoint, "--repo", "me/voice")
    wait_for(lambda: hub.count("PUT") == 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and b"the same command goes on" in errors and b"Traceback" not in errors
    assert [path.name for path in checkpoint.parent.iterdir()] == ["best"]


def test_an_upload_ends_with_the_run_that_started_it(
    hub: HubServer, talk_to: Callable, checkpoint: Path, blocked: threading.Event
) -> None:
    talk_to()
    process = start_upload(checkpoint, "--repo", "me/voice", "--for-run", "6")
    wait_for(lambda: hub.count("PUT"))
    process.stdin.close()  # as it is when the run is killed
    assert process.wait(timeout=20) == 1
    process.stdout.close()
    process.stderr.close()


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def short(uploading: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Settings]:
    """A run of a few steps that sends both."""

    def make(**fields: Any) -> Settings:
        held_out = write_jsonl(demo_rows[4:6], "held_out.jsonl")
        rows = {"train_jsonl": write_jsonl(demo_rows[:4]), "validation_jsonl": held_out}
        steps = {"max_steps": 3, "batch_size": 2, "gradient_accumulation_steps": 1, "eval_steps": 1}
        return uploading(**(FULL | rows | steps | {"learning_rate": 1e-3, "resume": "auto"} | fields))

    return make


def test_a_run_sends_both_at_its_end(
    hub: HubServer,
    talk_to: Callable,
    short: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    talk_to()
    run = build(short())
    session.train(run)
    output, said = run.settings.output_dir, capsys.readouterr().out
    for name, repository in (("best", "me/voice"), ("last", "me/last")):
        commit = f"{hub.url}/{repository}/commit/{hub.repositories[repository].sha}"
        assert f"{name}/ is on the Hub: {commit}" in said
        copy = hub.save(repository, tmp_path / name)
        assert damage(copy) == []
        assert metadata_problems((copy / "README.md").read_text()) == []
        here = contents(output / name)
        edited = {"README.md", "training_state.json", "speaker_encoder/speaker_config.json", "checksums.json"}
        assert {key for key, content in received(hub, repository).items() if content != here[key]} <= edited
        assert received(hub, repository).keys() == here.keys()
        (_, summary) = hub.repositories[repository].commits
        assert re.fullmatch(r"Step \d, validation loss \d+\.\d{4}", summary)
    assert not list(output.glob(".*upload*"))

    files = hub.repositories["me/voice"].files  # what people load by its name, as its card says
    config = json.loads(files["generation_config.json"]) | {"max_new_tokens": 4}
    files["generation_config.json"] = json.dumps(config).encode()
    (block,) = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    assert 'from_pretrained("me/voice")' in block
    for name in ("transformers.utils.hub.TRANSFORMERS_CACHE", "huggingface_hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(name, str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", False)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["sample_rate"] == 24000 and len(names["waveforms"][0])
    assert hub.count("/me/voice/resolve/main/model.safetensors")

    files["generation_config.json"] = (output / "best" / "generation_config.json").read_bytes()
    session.train(build(run.settings))  # it is complete: what is there already is not sent again
    assert "best/ was on the Hub already" in capsys.readouterr().out and len(hub.repositories["me/voice"].commits) == 2


def test_training_does_not_wait_for_a_slow_hub(
    hub: HubServer,
    talk_to: Callable,
    short: Callable,
    blocked: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """HUB_EVERY=save: the storage takes nothing until all is trained; of the saves meanwhile the newest goes."""
    talk_to()
    run = build(short(hub_every="save", max_steps=4, hub_model_id_last=None))
    offer, finish, seen = Uploader.offer, Uploader.finish, {}

    def offer_then(uploader: Uploader, names: list[str]) -> None:
        offer(uploader, names)
        wait_for(lambda: hub.count("PUT"))  # the first save is on its way

    def finish_then(uploader: Uploader) -> None:
        seen["done while it trained"] = list(hub.puts)
        seen["waiting"] = [path.name for path in run.settings.output_dir.glob(".best.upload-*")]
        blocked.set()
        finish(uploader)

    monkeypatch.setattr(Uploader, "offer", offer_then)
    monkeypatch.setattr(Uploader, "finish", finish_then)
    monkeypatch.setattr(Chooser, "_is_better", lambda *_: True)  # so that each evaluation saves
    session.train(run)
    assert seen["done while it trained"] == [] and len(seen["waiting"]) == 1
    steps = [int(re.match(r"Step (\d)", one)[1]) for one in hub.repositories["me/voice"].commits[1:]]
    state = json.loads((run.settings.output_dir / "best" / "training_state.json").read_text())
    assert len(steps) == 2 and steps[0] < steps[1] == state["step"]
    assert (run.settings.output_dir / "best" / "model.safetensors").read_bytes() == received(hub)["model.safetensors"]


def test_a_stop_saves_first_and_leaves_the_upload(
    hub: HubServer, talk_to: Callable, short: Callable, blocked: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM while an upload hangs; the run that goes on sends what the first one could not."""
    talk_to()
    settings = short(hub_every="save", max_steps=5)
    run, make_trainer = build(settings), session.make_trainer

    def make(*arguments: Any) -> Any:
        trainer = make_trainer(*arguments)
        signal_in_step(trainer, 3)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "make_trainer", make)
        with pytest.raises(Stopped):
            session.train(run)
    assert (settings.output_dir / "state" / "step-3").is_dir()
    said = capsys.readouterr().out
    assert f"{settings.output_dir / 'last'} is not on the Hub. The same run, started again" in said
    assert "python -m finetuning.hub upload" in said
    assert not list(settings.output_dir.glob(".*upload*")) and hub.blobs == {}

    run.lock.close()
    blocked.set()
    session.train(build(settings))
    assert hub.repositories["me/last"].commits[-1].startswith("Step 5,")
    assert damage(hub.save("me/last", settings.output_dir.parent / "received")) == []


def test_ctrl_c_while_the_end_waits(
    hub: HubServer,
    talk_to: Callable,
    uploading: Callable,
    blocked: threading.Event,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In a working directory of the user's own."""
    talk_to()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(uploads, "NEWS_SECONDS", 0.3)
    settings = uploading(hub_model_id_last=None)
    write_checkpoint(settings.output_dir / "best")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def interrupt() -> None:
        wait_for(lambda: hub.count("PUT"))
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped) as stopped, Uploader(settings) as uploader:
        uploader.finish()
    assert stopped.value.exit_code == 130
    said = capsys.readouterr().out
    assert "waiting for the upload of best/ to me/voice" in said
    assert f"warning: {settings.output_dir / 'best'} is not on the Hub" in said
    assert uploader._process is None and not uploader._worker.is_alive() and hub.blobs == {}
    assert [path.name for path in settings.output_dir.iterdir()] == ["best"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("tempfile.TemporaryFile", OSError("No space left on device")),
        ("subprocess.Popen", OSError("Cannot allocate memory")),
        ("subprocess.Popen", RuntimeError("a bug")),
        ("finetuning.uploads.Uploader._next", SystemExit("the thread ends")),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_fails_costs_nothing_but_the_upload(
    part: str, error: BaseException, uploading: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = uploading(hub_every="save")
    for name in ("best", "last"):
        write_checkpoint(settings.output_dir / name)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch, Uploader(settings) as uploader:
        patch.setattr(part, fail)
        uploader.offer(["last", "checkpoint-7", "best"])
        uploader.finish()
    said = capsys.readouterr().out
    assert said.count("could not be sent to the Hub. Everything is saved here") == 2
    assert str(error) in said or isinstance(error, SystemExit)
    assert sorted(path.name for path in settings.output_dir.iterdir()) == ["best", "last"]


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[list[str]]]:
    """Puts some Python in the place of the process of an upload; gives the commands that it is called by."""
    start, commands = subprocess.Popen, []

    def put(code: str) -> list[list[str]]:
        def popen(command: list[str], **options: Any) -> subprocess.Popen:
            commands.append(command)
            return start([sys.executable, "-S", "-c", code], **options)

        monkeypatch.setattr("subprocess.Popen", popen)
        return commands

    return put


def test_a_hub_out_of_reach_is_waited_for_once(
    uploading: Callable, child: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second repository of the same Hub gets a single attempt."""
    settings = uploading(hub_every="save")
    for name in ("best", "last"):
        write_checkpoint(settings.output_dir / name)
    commands = child("""print('{"error": "away", "is_out_of_reach": true}')""")
    with Uploader(settings) as uploader:
        uploader.finish()
    assert [command[command.index("--for-run") + 1] for command in commands] == ["6", "1"]
    assert capsys.readouterr().out.count("could not be sent to the Hub. Everything is saved here") == 2


def test_an_upload_that_stalls_is_given_up(
    uploading: Callable, child: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it writes the same: only a bar with another amount is progress."""
    monkeypatch.setattr(uploads, "STALL_SECONDS", 0.5)
    settings = uploading(hub_model_id_last=None)
    write_checkpoint(settings.output_dir / "best")
    child("import time\nwhile True: print('a: 5%|# | 1M/20M [', flush=True); time.sleep(0.1)")
    with Uploader(settings) as uploader:
        uploader.finish()
    assert "(nothing more was sent for " in capsys.readouterr().out and uploader._process is None


def test_an_upload_makes_room(uploading: Callable, child: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """Its copy goes at once; what this process saved stays owed, and nothing else is spoken of."""
    settings = uploading(hub_every="save")
    copy = settings.output_dir / ".best.upload-x.tmp"
    for name in ("best", "last"):
        write_checkpoint(settings.output_dir / name)
    commands = child(f"import os, time; os.mkdir({str(copy)!r}); time.sleep(60)")
    with pytest.raises(KeyError), Uploader(settings) as uploader:
        uploader.offer(["best"])
        wait_for(copy.is_dir)
        uploader.make_room()
        assert not copy.exists() and uploader._process is None
        raise KeyError
    said = capsys.readouterr().out
    assert len(commands) == 1 and "it made room on the disk for a save" in said
    assert said.count("is not on the Hub") == 1 and f"{settings.output_dir / 'best'} is not on the Hub" in said


def test_the_other_processes_need_not_wait_for_uploads(uploading: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(session, "train_and_verify", lambda *_: done.append("trained"))
    monkeypatch.setattr(session, "part_from_the_others", lambda: done.append("parted"))
    monkeypatch.setattr(Uploader, "finish", lambda _: done.append("sent"))
    for is_main in (True, False):
        session.train(SimpleNamespace(settings=uploading(), is_main=is_main))
    assert done == ["trained", "parted", "sent", "trained", "parted"]


def test_what_a_killed_run_had_staged_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".best.upload-3.tmp" / "adapter").mkdir(parents=True)
    clean_up_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_repositories_nothing_is_started(make_settings: Callable) -> None:
    with Uploader(make_settings()) as uploader:
        uploader.offer(["best", "last"])
        uploader.finish()
    assert not uploader._worker.is_alive()


def test_a_run_whose_upload_fails_ends_well_and_the_token_is_nowhere(
    hub: HubServer, tmp_path: Path, write_jsonl: Callable, demo_rows: list[dict]
) -> None:
    """A whole run by its settings file, with W&B. What cannot be sent is said with the command that sends it; neither
    what is printed, nor any file that is left, nor what arrives holds the token or a signature."""
    hub.faults += [Fault("PUT", 500, times=1), Fault("POST /api/models/me/last/commit", 403)]
    lines = {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "UPLOAD_TO_HF": "true", "HF_BEST_MODEL_REPO": "me/voice",
        "HF_LAST_MODEL_REPO": "me/last", "HUB_PRIVATE": "false", "INIT_MODEL_PATH": "tiny-random",
        "TRAIN_JSONL": write_jsonl(demo_rows[:4]),
        "OUTPUT_DIR": tmp_path / "output", "DEVICE": "cpu", "MIXED_PRECISION": "no", "MAX_STEPS": "1",
        "SAMPLE_STEPS": "0", "WANDB_MODE": "offline", "REPORT_TO": "wandb,tensorboard",
    }  # fmt: skip
    (tmp_path / "my.env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    environment = hub.environment(tmp_path / "home", token=None) | {"ENV_FILE": str(tmp_path / "my.env")}
    environment.pop("WANDB_MODE", None)
    options = {"cwd": PROJECT, "env": environment, "capture_output": True, "text": True, "timeout": 180}
    done = subprocess.run([sys.executable, "train.py"], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Hub: best/ to me/voice (to be made, public)" in done.stdout and "best/ is on the Hub" in done.stdout
    assert f"warning: {tmp_path / 'output' / 'last'} could not be sent to the Hub" in done.stdout
    assert "(the Hub refuses me/last: 403 injected. If it is about the token" in done.stdout
    (line,) = re.findall(r"^  (.* -m finetuning.hub .*)$", done.stdout, re.MULTILINE)
    hub.faults.clear()
    num_puts = len(hub.puts)
    environment.pop("ENV_FILE")  # the command names it
    repeated = subprocess.run(line, shell=True, **options)
    assert repeated.returncode == 0, repeated.stderr
    assert len(hub.puts) == num_puts and not hub.repositories["me/last"].private  # the files had arrived
    assert damage(hub.save("me/last", tmp_path / "received")) == []

    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "my.env"]
    assert any("wandb" in str(file) for file in files) and len(files) > 30
    kept = [one.encode() for run in (done, repeated) for one in (run.stdout, run.stderr)]
    kept += [file.read_bytes() for file in files]
    for content in kept:
        assert TOKEN.encode() not in content and b"signedSecret" not in content
