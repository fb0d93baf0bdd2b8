"""The process that is connected to Ray for a driver, and the workers, which are Ray's actors.

It starts a local Ray or joins a cluster, does what the driver calls for, and reports. One
thread receives: once the driver has closed the connection, or is gone, it ends this process, and
with it a local Ray. Another thread calls Ray, which may block it.

A worker is an `Evaluator` built from plain values. Large data goes through the object store, which
all workers on a node read without a copy: windows, statistics, and weights if they are sent.
"""

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
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue

import ray
from ray.autoscaler.sdk import request_resources
from torch import Tensor

from prunevolve.configs.schema import Ray
from prunevolve.pruning.models import load_model
from prunevolve.search.evaluator import Evaluator
from prunevolve.search.experiment import Experiment
from prunevolve.search.pool.on_ray import (
    FOLDERS,
    LOCAL,
    Answer,
    Arrays,
    Call,
    Dismiss,
    Give,
    Hire,
    Part,
    Prepare,
    Share,
    clear_killed,
    kill_session,
    to_arrays,
    to_tensors,
)
from prunevolve.search.pool.requests import (
    ROOT,
    CollectStatistics,
    Ended,
    Fault,
    ProbeTensors,
    Reply,
    Request,
    Started,
    Timing,
    UseStatistics,
    attempt,
    code_digest,
    perform,
)
from prunevolve.search.resident import Subject, Weights

Config = dict[str, object]
"""A model's config, as transformers writes it."""

Loaded = tuple[tuple[str, ...], float]
"""The digests of a worker's models, and the seconds of the dense models' windows."""

Done = tuple[object, Arrays, Timing]
"""A request's result, and the tensors if it is some."""

_CONNECT_SECONDS, _END_SECONDS, _LOOK_SECONDS = 30, 4, 1.0


class Worker:
    """An evaluator in an actor; it returns only plain values and numpy arrays."""

    def start(
        self, setup: Experiment, code: str, *shipped: tuple[Config, Arrays]
    ) -> Loaded | Fault:
        """Load the models.

        Args:
            setup: What it is built from.
            code: Digest of the driver's source.
            shipped: Each model's config and tensors; none if workers load models.
        """

        def load() -> Loaded:
            if code != code_digest():
                raise ValueError(
                    f"a worker runs different code from the driver ({ROOT / 'search'}): "
                    "install the driver's version on every node"
                )
            weights = [Weights(config, _without_warnings(arrays)) for config, arrays in shipped]
            self._evaluator = Evaluator(setup, weights)
            return self._evaluator.digests, self._evaluator.seconds

        return attempt(load)

    def do(self, request: Request[object], statistics: Arrays | None = None) -> Done:
        """Do a request with statistics from the object store; tensors are returned as arrays."""
        if isinstance(request, UseStatistics) and statistics is not None:
            request = replace(request, tensors=_without_warnings(statistics))
        result, timing = perform(self._evaluator, request)
        if isinstance(request, CollectStatistics | ProbeTensors) and isinstance(result, dict):
            return None, to_arrays(result), timing
        return result, {}, timing


