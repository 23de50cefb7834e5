"""Which model an SGLang engine runs, as a text that differs whenever its keys and values may.

SGLang's page hashes are of tokens alone, and its model name is what the operator chose to call it.
So the identity is made of the weights themselves, sampled, and of the options that change what they
compute. Needs no SGLang.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kvstore.client.weights import weights_identity

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
        fields["model"] = weights_identity(path, fields.get("revision"))
        draft = getattr(server_args, "speculative_draft_model_path", None)
        if draft:
            fields["draft"] = weights_identity(
                str(draft), fields.get("speculative_draft_model_revision"), "draft model"
            )
    shown = (model_id or path.rstrip("/").rsplit("/", 1)[-1] or "model")[-NAME_CHARACTERS:]
    return f"{shown}@{digest(fields)}"


def digest(fields: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that differ when any field does."""
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
