"""The row: one JSON object a line, read, checked, and served from a memory map.

Keys: ``audio`` (path), ``text``, ``audio_codes`` (T lists of 16 ints; absent in a raw file), ``ref_audio``,
``ref_text``, ``language`` (default "Auto"), ``speaker`` (default SPEAKER_NAME), ``instruct``; others are kept. Paths
are taken from the working directory, then from the JSONL's folder.

A bad row among many is skipped and listed; when more than a tenth is bad, nothing goes on.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.codec import CODEBOOK_SIZE, NUM_CODEBOOKS
from finetuning.console import say
from finetuning.errors import UserError
from finetuning.settings import Settings, speaker_name_problem

#: Above this share of bad rows the file itself is taken to be wrong.
MAX_BAD_SHARE = 0.1
#: Stock generation makes at least two frames (min_new_tokens), so shorter rows could never be given back.
MIN_CODEC_FRAMES = 2
#: … and at most so many (max_new_tokens of the release), about eleven minutes.
MAX_CODEC_FRAMES = 8192


class RowError(ValueError):
    """What is wrong with one row, without its place."""


@dataclass(frozen=True)
class RowFormat:
    """Where a row's fields stand and what fills the gaps.

    Attributes:
        text_key, audio_key, speaker_key, language_key: row keys, from TEXT_COLUMN and its like.
        default_speaker: for rows that name none.
        special_tokens: strings that the base's tokenizer would read as control tokens; refused in texts.
    """

    text_key: str = "text"
    audio_key: str = "audio"
    speaker_key: str = "speaker"
    language_key: str = "language"
    default_speaker: str = "reference_speaker"
    special_tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

    @classmethod
    def from_settings(cls, settings: Settings, special_tokens: Sequence[str] = ()) -> RowFormat:
        return cls(
            text_key=settings.text_column,
            audio_key=settings.audio_column,
            speaker_key=settings.speaker_column or "speaker",
            language_key=settings.language_column or "language",
            default_speaker=settings.speaker_name,
            special_tokens=tuple(special_tokens) or cls.special_tokens,
        )


@dataclass(frozen=True)
class Row:
    """One checked row.

    Attributes:
        line: line number in its file, from 1.
        codes: (T, 16) int16, or None in a raw row.
        audio, ref_audio: paths that were resolved, or None.
        raw: the JSON object as it stood in the file.
    """

    line: int
    text: str
    language: str
    speaker: str
    instruct: str | None
    audio: Path | None
    ref_audio: Path | None
    ref_text: str | None
    codes: np.ndarray | None
    raw: dict[str, Any]


# -------------------------------------------------------------------------------------------------------- reading


def read_lines(path: Path, setting: str) -> Iterator[tuple[int, str]]:
    """(line number, line) of every non-blank line.

    Raises:
        UserError: the file is missing, empty, or not UTF-8 text; the message names the setting.
    """
    if not path.is_file():
        raise UserError(f"{setting}: {path} does not exist")
    empty = True
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    empty = False
                    yield number, line
    except UnicodeDecodeError:
        raise UserError(f"{setting}: {path} is not UTF-8 text (one JSON object a line)") from None
    if empty:
        raise UserError(f"{setting}: {path} is empty (one JSON object a line)")


def normalize_text(text: str) -> str:
    """Single spaces, none at the ends: a leading newline would merge into the role tokens."""
    return " ".join(text.split())


def parse_row(line: str, number: int, folder: Path, row_format: RowFormat, needs_codes: bool) -> Row:
    """Checks one line.

    Args:
        folder: where relative paths are looked up after the working directory.
        needs_codes: whether a row without codes is an error; if not, such a row must name an existing audio file.

    Raises:
        RowError
    """
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"not a JSON object (column {error.colno}: {error.msg}); is the line cut off?") from None
    if not isinstance(raw, dict):
        raise RowError("not a JSON object")
    if "\\ud" in line.lower():
        _check_surrogates(raw)
    codes = None if raw.get("audio_codes") is None else check_codes(raw["audio_codes"])
    audio = _path(raw, row_format.audio_key, folder)
    if codes is None and needs_codes:
        raise RowError("no audio_codes; data_processing.py --mode encode adds them")
    if codes is None and audio is None:
        raise RowError(f"neither {row_format.audio_key} nor audio_codes")
    if codes is None and not audio.is_file():
        raise RowError(f"{row_format.audio_key} file not found: {audio}")
    ref_audio = _path(raw, "ref_audio", folder)
    if ref_audio is not None and not ref_audio.is_file():
        raise RowError(f"ref_audio file not found: {ref_audio}")
    return Row(line=number, audio=audio, ref_audio=ref_audio, codes=codes, raw=raw, **check_fields(raw, row_format))


def check_fields(raw: dict[str, Any], row_format: RowFormat) -> dict[str, Any]:
    """``text``, ``language``, ``speaker``, ``instruct`` and ``ref_text`` of a row, checked and normalised.

    Raises:
        RowError
    """
    speaker = _string(raw, row_format.speaker_key) or row_format.default_speaker
    if problem := speaker_name_problem(speaker):
        raise RowError(problem)
    return {
        "text": _text(raw, row_format.text_key, row_format.special_tokens, required=True),
        "language": _string(raw, row_format.language_key) or "Auto",
        "speaker": speaker,
        "instruct": _text(raw, "instruct", row_format.special_tokens) or None,
        "ref_text": _text(raw, "ref_text", row_format.special_tokens) or None,
    }


def _check_surrogates(raw: dict[str, Any]) -> None:
    """JSON can escape half of a surrogate pair (an emoji that was cut in two); no UTF-8 file can hold it."""
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError("half of a surrogate pair (\\ud8xx): a character was cut in two") from None


def check_codes(value: Any) -> np.ndarray:
    """(T, 16) int16 from a row's ``audio_codes``.

    Raises:
        RowError: wrong shape (16 x T is named as such), not integers, or out of range.
    """
    try:
        codes = np.asarray(value)
    except ValueError:
        raise RowError("audio_codes: frames of different lengths; T lists of 16 integers are needed") from None
    if codes.dtype.kind not in "iu":
        raise RowError("audio_codes must be T lists of 16 integers")
    if codes.ndim == 2 and codes.shape[1] != NUM_CODEBOOKS and codes.shape[0] == NUM_CODEBOOKS:
        raise RowError(f"audio_codes has shape 16 x {codes.shape[1]}; it must be T x 16 (transpose it)")
    if codes.ndim != 2 or codes.shape[1] != NUM_CODEBOOKS:
        raise RowError(f"audio_codes has shape {' x '.join(map(str, codes.shape))}; it must be T x 16")
    if len(codes) < MIN_CODEC_FRAMES:
        raise RowError(f"audio_codes has {len(codes)} frame(s), at least {MIN_CODEC_FRAMES} are needed")
    if len(codes) > MAX_CODEC_FRAMES:
        raise RowError(f"audio_codes has {len(codes)} frames, more than the {MAX_CODEC_FRAMES} that can be generated")
    if codes.min() < 0 or codes.max() >= CODEBOOK_SIZE:
        raise RowError(f"audio_codes out of range: {codes.min()} to {codes.max()}, allowed 0 to {CODEBOOK_SIZE - 1}")
    return codes.astype(np.int16)


def resolve_path(path: str, folder: Path) -> Path:
    """A path as given from the working directory if it exists there, else from ``folder``."""
    given = Path(path).expanduser()
    if given.is_absolute() or given.exists():
        return given
    beside = folder / given
    return beside if beside.exists() else given


def _string(raw: dict, key: str) -> str:
    value = raw.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RowError(f"{key} must be a string")
    return str(value)


def _text(raw: dict, key: str, special_tokens: Sequence[str], required: bool = False) -> str:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{key} must be a string")
    text = normalize_text(value or "")
    if required and not text:
        raise RowError(f"no {key}" if value is None else f"{key} is empty")
    for token in special_tokens:
        if token in text:
            raise RowError(f"{key} contains the special token {token}, which would end or break the prompt")
    return text


def _path(raw: dict, key: str, folder: Path) -> Path | None:
    value = raw.get(key)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise RowError(f"{key} must be a path")
    try:
        return resolve_path(value, folder)
    except (OSError, RuntimeError):  # too long for a file name, or the home folder of nobody
        raise RowError(f"{key} file not found: {value[:100]}") from None


# ------------------------------------------------------------------------------------------------------- bad rows


@dataclass
class Rejections:
    """Bad rows of one file: counted, listed, and fatal when they are too many."""

    file: Path
    rows: list[tuple[int, str, str]] = field(default_factory=list)  # (line number, reason, the line)
    num_good: int = 0

    def add(self, number: int, reason: str, line: str) -> None:
        self.rows.append((number, reason, line.rstrip("\n")))

    def check(self, list_file: Path) -> None:
        """Writes the list of bad rows to ``list_file``, or stops when they are more than a tenth.

        Raises:
            UserError
        """
        if not self.rows:
            list_file.unlink(missing_ok=True)  # of an earlier run
            return
        self.check_share()
        list_file.parent.mkdir(parents=True, exist_ok=True)
        with list_file.open("w", encoding="utf-8") as stream:
            for number, reason, line in self.rows:
                record = {"file": str(self.file), "line": number, "reason": reason, "row": line}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        say(f"skipped {self._first_few()}\n  listed in {list_file}")

    def check_share(self) -> None:
        """Stops when more than a tenth of the rows is bad."""
        if len(self.rows) > MAX_BAD_SHARE * (self.num_good + len(self.rows)):
            raise UserError(self._first_few("cannot be used"))

    def _first_few(self, verdict: str = "") -> str:
        shown = [f"  {self.file} line {number}: {reason}" for number, reason, _ in self.rows[:5]]
        more = [f"  … and {len(self.rows) - 5} more"] if len(self.rows) > 5 else []
        heading = f"{len(self.rows)} of {self.num_good + len(self.rows)} rows {verdict}".rstrip()
        return "\n".join([f"{heading}:", *shown, *more])


def check_speaker_names(names: dict[str, tuple[Path, int]]) -> None:
    """Raises UserError where two spellings differ in case only; stock looks speakers up in lower case.

    Args:
        names: each spelling -> (file, line) of its first use.
    """
    seen: dict[str, str] = {}
    for name, (file, line) in names.items():
        other = seen.setdefault(name.lower(), name)
        if other != name:
            first_file, first_line = names[other]
            raise UserError(
                f'speaker names clash: "{other}" ({first_file} line {first_line}) and "{name}" ({file} line {line}) '
                "differ in case only, and qwen-tts looks names up in lower case; use one spelling"
            )


def read_rows(
    jsonl: Path,
    setting: str,
    row_format: RowFormat,
    rejections: Rejections,
    *,
    needs_codes: bool,
    max_rows: int | None = None,
) -> Iterator[Row]:
    """The usable rows of a file, at most ``max_rows``; the others go to ``rejections``, which counts both."""
    for number, line in read_lines(jsonl, setting):
        if max_rows is not None and rejections.num_good >= max_rows:
            return
        try:
            row = parse_row(line, number, jsonl.parent, row_format, needs_codes)
        except RowError as error:
            rejections.add(number, str(error), line)
            continue
        rejections.num_good += 1
        yield row


# ------------------------------------------------------------------------------------------------------ memory map


class Manifest:
    """Checked rows with codes in an Arrow file, memory-mapped; only the rows that are asked for come into memory.

    Columns: line, text, language, speaker, instruct, audio, ref_audio, ref_text, num_codec_frames, codes (T*16 int16).
    """

    def __init__(self, arrow_file: Path, indices: np.ndarray | None = None) -> None:
        from datasets import Dataset

        self.arrow_file = arrow_file
        self._table = Dataset.from_file(str(arrow_file)).with_format("arrow")
        self.indices = np.arange(len(self._table)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The columns of one row; ``codes`` as (T, 16) int16."""
        record = self._table[int(self.indices[index])]
        row = {name: record.column(name)[0].as_py() for name in record.column_names if name != "codes"}
        codes = record.column("codes")[0].values.to_numpy().reshape(-1, NUM_CODEBOOKS)
        return row | {"codes": codes}

    def column(self, name: str) -> np.ndarray:
        """One column (any but codes) of all rows."""
        return np.asarray(self._table.data.column(name).to_numpy())[self.indices]

    def select(self, positions: np.ndarray) -> Manifest:
        """A view of some rows, in the given order."""
        return Manifest(self.arrow_file, self.indices[positions])


