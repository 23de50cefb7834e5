"""Which model an SGLang engine runs, as a text that differs whenever its keys and values may.

SGLang's page hashes are of tokens alone, and its model name is what the operator chose to call it.
So the identity is made of the weights themselves, sampled, and of the options that change what they
compute. Needs no SGLang.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLES = 256  # of each file of weights, its first and its last bytes among them
SAMPLE_BYTES = 4 << 10
NAME_CHARACTERS = 100

# Options of the server that change the values in a page, or what a page holds.
OPTIONS = (
    "revision",
    "dtype",
    "quantization",
    "quantization_param_path",
    "modelopt_quant",
    "kv_cache_dtype",
    "load_format",
    "model_loader_extra_config",
    "json_model_override_args",
    "context_length",
    "weight_version",
    "speculative_algorithm",
    "speculative_draft_model_path",
    "speculative_draft_model_revision",
)

log = logging.getLogger("kvstore")


def model_identity(name: str | None, model_id: str, server_args: Any) -> str:
    """A text of at most 512 bytes for `Layout.model`.

    name         what SGLang calls the model: taken for its path where there are no server_args
    model_id     what the operator says that the weights are; empty: look at their files
    server_args  SGLang's, or None where they cannot be had
    """
    path = str(getattr(server_args, "model_path", None) or name or "")
    fields: dict[str, Any] = {
        option: str(getattr(server_args, option, None)) for option in OPTIONS if server_args
    }
    if model_id:
        fields["model"] = model_id
    else:
        fields["model"] = _weights(path, fields.get("revision"))
        draft = getattr(server_args, "speculative_draft_model_path", None)
        if draft:
            fields["draft"] = _weights(
                str(draft), fields.get("speculative_draft_model_revision"), "draft model"
            )
    shown = (model_id or path.rstrip("/").rsplit("/", 1)[-1] or "model")[-NAME_CHARACTERS:]
    return f"{shown}@{digest(fields)}"


def digest(fields: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that differ when any field does."""
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _weights(path: str, revision: str | None, what: str = "model") -> str:
    folder = _folder(path, revision)
    if folder is not None:
        try:
            if found := sample_weights(folder):
                return found
        except OSError as error:
            log.warning("kvstore: the weights in %s cannot be read: %s", folder, error)
    log.warning(
        "kvstore: the %s %r is known by its name alone: give model_id, and another one whenever "
        "its weights change",
        what,
        path,
    )
    return f"{path}@{revision}"


def _folder(path: str, revision: str | None) -> Path | None:
    """Where the weights of a path or of a name on the hub lie on this host."""
    if not path:
        return None
    if os.path.exists(path):
        return Path(path)
    try:
        from huggingface_hub import snapshot_download

        wanted = None if revision in (None, "None") else revision
        return Path(snapshot_download(path, revision=wanted, local_files_only=True))
    except Exception:  # not installed, not downloaded, or no name of the hub
        return None


def sample_weights(place: Path) -> str:
    """A digest of a folder's or file's weights, configuration and code; empty where it has no
    weights. Names, sizes and samples count, not times and places."""
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    whole = hashlib.blake2b(digest_size=16)
    weights = 0
    for file in files:
        if file.suffix in WEIGHTS:
            weights += 1
            _add(whole, file.name, *_samples(file))
        elif file.suffix == ".py" or file.name in ("config.json", "hf_quant_config.json"):
            _add(whole, file.name, file.read_bytes())
    return whole.hexdigest() if weights else ""


def _samples(file: Path) -> list[bytes]:
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        last = max(0, size - SAMPLE_BYTES)
        starts = sorted({last * at // (SAMPLES - 1) for at in range(SAMPLES)})
        found = [os.pread(opened.fileno(), SAMPLE_BYTES, start) for start in starts]
    return [str(size).encode(), *found]


def _add(whole: Any, name: str, *parts: bytes) -> None:
    for part in (name.encode(), *parts):
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
