"""Raw rows to rows with codes: order, reuse, interruption, bad clips, and the rows that a run opens.

Bookkeeping is tested with a fake codec that counts; the finished bytes of an interrupted run with the real tiny one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fakes import FakeCodec, fake_codes
from raw_clips import expected_codes, read_rows, write_clip, write_rows

from finetuning.audio import load_audio
from finetuning.codec import Codec, codec_fingerprint, codec_fingerprints
from finetuning.encode_rows import dataset_info, encode_jsonl, encoded_path, format_info
from finetuning.errors import UserError
from finetuning.manifest import RowFormat

VOICE = Path(__file__).parent.parent / "voices" / "english_voice"
MakeSettings = Callable[..., Any]
MakeRaw = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("one_thread")


def encode(raw: Path, codec_folder: Path, output: Path | None = None, **arguments: Any) -> Path:
    return encode_jsonl(raw, output or encoded_path(raw), codec_folder, RowFormat(), **arguments)


def names_in(folder: Path) -> set[str]:
    """Files of a folder; hidden ones and those in folders of its own are left out."""
    return {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}


# -------------------------------------------------------------------------------------------------------- encoding


def test_rows_keep_their_order_and_keys(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(6, ref_audio="train_clips/00.wav", language="English")
    output = encode(raw, codec_folder, max_clips_per_batch=2)
    rows = read_rows(output)
    assert output == raw.parent / "train.encoded.jsonl"
    assert [row.pop("audio_codes") for row in rows] == expected_codes(raw)
    for row in rows:
        row.pop("codes_source")
        assert row.pop("measures")["seconds"] == pytest.approx(
            len(load_audio(raw.parent / row["audio"])) / 24_000, abs=1e-3
        )
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

    monkeypatch.setattr("finetuning.encoding.Codec", Watching().build)
    encode(make_raw(7), codec_folder, max_clips_per_batch=3)
    assert [len(batch) for batch in lengths] == [3, 3, 1]
    in_order = [length for batch in lengths for length in batch]
    assert in_order == sorted(in_order)


def test_long_clips_make_small_batches(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetuning.encoding.MAX_SECONDS_PER_BATCH", 2.0)  # clips of 0.4, 0.5, … 1.0 s
    encode(make_raw(7), codec_folder)
    assert fake.batch_sizes == [3, 2, 2]  # 3 x 0.6, 2 x 0.8, 2 x 1.0


@pytest.mark.parametrize("reference", ["train_clips/01.wav", ["train_clips/01.wav", "train_clips/00.wav"]])
def test_output_elsewhere_still_finds_the_clips(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, tmp_path: Path, reference: Any
) -> None:
    raw = make_raw(2, ref_audio=reference)
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


def test_other_codec_encodes_everything_again(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_raw(4)
    encode(raw, codec_folder)
    fake.take_num_clips()
    capsys.readouterr()
    (codec_folder / "model.safetensors").write_bytes(b"others!")
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 4
    assert "4 clips or their codec changed" in capsys.readouterr().out
    assert {row["codes_source"]["codec"] for row in read_rows(encoded_path(raw))} == {codec_fingerprint(codec_folder)}


@pytest.fixture
def encoded(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Three raw rows, and the file of their codes."""
    raw = make_raw(3)
    output = encode(raw, codec_folder, tmp_path / "codes.jsonl")
    assert fake.take_num_clips() == 3
    return raw, output


@pytest.mark.parametrize("has_codes", [False, True])
def test_copy_of_the_codec_with_another_config_is_the_same_codec(
    fake: FakeCodec, encoded: tuple[Path, Path], codec_folder: Path, has_codes: bool
) -> None:
    """Its own repository and the copy in a base differ in transformers_version and layout; a file of codes is taken."""
    raw, output = encoded
    before = read_rows(output)
    (codec_folder / "config.json").write_text('{\n  "transformers_version": "4.57.3"\n}\n')
    encode(output if has_codes else raw, codec_folder, output.with_name("again.jsonl") if has_codes else output)
    assert fake.take_num_clips() == 0
    assert read_rows(output) == before


