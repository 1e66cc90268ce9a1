"""The round-trip check: does stock greedy generation give back the codes that were trained on?

A falling loss proves nothing; reproduction does. This file imports nothing of the project, so that it can also judge a
checkpoint in a process that has only qwen-tts::

    python finetuning/roundtrip.py SPEC.json …     # a line for each: {"reproduced": …, "right_length": …, "rows": […]}

SPEC is {"checkpoint": folder, "rows": [{"text", "audio_codes", "speaker", optional "language", "instruct",
"is_streaming"}]}, and optionally "wav_folder", where the generated speech of each row is written. Rows for a base
checkpoint have "ref_audio" instead of "speaker", and "ref_text" where it stands in their context.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Room behind the last frame for generation to go on instead of stopping.
SPARE_FRAMES = 30
#: "Greedy" in this project: no sampling in either model and no repetition penalty.
GREEDY = {"do_sample": False, "subtalker_dosample": False, "repetition_penalty": 1.0}


def judge(
    checkpoint: str, rows: Sequence[Mapping[str, Any]], wav_folder: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Generates every row with stock qwen-tts in fp32 and counts codes.

    Returns:
        ``reproduced`` (share of all codes), ``right_length`` (share of rows that stopped by themselves at frame T), and
        ``rows``, the share of each.
    """
    import torch
    from qwen_tts import Qwen3TTSModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # each call of generate would warn about the pad token that stock leaves unset
    stock = Qwen3TTSModel.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa", device_map=device
    )
    generated = [_generate(stock, row) for row in rows]
    wanted = [torch.tensor(row["audio_codes"]) for row in rows]
    right = [_num_equal(got, want) for got, want in zip(generated, wanted, strict=True)]
    if wav_folder:
        _write_wavs(stock, generated, Path(wav_folder))
    stopped = sum(len(got) == len(want) for got, want in zip(generated, wanted, strict=True))
    return {
        "reproduced": sum(right) / sum(want.numel() for want in wanted),
        "right_length": stopped / len(rows),
        "rows": [count / want.numel() for count, want in zip(right, wanted, strict=True)],
    }


def _generate(stock: Any, row: Mapping[str, Any]) -> Any:
    """(T', 16) codes on the CPU, from the calls that ``generate_custom_voice`` or ``generate_voice_clone`` make."""
    instruct = row.get("instruct")
    voice = (
        {"speakers": [row["speaker"]]} if "speaker" in row else _cloned(stock, row["ref_audio"], row.get("ref_text"))
    )
    codes, _ = stock.model.generate(
        input_ids=stock._tokenize_texts([stock._build_assistant_text(row["text"])]),
        instruct_ids=[stock._tokenize_texts([stock._build_instruct_text(instruct)])[0] if instruct else None],
        languages=[row.get("language") or "Auto"],
        non_streaming_mode=not row.get("is_streaming"),
        max_new_tokens=len(row["audio_codes"]) + SPARE_FRAMES,
        **voice,
        **GREEDY,
    )
    return codes[0].cpu()


def _cloned(stock: Any, ref_audio: str, ref_text: str | None) -> dict[str, Any]:
    """The voice of a reference, which stands in context where its text is given."""
    items = stock.create_voice_clone_prompt(ref_audio, ref_text, x_vector_only_mode=not ref_text)
    ref_ids = stock._tokenize_texts([stock._build_ref_text(ref_text)]) if ref_text else None
    return {"voice_clone_prompt": stock._prompt_items_to_voice_clone_prompt(items), "ref_ids": ref_ids}


def _num_equal(got: Any, want: Any) -> int:
    shared = min(len(got), len(want))
    return int((got[:shared] == want[:shared]).sum())


def _write_wavs(stock: Any, generated: Sequence[Any], folder: Path) -> None:
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    for number, codes in enumerate(generated, 1):
        if len(codes):
            waveforms, rate = stock.model.speech_tokenizer.decode([{"audio_codes": codes}])
            soundfile.write(str(folder / f"clip-{number}.wav"), waveforms[0], rate)


if __name__ == "__main__":
    for spec_file in sys.argv[1:]:
        spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
        print(json.dumps(judge(spec["checkpoint"], spec["rows"], spec.get("wav_folder"))))
