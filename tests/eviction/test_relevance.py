"""What `Relevance` promises: leaves first, useless ones before all, and whoever returns stays."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.eviction.base import Policy, Request
from kvstore.eviction.lru import LRU
from kvstore.eviction.ranking import DEFER_S, ENTRIES_PER_BLOCK, MANY, NONE, Ranking
from kvstore.eviction.relevance import EVEN_TOKENS, HUB_FAN, STRANGER, UNPLACED, Relevance
from kvstore.types import DRAM, NVME
from tests.brain.rankings import check_family
from tests.eviction.told import Told, come


def order(policy: Policy, now: float = 9.0) -> list[int]:
    return list(policy.victims(now))


def evict(policy: Policy, most: int, now: float, stay: Sequence[int] = ()) -> list[int]:
    """So many leave, none of them in `stay`; as the daemon goes about it."""
    gone, held, victims = list[int](), list[int](), policy.victims(now)
    key = next(victims, None)
    while key is not None and len(gone) < most:
        (held if key in stay else gone).append(key)
        if len(gone) == most:
            break
        try:
            key = victims.send(key in stay)
        except StopIteration:
            break
    victims.close()
    policy.defer(held)
    policy.forget(gone)
    return gone


def put_off(policy: Policy, now: float) -> int:
    """The first cannot leave yet; which it is."""
    victims = policy.victims(now)
    first = next(victims)
    victims.send(True)
    victims.close()
    policy.defer([first])
    return first


# -- the order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_leaves_go_first_whatever_the_classes_say(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when blocks in the middle are worth least, and when some have to stay."""
    chance, told, fresh = random.Random(seed), Told(), count()
    chains: list[list[int]] = []
    for step in range(60):
        chain = list(chance.choice(chains)) if chains and chance.random() < 0.7 else []
        chain = chain[: chance.randint(0, len(chain))]
        new = list(islice(fresh, chance.randint(0, 5)))
        come(told, chain, new, float(step * chance.choice((1, 20))))
        chains.append(chain + new)
    worth = [chance.random() for _ in range(told.family.hazard.kinds)]
    monkeypatch.setattr(told.family.hazard, "worth", lambda kind, age: worth[kind])
    behind: dict[int, set[int]] = {key: set() for key in range(next(fresh))}
    for chain in chains:
        for at, key in enumerate(chain):
            behind[key].update(chain[at + 1 :])
    left, victims = set(told.residents()), told.victims(9_999.0)
    leaf: int | None = next(victims)
    while leaf is not None:
        assert not behind[leaf] & left, f"{leaf} leaves before {behind[leaf] & left}"
        stays = chance.random() < 0.1
        if not stays:
            left.remove(leaf)
        try:
            leaf = victims.send(stays)
        except StopIteration:
            leaf = None


@pytest.mark.parametrize("many", [30, 100])
@pytest.mark.parametrize("prefill", [False, True])
def test_what_is_deep_in_a_prompt_stays_longer_where_seconds_count(
    prefill: bool, many: int
) -> None:
    """The longer prompt was asked for a little earlier. Attention makes its end cost more."""
    family = Relevance(prefill=prefill)
    ranking = family.make(DRAM, 200)
    long, short = list(range(many)), [900, 901]
    for keys, now in ((long, 0.0), (short, 1.0)):
        asked = family.asked(Request([], len(keys), now, block_tokens=2_048))
        family.born(NONE, keys, asked)
        ranking.admit(keys, now)
    assert next(ranking.victims(9.0)) == (short if prefill else long)[-1]
    means = [family.worth(keys, 9.0) for keys in (long[-1:], short[-1:])]
    assert means == sorted(means, key=lambda one: one or 0.0, reverse=prefill)


def test_the_place_of_blocks_found_after_a_restart_is_weighed_when_they_are_asked_for() -> None:
    family = Relevance(prefill=True)
    ranking, chain = family.make(DRAM, 200), list(range(10))
    ranking.admit(chain, 0.0)
    family.asked(Request(chain, 0, 1.0, block_tokens=EVEN_TOKENS))
    assert list(family.blocks.weight[:10]) == [1.0 + at for at in range(10)]


