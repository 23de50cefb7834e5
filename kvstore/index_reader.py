"""Reads and rewrites an index file in a process of its own, because a damaged one kills its reader.

LMDB trusts its file: a flipped bit or a cut end turns into SIGSEGV, SIGBUS or abort() in whoever
maps it, also long after it was opened, when a damaged free list is used for the first write. So the
daemon never lets LMDB touch a file that an earlier process left. A child scans it and hands out
plain bytes; when it dies, the index starts empty. And before the first write a child rewrites what
can be read into a fresh file, so that the daemon's own LMDB only ever opens files made in its life.

What `scan` writes to its standard output, little endian:

    chunks     4 bytes length of each value, 4 bytes count n, then n keys of 8 bytes, n values
    end        eight zeros
    JSON       {"meta": {name: hex}, "layouts": {number: text}, "damaged": n, "ordered": bool}
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import itertools
import json
import operator
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import lmdb

SLOTS, LAYOUTS, META = b"slots", b"layouts", b"meta"
KEY = struct.Struct(">Q")  # offset of the slot; big endian, so that LMDB's order is the device's
VALUE = struct.Struct("<IQB")  # layout number, sequence, bytes of the hash; then hash, then sums
LAYOUT_KEY = struct.Struct(">I")
CHUNK = struct.Struct("<II")
HASH_BYTES_MIN, HASH_BYTES_MAX, SUM_BYTES = 8, 64, 8
CHUNK_RECORDS = 1 << 12  # small enough to stay in a CPU's cache
PAIR_BYTES_MIN = 10  # what LMDB needs for any pair
# How the child ends when the file is at fault; any other end is no verdict on it.
UNREADABLE = 4
DEATHS_BY_FILE = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
# Errors that LMDB passes on from the system; others, also ENOMEM, come of sizes in a damaged file.
SYSTEM_TROUBLE = {errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EAGAIN, errno.EIO}
READ_S_MIN, READ_BYTES_PER_S_MIN = 30.0, 4 << 20  # who is slower hangs in a damaged file


class Unreadable(Exception):
    """The file is no index that can be read; the text says why."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """What a file held.

    chunks     (bytes of each value, keys, values): cut by length only, they may say anything
    damaged    pairs that were not even of a possible length
    ordered    whether all keys were rising, so that no slot comes twice
    """

    meta: dict[str, bytes]
    layouts: dict[int, str]
    damaged: int
    ordered: bool
    chunks: list[tuple[int, memoryview, memoryview]]


def are_lengths(value_bytes: int, hash_bytes: int) -> bool:
    """Whether a record of these lengths can be taken apart into a hash and checksums."""
    sum_bytes = value_bytes - VALUE.size - hash_bytes
    return (
        HASH_BYTES_MIN <= hash_bytes <= HASH_BYTES_MAX
        and sum_bytes >= SUM_BYTES
        and not sum_bytes % SUM_BYTES
    )


# --- In the daemon


def scan(path: Path) -> Scan:
    """Everything that can be read from the file.

    Raises Unreadable when nothing can, also when the reader hangs; OSError when the trouble is not
    the file's: no process, no memory, no permission. Then the file may be good.
    """
    with open(os.memfd_create("kvstore-index"), "w+b") as out:
        try:
            _run_child("scan", out.fileno(), path)
            out.seek(0)
            return parse(memoryview(out.read()))
        except (TimeoutError, struct.error, ValueError, KeyError) as error:
            raise Unreadable(str(error)) from None


def rewrite(path: Path, fresh: Path) -> None:
    """Write what can be read from `path` to the new file `fresh`, durably; raises like `scan`.

    Being slow is no verdict here, for `scan` has read the file before: TimeoutError, an OSError.
    """
    fresh.unlink(missing_ok=True)
    _run_child("rewrite", subprocess.DEVNULL, path, fresh)


def _run_child(verb: str, stdout: int, path: Path, *more: Path) -> None:
    where = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "kvstore.index_reader", verb, path, *more],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": where},
            timeout=READ_S_MIN + path.stat().st_size / READ_BYTES_PER_S_MIN,
            start_new_session=True,  # Ctrl-C in a terminal is for the daemon alone
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{path}: its reader took more than {error.timeout:.0f} s") from None
    status = done.returncode
    text = done.stderr.decode(errors="replace").strip().splitlines()
    if status == UNREADABLE:
        raise Unreadable(text[-1] if text else "no reason given")
    if -status in DEATHS_BY_FILE:
        raise Unreadable(f"its reader died of {signal.Signals(-status).name}")
    if status:  # a lack of memory or room, or a signal from outside
        raise OSError(f"{path}: its reader ended with {status}: {text[-1] if text else ''}")


def parse(data: memoryview) -> Scan:
    """Take apart what the child wrote."""
    chunks = []
    place = 0
    while True:
        length, count = CHUNK.unpack_from(data, place)
        place += CHUNK.size
        if not count:
            break
        keys, values = place + count * KEY.size, place + count * (KEY.size + length)
        chunks.append((length, data[place:keys], data[keys:values]))
        place = values
    rest = json.loads(bytes(data[place:]))
    return Scan(
        meta={name: bytes.fromhex(value) for name, value in rest["meta"].items()},
        layouts={int(number): text for number, text in rest["layouts"].items()},
        damaged=rest["damaged"],
        ordered=rest["ordered"],
        chunks=chunks,
    )


# --- In the child


def main(arguments: list[str]) -> int:
    """Run one verb and return the exit status; the last line of stderr says why."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # dying here is foreseen
    gc.disable()  # millions of tuples, no cycles, a short life
    try:
        if arguments[0] == "scan":
            _scan(arguments[1], sys.stdout.buffer)
        else:
            _rewrite(arguments[1], arguments[2])
    except (lmdb.Error, _Damaged) as error:
        sys.stderr.write(f"{error}\n")
        return 1 if getattr(error, "code", 0) in SYSTEM_TROUBLE else UNREADABLE
    return 0


