"""What a process is started with, told by a stand-in for Ray."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import remote_actor
from actors.ray_cluster import RayCluster
from actors.remote_actor import ActorHost, ActorSpec, Place, RemoteActor, actor_environment, inner_environment
from actors.shared_group import StandingGroups
from ocrm_ray.config import RunConfig
from ocrm_ray.prompts import write_prompts


class Recorder:
    """``ray.remote(host).options(...).remote(...)``, remembered."""

    def __call__(self, host: type) -> "Recorder":
        self.host = host
        return self

    def options(self, **options: Any) -> "Recorder":
        self.environment: dict[str, str] = options["runtime_env"]["env_vars"]
        return self

    def remote(self, *arguments: Any) -> None:
        self.role, self.secrets = arguments


def test_secrets_travel_as_an_argument_and_only_those_that_the_actor_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(remote_actor.ray, "remote", recorder)
    monkeypatch.setattr(remote_actor, "PlacementGroupSchedulingStrategy", lambda *_, **__: None)
    for name in ("HF_TOKEN", "TRIBUNAL_KEY", "OTHER_KEY"):
        monkeypatch.setenv(name, f"value of {name}")
    group: Any = SimpleNamespace(bundle_specs=[{"CPU": 0.1, "GPU": 0.5}])
    spec = ActorSpec("evaluation-0", "math:pi", (), 1, secrets=("TRIBUNAL_KEY", "UNSET_KEY"))
    RemoteActor(spec, Place(group, 0))
    assert recorder.secrets == {name: f"value of {name}" for name in ("HF_TOKEN", "TRIBUNAL_KEY")}
    assert "value of" not in f"{recorder.environment}{recorder.role}"
    RemoteActor(replace(spec, secrets=()), Place(group, 0))
    assert recorder.secrets.keys() == {"HF_TOKEN"}


def test_secrets_are_in_the_environment_before_the_actor_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIBUNAL_KEY", "")
    host = ActorHost("evaluation-0", {"TRIBUNAL_KEY": "word"})
    with pytest.raises(AttributeError, match="'str' object has no attribute 'start'"):
        host.start(ActorSpec("evaluation-0", "os:getenv", ("TRIBUNAL_KEY",), 1))
    assert host._actor == "word"


def test_of_the_pools_only_the_evaluator_gets_the_judges_key(tmp_path: Path) -> None:
    gold = {"kind": "judge", "base_url": "http://h", "model_name": "m", "api_key_env": "TRIBUNAL_KEY"}
    config = RunConfig.model_validate({"name": "x", "output_dir": tmp_path, "gold": gold, "sft": {"ready": "m"}})
    write_prompts(tmp_path / "x" / "stages" / "data" / "heldout.jsonl", [])
    cluster = RayCluster(config, tmp_path, lambda kind, figures: None, StandingGroups(), None)
    specs = {pool: cluster._specs(pool) for pool in ("scoring", "reward", "evaluation")}
    assert [spec.secrets for spec in specs.pop("evaluation")] == [("TRIBUNAL_KEY",)]
    assert {spec.secrets for pool in specs.values() for spec in pool} == {()}


def test_an_actor_without_a_part_of_a_gpu_sees_none_and_hands_that_on_to_nobody() -> None:
    spec = ActorSpec("reward-0", "os:getenv", (), 1)
    assert inner_environment(spec, {"CPU": 1.0}, {"CUDA_VISIBLE_DEVICES": "3"}) == {"CUDA_VISIBLE_DEVICES": ""}
    assert inner_environment(spec, {"CPU": 1.0, "GPU": 0.5}, {}) == {}
    assert "CUDA_VISIBLE_DEVICES" not in actor_environment(spec, {"CUDA_VISIBLE_DEVICES": "3"})
