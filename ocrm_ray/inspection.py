"""A configuration against the world outside: model folders, data, the run folder, the machine. Reads only."""

import importlib.machinery
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ocrm_ray import praise
from ocrm_ray.checkpoints import is_any
from ocrm_ray.config import ClassifierGold, FunctionGold, JudgeGold, RunConfig, SimilarityGold
from ocrm_ray.config_file import anchored, load_run_config
from ocrm_ray.config_problems import shown
from ocrm_ray.errors import Problem, UserError
from ocrm_ray.judge import endpoint
from ocrm_ray.machine import machine_problems
from ocrm_ray.memory import Layers, NetworkSizes, layers_of
from ocrm_ray.model_folders import (
    ModelFacts,
    Role,
    backbone_difference,
    is_hub_name,
    read_model,
    read_shape,
    shares_vocabulary,
)
from ocrm_ray.stage_settings import Differences, stage_differences

CLUSTERER = "correction.rlp_spg.model"


def inspect(config: RunConfig) -> list[Problem]:
    """What a run would stumble over on this machine, all of it."""
    models, problems = _read_models(config)
    return [
        *problems,
        *_model_problems(config, models),
        *_data_problems(config),
        *_gold_problems(config),
        *_folder_problems(config),
        *machine_problems(config, _sizes(config, models)),
    ]


def network_sizes(config: RunConfig) -> NetworkSizes | None:
    """Sizes of the networks of a run; None where a model is not on this machine."""
    return _sizes(config, _read_models(config)[0])


def occupied(config: RunConfig) -> list[Problem]:
    """The problem of a new run whose folder already has training steps (a resumed run may go on there)."""
    metrics = config.run_dir / "metrics.jsonl"
    if not (metrics.is_file() and metrics.stat().st_size):
        return []
    do = "choose another name, or pass --resume"
    return [Problem("name", f"{shown(config.name)}, a run that has begun in {config.run_dir}", "a new run folder", do)]


def _read_models(config: RunConfig) -> tuple[dict[str, ModelFacts], list[Problem]]:
    """Facts of the readable local model folders, by configuration key, and what is wrong with the others."""
    sft, reward, pairs, gold = config.sft, config.reward, config.pairs, config.gold
    named: list[tuple[str, str | None, Role]] = [
        ("sft.ready", sft.ready, "policy"),
        ("sft.base", sft.base, "policy"),
        ("reward.ready", reward.ready, "reward"),
        ("reward.base", reward.base, "backbone"),
        ("pairs.behaviour", pairs.behaviour if pairs.ready else None, "policy"),
    ]
    if isinstance(gold, ClassifierGold | SimilarityGold):
        named.append(("gold.model", gold.model, "classifier" if gold.kind == "classifier" else "encoder"))
    named.append((CLUSTERER, config.correction.rlp_spg.model, "encoder"))
    models: dict[str, ModelFacts] = {}
    problems: list[Problem] = []
    for key, name, role in named:
        if name not in (None, "sft", "unknown"):
            facts, found = read_model(key, name, role)
            problems += found
            models |= {key: facts} if facts else {}
    for role, shape in (("policy", config.assumed.policy), ("reward", config.assumed.reward)):
        if shape is not None:
            key = f"assumed.{role}"
            facts, found = read_shape(key, shape, "policy" if role == "policy" else "reward")
            problems += found
            models |= {key: facts} if facts else {}
    return models, problems


def _trained(models: Mapping[str, ModelFacts], stage: str, assumed: str) -> ModelFacts | None:
    """Of the model that ``sft`` or ``reward`` names, or what is assumed of it."""
    return models.get(f"{stage}.ready") or models.get(f"{stage}.base") or models.get(f"assumed.{assumed}")


def _model_problems(config: RunConfig, models: Mapping[str, ModelFacts]) -> Iterator[Problem]:
    policy, reward = _trained(models, "sft", "policy"), _trained(models, "reward", "reward")
    num_new, correction = config.rollout.max_new_tokens, config.correction
    for key, facts in models.items():
        reads_whole = key not in ("gold.model", CLUSTERER)
        if reads_whole and config.data.max_prompt_tokens + num_new > (facts.context or math.inf):
            got = f"{config.data.max_prompt_tokens} with rollout.max_new_tokens {num_new}"
            need = f"at most {facts.context} together, the context of {key}"
            yield Problem("data.max_prompt_tokens", got, need, "lower one of the two")
        takes_tokens = key in ("reward.ready", "reward.base", "pairs.behaviour")
        if policy and takes_tokens and not shares_vocabulary(policy, facts):
            got = f"{shown(str(facts.folder))} with another vocabulary"
            yield Problem(key, got, "the policy's token ids", "choose a model of the same family")
    difference = backbone_difference(policy, reward) if policy and reward else None
    if difference and correction.strategy != "none" and correction.rm_init == "sft":
        need = f"base or previous: SFT and reward model differ ({difference})"
        yield Problem("correction.rm_init", '"sft"', need, "change it, or use a reward model of the same shape")


