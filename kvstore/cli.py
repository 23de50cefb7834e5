"""The command kvstore: what people ask of a running daemon, and of this host.

Reading arguments, exit statuses and the words of errors are here; how statistics look is told by
`kvstore.cli_stats`, everything else is done by the daemon, the doctor and the bench.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Group
from rich.table import Table

from kvstore import __version__, cli_service, cli_simulate, cli_stats, cli_trace, types
from kvstore.client import Cache, Client, Layout, connect
from kvstore.errors import InvalidConfig, InvalidRequest, KVStoreError, Unavailable

if TYPE_CHECKING:
    from kvstore.doctor import Finding

DONE, FAILED, USAGE, NO_DAEMON = range(4)
STATUS: tuple[tuple[type[KVStoreError], int], ...] = (
    (Unavailable, NO_DAEMON),
    (InvalidRequest, USAGE),
    (InvalidConfig, USAGE),
    (KVStoreError, FAILED),
)
WATCH_S = 2.0
WATCH_S_BOUNDS = (0.1, 86_400.0)
TTL_S_BOUNDS = (0.001, 10 * 366 * 86_400.0)
PINNED = 100
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}

Command = TypeVar("Command", bound=Callable[..., Any])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command kvstore. Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 no
    daemon."""
    try:
        given = None if arguments is None else list(arguments)
        status = cli.main(args=given, prog_name="kvstore", standalone_mode=False)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "kvstore"
        status = _fail(f"{_lowered(error.format_message())}: see {path} --help", USAGE)
    except click.Abort:
        status = _fail("stopped before it was done: start it again", FAILED)
    except KVStoreError as error:
        status = _fail(
            str(error), next(number for kind, number in STATUS if isinstance(error, kind))
        )
    except OSError as error:
        status = _fail(f"{error}: look into it, and start again", FAILED)
    sys.exit(status)


def _fail(text: str, status: int) -> int:
    sys.stderr.write(f"kvstore: {' '.join(text.split())}\n")
    return status


def _lowered(text: str) -> str:
    return (text[:1].lower() + text[1:]).rstrip(".")


