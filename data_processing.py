"""Audio files to training rows.

    python data_processing.py --mode encode                   # TRAIN_JSONL of .env; the result stands beside it
    python data_processing.py --mode encode --input_jsonl raw.jsonl --output_jsonl train.jsonl
    python data_processing.py --mode info --input_jsonl train.jsonl
    ENV_FILE=.env.demo python data_processing.py --mode encode    # a tiny one, on CPU

Settings (base, codec, column names, device) come from `.env` as for train.py. An interrupted `encode` goes on where it
stopped; `--force` encodes everything again.
"""

import argparse
from pathlib import Path

from finetuning.errors import run_main
from finetuning.settings import Settings, load_settings


def main() -> None:
    arguments = parse_arguments()
    settings = load_settings({"device": arguments.device} if arguments.device else None)
    input_jsonl = arguments.input_jsonl or settings.train_jsonl
    if arguments.mode == "info":
        info(settings, input_jsonl)
    else:
        encode(settings, input_jsonl, arguments)


def encode(settings: Settings, input_jsonl: Path, arguments: argparse.Namespace) -> None:
    """Raw JSONL -> JSONL with codes."""
    from finetuning.base_model import choose_device, resolve_base
    from finetuning.manifest import RowFormat
    from finetuning.prepare import encode_jsonl, encoded_path

    device = choose_device(settings)
    base = resolve_base(settings)
    output = encode_jsonl(
        input_jsonl,
        arguments.output_jsonl or encoded_path(input_jsonl, arguments.max_samples),
        base.codec_folder,
        RowFormat.from_settings(settings, base.special_tokens()),
        device=device,
        setting="--input_jsonl" if arguments.input_jsonl else "TRAIN_JSONL",
        max_rows=arguments.max_samples,
        max_clips_per_batch=arguments.batch_size,
        force=arguments.force,
    )
    print(f"rows with codes: {output}")
    info(settings, output)


def info(settings: Settings, jsonl: Path) -> None:
    """Prints what a JSONL holds."""
    from finetuning.manifest import RowFormat
    from finetuning.prepare import dataset_info, format_info

    print(format_info(dataset_info(jsonl, RowFormat.from_settings(settings))))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", required=True, choices=["encode", "info"])
    parser.add_argument("--input_jsonl", type=Path, help="default TRAIN_JSONL")
    parser.add_argument("--output_jsonl", type=Path, help="default <input>.encoded.jsonl beside the input")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu", "mps"], help="default DEVICE")
    parser.add_argument("--max_samples", type=_positive, help="only the first so many rows")
    parser.add_argument("--batch_size", type=_positive, default=32, help="clips per batch of the codec (default 32)")
    parser.add_argument("--force", action="store_true", help="encode again what has codes from an earlier run")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    run_main(main)
