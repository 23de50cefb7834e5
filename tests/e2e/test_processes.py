"""Several client processes at once over overlapping chains: no wrong byte, no lease left."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import ROOT

PROCESSES, SECONDS = 4, 2.0


@pytest.mark.parametrize("policy", ["through", "on-evict"])
def test_many_processes(make_daemon: MakeDaemon, policy: str) -> None:
    """DRAM holds a fraction of the working set and NVMe not all of it, so that everything happens:
    spills, loads, evictions from both, slabs that change hands, refusals."""
    daemon = make_daemon(
        dram={"size": "8 MiB"}, nvme={"size": "10 MiB", "write_policy": policy}
    ).start()
    clients = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.e2e.churn",
                str(daemon.socket("front" if number == 3 else "hatch")),
                str(number),
                str(SECONDS),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(PROCESSES)
    ]
    stored = 0
    try:
        for process in clients:
            output, problems = process.communicate(timeout=60)
            assert process.returncode == 0, problems.decode()
            counts = json.loads(output)
            assert counts.get("wrong", 0) == 0
            assert counts["read"] > 100, "it has hardly run"
            stored += counts["stored"]
    finally:
        for process in clients:
            process.kill()
            process.communicate()
    stats = daemon.settled()
    assert stats.leases == 0
    assert stats.sessions == 1, "only who asks is left"
    assert stats.blocks.quarantined == 0
    assert 0 < stats.blocks.stored <= stored, "less by those that were forgotten while written"
    assert stats.blocks.asked == stats.blocks.hit + stats.blocks.miss
    assert stats.tiers.nvme.hits + stats.tiers.dram.hits == stats.blocks.hit
    assert stats.tiers.dram.evicted["room"] > 0
    assert stats.tiers.nvme.promoted > 0
    assert stats.tiers.nvme.corrupt == 0
    with daemon.client() as client:
        checked, damaged, skipped = client.verify()
        assert (damaged, skipped) == (0, 0)
        assert checked == stats.tiers.nvme.blocks
        client.clear()
    stats = daemon.settled()
    assert stats.blocks.known == stats.tiers.dram.used_bytes == stats.tiers.nvme.used_bytes == 0
