"""Memory nodes: which there are, which of them an arena shall use, and asking the kernel for them.

Preferences only: where a node is full, another one gives the page. A page that is refused would
end a process, this one or somebody's engine; one that is farther away is only slower.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import mmap
import os
import platform
import re
import threading
from collections.abc import Sequence
from pathlib import Path

from kvstore.filesystems import text_of
from kvstore.mapping import address_of_map

SYS = Path("/sys")
PROC = Path("/proc")
CHOICES = '"auto", "off", "interleave", or numbers of nodes like "0" or "0,1"'
NODE_MAX = 1023
NVIDIA = "0x10de"
DISPLAY_CLASS = "0x03"  # the first byte of a PCI class: what has a GPU
PART = 0.8  # so much of a node's memory an arena may want, if it is to have the node alone

_MPOL_PREFERRED, _MPOL_INTERLEAVE = 1, 3
_MPOL_F_NODE, _MPOL_F_ADDR = 1, 2
_CALLS = {  # mbind, set_mempolicy, get_mempolicy: not every C library wraps them
    "x86_64": (237, 238, 239),
    "aarch64": (235, 237, 236),
}
_Mask = ctypes.c_ulong * ((NODE_MAX + 1) // (8 * ctypes.sizeof(ctypes.c_ulong)))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@dataclasses.dataclass(frozen=True)
class Node:
    """A node with memory, in bytes; `cpus` tells whether it has processors."""

    number: int
    total_bytes: int
    free_bytes: int
    cpus: bool


def parse_choice(value: object) -> str:
    """A choice as it is kept: a word, or numbers of nodes in order, each once. ValueError: no."""
    text = str(value).strip().lower() if isinstance(value, str | int) else ""
    if text in ("auto", "off", "interleave"):
        return text
    try:
        numbers = parse_list(text)
    except ValueError:
        numbers = []
    if not numbers or isinstance(value, bool) or numbers[-1] > NODE_MAX:
        raise ValueError(f"is no choice of memory nodes: write {CHOICES}")
    return ",".join(map(str, numbers))


def parse_list(text: str) -> list[int]:
    """Numbers as the kernel lists them ("0-2,5"), sorted, each once. ValueError when they are not
    such a list."""
    found: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if match is None:
            raise ValueError(f"{text!r} is no list of numbers")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def nodes(sys: Path = SYS) -> list[Node]:
    """The nodes that have memory, by number; none where the kernel does not tell."""
    folder = sys / "devices/system/node"
    found = []
    for path in folder.glob("node[0-9]*"):
        sizes = dict(re.findall(r"(MemTotal|MemFree):\s*(\d+) kB", text_of(path / "meminfo")))
        total = int(sizes.get("MemTotal", 0)) << 10
        if total:
            number = int(path.name.removeprefix("node"))
            free = int(sizes.get("MemFree", 0)) << 10
            found.append(Node(number, total, free, bool(text_of(path / "cpulist"))))
    return sorted(found, key=lambda node: node.number)


def choose(
    choice: str,
    size_bytes: int,
    devices: Sequence[int] = (),
    *,
    sys: Path = SYS,
    proc: Path = PROC,
) -> tuple[int, ...]:
    """The nodes that an arena of this size shall be spread over; () leaves it to the kernel.

    "auto" spreads over the nodes of the GPUs that are configured, if those have enough memory, else
    over all nodes with memory and processors; with one node there is nothing to choose. Raises
    ValueError, saying what to write, for nodes that are not there or not this process's to use.
    """
    there = [node for node in nodes(sys) if node.number in _allowed(proc, node.number)]
    if choice == "off":
        return ()
    if choice in ("auto", "interleave"):
        near = [node for node in there if node.cpus]
        if choice == "auto" and devices:
            wanted = gpu_nodes(devices, sys)
            beside = [node for node in there if node.number in wanted]
            if sum(node.total_bytes for node in beside) * PART >= size_bytes:
                near = beside or near
        return tuple(node.number for node in near) if len(there) > 1 else ()
    numbers = tuple(parse_list(choice))
    known = [node.number for node in there]
    absent = [number for number in numbers if number not in known]
    if absent:
        raise ValueError(
            f"node {', '.join(map(str, absent))} has no memory that this process may use: name of "
            f"{', '.join(map(str, known)) or 'none (this kernel shows no nodes)'}, or write "
            '"auto"'
        )
    return numbers


def gpu_nodes(devices: Sequence[int], sys: Path = SYS) -> set[int]:
    """The nodes that these GPUs are attached to, by their place on the PCI bus; those that the
    firmware does not tell are left out."""
    found = []
    for path in sorted((sys / "bus/pci/devices").glob("*")):
        if text_of(path / "vendor") == NVIDIA and text_of(path / "class").startswith(DISPLAY_CLASS):
            text = text_of(path / "numa_node")
            found.append(int(text) if re.fullmatch(r"-?\d+", text) else -1)
    near = {found[device] for device in devices if device < len(found)}
    return near - {-1}


def check(numbers: Sequence[int]) -> None:
    """Raises OSError when the kernel takes no preference for these nodes from this process."""
    if not numbers:
        return
    problems: list[OSError] = []

    def ask() -> None:
        try:
            with mmap.mmap(-1, mmap.PAGESIZE) as page:
                spread(address_of_map(page), mmap.PAGESIZE, numbers)
            for number in numbers:
                prefer(number)
        except OSError as error:
            problems.append(error)

    thread = threading.Thread(target=ask)  # a policy is of a thread, and ends with it
    thread.start()
    thread.join()
    if problems:
        raise problems[0]


def prefer(node: int) -> None:
    """Pages that this thread makes from now on come from this node while it has any. OSError."""
    _call(1, _MPOL_PREFERRED, ctypes.byref(_mask((node,))), NODE_MAX + 2)


def spread(address: int, size_bytes: int, numbers: Sequence[int]) -> None:
    """Pages that a shared map of tmpfs still lacks come from these nodes in turn, whoever touches
    them first. OSError."""
    policy = _MPOL_INTERLEAVE if len(numbers) > 1 else _MPOL_PREFERRED
    place = ctypes.c_void_p(address), ctypes.c_size_t(size_bytes)
    _call(0, *place, policy, ctypes.byref(_mask(numbers)), NODE_MAX + 2, 0)


def node_at(address: int) -> int:
    """The node of the page at an address, which is touched. OSError."""
    found = ctypes.c_int(-1)
    where = ctypes.c_void_p(address)
    _call(2, ctypes.byref(found), None, ctypes.c_ulong(0), where, _MPOL_F_NODE | _MPOL_F_ADDR)
    return found.value


def _call(which: int, *arguments: object) -> None:
    calls = _CALLS.get(platform.machine())
    if calls is None:
        raise OSError(errno.ENOSYS, f"memory policies are not known on {platform.machine()}")
    if _libc.syscall(ctypes.c_long(calls[which]), *arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mask(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_ulong]:
    mask = _Mask()
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    for number in numbers:
        mask[number // bits] |= 1 << number % bits
    return mask


def _allowed(proc: Path, number: int) -> Sequence[int]:
    """The nodes that this process may use; the one asked for where the kernel does not tell."""
    match = re.search(r"^Mems_allowed_list:\s*(\S+)", text_of(proc / "self/status"), re.MULTILINE)
    return parse_list(match[1]) if match else (number,)
