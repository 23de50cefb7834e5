"""The command line as people and scripts meet it: real processes, a real daemon, exit statuses."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore import __version__, cli, cli_stats
from kvstore.client import Client, connect
from kvstore.errors import SessionLost, Unavailable
from tests.kvstored import (
    BLOCK,
    DEADLINE_S,
    DRAM_BLOCKS,
    ENVIRONMENT,
    Kvstored,
    content,
    fill,
    hashes,
    layout,
    layout_json,
    press,
    running,
)

# The contract's keys; a tenant's document may have more.
TIER_KEYS = {"capacity_bytes", "used_bytes", "blocks", "hits", "hit_ratio", "promoted", "spilled"}
TIER_KEYS |= {"evicted", "corrupt", "read_bytes", "written_bytes", "latency_ms"}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Kvstored]:
    """One for all tests that leave it running; each test has a layout of its own."""
    with running() as started:
        yield started


@pytest.fixture
def client(daemon: Kvstored) -> Iterator[Client]:
    with connect(daemon.socket()) as connected:
        connected.clear()
        yield connected


def kvstore(*arguments: object, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a pipe."""
    return subprocess.run(
        [sys.executable, "-m", "kvstore.cli", *map(str, arguments)],
        input=given or "",
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=DEADLINE_S,
        check=False,
    )


def on_terminal(*arguments: object, typed: str = "") -> tuple[int, str]:
    """Run the command on a terminal where somebody types; exit status, and all that it shows."""
    ours, its = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "kvstore.cli", *map(str, arguments)],
            stdin=its,
            stdout=its,
            stderr=its,
            env=ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "100", "LINES": "50"},
        ) as process:
            os.close(its)
            os.write(ours, typed.encode())
            shown = b""
            with contextlib.suppress(OSError):  # EIO: the other side has closed
                while piece := os.read(ours, 65_536):
                    shown += piece
            return process.wait(DEADLINE_S), shown.decode()
    finally:
        os.close(ours)


