"""The codec: shapes, range, and codes that depend on the clip alone."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from finetuning.audio import load_audio
from finetuning.codec import Codec, check_codec_folder
from finetuning.errors import UserError

CLIPS = Path(__file__).parent.parent / "voices" / "english_voice" / "clips"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """All clips of the demo voice."""
    return [load_audio(path) for path in sorted(CLIPS.iterdir())]


@pytest.fixture(scope="module")
def exact_codec(codec: Codec) -> Codec:
    """The same codec in fp64, where no two codewords are so near that rounding chooses between them."""
    exact = copy.deepcopy(codec)
    exact._tokenizer.model.double()
    for module in exact._tokenizer.model.modules():
        if hasattr(module, "_embed"):  # a quotient that transformers caches
            module._embed = None
    return exact


@pytest.fixture(scope="module")
def together(codec: Codec, clips: list[np.ndarray]) -> list[np.ndarray]:
    return codec.encode(clips)


def num_differing(left: list[np.ndarray], right: list[np.ndarray]) -> list[int]:
    """Per clip, how many codes differ."""
    return [int((np.asarray(a) != np.asarray(b)).sum()) for a, b in zip(left, right, strict=True)]


def test_demo_clips_exercise_padding(clips: list[np.ndarray]) -> None:
    """The tests below mean nothing on clips of whole frames or of one length."""
    assert len(clips) == 28
    assert all(len(clip) % 1920 for clip in clips) and len({len(clip) for clip in clips}) > 10


def test_codes_have_one_frame_per_1920_samples_begun(together: list[np.ndarray], clips: list[np.ndarray]) -> None:
    assert [codes.shape for codes in together] == [(math.ceil(len(clip) / 1920), 16) for clip in clips]


@pytest.mark.parametrize("num_samples, frames", [(7200, 4), (7680, 4), (7681, 5), (9599, 5), (9600, 5)])
def test_number_of_frames_at_the_boundaries(codec: Codec, num_samples: int, frames: int) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, num_samples).astype(np.float32)
    assert [codes.shape for codes in codec.encode([noise])] == [(frames, 16)]


def test_codes_are_int16_in_range_and_use_the_codebooks(together: list[np.ndarray]) -> None:
    every = np.concatenate(together)
    assert every.dtype == np.int16
    assert every.min() >= 0 and every.max() < 2048
    assert min(len(np.unique(every[:, book])) for book in range(16)) > 50


def test_codes_do_not_depend_on_batch_neighbours(exact_codec: Codec, clips: list[np.ndarray]) -> None:
    batch = exact_codec.encode(clips)
    alone = [exact_codec.encode([clip])[0] for clip in clips]
    assert num_differing(alone, batch) == [0] * len(clips)


def test_in_fp32_rounding_alone_is_left_of_the_neighbours(
    codec: Codec, together: list[np.ndarray], clips: list[np.ndarray]
) -> None:
    """A tie of two codewords, and what hangs on it in its frame, is rounding; a dependence would show in most clips."""
    alone = [codec.encode([clip])[0] for clip in clips]
    differing = num_differing(alone, together)
    assert sum(count > 0 for count in differing) <= 1
    assert sum(differing) <= 0.001 * sum(codes.size for codes in together)


def test_without_padding_codes_do_depend_on_batch_neighbours(exact_codec: Codec, clips: list[np.ndarray]) -> None:
    """The counter-test: stock makes other last frames of most clips. Once it no longer does, padding can go."""
    clips = clips[:12]
    stock = exact_codec._tokenizer
    batch = [codes.numpy() for codes in stock.encode(clips, sr=24_000).audio_codes]
    alone = [stock.encode([clip], sr=24_000).audio_codes[0].numpy() for clip in clips]
    differing = num_differing(alone, batch)
    assert sum(count > 0 for count in differing) > len(clips) / 2
    assert num_differing([codes[:-1] for codes in alone], [codes[:-1] for codes in batch]) == [0] * len(clips)


def test_codes_differ_from_clip_to_clip(together: list[np.ndarray]) -> None:
    for index, codes in enumerate(together):
        for other in together[:index]:
            frames = min(len(codes), len(other))
            assert (codes[:frames] != other[:frames]).mean() > 0.4  # two sentences begin with the same words


def test_same_clip_gives_same_codes_again(codec: Codec, together: list[np.ndarray], clips: list[np.ndarray]) -> None:
    assert num_differing(codec.encode(clips), together) == [0] * len(clips)


def test_codec_runs_in_fp32_whatever_the_file_holds(codec: Codec, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((codec.folder / name).read_bytes())
    weights = load_file(codec.folder / "model.safetensors")
    halved = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(halved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = Codec(tmp_path)._tokenizer.model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_decode_gives_1920_samples_a_frame(codec: Codec, together: list[np.ndarray]) -> None:
    waveforms = codec.decode([together[0], together[4][:3]])
    assert [waveform.shape for waveform in waveforms] == [(len(together[0]) * 1920,), (3 * 1920,)]
    assert all(waveform.dtype == np.float32 and np.isfinite(waveform).all() for waveform in waveforms)
    assert waveforms[0].std() > 0


# ---------------------------------------------------------------------------------------------------- wrong folders


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no speech tokenizer in .*TOKENIZER_PATH"):
        Codec(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        Codec(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["qwen3_tts_tokenizer_25hz", "qwen3_tts", None])
def test_folder_of_another_model_is_named(tmp_path: Path, kind: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} if kind else {}))
    with pytest.raises(UserError, match="not the 12 Hz speech tokenizer") as error:
        Codec(tmp_path)
    assert str(kind) in str(error.value) and str(tmp_path) in str(error.value)


def test_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_tts_to')
    with pytest.raises(UserError, match=r"config\.json"):
        check_codec_folder(tmp_path)


def test_folder_without_weights(codec: Codec, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((codec.folder / name).read_bytes())
    with pytest.raises(UserError, match="safetensors"):
        Codec(tmp_path)
