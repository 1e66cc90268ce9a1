"""Which evaluation is the best, and how long a better one is waited for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from finetuning.choosing import Chooser
from finetuning.metrics import METRICS
from finetuning.progress import Best, Progress
from finetuning.saving import Saver
from finetuning.session import describe_best


def chosen(settings: Any, evaluations: list[dict | None], has_validation: bool = True) -> tuple[list[int], Progress]:
    """Steps (from 1) that were the best so far, when every one of them could be saved."""
    chooser, progress, steps = Chooser(settings, has_validation), Progress(best_metric=settings.best_metric), []
    for step, figures in enumerate(evaluations, 1):
        progress.step = step
        if best := chooser.consider(progress, figures):
            progress.best = best
            steps.append(step)
    return steps, progress


#: Metric -> values of five evaluations, and the ones that are better than all before them.
DIRECTIONS = {
    "loss": ([2.0, 3.0, 1.5, 1.5, 1.4], [1, 3, 5]),
    "perplexity": ([9.0, 8.0, 8.5, 7.0, 7.0], [1, 2, 4]),
    "accuracy": ([0.2, 0.1, 0.3, 0.3, 0.31], [1, 3, 5]),
    "speaker_embedding_similarity": ([-0.1, 0.5, 0.4, 0.6, 0.6], [1, 2, 4]),
    "speech_rate_ratio": ([1.4, 0.7, 0.9, 1.2, 1.05], [1, 2, 3, 5]),
    "eos_rate": ([0.0, 0.0, 1.0, 1.0, 0.5], [1, 3]),
    "wer": ([0.9, 0.5, 0.6, 0.4, 0.4], [1, 2, 4]),
    "mos": ([3, 4, 4, 2, 5], [1, 2, 5]),
}


@pytest.mark.parametrize("metric", DIRECTIONS)
def test_each_metric_in_its_direction(make_settings: Callable, metric: str) -> None:
    """A tie is no improvement; the other figures, which go the other way, do not count."""
    values, steps = DIRECTIONS[metric]
    others = [name for name in METRICS if name != metric]
    evaluations = [{name: 100.0 * number for name in others} | {metric: value} for number, value in enumerate(values)]
    found, progress = chosen(make_settings(best_metric=metric), evaluations)
    assert found == steps
    assert (progress.best.value, progress.best.step) == (values[steps[-1] - 1], steps[-1])
    assert progress.num_not_better == len(values) - steps[-1]


def test_what_is_missing_chooses_and_counts_nothing(make_settings: Callable) -> None:
    evaluations = [None, {}, {"loss": 1.0}, {"wer": None}, {"wer": 0.5}, {"loss": 0.1}, {"wer": 0.6}, None]
    found, progress = chosen(make_settings(best_metric="wer"), evaluations)
    assert (found, progress.num_not_better) == ([5], 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_better_and_counts(make_settings: Callable, value: float) -> None:
    for metric in ("loss", "accuracy"):
        found, progress = chosen(make_settings(best_metric=metric), [{metric: value}, {metric: 1.0}, {metric: value}])
        assert (found, progress.num_not_better) == ([2], 1)


@pytest.mark.parametrize(
    ("metric", "has_validation", "followed", "text"),
    [
        ("loss", True, "loss", "lowest validation loss"),
        ("loss", False, "loss", "lowest mean training loss of an epoch"),
        ("accuracy", True, "accuracy", "highest accuracy"),
        ("accuracy", False, "loss", "lowest mean training loss of an epoch"),
        ("speech_rate_ratio", True, "speech_rate_ratio", "nearest to 1 speech_rate_ratio"),
        ("wer", False, "wer", "lowest wer"),
    ],
)
def test_what_is_followed(make_settings: Callable, metric: str, has_validation: bool, followed: str, text: str) -> None:
    """Figures of samples need no validation rows; for the others the training loss stands."""
    chooser = Chooser(make_settings(best_metric=metric), has_validation)
    assert (chooser.metric, chooser.best_text) == (followed, text)
    assert chooser.follows_training == (not has_validation and metric != "wer")


def test_figures_of_the_best_are_kept(make_settings: Callable) -> None:
    """Those of METRICS, for a BEST_METRIC of later."""
    figures = {"loss": 2.0, "accuracy": 0.5, "wer": None, "speakers": {"Ada": {"loss": 1.0}}, "roundtrip": 1.0}
    _, progress = chosen(make_settings(), [figures])
    assert progress.best == Best(2.0, 1, {"loss": 2.0, "accuracy": 0.5})
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress


# ------------------------------------------------------------------------------------------------- another BEST_METRIC


def test_another_metric_takes_what_is_known_of_best(make_settings: Callable) -> None:
    progress = Progress(step=9, best=Best(2.0, 3, {"loss": 2.0, "accuracy": 0.4}), num_not_better=2)
    chooser = Chooser(make_settings(best_metric="accuracy"), True)
    assert chooser.begin(progress) == "BEST_METRIC was loss, is accuracy, of which best/ has 0.4000"
    assert (progress.best.value, progress.best.step, progress.num_not_better) == (0.4, 3, 0)
    assert chooser.begin(progress) is None
    assert chooser.consider(progress, {"loss": 1.0, "accuracy": 0.4}) is None
    assert chooser.consider(progress, {"loss": 9.0, "accuracy": 0.41}).value == 0.41


def test_another_metric_that_best_has_no_figure_of_chooses_anew(make_settings: Callable) -> None:
    progress = Progress(step=9, best=Best(2.0, 3, {"loss": 2.0}), num_not_better=2)
    chooser = Chooser(make_settings(best_metric="wer"), True)
    assert "the next evaluation that has it chooses best/ anew" in chooser.begin(progress)
    assert (progress.best, progress.num_not_better, progress.best_metric) == (None, 0, "wer")
    assert chooser.consider(progress, {"wer": 3.0}).value == 3.0


def test_a_metric_that_changes_before_there_is_a_best_is_no_matter(make_settings: Callable) -> None:
    progress = Progress()
    assert Chooser(make_settings(best_metric="wer"), True).begin(progress) is None
    assert progress.best_metric == "wer"


@pytest.mark.parametrize(("loss", "best"), [(1.5, Best(1.5, None, {"loss": 1.5})), (None, None)])
def test_states_of_before_are_read(loss: float | None, best: Best | None) -> None:
    """As they were written when best/ followed the loss alone."""
    record = {
        "step": 7, "epoch": 1, "done": [], "num_fetched": 7, "best_loss": loss, "train_loss": 2.0, "evaluated_at": 7,
        "is_settled": True, "ended_at": 5, "num_skipped_rows": 0,
    }  # fmt: skip
    progress = Progress.from_json(record)
    assert (progress.best, progress.best_metric, progress.num_not_better) == (best, "loss", 0)
    assert "best_loss" in record  # it is the state's


# -------------------------------------------------------------------------------------------------- another yardstick


def test_what_is_not_of_all_samples_chooses_and_counts_nothing(make_settings: Callable) -> None:
    """Figures that can be compared stand under ``yardsticks``; of the validation rows all can."""
    chooser = Chooser(make_settings(best_metric="wer"), True, {"wer": "a"})
    progress = Progress(step=4, best_metric="wer")
    for yardsticks in ({}, {"mos": "a"}, {"wer": "b"}):
        assert chooser.consider(progress, {"wer": 0.0, "yardsticks": yardsticks}) is None
    assert chooser.consider(progress, {"wer": 0.0}) is None and progress.num_not_better == 0
    best = chooser.consider(progress, {"wer": 0.5, "yardsticks": {"wer": "a"}})
    assert (best.value, best.yardsticks) == (0.5, {"wer": "a"})
    assert Chooser(make_settings(), True, {"wer": "a"}).consider(progress, {"loss": 1.0, "wer": 0.5}).value == 1.0


def test_another_yardstick_chooses_anew(make_settings: Callable) -> None:
    """Of this metric alone, when a run is resumed with other texts, say; that of another one is no matter."""
    figures, yardsticks = {"loss": 2.0, "wer": 0.1, "mos": 3.0}, {"wer": "a", "mos": "a"}
    progress = Progress(step=9, best=Best(0.1, 3, figures, yardsticks), best_metric="wer", num_not_better=2)
    settings = make_settings(best_metric="wer")
    assert Chooser(settings, True, {"wer": "a", "mos": "b"}).begin(progress) is None and progress.best.value == 0.1
    said = Chooser(settings, True, {"wer": "b", "mos": "a"}).begin(progress)
    assert said.startswith("BEST_METRIC=wer is measured otherwise than before (texts, LORA_EXPORT_SCALE, or the judge)")
    assert said.endswith("the next evaluation that has it chooses best/ anew; copy best/ now to keep it")
    assert (progress.best, progress.num_not_better) == (None, 0)
    assert Chooser(settings, True, {"wer": "b"}).begin(progress) is None


@pytest.mark.parametrize(("yardstick", "value"), [("a", 0.1), ("b", None)])
def test_another_metric_takes_what_was_measured_alike(make_settings: Callable, yardstick: str, value: Any) -> None:
    progress = Progress(step=9, best=Best(2.0, 3, {"loss": 2.0, "wer": 0.1}, {"wer": "a"}))
    Chooser(make_settings(best_metric="wer"), True, {"wer": yardstick}).begin(progress)
    assert (progress.best and progress.best.value) == value


# ------------------------------------------------------------------------------------------------ a future given up


@pytest.mark.parametrize(("best_step", "is_said"), [(6, True), (4, False), (None, False)])
def test_a_best_of_a_future_that_is_given_up(
    make_settings: Callable, capsys: pytest.CaptureFixture[str], best_step: int | None, is_said: bool
) -> None:
    """It stays on the disk and counts for nothing; both are said, at the start and at the end."""
    settings = make_settings()
    (settings.output_dir / "best").mkdir(parents=True)
    (settings.output_dir / "best" / "training_state.json").write_text(json.dumps({"step": best_step}))
    progress = Progress(step=5, best=Best(2.0, 4))
    trainer = SimpleNamespace(progress=progress, chooser=Chooser(settings, True))
    Saver._say_future_of_best(SimpleNamespace(settings=settings), trainer)
    wanted = (
        "best/ is of step 6, which this run, going on after step 5, has given up. It stays until an evaluation is "
        "better than the lowest validation loss 2.0000, step 4; copy it now to keep it\n"
    )
    assert capsys.readouterr().out == wanted * is_said and progress.best == Best(2.0, 4)
    is_another = f"best is of step {best_step}, from before the run was set back" in describe_best(settings, trainer)
    assert is_another == (best_step != 4)
    progress.best = None
    Saver._say_future_of_best(SimpleNamespace(settings=settings), trainer)
    assert ("It stays until the next evaluation;" in capsys.readouterr().out) == is_said


# ---------------------------------------------------------------------------------------------------------- patience


@pytest.mark.parametrize(
    ("patience", "num_not_better", "metric", "is_out"),
    [(0, 9, "loss", False), (3, 2, "loss", False), (3, 3, "loss", True), (2, 3, "loss", True), (3, 3, "wer", False)],
)
def test_patience(make_settings: Callable, patience: int, num_not_better: int, metric: str, is_out: bool) -> None:
    """The count of another metric says nothing."""
    settings = make_settings(early_stopping_patience=patience, best_metric=metric, num_epochs=5)
    progress = Progress(step=4, epoch=1, num_not_better=num_not_better)
    assert progress.is_out_of_patience(settings) == progress.has_no_step_left(settings, 10) == is_out
    assert not progress.is_over(settings, 10)  # last/ is still to be written
    progress.ended_at = 4
    assert progress.is_over(settings, 10) == is_out


def test_the_stop_is_said_with_its_numbers(make_settings: Callable) -> None:
    chooser = Chooser(make_settings(early_stopping_patience=2), True)
    said = chooser.say_stop(Progress(step=40, best=Best(1.25, 20), num_not_better=2))
    assert said.startswith(
        "Early stopping at step 40: 2 evaluations in a row without a better validation loss (the best is the lowest "
        "validation loss 1.2500, step 20), and EARLY_STOPPING_PATIENCE=2."
    )
    assert "(none was finite)" in chooser.say_stop(Progress(step=40, num_not_better=2))
