"""The backend on Ray: workers are its actors, on this machine or on a cluster's nodes.

A worker is an `Evaluator` built from plain values. Large data goes through the object store, which
all workers on a node read without a copy: statistics, and weights if they are sent.
"""

import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from queue import Empty, SimpleQueue

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import Tensor

from prunevolve.pruning.models import load_model
from prunevolve.search.evaluator import Evaluator
from prunevolve.search.experiment import Experiment, Subject
from prunevolve.search.pool import guard
from prunevolve.search.pool.cluster import LOCAL, last_line
from prunevolve.search.pool.worker import ROOT, Fault, Job, Shared, Worker, code_digest
from prunevolve.search.pool.workers import Event, PoolError
from prunevolve.search.records import Timing
from prunevolve.search.resident import Weights

Arrays = dict[str, npt.NDArray[np.generic]]

_LOOK_SECONDS = 1.0

_MOST_FAILED = 5
"""Looks in a row that fail if Ray is lost; a single one may."""


class RayWorker(Worker):
    """A worker that is an actor; it sends tensors as numpy arrays.

    Args:
        code: Digest of the driver's source.
        given: References to the experiment, and to the models if they are sent.
    """

    def __init__(self, code: str, given: Sequence[ray.ObjectRef]) -> None:
        super().__init__(partial(_load, code, given), _fetch)

    def do(self, job: Job, shared: Shared) -> tuple[object, Timing]:
        """Do a job."""
        result, timing = super().do(job, shared)
        return to_arrays(result) if isinstance(result, dict) else result, timing


def _load(code: str, given: Sequence[ray.ObjectRef]) -> Evaluator:
    if code != code_digest():
        raise ValueError(
            f"a worker runs different code from the driver ({ROOT / 'search'}): install the "
            "driver's version on every node"
        )
    experiment, *models = ray.get(list(given))
    weights = [Weights(config, to_tensors(arrays)) for config, arrays in models]
    return Evaluator(experiment, weights)


def _fetch(reference: object) -> object:
    value = ray.get(reference)
    return to_tensors(value) if isinstance(value, dict) else value


class RayBackend:
    """Workers that are Ray's actors: one per GPU, or several that divide the cores.

    Args:
        head: The address of Ray.
        experiment: What workers are built from.
        actor: The class of the workers.
    """

    def __init__(self, head: str, experiment: Experiment, actor: type = RayWorker) -> None:
        config = experiment.config.ray
        self._head, self._config, self._experiment = head, config, experiment
        self._node = ray.get_runtime_context().get_node_id()
        resources = {"num_cpus": config.cpus_per_worker, "num_gpus": config.gpus_per_worker}
        self._new_actor = ray.remote(**resources)(actor).remote
        self._actors: dict[int, ray.actor.ActorHandle] = {}
        self._started = 0
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._trouble = ""
        self._closing = threading.Event()
        self._look()
        self._watch = threading.Thread(target=self._look_again, daemon=True)

    def __enter__(self) -> "RayBackend":
        with ExitStack() as stack:
            stack.callback(self._closing.set)  # if a model cannot be loaded
            self._watch.start()  # before that: it takes minutes, a download longer
            # On one machine's CPU all workers share the weights, whatever dtype the files have.
            sends = self._config.address == LOCAL and not self._config.gpus_per_worker
            models = [_sent(subject) for subject in self._experiment.subjects] if sends else []
            given = [ray.put(self._experiment), *models]
            self._new_actor = partial(self._new_actor, code_digest(), given)
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()

    def room(self) -> int:
        """Return how many workers the nodes hold, as of a second ago."""
        cpus, gpus = self._config.cpus_per_worker, self._config.gpus_per_worker
        return sum(workers_on(resources, cpus, gpus) for resources in self._nodes)

    def start(self) -> int:
        """Ask for an actor; until there is room it waits, and is the autoscaler's demand."""
        self._started += 1
        self._actors[self._started] = self._new_actor()
        return self._started

    def stop(self, worker: int) -> None:
        """Kill a worker's process."""
        if actor := self._actors.pop(worker, None):
            ray.kill(actor, no_restart=True)

    def give(self, worker: int, job: Job, shared: Shared) -> None:
        """Send a job to a worker."""
        future = self._actors[worker].do.remote(job, shared).future()
        # In a thread of Ray's.
        future.add_done_callback(lambda done: self._events.put(_event(worker, done)))

    def events(self, seconds: float) -> Sequence[Event]:
        """Return the events that arrived, waiting at most this long; PoolError if Ray is lost."""
        found = []
        with suppress(Empty):
            found.append(self._events.get(timeout=seconds))
            while True:
                found.append(self._events.get_nowait())
        if self._trouble:
            raise PoolError(f"Ray ({self._head}) failed: {self._trouble}")
        return found

    def share(self, value: object) -> object:
        """Put a value into the object store, which all workers on a node read without a copy."""
        return ray.put(to_arrays(value) if isinstance(value, Mapping) else value)

    def _look(self) -> None:
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        self._nodes = list(nodes.values())
        self._trouble = "" if self._node in nodes else "its node on this machine is gone"

    def _look_again(self) -> None:
        """Look at the nodes every second, and tell the guard that Ray still answers."""
        failed = 0
        while not self._closing.wait(_LOOK_SECONDS):
            try:
                self._look()
                failed = 0
            except Exception as error:  # noqa: BLE001 - of whatever kind, Ray does not answer
                failed += 1
                if failed >= _MOST_FAILED:
                    self._trouble = last_line(str(error)) or type(error).__name__
            guard.tell("answers")


