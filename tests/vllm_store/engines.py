"""Engines as the scenarios see them, and the tiny models that they run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.e2e.harness import Daemon
from tests.vllm_store import environment

BLOCK = 32  # tokens; the least that vLLM takes on CPUs
VOCABULARY = 512


def tokens(count: int, seed: int, start: list[int] | None = None) -> list[int]:
    """A prompt, with another one as its beginning if given."""
    drawn = random.Random(seed)
    head = start or []
    return head + [drawn.randrange(3, VOCABULARY) for _ in range(count - len(head))]


def save_llama(folder: Path, seed: int = 0, *, heads: int = 4) -> Path:
    """A random Llama of two layers in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_gemma(folder: Path) -> Path:
    """A random Gemma 3 with layers of full attention and of sliding windows of 64 tokens."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(5)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=64,
        layer_types=["sliding_attention"] * 2
        + ["full_attention"]
        + ["sliding_attention"] * 2
        + ["full_attention"],
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


class Host:
    """The process that engines of one version are forked from: loading vLLM takes long."""

    def __init__(self, version: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="engines"))
        self.path = self.folder / "socket"
        self._process = subprocess.Popen(
            [str(environment.PYTHON), "-m", "tests.vllm_store.engine", str(self.path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            cwd=environment.ROOT,
            env=environment.variables(version),
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "loaded\n"

    def close(self) -> None:
        """End it; engines end with their connections."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        shutil.rmtree(self.folder)


_hosts: dict[str, Host] = {}  # of each version that was asked for


def host(version: str) -> Host:
    """The process that engines of this version are forked from."""
    if version not in _hosts:
        _hosts[version] = Host(version)
    return _hosts[version]


def close_hosts() -> None:
    """End them all."""
    while _hosts:
        _hosts.popitem()[1].close()


class Engine:
    """One engine process; its methods are those of tests.vllm_store.engine.Engine."""

    def __init__(
        self,
        version: str,
        model: Path,
        daemon: Daemon | None,
        *,
        extra: dict[str, Any] | None = None,
        **setting: Any,
    ) -> None:
        transfer = None
        if daemon is not None:
            transfer = {
                "kv_connector": "KVStoreConnector",
                "kv_connector_module_path": "kvstore.client.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"socket": str(daemon.socket()), **(extra or {})},
            }
        number, self._log = tempfile.mkstemp(dir=host(version).folder)
        os.close(number)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(host(version).path))
        self._lines = self._socket.makefile("rw")
        given = {"max_model_len": 1024, "block_size": BLOCK, "log": self._log, **setting}
        try:
            self._tell({"model": str(model), "transfer": transfer, **given})
            assert self._answer() == "ready"
        except BaseException:
            self.close()
            raise

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self._tell([name, arguments])
            return self._answer()

        return call

    def log(self) -> str:
        """What it has said so far."""
        return Path(self._log).read_text(errors="replace")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._lines.read()  # until it has ended
        self._lines.close()
        self._socket.close()

    def _tell(self, value: Any) -> None:
        self._lines.write(json.dumps(value) + "\n")
        self._lines.flush()

    def _answer(self) -> Any:
        line = self._lines.readline()
        assert line, f"the engine has ended: {self.log()[-8000:]}"
        answer = json.loads(line)
        assert "error" not in answer, f"{answer['error']}: {self.log()[-8000:]}"
        return answer["value"]


@contextlib.contextmanager
def engine(*arguments: Any, **setting: Any) -> Iterator[Engine]:
    """An engine for a while."""
    made = Engine(*arguments, **setting)
    try:
        yield made
    finally:
        made.close()
