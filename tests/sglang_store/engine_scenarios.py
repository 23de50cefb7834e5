"""Whole SGLang engines on the CPU with our storage: tokens as without it, hits after restarts.

Needs the environment of tests.sglang_store.environment: run by `python -m tests.sglang_store`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Daemon
from tests.sglang_store.engine import PAGE, PROMPTS
from tests.sglang_store.environment import PYTHON, ROOT, environ

LIFE_S = 900.0  # of which the engine serves a few seconds; starting takes the rest
# A page is found only when tokens remain to be computed; the last one always is.
HITS = [(count - 1) // PAGE * PAGE for count in PROMPTS]
Serve = Callable[..., dict[str, Any]]


def process(*arguments: str) -> str:
    """What a process of tests.sglang_store.engine prints; it must end well."""
    command = [str(PYTHON), "-m", "tests.sglang_store.engine", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environ(), capture_output=True, text=True, timeout=LIFE_S
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    return done.stdout


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """One life of the engine with the tiny model: its figures."""
    folder: Path = tmp_path_factory.mktemp("model")
    process("model", str(folder))

    def life(*options: str) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads(process("serve", str(folder), *options))
        return figures

    return life


@pytest.fixture(scope="module")
def plain(serve: Serve) -> list[list[int]]:
    """The tokens of an engine that has no storage."""
    figures = serve()
    found = [answer["tokens"] for answer in figures["first"]]
    assert len({tuple(tokens) for tokens in found}) == len(PROMPTS), "prompts must tell apart"
    assert [answer["cached"] for answer in figures["second"]] == [0] * len(PROMPTS)
    return found


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon.start()


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens of each answer."""
    return [answer["tokens"] for answer in answers]


def from_storage(answers: list[dict[str, Any]]) -> list[int]:
    """How many tokens of each prompt came out of the storage."""
    return [(answer["details"] or {}).get("storage", 0) for answer in answers]


@pytest.mark.parametrize("mode", ["buffer_only", "cache"])
def test_hits_after_a_flush_and_a_restart(
    serve: Serve, plain: list[list[int]], daemon: Daemon, mode: str
) -> None:
    socket = str(daemon.socket())
    model = f"--mode={mode}"
    life = serve("--socket", socket, model)
    if mode == "buffer_only":  # the second mode finds what the first one stored
        assert from_storage(life["first"]) == [0] * len(PROMPTS)
    assert tokens(life["first"]) == plain
    assert tokens(life["second"]) == plain
    assert from_storage(life["second"]) == HITS
    daemon.kill()
    daemon.start()
    again = serve("--socket", socket, model)
    assert tokens(again["first"]) == plain
    assert from_storage(again["first"]) == HITS


def test_no_daemon(serve: Serve, plain: list[list[int]], tmp_path: Path) -> None:
    life = serve("--socket", str(tmp_path / "kvstore.sock"), "--dead")
    assert tokens(life["first"]) == plain
    assert tokens(life["second"]) == plain
    assert from_storage(life["second"]) == [0] * len(PROMPTS)
