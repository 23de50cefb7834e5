"""A whole host under systemd for tests: process 1 in namespaces, on a copy of this host's files.

What is written there is in memory and goes with it: units, users, folders. It takes root, and a
kernel that lets us make namespaces and overlays; elsewhere the tests are skipped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kvstored import until
from tests.systemd.manager import COMMAND_S, SYSTEMD, group, missing, need, not_tried

ROOT = Path(__file__).parent.parent.parent
NAMESPACES = ("--pid", "--mount", "--cgroup", "--uts", "--ipc")
VENV = Path("/opt/kvstore")
NO_HOST = "no host can be booted in namespaces here"
BOOT = r"""
set -e
echo $$ > "$GROUP/cgroup.procs"
exec unshare --fork --kill-child --pid --mount --cgroup --uts --ipc --propagation private sh -ec '
    mount -t tmpfs none "$SCRATCH"
    cd "$SCRATCH"
    mkdir up work root
    mount -t overlay overlay -o lowerdir=/,upperdir=up,workdir=work root
    cd root
    mount -t tmpfs -o mode=755 none run
    mount -t proc none proc
    mount --rbind /sys sys
    mount -t cgroup2 none sys/fs/cgroup
    mount --rbind /dev dev
    mount -t tmpfs -o mode=1777 none dev/shm
    mkdir -p var/lib/kvstore opt/source opt/site opt/python opt/kvstore
    mount --bind "$DISK" var/lib/kvstore
    mount --bind "$SOURCE" opt/source
    mount --bind "$SITE" opt/site
    mount --bind "$PYTHON" opt/python
    cp -R "$ENVIRONMENT/." opt/kvstore
    if ls opt/python/lib/libpython*.so* >/dev/null 2>&1; then
        echo /opt/python/lib > etc/ld.so.conf.d/000-test.conf
        chroot . /sbin/ldconfig
    fi
    printf "[Unit]\nDefaultDependencies=no\n" > etc/systemd/system/nothing.target
    exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        chroot . "$SYSTEMD" --system --unit=nothing.target --log-target=null'
"""


class Host:
    """The host that was booted."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command there, as root."""
        inside = ["nsenter", f"--target={self._pid}", *NAMESPACES, "--root", "--wd=/", *command]
        done = subprocess.run(
            inside,
            capture_output=True,
            text=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            timeout=COMMAND_S,
            check=False,
        )
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done

    def show(self, name: str) -> str:
        """A property of kvstored.service."""
        return self.run("systemctl", "show", "--property", name, "--value", "kvstored").stdout[:-1]

    def answers(self) -> bool:
        return self.run("systemctl", "show", "--property", "Version", check=False).returncode == 0


def _environment(folder: Path) -> None:
    """A virtual environment for VENV: that of the tests, where the service can see it."""
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site = folder / "lib" / name / "site-packages"
    site.mkdir(parents=True)
    (site / "kvstore.pth").write_text("/opt/source\n/opt/site\n")
    (folder / "pyvenv.cfg").write_text("home = /opt/python/bin\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(f"/opt/python/bin/{name}")
    for script, module in (("kvstore", "cli"), ("kvstored", "daemon")):
        path = folder / "bin" / script
        path.write_text(f"#!{VENV}/bin/python\nfrom kvstore.{module} import main\n\nmain()\n")
        path.chmod(0o755)


def _child(parent: int) -> int | None:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                return int(stat.parent.name)
    return None


@contextlib.contextmanager
def host() -> Iterator[Host]:
    """A booted host; all that runs there ends with it."""
    need("systemctl")
    if os.geteuid() != 0:
        missing("a host of its own for the tests takes root")
    folder = Path(tempfile.mkdtemp(prefix="kvsd-", dir="/tmp"))
    try:
        for name in ("scratch", "disk", "environment"):
            (folder / name).mkdir()
        _environment(folder / "environment")
        with group() as own, (folder / "said").open("wb") as said:
            if own is None:
                not_tried.add(NO_HOST)
                pytest.skip(f"{NO_HOST}: no control group can be made")
            process = subprocess.Popen(
                ["sh", "-c", BOOT],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={
                    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                    "GROUP": str(own),
                    "SYSTEMD": str(SYSTEMD),
                    "SCRATCH": str(folder / "scratch"),
                    "DISK": str(folder / "disk"),
                    "ENVIRONMENT": str(folder / "environment"),
                    "SOURCE": str(ROOT),
                    "SITE": sysconfig.get_path("purelib"),
                    "PYTHON": sys.base_prefix,
                },
            )
            try:
                yield _booted(process, folder / "said")
            finally:
                process.kill()  # and process 1 with it, and so all others there
                process.wait()
    finally:
        shutil.rmtree(folder)


def _booted(process: subprocess.Popen[bytes], said: Path) -> Host:
    found: list[Host] = []

    def up() -> bool:
        pid = _child(process.pid)
        # Only when it has become systemd: until then the manager of our own host would answer.
        if not found and pid is not None and _command(pid) == str(SYSTEMD):
            found.append(Host(pid))
        return process.poll() is not None or bool(found and found[0].answers())

    until(up)
    if process.poll() is not None:
        not_tried.add(NO_HOST)
        pytest.skip(f"{NO_HOST}: {' '.join(said.read_text().split())}")
    return found[0]


def _command(pid: int) -> str:
    """The first word of what a process was started as."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]
    return ""
