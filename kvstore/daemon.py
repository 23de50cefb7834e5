"""kvstored: reads the configuration, puts the tenants together, runs until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import structlog
import uvloop

from kvstore import __version__, metrics
from kvstore.adoption import check_room
from kvstore.busy_poll import BusyPoll
from kvstore.config import Config, load, reloadable_changes
from kvstore.errors import KVStoreError
from kvstore.notify import notify, watchdog_interval_s
from kvstore.tenant import Tenant
from kvstore.turns import Turns

SWITCH_INTERVAL_S = 0.002  # how long a thread that wants the interpreter lets another go on
TICK_S = 0.5
SCRAPE_TIMEOUT_S = 5.0

log = structlog.get_logger()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command kvstored. Exit status: 0 done, 1 failed, 2 wrong usage or configuration."""
    parser = _Parser(
        prog="kvstored", description="Keep the KV cache of this host's serving engines."
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="a TOML file; none: defaults")
    parser.add_argument("--check-config", action="store_true", help="say what would run, and stop")
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args(arguments)
    try:
        config = load(options.config)
    except KVStoreError as error:
        sys.stderr.write(f"kvstored: {error}\n")
        sys.exit(2)
    if options.check_config:
        sys.stdout.write(config.describe() + "\n")
        for warning in config.warnings():
            sys.stderr.write(f"kvstored: warning: {warning}\n")
        sys.exit(0)
    configure_logs(config)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(Daemon(config, options.config).run())
    except KVStoreError as error:
        sys.stderr.write(f"kvstored: {error}\n")
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"kvstored: {where}{error.strerror or error}\n")
        sys.exit(1)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kvstored: {message}: see kvstored --help\n")


def configure_logs(config: Config) -> None:
    """One line per event on stderr: for people on a terminal, JSON elsewhere."""
    console = config.daemon.log_format == "console" or (
        config.daemon.log_format == "auto" and sys.stderr.isatty()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_level(config)),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _level(config: Config) -> int:
    return int(getattr(logging, config.daemon.log_level.upper()))


class Daemon:
    """The running daemon."""

    def __init__(self, config: Config, path: Path | None) -> None:
        self._config = config  # as started
        self._reloaded = config  # as last told
        self._path = path
        self._started = time.monotonic()
        self._generation = time.time_ns() // 1_000
        self._tenants: dict[str, Tenant] = {}
        self._stop_scrapes: Callable[[], None] = lambda: None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        gc.disable()  # until all is built: it would look at a growing heap again and again
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        for warning in self._config.warnings():
            log.warning(warning)
        busy_poll, turns = BusyPoll(loop, self._config.daemon.busy_poll), Turns()
        check_room(
            {
                self._config.dram.path / name: self._config.tenant_dram_bytes(name)
                for name in self._config.tenants
            }
        )
        for name in self._config.tenants:
            tell = functools.partial(self._tell, name)
            self._tenants[name] = Tenant(
                name, self._config, self._generation, __version__, tell, busy_poll, turns
            )
        _settle_memory()
        await self._serve_metrics(loop)
        for tenant in self._tenants.values():
            await tenant.start()
        log.info(
            "ready",
            version=__version__,
            run_dir=str(self._config.daemon.run_dir),
            tenants=list(self._tenants),
        )
        notify("READY=1")
        beat = asyncio.create_task(self._beat())
        await stopping.wait()
        notify("STOPPING=1")
        log.info("stopping")
        beat.cancel()
        await asyncio.to_thread(self._stop_scrapes)
        drain_s = self._config.daemon.drain_timeout
        await asyncio.gather(*(tenant.stop(drain_s) for tenant in self._tenants.values()))
        log.info("stopped")

    async def _beat(self) -> None:
        """Tick the tenants, and tell a watching service manager that the loop turns."""
        interval = watchdog_interval_s()
        told = 0.0
        while True:
            await asyncio.sleep(min(TICK_S, (interval or TICK_S) / 2))
            for tenant in self._tenants.values():
                tenant.tick()
            if interval is not None and time.monotonic() - told >= interval:
                told = time.monotonic()
                notify("WATCHDOG=1")

    def _tell(self, *names: str) -> bytes:
        return metrics.document(
            {name: self._tenants[name].store for name in names},
            {name: self._tenants[name].told() for name in names},
            uptime_s=time.monotonic() - self._started,
            generation=self._generation,
            version=__version__,
        )

    async def _serve_metrics(self, loop: asyncio.AbstractEventLoop) -> None:
        address = self._config.metrics.address
        if address is None:
            return
        exporter = await asyncio.to_thread(importlib.import_module, "kvstore.exporter")

        def fetch() -> dict[str, Any]:
            async def tell() -> bytes:
                return self._tell(*self._tenants)

            told = asyncio.run_coroutine_threadsafe(tell(), loop)
            tree: dict[str, Any] = json.loads(told.result(SCRAPE_TIMEOUT_S))
            return tree

        try:
            self._stop_scrapes = exporter.serve(address, fetch)
        except OSError as error:
            log.error(
                "no metrics page: choose another metrics.listen",
                listen=self._config.metrics.listen,
                problem=str(error),
            )

    def _reload(self) -> None:
        """SIGHUP: take over what can be taken over, say what cannot."""
        try:
            fresh = load(self._path)
        except KVStoreError as error:
            log.error("configuration not reloaded", problem=str(error))
            return
        changed, _ = reloadable_changes(self._reloaded, fresh)
        _, needs_restart = reloadable_changes(self._config, fresh)
        self._reloaded = fresh
        configure_logs(fresh)
        for tenant in self._tenants.values():
            tenant.reload(fresh)
        log.info("configuration reloaded", changed=changed, needs_restart=needs_restart)


def _settle_memory() -> None:
    """What was built so far stays: the collector need not look at a million rows again, and what
    loading them took beyond that goes back to the system."""
    gc.collect()
    gc.freeze()
    gc.enable()
    with contextlib.suppress(OSError, AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
