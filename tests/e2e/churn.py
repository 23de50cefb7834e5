"""One client process of `test_processes`: threads that put, get and hold overlapping chains.

    python -m tests.e2e.churn SOCKET SEED SECONDS

The content of a block follows from its hash, so whatever is read can be checked, whoever wrote it.
Prints one line of JSON: how many blocks it stored, read and found wrong.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter

from kvstore.client import Cache, connect
from tests.e2e.harness import content, hashes, layout, targets

CHAINS, LENGTH, THREADS = 12, 40, 4
SIZES = (16 << 10, 40_001)


def check(keys: list[bytes], buffers: list[bytearray], size: int, counts: Counter[str]) -> None:
    for key, buffer in zip(keys, buffers, strict=True):
        counts["read"] += 1
        counts["wrong"] += buffer != content(key, size)


def step(cache: Cache, rng: random.Random, counts: Counter[str]) -> None:
    size = cache.layout.block_bytes
    # Chains share their first blocks, as prompts do.
    chain = rng.randrange(CHAINS)
    keys = hashes(8, "shared") + hashes(LENGTH - 8, f"chain {chain}", start=8)
    keys = keys[: rng.randint(1, LENGTH)]
    what = rng.random()
    if what < 0.4:
        put = cache.put(keys, [content(key, size) for key in keys], deadline_s=0.2)
        counts["stored"] += put.stored
        # Less when another client forgets a block before it is committed.
        assert put.stored + put.present + put.refused <= len(keys)
    elif what < 0.7:
        into = targets(len(keys), size)
        length = cache.get(keys, into, deadline_s=0.5).length
        check(keys[:length], into[:length], size, counts)
    elif what < 0.85:
        with cache.acquire(keys, deadline_s=0.1) as grant:
            copies = [bytearray(grant.view(at)) for at in range(grant.length)]
            held = grant.release()
        if held:
            check(keys[: len(copies)], copies, size, counts)
    elif what < 0.95:
        reservation = cache.reserve(keys, deadline_s=0.05)
        for at, index in enumerate(reservation.indices):
            reservation.numpy(at)[:] = bytearray(content(keys[index], size))
        if rng.random() < 0.5:
            counts["stored"] += reservation.commit()
        else:
            reservation.abort()
    elif what < 0.98:
        cache.lookup(keys)
        cache.prefetch(keys)
    else:
        cache.forget(keys[rng.randrange(len(keys)) :])


def main() -> None:
    """Run for the time given; any exception ends the process with a traceback."""
    socket, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    counts = [Counter[str]() for _ in range(THREADS)]
    failures: list[BaseException] = []
    with connect(socket) as client:
        caches = [client.open(layout("churn", shard_bytes=size)) for size in SIZES]
        end = time.monotonic() + seconds

        def run(number: int) -> None:
            rng = random.Random(f"{seed}/{number}")
            try:
                while time.monotonic() < end and not failures:
                    step(rng.choice(caches), rng, counts[number])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    sys.stdout.write(json.dumps(sum(counts, Counter[str]())))


if __name__ == "__main__":
    main()
