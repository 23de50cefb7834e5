"""What the demonstration found: checks that must hold, and the tables for a person."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore.types import MIB
from tests.demo.profile import Profile

Figures = dict[str, Any]  # the line that an engine printed


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Everything that was seen."""

    cold: Figures
    first: Figures  # reloaded by a restarted engine
    second: Figures  # the same after the daemon was restarted too
    daemon_first: Any  # statistics of the daemon after each reload
    daemon_second: Any
    exit_codes: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Check:
    """One promise, whether it held, and what was seen."""

    name: str
    ok: bool
    seen: str


def checks(profile: Profile, outcome: Outcome) -> list[Check]:
    """All that must hold for exit code 0."""
    cold, first, second = outcome.cold, outcome.first, outcome.second
    count = profile.block_count
    tiers = first["tiers"]
    found = [
        Check(
            "all blocks were taken",
            cold["resident"] == count,
            f"{cold['resident']} of {count} resident, {cold['stored']} stored, "
            f"{cold['refusals']} refused and asked again",
        ),
        *_reload_checks("restarted engine", profile, first, outcome.daemon_first),
        Check(
            "restarted engine: part from DRAM, part from NVMe",
            tiers.get("dram", 0) > 0 and tiers.get("nvme", 0) > 0,
            f"{tiers}",
        ),
        *_reload_checks("restarted daemon", profile, second, outcome.daemon_second),
        Check(
            "daemon drained and stopped with exit code 0, twice",
            outcome.exit_codes == (0, 0),
            f"{outcome.exit_codes[0]} and {outcome.exit_codes[1]}",
        ),
    ]
    if profile.speed_up_min:
        for name, life in (("restarted engine", first), ("restarted daemon", second)):
            ratio = cold["ttft_s"] / life["ttft_s"]
            found.append(
                Check(
                    f"{name}: first token at least {profile.speed_up_min:g} times sooner",
                    ratio >= profile.speed_up_min,
                    f"{ratio:.1f} times",
                )
            )
    return found


def _reload_checks(name: str, profile: Profile, life: Figures, daemon: Any) -> list[Check]:
    count = profile.block_count
    blocks = daemon["tenants"]["default"]["blocks"]
    return [
        Check(
            f"{name}: reload complete",
            life["length"] == count == sum(life["tiers"].values()),
            f"{life['length']} of {count} blocks, {life['tiers']}",
        ),
        Check(
            f"{name}: only the tail was computed",
            life["computed"] == profile.tail_tokens,
            f"{life['computed']} of {profile.prompt_tokens} tokens",
        ),
        Check(
            f"{name}: logits bitwise equal",
            life["bitwise_equal"],
            f"{profile.greedy_steps + 1} steps, largest difference {life['difference_max']:g}",
        ),
        Check(f"{name}: greedy tokens equal", life["tokens_equal"], f"{life['tokens']}"),
        Check(
            f"{name}: the comparison notices one damaged block",
            life["damage_noticed"],
            "one layer's values of one block set to zero",
        ),
        Check(
            f"{name}: the daemon counted the hits",
            blocks["asked"] == blocks["hit"] + blocks["miss"] and blocks["hit"] >= count,
            f"asked {blocks['asked']} = hit {blocks['hit']} + miss {blocks['miss']}",
        ),
    ]


def show(console: Console, profile: Profile, outcome: Outcome) -> None:
    """The tables."""
    console.print(_comparison(profile, outcome))
    console.print(_daemon_view(outcome))


def _comparison(profile: Profile, outcome: Outcome) -> Table:
    lives = (outcome.cold, outcome.first, outcome.second)
    table = Table(title=f"One prompt of {profile.prompt_tokens} tokens, three lives of the engine")
    table.add_column("")
    for name in ("cold prefill", "reloaded", "reloaded, daemon\nrestarted too"):
        table.add_column(name, justify="right")

    def row(name: str, texts: list[str]) -> None:
        table.add_row(name, *["-"] * (3 - len(texts)), *texts)

    row("time to first token", [f"{one['ttft_s'] * 1e3:,.0f} ms" for one in lives])
    row("speed-up", [f"{lives[0]['ttft_s'] / one['ttft_s']:.1f} x" for one in lives])
    for name, key in (("load", "load_s"), ("compute", "compute_s")):
        row(f"  of which {name}", [f"{one[key] * 1e3:,.0f} ms" for one in lives[1:]])
    row("tokens computed", [f"{one['computed']:,}" for one in lives])
    for tier in ("dram", "nvme"):
        texts = [f"{one['tiers'].get(tier, 0)}" for one in lives[1:]]
        row(f"blocks from {tier.upper()}", texts)
    row("logits bitwise equal", [_yes(one["bitwise_equal"]) for one in lives[1:]])
    row("greedy tokens equal", [_yes(one["tokens_equal"]) for one in lives[1:]])
    return table


def _daemon_view(outcome: Outcome) -> Table:
    table = Table(title="What the daemon counted, since its start")
    table.add_column("")
    tiers = []
    for life, stats in (
        ("reloaded", outcome.daemon_first),
        ("daemon restarted", outcome.daemon_second),
    ):
        for tier in ("dram", "nvme"):
            table.add_column(f"{life}\n{tier.upper()}", justify="right")
            tiers.append(stats["tenants"]["default"]["tiers"][tier])
    for name in ("blocks", "hits", "promoted", "spilled", "corrupt"):
        table.add_row(name, *[f"{one[name]:,}" for one in tiers])
    table.add_row("evicted", *[f"{sum(one['evicted'].values()):,}" for one in tiers])
    for name in ("used", "capacity", "read", "written"):
        table.add_row(f"{name} MiB", *[f"{one[f'{name}_bytes'] / MIB:,.1f}" for one in tiers])
    return table


def _yes(answer: bool) -> str:
    return "yes" if answer else "NO"
