"""Updates per second of ocrm-ray, whole and with real engines, against TRL's RLOO trainer on the same two cores:

    make bench-setup
    PYTHONPATH=. .venv/bin/python tests/bench/against_trl.py embedded
    PYTHONPATH=. .venv/bin/python tests/bench/against_trl.py smollm2 --model SMOLLM2_DIR --prompts ALPACA.json

Same model, prompts in the same order, lengths, samples, precision of the weights, one epoch and one optimiser step an
update, a reward model and a KL reference (in the reward, k1, as TRL's RLOO has it); no corrections. They take turns,
each alone on the machine. TRL generates with transformers (its default), in one process. Seconds an update: wall time
between optimiser steps, warm-up updates left out; the ratio is that of mean rates over all rounds. What ocrm-ray does
beyond TRL stays in: publishing to the engine, log-probs under the SFT model, probes, metrics.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured_run import (
    FEW_EVALUATIONS,
    ROOT,
    Launch,
    MeasuredRun,
    Watch,
    arguments,
    embedded_config,
    mean_of,
    note,
    smollm2_config,
    step_seconds,
    table,
)

from ocrm_ray.config import RunConfig
from ocrm_ray.config_file import load_run_config
from ocrm_ray.networks import load_reward_model, load_tokenizer, save_model
from ocrm_ray.prompts import ShuffledEpochs, read_prompts
from ocrm_ray.stages import stage_paths

GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """Seconds of the steady updates of one round, the tokens of a response, and memory in bytes."""

    system: str
    update_s: list[float]
    response_tokens: float
    trainer_peak: int
    tree_peak: int

    def row(self, round_number: object) -> list[object]:
        mean_s = statistics.fmean(self.update_s)
        memory = [f"{peak / GIB:.2f}" for peak in (self.trainer_peak, self.tree_peak)]
        median_s = statistics.median(self.update_s)
        return [round_number, self.system, median_s, mean_s, 1 / mean_s, f"{self.response_tokens:.1f}", *memory]


def embedded_launch(folder: Path, options: argparse.Namespace) -> Launch:
    return Launch(folder, "embedded", embedded_config(), settings(options), stages=options.stages)


def smollm2_launch(folder: Path, options: argparse.Namespace) -> Launch:
    """No stage trains: the SFT model is ready, the reward model is it with a new head; some pairs calibrate it."""
    reward = folder / "reward-model"
    tokenizer = load_tokenizer(options.model, trust_remote_code=False)
    model = load_reward_model(options.model, dtype="bfloat16", trust_remote_code=False, head_seed=1)
    save_model(model, tokenizer, reward)
    changes = settings(options) | {
        "sft.ready": str(options.model.resolve()),
        "reward.ready": str(reward),
        "data.prompts.path": str(options.prompts.resolve()),
        "gold": {"kind": "function", "path": "ocrm_ray.praise:gold"},
        "pairs.num_pairs": 64,
        "correction.num_pairs": None,
        "correction.promote_after": None,
        "evaluation.num_prompts": 8,
    }
    return Launch(folder, "smollm2", smollm2_config(), changes, pss_every=20)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return FEW_EVALUATIONS | {"policy.num_updates": options.updates, "correction.strategy": "none"}


def time_ours(launch: Launch, num_warmup: int) -> tuple[MeasuredRun, Timing]:
    measured = launch.measure()
    rows = measured.steady(num_warmup)
    peaks = measured.watch.peak_rss("policy-0"), measured.watch.peak_pss()
    tokens = mean_of(rows, "response_tokens_mean")
    return measured, Timing("ocrm-ray", [row["step_s"] for row in rows], tokens, *peaks)


def trl_spec(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """What trl_updates.py needs, from the resolved configuration of a run of ours whose stages are done."""
    paths, rollout, policy = stage_paths(config), config.rollout, config.policy
    prompts = ShuffledEpochs(read_prompts(paths.root / "data" / "prompts.jsonl"), config.seed)
    used = list(itertools.islice(prompts, options.trl_updates * rollout.prompts_per_step))
    return {
        "model": paths.sft,
        "reward": paths.reward,
        "prompts": [{"text": prompt.text, "token_ids": list(prompt.token_ids)} for prompt in used],
        "conversational": options.case == "smollm2",
        "samples_per_prompt": rollout.samples_per_prompt,
        "prompts_per_step": rollout.prompts_per_step,
        "max_new_tokens": rollout.max_new_tokens,
        "num_updates": options.trl_updates,
        "micro_batch_size": options.trl_micro_batch or (8 if options.case == "smollm2" else policy.micro_batch_size),
        "weights": options.trl_weights or config.pools.policy.dtype,
        "autocast": options.trl_autocast,
        "learning_rate": policy.learning_rate,
        "kl_coefficient": policy.kl_coefficient,
        "threads": options.trl_threads,
        "seed": config.seed,
    }


def time_trl(spec: dict[str, Any], folder: Path, options: argparse.Namespace) -> Timing:
    """TRL in its own process, with the bench's packages in front of the environment's."""
    given, answer, log = folder / "trl.json", folder / "trl-result.json", folder / "trl.log"
    given.write_text(json.dumps(spec))
    note(f"TRL: {options.trl_updates} updates")
    threads = {name: str(options.trl_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with log.open("wb") as output:
        program = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(ROOT / "tests/bench/trl_updates.py"), str(given), str(answer)],
            env={**os.environ, **threads, "PYTHONPATH": str(options.trl), "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        watch = Watch(program.pid)
        watch.start()
        status = program.wait()
        watch.stop()
    if status != 0:
        sys.exit(f"TRL ended with {status}:\n{log.read_text()[-3000:]}")
    result = json.loads(answer.read_text())
    steady = result["update_s"][options.warmup :]
    return Timing("TRL", steady, result["completion_tokens"], result["peak_rss_bytes"], watch.peak_pss())


def resolved(launch: Launch) -> RunConfig:
    return load_run_config(launch.run_dir / "config.yaml", [])


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("case", choices=("embedded", "smollm2"))
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", type=Path, help="Alpaca rows as JSON")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--updates", type=int, help="of ocrm-ray in a round; default 160 or 12")
    parser.add_argument("--trl-updates", type=int, help="of TRL in a round; default 80 or 4")
    parser.add_argument("--warmup", type=int, help="updates left out; default 20 or 1")
    parser.add_argument("--trl", type=Path, default=ROOT / ".venv" / "bench", help="where TRL is installed")
    parser.add_argument("--trl-threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--trl-micro-batch", type=int, help="sequences a forward pass; default that of ocrm-ray")
    parser.add_argument("--trl-weights", choices=("float32", "bfloat16"), help="default the precision of ocrm-ray")
    parser.add_argument("--trl-autocast", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    defaults = {"embedded": (160, 80, 20), "smollm2": (12, 4, 1)}[options.case]
    for name, value in zip(("updates", "trl_updates", "warmup"), defaults, strict=True):
        setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
    if options.case == "smollm2" and not (options.model and options.prompts):
        parser.error("smollm2 needs --model and --prompts")
    if not (options.trl / "trl").is_dir():
        parser.error(f"no TRL in {options.trl}: make bench-setup")
    options.trl = options.trl.resolve()
    return options


def main() -> None:
    options = parsed()
    make = embedded_launch if options.case == "embedded" else smollm2_launch
    timings: list[list[Timing]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launch = make(folder, options)
        for round_number in range(options.rounds):
            launch.name = f"{options.case}-{round_number + 1}"
            measured, ours = time_ours(launch, options.warmup)
            spec = trl_spec(resolved(launch), options)
            timings.append([ours, time_trl(spec, folder, options)])
    rate = [1 / statistics.fmean(s for pair in timings for s in pair[i].update_s) for i in (0, 1)]
    median = [statistics.median(s for pair in timings for s in pair[i].update_s) for i in (0, 1)]
    responses = spec["prompts_per_step"] * spec["samples_per_prompt"]
    steps = measured.steady(options.warmup)
    header = ["round", "system", "s an update: median", "mean", "updates/s", "tokens a response"]
    table(
        f"ocrm-ray against TRL, {options.case}: {responses} responses of up to {spec['max_new_tokens']} tokens an "
        f"update, {options.warmup} updates of warm-up\n"
        f"TRL: {spec['threads']} threads, {spec['weights']} weights, autocast {spec['autocast']}, "
        f"{spec['micro_batch_size']} sequences a forward pass, no gradient checkpointing",
        [
            [*header, "GiB: trainer, peak RSS", "all, peak PSS"],
            *(timing.row(number) for number, pair in enumerate(timings, start=1) for timing in pair),
            ["all", "ocrm-ray / TRL", f"{median[1] / median[0]:.2f} times", f"{rate[0] / rate[1]:.2f} times"],
            ["where a step of ocrm-ray goes (last round; stages overlap)"],
            *(["", name, value] for name, value in [("step, s", mean_of(steps, "step_s")), *step_seconds(steps)]),
        ],
    )


if __name__ == "__main__":
    main()
