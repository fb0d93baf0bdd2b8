"""A driver below its guard that opens the backend on Ray and keeps it until it reads a line.

It prints `begun`, then `up` with what its worker and it know, and at the end why it ended.
"""

import json
import os
import select
import sys

from toy_setup import embedded_setup
from transformers.utils import logging

from prunevolve.command_line import Resumable, interruptible
from prunevolve.configs.schema import Ray
from prunevolve.search.pool import guard
from prunevolve.search.pool.cluster import connected
from prunevolve.search.pool.worker import Job


def main():
    print("begun", flush=True)
    guard.around(_drive)


def _drive():
    guard.tell("resume go on like this")
    logging.disable_progress_bar()
    try:
        with interruptible(), connected(Ray(address=sys.argv[1])) as head:
            # They import Ray, which reads the environment then.
            from ray_facts import Facts

            from prunevolve.search.pool.on_ray import RayBackend

            with RayBackend.opened(head, embedded_setup(), Facts) as backend:
                _serve(backend)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(3)
    except (Resumable, ValueError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(3)
    sys.exit(0)


def _serve(backend):
    backend.start(1)
    backend.give(1, Job("arrive"), {})
    while not (events := backend.events(0.2)):
        pass
    facts = {"driver": os.getpid(), "room": backend.room(), **events[0][1]}
    print("up " + json.dumps(facts), flush=True)
    line = ""
    while not line:
        backend.events(0.1)
        line = sys.stdin.readline() if select.select([sys.stdin], [], [], 0)[0] else ""
