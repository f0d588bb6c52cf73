"""The generation actor: one vLLM engine that samples, scores, and takes new weights while requests are running."""

import asyncio
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from actors import nccl_transport
from actors.request_desk import RequestDesk
from actors.shared_memory import shared_folder
from actors.vllm_worker import no_queue_left
from actors.weight_transport import LocalCopy
from ocrm_ray.config import GenerationPool, RunConfig
from ocrm_ray.errors import ActorDiedError, RunError
from ocrm_ray.records import FloatArray, GenerationRequest, PolicyWeights, PublishReport, Sample, Sequence
from ocrm_ray.weight_publisher import probe_position

Answer = TypeVar("Answer")

GIB = 1 << 30
PREFILL_TOKENS = 2048
"""Tokens that an engine takes in one step on CPU, at least the longest sequence."""
PREPARE_POLL_S = 0.01
"""Between questions whether an engine has new weights ready; each takes a moment of its time."""
DEATH_POLL_S = 0.1
"""Between looks whether an engine that takes weights is still there."""
SHUTDOWN_GRACE_S = 1.0
"""An engine has nothing to save; left alone, vLLM's CPU processes take longer than 5 s to end."""


def engine_environment(pool: GenerationPool) -> dict[str, str]:
    """Variables that must stand in the actor's environment before vLLM is imported.

    ``nobind`` leaves the placing of threads to the operating system: by default every engine of a node pins
    itself to the same cores. On CPU the engine runs eagerly, and without Dynamo it compiles no sampling
    function at its first request either, which takes seconds and a C++ compiler. Only without multiprocessing does
    vLLM let a CPU engine have its worker in its own process, which saves a third of a small model's time.
    """
    common = {
        "OMP_NUM_THREADS": str(pool.threads_per_actor),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    on_cpu = {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return common | on_cpu if pool.gpus_per_actor == 0 else common


@dataclass(eq=False)
class GenerationActor(RequestDesk):
    """One engine. Every method but the constructor runs on one event loop; ``start`` comes first.

    ``number``: of the engine in its pool. ``model_path``: a Hugging Face folder with tokenizer. ``max_model_len``:
    tokens of prompt and response. ``by_nccl``: how weights come. ``worker_extension``: dotted path, importable in the
    engine's processes through PYTHONPATH.
    """

    config: RunConfig
    number: int
    model_path: str
    max_model_len: int
    by_nccl: bool = False
    worker_extension: str = "actors.vllm_worker.WeightReceiver"

    def __post_init__(self) -> None:
        super().__init__()
        self._has_joined = False
        self._local_copy = LocalCopy()
        self._engine: Any = None
        self._engine_pid = 0
        self._score_ids = itertools.count()
        self._temporary = contextlib.ExitStack()

    @property
    def _pool(self) -> GenerationPool:
        return self.config.pools.generation

    async def start(self) -> None:
        """Start the engine with the folder's weights as version 0; blocks the event loop while it starts.

        Both request paths are used once, so that no later request pays for vLLM's first-use costs.
        """
        os.environ.update(engine_environment(self._pool))
        self._temporary.enter_context(_own_temporary_folder())
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(self._engine_args())
        self._engine_pid = (await self._engine.collective_rpc("watch_owner", args=(os.getpid(),)))[0]
        await self._engine.collective_rpc("start_receiving")
        await self._engine.update_weight_version("0")
        await self.score([Sequence(prompt_ids=(0,), response_ids=(0, 0), has_eos=False)])

    async def load_weights(self, weights: PolicyWeights) -> PublishReport:
        """Replace the weights in flight: running requests stand still, then go on under the new version.

        Their KV cache and all cached prefixes are dropped, since both were computed with the old weights. RunError
        if the engine cannot take the weights: before the pause it goes on with the old ones, later it stays paused.
        ActorDiedError if it dies meanwhile.
        """
        with _named(f"the engine could not take version {weights.version}"):
            return await self._unless_dead(self._take(weights))

    async def score(self, sequences: list[Sequence]) -> list[FloatArray]:
        """Log-probs [T] of the responses at temperature 1.

        The value at ``probe_position`` comes from a request that reads the prefix cache as sampling does; the
        others from one over the whole sequence, which vLLM answers without the cache. The first kind runs
        before the second, whose fresh blocks could hide stale ones.
        """
        cached = await asyncio.gather(*(self._score_cached(sequence) for sequence in sequences))
        scores = await asyncio.gather(*(self._score_afresh(sequence) for sequence in sequences))
        for sequence, score, value in zip(sequences, scores, cached, strict=True):
            score[probe_position(sequence)] = value
        return list(scores)

    async def sleep(self) -> None:
        """Once no request is running, free the GPU: the weights go to the host's memory, the KV cache is dropped."""
        with _named("the engine could not go to sleep"):
            await self._unless_dead(self._engine.sleep(level=1, mode="wait"))

    async def wake(self) -> None:
        """Be as before, with an empty KV cache; again: no effect."""
        with _named("the engine did not wake up"):
            await self._unless_dead(self._engine.wake_up())

    async def rest(self) -> None:
        """Drop what is running; the engine stays, for the next actor here."""
        await self.clear()

    async def renew(self, *arguments: Any) -> bool:
        """Be the actor of these ``arguments``, whose model may have other weights; False if it needs another engine.

        The engine's own seed stays: every request has one.
        """
        renewed = GenerationActor(*arguments)
        if self.by_nccl or renewed._engine_kind() != self._engine_kind():
            return False
        for field in fields(self):
            setattr(self, field.name, getattr(renewed, field.name))
        await self.load_weights(PolicyWeights(0, Path(self.model_path), 0))
        return True

    async def close(self) -> None:
        """Drop what is running and end the engine's processes."""
        await self.clear()
        self._local_copy.close()
        if self._engine is not None:
            with no_queue_left(self._engine_pid):
                self._engine.shutdown(timeout=SHUTDOWN_GRACE_S)
            self._engine = None
        self._temporary.close()

    def _engine_kind(self) -> tuple[Any, dict[str, str]]:
        """What is the same for engines that may differ in their weights alone."""
        described = {path.name: path.read_text("utf-8") for path in Path(self.model_path).glob("*config.json")}
        return replace(self._engine_args(), model="", seed=0), described

    def _engine_args(self) -> Any:
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs

        num_gpus, num_ranks = self._pool.gpus_per_actor, nccl_transport.ranks_per_engine(self._pool)
        on_cpu = num_gpus == 0
        return AsyncEngineArgs(
            model=self.model_path,
            dtype=self._pool.dtype,
            seed=self.config.seed + self.number,
            max_model_len=self.max_model_len,
            max_num_seqs=self._pool.max_running,
            load_format="safetensors",
            trust_remote_code=self.config.trust_remote_code,
            enforce_eager=on_cpu,
            # vLLM's CPU worker dies when the prompt of a seeded request is split: its generator cannot be set back
            enable_chunked_prefill=not on_cpu,
            max_num_batched_tokens=max(PREFILL_TOKENS, self.max_model_len) if on_cpu else None,
            enable_prefix_caching=not self.config.deterministic,  # what is cached is computed in other parts
            kv_cache_memory_bytes=int(self._pool.kv_cache_gib * GIB) if on_cpu else None,
            gpu_memory_utilization=self._pool.gpu_memory_share * (1.0 if on_cpu else min(1.0, num_gpus)),
            enable_sleep_mode=self._pool.sleeps,
            tensor_parallel_size=num_ranks,
            distributed_executor_backend="uni" if num_ranks == 1 else "mp",
            weight_transfer_config=WeightTransferConfig(backend="nccl") if self.by_nccl else None,
            logprobs_mode="processed_logprobs",
            worker_extension_cls=self.worker_extension,
            disable_log_stats=True,
        )

    async def _unless_dead(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """``work``, unless the engine dies: vLLM then fails its requests, but never answers its other calls."""
        working = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({working}, timeout=DEATH_POLL_S))[0]:
                if self._engine.errored:
                    raise self._engine.dead_error
            return working.result()
        finally:
            working.cancel()

    async def _take(self, weights: PolicyWeights) -> PublishReport:
        started = time.monotonic()
        local = await self._local_copy.fetch(weights)
        fetched = time.monotonic()
        checked_s, repack_s = await self._prepare(local)
        paused = time.monotonic()
        # as pause_generation, without its 20 ms of sleep for outputs on their way
        await self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
        if weights.nccl is None:
            repack_s += max(await self._engine.collective_rpc("take_weights"))
        else:
            await nccl_transport.receive(self._engine, weights)
        await self._engine.update_weight_version(str(weights.version))
        await self._engine.resume_generation()
        ended = time.monotonic()
        transfer_s, seconds, pause_s = fetched - started + checked_s, ended - started, ended - paused
        return PublishReport(weights.version, weights.num_bytes, seconds, pause_s, transfer_s, repack_s)

    async def _prepare(self, weights: PolicyWeights) -> tuple[float, float]:
        """Everything that can be done while the engine generates; seconds of (checking, repacking)."""
        if weights.nccl is not None:
            if not self._has_joined:
                first_rank = 1 + self.number * nccl_transport.ranks_per_engine(self._pool)
                await nccl_transport.join(self._engine, weights, first_rank)
                self._has_joined = True
            return 0.0, 0.0
        await self._engine.collective_rpc(
            "prepare_weights", args=(weights.version, str(weights.path), weights.checksum)
        )
        while None in (prepared := await self._engine.collective_rpc("weights_prepared")):
            await asyncio.sleep(PREPARE_POLL_S)
        return max(checked for checked, _ in prepared), max(repacked for _, repacked in prepared)

    async def sample(self, request: GenerationRequest) -> tuple[Sample, ...]:
        params = {
            "n": request.num_samples,
            "seed": request.seed,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "max_tokens": request.max_new_tokens,
            "logprobs": 0,
            "flat_logprobs": True,
        }
        output = await self._run(request.prompt.token_ids, params, request.request_id)
        return tuple(_sample_of(request, completion) for completion in output.outputs)

    async def _score_cached(self, sequence: Sequence) -> float:
        position = probe_position(sequence)
        params = {"max_tokens": 1, "logprob_token_ids": [sequence.response_ids[position]]}
        output = await self._run(sequence.prompt_ids + sequence.response_ids[:position], params)
        return float(output.outputs[0].logprobs[0][sequence.response_ids[position]].logprob)

    async def _score_afresh(self, sequence: Sequence) -> FloatArray:
        """The last token is scored as a continuation: a prompt of ``max_model_len`` tokens would be refused."""
        token = sequence.response_ids[-1]
        params = {"max_tokens": 1, "logprob_token_ids": [token], "prompt_logprobs": 0}
        tokens = sequence.prompt_ids + sequence.response_ids[:-1]
        output = await self._run(tokens, params)
        response = range(len(sequence.prompt_ids), len(tokens))
        values = [output.prompt_logprobs[index][tokens[index]].logprob for index in response]
        return np.array([*values, output.outputs[0].logprobs[0][token].logprob], dtype=np.float32)

    async def _run(self, tokens: tuple[int, ...], params: dict[str, Any], request_id: str | None = None) -> Any:
        """One request to vLLM; its final output. RunError if it fails, ActorDiedError if the engine is dead."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        request_id = request_id or f"score-{next(self._score_ids)}"
        assert tokens, f"request {request_id} has an empty prompt"
        sampling = SamplingParams(**params, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        final = None
        with _named(f"request {request_id}"):
            async for output in self._engine.generate(tokens_input(list(tokens)), sampling, request_id):
                final = output
        return final


def _sample_of(request: GenerationRequest, completion: Any) -> Sample:
    """vLLM keeps the EOS that ended a response in ``token_ids``; every EOS of the model's folder ends with "stop"."""
    if completion.finish_reason not in ("stop", "length"):
        raise RunError(f"request {request.request_id}: vLLM ended it with {completion.finish_reason!r}")
    spans, logprobs = completion.weight_versions, completion.logprobs
    values = np.array([logprobs.logprobs[start] for start in logprobs.start_indices], dtype=np.float32)
    has_eos = completion.finish_reason == "stop"
    sequence = Sequence(request.prompt.token_ids, tuple(completion.token_ids), has_eos)
    return Sample(sequence, values, first_version=int(spans[0].version), last_version=int(spans[-1].version))


@contextlib.contextmanager
def _own_temporary_folder() -> Iterator[None]:
    """For the sockets and files of vLLM, which it leaves behind."""
    usual = tempfile.gettempdir()
    with shared_folder("engine", Path(usual)) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            os.environ["TMPDIR"] = tempfile.tempdir = usual


@contextlib.contextmanager
def _named(failure: str) -> Iterator[None]:
    """Turn what vLLM raises, which does not survive pickling, into ours: a report that its processes are gone too."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise ActorDiedError("the vLLM engine died: its log is in this actor's standard error") from error
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{failure}: {error!r}") from error
