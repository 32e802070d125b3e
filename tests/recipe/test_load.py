"""Loading recipes: layers, overrides, and every fault at once with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwha_cli.errors import RecipeError
from qwha_cli.recipe.load import load_recipe
from qwha_cli.recipe.schema import Recipe

GOOD = """\
name: good
model:
  id: some/model
quantize:
  method: gptq
  bits: 2
train:
  data: gsm8k
  epochs: 6
  lr: 1e-4
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [str(problem) for problem in caught.value.problems]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # places are then named r.yaml:LINE:COLUMN


def test_defaults_are_filled_in_and_shorthands_expanded(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.train.lr == 1e-4
    assert recipe.train.data.format == "gsm8k"
    assert recipe.train.data.mask_prompt
    assert (recipe.adapter.rank, recipe.quantize.grid, recipe.output) == (64, "search", "runs")
    assert recipe.train.validation is None


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(("text", "value"), [("2e-4", 2e-4), ("2E-4", 2e-4), ("1e+3", 1000.0), ("3", 3.0), (".5", 0.5)])
def test_overrides_are_yaml_numbers(tmp_path: Path, text: str, value: float) -> None:
    assert load_recipe(write(tmp_path, GOOD), [f"train.lr={text}"]).train.lr == value


def test_overrides_take_lists_nulls_and_equals_signs(tmp_path: Path) -> None:
    changes = [
        "eval.tasks=[gsm8k, {name: boolq, shots: 2}]",
        "train.clip=null",
        "model.id=a=b",
        "eval.data={gsm8k: {test: x.jsonl}}",
    ]
    recipe = load_recipe(write(tmp_path, GOOD), changes)
    assert [(task.name, task.shots) for task in recipe.eval.tasks] == [("gsm8k", None), ("boolq", 2)]
    assert recipe.train.clip is None
    assert recipe.model.id == "a=b"
    assert recipe.eval.data == {"gsm8k": {"test": "x.jsonl"}}


def test_later_overrides_win(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, GOOD), ["seed=1", "seed=2"]).seed == 2


def test_every_fault_is_told_at_once_with_its_place_and_the_nearest_name(tmp_path: Path) -> None:
    text = GOOD.replace("bits: 2", "bits: 5").replace("lr: 1e-4", "lr: fast\n  bach_size: 3").replace("id: some", "idd: some")
    text += "merge:\n  lr: 2\nseed: -1\n"
    assert faults(write(tmp_path, text), "train.lrr=2", "adapter.rank") == [
        "r.yaml:2:1: model.id is required",
        "r.yaml:3:3: unknown key model.idd (did you mean model.id?)",
        "r.yaml:6:9: quantize.bits: expected 2 or 3 or 4, got 5",
        'r.yaml:10:7: train.lr: expected a number, got the text "fast"',
        "r.yaml:11:3: unknown key train.bach_size (did you mean train.batch_size?)",
        "r.yaml:13:3: unknown key merge.lr (did you mean train.lr?)",
        "r.yaml:14:7: seed: must be at least 0, got -1",
        "override adapter.rank: expected key=value with a dotted key (for example train.lr=2e-4)",
        "override train.lrr: unknown key train.lrr (did you mean train.lr?)",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.lrr=1", "override train.lrr: unknown key train.lrr (did you mean train.lr?)"),
        ("learning.rate=1", "override learning.rate: unknown key learning"),
        ("lr=1", "override lr: unknown key lr (did you mean train.lr?)"),
        ("quantize.bits=x", 'override quantize.bits: expected 2 or 3 or 4, got the text "x"'),
        ("adapter.rank=true", "override adapter.rank: expected an integer, got true"),
        ('adapter.rank="8"', 'override adapter.rank: expected an integer, got the text "8"'),
        ("adapter.rank=[", "override adapter.rank: not valid YAML"),
        ("adapter.rank.x=1", "override adapter.rank.x: adapter.rank: expected an integer, got a mapping"),
        ("model.revision=1234567", "override model.revision: expected text, got 1234567 (write it in quotes)"),
        ("model.device=gpu", "override model.device: expected auto, cpu, cuda or cuda:N, got gpu"),
        ("quantize.calibration.data=wikitext", "wikitext is unknown; known: "),
        ("quantize.calibration.split=test", "the split test is refused: calibration would leak"),
        ("train.data.split=test", "the split test is refused: training on it"),
        ("train.data=gsmk", "override train.data: data format gsmk is unknown"),
        ("train=1", "override train: expected a mapping of keys to values, got 1"),
        ("train.lr=.inf", 'expected a number, got the text ".inf"'),
        ("train.warmup=1", "must be below 1"),
        ("adapter.targets=[]", "expected all-linear or a list of layer names"),
        ("name=a/b", "expected a folder's name"),
        ("eval.rows=[]", "needs at least one entry"),
        ("extends=x", "extends cannot be overridden"),
        ("=1", "expected key=value"),
        ("a..b=1", "expected key=value"),
    ],
)
def test_a_bad_override_says_what_was_expected(tmp_path: Path, change: str, message: str) -> None:
    found = faults(write(tmp_path, GOOD), change)
    assert len(found) == 1
    assert message in found[0]


