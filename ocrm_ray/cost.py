"""How long a step will take: the slowest stage, from the section ``rehearsal``, else as measured in an earlier run of
the same folder, else from arithmetic at an assumed speed.

From arithmetic: a forward pass over n tokens of a network of P parameters costs 2 P n operations, training on them
three times that. Every prompt and response is taken at its longest. A pool runs at ``UTILISATION`` of what its
threads (``CPU_OPERATIONS_PER_S`` each) or GPUs (``GPU_OPERATIONS_PER_S`` each) could do; pools that share this
machine's cores cannot be faster together than the cores. Sampling adds ``DECODE_S`` for each token in sequence.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from ocrm_ray.config import Dtype, Pool, RunConfig
from ocrm_ray.memory import DTYPE_BYTES, NetworkSizes, longest
from ocrm_ray.progress import duration_text
from ocrm_ray.run_files import correction_windows, read_run

UTILISATION = 0.4
CPU_OPERATIONS_PER_S: Mapping[Dtype, float] = {"float32": 50e9, "bfloat16": 200e9}
"""A core with AVX-512, and with matrix instructions for bfloat16."""
GPU_OPERATIONS_PER_S: Mapping[Dtype, float] = {"float32": 50e12, "bfloat16": 800e12}
DECODE_S = 0.01
PUBLISH_BYTES_PER_S = 0.2e9
"""Saving, loading and repacking one copy of the weights."""
NCCL_BYTES_PER_S = 5e9
"""From the trainer's GPU to its host, back, and on to the engines' GPUs."""
REQUEST_S = 0.05
_ASSUMED = (
    f"assumed {UTILISATION:.0%} of {' or '.join(f'{rate / 1e9:g}' for rate in CPU_OPERATIONS_PER_S.values())} GFLOP/s "
    f"a core and {' or '.join(f'{rate / 1e12:g}' for rate in GPU_OPERATIONS_PER_S.values())} TFLOP/s a GPU "
    "(float32 or bfloat16), prompts and responses at their longest"
)
_REMEDY = "lower correction.num_pairs, or give pools.scoring (ratios) and pools.reward (refit) more threads or GPUs"


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step by stage, of the step, and of one correction's parts (None: not known, or no refit)."""

    source: str
    stage_s: Mapping[str, float]
    step_s: float
    ratio_s: float | None
    refit_s: float | None


def step_cost(config: RunConfig, sizes: NetworkSizes | None) -> StepCost | None:
    """The best prediction there is; None without all of durations, an earlier run and network sizes."""
    return rehearsed_cost(config) or measured_cost(config) or (predicted_cost(config, sizes) if sizes else None)


def rehearsed_cost(config: RunConfig) -> StepCost | None:
    """Expected seconds of the section ``rehearsal``, each stage spread over its workers; None without that section."""
    rehearsal, pools, num_prompts = config.rehearsal, config.pools, config.rollout.prompts_per_step
    if rehearsal is None:
        return None
    correction, slots = config.correction, pools.generation.num_actors * rehearsal.engine_slots
    # at each promotion the candidate, and half a score if the anchor moves, scores the queue at its longest
    queue = 0.0 if correction.strategy == "none" else (config.rollout.max_staleness + 1) / correction.every
    anchor_queue = queue / 2 if correction.kl_reference == "moving" else 0.0
    stages = {
        "generate": num_prompts * rehearsal.generate.mean_s(1) / slots + rehearsal.pause_s,
        "score": rehearsal.score.mean_s(num_prompts * (1 + anchor_queue) / pools.scoring.num_actors),
        "reward": rehearsal.reward.mean_s(num_prompts * (1 + queue) / pools.reward.num_actors),
        "train": rehearsal.train.mean_s(num_prompts),
        "publish": rehearsal.publish_s,
    }
    ratio_s = rehearsal.ratio_s if correction.scores_pairs else 0.0
    return StepCost("from rehearsal", stages, _step_s(config, stages), ratio_s, rehearsal.refit_s)


def _step_s(config: RunConfig, stages: Mapping[str, float]) -> float:
    """Stages overlap unless rollouts must be fresh; scores and rewards always do."""
    if config.rollout.max_staleness > 0:
        return max(stages.values())
    return sum(stages.values()) - min(stages["score"], stages.get("reward", 0.0))


def measured_cost(config: RunConfig) -> StepCost | None:
    """Means over the training steps and corrections in the run folder; None before there are any."""
    if not (config.run_dir / "metrics.jsonl").is_file():
        return None
    run = read_run(config.run_dir)
    steps = [row for row in run.metrics if row.get("step_s") and row.get("stage_s")]
    if not steps:
        return None
    stages = {stage: fmean(row["stage_s"].get(stage) or 0.0 for row in steps) for stage in steps[0]["stage_s"]}
    refitted = [window for window in correction_windows(run) if window.refitted_s is not None]
    # a refit without importance weights is never scored
    times = [(w.started_s, w.scored_s or w.started_s, w.refitted_s) for w in refitted]
    ratio_s, refit_s = (None, None) if not times else np.diff(np.array(times, dtype=float)).mean(axis=0).tolist()
    source = f"measured over {len(steps)} steps in {config.run_dir}"
    return StepCost(source, stages, fmean(row["step_s"] for row in steps), ratio_s, refit_s)


