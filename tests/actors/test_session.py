import os
import signal
import subprocess
import sys

import psutil
import pytest

from actors.session import connection, ray_session
from ocrm_ray.errors import UserError

HANGING_RUN = """
import asyncio
from actors.groups import RayPolicyPool
from actors.remote_actor import ActorSpec
from actors.session import connection, ray_session
from dummy_actors import HANG
from ocrm_ray.config import Deadlines

async def hang():
    spec = ActorSpec("policy-0", "dummy_actors:DummyPolicy", (0,), 1)
    pool = await RayPolicyPool.start([spec], [{"CPU": 0.1}], Deadlines())
    print("hangs", flush=True)
    await pool.update([HANG])

with ray_session("test") as shared_memory:
    print(shared_memory, flush=True)
    asyncio.run(hang())
"""


@pytest.mark.real
def test_a_terminated_run_leaves_no_process_and_no_shared_memory():
    run = subprocess.Popen(
        [sys.executable, "-c", HANGING_RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # as a shell starts a job in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        folder = run.stdout.readline().strip()
        assert run.stdout.readline() == "hangs\n"
        assert os.path.isdir(folder)
        processes = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert processes
    assert psutil.wait_procs(processes, timeout=20)[1] == []
    assert not os.path.exists(folder)
    assert errors.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"got '127\.0\.0\.1:1' \(no answer: .*\), need a running Ray cluster"),
        ("http://127.0.0.1:8265", "got .*, need HOST:PORT"),
        ("auto", "got .*, need HOST:PORT"),
    ],
)
def test_a_ray_address_without_a_cluster_is_the_users_error(monkeypatch, address, message):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=message), ray_session("test"):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:8265"])
def test_an_address_to_check_without_a_cluster_is_the_users_error(address):
    with pytest.raises(UserError, match=r"RAY_ADDRESS: got .*, need"), connection(address):
        pass


@pytest.mark.parametrize(
    ("failures", "num_starts"),
    [
        (["The current node timed out during startup. This could happen"] * 2, 3),
        (["The current node timed out during startup. This could happen"] * 3, 3),
        (["no space left"], 1),
    ],
)
def test_a_ray_that_starts_too_slowly_is_started_again_twice_and_no_other_failure_is(monkeypatch, failures, num_starts):
    asked = []

    def init(**options):
        asked.append(options)
        if len(asked) <= len(failures):
            raise Exception(failures[len(asked) - 1])

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("actors.session.ray.init", init)
    monkeypatch.setattr("actors.session.ray.shutdown", lambda: None)
    if len(failures) < num_starts:
        with ray_session("test"):
            pass
    else:
        with pytest.raises(Exception, match=failures[-1][:20]), ray_session("test"):
            pass
    assert len(asked) == num_starts
    assert all(options == asked[0] for options in asked)
