"""How the statistics of a daemon look on a terminal or in a pipe, once or again and again.

Works on the document of `kvstore stats --json`; asking for it is the caller's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvstore.client import Client, Layout
from kvstore.errors import InvalidRequest, KVStoreError, SessionLost, Unavailable

PIPE_COLUMNS = 1_000  # nobody looks at a pipe: no reason to fold lines
BOX = box.SIMPLE_HEAD
Document = Mapping[str, Any]
CAUSES = {  # what `blocks.miss_causes` counts, for people
    "room": "evicted for room",
    "idle": "evicted as idle",
    "quota": "evicted by quota",
    "refused": "never stored: refused",
    "late": "NVMe too late",
    "no_room": "all of DRAM leased",
    "too_slow": "faster to compute",
    "failed": "I/O failed",
    "behind": "behind a miss",
}


def console() -> Console:
    """Stdout. Texts are shown as they are: no markup, since much of it is other people's words."""
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = None if narrow else PIPE_COLUMNS
    return Console(width=width, markup=False, emoji=False, highlight=False)


def put(console: Console, what: RenderableType) -> None:
    """Print it; outside of a terminal without the blanks that fill lines up."""
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as captured:
        console.print(what)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())
    sys.stdout.flush()


def text(words: str, style: str = "") -> Text:
    """Words in a style."""
    return Text(words, style=style)


# --- numbers for people --------------------------------------------------------------------------


def size_text(count: float) -> str:
    """Bytes in the unit that gives three or four digits."""
    units = iter(("B", "KiB", "MiB", "GiB", "TiB", "PiB"))
    unit = next(units)
    while count >= 1024 and unit != "PiB":
        count, unit = count / 1024, next(units)
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def duration_text(seconds: float) -> str:
    """The two largest units of a duration."""
    left = int(seconds)
    parts: list[str] = []
    for name, unit in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, unit)
        if count or (name == "s" and not parts):
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _counts(counts: Mapping[str, int]) -> str:
    """Those that are not zero, the largest first."""
    largest = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count:,}" for name, count in largest if count) or "none"


def _milliseconds(latency: Mapping[str, float | None]) -> str:
    values = (latency["p50"], latency["p99"])
    return " / ".join("-" if one is None else f"{one:,.3g}" for one in values)


# --- one page ------------------------------------------------------------------------------------


def page(now: Document, before: Document | None = None) -> RenderableType:
    """Every tenant of a document; with an earlier document of the same run, rates between both."""
    if before is not None and before["generation"] != now["generation"]:
        before = None
    parts: list[RenderableType] = []
    for name, tenant in now["tenants"].items():
        earlier = before["tenants"].get(name) if before else None
        elapsed_s = now["uptime_s"] - before["uptime_s"] if before else 0.0
        parts.append(
            text(
                f"tenant {name}: up {duration_text(now['uptime_s'])}, generation "
                f"{now['generation']}, sessions {tenant['sessions']:,}, leases "
                f"{tenant['leases']:,}",
                "bold",
            )
        )
        parts.append(_summary(tenant, earlier, elapsed_s))
        parts.append(_tiers(tenant, earlier, elapsed_s))
    return Group(*parts)


def _summary(tenant: Document, before: Document | None, elapsed_s: float) -> Table:
    """The tenant's own numbers, one line a subject."""
    blocks, saved, moves = tenant["blocks"], tenant["saved"], tenant["moves"]
    asked, hit = blocks["asked"], blocks["hit"]
    lines = {
        "requests": _counts(tenant["requests"]),
        "blocks": f"asked {asked:,}, hit {hit:,}, miss {blocks['miss']:,}, hit ratio "
        f"{_share(hit, asked)}" + _of_ceiling(tenant),
        "misses": _counts(_in_words(blocks["miss_causes"])),
        "put": f"stored {blocks['stored']:,}, refused {blocks['refused']:,}, aborted "
        f"{blocks['aborted']:,}, quarantined {blocks['quarantined']:,}",
        "saved": f"{saved['tokens']:,} tokens, {saved['prefill_seconds']:,.1f} s of prefill",
        "NVMe wear": _wear(tenant["wear"]),
        "under way": f"spills {moves['spills']:,}, loads {moves['loads']:,}",
    }
    if any(tenant["errors"].values()):
        lines["refused requests"] = _counts(tenant["errors"])
    if before is not None and elapsed_s > 0:
        new_asked, new_hit = (blocks[key] - before["blocks"][key] for key in ("asked", "hit"))
        lines["now"] = (
            f"asked {new_asked / elapsed_s:,.1f}/s, hits {new_hit / elapsed_s:,.1f}/s, hit ratio "
            f"{_share(new_hit, new_asked)}"
        )
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for subject, line in lines.items():
        table.add_row(subject, line)
    return table


