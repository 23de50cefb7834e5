"""Worlds driven by a chance with a seed: the same history each time, as long as wanted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from kvstore.leases import Session
from kvstore.limits import Limits
from kvstore.orders import Outcome
from kvstore.placement import PlacementConfig
from kvstore.policies import FAMILIES
from kvstore.types import NO_GPU
from tests.brain.books import Reader
from tests.brain.world import KEYS, PAGE, SHAPES, World, key_of

STEPS = 600
WRITE_POLICIES = ("through", "on-evict", "second-touch")
SLAB_PAGES = (6, 8)
OUTCOMES = (Outcome.DONE,) * 6 + (Outcome.CORRUPT, Outcome.FAILED, Outcome.FAILED)
SPEEDS = (0.0, 0.0, 1.0, 1e12)
SECONDS = (0.001, 0.3, 1.5, 40.0)
PRIORITIES = (0, 10, 50, 100)

# How often each thing happens, where it can.
WEIGHTS = {
    "abort": 2.0,
    "acquire": 14.0,
    "attach": 2.0,
    "clear": 0.2,
    "commit": 8.0,
    "cut": 2.0,
    "detach": 0.4,
    "digest": 6.0,
    "finish": 16.0,
    "forget": 2.0,
    "prefetch": 3.0,
    "put": 10.0,
    "release": 10.0,
    "reserve": 8.0,
    "retain": 1.0,
    "save_all": 0.3,
    "tick": 3.0,
    "unquarantine": 2.0,
    "verify": 1.0,
}
# Histories that keep to one matter meet its rare turns more often: all of it at once, shards and
# vanished ranks, waits for loads, reads that find damage, a device that fails and comes back.
FOCUSES: tuple[dict[str, float], ...] = (
    {},
    {"reserve": 30.0, "put": 2.0, "acquire": 4.0, "detach": 4.0, "unquarantine": 3.0},
    {"acquire": 30.0, "prefetch": 8.0, "finish": 10.0, "clear": 0.05, "forget": 3.0},
    {"verify": 20.0, "acquire": 24.0, "release": 20.0, "put": 14.0, "clear": 0.05},
    {"put": 20.0, "finish": 30.0, "tick": 8.0, "clear": 0.05, "forget": 0.5},
)


def make_world(
    *,
    dram: int,
    nvme: int,
    slab_pages: int,
    layouts: int,
    policy: str,
    budget: float | None,
    spread: int,
    queue: int,
    loads: int,
    leases: int,
    family: str = "lru",
    hbm: Sequence[int] = (),
) -> World:
    """Tiers of some slabs. The smallest hold two blocks, so every shortage occurs."""
    config = PlacementConfig(
        dram_bytes=dram * slab_pages * PAGE,
        nvme_bytes=nvme * slab_pages * PAGE,
        slab_bytes=slab_pages * PAGE,
        write_policy=policy,
        write_budget=budget,
        spread=spread,
        queue_depth=queue,
        loads_max=loads,
        hbm_bytes=tuple(slabs * slab_pages * PAGE for slabs in hbm),
    )
    limits = Limits(leases_per_session=leases, sessions=4)
    return World(config, limits, layouts, FAMILIES[family])


def unanswered(world: World) -> list[Reader]:
    return [reader for reader in world.readers if not reader.lease.answered]


def put(
    world: World, session: Session, layout: int, keys: Sequence[bytes], *, lend: bool = False
) -> None:
    """A whole put: what an engine does most."""
    world.reserve(session, layout, keys, lend=lend, lent=next(iter(world.lent(session)), None))
    world.after()
    if lend:  # while the client copies
        world.store.digest(world.now)
        world.after()
    mine = [writer for writer in world.writers if writer.session is session]
    named = [writer for writer in mine if writer not in world.lent(session)]
    if named:
        world.commit(named[-1])


class Seeded:
    """A world and what happens in it, from a seed."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.world = make_world(
            dram=chance.randint(1, 4),
            nvme=chance.choice((0, 1, 2, 3, 4, 4)),
            slab_pages=chance.choice(SLAB_PAGES),
            layouts=chance.randint(1, len(SHAPES)),
            policy=chance.choice(WRITE_POLICIES),
            budget=chance.choice((None, None, None, 3.0 * PAGE)),
            spread=chance.randint(1, 2),
            queue=chance.randint(1, 4),
            loads=chance.choice((1, 4, 64)),
            leases=chance.choice((3, 30)),
            family=chance.choice(("lru", "relevance", *FAMILIES)),
            hbm=chance.choice(((), (), (1,), (2, 1))),
        )
        self.outcomes = OUTCOMES if chance.random() < 0.5 else (Outcome.DONE,)
        self.focus = chance.randrange(len(FOCUSES))
        self.weights = WEIGHTS | FOCUSES[self.focus]
        self.world.adopt(0, chance.randrange(6))
        self.world.attach()

    def run(self, steps: int) -> World:
        """So many things happen, then everything ends."""
        world = self.world
        for _ in range(steps):
            names = self._possible()
            name = self.chance.choices(names, [self.weights[name] for name in names])[0]
            getattr(self, f"_{name}")()
            world.after()
        counters = world.store.counters
        for tier in ("hbm", "dram", "nvme"):
            for reason, count in getattr(counters, tier).evicted.items():
                world.marks[f"{tier} {reason}"] += count
        world.end()
        return world

    def _possible(self) -> list[str]:
        """What can happen now."""
        world = self.world
        needs: dict[str, Sequence[object]] = {
            "abort": world.writers,
            "acquire": world.sessions,
            "commit": world.writers,
            "cut": unanswered(world),
            "detach": world.sessions,
            "finish": world.pending,
            "put": world.sessions,
            "release": world.readers,
            "reserve": world.sessions,
            "unquarantine": world.ghosts,
        }
        return [name for name in WEIGHTS if name not in needs or needs[name]]

    def _pick(self, there: Sequence[Any]) -> Any:
        return self.chance.choice(there)

    def _layout(self) -> int:
        layouts = len(self.world.entries)
        if layouts > 1 and FOCUSES[self.focus] and self.chance.random() < 0.8:
            return (
                1 if "detach" in FOCUSES[self.focus] else 0
            )  # that of two shards, or the smallest
        return self.chance.randrange(layouts)

    def _keys(self) -> list[bytes]:
        start = self._pick((0, 0, 0, self.chance.randrange(KEYS)))
        return [key_of(at % KEYS) for at in range(start, start + self.chance.randint(1, KEYS))]

    def _context_and_keys(self) -> tuple[list[bytes], list[bytes]]:
        """Keys that a request continues, and those that it is about; rarely, some of them twice."""
        keys, skip = self._keys(), self._pick((0, 0, 0, 1, 3))
        keys = keys[:2] * (self.chance.random() < 0.05) + keys
        return keys[:skip], keys[skip:]

    # -- clients -------------------------------------------------------------------------------

    def _attach(self) -> None:
        self.world.attach()

    def _detach(self) -> None:
        self.world.detach(self._pick(self.world.sessions))

    def _unquarantine(self) -> None:
        self.world.unquarantine(self._pick(self.world.ghosts))

    def _put(self) -> None:
        lend = self.chance.random() < 0.5
        put(self.world, self._pick(self.world.sessions), self._layout(), self._keys(), lend=lend)

    def _reserve(self) -> None:
        context, keys = self._context_and_keys()
        session = self._pick(self.world.sessions)
        self.world.reserve(
            session,
            self._layout(),
            list(dict.fromkeys(keys)),
            shard=self._pick((None, 0, 1, 2)),
            force=self.chance.random() < 0.3,
            context=context,
            lend=self.chance.random() < 0.3,
            lent=self._pick([None, *self.world.lent(session)]),
        )

    def _commit(self) -> None:
        self.world.commit(self._pick(self.world.writers))

    def _abort(self) -> None:
        self.world.abort(self._pick(self.world.writers))

    def _acquire(self) -> None:
        context, keys = self._context_and_keys()
        layout, devices = self._layout(), len(self.world.store.placement.mirror.devices)
        wanted: list[int] = []
        if devices and self.chance.random() < 0.7:
            shards = self.world.entries[layout].layout.shards
            at_random = [self.chance.randrange(devices) for _ in range(shards)]
            in_order = [shard % devices for shard in range(shards)]
            mine = [NO_GPU] * (shards - 1) + [0]  # one rank's
            wanted = self._pick((at_random, in_order, mine))
        self.world.acquire(
            self._pick(self.world.sessions),
            layout,
            keys,
            wait=self.chance.random() < 0.8,
            enough=self._pick((0, 0, 0, 0, 0, 1, 2)),
            tokens_per_s=self._pick(SPEEDS),
            context=context,
            devices=wanted,
            poll=self.chance.random() < 0.3,
            direct=self.chance.random() < 0.2,
        )

    def _cut(self) -> None:
        self.world.cut(self._pick(unanswered(self.world)))

    def _release(self) -> None:
        self.world.release(self._pick(self.world.readers))

    def _prefetch(self) -> None:
        self.world.prefetch(self._layout(), self._keys())

    def _retain(self) -> None:
        ttl = self._pick((None, 5.0))
        self.world.retain(self._layout(), self._keys(), self._pick(PRIORITIES), ttl)

    def _forget(self) -> None:
        self.world.forget(self._layout(), self._keys())

    def _clear(self) -> None:
        self.world.clear()

    # -- hands ---------------------------------------------------------------------------------

    def _finish(self) -> None:
        self.world.finish(self._pick(self.world.pending), self._pick(self.outcomes))

    def _tick(self) -> None:
        self.world.tick(self._pick(SECONDS))

    def _digest(self) -> None:
        self.world.store.digest(self.world.now)

    def _verify(self) -> None:
        self.world.verify(self.chance.randrange(64))

    def _save_all(self) -> None:
        self.world.store.save_all(self.world.now)
