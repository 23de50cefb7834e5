"""DRAM outlives the daemon: what was committed is served by the next one, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.client import Cache
from kvstore.errors import SessionLost, Unavailable
from kvstore.tiers.slot_table import COMMITTED, WRITING, SlotRecord, SlotTable
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import ROOT, Daemon, content, contents, hashes, layout, targets, wait_for

SIZE = 64 << 10
LAYOUT = layout("adoption")
KEYS = hashes(100, "adoption")
DRAM_ALONE: dict[str, dict[str, object]] = {"nvme": {"size": "0"}}


def got(cache: Cache, keys: list[bytes], tier: str) -> int:
    """Blocks that are served, each looked at; all from one tier."""
    into = targets(len(keys), SIZE)
    result = cache.get(keys, into, deadline_s=5.0)
    assert set(result.tiers) <= {tier}
    for key, one in zip(keys[: result.length], into, strict=False):
        assert one == content(key, SIZE)
    return result.length


def records(daemon: Daemon) -> list[SlotRecord]:
    """What the slot table says."""
    table = SlotTable.open(daemon.arena / "default" / "slots")
    found = list(table.records())
    table.close()
    return found


def all_summed(daemon: Daemon, count: int) -> bool:
    """Whether so many blocks are committed, and the table tells the checksum of each."""
    found = records(daemon)
    return len(found) == count and all(one.checksum for one in found)


def open_again(daemon: Daemon, door: str = "hatch") -> Cache:
    return daemon.client(door).open(LAYOUT)


@pytest.fixture
def filled(make_daemon: MakeDaemon) -> Iterator[Daemon]:
    """A daemon without NVMe that has all KEYS."""
    daemon = make_daemon(**DRAM_ALONE).start()
    assert open_again(daemon).put(KEYS, contents(KEYS, SIZE)).stored == len(KEYS)
    yield daemon


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_every_committed_block_is_served_again(filled: Daemon, end: str, door: str) -> None:
    for _ in range(3):
        filled.kill() if end == "kill" else filled.stop()
        filled.start()
        assert got(open_again(filled, door), KEYS, "dram") == len(KEYS)


def test_a_client_goes_on_by_itself(filled: Daemon, door: str) -> None:
    """The same client object, the same arena, another daemon; an old lease is not held any more."""
    cache = open_again(filled, door)
    grant = cache.acquire(KEYS[:3])
    reservation = cache.reserve(hashes(2, "lost"))
    inode = os.stat(filled.arena / "default" / "arena").st_ino
    filled.kill()
    filled.start()
    wait_for(lambda: _answers(cache), "the client to connect again")
    assert os.stat(filled.arena / "default" / "arena").st_ino == inode
    assert got(cache, KEYS, "dram") == len(KEYS)
    assert grant.length == 3 and not grant.release()
    with pytest.raises(SessionLost):
        reservation.commit()
    assert cache.lookup(hashes(2, "lost")).length == 0


def _answers(cache: Cache) -> bool:
    try:
        return cache.lookup(KEYS).length >= 0
    except Unavailable:
        return False


def test_with_nvme_both_copies_are_kept(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    cache = open_again(daemon)
    cache.put(KEYS, contents(KEYS, SIZE))
    assert daemon.settled().tiers.nvme.blocks == len(KEYS)
    wait_for(lambda: not daemon.stats().moves.due, "the copies")
    daemon.stop()
    daemon.start()
    assert got(open_again(daemon), KEYS, "dram") == len(KEYS)
    stats = daemon.settled()
    assert stats.tiers.nvme.blocks == stats.tiers.dram.blocks == len(KEYS)
    assert stats.tiers.nvme.spilled == 0, "nothing is written twice"


def test_what_was_not_spilled_yet_is_spilled_by_the_next(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.gated = True
    daemon.start()
    with daemon.hold("write"):
        open_again(daemon).put(KEYS, contents(KEYS, SIZE))
        daemon.kill()
    daemon.start()
    assert got(open_again(daemon), KEYS, "dram") == len(KEYS)
    wait_for(lambda: daemon.stats().tiers.nvme.spilled == len(KEYS), "the copies")
    daemon.stop()
    daemon.lose_memory()
    daemon.start()
    assert got(open_again(daemon), KEYS, "nvme") == len(KEYS)


def test_the_order_of_use_is_kept(make_daemon: MakeDaemon) -> None:
    """What was used last before the daemon died is the last to leave after it."""
    daemon = make_daemon(nvme={"size": "0"}, dram={"size": "8 MiB"}).start()
    cache = open_again(daemon)
    singles = [hashes(1, f"single {at}") for at in range(120)]
    for keys in singles:
        cache.put(keys, contents(keys, SIZE))
    for keys in singles[:20]:
        cache.acquire(keys).release()
    daemon.stats()
    for _ in range(2):  # the background, which reads them in its own order, changes nothing
        wait_for(lambda: all_summed(daemon, 120), "the checksums")
        daemon.kill()
        daemon.start()
    cache = open_again(daemon)
    more = hashes(60, "more")
    assert cache.put(more, contents(more, SIZE)).stored == 60
    left = [at for at, keys in enumerate(singles) if cache.lookup(keys).length]
    assert set(range(20)) <= set(left) and set(range(100, 120)) <= set(left)
    assert not set(range(20, 60)) & set(left)


def test_a_damaged_block_is_a_miss_and_counted(make_daemon: MakeDaemon) -> None:
    """Its checksum is known, as it was taken for the copy on NVMe or in the background."""
    daemon = make_daemon(**DRAM_ALONE).start()
    open_again(daemon).put(KEYS, contents(KEYS, SIZE))
    wait_for(lambda: all_summed(daemon, len(KEYS)), "the checksums")
    daemon.kill()
    bad = {KEYS[3], KEYS[50]}
    damage(daemon, bad)
    daemon.start()
    cache = open_again(daemon)
    assert got(cache, KEYS, "dram") == 3
    for key in KEYS:
        assert got(cache, [key], "dram") == (key not in bad)
    assert daemon.stats().tiers.dram.corrupt == 2


def test_a_damaged_block_comes_from_nvme_the_next_time(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    open_again(daemon).put(KEYS, contents(KEYS, SIZE))
    daemon.settled()
    daemon.stop()
    bad = set(KEYS[3:20])
    damage(daemon, bad)
    daemon.start()
    cache = open_again(daemon)
    for key in KEYS:  # whoever comes first may be told of a miss
        cache.get([key], targets(1, SIZE), deadline_s=20)
    stats = daemon.settled()
    assert stats.tiers.dram.corrupt == len(bad) and not stats.tiers.nvme.evicted
    into = targets(len(KEYS), SIZE)
    found = cache.get(KEYS, into, deadline_s=20)
    assert found.length == len(KEYS)
    assert all(bytes(one) == content(key, SIZE) for one, key in zip(into, KEYS, strict=True))
    assert daemon.stats().tiers.nvme.hits >= len(bad)


def damage(daemon: Daemon, bad: set[bytes]) -> None:
    """Other bytes in the arena, where these blocks are."""
    with (daemon.arena / "default" / "arena").open("r+b") as arena:
        for record in records(daemon):
            if record.hash in bad:
                arena.seek(record.offset + 1_000)
                arena.write(b"\0\xff\xff")


def test_a_damaged_record_is_a_miss(filled: Daemon) -> None:
    filled.kill()
    table = filled.arena / "default" / "slots"
    found = records(filled)
    data = bytearray(table.read_bytes())
    for record in found[:5]:
        at = data.index(record.hash)
        data[at] ^= 4
    table.write_bytes(data)
    filled.start()
    cache = open_again(filled)
    assert sum(got(cache, [one.hash], "dram") for one in found) == len(found) - 5


@pytest.mark.parametrize("change", ["size", "slab", "version", "owner", "notes", "missing"])
def test_what_does_not_fit_is_not_adopted(filled: Daemon, change: str) -> None:
    """It starts empty, says why in one line, and works."""
    filled.kill()
    folder = filled.arena / "default"
    if change == "size":
        filled.config["dram"]["size"] = "24 MiB"
    elif change == "slab":
        filled.config["dram"]["slab_size"] = "1 MiB"
    elif change == "version":
        _poke(folder / "slots", 8, b"\7")
    elif change == "owner":
        os.chmod(folder / "arena", 0o666)
    elif change == "notes":
        _poke(folder / "notes", 3, b"X")
    else:
        (folder / "notes").unlink()
    filled.start()
    assert (folder / "arena").stat().st_mode & 0o777 == 0o660
    cache = open_again(filled)
    assert got(cache, KEYS, "dram") == 0
    said = filled.log().count("DRAM starts empty")
    assert said == (change != "missing")
    assert cache.put(KEYS, contents(KEYS, SIZE)).stored == len(KEYS)
    filled.kill()
    filled.start()
    assert got(open_again(filled), KEYS, "dram") == len(KEYS)


def _poke(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


WRITER = """
import sys
from tests.e2e.harness import hashes, layout
from kvstore.client import connect
client = connect(sys.argv[1])
reservation = client.open(layout("adoption")).reserve(hashes(4, "half"))
print(len(reservation), flush=True)
sys.stdin.readline()
"""


def writer(daemon: Daemon) -> subprocess.Popen[str]:
    """A process that has reserved four blocks and writes them for as long as it lives."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(daemon.socket())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "4\n"
    return process


