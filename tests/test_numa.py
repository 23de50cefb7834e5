"""Memory nodes: read from trees that are made up, chosen, and asked for on this host."""

from __future__ import annotations

import ctypes
import mmap
import threading
from pathlib import Path

import pytest

from kvstore import numa
from kvstore.mapping import address_of_map
from kvstore.types import GIB

DEFAULT, PREFERRED = 0, 1
NVIDIA_GPU = {"vendor": "0x10de", "class": "0x030200"}


def host(root: Path, *, allowed: str = "0-7", nodes: dict[int, int], cpus: str = "0-3") -> None:
    """Nodes with so many GiB of memory; `cpus` of all but nodes 8 and up."""
    for number, size in nodes.items():
        folder = root / f"sys/devices/system/node/node{number}"
        folder.mkdir(parents=True)
        kib = size << 20
        (folder / "meminfo").write_text(
            f"Node {number} MemTotal:       {kib} kB\nNode {number} MemFree: {kib // 2} kB\n"
        )
        (folder / "cpulist").write_text(f"{cpus if number < 8 else ''}\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/status").write_text(f"Name:\tx\nMems_allowed_list:\t{allowed}\n")


def device(root: Path, place: str, numa_node: int, **files: str) -> None:
    folder = root / "sys/bus/pci/devices" / place
    folder.mkdir(parents=True)
    for name, text in {"numa_node": str(numa_node), **files}.items():
        (folder / name).write_text(text + "\n")


def chosen(root: Path, choice: str, size: int = GIB, devices: tuple[int, ...] = ()) -> list[int]:
    return [*numa.choose(choice, size, devices, sys=root / "sys", proc=root / "proc")]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("auto", "auto"),
        (" Interleave ", "interleave"),
        ("off", "off"),
        ("0", "0"),
        (0, "0"),
        ("1, 0", "0,1"),
        ("0-2", "0,1,2"),
        ("3,3", "3"),
    ],
)
def test_choices_are_kept_in_one_form(given: object, kept: str) -> None:
    assert numa.parse_choice(given) == kept


@pytest.mark.parametrize("given", ["", "none", "-1", "0,", "1-", "9999", "2-1", True, 1.0, ["0"]])
def test_other_choices_are_refused_with_what_to_write(given: object) -> None:
    with pytest.raises(ValueError, match=r'write "auto", "off", "interleave", or numbers'):
        numa.parse_choice(given)


def test_nodes_are_read_with_their_memory(tmp_path: Path) -> None:
    host(tmp_path, nodes={0: 64, 1: 32, 2: 0, 8: 16})
    found = numa.nodes(tmp_path / "sys")
    assert [(one.number, one.total_bytes, one.cpus) for one in found] == [
        (0, 64 * GIB, True),
        (1, 32 * GIB, True),
        (8, 16 * GIB, False),
    ]
    assert found[0].free_bytes == 32 * GIB
    assert numa.nodes(tmp_path / "none") == []


def test_one_node_leaves_nothing_to_choose(tmp_path: Path) -> None:
    host(tmp_path, nodes={0: 64})
    for choice in ("auto", "off", "interleave"):
        assert chosen(tmp_path, choice) == []
    assert chosen(tmp_path, "0") == [0]
    assert chosen(tmp_path / "none", "auto") == []


def test_several_nodes_are_all_used_that_have_memory_and_processors(tmp_path: Path) -> None:
    host(tmp_path, nodes={0: 64, 1: 64, 2: 0, 8: 16})
    assert chosen(tmp_path, "auto") == chosen(tmp_path, "interleave") == [0, 1]
    assert chosen(tmp_path, "off") == []


def test_nodes_that_this_process_may_not_use_are_left_out(tmp_path: Path) -> None:
    host(tmp_path, nodes={0: 64, 1: 64, 2: 64}, allowed="0,2")
    assert chosen(tmp_path, "auto") == [0, 2]
    with pytest.raises(ValueError, match=r'node 1 has no memory .* name of 0, 2, or write "auto"'):
        chosen(tmp_path, "0,1")


