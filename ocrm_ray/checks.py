"""Settings that cannot stand together, in a run and among the runs of a study. Pure but for ``study_problems``."""

import math
import re
from collections.abc import Iterator
from functools import reduce
from typing import TypeAlias

from ocrm_ray import praise
from ocrm_ray.config import RunConfig, StudyConfig
from ocrm_ray.config_file import SHARED, arm_problems, study_runs
from ocrm_ray.config_problems import shown
from ocrm_ray.errors import Problem
from ocrm_ray.inspection import has_rl, made_with_others
from ocrm_ray.inspection import inspect as inspect
from ocrm_ray.stage_settings import rl_differences, stage_differences

OWN_DEEPSPEED_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "gradient_allreduce_op", "optimizer", "scheduler", "bf16", "fp16",
}  # fmt: skip
"""Of DeepSpeed's settings those that follow from the configuration's own."""

Checks: TypeAlias = Iterator[tuple[bool, str, str, str]]
"""(whether it is wrong, the setting to name, what it needs, what to do)."""
_SELECTOR = re.compile(r"!?(in\([\w.-]+(, ?[\w.-]+)*\)|[\w.-]+)")


def contradictions(config: RunConfig) -> list[Problem]:
    """Settings that cannot stand together, all of them."""
    of_method = _sources, _pairs, _correction, _strategy, _policy, _evaluation, _determinism, _world
    return [
        Problem(path, _shown_setting(config, path), need, do)
        for checks in (*of_method, _sleep, _placement)
        for is_wrong, path, need, do in checks(config)
        if is_wrong
    ]


def study_problems(study: StudyConfig) -> list[Problem]:
    """Contradictions and inspection of every run of a study, told once, of its base or its arm."""
    per_arm: dict[str, list[Problem]] = {arm: [] for arm in study.arms}
    folder = study.output_dir / study.name / SHARED
    do = f"move it to base, or name the arm in own_stages: the arms share the stages in {folder}"
    runs = study_runs(study)
    shared = [config for arm, _, config in runs if arm not in study.own_stages]
    for arm, seed, config in runs:
        first = shared[0].model_copy(update={"seed": seed}) if shared else config
        differences = [
            Problem(key, shown(ours), f"{shown(theirs)}, as in the first arm", do)
            for key, ours, theirs in stage_differences(config, first)
            if arm not in study.own_stages
        ]
        begun = made_with_others(config, rl_differences) if has_rl(config.run_dir) else []
        per_arm[arm] += [*contradictions(config), *inspect(config), *differences, *begun]
    return arm_problems(study, per_arm)


def _shown_setting(config: RunConfig, path: str) -> str:
    value = reduce(getattr, path.split("."), config)
    return "nothing" if value is None else shown(value.model_dump() if hasattr(value, "model_dump") else value)


def _sources(config: RunConfig) -> Checks:
    data, sft, pairs, gold, reward = config.data, config.sft, config.pairs, config.gold, config.reward
    named = {
        "data.prompts": data.prompts, "sft.ready": sft.ready, "sft.base": sft.base, "pairs.ready": pairs.ready,
        "reward.ready": reward.ready, "reward.base": reward.base, "gold": gold,
    }  # fmt: skip
    if config.world is not None:
        for path, source in named.items():
            yield source is not None, path, "nothing beside world", "remove it, or remove world"
    else:
        yield data.prompts is None, "data.prompts", "prompts, or the embedded world", "set it, or set world: {}"
        yield sft.ready is None and sft.base is None, "sft.base", "a model to start from", "set it, or sft.ready"
        need = "a gold reward that labels the sampled pairs, or ready pairs"
        yield gold is None and pairs.ready is None, "gold", need, "set gold or pairs.ready"
    for name, section in (("sft", sft), ("reward", reward)):
        both = section.base is not None and section.ready is not None
        yield both, f"{name}.base", f"nothing beside {name}.ready", "remove one of the two"


