"""A sample of the sweep over failing operations; `python -m tests.faults.sweep` is all of it."""

from __future__ import annotations

import pytest

from kvstore.tiers.faults import Fault
from tests.faults import sweep
from tests.faults.sweep import GONE, Case

# Writes 1 to 24 store, reads 1 to 48 load, 49 to 72 check, the others are of the second life.
SAMPLE = (
    Case(Fault.EIO.value, "sync", 1),
    Case(Fault.ENOSPC.value, "write", 24),
    Case(Fault.SHORT.value, "read", 60),
    Case(Fault.TORN.value, "write", 10),
    Case(Fault.FLIP.value, "write", 17),
    Case(Fault.FLIP.value, "read", 80),
    Case(Fault.HANG.value, "read", 2),
    Case(GONE, "", 12),
)


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: f"{case.fault} {case.verb} {case.number}")
def test_a_failing_operation_serves_nothing_wrong_and_hangs_nobody(case: Case) -> None:
    result = sweep.try_case(case)
    assert not result.problem
    assert result.wrong == 0
    assert result.injected, "the run came to the operation"
    assert result.served > 40
    assert bool(result.fenced) is (case.fault == GONE)
    assert result.late_ms < 1_000
