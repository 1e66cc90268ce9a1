"""What the frozen layers compute, kept over the epochs: the same training, wherever an entry comes from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from training import FULL, before_each_step, build, make_trainer, signal_in_step

from finetuning.dataset import collate
from finetuning.errors import Stopped, UserError
from finetuning.prefix_cache import DiskStore, MemoryStore, PrefixCache, check_prefix_cache, estimated_positions
from finetuning.starting import check_inputs

ROWS, EPOCHS = 4, 3
#: Names as a store's folders have them.
OLD, NEW = "0" * 32, "1" * 32


@pytest.fixture
def settings_for(make_settings: Any, write_jsonl: Any, demo_rows: list[dict], tmp_path: Path) -> Any:
    jsonl = write_jsonl(demo_rows[:ROWS])

    def make(name: str, **fields: Any) -> Any:
        return make_settings(**{
            "train_jsonl": jsonl, "output_dir": tmp_path / name, "validation_fraction": 0.0, "num_epochs": EPOCHS,
            "batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "warmup_steps": 0,
            "replace_last_n_layers": 1, "add_new_layers": 1, "prefix_cache_dir": tmp_path / "cache", **fields,
        })  # fmt: skip

    return make


def trained(settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The trainer and the weights at the end."""
    run = build(settings)
    trainer = make_trainer(run)
    trainer.run()
    return trainer, {name: value.detach().clone() for name, value in run.objective.named_parameters()}


def count_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are computed from here on, one entry each."""
    computed: list[int] = []
    original = PrefixCache._computed

    def count(self: Any, key: str, row: Any) -> torch.Tensor:
        computed.append(int(row["lines"][0]))
        return original(self, key, row)

    monkeypatch.setattr(PrefixCache, "_computed", count)
    return computed


def test_rows_are_computed_once_and_nothing_else_changes(settings_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 an entry is exact, so the losses are those of a run without the cache."""
    computed = count_computed(monkeypatch)
    without, _ = trained(settings_for("off", mixed_precision="no"))
    assert computed == []
    cached, _ = trained(settings_for("ram", mixed_precision="no", prefix_cache="ram"))
    assert sorted(computed) == list(range(1, ROWS + 1))
    assert cached.progress.train_loss == pytest.approx(without.progress.train_loss, rel=1e-5)


def test_ram_disk_and_no_room_give_the_same_bits(settings_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"mixed_precision": "bf16"}
    _, in_memory = trained(settings_for("ram", prefix_cache="ram", **fields))
    _, on_disk = trained(settings_for("disk", prefix_cache="disk", **fields))
    computed = count_computed(monkeypatch)
    _, again = trained(settings_for("disk again", prefix_cache="disk", **fields))
    assert computed == []  # another run found everything
    _, no_room = trained(settings_for("no room", prefix_cache="ram", prefix_cache_gb=1e-9, **fields))
    assert len(computed) == EPOCHS * ROWS
    for weights in (on_disk, again, no_room):
        assert all(torch.equal(weights[name], value) for name, value in in_memory.items())


def test_a_stop_and_a_cold_cache_change_no_bit(settings_for: Any) -> None:
    fields = {"prefix_cache": "ram", "mixed_precision": "bf16"}
    _, want = trained(settings_for("whole", **fields))
    trainer = make_trainer(build(settings_for("stopped", **fields)))
    signal_in_step(trainer, 3)
    with pytest.raises(Stopped):
        trainer.run()
    _, got = trained(settings_for("stopped", **fields, resume="auto"))
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_only_the_frozen_layers_are_left_out(settings_for: Any) -> None:
    """From the second epoch on no frozen layer runs, and the cache is not asked by validation."""
    run = build(settings_for("counted", prefix_cache="ram", mixed_precision="no"))
    trainer = make_trainer(run)
    calls, at_step = [], []
    run.objective.talker.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(trainer.progress.step))
    before_each_step(trainer, at_step.append)
    trainer.run()
    assert len(at_step) == EPOCHS * ROWS // 2
    assert len(calls) == ROWS and max(calls) < ROWS // 2


