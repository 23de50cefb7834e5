"""A whole tenant in this process, without doors, over a tier of one's choice: what soaks drive.

Service, store, mover, disk, index, arena and slot table are the real ones. Requests go straight to
the service, as the doors hand them in. Clocks may be put forward, so that nobody waits for a probe.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import sys
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kvstore import config, disk, types
from kvstore.busy_poll import BusyPoll
from kvstore.protos import kvstore_pb2 as pb
from kvstore.tenant import Tenant
from kvstore.tiers.base import Tier
from kvstore.tiers.nvme import NvmeFiles
from kvstore.turns import Turns
from kvstore.types import Layout

T = TypeVar("T")
Wrap = Callable[[NvmeFiles], Tier]
KIB, MIB = 1 << 10, 1 << 20
NEVER_S = 60.0  # what takes so long is called hung
TENANT = "default"


class Hung(AssertionError):
    """Something did not end."""


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock can be put forward."""

    forward_s = 0.0

    def time(self) -> float:
        return super().time() + self.forward_s


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine on a loop of its own."""

    async def main() -> T:
        return await work()

    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(main())


def say(text: str) -> None:
    """A line for people, at once also where it is redirected."""
    sys.stdout.write(text)
    sys.stdout.flush()


def layout(size: int, shards: int = 1) -> Layout:
    return Layout(
        model=f"faults {size}",
        engine="test/1",
        dtype="bfloat16",
        block_tokens=16,
        shards=shards,
        shard_bytes=size // shards,
    )


def key(number: int) -> bytes:
    return hashlib.blake2b(b"%d" % number, digest_size=16).digest()


_CONTENT: dict[tuple[bytes, int], bytes] = {}


def content(key: bytes, size: int) -> bytes:
    """What is stored under a key, ever."""
    found = _CONTENT.get((key, size))
    if found is None:
        found = _CONTENT[key, size] = hashlib.shake_128(key).digest(size)
    return found


class Settings:
    """Sizes and places of a host; the same ones find what an earlier host left there."""

    def __init__(
        self,
        folder: Path,
        *,
        nvme_bytes: int = 16 * MIB,
        slab: str = "auto",
        **nvme: object,
    ) -> None:
        self.nvme = folder / "nvme"
        self.arena = folder / "arena"
        self.tree = {
            "daemon": {"run_dir": str(folder / "run")},
            "dram": {
                "size": "8 MiB",
                "path": str(self.arena),
                "preallocate": False,
                "slab_size": slab,
            },
            "nvme": {
                "paths": [str(self.nvme)],
                "size": nvme_bytes,
                "threads": 4,
                **nvme,
            },
            "metrics": {"listen": ""},
        }

    def lose_memory(self) -> None:
        """As a reboot does."""
        shutil.rmtree(self.arena, ignore_errors=True)


class Host:
    """A tenant, made on the running loop. `served` and `wrong` count blocks that were handed out.

    wrap   what stands between the tenant and its files; an `open` of it counts as one more I/O
    """

    def __init__(self, settings: Settings, wrap: Wrap = lambda files: files) -> None:
        self.served = self.wrong = 0
        self.late_s = 0.0  # the longest that an answer took beyond its deadline
        self.problems: list[str] = []  # what the loop had to say
        self.tier: Any = None
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        self._loop = loop
        loop.set_exception_handler(lambda _, context: self.problems.append(str(context)))
        found = config.parse({name: dict(part) for name, part in settings.tree.items()}, {}, "test")  # type: ignore[call-overload]
        real = NvmeFiles

        class Files:
            """In place of the class, for as long as the tenant is made and lives."""

            @staticmethod
            def open(*arguments: Any, **options: Any) -> Any:
                files = real.open(*arguments, **options)
                self.tier = wrap(files)
                if self.tier is not files:
                    self.tier.file_ids, self.tier.warnings = files.file_ids, files.warnings
                return self.tier

        setattr(disk, "NvmeFiles", Files)  # noqa: B010  # as the gated daemon does
        self._restore: Callable[[], None] = lambda: setattr(disk, "NvmeFiles", real)
        try:
            self.tenant = Tenant(
                TENANT,
                found,
                1,
                "test",
                lambda: b"{}",
                BusyPoll(loop, found.daemon.busy_poll),
                Turns(),
            )
        except BaseException:
            self._restore()
            raise
        self.store = self.tenant.store
        self.service = self.tenant.service
        self.session, _ = self.service.attach(pb.AttachRequest(protocol=types.PROTOCOL_VERSION))
        self._layouts: dict[Layout, int] = {}

    # -- what clients do -----------------------------------------------------------------------

    async def put(self, layout: Layout, keys: Sequence[bytes], deadline_s: float = 5.0) -> int:
        """Store blocks; how many are new."""
        packed = await self._keys(layout, keys)
        reply = await self.call(
            pb.RESERVE, pb.ReserveRequest(keys=packed, deadline_s=deadline_s), deadline_s
        )
        new = [one for one, status in zip(keys, reply.status, strict=True) if not status]
        offsets = array("Q", reply.offsets)
        for one, offset in zip(new, offsets, strict=True):
            with self._view(offset, layout) as view:
                view[:] = content(one, layout.block_bytes)
        if not reply.lease:
            return 0
        done = await self.call(pb.COMMIT, pb.CommitRequest(lease=reply.lease))
        assert done.held
        return int(done.stored)

    async def get(
        self, layout: Layout, keys: Sequence[bytes], deadline_s: float = 5.0
    ) -> list[bytes]:
        """The leading blocks that are served, every byte looked at."""
        packed = await self._keys(layout, keys)
        request = pb.AcquireRequest(keys=packed, deadline_s=deadline_s)
        reply = await self.call(pb.ACQUIRE, request, deadline_s)
        for one, offset in zip(keys, array("Q", reply.offsets), strict=False):
            with self._view(offset, layout) as view:
                self.served += 1
                self.wrong += view != content(one, layout.block_bytes)
        if reply.lease:
            await self.call(pb.RELEASE, pb.ReleaseRequest(lease=reply.lease))
        return list(keys[: reply.length])

    async def get_each(
        self, layout: Layout, keys: Sequence[bytes], deadline_s: float = 5.0
    ) -> set[bytes]:
        """Those blocks that are served when each is asked for alone."""
        found = [await self.get(layout, [one], deadline_s) for one in keys]
        return {one for some in found for one in some}

    async def forget(self, layout: Layout, keys: Sequence[bytes]) -> None:
        """Drop blocks from all tiers."""
        packed = await self._keys(layout, keys)
        await self.call(pb.FORGET, pb.ForgetRequest(keys=packed))

    async def verify(self) -> Any:
        """Have every block on NVMe checked."""
        return await self.call(pb.VERIFY, pb.VerifyRequest())

    async def call(self, verb: int, request: Any, deadline_s: float = 0.0) -> Any:
        """The service's answer; Hung when none comes."""
        answered: asyncio.Future[Any] = self._loop.create_future()

        def answer(late: Any) -> None:
            if not answered.done():
                answered.set_result(late)

        started = time.monotonic()
        reply = self.service.handle(self.session, verb, request, answer)
        self.service.settle()
        if reply is None:
            try:
                reply = await asyncio.wait_for(answered, deadline_s + NEVER_S)
            except TimeoutError:
                raise Hung(f"no answer to {pb.Verb.Name(verb)}") from None
        if verb != pb.VERIFY:  # it takes as long as it takes
            self.late_s = max(self.late_s, time.monotonic() - started - deadline_s)
        if isinstance(reply, Exception):
            raise reply
        return reply

    # -- its life ------------------------------------------------------------------------------

    async def settled(self) -> None:
        """No move is under way."""
        await self.until(self.service.idle, "moves to end")

    async def durable(self) -> None:
        """Everything that is stored is in the index, durably."""
        await self.settled()
        index = self.index
        assert await asyncio.to_thread(index.flush, NEVER_S), "the index is not written"

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + NEVER_S
        while not condition():
            if time.monotonic() > end:
                raise Hung(f"waited for {what}")
            await asyncio.sleep(0.001)

    async def pass_time(self, seconds: float) -> None:
        """Put the clock forward and do what is due then."""
        self._loop.forward_s += seconds
        await asyncio.sleep(0)
        self.service.tick()

    async def stop(self) -> None:
        """As SIGTERM does."""
        try:
            await self.tenant.stop(NEVER_S)
        finally:
            self._restore()

    @property
    def index(self) -> Any:
        assert self.tenant._disk is not None
        return self.tenant._disk.index

    @property
    def workers_alive(self) -> bool:
        assert self.tenant._mover is not None
        return all(thread.is_alive() for thread in self.tenant._mover._threads)

    async def _keys(self, layout: Layout, keys: Sequence[bytes]) -> Any:
        number = self._layouts.get(layout)
        if number is None:
            sent = pb.LayoutMessage(
                model=layout.model,
                engine=layout.engine,
                dtype=layout.dtype,
                block_tokens=layout.block_tokens,
                shards=layout.shards,
                shard_bytes=layout.shard_bytes,
            )
            reply = await self.call(pb.OPEN, pb.OpenRequest(layout=sent))
            number = self._layouts[layout] = reply.layout
        return pb.Keys(layout=number, hash_bytes=len(keys[0]), hashes=b"".join(keys))

    def _view(self, offset: int, layout: Layout) -> memoryview:
        return self.tenant._arena.view(offset, layout.block_bytes)
