"""What is made: the voices, the splits and the sizes of each scale. Everything else in this folder reads them here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from embedded.texts import sentences

#: Variants of espeak-ng whose voices the base learns (`espeak-ng --voices=variant`).
_TRAINING_VARIANTS = (
    "m1 f1 m2 f2 m3 f3 m4 f4 m5 f5 m6 aunty m7 Annie m8 belinda Alex shelby Andy linda Denis Nguyen ed edward Diogo "
    "Hugo adam gustave iven john pablo travis klatt2 Jacky Mario sandro"
)
#: Variants that only measure: no model is trained on them.
HELD_OUT_VARIANTS = ("Henrique", "Lee", "Mike", "max", "marcelo", "grandma", "Andrea", "david")
#: The variant of the demo, which the base never hears either.
DEMO_VARIANT = "steph"

#: Pitch in Hz and rate (`-s`, words a minute) of a variant's voices: the i-th voice of all takes the i-th. A frame
#: has a whole number of periods, and frames more than tokens of text.
_PITCHES_HZ = (100, 175, 125, 200, 150, 225)
_RATES = (128, 120, 134, 124, 130)


@dataclass(frozen=True)
class Voice:
    """A voice is a variant at one pitch and one rate: both stay the same in all its clips.

    Attributes:
        name: also the name of its folder, and the rows' speaker.
        language: of espeak-ng; one accent for all, so that a word is said in one way.
        f0_hz: the pitch of everything that it says, in Hz.
        rate: words a minute.
    """

    name: str
    variant: str
    f0_hz: int
    rate: int
    language: str = "en-us"


@dataclass(frozen=True)
class Scale:
    """How much is made and trained. "Clips" are of some 3 s.

    Attributes:
        voices_per_variant: that many pitches of each variant are voices of their own.
        codec_steps: optimizer steps on continuous latents, on codes, and of the decoder alone.
        encoder_steps: optimizer steps of the speaker encoder.
        talker_steps: optimizer steps of train.py.
    """

    num_variants: int
    voices_per_variant: int
    clips_per_voice: int
    codec_steps: tuple[int, int, int]
    encoder_steps: int
    talker_steps: int


SCALES = {
    # Only to see that everything runs, in minutes; what comes out is noise.
    "smoke": Scale(2, 1, 6, (2, 2, 2), 4, 4),
    "small": Scale(36, 1, 150, (1800, 400, 5000), 600, 10_000),
    "full": Scale(36, 2, 100, (12_000, 6_000, 40_000), 3000, 60_000),
}

#: Sentences that stand in no training set, the same in every scale; the first 30 are the recogniser's.
NUM_HELD_OUT_SENTENCES = 60
#: Clips of each training voice, and of each held-out voice, that say some of them.
HELD_OUT_CLIPS = 2
HELD_OUT_VOICE_CLIPS = 12
#: Clips of the demo's voice: to learn from, and to compare with (held-out sentences).
DEMO_TRAINING_CLIPS = 80
DEMO_TEST_CLIPS = 30
SEED = 9


@dataclass(frozen=True)
class Clip:
    """One clip to be spoken.

    Attributes:
        split: train, held_out_sentences, held_out_voices, demo_train or demo_test.
    """

    voice: Voice
    text: str
    split: str


SPLITS = ("train", "held_out_sentences", "held_out_voices", "demo_train", "demo_test")


def training_voices(scale: Scale) -> list[Voice]:
    """The voices that the base learns."""
    return _voices(_TRAINING_VARIANTS.split()[: scale.num_variants], scale.voices_per_variant)


def held_out_voices(scale: Scale) -> list[Voice]:
    """Voices of variants that no model is trained on: as many in every scale but the smallest."""
    return _voices(HELD_OUT_VARIANTS[: min(len(HELD_OUT_VARIANTS), scale.num_variants)], 2)


def demo_voice() -> Voice:
    """The voice that the demo learns."""
    return Voice("demo", DEMO_VARIANT, 175, 130)


def _voices(variants: Sequence[str], per_variant: int) -> list[Voice]:
    voices = []
    for turn in range(per_variant):
        for variant in variants:
            place = len(voices) + turn  # so that the second voice of a variant has another pitch than the first
            f0_hz, rate = _PITCHES_HZ[place % len(_PITCHES_HZ)], _RATES[place % len(_RATES)]
            voices.append(Voice(f"{variant}_{f0_hz}_{rate}", variant, f0_hz, rate))
    return voices


def all_clips(scale: Scale) -> list[Clip]:
    """Every clip of a scale; no sentence of the base's or the demo's training is a held-out one."""
    stream = sentences(SEED)
    held_out = list(islice(stream, NUM_HELD_OUT_SENTENCES))
    demo = list(islice(stream, DEMO_TRAINING_CLIPS))
    draw = random.Random(SEED)
    clips = [Clip(demo_voice(), text, "demo_train") for text in demo]
    clips += [Clip(demo_voice(), text, "demo_test") for text in held_out[:DEMO_TEST_CLIPS]]
    for voice in held_out_voices(scale):
        clips += [Clip(voice, text, "held_out_voices") for text in draw.sample(held_out, HELD_OUT_VOICE_CLIPS)]
    for voice in training_voices(scale):
        clips += [Clip(voice, text, "train") for text in islice(stream, scale.clips_per_voice)]
        clips += [Clip(voice, text, "held_out_sentences") for text in draw.sample(held_out, HELD_OUT_CLIPS)]
    return clips
