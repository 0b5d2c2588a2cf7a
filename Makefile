# make repro   the paper: fetch, train the organisms, fit, draw, write (params/run.yaml names the profile)
# make beyond  what goes past the post: baselines, audits, stability, choices, and a document of them
# make study   the paper's own evidence: the next cell without a record, until done or stopped; it resumes where it was
# make test    everything CI checks
# make env     the environment alone, .venv, for whoever wants the tool and not the paper
# make help    the other targets
SHELL := /bin/bash
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
READY := .venv/.ready
PEERS := build/peers/.ready
SMOKE := build/smoke
PROFILE = $(shell sed -n 's/^profile: *//p' params/run.yaml)
NBVAL := pytest --nbval-lax --nbval-kernel-name=python3 --nbval-cell-timeout=1200
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: env repro beyond study test test-all nightly audit lint unit smoke nbval bench docs notebook lock clean help

env: $(READY)

repro: $(READY)
	PATH="$(BIN):$$PATH" dvc repro

# The paper's abstract cites the comparison of methods, so a paper that exists is written again.
beyond: $(READY)
	PATH="$(BIN):$$PATH" dvc repro beyond/dvc.yaml
	if [ -f writeup/$(PROFILE)/paper.pdf ]; then PATH="$(BIN):$$PATH" dvc repro --single-item --force writeup; fi

# ARGS="--stage real_models --minutes 60" takes one stage and ends after an hour.
study: $(READY)
	$(BIN)/python -m dctlib study $(ARGS)

test: lint unit nbval

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# By file, as a file's tests may share what is costly; a thread each, as tiny models gain nothing from a second.
unit: $(READY) $(PEERS)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# For the night: what CI leaves out, a real Ray cluster, inputs of properties that are new every time, 10,000 a loader,
# and every stage under DVC.
test-all: test
	$(MAKE) smoke
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --constraint requirements.lock --editable '.[paper,ray]'
	FUZZ_EXAMPLES=10000 $(BIN)/pytest -m "slow or not slow" --hypothesis-profile=default

# All tests, and some recorded cells of the study computed again: other ones every night.
nightly: test-all
	$(BIN)/python -m dctlib verify-records --profile study --sample 3

# The pipeline at smoke size, whole or up to STAGES, in a copy of this tree, so that neither params/run.yaml nor dvc.lock
# here changes.
smoke: $(READY)
	rm -rf $(SMOKE) && mkdir -p $(SMOKE)
	git ls-files -z --cached --others --exclude-standard | xargs -0 -I{} sh -c 'test -e "{}" && echo "{}"' | tar -cf - -T - | tar -xf - -C $(SMOKE)
	for kept in data models/smollm2-135m-instruct .cache; do if [ -d $$kept ]; then mkdir -p $$(dirname $(SMOKE)/$$kept) && cp -al $$kept $(SMOKE)/$$kept; fi; done
	echo "profile: smoke" > $(SMOKE)/params/run.yaml
	git -C $(SMOKE) init --quiet
	cd $(SMOKE) && export PATH="$(BIN):$$PATH" PYTHONPATH="$$PWD" && dvc repro $(STAGES) && dvc repro $(STAGES) | grep -q "up to date"

# DVC runs the notebooks whose models and vectors others open, and nbval all of them; either document wants every number
# and figure that they leave. The secrets first, which two others open. Then two notebooks at a time, a thread each: at
# this size, starting kernels and drawing figures is most of it.
nbval: STAGES := multiplicity rerouted locked beyond/dvc.yaml:replicates
nbval: smoke
	cd $(SMOKE) && export PATH="$(BIN):$$PATH" PYTHONPATH="$$PWD" && $(NBVAL) notebooks/secrets.ipynb \
		&& OMP_NUM_THREADS=1 $(NBVAL) --numprocesses 2 --dist loadfile notebooks --ignore=notebooks/secrets.ipynb
	cd $(SMOKE) && export PYTHONPATH="$$PWD" && $(BIN)/python -m dctlib writeup && $(BIN)/python -m dctlib writeup --document beyond

# Asks PyPI for known weaknesses of what the lock names, and fails where it cannot.
audit:
	$(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --strict --requirement requirements.lock --no-deps --disable-pip

bench: $(READY)
	PYTHONPATH="$$PWD" $(BIN)/python benchmarks/bench.py

docs: $(READY)
	$(BIN)/pdoc --docformat numpy --math --output-directory build/docs dctlib

notebook: $(READY)
	$(BIN)/jupyter lab notebooks

# First all that the lock names, side by side; then what PyPI's torch asks for besides, CUDA's libraries, where it does.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dctlib needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	grep -v '^#' requirements.lock | xargs -n 60 -P 2 $(BIN)/python -m pip install --quiet --no-compile --no-deps
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --constraint requirements.lock --editable ".[paper]"
	touch $(READY)

# Tools whose objects we read and write, for their tests: without what they pin, older NumPy and transformers than ours.
$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --upgrade --target build/peers repeng==0.4.0 steering-vectors==0.12.2
	touch $(PEERS)

# Rewrites requirements.lock with today's releases; torch stays where it is tested.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet torch==2.13.0
	build/lock/bin/python -m pip install --quiet "setuptools>=77" hatchling ".[dev]"
	{ echo "# Exact versions that dctlib is tested with. Regenerate: make lock"; build/lock/bin/python -m pip freeze --all --exclude dctlib | grep -vE '^(pip==|nvidia-|cuda-|triton==)' | sed 's/+cpu//'; } > requirements.lock

clean:
	rm -rf build .cache runs

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "make test-all   that, and what takes too long for CI: Ray, 10,000 inputs a loader"
	@echo "make nightly   that, and some recorded results computed again"
	@echo "make audit   known weaknesses of the locked packages, from the index"
	@echo "make smoke   the whole pipeline at smoke size, in build/smoke"
	@echo "make bench   what the engine costs here, into benchmarks/results/"
	@echo "make docs    the API reference, into build/docs/"
	@echo "make notebook   open the notebooks in Jupyter"
	@echo "make lock    rewrite requirements.lock"
