# make demo | check | test | test-all | census | bench-train and the other benchmarks; each sets up .venv first.
# check: lint, types, layers, unit tests. test: and one-rank training and Beam. test-all: and several processes, kills, runners.
# The first Python that runs and that every pin has a wheel or a pure source for; make PYTHON=... takes another.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13,$(shell $(name) -c '' 2>/dev/null && echo $(name))))
MODEL ?= adatt
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
export OMP_NUM_THREADS ?= 1

.PHONY: demo check lint test test-system test-all census clean
.PHONY: bench bench-train bench-profile bench-saving bench-faults soak bench-towers bench-ingest

demo: .venv/ready
	$(BIN)/python -m jobs.demo model=$(MODEL)

check: lint
	TASKFUSE_EXAMPLES_DIVISOR=5 $(PYTEST) -m "not integration and not system"

test: lint
	$(PYTEST) -m "not system"

test-system: .venv/ready
	$(PYTEST) -m system

test-all: test
	$(MAKE) test-system

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: bench-train

bench-train: .venv/ready .venv/rechub
	$(BIN)/python tests/benchmarks/train.py

bench-profile: .venv/ready
	$(BIN)/python tests/benchmarks/step_profile.py

soak: .venv/ready
	$(BIN)/python tests/benchmarks/soak.py

bench-saving: .venv/ready
	$(BIN)/python tests/benchmarks/saving.py

bench-faults: .venv/ready
	$(BIN)/python tests/benchmarks/faults.py

bench-towers: .venv/ready
	$(BIN)/python tests/benchmarks/towers.py

bench-ingest: .venv/ready
	$(BIN)/python tests/benchmarks/ingest.py

census: .venv/ready
	$(BIN)/python -m jobs.compare

# torch comes first, with its dependencies; the rest is pinned whole, since torchrec alone would ask for CUDA's fbgemm.
.venv/ready: requirements-cpu.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no python3.11, python3.12 or python3.13 runs: install one, or name it with PYTHON=" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements-cpu.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Contenders of bench-train, outside of the environment that is measured.
.venv/rechub: .venv/ready tests/benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ -r tests/benchmarks/requirements.txt
	touch $@

clean:
	rm -rf .venv runs
