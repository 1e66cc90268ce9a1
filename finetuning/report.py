"""The findings of checks.py for people and for programs: a table in the terminal, an HTML page, a JSON file.

The page is one file that opens offline: its style and its plots (SVG) stand in it, and it follows the reader's light or
dark mode. Every word of the user's data is escaped.
"""

from __future__ import annotations

import contextlib
import html
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.checks import ADVISED_MINUTES, FEW_MINUTES, SEVERITIES, Finding, sort_findings
from finetuning.codec import CODEBOOK_SIZE
from finetuning.errors import UserError
from finetuning.figures import DataFigures

#: Version of report.json; it changes when a key is renamed or removed.
JSON_VERSION = 1
#: So many characters fit in a line of the table.
TABLE_WIDTH = 100
#: Speakers that get a bar of their own.
MAX_SPEAKER_BARS = 20
#: Bars of a histogram at most (fewer for few rows), and the share of values at each end that its outermost take in.
MAX_BARS, TAIL_SHARE = 30, 0.002
#: Size of a plot in the page, in SVG units, and the room for its axes.
PLOT_WIDTH, PLOT_HEIGHT, LEFT, BOTTOM = 460, 210, 46, 34


@dataclass(frozen=True)
class Histogram:
    """Bars of equal width.

    Attributes:
        title, unit: for the plot.
        edges: (num_bars + 1,) in the unit.
        counts: (num_bars,) rows in each; the outermost also hold what lies beyond them.
        median: of all values.
    """

    title: str
    unit: str
    edges: list[float]
    counts: list[int]
    median: float


#: Figures that get a histogram: key in report.json -> title, unit, attribute or column of DataFigures.
HISTOGRAMS = {
    "duration": ("Length of the clips", "s", "seconds"),
    "characters_per_second": ("Speaking rate", "characters a second", "characters_per_second"),
    "snr": ("Signal-to-noise ratio", "dB", "snr_db"),
    "loudness": ("Loudness", "LUFS", "loudness_lufs"),
}


def histograms(figures: DataFigures) -> dict[str, Histogram]:
    """The histograms that can be made; those without a known value are left out."""
    made = {}
    for key, (title, unit, source) in HISTOGRAMS.items():
        values = getattr(figures, source) if hasattr(figures, source) else figures.column(source)
        values = values[np.isfinite(values)]
        if len(values):
            made[key] = _histogram(title, unit, values)
    return made


def _histogram(title: str, unit: str, values: np.ndarray) -> Histogram:
    low, high = np.quantile(values, [TAIL_SHARE, 1 - TAIL_SHARE])
    step = _nice_step((high - low) / min(MAX_BARS, 2 * len(values) ** 0.5))
    first = np.floor(low / step)
    edges = (first + np.arange(max(1, int(np.ceil(high / step - first + 1e-9))) + 1)) * step
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return Histogram(title, unit, [round(float(edge), 6) for edge in edges], counts.tolist(), float(np.median(values)))


def _nice_step(width: float) -> float:
    """1, 2 or 5 times a power of ten, at least ``width``."""
    if not width > 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(width))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * (1 - 1e-9)))


# -------------------------------------------------------------------------------------------------------- terminal


def verdict(findings: Sequence[Finding]) -> str:
    """ "2 errors, 3 warnings: …" """
    num_errors, num_warnings = (sum(finding.severity == kind for finding in findings) for kind in ("error", "warning"))
    counts = f"{_count(num_errors, 'error')}, {_count(num_warnings, 'warning')}"
    if num_errors:
        return f"{counts}: do not train on this data before the errors are mended"
    if num_warnings:
        return f"{counts}: it can be trained on; the warnings say what will be heard"
    return f"{counts}: nothing stands against training on this data"


def summary_line(figures: DataFigures) -> str:
    """ "24 rows · 0.7 minutes · 1 speaker · English" """
    minutes = figures.total_seconds / 60
    length = f"{minutes / 60:.1f} hours" if minutes >= 120 else f"{minutes:.1f} minutes"
    languages = ", ".join(figures.languages[:3]) + (", …" if len(figures.languages) > 3 else "")
    parts = [_count(figures.num_rows, "row"), length, _count(len(figures.speakers), "speaker"), languages]
    return " · ".join(part for part in parts if part)


