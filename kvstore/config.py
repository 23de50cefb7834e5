"""The configuration: one frozen tree from one TOML file and KVSTORE_* variables, checked.

It creates nothing. Defaults stand beside their field with the reason. A field's `description`
is the remedy that its errors name; a parser raises ValueError("what is wrong: what to write").
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from kvstore import filesystems, numa, paths
from kvstore.config_checks import DRAM_BYTES_MIN, Trouble, impossible
from kvstore.errors import InvalidConfig
from kvstore.limits import Limits as Bounds
from kvstore.tiers.faults import VERBS, Fault, FaultPlan, Rate
from kvstore.types import GIB, KEYS_PER_CALL_MAX, KIB, MIB, SLOT_ALIGNMENT
from kvstore.units import Quota, format_size, parse_chance, parse_duration, parse_rate, parse_size

_LISTEN = r"^$|^([\w.-]+|\[[\da-fA-F:.]+\]):\d{1,5}$"


def _size_or_auto(value: object, info: pydantic.ValidationInfo) -> int:
    """A size; "auto" is 1 GiB of DRAM or 4 GiB of NVMe, at most a quarter of what is free there.

    A power of two, so that a restart finds the same size although the free space moved a little.
    """
    if value != "auto":
        return parse_size(value)
    where = info.data.get("paths", [info.data.get("path", Path("/"))])
    most, least = (4 * GIB, 128 * MIB) if "paths" in info.data else (GIB, DRAM_BYTES_MIN)
    quarter = min([most, *(filesystems.room(path)[1] // 4 for path in where)]) if where else 0
    return 1 << quarter.bit_length() - 1 if quarter >= least else 0


def _slab_size(value: object) -> int | None:
    size = 0 if value is None or value == "auto" else parse_size(value)
    if size & (size - 1) or 0 < size < SLOT_ALIGNMENT or value in (0, "0"):
        raise ValueError('is not a power of two of 4 KiB or more: write "64 MiB" or "auto"')
    return size or None


def _folder(value: object) -> Path:
    text = os.path.expanduser(str(value)) if isinstance(value, str | Path) else ""
    if not os.path.isabs(text) or "\0" in text:
        raise ValueError("is not an absolute path: write it from the root, like /var/lib/kvstore")
    return Path(os.path.normpath(text))


def _folders(value: object) -> tuple[Path, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError('is not a list: write it like ["/mnt/nvme0", "/mnt/nvme1"]')
    found = tuple(map(_folder, value))
    if len(set(found)) != len(found):
        raise ValueError("names a folder twice: name each one once")
    return found


def _part(value: object) -> Quota:
    found = Quota.parse(value)
    if found is None or (not found.share and not found.size):
        raise ValueError('is no part of the arena: write it like "50%" or "4 GiB"')
    return found


def _whole(default: int, most: int) -> Any:
    return Field(default, ge=1, le=most, description=f"a whole number of 1 to {most}")


Seconds = Annotated[float, BeforeValidator(parse_duration)]
Folder = Annotated[Path, BeforeValidator(_folder)]
AutoSize = Annotated[int, BeforeValidator(_size_or_auto)]
Chance = Annotated[float, BeforeValidator(parse_chance)]
Nodes = Annotated[str, BeforeValidator(numa.parse_choice)]
Part = Annotated[Quota, PlainValidator(_part)]
QuotaField = Annotated[Quota | None, PlainValidator(Quota.parse)]
Origins = dict[str, str]  # dotted key -> the variable that set it


class Section(pydantic.BaseModel):
    """A part of the tree: frozen, of exact types, without unknown keys."""

    model_config = {"frozen": True, "extra": "forbid", "strict": True, "validate_default": True}


class Daemon(Section):
    """The process itself."""

    run_dir: Folder = Field(default_factory=paths.run_dir)  # where clients look by themselves
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # a line per event of weight
    log_format: Literal["auto", "json", "console"] = "auto"  # console on a terminal, else JSON
    busy_poll: Seconds = 0.0003  # awake so long after a request: waking up costs as much; 0: never
    drain_timeout: Seconds = 30.0  # well below the 90 s after which systemd kills


class Dram(Section):
    """The arena in host memory."""

    path: Folder = Field(default_factory=paths.shm_dir)  # tmpfs: outlives the daemon
    size: AutoSize = "auto"  # type: ignore[assignment]  # modest when nobody says how much
    hugepages: bool = Field(default=False, description="true or false")  # root sets up the pool
    preallocate: bool = Field(default=True, description="true or false")  # lacks show at the start
    numa: Nodes = "auto"  # see kvstore.numa.choose
    slab_size: Annotated[int | None, PlainValidator(_slab_size)] = None  # "auto": see slab_bytes


class Nvme(Section):
    """Files on local disks; every path takes an equal part of the size."""

    paths: Annotated[tuple[Path, ...], BeforeValidator(_folders)] = Field(
        default_factory=lambda: (paths.state_dir(),)
    )
    size: AutoSize = "auto"  # type: ignore[assignment]  # modest when nobody says how much
    engine: Literal["auto", "posix", "gds"] = Field(
        default="auto", description='"auto", "posix" or "gds"'
    )  # between files and GPUs: see kvstore.ways
    gds_sums: Literal["device", "host"] = Field(
        default="device", description='"device" or "host"'
    )  # where bytes that came past the host are checked
    write_policy: Literal["through", "on-evict", "second-touch"] = "through"  # survives a reboot
    write_budget: Annotated[float | None, PlainValidator(parse_rate)] = "unlimited"  # type: ignore[assignment]
    sync_interval: Seconds = Field(default=1.0, ge=0.001, le=3600, description='"1 ms" to "1 h"')
    hang_timeout: Seconds = Field(default=5.0, ge=0.05, le=3600, description='"50 ms" to "1 h"')
    threads: int = _whole(8, 256)  # write at a time: enough in flight for one device
    queue_depth: int = _whole(32, 65_536)  # moves waiting, per tenant; more are refused


class Hbm(Section):
    """The arena in one GPU's memory: it takes memory from engines, so nobody gets it unasked."""

    device: int = Field(ge=0, description="the CUDA number of the device, from 0")
    size: Annotated[int, BeforeValidator(parse_size)] = 0


