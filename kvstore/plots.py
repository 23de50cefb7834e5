"""Draws the miss-ratio curves of a sweep. Needs matplotlib, which is loaded only here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvstore.errors import InvalidRequest, KVStoreError

FORMATS = (".png", ".svg")
INCHES = (6.5, 4.5)
DPI = 150
STYLES = {"lru": ("tab:gray", "--"), "belady": ("tab:green", ":")}


def check(path: Path) -> None:
    """Raises what stands against drawing to this file, before a long run finds out."""
    if path.suffix.lower() not in FORMATS:
        raise InvalidRequest(f"{path} is no {' or '.join(FORMATS)} file: name it so")
    if not path.absolute().parent.is_dir():
        raise InvalidRequest(f"{path.absolute().parent} is no folder: make it first")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise KVStoreError(
            "matplotlib is not installed here: install kvstore[plot], or leave --plot out"
        ) from None


def draw(document: Mapping[str, Any], path: Path) -> None:
    """The curves of `kvstore simulate --json`, one picture for each tier that was swept."""
    from matplotlib.figure import Figure

    sweep: Mapping[str, Any] = document["sweep"]
    figure = Figure(figsize=(INCHES[0] * len(sweep), INCHES[1]), dpi=DPI, layout="constrained")
    names = list(document["results"])
    for at, (tier, points) in enumerate(sweep.items(), 1):
        axes = figure.add_subplot(1, len(sweep), at)
        sizes = [point["bytes"] / (1 << 30) for point in points]
        for name in names:
            colour, line = STYLES.get(name, ("tab:blue", "-"))
            misses = [1 - point[name] for point in points]
            axes.plot(sizes, misses, line, color=colour, marker="o", markersize=3, label=name)
        least = 1 - document["endless"]["hit_ratio"]
        axes.axhline(least, color="tab:red", linewidth=0.8, label="no bounds")
        present = document["sizes"][f"{tier}_bytes"] / (1 << 30)
        axes.axvline(present, color="black", linewidth=0.8, linestyle="-.", label="present size")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,.0f}" if size >= 100 else f"{size:.3g}" for size in sizes])
        axes.set_ylim(0, 1)
        axes.set_xlabel(f"{tier} [GiB]")
        axes.set_ylabel("misses of blocks asked for")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, format=path.suffix.lower().lstrip("."))
