"""Damage, death, silence and want of room: the model computes, with equal tokens, and in time."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from kvstore.client.transformers import SaveResult
from kvstore.client.transformers_blocks import Form, chain, prompt_tokens
from kvstore.tiers.slot_table import SlotTable
from tests.e2e.harness import Daemon, wait_for
from tests.transformers_store.conftest import MakeStore
from tests.transformers_store.models import (
    BLOCK,
    NEW,
    forward,
    generated,
    llama,
    prefilled,
    prompt,
    same,
)

MakeDaemon = Callable[..., Daemon]
COUNT = 8  # blocks of the prompt
TOKENS = prompt(COUNT * BLOCK + 5)
TIMEOUT_S = 0.6
SLACK_S = 2.5  # of a scheduler with other work: what hangs takes longer than any of this
LARGE = {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 64}  # blocks of 128 KiB
LARGE |= {"max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def hashes(tokens: torch.Tensor) -> list[bytes]:
    return chain(prompt_tokens(tokens), BLOCK, b"")


def check_rest(model: Any, cache: Any, known: int) -> None:
    """The cache is right, and the model computes from it what it computes from a control."""
    control = prefilled(model, TOKENS[:, : COUNT * BLOCK])
    if known < COUNT * BLOCK:
        control.crop(known - COUNT * BLOCK)
    assert cache.get_seq_length() == known
    assert not known or same(cache, control)
    rest = TOKENS[:, known:]
    assert torch.equal(forward(model, rest, cache), forward(model, rest, control))


def damage(daemon: Daemon, block: bytes, place: str) -> None:
    """Change some bytes of a block, in the file of the NVMe tier or in the arena."""
    if place == "nvme":
        path = next((daemon.folder / "nvme").rglob("blocks.kv"))
        at = path.read_bytes().index(block)
    else:
        path = daemon.arena / "default" / "arena"
        at = path.read_bytes().index(block)
    with path.open("r+b") as file:
        file.seek(at + 1_000)
        file.write(b"\x12\x34\x56")


def block_bytes(model: Any, number: int) -> bytes:
    """The bytes of a block of TOKENS as they must be stored: the format, written down once more."""
    cache = prefilled(model, TOKENS[:, : COUNT * BLOCK])
    part = slice(number * BLOCK, (number + 1) * BLOCK)
    keys = [layer.keys[0, :, part] for layer in cache.layers]
    values = [layer.values[0, :, part] for layer in cache.layers]
    whole = torch.stack([torch.stack(keys), torch.stack(values)])
    return bytes(whole.contiguous().flatten().view(torch.uint8).numpy())


def all_summed(daemon: Daemon) -> bool:
    """Whether the table tells the checksum of every block."""
    table = SlotTable.open(daemon.arena / "default" / "slots")
    found = list(table.records())
    table.close()
    return len(found) == COUNT and all(one.checksum for one in found)


def test_damage_on_nvme_is_a_miss(
    model: Any, make_daemon: MakeDaemon, make_store: MakeStore
) -> None:
    daemon = make_daemon().start()
    store = make_store(model, daemon)
    assert store.save(TOKENS, prefilled(model, TOKENS[:, : COUNT * BLOCK])).stored == COUNT
    wait_for(lambda: daemon.stats().tiers.nvme.spilled == COUNT, "the copies on NVMe")
    daemon.stop()
    daemon.lose_memory()
    damage(daemon, block_bytes(model, 3), "nvme")
    daemon.start()
    store = make_store(model, daemon)
    cache, known = store.load(TOKENS)
    assert known == 3 * BLOCK and store.health.counts["nvme_blocks"] == 3
    check_rest(model, cache, known)
    assert daemon.stats().tiers.nvme.corrupt == 1


def test_damage_in_memory_while_no_daemon_runs_is_a_miss(
    model: Any, make_daemon: MakeDaemon, make_store: MakeStore
) -> None:
    """A daemon proves what it adopts by the checksums that the one before it has written down."""
    daemon = make_daemon(nvme={"size": "0"}).start()
    store = make_store(model, daemon)
    assert store.save(TOKENS, prefilled(model, TOKENS[:, : COUNT * BLOCK])).stored == COUNT
    wait_for(lambda: all_summed(daemon), "the checksums")
    daemon.kill()
    damage(daemon, block_bytes(model, 5), "arena")
    daemon.start()
    store = make_store(model, daemon)
    cache, known = store.load(TOKENS)
    assert known == 5 * BLOCK
    check_rest(model, cache, known)
    assert daemon.stats().tiers.dram.corrupt == 1
    assert store.save(TOKENS, prefilled(model, TOKENS)).stored == 1, "it may be stored again"


class At(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed here
    """Does something once, when so many tokens have been generated."""

    def __init__(self, length: int, act: Callable[[], None]) -> None:
        self.length, self.act, self.done = length, act, False

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """See LogitsProcessor."""
        if input_ids.shape[1] == self.length:
            self.act()
            self.done = True
        return scores


def test_a_daemon_killed_while_tokens_are_generated(
    model: Any, make_daemon: MakeDaemon, make_store: MakeStore
) -> None:
    daemon = make_daemon().start()
    store = make_store(model, daemon)
    want = generated(model, TOKENS)
    assert store.save(want.sequences, want.past_key_values).stored == (133 + NEW - 1) // BLOCK
    cache, known = store.load(TOKENS)
    kill = At(TOKENS.shape[1] + 5, daemon.kill)
    output = generated(model, TOKENS, cache, logits_processor=LogitsProcessorList([kill]))
    assert kill.done and known == COUNT * BLOCK
    assert torch.equal(output.sequences, want.sequences)
    assert store.save(prompt(64, 9), output.past_key_values) == SaveResult()
    cache, known = store.load(TOKENS)
    assert known == 0 and store.health.down
    assert torch.equal(generated(model, TOKENS, cache).sequences, want.sequences)
    daemon.start()
    wait_for(lambda: not store.health.down, "the store to see the next daemon")
    cache, known = store.load(TOKENS)
    assert known == COUNT * BLOCK
    assert torch.equal(generated(model, TOKENS, cache).sequences, want.sequences)


@pytest.mark.parametrize("when", ["save and load", "reserve and commit", "copy and release"])
def test_a_daemon_killed_and_restarted_between(
    when: str,
    model: Any,
    make_daemon: MakeDaemon,
    make_store: MakeStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was committed is found again; what a dead daemon leased is neither stored nor used."""
    daemon = make_daemon().start()
    store = make_store(model, daemon)
    live = prefilled(model, TOKENS[:, : COUNT * BLOCK])

    def restart_after(name: str) -> None:
        act = getattr(Form, name)

        def acts(*args: Any) -> Any:
            found = act(*args)
            monkeypatch.undo()
            daemon.kill()
            daemon.start()
            return found

        monkeypatch.setattr(Form, name, acts)

    if when == "reserve and commit":
        restart_after("write")
        assert store.save(TOKENS, live) == SaveResult() and store.health.counts["failed"] == 1
        assert store.lookup(TOKENS) == 0
    assert store.save(TOKENS, live).stored == COUNT
    if when == "copy and release":
        restart_after("read")
        cache, known = store.load(TOKENS)
        assert known == 0 and store.health.counts["discarded"] == 1
        check_rest(model, cache, known)
    elif when == "save and load":
        daemon.kill()
        daemon.start()
    cache, known = store.load(TOKENS)
    assert known == COUNT * BLOCK and not store.health.down
    check_rest(model, cache, known)


