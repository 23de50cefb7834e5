"""What the values of a configuration, each right by itself, cannot be together or on this host."""

from __future__ import annotations

import grp
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvstore import filesystems, paths
from kvstore.errors import InvalidConfig
from kvstore.types import MIB
from kvstore.units import format_size

if TYPE_CHECKING:
    from kvstore.config import Config

DRAM_BYTES_MIN = 8 * MIB

Trouble = tuple[str, str, str]  # dotted key, value, "what is wrong: what to do"


def impossible(config: Config) -> Iterator[Trouble]:
    """What each value alone does not show: sizes against the host and each other, names."""
    dram, nvme, slab = config.dram, config.nvme, config.slab_bytes
    size = format_size(dram.size)
    if dram.size < DRAM_BYTES_MIN:
        yield "dram.size", size, f"is too small: give at least {format_size(DRAM_BYTES_MIN)}"
    elif 2 * slab > dram.size:
        yield "dram.slab_size", format_size(slab), f"two are more than dram.size {size}: give less"
    yield from _impossible_folders(config)
    yield from _impossible_memory(config)
    if nvme.size and not nvme.paths:
        yield "nvme.paths", "[]", 'no folder for the NVMe tier: name one, or set nvme.size = "0"'
    elif 0 < nvme.size < 2 * slab:
        wrong = f"is under two slabs of {format_size(slab)}: give more, or 0"
        yield "nvme.size", format_size(nvme.size), wrong
    for key, whole, part, path in config.places():
        if 0 < (most := filesystems.room(path)[0]) < part and not filesystems.page_bytes(path):
            wrong = f"{path} can hold {most // MIB} MiB in all: give less, or enlarge it"
            yield key, format_size(whole), wrong
    yield from _impossible_hbm(config)
    if config.metrics.address and config.metrics.address[1] > 65_535:
        yield "metrics.listen", config.metrics.listen, "no such port: give one of 1 to 65535"
    for name, tenant in config.tenants.items():
        if not re.fullmatch(paths.TENANT_NAME, name):
            wrong = f"is no tenant's name: {paths.TENANT_NAME_RULE}"
            yield f"tenants.{name}", repr(name), wrong
        try:
            paths.check_socket_path(config.daemon.run_dir / name / paths.HATCH)  # the longer name
        except InvalidConfig as error:
            yield "daemon.run_dir", f"'{config.daemon.run_dir}'", str(error)
        try:
            if tenant.group:
                grp.getgrnam(tenant.group)
        except (KeyError, ValueError):
            wrong = "no such group on this host: create it with groupadd, or name another"
            yield f"tenants.{name}.group", repr(tenant.group), wrong
    yield from _impossible_quotas(config, "dram", dram.size)
    yield from _impossible_quotas(config, "nvme", nvme.size)


def _impossible_folders(config: Config) -> Iterator[Trouble]:
    """Folders that nobody can make, because a file is where one of them is to be."""
    for key, path in (("daemon.run_dir", config.daemon.run_dir), ("dram.path", config.dram.path)):
        if (there := filesystems.in_the_way(path)) is not None:
            yield key, f"'{path}'", f"{there} is no folder: name one that is, or can be made"


def _impossible_hbm(config: Config) -> Iterator[Trouble]:
    slab, tenants = config.slab_bytes, len(config.tenants)
    for at, one in enumerate(config.hbm):
        if one.device in [other.device for other in config.hbm[:at]]:
            yield f"hbm.{at}.device", str(one.device), "is there twice: give each device one table"
        if 0 < one.size < tenants * slab:
            wrong = (
                f"is less than a slab of {format_size(slab)} for each of {tenants} tenants: "
                "give more, or 0"
            )
            yield f"hbm.{at}.size", format_size(one.size), wrong


def _impossible_memory(config: Config) -> Iterator[Trouble]:
    """Where the arena is to lie, and whether that is there."""
    dram, page = config.dram, filesystems.page_bytes(config.dram.path)
    if dram.hugepages and not page:
        wrong = f"dram.path = '{dram.path}' is on {filesystems.kind(dram.path)}, not on hugetlbfs: "
        yield "dram.hugepages", "true", f"{wrong}{filesystems.MOUNT}, or set it to false"
    elif page and not dram.hugepages:
        wrong = "is on hugetlbfs: set dram.hugepages = true, or choose a folder in /dev/shm"
        yield "dram.path", f"'{dram.path}'", wrong
    elif page and (most := filesystems.room(dram.path)[0]) < (size := max(dram.size, page)):
        yield "dram.size", format_size(dram.size), filesystems.pool(page).lack(size, most // page)
    try:
        config.memory_nodes()
    except ValueError as error:
        yield "dram.numa", repr(dram.numa), str(error)


def _impossible_quotas(config: Config, tier: str, total: int) -> Iterator[Trouble]:
    quotas = config.quotas(tier)
    given = {name: quota for name, quota in quotas.items() if quota}
    if sum(quota.of(total) for quota in given.values()) > total:
        keys = " + ".join(f"tenants.{name}.{tier}_quota" for name in given)
        values = " + ".join(quota.text for quota in given.values())
        yield keys, values, f"together more than 100 % of {format_size(total)}: lower one"
        return
    for name, count in config.quota_bytes(tier, total).items() if total else ():
        quota, unit = quotas[name], format_size(config._unit(tier))
        # A tenant may do without NVMe, but only when its quota says so.
        if not count and not (tier == "nvme" and quota and not quota.of(total)):
            wrong = f"is less than one slab of {unit}: raise it, or lower the other tenants' quotas"
            yield f"tenants.{name}.{tier}_quota", quota.text if quota else "not set", wrong
