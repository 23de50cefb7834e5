"""The whole check, cheapest step first: format, lint, types, tests. Stops where one fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS = (
    ("format", ["ruff", "format", "--check", "."]),
    ("lint", ["ruff", "check", "."]),
    ("types", ["mypy"]),
    ("tests", ["pytest", "-q"]),
)


def main() -> int:
    """Exit status of the first step that fails, or 0. Arguments go to pytest."""
    for name, command in STEPS:
        extra = sys.argv[1:] if name == "tests" else []
        sys.stdout.write(f"== {name}: {' '.join(command + extra)}\n")
        sys.stdout.flush()
        done = subprocess.run([sys.executable, "-m", *command, *extra], cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
