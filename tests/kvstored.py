"""A real daemon for tests, in folders of its own, and blocks to put there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvstore.client import Cache, Client, Layout, connect
from kvstore.errors import Unavailable

DEADLINE_S = 30.0
BLOCK = 64 << 10
DRAM_BLOCKS = (6 << 20) // BLOCK  # of tenant default: the other has the rest
ENVIRONMENT = {
    name: text
    for name, text in os.environ.items()
    if not name.startswith("KVSTORE_") and name not in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE")
}


class Kvstored:
    """A daemon of the tests; `start` and `stop` alternate."""

    def __init__(self, folder: Path, arena: Path, listen: str = "") -> None:
        self.nvme = folder / "nvme"
        self.run_dir = folder / "run"
        self.config = folder / "kvstored.toml"
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "log"
        self.config.write_text(
            f'[daemon]\nrun_dir = "{self.run_dir}"\n[dram]\nsize = "8 MiB"\npath = "{arena}"\n'
            f'[nvme]\nsize = "64 MiB"\npaths = ["{self.nvme}"]\n[metrics]\nlisten = "{listen}"\n'
            '[tenants.default]\ndram_quota = "75%"\nnvme_quota = "75%"\n[tenants.other]\n'
        )

    def socket(self, tenant: str = "default") -> Path:
        return self.run_dir / tenant / "kvstore.sock"

    def start(self) -> None:
        """Returns when it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvstore.daemon", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=ENVIRONMENT,
            )
        until(self._answers)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(DEADLINE_S)
            finally:
                self._process.kill()
                self._process.wait()
                self._process = None

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self._log.read_text()
        try:
            connect(self.socket("other")).close()  # the last to open its doors
        except Unavailable:
            return False
        return True


@contextlib.contextmanager
def running(listen: str = "") -> Iterator[Kvstored]:
    """A started daemon in new folders, which go with it."""
    folder = Path(tempfile.mkdtemp(prefix="kvcli-", dir="/tmp"))  # a socket's path must be short
    arena = Path(tempfile.mkdtemp(prefix="kvcli-", dir="/dev/shm"))
    daemon = Kvstored(folder, arena, listen)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.stop()
        shutil.rmtree(arena)
        shutil.rmtree(folder)


def until(done: Callable[[], bool]) -> None:
    """Wait for another process."""
    end = time.monotonic() + DEADLINE_S
    while not done():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def layout(model: str) -> Layout:
    return Layout(model=model, engine="e/1", dtype="bf16", block_tokens=16, shard_bytes=BLOCK)


def layout_json(model: str) -> str:
    fields = {"model": model, "engine": "e/1", "dtype": "bf16", "block_tokens": 16}
    return json.dumps(fields | {"shards": 1, "shard_bytes": BLOCK})


def hashes(count: int) -> list[bytes]:
    return [at.to_bytes(16, "big") for at in range(1, count + 1)]


def content(of: bytes) -> bytes:
    """A block's bytes: no page of them is like one of another block."""
    return of * (BLOCK // len(of))


def fill(client: Client, model: str, count: int) -> Cache:
    """Put blocks, and wait until they are on NVMe too."""
    cache = client.open(layout(model))
    names = hashes(count)
    answer = cache.put(names, [content(name) for name in names], deadline_s=DEADLINE_S)
    assert answer.stored == count
    until(lambda: client.stats().tenants.default.tiers.nvme.blocks == count)
    return cache


def press(client: Client, model: str) -> None:
    """Put twice as many blocks as DRAM holds."""
    names = hashes(2 * DRAM_BLOCKS)
    cache = client.open(layout(model))
    stored = cache.put(names, [content(name) for name in names], deadline_s=DEADLINE_S)
    assert stored.stored == len(names)
