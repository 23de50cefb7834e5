"""The benchmark runs to its end and reports every figure; how fast it was is nobody's test."""

from __future__ import annotations

import json
import subprocess
import sys


def test_the_quick_benchmark_reports_all_figures() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvstore.cli", "bench", "--quick", "--json"],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr  # 1: a bar was missed on this machine
    tree = json.loads(done.stdout)
    assert tree["version"] == 1 and tree["quick"] is True
    assert len(tree["sha256"]) == 64
    names = " | ".join(figure["name"] for figure in tree["figures"])
    for word in ("put 64", "get 64", "put 1", "get 1", "CPU time", "acquire + release of 256"):
        assert word in names
    for word in (
        "p99",
        "spill of",
        "reload of",
        "resident memory",
        "until the first is served",
        "relevance",
    ):
        assert word in names
    assert len(tree["figures"]) == 14
    assert all(figure["value"] > 0 for figure in tree["figures"])
    assert [
        figure["name"].split(" of")[0] for figure in tree["figures"] if figure["ok"] is None
    ] == ["put and spill"]
    assert tree["ok"] == all(figure["ok"] is not False for figure in tree["figures"])
    assert done.returncode == (0 if tree["ok"] else 1)
