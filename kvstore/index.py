"""The index of the NVMe tier: which block lies in which slot, kept in LMDB by a thread of its own.

It makes blocks survive a restart and decides nothing. Callers enqueue in constant time; the thread
commits in groups, always after the bytes that the records speak of are on their device.

Format (version 1): the LMDB file `index.mdb` with three databases

    slots     key    offset of the slot, 8 bytes big endian: two blocks can never claim one slot
              value  4 bytes layout number, 8 bytes sequence, 1 byte length of the hash (little
                     endian), the hash, 8 bytes of checksum per shard
    layouts   key    layout number, 4 bytes big endian;  value  the layout as JSON text
    meta      "format": version as text;  "file_ids": ids of the block files that the slots lie in

Records carry no checksum of their own: the checksums of the shards are seeded with layout, hash and
shard, so a record that is wrong in any field describes bytes that fail to verify, which is a miss.

Assumed of the medium: that it keeps what fdatasync has returned for. Nothing else: a damaged file
can kill any process that LMDB runs in, so a file from an earlier life is only read and rewritten by
children (see index_reader), and one that cannot be read is dropped. What is left is damage to the
file while we run; then the next life starts with an empty index.

Versions: 1, the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from kvstore import index_reader
from kvstore.index_reader import (
    HASH_BYTES_MIN,
    KEY,
    LAYOUT_KEY,
    LAYOUTS,
    META,
    SLOTS,
    VALUE,
    Scan,
    Unreadable,
    are_lengths,
)

FILE_NAME = "index.mdb"
VERSION = 1
MAP_BYTES = 1 << 30  # address space, not memory; doubled when full
PENDING_MAX = 8192  # more than these do not wait for the interval
BATCH_MAX = 1 << 14  # records of one transaction: the loop waits while they are sorted
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.1, 60.0


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What an earlier life left: parallel columns, oldest first.

    layouts      layout number -> JSON text; whether it is a layout is the caller's to check
    damaged      records that were skipped because they could not be taken apart
    """

    layouts: dict[int, str]
    offsets: list[int]
    layout_numbers: list[int]
    sequences: list[int]
    hashes: list[bytes]
    sums: list[bytes]
    damaged: int

    @property
    def last_sequence(self) -> int:
        """The highest sequence, 0 when there is none."""
        return self.sequences[-1] if self.sequences else 0