@pytest.mark.parametrize("has_codes", [False, True])
def test_codes_from_when_the_config_counted_are_kept(
    fake: FakeCodec, encoded: tuple[Path, Path], codec_folder: Path, tmp_path: Path, has_codes: bool
) -> None:
    raw, output = encoded
    weights, config = ((codec_folder / name).read_bytes() for name in ("model.safetensors", "config.json"))
    earlier = hashlib.sha256(weights + config).hexdigest()[:16]
    assert codec_fingerprints(codec_folder)[1] == earlier != codec_fingerprint(codec_folder)
    output.write_text(output.read_text().replace(codec_fingerprint(codec_folder), earlier))
    again = tmp_path / "again.jsonl"
    output.rename(encoded_path(raw))
    encode(encoded_path(raw) if has_codes else raw, codec_folder, again)
    assert fake.take_num_clips() == 0
    assert [row["audio_codes"] for row in read_rows(again)] == expected_codes(raw)


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


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a chunk, so that a few clips make several."""
    monkeypatch.setattr("finetuning.encode_rows.CHUNK_ROWS", 2)


def interrupt(fake: FakeCodec, raw: Path, codec_folder: Path, after_chunks: int = 1, force: bool = False) -> None:
    """An encode that is stopped after some chunks of two."""
    fake.batches_left = after_chunks
    with pytest.raises(KeyboardInterrupt):
        encode(raw, codec_folder, force=force)
    fake.batches_left = 1_000_000
    assert fake.take_num_clips() == 2 * after_chunks
    assert not encoded_path(raw).exists()
    assert len(list(partial_folder(raw).glob("*.safetensors"))) == after_chunks


def partial_folder(raw: Path) -> Path:
    return raw.with_name(f"{encoded_path(raw).name}.partial")


@pytest.mark.usefixtures("small_chunks")
def test_interrupted_run_goes_on_where_it_stopped(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    raw = make_raw(7)
    interrupt(fake, raw, codec_folder, after_chunks=2)
    output = encode(raw, codec_folder)
    assert fake.take_num_clips() == 3
    assert names_in(raw.parent) == {raw.name, output.name} and not partial_folder(raw).exists()
    at_one_go = encode(raw, codec_folder, raw.parent / "again.jsonl", force=True)
    assert fake.take_num_clips() == 7
    assert output.read_bytes() == at_one_go.read_bytes()


@pytest.mark.usefixtures("small_chunks")
def test_chunks_that_a_kill_left_unfinished_are_made_again(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path
) -> None:
    """A chunk's file appears under its name whole; what a kill leaves behind has another name."""
    raw = make_raw(6)
    interrupt(fake, raw, codec_folder)
    (chunk,) = partial_folder(raw).iterdir()
    chunk.with_name(f"{chunk.name}.tmp").write_bytes(chunk.read_bytes()[:100])
    output = encode(raw, codec_folder)
    assert fake.take_num_clips() == 4
    assert [row["audio_codes"] for row in read_rows(output)] == expected_codes(raw)
    assert not partial_folder(raw).exists()


