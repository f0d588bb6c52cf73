"""The coordinator's process: runs the stages and RL over Ray pools; the driver only starts it and shows progress."""

import asyncio
from pathlib import Path

from actors.ray_cluster import RayCluster
from ocrm_ray.config import RunConfig
from ocrm_ray.progress import ProgressState
from ocrm_ray.reinforcement import run_to_the_end


class RunActor:
    """One run, from its configuration to its report."""

    def __init__(self, config: RunConfig, shared_memory: Path) -> None:
        """``shared_memory``: the run's folder for weights on their way."""
        self._config = config
        self._cluster = RayCluster(config, shared_memory)
        self._state = ProgressState(stage="start")
        self._running: asyncio.Task[dict[str, object]] | None = None
        self._ended = asyncio.Event()

    async def start(self) -> None:
        """Nothing to load."""

    async def run(self) -> dict[str, object]:
        """The whole run; returns its summary. Whatever happens, the pools are ended."""
        self._running = asyncio.create_task(run_to_the_end(self._config, self._cluster, self._show))
        try:
            return await self._running
        finally:
            await self._cluster.close()
            self._ended.set()

    async def stop(self) -> None:
        """End a run that goes on: engines that are only killed leave shared memory behind."""
        if self._running is not None:
            self._running.cancel()
            await self._ended.wait()

    async def progress(self) -> ProgressState:
        """Where the run is now."""
        return self._state

    def _show(self, state: ProgressState) -> None:
        self._state = state
