"""How much one tenant notices of another's attacks: p99 of acquire + release, for each attack.

    python -m tests.soak.hostile [--seconds 3] [--bar 3]

On a host of few processors a flooding process slows everybody by its use of them, whatever the
daemon does. So each figure stands beside one that is taken just before, with as many processes that
burn as much and do not talk to the daemon. Exit status 1 when a ratio is over the bar.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvstore.client import Cache
from kvstore.protos import kvstore_pb2 as pb
from tests.e2e.harness import KIB, Daemon, contents, hashes, layout, wait_for
from tests.e2e.raw import HEADER, RawHatch, open_layout, packed

SIZE = 64 * KIB
MANY = [at.to_bytes(32, "little") for at in range(65_536)]
IDLE = 1_000
Attack = Callable[[str], None]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _burn(_: str) -> None:
    while True:
        sum(range(1_000))


def _garbage(path: str) -> None:
    while True:
        with contextlib.suppress(OSError), RawHatch(Path(path)) as raw:
            raw.socket.sendall(os.urandom(64 * KIB))
            raw.is_cut_off()


def _malformed(path: str) -> None:
    frame = HEADER.pack(8 + 64, pb.ACQUIRE, 0, 0, 0) + b"\xff" * 64
    _pour(path, lambda raw: frame * 100)


def _small(path: str) -> None:
    frame = HEADER.pack(8, pb.STATS, 0, 0, 0)
    _pour(path, lambda raw: frame * 1_000)


def _large(path: str) -> None:
    def frame(raw: RawHatch) -> bytes:
        keys = packed(open_layout(raw, layout("large")), MANY)
        body = pb.LookupRequest(keys=keys).SerializeToString()
        return HEADER.pack(8 + len(body), pb.LOOKUP, 0, 0, 0) + body

    _pour(path, frame)


def _reserves(path: str) -> None:
    """The dearest request there is: rows for 65,536 new blocks, most of which are refused."""

    def frame(raw: RawHatch) -> bytes:
        keys = packed(open_layout(raw, layout("large")), MANY)
        body = pb.ReserveRequest(keys=keys).SerializeToString()
        return HEADER.pack(8 + len(body), pb.RESERVE, 0, 0, 0) + body

    _pour(path, frame)


def _slow_reader(path: str) -> None:
    frame = HEADER.pack(8, pb.STATS, 0, 0, 1) * 1_000
    while True:
        with contextlib.suppress(OSError), RawHatch(Path(path)) as raw:
            raw.attach()
            while True:
                raw.socket.sendall(frame)


def _storm(path: str) -> None:
    while True:
        with contextlib.suppress(OSError), contextlib.ExitStack() as storm:
            for _ in range(50):
                storm.enter_context(socket.socket(socket.AF_UNIX)).connect(path)


def _pour(path: str, make: Callable[[RawHatch], bytes]) -> None:
    with RawHatch(Path(path)) as raw:
        raw.attach()
        frames = make(raw)
        raw.socket.settimeout(None)
        while True:
            raw.socket.sendall(frames)


ATTACKS: dict[str, Attack] = {
    "garbage frames": _garbage,
    "malformed messages": _malformed,
    "a flood of small requests": _small,
    "a flood of 65,536-key lookups": _large,
    "a flood of 65,536-key reserves": _reserves,
    "a slow reader": _slow_reader,
    "a storm of connections": _storm,
}


@contextlib.contextmanager
def _running(what: Attack, path: str) -> Iterator[None]:
    process = multiprocessing.get_context("fork").Process(target=what, args=(path,), daemon=True)
    process.start()
    try:
        time.sleep(0.3)  # a soak measures a state, not its beginning
        yield
    finally:
        process.kill()
        process.join()


def _p99_us(cache: Cache, keys: list[bytes], seconds: float) -> tuple[float, int]:
    """The 99th percentile of acquire + release of one block, and of how many."""
    took, end = [], time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        grant = cache.acquire(keys)
        assert grant.length == 1 and grant.release()
        took.append(time.perf_counter() - started)
    took.sort()
    return took[len(took) * 99 // 100] * 1e6, len(took)


def _attacks(daemon: Daemon, cache: Cache, keys: list[bytes], seconds: float, bar: float) -> int:
    path, over = str(daemon.socket("hatch", "hostile")), 0
    for name, attack in ATTACKS.items():
        with _running(_burn, path):
            rest, rests = _p99_us(cache, keys, seconds)
        with _running(attack, path):
            beside, calls = _p99_us(cache, keys, seconds)
        ratio = beside / rest
        over += ratio > bar
        _say(f"{name:34} {rest:9.0f} {beside:10.0f} {ratio:6.2f}  {rests} and {calls} calls")
        wait_for(lambda: daemon.stats("hostile").sessions == 1, "its sessions to end", 30.0)
    return over


def _idle(daemon: Daemon, cache: Cache, keys: list[bytes], seconds: float, bar: float) -> bool:
    """Connections that are sessions and do nothing; nobody burns meanwhile, nor before."""
    assert daemon.process is not None
    process = Path(f"/proc/{daemon.process.pid}")

    def memory_kib() -> int:
        lines = (process / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    rest, _ = _p99_us(cache, keys, seconds)
    files, memory = len(os.listdir(process / "fd")), memory_kib()
    with contextlib.ExitStack() as held:
        for _ in range(IDLE):
            held.enter_context(RawHatch(daemon.socket("hatch", "hostile"))).attach()
        beside, _ = _p99_us(cache, keys, seconds)
        files, memory = len(os.listdir(process / "fd")) - files, memory_kib() - memory
    _say(f"{f'{IDLE} idle connections':34} {rest:9.0f} {beside:10.0f} {beside / rest:6.2f}")
    _say(f"  each takes {files / IDLE:.1f} descriptors and {memory / IDLE:.1f} KiB of the daemon")
    return beside / rest > bar


def main() -> None:
    """Exit status 1 when a ratio is over the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--bar", type=float, default=3.0, help="the largest ratio that is good")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * IDLE)), hard))
    keys = hashes(1, "victim")
    with Daemon(
        tenants__default={"dram_quota": "50%"}, tenants__hostile={"dram_quota": "50%"}
    ) as daemon:
        daemon.start()
        cache = daemon.client().open(layout("victim"))
        cache.put(keys, contents(keys, SIZE))
        _say(f"{'attack':34} {'at rest':>9} {'beside it':>10} {'ratio':>6}  p99 in us")
        over = int(_idle(daemon, cache, keys, options.seconds, options.bar))
        over += _attacks(daemon, cache, keys, options.seconds, options.bar)
        _say(f"limited: {dict(daemon.stats('hostile').limited)}")
    _say(f"{over} over the bar of {options.bar:g}")
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main()
