# Every target sets itself up in a fresh clone: a virtual environment in .venv with the versions of constraints.txt.
# `make VENV= <target>` uses the current Python as it is and installs nothing (a GPU machine without network, say).
VENV ?= .venv
ifeq ($(strip $(VENV)),)
  PYTHON ?= python3
  READY :=
  export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
else
  PYTHON := $(VENV)/bin/python
  READY := $(VENV)/ready
endif
BENCH ?=
TEST ?=

.PHONY: bench test check gpu-test report clean
bench: $(READY)     ## correctness and timings: all seed rows on a GPU, the three honest parts without one
	$(PYTHON) -m trinix bench --suite seeds $(BENCH)

test: $(READY) check   ## lint, import contracts, every test that needs no GPU, and on a GPU the others
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not gpu" $(TEST)
	@if $(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(MAKE) gpu-test; \
	else echo "No GPU here: the GPU tests were not run."; fi

check: $(READY)     ## ruff and the import contracts
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -c "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"

gpu-test: $(READY)  ## the suite that needs a GPU
	$(PYTHON) -m pytest -m gpu $(TEST)

report: $(READY)    ## the tables of results/, made again from the result lines
	$(PYTHON) -m trinix report

clean:
	rm -rf $(VENV)

$(VENV)/ready: constraints.txt pyproject.toml
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt torch triton
	$(PYTHON) -m pip install --quiet --constraint constraints.txt hatchling editables
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[lab,dev]'
	touch $@