class _Damaged(Exception):
    """The tree holds more bytes than its file."""


def _open(path: str) -> Any:
    return lmdb.open(path, subdir=False, readonly=True, lock=False, create=False, max_dbs=3)


def _chunks(txn: Any, db: Any, path: str) -> Iterator[list[tuple[bytes, bytes]]]:
    """All pairs of a database in lists; _Damaged instead of going round in circles."""
    budget = os.stat(path).st_size
    pairs = iter(txn.cursor(db=db))
    while chunk := list(itertools.islice(pairs, CHUNK_RECORDS)):
        budget -= len(chunk) * PAIR_BYTES_MIN
        if budget < 0:
            raise _Damaged("it holds more than its size allows")
        yield chunk


def _scan(path: str, out: BinaryIO) -> None:
    with _open(path) as env, env.begin() as txn:
        last, damaged, ordered = b"", 0, True
        for chunk in _chunks(txn, env.open_db(SLOTS, txn, create=False), path):
            keys, values = zip(*chunk, strict=True)
            ordered = ordered and last < keys[0] and all(map(operator.lt, keys, keys[1:]))
            last = keys[-1]
            lengths = set(map(len, values))
            if len(lengths) == 1 and set(map(len, keys)) == {KEY.size}:
                _write_chunk(out, keys, values)
                continue
            for length in lengths:
                some = [pair for pair in chunk if len(pair[1]) == length]
                good = [pair for pair in some if len(pair[0]) == KEY.size]
                damaged += len(some) - len(good)
                if good:
                    _write_chunk(out, *zip(*good, strict=True))
        layouts = {}
        for key, value in _pairs(txn, env.open_db(LAYOUTS, txn, create=False), path):
            try:
                layouts[LAYOUT_KEY.unpack(key)[0]] = value.decode()
            except (struct.error, UnicodeDecodeError):
                damaged += 1
        meta = dict(_pairs(txn, env.open_db(META, txn, create=False), path))
    out.write(CHUNK.pack(0, 0))
    names = {name.decode(errors="replace"): value.hex() for name, value in meta.items()}
    rest = {"meta": names, "layouts": layouts, "damaged": damaged, "ordered": ordered}
    out.write(json.dumps(rest).encode())


def _pairs(txn: Any, db: Any, path: str) -> Iterator[tuple[bytes, bytes]]:
    return itertools.chain.from_iterable(_chunks(txn, db, path))


def _write_chunk(out: BinaryIO, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
    out.write(CHUNK.pack(len(values[0]), len(keys)))
    out.write(b"".join(keys))
    out.write(b"".join(values))


def _rewrite(path: str, fresh: str) -> None:
    size = 4 * os.stat(path).st_size + (64 << 20)
    with _open(path) as old, old.begin() as source:
        with _writing():
            new = lmdb.open(fresh, subdir=False, lock=False, max_dbs=3, map_size=size, mode=0o600)
            target = new.begin(write=True)
        for name in (META, LAYOUTS, SLOTS):
            chunks = _chunks(source, old.open_db(name, source, create=False), path)
            with _writing():
                db = new.open_db(name, target)
            last = b""
            for chunk in chunks:
                with _writing():
                    for key, value in chunk:
                        if name != SLOTS or _is_well_formed(key, value):
                            target.put(key, value, append=key > last, db=db)
                            last = max(last, key)
        with _writing():
            target.commit()
            new.close()


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Trouble with the new file is the system's and no verdict on the old one."""
    try:
        yield
    except lmdb.Error as error:
        raise OSError(f"cannot write it: {error}") from error


def _is_well_formed(key: bytes, value: bytes) -> bool:
    if len(key) != KEY.size or len(value) < VALUE.size:
        return False
    return are_lengths(len(value), value[VALUE.size - 1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