def refused(done: subprocess.CompletedProcess[str], status: int) -> str:
    """Checks how an error is told; returns the line."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("kvstore: ") and done.stderr.endswith("\n")
    assert done.stderr.count("\n") == 1, done.stderr
    assert ": " in done.stderr.removeprefix("kvstore: "), "what, and what to do"
    return done.stderr


# --- every command -------------------------------------------------------------------------------


def test_the_entry_point_is_this_command() -> None:
    (found,) = importlib.metadata.entry_points(group="console_scripts", name="kvstore")
    assert found.load() is cli.main


def test_version_and_help_go_to_stdout() -> None:
    done = kvstore("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kvstore {__version__}\n", "")
    shown = kvstore("--help").stdout
    assert all(f"\n  {name} " in shown for name in cli.cli.commands), shown
    assert "..." not in shown.partition("COMMAND [ARGS]...")[2], "a summary is cut off"


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_every_command_takes_socket_and_tenant(command: str) -> None:
    done = kvstore(command, "--help")
    assert done.returncode == 0
    assert "--socket PATH" in done.stdout and "--tenant NAME" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("stat",),
        ("stats", "--jason"),
        ("stats", "more"),
        ("stats", "--watch", "nan"),
        ("stats", "--watch", "0"),
        ("bench", "--device", "-1"),
        ("stats", "--socket"),
        ("stats", "--socket", "/tmp/" + "x" * 120),
        ("pin",),
        ("pin", "--layout", layout_json("m")),
        ("pin", "--layout", layout_json("m"), "nothex"),
        ("pin", "--layout", layout_json("m"), "00"),
        ("pin", "--layout", layout_json("m"), "00" * 16, "00" * 8),
        ("pin", "--layout", layout_json("m"), "--priority", "101", "00" * 16),
        ("pin", "--layout", layout_json("m"), "--ttl", "inf", "00" * 16),
        ("pin", "--layout", layout_json(""), "00" * 16),
        ("pin", "--layout", '{"model": "m"}', "00" * 16),
        ("pin", "--layout", '{"color": 1}', "00" * 16),
        ("pin", "--layout", "/no/such/file", "00" * 16),
        ("unpin", "--layout", "{", "00" * 16),
        ("doctor", "--config", "/no/such/file"),
        ("doctor", "--tenant", "nobody"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2_and_says_so_in_one_line(arguments: tuple[str, ...]) -> None:
    refused(kvstore(*arguments), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("stats",),
        ("stats", "--json", "--watch"),
        ("verify",),
        ("clear",),
        ("clear", "--yes"),
        ("pin", "--layout", layout_json("m"), "00" * 16),
    ],
    ids=" ".join,
)
def test_no_daemon_is_3(arguments: tuple[str, ...]) -> None:
    assert "/no/such/kvstore.sock" in refused(
        kvstore(*arguments, "--socket", "/no/such/kvstore.sock"), 3
    )


def test_no_permission_is_1(daemon: Kvstored, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        pytest.skip("everything is permitted to root")
    daemon.socket().chmod(0)
    try:
        refused(kvstore("stats", "--socket", daemon.socket()), 1)
    finally:
        daemon.socket().chmod(0o660)


def test_socket_and_tenant_must_agree(daemon: Kvstored) -> None:
    told = refused(kvstore("clear", "--yes", "--socket", daemon.socket(), "--tenant", "other"), 2)
    assert "tenant default, not of other" in told
    told = refused(kvstore("clear", "--socket", daemon.socket("other"), "--tenant", "default"), 2)
    assert "tenant other, not of default" in told
    agreeing = kvstore("--tenant", "other", "stats", "--json", "--socket", daemon.socket("other"))
    assert list(json.loads(agreeing.stdout)["tenants"]) == ["other"]


# --- stats ---------------------------------------------------------------------------------------


def check_document(tree: Any) -> None:
    """The contract's keys, and sums that must hold."""
    assert {"version", "uptime_s", "generation", "tenants"} <= set(tree) and tree["version"] == 1
    for tenant in tree["tenants"].values():
        assert {"requests", "blocks", "tiers", "saved", "ceiling_hit_ratio"} <= set(tenant)
        assert {"lookup", "acquire", "reserve", "commit", "release"} <= set(tenant["requests"])
        blocks = tenant["blocks"]
        assert {"asked", "hit", "miss", "stored", "refused"} <= set(blocks)
        assert blocks["asked"] == blocks["hit"] + blocks["miss"]
        assert {"tokens", "prefill_seconds"} <= set(tenant["saved"])
        assert set(tenant["tiers"]) == {"hbm", "dram", "nvme"}
        assert blocks["hit"] == sum(tier["hits"] for tier in tenant["tiers"].values())
        for tier in tenant["tiers"].values():
            assert set(tier) >= TIER_KEYS and set(tier["latency_ms"]) == {"p50", "p99"}


def test_stats_json_is_the_daemons_document(daemon: Kvstored, client: Client) -> None:
    cache = fill(client, "stats", 8)
    names = hashes(8)
    into = [bytearray(BLOCK) for _ in range(9)]
    assert cache.get([*names, b"absent!!" * 2], into).length == 8
    done = kvstore("stats", "--json", "--socket", daemon.socket())
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    tree = json.loads(done.stdout)
    check_document(tree)
    default = tree["tenants"]["default"]
    assert default["tiers"]["dram"]["blocks"] == default["tiers"]["nvme"]["blocks"] == 8
    ours = client.stats()
    assert set(ours) == set(tree) and set(ours.tenants.default) == set(default)
    assert ours["generation"] == tree["generation"]
    assert ours["tenants"]["default"]["tiers"] == default["tiers"], "nothing has moved since"