def two_tiers() -> tuple[Relevance, Ranking, Ranking]:
    family = Relevance()
    return family, family.make(DRAM, 9), family.make(NVME, 9)


def test_what_depends_on_a_block_that_is_gone_goes_first() -> None:
    told = Told()
    told.admit([10, 11, 12], 0.0)
    told.admit([1, 2, 3, 4, 5], 1.0)
    assert order(told)[0] == 12
    told.forget([2])
    assert order(told)[:3] == [5, 4, 3] == order(told)[:3], "also the next time"
    assert [evict(told, 1, 9.0) for _ in range(3)] == [[5], [4], [3]], "one at a time, too"


def test_it_is_of_use_again_when_that_block_is_back() -> None:
    told = Told()
    told.admit([10, 11, 12], 0.0)
    told.admit([1, 2, 3], 1.0)
    told.forget([2])
    assert order(told)[0] == 3
    told.ranking.admit([2], 2.0)
    assert order(told)[0] == 12


def test_a_block_is_gone_when_it_is_in_no_tier() -> None:
    family, dram, nvme = two_tiers()
    for keys, now in (([10, 11], 0.0), ([1, 2, 3], 1.0)):
        asked = family.asked(Request([], len(keys), now))
        family.born(NONE, keys, asked)
        dram.admit(keys, now)
        nvme.admit(keys, now)
    dram.forget([2])
    assert next(dram.victims(9.0)) == next(nvme.victims(9.0)) == 11
    nvme.forget([2])
    assert next(dram.victims(9.0)) == next(nvme.victims(9.0)) == 3
    nvme.admit([2], 2.0)
    assert next(dram.victims(9.0)) == next(nvme.victims(9.0)) == 11


def test_useless_blocks_that_stay_are_passed_by() -> None:
    told = Told()
    told.admit([10, 11, 12], 0.0)
    told.admit([1, 2, 3], 1.0)
    told.forget([2])
    assert evict(told, 1, 2.0, stay=[3]) == [12]
    assert evict(told, 1, 2.0) == [3], "it is free"


def test_what_has_to_stay_is_named_again() -> None:
    """At once when it was only spared, after a while when it was deferred."""
    told = Told()
    for key in (1, 2, 3):
        told.admit([key], float(key))
    victims = told.victims(9.0)
    assert next(victims) == 1 and victims.send(True) == 2
    victims.close()
    assert order(told) == [1, 2, 3]
    assert put_off(told, 9.0) == 1
    assert order(told) == [2, 3, 1], "the others first, but nobody is left out"
    assert put_off(told, 9.0) == 1
    assert order(told, 9.0 + DEFER_S) == [1, 2, 3]


def test_nobody_is_named_twice() -> None:
    """A block that was deferred becomes a leaf again while others are named."""
    told = Told()
    told.admit([1], 0.0)
    told.admit([2], 0.0)
    assert put_off(told, 9.0) == put_off(told, 20.0) == 1
    come(told, [1], [3], 20.0)
    assert sorted(order(told, 20.0)) == [1, 2, 3]


# -- rows that other blocks get ----------------------------------------------------------------


def test_a_row_carries_nothing_over() -> None:
    told = Told()
    family = told.family
    told.admit([1, 2, 3], 0.0)
    for key in range(100, 100 + HUB_FAN):
        come(told, [1, 2], [key], 1.0)
    told.touch([1, 2, 3], 2.0)
    blocks = family.blocks
    assert blocks.hub[2] and blocks.fan[2] >= HUB_FAN
    told.forget([2, 3])
    told.drop([2])
    assert blocks.cohort[2] == blocks.parent[2] == NONE and blocks.depth[2] == UNPLACED
    check_family(family)
    told.admit([50, 51, 2, 52], 3.0)
    assert not blocks.hub[2] and blocks.fan[2] == 1
    assert (blocks.parent[2], blocks.depth[2]) == (51, 2)
    assert family.hazard.cohorts.touches[blocks.cohort[2]] == 1
    told.ranking.admit([3], 4.0)
    assert blocks.parent[3] == NONE, "what it continued was another block"
    named = order(told)
    assert [key for key in named if key in (50, 51, 2, 52)] == [52, 2, 51, 50]
    assert sorted(named) == sorted(told.residents())
    check_family(family)


