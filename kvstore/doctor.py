"""This host's readiness for a configuration: small checks, each one finding and what to do.

It looks and tries, and leaves nothing behind. Printing is left to the command line.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import importlib.util
import mmap
import os
import platform
import re
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kvstore import filesystems, paths
from kvstore.config import Config
from kvstore.doctor_memory import (
    check_hugetlb,
    check_memory,
    check_numa,
    check_shmem_hugepages,
    check_slot_table,
    check_tmpfs,
)
from kvstore.errors import InvalidConfig, KVStoreError
from kvstore.filesystems import nearest_folder, text_of
from kvstore.findings import Finding, Host, in_mib
from kvstore.types import SLOT_ALIGNMENT

__all__ = ["Finding", "Host", "as_json", "examine"]

PYTHON_MIN = (3, 11)
KERNEL_MIN = (5, 14)  # MADV_POPULATE_WRITE
CONNECT_TIMEOUT_S = 0.5
UNLIMITED = 1 << 63
FILES_PER_SESSION = 2  # the connection, and a handle on its process
FILES_OF_OUR_OWN = 256  # doors, arenas, disks, index, logs, with room to spare


Check = Callable[[Config, Host], Finding]


def examine(config: Config, host: Host | None = None) -> list[Finding]:
    """Every check, in the order of reading. Raises nothing: a check that breaks is a finding."""
    host = host or Host()
    return [_guarded(name, check, config, host) for name, check in _checks(config)]


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """The answer of `kvstore doctor --json`; "ok" says that no check failed."""
    return {
        "version": 1,
        "ok": all(one.status != "fail" for one in findings),
        "checks": [dataclasses.asdict(one) for one in findings],
    }


def _checks(config: Config) -> Iterator[tuple[str, Check]]:
    yield "python", check_python
    yield "kernel", check_kernel
    yield "memlock", check_memlock
    yield "open_files", check_open_files
    yield "memory", check_memory
    yield "tmpfs", check_tmpfs
    yield "shmem_hugepages", check_shmem_hugepages
    yield "hugetlb", check_hugetlb
    if config.dram.hugepages:
        yield "slot_table", check_slot_table
    for path in config.nvme.paths if config.nvme.size else ():
        yield f"o_direct {path}", partial(check_o_direct, path=path)
        yield f"nvme_space {path}", partial(check_nvme_space, path=path)
    yield "engine_posix", check_engine_posix
    yield "engine_gds", check_engine_gds
    yield "gpu", check_gpu
    yield "numa", check_numa
    yield "run_dir", check_run_dir
    yield "sockets", check_sockets
    for tenant in config.tenants:
        yield f"daemon {tenant}", partial(check_daemon, tenant=tenant)


def _guarded(name: str, check: Check, config: Config, host: Host) -> Finding:
    try:
        return check(config, host)
    except Exception as error:  # whatever it is, the other checks must still be heard
        return Finding(
            name,
            "fail",
            f"the check {name} broke: {type(error).__name__}: {error}",
            "report this as a defect of kvstore; the other checks stand",
        )


# --- process and kernel --------------------------------------------------------------------------


def check_python(config: Config, host: Host) -> Finding:
    """The interpreter and the platform."""
    detail = (
        f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} "
    )
    detail += platform.machine()
    if sys.version_info[:2] < PYTHON_MIN:
        return Finding("python", "fail", detail, "install Python 3.11 or newer")
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        return Finding("python", "fail", detail, "run the daemon on 64-bit Linux")
    return Finding("python", "ok", detail)


def check_kernel(config: Config, host: Host) -> Finding:
    """A kernel that can fill the arena in parallel."""
    release = text_of(host.proc / "sys/kernel/osrelease")
    match = re.match(r"(\d+)\.(\d+)", release)
    detail = f"Linux {release or 'of unknown release'}"
    if match and (int(match[1]), int(match[2])) >= KERNEL_MIN:
        return Finding("kernel", "ok", detail)
    return Finding(
        "kernel",
        "warn",
        f"{detail}: MADV_POPULATE_WRITE needs 5.14",
        "use Linux 5.14 or newer; until then the first use of each page of the arena is slower",
    )


def check_memlock(config: Config, host: Host) -> Finding:
    """Whether a process may lock the arena in memory."""
    soft = _limit(host, "Max locked memory")
    need = config.dram.size
    if soft >= need:
        return Finding(
            "memlock", "ok", f"{_limit_text(soft, 'bytes')}, the arena is {in_mib(need)}"
        )
    return Finding(
        "memlock",
        "warn",
        f"{in_mib(soft)}, the arena is {in_mib(need)}: locking or registering it may be refused",
        "set LimitMEMLOCK=infinity in the unit, or memlock in /etc/security/limits.conf, for the "
        "daemon and for engines",
    )


def check_open_files(config: Config, host: Host) -> Finding:
    """Whether all sessions of all tenants have descriptors."""
    soft = _limit(host, "Max open files")
    need = FILES_OF_OUR_OWN + FILES_PER_SESSION * config.limits.sessions * len(config.tenants)
    detail = f"{_limit_text(soft, 'files')}, {need} are needed for every session that may open"
    if soft >= need:
        return Finding("open_files", "ok", detail)
    return Finding(
        "open_files",
        "warn",
        detail,
        f"set LimitNOFILE={need} in the unit, or lower limits.sessions",
    )


# --- disks and engines ---------------------------------------------------------------------------


def check_o_direct(config: Config, host: Host, path: Path) -> Finding:
    """O_DIRECT, by writing 4 KiB and reading them back in a file that nobody sees."""
    name, folder = f"o_direct {path}", nearest_folder(path)
    with mmap.mmap(-1, 2 * SLOT_ALIGNMENT) as memory:  # a mapping is aligned as O_DIRECT wants
        memory[:SLOT_ALIGNMENT] = os.urandom(SLOT_ALIGNMENT)
        try:
            file = _scratch(folder)
        except OSError as error:
            detail = f"{folder} cannot be written: {error.strerror}"
            return Finding(name, "fail", detail, "give the daemon's user access to nvme.paths")
        try:
            return _try_direct(name, folder, file, memory)
        finally:
            os.close(file)


def _try_direct(name: str, folder: Path, file: int, memory: mmap.mmap) -> Finding:
    remedy = "use a local ext4 or xfs; without O_DIRECT blocks pass through the page cache"
    with memoryview(memory) as view, view[:SLOT_ALIGNMENT] as sent, view[SLOT_ALIGNMENT:] as got:
        try:
            descriptor = os.open(f"/proc/self/fd/{file}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            detail = f"{folder} refuses O_DIRECT: {error.strerror}"
            return Finding(name, "warn", detail, remedy)
        try:
            moved = os.pwritev(descriptor, [sent], 0), os.preadv(descriptor, [got], 0)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return Finding(name, "warn", f"{folder} refuses direct I/O of 4 KiB", remedy)
            detail = f"{folder}: direct I/O failed: {error.strerror}"
            return Finding(name, "fail", detail, "free some space, or look into the kernel's log")
        finally:
            os.close(descriptor)
        if moved != (SLOT_ALIGNMENT, SLOT_ALIGNMENT) or sent != got:
            detail = f"{folder} gave back other bytes than were written"
            return Finding(name, "fail", detail, "do not use this device")
    return Finding(name, "ok", f"4 KiB written and read back directly in {folder}")


def _scratch(folder: Path) -> int:
    """An open file without a name in the folder."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise
    path = folder / f".kvstore-doctor-{os.getpid()}"
    file = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    return file


