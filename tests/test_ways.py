"""Which way bytes go between NVMe and GPUs: measured, told, and refused where it cannot be had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from kvstore import cufile, ways
from kvstore.checksums import seed
from kvstore.cufile import BouncedFiles, DeviceMemory
from kvstore.tiers.hbm import HbmArena
from kvstore.tiers.nvme import NvmeFiles
from kvstore.types import MIB
from kvstore.ways import Ways, WaysConfig
from tests.host_gpu import HostGpu

SLAB = 4 * MIB
BLOCK = bytes(range(256)) * 1024


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[NvmeFiles]:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    files = NvmeFiles.open(folders, 8 * SLAB, SLAB)
    yield files
    files.close()


@pytest.fixture
def arenas(tmp_path: Path) -> Iterator[list[HbmArena]]:
    made = [HbmArena(HostGpu(tmp_path, number), 8 * MIB) for number in range(2)]
    yield made
    for arena in made:
        arena.close()


def make(tmp_path: Path, arenas: Sequence[HbmArena], engine: str = "auto") -> Ways:
    config = WaysConfig(
        tenant="t",
        engine=engine,  # type: ignore[arg-type]
        sums="host",
        paths=[tmp_path / "a/blocks.kv", tmp_path / "b/blocks.kv"],
        size_bytes=8 * SLAB,
        slab_bytes=SLAB,
    )
    return Ways(config, arenas)


class OtherWay(BouncedFiles):
    """Stands for cuFile: counts its reads, and is as fast as it is told to be."""

    name, how = "gds", "a way made up for this test"
    slow = False
    reads = 0
    gpus: Sequence[DeviceMemory] = ()

    def __init__(self, paths: Sequence[Path], device: int) -> None:
        super().__init__(paths, self.gpus[device], threads=4)

    def read(self, file: int, position: int, address: int, size: int) -> None:
        type(self).reads += 1
        for _ in range(30 if self.slow else 1):
            super().read(file, position, address, size)


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch, arenas: list[HbmArena]) -> type[OtherWay]:
    class Other(OtherWay):
        gpus = tuple(arena.gpu for arena in arenas)

    class Slow(BouncedFiles):
        """The way by the host, slower than it is."""

        def read(self, file: int, position: int, address: int, size: int) -> None:
            for _ in range(1 if Other.slow else 30):
                super().read(file, position, address, size)

    monkeypatch.setattr(cufile, "CuFiles", Other)
    monkeypatch.setattr(cufile, "BouncedFiles", Slow)
    return Other


def test_without_devices_nothing_is_measured(tmp_path: Path, nvme: NvmeFiles) -> None:
    found = make(tmp_path, [])
    found.choose()
    assert (found.engine, found.speeds) == ("posix", {})
    assert "no [[hbm]] device" in found.why
    assert found.to(0) is None


def test_posix_when_it_is_asked_for(
    tmp_path: Path, nvme: NvmeFiles, arenas: list[HbmArena], other: type[OtherWay]
) -> None:
    found = make(tmp_path, arenas, "posix")
    found.choose()
    assert (found.engine, other.reads) == ("posix", 0)


def test_gds_that_cannot_be_had(
    tmp_path: Path, nvme: NvmeFiles, arenas: list[HbmArena], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, it is an error that says what is missing; else it is told, and done without."""

    def missing() -> None:
        raise OSError(19, "no CUDA driver here: install it, or use posix")

    monkeypatch.setattr(cufile, "load", missing)
    for devices in (arenas, []):
        with pytest.raises(OSError, match="no CUDA driver here"):
            make(tmp_path, devices, "gds").choose()
    found = make(tmp_path, arenas)
    found.choose()
    assert found.engine == "posix"
    assert "no CUDA driver here" in found.why
    assert found.told()["engine_why"] == found.why


def test_the_faster_way_is_taken(
    tmp_path: Path, nvme: NvmeFiles, arenas: list[HbmArena], other: type[OtherWay]
) -> None:
    found = make(tmp_path, arenas)
    found.choose()
    assert found.engine == "gds"
    assert found.speeds["gds"] > found.speeds["posix"] > 0
    assert "a way made up for this test" in found.why
    other.slow = True
    found = make(tmp_path, arenas)
    found.choose()
    assert found.engine == "posix"
    assert found.to(0) is None


def test_late_nothing_is_measured(
    tmp_path: Path, nvme: NvmeFiles, arenas: list[HbmArena], other: type[OtherWay]
) -> None:
    """Blocks may be in the memory that would be read into."""
    arenas[0].write(0, memoryview(BLOCK))
    found = make(tmp_path, arenas)
    found.choose(late=True)
    assert found.engine == "posix"
    kept = bytearray(len(BLOCK))
    arenas[0].read(0, memoryview(kept))
    assert kept == BLOCK


def test_every_device_is_reached_and_every_byte_checked(
    tmp_path: Path, nvme: NvmeFiles, arenas: list[HbmArena], other: type[OtherWay]
) -> None:
    found = make(tmp_path, arenas, "gds")
    found.choose()
    first = seed(b"f" * 16, b"key", 0)
    right = xxh3_64_intdigest(BLOCK, first)
    for number, arena in enumerate(arenas):
        way = found.to(number)
        assert way is not None
        for slab in range(8):
            offset = slab * SLAB + 8192
            nvme.write(offset, memoryview(BLOCK))
            place = arena.address(slab * len(BLOCK), len(BLOCK))
            assert way(offset, place, len(BLOCK), first, right)
            got = bytearray(len(BLOCK))
            arena.read(slab * len(BLOCK), memoryview(got))
            assert got == BLOCK
            assert not way(offset, place, len(BLOCK), first, right ^ 1)
    found.close()
    assert found.to(0) is None
    assert ways.SAMPLE_BYTES <= SLAB
