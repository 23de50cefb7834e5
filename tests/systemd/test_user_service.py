"""`kvstore service install --user` under a real service manager, from install to uninstall."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client import Client, connect
from tests.kvstored import content, hashes, layout, until
from tests.systemd.manager import UserManager

NAMES = hashes(8)


class Installed:
    """The service of a user, installed with a configuration of its own."""

    def __init__(self, manager: UserManager, arena: Path) -> None:
        self.manager = manager
        self.arena = arena
        self.run_dir = manager.folder / "sockets"
        self.nvme = manager.folder / "nvme"
        self.socket = self.run_dir / "default" / "kvstore.sock"
        self.config = manager.folder / "kvstored.toml"
        self.text = (
            f'[daemon]\nrun_dir = "{self.run_dir}"\n[dram]\nsize = "8 MiB"\npath = "{arena}"\n'
            f'[nvme]\nsize = "64 MiB"\npaths = ["{self.nvme}"]\n[metrics]\nlisten = ""\n'
        )
        self.config.write_text(self.text)

    def install(self) -> None:
        done = self.manager.kvstore("service", "install", "--user", "--config", self.config)
        assert done.returncode == 0, done.stderr
        assert self.manager.show("ActiveState") == "active"

    def restarts(self) -> int:
        return int(self.manager.show("NRestarts"))

    def results(self) -> list[str]:
        """How each life of the daemon ended, as systemd saw it."""
        path = self.manager.results
        return path.read_text().splitlines() if path.exists() else []

    def until_restarted(self, before: int) -> None:
        """It was started again after that many restarts, and is ready."""
        until(lambda: self.restarts() > before and self.manager.show("ActiveState") == "active")

    def connected(self) -> Client:
        return connect(self.socket)


@pytest.fixture(scope="module")
def installed(manager: UserManager) -> Iterator[Installed]:
    arena = Path(tempfile.mkdtemp(prefix="kvsd-", dir="/dev/shm"))
    try:
        service = Installed(manager, arena)
        service.install()
        yield service
        manager.kvstore("service", "uninstall", "--user")
    finally:
        shutil.rmtree(arena)


def test_a_started_service_is_ready(installed: Installed) -> None:
    manager = installed.manager
    assert manager.systemctl("is-enabled", "kvstored") == "enabled"
    done = manager.kvstore("stats", "--json", "--socket", installed.socket)
    assert done.returncode == 0, done.stderr
    assert "default" in json.loads(done.stdout)["tenants"]
    assert (manager.runtime / "kvstore").is_dir()
    assert manager.show("WatchdogUSec") == "30s"


def test_installing_it_again_changes_nothing(installed: Installed) -> None:
    pid = installed.manager.main_pid()
    installed.install()
    assert installed.manager.main_pid() == pid


def test_a_killed_daemon_is_restarted_with_its_blocks_in_memory(installed: Installed) -> None:
    with installed.connected() as client:
        stored = client.open(layout("killed")).put(NAMES, [content(name) for name in NAMES])
        assert stored.stored == len(NAMES)
        client.stats()  # answered after the commit
    before = installed.restarts()
    os.kill(installed.manager.main_pid(), signal.SIGKILL)
    installed.until_restarted(before)
    assert installed.results()[-1] == "signal KILL"
    with installed.connected() as client:
        into = [bytearray(len(content(name))) for name in NAMES]
        got = client.open(layout("killed")).get(NAMES, into)
        assert got.length == len(NAMES)
        assert [bytes(block) for block in into] == [content(name) for name in NAMES]
        assert got.tiers == {"dram": len(NAMES)}


def test_a_unit_changed_by_hand_is_kept(installed: Installed) -> None:
    manager = installed.manager
    before = manager.unit.read_text()
    manager.unit.write_text(before.replace("LimitNOFILE=65536", "LimitNOFILE=4096"))
    command = ("service", "install", "--user", "--no-start", "--config", installed.config)
    done = manager.kvstore(*command)
    assert done.returncode == 1
    assert "changed by hand" in done.stderr
    assert "LimitNOFILE=4096" in manager.unit.read_text()
    done = manager.kvstore(*command, "--force")
    assert done.returncode == 0, done.stderr
    assert manager.unit.read_text() == before


def test_a_reload_reaches_the_daemon(installed: Installed) -> None:
    pid = installed.manager.main_pid()
    installed.config.write_text(installed.text.replace("[daemon]", '[daemon]\nlog_level = "debug"'))
    installed.manager.systemctl("reload", "kvstored")
    until(lambda: "configuration reloaded" in installed.manager.log.read_text())
    assert installed.manager.main_pid() == pid


def test_a_stop_is_clean_and_keeps_the_folders(installed: Installed) -> None:
    manager = installed.manager
    manager.systemctl("stop", "kvstored")
    assert manager.show("ActiveState") == "inactive"
    assert installed.results()[-1] == "success 0"
    assert (manager.runtime / "kvstore").is_dir()
    assert (installed.arena / "default" / "arena").exists()


def test_a_wrong_configuration_is_not_tried_again(installed: Installed) -> None:
    installed.config.write_text("[daemon]\nno_such_key = 1\n")
    manager = installed.manager
    with pytest.raises(AssertionError, match="failed"):
        manager.systemctl("start", "kvstored")
    assert manager.show("ActiveState") == "failed"  # rather than "activating"
    assert installed.results()[-1] == "exit-code 2"
    done = manager.kvstore("service", "install", "--user", "--config", installed.config)
    assert done.returncode == 2
    assert "no_such_key" in done.stderr
    installed.config.write_text(installed.text)


def test_a_daemon_whose_loop_stands_still_is_restarted(installed: Installed) -> None:
    manager = installed.manager
    manager.drop_in("watchdog", "WatchdogSec=2s")
    manager.systemctl("daemon-reload")
    manager.systemctl("restart", "kvstored")
    before = installed.restarts()
    os.kill(manager.main_pid(), signal.SIGSTOP)
    installed.until_restarted(before)
    assert installed.results()[-1].startswith("watchdog ")
    installed.connected().close()


def test_an_uninstall_removes_the_unit_and_leaves_the_blocks(installed: Installed) -> None:
    manager = installed.manager
    pid = manager.main_pid()
    done = manager.kvstore("service", "uninstall", "--user")
    assert done.returncode == 0, done.stderr
    assert not Path(f"/proc/{pid}").exists()
    assert manager.show("LoadState") == "not-found"
    assert not manager.unit.exists()
    assert not list(manager.unit.parent.glob("*.wants/kvstored.service"))
    assert not (manager.runtime / "kvstore").exists()
    assert str(installed.arena) in done.stdout
    assert (installed.arena / "default" / "arena").exists()
    assert str(installed.nvme) in done.stdout
    again = manager.kvstore("service", "uninstall", "--user")
    assert again.returncode == 0
    assert "nothing to remove" in again.stdout
