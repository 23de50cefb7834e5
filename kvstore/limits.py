"""Bounds of what one session and one tenant may hold, and how fast they may ask. Part of the brain.

A refusal is an answer where there is one: a shorter grant, the end of a list refused, a request
that is read later. Only what has no such answer is an error.
"""

from __future__ import annotations

import dataclasses

UNBOUNDED = 1 << 62
REQUEST_BYTES = 8_192  # a request counts as one, and as one more for each so many bytes of it


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds that keep one client from taking everything."""

    leases_per_session: int = 4_096
    sessions: int = 1_024
    layouts: int = 256
    leases_per_tenant: int = UNBOUNDED
    bytes_per_session: int = UNBOUNDED
    bytes_per_tenant: int = UNBOUNDED
    requests_per_s: int = UNBOUNDED
    requests_per_s_tenant: int = UNBOUNDED


class Credit:
    """What a session, or a tenant, may still lease before it is counted anew what it holds.

    Nothing is given back when a lease ends, so ending one costs nothing here; counting finds what
    is free again, and counts a block under many leases once.
    """

    __slots__ = ("bytes", "count_from", "places")

    def __init__(self) -> None:
        self.bytes = 0
        self.places = 0  # in lists of leased blocks
        self.count_from = 0.0  # the time before which it is not counted again


class Bucket:
    """Requests that may still be read. It holds those of one second at most, and refills itself."""

    __slots__ = ("_filled", "left")

    def __init__(self) -> None:
        self.left = 0.0
        self._filled = 0.0

    def wait_s(self, rate: int, now: float) -> float:
        """How long until there is one left again; 0 when there is. `left` may be negative: what
        has been read is carried out, and paid for afterwards."""
        self.left = min(float(rate), self.left + (now - self._filled) * rate)
        self._filled = now
        return max(0.0, -self.left / rate)


def cost(request_bytes: int) -> float:
    """What reading a request of that size takes out of a bucket."""
    return 1.0 + request_bytes / REQUEST_BYTES
