"""A configuration against the world outside: model folders, data, the run folder, the machine. Reads only."""

import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ocrm_ray import praise
from ocrm_ray.config import ClassifierGold, DataFile, FunctionGold, RunConfig, SimilarityGold
from ocrm_ray.config_file import anchored, load_run_config
from ocrm_ray.config_problems import shown
from ocrm_ray.errors import Problem, UserError
from ocrm_ray.machine import NetworkSizes, machine_problems
from ocrm_ray.model_folders import (
    ModelFacts,
    Role,
    backbone_difference,
    is_hub_name,
    read_model,
    vocabulary_difference,
)
from ocrm_ray.stage_settings import stage_differences


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
    if not (os.path.isfile(metrics) and os.path.getsize(metrics)):
        return []
    do = "choose another name, or pass --resume"
    return [Problem("name", f"{shown(config.name)}, a run that has begun in {config.run_dir}", "a new run folder", do)]


def _read_models(config: RunConfig) -> tuple[dict[str, ModelFacts], list[Problem]]:
    """Facts of the readable local model folders, by configuration key, and what is wrong with the others."""
    named: list[tuple[str, str | None, Role]] = [
        ("sft.ready", config.sft.ready, "policy"),
        ("sft.base", config.sft.base, "policy"),
        ("reward.ready", config.reward.ready, "reward"),
        ("reward.base", config.reward.base, "backbone"),
    ]
    if config.pairs.ready is not None and config.pairs.behaviour not in ("sft", "unknown"):
        named.append(("pairs.behaviour", config.pairs.behaviour, "policy"))
    if isinstance(config.gold, ClassifierGold | SimilarityGold):
        named.append(("gold.model", config.gold.model, "classifier" if config.gold.kind == "classifier" else "encoder"))
    models: dict[str, ModelFacts] = {}
    problems: list[Problem] = []
    for key, name, role in named:
        if name is not None:
            facts, found = read_model(key, name, role)
            problems += found
            if facts is not None:
                models[key] = facts
    return models, problems


def _model_problems(config: RunConfig, models: dict[str, ModelFacts]) -> Iterator[Problem]:
    policy = models.get("sft.ready") or models.get("sft.base")
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for key, facts in models.items():
        if key != "gold.model" and facts.context is not None and longest > facts.context:
            got = f"{config.data.max_prompt_tokens} with rollout.max_new_tokens {config.rollout.max_new_tokens}"
            need = f"at most {facts.context} together, the context of {key}"
            yield Problem("data.max_prompt_tokens", got, need, "lower one of the two")
    if policy is None:
        return
    for key in ("reward.ready", "reward.base", "pairs.behaviour"):
        if key in models and (difference := _token_difference(policy, models[key])):
            need = "the policy's vocabulary (token ids are passed on)"
            yield Problem(key, f"another vocabulary, {difference}", need, "choose a model of the same family")
    reward = models.get("reward.ready") or models.get("reward.base")
    correction = config.correction
    if correction.strategy != "none" and correction.rm_init == "sft" and reward is not None:
        difference = backbone_difference(policy, reward)
        if difference:
            need = f"base or previous: SFT and reward model differ ({difference})"
            yield Problem("correction.rm_init", "sft", need, "change it, or use a reward model of the same shape")


def _token_difference(policy: ModelFacts, other: ModelFacts) -> str | None:
    has_both = all((facts.folder / "tokenizer.json").is_file() for facts in (policy, other))
    if has_both:
        return vocabulary_difference(policy, other)
    if policy.vocab_size is not None and other.vocab_size is not None and other.vocab_size < policy.vocab_size:
        return f"{policy.vocab_size} and {other.vocab_size} tokens"
    return None


def _data_problems(config: RunConfig) -> list[Problem]:
    from ocrm_ray.preferences import inspect_pairs
    from ocrm_ray.prompts import inspect_prompts

    problems: list[Problem] = []
    prompts = config.data.prompts
    if prompts is not None:
        found = _inspected(prompts, "data.prompts", inspect_prompts)
        problems += found or _count_problems(config, prompts)
    if config.pairs.ready is not None:
        problems += _inspected(config.pairs.ready, "pairs.ready", inspect_pairs)
    return problems


