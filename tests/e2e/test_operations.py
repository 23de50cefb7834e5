"""What an operator does: reload, stop, and a disk that is full or broken and comes back."""

from __future__ import annotations

import datetime
import json
import shutil
import signal
import subprocess
from collections import Counter
from typing import Any

import pytest

from kvstore.client import Cache
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import Daemon, contents, hashes, layout, targets, wait_for

SIZE = 64 << 10


def lines(daemon: Daemon, event: str) -> list[dict[str, Any]]:
    """Lines of the log about one event."""
    found = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    return [line for line in found if line["event"] == event]


def reload(daemon: Daemon) -> dict[str, Any]:
    """Write the configuration anew, SIGHUP; what the daemon says of it."""
    daemon.write_config()
    said = "configuration reloaded", "configuration not reloaded"
    before = sum(len(lines(daemon, event)) for event in said)
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: sum(len(lines(daemon, e)) for e in said) > before, "the reload")
    return max((line for e in said for line in lines(daemon, e)), key=lambda one: one["timestamp"])


def check(cache: Cache, keys: list[bytes]) -> Counter[str]:
    into = targets(len(keys), SIZE)
    got = cache.get(keys, into, deadline_s=10)
    assert got.length == len(keys)
    assert [bytes(one) for one in into] == contents(keys, SIZE)
    return got.tiers


def test_reload(make_daemon: MakeDaemon) -> None:
    """A second reload compared with the start and not with the first: going back to the old value
    was said to change nothing."""
    daemon = make_daemon(nvme={"write_policy": "on-evict"}).start()
    client = daemon.client()
    cache = client.open(layout("reload"))
    first, second, third = (hashes(10, name) for name in ("first", "second", "third"))
    cache.put(first, contents(first, SIZE))
    assert daemon.settled().tiers.nvme.spilled == 0
    daemon.config["nvme"]["write_policy"] = "through"
    daemon.config["dram"]["size"] = "32 MiB"
    line = reload(daemon)
    assert (line["changed"], line["needs_restart"]) == (["nvme.write_policy"], ["dram.size"])
    cache.put(second, contents(second, SIZE))
    wait_for(lambda: daemon.settled().tiers.nvme.spilled == 10, "the new policy to write")
    daemon.config["nvme"]["write_policy"] = "on-evict"
    line = reload(daemon)
    assert (line["changed"], line["needs_restart"]) == (["nvme.write_policy"], ["dram.size"])
    cache.put(third, contents(third, SIZE))
    assert daemon.settled().tiers.nvme.spilled == 10
    daemon.config["nvme"]["write_policy"] = "sometimes"
    line = reload(daemon)
    assert "nvme.write_policy" in line["problem"] and "sometimes" in line["problem"]
    assert check(cache, first + second + third) == Counter(dram=30)
    daemon.config["nvme"]["write_policy"] = "on-evict"


@pytest.mark.parametrize("policy", ["through", "on-evict"])
def test_a_clean_stop_writes_everything(make_daemon: MakeDaemon, policy: str) -> None:
    daemon = make_daemon(nvme={"write_policy": policy}).start()
    cache = daemon.client().open(layout("drain"))
    keys = hashes(200, "drain")
    cache.put(keys, contents(keys, SIZE))
    held = cache.reserve(hashes(3, "unfinished"))
    assert len(held) == 3
    daemon.stop()
    daemon.lose_memory()
    assert "stopped before" not in daemon.log()
    daemon.start()
    assert check(cache, keys) == Counter(nvme=200)
    assert cache.lookup(hashes(3, "unfinished")).length == 0
    assert daemon.stats().blocks.known == 200


def test_a_stop_that_cannot_write_everything_ends(make_daemon: MakeDaemon) -> None:
    """A disk that hangs does not keep the daemon from stopping, and what was not written is lost
    and not wrong."""
    daemon = make_daemon(daemon={"drain_timeout": "300 ms"})
    daemon.gated = True
    daemon.start()
    cache = daemon.client().open(layout("hang"))
    first, second = hashes(10, "first"), hashes(60, "second")
    cache.put(first, contents(first, SIZE))
    daemon.settled()
    with daemon.hold("write"):
        cache.put(second, contents(second, SIZE))
        daemon.signal(signal.SIGTERM)
        wait_for(lambda: lines(daemon, "stopping"), "the daemon to stop")
        gate = daemon.folder / "hold-write"
        wait_for(lambda: not daemon.socket().exists(), "the doors to close")
        assert daemon.process is not None
        wait_for(lambda: _late(daemon), "the drain to be given up", 5)
        gate.unlink()
        assert daemon.process.wait(20) == 0
        daemon.process = None
        gate.touch()
    assert lines(daemon, "stopped before all blocks were written")
    daemon.lose_memory()
    daemon.start()
    assert check(cache, first) == Counter(nvme=10)
    there = [key for key in second if cache.lookup([key]).length]
    assert len(there) < 60
    for key in there:
        check(cache, [key])


