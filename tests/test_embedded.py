"""The recipe of the embedded model (embedded/): its plumbing, on a stand-in for espeak-ng and a few steps."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import PROJECT
from torch.nn import functional as F

from embedded import codec as codec_stage
from embedded import (
    codec_losses,
    demo,
    encoder,
    espeak,
    measures,
    pack,
    picture,
    plan,
    recognise,
    report,
    ship,
    speech,
    stage,
    talker,
)
from embedded.clips import ClipBank, read_clip, read_rows, twin_of
from embedded.codec_model import NUM_CODES, NUM_LEVELS, SAMPLES_PER_FRAME, TrainableCodec
from embedded.texts import sentences
from finetuning import closeness
from finetuning.errors import UserError

#: A room imports only from rooms before it, and finetuning/ from none of them.
ORDER = (
    "texts", "plan", "stage", "clips", "measures", "recognise", "espeak", "speech", "codec_model", "codec_losses",
    "codec", "base_config", "encoder", "pack", "talker", "demo", "report", "make", "ship", "picture",
)  # fmt: skip

#: Speaks a tone at the pitch of the voice's file, as long as the text; as espeak-ng to a pipe, without true lengths.
FAKE_ESPEAK = f"""#!{sys.executable} -S
import array, math, os, re, sys
data = os.path.join(os.path.dirname(sys.argv[0]), "data")
if sys.argv[1] == "--version":
    sys.exit(print("eSpeak NG text-to-speech: 1.51  Data at: " + data))
voice, text = sys.argv[3].split("+")[1], sys.argv[-1]
with open(os.path.join(sys.argv[1][len("--path="):], "espeak-ng-data/voices/!v", voice)) as file:
    pitch = int(re.search("^pitch ([0-9]+)", file.read(), re.M)[1]) - 9
with open(os.environ["FAKE_ESPEAK_LOG"], "a") as log:
    log.write(voice + ": " + text + "\\n")
if text == os.environ.get("FAKE_ESPEAK_FAILS"):
    sys.exit("no such voice")
wave = [0.3 * sum(math.sin(2 * math.pi * pitch * k * t / 22050) / k for k in (1, 2, 3)) for t in range(600 * len(text))]
samples = array.array("h", (int(8000 * value) for value in wave)).tobytes()
rate = (22050).to_bytes(4, "little")
header = b"RIFF\\xff\\xff\\xff\\x7fWAVEfmt " + (16).to_bytes(4, "little") + b"\\1\\0\\1\\0" + rate
sys.stdout.buffer.write(header + (44100).to_bytes(4, "little") + b"\\2\\0\\x10\\0data\\0\\xf0\\xff\\x7f" + samples)
"""
FAKE_VARIANT = (
    "language variant\nname someone\n\npitch 80 120\nflutter 5\necho 70 3\nformant 1 110 100 90\nstressAdd 1 2\n"
)


@pytest.fixture(scope="module")
def small_plan() -> Any:
    """Few clips in the parts of the plan that do not depend on the scale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "DEMO_TRAINING_CLIPS", 4)
        patch.setattr(plan, "DEMO_TEST_CLIPS", 2)
        patch.setattr(plan, "HELD_OUT_VOICE_CLIPS", 2)
        yield patch


