"""The storage behind SGLang's real host pools: bytes, ranks, restarts, and a daemon that fails.

Needs the environment of tests.sglang_store.environment: run by `python -m tests.sglang_store`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import MakeDaemon, make_daemon  # noqa: F401  # a fixture
from tests.e2e.harness import Daemon, hashes, layout, wait_for
from tests.sglang_store.remote import Agent, Remote, agents, keys

KINDS = [
    *(("mha", kind) for kind in ("layer_first", "page_first", "page_first_direct", "page_head")),
    *(("mla", kind) for kind in ("layer_first", "page_first", "page_first_direct")),
    ("asymmetric", "page_first"),
]
TIMEOUT_S = 5.0  # where no test waits for it
SHORT_S = 1.0  # where one does
SLACK_S = 2.0  # of a busy machine
PAGES = 160


@pytest.fixture(scope="module")
def two() -> Iterator[list[Agent]]:
    """Two processes, as of two ranks."""
    yield from agents(2)


@pytest.fixture
def agent(two: list[Agent]) -> Agent:
    return two[0]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One for all tests that use keys of their own."""
    with Daemon() as daemon:
        yield daemon.start()


def open_rank(agent: Agent, daemon: Daemon, kind: str = "mha", **options: Any) -> Remote:
    """A rank whose storage is served by the daemon."""
    extra = {"socket": str(daemon.socket()), "timeout_s": TIMEOUT_S, "model_id": "tiny"}
    extra |= options.pop("extra", {})
    shown = options.pop("layout", "page_first_direct")
    return agent.open(kind=kind, layout=shown, pages=PAGES, extra=extra, **options)


def store(rank: Remote, names: list[str], first: int = 0) -> None:
    """Fill pages and have them stored."""
    rank.write(pool="kv", keys=names, first=first)
    assert rank.set(keys=names, first=first) == [True] * len(names)


def load(rank: Remote, names: list[str], first: int = 0) -> list[bool]:
    """Have pages loaded over other bytes; those that are said to be there must be right."""
    rank.wipe(pool="kv", count=len(names), first=first)
    got: list[bool] = rank.get(keys=names, first=first)
    right = rank.right(pool="kv", keys=names, first=first)
    assert len(got) == len(names)
    assert [page and not whole for page, whole in zip(got, right, strict=True)].count(True) == 0
    return got


@pytest.mark.parametrize(("kind", "pages"), KINDS)
def test_every_layout(agent: Agent, daemon: Daemon, kind: str, pages: str) -> None:
    rank = open_rank(agent, daemon, kind, layout=pages, mla=kind == "mla")
    names = keys(40, f"layout/{kind}/{pages}")
    assert rank.exists(keys=names) == 0
    assert load(rank, names) == [False] * 40
    store(rank, names)
    assert rank.exists(keys=names) == 40
    assert load(rank, names, first=77) == [True] * 40, "at other places of the pool"
    rank.close()
    assert rank.exists(keys=names) == 0, "a closed storage answers, with misses"
    again = open_rank(agent, daemon, kind, layout=pages, mla=kind == "mla")
    assert again.exists(keys=names) == 40
    assert load(again, names) == [True] * 40
    assert again.counts()["defects"] == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 63, 127, 128])
def test_batches(agent: Agent, daemon: Daemon, count: int) -> None:
    rank = open_rank(agent, daemon)
    names = keys(count, f"batch/{count}")
    store(rank, names, first=5)
    assert rank.exists(keys=names) == count
    assert load(rank, names, first=1) == [True] * count
    assert rank.stats() == {
        "loads": [count],
        "rates": [pytest.approx(0, abs=1e3)],
        "stores": [count],
    }


def test_a_batch_is_one_call_of_each_kind(agent: Agent, make_daemon: MakeDaemon) -> None:  # noqa: F811
    daemon = make_daemon().start()
    rank = open_rank(agent, daemon)
    names = keys(128, "calls")
    store(rank, names)
    rank.exists(keys=names)
    load(rank, names)
    requests = daemon.stats().requests
    assert {name: requests[name] for name in ("lookup", "reserve", "commit", "acquire")} == {
        "lookup": 1,
        "reserve": 1,
        "commit": 1,
        "acquire": 1,
    }


def test_prefixes(agent: Agent, daemon: Daemon) -> None:
    rank = open_rank(agent, daemon)
    names = keys(30, "prefix")
    store(rank, names[:11])
    assert rank.exists(keys=names) == 11
    assert load(rank, names) == [True] * 11 + [False] * 19
    rank.write(pool="kv", keys=names[12:], first=40)
    assert rank.set(keys=names[12:], first=40, prefix=names[:12]) == [True] * 18
    assert rank.exists(keys=names) == 11, "one page is missing"
    assert load(rank, names) == [True] * 11 + [False] * 19
    assert load(rank, names[12:]) == [True] * 18
    store(rank, names)
    assert load(rank, names) == [True] * 30


