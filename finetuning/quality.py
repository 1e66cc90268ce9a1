"""How clean a clip is. (What else can be wrong with data is this room's as well.)"""

from __future__ import annotations

import numpy as np

from finetuning.audio import SAMPLE_RATE_HZ

CLIPPING_PEAK = 0.999
#: A clip with this share of clipped samples is ranked behind every unclipped one.
CLIPPING_PENALTY_DB = 60.0


def signal_to_noise_db(waveform: np.ndarray) -> float:
    """Estimated from the levels of 20 ms blocks: the 90th percentile (speech) over the 10th (pauses, so noise)."""
    block = SAMPLE_RATE_HZ // 50
    blocks = waveform[: len(waveform) // block * block].reshape(-1, block)
    levels_db = 20 * np.log10(np.sqrt((blocks**2).mean(axis=1)) + 1e-6)
    return float(np.percentile(levels_db, 90) - np.percentile(levels_db, 10))


def cleanliness_db(waveform: np.ndarray) -> float:
    """The figure that a reference is chosen by: the signal-to-noise estimate, less a penalty for clipping."""
    clipped = float((np.abs(waveform) >= CLIPPING_PEAK).mean())
    return signal_to_noise_db(waveform) - CLIPPING_PENALTY_DB * min(1.0, clipped * 1000)
