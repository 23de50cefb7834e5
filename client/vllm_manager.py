"""The scheduler's side of the vLLM connector: asks the daemon once for each request, and keeps what
was granted and reserved until the workers have copied.

Every call of vLLM returns at once with what is known here; the daemon is asked in a batch before
vLLM looks a request up. What may wait (blocks that come up from NVMe, the end of a lease) is for
two threads.
"""

from __future__ import annotations

import contextlib
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
from kvstore.client.vllm_requests import Group, Known, Moving
from kvstore.client.vllm_waiting import Awaited, Thread
from kvstore.client.vllm_worker import Transfer
from kvstore.protos import kvstore_pb2 as pb
from kvstore.types import Layout

HOLD_S = 5.0  # what a request was granted and does not use is given back after so long
LATE_S = 0.1  # beyond a deadline, for the answer to arrive
WINDOW_TRIES = 4  # calls to find a sliding window's blocks
WINDOW_MORE = 2  # blocks beyond the window: vLLM may round it up
ASKED_AT_ONCE = 1  # requests for which a step waits for the daemon's answer; more wait a step
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
        self._requests: dict[str, Known] = {}
        self._moving: dict[int, Moving] = {}
        self._numbers = itertools.count(1)
        self._swept = 0.0
        self._reported: Counter[str] = Counter()
        self._asked = 0  # requests, in this step
        self._later: list[Awaited] = []  # to be asked for after it
        self._asking = Thread("kvstore-ask")
        self._loading = Thread("kvstore-await")
        self._ending = Thread("kvstore-end")

    def open(self, layouts: Sequence[Layout]) -> None:
        """What a block of each group is."""
        self._caches = [Cache(self.guard.client, layout) for layout in layouts]

    # -- looking up ----------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """A request has come."""
        self._requests[req_context.req_id] = Known()
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

    def _holds(self, known: Known, computed: int) -> bool:
        """Whether what was asked before is still of use."""
        assert known.asked_at is not None
        lost = known.session is not None and known.session.transport.dead is not None
        old = time.monotonic() > known.asked_at + HOLD_S + self.load_deadline_s
        earlier = any(
            computed // group.chunk_tokens < first
            for group, first in zip(self.groups, known.first, strict=True)
        )
        return not (lost or old or earlier)

    def _arrived(self, known: Known) -> bool:
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

    def _ask_full(self, known: Known, at: int = 0) -> None:
        """The prefix in each group of full attention from the `at`-th on; then windows."""
        for group_at in range(at, len(self.groups)):
            group = self.groups[group_at]
            if group.window is not None:
                continue
            hashes = known.request.block_hashes
            keys, count = functools.partial(group.keys, hashes), group.count(hashes)
            then = functools.partial(self._ask_full, known, group_at + 1)
            if not self._ask(known, group_at, keys, count, known.first[group_at], then):
                return  # it is awaited, and goes on then
        self._ask_windows(known)

    def _ask_windows(self, known: Known) -> None:
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

    def _ask_window(self, known: Known, windows: list[int], end: int, tries: int) -> None:
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

        if self._ask(known, at, lambda: wanted, len(wanted), 0, then):
            then()

    def _ask(
        self,
        known: Known,
        at: int,
        make_keys: Callable[[], list[bytes]],
        count: int,
        skip: int,
        then: Callable[[], None],
    ) -> bool:
        """Ask for so many chunks, but for the first `skip`. False: the answer, or some of them, are
        on their way, and `then` is to be done when they are there, or late."""
        if skip >= count:
            return True
        if self._asked >= ASKED_AT_ONCE:
            self._ask_later(known, at, make_keys, skip, then)
            return False
        self._asked += 1
        keys = make_keys()
        grant = self._acquire(self._caches[at], keys, skip, 0.0)
        if grant is not None:
            self._keep(known, grant, keys[skip:])
        return self._complete(known, at, keys, skip, grant, then)

    def _ask_later(
        self,
        known: Known,
        at: int,
        make_keys: Callable[[], list[bytes]],
        skip: int,
        then: Callable[[], None],
    ) -> None:
        """The same in a thread, after this step."""
        keys: list[bytes] = []

        def ask(_: float) -> Grant | None:
            keys.extend(make_keys())
            awaited.keys = keys[skip:]
            return self._acquire(self._caches[at], keys, skip, 0.0)

        def go_on() -> None:
            if self._complete(known, at, keys, skip, awaited.grant, then):
                then()

        assert known.asked_at is not None
        awaited = Awaited(ask, known.asked_at + self.load_deadline_s, keys, go_on)
        known.awaited = awaited
        self._later.append(awaited)

    def _complete(
        self,
        known: Known,
        at: int,
        keys: list[bytes],
        skip: int,
        grant: Grant | None,
        then: Callable[[], None],
    ) -> bool:
        """Whether no more is on its way into memory; else that is awaited."""
        if grant is None or grant._reply.stop not in COMING or not self.load_deadline_s:
            return True
        got = skip + grant.length
        assert known.asked_at is not None
        until = known.asked_at + self.load_deadline_s
        acquire = functools.partial(self._acquire, self._caches[at], keys, got)
        known.awaited = Awaited(acquire, until, keys[got:], then)
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

    def _keep(self, known: Known, grant: Grant, keys: list[bytes]) -> None:
        """Hold what was granted, of the first of these chunks."""
        session = grant.session
        if known.session is not session:
            self._release(known)  # what was granted before ended with its session
            known.session = session
        if grant.length:
            known.grants.append(grant)
            known.found.update(zip(keys, grant.places.offsets, strict=False))

    def _drop(self, known: Known) -> None:
        """Forget what was asked for a request, and give back what was granted."""
        if known.awaited is not None:
            late = known.awaited.drop()
            if late is not None:
                known.grants.append(late)
            known.awaited = None
        self._release(known)
        known.asked_at = known.session = None

    def _release(self, known: Known) -> None:
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
        self._moving[number] = Moving(known, held, False, self.workers)
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
        self._moving[number] = Moving(known, held, True, self.workers)
        transfer = Transfer(number, name, _ticket(held[0]._session), self._counts(new), offsets)
        return PrepareStoreOutput(new, transfer, [])

    def _reserve(
        self, known: Known, keys: Collection[OffloadKey]
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

    def _parent(self, known: Known, group: Group, key: bytes) -> bytes | None:
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

    def _end(self, moving: Moving) -> None:
        """In the thread: make stored blocks visible, or give back what was held."""
        for one in moving.held:
            if isinstance(one, Grant):
                one.release()
            elif moving.failed or self.guard.ask(one.commit, None) is None:
                one.abort()

    # -- the rest of its life ------------------------------------------------------------------

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """A step was scheduled: requests that run now need no more of what they were granted."""
        later, self._later, self._asked = self._later, [], 0
        if later:
            self._asking.do(functools.partial(_run_all, later))
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
        self._asking.close()
        self._loading.close()
        self._ending.close()
        self.guard.close()


def _run_all(asks: Sequence[Awaited]) -> None:
    for one in asks:
        one.run()


def _ticket(session: Session) -> str:
    """What lets the workers take part in this very session."""
    attached = session.attached
    return f"{attached.session}:{attached.token.hex()}"
