"""The commands `kvstore service ...`: what they take and print; the work is in service_unit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

mine = click.option("--user", is_flag=True, help="Your own service, not the system's.")


def unit(command: Command) -> Command:
    """Adds what the text of a unit depends on."""
    for option in (
        click.option("--gpu", is_flag=True, help="Let the service use NVIDIA devices."),
        click.option(
            "--config",
            "file",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="The daemon's TOML file; not given: /etc/kvstore.toml, with --user "
            "~/.config/kvstore/kvstored.toml.",
        ),
        mine,
    ):
        command = option(command)
    return command


@click.group()
def service() -> None:
    """Run kvstored under systemd: install, show, uninstall.

    --socket and --tenant change nothing here.
    """


@service.command()
@unit
@click.option("--no-start", is_flag=True, help="Enable it only, as for an image of a host.")
@click.option("--force", is_flag=True, help="Replace a unit that was changed by hand.")
def install(user: bool, gpu: bool, file: Path | None, no_start: bool, force: bool) -> None:
    """Install kvstored as a service, enable and start it.

    Writes the unit, and a configuration when there is none; the system's service gets the user
    kvstore. Run it again after an upgrade or a change of paths or tenants: what changed is
    replaced and restarted.
    """
    from kvstore import service_unit  # reads configurations: other commands do not load that

    place = service_unit.Place(user)
    service_unit.install(place, file, click.echo, gpu=gpu, start=not no_start, force=force)


@service.command()
@unit
def show(user: bool, gpu: bool, file: Path | None) -> None:
    """Print the unit that install would write; changes nothing."""
    from kvstore import service_unit

    sys.stdout.write(service_unit.render(service_unit.Place(user), file, gpu=gpu))


@service.command()
@mine
def uninstall(user: bool) -> None:
    """Stop the service and remove its unit.

    Blocks, configuration and drop-ins stay; it says where.
    """
    from kvstore import service_unit

    service_unit.uninstall(service_unit.Place(user), click.echo)
