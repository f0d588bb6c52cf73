"""How much of the machine's arithmetic the policy's trainer uses, against a large matrix product in the same process.

    PYTHONPATH=. .venv/bin/python tests/bench/trainer_flops.py MODEL DATA [--rows 32] [--new-tokens 48] [--repeats 5]

MODEL: a causal language model's folder (SmolLM2-135M-Instruct); DATA: JSON rows with ``instruction``, ``input`` and
``output`` (Alpaca), whose outputs stand for ragged responses, two to a prompt. Useful work of an update is 6 x
parameters x real tokens, prompts included (with --share-prompts once for both responses) and padding left out.
Updates and products take turns; medians. Run from the repository's root.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from actors.policy import PolicyActor
from ocrm_ray.batches import SequenceTable
from ocrm_ray.config import RunConfig
from ocrm_ray.conversations import encode_response
from ocrm_ray.networks import load_tokenizer
from ocrm_ray.records import Prompt, Rollout, Sample, Scores

PRODUCT_SIZE = 4096


def read_rollouts(tokenizer, data: Path, num_rows: int, new_tokens: int) -> list[Rollout]:
    """Prompts of every second row, with its own output and the next row's as samples; the scores are random."""
    rows = json.loads(data.read_text(encoding="utf-8"))[:num_rows]
    generator = np.random.default_rng(0)
    rollouts = []
    for number in range(0, num_rows, 2):
        text = f"{rows[number]['instruction']}\n{rows[number]['input']}"
        chat = [{"role": "user", "content": text}]
        ids = tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)[-512:])
        sequences = [encode_response(tokenizer, ids, row["output"], new_tokens) for row in rows[number : number + 2]]
        logprobs = [np.full(len(sequence.response_ids), -2.0, np.float32) for sequence in sequences]
        samples = tuple(Sample(sequence, row, 0, 0) for sequence, row in zip(sequences, logprobs, strict=True))
        scores = tuple(Scores(float(generator.normal()), 0, row, 0, row) for row in logprobs)
        rollouts.append(Rollout(Prompt(number, text, ids), samples, 0, scores))
    return rollouts


def make_actor(arguments: argparse.Namespace) -> PolicyActor:
    pool = {"dtype": "bfloat16", "threads_per_actor": arguments.threads}
    policy = {
        "learning_rate": 1e-6,
        "micro_batch_tokens": arguments.micro_batch_tokens,
        "gradient_checkpointing": arguments.gradient_checkpointing,
    }
    folder = Path(tempfile.mkdtemp())
    sections = {"policy": policy, "pools": {"policy": pool}, "share_prompts": arguments.share_prompts}
    config = RunConfig.model_validate({"name": "bench", "output_dir": folder} | sections)
    actor = PolicyActor(config, str(arguments.model), None, config.run_dir, folder)
    actor.start()
    return actor


def clocks() -> np.ndarray:
    """Seconds on the wall, and of CPU: on a machine that others use too only the latter can be compared."""
    return np.array([time.perf_counter(), time.process_time()])


def record_steps(actor: PolicyActor) -> list[np.ndarray]:
    """Seconds of every optimiser step from now on."""
    seconds, original = [], actor._engine.step

    def step(factor: float) -> float:
        started = clocks()
        norm = original(factor)
        seconds.append(clocks() - started)
        return norm

    actor._engine.step = step
    return seconds


def multiply() -> np.ndarray:
    """Seconds of one large product."""
    left, right = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE).bfloat16()
    left @ right
    started = clocks()
    for _ in range(4):
        left @ right
    return (clocks() - started) / 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--share-prompts", action="store_true")
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.model, trust_remote_code=False)
    rollouts = read_rollouts(tokenizer, arguments.data, arguments.rows, arguments.new_tokens)
    sequences = [sequence for rollout in rollouts for sequence in rollout.sequences]
    table = SequenceTable(sequences, 0, arguments.share_prompts)
    chunks = table.chunks(np.arange(len(table)), 128, arguments.micro_batch_tokens)
    batches = [table.batch(chunk) for chunk in chunks]
    num_real = sum(int(batch.row_lengths.sum()) for batch in batches)
    blocks = [(rows.stop - rows.start) * width for batch in batches for rows, width in batch.blocks()]
    actor = make_actor(arguments)
    num_parameters = sum(parameter.numel() for parameter in actor._engine.network.parameters())
    work = 6 * num_parameters * num_real
    steps = record_steps(actor)
    actor.update(rollouts)
    steps.clear()
    updates, products = [], []
    for _ in range(arguments.repeats):
        products.append(multiply())
        started = clocks()
        actor.update(rollouts)
        updates.append(clocks() - started)
    low, high = table.lengths.min(), table.lengths.max()
    print(
        f"{num_parameters / 1e6:.0f}M parameters, {len(table)} sequences of {low} to {high} tokens, {num_real} counted"
    )
    print(f"{len(chunks)} micro-batches, {len(blocks)} blocks, padding {1 - num_real / sum(blocks):.1%}", end="; ")
    print(f"{arguments.threads} threads, {arguments.repeats} repetitions")
    print(f"{'':30}{'seconds':>9}{'GFLOP/s':>9}{'of product':>12}{'CPU s':>9}{'of product':>12}")
    product_work, products = 2 * PRODUCT_SIZE**3, np.array(products)
    inner = np.array(updates) - np.array(steps)
    table = {
        "update": (work, updates),
        "without the optimiser's step": (work, inner),
        "product": (product_work, products),
    }
    for name, (done, seconds) in table.items():
        (wall, cpu), ratio = np.median(seconds, 0), np.median(done / product_work * products / seconds, 0)
        print(f"{name:30}{wall:9.2f}{done / wall / 1e9:9.0f}{ratio[0]:12.1%}{cpu:9.2f}{ratio[1]:12.1%}")
    print(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
