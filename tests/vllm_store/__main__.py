"""Builds what is needed and runs the scenarios: python -m tests.vllm_store [--version V] [-k K]."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.vllm_store import environment


def main() -> int:
    """0 when every scenario held, for every version."""
    parser = argparse.ArgumentParser(prog="python -m tests.vllm_store", description=__doc__)
    parser.add_argument("--version", choices=(*environment.VERSIONS, "all"), default="all")
    parser.add_argument("-k", default="", help="only scenarios of such names")
    given = parser.parse_args()
    chosen = environment.VERSIONS if given.version == "all" else (given.version,)
    codes = []
    for version in chosen:
        environment.build(environment.BASE)
        environment.build(version)
        print(f"vLLM {version}", flush=True)  # noqa: T201
        file = Path(__file__).with_name("scenarios.py")
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--timeout=1800", str(file)]
        codes.append(
            subprocess.run(
                [*command, *(["-k", given.k] if given.k else [])],
                cwd=environment.ROOT,
                env={**os.environ, "ENGINE_VERSION": version, "PYTHONUNBUFFERED": "1"},
            ).returncode
        )
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