def _event(worker: int, done: "Future[tuple[object, Timing]]") -> Event:
    try:
        result, timing = done.result()
    except ray.exceptions.RayError as error:
        return worker, _fault_of(error), {}
    return worker, to_tensors(result) if isinstance(result, dict) else result, timing


def _fault_of(error: Exception) -> Fault:
    """Return the fault behind an error that Ray raised in place of a job's result."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return Fault("no memory on node", "Ray killed it: its node lacked memory")
    unable = isinstance(error, ray.exceptions.RayTaskError | ray.exceptions.RuntimeEnvSetupError)
    if unable or getattr(error, "actor_init_failed", False):
        # For example, a node without this project, or with other versions of its dependencies.
        return Fault("refused", last_line(str(error)) or type(error).__name__)
    if isinstance(error, ray.exceptions.RayActorError):
        return Fault("lost", "its process or its node was lost")
    return Fault("lost", f"Ray has no result for it ({type(error).__name__})")


def workers_on(resources: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Return how many workers with these CPUs and GPUs each fit on a node's resources."""
    by_cpu = int(resources.get("CPU", 0) // cpus)
    if not gpus:
        return by_cpu
    devices = int(resources.get("GPU", 0))
    # The small term guards against rounding: 1 / 0.1 must give ten.
    by_gpu = devices * int(1 / gpus + 1e-9) if gpus < 1 else devices // int(gpus)
    return min(by_cpu, by_gpu)


# What is sent


def _sent(subject: Subject) -> ray.ObjectRef:
    """Return a reference to a model's config and tensors in the object store."""
    model = load_model(subject.model, subject.dtype, "cpu")
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return ray.put((model.config.to_dict(), to_arrays(tensors)))


def to_arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    """Return tensors for messages; numpy has no bf16, so its bits are sent as int16."""
    bits = {k: t.view(torch.int16) if t.dtype == torch.bfloat16 else t for k, t in tensors.items()}
    return {name: tensor.cpu().numpy() for name, tensor in bits.items()}


def to_tensors(arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Tensor]:
    """Return tensors that share the arrays' memory."""
    # torch warns that the object store's memory is read-only; nothing here writes to it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {k: t.view(torch.bfloat16) if t.dtype == torch.int16 else t for k, t in tensors.items()}
