"""What is wrong with a configuration that is well-formed: settings that contradict each other, and the world outside.

``contradictions`` looks at the configuration alone; ``inspect`` also reads models, data, the run folder and the
machine. Neither writes, loads a network or asks the Hub.
"""

import math
import re
from collections.abc import Iterator

from ocrm_ray import praise
from ocrm_ray.config import FunctionGold, RunConfig, StudyConfig
from ocrm_ray.config_file import SHARED, arm_problems, study_runs
from ocrm_ray.config_problems import shown
from ocrm_ray.errors import Problem
from ocrm_ray.inspection import inspect as inspect
from ocrm_ray.machine import pools_by_name
from ocrm_ray.stage_settings import stage_differences

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def contradictions(config: RunConfig) -> list[Problem]:
    """Settings that cannot stand together, all of them; pure."""
    checks = (_sources, _pairs, _ratios, _correction, _policy, _evaluation, _world, _pools)
    return [problem for check in checks for problem in check(config)]


def study_problems(study: StudyConfig) -> list[Problem]:
    """Contradictions and inspection of every run of a study, told once, of its base or its arm."""
    per_arm: dict[str, list[Problem]] = {arm: [] for arm in study.arms}
    first: RunConfig | None = None
    for arm, _, config in study_runs(study):
        found = per_arm[arm]
        found += [problem for problem in [*contradictions(config), *inspect(config)] if problem not in found]
        first = first or config
        for key, ours, theirs in stage_differences(config, first.model_copy(update={"seed": config.seed})):
            problem = Problem(key, shown(ours), f"{shown(theirs)}, as in the first arm", _of_shared_stages(study))
            found += [problem] if problem not in found else []
    return arm_problems(study, per_arm)


def _of_shared_stages(study: StudyConfig) -> str:
    return f"move it to base: the arms share the stages in {study.output_dir / study.name / SHARED}"


def _sources(config: RunConfig) -> Iterator[Problem]:
    gold = config.gold
    given = {
        "data.prompts": config.data.prompts and config.data.prompts.path,
        "sft.ready": config.sft.ready,
        "sft.base": config.sft.base,
        "pairs.ready": config.pairs.ready and config.pairs.ready.path,
        "reward.ready": config.reward.ready,
        "reward.base": config.reward.base,
        "gold": gold and gold.kind,
    }
    if config.world is not None:
        for path, value in given.items():
            if value is not None:
                yield Problem(path, shown(value), "nothing beside world", "remove it, or remove world")
    else:
        if given["data.prompts"] is None:
            yield Problem("data.prompts", "nothing", "prompts, or the embedded world", "set it, or set world: {}")
        if given["sft.ready"] is None and given["sft.base"] is None:
            yield Problem("sft", "neither ready nor base", "a model to start from", "set sft.base or sft.ready")
        if gold is None and given["pairs.ready"] is None:
            need = "a gold reward that labels the sampled pairs, or ready pairs"
            yield Problem("gold", "nothing", need, "set gold or pairs.ready")
    for section in ("sft", "reward"):
        base, ready = given[f"{section}.base"], given[f"{section}.ready"]
        if base is not None and ready is not None:
            need = f"nothing beside {section}.ready"
            yield Problem(f"{section}.base", shown(base), need, "remove one of the two")
    if isinstance(gold, FunctionGold) and not _IMPORT_PATH.fullmatch(gold.path):
        yield Problem("gold.path", shown(gold.path), "package.module:function", "correct the import path")


def _pairs(config: RunConfig) -> Iterator[Problem]:
    pairs = config.pairs
    if pairs.ready is not None:
        return
    if pairs.behaviour != "sft":
        do = "remove it, or set pairs.ready"
        yield Problem("pairs.behaviour", shown(pairs.behaviour), "sft, since the pairs are sampled from it", do)
    if pairs.num_pairs < 2:
        yield Problem("pairs.num_pairs", "1", "at least 2, one of them held out", "raise it")
        return
    num_training = pairs.num_pairs - max(1, round(pairs.heldout_share * pairs.num_pairs))
    if num_training < 1:
        need = f"less than 1 - 1 / pairs.num_pairs ({pairs.num_pairs})"
        yield Problem("pairs.heldout_share", f"{pairs.heldout_share:g}", need, "lower it: no pair is left to train on")
    wanted = config.correction.num_pairs
    if wanted is not None and wanted > max(1, num_training):
        need = f"at most {num_training}, the training pairs"
        yield Problem("correction.num_pairs", str(wanted), need, "lower it, or raise pairs.num_pairs")
    if config.reward.num_calibration > 2 * pairs.num_pairs:
        need = f"at most {2 * pairs.num_pairs}, the responses of pairs.num_pairs {pairs.num_pairs}"
        yield Problem("reward.num_calibration", str(config.reward.num_calibration), need, "lower it")


def _ratios(config: RunConfig) -> Iterator[Problem]:
    if config.correction.strategy != "ocrm":
        return
    pairs = config.pairs
    if pairs.ready is not None and pairs.behaviour == "unknown" and not pairs.allow_unknown_behaviour:
        do = "name it, set pairs.allow_unknown_behaviour: true, or use strategy refit"
        yield Problem("pairs.behaviour", "unknown with strategy ocrm", "the model that wrote the pairs", do)
    for section, sampling in (("pairs", pairs), ("rollout", config.rollout)):
        for key, value, off in (("top_p", sampling.top_p, 1.0), ("top_k", sampling.top_k, 0)):
            if value != off:
                need = f"{off:g}: the importance ratio of truncated sampling is biased"
                got = f"{value:g} with strategy ocrm"
                yield Problem(f"{section}.{key}", got, need, f"set it to {off:g}, or use strategy refit")


