"""An actor of the pool that a test can hold, kill or starve while it does a call.

Orders are files in a folder that both know: `hold-NAME`, `kill-NAME` and `eat-NAME`, where a name
is a method, or the index of a candidate. What a worker does is written down there, in `log`: the
name, its process, and the MiB that it has for itself.
"""

import os
import signal
import time
from pathlib import Path

import psutil

from search.pool.on_ray import _Worker
from search.population import Candidate

FOLDER = "PRUNEVOLVE_TEST_ORDERS"
"""The variable of the environment that names the folder."""


class HeldWorker(_Worker):
    """Does as it is ordered before each call."""

    def start(self, *arguments):
        """Write down what the libraries take, then load the models."""
        _log("start")
        return super().start(*arguments)

    def do(self, method, *arguments):
        """Obey, then do the call."""
        first = arguments[0] if arguments else None
        name = str(first.index) if isinstance(first, Candidate) else method
        orders = _log(name)
        if (orders / f"kill-{name}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (orders / f"eat-{name}").exists():
            _eat()
        while (orders / f"hold-{name}").exists():
            time.sleep(0.02)
        return super().do(method, *arguments)


def _log(name):
    orders = Path(os.environ[FOLDER])
    own = psutil.Process().memory_full_info().uss >> 20
    with (orders / "log").open("a") as log:
        log.write(f"{name} {os.getpid()} {own}\n")
    return orders


def _eat():
    """Take memory until this process is ended for it; 8 GiB at most."""
    taken = []
    for _ in range(80):
        taken.append(bytearray(os.urandom(1 << 20) * 100))
        time.sleep(0.05)
