"""All that is measured on a GPU, in one table: `kvstore bench --device 0`, each way of copying
alone, and the time to an engine's first token.

    python -m tests.bench.gpu            the table, as text; under eight minutes
    python -m tests.bench.gpu --json     the same as JSON
    python -m tests.bench.gpu --rehearse everything in small, with a fake device

Each figure is the median over rounds that measure the limit and ours in turn. What a machine lacks
is a row without a figure that says what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import platform
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.bench_device import PARTS, fragments, measure, ratios
from kvstore.bench_figures import Figure, all_met, unmeasured
from kvstore.bench_limits import RawDisk
from kvstore.bench_rig import LEGACY_STREAM, Rig, find
from kvstore.client.cuda import Direction
from kvstore.client.cuda_fragments import Breaks, Way
from kvstore.client.cuda_setup import Abilities
from kvstore.errors import InternalError, KVStoreError
from kvstore.types import GIB
from tests.bench import ttft
from tests.bench.rig import SMALL, rehearsal
from tests.e2e.harness import hashes

TTFT_BAR = 14.0
IO_THREADS = 8
FORCED = {
    Way.PLAIN: Breaks(0, 0),
    Way.BATCH: Breaks(0, 1 << 40),
    Way.GATHER: Breaks(1 << 40, 1 << 40),
}


def main(arguments: list[str] | None = None) -> int:
    """Print the table. Exit status 0 when every bar that could be measured is met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        try:
            rig = stack.enter_context(rehearsal()) if given.rehearse else find(0)
        except KVStoreError as error:
            sys.stderr.write(f"kvstore: nothing can be measured here: {error}\n")
            return 1
        rows = measure(rig, (*PARTS, each_way, first_token), hashlib.sha256(), quiet=False)
    ok = all_met(rows)
    if given.rehearse:
        rows = [dataclasses.replace(row, bar=None, relation="") for row in rows]
        ok = all(row.value is not None for row in rows)
    if given.json:
        tree = {
            "version": 1,
            "machine": f"{platform.platform()}, {rig.name}",
            "rehearsal": given.rehearse,
            "ok": ok,
            "rows": [dataclasses.asdict(row) | {"ok": row.ok} for row in rows],
        }
        sys.stdout.write(json.dumps(tree, indent=1) + "\n")
    else:
        _print(rig, rows)
    return 0 if ok else 1


def _print(rig: Rig, rows: Sequence[Figure]) -> None:
    sys.stdout.write(f"{rig.name}, {platform.platform()}\n")
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.3g} {row.unit}".strip()
        bar = "" if row.bar is None else f"{row.relation} {row.bar:g}"
        verdict = {None: "", True: "ok", False: "MISSED"}[row.ok]
        sys.stdout.write(f"{row.name:<58} {value:>10} {bar:>8} {verdict:<6} {row.detail}\n")


# -- each way ----------------------------------------------------------------------------------


def each_way(rig: Rig, folder: Path, digest: Any) -> list[Figure]:
    """Blocks in fragments with each way alone, and where the borders between them were found."""
    state, found = rig.copier._state(rig.number), []
    with fragments(rig, folder, digest) as once:
        chosen = state.abilities
        try:
            for way, breaks in FORCED.items():
                if not {Way.BATCH: chosen.batches, Way.GATHER: chosen.gathers}.get(way, True):
                    found.append(unmeasured(f"{way.name.lower()} copies", "no such"))
                    continue
                state.abilities = Abilities(
                    way is Way.BATCH, way is Way.GATHER, dict.fromkeys(Direction, breaks)
                )
                text = f"  {{}} with {way.name.lower()} copies alone"
                found += ratios(rig, once, None, text.format)
        finally:
            state.abilities = chosen
    for direction, breaks in chosen.breaks.items():
        name = f"  {direction.value}: the kernel below"
        detail = f"plain copies from {breaks.plain_bytes / 1024:g} KiB on"
        found.append(Figure(name, breaks.gather_bytes / 1024, "KiB", "", None, detail))
    return found


# -- the first token ---------------------------------------------------------------------------


def first_token(rig: Rig, folder: Path, digest: Any) -> list[Figure]:
    """A prompt computed from nothing, over the same reloaded from DRAM, and from NVMe."""
    shape = ttft.TINY if rig.sizes is SMALL else ttft.LLAMA_8B
    engine = ttft.Engine(shape, rig.copier, LEGACY_STREAM)
    keys = hashes(shape.blocks, "prompt")
    total, rounds = shape.blocks * engine.layout.block_bytes, rig.sizes.starts
    tiers = _tiers(rig, total)
    engine.cold()  # warms up
    with rig.daemon(folder, **tiers) as daemon, daemon.connect() as client:
        cache = ttft.open_cache(client, engine)
        colds, shares, details = [], [], []
        for _ in range(rounds):
            cold_s, token = engine.cold()
            cache.forget(keys)
            engine.store(cache, keys)
            warm_s, reload_s, again = engine.reloaded(cache, keys)
            _same(token, again)
            colds.append(cold_s)
            shares.append(cold_s / warm_s)
            details.append((warm_s, reload_s))
        client.drain(0)
    warm_s, reload_s = (statistics.median(part) for part in zip(*details, strict=True))
    row = Figure(
        f"first token, {shape.prefix_tokens} tokens: cold over from DRAM",
        statistics.median(shares),
        "x",
        ">=",
        TTFT_BAR,
        f"cold {statistics.median(colds):.3g} s, reloaded {warm_s * 1e3:.3g} ms, of "
        f"these {reload_s * 1e3:.3g} ms for {total / GIB:.3g} GiB, {rounds} times",
    )
    return [row, *_from_nvme(rig, folder, engine, keys, statistics.median(colds), token)]


def _from_nvme(
    rig: Rig, folder: Path, engine: ttft.Engine, keys: list[bytes], cold_s: float, token: int
) -> list[Figure]:
    """Each round has a daemon that finds the files of the one before, and an empty arena."""
    size, total = engine.layout.block_bytes, len(keys) * engine.layout.block_bytes
    if shutil.disk_usage(folder).free < 2 * total:
        return [unmeasured("first token, from NVMe", "the drive is full")]
    warms, shares = [], []
    disk = RawDisk(folder / "raw", len(keys), size, IO_THREADS)
    try:
        disk.write()
        for _ in range(rig.sizes.starts):
            with rig.daemon(folder, **_tiers(rig, total)) as daemon, daemon.connect() as client:
                limit_s = disk.read()
                cache = ttft.open_cache(client, engine)
                warm_s, reload_s, again = engine.reloaded(cache, keys)
            _same(token, again)
            warms.append(warm_s)
            shares.append(limit_s / reload_s)
    finally:
        disk.close()
    return [
        Figure(
            "first token: cold over from NVMe",
            cold_s / statistics.median(warms),
            "x",
            "",
            None,
            f"reloaded {statistics.median(warms):.3g} s, {len(warms)} times",
        ),
        Figure(
            "  the reload from NVMe against the drive's own reads",
            statistics.median(shares),
            "",
            "",
            None,
            f"O_DIRECT: {disk.direct}, {total / GIB:.3g} GiB",
        ),
    ]


def _tiers(rig: Rig, total: int) -> dict[str, int]:
    """Room for the prompt, and for a half of it more."""
    slab = rig.sizes.slab_bytes
    return {"dram_bytes": total + total // 2 + 2 * slab, "nvme_bytes": 2 * total + 4 * slab}


def _same(token: int, again: int) -> None:
    if token != again:
        raise InternalError("with the KV cache reloaded another token comes out")


if __name__ == "__main__":
    sys.exit(main())
