"""The layout of a training row: the only place that knows which id stands where.

Stock ``qwen_tts`` builds its input in ``Qwen3TTSForConditionalGeneration.generate()`` (modeling_qwen3_tts.py): two
channels of embeddings, text and codec, aligned and added. This module gives the same two channels as ids, for the whole
row (prompt and frames). Non-streaming layout, n text tokens, T frames, a named language in brackets::

    position        text channel                    codec channel
    (instruct       projected instruction           nothing)
    0 … 2           <|im_start|> assistant \\n       nothing
    3 …             tts_pad                         nothink [think] , think_bos , [language] , think_eos
    next            tts_pad                         speaker vector (left out without a speaker)
    next            tts_bos                         codec_pad
    next n          text tokens                     codec_pad
    next            tts_eos                         codec_pad
    next            tts_pad                         codec_bos
    next T          tts_pad                         the frame's 16 codes, summed

The streaming layout is the same up to tts_bos; then the text runs beside the frames, a token a frame::

    next            the first text token            codec_bos
    next T          the other text tokens, then     the frame's 16 codes, summed
                    tts_eos, then tts_pad for ever

In context (``generate_voice_clone`` with a reference's text) the reference's text stands before the text, as one run of
tokens, and the reference's R frames stand between codec_bos and the T frames, in either layout. They are no labels.

Position p predicts what stands at p+1; behind the last frame stands codec_eos, which is a label and never an input.
Everything here is a pure function of its arguments; ids come from the base's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Label of positions without a loss (torch's default ignore_index).
IGNORE = -100
#: Codec-channel entry of positions that carry no codec embedding of their own (role, instruction, speaker vector).
NO_CODEC = -1
#: What stock cuts off the tokenized assistant turn: three role tokens before the text, five tokens behind it.
NUM_ROLE_TOKENS, NUM_CLOSING_TOKENS = 3, 5
#: What it cuts off behind the text of a reference, before which the same role stands.
NUM_REFERENCE_CLOSING_TOKENS = 2

#: ISO 639-1 and 639-3 codes of the languages that Qwen3-TTS names in full.
LANGUAGE_CODES = {
    "zh": "chinese", "zho": "chinese", "cmn": "chinese", "en": "english", "eng": "english", "de": "german",
    "deu": "german", "ger": "german", "it": "italian", "ita": "italian", "pt": "portuguese", "por": "portuguese",
    "es": "spanish", "spa": "spanish", "ja": "japanese", "jpn": "japanese", "ko": "korean", "kor": "korean",
    "fr": "french", "fra": "french", "fre": "french", "ru": "russian", "rus": "russian",
}  # fmt: skip


@dataclass(frozen=True)
class LayoutIds:
    """The special ids of one base model, under the names of its configuration."""

    tts_pad: int
    tts_bos: int
    tts_eos: int
    codec_pad: int
    codec_bos: int
    codec_eos: int
    codec_think: int
    codec_nothink: int
    codec_think_bos: int
    codec_think_eos: int
    languages: Mapping[str, int]

    @classmethod
    def from_config(cls, config: Mapping) -> LayoutIds:
        """Reads the ids from the dictionary of a base's config.json."""
        talker = config["talker_config"]
        return cls(
            tts_pad=config["tts_pad_token_id"],
            tts_bos=config["tts_bos_token_id"],
            tts_eos=config["tts_eos_token_id"],
            codec_pad=talker["codec_pad_id"],
            codec_bos=talker["codec_bos_id"],
            codec_eos=talker["codec_eos_token_id"],
            codec_think=talker["codec_think_id"],
            codec_nothink=talker["codec_nothink_id"],
            codec_think_bos=talker["codec_think_bos_id"],
            codec_think_eos=talker["codec_think_eos_id"],
            languages=dict(talker["codec_language_id"] or {}),
        )


@dataclass(frozen=True)
class AlignedIds:
    """One row (or one prompt, then T = 0) as aligned arrays of length L.

    Attributes:
        text: (L,) int64, id of the text table at every position.
        codec: (L,) int64, id of the talker's codec table, or NO_CODEC. On frames this is the code of codebook 0.
        speaker_position: where the speaker vector stands in the codec channel, or -1.
        codes: (R + T, num_codebooks) int64; codebooks 1 and up are added to the codec channel of the last R + T
            positions.
        labels: (L,) int64; ``labels[p]`` is the codec id at p+1 where that is one of the T frames or codec_eos, else
            IGNORE.
        trailing: of a prompt, ids of the text channel beside the frames to come; tts_pad stands behind them.
        num_reference_frames: R, of the reference in context; 0 without one.
    """

    text: np.ndarray
    codec: np.ndarray
    speaker_position: int
    codes: np.ndarray
    labels: np.ndarray
    trailing: Sequence[int] = ()
    num_reference_frames: int = 0

    @property
    def first_frame(self) -> int:
        """Position of the first frame, be it the reference's."""
        return len(self.text) - len(self.codes)


# ---------------------------------------------------------------------------------------------------- text to ids


def assistant_turn(text: str) -> str:
    """The string that stock qwen-tts tokenizes for a text (``_build_assistant_text``)."""
    return f"<|im_start|>assistant\n{text}<|im_end|>\n<|im_start|>assistant\n"


def reference_turn(text: str) -> str:
    """The string that stock qwen-tts tokenizes for what a reference says (``_build_ref_text``)."""
    return f"<|im_start|>assistant\n{text}<|im_end|>\n"


