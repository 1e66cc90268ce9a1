"""What is wrong with a data set: findings, a pure function of its figures.

A finding is an *error* when training on such data is wasted, a *warning* when the voice will
suffer, and otherwise a piece of *info*. A defect of single rows becomes a warning from a share of the rows on (each
limit's ``warn_share``): in 600,000 rows there is always something.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from finetuning.codec import CODEBOOK_SIZE, FRAMES_PER_SECOND
from finetuning.figures import MAX_EXAMPLES, DataFigures
from finetuning.quality import TEXT_DEFECTS

SEVERITIES = ("error", "warning", "info")
#: From this share of the rows on a defect of single rows is a warning; …
WARN_SHARE = 0.01
#: … from this one where the figure is an estimate that is sometimes wrong.
WARN_SHARE_OF_ESTIMATES = 0.05
#: A set is refused when more than this share of it has a defect that nothing can be learnt from.
ERROR_SHARE = 0.5

#: Advised speech for one voice, in minutes; under the first figure quality is poor.
FEW_MINUTES, ADVISED_MINUTES = 5.0, (10.0, 30.0)
#: What qwen-tts takes as a reference, in seconds.
ADVISED_REFERENCE_SECONDS = (3.0, 10.0)

#: Letters a second (see quality.UNITS) that nobody speaks: faster than an auctioneer, …
MAX_UNITS_PER_SECOND = 35.0
#: … or slower than one letter in two thirds of a second, in clips that are long enough to tell.
MIN_UNITS_PER_SECOND, MIN_SECONDS_TO_BE_SLOW = 1.5, 3.0
#: More rows than this share at an impossible rate (and more than two): the transcripts are not those of the clips.
ABSURD_ERROR_SHARE, ABSURD_ERROR_ROWS = 0.2, 3
#: Outliers are so many robust standard deviations from the language's median, in logarithms; the deviation is taken
#: as a tenth at least, so that an outlier is 1.6 times faster or slower than the median or more.
OUTLIER_DEVIATIONS, SMALLEST_DEVIATION, MIN_ROWS_FOR_OUTLIERS = 5.0, 0.1, 20
#: Lengths of texts and clips go together (0.8 and more in good sets); without that, rows are mixed up.
POOR_CORRELATION, NO_CORRELATION, MIN_ROWS_FOR_CORRELATION = 0.5, 0.2, 50
#: … which can be seen only where both vary (standard deviation of the logarithm).
MIN_SPREAD_FOR_CORRELATION = 0.15

#: Loudness of the clips of one speaker: the middle 90 % lie within this in even recordings.
MAX_LOUDNESS_RANGE_LU = 10.0
#: From this share on repeated texts are a warning.
REPEATED_TEXT_SHARE = 0.1
#: A row whose codes stand still for this share of its frames is frozen.
FROZEN_SHARE = 0.5
#: A codebook with one value is dead; so many frames are needed to say so.
MIN_FRAMES_FOR_DEAD = 50
#: A codebook with fewer entries in use than this, over so many frames, is hardly used (hundreds are usual).
FEW_ENTRIES, MIN_FRAMES_FOR_FEW = 64, 2000

#: A clip's voice is judged only where a speaker has so many clips.
MIN_CLIPS_FOR_VOICE = 8
#: An outlier's distance (1 - cosine) to the mean of the speaker's other clips is so many robust standard deviations
#: above their median, in logarithms, and so many times their upper quartile, …
VOICE_OUTLIER_DEVIATIONS, VOICE_OUTLIER_RATIO = 2.5, 3.0
#: … and so far from the median in absolute terms: below that it is noise in a tight cluster.
VOICE_MARGIN = 0.002
#: A reference is another voice when its distance is so many times that of the clips' most distant twentieth.
REFERENCE_RATIO = 1.5

#: Findings whose rows are faulty each by itself, however few they are. The others that name rows (short and long clips,
#: full scale) are harmless as long as they are few.
ROW_DEFECTS = frozenset(
    {
        "unusable_rows", "clipping", "dc_offset", "leading_silence", "trailing_silence", "noise_floor", "low_snr",
        "band_limited", "quiet_clips", "impossible_rate", "speaking_rate", "duplicate_audio", "duplicate_codes",
        "frozen_codes", "unusual_characters", "script", "speaker_outliers",
    }
)  # fmt: skip

#: Defects of texts (their place in TEXT_DEFECTS is their bit in the column ``text_flags``) that are reported together.
_UNUSUAL = [kind for kind in TEXT_DEFECTS if kind not in ("digits", "script")]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        check: stable id, such as "clipping".
        severity: one of SEVERITIES.
        message: one sentence with the figure.
        advice: what to do about it.
        num_rows: rows that it is about.
        examples: (line, note) of at most MAX_EXAMPLES rows, the worst first.
        lines: (num_lines,) the rows to leave out to be rid of it; empty where it is about the set, or mended otherwise.
    """

    check: str
    severity: str
    message: str
    advice: str
    num_rows: int
    examples: list[tuple[int, str]] = field(default_factory=list)
    lines: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), compare=False, repr=False)


