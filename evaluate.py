"""Is the voice good? Compares the checkpoints of a run with each other and with the untrained base, in one report.

    python evaluate.py                                          # the run in OUTPUT_DIR -> its evaluation/report.html
    python evaluate.py --checkpoints best last --texts lines.txt --seeds 5
    python evaluate.py --texts "Good morning." "How are you?" --language English --reference me.wav
    ENV_FILE=.env.demo python evaluate.py --seeds 1 --max_new_tokens 60          # the demo, on CPU

Settings (OUTPUT_DIR, device, precision, judges) come from `.env` as for train.py; what the run began with, such as its
validation rows, speakers and layout, it has from its own settings.json. Interrupted work goes on where it stopped:
what was generated is kept in OUTPUT_DIR/evaluation/samples; a checkpoint that has changed is generated anew.
"""

import argparse
from pathlib import Path

from finetuning.errors import run_main, whole_number
from finetuning.metrics import METRICS
from finetuning.settings import load_settings
from finetuning.stock import quick_imports


def main() -> None:
    arguments = parse_arguments()
    settings = load_settings({"device": arguments.device} if arguments.device else None)
    with quick_imports():
        from finetuning.evaluation import evaluate
        from finetuning.evaluation_models import Options
    options = Options(
        output=arguments.output or settings.output_dir / "evaluation",
        checkpoints=arguments.checkpoints,
        texts=arguments.texts,
        references=arguments.reference,
        reference_text=arguments.reference_text,
        num_seeds=arguments.seeds,
        language=arguments.language,
        speakers=arguments.speakers,
        rank_by=arguments.rank_by,
        max_new_tokens=arguments.max_new_tokens,
        with_base=not arguments.no_base,
    )
    evaluate(settings, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoints", nargs="+", default=[], help="names in OUTPUT_DIR, or folders; default all of the run")
    add(
        "--texts",
        nargs="+",
        default=[],
        help="texts, or files with one a line; default some validation texts of the run",
    )
    add("--speakers", nargs="+", default=[], help="default the run's first three")
    add(
        "--reference",
        nargs="+",
        default=[],
        help="audio of the voice, which the base clones (several speakers: name=file); default the run's own",
    )
    add("--reference_text", help="what it says; default REF_TEXT, or what the rows say of it")
    add("--seeds", type=whole_number, default=3, help="how many samples of each text (default 3)")
    add("--language", help="of all texts; default that of their rows, or of the run")
    add(
        "--rank_by",
        choices=[name for name, metric in METRICS.items() if metric.is_of_samples],
        help="default speaker_embedding_similarity where it was measured",
    )
    add(
        "--max_new_tokens",
        type=whole_number,
        help="longest speech, in codec frames of 80 ms; default by the text's length",
    )
    add("--output", type=Path, help="folder of the report and the samples; default OUTPUT_DIR/evaluation")
    add("--device", choices=["auto", "cuda", "cpu", "mps"], help="default DEVICE")
    add("--no_base", action="store_true", help="without the line of the base")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
