# One command a stage. `make` sets up one virtual environment, with every version pinned by LOCK: constraints-gpu.txt if the machine has
# NVIDIA's driver at the first set-up, otherwise constraints.txt. LOCK=FILE chooses a lock and rebuilds the environment.
# Every `name=value` on the command line goes to Hydra. MODEL=x is short for model=x, STEP=n for step=n, CHECKPOINT=f for checkpoint=f,
# BASE=f for model.checkpoint=f.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Once made, the environment keeps its lock: on a shared disk the next machine may have another answer.
MADE := $(strip $(file < $(READY)))
LOCK := $(or $(MADE),$(if $(wildcard /proc/driver/nvidia/version),constraints-gpu.txt,constraints.txt))
OTHER := $(filter-out $(LOCK),$(MADE))
# Linked to a Python that was removed, or made on another machine, which may use it now.
GONE := $(if $(MADE),$(shell $(BIN)/python -c '' >/dev/null 2>&1 || \
	echo '$(VENV) is of a Python that is not here; write make clean, and the same command makes it anew'))
ifeq ($(LOCK),constraints-gpu.txt)
COST := three minutes, 11 GB, 4.5 GB of it to download
NO_DEPS :=
else ifeq ($(LOCK),constraints.txt)
COST := two minutes, 2.5 GB
# SGLang's own metadata asks for CUDA packages.
NO_DEPS := --no-deps
else
$(error LOCK='$(LOCK)' is not a lock of $(VENV): write LOCK=constraints.txt, or LOCK=constraints-gpu.txt for NVIDIA GPUs)
endif

# The real slime on this machine's cores: checkouts at the pinned commits, and a second environment unless SLIME_PYTHON names one.
CHECKOUTS := $(and $(SLIME_ROOT),$(MEGATRON_ROOT))
ifneq ($(CHECKOUTS),)
ifeq ($(SLIME_PYTHON),)
SLIME_READY := .venv-slime/.ready
SLIME_PYTHON := $(CURDIR)/.venv-slime/bin/python
endif
export SLIME_ROOT MEGATRON_ROOT SLIME_PYTHON
else ifneq ($(filter command,$(origin SLIME_ROOT) $(origin MEGATRON_ROOT)),)
$(error SLIME_ROOT='$(SLIME_ROOT)' and MEGATRON_ROOT='$(MEGATRON_ROOT)' go together: write SLIME_ROOT=FOLDER MEGATRON_ROOT=FOLDER)
endif

# What make and this file read themselves; everything else the user wrote is an override for Hydra.
OWN := MODEL STEP CHECKPOINT BASE PYTHON VENV LOCK SLIME_ROOT MEGATRON_ROOT SLIME_PYTHON SHELL MAKEFLAGS __o
__escape = '$(subst ','\'',$(1))'
# By name, not $(MAKEOVERRIDES): that one breaks on quotes and parentheses.
OVERRIDES = $(foreach __o,$(filter-out $(OWN),$(.VARIABLES)),$(if $(filter command line,$(origin $(__o))),$(call __escape,$(__o)=$(value $(__o)))))
# An empty one goes on too where it is on the line, as MODEL=$NAME is without NAME: it is refused, not left out.
__short = $(if $(value $(1))$(filter command,$(origin $(1))),$(call __escape,$(2)=$(value $(1))))
LIMI = $(BIN)/python launch/limi.py $(1) $(call __short,MODEL,model) $(call __short,STEP,step) \
	$(call __short,CHECKPOINT,checkpoint) $(call __short,BASE,model.checkpoint) $(OVERRIDES)

# Paths on the command line are relative to the checkout, so make works there.
ifeq ($(wildcard launch/limi.py),)
$(error this folder is not the checkout; write make -C '$(patsubst %/Makefile,%,$(strip $(MAKEFILE_LIST)))' $(MAKECMDGOALS) $(MAKEOVERRIDES))
endif

# A word that is no target ends the command before anything runs: of `make train optim.lr 1e-5` make would run `train` first.
TARGETS := $(shell sed -n 's/^\.PHONY: //p' Makefile) $(READY) .venv-slime/.ready
UNKNOWN := $(filter-out $(TARGETS),$(MAKECMDGOALS))
ifneq ($(UNKNOWN),)
ASKED := $(if $(wildcard $(BIN)/python),$(shell $(BIN)/python launch/limi.py $(foreach word,$(UNKNOWN),$(call __escape,$(word))) 2>&1))
$(error $(or $(ASKED),'$(firstword $(UNKNOWN))' is no target and not name=value; `make help` lists the targets))
endif

