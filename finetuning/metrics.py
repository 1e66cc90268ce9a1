"""The metrics of a voice by name: what is better, and in which order they are shown.

How each is computed: ``listening`` (of speech) and ``validation`` (of the objective).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One figure of the validation log.

    Attributes:
        better: which of two values is the better one.
        is_of_samples: whether it is measured on generated speech, else on the validation rows.
        meaning: in a few words.
    """

    better: Literal["lower", "higher", "nearer to 1"]
    is_of_samples: bool
    meaning: str

    def cost(self, value: float) -> float:
        """A number that is lower for a better value."""
        return {"lower": value, "higher": -value, "nearer to 1": abs(value - 1.0)}[self.better]

    @property
    def superlative(self) -> str:
        """The word for its best value."""
        return {"lower": "lowest", "higher": "highest", "nearer to 1": "nearest to 1"}[self.better]


#: Name in validation_log.jsonl -> the metric; BEST_METRIC takes any of these.
METRICS: dict[str, Metric] = {
    "loss": Metric("lower", False, "talker and sub-talker loss of the validation rows"),
    "talker_loss": Metric("lower", False, "loss of codebook 0"),
    "sub_talker_loss": Metric("lower", False, "mean loss of codebooks 1-15"),
    "perplexity": Metric("lower", False, "exp of the talker loss"),
    "accuracy": Metric("higher", False, "share of right top-1 predictions of codebook 0"),
    "sub_talker_accuracy": Metric("higher", False, "the same of codebooks 1-15"),
    "speaker_embedding_similarity": Metric("higher", True, "cosine of the sample's voice and the speaker's vector"),
    "speech_rate_ratio": Metric("nearer to 1", True, "characters a second against the training data"),
    "eos_rate": Metric("higher", True, "share of the samples that stopped by themselves"),
    "wer": Metric("lower", True, "word errors of a speech recogniser (ASR_MODEL)"),
    "cer": Metric("lower", True, "character errors of a speech recogniser (ASR_MODEL)"),
    "mos": Metric("higher", True, "predicted opinion score, 1 to 5 (MOS_MODEL)"),
}
