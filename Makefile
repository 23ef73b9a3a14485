# One command each; `make help` lists them. Everything happens in .venv, which the first target that needs it creates.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help run test test-slow check format bench deb wheel train docs lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# Pinned versions with hashes for everything; then this project itself, which has none.
define install
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(1) into $(VENV) …" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(1)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
endef

$(VENV)/.cpu: requirements/cpu.txt pyproject.toml
	$(call install,requirements/cpu.txt)

$(VENV)/.dev: constraints.txt pyproject.toml
	$(call install,constraints.txt)
	@touch $(VENV)/.cpu

run: $(VENV)/.cpu ## install what is needed and serve the example models (ARGS="--set http.port=9000")
	@exec $(BIN)/appliance serve $(ARGS)

test: $(VENV)/.dev ## the tests, without the slow ones (ARGS="-k batcher")
	@$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.dev ## all tests
	@$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

check: $(VENV)/.dev ## lint, format, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }
	@echo "check: good"

format: $(VENV)/.dev ## rewrite the code in the project's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## measure against the limits of this machine (ARGS="--quick")
	@$(BIN)/python tools/bench.py $(ARGS)

deb: $(VENV)/.dev ## build the Debian package into dist/ (wheels once with a network, then offline and bit by bit the same)
	@$(BIN)/python tools/distribution/build_deb.py $(ARGS)

wheel: $(VENV)/.dev ## build the wheel and the source archive into dist/
	@$(BIN)/python tools/distribution/build_wheel.py

train: ## train the example model anew, in an environment of its own (.venv-train)
	@test -x .venv-train/bin/python || $(PYTHON) -m venv .venv-train
	@.venv-train/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/torch.txt
	@.venv-train/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/train.txt
	@.venv-train/bin/python tools/train_digits.py --overwrite $(ARGS)

docs: $(VENV)/.cpu ## rewrite the generated pages
	@$(BIN)/appliance config docs > docs/configuration.md
	@$(BIN)/python -m tools.metrics_docs

lock: $(VENV)/.dev ## pin versions anew (needs uv)
	@tools/lock

clean: ## remove what the other targets made
	@rm -rf $(VENV) .venv-train .venv-interop build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
