"""NEW_LANGUAGES: ids, what they start from, how the tokenizer suits them; and what training leaves in an export."""

from __future__ import annotations

import copy
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from reference import load_stock
from safetensors.torch import load_file
from training import train

from finetuning import briefing, lora, starting
from finetuning.base_model import load_tokenizer, resolve_base
from finetuning.codec_rows import allocate_language_rows
from finetuning.errors import UserError
from finetuning.languages import Coverage, coverage, initial_languages, new_languages, with_languages
from finetuning.manifest import RowFormat
from finetuning.row_index import open_rows
from finetuning.tiny_model import embedded_model_folder

pytestmark = pytest.mark.usefixtures("one_thread")

TABLE = "talker.model.codec_embedding.weight"
KNOWN = {"chinese": 2055, "english": 2050, "beijing_dialect": 2074, "german": 2053}


def config_with(**talker: Any) -> dict[str, Any]:
    return {"talker_config": {"vocab_size": 3072, "codec_eos_token_id": 2150, "codec_language_id": KNOWN} | talker}


# ------------------------------------------------------------------------------------------------------------- ids


def test_ids_avoid_all_that_the_configuration_names() -> None:
    """Control ids, languages and speakers, wherever they are."""
    config = config_with(
        codec_language_id={**KNOWN, "hausa": 2200, "igbo": 2203},
        spk_id={"vivian": 2202, "anna": 3000},
        codec_pad_id=2205,
        codec_think_eos_id=2206,
    )
    assert allocate_language_rows(config, 4) == [2201, 2204, 2207, 2208]
    free = allocate_language_rows(config, 600 - 5)
    assert set(free) == set(range(2200, 2800)) - {2200, 2202, 2203, 2205, 2206}
    with pytest.raises(UserError, match=r"NEW_LANGUAGES: 596 languages, but .* only 595 rows"):
        allocate_language_rows(config, 596)


@pytest.mark.parametrize("empty", [None, {}])
def test_ids_of_a_small_table_without_languages_and_speakers(empty: dict | None) -> None:
    config = config_with(vocab_size=2203, codec_language_id=empty, spk_id=empty)
    assert allocate_language_rows(config, 3) == [2200, 2201, 2202]
    with pytest.raises(UserError, match="only 3 rows"):
        allocate_language_rows(config, 4)


def test_names_and_what_they_start_from(make_settings: Callable) -> None:
    settings = make_settings(new_languages=" Hausa , yoruba:English,IGBO: german ,")
    found = new_languages(config_with(), settings)
    assert [(language.name, language.codec_id) for language in found] == [
        ("hausa", 2200), ("yoruba", 2201), ("igbo", 2202),
    ]  # fmt: skip
    assert sorted(found[0].sources) == [2050, 2053, 2055]  # all but the dialect
    assert found[1].sources == (2050,) and found[2].sources == (2053,)
    assert new_languages(config_with(), make_settings()) == []


def test_vectors_that_they_start_from(make_settings: Callable) -> None:
    table = torch.nn.Parameter(torch.randn(3072, 5, generator=torch.Generator().manual_seed(0)).bfloat16())
    found = new_languages(config_with(), make_settings(new_languages="hausa,yoruba:english"))
    languages = initial_languages(table, found)
    assert languages.rows == {"hausa": 2200, "yoruba": 2201}
    assert languages.vectors.dtype == torch.float32 and not languages.vectors.requires_grad
    values = table.detach().double()
    torch.testing.assert_close(languages.vectors[0].double(), (values[2050] + values[2053] + values[2055]) / 3)
    assert torch.equal(languages.vectors[1], table.detach()[2050].float())
    languages.vectors.zero_()  # no view of the table
    assert table[2050].abs().sum() > 0
    assert initial_languages(table, []) is None