def _of_ceiling(tenant: Document) -> str:
    """How near the hit ratio is to what any cache could have."""
    blocks, ceiling = tenant["blocks"], tenant["ceiling_hit_ratio"]
    if ceiling is None or not blocks["asked"]:
        return ""
    share = _share(blocks["hit"] / blocks["asked"], ceiling)
    return f", of {ceiling:.1%} possible: {share} of the ceiling"


def _in_words(causes: Mapping[str, int]) -> Counter[str]:
    """Causes of misses as people say them; two of the same words are added up."""
    words: Counter[str] = Counter()
    for cause, count in causes.items():
        words[CAUSES.get(cause, cause.replace("_", " "))] += count
    return words


def _wear(wear: Document) -> str:
    written, budget = wear["written_bytes_per_day"], wear["budget_bytes_per_day"]
    line = "-" if written is None else f"{size_text(written)} a day written since the start"
    return line + ("" if budget is None else f", the budget is {size_text(budget)} a day")


def what_if_page(now: Document) -> RenderableType:
    """For every tenant, what other sizes of its tiers would give."""
    parts: list[RenderableType] = []
    for name, tenant in now["tenants"].items():
        sample, ceiling = tenant["sample"], tenant["ceiling_hit_ratio"]
        if not tenant["what_if"]:
            parts.append(text(f"tenant {name}: nothing was asked for yet", "bold"))
            continue
        parts.append(
            text(
                f"tenant {name}: estimate from a sample of {sample['blocks']:,} blocks "
                f"({sample['rate']:.2%} of keys), LRU order, corrected by what was measured at the "
                f"present sizes; at most {ceiling:.1%} is possible",
                "bold",
            )
        )
        table = Table(box=BOX, pad_edge=False)
        for column in (
            "",
            "dram",
            "nvme",
            "hit ratio",
            "from dram",
            "tokens a day",
            "prefill a day",
        ):
            table.add_column(column, justify="right", no_wrap=True)
        for one in tenant["what_if"]:
            tokens, seconds = one["saved_tokens_per_day"], one["saved_prefill_seconds_per_day"]
            table.add_row(
                "now" if one["factor"] == 1 else f"{one['factor']:g} x {one['tier']}",
                size_text(one["dram_bytes"]),
                size_text(one["nvme_bytes"]),
                f"{one['hit_ratio']:.1%}",
                f"{one['dram_hit_ratio']:.1%}",
                "-" if tokens is None else f"{tokens:,.0f}",
                "-" if seconds is None else duration_text(seconds),
            )
        parts.append(table)
    return Group(*parts)


def _tiers(tenant: Document, before: Document | None, elapsed_s: float) -> Table:
    """A column for each tier that is there, a row for each number."""
    tiers = {
        name: tier
        for name, tier in tenant["tiers"].items()
        if tier["capacity_bytes"] or tier["blocks"] or tier["hits"]
    }
    table = Table(box=BOX, pad_edge=False)
    table.add_column("", style="dim", no_wrap=True)
    for name in tiers:
        table.add_column(name, justify="right")
    rows = [_rows(tier, tenant["blocks"]["hit"]) for tier in tiers.values()]
    if before is not None and elapsed_s > 0:
        rows = [
            row | _rates(tier, before["tiers"][name], elapsed_s)
            for row, (name, tier) in zip(rows, tiers.items(), strict=True)
        ]
    for subject in rows[0] if rows else ():
        table.add_row(subject, *(row[subject] for row in rows))
    return table


