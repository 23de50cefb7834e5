"""The guard: what no daemon, a late, dead, halted or refusing one, and a defect of ours become."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.client import Cache
from kvstore.client.guard import Guard
from kvstore.errors import DeadlineExceeded, InvalidRequest
from tests.e2e.harness import Daemon, contents, hashes, layout, targets, wait_for

SIZE = 64 << 10
KEYS = hashes(4, "guard")
TIMEOUT_S = 0.5
SLACK_S = 2.5  # of a scheduler with other work: what hangs takes longer than any of this


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon that is not started yet."""
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def guard(daemon: Daemon) -> Iterator[Guard]:
    """A guard of that daemon's socket."""
    guard = Guard(daemon.socket(), timeout_s=TIMEOUT_S)
    yield guard
    guard.close()
    assert not probes()


def probes() -> list[threading.Thread]:
    """Threads that look for a daemon."""
    return [one for one in threading.enumerate() if one.name == "kvstore-probe"]


def cache_of(guard: Guard) -> Cache:
    return Cache(guard.client, layout("guard"))


def resident(guard: Guard) -> int:
    """Blocks of KEYS, as seen through the guard; -1 where it could not ask."""
    return guard.ask(lambda: cache_of(guard).lookup(KEYS).length, -1)


def put(guard: Guard) -> int:
    """Store KEYS; -1 where it could not."""
    return guard.ask(lambda: cache_of(guard).put(KEYS, contents(KEYS, SIZE)).stored, -1)


def lines(log: pytest.LogCaptureFixture, part: str) -> list[logging.LogRecord]:
    """What was logged with this text."""
    return [one for one in log.records if part in one.getMessage() and one.name == "kvstore"]


def counts(guard: Guard) -> tuple[int, int, int]:
    return guard.counts["failed"], guard.counts["skipped"], guard.counts["defects"]


