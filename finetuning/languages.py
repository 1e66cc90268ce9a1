"""NEW_LANGUAGES: languages that the base does not know, each with a row of the codec table that it learns.

A language is an id in the codec channel of the prompt (see ``prompt``). A new one gets a free id, starts from the mean
of the languages that are there or from one of them, and is trained and saved under that id in ``codec_language_id``; so
``generate_custom_voice(language="Hausa")`` works in stock qwen-tts. Whether the text tokenizer suits the language is
measured, too.
"""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetuning.codec_rows import allocate_language_rows
from finetuning.errors import UserError
from finetuning.prompt import find_language
from finetuning.settings import Settings

#: Texts of a language that are tokenized to tell how well the tokenizer suits it.
MAX_COVERAGE_TEXTS = 2000
#: Characters without a token of their own that are listed.
MAX_LISTED_CHARACTERS = 12
#: Stock takes a name with this in it for a dialect of a speaker.
_DIALECT = "dialect"


@dataclass(frozen=True)
class NewLanguage:
    """A language that the run adds.

    Attributes:
        name: lower case, as inference looks it up.
        codec_id: its row of the codec table.
        sources: rows that it starts from the mean of.
    """

    name: str
    codec_id: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Languages:
    """Languages of a checkpoint that its base does not have.

    Attributes:
        rows: name -> row of the codec table.
        vectors: (num_languages, H) float32, what stands there, in the order of ``rows``.
    """

    rows: Mapping[str, int]
    vectors: torch.Tensor


def new_languages(config: Mapping[str, Any], settings: Settings) -> list[NewLanguage]:
    """What NEW_LANGUAGES adds to a base.

    Args:
        config: the base's config.json.

    Raises:
        UserError: the base has the language already, or not the one that it is to start from.
    """
    known = config["talker_config"].get("codec_language_id") or {}
    given = settings.new_language_names()
    listed = ", ".join(sorted(known)) or "none"
    relatives: list[str | None] = []
    for name, relative in given:
        if (own := find_language(name, known)) is not None:
            raise UserError(
                f"NEW_LANGUAGES: the base knows {name} already (as {own}, id {known[own]}); leave it out, and rows of "
                "that language train it as it is"
            )
        relatives.append(relative and find_language(relative, known))
        if relative and not relatives[-1]:
            raise UserError(
                f"NEW_LANGUAGES: {name} is to start from {relative}, which the base does not know ({listed})"
            )
    languages = tuple(row for name, row in known.items() if _DIALECT not in name)
    if given and not languages and not all(relative for _, relative in given):
        raise UserError("NEW_LANGUAGES: the base knows no language to start from")
    rows = allocate_language_rows(config, len(given))
    return [
        NewLanguage(name, row, languages if relative is None else (known[relative],))
        for (name, _), relative, row in zip(given, relatives, rows, strict=True)
    ]


def with_languages(config: Mapping[str, Any], languages: Mapping[str, int]) -> Mapping[str, Any]:
    """The configuration with more languages: name -> row."""
    if not languages:
        return config
    changed = copy.deepcopy(dict(config))
    talker = changed["talker_config"]
    talker["codec_language_id"] = {**(talker.get("codec_language_id") or {}), **languages}
    return changed


def initial_languages(table: torch.Tensor, languages: Sequence[NewLanguage]) -> Languages | None:
    """What new languages start from; None where there are none.

    Args:
        table: (codec table size, H).
    """
    if not languages:
        return None
    vectors = [table[list(language.sources)].detach().float().mean(0) for language in languages]
    return Languages({language.name: language.codec_id for language in languages}, torch.stack(vectors))


# -------------------------------------------------------------------------------------------------------- coverage


@dataclass(frozen=True)
class Coverage:
    """How a tokenizer splits some texts.

    Attributes:
        num_texts, num_characters, num_tokens: of all of them.
        num_unknown: tokens that stand for bytes which the tokenizer does not know.
        split: characters that are spelt byte by byte, the most frequent first, with their numbers.
    """

    num_texts: int
    num_characters: int
    num_tokens: int
    num_unknown: int
    split: Mapping[str, int]

    @property
    def tokens_per_character(self) -> float:
        return self.num_tokens / max(self.num_characters, 1)

    def describe(self) -> str:
        """One line."""
        line = f"{self.tokens_per_character:.2f} tokens a character in {self.num_texts} texts"
        if self.num_unknown:
            line += f", {self.num_unknown} unknown tokens (bytes without a token)"
        if not self.split:
            return f"{line}, no character is spelt in bytes"
        share = sum(self.split.values()) / max(self.num_characters, 1)
        listed = " ".join(list(self.split)[:MAX_LISTED_CHARACTERS])
        more = " …" if len(self.split) > MAX_LISTED_CHARACTERS else ""
        return f"{line}, {share:.1%} of the characters are spelt in bytes ({listed}{more})"


def coverage(tokenizer: Any, texts: Iterable[str]) -> Coverage:
    """Tokenizes texts and counts.

    A character is spelt in bytes where no single token holds all of its bytes: then a piece of a byte-level vocabulary
    is no text by itself. Letters are composed first, as the tokenizer composes them.
    """
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    unknown = getattr(tokenizer, "unk_token_id", None)
    num_unknown = sum(ids.count(unknown) for ids in tokens) if unknown is not None else 0
    counts: dict[str, int] = {}
    for text in texts:
        for character in text:
            counts[character] = counts.get(character, 0) + 1
    split = {one: count for one, count in counts.items() if len(one.encode()) > 1 and _is_split(tokenizer, one)}
    ordered = dict(sorted(split.items(), key=lambda item: -item[1]))
    return Coverage(len(texts), sum(map(len, texts)), sum(map(len, tokens)), num_unknown, ordered)


def _is_split(tokenizer: Any, character: str) -> bool:
    """Whether a character alone takes several tokens."""
    return len(tokenizer(character)["input_ids"]) > 1
