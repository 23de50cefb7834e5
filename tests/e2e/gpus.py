"""kvstored with GPUs of host memory, which lie in a folder.

    python -m tests.e2e.gpus FOLDER --config FILE

Nothing else differs from `python -m kvstore.daemon`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvstore import daemon, tenant
from tests.host_gpu import HostGpu

FOLDER = Path(sys.argv[1])


def _open(device: int) -> HostGpu:
    return HostGpu(FOLDER, device)


if __name__ == "__main__":
    setattr(tenant, "open_gpu", _open)  # noqa: B010  # in place of a function
    daemon.main(sys.argv[2:])