def _data_problems(config: RunConfig) -> Iterator[Problem]:
    from ocrm_ray.preferences import PAIR_ROWS
    from ocrm_ray.prompts import PROMPT_ROWS

    num_heldout, num_step = config.data.num_heldout, config.rollout.prompts_per_step
    named = (config.data.prompts, PROMPT_ROWS, num_heldout + num_step), (config.pairs.ready, PAIR_ROWS, 0)
    for file, form, needed in named:
        if file and (Path(file.path).suffix or not is_hub_name(file.path)):
            try:
                num_rows = form.count(file, needed)
            except UserError as error:
                yield from error.problems
                continue
            if num_rows < needed:
                got, need = (
                    f"{num_heldout} with {num_rows} prompts in {file.path}",
                    f"{num_step} prompts left for a step",
                )
                yield Problem("data.num_heldout", got, need, "lower it, or add prompts")


def _gold_problems(config: RunConfig) -> Iterator[Problem]:
    if isinstance(config.gold, JudgeGold):
        try:
            endpoint(config.gold)
        except UserError as error:
            yield from error.problems
    if not isinstance(config.gold, FunctionGold):
        return
    module, _, function = config.gold.path.partition(":")
    package = module.partition(".")[0]
    found = package and importlib.machinery.PathFinder.find_spec(package, [str(Path.cwd()), *sys.path])
    if not (found and function.isidentifier()):
        need = "package.module:function, of this environment or folder"
        yield Problem("gold.path", shown(config.gold.path), need, "correct it, or install it")


def _folder_problems(config: RunConfig) -> Iterator[Problem]:
    cache_dir = config.gold.cache_file.parent if isinstance(config.gold, JudgeGold) else None
    named = ("output_dir", config.output_dir), ("stages_dir", config.stages_dir), ("gold.cache_file", cache_dir)
    for key, folder in named:
        existing = folder and next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        is_writable = existing and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
        if existing and (not is_writable or "\0" in str(folder)):
            yield Problem(key, shown(str(folder)), f"a folder that can be written ({existing} is none)", "change it")
    yield from made_with_others(config, _stage_and_first_gold)


def _stage_and_first_gold(config: RunConfig, other: RunConfig) -> Differences:
    """Beside stages, how many prompts' gold under the SFT model is kept in the run folder."""
    found, numbers = stage_differences(config, other), (config.evaluation.num_prompts, other.evaluation.num_prompts)
    if numbers[0] != numbers[1] and has_rl(other.run_dir) and (other.run_dir / "sft_gold.json").exists():
        found.append(("evaluation.num_prompts", *numbers))
    return found


def has_rl(run_dir: Path) -> bool:
    """Whether there are results of RL that a run would go on from, or leave as they are."""
    return is_any(run_dir) or (run_dir / "summary.json").exists()


def made_with_others(config: RunConfig, differ: Callable[[RunConfig, RunConfig], Differences]) -> Iterator[Problem]:
    """The problem of a run folder that is there already, with a configuration that ``differ`` finds different."""
    before = config.run_dir / "config.yaml"
    if not before.is_file():
        return
    try:
        differences = differ(load_run_config(before, [], cwd=Path.cwd()), anchored(config, Path.cwd()))
    except UserError:
        got = f"{shown(config.name)}, whose {before} cannot be read"
        yield Problem("name", got, "a run folder of this version, or a new one", "choose another name")
        return
    if differences:
        told = ", ".join(f"{key} {shown(value)} (now {shown(now)})" for key, value, now in differences[:3])
        got = f"{shown(config.name)}, whose folder {config.run_dir} was made with {told}"
        yield Problem("name", got, "a run folder of its own", "choose another name, or change that back")


def _sizes(config: RunConfig, models: Mapping[str, ModelFacts]) -> NetworkSizes | None:
    if config.world is not None:
        vocabulary = len(praise.VOCABULARY)
        policy, reward = (
            Layers(num_layers, width, width, width, 4 * width, width // praise.HEAD_DIM)
            for num_layers, width in ((2, config.world.policy_hidden_size), (1, config.world.reward_hidden_size))
        )
        sizes = (of.num_layers * (4 * of.hidden**2 + 3 * of.hidden * of.intermediate) for of in (policy, reward))
        of_policy, of_reward = (size + vocabulary * of.hidden for size, of in zip(sizes, (policy, reward), strict=True))
        return NetworkSizes(of_policy, of_reward, vocabulary, 0, policy, reward)
    sft = _trained(models, "sft", "policy")
    is_named = config.reward.ready or config.reward.base
    rm = _trained(models, "reward", "reward") if is_named else sft
    if sft is None or rm is None:
        return None
    gold, layers = models.get("gold.model"), layers_of(sft.settings)
    return NetworkSizes(
        sft.num_parameters,
        rm.num_parameters,
        sft.vocab_size,
        gold.num_parameters if gold else 0,
        layers,
        layers_of(rm.settings),
        sft.vocab_size * layers.hidden if layers and sft.settings.get("tie_word_embeddings") else 0,
    )
