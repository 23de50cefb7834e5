"""What a benchmark found, line by line, and how it is printed: a table, or JSON."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table

from kvstore import __version__


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the result. `value` is to be at least, or at most, `bar`; without a bar it is for
    information, and without a value `detail` says why it could not be measured."""

    name: str
    value: float | None
    unit: str
    relation: Literal[">=", "<=", ""]
    bar: float | None
    detail: str

    @property
    def ok(self) -> bool | None:
        """Whether the bar is met; None where there is nothing to say."""
        if self.value is None or self.bar is None:
            return None
        return self.value >= self.bar if self.relation == ">=" else self.value <= self.bar


def unmeasured(name: str, reason: str) -> Figure:
    """A figure that could not be had here."""
    return Figure(name, None, "", "", None, f"not measured: {reason}")


def all_met(figures: Sequence[Figure]) -> bool:
    """Whether something was measured, and no bar was missed."""
    measured = any(figure.value is not None for figure in figures)
    return measured and not any(figure.ok is False for figure in figures)


def report(
    figures: Sequence[Figure],
    *,
    json_output: bool,
    quick: bool,
    sha256: str,
    device: str | None = None,
) -> None:
    """Print them. `device` is what was measured, where it was not this host alone."""
    if not json_output:
        _print(figures, sha256, device)
        return
    tree = {
        "version": 1,
        "kvstore": __version__,
        "machine": platform.platform(),
        **({} if device is None else {"device": device}),
        "quick": quick,
        "ok": all_met(figures),
        "sha256": sha256,
        "figures": [dataclasses.asdict(figure) | {"ok": figure.ok} for figure in figures],
    }
    sys.stdout.write(json.dumps(tree, indent=1) + "\n")


def _print(figures: Sequence[Figure], sha256: str, device: str | None) -> None:
    machine = platform.platform() if device is None else f"{platform.platform()}, {device}"
    table = Table(title=f"kvstore {__version__} on {machine}")
    for heading in ("figure", "value", "bar", "", "detail"):
        table.add_column(heading)
    for figure in figures:
        table.add_row(
            figure.name,
            "-" if figure.value is None else f"{figure.value:.3g} {figure.unit}".strip(),
            "" if figure.bar is None else f"{figure.relation} {figure.bar:g}",
            {None: "", True: "ok", False: "MISSED"}[figure.ok],
            figure.detail,
        )
    console = Console()
    console.print(table)
    console.print(f"sha256 of all bytes read back: {sha256}")
