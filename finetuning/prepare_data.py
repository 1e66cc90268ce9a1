"""Adds codes to rows with the options of the official script, on the engine of data_processing.py --mode encode.

    python finetuning/prepare_data.py --device cuda:0 --tokenizer_model_path Qwen/Qwen3-TTS-Tokenizer-12Hz \
        --input_jsonl train_raw.jsonl --output_jsonl train_with_codes.jsonl
    accelerate launch --num_processes=4 finetuning/prepare_data.py --input_jsonl … --output_jsonl …    # shared
    python finetuning/prepare_data.py --tokenizer_model_path tiny --device cpu \
        --input_jsonl voices/english_voice/train_raw.jsonl --output_jsonl /tmp/train_with_codes.jsonl    # a tiny one

It works from any folder, this one too; relative paths are those of the folder where it is called. Interrupted work goes
on where it stopped, and what is up to date is not made again. An output file that was not made here is never written
over, unless --force is given. .env and settings in the environment are not read.
"""

import os
import re
import sys
from pathlib import Path

if __name__ == "__main__":  # the project instead of this folder, whose files have names that others have, too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from finetuning.console import say
from finetuning.errors import UserError, run_main
from finetuning.official import OptionParser, options_named

DEFAULT_CODEC = "Qwen/Qwen3-TTS-Tokenizer-12Hz"


def main() -> None:
    options = parse_options()
    input_jsonl, output_jsonl = Path(options["input_jsonl"]), Path(options["output_jsonl"])
    if not input_jsonl.is_file():
        raise UserError(f"--input_jsonl: {input_jsonl} does not exist")
    with options_named({"tokenizer_model_path": "TOKENIZER_PATH", "device": "DEVICE"}, {"--input_jsonl": input_jsonl}):
        prepare(input_jsonl, output_jsonl, options)


def parse_options() -> dict[str, str]:
    parser = OptionParser(__doc__)
    add = parser.add_argument
    add("--device", default="cuda:0", help="cuda:N, cuda, cpu, mps or auto (default cuda:0; without a GPU the CPU)")
    add(
        "--tokenizer_model_path",
        default=DEFAULT_CODEC,
        help=f"12 Hz codec, or a base that contains it: Hub id or folder (default {DEFAULT_CODEC})",
    )
    add("--input_jsonl", required=True, help="rows with audio and text")
    add("--output_jsonl", required=True, help="the same rows with audio_codes")
    add("--force", action="store_true", help="make everything again, and replace any output file")
    options = parser.parse()
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", options["device"]):
        raise UserError(f"--device: must be cuda:N, cuda, cpu, mps or auto, not {options['device']}")
    return options


def prepare(input_jsonl: Path, output_jsonl: Path, options: dict[str, str]) -> None:
    """Raw rows to rows with codes; heavy imports come after the options were checked."""
    from finetuning.encode_rows import encode_jsonl
    from finetuning.manifest import RowFormat
    from finetuning.preparer import find_codec_folder
    from finetuning.processes import get_num_workers_for_dataloader, launched_processes

    codec_folder = find_codec_folder(options["tokenizer_model_path"], "--tokenizer_model_path")
    device = choose_device(options["device"])
    processes = launched_processes(device)
    encode_jsonl(
        input_jsonl,
        output_jsonl,
        codec_folder,
        RowFormat(),
        device=device,
        setting="--input_jsonl",
        num_workers=get_num_workers_for_dataloader(),
        force=bool(options["force"]),
        processes=processes,
    )
    say(f"rows with codes: {output_jsonl}")


def choose_device(name: str) -> str:
    """--device, or the CPU where it is missing, which is said; each of several processes has a GPU of its own.

    Raises:
        UserError: there are GPUs, but not that one.
    """
    import torch

    from finetuning.processes import get_device_for_current_process

    kind, _, index = name.partition(":")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (kind == "cuda" and not num_gpus) or (kind == "mps" and not torch.backends.mps.is_available()):
        say(f"--device: this machine has no {name}, so the CPU encodes, which takes much longer")
        return "cpu"
    if kind == "cuda" and int(index or 0) >= num_gpus:
        raise UserError(f"--device: there is no {name}; this machine shows {num_gpus} GPU(s), from cuda:0 on")
    is_shared = kind == "cuda" and int(os.environ.get("WORLD_SIZE") or 1) > 1
    return get_device_for_current_process() if kind == "auto" or is_shared else name


if __name__ == "__main__":
    run_main(main)
