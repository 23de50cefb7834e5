"""Runs of the brain beside its model: `python -m tests.brain --seed N --seeds COUNT [--steps M]`.

Prints the traceback of each that fails, and goes on. Exit status 1 when any did.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from tests.brain.seeded import STEPS, Seeded


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.brain")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    started, failed = time.monotonic(), list[int]()
    for seed in range(options.seed, options.seed + options.seeds):
        try:
            Seeded(seed).run(options.steps)
        except Exception:
            traceback.print_exc()
            failed.append(seed)
    seconds = time.monotonic() - started
    sys.stdout.write(f"{options.seeds} seeds in {seconds:.0f} s, failed: {failed or 'none'}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