def main() -> None:
    """Serve the driver until it closes the connection, or is gone."""
    connection, head = Connection(int(sys.argv[1])), sys.argv[2]
    start, leave = partial(_join, head), _leave_cluster
    if head == LOCAL:
        clear_killed()
        folder = tempfile.mkdtemp(prefix=f"prunevolve-{os.getpid()}-", dir=FOLDERS)
        start, leave = partial(_start, folder), partial(_end_local, folder)
    actors = Actors(connection.send, start)
    threading.Thread(target=_serve, args=(actors, leave), daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            actors.todo.put(partial(actors.do, connection.recv()))
    leave()
    os._exit(0)


def _serve(actors: "Actors", leave: Callable[[], None]) -> None:
    try:
        actors.serve()
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
    sys.argv[0] = str(ROOT.parent / "run_search.py")
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
        start: Starts or joins Ray.

    Attributes:
        todo: What is still to be done, by the thread in `serve` alone.
    """

    def __init__(self, send: Callable[[object], None], start: Callable[[Ray], None]) -> None:
        self._send, self._start = send, start
        self.todo: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._actors: dict[int, ray.actor.ActorHandle] = {}
        self._starting: set[int] = set()
        self._hired = self._others = 0
        self._parts: Arrays = {}
        self._statistics: dict[int, ray.ObjectRef] = {}

    def serve(self) -> None:
        """Do what there is to do, and tell the driver every second that Ray still answers."""
        looked = 0.0
        while True:
            with suppress(Empty):
                self.todo.get(timeout=_LOOK_SECONDS)()
            if ray.is_initialized() and time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                ray.nodes()
                self._send(None)

    def do(self, call: Call) -> None:
        """Do what the driver calls for, and answer if it waits."""
        match call:
            case Prepare():
                self._prepare(call)
                self._send(Answer())
            case Hire(most):
                self._send(Answer(self._hire(most)))
            case Give(worker, request):
                self._give(worker, request)
            case Dismiss(worker):
                self._dismiss(worker)
            case Part(name, array):
                self._parts[name] = array
            case Share(subject):
                self._statistics[subject] = ray.put(self._parts)
                self._parts = {}
                self._send(Answer())

    def _prepare(self, call: Prepare) -> None:
        self._start(call.ray)
        self._cpus, self._gpus = call.ray.cpus_per_worker, call.ray.gpus_per_worker
        actor = call.actor or Worker
        self._actor = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus)(actor)
        # On one machine's CPU all workers share the weights, whatever dtype the files have.
        ships = call.ray.address == LOCAL and not self._gpus
        models = map(_shipped, call.setup.subjects) if ships else []
        self._arguments = [ray.put(call.setup), code_digest(), *models]

    def _hire(self, most: int) -> Sequence[int]:
        whole, free = self._room()
        if not self._starting:
            # Free resources mean something only once every starting worker has taken its own.
            self._others = max(0, whole - len(self._actors) - free)
        room = min(most, whole - len(self._actors) - self._others)
        hired = range(self._hired + 1, self._hired + room + 1)
        for worker in hired:
            self._actors[worker] = self._actor.remote()
            self._watch(worker, self._actors[worker].start.remote(*self._arguments))
        self._hired += len(hired)
        self._starting.update(hired)
        return hired

    def _give(self, worker: int, request: Request[object]) -> None:
        if worker in self._actors:  # unless it has ended
            statistics = None
            if isinstance(request, UseStatistics):
                statistics = self._statistics[request.subject]
            self._watch(worker, self._actors[worker].do.remote(request, statistics))

    def _dismiss(self, worker: int) -> None:
        self._starting.discard(worker)
        if worker in self._actors:
            ray.kill(self._actors.pop(worker), no_restart=True)

    def _watch(self, worker: int, reference: ray.ObjectRef) -> None:
        # The callback runs in a thread of Ray's.
        reference.future().add_done_callback(
            lambda future: self.todo.put(partial(self._report, worker, future))
        )

    def _report(self, worker: int, future: "Future[Fault | Loaded | Done]") -> None:
        result: Fault | Loaded | Done
        try:
            result = future.result()
        except ray.exceptions.RayError as error:
            result = _fault_of(error, worker in self._starting)
        self._starting.discard(worker)
        match result:
            case Fault():
                self._dismiss(worker)
                self._send(Ended(worker, result))
            case (digests, seconds):
                self._send(Started(worker, digests, seconds))
            case (value, arrays, timing):
                for name, array in arrays.items():
                    self._send(Part(name, array))
                self._send(Reply(worker, value, timing))

    def _room(self) -> tuple[int, int]:
        """Return how many workers all nodes hold if empty, and besides all that runs now."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        whole = sum(workers_on(resources, self._cpus, self._gpus) for resources in nodes)
        free = ray.available_resources()
        by_cpu = int(free.get("CPU", 0) // self._cpus)
        by_gpu = int(free.get("GPU", 0) / self._gpus + 1e-9) if self._gpus else by_cpu
        return whole, min(by_cpu, by_gpu)


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


def _shipped(subject: Subject) -> ray.ObjectRef:
    """Return a reference to a model's config and tensors in the object store."""
    model = load_model(subject.model, subject.dtype, "cpu")
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return ray.put((model.config.to_dict(), to_arrays(tensors)))


def _without_warnings(arrays: Arrays) -> dict[str, Tensor]:
    # torch warns that the object store's memory is read-only; nothing here writes to it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return to_tensors(arrays)
