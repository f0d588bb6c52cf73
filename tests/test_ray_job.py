"""``ray job submit`` as ``deploy/README.md`` says it, to a real cluster on loopback without this project."""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ocrm_ray.checkpoints import newest

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).with_name("ray")
LOOPBACK = "127.0.0.1"
JOB_S = 900
SMALL = (
    *("world.num_prompts=400", "data.num_heldout=48", "sft.num_epochs=1", "pairs.num_pairs=500"),
    *("reward.num_calibration=128", "rollout.prompts_per_step=8", "evaluation.num_prompts=48"),
    *("evaluation.num_pair_prompts=16", "correction.every=4", "correction.promote_after=2"),
)


@dataclass
class Cluster:
    """A node with a dashboard, through which jobs come; ``folder`` is what it shares with who submits.

    ``metrics``: the address that Prometheus would read.
    """

    folder: Path
    environment: dict[str, str]
    metrics: str

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(RAY), *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=JOB_S, check=False
        )

    def submit(self, name: str, config: str, *options: str) -> subprocess.CompletedProcess[str]:
        """``ocrm-ray run`` as the job ``name``."""
        program = ["python", "-m", "ocrm_ray", "run", config, "--resume", f"name={name}"]
        folders = [f"output_dir={self.folder / 'runs'}", f"stages_dir={self.folder / 'stages'}"]
        where = ["--working-dir", ".", "--runtime-env", "deploy/runtime-env.yaml", "--submission-id", name]
        waits = [option for option in options if option.startswith("--")]
        keys = [option for option in options if not option.startswith("--")]
        return self.ray("job", "submit", *waits, *where, "--", *program, *folders, *SMALL, *keys)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(4)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        gcs, dashboard, agent, metrics = (each.getsockname()[1] for each in sockets)
    folder = Path(tempfile.mkdtemp(prefix="job-", dir="/tmp"))  # sockets have short paths
    path = os.pathsep.join([str(RAY.parent), os.environ["PATH"]])
    without = ("PYTHONPATH", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in without} | {
        "PATH": path,
        "RAY_API_SERVER_ADDRESS": f"http://{LOOPBACK}:{dashboard}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else 127.0.0.1 becomes another address
    }
    head = ["start", "--head", "--block", f"--port={gcs}", f"--node-ip-address={LOOPBACK}", f"--temp-dir={folder}/ray"]
    head += [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    head += [f"--metrics-export-port={metrics}"]
    head += [f"--dashboard-agent-listen-port={agent}"]  # else another Ray of this machine may have it
    with (folder / "head.log").open("w") as log:
        node = subprocess.Popen([RAY, *head], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        found = Cluster(folder, environment, f"http://{LOOPBACK}:{metrics}/metrics")
        give_up = time.monotonic() + 120
        while found.ray("job", "submit", "--", "true").returncode:  # the agent that starts jobs comes last
            assert time.monotonic() < give_up, (folder / "head.log").read_text()
        yield found
    finally:
        node.terminate()
        node.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_run_ends_with_its_report_and_its_log_tells_of_the_roles(cluster: Cluster) -> None:
    done = cluster.submit("whole", "configs/embedded.yaml", "policy.num_updates=8", "evaluation.every=4")
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = cluster.folder / "runs" / "whole"
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 8
    assert (run_dir / "report.html").exists()
    assert f"report: {run_dir}/report.html" in done.stdout
    for role in ("policy-0", "scoring-0", "ratios", "reward-0", "refit", "evaluation-0"):
        assert re.search(rf"\({role} pid=\d+[^)]*\).* {role} is ready: rank 0 of 1", done.stdout), role
    assert re.search(r"\(generation-0 pid=", done.stdout)
    assert re.search(r"\(coordinator pid=\d+[^)]*\).* stage reward is done", done.stdout)


def test_a_submitted_run_with_a_mistake_fails_with_exit_status_2_and_names_it(cluster: Cluster) -> None:
    done = cluster.submit("mistake", "configs/embedded.yaml", "policy.num_updates=none")
    assert done.returncode == 1
    assert 'policy.num_updates: got "none", need an integer: change it' in done.stdout
    assert "exit code 2" in (done.stdout + done.stderr).lower()
    assert not (cluster.folder / "runs" / "mistake").exists()


@pytest.fixture(scope="module")
def going(cluster: Cluster) -> Path:
    """The folder of a job that is in its updates and has many left."""
    run_dir = cluster.folder / "runs" / "stopped"
    keys = "policy.num_updates=400", "evaluation.every=400", "checkpoint.every=400"
    assert cluster.submit("stopped", "configs/embedded.yaml", "--no-wait", *keys).returncode == 0
    metrics, give_up = run_dir / "metrics.jsonl", time.monotonic() + JOB_S
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert time.monotonic() < give_up, cluster.ray("job", "logs", "stopped").stdout
        time.sleep(0.2)
    return run_dir


def test_a_live_run_offers_every_figure_that_the_dashboard_shows(cluster: Cluster, going: Path) -> None:
    dashboard = (ROOT / "deploy" / "grafana" / "ocrm-ray.json").read_text()
    asked, found, give_up = set(re.findall(r"\bray_ocrm_\w+", dashboard)), set(), time.monotonic() + JOB_S
    assert asked
    while not asked <= found:  # those of a correction come with the first one
        assert time.monotonic() < give_up, f"not offered: {sorted(asked - found)}"
        time.sleep(0.2)
        text = urllib.request.urlopen(cluster.metrics, timeout=60).read().decode()
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        found = {sample.name for sample in samples if sample.labels.get("run") == str(going)}


def test_a_stopped_job_leaves_a_checkpoint_behind_its_last_update(cluster: Cluster, going: Path) -> None:
    assert cluster.ray("job", "stop", "stopped").returncode == 0
    assert "STOPPED" in (cluster.ray("job", "status", "stopped").stdout + cluster.ray("job", "list").stdout)
    saved = newest(going)
    assert saved is not None
    lines = (going / "metrics.jsonl").read_text().splitlines()
    assert saved.state.step == max(json.loads(line)["step"] for line in lines)
