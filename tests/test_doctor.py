"""The doctor: on this host it only tells the truth; on invented hosts it tells what is wrong."""

from __future__ import annotations

import errno
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore import config, doctor, filesystems, numa, paths
from kvstore.config import Config
from kvstore.doctor import Finding, Host
from kvstore.types import GIB, KIB, MIB

LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max open files            {files}                 1048576              files
Max locked memory         {locked}              unlimited            bytes
"""
THP = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
POOL = "sys/kernel/mm/hugepages/hugepages-2048kB"


@pytest.fixture
def small(tmp_path: Path) -> Config:
    """A configuration of one path of each kind below the test's folder."""
    (tmp_path / "disk").mkdir()
    return make(tmp_path)


def make(root: Path, **sections: Any) -> Config:
    tree: dict[str, Any] = {
        "daemon": {"run_dir": f"/tmp/kvd-{os.getpid()}"},
        "dram": {"path": str(root / "shm"), "size": "16 MiB"},
        "nvme": {"paths": [str(root / "disk")], "size": "16 MiB"},
    }
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys
    return config.parse(tree, {}, "test")


def node_memory(number: int, gib: int) -> str:
    kib = gib << 20
    return f"Node {number} MemTotal: {kib} kB\nNode {number} MemFree: {kib // 4} kB"


def host(root: Path, files: dict[str, str]) -> Host:
    """An invented host: a healthy one with these files changed ("": taken away)."""
    mounts = (
        f"20 1 0:1 / / rw - ext4 /dev/root rw\n21 20 0:2 / {root} rw - tmpfs tmpfs rw,huge=advise"
    )
    healthy = {
        "proc/sys/kernel/osrelease": "6.8.0-45-generic",
        "proc/self/limits": LIMITS.format(files="1048576", locked="unlimited"),
        "proc/self/mountinfo": mounts,
        "proc/meminfo": "MemTotal:       131072000 kB\nMemFree: 1 kB",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: H200",
        THP: "always within_size advise [never] deny force",
        "sys/devices/system/node/node0/meminfo": node_memory(0, 128),
        "sys/devices/system/node/node0/cpulist": "0-7",
    }
    for name, text in (healthy | files).items():
        if text or name not in files:
            path = root / "host" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    base = root / "host"
    return Host(proc=base / "proc", sys=base / "sys", dev=base / "dev")


NODE1 = {
    "sys/devices/system/node/node1/meminfo": node_memory(1, 64),
    "sys/devices/system/node/node1/cpulist": "8-15",
}


def find(findings: list[Finding], name: str) -> Finding:
    return next(one for one in findings if one.name.split()[0] == name)


# --- this host -----------------------------------------------------------------------------------


def test_every_check_runs_on_this_host(small: Config) -> None:
    findings = doctor.examine(small)
    names = [one.name for one in findings]
    assert len(set(names)) == len(names) >= 17
    for one in findings:
        assert one.status in ("ok", "warn", "fail")
        assert one.detail and "\n" not in one.detail + one.remedy
        assert one.status == "ok" or one.remedy, one
        assert "broke" not in one.detail, one
    for name in ("python", "nvme_space", "engine_posix", "run_dir", "sockets", "daemon"):
        assert find(findings, name).status == "ok", find(findings, name)


