# One environment for everything, made on first use and renewed when what it is made from changes.
#
#   make serve PORT=9000 ARGS="--max-rows 16"     VENV=/path and PYTHON=python3.12 choose environment and interpreter

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
TEST_WORKERS ?= 2
IMAGE ?= blockserve
CLIENTS ?= $(HOME)/.cache/blockserve/clients
REQUESTS ?= 1000
BASE ?= docker.io/library/debian:bookworm-slim

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
RUNTIME := $(VENV)/.blockserve-runtime
DEV := $(VENV)/.blockserve-dev
SOURCES := server engine kernels training benchmarks tests docs

.DEFAULT_GOAL := help
.PHONY: help serve test lint format unit test-clients test-schema docs bench bench-engine soak model-card image clean

help: ## This list
	@sed -n 's/^\([a-z%-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

serve: $(RUNTIME) ## Install what serving needs and serve the embedded model on PORT (8000)
	exec $(BIN)/blockserve serve --host $(HOST) --port $(PORT) $(ARGS)

test: lint unit ## Install what the tests need and run every check

lint: $(DEV) ## Style, types and import contracts
	$(BIN)/ruff check --quiet $(SOURCES)
	$(BIN)/ruff format --quiet --check $(SOURCES) || { $(BIN)/ruff format --check $(SOURCES); exit 1; }
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-logo

unit: $(DEV) ## The tests alone
	$(BIN)/python -m pytest -n $(TEST_WORKERS) $(ARGS)

test-clients: $(DEV) ## Real clients in environments of their own, in CLIENTS (ARGS="--only litellm --log docs/client-tests.txt")
	$(BIN)/python -m tests.clients.run --home $(CLIENTS) $(ARGS)

test-schema: $(DEV) ## REQUESTS made by schemathesis (ARGS="--log docs/schema-tests.txt")
	$(BIN)/python -m tests.clients.schema --home $(CLIENTS) --requests $(REQUESTS) $(ARGS)

format: $(DEV) ## Put the source in its standard form
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(DEV) ## Write the generated parts of the documentation
	$(BIN)/python -m docs.generate

bench: $(DEV) ## Measure a server with the embedded model (ARGS="--device cuda --dtype bfloat16")
	$(BIN)/python -m benchmarks.server $(ARGS)

bench-engine: $(DEV) ## Measure the engine alone on a GPU (ARGS="--models block-302M --workloads P D")
	$(BIN)/python -m benchmarks.engine $(ARGS)

bench-%: $(DEV) ## Measure on a GPU one of kernels, mixed, latency, startup, rescore, front_end_scale, several_engines, hostile_clients
	$(BIN)/python -m benchmarks.$* $(ARGS)

soak: $(DEV) ## Load a server at random, kill its engine, look for leaks (ARGS="--minutes 8 --device cuda")
	$(BIN)/python -m benchmarks.soak $(ARGS)

model-card: $(DEV) ## Write the embedded model's card from its run (ARGS="--date YYYY-MM-DD")
	$(BIN)/python -m training.card --model engine/default_model --run training/default_run $(ARGS)

image: ## Build the container IMAGE on BASE with buildah, without a daemon (ARGS are buildah's)
	@# In this format an image keeps its health check.
	buildah build --format docker --build-arg BASE=$(BASE) --tag $(IMAGE) $(ARGS) .

clean: ## Remove the environment and what tools left behind
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@echo "making an environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing blockserve in $(VENV) (minutes the first time)"
	@$(PIP) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing blockserve and its development tools in $(VENV) (minutes the first time)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(RUNTIME)
