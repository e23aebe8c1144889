# make demo and make test set up what they need in .venv, and run. So do lint, bench, docs and dist.
# ARGS is passed on: make demo ARGS="--steps 20", make test ARGS="-k window"
# make test-fast runs the tests that daily work needs, in a minute. make test-machines runs all
# tests as on other CPUs. make docs builds the documentation in site/ and fails on a broken link.
# make dist builds a wheel and a source distribution in dist/.

SHELL = bash
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY = $(VENV)/.ready
CSRC = $(wildcard csrc/*.* csrc/*/*.*)
SOURCES = $(CSRC) setup.py pyproject.toml constraints.txt

.PHONY: demo real demo-real compare-real test test-fast test-machines lint format bench docs dist clean

demo: $(READY)
	$(BIN)/pseuzo demo $(ARGS)

# The models and sentences of make demo-real and make compare-real; those that are there are kept.
real: $(READY)
	$(BIN)/python bench/make_real.py

# SmolLM2-135M learns to tell praise from blame, in minutes. ARGS="--steps 100" is passed on.
demo-real: real
	$(BIN)/python bench/demo_real.py $(ARGS)

# MeZO as it is, and with the noise and the readout that did best, on two real tasks and two models.
compare-real: real
	$(BIN)/pseuzo compare --config examples/compare-real.yaml --output runs/compare-real $(ARGS)

TEST = CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Tests that need a GPU run on it if there is one. All others run as if there were none, so that
# they are the same everywhere.
test: $(READY)
ifneq ($(shell command -v nvidia-smi),)
	$(BIN)/python -m pytest -m gpu $(ARGS) || [ $$? = 5 ]  # 5: ARGS selected no test
endif
	$(TEST) $(ARGS)

test-fast: $(READY)
	$(TEST) -m "not slow" $(ARGS)

# The tests run on every instruction set of this CPU, in our ops and in torch's libraries, with one
# thread and with two.
test-machines: $(READY)
	@set -e; for isas in plain:default:SSE41 avx2:avx2:AVX2 avx512:avx512:AVX512_CORE; do \
	  IFS=: read isa aten onednn <<< $$isas; export PSEUZO_CPU_ISA=$$isa ATEN_CPU_CAPABILITY=$$aten ONEDNN_MAX_CPU_ISA=$$onednn; \
	  $(BIN)/python -c "import pseuzo_kernels as k; k._C.cpu_isa()" 2> /dev/null || { echo "== $$isa: not on this CPU"; continue; }; \
	  for threads in 1 2; do \
	    echo "== $$isa, threads: $$threads"; PSEUZO_TEST_THREADS=$$threads $(TEST) -n $$(( ($$(nproc) + threads - 1) / threads )) $(ARGS); \
	  done; \
	done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

bench: $(READY)
	$(BIN)/python bench/sass_cost.py --json bench/results/sass.json --arch 80 90 --predict
	$(BIN)/python bench/bench_add_noise.py $(ARGS)
	$(BIN)/python bench/bench_steps.py
	$(BIN)/python bench/bench_growth.py
	$(BIN)/python bench/report.py
	$(BIN)/python tools/result_tables.py

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --quiet --strict

dist: $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

$(VENV)/.docs $(VENV)/.dist: $(VENV)/.%: $(READY)
	$(PIP) $$($(BIN)/python -c "import tomllib; \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['$*'])")
	touch $@

# Without a GPU, install the CPU build of torch if the package index has one (PyTorch's own does:
# set PIP_EXTRA_INDEX_URL). Otherwise install the usual build, which also runs on a CPU.
TORCH = torch
ifeq ($(shell command -v nvidia-smi),)
TORCH = "torch==$(shell sed -n 's/^torch==//p' constraints.txt)+cpu" 2>/dev/null || $(PIP) torch
endif

# torch is installed first and alone, since the later packages must be built against it and must not
# bring another torch.
$(READY): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) "setuptools>=77" ninja pybind11
	$(PIP) --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist site pseuzo-demo pseuzo_kernels/*.so *.egg-info python/*.egg-info
