"""One trained network in a DeepSpeed engine: exact gradient accumulation, fresh optimisers, full weights out.

Several engines may live in one process (policy and critic, or one refit after another); they share its process group.
Where that has several ranks, all of them make every call here, in one order; losses are parts of the ranks' sum.
"""

import contextlib
import gc
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from actors.engine_settings import EngineSettings, initialise
from ocrm_ray import ranks
from ocrm_ray.config import Pool, RunConfig
from ocrm_ray.errors import RunError
from ocrm_ray.lora import adapter_of, add_adapters, merged, merged_name
from ocrm_ray.networks import CausalModel, ScalarModel, checkpoint_layers, idle_loss, save_model

GATHERED_BYTES = 2**28
"""Of the weights that ZeRO 3 spreads over ranks, what is put together at once; a larger tensor alone."""
MASTERS, MOMENTS = "weights", ("exp_avg", "exp_avg_sq")
Part = TypeVar("Part")
Copied = Callable[[str, Tensor], Tensor]
"""A copy on the CPU of the tensor of that name."""


@dataclass(frozen=True)
class EngineState:
    """Of an engine: optimiser steps, and float32 masters and moments on the CPU by kind and parameter.

    As captured, a rank has every n-th parameter's; to be restored it needs those of all.
    """

    num_steps: int
    tensors: dict[str, dict[str, Tensor]]
    weights: dict[str, Tensor] | None = None
    """Of the network, as its model folder holds them, on rank 0; None: they are loaded already."""


def start_process(config: RunConfig, pool: Pool) -> None:
    """Once at an actor's start: arithmetic threads, the seed of whatever draws from torch's global generator."""
    torch.set_num_threads(pool.threads_per_actor)
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(config.deterministic)


def training_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def join_process_group(timeout_s: float | None = None) -> None:
    """Join the group that RANK, WORLD_SIZE and MASTER_* describe; alone without them, and then without a port.

    ``timeout_s``: of its collectives; None: torch's own.
    """
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
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        torch.distributed.init_process_group(backend, init_method="env://", timeout=timeout)


