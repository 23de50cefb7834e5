"""Whether a device may be used: a circuit breaker that opens on failures and is probed back."""

from __future__ import annotations

FAILURES_IN_A_ROW = 3
PROBE_FIRST_S = 1.0
PROBE_LAST_S = 30.0


class DeviceHealth:
    """A device is used until some operations in a row failed; then only probes go to it, at growing
    intervals, until one works."""

    def __init__(self, *, present: bool) -> None:
        self.present = present
        self.ok = present
        self.fenced = 0  # how often it was
        self._failures = 0
        self._wait_s = PROBE_FIRST_S
        self._probe_at = 0.0
        self._probing = False

    def failed(self, now: float, *, probe: bool = False) -> None:
        """An operation or a probe failed. Of a fenced device only its probes count: operations
        that were under way when it failed say nothing new."""
        if probe:
            self._probing = False
        self._failures += 1
        if self.ok and self._failures >= FAILURES_IN_A_ROW:
            self.ok = False
            self.fenced += 1
            self._wait_s = PROBE_FIRST_S
            self._probe_at = now + self._wait_s
        elif probe and not self.ok:
            self._wait_s = min(2 * self._wait_s, PROBE_LAST_S)
            self._probe_at = now + self._wait_s

    def fence(self, now: float) -> None:
        """The device cannot be used: it is probed until it can."""
        self._failures = FAILURES_IN_A_ROW - 1
        self.failed(now)

    def worked(self) -> None:
        """An operation or a probe worked."""
        self._failures = 0
        self._probing = False
        self.ok = self.present

    def take_probe(self, now: float) -> bool:
        """Whether a probe is due; the caller sends it."""
        if self.ok or not self.present or self._probing or now < self._probe_at:
            return False
        self._probing = True
        return True
