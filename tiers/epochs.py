"""Epochs of DRAM slots: a number for each slot that is even while a block can be read there, and
another one before anything else is written there.

Who has read a slot, found its epoch even and unchanged afterwards, and knows from then on which
block that is, can read it again without asking: the epoch is looked at before and after the copy,
and where it is another one the copy is thrown away. The daemon writes, its clients read.

Format: the file has 4 bytes, little endian, for each page of 4096 bytes of the arena; those of a
slot are at the page that it starts on; others mean nothing, nor do those of slots that nobody has
been granted yet. An epoch goes up only, and wraps round. The file belongs to one life of the
daemon; the next ends all epochs in it and makes another.

Assumed of the medium: it is memory that is shared between processes, where stores of one become
visible to others in the order in which they were made. All room is taken when the file is made.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from kvstore.tiers.base import ALIGNMENT, named

EPOCH_BYTES = 4
_MASK = (1 << 8 * EPOCH_BYTES) - 1
_MODE = 0o640


class Epochs:
    """The mapped file; see `create`."""

    def __init__(self, path: Path, file: int, size: int) -> None:
        self.path = path
        self.inode = os.fstat(file).st_ino
        self._map = mmap.mmap(file, size)
        self._words = memoryview(self._map).cast("I")

    @classmethod
    def create(cls, path: Path, arena_bytes: int, *, gid: int | None = None) -> Epochs:
        """A new file for an arena, in the place of an old one; a group that is named may read it.

        Raises OSError naming the path when there is no room.
        """
        size = -(-arena_bytes // ALIGNMENT) * EPOCH_BYTES
        scratch = path.with_name(path.name + ".new")
        scratch.unlink(missing_ok=True)
        try:
            _end_old(path)
            file = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(file, 0, size)
                if gid is not None:
                    os.fchown(file, -1, gid)
                os.fchmod(file, _MODE)
                epochs = cls(path, file, size)
            finally:
                os.close(file)
            os.rename(scratch, path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise named(error, path) from error
        return epochs

    def begin(self, page: int) -> None:
        """There is a block that can be read in the slot that starts on this page of the arena."""
        self._words[page] = (self._words[page] + 1) & ~1 & _MASK

    def end(self, page: int) -> None:
        """There is none: anything may be written there from now on."""
        self._words[page] = (self._words[page] + 1 | 1) & _MASK

    def end_all(self) -> None:
        """Nothing may be read without asking any more."""
        words = np.frombuffer(self._map, np.uint32)
        words[:] = words + 1 | 1

    def close(self) -> None:
        """Unmap the file and remove it."""
        self.path.unlink(missing_ok=True)
        self._words.release()
        self._map.close()


def _end_old(path: Path) -> None:
    """Clients of a daemon that has died may still read by the file that it left."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        size = os.fstat(file).st_size
        if size:
            Epochs(path, file, size // EPOCH_BYTES * EPOCH_BYTES).end_all()
    finally:
        os.close(file)
