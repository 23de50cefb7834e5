"""Drives a store beside a naive model: Hypothesis chooses what happens, or a seed does, at length.

The model (`world.py`, `books.py`) holds simulated bytes, so that "never a wrong byte" is checked.
The seeded runs also prove by marks that the rare branches were really taken.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.leases import Session
from kvstore.orders import Outcome
from kvstore.placement import PlacementConfig
from kvstore.store import Limits
from tests.brain.books import Reader
from tests.brain.world import KEYS, PAGE, SHAPES, World, key_of

WRITE_POLICIES = ("through", "on-evict", "second-touch")
SLAB_PAGES = (6, 8)
OUTCOMES = (Outcome.DONE,) * 6 + (Outcome.CORRUPT, Outcome.FAILED, Outcome.FAILED)
SPEEDS = (0.0, 0.0, 1.0, 1e12)
SECONDS = (0.001, 0.3, 1.5, 40.0)
PRIORITIES = (0, 10, 50, 100)

run_of_keys = st.builds(
    lambda start, length: [key_of(at % KEYS) for at in range(start, start + length)],
    st.integers(0, KEYS - 1),
    st.integers(1, KEYS),
)
context_length = st.sampled_from([0, 0, 0, 1, 3])
place = st.integers(0, 63)  # which of those that there are


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
    )
    return World(config, Limits(leases_per_session=leases, sessions=4), layouts)


class Machine(RuleBasedStateMachine):
    """The rules. Whatever is chosen by a number is chosen among what there is at that moment."""

    world: World

    @initialize(
        dram=st.integers(1, 4),
        nvme=st.integers(0, 4),
        slab_pages=st.sampled_from(SLAB_PAGES),
        layouts=st.integers(1, len(SHAPES)),
        policy=st.sampled_from(WRITE_POLICIES),
        budget=st.sampled_from([None, None, 3.0 * PAGE]),
        spread=st.integers(1, 2),
        queue=st.integers(1, 4),
        loads=st.integers(1, 8),
        leases=st.integers(2, 8),
        found=st.integers(0, 6),
    )
    def begin(self, found: int, **sizes: object) -> None:
        self.world = make_world(**sizes)  # type: ignore[arg-type]
        self.world.adopt(0, found)
        self.world.attach()

    @invariant()
    def all_holds(self) -> None:
        if hasattr(self, "world"):
            self.world.after()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end()

    def layout(self, at: int) -> int:
        return at % len(self.world.entries)

    # -- clients -------------------------------------------------------------------------------

    @rule()
    def attach(self) -> None:
        self.world.attach()

    @precondition(lambda self: self.world.sessions)
    @rule(at=place)
    def detach(self, at: int) -> None:
        self.world.detach(_one(self.world.sessions, at))

    @precondition(lambda self: self.world.ghosts)
    @rule(at=place)
    def unquarantine(self, at: int) -> None:
        self.world.unquarantine(_one(self.world.ghosts, at))

    @precondition(lambda self: self.world.sessions)
    @rule(
        who=place,
        what=place,
        keys=run_of_keys,
        shard=st.none() | st.integers(0, 2),
        force=st.booleans(),
        skip=context_length,
    )
    def reserve(
        self, who: int, what: int, keys: list[bytes], shard: int | None, force: bool, skip: int
    ) -> None:
        session, layout = _one(self.world.sessions, who), self.layout(what)
        self.world.reserve(
            session, layout, keys[skip:], shard=shard, force=force, context=keys[:skip]
        )

    @precondition(lambda self: self.world.sessions)
    @rule(who=place, what=place, keys=run_of_keys)
    def put(self, who: int, what: int, keys: list[bytes]) -> None:
        _put(self.world, _one(self.world.sessions, who), self.layout(what), keys)

    @precondition(lambda self: self.world.writers)
    @rule(at=place)
    def commit(self, at: int) -> None:
        self.world.commit(_one(self.world.writers, at))

    @precondition(lambda self: self.world.writers)
    @rule(at=place)
    def abort(self, at: int) -> None:
        self.world.abort(_one(self.world.writers, at))

    @precondition(lambda self: self.world.sessions)
    @rule(
        who=place,
        what=place,
        keys=run_of_keys,
        wait=st.booleans(),
        enough=st.integers(0, 3),
        speed=st.sampled_from(SPEEDS),
        skip=context_length,
        twice=st.booleans(),
    )
    def acquire(
        self,
        who: int,
        what: int,
        keys: list[bytes],
        wait: bool,
        enough: int,
        speed: float,
        skip: int,
        twice: bool,
    ) -> None:
        session = _one(self.world.sessions, who)
        if twice:  # senseless, but a client may do it
            keys = keys[:2] + keys
        self.world.acquire(
            session,
            self.layout(what),
            keys[skip:],
            wait=wait,
            enough=enough,
            tokens_per_s=speed,
            context=keys[:skip],
        )

    @precondition(lambda self: self.world.readers)
    @rule(at=place)
    def release(self, at: int) -> None:
        self.world.release(_one(self.world.readers, at))

    @precondition(lambda self: bool(_unanswered(self.world)))
    @rule(at=place)
    def cut(self, at: int) -> None:
        self.world.cut(_one(_unanswered(self.world), at))

    @rule(what=place, keys=run_of_keys)
    def prefetch(self, what: int, keys: list[bytes]) -> None:
        self.world.prefetch(self.layout(what), keys)

    @rule(
        what=place,
        keys=run_of_keys,
        priority=st.sampled_from(PRIORITIES),
        ttl=st.none() | st.just(5.0),
    )
    def retain(self, what: int, keys: list[bytes], priority: int, ttl: float | None) -> None:
        self.world.retain(self.layout(what), keys, priority, ttl)

    @rule(what=place, keys=run_of_keys)
    def forget(self, what: int, keys: list[bytes]) -> None:
        self.world.forget(self.layout(what), keys)

    @rule()
    def clear(self) -> None:
        self.world.clear()

    # -- hands ---------------------------------------------------------------------------------

    @precondition(lambda self: self.world.pending)
    @rule(at=place, outcome=st.sampled_from(OUTCOMES))
    def finish(self, at: int, outcome: Outcome) -> None:
        self.world.finish(_one(self.world.pending, at), outcome)

    @precondition(lambda self: self.world.pending)
    @rule()
    def finish_all(self) -> None:
        for move in list(self.world.pending):
            self.world.finish(move, Outcome.DONE)
            self.world.after()

    @rule(seconds=st.sampled_from(SECONDS))
    def tick(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule()
    def digest(self) -> None:
        self.world.store.digest(self.world.now)

    @rule(at=place)
    def verify(self, at: int) -> None:
        self.world.verify(at)

    @rule()
    def save_all(self) -> None:
        self.world.store.save_all(self.world.now)


def _one(there: list[Any], at: int) -> Any:
    return there[at % len(there)]


def _unanswered(world: World) -> list[Reader]:
    return [reader for reader in world.readers if not reader.lease.answered]


def _put(world: World, session: Session, layout: int, keys: list[bytes]) -> None:
    """A whole put: what an engine does most."""
    world.reserve(session, layout, keys)
    world.after()
    if world.writers and world.writers[-1].session is session:
        world.commit(world.writers[-1])


Machine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
TestMachine = Machine.TestCase


# -- the same, from a seed ---------------------------------------------------------------------


def _ops(world: World, chance: random.Random) -> dict[str, tuple[int, Callable[[], object]]]:
    """What can happen now, with how likely it is."""

    def pick(there: list[Any]) -> Any:
        return chance.choice(there)

    def keys() -> list[bytes]:
        start = chance.choice((0, 0, 0, chance.randrange(KEYS)))
        return [key_of(at % KEYS) for at in range(start, start + chance.randint(1, KEYS))]

    def split() -> tuple[list[bytes], list[bytes]]:
        """Keys that a request continues, and those that it is about."""
        there, skip = keys(), chance.choice((0, 0, 0, 1, 3))
        there = there[:2] * (chance.random() < 0.05) + there
        return there[:skip], there[skip:]

    def reserve(client: Session, shard: int | None) -> None:
        context, there = split()
        world.reserve(
            client,
            layout,
            list(dict.fromkeys(there)),
            shard=shard,
            force=chance.random() < 0.3,
            context=context,
        )

    def acquire(client: Session) -> None:
        context, there = split()
        world.acquire(
            client,
            layout,
            there,
            wait=chance.random() < 0.8,
            enough=chance.choice((0, 0, 0, 0, 0, 1, 2)),
            tokens_per_s=chance.choice(SPEEDS),
            context=context,
        )

    layout = chance.randrange(len(world.entries))
    ops: dict[str, tuple[int, Callable[[], object]]] = {
        "attach": (2, world.attach),
        "prefetch": (3, lambda: world.prefetch(layout, keys())),
        "retain": (
            1,
            lambda: world.retain(layout, keys(), pick([0, 10, 50, 100]), pick([None, 5.0])),
        ),
        "forget": (2, lambda: world.forget(layout, keys())),
        "clear": (chance.random() < 0.2, world.clear),
        "tick": (3, lambda: world.tick(pick([0.001, 0.3, 1.5, 40.0]))),
        "digest": (6, lambda: world.store.digest(world.now)),
        "verify": (1, lambda: world.verify(chance.randrange(64))),
        "save_all": (chance.random() < 0.3, lambda: world.store.save_all(world.now)),
    }
    if world.sessions:
        client = pick(world.sessions)
        shard = chance.choice((None, 0, 1, 2))
        ops |= {
            "detach": (chance.random() < 0.4, lambda: world.detach(client)),
            "put": (10, lambda: _put(world, client, layout, keys())),
            "reserve": (8, lambda: reserve(client, shard)),
            "acquire": (14, lambda: acquire(client)),
        }
    if world.ghosts:
        ops["unquarantine"] = (2, lambda: world.unquarantine(pick(world.ghosts)))
    if world.writers:
        ops["commit"] = (8, lambda: world.commit(pick(world.writers)))
        ops["abort"] = (2, lambda: world.abort(pick(world.writers)))
    if world.readers:
        ops["release"] = (10, lambda: world.release(pick(world.readers)))
    if waiting := _unanswered(world):
        ops["cut"] = (2, lambda: world.cut(pick(waiting)))
    if world.pending:
        ops["finish"] = (16, lambda: world.finish(pick(world.pending), pick(world.outcomes)))
    return ops


def run(seed: int, steps: int) -> World:
    """One world from a seed, to its end."""
    chance = random.Random(seed)
    world = make_world(
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
    )
    world.outcomes = list(OUTCOMES) if chance.random() < 0.5 else [Outcome.DONE]
    world.adopt(0, chance.randrange(6))
    world.attach()
    for _ in range(steps):
        ops = _ops(world, chance)
        name = chance.choices(list(ops), [weight for weight, _ in ops.values()])[0]
        ops[name][1]()
        world.after()
    evicted = world.store.counters.dram.evicted, world.store.counters.nvme.evicted
    for tier, counts in zip(("dram", "nvme"), evicted, strict=True):
        for reason, count in counts.items():
            world.marks[f"{tier} {reason}"] += count
    world.end()
    return world


MARKS = Counter[str]()
SEEDS = 60
STEPS = 600


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_long_run(seed: int) -> None:
    MARKS.update(run(seed, STEPS).marks)


def test_the_runs_went_everywhere() -> None:
    """A test that never fills the drive proves nothing about a full one."""
    if not MARKS:  # run alone
        for seed in range(SEEDS):
            MARKS.update(run(seed, STEPS).marks)
    wanted = {
        "corrupt",
        "doomed while load",
        "doomed while pinned",
        "doomed while prefetch",
        "doomed while spill",
        "doomed while verify",
        "doomed while written",
        "dram room",
        "dram slab",
        "fenced",
        "forced loss",
        "hit on nvme",
        "idle parts given up",
        "joined a load in flight",
        "nvme corrupt",
        "nvme replaced",
        "nvme room",
        "nvme slab",
        "probed back",
        "quarantined",
        "refused",
        "reserve waits",
        "retained weakest evicted",
        "stop absent",
        "stop failed",
        "stop late",
        "stop no_room",
        "stop pending",
        "stop too_slow",
        "stored again while fenced",
        "unsaved spared",
        "vanished among shards",
    }
    assert not wanted - {name for name, count in MARKS.items() if count}
