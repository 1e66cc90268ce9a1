"""The README and its companions: links lead somewhere, names exist, and every command block runs or says what it needs.

The README's blocks are run one after the other in a folder that holds recordings and nothing else, with the embedded
model in place of the real one; those of the other guides in the same folder after that. Shell scripts that install
and launch are tested in test_launch.py: here ``./uv_train.sh`` stands for ``python train.py``.
"""

from __future__ import annotations

import csv
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from accelerate.state import AcceleratorState
from conftest import PROJECT
from datasets_for_tests import demo_texts

from finetuning.settings import PASS_THROUGH_PREFIXES, canonical_names, load_settings

GUIDES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")), PROJECT / "examples" / "README.md"]
#: A block under such a comment is not run here; the comment tells the reader's machine apart from this one.
NOT_HERE = re.compile(r"<!-- (needs|installs|serves) [\w ,]+ -->")
#: What stands for what this machine lacks.
INSTEAD = {
    "Qwen/Qwen3-TTS-12Hz-1.7B-Base": "tiny-random",
    "owner/name": "./recordings",
    "checkpoint-1500": "last",
    "--seeds 5": "--seeds 2",
}
#: Settings that make any run a short one on the embedded model.
HERE = {
    "DEVICE": "cpu",
    "INIT_MODEL_PATH": "tiny-random",
    "MIXED_PRECISION": "no",
    "MAX_STEPS": "2",
    "SAMPLE_STEPS": "0",
    "USE_WANDB": "false",
}
#: What the commands of the guides find, besides what those before them made.
LINES = "Good morning.\nThe bus is late.\n"
NUM_CLIPS = 8
#: Frames of speech that a model may make which has not learnt to stop.
MAX_FRAMES = "6"
#: Variables of other programs and scripts that the guides name.
OTHER_NAMES = {
    "ACCELERATE_CONFIG", "ENV_FILE", "GLOO_SOCKET_IFNAME", "MACHINE_RANK", "MAIN_PROCESS_IP", "MAIN_PROCESS_PORT",
    "MAX_JOBS", "NUM_MACHINES", "NUM_PROCESSES", "SYS_PTRACE", "TEST_WORKERS",
}  # fmt: skip


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        place: file:line.
        language: that its fence names; "" where it names none.
        comment: the line before it.
    """

    place: str
    language: str
    comment: str
    text: str

    @property
    def runs_here(self) -> bool:
        return self.language == "bash" and not NOT_HERE.fullmatch(self.comment)


def blocks_of(guide: Path) -> Iterator[Block]:
    lines = guide.read_text(encoding="utf-8").splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    for first, last in zip(fences[::2], fences[1::2], strict=True):
        place = f"{guide.relative_to(PROJECT)}:{first + 1}"
        yield Block(place, lines[first][3:], lines[first - 1], "\n".join(lines[first + 1 : last]))


# ---------------------------------------------------------------------------------------------- links and names


def anchors_of(guide: Path) -> set[str]:
    """Of all headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", guide.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.relative_to(PROJECT).as_posix())
def test_links_lead_somewhere(guide: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", guide.read_text(encoding="utf-8"))
    for link in links:
        file, _, anchor = link.partition("#")
        if not file.startswith("https://"):
            target = guide.parent / file if file else guide
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.relative_to(PROJECT).as_posix())
def test_settings_that_are_named_exist(guide: Path) -> None:
    named = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b(?![*_])", guide.read_text(encoding="utf-8")))
    others = {name for name in named if name.startswith((*PASS_THROUGH_PREFIXES, "SLURM_"))} | OTHER_NAMES
    assert named - others - set(canonical_names()) == set()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.relative_to(PROJECT).as_posix())
def test_blocks_of_settings_are_read(guide: Path, tmp_path: Path) -> None:
    for block in blocks_of(guide):
        if block.language == "" and re.match(r"[A-Z_0-9]+=", block.text):
            file = tmp_path / "block.env"
            file.write_text(block.text, encoding="utf-8")
            load_settings(environment={"ENV_FILE": str(file)})


