"""The model half of the engine: weights from a seed, prefill in chunks, greedy decoding.

It knows nothing of the store.
"""

from __future__ import annotations

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
            self.llama = LlamaForCausalLM(self.config).eval()
        torch.manual_seed(profile.seed)
        with torch.no_grad():
            for weights in self.llama.parameters():
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

    def _empty(self) -> DynamicCache:
        return DynamicCache(config=self.config)

    def _forward(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        with torch.inference_mode():
            output = self.llama(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        return output.logits[0, -1]
