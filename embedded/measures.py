"""How near one waveform is to another, where the right answer is known: intelligibility, spectrum, pitch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from finetuning.audio import SAMPLE_RATE_HZ
from finetuning.closeness import log_mel, pitch
from finetuning.errors import UserError


def stoi(true: np.ndarray, other: np.ndarray) -> float:
    """Short-time objective intelligibility of equally long 24 kHz waveforms: 1 is as good as the true one.

    Raises:
        UserError: the package is missing.
    """
    try:
        from pystoi import stoi as intelligibility
    except ImportError:
        raise UserError("the measures of embedded/ need pystoi: uv pip install pystoi==0.4.1") from None
    return float(intelligibility(true, other, SAMPLE_RATE_HZ))


def compare(true: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Figures of a waveform against the true one, both at 24 kHz and cut to the shorter length.

    Returns:
        stoi; log_mel_l1; voicing_kept, the share of the truly voiced steps that are voiced in the other;
        f0_error, the relative error of the median f0 over steps that are voiced in both; f0_step_error, the median
        of the steps' own. NaN where nothing is voiced.
    """
    length = min(len(true), len(other))
    true, other = true[:length], other[:length]
    f0_true, f0_other = pitch(true), pitch(other)
    is_voiced = ~np.isnan(f0_true)
    both = is_voiced & ~np.isnan(f0_other)
    figures = {
        "stoi": stoi(true, other),
        "log_mel_l1": float(np.abs(log_mel(true) - log_mel(other)).mean()),
        "voicing_kept": float(both.sum() / is_voiced.sum()) if is_voiced.any() else float("nan"),
    }
    if not both.any():
        return figures | {"f0_error": float("nan"), "f0_step_error": float("nan")}
    error = abs(np.median(f0_other[both]) / np.median(f0_true[both]) - 1)
    steps = np.median(np.abs(f0_other[both] / f0_true[both] - 1))
    return figures | {"f0_error": float(error), "f0_step_error": float(steps)}


def averages(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure, without the NaN ones (NaN where all are); three decimals."""
    means = {}
    for name in figures[0] if figures else ():
        values = [one[name] for one in figures if not np.isnan(one[name])]
        means[name] = round(float(np.mean(values)), 3) if values else float("nan")
    return means


def equal_error_rate(same: np.ndarray, different: np.ndarray) -> float:
    """Where as many pairs of one voice are rejected as pairs of two voices are accepted.

    Args:
        same, different: (N,) and (M,) similarities; higher is nearer.
    """
    thresholds = np.sort(np.concatenate([same, different]))
    rejected = np.searchsorted(np.sort(same), thresholds, side="left") / len(same)
    accepted = 1 - np.searchsorted(np.sort(different), thresholds, side="left") / len(different)
    place = int(np.argmin(np.abs(rejected - accepted)))
    return float((rejected[place] + accepted[place]) / 2)
