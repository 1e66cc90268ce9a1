"""Folders that are whole or not there: after errors, after crashes, and what a damaged one says of itself."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning import disk
from finetuning.disk import (
    CHECKSUMS_FILE,
    check_is_whole,
    clean_up,
    damage,
    library_errors,
    nearest_existing,
    new_folder,
    remove_folder,
    seal,
)
from finetuning.errors import UserError


class Killed(BaseException):
    """Stands for SIGKILL."""


def save(target: Path, content: str) -> None:
    with new_folder(target) as folder:
        (folder / "nested" / "deeper").mkdir(parents=True)
        (folder / "weights.bin").write_text(content)
        (folder / "nested" / "deeper" / "small.txt").write_text(content)


def content(target: Path) -> str:
    assert damage(target) == []
    assert (target / "nested" / "deeper" / "small.txt").read_text() == (target / "weights.bin").read_text()
    return (target / "weights.bin").read_text()


def hidden(parent: Path) -> list[str]:
    return sorted(entry.name for entry in parent.iterdir() if entry.name.startswith("."))


# ------------------------------------------------------------------------------------------------------ new folders


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "not" / "yet" / "best"
    save(target, "first")
    (target / "only_in_the_first").write_text("")
    save(target, "second")
    assert content(target) == "second"
    assert not (target / "only_in_the_first").exists()
    assert hidden(target.parent) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("a bug"), KeyboardInterrupt()])
def test_an_error_while_it_is_filled_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    save(tmp_path / "best", "first")
    with pytest.raises(type(error)), new_folder(tmp_path / "best") as folder:
        (folder / "weights.bin").write_text("half")
        raise error
    assert content(tmp_path / "best") == "first"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("name", ["seal", "flush"])
def test_an_error_while_it_is_finished_leaves_the_old_one(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "best", "first")

    def fails(_: Path) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(disk, name, fails)
    with pytest.raises(OSError, match="the disk is gone"):
        save(tmp_path / "best", "second")
    assert content(tmp_path / "best") == "first"
    assert hidden(tmp_path) == []


def fail_at_rename(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """The rename of that number (from 1) does not happen; those after it do."""
    rename, calls = Path.rename, []

    def counted(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == number:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)


def test_an_error_between_the_renames_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "best", "first")
    fail_at_rename(monkeypatch, 2, OSError(errno.EIO, "no"))
    with pytest.raises(OSError, match="no"):
        save(tmp_path / "best", "second")
    assert content(tmp_path / "best") == "first"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_at_a_rename_loses_nothing(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process cleans nothing up, so neither does this one: not the folder, not the rename."""
    save(tmp_path / "best", "first")
    fail_at_rename(monkeypatch, number, Killed())
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        patched.setattr(disk, "_put_back", lambda *_: None)
        with pytest.raises(Killed):
            save(tmp_path / "best", "second")
    assert hidden(tmp_path) == ([".best.tmp"] if number == 1 else [".best.old.tmp", ".best.tmp"])
    assert (tmp_path / "best").exists() == (number == 1)
    clean_up(tmp_path)
    assert content(tmp_path / "best") == "first"
    assert hidden(tmp_path) == []


def test_clean_up_keeps_the_new_one_where_it_is_in_its_place(tmp_path: Path) -> None:
    save(tmp_path / "best", "second")
    for name in (".best.old.tmp", ".last.tmp", ".checkpoint-4.gone.tmp"):
        shutil.copytree(tmp_path / "best", tmp_path / name)
        (tmp_path / name / "weights.bin").write_text("of no use")
    (tmp_path / ".file.tmp").write_text("half")
    (tmp_path / ".lock").write_text("")
    clean_up(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "best"]
    assert content(tmp_path / "best") == "second"
    clean_up(tmp_path / "nowhere")


