"""What is loaded is what was saved, bit for bit, and the model goes on as if it had computed it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvstore.client.transformers import PrefixStore, SaveResult
from tests.e2e.harness import Daemon
from tests.transformers_store.conftest import MakeStore
from tests.transformers_store.models import (
    BLOCK,
    MODELS,
    NEW,
    VOCAB,
    forward,
    generated,
    llama,
    prefilled,
    prompt,
    same,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture
def store(model: Any, shared: Daemon, make_store: MakeStore) -> PrefixStore:
    return make_store(model, shared)


def steps(model: Any, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of these tokens and of a few more, each the likeliest after those before it."""
    rows = [forward(model, tokens, cache)]
    for _ in range(4):
        rows.append(forward(model, rows[-1][-1:].argmax(-1)[None], cache))
    return torch.cat(rows)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_are_bitwise_equal(
    name: str, dtype: torch.dtype, shared: Daemon, make_store: MakeStore
) -> None:
    """The control has computed the same chunks: whole blocks first, then the rest."""
    model = MODELS[name]().to(dtype)
    tokens = prompt(6 * BLOCK + 5)
    whole = tokens[:, : 6 * BLOCK]
    live = prefilled(model, whole)
    with make_store(model, shared) as store:
        assert store.save(tokens, live) == SaveResult(stored=6)
    with make_store(model, shared) as store:  # another engine, perhaps in another process
        loaded, known = store.load(tokens)
    assert known == 6 * BLOCK == loaded.get_seq_length()
    assert same(loaded, live)
    control = steps(model, tokens[:, known:], live)
    assert torch.equal(steps(model, tokens[:, known:], loaded), control)
    damaged, _ = make_store(model, shared).load(tokens)
    damaged.layers[1].values[:, :, BLOCK + 3].zero_()
    assert not torch.equal(steps(model, tokens[:, known:], damaged), control), "cannot fail"


