"""Ray for the length of a run: a local cluster on loopback, or the cluster that RAY_ADDRESS names."""

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

import actors
import ocrm_ray
from actors.shared_memory import shared_folder
from ocrm_ray.errors import UserError, mistake

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOCAL_FOLDER = Path(f"/tmp/ray-{os.getuid()}")
"""Of a local cluster's sockets and logs: short, since socket paths have at most 107 characters, and the user's own."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Of a local cluster: sequences and log-probs pass through it, weights do not."""
_TOO_SLOW = "timed out during startup"
CONNECT_S = 10.0
"""For the cluster at RAY_ADDRESS to accept a connection."""


def log_folder() -> str:
    """Where the processes of the last run logged, for people to read."""
    folder = Path("session_latest") / "logs"
    return f"/tmp/ray/{folder} on the cluster's nodes" if "RAY_ADDRESS" in os.environ else str(LOCAL_FOLDER / folder)


@contextmanager
def ray_session(run: str, num_runs: int = 1) -> Iterator[Path]:
    """Start Ray, or connect to RAY_ADDRESS; on leaving, whatever the reason, shut down and remove shared memory.

    A local cluster has room for ``num_runs`` at once. Yields the session's folder in this node's shared memory. SIGTERM
    becomes KeyboardInterrupt, as Ctrl-C is. Raises UserError if no cluster is at RAY_ADDRESS, or it refuses. For the
    main thread.
    """
    on_sigterm, on_sigint = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    options = _options(os.environ.get("RAY_ADDRESS"), num_runs)
    with shared_folder(run) as folder:
        try:
            _initialise(namespace=f"ocrm-{run}", log_to_driver=_is_job(), **options)
            # Ray's own handler, set by init, exits from inside the event loop and then aborts now and again
            signal.signal(signal.SIGTERM, lambda signum, frame: signal.raise_signal(signal.SIGINT))
            if on_sigint is signal.SIG_IGN:  # as in a shell's job in the background: SIGTERM must still end it
                signal.signal(signal.SIGINT, signal.default_int_handler)
            yield folder
        finally:
            ray.shutdown()
            signal.signal(signal.SIGTERM, on_sigterm)
            signal.signal(signal.SIGINT, on_sigint)


def _initialise(**options: Any) -> None:
    """Ray's own log lines below errors are not shown. Ray gives its processes 30 s to start: on a busy machine more are
    needed, which is asked for by starting again."""
    for is_last in (False, False, True):
        try:
            ray.init(logging_level=logging.ERROR, **options)
            return
        except ConnectionError as error:
            do = "set RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token"
            address = os.environ["RAY_ADDRESS"]
            raise _address_error(address, "a refusal", "a cluster that lets this program in", do) from error
        except Exception as error:
            if is_last or _TOO_SLOW not in str(error):
                raise
            logger.warning("Ray was not ready within 30 s: starting it again")
            ray.shutdown()


@contextmanager
def connection(address: str) -> Iterator[None]:
    """To the cluster at HOST:PORT, or with ``auto`` to the one that this machine is a node of; nothing runs there."""
    if address != "auto":
        _require_listener(address)
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        do = "run this on a node of a running cluster, with its token in ~/.ray/auth_token if it has one"
        raise _address_error(address, f"no answer: {error}", "a running Ray cluster", do) from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """UserError unless ``address`` is HOST:PORT and something listens there: Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise _address_error(address, "another form", "HOST:PORT", "correct it; a job is submitted with ray job submit")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        do = "start the cluster, or unset RAY_ADDRESS to run on this machine"
        raise _address_error(address, f"no answer: {error}", "a running Ray cluster", do) from error


def _address_error(address: str, got: str, need: str, do: str) -> UserError:
    return mistake("RAY_ADDRESS", f"{address!r} ({got})", need, do)


def _is_job() -> bool:
    """Whether this is a submitted job: Ray has unpacked the working directory everywhere, and people read its log."""
    return RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ


def _options(address: str | None, num_runs: int) -> dict[str, Any]:
    """Of ``ray.init``: for the cluster at ``address``, or for a local one."""
    folders = [str(next(iter(package.__path__))) for package in (ocrm_ray, actors)]
    if address:
        _require_listener(address)
    if not address or address.startswith((LOOPBACK, "localhost")):
        # else Ray takes 127.0.0.1 for another address of the machine, and the ports of a local cluster listen on every
        # interface; on Linux there is no public switch
        ray_constants.ENABLE_RAY_CLUSTER = False
    if address:
        return {} if _is_job() else {"runtime_env": {"py_modules": folders}}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    search_path = dict.fromkeys([*map(os.path.dirname, folders), os.environ.get("PYTHONPATH")])
    return {
        "address": "local",
        "include_dashboard": False,
        "num_cpus": num_runs * (os.cpu_count() or 1),
        "object_store_memory": num_runs * OBJECT_STORE_BYTES,
        "_temp_dir": str(LOCAL_FOLDER),
        # a variable rather than sys.path: the processes that vLLM spawns import from it too
        "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, search_path))}},
    }
