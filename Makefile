# make help says what there is. Every target sets up .venv first, once.
PYTHON  ?= python3
DATASET ?= digits
TORCH   ?= $(shell grep '^torch==' constraints.txt)

PY    := .venv/bin/python
STAMP := .venv/installed

# Prints the folder that holds a torch >= 2.13, or fails.
FIND_TORCH := import pathlib, torch; \
	assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13); \
	print(pathlib.Path(torch.__file__).parents[1])

.DELETE_ON_ERROR:
.PHONY: help setup study results headline entropy family peers networks runtime docs c test test-slow bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "PYTHON=python3.12   the interpreter to build .venv from (3.11 or newer; its torch >= 2.13 is reused)"
	@echo "TORCH=torch==...    the torch to install where there is none (now $(TORCH))"
	@echo "DATASET=mnist       data of the study (now $(DATASET)); BITBOOK_DATA=FOLDER holds its files, if you have them"
	@echo "WORKERS=4 ARGS=...  processes of the study, and any further options of 'bitbook study'"

setup: $(STAMP) ## build .venv and install everything

study: $(STAMP) ## run the study on DATASET; report, tables and figures go to runs/
	.venv/bin/bitbook study --dataset $(DATASET) --out runs/$(DATASET) $(if $(WORKERS),--workers $(WORKERS)) $(ARGS)

results: ## run the whole MNIST experiment and write docs/results/ from it
	$(MAKE) study DATASET=mnist
	$(PY) -m bitbook.study.document runs/mnist docs/results --readme README.md
	$(PY) docs/tables.py

headline: ## how few bytes keep an accuracy: five seeds of each row, and docs/results/headline.md
	$(MAKE) study DATASET=headline
	$(PY) -m bitbook.study.priced.headline write runs/headline docs/results
	$(PY) docs/tables.py

entropy: ## every trained file at fixed width and entropy-coded, and docs/results/entropy.md
	$(MAKE) study DATASET=entropy
	$(PY) -m bitbook.study.priced.entropy runs/entropy docs/results
	$(PY) docs/tables.py

family: ## every quantizer at equal bytes, on MNIST and a ResNet-20 (BITBOOK_DATA), and docs/results/family.md
	$(MAKE) study DATASET=family
	$(PY) -m bitbook.study.family.document runs/family docs/results
	$(PY) docs/tables.py

peers: $(STAMP) ## other tools on the same public networks (BITBOOK_DATA), each installed in .bench/, and docs/results/peers.md
	$(PY) -m bench.peers --write docs/results
	$(PY) docs/tables.py

networks: ## what a byte budget costs on public networks (BITBOOK_DATA), and docs/results/networks.md
	$(MAKE) study DATASET=networks
	$(PY) -m bitbook.study.networks.document runs/networks docs/results
	$(PY) docs/tables.py

docs: $(STAMP) ## the tables of the pages from docs/results, the notebook from its script, and HTML in docs/_build
	$(PY) docs/tables.py
	$(PY) docs/picture.py
	$(PY) -m jupytext --quiet --update --to ipynb examples/from_notebook_to_bitbook.py
	$(PY) -m sphinx -b html -n -W --keep-going -q docs docs/_build
	@echo "docs/_build/index.html"

c: build/unbitbook ## the decoder without Python, a command that lists and unpacks files (c/README.md)

build/unbitbook: c/unbitbook.c c/bitbook.c c/bitbook.h
	@mkdir -p build
	$(CC) -std=c99 -Wall -Wextra -pedantic -O2 -o $@ c/unbitbook.c c/bitbook.c -lm

runtime: $(STAMP) ## latency and memory of packed models beside dense ones and other tools, and docs/results/runtime.md
	$(PY) -m bench.runtime --write docs/results

test: $(STAMP) ## lint, format check, types, and the quick tests
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright
	$(PY) -m pytest -n 2 --timeout 120 $(ARGS)

test-slow: $(STAMP) ## the tests that train for minutes
	$(PY) -m pytest -m slow --timeout 1800 $(ARGS)

bench: $(STAMP) ## every benchmark, one after the other
	@set -e; for file in bench/*.py; do name=$$(basename $$file .py); echo "== $$name"; $(PY) -m bench.$$name; done

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# An installed torch is reused by naming its folder in a .pth file, which, unlike --system-site-packages, also
# works when PYTHON is itself a virtual environment.
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "bitbook needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)." \
	         "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@if folder=$$($(PYTHON) -c '$(FIND_TORCH)' 2>/dev/null); then \
	    echo "Reusing the torch in $$folder"; \
	    echo "$$folder" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/reused-torch.pth"; \
	fi

$(STAMP): pyproject.toml constraints.txt | .venv/bin/pip
	@grep -v '^torch==' constraints.txt > .venv/constraints.txt
	@$(PY) -c '$(FIND_TORCH)' >/dev/null 2>&1 || { \
	    echo "Installing $(TORCH): $(PYTHON) has none. The CPU build is a download of about 200 MB, 750 MB"; \
	    echo "unpacked; the default build for Linux is for CUDA and takes several GB. To choose, stop this and"; \
	    echo "run make again with PIP_INDEX_URL or PIP_FIND_LINKS naming the place of the build that you want,"; \
	    echo "TORCH='$(TORCH)+cpu' if that place has several, or PYTHON naming an interpreter that has torch."; \
	    $(PY) -m pip install -c .venv/constraints.txt '$(TORCH)'; }
	$(PY) -m pip install -q -c .venv/constraints.txt -e '.[dev]'
	@touch $@