def test_a_folder_on_its_way_out_is_never_seen_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "checkpoint-4", "first")
    rmtree = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if Path(path).exists():
            (Path(path) / "weights.bin").unlink()
            raise Killed
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        remove_folder(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-4").exists()
    monkeypatch.undo()
    clean_up(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_remove_folder(tmp_path: Path) -> None:
    save(tmp_path / "best", "first")
    remove_folder(tmp_path / "best")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError):
        remove_folder(tmp_path / "best")


def test_everything_is_flushed_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        events.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_rename(self: Path, target: Path) -> Path:
        events.append(("rename", str(target)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    parent = tmp_path.resolve()
    save(parent / "best", "first")
    at = events.index(("rename", str(parent / "best")))
    names = ("", "/weights.bin", "/nested", "/nested/deeper", "/nested/deeper/small.txt", f"/{CHECKSUMS_FILE}")
    assert {path for event, path in events[:at] if event == "flush"} == {f"{parent}/.best.tmp{name}" for name in names}
    assert events[at + 1 :] == [("flush", str(parent))]


def test_a_file_that_cannot_be_flushed_is_an_error_and_a_folder_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems flush no folders; an error of a file means that its content is lost."""
    refused: list[Callable[[str], bool]] = [os.path.isdir]

    def fsync(descriptor: int) -> None:
        if refused[0](os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(errno.EINVAL, "not supported")

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path / "best", "first")
    refused[0] = os.path.isfile
    with pytest.raises(OSError, match="not supported"):
        save(tmp_path / "best", "second")
    assert content(tmp_path / "best") == "first"


def test_an_error_of_the_safetensors_library_is_an_oserror() -> None:
    from safetensors import SafetensorError

    with pytest.raises(OSError, match="No space left"), library_errors():
        raise SafetensorError("I/O error: No space left on device (os error 28)")


# -------------------------------------------------------------------------------------------------------- checksums


def truncate(folder: Path) -> None:
    os.truncate(folder / "weights.bin", 3)


def flip(folder: Path) -> None:
    file = folder / "nested" / "deeper" / "small.txt"
    content = bytearray(file.read_bytes())
    content[2] ^= 1
    file.write_bytes(content)


def remove(folder: Path) -> None:
    (folder / "nested" / "deeper" / "small.txt").unlink()


def replace_by_folder(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").mkdir()


DAMAGES = {
    truncate: "weights.bin has 3 bytes instead of 5",
    flip: "nested/deeper/small.txt has other content than was saved",
    remove: "nested/deeper/small.txt is missing",
    replace_by_folder: "weights.bin is missing",
}


@pytest.mark.parametrize("harm", DAMAGES)
def test_damage_is_named(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    save(tmp_path / "best", "first")
    harm(tmp_path / "best")
    assert damage(tmp_path / "best") == [DAMAGES[harm]]
    with pytest.raises(UserError, match=rf"CHECKPOINT: {tmp_path / 'best'} is damaged: {DAMAGES[harm]}\. Use another"):
        check_is_whole(tmp_path / "best", "CHECKPOINT")


def test_all_damaged_files_are_named_and_files_beside_them_are_no_damage(tmp_path: Path) -> None:
    save(tmp_path / "best", "first")
    (tmp_path / "best" / "notes.txt").write_text("mine")
    assert damage(tmp_path / "best") == []
    truncate(tmp_path / "best")
    flip(tmp_path / "best")
    assert sorted(damage(tmp_path / "best")) == sorted([DAMAGES[truncate], DAMAGES[flip]])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"weights.bin": {}}}', '{"files": {"weights.bin": 3}}']
)
def test_checksums_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    save(tmp_path / "best", "first")
    (tmp_path / "best" / CHECKSUMS_FILE).write_text(text)
    assert damage(tmp_path / "best") == [f"{CHECKSUMS_FILE} is not readable"]
    with pytest.raises(UserError, match="is not readable"):
        check_is_whole(tmp_path / "best", "INIT_MODEL_PATH")


def test_checksums_that_are_no_text(tmp_path: Path) -> None:
    save(tmp_path / "best", "first")
    (tmp_path / "best" / CHECKSUMS_FILE).write_bytes(b"\xff\xfe")
    assert damage(tmp_path / "best") == [f"{CHECKSUMS_FILE} is not readable"]


def test_a_folder_without_checksums(tmp_path: Path) -> None:
    """A state needs them; a base of somebody else has none."""
    (tmp_path / "base").mkdir()
    assert damage(tmp_path / "base") == [f"{CHECKSUMS_FILE} is missing"]
    check_is_whole(tmp_path / "base", "INIT_MODEL_PATH")


def test_the_checksums_are_those_of_xxhash(tmp_path: Path) -> None:
    import xxhash

    (tmp_path / "large.bin").write_bytes(os.urandom(3 * 2**23 + 5))  # read in several blocks
    seal(tmp_path)
    seal(tmp_path)  # its own file is not listed
    entries = json.loads((tmp_path / CHECKSUMS_FILE).read_text())["files"]
    whole = xxhash.xxh3_128((tmp_path / "large.bin").read_bytes()).hexdigest()
    assert entries == {"large.bin": {"bytes": 3 * 2**23 + 5, "xxh3_128": whole}}


def test_nearest_existing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path.resolve()
    monkeypatch.chdir(tmp_path)
    assert nearest_existing(Path("a/b")) == tmp_path.resolve()
