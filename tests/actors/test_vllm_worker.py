"""The worker's watch over its owner, on a plain tree of processes: owner -> engine -> worker."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from actors.vllm_worker import SHARED_MEMORY, WeightReceiver

ROOT = Path(__file__).parents[2]
WORKER = """
import os, sys, time
from multiprocessing import resource_tracker, shared_memory
from actors.vllm_worker import WeightReceiver
WeightReceiver().watch_owner(int(sys.argv[1]))
segment = shared_memory.SharedMemory(create=True, size=64)
resource_tracker.unregister(segment._name, "shared_memory")
print(os.getppid(), os.getpid(), segment.name, flush=True)
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
        engine, worker, segment = owner.stdout.readline().split()
        family = [psutil.Process(int(engine)), psutil.Process(int(worker))]
        owner.kill()
        _, alive = psutil.wait_procs(family, timeout=15)
        for process in alive:
            process.kill()
    assert alive == []
    assert not (SHARED_MEMORY / segment).exists()


def test_a_process_that_is_no_ancestor_is_refused():
    with pytest.raises(ValueError, match="not an ancestor"):
        WeightReceiver().watch_owner(2**22 + 1)


class _Runner:
    """Stands in for vLLM's model runner."""

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
    return receiver


@pytest.mark.parametrize(("tied", "names"), [(False, ["a"]), (True, ["a", "lm_head.weight"])])
def test_every_tensor_of_the_file_reaches_the_model(tmp_path, tied, names):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file({name: torch.full((2,), float(index)) for index, name in enumerate(names)}, path)
    receiver = _receiver(tied)
    receiver.receive_weights(str(path))
    assert receiver.model_runner.received == {name: [float(index)] * 2 for index, name in enumerate(names)}


def test_a_tied_model_without_its_head_is_refused_before_anything_is_loaded(tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file({"model.embed_tokens.weight": torch.zeros(2)}, path)
    receiver = _receiver(tied=True)
    with pytest.raises(ValueError, match="lm_head"):
        receiver.receive_weights(str(path))
    assert receiver.model_runner.received == {}