@pytest.fixture(scope="module")
def fake_espeak(tmp_path_factory: pytest.TempPathFactory, small_plan: pytest.MonkeyPatch) -> Path:
    """Puts the stand-in first on the PATH; its log has a line for each text that was spoken."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "espeak-ng").write_text(FAKE_ESPEAK)
    (folder / "espeak-ng").chmod(0o755)
    variants = folder / "data" / "voices" / "!v"
    variants.mkdir(parents=True)
    (folder / "data" / "en_dict").write_text("words")
    for voice in [*plan.training_voices(plan.SCALES["full"]), *plan.held_out_voices(plan.SCALES["full"])]:
        (variants / voice.variant).write_text(FAKE_VARIANT)
    (variants / plan.DEMO_VARIANT).write_text(FAKE_VARIANT)
    small_plan.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    small_plan.setenv("FAKE_ESPEAK_LOG", str(folder / "log"))
    return folder / "log"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, fake_espeak: Path) -> stage.Work:
    """The smallest scale, its speech made."""
    work = stage.Work(tmp_path_factory.mktemp("work"), "smoke")
    stage.run_stage("speech", speech.make_speech, work)
    return work


def _imported(file: Path) -> set[str]:
    return set(re.findall(r"^ *(?:from|import) embedded\.(\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))


def test_rooms_import_only_from_rooms_before_them() -> None:
    rooms = {file.stem: _imported(file) for file in (PROJECT / "embedded").glob("*.py") if file.stem != "__init__"}
    assert set(rooms) == set(ORDER)
    for room, imports in rooms.items():
        assert imports <= set(ORDER[: ORDER.index(room)]), room
    assert not any(_imported(file) for file in (PROJECT / "finetuning").glob("*.py"))


# ---------------------------------------------------------------------------------------------------- texts, plan


def test_sentences_are_the_same_for_the_same_seed_and_never_twice() -> None:
    first, again, other = ([next(stream) for _ in range(500)] for stream in map(sentences, (1, 1, 2)))
    assert first == again != other
    assert len(set(first)) == 500
    for text in first:
        assert text[0].isupper() and text[-1] in ".?" and "{" not in text and 4 <= len(text.split()) <= 12


@pytest.mark.parametrize("scale", ["small", "full"])
def test_nothing_that_is_held_out_is_trained_on(scale: str) -> None:
    clips = plan.all_clips(plan.SCALES[scale])
    texts = {split: [clip.text for clip in clips if clip.split == split] for split in plan.SPLITS}
    variants = {split: {clip.voice.variant for clip in clips if clip.split == split} for split in plan.SPLITS}
    held_out = {*texts["held_out_sentences"], *texts["held_out_voices"], *texts["demo_test"]}
    assert not held_out & {*texts["train"], *texts["demo_train"]}
    assert not set(texts["train"]) & set(texts["demo_train"])
    assert len(set(texts["train"])) == len(texts["train"])
    assert variants["held_out_sentences"] == variants["train"]
    assert not variants["train"] & (variants["held_out_voices"] | variants["demo_train"])
    assert not variants["held_out_voices"] & variants["demo_train"]
    assert clips == plan.all_clips(plan.SCALES[scale])


@pytest.mark.parametrize("scale", ["small", "full"])
def test_a_voice_is_one_variant_at_one_pitch(scale: str) -> None:
    voices = [*plan.training_voices(plan.SCALES[scale]), *plan.held_out_voices(plan.SCALES[scale]), plan.demo_voice()]
    assert len({voice.name for voice in voices}) == len(voices) == len({(v.variant, v.f0_hz) for v in voices})
    periods_a_frame = [voice.f0_hz * SAMPLES_PER_FRAME / 24_000 for voice in voices]
    assert all(number == int(number) for number in periods_a_frame)


# --------------------------------------------------------------------------------------------------------- speech


def test_rows_are_the_projects_own_and_their_clips_equally_loud(work: stage.Work) -> None:
    from finetuning.manifest import RowFormat, parse_row

    folder = work.folder / "speech"
    for split in plan.SPLITS:
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        wanted = [clip for clip in plan.all_clips(work.scale) if clip.split == split]
        rows = [parse_row(line, number, folder, RowFormat(), needs_codes=False) for number, line in enumerate(lines, 1)]
        assert sorted((row.speaker, row.text) for row in rows) == sorted(
            (clip.voice.name, clip.text) for clip in wanted
        )
        for row in rows:
            info = soundfile.info(row.audio)
            assert (info.samplerate, info.channels) == (24_000, 1)
            assert info.duration == pytest.approx(row.raw["seconds"]) and row.ref_audio.parent == row.audio.parent
            clip = read_clip(row.audio)
            loud = clip[np.flatnonzero(clip)[0] : np.flatnonzero(clip)[-1]]
            assert np.sqrt(np.mean(loud**2)) == pytest.approx(speech.RMS, rel=0.05)
            assert closeness.median_f0_hz(clip[:24_000]) == pytest.approx(row.raw["f0_hz"], rel=0.01)
            if split == "train":
                twin = read_clip(twin_of(row.audio))
                assert len(twin) == len(clip)
                assert closeness.median_f0_hz(twin[:24_000]) == pytest.approx(espeak.NEUTRAL_F0_HZ, rel=0.01)


def test_a_voice_file_keeps_what_makes_the_voice_and_its_twin_only_the_rhythm(work: stage.Work) -> None:
    folder = work.folder / "speech" / "espeak" / "espeak-ng-data"
    assert (folder / "en_dict").read_text() == "words"
    voice = plan.training_voices(work.scale)[0]
    own, twin = ((folder / "voices" / "!v" / name).read_text() for name in (voice.name, f"{voice.name}-neutral"))
    assert "formant 1 110 100 90" in own and "formant" not in twin
    for text in (own, twin):
        assert "stressAdd 1 2" in text and "flutter 0" in text and "echo" not in text and "flutter 5" not in text
    assert f"pitch {voice.f0_hz + 9} {voice.f0_hz + 9}" in own and "pitch 109 109" in twin


def test_a_missing_variant_is_named(work: stage.Work, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no variant nobody"):
        espeak.Espeak(tmp_path / "voices", [plan.Voice("a", "nobody", 100, 120)])
    assert not (tmp_path / "voices").exists()


def test_a_voice_that_is_there_is_not_spoken_again(work: stage.Work, fake_espeak: Path, tmp_path: Path) -> None:
    copy = stage.Work(tmp_path / "work", "smoke")
    shutil.copytree(work.folder, copy.folder)
    before = (copy.folder / "speech" / "train.jsonl").read_bytes()
    shutil.rmtree(copy.folder / "speech" / "demo")
    fake_espeak.write_text("")
    speech.make_speech(copy)
    spoken = fake_espeak.read_text().splitlines()  # each by the voice and by its twin
    assert len(spoken) == 2 * (plan.DEMO_TRAINING_CLIPS + plan.DEMO_TEST_CLIPS)
    assert all(line.startswith("demo") for line in spoken)
    assert (copy.folder / "speech" / "train.jsonl").read_bytes() == before


def test_an_interrupted_voice_leaves_nothing_and_is_spoken_again(
    fake_espeak: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = stage.Work(tmp_path, "smoke")
    failing, whole = (voice.name for voice in plan.training_voices(work.scale)[::-1])
    fails = [clip for clip in plan.all_clips(work.scale) if clip.voice.name == failing][3]
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_ESPEAK_FAILS", fails.text)
        with pytest.raises(UserError, match=rf"{failing} .*no such voice"):
            speech.make_speech(work)
    assert not (tmp_path / "speech" / failing).exists() and not (tmp_path / "speech" / "train.jsonl").exists()
    assert (tmp_path / "speech" / whole / "rows.json").is_file()
    assert speech.make_speech(work)["train_clips"] == 12


def test_without_espeak_the_install_line_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "embedded.speech", "--scale", "smoke", "--folder", str(tmp_path / "work")]
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "apt-get install -y espeak-ng" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "work").exists()


def test_a_small_disk_is_refused_before_anything_is_written(
    fake_espeak: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech, "free_bytes", lambda folder: 10**6)
    with pytest.raises(UserError, match=r"needs 0\.0[12] GB"):
        speech.make_speech(stage.Work(tmp_path / "work", "smoke"))
    assert not (tmp_path / "work").exists()


# ---------------------------------------------------------------------------------------------------------- stages


def test_a_stage_that_is_done_is_not_run_again_unless_its_plan_changes(tmp_path: Path) -> None:
    runs: list[str] = []

    def make(work: stage.Work) -> dict[str, int]:
        runs.append(work.scale_name)
        return {"runs": len(runs)}

    smoke, small = stage.Work(tmp_path, "smoke"), stage.Work(tmp_path, "small")
    assert stage.run_stage("encoder", make, smoke) == stage.run_stage("encoder", make, smoke) == {"runs": 1}
    assert stage.run_stage("encoder", make, small) == {"runs": 2}
    small.report("encoder").write_text("half")
    assert stage.run_stage("encoder", make, small) == {"runs": 3}
    assert runs[:3] == ["smoke", "small", "small"]
    other_codec = stage.Work(tmp_path, "small", codec_steps=(1, 2, 3))
    assert stage.run_stage("encoder", make, other_codec) == {"runs": 4}  # which hears through it
    assert other_codec.plan("talker") != small.plan("talker") and other_codec.plan("speech") == small.plan("speech")


def test_a_half_written_state_is_none(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    assert stage.load_state(path) is None
    stage.save_state(path, {"a": torch.arange(3.0)}, {"step": 7})
    tensors, info = stage.load_state(path)
    assert info == {"step": 7} and torch.equal(tensors["a"], torch.arange(3.0))
    path.write_bytes(path.read_bytes()[:-4])
    assert stage.load_state(path) is None


# ----------------------------------------------------------------------------------------------------------- codec


@pytest.fixture(scope="module")
def small_codec_batches(small_plan: pytest.MonkeyPatch) -> None:
    for name, value in {
        "ENCODER_BATCH": 2,
        "ENCODER_FRAMES": 6,
        "DECODER_BATCH": 2,
        "DECODER_FRAMES": 8,
        "FITTED_PIECES": 4,
        "FITTED_FRAMES": 8,
    }.items():
        small_plan.setattr(codec_stage, name, value)


@pytest.fixture(scope="module")
def trained_codec(work: stage.Work, small_codec_batches: None) -> Any:
    """A training of one step in each of the phases, its export, and a copy that was killed before the last two."""
    training = _codec_training(work)
    training.train_step()
    training.save(work.folder / "codec" / "state.safetensors")
    for _ in range(3):
        training.train_step()
    training.codec.eval().export(work.folder / "codec" / "codec")
    return training


def _codec_training(work: stage.Work) -> codec_stage.CodecTraining:
    bank = ClipBank(read_rows(work.folder / "speech", "train"), with_twins=True)
    return codec_stage.CodecTraining(stage.Work(work.folder, "smoke", codec_steps=(1, 1, 2)), bank)


def test_a_codec_training_that_was_killed_goes_on_to_the_same_weights(trained_codec: Any, work: stage.Work) -> None:
    again = _codec_training(work)
    assert again.restore(work.folder / "codec" / "state.safetensors") and again.step == 1
    for _ in range(3):
        again.train_step()
    assert again.phase == 3
    for name, weight in trained_codec.codec.state_dict().items():
        assert torch.equal(weight, again.codec.state_dict()[name]), name


def test_a_state_of_another_plan_is_not_taken(trained_codec: Any, work: stage.Work) -> None:
    other = _codec_training(work)
    other.plan = other.plan | {"clips_per_voice": 7}
    assert not other.restore(work.folder / "codec" / "state.safetensors") and other.step == 0


def test_stock_encodes_and_decodes_as_the_training_does(trained_codec: Any, work: stage.Work) -> None:
    from finetuning.codec import Codec

    clip = read_clip(read_rows(work.folder / "speech", "demo_test")[0]["audio"])
    clip = clip[: len(clip) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME]
    stock = Codec(work.folder / "codec" / "codec")
    codes = stock.encode([clip])[0]
    assert codes.shape == (len(clip) // SAMPLES_PER_FRAME, 16)
    assert not codes[:, NUM_LEVELS:].any()
    own: TrainableCodec = trained_codec.codec
    own.model.half().float()  # as the export rounds it
    for quantizer in (own.semantic, own.acoustic):
        quantizer.codebooks.copy_(quantizer.codebooks.half().float())
    with torch.no_grad():
        own_codes = own.codes(torch.from_numpy(clip)[None])
        waveform = own.decode(*own.quantized(own_codes))[0].numpy()
    assert np.mean(codes[:, :NUM_LEVELS] == own_codes[0].numpy()) >= 0.95
    assert codes.max() < NUM_CODES
    assert np.corrcoef(stock.decode([codes])[0], waveform)[0, 1] > 0.95


def test_the_decoder_learns_from_the_codes_and_the_samples_of_the_same_frames(trained_codec: Any) -> None:
    training: codec_stage.CodecTraining = trained_codec
    places = training.bank.places(3, 2, 8, SAMPLES_PER_FRAME)
    assert (
        places == training.bank.places(3, 2, 8, SAMPLES_PER_FRAME) != training.bank.places(4, 2, 8, SAMPLES_PER_FRAME)
    )
    for clip, start in places:
        assert start + 8 <= len(training.codes[clip]) == len(training.bank.clips[clip]) // SAMPLES_PER_FRAME
        first = start * SAMPLES_PER_FRAME
        wanted = training.bank.clips[clip][first : first + 8 * SAMPLES_PER_FRAME] / 32768
        assert np.allclose(training._samples(clip, start), wanted)


def test_pieces_and_their_twins_are_played_at_the_same_speed(work: stage.Work) -> None:
    bank = ClipBank(read_rows(work.folder / "speech", "train"), with_twins=True)
    clips, twins, f0_hz = bank.pieces_with_twins(0, 12, 24_000)
    assert len(set(f0_hz.tolist())) > len(set(bank.f0_hz))
    for clip, twin, wanted in zip(clips.numpy(), twins.numpy(), f0_hz.tolist(), strict=True):
        assert closeness.median_f0_hz(clip) == pytest.approx(wanted, rel=0.02)
        speed = wanted / min(bank.f0_hz, key=lambda f0: abs(np.log(wanted / f0)))
        assert closeness.median_f0_hz(twin) == pytest.approx(espeak.NEUTRAL_F0_HZ * speed, rel=0.02)


def test_the_loss_for_words_follows_the_measure_of_words() -> None:
    true = read_clip(PROJECT / "voices" / "english_voice" / "clips" / "train_01.flac")
    noise = np.random.default_rng(0).normal(size=len(true)).astype(np.float32)
    loss = codec_losses.IntelligibilityLoss()
    found, wanted = [], []
    for loudness in (0.0, 0.003, 0.01, 0.1):
        other = true + loudness * noise
        found.append(1 - float(loss(torch.from_numpy(other)[None], torch.from_numpy(true)[None])))
        wanted.append(measures.stoi(true, other))
    assert found[0] == pytest.approx(1, abs=0.01) and found == sorted(found, reverse=True)
    assert np.allclose(found, wanted, atol=0.15)


def test_kmeans_finds_clusters() -> None:
    draw = torch.Generator().manual_seed(0)
    from embedded.codec_model import ResidualQuantizer

    centers = torch.randn(40, 32, generator=draw) * 5
    points = centers.repeat(60, 1) + 0.01 * torch.randn(2400, 32, generator=draw)
    quantizer = ResidualQuantizer(1)
    assert quantizer.fit(points, 2, draw) < 1e-4
    latents = points[None, :40].clone().requires_grad_()
    quantized, distance = quantizer(latents, 0.0)
    quantized.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))  # straight through
    assert distance < 1e-3 and torch.allclose(quantized, points[None, :40], atol=0.1)


# --------------------------------------------------------------------------------------------------------- encoder


@pytest.fixture(scope="module")
def trained_encoder(work: stage.Work, trained_codec: Any) -> Path:
    """The stage as a whole, saved after its second step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "BATCH_SIZE", 4)
        patch.setattr(encoder, "SAVE_STEPS", 2)
        patch.setattr(encoder, "PIECE_STEPS", (20, 30))
        figures = encoder.make_encoder(work)
    assert 0 <= figures["held_out_voices_equal_error_rate"] <= 1
    return work.folder / "encoder" / "encoder.safetensors"


