"""The worker's watch over its owner, on a plain tree of processes: owner -> engine -> worker."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from actors.shared_memory import SHARED_MEMORY
from actors.vllm_worker import WeightReceiver
from actors.weight_transport import WeightExporter
from ocrm_ray.errors import StaleWeightsError
from ocrm_ray.records import PolicyWeights

ROOT = Path(__file__).parents[2]
WORKER = """
import os, sys, time
from multiprocessing import get_context, resource_tracker, shared_memory
from actors.vllm_worker import WeightReceiver
WeightReceiver().watch_owner(int(sys.argv[1]))
segment = shared_memory.SharedMemory(create=True, size=64)
resource_tracker.unregister(segment._name, "shared_memory")
lock = get_context("spawn").Lock()
resource_tracker.unregister(lock._semlock.name, "semaphore")
print(os.getppid(), os.getpid(), segment.name, lock._semlock.name.replace("/", "sem."), flush=True)
time.sleep(60)
"""
ENGINE = (
    "import subprocess, sys, time; subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1]]); time.sleep(60)"
)
OWNER = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], str(os.getpid()), sys.argv[2]])"


def test_engine_worker_and_their_shared_memory_end_when_their_owner_is_killed():
    command = [sys.executable, "-c", OWNER, ENGINE, WORKER]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        engine, worker, *files = owner.stdout.readline().split()
        family = [psutil.Process(int(engine)), psutil.Process(int(worker))]
        existed = [(SHARED_MEMORY / file).exists() for file in files]
        owner.kill()
        _, alive = psutil.wait_procs(family, timeout=15)
        for process in alive:
            process.kill()
    assert alive == []
    assert existed == [True, True]
    assert [file for file in files if (SHARED_MEMORY / file).exists()] == []


def test_a_process_that_is_no_ancestor_is_refused():
    with pytest.raises(ValueError, match="not an ancestor"):
        WeightReceiver().watch_owner(2**22 + 1)


class _Runner:
    """Stands in for vLLM's model runner on a GPU."""

    device = torch.device("cuda")

    def __init__(self, tied: bool) -> None:
        self.received: dict[str, list[float]] = {}
        config = type("Config", (), {"tie_word_embeddings": tied})
        self._model = type("Model", (), {"config": config, "lm_head": None})

    def get_model(self) -> object:
        return self._model

    def reload_weights(self, weights_iterator) -> None:
        self.received = {name: tensor.tolist() for name, tensor in weights_iterator}


def _receiver(tied: bool) -> WeightReceiver:
    receiver = WeightReceiver()
    receiver.model_runner = _Runner(tied)
    receiver.start_receiving()
    return receiver


def _prepare(receiver: WeightReceiver, weights: PolicyWeights) -> None:
    receiver.prepare_weights(weights.version, str(weights.path), weights.checksum)
    receiver._background.shutdown(wait=True)
    assert receiver.weights_prepared() is not None


@pytest.mark.parametrize(("tied", "names"), [(False, ["a"]), (True, ["a", "lm_head.weight"])])
def test_every_tensor_reaches_the_model_in_the_pause_and_none_before(tmp_path, tied, names):
    tensors = {name: torch.full((2,), float(index)) for index, name in enumerate(names)}
    weights = WeightExporter(tmp_path, tensors, checksum=True).export(3, [tensors])
    receiver = _receiver(tied)
    _prepare(receiver, weights)
    assert receiver.model_runner.received == {}
    assert receiver.take_weights() > 0
    assert receiver.model_runner.received == {name: [float(index)] * 2 for index, name in enumerate(names)}


def test_a_tied_model_without_its_head_is_refused_before_anything_is_loaded(tmp_path):
    tensors = {"model.embed_tokens.weight": torch.zeros(2)}
    weights = WeightExporter(tmp_path, tensors, checksum=False).export(3, [tensors])
    receiver = _receiver(tied=True)
    with pytest.raises(ValueError, match="lm_head"):
        _prepare(receiver, weights)
    assert receiver.model_runner.received == {}


def test_weights_rewritten_between_looking_and_taking_are_refused(tmp_path):
    tensors = {"a": torch.zeros(2)}
    exporter = WeightExporter(tmp_path, tensors, checksum=False)
    weights = exporter.export(3, [tensors])
    receiver = _receiver(tied=False)
    _prepare(receiver, weights)
    exporter.release(weights)
    exporter.export(4, [tensors])
    with pytest.raises(StaleWeightsError, match="version 4 instead of version 3"):
        receiver.take_weights()
    assert receiver.model_runner.received == {}
