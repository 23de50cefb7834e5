"""The GPU benchmark itself, in small, with a fake device: every row is measured, and what is wrong
or missing is told."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvstore.bench_device import contiguous, measure, within
from kvstore.bench_figures import Figure, all_met, report
from kvstore.bench_rig import Rig
from kvstore.client.cuda_fragments import Way
from kvstore.errors import InternalError
from tests.bench import gpu
from tests.bench.rig import SMALL, rehearsal
from tests.client.fake_device import FakeDevice, FakePlatform
from tests.e2e.harness import ROOT


@pytest.fixture
def rig() -> Iterator[Rig]:
    with rehearsal() as rig:
        yield rig


def device_of(rig: Rig) -> FakeDevice:
    device = rig.copier.platform.device(rig.number)
    assert isinstance(device, FakeDevice)
    return device


def test_every_row_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--rehearse", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["version"], tree["rehearsal"], tree["ok"]) == (1, True, True)
    rows = {row["name"]: row for row in tree["rows"]}
    assert [row for row in rows.values() if row["value"] is None] == []
    text = " ".join(rows)
    for part in (
        "D2H 16 x 64 KiB",
        "H2D 16 x 8 fragments",
        "D2D 16 x 64 KiB",
        "first put",
        "gather copies alone",
        "from NVMe",
    ):
        assert part in text
    assert all(row["ok"] is None for row in rows.values()), "a rehearsal has no bars"


def test_the_bars_of_the_product(rig: Rig) -> None:
    """Those that need no model, as `kvstore bench --device` measures them."""
    digest = hashlib.sha256()
    found = measure(rig, (contiguous, within), digest, quiet=True)
    bars = [(figure.name.split()[0], figure.relation, figure.bar) for figure in found]
    assert bars == [("D2H", ">=", 0.95), ("H2D", ">=", 0.95), ("D2D", ">=", 0.90)]
    assert all(figure.value and figure.ok is not None for figure in found)
    again = hashlib.sha256()
    measure(rig, (contiguous, within), again, quiet=True)
    assert digest.digest() == again.digest(), "the same bytes in every run"


def test_wrong_bytes_are_no_figure(rig: Rig) -> None:
    device_of(rig).wrong = Way.PLAIN
    with pytest.raises(InternalError, match="bytes read back differ"):
        measure(rig, (contiguous,), hashlib.sha256(), quiet=True)


def test_what_is_missing_is_said_and_the_rest_measured(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(rig: Rig, folder: object, digest: object) -> list[Figure]:
        raise OSError("no such drive:\n nothing is there")

    device_of(rig).refuses = "not so much locked memory"
    found = measure(rig, (contiguous, refused), hashlib.sha256(), quiet=False)
    assert [figure.value for figure in found] == [None, None] and not all_met(found)
    assert "the arena cannot be registered (not so much locked memory): raise" in found[0].detail
    assert capsys.readouterr().err == "kvstore: contiguous: done\nkvstore: refused: done\n"
    good = Figure("good", 1.0, "", ">=", 0.9, "")
    assert all_met([*found, good]), "what could not be measured is not missed"
    report([*found, good], json_output=True, quick=True, sha256="00", device=rig.name)
    tree = json.loads(capsys.readouterr().out)
    assert set(tree) == {
        *("version", "kvstore", "machine", "device", "quick", "ok", "sha256", "figures"),
    }
    assert tree["ok"] is True and tree["device"] == rig.name
    assert tree["figures"][1] == {
        "name": "refused",
        "value": None,
        "unit": "",
        "relation": "",
        "bar": None,
        "detail": "not measured: no such drive: nothing is there",
        "ok": None,
    }
    report([*found, good], json_output=False, quick=True, sha256="00", device=rig.name)
    table = capsys.readouterr().out
    assert "refused" in table and "ok" in table and "MISSED" not in table


def test_a_daemon_that_cannot_have_the_device_is_told_of() -> None:
    """No machine has a device 99, and the daemon here is the real one."""
    (figure,) = measure(
        Rig(FakePlatform(), 99, "no device", SMALL), (within,), hashlib.sha256(), quiet=True
    )
    assert (figure.name, figure.value, figure.ok) == ("within", None, None)
    assert "a daemon of the benchmark has ended with 1: see" in figure.detail


def test_without_a_device_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.gpu"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # also where there is one
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "nothing can be measured here: copies of a GPU cannot be measured here" in done.stderr
