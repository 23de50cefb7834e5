"""One tenant, put together: arena, slot table, store, hands, service and its two doors."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import fcntl
import grp
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from kvstore import adoption, paths, sigbus
from kvstore.adoption import adopt as adopt_dram
from kvstore.busy_poll import BusyPoll
from kvstore.collaborators import NvmePlaces, ServiceInfo
from kvstore.config import Config
from kvstore.disk import Disk, DiskConfig, adopt
from kvstore.errors import AlreadyRunning, InvalidConfig
from kvstore.front_door import FrontDoor
from kvstore.hands import Door, Hands
from kvstore.hatch import Hatch
from kvstore.index import Index, Loaded
from kvstore.leases import Session
from kvstore.mover import Mover
from kvstore.orders import Move, Outcome
from kvstore.placement import PlacementConfig
from kvstore.policies import FAMILIES
from kvstore.processes import Processes
from kvstore.service import Service
from kvstore.store import Store
from kvstore.tiers.epochs import Epochs
from kvstore.tiers.hbm import Gpu, HbmArena
from kvstore.tiers.nvme import HEADER_BYTES
from kvstore.turns import Share, Turns
from kvstore.types import DRAM, NVME
from kvstore.ways import Ways, WaysConfig

INDEX_CLOSE_S = 10.0

log = structlog.get_logger()


class Tenant:
    """A tenant of the running daemon: create it on the event loop, `start` it, `stop` it."""

    _hatch: Hatch | None = None
    _front_door: FrontDoor | None = None

    def __init__(
        self,
        name: str,
        config: Config,
        generation: int,
        version: str,
        document: Callable[[], bytes],
        busy_poll: BusyPoll,
        turns: Turns,
    ) -> None:
        self.name = name
        self._config = config
        self._busy_poll = busy_poll
        self._turns = turns
        self._loop = asyncio.get_running_loop()
        self._gid = _gid(config.tenants[name].group)
        self._run_dir = config.daemon.run_dir / name
        folder = config.dram.path / name
        for path, mode in ((self._run_dir, 0o750), (folder, 0o750)):
            _make_folder(path, mode, self._gid)
        self._locks = [_lock(self._run_dir), _lock(folder)]
        slab_bytes, nvme_bytes = config.slab_bytes, _nvme_bytes(config, name)
        estate = adoption.take_over(
            folder,
            config.tenant_dram_bytes(name),
            slab_bytes,
            gid=self._gid,
            preallocate=config.dram.preallocate,
            nodes=config.memory_nodes(),
            tables=self._run_dir if config.dram.hugepages else None,
        )
        self._arena, self._table = estate.arena, estate.table
        self._guard: sigbus.Guard | None = None
        self._out_of_service = False
        self._watch_arena()
        self._gpus = _gpu_arenas(config, name)
        self.store = self._make_store(nvme_bytes)
        self._disk: Disk | None = None
        self._epochs = self._make_epochs(self._run_dir if config.dram.hugepages else folder)
        self._hands = Hands(self._table, estate.notes, self._epochs)
        info = ServiceInfo(
            name,
            version,
            generation,
            str(self._arena.path),
            self._arena.capacity_bytes,
            self._arena.inode,
            [(one.gpu.bus, one.capacity_bytes, one.handle) for one in self._gpus],
            epochs=(str(self._epochs.path), self._epochs.inode) if self._epochs else None,
        )
        self.service = Service(self.store, self._hands, info, document, config.limits.keys_per_call)
        self._mover = self._start_mover(nvme_bytes, slab_bytes)
        self._hands.mover = self._mover
        if self._disk is not None:
            self._open_disk(self._disk)
        self._processes = Processes(self._loop, estate.notes, self.service.unquarantine)
        if estate.adopted:
            self._processes.inherit(adopt_dram(self.store, estate, name, self._loop.time()))
            self.service.settle()
        self.service.doors = self

    def _make_store(self, nvme_bytes: int) -> Store:
        config = self._config
        placement = PlacementConfig(
            dram_bytes=self._arena.capacity_bytes,
            nvme_bytes=nvme_bytes,
            slab_bytes=config.slab_bytes,
            write_policy=config.nvme.write_policy,
            write_budget=config.nvme.write_budget,
            spread=len(config.nvme.paths),
            queue_depth=config.nvme.queue_depth,
            hang_s=config.nvme.hang_timeout,
            idle_s=config.eviction.idle_after,
            hbm_bytes=tuple(one.capacity_bytes for one in self._gpus),
        )
        bounds = config.bounds(self._arena.capacity_bytes)
        store = Store(placement, bounds, FAMILIES[config.eviction.policy]())
        if self._arena.capacity_bytes + config.slab_bytes <= config.dram.size:
            store.room.reasons[DRAM] = "quota"  # there would be more, for others
        if nvme_bytes + config.slab_bytes <= config.nvme.size:
            store.room.reasons[NVME] = "quota"
        return store

    def _make_epochs(self, folder: Path) -> Epochs | None:
        """Without them clients ask before every read."""
        try:
            return Epochs.create(folder / "epochs", self._arena.capacity_bytes, gid=self._gid)
        except OSError as error:
            log.warning("no epochs", tenant=self.name, problem=str(error))
            return None

    async def start(self) -> None:
        """Open the doors."""
        share = Share(
            self._loop, self._turns, lambda: self.store.limits, self.store.counters.limited
        )
        self._hatch = Hatch(
            self.service,
            self._processes,
            self._run_dir / paths.HATCH,
            gid=self._gid,
            busy_poll=self._busy_poll,
            share=share,
        )
        self.service.later = self._busy_poll.later
        self._front_door = FrontDoor(
            self.service,
            self._processes,
            self._run_dir / paths.FRONT_DOOR,
            gid=self._gid,
            share=share,
        )
        await self._front_door.start()

    def told(self) -> dict[str, Any]:
        """What the statistics say of its NVMe tier beside the store's own figures."""
        return self._ways.told() if self._ways is not None else {}

    def settle(self, caller: Session, numbers: Sequence[int]) -> int:
        """See Processes.settle."""
        return self._processes.settle(caller.number, numbers)

    def end(self, number: int) -> bool:
        """End a session and its connections; False when there is none of that number."""
        found = self._hatch is not None and self._hatch.end(number, "an operator ended it")
        return (self._front_door is not None and self._front_door.end(number)) or found

    def cut(self, number: int) -> None:
        """See Hatch.cut."""
        if self._hatch is not None:
            self._hatch.cut(number, "its session has ended")

    def reload(self, config: Config) -> None:
        """Take over what a running tenant can take over from a new configuration."""
        placement = self.store.placement
        placement.write_policy = config.nvme.write_policy
        placement.config = dataclasses.replace(
            placement.config,
            write_budget=config.nvme.write_budget,
            idle_s=config.eviction.idle_after,
        )
        self.store.holdings.set_limits(config.bounds(self._arena.capacity_bytes))
        self.service.keys_per_call = config.limits.keys_per_call

    def tick(self) -> None:
        """Called about twice a second."""
        if not self._out_of_service:
            self.service.tick()
            if self._damaged():
                self._give_up()

    def _watch_arena(self) -> None:
        try:
            self._guard = sigbus.guard(self._arena.address, self._arena.capacity_bytes)
        except OSError as error:
            log.warning(
                "a client that truncates its arena can end the daemon",
                tenant=self.name,
                problem=str(error),
            )

    def _damaged(self) -> bool:
        return self._arena.damaged() or (self._guard is not None and self._guard.hit)

    def _give_up(self) -> None:
        """A client has truncated the arena: nothing in it is served any more, nor adopted later.
        The tenant's blocks on NVMe are kept for the next start; other tenants notice nothing."""
        self._out_of_service = True
        if self._epochs is not None:
            self._epochs.end_all()  # to touch what has been cut off is a SIGBUS
        path = self._arena.path
        log.error("arena damaged: tenant out of service", tenant=self.name, path=str(path))
        self.service.refusal = (
            f"the arena {path} was truncated by one of its users: tenant {self.name} is out of "
            "service until kvstored is restarted"
        )
        self._mover.close(0)
        self._table.spoil()
        for session in list(self.store.sessions):
            self.end(session.number)

    async def stop(self, drain_s: float) -> None:
        """Shut the doors, write out what is due within the time given, close everything."""
        deadline = time.monotonic() + (0 if self._out_of_service else drain_s)
        if self._hatch is not None:
            self._hatch.close()
        if self._front_door is not None:
            await self._front_door.close()
        self.service.recording.close()
        self.store.save_all(self._loop.time())
        while not self.service.idle() and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self.service.clearing.close()
        left = self.store.placement.spills + self._mover.queued()
        clean = await asyncio.to_thread(self._close_disk)
        for gpu in self._gpus if clean else ():
            gpu.close()
        if left or not clean:
            log.warning("stopped before all blocks were written", tenant=self.name, left=left)
        self._table.close()
        if self._epochs is not None:
            self._epochs.close()
        if self._guard is not None:
            sigbus.unguard(self._guard)
        self._arena.close()
        for lock in self._locks:
            os.close(lock)

    def _close_disk(self) -> bool:
        clean, disk = self._mover.close(INDEX_CLOSE_S), self._disk
        if disk is not None and disk.index is not None:
            clean = disk.index.close(INDEX_CLOSE_S) and clean
        if disk is not None and clean:
            disk.close()
        if self._ways is not None and clean:
            self._ways.close()
        return clean

    def _start_mover(self, size_bytes: int, slab_bytes: int) -> Mover:
        config = self._config
        door = Door(self._loop, self.service.finished)

        def report(move: Move, outcome: Outcome, problem: str) -> None:
            """Whatever was read or written while the arena was damaged counts for nothing."""
            if not self._damaged():
                door.report(move, outcome, problem)

        self._ways: Ways | None = None
        if size_bytes:
            self._disk = Disk(
                DiskConfig(
                    tenant=self.name,
                    folders=tuple(path / self.name for path in config.nvme.paths),
                    size_bytes=size_bytes,
                    slab_bytes=slab_bytes,
                    sync_interval_s=config.nvme.sync_interval,
                    gid=self._gid,
                    faults=config.faults.plan,
                ),
                self._disk_opened,
            )
        return Mover(
            self._arena,
            self._disk,
            report,
            threads=config.nvme.threads,
            name=self.name,
            hbm=self._gpus,
            straight=lambda device: self._ways.to(device) if self._ways is not None else None,
        )

    def _open_disk(self, disk: Disk) -> None:
        try:
            disk.open()
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.EAGAIN):
                raise AlreadyRunning(
                    f"{error}: another daemon uses these files: stop it first, or configure other "
                    "nvme.paths"
                ) from None
            self.store.placement.health.fence(self._loop.time())
            self.service.tidings.unopened(str(error))
        self._choose_way(disk)

    def _disk_opened(self, index: Index, loaded: Loaded) -> None:
        """Files and index are open: at the start on the loop, later on a worker of the mover."""

        def take_over() -> None:
            self._hands.use_index(index)
            adopt(self.store, index, loaded, self.name, self._loop.time())

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._loop.call_soon_threadsafe(take_over)
            self._loop.call_soon_threadsafe(self._tell_clients)
        else:
            take_over()

    def _choose_way(self, disk: Disk) -> None:
        """Which way bytes go between the files and GPUs."""
        config = self._config
        self._ways = Ways(
            WaysConfig(
                tenant=self.name,
                engine=config.nvme.engine,
                sums=config.nvme.gds_sums,
                paths=disk.paths,
                size_bytes=disk.capacity_bytes,
                slab_bytes=config.slab_bytes,
            ),
            self._gpus,
        )
        if disk.files is None:
            return  # they are opened later, if they can be
        try:
            self._ways.choose()
        except OSError as error:
            raise InvalidConfig(f'nvme.engine = "{config.nvme.engine}": {error}') from None
        self._tell_clients()

    def _tell_clients(self) -> None:
        """Clients may read the files of the NVMe tier themselves: where they are."""
        assert self._disk is not None
        assert self._ways is not None
        if not self._ways.chosen:
            try:
                self._ways.choose(late=True)
            except OSError as error:
                log.error("no gds", tenant=self.name, problem=str(error))
        paths = list(map(str, self._disk.paths))
        config = self._config
        nvme = NvmePlaces(
            paths, config.slab_bytes, HEADER_BYTES, self._ways.engine, config.nvme.gds_sums
        )
        self.service.info = dataclasses.replace(self.service.info, nvme=nvme)


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