def test_stats_for_people_show_the_same_numbers(daemon: Kvstored, client: Client) -> None:
    fill(client, "people-gone", 2)
    client.clear()
    fill(client, "people", 5)
    done = kvstore("stats", "--socket", daemon.socket())
    assert (done.returncode, done.stderr) == (0, "")
    default = client.stats().tenants.default
    blocks = default.blocks
    lines = {line.split("  ")[0].strip(): line for line in done.stdout.splitlines()}
    assert f"asked {blocks.asked:,}, hit {blocks.hit:,}, miss {blocks.miss:,}" in done.stdout
    assert lines["evicted"].split()[1:3] == ["cleared", str(default.tiers.dram.evicted.cleared)]
    for subject in ("capacity", "share of hits", "promoted", "spilled", "corrupt", "fenced"):
        assert subject in lines, done.stdout
    assert {"saved", "misses", "read", "written", "latency ms, p50 / p99"} <= set(lines)
    assert "hits/s" not in lines, "there is nothing to compare with"
    assert "\x1b" not in done.stdout, "colours are for terminals"
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


def test_stats_say_what_other_sizes_would_give(daemon: Kvstored, client: Client) -> None:
    cache = fill(client, "what-if", 8)
    names, into = hashes(8), [bytearray(BLOCK) for _ in range(9)]
    cache.get([*names, b"absent!!" * 2], into)
    done = kvstore("stats", "--what-if", "--socket", daemon.socket())
    assert (done.returncode, done.stderr) == (0, "")
    default = client.stats().tenants.default
    rows = [line.split() for line in done.stdout.splitlines()]
    for tier in ("dram", "nvme"):
        for factor in ("0.5", "2", "4"):
            assert any(row[:3] == [factor, "x", tier] for row in rows), done.stdout
    assert "LRU order" in done.stdout and f"{default.ceiling_hit_ratio:.1%}" in done.stdout
    now = [one for one in default.what_if if one["factor"] == 1.0]
    assert [one["dram_bytes"] for one in now] == [default.tiers.dram.capacity_bytes] * 2
    assert sum(default.blocks.miss_causes.values()) == default.blocks.miss
    other = kvstore("--tenant", "other", "stats", "--what-if", "--socket", daemon.socket("other"))
    assert "nothing was asked for yet" in other.stdout


def test_stats_of_the_front_door(daemon: Kvstored) -> None:
    done = kvstore("stats", "--json", "--socket", daemon.socket().with_name("grpc.sock"))
    check_document(json.loads(done.stdout))


def test_watch_in_a_pipe_repeats_with_rates(daemon: Kvstored) -> None:
    done = kvstore("stats", "--watch", "0.1", "--count", 3, "--socket", daemon.socket())
    assert (done.returncode, done.stderr) == (0, "")
    pages = done.stdout.split("tenant default: ")[1:]
    assert len(pages) == 3
    assert ["hits/s" in page for page in pages] == [False, True, True]
    assert "\x1b" not in done.stdout


def test_watch_with_json_is_one_document_a_line(daemon: Kvstored) -> None:
    done = kvstore("stats", "--json", "--watch", "0.1", "--count", 3, "--socket", daemon.socket())
    trees = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, len(trees)) == (0, 3)
    for tree in trees:
        check_document(tree)
    assert trees[0]["uptime_s"] < trees[1]["uptime_s"] < trees[2]["uptime_s"]


def test_watch_on_a_terminal_stays_in_place(daemon: Kvstored) -> None:
    status, shown = on_terminal(
        "stats", "--watch", "0.1", "--count", 2, "--socket", daemon.socket()
    )
    assert status == 0
    assert shown.count("tenant default: ") >= 2 and "hits/s" in shown
    assert "\x1b[1A" in shown, "the second page goes over the first"


def test_watch_survives_a_restart_and_ends_with_ctrl_c() -> None:
    command = [sys.executable, "-m", "kvstore.cli", "stats", "--json", "--watch", "0.1"]
    with (
        running() as daemon,
        subprocess.Popen(
            [*command, "--socket", str(daemon.socket())],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        ) as watching,
    ):
        assert watching.stdout is not None and watching.stderr is not None
        before = json.loads(watching.stdout.readline())
        daemon.stop()
        assert watching.stderr.readline().startswith("kvstore: no daemon")
        daemon.start()
        after = before
        while after["generation"] == before["generation"]:
            after = json.loads(watching.stdout.readline())
        watching.send_signal(signal.SIGINT)
        assert watching.wait(DEADLINE_S) == 0
        assert watching.stderr.read() == "", "said once"


