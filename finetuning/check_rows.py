"""The verdict on the rows of a JSONL: in full for ``--mode check``, in short at the start of a run."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from finetuning.audio import AudioError, audio_duration_seconds, load_audio
from finetuning.base_model import Base, load_speaker_encoder, resolve_base
from finetuning.checks import (
    Finding,
    ReferenceVoice,
    faulty_lines,
    find_problems,
    similarity_findings,
    sort_findings,
)
from finetuning.codec import Codec
from finetuning.console import command_of, say
from finetuning.direct import DirectRows
from finetuning.encoding import CHUNK_ROWS
from finetuning.errors import UserError
from finetuning.figures import collect
from finetuning.manifest import Row, RowFormat, Tally, check_fields, read_rows, rejected_record
from finetuning.mend import check_mending, mend
from finetuning.preparer import device_of_this_process
from finetuning.quality import measure_clip
from finetuning.report import print_table, verdict, write_report
from finetuning.row_index import Manifest
from finetuning.settings import Settings
from finetuning.training_rows import TrainingRows

#: Where ``--mode check`` writes report.html and report.json.
REPORT_FOLDER = Path("data/report")
#: Clips of each speaker that the speaker encoder hears, and speakers.
MAX_VOICE_CLIPS, MAX_VOICE_SPEAKERS = 64, 100
#: Distinct references of each speaker that it hears.
MAX_VOICE_REFERENCES = 20
#: The short form looks at so many rows, evenly spread.
MAX_ROWS_AT_START = 5_000
#: Findings that are wrong about a part of the rows.
WHOLE_SET_CHECKS = ("speaker_minutes", "not_measured")
#: More workers than this do not make a disk faster.
MAX_MEASURING_WORKERS = 8
#: What each way of mending mends: checks whose rows then need not be left out.
MENDED_BY_TRIMMING, MENDED_BY_LOUDNESS = ("leading_silence", "trailing_silence"), ("quiet_clips",)


@dataclass(frozen=True)
class Mending:
    """What ``--mode check`` mends, into new files; all off by default.

    Attributes:
        output_jsonl: the mended rows.
        drop_flagged: leave out the rows that ``checks.faulty_lines`` names, but for what is mended otherwise.
    """

    output_jsonl: Path | None = None
    trim_silence: bool = False
    target_loudness_lufs: float | None = None
    drop_flagged: bool = False

    def __bool__(self) -> bool:
        return self.trim_silence or self.drop_flagged or self.target_loudness_lufs is not None

    def check(self) -> None:
        """Raises UserError for what cannot be done."""
        if self and self.output_jsonl is None:
            raise UserError("mending writes new files: name the new JSONL with --output_jsonl")
        if self.output_jsonl and not self:
            raise UserError("--output_jsonl is for mending; add --trim_silence, --loudness or --drop_flagged")
        if self.output_jsonl:
            check_mending(self.output_jsonl, self.target_loudness_lufs)

    @property
    def mended_checks(self) -> tuple[str, ...]:
        by_trimming = MENDED_BY_TRIMMING if self.trim_silence else ()
        return by_trimming + (MENDED_BY_LOUDNESS if self.target_loudness_lufs is not None else ())


class _BadRows(Tally):
    """Bad rows with the line numbers of all, eight bytes each."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = array("q")

    def add(self, num_good: int, rejected: Sequence[dict[str, Any]]) -> None:
        super().add(num_good, rejected)
        self.lines.extend(bad["line"] for bad in rejected)


def check_jsonl(
    settings: Settings, jsonl: Path, mending: Mending, *, setting: str = "TRAIN_JSONL", max_rows: int | None = None
) -> None:
    """Judges all rows, with or without codes: prints a table, writes the report, mends where that is asked for.

    Clips that no earlier run has measured are read; the speaker encoder of the base hears some of each speaker.

    Raises:
        UserError: the file cannot be read, the mending cannot be done, or there are errors in the data (after the
            report was written).
    """
    mending.check()
    base, row_format = _base_if_at_hand(settings)
    bad_rows, voices = _BadRows(), _VoiceSample(settings)
    rows = _originals(read_rows(jsonl, setting, row_format, bad_rows, needs_codes=False, max_rows=max_rows), bad_rows)
    figures = collect(_measured(rows, jsonl, bad_rows, voices, settings), reference_seconds=audio_duration_seconds)
    findings = [*find_problems(figures), *_unusable(bad_rows), *voices.findings(base, settings)]
    findings = sort_findings(findings)
    page = write_report(REPORT_FOLDER, findings, figures, str(jsonl))
    say(f"{print_table(findings, figures)}\nreport: {page}")
    if mending:
        _mend(jsonl, setting, row_format, findings, mending, max_rows)
    if any(finding.severity == "error" for finding in findings):
        raise UserError(f"{jsonl}: {verdict(findings)}")