@pytest.mark.parametrize("fields", [FULL, {"train_text_embedding": True}], ids=["full", "text embedding"])
def test_refused_where_something_below_trains(settings_for: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="PREFIX_CACHE: there is nothing to keep"):
        settings_for("refused", prefix_cache="ram", **fields)


def test_memory_is_for_one_process(settings_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each epoch deals the rows to the processes anew."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"PREFIX_CACHE: ram is for one process; several share PREFIX_CACHE=disk"):
        check_prefix_cache(settings_for("refused", prefix_cache="ram"))
    check_prefix_cache(settings_for("shared", prefix_cache="disk"))


def test_refused_under_fsdp(settings_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="PREFIX_CACHE: does not work with FSDP"):
        check_inputs(settings_for("refused", prefix_cache="ram"))


def test_the_size_is_said_and_right(settings_for: Any, capsys: pytest.CaptureFixture) -> None:
    run = build(settings_for("size", prefix_cache="ram", mixed_precision="bf16"))
    positions = sum(len(run.train.encoder.encode(row).text) for row in run.train.rows(ROWS))
    assert estimated_positions(run.train) == positions
    trainer = make_trainer(run)
    assert "Prefix cache: about 0.00 GB in memory" in capsys.readouterr().out
    trainer.run()
    width = run.objective.speaker_vectors.shape[1]
    assert trainer.stepper.prefixes.store._num_bytes == positions * width * 2


# ------------------------------------------------------------------------------------------------------------ keys


def test_everything_that_matters_is_in_the_key(settings_for: Any) -> None:
    run = build(settings_for("keys", prefix_cache="ram"))
    cache = make_trainer(run).stepper.prefixes
    row = run.train.encoder.encode(run.train.rows(1)[0])

    def key(**changes: Any) -> str:
        batch = collate([row], [0]) | changes
        return next(iter(cache._keys(batch)))

    batch = collate([row], [0])
    other_text, other_language, other_codes = (batch[name].clone() for name in ("text_ids", "codec_ids", "codes"))
    other_text[0, 8] += 1
    other_language[0, 3] += 1
    other_codes[0, 5] += 1
    keys = [key(), key(text_ids=other_text), key(codec_ids=other_language), key(codes=other_codes)]
    keys.append(key(speaker_positions=torch.tensor([-1])))
    keys.append(key(row_vectors=torch.ones(1, cache._vectors.shape[1])))  # a reference of its own
    cache._vectors[0] = 0
    keys.append(key())
    assert len(set(keys)) == len(keys)
    padded = collate([row, run.train.encoder.encode(run.train.rows(2)[1])], [0, 0])
    assert next(iter(cache._keys(padded))) == keys[-1]


def test_other_frozen_weights_have_another_folder(settings_for: Any) -> None:
    """And so has another configuration of the same weights."""
    names = []
    for change, rope_theta in ((0.0, None), (0.0, None), (1e-3, None), (0.0, 500.0)):
        run = build(settings_for("weights", prefix_cache="disk", overwrite_output=True))
        talker = run.objective.talker
        talker.config.rope_theta = rope_theta or talker.config.rope_theta
        with torch.no_grad():
            talker.model.layers[0].mlp.up_proj.weight[0, 0] += change
        names.append(make_trainer(run).stepper.prefixes.store.folder.name)
    assert names[0] == names[1] and len(set(names)) == 3


def test_no_cache_is_made_over_embeddings_that_train(settings_for: Any) -> None:
    """Whatever rule sets what trains."""
    run = build(settings_for("embeddings", prefix_cache="ram"))
    run.objective.talker.model.codec_embedding.requires_grad_(True)
    with pytest.raises(UserError, match="PREFIX_CACHE: there is nothing to keep"):
        make_trainer(run)


# ---------------------------------------------------------------------------------------------------------- stores


def test_a_store_in_memory_keeps_its_bound() -> None:
    store = MemoryStore(10)
    for key in "aabc":
        store.put(key, b"1234")
    assert (store.get("a"), store.get("b"), store.get("c")) == (b"1234", b"1234", None)


def test_a_store_on_disk_keeps_its_bound_and_throws_out_others(tmp_path: Path) -> None:
    size = 16 + 100  # with its digest
    old, (a, b, c, d) = DiskStore(tmp_path, OLD, 3 * size), [letter * 32 for letter in "abcd"]
    for key in (a, b):
        old.put(key, bytes(100))
    new = DiskStore(tmp_path, NEW, 3 * size)
    new.put(a, bytes(100))
    assert old.get(a) is not None
    for key in (b, c, d):
        new.put(key, bytes(100))
    assert old.get(a) is None and not (tmp_path / OLD).exists()
    assert [new.get(key) is not None for key in (a, b, c, d)] == [True, True, True, False]
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 3 * size


def test_what_else_lies_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    """Whatever PREFIX_CACHE_DIR names: nothing of the user's counts, and nothing of it goes."""
    for name in ("wavs/clip.wav", "wavs/deeper/clip.wav", f"{OLD}/notes.txt", "rows.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1000))
    before = sorted(tmp_path.rglob("*"))
    DiskStore(tmp_path, OLD, 10**6).put("a" * 32, bytes(100))
    store = DiskStore(tmp_path, NEW, 116)
    for key in "bc":
        store.put(key * 32, bytes(100))
    assert store.get("b" * 32) is not None and store.get("c" * 32) is None
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / NEW, tmp_path / NEW / ("b" * 32)])


