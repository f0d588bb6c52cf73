"""One spawned actor: the host that builds a plain class in its own process, and what its pool sees of it.

Every call has a deadline, every failure names the actor and the call. The spawning process never imports the class, so
that the coordinator stays free of torch, vllm and deepspeed.
"""

import asyncio
import gc
import logging
import os
import pkgutil
import re
import socket
import sys
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.placement import Bundle
from ocrm_ray.errors import ActorDiedError, DeadlineError, RunError

logger = logging.getLogger(__name__)

FAREWELL_S = 20.0
"""For an actor to end what it has started."""
PROGRESS_S = 0.5
"""Between questions how far an actor is."""
_FORWARDED = ("HF_HOME", "HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR")
_SECRETS = ("HF_TOKEN",)
_COLOUR = re.compile(r"\x1b\[\d+m")


@dataclass(frozen=True)
class ActorSpec:
    """What to spawn: ``role`` names it in errors and logs, ``path`` is ``module:Class``.

    ``threads``: arithmetic threads of the process. ``asynchronous``: its methods are coroutines. ``concurrency``:
    calls that a synchronous one answers side by side. ``environment``: further variables, set before it starts.
    ``yields``: its process works only when no other wants the core (Linux). ``secrets``: names of variables that it
    gets from this process and that no log may show, beside the Hub's token. ``rank`` of ``num_ranks``: among those,
    neighbours in their pool, that form one process group.
    """

    role: str
    path: str
    arguments: tuple[Any, ...]
    threads: int
    asynchronous: bool = False
    concurrency: int = 1
    yields: bool = False
    secrets: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    rank: int = 0
    num_ranks: int = 1


def ranks_of(specs: Seq[ActorSpec]) -> list[ActorSpec]:
    """The same actors as ranks of one process group."""
    return [replace(spec, rank=rank, num_ranks=len(specs)) for rank, spec in enumerate(specs)]


def meeting_point() -> tuple[str, int]:
    """This node's address and a free port of it, where ranks may meet."""
    address = ray.util.get_node_ip_address()
    with socket.create_server((address, 0)) as free:
        return address, free.getsockname()[1]


def actor_environment(spec: ActorSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of the actor's process: its threads, its own ones, and those few of ``environ`` that it needs."""
    threads = str(spec.threads)
    # By default an arithmetic thread that waits for others spins, on the core that they need, and each thread that
    # allocates gets an arena of its own, which keeps what is freed: a gigabyte in a trainer.
    modest = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "MALLOC_ARENA_MAX": "1"}
    forwarded = {name: environ[name] for name in _FORWARDED if name in environ}
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **modest, **forwarded, **spec.environment}


def inner_environment(spec: ActorSpec, bundle: Bundle, environ: Mapping[str, str]) -> dict[str, str]:
    """What the process sets itself: a runtime environment would show secrets, and go on to all that the actor spawns.

    Without a part of a GPU in its ``bundle`` it sees none: Ray hides them only from who asks for some.
    """
    secrets = {name: environ[name] for name in (*_SECRETS, *spec.secrets) if name in environ}
    return secrets if bundle.get("GPU") else secrets | {"CUDA_VISIBLE_DEVICES": ""}