def test_an_encoder_training_that_was_killed_goes_on_to_the_same_weights(
    trained_encoder: Path, work: stage.Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(encoder, "BATCH_SIZE", 4)
    rows = read_rows(work.folder / "speech", "train")[:4]
    one, other = (encoder.EncoderTraining(rows, work.plan("encoder"), "cpu") for _ in range(2))
    for number in range(4):
        one.train_step()
        if number == 1:
            one.save(tmp_path / "state.safetensors")
    assert other.restore(tmp_path / "state.safetensors") and other.step == 2
    for _ in range(2):
        other.train_step()
    assert all(torch.equal(a, b) for a, b in zip(one.encoder.parameters(), other.encoder.parameters(), strict=True))
    assert not encoder.EncoderTraining(rows, work.plan("encoder") | {"encoder_steps": 5}, "cpu").restore(
        tmp_path / "state.safetensors"
    )


def test_the_margin_is_an_angle() -> None:
    angles = torch.tensor([[0.3, 1.0], [2.0, 0.5]])
    logits = encoder.with_margin(torch.cos(angles), torch.tensor([0, 1]))
    wanted = encoder.SCALE * torch.cos(angles + encoder.MARGIN * torch.eye(2))
    assert torch.allclose(logits, wanted, atol=1e-4)


def test_pairs_and_their_equal_error_rate() -> None:
    vectors = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])).numpy()
    same, different = encoder.pairs(vectors, vectors, ["a", "a", "b"])
    assert len(same) == 1 and len(different) == 2 and same[0] > different.max()
    assert measures.equal_error_rate(same, different) == 0
    draw = np.random.default_rng(0)
    assert measures.equal_error_rate(draw.normal(size=4000), draw.normal(size=4000)) == pytest.approx(0.5, abs=0.03)
    # Normal distributions two deviations apart: half of the way is one deviation from each.
    tail = 0.5 * math.erfc(1 / math.sqrt(2))
    shifted = measures.equal_error_rate(draw.normal(2, size=20_000), draw.normal(size=20_000))
    assert shifted == pytest.approx(tail, abs=0.01)


