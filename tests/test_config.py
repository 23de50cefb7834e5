"""The configuration: what is read, what is refused, and that every refusal says what to do."""

from __future__ import annotations

import copy
import grp
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest

from kvstore import config, filesystems
from kvstore.config import Config
from kvstore.errors import InvalidConfig
from kvstore.types import GIB, MIB
from tests.config_tree import config_tree

# The example of the public surface, less [[hbm]] and shrunk to fit into any host.
EXAMPLE = """
daemon = { run_dir = "/run/kvstore" }
dram = { size = "64 MiB", path = "DRAM", hugepages = false, preallocate = true }
eviction = { policy = "relevance", idle_after = "10 min" }
metrics = { listen = "127.0.0.1:9420" }
[nvme]
paths = ["NVME"]
size = "128 MiB"
engine = "auto"
write_policy = "through"
write_budget = "unlimited"
sync_interval = "1 s"
[tenants.default]
group = ""
dram_quota = "100%"
nvme_quota = "100%"
"""


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    return config_tree(tmp_path)


@pytest.fixture
def small_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file system has 1 GiB in all and 100 MiB free."""
    monkeypatch.setattr(filesystems, "room", lambda path: (GIB, 100 * MIB))


def good(
    base: dict[str, Any], change: Mapping[str, Any], environ: dict[str, str] | None = None
) -> Config:
    tree = copy.deepcopy(base)
    for section, keys in copy.deepcopy(dict(change)).items():
        if isinstance(keys, dict) and section != "tenants":
            tree.setdefault(section, {}).update(keys)
        else:
            tree[section] = keys
    return config.parse(tree, environ or {}, "f.toml")


def refused(
    base: dict[str, Any], change: Mapping[str, Any], environ: dict[str, str] | None = None
) -> str:
    """The one line with which it is refused."""
    with pytest.raises(InvalidConfig) as caught:
        good(base, change, environ)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 800
    return line


# --- values --------------------------------------------------------------------------------------


# fmt: off
SLABS = {
    "8 MiB": MIB, "12 MiB": MIB, "16 MiB": 2 * MIB, "500 MiB": 32 * MIB, "512 MiB": 64 * MIB,
    "1000 MiB": 64 * MIB, "4 GiB": 64 * MIB,
}
ADDRESSES = {
    "": None, "0.0.0.0:1": ("0.0.0.0", 1), "[::1]:94": ("::1", 94), "localhost:0": ("localhost", 0),
}
ENVIRON = {
    "DAEMON_RUN_DIR": "/run/other", "DAEMON_LOG_LEVEL": "debug", "DAEMON_LOG_FORMAT": "json",
    "DAEMON_BUSY_POLL": "50 us", "DAEMON_DRAIN_TIMEOUT": "5",
    "DRAM_PATH": "/dev/shm/other", "DRAM_SIZE": "32 MiB",
    "DRAM_HUGEPAGES": "false", "DRAM_PREALLOCATE": "False", "DRAM_SLAB_SIZE": "2097152",
    "DRAM_NUMA": "off",
    "NVME_PATHS": "/mnt/a, /mnt/b", "NVME_SIZE": "67108864", "NVME_ENGINE": "posix",
    "NVME_GDS_SUMS": "host",
    "NVME_WRITE_POLICY": "on-evict", "NVME_WRITE_BUDGET": "1 MiB/s", "NVME_SYNC_INTERVAL": "250 ms",
    "NVME_HANG_TIMEOUT": "2 s", "NVME_THREADS": "2", "NVME_QUEUE_DEPTH": "3",
    "EVICTION_POLICY": "lru",
    "EVICTION_IDLE_AFTER": "1 h", "METRICS_LISTEN": "", "LIMITS_KEYS_PER_CALL": "10",
    "LIMITS_LEASES_PER_SESSION": "11", "LIMITS_SESSIONS": "12", "LIMITS_LAYOUTS": "13",
    "LIMITS_LEASES_PER_TENANT": "14", "LIMITS_BYTES_PER_SESSION": "25%",
    "LIMITS_BYTES_PER_TENANT": "12 MiB", "LIMITS_REQUESTS_PER_S": "15",
    "LIMITS_REQUESTS_PER_S_TENANT": "16",
    "TENANTS_DEFAULT_GROUP": "", "TENANTS_DEFAULT_DRAM_QUOTA": "50%",
    "TENANTS_DEFAULT_NVME_QUOTA": "8 MiB",
}
BAD_VARIABLES = [
    ("NVME_SIZ", "1", ["nvme.siz = '1'", "did you mean size?"]),
    ("NVME_SIZE", "lots", ["nvme.size = 'lots'", '"64 GiB"']),
    ("HBM_SIZ", "1", ["hbm.siz = '1'", "is unknown: did you mean size?"]),
    ("HBM_SIZE", "much", ["KVSTORE_HBM_SIZE: hbm.0.size = 'much'", "is not a size"]),
    ("DRAM_HUGEPAGES", "maybe", ["dram.hugepages = 'maybe'", "true or false"]),
    ("LIMITS_SESSIONS", "x", ["limits.sessions = 'x'", "1 to 65536"]),
    ("NVME_PATHS", "a,b", ["nvme.paths", "absolute path"]),
    ("TENANTS_X_QUOTA", "1", ["tenants.x_quota = '1'", "did you mean"]),
]
HOST = [  # what the tree is, and the words its refusal must hold
    ({"dram": {"sise": "1"}}, ["f.toml: dram.sise = '1'", "did you mean size?"]),
    ({"dram": {"colour": "red"}}, ["dram.colour = 'red'", "known are path, size, hugepages"]),
    ({"drum": {"size": "1"}}, ["f.toml: drum", "did you mean dram?"]),
    ({"tenants": {"default": {"quota": "1%"}}}, ["tenants.default.quota", "did you mean"]),
    ({"dram": {"size": "64 gigs"}}, ["dram.size = '64 gigs'", "is not a size", '"64 GiB"']),
    ({"dram": {"size": -5}}, ["dram.size = -5", "from 0 to 8 EiB"]),
    ({"dram": {"size": "4 MiB"}}, ["dram.size = 4 MiB", "too small", "at least 8 MiB"]),
    ({"dram": {"size": "0"}}, ["dram.size = 0", "at least 8 MiB"]),
    ({"dram": {"size": "2 GiB"}}, ["dram.size = 2 GiB", "can hold 1024 MiB", "give less"]),
    ({"dram": {"hugepages": True}},
     ["dram.hugepages = true", "dram.path = '", "not on hugetlbfs", "mount -t hugetlbfs", "false"]),
    ({"dram": {"numa": "left"}}, ["dram.numa = 'left'", '"auto", "off", "interleave"', '"0,1"']),
    ({"dram": {"numa": True}}, ["dram.numa = True", '"auto"']),
    ({"dram": {"numa": "0,900"}}, ["dram.numa = '0,900'", "node 900 has no memory", "name of 0"]),
    ({"dram": {"hugepages": "yes"}}, ["dram.hugepages = 'yes'", "boolean", "write true or false"]),
    ({"dram": {"path": "shm"}}, ["dram.path = 'shm'", "absolute path", "from the root"]),
    ({"dram": {"path": "/a\0b"}}, ["dram.path", "absolute path"]),
    ({"dram": {"slab_size": "3 MiB"}}, ["dram.slab_size = '3 MiB'", "power of two", '"64 MiB"']),
    ({"dram": {"slab_size": "2 KiB"}}, ["dram.slab_size", "4 KiB or more"]),
    ({"dram": {"slab_size": "0"}}, ["dram.slab_size", "4 KiB or more"]),
    ({"dram": {"slab_size": "64 MiB"}}, ["dram.slab_size = 64 MiB", "two are more than dram.size"]),
    ({"nvme": {"size": "2 GiB"}}, ["nvme.size = 2 GiB", "can hold 1024 MiB in all", "give less"]),
    ({"nvme": {"paths": []}}, ["nvme.paths = []", "name one", 'nvme.size = "0"']),
    ({"nvme": {"paths": "/a"}}, ["nvme.paths = '/a'", "is not a list", '["/mnt/nvme0"']),
    ({"nvme": {"paths": ["/a", "/a/"]}}, ["nvme.paths", "twice"]),
    ({"nvme": {"size": "4 MiB"}}, ["nvme.size = 4 MiB", "two slabs of 8 MiB", "or 0"]),
    ({"nvme": {"engine": "uring"}}, ["nvme.engine = 'uring'", '"auto", "posix" or "gds"']),
    ({"nvme": {"gds_sums": "never"}}, ["nvme.gds_sums = 'never'", '"device" or "host"']),
    ({"nvme": {"write_policy": "never"}}, ["nvme.write_policy = 'never'", "'second-touch'"]),
    ({"nvme": {"write_budget": "2 TiB"}}, ["nvme.write_budget = '2 TiB'", '"2 TiB/day"']),
    ({"nvme": {"write_budget": "0 B/s"}}, ["nvme.write_budget", 'nvme.size = "0"']),
    ({"nvme": {"sync_interval": "0"}}, ["nvme.sync_interval", '"1 ms" to "1 h"']),
    ({"nvme": {"threads": 0}}, ["nvme.threads = 0", "1 to 256"]),
    ({"nvme": {"queue_depth": 1.5}}, ["nvme.queue_depth = 1.5", "1 to 65536"]),
    ({"hbm": [{"device": 0, "size": "8 KiB"}]}, ["hbm.0.size", "8 KiB", "less than a slab"]),
    ({"hbm": [{"device": 1}, {"device": 1}]}, ["hbm.1.device", "is there twice"]),
    ({"hbm": [{"size": "8 GiB"}]}, ["hbm.0.device", "required", "CUDA number"]),
    ({"hbm": {"device": 0}}, ["hbm", "[[hbm]] tables"]),
    ({"eviction": {"policy": "lirs"}}, ["eviction.policy = 'lirs'", "'relevance-prefill', 'lru'"]),
    ({"eviction": {"idle_after": "soon"}}, ["eviction.idle_after = 'soon'", '"10 min"']),
    ({"metrics": {"listen": "9420"}}, ["metrics.listen = '9420'", '"127.0.0.1:9420"']),
    ({"metrics": {"listen": "a b:1"}}, ["metrics.listen", '"" for off']),
    ({"metrics": {"listen": "h:70000"}}, ["metrics.listen = h:70000", "1 to 65535"]),
    ({"limits": {"keys_per_call": 65_537}}, ["limits.keys_per_call = 65537", "1 to 65536"]),
    ({"limits": {"sessions": "9"}}, ["limits.sessions = '9'", "integer", "1 to 65536"]),
    ({"limits": {"bytes_per_session": "half"}},
     ["limits.bytes_per_session = 'half'", "is not a quota", '"50%"']),
    ({"limits": {"bytes_per_tenant": "0%"}}, ["limits.bytes_per_tenant", "is no part", '"50%"']),
    ({"limits": {"requests_per_s": 0}}, ["limits.requests_per_s = 0", "1 to 1073741824"]),
    ({"daemon": {"log_level": "loud"}}, ["daemon.log_level = 'loud'", "'debug'", "one of these"]),
    ({"daemon": {"run_dir": "/" + "r" * 90}}, ["daemon.run_dir", "Linux takes 107", "shorter"]),
    ({"dram": 3}, ["f.toml: dram = 3", "write a table"]),
    ({"tenants": {"a": 3}}, ["f.toml: tenants.a = 3", "write a table"]),
    ({"tenants": {"A": {}}}, ["tenants.A = 'A'", "no tenant's name", "a-z, 0-9"]),
    ({"tenants": {"../x": {}}}, ["tenants.../x = '../x'", "no tenant's name"]),
    ({"tenants": {"a" * 33: {}}}, ["no tenant's name", "at most 31"]),
    ({"tenants": {"_a": {}}}, ["no tenant's name", "use a letter or digit"]),
    ({"tenants": {"a": {"group": "no-such-group"}}},
     ["tenants.a.group = 'no-such-group'", "groupadd"]),
    ({"tenants": {"a": {"group": 7}}}, ["tenants.a.group = 7", "a group's name"]),
    ({"tenants": {"a": {"dram_quota": "101%"}}}, ["tenants.a.dram_quota = '101%'", "0 to 100"]),
    ({"tenants": {"a": {"dram_quota": "half"}}}, ["tenants.a.dram_quota = 'half'", '"50%"']),
    ({"tenants": {"a": {"dram_quota": "60%"}, "default": {"dram_quota": "32 MiB"}}},
     ["tenants.a.dram_quota", "32 MiB + 60%", "more than 100 % of 64 MiB", "lower one"]),
    ({"tenants": {"a": {"nvme_quota": "60%"}, "default": {"nvme_quota": "60%"}}},
     ["tenants.a.nvme_quota", "60% + 60%", "more than 100 % of 128 MiB"]),
    ({"tenants": {"a": {"dram_quota": "100%"}}},
     ["tenants.default.dram_quota = not set", "less than one slab of 8 MiB", "lower the other"]),
    ({"tenants": {"a": {"nvme_quota": "100%"}}},
     ["tenants.default.nvme_quota = not set", "less than one slab"]),
    ({"tenants": {"default": {"dram_quota": "0%"}, "a": {}}},
     ["tenants.default.dram_quota = 0%", "less than one slab", "raise it"]),
]
# fmt: on


# --- the tree ------------------------------------------------------------------------------------


def test_no_file_gives_modest_defaults_for_this_host() -> None:
    plain = config.load(None, {})
    assert 8 * MIB <= plain.dram.size <= GIB
    assert plain.nvme.size <= 4 * GIB
    assert plain.tenant_dram_bytes("default") == plain.dram.size
    assert plain.tenant_nvme_bytes("default") == plain.nvme.size
    assert plain.warnings() == []


def test_the_documented_example_is_read(tmp_path: Path) -> None:
    file = tmp_path / "kvstore.toml"
    file.write_text(EXAMPLE.replace("DRAM", f"{tmp_path}/shm").replace("NVME", f"{tmp_path}/disk"))
    read = config.load(file, {})
    assert read.daemon.run_dir == Path("/run/kvstore")
    assert (read.dram.size, read.dram.hugepages, read.dram.preallocate) == (64 * MIB, False, True)
    assert read.nvme.paths == (tmp_path / "disk",)
    assert (read.nvme.size, read.nvme.engine, read.nvme.threads) == (128 * MIB, "auto", 8)
    assert (read.nvme.write_policy, read.nvme.write_budget) == ("through", None)
    assert (read.nvme.sync_interval, read.eviction.idle_after) == (1.0, 600.0)
    assert read.metrics.address == ("127.0.0.1", 9420)
    assert (read.daemon.log_level, read.daemon.drain_timeout) == ("info", 30.0)
    assert (read.limits.keys_per_call, read.limits.leases_per_session) == (65_536, 4096)
    assert (read.limits.sessions, read.limits.layouts, read.nvme.queue_depth) == (1024, 256, 32)


def test_the_tree_is_frozen(base: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        good(base, {}).dram.size = 1


def test_the_automatic_sizes_are_a_quarter_of_what_is_free(
    base: dict[str, Any], small_host: None
) -> None:
    read = good(base, {"dram": {"size": "auto"}, "nvme": {"size": "auto"}})
    assert read.dram.size == 16 * MIB  # 25 MiB, as a power of two
    assert read.nvme.size == 0  # less than two of the largest slabs is no tier


def test_what_our_own_files_hold_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert filesystems.room(tmp_path / "a" / "b")[0] == filesystems.room(tmp_path)[0] > 0
    (tmp_path / "arena").write_bytes(b"x")
    stat = SimpleNamespace(f_blocks=100, f_bavail=50, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: stat)
    held = (tmp_path / "arena").stat().st_blocks * 512
    assert filesystems.room(tmp_path) == (409_600, 204_800 + held)


def test_the_slab_is_an_eighth_or_a_sixteenth(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "room", lambda path: (64 * GIB, 64 * GIB))
    for size, slab in SLABS.items():
        assert good(base, {"dram": {"size": size}}).slab_bytes == slab
        assert good(base, {"dram": {"size": size, "slab_size": "4 KiB"}}).slab_bytes == 4096


def test_tenants_share_the_tiers(base: dict[str, Any]) -> None:
    tenants = {
        "default": {"dram_quota": "25%", "nvme_quota": "0%"},
        "team-a": {"dram_quota": "33.4%", "nvme_quota": "50%"},
        "team_b": {"dram_quota": "10 MiB"},
    }
    read = good(base, {"dram": {"slab_size": "1 MiB"}, "tenants": tenants})
    assert read.tenant_dram_bytes("default") == 16 * MIB
    assert read.tenant_dram_bytes("team-a") == 21 * MIB  # 21.376, in whole slabs
    assert read.tenant_dram_bytes("team_b") == 10 * MIB
    assert read.tenant_nvme_bytes("default") == 0
    assert read.tenant_nvme_bytes("team-a") == read.tenant_nvme_bytes("team_b") == 64 * MIB


def test_default_is_always_there_and_gets_what_is_left(base: dict[str, Any]) -> None:
    read = good(base, {"tenants": {"a": {"dram_quota": "75%", "nvme_quota": "25%"}}})
    assert [read.tenant_dram_bytes(one) for one in ("a", "default")] == [48 * MIB, 16 * MIB]
    assert [read.tenant_nvme_bytes(one) for one in ("a", "default")] == [32 * MIB, 96 * MIB]


def test_a_group_of_this_host_is_taken(base: dict[str, Any]) -> None:
    name = grp.getgrall()[0].gr_name
    assert good(base, {"tenants": {"default": {"group": name}}}).tenants["default"].group == name


def test_metrics_addresses(base: dict[str, Any]) -> None:
    for listen, address in ADDRESSES.items():
        assert good(base, {"metrics": {"listen": listen}}).metrics.address == address


def test_memory_nodes_are_chosen_by_number_or_word(base: dict[str, Any]) -> None:
    assert good(base, {}).dram.numa == "auto"
    for given, kept, nodes in (("0", "0", "0"), (0, "0", "0"), ("off", "off", "as the kernel")):
        read = good(base, {"dram": {"numa": given}})
        assert read.dram.numa == kept
        assert f"dram.numa = {kept}\n" in read.describe()
        assert f"\nmemory nodes: {nodes}" in read.describe()


def test_huge_pages_make_sizes_whole_and_need_their_pool(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a mount of pages of 16 MiB, which no host of these tests has."""
    monkeypatch.setattr(filesystems, "page_bytes", lambda path: 16 * MIB * ("shm" in str(path)))
    monkeypatch.setattr(filesystems, "room", lambda path: (GIB, GIB))
    quotas = {"a": {"dram_quota": "40 MiB"}, "default": {"dram_quota": "23 MiB"}}
    change: dict[str, Any] = {"dram": {"hugepages": True}, "tenants": quotas}
    read = good(base, change)
    assert [read.tenant_dram_bytes(one) for one in quotas] == [32 * MIB, 16 * MIB]
    assert read.slab_bytes == 8 * MIB
    quotas["default"]["dram_quota"] = "15 MiB"
    assert "less than one slab of 16 MiB" in refused(base, change)
    assert "is on hugetlbfs: set dram.hugepages = true" in refused(base, {})
    monkeypatch.setattr(filesystems, "room", lambda path: (32 * MIB, 32 * MIB))
    line = refused(base, {"dram": {"hugepages": True}, "nvme": {"size": "32 MiB"}})
    assert "dram.size = 64 MiB: wanted 4 huge pages of 16384kB, available 2" in line
    monkeypatch.setattr(filesystems, "room", lambda path: (0, 0))
    line = refused(base, {"dram": {"hugepages": True, "size": "auto"}})
    assert "wanted 1 huge pages of 16384kB, available 0 (0 free of 0, 0 reserved)" in line
    assert "echo 1 > /sys/kernel/mm/hugepages/hugepages-16384kB/nr_hugepages" in line