@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 33, 100])
def test_whole_blocks_and_at_least_one_token_left(
    count: int, model: Any, store: PrefixStore
) -> None:
    tokens = prompt(count)
    live = prefilled(model, tokens)
    assert store.save(tokens, live) == SaveResult(stored=count // BLOCK)
    assert store.lookup(tokens) == count // BLOCK * BLOCK
    cache, known = store.load(tokens)
    assert known == (count - 1) // BLOCK * BLOCK == cache.get_seq_length()
    if known:
        live.crop(known - count)
        assert same(cache, live)


def test_generate_gives_the_same_tokens(model: Any, store: PrefixStore) -> None:
    """With tokens that look like padding, as the prompt has every number."""
    tokens = torch.cat([prompt(70), torch.zeros(1, 3, dtype=torch.long), prompt(9, 8)], dim=1)
    want = generated(model, tokens).sequences
    cache, known = store.load(tokens)
    assert known == 0
    first = generated(model, tokens, cache)
    assert torch.equal(first.sequences, want)
    assert store.save(first.sequences, first.past_key_values).stored == (82 + NEW - 1) // BLOCK
    cache, known = store.load(tokens)
    assert known == 80
    assert torch.equal(generated(model, tokens, cache).sequences, want)


def test_a_conversation_grows_and_nothing_is_stored_twice(model: Any, store: PrefixStore) -> None:
    turn, stored = prompt(50), 0
    for number in range(3):
        cache, known = store.load(turn)
        assert known == stored * BLOCK, "all that there is of it"
        output = generated(model, turn, cache)
        assert torch.equal(output.sequences, generated(model, turn).sequences)
        blocks = (output.sequences.shape[1] - 1) // BLOCK
        result = store.save(output.sequences, output.past_key_values)
        assert result == SaveResult(stored=blocks - stored, present=stored)
        stored = blocks
        turn = torch.cat([output.sequences, prompt(20, 30 + number)], dim=1)
    assert store.health.counts["stored_blocks"] == stored


def test_prompts_share_what_they_begin_with_and_nothing_else(
    model: Any, store: PrefixStore
) -> None:
    """The third block of both has the same tokens; what is before it differs."""
    system, same_tokens = prompt(32), prompt(16, 9)
    one = torch.cat([system, prompt(16, 10), same_tokens, prompt(5, 11)], dim=1)
    other = torch.cat([system, prompt(16, 12), same_tokens, prompt(5, 11)], dim=1)
    live = prefilled(model, one)
    assert store.save(one, live).stored == 4
    cache, known = store.load(other)
    assert known == 32
    want = forward(model, other[:, 32:], prefilled(model, other[:, :32]))
    got = forward(model, other[:, 32:], cache)
    # The live cache was computed in another split, which changes the last bits.
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    assert store.save(other, prefilled(model, other)) == SaveResult(stored=2, present=2)


def test_places_that_are_not_next_to_each_other(
    model: Any, shared: Daemon, store: PrefixStore
) -> None:
    """Prompts that grow in turns, and one whose middle is stored last."""
    many = [prompt(8 * BLOCK + 1, 40 + number) for number in range(3)]
    live = [prefilled(model, tokens) for tokens in many]
    for blocks in (1, 2, 4, 5, 8):
        for tokens, cache in zip(many, live, strict=True):
            store.save(tokens[:, : blocks * BLOCK], cache)
    grant = store._cache.acquire(_hashes(many[0]))
    offsets = [extent.offset for extent in grant.extents]
    assert grant.release()
    gaps = {after - before for before, after in itertools.pairwise(offsets)}
    assert len(offsets) == 8 and len(gaps) > 1, "the places are in a row: nothing was tried"
    for tokens, cache in zip(many, live, strict=True):
        loaded, known = store.load(tokens)
        assert known == 8 * BLOCK
        cache.crop(-1)
        assert same(loaded, cache)
    store._cache.forget(_hashes(many[0])[3:4])
    assert store.load(many[0])[1] == 3 * BLOCK
    again = prefilled(model, many[0])
    assert store.save(many[0], again) == SaveResult(stored=1, present=7)
    loaded, known = store.load(many[0])
    again.crop(-1)
    assert known == 8 * BLOCK and same(loaded, again)


def _hashes(tokens: torch.Tensor) -> list[bytes]:
    from kvstore.client.transformers_blocks import chain, prompt_tokens

    return chain(prompt_tokens(tokens), BLOCK, b"")


def test_a_salt_is_another_prefix(model: Any, store: PrefixStore) -> None:
    tokens = prompt(40)
    live = prefilled(model, tokens)
    assert store.save(tokens, live, salt=b"a picture").stored == 2
    assert store.load(tokens)[1] == 0 == store.load(tokens, salt=b"another")[1]
    assert store.lookup(tokens, salt=b"a picture") == 32
    assert store.load(tokens, salt=b"a picture")[1] == 32


@pytest.mark.parametrize("form", ["list", "row", "numpy", "int32"])
def test_tokens_in_other_forms(form: str, model: Any, store: PrefixStore) -> None:
    tokens = prompt(40)
    given: Any = {
        "list": tokens[0].tolist(),
        "row": tokens[0],
        "numpy": tokens.numpy(),
        "int32": tokens.to(torch.int32),
    }[form]
    assert store.save(given, prefilled(model, tokens)).stored == 2
    assert store.load(given)[1] == store.load(tokens)[1] == 32


def test_a_cache_that_is_shorter_or_longer_than_its_tokens(model: Any, store: PrefixStore) -> None:
    tokens = prompt(100)
    live = prefilled(model, tokens[:, :50])
    assert store.save(tokens, live) == SaveResult(stored=3)
    live = prefilled(model, tokens)
    assert store.save(tokens[:, :70], live) == SaveResult(stored=1, present=3)
    assert store.save(tokens, DynamicCache(config=model.config)) == SaveResult()
    assert store.load(tokens)[1] == 64


def test_what_is_loaded_stays_as_it_is(model: Any, shared: Daemon, store: PrefixStore) -> None:
    """It is a copy: the store may be closed, and the blocks may leave."""
    tokens = prompt(40)
    live = prefilled(model, tokens)
    store.save(tokens, live)
    cache, known = store.load(tokens)
    store._cache.forget(_hashes(tokens))
    other = prompt(40, 50)
    store.save(other, prefilled(model, other))
    live.crop(known - 40)
    assert same(cache, live)
    store.close()
    assert same(cache, live)


def test_vocabulary_is_all_used() -> None:
    """Else a prompt would have no token that looks like padding."""
    assert set(prompt(3_000)[0].tolist()) == set(range(VOCAB))
