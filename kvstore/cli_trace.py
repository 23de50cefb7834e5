"""The commands `kvstore trace start`, `stop` and `show`: a record of what clients ask for."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from kvstore import cli_stats, units
from kvstore.client import Client

Connected = Callable[[], AbstractContextManager[Client]]


def _size(context: click.Context, parameter: click.Parameter, value: str) -> int:
    try:
        return units.parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} {error}") from None


def commands(connected: Connected) -> click.Group:
    """The group `trace`; `connected` gives a client of the daemon that the options name."""

    @click.group(no_args_is_help=False)
    def trace() -> None:
        """Record what clients ask for, for kvstore simulate.

        A record has salted hashes of hashes, sizes and times: no content, no hash that an engine
        knows, no name. Only the daemon's own user and root may record.
        """

    @trace.command()
    @click.argument("file", type=click.Path(path_type=Path))
    @click.option(
        "--max-bytes",
        metavar="SIZE",
        default="1 GiB",
        show_default=True,
        callback=_size,
        help="Of all parts together; the oldest go first.",
    )
    def start(file: Path, max_bytes: int) -> None:
        """Begin to record, into a new FILE.

        The daemon writes it, with its rights. When FILE is full it becomes FILE.1, and that FILE.2,
        and so on, up to eight parts.
        """
        with connected() as client:
            state = client.start_trace(os.path.abspath(file), max_bytes)
        click.echo(f"recording to {state.path}")

    @trace.command()
    def stop() -> None:
        """End the recording."""
        with connected() as client:
            state = client.stop_trace()
        click.echo(_told(state))

    @trace.command()
    def show() -> None:
        """Say whether a record is being made."""
        with connected() as client:
            state = client.show_trace()
        click.echo(f"recording to {_told(state)}" if state.recording else "nothing is recorded")

    return trace


def _told(state: Any) -> str:
    files = f" in {state.files} files" if state.files > 1 else ""
    dropped = f", {state.dropped:,} more were dropped" if state.dropped else ""
    size = cli_stats.size_text(state.bytes)
    return f"{state.path}: {state.requests:,} requests, {size}{files}{dropped}"
