"""Rollouts between generation and training: pacing, bounded staleness, stragglers.

Let B be the prompts a step, S the staleness bound, p the published version. Producers may have issued at most
(p + S + 1) * B prompts in all. Of these v * B are trained on when the trainer is at version v, so at most B that
were issued at or before version v - S can be left: they fit into the next batch, and nothing is ever thrown away.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from ocrm_ray.records import Rollout


@dataclass(eq=False)
class RolloutBuffer:
    """Slots of one run's rollouts: issued -> scored -> taken.

    Producer: ``await wait_for_slot()``, ``issue(id)``, then ``put(id, rollout)`` when it is scored.
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
        self._issue_versions: dict[str, int] = {}
        self._ready: dict[str, Rollout] = {}
        self._changed = asyncio.Condition()

    def ready(self) -> dict[str, Rollout]:
        """Scored rollouts that wait for training, by request id."""
        return dict(self._ready)

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
        assert request_id not in self._issue_versions
        self._issue_versions[request_id] = self.published_version
        self.num_issued += 1

    async def put(self, request_id: str, rollout: Rollout) -> None:
        """Hand in a scored rollout."""
        assert request_id in self._issue_versions, "never issued"
        assert request_id not in self._ready, "scored twice"
        assert rollout.scores is not None, "handed in without scores"
        self._ready[request_id] = rollout
        self.num_finished += 1
        async with self._changed:
            self._changed.notify_all()

    async def publish(self, version: int) -> None:
        """The engines have ``version``: producers may go further."""
        assert version >= self.published_version
        self.published_version = version
        async with self._changed:
            self._changed.notify_all()

    async def take(self, version: int) -> dict[str, Rollout]:
        """The batch for the update of ``version``: what would be too old next time first, then by completion."""
        async with self._changed:
            loop, late_since = asyncio.get_running_loop(), None
            while not self._is_complete(version):
                if late_since is None and len(self._ready) >= self.batch_size:
                    late_since = loop.time()
                await self._changed.wait()
            self.straggler_wait_s += loop.time() - late_since if late_since is not None else 0.0
        due = self._due(version)
        assert len(due) <= self.batch_size, "more rollouts at the staleness bound than a batch holds"
        first = sorted(self._ready, key=lambda key: key not in due)[: self.batch_size]
        batch = {key: self._ready.pop(key) for key in first}
        for request_id, rollout in batch.items():
            del self._issue_versions[request_id]
            assert rollout.first_version >= version - self.max_staleness, (
                f"rollout {request_id} began at version {rollout.first_version}, "
                f"older than {version} - {self.max_staleness}"
            )
        return batch

    def _due(self, version: int) -> list[str]:
        """What would be older than the bound at the update after this one."""
        oldest_next = version + 1 - self.max_staleness
        return [key for key, issue_version in self._issue_versions.items() if issue_version < oldest_next]

    def _is_complete(self, version: int) -> bool:
        """Once enough others are ready, what is late at the bound starts again, if the run is configured so."""
        if len(self._ready) < self.batch_size:
            return False
        late = [key for key in self._due(version) if key not in self._ready]
        reissued = [key for key in late if self.reissue is not None and self.reissue(key)]
        self._issue_versions |= dict.fromkeys(reissued, self.published_version)
        self.num_reissued += len(reissued)
        return all(key in self._ready for key in self._due(version))
