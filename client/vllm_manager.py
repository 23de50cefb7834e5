"""The scheduler's side of the vLLM connector: asks the daemon once for each request, and keeps what
was granted and reserved until the workers have copied.

Every call of vLLM returns at once with what is known here; the daemon is asked in a batch before
vLLM looks a request up. What may wait (blocks that come up from NVMe, the end of a lease) is for
two threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)

from kvstore.client.cache import Cache
from kvstore.client.client import Session
from kvstore.client.grant import Grant
from kvstore.client.guard import Guard
from kvstore.client.reservation import Reservation
from kvstore.client.vllm_waiting import Awaited, Thread
from kvstore.client.vllm_worker import Transfer
from kvstore.protos import kvstore_pb2 as pb
from kvstore.types import KEYS_PER_CALL_MAX, Layout

HOLD_S = 5.0  # what a request was granted and does not use is given back after so long
LATE_S = 0.1  # beyond a deadline, for the answer to arrive
WINDOW_TRIES = 4  # calls to find a sliding window's blocks
WINDOW_MORE = 2  # blocks beyond the window: vLLM may round it up
COMING = (pb.AcquireReply.PENDING, pb.AcquireReply.LATE)  # the next block is on its way into memory

COUNTERS = {
    "failed": "Calls that the store did not answer in time, or refused.",
    "skipped": "Calls that were left out while the store was known not to answer.",
    "defects": "Calls that failed for an error in the connector or its configuration.",
    "refused": "Chunks that found no room in the store.",
    "failed_loads": "Loads that failed; the engine computed instead.",
    "failed_stores": "Stores that failed; nothing was stored.",
}

HIT, MISS = LookupResult.HIT, LookupResult.MISS  # for each key of each request: every step counts

log = logging.getLogger("kvstore")


@dataclasses.dataclass(frozen=True)
class Group:
    """A KV cache group of the engine.

    number        vLLM's, which stands at the end of each key
    chunk_tokens  tokens of a chunk, the unit that is stored
    chunk_hashes  of the engine's block hashes; the last of them is the chunk's
    window        chunks that a sliding window needs; None: full attention
    """

    number: int
    chunk_tokens: int
    chunk_hashes: int
    window: int | None

    def keys(self, hashes: Sequence[bytes]) -> list[bytes]:
        """vLLM's keys of the chunks of a request."""
        end = self.number.to_bytes(4, "big")
        each = self.chunk_hashes
        return [one + end for one in hashes[each - 1 : KEYS_PER_CALL_MAX * each : each]]


class _Request:
    """What is known of one request of the engine."""

    def __init__(self) -> None:
        self.request: Any = None  # vLLM's
        self.asked_at: float | None = None
        self.first: list[int] = []  # chunks that were computed when it was asked, of each group
        self.found: dict[bytes, int] = {}  # key -> where its slot starts in the arena
        self.grants: list[Grant] = []
        self.session: Session | None = None
        self.awaited: Awaited | None = None
        self.load_failed = False  # it is not asked for again


@dataclasses.dataclass
class _Moving:
    """A transfer that workers are about: what it holds, and how many have not reported yet."""

    owner: _Request
    held: list[Grant] | list[Reservation]
    stored: bool
    missing: int
    failed: bool = False