def test_tiers_of_size_zero(base: dict[str, Any]) -> None:
    assert good(base, {"hbm": [{"device": 0, "size": "0"}]}).hbm[0].device == 0
    for change in ({"size": "0"}, {"size": 0, "paths": []}, {"size": "auto", "paths": []}):
        read = good(base, {"nvme": change, "tenants": {"a": {"dram_quota": "50%"}}})
        assert read.nvme.size == read.tenant_nvme_bytes("a") == 0


# --- the environment -----------------------------------------------------------------------------


def test_every_key_has_a_variable(base: dict[str, Any]) -> None:
    keys = {
        f"{section}_{key}".upper()
        for section, model in config._SECTIONS.items()
        for key in model.model_fields
        if section not in ("hbm", "tenants", "faults")
    }
    assert keys < set(ENVIRON)
    read = good(base, {}, {f"KVSTORE_{key}": value for key, value in ENVIRON.items()})
    daemon, dram, nvme, limits = read.daemon, read.dram, read.nvme, read.limits
    assert (str(daemon.run_dir), daemon.log_level) == ("/run/other", "debug")
    assert (daemon.log_format, daemon.drain_timeout) == ("json", 5.0)
    assert (dram.size, dram.slab_size) == (32 * MIB, 2 * MIB)
    assert (str(dram.path), dram.hugepages, dram.preallocate) == ("/dev/shm/other", False, False)
    assert dram.numa == "off"
    assert (nvme.paths, nvme.size) == ((Path("/mnt/a"), Path("/mnt/b")), 64 * MIB)
    assert (nvme.engine, nvme.write_policy, nvme.write_budget) == ("posix", "on-evict", MIB)
    assert (nvme.sync_interval, nvme.threads, nvme.queue_depth) == (0.25, 2, 3)
    assert nvme.hang_timeout == 2.0
    assert (read.eviction.policy, read.eviction.idle_after) == ("lru", 3600.0)
    assert read.metrics.address is None
    assert limits.keys_per_call == 10
    bounds = read.bounds(16 * MIB)
    assert (bounds.leases_per_session, bounds.sessions, bounds.layouts) == (11, 12, 13)
    assert (bounds.leases_per_tenant, bounds.bytes_per_session) == (14, 4 * MIB)
    assert bounds.bytes_per_tenant == 12 * MIB
    assert (bounds.requests_per_s, bounds.requests_per_s_tenant) == (15, 16)
    assert read.tenant_dram_bytes("default") == 16 * MIB
    assert read.tenant_nvme_bytes("default") == 8 * MIB
    assert "KVSTORE_NVME_SIZE" in read.describe()


