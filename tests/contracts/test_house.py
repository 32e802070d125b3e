"""The house rules that a machine can check: floors, light imports, a complete catalogue, files of a readable size."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from qwha_cli import catalog

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "lm_eval", "matplotlib", "numpy")


def test_imports_go_only_downward() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, qwha_cli.cli.app; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ENTRIES = [
    (kind, name, entry)
    for kind in ("QUANTIZERS", "INITIALIZERS", "LOW_RANK_INITIALIZERS", "ADAPTERS", "DATASETS", "TEXTS")
    for name, entry in getattr(catalog, kind).items()
]


@pytest.mark.parametrize(("kind", "name", "entry"), ENTRIES, ids=[f"{k}:{n}" for k, n, _ in ENTRIES])
def test_every_catalogue_entry_loads(kind: str, name: str, entry: str) -> None:
    loaded = catalog.load(entry)
    assert callable(loaded)
    assert loaded.__doc__, f"{kind} {name} has no docstring"


def test_every_task_of_the_catalogue_is_in_lm_eval() -> None:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    tasks = Path(spec.origin).parent / "tasks"
    assert len(catalog.TASKS) >= 4
    for name, file in catalog.TASKS.items():
        assert (tasks / file).is_file(), name


def test_nearest_name_is_offered_only_when_it_is_near() -> None:
    assert catalog.nearest("gtpq", catalog.QUANTIZERS) == "gptq"
    assert catalog.nearest("zzzzzz", catalog.QUANTIZERS) is None


def test_every_file_says_what_it_is_and_stays_readable() -> None:
    assert len(SOURCES) > 50
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"
        assert len(text.splitlines()) <= 350, f"{path} is longer than 350 lines"
        assert path.stem not in {"utils", "common", "helpers", "misc"}, path


def test_sub_packages_only_document_themselves() -> None:
    folders = [p for p in SOURCES if p.name == "__init__.py" and p.parent.name != "qwha_cli"]
    assert len(folders) >= 12
    for path in folders:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, f"{path} does more than document"


def test_nothing_loads_pickles_or_remote_code() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for banned in ("torch.load(", "import pickle", "trust_remote_code=True", "yaml.load("):
            assert banned not in text, f"{path}: {banned}"
