"""A running daemon is recorded; `kvstore simulate` finds in the record what the daemon counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.client import Client
from kvstore.client.client import TraceState
from kvstore.errors import InvalidRequest, NotPermitted
from kvstore.traces import Shape, Trace, load
from tests import forests
from tests.e2e import replay
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import ROOT, Daemon, wait_for

LEAST = 16 << 20
BAR = 0.02  # of a memory so small a few blocks are that much


def small(count: int = 150) -> Trace:
    """Conversations that grow, some of which come back."""
    random = np.random.default_rng(11)
    paths: list[tuple[int, ...]] = []
    for _ in range(count):
        old = paths[random.integers(len(paths))] if paths and random.random() < 0.7 else ()
        paths.append((*old[:40], *random.integers(0, 3, random.integers(1, 9)).tolist()))
    return forests.trace(paths)


def kvstore(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvstore.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


def test_a_small_trace_replayed_gives_what_simulate_tells() -> None:
    """With a policy that does not go by time: the replay leaves the trace's pauses out."""
    trace = small()
    sizes = replay.tiers(trace, 0.2, 0.0)
    difference = abs(replay.replay(trace, sizes, "lru") - replay.simulate(trace, sizes, "lru"))
    assert difference <= BAR


@pytest.mark.parametrize(("nvme", "policy"), [(0.0, "lru"), (0.8, "relevance")])
def test_what_was_recorded_gives_the_hits_that_were_counted(
    tmp_path: Path, nvme: float, policy: str
) -> None:
    """In a small memory alone, what leaves by `relevance` depends on single milliseconds here."""
    trace, path = small(), tmp_path / "trace"
    sizes = replay.tiers(trace, 0.2, nvme)
    with replay.daemon_of(sizes, policy) as daemon:
        socket = daemon.start().socket()
        begun = kvstore("trace", "start", path, "--max-bytes", "64 MiB", "--socket", socket)
        assert (begun.returncode, begun.stdout) == (0, f"recording to {path}\n"), begun.stderr
        with daemon.client() as client:
            replay.play(trace, client, settle=nvme > 0)
            assert client.show_trace().recording
        ended = kvstore("trace", "stop", "--socket", socket)
        assert ended.returncode == 0 and ended.stdout.startswith(f"{path}: "), ended.stderr
        counted = daemon.settled().blocks
    recorded = load(path)
    assert recorded.reference_count == counted.asked and recorded.dropped == 0
    assert int(recorded.steps["hit"].clip(0).sum()) == counted.hit
    assert recorded.sizes is not None and recorded.sizes.dram_bytes == sizes.dram_bytes
    told = simulated(path, "--policy", policy)
    mine = told["results"][policy]
    assert abs(mine["hit_ratio"] - counted.hit / counted.asked) <= BAR
    larger = simulated(path, "--dram", "100%")
    assert larger["results"]["lru"]["hit_ratio"] == pytest.approx(larger["endless"]["hit_ratio"])


def simulated(path: Path, *more: object) -> Any:
    """The document of `kvstore simulate --json`."""
    done = kvstore("simulate", path, "--json", *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_start_and_stop_say_what_is_wrong(
    shared: Daemon, client: Client, door: str, tmp_path: Path
) -> None:
    if door == "front":
        with pytest.raises(NotPermitted, match=r"kvstore\.sock"):
            client.start_trace(tmp_path / "trace")
        return
    with pytest.raises(InvalidRequest, match="no trace is being recorded"):
        client.stop_trace()
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for path, size, wrong in (
        ("relative", LEAST, "no absolute path"),
        (tmp_path / "small", LEAST - 1, "too small"),
        (taken, LEAST, "is there already"),
        (tmp_path / "nowhere" / "trace", LEAST, "cannot create"),
    ):
        with pytest.raises(InvalidRequest, match=wrong):
            client.start_trace(path, size)
    assert taken.read_text() == "mine"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidRequest):
        client.start_trace(link)
    assert client.start_trace(tmp_path / "trace", LEAST).recording
    with pytest.raises(InvalidRequest, match="stop it first"):
        client.start_trace(tmp_path / "other")
    assert os.stat(tmp_path / "trace").st_mode & 0o777 == 0o600
    ended = client.stop_trace()
    assert (ended.recording, ended.requests, ended.dropped, ended.files) == (False, 0, 0, 1)
    assert client.show_trace() == TraceState(False, "", 0, 0, 0, 0)


def test_a_daemon_that_stops_leaves_a_whole_record(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    path, trace = tmp_path / "trace", small(20)
    trace.shapes = [Shape(16, 4096)]
    daemon = make_daemon().start()
    with daemon.client() as client:
        client.start_trace(path)
        replay.play(trace, client)
    daemon.stop()
    found = load(path)
    assert found.request_count == 20 and not found.warnings


def test_a_daemon_that_is_killed_leaves_what_was_written(
    make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    path = tmp_path / "trace"
    daemon = make_daemon().start()
    with daemon.client() as client:
        client.start_trace(path)
        daemon.kill()
    assert load(path).reference_count == 0
    done = kvstore("simulate", path)
    assert done.returncode == 2 and "record for longer" in done.stderr
    daemon.start()
    wait_for(lambda: not daemon.client().show_trace().recording, "a daemon that records nothing")
