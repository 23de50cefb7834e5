"""A real service manager of a user, one for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.systemd.manager import UserManager, user_manager


@pytest.fixture(scope="module")
def manager() -> Iterator[UserManager]:
    with user_manager() as started:
        yield started
