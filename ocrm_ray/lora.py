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
    layer = _adapted_layer(network, name)
    return [] if layer is None else [part for each, part in layer.named_parameters() if _PART in f".{each}"]


@torch.no_grad()
def merged(network: nn.Module, name: str, weight: Tensor) -> Tensor:
    """The weight ``name`` with its adapter; as it is where there is none."""
    layer = _adapted_layer(network, name)
    return weight if layer is None else weight + layer.get_delta_weight(_ADAPTER).to(weight.dtype)


def _adapted_layer(network: nn.Module, name: str) -> Any:
    """peft's layer whose weight is ``name``; None where that weight has no adapter."""
    owner, base, kind = name.rpartition(_BASE)
    return network.get_submodule(owner) if base and kind == "weight" else None