def instruct_turn(instruct: str) -> str:
    """The string that stock qwen-tts tokenizes for an instruction (``_build_instruct_text``)."""
    return f"<|im_start|>user\n{instruct}<|im_end|>\n"


def resolve_language(name: str | None, known: Mapping[str, int]) -> str | None:
    """The base's name of a language, or None for Auto.

    Takes full names and ISO 639 codes with or without a region ("English", "en", "en-GB"), in any case.

    Raises:
        KeyError: the base has no such language.
    """
    key = (name or "auto").strip().lower()
    if key in ("", "auto"):
        return None
    if key in known:
        return key
    code = key.replace("_", "-").split("-")[0]
    full_name = LANGUAGE_CODES.get(code, code)
    if full_name in known:
        return full_name
    raise KeyError(name)


def find_language(name: str | None, known: Mapping[str, int]) -> str | None:
    """``resolve_language``, with None for languages that the base does not have as well."""
    try:
        return resolve_language(name, known)
    except KeyError:
        return None


def language_codec_id(language: str | None, ids: LayoutIds, dialect: str | None = None) -> int | None:
    """The id in the codec prefix, or None for Auto. A dialect speaker's own id stands under Auto and Chinese."""
    if dialect and language in (None, "chinese"):
        return ids.languages[dialect]
    return None if language is None else ids.languages[language]


# --------------------------------------------------------------------------------------------------- ids to layout


@dataclass(frozen=True)
class InContext:
    """A reference in the prompt.

    Attributes:
        text_ids: the tokenized ``reference_turn``, role and closing tokens included.
        codes: (R, num_codebooks).
    """

    text_ids: np.ndarray
    codes: np.ndarray


def build_prompt(
    assistant_ids: np.ndarray,
    ids: LayoutIds,
    *,
    instruct_ids: np.ndarray | None = None,
    language_id: int | None = None,
    has_speaker: bool = True,
    is_streaming: bool = False,
    reference: InContext | None = None,
) -> AlignedIds:
    """The prompt, from the instruction to codec_bos or the reference's last frame; see the module's tables.

    Args:
        assistant_ids: the tokenized ``assistant_turn``, role and closing tokens included.
        instruct_ids: the tokenized ``instruct_turn``, or None.
        language_id: from ``language_codec_id``.
    """
    instruct = [] if instruct_ids is None else list(instruct_ids)
    tag = [ids.codec_nothink, ids.codec_think_bos, ids.codec_think_eos]
    if language_id is not None:
        tag = [ids.codec_think, ids.codec_think_bos, language_id, ids.codec_think_eos]
    head = [NO_CODEC] * (len(instruct) + NUM_ROLE_TOKENS) + tag
    speaker = [NO_CODEC] if has_speaker else []
    reference_codes = np.zeros((0, 0), dtype=np.int64)
    spoken = [*assistant_ids[NUM_ROLE_TOKENS:-NUM_CLOSING_TOKENS], ids.tts_eos]
    if reference is not None:
        reference_codes = np.asarray(reference.codes, dtype=np.int64)
        spoken = [*reference.text_ids[NUM_ROLE_TOKENS:-NUM_REFERENCE_CLOSING_TOKENS], *spoken]
    acoustic = [ids.codec_bos, *(frame[0] for frame in reference_codes)]
    # Streaming: text and codec_bos start together; else the whole text comes first.
    before_bos, beside = ([], spoken) if is_streaming else (spoken, [])
    beside_acoustic, trailing = beside[: len(acoustic)], beside[len(acoustic) :]
    codec = [*head, *speaker, *[ids.codec_pad] * (1 + len(before_bos)), *acoustic]
    text = [
        *instruct,
        *assistant_ids[:NUM_ROLE_TOKENS],
        *[ids.tts_pad] * (len(tag) + len(speaker)),
        ids.tts_bos,
        *before_bos,
        *beside_acoustic,
        *[ids.tts_pad] * (len(acoustic) - len(beside_acoustic)),
    ]
    assert len(text) == len(codec)
    return AlignedIds(
        text=np.asarray(text, dtype=np.int64),
        codec=np.asarray(codec, dtype=np.int64),
        speaker_position=len(head) if has_speaker else -1,
        codes=reference_codes,
        labels=np.full(len(text), IGNORE, dtype=np.int64),
        trailing=trailing,
        num_reference_frames=len(reference_codes),
    )


def append_frames(prompt: AlignedIds, codes: np.ndarray, ids: LayoutIds) -> AlignedIds:
    """The prompt followed by its T frames, with labels; ``codes`` is (T, num_codebooks)."""
    codes = np.asarray(codes, dtype=np.int64)
    num_frames = len(codes)
    labels = np.full(len(prompt.text) + num_frames, IGNORE, dtype=np.int64)
    labels[len(prompt.text) - 1 :] = [*codes[:, 0], ids.codec_eos]
    beside = np.full(num_frames, ids.tts_pad, dtype=np.int64)
    beside[: len(prompt.trailing)] = prompt.trailing[:num_frames]
    return AlignedIds(
        text=np.concatenate([prompt.text, beside]),
        codec=np.concatenate([prompt.codec, codes[:, 0]]),
        speaker_position=prompt.speaker_position,
        codes=np.concatenate([prompt.codes, codes]) if prompt.num_reference_frames else codes,
        labels=labels,
        num_reference_frames=prompt.num_reference_frames,
    )