def test_a_variable_finds_the_tenant_with_a_dash_or_makes_one(base: dict[str, Any]) -> None:
    file = {"tenants": {"team-a": {"dram_quota": "25%"}, "default": {"dram_quota": "25%"}}}
    read = good(base, file, {"KVSTORE_TENANTS_TEAM_A_DRAM_QUOTA": "50%"})
    assert sorted(read.tenants) == ["default", "team-a"]
    assert read.tenant_dram_bytes("team-a") == 32 * MIB
    made = good(base, {}, {"KVSTORE_TENANTS_TEAM_B_DRAM_QUOTA": "50%"})
    assert sorted(made.tenants) == ["default", "team_b"]


def test_variables_of_nobody_are_left_alone(base: dict[str, Any]) -> None:
    environ = {"KVSTORE_SOCKET": "/x", "KVSTORE_TRACE_X": "1", "KVSTORE_DRAM": "1", "HOME": "/"}
    assert good(base, {}, environ) == good(base, {})


@pytest.mark.parametrize(("variable", "text", "words"), BAD_VARIABLES)
def test_a_bad_variable_is_named(
    base: dict[str, Any], variable: str, text: str, words: list[str]
) -> None:
    line = refused(base, {}, {f"KVSTORE_{variable}": text})
    assert line.startswith(f"KVSTORE_{variable}: ")
    assert all(word in line for word in words), line


