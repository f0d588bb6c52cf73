"""Rollouts between generation and training: pacing, bounded staleness, stragglers.

Let B be the prompts a step, S the staleness bound, p the published version. A prompt issued at version i is due at
version i + S at the latest. Producers may have issued at most (p + S + 1) * B prompts in all, so at most
(d + 1 - v) * B of those left at version v are due by version d: each can have its place in a batch in time. A batch
is complete only if it keeps that so; then nothing is ever too old, and nothing is thrown away. Training may thus wait
for a straggler before that is due: newer rollouts in its place would leave more at the bound than one batch holds.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ocrm_ray.records import Rollout


@dataclass(eq=False)
class RolloutBuffer:
    """Slots of one run's rollouts: issued -> scored -> taken.

    Producer: ``await wait_for_slot()``, ``issue(id)``, then ``put({id: rollout})`` when it is scored.
    Trainer: ``batch = await take(version)``, then ``publish(version + 1)`` once the engines have the new weights.

    ``num_total``: prompts that the whole run uses. ``reissue``: starts a late prompt again and says whether it could
    (not where its samples are there and only their scores are missing); None: training waits.
    """

    batch_size: int
    max_staleness: int
    num_total: int
    reissue: Callable[[str], bool] | None
    published_version: int = 0
    num_issued: int = 0
    num_finished: int = 0
    num_reissued: int = 0
    straggler_wait_s: float = 0.0

    def __post_init__(self) -> None:
        self._issued_at: dict[str, int] = {}
        self._ready: dict[str, Rollout] = {}
        self._changed = asyncio.Condition()

    def ready(self) -> dict[str, Rollout]:
        """Scored rollouts that wait for training, by request id."""
        return dict(self._ready)

    def waiting(self) -> tuple[str, ...]:
        """Every prompt that was issued and is not taken, by request id."""
        return tuple(self._issued_at)

    def _num_allowed(self) -> int:
        return min((self.published_version + self.max_staleness + 1) * self.batch_size, self.num_total)

    async def wait_for_slot(self) -> bool:
        """Wait until another prompt may be issued; False once the run has issued all it needs."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self.num_issued < self._num_allowed() or self.num_issued >= self.num_total
            )
        return self.num_issued < self.num_total

    def issue(self, request_id: str) -> None:
        """Take a slot for a prompt that goes to the engines now."""
        assert self.num_issued < self._num_allowed(), "issued beyond the staleness bound"
        assert request_id not in self._issued_at
        self._issued_at[request_id] = self.published_version
        self.num_issued += 1

    async def put(self, rollouts: Mapping[str, Rollout]) -> None:
        """Hand in scored rollouts, all of them at once."""
        for request_id, rollout in rollouts.items():
            assert request_id in self._issued_at, "never issued"
            assert request_id not in self._ready, "scored twice"
            assert rollout.scores is not None, "handed in without scores"
        self._ready |= rollouts
        self.num_finished += len(rollouts)
        async with self._changed:
            self._changed.notify_all()

    async def publish(self, version: int) -> None:
        """The engines have ``version``: producers may go further."""
        assert version >= self.published_version
        self.published_version = version
        async with self._changed:
            self._changed.notify_all()

    async def take(self, version: int) -> dict[str, Rollout]:
        """The batch for the update of ``version``: what is due first, then by completion."""
        async with self._changed:
            loop, late_since = asyncio.get_running_loop(), None
            while (first := self._complete_batch(version)) is None:
                if late_since is None and len(self._ready) >= self.batch_size:
                    late_since = loop.time()
                await self._changed.wait()
            self.straggler_wait_s += loop.time() - late_since if late_since is not None else 0.0
        batch = {key: self._ready.pop(key) for key in first}
        for request_id, rollout in batch.items():
            del self._issued_at[request_id]
            assert rollout.first_version >= version - self.max_staleness, (
                f"rollout {request_id} began at version {rollout.first_version}, "
                f"older than {version} - {self.max_staleness}"
            )
        return batch

    def _complete_batch(self, version: int) -> list[str] | None:
        """What is ready and due first, if training on it leaves nothing late; else None. What is late starts again
        where the run is configured so."""
        if len(self._ready) < self.batch_size:
            return None
        first = sorted(self._ready, key=self._issued_at.__getitem__)[: self.batch_size]
        for request_id in (late := self._late(version, set(first))):
            assert request_id not in self._ready, "more rollouts at the staleness bound than batches hold"
            if self.reissue is not None and self.reissue(request_id):
                self._issued_at[request_id] = self.published_version
                self.num_reissued += 1
        return None if late and self._late(version, set(first)) else first

    def _late(self, version: int, batch: set[str]) -> list[str]:
        """Which prompts have no place in a batch in time, once ``batch`` has been trained on at ``version``."""
        left = [key for key in sorted(self._issued_at, key=self._issued_at.__getitem__) if key not in batch]
        steps_left = (self._issued_at[key] + self.max_staleness - version for key in left)
        return [left[place] for place, steps in enumerate(steps_left) if place >= steps * self.batch_size]
