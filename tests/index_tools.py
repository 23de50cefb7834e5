"""What the tests of the index share: an opener that cleans up, a listener, small records."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from kvstore import index_reader
from kvstore.index import Index, Loaded
from kvstore.index_reader import KEY

NEVER_S = 3600.0  # an interval that does not pass in a test
SOON_S = 30.0  # a timeout that does not pass in a test
IDS = b"ids of the files"
SUM = b"8 bytes."


def nothing() -> None:
    pass


class States:
    """What on_state was told, and a way to wait for the next word."""

    def __init__(self) -> None:
        self.told: list[str | None] = []
        self._condition = threading.Condition()

    def __call__(self, state: str | None) -> None:
        with self._condition:
            self.told.append(state)
            self._condition.notify_all()

    def wait_for(self, count: int) -> list[str | None]:
        with self._condition:
            assert self._condition.wait_for(lambda: len(self.told) >= count, SOON_S)
            return list(self.told)


class Opener:
    """Opens indexes and closes them at the end of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states = States()
        self.opened: list[Index] = []

    def __call__(
        self,
        *,
        file_ids: bytes = IDS,
        sync_interval_s: float = NEVER_S,
        before_commit: Callable[[], None] = nothing,
    ) -> Index:
        index = Index(
            self.folder,
            file_ids=file_ids,
            sync_interval_s=sync_interval_s,
            before_commit=before_commit,
            on_state=self.states,
        )
        self.opened.append(index)
        return index

    def reloaded(self) -> Loaded:
        """What a next life finds."""
        self.close()
        index = self()
        assert index.warnings == []
        loaded = index.load()
        self.close()
        return loaded

    def close(self) -> None:
        while self.opened:
            assert self.opened.pop().close(SOON_S)


def hash_of(number: int, length: int = 32) -> bytes:
    return number.to_bytes(8, "big") * (length // 8) + bytes(length % 8)


def durable(index: Index) -> dict[int, bytes]:
    """What lies in the file right now, by slot; while no commit is running."""
    scan = index_reader.scan(index.path)
    return {
        KEY.unpack_from(keys, i * KEY.size)[0]: bytes(values[i * length : (i + 1) * length])
        for length, keys, values in scan.chunks
        for i in range(len(keys) // KEY.size)
    }