def test_what_hung_on_a_dropped_block_hangs_on_nobody() -> None:
    told = Told()
    told.admit([1, 2, 3], 0.0)
    told.forget([2])
    told.drop([2])
    told.admit([2], 1.0)
    assert next(told.victims(9.0)) in (3, 1), "the new one does not wait, and 3 is a leaf"
    assert told.family.blocks.parent[3] == NONE
    check_family(told.family)


def test_blocks_of_which_nobody_told_are_strangers() -> None:
    """As found after a restart: what they continue is seen when they are asked for."""
    told = Told()
    told.ranking.admit([1, 2, 3], 0.0)
    cohorts, blocks = told.family.hazard.cohorts, told.family.blocks
    assert {cohorts.kind[blocks.cohort[key]] for key in (1, 2, 3)} == {STRANGER}
    told.touch([1, 2, 3], 1.0)
    assert order(told) == [3, 2, 1]
    assert STRANGER not in {cohorts.kind[blocks.cohort[key]] for key in (1, 2, 3)}


def test_many_that_come_at_once_are_named_as_soon_as_one_alone() -> None:
    told = Told()
    told.admit([1], 0.0)
    assert order(told) == [1]
    check_family(told.family)
    told.ranking.admit(range(2, 2 + MANY), 0.0)
    check_family(told.family)
    assert sorted(order(told)) == list(range(1, 2 + MANY))


# -- whatever is sent --------------------------------------------------------------------------

KEYS = st.lists(st.integers(0, 9), unique=True, max_size=5)
CALLS = st.tuples(
    st.sampled_from(("ask", "ask", "come", "come", "leave", "evict", "drop", "hint")),
    KEYS,
    KEYS,
    st.integers(0, 1),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(CALLS, max_size=30))
def test_no_circle_whatever_lists_are_sent(
    calls: list[tuple[str, list[int], list[int], int]],
) -> None:
    family, *tiers = two_tiers()
    for step, (verb, keys, others, at) in enumerate(calls):
        now, tier = step * 7.0, tiers[at]
        known = [key for key in keys if family.blocks.cohort[key] != NONE]
        if verb == "ask":
            family.asked(Request(known, len(others), now))
        elif verb == "come":
            if others:
                asked = family.asked(Request(known, len(others), now))
                family.born(keys[-1] if keys else NONE, others, asked)
            tier.admit([key for key in others if key not in tier], now)
        elif verb == "leave":
            tier.forget(keys)
        elif verb == "evict":
            evict(tier, len(keys), now, stay=others)
        elif verb == "drop":
            family.drop([key for key in keys if not any(key in one for one in tiers)])
        else:
            asked = family.asked(Request(known, 0, now))
            family.hinted(asked, known, "done", str(at))
        check_family(family)
        for one in tiers:
            assert_no_circle(family, one)


def assert_no_circle(family: Relevance, ranking: Ranking) -> None:
    for key in ranking.residents():
        seen = {key}
        while (child := ranking.columns.child[key]) != NONE:
            assert child not in seen, f"{child} depends on itself"
            assert family.blocks.parent[child] == key
            seen.add(child)
            key = child


@settings(max_examples=100, deadline=None)
@given(st.lists(CALLS, max_size=20))
def test_everybody_leaves_in_the_end(
    calls: list[tuple[str, list[int], list[int], int]],
) -> None:
    """Whatever hangs on whatever: a tier can be emptied, each block is named once."""
    told = Told()
    for step, (verb, keys, others, _) in enumerate(calls):
        if verb == "leave":
            told.forget(keys)
            continue
        known = [key for key in keys if told.family.blocks.cohort[key] != NONE]
        come(told, known, [key for key in others if key not in told], float(step))
    residents = sorted(told.residents())
    assert sorted(order(told)) == residents == sorted(evict(told, 99, 99.0))
    assert not len(told) and order(told) == []


