# One command each; `make test` on a fresh machine sets everything up first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: test-engines soak-kill soak-reboot soak-linear soak-restart soak-deaths soak-deadlines soak-faults soak-power soak-flips soak-simulate soak-brain soak-attribution setup demo test bench proto clean

# kvikio's own code is run by a test. All that it asks for is gigabytes of CUDA, and not needed there.
KVIKIO := kvikio-cu13==26.10.0 libkvikio-cu13==26.10.0 rapids-logger==0.3.0 \
	nvidia-cufile==1.20.0.107 cuda-pathfinder==1.9.0

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml client/streaming.c
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet --editable '.[dev]'
	$(RUN) -m pip install --quiet --no-deps $(KVIKIO)
	touch $@

demo: setup
	$(RUN) -m tests.demo

test: setup
	$(RUN) -m tests

# Real vLLM (every version, unless one is named) and SGLang engines with the connectors; needs some
# 8 GB of disk.
VLLM ?= all
test-engines: setup
	$(RUN) -m tests.vllm_store --version $(VLLM)
	$(RUN) -m tests.sglang_store

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

# Histories of the whole daemon from seeds, with a simulated clock; 5,000 take about ten minutes.
SEED ?= 0
SEEDS ?= 5000
STEPS ?= 500
soak-simulate: setup
	$(RUN) -m tests.simulate --seed $(SEED) --seeds $(SEEDS) --steps $(STEPS)

# Runs of the brain alone beside its model; 5,000 take about half an hour.
soak-brain: setup
	$(RUN) -m tests.brain --seed $(SEED) --seeds $(SEEDS)

# kill -9 of everybody under load, every byte checked.
ROUNDS ?= 1000
soak-kill: setup
	$(RUN) -m tests.soak.kill --rounds $(ROUNDS)

# The same with the arena removed at each kill.
soak-reboot: setup
	$(RUN) -m tests.soak.kill --rounds $(ROUNDS) --reboot

# Is there an order that explains what 16 threads saw?
soak-linear: setup
	$(RUN) -m tests.soak.linear

# From the start of the daemon to the first hit, with 8 GiB of blocks in memory.
soak-restart: setup
	$(RUN) -m tests.soak.restart

# 10,000 clients die; what they held is free, and the daemon has not grown.
soak-deaths: setup
	$(RUN) -m tests.soak.deaths

# No call outlasts its deadline while the daemon is stopped, dead, or starts again and again.
soak-deadlines: setup
	$(RUN) -m tests.soak.deadlines

# Every block asked for is counted once, whatever happens to it and to who asks.
soak-attribution: setup
	$(RUN) -m tests.soak.attribution

# The oldest generator on purpose: its output loads under every newer protobuf runtime.
proto: setup
	$(RUN) -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. kvstore/protos/kvstore.proto

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
