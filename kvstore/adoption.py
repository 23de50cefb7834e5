"""What one daemon leaves beside its arena for the next one, and how that one takes it over.

    arena    the bytes of blocks (kvstore.tiers.dram)
    slots    what lies in each slot of the arena (kvstore.tiers.slot_table)
    notes    what the slot table names by numbers: layouts, and the processes of sessions

An arena in hugetlbfs stands there alone: files that are written do not work in it, so the other two
are in a folder of their own.

Format of the notes: one JSON list a line, then a tab and the crc32 of the list in hexadecimal. A
line is appended in one write; the last may be torn, and says nothing then. Mode 0600, as the slot
table: clients are not to see them.

    ["layout", {fields of kvstore.types.Layout}]
    ["process", session, pid, start of the process in clock ticks since boot, or 0]
    ["over", session]    nobody writes any more what that session was given

Assumed of the medium: memory (tmpfs), as for the slot table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from kvstore import numa
from kvstore.catalog import LayoutEntry
from kvstore.errors import InvalidKeys
from kvstore.leases import NO_SESSION, SEVERAL
from kvstore.store import Store
from kvstore.tiers.dram import ARENA_MODE, DramArena
from kvstore.tiers.slot_table import COMMITTED, WRITING, SlotRecord, SlotTable
from kvstore.types import SLOT_ALIGNMENT, Layout, check_hash_length

ARENA, SLOT_TABLE, NOTES = "arena", "slots", "notes"
OWN_MODE = 0o600  # of what clients are not to see
SEQUENCE_MAX = 1 << 62
LINES_SPARE = 256  # lines that say nothing any more, beyond as many as are needed

log = structlog.get_logger()

Process = tuple[int, int]  # its number, and when it started


class Notes:
    """The notes of one arena, as they were found and as they are continued.

    `failed` is called when something cannot be noted: the arena is not to be adopted then.
    """

    def __init__(self, path: Path, lines: Iterable[str], failed: Callable[[], None]) -> None:
        self._path = path
        self._failed = failed
        self._count = 0
        self.layouts: dict[bytes, Layout] = {}  # by fingerprint
        self.processes: dict[int, list[Process]] = {}  # by session
        for line in lines:
            text, _, crc = line.partition("\t")
            if crc != _crc(text):
                raise ValueError(f"{path} is damaged")
            self._read(*json.loads(text))
        self._rewrite()

    @classmethod
    def open(cls, path: Path, failed: Callable[[], None]) -> Notes:
        """Go on with the notes of an earlier daemon. OSError when they cannot be read, ValueError
        when they are damaged."""
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # death came while it was written
        return cls(path, (line.rstrip("\n") for line in lines), failed)

    @classmethod
    def create(cls, path: Path, failed: Callable[[], None]) -> Notes:
        """Begin anew."""
        return cls(path, (), failed)

    def add_layout(self, layout: Layout) -> None:
        """A block of this layout may come."""
        if layout.fingerprint not in self.layouts:
            self._read("layout", dataclasses.asdict(layout))
            self._append("layout", dataclasses.asdict(layout))

    def add_process(self, session: int, process: Process) -> None:
        """A process may write what this session is given."""
        self._read("process", session, *process)
        self._append("process", session, *process)

    def over(self, session: int) -> None:
        """Nobody writes any more what this session was given."""
        self._read("over", session)
        self._append("over", session)

    def _read(self, kind: str, *fields: Any) -> None:
        if kind == "layout":
            layout = Layout(**fields[0])
            self.layouts[layout.fingerprint] = layout
        elif kind == "process":
            session, pid, start = map(int, fields)
            self.processes.setdefault(session, []).append((pid, start))
        elif kind == "over":
            self.processes.pop(int(fields[0]), None)

    def _append(self, *fields: Any) -> None:
        self._count += 1
        if self._count > 2 * (len(self.layouts) + len(self.processes)) + LINES_SPARE:
            self._rewrite()
            return
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
            try:
                self._write(file, [list(fields)])
            finally:
                os.close(file)
        except OSError as error:
            self._cannot(error)

    def _rewrite(self) -> None:
        lines: list[list[Any]] = [
            ["layout", dataclasses.asdict(layout)] for layout in self.layouts.values()
        ]
        for session, processes in self.processes.items():
            lines += [["process", session, *process] for process in processes]
        scratch = self._path.with_name(self._path.name + ".new")
        try:
            scratch.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            file = os.open(scratch, flags, OWN_MODE)
            try:
                self._write(file, lines)
            finally:
                os.close(file)
            os.rename(scratch, self._path)
            self._count = len(lines)
        except OSError as error:
            self._cannot(error)

    def _write(self, file: int, lines: list[list[Any]]) -> None:
        texts = map(json.dumps, lines)
        data = "".join(f"{text}\t{_crc(text)}\n" for text in texts).encode()
        if os.write(file, data) != len(data):
            raise OSError("not all of it could be written")

    def _cannot(self, error: OSError) -> None:
        log.error("arena will not survive this daemon", path=str(self._path), problem=str(error))
        self._failed()


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


@dataclasses.dataclass
class Estate:
    """An arena with what is known of it. `adopted` when an earlier daemon filled it."""

    arena: DramArena
    table: SlotTable
    notes: Notes
    adopted: bool


def check_room(sizes: Mapping[Path, int]) -> None:
    """Whether all tenants can have arenas of these sizes in their folders, before the first of them
    loses what it has. Raises as DramArena.check_room."""
    new = {}
    for folder, size_bytes in sizes.items():
        path = folder / ARENA
        if not path.exists() or path.stat().st_size != size_bytes:
            new[path] = size_bytes
    if len(new) > 1:
        DramArena.check_room(new)


def take_over(
    folder: Path,
    size_bytes: int,
    slab_bytes: int,
    *,
    gid: int | None,
    preallocate: bool,
    nodes: Sequence[int] = (),
    tables: Path | None = None,
) -> Estate:
    """The arena that an earlier daemon left in this folder, if it is what is wanted now; else a new
    one on these memory nodes, and a line in the log that says why. `tables` is the folder of slot
    table and notes, if it is another one. Raises as DramArena.create and SlotTable.create."""
    tables, reason = tables or folder, ""
    try:
        estate = _open(folder, tables, size_bytes, slab_bytes, gid)
    except FileNotFoundError:
        estate = None  # the first start
    except (OSError, ValueError) as error:
        estate = None
        reason = str(error)
    if estate is None:
        DramArena.check_room({folder / ARENA: size_bytes})  # else what is there stays
        if reason:
            log.warning("DRAM starts empty", folder=str(folder), reason=reason)
        for name in (SLOT_TABLE, NOTES):  # after a reboot another arena may have the old inode
            (tables / name).unlink(missing_ok=True)
        arena = DramArena.create(
            folder / ARENA, size_bytes, gid=gid, preallocate=preallocate, nodes=_takes(nodes)
        )
        table = SlotTable.create(tables / SLOT_TABLE, arena.capacity_bytes, arena.inode, slab_bytes)
        estate = Estate(arena, table, Notes.create(tables / NOTES, table.spoil), False)
    found = estate.arena.nodes_found()
    if nodes and set(found) - set(nodes):
        log.warning(
            "arena lies on other memory nodes than wanted",
            folder=str(folder),
            wanted=list(nodes),
            pages_sampled=dict(found),
            made_by="an earlier daemon" if estate.adopted else "this one",
        )
    return estate


def _takes(nodes: Sequence[int]) -> Sequence[int]:
    """The nodes, if the kernel takes preferences; else none, and a line in the log."""
    try:
        numa.check(nodes)
    except OSError as error:
        log.warning("memory nodes are left to the kernel", wanted=list(nodes), problem=str(error))
        return ()
    return nodes


def _open(folder: Path, tables: Path, size_bytes: int, slab_bytes: int, gid: int | None) -> Estate:
    """Raises ValueError saying what does not fit, or OSError."""
    _check_owner(folder / ARENA, ARENA_MODE, os.getegid() if gid is None else gid)
    for name in (SLOT_TABLE, NOTES):
        _check_owner(tables / name, OWN_MODE, None)
    with contextlib.ExitStack() as undo:
        table = SlotTable.open(tables / SLOT_TABLE)
        undo.callback(table.close)
        arena = DramArena.open(folder / ARENA)
        undo.callback(arena.close)
        if table.arena_inode != arena.inode or table.arena_bytes != arena.capacity_bytes:
            raise ValueError(f"{tables / SLOT_TABLE} belongs to another arena")
        if arena.capacity_bytes != size_bytes:
            raise ValueError(f"it had {arena.capacity_bytes} bytes, now {size_bytes} are wanted")
        if table.slab_bytes != slab_bytes:
            raise ValueError(f"it had slabs of {table.slab_bytes} bytes, now of {slab_bytes}")
        notes = Notes.open(tables / NOTES, table.spoil)
        undo.pop_all()
    return Estate(arena, table, notes, True)


def _check_owner(path: Path, mode: int, gid: int | None) -> None:
    found = os.lstat(path)
    if (
        not stat.S_ISREG(found.st_mode)
        or found.st_uid != os.geteuid()
        or stat.S_IMODE(found.st_mode) != mode
        or (gid is not None and found.st_gid != gid)
    ):
        raise ValueError(
            f"{path} has owner {found.st_uid}:{found.st_gid} and mode {found.st_mode:o}, not the "
            "one that it is to have"
        )


def adopt(store: Store, estate: Estate, tenant: str, now: float) -> dict[int, list[int]]:
    """Seat the blocks that the slot table names. Returns, for each session of the earlier daemon
    (or SEVERAL), the blocks that it may still be writing, to be unquarantined when it is not."""
    table, notes = estate.table, estate.notes
    committed: dict[bytes, list[SlotRecord]] = defaultdict(list)
    writing: list[SlotRecord] = []
    last = 0
    for record in table.records():
        if record.sequence < SEQUENCE_MAX:  # it stands outside of the record's checksum
            last = max(last, record.sequence)
        if record.state == COMMITTED:
            committed[record.layout].append(record)
        elif record.session == NO_SESSION:
            table.clear(record.offset)  # the earlier daemon itself was loading it
        else:
            writing.append(record)
    # A record that death tore was of no client's slot; but we cannot know that it was death.
    writing += [SlotRecord(*place, WRITING, b"", b"", 0, 0, SEVERAL) for place in table.damaged]
    sessions = [record.session for record in writing if record.session != SEVERAL]
    store.sessions.last_number = max([0, *sessions, *notes.processes])
    store.placement.sequence = max(store.placement.sequence, last)
    held: dict[int, list[int]] = defaultdict(list)
    for record in writing:
        entry = _entry_of(store, notes.layouts.get(record.layout), record.slot_bytes)
        block = store.adopt_writing(entry, record.offset // SLOT_ALIGNMENT, record.session)
        if block is not None:
            held[record.session].append(block)
    total = served = 0
    for fingerprint, records in committed.items():
        total += len(records)
        served += _adopt_layout(store, table, notes.layouts.get(fingerprint), records, now)
    log.info(
        "DRAM adopted",
        tenant=tenant,
        blocks=served,
        dropped=total - served,
        quarantined=sum(map(len, held.values())),
        damaged=len(table.damaged),
    )
    return dict(held)


def _adopt_layout(
    store: Store,
    table: SlotTable,
    layout: Layout | None,
    records: Sequence[SlotRecord],
    now: float,
) -> int:
    good: list[SlotRecord] = []
    for record in records:
        if layout is not None and record.slot_bytes == layout.slot_bytes and _is_key(record.hash):
            good.append(record)
        else:
            table.clear(record.offset)
    if layout is None or not good:
        return 0
    good.sort(key=lambda record: record.sequence)
    return store.adopt_dram(
        store.catalog.open(layout),
        [record.hash for record in good],
        [record.offset // SLOT_ALIGNMENT for record in good],
        [record.checksum for record in good],
        now,
    )


def _is_key(hash: bytes) -> bool:
    try:
        check_hash_length(len(hash), len(hash))
    except InvalidKeys:
        return False
    return True


def _entry_of(store: Store, layout: Layout | None, slot_bytes: int) -> LayoutEntry:
    """A layout with slots of this size: whose block it was to be does not matter any more."""
    if layout is not None and layout.slot_bytes == slot_bytes:
        return store.catalog.open(layout)
    for entry in store.catalog.layouts:
        if entry.slot_bytes == slot_bytes:
            return entry
    return store.catalog.open(
        Layout(
            model="unknown",
            engine="unknown",
            dtype="uint8",
            block_tokens=1,
            shard_bytes=slot_bytes,
        )
    )
