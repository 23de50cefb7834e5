"""The table at the end of a soak: figures, their bars, and whether all were met."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GRACE_S = 0.1  # a call may outlast its deadline by so much


class Figures:
    """Rows to be printed; one that misses its bar makes the whole fail."""

    def __init__(self, title: str) -> None:
        self._title = title
        # Told to stop, it ends its daemon and its children first.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        self._rows: list[tuple[str, str, str, bool]] = []
        self.started = time.monotonic()

    def add(self, name: str, value: Any) -> None:
        """A figure without a bar."""
        self._rows.append((name, _text(value), "", True))

    def hold(self, name: str, value: Any, bar: str, met: bool) -> None:
        """A figure with its bar."""
        self._rows.append((name, _text(value), bar, met))

    def zero(self, name: str, value: int) -> None:
        """Something of which there may be none."""
        self.hold(name, value, "0", value == 0)

    def share(self, name: str, part: int, whole: int, least: float) -> None:
        """A part that must be at least so much of the whole."""
        share = part / whole if whole else 0.0
        self.hold(name, f"{share:.4%} ({part:,} of {whole:,})", f">= {least:.1%}", share >= least)

    def end(self) -> None:
        """Print the table and leave with the status that it deserves."""
        self.add("seconds in all", round(time.monotonic() - self.started, 1))
        wide = max(len(name) for name, *_ in self._rows)
        lines = [self._title]
        for name, value, bar, met in self._rows:
            held = f"   bar {bar}: {'met' if met else 'MISSED'}" if bar else ""
            lines.append(f"  {name:<{wide}}  {value}{held}")
        say("\n".join(lines))
        sys.exit(0 if all(met for *_, met in self._rows) else 1)


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def say(text: str) -> None:
    """A line for whoever watches."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Overdue:
    """Calls that outlasted their deadline, and the longest of all."""

    def __init__(self) -> None:
        self.count = 0
        self.longest_s = 0.0

    @contextmanager
    def watch(self, deadline_s: float) -> Iterator[None]:
        """What happens inside must be over in time."""
        started = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - started
            self.longest_s = max(self.longest_s, took)
            self.count += took > deadline_s + GRACE_S
