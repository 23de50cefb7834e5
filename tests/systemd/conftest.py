"""A real service manager of a user, one for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.systemd.manager import UserManager, not_tried, user_manager


@pytest.fixture(scope="module")
def manager() -> Iterator[UserManager]:
    with user_manager() as started:
        yield started


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud what a skipped test would have shown."""
    for reason in sorted(not_tried):
        terminalreporter.write_line(f"NOT TRIED under systemd: {reason}", red=True)
