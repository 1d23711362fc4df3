# Every target sets up .venv itself. `make train [SIZE=0.1b] [ARGS=…]` trains, `make test` runs the
# tests, `make test-fast` those not marked slow, `make docs` writes the API reference to build/docs.
# ARGS is added to the command: `make test ARGS="-k resume -x"`. `make format` writes what `make lint`
# checks.

PYTHON ?= python3
VENV ?= .venv
SIZE ?=
ARGS ?=
OUT ?= out/gpu
BIN = $(VENV)/bin

# jax's CUDA plugin for the installed driver: cuda13 from driver 580 on, cuda12 before, none without
# a driver.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -oE '^[0-9]+' | head -n 1)
CUDA := $(if $(DRIVER),$(shell [ "$(DRIVER)" -ge 580 ] && echo cuda13 || echo cuda12))
comma := ,

# A stamp is named after the plugin, so a changed driver causes a new installation.
INSTALLED = $(VENV)/.installed-$(or $(CUDA),cpu)

# With SETUP=0 the gpu- targets install nothing and run under PYTHON, as it is.
SETUP ?= 1
PY = $(if $(filter 0,$(SETUP)),$(PYTHON),$(BIN)/python)
SET_UP = $(if $(filter 0,$(SETUP)),,$(INSTALLED)-dev)

.PHONY: train test test-fast gpu-test gpu-report format lint docs clean

# On a CPU, large pages under XLA's buffers save a tenth of a step (glibc; ignored elsewhere).
train: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
train: $(INSTALLED)
	$(BIN)/python -m rwkv_jax.train $(if $(SIZE),--size $(SIZE)) $(ARGS)

# worksteal: most tests of a file stay in one process, which makes its fixtures and programs once.
test test-fast: $(INSTALLED)-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(if $(filter test-fast,$@),-m "not slow") $(ARGS)

# On a machine with a GPU, each stage under a limit, the results in OUT whatever happens: the kernels'
# suite and their benchmark in eight minutes; those, the training step and its profile in nine.
gpu-test: $(SET_UP)
	$(PY) -m benchmarks.gpu_report --stages suite wkv7 --limit 480 --output $(OUT) $(ARGS)

gpu-report: $(SET_UP)
	$(PY) -m benchmarks.gpu_report --output $(OUT) $(ARGS)

format: $(INSTALLED)-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(INSTALLED)-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)-dev
	$(BIN)/pdoc --docformat google --math --output-directory build/docs rwkv_jax pallas_kernels

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache

$(INSTALLED): pyproject.toml
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.$(if $(CUDA),[$(CUDA)])'
	touch $@

$(INSTALLED)-dev: pyproject.toml
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev$(if $(CUDA),$(comma)$(CUDA))]'
	touch $(INSTALLED) $@
