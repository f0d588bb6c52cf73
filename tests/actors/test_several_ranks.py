"""Training on several ranks, real processes that talk by gloo, against training on one: this process."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_processes import rank_processes
from safetensors.torch import load_file
from tiny_models import (
    EOS,
    VOCABULARY_SIZE,
    build_policy,
    llama_config,
    random_pairs,
    run_config,
    save_pairs,
    save_policy,
    save_reward_model,
    scored_rollout,
)

from actors import training_engine
from actors.engine_settings import EngineSettings
from actors.policy import PolicyActor
from actors.training_engine import TrainingEngine
from ocrm_ray import batches, networks
from ocrm_ray.algorithm.schedule import CorrectionClock
from ocrm_ray.batches import SequenceTable
from ocrm_ray.checkpoints import STATE, RunState, begin, finish
from ocrm_ray.config import Pool
from ocrm_ray.networks import CausalModel, ScalarModel, last_token_scores, table_logprobs
from ocrm_ray.records import OnPolicyState, Sequence

pytestmark = pytest.mark.real

SPREAD = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""At ZeRO 3 DeepSpeed would leave tensors this small whole on every rank."""
FIGURES = ("loss", "grad_norm", "entropy", "clip_share", "logprob_gap", "truncated_share", "value_loss")


def replayed(num_updates=3):
    """Rollouts of five prompts with three responses each, of very different lengths; one of them without EOS."""
    random, model = np.random.default_rng(8), CausalModel(build_policy())
    steps = []
    for version in range(num_updates):
        step = []
        for prompt in range(5):
            sequences = []
            for sample in range(3):
                words = random.integers(3, 30, random.integers(1, 5 + 5 * prompt)).tolist()
                is_whole = (prompt, sample) != (1, 2)
                sequences.append(Sequence((5, 6 + prompt), (*words, EOS) if is_whole else tuple(words), is_whole))
            table = SequenceTable(sequences, EOS, share_prompts=False)
            found = table_logprobs(model, table, 1.0, Pool())
            logprobs = [row + random.normal(0, 0.1, len(row)).astype(np.float32) for row in found]
            rewards = random.normal(0, 1, 3).tolist()
            step.append(scored_rollout(sequences, logprobs, rewards, sampled_at=(version, version)))
        steps.append(step)
    return steps


def make_actor(folder, stage, checkpoint=None, dtype="float32", **policy):
    """A trainer over the models in ``folder``; called by every rank."""
    policy = {"learning_rate": 1e-4, "micro_batch_size": 3, "deepspeed": SPREAD, "zero_stage": stage} | policy
    rollout = {"missing_eos": "mask"}
    config = run_config(folder, policy=policy, rollout=rollout, pools={"policy": {"dtype": dtype}})
    reward = str(folder / "rm") if policy.get("algorithm") == "ppo" else None
    actor = PolicyActor(config, str(folder / "sft"), reward, config.run_dir, folder / "exports", checkpoint=checkpoint)
    actor.start()
    return actor


def exported(actor):
    """On rank 0."""
    weights = actor.export_weights()
    return None if weights is None else load_file(weights.path)


def updates(folder, stage, policy, dtype="float32"):
    actor = make_actor(folder, stage, dtype=dtype, **policy)
    reports = [asdict(actor.update(rollouts)) for rollouts in replayed()]
    answer = reports, actor.logprobs([Sequence((5, 6), (8, 9, EOS), True)] * 3), exported(actor)
    actor.close()
    return answer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_policy(folder / "sft")
    save_reward_model(folder / "rm")
    save_pairs(run_config(folder), random_pairs(16, seed=1))
    return folder


