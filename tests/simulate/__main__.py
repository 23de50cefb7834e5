"""One history, or many: `python -m tests.simulate --seed N --steps M [--seeds COUNT]`.

Exit status 1 when one of them fails, with what is needed to see it again; or when so many of them
as make up a test run have not met everything that they are to meet.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

from tests.simulate.runs import MARKS, SEEDS, STEPS, quiet, simulate
from tests.simulate.world import Failure


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulate")
    parser.add_argument("--seed", type=int, default=0, help="the first, or the only one")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=1, help="so many, one after the other")
    options = parser.parse_args()
    started, marks, steps = time.monotonic(), Counter[str](), 0
    with quiet():
        for seed in range(options.seed, options.seed + options.seeds):
            try:
                world = simulate(seed, options.steps)
            except Failure as failure:
                traceback.print_exception(failure.__cause__)
                sys.stderr.write(f"{failure}\n")
                return 1
            marks.update(world.marks)
            steps += world.step
            if options.seeds == 1:
                sys.stdout.write(f"trace {world.trace.hexdigest()}\n")
    for name, count in sorted(marks.items()):
        sys.stdout.write(f"{count:10}  {name}\n")
    seconds = time.monotonic() - started
    sys.stdout.write(f"{options.seeds} seeds, {steps} steps, {seconds:.1f} s\n")
    missed = MARKS - {name for name, count in marks.items() if count}
    if options.seeds >= SEEDS and missed:
        sys.stderr.write(f"never met: {sorted(missed)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
