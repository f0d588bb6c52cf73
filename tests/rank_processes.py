"""Real ranks for tests: processes that join one gloo group, and then run what they are given, all at once."""

import contextlib
import multiprocessing
import os
import socket
import traceback
from dataclasses import dataclass
from multiprocessing.connection import wait

TIMEOUT_S = 300.0


@dataclass
class Ranks:
    """``run(function, *arguments)``: what each rank's call of it returns; ``function`` is found by its name."""

    connections: list
    failure: str = ""

    def run(self, function, *arguments):
        assert not self.failure, f"out of step since {self.failure}"
        for connection in self.connections:
            connection.send((function, arguments))
        answers = {}
        while len(answers) < len(self.connections) and not self.failure:
            ready = wait(set(self.connections) - answers.keys(), TIMEOUT_S)
            answers |= {connection: connection.recv() for connection in ready}
            self.failure = "" if ready else f"{function.__name__}: a rank gave no answer"
            # whoever fails alone leaves the others waiting
            self.failure += "".join(trace for _, trace in answers.values())
        assert not self.failure, self.failure
        return [answers[connection][0] for connection in self.connections]


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
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()  # so that a rank that dies is noticed at once
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
    import torch

    from actors.training_engine import join_process_group

    torch.set_num_threads(1)
    torch.manual_seed(0)
    join_process_group(TIMEOUT_S)
    while True:
        function, arguments = connection.recv()
        try:
            connection.send((function(*arguments), ""))
        except Exception:
            connection.send((None, traceback.format_exc()))