def test_layouts_do_not_mix(agent: Agent, daemon: Daemon) -> None:
    names = keys(4, "mix")
    first = open_rank(agent, daemon)
    store(first, names)
    others = [
        open_rank(agent, daemon, layout="page_first"),
        open_rank(agent, daemon, "mla", mla=True),
        open_rank(agent, daemon, tp_size=2),
        open_rank(agent, daemon, extra={"model_id": "another"}),
        open_rank(agent, daemon, extra={"interface_v1": 0}),
    ]
    assert [rank.exists(keys=names) for rank in others] == [0] * len(others)
    assert load(others[0], names) == [False] * 4
    assert open_rank(agent, daemon).exists(keys=names) == 4


def test_other_keys(agent: Agent, daemon: Daemon) -> None:
    rank = open_rank(agent, daemon)
    names = ["x", "A" * 64, "a" * 64, "ab" * 31 + " a", f"{'c' * 64}_suffix", "é" * 100, ""]
    store(rank, names)
    assert load(rank, names) == [True] * len(names)


def test_calls_that_make_no_sense(agent: Agent, daemon: Daemon) -> None:
    rank = open_rank(agent, daemon)
    false = [False] * 2
    assert rank.odd_calls() == [
        *(false, false, false, false),
        *(False, False, False, False),
        *(0, [], 0, [false]),
    ]
    names = keys(3, "sense")
    store(rank, names)
    assert load(rank, names) == [True] * 3


def test_wrong_configuration_ends_the_start(agent: Agent, daemon: Daemon) -> None:
    for extra, text in (
        ({"timeout": 1}, "unknown key 'timeout'"),
        ({"timeout_s": -1}, "timeout_s"),
    ):
        with pytest.raises(AssertionError, match=text):
            open_rank(agent, daemon, extra=extra)


def test_flat_tensors(agent: Agent, daemon: Daemon) -> None:
    names = keys(20, "flat")
    for extra in ({"interface_v1": 0}, {"interface_v1": 1}):
        rank = open_rank(agent, daemon, extra=extra)
        assert rank.flat_set(keys=names[:12])
        assert rank.exists_one(key=names[11])
        assert not rank.exists_one(key=names[12])
        for given in (True, False):
            assert rank.flat_get(keys=names, given=given) == [True] * 12 + [False] * 8
        assert rank.exists(keys=names) == (0 if extra["interface_v1"] else 12)


def test_clear(agent: Agent, make_daemon: MakeDaemon) -> None:  # noqa: F811
    rank = open_rank(agent, make_daemon().start())
    names = keys(9, "clear")
    store(rank, names)
    assert rank.clear()
    assert rank.exists(keys=names) == 0
    assert load(rank, names) == [False] * 9


# -- ranks -----------------------------------------------------------------------------------------


def test_two_ranks_share_blocks(two: list[Agent], daemon: Daemon) -> None:
    ranks = [open_rank(one, daemon, tp_rank=at, tp_size=2) for at, one in enumerate(two)]
    names = keys(20, "tp")
    store(ranks[0], names)
    assert [rank.exists(keys=names) for rank in ranks] == [0, 0]
    assert load(ranks[0], names) == [False] * 20, "half a block is none"
    store(ranks[1], names[:13])
    assert [rank.exists(keys=names) for rank in ranks] == [13, 13]
    for rank in ranks:
        assert load(rank, names) == [True] * 13 + [False] * 7
    again = [open_rank(one, daemon, tp_rank=1 - at, tp_size=2) for at, one in enumerate(two)]
    for rank in again:
        assert load(rank, names) == [True] * 13 + [False] * 7


def test_a_replicated_cache_is_stored_once(two: list[Agent], daemon: Daemon) -> None:
    ranks = [
        open_rank(one, daemon, "mla", mla=True, tp_rank=at, tp_size=2) for at, one in enumerate(two)
    ]
    names = keys(20, "mla tp")
    ranks[1].write(pool="kv", keys=names, first=0)
    assert ranks[1].set(keys=names, first=0) == [True] * 20, "it is not this rank's to write"
    assert ranks[1].exists(keys=names) == 0
    store(ranks[0], names)
    for rank in ranks:
        assert load(rank, names) == [True] * 20


