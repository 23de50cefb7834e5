"""The generated protobuf code is what the pinned generator makes of the schema."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCHEMA = "kvstore/protos/kvstore.proto"
NAMES = ("kvstore_pb2.py", "kvstore_pb2.pyi", "kvstore_pb2_grpc.py")


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    """`make proto` writes it; only the oldest generator, or it loads under no older runtime."""
    assert importlib.metadata.version("grpcio-tools") == "1.71.0"
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            "-I.",
            *outputs,
            SCHEMA,
        ],
        cwd=ROOT,
        check=True,
    )
    for name in NAMES:
        fresh = (tmp_path / "kvstore" / "protos" / name).read_text()
        assert fresh == (ROOT / "protos" / name).read_text(), f"{name} is old: run `make proto`"