def test_a_variable_over_a_broken_section_blames_the_file(base: dict[str, Any]) -> None:
    for broken in ({"nvme": 3}, {"tenants": 3}, {"tenants": {"a": 3}}):
        environ = {"KVSTORE_NVME_SIZE": "1 MiB", "KVSTORE_TENANTS_A_GROUP": ""}
        assert "f.toml: " in refused(base, broken, environ)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_host")
@pytest.mark.parametrize(("change", "words"), HOST, ids=[str(change)[:50] for change, _ in HOST])
def test_what_cannot_run_is_refused_by_name_with_the_remedy(
    base: dict[str, Any], change: dict[str, Any], words: list[str]
) -> None:
    line = refused(base, change)
    assert line.startswith("f.toml: ")
    assert all(word in line for word in words), line


def test_all_problems_come_in_one_line(base: dict[str, Any]) -> None:
    line = refused(
        base, {"dram": {"size": "x"}, "nvme": {"sise": 1}}, {"KVSTORE_LIMITS_SESSIONS": "-1"}
    )
    parts = line.split("; ")
    assert len(parts) == 3
    assert any(part.startswith("KVSTORE_LIMITS_SESSIONS: limits.sessions = -1") for part in parts)


def test_a_value_of_many_lines_stays_one_short_line(base: dict[str, Any]) -> None:
    assert "dram.size" in refused(base, {"dram": {"size": "a\nb" * 1000}})


