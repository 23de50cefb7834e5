"""The recorder and its file: what goes in comes out, whatever happens to disk, daemon and file."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import recorder as recorder_module
from kvstore import trace_file
from kvstore.accesses import Access, AccessKind
from kvstore.belady import Belady, endless, uses_of
from kvstore.catalog import LayoutEntry
from kvstore.recorder import MAX_BYTES_LEAST, Files, Recorder
from kvstore.trace_file import FRAME, HEADER, part_path, read
from kvstore.traces import ASKED, OFFERED, Chains, Sizes, Trace
from kvstore.types import Layout

SIZES = Sizes(dram_bytes=1 << 30, nvme_bytes=1 << 32, slab_bytes=1 << 20, write_policy="on-evict")
PENDING = 2


def entry(number: int = 0, *, block_tokens: int = 16) -> LayoutEntry:
    layout = Layout(
        model=f"secret model {number}", engine="e", dtype="d", block_tokens=block_tokens,
        shard_bytes=4096,
    )  # fmt: skip
    return LayoutEntry(number, layout)


def key(*path: int) -> bytes:
    return hashlib.sha256(repr(path).encode()).digest()


def chain(*path: int) -> list[bytes]:
    return [key(*path[:end]) for end in range(1, len(path) + 1)]


def asked(
    keys: Sequence[bytes], now: float, *, of: LayoutEntry | None = None, **more: object
) -> Access:
    return Access(AccessKind.ASKED, of or ENTRY, keys, now=now, **({"skip": 0} | more))  # type: ignore[arg-type]


ENTRY = entry()


class Held:
    """A medium in memory that can be held, and that can fail."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Semaphore(0)
        self.fails: OSError | None = None

    def begin(self, header: bytes) -> None:
        self._pass()
        self.parts.append(header)

    def write(self, frame: bytes) -> None:
        self._pass()
        self.parts[-1] += frame

    def close(self) -> None:
        pass

    def files(self) -> tuple[int, int]:
        return len(self.parts), sum(map(len, self.parts))

    def _pass(self) -> None:
        self.entered.release()
        self.go.wait()
        if self.fails is not None:
            raise self.fails

    def save(self, path: Path) -> Path:
        for age, part in enumerate(reversed(self.parts)):
            part_path(path, age).write_bytes(part)
        return path


def record(
    medium: Held | Files, accesses: Sequence[Access], *, max_bytes: int = MAX_BYTES_LEAST
) -> Recorder:
    """Record all of it and stop."""
    opened = threading.Event()
    recorder = Recorder(medium, SIZES, 0.0, lambda error: opened.set(), max_bytes)
    assert opened.wait(10)
    for access in accesses:
        recorder.observe(access)
    end(recorder)
    return recorder


def end(recorder: Recorder) -> None:
    recorder.stop(1e6)
    recorder.writer.join(20)
    assert not recorder.writer.is_alive()


def shown(trace: Trace) -> list[tuple[object, ...]]:
    """Each step as what can be compared: its chain by blocks."""
    chains = Chains(trace.parents.tolist(), trace.keys.tolist())
    names = ("kind", "layout", "skip", "length", "put", "hit", "slow", "reuse", "tag", "again")
    return [
        (float(step["t"]), tuple(chains.to(int(step["leaf"]))), *(int(step[n]) for n in names))
        for step in trace.steps
    ]  # fmt: skip


ACCESS = st.tuples(
    st.lists(st.integers(0, 2), max_size=6),
    st.sampled_from(list(AccessKind)),
    st.integers(0, 1),
    st.integers(0, 6),
    st.sampled_from(["unknown", "continue", "done"]),
    st.sampled_from(["", "a", "b"]),
)
ENTRIES = [entry(0), entry(1, block_tokens=32)]


