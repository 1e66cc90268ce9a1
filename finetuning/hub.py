"""Sends a checkpoint to a repository on the Hugging Face Hub.

    python -m finetuning.hub upload output/best --repo owner/name             # private, where the repository is made
    python -m finetuning.hub upload output/last --repo owner/name --public

A run with UPLOAD_TO_HUB sends its own by the same command (see ``uploads``). All files come in one commit
(``upload_folder``), so whoever loads the repository meanwhile gets the checkpoint before or this one, never a mixture;
``upload_large_folder`` would make several commits, try for ever where it has no right to write, and write into the
folder. After a break the command goes on: what has arrived is not sent again, neither a file that is there (by its
sha256, which the Hub is asked for first) nor, where the repository stores by Xet, a piece of one.

What is sent is a copy in a folder of its own, whose weights are hard links: saving and rotation never meet it. The copy
is what is checked: a run may replace the folder meanwhile. In it, paths of this machine give way to names; the model
card names the repository.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from finetuning.console import PROJECT, say, short_path
from finetuning.disk import (
    CARD_FILE,
    CHECKSUMS_FILE,
    check_is_whole,
    checksum,
    files_of,
    in_use,
    link_or_copy,
    read_json,
    remove_leftovers,
    write_json,
)
from finetuning.errors import UserError, run_main
from finetuning.history import is_number
from finetuning.model_card import adapter_name, for_repository, id_of_origin
from finetuning.settings import export_variables_of_file, repository_problem, token_problem

#: Seconds before each further attempt.
WAITS_SECONDS = (1.0, 5.0, 20.0, 60.0, 180.0)
#: A connection that takes longer, a body of which so long no piece is taken, and an answer that takes longer (the Hub
#: may take minutes over a commit) are given up and tried again.
CONNECT_SECONDS, PIECE_SECONDS, SILENCE_SECONDS = 10, 60, 300
#: The start of a run waits no longer for the Hub.
ASKING_SECONDS = 30.0
#: Answers that may be others next time: time-outs, conflicts with another commit, too many requests.
PASSING_STATUS = (408, 409, 412, 423, 425, 429)
#: Files of an earlier upload that must not stay beside this one, since they would be loaded with it. What else people
#: have put into the repository stays.
REPLACED = (
    "adapter/*", "speech_tokenizer/*", "speaker_encoder/*", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
)  # fmt: skip
TOKENS_URL = "https://huggingface.co/settings/tokens"
NEEDS_TOKEN = f"make one with write access at {TOKENS_URL} and put it into HF_TOKEN, or log in with `hf auth login`"


class OutOfReach(UserError):
    """The Hub does not answer now; it may later."""


@dataclass(frozen=True)
class Sent:
    """An upload that has come to its end.

    Attributes:
        url: of the commit.
        is_news: whether anything was changed by it.
        is_public: whether everybody can read the repository.
    """

    url: str
    is_news: bool
    is_public: bool


def upload_command(folder: Path | str, repository: str, private: bool) -> str:
    """What a user types in the working directory to send a checkpoint. The token may stand in the settings file."""
    file, found = os.environ.get("ENV_FILE"), shutil.which("python")
    variables = {"ENV_FILE": file and short_path(file), "PYTHONPATH": Path.cwd() != PROJECT and str(PROJECT)}
    given = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items() if value)
    is_active = found and Path(found).parent == Path(sys.executable).parent  # of links: to one Python lead many
    python = "python" if is_active else short_path(sys.executable)
    words = [python, "-m", "finetuning.hub", "upload", short_path(folder), "--repo", repository]
    return given + shlex.join(words if private else [*words, "--public"])


# ------------------------------------------------------------------------------------------------------------- asking


def connect(endpoint: str | None = None) -> Any:
    """``HfApi``.

    Raises:
        UserError: HF_HUB_OFFLINE is set, or there is no token, or none that can be one.
    """
    from huggingface_hub import HfApi, constants, get_token

    if endpoint is None and constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, and an upload needs the Hub; unset it, or set UPLOAD_TO_HUB=false")
    token = get_token()
    if not token:
        raise UserError(f"HF_TOKEN: an upload needs a token; {NEEDS_TOKEN}")
    if problem := token_problem(token):
        raise UserError(f"HF_TOKEN: {problem}")
    return HfApi(endpoint=endpoint, token=token)


def check_access(repositories: Mapping[str, str], private: bool, api: Any = None) -> list[str]:
    """Whether the Hub is going to take an upload, as far as it tells without one; nothing is changed there.

    Args:
        repositories: see ``Settings.repositories``.

    Returns:
        A few words about each repository.

    Raises:
        OutOfReach: it does not answer.
        UserError: no token, or one that may not write there.
    """
    api = api or connect()
    answer: futures.Future[list[str]] = futures.Future()

    def ask() -> None:
        try:
            with _patience():
                who = api.whoami()
                answer.set_result([_check_repository(api, who, *item, private) for item in repositories.items()])
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()  # left behind where it takes too long
    try:
        return answer.result(ASKING_SECONDS)
    except futures.TimeoutError:
        raise OutOfReach(f"the Hub did not answer within {ASKING_SECONDS:g} s; check the network") from None
    except Exception as error:
        raise _told(error, ", ".join(repositories.values())) from None


def _check_repository(api: Any, who: Mapping[str, Any], name: str, repository: str, private: bool) -> str:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(repository)
        state = f"there, {'private' if found.private else 'public'}"
        if private and not found.private:
            state += " (HUB_PRIVATE is for repositories that are made, this one stays public)"
    except RepositoryNotFoundError:
        found = None
        state = f"to be made, {'private' if private else 'public'}"
    full_name = found.id if found else repository  # it may have moved to another owner
    if problem := access_problem(who, full_name, is_there=found is not None):
        raise UserError(f"HUB_MODEL_ID_{name.upper()}: {problem}")
    if _role_in(who, full_name) == "read":
        state += "; warning: your role in that organisation is read, which may not do"
    return f"{name}/ to {repository} ({state})"


def access_problem(who: Mapping[str, Any], repository: str, is_there: bool) -> str | None:
    """Why a token may not write to a repository, by what ``whoami`` tells of it; None where it may, or may well.

    Args:
        repository: its present id.
        is_there: whether the token can see the repository.
    """
    access = (who.get("auth") or {}).get("accessToken") or {}
    owner, user, role = repository.partition("/")[0], str(who.get("name")), access.get("role")
    if role == "read":
        return f"the token of {user} may only read; {NEEDS_TOKEN}"
    if role == "fineGrained":
        scopes = (access.get("fineGrained") or {}).get("scoped") or []
        writable = [scope.get("entity") or {} for scope in scopes if "repo.write" in (scope.get("permissions") or ())]
        wanted = {("user", owner.lower()), ("org", owner.lower())}
        wanted |= {("model", repository.lower())} if is_there else set()
        if wanted.isdisjoint((one.get("type"), str(one.get("name")).lower()) for one in writable):
            return (
                f"the fine-grained token of {user} may not {'write to' if is_there else 'make'} {repository}; give it "
                f"write access to the repositories of {owner} at {TOKENS_URL}"
            )
        return None
    own_role = _role_in(who, repository)
    if owner.lower() != user.lower() and own_role is None:
        return f"{owner} is neither {user}, whose token this is, nor an organisation of {user}"
    if own_role == "read" and not is_there:
        return f"{user} may only read in {owner}, and {repository} is not there; ask for the role write"
    return None


def _role_in(who: Mapping[str, Any], repository: str) -> str | None:
    """In the organisation that owns the repository ("" where the Hub does not say); None where it is none of theirs."""
    owner = repository.partition("/")[0].lower()
    roles = [one.get("roleInOrg") or "" for one in who.get("orgs") or () if str(one.get("name")).lower() == owner]
    return roles[0] if roles else None


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Requests of the Hub's library inside end some time; by itself it waits for ever."""
    import requests
    from huggingface_hub import configure_http_backend

    class Patient(requests.adapters.HTTPAdapter):
        def send(self, request: Any, *args: Any, timeout: Any = None, **options: Any) -> Any:
            first = PIECE_SECONDS if request.method == "PUT" else CONNECT_SECONDS  # of a connection, and of sending
            return super().send(request, *args, timeout=timeout or (first, SILENCE_SECONDS), **options)

    def session() -> requests.Session:
        made = requests.Session()
        for scheme in ("https://", "http://"):
            made.mount(scheme, Patient())
        return made

    configure_http_backend(session)
    try:
        yield
    finally:
        configure_http_backend()


