# `make demo` and `make test` need Python 3.11 or later with venv, and a network for the first `pip install`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= --nodes 3 --seconds 20 --rate 50 --failover
ROUNDS ?= 200
SEED ?=
BENCH ?=
# The tests wait a good part of the time: more processes than the smallest machine has cores.
PYTEST ?= --numprocesses 4 --dist worksteal

.PHONY: demo test check campaign soak bench clean

demo: $(STAMP)
	$(BIN)/pmgcm demo $(DEMO)

test: check
	$(BIN)/pytest $(PYTEST)

campaign: $(STAMP)
	PMGSYNC_EXAMPLES=10 $(BIN)/pytest $(PYTEST) --every-version -m "not soak"

# Hours of random faults: `make soak ROUNDS=2000`, and SEED=… to repeat a run.
soak: $(STAMP)
	PMGSYNC_ROUNDS=$(ROUNDS) PMGSYNC_SEED=$(SEED) $(BIN)/pytest -s -m soak -o addopts= tests

# Beside PostgreSQL's own logical replication, then beside rsync; `make bench BENCH="--scale 0.1"` is a first answer, of rows.
bench: $(STAMP)
	$(BIN)/python -m tests.bench $(BENCH)
	$(if $(BENCH),,$(BIN)/python -m tests.bench.files)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
