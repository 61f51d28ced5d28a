# `make demo` and `make test` do all the set-up themselves; a second run with nothing changed starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Most of their time is compilation, so they share the processors where xdist is installed.
GPU_TESTS = $(PYTHON) -m pytest -q $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && printf -- '-n auto --maxprocesses 12 --dist loadgroup') tests/gpu tests/kernels \
  --ignore tests/kernels/test_interpreted.py --ignore tests/kernels/test_compiled.py
NATIVE := $(shell find csrc kernels -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test lint typecheck bench bench-compare gpu check-tools clean help

help:
	@echo "make demo                     plant a backdoor in a small net, find its triggered inputs, show the result"
	@echo "make test                     all tests (set BENIFUL_DATA to a folder of data sets for those on real data)"
	@echo "make lint | typecheck         ruff | mypy"
	@echo "make bench                    ratio tables of every op, JSON into benchmarks/results/"
	@echo "make bench-compare BASE=REV   this tree against another revision with one harness"
	@echo "make gpu                      on a CUDA machine, no downloads: build, GPU tests, GPU benchmarks (ONLY=build|test|bench|<case> OUT=folder)"
	@echo "make clean                    remove the build and the virtual environment"

demo: $(VENV)/.ready
	$(BIN)/beniful-fast demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest tests -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.ready
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.run

bench-compare: $(VENV)/.ready
	@test -n "$(BASE)" || { echo "bench-compare: name the base, for example: make bench-compare BASE=HEAD~1" >&2; exit 2; }
	$(BIN)/python -m benchmarks.compare_revisions "$(BASE)"

# With the machine's own Python and packages: such machines often reach no registry. A failing test does not cost the figures: both run,
# and the status is the tests'. What needs no GPU (interpreter, offline compilation, CPU ops) is `make test`'s.
gpu:
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "gpu: '$(PYTHON)' has no torch that sees a CUDA device" >&2; exit 2; }
ifneq ($(filter-out test bench,$(or $(ONLY),all)),)
	BENIFUL_REQUIRE_NATIVE=1 $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
endif
	@$(PYTHON) -c 'import beniful_fast as bf; ok, why = bf.backends()["cuda"]; assert ok, why'
	@status=0; \
	case "$(or $(ONLY),all)" in all|test) $(GPU_TESTS) || status=$$? ;; esac; \
	case "$(or $(ONLY),all)" in build|test) ;; \
	  all|bench) ONLY= $(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT)) || status=$$? ;; \
	  *) $(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT)) || status=$$? ;; esac; \
	exit $$status

check-tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "beniful_fast needs Python 3.10 or newer as '$(PYTHON)'; name another with: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "beniful_fast needs Python's venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@command -v "$${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 || \
	  { echo "beniful_fast needs a C++17 compiler (g++ or clang++); on Debian and Ubuntu: apt-get install g++" >&2; exit 2; }

# Build tools and torch come first: the extension builds against the installed torch's headers, without build isolation.
$(VENV)/.dependencies: pyproject.toml
	@$(MAKE) --no-print-directory check-tools
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13" "torch>=2.10"
	@touch $@

$(VENV)/.ready: $(VENV)/.dependencies $(NATIVE)
	BENIFUL_REQUIRE_NATIVE=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev]"
	@touch $@

clean:
	rm -rf build dist *.egg-info beniful_fast/*.so $(VENV)
