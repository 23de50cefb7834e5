"""No call of the client outlasts its deadline by more than 100 ms, whatever the daemon does.

    python -m tests.soak.deadlines [--seconds S] [--threads T] [--seed S]

Every public call, through both doors, while the daemon is stopped (SIGSTOP), dead, and killed and
started again without end. A call may answer or refuse as it likes: only its time counts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from kvstore.client import Cache, Client, Grant, Reservation, connect
from kvstore.errors import KVStoreError, SessionLost, Unavailable
from tests.e2e.harness import DOORS, KIB, Daemon, contents, hashes, layout, targets
from tests.soak.figures import GRACE_S, Figures

SIZE = 16 * KIB
TIMEOUT_S = 0.4
PATIENT_S = 30.0  # before it begins
WAIT = 0.75  # deadline_s of the calls that take one, in timeouts: below, and the timeout counts
LONGER = 1.75  # and above it
ALIVE_S_MAX = 4.0  # of a daemon in the loop, its start included
LIMIT_S = 60.0  # of all calls once; far beyond all deadlines together
FORGIVEN = (Unavailable, SessionLost)
STATES = ("stopped", "dead", "restarting")

Calls = dict[str, tuple[float, Callable[[], object]]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a run."""

    timeout_s: float
    grace_s: float
    threads: int
    many: int


class Desk:
    """One client with everything that is needed to try each call: its caches, and some leases."""

    def __init__(self, daemon: Daemon, door: str, name: str, sizes: Sizes) -> None:
        self._many = hashes(sizes.many, "many", size=64)
        self._path = daemon.socket(door)
        self._name = name
        self.client: Client = connect(self._path, timeout_s=PATIENT_S)
        self.cache: Cache = self.client.open(layout("deadlines", shard_bytes=SIZE))
        self._keys = hashes(6, "kept")
        self._blocks = contents(self._keys, SIZE)
        self._number = 0
        self._timeout_s = sizes.timeout_s
        self.cache.put(self._keys, self._blocks)
        self.grants: list[Grant] = []
        self.reservations: list[Reservation] = []

    def stock(self) -> None:
        """Leases, to be ended when nobody answers."""
        for _ in range(2):
            self.grants.append(self.cache.acquire(self._keys))
        for _ in range(3):
            self.reservations.append(self.cache.reserve(self._fresh()))

    def hurry(self) -> None:
        """From now on the timeout is that of the run; until now it was there to be prepared."""
        self.client.timeout_s = self._timeout_s

    def _fresh(self) -> list[bytes]:
        self._number += 1
        return hashes(4, f"{self._name} {self._number}")

    def calls(self) -> Calls:
        """Every public call, and by when it must be over."""
        client, cache, keys = self.client, self.cache, self._keys
        new = self._fresh()
        short, wait, longer = self._timeout_s, WAIT * self._timeout_s, LONGER * self._timeout_s
        found: Calls = {
            "lookup": (short, lambda: cache.lookup(keys)),
            "lookup of many": (short, lambda: cache.lookup(self._many)),
            "put": (short, lambda: cache.put(new, contents(new, SIZE))),
            "put, wait": (longer, lambda: cache.put(new, self._blocks[:4], deadline_s=longer)),
            "get": (short, lambda: cache.get(keys, targets(6, SIZE), deadline_s=wait)),
            "get, wait": (longer, lambda: cache.get(keys, targets(6, SIZE), deadline_s=longer)),
            "reserve": (short, lambda: cache.reserve(self._fresh(), deadline_s=wait).abort()),
            "acquire": (short, lambda: cache.acquire(keys, deadline_s=wait).length),
            "acquire, wait": (longer, lambda: cache.acquire(keys, deadline_s=longer).length),
            "prefetch": (short, lambda: cache.prefetch(keys)),
            "retain": (short, lambda: cache.retain(keys, 50, ttl_s=1.0)),
            "forget": (short, lambda: cache.forget(new)),
            "open": (short, lambda: client.open(layout(f"other {self._number % 9}"))),
            "stats": (short, client.stats),
            "clear": (short, client.clear),
            "verify": (wait, lambda: client.verify(deadline_s=wait)),
            "drain": (wait, lambda: client.drain(deadline_s=wait)),
            "ticket": (short, lambda: client.ticket),
            "connect": (short, self._connect),
        }
        for at, grant in enumerate(self.grants):
            found[f"release {at}"] = (short, grant.release)
        ends = [Reservation.commit, Reservation.abort, lambda one: one.__exit__(None, None, None)]
        for at, (end, one) in enumerate(zip(ends, self.reservations, strict=False)):
            found[f"commit or abort {at}"] = (short, lambda end=end, one=one: end(one))  # type: ignore[misc]
        self.grants, self.reservations = [], []
        return found

    def _connect(self) -> None:
        connect(self._path, timeout_s=self._timeout_s).close()

    def close(self) -> None:
        """The last call of all."""
        self.client.close()


