"""Growing columns of numbers: fast by element through a memoryview, and all at once in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np


class Columns:
    """Equally long columns; the attribute of a column's name is a memoryview of it.

    Columns are given as `name="type code"`, one that starts with other than zeros as
    `name=("type code", fill)`. The views are made anew whenever the columns grow: do not keep one.
    """

    def __init__(self, **columns: str | tuple[str, int]) -> None:
        self._fills = {
            name: one[1] if isinstance(one, tuple) else 0 for name, one in columns.items()
        }
        self._arrays: dict[str, np.ndarray[Any, Any]] = {
            name: np.zeros(0, one[0] if isinstance(one, tuple) else one)
            for name, one in columns.items()
        }
        self.size = 0
        self.reserve(1_024)

    def reserve(self, size: int) -> None:
        """Make the columns at least that long."""
        if size <= self.size:
            return
        size = max(size, 2 * self.size)
        for name, old in self._arrays.items():
            new = np.full(size, self._fills[name], old.dtype)
            new[: self.size] = old
            self._arrays[name] = new
            setattr(self, name, memoryview(new.data))
        self.size = size

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A column as numpy sees it."""
        return self._arrays[name]

    def __getattr__(self, name: str) -> Any:  # for type checkers: columns are set in reserve
        raise AttributeError(f"there is no column {name!r}")
