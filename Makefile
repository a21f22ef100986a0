# `make book` builds the book, `make test` runs the tests, `make help` lists the rest.

PYTHON ?= python3
# An extra package index for torch alone, such as one with wheels for CPUs only; see README.md.
TORCH_INDEX_URL ?=
# Model that the chapters run on: a name of lib/data/models.toml ("embedded" is the default one), a
# name on a model hub, or a folder.
export MODEL ?= embedded
# A reader's own tasks, if any: a CSV of subjects and answers, and one of wordings beside it; see
# README.md.
export TASKS ?=
export TEMPLATES ?=
# Idle threads spin for a moment only, then sleep: beside other work on the machine, sweeps that
# would take ten times as long do not.
export GOMP_SPINCOUNT ?= 10000
# Memory of large results is used again rather than handed back to the system each time: 5 % less.
export MALLOC_MMAP_THRESHOLD_ ?= 1000000000
export MALLOC_TRIM_THRESHOLD_ ?= 1000000000

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Names in one spelling, torch without its build tag, and without the CUDA parts that it brings.
TIDY = sed -E 's/[+]cpu$$//; /^(nvidia-|cuda-|triton==)/d' | \
  awk -F== '{ name = tolower($$1); gsub(/[_.]/, "-", name); print name "==" $$2 }' | LC_ALL=C sort
# A pinned list with the hashes of all files of each version. torch has none: which build of it is
# installed (for CPUs, CUDA or macOS; from another index or a local file) is the machine's choice, so
# it is installed first, by itself, and by version alone, with the parts that it brings.
HASH = build/lock/bin/uv pip compile --quiet --no-deps --universal --python-version 3.11.14 \
  --generate-hashes --no-header --no-annotate
TOOLS := build/tools
TOOLS_READY := $(TOOLS)/ready.stamp
MUTATE_VENV := build/mutate-venv
BENCH_VENV := build/bench-venv
COLAB_VENV := build/colab-venv
BOOK_READY := $(VENV)/book.stamp
TESTS_READY := $(VENV)/tests.stamp

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help book test test-reading test-colab test-atlas pdf summary picture floors atlas verify lint audit mutate bench model \
  architectures error-rates profile notebooks lock clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

book: model  ## build the book, executing the chapters that changed; TASKS=my-tasks.csv adds tasks of yours
	@$(if $(TASKS),$(BIN)/python -m lib.evidence.own_tasks)
	@$(BIN)/jupyter-book build . --warningiserror --keep-going
	@echo; cat _build/results/scorecard.txt
	@echo; echo "The book is at $(CURDIR)/_build/html/index.html"

test: $(TESTS_READY) model  ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-reading: $(TESTS_READY)  ## read the built book in a browser: offline, links, accessibility
	@$(BIN)/python -m pytest -m browser tests/test_pdf.py tests/test_reading.py

test-colab: $(TESTS_READY) $(COLAB_VENV)/ready.stamp  ## run every notebook as on Colab: bare, alone
	@$(BIN)/python -m pytest -m colab tests/test_colab.py

test-atlas: $(TESTS_READY) $(TOOLS_READY) model  ## run the atlas on two tiny models
	@$(BIN)/python -m pytest -m atlas tests/test_atlas.py

pdf: $(TESTS_READY)  ## print the book that was built last as one PDF
	@$(BIN)/python book/_ext/pdf.py

atlas: $(BOOK_READY) $(TOOLS_READY)  ## run the book on all models of workflow/config.yaml, one after the other
	@$(TOOLS)/bin/snakemake --snakefile workflow/Snakefile --cores 2

summary: $(TESTS_READY)  ## print the answer at a glance on one sheet
	@$(BIN)/python book/_ext/pdf.py summary

floors: $(BOOK_READY)  ## draw lib's floors from the imports
	@$(BIN)/python book/_ext/floors.py

picture: $(BOOK_READY)  ## take the README's picture from the built book
	@$(BIN)/python book/_ext/picture.py

verify: $(BOOK_READY)  ## compare the results with the recorded ones; UPDATE=1 records them anew
	@$(BIN)/python -m lib.evidence.verify $(if $(filter-out 0,$(UPDATE)),--update)

lint: $(TESTS_READY)  ## check style and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

audit: $(TOOLS_READY)  ## look for known weaknesses in the workflow and in pinned packages (online)
	@$(TOOLS)/bin/zizmor --offline --pedantic .github/workflows
	@$(TOOLS)/bin/pip-audit --strict --progress-spinner off --disable-pip --no-deps \
	  --requirement requirements.txt --requirement requirements-tests.txt 2> $(TOOLS)/audit.log || { \
	  if grep -qE 'ConnectionError|ProxyError|Max retries|ConnectTimeout' $(TOOLS)/audit.log; then \
	    echo "The list of known weaknesses cannot be reached: 'make audit' needs the network." >&2; \
	  else cat $(TOOLS)/audit.log >&2; fi; exit 1; }

