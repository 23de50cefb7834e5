"""kvstored over NVMe files that a test can hold up: a slow device, exactly as slow as wanted.

    python -m tests.e2e.gated FOLDER --config FILE

Reads wait while the file FOLDER/hold-read exists, writes while FOLDER/hold-write does, probes while
either does. Nothing else differs from `python -m kvstore.daemon`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from kvstore import daemon, disk
from kvstore.tiers.nvme import NvmeFiles

POLL_S = 0.002
FOLDER = Path(sys.argv[1])


def _pass(gate: str) -> None:
    while (FOLDER / gate).exists():
        time.sleep(POLL_S)


class GatedFiles(NvmeFiles):
    """The files, behind two gates."""

    def read(self, offset: int, into: memoryview) -> None:
        _pass("hold-read")
        super().read(offset, into)

    def write(self, offset: int, data: memoryview) -> None:
        _pass("hold-write")
        super().write(offset, data)

    def probe(self) -> None:
        _pass("hold-read")
        _pass("hold-write")
        super().probe()


if __name__ == "__main__":
    setattr(disk, "NvmeFiles", GatedFiles)  # noqa: B010  # in place of a class
    daemon.main(sys.argv[2:])
