"""What the logs say is going wrong, with its likely cause and the setting to change.

Pure functions: records in, alarms out. An alarm is said once, and again only when it has become clearly worse; what has
been said stands in ``alarms.jsonl``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from finetuning.history import Record, series

#: A loss below this is near zero: speech that was never heard cannot be foretold so well.
NEAR_ZERO_LOSS = 0.1
#: Evaluations after the best one, all of them worse, and how far the last of them lies above it.
NUM_RISING, RISEN = 3, 1.02
#: Training lines that are compared with others of a window of as many, and how far the mean of the last lies above.
LOSS_WINDOW, TRAINING_RISEN = 10, 1.2
#: A gradient norm is compared with the median of the lines before it: of so many at least, of so many at most.
MIN_NORMS, MAX_NORMS, NORM_EXPLODED = 10, 50, 10.0
#: Samples are few, so two evaluations in a row must agree.
NUM_AGREEING = 2
RATE_DRIFTED, EOS_FALLEN, SIMILARITY_FALLEN, ERRORS_RISEN = 0.15, 0.1, 0.05, 0.1
#: An alarm of a size so many times the one that was said is clearly worse.
CLEARLY_WORSE = 2.0
#: Training records that are looked at: more change nothing.
NUM_RECENT = 200

#: Kind -> (likely cause, what to change). The table in docs/results.md has the same kinds.
CAUSES: dict[str, tuple[str, str]] = {
    "warm_up_too_long": (
        "the run has fewer steps than WARMUP_STEPS was chosen for",
        "Raise NUM_EPOCHS (or MAX_STEPS), or lower GRADIENT_ACCUMULATION_STEPS; else lower WARMUP_STEPS",
    ),
    "loss_near_zero": (
        "the same clip stands in many rows, or codes are constant (silence)",
        "Look at the rows with data_processing.py --mode check, and mend TRAIN_JSONL",
    ),
    "training_loss_rising": (
        "the learning rate is too high",
        "Lower LEARNING_RATE, or raise WARMUP_STEPS; go on from an earlier state with RESUME",
    ),
    "gradient_norm_exploding": (
        "the learning rate is too high, or single rows do not match their transcripts",
        "Lower LEARNING_RATE or MAX_GRAD_NORM, raise WARMUP_STEPS, and look at the rows with --mode check",
    ),
    "validation_rising": (
        "the clips are being learnt by heart",
        "best/ holds the step before. Lower NUM_EPOCHS or LEARNING_RATE, set EARLY_STOPPING_PATIENCE, or add data",
    ),
    "speech_rate_drifting": (
        "silence at the edges of the clips, or transcripts that say more or less than is spoken",
        "Look at the rows with --mode check, cut silence with --trim_silence, and lower LEARNING_RATE",
    ),
    "eos_rate_falling": (
        "the end of a clip is not learnt well: clips that are cut off, long silence at their ends, or too many steps",
        "Mend the clips (--mode check, --trim_silence), lower LEARNING_RATE or NUM_EPOCHS",
    ),
    "similarity_falling": (
        "the voice drifts: the learning rate is too high, or clips are of other people than their speaker",
        "Lower LEARNING_RATE or NUM_EPOCHS, set BEST_METRIC=speaker_embedding_similarity, and look at the rows with "
        "--mode check",
    ),
    "word_errors_rising": (
        "speech becomes less clear: too many steps, or transcripts that do not match",
        "Lower LEARNING_RATE or NUM_EPOCHS, set BEST_METRIC=wer, and look at the rows with --mode check",
    ),
}


@dataclass(frozen=True)
class Alarm:
    """Something that goes wrong.

    Attributes:
        kind: of ``CAUSES``.
        step: of the record that showed it.
        size: how bad it is; comparable within a kind.
        finding: what was seen, with its numbers.
    """

    kind: str
    step: int
    size: float
    finding: str

    @property
    def text(self) -> str:
        cause, advice = CAUSES[self.kind]
        return f"{self.finding}. Likely cause: {cause}. {advice}."


@dataclass(frozen=True)
class History:
    """What alarms are found in.

    Attributes:
        training, validation: records of the two logs, oldest first.
        num_steps: of the whole run.
        warmup_steps: WARMUP_STEPS, before it is cut to a tenth of the run.
        max_grad_norm: MAX_GRAD_NORM.
    """

    training: Sequence[Record]
    validation: Sequence[Record]
    num_steps: int
    warmup_steps: int = 0
    max_grad_norm: float = 0.0


def find_alarms(history: History) -> list[Alarm]:
    """All that the records show now, in the order of ``CAUSES``."""
    return [alarm for watch in _WATCHES if (alarm := watch(history)) is not None]


def news(found: Iterable[Alarm], told: Mapping[str, float]) -> list[Alarm]:
    """Those that have not been told, or have become clearly worse.

    Args:
        told: kind -> largest size that was told.
    """
    return [alarm for alarm in found if alarm.kind not in told or alarm.size >= CLEARLY_WORSE * told[alarm.kind]]


# ---------------------------------------------------------------------------------------------------- of the training


def _warm_up_too_long(history: History) -> Alarm | None:
    if history.warmup_steps < max(history.num_steps, 1):
        return None
    finding = (
        f"the run has {history.num_steps} steps and WARMUP_STEPS is {history.warmup_steps}, so the learning rate would "
        "still be rising at the end; the warm-up is cut to a tenth of the run"
    )
    return Alarm("warm_up_too_long", 0, history.warmup_steps / max(history.num_steps, 1), finding)


def _loss_near_zero(history: History) -> Alarm | None:
    """In the first epoch, in which every row is new."""
    losses = series((record for record in history.training if record.get("epoch") == 0), "loss")
    near_zero = [(step, loss) for step, loss in losses if loss < NEAR_ZERO_LOSS]
    if not near_zero:
        return None
    step, loss = near_zero[0]
    return Alarm("loss_near_zero", step, 1.0, f"the training loss is {loss:.4f} at step {step}, in the first epoch")


def _training_loss_rising(history: History) -> Alarm | None:
    losses = series(history.training[-NUM_RECENT:], "loss")
    if len(losses) < 3 * LOSS_WINDOW:
        return None
    ends = range(LOSS_WINDOW, len(losses) - LOSS_WINDOW + 1)
    lowest = min(statistics.fmean(loss for _, loss in losses[end - LOSS_WINDOW : end]) for end in ends)
    now = statistics.fmean(loss for _, loss in losses[-LOSS_WINDOW:])
    if not now > TRAINING_RISEN * lowest > 0:
        return None
    finding = f"the training loss rises: {now:.4f} over the last {LOSS_WINDOW} lines, it was {lowest:.4f}"
    return Alarm("training_loss_rising", losses[-1][0], now / lowest - 1, finding)


def _gradient_norm_exploding(history: History) -> Alarm | None:
    *before, last = series(history.training[-MAX_NORMS - 1 :], "grad_norm") or [(0, 0.0)]
    if len(before) < MIN_NORMS:
        return None
    step, norm = last
    usual = statistics.median(value for _, value in before)
    if norm <= max(NORM_EXPLODED * usual, history.max_grad_norm):
        return None
    finding = f"the gradient norm is {norm:.3g} at step {step}, the usual one was {usual:.3g}"
    return Alarm("gradient_norm_exploding", step, norm / max(usual, 1e-12), finding)


# -------------------------------------------------------------------------------------------------- of the evaluations


def _validation_rising(history: History) -> Alarm | None:
    losses = series(history.validation, "loss")
    if len(losses) <= NUM_RISING:
        return None
    best_step, best = min(losses, key=lambda item: item[1])
    step, last = losses[-1]
    since = [loss for at, loss in losses if at > best_step]
    if len(since) < NUM_RISING or not last > RISEN * best > 0:
        return None
    finding = f"the validation loss rises: {last:.4f} at step {step}, {len(since)} evaluations after {best:.4f}"
    return Alarm("validation_rising", step, last / best - 1, f"{finding} at step {best_step}")


def _speech_rate_drifting(history: History) -> Alarm | None:
    latest = series(history.validation, "speech_rate_ratio")[-NUM_AGREEING:]
    if len(latest) < NUM_AGREEING:
        return None
    nearest = min((ratio - 1.0 for _, ratio in latest), key=abs)
    is_one_sided = all((ratio > 1.0) == (nearest > 0.0) for _, ratio in latest)
    if abs(nearest) <= RATE_DRIFTED or not is_one_sided:
        return None
    step, ratio = latest[-1]
    finding = f"samples are spoken {'faster' if ratio > 1 else 'slower'} than the clips: speech_rate_ratio {ratio:.2f}"
    return Alarm("speech_rate_drifting", step, abs(nearest), f"{finding} at step {step}")


def _eos_rate_falling(history: History) -> Alarm | None:
    return _fallen(history, "eos_rate", EOS_FALLEN, "eos_rate_falling", "fewer samples stop by themselves")


def _similarity_falling(history: History) -> Alarm | None:
    name = "speaker_embedding_similarity"
    return _fallen(history, name, SIMILARITY_FALLEN, "similarity_falling", "samples sound less like the speaker")


def _word_errors_rising(history: History) -> Alarm | None:
    what = "the recogniser understands samples less well"
    return _fallen(history, "wer", ERRORS_RISEN, "word_errors_rising", what, sign=-1.0)


def _fallen(history: History, name: str, margin: float, kind: str, what: str, sign: float = 1.0) -> Alarm | None:
    """An alarm where the last evaluations all lie below the best one before them, by more than a margin.

    Args:
        sign: -1 for a figure of which less is better.
    """
    values = series(history.validation, name)
    before, latest = values[:-NUM_AGREEING], values[-NUM_AGREEING:]
    if not before:
        return None
    best_step, best = max(before, key=lambda item: sign * item[1])
    loss = min(sign * (best - value) for _, value in latest)
    if loss <= margin:
        return None
    step, last = latest[-1]
    finding = f"{what}: {name} {last:.2f} at step {step}, it was {best:.2f} at step {best_step}"
    return Alarm(kind, step, loss, finding)


_WATCHES: tuple[Callable[[History], Alarm | None], ...] = (
    _warm_up_too_long,
    _loss_near_zero,
    _training_loss_rising,
    _gradient_norm_exploding,
    _validation_rising,
    _speech_rate_drifting,
    _eos_rate_falling,
    _similarity_falling,
    _word_errors_rising,
)
