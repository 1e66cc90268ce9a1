"""Fine-tunes Qwen3-TTS with the options of the official script, on the engine of train.py.

    python finetuning/prepare_data.py --input_jsonl train_raw.jsonl --output_jsonl train_with_codes.jsonl
    python finetuning/sft_12hz.py --train_jsonl train_with_codes.jsonl --speaker_name anna --num_epochs 10
    accelerate launch --num_processes=4 finetuning/sft_12hz.py --train_jsonl train_with_codes.jsonl
    python finetuning/sft_12hz.py --train_jsonl voices/english_voice/train_raw.jsonl --init_model_path tiny  # on CPU

It works from any folder, this one too; relative paths are those of the folder where it is called. Rows without codes
are encoded first. Each epoch leaves checkpoint-epoch-N/ (N from 0) in the output folder, which stock qwen-tts loads;
all of them are kept. last/ is the newest, best/ that of the lowest training loss, and state/ is for resuming: it is
written every 15 minutes and at the end.

The same command again goes on where it stopped (Ctrl-C saves first), with more --num_epochs beyond its end. Another run
in the output folder is refused and never written over, unless --overwrite_output True replaces it.

.env and settings in the environment are not read; train.py has all other settings.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the project instead of this folder, whose files have names that others have, too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from finetuning.errors import UserError, run_main
from finetuning.official import (
    TRAINING_OPTIONS,
    options_named,
    say_names,
    say_what_trains,
    training_parser,
    training_settings,
)
from train import train


def main() -> None:
    options = training_parser(__doc__).parse()
    settings = training_settings(options)
    if not settings.train_jsonl.is_file():
        raise UserError(f"--train_jsonl: {settings.train_jsonl} does not exist; prepare_data.py makes it")
    say_names()
    say_what_trains(settings, options)
    with options_named(TRAINING_OPTIONS, {"--train_jsonl": settings.train_jsonl}):
        train(settings)


if __name__ == "__main__":
    run_main(main)
