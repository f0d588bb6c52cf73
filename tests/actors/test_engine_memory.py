"""The memory model against the tensors of real DeepSpeed engines, of one rank."""

import gc

import pytest
import torch
from tiny_models import EOS, llama_config, pad_batch, random_pairs

from actors.engine_settings import MAX_BUCKET_SIZE, EngineSettings
from actors.training_engine import TrainingEngine
from actors.weight_transport import NUM_SEGMENTS
from ocrm_ray.config import Lora
from ocrm_ray.memory import BUCKET, NUM_EXPORTS, Training, adapted, layers_of
from ocrm_ray.networks import DTYPES, ScalarModel, last_token_scores

pytestmark = pytest.mark.real

BATCH = pad_batch([pair.chosen for pair in random_pairs(12, seed=1)], EOS)


def test_constants_of_the_model_are_those_of_the_actors():
    assert (BUCKET, NUM_EXPORTS) == (MAX_BUCKET_SIZE, NUM_SEGMENTS)


def storages():
    """A tensor of every storage that this process holds, by address: while it is kept, none else gets that address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}


@pytest.mark.parametrize("lora", [None, Lora(rank=24), Lora(rank=24, targets=("v_proj", "o_proj", "up_proj"))])
@pytest.mark.parametrize(
    ("zero_stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (0, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")],
)
def test_an_engine_holds_before_a_step_what_its_parts_sum_to(zero_stage, dtype, lora):
    from transformers import LlamaForSequenceClassification

    before = storages()
    config = llama_config(num_labels=1, hidden_size=128, intermediate_size=512, pad_token_id=EOS)
    network = LlamaForSequenceClassification(config).to(DTYPES[dtype])
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    engine = TrainingEngine(ScalarModel(network), EngineSettings(1e-3, 1.0, zero_stage, dtype, lora=lora))
    for number in range(2):
        engine.accumulate([BATCH], lambda batch: last_token_scores(engine.forward, batch).square().mean())
        if number == 0:
            engine.step(1.0)
    held = sum(found.untyped_storage().nbytes() for at, found in storages().items() if at not in before)
    engine.close()
    num_adapted = adapted(lora, layers_of(config.to_dict()))
    parts = Training(dtype, zero_stage, 1, False, 0, num_adapted).parts(num_parameters, None)
    del parts["activations"]
    assert sum(parts.values()) == pytest.approx(held, rel=0.01)
