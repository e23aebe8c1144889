# make demo, make test: set up what they need in .venv, and run. make lint, make bench: likewise.
# ARGS is passed on: make demo ARGS="--steps 20", make test ARGS="-k window"

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY = $(VENV)/.ready
SOURCES = $(wildcard csrc/*) setup.py pyproject.toml constraints.txt

.PHONY: demo test lint format bench clean

demo: $(READY)
	$(BIN)/pseuzo demo $(ARGS)

# What needs a GPU runs on it, where there is one; all else as if there were none, so that it is the same everywhere.
test: $(READY)
ifneq ($(shell command -v nvidia-smi),)
	$(BIN)/python -m pytest -m gpu $(ARGS) || [ $$? = 5 ]  # 5: ARGS chose none of them
endif
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

bench: $(READY)
	$(BIN)/python bench/sass_cost.py --json bench/results/sass.json --arch 80 90 --predict
	$(BIN)/python bench/bench_add_noise.py $(ARGS)
	$(BIN)/python bench/bench_steps.py
	$(BIN)/python bench/bench_growth.py
	$(BIN)/python bench/report.py

# Without a GPU, the CPU build of torch if the package index has one (PyTorch's own does: set PIP_EXTRA_INDEX_URL), else the
# usual one, which runs on a CPU too.
TORCH = torch
ifeq ($(shell command -v nvidia-smi),)
TORCH = "torch==$(shell sed -n 's/^torch==//p' constraints.txt)+cpu" 2>/dev/null || $(PIP) torch
endif

# torch goes first and alone: what comes after it must be built against it and must not bring another
$(READY): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) setuptools wheel ninja pybind11
	$(PIP) --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build pseuzo-demo pseuzo_kernels/*.so *.egg-info python/*.egg-info
