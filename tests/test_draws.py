"""What is drawn for each row: the shares, anew in every epoch, each draw for itself, and nothing but the row's line."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from finetuning.draws import Draws

NUM_ROWS = 3000
#: What is drawn, by the field of its share; True is what happens to a share of the rows.
DRAWN: dict[str, Callable[[Draws, dict], bool]] = {
    "language_mix": lambda draws, row: not draws.has_language(row),
    "instruct_dropout": lambda draws, row: not draws.has_instruct(row),
    "icl_fraction": lambda draws, row: draws.is_in_context(row),
}
HALVES = Draws(layout="both", language_mix=0.5, instruct_dropout=0.5, icl_fraction=0.5, seed=42)


def rows(count: int = NUM_ROWS) -> list[dict[str, Any]]:
    return [{"line": line} for line in range(1, count + 1)]


def drawn(draws: Draws, name: str) -> np.ndarray:
    return np.array([DRAWN[name](draws, row) for row in rows()])


def everything(draws: Draws, row: dict[str, Any]) -> tuple:
    return draws.is_streaming(row), *(happens(draws, row) for happens in DRAWN.values()), draws.one_of(row, 7)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", DRAWN)
def test_shares_are_near_the_fraction(name: str, share: float) -> None:
    four_deviations = 4 * (share * (1 - share) / NUM_ROWS) ** 0.5
    for seed, epoch in ((0, 0), (42, 5)):
        found = drawn(Draws(seed=seed, epoch=epoch, **{name: share}), name).mean()
        assert abs(found - share) < four_deviations


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("name", DRAWN)
def test_none_and_all_are_exact(name: str, share: int) -> None:
    """The other shares have no part in it."""
    draws = Draws(**dict.fromkeys(DRAWN, 0.5) | {name: float(share)})
    assert (drawn(draws, name) == share).all()


@pytest.mark.parametrize(("layout", "is_streaming"), [("streaming", True), ("non_streaming", False)])
def test_one_layout_for_all(layout: str, is_streaming: bool) -> None:
    assert {Draws(layout=layout, epoch=3).is_streaming(row) for row in rows(200)} == {is_streaming}


def test_both_layouts_have_the_same_share() -> None:
    share = np.mean([HALVES.is_streaming(row) for row in rows()])
    assert abs(share - 0.5) < 4 * 0.5 / NUM_ROWS**0.5


@pytest.mark.parametrize("count", [2, 7])
def test_every_reference_is_as_likely(count: int) -> None:
    numbers = np.bincount([HALVES.one_of(row, count) for row in rows()], minlength=count)
    assert len(numbers) == count and abs(numbers / NUM_ROWS - 1 / count).max() < 0.03
    assert {HALVES.one_of(row, 1) for row in rows(50)} == {0}


def columns(draws: Draws) -> dict[str, np.ndarray]:
    return {
        "layout": np.array([draws.is_streaming(row) for row in rows()]),
        "reference": np.array([draws.one_of(row, 2) for row in rows()], dtype=bool),
    } | {name: drawn(draws, name) for name in DRAWN}


def assert_unrelated(one: np.ndarray, other: np.ndarray) -> None:
    """Of all four combinations a quarter."""
    for first, second in itertools.product((True, False), repeat=2):
        assert abs(((one == first) & (other == second)).mean() - 0.25) < 0.035


def test_one_draw_says_nothing_about_another() -> None:
    for one, other in itertools.combinations(columns(HALVES).values(), 2):
        assert_unrelated(one, other)


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 43}], ids=["epoch", "seed"])
def test_every_epoch_and_seed_draws_anew(change: dict[str, int]) -> None:
    before, after = columns(HALVES), columns(replace(HALVES, **change))
    for name in before:
        assert_unrelated(before[name], after[name])


def test_the_next_seed_is_not_the_next_epoch() -> None:
    before, after = columns(replace(HALVES, epoch=1)), columns(replace(HALVES, seed=HALVES.seed + 1))
    for name in before:
        assert_unrelated(before[name], after[name])


def test_neighbouring_lines_are_unrelated() -> None:
    for values in columns(HALVES).values():
        assert_unrelated(values[:-1], values[1:])


def test_seed_epoch_and_line_decide_alone() -> None:
    """Neither the order of asking, nor what was asked before, nor the row's content."""
    some = rows(60)
    expected = [everything(replace(HALVES, epoch=2), row) for row in some]
    other = Draws("both", 0.5, 0.5, 0.5, seed=42, epoch=2)
    np.random.seed(1)
    for row in reversed(some):
        row |= {"text": "another", "speaker": "Ben", "line": np.int64(row["line"])}
        assert everything(other, row) == expected[row["line"] - 1]
    assert len(set(expected)) > 20


def test_a_greater_share_keeps_the_rows_of_a_smaller_one() -> None:
    """So that two runs differ in as few rows as their shares do."""
    few, many = (drawn(replace(HALVES, icl_fraction=share), "icl_fraction") for share in (0.3, 0.6))
    assert many[few].all() and many.sum() > few.sum()


@pytest.mark.parametrize(
    ("fields", "depends"),
    [
        ({}, False),
        ({"layout": "streaming"}, False),
        ({"layout": "both"}, True),
        *(({name: share}, 0 < share < 1) for name in DRAWN for share in (0.0, 0.01, 0.99, 1.0)),
        (dict.fromkeys(DRAWN, 1.0), False),
    ],
)
def test_whether_rows_depend_on_the_epoch(fields: dict[str, Any], depends: bool) -> None:
    """As told, and as seen."""
    epochs = [Draws(**fields, epoch=epoch) for epoch in range(2)]
    assert [draws.depend_on_epoch for draws in epochs] == [depends, depends]
    seen = [[everything(draws, row)[:-1] for row in rows(600)] for draws in epochs]
    assert (seen[0] != seen[1]) == depends


def test_settings_say_what_is_drawn(make_settings: Callable) -> None:
    fields = {"language_mix": 0.1, "instruct_dropout": 0.2, "icl_fraction": 0.3, "seed": 7}
    settings = make_settings(train_layout="both", export_type="base", **fields)
    assert Draws.from_settings(settings) == Draws(layout="both", epoch=0, **fields)
    assert not Draws.from_settings(make_settings()).depend_on_epoch
