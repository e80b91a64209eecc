# make demo | test | test-slow | lint | format | clean          (PYTHON=python3.12 to choose another interpreter)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   ?=
OUT    ?=
TASK   ?=
STAMP  := $(VENV)/.installed

.PHONY: demo test test-slow lint format types clean install
.DEFAULT_GOAL := help

help:
	@sed -n 1p Makefile

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "miram needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	mkdir -p .typed && ln -sfn .. .typed/miram
	touch $(STAMP)

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/miram demo $(if $(OUT),--out $(OUT)) $(if $(DATA),--data $(DATA)) $(if $(TASK),--task $(TASK))

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typed $(BIN)/mypy -p miram

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .typed build *.egg-info runs .pytest_cache .ruff_cache .mypy_cache
