"""A crew on Ray: one actor per GPU, or several CPU actors that divide the cores.

An actor is an `Evaluator` built from plain values. Large data goes through the object store, which
all actors on a node read without a copy: windows, statistics, and weights if the driver sends them.
"""

import hashlib
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import search
from pruning.models import load_model
from pruning.progress import Progress
from search.fitness import Evaluator, Setup
from search.pool.cluster import Cluster, LostCluster, pinned, ray
from search.pool.crew import (
    PACKAGES,
    Call,
    Ended,
    Event,
    Fault,
    Reply,
    Started,
    attempt,
    perform,
)
from search.resident import Weights

Array = npt.NDArray[Any]
Arrays = dict[str, Array]


class _Worker:
    """An evaluator in an actor; it returns only plain values and numpy arrays."""

    def start(
        self, setup: Setup, windows: list[Arrays], code: str, *shipped: Any
    ) -> tuple[tuple[str, ...], float] | Fault:
        """Load the models.

        Args:
            setup: Without its windows.
            code: Digest of the driver's source.
            shipped: Each model's config and tensors, alternating; empty if workers load models.
        """
        return attempt(lambda: self._start(setup, windows, code, shipped))

    def do(self, method: str, *arguments: Any) -> tuple[object, dict[str, float]]:
        """Do a call, as `search.pool.crew.perform`."""
        values = [_to_tensors(a) if _holds(a, np.ndarray) else a for a in arguments]
        result, timing = perform(self._evaluator, method, values)
        return (_to_arrays(result) if _holds(result, Tensor) else result), dict(timing)

    def _start(
        self, setup: Setup, windows: list[Arrays], code: str, shipped: Sequence[Any]
    ) -> tuple[tuple[str, ...], float]:
        if code != code_digest():
            raise ValueError(
                f"a worker runs different code from the driver ({Path(search.__file__).parent}): "
                "install the driver's version on every node"
            )
        tokens = tuple(_to_tensors(arrays) for arrays in windows)
        weights = [
            Weights(config, _to_tensors(arrays))
            for config, arrays in zip(shipped[::2], shipped[1::2], strict=True)
        ]
        self._evaluator = Evaluator(replace(setup, windows=tokens), weights)
        return self._evaluator.digests, self._evaluator.seconds


