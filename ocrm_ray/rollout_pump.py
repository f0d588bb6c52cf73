"""The two pumps between prompts and training: one issues prompts to the engines, one scores what they finish."""

import asyncio
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ocrm_ray.checkpoints import RunState
from ocrm_ray.config import RunConfig
from ocrm_ray.pools import GenerationPool
from ocrm_ray.prompts import ShuffledEpochs
from ocrm_ray.records import GenerationRequest, Rollout
from ocrm_ray.rollout_buffer import RolloutBuffer
from ocrm_ray.rollout_scoring import RolloutScorer

ROLLOUT = "rollout-"
"""Before the number of a rollout: its request's name. The same number is the same prompt with the same seeds."""


def rollout_numbers(slot_ids: Iterable[str]) -> tuple[int, ...]:
    """Of slots of the buffer, in order."""
    return tuple(sorted(map(_number, slot_ids)))


@dataclass(slots=True)
class Attempt:
    """The latest request for a prompt's rollout."""

    request: GenerationRequest
    number: int
    task: "asyncio.Task[None]"


@dataclass(eq=False)
class RolloutPump:
    """``issue`` waits for a free slot and is unblocked by a publish; ``score`` waits for finished rollouts.

    Neither ever waits for a correction. ``pause`` and ``resume`` serve the blocking schedule alone.
    """

    config: RunConfig
    generation: GenerationPool
    scorer: RolloutScorer
    prompts: ShuffledEpochs
    saved: RunState | None
    """Where a resumed run goes on."""
    incarnation: int

    def __post_init__(self) -> None:
        settings, saved = self.config.rollout, self.saved
        self.settings = settings
        version = saved.step if saved else 0
        self.buffer = RolloutBuffer(
            batch_size=settings.prompts_per_step,
            max_staleness=settings.max_staleness,
            num_total=settings.prompts_per_step * self.config.policy.num_updates,
            reissue=self._reissue if settings.straggler == "reissue" else None,
            published_version=version,
            num_issued=version * settings.prompts_per_step,
        )
        self.num_issued = saved.num_issued if saved else 0
        self._numbers = itertools.chain(saved.outstanding if saved else (), itertools.count(self.num_issued))
        self._attempts: dict[str, Attempt] = {}
        self._finished: asyncio.Queue[tuple[str, Rollout]] = asyncio.Queue()
        self._collecting = asyncio.Lock()
        self._may_issue = asyncio.Event()
        self._may_issue.set()
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def outstanding(self) -> tuple[int, ...]:
        """Numbers of the rollouts that were asked for and are not with the trainer."""
        return rollout_numbers(self.buffer.waiting())

    @property
    def requests(self) -> "list[asyncio.Task[None]]":
        """Requests that the engines work on."""
        return [attempt.task for attempt in self._attempts.values()]

    def pause(self) -> None:
        """Issue nothing until ``resume``."""
        self._may_issue.clear()

    def resume(self) -> None:
        self._may_issue.set()

    async def issue(self, tasks: asyncio.TaskGroup) -> None:
        """Issue every prompt of the run, as slots fall free."""
        self._tasks = tasks
        while await self.buffer.wait_for_slot():
            await self._may_issue.wait()
            number = next(self._numbers)
            self.num_issued = max(self.num_issued, number + 1)
            slot_id = f"{ROLLOUT}{number}"
            self.buffer.issue(slot_id)
            request = GenerationRequest(
                request_id=slot_id,
                prompt=self.prompts[number],
                num_samples=self.settings.samples_per_prompt,
                max_new_tokens=self.settings.max_new_tokens,
                temperature=self.settings.temperature,
                seed=(self.config.seed * 1_000_003 + number * self.settings.samples_per_prompt) % 2**31,
                top_p=self.settings.top_p,
                top_k=self.settings.top_k,
            )
            self._send(slot_id, request, attempt=0)

    async def score(self) -> None:
        """Score what is finished, together but no more than a step's worth, and hand it to the trainer.

        Where the run is deterministic no less either, in order of number: scores depend on what is scored together.
        """
        most = self.settings.prompts_per_step
        least = most if self.config.deterministic else 1
        while True:
            async with self._collecting:
                finished = dict([await self._finished.get()])
                while len(finished) < most and (len(finished) < least or not self._finished.empty()):
                    finished |= [await self._finished.get()]
            in_order = {slot_id: finished[slot_id] for slot_id in sorted(finished, key=_number)}
            await self.buffer.put(await self.scorer.score(in_order))

    def _send(self, slot_id: str, request: GenerationRequest, attempt: int) -> None:
        assert self._tasks is not None
        request = replace(request, request_id=f"{slot_id}-{attempt}")
        self._attempts[slot_id] = Attempt(request, attempt, self._tasks.create_task(self._generate(slot_id, request)))

    async def _generate(self, slot_id: str, request: GenerationRequest) -> None:
        samples = await self.generation.generate(request)
        del self._attempts[slot_id]
        self._finished.put_nowait((slot_id, Rollout(request.prompt, samples, self.incarnation)))

    def _reissue(self, slot_id: str) -> bool:
        """Abort a late request and issue its prompt again; False if its samples are there already."""
        late = self._attempts.get(slot_id)
        if late is None:
            return False
        assert self._tasks is not None
        late.task.cancel()
        self._tasks.create_task(self.generation.abort(late.request.request_id))
        self._send(slot_id, late.request, late.number + 1)
        return True


def _number(slot_id: str) -> int:
    return int(slot_id.removeprefix(ROLLOUT))