COMBINATIONS = [
    (["quantize.method=nf4"], "quantize.bits: nf4 is a 4-bit format, not 2"),
    (["quantize.method=nf4", "quantize.bits=4", "quantize.grid=search"], "quantize.grid: nf4 has a fixed grid"),
    (["quantize.method=nf4", "quantize.bits=4", "quantize.magr=1e-4"], "quantize.magr: MagR prepares weights for gptq"),
    (["quantize.method=nf4", "quantize.bits=4", "quantize.symmetric=true"], "quantize.symmetric: nf4 has a fixed grid"),
    (["quantize.method=nf4", "quantize.bits=4", "quantize.group_size=48"], "quantize.group_size: nf4 has no blocks of 48"),
    (["quantize.method=rtn", "quantize.magr=1e-4"], "quantize.magr: MagR prepares weights for gptq, not for rtn"),
    (["quantize.calibration.data=text"], "quantize.calibration.path: data: text needs the file"),
    (["init.method=zero", "init.gate=true"], "init.gate: a zero init has nothing to compare"),
    (["train.epochs=null"], "train: how long to train is not said"),
    (["train.data.format=jsonl"], "train.data.path: format jsonl needs the file"),
    (["eval.answers.format=gsm8k", "eval.answers.split=train"], "eval.answers.split: the split train is refused"),
    (["eval.perplexity={data: prose, window: 64, stride: 65}"], "eval.perplexity.stride: a stride of 65"),
    (["eval.perplexity={data: text}"], "eval.perplexity.path: data: text needs the file"),
    (["eval.rows=[base, base]"], "eval.rows: a row stands twice"),
    (["eval.tasks=[boolq, boolq]"], "eval.tasks: the task boolq stands twice"),
    (
        ["train.data.path=a.jsonl", "eval.answers={format: gsm8k, path: a.jsonl}"],
        "eval.answers.path: the training file is scored",
    ),
    (["adapter.targets=[q_proj]", "adapter.exclude=[q_proj]"], "adapter.exclude: q_proj is both a target and excluded"),
]


@pytest.mark.parametrize(("changes", "message"), COMBINATIONS, ids=[message for _, message in COMBINATIONS])
def test_an_impossible_combination_is_refused(tmp_path: Path, changes: list[str], message: str) -> None:
    found = faults(write(tmp_path, GOOD), *changes)
    assert any(message.split(": ", 1)[1] in text for text in found)
    assert all(text.startswith(("override ", "r.yaml:")) for text in found)


def test_combinations_are_told_beside_unknown_keys(tmp_path: Path) -> None:
    found = faults(write(tmp_path, GOOD.replace("gptq", "nf4") + "extra: 1\n"), "quantize.oops=1")
    assert "r.yaml:6:9: quantize.bits: nf4 is a 4-bit format, not 2 (set quantize.bits=4, or quantize.method=gptq)" in found
    assert any("unknown key extra" in text for text in found)
    assert any("unknown key quantize.oops" in text for text in found)


def test_both_epochs_and_steps_in_one_file_are_a_fault_but_a_higher_layer_may_choose(tmp_path: Path) -> None:
    assert "epochs and steps are both given" in faults(write(tmp_path, GOOD + "  steps: 3\n"))[0]
    recipe = load_recipe(write(tmp_path, GOOD), ["train.steps=10"])
    assert (recipe.train.epochs, recipe.train.steps) == (None, 10)


def test_a_recipe_extends_files_in_order_and_wins_over_them(tmp_path: Path) -> None:
    write(tmp_path, "train: {lr: 1e-3, clip: 2.0, data: {format: gsm8k, path: a.jsonl}}\n", "parts/a.yaml")
    write(tmp_path, "extends: a\ntrain: {clip: 3.0}\nadapter: {rank: 8}\n", "parts/b.yaml")
    recipe = load_recipe(write(tmp_path, "extends: [parts/b.yaml]\n" + GOOD.replace("  lr: 1e-4\n", "")))
    assert (recipe.train.lr, recipe.train.clip, recipe.adapter.rank) == (1e-3, 3.0, 8)
    assert recipe.train.data.path is None  # the shorthand replaces what it extends, with all of its keys


