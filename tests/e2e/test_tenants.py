"""Two tenants of one daemon: nothing of one is seen, used or thrown away by the other."""

from __future__ import annotations

import ctypes
import grp
import json
import mmap
import os
import platform
import socket
import stat
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.client import Cache
from kvstore.errors import ArenaGone, InvalidConfig, KVStoreError, Unavailable
from kvstore.protos import kvstore_pb2 as pb
from kvstore.tenant import _make_folder
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import KIB, MIB, Daemon, contents, hashes, layout, targets, wait_for
from tests.e2e.raw import RawHatch, stranger

SIZE = 64 * KIB
KEYS = hashes(6, "tenants")


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with Daemon(
        dram={"size": "16 MiB", "slab_size": "1 MiB"},
        tenants__default={"dram_quota": "75%"},
        tenants__guest={"dram_quota": "25%", "nvme_quota": "0"},
    ) as daemon:
        yield daemon.start()


@pytest.fixture
def daemon(running: Daemon) -> Daemon:
    """A daemon of two tenants, both empty."""
    for tenant in ("default", "guest"):
        with running.client(tenant=tenant) as client:
            client.clear()
        running.settled(tenant)
    return running


def test_equal_hashes_are_two_blocks(daemon: Daemon, door: str) -> None:
    caches = {
        tenant: daemon.client(door, tenant=tenant).open(layout("tenants"))
        for tenant in ("default", "guest")
    }
    caches["default"].put(KEYS, contents(KEYS, SIZE))
    assert caches["guest"].lookup(KEYS).length == 0
    assert caches["guest"].acquire(KEYS).length == 0
    assert caches["guest"].put(KEYS, [b"g" * SIZE] * 6).stored == 6
    into = targets(6, SIZE)
    assert caches["default"].get(KEYS, into).length == 6
    assert [bytes(one) for one in into] == contents(KEYS, SIZE)
    assert caches["guest"].get(KEYS, into).length == 6
    assert [bytes(one) for one in into] == [b"g" * SIZE] * 6
    assert caches["guest"].forget(KEYS[:1]) == 1
    assert caches["guest"].client.clear() == 5
    assert caches["default"].lookup(KEYS).length == 6


def test_a_tenant_evicts_its_own(daemon: Daemon, door: str) -> None:
    mine = daemon.client(door).open(layout("tenants"))
    guest = daemon.client(door, tenant="guest").open(layout("tenants"))
    mine.put(KEYS, contents(KEYS, SIZE))
    for number in range(5):
        flood = hashes(40, f"flood {number}")
        assert guest.put(flood, contents(flood, SIZE)).stored == 40
    assert mine.lookup(KEYS).tiers == {"dram": 6}
    stats = daemon.settled("guest")
    assert stats.tiers.dram.capacity_bytes == 4 * MIB
    assert stats.tiers.dram.blocks == 4 * MIB // SIZE
    assert stats.tiers.nvme.capacity_bytes == 0
    assert daemon.stats().tiers.dram.capacity_bytes == 12 * MIB
    assert "room" not in daemon.stats().tiers.dram.evicted


def test_statistics_are_the_tenants_own(daemon: Daemon, door: str) -> None:
    guest = daemon.client(door, tenant="guest")
    assert set(guest.stats().tenants) == {"guest"}
    before = guest.stats().tenants.guest.requests.lookup
    daemon.client(door).open(layout("tenants")).lookup(KEYS)
    assert guest.stats().tenants.guest.requests.lookup == before


def test_a_lease_of_the_other_tenant(daemon: Daemon, door: str) -> None:
    mine = daemon.client(door).open(layout("tenants"))
    mine.put(KEYS, contents(KEYS, SIZE))
    grant = mine.acquire(KEYS)
    other = stranger(daemon, door, tenant="guest")
    other.attach()
    assert not other.call(pb.RELEASE, pb.ReleaseRequest(lease=grant._lease)).held
    other.close()
    assert grant.release() is True


def test_files_are_the_tenants_own(daemon: Daemon) -> None:
    """The kernel decides who may connect and map; nobody but the daemon has the slot table."""
    for tenant in ("default", "guest"):
        for door in ("hatch", "front"):
            assert stat.S_IMODE(daemon.socket(door, tenant).stat().st_mode) == 0o660
        folder = daemon.arena / tenant
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
        assert stat.S_IMODE((folder / "arena").stat().st_mode) == 0o660
        assert stat.S_IMODE((folder / "slots").stat().st_mode) == 0o600


def test_a_tenant_that_is_not(daemon: Daemon, door: str) -> None:
    with pytest.raises(Unavailable, match=r"no daemon at .*/nobody/"):
        daemon.client(door, tenant="nobody")