def check_nvme_space(config: Config, host: Host, path: Path) -> Finding:
    """Room for this path's part of the tier; files that are there already count as room."""
    name, need = f"nvme_space {path}", config.nvme.size // len(config.nvme.paths)
    total, free = filesystems.room(path)
    detail = f"{in_mib(free)} of {in_mib(total)} free for {in_mib(need)}"
    if not total:
        return Finding(name, "warn", "the file system does not say what it has", "check it by hand")
    if free < need:
        return Finding(
            name, "fail", detail, f"free some of {nearest_folder(path)}, or lower nvme.size"
        )
    return Finding(name, "ok", detail)


def check_engine_posix(config: Config, host: Host) -> Finding:
    """The engine that is always there."""
    return Finding("engine_posix", "ok", f"preadv and pwritev by {config.nvme.threads} threads")


def check_engine_gds(config: Config, host: Host) -> Finding:
    """What NVMe to GPU without the host would need. Imports and initialises nothing of CUDA."""
    missing = []
    if importlib.util.find_spec("kvikio") is None:
        missing.append("no kvikio")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        missing.append("no libcuda.so.1")
    if not (host.proc / "driver/nvidia-fs").exists():
        missing.append("no nvidia-fs in the kernel")
    if not missing:
        return Finding("engine_gds", "ok", "kvikio, libcuda.so.1 and nvidia-fs are there")
    way = "posix is used"
    if missing == ["no nvidia-fs in the kernel"]:
        way = 'with nvme.engine = "auto" cuFile\'s compatibility mode is measured against posix'
    detail = f"no GPUDirect Storage ({', '.join(missing)}): {way}"
    if not _gpus(host):
        return Finding("engine_gds", "ok", detail)
    remedy = "nothing must be done; for GDS install kvikio and load nvidia-fs"
    return Finding("engine_gds", "warn", detail, remedy)