POLICIES = {
    "rloo": {"algorithm": "rloo"},
    "ppo": {"algorithm": "ppo", "num_epochs": 2, "num_minibatches": 3, "critic_learning_rate": 1e-4},
    "grpo": {"algorithm": "grpo", "kl_placement": "loss", "kl_estimator": "k3", "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def alone(models):
    """What one rank does without ZeRO."""
    return {name: updates(models, 0, policy) for name, policy in POLICIES.items()}


def assert_close(weights, expected, atol):
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name].float(), tensor.float(), atol=atol, rtol=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("algorithm", POLICIES)
def test_three_updates_on_two_ranks_are_those_of_one_and_so_is_what_is_exported(
    two_ranks, models, alone, stage, algorithm
):
    expected, expected_logprobs, expected_weights = alone[algorithm]
    start = load_file(models / "sft" / "model.safetensors")
    assert min(float((expected_weights[name] - start[name]).abs().max()) for name in start) > 1e-4
    answers = two_ranks.run(updates, models, stage, POLICIES[algorithm])
    for reports, logprobs, weights in answers:
        for report, reference in zip(reports, expected, strict=True):
            for name in FIGURES:
                if reference[name] is None:
                    assert report[name] is None
                else:
                    assert report[name] == pytest.approx(reference[name], rel=1e-5, abs=1e-5), name
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)
        if weights is not None:
            assert_close(weights, expected_weights, atol=1e-5)
    assert [weights is None for *_, weights in answers] == [False, True]


def finely_cut_updates(folder):
    """At ZeRO 3, with rows cut into blocks, and logits into chunks, of which the ranks have different numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "SMALL_BLOCK", 1)
        patch.setattr(networks, "MAX_LOGITS", 7 * VOCABULARY_SIZE)
        return updates(folder, 3, POLICIES["ppo"])


def test_at_zero_3_ranks_stay_in_step_where_each_would_cut_its_passes_differently(two_ranks, models, alone):
    expected, _, weights = alone["ppo"]
    (reports, _, found), _ = two_ranks.run(finely_cut_updates, models)
    assert [report["loss"] for report in reports] == pytest.approx([report["loss"] for report in expected], abs=1e-5)
    assert_close(found, weights, atol=1e-5)


def learn_pairs(folder):
    actor = make_actor(folder, 3, algorithm="wpo")
    anchor = np.random.default_rng(3).normal(-10, 1, (16, 2)).astype(np.float32)
    report = actor.learn_pairs(np.array([3, 1, 8, 5, 2, 11, 7]), anchor[:7])
    answer = (report.loss, report.grad_norm), actor._engine.weights()
    actor.close()
    return answer


def test_an_update_on_pairs_is_that_of_one_rank(two_ranks, models):
    figures, weights = learn_pairs(models)
    answers = two_ranks.run(learn_pairs, models)
    assert [found for found, _ in answers] == [pytest.approx(figures, rel=1e-5)] * 2
    assert_close(answers[0][1], weights, atol=1e-5)


def in_bfloat16(folder, stage):
    answer = updates(folder, stage, POLICIES["rloo"] | {"learning_rate": 1e-3}, "bfloat16")
    return answer[0][-1]["grad_norm"], answer[2]


@pytest.mark.parametrize("stage", [0, 3])
def test_bfloat16_with_float32_masters_goes_where_one_rank_goes(two_ranks, models, stage):
    norm, weights = in_bfloat16(models, 1)
    (found, found_weights), (other, _) = two_ranks.run(in_bfloat16, models, stage)
    assert found == other == pytest.approx(norm, rel=0.05)
    changes = [(weights[name] - tensor).float().flatten() for name, tensor in start_of(models).items()]
    differences = [(weights[name] - found_weights[name]).float().flatten() for name in start_of(models)]
    assert torch.cat(differences).norm() < 0.2 * torch.cat(changes).norm()


def start_of(folder):
    return load_file(folder / "sft" / "model.safetensors")


def build_network():
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(4)
    config = llama_config(num_labels=1, initializer_range=0.1, pad_token_id=EOS)
    return LlamaForSequenceClassification(config).eval()


PAIRS = random_pairs(13, seed=1)
TABLE = SequenceTable([pair.chosen for pair in PAIRS], EOS, share_prompts=False)


def make_engine(stage, dtype="float32", weights=None, **settings):
    network = build_network()
    if weights is not None:
        network.load_state_dict(weights)
    chosen = {"max_skipped_steps": 2, "deepspeed": SPREAD} | settings
    return TrainingEngine(ScalarModel(network), EngineSettings(1e-3, 1.0, stage, dtype, **chosen))


def train(engine, num_steps, factor=1.0):
    """Steps towards scores of 1 on all 13 sequences; the gradient norms. ``factor``: of the shortest one's loss."""

    def loss_of(chunk):
        weights = torch.tensor([factor if row == TABLE.lengths.argmin() else 1.0 for row in chunk])
        scores = last_token_scores(engine.forward, TABLE.batch(chunk))
        return ((scores - 1).square() * weights).sum() / 13

    norms = []
    for _ in range(num_steps):
        engine.accumulate(TABLE.chunks(np.arange(13), 2, 1000), loss_of)
        norms.append(engine.step(1.0))
    return norms


