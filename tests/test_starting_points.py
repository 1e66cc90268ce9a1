"""Where a run may start and what it may leave: base and custom_voice checkpoints, with an encoder from elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import VOICE
from reference import captured_prompt, load_stock
from safetensors.torch import load_file, save_file
from training import FULL, build, make_trainer, train

from finetuning.base_model import load_speaker_encoder, resolve_base
from finetuning.checkpoint import CODEC_TABLE
from finetuning.disk import damage
from finetuning.errors import UserError
from finetuning.settings import load_settings
from finetuning.speakers import speaker_vector
from finetuning.tiny_model import embedded_model_folder

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = FULL | {"num_epochs": 1, "learning_rate": 1e-3, "warmup_steps": 0, "validation_fraction": 0.0, "batch_size": 2}
ENCODER = "speaker_encoder."


@pytest.fixture
def settings_for(make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict], tmp_path: Path) -> Callable:
    def make(name: str = "run", rows: list[dict] | None = None, **fields: Any) -> Any:
        jsonl = write_jsonl(demo_rows[:4] if rows is None else rows, f"{name}.jsonl")
        return make_settings(**(SHORT | {"train_jsonl": jsonl, "output_dir": tmp_path / name} | fields))

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def trained_once(folder: Path, rows: list[dict], **fields: Any) -> SimpleNamespace:
    jsonl = folder / "train.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = {"device": "cpu", "init_model_path": "tiny-random", "use_wandb": False, "mixed_precision": "no"}
    own |= {"train_jsonl": jsonl, "output_dir": folder / "output"}
    run, _ = train(load_settings(SHORT | own | fields, environment={}))
    return SimpleNamespace(run=run, last=folder / "output" / "last")


@pytest.fixture(scope="module")
def custom_voice(tmp_path_factory: pytest.TempPathFactory, demo_rows: list[dict]) -> SimpleNamespace:
    """A checkpoint that knows Anna, and Hausa."""
    rows = [row | {"speaker": "Anna", "language": "Hausa"} for row in demo_rows[:2]]
    return trained_once(tmp_path_factory.mktemp("custom"), rows, new_languages="hausa")


@pytest.fixture(scope="module")
def base_export(tmp_path_factory: pytest.TempPathFactory, demo_rows: list[dict]) -> SimpleNamespace:
    rows = [row | {"ref_text": "He reads."} for row in demo_rows[:4]]
    return trained_once(tmp_path_factory.mktemp("base"), rows, export_type="base", icl_fraction=1.0)


# ----------------------------------------------------------------------------------------------------- what is left


def test_a_base_export_keeps_the_encoder_and_names_nobody(base_export: Any) -> None:
    before, after = weights(embedded_model_folder("tiny-random")), weights(base_export.last)
    encoder = [name for name in before if name.startswith(ENCODER)]
    assert encoder and all(torch.equal(after[name], before[name]) for name in encoder)
    assert torch.equal(after[CODEC_TABLE][2200:], before[CODEC_TABLE][2200:])  # no row was written
    assert not torch.equal(after[CODEC_TABLE][:2048], before[CODEC_TABLE][:2048])
    config, base = config_of(base_export.last), config_of(embedded_model_folder("tiny-random"))
    assert (config["tts_model_type"], config["tts_model_size"]) == ("base", "1b7")
    assert config["speaker_encoder_config"] == base["speaker_encoder_config"]
    assert config["talker_config"]["spk_id"] == base["talker_config"]["spk_id"]
    assert "generate_voice_clone" in (base_export.last / "README.md").read_text(encoding="utf-8")
    assert not damage(base_export.last)
    speakers = json.loads((base_export.last / "speaker_encoder" / "speaker_config.json").read_text())["speakers"]
    assert "codec_id" not in speakers["reference_speaker"] and speakers["reference_speaker"]["references"]


def test_stock_clones_with_a_base_export(base_export: Any) -> None:
    stock = load_stock(base_export.last)
    clip = str(VOICE / "clips" / "train_05.flac")
    waveforms, rate = stock.generate_voice_clone("Hello.", ref_audio=clip, ref_text="Hm.", max_new_tokens=3)
    assert rate == 24_000 and len(waveforms[0]) > 0
    assert torch.equal(
        stock.create_voice_clone_prompt(clip, "Hm.")[0].ref_spk_embedding, speaker_vector(stock.model, clip)
    )


def test_rows_are_trained_as_stock_clones(base_export: Any) -> None:
    """The prompt of a row of the run against generate_voice_clone with its reference."""
    run, stock = base_export.run, load_stock(embedded_model_folder("tiny-random"))
    row = run.train.rows(1)[0]
    with captured_prompt(stock) as want:
        stock.generate_voice_clone(
            row["text"], language=row["language"], ref_audio=row["ref_audio"], ref_text="He reads.",
            non_streaming_mode=True,
        )  # fmt: skip
    aligned = run.train.encoder.encode(row)
    assert want["inputs_embeds"].shape[1] == len(aligned.text) - len(row["codes"])
    item = stock.create_voice_clone_prompt(row["ref_audio"], "He reads.")[0]
    assert torch.equal(torch.tensor(aligned.codes[: aligned.num_reference_frames]), item.ref_code)
    assert torch.equal(torch.tensor(row["reference"].vector), item.ref_spk_embedding)


# -------------------------------------------------------------------------------------------------- where it starts


def test_a_new_speaker_joins_those_of_a_checkpoint(custom_voice: Any, settings_for: Callable, demo_rows: list) -> None:
    """Anna goes on with her row, Bert gets one, by the encoder of the Base model; Hausa is a language of the base."""
    rows = [
        row | {"speaker": name, "language": "hausa"} for row, name in zip(demo_rows, ("ANNA", "Bert"), strict=False)
    ]
    settings = settings_for(
        rows=rows, init_model_path=str(custom_voice.last), speaker_encoder_path="tiny-random", learning_rate=1e-4
    )
    train(settings)
    before, after = weights(custom_voice.last), weights(settings.output_dir / "last")
    config = config_of(settings.output_dir / "last")["talker_config"]
    assert config["spk_id"] == {"anna": 3000, "bert": 3001} and config["spk_is_dialect"] == {
        "anna": False,
        "bert": False,
    }
    assert config["codec_language_id"]["hausa"] == 2200
    assert torch.equal(after[CODEC_TABLE][3000], before[CODEC_TABLE][3000])
    stock = load_stock(embedded_model_folder("tiny-random"))
    want = speaker_vector(stock.model, demo_rows[1]["ref_audio"])
    torch.testing.assert_close(after[CODEC_TABLE][3001].float(), want, rtol=1e-5, atol=1e-6)
    assert not any(name.startswith(ENCODER) for name in after)
    # Without the language or the encoder it says what is missing.
    with pytest.raises(UserError, match=r"NEW_LANGUAGES: the base knows hausa already"):
        build(settings_for("again", rows=rows, init_model_path=str(custom_voice.last), new_languages="hausa"))
    with pytest.raises(
        UserError, match=r'"Bert" cannot get a vector; name the Base model.* SPEAKER_ENCODER_PATH.* anna'
    ):
        build(settings_for("alone", rows=rows, init_model_path=str(custom_voice.last)))


def test_a_custom_voice_becomes_a_base(custom_voice: Any, settings_for: Callable) -> None:
    path = str(custom_voice.last)
    settings = settings_for(init_model_path=path, speaker_encoder_path="tiny-random", export_type="base")
    train(settings)
    after, encoder = weights(settings.output_dir / "last"), weights(embedded_model_folder("tiny-random"))
    assert all(torch.equal(after[name], encoder[name]) for name in encoder if name.startswith(ENCODER))
    stock = load_stock(settings.output_dir / "last")
    clip = str(VOICE / "clips" / "train_05.flac")
    assert stock.generate_voice_clone("Hello.", ref_audio=clip, x_vector_only_mode=True, max_new_tokens=3)[1] == 24_000
    with pytest.raises(UserError, match=r"EXPORT_TYPE: base needs a speaker encoder.* SPEAKER_ENCODER_PATH"):
        build(settings_for("other", init_model_path=path, export_type="base"))


def test_training_goes_on_from_a_base_export(base_export: Any, settings_for: Callable) -> None:
    settings = settings_for(init_model_path=str(base_export.last), speaker_name="Anna")
    run, _ = train(settings)
    assert run.speakers.codec_rows == [3000]
    assert config_of(settings.output_dir / "last")["tts_model_type"] == "custom_voice"


def test_an_encoder_that_does_not_fit_is_refused(
    custom_voice: Any, settings_for: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = {"init_model_path": str(custom_voice.last)}
    with pytest.raises(UserError, match=r"SPEAKER_ENCODER_PATH: .* has no speaker encoder; name a Base model"):
        resolve_base(settings_for(**start, speaker_encoder_path=str(custom_voice.last)))
    with pytest.raises(UserError, match=r"SPEAKER_ENCODER_PATH: ./no-such-folder/x is not a folder"):
        resolve_base(settings_for(**start, speaker_encoder_path="./no-such-folder/x"))
    other = tmp_path / "other"
    shutil.copytree(embedded_model_folder("tiny-random"), other)
    config = config_of(other)
    config["speaker_encoder_config"]["enc_dim"] = 32
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"the vectors of .* have 32 numbers, .* needs 64"):
        resolve_base(settings_for(**start, speaker_encoder_path=str(other)))
    save_file({"talker.model.codec_embedding.weight": torch.zeros(1)}, other / "model.safetensors")
    resolve_base(settings_for(speaker_encoder_path="tiny-random"))
    assert "SPEAKER_ENCODER_PATH is not read: tiny-random has a speaker encoder itself" in capsys.readouterr().out


def test_the_encoder_alone_hears_what_the_model_hears(custom_voice: Any, settings_for: Callable) -> None:
    from finetuning.audio import load_audio

    base = resolve_base(settings_for(init_model_path=str(custom_voice.last), speaker_encoder_path="tiny-random"))
    clip = VOICE / "clips" / "train_05.flac"
    want = speaker_vector(load_stock(embedded_model_folder("tiny-random")).model, clip)
    got = torch.tensor(load_speaker_encoder(base)(load_audio(clip)))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- speakers' vectors


def test_vectors_that_train_are_exported_as_they_are(settings_for: Callable, demo_rows: list) -> None:
    """The row of the table is what the next forward would insert, for each speaker; it began as the encoder's."""
    rows = [row | {"speaker": name} for row, name in zip(demo_rows, ("Anna", "Bert") * 2, strict=False)]
    settings = settings_for(rows=rows, speaker_embedding_trainable=True, num_epochs=3)
    run = build(settings)
    began = run.objective.speaker_vectors.detach().clone()
    assert torch.equal(began, run.speakers.vectors)
    make_trainer(run).run()
    now = run.objective.speaker_vectors.detach()
    table = weights(settings.output_dir / "last")[CODEC_TABLE]
    assert torch.equal(table[[3000, 3001]], now.to(table.dtype))
    assert not torch.equal(now[0], began[0]) and not torch.equal(now[1], began[1])
    assert not torch.equal(now[0], now[1])


