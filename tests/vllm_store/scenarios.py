"""What engines with the connector do, each time compared with the greedy tokens of one without it.

Run by `python -m tests.vllm_store`, for each version of vLLM: engines take long to start, so most
scenarios share one, each with prompts of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import harness
from tests.e2e.harness import KIB, Daemon, contents, hashes, wait_for
from tests.vllm_store import environment
from tests.vllm_store.engines import (
    BLOCK,
    Engine,
    close_hosts,
    engine,
    save_gemma,
    save_llama,
    tokens,
)

VERSION = os.environ.get("ENGINE_VERSION", environment.BASE)
BLOCKS = 256  # of the engine's own cache
COUNT = 8  # tokens that are generated
WAIT_S = 1.5  # beyond what an engine takes without us; the bound that is promised is in the docs
FILL = 64 * KIB

Prompts = list[list[int]]


@pytest.fixture(scope="module", autouse=True)
def hosts() -> Iterator[None]:
    """No process is left behind."""
    yield
    close_hosts()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all models."""
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "llama")
    save_llama(folder / "other", seed=1)
    save_gemma(folder / "gemma")
    return folder


@pytest.fixture(scope="module")
def plain(models: Path) -> Iterator[Engine]:
    """An engine without the connector."""
    with engine(VERSION, models / "llama", None, num_gpu_blocks_override=BLOCKS) as made:
        yield made


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """The daemon of the shared engine."""
    with Daemon() as made:
        yield made.start()


@pytest.fixture(scope="module")
def shared(models: Path, daemon: Daemon) -> Iterator[Engine]:
    """An engine with the connector, and a daemon with NVMe."""
    with connected(models, daemon) as made:
        yield made


def connected(models: Path, daemon: Daemon, name: str = "llama", **setting: Any) -> Any:
    """An engine with the connector."""
    return engine(
        setting.pop("version", VERSION),
        models / name,
        daemon,
        **{"num_gpu_blocks_override": BLOCKS, **setting},
    )


def prompts(seed: int, *lengths: int) -> Prompts:
    """Prompts that no other scenario has."""
    return [tokens(length, 1000 * seed + at) for at, length in enumerate(lengths or (200, 150))]