def test_a_daemon_that_halts_is_waited_for_once(
    model: Any, make_daemon: MakeDaemon, make_store: MakeStore
) -> None:
    daemon = make_daemon().start()
    store = make_store(model, daemon, timeout_s=TIMEOUT_S)
    live = prefilled(model, TOKENS[:, : COUNT * BLOCK])
    assert store.save(TOKENS, live).stored == COUNT
    want = generated(model, TOKENS).sequences
    with daemon.suspended():
        began = time.monotonic()
        cache, known = store.load(TOKENS)
        assert time.monotonic() - began < TIMEOUT_S + SLACK_S
        assert known == 0 and store.health.down
        assert torch.equal(generated(model, TOKENS, cache).sequences, want)
        for _ in range(100):
            assert store.load(TOKENS)[1] == 0 == store.lookup(TOKENS)
            assert store.save(TOKENS, live) == SaveResult()
        assert store.health.counts["failed"] == 1 and store.health.counts["skipped"] == 300
    wait_for(lambda: not store.health.down, "the daemon to go on")
    assert store.load(TOKENS)[1] == COUNT * BLOCK


def test_a_daemon_that_halts_in_the_middle_of_a_load(
    model: Any,
    make_daemon: MakeDaemon,
    make_store: MakeStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lease of a halted daemon holds: what was copied is right, and in time."""
    daemon = make_daemon().start()
    store = make_store(model, daemon, timeout_s=TIMEOUT_S)
    assert store.save(TOKENS, prefilled(model, TOKENS[:, : COUNT * BLOCK])).stored == COUNT
    read = Form.read

    def halts(*args: Any) -> Any:
        daemon.signal(signal.SIGSTOP)
        return read(*args)

    monkeypatch.setattr(Form, "read", halts)
    began = time.monotonic()
    cache, known = store.load(TOKENS)
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    daemon.signal(signal.SIGCONT)
    assert known == COUNT * BLOCK
    check_rest(model, cache, known)


def test_without_a_daemon_the_model_computes(
    model: Any, make_daemon: MakeDaemon, make_store: MakeStore
) -> None:
    daemon = make_daemon()
    store = make_store(model, daemon)
    cache, known = store.load(TOKENS)
    output = generated(model, TOKENS, cache)
    assert known == 0 and torch.equal(output.sequences, generated(model, TOKENS).sequences)
    assert store.save(output.sequences, output.past_key_values) == SaveResult()
    assert "start kvstored" in store.health.down
    daemon.start()
    wait_for(lambda: not store.health.down, "the store to see the daemon")
    assert store.save(output.sequences, output.past_key_values).stored > COUNT


def test_a_full_daemon_takes_less(make_daemon: MakeDaemon, make_store: MakeStore) -> None:
    model = llama(**LARGE)
    daemon = make_daemon(dram={"size": "8 MiB", "slab_size": "1 MiB"}, nvme={"size": "0"}).start()
    store = make_store(model, daemon, timeout_s=2.0)
    tokens = prompt(90 * BLOCK + 1)  # of which memory holds 64 blocks
    live = prefilled(model, tokens)
    result = store.save(tokens, live)
    assert 0 < result.stored <= 64 and result.stored + result.refused == 90
    assert store.health.counts["refused_blocks"] == result.refused
    assert store.health.counts["failed"] == store.health.counts["defects"] == 0
    cache, known = store.load(tokens)
    assert known == result.stored * BLOCK
    live.crop(known - tokens.shape[1])
    assert same(cache, live)


def test_a_prompt_larger_than_memory_comes_from_nvme(
    make_daemon: MakeDaemon, make_store: MakeStore
) -> None:
    """It is loaded in parts: what has been copied makes room for what follows."""
    model = llama(**LARGE)
    daemon = make_daemon(dram={"size": "8 MiB", "slab_size": "1 MiB"}).start()
    store = make_store(model, daemon)
    tokens = prompt(90 * BLOCK + 1)
    live = prefilled(model, tokens)
    wait_for(lambda: not store.save(tokens, live).refused, "all blocks to be stored", 60.0)
    assert store.lookup(tokens) == 90 * BLOCK
    cache, known = store.load(tokens)
    counts = store.health.counts
    assert known == 90 * BLOCK == counts["loaded_tokens"]
    assert counts["nvme_blocks"] >= 90 - 64 and counts["nvme_blocks"] + counts["dram_blocks"] == 90
    live.crop(-1)
    assert same(cache, live)
