"""Audio files or a dataset to training rows, and what is wrong with them.

    python data_processing.py --mode prepare                  # DATASET_NAME of .env -> data/<split>.jsonl with codes
    python data_processing.py --mode prepare --split train --max_samples 2000
    accelerate launch --num_processes=4 data_processing.py --mode prepare       # shared by four GPUs
    python data_processing.py --mode encode --input_jsonl raw.jsonl --output_jsonl train.jsonl    # files -> codes
    python data_processing.py --mode check --input_jsonl train.jsonl            # table, report.html, report.json
    python data_processing.py --mode check --input_jsonl raw.jsonl --trim_silence --output_jsonl new.jsonl
    python data_processing.py --mode direct --max_samples 20                    # try the stream of DATA_MODE=direct
    python data_processing.py --mode info --input_jsonl train.jsonl
    ENV_FILE=.env.demo python data_processing.py --mode check                   # a tiny one, on CPU

Settings (dataset, base, codec, column names, device) come from `.env` as for train.py. Interrupted work goes on where
it stopped; `--force` makes everything again. As a library: `from data_processing import JSONLDataPreparer`, and the
other names of INTERFACE.
"""

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

from finetuning.errors import UserError, run_main, whole_number
from finetuning.settings import Settings, load_settings

#: The Python interface -> the room it lives in; imported when asked for, so that a mistake in .env is reported at once.
INTERFACE = {
    "JSONLDataPreparer": "preparer",
    "get_device_for_current_process": "processes",
    "get_num_workers_for_dataloader": "processes",
    "prepare_dataset": "library",
    "HFDirectDataLoader": "library",
    "get_dataloader": "library",
    "load_jsonl_dataset": "library",
    "create_dataloader": "library",
    "get_dataset_info": "library",
}
#: What `--drop_flagged` does (see checks.ROW_DEFECTS).
DROP_FLAGGED_HELP = (
    "leave out every row that a check finds fault with, single ones too (unusable, clipped, DC offset, silence at an "
    "edge, noise, telephone band, too quiet, odd speaking rate, another voice, audio or codes of an earlier row, "
    "frozen codes, unspeakable characters, wrong script; short and long clips only where there is a warning); what "
    "--trim_silence or --loudness mends stays"
)
OUTPUT_HELP = "default data/<split>.jsonl or <input>.encoded.jsonl (with AUGMENT_COPIES <input>.augmented.jsonl)"
#: Rows that `--mode direct` shows.
NUM_SHOWN = 5


def __getattr__(name: str) -> Any:
    if name in INTERFACE:
        return getattr(importlib.import_module(f"finetuning.{INTERFACE[name]}"), name)
    raise AttributeError(f"data_processing has no {name}")


def main() -> None:
    arguments = parse_arguments()
    settings = load_settings({"device": arguments.device} if arguments.device else None)
    modes = {"prepare": prepare, "encode": encode, "direct": direct, "info": info, "check": check}
    modes[arguments.mode](settings, arguments)


def prepare(settings: Settings, arguments: argparse.Namespace) -> None:
    """The dataset's splits -> JSONL files with codes."""
    from finetuning.preparer import JSONLDataPreparer, device_of_this_process
    from finetuning.processes import launched_processes

    if arguments.output_jsonl and not arguments.split:
        raise UserError("--output_jsonl names one file; say which split goes there with --split")
    device = device_of_this_process(settings)
    preparer = JSONLDataPreparer(
        output_dir="data",
        device=device,
        settings=settings,
        processes=launched_processes(device),
        max_clips_per_batch=arguments.batch_size,
        force=arguments.force,
    )
    if arguments.split:
        outputs = [preparer.prepare_split(arguments.split, arguments.max_samples, arguments.output_jsonl)]
    else:
        outputs = preparer.prepare_all_splits(arguments.max_samples).values()
    for output in outputs if preparer.is_main else ():
        show_info(settings, output)


