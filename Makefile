# `make demo` and `make test` are all that a new user needs; both install first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= data/demo
RUNS ?= runs/demo
FUZZ_INPUTS ?= 10000000
FUZZ_SEED ?= 1
TORTURE ?= torture.jsonl

.PHONY: help install demo test test-fast test-gpu torture fuzz gpu-check lint format peers clean

help: ## list what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(BIN)/.installed ## create .venv and install everything, in the tested versions

$(BIN)/.installed: pyproject.toml constraints.txt $(wildcard shards/kernels/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; set PYTHON=python3.11 or newer" >&2; exit 1; }
	@# pip says `No space left on device` after minutes, and names neither the place nor the need.
	@test -e $(VENV) || { at="$$(realpath -m $(VENV))"; until [ -e "$$at" ]; do at="$$(dirname "$$at")"; done; df -Pk "$$at"; } | awk -v venv=$(VENV) 'END { if ($$4 < 8 * 2 ^ 20) { printf "error: %s needs 8 GiB and its disk has %.1f GiB left; make room, or set VENV to a folder on another disk\n", venv, $$4 / 2 ^ 20; exit 1 } }' >&2
	@# Where Debian's python3-venv is missing, a venv is left that has a python and no pip.
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@# Where there is no compiler any more, kernels of older sources would stay.
	find shards/kernels -maxdepth 1 -name '_kernels.*.so' '(' $(foreach source,$(wildcard shards/kernels/*.[ch]),! -newer $(source) -o) -false ')' -delete
	touch $@

demo: install ## synthetic lesions → shards → a 2 × 2 study → report, under 4 minutes on 2 cores
	rm -rf $(DEMO) $(RUNS)
	$(BIN)/python -m preprocess.synthetic --out $(DEMO)/raw --images 700
	$(BIN)/python -m preprocess.shard --source $(DEMO)/raw --out $(DEMO)/shards --max-resolution 128
	$(BIN)/python -m train.grid --data $(DEMO)/shards --out $(RUNS) --models resnet18,alexnet --fractions 0.25,1 --seeds 0 --epochs 8 --resolution 64 --batch-size 32
	$(BIN)/python -m train.report $(RUNS)

test: install ## every test that runs without a GPU, about 20 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu' -n 2 --dist worksteal

test-fast: install ## without those marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu and not slow' -n 2 --dist worksteal

test-gpu: install ## only those that need a CUDA device
	$(BIN)/python -m pytest -m gpu

torture: install ## kills, full disks, damaged input …, hundreds of times; appends its counts to $(TORTURE)
	DERMSCALE_TORTURE=$(abspath $(TORTURE)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/torture

fuzz: install ## FUZZ_INPUTS damaged inputs to the C code under sanitizers: 10 million, half an hour on 2 cores
	$(BIN)/python -m tests.fuzz.run --inputs $(FUZZ_INPUTS) --seed $(FUZZ_SEED)

gpu-check: install ## check everything on this machine's GPU, ten minutes; writes benchmarks/results/gpu/<gpu>.json
	$(BIN)/python -m benchmarks.gpu_check

peers: ## the loaders that benchmarks compare with, in .venv-peers (needs system packages, which it names)
	bash benchmarks/install_peers.sh .venv-peers

lint: install ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the demo made
	rm -rf $(DEMO) $(RUNS)
