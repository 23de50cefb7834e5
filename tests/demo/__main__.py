"""Runs the demonstration: prefill, offload, restart the engine, then the daemon; compare all."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from kvstore.errors import KVStoreError
from kvstore.types import GIB, MIB
from tests.demo.daemon import ROOT, Daemon, DemoFailed, environment, tail, workplace
from tests.demo.profile import FULL, SMALL, Profile
from tests.demo.report import Check, Outcome, checks, show

ENGINE_DEADLINE_S = 240.0
THREADS_MAX = 4  # the comparison is meant for small hosts, and should look alike on large ones


def engine(life: str, profile: Profile, folder: Path, socket: Path) -> dict[str, Any]:
    """Runs one life of the engine in a process of its own; the figures it printed."""
    threads = min(THREADS_MAX, len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "tests.demo.engine", life, "--profile", profile.name]
    command += ["--threads", str(threads), "--socket", str(socket)]
    command += ["--reference", str(folder / "reference.pt")]
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": str(32 * MIB),  # memory once touched is kept, in all three lives
        "MALLOC_TRIM_THRESHOLD_": str(4 * GIB),
        "CUDA_VISIBLE_DEVICES": "",  # the demonstration is the CPU's, everywhere
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "TMPDIR": str(folder),  # libraries leave things there
    }
    log = folder / f"{life}.log"
    with log.open("ab") as errors:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                timeout=ENGINE_DEADLINE_S,
                cwd=ROOT,
                env=environment() | settings,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"engine '{life}' took over {ENGINE_DEADLINE_S:g} s") from None
    if done.returncode:
        raise DemoFailed(f"engine '{life}' ended with {done.returncode}", log=log)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def run(console: Console, profile: Profile, folder: Path, daemon: Daemon) -> Outcome:
    """The story, start to end. Raises DemoFailed or KVStoreError when it cannot go on."""

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    say(
        f"prompt: {profile.prompt_tokens} tokens, {profile.block_count} blocks of "
        f"{profile.block_bytes / MIB:g} MiB; DRAM holds {profile.dram_bytes / MIB:g} of their "
        f"{profile.kv_bytes / MIB:g} MiB"
    )
    say(f"daemon started in {daemon.start():.2f} s")
    cold = engine("prefill", profile, folder, daemon.socket)
    say(
        f"engine: first token after {cold['ttft_s']:.2f} s; "
        f"offloaded {cold['stored']} blocks in {cold['offload_s']:.2f} s; engine ended"
    )
    first = engine("reload", profile, folder, daemon.socket)
    daemon_first = daemon.stats()
    say(f"engine restarted: first token after {first['ttft_s']:.2f} s, blocks {first['tiers']}")
    code_first = daemon.stop()
    say(f"daemon stopped with {code_first}; started again in {daemon.start():.2f} s")
    second = engine("reload", profile, folder, daemon.socket)
    daemon_second = daemon.stats()
    say(f"engine restarted: first token after {second['ttft_s']:.2f} s, blocks {second['tiers']}")
    code_second = daemon.stop()
    return Outcome(cold, first, second, daemon_first, daemon_second, (code_first, code_second))


def verdict(console: Console, found: Sequence[Check]) -> int:
    """Prints each check and the last line; the exit code."""
    for check in found:
        console.print(
            f"{'ok  ' if check.ok else 'FAIL'}  {check.name} ({check.seen})", soft_wrap=True
        )
    failed = [check.name for check in found if not check.ok]
    console.print(f"demo: FAILED: {'; '.join(failed)}" if failed else "demo: ok", soft_wrap=True)
    return 1 if failed else 0


def stop_on(number: int, frame: object) -> NoReturn:
    """A polite end is an exit, so that everything is cleaned up."""
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 only if everything held."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description=__doc__)
    parser.add_argument("--small", action="store_true", help="a small model; no speed-up asked")
    parser.add_argument("--keep", action="store_true", help="keep the folders, say where they are")
    options = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop_on)
    console = Console(highlight=False, markup=False, emoji=False)
    profile = SMALL if options.small else FULL
    with workplace(profile, keep=options.keep) as (folder, arena):
        kept = "kept" if options.keep else "removed at the end"
        console.print(f"folders, {kept}: {folder} {arena}", soft_wrap=True)
        daemon = Daemon(profile, folder, arena)
        try:
            outcome = run(console, profile, folder, daemon)
        except (DemoFailed, KVStoreError) as error:
            log = getattr(error, "log", None) or daemon.log
            console.print(f"the end of {log.name}:\n{tail(log)}", soft_wrap=True)
            console.print(f"demo: FAILED: {error}", soft_wrap=True)
            return 1
        finally:
            daemon.kill()
    show(console, profile, outcome)
    return verdict(console, checks(profile, outcome))


if __name__ == "__main__":
    sys.exit(main())
