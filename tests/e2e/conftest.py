"""Fixtures of the end-to-end tests: daemons, and a client and a cache through either door."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator

import pytest

from kvstore.client import Cache, Client
from tests.e2e import harness
from tests.e2e.harness import DOORS, Daemon

MakeDaemon = Callable[..., Daemon]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.CallInfo[None], None]:
    """A failed test shows what the daemons said."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        for daemon in harness.live:
            report.sections.append((f"log of the daemon in {daemon.folder}", daemon.log()))


@pytest.fixture
def make_daemon() -> Iterator[MakeDaemon]:
    """Makes daemons that are not started yet; keywords are sections of the configuration."""
    with contextlib.ExitStack() as made:
        yield lambda **sections: made.enter_context(Daemon(**sections))


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """A running daemon for all tests of a module that leave no traces outside their own layout."""
    with Daemon() as daemon:
        yield daemon.start()


@pytest.fixture(params=list(DOORS))
def door(request: pytest.FixtureRequest) -> str:
    """Each of the two doors in turn."""
    name: str = request.param
    return name


@pytest.fixture
def client(shared: Daemon, door: str) -> Iterator[Client]:
    """A client of the shared daemon."""
    with shared.client(door) as client:
        yield client


@pytest.fixture
def cache(client: Client, request: pytest.FixtureRequest) -> Cache:
    """A cache of 64 KiB blocks whose layout no other test has."""
    return client.open(harness.layout(request.node.nodeid))
