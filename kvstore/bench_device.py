"""`kvstore bench --device N`: copies between a GPU and the store against the link's own limit.

Each figure is the median over rounds that measure the limit and ours in turn. What a machine lacks
is a figure without a value that says what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.bench_daemon import workplace
from kvstore.bench_figures import Figure, all_met, report, unmeasured
from kvstore.bench_rig import LEGACY_STREAM, Memory, Rig, find, wait_for
from kvstore.client import Cache, connect
from kvstore.client.cuda import Direction, Fragments
from kvstore.client.cuda_setup import Registration
from kvstore.errors import InternalError, KVStoreError
from kvstore.types import GIB

BLOCKS_BAR, FRAGMENTS_BAR, NEAR_BAR, FIRST_BAR = 0.95, 0.80, 0.90, 0.25
FIRST_BLOCKS = 8  # of the put that comes first
COPY_S = 30.0
REGISTER_S = 120.0
CLIMB_S = 60.0

Once = Callable[[], Iterator[tuple[str, float, float]]]  # a round: what, the limit's seconds, ours
Part = Callable[[Rig, Path, Any], list[Figure]]


def main(number: int, json_output: bool = False, quick: bool = False) -> int:
    """Measure a device and print what was found. Exit status 0 when something could be measured
    and every bar of that is met, else 1. Raises KVStoreError where there is no such device."""
    rig = find(number, quick=quick)
    digest = hashlib.sha256()
    figures = measure(rig, PARTS, digest, quiet=json_output)
    report(
        figures, json_output=json_output, quick=quick, sha256=digest.hexdigest(), device=rig.name
    )
    return 0 if all_met(figures) else 1


def measure(rig: Rig, parts: Sequence[Part], digest: Any, *, quiet: bool) -> list[Figure]:
    """All parts, each in a folder of its own. A defect of ours is raised; whatever a machine lacks,
    the other parts are measured."""
    figures: list[Figure] = []
    with workplace() as folder:
        for part in parts:
            home = folder / part.__name__
            home.mkdir()
            try:
                figures += part(rig, home, digest)
            except InternalError:
                raise
            except (ImportError, KVStoreError, MemoryError, OSError, RuntimeError) as error:
                figures.append(unmeasured(part.__name__, " ".join(str(error).split())))
            shutil.rmtree(home)
            if not quiet:
                sys.stderr.write(f"kvstore: {part.__name__}: done\n")
    return figures


# -- the link ----------------------------------------------------------------------------------


def contiguous(rig: Rig, folder: Path, digest: Any) -> list[Figure]:
    """Cache.put and Cache.get of whole blocks that are no neighbours on the device."""
    sizes = rig.sizes
    with (
        _opened(rig, folder, "contiguous", dram_bytes=3 * sizes.total) as cache,
        rig.memory(sizes.total) as memory,
        rig.memory(sizes.total) as other,
    ):
        want, keys = rig.content(1), _hashes("contiguous", sizes.blocks)
        memory.fill(want)
        rows = rig.rows(memory)
        rows = [rows[at] for at in rig.order(1)]
        _ready(rig, cache, rows, keys)

        def once() -> Iterator[tuple[str, float, float]]:
            cache.forget(keys)
            limit_s = other.link_s(Direction.STORE)
            yield "D2H", limit_s, _timed(lambda: cache.put(keys, rows).stored, sizes.blocks)
            memory.fill(0)
            limit_s = other.link_s(Direction.LOAD)
            yield "H2D", limit_s, _timed(lambda: cache.get(keys, rows).length, sizes.blocks)
            _check(memory, want)

        text = f"{{}} {sizes.blocks} x {sizes.block_bytes >> 10} KiB over one pinned copy"
        figures = ratios(rig, once, BLOCKS_BAR, text.format)
        digest.update(want)
        return figures


def fragmented(rig: Rig, folder: Path, digest: Any) -> list[Figure]:
    """Blocks that have a piece in every layer, in whichever way the store chooses."""
    sizes = rig.sizes
    size = sizes.block_bytes // sizes.layers
    text = (
        f"{{}} {sizes.blocks} x {sizes.layers} fragments of {size >> 10} KiB over one pinned copy"
    )
    with fragments(rig, folder, digest) as once:
        return ratios(rig, once, FRAGMENTS_BAR, text.format)


@contextlib.contextmanager
def fragments(rig: Rig, folder: Path, digest: Any) -> Iterator[Once]:
    """Rounds of copies of such blocks, once the device has been measured."""
    sizes = rig.sizes
    with (
        _opened(rig, folder, "fragmented", dram_bytes=3 * sizes.total) as cache,
        rig.memory(sizes.total) as memory,
        rig.memory(sizes.total) as other,
    ):
        want, keys = rig.content(2), _hashes("fragmented", sizes.blocks)
        order = rig.order(2)
        _ready(rig, cache, rig.rows(other), keys)
        memory.fill(want)
        streams = [LEGACY_STREAM]

        def store() -> int:
            reservation = cache.reserve(keys)
            offsets = [one.offset for one in reservation.extents]
            places = _scattered(rig, memory, offsets, order)
            end = time.monotonic() + COPY_S
            done = rig.copier.store(reservation, places, deadline=end, streams=streams)
            return len(offsets) * done

        def load() -> int:
            grant = cache.acquire(keys)
            places = _scattered(rig, memory, list(grant.places.offsets), order)
            end = time.monotonic() + COPY_S
            return grant.length * rig.copier.load(grant, places, deadline=end, streams=streams)

        def once() -> Iterator[tuple[str, float, float]]:
            cache.forget(keys)
            limit_s = other.link_s(Direction.STORE)
            yield "D2H", limit_s, _timed(store, sizes.blocks)
            memory.fill(0)
            limit_s = other.link_s(Direction.LOAD)
            yield "H2D", limit_s, _timed(load, sizes.blocks)
            _check(memory, want)

        yield once
        digest.update(want)


def _scattered(rig: Rig, memory: Memory, offsets: Sequence[int], order: Any) -> Fragments:
    """Blocks as an engine has them: block i of the arena is row order[i] of every layer, and one
    layer comes after the other."""
    size = rig.sizes.block_bytes // rig.sizes.layers
    layers = np.arange(rig.sizes.layers, dtype=np.int64) * len(order) * size
    addresses = memory.address + np.asarray(order, np.int64)[:, None] * size + layers
    return Fragments.of_blocks(rig.number, offsets, addresses, [size] * len(layers), 0)


# -- within the device -------------------------------------------------------------------------


def within(rig: Rig, folder: Path, digest: Any) -> list[Figure]:
    """Cache.get of blocks that the daemon has on the device, once all have climbed there."""
    sizes = rig.sizes
    tiers = {"dram_bytes": 3 * sizes.total, "hbm_bytes": sizes.total + sizes.slab_bytes}
    with (
        _opened(rig, folder, "within", **tiers) as cache,
        rig.memory(sizes.total) as memory,
        rig.memory(sizes.total) as other,
    ):
        want, keys = rig.content(3), _hashes("within", sizes.blocks)
        memory.fill(want)
        rows = rig.rows(memory)
        rows = [rows[at] for at in rig.order(3)]
        _ready(rig, cache, rows, keys)

        def near() -> int:
            """Blocks that came from the device's own memory."""
            return cache.get(keys, rows).tiers["hbm"]

        wait_for(lambda: near() == sizes.blocks, "climbing to the device", CLIMB_S)

        def once() -> Iterator[tuple[str, float, float]]:
            memory.fill(0)
            limit_s = other.within_s(memory)
            yield "D2D", limit_s, _timed(near, sizes.blocks)
            _check(memory, want)

        text = (
            f"{{}} {sizes.blocks} x {sizes.block_bytes >> 10} KiB over one copy within the device"
        )
        figures = ratios(rig, once, NEAR_BAR, text.format)
        digest.update(want)
        return figures


