"""Is there an order that explains what many threads saw? A history of operations, checked.

Each key is a register that is absent or holds a version. A put stores its version if the key is
absent, a forget makes it absent, a get sees what is there. Versions are never used twice, so what a
get saw names the put that it came from. Every operation took effect at one instant between its
start and its end; that instant is not known, so something is wrong only if no choice explains it:

    stranger    a read of a version that nobody had begun to commit under that key by its end
    stale       a read, begun after a forget had ended that began after the commit had ended
    overlap     two versions, each of which was surely there during a time of the other
    miss        absent, though a commit had ended before and no forget can have come in between
    twice       stored, where an earlier commit had ended and no forget can have come in between
    ghost       present, though since a forget had ended no commit can have come

A history is a table of integers, one row for each operation on one key.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

KEY, KIND, VERSION, START, END = range(5)
COLUMNS = 5
# What an operation on one key came to. MAYBE: a commit of several keys that stored some of them.
COMMIT, READ, PRESENT, ABSENT, FORGET, MAYBE = KINDS = range(6)
NEVER, ALWAYS = np.iinfo(np.int64).max, np.iinfo(np.int64).min

Rows = np.ndarray


def check(history: Rows) -> Counter[str]:
    """Violations by kind; empty when there is none."""
    found: Counter[str] = Counter()
    for key in np.unique(history[:, KEY]):
        rows = history[history[:, KEY] == key]
        of = [rows[rows[:, KIND] == kind] for kind in KINDS]
        commits, reads, present, absent, forgets, maybe = of
        possible = np.concatenate([commits, maybe])
        found["stranger"] += _strangers(possible, reads)
        found["stale"] += _stale(possible, reads, forgets)
        found["overlap"] += _overlaps(commits, reads)
        found["miss"] += _without_forget(commits, absent, forgets)
        found["twice"] += _without_forget(commits, commits, forgets)
        found["ghost"] += _ghosts(possible, present, forgets)
    return +found


def _commits_of(commits: Rows, versions: Rows) -> tuple[Rows, Rows]:
    """The place of each version among the commits, and whether it is there at all."""
    order = np.argsort(commits[:, VERSION])
    if not len(order):
        return np.zeros(len(versions), np.int64), np.zeros(len(versions), bool)
    known = commits[order, VERSION]
    at = np.minimum(np.searchsorted(known, versions), len(known) - 1)
    return order[at], known[at] == versions


def _strangers(commits: Rows, reads: Rows) -> int:
    at, there = _commits_of(commits, reads[:, VERSION])
    if not len(commits):
        return len(reads)
    return int(np.sum(~there | (commits[at, START] > reads[:, END])))


def _stale(commits: Rows, reads: Rows, forgets: Rows) -> int:
    """A forget that lies wholly between the end of the commit and the start of the read."""
    if not (len(commits) and len(forgets)):
        return 0
    at, there = _commits_of(commits, reads[:, VERSION])
    forgets = forgets[np.argsort(forgets[:, START])]
    # The earliest end of all forgets that start at or after each.
    earliest = np.minimum.accumulate(forgets[::-1, END])[::-1]
    earliest = np.append(earliest, NEVER)
    after = np.searchsorted(forgets[:, START], commits[at, END], side="right")
    return int(np.sum(there & (earliest[after] < reads[:, START])))


def _overlaps(commits: Rows, reads: Rows) -> int:
    """Zones (Gibbons and Korach): a version was there from the end of some operation on it to the
    start of a later one. No two such zones may overlap, and an operation that saw a version must
    not lie wholly within the zone of another."""
    every = np.concatenate([commits, reads])
    if not len(every):
        return 0
    versions, of = np.unique(every[:, VERSION], return_inverse=True)
    first_end = np.full(len(versions), NEVER)
    last_start = np.full(len(versions), ALWAYS)
    np.minimum.at(first_end, of, every[:, END])
    np.maximum.at(last_start, of, every[:, START])
    forward = first_end < last_start
    begin, end = first_end[forward], last_start[forward]
    order = np.argsort(begin)
    begin, end = begin[order], end[order]
    reach = np.maximum.accumulate(end) if len(end) else end
    count = int(np.sum(begin[1:] < reach[:-1]))
    # Versions whose operations all overlap each other: the instant lies in [last_start, first_end].
    low, high = last_start[~forward], first_end[~forward]
    at = np.searchsorted(begin, low, side="left") - 1  # the last zone that begins before
    inside = (at >= 0) & (len(end) > 0)
    if len(end):
        inside &= end[np.maximum(at, 0)] > high
    return count + int(np.sum(inside))


def _without_forget(commits: Rows, later: Rows, forgets: Rows) -> int:
    """Rows that saw the key absent, though a commit had ended before they started and no forget
    overlaps the time from the start of that commit to their end."""
    if not len(commits):
        return 0
    commits = commits[np.argsort(commits[:, END])]
    # Of all commits that ended before, the one that started last is the hardest to explain away.
    latest = np.maximum.accumulate(commits[:, START])
    before = np.searchsorted(commits[:, END], later[:, START], side="left")
    later, before = later[before > 0], before[before > 0]
    since = latest[before - 1]
    return int(np.sum(~_any_overlaps(forgets, since, later[:, END])))


def _any_overlaps(forgets: Rows, begin: Rows, end: Rows) -> Rows:
    """For each span, whether some forget overlaps it."""
    if not len(forgets):
        return np.zeros(len(begin), bool)
    forgets = forgets[np.argsort(forgets[:, START])]
    latest = np.maximum.accumulate(forgets[:, END])
    count = np.searchsorted(forgets[:, START], end, side="left")  # those that start before its end
    found: Rows = (count > 0) & (latest[np.maximum(count, 1) - 1] > begin)
    return found


def _ghosts(commits: Rows, present: Rows, forgets: Rows) -> int:
    """Rows that saw the key present, though a forget had ended before they started and no commit
    overlaps the time from the start of that forget to their end; or before any commit."""
    before_all = int(commits[:, START].min()) if len(commits) else NEVER
    early = int(np.sum(present[:, END] < before_all))
    return early + _without_forget(forgets, present[present[:, END] >= before_all], commits)
