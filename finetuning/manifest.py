"""The row: one JSON object a line, read and checked.

Keys: ``audio`` (path), ``text``, ``audio_codes`` (T lists of 16 ints; absent in a raw file), ``ref_audio``,
``ref_text``, ``language`` (default "Auto"), ``speaker`` (default SPEAKER_NAME), ``instruct``; others are kept. Of a
list of ``ref_audio`` the first counts, as for the official scripts; the others are not kept. Paths are taken from the
working directory, then from the JSONL's folder. A row with ``augmentation`` is an altered copy: its codes are not those
of its ``audio``, which is the original's (see ``augment``).

A bad row among many is skipped and listed; when more than a tenth is bad, nothing goes on.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.codec import CODEBOOK_SIZE, NUM_CODEBOOKS
from finetuning.errors import UserError
from finetuning.settings import Settings, speaker_name_problem

#: Above this share of bad rows the file itself is taken to be wrong.
MAX_BAD_SHARE = 0.1
#: So many bad rows stand in a message; the others are in the list.
NUM_SHOWN = 5
#: Stock generation makes at least two frames (min_new_tokens), so shorter rows could never be given back.
MIN_CODEC_FRAMES = 2
#: … and at most so many (max_new_tokens of the release), about eleven minutes.
MAX_CODEC_FRAMES = 8192
#: Of what is no file so many letters stand in a message: it may be a clip in base64.
MAX_PATH_LETTERS = 300
#: Where a line's codes begin, and one frame of them without its digits.
_CODES_KEY = re.compile(r'"audio_codes": ?(?=\[\[)')
_EMPTY_FRAME = b"[" + b"," * (NUM_CODEBOOKS - 1) + b"]"


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
        raw: the JSON object as it stood in the file; a quick reading leaves ``audio_codes`` out.
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

    @property
    def is_copy(self) -> bool:
        """Whether it is an altered copy of a clip."""
        return is_copy(self.raw, self.codes is not None)


def is_copy(record: dict[str, Any], has_codes: bool = True) -> bool:
    """Whether a row's object is that of an altered copy. What its codes were made of says so where it says anything;
    a row without codes that has a key of this name is somebody's clip."""
    source = record.get("codes_source")
    is_made = "augmentation" in source if isinstance(source, dict) else has_codes
    return isinstance(record.get("augmentation"), dict) and is_made


# -------------------------------------------------------------------------------------------------------- reading


def check_is_file(path: Path, setting: str) -> None:
    """Raises UserError, which names the setting, when there is no such file."""
    if not path.is_file():
        raise UserError(f"{setting}: {path} does not exist")


def read_lines(path: Path, setting: str) -> Iterator[tuple[int, str]]:
    """(line number, line) of every non-blank line.

    Raises:
        UserError: the file is missing, empty, or not UTF-8 text; the message names the setting.
    """
    check_is_file(path, setting)
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


def parse_row(
    line: str, number: int, folder: Path, row_format: RowFormat, needs_codes: bool, quick: bool = False
) -> Row:
    """Checks one line.

    Args:
        folder: where relative paths are looked up after the working directory.
        needs_codes: whether a row without codes is an error; if not, such a row must name an existing audio file.
        quick: read good codes past the JSON parser, in half the time; ``raw`` then lacks them.

    Raises:
        RowError
    """
    raw, codes = (_load_quickly(line) if quick else None) or _load(line)
    audio = _path(raw, row_format.audio_key, folder)
    if codes is None and needs_codes:
        raise RowError("no audio_codes; data_processing.py --mode encode adds them")
    if codes is None and audio is None:
        raise RowError(f"neither {row_format.audio_key} nor audio_codes")
    if codes is None and not audio.is_file():
        raise _not_found(raw, row_format.audio_key)
    ref_audio = _path(raw, "ref_audio", folder)
    if ref_audio is not None and not ref_audio.is_file():
        raise _not_found(raw, "ref_audio")
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


def _load(line: str) -> tuple[dict[str, Any], np.ndarray | None]:
    """The line's object and its checked codes, if it has any."""
    raw = _load_object(line)
    return raw, None if raw.get("audio_codes") is None else check_codes(raw["audio_codes"])


def _load_object(line: str) -> dict[str, Any]:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"not a JSON object (column {error.colno}: {error.msg}); is the line cut off?") from None
    if not isinstance(raw, dict):
        raise RowError("not a JSON object")
    if "\\ud" in line.lower():
        _check_surrogates(raw)
    if isinstance(references := raw.get("ref_audio"), list):
        raw["ref_audio"] = references[0] if references else None
    return raw


