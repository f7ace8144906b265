# `make demo` and `make test` do all their set-up in .venv on a machine with Python 3.11 and a registry.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check bench fuzz soak audit clean

demo: $(VENV)/.installed
	$(BIN)/flawsmith demo demo

# Two processes of one thread each: what one process waits for (servers, files), the other makes use of.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	mkdir -p bench
	for name in synthesis presets pipeline metrics cut export training report; do \
		$(BIN)/python -m tests.benchmarks.$$name --json bench/$$name.json || exit 1; \
	done

# Hostile inputs for everything that reads foreign bytes; counts and faults in bench/fuzz.json.
fuzz: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[fuzz]'
	mkdir -p bench
	$(BIN)/python -m tests.fuzz --json bench/fuzz.json --keep bench/fuzz

# Faults injected into runs, each of which must end with what nobody disturbed; counts in bench/soak.json.
soak: $(VENV)/.installed
	mkdir -p bench
	$(BIN)/python -m tests.soak --faults 100 --json bench/soak.json

# Installed versions against the advisories of the Python Packaging Advisory Database.
audit: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[audit]'
	$(BIN)/python -m tests.audit

# pip, because torch and torchvision must be picked together; see pyproject.toml.
$(VENV)/.installed: pyproject.toml
	command -v $(PYTHON) >/dev/null || { echo "needs $(PYTHON); set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-bench* demo bench
