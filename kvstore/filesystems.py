"""File systems: of which type one is, what room it has, and of hugetlbfs its pool of huge pages.

A file of hugetlbfs consists of whole pages of one size, which its mount decides. They come out of
a pool that root fills; write(2) does not work there, memory maps do.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import stat
from pathlib import Path

SYS = Path("/sys")
MOUNT = "mount -t hugetlbfs -o uid=USER,mode=0755 none FOLDER and set dram.path to it"
_MAGIC = 0x958458F6
_KINDS = {
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x794C7630: "overlay",
    0x6969: "nfs",
}
_STATFS_BYTES = 256  # struct statfs is smaller everywhere; it begins with type and block size
_WORD = ctypes.sizeof(ctypes.c_long)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True)
class Pool:
    """The pages of one size, in numbers of pages, of the host or of one node.

    `reserved` are free but promised to somebody; `spare` can be added when the pool is empty.
    """

    page_bytes: int
    total: int
    free: int
    reserved: int = 0
    spare: int = 0

    @property
    def available(self) -> int:
        """Pages that a new file can have."""
        return max(0, self.free - self.reserved) + self.spare

    def lack(self, size_bytes: int, available: int) -> str:
        """What to say, and to do, when so many pages are available for a file of this size."""
        wanted, size = -(-size_bytes // self.page_bytes), f"{self.page_bytes >> 10}kB"
        return (
            f"wanted {wanted} huge pages of {size}, available {available} ({self.free} free of "
            f"{self.total}, {self.reserved} reserved): as root, best at boot, echo "
            f"{self.total + max(0, wanted - available)} > "
            f"/sys/kernel/mm/hugepages/hugepages-{size}/nr_hugepages"
        )


def text_of(path: Path) -> str:
    """A small file of the kernel, empty when it is not there or not readable."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next((one for one in (path, *path.parents) if os.path.isdir(one)), Path("/"))


def room(path: Path) -> tuple[int, int]:
    """Bytes that the file system at `path` has in all, and free (our files there count as free).

    Looks at the nearest folder that exists; of hugetlbfs without a size, at its pool of pages.
    (0, 0) when the system does not say.
    """
    try:
        found = os.statvfs(nearest_folder(path))
        files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        held = sum(one.lstat().st_blocks * 512 for one in files)
    except OSError:
        return 0, 0
    if not found.f_blocks and (page := page_bytes(path)):
        pages = pool(page)
        return (pages.total + pages.spare) * page, pages.available * page + held
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize + held


def in_the_way(path: Path) -> Path | None:
    """What keeps this folder from being there or made: a part of its path that is no folder."""
    there = next((one for one in (path, *path.parents) if os.path.lexists(one)), None)
    try:
        return None if there is None or stat.S_ISDIR(there.stat().st_mode) else there
    except PermissionError:
        return None  # that cannot be told from here
    except OSError:
        return there


def kind(path: Path) -> str:
    """The type of the file system of a path, or of the nearest folder that exists."""
    magic, _ = _statfs(path)
    if magic == _MAGIC:
        return "hugetlbfs"
    return _KINDS.get(magic, f"a file system of type {magic:#x}")


def page_bytes(path: Path) -> int:
    """Bytes of a page of the hugetlbfs that holds a path (or its nearest folder); 0: it is none."""
    magic, block_bytes = _statfs(path)
    return block_bytes if magic == _MAGIC else 0


def pool(page_bytes: int, sys: Path = SYS) -> Pool:
    """The host's pool of pages of this size; an empty one when the kernel has none."""
    return _read(sys / "kernel/mm/hugepages" / f"hugepages-{page_bytes >> 10}kB", page_bytes)


def pools(sys: Path = SYS) -> list[Pool]:
    """Every pool of the host, small pages first."""
    return _all(sys / "kernel/mm/hugepages")


def pools_by_node(sys: Path = SYS) -> dict[int, list[Pool]]:
    """Every pool of each memory node; the kernel tells neither reserved nor spare pages here."""
    nodes = (sys / "devices/system/node").glob("node[0-9]*")
    found = {int(node.name.removeprefix("node")): _all(node / "hugepages") for node in nodes}
    return dict(sorted(found.items()))


def _all(folder: Path) -> list[Pool]:
    sizes = (
        int(one.name.removeprefix("hugepages-").removesuffix("kB")) << 10
        for one in folder.glob("hugepages-*kB")
    )
    return [_read(folder / f"hugepages-{size >> 10}kB", size) for size in sorted(sizes)]


def _read(folder: Path, page_bytes: int) -> Pool:
    counts = {
        name: _number(folder / f"{name}_hugepages")
        for name in ("nr", "free", "resv", "surplus", "nr_overcommit")
    }
    return Pool(
        page_bytes,
        counts["nr"],
        counts["free"],
        counts["resv"],
        max(0, counts["nr_overcommit"] - counts["surplus"]),
    )


def _number(path: Path) -> int:
    text = text_of(path)
    return int(text) if text.isdecimal() else 0


def _statfs(path: Path) -> tuple[int, int]:
    """Type and block size of a file system; zeros when it does not tell."""
    buffer = (ctypes.c_char * _STATFS_BYTES)()
    for one in (path, *path.parents):
        if not _libc.statfs(os.fsencode(one), ctypes.byref(buffer)):
            words = (buffer.raw[at : at + _WORD] for at in (0, _WORD))
            magic, block_bytes = (int.from_bytes(word, "little") for word in words)
            return magic, block_bytes
    return 0, 0
