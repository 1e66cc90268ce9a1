"""The page of an evaluation: well-formed, of one piece, safe with any words, and alive in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from finetuning.evaluation_media import interval_plot, mp3, spectrogram_png, wav
from finetuning.report_html import Column, Line, Passage, Player, Reference, Report, Value, report_page

EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(2)> & ' <|im_end|> {title} "
VOID = {"meta", "link", "img", "br"}
TONE = (0.3 * np.sin(np.arange(24_000) / 20)).astype(np.float32)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tags(HTMLParser):
    """All tags; fails where one is closed that is not open, or left open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def player(seed: int = 1, **fields: object) -> Player:
    return Player(
        **{
            "seed": seed,
            "seconds": 1.0,
            "stopped": True,
            "figures": ["voice similarity 0.71"],
            "audio": mp3(TONE),
            "picture": spectrogram_png(TONE),
            "file": "samples/best/a.wav",
        }
        | fields
    )


def a_report(words: str = "best", num_lines: int = 2, num_passages: int = 2, seeds: int = 2) -> Report:
    columns = {
        "speaker_embedding_similarity": Column("Voice similarity", "higher", f"Alike. {words}"),
        "seconds": Column("Length (s)", None, "How long.", 1),
    }
    values = {"speaker_embedding_similarity": Value(0.7123, (0.65, 0.78), True), "seconds": Value(2.0)}
    lines = [Line(f"{words}-{number}", number, False, values, words) for number in range(1, num_lines)]
    lines.append(Line("base, voice only", None, True, {"seconds": Value(2.5, (2.0, 3.0))}, "the line to beat"))
    players = [player(seed, figures=[words]) for seed in range(1, seeds + 1)]
    passages = [
        Passage(f"{words} {number}", words, "English", [(line.name, players) for line in lines])
        for number in range(num_passages)
    ]
    picture = interval_plot(
        [line.name for line in lines], [0.5] * num_lines, [None] * num_lines, [False] * num_lines, ""
    )
    return Report(
        title=f"Which one? {words}",
        verdict=words,
        facts=[("Run", words)],
        notes=[words],
        columns=columns,
        rank_by="speaker_embedding_similarity",
        lines=lines,
        passages=passages,
        references=[Reference(words, words, mp3(TONE), spectrogram_png(TONE))],
        plot=(picture, words),
        how_measured=words,
        advice=[words],
    )


# ----------------------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("words", ["best", EVIL])
def test_page_is_well_formed_and_holds_everything(words: str) -> None:
    report = a_report(words)
    tags = Tags(report_page(report))
    assert len(tags.of("audio")) == 1 + 2 * 2 * 2
    assert len(tags.of("img")) == 1 + 1 + 2 * 2 * 2
    assert {attributes["preload"] for attributes in tags.of("audio")} == {"none"}
    assert all("controls" in attributes and attributes["aria-label"] for attributes in tags.of("audio"))
    assert all(attributes["alt"] for attributes in tags.of("img"))
    assert len(tags.of("tr")) == 1 + 2
    for heading in ("Ranking", "How to choose", "What the columns say", "Listen"):
        assert heading in tags.words
    assert "0.712" in tags.words and "0.650 – 0.780" in tags.words and "higher is better" in tags.words
    assert f"{words} 0" in tags.words and f"{words} 1" in tags.words


def test_words_are_never_markup() -> None:
    page = report_page(a_report(EVIL))
    tags = Tags(page)
    assert tags.of("script") == []
    assert {name for name, _ in tags.found} == {name for name, _ in Tags(report_page(a_report())).found}
    handlers = [key for _, attributes in tags.found for key in attributes if key.startswith("on")]
    assert handlers == []
    assert EVIL.strip() in tags.words


def test_page_is_of_one_piece() -> None:
    page = report_page(a_report(EVIL))
    assert not re.search(r"https?://|//cdn|@import|url\(", page)
    tags = Tags(page)
    sources = [attributes[key] for _, attributes in tags.found for key in ("src", "href") if key in attributes]
    assert len(sources) > 10
    assert all(source.startswith(("data:", "#")) for source in sources)
    places = {attributes["id"] for _, attributes in tags.found if "id" in attributes}
    assert {source[1:] for source in sources if source.startswith("#")} <= places
    policy = [one["content"] for one in tags.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0].startswith("default-src 'none'")


def test_sounds_and_pictures_are_those_that_were_given() -> None:
    tags = Tags(report_page(a_report()))
    for tag, kind, content in (("audio", "audio/mpeg", mp3(TONE)), ("img", "image/png", spectrogram_png(TONE))):
        head, _, data = tags.of(tag)[-1]["src"].partition(",")
        assert head == f"data:{kind};base64"
        assert base64.b64decode(data, validate=True) == content


