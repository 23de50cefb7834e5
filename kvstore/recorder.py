"""Keeps a record of what clients ask for, in the file that `kvstore.trace_file` describes.

    event loop   Recorder.observe: a few bytes into a buffer, full buffers into a queue
    writer       compresses and writes them, begins the next part, removes the oldest

The loop never waits for the writer: what it cannot take is dropped and counted, and so is what the
disk does not take. Hashes are salted with a key that nobody keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import hashlib
import os
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import structlog

from kvstore.accesses import REUSES, Access, AccessKind
from kvstore.catalog import LayoutEntry
from kvstore.errors import InvalidRequest, KVStoreError
from kvstore.protos import kvstore_pb2 as pb
from kvstore.store import Store
from kvstore.trace_file import (
    COUNT,
    HASH_BYTES,
    IS_COUNT,
    IS_LAYOUT,
    IS_NODES,
    IS_REQUEST,
    IS_TAG,
    LAYOUT,
    NO_TAG,
    NODES,
    NOTHING,
    PARTS_MAX,
    REQUEST,
    RUN_MAX,
    TAG,
    Header,
    pack_frame,
    part_path,
)
from kvstore.traces import ASKED, OFFERED, Sizes

MAX_BYTES_DEFAULT = 1 << 30
MAX_BYTES_LEAST = 16 << 20  # a part must hold the longest request
BUFFER_BYTES = 256 << 10
QUEUED_BYTES_MAX = 16 << 20
NODES_MAX = 1 << 18  # that are remembered at once: some 60 MB
TAGS_MAX = 1_024
FLUSH_S = 5.0  # what a crash may cost while requests come
REQUEST_BYTES_MAX = 1 << 20  # of the longest request, and what compression may add to a buffer
CLOSE_S = 10.0
DEPTH_BITS = 32
DEPTH_MASK = (1 << DEPTH_BITS) - 1

log = structlog.get_logger()


class Medium(Protocol):
    """Where the parts go. Raises OSError when that does not work."""

    def begin(self, header: bytes) -> None:
        """The next part. The one before is complete."""

    def write(self, frame: bytes) -> None:
        """Append to the part: all of it, or nothing."""

    def close(self) -> None:
        """The last part is complete."""

    def files(self) -> tuple[int, int]:
        """How many parts there are, and their bytes."""


class Files:
    """Parts as files that only their owner may read; the oldest go when there are too many."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        self._begun = False
        self._size = 0
        self._older: list[int] = []  # sizes of the parts before, the newest first

    def begin(self, header: bytes) -> None:
        """See Medium. What failed half way is gone on with by the next call."""
        if not self._begun:
            for age in range(1, PARTS_MAX):
                if part_path(self.path, age).exists():
                    code = errno.EEXIST
                    raise FileExistsError(code, os.strerror(code), str(part_path(self.path, age)))
        elif self._file >= 0 and self._size:
            self.close()
            self._older = self._older[: PARTS_MAX - 2]
            for age in range(len(self._older), -1, -1):
                os.rename(part_path(self.path, age), part_path(self.path, age + 1))
            self._older.insert(0, self._size)
            self._size = 0
        if self._file < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(self.path, flags, 0o600)
            self._begun = True
        self.write(header)

    def write(self, frame: bytes) -> None:
        """See Medium."""
        left = memoryview(frame)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            with contextlib.suppress(OSError):  # a reader finds half a frame, and ends there
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
            raise
        self._size += len(frame)

    def close(self) -> None:
        """See Medium."""
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)

    def files(self) -> tuple[int, int]:
        """See Medium."""
        return 1 + len(self._older), self._size + sum(self._older)


class _Buffer(NamedTuple):
    """Records on their way to the writer. `anew`: they need nothing of what came before."""

    records: bytes
    requests: int
    anew: bool
    header: Header | None  # of the part that begins with them