def quarantined(daemon: Daemon) -> int:
    found: int = daemon.stats().blocks.quarantined
    return found


def test_slots_being_written_wait_for_their_writers(filled: Daemon) -> None:
    with writer(filled) as process:
        filled.kill()
        assert sum(one.state == WRITING for one in records(filled)) == 4
        filled.start()
        cache = open_again(filled)
        assert quarantined(filled) == 4
        assert got(cache, hashes(4, "half"), "dram") == 0
        filled.kill()  # the daemon after the next one knows it, too
        filled.start()
        assert quarantined(filled) == 4
        assert all(one.state == COMMITTED or one.session for one in records(filled))
        process.kill()
        wait_for(lambda: quarantined(filled) == 0, "the slots to be freed", 2.0)
    assert got(open_again(filled), KEYS, "dram") == len(KEYS)


def test_a_writer_that_is_gone_by_then_holds_nothing(filled: Daemon) -> None:
    with writer(filled) as process:
        filled.signal(signal.SIGSTOP)
        process.kill()
        process.wait()
        filled.kill()
    filled.start()
    assert quarantined(filled) == 0 and "quarantined" in filled.log()


def test_a_client_that_lives_gives_back_what_it_was_writing(filled: Daemon, door: str) -> None:
    """Its process goes on, so the slots would wait for ever; it says that it does not write."""
    cache = open_again(filled, door)
    reservation = cache.reserve(hashes(4, "half"))
    other = cache.reserve(hashes(2, "other half"))
    view = reservation.view(0)
    filled.kill()
    filled.start()
    wait_for(lambda: _answers(cache), "the client to connect again")
    assert quarantined(filled) == 6, "it may still write"
    view[:] = content(KEYS[0], SIZE)
    reservation.abort()
    assert quarantined(filled) == 6
    other.abort()
    wait_for(lambda: quarantined(filled) == 0, "the slots to be freed")
    half = hashes(4, "half")
    assert cache.put(half, contents(half, SIZE)).stored == 4
    assert got(cache, half, "dram") == 4


def test_nobody_settles_for_another_process(filled: Daemon) -> None:
    from kvstore.protos import kvstore_pb2 as pb
    from tests.e2e.raw import RawHatch

    with writer(filled) as process:
        filled.kill()
        filled.start()
        with RawHatch(filled.socket()) as raw:
            raw.attach()
            reply: Any = raw.call(pb.SETTLE, pb.SettleRequest(sessions=range(1, 50)))
        assert reply.settled <= 1 and quarantined(filled) == 4  # one was of this very process
        process.kill()
        wait_for(lambda: quarantined(filled) == 0, "the slots to be freed", 2.0)
