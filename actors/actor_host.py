"""The process side of an actor: hosts that build a plain actor class in its own process and forward calls to it.

The spawning process never imports the class, so that the coordinator stays free of torch, vllm and deepspeed.
"""

import os
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.remote_actor import ActorSpec


class ActorHost:
    """Runs one actor with synchronous methods; its calls are answered one after the other, in order."""

    def __init__(self, spec: "ActorSpec", secrets: Mapping[str, str]) -> None:
        self._spec = spec
        self._secrets = secrets

    def __repr__(self) -> str:
        return self._spec.role

    def start(self) -> None:
        """Import and build the class ``module:name``, then call its ``start``.

        Not done by the constructor: Ray reports what a constructor raises as the death of the actor.
        """
        self._build().start()

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call ``method`` of the actor."""
        return getattr(self._actor, method)(*arguments)

    def _build(self) -> Any:
        os.environ.update(self._secrets)
        if self._spec.yields:
            yield_to_others()
        self._actor = pkgutil.resolve_name(self._spec.path)(*self._spec.arguments)
        return self._actor


def yield_to_others() -> None:
    """Put this process under SCHED_IDLE: it runs when nobody else wants the core, or for a few percent of it.

    Niceness is not enough: Ray's workers are all at nice 15. Threads that start later inherit it.
    """
    for thread in os.listdir("/proc/self/task"):
        os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))


class AsyncActorHost(ActorHost):
    """Runs one actor whose methods are coroutines; its calls are answered side by side on one event loop."""

    async def start(self) -> None:  # type: ignore[override]
        await self._build().start()

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return await getattr(self._actor, method)(*arguments)