def test_what_is_left_out_and_what_was_cut_off_is_said() -> None:
    report = a_report(num_passages=1)
    players = [player(audio=None, picture=None, stopped=False, file="samples/best/<a>.wav")]
    passage = replace(report.passages[0], groups=[("best", players)])
    tags = Tags(report_page(replace(report, passages=[passage], references=[], plot=None, rank_by=None)))
    assert tags.of("audio") == [] and tags.of("img") == []
    assert "samples/best/<a>.wav" in tags.words and "cut off" in tags.words


# --------------------------------------------------------------------------------------------------- sounds, pictures


def test_sounds_keep_their_length() -> None:
    import io

    import soundfile

    loud = np.concatenate([TONE, 5 * TONE])
    back, rate = soundfile.read(io.BytesIO(wav(loud)), dtype="float32")
    assert (rate, len(back)) == (24_000, 48_000)
    assert np.abs(back[:24_000] - TONE).max() < 1e-4 and np.abs(back).max() <= 1.0
    back, rate = soundfile.read(io.BytesIO(mp3(TONE)), dtype="float32")
    assert rate == 24_000 and abs(len(back) - 24_000) < 3000
    assert len(mp3(TONE)) < 16_000


def test_spectrogram_shows_pitch_and_time() -> None:
    import io

    from matplotlib.image import imread

    def picture(waveform: np.ndarray) -> np.ndarray:
        return imread(io.BytesIO(spectrogram_png(waveform)), format="png")[..., :3].sum(-1)

    seconds = np.arange(48_000) / 24_000
    low, high = (np.sin(2 * np.pi * hertz * seconds).astype(np.float32) for hertz in (300, 5000))
    shown = picture(np.concatenate([low, high, 0 * low]))
    assert shown.shape == (72, 6 * 40)
    first, second, third = (shown[:, start + 5 : start + 75].mean(1) for start in (0, 80, 160))
    assert first.argmax() > 55 and second.argmax() < 30  # low sounds below
    assert third.max() < first.max() / 3
    assert picture(np.zeros(0, np.float32)).shape == (72, 1)
    assert picture(np.tile(TONE, 60)).shape[1] <= 1600


# -------------------------------------------------------------------------------------------------------- the browser

PROBE = """<script>
const sounds = [...document.querySelectorAll('audio')], pictures = [...document.querySelectorAll('img')];
const wait = (one, name) => new Promise(done => { one.addEventListener(name, () => done(true));
  one.addEventListener('error', () => done(false)); });
for (const details of document.querySelectorAll('details')) details.open = true;
for (const one of pictures) one.loading = 'eager';
Promise.all([...pictures.map(one => one.complete || wait(one, 'load')), ...sounds.map(one => {
  const ready = wait(one, 'loadedmetadata'); one.preload = 'metadata'; one.load(); return ready; })]).then(() => {
  document.title = JSON.stringify({widths: pictures.map(one => one.naturalWidth),
    seconds: sounds.map(one => one.duration), visible: sounds.every(one => one.offsetHeight > 10)}); });
</script>"""


def browse(file: Path, *options: str) -> subprocess.CompletedProcess:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    profile = f"--user-data-dir={file.parent / 'profile'}"
    return subprocess.run([*command, profile, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
def test_browser_shows_and_plays_everything(tmp_path: Path) -> None:
    page = report_page(a_report(EVIL))
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    done = browse(tmp_path / "report.html", "--dump-dom")
    assert done.stdout.count("<audio") == 9 and done.stdout.count("<img") == 10
    assert "CONSOLE" not in done.stderr, done.stderr
    # The page has no script; for the test one looks at it, where the policy would not let it.
    opened = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", f"{PROBE}</body>")
    (tmp_path / "probe.html").write_text(opened, encoding="utf-8")
    done = browse(tmp_path / "probe.html", "--dump-dom", "--virtual-time-budget=20000")
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(re.search(r"<title>({.*?})</title>", done.stdout)[1])
    assert len(found["widths"]) == 10 and min(found["widths"]) > 0
    assert len(found["seconds"]) == 9 and all(0.9 < seconds < 1.2 for seconds in found["seconds"])
    assert found["visible"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
def test_browser_obeys_the_policy(tmp_path: Path) -> None:
    """So the test above would see a violation in the console."""
    page = report_page(a_report()).replace("</body>", "<script>document.title = 'ran'</script></body>")
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    done = browse(tmp_path / "report.html", "--dump-dom")
    assert "<title>ran" not in done.stdout and "CONSOLE" in done.stderr
