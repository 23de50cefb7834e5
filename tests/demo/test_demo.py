"""The demonstration in its small size, as a user would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(240)
def test_the_small_demo_holds(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.demo", "--small"],
        capture_output=True,
        text=True,
        timeout=220,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[-1] == "demo: ok"
    held = [line for line in lines if line.startswith("ok  ")]
    for name in ("restarted engine", "restarted daemon"):
        for promise in ("reload complete", "logits bitwise equal", "greedy tokens equal"):
            assert any(f"{name}: {promise}" in line for line in held), promise
    assert any("part from DRAM, part from NVMe" in line for line in held)
    folders = [Path(word) for word in lines[0].split() if word.startswith("/")]
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders), "a folder was left behind"
    assert [one.name for one in tmp_path.iterdir()] == []
