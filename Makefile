# make venv | test | demo | lint | format | clean. Needs Python 3.10 or 3.11, and git; uv makes it faster.
PYTHON ?=
RUN := .venv/bin
# One thread a process: the tests run in two processes, and more threads make small networks slower.
export OMP_NUM_THREADS = 1
export OPENBLAS_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
export NUMBA_NUM_THREADS = 1
export LP_NUM_THREADS = 1
TESTS ?= tests

.PHONY: help venv test slow demo lint format clean

help:
	@echo 'make venv    .venv with everything that the package and its tests need'
	@echo 'make test    the tests (make slow: the long ones)'
	@echo 'make demo    the main benchmark, small, with one seed: a page with plots and a film in runs/demo'
	@echo 'make lint    style and errors (make format: mends the style)'
	@echo 'make clean   removes .venv, caches and builds; runs/ stays'

.venv/.complete: pyproject.toml constraints.txt scripts/venv.sh
	@PYTHON='$(PYTHON)' sh scripts/venv.sh
	@touch $@

venv: .venv/.complete

test: venv
	$(RUN)/python -m pytest -n 2 $(TESTS)

slow: venv
	$(RUN)/python -m pytest -n 2 -m slow $(TESTS)

demo: venv
	$(RUN)/fleetgym bench fleet_merge --preset quick --seeds 0 --out runs/demo --resume
	@echo "open $$(find runs/demo -name leaderboard.html | head -n 1)"

lint: venv
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

format: venv
	$(RUN)/ruff check --fix-only .
	$(RUN)/ruff format .

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
