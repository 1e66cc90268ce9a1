"""Speaks with a checkpoint, through the stock qwen-tts package alone.

python synthesize.py --checkpoint output/best --text "Good morning."
python synthesize.py --checkpoint output/best --text_file lines.txt --output spoken/ --language English --seed 1
python synthesize.py --checkpoint BASE --ref_audio me.wav --ref_text "What I say there." --text "Good morning."
python synthesize.py --checkpoint output_demo/best --text "The king sold the old ship." --streaming_layout   # the demo
"""

import argparse
from pathlib import Path
from typing import Any

from finetuning.errors import UserError, run_main

#: Options of stock generation and the sub-talker's option that goes with each.
GENERATION_OPTIONS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
GREEDY = {"do_sample": False, "subtalker_dosample": False, "repetition_penalty": 1.0}


def main() -> None:
    arguments = parse_arguments()
    texts = read_texts(arguments)
    files = output_files(arguments.output, len(texts))
    model = load(arguments)
    for number, (text, file) in enumerate(zip(texts, files, strict=True)):
        speak(model, text, file, arguments, number)


def read_texts(arguments: argparse.Namespace) -> list[str]:
    """All texts, white space normalised as in training, empty lines left out."""
    from finetuning.manifest import normalize_text

    texts = list(arguments.text or [])
    if arguments.text_file:
        try:
            texts += arguments.text_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text_file: {arguments.text_file} cannot be read ({type(error).__name__})") from None
    texts = [normalize_text(text) for text in texts if text.strip()]
    if not texts:
        raise UserError("no text to speak; give --text or --text_file with at least one non-empty line")
    return texts


def load(arguments: argparse.Namespace) -> Any:
    """The stock model, on a GPU in bf16 where there is one, else in fp32."""
    from finetuning.base_model import read_base_config, resolve_folder
    from finetuning.codec import check_codec_folder
    from finetuning.disk import check_is_whole

    folder = resolve_folder(arguments.checkpoint, "--checkpoint")
    config = read_base_config(folder, "--checkpoint")
    check_is_whole(folder, "--checkpoint")
    check_codec_folder(folder / "speech_tokenizer")
    arguments.speaker = choose_speaker(arguments, config)
    arguments.language = choose_language(arguments, config)
    import torch

    from finetuning.stock import import_qwen_tts

    on_gpu = torch.cuda.is_available() and arguments.device != "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return import_qwen_tts().Qwen3TTSModel.from_pretrained(
        str(folder), dtype=dtype, device_map="cuda:0" if on_gpu else "cpu", attn_implementation="sdpa"
    )


def choose_speaker(arguments: argparse.Namespace, config: dict[str, Any]) -> str | None:
    """The speaker to use, checked against the checkpoint; a single one needs no --speaker."""
    if config["tts_model_type"] == "base":
        if not arguments.ref_audio:
            raise UserError(f"{arguments.checkpoint} is a base model, which speaks like a reference; give --ref_audio")
        if not arguments.ref_audio.is_file():
            raise UserError(f"--ref_audio: {arguments.ref_audio} does not exist")
        if not arguments.x_vector_only and not arguments.ref_text:
            raise UserError("--ref_audio needs --ref_text (what it says), or --x_vector_only to use its voice alone")
        return None
    names = list(config["talker_config"].get("spk_id") or {})
    if arguments.ref_audio:
        raise UserError(f"--ref_audio is for base models; {arguments.checkpoint} has speakers: {', '.join(names)}")
    if arguments.speaker is None and len(names) != 1:
        raise UserError(f"which speaker? give --speaker, one of: {', '.join(names)}")
    speaker = arguments.speaker or names[0]
    if speaker.lower() not in names:
        raise UserError(f'--speaker: {arguments.checkpoint} has no speaker "{speaker}"; it has: {", ".join(names)}')
    return speaker


def choose_language(arguments: argparse.Namespace, config: dict[str, Any]) -> str:
    """The checkpoint's full name of --language, which may be an ISO code."""
    from finetuning.prompt import resolve_language

    known = config["talker_config"].get("codec_language_id") or {}
    try:
        return resolve_language(arguments.language, known) or "Auto"
    except KeyError:
        raise UserError(
            f"--language: {arguments.checkpoint} has no {arguments.language}; it has Auto, {', '.join(sorted(known))}"
        ) from None


def output_files(output: Path, count: int) -> list[Path]:
    """One file for one text; for several, or for a folder, numbered files."""
    kinds = (".wav", ".flac", ".ogg", ".mp3")
    kind = output.suffix.lower()
    if kind and kind not in kinds:
        raise UserError(f"--output: {output} must end with {', '.join(kinds)}, or be a folder")
    if count == 1 and kind:
        return [output]
    folder, stem = (output.parent, output.stem) if kind else (output, "speech")
    return [folder / f"{stem}_{number:03d}{kind or '.wav'}" for number in range(1, count + 1)]


def speak(model: Any, text: str, file: Path, arguments: argparse.Namespace, number: int) -> None:
    """Generates one text and writes it as a wav file."""
    import soundfile
    import torch

    if arguments.seed is not None:
        torch.manual_seed(arguments.seed + number)
    waveforms, rate = generate(model, text, arguments)
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(file), waveforms[0], rate)
    print(f"{file}: {len(waveforms[0]) / rate:.1f} s  {text}", flush=True)


def generate(model: Any, text: str, arguments: argparse.Namespace) -> tuple[list, int]:
    """Calls the stock generation that fits the checkpoint."""
    options = {name: getattr(arguments, name) for name in GENERATION_OPTIONS if getattr(arguments, name) is not None}
    options |= {f"subtalker_{name}": options[name] for name in ("temperature", "top_p", "top_k") if name in options}
    if arguments.greedy:
        options |= GREEDY
    common = {"language": arguments.language, "non_streaming_mode": not arguments.streaming_layout, **options}
    if arguments.speaker is None:
        reference = {"ref_audio": str(arguments.ref_audio), "ref_text": arguments.ref_text}
        return model.generate_voice_clone(text, **reference, x_vector_only_mode=arguments.x_vector_only, **common)
    return model.generate_custom_voice(text, arguments.speaker, instruct=arguments.instruct, **common)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder or Hub id, such as output/best")
    add("--text", action="append", help="what to say; may be given several times")
    add("--text_file", type=Path, help="one text a line, one wav each")
    add("--output", type=Path, default=Path("speech.wav"), help="wav file, or folder for several (default speech.wav)")
    add("--speaker", help="name of a speaker of the checkpoint, in any case; not needed when it has one")
    add("--language", default="Auto", help="Auto or a language of the checkpoint, such as English")
    add("--instruct", help="how to say it (ignored by 0.6B models)")
    add("--seed", type=int, help="for the same sampling again")
    add("--device", choices=["auto", "cpu"], default="auto")
    add("--greedy", action="store_true", help="no sampling, no repetition penalty")
    add("--temperature", type=float)
    add("--top_p", type=float)
    add("--top_k", type=int)
    add("--repetition_penalty", type=float)
    add("--max_new_tokens", type=int, help="longest speech, in codec frames of 80 ms")
    add("--streaming_layout", action="store_true", help="text is fed frame by frame (non_streaming_mode=False)")
    add("--ref_audio", type=Path, help="base models: the voice to speak with")
    add("--ref_text", help="base models: what the reference says")
    add("--x_vector_only", action="store_true", help="base models: use the reference's voice only, not its speech")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
