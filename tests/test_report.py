"""The report: what people read and programs parse."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from finetuning.checks import Finding
from finetuning.errors import UserError
from finetuning.figures import DataFigures, collect
from finetuning.report import TABLE_WIDTH, histograms, print_table, report_page, verdict, write_report

SCRIPT = '<script>alert("x")</script>'


def figures_of(num_rows: int = 60, speaker: str = "anna", measured: bool = True) -> DataFigures:
    random = np.random.default_rng(0)
    rows = []
    for line in range(1, num_rows + 1):
        seconds = float(random.uniform(2, 8))
        measures = {"seconds": seconds, "snr_db": float(random.normal(40, 3)), "loudness_lufs": -20.0}
        row = {"line": line, "text": "hello there", "language": "English", "speaker": speaker, "measures": None}
        if measured:
            codes = random.integers(0, 2048, (round(seconds * 12.5), 16)).astype(np.int16)
            row |= {"measures": measures, "codes": codes}
        rows.append(row)
    return collect(rows)


def finding(severity: str, check: str = "clipping", **fields: object) -> Finding:
    return Finding(check, severity, f"this is {check}", f"mend {check}", fields.pop("num_rows", 3), **fields)


FINDINGS = [
    finding("info", "digits", num_rows=50, examples=[(4, "21 cats")]),
    finding("warning", "clipping", examples=[(7, "2.00%"), (9, "1.00%")]),
    finding("error", "dead_codebooks"),
]

# -------------------------------------------------------------------------------------------------------- terminal


def test_table_has_the_worst_first_and_a_verdict_last() -> None:
    lines = print_table(FINDINGS, figures_of()).splitlines()
    assert lines[0].startswith("60 rows · ") and lines[0].endswith("minutes · 1 speaker · English")
    heads = [line.split()[:3] for line in lines if line.startswith(("error", "warning", "info"))]
    assert heads == [["error", "dead_codebooks", "3"], ["warning", "clipping", "3"], ["info", "digits", "50"]]
    text = "\n".join(lines)
    assert "→ mend clipping" in text and "e.g. line 7: 2.00%" in text and "mend digits" not in text
    assert "e.g. line 4: 21 cats" in text
    assert lines[-1] == "1 error, 1 warning: do not train on this data before the errors are mended"


def test_table_is_aligned_and_not_too_wide() -> None:
    long = finding("warning", "a_check_with_a_long_name", num_rows=123_456)
    long = Finding(long.check, long.severity, "word " * 60, "advice " * 40, long.num_rows)
    lines = print_table([*FINDINGS, long], figures_of()).splitlines()[2:-2]
    assert max(map(len, lines)) <= TABLE_WIDTH
    column = lines[0].index("what was found")
    assert all(line[column - 1] == " " != line[column] for line in lines[:2])


@pytest.mark.parametrize(
    "severities, start",
    [([], "0 errors, 0 warnings: nothing"), (["info"], "0 errors, 0 warnings"), (["warning"] * 2, "0 errors, 2 warn")],
)
def test_verdict(severities: list[str], start: str) -> None:
    assert verdict([finding(severity) for severity in severities]).startswith(start)


def test_control_characters_do_not_reach_the_terminal() -> None:
    bad = finding("warning", examples=[(1, "clear \x1b[2J the screen")])
    assert "\x1b" not in print_table([bad], figures_of())


# ------------------------------------------------------------------------------------------------------ histograms


def test_every_row_is_in_a_bar() -> None:
    figures = figures_of()
    made = histograms(figures)
    assert set(made) == {"duration", "characters_per_second", "snr", "loudness"}
    for histogram in made.values():
        assert sum(histogram.counts) == figures.num_rows and len(histogram.edges) == len(histogram.counts) + 1
    seconds = figures.column("seconds")
    duration = made["duration"]
    assert duration.median == pytest.approx(np.median(seconds))
    inner = [
        ((seconds >= low) & (seconds < high)).sum()
        for low, high in zip(duration.edges, duration.edges[1:], strict=False)
    ]
    assert duration.counts[1:-1] == inner[1:-1]


def test_one_value_and_far_outliers_have_a_histogram_too() -> None:
    figures = figures_of(1000)
    figures.columns["snr_db"][:] = 40
    figures.columns["loudness_lufs"][0] = -1000
    made = histograms(figures)
    assert made["snr"].counts == [1000]
    assert made["loudness"].edges[0] > -30 and sum(made["loudness"].counts) == 1000


# ----------------------------------------------------------------------------------------------------------- files


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_opens_offline_and_users_words_stay_text(tmp_path: Path) -> None:
    bad = Finding(
        "script", "warning", f"message {SCRIPT}", f"advice {SCRIPT}", 1, [(1, f"note {SCRIPT} \x1b[2J \ud83d")]
    )
    page = write_report(tmp_path / "report", [bad], figures_of(speaker=f'"{SCRIPT}'), f"title {SCRIPT}").read_text(
        "utf-8"
    )
    parsed = Tags(page)
    names = {tag for tag, _ in parsed.tags}
    assert "script" not in names and not names & {"link", "img", "iframe"}
    assert not re.search(r"url\(|@import|https?:", page)
    for place in ("title", "message", "advice", "note"):
        assert f"{place} {SCRIPT}" in parsed.text
    assert parsed.text.count(SCRIPT) >= 6  # … the page's title twice, and the speaker's name
    assert "\x1b" not in page and "prefers-color-scheme: dark" in page


def test_plots_are_well_formed_and_show_the_counts(tmp_path: Path) -> None:
    figures = figures_of()
    page = report_page(FINDINGS, figures, "title")
    plots = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    titles = [plot.attrib["aria-label"] for plot in plots]
    assert titles == [
        "Length of the clips",
        "Speaking rate",
        "Signal-to-noise ratio",
        "Loudness",
        "Minutes per speaker",
        "Codebook entries in use",
    ]
    bars = [title.text for title in plots[0].iter("title")]
    assert sum(int(re.search(r": (\d+) rows?$", bar)[1]) for bar in bars) == figures.num_rows
    for plot in plots:
        width, height = map(float, plot.attrib["viewBox"].split()[2:])
        for bar in plot.iter("rect"):
            assert float(bar.attrib["x"]) >= 0 and float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width + 1
            assert float(bar.attrib["y"]) >= 0 and float(bar.attrib["y"]) + float(bar.attrib["height"]) <= height + 1


def test_json_has_stable_keys_and_the_same_figures(tmp_path: Path) -> None:
    figures = figures_of()
    write_report(tmp_path, FINDINGS, figures, "title")
    data = json.loads((tmp_path / "report.json").read_text("utf-8"))
    keys = "version title verdict counts summary findings histograms minutes_per_speaker codebooks"
    assert list(data) == keys.split()
    assert data["counts"] == {"error": 1, "warning": 1, "info": 1}
    assert [entry["check"] for entry in data["findings"]] == ["dead_codebooks", "clipping", "digits"]
    assert set(data["findings"][1]) == {"check", "severity", "message", "advice", "num_rows", "examples"}
    assert data["findings"][1]["examples"][0] == {"line": 7, "note": "2.00%"}
    assert data["summary"]["num_rows"] == data["summary"]["num_measured"] == 60
    assert data["minutes_per_speaker"] == {"anna": pytest.approx(figures.total_seconds / 60, abs=1e-3)}
    assert len(data["codebooks"]["entries_used"]) == 16


def test_reports_of_little_or_nothing(tmp_path: Path) -> None:
    """Raw rows without any figure, and no rows: nothing to plot, nothing to fail on."""
    for name, figures in (("raw", figures_of(measured=False)), ("none", collect([]))):
        write_report(tmp_path / name, [], figures, name)
        data = json.loads((tmp_path / name / "report.json").read_text("utf-8"))
        assert data["codebooks"] is None and "duration" not in data["histograms"]
        assert print_table([], figures).endswith("nothing stands against training on this data")


def test_many_speakers_do_not_flood_the_page(tmp_path: Path) -> None:
    rows = [
        {"line": line, "text": "a", "speaker": f"s{line}", "measures": {"seconds": 2.0 + line}}
        for line in range(1, 301)
    ]
    page = report_page([], collect(rows), "title")
    assert page.count(" minutes</title>") == 20 and "the 20 longest of 300" in page and "s300: 5.0 minutes" in page


def test_a_report_is_replaced_whole(tmp_path: Path) -> None:
    for _ in range(2):
        write_report(tmp_path, FINDINGS, figures_of(), "title")
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the report to .*file"):
        write_report(tmp_path / "file", FINDINGS, figures_of(), "title")