def test_a_page_after_a_restart_shows_no_rates(
    daemon: Kvstored, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was counted before belongs to another run: rates would be negative."""
    first = client.stats()
    other_run = first | {"generation": first["generation"] + 1, "uptime_s": 0.1}
    same_run = other_run | {"uptime_s": 0.2}
    answers = iter([first, SessionLost("it ended"), Unavailable("too late"), other_run, same_run])

    def ask() -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cli_stats.watch(ask, cli_stats.Pages(cli_stats.console()), 0.0, 5)
    shown = capsys.readouterr().out
    assert "\nno daemon: it ended\nno daemon: too late\n" in shown
    pages = shown.split("tenant default: ")[1:]
    assert ["hits/s" in page for page in pages] == [False, False, True]


@pytest.mark.parametrize(
    "shown, text",
    [
        (cli_stats.size_text(0), "0 B"),
        (cli_stats.size_text(1023), "1023 B"),
        (cli_stats.size_text(1536), "1.5 KiB"),
        (cli_stats.size_text(300 << 30), "300 GiB"),
        (cli_stats.size_text(5000 << 50), "5000 PiB"),
        (cli_stats.duration_text(0.9), "0 s"),
        (cli_stats.duration_text(3_600), "1 h"),
        (cli_stats.duration_text(93_784), "1 d 2 h"),
    ],
)
def test_numbers_for_people(shown: str, text: str) -> None:
    assert shown == text


# --- bench ---------------------------------------------------------------------------------------


def test_bench_of_a_device_that_is_not_there_is_1() -> None:
    """No machine has a device 99; most have no cupy either."""
    line = refused(kvstore("bench", "--device", 99, "--json"), 1)
    assert "install kvstore[gpu]" in line or "NVIDIA driver" in line or "no CUDA device 99" in line


# --- doctor --------------------------------------------------------------------------------------


def test_doctor_tells_the_daemon_and_the_status(daemon: Kvstored) -> None:
    done = kvstore("doctor", "--json", "--config", daemon.config)
    answer = json.loads(done.stdout)
    checks = {one["name"]: one for one in answer["checks"]}
    assert done.returncode == (0 if answer["ok"] else 1)
    assert {one["status"] for one in checks.values()} <= {"ok", "warn", "fail"}
    assert all(one["remedy"] for one in checks.values() if one["status"] != "ok")
    assert "runs as process" in checks["daemon other"]["detail"]
    assert "NVMe to GPU: posix: no [[hbm]] device" in checks["daemon other"]["detail"]
    shown = kvstore("doctor", "--config", daemon.config, "--tenant", "default")
    assert shown.returncode == done.returncode
    for one in checks.values():
        assert (one["name"] in shown.stdout) == (one["name"] != "daemon other")
    assert shown.stdout.splitlines()[-1].endswith(" fail")


def test_doctor_fails_where_a_check_fails(daemon: Kvstored) -> None:
    done = kvstore("doctor", "--config", daemon.config, "--json", "--socket", "/no/such.sock")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["ok"], done.stderr) == (1, False, "")
    assert answer["checks"][-1]["status"] == "fail"
    assert "start kvstored" in answer["checks"][-1]["remedy"]
    there = kvstore("doctor", "--config", daemon.config, "--json", "--socket", daemon.socket())
    assert json.loads(there.stdout)["checks"][-1]["status"] == "ok"


# --- clear and verify ----------------------------------------------------------------------------


def test_clear_drops_every_block(daemon: Kvstored, client: Client) -> None:
    cache = fill(client, "clear", 6)
    done = kvstore("clear", "--socket", daemon.socket())  # there is nobody to ask
    assert (done.returncode, done.stdout) == (0, "dropped 6 blocks of tenant default\n")
    assert cache.lookup(hashes(6)).length == 0
    assert client.stats().tenants.default.tiers.nvme.evicted.cleared >= 6


@pytest.mark.parametrize("typed, status, left", [("n\n", 1, 3), ("\n", 1, 3), ("y\n", 0, 0)])
def test_clear_asks_on_a_terminal(
    daemon: Kvstored, client: Client, typed: str, status: int, left: int
) -> None:
    cache = fill(client, "ask", 3)
    ended, shown = on_terminal("clear", "--socket", daemon.socket(), typed=typed)
    assert "Drop all 3 blocks of tenant default?" in shown
    assert ended == status
    assert cache.lookup(hashes(3)).length == left


def test_verify_finds_planted_damage_and_nobody_gets_it(daemon: Kvstored, client: Client) -> None:
    count = 2 * DRAM_BLOCKS  # so that some are on NVMe only
    cache = fill(client, "verify", count)
    sound = kvstore("verify", "--json", "--socket", daemon.socket())
    assert (sound.returncode, sound.stderr) == (0, "")
    counts = json.loads(sound.stdout)
    assert counts.keys() == {"checked", "damaged", "skipped"}
    assert counts["damaged"] == 0 and counts["checked"] + counts["skipped"] == count

    only_there = [name for name in hashes(count) if "nvme" in cache.lookup([name]).tiers]
    damaged = only_there[:3]
    assert len(damaged) == 3
    path = daemon.nvme / "default" / "blocks.kv"
    held = path.read_bytes()
    with path.open("r+b") as file:
        for name in damaged:
            at = held.index(name * 256)
            assert at >= 1 << 20, "beyond the header"
            file.seek(at + BLOCK // 2)
            file.write(b"damage")
        file.flush()
        os.fsync(file.fileno())

    done = kvstore("verify", "--socket", daemon.socket())
    assert done.returncode == 1
    assert f"damaged {len(damaged)}" in done.stdout
    assert done.stderr.startswith("kvstore: 3 of ") and done.stderr.count("\n") == 1
    assert client.stats().tenants.default.tiers.nvme.corrupt == len(damaged)
    for name in hashes(count):
        into = bytearray(BLOCK)
        got = cache.get([name], [into]).length
        assert got == (name not in damaged)
        assert not got or into == content(name)
    again = kvstore("verify", "--json", "--socket", daemon.socket())
    assert (again.returncode, json.loads(again.stdout)["damaged"]) == (0, 0)


# --- pin -----------------------------------------------------------------------------------------


def test_blocks_are_pinned_in_whichever_layout_has_them(daemon: Kvstored, client: Client) -> None:
    name = b"in no other test"
    client.open(layout("pin-none"))
    client.open(layout("pin-this")).put([name], [content(name)])
    where = ("--socket", daemon.socket(), name.hex())
    assert kvstore("pin", *where).stdout.startswith("pinned 1 blocks of 1 hashes in ")
    assert kvstore("unpin", *where).stdout.startswith("unpinned 1 blocks of 1 hashes in ")


def test_pinned_blocks_stay_and_unpinned_ones_go(
    daemon: Kvstored, client: Client, tmp_path: Path
) -> None:
    cache = fill(client, "pin", 4)
    kept = hashes(4)
    where = ("--socket", daemon.socket(), "--layout", layout_json("pin"))
    lines = "\n".join(name.hex() for name in kept[:2]) + f"\n\n{'ee' * 16}\n{kept[0].hex()}\n"
    done = kvstore("pin", *where, "--ttl", 3600, "-", given=lines)
    assert (done.returncode, done.stdout) == (0, "pinned 2 of 3 blocks\n")
    file = tmp_path / "layout.json"
    file.write_text(layout_json("pin"))
    more = ("--socket", daemon.socket(), "--layout", file, kept[2].hex(), kept[3].hex())
    assert kvstore("pin", "--priority", 100, *more).stdout == "pinned 2 of 2 blocks\n"

    press(client, "pin-others")
    assert cache.lookup(kept).tiers == {"dram": 4}
    done = kvstore("unpin", *more)
    assert (done.returncode, done.stdout) == (0, "unpinned 2 of 2 blocks\n")
    press(client, "pin-others-again")
    assert cache.lookup(kept).tiers == {"dram": 2, "nvme": 2}