# -------------------------------------------------------------------------------------------------------- findings


def find_problems(figures: DataFigures) -> list[Finding]:
    """All findings, the worst first."""
    findings = [finding for check in _CHECKS for finding in check(figures)]
    return sort_findings(findings)


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then info; among equals the one with more rows first."""
    return sorted(findings, key=lambda finding: (SEVERITIES.index(finding.severity), -finding.num_rows))


def faulty_lines(findings: Iterable[Finding], mended: Collection[str] = ()) -> set[int]:
    """Lines of the rows to leave out: those with a defect of their own, and whatever a warning or an error names.

    Args:
        mended: checks whose rows are mended otherwise and stay.
    """
    named = [
        finding.lines.tolist()
        for finding in findings
        if finding.check not in mended and (finding.check in ROW_DEFECTS or finding.severity != "info")
    ]
    return set().union(*named)


def _severity(num_rows: int, num_known: int, warn_share: float = WARN_SHARE) -> str:
    return "warning" if num_rows >= warn_share * num_known else "info"


def _share(num_rows: int, num_known: int, noun: str = "clips") -> str:
    """ "3 of 200 clips (1.5 %)" """
    percent = 100 * num_rows / max(num_known, 1)
    return f"{num_rows} of {num_known} {noun} ({percent:.{0 if percent >= 10 else 1}f} %)"


def _lines(figures: DataFigures, mask: np.ndarray) -> np.ndarray:
    return figures.columns["line"][mask]


def _examples(
    figures: DataFigures, mask: np.ndarray, badness: np.ndarray, note: Callable[[int], str]
) -> list[tuple[int, str]]:
    """The rows of a mask with the highest badness.

    Args:
        note: row index -> what to say about it.
    """
    rows = np.flatnonzero(mask)
    worst = rows[np.argsort(-badness[rows], kind="stable")[:MAX_EXAMPLES]]
    return [(int(figures.columns["line"][row]), note(row)) for row in worst]


@dataclass(frozen=True)
class Limit:
    """A bound on one figure of each clip.

    Attributes:
        check: id of the finding.
        column: name in ROW_TYPE.
        low, high: a clip outside of these is found.
        what: "{share} … {worst}" with the number of clips and the worst figure.
        show: format of one figure.
        advice: what to do.
        warn_share: from this share of the clips on it is a warning; above 1 it is never one.
        absolute: whether the sign does not count.
    """

    check: str
    column: str
    what: str
    show: str
    advice: str
    low: float = -np.inf
    high: float = np.inf
    warn_share: float = WARN_SHARE
    absolute: bool = False


#: Never a warning.
_ONLY_INFO = 2.0
LIMITS = (
    Limit(
        "short_clips",
        "seconds",
        "{share} are shorter than 1 s, the shortest {worst}",
        "{:.2f} s",
        "Join them with their neighbours, or leave them out: single words teach little about a voice.",
        low=1.0,
        warn_share=0.1,
    ),
    Limit(
        "long_clips",
        "seconds",
        "{share} are longer than 30 s, the longest {worst}",
        "{:.1f} s",
        "Cut them at pauses, text and audio together: they cost memory, and generation seldom runs that long.",
        high=30.0,
    ),
    Limit(
        "clipping",
        "clipped_share",
        "{share} are clipped, the worst in {worst} of its samples",
        "{:.2%}",
        "Use an earlier version of the recording, or leave these clips out: the crackle is learnt.",
        high=5e-4,
    ),
    Limit(
        "dc_offset",
        "dc_offset",
        "{share} have a DC offset, up to {worst} of full scale",
        "{:.3f}",
        "Filter the recordings with a high-pass at 20 Hz.",
        high=0.01,
        absolute=True,
    ),
    Limit(
        "leading_silence",
        "leading_silence_seconds",
        "{share} start with more than 0.5 s of silence, the worst with {worst}",
        "{:.1f} s",
        "Trim it, or the model learns to wait before it speaks.",
        high=0.5,
        warn_share=0.05,
    ),
    Limit(
        "trailing_silence",
        "trailing_silence_seconds",
        "{share} end with more than 1 s of silence, the worst with {worst}",
        "{:.1f} s",
        "Trim it, or the model learns to go on in silence instead of ending.",
        high=1.0,
        warn_share=0.05,
    ),
    Limit(
        "noise_floor",
        "noise_floor_db",
        "{share} have a noise floor above -40 dB, up to {worst}",
        "{:.0f} dB",
        "Record in a quieter room or closer to the microphone; hum and hiss are learnt with the voice.",
        high=-40.0,
        warn_share=WARN_SHARE_OF_ESTIMATES,
    ),
    Limit(
        "low_snr",
        "snr_db",
        "{share} have a signal-to-noise ratio under 20 dB, the worst {worst}",
        "{:.0f} dB",
        "Leave the noisiest clips out, or denoise them; the noise is learnt with the voice.",
        low=20.0,
        warn_share=WARN_SHARE_OF_ESTIMATES,
    ),
    Limit(
        "band_limited",
        "bandwidth_hz",
        "{share} end below 6 kHz, the worst at {worst}: telephone speech, or resampled from 8 or 11 kHz",
        "{:.0f} Hz",
        "Use the original recordings: the voice will sound as dull as these clips.",
        low=6000.0,
        warn_share=0.1,
    ),
    Limit(
        "quiet_clips",
        "peak_db",
        "{share} peak below -20 dB, the quietest at {worst}",
        "{:.0f} dB",
        "Bring the clips to one loudness.",
        low=-20.0,
    ),
    Limit(
        "full_scale",
        "peak_db",
        "{share} reach full scale, the loudest {worst}",
        "{:.2f} dB",
        "Harmless where nothing is clipped; leave 1 dB of room when you record again.",
        high=-0.1,
        warn_share=_ONLY_INFO,
    ),
)


def _limits(figures: DataFigures) -> list[Finding]:
    return [finding for limit in LIMITS for finding in _beyond(limit, figures)]


def _beyond(limit: Limit, figures: DataFigures) -> list[Finding]:
    values = figures.column(limit.column)
    values = np.abs(values) if limit.absolute else values
    found = (values < limit.low) | (values > limit.high)  # NaN is neither
    num_rows, num_known = int(found.sum()), int(np.isfinite(values).sum())
    if not num_rows:
        return []
    badness = np.where(values < limit.low, -values, values)
    examples = _examples(figures, found, badness, lambda row: limit.show.format(values[row]))
    message = limit.what.format(share=_share(num_rows, num_known), worst=examples[0][1])
    severity = _severity(num_rows, num_known, limit.warn_share)
    return [Finding(limit.check, severity, message, limit.advice, num_rows, examples, _lines(figures, found))]


def _half_band(figures: DataFigures) -> list[Finding]:
    """16 kHz recordings: usable, but worth knowing; said for sets, not for single clips."""
    bandwidth = figures.column("bandwidth_hz")
    found, num_known = (bandwidth >= 6000) & (bandwidth < 8500), int(np.isfinite(bandwidth).sum())
    if not found.sum() or _severity(found.sum(), num_known, WARN_SHARE_OF_ESTIMATES) == "info":
        return []
    message = f"{_share(int(found.sum()), num_known)} hold nothing above 8 kHz: recorded at 16 kHz, or compressed hard"
    advice = "The voice will lack brilliance; use 24 kHz recordings or better, where there are any."
    examples = _examples(figures, found, -bandwidth, lambda row: f"{bandwidth[row]:.0f} Hz")
    return [Finding("half_band", "info", message, advice, int(found.sum()), examples)]


def _loudness_spread(figures: DataFigures) -> list[Finding]:
    """Within each speaker: people are allowed to differ from each other."""
    loudness = figures.column("loudness_lufs")
    deviation = np.full(len(loudness), np.nan)
    for rows in _rows_by(figures.columns["speaker"], np.isfinite(loudness)):
        deviation[rows] = loudness[rows] - np.median(loudness[rows])
    known = np.isfinite(deviation)
    if known.sum() < 2:
        return []
    low, high = np.percentile(deviation[known], [5, 95])
    if high - low <= MAX_LOUDNESS_RANGE_LU:
        return []
    message = f"the clips differ in loudness by {high - low:.0f} LU (the middle 90 % of a speaker's clips)"
    outside = known & ((deviation < low) | (deviation > high))
    examples = _examples(figures, outside, np.abs(deviation), lambda row: f"{loudness[row]:.1f} LUFS")
    advice = "Bring the clips to one loudness, or the model speaks now loudly, now softly."
    return [Finding("loudness_spread", "warning", message, advice, int(known.sum()), examples)]


def _rows_by(keys: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Row indices of the mask, one array for each key."""
    rows = np.flatnonzero(mask)
    rows = rows[np.argsort(keys[rows], kind="stable")]
    return [part for part in np.split(rows, np.flatnonzero(np.diff(keys[rows])) + 1) if len(part)]


