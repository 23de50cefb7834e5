"""Whose blocks are whose: other weights, types or settings miss, and some models are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from kvstore.client.transformers import PrefixStore, SaveResult
from kvstore.errors import InvalidRequest
from tests.e2e.harness import Daemon
from tests.transformers_store.conftest import MakeStore
from tests.transformers_store.models import BLOCK, HEADS, SIZES, llama, prefilled, prompt, same

TOKENS = prompt(40)
ROPE = {"rope_type": "default", "rope_theta": 5_000.0}


def one_weight(model: Any) -> Any:
    """One number of one tensor is another, by the least that there is."""
    with torch.no_grad():
        weights = model.model.layers[1].mlp.down_proj.weight
        weights[3, 5] = torch.nextafter(weights[3, 5], torch.tensor(9.0))
    return model


OTHERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "all weights": lambda: (llama(seed=2), {}),
    "one weight": lambda: (one_weight(llama()), {}),
    "dtype": lambda: (llama().to(torch.bfloat16), {}),
    "block size": lambda: (llama(), {"block_tokens": 8}),
    "rope": lambda: (llama(rope_parameters=ROPE), {}),
    "epsilon": lambda: (llama(rms_norm_eps=1e-5), {}),
    "attention": lambda: (llama(attn_implementation="eager"), {}),
    "model_id": lambda: (llama(), {"model_id": "another"}),
    "named weights": lambda: (llama(), {"weights": "commit 1"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_a_miss(name: str, shared: Daemon, make_store: MakeStore) -> None:
    store = make_store(llama(), shared)
    live = prefilled(llama(), TOKENS)
    assert store.save(TOKENS, live).stored == 2
    model, options = OTHERS[name]()
    other = make_store(model, shared, **options)
    assert other.layout.fingerprint != store.layout.fingerprint
    assert other.lookup(TOKENS) == 0 == other.load(TOKENS)[1]
    assert other.save(TOKENS, prefilled(model, TOKENS)).present == 0
    live.crop(-8)
    assert same(store.load(TOKENS)[0], live), "and what it saves is no hit here"


def test_the_same_model_is_a_hit(shared: Daemon, make_store: MakeStore, tmp_path: Path) -> None:
    """Made anew, saved and read back: what is written beside the weights does not matter."""
    model = llama()
    assert make_store(model, shared).save(TOKENS, prefilled(model, TOKENS)).stored == 2
    model.save_pretrained(tmp_path)
    for again in (llama(), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert make_store(again, shared).load(TOKENS)[1] == 32


def test_named_weights_are_trusted(shared: Daemon, make_store: MakeStore) -> None:
    model = llama()
    store = make_store(model, shared, weights="commit 1")
    assert store.save(TOKENS, prefilled(model, TOKENS)).stored == 2
    assert make_store(llama(), shared, weights="commit 1").load(TOKENS)[1] == 32
    assert make_store(llama(), shared, weights="commit 2").load(TOKENS)[1] == 0


def test_weights_that_change_later_are_noticed(
    shared: Daemon, make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    store = make_store(model, shared)
    live = prefilled(model, TOKENS)
    assert store.save(TOKENS, live).stored == 2
    one_weight(model)
    for _ in range(3):
        assert store.load(TOKENS)[1] == 0 == store.lookup(TOKENS)
        assert store.save(prompt(40, 9), live) == SaveResult()
    assert store.health.counts["defects"] == 9 and not store.health.down
    assert len([one for one in caplog.records if "make another" in one.getMessage()]) == 1
    assert make_store(llama(), shared).load(TOKENS)[1] == 32


def test_a_model_in_training_is_not_used(shared: Daemon, make_store: MakeStore) -> None:
    """Its dropout makes other keys each time."""
    model = llama()
    store = make_store(model, shared)
    live = prefilled(model, TOKENS)
    model.train()
    assert store.save(TOKENS, live) == SaveResult() and store.load(TOKENS)[1] == 0
    model.eval()
    assert store.save(TOKENS, live) == SaveResult(stored=2)


def test_what_is_not_one_prompt_of_this_model_is_not_saved(
    shared: Daemon, make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    store = make_store(model, shared)
    live = prefilled(model, TOKENS)
    for tokens, cache in (
        (TOKENS, prefilled(model, TOKENS.repeat(2, 1))),  # two prompts
        (TOKENS.repeat(2, 1), live),
        (TOKENS, prefilled(llama(num_hidden_layers=2), TOKENS)),
        (TOKENS, prefilled(llama(head_dim=32), TOKENS)),
        (TOKENS, prefilled(llama().to(torch.bfloat16), TOKENS)),
        (TOKENS, StaticCache(config=model.config, max_cache_len=64)),
        (TOKENS, None),
        (TOKENS.float(), live),
        (-TOKENS - 1, live),
        ("text", live),
    ):
        before = store.health.counts["defects"]
        assert store.save(tokens, cache) == SaveResult()
        assert store.health.counts["defects"] == before + 1
    assert store.lookup(TOKENS) == 0 and not store.health.down
    assert (
        "save one prompt at a time" in caplog.text
        and "give the model a DynamicCache" in caplog.text
    )
    assert store.load([])[1] == 0 == store.load("text")[1] == store.load(TOKENS.float())[1]
    assert store.save(TOKENS, live).stored == 2


def mistral(**changes: Any) -> Any:
    return MistralForCausalLM(MistralConfig(**SIZES, **HEADS, **changes))


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def llava() -> Any:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 8,
    }
    text = {"model_type": "llama", **SIZES, **HEADS}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def dynamic(kind: str) -> Any:
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0}
    rope |= {"original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    return llama(rope_parameters=rope, max_position_embeddings=128)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sliding window": (lambda: mistral(sliding_window=32), "DynamicSlidingWindowLayer"),
    "states": (lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)), "LinearAttention"),
    "encoder": (t5, "encoder"),
    "images": (llava, "images"),
    "dynamic rope": (lambda: dynamic("dynamic"), "change with the length"),
    "longrope": (lambda: dynamic("longrope"), "change with the length"),
    "configuration": (lambda: llama().config, "not a configuration"),
    "meta": (lambda: llama().to("meta"), "one token|cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name: str, tmp_path: Path) -> None:
    make, says = REFUSED[name]
    with pytest.raises(InvalidRequest, match=f"cannot be used with a PrefixStore: .*({says})"):
        PrefixStore(make(), path=tmp_path / "kvstore.sock")


def test_a_full_window_is_no_reason(shared: Daemon, make_store: MakeStore) -> None:
    model = mistral(sliding_window=None).eval()
    store = make_store(model, shared)
    assert store.save(TOKENS, prefilled(model, TOKENS)).stored == 2
    assert store.load(TOKENS)[1] == 32


@pytest.mark.parametrize(
    "options", [{"block_tokens": 0}, {"timeout_s": 0}, {"model_id": "x" * 600}]
)
def test_settings_that_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        PrefixStore(llama(), path=tmp_path / "kvstore.sock", **options)


def test_the_layout_names_what_a_block_is(shared: Daemon, make_store: MakeStore) -> None:
    layout = make_store(llama(), shared, model_id="tiny").layout
    assert layout.model.startswith("tiny@sha256:") and layout.engine == "transformers-5.23/kv1"
    assert (layout.dtype, layout.block_tokens, layout.shards) == ("float32", BLOCK, 1)
    assert layout.shard_bytes == 2 * 3 * 2 * BLOCK * 16 * 4  # halves, layers, heads, tokens, dims
