"""How often an epoch uses each clip where speakers are balanced (SPEAKER_BALANCE).

A speaker with n clips has a share of an epoch's rows that is proportional to n^(1 - SPEAKER_BALANCE). Its clips follow
each other in an endless sequence: a permutation of them, then another one, and so on. Every epoch takes the next piece
of it, so the clips of small speakers repeat, those of large ones take turns, and at the end of any epoch the uses of a
speaker's clips differ by at most one.

All of it is a pure function of the seed and the epoch's number, whatever is trained on it with and by how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

#: After so many epochs each speaker has had its share of the rows that do not divide, to within one.
PERIOD = 16
#: 0 … PERIOD - 1, so that the first few of them are spread evenly, too.
_SHIFTS = (0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15)
#: Weights are integers, so that all machines round alike.
_WEIGHT_OF_ONE = 2**32
#: Sets these generators apart from others that are seeded with an epoch or a line.
_PURPOSE = 2
#: More speakers than this are told in a summary.
MAX_SPEAKERS_LISTED = 20


@dataclass(frozen=True, eq=False)
class SpeakerBalance:
    """The rows of every epoch.

    Attributes:
        speakers: (num_rows,) int, each row's speaker, any numbers.
        strength: SPEAKER_BALANCE, from 0 (each row once) to 1 (each speaker as much).
    """

    speakers: np.ndarray
    strength: float
    seed: int = 0

    def rows(self, epoch: int) -> np.ndarray:
        """(num_rows,) int32, sorted; some rows stand there more than once, others not at all."""
        uses = self.uses_before(epoch + 1) - self.uses_before(epoch)
        return np.repeat(np.arange(len(uses), dtype=np.int32), uses)

    def uses_before(self, epoch: int) -> np.ndarray:
        """(num_rows,) int64, how often the epochs before this one use each row."""
        uses = np.zeros(len(self.speakers), dtype=np.int64)
        taken = rows_before([len(rows) for rows in self._rows_by_speaker], self.strength, epoch)
        for speaker, (rows, num_taken) in enumerate(zip(self._rows_by_speaker, taken, strict=True)):
            round_number, num_begun = divmod(num_taken, len(rows))
            uses[rows] = round_number
            if num_begun:
                generator = np.random.default_rng([self.seed, round_number, speaker, _PURPOSE])
                uses[generator.permutation(rows)[:num_begun]] += 1
        return uses

    @cached_property
    def _rows_by_speaker(self) -> list[np.ndarray]:
        return rows_by_label(self.speakers)


def rows_by_label(labels: np.ndarray) -> list[np.ndarray]:
    """The rows, int32 and sorted, of each label in ascending order of the labels.

    Args:
        labels: (num_rows,) int.
    """
    order = np.argsort(labels, kind="stable").astype(np.int32)
    ends = np.flatnonzero(np.diff(labels[order])) + 1
    return np.split(order, ends) if len(order) else []


def rows_before(sizes: Sequence[int], strength: float, epoch: int) -> list[int]:
    """How many rows of each speaker the epochs before this one take.

    Each takes of every speaker its share of all rows, rounded up or down, and never nothing.

    Args:
        sizes: each speaker's clips.
    """
    weights = _weights(sizes, strength)
    total, num_rows = sum(weights), sum(sizes)
    # Laid end to end, what rounding down leaves of the shares covers a line of whole length. Marks stand on it at a
    # distance of one; a speaker gets a row more where one falls on its piece. From epoch to epoch they are shifted.
    ends = [0, *accumulate(num_rows * weight % total for weight in weights)]
    periods, num_epochs = divmod(epoch, PERIOD)

    def num_marks(end: int) -> int:
        """Marks up to this point in all these epochs. Those of a whole period stand PERIOD times as close, together."""
        begun = sum((PERIOD * end + shift * total) // (PERIOD * total) for shift in _SHIFTS[:num_epochs])
        return periods * (PERIOD * end // total) + begun

    extra = [after - before for before, after in pairwise(map(num_marks, ends))]
    return [epoch * (num_rows * weight // total) + more for weight, more in zip(weights, extra, strict=True)]


def _weights(sizes: Sequence[int], strength: float) -> list[int]:
    """What the shares are proportional to. At least 1 and at most the size, so no share is below one row."""
    return [round(int(size) ** (1.0 - strength) * _WEIGHT_OF_ONE) for size in sizes]


def describe_shares(names: Sequence[str], sizes: Sequence[int], strength: float) -> str:
    """Each speaker's clips and share of an epoch in one line; of many speakers the largest and the smallest.

    Args:
        sizes: each speaker's clips.
    """
    weights = _weights(sizes, strength)

    def told(speaker: int) -> str:
        share = weights[speaker] / sum(weights)
        uses = share * sum(sizes) / sizes[speaker]
        each = f", each {uses:.2g} times" if strength else ""
        return f"{names[speaker]} {sizes[speaker]} clips ({share:.1%}{each})"

    speakers = range(len(names))
    if len(names) <= MAX_SPEAKERS_LISTED:
        listed = ", ".join(map(told, speakers))
    else:
        largest, smallest = max(speakers, key=sizes.__getitem__), min(speakers, key=sizes.__getitem__)
        listed = f"{len(names)} speakers, from {told(largest)} to {told(smallest)}"
    return f"Shares of an epoch (SPEAKER_BALANCE={strength:g}): {listed}"
