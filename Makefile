# xattn: every table and figure of the paper from one command. `make` alone lists the targets.

PROFILE ?= mini
TORCH ?=
JUPYTER ?=
WORKERS ?=
export WORKERS
# xattn/workers.py has the same values and says what they are for.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824
export GOMP_SPINCOUNT ?= 1000
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3 python

PROFILES := $(sort $(basename $(notdir $(wildcard notebooks/profiles/*.yaml))))
ifneq (1 $(PROFILE),$(words $(PROFILE)) $(filter $(PROFILE),$(PROFILES)))
$(error There is no profile '$(PROFILE)' in notebooks/profiles; choose PROFILE from: $(PROFILES))
endif

# Use the active environment if it has exactly the locked versions, and .venv otherwise.
HOLDS_LOCK := import sys; from importlib.metadata import version; \
  pins = [line.strip().split("==") for line in open("requirements.txt") if line[0].isalpha()]; \
  sys.exit(sys.version_info < (3, 11) or any(version(name).split("+")[0] != pin for name, pin in pins))
# Names of folders can hold dollars and quotes, so the shell takes them from its environment.
ACTIVE := $(or $(value VIRTUAL_ENV),$(value CONDA_PREFIX))
ifneq ($(ACTIVE),)
HOLDS := $(shell "$${VIRTUAL_ENV:-$$CONDA_PREFIX}/bin/python" -c '$(HOLDS_LOCK)' 2>/dev/null && echo yes)
ACTIVE := $(if $(HOLDS),$(ACTIVE))
endif
export PY := $(or $(ACTIVE),.venv)/bin/python
READY := $(if $(ACTIVE),,.venv/.ready)

IS_RECENT := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
RECENT = $(shell for python in $(PYTHON); do "$$python" -c '$(IS_RECENT)' 2>/dev/null && echo "$$python" && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup dry reproduce report verify accept test bench faults lab data train train-regularised clean

help:  ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PROFILE=$(PROFILE)    the profile to run; one of: $(PROFILES)"
	@echo "  WORKERS=        where utterances are explained: processes (2), Dask (tcp://host:8786) or SLURM (slurm:8)"
	@echo "  TORCH=          arguments of pip for another build of torch, for the first set-up: TORCH=\"--index-url ...\""
	@echo "  JUPYTER=        arguments of JupyterLab, for make lab: JUPYTER=\"--no-browser --port 8888\""
	@echo "  PYTHON=         the Python (3.11 or newer) for .venv, if the one found is not the one you want"

setup: $(READY)  ## create .venv with the locked versions, unless the active environment has them
	@"$$PY" -c 'import sys; from importlib.metadata import version; \
	  print(sys.prefix, "is ready: Python", sys.version.split()[0] + ", torch", version("torch"))'
	$(if $(READY),@echo "To get another build of torch: delete .venv; then make setup TORCH=...")

.venv/.ready: requirements.txt
	$(if $(RECENT),,$(error xattn needs Python 3.11 or newer with the venv module, and there is none among: $(PYTHON); \
	  install one, or give its path with PYTHON=path))
	@echo "Setting up .venv with requirements.txt: downloads 2 GB with the CPU build of torch, takes a few minutes."
	@.venv/bin/python -c '$(IS_RECENT)' 2>/dev/null || "$(RECENT)" -m venv --clear .venv
	@.venv/bin/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' requirements.txt)" $(TORCH)
	@.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
# setuptools takes braces and dollars in the path of .venv for variables; a link to it has another path.
	@link=$$(mktemp -d) && ln -s "$$PWD/.venv" "$$link/venv" && \
	  "$$link/venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . && \
	  rm -r "$$link"
	@touch $@

dry: $(READY)  ## list what make reproduce would run, with estimates of run time and disk space
	@"$$PY" -m reproduction.pipeline notebooks/profiles/$(PROFILE).yaml --dry-run

reproduce: $(READY)  ## write the tables and figures of PROFILE to figures/PROFILE; skip what has not changed
	@"$$PY" -m reproduction.pipeline notebooks/profiles/$(PROFILE).yaml

report: $(READY)  ## write figures/PROFILE/index.html from the files that are there, without running anything
	@"$$PY" -m reproduction.report notebooks/profiles/$(PROFILE).yaml

# Without PROFILE=, check the two profiles that take only minutes.
CHECKED := $(if $(filter command environment,$(firstword $(origin PROFILE))),$(PROFILE),smoke mini)

verify: $(READY)  ## compare the committed numbers of smoke and mini, or of PROFILE, with a fresh run in figures/fresh
	@"$$PY" -m reproduction.verify $(CHECKED:%=notebooks/profiles/%.yaml)

accept: $(READY)  ## replace the committed numbers of smoke and mini, or of PROFILE, with those of a fresh run
	@"$$PY" -m reproduction.verify --accept $(CHECKED:%=notebooks/profiles/%.yaml)

test: $(READY)  ## check lint and format, and run the tests
	@"$$PY" -m ruff check
	@"$$PY" -m ruff format --check
	@"$$PY" -m pytest -q

bench: $(READY)  ## measure speed and memory as ratios, and write them to benchmarks/results
	@"$$PY" -m benchmarks.bench

faults: $(READY)  ## kill a run of PROFILE at 50 random moments, and compare it with an undisturbed run
	@"$$PY" -m benchmarks.faults 50 --profile $(PROFILE)

lab: $(READY)  ## open the notebooks in JupyterLab
	@mkdir -p figures/lab
	@"$$PY" -m jupyterlab --ServerApp.root_dir="$$PWD" --LabApp.default_url=/lab/tree/notebooks/paper/00_overview.ipynb \
	  --ServerApp.kernel_manager_class=reproduction.lab.KernelsInRoot --LabApp.app_settings_dir=notebooks/settings $(JUPYTER)

data: $(READY)  ## synthesise the corpus and its training features again
	@"$$PY" -m recipes.make_corpus --data data

train: $(READY)  ## train the models again; needs make data
	@"$$PY" -m recipes.train
	@"$$PY" -m recipes.card

train-regularised: $(READY)  ## train base further with losses on its attention, and measure the results; needs make data
	@"$$PY" -m recipes.regularise
	@"$$PY" -m reproduction.regularisation

clean:  ## delete the executed notebooks, maps and fresh runs of PROFILE, and nothing else
	rm -rf figures/$(PROFILE)/notebooks figures/$(PROFILE)/maps figures/fresh/$(PROFILE)
