"""The GPU benchmark itself, in small, with a fake device: every row is measured."""

from __future__ import annotations

import json

import pytest

from tests.bench import gpu


def test_every_row_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--rehearse", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["version"], tree["rehearsal"], tree["ok"]) == (1, True, True)
    rows = {row["name"]: row for row in tree["rows"]}
    missing = [row for row in rows.values() if row["value"] is None]
    assert [row["detail"] for row in missing] == ["not measured: no HBM tier yet"]
    text = " ".join(rows)
    for part in ("D2H 16 x 64 KiB", "H2D 16 x 8 fragments", "gather copies alone", "from NVMe"):
        assert part in text
    assert all(row["ok"] is None for row in rows.values()), "a rehearsal has no bars"


def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 1
    assert "nothing can be measured here: torch finds no CUDA device" in capsys.readouterr().err
