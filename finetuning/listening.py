"""How good generated speech is: whose voice, how fast, whether it ends, which words, how natural.

Every figure is of one sample against its yardstick (``measure_each``); ``means`` is over the samples that have it.
What cannot be computed (no speaker encoder, no speech recogniser, nothing audible) is absent and said once: never a
made-up number.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from finetuning.audio import SAMPLE_RATE_HZ, AudioError, check_waveform
from finetuning.codec import FRAMES_PER_SECOND
from finetuning.console import say
from finetuning.quality import loud_blocks, silent_edges_seconds
from finetuning.row_index import Manifest

#: Shorter speech gives no rate, of a sample or of training data.
MIN_SPEECH_SECONDS = 0.1
#: Marks within words that recognisers write or leave out: straight, curly and modifier apostrophes, accents in their
#: place. They go before NFKC, which makes a blank of the acute accent.
_WITHOUT_APOSTROPHES = str.maketrans("", "", "'\u2018\u2019\u02bc\u02bb`\u00b4\uff07")
#: How a JSON number looks behind its key in the column ``measures``; json.dumps wrote it.
_NUMBER = r'"{}": (?P<value>-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)'

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Spoken:
    """One generated utterance.

    Attributes:
        text: what was to be said.
        speaker: in any case.
        waveform: (num_samples,) float32 at 24 kHz.
        num_codec_frames: that it was decoded from.
        stopped: whether generation ended by itself, not at its limit.
    """

    text: str
    speaker: str
    waveform: np.ndarray
    num_codec_frames: int
    stopped: bool


@dataclass(frozen=True)
class Yardstick:
    """What speech is measured against.

    Attributes:
        encode: waveform at 24 kHz -> (H,) speaker vector; None where the base has no speaker encoder.
        vectors: a speaker's lower-case name -> (H,), of the same encoder.
        characters_per_second: a speaker's lower-case name -> rate of the training data; see the function of that name.
        recognize: waveforms at 24 kHz -> what was understood; None without ASR_MODEL.
        opinion: waveform at 24 kHz -> predicted opinion score, 1 to 5; None without MOS_MODEL.
        failures: what a judge failed to measure -> why, once for each sample that lacks it for that reason.
    """

    encode: Callable[[np.ndarray], np.ndarray] | None
    vectors: Mapping[str, np.ndarray]
    characters_per_second: Mapping[str, float]
    recognize: Callable[[Sequence[np.ndarray]], list[str]] | None
    opinion: Callable[[np.ndarray], float] | None
    failures: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _said: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def num_failures(self) -> int:
        """How often any judge has failed so far."""
        return sum(map(len, self.failures.values()))

    def say_once(self, message: str) -> None:
        """Tells why something is absent, the first time only."""
        if message not in self._said:
            self._said.add(message)
            say(message)


# ------------------------------------------------------------------------------------------------------- measuring


def means(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every figure over the samples that have it."""
    names = dict.fromkeys(name for of_sample in figures for name in of_sample)
    return {name: float(np.mean([of[name] for of in figures if name in of])) for name in names}


def measure_each(spoken: Sequence[Spoken], yardstick: Yardstick) -> list[dict[str, float]]:
    """The figures of each sample, of these what can be computed:

    seconds: duration.
    eos_rate: 1.0 where generation ended by itself, else 0.0.
    silence_share: share of the duration that is silence or noise, pauses and edges; 1.0 where nothing is audible.
    speaker_embedding_similarity: cosine of the sample's speaker vector and its speaker's, -1 to 1.
    speech_rate_ratio: letters and digits a second of speech, without the silence at the edges, over the same of the
        speaker's training data.
    wer, cer: errors for each word and each character of the text, see ``error_rates``. A sample in which nothing is
        audible counts as one that said nothing, and is not shown to the recogniser (which may hear words in silence).
    mos: predicted opinion score, 1 to 5.
    """
    audible = [_is_audible(sample.waveform) for sample in spoken]
    heard = _recognized(spoken, audible, yardstick)
    return [
        _figures(sample, is_audible, understood, yardstick)
        for sample, is_audible, understood in zip(spoken, audible, heard, strict=True)
    ]


