"""The model half of the engine: weights from a seed, prefill in chunks, its cache as blocks.

It knows nothing of the store. A block's bytes are, in C order and float32:

    [layer][0 keys, 1 values][kv head][token of the block][head dim]
"""

from __future__ import annotations

import hashlib

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from tests.demo.profile import Profile


class Model:
    """A Llama on the CPU. The same profile and thread count give the same bits in every process."""

    def __init__(self, profile: Profile, *, threads: int) -> None:
        torch.set_num_threads(threads)
        self.profile = profile
        self.config = LlamaConfig(
            hidden_size=profile.hidden,
            intermediate_size=profile.intermediate,
            num_hidden_layers=profile.layers,
            num_attention_heads=profile.heads,
            num_key_value_heads=profile.kv_heads,
            head_dim=profile.head_dim,
            vocab_size=profile.vocab,
            max_position_embeddings=2 * profile.prompt_tokens,
            attn_implementation="sdpa",
        )
        with no_init_weights():  # they are drawn once, below, and not twice
            self._llama = LlamaForCausalLM(self.config).eval()
        torch.manual_seed(profile.seed)
        with torch.no_grad():
            for weights in self._llama.parameters():
                if weights.dim() > 1:
                    weights.normal_(0.0, profile.hidden**-0.5)
                else:
                    weights.fill_(1.0)
        self.prompt = torch.randint(0, profile.vocab, (1, profile.prompt_tokens))
        self._forward(
            self.prompt[:, : profile.block_tokens], self._empty()
        )  # warms up, kept nowhere

    def prefill(self, cache: DynamicCache | None = None) -> tuple[torch.Tensor, DynamicCache]:
        """The logits after the prompt and its cache; computes what `cache` does not yet hold.

        The split is fixed: chunks up to the last whole block, then the tail. A cache that ends with
        the last whole block therefore leaves exactly the last step of a cold prefill to do.
        """
        profile = self.profile
        cache = self._empty() if cache is None else cache
        start, logits = cache.get_seq_length(), None
        while start < profile.prompt_tokens:
            end = start + profile.chunk_tokens
            if start < profile.prefix_tokens:
                end = min(end, profile.prefix_tokens)
            logits = self._forward(self.prompt[:, start:end], cache)
            start = end
        assert logits is not None, "the tail is never in the cache"
        return logits, cache

    def greedy(self, logits: torch.Tensor, cache: DynamicCache) -> tuple[list[int], torch.Tensor]:
        """The next tokens, and the logits that each was chosen from, `logits` first."""
        rows, tokens = [logits], [int(logits.argmax())]
        for _ in range(self.profile.greedy_steps):
            rows.append(self._forward(torch.tensor([[tokens[-1]]]), cache))
            tokens.append(int(rows[-1].argmax()))
        return tokens, torch.stack(rows)

    def hashes(self) -> list[bytes]:
        """The hash of each whole block of the prompt, chained over all before it."""
        step, found, before = self.profile.block_tokens, [], b""
        for start in range(0, self.profile.prefix_tokens, step):
            tokens = self.prompt[0, start : start + step].to(torch.int32).numpy().astype("<i4")
            before = hashlib.sha256(before + tokens.tobytes()).digest()
            found.append(before)
        return found

    def pool(self) -> torch.Tensor:
        """Memory for all blocks of the prompt, touched, as engines keep it from their start."""
        one = self.profile
        return torch.zeros(
            one.block_count, one.layers, 2, one.kv_heads, one.block_tokens, one.head_dim
        )

    def fill(self, pool: torch.Tensor, cache: DynamicCache) -> None:
        """Copies the whole blocks of the cache into the pool."""
        one = self.profile
        with torch.inference_mode():
            for number, layer in enumerate(cache.layers):
                for half, states in enumerate((layer.keys, layer.values)):
                    whole = states[0, :, : one.prefix_tokens]
                    parts = whole.unflatten(1, (one.block_count, one.block_tokens))
                    pool[:, number, half].copy_(parts.transpose(0, 1))

    def cache_of(self, pool: torch.Tensor, length: int) -> DynamicCache:
        """A new cache that holds the first `length` blocks of the pool."""
        if not length:
            return self._empty()
        with torch.inference_mode():
            # [block, head, token, dim] -> [1, head, block * token, dim]; a layer at a time, so that
            # the memory of one layer's copies serves the next.
            layers = (
                tuple(
                    pool[:length, layer, half].transpose(0, 1).flatten(1, 2)[None]
                    for half in (0, 1)
                )
                for layer in range(self.profile.layers)
            )
            return DynamicCache(ddp_cache_data=layers, config=self.config)

    def _empty(self) -> DynamicCache:
        return DynamicCache(config=self.config)

    def _forward(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        with torch.inference_mode():
            output = self._llama(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        return output.logits[0, -1]
