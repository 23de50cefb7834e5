"""Whether it pays to poll for a moment before sleeping. Shared by both ends of the hatch.

Waking a sleeping processor takes from a few to hundreds of microseconds, far more than a call
itself. So an end that expects the other soon looks again and again for a short window, and sleeps
only then. Where that does not help, because the other end is slower or both share one core, it
learns not to.
"""

from __future__ import annotations

CREDIT_MAX = 16
RETRY_EVERY = 8


class Spin:
    """Spends credit on windows in which nothing came, earns it by those in which something did."""

    __slots__ = ("_credit", "_skipped", "window_s")

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._credit = CREDIT_MAX
        self._skipped = 0

    def pays(self) -> bool:
        """Whether to spin now; without credit it is tried every so often."""
        if not self.window_s:
            return False
        if self._credit > 0:
            return True
        self._skipped += 1
        if self._skipped < RETRY_EVERY:
            return False
        self._skipped = 0
        return True

    def found(self) -> None:
        """Something came within the window."""
        if self._credit < CREDIT_MAX:
            self._credit += 1

    def missed(self) -> None:
        """Nothing came within the window."""
        if self._credit > 0:
            self._credit -= 1
