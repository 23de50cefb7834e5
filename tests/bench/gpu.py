"""Copies between a GPU and the store against the link's own limit, in one table.

    python -m tests.bench.gpu            the table, as text; under eight minutes
    python -m tests.bench.gpu --json     the same as JSON
    python -m tests.bench.gpu --rehearse everything in small, with a fake device

Each figure is the median over rounds that measure the limit and ours in turn. What a machine lacks
is a row without a figure that says what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvstore.bench_limits import RawDisk
from kvstore.client import Cache, Layout, connect
from kvstore.client.cuda import Direction
from kvstore.client.cuda_fragments import Breaks, Way
from kvstore.client.cuda_setup import Abilities
from kvstore.errors import KVStoreError
from kvstore.types import GIB, MIB
from tests.bench import ttft
from tests.bench.rig import FakeRig, GpuRig, Rig, free_bytes, scattered
from tests.e2e.harness import Daemon, hashes, wait_for

ROUNDS_MIN = 5  # of what takes seconds
BLOCKS_BAR, FRAGMENTS_BAR, FIRST_BAR, TTFT_BAR = 0.95, 0.80, 0.25, 14.0
IO_THREADS = 8
START_S = 240.0  # of a daemon that preallocates a large arena
FORCED = {
    Way.PLAIN: Breaks(0, 0),
    Way.BATCH: Breaks(0, 1 << 40),
    Way.GATHER: Breaks(1 << 40, 1 << 40),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line. `value` is None where it was not measured; without a bar it is for information."""

    name: str
    value: float | None
    unit: str = ""
    relation: str = ""
    bar: float | None = None
    detail: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the bar is met; None where there is nothing to say."""
        if self.value is None or self.bar is None:
            return None
        return self.value >= self.bar if self.relation == ">=" else self.value <= self.bar


def main(arguments: list[str] | None = None) -> int:
    """Print the table. Exit status 0 when every bar that could be measured is met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(arguments)
    rig: Rig
    try:
        rig = FakeRig() if given.rehearse else GpuRig()
    except (ImportError, KVStoreError) as error:
        sys.stderr.write(f"kvstore: nothing can be measured here: {error}\n")
        return 1
    rows: list[Row] = []
    for part in (contiguous, fragmented, registered, first_token):
        try:
            rows += part(rig)
        except Exception as error:  # whatever a machine lacks, the other rows are printed
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(Row(part.__name__, None, detail=f"not measured: {reason}"))
        sys.stderr.write(f"kvstore: {part.__name__}: done\n")
    rows.append(Row("D2D, blocks of the HBM tier", None, detail="not measured: no HBM tier yet"))
    ok = not any(row.ok is False for row in rows)
    if given.rehearse:
        rows = [dataclasses.replace(row, bar=None, relation="") for row in rows]
        ok = all(row.value is not None for row in rows[:-1])
    if given.json:
        tree = {
            "version": 1,
            "machine": f"{platform.platform()}, {rig.name}",
            "rehearsal": given.rehearse,
            "ok": ok,
            "rows": [dataclasses.asdict(row) | {"ok": row.ok} for row in rows],
        }
        sys.stdout.write(json.dumps(tree, indent=1) + "\n")
    else:
        _print(rig, rows)
    return 0 if ok else 1


def _print(rig: Rig, rows: list[Row]) -> None:
    sys.stdout.write(f"{rig.name}, {platform.platform()}\n")
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.3g} {row.unit}".strip()
        bar = "" if row.bar is None else f"{row.relation} {row.bar:g}"
        verdict = {None: "", True: "ok", False: "MISSED"}[row.ok]
        sys.stdout.write(f"{row.name:<58} {value:>10} {bar:>8} {verdict:<6} {row.detail}\n")


# -- the link ----------------------------------------------------------------------------------