def _speaker_minutes(figures: DataFigures) -> list[Finding]:
    if not np.isfinite(figures.column("seconds")).any():
        return []
    minutes = figures.minutes_of_speakers()
    few = minutes < FEW_MINUTES
    some = ~few & (minutes < ADVISED_MINUTES[0])
    groups = (("warning", few, FEW_MINUTES), ("info", some, ADVISED_MINUTES[0]))
    return [_too_little(figures, minutes, *group) for group in groups if group[1].any()]


def _too_little(figures: DataFigures, minutes: np.ndarray, severity: str, found: np.ndarray, limit: float) -> Finding:
    """
    Args:
        minutes, found: (num_speakers,).
    """
    speakers, first_rows = figures.columns["speaker"], np.unique(figures.columns["speaker"], return_index=True)[1]
    fewest = np.flatnonzero(found)[np.argsort(minutes[found], kind="stable")]
    message = f'speaker "{figures.speakers[fewest[0]]}" has only {minutes[fewest[0]]:.1f} minutes of audio'
    if len(fewest) > 1:
        message = f"{len(fewest)} of {len(minutes)} speakers have less than {limit:g} minutes; {message}"
    examples = [
        (
            int(figures.columns["line"][first_rows[number]]),
            f'"{figures.speakers[number]}": {minutes[number]:.1f} minutes',
        )
        for number in fewest[:MAX_EXAMPLES]
    ]
    advice = (
        f"{ADVISED_MINUTES[0]:g} to {ADVISED_MINUTES[1]:g} minutes a voice are advised; with fewer the voice will only "
        "roughly be alike."
    )
    return Finding("speaker_minutes", severity, message, advice, int(found[speakers].sum()), examples)


