# All of it works without root, on Python 3.11 or later and make alone; the rest is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
# For the program: make run ARGS="--port 8080 -l debug"; for pytest: make test ARGS="-k sqlite -x";
# for the benchmark: make bench ARGS="--rounds 3 --only put,fetch".
ARGS ?=
# Most tests wait most of the time: two cores are enough for three processes. The tests of one file stay together, for
# what they share; files with few tests come in their turn, not last, for they may take long. ARGS="-n 0" does without,
# as --pdb must.
WORKERS = -n 3 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run test release-test bench lint types clean

help: ## say what can be made
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

run: $(VENV)/.installed ## install the service, and serve on port 20000 with everything in ./imgsvc-data
	$(VENV)/bin/imgsvc serve $(ARGS)

test: $(VENV)/.installed-dev ## run the tests
	$(VENV)/bin/python -m pytest $(WORKERS) $(ARGS)

release-test: $(VENV)/.installed-dev ## run the long tests too, which a release must pass
	$(VENV)/bin/python -m pytest -m "release or not release" $(ARGS)

bench: $(VENV)/.installed-dev ## measure how fast it is, with nginx and wrk beside it (tests/bench/README.md)
	$(VENV)/bin/python -m tests.bench $(ARGS)

lint: $(VENV)/.installed-dev ## look for mistakes, and for code that is formatted another way
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: $(VENV)/.installed-dev ## check the types
	$(VENV)/bin/mypy

clean: ## remove what was made here, but no images
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis dist
	find imgsvc tests -name __pycache__ -prune -exec rm -rf {} +

# Stamps, so that the second time is quick. Editable, so that a change of the code needs no installing.
$(VENV)/.installed: $(VENV)/.made pyproject.toml
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed

# Debian has venv without the pip that it installs, unless python3-venv is there.
$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "make: there is no $(PYTHON); install Python 3.11 or later, or name one: make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: imgsvc needs Python 3.11 or later, and $(PYTHON) is older; name another: make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
