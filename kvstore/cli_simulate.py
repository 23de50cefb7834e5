"""The command `kvstore simulate`: its options, and how its figures look on a terminal."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvstore import cli_stats, plots, units
from kvstore.errors import InvalidRequest
from kvstore.policies import FAMILIES

if TYPE_CHECKING:
    from kvstore.config import Config
    from kvstore.simulation import Machine
    from kvstore.traces import Sizes, Trace

DRAM_DEFAULT = "64 GiB"
BYTES_PER_TOKEN_DEFAULT = 131_072
HEADINGS = (
    *("", "hits", "2nd half", "DRAM", "NVMe", "written", "per hit"),
    *("TTFT", "p50", "p99"),
)
MEASURED_BYTES = 256 << 20
MEASURED_DISK_BYTES = 64 << 20
_SHARE = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*%\s*")


def _size_or_share(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, float] | None:
    """Bytes, or a share of the trace's distinct blocks; the other one is 0."""
    if value is None:
        return None
    if match := _SHARE.fullmatch(value):
        return 0, float(match[1]) / 100
    try:
        return units.parse_size(value), 0.0
    except ValueError as error:
        raise click.BadParameter(
            f'{value!r} {error}, or a share of the trace\'s distinct blocks like "5%"'
        ) from None


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Bytes, more than 0."""
    try:
        size = None if value is None else units.parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} {error}") from None
    if size == 0:
        raise click.BadParameter(f'{value!r} is no size of a block: write it like "2 MiB"')
    return size


def _rate(context: click.Context, parameter: click.Parameter, value: str) -> float:
    """Bytes a second, more than 0."""
    try:
        rate = float(units.parse_size(value.removesuffix("/s")))
    except ValueError:
        rate = 0.0
    if rate <= 0:
        raise click.BadParameter(f'{value!r} is no bandwidth: write it like "20 GB/s"')
    return rate


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--dram",
    callback=_size_or_share,
    metavar="SIZE",
    help='Of the DRAM tier: like "64 GiB", or "5%" of the distinct blocks of the trace. Not given: '
    f"that of --config, else that of the daemon that was recorded, else {DRAM_DEFAULT}.",
)
@click.option(
    "--nvme",
    callback=_size_or_share,
    metavar="SIZE",
    help='Of the NVMe tier, in the same way; "0": none. Not given: as for --dram, else none.',
)
@click.option(
    "--policy",
    type=click.Choice(sorted(FAMILIES)),
    help="What is evicted. Not given: that of --config, else what the daemon does by default.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A daemon's TOML file, for sizes, write policy and eviction policy of --tenant.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--sweep", is_flag=True, help="Also with a quarter to eight times of each tier.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the miss ratio by size into a .png or .svg file; implies --sweep.",
)
@click.option(
    "--block-bytes",
    callback=_size,
    metavar="SIZE",
    help="Of one block, where the trace does not say (.npz). Not given: --bytes-per-token times "
    "the tokens of a block.",
)
@click.option(
    "--bytes-per-token",
    type=click.IntRange(1, 1 << 30),
    default=BYTES_PER_TOKEN_DEFAULT,
    show_default=True,
    help="Of KV cache. The default is that of Llama 3 8B in bfloat16.",
)
@click.option("--prefill", type=click.FloatRange(min=0, min_open=True), default=10_000.0,
              show_default=True, metavar="TOKENS", help="Tokens that the engine computes a second, "
              "where the trace does not say.")  # fmt: skip
@click.option("--dram-bandwidth", callback=_rate, default="20 GB/s", show_default=True,
              metavar="RATE", help="Of copies from DRAM to the engine.")  # fmt: skip
@click.option("--nvme-read", callback=_rate, default="6 GB/s", show_default=True, metavar="RATE",
              help="Bandwidth of loads.")  # fmt: skip
@click.option("--nvme-write", callback=_rate, default="3 GB/s", show_default=True, metavar="RATE",
              help="Bandwidth of spills.")  # fmt: skip
@click.option("--measured", is_flag=True, help="Measure the three bandwidths on this host instead, "
              "those of NVMe in the folder of the trace.")  # fmt: skip
@click.option("--deadline", type=click.FloatRange(0, 3_600), default=10.0, show_default=True,
              metavar="SECONDS", help="How long a client waits for loads.")  # fmt: skip
def simulate(
    trace: Path,
    dram: tuple[int, float] | None,
    nvme: tuple[int, float] | None,
    policy: str | None,
    config: Path | None,
    as_json: bool,
    plot: Path | None,
    sweep: bool,
    block_bytes: int | None,
    bytes_per_token: int,
    measured: bool,
    **machine: float,
) -> None:
    """Say what other sizes would bring, from a trace.

    TRACE is a file of kvstore trace start, or a compact prefix forest (.npz). It is played through
    the daemon's own code by a clock that runs as fast as it can, and set beside least recently
    used, the best that is possible when the future is known (belady), and a cache without bounds.
    Needs no daemon: --socket changes nothing.
    """
    from kvstore.forecast import forecast  # numpy and the store: other commands do without
    from kvstore.traces import load

    if plot is not None:
        plots.check(plot)
    loaded = load(trace, block_bytes=block_bytes, bytes_per_token=bytes_per_token)
    if not loaded.reference_count:
        why = loaded.warnings[0] if loaded.warnings else "record for longer"
        raise InvalidRequest(f"{trace} has no request for blocks: {why}")
    tenant = click.get_current_context().meta.get("kvstore.tenant") or "default"
    sizes, configured = _sizes(loaded, dram, nvme, config, tenant)
    chosen = policy or configured or default_policy()
    speeds = _machine(machine, trace if measured else None)
    with _bar(Console(stderr=True)) as progress:
        document = forecast(
            loaded, sizes, speeds, chosen, sweep=sweep or plot is not None, progress=progress
        )
    if plot is not None:
        plots.draw(document, plot)
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()
    else:
        for warning in loaded.warnings:
            sys.stderr.write(f"kvstore: {warning}\n")
        cli_stats.put(cli_stats.console(), page(document))


def default_policy() -> str:
    """What a daemon does that nobody has configured."""
    from kvstore.config import Eviction

    policy = Eviction().policy
    return policy if policy in FAMILIES else "lru"


def _sizes(
    trace: Trace,
    dram: tuple[int, float] | None,
    nvme: tuple[int, float] | None,
    path: Path | None,
    tenant: str,
) -> tuple[Sizes, str | None]:
    """The tiers to simulate, and the policy where a configuration names one."""
    from kvstore.traces import Sizes

    base, policy = trace.sizes, None
    if path is not None:
        base, policy = _configured(path, tenant)
    if base is None:
        base = Sizes(dram_bytes=units.parse_size(DRAM_DEFAULT), nvme_bytes=0, slab_bytes=0)
    slot_bytes = sum(shape.slot_bytes for shape in trace.shapes) / len(trace.shapes)

    def chosen(given: tuple[int, float] | None, default: int) -> int:
        if given is None:
            return default
        size, share = given
        return size or int(round(share * trace.block_count) * slot_bytes)

    given = dram is not None or nvme is not None
    return (
        Sizes(
            dram_bytes=chosen(dram, base.dram_bytes),
            nvme_bytes=chosen(nvme, base.nvme_bytes),
            # In slabs as the daemon has them, unless somebody wants to know of other sizes.
            slab_bytes=0 if given and len(trace.shapes) == 1 else base.slab_bytes,
            write_policy=base.write_policy,
            write_budget=base.write_budget,
        ),
        policy,
    )


def _configured(path: Path, tenant: str) -> tuple[Sizes, str]:
    from kvstore.config import load
    from kvstore.traces import Sizes

    config: Config = load(path)
    if tenant not in config.tenants:
        raise InvalidRequest(
            f"tenant {tenant} is not configured, there are {', '.join(config.tenants)}: name one "
            "of them with --tenant"
        )
    return (
        Sizes(
            dram_bytes=config.tenant_dram_bytes(tenant),
            nvme_bytes=config.tenant_nvme_bytes(tenant),
            slab_bytes=config.slab_bytes,
            write_policy=config.nvme.write_policy,
            write_budget=config.nvme.write_budget,
        ),
        config.eviction.policy,
    )


def _machine(given: Mapping[str, float], near: Path | None) -> Machine:
    from kvstore.simulation import Machine

    dram, read, write = (given[name] for name in ("dram_bandwidth", "nvme_read", "nvme_write"))
    if near is not None:
        dram, read, write = measure(near.absolute().parent)
    return Machine(
        dram_bytes_per_s=dram,
        nvme_read_bytes_per_s=read,
        nvme_write_bytes_per_s=write,
        prefill_tokens_per_s=given["prefill"],
        deadline_s=given["deadline"],
    )


def measure(folder: Path) -> tuple[float, float, float]:
    """Bytes a second of a memcpy, and of reads and writes of 2 MiB in a folder: best of three."""
    from kvstore.bench_limits import Buffers, RawDisk

    size = 2 << 20
    buffers = Buffers(MEASURED_BYTES // size, size, 0)
    buffers.memcpy()  # its pages are there from now on
    memory_s = min(buffers.memcpy() for _ in range(3))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        disk = RawDisk(Path(scratch) / "measured", MEASURED_DISK_BYTES // size, size, 8)
        try:
            write_s = min(disk.write() for _ in range(3))
            read_s = min(disk.read() for _ in range(3))
        finally:
            disk.close()
    return MEASURED_BYTES / memory_s, MEASURED_DISK_BYTES / read_s, MEASURED_DISK_BYTES / write_s


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; nothing elsewhere."""
    if not console.is_terminal:
        yield lambda done, of: None
        return
    columns = (TextColumn("simulating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, of: bar.update(task, completed=done, total=of)


# -- how it looks ---------------------------------------------------------------------------------


def page(document: Mapping[str, Any]) -> RenderableType:
    """All figures, for people."""
    trace, sizes, results = document["trace"], document["sizes"], document["results"]
    text = cli_stats.text
    lines = [
        f"{trace['requests']:,} requests over {cli_stats.duration_text(trace['span_s'])}, "
        f"{trace['block_references']:,} blocks asked for, {trace['unique_blocks']:,} distinct",
        f"DRAM {cli_stats.size_text(sizes['dram_bytes'])}, NVMe "
        f"{cli_stats.size_text(sizes['nvme_bytes'])}",
    ]
    if trace["dropped_requests"]:
        lines.append(f"{trace['dropped_requests']:,} requests are not in the trace: dropped")
    table = Table(box=cli_stats.BOX, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, result in results.items():
        table.add_row(name, *_row(result))
    endless, without = document["endless"], document["without_cache"]
    table.add_row("no bounds", *_row(endless))
    table.add_row("no cache", *_row({"ttft_s": without["ttft_s"]}))
    parts: list[RenderableType] = [*map(text, lines), table]
    mine = results[document["policy"]]
    for subject, counts in (
        ("misses", mine["misses"]),
        ("evicted from DRAM", mine["tiers"]["dram"]["evicted"]),
        ("evicted from NVMe", mine["tiers"]["nvme"]["evicted"]),
    ):
        if any(counts.values()):
            told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            parts.append(text(f"{subject}: {told}"))
    parts += [_sweep(tier, points, results) for tier, points in document.get("sweep", {}).items()]
    return Group(*parts)


def _row(result: Mapping[str, Any]) -> list[str]:
    """The cells of one result; what it does not know stays empty."""
    tiers = result.get("tiers", {})
    ttft = result.get("ttft_s", {})
    cells = [_percent(result.get(name)) for name in ("hit_ratio", "hit_ratio_last_half")]
    cells += [
        _percent(tiers.get("dram", {}).get("hit_ratio", result.get("dram_hit_ratio"))),
        _percent(tiers.get("nvme", {}).get("hit_ratio")),
    ]
    nvme = tiers.get("nvme", {"capacity_bytes": 0})
    if nvme["capacity_bytes"]:
        cells += [cli_stats.size_text(nvme["written_bytes"]), f"{nvme['written_per_hit']:.2f}"]
    else:
        cells += ["", ""]
    times = (ttft.get(name) for name in ("mean", "p50", "p99"))
    return cells + ["" if one is None else f"{one:.3g}" for one in times]


def _percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1%}"


def _sweep(tier: str, points: list[Mapping[str, Any]], names: Mapping[str, Any]) -> Table:
    table = Table(box=cli_stats.BOX, pad_edge=False)
    table.add_column(tier, justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for point in points:
        now = " (now)" if point["factor"] == 1 else ""
        size = cli_stats.size_text(point["bytes"]) + now
        table.add_row(size, *(_percent(point[name]) for name in names))
    return table