# -- a daemon that fails ---------------------------------------------------------------------------


def test_killed_and_started_again(agent: Agent, make_daemon: MakeDaemon) -> None:  # noqa: F811
    daemon = make_daemon().start()
    rank = open_rank(agent, daemon)
    names = keys(60, "killed")
    store(rank, names)
    daemon.kill()
    assert rank.exists(keys=names) == 0
    assert load(rank, names) == [False] * 60
    assert rank.set(keys=names, first=0) == [False] * 60
    daemon.start()
    wait_for(lambda: rank.exists(keys=names) == 60, "the storage to see the daemon")
    assert load(rank, names) == [True] * 60
    counts = rank.counts()
    assert counts["failed"] >= 1
    assert counts["skipped"] >= 1
    assert counts["defects"] == 0


def test_pages_come_up_from_nvme(agent: Agent, make_daemon: MakeDaemon) -> None:  # noqa: F811
    daemon = make_daemon().start()
    rank = open_rank(agent, daemon, extra={"load_deadline_s": 10.0})
    names = keys(128, "nvme")
    store(rank, names)
    daemon.settled()
    daemon.stop()
    daemon.lose_memory()
    daemon.start()
    wait_for(lambda: rank.exists(keys=names) == 128, "the storage to see the daemon")
    assert load(rank, names) == [True] * 128
    assert daemon.stats().tiers.nvme.hits == 128


def test_more_than_memory_holds(agent: Agent, make_daemon: MakeDaemon) -> None:  # noqa: F811
    daemon = make_daemon(dram={"size": "8 MiB"}, nvme={"size": "32 MiB"}).start()
    extra = {"load_deadline_s": 10.0, "timeout_s": 10.0}
    rank = open_rank(agent, daemon, extra=extra)
    rounds = [keys(128, f"more/{at}") for at in range(20)]  # 10 MiB
    for names in rounds:
        store(rank, names)
    for names in rounds:
        assert load(rank, names) == [True] * 128


def test_no_daemon_at_first(agent: Agent, make_daemon: MakeDaemon) -> None:  # noqa: F811
    daemon = make_daemon()
    rank = open_rank(agent, daemon)
    names = keys(10, "late")
    assert rank.exists(keys=names) == 0
    assert rank.set(keys=names, first=0) == [False] * 10
    assert rank.seconds < SLACK_S
    assert load(rank, names) == [False] * 10
    assert not rank.clear()
    daemon.start()

    def stored() -> bool:
        rank.write(pool="kv", keys=names, first=0)
        return bool(rank.set(keys=names, first=0) == [True] * 10)

    wait_for(stored, "the storage to see the daemon")
    assert load(rank, names) == [True] * 10


def test_a_halted_daemon_is_waited_for_once(agent: Agent, make_daemon: MakeDaemon) -> None:  # noqa: F811
    daemon = make_daemon().start()
    rank = open_rank(agent, daemon, extra={"load_deadline_s": SHORT_S, "timeout_s": SHORT_S})
    names = keys(10, "halted")
    store(rank, names)
    rank.wipe(pool="kv", count=10, first=0)
    with daemon.suspended():
        assert rank.get(keys=names, first=0) == [False] * 10
        assert SHORT_S / 2 < rank.seconds < SHORT_S + SLACK_S
        for _ in range(3):
            assert rank.exists(keys=names) == 0
            assert rank.seconds < SHORT_S / 2
            assert rank.set(keys=names, first=0) == [False] * 10
            assert rank.seconds < SHORT_S / 2
    wait_for(lambda: rank.exists(keys=names) == 10, "the storage to see the daemon")
    assert load(rank, names) == [True] * 10


def test_a_full_store(agent: Agent, make_daemon: MakeDaemon) -> None:  # noqa: F811
    daemon = make_daemon(dram={"size": "8 MiB"}, nvme={"size": "0"}).start()
    cache = daemon.client().open(layout("pinned", shard_bytes=4096))
    pinned = hashes(2048, "pinned")
    assert cache.put(pinned, [bytes(4096)] * 2048).stored == 2048
    assert cache.retain(pinned, 100) == 2048
    rank = open_rank(agent, daemon, extra={"timeout_s": SHORT_S})
    names = keys(20, "full")
    rank.write(pool="kv", keys=names, first=0)
    assert rank.set(keys=names, first=0) == [False] * 20
    assert rank.seconds < SHORT_S + SLACK_S
    assert rank.exists(keys=names) == 0
    counts = rank.counts()
    assert (counts["refused"], counts["failed"], counts["defects"]) == (20, 0, 0)


# -- several pools ---------------------------------------------------------------------------------


