"""Raw rows to rows with codes: order, reuse, interruption, bad clips, and the rows that a run opens.

Bookkeeping is tested with a fake codec that counts; the finished bytes of an interrupted run with the real tiny one.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from finetuning.audio import load_audio
from finetuning.base_model import Base, resolve_base
from finetuning.codec import Codec
from finetuning.errors import UserError
from finetuning.manifest import RowFormat
from finetuning.prepare import codec_fingerprint, dataset_info, encode_jsonl, encoded_path, format_info
from finetuning.training_rows import check_train_jsonl, open_training_rows

VOICE = Path(__file__).parent.parent / "voices" / "english_voice"
MakeSettings = Callable[..., Any]
MakeRaw = Callable[..., Path]


def fake_codes(waveform: np.ndarray) -> np.ndarray:
    """Codes that depend on the samples alone."""
    generator = np.random.default_rng(zlib.crc32(waveform.tobytes()))
    return generator.integers(0, 2048, (-(-len(waveform) // 1920), 16)).astype(np.int16)


class FakeCodec:
    """Counts how often it is built and what it encodes; raises when ``batches_left`` is used up."""

    def __init__(self) -> None:
        self.num_built = 0
        self.batch_sizes: list[int] = []
        self.batches_left = 1_000_000

    def build(self, folder: Path, device: str = "cpu") -> FakeCodec:
        self.num_built += 1
        return self

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self.batches_left == 0:
            raise KeyboardInterrupt
        self.batches_left -= 1
        self.batch_sizes.append(len(waveforms))
        return [fake_codes(waveform) for waveform in waveforms]

    def take_num_clips(self) -> int:
        """How many clips were encoded since the last call."""
        number = sum(self.batch_sizes)
        self.batch_sizes.clear()
        return number


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The toy layers are too small to share; on a busy machine a second thread makes them many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCodec:
    fake_codec = FakeCodec()
    monkeypatch.setattr("finetuning.prepare.Codec", fake_codec.build)
    return fake_codec


@pytest.fixture
def codec_folder(tmp_path: Path) -> Path:
    """What a fingerprint is taken of."""
    folder = tmp_path / "codec"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(scope="module")
def base() -> Base:
    from finetuning.settings import load_settings

    return resolve_base(load_settings({"init_model_path": "tiny-random"}, environment={}))


def write_clip(path: Path, seed: int, seconds: float = 0.5) -> None:
    noise = np.random.default_rng(seed).normal(0, 0.1, round(seconds * 24_000))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise, 24_000)


@pytest.fixture
def make_raw(tmp_path: Path) -> MakeRaw:
    """Writes a raw JSONL in tmp_path/data with so many clips beside it, long and short ones mixed."""

    def make(num_clips: int = 6, name: str = "train.jsonl", **fields: Any) -> Path:
        folder = tmp_path / "data"
        rows = []
        for index in range(num_clips):
            audio = f"{Path(name).stem}_clips/{index:02}.wav"
            write_clip(folder / audio, zlib.crc32(name.encode()) + index, seconds=0.4 + 0.1 * (index * 5 % 7))
            rows.append({"audio": audio, "text": f"Sentence {index}.", "mood": {"number": index}} | fields)
        write_rows(folder / name, rows)
        return folder / name

    return make


def write_rows(path: Path, rows: list[Any]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected_codes(raw: Path) -> list[list[list[int]]]:
    return [fake_codes(load_audio(raw.parent / row["audio"])).tolist() for row in read_rows(raw)]


def encode(raw: Path, codec_folder: Path, output: Path | None = None, **arguments: Any) -> Path:
    return encode_jsonl(raw, output or encoded_path(raw), codec_folder, RowFormat(), **arguments)


def names_in(folder: Path) -> set[str]:
    """Files of a folder, those in folders of its own left out."""
    return {path.name for path in folder.iterdir() if path.is_file()}


# -------------------------------------------------------------------------------------------------------- encoding


def test_rows_keep_their_order_and_keys(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(6, ref_audio="train_clips/00.wav", language="English")
    output = encode(raw, codec_folder, max_clips_per_batch=2)
    rows = read_rows(output)
    assert output == raw.parent / "train.encoded.jsonl"
    assert [row.pop("audio_codes") for row in rows] == expected_codes(raw)
    for row in rows:
        row.pop("codes_source")
    assert rows == read_rows(raw)
    assert fake.batch_sizes == [2, 2, 2]
    assert names_in(raw.parent) == {"train.jsonl", "train.encoded.jsonl"}


def test_clips_of_similar_length_share_a_batch(
    make_raw: MakeRaw, codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[list[int]] = []

    class Watching(FakeCodec):
        def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
            lengths.append([len(waveform) for waveform in waveforms])
            return super().encode(waveforms)

    monkeypatch.setattr("finetuning.prepare.Codec", Watching().build)
    encode(make_raw(7), codec_folder, max_clips_per_batch=3)
    assert [len(batch) for batch in lengths] == [3, 3, 1]
    in_order = [length for batch in lengths for length in batch]
    assert in_order == sorted(in_order)


def test_long_clips_make_small_batches(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetuning.prepare.MAX_SECONDS_PER_BATCH", 2.0)  # clips of 0.4, 0.5, … 1.0 s
    encode(make_raw(7), codec_folder)
    assert fake.batch_sizes == [3, 2, 2]  # 3 x 0.6, 2 x 0.8, 2 x 1.0


def test_output_elsewhere_still_finds_the_clips(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, tmp_path: Path
) -> None:
    raw = make_raw(2, ref_audio="train_clips/01.wav")
    output = encode(raw, codec_folder, tmp_path / "new" / "folder" / "rows.jsonl")
    clips = raw.parent / "train_clips"
    assert [Path(row["audio"]) for row in read_rows(output)] == [clips / "00.wav", clips / "01.wav"]
    assert [Path(row["ref_audio"]) for row in read_rows(output)] == [clips / "01.wav"] * 2


def test_chosen_audio_key(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, tmp_path: Path) -> None:
    raw = make_raw(2)
    write_rows(raw, [{"path": row["audio"], "text": row["text"]} for row in read_rows(raw)])
    output = encode_jsonl(raw, tmp_path / "out" / "rows.jsonl", codec_folder, RowFormat(audio_key="path"))
    rows = read_rows(output)
    assert Path(rows[0]["path"]) == raw.parent / "train_clips/00.wav" and "audio" not in rows[0]
    assert len(rows[0]["audio_codes"]) > 2


def test_two_rows_of_one_clip(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(2)
    rows = read_rows(raw)
    write_rows(raw, [*rows, rows[0] | {"text": "Again."}])
    encoded = read_rows(encode(raw, codec_folder))
    assert [row["text"] for row in encoded] == ["Sentence 0.", "Sentence 1.", "Again."]
    assert encoded[2]["audio_codes"] == encoded[0]["audio_codes"] != encoded[1]["audio_codes"]


def test_rows_with_codes_pass_through_though_their_audio_is_gone(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path
) -> None:
    raw = make_raw(3)
    rows = read_rows(raw)
    (raw.parent / rows[1]["audio"]).unlink()
    rows[1]["audio_codes"] = [[5] * 16] * 4
    write_rows(raw, rows)
    encoded = read_rows(encode(raw, codec_folder))
    assert encoded[1] == rows[1]
    assert fake.take_num_clips() == 2 and len(encoded) == 3
    assert encoded[2]["audio_codes"] == fake_codes(load_audio(raw.parent / rows[2]["audio"])).tolist()


def test_null_codes_count_as_none(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(2, audio_codes=None)
    assert [row["audio_codes"] for row in read_rows(encode(raw, codec_folder))] == expected_codes(raw)


# ----------------------------------------------------------------------------------------------------------- reuse


def test_unchanged_input_encodes_nothing_again(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(4)
    before = encode(raw, codec_folder).read_bytes()
    assert (fake.num_built, fake.take_num_clips()) == (1, 4)
    assert encode(raw, codec_folder).read_bytes() == before
    assert (fake.num_built, fake.take_num_clips()) == (1, 0)


def test_new_rows_and_new_texts_reuse_the_codes(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(4)
    encode(raw, codec_folder)
    fake.take_num_clips()
    write_clip(raw.parent / "new.wav", seed=99)
    rows = [row | {"text": "Corrected."} for row in reversed(read_rows(raw))]
    write_rows(raw, [{"audio": "new.wav", "text": "New."}, *rows])
    encoded = read_rows(encode(raw, codec_folder))
    assert fake.take_num_clips() == 1
    assert [row["text"] for row in encoded] == ["New.", *["Corrected."] * 4]
    assert [row["audio_codes"] for row in encoded] == expected_codes(raw)


def test_touched_clip_is_encoded_again(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_raw(4)
    encode(raw, codec_folder)
    fake.take_num_clips()
    capsys.readouterr()
    os.utime(raw.parent / "train_clips/02.wav", (1, 1))
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 1
    assert "1 clips or their codec changed" in capsys.readouterr().out


def test_replaced_clip_gets_new_codes(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(4)
    before = read_rows(encode(raw, codec_folder))
    clip = raw.parent / "train_clips/02.wav"
    status = clip.stat()
    write_clip(clip, seed=99, seconds=1.3)
    os.utime(clip, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp -p` does: only the size tells
    after = read_rows(encode(raw, codec_folder))
    assert [row["audio_codes"] for row in after] == expected_codes(raw)
    assert [old["audio_codes"] == new["audio_codes"] for old, new in zip(before, after, strict=True)] == [
        True, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_other_codec_encodes_everything_again(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    raw = make_raw(4)
    encode(raw, codec_folder)
    fake.take_num_clips()
    capsys.readouterr()
    (codec_folder / file).write_bytes(b"others!")
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 4
    assert "4 clips or their codec changed" in capsys.readouterr().out
    assert {row["codes_source"]["codec"] for row in read_rows(encoded_path(raw))} == {codec_fingerprint(codec_folder)}


def test_moved_folder_of_the_same_codec_is_the_same_codec(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, tmp_path: Path
) -> None:
    raw = make_raw(3)
    encode(raw, codec_folder)
    fake.take_num_clips()
    encode(raw, codec_folder.rename(tmp_path / "moved"))
    assert fake.take_num_clips() == 0


def test_force_encodes_again(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(4)
    before = encode(raw, codec_folder).read_bytes()
    fake.take_num_clips()
    assert encode(raw, codec_folder, force=True).read_bytes() == before
    assert fake.take_num_clips() == 4


def test_force_mends_wrong_codes(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(3)
    output = encode(raw, codec_folder)
    write_rows(output, [row | {"audio_codes": [[1] * 16] * 4} for row in read_rows(output)])
    assert [row["audio_codes"] for row in read_rows(encode(raw, codec_folder))] == [[[1] * 16] * 4] * 3
    assert [row["audio_codes"] for row in read_rows(encode(raw, codec_folder, force=True))] == expected_codes(raw)


def test_part_of_a_file_leaves_the_full_result_alone(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(5)
    full = encode(raw, codec_folder)
    content = full.read_bytes()
    fake.take_num_clips()
    part = encode(raw, codec_folder, encoded_path(raw, 2), max_rows=2)
    assert part != full and full.read_bytes() == content
    assert read_rows(part) == read_rows(full)[:2]
    assert (fake.num_built, fake.take_num_clips()) == (1, 0)


def test_full_file_after_a_part(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(5)
    encode(raw, codec_folder, encoded_path(raw, 2), max_rows=2)
    assert fake.take_num_clips() == 2
    assert [row["audio_codes"] for row in read_rows(encode(raw, codec_folder))] == expected_codes(raw)


# ---------------------------------------------------------------------------------------------------- interruption


def interrupt(fake: FakeCodec, raw: Path, codec_folder: Path, after_batches: int = 1, force: bool = False) -> Path:
    """An encode that is stopped after some batches of two; returns the journal."""
    fake.batches_left = after_batches
    with pytest.raises(KeyboardInterrupt):
        encode(raw, codec_folder, max_clips_per_batch=2, force=force)
    fake.batches_left = 1_000_000
    assert fake.take_num_clips() == 2 * after_batches
    assert not encoded_path(raw).exists()
    (journal,) = [path for path in raw.parent.iterdir() if path.is_file() and path != raw]
    return journal


def test_interrupted_run_goes_on_where_it_stopped(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(7)
    interrupt(fake, raw, codec_folder, after_batches=2)
    output = encode(raw, codec_folder, max_clips_per_batch=2)
    assert fake.take_num_clips() == 3
    assert names_in(raw.parent) == {raw.name, output.name}
    at_one_go = encode(raw, codec_folder, raw.parent / "again.jsonl", force=True)
    assert fake.take_num_clips() == 7
    assert output.read_bytes() == at_one_go.read_bytes()


@pytest.mark.parametrize("cut_bytes, encoded_again", [(1, 3), (2, 4), (100, 4)])
def test_journal_whose_last_line_is_cut_off(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, cut_bytes: int, encoded_again: int
) -> None:
    """One byte is the line's end: its record is whole, and is used."""
    raw = make_raw(5)
    journal = interrupt(fake, raw, codec_folder)
    journal.write_bytes(journal.read_bytes()[:-cut_bytes])
    output = encode(raw, codec_folder, max_clips_per_batch=2)
    assert fake.take_num_clips() == encoded_again
    assert [row["audio_codes"] for row in read_rows(output)] == expected_codes(raw)


