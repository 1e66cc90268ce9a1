"""A result in the making: chunks that are done, the stamp of what a result was made of, and the finished file.

Work goes chunk by chunk (see ``encoding``) into ``<output>.partial/``; the finished file appears under its name in one
step. A chunk's file is named by a digest of all that it was made of, so it is used again as long as that is unchanged,
and a result that was made of exactly the same is not made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetuning.console import say
from finetuning.encoding import EncodedChunk
from finetuning.errors import UserError
from finetuning.manifest import Tally
from finetuning.processes import Processes

#: Marks an unfinished run that was begun with --force.
FORCED = "forced"


def rejected_path(output_jsonl: Path) -> Path:
    """Where the rows that were left out are listed, with the reason."""
    return output_jsonl.with_name(f"{output_jsonl.stem}.rejected.jsonl")


# ------------------------------------------------------------------------------------- what is done, and the result


class Workspace:
    """The chunks of one result while it is being made, and the result.

    Args:
        digests: what each chunk is made of; its file is named by it.
        max_rows: the limit that the result was asked for with; recorded.
        made_of: what the result is made of besides the chunks.
    """

    def __init__(
        self, output_jsonl: Path, digests: Sequence[str], max_rows: int | None = None, made_of: Any = None
    ) -> None:
        self.output_jsonl, self.digests, self.max_rows = output_jsonl, digests, max_rows
        self._made_of = Digest(*digests, made_of).hex()
        self.folder = _partial_folder(output_jsonl)

    def chunk_file(self, number: int) -> Path:
        return self.folder / f"{number:06d}-{self.digests[number]}.safetensors"

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Finds out at once whether the folder can be written, and leaves nothing where nothing was done."""
        with disk_errors(self.output_jsonl):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def missing(self, among: Iterable[int] | None = None) -> list[int]:
        """Numbers of the chunks (of ``among``, else of all) that are not done, or not any more."""
        numbers = range(len(self.digests)) if among is None else among
        return [number for number in numbers if EncodedChunk.load_valid(self.chunk_file(number)) is None]

    def leftovers(self) -> list[Path]:
        """Chunk files of an earlier run whose rows have changed since."""
        expected = {self.chunk_file(number).name for number in range(len(self.digests))}
        return sorted(file for file in self.folder.glob("*.safetensors") if file.name not in expected)

    def save(self, number: int, chunk: EncodedChunk) -> None:
        with disk_errors(self.output_jsonl):
            chunk.save(self.chunk_file(number))

    def chunks(self) -> Iterator[EncodedChunk]:
        """All chunks in order, from their files."""
        for number in range(len(self.digests)):
            yield EncodedChunk.load(self.chunk_file(number))

    def assemble(
        self, edit: Callable[[dict[str, Any]], dict[str, Any]] | None = None, note: dict[str, Any] | None = None
    ) -> None:
        """Writes the result and the list of rejected rows, each to a temporary name first, and removes the chunks.

        Args:
            edit: changes each record on its way out.
            note: kept in the stamp.

        Raises:
            UserError: more than a tenth of the rows is bad, or the disk is full; the chunks stay.
        """
        tally, rejected_file = Tally(), rejected_path(self.output_jsonl)
        with (
            disk_errors(self.output_jsonl),
            unfinished(self.output_jsonl) as rows_file,
            unfinished(rejected_file) as bad_file,
        ):
            with rows_file.open("w", encoding="utf-8") as rows, bad_file.open("w", encoding="utf-8") as bad:
                for chunk in self.chunks():
                    for record, codes in zip(chunk.records, chunk.codes, strict=True):
                        record = edit(record) if edit else record
                        rows.write(json.dumps(record | {"audio_codes": codes.tolist()}, ensure_ascii=False) + "\n")
                    bad.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in chunk.rejected)
                    tally.add(chunk.num_originals, chunk.rejected)
            tally.check_share()
            rows_file.rename(self.output_jsonl)
            if tally.num_bad:
                bad_file.rename(rejected_file)
                say(f"skipped {tally.summary()}\n  listed in {rejected_file}")
            else:
                rejected_file.unlink(missing_ok=True)  # of an earlier run
            self._write_stamp(note or {}, self._made_of)
        shutil.rmtree(self.folder, ignore_errors=True)

    def check_is_ours(self, made_by: str) -> None:
        """Raises UserError where the result's name belongs to a file that was not made here."""
        if not self.output_jsonl.is_file() or read_stamp(self.output_jsonl) is not None:
            return
        if self.folder.is_dir() and not self.missing():  # killed between the file and its stamp
            return
        raise UserError(
            f"{self.output_jsonl} exists and was not made by {made_by}, or was changed since; move it away, choose "
            "another --output_jsonl, or replace it with --force"
        )

    def discard(self, processes: Processes) -> None:
        """Forgets what is done, so that all of it is made again; a run that this begins may be interrupted, too."""
        processes.wait()
        if processes.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)
            with disk_errors(self.output_jsonl):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / FORCED).touch()
                if self.output_jsonl.is_file():
                    self._write_stamp({}, made_of="")  # ours, whatever it was; not current
        processes.wait()

    def is_current(self) -> bool:
        """Whether the result is there and was made of exactly this."""
        stamp = read_stamp(self.output_jsonl)
        return stamp is not None and stamp["made_of"] == self._made_of

    def _write_stamp(self, note: dict[str, Any], made_of: str) -> None:
        status = self.output_jsonl.stat()
        stamp = {"made_of": made_of, "num_bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        content = json.dumps(note | stamp | {"max_rows": self.max_rows})
        with unfinished(stamp_file(self.output_jsonl)) as file:
            file.write_text(content, encoding="utf-8")
            file.rename(stamp_file(self.output_jsonl))


def was_forced(output_jsonl: Path) -> bool:
    """Whether the run that is unfinished here was begun with --force."""
    return (_partial_folder(output_jsonl) / FORCED).exists()


def _partial_folder(output_jsonl: Path) -> Path:
    return output_jsonl.with_name(f"{output_jsonl.name}.partial")


def stamp_file(output_jsonl: Path) -> Path:
    """Where it is recorded what a result was made of."""
    return output_jsonl.with_name(f".{output_jsonl.name}.stamp")


def read_stamp(output_jsonl: Path) -> dict[str, Any] | None:
    """What the file was made of, or None when it was not made here, or was changed since."""
    try:
        stamp = json.loads(stamp_file(output_jsonl).read_text(encoding="utf-8"))
        status = output_jsonl.stat()
    except (OSError, ValueError):
        return None
    return stamp if (stamp["num_bytes"], stamp["modified_ns"]) == (status.st_size, status.st_mtime_ns) else None


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; what is still there at the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        yield unfinished
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free the disk or choose another folder. What was encoded "
            "so far is kept and used next time"
        ) from None


class Digest:
    """A short hash of anything that has a stable text form."""

    def __init__(self, *parts: Any) -> None:
        self._hash = hashlib.sha256()
        self.add(*parts)

    def add(self, *parts: Any) -> None:
        for part in parts:
            content = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
            self._hash.update(len(content).to_bytes(8, "little"))
            self._hash.update(content)

    def hex(self) -> str:
        return self._hash.hexdigest()[:16]
