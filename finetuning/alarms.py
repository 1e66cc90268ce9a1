"""What the logs say is going wrong, with its likely cause and the setting to change.

Pure functions: records in, alarms out. An alarm is said once, and again only when it has become clearly worse; what has
been said stands in ``alarms.jsonl``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from finetuning.history import Record, figures_of, series

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

_CHECK = "look at the rows with data_processing.py --mode check"


class Cause(NamedTuple):
    """What may be behind an alarm.

    Attributes:
        likely: causes, the likeliest first.
        now: what can be done about this run, which may go on with what is named here.
        next_run: what only another run can do otherwise.
    """

    likely: str
    now: str
    next_run: str


#: The table in docs/results.md has the same kinds.
CAUSES: dict[str, Cause] = {
    "warm_up_too_long": Cause(
        "WARMUP_STEPS was chosen for a longer run",
        "If the run is to be longer, raise NUM_EPOCHS or MAX_STEPS",
        "lower WARMUP_STEPS, or GRADIENT_ACCUMULATION_STEPS for more steps",
    ),
    "loss_near_zero": Cause(
        "the same clips in many rows, a base that was trained on these clips, or codes that hardly change (silence)",
        f"Stop, and {_CHECK}",
        "mend TRAIN_JSONL, or take another INIT_MODEL_PATH",
    ),
    "training_loss_rising": Cause(
        "the learning rate is too high. Where CURRICULUM, TRAIN_STAGES or LR_NUM_CYCLES has just brought longer clips, "
        "new weights or a higher rate, a rise is no fault",
        "If it goes on, stop: the checkpoints of before stay",
        "lower LEARNING_RATE, or raise WARMUP_STEPS",
    ),
    "gradient_norm_exploding": Cause(
        "of a single peak, a row that does not match its transcript: it is clipped, and harmless. Of a norm that stays "
        "high, a learning rate that is too high",
        f"Watch the next lines, and {_CHECK}",
        "lower LEARNING_RATE or MAX_GRAD_NORM, or raise WARMUP_STEPS",
    ),
    "validation_rising": Cause(
        "the clips are being learnt by heart, if the training loss falls on; a learning rate that is too high, if it "
        "does not",
        "Stop, lower NUM_EPOCHS, or set EARLY_STOPPING_PATIENCE; best/ keeps the lowest loss with BEST_METRIC=loss",
        "lower LEARNING_RATE, or add data",
    ),
    "speech_rate_drifting": Cause(
        "early in a run, a pace that is not learnt yet; later, silence at the edges of the clips, or transcripts that "
        "say more or less than is spoken. Digits, or another script than the rows', in the texts shift it as well",
        f"Listen to samples/, {_CHECK}, and choose EVAL_TEXTS like theirs",
        "cut silence with --trim_silence, mend TRAIN_JSONL, lower LEARNING_RATE",
    ),
    "eos_rate_falling": Cause(
        "the end of a clip is not learnt well: clips that are cut off, long silence at their ends, or too many steps",
        f"Listen to samples/, {_CHECK}, and stop or lower NUM_EPOCHS",
        "mend the clips (--trim_silence), lower LEARNING_RATE",
    ),
    "similarity_falling": Cause(
        "too many steps or too high a learning rate, or clips of other people than their speaker",
        f"Listen to samples/, {_CHECK}; BEST_METRIC=speaker_embedding_similarity keeps the most similar checkpoint "
        "from now on, and a lower NUM_EPOCHS stops earlier",
        "lower LEARNING_RATE, mend TRAIN_JSONL",
    ),
    "word_errors_rising": Cause(
        "speech becomes less clear: too many steps or too high a learning rate, or transcripts that do not match",
        f"Listen to samples/ (a recogniser errs, too), {_CHECK}; BEST_METRIC=wer keeps the best checkpoint from now "
        "on, and a lower NUM_EPOCHS stops earlier",
        "lower LEARNING_RATE, mend TRAIN_JSONL",
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
        cause = CAUSES[self.kind]
        return f"{self.finding}. Likely cause: {cause.likely}. {cause.now}. In another run: {cause.next_run}."


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
        f"still be rising at the end; the warm-up is cut to {history.num_steps // 10} steps, a tenth of the run"
    )
    return Alarm("warm_up_too_long", 0, history.warmup_steps / max(history.num_steps, 1), finding)


def _loss_near_zero(history: History) -> Alarm | None:
    """In the first epoch, in which rows are new."""
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
    lowest, at = min((statistics.fmean(loss for _, loss in losses[end - LOSS_WINDOW : end]), end) for end in ends)
    now = statistics.fmean(loss for _, loss in losses[-LOSS_WINDOW:])
    if not now > TRAINING_RISEN * lowest > 0:
        return None
    finding = (
        f"the training loss rises: {now:.4f} on average over the last {LOSS_WINDOW} lines, it was {lowest:.4f} over "
        f"those up to step {losses[at - 1][0]}"
    )
    return Alarm("training_loss_rising", losses[-1][0], now / lowest - 1, finding)


def _gradient_norm_exploding(history: History) -> Alarm | None:
    *before, last = series(history.training[-MAX_NORMS - 1 :], "grad_norm") or [(0, 0.0)]
    if len(before) < MIN_NORMS:
        return None
    step, norm = last
    usual = statistics.median(value for _, value in before)
    if norm <= max(NORM_EXPLODED * usual, history.max_grad_norm):
        return None
    finding = (
        f"the gradient norm is {norm:.3g} at step {step}, and {usual:.3g} is the median of the {len(before)} lines "
        f"before; it is clipped to MAX_GRAD_NORM={history.max_grad_norm:g}"
    )
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
    latest = _comparable(history, "speech_rate_ratio")[-NUM_AGREEING:]
    if len(latest) < NUM_AGREEING:
        return None
    nearest = min((ratio - 1.0 for _, ratio in latest), key=abs)
    is_one_sided = all((ratio > 1.0) == (nearest > 0.0) for _, ratio in latest)
    if abs(nearest) <= RATE_DRIFTED or not is_one_sided:
        return None
    step, ratio = latest[-1]
    finding = (
        f"samples are spoken {'faster' if ratio > 1 else 'slower'} than the training clips: speech_rate_ratio "
        f"{ratio:.2f} at step {step}, and {latest[0][1]:.2f} at step {latest[0][0]}"
    )
    return Alarm("speech_rate_drifting", step, abs(nearest), finding)


def _comparable(history: History, name: str) -> list[tuple[int, float]]:
    """(step, value) of a figure of samples, as far as they were measured as the last one that can be compared; see
    ``samples.yardsticks_of``. Logs of before have no yardsticks."""
    yardsticks = [(figures_of(record).get("yardsticks") or {}).get(name) for record in history.validation]
    last = next((yardstick for yardstick in reversed(yardsticks) if yardstick), None)
    alike = (record for record, known in zip(history.validation, yardsticks, strict=True) if known == last)
    return series(alike, name)


def _eos_rate_falling(history: History) -> Alarm | None:
    return _fallen(history, "eos_rate", EOS_FALLEN, "eos_rate_falling", "fewer samples stop by themselves")


def _similarity_falling(history: History) -> Alarm | None:
    name = "speaker_embedding_similarity"
    return _fallen(
        history,
        name,
        SIMILARITY_FALLEN,
        "similarity_falling",
        "the speaker encoder finds samples less like the speaker",
    )


def _word_errors_rising(history: History) -> Alarm | None:
    what = "the recogniser understands samples less well"
    return _fallen(history, "wer", ERRORS_RISEN, "word_errors_rising", what, sign=-1.0)


def _fallen(history: History, name: str, margin: float, kind: str, what: str, sign: float = 1.0) -> Alarm | None:
    """An alarm where the last evaluations all lie below the best one before them, by more than a margin.

    Args:
        sign: -1 for a figure of which less is better.
    """
    values = _comparable(history, name)
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
