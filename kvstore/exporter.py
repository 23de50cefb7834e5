"""The document of `kvstore.metrics` as Prometheus text, on a page of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

# Prometheus name, help, path in a tenant's document. Those that end in _total are counters.
_TENANT = (
    ("kvstore_blocks_asked_total", "Blocks asked for.", ("blocks", "asked")),
    ("kvstore_blocks_hit_total", "Blocks served.", ("blocks", "hit")),
    ("kvstore_blocks_miss_total", "Blocks not served.", ("blocks", "miss")),
    ("kvstore_blocks_stored_total", "Blocks stored.", ("blocks", "stored")),
    ("kvstore_blocks_refused_total", "Blocks refused for want of room.", ("blocks", "refused")),
    ("kvstore_blocks_quarantined", "Slots of vanished writers.", ("blocks", "quarantined")),
    ("kvstore_sessions", "Connected clients.", ("sessions",)),
    ("kvstore_leases", "Leases held by clients.", ("leases",)),
    ("kvstore_saved_tokens_total", "Tokens whose prefill was saved.", ("saved", "tokens")),
    (
        "kvstore_saved_prefill_seconds_total",
        "Prefill time saved, where clients tell their speed.",
        ("saved", "prefill_seconds"),
    ),
)
_TIER = (
    ("kvstore_tier_capacity_bytes", "Size of the tier.", "capacity_bytes"),
    ("kvstore_tier_used_bytes", "Bytes of taken slots.", "used_bytes"),
    ("kvstore_tier_blocks", "Resident blocks.", "blocks"),
    ("kvstore_tier_hits_total", "Blocks served from the tier.", "hits"),
    ("kvstore_tier_promoted_blocks_total", "Blocks moved up from the tier.", "promoted"),
    ("kvstore_tier_spilled_blocks_total", "Blocks moved down into the tier.", "spilled"),
    ("kvstore_tier_corrupt_blocks_total", "Blocks that did not verify.", "corrupt"),
    ("kvstore_tier_failed_operations_total", "I/O errors.", "failed"),
    ("kvstore_tier_fenced", "1 while the tier is not used because it fails.", "fenced"),
    ("kvstore_tier_read_bytes_total", "Bytes of blocks read.", "read_bytes"),
    ("kvstore_tier_written_bytes_total", "Bytes of blocks written.", "written_bytes"),
)


class Collector:
    """Turns the document into metric families at every scrape. `fetch` may be called by any thread
    and gives the parsed document."""

    def __init__(self, fetch: Callable[[], dict[str, Any]]) -> None:
        self._fetch = fetch

    def collect(self) -> Iterator[Metric]:
        """Called by the exporter."""
        tree = self._fetch()
        tenants: dict[str, Any] = tree["tenants"]
        yield _family("kvstore_uptime_seconds", "Since the start.", (), [((), tree["uptime_s"])])
        for name, text, path in _TENANT:
            yield _family(
                name, text, ("tenant",), [((t,), _at(doc, path)) for t, doc in tenants.items()]
            )
        tiers = [(t, n, tier) for t, doc in tenants.items() for n, tier in doc["tiers"].items()]
        for name, text, key in _TIER:
            rows = [((t, n), float(tier[key])) for t, n, tier in tiers]
            yield _family(name, text, ("tenant", "tier"), rows)
        yield _family(
            "kvstore_tier_evicted_blocks_total",
            "Blocks that left the tier.",
            ("tenant", "tier", "reason"),
            [((t, n, r), count) for t, n, tier in tiers for r, count in tier["evicted"].items()],
        )
        yield _family(
            "kvstore_tier_latency_seconds",
            "Time to serve from DRAM, time to load from NVMe.",
            ("tenant", "tier", "quantile"),
            [
                ((t, n, quantile), tier["latency_ms"][key] / 1e3)
                for t, n, tier in tiers
                for quantile, key in (("0.5", "p50"), ("0.99", "p99"))
                if tier["latency_ms"][key] is not None
            ],
        )
        yield from _worth(tenants)
        yield _family(
            "kvstore_requests_total",
            "Requests by verb.",
            ("tenant", "verb"),
            [((t, verb), n) for t, doc in tenants.items() for verb, n in doc["requests"].items()],
        )
        yield _family(
            "kvstore_errors_total",
            "Refused requests by error.",
            ("tenant", "error"),
            [((t, error), n) for t, doc in tenants.items() for error, n in doc["errors"].items()],
        )
        yield _family(
            "kvstore_limited_total",
            "Requests cut short, refused or read later because of a limit.",
            ("tenant", "limit"),
            [((t, limit), n) for t, doc in tenants.items() for limit, n in doc["limited"].items()],
        )


def serve(address: tuple[str, int], fetch: Callable[[], dict[str, Any]]) -> Callable[[], None]:
    """Serve the page on its own thread; returns how to stop. OSError when the address is taken."""
    registry = CollectorRegistry()
    registry.register(Collector(fetch))
    server, thread = start_http_server(address[1], address[0], registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def _worth(tenants: dict[str, Any]) -> Iterator[Metric]:
    """Causes of misses, the ceiling, wear; what is not known yet has no sample."""
    causes = [(t, doc["blocks"]["miss_causes"]) for t, doc in tenants.items()]
    yield _family(
        "kvstore_missed_blocks_total",
        "Blocks not served, by cause.",
        ("tenant", "reason"),
        [((t, reason), count) for t, found in causes for reason, count in found.items()],
    )
    known = [
        (
            "kvstore_ceiling_hit_ratio",
            "Share of the blocks asked for that a cache that never forgets would have served.",
            {t: doc["ceiling_hit_ratio"] for t, doc in tenants.items()},
        ),
        (
            "kvstore_nvme_budget_bytes_per_day",
            "What nvme.write_budget allows to be written.",
            {t: doc["wear"]["budget_bytes_per_day"] for t, doc in tenants.items()},
        ),
    ]
    for name, text, numbers in known:
        rows = [((t,), number) for t, number in numbers.items() if number is not None]
        yield _family(name, text, ("tenant",), rows)


def _at(tree: Any, path: Iterable[str]) -> float:
    for step in path:
        tree = tree[step]
    return float(tree)


def _family(
    name: str, text: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], float]]
) -> Metric:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(name.removesuffix("_total"), text, labels=labels)
    for values, number in rows:
        family.add_metric(values, number)
    return family
