"""The program: exit statuses, exact messages, nothing written on a mistake, what the launcher is given."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from model_files import write_model, write_reward_model

from ocrm_ray.cli import main
from ocrm_ray.config import Pools, RunConfig, StudyConfig
from ocrm_ray.errors import DeadlineError, Problem, UserError

ROOT = Path(__file__).parent.parent
RUN = "name: trial\nworld: {}\n"
STUDY = "name: s\nseeds: [1, 2]\nbase: {world: {}}\n"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with run.yaml and study.yaml; the machine's size plays no part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ocrm-ray"])
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "study.yaml").write_text(STUDY + "arms: {a: {}, b: {correction.strategy: none}}\n")
    return tmp_path


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What a launcher that does nothing was called with."""
    calls: list[object] = []
    launch_with(monkeypatch, lambda *arguments: calls.append(arguments))
    return calls


def launch_with(monkeypatch: pytest.MonkeyPatch, function: Callable[..., object]) -> None:
    launcher = ModuleType("actors.launcher")
    launcher.run = lambda config, resume: function(config, resume) or ""  # type: ignore[attr-defined]
    launcher.run_study = lambda study, jobs: function(study, jobs) or ""  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "actors.launcher", launcher)
    rehearsal = ModuleType("actors.rehearsal")
    rehearsal.rehearse = lambda config: function(config) or "figures"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "actors.rehearsal", rehearsal)


