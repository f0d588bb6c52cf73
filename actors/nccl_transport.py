"""Weights from the trainer's GPU into engines by NCCL, through vLLM's weight-transfer API (written for vLLM 0.32).

The trainer is rank 0 of one group, the workers of engine after engine follow. What is sent is the exported segment:
the trainer's own tensors change meanwhile. A collective whose other side is missing never returns: the deadlines of the
pools' calls end it. Never run on GPUs so far: tests hold order of calls and ranks with stand-ins for NCCL.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from actors.training_engine import training_device
from actors.weight_transport import WeightExporter, WeightReader
from ocrm_ray.config import GenerationPool
from ocrm_ray.records import PolicyWeights

_CALLS = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
_NO_CLIENT = SimpleNamespace(**dict.fromkeys(_CALLS, lambda *arguments: None))
"""vLLM's ``VLLMWeightSyncClient`` without effect: engines are told by the actors that hold them."""


def ranks_per_engine(pool: GenerationPool) -> int:
    """Workers of one engine: it is spread over its GPUs."""
    return max(1, int(pool.gpus_per_actor))


class NcclExporter(WeightExporter):
    """Its segments are what scorers read, and what ``send`` broadcasts."""

    def __init__(
        self, folder: Path | None, tensors: Mapping[str, Tensor], checksum: bool, pool: GenerationPool
    ) -> None:
        """``pool``: the engines, each of which calls ``receive`` at every ``send``."""
        from actors.remote_actor import meeting_point

        super().__init__(folder, tensors, checksum)
        address, port = meeting_point()
        num_ranks = 1 + pool.num_actors * ranks_per_engine(pool)
        self._group = {"master_address": address, "master_port": port, "world_size": num_ranks}
        self._update = {
            "names": list(tensors),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
        }
        self._source = _Source()
        self._reader = WeightReader()
        self._sender: Any = None

    def export(self, version: int, buckets: Iterable[Mapping[str, Tensor]]) -> PolicyWeights:
        return replace(super().export(version, buckets), nccl={"group": self._group, "update": self._update})

    def send(self, weights: PolicyWeights) -> None:
        if self._sender is None:
            from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            where = NCCLTrainerInitInfo(rank=0, **self._group)
            self._sender = WeightTransferTrainerFactory.trainer_init(where, client=_NO_CLIENT, source=self._source)
        with self._reader.read(weights) as tensors:
            self._source.tensors = {name: tensors[name] for name in weights.nccl["update"]["names"]}
            self._sender.send_weights()


async def join(engine: Any, weights: PolicyWeights, first_rank: int) -> None:
    """Once for each engine, beside the trainer's first ``send``; ``first_rank``: of the engine's workers."""
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

    init_info = weights.nccl["group"] | {"rank_offset": first_rank, "packed": True}
    await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))


async def receive(engine: Any, weights: PolicyWeights) -> None:
    """An engine's part of one ``send``, while it stands still."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    await engine.start_weight_update()
    await engine.update_weights(WeightTransferUpdateRequest(update_info=weights.nccl["update"]))
    await engine.finish_weight_update()


class _Source:
    """vLLM's ``WeightSource`` over a segment's tensors."""

    tensors: Mapping[str, Tensor]

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.to(training_device())) for name, tensor in self.tensors.items())
