"""Prefixes for plain `generate` of transformers: saved by their tokens, then loaded, not computed.

This module and transformers_blocks are the only ones of the client that import torch and
transformers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvstore.client.cache import GRACE_S, Cache
from kvstore.client.guard import TIMEOUT_S, Guard
from kvstore.client.transformers_blocks import FORMAT, Form, Halves, chain, join, prompt_tokens
from kvstore.errors import InvalidRequest
from kvstore.types import Layout

HASH_THREADS = 8  # for the digest of the weights
# What a configuration says beside what the model computes; the rest decides what blocks are.
_ASIDE = re.compile(
    "_name_or_path|architectures|(bos|eos|pad)_token_id|chunk_size_feed_forward|dtype|torch_dtype|"
    "id2label|label2id|initializer_range|output_(attentions|hidden_states)|problem_type|"
    "return_dict|transformers_version|use_cache"
)


@dataclasses.dataclass(frozen=True)
class SaveResult:
    """Blocks that a save stored, that were there already, and that found no room. All are 0 where
    the store could not be asked: see `PrefixStore.health`."""

    stored: int = 0
    present: int = 0
    refused: int = 0


@dataclasses.dataclass(frozen=True)
class Health:
    """How a store fares.

    down    why no daemon is asked at present; empty while one is
    counts  since the store was made: `failed`, `skipped` and `defects` of calls, see Guard;
            `asked_tokens` and `loaded_tokens` of loads; blocks that were loaded, by tier
            (`dram_blocks`, `nvme_blocks`), and that were `stored_blocks`, `present_blocks`,
            `refused_blocks` in saves; `discarded` leases that did not last as long as the copy
    """

    down: str
    counts: Mapping[str, int]


class PrefixStore:
    """The prefixes of one model. Every method may be called from any thread.

    model         a causal language model, on any device, whose weights stay as they are
    model_id      a name for people; blocks of one id are not found under another
    weights       what tells these weights from others, for example the commit of a checkpoint;
                  None: a sha256 over all parameters and buffers, every byte, is taken here
    block_tokens  tokens of a block: what is shared, saved and loaded is whole blocks
    path, tenant  the socket, or whose, as in `connect`; the daemon may come later, or go
    timeout_s     the longest that a call waits for the store, all in all; copying comes on top
    prefill_tokens_per_s  the model's own speed: what would take longer to load is left out

    Raises InvalidRequest for a model whose prefixes cannot be stored: encoder and decoder, images
    or sound, a cache that is not of full attention in every layer, rotary embeddings that change
    with the length, adapters. One token is computed to see what the cache of the model looks like.
    """

    def __init__(
        self,
        model: Any,
        *,
        model_id: str | None = None,
        weights: str | None = None,
        block_tokens: int = 16,
        path: str | os.PathLike[str] | None = None,
        tenant: str = "default",
        timeout_s: float = TIMEOUT_S,
        prefill_tokens_per_s: float | None = None,
    ) -> None:
        _check_model(model)
        self._model = model
        self._config = model.config
        self._form, self._devices = _form(model, block_tokens)
        self.layout = _layout(model, self._form, model_id, weights)
        self._stamp = _stamp(model)
        self._tokens_per_s = prefill_tokens_per_s
        # A load or a save is one call that may wait, and one that ends it.
        self._guard = Guard(path, tenant, timeout_s=timeout_s / 2)
        self._wait_s = max(0.0, timeout_s / 2 - GRACE_S)
        self._cache = Cache(self._guard.client, self.layout)

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, token_ids: Any, cache: Any, *, salt: bytes = b"") -> SaveResult:
        """Store the whole blocks that `cache` holds of a prompt, where they are not stored yet.

        token_ids  the tokens of which the cache was computed, from the first on, without padding:
                   a list, or integers of the shape [tokens] or [1, tokens]; there may be more of
                   them than the cache holds, and fewer
        cache      the DynamicCache that the model filled; it is only read
        salt       what else decides the content, if anything does: equal tokens with another salt
                   are another prefix

        Never raises, for whatever reason.
        """
        return self._guard.ask(lambda: self._save(token_ids, cache, salt), SaveResult())

    def load(self, token_ids: Any, *, salt: bytes = b"") -> tuple[DynamicCache, int]:
        """A new cache with the longest prefix that is stored, and how many tokens it holds.

        At least the last token is left to compute, as it gives the logits. On a miss, for whatever
        reason, the cache is empty and the number 0. Arguments as in `save`.
        """
        nothing: list[bytes] = []
        hashes = self._guard.ask(lambda: self._asked(token_ids, salt), nothing)
        parts: list[Halves] = []
        late: tuple[Halves | None, str] = None, "late"
        done, until = 0, time.monotonic() + self._wait_s
        while done < len(hashes):
            rest = hashes[done:]
            wait_s = max(0.0, until - time.monotonic())
            part, stop = self._guard.ask(lambda: self._fetch(rest, wait_s), late)  # noqa: B023
            if part is None:
                break
            parts.append(part)
            done += part[0].shape[2]
            if stop != "no_room":  # else memory is too small for all of them at once
                break
        cache = self._guard.ask(lambda: self._filled(parts), None) if parts else None
        if cache is None:
            return DynamicCache(config=self._config), 0
        tokens = done * self._form.tokens
        self._guard.count("loaded_tokens", tokens)
        return cache, tokens

    def lookup(self, token_ids: Any, *, salt: bytes = b"") -> int:
        """How many leading tokens are stored, in whole blocks. Changes nothing; never raises."""
        return self._guard.ask(lambda: self._lookup(token_ids, salt), 0)

    @property
    def health(self) -> Health:
        """How the store fares: for the metrics of the program that uses it."""
        return Health(self._guard.down, MappingProxyType(dict(self._guard.counts)))

    def close(self) -> None:
        """End the connection. Loads are misses after this, and nothing is saved."""
        self._guard.close()

    # -- inside --------------------------------------------------------------------------------

    def _save(self, token_ids: Any, cache: Any, salt: bytes) -> SaveResult:
        self._check_unchanged()
        layers, length = _check_cache(cache, self._form)
        tokens = prompt_tokens(token_ids)[:length]
        hashes = chain(tokens, self._form.tokens, salt)
        if not hashes:
            return SaveResult()
        with self._cache.reserve(hashes, deadline_s=self._wait_s) as reservation:
            if len(reservation):
                self._form.write(reservation._places, reservation.indices, layers)
            stored = reservation.commit()
        for name, blocks in (
            ("stored_blocks", stored),
            ("present_blocks", reservation.present),
            ("refused_blocks", reservation.refused),
        ):
            self._guard.count(name, blocks)
        return SaveResult(stored, reservation.present, reservation.refused)

    def _asked(self, token_ids: Any, salt: bytes) -> list[bytes]:
        """The hashes that a load asks for."""
        self._check_unchanged()
        tokens = prompt_tokens(token_ids)
        self._guard.count("asked_tokens", len(tokens))
        return chain(tokens[:-1], self._form.tokens, salt)

    def _lookup(self, token_ids: Any, salt: bytes) -> int:
        self._check_unchanged()
        hashes = chain(prompt_tokens(token_ids), self._form.tokens, salt)
        return self._cache.lookup(hashes).length * self._form.tokens

    def _fetch(self, hashes: Sequence[bytes], wait_s: float) -> tuple[Halves | None, str]:
        """A copy of what can be read now or soon, and why it is no more. Nothing, unless the lease
        lasted until the copy was made."""
        with self._cache.acquire(
            hashes, deadline_s=wait_s, prefill_tokens_per_s=self._tokens_per_s
        ) as grant:
            if not grant.length:
                return None, grant.stop
            halves = self._form.read(grant.places)
            if not grant.release():
                self._guard.count("discarded")
                return None, "lost"
        for tier, blocks in grant.tiers.items():
            self._guard.count(f"{tier}_blocks", blocks)
        return halves, grant.stop

    def _filled(self, parts: Sequence[Halves]) -> DynamicCache:
        """A cache that holds these blocks; each part has [layer, kv head, block, token, dim]."""
        cache = DynamicCache(config=self._config)
        for number, (layer, device) in enumerate(zip(cache.layers, self._devices, strict=True)):
            keys, values = (
                join([part[half][number].flatten(1, 2)[None] for part in parts]).to(device)
                for half in (0, 1)
            )
            # `update` would copy them once more.
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache

    def _check_unchanged(self) -> None:
        if self._model.training:
            raise InvalidRequest("the model is in training: call model.eval()")
        if _stamp(self._model) != self._stamp:
            raise InvalidRequest(
                "the weights of the model have changed or moved since the PrefixStore was made: "
                "make another"
            )


# -- the model ---------------------------------------------------------------------------------


def _refuse(model: Any, why: str) -> InvalidRequest:
    return InvalidRequest(f"{type(model).__name__} cannot be used with a PrefixStore: {why}")


def _check_model(model: Any) -> None:
    """What can be told from the configuration."""
    if not isinstance(model, transformers.PreTrainedModel):
        raise _refuse(model, "give a transformers model, not a configuration or a wrapper")
    config = model.config
    if config.is_encoder_decoder:
        raise _refuse(model, "its cache depends on what the encoder saw, not on tokens alone")
    if config.get_text_config(decoder=True) is not config:
        raise _refuse(model, "its cache depends on images or sound, not on tokens alone")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _refuse(model, "its adapters can be switched: merge them into the weights")
    ropes = [getattr(config, "rope_parameters", None) or {}]
    ropes += [one for one in ropes[0].values() if isinstance(one, dict)]
    for rope in ropes:
        kind = str(rope.get("rope_type", "default"))
        if "dynamic" in kind or kind == "longrope":
            raise _refuse(model, f"its rotary embeddings ({kind}) change with the length")


def _form(model: Any, block_tokens: int) -> tuple[Form, list[torch.device]]:
    """The shape of blocks, and on which device each layer's cache is, as one token shows."""
    if not isinstance(block_tokens, int) or block_tokens < 1:
        raise InvalidRequest(f"block_tokens is {block_tokens!r}: give an integer of 1 or more")
    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        if type(layer) is not DynamicLayer:
            raise _refuse(model, f"its cache has a {type(layer).__name__}, not full attention")
    device = model.get_input_embeddings().weight.device
    try:
        with torch.inference_mode():
            token = torch.zeros(1, 1, dtype=torch.long, device=device)
            model(input_ids=token, past_key_values=cache, use_cache=True)
        shapes = {
            (tuple(one.keys.shape), tuple(one.values.shape), one.keys.dtype, one.values.dtype)
            for one in cache.layers
        }
    except Exception as error:
        raise _refuse(model, f"it did not compute one token: {error!r}") from error
    if len(shapes) != 1:
        raise _refuse(
            model, f"its layers have caches of different shapes: {sorted(map(str, shapes))}"
        )
    ((key, value, dtype, other),) = shapes
    if dtype != other or (key[0], key[2], value[0], value[2]) != (1, 1, 1, 1):
        raise _refuse(model, f"its cache of one token has keys {key}, values {value}")
    devices = [layer.keys.device for layer in cache.layers]
    return (
        Form(len(devices), (key[1], key[3]), (value[1], value[3]), block_tokens, dtype),
        devices,
    )