def _pairs(config: RunConfig) -> Checks:
    pairs, correction = config.pairs, config.correction
    if pairs.ready is None:
        num_training = pairs.num_pairs - max(1, round(pairs.heldout_share * pairs.num_pairs))
        need, do = "sft, since the pairs are sampled from it", "remove it, or set pairs.ready"
        yield pairs.behaviour != "sft", "pairs.behaviour", need, do
        need = f"a pair to train on beside those held out (pairs.heldout_share {pairs.heldout_share:g})"
        yield num_training < 1, "pairs.num_pairs", need, "raise it, or lower pairs.heldout_share"
        need, do = f"at most {num_training}, the training pairs", "lower it, or raise pairs.num_pairs"
        yield (correction.num_pairs or 0) > max(1, num_training), "correction.num_pairs", need, do
        num_responses = 2 * pairs.num_pairs
        need = f"at most {num_responses}, the responses of pairs.num_pairs {pairs.num_pairs}"
        yield config.reward.num_calibration > num_responses, "reward.num_calibration", need, "lower it"
    if correction.strategy in ("ocrm", "shuffled"):
        strategy = f"correction.strategy {correction.strategy}"
        is_unknown = pairs.ready is not None and pairs.behaviour == "unknown" and not pairs.allow_unknown_behaviour
        do = "name it, set pairs.allow_unknown_behaviour: true, or use strategy refit"
        yield is_unknown, "pairs.behaviour", f"the model that wrote the pairs, for {strategy}", do
        for name, sampling in (("pairs", pairs), ("rollout", config.rollout)):
            for key, value, off in (("top_p", sampling.top_p, 1), ("top_k", sampling.top_k, 0)):
                need = f"{off} with {strategy}: the ratio of truncated sampling is biased"
                yield value != off, f"{name}.{key}", need, f"set it to {off}, or use strategy refit"


def _correction(config: RunConfig) -> Checks:
    correction = config.correction
    both = correction.max_lag is not None and correction.promote_after is not None
    need = f"nothing beside correction.promote_after {correction.promote_after}"
    yield both, "correction.max_lag", need, "remove one of the two"
    for key in ("promote_after", "max_lag"):
        is_wrong = correction.schedule == "blocking" and getattr(correction, key) is not None
        need = "nothing with schedule blocking: it promotes before the next update"
        yield is_wrong, f"correction.{key}", need, "remove it"
    is_wrong = correction.critic_on_promote == "reinit" and config.policy.algorithm != "ppo"
    yield is_wrong, "correction.critic_on_promote", "keep: only ppo has a critic", "set it to keep"
    is_wrong = correction.strategy != "none" and correction.rm_init == "sft" and config.world is not None
    need = "base or previous: the world's reward model is smaller than its SFT model"
    yield is_wrong, "correction.rm_init", need, "change it"


def _strategy(config: RunConfig) -> Checks:
    strategy, synthetic, ensemble = config.correction.strategy, config.correction.rlp_spg, config.reward.ensemble
    learns_from_rollouts = strategy in ("metarm", "rlp_spg", "rlp_uml", "relabel")
    need = f"at least 2: correction.strategy {strategy} learns from what a prompt's responses differ in"
    is_wrong = learns_from_rollouts and config.rollout.samples_per_prompt < 2
    yield is_wrong, "rollout.samples_per_prompt", need, "raise it, or use another strategy"
    is_wrong = strategy in ("metarm", "rlp_uml") and config.refit_zero_stage == 3
    yield is_wrong, _refit_stage(config), f"0 to 2 with correction.strategy {strategy}", "lower it"
    is_wrong = strategy == "relabel" and config.gold is None and config.world is None
    yield is_wrong, "correction.strategy", "a gold reward for fresh labels", "set gold, or use another strategy"
    need, do = "a model for clusterer nli", "name it, or use another clusterer"
    yield synthetic.clusterer == "nli" and synthetic.model is None, "correction.rlp_spg.model", need, do
    need, do = "nothing with clusterer exact", "remove it, or change the clusterer"
    yield synthetic.clusterer == "exact" and synthetic.model is not None, "correction.rlp_spg.model", need, do
    offline = config.policy.is_offline
    need, do = f"none with policy.algorithm {config.policy.algorithm}: it uses no reward model", "set it to none"
    yield offline and strategy != "none", "correction.strategy", need, do
    need, do = "sft or unknown: the offline policy is compared with its start", "change it, or use another algorithm"
    yield offline and config.pairs.behaviour not in ("sft", "unknown"), "pairs.behaviour", need, do
    is_several = ensemble.num_members > 1
    need, do = "nothing beside reward.ensemble: its members are trained", "remove it, or set num_members: 1"
    yield is_several and config.reward.ready is not None, "reward.ready", need, do
    is_wrong = not is_several and ensemble.aggregate == "mean_minus_variance"
    need = "at least 2: one member has no variance"
    yield is_wrong, "reward.ensemble.num_members", need, "raise it, or change the aggregate"


