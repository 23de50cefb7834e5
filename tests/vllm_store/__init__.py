"""The vLLM connector against real engines: run with `python -m tests.vllm_store`."""