def _load_quickly(line: str) -> tuple[dict[str, Any], np.ndarray] | None:
    """What ``_load`` gives, but without the codes in the object; None where only ``_load`` can tell.

    Nearly the whole line is codes, and as nested lists they cost more than all other work on a row.
    """
    if (key := _CODES_KEY.search(line)) is None or (end := line.find("]]", key.end()) + 2) < 2:
        return None
    text = line[key.end() : end].encode()
    num_frames = text.count(b"]") - 1
    # Nothing but numbers within frames of 16, and no space but behind a comma.
    if text.translate(None, b"0123456789 ") != b"[" + b",".join([_EMPTY_FRAME] * num_frames) + b"]":
        return None
    if text.count(b" ") != text.count(b", "):
        return None
    try:
        codes = np.fromstring(text.translate(None, b"[]").decode(), dtype=np.int64, sep=",")
        # "" stands for the codes: it must come back as the object's own key, not as one of something inside it.
        raw = _load_object(f'{line[: key.end()]}""{line[end:]}')
        codes = check_codes(codes.reshape(num_frames, NUM_CODEBOOKS))
    except ValueError:
        return None
    return (raw, codes) if raw.pop("audio_codes", None) == "" else None


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
        raise _not_found(raw, key) from None


def _not_found(raw: dict, key: str) -> RowError:
    value = raw[key]  # a Path of it would lose one of the slashes of a URL
    remark = " (a URL; files are read)" if "://" in value else ""
    return RowError(f"{key} file not found: {value[:MAX_PATH_LETTERS]}{remark}")


# ------------------------------------------------------------------------------------------------------- bad rows


@dataclass
class Tally:
    """Good and bad rows, counted; only the first few bad ones are remembered, without their content.

    Attributes:
        first: "file", "line" and "reason" of the first NUM_SHOWN bad rows.
    """

    num_good: int = 0
    num_bad: int = 0
    first: list[dict[str, Any]] = field(default_factory=list)

    def add(self, num_good: int, rejected: Sequence[dict[str, Any]]) -> None:
        """Counts rows.

        Args:
            rejected: bad rows, see ``rejected_record``.
        """
        self.num_good += num_good
        self.num_bad += len(rejected)
        free = NUM_SHOWN - len(self.first)
        self.first += [{key: bad[key] for key in ("file", "line", "reason")} for bad in rejected[:free]]

    def check_share(self, total: int | None = None) -> None:
        """Stops when more than a tenth of the rows (of ``total``, where more are to come) is bad."""
        if self.num_bad > MAX_BAD_SHARE * (total or self.num_good + self.num_bad):
            raise UserError(self.summary("cannot be used"))

    def summary(self, verdict: str = "") -> str:
        """The count, and what is wrong with the first few."""
        shown = [f"  {bad['file']} line {bad['line']}: {bad['reason']}" for bad in self.first]
        more = [f"  … and {self.num_bad - len(shown)} more"] if self.num_bad > len(shown) else []
        heading = f"{self.num_bad} of {self.num_good + self.num_bad} rows {verdict}".rstrip()
        return "\n".join([f"{heading}:", *shown, *more])


def rejected_record(jsonl: Path, number: int, reason: str, line: str) -> dict[str, Any]:
    """One bad row as the lists of bad rows hold it."""
    return {"file": str(jsonl), "line": number, "reason": reason, "row": line.rstrip("\n")}


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
    tally: Tally,
    *,
    needs_codes: bool,
    max_rows: int | None = None,
    quick: bool = False,
) -> Iterator[Row]:
    """The usable rows of a file, at most ``max_rows``; the others go to ``tally``, which counts both.

    Args:
        quick: see ``parse_row``.
    """
    for number, line in read_lines(jsonl, setting):
        if max_rows is not None and tally.num_good >= max_rows:
            return
        try:
            row = parse_row(line, number, jsonl.parent, row_format, needs_codes, quick)
        except RowError as error:
            tally.add(0, [rejected_record(jsonl, number, str(error), line)])
            continue
        tally.num_good += 1
        yield row


def remove_empty_folders(*folders: Path) -> None:
    """Removes those folders that are empty, in the given order: nothing is left behind by a refused run."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
