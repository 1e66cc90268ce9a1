"""Exports: exact vectors, the base's dtypes, untouched presets, atomic folders, disk and folder checks."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import captured_prompt, load_stock
from safetensors.torch import load_file
from training import FULL, build, make_trainer

from finetuning import checkpoint
from finetuning.checkpoint import LOCK_FILE, check_holds_no_run, reclaimable_bytes, run_entries
from finetuning.disk import damage
from finetuning.errors import UserError
from finetuning.tiny_model import embedded_model_folder

TABLE = "talker.model.codec_embedding.weight"
PRESETS = {"vivian": 3065, "eric": 2875, "dylan": 2878}


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Any]:
    def make(**fields: Any) -> Any:
        rows = write_jsonl(demo_rows[:4])
        defaults = {"train_jsonl": rows, "batch_size": 4, "num_epochs": 1, "validation_fraction": 0.0}
        return make_settings(**(FULL | defaults | {"learning_rate": 1e-3, "speaker_name": "Anna"} | fields))

    return make


@pytest.fixture(scope="session")
def bf16_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base saved in bf16, with presets and a dialect as the CustomVoice release has them."""
    folder = tmp_path_factory.mktemp("bf16") / "base"
    shutil.copytree(embedded_model_folder("tiny-random", "bfloat16"), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["tts_model_size"] = ""
    config["talker_config"]["codec_language_id"]["beijing_dialect"] = 2074
    config["talker_config"]["spk_id"] = PRESETS
    config["talker_config"]["spk_is_dialect"] = {"vivian": False, "dylan": "beijing_dialect"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def bf16_run(
    bf16_base: Path, demo_rows: list[dict], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, torch.Tensor]:
    """One full-training step from the bf16 base; the run, its last/, and the vector that the forward pass inserted."""
    from finetuning.settings import load_settings

    folder = tmp_path_factory.mktemp("run")
    jsonl = folder / "train.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in demo_rows[:4]), encoding="utf-8")
    fields = {
        "device": "cpu", "mixed_precision": "bf16", "init_model_path": str(bf16_base), "train_jsonl": jsonl,
        "output_dir": folder / "output", "use_wandb": False, "learning_rate": 1e-3, "num_epochs": 2,
        "batch_size": 4, "speaker_name": "Anna", "validation_fraction": 0.0, "warmup_steps": 0,
    }  # fmt: skip
    run = build(load_settings(fields | FULL, environment={}))
    batch = run.train.dataset.batch([0])
    embeddings = run.objective.input_embeddings(batch)
    without = run.objective.speaker_vectors.clone()
    run.objective.speaker_vectors.zero_()
    inserted = (embeddings - run.objective.input_embeddings(batch))[batch["speaker_places"][0]]
    run.objective.speaker_vectors.copy_(without)
    make_trainer(run).run()
    return run, folder / "output" / "last", inserted.detach()


def test_row_3000_is_the_vector_of_the_forward_pass_bit_for_bit(bf16_run: tuple) -> None:
    run, last, inserted = bf16_run
    row = load_file(last / "model.safetensors")[TABLE][3000]
    assert row.dtype == torch.bfloat16
    assert torch.equal(row.float(), run.objective.speaker_vectors[0])
    torch.testing.assert_close(inserted, run.objective.speaker_vectors[0], atol=1e-5, rtol=1e-5)
    stock = load_stock(last)
    with captured_prompt(stock) as seen:
        stock.generate_custom_voice("Hello.", "ANNA", language="English")
    position = 3 + 4  # role, then think, think_bos, language, think_eos
    pad = stock.model.talker.text_projection(
        stock.model.talker.model.text_embedding(torch.tensor(stock.model.config.tts_pad_token_id))
    )
    torch.testing.assert_close(seen["inputs_embeds"][0, position], pad + row.float(), atol=1e-6, rtol=0)


def test_unrounded_vectors_would_differ(bf16_run: tuple) -> None:
    """The encoder's own figures are not representable in bf16, so the rounding before training matters."""
    from finetuning.speakers import speaker_vector

    run, _, _ = bf16_run
    exact = speaker_vector(run.model, run.speakers.references[0][0])
    assert not torch.equal(exact, run.speakers.vectors[0])
    torch.testing.assert_close(exact, run.speakers.vectors[0], rtol=4e-3, atol=0)


def test_presets_and_dtypes_stay(bf16_run: tuple, bf16_base: Path) -> None:
    _, last, _ = bf16_run
    before, after = load_file(bf16_base / "model.safetensors"), load_file(last / "model.safetensors")
    rows = list(PRESETS.values())
    assert torch.equal(after[TABLE][rows], before[TABLE][rows])
    assert not torch.equal(after[TABLE][:2048], before[TABLE][:2048])
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in before.items() if not name.startswith("speaker_encoder.")
    }


def test_config_of_the_export(bf16_run: tuple, bf16_base: Path) -> None:
    _, last, _ = bf16_run
    base, config = (json.loads((folder / "config.json").read_text()) for folder in (bf16_base, last))
    assert config["tts_model_type"] == "custom_voice"
    assert config["tts_model_size"] in ("1b7", "0b6")  # the base left it empty
    assert config["transformers_version"] == "4.57.2"
    assert config["talker_config"]["spk_id"] == {**PRESETS, "anna": 3000}
    assert config["talker_config"]["spk_is_dialect"] == {
        "vivian": False, "eric": False, "dylan": "beijing_dialect", "anna": False,
    }  # fmt: skip
    changed = {"tts_model_type", "tts_model_size", "transformers_version", "talker_config"}
    assert {key: value for key, value in config.items() if key not in changed} == {
        key: value for key, value in base.items() if key not in changed
    }


@pytest.mark.parametrize("speaker", ["vivian", "Eric", "DYLAN", "anna"])
def test_every_speaker_of_the_export_can_be_asked_for(bf16_run: tuple, speaker: str) -> None:
    _, last, _ = bf16_run
    stock = load_stock(last)
    with captured_prompt(stock) as seen:
        stock.generate_custom_voice("Hello.", speaker)
    assert seen["inputs_embeds"].shape[0] == 1


def test_training_goes_on_from_an_export(
    bf16_run: tuple, make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]
) -> None:
    """A custom_voice base has no speaker encoder: its own speaker keeps row and vector."""
    _, last, _ = bf16_run
    settings = make_settings(
        **FULL, init_model_path=str(last), train_jsonl=write_jsonl(demo_rows[:4]), speaker_name="anna", batch_size=4,
        num_epochs=1, learning_rate=1e-3, warmup_steps=0,
    )  # fmt: skip
    run = build(settings)
    assert run.speakers.codec_rows == [3000]
    make_trainer(run).run()
    before, after = (load_file(folder / "model.safetensors") for folder in (last, settings.output_dir / "last"))
    assert torch.equal(after[TABLE][3000], before[TABLE][3000])
    assert not torch.equal(after["talker.codec_head.weight"], before["talker.codec_head.weight"])