mutate: $(MUTATE_VENV)/ready.stamp  ## change lib line by line and see whether the tests notice
	@OMP_NUM_THREADS=1 $(MUTATE_VENV)/bin/mutmut run --max-children 1 $(MUTANTS)

model: $(BOOK_READY)  ## fetch the model, once; MODEL=gemma-3-270m fetches another
	@$(BIN)/python -m lib.engine.weights "$(MODEL)"

notebooks: $(BOOK_READY)  ## write the notebooks for Colab, without outputs, from the chapters
	@$(BIN)/python book/_ext/setup_cells.py

bench: $(BENCH_VENV)/bench.stamp  ## time the engine beside other libraries; QUICK=1 only tries them
	@$(BENCH_VENV)/bin/python -m benchmarks $(if $(filter-out 0,$(QUICK)),--quick)

profile: model  ## see where the chapters' time goes, into benchmarks/chapters.json
	@$(BIN)/python -m benchmarks.chapters

error-rates: $(TESTS_READY)  ## simulate how often verdicts err, into lib/data/error-rates.csv
	@OMP_NUM_THREADS=1 $(BIN)/python tests/error_rates.py

architectures: $(TESTS_READY)  ## try the engine on every causal architecture of transformers
	@PYTHONPATH=.:tests $(BIN)/python tests/architectures.py

lock:  ## resolve requirements*.in into requirements*.txt
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --requirement requirements.in
	@echo '# Resolved from requirements.in by `make lock`, for Python 3.11 to 3.13.' > requirements.txt
	build/lock/bin/pip freeze --all --exclude pip | $(TIDY) >> requirements.txt
	build/lock/bin/pip install --requirement requirements-tests.in --constraint requirements.txt
	@echo '# Resolved from requirements-tests.in by `make lock`, on top of requirements.txt.' \
	  > requirements-tests.txt
	build/lock/bin/pip freeze --all --exclude pip | $(TIDY) | grep -vxFf requirements.txt \
	  >> requirements-tests.txt
	build/lock/bin/pip install --constraint requirements-tools.txt uv
	grep -v '^torch==' requirements.txt | $(HASH) - --output-file build/lock/hashed.txt
	@echo '# requirements.txt without torch, with hashes; by `make lock`.' > requirements-hashed.txt
	cat build/lock/hashed.txt >> requirements-hashed.txt
	$(HASH) requirements-tests.txt --output-file build/lock/tests-hashed.txt
	@echo '# requirements-tests.txt with hashes; by `make lock`.' > requirements-tests-hashed.txt
	cat build/lock/tests-hashed.txt >> requirements-tests-hashed.txt

# An environment of its own, since the peers pin and bring what the book does not need.
$(BENCH_VENV)/bench.stamp: benchmarks/requirements.txt
	@rm -rf $(BENCH_VENV)
	@$(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check install \
	  $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) \
	  $$(grep '^torch==' benchmarks/requirements.txt)
	@$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check install \
	  --requirement benchmarks/requirements.txt
	@touch $@

# mutmut beside the packages of the tests, which stay as they are.
$(MUTATE_VENV)/ready.stamp: requirements-tools.txt $(TESTS_READY)
	@rm -rf $(MUTATE_VENV)
	@$(PYTHON) -m venv $(MUTATE_VENV)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(MUTATE_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests.pth"
	@$(MUTATE_VENV)/bin/python -m pip --quiet --disable-pip-version-check install \
	  $$(grep '^mutmut==' $<)
	@touch $@

# Colab's versions of what the chapters import, without the book's tools.
$(COLAB_VENV)/ready.stamp: tests/colab-requirements.txt requirements.txt
	@rm -rf $(COLAB_VENV)
	@$(PYTHON) -m venv $(COLAB_VENV)
	@$(COLAB_VENV)/bin/python -m pip --disable-pip-version-check install --quiet \
	  $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) \
	  $$(grep '^torch==' requirements.txt) --requirement tests/colab-requirements.txt
	@touch $@

clean:  ## remove what `make book` built; the environment and the model stay
	rm -rf _build

$(BOOK_READY): requirements.txt requirements-hashed.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "Python 3.11 to 3.13 is needed; '$(PYTHON)' is not. Name one: make book PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "Installing the environment into $(VENV) (some minutes, once)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) \
	  $$(grep '^torch==' requirements.txt)
	@$(PIP) install --require-hashes --requirement requirements-hashed.txt
	@touch $@

# While this runs the environment counts as unfinished: cut off halfway, it is made anew.
$(TESTS_READY): requirements-tests-hashed.txt $(BOOK_READY)
	@echo "Installing what the tests need"
	@mv $(BOOK_READY) $(VENV)/unfinished
	@$(PIP) install --require-hashes --no-deps --requirement requirements-tests-hashed.txt || { \
	  mv $(VENV)/unfinished $(BOOK_READY); exit 1; }
	@mv $(VENV)/unfinished $(BOOK_READY)
	@touch $@

$(TOOLS_READY): requirements-tools.txt
	@rm -rf $(TOOLS)
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip --quiet --disable-pip-version-check install --requirement $<
	@touch $@
