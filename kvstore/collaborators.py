"""What a service needs of others: hands for the store's orders, doors for the sessions, and what it
tells those who come."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvstore.catalog import LayoutEntry
from kvstore.leases import Session
from kvstore.orders import IndexPut, Move
from kvstore.store import Store


class Hands(Protocol):
    """What carries the store's orders out. None of these waits."""

    def move(self, moves: list[Move]) -> None:
        """Queue moves; their outcomes come back through `Service.finished`."""

    def mark(self, store: Store, pages: Iterable[int]) -> None:
        """Bring the slot table's records of these DRAM pages up to date, and end the epochs of
        slots whose blocks have gone: before anything else is written there."""

    def touch(self, store: Store, pages: Sequence[int]) -> None:
        """Note in the slot table that these DRAM pages were used."""

    def layout(self, entry: LayoutEntry) -> None:
        """Note the layout's description beside the slot table, and queue it for the NVMe index."""

    def index(self, changes: dict[int, IndexPut | None]) -> None:
        """Queue changes of the NVMe index."""


@dataclasses.dataclass(frozen=True)
class NvmePlaces:
    """Where the files of the NVMe tier are, for clients that read blocks there themselves."""

    paths: Sequence[str]
    slab_bytes: int
    header_bytes: int
    engine: str  # the faster one of "gds" and "posix" into device memory
    sums: str  # where bytes that came by "gds" are checked: "device" or "host"


@dataclasses.dataclass(frozen=True)
class ServiceInfo:
    """What a client is told when it attaches."""

    tenant: str
    version: str
    generation: int
    arena_path: str
    arena_bytes: int
    arena_inode: int
    gpus: Sequence[tuple[str, int, bytes]] = ()  # of each: PCI address, bytes, handle
    nvme: NvmePlaces | None = None
    epochs: tuple[str, int] | None = None  # path and inode


class Doors(Protocol):
    """What a service asks of the doors that clients come through."""

    def settle(self, caller: Session, numbers: Sequence[int]) -> int:
        """See Processes.settle."""

    def end(self, number: int) -> bool:
        """End a session and its connections; False when there is none of that number."""

    def cut(self, number: int) -> None:
        """Close the connections that have joined a session, which is about to end."""
