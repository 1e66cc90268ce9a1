"""What is drawn for each row, anew in every epoch: its layout, and what of its prompt is left out.

Every draw follows from the seed, the epoch and the row's line alone. So neither the rows beside it, nor the number of
processes, nor a stop and a resume make a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetuning.settings import Settings

#: What the generator of a draw begins with, so that one draw says nothing about another.
_LAYOUT, _LANGUAGE, _INSTRUCT, _IN_CONTEXT, _REFERENCE = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Draws:
    """The draws of an epoch.

    Attributes:
        layout: TRAIN_LAYOUT.
        language_mix: share of the rows with a language that are laid out as Auto.
        instruct_dropout: share of the rows with an instruction that are laid out without it.
        icl_fraction: share of the rows that are laid out in context of their reference.
    """

    layout: str = "non_streaming"
    language_mix: float = 0.0
    instruct_dropout: float = 0.0
    icl_fraction: float = 0.0
    seed: int = 0
    epoch: int = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> Draws:
        return cls(
            settings.train_layout,
            settings.language_mix,
            settings.instruct_dropout,
            settings.icl_fraction,
            settings.seed,
        )

    @property
    def depend_on_epoch(self) -> bool:
        """Whether a row may look otherwise in another epoch; its reference apart."""
        shares = (self.language_mix, self.instruct_dropout, self.icl_fraction)
        return self.layout == "both" or any(0 < share < 1 for share in shares)

    def is_streaming(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is laid out for streaming; of both layouts each has either with the same probability."""
        if self.layout == "both":
            return bool(self._generator(row, _LAYOUT).integers(2))
        return self.layout == "streaming"

    def has_language(self, row: Mapping[str, Any]) -> bool:
        """Whether a row keeps its language; else it is laid out as Auto."""
        return not self._happens(row, _LANGUAGE, self.language_mix)

    def has_instruct(self, row: Mapping[str, Any]) -> bool:
        """Whether a row keeps its instruction."""
        return not self._happens(row, _INSTRUCT, self.instruct_dropout)

    def is_in_context(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is laid out in context of its reference."""
        return self._happens(row, _IN_CONTEXT, self.icl_fraction)

    def one_of(self, row: Mapping[str, Any], count: int) -> int:
        """Which of so many references a row has."""
        return int(self._generator(row, _REFERENCE).integers(count))

    def _happens(self, row: Mapping[str, Any], what: int, share: float) -> bool:
        if share in (0, 1):
            return bool(share)
        return bool(self._generator(row, what).random() < share)

    def _generator(self, row: Mapping[str, Any], what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, row["line"], what])
