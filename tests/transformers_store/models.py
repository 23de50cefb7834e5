"""Tiny models of random weights, prompts, and what a model computes with or without a cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 211
BLOCK = 16
NEW = 12  # tokens that are generated
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": VOCAB}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def llama(seed: int = 1, **changes: Any) -> Any:
    """A Llama whose weights come from the seed."""
    return seeded(LlamaForCausalLM, LlamaConfig(**{**SIZES, **HEADS, **changes}), seed)


def qwen3() -> Any:
    """Keys are normed before they are cached."""
    return seeded(Qwen3ForCausalLM, Qwen3Config(**SIZES, **HEADS), 2)


def gpt2() -> Any:
    """Positions are learned, and not rotary."""
    return seeded(GPT2LMHeadModel, GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4), 3)


def deepseek() -> Any:
    """Latent attention: keys and values of different sizes."""
    config = DeepseekV3Config(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=4,
        first_k_dense_replace=3,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
    )
    return seeded(DeepseekV3ForCausalLM, config, 4)


MODELS = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2, "deepseek": deepseek}


def seeded(kind: Any, config: Any, seed: int) -> Any:
    """Weights large enough for greedy decoding not to repeat one token."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0.0, 0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(count: int, seed: int = 7) -> torch.Tensor:
    """Token numbers, [1, count]; a longer one of the same seed begins with the shorter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randint(0, VOCAB, (1,), generator=generator) for _ in range(count)], dim=1
    )


def forward(model: Any, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """The logits of these tokens, [tokens, vocabulary]; the cache grows by them."""
    with torch.inference_mode():
        return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[0]


def prefilled(model: Any, tokens: torch.Tensor) -> Any:
    """A cache of these tokens, computed at once."""
    cache = DynamicCache(config=model.config)
    forward(model, tokens, cache)
    return cache


def generated(model: Any, tokens: torch.Tensor, cache: Any = None, **options: Any) -> Any:
    """What `generate` gives: `sequences` and `past_key_values`."""
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )


def same(one: Any, other: Any) -> bool:
    """Whether two caches are bitwise equal."""
    return len(one.layers) == len(other.layers) and all(
        torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        for a, b in zip(one.layers, other.layers, strict=True)
    )
