# make demo   two videos of one prompt and seed, dense and accelerated, with times and likeness
# make test   the test suite          make check   lint, types, layout
# make kernels  every Triton kernel that changed, compiled for five architectures by two Tritons, no GPU needed, as JSON rows
# make support  the table of what is tested together (dit_accel/pipelines/SUPPORT.md), from the tests' results
# make bench  the attention methods against dense attention on this machine, as JSON rows
# make docs   the manual, into outputs/manual; without the network, and without a warning or a broken link
# make eval   quality and speed of caches crossed with methods on the embedded model: a report, and the table and picture of docs/results/suite.md
# make        this list
# Every target installs what it needs into .venv first, at the versions of constraints.txt; demo needs no extra.

PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= outputs
DEMO_LEVEL ?= fast
DEMO_SETTINGS ?= --frames 17 --height 224 --width 256
PYTEST_FLAGS ?=
# What CI leaves to `make support` has the mark thorough: further methods of models that were tested with one.
TESTS ?= not timing and not thorough
# Neighbouring tests share models and fixtures, so a process gets whole files, and takes some of another's when idle.
PARALLEL := -n auto --dist worksteal
# Builds whose source has not changed since they were recorded are not compiled again; RECORD= compiles all.
RECORD ?= tools/kernels/builds.jsonl
RECORD_FLAGS := $(if $(RECORD),--record $(RECORD))
KERNELS_FLAGS ?= $(RECORD_FLAGS)
# The oldest Triton that pyproject.toml takes compiles two builds a kernel; OLDEST_FLAGS=--all compiles all of them.
OLDEST_TRITON := 3.6.0
OLDEST_FLAGS ?= --few $(RECORD_FLAGS)
OLDEST := $(VENV)-triton-$(OLDEST_TRITON)
# Triton reads its interpreter's switch when it is imported, so these tests have a process of their own.
INTERPRETED := tests/kernels/block_sparse/test_triton.py tests/kernels/block_sparse/test_triton8.py \
	tests/kernels/block_sparse/test_gluon.py tests/kernels/block_sparse/test_gluon_items.py \
	tests/kernels/block_sparse/test_gluon_backward.py tests/kernels/block_sparse/test_pieces.py \
	tests/kernels/router/test_triton.py tests/kernels/sla/test_triton.py tests/kernels/sla/test_gluon.py \
	tests/kernels/tail/test_triton.py tests/kernels/tail/test_gluon.py tests/methods/sla/test_triton.py tests/pipelines/test_rows.py \
	tests/test_architecture.py
BIN := $(VENV)/bin
PACKAGE := $(VENV)/.package
INSTALLED := $(VENV)/.installed
EDITABLE := .
# pip would compile every module, which is over a third of its time; Python compiles those that are imported, once.
PIP_INSTALL := $(BIN)/python -m pip install --no-compile --constraint $(VENV)/constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test check lint types layout docs support kernels bench eval clean

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

install: $(INSTALLED)

# torch comes first, so that no other package chooses its build. A CUDA build of torch asks for a Triton of its own;
# where it does, that one stays. A Python without ensurepip gets its environment from virtualenv.
$(PACKAGE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dit_accel needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version). Say make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m pip install --target $(VENV)-bootstrap virtualenv && \
		PYTHONPATH=$(VENV)-bootstrap $(PYTHON) -m virtualenv --clear $(VENV); }
	grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	$(PIP_INSTALL) torch setuptools wheel
	$(BIN)/python -m pip show --quiet triton 2>/dev/null || cp constraints.txt $(VENV)/constraints.txt
	$(PIP_INSTALL) --no-build-isolation --editable '$(EDITABLE)'
	@echo '$(EDITABLE)' > $@

# On a fresh machine the rule above installs the extras too, in one go.
$(INSTALLED): EDITABLE := .[dev]
$(INSTALLED): $(PACKAGE)
	grep -qF '$(EDITABLE)' $(PACKAGE) || $(PIP_INSTALL) --no-build-isolation --editable '$(EDITABLE)'
	@touch $@

demo: $(PACKAGE)
	$(BIN)/dit-accel generate --model demo $(DEMO_SETTINGS) --level $(DEMO_LEVEL) --compare --output $(OUTPUT)/demo.mp4

# What measures time runs alone and first, and only its files are imported; then the rest, a process for each core.
test: $(INSTALLED)
	@status=0; \
	$(BIN)/python -m pytest -m timing $$(grep -rl --include='test_*.py' 'mark\.timing' tests) $(PYTEST_FLAGS) || status=$$?; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '$(TESTS)' $(PARALLEL) $(PYTEST_FLAGS) || status=$$?; \
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not thorough' $(PARALLEL) $(INTERPRETED) || status=$$?; \
	exit $$status

# The tests that the table of families, methods and what they go with stands on, and the table.
support: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) --junitxml=$(OUTPUT)/support.xml tests/pipelines tests/test_accelerator.py
	$(BIN)/python tests/support_table.py $(OUTPUT)/support.xml

kernels: $(INSTALLED) $(OLDEST)
	@status=0; \
	$(BIN)/python -m tools.kernels.ahead_of_time $(KERNELS_FLAGS) || status=$$?; \
	PYTHONPATH=$(OLDEST) $(BIN)/python -m tools.kernels.ahead_of_time $(OLDEST_FLAGS) || status=$$?; \
	exit $$status

# No torch belongs to it: compilers need none, and the kernels' modules import the one in .venv.
$(OLDEST): | $(INSTALLED)
	rm -rf $@-new
	$(BIN)/python -m pip install --quiet --no-deps --target $@-new triton==$(OLDEST_TRITON)
	mv $@-new $@

check: lint types layout

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

layout: $(INSTALLED)
	$(BIN)/python -m pytest -q -m 'not timing' tests/test_layout.py

# The variable silences an announcement of the theme's authors.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir $(abspath $(OUTPUT))/manual

bench: $(INSTALLED)
	$(BIN)/dit-accel bench --output $(OUTPUT)/bench.jsonl

eval: $(INSTALLED)
	$(BIN)/dit-accel eval --suite demo --output $(OUTPUT)/eval
	$(BIN)/python -m tools.results_page $(OUTPUT)/eval

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
