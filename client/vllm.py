"""The vLLM connector: KV cache blocks of vLLM engines in the store.

    vllm serve MODEL --prefix-caching-hash-algo sha256_cbor --kv-transfer-config '{
        "kv_connector": "KVStoreConnector", "kv_connector_module_path": "kvstore.client.vllm",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'

vLLM's own offloading connector decides what is stored and loaded; this one asks the daemon for a
whole request at once, and turns a load that failed into blocks that are computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import AttentionSpec, iter_layer_specs
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingCounterMetadata,
    OffloadingSpec,
)

from kvstore.client.guard import Guard
from kvstore.client.vllm_manager import COUNTERS, KVStoreManager
from kvstore.client.vllm_requests import Group
from kvstore.client.vllm_worker import KVStoreWorker, Sessions, make_worker
from kvstore.client.weights import weights_identity
from kvstore.types import TEXT_BYTES_MAX, Layout

SCHEDULER_TIMEOUT_S, WORKER_TIMEOUT_S = 0.25, 1.0
LOAD_DEADLINE_S = 1.0
COPY_THREADS = 2
OURS = "kvstore_connector"  # in the extra config: this spec is used by this connector

log = logging.getLogger("kvstore")


# -- what is refused ---------------------------------------------------------------------------


def check(vllm_config: Any) -> None:
    """Raises ValueError, with what to set, where hits would be impossible or bytes uncertain."""
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    extra = transfer.kv_connector_extra_config
    if not cache.enable_prefix_caching:
        raise ValueError("kvstore needs prefix caching: set --enable-prefix-caching")
    if cache.prefix_caching_hash_algo != "sha256_cbor":
        raise ValueError(
            f"kvstore needs block hashes that other processes compute alike, not those of "
            f"{cache.prefix_caching_hash_algo}: set --prefix-caching-hash-algo sha256_cbor"
        )
    for name in ("canonical_layout", "sync_load_budget_bytes"):
        if extra.get(name):
            raise ValueError(f"kvstore does not support {name}: take it out of the extra config")
    if getattr(cache, "calculate_kv_scales", False):
        raise ValueError(
            "kvstore needs scales that do not change between starts: take out --calculate-kv-scales"
        )
    if transfer.kv_load_failure_policy != "recompute":
        log.warning(
            "kvstore: a load that fails ends its request: set "
            '"kv_load_failure_policy": "recompute" in --kv-transfer-config'
        )


def _check_groups(kv_cache_config: Any) -> None:
    for group in kv_cache_config.kv_cache_groups:
        for spec in iter_layer_specs(group.kv_cache_spec):
            if not isinstance(spec, AttentionSpec):
                raise ValueError(
                    f"kvstore stores the KV cache of attention layers, not {type(spec).__name__}: "
                    "run this model without the connector"
                )


# -- what makes blocks interchangeable ---------------------------------------------------------


def model_identity(name: str, revision: str | None, what: str = "model") -> str:
    """A name for people, and the weights."""
    return f"{name.rstrip('/').rsplit('/', 1)[-1]}@{weights_identity(name, revision, what)}"


def _depends_on_length(model: Any) -> bool:
    """Whether positions are encoded differently for another --max-model-len."""
    text = json.dumps(model.hf_config.to_dict(), default=str)
    return any(word in text for word in ("longrope", '"dynamic"', '"su"'))


def identity(vllm_config: Any, facts: Any) -> dict[str, Any]:
    """All that the bytes of blocks depend on beside their tokens; nothing that they do not."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    drafter = getattr(speculative, "model", None)
    return {
        "model": extra.get("model_id") or model_identity(model.model, model.revision),
        "drafter": drafter
        and model_identity(drafter, getattr(speculative, "revision", None), "draft model"),
        "speculative": getattr(speculative, "method", None),
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "overrides": str(model.hf_overrides) if model.hf_overrides else "",
        "length": model.max_model_len if _depends_on_length(model) else 0,
        "cache_dtype": cache.cache_dtype,
        "tp": parallel.tensor_parallel_size,
        "pp": parallel.pipeline_parallel_size,
        "dcp": parallel.decode_context_parallel_size,
        "seed": os.environ.get("PYTHONHASHSEED"),
        "worker": facts,
    }