class Times:
    """By how much calls outlasted their deadlines: less than nothing, if they did not."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self._lock = threading.Lock()
        self.calls: dict[str, int] = defaultdict(int)
        self.late: dict[str, list[str]] = defaultdict(list)
        self.worst_s: dict[str, float] = defaultdict(lambda: -1.0)
        self.errors: list[str] = []
        self.under_way: dict[int, str] = {}  # by thread

    def take(self, state: str, name: str, deadline_s: float, call: Callable[[], object]) -> None:
        """Make a call."""
        started = time.monotonic()
        self.under_way[threading.get_ident()] = f"{state}, {name}"
        try:
            call()
        except FORGIVEN:
            pass
        except KVStoreError as error:
            self.errors.append(f"{state}, {name}: {error!r}")
        del self.under_way[threading.get_ident()]
        over = time.monotonic() - started - deadline_s
        with self._lock:
            self.calls[state] += 1
            self.worst_s[state] = max(self.worst_s[state], over)
            if over > self.grace_s:
                self.late[state].append(f"{name} +{over * 1e3:.0f} ms")


def all_calls(times: Times, state: str, desk: Desk, door: str) -> None:
    """Each of them once, and the close of the client at the end."""
    for name, (deadline_s, call) in desk.calls().items():
        times.take(state, f"{door} {name}", deadline_s, call)
    times.take(state, f"{door} close", 0.0, desk.close)


def at_once(times: Times, limit_s: float, runs: Sequence[Callable[[], None]]) -> None:
    """In a thread each; raises what the first of them raised. What still runs at the limit is
    noted as an error."""
    failures: list[BaseException] = []

    def guard(run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            failures.append(error)

    end = time.monotonic() + limit_s
    threads = [threading.Thread(target=guard, args=(run,), daemon=True) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    times.errors += [f"no end of {name}" for name in list(times.under_way.values())]
    if failures:
        raise failures[0]


@contextlib.contextmanager
def dead(daemon: Daemon) -> Iterator[None]:
    """Killed at the beginning, started again at the end."""
    daemon.kill()
    yield
    daemon.start()


def halted(daemon: Daemon, times: Times, sizes: Sizes) -> None:
    """All calls of all doors while the daemon is stopped, then while it is dead."""
    for state, manner in (("stopped", daemon.suspended), ("dead", lambda: dead(daemon))):
        desks = [
            (door, Desk(daemon, door, f"{door} {at}", sizes))
            for door in DOORS
            for at in range(sizes.threads)
        ]
        for _, desk in desks:
            desk.stock()
            desk.hurry()
        runs = [functools.partial(all_calls, times, state, desk, door) for door, desk in desks]
        with manner():
            at_once(times, LIMIT_S, runs)


def restarting(daemon: Daemon, times: Times, sizes: Sizes, *, seconds: float, seed: int) -> None:
    """All calls again and again, while the daemon dies and starts at any moment."""
    rng = random.Random(seed)
    every = [(door, at) for door in DOORS for at in range(sizes.threads)]
    desks = {(door, at): Desk(daemon, door, f"again {door} {at}", sizes) for door, at in every}
    end = time.monotonic() + seconds

    def work(door: str, at: int) -> None:
        desk = desks[door, at]
        desk.hurry()
        while time.monotonic() < end:
            for name, (deadline_s, call) in desk.calls().items():
                times.take("restarting", f"{door} {name}", deadline_s, call)
            with contextlib.suppress(*FORGIVEN):
                desk.stock()
        desk.close()

    def kill() -> None:
        while time.monotonic() < end:
            time.sleep(rng.uniform(0, ALIVE_S_MAX))
            daemon.kill()
            daemon.spawn()

    at_once(
        times,
        seconds + LIMIT_S,
        [kill, *(lambda d=d, a=a: work(d, a) for d, a in every)],
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.deadlines")
    parser.add_argument("--seconds", type=float, default=60.0, help="of restarts")
    parser.add_argument("--threads", type=int, default=1, help="and clients, for each door")
    parser.add_argument("--many", type=int, default=65_536, help="keys of the largest request")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="of the clients")
    parser.add_argument("--grace", type=float, default=GRACE_S)
    options = parser.parse_args()
    sizes = Sizes(options.timeout, options.grace, options.threads, options.many)
    figures = Figures(f"deadlines: timeout {sizes.timeout_s} s, {sizes.threads} clients a door")
    times = Times(sizes.grace_s)
    with Daemon() as daemon:
        daemon.start()
        halted(daemon, times, sizes)
        restarting(daemon, times, sizes, seconds=options.seconds, seed=options.seed)
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.kill()
    for state in STATES:
        figures.add(f"calls, daemon {state}", times.calls[state])
        worst = f"{times.worst_s[state] * 1e3:+.0f} ms"
        figures.hold(
            f"latest beyond its deadline, {state}",
            " ".join([worst, *times.late[state][:20]]),
            f"<= {sizes.grace_s * 1e3:.0f} ms",
            not times.late[state],
        )
    figures.hold("other errors", " ".join(times.errors[:5]) or 0, "0", not times.errors)
    figures.end()


if __name__ == "__main__":
    main()