def _rows(tier: Document, hits: int) -> dict[str, Text]:
    """What a tier's column shows."""
    capacity, used = tier["capacity_bytes"], tier["used_bytes"]
    evicted = _counts(tier["evicted"]).replace(", ", "\n")
    bad = "bold red"
    return {
        "capacity": text(size_text(capacity)),
        "used": text(f"{size_text(used)}, {_share(used, capacity)}"),
        "blocks": text(f"{tier['blocks']:,}"),
        "hits": text(f"{tier['hits']:,}"),
        "share of hits": text(_share(tier["hits"], hits)),
        "promoted": text(f"{tier['promoted']:,}"),
        "spilled": text(f"{tier['spilled']:,}"),
        "evicted": text(evicted),
        "corrupt": text(f"{tier['corrupt']:,}", bad if tier["corrupt"] else ""),
        "I/O errors": text(f"{tier['failed']:,}", bad if tier["failed"] else ""),
        "fenced": text(*(("yes", bad) if tier["fenced"] else ("no",))),
        "latency ms, p50 / p99": text(_milliseconds(tier["latency_ms"])),
        "read": text(size_text(tier["read_bytes"])),
        "written": text(size_text(tier["written_bytes"])),
    }


def _rates(tier: Document, before: Document, elapsed_s: float) -> dict[str, Text]:
    """What happened between two documents of one run."""

    def rate(key: str) -> float:
        change: float = tier[key] - before[key]
        return change / elapsed_s

    return {
        "hits/s": text(f"{rate('hits'):,.1f}"),
        "read GB/s": text(f"{rate('read_bytes') / 1e9:,.3f}"),
        "written GB/s": text(f"{rate('written_bytes') / 1e9:,.3f}"),
    }


# --- again and again -----------------------------------------------------------------------------


class Screen(Protocol):
    """Where refreshes go."""

    def __enter__(self) -> Screen: ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, now: Document, before: Document | None) -> None:
        """A document, and the one before if there was one."""

    def absent(self, problem: str) -> None:
        """No daemon, at this refresh."""


class JsonLines:
    """One document a line; what is wrong goes to stderr, once."""

    def __init__(self) -> None:
        self._told = False

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, now: Document, before: Document | None) -> None:
        """See Screen."""
        self._told = False
        sys.stdout.write(json.dumps(now) + "\n")
        sys.stdout.flush()

    def absent(self, problem: str) -> None:
        """See Screen."""
        if not self._told:
            self._told = True
            sys.stderr.write(f"kvstore: {problem}\n")
            sys.stderr.flush()


class Pages:
    """Pages for people: in place on a terminal, one below the other elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = (
            Live(console=console, auto_refresh=False, vertical_overflow="crop")
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Pages:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, now: Document, before: Document | None) -> None:
        """See Screen."""
        self._put(page(now, before))

    def absent(self, problem: str) -> None:
        """See Screen."""
        self._put(text(problem, "bold red"))

    def _put(self, what: RenderableType) -> None:
        if self._live is not None:
            self._live.update(what, refresh=True)
        else:
            put(self._console, what)


def watch(
    ask: Callable[[], Document], screen: Screen, every_s: float, count: int | None = None
) -> None:
    """Ask and show until Ctrl-C, or `count` times. A daemon that is away is waited for."""
    before: Document | None = None
    try:
        with screen:
            for _ in _ticks(every_s, count):
                try:
                    now = ask()
                except (Unavailable, SessionLost) as error:
                    screen.absent(_no_daemon(error))
                else:
                    screen.show(now, before)
                    before = now
    except KeyboardInterrupt:
        return


def _ticks(every_s: float, count: int | None) -> Iterator[None]:
    done = 0
    while True:
        yield
        done += 1
        if done == count:
            return
        time.sleep(every_s)


def _no_daemon(error: KVStoreError) -> str:
    said = str(error)
    return said if said.startswith("no daemon") else f"no daemon: {said}"


def layouts(client: Client, tenant: str) -> list[Layout]:
    """All that clients of the tenant have opened."""
    known = client.stats()["tenants"][tenant].get("layouts")
    if known is None:
        raise InvalidRequest("this daemon does not tell its layouts: name one with --layout")
    return [Layout(**fields) for fields in known]
