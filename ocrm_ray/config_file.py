"""From YAML files and ``key=value`` overrides to runs and studies, every mistake told at once.

An override sets one dotted key; its value is read as YAML. A mapping is merged into the mapping that it meets, unless
the two name another ``kind``; anything else replaces what was there. A relative path inside a configuration means
relative to the current directory (not to the file).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml
from pydantic import ValidationError

from ocrm_ray.config import RunConfig, Section, StudyConfig
from ocrm_ray.config_problems import shown, validation_problems
from ocrm_ray.errors import Problem, UserError, mistake

Tree: TypeAlias = dict[str, Any]
Config = TypeVar("Config", bound=Section)

SET_BY_STUDY = ("name", "output_dir", "stages_dir", "seed")
SHARED = "shared"
MAX_DEPTH = 20
EARLY_STOPPING = "early_stopping"
"""The report's own arm."""
_PATH_KEYS = ("ready", "base", "behaviour", "model", "path")
_WRITTEN_KEYS = ("output_dir", "stages_dir", "cache_file")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-4`` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def load_any(path: Path, overrides: Sequence[str]) -> RunConfig | StudyConfig:
    """A study where the tree has the key ``arms``, else a run. Raises UserError with everything that is wrong."""
    tree, problems = _read(path, overrides)
    if "arms" not in tree:
        return _validated(RunConfig, tree, problems)
    study = _validated(StudyConfig, tree, problems)
    study_runs(study)
    return study


def load_run_config(path: Path, overrides: Sequence[str], *, cwd: Path | None = None) -> RunConfig:
    """One run's configuration; with ``cwd`` as ``anchored`` there. Raises UserError with everything that is wrong."""
    config = load_any(path, overrides)
    if isinstance(config, StudyConfig):
        raise mistake(str(path), "a study (it has the key arms)", "one run", "use ocrm-ray study")
    return config if cwd is None else anchored(config, cwd)


def load_study_config(path: Path, overrides: Sequence[str]) -> StudyConfig:
    """A study's configuration; each arm is validated too. Raises UserError with everything that is wrong."""
    study = load_any(path, overrides)
    if isinstance(study, RunConfig):
        raise mistake(str(path), "a run (no key arms)", "a study", "use ocrm-ray run, or add arms")
    return study


def study_runs(study: StudyConfig, *, cwd: Path | None = None) -> list[tuple[str, int, RunConfig]]:
    """(arm, seed, configuration) of every run, seeds innermost; ``cwd`` as for ``load_run_config``.

    Run folders are ``output_dir/STUDY/ARM/seed-N``; the arms of a seed share ``output_dir/STUDY/shared/seed-N``,
    but those of ``own_stages``.
    Raises UserError with everything that is wrong in the study and its arms.
    """
    root = study.output_dir / study.name
    runs: list[tuple[str, int, RunConfig]] = []
    per_arm: dict[str, Sequence[Problem]] = {}
    for arm, changes in study.arms.items():
        try:
            config = _validated(RunConfig, _merged(study.base, _nested(changes)) | {"name": arm}, [])
        except UserError as error:
            per_arm[arm] = error.problems
            continue
        for seed in study.seeds_of(arm):
            stages_dir = None if arm in study.own_stages else root / SHARED / f"seed-{seed}"
            folders = {"output_dir": root / arm, "stages_dir": stages_dir}
            run = config.model_copy(update={"name": f"seed-{seed}", "seed": seed, **folders})
            runs.append((arm, seed, run if cwd is None else anchored(run, cwd)))
    if problems := [*_study_contradictions(study), *arm_problems(study, per_arm)]:
        raise UserError(problems)
    return runs


def arm_problems(study: StudyConfig, per_arm: Mapping[str, Sequence[Problem]]) -> list[Problem]:
    """Problems of runs as problems of their study: of ``base`` where all arms have and no arm sets it."""
    found: dict[Problem, None] = {}
    for arm, problems in per_arm.items():
        for problem in problems:
            of_base = all(
                problem in per_arm.get(other, ()) and not problem.path.startswith(tuple(changes))
                for other, changes in study.arms.items()
            )
            above = "" if problem.path in SET_BY_STUDY else "base." if of_base else f"arms.{arm}."
            found[replace(problem, path=above + problem.path)] = None
    return list(found)


def anchored(config: RunConfig, cwd: Path) -> RunConfig:
    """The configuration with relative paths made absolute at ``cwd``; what is no file there stays (a Hub name)."""

    def placed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: placed(inner, item) for inner, item in value.items()}
        is_file = key in _PATH_KEYS and value not in (None, "sft", "unknown") and (cwd / value).exists()
        return str(cwd / value) if is_file or (value and key in _WRITTEN_KEYS) else value

    return RunConfig.model_validate(placed("", config.model_dump(mode="json")))


