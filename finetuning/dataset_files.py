"""Finds the files that the splits of a dataset consist of; reads none of their rows.

A dataset is a Hub id, a folder, or one table file. What can be found without ``datasets`` is (single files, folders of
``save_to_disk``, tables beside loose clips); that library finds the rest: split patterns, README configurations, Hub
revisions.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetuning.console import say
from finetuning.errors import UserError

#: Metadata of an audiofolder.
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
#: Files that hold rows beside loose audio; the first of these that occurs is taken.
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
#: Files of those kinds that describe a dataset and hold no rows.
DESCRIPTIONS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
#: What counts as loose audio.
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aif", ".aiff")
#: Names with a split's word: nothing else in it but numbers (test_2, train-00000-of-00001) …
_WHOLE = r"^{word}([-._ 0-9]+(of[-._ 0-9]+)?)?$"
#: … and any other, as ``datasets`` takes them.
_PART = r"(^|[-._ 0-9]){word}([-._ 0-9]|$)"
#: <owner>/<name> or <name>.
HUB_ID = r"\w[\w.-]*(/[\w.-]+)?"


@dataclass(frozen=True)
class SplitFiles:
    """What a split consists of.

    Attributes:
        format: parquet, arrow, table or stream.
        files: paths, or hf:// addresses with the commit, in order; at least one.
        features: the README's (or dataset_info.json's) features as JSON.
        options: what the format's reader takes beside these.
        is_folder: these are metadata files of an audiofolder.
    """

    format: str
    files: Sequence[str]
    features: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    is_folder: bool = False

    def fingerprint(self) -> str:
        """16 hex digits of the files' addresses (which hold the commit), or of paths, sizes and times."""
        parts = []
        for file in self.files:
            state = None if is_remote([file]) else os.stat(file)
            parts.append([file] if state is None else [file, state.st_size, state.st_mtime_ns])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def find_splits(dataset_name: str, config: str | None) -> dict[str, SplitFiles]:
    """The files of each split, train first.

    Raises:
        UserError: no such dataset or configuration; the Hub is out of reach; audio without transcripts.
    """
    path = Path(dataset_name).expanduser()
    if path.is_file():
        return _single_file(path)
    if not path.is_dir():
        return _from_library(dataset_name, config)
    return (
        _saved_by_datasets(path)
        or _tables_beside_audio(path, dataset_name, config)
        or _from_library(dataset_name, config, path)
    )


# ------------------------------------------------------------------------------------------------ without datasets


def _single_file(path: Path) -> dict[str, SplitFiles]:
    if path.suffix.lower() not in (*TABLE_SUFFIXES, ".arrow"):
        raise UserError(
            f"DATASET_NAME: {path} is a file of an unknown kind; give a folder, a Hub id, or a "
            "parquet, arrow, csv, tsv, jsonl or json file"
        )
    return {"train": _by_suffix([str(path.resolve())])}


def _by_suffix(files: Sequence[str]) -> SplitFiles:
    """Files of one kind, which the first one tells."""
    suffix = posixpath.splitext(files[0])[1].lower()
    kind = {".parquet": "parquet", ".arrow": "arrow"}.get(suffix, "table")
    return SplitFiles(kind, files, is_folder=_is_metadata(files[0]))


def _saved_by_datasets(folder: Path) -> dict[str, SplitFiles]:
    """Folders of ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk``; {} for any other."""
    if (folder / "dataset_dict.json").is_file():
        names = _read_json(folder / "dataset_dict.json")["splits"]
        return {name: _saved_split(folder / name) for name in names}
    if (folder / "state.json").is_file():
        return {_read_json(folder / "state.json").get("_split") or "train": _saved_split(folder)}
    return {}


def _saved_split(folder: Path) -> SplitFiles:
    files = [str((folder / item["filename"]).resolve()) for item in _read_json(folder / "state.json")["_data_files"]]
    info = folder / "dataset_info.json"
    return SplitFiles("arrow", files, (_read_json(info).get("features") if info.is_file() else None) or {})


def _read_json(path: Path) -> Any:
    with reading(str(path)):
        return json.loads(path.read_text(encoding="utf-8"))


