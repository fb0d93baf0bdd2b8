"""An actor of the pool that a test can hold, starve or break while it does a job.

Orders are files in a folder that both know: `hold-NAME`, `eat-NAME` and `break-NAME`, where a name
is a method, or the index of a candidate; the last two are obeyed once. What a worker does is
written down there, in `log`: the name and its process.
"""

import os
import time
from pathlib import Path

from prunevolve.search.pool.worker import Worker

FOLDER = "PRUNEVOLVE_TEST_ORDERS"
"""The variable of the environment that names the folder."""


class HeldWorker(Worker):
    def do(self, job, shared):
        name = str(job.candidate.index) if job.method == "evaluating" else job.method
        orders = Path(os.environ[FOLDER])
        with (orders / "log").open("a") as log:
            log.write(f"{name} {os.getpid()}\n")
        if _once(orders / f"eat-{name}"):
            _eat()
        if _once(orders / f"break-{name}"):
            self._evaluator = _BrokenDevice()
        while (orders / f"hold-{name}").exists():
            time.sleep(0.02)
        return super().do(job, shared)


class _BrokenDevice:
    """An evaluator whose GPU is of no use any more: a fault of CUDA stays with its process."""

    def __getattr__(self, method):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _once(order):
    found = order.exists()
    order.unlink(missing_ok=True)
    return found


def _eat():
    """Take memory until this process is ended for it; 10 GiB at most."""
    taken = []
    for _ in range(100):
        taken.append(b"x" * (100 << 20))
        time.sleep(0.05)
