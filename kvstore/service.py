"""One tenant's service: requests of either door to the store, the store's orders to the hands.

Runs on the event loop and does no work proportional to bytes. A door calls `handle` and gets the
answer, or None: then the answer, a message or a KVStoreError, comes through the callback that the
door gave along. After sending an answer the door calls `settle`, for what can wait until then.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import secrets
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from struct import unpack
from typing import Any

from kvstore import types
from kvstore.accesses import Hints
from kvstore.catalog import LayoutEntry
from kvstore.clearing import Clearing
from kvstore.collaborators import Doors, Hands, ServiceInfo
from kvstore.drains import Drains
from kvstore.errors import (
    ArenaGone,
    InvalidKeys,
    InvalidRequest,
    ProtocolMismatch,
    SessionLost,
    TooLarge,
)
from kvstore.leases import ReadLease, Session
from kvstore.mirror import NO_OFFSET
from kvstore.orders import Move, MoveKind, Outcome
from kvstore.parking import LATER, Parking, bounded
from kvstore.protos import kvstore_pb2 as pb
from kvstore.reads import LATE
from kvstore.recorder import Recording
from kvstore.store import Store
from kvstore.tidings import Tidings
from kvstore.types import SLOT_ALIGNMENT, Layout
from kvstore.verification import Verification
from kvstore.writes import REFUSED, Reserved

Answer = Callable[[Any], None]
READ_VERBS = frozenset((pb.LOOKUP, pb.ACQUIRE, pb.RELEASE, pb.USED))
MARK_VERBS = frozenset((pb.RESERVE, pb.COMMIT, pb.FORGET, pb.CLEAR))


class Service:
    """The service object of one tenant; both doors hold the same one."""

    def __init__(
        self,
        store: Store,
        hands: Hands,
        info: ServiceInfo,
        document: Callable[[], bytes],
        keys_per_call: int = types.KEYS_PER_CALL_MAX,
    ) -> None:
        self.store = store
        self.info = info
        self.keys_per_call = keys_per_call
        self._hands = hands
        self._document = document
        self._loop = asyncio.get_running_loop()
        self._reads: dict[ReadLease, tuple[Answer, asyncio.TimerHandle]] = {}
        self._parking = Parking(self._loop, self._carry_out_once, self._carry_out)
        self._verification = Verification(store)
        self.tidings = Tidings(info.tenant, store.placement)
        self._drains = Drains(store, self._loop)
        self.clearing = Clearing(store, self._loop, self.settle)
        self.recording = Recording(store)
        self.doors: Doors | None = None  # told when they are there
        # Does work a piece at a time in quiet moments; False when it does not: see BusyPoll.
        self.later: Callable[[Callable[[], bool]], bool] = lambda work: False
        self.refusal = ""  # why nobody may attach any more
        self._verbs: dict[int, tuple[Callable[[Session, Any, Answer], Any], Any]] = {
            pb.OPEN: (self._open, pb.OpenRequest),
            pb.LOOKUP: (self._lookup, pb.LookupRequest),
            pb.RESERVE: (self._reserve, pb.ReserveRequest),
            pb.COMMIT: (self._commit, pb.CommitRequest),
            pb.ABORT: (self._abort, pb.AbortRequest),
            pb.ACQUIRE: (self._acquire, pb.AcquireRequest),
            pb.RELEASE: (self._release, pb.ReleaseRequest),
            pb.USED: (self._used, pb.UsedRequest),
            pb.PREFETCH: (self._prefetch, pb.PrefetchRequest),
            pb.RETAIN: (self._retain, pb.RetainRequest),
            pb.FORGET: (self._forget, pb.ForgetRequest),
            pb.STATS: (self._stats, pb.StatsRequest),
            pb.CLEAR: (self._clear, pb.ClearRequest),
            pb.VERIFY: (self._verify, pb.VerifyRequest),
            pb.SETTLE: (self._settle_sessions, pb.SettleRequest),
            pb.DRAIN: (self._drain, pb.DrainRequest),
            pb.TRACE: (self.recording.handle, pb.TraceRequest),
        }
        self.requests = self.store.counters.requests
        for number in self._verbs:
            self.requests[pb.Verb.Name(number).lower()] = 0

    # -- what the doors call -------------------------------------------------------------------

    def attach(self, request: Any) -> tuple[Session, Any]:
        """A client has connected: its session, and the message that tells it where things are."""
        if request.protocol != types.PROTOCOL_VERSION:
            raise ProtocolMismatch(
                f"the client speaks protocol {request.protocol}, this daemon "
                f"{types.PROTOCOL_VERSION}: install the same version of kvstore on both sides"
            )
        if self.refusal:
            raise ArenaGone(self.refusal)
        if request.join:
            found = self.store.sessions.get(request.join)
            if found is None or not secrets.compare_digest(found.token, request.token):
                raise SessionLost(
                    f"there is no session {request.join} of that token to join: it may have ended"
                )
            session = found
        else:
            session = self.store.attach(request.client[:128])
            session.token = secrets.token_bytes(16)
        info = self.info
        return session, pb.AttachReply(
            protocol=types.PROTOCOL_VERSION,
            version=info.version,
            tenant=info.tenant,
            generation=info.generation,
            arena_path=info.arena_path,
            arena_bytes=info.arena_bytes,
            arena_inode=info.arena_inode,
            keys_max=self.keys_per_call,
            leases_max=self.store.limits.leases_per_session,
            session=session.number,
            token=session.token,
            gpus=[pb.GpuArena(bus=bus, bytes=size, handle=held) for bus, size, held in info.gpus],
            nvme=pb.NvmeFiles(**dataclasses.asdict(info.nvme)) if info.nvme else None,
            epochs_path=info.epochs[0] if info.epochs else "",
            epochs_inode=info.epochs[1] if info.epochs else 0,
        )

    def detach(self, session: Session) -> list[int]:
        """A client has gone; returns the blocks to hand to `unquarantine` once nobody can write
        them any more."""
        for lease in [lease for lease in self._reads if lease.session is session]:
            self._reads.pop(lease)[1].cancel()
        self._parking.leave(session)
        quarantined = self.store.detach(session, self._now())
        self.settle()
        return quarantined

    def unquarantine(self, blocks: list[int]) -> None:
        """The writers of these blocks are gone."""
        self.store.unquarantine(blocks, self._now())
        self.settle()

    def handle_bytes(self, session: Session, verb: int, payload: bytes, answer: Answer) -> Any:
        """As `handle`, with the request still encoded."""
        try:
            request = self._verbs[verb][1].FromString(payload)
        except KeyError:
            raise InvalidRequest(f"there is no verb {verb}: see kvstore.proto") from None
        except Exception as error:
            name = pb.Verb.Name(verb).lower()
            raise InvalidRequest(
                f"the {name} request of {len(payload)} bytes cannot be decoded: {error}"
            ) from None
        return self.handle(session, verb, request, answer)

    def handle(self, session: Session, verb: int, request: Any, answer: Answer) -> Any:
        """Carry a request out. Returns the answer, or None when `answer` will be called with it.

        Raises KVStoreError; nothing has changed then.
        """
        handler = self._verbs[verb][0]
        if self.store.undigested and verb not in READ_VERBS:
            self.settle()  # it may depend on what was asked before
        reply = handler(session, request, answer)
        if verb in MARK_VERBS:
            self._carry_out()  # the slot table must say so before the client hears of it
        return reply

    def settle(self) -> None:
        """Do what waits until an answer is out: tell the policies, carry out orders."""
        self.store.digest(self._now())
        self._carry_out()

    def settle_later(self, verb: int) -> None:
        """As `settle`; after reading, what the policies are told may wait for a quiet moment."""
        self._settle_soon(may_wait=verb in READ_VERBS)

    def _settle_soon(self, *, may_wait: bool) -> None:
        """As `settle`; what may wait is done a piece at a time, where there are quiet moments."""
        if may_wait and self.later(self._settle_one):
            if self.store.behind:
                self._settle_one()
            self._carry_out()
        else:
            self.settle()

    def _settle_one(self) -> bool:
        left = self.store.digest(self._now(), 1)
        self._carry_out()
        return left > 0

    def finished(self, ended: Iterable[tuple[Move, Outcome, str]]) -> None:
        """Moves have ended."""
        now = self._now()
        for move, outcome, problem in ended:
            if outcome is Outcome.CORRUPT:
                self.tidings.damaged(move)
            if problem:
                self.tidings.failed(move, problem)
            self.store.finished(move, outcome, now)
            self.tidings.tell()
            if move.kind is MoveKind.VERIFY:
                self._verification.checked(move.block, outcome, now)
        self._settle_soon(may_wait=not len(self._parking))  # who waits depends on what was asked
        self._drains.go_on(self._now())

    def tick(self) -> None:
        """Called about once a second."""
        self.store.tick(self._now())
        self.tidings.tell()
        self._settle_soon(may_wait=not len(self._parking))  # who waits depends on what was asked
        self._drains.go_on(self._now())

    def idle(self) -> bool:
        """Whether nothing is under way: no spill or load, nothing to be cleared."""
        placement = self.store.placement
        placement.pump(self._now())
        self._carry_out()
        return not (placement.spills or placement.loads or self.clearing.runs)

    # -- verbs ---------------------------------------------------------------------------------

    def _open(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["open"] += 1
        sent = request.layout
        layout = Layout(
            model=sent.model,
            engine=sent.engine,
            dtype=sent.dtype,
            block_tokens=sent.block_tokens,
            shards=sent.shards,
            shard_bytes=sent.shard_bytes,
        )
        entry = self.store.open(layout)
        self._hands.layout(entry)
        return pb.OpenReply(layout=entry.number, slot_bytes=entry.slot_bytes)

    def _lookup(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["lookup"] += 1
        entry, keys = self._keys(request.keys)
        tiers = self.store.lookup(entry, keys)
        return pb.LookupReply(length=len(tiers), tiers=tiers)

    def _reserve(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["reserve"] += 1
        return self._or_park(session, request, answer, self._attempt_reserve)

    def _commit(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["commit"] += 1
        lent, page = self.store.lend(session, request.lease)
        stored = self.store.commit(session, request.lease, self._now())
        reply = pb.CommitReply(held=stored is not None, stored=stored or 0, lent=lent)
        reply.lent_offset = page * SLOT_ALIGNMENT
        return reply

    def _abort(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["abort"] += 1
        return pb.AbortReply(held=self.store.abort(session, request.lease, self._now()))

    def _acquire(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["acquire"] += 1
        return self._or_park(session, request, answer, self._attempt_acquire)

    def _release(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["release"] += 1
        return pb.ReleaseReply(held=self.store.release(session, request.lease))

    def _used(self, session: Session, request: Any, answer: Answer) -> Any:
        started = time.perf_counter()
        self.requests.update(("used", "acquire", "release"))  # it stands for them
        entry, keys = self._keys(request.keys)
        self.store.used(session, entry, keys, request.prefill_tokens_per_s)
        self.store.counters.dram.latency.record(time.perf_counter() - started)

    def _prefetch(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["prefetch"] += 1
        entry, keys = self._keys(request.keys)
        return pb.PrefetchReply(ordered=self.store.prefetch(entry, keys, self._now()))

    def _retain(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["retain"] += 1
        entry, keys = self._keys(request.keys)
        if not 0 <= request.priority <= 100:
            raise InvalidRequest(f"priority is {request.priority}: give 0 to 100")
        if not request.ttl_s >= 0:
            raise InvalidRequest(f"ttl_s is {request.ttl_s}: give seconds, 0 for ever")
        until = self._now() + request.ttl_s if request.ttl_s > 0 else None
        return pb.RetainReply(retained=self.store.retain(entry, keys, request.priority, until))

    def _forget(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["forget"] += 1
        entry, keys = self._keys(request.keys, distinct=True)
        return pb.ForgetReply(forgotten=self.store.forget(entry, keys))

    def _stats(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["stats"] += 1
        self.store.digest(self._now())  # else some misses would have no cause yet
        return pb.StatsReply(json=self._document())

    def _clear(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["clear"] += 1
        return self.clearing.begin(answer)

    def _verify(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["verify"] += 1
        self._verification.start(answer, self._now())
        return None

    def _settle_sessions(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["settle"] += 1
        assert self.doors is not None
        return pb.SettleReply(settled=self.doors.settle(session, request.sessions))

    def _drain(self, session: Session, request: Any, answer: Answer) -> Any:
        self.requests["drain"] += 1
        assert self.doors is not None
        if request.session:
            return pb.DrainReply(found=self.doors.end(request.session))
        self._drains.begin(answer, self._now())
        return None

    # -- inside --------------------------------------------------------------------------------

    def _now(self) -> float:
        return self._loop.time()

    def _keys(self, packed: Any, *, distinct: bool = False) -> tuple[LayoutEntry, Sequence[bytes]]:
        """The layout and the hashes of a request; raises what is wrong with them."""
        layouts = self.store.catalog.layouts
        if packed.layout >= len(layouts):
            raise InvalidRequest(
                f"layout {packed.layout} is not open here, {len(layouts)} are: open it again"
            )
        size, hashes = packed.hash_bytes, packed.hashes
        if not hashes:
            return layouts[packed.layout], []
        types.check_hash_length(size, size)
        count, rest = divmod(len(hashes), size)
        if rest:
            raise InvalidKeys(f"{len(hashes)} bytes of hashes are no multiple of {size}")
        if count > self.keys_per_call:
            raise TooLarge(
                f"{count} keys in one call: at most {self.keys_per_call} are taken; split the list"
            )
        keys = unpack(f"{size}s" * count, hashes)
        if distinct and len(set(keys)) != count:
            raise InvalidKeys("a hash comes twice in one list: give each block once")
        return layouts[packed.layout], keys

    def _or_park(
        self,
        session: Session,
        request: Any,
        answer: Answer,
        attempt: Callable[[Session, Any, Answer, float, bool], Any],
    ) -> Any:
        """The answer to a request that needs room, or None when it waits for some."""
        wait_s = bounded(request.deadline_s)
        end = self._loop.time() + wait_s
        reply = attempt(session, request, answer, end, not wait_s or self._parking.full)
        if reply is None:
            again = functools.partial(attempt, session, request, answer, end)
            keys = len(request.keys.hashes) // max(1, request.keys.hash_bytes)
            self._parking.park(session, wait_s, again, answer, keys)
        return None if reply is LATER else reply

    def _attempt_reserve(
        self, session: Session, request: Any, answer: Answer, end: float, last: bool
    ) -> Any:
        entry, keys = self._keys(request.keys, distinct=True)
        shard = request.shard if request.HasField("shard") else None
        if shard is not None and shard >= entry.layout.shards:
            raise InvalidRequest(
                f"shard {shard} of a layout with {entry.layout.shards} shards: they count from 0"
            )
        skip = request.skip
        reserved = self.store.reserve(
            session,
            entry,
            keys[skip:] if skip else keys,
            self._now(),
            shard=shard,
            force=last,
            context=keys[:skip] or ([request.parent] if request.parent else ()),
            hints=Hints.of(request.hints),
            lend=request.lend,
            lent=request.lent,
        )
        return None if reserved.waiting and not last else self._reserved(request, reserved)

    def _attempt_acquire(
        self, session: Session, request: Any, answer: Answer, end: float, last: bool
    ) -> Any:
        started, skip = time.perf_counter(), request.skip
        entry, keys = self._keys(request.keys)
        lease = self.store.acquire(
            session,
            entry,
            keys[skip:] if skip else keys,
            self._now(),
            wait=not last,
            enough=request.enough,
            tokens_per_s=request.prefill_tokens_per_s,
            context=keys[:skip],
            devices=request.gpus,
            poll=request.poll,
            direct=request.direct and self.info.nvme is not None,
        )
        if lease.parked:
            return None
        if lease.answered:
            reply = self._grant(lease)
            self.store.counters.dram.latency.record(time.perf_counter() - started)
            return reply
        self._reads[lease] = (answer, self._loop.call_at(end, self._acquire_late, lease))
        return LATER

    def _reserved(self, request: Any, reserved: Reserved) -> Any:
        if not (request.again and reserved.lease):
            self.store.counters.refused += reserved.status.count(REFUSED)
        return pb.ReserveReply(
            lease=reserved.lease.number if reserved.lease else 0,
            status=reserved.status,
            offsets=array("Q", [page * SLOT_ALIGNMENT for page in reserved.pages]).tobytes(),
        )

    def _grant(self, lease: ReadLease) -> Any:
        catalog, placement = self.store.catalog, self.store.placement
        dram = catalog.dram
        offsets = [dram[block] << 12 for block in lease.blocks]
        reply = pb.AcquireReply(
            lease=lease.number if offsets else 0,
            length=len(offsets),
            tiers=lease.tiers,
            stop=lease.stop,  # type: ignore[arg-type]  # its number
            copies=placement.mirror.offsets(lease),
        )
        if lease.held:
            held = set(lease.held)
            offsets = [
                NO_OFFSET if block in held else offset
                for block, offset in zip(lease.blocks, offsets, strict=True)
            ]
            reply.beside = b"".join(
                (catalog.nvme[block] << 12).to_bytes(8, "little") + (catalog.sums[block] or b"")
                for block in lease.beside()
            )
        reply.offsets = array("Q", offsets).tobytes()
        if lease.stop and (rate := placement.load_bytes_per_s):
            reply.estimate_s = lease.entry.slot_bytes * max(1, placement.loads) / rate
        return reply

    def _acquire_late(self, lease: ReadLease) -> None:
        """The deadline of an acquire has come."""
        answer, _ = self._reads.pop(lease)
        self.store.cut(lease, LATE)
        answer(self._grant(lease))
        self.settle()

    def _carry_out(self) -> None:
        """Carry out the store's orders until there are none. Who waits for room is asked once: a
        try that fails may free something by itself, and would be asked again for ever."""
        asked = False
        while self.store.room.orders:
            if self._carry_out_once() and not asked:
                asked = True
                self._parking.retry()

    def _carry_out_once(self) -> bool:
        """Carry out what there is now; returns whether room may have come."""
        orders = self.store.take_orders()
        if orders.marks:
            self._hands.mark(self.store, orders.marks)
        if orders.touched:
            self._hands.touch(self.store, orders.touched)
        if orders.moves:
            self._hands.move(orders.moves)
        if orders.index:
            self._hands.index(orders.index)
        for lease in orders.answers:
            answer, timer = self._reads.pop(lease)
            timer.cancel()
            answer(self._grant(lease))
        return orders.room