# -------------------------------------------------------------------------------------------------- base, packing


@pytest.fixture(scope="module")
def packed(trained_codec: Any, trained_encoder: Path, work: stage.Work) -> stage.Work:
    """A base whose talker is the random one, packed as if it had been trained."""
    from finetuning.disk import seal

    pack.pack_start(work)
    last = work.folder / "talker" / "output" / "last"
    shutil.copytree(work.folder / "start", last)
    seal(last)
    figures = pack.pack_base(work)
    assert figures["megabytes"] < 40
    return work


def test_stock_loads_the_base_and_speaks(packed: stage.Work) -> None:
    from finetuning.stock import import_qwen_tts

    reference = read_rows(packed.folder / "speech", "demo_test")[0]["ref_audio"]
    stock = import_qwen_tts().Qwen3TTSModel.from_pretrained(str(packed.folder / "base"), dtype=torch.float32)
    waveform = stock.generate_voice_clone("Yes.", ref_audio=reference, x_vector_only_mode=True, max_new_tokens=8)[0][0]
    assert waveform.ndim == 1 and len(waveform) >= SAMPLES_PER_FRAME and np.isfinite(waveform).all()
    vector = stock.model.extract_speaker_embedding(read_clip(reference), 24_000)
    own = encoder.load_encoder(packed.folder / "encoder" / "encoder.safetensors")
    assert F.cosine_similarity(vector, encoder.voice_vector(own, read_clip(reference)), dim=0) > 0.999


