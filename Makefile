# make demo | test | census | bench (= bench-train) | bench-profile | bench-saving | bench-faults | soak | bench-towers |
# bench-ingest: each sets up .venv first. PYTHON: which Python 3.11 makes it.
PYTHON ?= python3.11
MODEL ?= adatt
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint bench bench-train bench-profile bench-saving bench-faults soak bench-towers bench-ingest census clean

demo: .venv/ready
	$(BIN)/python -m jobs.demo model=$(MODEL)

test: .venv/ready lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

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
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements-cpu.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# What only the benchmark compares with.
.venv/rechub: .venv/ready tests/benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ -r tests/benchmarks/requirements.txt
	touch $@

clean:
	rm -rf .venv runs
