"""English sentences from templates and a word list: no file, no download, the same for the same seed.

Few words in many orders: a model of a few million weights can learn how each of them sounds from some hours of speech,
and then says sentences that it never heard.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

_WORDS = {
    "adjective": "old new small large green blue yellow red black white quiet loud heavy light narrow wide happy tired "
    "young tall broken clean empty famous friendly gentle golden honest hungry lazy lonely lucky modern ordinary "
    "polite proud rough silver simple soft strange warm cold bright dark deep early fresh foreign",
    "person": "teacher doctor farmer sailor baker painter brother sister neighbour captain driver student lawyer "
    "gardener singer writer uncle mother father cousin butcher engineer nurse judge king queen pilot soldier boy girl "
    "child woman man friend",
    "thing": "boat house garden letter picture window table bottle bicycle basket bridge camera candle carpet chair "
    "clock coat cup door engine flower guitar hammer jacket key kitchen ladder lamp machine map mirror newspaper piano "
    "pillow plate radio ring ship shirt shoe spoon stone suitcase ticket tower train tree umbrella violin wall watch",
    "place": "harbour market station village river mountain school church library museum forest island valley beach "
    "castle corner factory field hospital hotel lake office palace park theatre",
    "transitive": "found bought carried painted broke cleaned sold watched opened repaired closed followed remembered "
    "borrowed washed moved noticed described dropped finished measured lifted photographed",
    "motion": "walked ran drove returned travelled hurried came went sailed flew",
    "preposition": "behind beside under near above around inside outside before",
    "time": "yesterday today tomorrow tonight again at noon|this morning|last week|every evening|in the winter|"
    "on Monday|on Thursday|before breakfast|after midnight|two years ago|in September",
    "number": "two three four five six seven eight nine ten twelve twenty thirty",
    "food": "bread butter cheese soup rice honey fish chicken coffee water sugar salt apples onions potatoes lemons",
    "weather": "rain snow wind sunshine thunder fog ice",
    "mood": "slowly quickly quietly carefully suddenly gladly seldom always often never",
}  # fmt: skip

_TEMPLATES = (
    "The {adjective} {person} {transitive} the {thing}.",
    "The {person} {transitive} the {adjective} {thing} {time}.",
    "The {person} {mood} {transitive} the {thing} {preposition} the {place}.",
    "My {person} {motion} to the {adjective} {place} {time}.",
    "We {motion} from the {place} to the {place}.",
    "There is a {adjective} {thing} {preposition} the {place}.",
    "Where did the {person} put the {adjective} {thing}?",
    "Please bring me the {adjective} {thing} and the {thing}.",
    "She {transitive} {number} of the {adjective} letters.",
    "He wants some {food} and a little {food}.",
    "{number} people {motion} to the {place} {time}.",
    "The {weather} came early and the {place} was {adjective}.",
    "Nobody {transitive} the {thing} of the {person}.",
    "Can you hear the {weather} {preposition} the {place}?",
    "Give the {food} to the {person}, not to the {person}.",
    "The {thing} was {adjective}, but the {thing} was {adjective}.",
    "After the {weather}, the {person} {motion} home.",
    "I {mood} eat {food} with {food}.",
)

#: Slots of a template.
_SLOT = re.compile(r"\{(\w+)\}")


def words_of(kind: str) -> list[str]:
    """The choices of a slot; those of several words stand behind a bar."""
    plain, *phrases = _WORDS[kind].split("|")
    if not phrases:
        return plain.split()
    *singles, preposition, noun = plain.split()  # the first phrase of two words follows the single words
    return [*singles, f"{preposition} {noun}", *phrases]


def sentences(seed: int) -> Iterator[str]:
    """Endless distinct sentences of 4 to 11 words; the same order for the same seed."""
    draw = random.Random(seed)
    seen: set[str] = set()
    while True:
        sentence = _sentence(draw)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


def _sentence(draw: random.Random) -> str:
    used: set[str] = set()

    def fill(slot: re.Match[str]) -> str:
        choices = [word for word in words_of(slot[1]) if word not in used]
        used.add(word := draw.choice(choices))
        return word

    text = _SLOT.sub(fill, draw.choice(_TEMPLATES))
    for article in ("a", "A"):  # "a old" -> "an old"
        text = re.sub(rf"\b{article} (?=[aeiou])", f"{article}n ", text)
    return text[0].upper() + text[1:]