# ------------------------------------------------------------------------------------------------------------ problems


def _told(error: Exception, repository: str) -> Exception:
    """What the user is told: OutOfReach where another attempt may do, else UserError; what is no matter of the Hub or
    the way there is a bug, and comes back as it is. Addresses, which may hold signatures, are left out."""
    import requests

    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, requests.RequestException):
        inner = inner.__cause__
    if inner is None:
        if type(error) is ValueError:  # of the library: an answer of the Hub, to a card or a file
            return UserError(f"the Hub refuses {repository}: {scrubbed(str(error))}")
        if type(error) is RuntimeError or type(error).__name__.startswith("Xet"):  # of hf_xet: the way to its server
            return _out_of_reach(f"{type(error).__name__}: {error}")
        return error
    response = getattr(inner, "response", None)
    if response is None:
        return _out_of_reach(f"the connection failed ({type(inner).__name__})")
    status = response.status_code
    if response.request is not None and response.request.method == "PUT":  # to the storage: signatures expire
        return _out_of_reach(f"the storage answered {status}")
    said = f"{status} {getattr(inner, 'server_message', None) or response.reason or ''}".strip()
    if not 400 <= status < 500 or status in PASSING_STATUS:
        return _out_of_reach(said)
    hint = f". If it is about the token (HF_TOKEN): {NEEDS_TOKEN}" if status in (401, 403) else ""
    return UserError(f"the Hub refuses {repository}: {scrubbed(said)}{hint}")