# --- options of every command --------------------------------------------------------------------


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Remember --socket and --tenant, of before the command or after it; the later one wins."""
    if value is not None:
        context.meta[f"kvstore.{parameter.name}"] = value


def where(command: Command) -> Command:
    """Adds --socket and --tenant."""
    for option in (
        click.option(
            "--tenant", metavar="NAME", expose_value=False, callback=_keep, help="Whose blocks."
        ),
        click.option(
            "--socket",
            metavar="PATH",
            type=click.Path(path_type=Path),
            expose_value=False,
            callback=_keep,
            help="Where the daemon listens; not given: at the default place of the tenant.",
        ),
    ):
        command = option(command)
    return command


def _given(name: str) -> Any:
    return click.get_current_context().meta.get(f"kvstore.{name}")


@contextlib.contextmanager
def _connected() -> Iterator[Client]:
    """A client of the daemon and tenant that the options name."""
    path, tenant = _given("socket"), _given("tenant")
    with connect(path, tenant or "default") as client:
        if path is not None and tenant not in (None, served := _served(client)):
            raise click.UsageError(
                f"{path} is of tenant {served}, not of {tenant}: give one of the two",
                click.get_current_context(),
            )
        yield client


def _served(client: Client) -> str:
    """The tenant that this client is connected to."""
    tenant: str = client.session(client.deadline()).attached.tenant
    return tenant


def _seconds(bounds: tuple[float, float]) -> Callable[..., float | None]:
    """A callback that takes a number of seconds within bounds, and neither nan nor infinity."""

    def check(context: click.Context, parameter: click.Parameter, value: Any) -> float | None:
        if value is not None and not bounds[0] <= value <= bounds[1]:
            raise click.BadParameter(
                f"{value:g} is no number of seconds from {bounds[0]:g} to {bounds[1]:g}"
            )
        return None if value is None else float(value)

    return check


def _write_json(tree: Any) -> None:
    sys.stdout.write(json.dumps(tree) + "\n")
    sys.stdout.flush()


# --- commands ------------------------------------------------------------------------------------


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=False,
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 no daemon.",
)
@click.version_option(__version__, prog_name="kvstore", message="%(prog)s %(version)s")
@where
def cli() -> None:
    """Look after the KV cache of this host: the daemon kvstored and the blocks that it keeps."""


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the daemon's own JSON document.")
@click.option(
    "--watch",
    "every_s",
    metavar="[SECONDS]",
    type=float,
    is_flag=False,
    flag_value=WATCH_S,
    callback=_seconds(WATCH_S_BOUNDS),
    help="Do it again and again, every 2 seconds unless told otherwise, with rates between two "
    "refreshes; Ctrl-C ends it. It goes on while the daemon restarts.",
)
@click.option("--count", type=click.IntRange(min=1), hidden=True, help="End after so many.")
@click.option("--what-if", is_flag=True, help="Show what other sizes of the tiers would give.")
@where
def stats(as_json: bool, every_s: float | None, count: int | None, what_if: bool) -> None:
    """Show hits, misses, occupancy, moves and latency.

    The hit ratio is blocks served of blocks asked for. Latency is the time to grant a hit in DRAM,
    and the time to load a block from NVMe. With --json --watch there is one document a line.
    """
    console = cli_stats.console()
    with _connected() as client:
        if every_s is not None:
            screen = cli_stats.JsonLines() if as_json else cli_stats.Pages(console)
            cli_stats.watch(client.stats, screen, every_s, count)
        elif as_json:
            _write_json(client.stats())
        else:
            show = cli_stats.what_if_page if what_if else cli_stats.page
            cli_stats.put(console, show(client.stats()))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The daemon's TOML file; not given: the configuration that runs without one.",
)
@where
def doctor(as_json: bool, config: Path | None) -> int:
    """Say whether this host is ready, and what to do.

    Needs no daemon and changes nothing. Exit status 1 when a check fails; a warning is none.
    With --tenant only that tenant's sockets are tried; with --socket a daemon must answer there.
    """
    from kvstore import doctor as examination  # loads all that reads configurations: others do not
    from kvstore.config import load

    loaded, tenant = load(config), _given("tenant")
    if tenant is not None and tenant not in loaded.tenants:
        raise InvalidConfig(
            f"tenant {tenant} is not configured, there are {', '.join(loaded.tenants)}: name one "
            "of them, or give its configuration with --config"
        )
    findings = [
        one
        for one in examination.examine(loaded)
        if tenant is None or not one.name.startswith("daemon ") or one.name == f"daemon {tenant}"
    ]
    if _given("socket") is not None:
        findings.append(_try_socket())
    answer = examination.as_json(findings)
    if as_json:
        _write_json(answer)
    else:
        _write_findings(findings)
    return DONE if answer["ok"] else FAILED


def _try_socket() -> Finding:
    from kvstore.doctor import Finding

    name = f"socket {_given('socket')}"
    try:
        with _connected() as client:
            attached = client.session(client.deadline()).attached
            detail = f"kvstored {attached.version} answers for tenant {attached.tenant}"
            return Finding(name, "ok", detail)
    except KVStoreError as error:
        what, _, remedy = str(error).rpartition(": ")
        return Finding(name, "fail", what, remedy)


def _write_findings(findings: Sequence[Finding]) -> None:
    table = Table(box=cli_stats.BOX, pad_edge=False)
    for heading in ("", "check", "found", "what to do"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "")
    for one in findings:
        status = cli_stats.text(one.status, COLOURS[one.status])
        table.add_row(status, one.name, one.detail, one.remedy)
    statuses: list[str] = [one.status for one in findings]
    summary = ", ".join(f"{statuses.count(status)} {status}" for status in COLOURS)
    cli_stats.put(cli_stats.console(), Group(table, summary))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quick", is_flag=True, help="Small sizes: seconds, and less exact.")
@click.option("--device", metavar="N", type=click.IntRange(0), help="A GPU's copies instead.")
@where
def bench(as_json: bool, quick: bool, device: int | None) -> int:
    """Measure kvstore against this host's own limits.

    The data and the control path, as ratios; with --device, which takes cupy, the copies to, from
    and within that CUDA device. Runs daemons of its own: --socket and --tenant change nothing.
    """
    from kvstore import bench_device  # daemons and their clients: only this needs them
    from kvstore.bench import main as measure

    if device is None:
        return measure(json_output=as_json, quick=quick)
    return bench_device.main(device, json_output=as_json, quick=quick)


@cli.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@where
def clear(yes: bool) -> int:
    """Drop every block of the tenant, from all tiers.

    Asks first on a terminal. Clients go on: they find nothing.
    """
    with _connected() as client:
        tenant = _served(client)
        if not yes and sys.stdin.isatty():
            known = client.stats()["tenants"][tenant]["blocks"]["known"]
            question = f"Drop all {known:,} blocks of tenant {tenant}?"
            if not click.confirm(question, err=True):
                return _fail("nothing was dropped: answer y to drop", FAILED)
        click.echo(f"dropped {client.clear(600.0):,} blocks of tenant {tenant}")
    return DONE


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
@where
def verify(as_json: bool) -> int:
    """Read and check every NVMe block of the tenant.

    What is damaged is dropped. Prints how many were checked, damaged, and skipped because they
    were in use or had gone. Exit status 1 when any was damaged. The daemon goes on serving.
    """
    with _connected() as client:
        checked, damaged, skipped = client.verify()
    if as_json:
        _write_json({"checked": checked, "damaged": damaged, "skipped": skipped})
    else:
        click.echo(f"checked {checked:,}, damaged {damaged:,}, skipped {skipped:,}")
    if not damaged:
        return DONE
    return _fail(
        f"{damaged} of {checked} blocks on NVMe were damaged or could not be read, no client gets "
        "them: look into the daemon's log and the health of the device",
        FAILED,
    )


# --- sessions ------------------------------------------------------------------------------------


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@where
def sessions(as_json: bool) -> None:
    """List the connected clients of the tenant."""
    with _connected() as client:
        found = client.stats()["tenants"][_served(client)]["clients"]
    if as_json:
        _write_json(found)
        return
    table = Table(box=cli_stats.BOX, pad_edge=False)
    for heading in ("session", "client", "processes", "leases", "MiB"):
        table.add_column(heading)
    for one in found:
        held = f"{one['leased_bytes'] / types.MIB:,.1f}"
        pids = ", ".join(map(str, one["pids"]))
        name = cli_stats.text(one["name"])
        table.add_row(str(one["session"]), name, pids, f"{one['leases']:,}", held)
    cli_stats.put(cli_stats.console(), table)


@cli.command()
@click.option("--session", metavar="N", type=click.IntRange(1), help="End this session instead.")
@where
def drain(session: int | None) -> int:
    """Write out what is due, or end a session.

    Waits until what is to be on NVMe is there, but for what nvme.write_budget or want of room hold
    back. A session that ends loses its leases: what it was reading it must throw away, what it was
    writing is kept from others until its processes say that they do not write, or have ended. Its
    client connects again by itself. kvstore sessions lists the numbers.
    """
    with _connected() as client:
        found, written = client.drain(session or 0)
        due = 0 if session else client.stats()["tenants"][_served(client)]["moves"]["due"]
    if not found:
        return _fail(f"there is no session {session}: see kvstore sessions", FAILED)
    left = f"at most {due:,} are held back" if due else "nothing is due any more"
    click.echo(f"session {session} ended" if session else f"{written:,} blocks written, {left}")
    return DONE


# --- pin and unpin -------------------------------------------------------------------------------


def _layout(context: click.Context, parameter: click.Parameter, value: str | None) -> Layout | None:
    """A Layout from JSON, or from a file of JSON, where one is given."""
    if value is None:
        return None
    known = {field.name: field for field in dataclasses.fields(Layout)}
    try:
        tree = json.loads(value if value.lstrip().startswith("{") else Path(value).read_bytes())
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"neither JSON nor a file of it: {error}") from None
    if not isinstance(tree, dict):
        raise click.BadParameter(f"give an object with {', '.join(known)}")
    missing = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and name not in tree
    ]
    for names, wrong in ((set(tree) - set(known), "unknown"), (missing, "missing")):
        if names:
            raise click.BadParameter(
                f"{wrong} field {sorted(names)[0]!r}: a layout has {', '.join(known)}"
            )
    return Layout(**tree)


def _hashes(
    context: click.Context, parameter: click.Parameter, value: Sequence[str]
) -> list[bytes]:
    """Distinct hashes, checked; `-` stands for the lines of stdin."""
    texts: list[str] = []
    for text in value:
        if text == "-":
            lines = sys.stdin.buffer.read().decode("ascii", "replace").splitlines()
            texts += [line.strip() for line in lines if line.strip()]
        else:
            texts.append(text)
    found: dict[bytes, None] = {}
    for at, text in enumerate(texts, 1):
        try:
            found[bytes.fromhex(text)] = None
        except ValueError:
            raise click.BadParameter(
                f"hash {at}, {text[:80]!r}, is not hexadecimal: write 2 digits for each byte"
            ) from None
    if found:
        sizes = [len(one) for one in found]
        types.check_hash_length(min(sizes), max(sizes))
    return list(found)


def blocks(command: Command) -> Command:
    """Adds --layout and the hashes."""
    for add in (
        click.argument("hashes", metavar="HASHES...", nargs=-1, required=True, callback=_hashes),
        click.option(
            "--layout",
            metavar="JSON|FILE",
            callback=_layout,
            help="The blocks' layout, as the engine opens it: an object with model, engine, dtype, "
            "block_tokens, shards and shard_bytes, or a file that holds one. Not given: whichever "
            "layouts the tenant has.",
        ),
    ):
        command = add(command)
    return command


@cli.command()
@click.option(
    "--priority",
    metavar="N",
    type=click.IntRange(1, PINNED),
    default=PINNED,
    show_default=True,
    help="100: never evicted; 1 to 99: in this order, when nothing else can leave.",
)
@click.option(
    "--ttl",
    "ttl_s",
    metavar="SECONDS",
    type=float,
    callback=_seconds(TTL_S_BOUNDS),
    help="For how long; not given: until unpinned.",
)
@blocks
@where
def pin(layout: Layout | None, hashes: list[bytes], priority: int, ttl_s: float | None) -> None:
    """Keep blocks from eviction.

    Prints how many are kept of how many were named. Blocks that are not there cannot be kept, and
    that is no error. HASHES are block hashes in hexadecimal; - reads them from stdin, one a line.
    """
    _retain("pinned", layout, hashes, priority, ttl_s)


@cli.command()
@blocks
@where
def unpin(layout: Layout | None, hashes: list[bytes]) -> None:
    """Let pinned blocks go like any other.

    Prints how many of those named are there. HASHES are block hashes in hexadecimal; - reads them
    from stdin, one a line.
    """
    _retain("unpinned", layout, hashes, 0, None)


def _retain(
    verb: str, layout: Layout | None, hashes: list[bytes], priority: int, ttl_s: float | None
) -> None:
    with _connected() as client:
        step = client.session(client.deadline()).attached.keys_max
        layouts = [layout] if layout is not None else cli_stats.layouts(client, _served(client))
        caches: list[Cache] = [client.open(one) for one in layouts]
        kept = sum(
            cache.retain(hashes[at : at + step], priority, ttl_s)
            for cache in caches
            for at in range(0, len(hashes), step)
        )
    if layout is not None:
        click.echo(f"{verb} {kept:,} of {len(hashes):,} blocks")
    else:
        click.echo(f"{verb} {kept:,} blocks of {len(hashes):,} hashes in {len(caches):,} layouts")


_trace = cli_trace.commands(_connected)
for _command in (
    *(cli_service.service, *cli_service.service.commands.values()),
    *(_trace, *_trace.commands.values(), cli_simulate.simulate),
):
    where(_command)
for _command in (cli_service.service, _trace, cli_simulate.simulate):
    cli.add_command(_command)


if __name__ == "__main__":
    main()
