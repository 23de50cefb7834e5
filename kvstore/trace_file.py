"""The file that `kvstore trace` records: written frame by frame, and read back.

One recording is FILE, the newest part, and FILE.1, FILE.2 ... behind it, ever older. Each part can
be read by itself. All numbers are little-endian; hashes are salted with a key that no file has.

    header   8 bytes   "kvtrace" and the version, 1
             16 bytes  the recording: parts with another value here belong to another one
             u32       number of the part in the recording, from 0
             u32       0
             f64       seconds from the recording's start to the part's
             u64 x 3   bytes of the DRAM tier, of the NVMe tier, of a slab
             f64       bytes a second of the NVMe write budget; 0: unlimited
             u8        write policy: 0 through, 1 on-evict, 2 second-touch
             u8 x 7    0
    frame    u32       bytes that follow the 12 of this head
             u32       bytes of its records before compression
             u32       1: nodes, layouts and tags are numbered from 0 again, the times go on
             ...       the records, compressed by zstd with a checksum
    frame    ...       until the file ends

Records, each beginning with a byte that says what it is:

    1 layout   u16 number | 8 bytes salted fingerprint | u32 tokens, u64 bytes of a block
    2 nodes    u32 parent | u16 count | 8 bytes salted hash of each
               a chain: each node is the parent of the next; numbers count from 0 on. 0xFFFFFFFF is
               no parent: the chain begins a prompt
    3 request  u8 kind: 0 asked, 1 offered | u8 reuse: 0 unknown, 1 continue, 2 done
               u16 layout | u16 tag, 0xFFFF none | u32 node of the last block, 0xFFFFFFFF no block
               u32 blocks of the chain | u32 of them not asked for | u32 granted
               u32 of these on NVMe | u32 missed | u8 stop, as in AcquireReply
               f32 prefill tokens a second, 0 unknown | f64 seconds from the recording's start
    4 tag      u16 number | 8 bytes salted name
    5 count    u64 requests kept so far | u64 requests that could not be kept

Assumed of the medium: what was written before a crash is a beginning of the file, or garbage that
the checksum of a frame finds. Reading ends there, with a warning; frames before it are whole.

Versions: 1, the first.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zstandard

from kvstore.errors import InvalidRequest
from kvstore.traces import ASKED, OFFERED, STEP, Shape, Sizes, Trace

MAGIC = b"kvtrace\x01"
HEADER = struct.Struct("<8s16sIIdQQQdB7x")
FRAME = struct.Struct("<III")
LAYOUT = struct.Struct("<BH8sIQ")
NODES = struct.Struct("<BIH")
REQUEST = struct.Struct("<BBBHHIIIIIIBfd")
TAG = struct.Struct("<BH8s")
COUNT = struct.Struct("<BQQ")
IS_LAYOUT, IS_NODES, IS_REQUEST, IS_TAG, IS_COUNT = 1, 2, 3, 4, 5
HASH_BYTES = 8
NOTHING = 0xFFFFFFFF
NO_TAG = 0xFFFF
ANEW = 1
PARTS_MAX = 8
FRAME_BYTES_MAX = 64 << 20
RUN_MAX = 0xFFFF
PENDING, NO_ROOM = 2, 4  # as reads.py has them
WRITE_POLICIES = ("through", "on-evict", "second-touch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a part says of itself."""

    recording: bytes
    part: int
    started_s: float
    sizes: Sizes

    def pack(self) -> bytes:
        """Its bytes."""
        sizes = self.sizes
        return HEADER.pack(
            MAGIC,
            self.recording,
            self.part,
            0,
            self.started_s,
            sizes.dram_bytes,
            sizes.nvme_bytes,
            sizes.slab_bytes,
            sizes.write_budget or 0.0,
            WRITE_POLICIES.index(sizes.write_policy),
        )

    @classmethod
    def unpack(cls, raw: bytes, path: Path) -> Header:
        """From bytes; raises InvalidRequest when they are no header."""
        if len(raw) < HEADER.size or raw[: len(MAGIC)] != MAGIC:
            raise InvalidRequest(f"{path} has no whole header of a trace: record it anew")
        _, recording, part, _, started_s, dram, nvme, slab, budget, policy = HEADER.unpack(raw)
        return cls(
            recording=recording,
            part=part,
            started_s=started_s,
            sizes=Sizes(
                dram_bytes=dram,
                nvme_bytes=nvme,
                slab_bytes=slab,
                write_policy=WRITE_POLICIES[min(policy, len(WRITE_POLICIES) - 1)],
                write_budget=budget or None,
            ),
        )


def part_path(path: Path, age: int) -> Path:
    """Where a part lies: 0 is the newest."""
    return path.with_name(f"{path.name}.{age}") if age else path


def pack_frame(records: bytes, *, anew: bool) -> bytes:
    """A frame of these records."""
    packed = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(records)
    return FRAME.pack(len(packed), len(records), ANEW if anew else 0) + packed


def read(path: Path) -> Trace:
    """The whole recording whose newest part is at `path`, or one older part with what is behind it.

    Raises InvalidRequest when that is none; what is damaged further on ends it with a warning."""
    parts = _parts(path)
    builder = _Builder()
    for part, header in parts:
        builder.part(part, header)
    return builder.trace(parts[-1][1].sizes)


def _parts(path: Path) -> list[tuple[Path, Header]]:
    """The parts of the recording that `path` is the newest of, the oldest first."""
    found: list[tuple[Path, Header]] = []
    for age in range(PARTS_MAX):
        part = part_path(path, age)
        if age and not part.exists():
            break
        with part.open("rb") as file:
            header = Header.unpack(file.read(HEADER.size), part)
        if found and (
            header.recording != found[0][1].recording or header.part != found[-1][1].part - 1
        ):
            break
        found.append((part, header))
    return found[::-1]