def contiguous(rig: Rig) -> list[Row]:
    """Cache.put and Cache.get of whole blocks that are no neighbours on the device."""
    total = rig.blocks * rig.block_bytes
    with _daemon(3 * total) as daemon, daemon.client(timeout_s=30.0) as client:
        cache = client.open(_layout(rig, "contiguous"))
        cache.copier = rig.copier
        memory = rig.memory(rig.blocks, rig.block_bytes)
        want = rig.copy(memory)
        order = np.random.default_rng(2).permutation(rig.blocks)
        rows = [rig.rows(memory)[at] for at in order]
        keys = hashes(rig.blocks, "contiguous")
        _ready(rig, cache, rows, keys)

        def once() -> Iterator[tuple[str, float, float]]:
            cache.forget(keys)
            limit = rig.link(Direction.STORE, total)
            yield "D2H", limit, _timed(lambda: _all(cache.put(keys, rows).stored, rig.blocks))
            rig.clear(memory)
            limit = rig.link(Direction.LOAD, total)
            yield "H2D", limit, _timed(lambda: _all(cache.get(keys, rows).length, rig.blocks))
            _same(rig, memory, want)

        return _ratios(
            rig,
            once,
            total,
            BLOCKS_BAR,
            f"{{}} {rig.blocks} x {rig.block_bytes >> 10} KiB over one pinned copy".format,
        )


def fragmented(rig: Rig) -> list[Row]:
    """Blocks that have a piece in every layer: as the store chooses, and in each way."""
    total, size = rig.blocks * rig.block_bytes, rig.block_bytes // rig.layers
    with _daemon(3 * total) as daemon, daemon.client(timeout_s=30.0) as client:
        cache = client.open(_layout(rig, "fragmented"))
        cache.copier = rig.copier
        memory = rig.memory(rig.layers * rig.blocks, size)
        want = rig.copy(memory)
        order = np.random.default_rng(3).permutation(rig.blocks)
        keys = hashes(rig.blocks, "fragmented")
        whole = rig.rows(rig.memory(rig.blocks, rig.block_bytes))
        _ready(rig, cache, whole, keys)

        def store() -> None:
            reservation = cache.reserve(keys)
            offsets = [one.offset for one in reservation.extents]
            places = scattered(rig, memory, offsets, order)
            streams = [rig.stream()]
            done = rig.copier.store(reservation, places, deadline=_soon(), streams=streams)
            _all(len(offsets) * done, rig.blocks)

        def load() -> None:
            grant = cache.acquire(keys)
            places = scattered(rig, memory, list(grant.places.offsets), order)
            done = rig.copier.load(grant, places, deadline=_soon(), streams=[rig.stream()])
            _all(len(keys) * done, rig.blocks)

        def once() -> Iterator[tuple[str, float, float]]:
            cache.forget(keys)
            limit = rig.link(Direction.STORE, total)
            yield "D2H", limit, _timed(store)
            rig.clear(memory)
            limit = rig.link(Direction.LOAD, total)
            yield "H2D", limit, _timed(load)
            _same(rig, memory, want)

        text = (
            f"{{}} {rig.blocks} x {rig.layers} fragments of {size >> 10} KiB over one pinned copy"
        )
        found = _ratios(rig, once, total, FRAGMENTS_BAR, text.format)
        return found + _each_way(rig, once, total)


def _each_way(
    rig: Rig, once: Callable[[], Iterator[tuple[str, float, float]]], total: int
) -> list[Row]:
    """The same with each way alone, and where the borders between them were found."""
    state, found = rig.copier._state(0), []
    chosen = state.abilities
    for way, breaks in FORCED.items():
        if not {Way.BATCH: chosen.batches, Way.GATHER: chosen.gathers}.get(way, True):
            found.append(Row(f"{way.name.lower()} copies", None, detail="not measured: no such"))
            continue
        state.abilities = Abilities(
            way is Way.BATCH, way is Way.GATHER, dict.fromkeys(Direction, breaks)
        )
        text = f"  {{}} with {way.name.lower()} copies alone"
        found += _ratios(rig, once, total, None, text.format)
    state.abilities = chosen
    for direction, breaks in chosen.breaks.items():
        found.append(
            Row(
                f"  {direction.value}: the kernel below",
                breaks.gather_bytes / 1024,
                "KiB",
                detail=f"plain copies from {breaks.plain_bytes / 1024:g} KiB on",
            )
        )
    return found


