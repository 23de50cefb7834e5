"""What is installed: every module of ours under kvstore/, and nothing beside it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILERS = {"the system's": {}, "none": {"CC": "/nonexistent"}}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_wheel_holds_kvstore_alone_and_whole(tmp_path: Path, compiler: str) -> None:
    # Built from a copy: a `build` folder left in the tree would put deleted modules into wheels.
    tree = tmp_path / "tree"
    ignored = (".*", "build", "*.egg-info", "tests", "docs", "__pycache__", "*.so")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*ignored))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(tree)]
    subprocess.run(command, check=True, timeout=120, env=os.environ | COMPILERS[compiler])
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    buildable = shutil.which("cc") is not None and platform.machine() == "x86_64"
    compiled = compiler != "none" and buildable
    assert ("kvstore/client/streaming.abi3.so" in names) == compiled
    assert "-cp311-abi3-" in wheel.name, "one wheel is for all versions of Python"
    assert all(name.startswith("kvstore/") for name in names)
    modules = {f"kvstore/{path.name}" for path in (ROOT / "kvstore").glob("*.py")}
    for room in ("tiers", "eviction", "client", "protos"):
        modules |= {f"kvstore/{room}/{path.name}" for path in (ROOT / room).glob("*.py")}
    assert modules <= names, "pyproject.toml leaves a module out"
    assert {"kvstore/py.typed", "kvstore/protos/kvstore.proto"} <= names
    units = {f"kvstore/systemd/{path.name}" for path in (ROOT / "kvstore" / "systemd").iterdir()}
    assert units and units <= names, "pyproject.toml leaves a unit out"
