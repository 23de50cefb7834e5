"""What the daemon tells of itself: the document of `kvstore stats --json`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from kvstore.leases import Session
from kvstore.store import Store
from kvstore.types import HBM, NVME, TIERS
from kvstore.worth import DAY_S, RATE_AFTER_S


def tenant_document(store: Store, uptime_s: float) -> dict[str, Any]:
    """One tenant's part of the document. Plain numbers, strings and dicts."""
    counters, placement = store.counters, store.placement
    return {
        "requests": dict(counters.requests),
        "errors": dict(counters.errors),
        "limited": dict(counters.limited),
        "sessions": len(store.sessions),
        "leases": sum(len(session.leases) for session in store.sessions),
        "clients": [_client(session) for session in store.sessions],
        "blocks": {
            "asked": counters.asked,
            "hit": counters.hit,
            "miss": counters.miss,
            "miss_causes": dict(counters.misses),
            "stored": counters.stored,
            "refused": counters.refused,
            "aborted": counters.aborted,
            "quarantined": counters.quarantined,
            "known": len(store.catalog) - len(store.lending.rows),
            "lent": len(store.lending.rows),
        },
        "tiers": {name: _tier(store, number) for number, name in enumerate(TIERS)},
        "moves": {"spills": placement.spills, "loads": placement.loads, "due": placement.due()},
        "saved": {
            "tokens": counters.saved_tokens,
            "prefill_seconds": counters.saved_prefill_s,
        },
        "ceiling_hit_ratio": store.worth.ceiling_hit_ratio,
        "what_if": [dataclasses.asdict(one) for one in store.worth.what_if()],
        "sample": {"blocks": store.worth.curve.sampled, "rate": store.worth.curve.rate},
        "wear": _wear(store, uptime_s),
        "layouts": [dataclasses.asdict(entry.layout) for entry in store.catalog.layouts],
    }


def _wear(store: Store, uptime_s: float) -> dict[str, float | None]:
    """Bytes a day that are written to NVMe since the start, and that nvme.write_budget allows."""
    budget = store.placement.config.write_budget
    written = store.counters.nvme.written_bytes
    return {
        "written_bytes_per_day": written / uptime_s * DAY_S if uptime_s >= RATE_AFTER_S else None,
        "budget_bytes_per_day": None if budget is None else budget * DAY_S,
    }


def _client(session: Session) -> dict[str, Any]:
    leases = list(session.leases.values())
    return {
        "session": session.number,
        "name": session.name,
        "pids": sorted(session.pids),
        "leases": len(leases),
        "leased_bytes": sum(len(one.blocks) * one.entry.slot_bytes for one in leases),
    }


def document(
    tenants: dict[str, Store],
    nvme: dict[str, dict[str, Any]],
    *,
    uptime_s: float,
    generation: int,
    version: str,
) -> bytes:
    """The whole document as JSON; `nvme` is what a tenant's NVMe tier has to tell beside."""
    told = {name: tenant_document(store, uptime_s) for name, store in tenants.items()}
    for name, more in nvme.items():
        told[name]["tiers"]["nvme"] |= more
    tree = {
        "version": 1,
        "daemon": version,
        "uptime_s": uptime_s,
        "generation": generation,
        "tenants": told,
    }
    return json.dumps(tree).encode()


def _fenced(store: Store, number: int) -> bool:
    placement = store.placement
    if number == HBM:
        return bool(placement.mirror.fenced)
    return number == NVME and placement.health.present and not placement.health.ok


def _tier(store: Store, number: int) -> dict[str, Any]:
    counters, mirror = store.counters.tier(number), store.placement.mirror
    slots = (mirror, store.room.dram, store.room.nvme)[number]
    asked = store.counters.asked
    return {
        "capacity_bytes": slots.capacity_bytes,
        "used_bytes": slots.used_bytes,
        "blocks": mirror.blocks if number == HBM else store.room.resident(number),
        "hits": counters.hits,
        "hit_ratio": counters.hits / asked if asked else 0.0,
        "promoted": counters.promoted,
        "spilled": counters.spilled,
        "evicted": dict(counters.evicted),
        "corrupt": counters.corrupt,
        "failed": counters.failed,
        "fenced": _fenced(store, number),
        "read_bytes": counters.read_bytes,
        "written_bytes": counters.written_bytes,
        "latency_ms": {
            "p50": counters.latency.percentile_ms(0.50),
            "p99": counters.latency.percentile_ms(0.99),
        },
    }
