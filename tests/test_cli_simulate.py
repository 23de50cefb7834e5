"""`kvstore simulate` and `kvstore trace` as people meet them: figures, pictures, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import plots
from kvstore.errors import InvalidRequest, KVStoreError
from tests import forests


def kvstore(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvstore.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin"} | environment,
    )


def refused(done: subprocess.CompletedProcess[str], status: int) -> str:
    assert done.returncode == status, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("kvstore: ") and ": " in done.stderr.removeprefix("kvstore: ")
    return done.stderr


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(2)
    paths = [tuple(random.integers(0, 2, random.integers(1, 9)).tolist()) for _ in range(300)]
    return forests.save(tmp_path_factory.mktemp("cli") / "trace.npz", paths)


def document(trace: Path, *more: object) -> Any:
    done = kvstore("simulate", trace, "--json", *more)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def test_it_tells_a_person_what_the_document_says(trace: Path) -> None:
    sizes = ("--dram", "10%", "--nvme", "40%", "--block-bytes", "4 KiB", "--policy", "lru")
    told, found = kvstore("simulate", trace, *sizes), document(trace, *sizes)
    assert told.returncode == 0 and told.stderr == ""
    lru = found["results"]["lru"]
    for text in (f"{lru['hit_ratio']:.1%}", f"{found['endless']['hit_ratio']:.1%}", "300 requests"):
        assert text in told.stdout
    assert lru["misses"] and sum(lru["misses"].values()) == lru["blocks"]["miss"]
    for cause, count in lru["misses"].items():
        assert f"{cause} {count:,}" in told.stdout
    assert found["trace"]["layouts"] == [{"block_tokens": 16, "block_bytes": 4096}]
    assert found["sizes"]["dram_bytes"] % 4096 == 0 < lru["tiers"]["nvme"]["written_bytes"]


def test_without_options_the_sizes_are_those_that_the_help_tells(trace: Path) -> None:
    found = document(trace)
    assert "64 GiB" in kvstore("simulate", "--help").stdout
    assert found["sizes"] | {"write_policy": "", "write_budget": 0} == {
        "dram_bytes": 64 << 30, "nvme_bytes": 0, "write_policy": "", "write_budget": 0
    }  # fmt: skip
    assert found["trace"]["layouts"][0]["block_bytes"] == 16 * 131_072


def test_sizes_can_be_those_of_a_configuration(trace: Path, tmp_path: Path) -> None:
    config = tmp_path / "kvstored.toml"
    config.write_text(
        f'[dram]\nsize = "16 MiB"\npath = "{tmp_path}"\n[nvme]\nsize = "64 MiB"\n'
        f'paths = ["{tmp_path}"]\nwrite_policy = "on-evict"\n[eviction]\npolicy = "lru"\n'
    )
    found = document(trace, "--config", config, "--block-bytes", "64 KiB")
    assert (found["policy"], found["sizes"]["write_policy"]) == ("lru", "on-evict")
    assert found["sizes"]["dram_bytes"] == 16 << 20
    assert 60 << 20 < found["sizes"]["nvme_bytes"] <= 64 << 20
    assert document(trace, "--config", config, "--nvme", "0")["sizes"]["nvme_bytes"] == 0
    other = kvstore("simulate", trace, "--config", config, "--tenant", "nobody")
    assert "tenant nobody is not configured" in refused(other, 2)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_curves_are_drawn(trace: Path, tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"curves.{suffix}"
    found = document(trace, "--dram", "10%", "--nvme", "20%", "--block-bytes", "4 KiB",
                     "--plot", picture)  # fmt: skip
    assert set(found["sweep"]) == {"dram", "nvme"}
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in content
    if suffix == "svg":
        assert content.count(b"<!-- present size -->") == 2


@pytest.mark.parametrize(
    ("arguments", "status", "wrong"),
    [
        (("--dram", "much"), 2, "is not a size"),
        (("--dram", "1 KiB"), 2, "hold no block"),
        (("--policy", "clairvoyant"), 2, "clairvoyant"),
        (("--block-bytes", "0"), 2, "no size of a block"),
        (("--nvme-read", "fast"), 2, "is no bandwidth"),
        (("--prefill", "0"), 2, "prefill"),
        (("--plot", "curves.pdf"), 2, ".png or .svg"),
        (("--plot", "/no/folder/curves.png"), 2, "is no folder"),
    ],
)
def test_wrong_usage_is_one_line(
    trace: Path, arguments: tuple[str, ...], status: int, wrong: str
) -> None:
    assert wrong in refused(kvstore("simulate", trace, *arguments), status)


@pytest.mark.parametrize("sizes", [("100 TiB", "0"), ("900 PiB", "900 PiB")], ids=" ".join)
def test_tiers_beyond_all_blocks_are_as_good_as_endless(
    trace: Path, sizes: tuple[str, str]
) -> None:
    """And take no more memory or time than the blocks that there are."""
    found = document(trace, "--dram", sizes[0], "--nvme", sizes[1], "--policy", "lru")
    assert found["results"]["lru"]["hit_ratio"] == found["endless"]["hit_ratio"]
    assert found["sizes"]["dram_bytes"] > 90 << 40


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    assert "nowhere" in refused(kvstore("simulate", tmp_path / "nowhere"), 2)
    (tmp_path / "text").write_text("hello")
    assert "is no trace" in refused(kvstore("simulate", tmp_path / "text"), 2)


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(KVStoreError, match=r"install kvstore\[plot\]"):
        plots.check(tmp_path / "curves.png")


@given(suffix=st.text(st.characters(codec="ascii", exclude_characters="/\0"), max_size=5))
def test_other_pictures_are_refused(suffix: str) -> None:
    if Path(f"curves.{suffix}").suffix.lower() in plots.FORMATS:
        return
    with pytest.raises(InvalidRequest):
        plots.check(Path(f"/tmp/curves.{suffix}"))


def test_matplotlib_is_not_loaded_without_need() -> None:
    code = "import sys, kvstore.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_without_a_daemon_nothing_is_recorded(tmp_path: Path) -> None:
    for command in (("start", tmp_path / "trace"), ("stop",), ("show",)):
        refused(kvstore("trace", *command, "--socket", tmp_path / "none.sock"), 3)
    assert not (tmp_path / "trace").exists()
    assert "is not a size" in refused(kvstore("trace", "start", "x", "--max-bytes", "many"), 2)


def test_bandwidths_can_be_measured(trace: Path) -> None:
    found = document(trace, "--measured", "--block-bytes", "4 KiB", "--dram", "10%")
    machine = found["machine"]
    assert all(machine[f"{name}_bytes_per_s"] > 1e6 for name in ("dram", "nvme_read", "nvme_write"))
