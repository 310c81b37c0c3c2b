# What developers and CI run. Each target sets up what it needs, in .venv.

VENV := .venv
BIN := $(VENV)/bin

# Commands that the tests and benchmarks run, each with the Debian package that has it.
TEST_TOOLS := qemu-img:qemu-utils qemu-system-x86_64:qemu-system-x86 qemu-storage-daemon:qemu-system-common \
	nbdcopy:libnbd-bin nbdsh:python3-libnbd nbdkit:nbdkit nbd-client:nbd-client debugfs:e2fsprogs fio:fio certtool:gnutls-bin strace:strace
BENCH_TOOLS := qemu-img:qemu-utils nbdcopy:libnbd-bin nbdkit:nbdkit fio:fio openssl:openssl

PYTEST := $(BIN)/pytest -n 2

.PHONY: help demo check test bench crash clean lint tools

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-5s  %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/installed  ## list, serve and read back a snapshot of a shipped image; needs Python only
	@$(BIN)/python scripts/demo.py

check: lint  ## the linters and the quick tests, in about a minute
	$(PYTEST) -q -m 'not slow' --ignore tests/differential tests

test: tools lint  ## the linters and all tests; installs the Debian packages they need
	$(PYTEST) tests

bench: $(VENV)/installed  ## ratios against QEMU's tools; ARGS=--quick for smaller images
	@scripts/require-tools $(BENCH_TOOLS)
	@$(BIN)/python -m tests.benchmarks $(ARGS)

crash: $(VENV)/installed-dev  ## crash after crash of an image that is written; ARGS='--seconds 3600'
	$(BIN)/python -m tests.block.writing.crash $(ARGS)

clean:  ## remove all that these targets made
	rm -rf $(VENV) .bench-cache .guest .peers .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lint: $(VENV)/installed-dev
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports

tools:
	@scripts/require-tools $(TEST_TOOLS)
	@scripts/newer-peers .peers || { [ "$$CI" != true ] && echo "tests that need newer peers are skipped"; }
	@scripts/guest-kernel .guest || { [ "$$CI" != true ] && echo "tests that need a guest are skipped"; }

# What users install, then what developers need on top. Byte code as pip makes it, but not of an editable package: under
# PYTHONDONTWRITEBYTECODE each command would compile the sources anew.
$(VENV)/installed: pyproject.toml
	scripts/make-venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@$(BIN)/python -m compileall -q formats qcow2snap
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
