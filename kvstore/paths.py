"""Where things are when nobody says: sockets, arenas, state, of the system and of a user."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvstore.errors import InvalidConfig

SYSTEM_RUN_DIR = Path("/run/kvstore")
RUN_DIR_VARIABLE = "KVSTORE_DAEMON_RUN_DIR"
HATCH = "kvstore.sock"
FRONT_DOOR = "grpc.sock"
TENANT_NAME = "[a-z0-9][a-z0-9_-]{0,31}"
TENANT_NAME_RULE = "use a letter or digit, then at most 31 of a-z, 0-9, _, -"
SOCKET_PATH_BYTES_MAX = 107  # sun_path of Linux, less its closing zero


def _system(path: str) -> bool:
    """Whether the system's folder is meant: by root, and by the user for whom it was made, which
    is the service's."""
    try:
        return os.geteuid() == 0 or os.lstat(path).st_uid == os.geteuid()
    except OSError:
        return False


def run_dir() -> Path:
    """The folder of sockets: what the daemon is told by $KVSTORE_DAEMON_RUN_DIR, the system's
    /run/kvstore, else under $XDG_RUNTIME_DIR."""
    if told := os.environ.get(RUN_DIR_VARIABLE):
        return Path(told)
    if _system(os.fspath(SYSTEM_RUN_DIR)):
        return SYSTEM_RUN_DIR
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "kvstore" if runtime else Path(f"/tmp/kvstore-{os.geteuid()}")


def state_dir() -> Path:
    """The folder of NVMe files: the system's /var/lib/kvstore, else under $XDG_STATE_HOME."""
    if _system("/var/lib/kvstore"):
        return Path("/var/lib/kvstore")
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "kvstore"


def shm_dir() -> Path:
    """The folder of arenas in tmpfs."""
    own = f"/dev/shm/kvstore-{os.geteuid()}"
    return Path("/dev/shm/kvstore" if _system("/dev/shm/kvstore") else own)


def socket_path(tenant: str = "default", *, root: Path | None = None, door: str = HATCH) -> Path:
    """The socket of a tenant: below `root`, or where it is when nobody says, which is the system's
    daemon where the user runs none."""
    if not isinstance(tenant, str) or not re.fullmatch(TENANT_NAME, tenant):
        raise InvalidConfig(f"{tenant!r} is no tenant's name: {TENANT_NAME_RULE}")
    own = (root or run_dir()) / tenant / door
    if root is not None or os.environ.get(RUN_DIR_VARIABLE) or own.exists():
        return own
    system = SYSTEM_RUN_DIR / tenant / door
    return system if system.exists() else own


def check_socket_path(path: Path) -> None:
    """Raises InvalidConfig when the kernel could not bind or connect to this path."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise InvalidConfig(
            f"socket path {path} has {length} bytes, Linux takes {SOCKET_PATH_BYTES_MAX}: "
            "choose a shorter daemon.run_dir"
        )