class Writer(threading.Thread):
    """Compresses and writes. The loop reads the numbers; nobody else changes them."""

    def __init__(self, medium: Medium, opened: Callable[[OSError | None], None]) -> None:
        super().__init__(name="kvstore-trace", daemon=True)
        self.queue: queue.SimpleQueue[_Buffer | int] = queue.SimpleQueue()
        self.kept = 0
        self.lost = 0
        self.taken_bytes = 0  # of records, before compression
        self.part_bytes = 0
        self.parts_taken = 0  # buffers that were to begin a part
        self.failures = 0
        self._broken = False  # until a buffer comes that needs nothing of what was lost
        self._medium = medium
        self._opened = opened
        self._begins: Header | None = None  # a part that could not be begun yet
        self._parts = 0

    def run(self) -> None:
        """Until it is told to end, by the number of requests that never came here."""
        opened = False
        while isinstance(buffer := self.queue.get(), _Buffer):
            try:
                self._take(buffer)
            except OSError as error:
                if not opened:
                    self._opened(error)
                    return
                if not self._broken:
                    log.warning("a trace cannot be written", problem=str(error))
                self._broken = True
                self.failures += 1
                self.lost += buffer.requests
            self.taken_bytes += len(buffer.records)
            if not opened:
                opened = True
                self._opened(None)
        count = COUNT.pack(IS_COUNT, self.kept, self.lost + buffer)
        with contextlib.suppress(OSError):
            self._medium.write(pack_frame(count, anew=False))
        with contextlib.suppress(OSError):
            self._medium.close()

    def _take(self, buffer: _Buffer) -> None:
        if buffer.header is not None:
            self.parts_taken += 1
            self._begins = buffer.header
        if self._broken and not buffer.anew:
            self.lost += buffer.requests
            return
        if self._begins is not None:
            header = dataclasses.replace(self._begins, part=self._parts).pack()
            self._medium.begin(header)
            self._parts += 1
            self._begins, self.part_bytes = None, len(header)
        if buffer.records:
            frame = pack_frame(buffer.records, anew=buffer.anew)
            self._medium.write(frame)
            self.part_bytes += len(frame)
        self._broken = False
        self.kept += buffer.requests