@dataclasses.dataclass
class WorkerFacts(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker tells the scheduler after its KV cache was made.

    shard_bytes  its part of a chunk, for each group
    facts        how the bytes of a chunk are arranged; equal in all workers
    """

    shard_bytes: tuple[int, ...]
    facts: dict[str, Any]


@dataclasses.dataclass
class KVStoreWorkerMetadata(OffloadingWorkerMetadata):  # type: ignore[misc]
    """vLLM's own, and for each of our transfers how many workers have ended it, and with how many
    it failed."""

    outcomes: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def aggregate(self, other: Any) -> KVStoreWorkerMetadata:
        """The sum over two workers."""
        base = super().aggregate(other)
        outcomes = dict(self.outcomes)
        for number, (ended, failed) in getattr(other, "outcomes", {}).items():
            before = outcomes.get(number, (0, 0))
            outcomes[number] = before[0] + ended, before[1] + failed
        return KVStoreWorkerMetadata(base.completed_jobs, base.transfer_stats, outcomes)


class KVStoreOffloadingSpec(OffloadingSpec):  # type: ignore[misc]
    """Makes the two sides; used through KVStoreConnector, which names it to vLLM."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not self.extra_config.get(OURS):
            raise ValueError(
                "vLLM's own OffloadingConnector ends the engine when a load fails: set "
                '"kv_connector": "KVStoreConnector", "kv_connector_module_path": '
                '"kvstore.client.vllm" in --kv-transfer-config'
            )
        path = self.extra_config.get("socket")
        self._path = Path(path) if path else None
        self._tenant = str(self.extra_config.get("tenant", "default"))
        self.facts: dict[str, Any] = {}
        self.shard_bytes: tuple[int, ...] = ()

    @classmethod
    def build_metric_definitions(cls, extra_config: Any) -> dict[str, Any]:
        """What `get_stats` of the manager counts, for Prometheus."""
        return {
            f"vllm:kvstore_{name}": OffloadingCounterMetadata(documentation=text)
            for name, text in COUNTERS.items()
        }

    def number(self, name: str, default: float) -> float:
        """A number of the extra config. Raises ValueError when it is none, or negative."""
        value = self.extra_config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"{name} is {value!r} in the extra config: give a number from 0 on")
        return value

    def get_manager(self) -> KVStoreManager:
        """The scheduler's side."""
        config = self.config
        groups = []
        for group in config.groups:
            chunk_tokens = group.tokens_per_block * config.cache.blocks_per_chunk
            hashes = chunk_tokens // config.cache.tokens_per_hash
            groups.append(Group(group.group_id, chunk_tokens, hashes, None))
        timeout_s = self.number("timeout_s", SCHEDULER_TIMEOUT_S)
        return KVStoreManager(
            Guard(self._path, self._tenant, timeout_s=timeout_s),
            groups,
            workers=config.parallel.world_size,
            load_deadline_s=self.number("load_deadline_s", LOAD_DEADLINE_S),
            prefill_tokens_per_s=self.number("prefill_tokens_per_s", 0.0),
        )

    def get_worker(self, kv_caches: CanonicalKVCaches) -> KVStoreWorker:
        """The worker's side."""
        timeout_s = self.number("timeout_s", WORKER_TIMEOUT_S)
        worker = make_worker(
            kv_caches,
            blocks_per_chunk=self.config.cache.blocks_per_chunk,
            rank=self.config.parallel.rank,
            sessions=Sessions(self._path, self._tenant, timeout_s),
            timeout_s=timeout_s,
            threads=max(1, int(self.number("copy_threads", COPY_THREADS))),
        )
        self.shard_bytes = worker.geometry.shard_bytes
        self.facts["pages"] = worker.geometry.pages
        return worker


