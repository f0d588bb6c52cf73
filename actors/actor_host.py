"""The process side of an actor: hosts that build a plain actor class in its own process and forward calls to it.

The spawning process never imports the class, so that the coordinator stays free of torch, vllm and deepspeed.
"""

import importlib
import os
from collections.abc import Mapping
from typing import Any


class ActorHost:
    """Runs one actor with synchronous methods; its calls are answered one after the other, in order."""

    def __init__(self, role: str, path: str, arguments: tuple[Any, ...], secrets: Mapping[str, str]) -> None:
        self._role = role
        self._path = path
        self._arguments = arguments
        self._secrets = secrets
        self._actor: Any = None

    def __repr__(self) -> str:
        return self._role

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
        module, _, name = self._path.partition(":")
        self._actor = getattr(importlib.import_module(module), name)(*self._arguments)
        return self._actor


class AsyncActorHost(ActorHost):
    """Runs one actor whose methods are coroutines; its calls are answered side by side on one event loop."""

    async def start(self) -> None:  # type: ignore[override]
        await self._build().start()

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return await getattr(self._actor, method)(*arguments)