@pytest.mark.parametrize(
    ("names", "talker", "message"),
    [
        ("de-AT", {}, r"knows de-at already \(as german, id 2053\)"),
        ("hausa,German", {}, r"the base knows german already \(as german, id 2053\)"),
        ("hausa:yoruba", {}, r"hausa is to start from yoruba, .* \(beijing_dialect, chinese, english, german\)"),
        ("hausa,yoruba:hausa", {}, "yoruba is to start from hausa, which the base does not know"),
        ("hausa", {"codec_language_id": {}}, "no language to start from"),
        ("hausa", {"codec_language_id": {"sichuan_dialect": 2062}}, "no language to start from"),
        ("hausa,igbo", {"vocab_size": 2201}, "2 languages, but the codec table has only 1 rows"),
    ],
)
def test_what_the_base_refuses(make_settings: Callable, names: str, talker: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"NEW_LANGUAGES: .*{message}"):
        new_languages(config_with(**talker), make_settings(new_languages=names))


def test_with_a_relative_no_other_language_is_needed(make_settings: Callable) -> None:
    config = config_with(codec_language_id={"sichuan_dialect": 2062})
    (found,) = new_languages(config, make_settings(new_languages="hausa:sichuan_dialect"))
    assert found.sources == (2062,)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("hausa,Auto", '"auto" cannot be the name'),
        ("hausa_dialect", '"hausa_dialect" cannot be the name'),
        (":english", '"" cannot be the name'),
        ("ha\x07usa", '"ha\x07usa" cannot be the name'),
        ("hausa, HAUSA:english", "names hausa twice"),
        (" , ", "names no language"),
    ],
)
def test_what_settings_refuse(make_settings: Callable, names: str, message: str) -> None:
    with pytest.raises(UserError, match=f"NEW_LANGUAGES: {message}"):
        make_settings(new_languages=names)


def test_the_bases_configuration_is_left_alone(make_settings: Callable) -> None:
    config = config_with()
    before = copy.deepcopy(config)
    changed = with_languages(config, {"hausa": 2200})
    assert changed["talker_config"]["codec_language_id"] == KNOWN | {"hausa": 2200}
    changed["talker_config"]["codec_language_id"]["igbo"] = 2201
    changed["talker_config"]["vocab_size"] = 1
    assert config == before
    assert with_languages(config_with(codec_language_id=None), {"hausa": 2200})["talker_config"][
        "codec_language_id"
    ] == {"hausa": 2200}
    assert with_languages(config, {}) == before
    base = resolve_base(make_settings(new_languages="hausa"))
    on_disk = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    assert base.talker_config["codec_language_id"]["hausa"] == 2200
    assert "hausa" not in on_disk["talker_config"]["codec_language_id"]


