"""Fixtures of the tests of CUDA buffers: a daemon, and a cache whose device is a fake one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.client import Cache, Client
from kvstore.client.cuda import Copier
from tests.client.fake_device import PIECE, FakeDevice, FakePlatform
from tests.e2e.harness import Daemon, layout


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(nvme={"size": "0"}) as daemon:
        yield daemon.start()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client(timeout_s=2.0) as client:
        yield client
    with daemon.client() as other:
        other.clear()


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def copier(device: FakeDevice) -> Copier:
    return Copier(FakePlatform(device), piece_bytes=PIECE)


@pytest.fixture
def cache(client: Client, copier: Copier, request: pytest.FixtureRequest) -> Cache:
    cache = client.open(layout(request.node.nodeid))
    cache.copier = copier
    return cache
