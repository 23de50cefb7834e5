"""kvikio's own code on host memory, under a driver that is made up. Run by test_cufile.py, in a
process of its own: neither that driver nor kvikio's settings are to be met by other tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.cufile import CuFiles
from kvstore.types import KIB, MIB
from tests.device_files import Contract, Memory, Open, written


@pytest.fixture
def open_files() -> Open:
    def open_files(paths: Sequence[Path], *, writable: bool = False) -> CuFiles:
        return CuFiles(paths, 0, writable=writable, threads=4)

    return open_files


class TestCuFiles(Contract):
    """See Contract."""


def test_it_is_not_taken_for_the_direct_way(open_files: Open, tmp_path: Path) -> None:
    written(tmp_path / "a", 4 * KIB)
    assert "KVIKIO_COMPAT_MODE" not in os.environ, "chosen by what the kernel lacks"
    files = open_files([tmp_path / "a"])
    files.close()
    assert (files.name, files.direct) == ("gds", False)
    assert files.how == "cuFile in compatibility mode"


def test_kvikio_is_set_up(open_files: Open, tmp_path: Path) -> None:
    import kvikio.defaults

    open_files([]).close()
    wanted = {"num_threads": 4, "task_size": 4 * MIB, "bounce_buffer_size": 4 * MIB}
    wanted |= {"auto_direct_io_read": True, "auto_direct_io_write": True}
    assert {name: kvikio.defaults.get(name) for name in wanted} == wanted


def test_more_pieces_than_may_be_in_flight(tmp_path: Path) -> None:
    content, memory = written(tmp_path / "a", 2 * MIB), Memory(2 * MIB)
    files = CuFiles([tmp_path / "a"], 0, threads=3, task_bytes=16 * KIB, in_flight_max=5)
    files.read(0, 0, memory.address, 2 * MIB)
    files.close()
    assert bytes(memory) == content


@pytest.mark.parametrize(
    "wrong", [{"threads": 0}, {"threads": 65}, {"in_flight_max": 129}, {"task_bytes": 5_000}]
)
def test_what_would_hang_or_crawl_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give whole"):
        CuFiles([], 0, **wrong)
