"""The generation actor with a real engine: one tiny Llama, started once for the module."""

import asyncio
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tiny_models import run_config

from actors.weight_transport import WeightExporter
from ocrm_ray.config import Probe
from ocrm_ray.errors import ActorDiedError, RunError, StaleWeightsError
from ocrm_ray.records import FloatArray, GenerationRequest, PolicyWeights, Prompt, PublishReport, Sample, Sequence
from ocrm_ray.weight_publisher import Gap, WeightPublisher

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 48
EOS_IDS = (1, 2)
MAX_MODEL_LEN = 512
LONG_PROMPT = 200
"""Longer than one block of the prefix cache on CPU (128 tokens)."""


def _save_tiny_llama(folder: Path):
    """A tied Llama with head_dim 32 and two EOS ids; its wide initialisation makes every token depend on context."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<eot>", *(f"w{index}" for index in range(VOCAB_SIZE - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=MAX_MODEL_LEN,
            tie_word_embeddings=True,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=EOS_IDS[0],
            pad_token_id=0,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=list(EOS_IDS), pad_token_id=0)
    model.save_pretrained(folder)
    return model.eval()


class TorchPolicy:
    """The PolicyPool of these tests: the tiny Llama in this process, and random steps in place of updates."""

    def __init__(self, folder: Path, files: Path) -> None:
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self.version = 0
        self._exporter = WeightExporter(files, self.model.state_dict(), checksum=True)

    def step(self, scale: float = 0.01) -> None:
        import torch

        self.version += 1
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)

    async def export_weights(self) -> PolicyWeights:
        return self._exporter.export(self.version, [self.model.state_dict()])

    async def send_weights(self, weights: PolicyWeights) -> None:
        self._exporter.send(weights)

    async def release_weights(self, weights: PolicyWeights) -> None:
        self._exporter.release(weights)

    async def logprobs(self, sequences) -> list[FloatArray]:
        return [self.forward(sequence) for sequence in sequences]

    def forward(self, sequence: Sequence, temperature: float = 1.0, top_k: int = 0) -> FloatArray:
        """Float32 log-probs [T] of the response under the sampled-from distribution."""
        import torch

        tokens = torch.tensor([sequence.prompt_ids + sequence.response_ids])
        with torch.no_grad():
            logits = self.model(tokens).logits[0, len(sequence.prompt_ids) - 1 : -1].float() / temperature
        if top_k:
            logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
        return logits.log_softmax(-1).gather(1, tokens[0, len(sequence.prompt_ids) :, None])[:, 0].numpy()


class Bench:
    """The engine, its event loop, the folder that it was started from, and the gap that it had when it was fresh."""

    def __init__(self, loop: asyncio.AbstractEventLoop, actor, folder: Path, files: Path) -> None:
        self.run = loop.run_until_complete
        self.actor = actor
        self.folder = folder
        self.files = files
        self.fresh_gap: Gap | None = None

    def policy(self) -> TorchPolicy:
        """A policy at version 0, live in the engine as well."""
        policy = TorchPolicy(self.folder, self.files)
        self.run(self.actor.load_weights(self.run(policy.export_weights())))
        return policy

    def generate(self, requests: list[GenerationRequest]) -> list[tuple[Sample, ...]]:
        """Samples of all, in the order of ``requests``."""

        async def answers() -> dict[str, tuple[Sample, ...]]:
            await self.actor.submit(requests)
            found: dict[str, tuple[Sample, ...]] = {}
            while len(found) < len(requests):
                found |= await self.actor.collect()
            return found

        found = self.run(answers())
        return [found[request.request_id] for request in requests]

    def publisher(self, policy: TorchPolicy, pool, prompt_tokens: int = 8) -> WeightPublisher:
        publisher = WeightPublisher(pool, policy, Probe(), lambda event, **fields: None)
        self.run(publisher.start(_sequences(prompt_tokens)))
        return publisher


async def publish(publisher: WeightPublisher) -> None:
    await publisher.put_live(await publisher.export())


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    from actors.generation import GenerationActor

    folder, files = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("weights")
    _save_tiny_llama(folder)
    loop = asyncio.new_event_loop()
    config = run_config(folder, pools={"generation": {"kv_cache_gib": 0.25}})
    extension = "faulty_receiver.FaultyReceiver"
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(__file__).parent)])):
        actor = GenerationActor(config, 0, str(folder), MAX_MODEL_LEN, worker_extension=extension)
        loop.run_until_complete(actor.start())
        bench = Bench(loop, actor, folder, files)
        fresh = WeightPublisher(actor, TorchPolicy(folder, files), Probe(), lambda event, **fields: None)
        bench.fresh_gap = loop.run_until_complete(fresh.start(_sequences(8)))
        yield bench
        loop.run_until_complete(actor.close())
    loop.close()


def _tokens(num_tokens: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCAB_SIZE, num_tokens).tolist())


def _sequences(prompt_tokens: int) -> list[Sequence]:
    return [Sequence(_tokens(prompt_tokens, seed), _tokens(12, 1000 + seed), has_eos=False) for seed in range(32)]


def _request(request_id: str, prompt_id: int = 0, **fields) -> GenerationRequest:
    request = GenerationRequest(
        request_id=request_id,
        prompt=Prompt(prompt_id=prompt_id, text="", token_ids=_tokens(6, prompt_id)),
        num_samples=4,
        max_new_tokens=13,
        temperature=1.0,
        seed=100 * prompt_id,
    )
    return replace(request, **fields)


def _flat(groups: list[tuple[Sample, ...]]) -> list[Sample]:
    return [sample for group in groups for sample in group]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 5)])
def test_sampled_logprobs_are_those_of_the_distribution_sampled_from(bench, temperature, top_k):
    policy = bench.policy()
    requests = [_request(f"logprobs-{seed}", seed, temperature=temperature, top_k=top_k) for seed in range(8)]
    samples = _flat(bench.generate(requests))
    assert len(samples) == 32
    for sample in samples:
        expected = policy.forward(sample.sequence, temperature, top_k)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-3)


def test_a_response_ends_with_any_eos_of_the_folder_or_at_its_longest(bench):
    bench.policy()
    samples = _flat(bench.generate([_request(f"eos-{seed}", seed) for seed in range(64)]))
    ends = {sample.sequence.response_ids[-1] for sample in samples if sample.sequence.has_eos}
    assert ends == set(EOS_IDS)
    for sample in samples:
        response = sample.sequence.response_ids
        assert not set(response[:-1]) & set(EOS_IDS)
        assert sample.sequence.has_eos == (response[-1] in EOS_IDS)
        assert sample.sequence.has_eos or len(response) == 13


def test_seeds_reproduce_and_sample_i_has_seed_plus_i(bench):
    bench.policy()
    first, again = bench.generate([_request("seed-a", 3), _request("seed-b", 3)])
    alone = bench.generate([_request("seed-c", 3, num_samples=1, seed=302)])[0]
    assert [sample.sequence for sample in first] == [sample.sequence for sample in again]
    assert len({sample.sequence.response_ids for sample in first}) == 4
    assert alone[0].sequence == first[2].sequence


def test_more_prompt_tokens_than_one_step_takes_change_no_sample(bench):
    bench.policy()
    prompts = [Prompt(prompt_id=index, text="", token_ids=_tokens(LONG_PROMPT, index)) for index in range(24)]
    requests = [_request(f"crowd-{prompt.prompt_id}", prompt.prompt_id, prompt=prompt) for prompt in prompts]
    together = bench.generate(requests)
    alone = [bench.generate([request])[0] for request in requests[-3:]]
    assert [_responses(samples) for samples in alone] == [_responses(samples) for samples in together[-3:]]


def _responses(samples: tuple[Sample, ...]) -> list[tuple[int, ...]]:
    return [sample.sequence.response_ids for sample in samples]


def test_score_reads_what_sampling_reported_up_to_the_longest_sequence(bench):
    policy = bench.policy()
    longest = Sequence(_tokens(MAX_MODEL_LEN - 20, 1), _tokens(20, 2), has_eos=False)
    shortest = Sequence(_tokens(1, 3), (EOS_IDS[0],), has_eos=True)
    samples = _flat(bench.generate([_request("score")]))
    scores = bench.run(bench.actor.score([longest, shortest, *(sample.sequence for sample in samples)]))
    np.testing.assert_allclose(scores[0], policy.forward(longest), atol=1e-3)
    np.testing.assert_allclose(scores[1], policy.forward(shortest), atol=1e-3)
    for score, sample in zip(scores[2:], samples, strict=True):
        np.testing.assert_allclose(score, sample.logprobs, atol=1e-3)


def test_collect_returns_every_request_once_errors_included(bench):
    bench.policy()
    too_long = Prompt(prompt_id=0, text="", token_ids=_tokens(MAX_MODEL_LEN + 1, 0))
    requests = [*(_request(f"collect-{seed}", seed) for seed in range(8)), _request("refused", prompt=too_long)]
    results = dict(bench.run(_collect(bench.actor, requests)))
    assert isinstance(results.pop("refused"), RunError)
    assert results.keys() == {f"collect-{seed}" for seed in range(8)}
    assert all(len(samples) == 4 for samples in results.values())


async def _collect(actor, requests: list[GenerationRequest]) -> list:
    await actor.submit(requests)
    results: list = []
    while len(results) < len(requests):
        results += await actor.collect()
    assert len(results) == len(requests)
    return results


def test_an_aborted_request_is_never_collected(bench):
    bench.policy()

    async def abort_one() -> list:
        await bench.actor.submit([_request("aborted", 1, max_new_tokens=400)])
        await bench.actor.abort(["aborted"])
        return await _collect(bench.actor, [_request("aborted", 2), _request("other", 3)])

    results = dict(bench.run(abort_one()))
    assert results["aborted"][0].sequence.prompt_ids == _tokens(6, 2)


def test_running_requests_survive_new_weights_and_show_both_versions(bench):
    old = bench.policy()
    new = TorchPolicy(bench.folder, bench.files)
    new.step()
    weights = bench.run(new.export_weights())
    requests = [_request(f"long-{seed}", seed, num_samples=8, max_new_tokens=400) for seed in range(8)]

    async def swap_in_flight() -> list:
        # the first answer says that the engine has begun with the long requests as well
        await bench.actor.submit([*requests, _request("first", 9, num_samples=1, max_new_tokens=1)])
        results = await bench.actor.collect()
        await bench.actor.load_weights(weights)
        while len(results) < len(requests) + 1:
            results += await bench.actor.collect()
        return results

    samples = _flat([samples for _, samples in bench.run(swap_in_flight())])
    assert len(samples) == 8 * 8 + 1
    swapped = [sample for sample in samples if (sample.first_version, sample.last_version) == (0, 1)]
    assert swapped
    for sample in swapped:
        _assert_first_part_is_of_old_and_rest_of_new(sample, old, new)


def _assert_first_part_is_of_old_and_rest_of_new(sample: Sample, old: TorchPolicy, new: TorchPolicy) -> None:
    from_old = np.abs(sample.logprobs - old.forward(sample.sequence)) < 1e-3
    from_new = np.abs(sample.logprobs - new.forward(sample.sequence)) < 1e-3
    cut = len(from_old) if from_old.all() else int(np.argmin(from_old))
    assert 0 < cut < len(from_old)
    assert from_new[cut:].all()


def test_after_new_weights_the_gap_is_that_of_a_fresh_engine(bench):
    policy = bench.policy()
    publisher = bench.publisher(policy, bench.actor)
    policy.step()
    bench.run(publish(publisher))
    scores = bench.run(bench.actor.score(_sequences(LONG_PROMPT)))
    for score, sequence in zip(scores, _sequences(LONG_PROMPT), strict=True):
        np.testing.assert_allclose(score, policy.forward(sequence), atol=1e-3)
    again = bench.run(WeightPublisher(bench.actor, policy, Probe(), lambda event, **fields: None).start(_sequences(8)))
    assert again.tokens <= 2 * bench.fresh_gap.tokens
    assert again.cached <= 2 * bench.fresh_gap.cached


class SkippedPublish:
    """An engine whose ``load_weights`` stamps the version and does nothing else."""

    def __init__(self, actor) -> None:
        self.score = actor.score
        self._actor = actor

    async def load_weights(self, weights: PolicyWeights) -> PublishReport:
        await self._actor._engine.update_weight_version(str(weights.version))
        return PublishReport(weights.version, weights.num_bytes, seconds=0.0, pause_s=0.0)


def _keep_prefix_cache(actor, patch: pytest.MonkeyPatch) -> None:
    core = actor._engine.engine_core
    pause = core.pause_scheduler_async
    patch.setattr(core, "pause_scheduler_async", lambda mode, clear_cache: pause(mode=mode, clear_cache=False))


def test_a_skipped_publish_is_found(bench):
    policy = bench.policy()
    publisher = bench.publisher(policy, SkippedPublish(bench.actor))
    policy.step()
    with pytest.raises(StaleWeightsError, match="version 1"):
        bench.run(publish(publisher))


def test_a_stale_tied_head_is_found(bench):
    policy = bench.policy()
    publisher = bench.publisher(policy, bench.actor)
    policy.step()
    engine = bench.actor._engine
    bench.run(engine.collective_rpc("drop_head", args=(True,)))
    try:
        with pytest.raises(StaleWeightsError):
            bench.run(publish(publisher))
    finally:
        bench.run(engine.collective_rpc("drop_head", args=(False,)))


def test_a_kept_prefix_cache_is_found_with_long_prompts_and_needs_its_own_mean(bench, monkeypatch):
    policy = bench.policy()
    publisher = bench.publisher(policy, bench.actor, LONG_PROMPT)
    policy.step()
    _keep_prefix_cache(bench.actor, monkeypatch)
    with pytest.raises(StaleWeightsError):
        bench.run(publish(publisher))
    fresh_tokens = [
        np.delete(np.abs(score - policy.forward(sequence)), -1)
        for score, sequence in zip(
            bench.run(bench.actor.score(_sequences(LONG_PROMPT))), _sequences(LONG_PROMPT), strict=True
        )
    ]
    assert np.max(fresh_tokens) < 1e-3


def test_weights_taken_beside_generation_are_bit_for_bit_those_of_vllms_own_reload(bench):
    policy = bench.policy()
    old = bench.run(bench.actor.score(_sequences(8)))
    policy.step(scale=0.1)
    weights = bench.run(policy.export_weights())
    report = bench.run(bench.actor.load_weights(weights))
    assert report.repack_s > 0
    beside = bench.run(bench.actor.score(_sequences(8)))
    engine = bench.actor._engine
    bench.policy()
    np.testing.assert_array_equal(bench.run(bench.actor.score(_sequences(8))), old)
    bench.run(engine.collective_rpc("hide_shadow", args=(True,)))
    try:
        bench.run(bench.actor.load_weights(weights))
        np.testing.assert_array_equal(bench.run(bench.actor.score(_sequences(8))), beside)
    finally:
        bench.run(engine.collective_rpc("hide_shadow", args=(False,)))
    assert np.max(np.abs(np.subtract(beside, old))) > 0.1


@pytest.mark.parametrize("changed", [{"version": 7}, {"checksum": 1}, {"path": Path("missing.safetensors")}])
def test_weights_that_are_not_what_was_sent_leave_the_engine_running_on_the_old_ones(bench, changed):
    policy = bench.policy()
    before = bench.run(bench.actor.score(_sequences(8)))
    policy.step()
    weights = replace(bench.run(policy.export_weights()), **changed)
    with pytest.raises(RunError, match=f"could not take version {weights.version}"):
        bench.run(bench.actor.load_weights(weights))
    np.testing.assert_array_equal(bench.run(bench.actor.score(_sequences(8))), before)


def test_a_renewed_actor_has_its_own_models_weights_in_the_engine_that_was_there(bench, tmp_path):
    other = TorchPolicy(bench.folder, bench.files)
    other.step(0.1)
    shutil.copytree(bench.folder, tmp_path, dirs_exist_ok=True)
    other.model.save_pretrained(tmp_path)
    actor = bench.actor
    arguments = actor.config, 0, str(tmp_path), MAX_MODEL_LEN, False, actor.worker_extension
    pid, known = actor._engine_pid, bench.run(actor.score(_sequences(8)))
    bench.run(actor.rest())
    try:
        assert bench.run(actor.renew(*arguments))
        assert actor._engine_pid == pid
        found = bench.run(actor.score(_sequences(8)))
        np.testing.assert_allclose(found, bench.run(other.logprobs(_sequences(8))), atol=2e-4)
        assert np.abs(np.array(found) - np.array(known)).max() > 0.1
        (samples,) = bench.generate([_request("renewed")])
        assert {(sample.first_version, sample.last_version) for sample in samples} == {(0, 0)}
    finally:
        assert bench.run(actor.renew(actor.config, 0, str(bench.folder), *arguments[3:]))


def test_an_engine_that_slept_goes_on_as_before(bench):
    before = bench.generate([_request("awake", seed=3)])
    bench.run(bench.actor.sleep())
    bench.run(bench.actor.wake())
    (samples,) = bench.generate([_request("awake again", seed=3)])
    assert [sample.sequence for sample in samples] == [sample.sequence for sample in before[0]]


@pytest.mark.parametrize(("gpus", "share", "sleeps"), [(0.5, 0.3, True), (4, 0.6, False)])
def test_an_engine_takes_its_share_of_its_part_of_a_gpu(bench, gpus, share, sleeps):
    from actors.generation import GenerationActor

    pool = {"gpus_per_actor": gpus, "gpu_memory_share": 0.6, "sleeps": sleeps}
    actor = GenerationActor(run_config(bench.folder, pools={"generation": pool}), 0, str(bench.folder), MAX_MODEL_LEN)
    arguments = actor._engine_args()
    assert (arguments.gpu_memory_utilization, arguments.enable_sleep_mode) == (pytest.approx(share), sleeps)
    assert arguments.tensor_parallel_size == max(1, gpus)


def test_an_actor_that_needs_another_engine_is_not_renewed(bench, tmp_path):
    actor = bench.actor
    shutil.copytree(bench.folder, tmp_path / "other")
    settings = json.loads((tmp_path / "other/generation_config.json").read_text())
    settings["eos_token_id"] = settings["eos_token_id"][:1]
    (tmp_path / "other/generation_config.json").write_text(json.dumps(settings))
    rest = False, actor.worker_extension
    for number, folder, length in ((0, tmp_path / "other", MAX_MODEL_LEN), (0, bench.folder, MAX_MODEL_LEN - 1)):
        assert not bench.run(actor.renew(actor.config, number, str(folder), length, *rest))
    assert actor.model_path == str(bench.folder)


def test_an_engine_that_dies_while_it_takes_weights_is_reported(bench):
    """The last test: it kills the engine. No request is open, so that nothing else notices its death."""
    policy = TorchPolicy(bench.folder, bench.files)
    weights = bench.run(policy.export_weights())
    engine = bench.actor._engine_pid

    async def killed_meanwhile():
        os.kill(engine, signal.SIGSTOP)
        taking = asyncio.create_task(bench.actor.load_weights(weights))
        await asyncio.sleep(0)
        os.kill(engine, signal.SIGKILL)
        await asyncio.wait_for(taking, timeout=60)

    with pytest.raises(ActorDiedError, match="the vLLM engine died"):
        bench.run(killed_meanwhile())
