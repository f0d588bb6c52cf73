"""Actors without networks that do on request what real ones do at their worst: fail, hang, die, answer late."""

import asyncio
import os
import threading
import time
from pathlib import Path

import numpy as np

from ocrm_ray.errors import Problem, UserError
from ocrm_ray.records import Calibration, PublishReport, RefitReport, Sample, Sequence, UpdateReport

HANG, FAIL, DIE, UNSENDABLE = "hang", "fail", "die", "unsendable"


def answer_to(request, version):
    """Samples that tell which request they answer: the seed is the response."""
    sequence = Sequence(request.prompt.token_ids, (request.seed,), has_eos=True)
    return (Sample(sequence, np.zeros(1, dtype=np.float32), version, version),) * request.num_samples


class DummyEngine:
    """``GenerationActor`` that answers a batch in reverse order, one answer a ``collect``; prompt texts are levers."""

    def __init__(self, pause_s=0.0, grave=None):
        self.pause_s = pause_s
        self.grave = grave
        self.submitted = []
        self.aborted = []
        self.version = 0

    async def start(self):
        self.finished = asyncio.Queue()

    async def submit(self, requests):
        self.submitted.append([request.request_id for request in requests])
        for request in reversed(requests):
            if request.prompt.text == DIE:
                os._exit(1)
            if request.prompt.text == FAIL:
                self.finished.put_nowait((request.request_id, LookupError(request.request_id)))
            elif request.prompt.text != HANG:
                self.finished.put_nowait((request.request_id, answer_to(request, self.version)))

    async def collect(self):
        answer = await self.finished.get()
        return [answer] if answer else []

    async def abort(self, request_ids):
        self.aborted += request_ids

    async def history(self):
        return self.submitted, self.aborted

    async def process_id(self):
        return os.getpid()

    async def load_weights(self, weights):
        self.version = weights.version
        return PublishReport(weights.version, weights.num_bytes, seconds=0.0, pause_s=self.pause_s)

    async def score(self, sequences):
        return [np.full(len(sequence.response_ids), self.pause_s, dtype=np.float32) for sequence in sequences]

    async def rest(self):
        self.finished.put_nowait(None)
        self.finished = asyncio.Queue()

    async def renew(self, pause_s=0.0, grave=None):
        return pause_s == self.pause_s

    async def close(self):
        if self.grave is not None:
            Path(self.grave).write_text("shut down")


class DummyPolicy:
    """``PolicyActor`` whose rank is its first answer; the number of rollouts is a lever."""

    def __init__(self, rank):
        self.rank = rank

    def start(self):
        if self.rank == FAIL:
            raise LookupError("no such model")

    def close(self):
        pass

    def process_id(self):
        return os.getpid()

    def update(self, rollouts):
        if rollouts == [HANG]:
            time.sleep(60)
        if rollouts == [DIE]:
            os._exit(1)
        if rollouts == [FAIL]:
            raise UserError([Problem("gold.path", "nothing", "a function", "write one")])
        if rollouts == [UNSENDABLE]:
            raise LookupError(threading.Lock())
        return UpdateReport(self.rank, *[0.0] * 8)

    def send_weights(self, weights):
        raise LookupError(f"asked to send version {weights.version}")

    def save(self, name, weights=None):
        """Answers with what this process was given, for the test of the environment."""
        Path(name).write_text(
            "\n".join(f"{key}={os.environ.get(key)}" for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_TOKEN"))
        )


class DummyScorer:
    """``ScoringActor`` and ``RewardServer``: scores say which actor gave them."""

    def __init__(self, number):
        self.number = number
        self.snapshot = None
        self.chunks = []
        self.told = []

    def start(self):
        pass

    def process_id(self):
        return os.getpid()

    def stage_anchor(self, promotion_id, weights):
        self.told.append(("stage_anchor", promotion_id, weights.version))

    def commit(self, promotion_id, version):
        self.told.append(("commit", promotion_id, version))

    def capture(self):
        self.told.append(("capture",))

    def write_anchor(self, folder, anchor_version):
        self.told.append(("write_anchor", anchor_version))

    def memory(self):
        return self.told

    def close(self):
        pass

    def score(self, sequences, models):
        sft = [np.array([sequence.response_ids[0], self.number], dtype=np.float32) for sequence in sequences]
        anchors = {"live": [np.ones(1)] * len(sequences), "staged": [np.full(1, 2.0)] * len(sequences)}
        return [(anchors | {"sft": sft})[model] for model in models]

    def load_snapshot(self, weights):
        self.snapshot = weights.version

    def pair_logprobs(self, weights, indices):
        self.chunks.append(len(indices))
        return np.stack([indices, np.full(len(indices), self.snapshot or 0)], axis=1).astype(np.float32)

    def history(self):
        return self.chunks


class DummyRewardServer:
    """``RewardServer``: a score is the response's first token plus, in a staged slot, a half."""

    def start(self):
        pass

    def score(self, sequences, slot):
        return np.array([s.response_ids[0] + 0.5 * (slot != "live") for s in sequences], dtype=np.float32)

    def stage(self, promotion_id, refit):
        return Calibration(mean=float(refit.reward_version), std=1.0)

    def commit(self, promotion_id, reward_version):
        pass


DEADLY, ENDLESS = -1, -2
"""Seeds of refits."""


class DummyRefitter:
    """``RewardRefitter`` that is done once the file ``until`` is there."""

    def __init__(self, until=None):
        self.until = until

    def start(self):
        pass

    def refit(self, request):
        if request.seed == DEADLY:
            os._exit(1)
        while request.seed == ENDLESS or not (self.until is None or self.until.exists()):
            time.sleep(0.01)
        return RefitReport(request.reward_version, Path(), 0.0, 1.0, 0.5)
