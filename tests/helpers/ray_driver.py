"""A process that opens the backend on Ray and keeps it until it reads a line; see test_on_ray.py.

It prints `begun`, then `up` with what its worker and it know, and at the end why it ended.
"""

import json
import os
import select
import signal
import sys

from prunevolve.search.pool.requests import Started
from ray_facts import Facts
from toy_setup import embedded_setup

from prunevolve.configs.schema import Ray
from prunevolve.search.pool.on_ray import ray_backend
from prunevolve.search.pool.pool import PoolError


def main():
    """Open the backend at the address that is the first argument."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    print("begun", flush=True)
    try:
        with ray_backend(embedded_setup(), Ray(address=sys.argv[1]), Facts) as backend:
            _serve(backend)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(3)
    except (PoolError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(2)


def _serve(backend):
    hired, started = [], []
    most = int(os.environ.get("MOST_WORKERS", "100"))
    while not started:
        hired += backend.hire(most - len(hired))
        started = [event for event in backend.events(0.2) if isinstance(event, Started)]
    facts, head = started[0].digests
    environment = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    found = {"room": len(hired), "head": head, "environment": environment, **json.loads(facts)}
    print("up " + json.dumps(found), flush=True)
    line = ""
    while not line:
        backend.events(0.1)
        line = sys.stdin.readline() if select.select([sys.stdin], [], [], 0)[0] else ""


def _stop(number, frame):
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt
