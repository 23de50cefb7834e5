"""Blocks that are read again without asking: where they were, and whether they still are.

The daemon ends a slot's epoch before anything else is written to the slot (see `UsedRequest` in
kvstore.proto). So this process may copy a block from where it last saw it, without a
lease: if the epoch is the same before and after, the copy is the block. For few blocks, whose round
trip takes as long as their copy; one that has moved or gone is asked for as always.

That rests on the order in which a processor makes stores of another one visible, and its own loads.
On x86 both are those of the program. Elsewhere nothing is read so.
"""

from __future__ import annotations

import mmap
import os
import platform
import weakref
from collections.abc import Sequence
from typing import Any

from kvstore.types import SLOT_ALIGNMENT

EPOCH_BYTES, EPOCH_MAX = 4, 0xFFFFFFFF
FEW = 4  # blocks
FEW_BYTES = 16 << 20  # all together
KNOWN_MAX = 65_536  # blocks of a cache; then it is forgotten where they are
ORDERED = platform.machine() in ("x86_64", "AMD64")


class Epochs:
    """The epochs of all slots, as the daemon changes them; mapped while anybody uses it."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._words = memoryview(mapped).cast("I")

    @classmethod
    def open(cls, attached: Any) -> Epochs | None:
        """Of the daemon that said this; None where there are none that can be used."""
        size = -(-attached.arena_bytes // SLOT_ALIGNMENT) * EPOCH_BYTES
        if not (ORDERED and attached.epochs_path):
            return None
        try:
            file = os.open(attached.epochs_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            status = os.fstat(file)
            if (status.st_ino, status.st_size) != (attached.epochs_inode, size):
                return None
            return cls(mmap.mmap(file, size, prot=mmap.PROT_READ))
        except (OSError, ValueError):
            return None
        finally:
            os.close(file)

    def of(self, offsets: Sequence[int]) -> list[int]:
        """The epochs of the slots at these offsets of the arena, now."""
        words = self._words
        return [words[offset >> 12] for offset in offsets]

    def after(self, offsets: Sequence[int]) -> list[int]:
        """Of slots that are being written: those of the blocks that will be there."""
        return [epoch + 1 & EPOCH_MAX for epoch in self.of(offsets)]


class Recall:
    """Where the blocks of one cache were seen. What was seen through another connection counts for
    nothing: its epochs are other ones."""

    def __init__(self) -> None:
        # Whose epochs, and for each hash where it was, and when. Replaced together.
        self._seen: tuple[weakref.ref[Epochs] | None, dict[bytes, tuple[int, int]]] = None, {}

    def learn(
        self, epochs: Epochs, hashes: Sequence[bytes], offsets: Sequence[int], then: Sequence[int]
    ) -> None:
        """These blocks were there at these epochs, which were read while a lease held. Odd ones are
        of blocks that were forgotten meanwhile: nobody may read those again."""
        whose, known = self._seen
        if whose is None or whose() is not epochs or len(known) > KNOWN_MAX:
            known = {}
            self._seen = weakref.ref(epochs), known
        for key, offset, epoch in zip(hashes, offsets, then, strict=True):
            if not epoch & 1:
                known[key] = offset, epoch

    def find(
        self, epochs: Epochs | None, hashes: Sequence[bytes]
    ) -> tuple[list[int], list[int]] | None:
        """Where all these blocks were seen, and at which epochs; None unless these are the epochs
        now."""
        whose, known = self._seen
        if epochs is None or whose is None or whose() is not epochs:
            return None
        try:
            places = [known[key] for key in hashes]
        except KeyError:
            return None
        offsets, then = [offset for offset, _ in places], [epoch for _, epoch in places]
        return (offsets, then) if epochs.of(offsets) == then else None
