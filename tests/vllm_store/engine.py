"""vLLM engines in processes of their own, told what to do by lines of JSON through a socket.

Runs in the environment of tests.vllm_store.environment. The first line of a connection is the
setting of its engine, each other one a command; every answer is one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

IDLE_STEPS_MAX = 200
COUNTED = {"vllm:external_prefix_cache_hits": "external", "vllm:num_preemptions": "preempted"}


class Faulty:
    """A copier that holds or fails: the same interface, around another."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.go = threading.Event()
        self.go.set()
        self.fail = 0  # so many jobs are still to fail
        self.held = 0

    def fence(self) -> Any:
        return self.inner.fence()

    def pin(self, arena: Any) -> None:
        self.inner.pin(arena)

    def run(self, job: Any, targets: Any, sources: Any, sizes: Any) -> None:
        if self.fail and not job.stored:
            self.fail -= 1
            raise OSError("injected: the copy fails")
        self.inner.run(job, targets, sources, sizes)
        if not self.go.is_set():
            self.held += 1
            self.go.wait(60)
            self.held -= 1


class Engine:
    """The commands."""

    def __init__(self, setting: dict[str, Any]) -> None:
        from vllm import LLM

        transfer = setting.pop("transfer")
        if transfer is not None:
            from vllm.config import KVTransferConfig

            setting["kv_transfer_config"] = KVTransferConfig(**transfer)
        self.llm = LLM(
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            disable_log_stats=False,
            **{"prefix_caching_hash_algo": "sha256_cbor", **setting},
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.connector = self.core.scheduler.connector

    @property
    def copier(self) -> Faulty:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker = get_kv_transfer_group().connector_worker.worker
        if not isinstance(worker.copier, Faulty):
            worker.copier = Faulty(worker.copier)
        found: Faulty = worker.copier
        return found

    def generate(self, prompts: list[list[int]], count: int) -> Any:
        """Greedy tokens of each prompt, how many of its tokens were cached, and the seconds."""
        from vllm import SamplingParams

        started = time.monotonic()
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=count, detokenize=False, ignore_eos=True),
            use_tqdm=False,
        )
        seconds = time.monotonic() - started
        tokens = [list(one.outputs[0].token_ids) for one in outputs]
        finish = [one.outputs[0].finish_reason for one in outputs]
        cached = [one.num_cached_tokens for one in outputs]
        return {"tokens": tokens, "cached": cached, "finish": finish, "seconds": seconds}

    def rest(self) -> Any:
        """Step until nothing is left to be stored; how many steps it took."""
        manager = self.connector.manager
        for steps in range(IDLE_STEPS_MAX):
            if steps > 2 and not self.connector.has_pending_push_work() and not manager._moving:
                self._after = threading.Event()
                manager._ending.do(self._after.set)
                return steps
            self.core.scheduler.finished_req_ids.add("nobody")  # else an idle engine takes no step
            self.core.step()
        raise AssertionError("transfers do not end")

    def ended(self) -> bool:
        """Whether everything that was to be committed at the last `rest` was."""
        return self._after.is_set()

    def session(self) -> int:
        """The number of the manager's session."""
        client = self.connector.manager.guard.client
        number: int = client.session(client.deadline()).attached.session
        return number

    def reset(self) -> Any:
        """The engine forgets its own cache."""
        done = self.llm.reset_prefix_cache()
        return done

    def reset_connector(self) -> Any:
        """The same, with the connector's."""
        return self.llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)

    def counts(self) -> Any:
        """The connector's own counters, and vLLM's of external hits."""
        manager = self.connector.manager
        found = {**manager.guard.counts, **manager.counts}
        for metric in self.llm.get_metrics():
            name = COUNTED.get(metric.name, metric.name)
            if name in COUNTED.values() or name.startswith("vllm:kvstore_"):
                found[name] = found.get(name, 0) + metric.value
        found["down"] = manager.guard.down
        found["layouts"] = [cache.layout.fingerprint.hex() for cache in manager._caches]
        found["moving"] = len(manager._moving)
        return found

    def hold(self, on: bool) -> None:
        """Whether jobs wait after their copy."""
        (self.copier.go.clear if on else self.copier.go.set)()

    def fail(self, loads: int) -> None:
        """So many loads are to fail."""
        self.copier.fail = loads

    def start(self, prompts: list[list[int]], count: int) -> None:
        """`generate` in the background; `finish` gives its answer."""
        self._answer: list[Any] = []
        self._thread = threading.Thread(
            target=lambda: self._answer.append(self.generate(prompts, count))
        )
        self._thread.start()

    def held(self) -> int:
        """Jobs that wait after their copy."""
        return self.copier.held

    def finish(self) -> Any:
        """See `start`."""
        self._thread.join()
        return self._answer[0]


def main(path: str) -> None:
    """Load all modules once, then serve each connection in a process forked for it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm.model_executor.models.gemma3
    import vllm.model_executor.models.llama
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    print("loaded", flush=True)  # noqa: T201
    while True:
        connected, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            serve(connected)
        connected.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def serve(connected: socket.socket) -> NoReturn:
    """One engine, for as long as the connection lasts."""
    with contextlib.suppress(BaseException), connected.makefile("rw") as lines:

        def answer(value: Any) -> None:
            lines.write(json.dumps(value) + "\n")
            lines.flush()

        setting = json.loads(lines.readline())
        log = os.open(setting.pop("log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            engine = Engine(setting)
            answer({"value": "ready"})
            while line := lines.readline():
                name, arguments = json.loads(line)
                answer({"value": getattr(engine, name)(*arguments)})
        except Exception as error:
            traceback.print_exc()
            answer({"error": repr(error)})
    for child in multiprocessing.active_children():  # workers of an engine with several
        child.kill()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
