"""Real ranks for tests: processes that join one gloo group, and then run what they are given, all at once."""

import contextlib
import multiprocessing
import os
import socket
import traceback
from dataclasses import dataclass

TIMEOUT_S = 300.0


@dataclass
class Ranks:
    """``run(function, *arguments)``: what each rank's call of it returns; ``function`` is found by its name."""

    connections: list

    def run(self, function, *arguments):
        for connection in self.connections:
            connection.send((function, arguments))
        answers = []
        for connection in self.connections:
            assert connection.poll(TIMEOUT_S), f"{function.__name__}: a rank gave no answer"
            answers.append(connection.recv())
        if failures := [trace for _, trace in answers if trace]:
            raise AssertionError("\n".join(failures))
        return [answer for answer, _ in answers]


@contextlib.contextmanager
def rank_processes(num_ranks):
    """``Ranks``, ended on leaving."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(num_ranks)]
    processes = [
        spawn.Process(target=_serve, args=(theirs, rank, num_ranks, port), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        yield Ranks([ours for ours, _ in pipes])
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(connection, rank, num_ranks, port):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from actors.training_engine import join_process_group, start_process

    start_process(1, seed=0)
    join_process_group(TIMEOUT_S)
    while True:
        function, arguments = connection.recv()
        try:
            connection.send((function(*arguments), ""))
        except Exception:
            connection.send((None, traceback.format_exc()))
