# Every target does its own set-up in .venv. `make train` is the main job, `make test` the proof.

PYTHON ?= python3
VENV ?= .venv
SIZE ?= 0.1b
ARGS ?=
BIN = $(VENV)/bin

# jax's CUDA plugin by the driver that is here: cuda13 for drivers from 580 on, cuda12 before, none
# without a driver.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)
CUDA := $(if $(DRIVER),$(shell [ "$(DRIVER)" -ge 580 ] && echo cuda13 || echo cuda12))
comma := ,

.PHONY: train test lint clean

train: $(VENV)/.installed
	$(BIN)/python -m rwkv_jax.train --size $(SIZE) $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.installed: pyproject.toml
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.$(if $(CUDA),[$(CUDA)])'
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev$(if $(CUDA),$(comma)$(CUDA))]'
	touch $@ $(VENV)/.installed