def _refit_stage(config: RunConfig) -> str:
    """The key that says it."""
    return "policy.zero_stage" if config.pools.reward.refit_zero_stage is None else "pools.reward.refit_zero_stage"


def _policy(config: RunConfig) -> Checks:
    policy, rollout = config.policy, config.rollout
    need = f"at least 2 for {policy.algorithm}, which compares the samples of a prompt"
    is_online = not policy.is_offline
    is_wrong = is_online and policy.algorithm != "ppo" and rollout.samples_per_prompt < 2
    yield is_wrong, "rollout.samples_per_prompt", need, "raise it, or use ppo"
    num_samples = rollout.prompts_per_step * rollout.samples_per_prompt
    need, do = f"a divisor of the {num_samples} samples of a step", "change it, or rollout.prompts_per_step"
    yield is_online and num_samples % policy.num_minibatches > 0, "policy.num_minibatches", need, do
    least = {"none": 0, "optimizer": 1, "all": 3}[policy.offload]
    need = f"at least {least} with policy.offload {policy.offload}"
    for key, stage in {_refit_stage(config): config.refit_zero_stage, "policy.zero_stage": policy.zero_stage}.items():
        yield stage < least, key, need, "raise it, or change policy.offload"
    pools = config.pools
    for name, pool, num_ranks in (
        ("policy", pools.policy, pools.policy.num_actors),
        ("reward", pools.reward, pools.reward.num_refit_ranks),
    ):
        is_wrong = num_ranks > 1 and 0 < pool.gpus_per_actor < 1
        yield is_wrong, f"pools.{name}.gpus_per_actor", "0 or 1: several ranks cannot share a GPU", "change it"
    refused = sorted(OWN_DEEPSPEED_KEYS & set(policy.deepspeed))
    if "stage" in policy.deepspeed.get("zero_optimization", {}):
        refused.append("zero_optimization.stage")
    need = f"nothing about {', '.join(refused)}: other settings say it"
    yield bool(refused), "policy.deepspeed", need, "remove it"
    uses_kl_loss = is_online and policy.kl_placement == "loss" and policy.kl_coefficient > 0
    is_wrong = uses_kl_loss and policy.kl_estimator == "k1"
    need = "k2 or k3 with kl_placement loss: the gradient of k1 is zero on average"
    yield is_wrong, "policy.kl_estimator", need, "change it, or place it in the reward"
    is_wrong = rollout.straggler == "reissue" and rollout.max_staleness == 0
    need = "wait with max_staleness 0: a prompt issued again would be as late"
    yield is_wrong, "rollout.straggler", need, "change it, or raise max_staleness"


def _evaluation(config: RunConfig) -> Checks:
    evaluation, num_heldout = config.evaluation, config.data.num_heldout
    yield config.pools.evaluation.num_actors != 1, "pools.evaluation.num_actors", "1: one actor evaluates", "remove it"
    need, do = f"at most {num_heldout}, as data.num_heldout", "lower it, or raise data.num_heldout"
    yield evaluation.num_prompts > num_heldout, "evaluation.num_prompts", need, do
    for key in ("num_pair_prompts", "num_samples_saved"):
        is_wrong = getattr(evaluation, key) > evaluation.num_prompts
        yield is_wrong, f"evaluation.{key}", f"at most {evaluation.num_prompts}, as evaluation.num_prompts", "lower it"


