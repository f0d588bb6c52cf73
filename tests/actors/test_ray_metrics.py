"""The run's figures at a Ray node's endpoint, as Prometheus reads them."""

import asyncio
import math
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from actors import ray_cluster
from actors.ray_metrics import FIGURES, RunMetrics
from actors.session import ray_session
from ocrm_ray.config import RunConfig
from ocrm_ray.metrics import EVALUATION, STEP, StepRecord
from ocrm_ray.records import EvaluationReport

RUN = "/mnt/ocrm/runs/a"
DEADLINE_S = 60.0


def record(step: int, **fields: Any) -> dict[str, Any]:
    parts = {
        "stage_s": {"generate": 1.5 * step, "train": 0.5},
        "idle_share": {"generation": 0.25, "policy": 0.125 * step},
    }
    versions = {"policy_version": step, "reward_version": 1, "anchor_version": 0}
    return asdict(StepRecord(step=step, time_s=10.0 * step, **versions, **parts, **fields))


@pytest.fixture(scope="module")
def scraped() -> Iterator[dict[tuple[str, str], float]]:
    """(name, stage or pool or event) -> value, once the last figure told by an actor has arrived."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "200")
        with ray_session("test"):
            teller = ray.remote(RunMetrics).options(num_cpus=0.1).remote(RUN)
            report = EvaluationReport(2, 2, 0.5, 2.25, 9.0, 2.5, 1.25, 1.5, gold_mean=3.5, rm_accuracy=0.625)
            news = [
                (STEP, record(1, rollout_tokens=100, kl_sft=0.75, num_reissued=0, logprob_gap=math.nan)),
                (STEP, record(2, rollout_tokens=150, kl_sft=None, num_reissued=3)),
                (EVALUATION, asdict(report)),
                ("promoted", {"ess_fraction": 0.25, "refit_s": 8.5, "lag_steps": 3, "promotion_id": "p"}),
                ("weights_published", {"bytes": 1000, "seconds": 0.5, "pause_s": 0.125}),
                ("weights_published", {"bytes": 1000, "seconds": 0.25, "pause_s": 0.0625}),
                ("checkpoint_saved", {"step": 2}),
            ]
            for kind, figures in news:
                ray.get(teller.observe.remote(kind, figures))
            (node,) = ray.nodes()
            yield _scrape(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics")


def _scrape(address: str) -> dict[tuple[str, str], float]:
    started = time.monotonic()
    while True:
        try:
            text = urllib.request.urlopen(address, timeout=5).read().decode()
        except OSError:
            text = ""
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        found = {
            (
                sample.name,
                next((sample.labels[tag] for tag in ("stage", "pool", "event") if tag in sample.labels), ""),
            ): sample.value
            for sample in samples
            if sample.labels.get("run") == RUN
        }
        if ("ray_ocrm_events_total", "checkpoint_saved") in found:
            return found
        assert time.monotonic() < started + DEADLINE_S, f"not there: {sorted(found)}"
        time.sleep(0.1)


@pytest.mark.real
def test_a_gauge_shows_the_last_value_that_was_known(scraped: dict[tuple[str, str], float]) -> None:
    assert scraped["ray_ocrm_step", ""] == 2
    assert scraped["ray_ocrm_kl_sft", ""] == 0.75
    assert scraped["ray_ocrm_stage_s", "generate"] == 3
    assert scraped["ray_ocrm_idle_share", "policy"] == 0.25
    assert (scraped["ray_ocrm_gold_mean", ""], scraped["ray_ocrm_eval_kl_sft", ""]) == (3.5, 2.25)
    assert scraped["ray_ocrm_correction_ess_fraction", ""] == 0.25
    assert scraped["ray_ocrm_weights_pause_s", ""] == 0.0625


@pytest.mark.real
def test_a_counter_shows_the_sum_of_what_steps_and_events_told(scraped: dict[tuple[str, str], float]) -> None:
    assert scraped["ray_ocrm_rollout_tokens_total", ""] == 250
    assert scraped["ray_ocrm_reissued_total", ""] == 3
    assert scraped["ray_ocrm_weights_bytes_total", ""] == 2000
    assert scraped["ray_ocrm_events_total", "weights_published"] == 2
    assert scraped["ray_ocrm_events_total", "promoted"] == 1


@pytest.mark.real
def test_every_scraped_name_is_in_the_table_and_what_was_never_known_is_not_there(
    scraped: dict[tuple[str, str], float],
) -> None:
    names = {name for name, _ in scraped}
    assert names <= {figure.exported for figure in FIGURES}
    assert names.isdisjoint({"ray_ocrm_logprob_gap", "ray_ocrm_value_loss", "ray_ocrm_gold_win_rate"})


def test_ray_offers_every_figure_under_the_name_in_the_table() -> None:
    code = """
from prometheus_client import generate_latest
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder

from actors.ray_metrics import FIGURES

node = OpenTelemetryMetricRecorder()
for figure in FIGURES:
    (node.register_counter_metric if figure.is_count else node.register_gauge_metric)(figure.name, "")
    node.set_metric_value(figure.name, {"run": "a"}, 1)
print(generate_latest().decode())
"""
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    offered = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    assert {figure.exported for figure in FIGURES} <= offered


def test_no_two_figures_share_a_name() -> None:
    names = [figure.exported for figure in FIGURES]
    assert len(set(names)) == len(names)


def test_the_coordinators_actor_exports_what_its_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str, dict[str, Any]]] = []

    class Exported:
        def __init__(self, run: str) -> None:
            self.run = run

        def observe(self, kind: str, figures: dict[str, Any]) -> None:
            told.append((self.run, kind, figures))

    async def run(config: RunConfig, start: Any, *_: object) -> None:
        start(None).observe("promoted", {"lag_steps": 1})

    monkeypatch.setattr(ray_cluster, "RunMetrics", Exported)
    monkeypatch.setattr(ray_cluster, "run_with_restarts", run)
    config = RunConfig.model_validate({"name": "a", "output_dir": str(tmp_path), "world": {}})

    async def act() -> None:
        await ray_cluster.RunActor(tmp_path).run(config)

    asyncio.run(act())
    assert told == [(str(tmp_path / "a"), "promoted", {"lag_steps": 1})]