def _originals(rows: Iterable[Row], tally: Tally) -> Iterator[Row]:
    """The rows without augmented copies, which are altered on purpose; the copies are counted neither as good nor as
    bad."""
    num_copies = 0
    for row in rows:
        if row.is_copy:
            num_copies += 1
            tally.num_good -= 1
        else:
            yield row
    if num_copies:
        say(f"{num_copies} augmented copies are not looked at")


def _base_if_at_hand(settings: Settings) -> tuple[Base | None, RowFormat]:
    try:
        base = resolve_base(settings)
    except UserError as error:
        say(f"voices are not compared, because the base is out of reach: {error}")
        return None, RowFormat.from_settings(settings)
    return base, RowFormat.from_settings(settings, base.special_tokens())


def _unusable(bad_rows: _BadRows) -> list[Finding]:
    if not bad_rows.num_bad:
        return []
    try:
        bad_rows.check_share()
    except UserError:
        severity = "error"
    else:
        severity = "warning"
    message = f"{bad_rows.num_bad} rows cannot be used at all"
    advice = "Mend them, or leave them: up to a tenth is skipped in training."
    examples = [(bad["line"], bad["reason"]) for bad in bad_rows.first]
    lines = np.array(bad_rows.lines, np.int64)
    return [Finding("unusable_rows", severity, message, advice, bad_rows.num_bad, examples, lines)]


# -------------------------------------------------------------------------------------------------------- measuring


def _measured(
    rows: Iterable[Row], jsonl: Path, bad_rows: Tally, voices: _VoiceSample, settings: Settings
) -> Iterator[dict[str, Any]]:
    """Rows as ``figures.collect`` takes them; those that no earlier run has measured are read by data workers."""
    from torch.utils.data import DataLoader

    workers = (
        settings.num_workers if settings.is_set("num_workers") else min(MAX_MEASURING_WORKERS, os.cpu_count() or 1)
    )
    loader = DataLoader(_Measurer(), sampler=rows, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    for row, measures, problem in tqdm(loader, desc="check", unit="row", disable=None):
        if problem:
            bad_rows.add(
                -1, [rejected_record(jsonl, row.line, f"{row.audio}: {problem}", "")]
            )  # it was counted as good
            continue
        voices.offer(row)
        yield {
            "line": row.line,
            "text": row.text,
            "language": row.language,
            "speaker": row.speaker,
            "num_codec_frames": 0 if row.codes is None else len(row.codes),
            "codes": row.codes,
            "measures": measures,
            "ref_audio": str(row.ref_audio or settings.ref_audio_path or "") or None,
        }


class _Measurer:
    """The worker's side: a row to (row, measures or None, what is wrong with its audio or None)."""

    def __getitem__(self, row: Row) -> tuple[Row, dict[str, Any] | None, str | None]:
        measures = row.raw.get("measures")
        if isinstance(measures, dict) or row.audio is None or not row.audio.is_file():
            return row, measures if isinstance(measures, dict) else None, None
        try:
            return row, measure_clip(load_audio(row.audio)), None
        except AudioError as error:
            return row, None, str(error)

    def __len__(self) -> int:
        raise TypeError("the number of rows is not known ahead")


def _as_it_is(item: Any) -> Any:
    return item


# ----------------------------------------------------------------------------------------------------------- voices


@dataclass
class _HeardReference:
    """A reference, the first row that it stands for, their number, and a number drawn from its path."""

    path: str
    line: int
    draw: bytes
    num_rows: int = 0


@dataclass
class _VoiceSample:
    """Some clips and references of each speaker, drawn evenly as the rows go by."""

    settings: Settings
    clips: dict[str, list[Row]] = field(default_factory=dict)
    references: dict[str, dict[str, _HeardReference]] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)
    _generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def offer(self, row: Row) -> None:
        """Keeps the row with the chance that makes the sample even."""
        if row.speaker not in self.clips and len(self.clips) == MAX_VOICE_SPEAKERS:
            return
        sample = self.clips.setdefault(row.speaker, [])
        reference = row.ref_audio or self.settings.ref_audio_path
        if reference is not None:
            self._offer_reference(row, str(reference))
        self._seen[row.speaker] = count = self._seen.get(row.speaker, 0) + 1
        kept = replace(row, raw={})
        if len(sample) < MAX_VOICE_CLIPS:
            sample.append(kept)
        elif (place := self._generator.integers(count)) < MAX_VOICE_CLIPS:
            sample[place] = kept

    def _offer_reference(self, row: Row, path: str) -> None:
        """Of the distinct references those with the lowest draws stay; one that had to go never comes back."""
        kept = self.references.setdefault(row.speaker, {})
        if path not in kept:
            kept[path] = _HeardReference(path, row.line, hashlib.sha256(path.encode("utf-8", "surrogatepass")).digest())
            if len(kept) > MAX_VOICE_REFERENCES:
                del kept[max(kept, key=lambda other: kept[other].draw)]
        if path in kept:
            kept[path].num_rows += 1

    def findings(self, base: Base | None, settings: Settings) -> list[Finding]:
        """Clips and references that sound like somebody else, by the base's speaker encoder."""
        if base is None:
            return []
        if not base.has_speaker_encoder:
            say("voices are not compared: the base has no speaker encoder")
            return []
        device = device_of_this_process(settings)
        encode = load_speaker_encoder(base, device)
        hear = _Ears(base.codec_folder, device)
        rows = sorted((row for sample in self.clips.values() for row in sample), key=lambda row: row.line)
        bar = tqdm(rows, desc="voices", unit="clip", disable=None)
        vectors = {row.line: encode(waveform) for row in bar if (waveform := hear(row)) is not None}
        references = [
            ReferenceVoice(speaker, reference.path, reference.line, reference.num_rows, encode(waveform))
            for speaker, kept in self.references.items()
            for reference in kept.values()
            if (waveform := _load_reference(reference.path, speaker)) is not None
        ]
        return similarity_findings(vectors, {row.line: row.speaker for row in rows}, references)


