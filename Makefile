# Fourstep: the commands of this repository.  `make` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The release that the tests use.  Its file depends on the index that pip is told to use (CPU or CUDA build),
# so it is pinned by version here and every other package by hash in locks/.
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

PROMPT ?= a red circle moves left on a black background
OUT    ?= outputs
WORKERS ?= $(shell env -u OMP_NUM_THREADS nproc)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-score demo-train test lint format locks clean
.PHONY: image test-image test-torch compatibility bench-gpu

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.runtime: locks/cpu.txt pyproject.toml
	@echo "Setting up $(VENV) (once; about a minute) ..." >&2
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; install it and run make again." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --require-hashes -r locks/cpu.txt
	@$(PIP) install $(TORCH)
	@PYTHONWARNINGS=ignore $(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime locks/dev.txt
	@echo "Adding the test tools ..." >&2
	@$(PIP) install --require-hashes -r locks/dev.txt
	@touch $@

setup: $(VENV)/.runtime  ## virtual environment with the pinned dependencies

demo: $(VENV)/.runtime  ## make a video from the demo checkpoint that is in this repository (PROMPT="...")
	@mkdir -p $(OUT)
	@$(BIN)/t2v generate --model demo --device cpu --prompt "$(PROMPT)" --output $(OUT)/demo.mp4 --overwrite --contact-sheet

demo-score: $(VENV)/.runtime  ## score the demo on combinations it was not trained on, minutes on a CPU (ATTENTION=cudnn-fp8)
ifdef ATTENTION
	@$(BIN)/python -m demo.quality --attention $(ATTENTION) --variant bf16
	@$(BIN)/python -m demo.quality --attention $(ATTENTION) --variant fp8
else
	@$(BIN)/python -m demo.evaluate --variant bf16 --prompts 108 --at-least 0.90
	@$(BIN)/python -m demo.evaluate --variant fp8 --prompts 108 --at-least 0.88
	@$(BIN)/python -m demo.evaluate --variant int8 --prompts 108 --at-least 0.88
endif

demo-train: $(VENV)/.runtime  ## train the demo checkpoint again: 20 minutes on an H200 (docs/demo.md)
	$(BIN)/python -m demo.train --out demo/weights

# WEIGHTS=DIR keeps the random weights, or has others; BENCH="..." asks for something else; GPU_PYTHON=FILE is
# the interpreter of another environment, with a CUDA build of torch.
BENCH ?= --formats fp8,int8,bf16 --sizes 480x832x81,720x1280x81

bench-gpu: $(if $(GPU_PYTHON),,$(VENV)/.runtime)  ## measure this GPU, full size, random weights: table and OUT/bench.json (docs/bench.md)
	@mkdir -p $(OUT)
	@$(or $(GPU_PYTHON),$(BIN)/python) -m entrypoint bench --device cuda --json $(OUT)/bench.json $(if $(WEIGHTS),--weights $(WEIGHTS)) $(BENCH)

test: $(VENV)/.dev  ## every test that needs no GPU
	$(BIN)/python -m pytest -n $(WORKERS) tests/unit tests/parity

lint: $(VENV)/.dev  ## ruff, format check and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# TAG=cu124 or cu128; SAGE=off leaves SageAttention out; PYTHON_IMAGE and DOCKER_FLAGS reach `docker build`.
TAG ?= cu128
DOCKER ?= docker
IMAGE = fourstep:$(TAG)
BUILD_ARGS = $(foreach name,PYTHON_IMAGE SAGE Q8 MAX_JOBS,$(if $($(name)),--build-arg $(name)=$($(name))))

image:  ## build the image TAG=cu124 or cu128 (docs/docker.md)
	DOCKER_BUILDKIT=1 $(DOCKER) build --file Dockerfile.$(TAG) --tag $(IMAGE) $(BUILD_ARGS) $(DOCKER_FLAGS) \
	  --build-arg VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
	  --build-arg REVISION=$$(git describe --always --dirty --abbrev=40 '--exclude=*') \
	  --build-arg SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) .

test-image: $(VENV)/.dev  ## run the image TAG from outside: sizes, rights, signals, refusals (after make image)
	IMAGE=$(IMAGE) $(BIN)/python -m pytest tests/image -rs

# The images' releases of torch, from the images' locks, on this machine's CPU.
TORCH_LOCK_2.6.0 = cu124
TORCH_LOCK_2.8.0 = cu128
RELEASE = $(patsubst torch==%,%,$(TORCH))
RELEASE_VENV = build/torch-$(RELEASE)

test-torch:  ## the unit tests under an image's torch: make test-torch TORCH=2.6.0 or 2.8.0 (5 GB in build/)
	@test -n "$(TORCH_LOCK_$(RELEASE))" || { echo "TORCH is $(RELEASE); expected 2.6.0 or 2.8.0, the images' own." >&2; exit 2; }
	@test -x $(RELEASE_VENV)/bin/python || $(PYTHON) -m venv $(RELEASE_VENV)
	@$(RELEASE_VENV)/bin/pip --disable-pip-version-check --quiet install --no-deps --require-hashes -r locks/$(TORCH_LOCK_$(RELEASE)).txt
	@$(RELEASE_VENV)/bin/pip --disable-pip-version-check --quiet install --no-deps --require-hashes -r locks/test.txt
	@$(RELEASE_VENV)/bin/pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation -e .
	CUDA_VISIBLE_DEVICES= $(RELEASE_VENV)/bin/python -m pytest -n $(WORKERS) -p no:cacheprovider tests/unit

compatibility: $(VENV)/.runtime  ## write docs/compatibility.md from profiles/images.yaml
	@$(BIN)/python docker/compatibility.py

locks: $(VENV)/.dev  ## resolve locks/ again from pyproject.toml
	@./locks/compile.sh

clean:  ## remove the virtual environment and the caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
