"""Fine-tunes Qwen3-TTS as `.env` says.

./uv_train.sh .env.demo                             # install everything, and teach the embedded model a voice (CPU)
python train.py                                     # one process
accelerate launch --num_processes=4 train.py        # four
ENV_FILE=my_voice.env BATCH_SIZE=4 python train.py  # another file; the environment is stronger than the file
"""

import argparse

from finetuning.console import say
from finetuning.errors import UserError, run_main
from finetuning.settings import Settings, load_settings
from finetuning.stock import quick_imports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()  # no arguments: settings come from the environment and the settings file
    settings = load_settings()
    say(settings.describe())
    train(settings)


def train(settings: Settings) -> None:
    """The run from settings to checkpoints; heavy imports come after the settings were checked."""
    from finetuning.training_rows import check_files

    check_files(settings)
    with quick_imports():
        from finetuning import briefing, building, claiming, session, starting

    base, device = starting.check_inputs(settings)
    starting.check_measures(settings, base)
    accelerator = starting.start(settings, device)
    if accelerator.is_main_process and not settings.prepare_only:
        starting.check_upload(settings)
    settings = starting.apply_memory_profile(settings, base, accelerator)
    try:
        resume = starting.choose_start(settings, base, accelerator)
        rows = starting.open_rows(settings, base, accelerator)
        starting.check_rows(settings, base, rows, accelerator)
        run = building.build_run(settings, base, rows, accelerator, resume)
        briefing.brief(run, rows)
        if settings.prepare_only:
            session.walk_once(run)
            return
        claiming.claim_output_folder(run)
    except UserError:
        claiming.discard_rows(settings)
        raise
    session.train(run)


if __name__ == "__main__":
    run_main(main)
