"""The daemon as the demonstration runs it: its folders, configuration, start, statistics, stop."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kvstore.client import connect
from kvstore.errors import Unavailable
from kvstore.paths import SOCKET_PATH_BYTES_MAX, socket_path
from kvstore.types import Stats
from tests.demo.profile import Profile, size_text

ROOT = Path(__file__).parents[2]
SHM = Path("/dev/shm")
START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 60.0
POLL_S = 0.05


class DemoFailed(Exception):
    """The demonstration cannot go on; the message is for the person who ran it.

    `log` is the file whose last lines say more, None for the daemon's.
    """

    def __init__(self, message: str, *, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


def environment() -> dict[str, str]:
    """Ours, without the overrides of the daemon's configuration that a user may have set."""
    return {name: text for name, text in os.environ.items() if not name.startswith("KVSTORE_")}


def tail(path: Path, lines: int = 25) -> str:
    """The last lines of a log."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return "\n".join(text.splitlines()[-lines:])


@contextlib.contextmanager
def workplace(profile: Profile, *, keep: bool) -> Iterator[tuple[Path, Path]]:
    """A new folder and a folder for the arena; both are removed at the end unless kept."""
    folder = Path(tempfile.mkdtemp(prefix="kvdemo-"))
    if len(os.fsencode(socket_path(root=folder / "run"))) > SOCKET_PATH_BYTES_MAX:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="kvdemo-", dir="/tmp"))
    arena = folder / "dram"
    if SHM.is_dir() and shutil.disk_usage(SHM).free > 2 * profile.dram_bytes:
        arena = SHM / folder.name
    try:
        arena.mkdir(mode=0o700)
        yield folder, arena
    finally:
        if not keep:
            shutil.rmtree(arena, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)


class Daemon:
    """At most one running kvstored over one folder; `start` and `stop` alternate."""

    def __init__(self, profile: Profile, folder: Path, arena: Path) -> None:
        self.socket = socket_path(root=folder / "run")
        self.log = folder / "kvstored.log"
        self._config = folder / "kvstored.toml"
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "run").mkdir(mode=0o755)
        (folder / "nvme").mkdir(mode=0o700)
        self._config.write_text(
            f'[daemon]\nrun_dir = "{folder / "run"}"\n\n'
            f'[dram]\nsize = "{size_text(profile.dram_bytes)}"\npath = "{arena}"\n\n'
            f'[nvme]\nsize = "{size_text(profile.nvme_bytes)}"\npaths = ["{folder / "nvme"}"]\n\n'
            '[metrics]\nlisten = ""\n'
        )

    def start(self) -> float:
        """Starts it and waits until it answers; the seconds that took."""
        assert self._process is None
        began = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvstore.daemon", "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(),
            )
        while True:
            try:
                self.stats()
                return time.monotonic() - began
            except Unavailable as error:
                code = self._process.poll()
                if code is not None:
                    raise DemoFailed(f"the daemon ended at its start with {code}") from error
                if time.monotonic() - began > START_DEADLINE_S:
                    raise DemoFailed(f"no answer within {START_DEADLINE_S:g} s: {error}") from error
            time.sleep(POLL_S)

    def stats(self) -> Stats:
        """What it says about itself, over a connection of its own."""
        with contextlib.closing(connect(path=str(self.socket), timeout_s=2.0)) as client:
            stats: Stats = client.stats()
            return stats

    def stop(self) -> int:
        """Asks it to drain and stop; its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"the daemon did not stop within {STOP_DEADLINE_S:g} s") from None
        self._process = None
        return code

    def kill(self) -> None:
        """Makes sure that none is left."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
