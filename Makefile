# Two commands need nothing but Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo
# How many times as many instances as `make test` tries; the time grows with it.
PROOF_FACTOR ?= 20
FUZZ_CASES ?= 1000000
KILLS ?= 50
# Files or folders of tests; without any `make test` runs them all, and the targets for other sets of
# versions run a selection that reaches every dependency in about two CPU minutes.
TESTS ?=
SELECTION := $(addprefix tests/, solvers/test_solvers.py kernels/test_codes.py \
  inference/test_packed_linear.py serving/test_server.py data/test_lerobot.py \
  pipeline/test_run.py::test_every_file_is_there_and_nothing_half_written)
# The newest interpreter that is supported, wherever it can be found. Only running it tells: pyenv has
# a python3.13 on the path that runs nothing while another version is chosen.
PYTHON_NEWEST ?= $(shell for python in python3.13 $(HOME)/.pyenv/versions/3.13*/bin/python; do \
  "$$python" -c '' 2>/dev/null && echo "$$python" && break; done)
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-newest test-lowest test-aarch64 prove-solvers bench-solvers bench-kernels sanitize fuzz faults audit notebooks docs wheels sdist nightly lint types format clean

help:  ## List the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed; name one with PYTHON=... (this is $$($(PYTHON) -V))" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of extras, so that a changed pyproject.toml installs again.
$(VENV)/.core: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# openpi-client asks for numpy < 2, and works with newer ones. inspect-robots-franka asks for OpenCV, which
# only cameras need.
$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,rlds]'
	$(BIN)/python -m pip install --quiet --no-deps 'openpi-client>=0.1.2' 'inspect-robots-franka>=0.1'
	@touch $@ $(VENV)/.core

demo: $(VENV)/.core  ## Quantize the bundled policy at 4 bits per weight and report (2 to 5 minutes)
	$(BIN)/qvla run --model libero-mini --budget-bits 4 --out $(OUT)

test: $(VENV)/.dev  ## Run the tests, or those of TESTS=...
	$(BIN)/python -m pytest -n auto --dist loadfile $(TESTS)

test-long: $(VENV)/.dev  ## Run the tests that take long
	$(BIN)/python -m pytest -m long

# Where there is no newer interpreter than the usual one, newer versions of packages are left to test.
test-newest:  ## Run a selection of the tests with the newest Python and the newest packages for it
	@test -n "$(PYTHON_NEWEST)" || echo "There is no python3.13 here: testing with $(PYTHON)," \
	  "$$($(PYTHON) -V). PYTHON_NEWEST=... names another interpreter." >&2
	$(MAKE) test VENV=build/newest PYTHON='$(or $(PYTHON_NEWEST),$(PYTHON))' \
	  TESTS='$(or $(TESTS),$(SELECTION))'

# uv knows how to ask for the lowest versions that fit together; pip does not.
test-lowest:  ## Run a selection of the tests with every dependency at its lower bound
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet uv
	build/lowest/bin/uv pip compile --quiet --resolution lowest-direct --extra dev --extra rlds \
	  --python build/lowest/bin/python --output-file build/lowest/requirements.txt pyproject.toml
	build/lowest/bin/uv pip install --quiet --python build/lowest/bin/python \
	  --requirement build/lowest/requirements.txt --editable .
	build/lowest/bin/uv pip install --quiet --python build/lowest/bin/python \
	  --no-deps 'openpi-client==0.1.2' 'inspect-robots-franka==0.1.0'
	build/lowest/bin/python -m pytest -n auto --dist loadfile $(or $(TESTS),$(SELECTION))

test-aarch64: $(VENV)/.dev  ## Cross-compile the CPU kernel for 64-bit ARM and check it in an emulator (g++-aarch64-linux-gnu, qemu-user)
	$(BIN)/python -m pytest -m long tests/kernels/test_native.py -k aarch64

prove-solvers: $(VENV)/.dev  ## Check the allocators on thousands of small instances (3 CPU minutes)
	QVLA_PROOF_FACTOR=$(PROOF_FACTOR) $(BIN)/python -m pytest -n auto -rP $(addprefix tests/solvers/test_, \
	  proofs.py solvers.py resources.py alignment.py front.py verification.py demotion.py)

bench-solvers: $(VENV)/.core  ## Compare the allocators at 1.85 million channels (less than 15 minutes)
	$(BIN)/python benchmarks/solvers.py

bench-kernels: $(VENV)/.core  ## Time the packed product against installed rivals on one core (about 15 minutes)
	$(BIN)/python benchmarks/kernels.py

# The sanitizers' library must be the first that the interpreter loads; JAX and Python leak on purpose.
sanitize: $(VENV)/.dev  ## Run the checks and tests of the CPU kernel under ASan and UBSan (g++, cmake)
	cmake -S csrc -B build/sanitize -DCMAKE_CXX_COMPILER=g++ -DQVLA_SANITIZE='address,undefined' \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	cmake --build build/sanitize --target check_kernels _cpu
	UBSAN_OPTIONS=print_stacktrace=1 build/sanitize/check_kernels 3000
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	QVLA_CPU_LIBRARY=$(CURDIR)/build/sanitize/_cpu.so \
	  $(BIN)/python -m pytest --capture=no tests/kernels/test_cpu.py tests/kernels/test_cpu_attention.py \
	  tests/kernels/test_matmul.py -k "not pallas and not reference"

# Atheris (libFuzzer) has wheels for Linux on x86-64; without it kinds of refusal guide the run.
fuzz: $(VENV)/.dev  ## Feed a million damaged files and messages to every reader (docs/reliability.md)
	-$(BIN)/python -m pip install --quiet 'atheris>=3'
	JAX_PLATFORMS=cpu PYTHONPATH=tests $(BIN)/python -W ignore -m fuzz --cases $(FUZZ_CASES)

faults: $(VENV)/.dev  ## Kill sweep, training, packing, evaluation and study 50 times each (docs/reliability.md)
	PYTHONPATH=tests $(BIN)/python -W ignore -m faults --kills $(KILLS)

audit: $(VENV)/.dev  ## Look for known vulnerabilities in what is installed (asks PyPI)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --skip-editable

notebooks: $(VENV)/.dev  ## Run all notebooks; copies with their pictures go to build/notebooks
	$(BIN)/python -m pytest -m notebook tests/test_notebooks.py

docs: $(VENV)/.dev  ## Build the pages of the Python API from its docstrings, in build/docs
	$(BIN)/python docs/build_api.py build/docs

# cibuildwheel builds in a container of manylinux (Docker), and tests what it built outside of it.
wheels: $(BIN)/python  ## Build the wheel for this architecture, in dist
	$(BIN)/python -m pip install --quiet cibuildwheel
	$(BIN)/python -m cibuildwheel --output-dir dist

sdist: $(BIN)/python  ## Build the source distribution, in dist
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --sdist --outdir dist

nightly: notebooks docs test-long  ## What takes too long for every change

lint: $(VENV)/.dev types  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# An editable install maps solvers/ and data/ into qvla_jax with an import hook, which no type checker
# follows; an ordinary installation in build/ has the same modules where they are imported from.
types: $(VENV)/.dev
	rm -rf build/types
	$(BIN)/python -m pip install --quiet --no-deps --target build/types --config-settings=wheel.cmake=false .
	cp pyproject.toml build/types
	$(BIN)/basedpyright --project build/types --pythonpath $(BIN)/python

format: $(VENV)/.dev  ## Fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) build dist .pytest_cache $(OUT)
