"""The process that is connected to Ray for a driver, and the workers, which are Ray's actors.

It starts a local Ray or joins a cluster, does what the driver's messages say, and reports. One
thread receives: once the driver has closed the connection, or is gone, it ends this process, and
with it a local Ray. Another thread calls Ray, which may block it.

A worker is an `Evaluator` built from plain values. Large data goes through the object store, which
all workers on a node read without a copy: windows, statistics, and weights if they are sent.
"""

import hashlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import ray
from ray.autoscaler.sdk import request_resources
from torch import Tensor

import search
from configs.schema import Ray
from pruning.models import load_model
from search.fitness import Evaluator, Setup
from search.pool.on_ray import (
    FOLDERS,
    LOCAL,
    Array,
    Arrays,
    Dismiss,
    Give,
    Hire,
    Part,
    Prepare,
    Room,
    Stored,
    clear_killed,
    holds,
    kill_session,
    to_arrays,
    to_tensors,
)
from search.pool.requests import (
    PACKAGES,
    Ended,
    Fault,
    Reply,
    Request,
    Started,
    Timing,
    UseStatistics,
    attempt,
    perform,
)
from search.resident import Subject, Weights

_CONNECT_SECONDS, _END_SECONDS, _LOOK_SECONDS = 30, 4, 1.0


class Worker:
    """An evaluator in an actor; it returns only plain values and numpy arrays."""

    def start(
        self, setup: Setup, windows: Sequence[Arrays], code: str, *shipped: Any
    ) -> tuple[tuple[str, ...], float] | Fault:
        """Load the models; return their digests, and the seconds of the dense models' windows.

        Args:
            setup: Without its windows.
            windows: Those windows.
            code: Digest of the driver's source.
            shipped: Each model's config and tensors, alternating; empty if workers load models.
        """
        return attempt(lambda: self._start(setup, windows, code, shipped))

    def do(
        self, request: Request[Any], statistics: Mapping[str, Array] | None = None
    ) -> tuple[object, Timing]:
        """Do a request, as `perform`, with statistics from the object store."""
        if isinstance(request, UseStatistics) and statistics is not None:
            request = replace(request, tensors=_without_warnings(statistics))
        result, timing = perform(self._evaluator, request)
        return (to_arrays(result) if holds(result, Tensor) else result), timing

    def _start(
        self, setup: Setup, windows: Sequence[Arrays], code: str, shipped: Sequence[Any]
    ) -> tuple[tuple[str, ...], float]:
        if code != code_digest():
            raise ValueError(
                f"a worker runs different code from the driver ({Path(search.__file__).parent}): "
                "install the driver's version on every node"
            )
        weights = [
            Weights(config, _without_warnings(arrays))
            for config, arrays in zip(shipped[::2], shipped[1::2], strict=True)
        ]
        tokens = tuple(map(_without_warnings, windows))
        self._evaluator = Evaluator(replace(setup, windows=tokens), weights)
        return self._evaluator.digests, self._evaluator.seconds


def main() -> None:
    """Serve the driver until it closes the connection, or is gone."""
    connection, head = Connection(int(sys.argv[1])), sys.argv[2]
    received: SimpleQueue[object] = SimpleQueue()
    start, leave = partial(_join, head), _leave_cluster
    if head == LOCAL:
        clear_killed()
        folder = tempfile.mkdtemp(prefix=f"prunevolve-{os.getpid()}-", dir=FOLDERS)
        start, leave = partial(_start, folder), partial(_end_local, folder)
    actors = Actors(connection.send, received)
    threading.Thread(target=_serve, args=(actors, start, leave), daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            received.put(connection.recv())
    leave()
    os._exit(0)


def _serve(actors: "Actors", start: Callable[[Ray], None], leave: Callable[[], None]) -> None:
    try:
        actors.serve(start)
    except BaseException:  # noqa: BLE001 - Ray raises SystemExit, too; the driver reads this
        traceback.print_exc()
        leave()
        os._exit(1)


def _start(folder: str, config: Ray) -> None:
    """Start a local Ray."""
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, config.cpus_per_worker * (config.workers or 1)),
        _temp_dir=f"{folder}/r",  # Ray makes it world-accessible, but not the folder around it.
        include_dashboard=False,
        log_to_driver=False,
        logging_level="critical",
    )


def _end_local(folder: str) -> None:
    kill_session(os.getpid())
    shutil.rmtree(folder, ignore_errors=True)


