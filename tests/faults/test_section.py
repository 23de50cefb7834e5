"""The hidden section [faults]: unseen when unset, loud when set, and it reaches the files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kvstore import config
from kvstore.disk import Disk, DiskConfig
from kvstore.errors import InvalidConfig
from kvstore.tiers.faults import Fault, FaultPlan, FaultyTier, Rate
from tests.faults.host import MIB, Settings


def parse(folder: Path, faults: dict[str, object], **environ: str) -> config.Config:
    tree = Settings(folder).tree | {"faults": faults}
    return config.parse(tree, environ, "test")


def test_nobody_sees_it_unless_it_is_set(tmp_path: Path) -> None:
    plain = parse(tmp_path, {})
    assert plain.faults.plan is None
    assert "faults." not in plain.describe()
    assert plain.warnings() == []
    given = parse(tmp_path, {"flip": 0.25, "seed": 3}, KVSTORE_FAULTS_READ_ERROR="0.5")
    assert given.faults.plan == FaultPlan(
        rates=(Rate(Fault.EIO, 0.5, "read"), Rate(Fault.FLIP, 0.25)), seed=3, hang_s=10.0
    )
    assert "faults.flip = 0.25" in given.describe()
    assert "fail on purpose" in "".join(given.warnings())
    assert config.reloadable_changes(plain, given)[0] == [], "it takes a restart"


def test_every_fault_has_a_key(tmp_path: Path) -> None:
    keys = [one for one in config.Faults.model_fields if one not in ("seed", "latency")]
    keys.remove("hang_time")
    plan = parse(tmp_path, dict.fromkeys(keys, 1), KVSTORE_FAULTS_HANG_TIME="0").faults.plan
    assert plan is not None
    assert {rate.fault for rate in plan.rates} == set(Fault)
    assert {rate.verb for rate in plan.rates} == {"", "read", "write", "sync"}
    assert plan.hang_s is None


@pytest.mark.parametrize("value", [-0.1, 1.1, "often", True])
def test_a_chance_is_a_number_of_0_to_1(tmp_path: Path, value: object) -> None:
    with pytest.raises(InvalidConfig, match=r"faults\.torn = .*write a number of 0 to 1"):
        parse(tmp_path, {"torn": value})


def test_the_files_are_wrapped_when_it_is_set(tmp_path: Path) -> None:
    given = DiskConfig(
        tenant="t",
        folders=(tmp_path / "a" / "b",),
        size_bytes=2 * MIB,
        slab_bytes=MIB,
        sync_interval_s=3_600.0,
    )
    plan = FaultPlan(rates=(Rate(Fault.EIO, 1.0),))
    for one, raises in ((given, False), (dataclasses.replace(given, faults=plan), True)):
        disk = Disk(one, lambda index, loaded: None)
        disk.open()
        assert isinstance(disk.files, FaultyTier) is raises
        try:
            disk.write(0, memoryview(bytes(4096)))
            assert not raises
        except OSError:
            assert raises
        assert disk.index is not None
        disk.index.put(0, 1, 1, b"12345678", b"8 bytes.")
        assert disk.index.flush(0.05 if raises else 10.0) is not raises, "the sync fails, too"
        disk.index.close(10.0)
        disk.close()