@pytest.mark.parametrize("which", ["mean", "first", "longest"])
def test_speaker_embedding_takes_which_references(settings_for: Callable, demo_rows: list, which: str) -> None:
    clips = [str(VOICE / "clips" / f"train_{number:02d}.flac") for number in (5, 16, 9)]  # 1.1 s, 4.7 s, 1.5 s
    rows = [row | {"ref_audio": clip} for row, clip in zip(demo_rows, clips, strict=False)]
    run = build(settings_for(rows=rows, speaker_embedding=which))
    vectors = [speaker_vector(run.model, clip) for clip in clips]
    want = {"mean": torch.stack(vectors).mean(0), "first": vectors[0], "longest": vectors[1]}[which]
    assert torch.equal(run.speakers.vectors[0], want.to(run.base.weight_dtypes()[CODEC_TABLE]).float())
    assert len(run.speakers.references[0]) == (3 if which == "mean" else 1)


def test_more_speakers_than_rows(settings_for: Callable, demo_rows: list) -> None:
    rows = [demo_rows[0] | {"speaker": f"speaker {number}"} for number in range(73)]
    rows = [row | {"audio_codes": row["audio_codes"][number % 5 :]} for number, row in enumerate(rows)]
    with pytest.raises(UserError, match=r"73 speakers, but the codec table has only 72 free rows.* EXPORT_TYPE=base"):
        build(settings_for(rows=rows))
    run = build(settings_for("cloning", rows=rows, export_type="base"))
    assert len(run.speakers.names) == 73 and set(run.speakers.codec_rows) == {None}
