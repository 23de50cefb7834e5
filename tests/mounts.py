"""Mounts for tests that need one of their own: a small tmpfs, and hugetlbfs with pages in its pool.

Both take root, and are skipped without it; what was changed is changed back.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import filesystems

PAGE_BYTES = 2 << 20
_SETTING = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@contextlib.contextmanager
def _mounted(kind: str, options: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip(f"mounting {kind} takes root")
    with tempfile.TemporaryDirectory(prefix="kvmount-", dir="/tmp") as folder:
        command = ["mount", "-t", kind, "-o", options, "none", folder]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            pytest.skip(f"{kind} cannot be mounted: {ran.stderr.strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def tmpfs(size_bytes: int) -> contextlib.AbstractContextManager[Path]:
    """A folder on a tmpfs of this size."""
    return _mounted("tmpfs", f"size={size_bytes}")


@contextlib.contextmanager
def hugetlbfs(pages: int) -> Iterator[Path]:
    """A folder on hugetlbfs with so many pages of 2 MiB free."""
    with _mounted("hugetlbfs", "pagesize=2M,mode=0755") as folder, contextlib.ExitStack() as undo:
        missing = pages - filesystems.pool(PAGE_BYTES).available
        if missing > 0:
            before = _SETTING.read_text()
            undo.callback(_SETTING.write_text, before)
            _SETTING.write_text(str(int(before) + missing))
        if filesystems.pool(PAGE_BYTES).available < pages:
            pytest.skip(f"the kernel gives no {pages} huge pages")
        yield folder
