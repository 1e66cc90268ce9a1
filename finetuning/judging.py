"""The judges of a run's samples: the base's speaker encoder, and what ASR_MODEL and MOS_MODEL name.

They come to the run's device only while they are asked, and lie on the CPU otherwise: no step of the training has to do
with less memory for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from finetuning.listening import Spoken, Yardstick, count_characters, means, measure_each, normalized
from finetuning.recognition import Opinion, Recognize
from finetuning.samples import Judged, Sample
from finetuning.voice import voice_vector


class Judge:
    """Measures the samples of a step.

    Args:
        device: on which the judges that can be moved (they have ``to``) are asked.
        encoder: the base's speaker encoder; None where there is none.
        vectors, rates: of each speaker, lower-case; see ``Yardstick``.
        recognize, opinion: None where no setting asks for them.
    """

    def __init__(
        self,
        device: str,
        encoder: nn.Module | None,
        vectors: Mapping[str, np.ndarray],
        rates: Mapping[str, float],
        recognize: Recognize | None = None,
        opinion: Opinion | None = None,
    ) -> None:
        self._device, self._encoder, self._recognizer, self._scorer = device, encoder, recognize, opinion
        self._check: Callable[[], None] = lambda: None
        self._yardstick = Yardstick(
            None if encoder is None else self._encode,
            vectors,
            rates,
            None if recognize is None else self._recognize,
            None if opinion is None else self._opinion,
        )
        self._move("cpu")

    def __call__(self, samples: Sequence[Sample], check: Callable[[], None]) -> Judged:
        """
        Args:
            check: called before each judgement; may raise Interrupted.
        """
        self._check = check
        spoken = [Spoken(one.text, one.speaker, one.waveform, len(one.codes), one.stopped) for one in samples]
        with self._brought():
            figures = measure_each(spoken, self._yardstick)
        found = means(figures)
        whole = {
            name
            for name in found
            if all(name in of_one or not self._can_have(name, one) for of_one, one in zip(figures, spoken, strict=True))
        }
        return Judged(found, frozenset(whole))

    def _can_have(self, name: str, sample: Spoken) -> bool:
        """Whether the figure of a sample is missing for no reason that lies in its text or its speaker's rows."""
        if name in ("wer", "cer"):
            return bool(normalized(sample.text))
        if name == "speech_rate_ratio":
            has_rate = sample.speaker.lower() in self._yardstick.characters_per_second
            return has_rate and count_characters(sample.text) > 0
        return True

    def _encode(self, waveform: np.ndarray) -> np.ndarray:
        self._check()
        return voice_vector(self._encoder, waveform).numpy()

    def _recognize(self, waveforms: Sequence[np.ndarray]) -> list[str]:
        self._check()
        return self._recognizer(waveforms)

    def _opinion(self, waveform: np.ndarray) -> float:
        self._check()
        return self._scorer(waveform)

    @contextlib.contextmanager
    def _brought(self) -> Iterator[None]:
        """Inside, the judges are on the device."""
        try:
            self._move(self._device)
            yield
        finally:
            self._move("cpu")

    def _move(self, device: str) -> None:
        for part in (self._encoder, self._recognizer, self._scorer):
            if hasattr(part, "to"):
                part.to(device)
