"""A cache of blocks of one layout: lookup, put, get, and their parts reserve and acquire."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvstore.client import checks
from kvstore.client.ahead import Ahead
from kvstore.client.arena import addresses_of, on_device
from kvstore.client.copy_out import CopyOut
from kvstore.client.copying import copy_all
from kvstore.client.grant import Grant, count_tiers
from kvstore.client.places import Places
from kvstore.client.recall import FEW, FEW_BYTES, Recall
from kvstore.client.reservation import NEW, PRESENT, REFUSED, Reservation
from kvstore.client.results import GetResult, Match, PutResult
from kvstore.errors import InvalidBlock, InvalidRequest, SessionLost, Unavailable
from kvstore.protos import kvstore_pb2 as pb
from kvstore.types import DRAM, NO_GPU, Layout, check_keys

if TYPE_CHECKING:
    from kvstore.client.client import Client, Session
    from kvstore.client.cuda import Copier, DeviceBuffers

DEADLINE_S = 1.0  # of reserve and acquire, unless the caller says otherwise
GRACE_S = 0.05  # for the answer that the daemon sends at the deadline to arrive
ANSWER_S = 1.0  # beyond a call's own deadline, for a daemon that answers at all
MANY = 16  # blocks: to prepare a request about so many takes as long as to wake the daemon
WINDOW_BYTES = 16 << 20  # get copies so much while the rest is still being loaded


class Cache:
    """Blocks of one layout. `hashes` are lists of 8 to 64 bytes each, all of one length, in prefix
    order and without repetition; else InvalidKeys is raised, and TooLarge for more than 65,536.

    Every call raises Unavailable when the daemon does not answer in time, and nothing has happened
    then that the engine could notice. A miss is never an error.
    """

    def __init__(self, client: Client, layout: Layout) -> None:
        self.client = client
        self.layout = layout
        self.copier: Copier | None = None  # of CUDA buffers; None: that of the process
        # Of the layout, on that session. Its arena may be gone: nothing here keeps it.
        self._number: tuple[weakref.ref[Session], int] | None = None
        self.recall = Recall()
        self._ahead = Ahead(self)
        self._shapes: dict[tuple[int, int, int], bytes] = {}  # see `_told`

    def lookup(self, hashes: Sequence[bytes]) -> Match:
        """The longest resident prefix. Changes nothing and holds nothing."""
        hashes = checks.keys(hashes)
        _, reply = self._ask(pb.LOOKUP, pb.LookupRequest, pb.LookupReply, hashes)
        return Match(reply.length, count_tiers(reply.tiers))

    def put(
        self,
        hashes: Sequence[bytes],
        blocks: Sequence[Any],
        *,
        parent: bytes | None = None,
        hints: Mapping[str, str] | None = None,
        shard: int | None = None,
        deadline_s: float | None = None,
    ) -> PutResult:
        """Store blocks that are not there yet: reserve, copy, commit.

        blocks      one buffer per hash, of `layout.block_bytes` bytes each, or of
                    `layout.shard_bytes` with `shard`: then a block becomes visible when all its
                    shards have been put, by whichever client. In host memory, or all in that of
                    one CUDA device
        deadline_s  how long to go on when room must be made; None: the client's timeout

        Raises InvalidBlock, before anything is stored, for a buffer of a wrong size or kind.
        """
        hashes = self._listed(hashes)
        # Only addresses are kept below: these keep the memory itself.
        blocks = checks.listed_buffers(blocks)
        sources = self._addresses(hashes, blocks, shard, writable=False)
        wait_s = self.client.timeout_s if deadline_s is None else checks.wait_s(deadline_s)
        end = time.monotonic() + wait_s
        copied_by = end + self.client.timeout_s  # by a device
        outcome = bytearray([REFUSED]) * len(hashes)
        alone = shard is None and self._ahead.suits(sources)
        done, ahead = 0, alone and self._ahead.pays
        while done < len(hashes):
            # What is refused is the end of the list: it continues what has been stored by then.
            wait_s = min(DEADLINE_S, max(0.0, end - time.monotonic() - GRACE_S))
            answer_s = self.client.timeout_s if deadline_s is None else self._answer_s(wait_s)
            if ahead:
                ahead = False
                stored = self._ahead.put(hashes, sources, parent, hints, wait_s, answer_s)
                if stored is not None:
                    return stored
                continue
            session, reply = self._reserve(
                hashes, parent, hints, wait_s, shard, answer_s=answer_s, skip=done, lend=alone
            )
            status: bytes = reply.status
            new = [at for at, answer in enumerate(status, done) if answer == NEW]
            if new and not self._fill(session, reply, hashes, sources, new, shard, copied_by):
                status, new = status.replace(bytes([NEW]), bytes([REFUSED])), []
            for at, answer in enumerate(status, done):
                if answer == NEW or outcome[at] == REFUSED:
                    outcome[at] = answer
            if REFUSED not in status or not new or time.monotonic() >= end:
                break
            done += status.index(REFUSED)
        self._ahead.pays = NEW in outcome
        return PutResult(*map(outcome.count, (NEW, PRESENT, REFUSED)))

    def get(
        self,
        hashes: Sequence[bytes],
        into: Sequence[Any],
        *,
        shard: int | None = None,
        deadline_s: float = DEADLINE_S,
        prefill_tokens_per_s: float | None = None,
        direct: bool = False,
    ) -> GetResult:
        """Copy the longest prefix that is resident, in any tier, into buffers of the caller.

        into        one writable buffer per hash, sizes as in `put`
        deadline_s  how long to wait for blocks that must come up from NVMe
        prefill_tokens_per_s  the engine's: what would take longer to load than that is left out
        direct      blocks that are on NVMe alone are read from its files by this process, checked,
                    and copied to the buffers: DRAM stays as it is. Where this process may not read
                    them, as without

        The first `length` buffers of the result are verified; a lease that did not hold ends it.
        """
        hashes = self._listed(hashes)
        started, wait_s = time.monotonic(), checks.wait_s(deadline_s)
        into = checks.listed_buffers(into)
        targets = self._addresses(hashes, into, shard, writable=True)
        few = type(targets) is list and not direct and self._few(hashes)
        if few and self._get_again(hashes, targets, shard, prefill_tokens_per_s, started):
            found = bytes([DRAM]) * len(hashes)
            return GetResult(len(hashes), count_tiers(found), time.monotonic() - started)
        by = started + wait_s
        out = CopyOut(self.layout, targets, shard, by + self.client.timeout_s, self.copier)
        done, found = 0, b""
        window = max(1, WINDOW_BYTES // self.layout.block_bytes)
        files = self.client.direct_files() if direct else None
        while done < len(hashes):
            grant = self._acquire(
                hashes,
                max(0.0, by - time.monotonic()),
                prefill_tokens_per_s,
                window,
                skip=done,
                gpus=() if type(targets) is list else self._gpus(targets, shard),
                direct=files is not None,
            )
            good, then = 0, self._epochs(grant.session, grant.places) if few else None
            if files is not None and grant.beside:
                good = out.direct(grant, hashes, done, files, by)
            elif grant.length and out.all(grant, done):
                good = grant.length
                self._seen(grant.session, hashes[done : done + good], grant.places, then)
            done += good
            found += grant.in_tiers[:good]
            if files is not None and (good < grant.length or grant.stop == "pending"):
                files = None  # the daemon loads the rest, and sees what is wrong with it
            elif not 0 < good == grant.length or grant.stop not in ("pending", "no_room"):
                break
        return GetResult(done, count_tiers(found), time.monotonic() - started)

    def reserve(
        self,
        hashes: Sequence[bytes],
        *,
        parent: bytes | None = None,
        hints: Mapping[str, str] | None = None,
        deadline_s: float = DEADLINE_S,
        shard: int | None = None,
    ) -> Reservation:
        """Slots for those blocks that are not there, to be written and committed by the caller.

        parent      hash of the block before the first, when the list starts later than the prompt
        hints       reuse ("continue", "done", "unknown"), finish_reason, tag
        deadline_s  how long to wait when nothing is free now but room is being made
        """
        hashes = checks.keys(hashes)
        wait_s = checks.wait_s(deadline_s)
        session, reply = self._reserve(
            hashes, parent, hints, wait_s, shard, answer_s=self._answer_s(wait_s)
        )
        places = Places(session.arena, self.layout, reply.offsets)
        return Reservation(self.client, session, places, reply.lease, reply.status, shard)

    def acquire(
        self,
        hashes: Sequence[bytes],
        *,
        deadline_s: float = DEADLINE_S,
        prefill_tokens_per_s: float | None = None,
        gpus: Sequence[int] = (),
        poll: bool = False,
    ) -> Grant:
        """The right to read the longest prefix that is resident, or is loaded within the deadline.

        With deadline_s 0, what is in memory now; loads of what follows are ordered all the same.

        poll        with deadline_s 0: the caller asks again for what is on its way ("pending"), and
                    it is counted then, not now
        gpus        for each shard the GPU on which it is wanted, as a place in `client.gpus`, or
                    NO_GPU: what is asked for again is copied there, see `Grant.copies`
        """
        hashes = checks.keys(hashes)
        return self._acquire(
            hashes, checks.wait_s(deadline_s), prefill_tokens_per_s, 0, gpus=gpus, poll=poll
        )

    def prefetch(self, hashes: Sequence[bytes]) -> int:
        """Bring blocks of the resident prefix up into memory, without waiting; how many must be."""
        hashes = checks.keys(hashes)
        _, reply = self._ask(pb.PREFETCH, pb.PrefetchRequest, pb.PrefetchReply, hashes)
        return int(reply.ordered)

    def retain(self, hashes: Sequence[bytes], priority: int, ttl_s: float | None = None) -> int:
        """Keep resident blocks from eviction while others can leave; returns how many are kept.

        priority  0: like any other block, 1 to 99: in this order when nothing else can leave,
                  100: never evicted
        ttl_s     for how long; None: until forgotten or retained otherwise
        """
        if not isinstance(priority, int) or not 0 <= priority <= 100:
            raise InvalidRequest(f"priority is {priority!r}: give an integer of 0 to 100")
        stays_s = checks.seconds_to_live(ttl_s)
        hashes = checks.keys(hashes)
        _, reply = self._ask(
            pb.RETAIN, pb.RetainRequest, pb.RetainReply, hashes, priority=priority, ttl_s=stays_s
        )
        return int(reply.retained)

    def forget(self, hashes: Sequence[bytes]) -> int:
        """Drop blocks from every tier; returns how many were there."""
        hashes = checks.keys(hashes)
        _, reply = self._ask(pb.FORGET, pb.ForgetRequest, pb.ForgetReply, hashes)
        return int(reply.forgotten)

    # -- inside --------------------------------------------------------------------------------

    def _few(self, hashes: Sequence[bytes]) -> bool:
        """Whether it pays to read these again where they were."""
        return 0 < len(hashes) <= FEW and len(hashes) * self.layout.block_bytes <= FEW_BYTES

    def _epochs(self, session: Session, places: Places) -> list[int] | None:
        """Of slots under a lease that holds now."""
        return session.epochs.of(places.offsets) if session.epochs is not None else None

    def _seen(
        self, session: Session, hashes: Sequence[bytes], places: Places, then: list[int] | None
    ) -> None:
        """Blocks were there at these epochs."""
        if session.epochs is not None and then is not None:
            self.recall.learn(session.epochs, hashes, places.offsets, then)

    def _get_again(
        self,
        hashes: Sequence[bytes],
        targets: Any,
        shard: int | None,
        tokens_per_s: float | None,
        started: float,
    ) -> bool:
        """Copy blocks from where they were seen before; False: they must be asked for."""
        deadline = started + self.client.timeout_s
        session = self.client.session(deadline)
        epochs = session.epochs
        found = self.recall.find(epochs, hashes)
        if epochs is None or found is None:
            return False
        offsets, then = found
        base, size = session.arena.address, self.layout.block_bytes
        if shard is not None:
            size = self.layout.shard_bytes
            base += shard * size
        copy_all([(to, base + at, size) for to, at in zip(targets, offsets, strict=True)])
        if epochs.of(offsets) != then:
            return False
        return session.transport.used(self._told(hashes, session, tokens_per_s, deadline))

    def _told(
        self,
        hashes: Sequence[bytes],
        session: Session,
        tokens_per_s: float | None,
        deadline: float,
    ) -> bytes:
        """The encoded UsedRequest. It ends with the hashes, so that what comes before them is made
        once for as many of them."""
        shape = self._layout_number(session, deadline), len(hashes), len(hashes[0])
        if tokens_per_s or shape not in self._shapes:
            told = pb.UsedRequest(prefill_tokens_per_s=checks.speed(tokens_per_s))
            self._name(told.keys, hashes, session, deadline)
            body = told.SerializeToString()
            if tokens_per_s:
                return body
            self._shapes[shape] = body[: -len(hashes) * len(hashes[0])]
        return self._shapes[shape] + b"".join(hashes)

    def _name(self, keys: Any, hashes: Sequence[bytes], session: Session, deadline: float) -> None:
        """Fill in a request's keys: what is given to a constructor is copied once more."""
        keys.layout = self._layout_number(session, deadline)
        keys.hash_bytes = len(hashes[0]) if hashes else 0
        keys.hashes = b"".join(hashes)

    def _listed(self, hashes: Any) -> Sequence[bytes]:
        """Hashes that a request is about to be prepared for: if they are many, the daemon can wake
        up meanwhile."""
        found = checks.listed_hashes(hashes)
        if len(found) >= MANY:
            self.client.wake()
        return found

    def _ask(
        self,
        verb: int,
        request: Any,
        reply: Any,
        hashes: Sequence[bytes],
        answer_s: float | None = None,
        **fields: Any,
    ) -> tuple[Session, Any]:
        """One call about these blocks, whose hashes have been checked, and the session that it
        went through. The answer must be there in `answer_s`; None: in the client's timeout."""
        deadline = time.monotonic() + (self.client.timeout_s if answer_s is None else answer_s)

        def ask(session: Session) -> tuple[Session, Any]:
            sent = request(**fields)
            self._name(sent.keys, hashes, session, deadline)
            return session, session.transport.call(verb, sent, reply, deadline)

        return self.client.attempt(deadline, ask)

    def _answer_s(self, wait_s: float) -> float:
        """How long to wait for the answer to a request that may take so long."""
        return max(min(self.client.timeout_s, wait_s + ANSWER_S), wait_s + GRACE_S)

    def _reserve(
        self,
        hashes: Sequence[bytes],
        parent: bytes | None,
        hints: Mapping[str, str] | None,
        wait_s: float,
        shard: int | None,
        *,
        answer_s: float,
        skip: int | None = None,
        lend: bool = False,
    ) -> tuple[Session, Any]:
        more: dict[str, Any] = {}
        if shard is not None:
            more["shard"] = checks.number_of(shard, self.layout.shards, "shard")
        if hints:
            more["hints"] = checks.hints_of(hints)
        return self._ask(
            pb.RESERVE,
            pb.ReserveRequest,
            pb.ReserveReply,
            hashes,
            answer_s,
            parent=checks.parent(parent),
            deadline_s=wait_s,
            again=skip is not None,
            skip=skip or 0,
            lend=lend,
            **more,
        )

    def _fill(
        self,
        session: Session,
        reply: Any,
        hashes: Sequence[bytes],
        sources: list[int] | DeviceBuffers,
        new: list[int],
        shard: int | None,
        copied_by: float,
    ) -> bool:
        """Copy the `new` ones of the sources into the slots that were reserved, and commit. False:
        a device was too late, or failed, and nothing was stored."""
        places = Places(session.arena, self.layout, reply.offsets)
        reservation = Reservation(self.client, session, places, reply.lease, reply.status, shard)
        try:
            if not isinstance(sources, list):
                return self._fill_from_device(reservation, places, sources, new, shard, copied_by)
            epochs = session.epochs if shard is None and self._few(hashes) else None
            then = epochs.after(places.offsets) if epochs is not None else None
            places.copy_in([sources[at] for at in new], shard, session.transport.wake)
            if reservation.commit() == len(new):
                self._seen(session, [hashes[at] for at in new], places, then)
        except SessionLost:
            raise Unavailable(
                f"the connection to {self.client.path} has ended: what this call had not committed "
                "is not stored"
            ) from None
        except BaseException:  # nobody could store these blocks while the lease lives
            if isinstance(sources, list):  # else the copier ends the reservation, at its time
                reservation.abort()
            raise
        return True

    def _fill_from_device(
        self,
        reservation: Reservation,
        places: Places,
        sources: DeviceBuffers,
        new: list[int],
        shard: int | None,
        copied_by: float,
    ) -> bool:
        assert self.copier is not None, "found with the buffers"
        fragments = sources.fragments(places, shard, new)
        return self.copier.store(
            reservation,
            fragments,
            deadline=copied_by,
            streams=sources.streams,
            keep=sources.buffers,
        )

    def _gpus(self, targets: list[int] | DeviceBuffers, shard: int | None) -> list[int]:
        """Where the shards are wanted that the targets are for, as `acquire` takes it."""
        shards = self.layout.shards
        if isinstance(targets, list) or (shard is None and shards > 1):
            return []
        assert self.copier is not None, "found with the buffers"
        session = self.client.session(time.monotonic() + self.client.timeout_s)
        part = self.copier.part(session, targets.device)
        if part is None:
            return []
        return [part.index if at == (shard or 0) else NO_GPU for at in range(shards)]

    def _acquire(
        self,
        hashes: Sequence[bytes],
        wait_s: float,
        tokens_per_s: float | None,
        enough: int,
        *,
        skip: int = 0,
        gpus: Sequence[int] = (),
        poll: bool = False,
        direct: bool = False,
    ) -> Grant:
        more: dict[str, Any] = {"skip": skip} if skip else {}
        if gpus or poll or direct:
            more.update(gpus=checks.gpu_numbers(gpus), poll=bool(poll), direct=bool(direct))
        session, reply = self._ask(
            pb.ACQUIRE,
            pb.AcquireRequest,
            pb.AcquireReply,
            hashes,
            self._answer_s(wait_s),
            deadline_s=wait_s,
            prefill_tokens_per_s=checks.speed(tokens_per_s),
            enough=enough,
            **more,
        )
        return Grant(self.client, session, self.layout, reply)

    def _layout_number(self, session: Session, deadline: float) -> int:
        known = self._number
        if known is not None and known[0]() is session:
            return known[1]
        number = self.client.layout_number(self.layout, session, deadline)
        self._number = weakref.ref(session), number
        return number

    def _addresses(
        self, hashes: Sequence[bytes], buffers: Sequence[Any], shard: int | None, *, writable: bool
    ) -> list[int] | DeviceBuffers:
        """Where the buffers are, after everything about keys and buffers has been checked."""
        check_keys(hashes)
        if len(buffers) != len(hashes):
            raise InvalidBlock(
                f"{len(buffers)} buffers for {len(hashes)} hashes: give one for each"
            )
        size = self.layout.block_bytes
        if shard is not None:
            checks.number_of(shard, self.layout.shards, "shard")
            size = self.layout.shard_bytes
        if buffers and on_device(buffers[0]):
            from kvstore.client import cuda

            if self.copier is None:
                self.copier = cuda.default_copier()
            return cuda.device_buffers(self.copier.platform, buffers, size, writable=writable)
        return addresses_of(buffers, size, writable=writable)
