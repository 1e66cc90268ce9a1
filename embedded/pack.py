"""One base checkpoint of codec, speaker encoder and talker, in the layout of a real release.

    python -m embedded.pack --scale small --folder WORK

Before the talker's training its layers are random (WORK/start, fp32, what train.py starts from); afterwards the trained
one becomes WORK/base: fp16, below 40 MB, loaded by stock qwen-tts. Each folder appears whole or not at all and has
checksums, so a damaged one is recognised.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from embedded.base_config import base_config
from embedded.encoder import load_encoder
from embedded.stage import Work, main_of
from finetuning.base_model import ENCODER_PREFIX, tokenizer_files
from finetuning.disk import bytes_of, check_is_whole, new_folder, read_json, write_json
from finetuning.errors import UserError
from finetuning.stock import import_qwen_tts
from finetuning.tiny_model import GENERATION_CONFIG, PREPROCESSOR_CONFIG, random_model, write_text_tokenizer

MAX_BYTES = 40_000_000
#: Embeddings of codebooks 1 to 15 start at this share of codebook 0's: sixteen of them are added up.
LATER_CODEBOOKS_GAIN = 0.2
#: Draws of a model this small need less freedom than a real one's, and steady voices repeat themselves: with these 8 of
#: 10 sentences were taken for themselves, with the real ones' penalty 7, and spoke at 0.93 of the pace at 0.5.
GENERATION = GENERATION_CONFIG | {"temperature": 0.3, "subtalker_temperature": 0.3, "repetition_penalty": 1.0}


def pack_start(work: Work) -> dict[str, Any]:
    """Writes WORK/start; the stage's figures."""
    encoder, codec_folder = load_encoder(work.folder / "encoder" / "encoder.safetensors"), work.folder / "codec/codec"
    with new_folder(work.folder / "start") as folder:
        config = base_config(write_text_tokenizer(folder))
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", GENERATION)
        write_json(folder / "preprocessor_config.json", PREPROCESSOR_CONFIG)
        model = start_model(config)
        model.speaker_encoder.load_state_dict(encoder.state_dict())
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        _copy_codec(codec_folder, folder)
    sizes = {part: sum(value.numel() for name, value in weights.items() if name.startswith(part)) for part in _PARTS}
    return {f"weights_{name.strip('.').replace('.', '_')}": number for name, number in sizes.items()}


_PARTS = ("talker.model.", "talker.code_predictor.", ENCODER_PREFIX)


def start_model(config: dict[str, Any], seed: int = 0) -> Any:
    """The model with a random talker, scaled for training from scratch."""
    import_qwen_tts()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = random_model(config)
        for table in model.talker.code_predictor.model.codec_embedding:
            table.weight.mul_(LATER_CODEBOOKS_GAIN)
        for layers in (model.talker.model.layers, model.talker.code_predictor.model.layers):
            for layer in layers:  # what each layer adds, in a sum of two for each of them
                layer.self_attn.o_proj.weight.mul_((2 * len(layers)) ** -0.5)
                layer.mlp.down_proj.weight.mul_((2 * len(layers)) ** -0.5)
    return model


def pack_base(work: Work) -> dict[str, Any]:
    """Writes WORK/base from the end of the talker's training, and the newest codec and speaker encoder; the
    stage's figures.

    Not from best/: the validation loss rises long before the words stop getting better, since a talker of this size
    becomes sure of itself. (At its lowest loss 4 of 10 sentences were taken for themselves, after twice the steps 7.)

    Raises:
        UserError: the checkpoint is missing or damaged, or the result is too large.
    """
    trained = work.folder / "talker" / "output" / "last"
    if not trained.is_dir():
        raise UserError(f"--folder: {trained} does not exist; train the talker first (python -m embedded.talker)")
    check_is_whole(trained, "--folder")
    with new_folder(work.folder / "base") as folder:
        for file in [*tokenizer_files(trained), trained / "preprocessor_config.json"]:
            shutil.copy2(file, folder / file.name)
        write_json(folder / "config.json", read_json(trained / "config.json"))
        write_json(folder / "generation_config.json", GENERATION)
        encoder = load_file(work.folder / "encoder" / "encoder.safetensors")
        weights = load_file(trained / "model.safetensors")
        weights |= {f"{ENCODER_PREFIX}{name}": value for name, value in encoder.items()}
        weights = {name: value.half() for name, value in weights.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        _copy_codec(work.folder / "codec" / "codec", folder)
        if (size := bytes_of(folder)) > MAX_BYTES:
            raise UserError(f"the base has {size:,} bytes, more than {MAX_BYTES:,}; make embedded.base_config smaller")
    return {"megabytes": round(size / 1e6, 2), "load_seconds": round(load_seconds(work.folder / "base"), 2)}


def load_seconds(folder: Path) -> float:
    """How long stock takes to load it, imports left out."""
    package = import_qwen_tts()
    start = time.monotonic()
    package.Qwen3TTSModel.from_pretrained(str(folder), dtype=torch.float32)
    return time.monotonic() - start


def _copy_codec(codec_folder: Path, folder: Path) -> None:
    check_is_whole(codec_folder, "--folder")
    (folder / "speech_tokenizer").mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy2(codec_folder / name, folder / "speech_tokenizer" / name)


if __name__ == "__main__":
    main_of("pack", pack_base, __doc__)