class Eviction(Section):
    """What leaves when room is short."""

    policy: Literal[
        "relevance",
        "relevance-prefill",
        "lru",
        "arc",
        "fifo",
        "lfu",
        "mq",
        "s3fifo",
        "wtinylfu",
    ] = "relevance"  # what it learns is worth its memory, see docs/operating.md
    idle_after: Seconds = 600.0  # a conversation's pause is shorter


class Metrics(Section):
    """The Prometheus text page."""

    listen: str = Field(  # local, because the page has no login
        default="127.0.0.1:9420", pattern=_LISTEN, description='"127.0.0.1:9420", or "" for off'
    )

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port (0: the system picks one), None when off."""
        host, _, port = self.listen.rpartition(":")
        return (host.strip("[]"), int(port)) if self.listen else None


class Limits(Section):
    """Bounds of what clients may ask: far above honest use, far below what hurts."""

    keys_per_call: int = _whole(KEYS_PER_CALL_MAX, KEYS_PER_CALL_MAX)
    leases_per_session: int = _whole(4096, 1 << 20)
    leases_per_tenant: int = _whole(65_536, 1 << 24)
    # Most hosts run one engine: it may lease all. Lower them where engines share a tenant.
    bytes_per_session: Part = "100%"  # type: ignore[assignment]
    bytes_per_tenant: Part = "100%"  # type: ignore[assignment]
    requests_per_s: int = _whole(200_000, 1 << 30)  # several times what a client gets answered
    requests_per_s_tenant: int = _whole(500_000, 1 << 30)
    sessions: int = _whole(1024, 65_536)
    layouts: int = _whole(256, 65_536)


class Tenant(Section):
    """Who may use a part of the tiers. A quota not set is an equal part of what the others left."""

    group: str = Field(default="", description="a group's name, or \"\" for the daemon's own")
    dram_quota: QuotaField = None
    nvme_quota: QuotaField = None


class Faults(Section):
    """For soak runs only, and not shown unless set: chances that NVMe operations go wrong."""

    seed: int = Field(default=0, ge=0, description="a whole number")
    read_error: Chance = 0.0
    write_error: Chance = 0.0
    sync_error: Chance = 0.0
    enospc: Chance = 0.0
    short: Chance = 0.0
    torn: Chance = 0.0
    flip: Chance = 0.0
    slow: Chance = 0.0
    latency: Seconds = 0.05  # of what is slow
    hang: Chance = 0.0
    hang_time: Seconds = 10.0  # 0: for ever

    @property
    def plan(self) -> FaultPlan | None:
        """What is to go wrong; None when nothing is."""
        rates = [Rate(Fault.EIO, getattr(self, f"{verb}_error"), verb) for verb in VERBS[:3]]
        rates += [Rate(one, getattr(self, one.value)) for one in Fault if one is not Fault.EIO]
        rates = [rate for rate in rates if rate.chance]
        return (
            FaultPlan(
                rates=tuple(rates),
                seed=self.seed,
                slow_s=self.latency,
                hang_s=self.hang_time or None,
            )
            if rates
            else None
        )


class Config(Section):
    """The whole tree. `load` and `parse` give one that was checked against this host."""

    daemon: Daemon = Field(default_factory=Daemon)
    dram: Dram = Field(default_factory=Dram)
    nvme: Nvme = Field(default_factory=Nvme)
    hbm: Annotated[tuple[Hbm, ...], Field(strict=False, description="[[hbm]] tables")] = ()
    eviction: Eviction = Field(default_factory=Eviction)
    metrics: Metrics = Field(default_factory=Metrics)
    limits: Limits = Field(default_factory=Limits)
    faults: Faults = Field(default_factory=Faults)
    tenants: Annotated[
        dict[str, Tenant], AfterValidator(lambda given: {"default": Tenant()} | given)
    ] = Field(default_factory=dict)
    _source: str = pydantic.PrivateAttr(default="defaults")

    @property
    def slab_bytes(self) -> int:
        """Bytes of a slab: as set, or the power of two that cuts the arena into 8 to 16."""
        auto = 1 << max(0, (self.dram.size // 8).bit_length() - 1)
        return self.dram.slab_size or min(64 * MIB, max(64 * KIB, auto))

    def memory_nodes(self, sys: Path = numa.SYS, proc: Path = numa.PROC) -> tuple[int, ...]:
        """The nodes that arenas are spread over; () leaves it to the kernel."""
        devices = [one.device for one in self.hbm]
        return numa.choose(self.dram.numa, self.dram.size, devices, sys=sys, proc=proc)

    def tenant_dram_bytes(self, name: str) -> int:
        """The tenant's quota of DRAM in whole slabs, and whole huge pages where they are used."""
        return self.quota_bytes("dram", self.dram.size)[name]

    def bounds(self, arena_bytes: int) -> Bounds:
        """Those of a tenant with so much DRAM. A part of it is a slab at least."""
        limits = self.limits
        return Bounds(
            leases_per_session=limits.leases_per_session,
            sessions=limits.sessions,
            layouts=limits.layouts,
            leases_per_tenant=limits.leases_per_tenant,
            bytes_per_session=max(self.slab_bytes, limits.bytes_per_session.of(arena_bytes)),
            bytes_per_tenant=max(self.slab_bytes, limits.bytes_per_tenant.of(arena_bytes)),
            requests_per_s=limits.requests_per_s,
            requests_per_s_tenant=limits.requests_per_s_tenant,
        )

    def tenant_nvme_bytes(self, name: str) -> int:
        """The tenant's quota of NVMe in whole slabs."""
        return self.quota_bytes("nvme", self.nvme.size)[name]

    def tenant_hbm_bytes(self, name: str) -> list[tuple[int, int]]:
        """Devices, and the tenant's part of each in whole slabs: all tenants have the same."""
        each = len(self.tenants) * self.slab_bytes
        return [(one.device, one.size // each * self.slab_bytes) for one in self.hbm if one.size]

    def quota_bytes(self, tier: str, total: int) -> dict[str, int]:
        """What each tenant gets of so many bytes, in whole slabs."""
        quotas = self.quotas(tier)
        parts = {name: quota.of(total) for name, quota in quotas.items() if quota}
        rest = max(0, total - sum(parts.values())) // max(1, len(quotas) - len(parts))
        unit = self._unit(tier)
        return {name: parts.get(name, rest) // unit * unit for name in quotas}

    def _unit(self, tier: str) -> int:
        """What a tenant's part of a tier is a multiple of. Both sizes are powers of two."""
        page = (
            filesystems.page_bytes(self.dram.path) if tier == "dram" and self.dram.hugepages else 0
        )
        return max(self.slab_bytes, page)

    def quotas(self, tier: str) -> dict[str, Quota | None]:
        """Each tenant's quota of "dram" or "nvme"; None where it is not set."""
        return {name: getattr(one, f"{tier}_quota") for name, one in self.tenants.items()}

    def places(self) -> Iterator[tuple[str, int, int, Path]]:
        """Of every folder: the key of its tier's size, that size, the folder's part, the folder."""
        yield "dram.size", self.dram.size, self.dram.size, self.dram.path
        for path in self.nvme.paths:
            yield "nvme.size", self.nvme.size, self.nvme.size // len(self.nvme.paths), path

    def warnings(self) -> list[str]:
        """What runs, but perhaps not as meant; one line each. Looks at the disks again."""
        found = [
            f"{key} = {format_size(size)!r}: {path} has only {free // MIB} MiB free: make room "
            "there, or choose a smaller size"
            for key, size, part, path in self.places()
            if filesystems.room(path)[0] and (free := filesystems.room(path)[1]) < part
        ]
        found += [
            f"nvme.paths = '{path}': {there} is no folder: without it there is no NVMe tier"
            for path in self.nvme.paths
            if (there := filesystems.in_the_way(path)) is not None
        ]
        needs = [("[[hbm]]", "cupy", any(one.size for one in self.hbm))]
        needs.append(("nvme.engine = 'gds'", "kvikio", self.nvme.engine == "gds"))
        found += [
            f"{key} needs {module}, which is not installed: the daemon will not start: install "
            f"kvstore[{'gpu' if module == 'cupy' else 'gds'}]"
            for key, module, wanted in needs
            if wanted and importlib.util.find_spec(module) is None
        ]
        if self.faults.plan:
            found.append("[faults] is set: NVMe operations fail on purpose: for soak runs only")
        return found

    def describe(self) -> str:
        """What would run, for people: every key with its value, then what each tenant gets."""
        lines = [f"configuration: {self._source}"]
        for key, value in _flat(self).items():
            text = format_size(value) if key.endswith(".size") else getattr(value, "text", value)
            lines.append(f"  {key} = {_UNSET.get(key, 'the rest') if text is None else text}")
        policy, slab = self.eviction.policy, format_size(self.slab_bytes)
        nodes = ", ".join(map(str, self.memory_nodes())) or "as the kernel likes"
        lines += [f"eviction by {policy}, slabs of {slab}", f"memory nodes: {nodes}"]
        return "\n".join(lines) + "".join(
            f"\ntenant {name}: dram {format_size(self.tenant_dram_bytes(name))}, nvme "
            f"{format_size(self.tenant_nvme_bytes(name))}, sockets {self.daemon.run_dir / name}"
            for name in self.tenants
        )


_SECTIONS: dict[str, type[Section]] = {
    one.__name__.lower(): one
    for one in (Daemon, Dram, Nvme, Hbm, Eviction, Metrics, Limits, Faults)
} | {"tenants": Tenant}
_UNSET = {"dram.slab_size": "auto", "nvme.write_budget": "unlimited"}  # what None means
_RELOADABLE = r"daemon\.log_level|nvme\.write_(policy|budget)|eviction\.idle_after|limits\..*"


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration of a file (None: of no file) under the overrides of the environment."""
    if path is None:
        return parse({}, environ, "defaults")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"{path}: {error}: name a TOML file that can be read") from None
    return parse(tree, environ, str(path))


def parse(tree: dict[str, Any], environ: Mapping[str, str], source: str) -> Config:
    """The same from a tree of plain values, which it changes. InvalidConfig names every problem."""
    origins, found = _overlay(tree, environ)
    try:
        config = Config.model_validate(tree)
        config._source = " + ".join((source, *origins.values()))
        found += impossible(config)
    except pydantic.ValidationError as failed:
        found += [_explain(dict(error)) for error in failed.errors(include_url=False)]
    if found:
        lines = (f"{origins.get(one[0], source)}: {one[0]} = {one[1]}: {one[2]}" for one in found)
        raise InvalidConfig(" ".join("; ".join(lines).split()))
    return config


def _overlay(tree: dict[str, Any], environ: Mapping[str, str]) -> tuple[Origins, list[Trouble]]:
    """Puts the variables in; returns who set each key, and the unknown. TEAM_A is also team-a."""
    origins: Origins = {}
    found: list[Trouble] = []
    for variable, text in sorted(environ.items()):
        prefix, section, key = [*variable.lower().split("_", 2), "", ""][:3]
        if prefix != "kvstore" or section not in _SECTIONS or not key:
            continue
        fields = _SECTIONS[section].model_fields
        place: Any
        if section == "hbm":
            place, section, key = _hbm_table(tree, key, environ)
            if place is None and key in fields:
                wrong = "cannot be told of which table: use KVSTORE_HBM_<DEVICE>_SIZE for each"
                found.append((f"hbm.{key}", repr(text)[:80], wrong))
                origins[f"hbm.{key}"] = variable
                continue
        else:
            place = tree.setdefault(section, {})
        match = re.fullmatch(f"(.+)_({'|'.join(fields)})", key) if section == "tenants" else None
        if match and isinstance(place, dict):
            name, key = match.groups()
            name = next((one for one in place if one.replace("-", "_") == name), name)
            section, place = f"tenants.{name}", place.setdefault(name, {})
        origins[f"{section}.{key}"] = variable
        if key not in fields:
            wrong = f"is unknown: {_nearest(key, fields)}"
            found.append((f"{section}.{key}", repr(text)[:80], wrong))
        elif isinstance(place, dict):  # if not, the tree's own error says so
            place[key] = _typed(text, fields[key].annotation)
    return origins, found


def _hbm_table(tree: dict[str, Any], key: str, environ: Mapping[str, str]) -> tuple[Any, str, str]:
    """Which of the tables [[hbm]] a variable is of, its name, and the key in it: 0_SIZE is that of
    device 0, SIZE that of the only one; a table that is not there is made. None for the table where
    there are several, where a variable of the other kind is there, too, or no such key."""
    tables = tree.setdefault("hbm", [])
    named = re.fullmatch(r"([0-9]{1,4})_(.+)", key)
    device, key = (int(named[1]), named[2]) if named else (None, key)
    if not isinstance(tables, list):
        return tables, "hbm", key  # the tree's own error says so
    ours = re.findall("^kvstore_hbm_(.)", "\n".join(environ).lower(), re.MULTILINE)
    mixed = len(set(map(str.isdigit, ours))) > 1
    unclear = mixed or (key == "device" if named else len(tables) > 1)
    if key not in Hbm.model_fields or unclear:
        return None, "hbm", key
    for at, table in enumerate(tables):
        if device is None or (isinstance(table, dict) and table.get("device") == device):
            return table, f"hbm.{at}", key
    tables.append({"device": device or 0})
    return tables[-1], f"hbm.{len(tables) - 1}", key


def _typed(text: str, kind: object) -> object:
    """The text of a variable as TOML would have typed it, unchanged where it does not fit."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    if kind is int and re.fullmatch("-?[0-9]{1,30}", text.strip()):
        return int(text)
    if kind == tuple[Path, ...]:
        return [one.strip() for one in text.split(",") if one.strip()]
    return text


def _explain(error: dict[str, Any]) -> Trouble:
    """A failure of the model in our words."""
    where = [str(one) for one in error["loc"]]
    model = _SECTIONS[where[0]] if where[0] in _SECTIONS and len(where) > 1 else Config
    if error["type"] == "extra_forbidden":
        wrong = f"is unknown: {_nearest(where[-1], model.model_fields)}"
    elif "error" in error.get("ctx", {}):
        wrong = str(error["ctx"]["error"])
    else:
        field = model.model_fields.get(where[-1])
        remedy = "one of these" if error["type"] == "literal_error" else "a table, [like.this]"
        wrong = f"{error['msg']}: write {(field and field.description) or remedy}"
    return ".".join(where), repr(error["input"])[:80], wrong


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known) or 'none here'}"


def _flat(config: Config) -> dict[str, Any]:
    parts = {name: getattr(config, name) for name in _SECTIONS if name not in ("hbm", "tenants")}
    if not config.faults.model_fields_set:
        del parts["faults"]
    parts |= {f"tenants.{name}": one for name, one in config.tenants.items()}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part}


def reloadable_changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """The keys that differ: those that a running daemon can take over, and those it cannot."""
    before, after = _flat(old), _flat(new)
    for tier in ("dram", "nvme"):  # a size that nobody sets follows the free space
        if all("size" not in getattr(one, tier).model_fields_set for one in (old, new)):
            after[f"{tier}.size"] = before[f"{tier}.size"]
    differ = [key for key in before | after if before.get(key) != after.get(key)]
    changed = [key for key in differ if re.fullmatch(_RELOADABLE, key)]
    return changed, [key for key in differ if key not in changed]