def transfer(pool: str, names: list[str], first: int = 0, policy: str = "all_pages") -> Any:
    return {"pool": pool, "keys": names, "first": first, "policy": policy}


def test_a_pool_of_every_page(agent: Agent, daemon: Daemon) -> None:
    rank = open_rank(agent, daemon, layout="layer_first", sidecars={"indexer": "paged"})
    names = keys(20, "indexer")
    store(rank, names)
    rank.write(pool="indexer", keys=names, first=3)
    assert rank.set_v2(transfers=[transfer("indexer", names[:8], 3)]) == {"indexer": [True] * 8}
    found = rank.exists_v2(keys=names, transfers=[transfer("indexer", names)])
    assert found == {
        "pages": 8,
        "pools": {"kv": 20, "indexer": 8},
        "restorable": list(range(1, 9)),
    }
    rank.wipe(pool="indexer", count=40, first=0)
    got = rank.get_v2(transfers=[transfer("indexer", names, 10)])
    assert got == {"indexer": [True] * 8 + [False] * 12}
    assert rank.right(pool="indexer", keys=names[:8], first=10) == [True] * 8


@pytest.mark.parametrize("kind", ["mamba", "mamba-side-state"])
def test_a_pool_of_last_pages(agent: Agent, daemon: Daemon, kind: str) -> None:
    rank = open_rank(agent, daemon, layout="page_first", sidecars={"mamba": kind})
    names = keys(100, kind)
    store(rank, names[:90])
    for at in (9, 40, 41, 95):
        rank.write(pool="mamba", keys=[names[at]], first=at)
        done = rank.set_v2(transfers=[transfer("mamba", [names[at]], at)])
        assert done == {"mamba": [True]}
    wanted = transfer("mamba", names[-1:], policy="trailing_pages")
    found = rank.exists_v2(keys=names, transfers=[wanted])
    assert found == {"pages": 42, "pools": {"kv": 90, "mamba": 42}, "restorable": [10, 41, 42]}
    pair = transfer("mamba", names[-2:], policy="trailing_pages")
    found = rank.exists_v2(keys=names, transfers=[pair])
    assert found == {"pages": 42, "pools": {"kv": 90, "mamba": 42}, "restorable": [42]}
    rank.wipe(pool="mamba", count=100, first=0)
    assert rank.get_v2(transfers=[transfer("mamba", [names[41]], 7)]) == {"mamba": [True]}
    assert rank.right(pool="mamba", keys=[names[41]], first=7) == [True]
    assert rank.get_v2(transfers=[transfer("mamba", [names[42]], 8)]) == {"mamba": [False]}


def test_states_differ_between_ranks_where_the_rest_does_not(
    two: list[Agent], daemon: Daemon
) -> None:
    ranks = [
        open_rank(
            one,
            daemon,
            "mla",
            layout="page_first",
            mla=True,
            tp_rank=at,
            tp_size=2,
            sidecars={"mamba": "mamba"},
        )
        for at, one in enumerate(two)
    ]
    names = keys(5, "kda")
    store(ranks[0], names)
    wanted = [transfer("mamba", names[-1:], policy="trailing_pages")]
    for rank, pages in zip(ranks, (0, 5), strict=True):
        rank.write(pool="mamba", keys=names[-1:], first=0)
        assert rank.set_v2(transfers=[transfer("mamba", names[-1:])]) == {"mamba": [True]}
        assert rank.exists_v2(keys=names, transfers=wanted)["pages"] == pages
    for rank in ranks:
        assert load(rank, names) == [True] * 5
        rank.wipe(pool="mamba", count=3, first=0)
        assert rank.get_v2(transfers=[transfer("mamba", names[-1:], 2)]) == {"mamba": [True]}
        assert rank.right(pool="mamba", keys=names[-1:], first=2) == [True]


def test_an_anchor_without_bytes(agent: Agent, daemon: Daemon) -> None:
    rank = open_rank(agent, daemon, "logical", sidecars={"deepseek_v4_c4": "paged"}, mla=True)
    names = keys(6, "anchor")
    assert rank.set(keys=names[:4], first=0) == [True] * 4
    rank.write(pool="deepseek_v4_c4", keys=names, first=0)
    done = rank.set_v2(transfers=[transfer("deepseek_v4_c4", names)])
    assert done == {"deepseek_v4_c4": [True] * 6}
    found = rank.exists_v2(keys=names, transfers=[transfer("deepseek_v4_c4", names)])
    assert found["pages"] == 4
    assert rank.get(keys=names, first=0) == [True] * 4 + [False] * 2