def _out_of_reach(why: str) -> OutOfReach:
    return OutOfReach(f"the Hub cannot be reached: {scrubbed(why)}; check the network, or HF_ENDPOINT")


def scrubbed(text: str) -> str:
    """Its first line, without addresses, whose ends may be signatures, and without tokens."""
    from huggingface_hub import get_token

    line = next((line for line in text.splitlines() if line.strip()), "").strip()
    if token := get_token():
        line = line.replace(token, "…")
    return re.sub(r"hf_\w+", "…", re.sub(r"https?://\S+", "…", line))[:300]


# ------------------------------------------------------------------------------------------------------------- sending


def send(
    folder: Path,
    repository: str,
    private: bool,
    api: Any = None,
    waits_seconds: Sequence[float] = WAITS_SECONDS,
) -> Sent:
    """Sends a staged folder, in as many attempts as it takes.

    Raises:
        UserError: the Hub refuses it.
        OutOfReach: all attempts failed.
    """
    api = api or connect()
    message = commit_message(folder)
    with _patience():
        for wait in (*waits_seconds, None):
            try:
                return _send(api, folder, repository, private, message)
            except Exception as error:
                told = _told(error, repository)
                if wait is None or not isinstance(told, OutOfReach):
                    raise told from None
                say(f"{repository}: {told}; the next attempt in {wait:g} s")
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _send(api: Any, folder: Path, repository: str, private: bool, message: str) -> Sent:
    api.create_repo(repository, private=private, exist_ok=True)
    before = api.model_info(repository)
    done = api.upload_folder(
        repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=list(REPLACED)
    )
    return Sent(done.commit_url, done.oid != before.sha, before.private is False)


