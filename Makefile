# Each target is one line of what a person would type. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint reproduce bench audit clean

quickstart: .venv/ready  ## train and judge a small language model on this machine, in minutes
	$(BIN)/afferent train experiment=quickstart/stdlib

test: .venv/ready  ## every test, JOBS of them at a time, and which took longest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(or $(JOBS),2) --dist loadfile --durations 40

lint: .venv/ready  ## style, types, layers
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/basedpyright && $(BIN)/lint-imports

reproduce: .venv/ready  ## re-run the claims of a paper: make reproduce PAPER=quickstart SCALE=cpu
	$(BIN)/afferent reproduce paper=$(or $(PAPER),quickstart) scale=$(or $(SCALE),cpu)

bench: .venv/ready  ## speed, as ratios in one run
	$(BIN)/afferent bench suite=training

audit: .venv/ready  ## compile every kernel tile for its chip, without a GPU
	$(BIN)/python -m kernels.audit

audit-%: .venv/ready  ## the same with another Triton: make audit-3.6.0
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/triton-$* triton==$*
	PYTHONPATH=.venv/triton-$* $(BIN)/python -m kernels.audit

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch .venv/ready

clean:
	rm -rf .venv
