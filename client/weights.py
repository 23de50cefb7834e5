"""Which weights a model on this host has: engines' block hashes are of tokens alone."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLES = 256  # of each file of weights, its first and its last bytes among them
SAMPLE_BYTES = 4 << 10

log = logging.getLogger("kvstore")


def weights_identity(path: str, revision: str | None, what: str = "model") -> str:
    """What tells the weights of a folder, a file, or a name on the hub that was downloaded, from
    others: a digest of samples of them. Where there are none to be seen, name and revision, with a
    warning that names the `what`."""
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