def registered(rig: Rig) -> list[Row]:
    """A large arena is registered beside the copies, which do not wait for it."""
    ratios, first_s, speed = [], [], []
    rounds = 1 if isinstance(rig, FakeRig) else ROUNDS_MIN
    with _daemon(rig.arena_bytes) as daemon:
        memory = rig.memory(8, rig.block_bytes)
        for turn in range(rounds):
            with daemon.client(timeout_s=60.0) as client:
                cache = client.open(_layout(rig, "registered"))
                cache.copier = rig.copier
                keys = hashes(8, f"{turn}")
                took = _timed(lambda: _all(cache.put(keys, rig.rows(memory)).stored, 8))  # noqa: B023
                registration = _registered(rig, cache)
            first_s.append(took)
            ratios.append(took / max(1e-9, registration.seconds))
            speed.append(registration.ready_bytes / GIB / max(1e-9, registration.seconds))
            wait_for(registration.ended.is_set, "the arena to be given back", 120.0)
    return [
        Row(
            f"first put, over registering {rig.arena_bytes / GIB:.3g} GiB",
            statistics.median(ratios),
            relation="<=",
            bar=FIRST_BAR,
            detail=(
                f"put {statistics.median(first_s) * 1e3:.3g} ms, registered at "
                f"{statistics.median(speed):.3g} GiB/s, {rounds} times"
            ),
        )
    ]


# -- the first token ---------------------------------------------------------------------------