def gathering(num_bytes):
    """Most bytes of weights that lay whole on this rank while they were exported, beside what was exported."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    training_engine.GATHERED_BYTES = num_bytes
    engine = make_engine(3)
    train(engine, 1)
    lay_whole, found = [], {}
    for bucket in engine.buckets():
        whole = [p for p in engine.module.parameters() if p.ds_status == ZeroParamStatus.AVAILABLE]
        lay_whole.append(sum(parameter.ds_numel * 4 for parameter in whole))
        found |= {name: tensor.clone() for name, tensor in bucket.items()}
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in engine.layout().items()}
    engine.close()
    training_engine.GATHERED_BYTES = 2**28
    return lay_whole, found, layout


def test_zero_3_puts_some_weights_together_at_a_time_and_never_all(two_ranks):
    engine = make_engine(0)
    train(engine, 1)
    expected = engine.weights()
    engine.close()
    limit = 2 * max(tensor.nbytes for tensor in expected.values())
    for lay_whole, found, layout in two_ranks.run(gathering, limit):
        assert max(lay_whole) <= limit < sum(tensor.nbytes for tensor in expected.values()) / 3
        assert len(lay_whole) > 3
        assert layout == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()}
        assert_close(found, expected, atol=1e-5)


def spoilt(stage):
    """The norms of good steps around two with a gradient that is not finite on one rank, and the weights."""
    engine = make_engine(stage)
    norms = train(engine, 1)
    before = engine.weights()
    norms += train(engine, 1, math.nan) + train(engine, 1, math.inf)
    kept = all(torch.equal(tensor, before[name]) for name, tensor in engine.weights().items())
    norms += train(engine, 1)
    engine.close()
    return norms, kept


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(two_ranks, stage):
    answers = two_ranks.run(spoilt, stage)
    for norms, kept in answers:
        assert [math.isfinite(norm) for norm in norms] == [True, False, False, True]
        assert (norms[0], norms[3]) == (answers[0][0][0], answers[0][0][3])
        assert kept


def offloaded(stage, offload, dtype):
    engine = make_engine(stage, dtype, offload=offload)
    norms, weights = train(engine, 3), engine.weights()
    state = engine.capture()
    engine.close()
    return norms, weights, sorted(state.tensors)


@pytest.mark.parametrize(
    ("stage", "offload", "dtype"), [(1, "optimizer", "float32"), (2, "optimizer", "bfloat16"), (3, "all", "float32")]
)
def test_offloading_changes_no_result(two_ranks, stage, offload, dtype):
    norms, weights, kinds = offloaded(stage, "none", dtype)
    (found, found_weights, found_kinds), _ = two_ranks.run(offloaded, stage, offload, dtype)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    assert found == pytest.approx(norms, rel=tolerance)
    assert found_kinds == kinds
    assert_close(found_weights, weights, atol=1e-5 if dtype == "float32" else 4e-3)


def saved(stage, dtype, state=None):
    """(this rank's part of a state after two steps, the norm of a third step); from ``state`` on if there is one."""
    engine = make_engine(stage, dtype, None if state is None else state.weights)
    if state is None:
        train(engine, 2)
    else:
        engine.restore(state)
    captured = engine.capture()
    norm = train(engine, 1)
    engine.close()
    return captured, norm


def whole(states):
    """One state of the parts of all ranks."""
    tensors = {kind: {} for kind in states[0].tensors}
    for state in states:
        for kind, part in state.tensors.items():
            assert not tensors[kind].keys() & part.keys(), "every parameter is written once"
            tensors[kind] |= part
    return replace(states[0], tensors=tensors)


def assert_equal(state, expected):
    assert state.num_steps == expected.num_steps
    for kind, tensors in {**expected.tensors, "weights of the network": expected.weights}.items():
        found = state.weights if kind == "weights of the network" else state.tensors[kind]
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor), (kind, name)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (2, "float32"), (3, "float32"), (3, "bfloat16")])
def test_a_state_of_two_ranks_is_restored_on_one_and_the_other_way_round_to_the_last_bit(two_ranks, stage, dtype):
    alone_state, alone_norm = saved(stage, dtype)
    answers = two_ranks.run(saved, stage, dtype, alone_state)
    assert_equal(whole([state for state, _ in answers]), alone_state)
    assert answers[0][1] == pytest.approx(alone_norm, rel=1e-5 if dtype == "float32" else 0.05)
    answers = two_ranks.run(saved, stage, dtype)
    state = whole([state for state, _ in answers])
    again, norm = saved(stage, dtype, state)
    assert_equal(again, state)
    assert norm == pytest.approx(answers[0][1], rel=1e-5 if dtype == "float32" else 0.05)


