"""One history, or many: `python -m tests.simulate --seed N --steps M [--seeds COUNT]`."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulate.runs import STEPS, quiet, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulate", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first, or the only one")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=1, help="so many, one after the other")
    options = parser.parse_args()
    started, marks, steps = time.monotonic(), Counter[str](), 0
    with quiet():
        for seed in range(options.seed, options.seed + options.seeds):
            world = simulate(seed, options.steps)
            marks.update(world.marks)
            steps += world.step
            if options.seeds == 1:
                sys.stdout.write(f"trace {world.trace.hexdigest()}\n")
    for name, count in sorted(marks.items()):
        sys.stdout.write(f"{count:10}  {name}\n")
    seconds = time.monotonic() - started
    sys.stdout.write(f"{options.seeds} seeds, {steps} steps, {seconds:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
