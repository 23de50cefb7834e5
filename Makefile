# One command each; `make test` on a fresh machine sets everything up first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: soak-faults soak-power soak-flips setup demo test bench proto clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(RUN) -m tests.demo

test: setup
	$(RUN) -m tests

bench: setup
	$(VENV)/bin/kvstore bench

# Every operation of the NVMe tier fails in every way; about ten minutes.
soak-faults: setup
	$(RUN) -m tests.faults.sweep

# The power goes at every write and every sync.
soak-power: setup
	$(RUN) -m tests.faults.power

# 100,000 bits flip in files and arena.
soak-flips: setup
	$(RUN) -m tests.faults.flips

# The oldest generator on purpose: its output loads under every newer protobuf runtime.
proto: setup
	$(RUN) -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. kvstore/protos/kvstore.proto

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