def _late(daemon: Daemon) -> bool:
    """Whether the time to drain is over: the workers have been told to end, and hang."""
    line = lines(daemon, "stopping")[-1]
    stamp = datetime.datetime.fromisoformat(line["timestamp"])
    age = datetime.datetime.now(datetime.UTC) - stamp
    return age.total_seconds() > 0.8


def broken_folder(daemon: Daemon) -> None:
    """Make the NVMe folder one that cannot be created."""
    (daemon.folder / "nvme").write_text("a file where the folder should be")


def test_a_disk_that_is_not_there_and_comes(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    broken_folder(daemon)
    daemon.start()
    (line,) = lines(daemon, "NVMe tier cannot be opened: DRAM only until it can")
    assert line["level"] == "error" and str(daemon.folder / "nvme") in line["problem"]
    cache = daemon.client().open(layout("disk"))
    keys = hashes(100, "disk")
    assert cache.put(keys, contents(keys, SIZE)).stored == 100
    assert check(cache, keys) == Counter(dram=100)
    stats = daemon.stats()
    assert stats.tiers.nvme.fenced is True
    assert stats.tiers.nvme.blocks == 0
    assert cache.client.verify() == (0, 0, 0)
    (daemon.folder / "nvme").unlink()
    wait_for(lambda: not daemon.stats().tiers.nvme.fenced, "the tier to come back", 15)
    assert lines(daemon, "NVMe tier works again")
    wait_for(lambda: daemon.stats().tiers.nvme.blocks == 100, "what is in memory to be written")
    daemon.stop()
    daemon.lose_memory()
    daemon.start()
    assert check(cache, keys) == Counter(nvme=100)


def test_a_disk_that_was_away_brings_its_blocks(make_daemon: MakeDaemon) -> None:
    """Blocks of an earlier run are found when the disk is there again, also those that have been
    stored anew meanwhile, once."""
    daemon = make_daemon().start()
    cache = daemon.client().open(layout("away"))
    keys = hashes(60, "away")
    cache.put(keys, contents(keys, SIZE))
    daemon.settled()
    daemon.stop()
    daemon.lose_memory()
    nvme, away = daemon.folder / "nvme", daemon.folder / "away"
    nvme.rename(away)
    broken_folder(daemon)
    daemon.start()
    assert cache.lookup(keys).length == 0
    assert cache.put(keys[:20], contents(keys[:20], SIZE)).stored == 20
    nvme.unlink()
    away.rename(nvme)
    wait_for(lambda: not daemon.stats().tiers.nvme.fenced, "the tier to come back", 15)
    assert cache.lookup(keys).length == 60
    assert check(cache, keys) == Counter(dram=20, nvme=40)
    assert daemon.settled().blocks.known == 60
    assert daemon.stats().tiers.nvme.corrupt == 0


def test_a_disk_that_is_too_small(make_daemon: MakeDaemon) -> None:
    """The files do not fit: the daemon serves from memory, says how much is missing, and takes the
    tier up when there is room."""
    daemon = make_daemon(nvme={"size": "32 MiB"})
    nvme = daemon.folder / "nvme"
    nvme.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(nvme)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        (nvme / "others").write_bytes(bytes(48 << 20))
        daemon.start()
        (line,) = lines(daemon, "NVMe tier cannot be opened: DRAM only until it can")
        assert "no room: wanted" in line["problem"]
        cache = daemon.client().open(layout("small"))
        keys = hashes(50, "small")
        assert cache.put(keys, contents(keys, SIZE)).stored == 50
        assert daemon.stats().tiers.nvme.fenced is True
        (nvme / "others").unlink()
        wait_for(lambda: not daemon.stats().tiers.nvme.fenced, "the tier to come back", 15)
        wait_for(lambda: daemon.stats().tiers.nvme.blocks == 50, "the blocks to be written")
        daemon.stop()
    finally:
        subprocess.run(["umount", "-l", str(nvme)], check=True)
        shutil.rmtree(nvme, ignore_errors=True)


def test_kill_and_start_again(make_daemon: MakeDaemon) -> None:
    """kill -9 in the middle of everything: what is served afterwards is right, or not there."""
    daemon = make_daemon(dram={"size": "8 MiB"}, nvme={"sync_interval": "50 ms"}).start()
    keys = hashes(300, "kill")
    client = daemon.client(timeout_s=2)
    client.open(layout("kill")).put(keys, contents(keys, SIZE), deadline_s=20)
    daemon.settled()
    more = hashes(100, "more")
    client.open(layout("kill")).put(more, contents(more, SIZE), deadline_s=0.05)
    daemon.kill()
    daemon.start()
    cache = client.open(layout("kill"))
    there = [key for key in keys + more if cache.lookup([key]).length]
    assert there, "nothing was found again"
    for start in range(0, len(there), 50):
        check(cache, there[start : start + 50])
    assert client.verify()[1] == 0