def test_a_base_is_not_packed_from_a_missing_or_damaged_talker(packed: stage.Work, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train the talker first"):
        pack.pack_base(stage.Work(tmp_path, "smoke"))
    last = tmp_path / "talker" / "output" / "last"
    shutil.copytree(packed.folder / "talker" / "output" / "last", last)
    (last / "config.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        pack.pack_base(stage.Work(tmp_path, "smoke"))
    assert not (tmp_path / "base").exists()


def test_base_and_clips_are_put_where_they_ship_from(
    packed: stage.Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetuning.disk import damage
    from finetuning.manifest import RowFormat, parse_row

    base, voice = tmp_path / "base", tmp_path / "voice"
    monkeypatch.setattr(ship, "SPEAKING_BASE", base)
    monkeypatch.setattr(ship, "VOICE_FOLDER", voice)
    ship.ship(packed)
    assert damage(base) == [] and (base / "speech_tokenizer" / "model.safetensors").is_file()
    for split in ("train", "test"):
        lines = (voice / f"{split}_raw.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [parse_row(line, number, voice, RowFormat(), needs_codes=False) for number, line in enumerate(lines, 1)]
        wanted = read_rows(packed.folder / "speech", f"demo_{split}")
        assert [row.text for row in rows] == [row["text"] for row in wanted]
        assert all(
            row.audio.read_bytes() == Path(one["audio"]).read_bytes() for row, one in zip(rows, wanted, strict=True)
        )
    monkeypatch.setattr(ship, "MAX_VOICE_BYTES", 1000)
    with pytest.raises(UserError, match="take fewer"):
        ship.ship(packed)
    assert damage(voice) == []  # what was there is still there


def test_the_picture_shows_three_spectrograms(tmp_path: Path) -> None:
    import matplotlib.image

    for way in picture.TITLES:
        soundfile.write(tmp_path / f"01-{way}.wav", _voiced(150), 24_000)
    picture.draw(tmp_path, 1, tmp_path / "demo.png")
    pixels = matplotlib.image.imread(tmp_path / "demo.png")
    assert pixels.shape[0] > 400 and pixels.std() > 0.05
    with pytest.raises(UserError, match=r"02-before\.wav does not exist"):
        picture.draw(tmp_path, 2, tmp_path / "other.png")


@pytest.mark.parametrize("of", [talker.talker_settings, demo.demo_settings])
def test_the_settings_are_the_projects_own(of: Any, tmp_path: Path) -> None:
    from finetuning.settings import load_settings

    values = {name: str(value) for name, value in of(stage.Work(tmp_path, "small")).items()}
    settings = load_settings({}, environment=values)
    assert settings.train_layout == "streaming" and settings.resume == "auto" and not settings.use_wandb


def test_training_is_handed_its_settings_and_its_refusal_is_a_refusal(tmp_path: Path) -> None:
    values = {"TRAIN_JSONL": tmp_path / "none.jsonl", "DATA_MODE": "none", "OUTPUT_DIR": tmp_path / "out"}
    with pytest.raises(UserError, match=r"train\.py refused"):
        talker.run_training({"INIT_MODEL_PATH": "tiny-random", "DEVICE": "cpu", **values}, tmp_path / "a.env", 1)


# -------------------------------------------------------------------------------------------------------- measures


def _voiced(f0_hz: float, seconds: float = 1.5) -> np.ndarray:
    """Harmonics that get weaker, swelling four times a second like syllables."""
    time = np.arange(int(24_000 * seconds)) / 24_000
    waves = sum(np.sin(2 * np.pi * f0_hz * k * time) / k for k in range(1, 20))
    return (0.05 * waves * (1.1 + np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def test_comparing_with_itself_with_another_pitch_and_with_noise() -> None:
    clip = _voiced(150)
    same, higher = measures.compare(clip, clip), measures.compare(clip, _voiced(165))
    assert same["stoi"] == pytest.approx(1, abs=1e-3) and same["voicing_kept"] == 1
    assert same["log_mel_l1"] == same["f0_error"] == 0
    assert higher["f0_error"] == pytest.approx(0.1, abs=0.01) and higher["voicing_kept"] > 0.9
    noise = np.random.default_rng(0).normal(size=len(clip)).astype(np.float32) * 0.1
    worse = measures.compare(clip, noise)
    assert worse["stoi"] < 0.5 and worse["voicing_kept"] < 0.2 and worse["log_mel_l1"] > higher["log_mel_l1"]
    assert measures.averages([same, higher])["f0_error"] == pytest.approx(0.05, abs=0.005)
    assert measures.averages([{"a": math.nan, "b": 1.0}, {"a": math.nan, "b": 2.0}]) == pytest.approx(
        {"a": math.nan, "b": 1.5}, nan_ok=True
    )


def test_the_nearest_of_some_clips_is_the_same_words() -> None:
    clips = [np.concatenate([_voiced(pitch, 0.25) for pitch in pitches]) for pitches in ([300, 150], [120, 300])]
    slower = np.concatenate([_voiced(pitch, 0.35) for pitch in (120, 300)])
    assert demo.nearest(slower, clips) == 1


def test_without_a_recogniser_nothing_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    assert recognise.sentence_picker(["We left."]) is None
    assert recognise.words_of("After the fog, it's home.") == ["after", "the", "fog", "it's", "home"]


# ---------------------------------------------------------------------------------------------------------- report


def test_the_report_says_what_is_met_what_is_not_and_what_is_open(tmp_path: Path) -> None:
    work = stage.Work(tmp_path, "smoke")
    stage.run_stage("codec", lambda _: {"held_out_sentences_stoi": 0.9, "held_out_voices_stoi": float("nan")}, work)
    figures = {"after_similarity": 0.9, "before_similarity": 0.5, "before_f0_error": 0.3, "after_f0_error": 0.03}
    figures |= {"before_timbre_distance_db": 4.0, "after_timbre_distance_db": 3.8}
    figures |= {"before_timbre_distance_to_coded_db": 3.0, "after_timbre_distance_to_coded_db": 1.5}
    figures |= {"before_similarity_to_coded": 0.8, "after_similarity_to_coded": 0.7}
    stage.run_stage("demo", lambda _: figures | {"after_rate_ratio": 1.2}, work)
    found = {goal["goal"]: goal for goal in report.write_report(work)["goals"]}
    assert found["codec: STOI, held-out sentences"]["met"] is True
    assert found["codec: STOI, held-out voices"]["met"] is False  # NaN
    assert found["demo: speech rate ratio"]["met"] is False
    assert found["demo: similarity above the base's, to the recording"]["value"] == 0.4
    assert found["demo: error of the median f0"]["met"] is True
    assert found["demo: distance of timbre, share of the base's"]["met"] is False
    assert found["encoder: equal-error rate, held-out voices"]["met"] is None
    saved = json.loads(work.report("report").read_text())
    table = report.table_of(saved)
    assert "| demo: speech rate ratio | >= 0.9 and <= 1.1 | 1.2 | **no** |" in table and "not measured" in table