def encode(settings: Settings, arguments: argparse.Namespace) -> None:
    """Raw JSONL -> JSONL with codes, and with copies where AUGMENT_COPIES asks for them (but for VALIDATION_JSONL)."""
    from finetuning.augment import Augmentation
    from finetuning.base_model import resolve_base
    from finetuning.encode_rows import encode_jsonl, encoded_path
    from finetuning.manifest import RowFormat
    from finetuning.preparer import decoding_workers, device_of_this_process
    from finetuning.processes import launched_processes

    input_jsonl = arguments.input_jsonl or settings.train_jsonl
    is_validation = input_jsonl.resolve() == settings.validation_jsonl.resolve()
    augmentation = None if is_validation else Augmentation.from_settings(settings)
    own_output = encoded_path(input_jsonl, arguments.max_samples, is_augmented=augmentation is not None)
    device = device_of_this_process(settings)
    processes = launched_processes(device)
    base = resolve_base(settings)
    output = encode_jsonl(
        input_jsonl,
        arguments.output_jsonl or own_output,
        base.codec_folder,
        RowFormat.from_settings(settings, base.special_tokens()),
        device=device,
        setting="--input_jsonl" if arguments.input_jsonl else "TRAIN_JSONL",
        max_rows=arguments.max_samples,
        max_clips_per_batch=arguments.batch_size,
        num_workers=decoding_workers(settings),
        force=arguments.force,
        processes=processes,
        augmentation=augmentation,
    )
    if processes.is_main:
        print(f"rows with codes: {output}")
        show_info(settings, output)


def direct(settings: Settings, arguments: argparse.Namespace) -> None:
    """Streams some rows of the dataset and shows what training would get."""
    from finetuning.library import HFDirectDataLoader

    start, seconds, count = time.monotonic(), 0.0, 0
    stream = HFDirectDataLoader(
        settings.dataset_name,
        arguments.split or settings.train_split,
        settings.tokenizer_path,
        arguments.max_samples,
        settings=settings,
    )
    for count, item in enumerate(stream, 1):
        seconds += len(item["audio"]) / item["sr"]
        if count <= NUM_SHOWN:
            frames = f"{len(item['audio_codes'])} frames"
            print(f'row {item["index"] + 1}: {item["speaker"]}, {item["language"]}, {frames}, "{item["text"][:60]}"')
    wall_seconds = time.monotonic() - start
    print(
        f"{count} rows, {seconds / 60:.1f} minutes of audio in {wall_seconds:.1f} s: {count / wall_seconds:.1f} rows/s"
    )


def info(settings: Settings, arguments: argparse.Namespace) -> None:
    """Prints what a JSONL holds."""
    show_info(settings, arguments.input_jsonl or settings.train_jsonl)


def show_info(settings: Settings, jsonl: Path) -> None:
    from finetuning.encode_rows import dataset_info, format_info
    from finetuning.manifest import RowFormat

    print(format_info(dataset_info(jsonl, RowFormat.from_settings(settings))))


def check(settings: Settings, arguments: argparse.Namespace) -> None:
    """Judges the rows of a JSONL; writes the report and, where asked for, mended rows."""
    from finetuning.check_rows import Mending, check_jsonl

    jsonl, setting = arguments.input_jsonl or settings.train_jsonl, "TRAIN_JSONL"
    if arguments.input_jsonl:
        setting = "--input_jsonl"
    mending = Mending(arguments.output_jsonl, arguments.trim_silence, arguments.loudness, arguments.drop_flagged)
    check_jsonl(settings, jsonl, mending, setting=setting, max_rows=arguments.max_samples)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", required=True, choices=["prepare", "encode", "direct", "info", "check"])
    parser.add_argument("--split", help="prepare, direct: the split; default all (prepare) or TRAIN_SPLIT (direct)")
    parser.add_argument("--input_jsonl", type=Path, help="encode, info, check: default TRAIN_JSONL")
    parser.add_argument("--output_jsonl", type=Path, help=OUTPUT_HELP)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu", "mps"], help="default DEVICE")
    parser.add_argument("--max_samples", type=whole_number, help="only the first so many rows")
    parser.add_argument("--batch_size", type=whole_number, default=32, help="clips per batch of the codec (default 32)")
    parser.add_argument("--force", action="store_true", help="make again what an earlier run made")
    mending = parser.add_argument_group("mending (check; off by default, the input is never changed)")
    mending.add_argument("--trim_silence", action="store_true", help="cut silence off both ends of the clips")
    mending.add_argument("--loudness", type=float, metavar="LUFS", help="bring the clips to this loudness, such as -23")
    mending.add_argument("--drop_flagged", action="store_true", help=DROP_FLAGGED_HELP)
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