def test_parts_that_are_padded_are_restored_too():
    """Nothing in the network can be divided by 3."""
    expected, _ = saved(3, "bfloat16")
    with rank_processes(3) as three_ranks:
        answers = three_ranks.run(saved, 3, "bfloat16", expected)
    assert_equal(whole([state for state, _ in answers]), expected)


def run_and_checkpoint(folder, partial):
    """Two updates, a checkpoint, whose files' entries come first, and the next update's report and weights."""
    actor = make_actor(folder, 2, **POLICIES["ppo"])
    for rollouts in replayed(2):
        actor.update(rollouts)
    actor.capture()
    return actor.write_checkpoint(partial, actor.export_weights()), *resumed_update(actor)


def resume(folder, checkpoint):
    actor = make_actor(folder, 3, checkpoint, **POLICIES["ppo"])
    snapshot = actor.saved_snapshot()
    return *resumed_update(actor), None if snapshot is None else snapshot.version


def resumed_update(actor):
    report = asdict(actor.update(replayed()[2]))
    answer = [report[name] for name in FIGURES], exported(actor)
    actor.close()
    return answer


def finished(partial, *entries):
    """``entries``: of each rank."""
    written = {name: entry for of_rank in entries for name, entry in of_rank.items()}
    assert {Path(name).name for name in written} == {
        path.name for path in (partial / STATE).glob("*-[0-9].safetensors")
    }
    state = {"reward_version": 0, "anchor_version": 0, "num_issued": 2, "outstanding": (), "probe_bound": (1, 1)}
    run = RunState(step=2, clock=CorrectionClock(4), on_policy=OnPolicyState(), **state)
    return finish(partial, run, written, num_kept=1)


def test_a_trainer_goes_on_from_a_checkpoint_of_another_number_of_ranks_and_stage(two_ranks, models, tmp_path):
    partial = begin(tmp_path / "of-one", 2)
    written, expected, weights = run_and_checkpoint(models, partial)
    answers = two_ranks.run(resume, models, finished(partial, written))
    assert [(figures, version) for figures, _, version in answers] == [
        (pytest.approx(expected, rel=1e-5, abs=1e-5), version) for version in (2, None)
    ]
    assert_close(answers[0][1], weights, atol=1e-5)
    partial = begin(tmp_path / "of-two", 2)
    entries = [written for written, *_ in two_ranks.run(run_and_checkpoint, models, partial)]
    figures, found, version = resume(models, finished(partial, *entries))
    assert figures == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert version == 2
    assert_close(found, weights, atol=1e-5)