# -- what it learns ----------------------------------------------------------------------------

Prompt = tuple[float, list[int], str]  # when, its blocks, and whether its sender comes back


def play(policy: Policy, prompts: Sequence[Prompt], capacity: int) -> float:
    """Hits per block asked for, over the last half."""
    hits = total = 0
    for number, (now, chain, reuse) in enumerate(prompts):
        there = next((at for at, key in enumerate(chain) if key not in policy), len(chain))
        if 2 * number >= len(prompts):
            hits += there
            total += len(chain)
        missing = [key for key in chain if key not in policy]
        evict(policy, len(policy) + len(missing) - capacity, now, stay=chain)
        missing = missing[: capacity - len(policy)]
        if isinstance(policy, Told):
            known = policy.known(chain)
            policy.ask(chain[:known], chain[known:], now, reuse=reuse)
            policy.ranking.admit(missing, now)
        else:
            come(policy, [key for key in chain if key in policy], missing, now)
        if number % 50 == 0 and isinstance(policy, Told):
            check_family(policy.family)
    return hits / total


def conversations_and_scans(seed: int) -> Iterator[Prompt]:
    """Ten conversations go on every 40 seconds or so; each second somebody asks for 20 blocks that
    nobody asks for again."""
    chance, fresh = random.Random(seed), count()
    talks = [(chance.uniform(0, 40), list(islice(fresh, 20))) for _ in range(10)]
    for second in range(1_200):
        yield float(second), list(islice(fresh, 20)), "unknown"
        for at, (due, blocks) in enumerate(talks):
            if due <= second:
                grown = (blocks if len(blocks) < 40 else []) + list(islice(fresh, 1))
                yield second + 0.5, list(grown), "unknown"
                talks[at] = (second + chance.uniform(30, 50), grown)


@pytest.mark.parametrize("seed", range(3))
def test_the_class_that_returns_stays(seed: int) -> None:
    """LRU keeps nothing: between two turns three times its size goes by."""
    prompts = list(conversations_and_scans(seed))
    told, lru = (play(policy, prompts, 300) for policy in (Told(), LRU()))
    assert lru < 0.01 and told > 0.1


def talks_in_turns(seed: int) -> Iterator[list[int]]:
    """Somebody who spoke lately goes on, four times in five; else somebody new begins."""
    chance, fresh = random.Random(seed), count()
    talks: list[list[int]] = []
    for _ in range(3_000):
        if talks and chance.random() < 0.8:
            talk = talks.pop(max(-len(talks), -1 - int(chance.expovariate(1 / 15))))
        else:
            talk = []
        talk += islice(fresh, chance.randint(1, 6))
        talks.append(talk)
        yield list(talk)


@pytest.mark.parametrize("apart_s", [0.0, 1e-6, 1e-3, 1.0], ids=str)
def test_time_may_pass_fast_or_not_at_all(apart_s: float) -> None:
    """A trace without times, and thousands of requests a second, are played by their order."""
    talks = [(at * apart_s, talk, "unknown") for at, talk in enumerate(talks_in_turns(3))]
    told, lru = (play(policy, talks, 600) for policy in (Told(), LRU()))
    assert 0.5 < lru < told + 0.01


def test_a_clock_that_goes_back_stops_time() -> None:
    chance = random.Random(5)
    talks = list(talks_in_turns(4))
    times = [chance.uniform(-3, 3) + at for at in range(len(talks))]
    told, sorted_ = (
        play(Told(), list(zip(when, talks, ["unknown"] * len(talks), strict=True)), 600)
        for when in (times, sorted(times))
    )
    assert told == pytest.approx(sorted_, abs=0.02)


def test_a_prefix_of_many_prompts_stays() -> None:
    """It is asked for every half minute; what comes in between is more than there is room for."""
    fresh, told, hub = count(100), Told(), list(range(10))
    prompts: list[Prompt] = []
    for second in range(1_500):
        prompts.append((float(second), list(islice(fresh, 20)), "unknown"))
        if second % 30 == 0:
            prompts.append((second + 0.5, hub + list(islice(fresh, 5)), "unknown"))
    play(told, prompts, 200)
    assert all(key in told for key in hub)
    assert told.family.blocks.hub[hub[-1]]
    leaving = order(told, 1_500.0)
    assert set(leaving[-len(hub) :]) == set(hub)


