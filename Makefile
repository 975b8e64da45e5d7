# Everything runs from here: `make demo` runs the main job, `make test` the tests.
# AWARENESS_HOME says where models, anchors and W-Matrices live (default ~/.cache/awareness).

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.install-stamp

# Without bytecode every process of every server would compile torch and vLLM anew: minutes in all.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install models anchors browser registry demo test unit engine nightly families gpu lint lock clean

help:
	@echo "make demo | test | unit | engine | nightly | families | gpu | lint | lock | install | models | anchors | browser | registry | clean"

$(STAMP): requirements.lock pyproject.toml demo/pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; set PYTHON to a Python 3.11"; exit 1; }
	@echo "[install 1/3] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[install 2/3] torch, vLLM for CPU, transformers, test tools, by their hashes (some minutes)"
	@# Python compiles what it imports; all of it would take a minute more, on two cores.
	@$(PIP) install --no-deps --no-compile --require-hashes -r requirements.lock
	@echo "[install 3/3] this project"
	@$(PIP) install --no-deps --no-build-isolation -e . -e demo
	@touch $@

install: $(STAMP)

models: $(STAMP)
	@echo "[models] both models, and the maps between them: about a minute the first time"
	@$(BIN)/python -m awareness_demo.models
	@$(BIN)/python -m awareness_demo.wmatrices

anchors: $(STAMP)
	@echo "[anchors] about 30 s the first time"
	@$(BIN)/python -m awareness_demo.anchors

demo: $(STAMP) models
	@$(BIN)/python examples/quickstart.py

# What the tests need of Debian: a browser for the page, a registry for memories that travel.
# $(call debian,COMMAND,PACKAGES)
define debian
	@command -v $(1) >/dev/null || { \
	  echo "[$@] installing $(1) with apt-get"; \
	  if [ "$$(id -u)" != 0 ]; then echo "$(1) is not installed: run 'apt-get install $(2)' as root"; exit 1; fi; \
	  install="apt-get -qq install -y --no-install-recommends $(2)"; \
	  $$install >/dev/null || { apt-get -qq update && $$install >/dev/null; } || \
	    { echo "$(1) cannot be installed with apt-get: install it by other means and have it on the PATH"; exit 1; }; \
	}
endef

browser:
	$(call debian,chromium,chromium chromium-sandbox)

registry:
	$(call debian,docker-registry,docker-registry)

# Two processes for what needs no engine, of one thread each: of two, they would wait for each other.
# Neither imports the other folders' files and what those import.
UNIT := $(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/engine --ignore=tests/browser
ENGINE := $(BIN)/python -m pytest

# All of it even where one part fails; the status is the first failure's. An engine's start keeps one
# core busy for half a minute: what starts none runs beside, in the time that is left over.
test: $(STAMP) models anchors browser registry
	@log=$$(mktemp); status=0; \
	OMP_NUM_THREADS=1 setsid nice -n 19 sh -c '$(ENGINE) -m "beside and not nightly"; beside=$$?; \
	  $(UNIT) -m "unit and not nightly" && exit $$beside' >$$log 2>&1 & rest=$$!; \
	trap 'kill -- -$$rest 2>/dev/null; rm -f $$log' EXIT; trap 'exit 130' INT TERM; \
	$(ENGINE) -m "(engine or browser) and not beside and not nightly" || status=$$?; \
	wait $$rest || { last=$$?; [ $$status != 0 ] || status=$$last; }; \
	cat $$log; exit $$status

unit: $(STAMP)
	@OMP_NUM_THREADS=1 $(UNIT) -m "unit and not slow and not nightly"

engine: $(STAMP) models anchors registry
	@$(ENGINE) -m "engine and not nightly"

nightly: $(STAMP) models anchors registry
	@echo "[nightly] the default fit and its floors, every family, the benchmarks' own tests: some 30 minutes"
	@$(ENGINE) -m nightly

families: $(STAMP)
	@echo "[families] every family that vLLM serves, a tiny model each: some minutes"
	@$(BIN)/python -m pytest tests/engine/test_families.py

gpu: $(STAMP)
	@PYTHON=$(BIN)/python benchmarks/gpu.sh

# What pip resolves today, with the versions of now: `make lock UPGRADE="NAME …"` lets some move.
lock:
	@$(PYTHON) -m venv build/lock
	@build/lock/bin/python tests/lock.py $(if $(UPGRADE),--upgrade $(UPGRADE))

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@echo "models, anchors and W-Matrices stay in AWARENESS_HOME"