def first_token(rig: Rig) -> list[Row]:
    """A prompt computed from nothing, over the same reloaded from DRAM, and from NVMe."""
    shape = ttft.TINY if isinstance(rig, FakeRig) else ttft.LLAMA_8B
    engine = ttft.Engine(shape, rig.copier, rig.stream())
    keys = hashes(shape.blocks, "prompt")
    total = shape.blocks * engine.layout.block_bytes
    rounds = 2 if isinstance(rig, FakeRig) else ROUNDS_MIN
    engine.cold()  # warms up
    found = []
    slab = max(16 * MIB, total // 16)
    with _daemon(total + total // 2 + 2 * slab, nvme_bytes=2 * total + 4 * slab) as daemon:
        with daemon.client(timeout_s=60.0) as client:
            cache = ttft.open_cache(client, engine)
            colds, ratios, details = [], [], []
            for _ in range(rounds):
                cold_s, token = engine.cold()
                cache.forget(keys)
                engine.store(cache, keys)
                warm_s, reload_s, again = engine.reloaded(cache, keys)
                _all(int(token == again), 1)
                colds.append(cold_s)
                ratios.append(cold_s / warm_s)
                details.append((warm_s, reload_s))
            warm_s, reload_s = (statistics.median(part) for part in zip(*details, strict=True))
            found.append(
                Row(
                    f"first token, {shape.prefix_tokens} tokens: cold over from DRAM",
                    statistics.median(ratios),
                    "x",
                    ">=",
                    TTFT_BAR,
                    f"cold {statistics.median(colds):.3g} s, reloaded {warm_s * 1e3:.3g} ms, of "
                    f"these {reload_s * 1e3:.3g} ms for {total / GIB:.3g} GiB, {rounds} times",
                )
            )
            client.drain(0)
        return found + _from_nvme(daemon, engine, keys, statistics.median(colds), token, rounds)


def _from_nvme(
    daemon: Daemon,
    engine: ttft.Engine,
    keys: list[bytes],
    cold_s: float,
    token: int,
    rounds: int,
) -> list[Row]:
    size, total = engine.layout.block_bytes, len(keys) * engine.layout.block_bytes
    if free_bytes(daemon.folder) < 2 * total:
        return [Row("first token, from NVMe", None, detail="not measured: the drive is full")]
    warms, shares = [], []
    disk = RawDisk(daemon.folder / "raw", len(keys), size, IO_THREADS)
    try:
        disk.write()
        for _ in range(rounds):
            daemon.stop()
            daemon.lose_memory()
            _start(daemon)
            with daemon.client(timeout_s=60.0) as client:
                limit_s = disk.read()
                cache = ttft.open_cache(client, engine)
                warm_s, reload_s, again = engine.reloaded(cache, keys)
            _all(int(token == again), 1)
            warms.append(warm_s)
            shares.append(limit_s / reload_s)
    finally:
        disk.close()
    return [
        Row(
            "first token: cold over from NVMe",
            cold_s / statistics.median(warms),
            "x",
            detail=f"reloaded {statistics.median(warms):.3g} s, {rounds} times",
        ),
        Row(
            "  the reload from NVMe against the drive's own reads",
            statistics.median(shares),
            detail=f"O_DIRECT: {disk.direct}, {total / GIB:.3g} GiB",
        ),
    ]


# -- parts -------------------------------------------------------------------------------------


def _daemon(dram_bytes: int, nvme_bytes: int = 0) -> Any:
    """One that runs, with an arena of at least that size."""
    daemon = Daemon(
        dram={"size": f"{max(8, -(-dram_bytes // MIB))} MiB"},
        nvme={"size": f"{-(-nvme_bytes // MIB)} MiB" if nvme_bytes else "0"},
    )
    _start(daemon)
    return daemon


def _start(daemon: Daemon) -> None:
    """Start it and wait longer than tests do: a large arena is preallocated first."""
    process = daemon.spawn()

    def answers() -> bool:
        assert process.poll() is None, f"the daemon ended: {daemon.log().strip()}"
        with contextlib.suppress(KVStoreError):
            connect(daemon.socket(), timeout_s=2.0).close()
            return True
        return False

    try:
        wait_for(answers, "the daemon to start", START_S)
    except BaseException:
        if process.poll() is not None:
            daemon.process = None
        daemon.dispose()
        raise


def _layout(rig: Rig, model: str) -> Layout:
    return Layout(
        model=model,
        engine="bench/1",
        dtype="uint8",
        block_tokens=16,
        shards=1,
        shard_bytes=rig.block_bytes,
    )


def _ready(rig: Rig, cache: Cache, rows: Any, keys: list[bytes]) -> None:
    """Once through, and until the whole arena is registered and the device measured."""
    cache.put(keys, rows)
    cache.get(keys, rows)
    _registered(rig, cache)


def _registered(rig: Rig, cache: Cache) -> Any:
    arena = cache.client.arena
    assert arena is not None
    registration = rig.copier.registration(arena)
    assert registration is not None
    wait_for(
        lambda: registration.failed or registration.ready_bytes == arena.size_bytes,
        "the arena to be registered",
        120.0,
    )
    assert not registration.failed, registration.failed
    return registration


def _ratios(
    rig: Rig,
    once: Callable[[], Iterator[tuple[str, float, float]]],
    total: int,
    bar: float | None,
    name: Callable[[str], str],
) -> list[Row]:
    """Medians over rounds, after one that does not count."""
    list(once())
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rig.rounds):
        for way, limit_s, ours_s in once():
            found.setdefault(way, []).append((limit_s / ours_s, limit_s))
    return [
        Row(
            name(way),
            statistics.median(ratio for ratio, _ in values),
            relation=">=" if bar else "",
            bar=bar,
            detail=(
                f"limit {total / statistics.median(s for _, s in values) / 1e9:.3g} GB/s, "
                f"{len(values)} times"
            ),
        )
        for way, values in found.items()
    ]


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _soon() -> float:
    return time.monotonic() + 30.0


def _all(found: int, wanted: int) -> None:
    assert found == wanted, f"{found} of {wanted}: the benchmark itself went wrong"


def _same(rig: Rig, memory: Any, want: Any) -> None:
    assert rig.equal(memory, want), "wrong bytes came back"


if __name__ == "__main__":
    sys.exit(main())