# Overrides must not reach a make that a stage or a test runs.
export MAKEFLAGS :=
export MAKEOVERRIDES :=
unexport MFLAGS MAKELEVEL

.PHONY: help
help: ## Show the targets
	@printf 'make TARGET [MODEL=name] [name=value ...]\n\n'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name does; do printf '  %-15s%s\n' "$$name" "$$does"; done
	@printf '\nmodels: %s\n' "$$(ls hydra_conf/model | sed 's/\.yaml//' | xargs)"
	@printf 'clusters: %s\n' "$$(ls hydra_conf/cluster | sed 's/\.yaml//' | xargs)"
	@printf 'name=value: any line of a file in hydra_conf/, as optim.lr=2e-5 or run=first; dry_run=true shows the whole recipe\n'
	@printf 'LOCK=constraints.txt or LOCK=constraints-gpu.txt: the versions of the environment, here $(LOCK)\n'

.PHONY: setup
setup: $(READY) ## Make the virtual environment (every other target does)

# An environment in $(1) with pip: the one that is there, or a new one where its Python is another or gone, or where $(2) says so.
IS_3_11 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
define environment
	@'$(PYTHON)' -c '$(IS_3_11)' 2>/dev/null || \
		{ echo "'$(PYTHON)' is not Python 3.11; write PYTHON=/path/to/python3.11" >&2; exit 2; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "'$(PYTHON)' has no module ensurepip; install python3.11-venv, or write PYTHON=/path/to/another/python3.11" >&2; exit 2; }
	@$(if $(2),false,$(1)/bin/python -c 'import pip; $(IS_3_11)' 2>/dev/null) || '$(PYTHON)' -m venv --clear $(1)
	@$(call install,$(1),'pip==26.3')
endef
# Errors alone: pip warns of every attempt to reach an index.
install = $(1)/bin/python -m pip install -qq --disable-pip-version-check $(2) || \
	{ echo "the packages of $(1) could not be installed; where no package index is in reach set PIP_INDEX_URL or HTTPS_PROXY, \
	and the same command goes on" >&2; exit 2; }

$(READY): pyproject.toml $(LOCK) $(if $(OTHER)$(GONE),FORCE)
	@$(if $(GONE),echo "$(GONE)" >&2; exit 2,true)
	@echo "Setting up $(VENV) from $(LOCK) (about $(COST))" >&2
	$(call environment,$(VENV),$(OTHER))
	@$(call install,$(VENV),--constraint $(LOCK) --group run --group test)
	@$(call install,$(VENV),--constraint $(LOCK) $(NO_DEPS) --group sglang)
	@echo $(LOCK) > $@

FORCE:

.PHONY: fetch
fetch: $(READY) ## Fetch MODEL, and the data its recipe names, from the Hugging Face hub; HF_TOKEN from the environment
	@$(call LIMI,fetch)

.venv-slime/.ready: pyproject.toml constraints-slime.txt
	@echo "Setting up .venv-slime, in which slime runs (about a minute, 1.5 GB)" >&2
	$(call environment,.venv-slime)
	@$(call install,.venv-slime,--constraint constraints-slime.txt --group slime-cpu)
	@touch $@

.PHONY: data
data: $(READY) ## Pack the trajectories, every mask proved
	@$(call LIMI,data)

.PHONY: inspect
inspect: $(READY) ## Show the sequences of one trajectory, id=ID, supervised tokens coloured; without id, list all; html=true writes a page
	@$(call LIMI,inspect)

.PHONY: plan
plan: $(READY) ## Layout, memory, steps, time and cost of MODEL on cluster=NAME, before a GPU is taken
	@$(call LIMI,plan)

.PHONY: check
check: $(READY) $(SLIME_READY) ## Everything that would end or spoil a run, before a GPU is held
	@$(call LIMI,check)

.PHONY: train
train: $(READY) $(SLIME_READY) ## Data, training, export, sanity check and report; sweep="optim.lr=1e-5,2e-5 seed=0,1" runs each
	@$(call LIMI,train)

