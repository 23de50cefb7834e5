"""An event loop that goes on when it is told to."""

from __future__ import annotations

from collections.abc import Callable


class Loop:
    """One round of `step` is one of the loop."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        self.soon.append(call)

    def step(self) -> None:
        calls, self.soon = self.soon, []
        for call in calls:
            call()