# ---------------------------------------------------------------------------------------------- texts against audio


def _speaking_rate(figures: DataFigures) -> list[Finding]:
    seconds = figures.speech_seconds
    units = figures.column("speech_units")
    rate = np.where(units > 0, units / seconds, np.nan)
    known = np.isfinite(rate)
    too_slow = (rate < MIN_UNITS_PER_SECOND) & (figures.column("seconds") >= MIN_SECONDS_TO_BE_SLOW)
    absurd = (rate > MAX_UNITS_PER_SECOND) | too_slow
    return [
        *_absurd_rates(figures, rate, absurd, int(known.sum())),
        *_rate_outliers(figures, rate, known & ~absurd),
        *_lengths_apart(figures, units, seconds, known),
    ]


def _rate_note(figures: DataFigures) -> Callable[[int], str]:
    characters_per_second, characters = figures.characters_per_second, figures.columns["num_characters"]
    frames = figures.column("seconds") * FRAMES_PER_SECOND
    return lambda row: (
        f"{characters_per_second[row]:.1f} characters a second, {frames[row] / characters[row]:.1f} frames a character"
    )


def _absurd_rates(figures: DataFigures, rate: np.ndarray, absurd: np.ndarray, num_known: int) -> list[Finding]:
    num_rows = int(absurd.sum())
    if not num_rows:
        return []
    examples = _examples(figures, absurd, np.abs(np.log(np.where(absurd, rate, 10) / 10)), _rate_note(figures))
    share = _share(num_rows, num_known, "rows")
    if num_rows >= ABSURD_ERROR_ROWS and num_rows > ABSURD_ERROR_SHARE * num_known:
        message = f"{share} would be spoken at an impossible rate: the transcripts do not belong to the audio"
        advice = "Check how texts and clips were paired: are the columns, the order or the cutting wrong?"
        return [Finding("impossible_rate", "error", message, advice, num_rows, examples, _lines(figures, absurd))]
    message = f"{share} would be spoken at an impossible rate"
    advice = "Listen to these clips: the text is another one, or only part of it is spoken."
    severity = _severity(num_rows, num_known)
    return [Finding("impossible_rate", severity, message, advice, num_rows, examples, _lines(figures, absurd))]


def _rate_outliers(figures: DataFigures, rate: np.ndarray, candidates: np.ndarray) -> list[Finding]:
    """Robust z-scores of the logarithm, within each language."""
    deviations = np.zeros(len(rate))
    for rows in _rows_by(figures.columns["language"], candidates):
        if len(rows) >= MIN_ROWS_FOR_OUTLIERS:
            logs = np.log(rate[rows])
            distance = np.abs(logs - np.median(logs))
            deviations[rows] = distance / max(1.4826 * np.median(distance), SMALLEST_DEVIATION)
    outliers = deviations > OUTLIER_DEVIATIONS
    num_rows, num_known = int(outliers.sum()), int(candidates.sum())
    if not num_rows:
        return []
    message = f"{_share(num_rows, num_known, 'rows')} are spoken far faster or slower than the others"
    advice = "Listen to a few: words may be missing in text or audio, or the clip holds a long pause."
    examples = _examples(figures, outliers, deviations, _rate_note(figures))
    severity = _severity(num_rows, num_known)
    return [Finding("speaking_rate", severity, message, advice, num_rows, examples, _lines(figures, outliers))]