def commit_message(folder: Path) -> str:
    """ "Step 300, validation loss 2.3456", say: of what the checkpoint is."""
    state = read_json(folder / "training_state.json") or {}
    if "merged" in state:
        return "Merged adapters"
    if not is_number(state.get("step")):
        return "Checkpoint"
    value, text = (state.get("metrics") or {}).get(state.get("best_metric")), state.get("best_by")
    if state.get("best_step") == state["step"]:
        value = state.get("best_value")
    if not is_number(value):
        value, text = state.get("train_loss"), "training loss"
    return f"Step {state['step']}" + (f", {text} {value:.4f}" if is_number(value) else "")


# ------------------------------------------------------------------------------------------------------------- staging


def upload(folder: Path, repository: str, private: bool, num_attempts: int | None = None) -> Sent:
    """Sends a checkpoint.

    Args:
        num_attempts: default all of ``WAITS_SECONDS`` and one more.

    Raises:
        UserError: there is none, it is damaged, or the Hub refuses it.
        OutOfReach: all attempts failed.
    """
    api = connect()
    with staged(folder, repository) as copy:
        num_bytes = sum(file.stat().st_size for file in files_of(copy))
        say(f"{folder} to {repository}: {num_bytes / 1e9:.2f} GB, what is there already included")
        return send(copy, repository, private, api, WAITS_SECONDS[: num_attempts and num_attempts - 1])


@contextlib.contextmanager
def staged(folder: Path, repository: str) -> Iterator[Path]:
    """The checkpoint as it is sent, beside the folder for as long as it is needed.

    Raises:
        UserError: there is no checkpoint, it is damaged, or nothing can be written beside it.
    """
    if not (folder / "config.json").is_file() or not list(folder.glob("model*.safetensors")):
        inside = " (best/ and last/ inside of it are)" if (folder / "last").is_dir() else ""
        raise UserError(f"{folder} is no checkpoint{inside}: config.json or model.safetensors is missing")
    folder = folder.resolve()
    remove_copies(folder)
    place = _make_place(folder)
    with in_use(place), _leaving_at_once(lambda: shutil.rmtree(place, ignore_errors=True)):
        try:
            stage(folder, place / folder.name, repository)
            yield place / folder.name
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _make_place(folder: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(".tmp", f".{folder.name}.upload-", folder.parent))
    except OSError as error:
        raise UserError(f"{folder} cannot be copied beside itself for the upload: {error}") from None


def remove_copies(folder: Path) -> None:
    """Of a checkpoint, by uploads that were killed."""
    remove_leftovers(folder.parent, f".{glob.escape(folder.name)}.upload-*.tmp")


def stage(folder: Path, target: Path, repository: str) -> None:
    """Fills ``target``, on the same disk, with what is sent of a checkpoint; hidden files stay behind.

    Raises:
        UserError: the checkpoint is damaged, or the disk refuses.
    """
    try:
        _copy_whole(folder, target)
    except UserError:  # a run may just have put the next one into its place
        shutil.rmtree(target, ignore_errors=True)  # all of it: nothing is ever written into what is linked
        _copy_whole(folder, target)
    for edit in (_without_paths, _name_references):
        edit(target)
    card = target / CARD_FILE
    if card.is_file():
        card.write_text(for_repository(card.read_text(encoding="utf-8"), repository), encoding="utf-8")


def _copy_whole(folder: Path, target: Path) -> None:
    try:
        shutil.copytree(folder, target, copy_function=link_or_copy, ignore=shutil.ignore_patterns(".*"))
    except OSError as error:
        raise UserError(f"{folder} cannot be copied for the upload: {error}") from None
    check_is_whole(target, "upload", folder)


