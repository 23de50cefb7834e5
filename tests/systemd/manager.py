"""A real systemd for tests, apart from that of the host: its own control group, folders and home.

Where there is no systemd to be had the tests are skipped, which is said aloud; with CI=true that is
a failure, because there the service must have been tried.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kvstored import ENVIRONMENT, until

SYSTEMD = Path("/lib/systemd/systemd")
not_tried: set[str] = set()  # reasons, for the end of the test run
COMMAND_S = 60.0

# A manager moves all processes of its control group, so it gets a group of its own; a namespace of
# mounts where that group is the root, and where systemd seems to have booted the host. A container
# that lets nobody do that has a group, and a folder /run, of its own already.
APART = """
set -e
if [ -z "$GROUP" ] || ! unshare --mount --cgroup true; then
    mkdir -p /run/systemd/system
    exec "$SYSTEMD" --user
fi
echo $$ > "$GROUP/cgroup.procs"
exec unshare --mount --cgroup --propagation private sh -ec '
    mount -t cgroup2 none /sys/fs/cgroup
    mkdir -p /run/systemd
    mount -t tmpfs none /run/systemd
    mkdir /run/systemd/system
    exec "$0" --user' "$SYSTEMD"
"""


def missing(reason: str) -> None:
    """End this test: nothing was tried."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"the service was not tried under systemd: {reason}")
    not_tried.add(reason)
    pytest.skip(reason)


def need(program: str) -> None:
    """Go on only where this program of systemd is installed."""
    if shutil.which(program) is None:
        missing(f"{program} is not installed: apt-get install systemd")


class UserManager:
    """`systemd --user` with a home of its own; kvstored in it writes its log to `log`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.runtime = folder / "run"
        self.log = folder / "log"
        self.results = folder / "results"
        self.unit = self.home / ".config/systemd/user/kvstored.service"
        self.runtime.mkdir(mode=0o700)
        self.home.mkdir()
        self.environment = {
            name: text for name, text in ENVIRONMENT.items() if not name.startswith("XDG_")
        }
        self.environment |= {"HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.runtime)}
        self.drop_in(
            "log",
            f"StandardError=append:{self.log}\nExecStopPost=/bin/sh -c "
            f"'echo $SERVICE_RESULT $EXIT_STATUS >> {self.results}'",
        )

    def drop_in(self, name: str, lines: str) -> None:
        """A drop-in of the service, as an operator would write it."""
        path = self.unit.with_name("kvstored.service.d") / f"{name}.conf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"[Service]\n{lines}\n")

    def kvstore(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run the command kvstore as this user."""
        return self._run(sys.executable, "-m", "kvstore.cli", *map(str, arguments))

    def systemctl(self, *arguments: str) -> str:
        """Run systemctl --user; what it printed."""
        done = self._run("systemctl", "--user", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, name: str) -> str:
        """A property of kvstored.service."""
        return self.systemctl("show", "--property", name, "--value", "kvstored")

    def main_pid(self) -> int:
        return int(self.show("MainPID"))

    def answers(self) -> bool:
        """Whether systemctl reaches the manager."""
        return self._run("systemctl", "--user", "show-environment").returncode == 0

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=COMMAND_S
        )


@contextlib.contextmanager
def user_manager() -> Iterator[UserManager]:
    """A started manager; all that it runs ends with it."""
    need("systemctl")
    if not SYSTEMD.exists():
        missing(f"{SYSTEMD} is not there: apt-get install systemd")
    if os.geteuid() != 0:
        missing("a service manager of its own for the tests takes root")
    folder = Path(tempfile.mkdtemp(prefix="kvsd-", dir="/tmp"))  # a socket's path must be short
    try:
        manager = UserManager(folder)
        with group() as own, (folder / "manager").open("wb") as said:
            process = subprocess.Popen(
                ["sh", "-c", APART],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=manager.environment | {"GROUP": str(own or ""), "SYSTEMD": str(SYSTEMD)},
            )
            try:
                until(lambda: process.poll() is not None or manager.answers())
                if process.poll() is not None:
                    missing(f"no manager starts here: {(folder / 'manager').read_text()}")
                yield manager
            finally:
                process.terminate()
                process.wait(COMMAND_S)
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def group() -> Iterator[Path | None]:
    """A control group below our own, which is gone afterwards with all that runs in it; None where
    this host lets us make none."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"]
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    ours = [line[3:].lstrip("/") for line in groups if line.startswith("0::")]
    made = roots[0] / ours[0] / f"kvstore-test-{os.getpid()}" if roots and ours else None
    try:
        if made is not None:
            made.mkdir()
    except OSError:
        made = None
    try:
        yield made
    finally:
        if made is not None:
            _remove(made)


def _remove(made: Path) -> None:
    with contextlib.suppress(OSError):  # kernels before 5.14 cannot; then all ended by themselves
        (made / "cgroup.kill").write_text("1")
    until(lambda: "populated 0" in (made / "cgroup.events").read_text())
    for below, _, _ in os.walk(made, topdown=False):
        Path(below).rmdir()
