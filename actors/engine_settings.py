"""What a network is trained with: the settings of its optimiser, and those of DeepSpeed that follow from them."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ocrm_ray.config import Dtype, Lora, Policy

ADAM_BETA1 = 0.9
NEVER = 10**12
MAX_BUCKET_SIZE = 500_000_000
"""Of ZeRO's collectives, in elements: DeepSpeed's default."""

# DeepSpeed calls collectives by names that torch is about to change.
warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Of AdamW and DeepSpeed; ``learning_rate`` is the peak that each step's factor scales."""

    learning_rate: float
    max_grad_norm: float
    zero_stage: int
    dtype: Dtype
    weight_decay: float = 0.0
    beta2: float = 0.999
    checkpointing: bool = False
    max_skipped_steps: int = 0
    """In a row, before RunError."""
    offload: str = "none"
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """Laid over the settings made here."""
    lora: Lora | None = None

    @classmethod
    def of(cls, policy: Policy, **chosen: Any) -> "EngineSettings":
        """As the policy's, where nothing else is ``chosen``."""
        grad_norm, checkpointing = policy.max_grad_norm, policy.gradient_checkpointing
        shared = {"max_grad_norm": grad_norm, "zero_stage": policy.zero_stage, "checkpointing": checkpointing}
        return cls(**(shared | {"offload": policy.offload, "deepspeed": policy.deepspeed} | chosen))

    @property
    def is_plain(self) -> bool:
        """Whether DeepSpeed leaves gradients in the module, and so clipping (whose norm it would keep) to us."""
        return self.zero_stage == 0 and self.dtype == "float32"


def initialise(module: nn.Module, settings: EngineSettings) -> Any:
    """DeepSpeed's engine around the module."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if (built := Path(sys.prefix) / "torch_extensions").is_dir():  # with this environment's torch, by its set-up
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(built))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    betas, decay = (ADAM_BETA1, settings.beta2), settings.weight_decay
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, betas, weight_decay=decay, fused=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how much memory there is
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=_deepspeed_config(trained, settings)
        )
    return engine


def _deepspeed_config(trained: Sequence[nn.Parameter], settings: EngineSettings) -> dict[str, Any]:
    """Batch sizes are 1 because callers say where an optimiser batch ends."""
    # DeepSpeed allocates whole buckets, by default 2 GB each however small the model is
    bucket_size = min(sum(parameter.numel() for parameter in trained), MAX_BUCKET_SIZE)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if settings.is_plain else settings.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": settings.zero_stage,
            "reduce_bucket_size": bucket_size,
            "allgather_bucket_size": bucket_size,
        },
        "steps_per_print": NEVER,
    }
    if settings.dtype == "bfloat16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        # Without ZeRO DeepSpeed adds bfloat16 gradients up in bfloat16; stage 2 copies them twice more than stage 1.
        config["zero_optimization"]["stage"] = max(1, settings.zero_stage)
    if settings.offload != "none":
        config["zero_force_ds_cpu_optimizer"] = False
        for what in ("optimizer", "param") if settings.offload == "all" else ("optimizer",):
            config["zero_optimization"][f"offload_{what}"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return _laid_over(config, settings.deepspeed)


def _laid_over(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _laid_over(config[key], changes[key]) for key in changes if isinstance(config.get(key), dict)}
    return {**config, **changes, **both}