class ActorHost:
    """Runs one actor with synchronous methods; its calls are answered one after the other, in order."""

    def __init__(self, role: str, environment: Mapping[str, str]) -> None:
        """``environment``: variables that are set before an actor is imported."""
        self._role = role
        self._environment = environment
        self._actor: Any = None
        logging.basicConfig(format="%(message)s")
        for package in ("actors", "ocrm_ray"):
            logging.getLogger(package).setLevel(logging.INFO)

    def __repr__(self) -> str:
        return self._role

    def meeting_point(self) -> tuple[str, int]:
        """For the ranks of which this is the first."""
        return meeting_point()

    def start(self, spec: ActorSpec, meeting: tuple[str, int] | None = None) -> None:
        """Import and build the class ``module:name``, then call its ``start``; ``meeting``: where its ranks meet.

        Not done by the constructor: Ray reports what a constructor raises as the death of the actor.
        """
        if meeting is not None:
            values = spec.rank, spec.num_ranks, 0, *meeting
            names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
            os.environ.update(zip(names, map(str, values), strict=True))
        self._build(spec).start()
        logger.info("%s is ready: rank %d of %d, process %d", self._role, spec.rank, spec.num_ranks, os.getpid())

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call ``method`` of the actor."""
        return getattr(self._actor, method)(*arguments)

    def rest(self) -> None:
        """Free all but the process and what it has imported, until another actor is started here."""
        self.close()
        self._actor = None
        gc.collect()
        if "torch" in sys.modules:  # not imported here
            sys.modules["torch"].cuda.empty_cache()

    def close(self) -> None:
        """Let the actor, if there is one, end what it has started."""
        if hasattr(self._actor, "close"):
            self._actor.close()

    def _build(self, spec: ActorSpec) -> Any:
        os.environ.update(self._environment)
        if spec.yields:
            yield_to_others()
        self._actor = pkgutil.resolve_name(spec.path)(*spec.arguments)
        return self._actor


def yield_to_others() -> None:
    """Put this process under SCHED_IDLE: it runs when nobody else wants the core, or for a few percent of it.

    Niceness is not enough: Ray's workers are all at nice 15. Threads that start later inherit it.
    """
    for thread in os.listdir("/proc/self/task"):
        os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))


class AsyncActorHost(ActorHost):
    """Runs one actor whose methods are coroutines; its calls are answered side by side on one event loop.

    An actor that rests stays, and is ``renewed`` by the arguments of the next one, if it can be.
    """

    async def start(self, spec: ActorSpec, meeting: None = None) -> None:  # type: ignore[override]
        if self._actor is not None and await self._actor.renew(*spec.arguments):
            return
        await self.close()
        await self._build(spec).start()

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return await getattr(self._actor, method)(*arguments)

    async def rest(self) -> None:  # type: ignore[override]
        await self._actor.rest()

    async def close(self) -> None:  # type: ignore[override]
        if self._actor is not None:
            await self._actor.close()


@dataclass(frozen=True)
class Place:
    """Of an actor: a bundle of its pool's placement group."""

    group: PlacementGroup
    bundle: int