class Recorder:
    """One recording. `observe` is called on the loop; it forgets the access when it returns."""

    def __init__(
        self,
        medium: Medium,
        sizes: Sizes,
        now: float,
        opened: Callable[[OSError | None], None],
        max_bytes: int = MAX_BYTES_DEFAULT,
    ) -> None:
        assert max_bytes >= MAX_BYTES_LEAST
        self.dropped = 0
        self._medium = medium
        self._salt = secrets.token_bytes(32)
        self._recording = secrets.token_bytes(16)
        self._sizes = sizes
        self._started = now
        self._part_max = max_bytes // PARTS_MAX - BUFFER_BYTES - REQUEST_BYTES_MAX
        self._parts = 1  # that were to be begun
        self._next_part = False  # the next buffer begins one
        self._handed = 0
        self._failures = 0  # of the writer, that are known here
        self._flushed = now
        self._forget()
        self.writer = Writer(medium, opened)
        self.writer.queue.put(_Buffer(b"", 0, True, self._header(now)))
        self.writer.start()

    def observe(self, access: Access) -> None:
        """Note an access. The work is that of the blocks that are not known yet, and one more."""
        entry, keys = access.entry, access.keys
        known = self._known.get(entry.number)
        if known is None:
            known = self._layout(entry)
        at = length = len(keys)
        found = (NOTHING << DEPTH_BITS) | 0
        while at:
            found = known.get(keys[at - 1], 0)
            if found & DEPTH_MASK == at:
                break
            at -= 1
        node = found >> DEPTH_BITS if at else NOTHING
        if at < length:
            node = self._define(known, self._salted_as[entry.number], keys, at, node)
        self._buffer += REQUEST.pack(
            IS_REQUEST,
            ASKED if access.kind is AccessKind.ASKED else OFFERED,
            REUSES.index(access.reuse) if access.reuse in REUSES else 0,
            entry.number,
            self._tag(access.tag) if access.tag else NO_TAG,
            node,
            length,
            access.skip,
            access.granted,
            access.nvme,
            access.missed,
            access.stop,
            access.tokens_per_s,
            access.now - self._started,
        )
        self._requests += 1
        if len(self._buffer) >= BUFFER_BYTES or access.now - self._flushed > FLUSH_S:
            self._hand_over(access.now)

    def stop(self, now: float) -> None:
        """Nothing more is observed; the writer ends when it has written what it has."""
        self._hand_over(now)
        self.writer.queue.put(self.dropped)
        self._salt = b""
        self._forget()

    def counts(self) -> tuple[int, int, int, int]:
        """Requests written, requests dropped, bytes, files."""
        files, size = self._medium.files()
        return self.writer.kept, self.dropped + self.writer.lost, size, files

    def _forget(self) -> None:
        """Begin anew: what is numbered so far is not known any more."""
        self._buffer = bytearray()
        self._requests = 0
        self._anew = True
        self._next_node = 0
        self._known: dict[int, dict[bytes, int]] = {}
        self._salted_as: dict[int, Any] = {}
        self._tags: dict[str, int] = {}

    def _header(self, now: float) -> Header:
        return Header(
            recording=self._recording,
            part=0,
            started_s=now - self._started,
            sizes=self._sizes,
        )

    def _salted(self, name: bytes) -> bytes:
        return hashlib.blake2b(name, digest_size=HASH_BYTES, key=self._salt).digest()

    def _layout(self, entry: LayoutEntry) -> dict[bytes, int]:
        layout = entry.layout
        self._buffer += LAYOUT.pack(
            IS_LAYOUT,
            entry.number,
            self._salted(entry.fingerprint),
            layout.block_tokens,
            layout.block_bytes,
        )
        secret = hashlib.blake2b(entry.fingerprint, digest_size=32, key=self._salt).digest()
        # As good as a key, and a third of the time: the state is copied for each hash.
        salted = hashlib.blake2b(digest_size=HASH_BYTES, salt=secret[:16], person=secret[16:])
        self._salted_as[entry.number] = salted
        known = self._known[entry.number] = {}
        return known

    def _tag(self, tag: str) -> int:
        number = self._tags.get(tag)
        if number is None:
            if len(self._tags) == TAGS_MAX:
                return NO_TAG
            number = self._tags[tag] = len(self._tags)
            self._buffer += TAG.pack(IS_TAG, number, self._salted(tag.encode()))
        return number

    def _define(self, known: dict[bytes, int], salted: Any, keys: Any, at: int, parent: int) -> int:
        """Nodes for keys[at:], behind the parent; returns the last one."""
        node, copy = self._next_node, salted.copy
        while at < len(keys):
            run = keys[at : at + RUN_MAX]
            self._buffer += NODES.pack(IS_NODES, parent, len(run))
            for key in run:
                at += 1
                known[key] = node << DEPTH_BITS | at
                hashed = copy()
                hashed.update(key)
                self._buffer += hashed.digest()
                node += 1
            parent = node - 1
        self._next_node = node
        return parent

    def _hand_over(self, now: float) -> None:
        """Give the buffer to the writer, or drop it. The next one may have to begin anew."""
        writer, size = self.writer, len(self._buffer)
        self._flushed = now
        behind = self._handed - writer.taken_bytes
        failures, self._failures = self._failures, writer.failures
        if behind + size > QUEUED_BYTES_MAX or (failures != self._failures and not self._anew):
            self.dropped += self._requests
            self._forget()
            return
        header = None
        if self._next_part:
            header, self._next_part = self._header(now), False
            self._parts += 1
        writer.queue.put(_Buffer(bytes(self._buffer), self._requests, self._anew, header))
        self._handed += size
        self._buffer.clear()
        self._requests, self._anew = 0, False
        if self._part_bytes() > self._part_max:
            self._next_part = True
        if self._next_part or self._next_node >= NODES_MAX:
            self._forget()

    def _part_bytes(self) -> int:
        """What the present part has at most, once all is written that is on its way."""
        writer = self.writer
        on_its_way = self._handed - writer.taken_bytes  # read first: rather too much
        return on_its_way + (writer.part_bytes if writer.parts_taken == self._parts else 0)