@pytest.mark.parametrize("late", [False, True])
def test_who_says_that_it_is_done_leaves_before_who_comes_back(*, late: bool) -> None:
    """Nothing else tells the two apart. Hints that come with what is stored count as much."""
    chance, fresh, told = random.Random(1), count(), Told()

    def ask(chain: Sequence[int], new: Sequence[int], now: float, reuse: str) -> None:
        asked = told.ask(chain, new, now, reuse="unknown" if late else reuse)
        if late:
            told.family.hinted(asked, [*chain, *new], reuse, "")
        told.ranking.admit(new, now)

    back: list[tuple[float, list[int]]] = []
    for second in range(600):
        new = list(islice(fresh, 5))
        reuse = chance.choice(("done", "continue"))
        ask([], new, float(second), reuse)
        if reuse == "continue":
            back.append((second + chance.uniform(5, 60), new))
        for due in [one for one in back if one[0] < second]:
            back.remove(due)
            ask(due[1], [], second + 0.5, "done")
    done, going_on = list(islice(fresh, 5)), list(islice(fresh, 5))
    ask([], done, 600.0, "done")
    ask([], going_on, 600.0, "continue")
    leaving = order(told, 601.0)
    assert max(map(leaving.index, done)) < min(map(leaving.index, going_on))
    check_family(told.family)


def test_what_is_likely_is_what_happened() -> None:
    """Every other prompt comes back within ten seconds; before anything is learned, all may."""
    chance, fresh, told = random.Random(2), count(), Told()
    told.admit([next(fresh)], 0.0)
    family = told.family
    assert family.likely(0, 0.0, 1e-3, 0.99) and family.likely(10**6, 0.0, 1e-3, 0.99)
    for second in range(1, 400):
        new = list(islice(fresh, 4))
        told.admit(new, 30.0 * second)
        if second % 2:
            told.touch(new, 30.0 * second + chance.uniform(1, 9))
    last = list(islice(fresh, 4))
    told.admit(last, 12_000.0)
    assert family.likely(last[0], 12_000.0, 30.0, 0.4)
    assert not family.likely(last[0], 12_000.0, 30.0, 0.6)
    assert not family.likely(last[0], 12_030.0, 30.0, 0.1), "it would have come by now"
    assert family.idle_s(last[0], 12_030.0) == 30.0
    assert family.reused(last[0]), "another block depends on it"
    assert not family.reused(last[-1])
    told.touch(last, 12_030.0)
    assert family.idle_s(last[0], 12_031.0) == 1.0 and family.reused(last[0])


# -- what it costs -----------------------------------------------------------------------------


def entries(ranking: Ranking) -> int:
    return sum(len(heap) for heaps in (ranking._old, ranking._young) for heap in heaps.values())


def touch_them(told: Told, leaves: Sequence[int], step: int) -> None:
    told.touch([leaves[step % len(leaves)]], float(step))


def come_and_go(told: Told, leaves: Sequence[int], step: int) -> None:
    key = leaves[step % len(leaves)]
    told.forget([key])
    told.ranking.admit([key], float(step))


@pytest.mark.parametrize("use", [touch_them, come_and_go])
def test_the_heaps_are_bounded(use: Callable[[Told, Sequence[int], int], None]) -> None:
    """Also while nobody has to leave."""
    told, leaves = Told(), [10, 11, 12, 13]
    told.admit([1], 0.0)
    for leaf in leaves:
        come(told, [1], [leaf], 0.0)
    most = ENTRIES_PER_BLOCK * len(told) + 1_024
    for step in range(5_000):
        use(told, leaves, step)
        assert entries(told.ranking) <= most + 2, f"after {step}"
    check_family(told.family)
    assert sorted(order(told, 5_000.0)) == [1, *leaves]