class TrainingEngine:
    """A network that trains: ``accumulate`` losses of what ``engine.forward`` gives, then ``step``."""

    def __init__(self, module: CausalModel | ScalarModel, settings: EngineSettings) -> None:
        """``module`` is taken over; its parameters are moved, cast and (ZeRO 3) partitioned."""
        join_process_group()
        if settings.lora is not None:
            add_adapters(module.network, settings.lora)
        if settings.checkpointing:
            checkpoint_layers(module)
        module.network.in_step = settings.zero_stage == 3 and ranks.num_ranks() > 1
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
        self._settings = settings
        self._engine = initialise(module, settings)
        self.device: torch.device = self._engine.device
        self._module = module
        self._copies: dict[str, Tensor] = {}
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
        """The module without DeepSpeed around it: what ``gradients`` differentiates, but not at ZeRO 3."""
        return self._module

    @property
    def network(self) -> Any:
        """The Hugging Face network inside."""
        return self._module.network

    def accumulate(self, parts: Seq[Part], loss_of: Callable[[Part], Tensor], coefficient: float = 1.0) -> float:
        """Add the gradients of an optimiser batch's parts, times ``coefficient``; returns the sum of their losses.

        ``parts`` are this rank's; the sum is that of all ranks.
        """
        total = torch.zeros((), device=self.device)
        num_passes = ranks.largest(len(parts))
        for number in range(num_passes):
            loss = loss_of(parts[number]) if number < len(parts) else idle_loss(self._module, self._engine)
            is_last = number == num_passes - 1
            self._engine.set_gradient_accumulation_boundary(is_last)
            self._engine.backward(ranks.num_ranks() * coefficient * loss)  # DeepSpeed takes the ranks' mean
            if not is_last:
                self._engine.step()
            total += loss.detach().to(self.device)
        return ranks.add_up(total).item()

    def gradients(self, parts: Seq[Part], loss_of: Callable[[Part], Tensor]) -> list[Tensor]:
        """Of the losses of all ranks' parts together, from ``module``, by every trained parameter, in float32; nothing
        else changes."""
        parameters = list(self._trained().values())
        totals = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for part in parts:
            for total, found in zip(totals, torch.autograd.grad(loss_of(part), parameters), strict=True):
                total += found
        return [ranks.add_up(total) for total in totals]

    @contextlib.contextmanager
    def moved(self, moves: Seq[Tensor]) -> Iterator[None]:
        """Inside, every trained weight has been moved; after it, each is bit for bit what it was. Not for ZeRO 3."""
        parameters = list(self._trained().values())
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
        found = (self._whole(parameter, "exp_avg_sq") for parameter in self._trained().values())
        return [moment / (1 - self._settings.beta2**self._num_steps) for moment in found]

    def capture(self) -> EngineState:
        """A copy of everything that ``restore`` needs, masters where the weights that leave are rounded or merged.

        It is good until the next one, which is made in the same memory: memory that has been free meanwhile costs more
        than the copy, most of all in virtual machines that give it back to their host.
        """
        kinds = [kind for kind in self._kinds() if self._num_steps or kind not in MOMENTS]
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        for number, (name, parameter) in enumerate(self._trained().items()):
            for kind, kept in tensors.items():
                whole = self._whole(parameter, kind)
                if number % ranks.num_ranks() == ranks.rank():
                    kept[name] = self._copied(f"{kind} of {name}", whole)
        return EngineState(self._num_steps, tensors, self.weights(self._copied))

    def reserve(self) -> None:
        """Take the memory of captures, and make the system really give it: beside training that would take longer."""
        shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in self._trained().items()}
        zero = torch.zeros((), dtype=torch.float32)
        for name in list(shapes)[ranks.rank() :: ranks.num_ranks()]:
            for kind in self._kinds():
                self._copied(f"{kind} of {name}", zero.expand(shapes[name]))
        self.weights(self._copied)

    def restore(self, state: EngineState) -> None:
        """Go on as the engine went on that ``state`` was captured from; its (rounded) weights, where they are not those
        of adapters, are loaded already."""
        named = self._trained()
        for name, value in state.tensors.get(MASTERS, {}).items():
            if not self._settings.is_plain:
                self._set_whole(named[name], MASTERS, value.to(self.device))
            if self._settings.lora is not None:
                self._set_rounded(named[name], value.to(self.device))
        self.reset_optimizer()
        self._num_steps = state.num_steps
        if not state.num_steps:
            return
        self._make_moments()
        for kind in MOMENTS:
            for name, value in state.tensors[kind].items():
                self._set_whole(named[name], kind, value.to(self.device))

    def _kinds(self) -> tuple[str, ...]:
        """What a capture has of each trained parameter; moments come with the first step."""
        return MOMENTS if self._settings.is_plain and self._settings.lora is None else (MASTERS, *MOMENTS)

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._copies:
            self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return self._copies[name].copy_(tensor)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self._module.named_parameters() if parameter.requires_grad}

    def _whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The parameter's master or a moment, put together from the ranks' parts."""
        if self._settings.is_plain:
            found: Tensor = parameter if kind == MASTERS else self._engine.basic_optimizer.state[parameter][kind]
            return found.detach()
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole: Tensor
        if kind == MASTERS:
            whole = safe_get_full_fp32_param(parameter)
        else:
            whole = safe_get_full_optimizer_state(parameter, kind)
        return whole

    def _set_whole(self, parameter: Any, kind: str, value: Tensor) -> None:
        """Each rank takes its part."""
        if self._settings.is_plain:
            self._engine.basic_optimizer.state[parameter][kind].copy_(value)
            return
        from deepspeed import utils

        form, arguments = "full", (value,)
        if self._settings.zero_stage == 3:  # DeepSpeed's own cut fails where a rank's part is padded
            form, arguments = "local", (_own_part(parameter, value),)
        if kind == MASTERS:
            getattr(utils, f"safe_set_{form}_fp32_param")(parameter, *arguments)
        else:
            getattr(utils, f"safe_set_{form}_optimizer_state")(parameter, *arguments, kind)

    def _set_rounded(self, parameter: Any, value: Tensor) -> None:
        """The weight that forward passes use."""
        if self._settings.zero_stage == 3:
            parameter.ds_tensor.data.copy_(_own_part(parameter, value))
        else:
            parameter.data.copy_(value)

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

    def layout(self) -> dict[str, Tensor]:
        """Names, shapes and types of the network's full weights, tied ones under each name; no data."""
        named = self._leaving()
        shapes = {name: getattr(tensor, "ds_shape", tensor.shape) for name, (_, tensor) in named.items()}
        return {name: torch.empty(shapes[name], dtype=named[name][1].dtype, device="meta") for name in named}

    def buckets(self) -> Iterator[dict[str, Tensor]]:
        """The network's full weights as in ``layout``, where they lie: at ZeRO 3, and with adapters to merge, some at a
        time, until the next are asked for."""
        if self._settings.zero_stage < 3 and self._settings.lora is None:
            yield self.network.state_dict()
            return
        named = self._leaving()
        for names in _cut({name: tensor.nbytes for name, tensor in self.layout().items()}):
            with self._gathered([named[name] for name in names]):
                yield {name: merged(self.network, *named[name]).detach() for name in names}

    def _leaving(self) -> dict[str, tuple[str, Tensor]]:
        """Weights by their names in a model folder: the name in the network, and what is there under it."""
        found = self.network.state_dict(keep_vars=True).items()
        return {name: (source, tensor) for source, tensor in found if (name := merged_name(source)) is not None}

    def _gathered(self, leaving: Seq[tuple[str, Tensor]]) -> contextlib.AbstractContextManager[None]:
        """Inside, these weights and their adapters are whole."""
        if self._settings.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        adapters = [part for source, _ in leaving for part in adapter_of(self.network, source)]
        gathered: contextlib.AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
            [*(weight for _, weight in leaving), *adapters]
        )
        return gathered

    def weights(self, copied: Copied = lambda _, tensor: tensor.to("cpu", copy=True)) -> dict[str, Tensor]:
        """A copy of the full weights on rank 0's CPU, tied ones once under all names; nothing elsewhere."""
        if ranks.rank() > 0:
            self.take_part()
            return {}
        identity = {name: id(tensor) for name, (_, tensor) in self._leaving().items()}
        copies: dict[int, Tensor] = {}
        for bucket in self.buckets():
            for name, tensor in bucket.items():
                if identity[name] not in copies:
                    copies[identity[name]] = copied(name, tensor)
        return {name: copies[each] for name, each in identity.items()}

    def take_part(self) -> None:
        """In what rank 0 does with ``buckets``."""
        deque(self.buckets(), maxlen=0)

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Rank 0 writes the network as it is, as a Hugging Face folder."""
        write_model(self._module, tokenizer, folder, self.weights())

    def close(self) -> None:
        """Free what DeepSpeed holds for this engine; the process group stays."""
        self._engine.destroy()
        del self._engine, self._module
        gc.collect()


def write_model(module: Any, tokenizer: Any, folder: Path, weights: dict[str, Tensor]) -> None:
    """Rank 0 writes an engine's module, with these full weights of it, as a Hugging Face folder."""
    if ranks.rank() == 0:
        save_model(module, tokenizer, folder, state_dict=weights)


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """What of a whole value this rank has at ZeRO 3, padded as there."""
    size = parameter.ds_tensor.numel()
    own = value.flatten()[size * ranks.rank() : size * (ranks.rank() + 1)]
    return nn.functional.pad(own, (0, size - len(own)))


def _cut(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in order, so many together as have ``GATHERED_BYTES``."""
    parts: list[list[str]] = []
    num_bytes = 0
    for name, size in sizes.items():
        if not parts or num_bytes + size > GATHERED_BYTES:
            parts.append([])
            num_bytes = 0
        parts[-1].append(name)
        num_bytes += size
    return parts
