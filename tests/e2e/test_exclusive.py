"""One daemon per folder: a second one is refused before it has touched anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kvstore.errors import InvalidConfig
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import Daemon, contents, hashes, layout, targets

SIZE = 64 << 10
KEYS = hashes(10, "exclusive")


@pytest.fixture
def owner(make_daemon: MakeDaemon) -> Daemon:
    """A running daemon with ten blocks, which it serves to the end."""
    return make_daemon().start()


def refused(second: Daemon) -> str:
    """What a daemon says that does not start."""
    process = second.spawn()
    try:
        assert process.wait(20) == 1, second.log()
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"a second daemon runs: {second.log()}") from None
    finally:
        second.process = None
    lines = [line for line in second.log().splitlines() if line.startswith("kvstored: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("what", ["run_dir", "dram", "nvme"])
def test_two_daemons_on_one_folder(owner: Daemon, make_daemon: MakeDaemon, what: str) -> None:
    """Two daemons on the same NVMe files: the second said that the tier could not be opened, went
    on without it, and an operator lost half the cache unseen. It does not start now."""
    cache = owner.client().open(layout("exclusive"))
    cache.put(KEYS, contents(KEYS, SIZE))
    owner.settled()
    second = make_daemon()
    folder: Path
    if what == "run_dir":
        second.config["daemon"]["run_dir"] = owner.config["daemon"]["run_dir"]
        folder = owner.folder / "run" / "default"
    elif what == "dram":
        second.config["dram"]["path"] = owner.config["dram"]["path"]
        folder = owner.arena / "default"
    else:
        second.config["nvme"]["paths"] = owner.config["nvme"]["paths"]
        folder = owner.folder / "nvme" / "default"
    said = refused(second)
    assert str(folder) in said
    assert "stop" in said and "configure other" in said, said
    if what != "nvme":
        assert owner.process is not None
        assert f"process {owner.process.pid}" in said
    into = targets(10, SIZE)
    assert cache.get(KEYS, into).length == 10
    assert [bytes(one) for one in into] == contents(KEYS, SIZE)
    assert owner.client("front").open(cache.layout).lookup(KEYS).length == 10, "another socket"
    if what == "nvme":  # nothing was made anew on the disk either
        owner.stop()
        owner.lose_memory()
        owner.start()
        assert owner.client().open(cache.layout).lookup(KEYS).tiers["nvme"] == 10


def test_a_lock_dies_with_its_owner(owner: Daemon) -> None:
    owner.kill()
    owner.start()
    assert owner.stats().sessions == 1


def test_a_socket_path_too_long(make_daemon: MakeDaemon, door: str) -> None:
    daemon = make_daemon()
    long = daemon.folder / ("x" * 100)
    daemon.config["daemon"]["run_dir"] = str(long)
    process = daemon.spawn()
    assert process.wait(20) == 2
    daemon.process = None
    assert "Linux takes 107: choose a shorter daemon.run_dir" in daemon.log()
    with pytest.raises(InvalidConfig, match=r"has 1\d\d bytes, Linux takes 107: choose a shorter"):
        daemon.client(door)


def test_nvme_quota_of_less_than_a_slab_on_each_device(make_daemon: MakeDaemon) -> None:
    """A slab for two devices: the daemon ended with a traceback."""
    daemon = make_daemon(dram={"slab_size": "2 MiB"})
    folders = [str(daemon.folder / name) for name in "abc"]
    daemon.config["nvme"] = {"size": "5 MiB", "paths": folders}
    process = daemon.spawn()
    assert process.wait(20) in (1, 2)
    daemon.process = None
    assert "less than one slab of 2097152 bytes on each of 3 paths: raise nvme.size" in daemon.log()