class KVStoreManager(OffloadingManager):  # type: ignore[misc]
    """See the module. `open` must be called before anything is found or stored.

    workers          processes that copy, each a part of every block
    load_deadline_s  the longest that a request waits for blocks that come up from NVMe
    prefill_tokens_per_s  of the engine: what is slower to load than to compute is left out; 0: all
    """

    def __init__(
        self,
        guard: Guard,
        groups: Sequence[Group],
        *,
        workers: int,
        load_deadline_s: float = 1.0,
        prefill_tokens_per_s: float = 0.0,
    ) -> None:
        self.guard = guard
        self.groups = groups
        self.workers = workers
        self.load_deadline_s = load_deadline_s
        self.tokens_per_s = prefill_tokens_per_s or None
        self.counts: Counter[str] = Counter()  # what has happened since `get_stats` was last asked
        self._caches: list[Cache] = []  # of each group
        self._by_number = {group.number: at for at, group in enumerate(groups)}
        self._requests: dict[str, _Request] = {}
        self._moving: dict[int, _Moving] = {}
        self._numbers = itertools.count(1)
        self._swept = 0.0
        self._reported: Counter[str] = Counter()
        self._loading = Thread("kvstore-await")
        self._ending = Thread("kvstore-end")

    def open(self, layouts: Sequence[Layout]) -> None:
        """What a block of each group is."""
        self._caches = [Cache(self.guard.client, layout) for layout in layouts]

    # -- looking up ----------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """A request has come."""
        self._requests[req_context.req_id] = _Request()
        return RequestOffloadingContext()

    def begin(self, request: Any) -> None:
        """The request itself, whose block hashes the connector may read."""
        known = self._requests.get(request.request_id)
        if known is not None:
            known.request = request

    def ready(self, request: Any, computed: int) -> bool:
        """Whether it is known what the store has of this request; False: ask again in a later step.

        computed  tokens that the engine has itself
        """
        known = self._requests.get(request.request_id)
        if known is None or known.load_failed or not self._caches:
            return True
        if known.asked_at is not None and not self._holds(known, computed):
            self._drop(known)
        if known.asked_at is None:
            known.asked_at = time.monotonic()
            known.first = [computed // group.chunk_tokens for group in self.groups]
            self._ask_full(known)
        return self._arrived(known)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether this chunk was granted to the request."""
        known = self._requests.get(req_context.req_id)
        return HIT if known is not None and key in known.found else MISS

    def _holds(self, known: _Request, computed: int) -> bool:
        """Whether what was asked before is still of use."""
        assert known.asked_at is not None
        lost = known.session is not None and known.session.transport.dead is not None
        old = time.monotonic() > known.asked_at + HOLD_S + self.load_deadline_s
        earlier = any(
            computed // group.chunk_tokens < first
            for group, first in zip(self.groups, known.first, strict=True)
        )
        return not (lost or old or earlier)

    def _arrived(self, known: _Request) -> bool:
        """Take what was awaited, when it is there, and go on with what follows from it."""
        while known.awaited is not None:
            awaited = known.awaited
            if not awaited.done and time.monotonic() < awaited.until + LATE_S:
                return False
            known.awaited = None
            if not awaited.done:  # the engine computes what it has not heard of
                late = awaited.drop()
                known.grants += [late] if late is not None else []
                break
            if awaited.grant is not None:
                self._keep(known, awaited.grant, awaited.keys)
            awaited.then()
        return True

    def _ask_full(self, known: _Request, at: int = 0) -> None:
        """The prefix in each group of full attention from the `at`-th on; then windows."""
        for group_at in range(at, len(self.groups)):
            group = self.groups[group_at]
            if group.window is not None:
                continue
            keys = group.keys(known.request.block_hashes)
            then = functools.partial(self._ask_full, known, group_at + 1)
            if not self._ask(known, group_at, keys, known.first[group_at], then):
                return  # it is awaited, and goes on then
        self._ask_windows(known)

    def _ask_windows(self, known: _Request) -> None:
        """For each sliding window the chunks at its end, last first: those that are needed to go on
        behind the prefix that was found."""
        windows = [at for at, group in enumerate(self.groups) if group.window is not None]
        if not windows:
            return
        end = known.request.num_tokens - 1
        for at, group in enumerate(self.groups):
            if group.window is None:
                keys = group.keys(known.request.block_hashes)
                chunks = itertools.takewhile(known.found.__contains__, keys[known.first[at] :])
                end = min(end, (known.first[at] + sum(1 for _ in chunks)) * group.chunk_tokens)
        self._ask_window(known, windows, end, WINDOW_TRIES)

    def _ask_window(self, known: _Request, windows: list[int], end: int, tries: int) -> None:
        """The first of these windows that ends at `end` tokens or, failing that, before."""
        if not windows or not tries:
            return
        at, group = windows[0], self.groups[windows[0]]
        assert group.window is not None
        keys = group.keys(known.request.block_hashes)
        last = min(-(-end // group.chunk_tokens), len(keys))
        first = max(known.first[at], last - group.window - WINDOW_MORE)
        wanted = keys[first:last][::-1]
        if not wanted:
            return

        def then() -> None:
            got = sum(1 for _ in itertools.takewhile(known.found.__contains__, wanted))
            needed = (group.window or 0) + (end % group.chunk_tokens > 0)
            if got >= min(needed, len(wanted)):
                self._ask_window(known, windows[1:], end, WINDOW_TRIES)
            else:  # the gap rules out every window that reaches over it
                self._ask_window(known, windows, (last - got - 1) * group.chunk_tokens, tries - 1)

        if self._ask(known, at, wanted, 0, then):
            then()

    def _ask(
        self, known: _Request, at: int, keys: list[bytes], skip: int, then: Callable[[], None]
    ) -> bool:
        """Ask for these chunks behind the first `skip`. False: some are on their way into memory,
        and `then` is to be done when they are there, or late."""
        if skip >= len(keys):
            return True
        acquire = functools.partial(self._acquire, self._caches[at], keys)
        grant = acquire(skip, 0.0)
        if grant is None:
            return True
        self._keep(known, grant, keys[skip:])
        if grant._reply.stop not in COMING or not self.load_deadline_s:
            return True
        got = skip + grant.length
        assert known.asked_at is not None
        until = known.asked_at + self.load_deadline_s
        known.awaited = Awaited(functools.partial(acquire, got), until, keys[got:], then)
        self._loading.do(known.awaited.run)
        return False

    def _acquire(
        self, cache: Cache, keys: list[bytes], skip: int, deadline_s: float
    ) -> Grant | None:
        poll = not deadline_s and self.load_deadline_s > 0  # then it is asked for again
        return self.guard.ask(
            lambda: cache._acquire(keys, deadline_s, self.tokens_per_s, 0, skip=skip, poll=poll),
            None,
        )

    def _keep(self, known: _Request, grant: Grant, keys: list[bytes]) -> None:
        """Hold what was granted, of the first of these chunks."""
        session = grant.session
        if known.session is not session:
            self._release(known)  # what was granted before ended with its session
            known.session = session
        if grant.length:
            known.grants.append(grant)
            known.found.update(zip(keys, grant.places.offsets, strict=False))

    def _drop(self, known: _Request) -> None:
        """Forget what was asked for a request, and give back what was granted."""
        if known.awaited is not None:
            late = known.awaited.drop()
            if late is not None:
                known.grants.append(late)
            known.awaited = None
        self._release(known)
        known.asked_at = known.session = None

    def _release(self, known: _Request) -> None:
        grants, known.grants = known.grants, []
        known.found = {}
        for grant in grants:
            self._ending.do(grant.release)

    # -- loading and storing -------------------------------------------------------------------

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> Transfer:
        """What workers need to copy chunks that were found. What cannot be copied any more is a
        failed load for them."""
        number, name = next(self._numbers), req_context.req_id
        known = self._requests.get(name)
        if known is None or known.session is None or any(key not in known.found for key in keys):
            if known is not None:
                known.load_failed = True
            return Transfer(number, name, "", (), b"")
        counts = self._counts(keys)
        offsets = array("Q", map(known.found.__getitem__, keys))
        held, known.grants = known.grants, []
        self._moving[number] = _Moving(known, held, False, self.workers)
        ticket = _ticket(known.session)
        self._drop(known)
        return Transfer(number, name, ticket, counts, offsets.tobytes())

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput:
        """Reserve slots for those chunks that are not stored yet. What finds no room is left out,
        and not asked for again in this request."""
        number, name = next(self._numbers), req_context.req_id
        known = self._requests.get(name)
        reserved: list[tuple[list[bytes], Reservation]] = []
        if known is not None and known.request is not None and self._caches:
            reserved = self.guard.ask(lambda: self._reserve(known, keys), reserved)
        new = [part[at] for part, reservation in reserved for at in reservation.indices]
        if known is None or not new:
            return PrepareStoreOutput([], Transfer(number, name, "", (), b""), [])
        held = [reservation for _, reservation in reserved]
        offsets = b"".join(reservation._places.offsets.tobytes() for reservation in held)
        self._moving[number] = _Moving(known, held, True, self.workers)
        transfer = Transfer(number, name, _ticket(held[0]._session), self._counts(new), offsets)
        return PrepareStoreOutput(new, transfer, [])

    def _reserve(
        self, known: _Request, keys: Collection[OffloadKey]
    ) -> list[tuple[list[bytes], Reservation]]:
        reserved: list[tuple[list[bytes], Reservation]] = []
        for group, cache in zip(self.groups, self._caches, strict=True):
            end = group.number.to_bytes(4, "big")
            part = [bytes(key) for key in keys if key.endswith(end)]
            if not part:
                continue
            parent = self._parent(known, group, part[0])
            reserve = functools.partial(cache.reserve, part, parent=parent, deadline_s=0.0)
            reservation = self.guard.ask(reserve, None)
            if reservation is None:
                break
            self.counts["refused"] += reservation.refused
            if reserved and reservation._session is not reserved[0][1]._session:
                self._ending.do(reservation.abort)
                break
            reserved.append((part, reservation))
        return reserved

    def _parent(self, known: _Request, group: Group, key: bytes) -> bytes | None:
        """The chunk before this one in its request."""
        before, each = None, group.chunk_hashes
        hashes = known.request.block_hashes
        with contextlib.suppress(ValueError):
            at = hashes.index(key[:-4]) - each
            before = hashes[at] + key[-4:] if at >= 0 else None
        return before

    def _counts(self, keys: Collection[bytes]) -> tuple[int, ...]:
        """How many of these keys belong to each group."""
        counts = [0] * len(self.groups)
        for key in keys:
            counts[self._by_number[int.from_bytes(key[-4:], "big")]] += 1
        return tuple(counts)

    def reported(self, outcomes: dict[int, tuple[int, int]]) -> None:
        """Workers have ended transfers: how many since the last report, and how many of them
        failed, for each number."""
        for number, (ended, failed) in outcomes.items():
            moving = self._moving.get(number)
            if moving is None:
                continue
            moving.missing -= ended
            moving.failed |= failed > 0
            if moving.missing > 0:
                continue
            del self._moving[number]
            if moving.failed:
                self.counts["failed_stores" if moving.stored else "failed_loads"] += 1
                moving.owner.load_failed |= not moving.stored
            self._ending.do(functools.partial(self._end, moving))

    def _end(self, moving: _Moving) -> None:
        """In the thread: make stored blocks visible, or give back what was held."""
        for one in moving.held:
            if isinstance(one, Grant):
                one.release()
            elif moving.failed or self.guard.ask(one.commit, None) is None:
                one.abort()

    # -- the rest of its life ------------------------------------------------------------------

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """A step was scheduled: requests that run now need no more of what they were granted."""
        for name in context.new_req_ids:
            known = self._requests.get(name)
            if known is not None and known.asked_at is not None:
                self._drop(known)
        now = time.monotonic()
        if now > self._swept + HOLD_S:
            self._swept = now
            for known in self._requests.values():
                if known.asked_at is not None and now > known.asked_at + 2 * HOLD_S:
                    self._drop(known)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """A request has ended; transfers for it may still be under way."""
        known = self._requests.pop(req_context.req_id, None)
        if known is not None:
            self._drop(known)

    def reset_cache(self) -> None:
        """The engine forgets its own cache. What is stored stays."""
        for known in self._requests.values():
            self._drop(known)

    def get_stats(self) -> Any:
        """What has happened since the last call; None where nothing has."""
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
            OffloadingConnectorStats,
        )

        total = Counter({**self.guard.counts, **self.counts})
        total.subtract(self._reported)
        if not any(total.values()):
            return None
        self._reported.update(total)
        stats = OffloadingConnectorStats()
        for name, count in total.items():
            if count and name in COUNTERS:
                stats.increase_counter(f"vllm:kvstore_{name}", count)
        return stats

    def shutdown(self) -> None:
        """End the threads and the session."""
        self._loading.close()
        self._ending.close()
        self.guard.close()


def _ticket(session: Session) -> str:
    """What lets the workers take part in this very session."""
    attached = session.attached
    return f"{attached.session}:{attached.token.hex()}"