# -- who is let in -----------------------------------------------------------------------------

STRANGER = 54_321  # a user of no name and no rights
CHILD_S = 30.0
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


# Of setgroups, setresgid, setresuid. The functions of these names look for other threads to tell,
# and crash in the child of a process that had some.
SYSCALLS = {"x86_64": (116, 119, 117), "aarch64": (159, 149, 147)}


def _become_a_stranger(groups: list[int]) -> None:
    """For a child that was just forked."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    set_groups, set_group, set_user = SYSCALLS[platform.machine()]
    numbers = (ctypes.c_uint32 * len(groups))(*groups)
    for number, *arguments in (
        (set_groups, len(groups), numbers),
        (set_group, STRANGER, STRANGER, STRANGER),
        (set_user, STRANGER, STRANGER, STRANGER),
    ):
        if call(number, *arguments):
            raise OSError(ctypes.get_errno(), "the user could not be changed")
    assert (os.getuid(), os.getgid(), os.getgroups()) == (STRANGER, STRANGER, groups)


def _outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return type(error).__name__
    return "done"


def _connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as plain:
        plain.connect(str(path))


def _map(path: Path) -> None:
    file = os.open(path, os.O_RDWR)
    with mmap.mmap(file, 0) as mapping:
        assert len(mapping)


def _attempts(daemon: Daemon, tenant: str) -> dict[str, Callable[[], object]]:
    """What somebody may try at a tenant, by name."""
    run, arena = daemon.socket("hatch", tenant).parent, daemon.arena / tenant
    nvme = Path(daemon.config["nvme"]["paths"][0]) / tenant
    return {
        "hatch": lambda: _connect(daemon.socket("hatch", tenant)),
        "front": lambda: _connect(daemon.socket("front", tenant)),
        "list sockets": lambda: os.listdir(run),
        "list arena": lambda: os.listdir(arena),
        "open arena": lambda: os.open(arena / "arena", os.O_RDONLY),
        "map arena": lambda: _map(arena / "arena"),
        "slots": lambda: os.open(arena / "slots", os.O_RDONLY),
        "notes": lambda: os.open(arena / "notes", os.O_RDONLY),
        "lock of sockets": lambda: os.open(run / "lock", os.O_RDONLY),
        "lock of arena": lambda: os.open(arena / "lock", os.O_RDONLY),
        "list nvme": lambda: os.listdir(nvme),
        "open nvme": lambda: os.open(nvme / "blocks.kv", os.O_RDONLY),
        "write nvme": lambda: os.open(nvme / "blocks.kv", os.O_RDWR),
        "lock of nvme": lambda: os.open(nvme / "blocks.lock", os.O_RDONLY),
        "remove arena": lambda: os.unlink(arena / "arena"),
        "another socket": lambda: os.mkfifo(run / "kvstore.new"),
    }


INSIDE = {"hatch", "front", "list sockets", "list arena", "open arena", "map arena", "open nvme"}


def _tried(daemon: Daemon, tenant: str, groups: list[int]) -> dict[str, str]:
    """How the attempts end for a user of these groups, in a process of its own."""
    attempts = _attempts(daemon, tenant)
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _become_a_stranger(groups)
            found = {name: _outcome(attempt) for name, attempt in attempts.items()}
            os.write(there, json.dumps(found).encode())
        except BaseException as error:  # the parent says it
            os.write(there, repr(error).encode())
        finally:
            os._exit(0)
    os.close(there)
    with open(here, "rb") as told:
        text = told.read()
    _, status = os.waitpid(child, 0)
    assert text, f"the child ended with {os.waitstatus_to_exitcode(status)}"
    outcomes: dict[str, str] = json.loads(text)
    return outcomes


@pytest.fixture(scope="module")
def grouped() -> Iterator[Daemon]:
    """A daemon of three tenants: one of nobody's group, two of groups of this host."""
    groups = [one.gr_name for one in grp.getgrall() if one.gr_gid not in (0, STRANGER)]
    with Daemon(
        dram={"size": "16 MiB", "slab_size": "1 MiB"},
        metrics={"listen": "127.0.0.1:0"},
        tenants__default={"dram_quota": "50%"},
        tenants__red={"group": groups[0]},
        tenants__blue={"group": groups[1]},
    ) as daemon:
        for folder in (daemon.folder, daemon.arena):
            folder.chmod(0o711)  # as /run and /dev/shm are
        yield daemon.start()


def _gid(daemon: Daemon, tenant: str) -> int:
    return grp.getgrnam(daemon.config[f"tenants.{tenant}"]["group"]).gr_gid


