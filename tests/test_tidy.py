"""The house style, where a rule can be a test: floors, links, sizes, words."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("tiers", "eviction", "client", "protos")
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60

# Imports go down only. A floor may import its own, those below it, and the rooms named beside it.
FLOORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "ground",
        (
            "checksums",
            "cufile",
            "cufile_choice",
            "device_sums",
            "errors",
            "filesystems",
            "mapping",
            "numa",
            "paths",
            "spin",
            "straight",
            "types",
            "units",
        ),
    ),
    (
        "core",
        (
            "accesses",
            "admission",
            "catalog",
            "ceiling",
            "counters",
            "curve",
            "health",
            "holdings",
            "index",
            "index_reader",
            "learning",
            "lending",
            "leases",
            "limits",
            "mirror",
            "orders",
            "placement",
            "reads",
            "retention",
            "room",
            "scrub",
            "slots",
            "store",
            "worth",
            "writes",
        ),
    ),
    (
        "upper",
        (
            "adoption",
            "carrier",
            "clearing",
            "collaborators",
            "config",
            "config_checks",
            "disk",
            "drains",
            "hands",
            "policies",
            "recorder",
            "trace_file",
            "traces",
            "exporter",
            "metrics",
            "mover",
            "parking",
            "service",
            "tidings",
            "verification",
            "ways",
        ),
    ),
    (
        "roof",
        (
            "bench",
            "bench_daemon",
            "bench_device",
            "bench_figures",
            "bench_limits",
            "bench_rig",
            "belady",
            "busy_poll",
            "cli",
            "cli_service",
            "cli_simulate",
            "cli_stats",
            "cli_trace",
            "daemon",
            "doctor",
            "doctor_memory",
            "findings",
            "forecast",
            "front_door",
            "hatch",
            "notify",
            "peers",
            "plots",
            "service_unit",
            "sigbus",
            "simulation",
            "processes",
            "tenant",
            "turns",
        ),
    ),
)
ROOMS_SEEN_BY = {
    "ground": (),
    "core": ("eviction", "tiers"),
    "upper": ("eviction", "tiers", "protos"),
    "roof": ("eviction", "tiers", "protos", "client"),
}
# Rooms know nobody above them, nor each other; the client knows the messages and the ground.
SEEN_BY_ROOM = {
    "tiers": ("filesystems", "mapping", "numa"),
    "eviction": (),
    "protos": (),
    "client": (
        *("protos", "checksums", "cufile", "device_sums", "errors", "mapping", "paths", "spin"),
        *("straight", "types"),
    ),
}
BRAIN = (
    *(
        "accesses",
        "admission",
        "catalog",
        "counters",
        "health",
        "holdings",
        "leases",
        "limits",
        "mirror",
        "orders",
        "placement",
    ),
    *("reads", "retention", "room", "scrub", "slots", "store", "worth", "writes"),
    *("ceiling", "curve"),
)
IMPURE = {"asyncio", "os", "random", "socket", "threading", "time", "datetime", "secrets", "lmdb"}


def sources() -> list[Path]:
    """Every Python file that git knows, generated ones left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return [ROOT / name for name in listed if "_pb2" not in name and (ROOT / name).exists()]


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    """The first names below kvstore that a file imports."""
    found = (name.split(".") for name in imports(path) if name.startswith("kvstore."))
    return {parts[1] for parts in found} - {"__version__"}


def test_the_links_are_links() -> None:
    for room in ROOMS:
        assert (ROOT / "kvstore" / room).is_symlink(), f"kvstore/{room} must be a link to ../{room}"


def test_the_package_list_names_every_room() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {"kvstore", *(f"kvstore.{room}" for room in ROOMS)}
    nested = [path for room in ROOMS for path in (ROOT / room).iterdir() if path.is_dir()]
    assert [path for path in nested if path.name != "__pycache__"] == [], "rooms are flat"


def test_every_module_has_a_floor() -> None:
    placed = [module for _, modules in FLOORS for module in modules]
    there = {path.stem for path in (ROOT / "kvstore").glob("*.py")} - {"__init__"}
    assert there <= set(placed), "give the new module a floor above"
    assert len(placed) == len(set(placed))


@pytest.mark.parametrize("level", range(len(FLOORS)))
def test_imports_go_down(level: int) -> None:
    name, modules = FLOORS[level]
    allowed = {module for _, below in FLOORS[: level + 1] for module in below}
    allowed |= set(ROOMS_SEEN_BY[name])
    for module in modules:
        path = ROOT / "kvstore" / f"{module}.py"
        if path.exists():
            assert ours(path) <= allowed, f"{path.name} reaches over its floor ({name})"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_nobody_above(room: str) -> None:
    for path in (ROOT / room).glob("*.py"):
        if "_pb2" not in path.name:
            assert ours(path) <= {room, *SEEN_BY_ROOM[room]}, f"{room}/{path.name}"


@pytest.mark.parametrize("module", BRAIN)
def test_the_brain_is_pure(module: str) -> None:
    found = {name.split(".")[0] for name in imports(ROOT / "kvstore" / f"{module}.py")}
    assert not found & IMPURE, f"{module} decides only: {found & IMPURE} belongs to the hands"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_fit_in_a_head(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES_MAX, "split it by job"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "begin with one sentence that says what the module is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_leftovers(path: Path) -> None:
    if path.name == "test_tidy.py":
        return
    found = re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b|NotImplementedError", path.read_text())
    assert not found, f"finish it or take it out: {found}"
