"""The worker's side of the vLLM connector: copies between the engine's KV cache and the arena.

A slot holds, rank by rank, the blocks of one chunk in order, and of each block the page of every
layer of its group. Each transfer names the session that was given the slots; this process takes
part in that session, so that the slots go to nobody else while it may still write.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from kvstore.client.arena import Arena
from kvstore.client.client import Client, Session, connect
from kvstore.client.copying import copy
from kvstore.errors import KVStoreError

QUIET_S = 60.0  # no second line about failures within this time
REFUSED_S = 1.0  # a ticket that could not be used is not tried again for so long
PINNED_BYTES = 1 << 30  # registered with the device in one call

log = logging.getLogger("kvstore")


@dataclasses.dataclass
class Transfer(LoadStoreSpec):  # type: ignore[misc]
    """What the manager tells the workers of one job; it travels by pickle.

    number   of the transfer, unique in the manager
    request  whose blocks they are
    ticket   of the session that the slots were given to; empty: there is nothing to copy from
    counts   chunks of each group
    offsets  where the slot of each chunk starts in the arena, u64 each, group by group
    """

    number: int
    request: str
    ticket: str
    counts: tuple[int, ...]
    offsets: bytes


class Geometry:
    """Where each page lies in the KV cache of this worker, and in its part of a slot."""

    def __init__(self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, rank: int) -> None:
        self.blocks_per_chunk = blocks_per_chunk
        self.rank = rank
        self.pages: list[tuple[int, ...]] = []  # bytes of each page of a block, of each group
        self._starts: list[Any] = []  # of each page within a block's part of a slot
        self._addresses: list[Any] = []  # of each page of block 0
        self._strides: list[Any] = []  # from one block to the next
        for refs in kv_caches.group_data_refs:
            tensors = [kv_caches.tensors[ref.tensor_idx].tensor for ref in refs]
            pages = tuple(int(ref.page_size_bytes) for ref in refs)
            self.pages.append(pages)
            self._starts.append(np.concatenate([[0], np.cumsum(pages)[:-1]]).astype(np.int64))
            self._addresses.append(np.array([t.data_ptr() for t in tensors], np.int64))
            strides = [t.stride(0) * t.element_size() for t in tensors]
            self._strides.append(np.array(strides, np.int64))

    @property
    def shard_bytes(self) -> tuple[int, ...]:
        """Bytes of this worker's part of a slot, for each group."""
        return tuple(sum(pages) * self.blocks_per_chunk for pages in self.pages)

    def copies(self, transfer: Transfer, blocks: GPULoadStoreSpec, arena: Arena) -> Any:
        """Addresses in the KV cache, addresses in the arena, sizes: int64 arrays.

        Raises ValueError when blocks and chunks do not fit together.
        """
        offsets = np.frombuffer(transfer.offsets, np.uint64).astype(np.int64)
        ids = np.asarray(blocks.block_ids, np.int64)
        per_chunk, at, chunk = self.blocks_per_chunk, 0, 0
        parts: list[tuple[Any, Any, Any]] = []
        for group, count in enumerate(transfer.counts):
            size, first = blocks.group_sizes[group], blocks.block_indices[group] % per_chunk
            if -(-(size + first) // per_chunk) != count if size else count:
                raise ValueError(f"{size} blocks from {first} for {count} chunks")
            part = self.shard_bytes[group]
            places = first + np.arange(size)
            slots = offsets[chunk : chunk + count][places // per_chunk] + self.rank * part
            slots += places % per_chunk * (part // per_chunk)
            if size and (slots.min() < 0 or slots.max() + part > arena.size_bytes):
                raise ValueError("a slot is not in the arena")
            cached = ids[at : at + size, None] * self._strides[group] + self._addresses[group]
            stored = slots[:, None] + self._starts[group] + arena.address
            sizes = np.broadcast_to(np.array(self.pages[group], np.int64), cached.shape)
            parts.append((cached.ravel(), stored.ravel(), sizes.ravel()))
            at, chunk = at + size, chunk + count
        if at != len(ids) or chunk != len(offsets):
            raise ValueError(f"{len(ids)} blocks for {len(offsets)} chunks")
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


class HostCopier:
    """Copies where the KV cache is in host memory."""

    def fence(self) -> Any:
        """Nothing to wait for: the engine has computed what it submits."""
        return None

    def pin(self, arena: Arena) -> None:
        """Host memory needs no preparation."""

    def unpin(self, arena: Arena) -> None:
        """Nor its undoing."""

    def run(self, job: Job, targets: Any, sources: Any, sizes: Any) -> None:
        """Copy, page by page, until done or cancelled."""
        for target, source, size in zip(
            targets.tolist(), sources.tolist(), sizes.tolist(), strict=True
        ):
            with job.copying:
                if job.cancelled:
                    return
                copy(target, source, size)


class DeviceCopier:
    """Copies where the KV cache is in a GPU's memory: vLLM's own batched copies, on a stream for
    each direction. The arena is registered with the device piece by piece in the background; what
    is not registered yet is copied as well, only slower."""

    def __init__(self, device: Any) -> None:
        import torch

        self._torch = torch
        self._device = device
        self._streams = {stored: torch.cuda.Stream(device) for stored in (False, True)}
        self._pinned: dict[int, list[int]] = {}  # address of an arena -> of its pieces
        self._lock = threading.Lock()  # guards what is registered

    def fence(self) -> Any:
        """What the engine has submitted to the device until now."""
        event = self._torch.cuda.Event()
        event.record(self._torch.cuda.current_stream(self._device))
        return event

    def pin(self, arena: Arena) -> None:
        """Begin to register an arena, once."""
        pieces: list[int] = []
        if self._pinned.setdefault(arena.address, pieces) is pieces:
            threading.Thread(
                target=self._register, args=(arena, pieces), name="kvstore-pin", daemon=True
            ).start()

    def unpin(self, arena: Arena) -> None:
        """Before an arena is unmapped."""
        from vllm.v1.kv_offload.cpu.host_register import host_unregister

        with self._lock:
            for piece in self._pinned.pop(arena.address, []):
                host_unregister(piece)

    def _register(self, arena: Arena, pieces: list[int]) -> None:
        from vllm.v1.kv_offload.cpu.host_register import host_register

        self._torch.cuda.set_device(self._device)
        for start in range(0, arena.size_bytes, PINNED_BYTES):
            piece, size = arena.address + start, min(PINNED_BYTES, arena.size_bytes - start)
            with self._lock:
                if self._pinned.get(arena.address) is not pieces:
                    return  # it was unpinned meanwhile
                if not host_register(piece, size):
                    log.warning("kvstore: the arena could not be registered: copies are slower")
                    return
                pieces.append(piece)

    def run(self, job: Job, targets: Any, sources: Any, sizes: Any) -> None:
        """Copy after what the engine had submitted, and wait for the end."""
        from vllm import _custom_ops as ops

        tensors = [self._torch.from_numpy(part) for part in (sources, targets, sizes)]
        stream = self._streams[job.stored]
        with job.copying, self._torch.cuda.device(self._device), self._torch.cuda.stream(stream):
            if not job.cancelled:
                stream.wait_event(job.fence)
                ops.swap_blocks_batch(*tensors, is_src_access_order_any=not job.stored)
                stream.synchronize()


class Sessions:
    """Connections of this process, one for each session of the manager that it takes part in."""

    def __init__(self, path: Path | None, tenant: str, timeout_s: float) -> None:
        self._where = path, tenant, timeout_s
        self._lock = threading.Lock()
        self._clients: dict[str, tuple[Client, Session]] = {}  # ticket -> ; the newest is the last
        self._users: dict[str, int] = {}
        self._refused: dict[str, float] = {}  # ticket -> not to be tried again before
        self.closing: Callable[[Arena], None] = lambda _: None  # before an arena is unmapped

    def enter(self, ticket: str) -> Session:
        """Take part; `leave` must follow. Raises KVStoreError when the session has ended."""
        with self._lock:
            if ticket not in self._clients:
                self._join(ticket)
            self._users[ticket] = self._users.get(ticket, 0) + 1
            return self._clients[ticket][1]

    def leave(self, ticket: str) -> None:
        """Nothing is copied for that any more."""
        with self._lock:
            self._users[ticket] -= 1
            self._close_ended()

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            for ticket in list(self._clients):
                self._end(ticket)

    def _join(self, ticket: str) -> None:
        path, tenant, timeout_s = self._where
        if time.monotonic() < self._refused.get(ticket, 0.0):
            raise KVStoreError("the session could not be joined a moment ago")
        try:
            client = connect(path, tenant, timeout_s, join=ticket)
            self._clients[ticket] = client, client.session(client.deadline())
        except KVStoreError:
            self._refused = {ticket: time.monotonic() + REFUSED_S}
            raise
        self._close_ended()

    def _close_ended(self) -> None:
        """Sessions before the newest have ended. That nothing is written for them any more is for
        the manager to say to the daemon: one process cannot speak for the others."""
        for ticket in list(self._clients)[:-1]:
            if not self._users.get(ticket):
                self._end(ticket)

    def _end(self, ticket: str) -> None:
        client, session = self._clients.pop(ticket)
        self._users.pop(ticket, None)
        self.closing(session.arena)
        client.close()


class Job:
    """One transfer on its way. Whoever holds `copying` keeps it from touching memory."""

    def __init__(self, number: int, transfer: Transfer, blocks: Any, stored: bool) -> None:
        self.number = number  # vLLM's
        self.transfer = transfer
        self.blocks = blocks
        self.stored = stored  # into the store; else loaded from it
        self.fence: Any = None
        self.copying = threading.Lock()
        self.cancelled = False
        self.bytes = 0
        self.seconds = 0.0


class KVStoreWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies in threads of its own. vLLM is told of every job that it has ended; which of them
    failed, `outcomes` and `failed_requests` say."""

    def __init__(
        self, geometry: Geometry, copier: Any, sessions: Sessions, timeout_s: float, threads: int
    ) -> None:
        self.geometry = geometry
        self.copier = copier
        self.sessions = sessions
        self.timeout_s = timeout_s
        self.outcomes: dict[int, bool] = {}  # transfer -> whether it is right; taken by connector
        self.failed_requests: set[str] = set()  # whose load failed; taken by the connector
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvstore-copy")
        self._jobs: dict[int, tuple[Job, Future[bool]]] = {}
        self._ended: deque[Job] = deque()  # filled by threads
        self._told = -QUIET_S

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Transfer) -> bool:
        """Begin to copy from the KV cache into the arena; always taken."""
        self._submit(Job(job_id, dst_spec, src_spec, True))
        return True

    def submit_load(
        self,
        job_id: int,
        src_spec: Transfer,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        """Begin to copy from the arena into the KV cache; always taken."""
        self._submit(Job(job_id, src_spec, dst_spec, False))
        return True

    def get_finished(self) -> list[TransferResult]:
        """Jobs that have ended since the last call, the failed ones among them."""
        results = []
        while self._ended:
            job = self._ended.popleft()
            _, future = self._jobs.pop(job.number)
            good = not future.cancelled() and future.result()
            self.outcomes[job.transfer.number] = good
            if not good and not job.stored:
                self.failed_requests.add(job.transfer.request)
            done = (job.bytes, job.seconds) if good else (None, None)
            results.append(TransferResult(job.number, True, *done))
        return results

    def wait(self, job_ids: set[int]) -> None:
        """After this, these jobs touch the KV cache no more. What is not done within the timeout
        is cancelled, which is a failure."""
        found = [self._jobs[number] for number in job_ids if number in self._jobs]
        wait([future for _, future in found], self.timeout_s)
        for job, future in found:
            if not future.done():
                with job.copying:
                    job.cancelled = True
                future.cancel()

    def shutdown(self) -> None:
        """End the threads and the connections."""
        self.wait(set(self._jobs))
        self._pool.shutdown()
        self.sessions.close()

    # -- in the threads ------------------------------------------------------------------------

    def _submit(self, job: Job) -> None:
        job.fence = self.copier.fence()
        future = self._pool.submit(self._run, job)
        self._jobs[job.number] = job, future
        future.add_done_callback(lambda _: self._ended.append(job))

    def _run(self, job: Job) -> bool:
        """Whether the copy was made, and of the right bytes."""
        try:
            return self._copy(job)
        except Exception as error:  # what goes wrong here costs one job, never the engine
            now = time.monotonic()
            if now >= self._told + QUIET_S:
                self._told = now
                what = "store" if job.stored else "load"
                known = isinstance(error, KVStoreError)
                log.warning(
                    "kvstore: a %s failed: %s", what, error, exc_info=None if known else error
                )
            return False

    def _copy(self, job: Job) -> bool:
        transfer, started = job.transfer, time.monotonic()
        if not transfer.ticket:
            return False
        session = self.sessions.enter(transfer.ticket)
        try:
            self.copier.pin(session.arena)
            cached, stored, sizes = self.geometry.copies(transfer, job.blocks, session.arena)
            between = (stored, cached) if job.stored else (cached, stored)
            self.copier.run(job, *between, sizes)
            job.bytes, job.seconds = int(sizes.sum()), time.monotonic() - started
            # The daemon ends a session before it gives its slots away: if the connection is whole
            # after the copy was made, so is the copy.
            return not job.cancelled and session.transport.whole()
        finally:
            self.sessions.leave(transfer.ticket)


def make_worker(
    kv_caches: CanonicalKVCaches,
    *,
    blocks_per_chunk: int,
    rank: int,
    sessions: Sessions,
    timeout_s: float,
    threads: int,
) -> KVStoreWorker:
    """The worker for a KV cache, wherever its memory is."""
    tensors: Sequence[Any] = [one.tensor for one in kv_caches.tensors]
    device = tensors[0].device
    copier: HostCopier | DeviceCopier
    copier = HostCopier() if device.type == "cpu" else DeviceCopier(device)
    sessions.closing = copier.unpin
    geometry = Geometry(kv_caches, blocks_per_chunk, rank)
    return KVStoreWorker(geometry, copier, sessions, timeout_s, threads)