def _figures(sample: Spoken, is_audible: bool, understood: str | None, yardstick: Yardstick) -> dict[str, float]:
    figures = {
        "seconds": len(sample.waveform) / SAMPLE_RATE_HZ,
        "eos_rate": float(sample.stopped),
        "silence_share": silence_share(sample.waveform) if is_audible else 1.0,
    }
    if is_audible:
        candidates = {
            "speaker_embedding_similarity": _similarity(sample, yardstick),
            "speech_rate_ratio": _rate_ratio(sample, yardstick),
            "mos": _opinion(sample, yardstick),
        }
        figures |= {
            name: float(value) for name, value in candidates.items() if value is not None and np.isfinite(value)
        }
    else:
        yardstick.say_once("a sample without audible speech has no speaker similarity, speech rate or mos")
    if understood is not None:
        figures |= error_rates(sample.text, understood)
    return figures


def _is_audible(waveform: np.ndarray) -> bool:
    """Whether it holds what a clip of training data must hold: samples that are numbers, for long and loud enough."""
    try:
        check_waveform(waveform)
    except AudioError:
        return False
    return True


def silence_share(waveform: np.ndarray) -> float:
    """Share of (num_samples,) at 24 kHz that is no louder than silence or noise, in blocks of 10 ms, 0 to 1."""
    loud = loud_blocks(waveform)
    return 1.0 - float(loud.mean()) if len(loud) else 1.0


# ------------------------------------------------------------------------------------------------------- the voice


def _similarity(sample: Spoken, yardstick: Yardstick) -> float | None:
    name = "speaker_embedding_similarity"
    if yardstick.encode is None:
        yardstick.say_once(f"{name} is not measured: there is no speaker encoder (SPEAKER_ENCODER_PATH names one)")
        return None
    vector = yardstick.vectors.get(sample.speaker.lower())
    if vector is None:
        yardstick.say_once(f'{name} is not measured for speaker "{sample.speaker}", which has no vector')
        return None
    encoded = _asked(yardstick, name, lambda: yardstick.encode(sample.waveform))
    return None if encoded is None else cosine(encoded, vector)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of the angle between two (H,) vectors; NaN where one is zero."""
    one, other = np.asarray(one, np.float64).reshape(-1), np.asarray(other, np.float64).reshape(-1)
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / norms if norms else float("nan")


def _opinion(sample: Spoken, yardstick: Yardstick) -> float | None:
    if yardstick.opinion is None:  # it is optional, and asked for by a setting
        return None
    return _asked(yardstick, "mos", lambda: float(yardstick.opinion(sample.waveform)))


def _asked(yardstick: Yardstick, what: str, ask: Callable[[], _Result]) -> _Result | None:
    """A judge's answer on one sample; None where it fails: a judge (another model, beside the training on its GPU)
    costs no run."""
    try:
        return ask()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        yardstick.failures.setdefault(what, []).append(f"{type(error).__name__}: {reason}")
        yardstick.say_once(f"{what} could not be measured ({type(error).__name__}: {reason})")
        return None


# -------------------------------------------------------------------------------------------------------- the rate


def _rate_ratio(sample: Spoken, yardstick: Yardstick) -> float | None:
    trained = yardstick.characters_per_second.get(sample.speaker.lower())
    if not trained:
        yardstick.say_once(
            f'speech_rate_ratio is not measured for speaker "{sample.speaker}", whose training data gives no rate'
        )
        return None
    seconds = len(sample.waveform) / SAMPLE_RATE_HZ - sum(silent_edges_seconds(sample.waveform))
    num_characters = count_characters(sample.text)
    if seconds < MIN_SPEECH_SECONDS or not num_characters:
        return None
    return num_characters / seconds / trained


def count_characters(text: str) -> int:
    """Letters and digits of all scripts; marks above them do not count, so that é is one however it is encoded."""
    return sum(unicodedata.category(character)[0] in "LN" for character in text)


def characters_per_second(manifest: Manifest) -> dict[str, float]:
    """Letters and digits a second of speech, over all rows of each speaker: lower-case name -> rate.

    The length of the speech is that of ``measures`` without the silence at the edges. Of a speaker none of whose rows
    has these, it is that of the codec frames, with the silence; this is said. Altered copies do not count where there
    are others, since their speed may have been changed. Speakers whose rows have neither are absent.
    """
    names, speakers = manifest.labels("speaker")
    keys = [name.lower() for name in names]  # no two differ in case only, see ``check_speaker_names``
    characters = manifest.computed("text", _count_in_arrow)
    spoken = _speech_seconds(manifest)
    with_silence = manifest.column("num_codec_frames") / FRAMES_PER_SECOND
    is_original = ~manifest.has("augmentation")

    by_measures = _rates(speakers, characters, spoken, is_original, len(keys))
    by_frames = _rates(speakers, characters, with_silence, is_original, len(keys))
    if unmeasured := [keys[speaker] for speaker in by_frames if speaker not in by_measures]:
        shown = ", ".join(unmeasured[:3]) + (f" and {len(unmeasured) - 3} more" if len(unmeasured) > 3 else "")
        say(
            f"speech rate of {shown}: the rows were not measured when they were encoded, so silence at the edges "
            "counts as speech, and speech_rate_ratio comes out a little higher"
        )
    rates = by_frames | by_measures
    return {keys[speaker]: rates[speaker] for speaker in sorted(rates)}


def _rates(
    speakers: np.ndarray, characters: np.ndarray, seconds: np.ndarray, is_original: np.ndarray, num_speakers: int
) -> dict[int, float]:
    """Speaker -> characters a second, of those that have any; (num_rows,) each."""
    is_usable = (characters > 0) & (seconds >= MIN_SPEECH_SECONDS) & (speakers >= 0)  # NaN is not
    has_originals = np.bincount(speakers[is_usable & is_original], minlength=num_speakers) > 0
    is_used = is_usable & (is_original | ~has_originals[speakers])
    totals = [
        np.bincount(speakers[is_used], values[is_used], minlength=num_speakers) for values in (characters, seconds)
    ]
    return {int(speaker): float(totals[0][speaker] / totals[1][speaker]) for speaker in np.flatnonzero(totals[1])}


def _count_in_arrow(texts: Any) -> Any:
    """``count_characters`` of an Arrow array of texts."""
    import pyarrow.compute as pc

    return pc.subtract(pc.utf8_length(texts), pc.count_substring_regex(texts, r"[^\p{L}\p{N}]"))


def _speech_seconds(manifest: Manifest) -> np.ndarray:
    """(num_rows,) from ``measures``, without the silence at the edges; NaN where there are none."""
    names = ("seconds", "leading_silence_seconds", "trailing_silence_seconds")
    seconds, leading, trailing = (
        manifest.computed("measures", lambda column, n=name: _numbers(column, n)) for name in names
    )
    return seconds - leading - trailing


def _numbers(column: Any, key: str) -> Any:
    """The numbers under a key of JSON texts, as an Arrow array; null where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.struct_field(pc.extract_regex(column, _NUMBER.format(key)), "value").cast(pa.float64())


