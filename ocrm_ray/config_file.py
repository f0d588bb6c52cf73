"""From YAML files and ``key=value`` overrides to runs and studies, every mistake told at once.

A relative path inside a configuration means relative to the current directory (not to the file).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from ocrm_ray.config import RunConfig, Section, StudyConfig
from ocrm_ray.config_problems import shown, validation_problems
from ocrm_ray.config_tree import Tree, merged, nested, read_tree
from ocrm_ray.errors import Problem, UserError

Config = TypeVar("Config", bound=Section)

SET_BY_STUDY = ("name", "output_dir", "stages_dir", "seed")
SHARED = "shared"


def load_run_config(path: Path, overrides: Sequence[str], *, cwd: Path | None = None) -> RunConfig:
    """One run's configuration.

    With ``cwd`` its relative paths are made absolute there, for processes that work in another directory.
    Raises UserError with everything that is wrong in the file and the overrides.
    """
    tree, problems = read_tree(path, overrides)
    if "arms" in tree:
        raise UserError([Problem(str(path), "a study (it has the key arms)", "one run", "use ocrm-ray study")])
    config = _validated(RunConfig, tree, problems)
    return config if cwd is None else anchored(config, cwd)


def load_study_config(path: Path, overrides: Sequence[str]) -> StudyConfig:
    """A study's configuration; each arm is validated too. Raises UserError with everything that is wrong."""
    tree, problems = read_tree(path, overrides)
    if "arms" not in tree:
        raise UserError(
            [Problem(str(path), "a configuration without arms", "a study", "use ocrm-ray run, or add arms")]
        )
    return _study(tree, problems)


def load_any(path: Path, overrides: Sequence[str]) -> RunConfig | StudyConfig:
    """A study where the tree has the key ``arms``, else a run."""
    tree, problems = read_tree(path, overrides)
    return _study(tree, problems) if "arms" in tree else _validated(RunConfig, tree, problems)


def _study(tree: Tree, problems: list[Problem]) -> StudyConfig:
    study = _valid_or_none(StudyConfig, tree, problems)
    if study is not None:
        problems += _study_contradictions(study)
        try:
            study_runs(study)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    assert study is not None
    return study


def study_runs(study: StudyConfig, *, cwd: Path | None = None) -> list[tuple[str, int, RunConfig]]:
    """(arm, seed, configuration) of every run, seeds innermost; ``cwd`` as for ``load_run_config``.

    Run folders are ``output_dir/STUDY/ARM/seed-N``; the arms of a seed share ``output_dir/STUDY/shared/seed-N``.
    Raises UserError with everything that is wrong in the arms.
    """
    root = study.output_dir / study.name
    runs: list[tuple[str, int, RunConfig]] = []
    per_arm: dict[str, list[Problem]] = {}
    for arm, changes in study.arms.items():
        tree = merged(study.base, nested(changes))
        try:
            config = _validated(
                RunConfig, tree | {"name": arm, "output_dir": str(root), "stages_dir": None, "seed": 0}, []
            )
        except UserError as error:
            per_arm[arm] = list(error.problems)
            continue
        for seed in study.seeds:
            folders = {"output_dir": root / arm, "stages_dir": root / SHARED / f"seed-{seed}"}
            run = config.model_copy(update={"name": f"seed-{seed}", "seed": seed, **folders})
            runs.append((arm, seed, run if cwd is None else anchored(run, cwd)))
    if per_arm:
        raise UserError(arm_problems(study, per_arm))
    return runs


def arm_problems(study: StudyConfig, per_arm: Mapping[str, Sequence[Problem]]) -> list[Problem]:
    """Problems of runs as problems of their study: of ``base`` where all arms have them, else of the arm."""
    found: dict[Problem, None] = {}
    for arm, problems in per_arm.items():
        for problem in problems:
            of_all = all(problem in per_arm.get(other, ()) for other in study.arms)
            set_by_arms = any(_touches(nested(changes), problem.path) for changes in study.arms.values())
            prefix = "base." if of_all and not set_by_arms else f"arms.{arm}."
            if problem.path in SET_BY_STUDY:
                prefix = ""
            found[Problem(prefix + problem.path, problem.got, problem.need, problem.do)] = None
    return list(found)


def _touches(tree: object, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(tree, Mapping):
            return True
        if part not in tree:
            return False
        tree = tree[part]
    return True


def _study_contradictions(study: StudyConfig) -> list[Problem]:
    problems = [
        Problem(
            f"base.{key}", shown(study.base[key]), "no such key in a study's base", f"remove it: the study sets {key}"
        )
        for key in SET_BY_STUDY
        if key in study.base
    ]
    for arm, changes in study.arms.items():
        problems += [
            Problem(
                f"arms.{arm}.{key}", shown(changes[key]), "no such key in an arm", f"remove it: the study sets {key}"
            )
            for key in SET_BY_STUDY
            if key in changes
        ]
    if not study.arms:
        problems.append(Problem("arms", "none", "at least one arm", "add one"))
    if SHARED in study.arms:
        problems.append(
            Problem(f"arms.{SHARED}", "an arm called shared", "another name", "rename it: stages live there")
        )
    if not study.seeds:
        problems.append(Problem("seeds", "none", "at least one seed", "add one"))
    if len(set(study.seeds)) < len(study.seeds):
        problems.append(Problem("seeds", shown(study.seeds), "each seed once", "remove the repeated ones"))
    return problems


def anchored(config: RunConfig, cwd: Path) -> RunConfig:
    """The configuration with relative paths made absolute at ``cwd``; what is no file there stays (a Hub name)."""
    tree = config.model_dump(mode="json")
    for parent, key in (
        *((tree["sft"], key) for key in ("ready", "base")),
        *((tree["reward"], key) for key in ("ready", "base")),
        (tree["pairs"], "behaviour"),
        (tree["gold"] or {}, "model"),
        (tree["data"]["prompts"] or {}, "path"),
        (tree["pairs"]["ready"] or {}, "path"),
    ):
        name = parent.get(key)
        if name and (cwd / name).exists() and (parent is not tree["pairs"] or name not in ("sft", "unknown")):
            parent[key] = str(cwd / name)
    tree["output_dir"] = str(cwd / config.output_dir)
    tree["stages_dir"] = None if config.stages_dir is None else str(cwd / config.stages_dir)
    return RunConfig.model_validate(tree)


def dump_yaml(config: Section) -> str:
    """The resolved tree, defaults included; ``load_run_config`` reads it back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _validated(model: type[Config], tree: Tree, problems: list[Problem]) -> Config:
    """Raises UserError, the problems found before first."""
    config = _valid_or_none(model, tree, problems)
    if problems:
        raise UserError(problems)
    assert config is not None
    return config


def _valid_or_none(model: type[Config], tree: Tree, problems: list[Problem]) -> Config | None:
    """The configuration, or None after adding to ``problems`` what is wrong with the tree."""
    try:
        # Strict, so that `true` is no 1 and "3" no 3; by way of JSON, where strictness still takes lists and paths.
        return model.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        known = {problem.path for problem in problems}
        problems += [problem for problem in validation_problems(error, model, tree) if problem.path not in known]
        return None