def test_several_speakers_and_references_in_one_run(
    settings_for: Callable, write_jsonl: Callable, demo_rows: list
) -> None:
    """Each speaker's row holds its own vector, also when its rows mix references."""
    clip = demo_rows[9]["audio"]
    rows = [
        demo_rows[0] | {"speaker": "Ben"},
        demo_rows[1],  # SPEAKER_NAME
        demo_rows[2] | {"speaker": "Ben", "ref_audio": clip},
        demo_rows[3],
    ]
    settings = settings_for(train_jsonl=write_jsonl(rows, "speakers.jsonl"))
    run = build(settings)
    make_trainer(run).run()
    config = json.loads((settings.output_dir / "last" / "config.json").read_text())
    assert config["talker_config"]["spk_id"] == {"ben": 3000, "anna": 3001}
    table = load_file(settings.output_dir / "last" / "model.safetensors")[TABLE]
    stock = load_stock(embedded_model_folder("tiny-random"))

    def encoded(path: str) -> torch.Tensor:
        from finetuning.audio import load_audio

        return stock.model.extract_speaker_embedding(load_audio(path), 24_000)

    first, second = encoded(demo_rows[0]["ref_audio"]), encoded(clip)
    torch.testing.assert_close(table[3000], (first + second) / 2)
    assert torch.equal(table[3001], first)


# ------------------------------------------------------------------------------------------------------ the folder