def test_interrupted_again_behind_a_cut_line(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    """What is journalled behind a cut line must not be glued to it."""
    raw = make_raw(7)
    journal = interrupt(fake, raw, codec_folder)
    journal.write_bytes(journal.read_bytes()[:-100])
    interrupt(fake, raw, codec_folder)
    output = encode(raw, codec_folder, max_clips_per_batch=2)
    assert fake.take_num_clips() == 7 - 1 - 2
    assert [row["audio_codes"] for row in read_rows(output)] == expected_codes(raw)


def test_journal_of_another_codec_or_a_changed_clip_is_not_used(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path
) -> None:
    raw = make_raw(5)
    interrupt(fake, raw, codec_folder, after_batches=2)
    for clip in (raw.parent / "train_clips").iterdir():
        os.utime(clip, (1, 1))
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 5
    encoded_path(raw).unlink()
    interrupt(fake, raw, codec_folder, after_batches=2)
    (codec_folder / "model.safetensors").write_bytes(b"others!")
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 5


def test_force_throws_the_journal_away(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    """What goes on after a forced run was interrupted must not use codes from before it."""
    raw = make_raw(7)
    interrupt(fake, raw, codec_folder, after_batches=2)
    interrupt(fake, raw, codec_folder, after_batches=1, force=True)
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 7 - 2


def test_interrupted_run_of_the_real_codec_gives_the_same_bytes(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_rows(VOICE / "train_raw.jsonl")[:10]
    raw = tmp_path / "raw.jsonl"
    write_rows(raw, [{"audio": str(VOICE / row["audio"]), "text": row["text"]} for row in rows])
    encoded_clips: list[int] = []
    stock_encode = Codec.encode

    def encode_until_killed(self: Codec, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        if sum(encoded_clips) == 4:
            raise KeyboardInterrupt
        encoded_clips.append(len(waveforms))
        return stock_encode(self, waveforms)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Codec, "encode", encode_until_killed)
        encode(raw, codec.folder, max_clips_per_batch=4)
    output = encode(raw, codec.folder, max_clips_per_batch=4)
    at_one_go = encode(raw, codec.folder, tmp_path / "again.jsonl", max_clips_per_batch=4, force=True)
    assert output.read_bytes() == at_one_go.read_bytes()
    codes = [np.array(row["audio_codes"]) for row in read_rows(output)]
    assert [len(clip) for clip in codes] == [-(-len(load_audio(VOICE / row["audio"])) // 1920) for row in rows]


# ------------------------------------------------------------------------------------------------------- bad input


def test_few_bad_clips_are_left_out_and_listed(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_raw(20)
    soundfile.write(raw.parent / "train_clips/04.wav", np.zeros(24_000), 24_000)
    (raw.parent / "train_clips/11.wav").unlink()
    output = encode(raw, codec_folder)
    assert [row["mood"]["number"] for row in read_rows(output)] == [n for n in range(20) if n not in (4, 11)]
    listed = {item["line"]: item for item in read_rows(raw.parent / "train.encoded.rejected.jsonl")}
    assert listed.keys() == {5, 12}
    assert "silence" in listed[5]["reason"] and json.loads(listed[5]["row"])["text"] == "Sentence 4."
    assert "not found" in listed[12]["reason"] and {item["file"] for item in listed.values()} == {str(raw)}
    assert "2 of 20" in capsys.readouterr().out


def test_bad_clip_is_tried_again_and_leaves_the_list_once_mended(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path
) -> None:
    raw = make_raw(12)
    clip = raw.parent / "train_clips/04.wav"
    soundfile.write(clip, np.zeros(24_000), 24_000)
    assert len(read_rows(encode(raw, codec_folder))) == 11
    fake.take_num_clips()
    write_clip(clip, seed=99)
    assert len(read_rows(encode(raw, codec_folder))) == 12
    assert fake.take_num_clips() == 1
    assert names_in(raw.parent) == {"train.jsonl", "train.encoded.jsonl"}


def test_many_bad_clips_stop_with_nothing_half_written(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(10)
    for index in (3, 7):
        soundfile.write(raw.parent / f"train_clips/{index:02}.wav", np.zeros(24_000), 24_000)
    with pytest.raises(UserError) as error:
        encode(raw, codec_folder)
    message = str(error.value)
    assert message.startswith("2 of 10 rows cannot be used")
    assert f"{raw} line 4: " in message and f"{raw} line 8: " in message and message.count("silence") == 2
    assert not encoded_path(raw).exists()
    assert names_in(raw.parent) <= {"train.jsonl", "train.encoded.jsonl.partial"}


def test_many_bad_lines_stop_before_anything_is_encoded(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(10)
    rows = read_rows(raw)
    write_rows(raw, [*rows[:8], rows[8] | {"text": ""}, '{"audio": "x'])
    with pytest.raises(UserError, match="2 of 10 rows cannot be used"):
        encode(raw, codec_folder)
    assert fake.num_built == 0
    assert names_in(raw.parent) == {"train.jsonl"}


def test_refused_run_keeps_the_earlier_result(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(4)
    before = encode(raw, codec_folder).read_bytes()
    write_rows(raw, [*read_rows(raw)[:1], "no row"])
    with pytest.raises(UserError):
        encode(raw, codec_folder)
    assert encoded_path(raw).read_bytes() == before


def test_clashing_speakers_stop_before_anything_is_encoded(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path
) -> None:
    raw = make_raw(3)
    write_rows(raw, [row | {"speaker": name} for row, name in zip(read_rows(raw), ("Ada", "Bea", "ada"), strict=True)])
    with pytest.raises(UserError, match="clash"):
        encode(raw, codec_folder)
    assert fake.num_built == 0 and names_in(raw.parent) == {"train.jsonl"}


@pytest.mark.parametrize("content, part", [(None, "does not exist"), ("", "is empty")])
def test_missing_or_empty_input_names_the_setting(
    fake: FakeCodec, codec_folder: Path, tmp_path: Path, content: str | None, part: str
) -> None:
    raw = tmp_path / "raw.jsonl"
    if content is not None:
        raw.write_text(content)
    with pytest.raises(UserError, match=rf"^--input_jsonl: .*raw\.jsonl {part}"):
        encode(raw, codec_folder, setting="--input_jsonl")


def test_output_in_a_place_that_is_no_folder(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    output = tmp_path / "file" / "rows.jsonl"
    with pytest.raises(UserError, match=r"cannot write .*/file/rows\.jsonl"):
        encode(make_raw(3), codec_folder, output)
    assert fake.take_num_clips() == 0


def test_full_disk_at_the_end_loses_no_codes(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    raw = make_raw(3)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        patch.setattr(Path, "rename", refuse)
        encode(raw, codec_folder)
    assert names_in(raw.parent) == {"train.jsonl", "train.encoded.jsonl.partial"}
    fake.take_num_clips()
    assert len(read_rows(encode(raw, codec_folder))) == 3
    assert fake.take_num_clips() == 0


def test_codec_that_cannot_be_loaded_is_not_blamed_on_the_output(
    make_raw: MakeRaw, codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, device: str) -> None:
        raise OSError("no weights found")

    monkeypatch.setattr("finetuning.prepare.Codec", broken)
    with pytest.raises((OSError, UserError)) as error:
        encode(make_raw(3), codec_folder)
    assert "cannot write" not in str(error.value)


# ------------------------------------------------------------------------------------------------- rows of one run


def run_settings(make_settings: MakeSettings, train: Path, validation: Path | None = None, **fields: Any) -> Any:
    """Without a validation file VALIDATION_JSONL stays unset; its default is not there."""
    given = {"train_jsonl": train} | ({"validation_jsonl": validation} if validation else {})
    return make_settings(**given, **fields)


def open_rows(settings: Any, base: Base, build: bool = True) -> Any:
    """``open_training_rows`` as a session calls it."""
    row_format = RowFormat.from_settings(settings, base.special_tokens())
    return open_training_rows(settings, base.codec_folder, row_format, "cpu", build=build)


@pytest.fixture(autouse=True)
def away_from_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default VALIDATION_JSONL is relative; a developer's own data must not be found."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def test_raw_rows_are_encoded_beside_the_file_and_opened(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(6)
    rows = open_rows(run_settings(make_settings, raw), base)
    assert [rows.train[index]["codes"].tolist() for index in range(6)] == expected_codes(raw)
    assert rows.validation is None
    assert encoded_path(raw).is_file()
    open_rows(run_settings(make_settings, raw), base)
    assert (fake.num_built, fake.take_num_clips()) == (1, 6)


def test_real_codec_end_to_end(make_raw: MakeRaw, make_settings: MakeSettings, base: Base, codec: Codec) -> None:
    raw = make_raw(2)
    rows = open_rows(run_settings(make_settings, raw), base)
    clips = [load_audio(raw.parent / row["audio"]) for row in read_rows(raw)]
    for index, expected in enumerate(codec.encode(clips)):
        assert np.array_equal(rows.train[index]["codes"], expected)


def test_rows_with_codes_are_opened_without_a_codec(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(4)
    write_rows(raw, [row | {"audio_codes": [[n] * 16] * 3} for n, row in enumerate(read_rows(raw))])
    for mode in ("jsonl", "none"):
        rows = open_rows(run_settings(make_settings, raw, data_mode=mode), base)
        assert [rows.train[n]["codes"].tolist() for n in range(4)] == [[[n] * 16] * 3 for n in range(4)]
    assert fake.num_built == 0 and names_in(raw.parent) == {"train.jsonl"}


def test_none_mode_never_encodes(fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base) -> None:
    raw = make_raw(4)
    settings = run_settings(make_settings, raw, data_mode="none")
    with pytest.raises(UserError, match="4 of 4 rows cannot be used") as error:
        open_rows(settings, base)
    assert f"{raw} line 1: no audio_codes" in str(error.value)
    assert fake.num_built == 0 and names_in(raw.parent) == {"train.jsonl"}
    assert not settings.output_dir.exists()


def test_other_processes_open_what_the_main_one_built(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    settings = run_settings(make_settings, make_raw(20))
    built = open_rows(settings, base)
    settings.train_jsonl.unlink()  # they need not even see it
    opened = open_rows(settings, base, build=False)
    assert opened.train.column("line").tolist() == built.train.column("line").tolist()
    assert opened.validation is not None and built.validation is not None
    assert opened.validation.column("line").tolist() == built.validation.column("line").tolist()
    assert fake.num_built == 1


def test_validation_fraction_holds_rows_out_where_there_is_no_file(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    settings = run_settings(make_settings, make_raw(20), validation_fraction=0.2)
    rows = open_rows(settings, base)
    assert rows.validation is not None and (len(rows.train), len(rows.validation)) == (16, 4)
    held = rows.validation.column("line").tolist()
    assert sorted(held + rows.train.column("line").tolist()) == list(range(1, 21))
    none = open_rows(run_settings(make_settings, settings.train_jsonl, validation_fraction=0), base)
    assert none.validation is None and len(none.train) == 20


def test_validation_file_comes_before_the_fraction(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    train, validation = make_raw(20), make_raw(3, "validation.jsonl")
    rows = open_rows(run_settings(make_settings, train, validation, validation_fraction=0.2), base)
    assert rows.validation is not None and (len(rows.train), len(rows.validation)) == (20, 3)
    assert [rows.validation[index]["codes"].tolist() for index in range(3)] == expected_codes(validation)


def test_default_validation_file_is_used_when_it_is_there(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, tmp_path: Path
) -> None:
    make_raw(3, "validation.jsonl").parent.rename(tmp_path / "cwd" / "data")
    rows = open_rows(run_settings(make_settings, make_raw(20)), base)
    assert rows.validation is not None and (len(rows.train), len(rows.validation)) == (20, 3)


def test_named_validation_file_that_is_missing_is_an_error_before_anything_is_encoded(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base, tmp_path: Path
) -> None:
    settings = run_settings(make_settings, make_raw(20), tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"^VALIDATION_JSONL: .*nowhere\.jsonl does not exist"):
        open_rows(settings, base)
    assert fake.num_built == 0


def test_sample_limits(fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base) -> None:
    train, validation = make_raw(8), make_raw(6, "validation.jsonl")
    open_rows(run_settings(make_settings, train, validation), base)
    full = encoded_path(train).read_bytes()
    fake.take_num_clips()
    limited = run_settings(make_settings, train, validation, max_train_samples=3, max_eval_samples=2)
    rows = open_rows(limited, base)
    assert rows.train.column("text").tolist() == ["Sentence 0.", "Sentence 1.", "Sentence 2."]
    assert rows.validation is not None and rows.validation.column("text").tolist() == ["Sentence 0.", "Sentence 1."]
    assert encoded_path(train).read_bytes() == full and fake.take_num_clips() == 0


def test_sample_limit_encodes_no_more_than_it_needs(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(8)
    open_rows(run_settings(make_settings, raw, max_train_samples=3), base)
    assert fake.take_num_clips() == 3


def test_eval_limit_holds_for_held_out_rows(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    settings = run_settings(make_settings, make_raw(20), validation_fraction=0.5, max_eval_samples=4)
    rows = open_rows(settings, base)
    assert rows.validation is not None and (len(rows.train), len(rows.validation)) == (10, 4)


def test_validation_rows_of_unknown_speakers_are_left_out(
    fake: FakeCodec,
    make_raw: MakeRaw,
    make_settings: MakeSettings,
    base: Base,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, validation = make_raw(4, speaker="Ada"), make_raw(4, "validation.jsonl")
    names = ("ADA", "Bea", "ADA", "Cid")  # case does not count
    write_rows(validation, [row | {"speaker": name} for row, name in zip(read_rows(validation), names, strict=True)])
    rows = open_rows(run_settings(make_settings, train, validation), base)
    assert rows.validation is not None
    assert rows.validation.column("text").tolist() == ["Sentence 0.", "Sentence 2."]
    assert "2 validation rows are left out" in capsys.readouterr().out
    write_rows(validation, [row | {"speaker": "Bea"} for row in read_rows(validation)])
    assert open_rows(run_settings(make_settings, train, validation), base).validation is None


def test_column_settings_reach_every_step(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(3)
    renamed = [{"path": row["audio"], "sentence": row["text"], "who": 5, "locale": "fr"} for row in read_rows(raw)]
    write_rows(raw, renamed)
    columns = {"text_column": "sentence", "audio_column": "path", "speaker_column": "who", "language_column": "locale"}
    rows = open_rows(run_settings(make_settings, raw, **columns), base)
    first = rows.train[0]
    assert (first["text"], first["speaker"], first["language"]) == ("Sentence 0.", "5", "fr")


def test_special_tokens_of_the_base_are_refused(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(2)
    write_rows(raw, [row | {"text": "Hello <tts_pad>"} for row in read_rows(raw)])
    with pytest.raises(UserError, match="special token <tts_pad>"):
        open_rows(run_settings(make_settings, raw), base)


def test_missing_train_jsonl_names_itself_and_the_dataset_that_was_set(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    missing = tmp_path / "nowhere.jsonl"
    with pytest.raises(UserError, match=r"TRAIN_JSONL: .*nowhere\.jsonl does not exist") as error:
        check_train_jsonl(make_settings(train_jsonl=missing))
    assert "DATASET_NAME" not in str(error.value) and '"audio"' in str(error.value)
    with pytest.raises(UserError, match=r"TRAIN_JSONL: .*nowhere\.jsonl .*DATASET_NAME me/speech"):
        check_train_jsonl(make_settings(train_jsonl=missing, dataset_name="me/speech"))


def test_missing_train_jsonl_stops_a_run(fake: FakeCodec, make_settings: MakeSettings, base: Base) -> None:
    settings = run_settings(make_settings, Path("nowhere.jsonl"))
    with pytest.raises(UserError, match=r"TRAIN_JSONL: nowhere\.jsonl does not exist"):
        open_rows(settings, base)
    assert not settings.output_dir.exists()


# ------------------------------------------------------------------------------------------------------------ info


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two raw rows (1 s and 3 s), two with codes (10 frames each, 0.8 s), one bad."""
    for name, seconds in (("one.wav", 1.0), ("three.wav", 3.0)):
        write_clip(tmp_path / name, seed=1, seconds=seconds)
    coded = {"text": "a", "audio_codes": [[1] * 16] * 10}
    rows = [
        {"audio": "one.wav", "text": "a", "speaker": "Ada", "language": "English"},
        {"audio": "three.wav", "text": "a", "speaker": "Ada"},
        {"audio": "nowhere.wav", "text": "a"},
        coded | {"speaker": "Ada", "audio": "one.wav"},
        coded,
    ]
    write_rows(tmp_path / "mixed.jsonl", rows)
    return tmp_path / "mixed.jsonl"


def test_info_counts_and_measures(mixed: Path) -> None:
    info = dataset_info(mixed, RowFormat())
    assert (info["file"], info["num_samples"], info["num_with_codes"], info["num_bad"]) == (str(mixed), 4, 2, 1)
    assert info["hours"] * 3600 == pytest.approx(1.0 + 3.0 + 0.8 + 0.8)
    assert info["seconds"] == pytest.approx({"min": 0.8, "median": 0.9, "max": 3.0})
    assert info["speakers"] == {"Ada": 3, "reference_speaker": 1}
    assert info["languages"] == {"Auto": 3, "English": 1}


def test_info_as_text(mixed: Path) -> None:
    text = format_info(dataset_info(mixed, RowFormat()))
    for part in (
        f"{mixed}: 4 rows (2 with codes), 0.1 minutes", "0.8 to 3.0 s", "under 0.9 s", "Ada (3), reference_speaker (1)",
        "Auto (3), English (1)", "1 bad rows", "line 3: audio file not found",
    ):  # fmt: skip
        assert part in text


def test_info_of_many_speakers_is_cut(tmp_path: Path) -> None:
    rows = [{"text": "a", "audio_codes": [[1] * 16] * 10, "speaker": f"s{number:02}"} for number in range(12)]
    write_rows(tmp_path / "many.jsonl", rows)
    text = format_info(dataset_info(tmp_path / "many.jsonl", RowFormat()))
    assert "s09 (1), …" in text and "s10" not in text


def test_info_of_nothing_but_bad_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "bad.jsonl", ["{}", "[]"])
    text = format_info(dataset_info(tmp_path / "bad.jsonl", RowFormat()))
    assert "0 rows" in text and "2 bad rows" in text and "length" not in text


# ------------------------------------------------------------------------------- codes that came with the input file


def test_force_encodes_what_already_has_codes(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(3)
    write_rows(raw, [row | {"audio_codes": [[7] * 16] * 4} for row in read_rows(raw)])
    assert all(row["audio_codes"] == [[7] * 16] * 4 for row in read_rows(encode(raw, codec_folder)))
    forced = read_rows(encode(raw, codec_folder, force=True))
    assert not any(row["audio_codes"] == [[7] * 16] * 4 for row in forced)


def test_stale_codes_of_an_encoded_input_are_noticed(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    """An encoded file named as input: its rows say what their codes were made of."""
    encoded = encode(make_raw(3), codec_folder)
    rows = read_rows(encoded)
    rows[1]["codes_source"]["num_bytes"] += 1
    rows[1]["audio_codes"] = [[7] * 16] * 4
    again = encoded.with_name("again.jsonl")
    write_rows(again, rows)
    result = read_rows(encode(again, codec_folder, output=again.with_name("result.jsonl")))
    assert result[0] == rows[0]
    assert result[1]["audio_codes"] != [[7] * 16] * 4


def test_a_clip_too_long_to_generate_is_not_encoded(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetuning.prepare.audio_duration_seconds", lambda path: 3600.0 if "01" in path.name else 1.0)
    raw = make_raw(12)
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 11
    (listed,) = read_rows(raw.with_name("train.encoded.rejected.jsonl"))
    assert "3600 s long" in listed["reason"]


def test_codes_of_another_codec_without_audio_are_refused(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(3)
    open_rows(run_settings(make_settings, raw), base)
    rows = read_rows(encoded_path(raw))
    for row in rows:
        row["codes_source"]["codec"] = "another"
    moved = raw.with_name("moved.jsonl")
    write_rows(moved, [row | {"audio": "gone.wav"} for row in rows])
    with pytest.raises(UserError, match=r"moved\.jsonl line 1: its codes were made by another codec"):
        open_rows(run_settings(make_settings, moved, output_dir=raw.parent / "out"), base)


def test_an_encoded_file_that_was_moved_with_its_clips_is_taken_as_it_is(
    fake: FakeCodec, make_raw: MakeRaw, make_settings: MakeSettings, base: Base
) -> None:
    raw = make_raw(3)
    open_rows(run_settings(make_settings, raw), base)
    built = fake.num_built
    new = raw.parent.with_name("moved")
    raw.parent.rename(new)
    rows = read_rows(new / encoded_path(raw).name)
    write_rows(new / "rows.jsonl", [row | {"audio": row["audio"].replace("/data/", "/moved/")} for row in rows])
    open_rows(run_settings(make_settings, new / "rows.jsonl", output_dir=new / "out"), base)
    assert fake.num_built == built
