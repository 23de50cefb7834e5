"""The hatch in this process: what it does in which order, where no other process can look."""

from __future__ import annotations

import asyncio
import inspect
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvstore.busy_poll import BusyPoll
from kvstore.collaborators import ServiceInfo
from kvstore.eviction.base import Independent
from kvstore.eviction.lru import LRU
from kvstore.front_door import FrontDoor
from kvstore.hatch import AFTER_LENGTH, HEADER, Hatch
from kvstore.leases import Session
from kvstore.limits import Limits
from kvstore.placement import PlacementConfig
from kvstore.protos import kvstore_pb2 as pb
from kvstore.service import Service
from kvstore.store import Store
from kvstore.turns import Share, Turns
from kvstore.types import MIB, PROTOCOL_VERSION


class Nobody:
    """Processes that are not watched, and hands that have nothing to do."""

    def joined(self, session: Session, peer: Any) -> None:
        pass

    def ended(self, number: int, blocks: list[int]) -> None:
        assert not blocks


class Cut:
    """The doors of a tenant, as far as a session that ends asks for them."""

    def __init__(self, hatch: Hatch) -> None:
        self.cut = lambda number: hatch.cut(number, "its session has ended")


async def attach(path: Path, **join: Any) -> tuple[socket.socket, Any]:
    """A connection of its own session, or of that which it joins."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connected, str(path))
    body = pb.AttachRequest(protocol=PROTOCOL_VERSION, client="t", **join).SerializeToString()
    header = HEADER.pack(AFTER_LENGTH + len(body), pb.ATTACH, 0, 0, 1)
    await loop.sock_sendall(connected, header + body)
    frame = await loop.sock_recv(connected, 4096)
    return connected, pb.AttachReply.FromString(frame[HEADER.size :])


@pytest.mark.parametrize("how", ["owner", "operator", "front door"])
@pytest.mark.parametrize("joins", [2, 60])
def test_a_session_gives_nothing_away_before_all_its_connections_are_closed(
    tmp_path: Path, how: str, joins: int
) -> None:
    """And it ends however many they are."""

    async def play() -> list[list[bytes | None]]:
        loop = asyncio.get_running_loop()
        config = PlacementConfig(dram_bytes=MIB, nvme_bytes=0, slab_bytes=MIB)
        store = Store(config, Limits(), Independent(LRU))
        nobody: Any = Nobody()
        info = ServiceInfo("default", "0", 1, "arena", MIB, 1)
        service = Service(store, nobody, info, lambda: b"{}")
        share = Share(loop, Turns(), lambda: store.limits, Counter())
        path = tmp_path / "s"
        hatch = Hatch(service, nobody, path, gid=None, busy_poll=BusyPoll(loop, 0.0), share=share)
        connected = []
        if how == "front door":
            door = FrontDoor(service, nobody, tmp_path / "g", gid=None, share=share)
            doors: Any = Cut(hatch)
            service.doors = doors
            stream: Any = door._attach(pb.AttachRequest(protocol=PROTOCOL_VERSION), None)
            told = await anext(stream)
        else:
            owner, told = await attach(path)
            connected.append(owner)
        ticket = {"join": told.session, "token": told.token}
        connected += [(await attach(path, **ticket))[0] for _ in range(joins)]
        seen, detach = [], service.detach

        def look(session: Session) -> list[int]:
            seen.append([_end(one) for one in connected])
            return detach(session)

        service.detach = look  # type: ignore[method-assign]
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(len(inspect.stack()) + 50)
        try:
            if how == "owner":
                next(one for one in hatch.connections if not one._joined).close("this test")
            elif how == "operator":
                hatch.end(told.session, "this test")
            else:
                await stream.aclose()
        finally:
            sys.setrecursionlimit(before)
        assert not store.sessions.get(told.session) and not hatch.connections
        hatch.close()
        for each in connected:
            each.close()
        return seen

    [seen] = asyncio.run(play())
    assert set(seen) == {b""}


def _end(one: socket.socket) -> bytes | None:
    """Empty when the other side is closed."""
    try:
        return one.recv(1)
    except BlockingIOError:
        return None