def whole(asked: Prompts) -> list[int]:
    """How many tokens of each prompt fill blocks."""
    return [len(prompt) // BLOCK * BLOCK for prompt in asked]


def same(answer: Any, plain: Engine, asked: Prompts, count: int = COUNT) -> None:
    """The tokens are those of the engine without the connector."""
    plain.reset()
    assert answer["tokens"] == plain.generate(asked, count)["tokens"]
    assert set(answer["finish"]) == {"length"}


def store(made: Engine, plain: Engine, asked: Prompts) -> None:
    """Have the engine compute and store them, and forget its own cache."""
    cold = made.generate(asked, COUNT)
    assert cold["cached"] == [0] * len(asked)
    same(cold, plain, asked)
    made.rest()
    wait_for(made.ended, "the ends of the reservations")
    assert made.reset()


def test_cold_then_warm(shared: Engine, plain: Engine, daemon: Daemon) -> None:
    asked = prompts(1)
    before = daemon.stats()
    store(shared, plain, asked)
    stored = sum(whole(asked)) // BLOCK
    assert daemon.stats().blocks.stored - before.blocks.stored == stored
    warm = shared.generate(asked, COUNT)
    assert warm["cached"] == whole(asked)
    same(warm, plain, asked)
    after = daemon.stats()
    assert after.blocks.hit - before.blocks.hit == stored
    assert after.blocks.asked - before.blocks.asked == 2 * stored, "each block is asked for once"
    wait_for(lambda: not daemon.stats().leases, "leases to be given back")
    counts = shared.counts()
    assert counts["external"] == sum(whole(asked)) and not counts["moving"]
    assert not counts["failed"] and not counts["defects"] and not counts["refused"]


def test_more_prompts_than_are_asked_for_in_one_step(shared: Engine, plain: Engine) -> None:
    asked = prompts(21, *(100 + 10 * at for at in range(8)))
    store(shared, plain, asked)
    warm = shared.generate(asked, COUNT)
    assert warm["cached"] == whole(asked)
    same(warm, plain, asked)
    assert not shared.counts()["defects"]


def test_a_longer_prompt_and_a_fork(shared: Engine, plain: Engine) -> None:
    """What follows is stored behind it; a prompt that leaves the common part gets that part."""
    first = prompts(2, 200)
    store(shared, plain, first)
    longer = [tokens(300, 2001, first[0]), tokens(250, 2002, first[0][:100])]
    answer = shared.generate(longer, COUNT)
    assert answer["cached"] == [192, 96]
    same(answer, plain, longer)
    shared.rest()
    wait_for(shared.ended, "the ends of the reservations")
    shared.reset()
    again = shared.generate(longer, COUNT)
    assert again["cached"] == whole(longer)
    same(again, plain, longer)


def test_a_part_is_in_the_engine_itself(shared: Engine, plain: Engine) -> None:
    (long,) = prompts(3, 300)
    store(shared, plain, [long])
    head = shared.generate([long[:130]], COUNT)
    assert head["cached"] == [128]
    answer = shared.generate([long], COUNT)
    assert answer["cached"] == [288]
    same(answer, plain, [long])


def test_resetting_the_connector_keeps_the_store(shared: Engine, plain: Engine) -> None:
    asked = prompts(4)
    store(shared, plain, asked)
    assert shared.reset_connector()
    answer = shared.generate(asked, COUNT)
    assert answer["cached"] == whole(asked)
    same(answer, plain, asked)


def test_a_copy_that_fails_is_computed(shared: Engine, plain: Engine) -> None:
    asked = prompts(5)
    store(shared, plain, asked)
    before = shared.counts()
    shared.fail(1)
    answer = shared.generate(asked, COUNT)
    same(answer, plain, asked)
    assert sorted(answer["cached"])[0] == 0, "one is computed"
    assert shared.counts()["failed_loads"] == before.get("failed_loads", 0) + 1
    shared.rest()
    shared.reset()
    again = shared.generate(asked, COUNT)
    assert again["cached"] == whole(asked), "a later request is none the worse for it"
    assert shared.counts()["vllm:kvstore_failed_loads"] >= 1, "in the engine's own metrics"


def test_a_lost_lease_is_computed(shared: Engine, plain: Engine, daemon: Daemon) -> None:
    """The daemon takes the session's leases back while a worker copies."""
    asked = prompts(6, 200)
    store(shared, plain, asked)
    before = shared.counts()
    shared.hold(True)
    shared.start(asked, COUNT)
    wait_for(lambda: shared.held() == 1, "the load")
    assert daemon.client().drain(shared.session())[0]
    shared.hold(False)
    same(shared.finish(), plain, asked)
    assert shared.counts()["failed_loads"] == before.get("failed_loads", 0) + 1
    shared.rest()
    shared.reset()
    answer = shared.generate(asked, COUNT)
    assert answer["cached"] == whole(asked), "through a new session"
    same(answer, plain, asked)


def test_a_stopped_daemon_is_not_waited_for(shared: Engine, plain: Engine, daemon: Daemon) -> None:
    asked, unknown = prompts(7), prompts(8)
    store(shared, plain, asked)
    plain.reset()
    usual = plain.generate(asked, COUNT)["seconds"] + plain.generate(unknown, COUNT)["seconds"]
    with daemon.suspended():
        answers = [shared.generate(one, COUNT) for one in (asked, unknown)]
        assert shared.counts()["down"]
    assert sum(answer["seconds"] for answer in answers) < 3 * usual + WAIT_S
    for answer, one in zip(answers, (asked, unknown), strict=True):
        same(answer, plain, one)
    wait_for(lambda: not shared.counts()["down"], "the daemon to be seen again")
    shared.rest()
    shared.reset()
    assert shared.generate(asked, COUNT)["cached"] == whole(asked)


def test_a_killed_daemon_comes_back(shared: Engine, plain: Engine, daemon: Daemon) -> None:
    asked, meanwhile = prompts(9), prompts(10)
    store(shared, plain, asked)
    daemon.kill()
    answer = shared.generate(meanwhile, COUNT)
    assert answer["cached"] == [0, 0]
    same(answer, plain, meanwhile)
    daemon.start()
    wait_for(lambda: not shared.counts()["down"], "the daemon to be seen again")
    shared.rest()
    shared.reset()
    answer = shared.generate(asked, COUNT)
    assert answer["cached"] == whole(asked)
    same(answer, plain, asked)
    store(shared, plain, prompts(11))
    wait_for(lambda: not daemon.stats().blocks.quarantined, "what the old session had")


@pytest.mark.parametrize("doing", ["load", "store"])
def test_a_daemon_dies_in_the_middle(
    shared: Engine, plain: Engine, daemon: Daemon, doing: str
) -> None:
    asked = prompts(12 if doing == "load" else 13, 200)
    if doing == "load":
        store(shared, plain, asked)
    shared.hold(True)
    shared.start(asked, COUNT)
    wait_for(lambda: shared.held() == 1, doing)
    daemon.kill()
    shared.hold(False)
    same(shared.finish(), plain, asked)
    shared.rest()
    daemon.start()
    wait_for(lambda: not shared.counts()["down"], "the daemon to be seen again")
    wait_for(shared.ended, "the ends of the reservations")
    shared.reset()
    again = shared.generate(asked, COUNT)
    assert again["cached"] == (whole(asked) if doing == "load" else [0])
    same(again, plain, asked)
    shared.rest()
    wait_for(lambda: not daemon.stats().blocks.quarantined, "what the old session had")


def test_another_engine_finds_it(
    shared: Engine, plain: Engine, daemon: Daemon, models: Path
) -> None:
    """After a restart of the engine, and beside one that runs; not with other weights."""
    asked = prompts(14)
    store(shared, plain, asked)
    with connected(models, daemon) as second:
        answer = second.generate(asked, COUNT)
        assert answer["cached"] == whole(asked)
        same(answer, plain, asked)
        layouts = second.counts()["layouts"]
    with connected(models, daemon, "other") as other:
        assert other.generate(asked, COUNT)["cached"] == [0, 0]
        assert other.counts()["layouts"] != layouts


@pytest.mark.skipif(VERSION == environment.BASE, reason="needs a later version")
def test_versions_share(shared: Engine, plain: Engine, daemon: Daemon, models: Path) -> None:
    asked = prompts(15)
    environment.build(environment.BASE)
    with connected(models, daemon, version=environment.BASE) as older:
        older.generate(asked, COUNT)
        older.rest()
        wait_for(older.ended, "the ends of the reservations")
    answer = shared.generate(asked, COUNT)
    assert answer["cached"] == whole(asked)
    same(answer, plain, asked)


def test_no_daemon_at_first(plain: Engine, models: Path) -> None:
    asked = prompts(16)
    with Daemon() as daemon, connected(models, daemon) as made:
        answer = made.generate(asked, COUNT)
        same(answer, plain, asked)
        assert made.counts()["down"] and made.log().count("computes without the store") == 1
        daemon.start()
        wait_for(lambda: not made.counts()["down"], "the daemon to be seen")
        made.reset()
        store(made, plain, asked)
        assert made.generate(asked, COUNT)["cached"] == whole(asked)


def test_blocks_come_up_from_nvme(plain: Engine, models: Path) -> None:
    """They are waited for; and computed when they come too late."""
    asked, late = prompts(17), prompts(18)
    with Daemon(dram={"size": "8 MiB"}) as daemon:
        daemon.gated = True
        daemon.start()
        with connected(models, daemon, extra={"load_deadline_s": 2}) as made:
            store(made, plain, asked)
            store(made, plain, late)
            fill(daemon)
            before = daemon.stats()
            with daemon.hold("read"):
                made.start(asked, COUNT)
                wait_for(lambda: daemon.stats().moves.loads, "a load")
            answer = made.finish()
            assert answer["cached"] == whole(asked)
            same(answer, plain, asked)
            after = daemon.stats()
            blocks = sum(whole(asked)) // BLOCK
            assert after.tiers.nvme.hits - before.tiers.nvme.hits >= blocks - 2
            fill(daemon)
            with daemon.hold("read"):
                answer = made.generate(late, COUNT)
            assert answer["cached"] == [0, 0]
            assert 2 <= answer["seconds"] < 2 + 3 * WAIT_S
            same(answer, plain, late)


def fill(daemon: Daemon) -> None:
    """Blocks of another layout, until all others have left memory."""
    daemon.settled()
    client = daemon.client()
    cache = client.open(harness.layout("fill", shard_bytes=FILL))
    for at in range(3):
        keys = hashes(128, f"fill {at}")
        cache.put(keys, contents(keys, FILL), deadline_s=20)
        daemon.settled()


def test_a_full_store_stores_what_it_can(plain: Engine, models: Path) -> None:
    asked = prompts(19)
    with Daemon(dram={"size": "8 MiB"}, nvme={"size": "0"}) as daemon:
        client = daemon.start().client()
        cache = client.open(harness.layout("pinned", shard_bytes=FILL))
        keys = hashes(128, "pinned")
        assert cache.put(keys, contents(keys, FILL)).stored > 100
        with cache.acquire(keys), connected(models, daemon) as made:
            answer = made.generate(asked, COUNT)
            made.rest()
            same(answer, plain, asked)
            assert made.counts()["refused"] > 0
            made.reset()
            answer = made.generate(asked, COUNT)
            same(answer, plain, asked)


def test_preempted_requests(plain: Engine, models: Path) -> None:
    """Ten requests in a cache for four: some are preempted, and come back from the store."""
    asked = prompts(20, *[200 + at for at in range(10)])
    with (
        Daemon(dram={"size": "64 MiB"}).start() as daemon,
        connected(models, daemon, num_gpu_blocks_override=34) as made,
    ):
        answer = made.generate(asked, 70)
        same(answer, plain, asked, 70)
        assert made.counts()["preempted"] > 0
        made.rest()
        wait_for(made.ended, "the ends of the reservations")
        made.reset()
        answer = made.generate(asked, 70)
        assert min(answer["cached"]) >= 192
        same(answer, plain, asked, 70)


def test_two_workers(plain: Engine, models: Path) -> None:
    asked = prompts(21)
    with (
        Daemon().start() as daemon,
        connected(models, daemon, tensor_parallel_size=2) as made,
    ):
        store(made, plain, asked)
        assert daemon.stats().blocks.stored == sum(whole(asked)) // BLOCK
        answer = made.generate(asked, COUNT)
        assert answer["cached"] == whole(asked)
        same(answer, plain, asked)
        daemon.kill()
        daemon.start()
        wait_for(lambda: not made.counts()["down"], "the daemon to be seen again")
        made.reset()
        answer = made.generate(asked, COUNT)
        assert answer["cached"] == whole(asked)
        same(answer, plain, asked)


def test_sliding_windows(models: Path) -> None:
    asked = prompts(22, 200, 150, 192)
    with (
        engine(VERSION, models / "gemma", None, num_gpu_blocks_override=BLOCKS) as plain,
        Daemon().start() as daemon,
        connected(models, daemon, "gemma") as made,
    ):
        store(made, plain, asked)
        answer = made.generate(asked, COUNT)
        assert answer["cached"][:2] == whole(asked)[:2] and answer["cached"][2] >= 160
        same(answer, plain, asked)
        made.rest()
        made.reset()
        made.fail(1)
        same(made.generate(asked, COUNT), plain, asked)
        assert made.counts()["failed_loads"] == 1


def test_it_refuses_to_start_where_hashes_differ(models: Path) -> None:
    with Daemon().start() as daemon, pytest.raises(AssertionError, match="sha256_cbor"):
        connected(models, daemon, prefix_caching_hash_algo="sha256").__enter__()