def _join(head: str, config: Ray) -> None:
    """Join a cluster; ask its autoscaler, if there is one, for room for the workers."""
    # Ray adds the folder of this script to its workers' path.
    sys.argv[0] = str(Path(search.__file__).parents[1] / "run_search.py")
    signal.alarm(_CONNECT_SECONDS)  # ends this process: Ray may hang
    ray.init(address=head, log_to_driver=False, logging_level="critical")
    signal.alarm(0)
    if config.workers:
        gpus = {"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}
        request_resources(bundles=[{"CPU": config.cpus_per_worker, **gpus}] * config.workers)


def _leave_cluster() -> None:
    if ray.is_initialized():
        signal.alarm(_END_SECONDS)
        # Otherwise the cluster keeps the request, and the autoscaler its machines.
        request_resources(bundles=[])
        ray.shutdown()


class Actors:
    """The workers, by number.

    Args:
        send: Sends the driver a message.
        received: The driver's messages, and what actors returned.
    """

    def __init__(self, send: Callable[[object], None], received: "SimpleQueue[object]") -> None:
        self._send, self._received = send, received
        self._actors: dict[int, Any] = {}
        self._parts: Arrays = {}
        self._statistics: dict[int, Any] = {}

    def serve(self, start: Callable[[Ray], None]) -> None:
        """Start Ray, do what is received, and say every second how much room there is."""
        prepare = self._received.get()
        assert isinstance(prepare, Prepare)
        start(prepare.ray)
        self._prepare(prepare)
        looked = 0.0
        while True:
            with suppress(Empty):
                self._do(self._received.get(timeout=_LOOK_SECONDS))
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                self._send(self._room())

    def _prepare(self, prepare: Prepare) -> None:
        config = prepare.ray
        self._cpus, self._gpus = config.cpus_per_worker, config.gpus_per_worker
        resources = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus)
        self._actor = resources(prepare.actor or Worker)
        ships = config.ship_model or (config.address == LOCAL and not self._gpus)
        models = map(_shipped, prepare.setup.subjects) if ships else []
        windows = ray.put(prepare.windows)
        self._arguments = [prepare.setup, windows, code_digest(), *chain.from_iterable(models)]
        self._send(self._room())
        self._send(Stored())

    def _do(self, message: object) -> None:
        match message:
            case Hire(worker):
                self._actors[worker] = self._actor.remote()
                self._watch(worker, self._actors[worker].start.remote(*self._arguments), True)
            case Give(worker, request) if worker in self._actors:
                statistics = None
                if isinstance(request, UseStatistics):
                    statistics = self._statistics[request.subject]
                self._watch(worker, self._actors[worker].do.remote(request, statistics))
            case Dismiss(worker) if worker in self._actors:
                ray.kill(self._actors.pop(worker), no_restart=True)
            case Part(name, array):
                self._parts[name] = array
            case UseStatistics(subject):
                self._statistics[subject] = ray.put(self._parts)
                self._parts = {}
                self._send(Stored())
            case (int(worker), bool(starting), future):
                self._report(worker, starting, future)

    def _watch(self, worker: int, reference: Any, starting: bool = False) -> None:
        # The callback runs in a thread of Ray's.
        reference.future().add_done_callback(
            lambda future: self._received.put((worker, starting, future))
        )

    def _report(self, worker: int, starting: bool, future: Any) -> None:
        try:
            result = future.result()
        except ray.exceptions.RayError as error:
            result = _fault_of(error, starting)
        if isinstance(result, Fault):
            self._do(Dismiss(worker))
            self._send(Ended(worker, result))
        elif starting:
            self._send(Started(worker, *result))
        else:
            value, timing = result
            if holds(value, np.ndarray):
                for name, array in value.items():
                    self._send(Part(name, array))
                value = None
            self._send(Reply(worker, value, timing))

    def _room(self) -> Room:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        whole = sum(workers_on(resources, self._cpus, self._gpus) for resources in nodes)
        free = ray.available_resources()
        by_cpu = int(free.get("CPU", 0) // self._cpus)
        by_gpu = int(free.get("GPU", 0) / self._gpus + 1e-9) if self._gpus else by_cpu
        return Room(whole, min(by_cpu, by_gpu))


def workers_on(resources: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Return how many workers with these CPUs and GPUs each fit on a node's resources."""
    by_cpu = int(resources.get("CPU", 0) // cpus)
    if not gpus:
        return by_cpu
    devices = int(resources.get("GPU", 0))
    # The small term guards against rounding: 1 / 0.1 must give ten.
    by_gpu = devices * int(1 / gpus + 1e-9) if gpus < 1 else devices // int(gpus)
    return min(by_cpu, by_gpu)


def _fault_of(error: Exception, starting: bool) -> Fault:
    """Return the fault behind an error that Ray raised in place of a request's result."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return Fault("crowded", "Ray ended it: its node lacked memory")
    unable = isinstance(error, ray.exceptions.RayTaskError | ray.exceptions.RuntimeEnvSetupError)
    if starting and (unable or getattr(error, "actor_init_failed", False)):
        # For example, a node without this project, or with other versions of its dependencies.
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Fault("refused", lines[-1].strip()[:300])
    if isinstance(error, ray.exceptions.RayActorError):
        return Fault("lost", "its process or its node was lost")
    return Fault("lost", f"Ray has no result for it ({type(error).__name__})")


def code_digest() -> str:
    """Return a hash of all source code that an evaluation runs."""
    root = Path(search.__file__).parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _shipped(subject: Subject) -> tuple[Any, Any]:
    """Return a model's config, and a reference to its tensors in the object store."""
    model = load_model(subject.model, subject.dtype, "cpu")
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return model.config.to_dict(), ray.put(to_arrays(tensors))


def _without_warnings(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    # torch warns that the object store's memory is read-only; nothing here writes to it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return to_tensors(arrays)