.PHONY: rehearse
rehearse: $(READY) $(SLIME_READY) ## Through slime, one step on the longest sequence, a save, a reload, and the peak memory beside the plan's
	@$(call LIMI,rehearse)

.PHONY: attach
attach: $(READY) ## Show the job of a run on the cluster, from its first line: run=NAME cluster.address=http://HEAD:8265
	@$(call LIMI,attach)

.PHONY: stop
stop: $(READY) ## Stop the job of a run on the cluster, its step saved: run=NAME cluster.address=http://HEAD:8265
	@$(call LIMI,stop)

.PHONY: slurm
slurm: $(READY) ## Print the sbatch script of a run: make slurm MODEL=glm4.5 cluster.root=/shared/limi > job.sbatch
	@$(call LIMI,slurm)

.PHONY: kuberay
kuberay: $(READY) ## Print the RayJob manifest of a run: make kuberay MODEL=glm4.5 cluster.root=/shared/limi > job.yaml
	@$(call LIMI,kuberay)

.PHONY: replay
replay: $(READY) ## Repeat step STEP of a run, whole and sequence by sequence: what made it diverge, and whether it does so again
	@$(call LIMI,replay)

.PHONY: export
export: $(READY) ## Hugging Face folder of a run's newest checkpoint, or of step=N: make export run=NAME
	@$(call LIMI,export)

.PHONY: sanity
sanity: $(READY) ## Check an export, CHECKPOINT=FOLDER or run=NAME, beside its base (BASE=FOLDER): its files, then what SGLang makes of it
	@$(call LIMI,sanity)

.PHONY: serve
serve: $(READY) ## Serve an export with SGLang until Ctrl-C, with a curl and a Python example: make serve CHECKPOINT=runs/NAME/hf
	@$(call LIMI,serve)

.PHONY: parity
parity: $(READY) ## Train the tiny models in every layout beside one rank, and compare (seven minutes)
	@$(call LIMI,parity)

.PHONY: bench
bench: $(READY) ## Measure the schedule, the embedded engine and the data stage; model.checkpoint=FOLDER names a real tokenizer
	@$(call LIMI,bench)

.PHONY: bench-gpu
bench-gpu: $(READY) ## Measure the embedded engine on one GPU, beside transformers and the plan; smoke=true only checks it
	@$(call LIMI,bench-gpu)

LINT := $(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check . && $(BIN)/python -m mypy

.PHONY: lint
lint: $(READY) ## Ruff and mypy
	@$(LINT)

# The slowest twenty at the end. Two processes; whole modules to each of them where tests share ranks and runs.
PYTEST := $(BIN)/python -m pytest --durations=20 --durations-min=0.5

.PHONY: test-quick
test-quick: $(READY) ## Lint, and beside it the tests that start nothing: about two minutes on two cores
	@$(LINT) & $(PYTEST) -m 'not (run or slow or contract)' -n 2 --dist worksteal && wait $$!

.PHONY: test
test: test-quick ## The quick tests, and whole trainings, servers and kills: about a quarter of an hour
	@$(PYTEST) -m 'run and not (slow or contract)' -n 2 --dist loadfile

.PHONY: test-all
test-all: test-quick $(SLIME_READY) ## All tests; those of the contract with slime where SLIME_ROOT and MEGATRON_ROOT are named
	@$(PYTEST) -m '$(if $(CHECKOUTS),run or slow or contract,(run or slow) and not contract)'

.PHONY: test-contract
test-contract: $(if $(CHECKOUTS),$(READY) $(SLIME_READY)) ## What needs slime and Megatron-LM: make test-contract SLIME_ROOT=FOLDER MEGATRON_ROOT=FOLDER
	@$(if $(CHECKOUTS),$(PYTEST) -m contract,echo "test-contract needs slime and Megatron-LM; write SLIME_ROOT=FOLDER \
	MEGATRON_ROOT=FOLDER of their checkouts" >&2; exit 2)

.PHONY: reference
reference: $(READY) ## Write hydra_conf/REFERENCE.md anew: every option with its type, default and meaning
	@$(BIN)/python -m recipes.compose.reference

.PHONY: clean
clean: ## Remove the environment; data, models and runs stay
	@rm -rf $(VENV) .venv-slime .pytest_cache .mypy_cache .ruff_cache