def _check_cache(cache: Any, form: Form) -> tuple[list[Halves], int]:
    """The layers of a cache, [kv head, token, dim] each, and for how many tokens. Raises
    InvalidRequest where it is not what `load` would give."""
    layers = list(getattr(cache, "layers", ()))
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        raise InvalidRequest(f"cannot save a {type(cache).__name__}: give the model a DynamicCache")
    length = layers[0].get_seq_length()
    if not length:
        return [], 0
    want = ((1, form.key[0], length, form.key[1]), (1, form.value[0], length, form.value[1]))
    for layer in layers:
        seen = (tuple(layer.keys.shape), tuple(layer.values.shape))
        if seen != want or {layer.keys.dtype, layer.values.dtype} != {form.dtype}:
            raise InvalidRequest(
                f"cannot save a cache of {seen}, {layer.keys.dtype}: the model's is {want}, "
                f"{form.dtype}; save one prompt at a time"
            )
    if len(layers) != form.layers:
        raise InvalidRequest(f"cannot save {len(layers)} layers: the model has {form.layers}")
    return [(layer.keys[0], layer.values[0]) for layer in layers], length


def _layout(model: Any, form: Form, model_id: str | None, weights: str | None) -> Layout:
    """What makes two blocks interchangeable: all that decides what the model computes."""
    config = {
        name: one for name, one in model.config.to_dict().items() if not _ASIDE.fullmatch(name)
    }
    decides = {
        "weights": _digest(model) if weights is None else f"named {weights}",
        "config": config,
        "attention": model.config._attn_implementation,
        "form": (form.layers, form.key, form.value),
    }
    text = json.dumps(decides, sort_keys=True, default=str)
    release = ".".join(transformers.__version__.split(".")[:2])
    return Layout(
        model=f"{model_id or model.config.model_type}@sha256:{_sha256(text.encode())}",
        engine=f"transformers-{release}/kv{FORMAT}",
        dtype=str(form.dtype).removeprefix("torch."),
        block_tokens=form.tokens,
        shard_bytes=form.block_bytes,
    )


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(model: Any) -> str:
    """A sha256 over all parameters and buffers: names, shapes, types, and every byte."""
    named = [*model.named_parameters(), *model.named_buffers()]

    def one(item: tuple[str, torch.Tensor]) -> str:
        name, tensor = item
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{name} {tuple(tensor.shape)} {tensor.dtype} {_sha256(data)}"

    try:
        with ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1)) as threads:
            lines = sorted(threads.map(one, named))
    except Exception as error:
        raise _refuse(model, f"its weights cannot be read ({error!r}): give weights=") from error
    return _sha256("\n".join(lines).encode())


def _stamp(model: Any) -> list[tuple[int, int]]:
    """Differs after weights were changed in place, replaced or moved."""
    found = []
    for weights in model.parameters():
        version = 0
        with contextlib.suppress(RuntimeError):  # an inference tensor has none
            version = weights._version
        found.append((weights.data_ptr(), version))
    return found
