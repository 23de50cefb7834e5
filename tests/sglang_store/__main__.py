"""Build the environment with SGLang if there is none, and run the scenarios in it.

python -m tests.sglang_store [storage|engine]     # both, unless one is named
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.sglang_store import environment

FOLDER = Path(__file__).parent
SCENARIOS = {"storage": "scenarios.py", "engine": "engine_scenarios.py"}
LIMIT_S = 3_600.0


def main() -> int:
    """The exit status of the scenarios."""
    parser = argparse.ArgumentParser(prog="python -m tests.sglang_store", description=__doc__)
    parser.add_argument("which", nargs="*", choices=[*SCENARIOS, []], default=[])
    which = parser.parse_args().which or list(SCENARIOS)
    environment.build()
    files = [str(FOLDER / SCENARIOS[one]) for one in which]
    command = [sys.executable, "-m", "pytest", "-q", f"--timeout={LIMIT_S:.0f}", *files]
    try:
        return subprocess.run(command, cwd=environment.ROOT, timeout=LIMIT_S).returncode
    except subprocess.TimeoutExpired:
        sys.stderr.write(f"the scenarios did not end within {LIMIT_S:g} s\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