def _tables_beside_audio(folder: Path, dataset_name: str, config: str | None) -> dict[str, SplitFiles]:
    """Local audiofolders, and tables beside loose clips; {} for any other folder.

    Not left to the library: it lists every clip several times (600,000 of them would fill the memory), and takes a
    folder for an audiofolder whatever its tables are called.
    """
    if _has_configs(folder):
        return {}
    tables, has_audio = _walk(folder)
    if not has_audio or any(re.search(r"-\d{5}-of-\d{5}", table) for table in tables):  # shards, and some sample
        return {}
    if config not in (None, "default"):
        raise UserError(f'DATASET_CONFIG: {dataset_name} has no configuration "{config}"; unset DATASET_CONFIG')
    return _group_tables(tables, str(folder.resolve()), dataset_name)


def _has_configs(folder: Path) -> bool:
    """Whether README.md or .huggingface.yaml names the files of the splits."""
    for name in ("README.md", ".huggingface.yaml"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.search(r"^configs:", (folder / name).read_text(encoding="utf-8"), re.MULTILINE):
                return True
    return False


def _walk(folder: Path) -> tuple[list[str], bool]:
    """(sorted tables below a folder, relative and with slashes; whether there is audio)."""
    tables, has_audio = [], False
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        relative = Path(parent).relative_to(folder)
        tables += [(relative / name).as_posix() for name in names if _is_table(name)]
        has_audio = has_audio or any(name.lower().endswith(AUDIO_SUFFIXES) for name in names)
    return sorted(tables), has_audio


def _is_table(name: str) -> bool:
    return name.lower().endswith(TABLE_SUFFIXES) and not name.startswith(".") and name not in DESCRIPTIONS


def _is_metadata(file: str) -> bool:
    return posixpath.basename(file) in METADATA_NAMES


def _group_tables(tables: Sequence[str], root: str, dataset_name: str) -> dict[str, SplitFiles]:
    """Splits of tables that stand beside loose audio, by the names of their folders or of themselves.

    Args:
        tables: paths relative to ``root`` (a folder, or an hf:// address).

    Raises:
        UserError: there is no table; they are of different kinds; one may or may not belong to a split train.
    """
    chosen = list(filter(_is_metadata, tables)) or tables
    by_suffix = [[table for table in chosen if table.lower().endswith(suffix)] for suffix in TABLE_SUFFIXES]
    taken = next(filter(None, by_suffix), [])
    if not taken:
        raise _no_transcripts(dataset_name)
    folders = set(map(posixpath.dirname, taken))
    if lost := [table for table in chosen if _is_metadata(table) and posixpath.dirname(table) not in folders]:
        raise UserError(
            f"DATASET_NAME: {dataset_name} has metadata of different kinds ({taken[0]}, {lost[0]}); make them one kind"
        )
    by_split: dict[str, list[str]] = {}
    for table, split in zip(taken, _splits_of(taken), strict=True):
        by_split.setdefault(split, []).append(table)
    if unnamed := by_split.pop("", []):
        by_split["train"] = _train_tables(by_split.get("train", []), unnamed, dataset_name)
    named = {split: by_split[split] for split in ("train", "validation", "test") if split in by_split}
    return {split: _by_suffix([f"{root}/{table}" for table in files]) for split, files in named.items()}


def _no_transcripts(dataset_name: str) -> UserError:
    return UserError(
        f"DATASET_NAME: {dataset_name} holds audio but no transcripts; a metadata.csv beside the clips is needed, with "
        "the header file_name,text and a line such as wavs/001.wav,What is said in it."
    )


def _train_tables(named: Sequence[str], unnamed: Sequence[str], dataset_name: str) -> list[str]:
    """The tables of train: those so called; else those that name no split.

    Raises:
        UserError: both occur, in different folders. In one folder the others are lists of another kind, as in
            Common Voice (validated.tsv beside train.tsv), and stay out.
    """
    if not named:
        if doubtful := [table for table in unnamed if _split_of(table, in_folders=_PART)]:
            say(f"{dataset_name}: {_some(doubtful)} taken for train; only a folder called just test or dev is no train")
        return list(unnamed)
    folders = {posixpath.dirname(table) for table in named}
    beside = [table for table in unnamed if posixpath.dirname(table) in folders]
    if elsewhere := [table for table in unnamed if table not in beside]:
        raise _no_split_named(elsewhere, named, dataset_name)
    say(f"{dataset_name}: {_some(beside)} left out, because {named[0]} beside it is the split train")
    return list(named)


def _no_split_named(unnamed: Sequence[str], train: Sequence[str], dataset_name: str) -> UserError:
    folder, name = posixpath.split(unnamed[0])
    advice = f"rename it to {posixpath.join(folder, f'train_{name}')} (or validation_, test_)"
    if _is_metadata(name):
        advice = "move it with its clips into a folder called train, validation or test"
    return UserError(
        f"DATASET_NAME: {dataset_name} has a split train ({train[0]}), and nothing tells the split of "
        f"{_some(unnamed)}; {advice}, or take it away"
    )


def _some(tables: Sequence[str]) -> str:
    return tables[0] if len(tables) == 1 else f"{tables[0]} and {len(tables) - 1} more"


def _splits_of(tables: Sequence[str]) -> list[str]:
    """train, validation or test for each table; "" where nothing tells.

    A person's folder may be called dev-tom: only a folder train, train_2 or train-00000-of-00001 names a split. But
    where each table has a name and some folder is called train-…, dev-… is the counterpart, as in LibriSpeech.
    """
    names = [_split_of(table, in_folders=_WHOLE) for table in tables]
    loose = [name or _split_of(table, in_folders=_PART) for name, table in zip(names, tables, strict=True)]
    newly_named = {new for name, new in zip(names, loose, strict=True) if not name}
    return loose if "train" in newly_named and "" not in newly_named else names


def _split_of(table: str, in_folders: str) -> str:
    """The split that a path's folders name, the last one first, then its own name; "" where nothing tells.

    Args:
        in_folders: pattern of a folder's name, with {word} for a split's name.
    """
    from datasets.data_files import SPLIT_KEYWORDS

    *folders, name = table.split("/")
    parts = [(folder, in_folders) for folder in reversed(folders)] + [(posixpath.splitext(name)[0], _PART)]
    for part, pattern in parts:
        for split, keywords in SPLIT_KEYWORDS.items():
            if any(re.search(pattern.format(word=word), part) for word in keywords):
                return str(split)
    return ""


# --------------------------------------------------------------------------------------------------- with datasets


def _from_library(dataset_name: str, config: str | None, folder: Path | None = None) -> dict[str, SplitFiles]:
    """Splits as ``datasets`` finds them: any folder, or a dataset on the Hub."""
    builder = _builder(dataset_name, config, folder)
    features = builder.info.features.to_dict() if builder.info.features else {}
    if builder.name == "cache":  # the Hub is out of reach, but an earlier load_dataset has left Arrow files
        return {
            name: SplitFiles("arrow", [item["filename"] for item in builder.as_dataset(name).cache_files], features)
            for name in builder.info.splits or {}
        }
    data_files = {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
    if builder.name == "audiofolder":
        return _audiofolder(builder, data_files, dataset_name)
    return {split: _library_split(builder, split, files, features) for split, files in data_files.items()}


def _library_split(builder: Any, split: str, files: Sequence[str], features: Mapping[str, Any]) -> SplitFiles:
    plain = {"csv": (".csv", ".tsv"), "json": (".json", ".jsonl", ".ndjson")}.get(builder.name, ())
    if builder.name == "parquet" or (builder.name == "arrow" and not is_remote(files)):
        return SplitFiles(builder.name, files, features)
    if plain and all(file.lower().endswith(plain) for file in files) and not getattr(builder.config, "field", None):
        delimiter = getattr(builder.config, "delimiter", None) or getattr(builder.config, "sep", None)
        return SplitFiles("table", files, features, {"delimiter": delimiter} if delimiter not in (None, ",") else {})
    return SplitFiles("stream", files, features, {"builder": builder, "split": split})


def _audiofolder(builder: Any, data_files: Mapping[str, Sequence[str]], dataset_name: str) -> dict[str, SplitFiles]:
    """Metadata files that the library attached to the splits, else tables in the repository's root."""
    metadata = {split: list(filter(_is_metadata, files)) for split, files in data_files.items()}
    if any(metadata.values()):
        return {split: _by_suffix(files) for split, files in metadata.items() if files}
    all_files = [file for files in data_files.values() for file in files]
    if any(file.lower().endswith(".zip") for file in all_files):
        return {split: _library_split(builder, split, files, {}) for split, files in data_files.items()}
    if not is_remote(all_files):
        raise _no_transcripts(dataset_name)
    root = repository(all_files[0])
    with reading(root):
        names = [posixpath.basename(name) for name in hub_files().ls(root, detail=False)]
    return _group_tables(sorted(name for name in names if _is_table(name)), root, dataset_name)


def _builder(dataset_name: str, config: str | None, folder: Path | None) -> Any:
    """``datasets.load_dataset_builder`` with its errors turned into one sentence each."""
    from datasets import load_dataset_builder
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from requests.exceptions import ConnectionError as RequestsConnectionError
    from requests.exceptions import Timeout

    name = dataset_name.rstrip("/")
    if folder is None and not re.fullmatch(HUB_ID, name):
        raise UserError(f"DATASET_NAME: there is no file or folder {dataset_name} (nor is it a Hub id, owner/name)")
    unknown = (
        f"DATASET_NAME: {dataset_name} is neither a folder here (seen from {Path.cwd()}) nor a dataset on the Hub that "
        "can be read; check the spelling, or set HF_TOKEN if it is private"
    )
    unreachable = (
        f"DATASET_NAME: {dataset_name} is no folder here, and the Hub cannot be reached or is switched off "
        "(HF_HUB_OFFLINE); check the network or HF_ENDPOINT, or download the dataset elsewhere and name its folder"
    )
    try:
        return load_dataset_builder(name if folder is None else str(folder), config)
    except (EmptyDatasetError, DataFilesNotFoundError):
        raise UserError(
            f"DATASET_NAME: {dataset_name} holds no data files that can be read "
            "(parquet, arrow, csv, tsv, jsonl, json, or audio with a metadata.csv)"
        ) from None
    except DatasetNotFoundError as error:
        if "gated" not in str(error):
            raise UserError(unknown) from None
        raise UserError(
            f"DATASET_NAME: {dataset_name} is gated; accept its terms on its page and set HF_TOKEN to a token of "
            "that account"
        ) from None
    except (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled, RequestsConnectionError, Timeout):
        raise UserError(unreachable) from None
    except (HFValidationError, FileNotFoundError):
        raise UserError(unknown) from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"DATASET_NAME: {dataset_name} is made by a script of its own, which datasets no longer runs; take a copy "
            "of it in parquet (the Hub keeps one of many datasets on the branch refs/convert/parquet)"
        ) from None
    except ValueError as error:
        available = re.search(r"\[(.*?)\]", str(error), re.DOTALL)
        if available and "onfig" in str(error):
            wanted = f'has no configuration "{config}"' if config else "has several configurations"
            choices = available[1].replace("'", "")
            raise UserError(
                f"DATASET_CONFIG: {dataset_name} {wanted}; set DATASET_CONFIG to one of: {choices}"
            ) from None
        raise UserError(f"DATASET_NAME: {dataset_name} cannot be read ({first_line(error)})") from None
    except OSError as error:
        raise UserError(f"DATASET_NAME: {dataset_name} cannot be read ({first_line(error)})") from None


# ------------------------------------------------------------------------------------------------------- addresses


def is_remote(files: Sequence[str]) -> bool:
    """Whether any of them lies on the Hub."""
    return any(file.startswith("hf://") for file in files)


def repository(address: str) -> str:
    """hf://datasets/<owner>/<name>@<commit> of an address in it."""
    return re.match(r"hf://datasets/[^@]+@[^/]+", address)[0]


def path_in_repository(address: str) -> str:
    """What follows the repository in an address, without slashes at its ends."""
    return address[len(repository(address)) :].strip("/")


def hub_files() -> Any:
    """The Hub as an fsspec file system."""
    from datasets import config
    from huggingface_hub import HfFileSystem

    return HfFileSystem(endpoint=config.HF_ENDPOINT)


@contextlib.contextmanager
def reading(file: str) -> Iterator[None]:
    """Errors of reading a file become one sentence that names it.

    Raises:
        UserError
    """
    import pyarrow

    try:
        yield
    except UnicodeDecodeError:
        raise UserError(f"DATASET_NAME: {file} is not UTF-8 text") from None
    except (OSError, pyarrow.ArrowException, csv.Error, json.JSONDecodeError) as error:
        advice = (
            "check the network and HF_TOKEN and run it again"
            if file.startswith("hf://")
            else "it is damaged, cut off or of another kind; fetch it again or take it away"
        )
        raise UserError(f"DATASET_NAME: {file} cannot be read ({first_line(error)}); {advice}") from None


def first_line(error: Exception) -> str:
    """Of an error's message, at most 200 characters; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