# ------------------------------------------------------------------------------------------------------- the words


def _recognized(spoken: Sequence[Spoken], audible: Sequence[bool], yardstick: Yardstick) -> list[str | None]:
    """What was understood of each sample: "" of what nobody can hear, None where nobody was asked, or answered.

    Each is asked for alone, so that one that the recogniser fails on costs only itself.
    """
    recognize = yardstick.recognize
    if recognize is None:  # it is optional, and asked for by a setting
        return [None] * len(spoken)
    return [
        _asked(yardstick, "wer and cer", lambda s=sample: recognize([s.waveform])[0]) if is_audible else ""
        for sample, is_audible in zip(spoken, audible, strict=True)
    ]


def error_rates(text: str, understood: str) -> dict[str, float]:
    """``wer`` and ``cer`` of normalised texts; {} where the text holds no word.

    Word errors (substituted, left out, put in) for each word of the text, and character errors for each character,
    without white space: a recogniser may join or part words, and not every script parts them. Both can exceed 1.
    """
    import jiwer

    wanted, found = normalized(text), normalized(understood)
    if not wanted:
        return {}
    cer = jiwer.cer(wanted.replace(" ", ""), found.replace(" ", ""))
    return {"wer": float(jiwer.wer(wanted, found)), "cer": float(cer)}


def normalized(text: str) -> str:
    """A text as it is compared: NFKC, without case (``str.casefold``), words parted by one blank.

    Punctuation and symbols part words, but apostrophes vanish: "Don't" is "dont", "well-known" two words. Accents, tone
    marks and vowel signs stay. Digits stay as they are: "3" is not "three", so spell numbers out in the sample texts.
    """
    text = unicodedata.normalize("NFKC", text.translate(_WITHOUT_APOSTROPHES))
    text = unicodedata.normalize("NFKC", text.casefold())  # folding takes some letters apart
    return " ".join("".join(map(_compared, text)).split())


def _compared(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":  # invisible, such as joiners
        return ""
    return " " if category[0] in "PSZC" else character
