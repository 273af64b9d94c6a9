# Each target makes what it needs: a fresh machine with python3 (and its venv module) and make can run any of them.
# Stamp files inside the virtual environment record what is installed, so a second call starts at once.

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
SETTINGS := setup.cfg pyproject.toml constraints.txt

# What runs in every step of training has the shapes of its arguments checked where it is tested itself, and only there.
INNER := $(addprefix tests/,experiment densities summaries training bounds test_monte_carlo.py)

# On a few contended cores tiny tensor operations take many times longer with two threads than with one.
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg

.PHONY: demo test slow lint docs clean

demo: $(VENV)/stamp-package
	mkdir -p figures
	$(BIN)/python tutorials/demo.py

test: $(VENV)/stamp-test
	PYRO_VOED_CHECKED=all $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(INNER)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(INNER:%=--ignore=%)

slow: $(VENV)/stamp-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/stamp-docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build docs/api figures .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find pyro_voed tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: it is the one large download, and everything after it is resolved against it.
$(VENV)/stamp-torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH)
	touch $@

$(VENV)/stamp-package: $(VENV)/stamp-torch $(SETTINGS)
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/stamp-test $(VENV)/stamp-docs $(VENV)/stamp-dev: $(VENV)/stamp-%: $(VENV)/stamp-torch $(SETTINGS)
	$(PIP_INSTALL) -e ".[$*]"
	touch $@
