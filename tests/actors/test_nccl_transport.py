"""Order of calls, ranks and bytes of the NCCL transport; stand-ins take the place of NCCL, of the engine and of GPUs.

vLLM's own sender runs here; its receivers, and NCCL itself, have not been run.
"""

import asyncio

import pytest
import torch
from tiny_models import run_config

from actors.generation import GenerationActor
from actors.nccl_transport import NcclExporter
from actors.weight_transport import WeightReader
from ocrm_ray.errors import StaleWeightsError

TENSORS = {"b": torch.ones(4, dtype=torch.bfloat16), "a": torch.arange(6.0).view(2, 3)}
"""In another order than a segment's."""


class Group:
    """Stands in for an NCCL communicator: remembers what rank 0 broadcasts."""

    def __init__(self):
        self.sent = []

    def broadcast(self, tensor, src, stream):
        assert src == 0
        self.sent.append(tensor.clone())


@pytest.fixture
def group(monkeypatch):
    """What the exporter's sender broadcasts to; ``group.joined``: as what the trainer joined it, each time."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    group = Group()
    group.joined = []

    def trainer_init(init_info, *, client, source):
        group.joined.append(init_info)
        sender = NCCLTrainerWeightTransferEngine(client=client, source=source, packed=False)
        sender.model_update_group = group
        return sender

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return group


def config_of(tmp_path):
    return run_config(tmp_path, pools={"generation": {"num_actors": 3, "gpus_per_actor": 2}})


@pytest.fixture
def exporter(tmp_path):
    return NcclExporter(tmp_path / "segments", TENSORS, False, config_of(tmp_path).pools.generation)


class Engine:
    """Stands in for vLLM's ``AsyncLLM``: remembers its calls in order."""

    def __init__(self):
        self.calls = []
        self.engine_core = self

    def __getattr__(self, name):
        async def call(*arguments, **keywords):
            self.calls.append((name, *arguments, *keywords.values()))

        return call

    @property
    def names(self):
        return [name for name, *_ in self.calls]


def test_what_is_sent_is_what_was_exported_in_the_order_that_engines_are_told(exporter, group):
    live = {name: tensor.clone() for name, tensor in TENSORS.items()}
    weights = exporter.export(1, [live])
    for tensor in live.values():
        tensor.zero_()  # the next update
    exporter.send(weights)
    update = weights.nccl["update"]
    assert update["names"] == ["b", "a"]
    for name, dtype, shape, sent in zip(*update.values(), group.sent, strict=True):
        assert torch.equal(sent, TENSORS[name])
        assert (getattr(torch, dtype), torch.Size(shape)) == (sent.dtype, sent.shape)


def test_the_trainer_joins_once_as_rank_0_of_itself_and_every_worker(exporter, group):
    weights = [exporter.export(version, [TENSORS]) for version in (1, 2)]
    for version in weights:
        exporter.send(version)
    (where,) = group.joined
    assert (where.rank, where.world_size) == (0, 1 + 3 * 2)
    group_of_engines = weights[0].nccl["group"]
    assert group_of_engines["world_size"] == where.world_size
    assert group_of_engines["master_address"] == where.master_address
    assert group_of_engines["master_port"] == where.master_port
    assert len(group.sent) == 4


def test_a_segment_that_was_rewritten_before_it_was_sent_ends_the_run(exporter, group):
    weights = exporter.export(1, [TENSORS])
    exporter.release(weights)
    exporter.export(2, [TENSORS])
    with pytest.raises(StaleWeightsError):
        exporter.send(weights)
    assert group.sent == []


def test_scorers_read_the_segment_on_the_host(exporter):
    weights = exporter.export(1, [TENSORS])
    with WeightReader().read(weights) as tensors:
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_an_engine_joins_before_its_first_pause_and_receives_inside_every_pause(tmp_path, exporter):
    actor = GenerationActor(config_of(tmp_path), 2, "unread", 64, by_nccl=True)
    actor._engine = engine = Engine()
    weights = [exporter.export(version, [TENSORS]) for version in (1, 2)]
    for version in weights:
        asyncio.run(actor.load_weights(version))
    one = ["pause_scheduler_async", "start_weight_update", "update_weights", "finish_weight_update"]
    one += ["update_weight_version", "resume_generation"]
    assert engine.names == ["init_weight_transfer_engine", *one, *one]
    init, update = engine.calls[0][1].init_info, engine.calls[3][1].update_info
    assert init == weights[0].nccl["group"] | {"rank_offset": 5, "packed": True}
    assert update == weights[0].nccl["update"]
    assert [call[1] for call in engine.calls if call[0] == "update_weight_version"] == ["1", "2"]


def test_worker_and_trainer_of_vllm_take_what_they_are_sent(tmp_path, exporter):
    """Their own dataclasses parse it: a changed signature of vLLM's shows here."""
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerInitInfo,
        NCCLWeightTransferInitInfo,
        NCCLWeightTransferUpdateInfo,
    )

    weights = exporter.export(1, [TENSORS])
    NCCLTrainerInitInfo(rank=0, **weights.nccl["group"])
    joined = NCCLWeightTransferInitInfo(rank_offset=1, packed=True, **weights.nccl["group"])
    assert joined.world_size == 7
    NCCLWeightTransferUpdateInfo(**weights.nccl["update"])
