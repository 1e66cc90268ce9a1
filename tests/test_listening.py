"""Figures of generated speech, against constructed audio, pairs counted by hand, and the demo's clips."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VOICE
from fakes import means_of

from finetuning.audio import SAMPLE_RATE_HZ, load_audio
from finetuning.listening import (
    Spoken,
    Yardstick,
    characters_per_second,
    cosine,
    count_characters,
    error_rates,
    measure_each,
    normalized,
    silence_share,
)
from finetuning.manifest import RowFormat
from finetuning.quality import measure_clip
from finetuning.row_index import Manifest, open_rows

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "The train to the coast leaves at nine."
NOTHING = Yardstick(encode=None, vectors={}, characters_per_second={}, recognize=None, opinion=None)


def tone(seconds: float, hz: float = 220.0) -> np.ndarray:
    """(num_samples,) float32, half of full scale."""
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ)).astype(
        "float32"
    )


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLE_RATE_HZ), dtype=np.float32)


def spoken(waveform: np.ndarray, text: str = TEXT, speaker: str = "Ada", stopped: bool = True) -> Spoken:
    return Spoken(text, speaker, waveform, round(len(waveform) / 1920), stopped)


def clip(number: int) -> np.ndarray:
    return load_audio(VOICE / "clips" / f"train_{number:02}.flac")


# ------------------------------------------------------------------------------------------------------- the voice


@pytest.fixture(scope="module")
def encode() -> Callable[[np.ndarray], np.ndarray]:
    from finetuning.base_model import load_speaker_encoder, resolve_base
    from finetuning.settings import load_settings

    return load_speaker_encoder(resolve_base(load_settings({"init_model_path": "tiny-random"}, environment={})))


def test_similarity_is_one_on_the_reference_and_lower_on_others(encode: Callable) -> None:
    """The random encoder hears little, but a tone is further from a clip than another clip of the voice."""
    yardstick = replace(NOTHING, encode=encode, vectors={"ada": encode(clip(1))})
    waveforms = [clip(1), clip(2), tone(2.0)]
    own, other, no_voice = (
        figures["speaker_embedding_similarity"] for figures in measure_each(list(map(spoken, waveforms)), yardstick)
    )
    assert own == pytest.approx(1.0, abs=1e-6)
    assert no_voice < other < own


def test_similarity_is_to_the_samples_own_speaker_in_any_case() -> None:
    vectors = {"ada": np.array([1.0, 0.0]), "bea": np.array([0.0, 2.0])}
    yardstick = replace(NOTHING, encode=lambda waveform: np.array([3.0, 4.0], np.float32), vectors=vectors)
    samples = [spoken(tone(1.0), speaker=speaker) for speaker in ("ADA", "bea")]
    found = [figures["speaker_embedding_similarity"] for figures in measure_each(samples, yardstick)]
    assert found == pytest.approx([0.6, 0.8])
    assert means_of(samples, yardstick)["speaker_embedding_similarity"] == pytest.approx(0.7)


def test_cosine() -> None:
    assert cosine([1, 2], [2, 4]) == pytest.approx(1.0)
    assert cosine([1, 0], [-3, 0]) == pytest.approx(-1.0)
    assert np.isnan(cosine([0, 0], [1, 0]))


def test_speaker_without_a_vector_and_base_without_an_encoder_are_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = [spoken(tone(1.0)), spoken(tone(1.0))]
    for yardstick in (NOTHING, replace(NOTHING, encode=lambda waveform: np.ones(2))):
        yardstick = replace(yardstick)  # with nothing said
        for _ in range(2):
            assert set(means_of(samples, yardstick)) == {"seconds", "eos_rate", "silence_share"}
        said = capsys.readouterr().out
        assert said.count("speaker_embedding_similarity is not measured") == 1
        assert said.count("speech_rate_ratio is not measured") == 1
    assert 'speaker "Ada", which has no vector' in said


# ------------------------------------------------------------------------------------------- rate, end and silence


def test_rate_ratio_is_one_on_the_training_clip_and_two_at_half_its_duration() -> None:
    """Whatever silence there is around it."""
    import librosa

    waveform = clip(1)
    figures = measure_clip(waveform)
    speech = figures["seconds"] - figures["leading_silence_seconds"] - figures["trailing_silence_seconds"]
    yardstick = replace(NOTHING, characters_per_second={"ada": count_characters(TEXT) / speech})
    fast = librosa.effects.time_stretch(waveform, rate=2.0)
    padded = np.concatenate([silence(0.7), fast, silence(1.5)])
    ratios = [of["speech_rate_ratio"] for of in measure_each(list(map(spoken, (waveform, fast, padded))), yardstick)]
    assert ratios[0] == pytest.approx(1.0, rel=0.01)
    assert ratios[1:] == pytest.approx([2.0, 2.0], rel=0.05)


def test_eos_rate_and_seconds() -> None:
    samples = [spoken(tone(seconds), stopped=stopped) for seconds, stopped in [(1.0, True), (2.0, True), (6.0, False)]]
    figures = means_of(samples, NOTHING)
    assert figures["eos_rate"] == pytest.approx(2 / 3)
    assert figures["seconds"] == pytest.approx(3.0)
    assert [of["eos_rate"] for of in measure_each(samples, NOTHING)] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("parts", "share"),
    [
        ([tone(2.0)], 0.0),
        ([silence(0.5), tone(1.0), silence(0.5)], 0.5),
        ([tone(1.0), silence(0.6), tone(0.4)], 0.3),
        ([silence(0.005)], 1.0),
    ],
)
def test_silence_share(parts: list[np.ndarray], share: float) -> None:
    assert silence_share(np.concatenate(parts)) == pytest.approx(share, abs=0.01)


def test_silence_share_of_noise_between_words() -> None:
    noise = np.random.default_rng(0).normal(0, 1e-3, 2 * SAMPLE_RATE_HZ).astype(np.float32)
    noise[SAMPLE_RATE_HZ // 2 : SAMPLE_RATE_HZ] += tone(0.5)
    assert silence_share(noise) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(
    "waveform",
    [silence(2.0), np.zeros(0, np.float32), tone(0.2), np.full(SAMPLE_RATE_HZ, np.nan, np.float32)],
    ids=["silent", "empty", "short", "nan"],
)
def test_what_nobody_can_hear_said_nothing(waveform: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    """Its words are all wrong and no judge is asked; it does not spoil the means of the others."""
    yardstick = Yardstick(
        encode=lambda waveform: np.ones(2),
        vectors={"ada": np.ones(2)},
        characters_per_second={"ada": 10.0},
        recognize=lambda waveforms: [TEXT] * len(waveforms),
        opinion=lambda waveform: 4.0,
    )
    samples = [spoken(tone(1.0)), spoken(waveform, stopped=False)]
    good, bad = measure_each(samples, yardstick)
    seconds = len(waveform) / SAMPLE_RATE_HZ
    assert bad == {"seconds": seconds, "eos_rate": 0.0, "silence_share": 1.0, "wer": 1.0, "cer": 1.0}
    assert good == pytest.approx(
        {"seconds": 1.0, "eos_rate": 1.0, "silence_share": 0.0, "speaker_embedding_similarity": 1.0,
         "speech_rate_ratio": 3.0, "mos": 4.0, "wer": 0.0, "cer": 0.0}
    )  # fmt: skip
    together = means_of(samples, yardstick)
    assert (together["mos"], together["wer"], together["eos_rate"]) == (4.0, 0.5, 0.5)
    assert capsys.readouterr().out.count("without audible speech") == 1


def test_nothing_is_measured_of_no_sample() -> None:
    assert means_of([], replace(NOTHING, recognize=lambda waveforms: [])) == {}


# ------------------------------------------------------------------------------------------- rate of training data


@pytest.fixture
def manifest_of(write_jsonl: Callable, demo_rows: list[dict]) -> Callable[..., Manifest]:
    """Rows with codes of the demo; keywords replace keys, in turn."""

    def make(rows: Sequence[dict[str, Any]]) -> Manifest:
        path = write_jsonl([demo_rows[n] | row for n, row in enumerate(rows)])
        return open_rows(path, RowFormat(default_speaker="Ada"), "TRAIN_JSONL")

    return make


def measured(seconds: float, leading: float = 0.0, trailing: float = 0.0) -> dict[str, Any]:
    figures = {"seconds": seconds, "leading_silence_seconds": leading, "trailing_silence_seconds": trailing}
    return {"measures": figures | {"loudness_lufs": None, "audio_hash": "00seconds11"}}


def test_rate_is_that_of_all_speech_of_a_speaker(manifest_of: Callable) -> None:
    rows = [
        {"text": "Ten letters", "speaker": "Ada"} | measured(2.0, 0.5, 0.5),
        {"text": "Zürich: 12 Ärzte!", "speaker": "Ada"} | measured(5.25, trailing=0.25),
        {"text": "你好，世界", "speaker": "Bea"} | measured(1e0),
        {"text": "e\u0301te\u0301", "speaker": "Cleo"} | measured(1.5),
    ]
    rates = characters_per_second(manifest_of(rows))
    assert rates == pytest.approx({"ada": (10 + 13) / (1.0 + 5.0), "bea": 4.0, "cleo": 2.0})
    view = manifest_of(rows).select(np.array([2, 0]))
    assert characters_per_second(view) == pytest.approx({"bea": 4.0, "ada": 10.0})


def test_rate_of_rows_that_were_not_measured_is_that_of_their_frames(
    manifest_of: Callable, demo_rows: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    """Foreign columns called measures are none; a speaker with some measured rows has the rate of these."""
    rows = [
        {"text": "abcd", "speaker": "Ada"},
        {"text": "abcdef", "speaker": "Ada", "measures": {"seconds": "long", "snr_db": 3}},
        {"text": "abcdef", "speaker": "Bea"},
        {"text": "abcdef", "speaker": "Bea"} | measured(2.0),
    ]
    rates = characters_per_second(manifest_of(rows))
    seconds = sum(len(demo_rows[n]["audio_codes"]) for n in range(2)) / 12.5
    assert rates == pytest.approx({"ada": 10 / seconds, "bea": 3.0})
    assert capsys.readouterr().out.count("speech rate of ada: the rows were not measured") == 1


def test_altered_copies_have_no_part_in_the_rate(manifest_of: Callable) -> None:
    rows = [
        {"text": "abcdef", "speaker": "Ada"} | measured(2.0),
        {"text": "abcdef", "speaker": "Ada", "augmentation": {"speed": 2.0}} | measured(1.0),
        {"text": "abcdef", "speaker": "Bea", "augmentation": {"speed": 2.0}} | measured(1.0),
    ]
    assert characters_per_second(manifest_of(rows)) == pytest.approx({"ada": 3.0, "bea": 6.0})


def test_speaker_whose_rows_say_nothing_has_no_rate(manifest_of: Callable) -> None:
    rows = [{"text": "…", "speaker": "Ada"} | measured(2.0), {"text": "abc", "speaker": "Bea"} | measured(1.0)]
    assert characters_per_second(manifest_of(rows)) == {"bea": 3.0}


def test_characters_are_counted_alike_in_rows_and_samples(manifest_of: Callable) -> None:
    texts = ["Don't — 3½ kg!", "नमस्ते दुनिया", "Ọ̀rọ̀ Yorùbá", "ㄅㄆㄇ 한국어 ١٢٣", "a_b\u200bc"]
    rows = [{"text": text, "speaker": f"s{n}"} | measured(1.0) for n, text in enumerate(texts)]
    rates = characters_per_second(manifest_of(rows))
    assert rates == {f"s{n}": count_characters(text) for n, text in enumerate(texts)}


def test_the_demos_own_clips_have_a_ratio_near_one(write_jsonl: Callable, demo_rows: list[dict]) -> None:
    clips = [load_audio(row["audio"]) for row in demo_rows[:8]]
    rows = [row | {"measures": measure_clip(clip)} for row, clip in zip(demo_rows, clips, strict=False)]
    rates = characters_per_second(open_rows(write_jsonl(rows), RowFormat(default_speaker="Ada"), "TRAIN_JSONL"))
    samples = [spoken(clip, row["text"]) for clip, row in zip(clips, demo_rows, strict=False)]
    assert means_of(samples, replace(NOTHING, characters_per_second=rates))["speech_rate_ratio"] == pytest.approx(
        1.0, abs=0.1
    )


# ------------------------------------------------------------------------------------------------------- the words


@pytest.mark.parametrize(
    ("text", "understood", "wer", "cer"),
    [
        ("The cat sat.", "the cat sat", 0, 0),
        ("the cat sat", "the bat sat down", 2 / 3, 5 / 9),  # one substituted, one put in; c->b and "down"
        ("one two three four", "one three four", 1 / 4, 3 / 15),
        ("Don't stop", "dont  stop!", 0, 0),
        ("a well-known man", "a well known man", 0, 0),
        ("ab cd", "abcd", 1.0, 0),  # two words for one: one substituted, one left out
        ("three", "3", 1.0, 1.0),
        ("hello", "", 1.0, 1.0),
        ("a", "a b c", 2.0, 2.0),
        ("你好，世界", "你好世界", 1.0, 0),  # a script without blanks between words: look at cer
        ("Ｆｕｌｌ ｗｉｄｔｈ １２", "full width 12", 0, 0),
    ],
)
def test_error_rates_counted_by_hand(text: str, understood: str, wer: float, cer: float) -> None:
    assert error_rates(text, understood) == pytest.approx({"wer": wer, "cer": cer})


def test_text_without_words_has_no_error_rates() -> None:
    assert error_rates("…!", "hello") == {}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  Hello,\tWORLD! ", "hello world"),
        ("It\u2019s \u02bcyan Mata\u00b4s", "its yan matas"),
        ("e\u0301té", "été"),
        ("STRASSE Straße", "strasse strasse"),
        ("½ 3² $5", "1 2 32 5"),
        ("na\u200bme", "name"),
        ("नमस्ते Yorùbá", "नमस्ते yorùbá"),
        ("snake_case/and", "snake case and"),
    ],
)
def test_normalized(text: str, wanted: str) -> None:
    assert normalized(text) == wanted


def test_words_are_those_of_each_sample() -> None:
    understood = {1.0: "one", 2.0: "two two", 3.0: "three"}
    asked: list[int] = []

    def recognize(waveforms: Sequence[np.ndarray]) -> list[str]:
        asked.append(len(waveforms))
        return [understood[len(waveform) / SAMPLE_RATE_HZ] for waveform in waveforms]

    samples = [
        spoken(tone(1.0), "One"),
        spoken(silence(1.0), "No"),
        spoken(tone(2.0), "Two"),
        spoken(tone(3.0), "Free"),
    ]
    found = [(of["wer"], of["cer"]) for of in measure_each(samples, replace(NOTHING, recognize=recognize))]
    assert found == [(0.0, 0.0), (1.0, 1.0), (1.0, 1.0), (1.0, pytest.approx(2 / 4))]
    assert asked == [1, 1, 1]  # the silent one was not shown
    assert means_of(samples, replace(NOTHING, recognize=recognize))["wer"] == pytest.approx(3 / 4)


# ------------------------------------------------------------------------------------------------- judges that fail


def test_judges_that_fail_cost_their_figures_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(_: Any) -> Any:
        raise RuntimeError("out of memory\nmore of it")

    yardstick = Yardstick(fails, {"ada": np.ones(2)}, {"ada": 10.0}, recognize=fails, opinion=fails)
    for _ in range(2):
        figures = means_of([spoken(tone(1.0)), spoken(tone(2.0))], yardstick)
        assert set(figures) == {"seconds", "eos_rate", "silence_share", "speech_rate_ratio"}
    said = capsys.readouterr().out
    names = ("speaker_embedding_similarity", "wer and cer", "mos")
    for name in names:
        assert said.count(f"{name} could not be measured (RuntimeError: out of memory)") == 1
    assert yardstick.failures == dict.fromkeys(names, ["RuntimeError: out of memory"] * 4)
    assert yardstick.num_failures == 12


def test_a_clip_that_a_recogniser_fails_on_costs_only_itself() -> None:
    def recognize(waveforms: Sequence[np.ndarray]) -> list[str]:
        if any(len(waveform) > 1.5 * SAMPLE_RATE_HZ for waveform in waveforms):
            raise RuntimeError("too long")
        return ["one"] * len(waveforms)

    yardstick = replace(NOTHING, recognize=recognize)
    found = measure_each([spoken(tone(seconds), "One") for seconds in (1.0, 2.0, 1.2)], yardstick)
    assert ["wer" in figures for figures in found] == [True, False, True]
    assert yardstick.failures == {"wer and cer": ["RuntimeError: too long"]}


def test_figures_that_are_no_numbers_are_absent() -> None:
    yardstick = replace(NOTHING, encode=lambda waveform: np.zeros(2), vectors={"ada": np.ones(2)})
    assert "speaker_embedding_similarity" not in means_of([spoken(tone(1.0))], yardstick)
    assert "mos" not in means_of([spoken(tone(1.0))], replace(NOTHING, opinion=lambda waveform: float("nan")))


def test_figures_are_json(encode: Callable, tmp_path: Path) -> None:
    yardstick = replace(NOTHING, encode=encode, vectors={"ada": encode(clip(1))}, opinion=lambda _: np.float32(4.0))
    json.dumps(measure_each([spoken(clip(1))], yardstick))