def test_a_save_that_fails_leaves_the_old_checkpoint(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(settings_for())
    run.exporter.save(["last"], {"step": 1})
    before = {path: path.read_bytes() for path in run.settings.output_dir.rglob("*") if path.is_file()}

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        run.exporter.save(["last", "best"], {"step": 2})
    assert {path: path.read_bytes() for path in run.settings.output_dir.rglob("*") if path.is_file()} == before


def test_a_name_that_fails_leaves_the_names_before_and_after_it_whole(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(settings_for())
    output = run.settings.output_dir
    run.exporter.save(["last", "best"], {"step": 1})
    link_or_copy = checkpoint.link_or_copy

    def full_disk(source: str, target: str) -> str:
        if ".best.tmp" in str(target) and str(target).endswith("config.json"):
            raise OSError(28, "No space left on device")
        return link_or_copy(source, target)

    monkeypatch.setattr(checkpoint, "link_or_copy", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        run.exporter.save(["last", "best", "checkpoint-2"], {"step": 2})
    assert [json.loads((output / name / "training_state.json").read_text())["step"] for name in ("last", "best")] == [
        2,
        1,
    ]
    assert damage(output / "last") == damage(output / "best") == []
    assert sorted(entry.name for entry in output.iterdir() if entry.is_dir()) == ["best", "last", "rows"]


def test_several_names_share_their_large_files(settings_for: Callable) -> None:
    run = build(settings_for())
    run.exporter.save(["last", "best", "checkpoint-7"], {"step": 7})
    files = [run.settings.output_dir / name / "model.safetensors" for name in ("last", "best", "checkpoint-7")]
    assert len({os.stat(file).st_ino for file in files}) == 1
    assert [damage(file.parent) for file in files] == [[], [], []]
    small = [run.settings.output_dir / name / "config.json" for name in ("last", "best")]
    assert len({os.stat(file).st_ino for file in small}) == 2  # people edit these
    run.exporter.save(["last"], {"step": 8})
    assert json.loads((run.settings.output_dir / "best" / "training_state.json").read_text())["step"] == 7


def test_disk_space_is_checked_before_training(settings_for: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    import train

    settings = settings_for()
    with pytest.raises(UserError, match=r"OUTPUT_DIR: .* one checkpoint and one state need 0\.1 GB"):
        train.train(settings)
    assert not settings.output_dir.exists()


def test_required_bytes_is_the_size_of_the_weights(settings_for: Callable) -> None:
    run = build(settings_for())
    run.exporter.save(["last"], {"step": 1})
    size = (run.settings.output_dir / "last" / "model.safetensors").stat().st_size
    assert run.exporter.required_bytes() == pytest.approx(size, rel=0.01)


def test_another_run_is_refused_and_replaced_on_request(settings_for: Callable) -> None:
    settings = settings_for()
    output = settings.output_dir
    (output / "checkpoint-9").mkdir(parents=True)
    (output / "training_log.jsonl").write_text("{}\n")
    (output / "my_notes.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"already holds a run \(checkpoint-9, training_log\.jsonl\).*OVERWRITE_OUTPUT"):
        check_holds_no_run(settings)
    with pytest.raises(UserError, match="already holds a run"):
        build(settings)
    assert (output / "training_log.jsonl").exists()
    build(settings_for(overwrite_output=True))
    assert [entry.name for entry in run_entries(output)] == ["settings.json"]
    assert (output / "my_notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("spelling", ["{parent}/base", "{parent}", "{parent}/base/../other/..", "~/base", "~"])
def test_an_output_that_holds_the_base_is_refused(
    settings_for: Callable, spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is spelt: OVERWRITE_OUTPUT would delete what the run starts from."""
    home = tmp_path / "home"
    (home / "other").mkdir(parents=True)
    shutil.copytree(embedded_model_folder("tiny-random"), home / "base")
    monkeypatch.setenv("HOME", str(home))
    output = spelling.format(parent=home)
    settings = settings_for(init_model_path="~/base", output_dir=output, overwrite_output=True)
    with pytest.raises(UserError, match=r"OUTPUT_DIR: .* holds what INIT_MODEL_PATH names"):
        build(settings)
    assert (home / "base" / "model.safetensors").is_file()


def test_reclaimable_counts_each_file_once_and_only_if_all_links_go(settings_for: Callable, tmp_path: Path) -> None:
    run = build(settings_for())
    run.exporter.save(["last", "best", "checkpoint-7"], {"step": 7})
    output = run.settings.output_dir
    weights = (output / "last" / "model.safetensors").stat().st_size
    codec = (output / "last" / "speech_tokenizer" / "model.safetensors").stat().st_size  # linked to the base's
    free_before = reclaimable_bytes(output)
    assert weights < free_before < weights + codec
    os.link(output / "last" / "model.safetensors", tmp_path / "kept.safetensors")
    assert reclaimable_bytes(output) == free_before - weights


def test_leftovers_of_a_cut_off_save_are_removed(settings_for: Callable) -> None:
    settings = settings_for()
    (settings.output_dir / ".last.tmp").mkdir(parents=True)
    build(settings)
    assert [entry.name for entry in settings.output_dir.glob(".*")] == [LOCK_FILE]