def test_a_file_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"gone\.toml: .*No such file.*: name a TOML file"):
        config.load(tmp_path / "gone.toml", {})
    file = tmp_path / "broken.toml"
    file.write_text("[dram\nsize = 1")
    with pytest.raises(InvalidConfig, match=r"broken\.toml: .*line 1"):
        config.load(file, {})
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidConfig, match=r"broken\.toml: "):
        config.load(file, {})
    with pytest.raises(InvalidConfig, match=r"Is a directory"):
        config.load(tmp_path, {})


def test_the_file_is_named_in_its_errors(tmp_path: Path) -> None:
    file = tmp_path / "kv.toml"
    file.write_text('[nvme]\nsise = "1 TiB"\n')
    with pytest.raises(InvalidConfig) as caught:
        config.load(file, {})
    assert str(caught.value) == f"{file}: nvme.sise = '1 TiB': is unknown: did you mean size?"


# --- what else it says ---------------------------------------------------------------------------


@pytest.mark.usefixtures("small_host")
def test_what_is_doubtful_is_a_warning(base: dict[str, Any]) -> None:
    quiet = good(base, {"nvme": {"size": "64 MiB"}, "eviction": {"policy": "lru"}})
    assert quiet.warnings() == []
    asked = good(base, {"eviction": {"policy": "relevance"}})
    (disk,) = asked.warnings()
    assert "nvme.size = '128 MiB'" in disk and "only 100 MiB free" in disk