def test_a_node_that_is_not_there_is_named(tmp_path: Path) -> None:
    host(tmp_path, nodes={0: 64, 2: 0})
    for choice, absent in (("7", "7"), ("0,1,2", "1, 2")):
        with pytest.raises(ValueError, match=f"^node {absent} has no memory"):
            chosen(tmp_path, choice)


def test_an_arena_is_beside_the_gpus_that_are_configured(tmp_path: Path) -> None:
    host(tmp_path, nodes={0: 64, 1: 64, 2: 64})
    device(tmp_path, "0000:00:02.0", 0, vendor="0x1af4", **{"class": "0x020000"})  # a network card
    device(tmp_path, "0000:1a:00.0", 1, **NVIDIA_GPU)
    device(tmp_path, "0000:1b:00.0", 2, **NVIDIA_GPU)
    device(tmp_path, "0000:1b:00.1", 0, vendor="0x10de", **{"class": "0x040300"})  # its sound
    device(tmp_path, "0000:c0:00.0", -1, **NVIDIA_GPU)  # the firmware does not tell
    assert chosen(tmp_path, "auto") == [0, 1, 2]
    assert chosen(tmp_path, "auto", devices=(0,)) == [1]
    assert chosen(tmp_path, "auto", devices=(0, 1)) == [1, 2]
    assert chosen(tmp_path, "interleave", devices=(0,)) == [0, 1, 2]
    assert chosen(tmp_path, "auto", devices=(2,)) == chosen(tmp_path, "auto", devices=(9,))
    assert chosen(tmp_path, "auto", devices=(2,)) == [0, 1, 2]


def test_gpus_do_not_crowd_an_arena_into_a_node_that_is_too_small(tmp_path: Path) -> None:
    host(tmp_path, nodes={0: 64, 1: 64})
    device(tmp_path, "0000:1a:00.0", 1, **NVIDIA_GPU)
    assert chosen(tmp_path, "auto", 50 * GIB, devices=(0,)) == [1]
    assert chosen(tmp_path, "auto", 60 * GIB, devices=(0,)) == [0, 1]


# --- the kernel ----------------------------------------------------------------------------------


@pytest.fixture
def node() -> int:
    """A node of this host, where policies are allowed: some containers forbid them."""
    number = numa.nodes()[0].number
    try:
        numa.check([number])
    except PermissionError as error:
        pytest.skip(f"memory policies are forbidden here: {error}")
    return number


@pytest.mark.usefixtures("node")
def test_this_host_has_nodes_and_takes_preferences_for_them() -> None:
    there = [one.number for one in numa.nodes()]
    assert there and sum(one.total_bytes for one in numa.nodes()) > GIB // 4
    numa.check(there)
    numa.check([])
    for number in there:
        assert numa.choose(str(number), GIB) == (number,)


@pytest.mark.usefixtures("node")
def test_the_kernel_refuses_a_node_that_is_not_there() -> None:
    absent = max(one.number for one in numa.nodes()) + 1
    with pytest.raises(OSError, match="Invalid argument"):
        numa.check([absent])
    with pytest.raises(ValueError, match=f"node {absent} has no memory"):
        numa.choose(str(absent), GIB)


@pytest.mark.usefixtures("node")
def test_a_page_tells_its_node() -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        assert numa.node_at(address_of_map(page)) in {one.number for one in numa.nodes()}


def test_a_policy_of_a_map_is_seen_by_the_kernel(node: int) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        address = address_of_map(page)
        numa.spread(address, mmap.PAGESIZE, [node])
        maps = Path("/proc/self/numa_maps").read_text().splitlines()
        assert [line.split()[1] for line in maps if line.startswith(f"{address:x} ")] == [
            f"prefer:{node}"
        ]


def test_a_preference_is_of_the_thread_that_asks(node: int) -> None:
    modes: list[int] = []

    def ask() -> None:
        numa.prefer(node)
        modes.append(policy())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert (modes, policy()) == ([PREFERRED], DEFAULT)


def policy() -> int:
    """The policy of this thread, as the kernel numbers it."""
    mode = ctypes.c_int(-1)
    numa._call(2, ctypes.byref(mode), None, ctypes.c_ulong(0), None, ctypes.c_ulong(0))
    return mode.value