def test_stores_that_make_room_beside_each_other(tmp_path: Path) -> None:
    """As several processes do: a folder may go, or an entry, while another one looks at it; then all have the room."""
    size = 16 + 40
    for round_number in range(20):
        for number in range(4):
            DiskStore(tmp_path, f"{number:032x}", 10**6).put("a" * 32, bytes(40))
        stores = [DiskStore(tmp_path, f"{round_number + 16:032x}", 8 * size, num_writers=4) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda store: store.put(f"{id(store):032x}", bytes(40)), stores))
        assert all(store.get(f"{id(store):032x}") for store in stores)
        assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 8 * size


def test_room_that_another_process_made_is_seen(tmp_path: Path) -> None:
    size = 16 + 100
    for key in "abcd":
        DiskStore(tmp_path, OLD, 10**6).put(key * 32, bytes(100))
    first, second = (DiskStore(tmp_path, NEW, 4 * size, num_writers=2) for _ in range(2))
    first.put("a" * 32, bytes(100))
    second.put("b" * 32, bytes(100))
    assert not (tmp_path / OLD).exists()
    assert second.get("a" * 32) and second.get("b" * 32)


def test_a_folder_that_another_run_removed_is_made_again(tmp_path: Path) -> None:
    running = DiskStore(tmp_path, OLD, 150)
    running.put("a" * 32, bytes(100))
    DiskStore(tmp_path, NEW, 150).put("b" * 32, bytes(100))
    assert running.get("a" * 32) is None
    running = DiskStore(tmp_path, OLD, 10**6)
    (tmp_path / OLD).rmdir()
    running.put("c" * 32, bytes(100))
    assert running.get("c" * 32) is not None


def test_a_damaged_entry_is_computed_again(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, NEW, 10**6)
    store.put("a", bytes(range(100)))
    file = tmp_path / NEW / "a"
    assert store.get("a") == bytes(range(100))
    for damaged in (file.read_bytes()[:-1], b"", file.read_bytes()[:40] + b"x" + file.read_bytes()[41:]):
        file.write_bytes(damaged)
        assert store.get("a") is None


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"PREFIX_CACHE_DIR: .*file cannot be written"):
        DiskStore(tmp_path / "file", NEW, 100)