class RemoteActor:
    """A spawned actor. Its handle never leaves this module."""

    def __init__(self, spec: ActorSpec, place: Place, kept: "RemoteActor | None" = None) -> None:
        """Start its process, or go on with that of ``kept``, which rests; ``start`` waits for it."""
        self.role = spec.role
        self.rank, self.num_ranks = spec.rank, spec.num_ranks
        self.num_replaced = 0
        """Processes before this one."""
        self._spec = spec
        self._place = place
        self._is_inherited = kept is not None
        self._handle: Any = _spawn(spec, place) if kept is None else kept._handle
        self._unanswered: set[Any] = set()

    async def meeting_point(self, deadline_s: float) -> tuple[str, int]:
        """As the host says."""
        found: tuple[str, int] = await self._answer(self._handle.meeting_point.remote(), "meeting_point", deadline_s)
        return found

    async def start(self, deadline_s: float, meeting: tuple[str, int] | None = None) -> None:
        """Build the actor in its process and wait until it is ready; a process that died at rest is replaced."""
        try:
            await self._answer(self._handle.start.remote(self._spec, meeting), "start", deadline_s)
        except ActorDiedError:
            if not self._is_inherited:
                raise
            self.kill()
            self._is_inherited, self._handle = False, _spawn(self._spec, self._place)
            await self.start(deadline_s, meeting)

    async def call(self, method: str, *arguments: Any, deadline_s: float | None) -> Any:
        """Answer of ``method(*arguments)``; ``deadline_s`` None only where the caller keeps the deadline itself.

        Raises what the method raised (with the remote traceback as a note), DeadlineError, or ActorDiedError.
        """
        remote = self._handle.call.options(name=f"{self.role}.{method}").remote
        return await self._answer(remote(method, arguments), method, deadline_s)

    async def watch(self, method: str, *arguments: Any, tell: Callable[[Any], None], deadline_s: float) -> Any:
        """As ``call``, however long it takes; meanwhile ``tell`` gets what ``progress`` answers within its deadline."""
        running = asyncio.ensure_future(self.call(method, *arguments, deadline_s=None))
        try:
            while not (await asyncio.wait({running}, timeout=PROGRESS_S))[0]:
                tell(await self.call("progress", deadline_s=deadline_s))
            return await running
        finally:
            running.cancel()

    def replace(self) -> None:
        """Another process in the same place, still to be started; the old one, if it is alive, is ended."""
        self.kill()
        self.num_replaced += 1
        self._handle = _spawn(self._spec, self._place)

    def is_of_kind(self, spec: ActorSpec) -> bool:
        """Whether the process of this actor could be that of ``spec``: only what it is built with may differ."""
        return replace(self._spec, arguments=()) == replace(spec, arguments=())

    async def rest(self) -> bool:
        """Free what the actor holds; whether its process can then be another one's.

        Not while it answers a call, for which it has 20 s, nor as a rank of several, who met once.
        """
        if self.num_ranks > 1 or (self._unanswered and (await asyncio.wait(self._unanswered, timeout=FAREWELL_S))[1]):
            return False
        return await self._part("rest")

    async def close(self) -> None:
        """Let the actor end what it has started, for 20 s at most; its process is still to be killed."""
        await self._part("close")

    async def end(self) -> None:
        """End the process, with 20 s for the actor's farewell."""
        try:
            await self.close()
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        ray.kill(self._handle)

    async def _part(self, method: str) -> bool:
        """Ask the host; whether it did. An actor that fails at its end is logged: it must not hide why it ends."""
        try:
            await self._answer(getattr(self._handle, method).remote(), method, FAREWELL_S)
        except Exception as error:
            logger.warning("actor %s did not end by itself: %s", self.role, error)
            return False
        return True

    async def _answer(self, answer: Any, method: str, deadline_s: float | None) -> Any:
        answered = asyncio.ensure_future(answer)
        if deadline_s is not None:
            self._unanswered.add(answered)
            answered.add_done_callback(self._unanswered.discard)
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                return await asyncio.shield(answered)
        except RayTaskError as error:
            raise _own_error(error, f"{self.role}.{method}") from None
        except (RayActorError, ObjectLostError) as error:  # lost: with the process that had put it there
            raise ActorDiedError(f"actor {self.role} died during {method}: {error}") from error
        except TimeoutError as error:
            assert deadline.expired(), "Ray wraps a TimeoutError of the actor's own in RayTaskError"
            raise DeadlineError(f"actor {self.role} did not answer {method} within {deadline_s:g} s") from error


def _own_error(error: RayTaskError, call: str) -> BaseException:
    """What the actor itself raised; its traceback there becomes a note."""
    traceback = _COLOUR.sub("", str(error))
    if isinstance(error.cause, ObjectLostError):
        return ActorDiedError(f"{call} needs what a process that died had put into Ray's store: {error.cause}")
    if not isinstance(error.cause, Exception) or isinstance(error.cause, RayError):
        return RunError(f"{call} failed with an error that cannot be sent: {traceback}")
    error.cause.add_note(f"raised in {call}:\n{traceback}")
    return error.cause


def _spawn(spec: ActorSpec, place: Place) -> Any:
    host = AsyncActorHost if spec.asynchronous else ActorHost
    resources = place.group.bundle_specs[place.bundle]
    return (
        ray.remote(host)
        .options(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0.0),
            **({} if spec.asynchronous else {"max_concurrency": spec.concurrency}),
            scheduling_strategy=PlacementGroupSchedulingStrategy(place.group, place.bundle),
            runtime_env={"env_vars": actor_environment(spec, os.environ)},
        )
        .remote(spec.role, inner_environment(spec, resources, os.environ))
    )
