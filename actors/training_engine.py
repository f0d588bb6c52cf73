"""One trained network in a DeepSpeed engine: exact gradient accumulation, fresh optimisers, full weights out.

Several engines may live in one process (policy and critic, or one refit after another); they share its process group.
"""

import contextlib
import gc
import io
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from ocrm_ray.config import Dtype, Policy, Pool, RunConfig
from ocrm_ray.errors import RunError
from ocrm_ray.networks import CausalModel, ScalarModel, checkpoint_layers, save_model

ADAM_BETA1 = 0.9
NEVER = 10**12
MAX_BUCKET_SIZE = 500_000_000
"""Of ZeRO's collectives, in elements: DeepSpeed's default."""
MASTERS, MOMENTS = "weights", ("exp_avg", "exp_avg_sq")
Part = TypeVar("Part")


@dataclass(frozen=True)
class EngineState:
    """Of an engine: optimiser steps, and float32 masters and moments on the CPU by kind and parameter."""

    num_steps: int
    tensors: dict[str, dict[str, Tensor]]
    weights: dict[str, Tensor] | None = None
    """Of the network, as its model folder holds them; None: they are loaded already."""


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

    @classmethod
    def of(cls, policy: Policy, **chosen: Any) -> "EngineSettings":
        """As the policy's, where nothing else is ``chosen``."""
        grad_norm, checkpointing = policy.max_grad_norm, policy.gradient_checkpointing
        shared = {"max_grad_norm": grad_norm, "zero_stage": policy.zero_stage, "checkpointing": checkpointing}
        return cls(**(shared | chosen))

    @property
    def is_plain(self) -> bool:
        """Whether DeepSpeed leaves gradients in the module, and so clipping (whose norm it would keep) to us."""
        return self.zero_stage == 0 and self.dtype == "float32"


def start_process(config: RunConfig, pool: Pool) -> None:
    """Once at an actor's start: arithmetic threads, the seed of whatever draws from torch's global generator."""
    torch.set_num_threads(pool.threads_per_actor)
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(config.deterministic)


def training_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def join_process_group() -> None:
    """Join the group that RANK, WORLD_SIZE and MASTER_* describe; alone without them, and then without a port."""
    if torch.distributed.is_initialized():
        return
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if on_gpu else "gloo"
    if int(os.environ["WORLD_SIZE"]) == 1:
        # A rendezvous by address could collide with another run's port; a store in memory cannot.
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        torch.distributed.init_process_group(backend, init_method="env://")


