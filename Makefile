# make demo | check | test | test-all | census | bench-train and the other benchmarks; each sets up .venv first. make lock: new pins.
# check: lint, types, layers, unit tests. test: and one-rank training and Beam. test-all: and several processes, kills, runners.
# The first Python that runs and that every pin has a wheel or a pure source for; make PYTHON=... takes another.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13,$(shell $(name) -c '' 2>/dev/null && echo $(name))))
MODEL ?= adatt
BIN := .venv/bin
# Files in the order of tests/conftest.py, the long ones first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export OMP_NUM_THREADS ?= 1

PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
PINNED := $(PIP) install --require-hashes --no-deps --no-build-isolation

.PHONY: demo check lint test test-system test-all every-test census lock clean
.PHONY: bench bench-train bench-profile bench-saving bench-faults bench-nodes soak bench-towers bench-emm bench-ingest
.PHONY: bench-evaluate bench-serve bench-gpu bench-intervals bench-links bench-loader bench-search bench-planted bench-store chaos

# STORE=s3: datasets and runs lie on an S3 server of its own, on this machine; STORE=s3://BUCKET/FOLDER: there.
STORE ?=
demo: .venv/ready
	$(if $(filter s3,$(STORE)),$(BIN)/python tests/s3_server.py runs/s3) \
		$(BIN)/python -m jobs.demo model=$(MODEL) $(if $(STORE),folder=$(if $(filter s3,$(STORE)),s3://bucket/demo,$(STORE)))

check: lint
	TASKFUSE_EXAMPLES_DIVISOR=5 $(PYTEST) -m "not integration and not system"

test: lint
	$(PYTEST) -m "not system"

test-system: .venv/ready
	$(PYTEST) -m system

test-all: lint every-test

every-test: .venv/ready
	$(PYTEST)

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
	$(BIN)/python tests/benchmarks/checkpoint_pause.py

bench-faults: .venv/ready
	$(BIN)/python tests/benchmarks/faults.py

bench-nodes: .venv/ready
	$(BIN)/python tests/benchmarks/node_faults.py

chaos: .venv/ready
	$(BIN)/python tests/benchmarks/chaos.py

bench-towers: .venv/ready
	$(BIN)/python tests/benchmarks/towers.py

bench-emm: .venv/ready
	$(BIN)/python tests/benchmarks/emm_tables.py

bench-evaluate: .venv/ready
	$(BIN)/python tests/benchmarks/evaluate.py

bench-serve: .venv/ready .venv/rechub
	$(BIN)/python tests/benchmarks/serving.py

bench-ingest: .venv/ready
	$(BIN)/python tests/benchmarks/ingest.py
	$(BIN)/python tests/benchmarks/ingest_workers.py

bench-gpu: .venv/ready
	$(BIN)/python tests/benchmarks/gpu.py runs/gpu

bench-intervals: .venv/ready
	$(BIN)/python tests/benchmarks/intervals.py

bench-search: .venv/ready
	$(BIN)/python tests/benchmarks/search_step.py

bench-links: .venv/ready
	$(BIN)/python tests/benchmarks/links.py

bench-loader: .venv/ready
	$(BIN)/python tests/benchmarks/loading.py

bench-store: .venv/ready
	$(BIN)/python tests/benchmarks/store_loading.py

bench-planted: .venv/ready
	$(BIN)/python tests/benchmarks/planted.py

census: .venv/ready
	$(BIN)/python -m jobs.compare

# Every file that is downloaded has its sha256 in one of these, the tools that build included; nothing else is installed. Torch comes
# first: PyTorch's own CPU build from an index that has it, or else PyPI's build with the libraries of CUDA, which runs on a CPU too.
REQUIREMENTS := $(foreach name,build torch-cpu cuda cpu test,requirements-$(name).txt)

.venv/ready: $(REQUIREMENTS) pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no python3.11, python3.12 or python3.13 runs: install one, or name it with PYTHON=" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --require-hashes --no-deps -r requirements-build.txt
	$(PINNED) -r requirements-torch-cpu.txt || { echo "This index has no CPU build of torch: installing PyPI's, some gigabytes." >&2; \
		$(PINNED) -r requirements-cuda.txt; }
	$(PINNED) -r requirements-cpu.txt -r requirements-test.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

# Contenders of bench-train and bench-serve, outside of the environment that is measured.
.venv/rechub: .venv/ready tests/benchmarks/requirements.txt
	$(PINNED) --target $@ -r tests/benchmarks/requirements.txt
	touch $@

# Writes the requirements from pyproject.toml with uv. Versions stay unless pyproject.toml forbids them;
# LOCK=--upgrade renews all, LOCK='--upgrade-package NAME' one. What one file lists, no later one changes or repeats.
UV ?= uv
LOCK ?=
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock' $(LOCK)
OMIT = sed -nE 's/^($(1))==.*/--no-emit-package \1/p' requirements-gpu.txt requirements-cpu.txt

lock:
	$(COMPILE) pyproject.toml --extra s3 --extra serve -o requirements-gpu.txt
	awk '/^[a-z]/ {cuda = /^(cuda|nvidia|torch==|triton)/} /^#/ || cuda' requirements-gpu.txt > requirements-cuda.txt
	$(COMPILE) pyproject.toml --extra s3 --extra serve --extra cpu -c requirements-gpu.txt \
		$$($(call OMIT,(cuda|nvidia|triton)[a-z0-9-]*|fbgemm-gpu|torch)) -o requirements-cpu.txt
	sed '/^#/d; s/+cpu//' requirements-torch-cpu.txt >> requirements-cpu.txt
	$(COMPILE) pyproject.toml --extra s3 --extra serve --extra cpu --extra test -c requirements-gpu.txt -c requirements-cpu.txt \
		$$($(call OMIT,[a-z0-9-]+)) -o requirements-test.txt
	$(COMPILE) pyproject.toml --extra s3 --extra serve --extra cpu --extra bench -c requirements-gpu.txt -c requirements-cpu.txt \
		$$($(call OMIT,[a-z0-9-]+)) -o tests/benchmarks/requirements.txt
	printf '%s\n' pip 'setuptools>=77' | $(COMPILE) - -c requirements-gpu.txt -o requirements-build.txt

clean:
	rm -rf .venv runs
