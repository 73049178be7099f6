# Run `make` for the list of commands. Everything runs in .venv/, which the first command that needs it sets up.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON3 ?= python3
ifeq ($(origin PYTHON),command line)  # this environment is used as it is: nothing is installed into it
STAMP :=
else
PYTHON := .venv/bin/python
STAMP := .venv/.installed
endif
# The code of this folder runs, in any environment.
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
EXPERIMENTS := $(patsubst experiments/%/config.yaml,%,$(wildcard experiments/*/config.yaml))

# Values from the command line are passed through the environment: neither make nor the shell expands quotes and `$`.
EXP ?=
override export EXP := $(value EXP)
ARGS ?=
override export ARGS := $(value ARGS)
SWEEP ?=
override export SWEEP := $(value SWEEP)
RESUME ?=
override export RESUME := $(value RESUME)
RETRY ?=
override export RETRY := $(value RETRY)
JOBS ?=
override export JOBS := $(value JOBS)
FAIL_FAST ?=
override export FAIL_FAST := $(value FAIL_FAST)
NEW ?=
override export NEW := $(value NEW)
CLUSTER ?=
override export CLUSTER := $(value CLUSTER)
AT_ONCE ?=
override export AT_ONCE := $(value AT_ONCE)
REPO ?=
override export REPO := $(value REPO)
VIDEO ?=
override export VIDEO := $(value VIDEO)
MODEL ?= qwen2.5-vl
override export MODEL := $(value MODEL)
CHECKPOINT ?=
override export CHECKPOINT := $(value CHECKPOINT)
WEIGHTS ?=
override export WEIGHTS := $(value WEIGHTS)
OUT ?=
override export OUT := $(value OUT)
KILLS ?= 50
override export KILLS := $(value KILLS)
GPUS ?= 1
override export GPUS := $(value GPUS)
PROMPT ?=
override export PROMPT := $(value PROMPT)
PROMPTS ?=
override export PROMPTS := $(value PROMPTS)
IMAGE ?=
override export IMAGE := $(value IMAGE)
START ?=
override export START := $(value START)
GOAL ?=
override export GOAL := $(value GOAL)
STATE ?=
override export STATE := $(value STATE)
DTYPE ?= float32
override export DTYPE := $(value DTYPE)
DATA ?=
override export DATA := $(value DATA)
N ?= 10000
override export N := $(value N)

experiment = $(if $(strip $(EXP)),,$(error EXP is missing: `make $@ EXP=<name>`, one of: $(EXPERIMENTS)))
# Every command is one of the console command. It splits --args into words, as a shell would, and expands nothing.
blueberry = $(PYTHON) -m blueberry_video.cli
# Python with the words of ARGS as its last arguments, for files that are not commands.
with_args = $(PYTHON) -m blueberry_video.launch.words

##@ Start
.PHONY: help setup doctor
help: ## list the commands
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  EXP=name      an experiment: $(EXPERIMENTS)'
	@echo '  ARGS="…"      overrides, such as ARGS="model.encoder.depth=8 trainer.max_steps=500" or ARGS="+debug=fast"'
	@echo '  RESUME=last   continue the newest run in its folder; or the name of a run in outputs/<EXP>/'
	@echo '  SWEEP="…"     every combination, such as SWEEP="model.encoder.depth=2,4 seed=1,2,3"'

setup: $(STAMP) ## install the tested versions into .venv/

doctor: $(STAMP) ## check versions, devices, FFmpeg, wandb, Slurm and disk, with a fix for each problem
	@$(blueberry) doctor

##@ Experiments
.PHONY: new check estimate train sweep submit runs gate torture report consolidate latents pseudo_labels export card push predict features evaluate generate reconstruct plan render data data-check shards
new: $(STAMP) ## EXP=name: copy experiments/template/
	@$(blueberry) new "$$EXP"

check: $(STAMP) ## EXP=name: dry run: config, data, a few steps, save, reload, disk, memory, logger
	@$(experiment)$(blueberry) check "$$EXP" --args="$$ARGS"

estimate: $(STAMP) ## EXP=name [GPUS=8] [ARGS="--device H100 --mfu 0.4"]: memory, FLOPs and days before a run
	@$(experiment)$(blueberry) estimate "$$EXP" --gpus="$$GPUS" --args="$$ARGS"

train: $(STAMP) ## EXP=name: train, then print a summary; ARGS=, RESUME=
	@$(experiment)$(blueberry) train "$$EXP" --args="$$ARGS" $${RESUME:+"--resume=$$RESUME"}

sweep: $(STAMP) ## EXP=name SWEEP="key=a,b" [JOBS=2] [RETRY=failed] [FAIL_FAST=true] [NEW=1]: run every combination; again after a kill: what is missing
	@$(experiment)$(if $(strip $(SWEEP)),,$(error SWEEP is missing: `make sweep EXP=$(EXP) SWEEP="seed=1,2,3"`))$(blueberry) sweep "$$EXP" --args="$$ARGS" --args="$$SWEEP" $${JOBS:+"--jobs=$$JOBS"} $${RETRY:+"--retry=$$RETRY"} $${FAIL_FAST:+"--fail-fast=$$FAIL_FAST"} $${NEW:+--new}

submit: $(STAMP) ## EXP=name [SWEEP="key=a,b"] [CLUSTER=profile] [AT_ONCE=4] [RESUME=last] [RETRY=failed]: submit a run or a sweep to Slurm or to the background
	@$(experiment)$(blueberry) submit "$$EXP" --args="$$ARGS" --args="$$SWEEP" $${CLUSTER:+"--cluster=$$CLUSTER"} $${AT_ONCE:+"--at-once=$$AT_ONCE"} $${RESUME:+"--resume=$$RESUME"} $${RETRY:+"--retry=$$RETRY"}

runs: $(STAMP) ## [EXP=name]: show the state of submitted and local runs
	@$(blueberry) runs $${EXP:+"$$EXP"}

gate: $(STAMP) ## EXP=name: train, and fail if an expected value is missed
	@$(experiment)$(blueberry) gate "$$EXP" --args="$$ARGS"

torture: $(STAMP) ## EXP=name [KILLS=50]: kill a run at random moments, resume it, and compare with the uninterrupted run
	@$(experiment)$(blueberry) torture "$$EXP" --kills="$$KILLS" --args="$$ARGS"

report: $(STAMP) ## EXP=name: write report.html of the newest run again
	@$(experiment)$(blueberry) report "$$EXP"

consolidate: $(STAMP) ## EXP=name: write the weights of the newest sharded checkpoint to one file
	@$(experiment)$(blueberry) consolidate "$$EXP"

latents: $(STAMP) ## EXP=name [OUT=folder] [DTYPE=bfloat16]: encode clips and captions once, for training to read
	@$(experiment)$(blueberry) latents "$$EXP" --args="$$ARGS" --out="$$OUT" --dtype="$$DTYPE"

pseudo_labels: $(STAMP) ## EXP=name CHECKPOINT=run [OUT=folder]: write the disparity that a trained model predicts for the training clips
	@$(experiment)$(if $(strip $(CHECKPOINT)),,$(error CHECKPOINT is missing: add CHECKPOINT=outputs/<experiment>, the run of the teacher))$(blueberry) pseudo-labels "$$EXP" --checkpoint="$$CHECKPOINT" --args="$$ARGS" $${OUT:+"--out=$$OUT"}

export: $(STAMP) ## EXP=name OUT=folder [DTYPE=bfloat16]: export the newest run for transformers or diffusers; ARGS="--format onnx" or --merge
	@$(experiment)$(if $(strip $(OUT)),,$(error OUT is missing: `make export EXP=$(EXP) OUT=<folder>`))$(blueberry) export "$$EXP" --out "$$OUT" --dtype "$$DTYPE" --args="$$ARGS"

card: $(STAMP) ## EXP=name [OUT=README.md]: write the model card of the newest run; ARGS="--license apache-2.0"
	@$(experiment)$(blueberry) card "$$EXP" --card="$${OUT:-README.md}" --args="$$ARGS"

push: $(STAMP) ## EXP=name REPO=org/name: upload the newest run with its model card to a hub; ARGS="--private --license apache-2.0"
	@$(experiment)$(if $(strip $(REPO)),,$(error REPO is missing: `make push EXP=$(EXP) REPO=org/name`))$(blueberry) push "$$EXP" --repo="$$REPO" --args="$$ARGS"

predict: $(STAMP) ## EXP=name VIDEO=file|folder|list.txt OUT=labels.csv: labels of videos by the newest run; ARGS="--window 10 --top 5"
	@$(experiment)$(if $(strip $(VIDEO)),,$(error VIDEO is missing: `make predict EXP=$(EXP) VIDEO=clip.mp4 OUT=labels.csv`))$(if $(strip $(OUT)),,$(error OUT is missing: add OUT=labels.csv))$(blueberry) predict "$$EXP" --out="$$OUT" --args="$$ARGS" -- "$$VIDEO"

features: $(STAMP) ## EXP=name|WEIGHTS=folder|file|hub-id VIDEO=file|folder|list.txt OUT=folder: features of videos by any encoder; ARGS="--level token"
	@$(if $(strip $(EXP)$(WEIGHTS)),,$(error WEIGHTS is missing: `make features WEIGHTS=MCG-NJU/videomae-base VIDEO=clips OUT=features`, or EXP=<name> for a run))$(if $(strip $(VIDEO)),,$(error VIDEO is missing: add VIDEO=clips))$(if $(strip $(OUT)),,$(error OUT is missing: add OUT=features))$(blueberry) features "$${WEIGHTS:-$$EXP}" --out="$$OUT" --args="$$ARGS" -- "$$VIDEO"

evaluate: $(STAMP) ## EXP=name [OUT=numbers.json]: metrics of the newest run on another data set or split; ARGS="--split test data.val.root=…"
	@$(experiment)$(blueberry) evaluate "$$EXP" $${OUT:+"--out=$$OUT"} --args="$$ARGS"

generate: $(STAMP) ## EXP=name OUT=clip.mp4|folder [PROMPT="…"|PROMPTS=file] [IMAGE=file] [VIDEO=file]: generate videos with the newest run; ARGS="--frames 33 --seed 1"
	@$(experiment)$(if $(strip $(OUT)),,$(error OUT is missing: `make generate EXP=$(EXP) OUT=clip.mp4`))$(blueberry) generate "$$EXP" --out="$$OUT" $${PROMPT:+"--prompt=$$PROMPT"} $${PROMPTS:+"--prompts=$$PROMPTS"} $${IMAGE:+"--image=$$IMAGE"} $${VIDEO:+"--video=$$VIDEO"} --args="$$ARGS"

reconstruct: $(STAMP) ## EXP=name VIDEO=file|folder|list.txt OUT=folder: videos as the newest run of an autoencoder or a tokenizer reconstructs them
	@$(experiment)$(if $(strip $(VIDEO)),,$(error VIDEO is missing: `make reconstruct EXP=$(EXP) VIDEO=clip.mp4 OUT=folder`))$(if $(strip $(OUT)),,$(error OUT is missing: add OUT=<folder>))$(blueberry) reconstruct "$$EXP" --out="$$OUT" --args="$$ARGS" -- "$$VIDEO"

plan: $(STAMP) ## EXP=name START=image GOAL=image STATE=numbers [OUT=plan.json]: actions that a world model plans
	@$(experiment)$(if $(strip $(START)),,$(error START is missing: `make plan EXP=$(EXP) START=now.png GOAL=goal.png STATE=0.1,-0.2`))$(if $(strip $(GOAL)),,$(error GOAL is missing: add GOAL=<image>))$(if $(strip $(STATE)),,$(error STATE is missing: add STATE=<numbers, separated by commas>))$(blueberry) plan "$$EXP" --state="$$STATE" $${OUT:+"--out=$$OUT"} --args="$$ARGS" -- "$$START" "$$GOAL"

render: $(STAMP) ## CHECKPOINT=run OUT=folder [ARGS="--format mp4,ply,html --path turntable"]: render a trained scene, or ARGS=--live
	@$(if $(strip $(CHECKPOINT)),,$(error CHECKPOINT is missing: `make render CHECKPOINT=outputs/gaussians4d OUT=scene`))$(blueberry) render "$$CHECKPOINT" $${OUT:+"--out=$$OUT"} --args="$$ARGS"

data: $(STAMP) ## write a folder of mp4 files; ARGS="source=world out=data/world train=1000"
	@$(blueberry) data --args="$$ARGS"

data-check: $(STAMP) ## DATA=folder|tars|experiment [OUT=folder] [ARGS="--sample 500"]: classes, sizes and faults of a data set, and the config that reads it
	@$(if $(strip $(DATA)),,$(error DATA is missing: `make data-check DATA=data/my_videos`))$(blueberry) data-check "$$DATA" $${OUT:+"--out=$$OUT"} --args="$$ARGS"

shards: $(STAMP) ## DATA=folder OUT=folder [ARGS="--shard-size 1GB"]: write tar shards of a folder of videos; OUT may be s3://bucket/folder
	@$(if $(strip $(DATA)),,$(error DATA is missing: `make shards DATA=data/my_videos OUT=data/my_shards`))$(if $(strip $(OUT)),,$(error OUT is missing: add OUT=<folder>))$(blueberry) shards "$$DATA" --out="$$OUT" --args="$$ARGS"

##@ Video
.PHONY: process depth decode-bench
process: $(STAMP) ## VIDEO=file [MODEL=name] [OUT=folder] [ARGS="fps=1 format=numpy"]: convert a video to the input of a model
	@$(if $(strip $(VIDEO)),,$(error VIDEO is missing: `make process VIDEO=clip.mp4 MODEL=qwen2.5-vl OUT=folder`))$(blueberry) process "$$VIDEO" --model "$$MODEL" $${OUT:+--out "$$OUT"} --args="$$ARGS"

depth: $(STAMP) ## VIDEO=file OUT=folder WEIGHTS=run|folder|file|hub-id [ARGS="--format npz,png --mode sliding"]: depth of a video of any length
	@$(if $(strip $(VIDEO)),,$(error VIDEO is missing: `make depth VIDEO=clip.mp4 OUT=maps WEIGHTS=outputs/video_depth`))$(if $(strip $(OUT)),,$(error OUT is missing: add OUT=<folder>))$(if $(strip $(WEIGHTS)$(CHECKPOINT)),,$(error WEIGHTS is missing: add WEIGHTS=outputs/<experiment>, or published weights))$(blueberry) depth "$$VIDEO" --out="$$OUT" --weights="$${WEIGHTS:-$$CHECKPOINT}" --args="$$ARGS"

decode-bench: $(STAMP) ## find the fastest decoder and number of threads on this machine; ARGS=folder of videos to use
	@$(with_args) benchmarks/decode.py

##@ Development
.PHONY: test test-gpu lint bench bench-gpu fuzz-video docs clean
test: $(STAMP) ## run all tests, without network, in two processes; ARGS= for pytest
	@OMP_NUM_THREADS=1 $(with_args) -m pytest -n 2

test-gpu: $(STAMP) ## run the tests that need a CUDA device, and print their tables; ARGS= for pytest
	@$(with_args) -m pytest -m gpu -rP

lint: $(STAMP) ## run ruff and mypy
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy src

bench: $(STAMP) ## compare with peers, each pair in one run
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(PYTHON) "$$file"; done

bench-gpu: $(STAMP) ## compare the scan kernels with mamba-ssm, if installed, on a CUDA device; writes benchmarks/results/
	@$(with_args) benchmarks/video_scan_gpu.py

fuzz-video: $(STAMP) ## N=10000: process damaged videos in subprocesses, and count the outcomes
	@$(with_args) tests/video/fuzz_video.py --runs "$$N"

docs: $(STAMP) ## build the documentation site in site/
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

clean: ## remove caches; keeps runs, data and .venv/
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find src tests experiments benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	@for kept in outputs data .venv; do if [ -d $$kept ]; then echo "kept: $$kept/, $$(du -sh $$kept | cut -f1)"; fi; done

# ---- the environment -------------------------------------------------------------------------------------------------

# An environment that is a link, or in which this project is installed from a different folder, belongs to that folder:
# installing into it would change what runs there. The path of the folder is in the .pth file of the editable install.
define check_owner
owner=$$(cat .venv/lib/python3*/site-packages/__editable__.blueberry_video-*.pth 2>/dev/null | head -n 1); \
if [ -L .venv ]; then why="is a link to $$(readlink .venv)"; \
elif [ -n "$$owner" ] && [ "$$(realpath "$$owner")" != "$$(realpath src)" ]; then why="contains the project of $$(dirname "$$owner")"; \
else why=; fi; \
if [ -n "$$why" ]; then \
  printf '%s\n' ".venv $$why, so nothing is installed into it: this would be the versions of constraints.txt of this folder and" "the project itself (pip install --constraint constraints.txt --editable '.[dev]'). Use the environment as it is with" "\`make PYTHON=.venv/bin/python $@\`, or remove .venv (\`rm -r .venv\`, for a link \`rm .venv\`): make then creates one here." >&2; exit 1; \
fi
endef

# Debian without python3-venv has no ensurepip; the system's pip, if there is one, then installs into .venv/.
ifneq ($(STAMP),)
$(STAMP): pyproject.toml constraints.txt
	@$(check_owner)
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON3) must be Python 3.11 or newer: install python3.11, or name one: make PYTHON3=/path/to/python3.11 …" >&2; exit 1; }
	@echo "setting up .venv/ with the versions of constraints.txt; the first time takes minutes"
	@if [ ! -x $(PYTHON) ]; then \
	  if $(PYTHON3) -c 'import ensurepip' 2>/dev/null; then $(PYTHON3) -m venv .venv; \
	  elif $(PYTHON3) -m pip --version >/dev/null 2>&1; then \
	    $(PYTHON3) -m venv --without-pip .venv && $(PYTHON3) -m pip --python $(PYTHON) install -qq pip; \
	  else echo "$(PYTHON3) cannot create a virtual environment: apt-get install python3-venv, then run this again" >&2; exit 1; fi; \
	fi
	@$(PYTHON) -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' \
	  || { echo "the installation failed: see the output of pip above. Behind a proxy or a mirror set pip's index; for the smaller CPU build of PyTorch, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" >&2; exit 1; }
	@touch $@
	@echo "ready: $$($(PYTHON) -c 'from importlib.metadata import version as v; print("torch", v("torch"), "· lightning", v("lightning"))')"
else
.PHONY: setup
endif