@settings(max_examples=100, deadline=None)
@given(found=st.lists(ACCESS, min_size=1, max_size=30))
def test_what_is_observed_is_read_back(
    found: list[tuple[list[int], AccessKind, int, int, str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace"
    accesses, expected, tags = [], [], {"": 0}
    for now, (steps, kind, layout, skip, reuse, tag) in enumerate(found):
        keys = chain(*steps)
        skip = min(skip, len(keys))
        granted = (len(keys) - skip) // 2 if kind is AccessKind.ASKED else 0
        accesses.append(
            Access(kind, ENTRIES[layout], keys, skip, float(now), granted, granted // 2,
                   len(keys) - skip - granted, 1, 100.0, reuse, tag)
        )  # fmt: skip
        tags.setdefault(tag, len(tags))
        is_asked = kind is AccessKind.ASKED
        expected.append(
            (len(keys), skip, skip + granted if is_asked else len(keys),
             granted if is_asked else -1, tags[tag])
        )  # fmt: skip
    recorder = record(Files(path), accesses)
    trace = read(path)
    assert recorder.counts()[:2] == (len(accesses), 0) and not trace.warnings
    assert trace.sizes == SIZES
    chains = Chains(trace.parents.tolist(), trace.keys.tolist())
    blocks: dict[tuple[int, bytes], int] = {}
    for access, wanted, step in zip(accesses, expected, trace.steps, strict=True):
        assert (step["length"], step["skip"], step["put"], step["hit"], step["tag"]) == wanted
        assert trace.shapes[step["layout"]].block_tokens == access.entry.layout.block_tokens
        assert float(step["t"]) == access.now and step["tokens_per_s"] == 100.0
        assert ("unknown", "continue", "done")[step["reuse"]] == access.reuse
        assert step["kind"] == (ASKED if access.kind is AccessKind.ASKED else OFFERED)
        for key, block in zip(access.keys, chains.to(int(step["leaf"])), strict=True):
            assert blocks.setdefault((access.entry.number, key), block) == block
    assert len(set(blocks.values())) == len(blocks), "two keys became one block"


def test_a_hash_that_comes_behind_another_chain_stays_the_same_block(tmp_path: Path) -> None:
    a, b, c = b"a" * 32, b"b" * 32, b"c" * 32
    record(
        Files(tmp_path / "trace"), [asked([b, c], 0.0), asked([a, b, c], 1.0), asked([b, c], 2.0)]
    )
    trace = read(tmp_path / "trace")
    chains = Chains(trace.parents.tolist(), trace.keys.tolist())
    first, second, third = (chains.to(int(leaf)) for leaf in trace.steps["leaf"])
    assert len(first) == 2 and first == third == second[1:] and trace.block_count == 3


def test_a_tail_that_is_offered_behind_its_parent_goes_on_with_the_prompt(tmp_path: Path) -> None:
    """Else what bounds a forecast would take it for another one, and be less than what was hit."""
    keys = chain(1, 2, 3, 4, 5)
    offered = Access(AccessKind.OFFERED, ENTRY, keys[1:4], skip=1, now=2.0)
    record(
        Files(tmp_path / "trace"),
        [
            asked(keys[:2], 0.0, missed=2),
            Access(AccessKind.OFFERED, ENTRY, keys[:2], skip=0, now=0.5),
            asked(keys[:4], 1.0, granted=2, missed=2),
            offered,
            asked(keys, 3.0, granted=4, missed=1),
        ],
    )
    trace = read(tmp_path / "trace")
    tail = trace.steps[3]
    assert (tail["skip"], tail["length"], tail["put"]) == (2, 4, 4) and trace.block_count == 5
    best = Belady(trace, uses_of(trace), 5).run()
    assert endless(trace)[trace.steps["kind"] == ASKED].tolist() == [0, 2, 4]
    assert best[trace.steps["kind"] == ASKED].tolist() == [0, 2, 4]


def test_no_hash_and_no_name_is_in_the_file(tmp_path: Path) -> None:
    keys = chain(*range(50))
    record(Files(tmp_path / "one"), [asked(keys, 0.0, tag="a user's name")])
    record(Files(tmp_path / "two"), [asked(keys, 0.0, tag="a user's name")])
    raw = []
    for name in ("one", "two"):
        content = (tmp_path / name).read_bytes()
        _, raw_size, _ = FRAME.unpack_from(content, HEADER.size)
        frames = list(trace_file._Builder()._frames(tmp_path / name))
        assert len(frames[0][0]) == raw_size
        raw.append(content + b"".join(records for records, _ in frames))
    for text in (b"secret", b"user", ENTRY.fingerprint[:8], *(key[:8] for key in keys)):
        assert text not in raw[0] and text not in raw[1]
    digests = [hashlib.blake2b(key, digest_size=8).digest() for key in keys]
    assert not any(digest in content for digest in digests for content in raw)
    assert raw[0][-400:-60] != raw[1][-400:-60], "the salt is the same in two recordings"
    assert os.stat(tmp_path / "one").st_mode & 0o777 == 0o600


class Counted(list[bytes]):
    """A list of keys that counts how often it is looked into."""

    looks = 0

    def __getitem__(self, at: Any) -> Any:
        self.looks += 1
        return super().__getitem__(at)


def test_a_known_prompt_takes_one_look_and_a_longer_one_those_that_are_new() -> None:
    medium = Held()
    keys = Counted(chain(*range(5_000)))
    longer = Counted([*keys, b"new" * 8, b"more" * 8])
    recorder = Recorder(medium, SIZES, 0.0, lambda error: None)
    recorder.observe(asked(keys, 0.0))
    first, keys.looks = keys.looks, 0
    recorder.observe(asked(keys, 0.0))
    recorder.observe(asked(longer, 0.0))
    end(recorder)
    assert first >= 5_000 and keys.looks == 1 and longer.looks <= 4


# -- what happens to files ------------------------------------------------------------------------


def test_cut_off_anywhere_it_is_read_up_to_there(tmp_path: Path) -> None:
    medium = Held()
    recorder = Recorder(medium, SIZES, 0.0, lambda error: None)
    for now in range(4):
        recorder.observe(asked(chain(now, 1, 2), now * 10.0))  # a frame each: so long apart
    end(recorder)
    path = medium.save(tmp_path / "trace")
    whole = path.read_bytes()
    expected = shown(read(path))
    assert len(expected) == 4
    seen = set()
    for size in range(HEADER.size, len(whole)):
        path.write_bytes(whole[:size])
        cut = read(path)
        steps = shown(cut)
        assert steps == expected[: len(steps)]
        seen.add((len(steps), bool(cut.warnings)))
    assert {count for count, _ in seen} == {0, 2, 3, 4}  # the first frame has two
    assert (0, False) in seen and (3, True) in seen


def test_a_flipped_bit_never_gives_another_trace(tmp_path: Path) -> None:
    medium = Held()
    recorder = Recorder(medium, SIZES, 0.0, lambda error: None)
    for now in range(3):
        recorder.observe(asked(chain(now, 1, 2), now * 10.0))
    end(recorder)
    path = medium.save(tmp_path / "trace")
    whole, expected = path.read_bytes(), shown(read(path))
    for at in range(HEADER.size + FRAME.size, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = read(path)
        steps = shown(found)
        assert steps == expected[: len(steps)]
        assert len(steps) == 3 or found.warnings


def test_parts_are_bounded_and_each_stands_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "REQUEST_BYTES_MAX", 1 << 10)
    monkeypatch.setattr(recorder_module, "BUFFER_BYTES", 4 << 10)
    monkeypatch.setattr(recorder_module, "MAX_BYTES_LEAST", 1 << 17)
    path, bound = tmp_path / "trace", 1 << 17
    medium = Files(path)
    opened = threading.Event()
    recorder = Recorder(medium, SIZES, 0.0, lambda error: opened.set(), bound)
    assert opened.wait(10)
    for now in range(4_000):
        recorder.observe(asked(chain(now, 1, 2, 3), float(now)))
        while recorder._handed - recorder.writer.taken_bytes > 1 << 14:
            threading.Event().wait(0.0001)  # a loop would have other work meanwhile
    end(recorder)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == trace_file.PARTS_MAX == medium.files()[0]
    assert sum(part.stat().st_size for part in parts) == medium.files()[1] <= bound
    newest = read(path)
    assert recorder.dropped == 0 and not newest.warnings
    assert 0 < len(newest.steps) < 4_000, "the oldest part has gone"
    assert newest.reference_count == 4 * len(newest.steps)
    alone = tmp_path / "alone"
    part_path(path, 3).rename(alone)
    found = read(alone)
    assert 0 < len(found.steps) < len(newest.steps)
    assert len(read(path).steps) < len(newest.steps), "what is behind the gap is another matter"


def test_the_numbers_begin_anew_when_too_many_blocks_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "NODES_MAX", 10)
    monkeypatch.setattr(recorder_module, "BUFFER_BYTES", 1)
    accesses = [asked(chain(now % 7, 1, 2), float(now)) for now in range(100)]
    record(Files(tmp_path / "trace"), accesses)
    trace = read(tmp_path / "trace")
    assert len(trace.steps) == 100 and trace.block_count == 21 and not trace.warnings


def test_a_disk_that_takes_no_more_costs_requests_and_nothing_else(tmp_path: Path) -> None:
    medium = Held()
    recorder = Recorder(medium, SIZES, 0.0, lambda error: None)
    recorder.observe(asked(chain(1, 2), 0.0))
    recorder.observe(asked(chain(1, 3), 10.0))  # so late that the buffer goes to the writer
    _until(lambda: recorder.writer.kept == 2)
    medium.fails = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    recorder.observe(asked(chain(1, 4), 20.0))
    _until(lambda: recorder.writer.failures == 1)
    recorder.observe(asked(chain(1, 5), 30.0))  # it builds on what was lost
    medium.fails = None
    recorder.observe(asked(chain(1, 6), 40.0))  # from here on it stands alone
    recorder.observe(asked(chain(1, 6), 50.0))
    end(recorder)
    assert recorder.counts()[:2] == (4, 2)
    trace = read(medium.save(tmp_path / "trace"))
    assert trace.steps["t"].tolist() == [0.0, 10.0, 40.0, 50.0]
    assert trace.dropped == 2 and trace.block_count == 4 and not trace.warnings


def test_a_slow_disk_never_holds_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "QUEUED_BYTES_MAX", 10_000)
    monkeypatch.setattr(recorder_module, "BUFFER_BYTES", 1_000)
    medium = Held()
    recorder = Recorder(medium, SIZES, 0.0, lambda error: None)
    assert medium.entered.acquire(timeout=10)
    medium.go.clear()
    for now in range(2_000):
        recorder.observe(asked(chain(now, 1), 0.0))
    assert recorder.dropped > 1_500 and recorder._handed < 12_000
    medium.go.set()
    end(recorder)
    kept, dropped, _, _ = recorder.counts()
    trace = read(medium.save(tmp_path / "trace"))
    assert kept + dropped == 2_000 and len(trace.steps) == kept and trace.dropped == dropped


FULL = """
import resource, signal, sys, threading
from pathlib import Path
from tests.test_recorder import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
recorder_module.BUFFER_BYTES = 2_000
recorder = record(Files(Path(sys.argv[1])), [asked(chain(n, 1, 2), n * 1.0) for n in range(3_000)])
print(*recorder.counts()[:2])
"""


def test_a_file_that_may_not_grow_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    kept, dropped = map(int, done.stdout.splitlines()[-1].split())
    trace = read(path)
    assert kept + dropped == 3_000 and dropped > 0
    assert len(trace.steps) == kept > 0 and not trace.warnings
    assert path.stat().st_size <= 20_000 < resource.RLIM_INFINITY % (1 << 62)


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    for taken in (path, part_path(path, 3)):
        taken.write_text("mine")
        found: list[OSError | None] = []
        recorder = Recorder(Files(path), SIZES, 0.0, found.append)
        recorder.writer.join(10)
        assert isinstance(found[0], FileExistsError) and found[0].filename == str(taken)
        assert taken.read_text() == "mine"
        taken.unlink()
        assert list(tmp_path.iterdir()) == []


def test_what_is_asked_for_again_counts_once(tmp_path: Path) -> None:
    keys = chain(1, 2, 3, 4)
    record(
        Files(tmp_path / "trace"),
        [
            asked(keys, 0.0, granted=2, stop=PENDING),
            asked(keys, 1.0, skip=2, granted=1, missed=1, stop=1),
        ],
    )
    trace = read(tmp_path / "trace")
    assert trace.request_count == 1 and trace.reference_count == 4
    assert trace.steps["length"].tolist() == [2, 4] and trace.steps["again"].tolist() == [
        True,
        False,
    ]


def test_the_format_is_as_its_description_says() -> None:
    assert HEADER.size == 8 + 16 + 4 + 4 + 8 + 3 * 8 + 8 + 8
    assert FRAME.size == 12 and trace_file.NODES.size == 7
    assert struct.calcsize("<BBBHHIIIIIIBfd") == trace_file.REQUEST.size == 44


def _until(true: Callable[[], bool]) -> None:
    """Another thread will bring it about."""
    for _ in _tries():
        if true():
            return
    raise AssertionError("it did not come about")


def _tries() -> Iterator[None]:
    for _ in range(10_000):
        yield
        threading.Event().wait(0.001)