class TrainingEngine:
    """A network that trains: ``accumulate`` losses of what ``engine.forward`` gives, then ``step``."""

    def __init__(self, module: CausalModel | ScalarModel, settings: EngineSettings) -> None:
        """``module`` is taken over; its parameters are moved, cast and (ZeRO 3) partitioned."""
        join_process_group()
        if settings.checkpointing:
            checkpoint_layers(module)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
        self._settings = settings
        self._engine = _initialise(module, settings)
        self.device: torch.device = self._engine.device
        self._module = module
        # DeepSpeed casts buffers with the weights: rotary frequencies in bfloat16 misplace tokens by whole positions.
        for name, buffer in buffers.items():
            owner = module.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = buffer.to(self.device)
        self.reset_optimizer()

    @property
    def forward(self) -> Callable[..., Any]:
        """The network, to be called like the module itself; gradients of what it returns go to ``accumulate``."""
        engine: Callable[..., Any] = self._engine
        return engine

    @property
    def module(self) -> Any:
        """The module without DeepSpeed around it: what ``gradients`` differentiates. Not for ZeRO 3."""
        return self._module

    @property
    def network(self) -> Any:
        """The Hugging Face network inside."""
        return self._module.network

    def accumulate(self, parts: Seq[Part], loss_of: Callable[[Part], Tensor], coefficient: float = 1.0) -> float:
        """Add the gradients of an optimiser batch's parts, times ``coefficient``; returns the sum of their losses."""
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(parts, start=1):
            loss = loss_of(part)
            self._engine.set_gradient_accumulation_boundary(number == len(parts))
            self._engine.backward(coefficient * loss)
            if number < len(parts):
                self._engine.step()
            total += loss.detach().to(self.device)
        return total.item()

    def gradients(self, parts: Seq[Part], loss_of: Callable[[Part], Tensor]) -> list[Tensor]:
        """Of the parts' summed losses, from ``module``, by every parameter, in float32; nothing else changes."""
        parameters = list(self._module.parameters())
        totals = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for part in parts:
            for total, found in zip(totals, torch.autograd.grad(loss_of(part), parameters), strict=True):
                total += found
        return totals

    @contextlib.contextmanager
    def moved(self, moves: Seq[Tensor]) -> Iterator[None]:
        """Inside, every weight has been moved; after it, each is bit for bit what it was. Not for ZeRO 3."""
        parameters = list(self._module.parameters())
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.data.copy_(parameter.data.float() + move)
            yield
        finally:
            for parameter, old in zip(parameters, kept, strict=True):
                parameter.data.copy_(old)

    def second_moments(self) -> list[Tensor] | None:
        """AdamW's, by parameter and without their bias towards 0; None before a fresh optimiser's first step."""
        if self._num_steps == 0:
            return None
        found = (self._moment(parameter, "exp_avg_sq") for parameter in self._module.parameters())
        return [moment / (1 - self._settings.beta2**self._num_steps) for moment in found]

    def capture(self) -> EngineState:
        """A copy of everything that ``restore`` needs, masters where weights are rounded."""
        named = list(self._module.named_parameters())
        tensors: dict[str, dict[str, Tensor]] = {}
        if not self._settings.is_plain:
            from deepspeed.utils import safe_get_full_fp32_param

            tensors[MASTERS] = {name: safe_get_full_fp32_param(parameter).cpu() for name, parameter in named}
        if self._num_steps:
            for kind in MOMENTS:
                tensors[kind] = {
                    name: self._moment(parameter, kind).to("cpu", copy=self._settings.is_plain)
                    for name, parameter in named
                }
        with self.weights() as full:
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in full.items()}
        return EngineState(self._num_steps, tensors, weights)

    def restore(self, state: EngineState) -> None:
        """Go on as the engine went on that ``state`` was captured from; its (rounded) weights are loaded already."""
        named = dict(self._module.named_parameters())
        if MASTERS in state.tensors:
            from deepspeed.utils import safe_set_full_fp32_param

            for name, value in state.tensors[MASTERS].items():
                safe_set_full_fp32_param(named[name], value.to(self.device))
        self.reset_optimizer()
        self._num_steps = state.num_steps
        if not state.num_steps:
            return
        self._make_moments()
        for kind in MOMENTS:
            for name, value in state.tensors[kind].items():
                self._set_moment(named[name], kind, value.to(self.device))

    def _moment(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if self._settings.is_plain:
            found: Tensor = self._engine.basic_optimizer.state[parameter][kind]
            return found
        from deepspeed.utils import safe_get_full_optimizer_state

        whole: Tensor = safe_get_full_optimizer_state(parameter, kind)
        return whole

    def _set_moment(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        if self._settings.is_plain:
            self._engine.basic_optimizer.state[parameter][kind].copy_(value)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, kind)

    def _make_moments(self) -> None:
        """Moments of 0, as AdamW makes them at its first step, for what it updates: with ZeRO, flat partitions."""
        optimizer = self._engine.basic_optimizer
        if self._settings.zero_stage == 3:
            partitions = self._engine.optimizer.fp32_partitioned_groups_flat
        else:
            partitions = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for partition in partitions:
            step = torch.tensor(float(self._num_steps), device=partition.device)
            optimizer.state[partition] = {"step": step, **{kind: torch.zeros_like(partition) for kind in MOMENTS}}
        if hasattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def step(self, factor: float) -> float:
        """Clip, update at ``factor`` times the learning rate, clear; returns the gradient norm before clipping.

        Where the gradient is not finite nothing changes, and NaN is returned; RunError after too many in a row.
        """
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = factor * self._settings.learning_rate
        if self._settings.is_plain:
            norm = float(torch.nn.utils.clip_grad_norm_(self._module.parameters(), self._settings.max_grad_norm))
            if not math.isfinite(norm):  # DeepSpeed skips such a step only where it clips
                self._module.zero_grad(set_to_none=True)
            self._engine.step()
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
        if math.isfinite(norm) and norm >= 0:
            self._num_steps += 1
            self._num_skipped = 0
            return norm
        self._num_skipped += 1
        if self._num_skipped > self._settings.max_skipped_steps:
            raise RunError("the gradient is not finite: lower the learning rate, or look for scores that are not")
        return math.nan

    def reset_optimizer(self) -> None:
        """Forget the optimiser's moments, as if the engine had just been made of the present weights."""
        self._engine.basic_optimizer.state.clear()
        if hasattr(self._engine.optimizer, "_hp_optimizer_states_linked"):
            # else DeepSpeed's accessors go on reading the moments that are forgotten here
            self._engine.optimizer._hp_optimizer_states_linked = False
        self._num_steps = 0
        self._num_skipped = 0

    @contextlib.contextmanager
    def weights(self) -> Iterator[dict[str, Tensor]]:
        """The network's full weights where they lie, under its own names, tied ones under each: valid inside."""
        if self._settings.zero_stage < 3:
            yield self.network.state_dict()
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self._module.parameters())):
            yield self.network.state_dict()

    def save(self, tokenizer: Any, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the network, with its present weights or with ``state``, as a Hugging Face folder."""
        # At ZeRO 3 the module itself is without them.
        with self.weights() if state is None else contextlib.nullcontext(state) as full:
            save_model(self._module, tokenizer, folder, state_dict=full)

    def close(self) -> None:
        """Free what DeepSpeed holds for this engine; the process group stays."""
        self._engine.destroy()
        del self._engine, self._module
        gc.collect()


def _initialise(module: nn.Module, settings: EngineSettings) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if (built := Path(sys.prefix) / "torch_extensions").is_dir():  # with this environment's torch, by its set-up
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(built))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    betas, decay = (ADAM_BETA1, settings.beta2), settings.weight_decay
    optimizer = torch.optim.AdamW(module.parameters(), settings.learning_rate, betas, weight_decay=decay, fused=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how much memory there is
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=_deepspeed_config(module, settings))
    return engine


def _deepspeed_config(module: nn.Module, settings: EngineSettings) -> dict[str, Any]:
    """Batch sizes are 1 because callers say where an optimiser batch ends."""
    # DeepSpeed allocates whole buckets, by default 2 GB each however small the model is
    bucket_size = min(sum(parameter.numel() for parameter in module.parameters()), MAX_BUCKET_SIZE)
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
    return config
