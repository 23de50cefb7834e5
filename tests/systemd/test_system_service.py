"""The system's service on a whole host: its user, its sandbox, its tenants' groups, its memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kvstored import until
from tests.systemd.host import VENV, Host, host

CONFIG = """
[dram]
size = "16 MiB"
[nvme]
size = "64 MiB"
[tenants.team]
group = "team"
"""
USERS = """
g team -
u member -
m member team
u stranger -
"""
CLIENT = """
import sys
from kvstore.client import Layout, connect

client = connect("/run/kvstore/team/kvstore.sock")
layout = Layout(model="m", engine="e/1", dtype="bf16", block_tokens=16, shard_bytes=65536)
cache = client.open(layout)
names = [at.to_bytes(16, "big") for at in range(1, 9)]
blocks = [name * 4096 for name in names]
if sys.argv[1] == "put":
    print(cache.put(names, blocks).stored)
    client.stats()
else:
    into = [bytearray(65536) for _ in names]
    got = cache.get(names, into)
    print(dict(got.tiers), into == blocks)
"""
IN_MEMORY = "{'dram': 8} True\n"


@pytest.fixture(scope="module")
def booted() -> Iterator[Host]:
    with host() as started:
        for path, text in (
            ("/etc/kvstore.toml", CONFIG),
            ("/etc/sysusers.d/test.conf", USERS),
            ("/opt/client.py", CLIENT),
        ):
            started.run("mkdir", "-p", path.rpartition("/")[0])
            started.run("sh", "-c", 'printf "%s" "$1" > "$2"', "sh", text, path)
        started.run("systemd-sysusers")
        started.run(f"{VENV}/bin/kvstore", "service", "install")
        yield started


def client(booted: Host, user: str, what: str, *, check: bool = True) -> str:
    """What a process of that user gets from the tenant `team`."""
    who = ("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups")
    python = f"{VENV}/bin/python"
    done = booted.run(*who, python, "/opt/client.py", what, check=check)
    return done.stdout if check else done.stderr


def status(booted: Host, field: str) -> list[str]:
    """A line of /proc/PID/status of the daemon."""
    text = booted.run("cat", f"/proc/{booted.show('MainPID')}/status").stdout
    (line,) = [line for line in text.splitlines() if line.startswith(f"{field}:")]
    return line.split()[1:]


def test_the_daemon_is_shut_in(booted: Host) -> None:
    uid = booted.run("id", "--user", "kvstore").stdout.strip()
    assert status(booted, "Uid") == [uid] * 4
    assert status(booted, "CapBnd") == ["0" * 16]
    assert status(booted, "NoNewPrivs") == ["1"]
    assert status(booted, "Seccomp") == ["2"]
    inside = ("nsenter", f"--target={booted.show('MainPID')}", "--mount", "--root", "--wd=/")
    assert booted.run(*inside, "ls", "/root", "/home").stdout == "/home:\n\n/root:\n"
    assert booted.run(*inside, "touch", "/opt/x", check=False).returncode != 0


def test_a_tenants_group_gets_in_and_nobody_else(booted: Host) -> None:
    assert client(booted, "member", "put") == "8\n"
    assert client(booted, "member", "get") == IN_MEMORY
    assert "NotPermitted" in client(booted, "stranger", "get", check=False)
    path = "/dev/shm/kvstore/team/arena"
    assert booted.run("stat", "--format=%U %G %a", path).stdout == "kvstore team 660\n"
    path = "/run/kvstore/default"
    assert booted.run("stat", "--format=%U %G %a", path).stdout == "kvstore kvstore 750\n"
    listed = booted.run("setpriv", "--reuid=member", "ls", "/run/kvstore", check=False)
    assert listed.returncode != 0


def test_memory_outlives_a_kill_and_a_stop(booted: Host) -> None:
    client(booted, "member", "put")
    booted.run("sh", "-c", 'kill -KILL "$1"', "sh", booted.show("MainPID"))
    until(lambda: booted.show("NRestarts") == "1" and booted.show("ActiveState") == "active")
    assert client(booted, "member", "get") == IN_MEMORY
    booted.run("systemctl", "stop", "kvstored")
    assert (booted.show("Result"), booted.show("ExecMainStatus")) == ("success", "0")
    assert booted.run("ls", "/run/kvstore").stdout == "default\nteam\n"
    booted.run("systemctl", "start", "kvstored")
    assert client(booted, "member", "get") == IN_MEMORY


def test_an_uninstall_leaves_the_blocks_and_says_where(booted: Host) -> None:
    said = booted.run(f"{VENV}/bin/kvstore", "service", "uninstall").stdout
    assert booted.show("LoadState") == "not-found"
    for kept in ("/dev/shm/kvstore", "/var/lib/kvstore", "/etc/kvstore.toml"):
        assert kept in said
        booted.run("test", "-e", kept)
    for gone in (
        "/etc/systemd/system/kvstored.service",
        "/run/kvstore",
        "/etc/tmpfiles.d/kvstore.conf",
    ):
        booted.run("test", "!", "-e", gone)


def test_blocks_of_another_user_are_not_taken_over(booted: Host) -> None:
    booted.run("chown", "--recursive", "stranger:", "/dev/shm/kvstore/team")
    done = booted.run(f"{VENV}/bin/kvstore", "service", "install", check=False)
    assert done.returncode == 1
    assert "/dev/shm/kvstore/team belongs to user " in done.stderr
    booted.run("test", "!", "-e", "/etc/systemd/system/kvstored.service")