# -- the beginning -----------------------------------------------------------------------------


def registered(rig: Rig, folder: Path, digest: Any) -> list[Figure]:
    """A large arena is registered beside the copies, which do not wait for it."""
    size = FIRST_BLOCKS * rig.sizes.block_bytes
    shares, firsts, speeds, arena_bytes = [], [], [], 0
    with rig.daemon(folder, dram_bytes=rig.sizes.arena_bytes) as daemon, rig.memory(size) as memory:
        want = rig.content(4)[:size]
        memory.fill(want)
        rows = rig.rows(memory)
        for start in range(rig.sizes.starts):
            keys = _hashes(f"registered{start}", FIRST_BLOCKS)
            with connect(daemon.socket, timeout_s=60.0) as client:
                cache = client.open(rig.layout("registered"))
                cache.copier = rig.copier
                firsts.append(_timed(lambda: cache.put(keys, rows).stored, FIRST_BLOCKS))  # noqa: B023
                registration = _registered(rig, cache)
                arena_bytes = registration.ready_bytes
                memory.fill(0)
                _timed(lambda: cache.get(keys, rows).length, FIRST_BLOCKS)  # noqa: B023
                _check(memory, want)
            shares.append(firsts[-1] / max(1e-9, registration.seconds))
            speeds.append(arena_bytes / GIB / max(1e-9, registration.seconds))
            wait_for(registration.ended.is_set, "giving the arena back", REGISTER_S)
    digest.update(want)
    return [
        Figure(
            f"first put, over registering {arena_bytes / GIB:.3g} GiB",
            statistics.median(shares),
            "",
            "<=",
            FIRST_BAR,
            f"put {statistics.median(firsts) * 1e3:.3g} ms, registered at "
            f"{statistics.median(speeds):.3g} GiB/s, {len(firsts)} times",
        )
    ]


