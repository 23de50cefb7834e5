"""Where things are when nobody says: sockets, arenas, state, for root and for everyone else."""

from __future__ import annotations

import os
from pathlib import Path

from kvstore.errors import InvalidConfig

HATCH = "kvstore.sock"
FRONT_DOOR = "grpc.sock"
SOCKET_PATH_BYTES_MAX = 107  # sun_path of Linux, less its closing zero


def run_dir() -> Path:
    """The folder of sockets: /run/kvstore for root, else under $XDG_RUNTIME_DIR."""
    if os.geteuid() == 0:
        return Path("/run/kvstore")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "kvstore" if runtime else Path(f"/tmp/kvstore-{os.geteuid()}")


def state_dir() -> Path:
    """The folder of NVMe files: /var/lib/kvstore for root, else under $XDG_STATE_HOME."""
    if os.geteuid() == 0:
        return Path("/var/lib/kvstore")
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "kvstore"


def shm_dir() -> Path:
    """The folder of arenas in tmpfs."""
    return Path("/dev/shm/kvstore" if os.geteuid() == 0 else f"/dev/shm/kvstore-{os.geteuid()}")


def socket_path(tenant: str = "default", *, root: Path | None = None, door: str = HATCH) -> Path:
    """The socket of a tenant."""
    return (root or run_dir()) / tenant / door


def check_socket_path(path: Path) -> None:
    """Raises InvalidConfig when the kernel could not bind or connect to this path."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise InvalidConfig(
            f"socket path {path} has {length} bytes, Linux takes {SOCKET_PATH_BYTES_MAX}: "
            "choose a shorter daemon.run_dir"
        )
