"""Survives a client that cuts the arena's file short under the daemon's map of it.

Whoever may map the arena may also truncate it; touching the lost pages is then a SIGBUS, which ends
a process. Here it puts zeros in the place of the whole arena, and the thread goes on: what it reads
verifies as nothing, and whoever watches the arena finds `Guard.hit` set.

Sound because of where it can happen: the daemon touches the arena itself only where checksums are
taken, in threads that hold no lock and not the interpreter's either (its reads and writes of disks
are system calls, which report EFAULT instead). So the handler, which is Python and waits for the
interpreter, interrupts nothing that it needs. A SIGBUS at any other address ends the process, as it
does without a handler.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import signal
from typing import Any

_FAULT_ADDRESS_AT = 16  # of si_addr in siginfo_t, on every 64-bit Linux
_SIGNAL_SET_BYTES = 128
_SA_SIGINFO = 4
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """struct sigaction of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_char * _SIGNAL_SET_BYTES),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class Guard:
    """A range of addresses that is a map of an arena. `hit`: it has become one of zeros."""

    def __init__(self, start: int, size_bytes: int) -> None:
        self.start = start
        self.size_bytes = size_bytes
        self.hit = False


_guards: list[Guard] = []
_kept: list[Any] = []  # the handler, for as long as the process lives
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
)


def _on_fault(_number: int, info: int, _context: int) -> None:
    address = ctypes.c_void_p.from_address(info + _FAULT_ADDRESS_AT).value or 0
    for guard in _guards:
        if 0 <= address - guard.start < guard.size_bytes:
            guard.hit = True  # before anybody can read zeros
            placed = _libc.mmap(
                guard.start,
                guard.size_bytes,
                mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE,
                -1,
                0,
            )
            if placed == guard.start:
                return
    _libc.sigaction(signal.SIGBUS, ctypes.byref(_Action()), None)  # it faults again, and ends


def guard(start: int, size_bytes: int) -> Guard:
    """Watch over a map until `unguard`. OSError where the system does not let it."""
    if not _guards:
        try:
            _kept[:] = [_Handler(_on_fault)]
        except MemoryError:  # where no memory may become executable, some libffi have no handlers
            raise OSError(errno.ENOMEM, "no handler of SIGBUS can be made") from None
        address = ctypes.cast(_kept[0], ctypes.c_void_p)
        action = _Action(handler=address, flags=_SA_SIGINFO)
        if _libc.sigaction(signal.SIGBUS, ctypes.byref(action), None):
            raise OSError(ctypes.get_errno(), "no handler of SIGBUS")
    found = Guard(start, size_bytes)
    _guards.append(found)
    return found


def unguard(guard: Guard) -> None:
    """The map is about to go."""
    if guard in _guards:
        _guards.remove(guard)