def predicted_cost(config: RunConfig, sizes: NetworkSizes) -> StepCost:
    """From operation counts; the module's text has the assumptions."""
    pools, policy, rollout = config.pools, config.policy, config.rollout
    length = longest(config)
    num_samples = rollout.prompts_per_step * rollout.samples_per_prompt
    forward, reward = (2.0 * size * num_samples * length for size in (sizes.policy, sizes.reward))
    critic = reward if policy.algorithm == "ppo" else 0.0
    num_anchors = 2 if config.correction.kl_reference == "moving" else 1
    train = (forward + critic) * (1 + 3 * policy.num_epochs)
    work = {"generation": forward, "scoring": num_anchors * forward, "reward": reward, "policy": train}
    publish_rate = NCCL_BYTES_PER_S if config.by_nccl else PUBLISH_BYTES_PER_S
    batches = -(-num_samples // (pools.generation.max_running * pools.generation.num_actors))
    worked = {name: pool for name, pool in pools if name in work}
    seconds = {name: REQUEST_S + work[name] / _speed(pool) for name, pool in worked.items()}
    stages = {
        "generate": seconds["generation"] + batches * rollout.max_new_tokens * DECODE_S,
        "score": max(seconds["scoring"], seconds["reward"]),
        "train": seconds["policy"],
        "publish": REQUEST_S + DTYPE_BYTES[pools.generation.dtype] * sizes.policy / publish_rate,
    }
    on_cpu = {name: CPU_OPERATIONS_PER_S[pool.dtype] for name, pool in worked.items() if not pool.gpus_per_actor}
    core_s = sum(work[name] / (UTILISATION * speed) for name, speed in on_cpu.items())
    step_s = max(_step_s(config, stages), core_s / (os.cpu_count() or 1))
    return StepCost(_ASSUMED, stages, step_s, *_correction_s(config, sizes, length))


def _speed(pool: Pool) -> float:
    """Operations a second of all actors of a pool."""
    if pool.gpus_per_actor:
        return UTILISATION * pool.num_actors * pool.gpus_per_actor * GPU_OPERATIONS_PER_S[pool.dtype]
    num_threads = min(pool.num_actors * pool.threads_per_actor, os.cpu_count() or 1)
    return UTILISATION * num_threads * CPU_OPERATIONS_PER_S[pool.dtype]


def _correction_s(config: RunConfig, sizes: NetworkSizes, length: int) -> tuple[float | None, float | None]:
    """Seconds of the ratios and of the refit; None, None where nothing is refitted or the pairs are not counted."""
    correction, pairs = config.correction, config.pairs
    sampled = None if pairs.ready else round(pairs.num_pairs * (1 - pairs.heldout_share))
    num_pairs = correction.num_pairs or sampled or (pairs.ready.limit if pairs.ready else None)
    if correction.strategy == "none" or num_pairs is None:
        return None, None
    tokens = 2.0 * num_pairs * length
    ratio = 2.0 * sizes.policy * tokens if correction.scores_pairs else 0.0
    calibration = 2.0 * sizes.reward * config.reward.num_calibration * length
    refit = 6.0 * sizes.reward * tokens * correction.training.num_epochs + calibration
    refit *= config.reward.ensemble.num_members
    pools = config.pools
    one_scorer = pools.scoring.model_copy(update={"num_actors": 1})
    refit_ranks = pools.reward.model_copy(update={"num_actors": pools.reward.num_refit_ranks})
    return ratio / _speed(one_scorer), refit / _speed(refit_ranks)


def cost_lines(config: RunConfig, cost: StepCost) -> list[str]:
    """The prediction in words: its source, the stages, and whether corrections keep up with the steps."""
    stages = ", ".join(f"{stage} {seconds_text(seconds)}" for stage, seconds in cost.stage_s.items())
    total = config.policy.num_updates * cost.step_s
    return [
        f"predicted step: {seconds_text(cost.step_s)} ({stages}), {cost.source}",
        f"predicted run: {config.policy.num_updates} updates, {duration_text(total)} without evaluations",
        "corrections: " + correction_line(config, cost),
    ]


def correction_line(config: RunConfig, cost: StepCost) -> str:
    """Whether a correction's work, done by one refitter, fits into the steps that it has."""
    correction = config.correction
    if correction.strategy == "none":
        return "none, the reward model stays as it is"
    if cost.ratio_s is None or cost.refit_s is None:
        return "not predicted, the number of pairs is not known (set correction.num_pairs)"
    needed = cost.ratio_s + cost.refit_s
    parts = f"ratios {seconds_text(cost.ratio_s)} + refit {seconds_text(cost.refit_s)}"
    if correction.schedule == "blocking":
        return f"{parts}, for which the run stops every {correction.every} updates (schedule blocking)"
    bounds = {"promote_after": correction.promote_after, "max_lag": correction.max_lag, "every": correction.every}
    bound, key = min((bound, key) for key, bound in bounds.items() if bound is not None)
    window = f"{bound} steps of {seconds_text(cost.step_s)} = {seconds_text(bound * cost.step_s)}"
    parts = f"({parts}) / 1 refitter"
    if needed <= bound * cost.step_s:
        return f"{parts} <= {window}: they keep up and nothing waits"
    waits = f"training waits {seconds_text(needed - bound * cost.step_s)} for each"
    result = "they fall behind" if key == "every" else waits
    return f"{parts} > {window}: {result}; set correction.{key} to {math.ceil(needed / cost.step_s)}, or {_REMEDY}"


def seconds_text(seconds: float) -> str:
    """``1.23 s``, ``12 s``."""
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
