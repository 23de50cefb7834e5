"""The Prometheus page of a real daemon: what promtool checks, and that it agrees with stats."""

from __future__ import annotations

import socket
import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from kvstore.client import connect
from tests.kvstored import BLOCK, DEADLINE_S, fill, hashes, running


def test_the_metrics_page_tells_what_stats_tell() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    with running(listen) as daemon, connect(daemon.socket()) as client:
        cache = fill(client, "metrics", 4)
        cache.get([*hashes(3), b"absent!!" * 2], [bytearray(BLOCK) for _ in range(4)])
        client.clear()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{listen}/metrics", timeout=DEADLINE_S) as page:
            assert page.headers["Content-Type"].startswith("text/plain")
            shown = page.read().decode()
        tree = client.stats()
    families = list(text_string_to_metric_families(shown))
    samples = [sample for family in families for sample in family.samples]
    check_exposition(families)

    def value(name: str, **labels: str) -> float:
        (found,) = (s.value for s in samples if s.name == name and s.labels == labels)
        return float(found)

    for tenant in ("default", "other"):
        asked, hit, miss = (
            value(f"kvstore_blocks_{what}_total", tenant=tenant)
            for what in ("asked", "hit", "miss")
        )
        assert asked == hit + miss
        assert asked == (4 if tenant == "default" else 0)
    told = tree.tenants.default.tiers.dram
    assert value("kvstore_tier_hits_total", tenant="default", tier="dram") == told.hits == 3
    assert (
        value("kvstore_tier_capacity_bytes", tenant="default", tier="dram") == told.capacity_bytes
    )
    causes = [s.value for s in samples if s.name == "kvstore_missed_blocks_total"]
    assert sum(causes) == value("kvstore_blocks_miss_total", tenant="default") == 1
    assert (
        value("kvstore_ceiling_hit_ratio", tenant="default")
        == tree.tenants.default["ceiling_hit_ratio"]
    )
    evicted = "kvstore_tier_evicted_blocks_total"
    assert value(evicted, tenant="default", tier="dram", reason="cleared") == 4
    assert value(evicted, tenant="default", tier="nvme", reason="cleared") == 4


def check_exposition(families: list[Any]) -> None:
    """What promtool would find fault with, and the names and labels of the contract."""
    assert families
    seen = set()
    for family in families:
        assert family.documentation and family.type in ("counter", "gauge"), family.name
        for sample in family.samples:
            assert sample.name.startswith("kvstore_")
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            assert not sample.name.removesuffix("_total").endswith(("_ms", "_mib", "_count"))
            assert set(sample.labels) <= {"tenant", "tier", "reason", "quantile", "verb", "error"}
            assert all(sample.labels.values()), "an empty label is no label"
            assert 0 <= sample.value < float("inf")
            one = (sample.name, *sorted(sample.labels.items()))
            assert one not in seen, f"{one} comes twice"
            seen.add(one)
    assert {name for name, *_ in seen} >= {"kvstore_uptime_seconds", "kvstore_requests_total"}
