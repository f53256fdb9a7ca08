# Two commands do everything on a fresh machine: `make test` and `make demo`.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
CONTROL_PEERS := .venv-control-peers
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMPS := $(VENV)/.stamps
DEMO ?= demo-output
DEMO_FLAGS ?=

.PHONY: demo test test-all lint docs bench bench-peers bench-control cuda packages lowest clean help

help:
	@echo "make demo   simulate, reconstruct and evaluate scans, all on bundled data; results in $(DEMO)/"
	@echo "make test   run the test suite: every behaviour, in minutes"
	@echo "make test-all  the same, and full products of tables, long runs and what needs a GPU"
	@echo "make lint   ruff and basedpyright"
	@echo "make docs   build the Sphinx site into docs/_build/html"
	@echo "make bench  run the benchmarks (by hand; several minutes)"
	@echo "make cuda   what needs a GPU: its tests, and benchmarks/gpu.py"
	@echo "make packages  build wheel and sdist, and use them outside of the checkout"
	@echo "make lowest  test the library with the oldest versions of what it needs"
	@echo "make bench-peers  compare with other libraries, in an environment of its own"
	@echo "make bench-control  compare with other solvers of optimal control, likewise"

# One stamp an extra: a second run starts at once, a changed requirement installs again.
$(STAMPS)/%: pyproject.toml constraints.txt
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	$(PIP) -e ".[$*]"
	@touch $@

demo: $(STAMPS)/mri-formats
	$(VENV)/bin/bilevel-mri demo --out $(DEMO) $(DEMO_FLAGS)

test: $(STAMPS)/test
	$(VENV)/bin/python -m pytest -q -n auto --dist loadgroup

test-all: $(STAMPS)/test
	$(VENV)/bin/python -m pytest -q -n auto --dist loadgroup -m ""

lint: $(STAMPS)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright

docs: $(STAMPS)/docs
	$(VENV)/bin/python -m sphinx -W -n --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

bench: $(STAMPS)/mri
	$(VENV)/bin/python -m benchmarks.training_step
	$(VENV)/bin/python -m benchmarks.memory
	$(VENV)/bin/python -m benchmarks.speed
	$(VENV)/bin/python -m benchmarks.columns
	$(VENV)/bin/python -m benchmarks.many_outers
	$(VENV)/bin/python -m benchmarks.first_derivatives

# One run of some minutes, with what is installed already: CUDA_PYTHON may be any that has torch and
# the packages of the extra `mri`.
CUDA_PYTHON ?= $(VENV)/bin/python
cuda:
	$(CUDA_PYTHON) -m pytest -q -m cuda tests
	@mkdir -p benchmarks/results
	$(CUDA_PYTHON) -m benchmarks.gpu --json benchmarks/results/gpu.json

# The peers need versions of their own. pip 24.1 began to refuse how betty-ml writes "torch>=1.6.*".
$(PEERS)/.made: benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "pip<24.1"
	$(PEERS)/bin/python -m pip install --quiet --only-binary :all: -r benchmarks/peers.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

bench-peers: $(PEERS)/.made
	$(PEERS)/bin/python -m benchmarks.hypergradient
	$(PEERS)/bin/python -m benchmarks.peer_cases

packages:
	PYTHON=$(PYTHON) .ci/packages

lowest:
	PYTHON=$(PYTHON) .ci/lowest

$(CONTROL_PEERS)/.made: benchmarks/control_peers.txt
	$(PYTHON) -m venv $(CONTROL_PEERS)
	$(CONTROL_PEERS)/bin/python -m pip install --quiet --only-binary :all: -r benchmarks/control_peers.txt
	$(CONTROL_PEERS)/bin/python -m pip install --quiet --no-deps mpc==0.0.6
	$(CONTROL_PEERS)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

bench-control: $(CONTROL_PEERS)/.made
	$(CONTROL_PEERS)/bin/python -m benchmarks.optimal_control

clean:
	rm -rf $(VENV) $(PEERS) $(CONTROL_PEERS) docs/_build docs/gallery