# -------------------------------------------------------------------------------------------------------- coverage


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte by byte, but for some words."""
    return load_tokenizer(embedded_model_folder("tiny-random"))


HOOKED_K, MARK, DOTTED_O = "\u0199", "\u0360", "\u1ecd"  # of two, two and three bytes


@pytest.mark.parametrize(
    ("texts", "counted"),
    [
        (["xyz", "that", "zz"], (3, 9, 3 + 2 + 2, {})),  # "th" + "at"
        ([f"x{HOOKED_K}y{HOOKED_K}"], (1, 4, 1 + 2 + 1 + 2, {HOOKED_K: 2})),
        ([f"z{MARK}", f"{DOTTED_O}z{MARK}", f"{MARK}"], (3, 6, 3 + 6 + 2, {MARK: 3, DOTTED_O: 1})),
        (["", "x"], (2, 1, 1, {})),
        ([""], (1, 0, 0, {})),
        ([], (0, 0, 0, {})),
    ],
    ids=["ASCII", "hooked", "marks", "an empty one", "empty", "none"],
)
def test_coverage_counted_by_hand(tokenizer: Any, texts: list[str], counted: tuple) -> None:
    num_texts, num_characters, num_tokens, split = counted
    found = coverage(tokenizer, iter(texts))
    assert found == Coverage(num_texts, num_characters, num_tokens, 0, split)
    assert list(found.split) == list(split)  # the most frequent first
    assert found.tokens_per_character == (num_tokens / num_characters if num_characters else 0)


def test_coverage_counts_letters_as_the_tokenizer_reads_them(tokenizer: Any) -> None:
    """Which composes them first."""
    composed = "\u00e9x\u1eb9\u0301"
    assert unicodedata.normalize("NFC", composed) == composed
    found = coverage(tokenizer, [unicodedata.normalize("NFD", composed)])
    assert found == coverage(tokenizer, [composed])
    assert found.split == {"\u00e9": 1, "\u1eb9": 1, "\u0301": 1} and found.num_characters == 4


class Words:
    """A tokenizer that has a token for each of some characters, and one for all that it does not know."""

    unk_token_id = 0

    def __init__(self, known: str) -> None:
        self.known = known

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.known.find(character) + 1 for character in text]}


def test_coverage_counts_unknown_tokens() -> None:
    found = coverage(Words("abc\u00e9"), ["ab?", "\u00e9!!"])
    assert found == Coverage(2, 6, 6, 3, {})
    assert "3 unknown tokens" in found.describe() and "1.00 tokens a character in 2 texts" in found.describe()


def test_coverage_in_a_line() -> None:
    whole = Coverage(3, 200, 50, 0, {})
    assert whole.describe() == "0.25 tokens a character in 3 texts, no character is spelt in bytes"
    split = Coverage(3, 200, 300, 0, {chr(0x100 + number): 2 for number in range(13)})
    listed = " ".join(map(chr, range(0x100, 0x10C)))
    assert split.describe().endswith(f"in 3 texts, 13.0% of the characters are spelt in bytes ({listed} …)")
    assert Coverage(0, 0, 0, 0, {}).describe().startswith("0.00 tokens")


# -------------------------------------------------------------------------------------------------------- training


FIELDS = {
    "device": "cpu", "mixed_precision": "no", "init_model_path": "tiny-random", "use_wandb": False,
    "validation_fraction": 0.0, "batch_size": 2, "gradient_accumulation_steps": 1, "num_epochs": 1,
    "learning_rate": 1e-2, "warmup_steps": 0, "new_languages": "hausa,yoruba:english",
}  # fmt: skip
#: One row in a new language in each of the two steps of five rows, and some in neither.
SPOKEN = ("Hausa", "yoruba", "HAUSA", "English", "Auto")


@pytest.fixture(scope="module")
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory, demo_rows: list[dict]) -> SimpleNamespace:
    """A short run with the fields of the parameter."""
    from finetuning.settings import load_settings

    folder = tmp_path_factory.mktemp("languages")
    rows = [row | {"language": name} for row, name in zip(demo_rows, SPOKEN, strict=False)]
    jsonl = folder / "train.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = {"train_jsonl": jsonl, "output_dir": folder / "output"} | request.param
    run, trainer = train(load_settings(FIELDS | own, environment={}))
    last = folder / "output" / "last"
    (base_file,) = run.base.weight_files()
    return SimpleNamespace(
        run=run, steps=trainer.progress.step, last=last,
        table=load_file(last / "model.safetensors")[TABLE], base_table=load_file(base_file)[TABLE],
    )  # fmt: skip


both_ways = pytest.mark.parametrize(
    "trained", [{}, {"lora_rank": 4, "lora_dropout": 0.0}], indirect=True, ids=["layers", "adapters"]
)


@both_ways
def test_an_export_holds_what_was_trained(trained: Any) -> None:
    """Under the id that the configuration names, bit for bit; and stock knows the language."""
    config = json.loads((trained.last / "config.json").read_text(encoding="utf-8"))
    known = config["talker_config"]["codec_language_id"]
    assert known == {**known, "hausa": 2200, "yoruba": 2201, "english": 2050} and len(known) == 12
    vectors = trained.run.objective.language_vectors.detach()
    assert trained.run.objective.language_ids.tolist() == [2200, 2201]
    assert torch.equal(trained.table[[2200, 2201]], vectors) and trained.steps == 3
    stock = load_stock(trained.last)
    assert {"hausa", "yoruba"} <= set(stock.get_supported_languages())
    assert torch.equal(stock.model.talker.model.codec_embedding.weight[2200:2202], vectors)


@both_ways
def test_languages_learn_and_the_rest_of_the_table_stays(trained: Any) -> None:
    before = trained.base_table
    assert before.dtype == trained.table.dtype and before.shape == trained.table.shape
    changed = (trained.table != before).any(1).nonzero().flatten().tolist()
    assert changed == [2200, 2201, 3000]  # the languages and the speaker; so neither English nor any other source
    languages = list(trained.run.base.talker_config["codec_language_id"].values())[:10]
    for row, start in ((2200, before[languages].mean(0)), (2201, before[2050])):
        moved = (trained.table[row] - start).abs()
        assert moved.min() > 0 and 1e-3 < moved.max() < 4e-2  # three steps of AdamW at 1e-2


@pytest.mark.parametrize("trained", [{"lora_rank": 4, "lora_dropout": 0.0}], indirect=True, ids=["adapters"])
def test_an_adapter_brings_its_languages(trained: Any, tmp_path: Path, make_settings: Callable) -> None:
    """Merged into the base again they are the export's."""
    adapter = lora.Adapter.load(trained.last / "adapter")
    assert dict(adapter.languages.rows) == {"hausa": 2200, "yoruba": 2201}
    assert torch.equal(adapter.languages.vectors, trained.run.objective.language_vectors.detach())
    base = resolve_base(make_settings())
    lora.merge(base, [adapter], [1.0], tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[TABLE], trained.table)
    merged, exported = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "merged", trained.last)
    )
    assert merged["talker_config"]["codec_language_id"] == exported["talker_config"]["codec_language_id"]