def test_it_leaves_nothing_behind(small: Config, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    descriptors = len(os.listdir("/proc/self/fd"))
    doctor.examine(small)
    assert sorted(tmp_path.rglob("*")) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert not small.daemon.run_dir.exists()


def test_the_defaults_are_examined() -> None:
    findings = doctor.examine(config.load(None, {}))
    assert not [one for one in findings if "broke" in one.detail]


def test_the_json_is_a_contract(small: Config) -> None:
    findings = [Finding("a", "ok", "fine"), Finding("b", "warn", "slow", "do this")]
    assert doctor.as_json(findings) == {
        "version": 1,
        "ok": True,
        "checks": [
            {"name": "a", "status": "ok", "detail": "fine", "remedy": ""},
            {"name": "b", "status": "warn", "detail": "slow", "remedy": "do this"},
        ],
    }
    assert doctor.as_json([*findings, Finding("c", "fail", "no", "stop")])["ok"] is False
    assert json.loads(json.dumps(doctor.as_json(doctor.examine(small))))["version"] == 1


def test_a_check_that_breaks_is_a_finding(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Config, host: Host) -> Finding:
        raise RuntimeError("a surprise")

    monkeypatch.setattr(doctor, "check_numa", broken)
    findings = doctor.examine(small)
    numa = find(findings, "numa")
    assert (numa.status, find(findings, "daemon").status) == ("fail", "ok")
    assert "numa" in numa.detail and "RuntimeError: a surprise" in numa.detail


# --- invented hosts ------------------------------------------------------------------------------


def test_a_healthy_host_has_nothing_to_do(small: Config, tmp_path: Path) -> None:
    for one in doctor.examine(small, host(tmp_path, {})):
        if one.name.split()[0] not in ("o_direct", "engine_gds"):  # these ask the real kernel
            assert (one.status, one.remedy) == ("ok", ""), one


@pytest.mark.parametrize(
    ("name", "files", "status", "words"),
    [
        ("kernel", {"proc/sys/kernel/osrelease": "5.13.0"}, "warn", ["5.13.0", "5.14"]),
        ("kernel", {"proc/sys/kernel/osrelease": "5.14.0-427.el9"}, "ok", ["5.14.0"]),
        ("kernel", {"proc/sys/kernel/osrelease": ""}, "warn", ["unknown release"]),
        (
            "memlock",
            {"proc/self/limits": LIMITS.format(files="9999", locked="8388608")},
            "warn",
            ["8 MiB", "16 MiB", "LimitMEMLOCK"],
        ),
        ("memlock", {"proc/self/limits": ""}, "warn", ["LimitMEMLOCK"]),
        (
            "open_files",
            {"proc/self/limits": LIMITS.format(files="1024", locked="unlimited")},
            "warn",
            ["1024 files", "LimitNOFILE=2304", "limits.sessions"],
        ),
        ("memory", {"proc/meminfo": "MemTotal: 16384 kB"}, "fail", ["of 16 MiB", "smaller"]),
        ("memory", {"proc/meminfo": "MemTotal: 18432 kB"}, "warn", ["lower dram.size"]),
        ("memory", {"proc/meminfo": ""}, "warn", ["does not say"]),
        (
            "tmpfs",
            {"proc/self/mountinfo": "2 1 0:1 / / rw - xfs x rw"},
            "warn",
            ["xfs", "/dev/shm"],
        ),
        (
            "shmem_hugepages",
            {THP: "always [deny] force"},
            "warn",
            ["deny", "echo never", "remount"],
        ),
        ("shmem_hugepages", {THP: "never deny [force]"}, "ok", ["force"]),
        ("shmem_hugepages", {THP: ""}, "warn", ["CONFIG_TRANSPARENT_HUGEPAGE"]),
        ("shmem_hugepages", {"proc/self/mountinfo": ""}, "ok", ["not used"]),
        ("numa", {}, "ok", ["1 memory node (0: 128 GiB, 32 GiB free)", "to the kernel"]),
        ("numa", {"sys/devices/system/node/node0/meminfo": ""}, "ok", ["0 memory nodes"]),
        ("numa", NODE1, "ok", ["2 memory nodes", "1: 64 GiB", '"auto" spreads', "over 0, 1"]),
        (
            "numa",
            NODE1 | {"proc/self/status": "Mems_allowed_list:\t1\n"},
            "warn",
            ["leaves them to the kernel", 'dram.numa = "auto"'],
        ),
        ("gpu", {"proc/driver/nvidia/gpus/1/information": "x"}, "ok", ["2 GPUs"]),
    ],
)
def test_what_a_host_lacks_is_named_with_the_remedy(
    small: Config, tmp_path: Path, name: str, files: dict[str, str], status: str, words: list[str]
) -> None:
    one = find(doctor.examine(small, host(tmp_path, files)), name)
    assert one.status == status, one
    assert all(word in f"{one.detail} {one.remedy}" for word in words), one


def test_a_mount_without_huge_pages(small: Config, tmp_path: Path) -> None:
    mounts = f"21 20 0:2 / {tmp_path} rw shared:2 - tmpfs tmpfs rw,size=24684096k"
    one = find(
        doctor.examine(small, host(tmp_path, {"proc/self/mountinfo": mounts})), "shmem_hugepages"
    )
    assert one.status == "warn"
    assert f"mount -o remount,huge=within_size {tmp_path}" in one.remedy


def test_the_nearest_mount_counts_also_with_odd_names(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    odd = f"{tmp_path}/a b".replace(" ", r"\040")
    mounts = "1 0 0:1 / / rw - ext4 d rw\n"
    mounts += f"2 1 0:2 / {odd} rw - tmpfs t rw\n3 1 0:3 / {odd}c rw - xfs d rw"
    one = find(
        doctor.examine(make(tmp_path / "a b"), host(tmp_path, {"proc/self/mountinfo": mounts})),
        "tmpfs",
    )
    assert one.detail.startswith(f"tmpfs at {tmp_path}/a b:"), one


def test_no_gpu_is_a_warning_and_devices_count_too(small: Config, tmp_path: Path) -> None:
    bare = Host(proc=tmp_path / "none", sys=tmp_path / "none", dev=tmp_path / "dev")
    findings = doctor.examine(small, bare)
    assert find(findings, "gpu").status == "warn"
    assert find(findings, "engine_gds").status == "ok"  # nothing to gain without a GPU
    assert not [one for one in findings if "broke" in one.detail]
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    (tmp_path / "dev" / "nvidiactl").touch()
    assert find(doctor.examine(small, bare), "gpu").detail == "1 GPU"


def made_up(root: Path, **dram: Any) -> Config:
    """A configuration that this host could not run: for invented ones."""
    tree: dict[str, Any] = {
        "daemon": {"run_dir": f"/tmp/kvd-{os.getpid()}"},
        "dram": {"path": str(root / "shm"), "size": "16 MiB"} | dram,
        "nvme": {"size": 0},
    }
    return Config.model_validate(tree)


def test_huge_pages_need_their_mount_and_their_pool(tmp_path: Path) -> None:
    asked = made_up(tmp_path, hugepages=True)
    one = find(doctor.examine(asked, host(tmp_path, {})), "hugetlb")
    assert (one.status, "hugetlbfs" in one.remedy) == ("fail", True)
    mounts = {
        "proc/self/mountinfo": f"1 0 0:1 / {tmp_path} rw - hugetlbfs h rw,mode=755,pagesize=2M\n"
        "2 0 0:2 / /tmp rw - tmpfs t rw"
    }
    pool = {f"{POOL}/nr_hugepages": "9", f"{POOL}/resv_hugepages": "2"}
    few = pool | {f"{POOL}/free_hugepages": "8"}
    one = find(doctor.examine(asked, host(tmp_path, mounts | few)), "hugetlb")
    assert one.status == "fail" and "6 of 9 pages of 2 MiB" in one.detail
    assert "wanted 8 huge pages of 2048kB, available 6 (8 free of 9, 2 reserved)" in one.remedy
    assert "echo 11 > " in one.remedy and "hugepages-2048kB/nr_hugepages" in one.remedy
    findings = doctor.examine(
        asked, host(tmp_path, mounts | few | {f"{POOL}/nr_overcommit_hugepages": "2"})
    )
    for name in ("hugetlb", "shmem_hugepages", "tmpfs", "slot_table"):
        assert find(findings, name).status == "ok", find(findings, name)
    assert not [one for one in findings if one.name.startswith(("o_direct", "nvme_space"))]
    disk = {"proc/self/mountinfo": mounts["proc/self/mountinfo"].replace("tmpfs", "ext4")}
    one = find(doctor.examine(asked, host(tmp_path, disk)), "slot_table")
    assert one.status == "warn" and "run_dir is on ext4" in one.detail and "/run" in one.remedy


def test_huge_pages_of_another_size_count_by_their_mount(tmp_path: Path) -> None:
    asked = made_up(tmp_path, hugepages=True, size="3 GiB")
    mounts = {
        "proc/self/mountinfo": f"1 0 0:1 / {tmp_path} rw - hugetlbfs h rw,pagesize=1G",
        "proc/meminfo": "MemTotal: 131072000 kB",
    }
    giant = POOL.replace("2048", "1048576")
    files = {f"{giant}/nr_hugepages": "2", f"{giant}/free_hugepages": "2"}
    one = find(doctor.examine(asked, host(tmp_path, mounts | files)), "hugetlb")
    assert one.status == "fail" and "wanted 3 huge pages of 1048576kB, available 2" in one.remedy


def test_each_node_needs_its_part_of_the_huge_pages(tmp_path: Path) -> None:
    mounts = {"proc/self/mountinfo": f"1 0 0:1 / {tmp_path} rw - hugetlbfs h rw,pagesize=2M"}
    node = "sys/devices/system/node/node{}/hugepages/hugepages-2048kB/{}_hugepages"
    files = {f"{POOL}/nr_hugepages": "8", f"{POOL}/free_hugepages": "8"}
    for number, count in ((0, "7"), (1, "1")):
        files |= {node.format(number, "nr"): count, node.format(number, "free"): count}
    findings = doctor.examine(
        made_up(tmp_path, hugepages=True), host(tmp_path, mounts | NODE1 | files)
    )
    one = find(findings, "hugetlb")
    assert one.status == "warn" and "node 1 has 1 of its part of 4 pages free" in one.detail
    assert "echo 4 > " in one.remedy and "node1/hugepages/hugepages-2048kB" in one.remedy
    alone = made_up(tmp_path, hugepages=True, numa="off")
    one = find(doctor.examine(alone, host(tmp_path, mounts | NODE1 | files)), "hugetlb")
    assert one.status == "ok" and "node 0: 7 free of 7, node 1: 1 free of 1" in one.detail


def test_a_pool_that_is_not_used_is_shown(small: Config, tmp_path: Path) -> None:
    files = {f"{POOL}/nr_hugepages": "7", f"{POOL}/free_hugepages": "5"}
    one = find(doctor.examine(small, host(tmp_path, files)), "hugetlb")
    assert one.status == "ok" and "off (5 of 7 pages of 2 MiB available)" in one.detail


def test_nodes_that_are_named_must_be_there_and_large_enough(tmp_path: Path) -> None:
    two = host(tmp_path, NODE1)
    one = find(doctor.examine(made_up(tmp_path, numa="off"), two), "numa")
    assert one.status == "warn" and 'dram.numa = "auto"' in one.remedy
    one = find(doctor.examine(made_up(tmp_path, numa="0,5"), two), "numa")
    assert one.status == "fail" and "node 5 has no memory" in one.detail
    one = find(doctor.examine(made_up(tmp_path, numa="1", size="65 GiB"), two), "numa")
    assert one.status == "warn" and "node 1 has less" in one.detail and "dram.size" in one.remedy
    one = find(doctor.examine(made_up(tmp_path, numa="1"), two), "numa")
    assert one.status == "ok" and "spreads the arena over 1" in one.detail


def test_a_kernel_that_takes_no_preference_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(numbers: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    asked = made_up(tmp_path, numa=str(numa.nodes()[0].number))
    monkeypatch.setattr(numa, "check", refuse)
    one = find(doctor.examine(asked), "numa")
    assert one.status == "warn" and "refuses: Operation not permitted" in one.detail
    assert "SystemCallFilter" in one.remedy


@pytest.mark.parametrize(
    ("total", "free", "status", "words"),
    [
        (8 * MIB, 8 * MIB, "fail", ["remount,size=80M", "lower dram.size"]),
        (GIB, 8 * MIB, "fail", ["8 MiB of 1 GiB free", "remove files"]),
        (GIB, 16 * MIB, "ok", ["16 MiB of 1 GiB free"]),
        (0, 0, "ok", ["dram.size 16 MiB"]),  # hugetlbfs says nothing
    ],
)
def test_the_tmpfs_must_hold_the_arena(
    small: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    total: int,
    free: int,
    status: str,
    words: list[str],
) -> None:
    monkeypatch.setattr(filesystems, "room", lambda path: (total, free))
    one = find(doctor.examine(small, host(tmp_path, {})), "tmpfs")
    assert one.status == status, one
    assert all(word in f"{one.detail} {one.remedy}" for word in words), one


def test_disks_too_full_or_silent(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "room", lambda path: (GIB, 16 * MIB - 1))
    one = find(doctor.examine(small), "nvme_space")
    assert one.status == "fail" and "lower nvme.size" in one.remedy
    monkeypatch.setattr(filesystems, "room", lambda path: (0, 0))
    assert find(doctor.examine(small), "nvme_space").status == "warn"


# --- direct I/O ----------------------------------------------------------------------------------


def refusing(real: Callable[..., int], flag: int, code: int) -> Callable[..., int]:
    """An os.open that refuses one flag."""

    def open_file(path: str | Path, flags: int, *mode: int) -> int:
        if flags & flag == flag:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *mode)

    return open_file


def test_a_file_system_without_o_direct_is_a_warning(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", refusing(os.open, os.O_DIRECT, errno.EINVAL))
    one = find(doctor.examine(small), "o_direct")
    assert one.status == "warn" and "refuses O_DIRECT" in one.detail and "xfs" in one.remedy


def test_a_file_system_without_nameless_files_is_tried_with_a_named_one(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = find(doctor.examine(small), "o_direct")
    monkeypatch.setattr(os, "open", refusing(os.open, os.O_TMPFILE, errno.EOPNOTSUPP))
    assert find(doctor.examine(small), "o_direct") == expected
    assert list(small.nvme.paths[0].iterdir()) == []


def test_a_folder_that_cannot_be_written(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", refusing(os.open, os.O_TMPFILE, errno.EACCES))
    one = find(doctor.examine(small), "o_direct")
    assert one.status == "fail" and "Permission denied" in one.detail and "nvme.paths" in one.remedy


@pytest.mark.parametrize(
    ("code", "status"), [(errno.EINVAL, "warn"), (errno.EIO, "fail"), (errno.ENOSPC, "fail")]
)
def test_direct_writes_that_fail(
    small: Config, monkeypatch: pytest.MonkeyPatch, code: int, status: str
) -> None:
    def pwritev(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwritev", pwritev)
    one = find(doctor.examine(small), "o_direct")
    assert one.status == status, one


def test_a_device_that_lies(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 4 * KIB)  # says so, and changes nothing
    one = find(doctor.examine(small), "o_direct")
    assert one.status == "fail" and "other bytes" in one.detail


# --- doors ---------------------------------------------------------------------------------------


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: sockets do not take long ones."""
    with tempfile.TemporaryDirectory(prefix="kvd-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_run_dir_that_is_a_file(tmp_path: Path, short: Path) -> None:
    asked = make(tmp_path, daemon={"run_dir": str(short / "f")})
    (short / "f").touch()  # a configuration that names it now is refused
    one = find(doctor.examine(asked), "run_dir")
    assert one.status == "fail" and "is not a folder" in one.detail


def test_folders_of_others(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    findings = doctor.examine(small)
    for name in ("run_dir", "tmpfs"):
        one = find(findings, name)
        assert one.status == "fail" and "give the daemon's user access" in one.remedy


def test_a_socket_path_too_long(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "SOCKET_PATH_BYTES_MAX", 10)
    one = find(doctor.examine(small), "sockets")
    assert one.status == "fail" and "shorter daemon.run_dir" in one.remedy


def test_a_daemon_that_runs_is_seen_and_one_that_died_too(tmp_path: Path, short: Path) -> None:
    asked = make(tmp_path, daemon={"run_dir": str(short)})
    (short / "default").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(short / "default" / paths.HATCH))
        assert "left over" in find(doctor.examine(asked), "daemon").detail
        server.listen()
        one = find(doctor.examine(asked), "daemon")
        assert (one.status, f"runs as process {os.getpid()} " in one.detail) == ("ok", True)
    assert "left over" in find(doctor.examine(asked), "daemon").detail


def test_a_daemon_behind_a_closed_door(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, words in ((PermissionError(13, "no"), "group"), (TimeoutError("late"), "log")):

        class Closed(socket.socket):
            failure = error

            def connect(self, address: Any) -> None:
                raise self.failure

        monkeypatch.setattr(socket, "socket", Closed)
        one = find(doctor.examine(small), "daemon")
        assert one.status == "warn" and words in one.remedy
        monkeypatch.undo()