def test_an_absent_daemon_is_asked_once(
    guard: Guard, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    assert resident(guard) == -1
    assert f"no daemon at {daemon.socket()}" in guard.down
    asked: list[int] = []
    for _ in range(100):
        assert guard.ask(lambda: asked.append(1), None) is None
    assert not asked
    assert counts(guard) == (1, 100, 0)
    (line,) = lines(caplog, "computes without the store")
    assert line.levelno == logging.WARNING and "start kvstored" in line.getMessage()


def test_a_daemon_that_comes_later_is_found(
    guard: Guard, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstore")
    assert put(guard) == -1
    daemon.start()
    wait_for(lambda: not guard.down, "the guard to see the daemon")
    assert put(guard) == len(KEYS) == resident(guard)
    assert counts(guard) == (1, 0, 0)
    wait_for(lambda: len(lines(caplog, "answers again")) == 1, "the line that says so")


def test_a_daemon_that_is_killed_and_restarted(guard: Guard, daemon: Daemon) -> None:
    daemon.start()
    assert put(guard) == len(KEYS)
    daemon.kill()
    assert resident(guard) == -1 and guard.down
    daemon.start()
    wait_for(lambda: not guard.down, "the guard to see the next daemon")
    into = targets(len(KEYS), SIZE)
    assert guard.ask(lambda: cache_of(guard).get(KEYS, into).length, 0) == len(KEYS)
    assert [bytes(one) for one in into] == contents(KEYS, SIZE)


def test_a_daemon_that_halts_is_waited_for_once(guard: Guard, daemon: Daemon) -> None:
    daemon.start()
    assert put(guard) == len(KEYS)
    with daemon.suspended():
        began = time.monotonic()
        assert resident(guard) == -1
        waited_s = time.monotonic() - began
        assert TIMEOUT_S * 0.9 < waited_s < TIMEOUT_S + SLACK_S
        asked: list[int] = []
        for _ in range(1_000):
            guard.ask(lambda: asked.append(1), None)
        assert not asked and counts(guard) == (1, 1_000, 0)
        assert len(probes()) == 1
    wait_for(lambda: not guard.down, "the daemon to go on")
    assert resident(guard) == len(KEYS)


def test_threads_that_wait_for_a_halted_daemon_wait_at_once(guard: Guard, daemon: Daemon) -> None:
    """Eight of them take about as long as one, and leave one thread that looks."""
    daemon.start()
    assert put(guard) == len(KEYS)
    found: list[int] = []
    with daemon.suspended():
        began = time.monotonic()
        threads = [threading.Thread(target=lambda: found.append(resident(guard))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < TIMEOUT_S + SLACK_S < 8 * TIMEOUT_S
        assert found == [-1] * 8
        assert len(probes()) == 1
        assert sum(counts(guard)) == 8
    wait_for(lambda: not guard.down, "the daemon to go on")


def test_a_lost_session_costs_one_call(
    guard: Guard, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    """What a lease of a dead daemon gives is void; the next daemon is asked without a pause."""
    daemon.start()
    reservation = guard.ask(lambda: cache_of(guard).reserve(KEYS), None)
    assert reservation is not None
    daemon.kill()
    daemon.start()
    assert guard.ask(reservation.commit, -1) == -1
    assert not guard.down and counts(guard) == (1, 0, 0)
    assert len(lines(caplog, "session at its end")) == 1
    assert resident(guard) == 0, "nothing was stored, and the daemon is asked"


def test_a_request_beyond_a_bound_does_not_stop_the_others(
    guard: Guard, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.config["limits"] = {"leases_per_session": 1}
    daemon.start()
    assert put(guard) == len(KEYS)
    cache = cache_of(guard)
    grant = guard.ask(lambda: cache.acquire(KEYS), None)
    assert grant is not None
    assert guard.ask(lambda: cache.acquire(KEYS), None) is None
    assert not guard.down and counts(guard) == (1, 0, 0)
    assert len(lines(caplog, "limits.leases_per_session")) == 1
    assert resident(guard) == len(KEYS) and grant.release()


def test_a_daemon_that_takes_no_more_clients_is_down(guard: Guard, daemon: Daemon) -> None:
    daemon.config["limits"] = {"sessions": 1}
    daemon.start()
    wait_for(lambda: _joined(daemon), "room for one client")
    assert resident(guard) == -1
    assert "limits.sessions" in guard.down
    daemon._clients[0].close()
    wait_for(lambda: not guard.down, "the place that is free now")
    assert resident(guard) == 0


def _joined(daemon: Daemon) -> bool:
    """Whether a client could connect; the one that waited for the start may not have left yet."""
    try:
        daemon.client()
    except Exception:
        return False
    return True


def test_defects_are_misses_counted_and_told_once(
    guard: Guard, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.start()
    calls = iter(range(50))

    def fail() -> int:
        raise ValueError(f"call {next(calls)}")

    for _ in range(50):
        assert guard.ask(fail, 7) == 7
    assert counts(guard) == (0, 0, 50) and not guard.down
    (line,) = lines(caplog, "ValueError")
    assert line.levelno == logging.ERROR and line.exc_info is not None, "with where it happened"
    assert len(guard._told) == 1, "what is remembered of lines does not grow with calls"
    assert put(guard) == len(KEYS), "the daemon is asked as before"


def test_a_wrong_request_is_a_defect_without_a_trace(
    guard: Guard, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.start()
    cache = cache_of(guard)
    for key in (b"short", b"brief"):
        assert guard.ask(lambda: cache.lookup([key]).length, -1) == -1  # noqa: B023
    assert counts(guard) == (0, 0, 2) and not guard.down
    (line,) = lines(caplog, "InvalidKeys")
    assert line.exc_info is None


def test_an_interrupt_is_not_held_up(guard: Guard) -> None:
    def interrupt() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard.ask(interrupt, None)


def test_a_daemon_that_only_answers_the_probe_is_asked_less_and_less(
    guard: Guard, daemon: Daemon
) -> None:
    """Else an engine would wait for it again after every twentieth of a second."""
    daemon.start()

    def late() -> int:
        raise DeadlineExceeded("too late")

    pauses = []
    for _ in range(4):
        assert guard.ask(late, -1) == -1
        fell = time.monotonic()
        wait_for(lambda: not guard.down, "the probe")
        pauses.append(time.monotonic() - fell)
    assert counts(guard) == (4, 0, 0)
    assert pauses[3] >= 0.4 and pauses[2] >= 0.2, pauses


def test_close_ends_the_thread_and_every_later_call(daemon: Daemon) -> None:
    guard = Guard(daemon.socket(), timeout_s=TIMEOUT_S)
    assert resident(guard) == -1
    assert len(probes()) == 1
    guard.close()
    assert not probes()
    daemon.start()
    assert resident(guard) == -1
    assert counts(guard) == (1, 1, 0)
    guard.close()


def test_close_of_a_halted_daemon_is_in_time(daemon: Daemon) -> None:
    daemon.start()
    guard = Guard(daemon.socket(), timeout_s=TIMEOUT_S)
    assert put(guard) == len(KEYS)
    with daemon.suspended():
        assert resident(guard) == -1
        began = time.monotonic()
        guard.close()
        assert time.monotonic() - began < TIMEOUT_S + SLACK_S
        assert not probes()


def test_eight_threads_through_two_deaths(guard: Guard, daemon: Daemon) -> None:
    """No call raises, each is counted once, and what is read is right."""
    daemon.start()
    assert put(guard) == len(KEYS)
    stop, outcomes = threading.Event(), [[0, 0] for _ in range(8)]
    wrong: list[object] = []

    def work(mine: list[int]) -> None:
        cache, into = cache_of(guard), targets(len(KEYS), SIZE)
        want = contents(KEYS, SIZE)
        try:
            while not stop.is_set():
                length = guard.ask(lambda: cache.get(KEYS, into).length, -1)
                mine[length < 0] += 1
                if [bytes(one) for one in into[: max(0, length)]] != want[: max(0, length)]:
                    wrong.append(length)
                if guard.down:
                    stop.wait(0.001)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in outcomes]
    for thread in threads:
        thread.start()
    for _ in range(2):
        before = sum(got for got, _ in outcomes)
        wait_for(lambda: sum(got for got, _ in outcomes) > before + 50, "gets", 30.0)  # noqa: B023
        daemon.kill()
        wait_for(lambda: guard.down, "the guard to notice")
        daemon.start()
        wait_for(lambda: not guard.down, "the guard to see the next daemon")
    before = sum(got for got, _ in outcomes)
    wait_for(lambda: sum(got for got, _ in outcomes) > before + 50, "gets", 30.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    failed, skipped, defects = counts(guard)
    assert failed >= 2 and skipped > 0 and defects == 0
    assert failed + skipped == sum(missed for _, missed in outcomes)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), 1e9])
def test_a_timeout_that_cannot_be(tmp_path: Path, timeout_s: float) -> None:
    with pytest.raises(InvalidRequest, match="timeout_s"):
        Guard(tmp_path / "kvstore.sock", timeout_s=timeout_s)
