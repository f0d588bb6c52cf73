"""New weights for vLLM's CPU engine while it runs: loaded and repacked in a second model, then handed over at once.

vLLM's CPU build keeps linear weights only in a repacked form (``cpu_linear``), and repacking takes far longer than
copying. Written for vLLM 0.32.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class ShadowModel:
    """A second instance of the engine's model. ``load`` may run on another thread while the engine generates."""

    def __init__(self, vllm_config: Any, model: nn.Module) -> None:
        """On the thread that runs the engine: building a model changes torch's default dtype for a while."""
        from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
        from vllm.utils.torch_utils import set_default_torch_dtype

        config = copy.copy(vllm_config)
        config.compilation_config = copy.copy(config.compilation_config)
        config.compilation_config.static_forward_context = {}  # where attention layers register, each name once
        self._config = vllm_config.model_config
        self._live = model
        with set_default_torch_dtype(self._config.dtype), torch.device("cpu"):
            self._model = initialize_model(config)
        _leave_out_shared(self._model, model)
        process_weights_after_loading(self._model, self._config, torch.device("cpu"))
        self._loaded: set[str] = set()
        self._retired: list[Any] = []

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load Hugging Face weights as vLLM's own reload does. ValueError if any is missing."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        self._retired.clear()
        initialize_layerwise_reload(self._model)
        self._loaded = self._model.load_weights(weights)
        finalize_layerwise_reload(self._model, self._config)
        if missing := {name for name, _ in self._model.named_parameters()} - self._loaded:
            raise ValueError(f"got no weights for {sorted(missing)}: export them as well")

    @torch.no_grad()
    def hand_over(self) -> None:
        """Put what was loaded into the engine's model, between two of its steps."""
        copied = set()
        for name in self._loaded:
            owner, _, attribute = name.rpartition(".")
            live, shadow = self._live.get_submodule(owner), self._model.get_submodule(owner)
            if "cpu_linear" in vars(live):
                # freed with the next load: giving back so much memory takes time
                self._retired.append(live.cpu_linear)
                live.cpu_linear = shadow.cpu_linear
            target = getattr(live, attribute)
            if id(target) not in copied:
                target.copy_(getattr(shadow, attribute))
                copied.add(id(target))


def can_be_shadowed(model: nn.Module) -> bool:
    """Whether all that loading leaves in ``model`` are parameters, buffers and ``cpu_linear``: a plain dense model."""
    from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    plain = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    return not hasattr(model, "process_weights_after_loading") and all(
        type(getattr(module, "quant_method", None)) in plain
        and (type(module) is Attention or not is_deferred_attention_layer(module))
        and all(weight.ndim <= 2 for weight in module.parameters(recurse=False))
        for module in model.modules()
    )


def _leave_out_shared(shadow: nn.Module, live: nn.Module) -> None:
    """Modules that vLLM gives to every model (rotary embeddings) hold no weights, and must not be touched."""
    shared = set(map(id, live.modules()))
    for module in list(shadow.modules()):
        for name, child in module._modules.items():
            if id(child) in shared:
                module._modules[name] = nn.Module()