PARTS: tuple[Part, ...] = (contiguous, fragmented, within, registered)

# -- small things ------------------------------------------------------------------------------


def ratios(rig: Rig, once: Once, bar: float | None, name: Callable[[str], str]) -> list[Figure]:
    """Medians over rounds, after one that does not count."""
    list(once())
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rig.sizes.rounds):
        for way, limit_s, ours_s in once():
            found.setdefault(way, []).append((limit_s / ours_s, limit_s))
    return [
        Figure(
            name(way),
            statistics.median(ratio for ratio, _ in rounds),
            "",
            ">=" if bar else "",
            bar,
            f"limit {rig.sizes.total / statistics.median(s for _, s in rounds) / 1e9:.3g} GB/s, "
            f"{len(rounds)} times",
        )
        for way, rounds in found.items()
    ]


@contextlib.contextmanager
def _opened(rig: Rig, folder: Path, name: str, **tiers: int) -> Iterator[Cache]:
    """A cache whose copies the rig makes, of a daemon with these tiers."""
    with rig.daemon(folder, **tiers) as daemon, daemon.connect() as client:
        cache = client.open(rig.layout(name))
        cache.copier = rig.copier
        yield cache


def _ready(rig: Rig, cache: Cache, rows: Sequence[Any], keys: list[bytes]) -> None:
    """Once through, and until the whole arena is registered and the device measured."""
    cache.put(keys, rows)
    cache.get(keys, rows)
    _registered(rig, cache)


def _registered(rig: Rig, cache: Cache) -> Registration:
    arena = cache.client.arena
    registration = None if arena is None else rig.copier.registration(arena)
    if arena is None or registration is None:
        raise InternalError("the benchmark's first copy has registered nothing")
    wait_for(
        lambda: bool(registration.failed) or registration.ready_bytes == arena.size_bytes,
        "registering the arena",
        REGISTER_S,
    )
    if registration.failed:
        raise KVStoreError(
            f"the arena cannot be registered ({registration.failed}): raise the limit of locked "
            "memory (ulimit -l)"
        )
    return registration


def _hashes(name: str, count: int) -> list[bytes]:
    return [hashlib.sha256(f"{name}/{at}".encode()).digest() for at in range(count)]


def _timed(copied: Callable[[], int], blocks: int) -> float:
    """Seconds of a call, which must copy so many blocks."""
    began = time.perf_counter()
    found = copied()
    seconds = time.perf_counter() - began
    if found != blocks:
        raise InternalError(f"{found} of {blocks} blocks of the benchmark were copied as they must")
    return seconds


def _check(memory: Memory, want: Any) -> None:
    if not memory.holds(want):
        raise InternalError("bytes read back differ from those written")
