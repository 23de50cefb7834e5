"""`kvstore bench`: data and control path against this host's own limits, as ratios of one run.

Each figure is the median over rounds that measure the limit and ours in turn, so that what else the
machine does falls on both. The bars are those that the project holds itself to.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from kvstore.bench_daemon import (
    PrivateDaemon,
    fill_index,
    number_hash,
    private_daemon,
    workplace,
)
from kvstore.bench_figures import Figure, all_met, report
from kvstore.bench_limits import Buffers, Echo, RawDisk, empty_grpc
from kvstore.client import Cache, Client, Layout
from kvstore.client.copying import streams
from kvstore.errors import InternalError
from kvstore.types import KIB, MIB

SEED = 20_260_101
BLOCK = 2 * MIB
SLAB = 64 * MIB
IO_THREADS = 8  # the default of nvme.threads


def main(json_output: bool = False, quick: bool = False) -> int:
    """Run all benchmarks and print them. Exit status 0 when every bar is met, else 1."""
    figures: list[Figure] = []
    digest = hashlib.sha256()
    rounds = 5 if quick else 15
    with workplace() as folder:
        for part in (_dram, _control, _policies, _nvme, _million):
            home = folder / part.__name__.strip("_")  # nobody finds what another has left
            home.mkdir()
            figures += part(home, rounds, quick, digest)
            shutil.rmtree(home)
            if not json_output:
                sys.stderr.write(f"kvstore: {part.__name__.strip('_')}: done\n")
    report(figures, json_output=json_output, quick=quick, sha256=digest.hexdigest())
    return 0 if all_met(figures) else 1


# -- DRAM --------------------------------------------------------------------------------------


def _dram(folder: Path, rounds: int, quick: bool, digest: Any) -> list[Figure]:
    """Copies through the DRAM tier against memcpy, and what they cost the daemon.

    Single blocks are other blocks in every round, and so are those of the memcpy beside them: 128
    MiB lie between two uses of one, so neither finds its bytes in the processor's caches.
    """
    with private_daemon(folder, dram_bytes=512 * MIB, nvme_bytes=0, slab_bytes=SLAB) as daemon:
        client = daemon.connect()
        cache = client.open(_layout("dram", BLOCK))
        buffers, hashes = Buffers(64, BLOCK, SEED), _hashes("dram", 64)
        ratios: dict[str, list[float]] = {"put 64": [], "get 64": [], "put 1": [], "get 1": []}
        for _ in range(rounds):
            cache.forget(hashes)
            for verb, call, places in (
                ("put 64", cache.put, buffers.sources),
                ("get 64", cache.get, buffers.targets),
            ):
                buffers.flush()
                limit = buffers.memcpy()
                buffers.flush()
                started = time.perf_counter()
                call(hashes, places)
                ratios[verb].append(limit / (time.perf_counter() - started))
            cache.forget(hashes)
            for verb, call, places in (
                ("put 1", cache.put, buffers.sources),
                ("get 1", cache.get, buffers.targets),
            ):
                for at in range(64):
                    one, place = hashes[at : at + 1], places[at : at + 1]
                    limit = buffers.memcpy((at + 32) % 64)
                    started = time.perf_counter()
                    call(one, place)
                    ratios[verb].append(limit / (time.perf_counter() - started))
        _check_equal(buffers, digest)
        echoes = _echoed(buffers, rounds)
        speeds = {
            "64": buffers.size_bytes / statistics.median(buffers.memcpy() for _ in range(9)),
            "1": BLOCK / statistics.median(buffers.memcpy(at) for at in range(64)),
        }
        figures = [
            Figure(
                f"{verb} x 2 MiB in one call, over memcpy",
                statistics.median(found),
                "",
                ">=",
                0.90 if verb.endswith("64") else 0.80,
                f"memcpy {speeds[verb.split()[1]] / 1e9:.1f} GB/s, {len(found)} times"
                + echoes.get(verb, "")
                + ("" if streams() else "; ours are memmove, others were not built"),
            )
            for verb, found in ratios.items()
        ]
        figures.append(_cpu(daemon, cache, hashes, buffers))
        client.close()
        return figures


def _echoed(buffers: Buffers, rounds: int) -> dict[str, str]:
    """What single blocks would reach beside a daemon that does nothing, see Echo: a put with two
    calls around the copy, a get with one before it."""
    found: dict[str, list[float]] = {"put 1": [], "get 1": []}
    with Echo() as echo:
        for _ in range(rounds):
            for at in range(buffers.count):
                for verb, ratios in found.items():
                    limit = buffers.memcpy((at + 32) % buffers.count)
                    started = time.perf_counter()
                    echo.call()
                    buffers.memcpy(at)
                    if verb == "put 1":
                        echo.call()
                    ratios.append(limit / (time.perf_counter() - started))
    return {
        verb: f"; with an echo that never sleeps {statistics.median(ratios):.2f}"
        for verb, ratios in found.items()
    }


def _cpu(daemon: PrivateDaemon, cache: Cache, hashes: list[bytes], buffers: Buffers) -> Figure:
    """CPU time of the daemon for hits of at least 16 GB."""
    started, moved = daemon.cpu_s(), 0
    while moved < 16e9:
        if cache.get(hashes, buffers.targets).length != 64:
            raise InternalError("a block of the benchmark is gone")
        moved += buffers.size_bytes
    used = daemon.cpu_s() - started
    return Figure(
        "daemon's CPU time per GB of DRAM hits",
        used / (moved / 1e9),
        "s",
        "<=",
        0.02,
        f"{used:.2f} s for {moved / 1e9:.0f} GB",
    )


# -- control path ------------------------------------------------------------------------------


def _control(folder: Path, rounds: int, quick: bool, digest: Any) -> list[Figure]:
    """Acquire and release against two empty gRPC calls, idle and while spills fill the disk."""
    with private_daemon(
        folder, dram_bytes=768 * MIB, nvme_bytes=1024 * MIB, slab_bytes=SLAB
    ) as daemon:
        client, writer = daemon.connect(), daemon.connect()
        cache = client.open(_layout("control", 4 * KIB))
        buffers = Buffers(256, 4 * KIB, SEED)
        hashes = _hashes("control", 256)
        cache.put(hashes, buffers.sources)
        figures = []
        with empty_grpc(folder / "empty.sock") as empty:
            for count, bar in ((1, 0.10), (256, 0.50)):
                figures.append(_round_trips(empty, cache, hashes[:count], rounds, bar))
        figures.append(_under_spills(client, writer, cache, hashes, rounds))
        client.close()
        writer.close()
        return figures


def _round_trips(
    empty: Callable[[], object], cache: Cache, hashes: list[bytes], rounds: int, bar: float
) -> Figure:
    """Acquire and release over two empty gRPC calls, in turns of 40, so that each is measured as it
    runs when it is used and not as it wakes up."""
    ours: list[float] = []
    limit: list[float] = []
    for _ in range(rounds):
        limit += [_seconds(empty) + _seconds(empty) for _ in range(40)]
        ours += [_seconds(lambda: _acquire_release(cache, hashes)) for _ in range(40)]
    value, base = statistics.median(ours), statistics.median(limit)
    return Figure(
        f"acquire + release of {len(hashes)} resident, p50, over two empty gRPC calls",
        value / base,
        "",
        "<=",
        bar,
        f"{value * 1e6:.0f} us over {base * 1e6:.0f} us, {len(ours)} times",
    )


def _under_spills(
    client: Client, writer: Client, cache: Cache, hashes: list[bytes], rounds: int
) -> Figure:
    """p99 of acquire + release of 256 while spills are under way, over the same at rest."""
    blocks = Buffers(64, BLOCK, SEED)
    bulk = writer.open(_layout("bulk", BLOCK))
    _wait_spilled(client)
    idle: list[float] = []
    busy: list[float] = []
    number = 0
    for _ in range(max(3, rounds // 2)):
        idle += (_seconds(lambda: _acquire_release(cache, hashes)) for _ in range(200))
        for _ in range(4):
            bulk.put(_hashes(f"bulk{number}", 64), blocks.sources, deadline_s=30)
            number += 1
            while client.stats()["tenants"]["default"]["moves"]["spills"] > 4:
                busy += (_seconds(lambda: _acquire_release(cache, hashes)) for _ in range(10))
        _wait_spilled(client)
    p99_idle, p99_busy = _percentile(idle, 0.99), _percentile(busy, 0.99)
    return Figure(
        "p99 of acquire + release of 256 while spills fill the disk, over idle p99",
        p99_busy / p99_idle,
        "",
        "<=",
        3.0,
        f"{p99_busy * 1e6:.0f} us ({len(busy)}) over {p99_idle * 1e6:.0f} us ({len(idle)})",
    )


def _policies(folder: Path, rounds: int, quick: bool, digest: Any) -> list[Figure]:
    """Acquire and release under the policy that learns most, against the plainest, in turns."""
    hashes, names = _hashes("policies", 256), ("relevance", "lru")
    buffers, times = Buffers(256, 4 * KIB, SEED), {name: list[float]() for name in names}
    with contextlib.ExitStack() as stack:
        caches = {}
        for name in names:
            home = folder / name
            home.mkdir()
            daemon = stack.enter_context(
                private_daemon(
                    home, dram_bytes=256 * MIB, nvme_bytes=0, slab_bytes=SLAB, policy=name
                )
            )
            client = stack.enter_context(contextlib.closing(daemon.connect()))
            caches[name] = client.open(_layout("policies", 4 * KIB))
            caches[name].put(hashes, buffers.sources)
        for _ in range(2 * rounds):
            for name, cache in caches.items():
                _acquire_release(cache, hashes)  # awake
                times[name] += map(_seconds, 40 * [partial(_acquire_release, cache, hashes)])
    value, base = (statistics.median(times[name]) for name in names)
    return [
        Figure(
            "acquire + release of 256 resident, p50, with relevance over lru",
            value / base,
            "",
            "<=",
            1.2,
            f"{value * 1e6:.0f} us over {base * 1e6:.0f} us, {len(times[names[0]])} times",
        )
    ]


# -- NVMe --------------------------------------------------------------------------------------


def _nvme(folder: Path, rounds: int, quick: bool, digest: Any) -> list[Figure]:
    """Spill and reload of 128 blocks of 2 MiB against the same I/O without us.

    Spill: from the commit of blocks that are written in DRAM, as the other's lie in memory, until
    the last is on the device; and beside it, for information, from the first put, of 16 blocks at a
    time. Reload: a get of blocks of which none is in memory, until they are verified in the
    caller's own buffers.
    """
    count = 64 if quick else 128
    raw = RawDisk(folder / "raw", count, BLOCK, IO_THREADS)
    puts, spills, reloads, writes, reads = [], [], [], [], []
    try:
        with private_daemon(
            folder,
            dram_bytes=768 * MIB,
            nvme_bytes=1024 * MIB,
            slab_bytes=SLAB,
            policy="lru",  # others may keep in memory what is to be read from the device
        ) as daemon:
            client = daemon.connect()
            cache = client.open(_layout("nvme", BLOCK))
            other = client.open(_layout("other", BLOCK))
            buffers = Buffers(count, BLOCK, SEED)
            hashes = _hashes("nvme", count)
            for _ in range(max(3, rounds // 2)):
                cache.forget(hashes)
                writes.append(raw.write())
                puts.append(writes[-1] / _put_and_spill(client, cache, hashes, buffers))
                cache.forget(hashes)
                writes.append(raw.write())
                spills.append(writes[-1] / _spill(client, cache, hashes, buffers))
                _push_out(other, buffers, 384)
                _wait_spilled(client)
                reads.append(raw.read())
                reloads.append(reads[-1] / _reload(cache, hashes, buffers))
                _check_equal(buffers, digest)
                other.forget(_hashes("push", 384))
            client.close()
    finally:
        raw.close()
    size = count * BLOCK / 1e9
    kind = "O_DIRECT" if raw.direct else "buffered I/O"
    return [
        Figure(
            f"{name} of {count} x 2 MiB, over the same {kind} with {IO_THREADS} threads",
            statistics.median(ratios),
            "",
            ">=" if bar else "",
            bar,
            f"{kind}: {size / statistics.median(times):.2f} GB/s, {len(ratios)} rounds",
        )
        for name, ratios, times, bar in (
            ("spill", spills, writes, 0.90),
            ("put and spill", puts, writes, None),
            ("reload", reloads, reads, 0.90),
        )
    ]


def _put_and_spill(client: Client, cache: Cache, hashes: list[bytes], buffers: Buffers) -> float:
    """Seconds from the first put until all is on the device."""
    started = time.perf_counter()
    for at in range(0, len(hashes), 16):
        cache.put(hashes[at : at + 16], buffers.sources[at : at + 16], deadline_s=30)
    _wait_spilled(client)
    return time.perf_counter() - started


def _spill(client: Client, cache: Cache, hashes: list[bytes], buffers: Buffers) -> float:
    """Seconds from the commit of blocks that lie in DRAM until all is on the device."""
    written = cache.reserve(hashes)
    if len(written) != len(hashes):
        raise InternalError(f"{written.refused} blocks of the benchmark found no room")
    for at, source in enumerate(buffers.sources):
        written.numpy(at)[:] = source
    started = time.perf_counter()
    written.commit()
    _wait_spilled(client)
    return time.perf_counter() - started


def _reload(cache: Cache, hashes: list[bytes], buffers: Buffers) -> float:
    """Seconds of a get of blocks of which all are on the device alone."""
    buffers.target.fill(0)
    started = time.perf_counter()
    got = cache.get(hashes, buffers.targets, deadline_s=30)
    seconds = time.perf_counter() - started
    if got.length != len(hashes) or got.tiers["nvme"] != len(hashes):
        raise InternalError(f"not all blocks came from NVMe: {got}")
    return seconds


def _push_out(other: Cache, buffers: Buffers, count: int) -> None:
    """Fill the DRAM tier with blocks of another layout, so that all others must leave it."""
    hashes = _hashes("push", count)
    for start in range(0, count, 64):
        other.put(hashes[start : start + 64], buffers.sources[:64], deadline_s=30)


def _wait_spilled(client: Client) -> None:
    """Until no spill is under way or due; to ask again and again would cost the daemon."""
    client.drain()


# -- a million blocks --------------------------------------------------------------------------


def _million(folder: Path, rounds: int, quick: bool, digest: Any) -> list[Figure]:
    """A restart with a million blocks on NVMe: time to the first hit, memory for each block."""
    count = 100_000 if quick else 1_000_000
    layout = _layout("million", 4 * KIB)
    nvme_bytes = -(-count * layout.slot_bytes // SLAB) * SLAB
    with private_daemon(
        folder, dram_bytes=256 * MIB, nvme_bytes=nvme_bytes, slab_bytes=SLAB
    ) as empty:
        base = empty.resident_bytes()
    shutil.rmtree(folder / "default")
    fill_index(folder, layout, count, nvme_bytes, SLAB)
    started = time.perf_counter()
    with private_daemon(
        folder, dram_bytes=256 * MIB, nvme_bytes=nvme_bytes, slab_bytes=SLAB
    ) as full:
        client = full.connect()
        cache = client.open(layout)
        into = bytearray(layout.block_bytes)
        got = cache.get([number_hash(count - 1)], [into])
        elapsed = time.perf_counter() - started
        if got.length != 1 or into[:8] != (count - 1).to_bytes(8, "little"):
            raise InternalError("a block of the benchmark did not survive the restart")
        digest.update(into)
        per_block = (full.resident_bytes() - base) / count
        client.close()
    return [
        Figure(
            f"resident memory per block, {count:,} blocks in the index",
            per_block,
            "bytes",
            "<=",
            400,
            f"{base / MIB:.0f} MiB without any block",
        ),
        Figure(
            f"start with {count:,} NVMe blocks until the first is served",
            elapsed,
            "s",
            "<=",
            5.0,
            "from exec of the daemon to the verified bytes of a get",
        ),
    ]


# -- small things ------------------------------------------------------------------------------


def _layout(name: str, block_bytes: int) -> Layout:
    return Layout(
        model=f"bench-{name}",
        engine="bench",
        dtype="uint8",
        block_tokens=16,
        shard_bytes=block_bytes,
    )


def _hashes(name: str, count: int) -> list[bytes]:
    return [hashlib.sha256(f"{name}/{at}".encode()).digest() for at in range(count)]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _acquire_release(cache: Cache, hashes: list[bytes]) -> None:
    grant = cache.acquire(hashes)
    if grant.length != len(hashes) or not grant.release():
        raise InternalError("a block of the benchmark is gone")


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def _check_equal(buffers: Buffers, digest: Any) -> None:
    if not (buffers.source == buffers.target).all():
        raise InternalError("bytes read back differ from those written")
    digest.update(buffers.target)