def _load_reference(path: str, speaker: str) -> np.ndarray | None:
    try:
        return load_audio(path)
    except AudioError as error:
        say(f'reference of speaker "{speaker}": {path}: {error}')
        return None


class _Ears:
    """A row's waveform: of its file, else decoded from its codes."""

    def __init__(self, codec_folder: Path, device: str) -> None:
        self._load: Callable[[], Codec] = lambda: Codec(codec_folder, device)
        self._codec: Codec | None = None

    def __call__(self, row: Row) -> np.ndarray | None:
        if row.audio is not None and row.audio.is_file():
            try:
                return load_audio(row.audio)
            except AudioError:
                return None
        if row.codes is None:
            return None
        self._codec = self._codec or self._load()
        return self._codec.decode([row.codes])[0]


# ---------------------------------------------------------------------------------------------------------- mending


def _mend(
    jsonl: Path, setting: str, row_format: RowFormat, findings: list[Finding], mending: Mending, max_rows: int | None
) -> None:
    assert mending.output_jsonl is not None
    tally = Tally()  # of mended clips copies are made anew
    rows = read_rows(jsonl, setting, row_format, tally, needs_codes=False, max_rows=max_rows)
    summary = mend(
        _originals(rows, tally),
        mending.output_jsonl,
        row_format,
        trim_silence=mending.trim_silence,
        target_loudness_lufs=mending.target_loudness_lufs,
        drop_lines=faulty_lines(findings, mending.mended_checks) if mending.drop_flagged else frozenset(),
    )
    say(f"{summary}\nmended rows: {mending.output_jsonl}")


# --------------------------------------------------------------------------------------------------------- in short


def check_at_start(rows: TrainingRows | DirectRows, settings: Settings) -> None:
    """DATA_CHECK: what a quick look at the rows of a run shows; only what is wrong is said.

    Raises:
        UserError: there are errors, and DATA_CHECK is ``stop``.
    """
    if settings.data_check == "off":
        return
    check = f"{command_of('data_processing.py')} --mode check"
    if isinstance(rows, DirectRows):
        is_whole, sample = False, _some_streamed(rows)
    else:
        clips = rows.train.select(np.flatnonzero(~rows.train.has("augmentation")))
        is_whole, sample = len(clips) <= MAX_ROWS_AT_START, _some_mapped(clips)
        check += f" --input_jsonl {shlex.quote(str(settings.train_jsonl))}"
    figures = collect(sample)
    left_out = ("not_measured",) if is_whole else WHOLE_SET_CHECKS
    findings = [finding for finding in find_problems(figures) if finding.check not in left_out]
    findings = [finding for finding in findings if finding.severity != "info"]
    if not findings:
        return
    looked_at = "the training rows" if is_whole else f"{figures.num_rows} of the training rows"
    lines = [f"  {finding.severity}: {finding.message}" for finding in sort_findings(findings)]
    say("\n".join([f"A look at {looked_at}; {check} says where and what to do:", *lines]))
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors and settings.data_check == "stop":
        raise UserError(
            f"errors in the training rows: {'; '.join(finding.message for finding in errors)}. {errors[0].advice} "
            "(DATA_CHECK=warn trains nevertheless)"
        )


def _some_mapped(manifest: Manifest) -> Iterator[Mapping[str, Any]]:
    count = min(len(manifest), MAX_ROWS_AT_START)
    for index in np.linspace(0, len(manifest) - 1, count).astype(int).tolist():
        row = manifest[index]
        yield row | {"measures": json.loads(row["measures"]) if row["measures"] else None}


def _some_streamed(rows: DirectRows) -> Iterator[Mapping[str, Any]]:
    """The first chunk, which training needs as well."""
    stream = replace(rows.stream, buffer_rows=0)
    for row, _ in zip(stream.iterate(0), range(CHUNK_ROWS), strict=False):
        if row is not None:
            fields = check_fields(row.record, rows.row_format)
            measured = {"codes": row.codes, "measures": row.record["measures"], "num_codec_frames": len(row.codes)}
            yield {"line": row.index + 1, "ref_audio": None} | fields | measured