def print_table(findings: Sequence[Finding], figures: DataFigures) -> str:
    """The findings as text for a terminal, the worst first, with a verdict below."""
    findings = sort_findings(findings)
    lines = [summary_line(figures), ""]
    check_width = max([5, *(len(finding.check) for finding in findings)])
    rows_width = max([4, *(len(str(finding.num_rows)) for finding in findings)])
    indent = 7 + 2 + check_width + 2 + rows_width + 2
    if findings:
        lines.append(f"{'':7}  {'check':{check_width}}  {'rows':>{rows_width}}  what was found")
    for finding in findings:
        wrapped = textwrap.wrap(_printable(finding.message), max(40, TABLE_WIDTH - indent)) or [""]
        head = f"{finding.severity:7}  {finding.check:{check_width}}  {finding.num_rows:>{rows_width}}  {wrapped[0]}"
        lines += [head, *(" " * indent + line for line in wrapped[1:])]
        if finding.severity != "info":
            advice = textwrap.wrap(f"→ {finding.advice}", max(40, TABLE_WIDTH - indent), subsequent_indent="  ")
            lines += [" " * indent + line for line in advice]
        if finding.examples:
            line, note = finding.examples[0]
            lines.append(" " * indent + _printable(f"  e.g. line {line}: {note}"))
    return "\n".join([*lines, "", verdict(findings)])


