"""One tenant, put together: arena, slot table, store, hands, service and its two doors."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import fcntl
import grp
import os
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from kvstore import paths
from kvstore.busy_poll import BusyPoll
from kvstore.config import Config
from kvstore.disk import Disk, DiskConfig, adopt
from kvstore.errors import AlreadyRunning, InvalidConfig
from kvstore.eviction.base import Policy
from kvstore.eviction.lru import LRU
from kvstore.front_door import FrontDoor
from kvstore.hands import Door, Hands
from kvstore.hatch import Hatch
from kvstore.index import Index, Loaded
from kvstore.mover import Mover
from kvstore.placement import PlacementConfig
from kvstore.service import Service, ServiceInfo
from kvstore.store import Limits, Store
from kvstore.tiers.dram import DramArena
from kvstore.tiers.slot_table import SlotTable

ARENA = "arena"
SLOT_TABLE = "slots"
INDEX_CLOSE_S = 10.0
POLICIES: dict[str, Callable[[], Policy]] = {"lru": LRU}

log = structlog.get_logger()


class Tenant:
    """A tenant of the running daemon: create it on the event loop, `start` it, `stop` it."""

    def __init__(
        self,
        name: str,
        config: Config,
        generation: int,
        version: str,
        document: Callable[[], bytes],
        busy_poll: BusyPoll,
    ) -> None:
        self.name = name
        self._config = config
        self._busy_poll = busy_poll
        self._loop = asyncio.get_running_loop()
        self._gid = _gid(config.tenants[name].group)
        self._run_dir = config.daemon.run_dir / name
        folder = config.dram.path / name
        for path, mode in ((self._run_dir, 0o750), (folder, 0o750)):
            _make_folder(path, mode, self._gid)
        self._locks = [_lock(self._run_dir), _lock(folder)]
        slab_bytes, nvme_bytes = config.slab_bytes, _nvme_bytes(config, name)
        self._arena = DramArena.create(
            folder / ARENA,
            config.tenant_dram_bytes(name),
            gid=self._gid,
            preallocate=config.dram.preallocate,
        )
        self._table = SlotTable.create(
            folder / SLOT_TABLE, self._arena.capacity_bytes, self._arena.inode, slab_bytes
        )
        self.store = Store(
            PlacementConfig(
                dram_bytes=self._arena.capacity_bytes,
                nvme_bytes=nvme_bytes,
                slab_bytes=slab_bytes,
                write_policy=config.nvme.write_policy,
                write_budget=config.nvme.write_budget,
                spread=len(config.nvme.paths),
                queue_depth=config.nvme.queue_depth,
            ),
            _limits(config),
            POLICIES[config.eviction.effective_policy],
        )
        self._disk: Disk | None = None
        self._mover: Mover | None = None
        self._hands = Hands(self._table)
        info = ServiceInfo(
            name,
            version,
            generation,
            str(self._arena.path),
            self._arena.capacity_bytes,
            self._arena.inode,
        )
        self.service = Service(self.store, self._hands, info, document, config.limits.keys_per_call)
        if nvme_bytes:
            self._open_disk(nvme_bytes, slab_bytes)
        self._hatch: Hatch | None = None
        self._front_door: FrontDoor | None = None

    async def start(self) -> None:
        """Open the doors."""
        self._hatch = Hatch(
            self.service,
            self._run_dir / paths.HATCH,
            gid=self._gid,
            busy_poll=self._busy_poll,
        )
        self._front_door = FrontDoor(self.service, self._run_dir / paths.FRONT_DOOR, gid=self._gid)
        await self._front_door.start()

    def reload(self, config: Config) -> None:
        """Take over what a running tenant can take over from a new configuration."""
        placement = self.store.placement
        placement.write_policy = config.nvme.write_policy
        placement.config = dataclasses.replace(
            placement.config, write_budget=config.nvme.write_budget
        )
        self.store.limits = _limits(config)
        self.store.sessions.leases_max = config.limits.leases_per_session
        self.service.keys_per_call = config.limits.keys_per_call

    async def stop(self, drain_s: float) -> None:
        """Shut the doors, write out what is due within the time given, close everything."""
        deadline = time.monotonic() + drain_s
        if self._hatch is not None:
            self._hatch.close()
        if self._front_door is not None:
            await self._front_door.close()
        self.store.save_all(self._loop.time())
        while not self.service.idle() and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        left = self.store.placement.spills
        clean = True
        if self._mover is not None and self._disk is not None:
            left += self._mover.queued()
            clean = await asyncio.to_thread(self._close_disk, self._mover, self._disk)
        if left or not clean:
            log.warning("stopped before all blocks were written", tenant=self.name, left=left)
        self._table.close()
        self._arena.close()
        for lock in self._locks:
            os.close(lock)

    def _close_disk(self, mover: Mover, disk: Disk) -> bool:
        clean = mover.close(INDEX_CLOSE_S)
        if disk.index is not None:
            clean = disk.index.close(INDEX_CLOSE_S) and clean
        if clean:
            disk.close()
        return clean

    def _open_disk(self, size_bytes: int, slab_bytes: int) -> None:
        config = self._config
        door = Door(self._loop, self.service.finished)
        self._disk = Disk(
            DiskConfig(
                tenant=self.name,
                folders=tuple(path / self.name for path in config.nvme.paths),
                size_bytes=size_bytes,
                slab_bytes=slab_bytes,
                sync_interval_s=config.nvme.sync_interval,
            ),
            self._disk_opened,
        )
        self._mover = Mover(
            self._arena, self._disk, door.report, threads=config.nvme.threads, name=self.name
        )
        self._hands.mover = self._mover
        try:
            self._disk.open()
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.EAGAIN):
                raise AlreadyRunning(
                    f"{error}: another daemon uses these files: stop it first, or configure other "
                    "nvme.paths"
                ) from None
            log.error(
                "NVMe tier cannot be opened: DRAM only until it can",
                tenant=self.name,
                problem=str(error),
            )
            self.store.placement.health.fence(self._loop.time())

    def _disk_opened(self, index: Index, loaded: Loaded) -> None:
        """Files and index are open: at the start on the loop, later on a worker of the mover."""

        def take_over() -> None:
            self._hands.use_index(index)
            adopt(self.store, index, loaded, self.name, self._loop.time())

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._loop.call_soon_threadsafe(take_over)
        else:
            take_over()


def _nvme_bytes(config: Config, name: str) -> int:
    """The tenant's quota of NVMe, in whole slabs on each device."""
    quota = config.tenant_nvme_bytes(name)
    row = config.slab_bytes * len(config.nvme.paths)
    if 0 < quota < row:
        raise InvalidConfig(
            f"tenant {name} has {quota} bytes of NVMe, less than one slab of {config.slab_bytes} "
            f"bytes on each of {len(config.nvme.paths)} paths: raise nvme.size or its nvme_quota, "
            'or set that to "0"'
        )
    return quota // row * row if row else 0


def _limits(config: Config) -> Limits:
    limits = config.limits
    return Limits(limits.leases_per_session, limits.sessions, limits.layouts)


def _gid(group: str) -> int | None:
    return grp.getgrnam(group).gr_gid if group else None


def _make_folder(path: Path, mode: int, gid: int | None) -> None:
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.mkdir(mode=mode, exist_ok=True)
        if gid is not None:
            os.chown(path, -1, gid)
            os.chmod(path, mode)
    except OSError as error:
        raise InvalidConfig(
            f"folder {path} cannot be made ready: {error.strerror}: give the daemon's user access, "
            "or choose another one"
        ) from None


def _lock(folder: Path) -> int:
    """Own a folder for as long as the descriptor is open."""
    path = folder / "lock"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InvalidConfig(
            f"{path} cannot be opened: {error.strerror}: give the daemon's user access"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, 32, 0).decode(errors="replace").strip()
        os.close(file)
        raise AlreadyRunning(
            f"{folder} belongs to a running daemon (process {holder or 'unknown'}): stop it, or "
            "configure other folders"
        ) from None
    os.ftruncate(file, 0)
    os.pwrite(file, str(os.getpid()).encode(), 0)
    return file