def test_the_description_names_what_would_run(base: dict[str, Any]) -> None:
    text = good(base, {"tenants": {"a": {"dram_quota": "50%"}}}).describe()
    assert "f.toml" in text and "dram.size = 64 MiB" in text and "eviction by relevance" in text
    assert "nvme.write_budget = unlimited" in text
    assert "tenant default: dram 32 MiB, nvme 64 MiB, sockets /run/kv/default" in text
    assert "tenants.a.dram_quota = 50%" in text


def test_what_a_running_daemon_can_take_over(base: dict[str, Any]) -> None:
    old = good(base, {})
    assert config.reloadable_changes(old, good(base, {})) == ([], [])
    new = good(
        base,
        {
            "daemon": {"log_level": "debug"},
            "nvme": {"write_policy": "on-evict", "write_budget": "1 GiB/h", "size": "64 MiB"},
            "eviction": {"idle_after": 5},
            "limits": {"sessions": 5, "bytes_per_session": "25%", "requests_per_s": 7},
            "metrics": {"listen": ""},
            "tenants": {"a": {"dram_quota": "50%"}},
        },
    )
    changed, restart = config.reloadable_changes(old, new)
    words = "daemon.log_level eviction.idle_after limits.bytes_per_session limits.requests_per_s"
    words += " limits.sessions nvme.write_budget nvme.write_policy"
    assert sorted(changed) == words.split()
    tenant = ["tenants.a.dram_quota", "tenants.a.group"]
    assert sorted(restart) == ["metrics.listen", "nvme.size", *tenant]
    assert sorted(config.reloadable_changes(new, old)[1]) == sorted(restart)


def test_an_automatic_size_that_follows_the_free_space_is_no_change(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del base["dram"]["size"], base["nvme"]["size"]
    monkeypatch.setattr(filesystems, "room", lambda path: (GIB, GIB))
    old = good(base, {})
    monkeypatch.setattr(filesystems, "room", lambda path: (GIB, GIB // 4))
    new = good(base, {})
    assert old.dram.size != new.dram.size
    assert config.reloadable_changes(old, new) == ([], [])