def _lengths_apart(figures: DataFigures, units: np.ndarray, seconds: np.ndarray, known: np.ndarray) -> list[Finding]:
    """Longer texts take longer. When they do not, at plausible rates, rows were probably shifted or shuffled."""
    logs = np.stack([np.log(np.where(known, values, 1.0)) for values in (units, seconds)])
    for rows in _rows_by(figures.columns["language"], known):
        logs[:, rows] -= logs[:, rows].mean(axis=1, keepdims=True)
    logs = logs[:, known]
    if known.sum() < MIN_ROWS_FOR_CORRELATION or (logs.std(axis=1) < MIN_SPREAD_FOR_CORRELATION).any():
        return []
    correlation = float(np.corrcoef(logs)[0, 1])
    if correlation >= POOR_CORRELATION:
        return []
    severity = "error" if correlation < NO_CORRELATION else "warning"
    message = f"long texts do not have long clips (correlation {correlation:.2f}, usually above 0.8)"
    advice = "Check a few rows by ear: the transcripts may be shifted against the clips, or machine-made and wrong."
    return [Finding("text_and_audio_lengths", severity, message, advice, int(known.sum()))]


# ------------------------------------------------------------------------------------------------------ duplicates


def _repeats(keys: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mask of rows whose key stood in an earlier row, index of the first row with the same key)."""
    first_row = np.arange(len(keys))
    _, first, inverse = np.unique(keys[known], return_index=True, return_inverse=True)
    rows = np.flatnonzero(known)
    first_row[rows] = rows[first[inverse]]
    return first_row != np.arange(len(keys)), first_row


def _duplicate_audio(figures: DataFigures) -> list[Finding]:
    columns = figures.columns
    known = columns["audio_hash"] != 0
    repeated, first_row = _repeats(columns["audio_hash"], known)
    num_rows, num_known = int(repeated.sum()), int(known.sum())
    if not num_rows:
        return []
    other_text = repeated & (columns["text_hash"] != columns["text_hash"][first_row])
    message = f"{_share(num_rows, num_known)} have the same audio as an earlier row"
    message += f", {int(other_text.sum())} of them with another text" if other_text.any() else ""
    severity = "error" if num_rows > ERROR_SHARE * num_known else _severity(num_rows, num_known)
    examples = _examples(figures, repeated, other_text.astype(float), _same_as(figures, first_row, "audio"))
    advice = "Keep one row of each; where the texts differ, only one of them can be right."
    return [Finding("duplicate_audio", severity, message, advice, num_rows, examples, _lines(figures, repeated))]


def _same_as(figures: DataFigures, first_row: np.ndarray, what: str) -> Callable[[int], str]:
    lines = figures.columns["line"]
    return lambda row: f"same {what} as line {lines[first_row[row]]}"


def _duplicate_text(figures: DataFigures) -> list[Finding]:
    """Repeats within a speaker; that several people read the same sentences is usual."""
    texts, everything = figures.columns["text_hash"], np.ones(figures.num_rows, dtype=bool)
    if figures.num_rows < 2:
        return []
    _, counts = np.unique(texts, return_counts=True)
    if counts.max() > max(2, ERROR_SHARE * len(texts)):
        most_frequent = np.bincount(np.unique(texts, return_inverse=True)[1]).argmax()
        rows = np.unique(texts, return_inverse=True)[1] == most_frequent
        message = f"{_share(int(rows.sum()), len(texts), 'rows')} have the same text"
        advice = "The text column is wrong, or a placeholder: nothing can be learnt about reading from one sentence."
        examples = [(int(line), "the same text") for line in figures.columns["line"][rows][:MAX_EXAMPLES]]
        return [Finding("duplicate_text", "error", message, advice, int(rows.sum()), examples)]
    with_speaker = texts ^ (figures.columns["speaker"].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    repeated, first_row = _repeats(with_speaker, everything)
    num_rows = int(repeated.sum())
    if not num_rows:
        return []
    message = f"{_share(num_rows, len(texts), 'rows')} have the same speaker and text as an earlier row"
    advice = "Harmless for other recordings of the same sentence; otherwise keep one row of each."
    examples = _examples(figures, repeated, np.zeros(len(texts)), _same_as(figures, first_row, "text"))
    severity = _severity(num_rows, len(texts), REPEATED_TEXT_SHARE)
    return [Finding("duplicate_text", severity, message, advice, num_rows, examples)]


def _duplicate_codes(figures: DataFigures) -> list[Finding]:
    """Equal codes are right for equal audio only; where no audio was measured, the text has to tell."""
    columns = figures.columns
    known = columns["has_codes"]
    num_known = int(known.sum())
    if num_known < 2:
        return []
    content = np.where(columns["audio_hash"] != 0, columns["audio_hash"], columns["text_hash"])
    _, inverse, counts = np.unique(columns["codes_hash"][known], return_inverse=True, return_counts=True)
    pairs = np.unique(np.stack([inverse.astype(np.uint64), content[known]]), axis=1)
    num_contents = np.bincount(pairs[0].astype(np.int64), minlength=len(counts))
    shared = np.zeros(figures.num_rows, dtype=bool)
    shared[known] = num_contents[inverse] > 1
    all_the_same = len(counts) == 1
    num_rows = num_known if all_the_same else int(shared.sum())
    if not num_rows:
        return []
    message = (
        f"all {num_known} rows have the same codes"
        if all_the_same
        else f"{_share(num_rows, num_known, 'rows')} share their codes with a row of other audio or text"
    )
    severity = "error" if num_rows > ERROR_SHARE * num_known else _severity(num_rows, num_known)
    _, first_row = _repeats(columns["codes_hash"], known)
    later = (known if all_the_same else shared) & (first_row != np.arange(len(first_row)))
    examples = _examples(figures, later, np.zeros(len(later)), _same_as(figures, first_row, "codes"))
    advice = "The codes are not those of the clips: encode the audio again (data_processing.py --mode encode --force)."
    # Whose codes they are nobody knows, so none is kept; when most are like that, it is about the set.
    lines = _lines(figures, shared & (severity != "error"))
    return [Finding("duplicate_codes", severity, message, advice, num_rows, examples, lines)]


# ----------------------------------------------------------------------------------------------------------- codes


def _frozen_codes(figures: DataFigures) -> list[Finding]:
    still = figures.column("still_share")
    frozen, num_known = still > FROZEN_SHARE, int(np.isfinite(still).sum())
    num_rows = int(frozen.sum())
    if not num_rows:
        return []
    message = f"{_share(num_rows, num_known, 'rows')} have codes that hardly change from frame to frame"
    severity = "error" if num_rows > ERROR_SHARE * num_known else _severity(num_rows, num_known)
    examples = _examples(figures, frozen, still, lambda row: f"{still[row]:.0%} of the frames equal the one before")
    advice = "Silence, a held tone, or codes gone wrong: listen to these clips and encode them again."
    return [Finding("frozen_codes", severity, message, advice, num_rows, examples, _lines(figures, frozen))]


def _codebooks(figures: DataFigures) -> list[Finding]:
    num_frames, used = int(figures.code_counts[0].sum()), figures.entries_used()
    num_rows = int(figures.columns["has_codes"].sum())
    dead = np.flatnonzero(used == 1) if num_frames >= MIN_FRAMES_FOR_DEAD else []
    few = np.flatnonzero((used > 1) & (used < FEW_ENTRIES)) if num_frames >= MIN_FRAMES_FOR_FEW else []
    advice = "The codes were made by another codec, or cut or filled up: encode the audio again with this base's codec."
    findings = []
    if len(dead):
        message = f"codebooks with one and the same value in all {num_frames} frames: {_numbers(dead)}"
        findings.append(Finding("dead_codebooks", "error", message, advice, num_rows))
    if len(few):
        message = (
            f"codebooks of whose {CODEBOOK_SIZE} entries fewer than {FEW_ENTRIES} are used in {num_frames} frames: "
            f"{_numbers(few)} (the least {used[few].min()})"
        )
        findings.append(Finding("narrow_codebooks", "warning", message, advice, num_rows))
    return findings


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)


# ------------------------------------------------------------------------------------------------ texts, references


def _texts(figures: DataFigures) -> list[Finding]:
    return [*_digits(figures), *_unusual_characters(figures), *_scripts(figures)]


def _with_defect(figures: DataFigures, kind: str) -> np.ndarray:
    return (figures.columns["text_flags"] >> list(TEXT_DEFECTS).index(kind)) & 1 == 1


def _digits(figures: DataFigures) -> list[Finding]:
    num_rows = int(_with_defect(figures, "digits").sum())
    if not num_rows:
        return []
    message = f"{_share(num_rows, figures.num_rows, 'texts')} contain digits"
    advice = "Write numbers as they are spoken (twenty-one, not 21), so that the model need not guess the reading."
    return [Finding("digits", "info", message, advice, num_rows, list(figures.text_examples["digits"]))]


def _unusual_characters(figures: DataFigures) -> list[Finding]:
    masks = {kind: _with_defect(figures, kind) for kind in _UNUSUAL}
    counts = {kind: int(mask.sum()) for kind, mask in masks.items() if mask.any()}
    if not counts:
        return []
    unusual = np.any(list(masks.values()), axis=0)
    num_rows = int(unusual.sum())
    kinds = ", ".join(f"{TEXT_DEFECTS[kind]} ({count})" for kind, count in counts.items())
    message = f"{_share(num_rows, figures.num_rows, 'texts')} hold what cannot be spoken: {kinds}"
    advice = "Remove or rewrite it; the model would learn that such characters are silent, or sound somehow."
    # One of each kind before a second of any.
    notes = [figures.text_examples[kind][:MAX_EXAMPLES] for kind in counts]
    in_turn = [kind_notes[index] for index in range(MAX_EXAMPLES) for kind_notes in notes if index < len(kind_notes)]
    examples = in_turn[:MAX_EXAMPLES]
    severity = _severity(num_rows, figures.num_rows)
    return [Finding("unusual_characters", severity, message, advice, num_rows, examples, _lines(figures, unusual))]


def _scripts(figures: DataFigures) -> list[Finding]:
    num_rows = int(_with_defect(figures, "script").sum())
    if not num_rows:
        return []
    message = f"{_share(num_rows, figures.num_rows, 'texts')} are in a script that does not fit their language"
    advice = "Correct the language, or write the text in its own script: that is what the base was trained on."
    severity = _severity(num_rows, figures.num_rows)
    examples, lines = list(figures.text_examples["script"]), _lines(figures, _with_defect(figures, "script"))
    return [Finding("script", severity, message, advice, num_rows, examples, lines)]


def _reference_length(figures: DataFigures) -> list[Finding]:
    seconds = figures.column("reference_seconds")
    low, high = ADVISED_REFERENCE_SECONDS
    outside, known = (seconds < low) | (seconds > high), np.isfinite(seconds)
    if not outside.any():
        return []
    hashes = figures.columns["reference_hash"]
    num_outside, num_known = len(np.unique(hashes[outside])), len(np.unique(hashes[known]))
    message = f"{_share(num_outside, num_known, 'reference clips')} are not {low:g} to {high:g} s long"
    first_of_each = np.zeros(len(hashes), dtype=bool)
    first_of_each[np.flatnonzero(outside)[np.unique(hashes[outside], return_index=True)[1]]] = True
    examples = _examples(
        figures, first_of_each, np.abs(seconds - (low + high) / 2), lambda row: f"{seconds[row]:.1f} s"
    )
    advice = f"Choose a clean stretch of {low:g} to {high:g} s: shorter says little about a voice, longer adds nothing."
    severity = _severity(num_outside, num_known)
    return [Finding("reference_length", severity, message, advice, int(outside.sum()), examples)]


def _not_measured(figures: DataFigures) -> list[Finding]:
    """One finding for everything that could not be checked."""
    gaps = {
        "audio figures": int((~figures.columns["has_measures"]).sum()),
        "codes": int((~figures.columns["has_codes"]).sum()),
    }
    missing = [f"{count} have no {what}" for what, count in gaps.items() if count]
    if not missing:
        return []
    message = f"of {figures.num_rows} rows {' and '.join(missing)}; these parts of them were not checked"
    advice = (
        "Encode them with data_processing.py --mode encode, which measures every clip (--force for those with codes)."
    )
    return [Finding("not_measured", "info", message, advice, max(gaps.values()))]


_CHECKS = (
    _limits,
    _half_band,
    _loudness_spread,
    _speaker_minutes,
    _speaking_rate,
    _duplicate_audio,
    _duplicate_text,
    _duplicate_codes,
    _frozen_codes,
    _codebooks,
    _texts,
    _reference_length,
    _not_measured,
)


# ---------------------------------------------------------------------------------------------------------- voices


@dataclass(frozen=True)
class ReferenceVoice:
    """What the speaker encoder hears in one reference of a speaker.

    Attributes:
        line: the first row that it stands for, of num_rows.
        vector: (H,).
    """

    speaker: str
    path: str
    line: int
    num_rows: int
    vector: np.ndarray


def similarity_findings(
    vectors: Mapping[int, np.ndarray], speaker_of_line: Mapping[int, str], references: Iterable[ReferenceVoice]
) -> list[Finding]:
    """Clips that sound like somebody else, references that do, and speakers with too few clips to tell.

    Everything is relative to how far a speaker's clips lie from each other, since encoders differ in scale.

    Args:
        vectors: line -> (H,) of the speaker encoder, for all rows or some.
        speaker_of_line: line -> speaker.
    """
    lines_of: dict[str, list[int]] = {speaker: [] for speaker in speaker_of_line.values()}
    for line in vectors:
        lines_of[speaker_of_line[line]].append(line)
    judged = {speaker: lines for speaker, lines in lines_of.items() if len(lines) >= MIN_CLIPS_FOR_VOICE}
    references_of: dict[str, list[ReferenceVoice]] = {}
    for reference in references:
        references_of.setdefault(reference.speaker, []).append(reference)
    outliers: list[tuple[float, int, str]] = []  # (distance, line, note)
    foreign: list[tuple[float, str, ReferenceVoice]] = []  # (distance, note, reference)
    for speaker, lines in judged.items():
        clips = _unit(np.stack([vectors[line] for line in lines]).astype(np.float64))
        distances = 1 - (clips * _unit(clips.sum(axis=0) - clips)).sum(axis=1)
        for index in np.flatnonzero(_voice_outliers(distances)):
            note = f'{_cosines(distances[index], np.median(distances))} among the clips of "{speaker}"'
            outliers.append((distances[index], lines[index], note))
        # The median, so that outliers do not draw the voice towards them.
        voice = _unit(np.median(clips, axis=0)[None])[0]
        limit = REFERENCE_RATIO * float(np.quantile(distances, 0.95)) + VOICE_MARGIN
        for reference in references_of.get(speaker, []):
            distance = 1 - float(voice @ _unit(reference.vector.astype(np.float64)[None])[0])
            if distance > limit:
                note = f'{reference.path} of "{speaker}": {_cosines(distance, np.median(distances))}'
                foreign.append((distance, note, reference))
    num_clips = sum(map(len, judged.values()))
    few = {speaker: lines for speaker, lines in lines_of.items() if speaker not in judged}
    findings = [*_outlier_finding(outliers, num_clips), *_reference_finding(foreign), *_not_judged(few)]
    return sort_findings(findings)


def _cosines(distance: float, usual_distance: float) -> str:
    return f"cosine {1 - distance:.3f}, usually {1 - usual_distance:.3f}"


def _outlier_finding(outliers: list[tuple[float, int, str]], num_clips: int) -> list[Finding]:
    if not outliers:
        return []
    message = f"{_share(len(outliers), num_clips)} do not sound like the other clips of their speaker"
    advice = "Listen to them: another person, music, or noise? Leave them out, or give them their own speaker."
    examples = [(line, note) for _, line, note in sorted(outliers, reverse=True)[:MAX_EXAMPLES]]
    severity = _severity(len(outliers), num_clips)
    lines = np.array([line for _, line, _ in outliers])
    return [Finding("speaker_outliers", severity, message, advice, len(outliers), examples, lines)]


def _reference_finding(foreign: list[tuple[float, str, ReferenceVoice]]) -> list[Finding]:
    if not foreign:
        return []
    worst_first = sorted(foreign, key=lambda item: -item[0])
    examples = [(reference.line, note) for _, note, reference in worst_first[:MAX_EXAMPLES]]
    message = f"the reference does not sound like the clips that it stands for: {examples[0][1]}"
    if len(foreign) > 1:
        message = (
            f"{len(foreign)} references do not sound like the clips that they stand for; worst is {examples[0][1]}"
        )
    advice = "Choose the reference among the speaker's own clips: it decides the voice from the first step on."
    num_rows = sum(reference.num_rows for _, _, reference in foreign)
    return [Finding("reference_voice", "warning", message, advice, num_rows, examples)]


def _not_judged(few: Mapping[str, list[int]]) -> list[Finding]:
    """
    Args:
        few: speaker -> lines of the clips that were heard.
    """
    if not few:
        return []
    names = ", ".join(f'"{speaker}"' for speaker in list(few)[:MAX_EXAMPLES])
    names += f" and {len(few) - MAX_EXAMPLES} others" if len(few) > MAX_EXAMPLES else ""
    message = f"voices of {names} were not judged: fewer than {MIN_CLIPS_FOR_VOICE} clips"
    advice = "Listen to the clips and the reference of these speakers yourself: there is too little to compare."
    return [Finding("voices_not_judged", "info", message, advice, sum(map(len, few.values())))]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _voice_outliers(distances: np.ndarray) -> np.ndarray:
    """Mask of (num_clips,) distances that stand out of the others in deviations, as a ratio and in absolute terms."""
    logs = np.log(np.maximum(distances, 1e-9))
    above = logs - np.median(logs)
    deviations = above / max(1.4826 * np.median(np.abs(above)), SMALLEST_DEVIATION)
    limit = max(VOICE_OUTLIER_RATIO * np.quantile(distances, 0.75), np.median(distances) + VOICE_MARGIN)
    return (deviations > VOICE_OUTLIER_DEVIATIONS) & (distances > limit)
