# `make quickstart` trains on real digits and samples new ones; `make help` lists the rest.

PYTHON ?= python3
ACTIVATE := . .venv/bin/activate
INSTALL := $(ACTIVATE) && pip install --disable-pip-version-check -c constraints.txt
SAMPLES := out/quickstart

.PHONY: help quickstart accuracy test lint format clean

help:
	@echo "make quickstart  train the autoencoder and the diffusion model on digits, sample 10 of each class"
	@echo "make accuracy    how many of those samples a classifier of real digits names right"
	@echo "make test        run all tests"
	@echo "make lint        check style and imports      make format  apply the style"
	@echo "make clean       remove .venv and caches; runs/ and out/ stay"

quickstart: .venv/.quickstart
	$(ACTIVATE) && python train.py configs/quickstart/autoencoder.yaml
	$(ACTIVATE) && python train.py configs/quickstart/diffusion.yaml
	$(ACTIVATE) && python sample.py runs/quickstart-diffusion --classes 0-9 --n 10 --out $(SAMPLES) --grid --overwrite

accuracy: .venv/.quickstart
	$(ACTIVATE) && python benchmarks/digits_accuracy.py $(SAMPLES)

test: .venv/.test
	$(ACTIVATE) && python -m pytest -n 2 -q

lint: .venv/.dev
	$(ACTIVATE) && ruff check . && ruff format --check .

format: .venv/.dev
	$(ACTIVATE) && ruff check --fix . && ruff format .

# One environment for all; each stamp says which extras are in it, and is stale when what it installed is.
.venv/bin/activate:
	$(PYTHON) -m venv .venv

.venv/.quickstart: setup.py constraints.txt | .venv/bin/activate
	$(INSTALL) -e ".[quickstart]"
	@touch $@

.venv/.test: setup.py constraints.txt | .venv/bin/activate
	$(INSTALL) -e ".[quickstart,test]"
	@touch $@

.venv/.dev: constraints.txt | .venv/bin/activate
	$(INSTALL) ruff
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
