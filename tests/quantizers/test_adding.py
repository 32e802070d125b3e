"""docs/adding-a-quantizer.md is true: its code runs, its places exist, and the registers that it names agree."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from qwha_cli import catalog
from qwha_cli.quant.packed import Method
from qwha_cli.recipe.quantize_section import QuantizeSection

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding-a-quantizer.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
NEW = "sweep"


def load_module(name: str, source: str, folder: Path) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def worked_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's quantizer in the catalogue, as if its steps had been taken."""
    module = load_module("docs_sweep", BLOCKS[0], tmp_path)
    monkeypatch.setattr(catalog, "QUANTIZERS", {**catalog.QUANTIZERS, NEW: "docs_sweep:quantize"})
    yield module
    del sys.modules["docs_sweep"]


def test_the_pages_quantizer_passes_the_pages_tests(worked_example: ModuleType, tmp_path: Path) -> None:
    assert inspect.getdoc(worked_example.quantize)
    tests = load_module("docs_test_sweep", BLOCKS[-1], tmp_path)
    run = 0
    for name, test in inspect.getmembers(tests, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        cases: list[dict[str, object]] = [{}]
        for mark in getattr(test, "pytestmark", []):
            cases = [{**case, mark.args[0]: value} for case in cases for value in mark.args[1]]
        for case in cases:
            test(**case)
            run += 1
    assert run == 3 * 2 + 1


def test_every_step_of_the_page_names_a_file_that_exists() -> None:
    named = set(re.findall(r"`((?:src|tests|docs)/[\w./-]+)`", PAGE))
    assert len(named) >= 8
    missing = {path for path in named if NEW not in path and not (ROOT / path).is_file()}
    assert not missing


def test_checkpoint_catalogue_and_recipe_know_the_same_methods() -> None:
    in_recipe = get_args(QuantizeSection.model_fields["method"].annotation)
    assert set(get_args(Method)) == set(catalog.QUANTIZERS) == set(in_recipe)
    # the page shows both registers as they are, plus its own line
    for name, entry in catalog.QUANTIZERS.items():
        assert f'"{name}": "{entry}",' in PAGE
    assert f"Method = Literal[{', '.join(repr(name) for name in get_args(Method))}, {NEW!r}]".replace("'", '"') in PAGE