def build_manifest(
    jsonl: Path, arrow_file: Path, row_format: RowFormat, setting: str, max_rows: int | None, rejected_file: Path
) -> Manifest:
    """Checks a JSONL whose rows have codes and writes the Arrow file (to a temporary name, then renamed).

    Raises:
        UserError: too many bad rows, clashing speaker names, or all rows with the same codes.
    """
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    text_columns = ("text", "language", "speaker", "instruct", "audio", "ref_audio", "ref_text")
    features = Features(
        {name: Value("string") for name in text_columns}
        | {"line": Value("int64"), "num_codec_frames": Value("int32"), "codes": List(Value("int16"))}
    )
    rejections, speakers = Rejections(jsonl), {}
    code_hashes: set[int] = set()
    speaker_ids: set[str] = set()
    arrow_file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = arrow_file.with_suffix(".tmp")
    try:
        with ArrowWriter(path=str(unfinished), features=features, writer_batch_size=256) as writer:
            for row in read_rows(jsonl, setting, row_format, rejections, needs_codes=True, max_rows=max_rows):
                speakers.setdefault(row.speaker, (jsonl, row.line))
                code_hashes.add(hash(row.codes.tobytes()))
                speaker_ids.add(str(row.raw.get("speaker_id", "")))
                writer.write({name: _optional_text(getattr(row, name)) for name in text_columns} | _numbers(row))
            writer.finalize()
        rejections.check_share()
        check_speaker_names(speakers)
        if rejections.num_good > 1 and len(code_hashes) == 1:
            raise UserError(
                f"{setting}: all {rejections.num_good} rows of {jsonl} have the same codes, so there is nothing to "
                "learn; encode the audio again (data_processing.py --mode encode --force)"
            )
        if len(speaker_ids) > 1 and len(speakers) == 1:
            say(
                f"{jsonl}: rows carry {len(speaker_ids)} different speaker_id values but are trained as one speaker "
                f"({next(iter(speakers))}); set SPEAKER_COLUMN=speaker_id to keep them apart",
            )
        rejections.check(rejected_file)
        unfinished.rename(arrow_file)
    finally:
        unfinished.unlink(missing_ok=True)
        remove_empty_folders(arrow_file.parent, arrow_file.parent.parent)
    return Manifest(arrow_file)


