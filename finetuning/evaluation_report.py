"""From measured samples to the report: figures with intervals, the ranking, the page and report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from finetuning.audio import load_audio
from finetuning.console import say
from finetuning.disk import write_json
from finetuning.evaluation_media import interval_plot, mp3, spectrogram_png
from finetuning.evaluation_models import Options
from finetuning.evaluation_plan import Job, Plan
from finetuning.intervals import LEVEL, NUM_RESAMPLES, interval, interval_of_mean, mean_over_texts, resampled_means
from finetuning.kept_samples import Kept
from finetuning.metrics import METRICS
from finetuning.report_html import Column, Line, Passage, Player, Reference, Report, Value, report_page
from finetuning.settings import Settings

#: Version of report.json; it changes when a key is renamed or removed.
JSON_VERSION = 1
#: What --rank_by is by default: the first of these that was measured.
RANKED_BY = ("speaker_embedding_similarity", "mos", "cer", "wer", "speech_rate_ratio", "eos_rate")
#: Speech of so many seconds stands in the page in full (about 80 MB); of more only each first seed's.
MAX_EMBEDDED_SECONDS = 5400.0

#: What the figures say, for people who make voices; others are shown under their own name.
COLUMNS: dict[str, Column] = {
    "speaker_embedding_similarity": Column(
        "Voice similarity",
        "higher",
        "How much the sample sounds like the real speaker to the model's speaker encoder: 1 is the same voice, 0 one "
        "that has nothing to do with it. It hears who speaks, not how well. Compare it with the line of the base.",
    ),
    "speech_rate_ratio": Column(
        "Pace",
        "nearer to 1",
        "Characters a second against the speaker's own recordings: 1 is the same pace, 1.2 a fifth faster. Far from 1 "
        "means that words are swallowed, or that there are long gaps.",
        2,
    ),
    "eos_rate": Column(
        "Stops by itself",
        "higher",
        "The share of samples that ended when the text was said. The others went on, with noise or babble, until they "
        "were cut off. Anything below 1 will be heard in daily use.",
        2,
    ),
    "wer": Column(
        "Word errors",
        "lower",
        "The share of words that a speech recogniser hears otherwise than they were written. The recogniser makes "
        "errors of its own: compare lines with each other, and do not read it as an absolute figure.",
    ),
    "cer": Column(
        "Character errors",
        "lower",
        "The same counted in characters, which suits languages without spaces between words, and names.",
    ),
    "mos": Column(
        "Predicted opinion",
        "higher",
        "What a model predicts that listeners would say of the sound, from 1 (bad) to 5 (excellent). It may know "
        "little of your voice or language: take a large drop for a sign of noise, and do not count on small ones.",
        2,
    ),
    "silence_share": Column(
        "Silence",
        None,
        "The share of the sample in which nothing is heard. Much more than in the other lines means gaps, or silence "
        "before or after the speech.",
        2,
    ),
    "seconds": Column("Length (s)", None, "How long a sample is on average.", 1),
}

HOW_MEASURED = (
    f"Small figures are {LEVEL:.0%} intervals of the mean by bootstrap: {NUM_RESAMPLES:,} times as many texts as there "
    "are were drawn with replacement, and of each text as many samples as it has; the interval is the middle "
    f"{LEVEL:.0%} of the means. Two lines are compared with the same draws, so what is hard for both does not count. "
    "With few texts the intervals are rather too narrow: take ten or more before a decision that matters."
)
ADVICE = (
    "Leave out checkpoints that do not always stop by themselves, whose pace is far from 1, or that make clearly more "
    "word errors than the others: such faults are heard at once, whatever the voice is like.",
    "Of the rest take the first in the ranking, or any that is marked “as good within chance”: between those the "
    "figures do not decide. Of two equals the earlier one has moved less far from what the base can do.",
    "Look at the line of the base. It is what you get without any training, from one reference. Where no checkpoint is "
    "clearly better, the training has not paid: more or cleaner data, or more steps, may help.",
    "Then listen: the same text from all that are left, and the real voice last. Your ears decide, since figures know "
    "nothing of a wrong stress or a dull reading. Spectrograms show gaps, noise and cut-off ends at a glance.",
    "If later checkpoints are more alike in voice but make more errors, the run has begun to learn its clips by heart: "
    "take one before that.",
)


@dataclass(frozen=True)
class Figures:
    """What a line's samples gave.

    Attributes:
        key: (checkpoint's name, manner).
        values: by metric, (num_texts, samples of a text), NaN where a sample has none.
    """

    name: str
    key: tuple[str, str]
    is_base: bool
    step: int | None
    values: Mapping[str, np.ndarray]

    def mean(self, metric: str) -> float:
        """NaN where it was not measured."""
        return float(mean_over_texts(self.values[metric])) if metric in self.values else float("nan")

    def costs(self, metric: str) -> np.ndarray:
        """(num_resamples,) figures of the resamples as costs, lower for better."""
        return _cost(metric, resampled_means(self.values[metric]))


@dataclass(frozen=True)
class Ranking:
    """Checkpoints in order, then the base's lines, best first; those that were not measured come last in each.

    Attributes:
        by: the metric; None where none was measured.
        ranks: from 1, by line; None for the base and what was not measured.
        verdicts: a few words by line.
    """

    by: str | None
    lines: Sequence[Figures]
    ranks: Sequence[int | None]
    verdicts: Sequence[str]


def write_report(plan: Plan, jobs: Sequence[Job], kept: Sequence[Kept], options: Options, settings: Settings) -> Path:
    """Writes report.html and report.json, says the result, and gives the path of the page.

    Raises:
        OSError: the disk refused it.
    """
    ranking = rank(collect(plan, jobs, kept), options.rank_by)
    notes = [*plan.notes, *_note_of_ranking(ranking, options.rank_by), *_note_of_gaps(ranking), *_note_of_texts(plan)]
    report = _report(plan, jobs, kept, ranking, notes, options, settings)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "report.json", report_data(plan, jobs, kept, ranking, report, options.output))
    page = options.output / "report.html"
    unfinished = options.output / ".report.html.tmp"
    unfinished.write_text(report_page(report), encoding="utf-8", errors="replace")
    unfinished.replace(page)
    say(summary(report))
    say(f"report: {page}")
    return page


# ----------------------------------------------------------------------------------------------------------- figures


def collect(plan: Plan, jobs: Sequence[Job], kept: Sequence[Kept]) -> list[Figures]:
    """The figures of every line."""
    return [_figures(plan, jobs, kept, model, manner) for model in plan.models for manner in model.manners]


def _figures(plan: Plan, jobs: Sequence[Job], kept: Sequence[Kept], model: Any, manner: Any) -> Figures:
    texts: list[list[Mapping[str, float]]] = [[] for _ in plan.texts]
    for job, sample in zip(jobs, kept, strict=True):
        if (job.model, job.manner) == (model, manner):
            texts[job.place].append(sample.measures)
    names = dict.fromkeys(name for samples in texts for measures in samples for name in measures)
    values = {
        name: np.array([[measures.get(name, np.nan) for measures in samples] for samples in texts]) for name in names
    }
    return Figures(model.line(manner), (model.name, manner), model.is_base, model.step, values)


def metrics_of(lines: Sequence[Figures]) -> list[str]:
    """All that was measured, in the order in which it is shown."""
    found = list(dict.fromkeys(name for line in lines for name in line.values))
    order = [*(name for name in METRICS if name in COLUMNS), *COLUMNS]
    known = [name for name in dict.fromkeys(order) if name in found]
    return known + [name for name in found if name not in known]


def rank(lines: Sequence[Figures], wanted: str | None) -> Ranking:
    """Orders the lines by ``wanted``, or where that was not measured by the first of RANKED_BY that was."""
    measured = [name for name in metrics_of(lines) if any(name in line.values for line in lines if not line.is_base)]
    by = next((name for name in (wanted, *RANKED_BY) if name in measured and name in METRICS), None)
    ordered = sorted(lines, key=lambda line: (line.is_base, *_order(line, by)))
    ranks: list[int | None] = [
        None if line.is_base or by is None or np.isnan(line.mean(by)) else place
        for place, line in enumerate(ordered, 1)
    ]
    return Ranking(by, ordered, ranks, _verdicts(ordered, ranks, by))


def _order(line: Figures, by: str | None) -> tuple[bool, float, float]:
    """What was not measured last; of equals the earlier one first."""
    mean = line.mean(by) if by else float("nan")
    is_missing = bool(np.isnan(mean))
    return is_missing, 0.0 if is_missing else float(_cost(by, mean)), line.step if line.step is not None else np.inf


def _cost(metric: str, value: Any) -> Any:
    return METRICS[metric].cost(value)


def _verdicts(lines: Sequence[Figures], ranks: Sequence[int | None], by: str | None) -> list[str]:
    """How each checkpoint compares with the first of the ranking and with the base."""
    if by is None:
        return ["" for _ in lines]
    first = next((line for line, place in zip(lines, ranks, strict=True) if place == 1), None)
    base = next((line for line in lines if line.is_base and by in line.values), None)
    return [_verdict(line, place, first, base, by) for line, place in zip(lines, ranks, strict=True)]


def _verdict(line: Figures, place: int | None, first: Figures | None, base: Figures | None, by: str) -> str:
    if line.is_base:
        return "the line to beat" if line is base else ""
    if place is None:
        return ""
    words = ["best"] if line is first else ["as good within chance"] if not differs(line, first, by) else []
    if base is not None:
        side = differs(line, base, by)
        words.append({-1: "better than the base", 0: "no clear difference to the base", 1: "worse than the base"}[side])
    return ", ".join(words)


def differs(line: Figures, other: Figures, by: str) -> int:
    """-1 where ``line`` is better beyond chance, 1 where it is worse, 0 where that is open: the interval of their
    difference, over the samples that both have a figure of, holds 0, or there are less than two of these."""
    both = np.isfinite(line.values[by]) & np.isfinite(other.values[by])
    if both.sum() < 2:
        return 0
    mine, others = (_cost(by, resampled_means(np.where(both, one.values[by], np.nan))) for one in (line, other))
    bounds = interval(mine - others)
    if bounds is None:
        return 0
    return -1 if bounds[1] < 0 else 1 if bounds[0] > 0 else 0


def _note_of_ranking(ranking: Ranking, wanted: str | None) -> list[str]:
    if ranking.by is None:
        return ["nothing was measured that checkpoints could be ranked by"]
    if wanted in (None, ranking.by):
        return []
    return [f"--rank_by {wanted} was not measured (is its model set?); the ranking is by {ranking.by}"]


def _note_of_gaps(ranking: Ranking) -> list[str]:
    """Of how many samples the figure of the ranking is, where some have none."""
    if ranking.by is None:
        return []
    counts = [(line, _count(line, ranking.by)) for line in ranking.lines]
    gaps = [f"{line.name} has it of {there} of {total}" for line, (there, total) in counts if there < total]
    if not gaps:
        return []
    return [
        f"“{_column(ranking.by).title}” could not be measured of all samples ({'; '.join(gaps)}): means are of the "
        "others, and lines are compared over those that both have"
    ]


def _count(line: Figures, metric: str) -> tuple[int, int]:
    """(samples that have a figure, all)."""
    values = line.values.get(metric)
    some = next(iter(line.values.values()), np.empty(0))
    return (0 if values is None else int(np.isfinite(values).sum())), some.size


def _note_of_texts(plan: Plan) -> list[str]:
    if len(plan.texts) > 1:
        return []
    return ["there is one text only, so intervals are over its samples and say nothing of what other texts would give"]


# ------------------------------------------------------------------------------------------------------------ report


def _report(
    plan: Plan, jobs: Sequence[Job], kept: Sequence[Kept], ranking: Ranking, notes: Sequence[str], options: Options,
    settings: Settings,
) -> Report:  # fmt: skip
    metrics = metrics_of(ranking.lines)
    columns = {name: _column(name) for name in metrics}
    lines = _lines(ranking, metrics)
    notes = [*notes, *_note_of_size(kept)]
    return Report(
        title=f"Which checkpoint speaks best? {settings.output_dir}",
        verdict=_sentence(ranking, columns),
        facts=_facts(plan, kept, jobs),
        notes=notes,
        columns=columns,
        rank_by=ranking.by,
        lines=lines,
        passages=_passages(plan, jobs, kept, ranking, options.output, columns),
        references=_references(plan),
        plot=_plot(lines, ranking.by, columns),
        how_measured=HOW_MEASURED,
        advice=ADVICE,
    )


def _column(name: str) -> Column:
    if name in COLUMNS:
        return COLUMNS[name]
    metric = METRICS.get(name)
    return Column(name, metric.better if metric else None, metric.meaning if metric else "For information.")


def _lines(ranking: Ranking, metrics: Sequence[str]) -> list[Line]:
    best = {name: _best(ranking.lines, name) for name in metrics if name in METRICS}
    made = []
    for figures, place, verdict in zip(ranking.lines, ranking.ranks, ranking.verdicts, strict=True):
        values = {
            name: Value(
                figures.mean(name), interval_of_mean(figures.values[name]), figures.mean(name) == best.get(name)
            )
            for name in metrics
            if not np.isnan(figures.mean(name))
        }
        if figures.is_base:
            values = {name: Value(value.mean, value.bounds) for name, value in values.items()}
        step = [f"step {figures.step:,}"] if figures.step is not None and not figures.is_base else []
        made.append(Line(figures.name, place, figures.is_base, values, " · ".join([*step, *filter(None, [verdict])])))
    return made


def _best(lines: Sequence[Figures], name: str) -> float | None:
    """The best mean of the checkpoints; None for a single one, which is nobody's better."""
    means = [line.mean(name) for line in lines if not line.is_base]
    means = [mean for mean in means if not np.isnan(mean)]
    return min(means, key=lambda mean: _cost(name, mean)) if len(means) > 1 else None


def _sentence(ranking: Ranking, columns: Mapping[str, Column]) -> str:
    if ranking.by is None or 1 not in ranking.ranks:
        return "The samples below can be heard, but there are no figures to rank them by."
    place = ranking.ranks.index(1)
    first = ranking.lines[place]
    equal = [
        line.name for line, verdict in zip(ranking.lines, ranking.verdicts, strict=True) if "within chance" in verdict
    ]
    words = [f"Best by “{columns[ranking.by].title}”: {first.name} ({_shown(first, ranking.by, columns)})."]
    if equal:
        words.append(f"As good within chance: {', '.join(equal)}.")
    if base := next((line for line in ranking.lines if line.is_base and ranking.by in line.values), None):
        compared = ranking.verdicts[place].rpartition(", ")[2]
        words.append(
            f"The line to beat is {base.name} ({_shown(base, ranking.by, columns)}); {first.name}: {compared}."
        )
    return " ".join(words)


def _shown(line: Figures, metric: str, columns: Mapping[str, Column]) -> str:
    return f"{line.mean(metric):.{columns[metric].num_digits}f}"


def _facts(plan: Plan, kept: Sequence[Kept], jobs: Sequence[Job]) -> list[tuple[str, str]]:
    minutes = sum(sample.seconds for sample in kept) / 60
    return [
        ("Checkpoints", str(sum(not model.is_base for model in plan.models))),
        ("Base", plan.base.name if plan.base else "–"),
        ("Speakers", ", ".join(voice.speaker for voice in plan.voices)),
        ("Texts", str(len(plan.texts))),
        ("Seeds", str(len(plan.seeds))),
        ("Samples", f"{len(kept)} ({minutes:.1f} minutes)"),
        ("Computed in", f"{jobs[0].request.precision} on {jobs[0].request.device}"),
    ]


def _note_of_size(kept: Sequence[Kept]) -> list[str]:
    if _embeds_all(kept):
        return []
    return [
        "so much speech would make the page too large: of each text the first seed can be heard here, the others are "
        "wav files in samples/"
    ]


def _embeds_all(kept: Sequence[Kept]) -> bool:
    return sum(sample.seconds for sample in kept) <= MAX_EMBEDDED_SECONDS


def _plot(lines: Sequence[Line], by: str | None, columns: Mapping[str, Column]) -> tuple[bytes, str] | None:
    shown = [line for line in lines if by in line.values]
    if by is None or not shown:
        return None
    values = [line.values[by] for line in shown]
    title = f"{columns[by].title} ({columns[by].better} is better), with {LEVEL:.0%} intervals"
    picture = interval_plot(
        [line.name for line in shown], [value.mean for value in values], [value.bounds for value in values],
        [line.is_base for line in shown], title,
    )  # fmt: skip
    return picture, f"{title}; the figures stand in the table"


def _references(plan: Plan) -> list[Reference]:
    heard = [(voice, load_audio(voice.reference)) for voice in plan.voices if voice.reference is not None]
    return [Reference(voice.speaker, voice.transcript, mp3(wave), spectrogram_png(wave)) for voice, wave in heard]


def _passages(
    plan: Plan, jobs: Sequence[Job], kept: Sequence[Kept], ranking: Ranking, output: Path, columns: Mapping[str, Column]
) -> list[Passage]:
    """Each text of each speaker, with its samples in the order of the ranking."""
    embeds_all = _embeds_all(kept)
    groups: dict[tuple[str, int], dict[tuple[str, str], list[Player]]] = {}
    for job, sample in tqdm(list(zip(jobs, kept, strict=True)), desc="report"):
        is_heard = embeds_all or job.request.seed == plan.seeds[0]
        lines = groups.setdefault((job.voice.speaker, job.place), {})
        players = lines.setdefault((job.model.name, job.manner), [])
        players.append(_player(job, sample, is_heard, output, columns))
    return [
        Passage(
            plan.texts[place].text,
            speaker,
            plan.texts[place].language,
            [(line.name, lines[line.key]) for line in ranking.lines],
        )
        for (speaker, place), lines in groups.items()
    ]


def _player(job: Job, sample: Kept, is_heard: bool, output: Path, columns: Mapping[str, Column]) -> Player:
    waveform = sample.waveform() if is_heard else None
    words = [
        f"{columns[name].title.lower()} {value:.{columns[name].num_digits}f}"
        for name, value in sample.measures.items()
        if name not in ("eos_rate", "seconds")
    ]
    return Player(
        seed=job.request.seed,
        seconds=sample.seconds,
        stopped=sample.stopped,
        figures=words,
        audio=mp3(waveform) if waveform is not None else None,
        picture=spectrogram_png(waveform) if waveform is not None else None,
        file=sample.wav.relative_to(output).as_posix(),
    )


# ------------------------------------------------------------------------------------------- for programs, terminals


def report_data(
    plan: Plan, jobs: Sequence[Job], kept: Sequence[Kept], ranking: Ranking, report: Report, output: Path
) -> dict[str, Any]:
    """What report.json holds."""
    return {
        "version": JSON_VERSION,
        "title": report.title,
        "verdict": report.verdict,
        "rank_by": ranking.by,
        "interval": {"level": LEVEL, "resamples": NUM_RESAMPLES},
        "facts": dict(report.facts),
        "notes": list(report.notes),
        "texts": [asdict(text) for text in plan.texts],
        "seeds": list(plan.seeds),
        "speakers": {
            voice.speaker: {"reference": _path(voice.reference), "reference_text": voice.transcript}
            for voice in plan.voices
        },
        "lines": [_line_data(line, figures) for line, figures in zip(report.lines, ranking.lines, strict=True)],
        "samples": [_sample_data(job, sample, output) for job, sample in zip(jobs, kept, strict=True)],
    }


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _line_data(line: Line, figures: Figures) -> dict[str, Any]:
    values = {
        name: {"mean": value.mean, "interval": value.bounds, "is_best": value.is_best}
        for name, value in line.values.items()
    }
    checkpoint, manner = figures.key
    return {
        "name": line.name,
        "checkpoint": checkpoint,
        "manner": manner,
        "is_base": line.is_base,
        "rank": line.rank,
        "verdict": line.verdict,
        "metrics": values,
    }


def _sample_data(job: Job, sample: Kept, output: Path) -> dict[str, Any]:
    request = job.request
    return {
        "checkpoint": job.model.name,
        "manner": job.manner,
        "speaker": request.speaker,
        "text": job.place,
        "seed": request.seed,
        "language": request.language,
        "file": sample.wav.relative_to(output).as_posix(),
        "seconds": sample.seconds,
        "stopped": sample.stopped,
        "metrics": dict(sample.measures),
    }


def summary(report: Report) -> str:
    """The ranking as lines for a terminal."""
    width = max(len(line.name) for line in report.lines)
    shown = list(report.columns.items())
    head = f"{'':4} {'':{width}}  " + "  ".join(column.title for _, column in shown)
    rows = [_summary_row(line, width, shown) for line in report.lines]
    notes = [f"note: {note}" for note in report.notes]
    return _printable("\n".join([head, *rows, *notes, report.verdict]))


def _summary_row(line: Line, width: int, columns: Sequence[tuple[str, Column]]) -> str:
    rank = f"{line.rank or '–':>4}"
    cells = [
        f"{f'{line.values[key].mean:.{column.num_digits}f}' if key in line.values else '–':>{len(column.title)}}"
        for key, column in columns
    ]
    return f"{rank} {line.name:{width}}  " + "  ".join(cells)


def _printable(text: str) -> str:
    """Without the control characters that would move a terminal's cursor."""
    return "".join(character if character.isprintable() or character == "\n" else "�" for character in text)