def dump_yaml(config: Section) -> str:
    """The resolved tree, defaults included; ``load_run_config`` reads it back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path, overrides: Sequence[str]) -> tuple[Tree, list[Problem]]:
    """The file's tree with the overrides merged in, and the mistakes found so far. UserError where there is no tree."""
    problems: list[Problem] = []
    changes: list[Tree] = []
    for text in overrides:
        key, is_set, value = text.partition("=")
        if not (is_set and all(key.split(".")) and key.isprintable()):
            problems.append(Problem(text, "no override", "key=value, such as policy.gamma=0.5", "write both"))
            continue
        try:
            changes.append(_nested({key: _parsed(value)}))
        except UserError as error:
            problems += error.problems
        except yaml.YAMLError as error:
            problems.append(Problem(key, f"invalid YAML ({_reason(error)})", "a YAML value", "put it in quotes"))
    need, do = "a YAML mapping", "write key: value lines"
    try:
        tree = _parsed(path.read_bytes())
        got = "" if isinstance(tree, dict) else shown(tree)
    except OSError as error:
        got, need, do = (error.strerror or str(error)).lower(), "a YAML file", "check the path"
    except yaml.YAMLError as error:
        got, do = f"invalid YAML ({_reason(error)})", "correct it"
    if got:
        raise UserError([Problem(str(path), got, need, do), *problems])
    return reduce(_merged, changes, tree), problems


def _parsed(text: str | bytes) -> Any:
    """YAML as what JSON can hold, all keys and dates as text. Raises yaml.YAMLError only."""
    try:
        content = yaml.load(text, _Loader)
        return json.loads(json.dumps(content, ensure_ascii=False, default=str).encode())
    except (ValueError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def _reason(error: yaml.YAMLError) -> str:
    mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    return " ".join((what if mark is None else f"line {mark.line + 1}: {what}").split())


def _nested(changes: Mapping[str, Any]) -> Tree:
    """``{"a.b": c}`` -> ``{"a": {"b": c}}``. UserError for a key that no configuration is deep enough for."""
    tree: Tree = {}
    for key, value in changes.items():
        if (depth := key.count(".")) > MAX_DEPTH:
            raise mistake(shown(key), f"a key of {depth + 1} parts", f"at most {MAX_DEPTH + 1}", "correct the key")
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = _merged(tree, value)
    return tree


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> Tree:
    """``tree`` with ``changes`` laid over it."""
    result = dict(tree)
    for key, change in changes.items():
        old: Any = result.get(key)
        is_inner = isinstance(old, dict) and isinstance(change, dict) and change.get("kind") in (None, old.get("kind"))
        result[key] = _merged(old, change) if is_inner else change
    return result


def _validated(model: type[Config], tree: Tree, problems: Sequence[Problem]) -> Config:
    """Raises UserError, the problems found before first."""
    try:
        # Strict, so that `true` is no 1 and "3" no 3; by way of JSON, where strictness still takes lists and paths.
        config = model.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise UserError([*problems, *validation_problems(error, model, tree)]) from error
    if problems:
        raise UserError(problems)
    return config


def _study_contradictions(study: StudyConfig) -> Iterator[Problem]:
    trees = {"base": study.base, **{f"arms.{arm}": changes for arm, changes in study.arms.items()}}
    for where, tree in trees.items():
        for key in [key for key in SET_BY_STUDY if key in tree]:
            yield Problem(f"{where}.{key}", shown(tree[key]), "no such key here", f"remove it: the study sets {key}")
    if not study.arms or SHARED in study.arms:
        need = f"at least one arm, none called {SHARED} (stages live there)"
        yield Problem("arms", shown(list(study.arms)), need, "change them")
    if study.early_stopping and EARLY_STOPPING in study.arms:
        need = f"none called {EARLY_STOPPING} beside early_stopping: the report adds it"
        yield Problem("arms", shown(list(study.arms)), need, "rename it")
    yield from _unknown_arms(study)
    for where, seeds in {"seeds": study.seeds, **{f"arm_seeds.{a}": s for a, s in study.arm_seeds.items()}}.items():
        if not seeds or len(set(seeds)) < len(seeds):
            yield Problem(where, shown(seeds), "at least one seed, each once", "change them")


def _unknown_arms(study: StudyConfig) -> Iterator[Problem]:
    """Arms that are named but not there; told only where there are arms."""
    named = {"control": study.control, "early_stopping": study.early_stopping}
    named |= {f"own_stages.{index}": arm for index, arm in enumerate(study.own_stages)}
    for where, arm in {**named, **{f"arm_seeds.{arm}": arm for arm in study.arm_seeds}}.items():
        if study.arms and arm is not None and arm not in study.arms:
            yield Problem(where, shown(arm), f"one of the arms ({', '.join(study.arms)})", "correct it, or remove it")