def remove_empty_folders(*folders: Path) -> None:
    """Removes those folders that are empty, in the given order: nothing is left behind by a refused run."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _optional_text(value: str | Path | None) -> str | None:
    return None if value is None else str(value)


def _numbers(row: Row) -> dict[str, Any]:
    return {"line": row.line, "num_codec_frames": len(row.codes), "codes": row.codes.reshape(-1)}


def hold_out(manifest: Manifest, fraction: float, seed: int, min_rows: int = 20) -> tuple[Manifest, Manifest | None]:
    """Splits rows into (training, validation): the fraction of each speaker's rows, seeded.

    Speakers with fewer than ``min_rows`` rows hold none out; without any held-out row the second part is None.
    """
    speakers = manifest.column("speaker")
    generator = np.random.default_rng(seed)
    held: list[int] = []
    for speaker in dict.fromkeys(speakers):
        rows = np.flatnonzero(speakers == speaker)
        if fraction > 0 and len(rows) >= min_rows:
            held += generator.permutation(rows)[: max(1, round(fraction * len(rows)))].tolist()
    if not held:
        return manifest, None
    mask = np.zeros(len(manifest), dtype=bool)
    mask[held] = True
    return manifest.select(np.flatnonzero(~mask)), manifest.select(np.flatnonzero(mask))
