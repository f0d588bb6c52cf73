"""What runs inside vLLM's worker processes: taking published weights, and ending when their owner is gone."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from actors.shadow_model import ShadowModel, can_be_shadowed
from actors.shared_memory import SHARED_MEMORY
from actors.weight_transport import WeightReader
from ocrm_ray.records import PolicyWeights

OWNER_POLL_S = 1.0
"""How often a worker looks whether its owner still lives."""


class WeightReceiver:
    """Worker extension: vLLM mixes it into its worker class, ``collective_rpc`` calls its public methods.

    New weights come in two calls, so that generation stands still for the second one alone.
    """

    model_runner: Any

    def start_receiving(self) -> None:
        """Once, before any weights: on CPU, where the model allows it, build the second model to load them into."""
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(_concerns_weights)
        model = self.model_runner.get_model()
        on_cpu = self.model_runner.device.type == "cpu"
        self._shadow = ShadowModel(self.model_runner.vllm_config, model) if on_cpu and can_be_shadowed(model) else None
        self._reader = WeightReader()
        self._background = ThreadPoolExecutor(max_workers=1)

    def prepare_weights(self, version: int, path: str, checksum: int | None) -> None:
        """Begin to do, beside the engine's steps, all that can be done before the weights are live."""
        self._weights = PolicyWeights(version, Path(path), 0, checksum)
        self._prepared = self._background.submit(self._prepare)

    def weights_prepared(self) -> tuple[float, float] | None:
        """Seconds of (looking at, repacking) the weights, or None before that is done; raises what went wrong.

        A tied head must be among them under its own name: vLLM's CPU build keeps a repacked copy of it, which a
        reload renews only then. ValueError where it is missing.
        """
        return self._prepared.result() if self._prepared.done() else None

    def take_weights(self) -> float:
        """Put the prepared weights live; seconds of repacking that had to wait until now."""
        if self._shadow is not None:
            self._shadow.hand_over()
            return 0.0
        started = time.monotonic()
        with self._read() as tensors:
            self.model_runner.reload_weights(weights_iterator=iter(tensors.items()))
        return time.monotonic() - started

    def _prepare(self) -> tuple[float, float]:
        started = time.monotonic()
        with self._read() as tensors:
            self._refuse_missing_head(tensors)
            checked = time.monotonic()
            self._load(tensors)
        return checked - started, time.monotonic() - checked

    @contextlib.contextmanager
    def _read(self) -> Iterator[Mapping[str, Tensor]]:
        """The weights, also those of a model's folder, under the names that they are exported with."""
        path = self._weights.path
        if path.is_dir():
            from ocrm_ray.networks import load_causal_lm

            self._reader = WeightReader()  # what another run exported is mapped no longer
            settings = self.model_runner.model_config
            dtype, trust = str(settings.dtype).removeprefix("torch."), settings.trust_remote_code
            yield load_causal_lm(path, dtype=dtype, trust_remote_code=trust).network.state_dict()  # type: ignore[arg-type]
            return
        with self._reader.read(self._weights) as tensors:
            yield tensors

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        if self._shadow is not None:
            self._shadow.load(tensors.items())

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

    def _refuse_missing_head(self, names: Iterable[str]) -> None:
        model = self.model_runner.get_model()
        tied = getattr(model.config, "tie_word_embeddings", False) and hasattr(model, "lm_head")
        if tied and not any(name.endswith("lm_head.weight") for name in names):
            raise ValueError("got no lm_head.weight, need the tied head under its own name: export it as well")


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
    """Delete shared memory and semaphores of an engine and its workers; the body ends these processes.

    Python's resource tracker does it as well, unless it is killed with the rest, as Ray does with an actor's children.
    """
    inodes: set[str] = set()
    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
        engine = psutil.Process(engine_pid)
        for process in (engine, *engine.children(recursive=True)):
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            # by inode: what is mapped of a semaphore is the name that it was given first
            inodes |= {line.split()[4] for line in lines if f" {SHARED_MEMORY}/" in line}
    yield
    # the names that Python gives to shared memory and to semaphores
    named = [path for kind in ("psm_*", "sem.mp-*") for path in SHARED_MEMORY.glob(kind)]
    for path in named:
        with contextlib.suppress(FileNotFoundError):
            if str(path.stat().st_ino) in inodes:
                path.unlink()
