# Thin: each target is one line, the work is in the package `repro`.
PROFILE ?= laptop
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTHON ?= python3
FROM ?=
CORPORA ?=
READY := .venv/.ready

.PHONY: help reproduce exhibit figures report data test lint

help: ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

reproduce: $(READY) ## run every exhibit and write report/index.html  (PROFILE=smoke|laptop|paper JOBS=n)
	.venv/bin/repro run --profile $(PROFILE) --jobs $(JOBS) && .venv/bin/repro report --profile $(PROFILE)

exhibit: $(READY) ## run one exhibit  (NAME=narang2017/figure2)
	.venv/bin/repro run $(or $(NAME),$(error NAME is not set: make exhibit NAME=narang2017/figure2)) --profile $(PROFILE) --jobs $(JOBS)

figures: $(READY) ## redraw figures and scoreboard from the committed records, no training
	.venv/bin/repro figures

report: $(READY) ## write report/index.html from what has been run
	.venv/bin/repro report --profile $(PROFILE)

data: $(READY) ## fetch corpora  (all, or CORPORA="an4 ptb"; FROM=folder: a local copy, no network)
	.venv/bin/repro data $(CORPORA) $(if $(FROM),--from $(FROM))

test: $(READY) ## the whole test suite
	.venv/bin/python -m pytest -n $(JOBS)

lint: $(READY) ## ruff and stripped notebooks
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/nbstripout --verify notebooks/*/*.ipynb

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,lab,peers]'
	touch $@
