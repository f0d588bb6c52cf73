"""LoRA (arXiv 2106.09685) on a Hugging Face network, by peft: its adapters, and the weights that they make."""

from typing import Any

import torch
from torch import Tensor, nn

from ocrm_ray.config import Lora
from ocrm_ray.errors import RunError

_ADAPTER = "default"
_BASE, _PART = ".base_layer.", ".lora_"
"""In peft's names: of a layer beside which there is an adapter, and of that adapter."""


def add_adapters(network: Any, lora: Lora) -> None:
    """From now on only adapters, which change nothing yet, and a scalar head learn. RunError where no layer matches.

    The same adapters in every process: no random state counts, and none is changed.
    """
    from peft import LoraConfig, TaskType, inject_adapter_in_model

    head = getattr(network, "score", None)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets) or "all-linear",
        task_type=TaskType.CAUSAL_LM if head is None else TaskType.SEQ_CLS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            inject_adapter_in_model(settings, network, adapter_name=_ADAPTER)
        except ValueError as error:
            raise RunError(f"lora.targets {list(lora.targets)}: {error}") from error
    if head is not None:
        head.requires_grad_(True)


def merged_name(name: str) -> str | None:
    """Of a parameter in a model folder; None for a part of an adapter."""
    return None if _PART in name else name.replace(_BASE, ".")


def adapter_of(network: nn.Module, name: str) -> list[nn.Parameter]:
    """The parts of the adapter beside the weight ``name``; none where there is no adapter."""
    owner, base, kind = name.rpartition(_BASE)
    if not base or kind != "weight":
        return []
    return [part for each, part in network.get_submodule(owner).named_parameters() if _PART in f".{each}"]


@torch.no_grad()
def merged(network: nn.Module, name: str, weight: Tensor) -> Tensor:
    """The weight ``name`` with its adapter; as it is where there is none."""
    if not adapter_of(network, name):
        return weight
    layer: Any = network.get_submodule(name.rpartition(_BASE)[0])
    product: Tensor = layer.get_delta_weight(_ADAPTER)
    return weight + product.to(weight.dtype)
