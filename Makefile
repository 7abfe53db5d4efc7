# Arriero: `make help` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# What pip installs as torch. On machines without a GPU, TORCH_INDEX_URL with
# PyTorch's CPU index saves gigabytes.
TORCH ?= torch==2.13.0
TORCH_INDEX_URL ?=
# More CMake flags for llama.cpp: -DGGML_CUDA=ON, -DGGML_METAL=ON, -DGGML_AVX512=ON ...
LLAMA_CMAKE_ARGS ?=
LLAMA_CPP_PYTHON := 0.3.36
JOBS ?= 2
PYTEST_ARGS ?=
# Options of `make bench`.
ARGS ?=

# On a terminal pip shows its bars; elsewhere it would fill the log.
PIP_INSTALL = $(BIN)/python -m pip install $$([ -t 2 ] || echo --quiet)

BIN := $(VENV)/bin
STAMP := $(VENV)/.arriero-setup
export LLAMA_CMAKE_ARGS

.PHONY: help setup demo test verify lint types imports chart protos proto-lint format bench images images-smoke kube-play kube-api e2e clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  \033[1m%-12s\033[0m %s\n", $$1, $$2}'

setup: $(STAMP) ## Make the virtual environment and build llama.cpp (once)

$(STAMP): pyproject.toml constraints.txt docker/build_llama.py
	@$(PYTHON) docker/check_tools.py
	@echo "[1/4] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --upgrade pip setuptools
	@echo "[2/4] torch ($(TORCH)); the largest download"
	@$(PIP_INSTALL) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	@echo "[3/4] llama.cpp"
	@$(BIN)/python docker/build_llama.py --python $(BIN)/python --version $(LLAMA_CPP_PYTHON)
	@echo "[4/4] Arriero and what it needs"
	@$(PIP_INSTALL) --constraint constraints.txt --editable ".[all,dev]"
	@touch $@
	@echo "Set up. Activate with: source $(BIN)/activate"

demo: $(STAMP) ## From raw data to a served, fine-tuned model, on this machine
	@$(BIN)/python examples/faq/demo.py

test: $(STAMP) ## Run every test
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

verify: $(STAMP) lint types imports proto-lint chart ## Run every check that is not a test

lint: $(STAMP) ## Check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP) ## Check types (mypy, strict)
	@$(BIN)/mypy

imports: $(STAMP) ## Check who imports whom
	@PYTHONPATH=services $(BIN)/lint-imports

proto-lint: $(STAMP) ## Lint the protos
	@cd protos && $(abspath $(BIN))/buf lint && $(abspath $(BIN))/buf format --diff --exit-code --path arriero > /dev/null

chart: $(STAMP) ## Check the Helm chart (a helm of its own is fetched where there is none)
	@PYTHONPATH=services $(BIN)/python deploy/helm/verify.py

protos: $(STAMP) ## Generate the code in services/arriero/v1
	@$(BIN)/python protos/generate.py services

format: $(STAMP) ## Rewrite code and protos in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@cd protos && $(abspath $(BIN))/buf format -w --path arriero

bench: $(STAMP) ## Run one benchmark: make bench BENCH=pipeline ARGS="--help"
	@test -n "$(BENCH)" || { echo "Which? make bench BENCH=<name>; there are: $(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))"; exit 2; }
	@$(BIN)/python benchmarks/$(BENCH).py $(ARGS)

images: ## Build the container images (docker, podman or buildah: docker/images.sh)
	@TORCH_INDEX_URL="$(TORCH_INDEX_URL)" docker/images.sh $(IMAGES)

images-smoke: ## Do in each image what it is for, with a tiny model
	@docker/smoke.sh $(IMAGES)

e2e: $(STAMP) ## Install, hurt and remove a release on a real cluster (tests/e2e/test_cluster.py says with what)
	@test -n "$(ARRIERO_E2E_KUBECONFIG)" || { echo "Which cluster? make e2e ARRIERO_E2E_KUBECONFIG=... ARRIERO_E2E_REGISTRY=... ARRIERO_E2E_TAG=..."; exit 2; }
	@ARRIERO_E2E_KUBECONFIG="$(ARRIERO_E2E_KUBECONFIG)" ARRIERO_E2E_REGISTRY="$(ARRIERO_E2E_REGISTRY)" ARRIERO_E2E_TAG="$(ARRIERO_E2E_TAG)" $(BIN)/python -m pytest -x tests/e2e/test_cluster.py

kube-play: $(STAMP) ## Start the chart's pods, of its default values and over S3, with podman (tests/e2e/test_podman_play.py)
	@ARRIERO_PLAY_REGISTRY="$${ARRIERO_PLAY_REGISTRY:-localhost}" $(BIN)/python -m pytest -x tests/e2e/test_podman_play.py

kube-api: $(STAMP) ## Meet a real API server, controllers and scheduler (ARRIERO_KUBE_BIN names their directory)
	@test -n "$(ARRIERO_KUBE_BIN)" || { echo "Which programs? make kube-api ARRIERO_KUBE_BIN=<directory of etcd, kube-apiserver, kube-controller-manager, kube-scheduler>"; exit 2; }
	@ARRIERO_KUBE_BIN="$(ARRIERO_KUBE_BIN)" $(BIN)/python -m pytest tests/e2e/test_api_server.py tests/unit/operations/test_cluster_jobs.py

clean: ## Remove what set-up made (the wheel of llama.cpp stays cached)
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