def _inspected(file: DataFile, key: str, look: Callable[[DataFile, str], list[Problem]]) -> list[Problem]:
    if is_hub_name(file.path) and not Path(file.path).suffix:
        return []
    if not os.path.exists(file.path):
        got = f"{shown(file.path)}, which does not exist"
        return [Problem(f"{key}.path", got, "a JSON, JSONL or Parquet file or a Hub name org/name", "correct the path")]
    return look(file, key)


def _count_problems(config: RunConfig, prompts: DataFile) -> list[Problem]:
    from ocrm_ray.data_files import read_rows

    needed = config.data.num_heldout + config.rollout.prompts_per_step
    if not os.path.exists(prompts.path):
        return []
    try:
        num_rows = len(read_rows(prompts, "data.prompts", needed))
    except UserError as error:
        return list(error.problems)
    if num_rows >= needed:
        return []
    got = f"{config.data.num_heldout} with {num_rows} prompts in {prompts.path}"
    need = f"at most {max(0, num_rows - config.rollout.prompts_per_step)}, so that one step's prompts are left"
    return [Problem("data.num_heldout", got, need, "lower it, or add prompts")]


def _gold_problems(config: RunConfig) -> Iterator[Problem]:
    if not isinstance(config.gold, FunctionGold) or ":" not in config.gold.path:
        return
    module = config.gold.path.partition(":")[0]
    places = [str(Path.cwd()), *sys.path]
    for depth, part in enumerate(module.split("."), start=1):
        spec = importlib.machinery.PathFinder.find_spec(part, places)
        if spec is None:
            name = ".".join(module.split(".")[:depth])
            got = f"{shown(config.gold.path)}, whose module {name} is not found"
            yield Problem("gold.path", got, "a module of this environment or folder", "correct it, or install it")
            return
        places = list(spec.submodule_search_locations or [])


def _folder_problems(config: RunConfig) -> Iterator[Problem]:
    folders = {"output_dir": config.output_dir, "stages_dir": config.stages_dir}
    for key, folder in folders.items():
        if folder is None:
            continue
        existing = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)
        if not os.path.isdir(existing):
            yield Problem(key, f"{shown(str(folder))}, where {existing} is a file", "a folder", "change it")
        elif not os.access(existing, os.W_OK | os.X_OK):
            yield Problem(key, f"{shown(str(folder))}, which cannot be written", "a writable folder", "change it")
    before = config.run_dir / "config.yaml"
    if not os.path.isfile(before):
        return
    try:
        cwd = Path.cwd()
        differences = stage_differences(load_run_config(before, [], cwd=cwd), anchored(config, cwd))
    except UserError:
        got = f"{shown(config.name)}, whose {before} cannot be read"
        yield Problem("name", got, "a run folder of this version, or a new one", "choose another name")
        return
    if differences:
        shown_differences = [f"{key} {shown(value)} (now {shown(now)})" for key, value, now in differences[:3]]
        more = f" and {len(differences) - 3} other settings" if len(differences) > 3 else ""
        got = f"{shown(config.name)}, whose folder {config.run_dir} was made with {', '.join(shown_differences)}{more}"
        yield Problem("name", got, "a run folder of its own", "choose another name, or change that back")


def _sizes(config: RunConfig, models: dict[str, ModelFacts]) -> NetworkSizes | None:
    if config.world is not None:
        vocabulary = len(praise.VOCABULARY)
        policy, reward = (
            num_layers * (4 * width**2 + 3 * width * 4 * width) + vocabulary * width
            for num_layers, width in ((2, config.world.policy_hidden_size), (1, config.world.reward_hidden_size))
        )
        return NetworkSizes(policy, reward, vocabulary)
    sft = models.get("sft.ready") or models.get("sft.base")
    named = config.reward.ready or config.reward.base
    rm = models.get("reward.ready") or models.get("reward.base") if named else sft
    if sft is None or rm is None:
        return None
    gold = models.get("gold.model")
    return NetworkSizes(sft.num_parameters, rm.num_parameters, sft.vocab_size or 0, gold.num_parameters if gold else 0)