def test_a_fault_in_an_extended_file_points_there(tmp_path: Path) -> None:
    write(tmp_path, "train:\n  clipp: 2.0\n", "parts/a.yaml")
    assert faults(write(tmp_path, "extends: parts/a\n" + GOOD)) == [
        "parts/a.yaml:2:3: unknown key train.clipp (did you mean train.clip?)"
    ]


def test_shipped_pieces_are_found_from_anywhere(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "extends: configs:train/gsm8k\n" + GOOD))
    assert recipe.train.accumulation == 4


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("nowhere", "r.yaml:1:10: extends: no such file: nowhere"),
        ("configs:train/gsm8", "did you mean configs:train/gsm8k?"),
        ("r.yaml", "extends itself"),
        ("{a: 1}", "expected a file or a list of files, got a mapping"),
    ],
)
def test_a_bad_extends_is_a_fault(tmp_path: Path, extends: str, message: str) -> None:
    assert message in faults(write(tmp_path, f"extends: {extends}\n" + GOOD))[0]


@pytest.mark.parametrize(("text", "message"), [("", "the file is empty"), ("- a\n", "expected keys and values, got a list")])
def test_a_file_that_is_no_mapping_is_a_fault(tmp_path: Path, text: str, message: str) -> None:
    assert any(message in fault for fault in faults(write(tmp_path, text)))


def test_a_file_that_is_no_text_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    assert "cannot be read" in faults(path)[0]


def test_an_unknown_reference_names_the_nearest_shipped_recipe() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("llama32-3b-2bits")
    assert caught.value.problems[0].hint == "did you mean llama32-3b-2bit?"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["quantize.method=nf4", "quantize.bits=4"],
        ["init.method=zero"],
        ["model.revision='7e5'", "adapter.targets=[q_proj]", "train.validation={examples: 4, every: 2}", "train.lr=1e-7"],
    ],
)
def test_the_resolved_recipe_loads_to_an_equal_one(tmp_path: Path, changes: list[str]) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), changes)
    again = load_recipe(write(tmp_path, recipe.to_yaml(), "resolved.yaml"))
    assert again == recipe
    assert again.dump() == recipe.dump()
    assert Recipe.model_validate(recipe.dump()) == recipe


@pytest.mark.parametrize("method", ["cloq", "qera", "loftq", "zero"])
def test_a_lora_takes_the_starts_of_a_lora(tmp_path: Path, method: str) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), ["adapter.method=lora", f"init.method={method}"])
    assert (recipe.adapter.method, recipe.init.method) == ("lora", method)
    assert load_recipe(write(tmp_path, recipe.to_yaml(), "resolved.yaml")) == recipe


@pytest.mark.parametrize("method", ["pursuit", "adaalloc", "random"])
def test_a_lora_with_a_start_that_chooses_places_is_refused_at_the_method(tmp_path: Path, method: str) -> None:
    text = GOOD + f"adapter:\n  method: lora\ninit:\n  method: {method}\n"
    found = faults(write(tmp_path, text))
    assert len(found) == 1
    assert found[0].startswith(f"r.yaml:14:11: init.method: a lora adapter has no start called {method}")
    assert "set init.method=cloq, or adapter.method=qwha (lora has cloq, loftq, qera, zero)" in found[0]


def test_a_lora_does_not_take_the_default_start_in_silence(tmp_path: Path) -> None:
    found = faults(write(tmp_path, GOOD), "adapter.method=lora")
    assert len(found) == 1
    assert "init.method: a lora adapter has no start called pursuit" in found[0]


@pytest.mark.parametrize("method", ["cloq", "qera", "loftq"])
def test_a_sparse_adapter_with_a_start_of_low_rank_is_refused_at_the_method(tmp_path: Path, method: str) -> None:
    found = faults(write(tmp_path, GOOD), f"init.method={method}")
    assert len(found) == 1
    assert f"a qwha adapter has no start called {method}" in found[0]
    assert "set init.method=pursuit, or adapter.method=lora" in found[0]


@pytest.mark.parametrize("overrides", [("quantize.basis=weight",), ("adapter.method=lora", "init.method=cloq")])
def test_8_bit_products_without_a_layer_that_has_them_are_refused(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert load_recipe(write(tmp_path, GOOD), overrides=["train.precision=fp8"]).train.precision == "fp8"
    found = faults(write(tmp_path, GOOD), "train.precision=fp8", *overrides)
    assert len(found) == 1
    assert "train.precision: 8-bit products are those of a qwha adapter in the Hadamard basis" in found[0]
