"""What runs inside vLLM's worker processes: taking published weights, and ending when their owner is gone."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

SHARED_MEMORY = Path("/dev/shm")
OWNER_POLL_S = 1.0
"""How often a worker looks whether its owner still lives."""


class WeightReceiver:
    """Worker extension: vLLM mixes it into its worker class, ``collective_rpc`` calls its public methods."""

    model_runner: Any

    def receive_weights(self, path: str) -> None:
        """Replace every weight by those of the safetensors file ``path`` (Hugging Face names).

        A tied head must be in the file under its own name: vLLM's CPU build keeps a repacked copy of it, which
        ``reload_weights`` renews only then. Raises ValueError where it is missing.
        """
        from safetensors import safe_open

        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(_concerns_weights)
        with safe_open(path, framework="pt") as weights:
            names = list(weights.keys())
            self._refuse_missing_head(path, names)
            self.model_runner.reload_weights(weights_iterator=((name, weights.get_tensor(name)) for name in names))

    def watch_owner(self, owner_pid: int) -> int:
        """From now on end this worker and its engine as soon as the process ``owner_pid`` is gone; the engine's pid.

        vLLM's own processes outlive an owner that was killed with SIGKILL. The owner must be an ancestor.
        """
        ancestors = [psutil.Process(), *psutil.Process().parents()]
        pids = [process.pid for process in ancestors]
        if owner_pid not in pids:
            raise ValueError(f"owner_pid: process {owner_pid} is not an ancestor of worker {os.getpid()}")
        engine = ancestors[pids.index(owner_pid) - 1]
        threading.Thread(target=_end_without_owner, args=(engine, owner_pid), daemon=True).start()
        return engine.pid

    def _refuse_missing_head(self, path: str, names: list[str]) -> None:
        model = self.model_runner.get_model()
        tied = getattr(model.config, "tie_word_embeddings", False) and hasattr(model, "lm_head")
        if tied and not any(name.endswith("lm_head.weight") for name in names):
            raise ValueError(f"{path}: got no lm_head.weight, need the tied head under its own name: export it as well")


def _concerns_weights(record: logging.LogRecord) -> bool:
    """Rotary embeddings hold a computed table: vLLM warns at every reload that it found no weights for them."""
    return "RotaryEmbedding: Failed to load weights" not in record.getMessage()


def _end_without_owner(engine: psutil.Process, owner_pid: int) -> None:
    """Wait until ``engine``, the owner's child that leads to this process, has another parent; then end both."""
    try:
        while engine.ppid() == owner_pid:
            time.sleep(OWNER_POLL_S)
        with no_queue_left(engine.pid):
            engine.kill()
    except psutil.NoSuchProcess:
        pass
    os._exit(1)


@contextlib.contextmanager
def no_queue_left(engine_pid: int) -> Iterator[None]:
    """Delete the shared memory of the queues between an engine and its workers; the body ends these processes.

    Python's resource tracker does it as well, unless it is killed with the rest, as Ray does with an actor's children.
    """
    segments = _queue_segments(engine_pid)
    yield
    for path in segments:
        path.unlink(missing_ok=True)


def _queue_segments(engine_pid: int) -> set[Path]:
    """Mapped files of /dev/shm with the names that Python gives to shared memory and to semaphores."""
    mapped: set[Path] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        engine = psutil.Process(engine_pid)
        for process in (engine, *engine.children(recursive=True)):
            mapped |= {Path(region.path) for region in process.memory_maps()}
    return {path for path in mapped if path.parent == SHARED_MEMORY and path.name.startswith(("psm_", "sem."))}