class RayCrew:
    """Actors on a Ray cluster.

    Args:
        cluster: The one that this process is connected to.
        setup: What every worker is built from.
        cpus: Cores per worker, which are also its torch threads.
        gpus: GPUs per worker; with a fraction, workers share a GPU.
        ship_model: Whether this process sends the models, once per node; else workers load them.
    """

    def __init__(
        self, cluster: Cluster, setup: Setup, cpus: int, gpus: float, ship_model: bool
    ) -> None:
        self._cluster = cluster
        self._cpus, self._gpus = cpus, gpus
        self._actor = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Worker)
        windows = [_to_arrays(tokens) for tokens in setup.windows]
        models = [_shipped(subject) for subject in setup.subjects] if ship_model else []
        self._arguments = [
            replace(setup, windows=()),
            ray.put(windows),
            code_digest(),
            *chain.from_iterable(models),
        ]
        self._hired = 0
        self._actors: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._starting: set[int] = set()
        self._futures: dict[Any, int] = {}
        self._room: Counter[str] = Counter()
        self._others: Counter[str] = Counter()

    def room(self) -> int:
        """Return how many more workers fit on the live nodes."""
        own_workers = Counter(self._nodes.values())
        starting = {self._nodes[worker] for worker in self._starting}
        self._room = Counter()
        for node, capacity in self._cluster.capacities(self._cpus, self._gpus).items():
            if node not in starting:
                # Free resources mean something only once every starting worker has taken its own.
                self._others[node] = max(0, capacity.whole - own_workers[node] - capacity.free)
            self._room[node] = capacity.whole - own_workers[node] - self._others[node]
        return (+self._room).total()

    def hire(self) -> int:
        """Begin starting a worker on the node with the most room; see `room`."""
        node = max(self._room, key=lambda name: self._room[name])
        self._room[node] -= 1
        self._hired += 1
        actor = self._actor.options(scheduling_strategy=pinned(node)).remote()
        self._actors[self._hired] = actor
        self._nodes[self._hired] = node
        self._starting.add(self._hired)
        self._futures[actor.start.remote(*self._arguments)] = self._hired
        return self._hired

    def give(self, worker: int, call: Call) -> None:
        """Send a call to a worker."""
        future = self._actors[worker].do.remote(call.method, *call.arguments)
        self._futures[future] = worker

    def dismiss(self, worker: int) -> None:
        """Kill a worker's process."""
        actor = self._actors.pop(worker, None)
        self._nodes.pop(worker, None)
        self._starting.discard(worker)
        self._futures = {f: other for f, other in self._futures.items() if other != worker}
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def events(self, seconds: float) -> Sequence[Event]:
        """Return the results that arrived, waiting at most this long for the first one."""
        self._cluster.check()
        if not self._futures:
            time.sleep(seconds)
            return []
        try:
            ready, rest = ray.wait(list(self._futures), timeout=seconds)
            if ready and rest:
                ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
            return [self._event(future) for future in ready]
        except SystemExit as error:  # Ray raises this when this machine's node is gone
            raise LostCluster("Ray's node on this machine is gone") from error

    def share(self, tensors: Mapping[str, Tensor]) -> object:
        """Put tensors into the object store; Ray resolves the reference in the actor."""
        return ray.put(_to_arrays(tensors))

    def watch(self, progress: Progress) -> None:
        """Do nothing: an actor reports nothing before its call ends."""

    def wish(self, workers: int) -> None:
        """Ask an autoscaler for room for this many workers."""
        self._cluster.wish(workers, self._cpus, self._gpus)

    def _event(self, future: Any) -> Event:
        worker = self._futures.pop(future)
        starting = worker in self._starting
        try:
            result = ray.get(future)
        except ray.exceptions.RayError as error:
            return self._ended(worker, _fault_of(error, starting))
        if not starting:
            result, timing = result
            value = _to_tensor_copies(result) if _holds(result, np.ndarray) else result
            return Reply(worker, value, timing)
        if isinstance(result, Fault):
            return self._ended(worker, result)
        self._starting.discard(worker)
        return Started(worker, *result)

    def _ended(self, worker: int, fault: Fault) -> Ended:
        self.dismiss(worker)
        return Ended(worker, fault)


def _fault_of(error: Exception, starting: bool) -> Fault:
    """Return the fault behind an error that Ray raised in place of a call's result."""
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


def _shipped(subject: Any) -> tuple[Any, Any]:
    """Return a model's config, and a reference to its tensors in the object store."""
    model = load_model(subject.model, subject.dtype, "cpu")
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return model.config.to_dict(), ray.put(_to_arrays(tensors))


def _holds(value: object, kind: type) -> bool:
    return isinstance(value, dict) and any(isinstance(part, kind) for part in value.values())


def _to_arrays(tensors: Any) -> Arrays:
    """Return tensors for the object store; numpy has no bf16, so its bits are sent as int16."""
    bits = {k: t.view(torch.int16) if t.dtype == torch.bfloat16 else t for k, t in tensors.items()}
    return {name: tensor.cpu().numpy() for name, tensor in bits.items()}


def _to_tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Return tensors that share the arrays' memory."""
    # torch warns that the object store's memory is read-only; nothing here writes to it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {k: t.view(torch.bfloat16) if t.dtype == torch.int16 else t for k, t in tensors.items()}


def _to_tensor_copies(arrays: Arrays) -> dict[str, Tensor]:
    return _to_tensors({name: array.copy() for name, array in arrays.items()})
