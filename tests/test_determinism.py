"""``deterministic: true``: the same parts in the same order, whatever the timing and however often a run is cut off."""

import asyncio
import json
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeEvaluator, FakeGeneration, FakePools, FakeReward, FakeScoring, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_and_resume import differences
from safetensors.torch import save_file
from virtual_runs import cut_off, metrics, run, trained

from ocrm_ray.checkpoints import newest
from ocrm_ray.records import EvaluationReport, GenerationRequest, Sample, Sequence

NUM_SAMPLES, BATCH = 2, 4
STEPS = [list(range(first, first + BATCH)) for first in range(0, 12 * BATCH, BATCH)]
RULES = [{"correction.promote_after": 1}, {"correction.promote_after": 3}, {"correction.schedule": "blocking"}]
FIXED = {"deterministic": True, "rollout.max_staleness": 0, "pools.generation.max_running": 1}


def tokens_of(step: list[int]) -> list[int]:
    """The prompts' first tokens, of each sample of a batch (see ``fakes.prompts``)."""
    return [number % 7 + 1 for number in step for _ in range(NUM_SAMPLES)]


@dataclass
class RememberingScoring(FakeScoring):
    """Keeps every message."""

    messages: list[list[int]] = field(default_factory=list)

    async def score(self, sequences: Seq[Sequence], models: Seq[str] = ("live", "sft")) -> list[list[np.ndarray]]:
        self.messages.append([sequence.prompt_ids[0] for sequence in sequences])
        return await super().score(sequences, models)


@dataclass
class RememberingReward(FakeReward):
    """Keeps every message."""

    messages: list[list[int]] = field(default_factory=list)

    async def score(self, sequences: Seq[Sequence], slot: str = "live") -> np.ndarray:
        self.messages.append([sequence.prompt_ids[0] for sequence in sequences])
        return await super().score(sequences, slot)


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.floats(0.5, 40), max_size=3),
    every=st.integers(1, 4),
    speeds=st.lists(st.sampled_from([0.2, 0.7, 1.0, 1.05, 5.0]), min_size=1, max_size=7),
    score_s=st.sampled_from([0.01, 0.3, 2.0]),
    refit_s=st.sampled_from([0.01, 1.0, 9.0]),
    rule=st.sampled_from(RULES),
)
def test_scorers_and_trainer_see_the_same_batches_in_order_of_number_whatever_finishes_first(
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[float],
    every: int,
    speeds: list[float],
    score_s: float,
    refit_s: float,
    rule: dict[str, object],
) -> None:
    config = tiny_run(output_dir=str(tmp_path_factory.mktemp("run")), **{"checkpoint.every": every}, **FIXED, **rule)
    lineage: list[list[int]] = []
    messages: list[list[int]] = []
    for seconds in [*cuts, 10_000.0]:
        saved = newest(config.run_dir)
        scoring, reward = RememberingScoring(score_s), RememberingReward(score_s, refit_s=lambda n: refit_s)
        named = {"scoring": scoring, "reward": reward}
        named |= {"generation": FakeGeneration(seconds=lambda n: speeds[n % len(speeds)])}
        fakes = FakePools.of(saved, **named) if saved else FakePools(**named)
        del lineage[saved.state.step if saved else 0 :]
        is_cut = cut_off(config, fakes, seconds, saved)
        lineage += trained(fakes)
        messages += scoring.messages + reward.messages
        if not is_cut:
            break
    assert lineage == STEPS
    heldout = [1, 1, 2, 3]
    assert [message for message in messages if message not in [heldout, *map(tokens_of, STEPS)]] == []


@dataclass
class SlowHeldout(FakeGeneration):
    """Held-out prompts take long."""

    async def generate(self, request: GenerationRequest) -> tuple[Sample, ...]:
        if request.request_id.startswith("heldout"):
            await asyncio.sleep(4.0)
        return await super().generate(request)


@dataclass
class ProxyEvaluator(FakeEvaluator):
    """The proxy is that of the first sample."""

    async def evaluate(
        self, step: int, samples: Seq[tuple[Sample, ...]], proxy: Seq[np.ndarray], *references: Seq[Seq[np.ndarray]]
    ) -> tuple[EvaluationReport, list[dict[str, object]]]:
        report, rows = await super().evaluate(step, samples, proxy, *references)
        return EvaluationReport(**{**vars_of(report), "proxy_mean": float(proxy[0][0])}), rows


def vars_of(report: EvaluationReport) -> dict[str, object]:
    return {name: getattr(report, name) for name in report.__slots__}


def test_an_evaluation_is_of_the_reward_model_of_its_step_although_the_next_promotes(tmp_path: Path) -> None:
    rule = {"correction.promote_after": 3, "evaluation.every": 6, "output_dir": str(tmp_path)}
    fakes = FakePools(generation=SlowHeldout(), evaluator=ProxyEvaluator())
    run(tiny_run(**FIXED, **rule), fakes, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert [row["reward_version"] for row in rows[5:9]] == [0, 0, 1, 1]
    assert [row["proxy_mean"] for row in rows if row["proxy_mean"] is not None] == [0.0, 0.0, 2.0]


def test_the_comparison_of_runs_names_what_differs_and_in_steps_done_again_too(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 0.1 * step, "time_s": 1.0} for step in range(3)]
    again = [{**rows[1], "time_s": 2.0}, {**rows[1], "loss": 0.3}]
    for name, written, weight in (("whole", rows, 1.0), ("other", [*rows[:2], *again], 1.0000001)):
        (tmp_path / name / "policy").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
        tensors = {"head": torch.full((2,), weight), "body": torch.ones(2)}
        save_file(tensors, tmp_path / name / "policy" / "model.safetensors")
    assert list(differences(tmp_path / "whole", tmp_path / "other")) == [
        "step 1: loss is 0.3, not 0.1",
        "no line of steps [2]",
        "policy: head differs",
    ]
    assert list(differences(tmp_path / "whole", tmp_path / "whole")) == []
