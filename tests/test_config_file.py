"""Reading configurations: what comes out, and that every mistake is told in plain words with its dotted path."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ocrm_ray.checks import contradictions, study_problems
from ocrm_ray.config import JudgeGold, MissingEosPenalty, RunConfig, StudyConfig
from ocrm_ray.config_file import dump_yaml, load_any, load_run_config, load_study_config, study_runs
from ocrm_ray.config_problems import known_keys
from ocrm_ray.errors import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
NAME_NEED = "letters, digits, dots, dashes and underscores, a letter or digit first"
PATHS = sorted({part for path, _ in known_keys(RunConfig) for part in (path, path.split(".")[-1])})


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def run_of(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    return load_run_config(write(tmp_path, text), overrides)


def study_of(tmp_path: Path, text: str, *overrides: str) -> StudyConfig:
    return load_study_config(write(tmp_path, text), overrides)


def lines_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_any(path, overrides)
    return str(caught.value).replace(str(path), "FILE").split("\n")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_and_free_of_contradictions(path: Path) -> None:
    config = load_any(path, [])
    configs = [config] if isinstance(config, RunConfig) else [run for _, _, run in study_runs(config)]
    assert configs
    assert [contradictions(run) for run in configs] == [[]] * len(configs)


def test_there_are_shipped_configurations() -> None:
    assert CONFIGS


def test_overrides_win_over_the_file_and_later_over_earlier(tmp_path: Path) -> None:
    config = run_of(tmp_path, "name: x\nseed: 1\npolicy: {gamma: 0.5}", "seed=2", "seed=3", "policy.num_updates=7")
    assert (config.seed, config.policy.gamma, config.policy.num_updates) == (3, 0.5, 7)


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    config = run_of(tmp_path, "name: x\npolicy: {learning_rate: 1e-4}", "sft.learning_rate=2E-5")
    assert (config.policy.learning_rate, config.sft.learning_rate) == (1e-4, 2e-5)


def test_a_date_is_text(tmp_path: Path) -> None:
    assert run_of(tmp_path, "name: 2024-01-01").name == "2024-01-01"


def test_a_mapping_of_another_kind_replaces_instead_of_merging(tmp_path: Path) -> None:
    text = "name: x\ngold: {kind: function, path: 'a:b'}"
    config = run_of(tmp_path, text, "gold={kind: classifier, model: org/name}")
    assert config.gold is not None
    assert config.gold.model_dump() == {"kind": "classifier", "model": "org/name", "batch_size": 32}


def test_a_mapping_of_the_same_kind_is_merged(tmp_path: Path) -> None:
    text = "name: x\ngold: {kind: classifier, model: org/name}"
    config = run_of(tmp_path, text, "gold={batch_size: 4}")
    assert config.gold is not None
    assert config.gold.model_dump() == {"kind": "classifier", "model": "org/name", "batch_size": 4}


def test_an_override_makes_the_sections_above_it(tmp_path: Path) -> None:
    config = run_of(tmp_path, "name: x\nrollout: {missing_eos: mask}", "rollout.missing_eos.penalty=-2", "world={}")
    assert config.rollout.missing_eos == MissingEosPenalty(penalty=-2.0)
    assert config.world is not None


def test_the_dumped_tree_reads_back_equal(tmp_path: Path) -> None:
    config = run_of(tmp_path, "name: x\nworld: {}\nstages_dir: s\npolicy: {learning_rate: 1e-7}")
    assert run_of(tmp_path, dump_yaml(config)) == config


def test_relative_paths_are_made_absolute_only_for_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    text = "name: x\nsft: {base: model}\nreward: {base: org/rm}\nstages_dir: s"
    config = load_run_config(write(tmp_path, text), [], cwd=tmp_path)
    assert (config.sft.base, config.reward.base) == (str(tmp_path / "model"), "org/rm")
    assert (config.output_dir, config.stages_dir) == (tmp_path / "runs", tmp_path / "s")


def test_a_judges_cache_is_made_absolute_and_its_models_name_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "tribunal").mkdir()
    text = "name: x\ngold: {kind: judge, base_url: 'http://h/v1', model_name: tribunal, cache_file: kept/a.jsonl}"
    config = load_run_config(write(tmp_path, text), [], cwd=tmp_path)
    assert isinstance(config.gold, JudgeGold)
    assert (config.gold.cache_file, config.gold.model_name) == (tmp_path / "kept" / "a.jsonl", "tribunal")


def test_parameters_of_a_judge_keep_their_types(tmp_path: Path) -> None:
    text = "name: x\ngold: {kind: judge, base_url: 'http://h/v1', model_name: m}"
    config = run_of(tmp_path, text, "gold.parameters={max_completion_tokens: 512, top_p: 0.5, store: false}")
    assert isinstance(config.gold, JudgeGold)
    assert repr(config.gold.parameters) == "{'max_completion_tokens': 512, 'top_p': 0.5, 'store': False}"


def test_the_name_of_a_judges_key_is_the_only_secret_of_a_run(tmp_path: Path) -> None:
    text = "name: x\ngold: {kind: judge, base_url: 'http://h/v1', model_name: m}"
    assert run_of(tmp_path, text).secrets == ()
    assert run_of(tmp_path, text, "gold.api_key_env=TRIBUNAL_KEY").secrets == ("TRIBUNAL_KEY",)
    assert run_of(tmp_path, "name: x\nworld: {}").secrets == ()


def test_study_runs_lay_each_arm_over_the_base_and_share_stages_by_seed(tmp_path: Path) -> None:
    study = study_of(
        tmp_path,
        "name: s\nseeds: [4, 7]\nbase: {policy: {gamma: 0.5, num_updates: 3}}\n"
        "arms: {a: {}, b: {policy.gamma: 0.9, correction: {strategy: none}}}",
    )
    runs = study_runs(study)
    assert [(arm, seed) for arm, seed, _ in runs] == [("a", 4), ("a", 7), ("b", 4), ("b", 7)]
    assert [config.policy.gamma for _, _, config in runs] == [0.5, 0.5, 0.9, 0.9]
    assert {config.policy.num_updates for _, _, config in runs} == {3}
    last = runs[-1][2]
    assert (last.run_dir, last.stage_root) == (Path("runs/s/b/seed-7"), Path("runs/s/shared/seed-7"))
    assert (last.seed, last.correction.strategy) == (7, "none")


def test_single_arms_have_other_seeds_and_stages_of_their_own(tmp_path: Path) -> None:
    text = "name: s\nseeds: [1]\nbase: {}\narms: {a: {}, b: {}}\narm_seeds: {b: [5, 2]}\nown_stages: [b]"
    runs = study_runs(study_of(tmp_path, text))
    assert [(arm, seed, config.seed) for arm, seed, config in runs] == [("a", 1, 1), ("b", 5, 5), ("b", 2, 2)]
    roots = ["runs/s/shared/seed-1", "runs/s/b/seed-5/stages", "runs/s/b/seed-2/stages"]
    assert [config.stage_root for _, _, config in runs] == [Path(root) for root in roots]


def study_file(name: str) -> StudyConfig:
    return load_study_config(Path(__file__).parents[1] / "configs" / "study" / f"{name}.yaml", [])


@pytest.mark.parametrize("name", ["demo", "quick", "methods", "kl", "sensitivity"])
def test_the_arms_of_a_shipped_study_can_share_their_stages_and_run_here(name: str, tmp_path: Path) -> None:
    study = study_file(name).model_copy(update={"output_dir": tmp_path})
    assert [problem for problem in study_problems(study) if problem.path != "pools"] == []


def test_the_grids_stand_on_the_settings_of_the_demo() -> None:
    demo = study_file("demo").base
    assert study_file("methods").base == demo
    for name in ("kl", "sensitivity"):
        base = study_file(name).base
        base["correction"].pop("weights")  # type: ignore[attr-defined]
        base["correction"].pop("strategy", None)  # type: ignore[attr-defined]
        assert base == demo


def test_the_main_grid_has_its_arms_with_their_settings() -> None:
    study = study_file("methods")
    runs = {arm: run for arm, _, run in study_runs(study)}
    assert {arm for arm in runs if len(study.seeds_of(arm)) == 5} == {"frozen", "refit-moving", "ocrm", "ocrm-moving"}
    assert {len(study.seeds_of(arm)) for arm in runs} == {3, 5}
    strategies = {arm: run.correction.strategy for arm, run in runs.items()}
    named = {"refit", "shuffled", "relabel", "metarm", "ocrm"}
    assert {arm: strategies[arm] for arm in named} == {arm: arm for arm in named}
    assert {arm for arm in runs if strategies[arm] == "none"} == {"frozen", "frozen-moving", "dpo", "wpo", "ensemble"}
    assert {arm for arm in runs if runs[arm].correction.kl_reference == "moving"} == {
        arm for arm in runs if arm.endswith("-moving")
    }
    assert {arm: run.policy.algorithm for arm, run in runs.items() if run.policy.is_offline} == {
        "dpo": "dpo", "wpo": "wpo",
    }  # fmt: skip
    assert runs["ocrm"].correction.weights == runs["ocrm-moving"].correction.weights
    assert runs["ocrm"].correction.weights == runs["shuffled"].correction.weights
    assert (runs["metarm-eta-0"].correction.metarm.eta, runs["metarm"].correction.metarm.eta > 0) == (0, True)
    assert {(run.policy.num_updates, run.policy.kl_coefficient) for run in runs.values()} == {(160, 0.03)}
    assert runs["ensemble"].reward.ensemble.num_members == 4


def test_the_sweeps_change_one_setting_at_a_time() -> None:
    kl = {arm: (run.correction.strategy, run.policy.kl_coefficient) for arm, _, run in study_runs(study_file("kl"))}
    assert sorted(kl.values()) == [(arm, kl) for arm in ("none", "ocrm") for kl in (0.03, 0.1, 0.3)]
    runs = {arm: run for arm, _, run in study_runs(study_file("sensitivity"))}
    assert sorted({run.pairs.num_pairs for run in runs.values()}) == [2000, 8000, 20000, 80000]
    assert sorted({run.correction.every for run in runs.values()}) == [5, 10, 20, 40]
    assert sorted({run.correction.weights.m for run in runs.values()}) == [0, 0.001, 0.01, 0.1, 0.3, 1]
    words = {arm: run.world.response_words for arm, run in runs.items() if run.world is not None}
    assert sorted(set(words.values())) == [12, 24, 36]
    assert {run.rollout.max_new_tokens - words[arm] for arm, run in runs.items()} == {1}
    settings = [
        (run.pairs.num_pairs, run.correction.every, run.correction.weights.m, words[arm]) for arm, run in runs.items()
    ]
    assert {sum(a != b for a, b in zip(each, (20000, 10, 1, 12), strict=True)) for each in settings} == {0, 1}
    assert {run.correction.strategy for run in runs.values()} == {"ocrm"}


BAD_RUNS = {
    "correction: {every: 0}": "correction.every: got 0, need a number greater than or equal to 1: change it",
    "policy: {gamma: 2}": "policy.gamma: got 2, need a number less than or equal to 1: change it",
    "policy: {learning_rate: 0}": "policy.learning_rate: got 0, need a number greater than 0: change it",
    "policy: {learning_rate: fast}": 'policy.learning_rate: got "fast", need a number: change it',
    "policy: {learning_rate: .inf}": "policy.learning_rate: got Infinity, need a finite number: change it",
    "policy: {num_updates: true}": "policy.num_updates: got true, need an integer: change it",
    "policy: {num_updates: 3.5}": "policy.num_updates: got 3.5, need an integer: change it",
    "policy: {num_updates: '3'}": 'policy.num_updates: got "3", need an integer: change it',
    "policy: 3": "policy: got 3, need a mapping: change it",
    "policy: {algorithm: sac}": "policy.algorithm: got \"sac\", need 'ppo', 'rloo', 'grpo', 'dpo' or 'wpo': change it",
    "policy: {gama: 1}": "policy.gama: got an unknown key, need policy.gamma: correct the key",
    "policy: {lr: 1}": "policy.lr: got an unknown key, need policy.learning_rate: correct the key",
    "policy: {max_lagg: 1}": "policy.max_lagg: got an unknown key, need correction.max_lag: correct the key",
    "learning_rat: 1": "learning_rat: got an unknown key, need sft.learning_rate: correct the key",
    "checkpoint: {zzz: 1}": (
        "checkpoint.zzz: got an unknown key, need one of every, num_kept: remove it or choose one of these"
    ),
    "world: []": "world: got [], need a mapping: change it",
    "stages_dir: 3": "stages_dir: got 3, need text: write it in quotes",
    "data: {prompts: {}}": "data.prompts.path: got nothing, need a value: add it",
    "gold: {kind: human}": 'gold.kind: got "human", need function or classifier or similarity or judge: change it',
    "gold: {path: 'a:b'}": "gold.kind: got nothing, need function or classifier or similarity or judge: add it",
    "gold: 3": "gold: got 3, need a mapping: change it",
    "gold: {kind: function, path: 3}": "gold.path: got 3, need text: write it in quotes",
    "gold: {kind: classifier, modl: a, model: b}": "gold.modl: got an unknown key, need gold.model: correct the key",
    "rollout: {missing_eos: drop}": "rollout.missing_eos: got \"drop\", need 'mask' or a mapping: change it",
    "rollout: {missing_eos: {penalty: a}}": 'rollout.missing_eos.penalty: got "a", need a number: change it',
    "correction: {num_pairs: 0}": "correction.num_pairs: got 0, need a number greater than or equal to 1: change it",
}


@pytest.mark.parametrize("text", BAD_RUNS)
def test_a_bad_value_is_told_with_its_path_and_what_is_needed(tmp_path: Path, text: str) -> None:
    assert lines_of(tmp_path, f"name: x\n{text}") == [BAD_RUNS[text]]


def test_a_name_that_is_no_text_is_told_to_be_quoted(tmp_path: Path) -> None:
    assert lines_of(tmp_path, "name: 3") == ["name: got 3, need text: write it in quotes"]


def test_a_wrong_key_inside_a_union_is_told_of_the_branch_that_was_meant(tmp_path: Path) -> None:
    assert lines_of(tmp_path, "name: x\nrollout: {missing_eos: {penlty: 1}}") == [
        "rollout.missing_eos.penalty: got nothing, need a value: add it",
        "rollout.missing_eos.penlty: got an unknown key, need rollout.missing_eos.penalty: correct the key",
    ]


BAD_FILES = {
    "": "FILE: got null, need a YAML mapping: write key: value lines",
    "[1]": "FILE: got [1], need a YAML mapping: write key: value lines",
    "name: x\n  a: 3": "FILE: got invalid YAML (line 2: mapping values are not allowed here), "
    "need a YAML mapping: correct it",
    "data: &a {prompts: *a}": "FILE: got invalid YAML (Circular reference detected), need a YAML mapping: correct it",
}


@pytest.mark.parametrize("text", BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_file_that_is_no_mapping_is_told_with_its_line(tmp_path: Path, text: str) -> None:
    assert lines_of(tmp_path, text) == [BAD_FILES[text]]


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    for name, got in (("gone.yaml", "no such file or directory"), (".", "is a directory")):
        with pytest.raises(UserError) as caught:
            load_any(tmp_path / name, [])
        assert str(caught.value) == f"{tmp_path / name}: got {got}, need a YAML file: check the path"


def test_all_mistakes_of_file_and_overrides_are_told_at_once(tmp_path: Path) -> None:
    assert lines_of(tmp_path, "name: x\nseed: -1\npolicy: {gamma: .inf}", "foo", "a..b=3", "data=[") == [
        "foo: got no override, need key=value, such as policy.gamma=0.5: write both",
        "a..b=3: got no override, need key=value, such as policy.gamma=0.5: write both",
        "data: got invalid YAML (line 1: expected the node content, but found '<stream end>'), "
        "need a YAML value: put it in quotes",
        "seed: got -1, need a number greater than or equal to 0: change it",
        "policy.gamma: got Infinity, need a finite number: change it",
    ]


def test_mistakes_of_a_missing_file_do_not_hide_those_of_the_overrides(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_any(tmp_path / "gone.yaml", ["foo"])
    assert [problem.path for problem in caught.value.problems] == [str(tmp_path / "gone.yaml"), "foo"]


def test_problems_of_arms_are_told_of_the_arm_and_shared_ones_of_the_base(tmp_path: Path) -> None:
    text = "name: s\nbase: {correction: {every: 0}}\narms: {a: {policy.gamma: 2}, b: {policy: {gamma: 3}}, c: {}}"
    assert lines_of(tmp_path, text) == [
        "arms.a.policy.gamma: got 2, need a number less than or equal to 1: change it",
        "base.correction.every: got 0, need a number greater than or equal to 1: change it",
        "arms.b.policy.gamma: got 3, need a number less than or equal to 1: change it",
    ]


def test_a_problem_that_every_arm_sets_itself_is_told_of_the_arms(tmp_path: Path) -> None:
    text = "name: s\nbase: {}\narms: {a: {policy.gamma: 2}, b: {policy.gamma: 2}}"
    assert lines_of(tmp_path, text) == [
        f"arms.{arm}.policy.gamma: got 2, need a number less than or equal to 1: change it" for arm in "ab"
    ]


ARMS_NEED = "at least one arm, none called shared (stages live there): change them"
BAD_STUDIES = {
    "base: {seed: 3}\narms: {a: {}}": ["base.seed: got 3, need no such key here: remove it: the study sets seed"],
    "base: {}\narms: {a: {name: b}}": ['arms.a.name: got "b", need no such key here: remove it: the study sets name'],
    "base: {}\narms: {shared: {}}": [f'arms: got ["shared"], need {ARMS_NEED}'],
    "base: {}\narms: {}": [f"arms: got [], need {ARMS_NEED}"],
    "base: {}\narms: {a b: {}}": [f'arms.a b: got "a b", need {NAME_NEED}: change it'],
    "base: {}\narms: {a: 3}": ["arms.a: got 3, need a mapping: change it"],
    "base: {}\narms: {a: {policy.gamma: 2}}\nseeds: []": [
        "seeds: got [], need at least one seed, each once: change them",
        "arms.a.policy.gamma: got 2, need a number less than or equal to 1: change it",
    ],
    "base: {}\narms: {a: {}}\nseeds: [1, 1]": ["seeds: got [1, 1], need at least one seed, each once: change them"],
    "base: {}\narms: {a: {}}\nseeds: 3": ["seeds: got 3, need a list: change it"],
    "arms: {a: {}}\nseeds: [x]": [
        "base: got nothing, need a value: add it",
        'seeds.0: got "x", need an integer: change it',
    ],
}


BAD_STUDIES |= {
    "base: {}\narms: {a: {}}\narm_seeds: {b: [1]}\ncontrol: c\nearly_stopping: d\nown_stages: [a, e]": [
        'control: got "c", need one of the arms (a): correct it, or remove it',
        'early_stopping: got "d", need one of the arms (a): correct it, or remove it',
        'own_stages.1: got "e", need one of the arms (a): correct it, or remove it',
        'arm_seeds.b: got "b", need one of the arms (a): correct it, or remove it',
    ],
    "base: {}\narms: {a: {}}\narm_seeds: {a: [2, 2]}": [
        "arm_seeds.a: got [2, 2], need at least one seed, each once: change them"
    ],
    "base: {}\narms: {early_stopping: {}}\nearly_stopping: early_stopping": [
        'arms: got ["early_stopping"], need none called early_stopping beside early_stopping: the report adds it: '
        "rename it"
    ],
}


@pytest.mark.parametrize("text", BAD_STUDIES)
def test_a_bad_study_is_told(tmp_path: Path, text: str) -> None:
    assert lines_of(tmp_path, f"name: s\n{text}") == BAD_STUDIES[text]


def test_a_run_is_no_study_and_a_study_no_run(tmp_path: Path) -> None:
    run, study = tmp_path / "run.yaml", tmp_path / "study.yaml"
    run.write_text("name: x")
    study.write_text("name: s\nbase: {}\narms: {a: {}}")
    with pytest.raises(UserError, match=r"got a run \(no key arms\), need a study: use ocrm-ray run, or add arms"):
        load_study_config(run, [])
    with pytest.raises(UserError, match=r"got a study \(it has the key arms\), need one run: use ocrm-ray study"):
        load_run_config(study, [])


printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | printable | st.dates() | st.binary(max_size=3)
keys = st.sampled_from([*PATHS, "arms", "base", "seeds"]) | printable | st.integers() | st.none()
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4))
overrides = st.builds(lambda key, value: f"{key}={value}", st.sampled_from(PATHS), printable | trees)
fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@fuzzed
@given(tree=st.dictionaries(keys, trees, max_size=6))
def test_any_mapping_gives_a_configuration_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, tree: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.yaml"
    path.write_text(yaml.dump(tree), encoding="utf-8")
    outcome_of(path, [])


@fuzzed
@given(overrides=st.lists(printable | overrides, max_size=4), text=printable | st.just("name: x"))
def test_any_text_and_overrides_give_a_configuration_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str], text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(text)
    outcome_of(path, overrides)


anything = st.text(st.characters(exclude_categories=[]), max_size=12)  # also halves of characters and controls
deep = st.builds(lambda depth, key, end: f"{key}: " + "{a: " * depth + end, st.integers(0, 1200), keys, anything)


@fuzzed
@given(content=st.binary(max_size=80) | (anything | deep).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_give_a_configuration_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    outcome_of(path, [])


@fuzzed
@given(key=st.sampled_from(PATHS) | anything, value=anything | trees.map(yaml.dump), depth=st.integers(0, 3000))
def test_any_override_gives_a_configuration_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: str, depth: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "sound.yaml"
    path.write_text("name: x\nworld: {}")
    outcome_of(path, [f"{key}={value}", ".".join([key] * depth) + "=1", key])


@fuzzed
@given(tree=st.dictionaries(keys, trees, max_size=4), base=trees, arms=trees | st.dictionaries(keys, trees, max_size=3))
def test_any_study_gives_runs_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[object, object], base: object, arms: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "study.yaml"
    path.write_text(yaml.dump({**tree, "name": "s", "base": base, "arms": arms}), encoding="utf-8")
    outcome_of(path, [])


@pytest.mark.parametrize("depth", [100, 150, 199, 200, 250, 600, 900, 3000])
def test_a_tree_of_any_depth_gives_a_user_error(tmp_path: Path, depth: int) -> None:
    (tmp_path / "c.yaml").write_text("name: x\nworld: " + "{a: " * depth + "}" * depth)
    with pytest.raises(UserError) as caught:
        load_any(tmp_path / "c.yaml", [])
    assert len(str(caught.value).splitlines()) == 1


def outcome_of(path: Path, overrides: list[str]) -> None:
    try:
        config = load_any(path, overrides)
    except UserError as error:
        told = error.problems
    else:
        runs = [config] if isinstance(config, RunConfig) else [run for _, _, run in study_runs(config)]
        told = tuple(problem for run in runs for problem in contradictions(run))
    assert [str(problem) for problem in told if len(str(problem).splitlines()) != 1] == []