@needs_root
@pytest.mark.parametrize("tenant", ["red", "blue"])
def test_a_group_is_let_in_and_nobody_else(grouped: Daemon, tenant: str) -> None:
    own = _tried(grouped, tenant, [_gid(grouped, tenant)])
    assert {name for name, outcome in own.items() if outcome == "done"} == INSIDE, own
    assert {own[name] for name in own.keys() - INSIDE} == {"PermissionError"}, own
    other = _gid(grouped, "blue" if tenant == "red" else "red")
    for groups in ([], [other]):
        strange = _tried(grouped, tenant, groups)
        assert set(strange.values()) == {"PermissionError"}, strange
    assert set(_tried(grouped, "default", [other]).values()) == {"PermissionError"}


@needs_root
def test_a_user_of_the_group_is_served(grouped: Daemon) -> None:
    """Behind `connect` there is nothing more to pass: who may connect may use the tenant."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _become_a_stranger([_gid(grouped, "red")])
            with RawHatch(grouped.socket("hatch", "red")) as raw:
                status = 0 if raw.attach().tenant == "red" else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_page_of_metrics_is_the_operators(make_daemon: MakeDaemon) -> None:
    """It tells of all tenants, without a login: it listens where the operator says, not by
    tenant."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    daemon = make_daemon(
        metrics={"listen": f"127.0.0.1:{port}"},
        tenants__default={"dram_quota": "50%"},
        tenants__red={},
    )
    daemon.start()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text = page.read().decode()
    assert 'kvstore_sessions{tenant="red"}' in text
    assert 'kvstore_sessions{tenant="default"}' in text
    assert set(daemon.client(tenant="red").stats().tenants) == {"red"}


# -- an arena that one of its users truncates --------------------------------------------------


def _right(cache: Cache, keys: list[bytes]) -> int:
    """How many blocks are served; every byte of them is the right one."""
    into = targets(len(keys), SIZE)
    got = cache.get(keys, into, deadline_s=5.0).length
    assert [bytes(one) for one in into[:got]] == contents(keys[:got], SIZE)
    return int(got)


@pytest.mark.parametrize("then", ["cut", "grown again"])
def test_an_arena_that_is_truncated(make_daemon: MakeDaemon, then: str) -> None:
    """A user of one tenant truncated the arena while blocks were on their way to NVMe. Taking
    their checksums was a SIGBUS: the daemon died, and with it all other tenants. Now the map turns
    to zeros, nothing that was read there counts, and that tenant alone is out of service."""
    daemon = make_daemon(
        dram={"size": "32 MiB", "slab_size": "1 MiB"},
        tenants__default={"dram_quota": "25%"},
        tenants__guest={"dram_quota": "75%"},
    )
    daemon.gated = True
    daemon.start()
    mine = daemon.client().open(layout("tenants"))
    mine.put(KEYS, contents(KEYS, SIZE))
    guest = daemon.client(tenant="guest").open(layout("tenants"))
    saved, unsaved = hashes(40, "saved"), hashes(250, "unsaved")
    guest.put(saved, contents(saved, SIZE))
    wait_for(lambda: daemon.stats("guest").tiers.nvme.blocks == 40, "copies on NVMe")
    arena = daemon.arena / "guest" / "arena"
    size = arena.stat().st_size
    with daemon.hold("write"):
        assert guest.put(unsaved, contents(unsaved, SIZE)).stored == 250
        os.truncate(arena, 0)
        if then == "grown again":
            os.truncate(arena, size)
    wait_for(lambda: "tenant out of service" in daemon.log(), "the daemon to notice")
    assert _right(mine, KEYS) == 6
    assert mine.put(saved, contents(saved, SIZE)).stored == 40
    assert _right(mine, saved) == 40
    with pytest.raises(KVStoreError):
        guest.lookup(saved)
    with pytest.raises(ArenaGone, match=r"guest/arena was truncated .* until kvstored is restart"):
        daemon.client(tenant="guest")
    assert daemon.process is not None and daemon.process.poll() is None
    assert daemon.log().count("tenant out of service") == 1

    daemon.stop()
    daemon.start()
    assert _right(mine, KEYS) == 6
    back = daemon.client(tenant="guest").open(layout("tenants"))
    assert _right(back, saved) == 40, "what was on NVMe is lost"
    for one in unsaved:
        _right(back, [one])
    assert back.put(unsaved, contents(unsaved, SIZE)).refused == 0


@needs_root
def test_a_link_of_another_user_is_not_followed(tmp_path: Path) -> None:
    """He could make it lead elsewhere, and what it leads to was given our modes."""
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real")
    _make_folder(link / "mine", 0o750, None)
    os.lchown(link, STRANGER, STRANGER)
    with pytest.raises(InvalidConfig, match="belongs to another user"):
        _make_folder(link / "other", 0o750, None)
    assert not (tmp_path / "real" / "other").exists()
