# Every command sets up by itself: a virtual environment in .venv, pinned by constraints.txt, made once.
PYTHON ?= python3
BIN := .venv/bin
SET ?=
# Hundreds of short processes import the package; where this is set, each would compile it again.
unexport PYTHONDONTWRITEBYTECODE
overrides = $(foreach s,$(SET),--set $(s))

.PHONY: setup train test test-native check matrix bench gpu gpu-deps clean

train: setup
	$(BIN)/trilith train configs/quickstart.json $(overrides)

# One worker a core: many tests wait for something, or keep one core busy only.
test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not slow and not gpu" tests

# The tests of csrc/, without Python, under AddressSanitizer and UndefinedBehaviorSanitizer.
test-native: setup
	$(BIN)/python csrc/build.py test

check: setup
	$(BIN)/ruff check engine launcher benchmarks tests csrc setup.py
	$(BIN)/ruff format --check engine launcher benchmarks tests csrc setup.py
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

matrix: setup
	$(BIN)/python -m pytest -m "slow and not gpu" tests
	$(BIN)/python -m tests.matrix

bench: setup
	$(BIN)/python -m benchmarks

# On a machine with a CUDA device: the parity suite and the GPU tests, with the Python that is there (nothing is downloaded).
gpu:
	sh benchmarks/gpu.sh

# Wheels for an offline GPU machine with Python 3.12: everything but torch and numpy, which it has.
gpu-deps:
	$(PYTHON) -m pip install --quiet --target .deps --python-version 3.12 --only-binary=:all: --no-deps -r benchmarks/gpu-deps.txt

setup: .venv/.kernels

# Kernels are built again where a source of theirs has changed.
.venv/.kernels: .venv/.ready $(shell find csrc -type f ! -name '*.pyc')
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

.venv/.ready: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel ninja pybind11
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev,data]"
	touch $@

clean:
	rm -rf .venv build *.egg-info engine/trilith/_kernels*.so
