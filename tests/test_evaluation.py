"""Comparing checkpoints: what is generated and kept, what is ranked, and what bad input meets."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import PROJECT, VOICE
from safetensors.torch import load_file, save_file
from training import FULL, train

from finetuning import evaluation, evaluation_models, evaluation_plan, evaluation_voices
from finetuning.disk import read_json
from finetuning.errors import UserError
from finetuning.evaluation import evaluate
from finetuning.evaluation_models import Options, find_checkpoints, open_run_rows
from finetuning.evaluation_plan import BUILT_IN_TEXTS, make_plan
from finetuning.evaluation_report import Figures, differs, metrics_of, rank
from finetuning.kept_samples import Request, find, find_anywhere, fingerprint, keep, note_measures, remove_outdated
from finetuning.metrics import METRICS
from finetuning.settings import load_settings

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ("Rain is on its way.", "Is <b>that</b> all & nothing more?")
NUM_FRAMES = 8
REFERENCE = VOICE / "english_voice.wav"


def make_run(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> Any:
    """A few steps on the tiny model; gives the settings."""
    jsonl = folder / "train.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    defaults = FULL | {
        "device": "cpu",
        "mixed_precision": "no",
        "init_model_path": "tiny-random",
        "output_dir": folder / "output",
        "train_jsonl": jsonl,
        "validation_fraction": 0,
        "use_wandb": False,
        "resume": "never",
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "save_steps": 2,
        "max_steps": 4,
    }
    settings = load_settings(defaults | fields, environment={})
    train(settings)
    return settings


@pytest.fixture(scope="module")
def trained(demo_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Any:
    """Settings of a run with two speakers and checkpoint-2, checkpoint-4 (= last), best; not to be changed."""
    speakers = ("Anna_B", "bert")
    rows = [row | {"speaker": speakers[number % 2], "language": "English"} for number, row in enumerate(demo_rows)]
    rows = [row | {"ref_text": "What is said there."} for row in rows]
    jsonl = tmp_path_factory.mktemp("rows") / "validation.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows[20:]), encoding="utf-8")
    return make_run(tmp_path_factory.mktemp("trained"), rows[:12], validation_jsonl=jsonl)


@pytest.fixture
def run(trained: Any, tmp_path: Path) -> Any:
    """A copy of the run that a test may spoil."""
    shutil.copytree(trained.output_dir, tmp_path / "output")
    return trained.model_copy(update={"output_dir": tmp_path / "output"})


def options_of(settings: Any, **fields: Any) -> Options:
    defaults = {
        "output": settings.output_dir / "evaluation",
        "texts": TEXTS,
        "num_seeds": 2,
        "max_new_tokens": NUM_FRAMES,
        "speakers": ("anna_b",),
    }
    return Options(**(defaults | fields))


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that a model was asked for, in order."""
    made: list[Request] = []
    speak = evaluation._speak

    def noting(stock: Any, job: Any, prompts: Any) -> np.ndarray:
        made.append(job.request)
        return speak(stock, job, prompts)

    monkeypatch.setattr(evaluation, "_speak", noting)
    return made


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Noise instead of models, which take seconds to load; gives the requests."""
    made: list[Request] = []

    def speak(stock: Any, job: Any, prompts: Any) -> np.ndarray:
        made.append(job.request)
        random = np.random.default_rng(int(job.request.key()[:8], 16))
        return random.normal(0, 0.1, 1920 * 3).astype(np.float32)

    monkeypatch.setattr(evaluation, "_speak", speak)
    monkeypatch.setattr(evaluation, "_load", lambda *_: None)
    return made


# --------------------------------------------------------------------------------------------------------- end to end


def test_report_of_a_run(run: Any, spoken: list, capsys: pytest.CaptureFixture[str]) -> None:
    """All checkpoints and the base, both ways of cloning, through stock qwen-tts; then again with nothing to do."""
    options = options_of(run)
    page = evaluate(run, options)
    data = json.loads((run.output_dir / "evaluation" / "report.json").read_text(encoding="utf-8"))
    lines = {line["name"]: line for line in data["lines"]}
    names = [model.name for model in find_checkpoints(run.output_dir, ())]
    assert "checkpoint-2" in names and "checkpoint-4" in names
    joined = [name for name in lines if "checkpoint-4" in name]
    assert joined and "last" in joined[0]  # the same files are generated once
    assert {"base, voice only", "base, in context"} <= set(lines)
    assert [line["rank"] for line in data["lines"] if line["is_base"]] == [None, None]
    assert sorted(line["rank"] for line in data["lines"] if not line["is_base"]) == list(range(1, len(lines) - 1))
    assert len(data["samples"]) == len(lines) * len(TEXTS) * 2 == len(spoken)
    for sample in data["samples"]:
        waveform, rate = soundfile.read(run.output_dir / "evaluation" / sample["file"])
        assert rate == 24_000
        assert 0 < len(waveform) <= NUM_FRAMES * 1920
        assert sample["seconds"] == pytest.approx(len(waveform) / rate)
        assert sample["stopped"] == (len(waveform) < (NUM_FRAMES - 1) * 1920)
        assert sample["metrics"]["eos_rate"] == float(sample["stopped"])
    html = page.read_text(encoding="utf-8")
    assert html.count("<audio") == len(spoken) + 1
    assert "Is &lt;b&gt;that&lt;/b&gt; all &amp; nothing more?" in html and "<b>that</b>" not in html
    assert data["speakers"]["Anna_B"]["reference_text"] == "What is said there."
    capsys.readouterr()
    before = {file: file.read_bytes() for file in page.parent.rglob("*") if file.is_file()}
    num_spoken = len(spoken)
    evaluate(run, options)
    assert len(spoken) == num_spoken
    assert f"{num_spoken} samples, {num_spoken} of them are there already" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in page.parent.rglob("*") if file.is_file()} == before


def test_seeds_differ_and_draws_do_not_hang_on_what_came_before(run: Any, spoken: list) -> None:
    options = options_of(run, checkpoints=("checkpoint-4",), with_base=False)
    evaluate(run, options)
    files = {file.stem: file.read_bytes() for file in options.output.rglob("*.wav")}
    assert len(set(files.values())) == len(files) == 4
    alone = replace(options, output=run.output_dir / "alone", texts=TEXTS[1:])
    evaluate(run, alone)
    again = {file.stem: file.read_bytes() for file in alone.output.rglob("*.wav")}
    assert len(again) == 2 and again.items() <= files.items()


def test_base_checkpoints_clone(demo_rows: list, tmp_path: Path, spoken: list) -> None:
    settings = make_run(tmp_path, demo_rows[:6], export_type="base", max_steps=1, save_steps=10)
    reference = str(REFERENCE)
    options = options_of(
        settings, speakers=(), references=(reference,), reference_text="Good morning.", texts=TEXTS[:1], num_seeds=1
    )
    evaluate(settings, options)
    data = json.loads((options.output / "report.json").read_text(encoding="utf-8"))
    names = {line["name"] for line in data["lines"]}
    assert names == {"best = last, voice only", "best = last, in context", "base, voice only", "base, in context"}
    assert {request.reference_text for request in spoken} == {None, "Good morning."}
    # A checkpoint speaks in the layout that it was trained in, the base in stock's default for clones.
    layouts = {(request.fingerprint, request.non_streaming) for request in spoken}
    assert len(layouts) == 2 and {layout for _, layout in layouts} == {True, False}


def test_command_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROJECT / "evaluate.py")],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "OUTPUT_DIR": str(tmp_path / "none"), "DEVICE": "cpu", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: OUTPUT_DIR:")
    assert "holds no checkpoints" in done.stderr and "Traceback" not in done.stderr


def test_command_takes_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import evaluate as command

    asked: list[tuple[Any, Options]] = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *arguments: asked.append(arguments))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    arguments = ["--checkpoints", "best", "last", "--texts", "Hi.", "--seeds", "5", "--rank_by", "wer", "--no_base"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, "--device", "cpu"])
    command.main()
    (settings, options), *_ = asked
    assert settings.device == "cpu"
    assert (options.checkpoints, options.texts, options.num_seeds) == (["best", "last"], ["Hi."], 5)
    assert (options.rank_by, options.with_base, options.output) == ("wer", False, tmp_path / "evaluation")


# ------------------------------------------------------------------------------------------------------- continuation


def test_goes_on_after_an_interruption(run: Any, noise: list, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(run)
    whole = replace(options, output=run.output_dir / "whole")
    evaluate(run, whole)
    total = len(noise)
    speak, noise[:] = evaluation._speak, []

    def stopping(*arguments: Any) -> np.ndarray:
        if len(noise) == 5:
            raise KeyboardInterrupt
        return speak(*arguments)

    monkeypatch.setattr(evaluation, "_speak", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, options)
    assert not (options.output / "report.html").exists()
    monkeypatch.setattr(evaluation, "_speak", speak)
    first = list(noise)
    evaluate(run, options)
    assert len(first) == 5 and len(noise) == total
    assert len({request.key() for request in noise}) == total  # nothing twice
    for name in ("report.html", "report.json"):
        assert (options.output / name).read_bytes() == (whole.output / name).read_bytes()


SPOILED = {
    "wav cut off": lambda wav: wav.write_bytes(wav.read_bytes()[:-1000]),
    "wav changed": lambda wav: wav.write_bytes(wav.read_bytes()[:-2] + b"xy"),
    "no wav": lambda wav: wav.unlink(),
    "no JSON": lambda wav: wav.with_suffix(".json").unlink(),
    "half a JSON": lambda wav: wav.with_suffix(".json").write_text(wav.with_suffix(".json").read_text()[:40]),
    "empty JSON": lambda wav: wav.with_suffix(".json").write_text("{}"),
    "a list": lambda wav: wav.with_suffix(".json").write_text("[1]"),
}


def test_half_written_samples_are_made_again(run: Any, noise: list) -> None:
    options = options_of(run, checkpoints=("best",), with_base=False, num_seeds=4)
    evaluate(run, options)
    wavs = sorted((options.output / "samples" / "best").glob("*.wav"))
    before = {file: file.read_bytes() for file in wavs}
    for spoil, wav in zip(SPOILED.values(), wavs, strict=False):
        spoil(wav)
    (wavs[0].parent / f".{wavs[0].name}.tmp").write_bytes(b"half")
    noise.clear()
    evaluate(run, options)
    assert {request.file_name() for request in noise} == {wav.stem for wav in wavs[: len(SPOILED)]}
    assert {file: file.read_bytes() for file in wavs} == before
    assert list(wavs[0].parent.glob(".*")) == []


def test_a_changed_checkpoint_is_generated_anew(run: Any, noise: list, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of(run)
    evaluate(run, options)
    old = {file.name for file in (options.output / "samples" / "checkpoint-2").glob("*.wav")}
    folder = run.output_dir / "checkpoint-2"
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"temperature": 0.5}))
    noise.clear()
    evaluate(run, options)
    data = json.loads((options.output / "report.json").read_text())
    assert any(
        re.search(r"checkpoint-2 is left out: --checkpoints: .*damaged: generation_config\.json has", note)
        for note in data["notes"]
    )
    assert noise == [] and not any("checkpoint-2" in line["name"] for line in data["lines"])
    assert {file.name for file in (options.output / "samples" / "checkpoint-2").glob("*.wav")} == old
    (folder / "checksums.json").unlink()
    evaluate(run, options)
    assert {request.fingerprint for request in noise} == {fingerprint(folder)} and len(noise) == 4
    new = {file.name for file in (options.output / "samples" / "checkpoint-2").glob("*")}
    assert len(new) == 8 and not new & old
    assert "checkpoint-2 has changed" in capsys.readouterr().out


def test_every_option_of_a_sample_is_in_its_key() -> None:
    request = Request("f", "name", "anna", "English", "Hi.", 1, 100, True, "float32", "cpu")
    changes = {
        "fingerprint": "g", "manner": "voice", "speaker": "bert", "language": "Auto", "text": "Ho.", "seed": 2,
        "max_new_tokens": 99, "non_streaming": False, "precision": "bfloat16", "device": "cuda", "reference": "r",
        "reference_text": "Hm.",
    }  # fmt: skip
    assert set(changes) == set(Request.__dataclass_fields__)
    keys = {replace(request, **{name: value}).key() for name, value in changes.items()}
    assert len(keys | {request.key()}) == len(changes) + 1
    assert replace(request, speaker="../Ä b").file_name().startswith("b-seed1-")


def test_fingerprint_is_of_what_is_heard(run: Any, tmp_path: Path) -> None:
    folder = run.output_dir / "best"
    before = fingerprint(folder)
    (folder / "README.md").write_text("other words")
    (folder / "training_state.json").write_text("{}")
    assert fingerprint(folder) == before
    (folder / "checksums.json").rename(tmp_path / "kept.json")
    assert fingerprint(folder) == before  # computed from the files
    (tmp_path / "kept.json").rename(folder / "checksums.json")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()  # a hard link of other checkpoints
    weights.write_bytes(content)  # of the same size, newer than its checksum
    assert fingerprint(folder) != before


def test_measures_are_kept_and_made_anew_with_another_yardstick(
    run: Any, noise: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetuning import listening

    counted: list[int] = []
    measure = listening.measure_each

    def counting(spoken: Any, yardstick: Any) -> Any:
        counted.append(len(spoken))
        return measure(spoken, yardstick)

    monkeypatch.setattr(listening, "measure_each", counting)
    options = options_of(run, checkpoints=("best",), with_base=False)
    for _ in range(2):
        capsys.readouterr()
        evaluate(run, options)
    assert sum(counted) == 4
    assert "speech rate of" in (said := capsys.readouterr().out) and said.count("speech rate of") == 1
    monkeypatch.setattr(evaluation, "_paces", lambda _: {"Anna_B": 3.0})
    evaluate(run, options)
    assert sum(counted) == 8 and len(noise) == 4


def test_what_a_judge_failed_on_is_measured_again(run: Any, noise: list, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetuning import listening

    asked: list[int] = []

    def recognize(waveforms: Any) -> list[str]:
        asked.append(len(waveforms))
        if len(asked) == 2:
            raise RuntimeError("out of memory")
        return ["rain is on its way"]

    monkeypatch.setattr(evaluation, "try_judges", lambda _: None)
    monkeypatch.setattr(evaluation, "load_recognizer", lambda *_: recognize)
    monkeypatch.setattr(listening, "_is_audible", lambda _: True)
    settings = run.model_copy(update={"asr_model": "owner/model"})
    options = options_of(settings, checkpoints=("best",), with_base=False, rank_by="wer")
    notes = []
    for _ in range(3):
        evaluate(settings, options)
        data = json.loads((options.output / "report.json").read_text())
        notes.append("\n".join(data["notes"]))
    assert len(asked) == 4 + 1
    assert "wer and cer could not be measured of 1 samples (RuntimeError: out of memory)" in notes[0]
    assert "“Word errors” could not be measured of all samples (best has it of 3 of 4)" in notes[0]
    assert "could not be measured" not in notes[1] + notes[2]
    assert all("wer" in sample["metrics"] for sample in data["samples"])


def test_a_full_disk_is_a_message_and_costs_nothing_that_was_made(
    run: Any, noise: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_sample, options = evaluation.keep, options_of(run)

    def full(*arguments: Any) -> Any:
        if len(noise) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return keep_sample(*arguments)

    monkeypatch.setattr(evaluation, "keep", full)
    with pytest.raises(UserError, match=r"--output: .*No space left on device.*start the same command again"):
        evaluate(run, options)
    assert len(list(options.output.rglob("*.json"))) == 3
    monkeypatch.setattr(evaluation, "keep", keep_sample)
    del noise[3:]  # the fourth was lost
    evaluate(run, options)
    assert len({request.key() for request in noise}) == len(noise)


def test_samples_on_disk(tmp_path: Path) -> None:
    folder, checkpoint = tmp_path / "best", tmp_path / "run" / "best"
    request = Request("f", "name", "anna", "English", "Hi.", 1, 5, True, "float32", "cpu")
    waveform = np.linspace(-0.5, 0.5, 3 * 1920, dtype=np.float32)
    kept = keep(folder, request, waveform, checkpoint)
    assert (kept.num_codec_frames, kept.stopped, kept.seconds) == (3, True, 0.24)
    assert not keep(folder, replace(request, seed=2), np.zeros(4 * 1920, np.float32), checkpoint).stopped
    assert find(folder, request) == kept
    noted = note_measures(kept, {"wer": 0.5}, "digest")
    assert find(folder, request) == noted == find_anywhere(tmp_path, "checkpoint-4", request)
    assert np.abs(noted.waveform() - waveform).max() < 1e-4
    assert find(folder, replace(request, seed=3)) is None
    assert find_anywhere(tmp_path, "checkpoint-4", replace(request, seed=3)) is None
    assert remove_outdated(folder, tmp_path / "other run" / "best", {"g"}) == 0
    assert remove_outdated(folder, checkpoint, {"g", "f"}) == 0
    assert remove_outdated(folder, checkpoint, {"g"}) == 2
    assert list(folder.iterdir()) == []


def test_samples_are_found_under_another_name_of_the_checkpoint(run: Any, noise: list) -> None:
    """checkpoint-2 becomes best, and best something else: nothing that is still compared is made again, or removed."""
    options = options_of(run, checkpoints=("checkpoint-2", "checkpoint-4"), with_base=False)
    evaluate(run, options)
    before = {file: file.read_bytes() for file in options.output.rglob("*.wav")}
    for name in ("best", "checkpoint-4"):
        shutil.rmtree(run.output_dir / name)
    for old, new in (("checkpoint-2", "best"), ("last", "checkpoint-2")):
        (run.output_dir / old).rename(run.output_dir / new)
    noise.clear()
    evaluate(run, replace(options, checkpoints=("best", "checkpoint-2")))
    assert noise == [] and {file: file.read_bytes() for file in options.output.rglob("*.wav")} == before
    data = json.loads((options.output / "report.json").read_text())
    assert {sample["file"].split("/")[1] for sample in data["samples"]} == {"checkpoint-2", "checkpoint-4"}


def test_a_shared_folder_keeps_what_another_run_said(run: Any, noise: list, tmp_path: Path) -> None:
    options = options_of(run, output=tmp_path / "shared", checkpoints=("best",), with_base=False)
    evaluate(run, options)
    before = set(options.output.rglob("*.wav"))
    shutil.copytree(run.output_dir, tmp_path / "other")
    other = run.model_copy(update={"output_dir": tmp_path / "other"})
    (tmp_path / "other" / "best" / "checksums.json").unlink()
    config = tmp_path / "other" / "best" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"temperature": 0.5}))
    evaluate(other, options)
    assert len(noise) == 8 and len(set(options.output.rglob("*.wav"))) == 8 and before < set(options.output.rglob("*"))


# ------------------------------------------------------------------------------------------------------------ ranking


def line(name: str, is_base: bool = False, step: int = 1, **values: Any) -> Figures:
    arrays = {key: np.asarray(value, dtype=float).reshape(3, -1) for key, value in values.items()}
    return Figures(name, (name, "name"), is_base, step, arrays)


def spread(mean: float, width: float = 0.0) -> list[float]:
    return [mean - width, mean, mean + width]


@pytest.mark.parametrize("metric", [name for name, one in METRICS.items() if one.is_of_samples])
def test_ranking_follows_the_metrics_direction(metric: str) -> None:
    values = {"low": 0.6, "middle": 0.97, "high": 1.3}
    order = {
        "lower": ["low", "middle", "high"],
        "higher": ["high", "middle", "low"],
        "nearer to 1": ["middle", "high", "low"],
    }[METRICS[metric].better]
    lines = [line(name, **{metric: spread(value, 0.01)}) for name, value in values.items()]
    base = line("base", True, **{metric: spread(values[order[0]] if order[0] != "middle" else 1.0)})
    ranking = rank([base, *lines], metric)
    assert ranking.by == metric
    assert [one.name for one in ranking.lines] == [*order, "base"]
    assert list(ranking.ranks) == [1, 2, 3, None]
    assert ranking.verdicts[0].startswith("best") and ranking.verdicts[3] == "the line to beat"
    assert ranking.verdicts[2] == "worse than the base"


def test_what_ranks_by_default_and_when_it_is_missing() -> None:
    both = [line(name, wer=spread(0.1), eos_rate=spread(1.0)) for name in "ab"]
    assert rank(both, None).by == "wer"
    assert rank(both, "eos_rate").by == "eos_rate"
    assert rank(both, "mos").by == "wer"
    similar = [replace(one, values={**one.values, "speaker_embedding_similarity": np.ones((3, 1))}) for one in both]
    assert rank(similar, None).by == "speaker_embedding_similarity"
    nothing = rank([line("a", silence_share=spread(0.1))], None)
    assert nothing.by is None and list(nothing.ranks) == [None]
    only_base = rank([line("base", True, wer=spread(0.1)), line("a", eos_rate=spread(1.0))], None)
    assert only_base.by == "eos_rate"


def test_chance_and_the_base_in_words() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(0, 0.3, (3, 4))  # what the texts do to all of them
    lines = [
        line("close", wer=hard + 0.51 + random.normal(0, 0.02, (3, 4))),
        line("first", wer=hard + 0.5 + random.normal(0, 0.02, (3, 4))),
        line("far", wer=hard + 0.9),
        line("base", True, wer=hard + 0.7),
        line("unmeasured", eos_rate=np.ones((3, 4))),
    ]
    ranking = rank(lines, "wer")
    words = {one.name: verdict for one, verdict in zip(ranking.lines, ranking.verdicts, strict=True)}
    assert words["first"] == "best, better than the base"
    assert words["close"] == "as good within chance, better than the base"
    assert words["far"] == "worse than the base"
    assert words["unmeasured"] == ""
    assert [one.name for one in ranking.lines] == ["first", "close", "far", "unmeasured", "base"]
    assert list(ranking.ranks) == [1, 2, 3, None, None]
    assert differs(lines[2], lines[1], "wer") == 1 and differs(lines[1], lines[2], "wer") == -1
    assert metrics_of(lines) == ["eos_rate", "wer"]


def test_equals_are_ordered_by_step_and_figures_reach_the_report(
    run: Any, noise: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetuning import listening

    def measured(spoken: Any, yardstick: Any) -> list[dict[str, float]]:
        lengths = [abs(float(one.waveform[0])) for one in spoken]
        return [{"speaker_embedding_similarity": 0.5, "wer": length, "mos": float("nan")} for length in lengths]

    monkeypatch.setattr(listening, "measure_each", measured)
    options = options_of(run, rank_by="mos")
    evaluate(run, options)
    data = json.loads((options.output / "report.json").read_text(encoding="utf-8"))
    assert data["rank_by"] == "speaker_embedding_similarity"
    assert any("--rank_by mos was not measured" in note for note in data["notes"])
    steps = [int(re.search(r"step (\d+)", one["verdict"])[1]) for one in data["lines"] if not one["is_base"]]
    assert steps == sorted(steps)
    for one in data["lines"]:
        samples = [
            sample["metrics"]["wer"]
            for sample in data["samples"]
            if (sample["checkpoint"], sample["manner"]) == (one["checkpoint"], one["manner"])
        ]
        assert len(samples) == 4 and "mos" not in one["metrics"]
        assert one["metrics"]["wer"]["mean"] == pytest.approx(np.mean(samples))
        low, high = one["metrics"]["wer"]["interval"]
        assert min(samples) <= low <= np.mean(samples) <= high <= max(samples)
    best = [one for one in data["lines"] if one["metrics"]["wer"]["is_best"]]
    means = {one["name"]: one["metrics"]["wer"]["mean"] for one in data["lines"] if not one["is_base"]}
    assert [one["name"] for one in best] == [min(means, key=means.get)]


# --------------------------------------------------------------------------------------------------- what is compared


def test_defaults_come_from_the_run(trained: Any) -> None:
    plan = make_plan(trained, Options(output=trained.output_dir / "evaluation"))
    rows = open_run_rows(trained)
    assert [text.text for text in plan.texts] == rows.validation.distinct("text")
    assert {text.language for text in plan.texts} == {"English"}
    assert [voice.speaker for voice in plan.voices] == ["Anna_B", "bert"]
    assert all(voice.reference == REFERENCE and voice.transcript == "What is said there." for voice in plan.voices)
    assert list(plan.seeds) == [1, 2, 3] and plan.notes == []
    assert [model.name for model in plan.models if model.is_base] == ["base"]
    assert all(125 < frames < 1000 for frames in plan.max_frames)
    steps = [model.step for model in plan.models if not model.is_base]
    assert steps == sorted(steps)


def test_without_rows_built_in_texts_are_said(run: Any) -> None:
    shutil.rmtree(run.output_dir / "rows")
    plan = make_plan(run, options_of(run, texts=()))
    assert tuple(text.text for text in plan.texts) == BUILT_IN_TEXTS
    assert any("built-in English sentences" in note for note in plan.notes)
    assert any("cloning in context is left out" in note for note in plan.notes)


def test_yardstick_is_made_of_the_run(trained: Any) -> None:
    from finetuning.audio import load_audio
    from finetuning.base_model import load_speaker_encoder, resolve_base
    from finetuning.listening import characters_per_second

    plan = make_plan(trained, Options(output=trained.output_dir))
    paces = characters_per_second(plan.rows.train)
    yardstick = evaluation.build_yardstick(plan, trained, "cpu", paces)
    vector = load_speaker_encoder(resolve_base(trained))(load_audio(REFERENCE))
    assert set(yardstick.vectors) == {"anna_b", "bert"}
    assert np.allclose(yardstick.vectors["bert"], vector)
    assert yardstick.characters_per_second == paces
    assert set(yardstick.characters_per_second) == {"anna_b", "bert"}
    assert yardstick.recognize is None and yardstick.opinion is None
    rows = [evaluation_voices._stored_row(trained, voice.speaker, plan.base, plan.models) for voice in plan.voices]
    no_files = [replace(voice, files=(), stored=row) for voice, row in zip(plan.voices, rows, strict=True)]
    stored = evaluation.build_yardstick(replace(plan, voices=no_files), trained, "cpu", paces).vectors["bert"]
    assert np.allclose(stored, vector, atol=0.02 * np.abs(vector).max())  # as the codec table stores it
    whose = [next(voice for voice in some if voice.speaker == "bert") for some in (plan.voices, no_files)]
    assert len({evaluation.yardstick_digest(plan, voice, trained, paces) for voice in whose}) == 2
    trained_rows = [replace(model, run={"SPEAKER_EMBEDDING_TRAINABLE": True}) for model in plan.models]
    assert evaluation_voices._stored_row(trained, "bert", plan.base, trained_rows) is None


def test_vectors_are_the_mean_of_all_references_as_in_training(trained: Any) -> None:
    from finetuning.base_model import load_encoder_module, resolve_base
    from finetuning.speakers import _mean_vector

    plan = make_plan(trained, options_of(trained))
    files = sorted((VOICE / "clips").glob("*.flac"))
    many = [replace(plan.voices[0], files=files)]
    encode = evaluation.load_speaker_encoder(plan.base)
    found = evaluation._vectors(replace(plan, voices=many), encode)["anna_b"]
    wanted = _mean_vector(load_encoder_module(resolve_base(trained)), files)
    assert len(files) > 20 and np.allclose(found, wanted, atol=1e-6)


def test_rows_and_layout_are_the_runs_whatever_the_settings_say_by_now(run: Any, tmp_path: Path) -> None:
    plan = make_plan(run, options_of(run, texts=()))
    changed = {
        "validation_jsonl": tmp_path / "none.jsonl",
        "train_layout": "streaming",
        "seed": 1,
        "export_type": "base",
    }
    now = run.model_copy(update=changed | {"validation_fraction": 0.5, "max_eval_samples": 1})
    same = make_plan(now, options_of(now, texts=()))
    assert same.texts == plan.texts and len(plan.texts) > 1
    jobs, others = (evaluation.make_jobs(one, of, "cpu") for one, of in ((plan, run), (same, now)))
    assert [job.request for job in jobs] == [job.request for job in others]
    assert {job.request.non_streaming for job in jobs if not job.model.is_base} == {True}
    saved = json.loads((run.output_dir / "settings.json").read_text())
    (run.output_dir / "settings.json").write_text(json.dumps(saved | {"SEED": "many"}))
    with pytest.raises(UserError, match=r"OUTPUT_DIR: .*settings\.json: SEED has no value that can be used"):
        make_plan(run, options_of(run))


def test_base_and_reference_are_the_runs_unless_they_are_set(run: Any) -> None:
    file = run.output_dir / "settings.json"
    saved = json.loads(file.read_text()) | {
        "REF_AUDIO_PATH": "old.wav",
        "REF_TEXT": "Old words.",
        "TOKENIZER_PATH": "x",
    }
    file.write_text(json.dumps(saved))
    nothing_set = load_settings({"output_dir": run.output_dir}, environment={})
    found = evaluation_models.settings_of_run(nothing_set)
    assert (found.init_model_path, found.ref_audio_path, found.ref_text) == (
        "tiny-random",
        Path("old.wav"),
        "Old words.",
    )
    overrides = {"output_dir": run.output_dir, "init_model_path": "moved", "ref_audio_path": REFERENCE}
    found = evaluation_models.settings_of_run(load_settings(overrides, environment={}))
    assert (found.init_model_path, found.ref_audio_path, found.ref_text) == ("moved", REFERENCE, None)
    assert found.tokenizer_path == "x"


def test_speakers_are_the_same_in_any_spelling(trained: Any) -> None:
    models = find_checkpoints(trained.output_dir, ())
    assert evaluation_voices.choose_speakers(models, ["ANNA_B", " anna_b ", "bert", "Bert"]) == ["Anna_B", "bert"]
    plan = make_plan(trained, options_of(trained, speakers=(" BERT", "bert")))
    assert [voice.speaker for voice in plan.voices] == ["bert"]
    found = [evaluation_voices._other_reference(trained, name, plan.rows) for name in ("BERT", "bert ", "carl")]
    assert found[0] == found[1] is not None and found[2] is None


def test_a_reference_that_cannot_be_read_is_a_message(run: Any, tmp_path: Path) -> None:
    broken = tmp_path / "second.wav"
    broken.write_bytes(b"no sound")
    for file in run.output_dir.glob("*/speaker_encoder/speaker_config.json"):
        config = json.loads(file.read_text())
        config["speakers"]["Anna_B"]["references"] = [str(REFERENCE), str(broken)]
        file.write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"reference of Anna_B: .*second\.wav: not a readable audio file.*bring it back"
    ):
        make_plan(run, options_of(run))
    broken.unlink()
    plan = make_plan(run, options_of(run))
    assert plan.voices[0].files == [REFERENCE]
    assert any("1 of the 2 references of Anna_B are gone" in note for note in plan.notes)
    for file in run.output_dir.glob("*/speaker_encoder/speaker_config.json"):
        file.write_text(file.read_text().replace(str(REFERENCE), "gone.wav"))
    [voice] = make_plan(run, options_of(run)).voices
    row = read_json(run.output_dir / "best" / "config.json")["talker_config"]["spk_id"]["anna_b"]
    assert voice.stored[1] == row and voice.reference.is_file()  # training's vector, and a clip to clone


@pytest.fixture(scope="module")
def custom_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A custom_voice base that knows anna."""
    from finetuning.tiny_model import embedded_model_folder

    folder = tmp_path_factory.mktemp("bases") / "custom"
    shutil.copytree(embedded_model_folder("tiny-random"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["tts_model_type"] = "custom_voice"
    config["talker_config"] |= {"spk_id": {"anna": 2900}, "spk_is_dialect": {"anna": False}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_line_to_beat_of_a_custom_voice_base(custom_base: Path, make_settings: Any) -> None:
    """By name where it knows all; else what SPEAKER_ENCODER_PATH names clones, which is said; else there is none."""
    from finetuning.base_model import resolve_base

    def line(speaker: str, **fields: Any) -> tuple[Any, str]:
        settings = make_settings(init_model_path=str(custom_base), **fields)
        notes: list[str] = []
        base = resolve_base(settings)
        return evaluation_models.make_base_model(settings, Options(Path()), base, [speaker], notes), "".join(notes)

    encoder = {"speaker_encoder_path": "tiny-random"}
    for fields in ({}, encoder):
        model, notes = line("Anna", **fields)
        assert (model.folder, model.clones, model.setting, notes) == (custom_base, False, "INIT_MODEL_PATH", "")
    for speaker, fields in (("Bert", encoder), ("Anna", encoder | {"export_type": "base"})):
        model, notes = line(speaker, **fields)
        assert model.clones and model.folder != custom_base and model.setting == "SPEAKER_ENCODER_PATH"
        assert f"the line of the base is tiny-random (SPEAKER_ENCODER_PATH), which clones: {custom_base}" in notes
    model, notes = line("Bert")
    assert model is None and "does not know Bert, and has no speaker encoder" in notes


def test_a_speaker_of_the_base_is_compared_with_the_bases_row(custom_base: Path, make_settings: Any) -> None:
    from finetuning.base_model import resolve_base

    settings = make_settings(init_model_path=str(custom_base), speaker_encoder_path="tiny-random")
    base = resolve_base(settings)
    assert evaluation_voices._stored_row(settings, "Anna", base, []) == (base.folder, 2900)
    assert evaluation_voices._stored_row(settings, "Bert", base, []) is None
    weights = dict(base.stored_weights())
    voice = evaluation_voices.Voice("Anna", files=[REFERENCE], stored=(base.folder, 2900))
    wanted = weights["talker.model.codec_embedding.weight"][2900:2901].float().numpy()[0]
    assert np.array_equal(evaluation._stored_vector(voice), wanted)
    assert isinstance(evaluation._source_of_vector(voice), str)


def test_the_base_speaks_with_the_codec_of_the_run(make_settings: Any, tmp_path: Path, trained: Any) -> None:
    from finetuning.base_model import resolve_base
    from finetuning.tiny_model import embedded_model_folder

    own = embedded_model_folder("tiny-random")
    shutil.copytree(own / "speech_tokenizer", tmp_path / "codec")
    config = json.loads((tmp_path / "codec" / "config.json").read_text())
    (tmp_path / "codec" / "config.json").write_text(json.dumps(config | {"note": "another"}))
    bases = []
    for fields in ({}, {"tokenizer_path": str(tmp_path / "codec")}):
        settings = make_settings(**fields)
        bases.append(evaluation_models.make_base_model(settings, Options(Path()), resolve_base(settings), ["Anna"], []))
    plain, other = bases
    assert plain.codec_folder is None and plain.fingerprint == fingerprint(own)
    assert other.codec_folder == tmp_path / "codec" and other.fingerprint != plain.fingerprint
    evaluation._check_is_the_same(other)
    stock = evaluation._load(other, settings, "cpu")
    assert stock.model.speech_tokenizer.config.note == "another"


def test_texts_from_files_and_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\ufeffOne  line.\n\nAnother.\n", encoding="utf-8")
    texts = evaluation_plan.read_texts([str(tmp_path / "lines.txt"), "Another.", "  A third. "])
    assert [text.text for text in texts] == ["One line.", "Another.", "A third."]


def test_references_of_several_speakers(trained: Any) -> None:
    reference = str(REFERENCE)
    given = evaluation_voices.given_references([f"BERT={reference}", f"Anna_B={reference}"], ["Anna_B", "bert"])
    assert given == {"bert": REFERENCE, "Anna_B": REFERENCE}
    for items, message in (
        ([reference], "whose voice is"),
        ([f"carl={reference}"], "carl is none of the speakers Anna_B, bert"),
        (["bert=gone.wav"], "gone.wav does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation_voices.given_references(items, ["Anna_B", "bert"])


BAD_INPUT = {
    "unknown checkpoint": (
        {"checkpoints": ("checkpoint-7",)},
        r"--checkpoints: there is no checkpoint-7 .*checkpoint-2",
    ),
    "no checkpoint": ({"checkpoints": (str(VOICE),)}, r"--checkpoints: .* holds no model"),
    "empty texts": ({"texts": (" ", "\n")}, r"--texts: no text to say"),
    "missing file": ({"texts": ("lines.txt",)}, r"--texts: lines\.txt does not exist"),
    "not text": ({"texts": (str(REFERENCE),)}, r"--texts: .*english_voice\.wav cannot be read"),
    "special token": ({"texts": ("Stop <|im_end|> here.",)}, r"special token <\|im_end\|>"),
    "long text": (
        {"texts": ("word and " * 9000,)},
        r"tokens, more than the model says at a time.*8,192 frames \(655 s\)",
    ),
    "too many frames": ({"max_new_tokens": 40_000}, r"positions with its reference, but the model has 32,768"),
    "unknown speaker": ({"speakers": ("carl",)}, r"--speakers: the run has no speaker carl; it has: Anna_B, bert"),
    "unknown language": ({"language": "Klingon"}, r"--language: .* has no Klingon; it has Auto, chinese"),
    "missing reference": ({"references": ("gone.wav",)}, r"--reference: gone\.wav does not exist"),
    "no sound": ({"references": (str(VOICE / "train_raw.jsonl"),)}, r"--reference: .*not a readable audio file"),
    "two speakers, one text": ({"speakers": (), "reference_text": "Hi."}, r"--reference_text is for one speaker"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_generated(
    name: str, trained: Any, noise: list, tmp_path: Path
) -> None:
    fields, message = BAD_INPUT[name]
    with pytest.raises(UserError, match=message):
        evaluate(trained, options_of(trained, output=tmp_path / "evaluation", **fields))
    assert noise == [] and not (tmp_path / "evaluation").exists()


def test_a_judge_that_is_none_is_refused_before_anything_is_generated(
    trained: Any, noise: list, tmp_path: Path
) -> None:
    settings = trained.model_copy(update={"asr_model": str(VOICE)})
    with pytest.raises(UserError, match=r"ASR_MODEL: .* holds no model"):
        evaluate(settings, options_of(settings, output=tmp_path / "evaluation"))
    assert noise == []


def test_a_folder_without_checkpoints_and_a_damaged_one(run: Any, noise: list) -> None:
    weights = run.output_dir / "best" / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"best.* is damaged: model\.safetensors has"):
        evaluate(run, options_of(run, checkpoints=("best",), with_base=False))
    empty = run.model_copy(update={"output_dir": run.output_dir / "nothing"})
    with pytest.raises(UserError, match=r"nothing holds no checkpoints"):
        evaluate(empty, options_of(empty))


def test_cloning_needs_a_reference(run: Any, noise: list, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in run.output_dir.glob("*/speaker_encoder/speaker_config.json"):
        config = json.loads(file.read_text())
        for entry in config["speakers"].values():
            entry["references"] = ["gone.wav"]
        file.write_text(json.dumps(config))
    monkeypatch.setattr(evaluation_plan, "open_run_rows", lambda _: None)
    monkeypatch.setattr(evaluation, "check_is_whole", lambda *_: None)
    with pytest.raises(UserError, match=r"--reference: the base clones a reference.*Anna_B.*--no_base"):
        evaluate(run, options_of(run))
    evaluate(run, options_of(run, with_base=False, checkpoints=("best",)))
    assert len(noise) == 4


def test_a_base_out_of_reach(run: Any, noise: list) -> None:
    moved = run.model_copy(update={"init_model_path": "no/such/base"})
    with pytest.raises(UserError, match=r"INIT_MODEL_PATH: no/such/base is not a folder"):
        evaluate(moved, options_of(moved))
    options = options_of(moved, with_base=False, checkpoints=("best",))
    evaluate(moved, options)
    notes = json.loads((options.output / "report.json").read_text())["notes"]
    assert any("voice similarity is not measured" in note for note in notes)
    assert any("the run was trained from tiny-random" in note for note in notes)


def test_one_bad_checkpoint_does_not_end_the_evaluation(run: Any, noise: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without its codec is left out as it is read, one that does not fit into memory as it is loaded."""
    shutil.rmtree(run.output_dir / "best" / "speech_tokenizer")
    shutil.rmtree(run.output_dir / "last" / "speech_tokenizer")

    def load(model: Any, *_: Any) -> None:
        if model.name != "checkpoint-4":
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(evaluation, "_load", load)
    options = options_of(run)
    evaluate(run, options)
    data = json.loads((options.output / "report.json").read_text())
    assert [line["name"] for line in data["lines"]] == ["checkpoint-4"]
    notes = "\n".join(data["notes"])
    assert "best is left out: no speech tokenizer in" in notes
    assert "checkpoint-2 is left out: DEVICE: the memory does not suffice for checkpoint-2" in notes
    assert "base is left out" in notes
    with pytest.raises(UserError, match="does not suffice for checkpoint-2"):
        evaluate(run, options_of(run, checkpoints=("checkpoint-2",), with_base=False))
    with pytest.raises(UserError, match="no speech tokenizer"):
        find_checkpoints(run.output_dir, ("best", "checkpoint-4"))


def test_what_cannot_be_loaded_says_why(run: Any) -> None:
    [model] = find_checkpoints(run.output_dir, ("checkpoint-2",))
    weights = run.output_dir / "checkpoint-2" / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()  # a hard link of other checkpoints
    with pytest.raises(
        UserError, match=r"--checkpoints: checkpoint-2 cannot be loaded \(OSError: .*model\.safetensors"
    ):
        evaluation._load(model, run, "cpu")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"checkpoint-2 has weights that are not finite: its training has diverged"):
        evaluation._load(model, run, "cpu")


def test_messages_name_what_gave_the_text(trained: Any, tmp_path: Path) -> None:
    for text, message in (("a <|im_end|> b", "special token"), ("word and " * 9000, "tokens, more than")):
        (tmp_path / "texts.txt").write_text(text)
        settings = trained.model_copy(update={"eval_texts": str(tmp_path / "texts.txt")})
        with pytest.raises(UserError, match=f'^EVAL_TEXTS: "{re.escape(text[:9])}.*{message}'):
            make_plan(settings, options_of(settings, texts=()))
    assert make_plan(trained, options_of(trained)).notes == []


def test_one_text_is_said_to_be_few(run: Any, noise: list) -> None:
    options = options_of(run, checkpoints=("best",), with_base=False, texts=TEXTS[:1])
    evaluate(run, options)
    assert any("one text only" in note for note in json.loads((options.output / "report.json").read_text())["notes"])


def test_much_speech_leaves_sounds_out(run: Any, noise: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.evaluation_report.MAX_EMBEDDED_SECONDS", 0.5)
    options = options_of(run, checkpoints=("best",), with_base=False)
    html = evaluate(run, options).read_text(encoding="utf-8")
    assert html.count("<audio") == 1 + 2  # the reference, and the first of two seeds of each text
    assert html.count("<code>samples/best/") == 2
    assert "would make the page too large" in html


def test_a_checkpoint_that_is_replaced_meanwhile_and_one_that_has_diverged(
    run: Any, noise: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(run, checkpoints=("checkpoint-2",), with_base=False)
    folder = run.output_dir / "checkpoint-2"

    def replacing(*_: Any) -> None:
        shutil.rmtree(folder)
        shutil.copytree(run.output_dir / "checkpoint-4", folder)

    monkeypatch.setattr(evaluation, "_load", replacing)
    with pytest.raises(UserError, match=r"checkpoint-2 has been replaced meanwhile"):
        evaluate(run, options)
    assert noise == []
    monkeypatch.setattr(evaluation, "_load", lambda *_: None)

    def diverged(*_: Any) -> None:
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    monkeypatch.setattr(evaluation, "_speak", diverged)
    with pytest.raises(UserError, match=r"checkpoint-2 gives probabilities that are not finite"):
        evaluate(run, options)
