"""The hatch in this process: what it does in which order, where no other process can look."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvstore.busy_poll import BusyPoll
from kvstore.collaborators import ServiceInfo
from kvstore.eviction.base import Independent
from kvstore.eviction.lru import LRU
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
    """Processes that are not watched."""

    def joined(self, session: Session, peer: Any) -> None:
        pass

    def ended(self, number: int, blocks: list[int]) -> None:
        assert not blocks


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


@pytest.mark.parametrize("joined", [False, True])
def test_a_session_gives_nothing_away_before_all_its_connections_are_closed(
    tmp_path: Path, joined: bool
) -> None:
    """Of three connections of one session one ends it, its first or one that joined."""

    async def play() -> list[list[bytes | None]]:
        loop = asyncio.get_running_loop()
        config = PlacementConfig(dram_bytes=MIB, nvme_bytes=0, slab_bytes=MIB)
        store = Store(config, Limits(), Independent(LRU))
        hands: Any = None
        info = ServiceInfo("default", "0", 1, "arena", MIB, 1)
        service = Service(store, hands, info, lambda: b"{}")
        share = Share(loop, Turns(), lambda: store.limits, Counter())
        processes: Any = Nobody()
        path = tmp_path / "s"
        hatch = Hatch(
            service, processes, path, gid=None, busy_poll=BusyPoll(loop, 0.0), share=share
        )
        owner, told = await attach(path)
        ticket = {"join": told.session, "token": told.token}
        connected = [owner, *[(await attach(path, **ticket))[0] for _ in range(2)]]
        seen, detach = [], service.detach

        def look(session: Session) -> list[int]:
            seen.append([_end(one) for one in connected])
            return detach(session)

        service.detach = look  # type: ignore[method-assign]
        one = next(c for c in hatch.connections if c._joined == joined)
        one.close("this test", whole_session=True)
        assert not store.sessions.get(told.session) and not hatch.connections
        hatch.close()
        for each in connected:
            each.close()
        return seen

    assert asyncio.run(play()) == [[b"", b"", b""]]


def _end(one: socket.socket) -> bytes | None:
    """Empty when the other side is closed."""
    try:
        return one.recv(1)
    except BlockingIOError:
        return None
