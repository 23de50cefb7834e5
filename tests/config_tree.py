"""A configuration for tests, as its file would be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def config_tree(folder: Path) -> dict[str, Any]:
    """A small one that every host can run, with what it makes in this folder."""
    return {
        "daemon": {"run_dir": "/run/kv"},
        "dram": {"path": str(folder / "shm"), "size": "64 MiB"},
        "nvme": {"paths": [str(folder / "disk")], "size": "128 MiB"},
    }