class _Builder:
    """Puts records together to a trace."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._keys: list[int] = []
        self._depths: list[int] = []  # blocks that end with each node
        self._known: dict[tuple[int, bytes], int] = {}  # parent and hash -> node
        self._inner: dict[bytes, int] = {}  # hash -> the first node of it that has a parent
        self._blocks: dict[bytes, int] = {}
        self._layouts: dict[bytes, int] = {}
        self._shapes: list[Shape] = []
        self._tags: dict[bytes, int] = {}
        self._steps: list[tuple[object, ...]] = []
        self._warnings: list[str] = []
        self._dropped = 0
        self._anew()

    def part(self, path: Path, header: Header) -> None:
        """Take a part's records."""
        self._anew()
        for records, anew in self._frames(path):
            if anew:
                self._anew()
            try:
                self._take(records)
            except (struct.error, IndexError, KeyError):
                self._warnings.append(f"{path}: a frame is no trace from some record on: skipped")
                return

    def trace(self, sizes: Sizes) -> Trace:
        """What was found."""
        steps = np.array(self._steps, STEP) if self._steps else np.zeros(0, STEP)
        if len(steps):
            steps = steps[np.argsort(steps["t"], kind="stable")]
            steps["t"] -= steps["t"][0]
        return Trace(
            parents=np.array(self._parents, np.int32),
            keys=np.array(self._keys, np.int32),
            steps=steps,
            shapes=self._shapes or [Shape(1, 1)],
            sizes=sizes,
            warnings=self._warnings,
            dropped=self._dropped,
        )

    def _anew(self) -> None:
        self._nodes: list[int] = []  # number in the file -> node
        self._layout_of: dict[int, int] = {}
        self._tag_of: dict[int, int] = {}

    def _frames(self, path: Path) -> Iterator[tuple[bytes, bool]]:
        decompressor = zstandard.ZstdDecompressor()
        with path.open("rb") as file:
            file.seek(HEADER.size)
            while head := file.read(FRAME.size):
                packed = b""
                if len(head) == FRAME.size:
                    size, raw_size, flags = FRAME.unpack(head)
                    packed = file.read(min(size, FRAME_BYTES_MAX))
                if len(head) < FRAME.size or len(packed) < size or raw_size > FRAME_BYTES_MAX:
                    self._warnings.append(f"{path} ends in the middle of a frame: that one is lost")
                    return
                try:
                    records = decompressor.decompress(packed, max_output_size=FRAME_BYTES_MAX)
                except zstandard.ZstdError as error:
                    self._warnings.append(f"{path}: a frame is damaged ({error}): the rest is lost")
                    return
                yield records, bool(flags & ANEW)

    def _take(self, records: bytes) -> None:
        at, end = 0, len(records)
        while at < end:
            kind = records[at]
            if kind == IS_REQUEST:
                self._request(REQUEST.unpack_from(records, at))
                at += REQUEST.size
            elif kind == IS_NODES:
                _, parent, count = NODES.unpack_from(records, at)
                at += NODES.size
                if at + count * HASH_BYTES > end:
                    raise IndexError(at)
                self._chain(parent, records[at : at + count * HASH_BYTES])
                at += count * HASH_BYTES
            elif kind == IS_LAYOUT:
                _, number, name, tokens, size = LAYOUT.unpack_from(records, at)
                if name not in self._layouts:
                    self._layouts[name] = len(self._shapes)
                    self._shapes.append(Shape(tokens, size))
                self._layout_of[number] = self._layouts[name]
                at += LAYOUT.size
            elif kind == IS_TAG:
                _, number, name = TAG.unpack_from(records, at)
                self._tag_of[number] = self._tags.setdefault(name, len(self._tags) + 1)
                at += TAG.size
            elif kind == IS_COUNT:
                self._dropped = max(self._dropped, COUNT.unpack_from(records, at)[2])
                at += COUNT.size
            else:
                raise IndexError(kind)

    def _chain(self, parent: int, hashes: bytes) -> None:
        """New nodes. Those of an earlier part, or of before the numbers began anew, are the same
        where parent and hash are; hashes are salted together with their layout. A chain that
        begins with a block from within a prompt goes on there: a client need not name more of what
        is before the blocks that it offers than the last one."""
        node = -1 if parent == NOTHING else self._nodes[parent]
        for at in range(0, len(hashes), HASH_BYTES):
            name = hashes[at : at + HASH_BYTES]
            found = self._known.get((node, name))
            if found is None and node == -1:
                found = self._inner.get(name)
            if found is None:
                found = self._known[node, name] = len(self._parents)
                self._parents.append(node)
                self._depths.append(1 if node == -1 else self._depths[node] + 1)
                self._keys.append(self._blocks.setdefault(name, len(self._blocks)))
                if node != -1:
                    self._inner.setdefault(name, found)
            node = found
            self._nodes.append(node)

    def _request(self, fields: tuple[int, ...]) -> None:
        _, kind, reuse, layout, tag, last, length, skip, granted, slow, missed, stop, *rest = fields
        leaf = -1 if last == NOTHING else self._nodes[last]
        if leaf != -1 and (before := self._depths[leaf] - length) > 0:  # it began within a prompt
            length, skip = length + before, skip + before
        asked = kind == ASKED
        again = asked and not missed and (stop == PENDING or (stop == NO_ROOM and granted > 0))
        self._steps.append(
            (
                rest[1],
                ASKED if asked else OFFERED,
                again,
                self._layout_of[layout],
                leaf,
                skip,
                skip + granted if again else length,
                skip + granted if asked else length,
                0,
                rest[0],
                reuse,
                self._tag_of.get(tag, 0),
                granted if asked else -1,
                slow if asked else -1,
            )
        )
