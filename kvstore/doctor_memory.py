"""The doctor's checks of memory: room for the arena, huge pages, and the nodes that it lies on."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from kvstore import filesystems, numa
from kvstore.config import Config
from kvstore.filesystems import Pool, nearest_folder, text_of
from kvstore.findings import Finding, Host, in_mib, mount_of
from kvstore.types import KIB, MIB
from kvstore.units import format_size

SHMEM_ENABLED = "kernel/mm/transparent_hugepage/shmem_enabled"
PAGE_BYTES = 2 * MIB  # of a huge page, where the mount does not tell


def check_memory(config: Config, host: Host) -> Finding:
    """The arena against the memory of the host."""
    match = re.search(r"^MemTotal:\s*(\d+) kB", text_of(host.proc / "meminfo"), re.MULTILINE)
    if match is None:
        return Finding("memory", "warn", "the kernel does not say how much there is", "mount /proc")
    total = int(match[1]) * KIB
    detail = f"dram.size {in_mib(config.dram.size)} of {in_mib(total)} memory"
    if config.dram.size >= total:
        return Finding("memory", "fail", detail, "choose a smaller dram.size")
    if config.dram.size > total * 8 // 10:
        return Finding("memory", "warn", detail, "leave engines a fifth: lower dram.size")
    return Finding("memory", "ok", detail)


def check_tmpfs(config: Config, host: Host) -> Finding:
    """The file system of the arena: of memory, large enough, and ours to write."""
    path, need = config.dram.path, config.dram.size
    kind, mount, _ = mount_of(host, path)
    nearest = nearest_folder(path)
    total, free = filesystems.room(path) if kind != "hugetlbfs" else (0, 0)  # see check_hugetlb
    detail = f"{kind} at {mount}: {in_mib(free)} of {in_mib(total)} free for dram.size "
    detail = (detail if kind != "hugetlbfs" else f"{kind} at {mount} for dram.size ") + in_mib(need)
    if not os.access(nearest, os.W_OK | os.X_OK):
        remedy = f"give the daemon's user access to {nearest}, or set another dram.path"
        return Finding("tmpfs", "fail", f"{detail}; {path} cannot be written", remedy)
    if 0 < total < need or (total and free < need):
        remedy = f"mount -o remount,size={need // MIB + 64}M {mount}, or lower dram.size"
        if total >= need:
            remedy = f"remove files from {mount}, or lower dram.size"
        return Finding("tmpfs", "fail", detail, remedy)
    if kind not in ("tmpfs", "hugetlbfs"):
        remedy = "set dram.path to a folder in /dev/shm: on a disk every write costs an I/O"
        return Finding("tmpfs", "warn", detail, remedy)
    return Finding("tmpfs", "ok", detail)


def check_shmem_hugepages(config: Config, host: Host) -> Finding:
    """Transparent huge pages for the arena.

    The mount's option huge= decides; shmem_enabled is only its master switch (deny, force).
    """
    name = "shmem_hugepages"
    kind, mount, options = mount_of(host, config.dram.path)
    if config.dram.hugepages or kind != "tmpfs":
        return Finding(name, "ok", f"not used: the arena is on {kind}")
    match = re.search(r"\[(\w+)\]", text_of(host.sys / SHMEM_ENABLED))
    switch = match[1] if match else "unknown"
    huge = next((one[5:] for one in options if one.startswith("huge=")), "never")
    detail = f"{mount} is mounted with huge={huge}, shmem_enabled is {switch}"
    if switch == "force" or (huge != "never" and switch not in ("deny", "unknown")):
        return Finding(name, "ok", detail)
    remedy = f"mount -o remount,huge=within_size {mount}: larger pages copy faster"
    if switch == "deny":
        remedy = (
            f"echo never > {host.sys / SHMEM_ENABLED} ('deny' forbids every mount), then {remedy}"
        )
    if switch == "unknown":
        remedy = "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE: larger pages copy faster"
    return Finding(name, "warn", detail, remedy)


# --- huge pages that are set aside ---------------------------------------------------------------


def check_hugetlb(config: Config, host: Host) -> Finding:
    """The pool of huge pages, when the arena shall come from it."""
    name = "hugetlb"
    if not config.dram.hugepages:
        known = "; ".join(_pool_text(host, one) for one in _pools(host) if one.total)
        return Finding(name, "ok", f"not used: dram.hugepages is off{known and f' ({known})'}")
    kind, mount, options = mount_of(host, config.dram.path)
    if kind != "hugetlbfs":
        detail = f"{config.dram.path} is on {kind} at {mount}"
        return Finding(name, "fail", detail, filesystems.MOUNT)
    pool = filesystems.pool(_page_bytes(options), host.sys)
    need, held = config.dram.size, _held(config.dram.path)
    available = pool.available + held // pool.page_bytes
    detail = f"{_pool_text(host, pool)}, {in_mib(held)} in use here, for {in_mib(need)}"
    if available * pool.page_bytes < need:
        return Finding(name, "fail", detail, pool.lack(need, available))
    return _by_node(config, host, pool, held, Finding(name, "ok", detail))


def _by_node(config: Config, host: Host, pool: Pool, held: int, found: Finding) -> Finding:
    """What was found, unless a node that the arena is to be spread over has too few pages."""
    nodes = _chosen(config, host)
    by_node = filesystems.pools_by_node(host.sys)
    part = -(-config.dram.size // pool.page_bytes // max(1, len(nodes)))
    for node in nodes if held < config.dram.size else ():
        free = sum(one.free for one in by_node.get(node, ()) if one.page_bytes == pool.page_bytes)
        if free < part:
            setting = f"hugepages-{pool.page_bytes // KIB}kB/nr_hugepages"
            remedy = f"echo {part} > {host.sys}/devices/system/node/node{node}/hugepages/{setting}"
            detail = f"{found.detail}; node {node} has {free} of its part of {part} pages free"
            return Finding(found.name, "warn", detail, f"{remedy}: else other nodes give them")
    return found


def check_slot_table(config: Config, host: Host) -> Finding:
    """Where the slot table of an arena in hugetlbfs lies: written at every hit, so in memory."""
    kind, mount, _ = mount_of(host, config.daemon.run_dir)
    detail = f"daemon.run_dir is on {kind} at {mount}, and has the slot table of huge pages"
    if kind in ("tmpfs", "ramfs"):
        return Finding("slot_table", "ok", detail)
    return Finding("slot_table", "warn", detail, "set daemon.run_dir to a folder in /run")


def _page_bytes(options: Sequence[str]) -> int:
    """Of a mount of hugetlbfs, as its options tell."""
    match = re.search(r"(?:^|,)pagesize=(\d+)([KMG])", ",".join(options))
    return int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]] if match else PAGE_BYTES


def _pools(host: Host) -> list[Pool]:
    return filesystems.pools(host.sys)


def _pool_text(host: Host, pool: Pool) -> str:
    text = f"{pool.available} of {pool.total} pages of {format_size(pool.page_bytes)} available"
    by_node = filesystems.pools_by_node(host.sys)
    parts = [
        f"node {node}: {one.free} free of {one.total}"
        for node, pools in by_node.items()
        for one in pools
        if one.page_bytes == pool.page_bytes
    ]
    return f"{text}, {', '.join(parts)}" if len(parts) > 1 else text


def _held(path: Path) -> int:
    return sum(
        os.lstat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(path)
        for name in names
    )


# --- nodes ---------------------------------------------------------------------------------------


def check_numa(config: Config, host: Host) -> Finding:
    """Memory nodes, and which of them the arena is spread over: a remote one is slower."""
    nodes = numa.nodes(host.sys)
    sizes = "; ".join(
        f"{one.number}: {in_mib(one.total_bytes)}, {in_mib(one.free_bytes)} free" for one in nodes
    )
    detail = f"{len(nodes)} memory node{'s' * (len(nodes) != 1)}{sizes and f' ({sizes})'}"
    try:
        chosen = config.memory_nodes(host.sys, host.proc)
    except ValueError as error:
        return Finding("numa", "fail", f"{detail}; {error}", 'set dram.numa = "auto"')
    detail += f'; dram.numa = "{config.dram.numa}" '
    if not chosen:
        detail += "leaves them to the kernel"
        if len(nodes) < 2:
            return Finding("numa", "ok", detail)
        remedy = 'set dram.numa = "auto": the kernel takes memory near whoever touches it first'
        return Finding("numa", "warn", detail, remedy)
    detail += f"spreads the arena over {', '.join(map(str, chosen))}"
    part = config.dram.size // len(chosen)
    small = [one for one in nodes if one.number in chosen and one.total_bytes < part]
    if small:
        detail += f", whose part is {in_mib(part)}: node {small[0].number} has less"
        return Finding("numa", "warn", detail, "lower dram.size, or name more nodes in dram.numa")
    try:
        if host.sys == numa.SYS:  # not of another host
            numa.check(chosen)
    except OSError as error:
        detail += f", which the kernel refuses: {error.strerror}"
        remedy = "let the daemon use mbind and set_mempolicy (SystemCallFilter=, seccomp profile)"
        return Finding("numa", "warn", detail, f'{remedy}, or set dram.numa = "off"')
    return Finding("numa", "ok", detail)


def _chosen(config: Config, host: Host) -> tuple[int, ...]:
    try:
        return config.memory_nodes(host.sys, host.proc)
    except ValueError:
        return ()  # check_numa says so
