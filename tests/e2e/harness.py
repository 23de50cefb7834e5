"""A real daemon in a process of its own, and what its tests share: waiting, keys, contents."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kvstore import paths
from kvstore.client import Client, Layout, connect
from kvstore.errors import KVStoreError
from kvstore.types import Stats

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
START_S = 30.0
STOP_S = 30.0
POLL_S = 0.005
KIB, MIB = 1 << 10, 1 << 20
DOORS = {"hatch": paths.HATCH, "front": paths.FRONT_DOOR}
# What no daemon's log may say, whatever its clients do.
DEFECTS = ("defect", "Traceback", "Exception in callback", "was never retrieved", "AssertionError")

live: list[Daemon] = []  # for the log section of a failed test


def wait_for(condition: Callable[[], T | None], what: str, deadline_s: float = 10.0) -> T:
    """The first true value of a condition; fails the test when none comes in time."""
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {deadline_s:g} s for {what}"
        time.sleep(POLL_S)
    return found


def hashes(count: int, tag: str, *, start: int = 0, size: int = 32) -> list[bytes]:
    """Hashes of a chain of blocks; other tags give other chains."""
    return [
        hashlib.blake2b(f"{tag}/{at}".encode(), digest_size=size).digest()
        for at in range(start, start + count)
    ]


def content(hash: bytes, size: int) -> bytes:
    """The bytes that belong under a hash: no two hashes, and no two places of a block, agree."""
    return hashlib.shake_128(hash).digest(size)


def contents(keys: Sequence[bytes], size: int) -> list[bytes]:
    """`content` of each."""
    return [content(key, size) for key in keys]


def targets(count: int, size: int) -> list[bytearray]:
    """Buffers to get into, filled with what no test stores."""
    return [bytearray(b"\xee" * size) for _ in range(count)]


def layout(
    model: str, *, shard_bytes: int = 64 * KIB, shards: int = 1, dtype: str = "bfloat16"
) -> Layout:
    """A layout of the test `model`."""
    return Layout(
        model=model,
        engine="test/1",
        dtype=dtype,
        block_tokens=16,
        shards=shards,
        shard_bytes=shard_bytes,
    )


class Daemon:
    """One kvstored over folders of its own; it may be started and stopped repeatedly.

    `config` holds the sections of its file: change it between `stop` and `start`.
    """

    def __init__(self, **sections: dict[str, object]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kv", dir="/tmp"))
        self.arena = Path(tempfile.mkdtemp(prefix="kvtest-", dir="/dev/shm"))
        self.config: dict[str, dict[str, Any]] = {
            "daemon": {"run_dir": str(self.folder / "run")},
            "dram": {"size": "16 MiB", "path": str(self.arena)},
            "nvme": {"size": "64 MiB", "paths": [str(self.folder / "nvme")]},
            "metrics": {"listen": ""},
        }
        for name, values in sections.items():
            self.config.setdefault(name.replace("__", "."), {}).update(values)
        self.log_path = self.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.gated = False  # whether `hold` works: see tests.e2e.gated
        self.gpus: tuple[str, ...] = ()  # sizes of those it has, of host memory: tests.e2e.gpus
        self.times = 1.0  # as fast as the clock goes its life: see tests.e2e.fast
        self.forgiven: tuple[str, ...] = ()  # texts of DEFECTS that this test provokes
        self._clients: list[Client] = []
        live.append(self)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.dispose()

    # -- its life ------------------------------------------------------------------------------

    def write_config(self) -> Path:
        """Its configuration file, as `config` says now."""
        path = self.folder / "kvstored.toml"
        lines: list[str] = []
        for section, values in self.config.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        for device, size in enumerate(self.gpus):
            lines += ["[[hbm]]", f"device = {device}", f'size = "{size}"']
        path.write_text("\n".join(lines) + "\n")
        return path

    def spawn(self, **options: Any) -> subprocess.Popen[bytes]:
        """Start the process and do not wait for anything."""
        assert self.process is None
        config = self.write_config()
        module = ["tests.e2e.gated", str(self.folder)] if self.gated else ["kvstore.daemon"]
        if self.gpus:
            module = ["tests.e2e.gpus", str(self.folder)]
        if self.times != 1.0:
            module = ["tests.e2e.fast", str(self.times)]
        environ = {name: v for name, v in os.environ.items() if not name.startswith("KVSTORE_")}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *module, "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environ,
                **options,
            )
        return self.process

    def start(self, **options: Any) -> Daemon:
        """Start it and wait until it answers."""
        process = self.spawn(**options)

        def answers() -> bool:
            assert process.poll() is None, f"the daemon ended with {process.poll()}: {self.log()}"
            with contextlib.suppress(KVStoreError):
                connect(self.socket(), timeout_s=2.0).close()
                return True
            return False

        wait_for(answers, "the daemon to start", START_S)
        return self

    def stop(self) -> None:
        """SIGTERM; it must end with 0."""
        assert self.process is not None
        process, self.process = self.process, None
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"no end within {STOP_S:g} s of SIGTERM: {self.log()}") from None
        assert code == 0, f"the daemon ended with {code}: {self.log()}"

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        process, self.process = self.process, None
        process.kill()
        process.wait()

    def lose_memory(self) -> None:
        """Remove the arena and what is beside it, as a reboot does; the daemon must not run."""
        assert self.process is None
        for path in self.arena.glob("*/*"):
            path.unlink()

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """SIGSTOP at the beginning, SIGCONT at the end."""
        assert self.process is not None
        pid = self.process.pid
        self.signal(signal.SIGSTOP)
        try:
            wait_for(
                lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T",
                "the daemon to halt",
            )
            yield
        finally:
            self.signal(signal.SIGCONT)

    @contextlib.contextmanager
    def hold(self, what: str) -> Iterator[None]:
        """NVMe "read" or "write" operations that begin meanwhile end afterwards."""
        assert self.gated
        gate = self.folder / f"hold-{what}"
        gate.touch()
        try:
            yield
        finally:
            gate.unlink()

    def dispose(self) -> None:
        """End everything and remove every file; fails when the daemon's log tells of a defect."""
        for gate in self.folder.glob("hold-*"):
            gate.unlink()
        try:
            for client in self._clients:
                client.close()
            if self.process is not None:
                self.stop()
            found = [word for word in DEFECTS if word in self.log() and word not in self.forgiven]
            assert not found, f"{found} in the daemon's log: {self.log()}"
        finally:
            if self.process is not None:
                self.kill()
            live.remove(self)
            shutil.rmtree(self.arena, ignore_errors=True)
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- asking it -----------------------------------------------------------------------------

    def socket(self, door: str = "hatch", tenant: str = "default") -> Path:
        """A tenant's socket."""
        return Path(self.config["daemon"]["run_dir"]) / tenant / DOORS[door]

    def client(
        self, door: str = "hatch", *, tenant: str = "default", timeout_s: float = 5.0
    ) -> Client:
        """A new client, closed with the daemon."""
        client = connect(self.socket(door, tenant), timeout_s=timeout_s)
        self._clients.append(client)
        return client

    def log(self) -> str:
        """What it has said so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def stats(self, tenant: str = "default") -> Stats:
        """One tenant's statistics, over a connection of its own."""
        with connect(self.socket(tenant=tenant), timeout_s=5.0) as client:
            found: Stats = client.stats().tenants[tenant]
            return found

    def settled(self, tenant: str = "default") -> Stats:
        """The statistics once no move is under way, nothing is leased and nobody else connected."""

        def settled() -> Stats | None:
            stats = self.stats(tenant)
            quiet = not (stats.moves.spills or stats.moves.loads or stats.leases)
            return stats if quiet else None

        return wait_for(settled, "moves and leases to end")
