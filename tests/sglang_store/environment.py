"""An environment with the real SGLang in it, as much of it as runs without a GPU.

It is built once, in `.venv-sglang` of the checkout. The wheel of SGLang is installed without its
dependencies, most of which need CUDA; those that it imports on the CPU are listed here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-sglang"
PYTHON = VENV / "bin" / "python"
SHIMS = VENV / "shims"  # before everything else on the path
READY = VENV / "ready"
SGLANG = "0.5.23"
TORCH = "torch==2.13.0"  # taken as a CPU build where no other is asked for
PACKAGES = (
    "aiohttp",
    "anthropic",
    "apache-tvm-ffi==0.1.11",
    "compressed-tensors",
    "dill",
    "einops",
    "fastapi",
    "gguf",
    "interegular",
    "llguidance",
    "mistral_common",
    "msgspec",
    "ninja",
    "numpy",
    "openai-harmony==0.0.4",
    "openai==2.8.0",
    "orjson",
    "outlines==0.1.11",
    "partial_json_parser",
    "pillow",
    "prometheus-client",
    "protobuf>=5.29",
    "psutil",
    "pybase64",
    "pydantic",
    "python-multipart",
    "pyzmq",
    "regex",
    "requests",
    "scipy",
    "sentencepiece",
    "setproctitle",
    "tiktoken",
    "transformers==5.19.0",
    "uvicorn",
    "uvloop",
    "xgrammar==0.2.7",
    "xxhash",
    "zstandard",
)
# Imported by name only: their real packages need CUDA, or are of no use here.
EMPTY = {
    "IPython/__init__.py": "",
    "IPython/display.py": "HTML = display = print\n",
    "torchaudio/__init__.py": "",
    "sitecustomize.py": "import tests.sglang_store.shims\n",
}


def build() -> None:
    """Make the environment, unless what is there was made from the same list."""
    wanted = "\n".join((SGLANG, TORCH, *PACKAGES))
    if not READY.exists() or READY.read_text() != wanted:
        subprocess.run(["python3.11", "-m", "venv", "--clear", str(VENV)], check=True)
        limits = VENV / "constraints.txt"
        limits.write_text(TORCH + "\n")
        _install(TORCH)
        _install("--constraint", str(limits), *PACKAGES)
        _install("--no-deps", "torchvision==0.28.0", f"sglang=={SGLANG}")
        READY.write_text(wanted)
    for name, text in EMPTY.items():
        path = SHIMS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _install(*what: str) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", *what]
    sys.stdout.write(f"pip install {' '.join(what)[:100]}\n")
    sys.stdout.flush()
    subprocess.run(command, check=True)


def environ() -> dict[str, str]:
    """What a process in that environment is started with."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("KVSTORE_")}
    return {
        **kept,
        "PYTHONPATH": f"{SHIMS}{os.pathsep}{ROOT}",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