def _determinism(config: RunConfig) -> Checks:
    rollout, correction = config.rollout, config.correction
    if not config.deterministic:
        return
    why = "with deterministic: true"
    for name, pool in config.pools:
        yield pool.dtype != "float32", f"pools.{name}.dtype", f"float32 {why}", "change it"
        need = f"0 {why}: on GPUs the order of sums varies"
        yield pool.gpus_per_actor > 0, f"pools.{name}.gpus_per_actor", need, "set it to 0"
    need = f"1 {why}: what is decoded together changes its rounding"
    yield config.pools.generation.max_running > 1, "pools.generation.max_running", need, "set it to 1"
    if config.policy.is_offline:
        return
    need, do = f"0 {why}: else timing decides which rollouts a step takes", "set it to 0"
    yield rollout.max_staleness > 0, "rollout.max_staleness", need, do
    is_wrong = rollout.straggler == "reissue" and rollout.max_staleness > 0  # with 0 it is refused anyway
    yield is_wrong, "rollout.straggler", f"wait {why}", "set it to wait"
    is_wrong = correction.schedule == "overlapped" and correction.promote_after is None
    need = f"a number of updates {why}: else timing decides when a refit goes live"
    do = "set it" if correction.max_lag is None else "set it in place of correction.max_lag"
    yield is_wrong, "correction.promote_after", need, f"{do}, or set correction.schedule: blocking"


def _world(config: RunConfig) -> Checks:
    world, rollout, num_heldout = config.world, config.rollout, config.data.num_heldout
    if world is None:
        return
    most, least = math.perm(len(praise.TOPICS), praise.PROMPT_WORDS), num_heldout + rollout.prompts_per_step
    need = f"{least} (data.num_heldout and those of one step) to {most} (all there are)"
    yield not least <= world.num_prompts <= most, "world.num_prompts", need, "change it, or data.num_heldout"
    for key in ("policy_hidden_size", "reward_hidden_size"):
        need = f"a multiple of {praise.HEAD_DIM}, the width of a head"
        yield getattr(world, key) % praise.HEAD_DIM > 0, f"world.{key}", need, "change it"
    shortest, longest = world.response_words + 1, praise.MAX_TOKENS - praise.PROMPT_WORDS
    need = f"{shortest} (its responses and EOS) to {longest} (its models' context less the prompt) with world"
    yield not shortest <= rollout.max_new_tokens <= longest, "rollout.max_new_tokens", need, "change it"


def _sleep(config: RunConfig) -> Checks:
    if not config.pools.generation.sleeps:
        return
    key, do = "pools.generation.sleeps", "set it to false"
    yield config.pools.generation.gpus_per_actor == 0, key, "false without GPUs: an engine on CPU keeps its memory", do
    yield config.policy.is_offline, key, f"false with {config.policy.algorithm}: nobody waits for its samples", do
    need = "0 with pools.generation.sleeps: a sleeping engine samples nothing ahead"
    yield config.rollout.max_staleness > 0, "rollout.max_staleness", need, f"set it to 0, or {key} to false"


def _placement(config: RunConfig) -> Checks:
    for name, pool in config.pools:
        key, host = f"pools.{name}", pool.colocate_with
        is_wrong = host is not None and (host == name or getattr(config.pools, host).colocate_with is not None)
        yield is_wrong, f"{key}.colocate_with", "another pool, with a placement group of its own", "name another"
        is_wrong = host is not None and pool.strategy != "pack"
        yield is_wrong, f"{key}.strategy", f"pack beside colocate_with: the strategy of {host} counts", "remove it"
        is_wrong = bool(pool.resources.keys() & {"CPU", "GPU", "memory", "object_store_memory"})
        yield is_wrong, f"{key}.resources", "custom resources", "use cpus_per_actor and gpus_per_actor for others"
        is_wrong = not all(map(_SELECTOR.fullmatch, pool.labels.values()))
        yield is_wrong, f"{key}.labels", "VALUE, !VALUE, in(A,B) or !in(A,B) for each", "correct it"
        is_wrong = pool.gpus_per_actor > 1 and (name != "generation" or pool.gpus_per_actor % 1 > 0)
        need = "at most 1, or a whole number of GPUs of an engine"
        yield is_wrong, f"{key}.gpus_per_actor", need, "change it, and num_actors"