def test_without_rows_in_the_language_there_is_no_run(
    make_settings: Callable, write_jsonl: Callable, demo_rows: list[dict]
) -> None:
    rows = [row | {"language": name} for row, name in zip(demo_rows, ("English", "Hausa", "ig"), strict=False)]
    fields = {"train_jsonl": write_jsonl(rows), "validation_fraction": 0.0, "new_languages": "hausa,yoruba"}
    settings = make_settings(**fields)
    AcceleratorState._reset_state(reset_partial_state=True)
    base, device = starting.check_inputs(settings)
    accelerator = starting.start(settings, device)
    opened = starting.open_rows(settings, base, accelerator)
    with pytest.raises(UserError, match=r"NEW_LANGUAGES: no row is in yoruba; .* are English, Hausa, ig\b"):
        starting.check_rows(settings, base, opened, accelerator)
    only_hausa = resolve_base(make_settings(new_languages="hausa"))
    starting.check_rows(settings, only_hausa, opened, accelerator)


def test_coverage_is_said_of_each_languages_own_rows(
    make_settings: Callable, demo_rows: list[dict], write_jsonl: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    spoken = ("Hausa", "English", "hausa", "yoruba")
    texts = (f"x{HOOKED_K}", f"{MARK}{MARK}", "xy", "that")
    rows = [
        row | {"language": language, "text": text}
        for row, language, text in zip(demo_rows, spoken, texts, strict=False)
    ]
    base = resolve_base(make_settings(new_languages="hausa,yoruba:english"))
    briefing.say_coverage(open_rows(write_jsonl(rows), RowFormat(), "TRAIN_JSONL"), base, load_tokenizer(base.folder))
    hausa, yoruba = [line for line in capsys.readouterr().out.splitlines() if "New language" in line]
    assert "hausa (id 2200): 1.25 tokens a character in 2 texts, 25.0% of the characters" in hausa
    assert "yoruba (id 2201): 0.50 tokens a character in 1 texts, no character" in yoruba