class Recording:
    """The recording of one tenant, if there is one: what the verb TRACE does."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path: Path | None = None
        self._recorder: Recorder | None = None
        self._busy = False  # it is being begun, or ended

    def handle(self, session: object, request: Any, answer: Callable[[Any], None]) -> Any:
        """Carry a TraceRequest out; the answer comes later. Raises InvalidRequest."""
        self._store.counters.requests["trace"] += 1
        if request.action == pb.TraceRequest.START:
            self._start(request, answer)
        elif request.action == pb.TraceRequest.STOP:
            self._stop(answer)
        else:
            return self._reply()
        return None

    def close(self) -> None:
        """The daemon stops: what was recorded is written, if that takes no longer than CLOSE_S."""
        recorder = self._end()
        if recorder is not None:
            recorder.writer.join(CLOSE_S)

    def _start(self, request: Any, answer: Callable[[Any], None]) -> None:
        path, loop = Path(request.path), asyncio.get_running_loop()
        max_bytes = request.max_bytes or MAX_BYTES_DEFAULT
        if self._busy or self._recorder is not None:
            raise InvalidRequest(f"a trace is being recorded to {self._path}: stop it first")
        if not path.is_absolute() or "\0" in request.path:
            raise InvalidRequest(f"{path} is no absolute path: write it from the root")
        if not MAX_BYTES_LEAST <= max_bytes < 1 << 62:
            raise InvalidRequest(
                f"a bound of {max_bytes} bytes is too small for a trace: give 16 MiB or more"
            )

        def opened(error: OSError | None) -> None:
            loop.call_soon_threadsafe(lambda: self._opened(recorder, error, answer))

        config = self._store.placement.config
        sizes = Sizes(
            dram_bytes=config.dram_bytes,
            nvme_bytes=config.nvme_bytes,
            slab_bytes=config.slab_bytes,
            write_policy=self._store.placement.write_policy,
            write_budget=config.write_budget,
        )
        self._path, self._busy = path, True
        recorder = Recorder(Files(path), sizes, loop.time(), opened, max_bytes)

    def _opened(
        self, recorder: Recorder, error: OSError | None, answer: Callable[[Any], None]
    ) -> None:
        self._busy = False
        if error is None:
            self._recorder = recorder
            self._store.observers.append(recorder.observe)
            log.info("trace begun", path=str(self._path))
            answer(self._reply())
        else:
            answer(_refused(self._path, error))

    def _stop(self, answer: Callable[[Any], None]) -> None:
        loop = asyncio.get_running_loop()
        recorder = self._end()
        if recorder is None:
            raise InvalidRequest("no trace is being recorded: start one with `kvstore trace start`")
        self._busy = True

        def done() -> None:
            self._busy = False
            reply = self._reply(recorder)
            log.info("trace ended", path=str(self._path), requests=reply.requests)
            answer(reply)

        def wait() -> None:
            recorder.writer.join()
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(done)

        threading.Thread(target=wait, name="kvstore-trace-end", daemon=True).start()

    def _end(self) -> Recorder | None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            self._store.observers.remove(recorder.observe)
            recorder.stop(asyncio.get_running_loop().time())
        return recorder

    def _reply(self, recorder: Recorder | None = None) -> Any:
        recorder = recorder or self._recorder
        if recorder is None:
            return pb.TraceReply()
        requests, dropped, size, files = recorder.counts()
        return pb.TraceReply(
            recording=recorder is self._recorder,
            path=str(self._path),
            requests=requests,
            dropped=dropped,
            bytes=size,
            files=files,
        )


def _refused(path: Path | None, error: OSError) -> KVStoreError:
    if isinstance(error, FileExistsError):
        return InvalidRequest(f"{error.filename or path} is there already: name a new file")
    return InvalidRequest(
        f"the daemon cannot create {path}: {error.strerror}: name a place that it may write to"
    )