def _correction(config: RunConfig) -> Iterator[Problem]:
    correction = config.correction
    bounds = {"promote_after": correction.promote_after, "max_lag": correction.max_lag}
    if None not in bounds.values():
        got = f"{correction.max_lag} beside promote_after {correction.promote_after}"
        yield Problem("correction.max_lag", got, "one of the two", "remove one")
    if correction.schedule == "blocking":
        for key, value in bounds.items():
            if value is not None:
                need = "nothing: a blocking correction is promoted before the next update"
                yield Problem(f"correction.{key}", f"{value} with schedule blocking", need, "remove it")
    if correction.critic_on_promote == "reinit" and config.policy.algorithm != "ppo":
        got = f"reinit with policy.algorithm {config.policy.algorithm}"
        yield Problem("correction.critic_on_promote", got, "keep: only ppo has a critic", "set it to keep")
    if correction.strategy != "none" and correction.rm_init == "sft" and config.world is not None:
        need = "base or previous: the world's reward model is smaller than its SFT model"
        yield Problem("correction.rm_init", "sft with world", need, "change it")


def _policy(config: RunConfig) -> Iterator[Problem]:
    policy, rollout = config.policy, config.rollout
    if policy.algorithm != "ppo" and rollout.samples_per_prompt < 2:
        need = f"at least 2 for {policy.algorithm}, which compares the samples of a prompt"
        yield Problem("rollout.samples_per_prompt", str(rollout.samples_per_prompt), need, "raise it, or use ppo")
    num_samples = rollout.prompts_per_step * rollout.samples_per_prompt
    parts = policy.num_minibatches
    if num_samples % parts:
        need = f"a divisor of the {num_samples} samples of a step"
        yield Problem("policy.num_minibatches", str(parts), need, "change it, or rollout.prompts_per_step")
    elif num_samples // parts % config.pools.policy.num_actors:
        need = f"a divisor of the {num_samples // parts} samples of a minibatch"
        yield Problem("pools.policy.num_actors", str(config.pools.policy.num_actors), need, "change it")
    if policy.kl_placement == "loss" and policy.kl_estimator == "k1" and policy.kl_coefficient > 0:
        need = "k2 or k3: the gradient of k1 is zero on average"
        yield Problem("policy.kl_estimator", "k1 with kl_placement loss", need, "change it, or place it in the reward")
    if rollout.straggler == "reissue" and rollout.max_staleness == 0:
        need = "wait: a prompt issued again would be as late"
        yield Problem("rollout.straggler", "reissue with max_staleness 0", need, "change it, or raise max_staleness")


def _evaluation(config: RunConfig) -> Iterator[Problem]:
    evaluation, num_heldout = config.evaluation, config.data.num_heldout
    if evaluation.num_prompts > num_heldout:
        need = f"at most {num_heldout}, as data.num_heldout"
        yield Problem(
            "evaluation.num_prompts", str(evaluation.num_prompts), need, "lower it, or raise data.num_heldout"
        )
    for key in ("num_pair_prompts", "num_samples_saved"):
        if (value := getattr(evaluation, key)) > evaluation.num_prompts:
            need = f"at most {evaluation.num_prompts}, as evaluation.num_prompts"
            yield Problem(f"evaluation.{key}", str(value), need, "lower it")


def _world(config: RunConfig) -> Iterator[Problem]:
    world, rollout = config.world, config.rollout
    if world is None:
        return
    num_possible = math.perm(len(praise.TOPICS), praise.PROMPT_WORDS)
    if world.num_prompts > num_possible:
        need = f"at most {num_possible}, all there are"
        yield Problem("world.num_prompts", str(world.num_prompts), need, "lower it")
    if world.num_prompts < (needed := config.data.num_heldout + rollout.prompts_per_step):
        need = f"at least {needed}: data.num_heldout {config.data.num_heldout} and those of one step"
        yield Problem("world.num_prompts", str(world.num_prompts), need, "raise it, or lower data.num_heldout")
    for key in ("policy_hidden_size", "reward_hidden_size"):
        if (size := getattr(world, key)) % praise.HEAD_DIM:
            need = f"a multiple of {praise.HEAD_DIM}, the width of a head"
            yield Problem(f"world.{key}", str(size), need, "change it")
    shortest, longest = praise.RESPONSE_WORDS + 1, praise.MAX_TOKENS - praise.PROMPT_WORDS
    if not shortest <= rollout.max_new_tokens <= longest:
        need = f"{shortest} (its responses and EOS) to {longest} (its models' context less the prompt) with world"
        yield Problem("rollout.max_new_tokens", str(rollout.max_new_tokens), need, "change it")
    if config.data.chat_template == "always":
        need = "auto or never: the world's tokenizer has no chat template"
        yield Problem("data.chat_template", "always with world", need, "change it")


def _pools(config: RunConfig) -> Iterator[Problem]:
    for name, pool in pools_by_name(config).items():
        if pool.gpus_per_actor > 1 and not pool.gpus_per_actor.is_integer():
            need = "a whole number, or a share of one GPU (Ray gives no other)"
            yield Problem(f"pools.{name}.gpus_per_actor", f"{pool.gpus_per_actor:g}", need, "change it")
    if config.pools.evaluation.num_actors != 1:
        got = str(config.pools.evaluation.num_actors)
        yield Problem("pools.evaluation.num_actors", got, "1: one actor evaluates", "remove it")