class KVStoreConnector(OffloadingConnector):  # type: ignore[misc]
    """vLLM's offloading connector over the store."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        check(vllm_config)
        _check_groups(kv_cache_config)
        _name_spec(vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)
        self._config = vllm_config
        side = self.connector_scheduler
        if side is not None:
            windows = [one.sliding_window_size_in_chunks for one in side.config.kv_group_configs]
            self.manager.groups = [
                dataclasses.replace(group, window=window)
                for group, window in zip(self.manager.groups, windows, strict=True)
            ]

    @property
    def manager(self) -> KVStoreManager:
        """The scheduler's side."""
        found: KVStoreManager = self.connector_scheduler.manager
        return found

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *rest: Any) -> Any:
        """vLLM's metrics of offloading, and our counters."""
        _name_spec(vllm_config)
        return super().build_prom_metrics(vllm_config, *rest)

    # -- in the worker -------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """The KV cache was made."""
        spec = self.connector_worker.spec
        spec.facts = {
            "device": current_platform.device_type,
            "layout": self._config.cache_config.kv_cache_layout,
            "layers": {
                name: (
                    str(one.dtype),
                    tuple(one.shape[1:]),
                    tuple(one.stride()[1:]),
                    self._backend(name),
                )
                for name, one in kv_caches.items()
            },
        }
        super().register_kv_caches(kv_caches)

    def _backend(self, layer: str) -> str:
        """The attention backend, which arranges bytes within a page as it likes."""
        layers = self._config.compilation_config.static_forward_context
        backend = getattr(layers.get(layer), "attn_backend", None)
        return str(backend.get_name()) if backend is not None else ""

    def get_handshake_metadata(self) -> WorkerFacts | None:
        """What the scheduler's side must know of this worker's KV cache."""
        if self.connector_worker is None:
            return None
        spec = self.connector_worker.spec
        return WorkerFacts(spec.shard_bytes, spec.facts)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose load has ended, the failed ones named as such."""
        results = super().get_transfer_results(finished_req_ids)
        worker = self.connector_worker.worker
        results.failed_recving |= worker.failed_requests & results.finished_recving
        worker.failed_requests -= results.failed_recving
        return results

    def build_connector_worker_meta(self) -> KVStoreWorkerMetadata | None:
        """What has ended since the last call."""
        base = super().build_connector_worker_meta()
        side = self.connector_worker
        if side is None or side.worker is None:
            return None
        outcomes, side.worker.outcomes = side.worker.outcomes, {}
        if base is None and not outcomes:
            return None
        base = base or OffloadingWorkerMetadata()
        ended = {number: (1, int(not good)) for number, good in outcomes.items()}
        return KVStoreWorkerMetadata(base.completed_jobs, base.transfer_stats, ended)

    # -- in the scheduler ----------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """All workers have made their KV cache. Raises ValueError when they differ."""
        told = list(metadata.values())
        first = told[0]
        if any(one.shard_bytes != first.shard_bytes for one in told):
            raise ValueError(
                "the workers' parts of a block differ in size, which kvstore cannot store: choose "
                "another --pipeline-parallel-size"
            )
        known = identity(self._config, first.facts)
        digest = hashlib.blake2b(
            json.dumps(known, sort_keys=True, default=str).encode(), digest_size=16
        ).hexdigest()
        groups = self.manager.groups
        names = [sorted(one.layer_names) for one in self._kv_cache_config.kv_cache_groups]
        layouts = []
        for at, (group, size) in enumerate(zip(groups, first.shard_bytes, strict=True)):
            own = hashlib.blake2b(
                json.dumps([digest, names[group.number], group.chunk_hashes, at]).encode(),
                digest_size=16,
            ).hexdigest()
            layouts.append(
                Layout(
                    model=str(known["model"]).encode()[-TEXT_BYTES_MAX:].decode(errors="replace"),
                    engine=f"vllm/kv1 {own}",
                    dtype=str(known["dtype"]).removeprefix("torch."),
                    block_tokens=group.chunk_tokens,
                    shards=self.manager.workers,
                    shard_bytes=size,
                )
            )
        self.manager.open(layouts)

    def on_new_request(self, request: Any) -> None:
        """A request has come."""
        super().on_new_request(request)
        self.manager.begin(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many tokens the store has beyond those; None: it is not known yet."""
        if not request.skip_reading_prefix_cache:
            ready = self.manager.guard.ask(
                lambda: self.manager.ready(request, num_computed_tokens), True
            )
            if not ready:
                return None, False
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(
            request, num_computed_tokens
        )
        return found

    def update_connector_output(self, connector_output: Any) -> None:
        """Workers have ended transfers."""
        told = connector_output.kv_connector_worker_meta
        if isinstance(told, KVStoreWorkerMetadata):
            self.manager.reported(told.outcomes)
        super().update_connector_output(connector_output)


def _name_spec(vllm_config: Any) -> None:
    """Have vLLM load our spec, in whatever process this is."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    extra.update(
        spec_name="KVStoreOffloadingSpec", spec_module_path="kvstore.client.vllm", **{OURS: True}
    )


__all__ = ["KVStoreConnector", "KVStoreOffloadingSpec"]