# ------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where somebody stands who has cloned the project and has recordings."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "examples").symlink_to(PROJECT / "examples")
    (folder / "data").mkdir()
    (folder / "recordings").mkdir()
    (folder / "lines.txt").write_text(LINES)
    shutil.copy(PROJECT / ".env.demo", folder)
    shutil.copy(demo_texts(1)[0]["audio"], folder / "data" / "reference.wav")
    with (folder / "recordings" / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for number, row in enumerate(demo_texts(NUM_CLIPS), 1):
            shutil.copy(row["audio"], folder / "recordings" / f"{number:04}.wav")  # FLAC inside: libsndfile looks
            table.writerow([f"{number:04}.wav", row["text"]])
    return folder


@pytest.fixture(scope="module")
def after_readme(workspace: Path) -> Path:
    """The workspace when all blocks of the README were run in it."""
    for block in blocks_of(PROJECT / "README.md"):
        if "DATASET_NAME=./recordings" in block.text and block.language == "":
            write_settings(workspace / ".env", block.text)
        elif block.runs_here:
            run_block(block, workspace)
    return workspace


def write_settings(file: Path, lines: str) -> None:
    """As a person edits the file: these in place of those of the same name."""
    names = [line.partition("=")[0] for line in lines.splitlines()]
    kept = [line for line in file.read_text().splitlines() if line.partition("=")[0] not in names]
    file.write_text("\n".join([*kept, lines]) + "\n")


def run_block(block: Block, folder: Path) -> None:
    text = block.text.replace("\\\n", " ")
    for there, here in INSTEAD.items():
        text = text.replace(there, here)
    for line in text.splitlines():
        if words := shlex.split(line, comments=True):
            try:
                run_command(words, folder)
            except SystemExit as stop:
                assert not stop.code, f"{block.place}: {line}"
            except Exception as error:
                raise AssertionError(f"{block.place}: {line}: {error}") from error


def run_command(words: list[str], folder: Path) -> None:
    """One command line; Python scripts run in this process, which has imported everything."""
    given = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, given[name] = words.pop(0).partition("=")
    program, *arguments = words
    if program in ("./uv_train.sh", "./launch_gpu.sh"):
        is_check = arguments[:1] == ["--check"]
        script, *files = ["test_setup.py" if is_check else "train.py", *arguments[is_check:]]
        run_script(script, [], folder, given | {"ENV_FILE": files[0] if files else ".env"})
    elif program in ("python", ".venv/bin/python"):
        run_script(arguments[0], arguments[1:], folder, given)
    else:
        subprocess.run(words, cwd=folder, check=True, capture_output=True)


def run_script(script: str, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    if script in ("synthesize.py", "evaluate.py"):
        arguments = [*arguments, "--max_new_tokens", MAX_FRAMES]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("finetuning.settings.DEFAULT_ENV_FILE", ".env")
        settings_file = environment.get("ENV_FILE", ".env")
        output_dir = "output" if settings_file.startswith(".env") else f"output_{settings_file}"
        for name, value in (HERE | {"OUTPUT_DIR": output_dir} | environment).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", [script, *arguments])
        main_of(script, arguments)()


def main_of(script: str, arguments: list[str]) -> Callable[[], Any]:
    if script == "-m":
        sys.argv = arguments
        return importlib.import_module(arguments[0]).main
    return runpy.run_path(str(PROJECT / script))["main"]


def test_the_readme_takes_a_stranger_to_a_voice(after_readme: Path) -> None:
    made = ("data/train.jsonl", "data/report/report.html", "output/best/config.json", "hello.wav")
    for name in (*made, "output/evaluation/report.html"):
        assert (after_readme / name).is_file(), name


@pytest.mark.parametrize("guide", GUIDES[1:], ids=lambda guide: guide.relative_to(PROJECT).as_posix())
def test_commands_of_the_other_guides(guide: Path, after_readme: Path) -> None:
    for name in ("anna", "bert"):
        if not (after_readme / name).exists():
            shutil.copytree(after_readme / "output", after_readme / name)
    for block in blocks_of(guide):
        if block.runs_here:
            run_block(block, after_readme)


def test_every_block_runs_or_says_what_it_needs() -> None:
    blocks = [block for guide in GUIDES for block in blocks_of(guide) if block.language == "bash"]
    assert len(blocks) > 15
    assert sum(block.runs_here for block in blocks) >= len(blocks) / 2


def test_the_web_demo_of_qwen_tts_speaks(after_readme: Path) -> None:
    """What ``qwen-tts-demo output/best`` serves, without the server: its page is built and its button pressed."""
    import torch
    from qwen_tts import Qwen3TTSModel
    from qwen_tts.cli.demo import build_demo

    folder = str(after_readme / "output" / "best")
    stock = Qwen3TTSModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    page = build_demo(stock, folder, {"max_new_tokens": int(MAX_FRAMES)})
    button = next(function for function in page.fns.values() if function.api_name == "run_instruct")
    (rate, samples), status = button.fn("Good morning.", "Auto", "Anna", "")
    assert status.startswith("Finished") and rate == 24_000 and len(samples) > 0
