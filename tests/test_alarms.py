"""What the logs say is going wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest
from conftest import PROJECT

from finetuning.alarms import CAUSES, Alarm, History, find_alarms, news
from finetuning.resume import MAY_CHANGE
from finetuning.settings import Settings


def training(name: str, values: list[float | None], epoch: int = 1) -> list[dict[str, Any]]:
    return [{"step": 10 * at, "epoch": epoch, name: value} for at, value in enumerate(values, 1)]


def evaluations(name: str, values: list[float | None]) -> list[dict[str, Any]]:
    """Every second record is of something else."""
    records = []
    for at, value in enumerate(values, 1):
        figures = {"loss": value, "metrics": {}} if name == "loss" else {"loss": None, "metrics": {name: value}}
        records += [{"step": 100 * at, "epoch": 0, **figures}, {"step": 100 * at + 50, "loss": None, "metrics": {}}]
    return records


def kinds(train: list[dict] = (), validation: list[dict] = (), **limits: Any) -> list[str]:
    history = History(list(train), list(validation), **{"num_steps": 1000} | limits)
    return [alarm.kind for alarm in find_alarms(history)]


RISING = [3.0, 2.0, 2.01, 2.03, 2.05]


@pytest.mark.parametrize(
    ("values", "rises"),
    [
        (RISING, True),
        (RISING[:4], False),  # too early to say
        ([3.0, 2.0, 2.5, 2.5, 2.03], False),  # on its way down again
        ([3.0, 2.0, 2.5, 2.5, 2.5], True),
        ([3.0, 2.5, 2.0, 1.9, 1.8], False),
        ([2.0, 2.1, 2.2, 2.3], True),
        ([3.0, 2.0, None, 2.1, None, 2.1, 2.1], True),
        ([3.0, 2.0, 2.01, 2.02, 2.03], False),  # noise
        ([], False),
    ],
)
def test_validation_rising(values: list, rises: bool) -> None:
    assert kinds(validation=evaluations("loss", values)) == ["validation_rising"] * rises


@pytest.mark.parametrize(
    ("values", "drifts"),
    [
        ([1.0, 1.3, 1.3], True),
        ([1.0, 0.7, 0.8], True),
        ([1.0, 1.0, 1.5], False),  # one set of samples alone
        ([1.5, 1.5, 1.1], False),
        ([1.5, 0.5], False),
        ([1.1, 0.9, 1.14], False),
        ([1.5], False),
        ([], False),
    ],
)
def test_speech_rate_drifting(values: list, drifts: bool) -> None:
    assert kinds(validation=evaluations("speech_rate_ratio", values)) == ["speech_rate_drifting"] * drifts


@pytest.mark.parametrize(
    ("name", "kind", "values", "falls"),
    [
        ("eos_rate", "eos_rate_falling", [0.5, 1.0, 0.75, 0.5], True),
        ("eos_rate", "eos_rate_falling", [1.0, 0.5, 1.0], False),
        ("eos_rate", "eos_rate_falling", [1.0, 0.95, 0.92], False),
        ("eos_rate", "eos_rate_falling", [0.2, 0.2, 0.2], False),  # it never was better
        ("eos_rate", "eos_rate_falling", [1.0, 0.5], False),
        ("speaker_embedding_similarity", "similarity_falling", [0.5, 0.8, 0.7, 0.74], True),
        ("speaker_embedding_similarity", "similarity_falling", [0.5, 0.8, 0.7, 0.79], False),
        ("speaker_embedding_similarity", "similarity_falling", [0.1, 0.2, 0.3, 0.4], False),
        ("wer", "word_errors_rising", [0.6, 0.2, 0.4, 0.5], True),
        ("wer", "word_errors_rising", [0.6, 0.2, 0.4, 0.25], False),
        ("wer", "word_errors_rising", [0.6, 0.5, 0.3, 0.2], False),
    ],
)
def test_figures_of_samples(name: str, kind: str, values: list[float], falls: bool) -> None:
    assert kinds(validation=evaluations(name, values)) == [kind] * falls


@pytest.mark.parametrize(
    ("norms", "explodes"),
    [
        ([1.0] * 10 + [10.1], True),
        ([1.0] * 10 + [9.9], False),
        ([1.0] * 9 + [100.0], False),  # too few to know what is usual
        ([100.0] * 10 + [1.0], False),
        ([1.0, None] * 10 + [50.0], True),
        ([0.01] * 10 + [0.2], False),  # is not even clipped
        ([], False),
        ([None] * 20, False),
    ],
)
def test_gradient_norm_exploding(norms: list, explodes: bool) -> None:
    found = kinds(training("grad_norm", norms), max_grad_norm=1.0)
    assert found == ["gradient_norm_exploding"] * explodes


def test_loss_near_zero_only_in_the_first_epoch() -> None:
    losses = [3.0, 0.5, 0.05, 0.04]
    assert kinds(training("loss", losses, epoch=0)) == ["loss_near_zero"]
    assert kinds(training("loss", losses, epoch=1)) == []
    assert kinds(training("loss", [3.0, 0.5, 0.2, None], epoch=0)) == []


@pytest.mark.parametrize(
    ("losses", "rises"),
    [
        ([3.0] * 10 + [2.0] * 10 + [2.5] * 10, True),
        ([3.0] * 10 + [2.0] * 10 + [2.3] * 10, False),
        ([2.0] * 10 + [2.5] * 10, False),
        ([3.0, 1.0] * 50, False),
        ([0.0] * 40, False),
    ],
)
def test_training_loss_rising(losses: list[float], rises: bool) -> None:
    assert kinds(training("loss", losses)) == ["training_loss_rising"] * rises


@pytest.mark.parametrize(("warmup", "steps", "is_long"), [(100, 100, True), (100, 101, False), (0, 0, False)])
def test_a_warm_up_as_long_as_the_run_is_known_at_the_start(warmup: int, steps: int, is_long: bool) -> None:
    assert kinds(num_steps=steps, warmup_steps=warmup) == ["warm_up_too_long"] * is_long


def test_several_at_once_and_records_of_any_kind() -> None:
    """Figures that are missing, null, of another type; and what no metric is."""
    odd = [{"step": 1}, {"step": 2, "loss": None, "metrics": None}, {"step": 3, "loss": "x", "metrics": {"wer": []}}]
    validation = [*odd, *evaluations("loss", RISING), *evaluations("eos_rate", [1.0, 0.5, 0.5])]
    assert kinds([*odd, *training("grad_norm", [1.0] * 10 + [99.0])], validation) == [
        "gradient_norm_exploding",
        "validation_rising",
        "eos_rate_falling",
    ]
    assert kinds(odd, odd) == kinds() == []


def test_the_text_has_numbers_cause_and_setting() -> None:
    (alarm,) = find_alarms(History([], evaluations("loss", RISING), 1000))
    assert (alarm.step, alarm.size) == (500, pytest.approx(0.025))
    assert alarm.text.startswith(
        "the validation loss rises: 2.0500 at step 500, 3 evaluations after 2.0000 at step 200."
    )
    assert "Likely cause: the clips are being learnt by heart, if the training loss falls on" in alarm.text
    assert "EARLY_STOPPING_PATIENCE" in alarm.text and alarm.text.endswith(".") and ".." not in alarm.text


def test_an_alarm_is_news_once_and_when_it_is_clearly_worse() -> None:
    def alarm(kind: str, size: float) -> Alarm:
        return Alarm(kind, 1, size, "")

    found = [alarm("validation_rising", 0.05), alarm("eos_rate_falling", 0.3)]
    assert news(found, {}) == found
    told = {"validation_rising": 0.03, "eos_rate_falling": 0.15}
    assert news(found, told) == [alarm("eos_rate_falling", 0.3)]


def settings_in(text: str) -> set[str]:
    return set(re.findall(r"\b[A-Z]{2,}(?:_[A-Z]+)+\b|\bRESUME\b|\bCURRICULUM\b", text))


def test_every_advice_names_settings_that_there_are_and_may_change() -> None:
    """A run goes on with some of them alone."""
    names = {name.upper() for name in Settings.model_fields}
    for kind, cause in CAUSES.items():
        assert settings_in(" ".join(cause)) <= names, kind
        assert settings_in(cause.now) <= MAY_CHANGE, kind
        assert settings_in(cause.next_run) and not settings_in(cause.next_run) & MAY_CHANGE, kind
        assert not any(part.endswith(".") for part in cause), kind


def test_only_what_was_measured_alike_is_compared() -> None:
    """Not the first evaluations, of other texts; nor the last, of some samples alone."""
    name = "speaker_embedding_similarity"

    def found(yardsticks: str, values: list[float]) -> list[str]:
        records = [
            {"step": at, "metrics": {name: value, "yardsticks": {} if yardstick == "-" else {name: yardstick}}}
            for at, (yardstick, value) in enumerate(zip(yardsticks, values, strict=True))
        ]
        return kinds(validation=records)

    values = [0.9, 0.9, 0.5, 0.5, 0.1]
    assert found("aaaaa", values) == ["similarity_falling"]
    assert found("aabbb", values) == []
    assert found("aaaa-", values) == ["similarity_falling"] and found("aa---", values) == []
    assert found("aabbb", [0.2, 0.2, 0.9, 0.5, 0.5]) == ["similarity_falling"]


def test_the_guide_lists_every_alarm() -> None:
    text = (PROJECT / "docs" / "results.md").read_text(encoding="utf-8")
    table = text[text.index("| alarm | ") :].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(CAUSES)
