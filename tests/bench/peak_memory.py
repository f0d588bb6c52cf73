"""Peak memory of a command with all processes that it starts: python tests/bench/peak_memory.py COMMAND [ARG ...]

Sums the proportional set size (PSS: shared pages count once, split over who shares them) of the process tree every
two seconds; prints wall time and peak when the command is done, and exits with its status.
"""

import subprocess
import sys
import time

import psutil

INTERVAL_S = 2.0


def pss_bytes(process: psutil.Process) -> int:
    """PSS of a process; one that has ended counts nothing."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def tree_pss_bytes(root: psutil.Process) -> int:
    """PSS of a process and all its descendants."""
    return sum(pss_bytes(process) for process in [root, *root.children(recursive=True)])


def main(command: list[str]) -> int:
    started, peak = time.monotonic(), 0
    running = subprocess.Popen(command)
    tree = psutil.Process(running.pid)
    while running.poll() is None:
        try:
            peak = max(peak, tree_pss_bytes(tree))
        except psutil.NoSuchProcess:
            break
        time.sleep(INTERVAL_S)
    status = running.wait()
    print(f"wall {time.monotonic() - started:.0f} s, peak PSS of all processes {peak / 2**30:.2f} GiB, exit {status}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
