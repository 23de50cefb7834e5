"""Drives a store beside a naive model: Hypothesis chooses what happens, or a seed does, at length.

The model (`world.py`, `books.py`) holds simulated bytes, so that "never a wrong byte" is checked.
The seeded runs also prove by marks that the rare branches were really taken.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.orders import Outcome
from kvstore.policies import FAMILIES
from tests.brain.seeded import (
    OUTCOMES,
    PRIORITIES,
    SECONDS,
    SLAB_PAGES,
    SPEEDS,
    STEPS,
    WRITE_POLICIES,
    Seeded,
    make_world,
    put,
    unanswered,
)
from tests.brain.world import KEYS, PAGE, SHAPES, World, key_of

run_of_keys = st.builds(
    lambda start, length: [key_of(at % KEYS) for at in range(start, start + length)],
    st.integers(0, KEYS - 1),
    st.integers(1, KEYS),
)
context_length = st.sampled_from([0, 0, 0, 1, 3])
place = st.integers(0, 63)  # which of those that there are


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
        family=st.sampled_from(["relevance", *FAMILIES]),
        hbm=st.sampled_from([(), (1,), (2, 1)]),
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
        lend=st.booleans(),
        lent=st.booleans(),
    )
    def reserve(
        self,
        who: int,
        what: int,
        keys: list[bytes],
        shard: int | None,
        force: bool,
        skip: int,
        lend: bool,
        lent: bool,
    ) -> None:
        session, layout = _one(self.world.sessions, who), self.layout(what)
        self.world.reserve(
            session,
            layout,
            keys[skip:],
            shard=shard,
            force=force,
            context=keys[:skip],
            lend=lend,
            lent=next(iter(self.world.lent(session)), None) if lent else None,
        )

    @precondition(lambda self: self.world.sessions)
    @rule(who=place, what=place, keys=run_of_keys, lend=st.booleans())
    def put(self, who: int, what: int, keys: list[bytes], lend: bool) -> None:
        put(self.world, _one(self.world.sessions, who), self.layout(what), keys, lend=lend)

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
        seats=st.none() | st.lists(place, min_size=3, max_size=3),
        direct=st.booleans(),
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
        seats: list[int] | None,
        direct: bool,
    ) -> None:
        layout, there = self.layout(what), len(self.world.store.placement.mirror.devices)
        shards = self.world.entries[layout].layout.shards
        session = _one(self.world.sessions, who)
        if twice:  # senseless, but a client may do it
            keys = keys[:2] + keys
        self.world.acquire(
            session,
            layout,
            keys[skip:],
            wait=wait,
            enough=enough,
            tokens_per_s=speed,
            context=keys[:skip],
            devices=[at % there for at in seats[:shards]] if seats and there else (),
            direct=direct,
        )

    @precondition(lambda self: self.world.readers)
    @rule(at=place)
    def release(self, at: int) -> None:
        self.world.release(_one(self.world.readers, at))

    @precondition(lambda self: bool(unanswered(self.world)))
    @rule(at=place)
    def cut(self, at: int) -> None:
        self.world.cut(_one(unanswered(self.world), at))

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


Machine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
TestMachine = Machine.TestCase


# -- the same, from a seed ---------------------------------------------------------------------

MARKS = Counter[str]()
SEEDS = 60


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_long_run(seed: int) -> None:
    MARKS.update(Seeded(seed).run(STEPS).marks)


def test_the_runs_went_everywhere() -> None:
    """A test that never fills the drive proves nothing about a full one."""
    if not MARKS:  # run alone
        for seed in range(SEEDS):
            MARKS.update(Seeded(seed).run(STEPS).marks)
    wanted = {
        "climbed",
        "corrupt",
        "doomed while climb",
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
        "hbm below",
        "hbm failed",
        "hbm room",
        "hit in hbm",
        "read beside DRAM",
        "climbed from NVMe",
        "hit in hbm alone",
        "hit on nvme",
        "idle parts given up",
        "joined a load in flight",
        "lent",
        "lent slot taken",
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