@pytest.mark.usefixtures("small_chunks")
def test_a_damaged_chunk_is_made_again(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    """A power cut can leave a file of the right name without its content."""
    raw = make_raw(6)
    interrupt(fake, raw, codec_folder, after_chunks=2)
    sorted(partial_folder(raw).iterdir())[0].write_bytes(b"")
    output = encode(raw, codec_folder)
    assert fake.take_num_clips() == 4
    assert [row["audio_codes"] for row in read_rows(output)] == expected_codes(raw)


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_forced_run_goes_on_without_force(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path
) -> None:
    raw = make_raw(6)
    encode(raw, codec_folder)
    fake.take_num_clips()
    fake.batches_left = 2
    with pytest.raises(KeyboardInterrupt):
        encode(raw, codec_folder, force=True)
    fake.batches_left = 100
    fake.take_num_clips()
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 2
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 0


def test_neither_the_input_nor_somebody_else_s_file_is_replaced(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path
) -> None:
    raw = make_raw(3)
    before = raw.read_bytes()
    with pytest.raises(UserError, match="is the input"):
        encode(raw, codec_folder, raw.parent / "." / raw.name, max_rows=1)
    own = raw.with_name("own.jsonl")
    own.write_text("mine\n")
    with pytest.raises(UserError, match="was not made by --mode encode"):
        encode(raw, codec_folder, own)
    assert (raw.read_bytes(), own.read_text()) == (before, "mine\n") and fake.num_built == 0
    encode(raw, codec_folder, own, force=True)
    encode(raw, codec_folder, own)
    assert len(read_rows(own)) == 3


@pytest.mark.usefixtures("small_chunks")
def test_rows_that_moved_keep_the_codes_of_an_interrupted_run(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path
) -> None:
    """A new first row shifts every chunk; clips that were encoded are found by what they are."""
    raw = make_raw(6)
    interrupt(fake, raw, codec_folder, after_chunks=2)
    write_clip(raw.parent / "new.wav", seed=77)
    write_rows(raw, [{"audio": "new.wav", "text": "New."}, *read_rows(raw)])
    output = encode(raw, codec_folder)
    assert fake.take_num_clips() == 1 + 6 - 4
    assert [row["audio_codes"] for row in read_rows(output)] == expected_codes(raw)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_of_another_codec_or_a_changed_clip_is_not_used(
    fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path
) -> None:
    raw = make_raw(5)
    interrupt(fake, raw, codec_folder, after_chunks=2)
    for clip in (raw.parent / "train_clips").iterdir():
        os.utime(clip, (1, 1))
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 5
    encoded_path(raw).unlink()
    interrupt(fake, raw, codec_folder, after_chunks=2)
    (codec_folder / "model.safetensors").write_bytes(b"others!")
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 5


@pytest.mark.usefixtures("small_chunks")
def test_force_throws_finished_chunks_away(fake: FakeCodec, make_raw: MakeRaw, codec_folder: Path) -> None:
    """What goes on after a forced run was interrupted must not use codes from before it."""
    raw = make_raw(7)
    interrupt(fake, raw, codec_folder, after_chunks=2)
    interrupt(fake, raw, codec_folder, after_chunks=1, force=True)
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 7 - 2


def test_interrupted_run_of_the_real_codec_gives_the_same_bytes(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetuning.encode_rows.CHUNK_ROWS", 4)
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
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if target.suffix == ".jsonl":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    raw = make_raw(3)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        patch.setattr(Path, "rename", refuse)
        encode(raw, codec_folder)
    assert names_in(raw.parent) == {"train.jsonl"} and len(list(partial_folder(raw).iterdir())) == 1
    assert fake.take_num_clips() == 3
    assert len(read_rows(encode(raw, codec_folder))) == 3
    assert fake.take_num_clips() == 0


def test_codec_that_cannot_be_loaded_is_not_blamed_on_the_output(
    make_raw: MakeRaw, codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, device: str) -> None:
        raise OSError("no weights found")

    monkeypatch.setattr("finetuning.encoding.Codec", broken)
    with pytest.raises((OSError, UserError)) as error:
        encode(make_raw(3), codec_folder)
    assert "cannot write" not in str(error.value)


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
    monkeypatch.setattr("finetuning.encoding.audio_duration_seconds", lambda path: 3600.0 if "01" in path.name else 1.0)
    raw = make_raw(12)
    encode(raw, codec_folder)
    assert fake.take_num_clips() == 11
    (listed,) = read_rows(raw.with_name("train.encoded.rejected.jsonl"))
    assert "3600 s long" in listed["reason"]
