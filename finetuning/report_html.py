"""The page of an evaluation: data in, HTML out. One file that opens offline: sounds and pictures stand in it as data.

It has no script and asks for nothing from outside, which its Content-Security-Policy holds browsers to. Players load
nothing before they are started. All words of the user's are escaped.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: Passages that are open when the page opens.
NUM_OPEN = 1


@dataclass(frozen=True)
class Value:
    """A figure of a line.

    Attributes:
        mean: over its samples.
        bounds: of the interval, where there are samples enough for one.
        is_best: whether no ranked line has a better one.
    """

    mean: float
    bounds: tuple[float, float] | None = None
    is_best: bool = False


@dataclass(frozen=True)
class Column:
    """A figure that lines have.

    Attributes:
        title: as short as a column's head.
        better: "higher", "lower", "nearer to 1", or None where neither is.
        meaning: what it says, for people who make voices.
        num_digits: behind the point.
    """

    title: str
    better: str | None
    meaning: str
    num_digits: int = 3


@dataclass(frozen=True)
class Line:
    """What was compared: a checkpoint, or a way in which the base clones.

    Attributes:
        rank: from 1; None for the base, or where the figure of the ranking is missing.
        values: by the column's key; what was not measured is missing.
        verdict: a few words beside the name.
    """

    name: str
    rank: int | None
    is_base: bool
    values: Mapping[str, Value]
    verdict: str = ""


@dataclass(frozen=True)
class Player:
    """A sample.

    Attributes:
        seed: of its draws.
        seconds: how long it is.
        stopped: whether the model stopped by itself.
        figures: words such as "voice similarity 0.71".
        audio: MP3; None where it is left out of the page.
        picture: PNG of its spectrogram; None where it is left out.
        file: of the sample, relative to the page.
    """

    seed: int
    seconds: float
    stopped: bool
    figures: Sequence[str]
    audio: bytes | None
    picture: bytes | None
    file: str


@dataclass(frozen=True)
class Passage:
    """A text as one speaker was to say it; (line's name, its samples) in the order of the ranking."""

    text: str
    speaker: str
    language: str
    groups: Sequence[tuple[str, Sequence[Player]]]


@dataclass(frozen=True)
class Reference:
    """The real voice of a speaker: MP3, PNG, and what is said, where that is known."""

    speaker: str
    text: str | None
    audio: bytes
    picture: bytes


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        verdict: the result in a sentence or two.
        facts: what was evaluated: (name, value).
        notes: what readers must know: what is missing, or was done otherwise.
        columns: by key, in order; ``rank_by`` is the key of one of them, or None where nothing could be ranked.
        plot: PNG of the ranking, with its words for those who cannot see it.
        how_measured: how intervals come about.
    """

    title: str
    verdict: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    columns: Mapping[str, Column]
    rank_by: str | None
    lines: Sequence[Line]
    passages: Sequence[Passage]
    references: Sequence[Reference] = ()
    plot: tuple[bytes, str] | None = None
    how_measured: str = ""
    advice: Sequence[str] = field(default_factory=list)


def report_page(report: Report) -> str:
    """The whole page."""
    parts = [
        f"<h1>{_escape(report.title)}</h1>",
        f'<p class="verdict">{_escape(report.verdict)}</p>',
        _facts(report.facts),
        _notes(report.notes),
        '<h2 id="ranking">Ranking</h2>',
        _table(report),
        _plot(report.plot),
        f'<p class="soft">{_escape(report.how_measured)}</p>',
        '<h2 id="choose">How to choose</h2>',
        _list(report.advice, "ol"),
        '<h2 id="columns">What the columns say</h2>',
        _meanings(report.columns),
        '<h2 id="listen">Listen</h2>',
        _references(report.references),
        *(_passage(passage, number, number <= NUM_OPEN) for number, passage in enumerate(report.passages, 1)),
    ]
    body = "\n".join(part for part in parts if part)
    return _PAGE.format(title=_escape(report.title), style=_STYLE, body=body)


# ----------------------------------------------------------------------------------------------------------- parts


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{items}</dl>'


def _notes(notes: Sequence[str]) -> str:
    return f'<aside aria-label="Notes"><strong>Please note</strong>{_list(notes, "ul")}</aside>' if notes else ""


def _list(items: Sequence[str], tag: str) -> str:
    return f"<{tag}>{''.join(f'<li>{_escape(item)}</li>' for item in items)}</{tag}>"


def _table(report: Report) -> str:
    heads = "".join(_head(key, column, report.rank_by) for key, column in report.columns.items())
    rows = "\n".join(_row(line, report.columns) for line in report.lines)
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Ranking, a table"><table>'
        f'<thead><tr><th scope="col">Rank</th><th scope="col">Checkpoint</th>{heads}</tr></thead>'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _head(key: str, column: Column, rank_by: str | None) -> str:
    better = f"<small>{_escape(column.better)} is better</small>" if column.better else "<small>for information</small>"
    mark = ' class="by" aria-sort="other"' if key == rank_by else ""
    return f'<th scope="col"{mark}>{_escape(column.title)} {better}</th>'


def _row(line: Line, columns: Mapping[str, Column]) -> str:
    kinds = ' class="base"' if line.is_base else ' class="first"' if line.rank == 1 else ""
    verdict = f"<small>{_escape(line.verdict)}</small>" if line.verdict else ""
    rank = "–" if line.rank is None else str(line.rank)
    cells = "".join(_cell(line.values.get(key), column) for key, column in columns.items())
    return f'<tr{kinds}><td>{rank}</td><th scope="row">{_escape(line.name)} {verdict}</th>{cells}</tr>'


def _cell(value: Value | None, column: Column) -> str:
    if value is None:
        return "<td>–</td>"
    mean = f"{value.mean:.{column.num_digits}f}"
    shown = (
        f'<strong title="best of the checkpoints">{mean}<span class="star"> ★</span></strong>'
        if value.is_best
        else mean
    )
    if value.bounds is None:
        return f"<td>{shown}</td>"
    low, high = (f"{bound:.{column.num_digits}f}" for bound in value.bounds)
    return f"<td>{shown} <small>{low} – {high}</small></td>"


def _plot(plot: tuple[bytes, str] | None) -> str:
    return f'<img class="plot" alt="{_escape(plot[1])}" src="{_data(plot[0], "image/png")}">' if plot else ""


def _meanings(columns: Mapping[str, Column]) -> str:
    items = "".join(f"<dt>{_escape(one.title)}</dt><dd>{_escape(one.meaning)}</dd>" for one in columns.values())
    return f'<dl class="meanings">{items}</dl>'


def _references(references: Sequence[Reference]) -> str:
    return "\n".join(
        f'<section class="card reference"><h3>The real voice: {_escape(one.speaker)}</h3>'
        f"{f'<p>{_escape(one.text)}</p>' if one.text else ''}"
        f"{_sound(one.audio, f'the real voice of {one.speaker}')}"
        f"{_picture(one.picture, f'spectrogram of the real voice of {one.speaker}')}</section>"
        for one in references
    )


def _passage(passage: Passage, number: int, is_open: bool) -> str:
    groups = "\n".join(_group(name, players, passage) for name, players in passage.groups)
    where = " · ".join(part for part in (passage.speaker, passage.language) if part)
    return (
        f'<details class="passage"{" open" if is_open else ""}><summary><span class="number">{number}</span> '
        f'<q>{_escape(passage.text)}</q> <small>{_escape(where)}</small></summary>\n<div class="groups">{groups}</div>'
        "</details>"
    )


def _group(name: str, players: Sequence[Player], passage: Passage) -> str:
    samples = "\n".join(_player(player, name, passage) for player in players)
    return f'<section class="card"><h3>{_escape(name)}</h3>{samples}</section>'


def _player(player: Player, name: str, passage: Passage) -> str:
    label = f"{name}, {passage.speaker}, seed {player.seed}: {passage.text}"
    figures = [f"seed {player.seed}", f"{player.seconds:.1f} s", *player.figures]
    warning = "" if player.stopped else ' <b class="cut">cut off, did not stop</b>'
    sound = _sound(player.audio, label) if player.audio is not None else f"<p><code>{_escape(player.file)}</code></p>"
    picture = _picture(player.picture, f"spectrogram of {label}") if player.picture is not None else ""
    return f'<div class="sample">{sound}{picture}<p>{_escape(" · ".join(figures))}{warning}</p></div>'


def _sound(audio: bytes, label: str) -> str:
    return f'<audio controls preload="none" aria-label="{_escape(label)}" src="{_data(audio, "audio/mpeg")}"></audio>'


def _picture(picture: bytes, label: str) -> str:
    source = _data(picture, "image/png")
    return f'<img class="spectrogram" loading="lazy" decoding="async" alt="{_escape(label)}" src="{source}">'


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #56616f; --line: #d9dee6; --ground: #f6f7f9; --card: #fff;
  --accent: #2f5fa8; --best: #e8f0fb; --base: #fbf0e6; --base-ink: #8a4010; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #a3aebb; --line: #333c49; --ground: #14181e;
  --card: #1c222b; --accent: #8fb6ee; --best: #1d2c44; --base: #33261a; --base-ink: #f0b488; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
small, .soft, .sample p, .reference p { color: var(--soft); font-size: .84rem; }
a { color: var(--accent); }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; padding: 0; margin: 0 0 1.2rem; }
.verdict, aside, .card, .passage, .wide, .plot { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.verdict { padding: .8rem 1.1rem; font-weight: 600; border-left: 5px solid var(--accent); overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin: 1rem 0; }
.facts dt { color: var(--soft); font-size: .8rem; } .facts dd { margin: 0; overflow-wrap: anywhere; }
aside { padding: .8rem 1.1rem; border-left: 5px solid var(--base-ink); overflow-wrap: anywhere; }
aside ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .5rem .75rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { font-size: .84rem; } thead small { display: block; font-weight: 400; }
thead th.by { border-bottom: 3px solid var(--accent); }
tbody th { font-weight: 600; min-width: 11rem; overflow-wrap: anywhere; }
tbody small { display: block; font-weight: 400; }
tbody tr:last-child > * { border-bottom: 0; }
tr.first { background: var(--best); } tr.base { background: var(--base); } tr.base th { color: var(--base-ink); }
.star { color: var(--accent); }
img { max-width: 100%; } .plot { display: block; margin: 1rem 0 .4rem; background: #fff; padding: .4rem; }
.meanings dt { font-weight: 600; } .meanings dd { margin: 0 0 .7rem; }
.card { padding: .8rem 1rem; } .reference { margin-bottom: 1rem; }
.passage { margin-bottom: .8rem; }
.passage summary { padding: .8rem 1rem; cursor: pointer; overflow-wrap: anywhere; }
.passage q { font-weight: 600; } .number { color: var(--soft); }
summary:focus-visible, .wide:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.groups { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: .8rem;
  padding: 0 1rem 1rem; }
.groups .card { background: var(--ground); }
.sample + .sample { border-top: 1px solid var(--line); padding-top: .6rem; margin-top: .6rem; }
.sample p { margin: .2rem 0 0; } .cut { color: var(--bad); }
audio { width: 100%; display: block; }
.spectrogram { display: block; height: 72px; margin-top: .35rem; border-radius: 4px; }
code { overflow-wrap: anywhere; font-size: .84rem; }
@media print { .passage { break-inside: avoid; } }
"""
#: Nothing may be loaded but what stands in the page.
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
_PAGE = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<link rel="icon" href="data:,">\n'
    "<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
    '<nav aria-label="Sections"><ul><li><a href="#ranking">Ranking</a></li><li><a href="#choose">How to choose</a></li>'
    '<li><a href="#columns">Columns</a></li><li><a href="#listen">Listen</a></li></ul></nav>\n'
    "{body}\n</main>\n</body>\n</html>\n"
)
