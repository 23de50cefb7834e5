"""The time to the first token of a Llama-shaped model: computed from nothing, and with the KV cache
of the prompt reloaded. The weights are random: neither speed nor equality depends on them."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from kvstore.client import Cache, Client, Layout
from kvstore.client.cuda import Copier, Fragments
from kvstore.errors import InternalError

TOKENS = 16  # of a block
BYTES = 2  # of a number: bfloat16


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a prompt."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    prefix_tokens: int
    device: str

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.hidden // self.heads

    @property
    def fragment_bytes(self) -> int:
        """Keys, or values, of one layer of a block."""
        return TOKENS * self.kv_heads * self.head_dim * BYTES

    @property
    def blocks(self) -> int:
        """Of the prefix."""
        return self.prefix_tokens // TOKENS


LLAMA_8B = Shape(4096, 14_336, 32, 32, 8, 128_256, 16_384, "cuda")
TINY = Shape(64, 128, 2, 4, 2, 256, 128, "cpu")


class Engine:
    """A model with a paged KV cache: for each layer, keys and values of every block in one array.

    Raises ImportError where torch or transformers are missing.
    """

    def __init__(self, shape: Shape, copier: Copier, stream: int) -> None:
        import torch
        from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
        from transformers.initialization import no_init_weights

        self._torch: Any = torch
        self._cache_class: Any = DynamicCache
        self._copier = copier
        self._stream = stream
        self.shape = shape
        self.config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            vocab_size=shape.vocab,
            max_position_embeddings=2 * shape.prefix_tokens,
            attn_implementation="sdpa",
        )
        torch.manual_seed(1)
        with no_init_weights(), torch.device(shape.device):
            self.model = LlamaForCausalLM(self.config).to(torch.bfloat16).eval()
            with torch.no_grad():
                for weights in self.model.parameters():
                    if weights.dim() > 1:
                        weights.normal_(0.0, shape.hidden**-0.5)
                    else:
                        weights.fill_(1.0)
            self.prompt = torch.randint(0, shape.vocab, (1, shape.prefix_tokens + TOKENS))
            rows = (2 * shape.layers, shape.blocks, TOKENS, shape.kv_heads, shape.head_dim)
            self.pages = torch.zeros(rows, dtype=torch.bfloat16)

    @property
    def layout(self) -> Layout:
        """Of a block: all layers, keys and values."""
        return Layout(
            model="llama-shaped",
            engine="bench/1",
            dtype="bfloat16",
            block_tokens=TOKENS,
            shards=1,
            shard_bytes=2 * self.shape.layers * self.shape.fragment_bytes,
        )

    def cold(self) -> tuple[float, int]:
        """Seconds to the first token with nothing stored, and the token. Fills the pages."""
        self._wait()
        began = time.perf_counter()
        cache = self._cache_class(config=self.config)
        self._forward(self.prompt[:, : self.shape.prefix_tokens], cache)
        token = int(self._forward(self.prompt[:, self.shape.prefix_tokens :], cache))
        seconds = time.perf_counter() - began
        for at, layer in enumerate(cache.layers):
            for which, states in enumerate((layer.keys, layer.values)):
                prefix = states[0, :, : self.shape.prefix_tokens].transpose(0, 1)
                self.pages[2 * at + which] = prefix.reshape(self.pages.shape[1:])
        return seconds, token

    def store(self, cache: Cache, hashes: list[bytes]) -> None:
        """Put all pages."""
        with cache.reserve(hashes, deadline_s=30.0) as reservation:
            offsets = [one.offset for one in reservation.extents]
            if len(offsets) != len(hashes) or not self._copier.store(
                reservation,
                self._fragments(offsets),
                deadline=time.monotonic() + 30,
                streams=[self._stream],
            ):
                raise InternalError("the pages could not be stored")

    def reloaded(self, cache: Cache, hashes: list[bytes]) -> tuple[float, float, int]:
        """Seconds to the first token, those of the reload among them, and the token."""
        self.pages.zero_()
        self._wait()
        began = time.perf_counter()
        grant = cache.acquire(hashes, deadline_s=60.0)
        if grant.length != len(hashes) or not self._copier.load(
            grant,
            self._fragments(list(grant.places.offsets)),
            deadline=time.monotonic() + 30,
            streams=[self._stream],
        ):
            raise InternalError(f"{grant.length} of {len(hashes)} blocks: {grant.stop}")
        reload_s = time.perf_counter() - began
        states = self.pages.reshape(
            self.shape.layers, 2, 1, self.shape.prefix_tokens, self.shape.kv_heads, -1
        ).transpose(3, 4)
        known = self._cache_class(
            ddp_cache_data=[(layer[0], layer[1]) for layer in states], config=self.config
        )
        token = int(self._forward(self.prompt[:, self.shape.prefix_tokens :], known))
        return time.perf_counter() - began, reload_s, token

    def _fragments(self, offsets: list[int]) -> Fragments:
        rows = np.arange(len(offsets), dtype=np.int64)[:, None]
        columns = np.arange(2 * self.shape.layers, dtype=np.int64)
        size = self.shape.fragment_bytes
        addresses = self.pages.data_ptr() + (columns * self.shape.blocks + rows) * size
        return Fragments.of_blocks(0, offsets, addresses, [size] * len(columns), 0)

    def _forward(self, tokens: Any, cache: Any) -> Any:
        with self._torch.inference_mode():
            output = self.model(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        return output.logits[0, -1].argmax()

    def _wait(self) -> None:
        if self.shape.device == "cuda":
            self._torch.cuda.synchronize()


def open_cache(client: Client, engine: Engine) -> Cache:
    """The cache of an engine's blocks."""
    return client.open(engine.layout)
