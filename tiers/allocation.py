"""Taking the memory of a new arena: all of its pages, by several threads, on the nodes wanted.

Pages are made by touching them through a map (MADV_POPULATE_WRITE), because a call on the file
(fallocate) locks it, so that a second thread waits. Which node a page comes from is a matter of the
thread that makes it. A policy of the map would do in tmpfs alone, as files of hugetlbfs have none;
and turns taken by small pages would all fall on the same node once those are made huge ones.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvstore import numa
from kvstore.mapping import (
    HUGE_BYTES,
    MADV_COLLAPSE,
    MADV_POPULATE_WRITE,
    address_of_map,
    advise,
    map_shared,
)

THREADS_MAX = 16
ATTEMPTS = 8  # to make pages huge that somebody else looks at just then, another thread of ours too
PAGE_BYTES = mmap.PAGESIZE
PIECE_BYTES = 64 << 20  # what a thread takes at once
FALLOCATE_BYTES = 1 << 30  # one call is restarted from its start by a signal, so it is kept short

Prefer = Callable[[int], None]


def thread_count() -> int:
    """Threads that take memory at once: as many as may run, as far as that makes it faster."""
    return min(THREADS_MAX, len(os.sched_getaffinity(0)))


def allocate(
    file: int,
    size_bytes: int,
    *,
    huge_page_bytes: int = 0,
    nodes: Sequence[int] = (),
    threads: int | None = None,
    prefer: Prefer = numa.prefer,
) -> None:
    """Take all pages of a new file, huge ones as far as the kernel gives them.

    `huge_page_bytes` are those of the file system, 0 in tmpfs. Stripes of a huge page come from
    `nodes` in turn, as `prefer` asks the kernel for one. Raises OSError when there is no room (the
    file holds some pages then), or when the kernel takes no preference.
    """
    stripe = huge_page_bytes or HUGE_BYTES
    piece = max(PIECE_BYTES, stripe)
    pieces = iter(range(0, size_bytes, piece))
    turn = threading.Lock()
    failed = threading.Event()
    small = threading.Event()  # huge pages are not to be had
    if huge_page_bytes:
        small.set()  # it has no other ones
    with map_shared(file, size_bytes) as mapping:
        address = address_of_map(mapping)

        def work() -> None:
            try:
                while not failed.is_set():
                    with turn:
                        start = next(pieces, None)
                    if start is None:
                        return
                    end = min(start + piece, size_bytes)
                    ranges = list(_stripes(start, end, stripe, nodes))
                    if not small.is_set() and not _made_huge(address, ranges, prefer):
                        small.set()
                    for node, first, last in ranges:
                        if node is not None:
                            prefer(node)
                        _populate(file, address, first, last)
            except BaseException:
                failed.set()
                raise

        count = threads or thread_count()
        with ThreadPoolExecutor(count, thread_name_prefix="kvstore-allocate") as pool:
            for done in [pool.submit(work) for _ in range(count)]:
                done.result()
    if os.fstat(file).st_blocks * 512 < size_bytes:  # whatever the kernel said, it is not all there
        _fallocate(file, 0, size_bytes)


def _stripes(
    start: int, end: int, stripe: int, nodes: Sequence[int]
) -> Iterator[tuple[int | None, int, int]]:
    """Node, start and end of each part of a range that comes from one node."""
    if len(nodes) < 2:
        yield (nodes[0] if nodes else None), start, end
        return
    for first in range(start, end, stripe):
        yield nodes[first // stripe % len(nodes)], first, min(first + stripe, end)


def _made_huge(address: int, ranges: Sequence[tuple[int | None, int, int]], prefer: Prefer) -> bool:
    """Back adjacent ranges of tmpfs by huge pages; False where the kernel does not.

    A huge page is made where a small one is, on the same node, so one is made in each. It must be
    mapped: Linux 6.1 makes no huge page else.
    """
    start, end = ranges[0][1], ranges[-1][2] // HUGE_BYTES * HUGE_BYTES
    for node, first, last in ranges:
        if node is not None:
            prefer(node)
        for place in range(first, min(last, end), HUGE_BYTES):
            advise(address + place, PAGE_BYTES, MADV_POPULATE_WRITE)
    for _ in range(ATTEMPTS):
        if end <= start or advise(address + start, end - start, MADV_COLLAPSE):
            return True
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EBUSY):
            break  # there is none, or this kernel does not
    return False


def _populate(file: int, address: int, start: int, end: int) -> None:
    if not advise(address + start, end - start, MADV_POPULATE_WRITE):
        _fallocate(file, start, end)  # an older kernel, or it says what is lacking


def _fallocate(file: int, start: int, end: int) -> None:
    for place in range(start, end, FALLOCATE_BYTES):
        os.posix_fallocate(file, place, min(FALLOCATE_BYTES, end - place))
