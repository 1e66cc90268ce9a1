"""Which of some sentences was said, by an offline recogniser if one is installed (pip install pocketsphinx)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from finetuning.audio import SAMPLE_RATE_HZ, resample

_RATE_HZ = 16_000
#: Silence before and behind, which the recogniser needs to find the beginning and the end.
_SILENCE = np.zeros(_RATE_HZ // 4, dtype=np.float32)


def sentence_picker(sentences: Sequence[str]) -> Callable[[np.ndarray], int | None] | None:
    """A function from a 24 kHz waveform to the number of the sentence that it is taken for, or None for none of them;
    None when pocketsphinx is not installed."""
    try:
        from pocketsphinx import Decoder, get_model_path
    except ImportError:
        return None
    dictionary = Path(get_model_path()) / "en-us" / "cmudict-en-us.dict"
    known = {line.split()[0] for line in dictionary.read_text(encoding="utf-8").splitlines() if line.strip()}
    spelt = [" ".join(word for word in words_of(sentence) if word in known) for sentence in sentences]
    grammar = f"#JSGF V1.0;\ngrammar sentences;\npublic <sentence> = {' | '.join(spelt)} ;\n"
    decoder = Decoder(lm=None, loglevel="FATAL")
    decoder.add_jsgf_string("sentences", grammar)
    decoder.activate_search("sentences")

    def pick(waveform: np.ndarray) -> int | None:
        clip = np.concatenate([_SILENCE, resample(waveform, SAMPLE_RATE_HZ, _RATE_HZ), _SILENCE])
        decoder.start_utt()
        decoder.process_raw((clip.clip(-1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        heard = decoder.hyp()
        return spelt.index(heard.hypstr) if heard and heard.hypstr in spelt else None

    return pick


def words_of(sentence: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.sub(r"[^a-z' ]", " ", sentence.lower()).split()
