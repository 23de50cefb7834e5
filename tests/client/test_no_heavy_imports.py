"""What an engine's process loads with the client: protobuf and numpy, nothing of the daemon."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = (
    "grpc",
    "torch",
    "cupy",
    "lmdb",
    "uvloop",
    "asyncio",
    "pydantic",
    "xxhash",
    "structlog",
    "prometheus_client",
    "kvstore.store",
    "kvstore.service",
    "kvstore.config",
    "kvstore.daemon",
    "kvstore.tiers",
    "kvstore.eviction",
)


def loaded(program: str) -> set[str]:
    """The modules that a fresh interpreter has after a program."""
    ending = "\nimport sys; sys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program + ending],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return set(done.stdout.split())


def test_the_client_is_light() -> None:
    found = loaded("import kvstore.client")
    assert {"kvstore.client.wire", "google.protobuf", "numpy"} <= found
    assert sorted(found & set(HEAVY)) == []
    ours = {name for name in found if name.startswith("kvstore.") and name.count(".") == 1}
    allowed = ("client", "protos", "errors", "mapping", "types", "paths", "spin")
    assert ours <= {f"kvstore.{name}" for name in allowed}


@pytest.mark.parametrize("name", HEAVY)
def test_the_list_names_modules_that_exist(name: str) -> None:
    """Else a module that was renamed would be looked for in vain."""
    if name != "cupy":  # only where there is a GPU
        assert importlib.util.find_spec(name) is not None