def _gpu_arenas(config: Config, name: str) -> list[HbmArena]:
    """The tenant's part of each device."""
    arenas: list[HbmArena] = []
    for device, size in config.tenant_hbm_bytes(name):
        try:
            arenas.append(HbmArena(open_gpu(device), size))
        except OSError as error:
            for arena in arenas:
                arena.close()
            problem = error.strerror or error
            raise InvalidConfig(
                f"[[hbm]] device {device}, {size} bytes for tenant {name}: {problem}"
            ) from None
    return arenas


def open_gpu(device: int) -> Gpu:
    """A CUDA device; CUDA is loaded here and not before."""
    from kvstore.tiers.cuda import CudaGpu

    return CudaGpu(device)


def _gid(group: str) -> int | None:
    return grp.getgrnam(group).gr_gid if group else None


def _make_folder(path: Path, mode: int, gid: int | None) -> None:
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # The link, too, where it is one: who made it can make it lead elsewhere.
        owners = {os.stat(path.parent).st_uid, os.lstat(path.parent).st_uid}
        if owners - {0, os.geteuid()}:
            raise InvalidConfig(
                f"folder {path.parent} belongs to another user, who could put other files in the "
                "place of ours: give it to the daemon's user, or choose another one"
            )
        path.mkdir(mode=mode, exist_ok=True)
        os.chown(path, -1, os.getegid() if gid is None else gid)  # also of one there before
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
    with contextlib.suppress(OSError):  # hugetlbfs takes no writes; the lock holds without a name
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
    return file