def _without_paths(folder: Path) -> None:
    """The base and merged adapters by their names."""
    if state := read_json(folder / "training_state.json"):
        if isinstance(state.get("base"), str):
            state["base"] = _name_of(state["base"])
        for one in state.get("merged") or ():
            one["adapter"] = adapter_name(one["adapter"])
        _replace(folder, "training_state.json", state)
    if config := read_json(folder / "adapter" / "adapter_config.json"):
        config["base_model_name_or_path"] = _name_of(config["base_model_name_or_path"])
        _replace(folder, "adapter/adapter_config.json", config)


def _name_of(base: str) -> str:
    """An id on the Hub as it is; of a folder the last part."""
    return id_of_origin(base) or Path(base).name


def _name_references(folder: Path) -> None:
    """Reference clips by their names."""
    name = "speaker_encoder/speaker_config.json"
    if config := read_json(folder / name):
        _shorten(config["speakers"].values())
        _replace(folder, name, config)
    listed = folder / "adapter" / "speakers.json"
    if listed.is_file():
        entries = json.loads(listed.read_text(encoding="utf-8"))
        _shorten(entries)
        _replace(folder, "adapter/speakers.json", entries)


def _shorten(entries: Any) -> None:
    for entry in entries:
        entry["references"] = [Path(file).name for file in entry["references"]]


def _replace(folder: Path, name: str, value: Any) -> None:
    """Writes a file anew, and its checksum."""
    write_json(folder / name, value)
    sums = read_json(folder / CHECKSUMS_FILE)
    if sums and name in sums["files"]:
        file = folder / name
        sums["files"][name] = {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}
        write_json(folder / CHECKSUMS_FILE, sums)


# ------------------------------------------------------------------------------------------------------------- command


@contextlib.contextmanager
def _leaving_at_once(clean_up: Callable[[], None]) -> Iterator[None]:
    """A signal ends the process: Python would wait for the threads that are sending, for hours."""

    def leave(number: int, _: Any) -> NoReturn:
        clean_up()
        print("\nstopped; the same command goes on", file=sys.stderr, flush=True)
        os._exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """The run that started this process holds its standard input open; whatever ends the run ends this, too."""

    def watch() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock Python wants at its end
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m finetuning.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = parser.add_subparsers(dest="command", required=True).add_parser("upload", help="a checkpoint")
    command.add_argument("folder", type=Path, help="of a checkpoint, such as output/best")
    command.add_argument("--repo", required=True, help="owner/name; made when it is missing")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--private", action="store_true", default=True, help="a repository that is made is private")
    how.add_argument("--public", dest="private", action="store_false", help="or public")
    command.add_argument("--for-run", type=int, metavar="ATTEMPTS", help=argparse.SUPPRESS)  # see ``uploads``
    arguments = parser.parse_args(given)
    if problem := repository_problem(arguments.repo):
        raise UserError(f"--repo: {problem}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    export_variables_of_file()  # before the Hub's library, which reads them, is imported
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # its warnings tell addresses with signatures
    if arguments.for_run:
        return answer_run(arguments)
    if not sys.stderr.isatty():
        disable_progress_bars()
    sent = upload(arguments.folder, arguments.repo, arguments.private)
    say(f"{'Done' if sent.is_news else 'Nothing was new'}: {sent.url}")
    if sent.is_public and arguments.private:
        say(f"{arguments.repo} is public, as it was")
    return None


def answer_run(arguments: argparse.Namespace) -> None:
    """An upload by a run, whose last line is JSON: a ``Sent``, or ``error`` and ``is_out_of_reach``."""
    os.nice(10)  # the training goes first
    _end_with_parent()
    try:
        answer = asdict(upload(arguments.folder, arguments.repo, arguments.private, arguments.for_run))
    except UserError as error:
        answer = {"error": str(error), "is_out_of_reach": isinstance(error, OutOfReach)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    run_main(main)