def _printable(text: str) -> str:
    """Without the control characters that would move a terminal's cursor."""
    return "".join(character if character.isprintable() else "�" for character in text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ----------------------------------------------------------------------------------------------------------- files


def report_data(findings: Sequence[Finding], figures: DataFigures, title: str) -> dict[str, Any]:
    """What report.json holds, ready for ``json.dumps``."""
    codes = figures.code_counts.sum() > 0
    return {
        "version": JSON_VERSION,
        "title": title,
        "verdict": verdict(findings),
        "counts": {kind: sum(finding.severity == kind for finding in findings) for kind in SEVERITIES},
        "summary": {
            "num_rows": figures.num_rows,
            "minutes": round(figures.total_seconds / 60, 3),
            "num_with_codes": int(figures.columns["has_codes"].sum()),
            "num_measured": int(figures.columns["has_measures"].sum()),
            "num_speakers": len(figures.speakers),
            "languages": _rows_per_language(figures),
        },
        "findings": [
            {name: getattr(finding, name) for name in ("check", "severity", "message", "advice", "num_rows")}
            | {"examples": [{"line": line, "note": note} for line, note in finding.examples]}
            for finding in sort_findings(findings)
        ],
        "histograms": {key: asdict(histogram) for key, histogram in histograms(figures).items()},
        "minutes_per_speaker": {name: round(value, 3) for name, value in figures.minutes_per_speaker().items()},
        "codebooks": {
            "entries_used": figures.entries_used().tolist(),
            "entries_effective": [round(float(value), 1) for value in figures.entries_effective()],
        }
        if codes
        else None,
    }


def _rows_per_language(figures: DataFigures) -> dict[str, int]:
    counts = np.bincount(figures.columns["language"], minlength=len(figures.languages))
    return {name: int(count) for name, count in zip(figures.languages, counts, strict=True)}


def write_report(folder: Path, findings: Sequence[Finding], figures: DataFigures, title: str) -> Path:
    """Writes report.html and report.json into a folder and returns the path of the page.

    Raises:
        UserError: the folder cannot be written.
    """
    data = report_data(findings, figures, title)
    contents = {
        "report.json": json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        "report.html": report_page(findings, figures, title),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            unfinished = folder / f"{name}.tmp"
            # A lone half of a surrogate pair in a text cannot be encoded.
            unfinished.write_text(content, encoding="utf-8", errors="replace")
            unfinished.replace(folder / name)
    except OSError as error:
        for name in contents:
            with contextlib.suppress(OSError):
                (folder / f"{name}.tmp").unlink(missing_ok=True)
        raise UserError(f"cannot write the report to {folder}: {error.strerror}; name another folder") from None
    return folder / "report.html"


# ------------------------------------------------------------------------------------------------------------ page

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #d9dee6; --ground: #f6f7f9; --card: #fff;
  --bar: #3f6fb5; --median: #1d2430; --error: #b3261e; --warning: #97650b; --info: #4d6580; --good: #25713f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa6b5; --line: #333c49; --ground: #14181e;
  --card: #1c222b; --bar: #7ba7e6; --median: #e4e8ee; --error: #ff8a80; --warning: #efb755; --info: #9db4cf;
  --good: #7fcf9b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .8rem; }
.summary { color: var(--soft); margin: 0 0 1.2rem; overflow-wrap: anywhere; }
.verdict, .finding, .plot { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.verdict { padding: .8rem 1.1rem; font-weight: 600; border-left: 5px solid var(--good); }
.verdict.error, .finding.error { border-left: 5px solid var(--error); }
.verdict.warning, .finding.warning { border-left: 5px solid var(--warning); }
.finding.info { border-left: 5px solid var(--info); }
.finding { padding: .8rem 1.1rem; margin: 0 0 .7rem; overflow-wrap: anywhere; }
.finding p { margin: .15rem 0; }
.tag { font-size: .78rem; font-weight: 600; text-transform: uppercase; letter-spacing: .04em; }
.error .tag { color: var(--error); } .warning .tag { color: var(--warning); } .info .tag { color: var(--info); }
.check { color: var(--soft); font-size: .85rem; font-family: ui-monospace, monospace; }
.message::first-letter { text-transform: uppercase; }
.advice { color: var(--soft); }
details { margin-top: .3rem; font-size: .9rem; } summary { cursor: pointer; color: var(--soft); }
table { border-collapse: collapse; margin: .3rem 0; } td { padding: .1rem .9rem .1rem 0; vertical-align: top; }
td:first-child { color: var(--soft); white-space: nowrap; }
.plots { display: flex; flex-wrap: wrap; gap: .9rem; }
.plot { flex: 1 1 420px; padding: .8rem 1rem; margin: 0; min-width: 0; }
.plot figcaption { font-weight: 600; font-size: .95rem; } .plot small { color: var(--soft); font-weight: 400; }
svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg .name { fill: var(--ink); }
.bar { fill: var(--bar); } .bar.few { fill: var(--warning); } .axis { stroke: var(--line); stroke-width: 1; }
.median { stroke: var(--median); stroke-width: 1.5; stroke-dasharray: 4 3; }
"""


def report_page(findings: Sequence[Finding], figures: DataFigures, title: str) -> str:
    """The HTML page as text."""
    findings = sort_findings(findings)
    worst = findings[0].severity if findings else "info"
    cards = "\n".join(_card(finding) for finding in findings) or "<p>Nothing was found.</p>"
    plots = "\n".join(_plots(figures))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_escape(title)}</h1>
<p class="summary">{_escape(summary_line(figures))}</p>
<p class="verdict {worst}">{_escape(verdict(findings))}</p>
<h2>Findings</h2>
{cards}
<h2>Figures</h2>
<div class="plots">
{plots}
</div>
</main>
</body>
</html>
"""


def _escape(text: str) -> str:
    return html.escape(_printable(text))


def _card(finding: Finding) -> str:
    rows = "".join(f"<tr><td>line {line}</td><td>{_escape(note)}</td></tr>" for line, note in finding.examples)
    examples = f"<details><summary>Examples</summary><table>{rows}</table></details>" if rows else ""
    return (
        f'<section class="finding {finding.severity}"><span class="tag">{finding.severity}</span> '
        f'<span class="check">{_escape(finding.check)} · {_count(finding.num_rows, "row")}</span>'
        f'<p class="message">{_escape(finding.message)}</p>'
        f'<p class="advice">{_escape(finding.advice)}</p>{examples}</section>'
    )


def _plots(figures: DataFigures) -> list[str]:
    plots = [_histogram_plot(histogram) for histogram in histograms(figures).values()]
    if figures.total_seconds:
        plots.append(_speaker_plot(figures))
    if figures.code_counts.any():
        plots.append(_codebook_plot(figures))
    return plots


def _figure(title: str, note: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<figure class="plot"><figcaption>{_escape(title)} <small>{_escape(note)}</small></figcaption>'
        f'<svg viewBox="0 0 {PLOT_WIDTH} {height:g}" role="img" aria-label="{_escape(title)}">{"".join(parts)}</svg>'
        "</figure>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{_escape(text)}</text>'


def _bar(x: float, y: float, width: float, height: float, label: str, kind: str = "") -> str:
    return (
        f'<rect class="bar {kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1">'
        f"<title>{_escape(label)}</title></rect>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _upright_axes(highest: float) -> tuple[list[str], float]:
    """(grid lines with their numbers, SVG units of one count) for bars that stand on the lower axis."""
    step = max(1.0, _nice_step(highest / 4))
    top = step * np.ceil(highest / step)
    scale = (PLOT_HEIGHT - BOTTOM - 10) / top
    parts = []
    for value in np.arange(0, top + step / 2, step):
        y = PLOT_HEIGHT - BOTTOM - value * scale
        parts += [_line(LEFT, y, PLOT_WIDTH, y), _text(LEFT - 6, y + 4, f"{value:,.0f}", "end")]
    return parts, scale


def _histogram_plot(histogram: Histogram) -> str:
    parts, scale = _upright_axes(max(histogram.counts))
    low, high = histogram.edges[0], histogram.edges[-1]
    ground, across = PLOT_HEIGHT - BOTTOM, (PLOT_WIDTH - LEFT - 8) / (high - low)
    for left, right, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        if count:
            label = f"{left:g} to {right:g} {histogram.unit}: {_count(count, 'row')}"
            width = max(1.0, (right - left) * across - 1)
            parts.append(_bar(LEFT + (left - low) * across, ground - count * scale, width, count * scale, label))
    step = _nice_step((high - low) / 6)
    for value in np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step:
        parts.append(_text(LEFT + (value - low) * across, ground + 16, f"{round(value, 6):g}"))
    parts.append(_text((LEFT + PLOT_WIDTH) / 2, PLOT_HEIGHT - 3, histogram.unit))
    x = LEFT + (min(max(histogram.median, low), high) - low) * across
    parts.append(_line(x, 8, x, ground, "median"))
    return _figure(histogram.title, f"median {histogram.median:.3g} {histogram.unit}", PLOT_HEIGHT, parts)


def _speaker_plot(figures: DataFigures) -> str:
    minutes = figures.minutes_per_speaker()
    shown = list(minutes.items())[:MAX_SPEAKER_BARS]
    names_width, row_height = 120, 22
    scale = (PLOT_WIDTH - names_width - 60) / max(shown[0][1], ADVISED_MINUTES[0])
    advised = names_width + ADVISED_MINUTES[0] * scale
    parts = [_line(advised, 0, advised, max(len(shown) * row_height, 40), "median")]
    for index, (name, value) in enumerate(shown):
        y, short = index * row_height, name if len(name) <= 18 else name[:17] + "…"
        kind = "few" if value < FEW_MINUTES else ""
        width = max(value * scale, 1.0)
        parts.append(_text(names_width - 8, y + 14, short, "end", "name"))
        parts.append(_bar(names_width, y + 3, width, row_height - 7, f"{name}: {value:.1f} minutes", kind))
        parts.append(_text(names_width + width + 6, y + 14, f"{value:.1f}", "start"))
    more = f", the {len(shown)} longest of {len(minutes)}" if len(minutes) > len(shown) else ""
    note = f"{ADVISED_MINUTES[0]:g} to {ADVISED_MINUTES[1]:g} are advised{more}"
    return _figure("Minutes per speaker", note, max(len(shown) * row_height, 40), parts)


def _codebook_plot(figures: DataFigures) -> str:
    used, effective = figures.entries_used(), figures.entries_effective()
    parts, scale = _upright_axes(max(int(used.max()), 1))
    ground, across = PLOT_HEIGHT - BOTTOM, (PLOT_WIDTH - LEFT - 8) / len(used)
    for index, count in enumerate(used):
        label = f"codebook {index}: {count} of {CODEBOOK_SIZE} entries, as varied as {effective[index]:.0f}"
        kind = "few" if count <= 1 else ""
        x = LEFT + index * across + 2
        parts.append(_bar(x, ground - count * scale, across - 4, max(count * scale, 1.0), label, kind))
        parts.append(_text(x + across / 2 - 2, ground + 16, str(index)))
    parts.append(_text((LEFT + PLOT_WIDTH) / 2, PLOT_HEIGHT - 3, "codebook"))
    num_frames = int(figures.code_counts[0].sum())
    return _figure("Codebook entries in use", f"of {CODEBOOK_SIZE}, in {num_frames:,} frames", PLOT_HEIGHT, parts)
