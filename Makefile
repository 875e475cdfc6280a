# xattn: every table and figure of the paper from one command. `make` alone prints what there is to do.

PROFILE ?= mini
TORCH ?=
JUPYTER ?=
WORKERS ?=
export WORKERS
# The C library keeps freed memory for the next batch: a third to a quarter faster (see xattn/workers.py).
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3 python

PROFILES := $(sort $(basename $(notdir $(wildcard notebooks/profiles/*.yaml))))
ifneq (1 $(PROFILE),$(words $(PROFILE)) $(filter $(PROFILE),$(PROFILES)))
$(error There is no profile '$(PROFILE)' in notebooks/profiles; choose PROFILE from: $(PROFILES))
endif

# The active environment is used where it holds exactly the locked versions; .venv otherwise.
HOLDS_LOCK := import sys; from importlib.metadata import version; \
  pins = [line.strip().split("==") for line in open("requirements.txt") if line[0].isalpha()]; \
  sys.exit(sys.version_info < (3, 11) or any(version(name).split("+")[0] != pin for name, pin in pins))
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
ifneq ($(ACTIVE),)
ACTIVE := $(shell "$(ACTIVE)/bin/python" -c '$(HOLDS_LOCK)' 2>/dev/null && echo "$(ACTIVE)")
endif
PY := $(or $(ACTIVE),.venv)/bin/python
READY := $(if $(ACTIVE),,.venv/.ready)

IS_RECENT := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
RECENT = $(shell for python in $(PYTHON); do "$$python" -c '$(IS_RECENT)' 2>/dev/null && echo "$$python" && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup dry reproduce verify accept test bench faults lab data train clean

help:  ## what there is to do (this text)
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PROFILE=$(PROFILE)    what to reproduce; one of: $(PROFILES)"
	@echo "  WORKERS=        explain utterances on a number of processes, a Dask scheduler (tcp://...) or SLURM (slurm:8)"
	@echo "  TORCH=          arguments of pip for another build of torch, at the first set-up: TORCH=\"--index-url ...\""
	@echo "  JUPYTER=        arguments of JupyterLab, at make lab: JUPYTER=\"--no-browser --port 8888\""
	@echo "  PYTHON=         the Python 3.11 or newer to set up .venv with, where the one found is not the one wanted"

setup: $(READY)  ## the environment: .venv with the locked versions, unless one that holds them is active
	@"$(PY)" -c 'import sys; from importlib.metadata import version; \
	  print(sys.prefix, "is ready: Python", sys.version.split()[0] + ", torch", version("torch"))'
	$(if $(READY),@echo "To change torch's build: remove .venv and call make setup TORCH=... again.")

.venv/.ready: requirements.txt
	$(if $(RECENT),,$(error xattn needs Python 3.11 or newer with its venv module, and found none among: $(PYTHON); \
	  install one, or name it with PYTHON=path))
	@echo "Setting up .venv: downloads the packages of requirements.txt, once; 2 GB with torch for the CPU, a few minutes."
	@.venv/bin/python -c '$(IS_RECENT)' 2>/dev/null || "$(RECENT)" -m venv --clear .venv
	@.venv/bin/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' requirements.txt)" $(TORCH)
	@.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

dry: $(READY)  ## what make reproduce would run, and about how long and how large the maps would be
	@"$(PY)" -m xattn.reproduce notebooks/profiles/$(PROFILE).yaml --dry-run

reproduce: $(READY)  ## every table and figure of PROFILE, to figures/PROFILE; a second call does only what changed
	@"$(PY)" -m xattn.reproduce notebooks/profiles/$(PROFILE).yaml

# Both profiles that take minutes, unless one is named.
CHECKED := $(if $(filter command environment,$(firstword $(origin PROFILE))),$(PROFILE),smoke mini)

verify: $(READY)  ## the committed numbers of smoke and mini, or of PROFILE, against a fresh run in figures/fresh
	@"$(PY)" -m xattn.verify $(CHECKED:%=notebooks/profiles/%.yaml)

accept: $(READY)  ## renews the committed numbers of smoke and mini, or of PROFILE, from a fresh run, on purpose
	@"$(PY)" -m xattn.verify --accept $(CHECKED:%=notebooks/profiles/%.yaml)

test: $(READY)  ## lint, format and tests
	@"$(PY)" -m ruff check
	@"$(PY)" -m ruff format --check
	@"$(PY)" -m pytest -q

bench: $(READY)  ## speed and memory as ratios, to benchmarks/results
	@"$(PY)" -m benchmarks.bench

faults: $(READY)  ## a run of PROFILE killed at 50 random moments, against an undisturbed one
	@"$(PY)" -m benchmarks.faults 50 --profile $(PROFILE)

# Kernels start in this folder, as under `make reproduce`, so that the notebooks' relative paths mean the same.
lab: $(READY)  ## JupyterLab on the notebooks
	@mkdir -p figures/lab
	@"$(PY)" -m jupyterlab --ServerApp.root_dir=notebooks --MappingKernelManager.root_dir="$(CURDIR)" $(JUPYTER)

data: $(READY)  ## the mini corpus, synthesised again
	@"$(PY)" -m recipes.make_corpus --data data

train: $(READY)  ## the mini models, trained again
	@"$(PY)" -m recipes.train
	@"$(PY)" -m recipes.card

clean:  ## removes the executed notebooks, maps and fresh runs of PROFILE, nothing else
	rm -rf figures/$(PROFILE)/notebooks figures/$(PROFILE)/maps figures/fresh/$(PROFILE)
