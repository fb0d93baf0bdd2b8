"""The backend on Ray: workers are its actors, on this machine or on a cluster's nodes.

Large data goes through the object store, which all workers on a node read without a copy:
statistics, and weights if they are sent.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Self

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import Tensor

from prunevolve.command_line import Resumable
from prunevolve.configs.schema import Ray
from prunevolve.pruning.attention import use_blocked_attention
from prunevolve.pruning.models import load_model
from prunevolve.search.evaluator import Evaluator
from prunevolve.search.experiment import Experiment
from prunevolve.search.pool import guard
from prunevolve.search.pool.cluster import LOCAL, last_line
from prunevolve.search.pool.worker import ROOT, Event, Fault, Job, Shared, Worker, code_digest
from prunevolve.search.records import Timing

_LOOK_SECONDS = 1.0
_MOST_FAILED = 5  # looks in a row that fail if Ray is lost; a single one may


def _load(code: str, given: Sequence[ray.ObjectRef]) -> Evaluator:
    """Return a worker's evaluator, if its code is the driver's.

    What is given refers to the experiment, and to the models if they are sent.
    """
    send_tensors_as_arrays()
    if code != code_digest():
        raise ValueError(
            f"a worker runs different code from the driver ({ROOT / 'search'}): install the "
            "driver's version on every node"
        )
    experiment, *models = ray.get(list(given))
    for model in models:
        use_blocked_attention(model)  # which registers it in this process
    return Evaluator(experiment, models)


class RayBackend:
    """Workers that are Ray's actors: one per GPU, or several that divide the cores."""

    def __init__(self, head: str, config: Ray) -> None:
        self._head, self._config = head, config
        self._new_actor: Callable[[], ray.actor.ActorHandle]  # from `opened` on
        self._node = ray.get_runtime_context().get_node_id()
        self._actors: dict[int, ray.actor.ActorHandle] = {}
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._look()

    @classmethod
    @contextmanager
    def opened(cls, head: str, experiment: Experiment, actor: type = Worker) -> Iterator[Self]:
        """Load the models that are sent, and yield the backend; Ray is watched until the end."""
        send_tensors_as_arrays()
        config, closing = experiment.config.ray, threading.Event()
        backend = cls(head, config)
        # Before models are loaded: it takes minutes, a download longer.
        threading.Thread(target=backend._watch, args=(closing,), daemon=True).start()
        try:
            # On one machine's CPU all workers share the weights, whatever dtype the files have.
            sends = config.address == LOCAL and not config.gpus_per_worker
            subjects = experiment.subjects if sends else ()
            models = [ray.put(load_model(x.model, x.dtype)) for x in subjects]
            load = partial(_load, code_digest(), [ray.put(experiment), *models])
            resources = {"num_cpus": config.cpus_per_worker, "num_gpus": config.gpus_per_worker}
            backend._new_actor = partial(ray.remote(**resources)(actor).remote, load)
            yield backend
        finally:
            closing.set()

    def room(self) -> int:
        """Return how many workers the nodes hold, as of a second ago."""
        return self._room

    def start(self, worker: int) -> None:
        """Ask for an actor; until there is room it waits, and is the autoscaler's demand."""
        self._actors[worker] = self._new_actor()

    def stop(self, worker: int) -> None:
        if actor := self._actors.pop(worker, None):
            ray.kill(actor, no_restart=True)

    def give(self, worker: int, job: Job, shared: Shared) -> None:
        def answer(done: Future[tuple[object, Timing]]) -> None:  # in a thread of Ray's
            try:
                self._events.put((worker, *done.result()))
            except ray.exceptions.RayError as error:
                self._events.put((worker, _fault_of(error), {}))

        self._actors[worker].do.remote(job, shared).future().add_done_callback(answer)

    def events(self, seconds: float) -> Sequence[Event]:
        """Return the events that arrived, waiting at most this long; Resumable if Ray is lost."""
        events = []
        with suppress(Empty):
            events.append(self._events.get(timeout=seconds))
            while True:
                events.append(self._events.get_nowait())
        if self._trouble:
            raise Resumable(f"Ray ({self._head}) failed: {self._trouble}")
        return events

    def share(self, value: object) -> Callable[[], object]:
        return partial(ray.get, ray.put(value))

    def _look(self) -> None:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cpus, gpus = self._config.cpus_per_worker, self._config.gpus_per_worker
        self._room = sum(workers_on(node["Resources"], cpus, gpus) for node in nodes)
        is_here = any(node["NodeID"] == self._node for node in nodes)
        self._trouble = "" if is_here else "its node on this machine is gone"

    def _watch(self, closing: threading.Event) -> None:
        """Look at the nodes every second, and tell the guard that Ray still answers."""
        failed = 0
        while not closing.wait(_LOOK_SECONDS):
            try:
                self._look()
                failed = 0
            except Exception as error:  # noqa: BLE001 - of whatever kind, Ray does not answer
                failed += 1
                if failed >= _MOST_FAILED:
                    self._trouble = last_line(str(error)) or type(error).__name__
            guard.tell("answers")


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


def send_tensors_as_arrays() -> None:
    """Let this process send tensors as numpy arrays, which Ray reads without a copy."""
    ray.util.register_serializer(Tensor, serializer=_to_array, deserializer=_to_tensor)


def _to_array(tensor: Tensor) -> tuple[npt.NDArray[np.generic], torch.dtype]:
    """Return a tensor's array and dtype: numpy has no bf16, so its bits are int16."""
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return bits.cpu().numpy(), tensor.dtype


def _to_tensor(sent: tuple[npt.NDArray[np.generic], torch.dtype]) -> Tensor:
    """Return the tensor, which shares the array's memory."""
    array, dtype = sent
    # torch warns that the object store's memory is read-only; nothing here writes to it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array).view(dtype)
