"""What a publish costs.

    PYTHONPATH=. .venv/bin/python tests/bench/publish.py MODEL_FOLDER [--threads N] [--rounds N]

One table for a model in bfloat16 on one node: bytes a second from the trainer's memory into a segment, and from the
segment into memory of the engine's (which vLLM's repacking reads in place instead), each beside a memcpy of as many
bytes in the same process and the same round; then an engine's repacking and pause, idle and with 32 requests running.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from actors.generation import GenerationActor
from actors.shared_memory import shared_folder
from actors.weight_transport import WeightExporter, WeightReader
from ocrm_ray.config import RunConfig
from ocrm_ray.networks import load_causal_lm
from ocrm_ray.records import GenerationRequest, Prompt, PublishReport

NUM_REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 32, 40, 400


class Publisher:
    """The trainer's side: a model in this process, exported again and again."""

    def __init__(self, model_folder: str, segments: Path) -> None:
        model = load_causal_lm(model_folder, dtype="bfloat16", trust_remote_code=False)
        # loading maps a file; the trainer's tensors are memory of its own
        self.tensors = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
        self.exporter = WeightExporter(segments, self.tensors, False)
        self.version = 0

    def export(self):
        self.version += 1
        return self.exporter.export(self.version, self.tensors)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_transfer(publisher: Publisher, num_rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Bytes, and seconds of each round by what was done; two rounds to warm up are left out."""
    reader, kinds = WeightReader(), ("export", "read", "memcpy")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    engine = {name: torch.zeros_like(tensor) for name, tensor in publisher.tensors.items()}
    num_bytes = sum(tensor.nbytes for tensor in engine.values())
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)

    def read(weights) -> None:
        with reader.read(weights) as tensors:
            for name, tensor in tensors.items():
                engine[name].copy_(tensor)

    for _ in range(num_rounds + 2):
        started = time.perf_counter()
        weights = publisher.export()
        seconds["export"].append(time.perf_counter() - started)
        seconds["memcpy"].append(seconds_of(lambda: target.copy_(source)))
        seconds["read"].append(seconds_of(lambda: read(weights)))  # noqa: B023
        publisher.exporter.release(weights)
    assert all(torch.equal(engine[name], tensor) for name, tensor in publisher.tensors.items())
    return num_bytes, {kind: values[2:] for kind, values in seconds.items()}


async def measure_engine(publisher: Publisher, config: RunConfig, model_folder: str, num_rounds: int) -> dict:
    """Reports of publishes to an idle engine, and to one that samples."""
    actor = GenerationActor(config, 0, model_folder, PROMPT_TOKENS + NEW_TOKENS + 1)
    await actor.start()

    async def publish() -> PublishReport:
        weights = publisher.export()
        report = await actor.load_weights(weights)
        publisher.exporter.release(weights)
        return report

    def request(index: int) -> GenerationRequest:
        tokens = tuple(range(100 + index, 100 + index + PROMPT_TOKENS))
        return GenerationRequest(f"bench-{index}", Prompt(index, "", tokens), 1, NEW_TOKENS, 1.0, index)

    async def sample() -> None:
        await actor.submit([request(index) for index in range(NUM_REQUESTS)])
        num_left = NUM_REQUESTS
        while num_left:
            num_left -= len(await actor.collect())

    try:
        await publish()
        idle = [await publish() for _ in range(num_rounds)]
        sampling = asyncio.ensure_future(sample())
        await asyncio.sleep(2)
        busy = []
        while len(busy) < num_rounds and not sampling.done():
            busy.append(await publish())
            await asyncio.sleep(0.5)
        sampling.cancel()
        return {"idle": idle, f"{NUM_REQUESTS} requests": busy}
    finally:
        await actor.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_folder")
    parser.add_argument("--threads", type=int, default=1, help="of trainer and engine each")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.getcwd()
    torch.set_num_threads(arguments.threads)
    pools = {"generation": {"dtype": "bfloat16", "threads_per_actor": arguments.threads}}
    config = RunConfig.model_validate({"name": "bench", "pools": pools})
    with shared_folder("bench") as segments:
        publisher = Publisher(arguments.model_folder, segments)
        num_bytes, seconds = measure_transfer(publisher, arguments.rounds)
        reports = asyncio.run(measure_engine(publisher, config, arguments.model_folder, arguments.rounds))
    print(f"{arguments.model_folder}: {num_bytes / 1e6:.0f} MB, {arguments.rounds} rounds, median (smallest..largest)")
    for kind, values in seconds.items():
        ratio = statistics.median(copy / value for copy, value in zip(seconds["memcpy"], values, strict=True))
        speeds = sorted(num_bytes / value / 1e9 for value in values)
        spread = f"({speeds[0]:.1f}..{speeds[-1]:.1f})"
        print(f"{kind:24} {statistics.median(speeds):7.1f} GB/s {spread}, {ratio:.0%} of memcpy")
    for state, publishes in reports.items():
        for what in ("transfer_s", "repack_s", "pause_s"):
            values = sorted(1000 * getattr(report, what) for report in publishes)
            spread = f"({values[0]:.1f}..{values[-1]:.1f})"
            print(f"{what[:-2] + ', ' + state:24} {statistics.median(values):7.1f} ms   {spread}")


if __name__ == "__main__":
    main()
