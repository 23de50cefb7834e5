"""Fixtures: one daemon for tests that leave no traces outside their own prefixes, and stores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvstore.client.transformers import PrefixStore
from tests.e2e.harness import Daemon

TIMEOUT_S = 20.0  # the tests would rather wait for a busy machine than see a miss

MakeStore = Callable[..., PrefixStore]


@pytest.fixture(scope="session")
def shared() -> Iterator[Daemon]:
    """A running daemon for all tests that neither stop it nor look at its totals."""
    with Daemon() as daemon:
        yield daemon.start()


@pytest.fixture
def make_daemon() -> Iterator[Callable[..., Daemon]]:
    """Makes daemons that are not started yet; keywords are sections of the configuration."""
    with contextlib.ExitStack() as made:
        yield lambda **sections: made.enter_context(Daemon(**sections))


@pytest.fixture
def make_store(request: pytest.FixtureRequest) -> Iterator[MakeStore]:
    """Makes stores, closed at the end. No other test finds what these save."""
    with contextlib.ExitStack() as made:

        def make(model: Any, daemon: Daemon, **options: Any) -> PrefixStore:
            settings: dict[str, Any] = {"model_id": request.node.nodeid, "timeout_s": TIMEOUT_S}
            settings |= {"path": daemon.socket(), **options}
            return made.enter_context(PrefixStore(model, **settings))

        yield make