def check_gpu(config: Config, host: Host) -> Finding:
    """GPUs as the driver shows them; no CUDA context is made."""
    count = _gpus(host)
    if count:
        return Finding("gpu", "ok", f"{count} GPU{'s' * (count > 1)}")
    detail = f"no driver in {host.proc}/driver/nvidia, no {host.dev}/nvidia0"
    return Finding("gpu", "warn", detail, "install the driver if engines shall use a GPU here")


# --- doors ---------------------------------------------------------------------------------------


def check_run_dir(config: Config, host: Host) -> Finding:
    """The folder of sockets can be made and written."""
    path = config.daemon.run_dir
    nearest = nearest_folder(path)
    if nearest != path and (path.exists() or path.is_symlink()):
        return Finding("run_dir", "fail", f"{path} is not a folder", "remove it, or set another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        remedy = f"give the daemon's user access to {nearest}, or set another daemon.run_dir"
        return Finding("run_dir", "fail", f"{nearest} cannot be written", remedy)
    state = "can be written" if nearest == path else f"can be made in {nearest}"
    return Finding("run_dir", "ok", f"{path} {state}")


def check_sockets(config: Config, host: Host) -> Finding:
    """Every socket's path is one that the kernel takes."""
    doors = [
        config.daemon.run_dir / name / door
        for name in config.tenants
        for door in (paths.HATCH, paths.FRONT_DOOR)
    ]
    try:
        for door in doors:
            paths.check_socket_path(door)
    except InvalidConfig as error:
        return Finding("sockets", "fail", str(error), "choose a shorter daemon.run_dir")
    longest = max(len(os.fsencode(door)) for door in doors)
    return Finding(
        "sockets", "ok", f"longest path {longest} bytes of {paths.SOCKET_PATH_BYTES_MAX}"
    )


def check_daemon(config: Config, host: Host, tenant: str) -> Finding:
    """Whether a daemon serves this tenant already; either answer is fine."""
    name, path = f"daemon {tenant}", config.daemon.run_dir / tenant / paths.HATCH
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as stream:
        stream.settimeout(CONNECT_TIMEOUT_S)
        try:
            stream.connect(str(path))
        except FileNotFoundError:
            return Finding(name, "ok", f"none runs: no {path}")
        except ConnectionRefusedError:
            return Finding(
                name, "ok", f"none runs: {path} is left over, the next start replaces it"
            )
        except PermissionError:
            remedy = f"run this as a member of the group of tenants.{tenant}"
            return Finding(name, "warn", f"{path} may not be opened by this user", remedy)
        except OSError as error:
            remedy = "see the daemon's log; restart it if it hangs"
            return Finding(name, "warn", f"{path} does not answer: {error}", remedy)
        peer = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid = struct.unpack("3i", peer)[0]
    return Finding(name, "ok", f"runs as process {pid} at {path}{_engine(path, tenant)}")


def _engine(path: Path, tenant: str) -> str:
    """Which way bytes go between NVMe and GPUs, as the running daemon has chosen it."""
    from kvstore.client import connect

    with contextlib.suppress(KVStoreError), connect(path, timeout_s=CONNECT_TIMEOUT_S) as client:
        nvme = client.stats()["tenants"][tenant]["tiers"]["nvme"]
        return f"; NVMe to GPU: {nvme['engine_why']}" if "engine_why" in nvme else ""
    return ""


# --- reading the host ----------------------------------------------------------------------------


def _limit(host: Host, name: str) -> int:
    """The soft limit of this process, 0 when it is not shown."""
    match = re.search(rf"^{name}\s+(\S+)", text_of(host.proc / "self/limits"), re.MULTILINE)
    if match is None:
        return 0
    return UNLIMITED if match[1] == "unlimited" else int(match[1])


def _limit_text(count: int, unit: str) -> str:
    if count >= UNLIMITED:
        return "unlimited"
    return in_mib(count) if unit == "bytes" else f"{count} {unit}"


def _gpus(host: Host) -> int:
    shown = len(list((host.proc / "driver/nvidia/gpus").glob("*")))
    return shown or len(list(host.dev.glob("nvidia[0-9]*")))