class Index:
    """See the module. `put`, `delete` and `put_layout` are for any thread and never wait for I/O.

    before_commit   called by the thread before each commit, to sync the block files; the commit
                    holds only what was enqueued before it was called
    on_state        called by the thread with a sentence when commits begin to fail or fail in
                    another way, and with None when they work again; must not raise
    warnings        sentences about what was found at the start
    """

    def __init__(
        self,
        folder: Path,
        *,
        file_ids: bytes,
        sync_interval_s: float,
        before_commit: Callable[[], None],
        on_state: Callable[[str | None], None],
    ) -> None:
        """Read what is there and start the thread.

        A file that cannot be believed is dropped with a warning; OSError when the folder cannot be
        used, or when the system lacks what it takes to read the file: then the file is kept.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        self.warnings: list[str] = []
        self._file_ids = file_ids
        self._sync_interval_s = sync_interval_s
        self._before_commit = before_commit
        self._on_state = on_state
        self._wake = threading.Condition(threading.Lock())
        self._pending: dict[int, bytes | None] = {}
        self._pending_layouts: dict[int, str] = {}
        self._enqueued = self._durable = 0  # counts of changes; equal when nothing waits
        self._first_at = 0.0  # when the oldest pending change came; 0 when there is none
        self._flush_mark = 0  # what someone waits for
        self._hurry = self._closing = False
        # The thread's own:
        self._taken: dict[int, bytes | None] = {}
        self._taken_layouts: dict[int, str] = {}
        self._taken_mark = 0
        self._state: str | None = None
        self._retry_s = self._retry_at = 0.0
        self._env: Any = None
        self._dbs: dict[bytes, Any] = {}
        self._inherited = self.path.exists()  # made in another life: not for our LMDB
        self._scan = self._read_old()
        self._thread = threading.Thread(target=self._run, name="kvstore-index", daemon=True)
        self._thread.start()

    def load(self) -> Loaded:
        """What the index held when it was opened; once, before the first `put`.

        Of two slots with the same block the younger is kept, the other is deleted.
        """
        scan, self._scan = self._scan, None
        if scan is None:
            return Loaded({}, [], [], [], [], [], 0)
        loaded, losers = _columns(scan)
        for offset in losers:
            self.delete(offset)
        return loaded

    def put_layout(self, number: int, text: str) -> None:
        """Make a layout number mean this text; before the first `put` that uses it."""
        LAYOUT_KEY.pack(number)
        with self._wake:
            self._pending_layouts[number] = text
            self._note()

    def put(self, offset: int, layout_number: int, sequence: int, hash: bytes, sums: bytes) -> None:
        """The slot at `offset` holds this block now, whatever it held before."""
        value = VALUE.pack(layout_number, sequence, len(hash)) + hash + sums
        assert offset >= 0 and are_lengths(len(value), len(hash)), (offset, hash, sums)
        with self._wake:
            self._pending[offset] = value
            self._note()

    def delete(self, offset: int) -> None:
        """The slot at `offset` holds nothing now."""
        with self._wake:
            self._pending[offset] = None
            self._note()

    def flush(self, timeout_s: float) -> bool:
        """Whether everything enqueued before is durable, within the timeout; does not wait for the
        interval, and tries again at once when commits have been failing."""
        with self._wake:
            mark = self._enqueued
            self._flush_mark = mark
            self._hurry = True
            self._wake.notify_all()
            return self._wake.wait_for(lambda: self._durable >= mark, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Commit what waits and end the thread; whether everything is durable. Tried once."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout_s)
        with self._wake:
            return self._durable == self._enqueued

    def waiting(self) -> int:
        """Slots whose last change is not durable yet."""
        with self._wake:
            return len(self._pending) + len(self._taken)

    # --- Any thread, holding the lock

    def _note(self) -> None:
        self._enqueued += 1
        if not self._first_at:
            self._first_at = time.monotonic()
            self._wake.notify_all()
        elif len(self._pending) == PENDING_MAX:
            self._wake.notify_all()

    # --- The thread

    def _run(self) -> None:
        while self._take():
            try:
                self._commit()
            except Exception as error:  # whatever it is, the records wait and the thread lives
                self._failed(error)
                if self._closing:
                    break
            else:
                self._succeeded()
        if self._env is not None:
            self._env.close()

    def _take(self) -> bool:
        """Wait until a commit is due and take what it is to hold; False when the end has come."""
        with self._wake:
            while (wait_s := self._wait_s()) is None or wait_s > 0:
                if self._closing and not self._first_at and not self._is_failing():
                    return False
                self._wake.wait(wait_s)
            self._hurry = False
            if not self._is_failing():
                self._taken, self._pending = self._pending, {}
                self._taken_layouts, self._pending_layouts = self._pending_layouts, {}
                self._taken_mark, self._first_at = self._enqueued, 0.0
        return True

    def _is_failing(self) -> bool:
        return bool(self._taken or self._taken_layouts)

    def _wait_s(self) -> float | None:
        """Seconds until the next commit is due; None while there is nothing to commit."""
        if self._is_failing():
            now = self._hurry or self._closing
            return 0.0 if now else self._retry_at - time.monotonic()
        if not self._first_at:
            return None
        if self._closing or self._flush_mark > self._durable or len(self._pending) >= PENDING_MAX:
            return 0.0
        return self._first_at + self._sync_interval_s - time.monotonic()

    def _commit(self) -> None:
        """Make what was taken durable: the bytes of the blocks first, then what speaks of them."""
        self._before_commit()
        if self._env is None:
            self._open()
        records = iter(self._taken.items())
        for _ in range(0, max(1, len(self._taken)), BATCH_MAX):
            batch = sorted(islice(records, BATCH_MAX))
            while True:
                try:
                    self._write(batch)
                    break
                except lmdb.MapFullError:
                    self._env.set_mapsize(2 * self._env.info()["map_size"])

    def _write(self, batch: Iterable[tuple[int, bytes | None]]) -> None:
        slots = self._dbs[SLOTS]
        with self._env.begin(write=True) as txn:
            for number, text in self._taken_layouts.items():
                txn.put(LAYOUT_KEY.pack(number), text.encode(), db=self._dbs[LAYOUTS])
            for offset, value in batch:
                if value is None:
                    txn.delete(KEY.pack(offset), db=slots)
                else:
                    txn.put(KEY.pack(offset), value, db=slots)

    def _succeeded(self) -> None:
        self._retry_s = 0.0
        self._say(None)
        with self._wake:
            self._durable = self._taken_mark
            done, self._taken, self._taken_layouts = self._taken, {}, {}
            self._wake.notify_all()
        while done:  # to drop many at once would hold the interpreter
            done.popitem()

    def _failed(self, error: Exception) -> None:
        """Keep what was taken for another try, with an environment opened anew."""
        if self._env is not None:
            self._env.close()
            self._env = None
        # LMDB's own error numbers are negative: the file itself is in doubt, and not for our LMDB.
        self._inherited |= isinstance(error, lmdb.Error) and getattr(error, "code", -1) < 0
        self._retry_s = min(2 * self._retry_s or BACKOFF_S_MIN, BACKOFF_S_MAX)
        self._retry_at = time.monotonic() + self._retry_s
        self._say(
            f"the NVMe index {self.path} cannot be written ({type(error).__name__}: {error}): new "
            "NVMe blocks will be lost at a restart; check the space and the health of that disk"
        )

    def _say(self, state: str | None) -> None:
        if state != self._state:
            self._state = state
            self._on_state(state)

    def _open(self) -> None:
        """Open a file that is ours from its first byte: rewritten, or new."""
        if self._inherited:
            fresh = self.path.with_name(FILE_NAME + ".new")
            try:
                index_reader.rewrite(self.path, fresh)
                os.replace(fresh, self.path)
            except Unreadable as error:
                self._drop(f"cannot be read ({error})")
                self._say(self.warnings[-1])
            self._inherited = False
        size = self.path.stat().st_size if self.path.exists() else 0
        with contextlib.ExitStack() as undo:
            env = lmdb.open(
                os.fspath(self.path),
                subdir=False,
                lock=False,  # one process, one thread; the block files are locked
                map_size=max(MAP_BYTES, 4 * size),
                max_dbs=3,
                mode=0o600,
                readahead=False,
            )
            undo.callback(env.close)
            with env.begin(write=True) as txn:  # one, so that a new file is whole or empty
                self._dbs = {name: env.open_db(name, txn) for name in (SLOTS, LAYOUTS, META)}
                for field, value in self._meta().items():
                    txn.put(field.encode(), value, db=self._dbs[META])
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            undo.callback(os.close, folder)
            os.fsync(folder)
            undo.pop_all()
            os.close(folder)
        self._env = env

    def _meta(self) -> dict[str, bytes]:
        return {"format": str(VERSION).encode(), "file_ids": self._file_ids}

    # --- What another life left

    def _read_old(self) -> Scan | None:
        """What the file holds, or None when there is none or it is of no use and was dropped."""
        if not self._inherited:
            return None
        try:
            scan = index_reader.scan(self.path)
        except Unreadable as error:
            self._drop(f"cannot be read ({error})")
            return None
        if scan.meta.get("format") != self._meta()["format"]:
            self._drop("has another format")
        elif scan.meta.get("file_ids") != self._file_ids:
            self._drop("belongs to other block files")
        else:
            return scan
        return None

    def _drop(self, why: str) -> None:
        self.path.unlink(missing_ok=True)
        self._inherited = False
        self.warnings.append(
            f"the NVMe index {self.path} {why}: it starts empty, the blocks it knew are misses"
        )


def _columns(scan: Scan) -> tuple[Loaded, list[int]]:
    """The records oldest first, and the offsets of slots whose block lies in a younger one too."""
    layouts, damaged = {}, scan.damaged
    for number, text in scan.layouts.items():
        try:
            json.loads(text)
            layouts[number] = text
        except ValueError:
            damaged += 1
    pieces = list(_pieces(scan))
    damaged += sum(len(keys) // KEY.size for _, keys, _ in scan.chunks)
    damaged -= sum(len(piece[0]) for piece in pieces)
    columns: list[list[Any]] = [[], [], [], [], []]
    for piece in pieces:
        for column, part in zip(columns, piece[:-1], strict=True):
            column += part
    if len(pieces) > 1:
        order = np.argsort(np.array(columns[0], np.uint64), kind="stable").tolist()
        columns = [[column[i] for i in order] for column in columns]
    sequences, offsets, numbers, hashes, sums = columns
    alike = _some_alike([piece[-1] for piece in pieces])
    kept = _kept(columns, scan.ordered, alike=alike)
    losers: list[int] = []
    if len(kept) < len(columns[0]):
        losers = sorted(set(columns[1]) - {columns[1][i] for i in kept})
        columns = [[column[i] for i in kept] for column in columns]
    sequences, offsets, numbers, hashes, sums = columns
    return Loaded(layouts, offsets, numbers, sequences, hashes, sums, damaged), losers


def _kept(columns: list[list[Any]], ordered: bool, *, alike: bool) -> Sequence[int]:
    """The rows that are left when each slot and each block keeps its youngest row only. `alike`:
    there may be blocks that have several."""
    _, offsets, numbers, hashes, _ = columns
    rows: Sequence[int] = range(len(offsets))
    if not ordered:
        rows = sorted({offset: i for i, offset in enumerate(offsets)}.values())
    if alike and len(set(zip(numbers, hashes, strict=True))) < len(hashes):
        rows = sorted({(numbers[i], hashes[i]): i for i in rows}.values())
    return rows


def _some_alike(starts: list[Any]) -> bool:
    """Whether two hashes begin with the same eight bytes: that is told faster than the whole."""
    numbers = np.sort(np.concatenate(starts)) if starts else np.zeros(0)
    return bool((numbers[1:] == numbers[:-1]).any())


def _pieces(scan: Scan) -> Iterable[tuple[Any, ...]]:
    """The same five columns, sorted by sequence, for each shape of record; and how each hash
    begins."""
    for length in sorted({length for length, _, _ in scan.chunks if length > VALUE.size}):
        chunks = [chunk for chunk in scan.chunks if chunk[0] == length]
        keys = np.frombuffer(b"".join(keys for _, keys, _ in chunks), ">u8")
        rows = np.frombuffer(b"".join(values for _, _, values in chunks), np.uint8)
        rows = rows.reshape(-1, length)
        for hash_bytes in np.unique(rows[:, VALUE.size - 1]).tolist():
            if not are_lengths(length, hash_bytes):
                continue
            mine = np.flatnonzero(rows[:, VALUE.size - 1] == hash_bytes)
            sequences = _numbers(rows[mine, 4:12], "<u8")
            order = mine[np.argsort(sequences, kind="stable")]
            some = rows.take(order, axis=0)
            hash_end = VALUE.size + hash_bytes
            yield (
                np.sort(sequences).tolist(),
                keys[order].tolist(),
                _numbers(some[:, 0:4], "<u4").tolist(),
                _strings(some[:, VALUE.size : hash_end]),
                _strings(some[:, hash_end:]),
                _numbers(some[:, VALUE.size : VALUE.size + HASH_BYTES_MIN], "<u8"),
            )


def _numbers(columns: Any, kind: str) -> Any:
    return np.ascontiguousarray(columns).view(kind).ravel()


def _strings(columns: Any) -> list[bytes]:
    strings: list[bytes] = (
        np.ascontiguousarray(columns).view(f"V{columns.shape[1]}").ravel().tolist()
    )
    return strings


if VALUE.size != 13 or KEY.size != 8:  # the slices above are cut for this
    raise AssertionError("the format of a record has changed")
