"""Folders that are whole or not there: written under another name, checksummed, flushed to the disk, then renamed.

Beside a folder ``best`` there may be, after a crash:

==================  ==============================================================================
``.best.tmp``       the next one, being written; of no use
``.best.old.tmp``   the one before, while the next takes its place; goes back if that never happened
``.best.gone.tmp``  one that is being removed
==================  ==============================================================================

``.best.upload-….tmp`` is a copy on its way to the Hub, and in use while its lock file is locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetuning.errors import UserError

#: Lists every other file of a folder but the model card with its size and checksum; written last.
CHECKSUMS_FILE = "checksums.json"
#: The model card of a checkpoint; people edit it, so it has no checksum.
CARD_FILE = "README.md"
#: Weights are hard-linked where the file system allows and never written in place; other files, which people edit, are
#: copied.
LINKED_SUFFIX = ".safetensors"
#: In a temporary folder: locked by the process that uses it.
_LOCK_FILE = "lock"
#: Bytes that are read at a time for a checksum.
_READ_BYTES = 8 * 2**20


@contextlib.contextmanager
def new_folder(target: Path, is_sealed: bool = False) -> Iterator[Path]:
    """Gives a temporary folder to fill; ``target`` is that folder afterwards, or what it was before.

    Args:
        is_sealed: it is filled with the right checksums as well (it is a copy).

    Raises:
        OSError: the disk refused something (it is full, say); nothing is left of the attempt.
    """
    unfinished = begin_folder(target)
    try:
        with library_errors():
            yield unfinished
        finish_folder(unfinished, target, is_sealed)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def begin_folder(target: Path) -> Path:
    """The empty folder in which the next ``target`` is made; on the same file system."""
    unfinished = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def finish_folder(unfinished: Path, target: Path, is_sealed: bool = False) -> None:
    """Checksums, flushes, and puts the folder in the place of ``target``; a crash leaves the one or the other."""
    if not is_sealed:
        seal(unfinished)
    flush(unfinished)
    old = target.with_name(f".{target.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        unfinished.rename(target)
    except OSError:
        _put_back(old, target)
        raise
    _flush_one(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, target: Path) -> None:
    """A folder on its way out of its place, which nothing has taken."""
    if old.exists() and not target.exists():
        old.rename(target)


def remove_folder(folder: Path) -> None:
    """Removes a folder so that a crash on the way leaves no half of it under its name."""
    gone = folder.with_name(f".{folder.name}.gone.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clean_up(parent: Path) -> None:
    """What a crash left in ``parent``: a folder on its way out of its place goes back, the rest is removed."""
    for old in parent.glob(".*.old.tmp"):
        _put_back(old, parent / old.name.removeprefix(".").removesuffix(".old.tmp"))
    remove_leftovers(parent, ".*.tmp")


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Removes temporary files and folders that no process uses."""
    for leftover in parent.glob(pattern):
        if not leftover.is_dir():
            leftover.unlink()
        elif not _is_in_use(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """While the block runs, and this process lives, ``remove_leftovers`` of any process lets the folder be."""
    with (folder / _LOCK_FILE).open("w") as lock:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_in_use(folder: Path) -> bool:
    try:
        with (folder / _LOCK_FILE).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or a disk without locks
        return False
    return False


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Turns what safetensors says of a full disk into the OSError that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None


# ------------------------------------------------------------------------------------------------------- checksums


def seal(folder: Path) -> None:
    """Writes ``checksums.json``: {"files": {relative path: {"bytes": …, "xxh3_128": …}}}."""
    left_out = (CHECKSUMS_FILE, CARD_FILE)
    files = {file.relative_to(folder).as_posix(): file for file in files_of(folder) if file.name not in left_out}
    entries = {name: {"bytes": file.stat().st_size, "xxh3_128": checksum(file)} for name, file in files.items()}
    write_json(folder / CHECKSUMS_FILE, {"files": entries})


def damage(folder: Path) -> list[str]:
    """What is wrong with a sealed folder, a few words for each file; [] when it is whole."""
    try:
        entries = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))["files"]
        return [problem for name, entry in entries.items() if (problem := _damage_of(folder / name, name, entry))]
    except OSError:
        return [f"{CHECKSUMS_FILE} is missing"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{CHECKSUMS_FILE} is not readable"]


def check_is_whole(folder: Path, setting: str, shown: Path | None = None) -> None:
    """Raises UserError for a checkpoint of this project that is damaged; a folder without checksums passes.

    Args:
        shown: the folder that it is a copy of.
    """
    if (folder / CHECKSUMS_FILE).exists() and (problems := damage(folder)):
        raise UserError(
            f"{setting}: {shown or folder} is damaged: {'; '.join(problems)}. Use another checkpoint; if the change is "
            f"yours, remove its {CHECKSUMS_FILE}"
        )


def checksum(file: Path) -> str:
    """xxh3_128 of the content, hexadecimal: finds damage as fast as the disk reads; no protection against forgery."""
    import xxhash

    content = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            content.update(block)
    return content.hexdigest()


def _damage_of(file: Path, name: str, entry: dict[str, Any]) -> str | None:
    if not file.is_file():
        return f"{name} is missing"
    if (size := file.stat().st_size) != entry["bytes"]:
        return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
    return None if checksum(file) == entry["xxh3_128"] else f"{name} has other content than was saved"


# ----------------------------------------------------------------------------------------------------------- files


def files_of(folder: Path) -> list[Path]:
    """All files below a folder, sorted."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def bytes_of(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(file.stat().st_size for file in files_of(folder))


def flush(folder: Path) -> None:
    """fsync of every file and folder below, so that a rename after it cannot overtake the contents."""
    for file in files_of(folder):
        _flush_one(file)
    for entry in (*folder.rglob("*"), folder):
        if entry.is_dir():
            _flush_one(entry)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some file systems flush no folders
            raise
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Space on the disk that holds the path, or would hold it."""
    return shutil.disk_usage(nearest_existing(path)).free


def nearest_existing(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    path = path.resolve()
    return path if path.exists() else nearest_existing(path.parent)


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a file; None where it is missing or damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline; whoever reads it meanwhile sees the file before or the new one."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def link_or_copy(source: str | Path, target: str | Path) -> str:
    """Hard-links weights (through symbolic links, as Hub caches have them), copies everything else."""
    real = Path(source).resolve()
    if Path(source).suffix == LINKED_SUFFIX:
        try:
            os.link(real, target)
            return str(target)
        except OSError:
            pass  # another file system
    return shutil.copyfile(real, target)
