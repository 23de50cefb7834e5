"""Agents, as tests see them: processes that hold ranks of an engine; see agent.py."""

from __future__ import annotations

import hashlib
import itertools
import json
import select
import subprocess
from collections.abc import Iterator
from typing import Any

from tests.sglang_store.environment import PYTHON, ROOT, environ

ANSWER_S = 300.0  # the import of SGLang included, on a busy machine


def keys(count: int, tag: str) -> list[str]:
    """Page hashes of a prompt, in SGLang's form: a chain of SHA-256 in hexadecimal digits."""
    found, before = [], hashlib.sha256(tag.encode())
    for at in range(count):
        before = hashlib.sha256(before.digest() + at.to_bytes(4, "little"))
        found.append(before.hexdigest())
    return found


class Agent:
    """One process. Ends with its input."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [str(PYTHON), "-m", "tests.sglang_store.agent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environ(),
            text=True,
        )
        self._names = itertools.count()
        self.seconds = 0.0  # that the last order took, inside

    def order(self, name: str, do: str, **arguments: Any) -> Any:
        """What the agent answers; fails the test when it raised."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({"name": name, "do": do, "arguments": arguments})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_S)
        assert ready, f"no answer to {do} within {ANSWER_S:g} s"
        text = self._process.stdout.readline()
        assert text, f"the agent ended during {do}"
        answer = json.loads(text)
        assert "error" not in answer, f"{do} raised {answer['error']}"
        self.seconds = answer["seconds"]
        return answer.get("result")

    def open(self, **options: Any) -> Remote:
        """A new rank. `extra` is our part of the storage's configuration."""
        name = str(next(self._names))
        self.order(name, "open", **options)
        return Remote(self, name)

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()


class Remote:
    """A rank in an agent: every method of tests.sglang_store.agent.Rank."""

    def __init__(self, agent: Agent, name: str) -> None:
        self.agent = agent
        self._name = name

    def __getattr__(self, do: str) -> Any:
        return lambda **arguments: self.agent.order(self._name, do, **arguments)

    @property
    def seconds(self) -> float:
        """That the last call took."""
        return self.agent.seconds


def agents(count: int) -> Iterator[list[Agent]]:
    """So many agents, ended afterwards."""
    made = [Agent() for _ in range(count)]
    yield made
    for one in made:
        one.end()
