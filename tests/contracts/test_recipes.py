"""Every recipe on disk: it validates, has its header, survives a round trip, and fits the model it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwha_cli.recipe.load import load_recipe
from qwha_cli.recipe.shipped import find, list_pieces, list_shipped

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "recipes").rglob("*.y*ml"))
HEADER = ("What it does: ", "Run it: ", "Needs: ", "Data: ", "Expect: ")
ASKED_FOR = {
    "llama32-3b-2bit",
    "llama32-3b-3bit",
    "llama32-3b-4bit",
    "llama32-3b-2bit-alpaca",
    "llama32-3b-nf4",
    "llama31-8b-2bit",
    "mistral-7b-2bit",
    "qwen25-0.5b-2bit",
    "smollm2-135m-2bit",
    "tiny-random",
}
# Model id to (hidden size, intermediate size, decoder blocks), from the models' own config.json.
SIZES = {
    "meta-llama/Llama-3.2-3B": (3072, 8192, 28),
    "meta-llama/Llama-3.1-8B": (4096, 14336, 32),
    "mistralai/Mistral-7B-v0.3": (4096, 14336, 32),
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 4864, 24),
    "builtin:smollm2-135m": (576, 1536, 30),
    "random:tiny-llama": (48, 80, 2),
}


def test_all_recipes_on_disk_are_found_and_those_asked_for_are_there() -> None:
    names = {path.stem for path in FILES}
    assert len(FILES) >= len(ASKED_FOR)
    assert names >= ASKED_FOR
    assert {recipe.name for recipe in list_shipped()} == names
    assert [find(name) for name in sorted(names)] == [find(f"{name}.yaml") for name in sorted(names)]


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_recipe_validates_and_is_named_like_its_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_recipe_says_in_five_lines_what_how_needs_data_expect(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()[:5]
    for line, start in zip(lines, HEADER, strict=True):
        assert line.startswith(f"# {start}"), line
        assert len(line.removeprefix(f"# {start}").strip()) > 5, line
        assert len(line) <= 130
    assert lines[1] == f"# Run it: qwha run recipes/{path.name}"


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_resolved_recipe_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    resolved = tmp_path / "recipe.resolved.yaml"
    resolved.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(resolved) == recipe


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_recipe_fits_the_sizes_of_its_model(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.model.id in SIZES, f"add the sizes of {recipe.model.id} from its config.json"
    hidden, intermediate, blocks = SIZES[recipe.model.id]
    assert blocks > 0
    group = recipe.quantize.group_size
    # every linear layer of these blocks reads the hidden or the intermediate size
    assert hidden % group == 0
    assert intermediate % group == 0
    # the budget must fit into the smallest layer: a square one, k and v are narrower only in their outputs
    assert recipe.adapter.rank < hidden / 2
    name = f"{recipe.quantize.bits}bit" if recipe.quantize.method != "nf4" else "nf4"
    assert name in path.stem or path.stem == "tiny-random"


def test_the_papers_learning_rates_are_those_of_its_tables() -> None:
    rates = {name: load_recipe(name).train.lr for name in ASKED_FOR}
    assert rates["llama32-3b-2bit"] == 2e-4
    assert rates["llama32-3b-3bit"] == 1e-4
    assert rates["llama32-3b-4bit"] == 7e-5
    assert rates["llama32-3b-2bit-alpaca"] == 5e-5
    assert rates["llama31-8b-2bit"] == 5e-5
    assert rates["mistral-7b-2bit"] == 3e-5
    for name in ASKED_FOR - {"smollm2-135m-2bit", "tiny-random"}:
        recipe = load_recipe(name)
        assert recipe.train.batch_size * recipe.train.accumulation == 64, name
        assert recipe.adapter.rank == 64, name
        assert (recipe.quantize.calibration.samples, recipe.quantize.calibration.length) == (128, 2048), name


def test_every_piece_is_extended_by_a_recipe() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in FILES)
    pieces = list_pieces()
    on_disk = [path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate"]
    assert len(pieces) == len(on_disk)
    assert [piece for piece in pieces if f"- {piece}\n" not in text] == []
