"""DeepSpeed's settings, as they follow from the configuration's."""

import torch
from torch import nn

from actors import engine_settings
from actors.engine_settings import EngineSettings
from ocrm_ray.config import Policy


def deepspeed_config(**policy):
    settings = EngineSettings.of(Policy(**policy), learning_rate=1e-3, dtype="float32")
    return engine_settings._deepspeed_config(list(nn.Linear(3, 2).parameters()), settings)


def test_settings_of_deepspeed_are_laid_over_ours_key_by_key():
    changes = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    plain, changed = deepspeed_config(zero_stage=2), deepspeed_config(zero_stage=2, deepspeed=changes)
    assert changed["zero_optimization"] == plain["zero_optimization"] | changes["zero_optimization"]
    assert changed == plain | {"zero_optimization": changed["zero_optimization"], "wall_clock_breakdown": True}
    assert plain["zero_optimization"]["reduce_bucket_size"] == 8


def test_offloading_names_what_goes_to_host_memory():
    on_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    optimizer = deepspeed_config(zero_stage=2, offload="optimizer")
    assert optimizer["zero_optimization"]["offload_optimizer"] == on_cpu
    assert "offload_param" not in optimizer["zero_optimization"]
    assert deepspeed_config(zero_stage=3, offload="all")["zero_optimization"]["offload_param"] == on_cpu
