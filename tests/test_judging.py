"""The judges of samples: on the device while they are asked, broken off when a stop is asked for, and of all samples or
not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import means_of
from torch import nn

from finetuning.audio import SAMPLE_RATE_HZ
from finetuning.judging import Judge
from finetuning.listening import Spoken, Yardstick
from finetuning.recognition import load_opinion
from finetuning.samples import Sample
from finetuning.signals import Interrupted

TONE = (0.5 * np.sin(np.arange(SAMPLE_RATE_HZ) / 17)).astype(np.float32)
SILENCE = np.zeros_like(TONE)


class Scale(nn.Module):
    """An opinion of its own, which notes where it is sent to."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def to(self, device: str) -> Scale:
        self.places.append(device)
        return self

    def __call__(self, waveform: np.ndarray) -> float:
        assert self.places[-1] == "meta"
        return 4.0


def sample(text: str = "Yes.", speaker: str = "Anna", waveform: np.ndarray = TONE) -> Sample:
    return Sample(text, speaker, "Auto", np.zeros((13, 16), np.int16), waveform, True, 42, Path("x.wav"))


def judge(**judges: Any) -> Judge:
    return Judge("meta", None, {}, {"anna": 10.0}, **judges)


def test_judges_come_to_the_device_only_while_they_are_asked() -> None:
    """And go again when one of them fails, or is broken off."""
    scale, recognizer = Scale(), Scale()
    asked = judge(opinion=scale, recognize=recognizer)
    assert scale.places == ["cpu"]
    found = asked([sample(), sample()], lambda: None)
    assert found.figures["mos"] == 4.0 and "wer" not in found.figures  # a float is no list of texts: said, passed over
    assert scale.places == recognizer.places == ["cpu", "meta", "cpu"]

    def stop() -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        asked([sample()], stop)
    assert scale.places[-2:] == ["meta", "cpu"]


def test_a_stop_comes_between_two_clips() -> None:
    heard: list[int] = []

    def recognize(waveforms: Any) -> list[str]:
        heard.append(len(waveforms))
        return ["yes"]

    def check() -> None:
        if len(heard) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        judge(recognize=recognize)([sample()] * 5, check)
    assert heard == [1, 1]


def test_figures_are_those_of_the_yardstick() -> None:
    """Clip by clip the recogniser gives what it gives at once."""

    def recognize(waveforms: Any) -> list[str]:
        return ["yes" if abs(waveform[0]) < 1e-6 else "no" for waveform in waveforms]

    samples = [sample(), sample(waveform=TONE[1:]), sample(waveform=SILENCE)]
    spoken = [Spoken(one.text, one.speaker, one.waveform, 13, True) for one in samples]
    wanted = means_of(spoken, Yardstick(None, {}, {"anna": 10.0}, recognize, None))
    assert judge(recognize=recognize)(samples, lambda: None).figures == wanted and wanted["wer"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("samples", "missing"),
    [
        ([sample(), sample("No.")], set()),
        ([sample(), sample(waveform=SILENCE)], {"mos", "speech_rate_ratio"}),  # of silence all words are missing
        ([sample(), sample("…")], set()),  # no word, no letter: there never is a figure
        ([sample(), sample(speaker="Bert")], set()),  # whose rows give no rate
    ],
)
def test_what_is_known_of_all_samples(samples: list[Sample], missing: set[str]) -> None:
    found = Judge("cpu", None, {}, {"anna": 10.0}, lambda clips: ["yes"] * len(clips), lambda _: 3.0)(
        samples, lambda: None
    )
    assert {"mos", "wer", "cer", "speech_rate_ratio", "eos_rate"} <= found.figures.keys()
    assert found.figures.keys() - found.whole == missing


def test_a_judge_that_fails_once_is_not_whole() -> None:
    answers = iter([1.0, None, 3.0])
    found = judge(opinion=lambda _: float(next(answers)))([sample()] * 3, lambda: None)
    assert found.figures["mos"] == 2.0 and "mos" not in found.whole


def test_a_predictor_is_moved_and_asked_where_it_was(tmp_path: Path) -> None:
    class Loudness(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, waveform: torch.Tensor) -> torch.Tensor:
            return self.scale * waveform.abs().mean()

    torch.jit.script(Loudness()).save(str(tmp_path / "mos.pt"))
    opinion = load_opinion(str(tmp_path / "mos.pt"), "cpu")
    score = opinion(TONE)
    assert score == pytest.approx(2 * np.abs(TONE).mean(), rel=0.02)  # at 16 kHz instead of 24
    opinion.to("cpu")
    assert opinion(TONE) == score