def files_below(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")}


AT_LEAST_1 = "need a number greater than or equal to 1: change it"
AT_MOST_1 = "need a number less than or equal to 1: change it"
MISTAKES = {
    "run gone.yaml": "gone.yaml: got no such file or directory, need a YAML file: check the path",
    "run .": ".: got is a directory, need a YAML file: check the path",
    "run run.yaml correction.every=0": f"correction.every: got 0, {AT_LEAST_1}",
    "run run.yaml correction.every": "correction.every: got no override, "
    "need key=value, such as policy.gamma=0.5: write both",
    "run run.yaml policy.lr=1": "policy.lr: got an unknown key, need policy.learning_rate: correct the key",
    "run run.yaml policy.gama=1": "policy.gama: got an unknown key, need policy.gamma: correct the key",
    "run run.yaml polcy.gamma=1": "polcy: got an unknown key, need policy: correct the key",
    "run run.yaml policy.algorithm=sac": "policy.algorithm: got \"sac\", need 'ppo', 'rloo', 'grpo', 'dpo' or 'wpo': "
    "change it",
    "run run.yaml policy.gamma=1.5": f"policy.gamma: got 1.5, {AT_MOST_1}",
    "run run.yaml policy.num_updates=many": 'policy.num_updates: got "many", need an integer: change it',
    "run run.yaml rollout.missing_eos=drop": "rollout.missing_eos: got \"drop\", need 'mask' or a mapping: change it",
    "run run.yaml gold.kind=human": 'gold.kind: got "human", need function or classifier or similarity or judge: '
    "change it",
    "run run.yaml seed=[": "seed: got invalid YAML (line 1: expected the node content, but found '<stream end>'), "
    "need a YAML value: put it in quotes",
    "run study.yaml": "study.yaml: got a study (it has the key arms), need one run: use ocrm-ray study",
    "rehearse study.yaml": "study.yaml: got a study (it has the key arms), need one run: use ocrm-ray study",
    "rehearse run.yaml correction.promote_after=1 correction.max_lag=1": "correction.max_lag: got 1, "
    "need nothing beside correction.promote_after 1: remove one of the two",
    "study run.yaml": "run.yaml: got a run (no key arms), need a study: use ocrm-ray run, or add arms",
    "study study.yaml seeds=[]": "seeds: got [], need at least one seed, each once: change them",
    "study study.yaml base.policy.gamma=2": f"base.policy.gamma: got 2, {AT_MOST_1}",
    "study study.yaml arms.a.policy.gamma=2": f"arms.a.policy.gamma: got 2, {AT_MOST_1}",
    "study study.yaml base.evaluation.num_prompts=2000": "base.evaluation.num_prompts: got 2000, "
    "need at most 1024, as data.num_heldout: lower it, or raise data.num_heldout",
    "study study.yaml arms.b.sft.num_epochs=9": "arms.b.sft.num_epochs: got 9, need 3, as in the first arm: "
    "move it to base, or name the arm in own_stages: the arms share the stages in runs/s/shared",
    "run run.yaml world=null gold={kind:\\ function,path:\\ json:loads} sft.ready=a/b": "data.prompts: got nothing, "
    "need prompts, or the embedded world: set it, or set world: {}",
    "run run.yaml rollout.samples_per_prompt=1": "rollout.samples_per_prompt: got 1, "
    "need at least 2 for rloo, which compares the samples of a prompt: raise it, or use ppo",
    "run run.yaml correction.promote_after=1 correction.max_lag=1": "correction.max_lag: got 1, "
    "need nothing beside correction.promote_after 1: remove one of the two",
    "run run.yaml rollout.max_new_tokens=125": "rollout.max_new_tokens: got 125, "
    "need 13 (its responses and EOS) to 124 (its models' context less the prompt) with world: change it",
    "run run.yaml rollout.top_k=5": "rollout.top_k: got 5, need 0 with correction.strategy ocrm: "
    "the ratio of truncated sampling is biased: set it to 0, or use strategy refit",
    "run run.yaml output_dir=run.yaml/x": 'output_dir: got "run.yaml/x", '
    "need a folder that can be written (run.yaml is none): change it",
    "report gone": "gone: got no such folder, need a run folder: name the folder that `ocrm-ray run` wrote",
    "report .": ".: got a folder without config.yaml and metrics.jsonl, need a run folder: "
    "name the folder that `ocrm-ray run` wrote",
    "check run.yaml checkpoint.every=-1": f"checkpoint.every: got -1, {AT_LEAST_1}",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_status_2_and_nothing_written(
    command: str, workplace: Path, launched: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_below(workplace)
    arguments = [word.replace("\0", " ") for word in command.replace("\\ ", "\0").split(" ")]
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", MISTAKES[command] + "\n")
    assert launched == []
    assert files_below(workplace) == before


def test_all_mistakes_are_told_at_once(launched: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["run", "run.yaml", "evaluation.num_prompts=2000", "output_dir=run.yaml/x", "data.num_heldout=9000"]) == 2
    )
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["world.num_prompts", "output_dir"]
    assert main(["run", "run.yaml", "seed=x", "foo", "policy.zz=1"]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["foo", "seed", "policy.zz"]


def test_the_module_is_the_same_program_and_tells_mistakes_without_a_traceback(workplace: Path) -> None:
    before = files_below(workplace)
    command = [sys.executable, "-m", "ocrm_ray", "run", "run.yaml", "correction.every=0", "policy.gamma=-1"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "policy.gamma: got -1, need a number greater than or equal to 0: change it\n"
        f"correction.every: got 0, {AT_LEAST_1}\n"
    )
    assert files_below(workplace) == before


def test_importing_the_program_loads_nothing_heavy() -> None:
    code = "import sys, ocrm_ray.cli; print(sorted({m.split('.')[0] for m in sys.modules} & set(sys.argv[1:])))"
    heavy = ["torch", "numpy", "pydantic", "yaml", "rich", "ray", "transformers", "datasets", "vllm"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run"], ["run", "run.yaml", "--fast"], ["report", "a", "b"]])
def test_a_wrong_command_line_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: ocrm-ray")


def test_help_is_status_0_and_says_what_resume_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    assert "starts over where there is none" in capsys.readouterr().out


def test_run_launches_with_absolute_paths_and_overrides_on_either_side_of_options(
    workplace: Path, launched: list[tuple[RunConfig, bool]]
) -> None:
    assert main(["run", "run.yaml", "seed=3", "--resume", "policy.gamma=0.5"]) == 0
    [(config, resume)] = launched
    assert (config.seed, config.policy.gamma, resume) == (3, 0.5, True)
    assert config.run_dir == workplace / "runs" / "trial"
    assert main(["run", "run.yaml"]) == 0
    assert launched[1][1] is False


def test_study_launches_the_study(launched: list[tuple[StudyConfig, int]]) -> None:
    assert main(["study", "study.yaml", "seeds=[7]"]) == 0
    [(study, num_jobs)] = launched
    assert (study.name, study.seeds, list(study.arms), num_jobs) == ("s", (7,), ["a", "b"], 1)


def test_study_takes_a_number_of_jobs(
    launched: list[tuple[StudyConfig, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "--jobs", "3", "study.yaml", "seeds=[7]"]) == 0
    assert launched.pop()[1] == 3
    for text in ("0", "-1", "many"):
        assert main(["study", "study.yaml", f"--jobs={text}"]) == 2
        assert f"argument --jobs: got {text}, need a whole number from 1" in capsys.readouterr().err
    assert launched == []


def test_how_to_resume_a_study_names_its_jobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch_with(monkeypatch, fail_with(KeyboardInterrupt()))
    assert main(["study", "study.yaml", "--jobs", "2", "seeds=[7]"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "resume: ocrm-ray study study.yaml --jobs 2 'seeds=[7]'"


def test_how_to_resume_names_the_program_that_was_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch_with(monkeypatch, fail_with(KeyboardInterrupt()))
    monkeypatch.setattr(sys, "argv", ["/work/ocrm_ray/__main__.py"])
    assert main(["run", "run.yaml"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert shlex.split(last) == ["resume:", sys.executable, "-m", "ocrm_ray", "run", "run.yaml", "--resume"]


def test_a_run_folder_with_training_steps_is_refused_unless_resumed(
    workplace: Path, launched: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workplace / "runs" / "trial"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    assert main(["run", "run.yaml"]) == 2
    assert capsys.readouterr().err == (
        'name: got "trial", a run that has begun in runs/trial, need a new run folder: '
        "choose another name, or pass --resume\n"
    )
    assert launched == []
    assert main(["run", "run.yaml", "--resume"]) == 0
    assert main(["run", "run.yaml", "name=other"]) == 0
    assert len(launched) == 2


def fail_with(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_failure_of_the_run_tells_cause_logs_and_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch_with(monkeypatch, fail_with(DeadlineError("no answer of pools.reward within 900 s")))
    monkeypatch.setattr("actors.session.LOCAL_FOLDER", Path("/scratch"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["run", "run.yaml", "data={num_heldout: 1024}"]) == 1
    assert capsys.readouterr().err == (
        "error: no answer of pools.reward within 900 s\n"
        "run folder: runs/trial\n"
        "events: runs/trial/events.jsonl\n"
        "logs of the processes: /scratch/session_latest/logs\n"
        "resume: ocrm-ray run run.yaml --resume 'data={num_heldout: 1024}'\n"
    )


def test_a_failure_that_nobody_foresaw_tells_the_same_before_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch_with(monkeypatch, fail_with(ZeroDivisionError("no")))
    assert main(["study", "study.yaml"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["error: ZeroDivisionError: no", "run folder: runs/s/ARM/seed-N"]
    assert lines[4] == "resume: ocrm-ray study study.yaml"
    assert lines[-1] == "ZeroDivisionError: no"


def test_a_mistake_that_a_stage_finds_is_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch_with(monkeypatch, fail_with(UserError([Problem("data.prompts", "rows", "others", "change them")])))
    assert main(["run", "run.yaml"]) == 2
    assert capsys.readouterr().err == "data.prompts: got rows, need others: change them\n"


def test_an_interrupted_run_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    launch_with(monkeypatch, fail_with(KeyboardInterrupt()))
    assert main(["run", "run.yaml", "seed=1"]) == 130
    assert capsys.readouterr().err == "interrupted\nresume: ocrm-ray run run.yaml --resume seed=1\n"


def test_rehearse_takes_a_cluster_that_this_machine_is_not_and_prints_its_figures(
    workplace: Path,
    launched: list[tuple[RunConfig]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    before = files_below(workplace)
    assert main(["rehearse", "run.yaml", "pools.generation={num_actors: 64, gpus_per_actor: 8}"]) == 0
    assert capsys.readouterr() == ("figures\n", "")
    [(config,)] = launched
    assert config.pools.generation.num_actors == 64
    assert config.rehearsal is not None
    assert config.rehearsal.refit_s > 0
    assert files_below(workplace) == before


def test_a_rehearsal_that_fails_tells_its_cause_and_has_no_run_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch_with(monkeypatch, fail_with(DeadlineError("pool generation was not placed within 300 s")))
    assert main(["rehearse", "run.yaml", "seed=1"]) == 1
    error, logs, again = capsys.readouterr().err.splitlines()
    assert error == "error: pool generation was not placed within 300 s"
    assert logs.startswith("logs of the processes: ")
    assert again == "again: ocrm-ray rehearse run.yaml seed=1"


def test_check_predicts_from_a_rehearsals_durations(capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"generate": 1.0, "score": 0.1, "reward": 0.1, "train": 0.5}
    durations = [f"rehearsal.{stage}.item_s={seconds}" for stage, seconds in stages.items()]
    assert main(["check", "run.yaml", *durations, "rehearsal.refit_s=100", "correction.every=8"]) == 0
    out = capsys.readouterr().out
    assert "predicted step: 16 s (generate 4.00 s, score 3.20 s, reward 4.00 s, train 16 s, publish 0.00 s)" in out
    assert "(ratios 0.00 s + refit 100 s) / 1 refitter <= 8 steps of 16 s = 128 s" in out


def test_check_prints_tree_pools_and_step_and_touches_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_below(workplace)
    assert main(["check", "run.yaml", "policy.num_updates=20", "pools.scoring.num_actors=3"]) == 0
    out, err = capsys.readouterr()
    tree, pools = out.split("\n\n", 1)
    assert RunConfig.model_validate(yaml.safe_load(tree)).policy.num_updates == 20
    assert [line.split()[:3] for line in pools.splitlines() if line.startswith(" scoring")] == [["scoring", "4", "0.4"]]
    assert "predicted step: " in pools
    assert "predicted run: 20 updates" in pools
    assert err == ""
    assert files_below(workplace) == before


def test_check_of_a_study_shows_every_arm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "study.yaml"]) == 0
    out = capsys.readouterr().out
    assert "4 runs of 2 arms" in out
    assert out.count("predicted step: ") == 2
    assert out.index("\narm a: seeds 1, 2\n") < out.index("\narm b: seeds 1, 2\n") < out.index("corrections: none")


def test_check_says_when_a_model_is_elsewhere(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(workplace / "model")
    write_reward_model(workplace / "rm")
    overrides = ["world=null", "data.prompts.path=org/data", "gold={kind: function, path: 'json:loads'}"]
    assert main(["check", "run.yaml", *overrides, "sft.ready=org/model"]) == 0
    assert "predicted step: not known, a model is not on this machine" in capsys.readouterr().out
    assert main(["check", "run.yaml", *overrides, "sft.ready=model", "reward.ready=rm"]) == 0
    assert "predicted step: not known" not in capsys.readouterr().out


def test_check_asks_the_cluster_at_an_address_for_room_and_tells_every_pool_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, str]] = []

    def require_room(pools: Pools, address: str) -> str:
        asked.append((pools.policy.num_actors, address))
        if pools.policy.num_actors > 2:
            raise UserError([Problem("pools.policy", "3 actors (pack)", "room: none", "wait")])
        return "placement: free"

    placement = ModuleType("actors.placement")
    placement.require_room = require_room  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "actors.placement", placement)
    assert main(["check", "run.yaml", "--address", "auto", "pools.policy.num_actors=2"]) == 0
    assert capsys.readouterr().out.endswith("placement: free\n")
    assert main(["check", "run.yaml", "pools.policy.num_actors=3", "--address=h:6379"]) == 2
    assert capsys.readouterr().err == "pools.policy: got 3 actors (pack), need room: none: wait\n"
    assert asked == [(2, "auto"), (3, "h:6379")]
    assert main(["check", "run.yaml"]) == 0
    assert len(asked) == 2


def test_report_rebuilds_a_run_and_a_study(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ocrm_ray.report.write_report", lambda run_dir: run_dir / "report.html")
    monkeypatch.setattr("ocrm_ray.study_report.rewrite_study", lambda study_dir: study_dir / "study.html")
    (workplace / "study").mkdir()
    (workplace / "study" / "study.json").write_text("{}")
    assert main(["report", "study"]) == 0
    assert capsys.readouterr().out == "study/study.html\n"
    (workplace / "study" / "study.json").unlink()
    assert main(["report", "study"]) == 0
    assert capsys.readouterr().out == "study/report.html\n"
