# Everything a fresh machine needs is Python >= 3.11 with venv, make and git.
VENV := .venv
BIN := $(VENV)/bin
# The first interpreter on the PATH that is new enough; `make PYTHON=/path/to/python3.12 quickstart` takes another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

REPORT ?= test-gpu.json

.PHONY: quickstart reproduce test test-kernels test-slow test-faults test-browser test-tasks test-gpu lint format clean

# In bf16 where the processor has it. The number of threads is given, or the launcher would warn that it chose it.
quickstart: $(VENV)/.installed
	config=$$($(BIN)/python -m clm_owt.training.cpu_precision) && \
	OMP_NUM_THREADS=$$($(BIN)/python -c 'import psutil; print(psutil.cpu_count(logical=False) or 1)') \
	$(BIN)/accelerate launch --config_file $$config run_clm_owt.py --recipe recipes/quickstart.yaml

# Runs a recorded result again, and says whether it is the same: make reproduce RECORD=NAME, and RUNS=all for every run.
reproduce: $(VENV)/.installed
	@test -n "$(RECORD)" || { echo "error: which of records/? make reproduce RECORD=NAME"; exit 2; }
	$(BIN)/python scripts/record.py reproduce $(RECORD) $(if $(RUNS),--runs $(RUNS))

# One thread per test process: pytest-xdist keeps the cores busy with a process each, and one more (tests/conftest.py). Tests that share a real run
# form a group, which one of them takes.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup --durations=10

test-slow: $(VENV)/.installed-test
	$(PIP_INSTALL) --editable '.[test,fp8]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup -m slow

# Pages opened in a real browser: needs chromium (Debian, Ubuntu: apt install chromium).
test-browser: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m browser

# The CUDA code of the loss, written out and compiled without a GPU: needs g++.
test-kernels: $(VENV)/.installed-test
	$(PIP_INSTALL) --editable '.[test,kernels]'
	$(BIN)/python -m pytest -m kernels

# Zero-shot tasks on local data, with lm-evaluation-harness.
test-tasks: $(VENV)/.installed-test
	$(PIP_INSTALL) --editable '.[test,eval]'
	$(BIN)/python -m pytest -m tasks

# More than a thousand faults on real processes, one test at a time on each of two cores; prints the table of
# docs/reliability.md, and writes it where it is asked to:
# make test-faults FAULTS="--seed 7 --faults-table table.md -k full_disk"
test-faults: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --maxschedchunk 1 -m "faults or not faults" -v tests/faults $(FAULTS)

# The acceptance of a machine: on its GPU, in at most 8 minutes; without one a dry run. Ends with a table, and writes it
# where it is asked to: make test-gpu REPORT=my_gpu.json
test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "gpu or not gpu" tests/gpu --accept $(REPORT)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed, and none is on the PATH;" \
		"install one, or name it: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[test]'
	# W&B's own schema of sweeps is in this package, which is not imported: it needs an older numpy.
	$(PIP_INSTALL) --no-deps sweeps
	@touch $@ $(VENV)/.installed
