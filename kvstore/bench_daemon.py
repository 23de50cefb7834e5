"""Private daemons for the benchmark: on temporary folders, watched from outside, removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kvstore.checksums import shard_sums
from kvstore.client import Client, connect
from kvstore.errors import InternalError, Unavailable
from kvstore.hands import describe
from kvstore.index import Index
from kvstore.tiers.nvme import NvmeFiles
from kvstore.types import Layout

START_TIMEOUT_S = 240.0  # a large arena is preallocated first
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class PrivateDaemon:
    """A running kvstored of our own."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self.process = process
        self.socket = socket

    def connect(self) -> Client:
        """A client of it, with all pages of its arena mapped."""
        client = connect(self.socket, timeout_s=30.0)
        if client.arena is not None:
            client.arena.wait_populated()
        return client

    def cpu_s(self) -> float:
        """CPU seconds that the daemon has used so far, all threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def resident_bytes(self) -> int:
        """Anonymous memory of the daemon: the arena and mapped files are not its own."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder on disk for one run; removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="kvs-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def private_daemon(
    folder: Path,
    *,
    dram_bytes: int,
    nvme_bytes: int,
    slab_bytes: int,
    policy: str | None = None,
    hbm: Mapping[int, int] | None = None,
    module: Sequence[str] = ("kvstore.daemon",),
) -> Iterator[PrivateDaemon]:
    """A daemon whose NVMe files lie in `folder`; they stay there, everything else goes. Evicts as
    it does by default, unless a policy is named.

    hbm     for each GPU the bytes that it has there
    module  what is run, as of `python -m`, and what comes before its own arguments
    """
    shm = Path(tempfile.mkdtemp(prefix="kvs-", dir="/dev/shm"))
    run = Path(tempfile.mkdtemp(prefix="kvs-", dir="/tmp"))
    config = folder / "kvstored.toml"
    config.write_text(
        f'[daemon]\nrun_dir = "{run}"\nlog_level = "warning"\n'
        f'[dram]\nsize = {dram_bytes}\npath = "{shm}"\nslab_size = {slab_bytes}\n'
        f'[nvme]\npaths = ["{folder}"]\nsize = {nvme_bytes}\n[metrics]\nlisten = ""\n'
        + (f'[eviction]\npolicy = "{policy}"\n' if policy else "")
        + "".join(
            f"[[hbm]]\ndevice = {device}\nsize = {size}\n" for device, size in (hbm or {}).items()
        )
    )
    process = subprocess.Popen([sys.executable, "-m", *module, "--config", str(config)])
    try:
        daemon = PrivateDaemon(process, run / "default" / "kvstore.sock")
        _wait_ready(daemon)
        yield daemon
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(shm, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)


def fill_index(folder: Path, layout: Layout, count: int, nvme_bytes: int, slab_bytes: int) -> None:
    """Put `count` blocks on the NVMe files of a daemon that is not running, with index and sums,
    laid out as it would have done itself."""
    tenant = folder / "default"
    tenant.mkdir(exist_ok=True)
    files = NvmeFiles.open([tenant], nvme_bytes, slab_bytes)
    index = Index(
        tenant,
        file_ids=files.file_ids,
        sync_interval_s=1.0,
        before_commit=files.sync,
        on_state=_tell,
    )
    index.load()
    index.put_layout(0, describe(layout))
    per_slab = slab_bytes // layout.slot_bytes
    payload = bytearray(per_slab * layout.slot_bytes)
    for first in range(0, count, per_slab):
        places = range(first, min(first + per_slab, count))
        base = first // per_slab * slab_bytes
        for at, number in enumerate(places):
            start = at * layout.slot_bytes
            payload[start : start + 8] = number.to_bytes(8, "little")
            block = memoryview(payload)[start : start + layout.block_bytes]
            key = number_hash(number)
            sums = shard_sums(layout.fingerprint, key, block, layout.shards, layout.shard_bytes)
            index.put(base + start, 0, number + 1, key, sums)
        files.write(base, memoryview(payload)[: len(places) * layout.slot_bytes])
    if not index.flush(300) or not index.close(60):
        raise InternalError("the benchmark's index could not be written: is the disk full?")
    files.close()


def number_hash(number: int) -> bytes:
    """A stable 32-byte block hash for the benchmark's n-th block."""
    return number.to_bytes(8, "little") * 4


def _tell(problem: str | None) -> None:
    sys.stderr.write(f"kvstore: the benchmark's index: {problem or 'works again'}\n")


def _wait_ready(daemon: PrivateDaemon) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            connect(daemon.socket, timeout_s=1.0).close()
            return
        except Unavailable:
            if daemon.process.poll() is not None:
                raise Unavailable(
                    f"a daemon of the benchmark has ended with {daemon.process.returncode}: see "
                    "what it says on stderr"
                ) from None
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
