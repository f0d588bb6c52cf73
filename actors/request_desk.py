"""The requests of one engine's actor: in by ``submit``, out by ``collect``.

Many at a time, because a Ray call for each prompt costs more than the sampling of a small model.
"""

import asyncio

from ocrm_ray.errors import RunError
from ocrm_ray.records import GenerationRequest, Sample


class RequestDesk:
    """An engine's actor adds ``sample``, which does the work. For one event loop."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[None]] = {}
        self._finished: asyncio.Queue[tuple[str, tuple[Sample, ...] | Exception] | None] = asyncio.Queue()

    async def sample(self, request: GenerationRequest) -> tuple[Sample, ...]:
        raise NotImplementedError

    async def submit(self, requests: list[GenerationRequest]) -> None:
        """Begin to sample; ``collect`` returns the results. A request_id may be used again after its result."""
        for request in requests:
            assert request.request_id not in self._running, f"request {request.request_id} is already running"
            self._running[request.request_id] = asyncio.create_task(self._answer(request))

    async def collect(self) -> list[tuple[str, tuple[Sample, ...] | Exception]]:
        """Wait until at least one submitted request is finished; (request_id, samples or its error) of all that are.

        None of them, once the desk is cleared.
        """
        results = [await self._finished.get()]
        while not self._finished.empty():
            results.append(self._finished.get_nowait())
        return [result for result in results if result is not None]

    async def abort(self, request_ids: list[str]) -> None:
        """Drop submitted requests; ``collect`` never returns them. One that is already finished stays so."""
        tasks = [self._running.pop(request_id) for request_id in request_ids if request_id in self._running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def clear(self) -> None:
        """Drop all that was submitted, and what is finished."""
        await self.abort(list(self._running))
        self._finished.put_nowait(None)  # to whoever waits in ``collect``
        self._finished = asyncio.Queue()

    async def _answer(self, request: GenerationRequest) -> None:
        try:
            result: tuple[Sample, ...] | Exception = await self.sample(request)
        except Exception as error:
            # an answer must always come; vLLM's own errors do not survive pickling
            result = error if isinstance(error, RunError) else RunError(f"request {request.request_id}: {error!r}")
        finally:
            # after an abort the entry is gone, or is that of a new request of the same id
            if self._running.get(request.request_id) is asyncio.current_task():
                del self._running[request.request_id]
        self._finished.put_nowait((request.request_id, result))
