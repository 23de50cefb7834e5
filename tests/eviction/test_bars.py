"""The commands that print figures work, on small seeded traces and stores; and hints are heard."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from kvstore.accesses import REUSES
from kvstore.traces import load
from tests.eviction import bars
from tests.eviction.anchors import ANCHORS
from tests.eviction.cost import Bare, Brain, cost

REQUESTS, DRAM = 400, 150


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Sessions of which half come back for some turns, and `kind` tells which."""
    chance = random.Random(3)
    parents: list[int] = []
    leaves: list[int] = []
    sessions: list[int] = []
    ends: dict[int, int] = {}
    for at in range(REQUESTS):
        live = [session for session in ends if session % 2 == 0][-8:]
        session = chance.choice(live) if live and chance.random() < 0.5 else at
        leaf = ends.get(session, -1)
        for _ in range(chance.randint(2, 8)):
            parents.append(leaf)
            leaf = len(parents) - 1
        ends[session] = leaf
        leaves.append(leaf)
        sessions.append(session)
    np.savez(
        tmp_path / "small.npz",
        parent_delta=np.arange(len(parents)) - np.array(parents),
        leaf=np.array(leaves),
        t_ms=np.arange(REQUESTS) * 700,
        block_tokens=np.int32(16),
        session=np.array(sessions),
        kind=np.array(sessions) % 2,
    )
    known = {"capacity_blocks": DRAM, **dict.fromkeys(ANCHORS, 0.4)}
    (tmp_path / "anchors.json").write_text(json.dumps({"traces": {"small": {"0.1": known}}}))
    return tmp_path


def test_hints_of_the_future_help(traces: Path) -> None:
    hits = {}
    for hints in bars.HINTS:
        job = bars.Job(
            traces=traces, trace="small", policy="relevance", dram_blocks=DRAM, hints=hints
        )
        hits[hints] = bars.play(job).hits
    assert hits["reuse 100 %"] > hits["none"]
    assert hits["tag"] > hits["none"] - 0.01  # who never comes back is soon known without it, too


def test_who_comes_again(traces: Path) -> None:
    trace = load(traces / "small.npz")
    sessions = list(np.load(traces / "small.npz")["session"])
    again = bars.comes_again(trace, sessions)
    assert again == [one in sessions[at + 1 :] for at, one in enumerate(sessions)]
    assert bars.comes_again(trace, [-1] * REQUESTS) == again  # here the chains tell as much
    bars.hint(trace, traces / "small.npz", "reuse 80 %")
    told = [REUSES[code] == "continue" for code in trace.steps["reuse"]]
    right = sum(one == other for one, other in zip(told, again, strict=True))
    assert 0.75 < right / REQUESTS < 0.85


def test_two_tiers_are_judged(traces: Path) -> None:
    results = [
        bars.play(
            bars.Job(
                traces=traces,
                trace="small",
                policy="lru",
                dram_blocks=DRAM,
                nvme_blocks=4 * DRAM,
                write_policy=write_policy,
            )
        )
        for write_policy in ("through", "second-touch")
    ]
    through, twice = results
    assert through.hits > through.dram_hits
    assert 0 < twice.written < through.written
    assert bars.judge(through, through).startswith("MISSED")


def test_the_command(
    traces: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def carry_out(jobs: list[bars.Job]) -> object:
        return map(bars.play, jobs)

    monkeypatch.setattr(bars, "carry_out", carry_out)
    monkeypatch.setattr(sys, "argv", ["bars", "--traces", str(traces), "--hints"])
    assert bars.main() in (0, 1)
    page = capsys.readouterr().out
    assert "mean share of the best possible: relevance" in page
    assert "reuse 100 %: adds" in page


@pytest.mark.parametrize("policy", ["lru", "relevance"])
@pytest.mark.parametrize("make", [Brain, Bare])
def test_cost_is_measured(make: type[Brain] | type[Bare], policy: str) -> None:
    found = cost(make, policy, 4_096, 16, turns=800, repetitions=1)
    assert 0 < found.access < 1_000
    assert 0 < found.eviction < 1_000
    assert found.memory >= 0
